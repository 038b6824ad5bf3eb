"""Tabletop in MuJoCo Warp against C MuJoCo: physics, verdicts, pictures, states, command lines. On the CPU.

The kernels' first compilation takes minutes; what needs them is marked slow.
"""

import importlib.util
import sys
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch
from test_cli import call, results, run, stopped_by
from test_envs_vector import flat

import ppo_vla
from common.checkpoint import load_checkpoint
from common.envs import make_envs, tabletop
from common.envs.batched import BatchedEnvs

CPU, ALL = torch.device("cpu"), torch.tensor([True, True])
PHYSICS = ("qpos", "qvel", "qacc_warmstart", "mocap_pos")


@pytest.fixture
def slow():
    if not all(importlib.util.find_spec(name) for name in ("warp", "mujoco_warp")):
        pytest.skip(
            "MUJOCO WARP IS NOT INSTALLED, ITS TABLETOP IS NOT TESTED: python3 common/install.py --warp"
        )


def pair(*seeds, **kwargs):
    """-> the batch, and an environment of C MuJoCo's for each of its rows, all at the same start."""
    batch, envs = tabletop.make_batch(len(seeds), CPU, **kwargs), [tabletop.make(**kwargs) for _ in seeds]
    batch.reset(dict(enumerate(seeds)), None)
    for env, seed in zip(envs, seeds, strict=True):
        env.reset(seed=seed)
    return batch, envs


def put(batch, envs):
    """The batch goes on from where the environments are."""
    for row, env in enumerate(envs):
        for name in PHYSICS:
            batch.views[name][row] = torch.as_tensor(getattr(env.data, name))
        for name, view in batch.episode.items():
            view[row] = torch.as_tensor(np.array(getattr(env, name)))
    batch._derive()


def numbers(batch, row):
    """All that there is of a row, as bytes."""
    return [x[row].numpy().tobytes() for x in batch._numbers().values()]


def close_pictures(found, wanted):
    """On the average within 0.05 grey levels of 255, and in all but 0.2 % of the pixels within 2: along edges
    float32 may see the other side."""
    gap = np.abs(found.numpy().astype(int) - wanted)
    assert gap.mean() < 0.05 and (gap.max(-1) > 2).mean() < 0.002, (gap.mean(), (gap.max(-1) > 2).mean())


# --- without the package


def test_a_missing_package_and_flags_that_do_nothing_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "warp", None)
    monkeypatch.delitem(sys.modules, "common.envs.tabletop_warp", raising=False)
    for flags, said in (
        ("", "--backend warp needs MuJoCo Warp (import of warp halted"),
        ("--renderer gl", "--renderer gl is MuJoCo's in worker processes"),
        ("--num-workers 2", "--num-workers does nothing where all environments are stepped as one batch"),
    ):
        done = call(ppo_vla, f"--backend warp --device cpu --output-dir {tmp_path} {flags}")
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


# --- against C MuJoCo


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("thing", "metres"), [("red cube", 5e-4), ("green cylinder", 5e-3)])
def test_fifty_substeps_of_a_grasp_end_where_c_mujoco_does(thing, metres):
    """A cylinder has one contact with a finger here, and several in C."""
    batch, envs = pair(3, 5, tasks=(f"lift the {thing}",))
    for env in envs:
        while not env._situation()[2]:
            env.advance(env.expert())
    put(batch, envs)
    before = [env.data.xpos.copy() for env in envs]
    for _ in range(5):
        actions = np.stack([env.expert() for env in envs])
        batch.advance(torch.as_tensor(actions), ALL)
        for env, action in zip(envs, actions, strict=True):
            env.advance(action)
            assert env._situation()[2]  # pinched all the time
    for row, env in enumerate(envs):
        assert np.abs(env.data.xpos - before[row]).max() > 0.02
        gap = np.abs(batch.views["xpos"][row].numpy() - env.data.xpos).max()
        turn = np.abs(batch.views["qpos"][row].numpy() - env.data.qpos).max()
        assert gap < metres and turn < 0.02, (gap, turn)  # of a quaternion


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("reward", ["sparse", "shaped"])
def test_verdicts_proprioception_and_pictures_are_those_of_c_mujoco(reward):
    """Of the same states: whole episodes of the expert, of each kind of task."""
    kwargs = dict(cameras=("agentview", "wrist"), reward=reward, split="train", max_steps=20)
    kinds = set()
    for tasks in (("lift",), ("put",), ("move",)):
        batch, envs = pair(1, 2, tasks=tasks, **kwargs)
        over = False
        while not over:
            episodes = [{name: getattr(env, name) for name in batch.episode} for env in envs]
            wanted = [env.advance(env.expert()) for env in envs]
            put(batch, envs)
            for row, episode in enumerate(episodes):
                for name, value in episode.items():
                    batch.episode[name][row] = torch.as_tensor(np.array(value))
            found = [x.tolist() for x in batch._judge(ALL)]
            obs = batch.observe()
            for row, (env, told) in enumerate(zip(envs, wanted, strict=True)):
                assert found[0][row] == pytest.approx(told[0], abs=1e-5)
                assert [x[row] for x in found[1:]] == [told[1], told[2], told[1]]
                for name, value in batch.episode.items():
                    assert value[row].item() == pytest.approx(float(getattr(env, name)), abs=1e-5)
                seen = env.observe()
                assert np.abs(obs["proprio"][row].numpy() - seen["proprio"]).max() < 1e-5
                assert obs["task"][row] == seen["task"]
                if env.steps % 5 == 1:
                    close_pictures(obs["image"][row], seen["image"].astype(int))
                kinds |= {(tasks[0], told[1])}
                over |= told[1] or told[2]
    assert {(kind, True) for kind in tabletop.KINDS} <= kinds


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_the_scripted_expert_succeeds_at_each_kind_of_task():
    batch, envs = pair(1, 2, 4, split="train")
    names = ("lift the red cube", "put the red cube on the yellow plate")
    names += ("move the green cylinder to the purple plate",)
    tasks = [tabletop.INSTRUCTIONS.index(name) for name in names]
    batch.episode["task"][:] = torch.tensor(tasks)
    for env, task in zip(envs, tasks, strict=True):
        env.task = task
    running = torch.ones(3, dtype=torch.bool)
    while running.any():
        for row, env in enumerate(envs):
            for name in PHYSICS:
                getattr(env.data, name)[:] = batch.views[name][row]
            mujoco.mj_forward(env.model, env.data)
        actions = torch.as_tensor(np.stack([env.expert() for env in envs]))
        reward, terminated, truncated, success = batch.advance(actions, running)
        assert not (truncated & running).any()
        assert torch.equal(reward[running], success[running].float())
        running &= ~terminated
    assert batch.episode["steps"].max() < 40


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("split", ["train", "eval"])
def test_training_and_evaluation_start_as_with_workers(split):
    args = SimpleNamespace(env="tabletop", seed=7, chunk=1, action_history=0, num_workers=0, device="cpu")
    args.cameras, args.randomize, args.worker_timeout, args.eval_split = ("wrist",), 0.6, 0.0, "vision"
    found = []
    for args.backend in ("c", "warp"):
        envs = make_envs(args, split, 2)
        assert isinstance(envs, BatchedEnvs) == (args.backend == "warp")
        envs.draw_tasks(np.arange(len(envs.instructions)) < 3)
        found.append([envs.reset(), envs.reset(mask=np.array([False, True])), envs.reset(np.array([3, 9]))])
        found[-1].append(vars(envs)["has_success"] and envs.draws_tasks)
        envs.close()
    for ours, theirs in zip(found[1][:3], found[0][:3], strict=True):
        close_pictures(ours["image"], theirs["image"].astype(int))
        assert np.abs(ours["proprio"].numpy() - theirs["proprio"]).max() < 1e-6
        assert ours["task"].tolist() == theirs["task"].tolist() and ours["task"].max() < 3


# --- the contract of a batch


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_rows_that_do_not_move_stay_as_they_are_and_a_state_goes_on_exactly():
    batch, _ = pair(1, 2, split="train", reward="shaped", randomize=0.6)
    rng = np.random.default_rng(0)
    chunk = [torch.as_tensor(rng.uniform(-1, 1, (2, 7)).astype(np.float32)) for _ in range(5)]
    batch.advance(chunk[0], ALL)
    still, image = numbers(batch, 0), batch.observe()["image"][0].clone()
    batch.advance(chunk[1], torch.tensor([False, True]))
    batch.reset({1: None}, None)
    assert numbers(batch, 0) == still and torch.equal(batch.observe()["image"][0], image)
    batch.advance(chunk[2], torch.tensor([True, False]))
    state, told = batch.get_state(), []
    other, _ = pair(8, 9, split="train", reward="shaped", randomize=0.6)
    other.set_state(state)
    for each in (batch, other):
        results = [each.observe()]
        for action in chunk[3:]:
            results += [list(each.advance(action, ALL)), each.observe()]
        each.reset({0: None, 1: None}, None)
        told.append(flat([each.get_state(), results]))
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_a_chunk_ends_with_the_episode_and_shows_its_last_picture():
    batch = tabletop.make_batch(2, CPU, split="train", max_steps=2)
    envs = BatchedEnvs("tabletop", batch, 2, CPU, seed=1, first=0, chunk=3, autoreset=True, action_history=0)
    envs.reset()
    actions = np.zeros((2, 3, 7), np.float32)
    actions[:, :, 2] = -1
    obs, _, terminated, truncated, info = envs.step(actions, record=np.array([True, False]))
    assert truncated.all() and not terminated.any() and info["steps"].tolist() == [2, 2]
    assert [len(info["frames"][0]), info["frames"][0][0].shape] == [2, (192, 384, 3)]
    one = tabletop.make(split="train")
    one.reset(seed=envs._next_seed(0) or int(np.random.SeedSequence([1, 0, 0]).generate_state(1)[0]))
    for _ in range(2):
        one.advance(actions[0, 0])
    seen = one.observe()
    assert np.abs(info["final_obs"]["proprio"][0].numpy() - seen["proprio"]).max() < 2e-3
    gap = np.abs(info["final_obs"]["image"][0].numpy().astype(int) - seen["image"])
    assert gap.mean() < 0.5
    assert np.abs(info["frames"][0][1].astype(int) - one.render()).mean() < 0.5
    assert not torch.equal(obs["image"][0], info["final_obs"]["image"][0])
    assert batch.episode["steps"].tolist() == [0, 0]
    envs.close()


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_ppo_trains_and_goes_on_exactly(tmp_path, monkeypatch):
    original = tabletop.make_batch

    def patch():  # short episodes: a step takes a second
        monkeypatch.setattr(tabletop, "make_batch", lambda n, d, **kw: original(n, d, max_steps=4, **kw))

    patch()
    flags = "--backend warp --device cpu --seed 3 --num-envs 2 --num-steps 2 --chunk 2 --total-timesteps 14 "
    flags += "--eval-episodes 2 --eval-envs 2 --critic-warmup 0 --policy-warmup 0 --minibatch-size 2 "
    flags += f"--eval-freq 0 --reward shaped --output-dir {tmp_path}"
    run(ppo_vla, flags, "--run-name whole --capture-video")
    assert len(list((tmp_path / "whole/videos").glob("*.mp4"))) == 2
    assert results(tmp_path / "whole")["final"]["mean_length"] <= 4
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 2)
    assert call(ppo_vla, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    patch()
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    whole, stopped = (load_checkpoint(tmp_path / name)["agent"] for name in ("whole", "stopped"))
    assert all(torch.equal(x, stopped[name]) for name, x in whole.items())
