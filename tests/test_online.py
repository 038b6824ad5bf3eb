"""Data and environment together: sac.py --prior-data (RLPD)."""

import signal

import numpy as np
import pytest
import torch
from test_cli import assert_same_run, call, one_thread, results, run, scalars, stopped_by  # noqa: F401
from test_offline_cli import SMALL, compare_compiled, home  # noqa: F401 (one is a fixture)
from test_offline_math import A, B, Reference, assert_same_weights, close, in_double, randn, squash  # noqa: F401

import sac
from common.checkpoint import load_checkpoint
from common.datasets import load_dataset, save_d4rl, transition_rows
from common.run import read_flags

RLPD = """--env Pendulum-v1 --total-timesteps 60 --learning-starts 40 --eval-freq 25 --save-freq 20
    --critics 4 --utd-ratio 3 --policy-delay 2"""


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


@pytest.mark.parametrize("more", ["", "--no-backup-entropy --offline-ratio 0.3"])
def test_rlpd_updates_against_a_reference(tmp_path, in_double, more):  # noqa: F811
    """Three environment steps with two updates each, one of them the policy's, in float64. Aim's episodes
    terminate, in the file and in the replay."""
    rng, size = np.random.default_rng(0), 2
    rows = [rng.normal(size=(9, size)), rng.uniform(-2, 2, (9, 1)), rng.normal(size=9)]
    save_d4rl(tmp_path / "made.hdf5", *rows, rng.normal(size=(9, size)), np.arange(9) % 3 == 2, np.zeros(9))
    flags = f"--env Aim-v0 --seed 5 --learning-starts 20 --total-timesteps 23 --critics 4 {more}"
    flags += f" --prior-data {tmp_path}/made.hdf5 --utd-ratio 2 --policy-delay 2 --buffer-size 100"
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
    """Which the command line beats, and a checkpoint's networks; without it nothing changes."""
    plain, args = flags_of(), flags_of("--prior-data", "x.hdf5")
    published = dict(utd_ratio=20, policy_delay=20, critics=10, target_critics=2, policy_q="mean")
    published |= dict(layer_norm=True, learning_rate=3e-4, critic_learning_rate=3e-4, action_entropy=-0.5)
    published |= dict(offline_ratio=0.5, batch_size=256, backup_entropy=True, learning_starts=5000)
    assert {name: getattr(args, name) for name in published} == published
    ordinary = dict(utd_ratio=1, policy_delay=1, critics=2, policy_q="min", layer_norm=False)
    assert {name: getattr(plain, name) for name in ordinary} == ordinary
    args = flags_of("--prior-data", "x.hdf5", "--utd-ratio", "1", "--no-layer-norm")
    assert (args.utd_ratio, args.layer_norm, args.critics) == (1, False, 10)
    args = flags_of("--prior-data", "x.hdf5", "--checkpoint", str(whole[1]))
    assert (args.critics, args.width, args.utd_ratio) == (4, 16, 20)


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


@pytest.mark.parametrize("at", [7, 44])  # between an update of the critics alone and the policy's; later
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
