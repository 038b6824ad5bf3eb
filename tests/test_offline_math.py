"""sac.py, iql.py, cql.py, td3_bc.py: every loss and its gradient against float64 loops and closed forms."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import test_offline_cli  # noqa: F401 (registers Aim-v0 and AimCut-v0)
import torch
import torch.nn as nn

import common.run
import cql
import iql
import sac
import td3_bc
from common import UserError
from common.checkpoint import load_checkpoint
from common.datasets import OfflineDataset, save_d4rl, transition_tensors

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
    for b in range(B):
        density = 1.0
        for i in range(A):
            m, s, a = mean[b, i].item(), math.exp(log_std[i].item()), action[b, i].item()
            density *= math.exp(-0.5 * ((a - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        assert found[b].item() == pytest.approx(math.log(density), rel=1e-10)
    found.sum().backward()
    z = (action - mean.detach()) / log_std.detach().exp()
    close(mean.grad, z / log_std.detach().exp())
    close(log_std.grad, (z.square() - 1).sum(0))


# --- losses


@pytest.mark.parametrize("script", SCRIPTS)
def test_td_target_stops_at_terminations(script):
    reward, value = randn(B), randn(B, seed=1)
    end = torch.tensor([0.0, 1, 0, 1, 1, 0, 0], dtype=torch.float64)
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
    wanted = [2 * w * d / B for w, d in zip(weights, diff.tolist(), strict=True)]
    close(diff.grad, wanted, 1e-6)  # 0.7 is a float32 in torch.where


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_the_minimum_of_the_expectile_loss_is_the_expectile(expectile):
    """Of Q = 0 or 1, equally often, it is the expectile's own number: t (1 - v) = (1 - t) v."""
    q = torch.tensor([0.0, 1.0], dtype=torch.float64)
    value = torch.tensor(expectile, dtype=torch.float64, requires_grad=True)
    iql.expectile_loss(q - value, expectile).backward()
    assert abs(value.grad.item()) < 1e-6
    below = torch.tensor(expectile - 0.1, dtype=torch.float64, requires_grad=True)
    iql.expectile_loss(q - below, expectile).backward()
    assert below.grad.item() < -0.05  # descending, it rises


def test_advantage_weights_are_clipped():
    found = iql.advantage_weights(torch.tensor([-1.0, 0.0, 0.5, 1.5, 1e4]), 3.0, 100.0)
    close(found, [math.exp(-3), 1, math.exp(1.5), math.exp(4.5), 100], 1e-6)


def test_td3_bc_policy_loss_and_its_gradient():
    q, policy_action, action = randn(B, grad=True), randn(B, A, seed=1, grad=True), randn(B, A, seed=2)
    loss, imitation = td3_bc.policy_loss(q, policy_action, action, 2.5, 1.0)
    weight = 2.5 / np.mean([abs(x) for x in q.tolist()])
    squares = [
        (p - a) ** 2 for p, a in zip(policy_action.flatten().tolist(), action.flatten().tolist(), strict=True)
    ]
    assert imitation.item() == pytest.approx(sum(squares) / (B * A), rel=1e-12)
    assert loss.item() == pytest.approx(imitation.item() - weight * np.mean(q.tolist()), rel=1e-12)
    loss.backward()
    close(q.grad, np.full(B, -weight / B))  # no gradient through lambda
    close(policy_action.grad, 2 * (policy_action.detach() - action) / (B * A))
    assert td3_bc.policy_loss(q, policy_action, action, 0.0, 1.0)[0] == imitation  # behaviour cloning
    less = td3_bc.policy_loss(q, policy_action, action, 2.5, 0.3)
    assert less[1] == imitation
    assert (loss - less[0]).item() == pytest.approx(0.7 * imitation.item(), rel=1e-12)


def test_imitation_weighs_less_online():
    assert [td3_bc.imitation_weight(step, 4, 0.2) for step in (1, 2, 4)] == pytest.approx([0.8, 0.6, 0.2])
    assert {td3_bc.imitation_weight(step, 7, 1.0) for step in range(1, 8)} == {1.0}


def test_rebrac_losses_and_their_gradients():
    """The critics' target and the policy's loss, where sums go over an action's numbers."""
    action, data, has_next = randn(B, A), randn(B, A, seed=1), torch.tensor([1, 0, 1, 1, 0, 1, 1]).double()
    value, reward = randn(B, seed=2), randn(B, seed=3)
    end = torch.tensor([0, 0, 1, 0, 1, 0, 0]).double()
    found = td3_bc.penalised_value(value, action, data, has_next, 0.3)
    target = td3_bc.td_target(reward, end, found, 0.9)
    for b in range(B):
        distance = sum((action[b, i].item() - data[b, i].item()) ** 2 for i in range(A))
        wanted = value[b].item() - 0.3 * distance * (b not in (1, 4))
        assert found[b].item() == pytest.approx(wanted, rel=1e-12)
        wanted = reward[b].item() + (0.9 * wanted if b not in (2, 4) else 0)
        assert target[b].item() == pytest.approx(wanted, rel=1e-12)
    q, policy_action = randn(2, B, seed=4, grad=True), randn(B, A, seed=5, grad=True)
    loss, imitation = td3_bc.rebrac_policy_loss(q, policy_action, data, 0.7)
    least = [min(q[0, b].item(), q[1, b].item()) for b in range(B)]
    weight = 1 / np.mean(np.abs(least))
    squares = (policy_action - data).detach().square().sum().item()
    assert imitation.item() == pytest.approx(squares / B, rel=1e-12)
    assert loss.item() == pytest.approx(0.7 * squares / B - weight * np.mean(least), rel=1e-12)
    loss.backward()
    smaller = [[float(q[k, b] < q[1 - k, b]) for b in range(B)] for k in range(2)]
    close(q.grad, -weight * np.array(smaller) / B)  # no gradient through lambda
    close(policy_action.grad, 1.4 * (policy_action.detach() - data) / B)


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


def twins(script, width, depth):
    if script is sac:
        return sac.Critics(4, A, sac.Args(width=width, depth=depth))
    return script.TwinCritic(4, A, width, depth)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_critics_are_two_separate_networks(script):
    torch.manual_seed(0)
    critic = twins(script, 16, 3).double()
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


@pytest.mark.parametrize("script", [iql, td3_bc])
def test_critics_with_gelu_and_layer_norm(script):
    """As of two stacks of modules: a norm after the activation of each hidden layer, none after the last."""
    torch.manual_seed(0)
    critic = script.TwinCritic(4, A, 16, 3, activation="gelu", layer_norm=True).double()
    for p in (*critic.scales, *critic.shifts):
        p.data.uniform_(0.5, 1.5)
    obs, action = randn(B, 4), randn(B, A, seed=1)
    q = critic(obs, action)
    for k in range(2):
        layers = []
        for w, b in zip(critic.weights, critic.biases, strict=True):
            layers.append(nn.Linear(*w.shape[1:]).double())
            layers[-1].weight.data, layers[-1].bias.data = w.data[k].T.clone(), b.data[k, 0].clone()
            if len(layers) < 9:
                layers += [nn.GELU("tanh"), nn.LayerNorm(16, eps=1e-6).double()]
                n = len(layers) // 3 - 1
                layers[-1].weight.data = critic.scales[n].data[k, 0].clone()
                layers[-1].bias.data = critic.shifts[n].data[k, 0].clone()
        close(q[k], nn.Sequential(*layers)(torch.cat([obs, action], 1))[:, 0].detach())
    assert len(layers) == 10
    if script is td3_bc:
        close(critic.q1(obs, action), q[0].detach())


@pytest.mark.parametrize("script", [iql, td3_bc])
def test_gelu_is_the_same_eager_and_compiled(script):
    compiled = torch.compile(script.GELU(), backend="eager", fullgraph=True)
    found = []
    for function in (script.GELU(), compiled, gelu):
        x = torch.linspace(-30, 30, 6001, dtype=torch.float64, requires_grad=True)
        y = function(x)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    for y, slope in found[:2]:
        close(y, found[2][0])
        close(slope, found[2][1])
    assert not torch.equal(found[0][0], found[1][0])  # two forms


@pytest.mark.parametrize("script", [iql, td3_bc])
def test_networks_with_gelu_begin_with_xaviers_weights(script):
    torch.manual_seed(0)
    agent = script.Agent(20, A, script.Args(width=64, depth=2, activation="gelu", layer_norm=True))
    layers = [type(layer) for layer in agent.actor if not isinstance(layer, (nn.Linear, nn.Dropout))]
    assert layers == 2 * [script.GELU]
    for name, p in agent.named_parameters():
        if p.ndim > 1 and "weight" in name:
            bound = math.sqrt(6 / sum(p.shape[-2:])) * (0.1 if name.endswith("actor.4.weight") else 1)
            bound *= 0.1 if script is iql and name == "actor.6.weight" else 1
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif "bias" in name or "shift" in name or name == "log_std":
            assert not p.any(), name
        else:
            assert (p == 1).all(), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_critics_in_bfloat16_are_the_same_to_three_digits(script):
    torch.manual_seed(0)
    critic, obs, action = twins(script, 64, 2), torch.randn(B, 4), torch.randn(B, A)
    found = []
    for critic.bf16 in (False, True):
        values = [critic(obs, action)] + ([critic.q1(obs, action)] if script is td3_bc else [])
        sum(q.sum() for q in values).backward()
        found.append([*values, critic.weights[0].grad, critic.weights[-1].grad])
        critic.zero_grad()
    for exact, half in zip(*found, strict=True):
        assert half.dtype == torch.float32 and not torch.equal(exact, half)
        assert (exact - half).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_networks_in_bfloat16_too_but_for_the_last_layer(script):
    torch.manual_seed(0)
    network, obs = script.MLP(4, 1, 64, 2), torch.randn(256, 4)
    found = []
    for network.bf16 in (False, True):
        value = network(obs)
        value.sum().backward()
        found.append([value, network[0].weight.grad, network[-1].weight.grad])
        network.zero_grad()
    for exact, half in zip(*found, strict=True):
        assert half.dtype == torch.float32 and not torch.equal(exact, half)
        assert (exact - half).norm() < 0.02 * exact.norm()
    with torch.no_grad():
        network[-1].weight.zero_()
        network[-1].bias.fill_(-73.37)  # a value, which bfloat16 would make -73.5
    assert (network(obs) == torch.tensor(-73.37)).all()


def test_orthogonal_initialisation():
    for network in (cql.TwinCritic(4, A, 16, 2), cql.MLP(4, 2, 16, 2)):
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


def test_iql_with_a_fixed_deviation_squashes_nothing_and_clips_what_it_executes():
    torch.manual_seed(0)
    agent, obs = iql.Agent(4, A, iql.Args(width=8, learn_std=False)), torch.randn(B, 4)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([-3.0, 0, 3]))
        mean, log_std = agent.policy(obs)
        assert mean[:, 0].max() < -1 and mean[:, 2].min() > 1 and not log_std.any()
        close(act(agent, obs), mean.clamp(-1, 1), 1e-6)
    assert not agent.log_std.requires_grad


def act(agent, obs):
    """What an evaluation executes: (B, S) -> (B, A)."""
    action, values = agent.act({"proprio": obs.numpy()}, None)
    assert isinstance(action, np.ndarray) and action.shape[:2] == (len(obs), 1) and values is None
    return torch.from_numpy(action[:, 0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_acting_takes_the_squashed_mean(script):
    torch.manual_seed(0)
    agent, obs = script.Agent(4, A, script.Args(width=8)).double(), randn(B, 4)
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.mul_(9)
        wanted = net(agent.state_dict(), "actor", obs)[:, :A].tanh()
        close(act(agent, obs), wanted, 1e-6)
    assert wanted.abs().max() > 0.9  # where tanh matters


@pytest.mark.parametrize("script", [iql, td3_bc])
def test_acting_takes_the_average_policy_if_there_is_one(script):
    torch.manual_seed(0)
    agent, obs = script.Agent(4, A, script.Args(width=8, ema_decay=0.9)).double(), randn(B, 4)
    with torch.no_grad():
        before = act(agent, obs)
        for parameter in agent.actor.parameters():
            parameter.mul_(9)
        assert torch.equal(act(agent, obs), before)
        close(agent.explore(obs, torch.zeros(B, A)), net(agent.state_dict(), "actor", obs).tanh(), 1e-6)
        for parameter in agent.average.parameters():
            parameter.mul_(9)
        close(act(agent, obs), net(agent.state_dict(), "actor", obs).tanh(), 1e-6)
    assert not any(p.requires_grad for p in agent.average.parameters())
    assert not any(key.startswith("average") for key in script.Agent(4, A, script.Args()).state_dict())


def test_iql_drops_out_in_the_policy_and_in_training_alone():
    torch.manual_seed(0)
    agent, obs = iql.Agent(4, A, iql.Args(width=64, dropout=0.5)), torch.randn(B, 4)
    assert not torch.equal(agent.policy(obs)[0], agent.policy(obs)[0])
    assert torch.equal(agent.value(obs), agent.value(obs))
    agent.eval()
    with torch.no_grad():
        assert torch.equal(act(agent, obs), act(agent, obs))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_agent(script):
    """Targets begin as copies, temperatures and deviations as 1, CQL's networks as orthogonal matrices."""
    weights = script.Agent(4, A, script.Args(width=8)).state_dict()
    targets = [key for key in weights if key.startswith("target_")]
    assert targets and all(torch.equal(weights[key], weights[key.removeprefix("target_")]) for key in targets)
    assert not any(x.any() for key, x in weights.items() if key.startswith("log_"))
    if script is cql:
        assert not any(x.any() for key, x in weights.items() if "bias" in key)
        last = weights["actor.6.weight"]
        close(last @ last.T, 1e-4 * np.eye(2 * A), 1e-6)
        close(weights["critic.weights.3"].norm(dim=1), np.full((2, 1), 0.01), 1e-6)


def test_cqls_critics_have_a_depth_of_their_own():
    agent = cql.Agent(4, A, cql.Args(width=8, depth=1, critic_depth=4))
    assert len(agent.critic.weights) == len(agent.target_critic.weights) == 5
    assert sum(isinstance(layer, nn.Linear) for layer in agent.actor) == 2


@pytest.mark.parametrize("script", [iql, cql, td3_bc])
def test_acting_normalises_observations(script):
    torch.manual_seed(0)
    agent, obs = script.Agent(4, A, script.Args(width=8)), torch.randn(B, 4)
    with torch.no_grad():
        wanted = act(agent, obs)
        agent.obs_mean[:], agent.obs_std[:] = torch.arange(4.0), torch.tensor([1.0, 2, 4, 8])
        torch.testing.assert_close(act(agent, obs * agent.obs_std + agent.obs_mean), wanted)
    assert wanted.abs().max() <= 1


# --- data


UNIT = (np.array([-1.0]), np.array([1.0]))  # bounds of the action


def make_dataset():
    """Episodes of 3 (terminated), 2 (timed out) and 1 steps; an observation is its own number."""
    states = torch.arange(8.0)[:, None].numpy() * [1.0, 10.0]
    return OfflineDataset(
        name="made", env_id=None, states=states.astype(np.float32),
        next_index=np.array([1, 2, 2, 4, 6, 7]), actions=np.float32([[-2], [0], [2], [1], [4], [-9]]),
        rewards=np.float32([1, 2, 3, 4, 5, 0]), terminations=np.array([0, 0, 1, 0, 0, 0], bool),
        episode_starts=np.array([0, 3, 5]), reference_scores=None,
    )  # fmt: skip


def test_data_in_the_policys_units():
    args = SimpleNamespace(normalize_rewards=False, reward_scale=10.0, reward_bias=-5.0)
    bounds, device = (np.array([0.0]), np.array([4.0])), torch.device("cpu")
    states, next_index, rest = transition_tensors(make_dataset(), bounds, args, device)
    assert all(x.dtype == torch.float32 for x in (states, rest)) and next_index.dtype == torch.int64
    close(rest[:, 0], [-1, -1, 0, -0.5, 1, -1])  # outside the bounds the environment clipped
    close(rest[:, 1], [5, 15, 25, 35, 45, -5])
    close(rest[:, 2], [0, 0, 1, 0, 0, 0])
    args = SimpleNamespace(normalize_rewards=True, reward_scale=1.0, reward_bias=-1.0)
    rest = transition_tensors(make_dataset(), UNIT, args, device)[2]
    close(rest[:, 1], np.array([1, 2, 3, 4, 5, 0]) * 1000 / 9 - 1, 1e-6)  # returns 6, 9, 0
    close(rest[:, 0], [-1, 0, 1, 1, 1, -1])
    for rewards in ([0, 0, 0, 0, 0, 0], [10, 20, 30, 40, 20.5, 60]):  # returns 60, 60.5, 60
        even = make_dataset()
        even.rewards[:] = rewards
        with pytest.raises(UserError, match="nearly equal returns alone; use --no-normalize-rewards"):
            transition_tensors(even, UNIT, args, device)
    with pytest.raises(UserError, match=r"has actions outside \[-1, 1\]; give --env"):
        transition_tensors(make_dataset(), None, args, device)


@pytest.mark.parametrize("script", [iql, cql, td3_bc])
def test_batches_hold_whole_transitions_all_equally_likely(script):
    args = SimpleNamespace(normalize_rewards=False, reward_scale=1.0, reward_bias=0.0)
    data = transition_tensors(make_dataset(), UNIT, args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    obs, action, reward, next_obs, end = script.sample_batch(*data, 6000, generator)
    assert obs.shape == next_obs.shape == (6000, 2) and action.shape == (6000, 1)
    which = obs[:, 0].long()
    assert torch.equal(next_obs, data[0][data[1]][which]) and torch.equal(obs, data[0][which])
    assert torch.equal(torch.stack([action[:, 0], reward, end], 1), data[2][which])
    assert (which.bincount() - 1000).abs().max() < 150


def test_the_datas_next_action():
    """Row i goes to the state of row i + 1 or, at the end of an episode, to one that no row starts from."""
    args = SimpleNamespace(normalize_rewards=False, reward_scale=1.0, reward_bias=0.0)
    _, next_index, rest = transition_tensors(make_dataset(), UNIT, args, torch.device("cpu"))
    found = td3_bc.with_next_action(rest, next_index)
    close(found[:, 0], rest[:, 0])
    close(found[:, 1], [0, 1, 1, 1, 0, 0])  # the third row's own: it is terminated, which no value sees
    close(found[:, 2], [1, 1, 1, 1, 0, 0])
    close(found[:, 3:], rest[:, 1:])


# --- whole updates: their order, what is detached, learning rates, targets


def relu(x):
    return x * (x > 0)


def gelu(x):
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def net(w, name, x, activation=relu):
    """The layers of w whose names begin with `name`, with activations, and norms if it has some, between."""
    layers = [key.removesuffix(".weight") for key in w if key.startswith(name) and key.endswith(".weight")]
    for layer in layers:
        weight = w[f"{layer}.weight"]
        x = (norm(x) * weight if weight.ndim == 1 else x @ weight.T) + w[f"{layer}.bias"]
        x = activation(x) if layer != layers[-1] and weight.ndim > 1 else x
    return x


def critics(w, name, obs, action, activation=relu):
    """[Q1 (B,), Q2 (B,)]"""
    found, depth = [], sum(key.startswith(f"{name}.weights") for key in w)
    for k in range(2):
        x = torch.cat([obs, action], 1)
        for layer in range(depth):
            x = x @ w[f"{name}.weights.{layer}"][k] + w[f"{name}.biases.{layer}"][k]
            x = activation(x) if layer + 1 < depth else x
            if f"{name}.scales.{layer}" in w:
                x = norm(x) * w[f"{name}.scales.{layer}"][k] + w[f"{name}.shifts.{layer}"][k]
        found.append(x[:, 0])
    return found


def squash(w, obs, noise):
    """An action of the tanh policy (B, A) and its log-density (B,)."""
    mean, log_std = net(w, "actor", obs).chunk(2, 1)
    std = (-5 + 3.5 * (log_std.tanh() + 1)).exp()
    u = mean + std * noise
    density = torch.distributions.Normal(mean, std).log_prob(u) - (1 - u.tanh() ** 2).log()
    return u.tanh(), density.sum(1)


class Reference:
    """Weights and Adam, by the paper, one tensor at a time."""

    def __init__(self, w):
        self.w = {key: x.clone().requires_grad_() for key, x in w.items()}
        self.moments, self.updates, self.bc = {}, 0, 1.0  # bc: what imitation weighs, TD3+BC's and ReBRAC's

    def gradients(self, loss, names):
        keys = [key for key in self.w if key.startswith(names)]
        return dict(zip(keys, torch.autograd.grad(loss, [self.w[key] for key in keys]), strict=True))

    def step(self, gradients, lr):
        for key, g in gradients.items():
            m, v, t = self.moments.get(key, (0.0, 0.0, 0))
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
            self.moments[key] = m, v, t
            move = lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            self.w[key] = (self.w[key] - move).detach().requires_grad_()

    def follow(self, tau, names):
        for key in [key for key in self.w if key.startswith(names)]:
            new = (1 - tau) * self.w[f"target_{key}"] + tau * self.w[key]
            self.w[f"target_{key}"] = new.detach().requires_grad_()

    def average(self, decay):
        for key in [key for key in self.w if key.startswith("average")]:
            new = decay * self.w[key] + (1 - decay) * self.w[key.replace("average", "actor")]
            self.w[key] = new.detach().requires_grad_()


def sac_update(r, obs, action, reward, end, next_obs, noise):
    w, alpha = r.w, r.w["log_alpha"].exp().item()
    next_action, next_density = squash(w, next_obs, noise[0])
    value = torch.minimum(*critics(w, "target_critic", next_obs, next_action)) - alpha * next_density
    target = (reward + 0.97 * (1 - end) * value).detach()
    loss = sum(((q - target) ** 2).mean() for q in critics(w, "critic", obs, action))
    r.step(r.gradients(loss, "critic"), 2e-3)
    new_action, density = squash(w, obs, noise[1])  # before the temperature's and the policy's step
    loss = (alpha * density - torch.minimum(*critics(w, "critic", obs, new_action))).mean()
    gradients = r.gradients(loss, "actor")
    entropy_gap = (density.mean() - action.shape[1]).item()  # log pi + target entropy, which is -A
    r.step({"log_alpha": torch.tensor(-alpha * entropy_gap)}, 2e-3)
    r.step(gradients, 1e-3)
    r.follow(0.1, "critic")


def iql_update(r, obs, action, reward, next_obs, end, generator):
    r.updates += 1
    w = r.w
    target_q = torch.minimum(*critics(w, "target_critic", obs, action)).detach()
    diff = target_q - net(w, "value", obs)[:, 0]
    r.step(r.gradients((torch.where(diff > 0, 0.8, 0.2) * diff**2).mean(), "value"), 2e-3)
    value, next_value = net(w, "value", obs)[:, 0].detach(), net(w, "value", next_obs)[:, 0].detach()
    weight = torch.minimum((2.0 * (target_q - value)).exp(), torch.tensor(1.5))
    policy = torch.distributions.Normal(net(w, "actor", obs).tanh(), w["log_std"].exp())
    loss = -(weight * policy.log_prob(action).sum(1)).mean()
    r.step(r.gradients(loss, ("actor", "log_std")), 1e-3 * (1 + math.cos(math.pi * (r.updates - 1) / 4)) / 2)
    target = reward + 0.97 * (1 - end) * next_value
    loss = sum(((q - target) ** 2).mean() for q in critics(w, "critic", obs, action))
    r.step(r.gradients(loss, "critic"), 2e-3)
    r.follow(0.1, "critic")


def joint_iql_update(r, obs, action, reward, next_obs, end, generator):
    """All gradients at the weights before; the policy a Gaussian of deviation 1; its rate is constant."""
    w = r.w
    target_q = torch.minimum(*critics(w, "target_critic", obs, action, gelu)).detach()
    value = net(w, "value", obs, gelu)[:, 0]
    loss = (torch.where(target_q > value, 0.8, 0.2) * (target_q - value) ** 2).mean()
    q = critics(w, "critic", obs, action, gelu)
    target = reward + 0.97 * (1 - end) * net(w, "value", next_obs, gelu)[:, 0].detach()
    loss_q = sum(((each - target) ** 2).mean() for each in q)
    weight = torch.minimum((2.0 * (torch.minimum(*q) - value)).exp(), torch.tensor(1.5)).detach()
    loss_policy = (weight * 0.5 * (net(w, "actor", obs, gelu) - action).square().sum(1)).mean()
    steps = [(r.gradients(loss, "value"), 2e-3), (r.gradients(loss_q, "critic"), 2e-3)]
    for gradients, rate in [*steps, (r.gradients(loss_policy, "actor"), 1e-3)]:
        r.step(gradients, rate)
    r.follow(0.1, "critic")
    r.average(0.75)


def rebrac_update(r, obs, action, reward, next_obs, end, generator):
    r.updates += 1
    action, data_action, has_next = action.split([A, A, 1], 1)
    w, noise = r.w, 0.3 * torch.randn(action.shape, generator=generator)
    next_action = (net(w, "target_actor", next_obs, gelu).tanh() + noise.clamp(-0.2, 0.2)).clamp(-1, 1)
    next_value = torch.minimum(*critics(w, "target_critic", next_obs, next_action, gelu))
    distance = torch.where(has_next > 0, (next_action - data_action) ** 2, 0).sum(1)
    next_value = next_value - r.bc * 0.6 * distance
    target = (reward + 0.97 * (1 - end) * next_value).detach()
    loss = sum(((q - target) ** 2).mean() for q in critics(w, "critic", obs, action, gelu))
    r.step(r.gradients(loss, "critic"), 2e-3)
    if r.updates % 2 == 0:
        new_action = net(w, "actor", obs, gelu).tanh()
        q = torch.minimum(*critics(w, "critic", obs, new_action, gelu))
        loss = r.bc * 0.4 * ((new_action - action) ** 2).sum(1).mean() - q.mean() / q.abs().mean().item()
        r.step(r.gradients(loss, "actor"), 1e-3)
        r.follow(0.1, ("critic", "actor"))
        r.average(0.75)


def td3_bc_update(r, obs, action, reward, next_obs, end, generator):
    r.updates += 1
    w, noise = r.w, 0.3 * torch.randn(action.shape, generator=generator)
    next_action = net(w, "target_actor", next_obs).tanh() + noise.clamp(-0.2, 0.2)
    next_value = torch.minimum(*critics(w, "target_critic", next_obs, next_action.clamp(-1, 1)))
    target = (reward + 0.97 * (1 - end) * next_value).detach()
    loss = sum(((q - target) ** 2).mean() for q in critics(w, "critic", obs, action))
    r.step(r.gradients(loss, "critic"), 2e-3)
    if r.updates % 2 == 0:
        new_action = net(w, "actor", obs).tanh()
        q = critics(w, "critic", obs, new_action)[0]
        loss = -2.0 / q.abs().mean().item() * q.mean() + r.bc * ((new_action - action) ** 2).mean()
        r.step(r.gradients(loss, "actor"), 1e-3)
        r.follow(0.1, ("critic", "actor"))


def cql_update(r, obs, action, reward, next_obs, end, generator, lagrange=False):
    r.updates += 1
    w, alpha, n = r.w, r.w["log_alpha"].exp().item(), 3
    uniform = 2 * torch.rand(n, *action.shape, generator=generator) - 1
    noise = torch.randn(1 + 2 * n, *action.shape, generator=generator)
    new_action, density = squash(w, obs, noise[0])
    if r.updates == 1:  # --bc-steps 1
        u, (mean, log_std) = action.clamp(-1 + 1e-6, 1 - 1e-6).atanh(), net(w, "actor", obs).chunk(2, 1)
        normal = torch.distributions.Normal(mean, (-5 + 3.5 * (log_std.tanh() + 1)).exp())
        loss = (alpha * density - (normal.log_prob(u) - (1 - u.tanh() ** 2).log()).sum(1)).mean()
    else:
        loss = (alpha * density - torch.minimum(*critics(w, "critic", obs, new_action))).mean()
    policy = r.gradients(loss, "actor")
    policy["log_alpha"] = torch.tensor(-alpha * (density.mean() - A).item())
    samples = [(a, torch.tensor(0.5**A).log()) for a in uniform]
    samples += [squash(w, obs, noise[1 + j]) for j in range(n)]
    samples += [squash(w, next_obs, noise[1 + n + j]) for j in range(n)]
    tried = [a for a, _ in samples[2 * n :]][: n if lagrange else 1]
    values = [torch.minimum(*critics(w, "target_critic", next_obs, a)) for a in tried]
    target = (reward + 0.97 * (1 - end) * torch.stack(values).amax(0)).detach()
    q_data, gaps, loss = critics(w, "critic", obs, action), [], 0
    for k in range(2):
        total = 0
        for a, d in samples:
            total = total + critics(w, "critic", obs, a.detach())[k].exp() / d.detach().exp()
        difference = total.log() - q_data[k]
        gaps.append((difference.clamp(min=0.8) if lagrange else difference).mean())
        loss = loss + ((q_data[k] - target) ** 2).mean()
    multiplier = w["log_multiplier"].exp().item()
    for gap in gaps:
        loss = loss + (multiplier * 2.0 * (gap - 0.5) if lagrange else 2.0 * gap)
    critic = r.gradients(loss, "critic")
    if lagrange:
        gap = sum(2.0 * (gap.item() - 0.5) for gap in gaps) / 2
        critic["log_multiplier"] = torch.tensor(-multiplier * gap)
    r.step(policy, 1e-3)
    r.step(critic, 2e-3)
    r.follow(0.1, "critic")


COMMON = """--device cpu --eval-episodes 0 --batch-size 7 --width 6 --gamma 0.97 --tau 0.1 --run-name r
    --learning-rate 1e-3 --critic-learning-rate 2e-3 --output-dir"""


@pytest.fixture
def in_double(monkeypatch):
    """Trains a script in float64 -> its agent, and before each update its weights, batch and generator."""

    def train(script, flags, tmp_path):
        agents, seen = [], []

        class Agent(script.Agent):
            def __init__(self, *args):
                super().__init__(*args)
                agents.append(self)
                self.first = copy.deepcopy(self.state_dict())

            def policy(self, obs, *args):
                return super().policy(obs.double(), *args)  # the environment's are float32

        def tensors(*args):
            return [x.double() if x.is_floating_point() else x for x in transition_tensors(*args)]

        def sample(*args):
            batch, generator = sample_batch(*args), torch.Generator()
            generator.set_state(args[-1].get_state())
            seen.append((copy.deepcopy(agents[0].state_dict()), batch, generator))
            return batch

        monkeypatch.setattr(script, "Agent", Agent)
        if script is not sac:
            sample_batch = script.sample_batch
            monkeypatch.setattr(script, "transition_tensors", tensors)
            monkeypatch.setattr(script, "sample_batch", sample)
        monkeypatch.setattr(sys, "argv", [script.__file__, *COMMON.split(), str(tmp_path), *flags.split()])
        monkeypatch.setattr(common.run.signal, "signal", lambda *_: None)
        common.run.main(script.train, script.Args, script.PRESETS)
        return agents[0], seen

    torch.set_default_dtype(torch.float64)
    yield train
    torch.set_default_dtype(torch.float32)


def assert_same_weights(found, wanted):
    for key, x in found.items():
        torch.testing.assert_close(x, wanted[key].detach(), rtol=1e-7, atol=1e-9, msg=key)


OFFLINE = {
    "iql": (iql, iql_update, "--expectile 0.8 --temperature 2 --max-weight 1.5 --no-normalize-rewards"),
    "iql-joint": (
        iql, joint_iql_update, "--expectile 0.8 --temperature 2 --max-weight 1.5 --no-normalize-rewards "
        "--joint-step --no-anneal-lr --no-learn-std --activation gelu --layer-norm --ema-decay 0.75",
    ),
    "td3_bc": (td3_bc, td3_bc_update, "--alpha 2 --policy-noise 0.3 --noise-clip 0.2"),
    "rebrac": (
        td3_bc, rebrac_update, "--loss rebrac --actor-bc 0.4 --critic-bc 0.6 --policy-noise 0.3 "
        "--noise-clip 0.2 --activation gelu --layer-norm --ema-decay 0.75",
    ),
    "cql": (cql, cql_update, "--cql-alpha 2 --cql-samples 3 --bc-steps 1"),
    "cql-lagrange": (
        cql, lambda *args: cql_update(*args, lagrange=True),
        "--cql-alpha 2 --cql-samples 3 --bc-steps 1 --target-gap 0.5 --min-penalty 0.8 --max-backup",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
def test_updates_against_a_reference(tmp_path, in_double, name):
    """Four updates in float64, step by step."""
    script, update, flags = OFFLINE[name]
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(50, 4)), rng.uniform(-1, 1, (50, A)), rng.normal(size=50)]
    ends, after = rng.random(50) < 0.3, rng.normal(size=(50, 4))
    if name == "rebrac":  # which needs rows that follow others
        after[:40], ends[:40] = rows[0][1:41], ends[:40] & (rng.random(40) < 0.5)
    save_d4rl(tmp_path / "made.hdf5", *rows, after, ends, np.zeros(50))
    agent, seen = in_double(script, f"--dataset {tmp_path}/made.hdf5 --total-timesteps 4 {flags}", tmp_path)
    assert len(seen) == 4
    reference, buffers = Reference(seen[0][0]), ("obs_mean", "obs_std")
    for (_, batch, generator), after in zip(
        seen, [x for x, _, _ in seen[1:]] + [agent.state_dict()], strict=True
    ):
        update(reference, *batch, generator)
        assert_same_weights({key: x for key, x in after.items() if key not in buffers}, reference.w)
    first, moved = (
        seen[0][0],
        {key for key, x in agent.state_dict().items() if not torch.equal(x, seen[0][0][key])},
    )
    still = {*buffers} | {"cql": {"log_multiplier"}, "iql-joint": {"log_std"}}.get(name, set())
    assert moved == first.keys() - still
    targets = [p for key, p in agent.named_parameters() if key.startswith("target_")]
    assert targets and not any(p.requires_grad for p in targets)


@pytest.mark.parametrize(
    "env, alpha", [("Pendulum-v1", "auto"), ("Pendulum-v1", "0.3"), ("Aim-v0", "auto"), ("AimCut-v0", "auto")]
)
def test_sac_updates_against_a_reference(tmp_path, in_double, env, alpha):
    """Three environment steps with an update each, after 20 random ones. Aim's episodes of 4 steps terminate,
    AimCut's of 3 are time-outs, which are bootstrapped."""
    flags = f"--env {env} --seed 5 --learning-starts 20 --total-timesteps 23 --buffer-size 100"
    agent, _ = in_double(sac, f"{flags} --alpha {alpha}", tmp_path)
    reference = Reference(agent.first)
    if alpha != "auto":
        reference.w["log_alpha"] = torch.tensor(math.log(0.3), requires_grad=True)
    replay = load_checkpoint(tmp_path / "r")["replay"][:, 0]
    size, seen = (3 if env == "Pendulum-v1" else 2), np.zeros(2, bool)
    assert replay.shape == (23, 2 * size + 4) and replay.dtype == torch.float64
    generator = torch.Generator().manual_seed(5)
    for step in range(23):
        if step < 20:
            action = torch.rand(1, 1, generator=generator) * 2 - 1
            close(replay[step, size], action[0, 0], 1e-6)
            continue
        noise = torch.randn(1, 1, generator=generator)
        action = squash(reference.w, replay[step : step + 1, :size], noise)[0]
        close(replay[step, size], action[0, 0].detach(), 1e-6)
        rows = replay[torch.randint(step + 1, (7,), generator=generator)]
        noise = torch.randn(2, 7, 1, generator=generator)
        obs, action, reward, end, cut, next_obs = rows.split([size, 1, 1, 1, 1, size], 1)
        seen |= [end.any().item(), cut.any().item()]
        log_alpha = reference.w["log_alpha"]
        sac_update(reference, obs, action, reward[:, 0], end[:, 0], next_obs, noise)
        if alpha != "auto":
            reference.w["log_alpha"] = log_alpha
    assert_same_weights(agent.state_dict(), reference.w)
    assert seen.tolist() == [env == "Aim-v0", env == "AimCut-v0"]  # ends that the updates have seen
    moved = {key for key, x in agent.state_dict().items() if not torch.equal(x, agent.first[key])}
    assert moved == agent.first.keys()
    assert not any(p.requires_grad for p in agent.target_critic.parameters())
