"""sac.py, iql.py, cql.py, td3_bc.py: every loss and its gradient against float64 loops and closed forms."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import cql
import decision_transformer
import iql
import sac
import td3_bc
from common import UserError
from common.datasets import OfflineDataset

SCRIPTS = (sac, iql, cql, td3_bc)
B, A = 7, 3


def randn(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def close(found, wanted, tolerance=1e-10):
    wanted = torch.as_tensor(np.asarray(wanted), dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=tolerance, atol=tolerance)


# --- policies


@pytest.mark.parametrize("script", [sac, cql])
def test_squashed_gaussian_and_its_gradient(script):
    mean, log_std, noise = randn(B, A, grad=True), randn(B, A, seed=1, grad=True), randn(B, A, seed=2)
    action, log_prob = script.squashed_gaussian(mean, log_std, noise)
    for b in range(B):
        total = 0.0
        for i in range(A):
            m, s, e = mean[b, i].item(), math.exp(log_std[b, i].item()), noise[b, i].item()
            u = m + s * e
            assert action[b, i].item() == pytest.approx(math.tanh(u), rel=1e-12)
            density = math.exp(-0.5 * ((u - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
            total += math.log(density * math.cosh(u) ** 2)  # du / da = cosh(u)^2
        assert log_prob[b].item() == pytest.approx(total, rel=1e-10)
    log_prob.sum().backward()
    close(mean.grad, 2 * action.detach())  # -d log(1 - tanh^2) / du
    close(log_std.grad, -1 + 2 * action.detach() * log_std.detach().exp() * noise)


def test_squashed_gaussian_is_a_density():
    """The integral over actions, by the trapezoidal rule, of a narrow and of a saturated policy."""
    for mean, log_std in ((0.3, -0.5), (-1.0, 1.0)):
        noise = torch.linspace(-9, 9, 200_001, dtype=torch.float64)[:, None]
        action, log_prob = sac.squashed_gaussian(torch.tensor([mean]), torch.tensor([log_std]), noise)
        assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_squashed_gaussian_keeps_its_digits_where_tanh_saturates():
    u = torch.tensor([[-15.0], [-9.0], [9.0], [15.0], [40.0]], requires_grad=True)
    action, log_prob = sac.squashed_gaussian(u, torch.zeros(5, 1), torch.zeros(5, 1))
    assert action.abs().max() == 1  # the density from the action alone would be infinite
    wanted = [-0.5 * math.log(2 * math.pi) + 2 * math.log(math.cosh(x)) for x in u[:, 0].tolist()]
    close(log_prob, wanted, 1e-6)
    log_prob.sum().backward()
    close(u.grad[:, 0], [-2, -2, 2, 2, 2], 1e-6)


def test_log_prob_of_given_actions():
    mean, log_std, noise = randn(B, A), randn(B, A, seed=1) - 1, randn(B, A, seed=2)
    action, log_prob = cql.squashed_gaussian(mean, log_std, noise)
    close(cql.squashed_log_prob(mean, log_std, action), log_prob, 1e-6)
    bounds = torch.tensor([[-1.0, 1.0, 0.0]], requires_grad=True)
    found = cql.squashed_log_prob(torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3), bounds)
    assert torch.isfinite(found).all()


def test_gaussian_log_prob_and_its_gradient():
    mean, log_std, action = randn(B, A, grad=True), randn(A, seed=1, grad=True), randn(B, A, seed=2)
    found = iql.gaussian_log_prob(mean, log_std, action)
    normal = [
        [
            math.log(math.exp(-0.5 * ((action[b, i] - mean[b, i]) / math.exp(log_std[i])) ** 2))
            - math.log(math.exp(log_std[i]) * math.sqrt(2 * math.pi))
            for i in range(A)
        ]
        for b in range(B)
    ]
    close(found, np.sum(normal, 1))
    found.sum().backward()
    z = (action - mean.detach()) / log_std.detach().exp()
    close(mean.grad, z / log_std.detach().exp())
    close(log_std.grad, (z.square() - 1).sum(0))


# --- losses


@pytest.mark.parametrize("script", SCRIPTS)
def test_td_target_stops_at_terminations(script):
    reward, value = randn(B), randn(B, seed=1)
    end = torch.tensor([0.0, 1, 0, 1, 1, 0, 0])
    found = script.td_target(reward, end, value, 0.9)
    wanted = [r if t else r + 0.9 * v for r, t, v in zip(reward, end, value, strict=True)]
    close(found, [x.item() for x in wanted])


@pytest.mark.parametrize("script", SCRIPTS)
def test_critic_loss_and_its_gradient(script):
    q, target = randn(2, B, grad=True), randn(B, seed=1)
    loss = script.critic_loss(q, target)
    total = sum((q[k, b].item() - target[b].item()) ** 2 / B for k in range(2) for b in range(B))
    assert loss.item() == pytest.approx(total, rel=1e-12)
    loss.backward()
    close(q.grad, 2 * (q.detach() - target) / B)


@pytest.mark.parametrize("script", [sac, cql])
def test_soft_policy_loss_follows_the_smaller_critic(script):
    q, log_prob = randn(2, B, grad=True), randn(B, seed=1, grad=True)
    loss = script.policy_loss(log_prob, q, 0.3)
    total = sum(0.3 * log_prob[b].item() - min(q[0, b].item(), q[1, b].item()) for b in range(B)) / B
    assert loss.item() == pytest.approx(total, rel=1e-12)
    loss.backward()
    close(log_prob.grad, np.full(B, 0.3 / B))
    smaller = [[float(q[k, b] < q[1 - k, b]) for b in range(B)] for k in range(2)]
    close(q.grad, -np.array(smaller) / B)


@pytest.mark.parametrize("script", [sac, cql])
def test_temperature_rises_while_the_entropy_is_too_low(script):
    for shift, sign in ((5.0, -1), (-5.0, 1)):  # log pi above and below A, the negative target
        log_alpha, log_prob = torch.tensor(-0.7, requires_grad=True), randn(B, grad=True)
        loss = script.temperature_loss(log_alpha, log_prob + A + shift, -A)
        wanted = -math.exp(-0.7) * (log_prob.mean().item() + shift)
        assert loss.item() == pytest.approx(wanted, rel=1e-6)
        loss.backward()
        assert log_alpha.grad.item() == pytest.approx(wanted, rel=1e-6)  # exp is its own derivative
        assert math.copysign(1, log_alpha.grad.item()) == sign and log_prob.grad is None


def test_expectile_loss_and_its_gradient():
    diff = randn(B, grad=True)
    loss = iql.expectile_loss(diff, 0.7)
    weights = [0.7 if d > 0 else 0.3 for d in diff.tolist()]
    assert loss.item() == pytest.approx(
        np.mean([w * d**2 for w, d in zip(weights, diff.tolist(), strict=True)])
    )
    loss.backward()
    close(diff.grad, [2 * w * d / B for w, d in zip(weights, diff.tolist(), strict=True)])


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_the_minimum_of_the_expectile_loss_is_the_expectile(expectile):
    """Of Q = 0 or 1, equally often, it is the expectile's own number: t (1 - v) = (1 - t) v."""
    q = torch.tensor([0.0, 1.0], dtype=torch.float64)
    value = torch.tensor(expectile, dtype=torch.float64, requires_grad=True)
    iql.expectile_loss(q - value, expectile).backward()
    assert abs(value.grad.item()) < 1e-12
    below = torch.tensor(expectile - 0.1, dtype=torch.float64, requires_grad=True)
    iql.expectile_loss(q - below, expectile).backward()
    assert below.grad.item() < 0  # descending, it rises


def test_advantage_weights_are_clipped():
    found = iql.advantage_weights(torch.tensor([-1.0, 0.0, 0.5, 1.5, 1e4]), 3.0, 100.0)
    close(found, [math.exp(-3), 1, math.exp(1.5), math.exp(4.5), 100], 1e-6)


def test_td3_bc_policy_loss_and_its_gradient():
    q, policy_action, action = randn(B, grad=True), randn(B, A, seed=1, grad=True), randn(B, A, seed=2)
    loss, imitation = td3_bc.policy_loss(q, policy_action, action, 2.5)
    weight = 2.5 / np.mean([abs(x) for x in q.tolist()])
    squares = [
        (p - a) ** 2 for p, a in zip(policy_action.flatten().tolist(), action.flatten().tolist(), strict=True)
    ]
    assert imitation.item() == pytest.approx(sum(squares) / (B * A), rel=1e-12)
    assert loss.item() == pytest.approx(imitation.item() - weight * np.mean(q.tolist()), rel=1e-12)
    loss.backward()
    close(q.grad, np.full(B, -weight / B))  # no gradient through lambda
    close(policy_action.grad, 2 * (policy_action.detach() - action) / (B * A))
    assert td3_bc.policy_loss(q, policy_action, action, 0.0)[0] == imitation  # behaviour cloning


def test_smoothed_action_is_clipped_twice():
    action, noise = torch.tensor([0.0, 0.0, 0.9, -0.9]), torch.tensor([1.0, 9.0, 2.0, -2.0])
    close(td3_bc.smoothed_action(action, noise, 0.2, 0.5), [0.2, 0.5, 1, -1], 1e-6)


def test_cql_penalty_and_its_gradient():
    q_data, q_samples = randn(2, B, grad=True), randn(2, 5, B, seed=1, grad=True)
    log_density = randn(5, B, seed=2)
    penalty = cql.cql_penalty(q_data, q_samples, log_density)
    weights = np.empty((2, 5, B))
    for k in range(2):
        for b in range(B):
            terms = [
                math.exp(q_samples[k, j, b].item()) / math.exp(log_density[j, b].item()) for j in range(5)
            ]
            assert penalty[k, b].item() == pytest.approx(
                math.log(sum(terms)) - q_data[k, b].item(), rel=1e-10
            )
            weights[k, :, b] = np.array(terms) / sum(terms)
    penalty.sum().backward()
    close(q_data.grad, -np.ones((2, B)))  # up on the data's actions
    close(q_samples.grad, weights)  # down on the others, most where Q is high for its density


def test_cql_penalty_estimates_the_integral():
    """log integral exp(Q(a)) da over [-1, 1], from uniform actions and from actions of a policy."""

    def q(action):
        return 3 * action[..., 0]

    torch.manual_seed(0)
    uniform = torch.rand(50_000, 1, 1, dtype=torch.float64) * 2 - 1
    mean, log_std = (
        torch.full((1, 1), 0.3, dtype=torch.float64),
        torch.full((1, 1), -0.2, dtype=torch.float64),
    )
    action, density = cql.squashed_gaussian(mean, log_std, torch.randn(50_000, 1, 1, dtype=torch.float64))
    samples, log_density = (
        torch.cat([uniform, action]),
        torch.cat([torch.full((50_000, 1), -math.log(2)), density]),
    )
    found = cql.cql_penalty(torch.zeros(2, 1), q(samples).expand(2, -1, -1), log_density)
    wanted = math.log((math.exp(3) - math.exp(-3)) / 3)
    close(found - math.log(100_000), np.full((2, 1), wanted), 0.02)


# --- networks


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_critics_are_two_separate_networks(script):
    torch.manual_seed(0)
    critic = script.TwinCritic(4, A, 16, 3).double()
    obs, action = randn(B, 4), randn(B, A, seed=1, grad=True)
    q = critic(obs, action)
    (q * torch.tensor([[1.0], [3.0]])).sum().backward()
    slope, total = action.grad.clone(), 0
    for k in range(2):
        layers = [nn.Linear(*w.shape[1:]).double() for w in critic.weights]
        for layer, w, b in zip(layers, critic.weights, critic.biases, strict=True):
            layer.weight.data, layer.bias.data = w.data[k].T.clone(), b.data[k, 0].clone()
        again = action.detach().clone().requires_grad_()
        x = torch.cat([obs, again], 1)
        for layer in layers[:-1]:
            x = layer(x).clamp(min=0)
        x = layers[-1](x)[:, 0]
        close(q[k], x.detach())
        ((1, 3)[k] * x).sum().backward()
        total = total + again.grad
        for layer, w, b in zip(layers, critic.weights, critic.biases, strict=True):
            close(w.grad[k], layer.weight.grad.T)
            close(b.grad[k, 0], layer.bias.grad)
            bound = w.shape[1] ** -0.5
            assert 0.5 * bound < w[k].abs().max() <= bound  # nn.Linear's own
    close(slope, total)
    if script is td3_bc:
        close(critic.q1(obs, action), q[0].detach())


def test_orthogonal_initialisation():
    for network in (cql.TwinCritic(4, A, 16, 2), cql.mlp(4, 2, 16, 2)):
        weights = [p for name, p in cql.orthogonal(network).named_parameters() if "weight" in name]
        assert not any(p.any() for name, p in network.named_parameters() if "bias" in name)
        for weight in weights:
            for w in weight.detach().view(-1, *weight.shape[-2:]):
                w = w if w.shape[0] <= w.shape[1] else w.T
                gain = 1e-4 if weight is weights[-1] else 2.0
                close(w @ w.T, gain * np.eye(len(w)), 1e-5)


def test_iql_squashes_the_mean_alone():
    torch.manual_seed(0)
    agent = iql.Agent(4, A, iql.Args(width=8))
    with torch.no_grad():
        agent.actor[-1].bias.add_(20)
        agent.log_std[:] = torch.tensor([-20.0, 0.5, 20.0])
    mean, log_std = agent.policy(torch.randn(B, 4))
    assert (mean <= 1).all() and (mean > 0.99).all() and log_std.tolist() == [-5, 0.5, 2]
    assert torch.isfinite(iql.gaussian_log_prob(mean, log_std, torch.ones(B, A))).all()  # at the bounds


@pytest.mark.parametrize("script", [iql, cql, td3_bc])
def test_acting_normalises_observations(script):
    torch.manual_seed(0)
    agent, obs = script.Agent(4, A, script.Args(width=8)), torch.randn(B, 4)
    wanted = agent.act(obs)
    agent.obs_mean[:], agent.obs_std[:] = torch.arange(4.0), torch.tensor([1.0, 2, 4, 8])
    torch.testing.assert_close(agent.act(obs * agent.obs_std + agent.obs_mean), wanted)
    assert wanted.abs().max() <= 1


# --- data


def make_dataset():
    """Episodes of 3 (terminated), 2 (timed out) and 1 steps; an observation is its own number."""
    states = torch.arange(8.0)[:, None].numpy() * [1.0, 10.0]
    return OfflineDataset(
        name="made", env_id=None, states=states.astype(np.float32),
        next_index=np.array([1, 2, 2, 4, 6, 7]), actions=np.float32([[-2], [0], [2], [1], [4], [-9]]),
        rewards=np.float32([1, 2, 3, 4, 5, 0]), terminations=np.array([0, 0, 1, 0, 0, 0], bool),
        episode_starts=np.array([0, 3, 5]), reference_scores=None,
    )  # fmt: skip


@pytest.mark.parametrize("script", [iql, cql, td3_bc])
def test_data_in_the_policys_units(script):
    args = SimpleNamespace(normalize_rewards=False, reward_scale=10.0, reward_bias=-5.0)
    states, next_index, rest = script.prepare_data(make_dataset(), args, (np.array([0.0]), np.array([4.0])))
    close(rest[:, 0], [-1, -1, 0, -0.5, 1, -1])  # outside the bounds the environment clipped
    close(rest[:, 1], [5, 15, 25, 35, 45, -5])
    close(rest[:, 2], [0, 0, 1, 0, 0, 0])
    args = SimpleNamespace(normalize_rewards=True, reward_scale=1.0, reward_bias=-1.0)
    rest = script.prepare_data(make_dataset(), args, None)[2]
    close(rest[:, 1], np.array([1, 2, 3, 4, 5, 0]) * 1000 / 9 - 1, 1e-6)  # returns 6, 9, 0
    close(rest[:, 0], [-1, 0, 1, 1, 1, -1])
    even = make_dataset()
    even.rewards[:] = 0
    with pytest.raises(UserError, match="equal returns alone; use --no-normalize-rewards"):
        script.prepare_data(even, args, None)


@pytest.mark.parametrize("script", [iql, cql, td3_bc])
def test_batches_hold_whole_transitions_all_equally_likely(script):
    args = SimpleNamespace(normalize_rewards=False, reward_scale=1.0, reward_bias=0.0)
    data = script.prepare_data(make_dataset(), args, None)
    generator = torch.Generator().manual_seed(0)
    obs, action, reward, next_obs, end = script.sample_batch(*data, 6000, generator)
    assert obs.shape == next_obs.shape == (6000, 2) and action.shape == (6000, 1)
    which = obs[:, 0].long()
    assert torch.equal(next_obs, data[0][data[1]][which]) and torch.equal(obs, data[0][which])
    assert torch.equal(torch.stack([action[:, 0], reward, end], 1), data[2][which])
    assert (which.bincount() - 1000).abs().max() < 150


# --- what the scripts share is identical to the letter


def source(script, name):
    import inspect

    return inspect.getsource(getattr(script, name))


SETUP = (
    "resume_args check_args choose_device build_envs load_weights action_bounds keep_freed_memory score main"
)
SHARED = {name: (*SCRIPTS, decision_transformer) for name in SETUP.split()}
SHARED |= {name: SCRIPTS for name in "td_target critic_loss TwinCritic evaluate".split()}
SHARED |= {name: (iql, cql, td3_bc) for name in "prepare_data sample_batch".split()}
SHARED |= {name: (sac, cql) for name in "squashed_gaussian policy_loss temperature_loss".split()}
SHARED["mlp"] = (sac, cql, td3_bc)


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_are_identical(name):
    if name == "TwinCritic":  # td3_bc has one method more
        wanted = source(sac, name)
        assert all(source(script, name).startswith(wanted.rstrip()) for script in SHARED[name])
    else:
        assert len({source(script, name) for script in SHARED[name]}) == 1


def test_the_offline_scripts_train_alike_but_for_the_update():
    """`train` of iql, cql and td3_bc: all but the optimizers, the update and its call."""
    cuts = (
        "        # --- optimizers and update\n",
        "        if args.compile:\n",
        "            # --- update\n",
        "            bar.update()\n",
    )
    pieces = []
    for script in (iql, cql, td3_bc):
        text, kept = source(script, "train"), []
        for cut in cuts:
            before, _, text = text.partition(cut)
            kept.append(before)
        pieces.append([kept[0], kept[2], text])
        assert text.count("\n") > 30
    assert pieces[0] == pieces[1] == pieces[2]
