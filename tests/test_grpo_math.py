"""GRPO's pure functions against scalar loops and float64 references."""

import itertools
import math
import statistics

import pytest
import torch

from grpo_vla import (
    Args,
    aggregation_weights,
    decision_advantages,
    discounted_returns,
    grpo_advantages,
    grpo_loss,
    informative,
    merge_tokens,
    micro_batches,
    minibatches,
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
COVERED, TOTALS = torch.arange(4) < COUNTS[:, None], (16, 3)
AGGREGATIONS = ["token-mean", "sequence-mean-token-mean", "constant-length"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregation_against_loops(aggregation):
    terms = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    mask = COVERED
    weights = aggregation_weights(COVERED, EPISODE, 4, TOTALS, aggregation, 10)
    assert weights.dtype == torch.float32
    found = (torch.where(mask, terms, 0.0).sum(1) * weights).sum().item()
    by_episode = [[], [], []]
    for row, episode in enumerate(EPISODE.tolist()):
        by_episode[episode] += [terms[row, k].item() for k in range(4) if mask[row, k]]
    wanted = {
        "token-mean": sum(map(sum, by_episode)) / sum(map(len, by_episode)),
        "sequence-mean-token-mean": sum(sum(e) / len(e) for e in by_episode) / 3,
        "constant-length": sum(sum(e) / (10 * 4) for e in by_episode) / 3,
    }
    assert found == pytest.approx(wanted[aggregation], rel=1e-5)
    assert all(wanted[a] != pytest.approx(wanted[b], rel=1e-3) for a, b in itertools.combinations(wanted, 2))


def test_sequence_ratio_is_the_geometric_mean():
    log_ratio = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.3
    mask = COVERED
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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_two_processes_are_those_of_one(aggregation):
    """The first has one of the three episodes, the second two."""
    whole = aggregation_weights(COVERED, EPISODE, 4, TOTALS, aggregation, 10)
    for rows, first in ((slice(0, 2), 0), (slice(2, 6), 1)):
        found = aggregation_weights(COVERED[rows], EPISODE[rows] - first, 4, TOTALS, aggregation, 10)
        torch.testing.assert_close(found, whole[rows])


@pytest.mark.parametrize("aggregation", AGGREGATIONS[1:])
def test_an_episode_weighs_the_same_whatever_a_ratio_covers(aggregation):
    """Chunks of 4 actions of 3 numbers, one of a joint that the arm lacks; an episode of 5 full chunks among
    10 weighs half of what 10 chunks do with constant-length."""
    whole, episode = torch.tensor([[True, True, False]] * 4).flatten()[None], torch.arange(10) // 5
    sums = {}
    for level in ("token", "step", "chunk", "sequence"):
        one = merge_tokens(whole.float(), whole, level, 4)[1]
        covered = one.expand(10, -1)
        totals = int(covered.sum()), 2
        weights = aggregation_weights(covered, episode, int(one.sum()), totals, aggregation, 10)
        sums[level] = (weights * covered.sum(1))[:5].sum().item()
    wanted = 0.5 if aggregation == "sequence-mean-token-mean" else 0.25
    assert sums == {level: pytest.approx(wanted, rel=1e-6) for level in sums}


# --- the loss and its pieces


LEVELS = ["token", "step", "chunk", "sequence"]


def make_batch(level, rows=12, seed=0, dtype=torch.float64):
    """Decisions of chunks of 2 actions of 3 numbers, as `train` has them -> log-probs and entropies of the
    policy in training, its columns, args. The third number is of a joint that the arm lacks; some chunks were
    cut off, one altogether."""
    rng = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=rng, dtype=dtype)  # noqa: E731
    args = Args(chunk=2, ratio_level=level, clip_low=0.2, clip_high=0.28)
    executed = torch.tensor([2, 1, 2, 0, 1, 2] * 2)[:rows, None, None] > torch.arange(2)[:, None]
    mask = (executed & torch.tensor([True, True, False])).flatten(1)  # (B, 6)
    old = random(rows, 6)
    new, entropies = (old + 0.25 * random(rows, 6)).requires_grad_(), random(rows, 6).requires_grad_()
    old_log_probs, covered = merge_tokens(old, mask, level, 2)
    data = dict(mask=mask, covered=covered, log_probs=old, old_log_probs=old_log_probs)
    data |= dict(advantages=random(rows), weights=random(rows).abs(), fresh=torch.arange(rows) % 3 > 0)
    data |= dict(reference_log_probs=old + 0.3 * random(rows, 6), episode_log_ratio=0.25 * random(rows))
    return new, entropies, data, args


def totals_of(data):
    covered, fresh = data["covered"], data["fresh"][:, None]
    return torch.stack([covered.sum(), data["mask"].sum(), (covered & fresh).sum()])


def reference_loss(new, entropies, data, totals, args, scale):
    """grpo_loss by loops over numbers -> its value, its derivatives by both inputs, and the metrics."""
    new, entropies, (ratios, tokens, fresh) = new.tolist(), entropies.tolist(), totals.tolist()
    d_new, d_entropies = ([[0.0] * 6 for _ in new] for _ in range(2))
    found = dict.fromkeys(("policy", "kl", "entropy", "approx_kl", "clip_fraction", "ratio_error"), 0.0)
    parts = {"step": [[0, 1, 2], [3, 4, 5]], "chunk": [[0, 1, 2, 3, 4, 5]]}
    for b, advantage in enumerate(data["advantages"].tolist()):
        weight = data["weights"][b].item() * scale
        valid = [i for i in range(6) if data["mask"][b, i]]
        for part in parts.get(args.ratio_level, [[i] for i in range(6)]):
            part = [i for i in part if i in valid]
            if not part:
                continue
            log_ratio = sum(new[b][i] - data["log_probs"][b, i].item() for i in part)
            if args.ratio_level == "sequence":
                log_ratio = data["episode_log_ratio"][b].item()
            rho = math.exp(log_ratio)
            bound = min(max(rho, 1 - args.clip_low), 1 + args.clip_high)
            found["policy"] -= weight * min(rho * advantage, bound * advantage)
            for i in part:  # d rho = rho d log_ratio, and none where the bound is the smaller
                d_new[b][i] -= weight * rho * advantage if rho * advantage <= bound * advantage else 0.0
            found["approx_kl"] += (rho - 1 - log_ratio) / ratios
            found["clip_fraction"] += (bound != rho) / ratios
            found["ratio_error"] += abs(rho - 1) / fresh if data["fresh"][b] else 0.0
        for i in valid:
            found["entropy"] += entropies[b][i] / tokens
            d_entropies[b][i] -= args.entropy_coef / tokens
            x = data["reference_log_probs"][b, i].item() - new[b][i]
            found["kl"] += (math.exp(x) - 1 - x) / tokens
            d_new[b][i] -= args.kl_coef * (math.exp(x) - 1) / tokens
    loss = found["policy"] - args.entropy_coef * found["entropy"] + args.kl_coef * found.pop("kl")
    return loss, *(torch.tensor(d, dtype=torch.float64) for d in (d_new, d_entropies)), found


@pytest.mark.parametrize(("entropy_coef", "kl_coef"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (-0.2, 0.4)])
@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_its_gradient_against_loops(level, entropy_coef, kl_coef):
    new, entropies, data, args = make_batch(level)
    args.entropy_coef, args.kl_coef = entropy_coef, kl_coef
    totals = 3 * totals_of(data) + torch.tensor([0, 5, 7])  # of a minibatch that has other rows too
    loss, metrics = grpo_loss(new, entropies, data, totals, args, scale=1.7)
    loss.backward()
    wanted, d_new, d_entropies, named = reference_loss(new, entropies, data, totals, args, 1.7)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(new.grad, d_new, rtol=1e-10, atol=1e-14)
    if entropy_coef:
        torch.testing.assert_close(entropies.grad, d_entropies, rtol=1e-10, atol=1e-14)
    else:
        assert not entropies.grad.any()
    assert (new.grad[~data["mask"]] == 0).all() and (new.grad != 0).sum() > 10
    assert 0.1 < named["clip_fraction"] * totals[0] / data["covered"].sum() < 0.9
    assert metrics.keys() == {
        "loss/total",
        *(f"policy/{name}" for name in named if name != "policy"),
        "loss/policy",
    }
    for name, value in named.items():
        found = metrics["loss/policy" if name == "policy" else f"policy/{name}"]
        assert not found.requires_grad and found.item() == pytest.approx(value, rel=1e-6), name
    assert metrics["loss/total"] == loss


@pytest.mark.parametrize("prompts", ["alike", "of different lengths"])
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_micro_batches_add_up(level, prompts):
    new, entropies, data, args = make_batch(level)
    args.entropy_coef, args.kl_coef = 0.3, 0.4
    data |= dict(new=new, entropies=entropies)
    rows, lengths = torch.tensor([7, 0, 3, 11, 1, 8, 4]), None
    if prompts != "alike":
        lengths = torch.tensor([5, 6, 5, 7] * 3)
    chosen = {key: x[rows] for key, x in data.items()}
    totals = totals_of(chosen)
    loss, metrics = grpo_loss(chosen["new"], chosen["entropies"], chosen, totals, args, 2.5)
    wanted = torch.autograd.grad(loss, [new, entropies])
    assert wanted[0][rows].any() and not wanted[0][[2, 5, 6, 9, 10]].any()
    for size in (1, 2, 3, 100):
        found, seen, terms = [torch.zeros_like(new), torch.zeros_like(new)], [], []
        for index, micro in micro_batches(rows, data, lengths, size):
            assert len(index) <= size and torch.equal(micro["mask"], data["mask"][index])
            if lengths is not None:
                assert len(micro["length"].unique()) == 1 and torch.equal(micro["length"], lengths[index])
            part, term = grpo_loss(micro["new"], micro["entropies"], micro, totals, args, 2.5)
            for total, gradient in zip(found, torch.autograd.grad(part, [new, entropies]), strict=True):
                total += gradient
            seen += index.tolist()
            terms.append(term)
        assert sorted(seen) == sorted(rows.tolist())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for name, value in metrics.items():
            assert sum(term[name] for term in terms).item() == pytest.approx(value.item(), rel=1e-9), name


def draws(units, pool, per_epoch, epochs=1, seed=0):
    return list(minibatches(units, pool, epochs, per_epoch, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradients_of_minibatches_average_to_the_batchs(level):
    """Equally many units each: rows, or with GSPO whole episodes of unequal length."""
    new, entropies, data, args = make_batch(level)
    units, pool = torch.arange(12), torch.tensor([0, 2, 3, 4, 7, 9])  # the others have no advantage
    if level == "sequence":
        units = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5])
        pool = torch.arange(6)
    data |= dict(new=new, entropies=entropies)
    if level == "token":
        data["advantages"][[1, 5, 6, 8, 10, 11]] = 0.0
    loss, _ = grpo_loss(new, entropies, data, totals_of(data), args)
    (wanted,) = torch.autograd.grad(loss, new)
    for per_epoch in (1, 2, 3, 6):
        found, parts = torch.zeros_like(new), draws(units, pool, per_epoch)
        assert len(parts) == per_epoch
        for rows, scale in parts:
            assert len(units[rows].unique()) == 6 // per_epoch  # whole episodes
            chosen = {key: x[rows] for key, x in data.items()}
            part, _ = grpo_loss(chosen["new"], chosen["entropies"], chosen, totals_of(chosen), args, scale)
            found += torch.autograd.grad(part, new)[0] / per_epoch
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_every_minibatch_estimates_the_whole_batch():
    """Rows that are all alike: whatever a minibatch's size, its loss is the batch's."""
    log_probs = torch.zeros(7, 4)
    data = dict(mask=torch.ones(7, 4, dtype=torch.bool), old_log_probs=log_probs, advantages=torch.ones(7))
    data |= dict(weights=torch.full((7,), 1 / 28), fresh=torch.ones(7, dtype=torch.bool))
    data["covered"], args = data["mask"], Args(chunk=2, ratio_level="token")
    sizes = []
    for rows, scale in draws(torch.arange(7), torch.arange(7), 3):
        chosen = {key: x[rows] for key, x in data.items()}
        loss, _ = grpo_loss(log_probs[rows], log_probs[rows], chosen, totals_of(chosen), args, scale)
        assert loss.item() == pytest.approx(-1, rel=1e-6)
        sizes.append(len(rows))
    assert sorted(sizes) == [2, 2, 3]


def test_minibatches_draw_every_unit_once_an_epoch():
    units, pool = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4]), torch.tensor([0, 2, 3, 4])
    found = [rows.tolist() for rows, _ in draws(units, pool, 2, epochs=3)]
    wanted, epochs = [0, 1, 3, 4, 5, 6, 7], [found[i] + found[i + 1] for i in (0, 2, 4)]
    assert all(sorted(rows) == wanted for rows in epochs) and len({str(found[i]) for i in (0, 2, 4)}) > 1
    assert found == [rows.tolist() for rows, _ in draws(units, pool, 2, epochs=3)]
    assert found != [rows.tolist() for rows, _ in draws(units, pool, 2, epochs=3, seed=1)]
    empty = draws(units, pool[:1], 3)  # one of torchrun's processes may have fewer units than minibatches
    assert sorted(len(rows) for rows, _ in empty) == [0, 0, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_minibatches_of_few_units_average_to_the_batch_too(size):
    """A process with fewer units than minibatches: its losses' sum over three is three times its batch's."""
    units = torch.arange(6)
    assert sum(scale * len(rows) for rows, scale in draws(units, units[:size], 3)) / 3 == size


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
    new, entropies, data, args = make_batch("sequence", dtype=torch.float32)
    args.clip_low = args.clip_high = 0.05
    episode = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4])
    mask, advantages = data["mask"], torch.tensor([1.0, -2.0, 0.5, -1.0, 0.7])
    whole = gspo_by_autograd(new, data["log_probs"], mask, episode, advantages, 0.05, 0.05)
    (wanted,) = torch.autograd.grad(whole, new)
    assert (wanted[~mask] == 0).all() and 1 < len({i for i in range(5) if wanted[episode == i].any()}) < 5
    data["advantages"] = advantages[episode]
    data["weights"] = aggregation_weights(
        mask, episode, 4, (int(mask.sum()), 5), "sequence-mean-token-mean", 0
    )
    drift = sequence_log_ratio((new - data["log_probs"]).detach(), mask, episode, 5)
    data |= dict(new=new, entropies=entropies, episode_log_ratio=drift[episode])
    loss = 0.0
    for _, micro in micro_batches(torch.arange(12), data, None, 2):
        part, _ = grpo_loss(micro["new"], micro["entropies"], micro, totals_of(data), args)
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(new.grad, wanted, rtol=1e-5, atol=1e-7)
