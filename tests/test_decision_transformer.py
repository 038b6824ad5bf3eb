"""Decision Transformer: its mathematics against loops, causality, sampling, evaluation, learning, resume."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import test_cli
import torch
from test_cli import assert_same_run, one_thread, results, scalars  # noqa: F401

import decision_transformer as dt
from common.checkpoint import load_checkpoint
from common.datasets import load_dataset, save_d4rl
from common.envs import make_envs
from common.run import read_flags

SMALL = """--device cpu --n-layer 2 --n-head 2 --embed-dim 8 --context-length 4 --batch-size 8
    --eval-episodes 2 --warmup-steps 5 --max-timesteps 30 --seed 3"""


def call(*flags):
    return test_cli.call(dt, *flags)


def make_agent(dtype=torch.float64, scale=10, **changes):
    """An agent in evaluation mode with weights `scale` times as large, so that all inputs matter."""
    torch.manual_seed(0)
    sizes = dict(n_layer=3, n_head=2, embed_dim=8, context_length=5, max_timesteps=12)
    agent = dt.Agent(3, 2, dt.Args(**sizes | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(scale).add_(0.1 * torch.randn_like(parameter))
    return agent


def make_batch(size=3, steps=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    returns, obs, action = (
        torch.randn(size, steps, *shape, generator=generator, dtype=dtype) for shape in ((), (3,), (2,))
    )
    return returns, obs, action, torch.arange(4, 4 + steps).expand(size, -1)


# --- the mathematics


def test_returns_to_go_against_a_loop():
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 100
    starts = torch.tensor([0, 1, 2, 17, 39])
    found = dt.returns_to_go(rewards, starts)
    assert found.dtype == torch.float64
    ends = [*starts[1:].tolist(), 40]
    for start, end in zip(starts.tolist(), ends, strict=True):
        for i in range(start, end):
            assert found[i].item() == pytest.approx(math.fsum(rewards[i:end].tolist()), abs=1e-9)


def test_returns_to_go_of_a_long_recording_keep_their_digits():
    rewards = torch.full((2_000_000,), 0.1)
    starts = torch.arange(0, 2_000_000, 1000)
    found = dt.returns_to_go(rewards, starts)
    torch.testing.assert_close(found[starts + 999], rewards[:2000].double(), rtol=1e-6, atol=0)


def test_loss_against_a_loop_and_its_gradient_is_zero_at_padding():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    action = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64)
    lengths = [5, 1, 3, 2]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
    loss = dt.action_loss(predicted, action, mask)
    total, count = 0.0, 0
    for b, length in enumerate(lengths):
        for k in range(length):
            for a in range(2):
                total += (predicted[b, k, a].item() - action[b, k, a].item()) ** 2
                count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    loss.backward()
    wanted = 2 * (predicted - action).detach() / count * mask[..., None]
    torch.testing.assert_close(predicted.grad, wanted, rtol=1e-12, atol=1e-15)
    assert (predicted.grad[mask == 0] == 0).all()


def test_dropout():
    torch.manual_seed(0)
    x = torch.full((1001, 801), 2.0, requires_grad=True)  # not a multiple of 8
    y = dt.dropout(x, 0.1)
    y.sum().backward()
    kept = y != 0
    assert y[kept].unique().tolist() == x.grad[kept].mul(2).unique().tolist() and not x.grad[~kept].any()
    share = torch.nn.functional.pad(kept.flatten().float(), (0, -kept.numel() % 8)).view(-1, 8).mean(0)
    assert (share - 230 / 256).abs().max() < 0.005  # in each byte of a word
    assert y.mean().item() == pytest.approx(2, abs=0.005)
    assert torch.equal(dt.dropout(x, 0.0), x)
    torch.manual_seed(0)
    assert torch.equal(dt.dropout(x, 0.1), y)


# --- the transformer


def reference(agent, returns, obs, action, timestep):
    """All tokens in all blocks, one query and one head at a time."""

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    def norm(layer, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    tokens = []
    for k in range(len(returns)):
        time = agent.embed_time.weight[min(int(timestep[k]), 11)]
        tokens.append(linear(agent.embed_return, returns[k].view(1)) + time)
        tokens.append(linear(agent.embed_obs, obs[k]) + time)
        tokens.append(linear(agent.embed_action, action[k]) + time)
    x = norm(agent.norm_in, torch.stack(tokens))
    for block in agent.blocks:
        y = norm(block.norm_1, x)
        q, kv = linear(block.query, y), linear(block.key_value, y)
        k, v = kv[:, :8], kv[:, 8:]
        rows = []
        for i in range(len(x)):
            heads = []
            for h in range(2):
                part = slice(4 * h, 4 * h + 4)
                scores = torch.stack([q[i, part] @ k[j, part] for j in range(i + 1)]) / 2
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * v[j, part] for j, w in enumerate(weights)))
            rows.append(torch.cat(heads))
        x = x + linear(block.merge, torch.stack(rows))
        x = x + linear(block.shrink, linear(block.expand, norm(block.norm_2, x)).clamp(min=0))
    return linear(agent.head, norm(agent.norm_out, x[1::3])).tanh()


def test_forward_against_a_loop_over_tokens():
    agent, (returns, obs, action, timestep) = make_agent(), make_batch()
    timestep = timestep + torch.tensor([[0], [3], [90]])  # beyond the table as well
    found = agent(returns, obs, action, timestep)
    for b in range(3):
        wanted = reference(agent, returns[b], obs[b], action[b], timestep[b])
        torch.testing.assert_close(found[b], wanted, rtol=1e-9, atol=1e-9)
    last = agent(returns, obs, action, timestep, last=True)
    torch.testing.assert_close(last, found[:, -1:], rtol=1e-12, atol=1e-12)


def test_an_action_depends_on_the_past_alone():
    agent, (returns, obs, action, timestep) = make_agent(), make_batch()
    inputs = [x.requires_grad_() for x in (returns, obs, action)]
    found = agent(*inputs, timestep)
    for k in range(5):
        gradients = torch.autograd.grad(found[:, k].sum(), inputs, retain_graph=True)
        for gradient, first_unseen in zip(gradients, (k + 1, k + 1, k), strict=True):  # of actions, itself
            size = gradient.abs().reshape(3, 5, -1).sum(-1)
            assert (size[:, first_unseen:] == 0).all() and (size[:, :first_unseen] > 0).all()


def test_time_steps_matter():
    agent, (returns, obs, action, timestep) = make_agent(), make_batch()
    found = agent(returns, obs, action, timestep)
    assert (agent(returns, obs, action, timestep + 1) - found).abs().max() > 1e-3


def test_padding_changes_nothing():
    """A history of 2 steps gives the same actions with padding behind it, and padding gets no gradient."""
    agent, batch = make_agent(), make_batch()
    short = agent(*(x[:, :2] for x in batch))
    returns, obs, action, timestep = batch
    padded = [x.detach().clone() for x in (returns, obs, action)]
    for x in padded:
        x[:, 2:] = 77.0
        x.requires_grad_()
    found = agent(*padded, timestep)
    torch.testing.assert_close(found[:, :2], short, rtol=1e-12, atol=1e-12)
    mask = (torch.arange(5) < 2).double().expand(3, -1)
    dt.action_loss(found, action, mask).backward()
    for x in padded:
        assert (x.grad[:, 2:] == 0).all() and (x.grad[:, 0] != 0).any()


def test_dropout_in_training_alone():
    agent, batch = make_agent(torch.float32, scale=1, dropout=0.5), make_batch(dtype=torch.float32)
    assert torch.equal(agent(*batch), agent(*batch))
    agent.train()
    assert not torch.equal(agent(*batch), agent(*batch))


def test_dropout_of_embeddings_attention_and_residuals(monkeypatch):
    agent, batch = make_agent(torch.float32, scale=1, dropout=0.5), make_batch(dtype=torch.float32)
    seen, attention, plain = [], [], dt.F.scaled_dot_product_attention

    def attend(q, k, v, visible, p, is_causal):
        attention.append(p)
        return plain(q, k, v, visible, p, is_causal=is_causal)

    monkeypatch.setattr(dt, "dropout", lambda x, p: (seen.append(p), x)[1])
    monkeypatch.setattr(dt.F, "scaled_dot_product_attention", attend)
    agent(*batch)
    assert seen == [] and attention == 3 * [0.0]
    agent.train()
    agent(*batch)
    assert seen == 7 * [0.5] and attention[3:] == 3 * [0.5]


def test_new_weights_are_small():
    agent = dt.Agent(3, 2, dt.Args())
    for name, p in agent.named_parameters():
        if "norm" not in name and "bias" not in name and p.numel() > 100:
            assert 0.015 < p.std() < 0.025, name
        assert "bias" not in name or not p.any(), name


# --- sampling


def test_pieces_stay_in_their_episodes_and_long_episodes_come_more_often():
    lengths = np.array([1, 7, 2, 30])
    starts = torch.from_numpy(np.r_[0, lengths.cumsum()])
    states, rest = torch.arange(90.0).view(45, 2), torch.arange(120.0).view(40, 3)  # 5 states without action
    generator = torch.Generator().manual_seed(0)
    obs, action, returns, timestep, mask = dt.sample_batch(states, rest, starts, 4000, 5, generator)
    assert obs.shape == (4000, 5, 2) and action.shape == (4000, 5, 2) and returns.shape == mask.shape
    counts = np.zeros(40)
    for b in range(4000):
        row = int(obs[b, 0, 0]) // 2
        counts[row] += 1
        episode = int(np.searchsorted(starts.numpy(), row, side="right")) - 1
        for k in range(5):
            inside = row + k < starts[episode + 1]
            here = min(row + k, int(starts[episode + 1]) - 1)
            assert mask[b, k] == inside and timestep[b, k] == here - starts[episode]
            assert torch.equal(obs[b, k], states[here])
            assert torch.equal(torch.cat([action[b, k], returns[b, k, None]]), rest[here])
    assert ((counts - 100) ** 2 / 100).sum() < 75  # chi squared with 39 degrees of freedom: p = 0.0005


# --- evaluation


class Echo(gymnasium.Env):
    """The observation is noise, and the reward 1 for an action of its sign; 6 to 10 steps. A seed's episode
    does not depend on the actions."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(6, 11))
        return self.observe(), {}

    def observe(self):
        self.obs = (5 + 3 * self.np_random.standard_normal(2)).astype(np.float32)
        return self.obs

    def step(self, action):
        reward = float((action[0] > 0) == (self.obs[0] > 5))
        self.left -= 1
        return self.observe(), reward, self.left == 0, False, {}


gymnasium.register("Echo-v0", entry_point=Echo, max_episode_steps=50)


class Recorder(torch.nn.Module):
    """An agent that acts at random and notes what it is shown."""

    def __init__(self):
        super().__init__()
        self.obs_mean, self.obs_std, self.head = torch.zeros(2), torch.ones(2), torch.nn.Linear(1, 1)
        self.seen, self.generator = [], torch.Generator().manual_seed(0)

    def forward(self, returns, obs, action, timestep, last):
        assert not self.training and last
        chosen = torch.rand(len(obs), 1, 1, generator=self.generator) * 2 - 1
        self.seen.append((torch.cat([returns[..., None], obs, action], -1), timestep, chosen[:, 0]))
        return chosen


def test_evaluation_shows_the_return_still_to_go():
    args = dt.Args(env="Echo-v0", context_length=3, return_scale=4.0, eval_episodes=4, seed=0)
    targets, agent = (7.0, -2.5), Recorder()
    envs, here = make_envs(args, "eval", 8, states=True), SimpleNamespace(device="cpu", videos=None)
    found = dt.evaluate_targets(agent, envs, args, here, (0.0, 8.0), targets)
    assert agent.training
    for step, (_, timestep, _) in enumerate(agent.seen):
        assert (timestep == torch.arange(max(step - 2, 0), step + 1)).all()
    returns = []
    for n in range(8):  # each environment again, alone, with the actions it got
        env, history, total = Echo(), [], 0.0
        obs, _ = env.reset(seed=n % 4)
        lengths = [Echo() for _ in range(8)]
        for k, other in enumerate(lengths):
            other.reset(seed=k % 4)
        lengths = [other.left for other in lengths]
        for step in range(lengths[n]):
            context, _, action = agent.seen[step]
            row = sum(length > step for length in lengths[:n])  # of those that still run
            history = [*history, np.r_[(targets[n // 4] - total) / 4.0, obs, 0.0]][-3:]
            assert context.shape[1] == len(history) == min(step + 1, 3)
            np.testing.assert_allclose(context[row].numpy(), history, rtol=1e-6)
            history[-1][-1] = action[row]
            obs, reward, terminated, _, _ = env.step(2 * action[row].numpy())
            total += reward
        assert terminated
        returns.append(total)
    assert len(set(lengths)) > 1 and len(agent.seen) == max(lengths)
    means = {"7": np.mean(returns[:4]), "-2.5": np.mean(returns[4:])}
    assert found["mean_reward"] == max(means.values()) and found["episodes"] == 4
    assert {key: each["mean_reward"] for key, each in found["per_target"].items()} == means
    assert found["target_return"] == (7.0 if means["7"] >= means["-2.5"] else -2.5)
    assert found["normalized_score"] == pytest.approx(100 * found["mean_reward"] / 8)
    assert dt.evaluate_targets(agent, None, args, here, (0.0, 8.0), targets) == {"episodes": 0}


def test_acting_normalises_and_counts_time_steps():
    """Eight steps of two episodes, of which the policy sees five."""
    agent, args = make_agent(torch.float32, scale=3), dt.Args(context_length=5, return_scale=4.0)
    agent.obs_mean[:], agent.obs_std[:] = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 8])
    prompted, obs = dt.Prompted(agent, np.array([9.0, 5.0]), args, "cpu"), make_batch(2, 8, torch.float32)[1]
    earned, acted = np.arange(16.0).reshape(8, 2) / 3, []
    for step in range(8):
        turn = dict(rows=np.arange(2), returns=earned[step])
        shown = obs[:, step] * agent.obs_std + agent.obs_mean
        with torch.no_grad():
            action, values = prompted.act({"proprio": shown.numpy()}, turn)
        assert action.shape == (2, 1, 2) and values is None
        acted.append(torch.from_numpy(action[:, 0]))
        seen = slice(max(step - 4, 0), step + 1)
        returns = torch.tensor(([9.0, 5.0] - earned[seen]).T / 4, dtype=torch.float32)
        history = torch.stack([*acted[seen.start : -1], torch.zeros(2, 2)], 1)
        timestep = torch.arange(seen.start, seen.stop).expand(2, -1)
        wanted = agent(returns, obs[:, seen], history, timestep)[:, -1]
        torch.testing.assert_close(acted[-1], wanted.detach(), rtol=1e-4, atol=1e-5)


# --- through the command line


def write_echo(path, episodes=60):
    """Half of the episodes act right and half wrong, in the environment's own units."""
    rng, env, rows = np.random.default_rng(0), Echo(), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=1000 + episode)
        sign, terminated = 1 if episode % 2 else -1, False
        while not terminated:
            action = np.float32([sign * np.sign(obs[0] - 5) * rng.uniform(1, 2)])
            after, reward, terminated, _, _ = env.step(action)
            rows.append((obs, action, reward, after, terminated, False))
            obs = after
    save_d4rl(path, *(np.array(column) for column in zip(*rows, strict=True)), env_id="Echo-v0")
    return path


def write_pendulum(path):
    """Random numbers of Pendulum's sizes."""
    rng = np.random.default_rng(0)
    ends = np.arange(300) % 60 == 59
    walks = rng.normal(size=(5, 61, 3))
    obs, after = walks[:, :-1].reshape(300, 3), walks[:, 1:].reshape(300, 3)
    action = rng.uniform(-2, 2, (300, 1))
    save_d4rl(path, obs, action, -rng.random(300), after, ends, np.zeros(300), "Pendulum-v1")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dt")
    write_echo(folder / "echo.hdf5")
    write_pendulum(folder / "pendulum.hdf5")
    return folder


def test_data_in_the_policys_units(home):
    dataset = load_dataset(home / "echo.hdf5")
    returns = dt.returns_to_go(torch.from_numpy(dataset.rewards), torch.from_numpy(dataset.episode_starts))
    states, rest, starts = dt.episode_tensors(
        dataset, (np.array([-2.0]), np.array([2.0])), dt.Args(return_scale=5.0), "cpu"
    )
    assert np.array_equal(states, dataset.states) and rest.dtype == torch.float32
    np.testing.assert_allclose(rest[:, :1], dataset.actions / 2, rtol=1e-6)
    np.testing.assert_allclose(rest[:, 1], returns / 5, rtol=1e-6)
    assert starts.tolist() == [*dataset.episode_starts.tolist(), len(dataset.actions)]
    rest = dt.episode_tensors(dataset, (np.array([-1.0]), np.array([1.0])), dt.Args(), "cpu")[1]
    np.testing.assert_allclose(rest[:, :1], np.sign(dataset.actions))  # outside the bounds: clipped


def test_learning_to_reach_the_return_that_is_asked_for(home):
    """High for a high target and low for a low one: a flipped sign of the loss or of the return would not."""
    flags = f"""--dataset {home}/echo.hdf5 --output-dir {home} --run-name learned --target-returns 8 0
        --total-timesteps 250 --learning-rate 3e-3 --return-scale 8 --embed-dim 32 --n-layer 2
        --context-length 4 --batch-size 32 --warmup-steps 20 --eval-episodes 10 --device cpu"""
    done = call(flags)
    assert (done.code, done.err) == (0, ""), done
    found = results(home / "learned")
    high, low = (found["final"]["per_target"][target] for target in ("8", "0"))
    assert high["mean_reward"] > 0.85 * high["mean_length"] and low["mean_reward"] < 0.15 * low["mean_length"]
    assert found["final"]["target_return"] == 8 and found["final"]["mean_reward"] == high["mean_reward"]
    names = {"loss/policy", "optim/grad_norm", "eval/mean_reward", "eval/mean_length"}
    names |= {"time/updates_per_second", "eval/mean_reward_of_8", "eval/mean_reward_of_0"}
    assert set(scalars(home / "learned")) == names

    flags = flags.replace("--run-name learned", "--run-name again")
    done = call(flags, f"--evaluate --checkpoint {home}/learned")
    assert done.code == 0 and results(home / "again")["final"] == found["final"], done


@pytest.fixture(scope="module")
def whole(home):
    flags = f"{SMALL} --dataset {home}/pendulum.hdf5 --output-dir {home} --total-timesteps 60 --eval-freq 25"
    done = call(flags, "--save-freq 10 --run-name whole")
    assert (done.code, done.err) == (0, ""), done
    return flags, home / "whole"


def test_results_and_learning_rate_of_a_run(home, whole):
    found, saved = results(whole[1]), load_checkpoint(whole[1])
    assert found["gradient_steps"] == 60 and found["environment_steps"] == 0
    assert set(found["final"]) == {"episodes", "mean_reward", "mean_length", "target_return", "per_target"}
    dataset = load_dataset(home / "pendulum.hdf5")
    np.testing.assert_allclose(saved["agent"]["obs_mean"], dataset.observations.mean(0), atol=1e-6)
    np.testing.assert_allclose(saved["agent"]["obs_std"], dataset.observations.std(0) + 1e-6, rtol=1e-5)
    returns = dataset.rewards.reshape(5, 60).sum(1, dtype=np.float64)
    assert found["final"]["target_return"] == pytest.approx(returns.max())  # no preset
    assert saved["optimizers"]["actor"]["param_groups"][0]["lr"] == pytest.approx(1e-4)
    assert load_checkpoint(whole[1] / "best.pt")["script"] == "decision_transformer"


def test_warm_up(home, whole):
    done = call(whole[0], "--run-name warmup --total-timesteps 3 --eval-episodes 0")
    assert done.code == 0, done
    group = load_checkpoint(home / "warmup")["optimizers"]["actor"]["param_groups"][0]
    assert group["lr"].item() == pytest.approx(1e-4 * 3 / 5) and group["weight_decay"] == 1e-4


def test_updates_against_a_reference(tmp_path, home, monkeypatch):
    """Three updates in float64: masked error, clipped gradient, AdamW with decay and warm-up."""
    agents, seen, episode_tensors, sample_batch = [], [], dt.episode_tensors, dt.sample_batch

    class Agent(dt.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append(self)

    def sample(*args):
        batch = sample_batch(*args)
        seen.append((copy.deepcopy(agents[0]), batch))
        return batch

    monkeypatch.setattr(dt, "Agent", Agent)
    monkeypatch.setattr(dt, "episode_tensors", lambda *args: [
        x.double() if x.is_floating_point() else x for x in episode_tensors(*args)])  # fmt: skip
    monkeypatch.setattr(dt, "sample_batch", sample)
    torch.set_default_dtype(torch.float64)
    try:
        flags = """--eval-episodes 0 --total-timesteps 3 --context-length 40 --dropout 0 --max-timesteps 60
            --learning-rate 1e-2 --warmup-steps 2 --weight-decay 0.1 --max-grad-norm 0.02"""
        done = call(SMALL, f"--dataset {home}/pendulum.hdf5 --output-dir {tmp_path} --run-name r", flags)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (done.code, done.err) == (0, ""), done
    moments, known = {}, torch.tensor(load_dataset(home / "pendulum.hdf5").actions[:, 0] / 2)
    for t, ((agent, batch), (after, _)) in enumerate(zip(seen, [*seen[1:], (agents[0], 0)], strict=True), 1):
        obs, action, returns, timestep, mask = batch
        assert 0 < mask.sum() < mask.numel()
        assert (action - known).abs().amin(-1).max() < 1e-6  # in the policy's units
        found = agent(returns, obs, action, timestep)
        (found - action)[mask > 0].square().mean().backward()
        gradients = {name: p.grad for name, p in agent.named_parameters()}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert norm > 0.02
        lr = 1e-2 * min(1, t / 2)
        for name, p in agent.named_parameters():
            m, v = moments.get(name, (0.0, 0.0))
            g = gradients[name] * 0.02 / (norm + 1e-6)
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            move = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            wanted = p * (1 - lr * 0.1) - lr * move
            torch.testing.assert_close(after.get_parameter(name), wanted, rtol=1e-7, atol=1e-9, msg=name)


def test_a_stopped_process_goes_on_bit_identically(tmp_path, whole):
    flags, wanted = whole
    flags = f"{flags} --save-freq 10 --output-dir {tmp_path} --run-name stopped".split()
    process = subprocess.Popen(
        [sys.executable, dt.__file__, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    limit = time.monotonic() + 200
    while not (tmp_path / "stopped/checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f"go on with: python {dt.__file__} --resume" in said
    assert load_checkpoint(tmp_path / "stopped")["step"] < 60
    done = call(f"--resume {tmp_path}/stopped")
    assert (done.code, done.err) == (0, ""), done
    assert_same_run(tmp_path / "stopped", wanted)


@pytest.mark.parametrize("flags", ["", "--bf16"])
def test_a_signal_within_an_update(tmp_path, whole, monkeypatch, flags):
    flags = f"{whole[0]} {flags} --target-returns 0 -500 --eval-freq 0 --output-dir {tmp_path}"
    assert call(flags, "--run-name whole").code == 0
    function, calls = dt.sample_batch, []

    def patched(*args):
        calls.append(1)
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(dt, "sample_batch", patched)
    done = call(flags, "--run-name stopped")
    assert done.code == 128 + signal.SIGTERM and "stopped at 17 updates" in done.out, done
    monkeypatch.undo()
    assert call(f"--resume {tmp_path}/stopped").code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def compare_compiled(tmp_path, flags):
    for name in ("eager", "compile"):
        given = f"{flags} --dropout 0 --eval-episodes 0 --total-timesteps 3 --output-dir {tmp_path}"
        assert call(given, f"--run-name {name}", "--compile" if name == "compile" else "").code == 0
    a, b = (load_checkpoint(tmp_path / name)["agent"] for name in ("eager", "compile"))
    for key, x in a.items():
        torch.testing.assert_close(x, b[key], rtol=1e-3, atol=1e-5)


def test_an_update_is_traced_whole(tmp_path, whole, graphs):
    compare_compiled(tmp_path, whole[0])
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_updates_are_the_same(tmp_path, whole):
    compare_compiled(tmp_path, whole[0])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset nowhere.hdf5", "nowhere.hdf5 is not a file"),
        ("--n-head 3", "--embed-dim 8 must be a multiple of --n-head 3"),
        ("--context-length 0", "--context-length must be positive"),
        ("--dropout 1.5", "--dropout must be in [0, 1]"),
        ("--return-scale 0", "--return-scale must be positive"),
        ("--target-returns 3 nan", "--target-returns must be a finite number, not nan"),
        ("--env CartPole-v1", "needs states and continuous actions"),
        ("--env Hopper-v5", "give another --env"),
        ("--dataset WIDE --eval-episodes 0", "has actions outside [-1, 1]; give --env"),
        ("--evaluate", "--evaluate needs --checkpoint"),
        (
            "--checkpoint WHOLE --embed-dim 16",
            "is not what the checkpoint has: 8 is part of it; drop the flag",
        ),
        ("--checkpoint WHOLE --dataset WIDE --env Pendulum-v1", "has 1 observations and 1 actions, Pendulum"),
        ("--checkpoint WHOLE/best.pt.txt", "does not exist"),
    ],
)
def test_wrong_input_ends_in_one_sentence(home, tmp_path, whole, flags, words):
    if "WIDE" in flags:
        one = np.ones((2, 1))
        save_d4rl(home / "WIDE", one, 2 * one, one, one, one, 0 * one)
    flags = flags.replace("WHOLE", str(whole[1])).replace("WIDE", str(home / "WIDE"))
    done = call(whole[0], "--output-dir", tmp_path, flags)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done
    assert done.err.startswith("error: ") and not list(tmp_path.iterdir())


def test_resume_refuses_changed_flags(whole):
    done = call(f"--resume {whole[1]} --target-returns 5 --n-layer 3")
    assert done.code == 2 and "drop --n-layer, --target-returns, or" in done.err, done


def test_a_loss_that_is_not_finite_stops_the_run(home, whole):
    done = call(whole[0], "--run-name diverged --learning-rate 1e38 --eval-episodes 0 --save-freq 1000")
    assert done.code == 2 and "update 25: a number is not finite" in done.err, done
    assert f"{home}/diverged/checkpoint.pt is the last good state" in done.err and done.err.count("\n") == 1
    assert load_checkpoint(home / "diverged")["step"] == 0


def test_presets():
    for name, targets in {
        "hopper-medium-v2": (3600.0, 1800.0),
        "data/walker2d-x.hdf5": (5000.0, 2500.0),
    }.items():
        args, saved = read_flags(["--dataset", name], dt.Args, dt.PRESETS, "decision_transformer")
        assert saved is None
        assert args.target_returns == targets and args.return_scale == 1000
