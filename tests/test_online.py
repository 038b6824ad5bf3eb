"""Data and environment together: sac.py --prior-data (RLPD), iql.py and td3_bc.py --online-steps."""

import signal

import gymnasium
import numpy as np
import pytest
import torch
from test_cli import assert_same_run, call, one_thread, results, run, scalars, stopped_by  # noqa: F401
from test_offline_cli import SMALL, compare_compiled, home  # noqa: F401 (one is a fixture)
from test_offline_math import (  # noqa: F401
    OFFLINE,
    A,
    B,
    Reference,
    assert_same_weights,
    close,
    gelu,
    in_double,
    net,
    randn,
    squash,
)

import common.replay
import iql
import sac
import td3_bc
from common.checkpoint import load_checkpoint
from common.datasets import load_dataset, reward_units, save_d4rl, transition_rows
from common.run import read_flags


class Walk(gymnasium.Env):
    """Observes noise; the third step of each even episode is its end, of each odd one a time-out."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (A,), np.float32)
    metadata, episodes = {"render_modes": ["rgb_array"]}, -1

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.left = self.episodes + 1, 3
        return self.np_random.normal(size=4).astype(np.float32), {}

    def step(self, action):
        self.left -= 1
        ends = [self.left == 0 and self.episodes % 2 == kind for kind in (0, 1)]
        return self.np_random.normal(size=4).astype(np.float32), float(action.sum()), *ends, {}


gymnasium.register("Walk-v0", entry_point=Walk)
RLPD = """--env Pendulum-v1 --total-timesteps 60 --learning-starts 40 --eval-freq 25 --save-freq 20
    --critics 4 --utd-ratio 3 --max-episode-steps 25"""


@pytest.fixture(scope="module")
def whole(home):  # noqa: F811
    flags = f"{SMALL} {RLPD} --prior-data {home}/pendulum.hdf5"
    run(sac, flags, f"--output-dir {home} --run-name rlpd --save-dataset {home}/replay.hdf5")
    return flags, home / "rlpd"


# --- the ensemble


def ensemble(w, name, obs, action, rows=None):
    """[Q_1 (B,), ..., Q_N (B,)], layer norm before each ReLU, one network after another."""
    found, depth = [], sum(key.startswith(f"{name}.weights") for key in w)
    for k in range(len(w[f"{name}.weights.0"])) if rows is None else rows:
        x = torch.cat([obs, action], 1)
        for layer in range(depth):
            x = x @ w[f"{name}.weights.{layer}"][k] + w[f"{name}.biases.{layer}"][k]
            if layer + 1 < depth and f"{name}.scales.{layer}" in w:
                x = x - x.mean(1, keepdim=True)
                x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
                x = x * w[f"{name}.scales.{layer}"][k] + w[f"{name}.shifts.{layer}"][k]
            x = x * (x > 0) if layer + 1 < depth else x
        found.append(x[:, 0])
    return found


@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_ensemble_against_one_network_after_another(layer_norm):
    torch.manual_seed(0)
    args = sac.Args(width=8, depth=3, critics=4, layer_norm=layer_norm)
    critic, obs, action = sac.Critics(4, A, args).double(), randn(B, 4), randn(B, A, seed=1)
    for name, p in critic.named_parameters():
        if "s.weight" not in name:
            p.data += 0.3 * torch.randn_like(p)
    w = {f"critic.{name}": p for name, p in critic.named_parameters()}
    assert any("scales" in name for name in w) == layer_norm
    wanted = torch.stack(ensemble(w, "critic", obs, action))
    close(critic(obs, action), wanted.detach())
    chosen = torch.tensor([3, 1])
    close(critic(obs, action, chosen), wanted[chosen].detach())
    slopes = [torch.autograd.grad(x.square().sum(), [*w.values()]) for x in (critic(obs, action), wanted)]
    for found, by_hand in zip(*slopes, strict=True):
        close(found, by_hand)


# --- batches


def test_a_mixed_batch():
    """The share of the prior data, rounded; each row of either equally likely."""
    prior, new = torch.arange(5.0)[:, None], 10 + torch.arange(3.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    for size, share, count in ((8, 0.5, 4), (7, 0.5, 4), (6, 0.0, 0), (6, 1.0, 6), (10, 0.25, 2)):
        batch = sac.mixed_batch(prior, new, size, share, generator)
        assert batch.shape == (size, 1) and (batch < 10).sum() == count, (size, share)
    batch = sac.mixed_batch(prior, new, 30_000, 0.5, generator)[:, 0].long()
    assert (batch[batch < 10].bincount() - 3000).abs().max() < 250
    assert ((batch[batch >= 10] - 10).bincount() - 5000).abs().max() < 300


def test_a_data_set_as_rows_of_the_replay(home, whole):  # noqa: F811
    """What sac.py has written to a file comes back as the rows that it was: the replay's 60."""
    dataset = load_dataset(home / "replay.hdf5")
    rows = transition_rows(dataset, (np.array([-2.0]), np.array([2.0])))
    saved = load_checkpoint(whole[1])["replay"][:, 0]
    assert rows.shape == saved.shape == (60, 2 * 3 + 4) and rows.dtype == torch.float32
    assert saved[:, 6].sum() == 2  # time-outs, which no update asks for
    saved[:, 6] = 0
    torch.testing.assert_close(rows, saved)  # and no row of the prior data is in the file


# --- whole updates


def rlpd_update(r, rows, noise, chosen, turn, args):
    """arXiv:2302.02948, algorithm 1, one network and one row of its equations at a time."""
    size = (rows.shape[1] - 4) // 2
    obs, action, reward, end, _, next_obs = rows.double().split([size, 1, 1, 1, 1, size], 1)
    w, alpha = r.w, r.w["log_alpha"].exp().item()
    next_action, next_density = squash(w, next_obs, noise[0])
    value = torch.stack(ensemble(w, "target_critic", next_obs, next_action, chosen)).min(0).values
    value = value - alpha * next_density if args.backup_entropy else value
    target = (reward[:, 0] + 0.97 * (1 - end[:, 0]) * value).detach()
    loss = sum(((q - target) ** 2).mean() for q in ensemble(w, "critic", obs, action))
    r.step(r.gradients(loss, "critic"), 2e-3)
    if turn:
        new_action, density = squash(w, obs, noise[1])
        loss = (alpha * density - sum(ensemble(w, "critic", obs, new_action)) / args.critics).mean()
        gradients = r.gradients(loss, "actor")
        gap = (density.mean() - 0.5 * action.shape[1]).item()  # the target entropy is -A / 2
        r.step({"log_alpha": torch.tensor(-alpha * gap)}, 2e-3)
        r.step(gradients, 1e-3)
    r.follow(0.1, "critic")


@pytest.mark.parametrize("more", ["", "--no-backup-entropy --offline-ratio 0.3 --policy-delay 2"])
def test_rlpd_updates_against_a_reference(tmp_path, in_double, more):  # noqa: F811
    """Three environment steps with two updates each, one of them the policy's, in float64. Aim's episodes
    terminate, in the file and in the replay."""
    rng, size = np.random.default_rng(0), 2
    rows = [rng.normal(size=(9, size)), rng.uniform(-2, 2, (9, 1)), rng.normal(size=9)]
    save_d4rl(tmp_path / "made.hdf5", *rows, rng.normal(size=(9, size)), np.arange(9) % 3 == 2, np.zeros(9))
    flags = f"--env Aim-v0 --seed 5 --learning-starts 20 --total-timesteps 23 --critics 4 {more}"
    flags += f" --prior-data {tmp_path}/made.hdf5 --utd-ratio 2 --buffer-size 100"
    agent, _ = in_double(sac, flags, tmp_path)
    args = sac.Args(critics=4, backup_entropy="no-backup" not in more)
    prior = transition_rows(load_dataset(tmp_path / "made.hdf5"), (np.array([-2.0]), np.array([2.0])))
    close(prior[:, size], rows[1][:, 0] / 2, 1e-6)
    reference, count = Reference(agent.first), 2 if "0.3" in more else 4  # of 7, 3.5 rounded to even
    saved, ends = load_checkpoint(tmp_path / "r")["replay"][:, 0], 0
    generator = torch.Generator().manual_seed(5)
    for step in range(23):
        if step < 20:
            torch.rand(1, 1, generator=generator)
            continue
        torch.randn(1, 1, generator=generator)
        for turn in (False, True):
            old = prior[torch.randint(9, (count,), generator=generator)]
            new = saved[torch.randint(step + 1, (7 - count,), generator=generator)]
            noise = torch.randn(1 + turn, 7, 1, generator=generator)
            chosen = torch.randperm(4, generator=generator)[:2].tolist()
            rlpd_update(reference, torch.cat([old, new]), noise, chosen, turn, args)
            ends += old[:, -size - 2].sum() * new[:, -size - 2].sum()
    assert ends > 0
    assert_same_weights(agent.state_dict(), reference.w)
    moved = {key for key, x in agent.state_dict().items() if not torch.equal(x, agent.first[key])}
    assert moved == agent.first.keys()


# --- through the command line


def flags_of(*words):
    return read_flags([*words], sac.Args, sac.PRESETS, "sac")[0]


def test_prior_data_brings_the_published_defaults(whole):
    """Which the command line, a world's preset and a checkpoint's networks beat; without it none changes."""
    plain, args = flags_of(), flags_of("--prior-data", "x.hdf5")
    published = dict(utd_ratio=20, policy_delay=0, critics=10, target_critics=2, policy_q="mean")
    published |= dict(layer_norm=True, learning_rate=3e-4, critic_learning_rate=3e-4, action_entropy=-0.5)
    published |= dict(offline_ratio=0.5, batch_size=256, backup_entropy=True, learning_starts=5000)
    assert {name: getattr(args, name) for name in published} == published
    ordinary = dict(utd_ratio=1, policy_delay=1, critics=2, policy_q="min", layer_norm=False)
    assert {name: getattr(plain, name) for name in ordinary} == ordinary
    args = flags_of("--prior-data", "x.hdf5", "--utd-ratio", "1", "--no-layer-norm")
    assert (args.utd_ratio, args.layer_norm, args.critics) == (1, False, 10)
    args = flags_of("--prior-data", "x.hdf5", "--checkpoint", str(whole[1]))
    assert (args.critics, args.width, args.utd_ratio) == (4, 16, 20)
    args = flags_of("--prior-data", "x.hdf5", "--env", "robosuite")  # whose preset says it more closely
    assert (args.critics, args.utd_ratio, args.alpha, args.layer_norm) == (2, 1, 0.01, True)


def test_an_evaluation_of_an_ensemble_needs_no_flag(tmp_path, whole):
    run(sac, f"--evaluate --checkpoint {whole[1]} --device cpu --eval-episodes 2 --seed 3",
        f"--output-dir {tmp_path} --run-name e")  # fmt: skip
    assert results(tmp_path / "e")["final"] == results(whole[1])["final"]
    assert results(tmp_path / "e")["args"]["layer_norm"]


def test_what_a_run_counts_and_logs(whole):
    found, events = results(whole[1]), scalars(whole[1])
    assert (found["environment_steps"], found["gradient_steps"]) == (60, 60)
    assert [step for step, _ in events["eval/mean_reward"]] == [0, 25, 50, 60]
    assert {"loss/critic", "value/q", "policy/alpha"} <= events.keys()


@pytest.mark.parametrize("at", [7, 45])
def test_a_signal_within_an_update(tmp_path, whole, monkeypatch, at):
    flags, folder = whole
    stopped_by(monkeypatch, sac, "td_target", at)
    done = call(sac, flags, f"--output-dir {tmp_path} --run-name r")
    monkeypatch.undo()
    assert done.code == 128 + signal.SIGINT and not done.err, done
    run(sac, f"--resume {tmp_path}/r")
    assert_same_run(tmp_path / "r", folder)


def test_an_update_is_traced_whole(tmp_path, home, graphs):  # noqa: F811
    """A graph for the critics' turn and one for the policy's."""
    more = f"--prior-data {home}/pendulum.hdf5 --utd-ratio 2 --policy-delay 2 --critics 3"
    compare_compiled(tmp_path, home, sac, more)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--offline-ratio 0.5", "--offline-ratio does nothing without --prior-data; drop it."),
        ("--prior-data DATA --offline-ratio 1.5", "--offline-ratio must be in [0, 1], not 1.5."),
        ("--prior-data DATA --target-critics 11", "--target-critics 11 are more than --critics 10."),
        ("--prior-data nowhere.hdf5", "nowhere.hdf5 is not a file"),
        ("--prior-data DATA --env Hopper-v5", "has 3 observations and 1 actions, Hopper-v5 11 and 3"),
        ("--prior-data DATA --critics 3 --checkpoint RUN", "--critics 3 is not what the checkpoint has: 4"),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, home, whole, flags, said):  # noqa: F811
    flags = flags.replace("DATA", f"{home}/pendulum.hdf5").replace("RUN", str(whole[1]))
    env = "" if "--env" in flags else "--env Pendulum-v1"
    done = call(sac, f"--device cpu --total-timesteps 9 --output-dir {tmp_path}/runs {env}", flags)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
    assert not (tmp_path / "runs").exists()


# --- offline to online

ONLINE = f"{SMALL} --total-timesteps 30 --online-steps 30 --eval-freq 25 --save-freq 20"
ONLINE += " --env Pendulum-v1 --max-episode-steps 20"
LEARNERS = (iql, td3_bc)


@pytest.fixture(scope="module", params=LEARNERS, ids=lambda script: script.__name__)
def learned(request, home):  # noqa: F811
    """A run -> script, flags, folder. Pendulum's state can be saved."""
    flags = f"{ONLINE} --dataset {home}/pendulum.hdf5"
    run(request.param, flags, f"--output-dir {home} --run-name on_{request.param.__name__}")
    return request.param, flags, home / f"on_{request.param.__name__}"


def test_results_of_both_parts(learned, home, tmp_path):  # noqa: F811
    """The first is what a run without the second is, bit by bit."""
    script, flags, folder = learned
    found, events = results(folder), scalars(folder)
    assert (found["environment_steps"], found["gradient_steps"]) == (30, 60)
    assert [step for step, _ in events["eval/mean_reward"]] == [0, 25, 30, 50, 60]
    assert found["offline"]["mean_reward"] == pytest.approx(events["eval/mean_reward"][2][1])
    assert found["final"]["mean_reward"] == pytest.approx(events["eval/mean_reward"][-1][1])
    run(script, flags, f"--output-dir {tmp_path} --run-name alone --online-steps 0")
    alone, best = results(tmp_path / "alone"), max(x for _, x in events["eval/mean_reward"])
    assert "offline" not in alone and alone["final"] == found["offline"]
    assert found["best"]["mean_reward"] == pytest.approx(best)
    saved = load_checkpoint(folder)
    assert saved["replay"].shape == (30, 1, 2 * 3 + 4) and saved["step"] == 60
    assert saved["agent"].keys() == load_checkpoint(tmp_path / "alone")["agent"].keys()


@pytest.mark.parametrize(
    "at", [17, 30, 31, 44]
)  # amid the data, in the last update of it, the first and later
def test_both_parts_go_on_bit_identically(tmp_path, learned, monkeypatch, at):
    script, flags, folder = learned
    stopped_by(monkeypatch, script, "td_target", at)
    done = call(script, flags, f"--output-dir {tmp_path} --run-name r")
    monkeypatch.undo()
    assert done.code == 128 + signal.SIGINT and f"stopped at {at} updates" in done.out, done
    run(script, f"--resume {tmp_path}/r")
    assert_same_run(tmp_path / "r", folder)
    assert results(tmp_path / "r")["offline"] == results(folder)["offline"]
    run(script, f"--evaluate --checkpoint {tmp_path}/r --output-dir {tmp_path} --run-name e {SMALL}")
    assert results(tmp_path / "e")["final"] == results(folder)["final"]


def test_a_crash_after_the_data_costs_none_of_it(tmp_path, learned, monkeypatch):
    """The end of the first part is a checkpoint, whatever --save-freq."""
    script, flags, folder = learned

    def broken(*args):
        raise RuntimeError("a power cut")

    monkeypatch.setattr(common.replay, "step_envs", broken)
    with pytest.raises(RuntimeError, match="a power cut"):
        call(script, flags, f"--output-dir {tmp_path} --run-name r")
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / "r")
    assert (
        saved["step"] == 30 and len(saved["replay"]) == 0 and saved["offline"] == results(folder)["offline"]
    )
    run(script, f"--resume {tmp_path}/r")
    assert_same_run(tmp_path / "r", folder)


@pytest.mark.parametrize("name, more", [("iql", ""), ("iql-joint", "0.6"), ("td3_bc", ""), ("rebrac", "0.3")])
def test_online_updates_against_a_reference(tmp_path, in_double, name, more):  # noqa: F811
    """Four updates on the data and seven in the environment, in float64: what is done there, what a batch is
    of, and each update."""
    script, update, flags = OFFLINE[name]
    rng = np.random.default_rng(0)
    rows = [rng.normal(1, 3, size=(9, 4)), rng.uniform(-2, 2, (9, A)), rng.normal(size=9)]
    ends = np.arange(9) == 4
    save_d4rl(tmp_path / "made.hdf5", *rows, np.roll(rows[0], -1, 0), ends, np.zeros(9), env_id="Walk-v0")
    flags += f" --dataset {tmp_path}/made.hdf5 --total-timesteps 4 --online-steps 7 --reward-scale 2"
    flags += f" --reward-bias -1 {'--offline-ratio' if more else ''} {more}"
    flags += "" if script is iql else " --online-bc 0.25"
    agent, seen = in_double(script, flags, tmp_path)
    saved = load_checkpoint(tmp_path / "r")["replay"][:, 0]
    mean, std = agent.obs_mean, agent.obs_std
    assert len(seen) == 11 and mean.abs().max() > 0.5 and std.max() > 2 and len(saved) == 7
    reference, kept = Reference(seen[0][0]), []
    for step, (_, batch, generator) in enumerate(seen):
        if step >= 4:
            count = step - 3
            wanted = explored(name, reference.w, (saved[count - 1 : count, :4] - mean) / std, generator)
            close(saved[count - 1, 4 : 4 + A], wanted, 1e-6)
            index = torch.randint(count, (7,), generator=generator).tolist()
            is_old = (torch.rand(7, generator=generator) < float(more or 9 / (9 + count))).tolist()
            batch = [x.clone() for x in batch]
            for b in (b for b in range(7) if not is_old[b]):
                obs, action, reward, end, cut, next_obs = saved[index[b]].split([4, A, 1, 1, 1, 4])
                if name == "rebrac":
                    follows = index[b] + 1 < count and not (end or cut)
                    later = saved[index[b] + 1, 4 : 4 + A] if follows else torch.zeros(A)
                    action = torch.cat([action, later, torch.tensor([float(follows)])])
                values = ((obs - mean) / std, action, 2 * reward[0] - 1, (next_obs - mean) / std, end[0])
                for part, value in zip(batch, values, strict=True):
                    part[b] = value
            kept += is_old
            if name == "iql":
                reference.updates = 0  # the policy's rate is what it was at first
            reference.bc = 1 - 0.75 * count / 7  # to a quarter
        update(reference, *batch, generator)
        after = seen[step + 1][0] if step < 10 else agent.state_dict()
        assert_same_weights({key: after[key] for key in reference.w if key not in BUFFERS}, reference.w)
    assert 0.2 < np.mean(kept) < 0.9
    assert {tuple(x) for x in saved[:, 5 + A : 7 + A].tolist()} == {(0, 0), (1, 0), (0, 1)}


BUFFERS = ("obs_mean", "obs_std")


def explored(name, w, obs, generator):
    """The next action (A,) of the policy as it explores."""
    noise = torch.randn(1, A, generator=generator)
    mean = net(w, "actor", obs, *((gelu,) if name in ("iql-joint", "rebrac") else ()))
    mean = mean if name == "iql-joint" else mean.tanh()  # around which its deviation is 1
    std = {"iql": w["log_std"].exp(), "iql-joint": 1.0}[name] if "iql" in name else 0.1
    return (mean + std * noise).clamp(-1, 1)[0].detach()


def test_a_batch_is_of_both_as_if_they_were_one():
    """Whole transitions, each of the old ones with its probability."""
    generator = torch.Generator().manual_seed(0)
    old = [torch.zeros(40_000, 2), torch.zeros(40_000, 3), torch.zeros(40_000)]
    new = [x + 1 for x in old]
    for share in (0.0, 0.25, 1.0):
        for script in LEARNERS:
            found = script.mixed_batch([x.clone() for x in old], new, share, generator)
            which = found[2]
            assert abs(which.mean() - (1 - share)) < 0.01
            assert all((x == which.view(-1, *[1] * (x.dim() - 1))).all() for x in found)


def test_rows_of_a_replay_as_the_data_are(home):  # noqa: F811
    """Also where returns are scaled to span 1000."""
    args = iql.Args(reward_scale=3.0, reward_bias=-2.0)
    dataset = load_dataset(home / "aim.hdf5")
    returns = np.add.reduceat(dataset.rewards.astype(float), dataset.episode_starts)
    scale, bias = reward_units(dataset, args)
    assert scale == pytest.approx(3000 / (returns.max() - returns.min())) and bias == -2
    assert reward_units(dataset, td3_bc.Args()) == (1, 0)
    agent = iql.Agent(2, 1, iql.Args(width=4))
    agent.obs_mean[:], agent.obs_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    rows = torch.tensor([[3.0, 10, 0.5, 7, 1, 0, 5, 2], [1.0, 2, -0.5, 0, 0, 1, 1, 6]])
    obs, action, reward, next_obs, end = iql.replay_batch(rows, [2, 1, 1, 1, 1, 2], agent, 2.0, -1.0)
    assert obs.tolist() == [[1, 2], [0, 0]] and next_obs.tolist() == [[2, 0], [0, 1]]
    assert action.tolist() == [[0.5], [-0.5]] and reward.tolist() == [13, -1] and end.tolist() == [1, 0]


def test_the_next_action_of_a_replays_row():
    """None after an end, a time-out, or the newest row."""
    ends = torch.tensor([[0, 0], [1, 0], [0, 1], [0, 0], [0, 0]])
    rows = torch.cat([torch.zeros(5, 1), torch.arange(1, 6.0)[:, None] / 10, torch.zeros(5, 1), ends,
                      torch.ones(5, 1)], 1)  # fmt: skip
    found = td3_bc.with_next_row(rows, torch.tensor([4, 3, 2, 1, 0, 0]), [1, 1, 1, 1, 1, 1])
    wanted = [[0.5, 0, 0], [0.4, 0.5, 1], [0.3, 0, 0], [0.2, 0, 0], [0.1, 0.2, 1], [0.1, 0.2, 1]]
    close(found, wanted, 1e-6)


def test_exploring_drops_nothing_out():
    torch.manual_seed(0)
    agent, obs, noise = iql.Agent(4, A, iql.Args(width=64, dropout=0.5)), torch.randn(B, 4), torch.zeros(B, A)
    assert torch.equal(agent.explore(obs, noise), agent.explore(obs, noise)) and agent.training
    assert not torch.equal(agent.policy(obs)[0], agent.policy(obs)[0])


def test_an_episode_that_a_resume_cuts_is_a_time_out(tmp_path, home, monkeypatch):  # noqa: F811
    """Aim cannot be saved: its episode of 4 steps goes on from a reset."""
    flags = f"{SMALL} --total-timesteps 3 --online-steps 9 --eval-episodes 0 --dataset {home}/aim.hdf5"
    stopped_by(monkeypatch, td3_bc, "td_target", 9)  # after the sixth step in the environment
    assert call(td3_bc, flags, f"--output-dir {tmp_path} --run-name r").code == 130
    monkeypatch.undo()
    run(td3_bc, f"--resume {tmp_path}/r")
    rows = load_checkpoint(tmp_path / "r")["replay"][:, 0]
    assert rows[:, 4].nonzero().flatten().tolist() == [3] and rows[:, 5].nonzero().flatten().tolist() == [5]


def test_an_update_online_is_the_same_graph(tmp_path, home, graphs):  # noqa: F811
    compare_compiled(tmp_path, home, iql, "--online-steps 3")
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--offline-ratio 0.5", "--offline-ratio does nothing with --online-steps 0; drop it."),
        ("--online-steps 5 --offline-ratio 2", "--offline-ratio must be in [0, 1], not 2.0."),
        ("--online-steps -5", "--online-steps must not be negative, not -5."),
        ("--online-steps 5 --eval-episodes 0", "names no environment; give --env."),
        ("--online-steps 5 --env CartPole-v1", "needs states and continuous actions"),
        ("--online-steps 1000000000000000 --env Walk-v0", "this machine cannot hold it"),
    ],
)
def test_what_cannot_go_on_online_is_one_sentence(tmp_path, flags, said):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 4)), rng.uniform(-1, 1, (9, A)), rng.normal(size=9), rng.normal(size=(9, 4))
    save_d4rl(tmp_path / "nameless.hdf5", *rows, np.zeros(9), np.zeros(9))
    flags += f" --device cpu --dataset {tmp_path}/nameless.hdf5 --total-timesteps 2 --no-normalize-rewards"
    done = call(iql, flags, f"--output-dir {tmp_path}/runs")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
    assert not (tmp_path / "runs").exists()
