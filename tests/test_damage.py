"""Damaged checkpoints: whatever is missing, of another type or shape, or flipped, ends in one sentence."""

import contextlib
import copy
import random
import sys

import pytest
import torch
from test_cli import BC, PPO, call, one_thread, run, stopped_by  # noqa: F401
from test_decision_transformer import write_pendulum
from test_offline_cli import OFFLINE, SAC, SMALL

import bc_warmup
import grpo_vla
import iql
import ppo_vla
import sac
from common import UserError
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.run import Run, read_flags

SCRIPTS = (bc_warmup, ppo_vla, iql, sac)
OTHERS = (None, "text", 7, [], {"x": 1}, torch.ones(2))
FLAGS = {"args", "format", "script", "version", "global_cuda"}
FINE = {("seconds", "7"), ("step", "7"), ("recent", "[]")}  # as good as what was there


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """-> {script: what its checkpoint holds}, of runs that are almost over."""
    home = tmp_path_factory.mktemp("damage")
    write_pendulum(home / "pendulum.hdf5")
    flags = {
        bc_warmup: (
            BC,
            "--eval-episodes 1 --eval-envs 1 --num-demos 2 --grounding-steps 1 --gradient-steps 2",
        ),
        ppo_vla: (PPO, "--eval-episodes 1 --eval-envs 1 --total-timesteps 30 --kl-coef 0.1"),
        iql: (SMALL, OFFLINE, f"--dataset {home}/pendulum.hdf5 --total-timesteps 2 --eval-episodes 1"),
        sac: (SMALL, SAC, "--total-timesteps 310 --eval-episodes 1"),
    }
    for script in SCRIPTS:
        run(script, *flags[script], f"--output-dir {home} --run-name {script.__name__}")
    return {script: load_checkpoint(home / script.__name__) for script in SCRIPTS}


def refused(script, folder, state):
    """Writes `state`, resumes it -> None if that ended in exit code 2 and one sentence, else what it did."""
    save_checkpoint(folder / "checkpoint.pt", script.__name__, state)
    done = call(script, "--resume", folder)
    return None if done.code == 2 and done.err.count("\n") == 1 and done.err.endswith(".\n") else done


def changes(state):
    """-> copies of a dict, each without a key or with something else in its place, and what was done."""
    for key in sorted(state.keys() - FLAGS):
        yield key, "gone", {k: x for k, x in state.items() if k != key}
        for other in OTHERS:
            if (key, str(other)) not in FINE:
                yield key, other, state | {key: other}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_content_that_is_missing_or_of_another_type(tmp_path, stored, script):
    state, accepted = stored[script], []
    for key, what, changed in changes(state):
        if done := refused(script, tmp_path, changed):
            accepted.append((key, what, done))
    own = state["processes"][0]
    for part in ("rng", "state"):
        for key, what, changed in changes(own[part]):
            if done := refused(script, tmp_path, state | {"processes": [own | {part: changed}]}):
                accepted.append((part, key, what, done))
    assert not accepted


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_arguments_that_do_not_fit_the_script(tmp_path, stored, script):
    state, accepted = stored[script], []
    args = state["args"]
    cases = [None, "text", 7, [], {}, [1, 2], torch.ones(2), args | {"unknown": 1}]
    cases += [{k: x for k, x in args.items() if k != key} for key in args]
    cases += [args | {key: other} for key in args for other in ({"x": 1}, torch.ones(2))]
    save_checkpoint(tmp_path / "checkpoint.pt", script.__name__, state)
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:  # a file each would take a minute
            patch.setattr("common.run.load_checkpoint", lambda _, case=case: state | {"args": case})
            done = call(script, "--resume", tmp_path)
            if done.code != 2 or done.err.count("\n") != 1 or not done.err.endswith(".\n"):
                accepted.append((case, done))
            # what a sister does not have has its default
            with contextlib.suppress(UserError, CheckpointError):
                read_flags(["--checkpoint", str(tmp_path)], script.Args, script.PRESETS, script.__name__)
    assert not accepted


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("part", ["agent", "optimizer"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, stored, script, part, number):
    state = copy.deepcopy(stored[script])
    moments = state.get("optimizer") or next(iter(state.get("optimizers").values()))
    weights = state["agent"] if part == "agent" else next(iter(moments["state"].values()))
    next(x for x in weights.values() if x.ndim).view(-1)[-1] = float(number)
    assert refused(script, tmp_path, state) is None
    with pytest.raises(CheckpointError, match="not finite"):
        load_checkpoint(tmp_path)


def test_weights_and_moments_of_other_shapes(tmp_path, stored):
    for script in SCRIPTS:
        for part in ("agent", "optimizer", "settings"):
            state = copy.deepcopy(stored[script])
            moments = state.get("optimizer") or next(iter(state.get("optimizers").values()))
            if part == "settings":
                moments["param_groups"][0]["betas"] = "text"
            else:
                weights = state["agent"] if part == "agent" else next(iter(moments["state"].values()))
                name = next(name for name, x in weights.items() if x.ndim)
                weights[name] = torch.cat([weights[name], weights[name]])
            assert refused(script, tmp_path, state) is None, (script, part)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_weights_of_another_kind_are_not_rounded(tmp_path, stored, script, dtype):
    state = copy.deepcopy(stored[script])
    name = next(name for name, x in state["agent"].items() if x.is_floating_point())
    state["agent"][name] = state["agent"][name].to(dtype)
    save_checkpoint(tmp_path / "checkpoint.pt", script.__name__, state)
    done = call(script, "--resume", tmp_path)
    assert done.code == 2 and done.err.startswith(f"error: The checkpoint's {name} is of {dtype} instead of")


@pytest.mark.parametrize("script", [bc_warmup, ppo_vla], ids=lambda script: script.__name__)
def test_words_that_are_no_texts(tmp_path, stored, script):
    state = copy.deepcopy(stored[script])
    state["backbone"]["words"][1] = torch.ones(2)
    assert refused(script, tmp_path, state) is None


STOPPED = {  # runs that a signal stopped amid their collection
    ppo_vla: "--num-envs 2 --num-steps 4 --total-timesteps 16",
    grpo_vla: "--num-envs 4 --group-size 2 --num-groups 1 --total-timesteps 200",
}
STOPPED_FLAGS = """--env CartPole-v1 --minibatch-size 4 --micro-batch-size 4 --update-epochs 1
    --eval-episodes 1 --eval-envs 1 --num-workers 0 --save-freq 1 --device cpu"""
JUNK = ({"x": 1}, "text", [[]], torch.ones(2, 3, 5))


def spots(value, path=()):
    """The paths of all that is within nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from spots(item, (*path, key))


def put(value, path, junk):
    """A copy with `junk` at the path"""
    if not path:
        return junk
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], junk)
    return value


@pytest.mark.parametrize("script", STOPPED, ids=lambda script: script.__name__)
def test_junk_amid_what_was_collected_shows_before_the_run_begins(tmp_path, monkeypatch, script):
    """Nothing learns from it, and no log was opened: the folder is as it was."""
    stopped_by(monkeypatch, script, "finished_episodes", 5 if script is grpo_vla else 3)
    done = call(script, STOPPED_FLAGS, STOPPED[script], f"--output-dir {tmp_path} --run-name r")
    assert done.code == 130, done
    monkeypatch.undo()
    state, folder, accepted = load_checkpoint(tmp_path / "r"), tmp_path / "r", []
    own, name = state["processes"][0], "groups" if script is grpo_vla else "rollout"
    before, found = sorted(folder.iterdir()), list(spots(own["state"][name]))
    assert len(found) > 15 and any("actions" in path for path in found)
    for i, path in enumerate(random.Random(1).sample(found, 16)):
        junk = JUNK[i % len(JUNK)]
        changed = own | {"state": put(own["state"], (name, *path), junk)}
        with pytest.MonkeyPatch.context() as patch:  # a file each would take a minute
            content = state | {"processes": [changed]}
            patch.setattr("common.run.load_checkpoint", lambda _, content=content: copy.deepcopy(content))
            patch.setattr(Run, "begin", lambda *_: sys.exit(0))
            done = call(script, "--resume", folder)
        if done.code != 2 or done.err.count("\n") != 1:
            accepted.append((path, junk, done))
    assert not accepted and sorted(folder.iterdir()) == before


def test_flipped_bits_and_truncated_files(tmp_path, stored):
    """One that is not refused is in what no reader looks at: then all is there."""
    path, draw = tmp_path / "checkpoint.pt", random.Random(1)
    state = {"agent": {"a": torch.arange(3000.0), "b": torch.ones(7)}, "step": 5, "args": {"name": "x" * 99}}
    save_checkpoint(path, "iql", state)
    whole, refusals = path.read_bytes(), 0
    for _ in range(400):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
        else:
            assert found["args"] == state["args"] and found["step"] == 5
            assert all(found["agent"][name].equal(state["agent"][name]) for name in state["agent"])
    assert refusals > 300
    for size in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        done = call(iql, "--resume", path)
        assert done.code == 2 and done.err.count("\n") == 1, done
