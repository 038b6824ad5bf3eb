"""The flow head: its equations in float64 against closed forms, and that it learns what it is told."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_agent import BOX, A, K, generator, make_agent, make_batch, take

import bc_warmup
import ppo_vla


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_head(steps=4, level=0.3, noise="sde", numbers=1, hidden_size=8, start=1.0):
    """A head whose own velocity is not used: the tests give theirs."""
    torch.manual_seed(0)
    backbone = SimpleNamespace(chunk=1, action_dim=numbers, hidden_size=hidden_size)
    args = ppo_vla.Args(flow_steps=steps, noise_level=level, flow_noise=noise, flow_start=start)
    return ppo_vla.FlowHead(backbone, args)


def linear(x, t):
    """A velocity with a closed form for everything: v = 0.8 x - 0.5 + 0.3 t."""
    return 0.8 * x - 0.5 + 0.3 * t


def moments(steps, std, sde, slope=0.8, offset=-0.5, start=1.0):
    """Mean and variance of the chain's end under `linear`, step by step, from the equations in the paper's
    form: a and eps as the velocity sees them, mixed at the next time."""
    mean, variance = 0.0, start**2
    for k in range(steps):
        t, after = 1 - k / steps, 1 - (k + 1) / steps
        # v = slope x + intercept; clean = x - t v; noise = x + (1 - t) v
        intercept = offset + 0.3 * t
        clean = (1 - t * slope, -t * intercept)
        noise = (1 + (1 - t) * slope, (1 - t) * intercept)
        back = std[k] ** 2 / (2 * t) if sde else 0.0
        factor, shift = (clean[i] * (1 - after) + noise[i] * (after - back) for i in (0, 1))
        mean, variance = factor * mean + shift, factor**2 * variance + std[k] ** 2
    return mean, variance


# --- equations


@pytest.mark.parametrize(("steps", "wanted"), [(4, [0.5, 0.75**0.5 / 2, 0.25, 1 / 48**0.5]), (1, [0.5])])
def test_the_stds_of_flow_sde(steps, wanted):
    """level sqrt(t / (1 - t) / S); the last is level / sqrt(S (S - 1)); pi0's published S = 4, level 0.5."""
    np.testing.assert_allclose(ppo_vla.sde_std(steps, 0.5), wanted, rtol=1e-12)
    np.testing.assert_allclose(make_head(steps, 0.5).std()[:, 0], wanted, rtol=1e-12)


def test_times_run_from_the_noise_to_the_action():
    assert ppo_vla.flow_times(4).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_without_noise_a_step_is_eulers():
    x, v = torch.randn(2, 5, 3, generator=generator())
    for k, t in enumerate(ppo_vla.flow_times(3)):
        assert torch.equal(ppo_vla.denoising_mean(x, v, t, 3, 0.0), x - v / 3), k


@pytest.mark.parametrize("start", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("noise", ["sde", "learned"])
def test_samples_have_the_chains_moments(noise, start):
    head = make_head(level=0.5, noise=noise, start=start)
    mean, variance = moments(4, head.std()[:, 0].tolist(), noise == "sde", start=start)
    chain = head.sample((linear, 200_000), False, generator())
    assert chain.shape == (200_000, 5, 1)
    assert abs(chain[:, 0].std() - start) <= 5 * start / math.sqrt(4e5)
    assert abs(chain[:, -1].mean() - mean) < 5 * math.sqrt(variance / 2e5)
    assert abs(chain[:, -1].var() / variance - 1) < 5 * math.sqrt(2 / 2e5)
    plain = moments(4, [0.0] * 4, False, start=start)
    assert abs(plain[1] / variance - 1) > 0.1  # the noise shows


def test_with_many_steps_the_sde_has_the_marginals_of_the_flow():
    """Data N(0.5, 0.1^2): its true velocity leads N(0, 1) to it, noise of any level or none."""

    def velocity(x, t):  # E[noise - action | x]
        variance = t**2 + ((1 - t) * 0.1) ** 2
        return (t - (1 - t) * 0.01) / variance * (x - (1 - t) * 0.5) - 0.5

    for level in (0.1, 0.5):
        chain = make_head(200, level).sample((velocity, 4_000), False, generator())
        assert abs(chain[:, -1].mean() - 0.5) < 0.01 and abs(chain[:, -1].std() - 0.1) < 0.01, level
    chain = make_head(200, 0.5, "learned").sample((velocity, 4_000), False, generator())
    assert chain[:, -1].std() > 0.2  # noise that nothing makes up for


def test_log_prob_is_the_sum_of_the_steps_densities():
    head = make_head(3, 0.4, numbers=2)
    chain = head.sample((linear, 6), False, generator())
    found, std = head.log_prob((linear, 6), chain), ppo_vla.sde_std(3, 0.4).tolist()
    for b in range(6):
        for a in range(2):
            total = 0.0
            for k in range(3):
                t, x, after = 1 - k / 3, float(chain[b, k, a]), float(chain[b, k + 1, a])
                v = 0.8 * x - 0.5 + 0.3 * t
                mean = x - v / 3 - std[k] ** 2 / (2 * t) * (x + (1 - t) * v)
                total += -0.5 * ((after - mean) / std[k]) ** 2 - math.log(std[k] * math.sqrt(2 * math.pi))
            assert abs(found[b, a] - total) < 1e-12
    np.testing.assert_allclose(
        head.entropy((linear, 6))[0, 0], sum(0.5 * math.log(2 * math.pi * math.e * s**2) for s in std)
    )


def test_fpo_weighs_an_action_by_its_flow_matching_losses():
    """-(v - (noise - action))^2 / (2 level^2), mean over 8 noises at t = 15/16, 13/16, ..., 1/16; the action
    is where Euler's steps lead from one more noise, which --exploration-end shrinks, greedily from zero."""
    head = make_head(3, 0.4, noise="fpo", numbers=2)
    draws = torch.zeros(6, 9, 2).normal_(generator=generator())
    found = head.sample((linear, 6), False, generator())
    assert torch.equal(found[:, :8], draws[:, :8]) and found.shape == (6, 9, 2)
    for left in (1.0, 0.5):
        head.exploration.fill_(left)
        action = left * draws[:, 8]
        for k in range(3):
            action = action - linear(action, 1 - k / 3) / 3
        torch.testing.assert_close(head.sample((linear, 6), False, generator())[:, 8], action)
    greedy = head.sample((linear, 6), True, None)
    assert not greedy[:, :8].any() and greedy[0, 8, 0] and greedy[:, 8].std() < 1e-12
    log_prob = head.log_prob((lambda x, t: linear(x, t[..., None]), 6), found)
    for b in range(6):
        for a in range(2):
            total, action = 0.0, float(found[b, 8, a])
            for i in range(8):
                t, noise = (15 - 2 * i) / 16, float(found[b, i, a])
                v = linear(t * noise + (1 - t) * action, t)
                total -= (v - (noise - action)) ** 2 / (2 * 0.4**2) / 8
            assert abs(log_prob[b, a] - total) < 1e-12
    assert not head.entropy((linear, 6)).any() and head.to_env(found).shape == (6, 1, 2)


@pytest.mark.parametrize("noise", ["sde", "learned"])
def test_importance_weights_average_one(noise):
    """exp(log p' - log p) over chains of p, for another velocity: 1, as densities have it."""
    head = make_head(noise=noise)
    chain = head.sample((linear, 200_000), False, generator())

    def other(x, t):
        return linear(x, t) + 0.1

    ratio = (head.log_prob((other, 1), chain) - head.log_prob((linear, 1), chain)).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(2e5) and ratio.std() > 0.1


@pytest.mark.parametrize(("noise", "start"), [("sde", 1.0), ("learned", 1.0), ("sde", 0.0)])
def test_the_score_gives_the_gradient_of_the_expected_reward(noise, start):
    """E[-(x_S - 1)^2] differentiated through the moments, against E[reward * grad log p]."""
    head = make_head(level=0.5, noise=noise, start=start)
    std = head.std()[:, 0].tolist()
    parameters = [torch.tensor(0.8, requires_grad=True), torch.tensor(-0.5, requires_grad=True)]
    mean, variance = moments(4, std, noise == "sde", *parameters, start)
    exact = torch.autograd.grad(-(variance + (mean - 1) ** 2), parameters)
    chain = head.sample((linear, 400_000), False, generator())
    reward = -(chain[:, -1, 0] - 1).square()
    slope, offset = (torch.tensor(x, requires_grad=True) for x in (0.8, -0.5))
    log_prob = head.log_prob((lambda x, t: slope * x + offset + 0.3 * t, 1), chain)[:, 0]
    found = torch.autograd.grad(((reward - reward.mean()) * log_prob).mean(), (slope, offset))
    for estimate, wanted in zip(found, exact, strict=True):
        assert abs(estimate - wanted) < min(0.03, abs(wanted) / 3)


def test_learned_noise_starts_at_its_level_and_has_a_gradient_per_action_dimension():
    head = make_head(level=0.1, noise="learned", numbers=2)
    assert torch.equal(head.std(), torch.full((4, 2), 0.1))
    head.log_prob((linear, 5), head.sample((linear, 5), False, generator()).detach()).sum().backward()
    assert head.log_scale.grad.abs().min() > 0
    assert not make_head(noise="sde").log_scale.requires_grad


def test_greedily_the_ode_starts_at_zero_and_leaves_the_generator_alone():
    head, draw = make_head(level=0.5), generator(3)
    before = draw.get_state()
    first, second = (head.sample((linear, 2), True, draw) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(draw.get_state(), before)
    x = 0.0
    for k in range(4):
        x -= (0.8 * x - 0.5 + 0.3 * (1 - k / 4)) / 4
    np.testing.assert_allclose(first[:, -1], x, rtol=1e-12)


def test_the_environment_gets_the_last_point_clipped():
    head = make_head(numbers=2)
    chain = torch.zeros(1, 5, 2)
    chain[0, -1] = torch.tensor([3.0, -0.25])
    assert head.to_env(chain).tolist() == [[[1.0, -0.25]]]


# --- imitation


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_of_a_single_action_the_velocity_leads_there_from_everywhere(steps):
    """v = (x - c) / t, the flow of one point c: Euler's steps end at c exactly, from any noise."""
    head = make_head(steps)
    for greedy in (True, False):
        head.sde.zero_()
        chain = head.sample((lambda x, t: (x - 0.7) / t, 5), greedy, generator())
        np.testing.assert_allclose(chain[:, -1], 0.7, atol=1e-12)


def test_flow_matching_loss_by_hand():
    """x = t noise + (1 - t) action moves with noise - action, of which the loss is the squared distance."""
    action, noise, t = torch.tensor([0.5]), torch.tensor([-1.0]), 0.25
    x = t * noise + (1 - t) * action
    ahead = (t + 1e-6) * noise + (1 - t - 1e-6) * action
    assert bc_warmup.flow_matching_loss((ahead - x) / 1e-6, action, noise) < 1e-12
    assert bc_warmup.flow_matching_loss(torch.tensor([0.5]), action, noise).item() == 4.0  # 0.5 - (-1.5)


def test_times_of_flow_matching_are_beta():
    """Beta(1.5, 1) has distribution function t^1.5; scaled away from 0."""
    uniform = torch.linspace(0, 1, 11)
    t = bc_warmup.pi0_times(uniform)
    np.testing.assert_allclose(((t - 0.001) / 0.999) ** 1.5, uniform, atol=1e-12)
    assert t[0] == 0.001 and t[-1] == 1.0


def bc_agent(**flags):
    agent = make_agent(head="flow")
    args = bc_warmup.Args(head="flow", **flags)
    own = bc_warmup.Agent(agent.backbone, args, SimpleNamespace(single_action_space=BOX))
    return own, args, make_batch(agent, 6)


def test_the_imitation_loss_against_loops():
    torch.set_default_dtype(torch.float32)
    agent, args, batch = bc_agent(flow_samples=3)
    torch.nn.init.normal_(agent.head.velocity.last[-1].weight)
    targets = torch.rand(6, K * A, generator=generator()) * 2 - 1
    mask = torch.rand(6, K * A, generator=generator(1)) < 0.5
    with torch.no_grad():
        found = agent.imitation_loss(batch, None, targets, mask, args, generator(2))
        draw = generator(2)
        noise = torch.empty(6, 3, K * A).normal_(generator=draw)
        t = bc_warmup.pi0_times(torch.empty(6, 3).uniform_(generator=draw))
        velocity, _ = agent.head(agent.backbone, agent.backbone(batch)[0])
        total = torch.zeros(6, K * A)
        for p in range(3):
            for b in range(6):
                x = t[b, p] * noise[b, p] + (1 - t[b, p]) * targets[b]
                v = velocity(x.expand(6, -1), t[b, p].expand(6))[b]
                total[b] += (v - (noise[b, p] - targets[b])).square() / 3
    assert abs(found - total[mask].mean()) < 1e-4


def test_cloning_a_point_ends_there():
    """A short run of flow matching: greedy and sampled chunks come close to the demonstrated one."""
    torch.set_default_dtype(torch.float32)
    agent, args, batch = bc_agent()
    targets = (torch.rand(6, K * A, generator=generator()) * 2 - 1) * 0.8
    mask, draw = torch.ones_like(targets, dtype=torch.bool), generator(1)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        agent.imitation_loss(batch, None, targets, mask, args, draw).backward()
        optimizer.step()
    for greedy in (True, False):
        with torch.no_grad():
            actions = agent.get_action_and_value(batch, None, greedy, draw)[0][:, -1]
        assert (actions - targets).abs().mean() < (0.2 if greedy else 0.3), greedy


# --- in PPO


def test_what_is_not_executed_has_no_gradient():
    torch.set_default_dtype(torch.float32)
    agent = make_agent(head="flow")
    torch.nn.init.normal_(agent.head.velocity.last[-1].weight)
    batch = make_batch(agent, 4)
    with torch.no_grad():
        actions = agent.get_action_and_value(batch, generator=generator())[0]
    agent.evaluate_actions(batch, actions)[0][:, :3].sum().backward()
    rows = agent.head.velocity.last[-1].weight.grad.abs().sum(1)
    assert rows[:3].min() > 0 and rows[3:].max() == 0


def test_log_probs_do_not_depend_on_the_batch():
    torch.set_default_dtype(torch.float32)
    agent = make_agent(head="flow")
    torch.nn.init.normal_(agent.head.velocity.last[-1].weight, std=0.1)
    batch = make_batch(agent, 5)
    with torch.no_grad():
        actions, log_probs, _ = agent.get_action_and_value(batch, None, generator=generator())
        alone = [agent.evaluate_actions(take(batch, [n]), actions[[n]])[0] for n in range(5)]
    assert actions.shape == (5, 5, K * A) and (torch.cat(alone) - log_probs).abs().max() < 1e-4


@pytest.mark.parametrize("noise", ["sde", "learned", "fpo"])
def test_the_policy_moves_towards_the_reward(noise):
    """A bandit whose reward is the first number of the chunk: PPO's own loss raises its mean."""
    torch.set_default_dtype(torch.float32)
    agent = make_agent(head="flow", flow_noise=noise)
    args = dataclasses.replace(ppo_vla.Args(), head="flow", ratio_level="chunk", chunk=K)
    batch = make_batch(agent, 64)
    mask = torch.zeros(64, K * A, dtype=torch.bool)
    mask[:, 0] = True
    optimizer, draw = torch.optim.Adam(agent.parameters(), lr=1e-3), generator()

    def greedy():
        with torch.no_grad():
            return agent.get_action_and_value(batch, None, deterministic=True)[0][:, -1, 0].mean()

    before = greedy()
    for _ in range(12):
        with torch.no_grad():
            actions, log_probs, values = agent.get_action_and_value(batch, generator=draw)
        rewards = actions[:, -1, 0]
        data = dict(mask=mask, values=values, returns=values)
        data["old_log_probs"], covered = ppo_vla.merge_tokens(log_probs, mask, "chunk", K)
        data["advantages"] = (rewards - rewards.mean()) / rewards.std()
        totals = torch.stack([covered.sum(), mask.sum(), torch.tensor(64)])
        for _ in range(2):
            new = agent.evaluate_actions(batch, actions)
            loss, metrics = ppo_vla.ppo_loss(*new, data, totals, args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert greedy() > before + 0.1


def test_a_backbone_that_emits_tokens_in_turn_has_no_flow():
    backbone = SimpleNamespace(autoregressive=True, config={"name": "x"}, vision_parameters=lambda: [1])
    space = SimpleNamespace(single_action_space=BOX)
    for script in (ppo_vla, bc_warmup):
        with pytest.raises(Exception, match="emits its tokens in turn"):
            script.make_head(backbone, script.Args(head="flow"), space)
