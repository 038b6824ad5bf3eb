"""common.envs.batched: against `Envs` on the same world, one of which is a batch; and through the scripts."""

import batched_world
import numpy as np
import pytest
import torch
from test_cli import call, results, run, stopped_by
from test_envs_vector import flat

import grpo_vla
import ppo_vla
from common import UserError
from common.checkpoint import load_checkpoint
from common.envs import WORLDS
from common.envs.batched import BatchedEnvs
from common.envs.vector import vectorize

CPU = torch.device("cpu")
PPO = (
    "--env reach --eval-episodes 2 --eval-envs 2 --device cpu --seed 3 --num-envs 4 --num-steps 2 "
    "--total-timesteps 40 --critic-warmup 0 --minibatch-size 6 --policy-warmup 0 --chunk 3"
)
GRPO = (
    "--env reach --eval-episodes 2 --eval-envs 2 --device cpu --seed 3 --num-envs 4 --group-size 2 "
    "--num-groups 1 --total-timesteps 200 --accuracy-low 0 --accuracy-high 1 --chunk 3"
)


class Away(torch.Tensor):
    """Stands for a tensor on a GPU: only through `cpu()` can it be an array."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor on a GPU to numpy; use cpu() first")

    __array__ = numpy


def batch(num_envs=3, seed=4, first=0, chunk=1, autoreset=True, action_history=0, stateful=True, **kwargs):
    made = batched_world.make_batch(num_envs, CPU, stateful=stateful, **kwargs)
    own = dict(seed=seed, first=first, chunk=chunk, autoreset=autoreset, action_history=action_history)
    return BatchedEnvs("reach", made, num_envs, CPU, **own)


def single(num_envs=3, seed=4, **kwargs):
    names = ("first", "chunk", "autoreset", "action_history")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    return vectorize(("reach", "reach_world", kwargs), num_envs, seed=seed, num_workers=0, **own)


def arrays(value):
    """Nested results with arrays in the place of tensors."""
    if isinstance(value, dict):
        return {key: arrays(x) for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [arrays(x) for x in value]
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def moves(envs, rng):
    """(N, K, 2): one environment goes straight to its disc, the others anywhere."""
    world = envs._workers[0].local.envs[0]
    chosen = rng.uniform(-1.5, 1.5, (envs.num_envs, envs.chunk, 2)).astype(np.float32)
    chosen[0] = (world.targets[world.task] - world.point) / world.speed
    return chosen


@pytest.mark.parametrize("autoreset", [True, False])
@pytest.mark.parametrize(("chunk", "history"), [(1, 0), (3, 2)])
def test_all_that_is_told_equals_the_workers(autoreset, chunk, history):
    kwargs = dict(chunk=chunk, autoreset=autoreset, action_history=history, first=2, split="eval")
    ours, theirs, rng = batch(**kwargs), single(**kwargs), np.random.default_rng(0)
    assert ours.metadata == theirs.metadata and ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space and ours.instructions == theirs.instructions
    assert flat(arrays(ours.reset())) == flat(theirs.reset())
    ends = np.zeros(2, int)
    for step in range(60):
        actions = moves(theirs, rng)
        mask, record = rng.random((2, 3)) < 0.7
        mask &= ~theirs._ended
        found = ours.step(torch.as_tensor(actions) if step % 2 else actions, mask, record)
        wanted = theirs.step(torch.as_tensor(actions), mask=mask, record=record)
        assert flat(arrays(found)) == flat(wanted)
        assert all(type(x) is torch.Tensor for x in (*found[0].values(), *found[4]["final_obs"].values()))
        ends += wanted[2].sum(), wanted[3].sum()
        if theirs._ended.all() or step % 7 == 6:
            again, seeds = theirs._ended.copy(), np.arange(3) if step % 2 else None
            assert flat(arrays(ours.reset(seeds, again))) == flat(theirs.reset(seeds, again))
    assert ends.min() > 1  # of both kinds
    theirs.close()


def test_an_observation_is_not_written_to_again():
    envs = batch(2, chunk=2)
    kept = [envs.reset()]
    copies = [flat(arrays(kept[0]))]
    for _ in range(15):
        obs, *_, info = envs.step(np.ones((2, 2, 2), np.float32))
        kept += [obs, info["final_obs"]]
        copies += [flat(arrays(x)) for x in (obs, info["final_obs"])]
        state = envs.get_state()
        kept, copies = [*kept, state], [*copies, flat(state)]
    assert [flat(arrays(x)) for x in kept] == copies


def test_tasks_are_drawn_by_weights():
    envs, told = batch(2), []
    envs.batch.reset = lambda seeds, options: told.append((seeds, options))
    envs.reset(np.array([5, 6]), np.array([False, True]))
    envs.draw_tasks([0.0, 2.0, 1.0])
    envs.reset(mask=np.array([True, False]))
    assert told[0] == ({1: 6}, None)
    assert list(told[1][0]) == [0] and told[1][1]["task_weights"].tolist() == [0, 2, 1]


@pytest.mark.parametrize("autoreset", [True, False])
def test_a_state_goes_on_exactly(autoreset):
    envs, rng = batch(autoreset=autoreset, action_history=1, chunk=2), np.random.default_rng(1)
    envs.reset(mask=np.array([True, True, False]))
    mask = np.array([True, False, False])
    envs.step(rng.uniform(-1, 1, (3, 2, 2)), mask)
    state = envs.get_state()
    other = batch(autoreset=autoreset, action_history=1, chunk=2, seed=4)
    other.reset()
    assert flat(arrays(other.set_state(state))) == flat(state["obs"])
    chunks = rng.uniform(-1, 1, (30, 3, 2, 2))
    for chunk in chunks:
        told = []
        for each in (envs, other):
            running = ~each._ended
            told.append(arrays(each.step(chunk, running)))
            if not autoreset or each._fresh.any():
                told[-1].append(arrays(each.reset(mask=each._ended)))
        assert flat(told[0]) == flat(told[1])


def test_a_batch_that_cannot_save_its_state_starts_anew_and_says_so():
    envs = batch(stateful=False, chunk=2, autoreset=False)
    envs.reset(mask=np.array([True, True, False]))
    chunk = np.zeros((3, 2, 2), np.float32)
    running = np.array([True, True, False])
    envs.step(chunk, running)
    state = envs.get_state()
    other = batch(stateful=False, chunk=2, autoreset=False)
    obs = other.set_state(state)
    assert other.lost_episodes == 2
    assert not torch.equal(obs["proprio"][:2], torch.tensor(state["obs"]["proprio"][:2]))  # by other seeds
    *_, info = other.step(chunk, running)
    assert info["lost"].tolist() == [True, True, False] and not info["steps"].any()
    *_, info = other.step(chunk, running)
    assert not info["lost"].any() and info["steps"].tolist() == [2, 2, 0]
    assert info["episode_length"].tolist() == [2, 2, 0]


def test_wrong_input_is_told():
    envs = batch(2, chunk=2)
    good = np.zeros((2, 2, 2), np.float32)
    with pytest.raises(ValueError, match=r"environments \[0, 1\] have no running episode"):
        envs.step(good)
    envs.reset()
    for bad, said in (
        (good[:, :1], r"actions must be floats \(2, 2, 2\)"),
        (good + np.array([[[0]], [[np.nan]]]), r"actions of environments \[1\] are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=said):
            envs.step(bad)
    with pytest.raises(ValueError, match="mask must be bool"):
        envs.step(good, [1, 0])
    with pytest.raises(ValueError, match="seeds must be 2 ints"):
        envs.reset([-1, 2])
    with pytest.raises(ValueError, match="of 2 environments, not 3"):
        batch(3).set_state(envs.get_state())
    state = envs.get_state()
    with pytest.raises(ValueError, match="the state's length"):
        envs.set_state(state | {"length": state["length"] + 0.5})
    envs.batch.spoiled = True
    with pytest.raises(
        UserError, match="'reach' gave 'proprio' that is NaN or infinite; it has to be mended"
    ):
        envs.step(good)
    envs.batch.spoiled, observe = False, envs.batch.observe
    for key, value, said in (
        ("proprio", torch.zeros(2, 3), r"'proprio' as float32 \(2, 3\) instead of float32 \(2, 2\)"),
        ("task", torch.zeros(2), r"'task' as float32 \(2,\) instead of int64 \(2,\)"),
        ("more", torch.zeros(2), "observations of .*'more'"),
    ):
        envs.batch.observe = lambda key=key, value=value: observe() | {key: value}
        with pytest.raises(UserError, match=said):
            envs.reset()
    advance = envs.batch.advance
    envs.batch.advance = lambda *args: (advance(*args)[0] * np.inf, *advance(*args)[1:])
    envs.batch.observe, envs.batch.spoiled = observe, False
    envs.reset()
    with pytest.raises(UserError, match="a reward that is NaN or infinite"):
        envs.step(good)
    envs.close()
    assert envs.batch.closed
    with pytest.raises(RuntimeError, match="closed"):
        envs.reset()


# --- through the scripts


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setitem(WORLDS, "reach", "batched_world")


def weights(path):
    return load_checkpoint(path)["agent"]


@pytest.mark.parametrize(("script", "flags"), [(ppo_vla, PPO), (grpo_vla, GRPO)])
def test_a_run_is_the_same_with_both_and_goes_on_exactly(tmp_path, monkeypatch, world, script, flags):
    flags = f"{flags} --action-history 1 --speed 0.3 --output-dir {tmp_path}"
    run(script, flags, "--engine one --num-workers 0 --run-name one")
    run(script, flags, "--run-name whole --capture-video")
    one, whole = (weights(tmp_path / name) for name in ("one", "whole"))
    assert all(torch.equal(x, whole[name]) for name, x in one.items())
    assert results(tmp_path / "one")["final"] == results(tmp_path / "whole")["final"]
    assert list((tmp_path / "whole/videos").glob("*.mp4"))
    stopped_by(monkeypatch, script, "clipped_surrogate", 2)
    assert call(script, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    monkeypatch.setitem(WORLDS, "reach", "batched_world")
    run(script, f"--resume {tmp_path}/stopped")
    stopped = weights(tmp_path / "stopped")
    assert all(torch.equal(x, stopped[name]) for name, x in whole.items())


def test_nothing_asks_a_tensor_on_a_gpu_for_an_array(tmp_path, monkeypatch, world):
    observe, seen = batched_world.Forgetful.observe, []

    def away(self):
        seen.append({key: x.as_subclass(Away) for key, x in observe(self).items()})
        return seen[-1]

    monkeypatch.setattr(batched_world.Forgetful, "observe", away)
    with pytest.raises(TypeError, match="use cpu"):
        np.asarray(batch(1).reset()["proprio"])
    flags = f"--output-dir {tmp_path} --capture-video"
    run(ppo_vla, PPO, f"{flags} --run-name ppo --action-history 2")
    run(grpo_vla, GRPO, f"{flags} --run-name grpo")
    run(
        ppo_vla,
        f"--evaluate --checkpoint {tmp_path}/ppo --eval-episodes 3 --eval-envs 2 {flags} --run-name e",
    )
    assert len(seen) > 50


def test_a_flag_for_workers_is_refused(tmp_path, world):
    for flag in ("--num-workers 2", "--worker-timeout 3"):
        done = call(ppo_vla, PPO, f"--output-dir {tmp_path} {flag}")
        assert done.code == 2 and f"{flag.split()[0]} does nothing where all environments" in done.err
        assert done.err.count("\n") == 1
