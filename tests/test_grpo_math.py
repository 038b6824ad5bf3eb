"""GRPO's pure functions against scalar loops and float64 references."""

import itertools
import math
import statistics

import pytest
import torch

import grpo_vla
from grpo_vla import (
    aggregation_weights,
    clipped_surrogate,
    decision_advantages,
    discounted_returns,
    grpo_advantages,
    informative,
    merge_tokens,
    sequence_log_ratio,
)


def test_returns_by_hand():
    one = [1, 1, 1]  # an environment step a decision
    assert discounted_returns([0.0, 0.0, 1.0], one, 1.0, 1) == [1.0] * 3
    assert discounted_returns([0.0, 0.0, 1.0], one, 0.9, 1) == pytest.approx([0.81, 0.9, 1.0])
    assert discounted_returns([1.0, 2.0, 4.0], one, 0.5, 1) == pytest.approx([1 + 1 + 1, 2 + 2, 4])
    assert discounted_returns([3.0, 7.0], [1, 1], 0.0, 1) == [3.0, 7.0]
    # chunks of 4, success at environment step 10: 9, 5 and 1 steps after each decision's first
    found = discounted_returns([0.0, 0.0, 1.0], [4, 4, 2], 0.9, 4)
    assert found == pytest.approx([0.9 ** (9 / 4), 0.9 ** (5 / 4), 0.9 ** (1 / 4)])


def test_decision_advantages_against_a_loop():
    rng = torch.Generator().manual_seed(0)
    returns = torch.rand(3, 4, 6, generator=rng, dtype=torch.float64)
    lengths = torch.tensor([[6, 1, 2, 2], [5, 3, 3, 1], [1, 1, 1, 1]])
    present = torch.arange(6) < lengths[..., None]
    found = decision_advantages(returns.masked_fill(~present, 77.0), present)  # what is not there is not read
    for m, i, t in itertools.product(range(3), range(4), range(6)):
        running = [returns[m, j, t].item() for j in range(4) if lengths[m, j] > t]
        wanted = 0.0
        if lengths[m, i] > t and len(running) > 1:
            wanted = returns[m, i, t].item() - sum(running) / len(running)
        assert found[m, i, t].item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("value", [1 / 3, -1 / 3])
def test_decisions_after_which_all_end_alike_have_no_advantage_at_all(value):
    returns = torch.full((1, 8, 3), value)  # the mean of seven of them differs by a rounding
    returns[0, 0, 0] = 0.9  # decision 0: a difference
    present = torch.ones(1, 8, 3, dtype=torch.bool)
    present[:, 7, 1] = False  # decision 1: seven alike, one member has ended
    present[:, 1:, 2] = False  # decision 2: a lone member
    found = decision_advantages(returns, present)
    assert (found[:, :, 0] != 0).all() and (found[:, :, 1:] == 0).all()


def test_a_late_success_is_better_than_the_failures_it_was_among():
    """GRPO blames every decision of the slow success; its rivals at the time show that it did well."""
    returns = torch.zeros(1, 4, 3)
    returns[0, 0] = torch.tensor([0.25, 0.5, 1.0])  # success at decision 3; 1 and 2 at once; 3 never
    returns[0, 1:3, 0] = 1.0
    present = torch.tensor([[[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1]]], dtype=torch.bool)
    assert (grpo_advantages(returns[:, :, 0], False, False)[0, 0] < 0).all()
    found = decision_advantages(returns, present)[0]
    assert found[0, 1] > 0 > found[3, 1] and found[0, 0] < 0


@pytest.mark.parametrize(
    ("outcomes", "successes", "kept"),
    [
        ([0, 0, 0, 1], [False] * 3 + [True], True),
        ([0, 0, 0, 0], [False] * 4, False),
        ([1, 1, 1, 1], [True] * 4, False),
        ([0.9, 0.8, 1, 1], [True] * 4, False),  # all succeed, some later: the rate is above the bound
        ([0.1, 0.0, 0, 0], [False] * 4, False),
        ([0.3] * 4, [True, False, True, False], False),  # equal outcomes: nothing to compare
        ([10, 11, 11, 11], None, True),
        ([11, 11, 11, 11], None, False),
    ],
)
def test_uninformative_groups(outcomes, successes, kept):
    assert informative(outcomes, successes, 0.1, 0.9) is kept


def test_accuracy_bounds_are_included():
    successes = [True] + [False] * 9
    assert informative(successes, successes, 0.1, 0.9)
    assert not informative(successes, successes, 0.11, 0.9)
    successes = [True] * 9 + [False]
    assert informative(successes, successes, 0.1, 0.9)
    assert not informative(successes, successes, 0.1, 0.89)


@pytest.mark.parametrize("std_normalisation", [True, False])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_advantages_against_a_loop(std_normalisation, leave_one_out):
    groups = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups[1] = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
    found = grpo_advantages(groups.float(), std_normalisation, leave_one_out)
    for members, row in zip(groups.tolist(), found.tolist(), strict=True):
        for i, reward in enumerate(members):
            others = members[:i] + members[i + 1 :] if leave_one_out else members
            wanted = reward - sum(others) / len(others)
            wanted /= statistics.stdev(members) + 1e-6 if std_normalisation else 1
            assert row[i] == pytest.approx(wanted, abs=2e-6)
            assert math.copysign(1, row[i]) == math.copysign(1, wanted)


@pytest.mark.parametrize("std_normalisation", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e-8, 77.7])
def test_a_uniform_group_has_no_advantage_at_all(value, std_normalisation):
    groups = torch.full((1, 7), value)
    assert (grpo_advantages(groups, std_normalisation, False) == 0).all()
    assert (grpo_advantages(groups, std_normalisation, True) == 0).all()


COUNTS, EPISODE = torch.tensor([4, 3, 4, 0, 1, 4]), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean", "constant-length"])
def test_aggregation_against_loops(aggregation):
    terms = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(4) < COUNTS[:, None]
    weights = aggregation_weights(COUNTS, EPISODE, 3, aggregation, 10)
    found = (torch.where(mask, terms, 0.0).sum(1) * weights).sum().item()
    by_episode = [[], [], []]
    for row, episode in enumerate(EPISODE.tolist()):
        by_episode[episode] += [terms[row, k].item() for k in range(4) if mask[row, k]]
    wanted = {
        "token-mean": sum(map(sum, by_episode)) / sum(map(len, by_episode)),
        "sequence-mean-token-mean": sum(sum(e) / len(e) for e in by_episode) / 3,
        "constant-length": sum(sum(e) / 10 for e in by_episode) / 3,
    }
    assert found == pytest.approx(wanted[aggregation], rel=1e-5)
    assert all(wanted[a] != pytest.approx(wanted[b], rel=1e-3) for a, b in itertools.combinations(wanted, 2))


def test_sequence_ratio_is_the_geometric_mean():
    log_ratio = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.3
    mask = torch.arange(4) < COUNTS[:, None]
    found = sequence_log_ratio(log_ratio.float(), mask, EPISODE, 4).exp()
    for episode in range(3):
        ratios = [
            math.exp(log_ratio[row, k])
            for row in range(6)
            for k in range(4)
            if EPISODE[row] == episode and mask[row, k]
        ]
        assert found[episode].item() == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-5)
    assert found[3] == 1


def gspo_by_autograd(new, old, mask, episode, advantages, low, high):
    """-1/E sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean log-ratio), differentiated as it stands."""
    losses = []
    for i in range(int(episode.max()) + 1):
        rows = episode == i
        s = ((new - old)[rows][mask[rows]]).mean().exp()
        losses.append(-torch.minimum(s * advantages[i], s.clamp(1 - low, 1 + high) * advantages[i]))
    return sum(losses) / len(losses)


def test_gspo_gradient_in_pieces_equals_autograd_of_the_whole():
    """As the update computes it: the episode's value first, then each token's own gradient."""
    rng = torch.Generator().manual_seed(3)
    old = torch.randn(6, 4, generator=rng)
    new = (old + 0.4 * torch.randn(6, 4, generator=rng)).requires_grad_()
    mask = torch.arange(4) < COUNTS[:, None]
    advantages = torch.tensor([1.0, -2.0, 0.5])
    gspo_by_autograd(new, old, mask, EPISODE, advantages, 0.1, 0.1).backward()
    wanted, new.grad = new.grad, None
    weights = aggregation_weights(mask.sum(1), EPISODE, 3, "sequence-mean-token-mean", 0)
    drift = sequence_log_ratio((new - old).detach(), mask, EPISODE, 3)
    for index in torch.arange(6).split(2):
        merged, group = merge_tokens(new[index], mask[index], "sequence", 2)
        log_ratio = drift[EPISODE[index], None] + merged - merged.detach()
        surrogate = clipped_surrogate(log_ratio, advantages[EPISODE[index]], 0.1, 0.1)
        (torch.where(group, surrogate, 0.0).sum(1) * weights[index]).sum().backward()
    torch.testing.assert_close(new.grad, wanted, rtol=1e-5, atol=1e-7)
    assert wanted.abs().max() > 0.01 and (wanted[~mask] == 0).all()


def test_minibatches_average_to_the_batch():
    """An uneven last minibatch included: each loss is weighted by its share of what was drawn."""
    terms = torch.randn(7, generator=torch.Generator().manual_seed(4))
    counts, episode = torch.ones(7, dtype=torch.int64), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    weights = aggregation_weights(counts, episode, 3, "sequence-mean-token-mean", 0)
    whole = (terms * weights).sum().item()
    order, losses = torch.randperm(7, generator=torch.Generator().manual_seed(5)), []
    for drawn in order.split(3):
        scale = 7 / len(drawn)
        losses.append(((terms * weights)[drawn].sum() * scale).item() * len(drawn) / 7)
    assert sum(losses) == pytest.approx(whole, rel=1e-5)


def test_masked_tokens_have_no_gradient():
    new = torch.zeros(2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    for level in ("token", "step", "chunk", "sequence"):
        merged, group = merge_tokens(new, mask, level, 2)
        loss = torch.where(group, clipped_surrogate(merged, torch.tensor([1.0, -1.0]), 0.2, 0.28), 0.0).sum()
        (gradient,) = torch.autograd.grad(loss, new)
        assert (gradient[~mask] == 0).all() and (gradient[mask] == -1).all()


def test_map_tensors_walks_any_nesting():
    value = {"a": [torch.ones(2), {3: torch.ones(1)}], "b": None, "c": "text"}
    found = grpo_vla.map_tensors(lambda x: x * 2, value)
    assert found["a"][0].tolist() == [2, 2] and found["a"][1][3].tolist() == [2]
    assert found["b"] is None and found["c"] == "text"
