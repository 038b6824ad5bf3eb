"""The scripts' mathematics against float64 scalar loops and closed forms; how a rollout bootstraps."""

import functools
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import bc_warmup
import common.envs
import common.run
import grpo_vla
import ppo_vla
from common.envs.vector import Envs
from common.evaluation import summarize, wilson_interval

SEEDS = range(4)


def rng_of(seed):
    return np.random.default_rng(seed)


def tensor(x, grad=False):
    return torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=grad)


def close(found, wanted, rtol=1e-9):
    found = found.detach() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(wanted, np.float64), rtol, rtol)


# --- the clipped surrogate's second bound


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    log_ratio = tensor([[-1.0, 0.1, 1.0, 5.0]] * 3, grad=True)
    advantages = tensor([-2.0, 0.0, 2.0])
    plain = ppo_vla.clipped_surrogate(log_ratio, advantages, 0.2, 0.28).detach()
    assert plain[0, 3] == pytest.approx(2 * math.exp(5))  # no bound
    found = ppo_vla.clipped_surrogate(log_ratio, advantages, 0.2, 0.28, 3.0)
    close(found[0], [2 * 0.8, 2 * math.exp(0.1), 2 * math.exp(1), 2 * 3.0])
    close(found[1:], plain[1:])
    found.sum().backward()
    assert log_ratio.grad[0].tolist() == pytest.approx([0, 2 * math.exp(0.1), 2 * math.exp(1), 0])
    off = ppo_vla.clipped_surrogate(log_ratio, advantages, 0.2, 0.28, 0.0)
    assert torch.equal(off, plain)


# --- generalised advantage estimation


def gae_by_its_sum(rewards, values, next_values, ends, gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to the episode's end: the definition, not the recursion."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for i in range(t, T):
                delta = float(rewards[i, n]) + gamma * float(next_values[i, n]) - float(values[i, n])
                advantages[t, n] += (gamma * lam) ** (i - t) * delta
                if ends[i, n]:
                    break
    return advantages


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_is_the_discounted_sum_of_td_errors(seed):
    rng = rng_of(seed)
    shape = rng.integers(1, 9), rng.integers(1, 6)
    rewards, values, last = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=shape[1])
    terminated, truncated = rng.random(shape) < 0.2, rng.random(shape) < 0.2
    truncated &= ~terminated
    next_values = np.concatenate([values[1:], last[None]])
    next_values[terminated] = 0
    next_values[truncated] = rng.normal(size=truncated.sum())
    ends, gamma, lam = terminated | truncated, rng.uniform(0.8, 1), rng.uniform(0, 1)
    wanted = gae_by_its_sum(rewards, values, next_values, ends, gamma, lam)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = (torch.tensor(x, dtype=dtype) for x in (rewards, values, next_values))
        advantages, returns = ppo_vla.compute_gae(*given, torch.tensor(ends), gamma, lam)
        assert advantages.dtype == returns.dtype == dtype
        close(advantages, wanted, tolerance)
        close(returns, wanted + values, tolerance)


def test_gae_at_lambda_one_is_the_return_and_at_zero_the_td_error():
    rewards, values = tensor([[1], [2], [4]]), tensor([[0.5], [0.25], [8]])
    next_values, ends = tensor([[0.25], [8], [16]]), torch.zeros(3, 1, dtype=torch.bool)
    _, returns = ppo_vla.compute_gae(rewards, values, next_values, ends, 0.5, 1.0)
    close(returns[:, 0], [1 + 0.5 * (2 + 0.5 * (4 + 0.5 * 16)), 2 + 0.5 * (4 + 0.5 * 16), 4 + 0.5 * 16])
    advantages, _ = ppo_vla.compute_gae(rewards, values, next_values, ends, 0.5, 0.0)
    close(advantages, rewards + 0.5 * next_values - values)


def test_truncation_bootstraps_and_termination_does_not():
    """One decision worth 1 from a state worth 2, whose successor the critic thinks worth 10."""
    reward, value, ends = tensor([[1, 1]]), tensor([[2, 2]]), torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = ppo_vla.compute_gae(reward, value, tensor([[0, 10]]), ends, 0.9, 0.95)
    close(advantages[0], [-1, 1 + 9 - 2])
    close(returns[0], [1, 10])
    # and nothing of the next episode reaches back over either end
    rewards, values = tensor([[1, 1], [1000, 1000]]), tensor([[2, 2], [0, 0]])
    next_values, ends = tensor([[0, 10], [0, 0]]), torch.ones(2, 2, dtype=torch.bool)
    close(ppo_vla.compute_gae(rewards, values, next_values, ends, 0.9, 0.95)[0][0], [-1, 8])


class Clock(gymnasium.Env):
    """Episodes of 5, 6, 7, 5, ... steps, every other one cut off by a time limit.

    proprio = [episode, step] / 10. Reward of a step: 0.1. Only the first of the two action dimensions has any
    effect.
    """

    instructions, has_success, active_dims = ("wait",), True, np.array([True, False])

    def __init__(self, split):
        self.observation_space = gymnasium.spaces.Dict(
            proprio=gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self.observe(), {}

    def observe(self):
        return {"proprio": np.array([self.episode, self.steps], np.float32) / 10}

    def advance(self, action):
        self.steps += 1
        over, limit = self.steps == 5 + self.episode % 3, self.episode % 2 == 1
        return 0.1, over and not limit, over and limit, {"success": over}


make = Clock


@dataclass
class Args:
    """The clock has no flags."""


def critic(episode, step):
    """What the patched critic says of a state: unlike for any two states."""
    return episode + step / 7 + 3


class Stop(Exception):
    pass


def collect(monkeypatch, tmp_path, *flags, lose=()):
    """Runs `train` to the end of its first rollout -> what it hands to compute_gae and to merge_tokens.

    lose: the (decision, environment) at which the environment's worker is said to have died.
    """
    monkeypatch.setitem(common.envs.WORLDS, "clock", __name__)
    monkeypatch.chdir(tmp_path)
    argv = "--env clock --backbone mlp --head gaussian --chunk 3 --num-envs 2 --num-workers 0 --num-steps 7"
    argv += " --eval-envs 1 --eval-episodes 1 --gamma 0.9 --gae-lambda 0.8 --critic-warmup 0"
    monkeypatch.setattr(sys, "argv", ["ppo_vla.py", *argv.split(), "--total-timesteps", "30", *flags])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    seen = SimpleNamespace(masks=[], calls=0)
    gae, act, step = ppo_vla.compute_gae, ppo_vla.Agent.get_action_and_value, Envs.step

    def value_of(batch):
        episode, steps = (batch["proprio"].double() * 10).unbind(-1)
        return critic(episode.round(), steps.round()).float()

    def spy_act(self, batch, *args, **kwargs):
        return *act(self, batch, *args, **kwargs)[:2], value_of(batch)

    def spy_gae(rewards, values, next_values, ends, gamma, gae_lambda):
        seen.gae = [x.clone() for x in (rewards, values, next_values, ends)]
        seen.advantages, returns = gae(rewards, values, next_values, ends, gamma, gae_lambda)
        return seen.advantages, returns

    def spy_merge(x, mask, level, chunk):
        seen.masks.append(mask.clone())
        raise Stop

    def spy_step(self, *args, **kwargs):
        out = step(self, *args, **kwargs)
        if self.autoreset:
            for decision, row in lose:
                if decision == seen.calls:
                    out[4]["lost"][row], out[4]["steps"][row] = True, 0
            seen.calls += 1
        return out

    monkeypatch.setattr(ppo_vla.Agent, "get_value", lambda self, batch, vision=None: value_of(batch))
    monkeypatch.setattr(ppo_vla.Agent, "get_action_and_value", spy_act)
    monkeypatch.setattr(ppo_vla, "compute_gae", spy_gae)
    monkeypatch.setattr(ppo_vla, "merge_tokens", spy_merge)
    monkeypatch.setattr(Envs, "step", spy_step)
    with pytest.raises(Stop):
        common.run.main(ppo_vla.train, ppo_vla.Args, ppo_vla.PRESETS)
    return seen


def simulate(decisions, chunk):
    """The clock by hand -> per decision: reward, value, next value, end, executed steps."""
    episode = step = 0
    rows = []
    for _ in range(decisions):
        value, executed, over = critic(episode, step), 0, False
        while executed < chunk and not over:
            step, executed = step + 1, executed + 1
            over = step == 5 + episode % 3
        follows = critic(episode, step)  # of the final observation, where the episode is over
        if over:
            follows = 0 if episode % 2 == 0 else follows  # terminated, truncated
            episode, step = episode + 1, 0
        rows.append((0.1 * executed, value, follows, over, executed))
    return [np.array(x) for x in zip(*rows, strict=True)]


def test_rollout_bootstraps_truncated_episodes_only(monkeypatch, tmp_path):
    """The real rollout: V(final observation) after a time limit, 0 after a termination, V(next) within."""
    seen = collect(monkeypatch, tmp_path)
    rewards, values, next_values, ends, executed = simulate(7, 3)
    assert ends.sum() == 3 and (next_values == 0).sum() == 2  # two terminations and one truncation
    for row in range(2):
        for found, wanted in zip(seen.gae, (rewards, values, next_values, ends), strict=True):
            close(found[:, row], wanted, 1e-6)
    # tokens after the end, and those of a dimension without effect, are masked
    mask = seen.masks[0].view(7, 2, 3, 2)
    np.testing.assert_array_equal(mask[:, 0, :, 0], np.arange(3) < executed[:, None])
    assert torch.equal(mask[:, 0], mask[:, 1]) and not mask[..., 1].any()


def test_rollout_drops_an_episode_whose_worker_died(monkeypatch, tmp_path):
    """Environment 1 is lost at decision 3: its decisions since the last end go, no credit crosses the gap."""
    whole = collect(monkeypatch, tmp_path)
    seen = collect(monkeypatch, tmp_path, "--run-name", "lost", lose=[(3, 1)])
    _, _, _, ends, _ = simulate(7, 3)
    began = np.flatnonzero(ends[:3]).max() + 1
    assert began == 2 and len(whole.masks[0]) == 14 and len(seen.masks[0]) == 12
    assert seen.gae[3][2:4, 1].all() and torch.equal(seen.advantages[:, 0], whole.advantages[:, 0])
    assert torch.equal(seen.advantages[:2, 1], whole.advantages[:2, 1])
    assert torch.equal(seen.advantages[4:, 1], whole.advantages[4:, 1])


def test_rollout_without_a_survivor_is_skipped(monkeypatch, tmp_path):
    seen = collect(monkeypatch, tmp_path, "--num-steps", "1", lose=[(0, 0), (0, 1)])
    assert seen.calls == 2 and len(seen.masks[0]) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_valid_decisions_are_those_of_episodes_that_were_not_lost(seed):
    rng = rng_of(seed)
    shape = rng.integers(1, 12), rng.integers(1, 6)
    lost, ended = rng.random(shape) < 0.15, rng.random(shape) < 0.25
    wanted = np.ones(shape, bool)
    for n in range(shape[1]):
        start = 0
        for t in range(shape[0]):
            if lost[t, n]:
                wanted[start : t + 1, n] = False
            if lost[t, n] or ended[t, n]:
                start = t + 1
    np.testing.assert_array_equal(ppo_vla.valid_decisions(torch.tensor(lost), torch.tensor(ended)), wanted)


@pytest.mark.parametrize("script", [ppo_vla, grpo_vla])
def test_teachable_by_hand(script):
    episodes = [[1.0, 9.0, 3.0, 0.0]] * 6 + [[0.0, 9.0, 3.0, 2.0]] * 2 + [[1.0, 9.0, 3.0, 2.0]] * 2
    close(script.teachable(episodes, 4), [7 / 8 / 8, 1 / 4, 1 / 4, 1 / 4], 1e-12)
    close(script.teachable([], 2), [1 / 4, 1 / 4], 1e-12)
    never = [[0.0, 0.0, 3.0, 1.0]] * 98
    close(script.teachable(never, 2), [1 / 4, 99 / 1e4], 1e-12)


def test_valid_decisions_by_hand():
    """A column an environment: an end before the loss, a loss amid the rollout, two of them, none, an end."""
    lost = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    ended = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    wanted = [[1, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 0, 1, 1], [1, 1, 0, 1, 1]]
    assert ppo_vla.valid_decisions(lost, ended).int().tolist() == wanted


# --- ratio, surrogate, value, KL, masks


@pytest.mark.parametrize("level", ["token", "step", "chunk"])
@pytest.mark.parametrize("seed", SEEDS)
def test_merge_tokens_sums_what_one_ratio_covers(seed, level):
    rng, (B, K, A) = rng_of(seed), (3, 4, 5)
    x, mask = rng.normal(size=(B, K, A)), rng.random((B, K, A)) < 0.5
    mask[0, 1], mask[1] = False, False  # a step, and a whole chunk, of masked tokens
    tokens = tensor(np.where(mask, x, -np.inf).reshape(B, K * A), grad=True)  # what is masked must not count
    sums, valid = ppo_vla.merge_tokens(tokens, torch.tensor(mask.reshape(B, K * A)), level, K)
    groups = {"token": K * A, "step": K, "chunk": 1}[level]
    assert sums.shape == valid.shape == (B, groups)
    for b in range(B):
        for g in range(groups):
            covered = range(g * K * A // groups, (g + 1) * K * A // groups)
            wanted = [x[b].flat[i] for i in covered if mask[b].flat[i]]
            close(sums[b, g].item(), math.fsum(wanted), 1e-12)
            assert valid[b, g].item() == bool(wanted)
    sums.sum().backward()
    close(tokens.grad, mask.reshape(B, -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_surrogate_and_its_gradient(seed):
    rng = rng_of(seed)
    log_ratio, advantages = tensor(rng.normal(0, 0.4, (6, 5)), grad=True), tensor(rng.normal(size=6))
    low, high = 0.2, 0.28
    loss = ppo_vla.clipped_surrogate(log_ratio, advantages, low, high)
    loss.sum().backward()
    for b in range(6):
        for g in range(5):
            ratio, a = math.exp(log_ratio[b, g].item()), advantages[b].item()
            clipped = min(max(ratio, 1 - low), 1 + high)
            close(loss[b, g].item(), -min(ratio * a, clipped * a), 1e-12)
            stopped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
            close(log_ratio.grad[b, g].item(), 0 if stopped else -ratio * a, 1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_and_its_gradient(seed, clip, delta):
    rng = rng_of(seed)
    old = tensor(rng.normal(size=40))
    values, returns = (tensor(old.numpy() + rng.normal(0, 0.5, 40), grad) for grad in (True, False))

    def error(e):
        if delta == 0 or abs(e) <= delta:
            return 0.5 * e * e, e
        return delta * (abs(e) - 0.5 * delta), math.copysign(delta, e)

    loss = ppo_vla.value_loss(values, old, returns, clip, delta)
    loss.sum().backward()
    columns = (x.tolist() for x in (values, old, returns, loss, values.grad))
    for v, o, r, found, grad in zip(*columns, strict=True):
        wanted, slope = error(v - r)
        if clip:
            kept = o + min(max(v - o, -clip), clip)
            other, other_slope = error(kept - r)
            if other > wanted:
                wanted, slope = other, other_slope if abs(v - o) < clip else 0.0
            elif kept == v:  # both branches are the same function
                slope = error(v - r)[1]
        close(found, wanted, 1e-12)
        close(grad, slope, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_k3_has_the_kl_as_its_mean(seed):
    rng = rng_of(seed)
    p, q = (rng.dirichlet(np.ones(9)) for _ in range(2))
    log_ratio = tensor(np.log(q / p), grad=True)
    k3 = ppo_vla.kl_k3(log_ratio)
    assert (k3 >= 0).all()
    close((tensor(p) * k3).sum(), sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), 1e-12)
    k3.sum().backward()
    close(log_ratio.grad, q / p - 1, 1e-9)
    close(ppo_vla.kl_k3(tensor([0.0, math.log(2)])), [0, 1 - math.log(2)])


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_mean_of_micro_batches_adds_up(seed):
    rng = rng_of(seed)
    x, mask = rng.normal(size=(10, 3)), rng.random((10, 3)) < 0.4
    filled = tensor(np.where(mask, x, np.nan), grad=True)  # NaN where it must not be read
    whole = ppo_vla.masked_mean(filled, torch.tensor(mask))
    close(whole.item(), math.fsum(x[mask]) / mask.sum(), 1e-12)
    whole.backward()
    close(filled.grad, mask / mask.sum(), 1e-12)
    parts = tensor(x, grad=True)
    total = torch.tensor(mask).sum()
    for rows in (slice(0, 1), slice(1, 8), slice(8, 10)):
        ppo_vla.masked_mean(parts[rows], torch.tensor(mask[rows]), total).backward()
    close(parts.grad, mask / mask.sum(), 1e-12)
    assert ppo_vla.masked_mean(filled, torch.zeros(10, 3, dtype=torch.bool)).item() == 0


def test_explained_variance():
    rng = rng_of(0)
    values, returns = rng.normal(size=50), rng.normal(size=50)
    wanted = 1 - np.var(returns - values) / np.var(returns)
    close(ppo_vla.explained_variance(tensor(values), tensor(returns)), wanted)
    assert ppo_vla.explained_variance(tensor(returns), tensor(returns)) == 1
    close(ppo_vla.explained_variance(tensor(returns) * 0 + 3, tensor(returns)), 0)
    assert torch.isfinite(ppo_vla.explained_variance(tensor(np.zeros(5)), tensor(np.ones(5))))


# --- the loss


class Scalars:
    """ppo_loss one number at a time: its parts, and the gradients by log-probs, entropies and values."""

    def __init__(self, log_probs, entropies, values, batch, totals, args, critic_only):
        (B, T), K = log_probs.shape, args.chunk
        size = {"token": 1, "step": T // K, "chunk": T}[args.ratio_level]
        ratios, tokens, decisions = totals
        self.log_probs, self.entropies, self.values = np.zeros((B, T)), np.zeros((B, T)), np.zeros(B)
        policy, critic, entropy, kl, k3, clipped, error = (0.0,) * 7
        for b in range(B):
            advantage, old, target = (batch[key][b] for key in ("advantages", "values", "returns"))
            for g in range(T // size):
                covered = [i for i in range(g * size, (g + 1) * size) if batch["mask"][b, i]]
                if not covered:
                    continue
                x = sum(log_probs[b, i] for i in covered) - batch["old_log_probs"][b, g]
                ratio = math.exp(x)
                bounded = min(max(ratio, 1 - args.clip_low), 1 + args.clip_high)
                policy -= min(ratio * advantage, bounded * advantage) / ratios
                k3 += (ratio - 1 - x) / ratios
                clipped += (ratio != bounded) / ratios
                error += abs(ratio - 1) / ratios
                flows = ratio * advantage <= bounded * advantage  # else the bound is the lesser one
                for i in covered if flows and not critic_only else ():
                    self.log_probs[b, i] -= ratio * advantage / ratios
            for i in range(T):
                if not batch["mask"][b, i]:
                    continue
                entropy += entropies[b, i] / tokens
                if critic_only:
                    continue
                self.entropies[b, i] = -args.entropy_coef / tokens
                if args.kl_coef:
                    x = batch["reference_log_probs"][b, i] - log_probs[b, i]
                    kl += (math.exp(x) - 1 - x) / tokens
                    self.log_probs[b, i] += args.kl_coef * (1 - math.exp(x)) / tokens
            near = old + min(max(values[b] - old, -args.value_clip), args.value_clip)
            plain, kept = 0.5 * (values[b] - target) ** 2, 0.5 * (near - target) ** 2
            critic += max(plain, kept) / decisions
            if plain >= kept:  # in the clipped branch beyond the bound nothing depends on the value
                self.values[b] = args.value_coef * (values[b] - target) / decisions
        total = args.value_coef * critic
        if not critic_only:
            total += policy - args.entropy_coef * entropy + args.kl_coef * kl
        self.metrics = {"loss/policy": policy, "loss/value": critic, "loss/total": total}
        self.metrics |= {"policy/entropy": entropy, "policy/approx_kl": k3}
        self.metrics |= {"policy/clip_fraction": clipped, "policy/ratio_error": error}


@pytest.mark.parametrize("critic_only", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "step", "chunk"])
@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_loss_and_its_gradient(seed, level, kl_coef, critic_only):
    """Masked tokens, a step and a decision without any; a minibatch of which these are a part."""
    rng, (B, K, A) = rng_of(seed), (6, 3, 2)
    T = K * A
    args = SimpleNamespace(
        ratio_level=level, chunk=K, clip_low=0.2, clip_high=0.28, value_clip=0.3, huber_delta=0.0,
        value_coef=0.7, entropy_coef=0.05, kl_coef=kl_coef, dual_clip=0.0,
    )  # fmt: skip
    mask = rng.random((B, T)) < 0.7
    mask[0], mask[1, A : 2 * A] = False, False
    log_probs, entropies, values = rng.normal(-2, 1, (B, T)), rng.random((B, T)), rng.normal(size=B)
    groups = {"token": T, "step": K, "chunk": 1}[level]
    merged = np.where(mask, log_probs, 0).reshape(B, groups, -1).sum(-1)
    batch = {
        "mask": mask,
        "old_log_probs": merged + rng.normal(0, 0.3, merged.shape),
        "values": values + rng.normal(0, 0.5, B),
        "returns": rng.normal(size=B),
        "advantages": rng.normal(size=B),
    }
    if kl_coef and not critic_only:
        batch["reference_log_probs"] = log_probs + rng.normal(0, 0.4, (B, T))
    totals = np.array([3 * B * groups // 2, 2 * B * T, 2 * B])  # of the whole minibatch
    wanted = Scalars(log_probs, entropies, values, batch, totals, args, critic_only)
    new = [tensor(x, grad=True) for x in (log_probs, entropies, values)]
    given = {key: torch.tensor(x) for key, x in batch.items()}
    loss, metrics = ppo_vla.ppo_loss(*new, given, torch.tensor(totals), args, critic_only)
    loss.backward()
    assert metrics.keys() == wanted.metrics.keys() and not any(x.requires_grad for x in metrics.values())
    for name, value in wanted.metrics.items():
        close(metrics[name], value, 1e-6 if name == "policy/clip_fraction" else 1e-10)  # that is float32
    close(loss, wanted.metrics["loss/total"], 1e-10)
    for x, gradient in zip(new, (wanted.log_probs, wanted.entropies, wanted.values), strict=True):
        close(np.zeros(x.shape) if x.grad is None else x.grad, gradient, 1e-10)
    assert wanted.values.any() and wanted.log_probs.any() != critic_only


def test_ppo_loss_takes_hubers_error_and_unclipped_values():
    args = SimpleNamespace(
        ratio_level="chunk", chunk=1, clip_low=0.2, clip_high=0.2, value_clip=0.0, huber_delta=0.5,
        value_coef=2.0, entropy_coef=0.0, kl_coef=0.0, dual_clip=0.0,
    )  # fmt: skip
    zeros = torch.zeros(2, 1)
    batch = {"mask": torch.ones(2, 1, dtype=torch.bool), "old_log_probs": zeros, "values": torch.zeros(2)}
    batch |= {"returns": torch.zeros(2), "advantages": torch.zeros(2)}
    values = tensor([0.25, -3.0])
    loss, _ = ppo_vla.ppo_loss(zeros, zeros, values, batch, torch.tensor([2, 2, 2]), args)
    close(loss, 2.0 * (0.5 * 0.25**2 + 0.5 * (3 - 0.25)) / 2)


# --- evaluation's numbers


def test_summarize_by_hand():
    rows = [(True, 2.0, 10, 1), (False, 0.5, 48, 1), (True, 1.0, 20, 0)]
    found = summarize(rows, True, ["lift", "put", "move"])
    assert found.pop("success_rate_ci95") == wilson_interval(2, 3)
    tasks = found.pop("per_task")
    assert found == {"episodes": 3, "success_rate": 2 / 3, "mean_reward": 3.5 / 3, "mean_length": 26.0}
    assert list(tasks) == ["lift", "put"]  # no entry for a task that was not played
    assert tasks["lift"] == {
        "episodes": 1,
        "success_rate": 1.0,
        "success_rate_ci95": wilson_interval(1, 1),
        "mean_reward": 1.0,
        "mean_length": 20.0,
    }
    put = [tasks["put"][key] for key in ("success_rate", "mean_reward", "mean_length")]
    assert put == [0.5, 1.25, 29]
    plain = summarize([(False, 500.0, 500, 0)], False, [""])
    assert plain == {"episodes": 1, "mean_reward": 500.0, "mean_length": 500.0}


# --- imitation and grounding


@pytest.mark.parametrize("sigma", [0.0, 0.7, 3.0])
def test_soft_cross_entropy_and_its_gradient(sigma):
    rng = rng_of(1)
    logits, bins = tensor(rng.normal(0, 2, (6, 256)), grad=True), torch.tensor([0, 1, 77, 128, 254, 255])
    loss = bc_warmup.soft_cross_entropy(logits, bins, sigma)
    loss.sum().backward()
    for row in range(6):
        x, b = logits[row].tolist(), bins[row].item()
        log_z = math.log(math.fsum(math.exp(v) for v in x))
        target = [float(i == b) for i in range(256)]
        if sigma:
            target = [math.exp(-0.5 * ((i - b) / sigma) ** 2) for i in range(256)]
            target = [w / math.fsum(target) for w in target]
        # the table of targets is float32
        close(loss[row].item(), math.fsum(w * (log_z - v) for w, v in zip(target, x, strict=True)), 1e-6)
        close(logits.grad[row], [math.exp(v - log_z) - w for w, v in zip(target, x, strict=True)], 1e-6)


def test_soft_cross_entropy_of_a_small_sigma_is_the_plain_one():
    logits, bins = tensor(rng_of(2).normal(size=(5, 256))), torch.arange(5)
    close(bc_warmup.soft_cross_entropy(logits, bins, 0.05), bc_warmup.soft_cross_entropy(logits, bins, 0))


@pytest.mark.parametrize("seed", SEEDS)
def test_grounding_loss_aims_at_the_pixel(seed):
    rng, side = rng_of(seed), 8
    attention = tensor(rng.normal(size=(3, 2, 4, side * side)), grad=True)
    pixels = rng.uniform(-0.85, 0.85, (3, 2, 2, 2))
    pixels[0, 1, 1], pixels[2, 0] = np.nan, np.nan  # not named, or not in sight
    loss = bc_warmup.grounding_loss(attention, tensor(pixels))
    loss.backward()
    centre = [(i + 0.5) / side * 2 - 1 for i in range(side)]
    total, count = 0.0, int(np.isfinite(pixels[..., 0]).sum())
    for b, camera, query in np.ndindex(3, 2, 4):
        grad = attention.grad[b, camera, query].numpy()
        if query > 1 or np.isnan(pixels[b, camera, query, 0]):
            assert not grad.any()
            continue
        log_p = attention[b, camera, query].log_softmax(-1).tolist()
        target = np.exp(log_p) - grad * count  # the gradient of a cross-entropy is (p - target) / count
        assert abs(target.sum() - 1) < 1e-9 and (target > 1e-9).sum() <= 4
        x, y = pixels[b, camera, query]
        close(sum(target[i] * centre[i % side] for i in range(side * side)), x, 1e-9)
        close(sum(target[i] * centre[i // side] for i in range(side * side)), y, 1e-9)
        for i in range(side * side):  # bilinear: a tent of one cell's width over the pixel
            dx, dy = (abs(c - p) * side / 2 for c, p in ((centre[i % side], x), (centre[i // side], y)))
            total -= max(0, 1 - dx) * max(0, 1 - dy) * log_p[i]
    close(loss.item(), total / count)


def test_grounding_loss_at_the_rim_and_without_targets():
    attention = tensor(rng_of(0).normal(size=(1, 1, 2, 16)), grad=True)
    corners = tensor([[[[-1.0, -1.0], [1.0, 1.0]]]])  # beyond the outermost cells' centres: those cells
    wanted = -(attention.log_softmax(-1)[0, 0, 0, 0] + attention.log_softmax(-1)[0, 0, 1, 15]) / 2
    close(bc_warmup.grounding_loss(attention, corners), wanted.item())
    none = bc_warmup.grounding_loss(attention, corners * np.nan)
    none.backward()
    assert none.item() == 0 and not attention.grad.any()


def test_colours_vary_within_their_bounds_and_a_picture_alike():
    """Against a loop over the pictures."""
    images = torch.as_tensor(rng_of(0).integers(90, 160, (3, 2, 4, 4, 3)), dtype=torch.uint8)
    found = bc_warmup.jitter_colours(images, 0.2, torch.Generator().manual_seed(5))
    factors = 1 + 0.2 * (2 * torch.rand(3, 5, generator=torch.Generator().manual_seed(5)).double() - 1)
    assert found.dtype == torch.uint8 and factors.min() > 0.8 and factors.max() < 1.2
    for image, factor, it in zip(images.double(), factors, found, strict=True):
        contrast = image.mean() + factor[0] * (image - image.mean())
        saturated = torch.empty_like(image)
        for channel in range(3):
            grey = (contrast[..., 0] + contrast[..., 1] + contrast[..., 2]) / 3
            saturated[..., channel] = (grey + factor[1] * (contrast[..., channel] - grey)) * factor[
                2 + channel
            ]
        assert (it.double() - saturated).abs().max() <= 0.5 + 1e-3
    assert torch.equal(bc_warmup.jitter_colours(images, 0.0, torch.Generator()), images)
    ends = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 4, 6).view(3, 1, 4, 4, 3)
    assert {0, 255} <= set(bc_warmup.jitter_colours(ends, 1.0, torch.Generator()).unique().tolist())


def test_blank_words_are_drawn_for_each_copy():
    texts = ["lift the red cube", "put it down"]
    blank = functools.partial(bc_warmup.blank_words, texts)
    assert blank(0.0, 2, rng_of(0)) == [texts[0]] * 2 + [texts[1]] * 2
    assert blank(1.0, 1, rng_of(0)) == ["___ ___ ___ ___", "___ ___ ___"]
    found = [text.split() for text in blank(0.2, 1000, rng_of(0))]
    assert {len(words) for words in found[:1000]} == {4} and {len(words) for words in found[1000:]} == {3}
    for text, copies in zip(texts, (found[:1000], found[1000:]), strict=True):
        for place, word in enumerate(text.split()):
            kept = np.mean([words[place] == word for words in copies])
            assert kept == pytest.approx(0.8, abs=0.05)
            assert {words[place] for words in copies} == {word, "___"}


def test_learning_rate_schedule():
    args = SimpleNamespace(grounding_steps=100, gradient_steps=1000, warmup_steps=20, learning_rate=0.5)
    at = [bc_warmup.learning_rate_at(step, args) for step in range(1101)]
    close(at[:20], [0.5 * (i + 1) / 20 for i in range(20)])
    close(at[20:100], [0.5] * 80)
    close(at[100:120], [0.25 * (1 + math.cos(math.pi * i / 1000)) * (i + 1) / 20 for i in range(20)])
    close(at[120:], [0.25 * (1 + math.cos(math.pi * i / 1000)) for i in range(20, 1001)])
    close(at[600], 0.25)
    assert at[1100] < 1e-12 and min(at) >= 0
