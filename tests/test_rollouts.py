"""Recorded rollouts: what was played is what is read, whatever ends it; filter, advantage weights, no-ops."""

import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import gymnasium
import h5py
import numpy as np
import pytest
import reach_world
import torch
from test_cli import call, one_thread, results, run  # noqa: F401 (one is a fixture)

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError, evaluation
from common.checkpoint import CheckpointError, load_checkpoint
from common.datasets import BLOCK_STEPS, Recording, load_demonstrations, recording, training_demonstrations
from common.envs import WORLDS, libero
from common.envs.vector import vectorize
from common.evaluation import OpenLoop, run_episodes
from common.flags import FREE

EVAL = "--env reach --eval-episodes 4 --eval-envs 2 --num-workers 0 --device cpu --seed 3"
BC = f"{EVAL} --num-demos 5 --gradient-steps 4 --batch-size 8 --warmup-steps 1"
DEMO_KEYS = {"left": "agentview_rgb", "right": "eye_in_hand_rgb"}
LENGTHS = (3, 40, 16, 1, 33, 17)  # steps of the seeds' episodes: below, at and above a block


class Noise(gymnasium.Env):
    """Pictures without any pattern; seed k's episode has LENGTHS[k] steps, of which even ones succeed.

    `die` kills the worker once, at the 20th step of seed 1's."""

    instructions, active_dims, has_success = ["go", "come back"], np.ones(2, bool), True

    def __init__(self, split="train", die=""):
        box, self.die = gymnasium.spaces.Box, die
        self.observation_space = gymnasium.spaces.Dict(
            image=box(0, 255, (2, 5, 6, 3), np.uint8), proprio=box(-np.inf, np.inf, (3,), np.float32),
            task=box(0, 1, (), np.int64),
        )  # fmt: skip
        self.action_space = box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return self.observe(), {}

    def observe(self):
        rng = np.random.default_rng([self.seed, self.steps])
        image, proprio = rng.integers(0, 256, (2, 5, 6, 3), np.uint8), rng.normal(size=3).astype(np.float32)
        return {"image": image, "proprio": proprio, "task": np.int64(self.seed % 2)}

    def advance(self, action):
        self.steps += 1
        if self.die and (self.seed, self.steps) == (1, 20) and Path(self.die).exists():
            Path(self.die).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        ended = self.steps == LENGTHS[self.seed]
        good = self.seed % 2 == 0
        return float(action.sum()), ended and good, ended and not good, {"success": ended and good}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)


class Args:
    """The world's, which has no flags."""


make = Noise


class Planner(torch.nn.Module):
    """Chunks of three that follow from the observation, beyond [-1, 1] at times; notes where it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def act(self, obs, turn):
        self.asked += [(int(row), int(step)) for row, step in zip(turn["rows"], turn["steps"], strict=True)]
        return np.stack([plan(proprio) for proprio in obs["proprio"]]), None


def plan(proprio):
    return np.stack([proprio[:2] * k for k in (1, -1, 2)])


def played(seed):
    """By hand: the columns of an episode whose chunks are executed open loop."""
    env, rows = Noise(), []
    obs, _ = env.reset(seed=seed)
    while True:
        for action in plan(obs["proprio"]):
            seen, action = env.observe(), action.clip(-1, 1)
            reward, terminated, truncated, info = env.advance(action)
            rows.append((seen["image"], seen["proprio"], action, reward, terminated or truncated))
            if terminated or truncated:
                return [np.stack(x) for x in zip(*rows, strict=True)], info["success"]
        obs = env.observe()


@dataclass
class Flags:
    suite: str = "noise"
    saves: Annotated[str, FREE] = "a folder"  # which no file has


@pytest.fixture
def world(monkeypatch):
    """`recording`'s arguments but the path."""
    made = []

    def build(num_envs, num_workers=0, **kwargs):
        made.append(vectorize(("noise", __name__, kwargs), num_envs, seed=0, num_workers=num_workers,
                              autoreset=False))  # fmt: skip
        return made[-1]

    import common.datasets

    monkeypatch.setattr(
        common.datasets, "world_module", lambda env: SimpleNamespace(DEMO_KEYS=DEMO_KEYS, Args=Flags)
    )
    monkeypatch.setattr(common.datasets, "world_flags", lambda args: asdict(Flags()))
    yield build
    for envs in made:
        envs.close()


ARGS = SimpleNamespace(env="noise", action_history=0)


def check(path, numbers):
    """The file holds the seeds' episodes `numbers`, each under its number, as played by hand."""
    with h5py.File(path) as file:
        data = file["data"]
        assert sorted(data) == sorted(f"demo_{i}" for i in numbers)
        assert data.attrs["num_demos"] == len(numbers)
        assert data.attrs["total"] == sum(LENGTHS[i] for i in numbers)
        named = {"env_name": "noise", "env_kwargs": {"suite": "noise"}}
        assert json.loads(data.attrs["env_args"]) == named
        for i in numbers:
            demo, ((image, proprio, actions, rewards, ends), success) = data[f"demo_{i}"], played(i)
            wanted = {"obs/agentview_rgb": image[:, 0], "obs/eye_in_hand_rgb": image[:, 1]}
            wanted |= {"obs/proprio": proprio, "actions": actions, "dones": ends.astype(np.uint8)}
            wanted |= {"rewards": rewards.astype(np.float32)}
            wanted |= {"terminated": (ends & success).astype(np.uint8)}
            wanted |= {"decided": (np.arange(LENGTHS[i]) % 3 == 0).astype(np.uint8)}
            names = []
            demo.visititems(lambda name, x, names=names: names.append(name) if hasattr(x, "dtype") else None)
            assert set(names) == set(wanted)
            for name, array in wanted.items():
                assert demo[name].dtype == array.dtype and np.array_equal(demo[name], array), name
            assert (demo.attrs["success"], demo.attrs["num_samples"]) == (success, LENGTHS[i])
            assert demo.attrs["language_instruction"] == Noise.instructions[i % 2]
    read = load_demonstrations(path, action_dim=2, outcomes=True)
    episodes = [played(i)[0] for i in sorted(numbers)]
    for key, column in (("proprio", 1), ("actions", 2)):
        assert np.array_equal(read[key], np.concatenate([x[column] for x in episodes]))
    images = np.concatenate([x[0] for x in episodes])
    rows = np.random.default_rng(1).integers(len(images), size=60)  # some twice, in no order
    assert np.array_equal(read["image"][rows], images[rows]) and read["image"].shape == images.shape
    assert read["success"].tolist() == [i % 2 == 0 for i in sorted(numbers)]
    assert np.array_equal(read["rewards"], np.concatenate([np.float32(x[3]) for x in episodes]))
    ends = np.concatenate([x[4] & (i % 2 == 0) for i, x in zip(sorted(numbers), episodes, strict=True)])
    assert np.array_equal(read["terminated"], ends)  # and no time-outs
    assert read["decided"].tolist() == [t % 3 == 0 for i in sorted(numbers) for t in range(LENGTHS[i])]


@pytest.mark.parametrize("size", [1, 4, 6])
def test_what_was_played_is_what_is_read(tmp_path, world, size):
    """Bit for bit, of long and short episodes, few and many at a time; asked only where a chunk begins."""
    agent, seeds = Planner(), range(6)
    with recording(tmp_path / "new/r.hdf5", ARGS, envs := world(size)) as record:
        outcomes = run_episodes(OpenLoop(agent, 3), envs, seeds, record=record)
    check(tmp_path / "new/r.hdf5", range(6))
    assert [row[2] for row in outcomes] == list(LENGTHS) and record.ended == 6 and not record.steps
    assert all(step % 3 == 0 for _, step in agent.asked)
    assert len(agent.asked) == sum(-(-n // 3) for n in LENGTHS)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["r.hdf5"]


def test_an_episode_lost_with_its_worker_is_recorded_once(tmp_path, world):
    (marker := tmp_path / "marker").touch()
    envs = world(3, num_workers=1, die=str(marker))
    killed = pytest.warns(RuntimeWarning, match="SIGKILL")
    with recording(tmp_path / "r.hdf5", ARGS, envs) as record, killed:
        run_episodes(OpenLoop(Planner(), 3), envs, range(6), record=record)
    assert envs.lost_episodes >= 1 and not marker.exists()
    check(tmp_path / "r.hdf5", range(6))


def test_a_stop_keeps_what_has_ended(tmp_path, world):
    turns = iter(range(99))
    with recording(tmp_path / "r.hdf5", ARGS, envs := world(6)) as record:
        stop = lambda: next(turns) == 20  # noqa: E731
        outcomes = run_episodes(OpenLoop(Planner(), 3), envs, range(6), record=record, stop=stop)
    assert [row is not None for row in outcomes] == [n <= 20 for n in LENGTHS]
    check(tmp_path / "r.hdf5", [0, 2, 3, 5])
    before = (tmp_path / "r.hdf5").read_bytes()
    none = pytest.raises(UserError, match="would hold no demonstrations")
    with none, recording(tmp_path / "r.hdf5", ARGS, envs) as record:
        run_episodes(OpenLoop(Planner(), 3), envs, [1], record=record, stop=lambda: bool(record.steps))
    assert (tmp_path / "r.hdf5").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_memory_holds_a_block_of_each_episode(tmp_path, world, monkeypatch):
    held, step = [], Recording.step
    monkeypatch.setattr(
        Recording, "step", lambda self, *x: step(self, *x) or held.append([*map(len, self.steps.values())])
    )
    with recording(tmp_path / "r.hdf5", ARGS, envs := world(6)) as record:
        run_episodes(OpenLoop(Planner(), 3), envs, range(6), record=record)
    assert max(map(max, filter(None, held))) < BLOCK_STEPS < max(LENGTHS)
    with h5py.File(tmp_path / "r.hdf5") as file:
        pictures = file["data/demo_1/obs/agentview_rgb"]
        assert pictures.compression == "gzip" and pictures.chunks == (BLOCK_STEPS, 5, 6, 3)


def record_on_a_full_disk(path, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    envs = vectorize(("noise", __name__, {}), 6, seed=0, num_workers=0, autoreset=False)
    try:
        with recording(path, ARGS, envs) as record:
            run_episodes(OpenLoop(Planner(), 3), envs, range(6), record=record)
        queue.put("written")
    except CheckpointError as error:
        queue.put(str(error))


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, world):
    (tmp_path / "r.hdf5").write_text("old")
    queue = (context := multiprocessing.get_context("fork")).Queue()
    process = context.Process(target=record_on_a_full_disk, args=(tmp_path / "r.hdf5", queue))
    process.start()
    said = queue.get(timeout=60)
    process.join()
    assert "r.hdf5 cannot be written" in said and "free some space" in said and "\n" not in said
    assert (tmp_path / "r.hdf5").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_recorded_is_said_before_anything_is_played(tmp_path, world, monkeypatch):
    envs = world(1)
    for path, args, said in ((tmp_path, ARGS, "is a folder"), (tmp_path / "r", ARGS, "names no DEMO_KEYS")):
        if "KEYS" in said:
            monkeypatch.setattr("common.datasets.world_module", lambda env: SimpleNamespace(Args=Flags))
        with pytest.raises(UserError, match=said), recording(path, args, envs):
            raise AssertionError
    blind = SimpleNamespace(single_observation_space=SimpleNamespace(spaces={"proprio": None}))
    with pytest.raises(UserError, match="noise has no pictures to record"), recording("x", ARGS, blind):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_liberos_names_and_its_pictures_upside_down(tmp_path):
    """Of its world, without the simulator: what is written there is what LIBERO's own files hold."""
    rng, box = np.random.default_rng(0), gymnasium.spaces.Box
    spaces = gymnasium.spaces.Dict(
        image=box(0, 255, (2, 4, 4, 3), np.uint8), proprio=box(-9, 9, (8 + 14,), np.float32)
    )
    envs = SimpleNamespace(
        single_observation_space=spaces, single_action_space=box(-1, 1, (7,), np.float32),
        instructions=["open it"], has_success=True,
    )  # fmt: skip
    args = SimpleNamespace(env="libero", action_history=2, cameras=("wrist", "agentview"))
    image, proprio = rng.integers(0, 256, (3, 2, 4, 4, 3), np.uint8), rng.normal(size=(3, 22))
    actions = rng.uniform(-1, 1, (3, 1, 1, 7)).astype(np.float32)
    with recording(tmp_path / "r.hdf5", args, envs) as record:
        for t in range(3):
            obs = {"image": image[t : t + 1], "proprio": proprio[t : t + 1].astype(np.float32), "task": [0]}
            info = {"lost": [False], "success": [True]}
            rest = np.zeros(1, np.float32), *[np.r_[t == 2]] * 2, info, np.ones(1, bool)
            record.step([0], np.ones(1, bool), obs, actions[t], *rest)
    with h5py.File(tmp_path / "r.hdf5") as file:
        obs = file["data/demo_0/obs"]
        for name, a, b in (("ee_pos", 0, 3), ("ee_ori", 3, 6), ("gripper_states", 6, 8)):
            assert np.array_equal(obs[name], proprio[:, a:b].astype(np.float32))
        assert np.array_equal(obs["eye_in_hand_rgb"], image[:, 0, ::-1, ::-1])
        assert np.array_equal(obs["agentview_rgb"], image[:, 1, ::-1, ::-1]) and len(obs) == 5
    read = load_demonstrations(tmp_path / "r.hdf5", image_keys=("eye_in_hand_rgb", "agentview_rgb"))
    assert np.array_equal(libero.from_file(np.asarray(read["image"])), image)
    assert np.array_equal(read["proprio"], proprio[:, :8].astype(np.float32))


# --- the filter, and files that were recorded elsewhere


def write(path, successes, lengths=None, **columns):
    """A small file of LIBERO's layout; successes: bools, or None for a demonstration that does not say."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i, success in enumerate(successes):
            demo, steps = file.create_group(f"data/demo_{i}"), (lengths or [2] * 99)[i]
            demo["actions"] = columns.get("actions", [rng.uniform(-1, 1, (steps, 7))] * 99)[i]
            demo["obs/proprio"] = np.full((steps, 8), i + np.arange(steps)[:, None] / 100)
            size = (steps, *columns.get("size", (64, 64)), 3)
            demo["obs/agentview_rgb"] = rng.integers(0, 256, size, np.uint8)
            demo.attrs["language_instruction"] = "lift the red cube"
            if success is not None:
                demo.attrs["success"] = success
    return path


def test_the_filter_comes_before_the_count(tmp_path):
    path = write(tmp_path / "a.hdf5", [False, True, None, False, True])
    keys = ("agentview_rgb",)
    found = load_demonstrations(path, 2, keys, only_success=True)
    assert found["proprio"][:, 0].astype(int).tolist() == [1, 1, 2, 2] and found["success"].all()
    every = load_demonstrations(path, None, keys)
    assert every["success"].tolist() == [False, True, True, False, True]  # published files do not say
    assert every["left_out"] == 0 and len(every["task"]) == 10
    write(path, [False, False])
    with pytest.raises(UserError, match="has no successful demonstration"):
        load_demonstrations(path, None, keys, only_success=True)


def rule(actions):
    """regenerate_libero_dataset.py's loop."""
    kept = []
    for action in actions:
        small = np.linalg.norm(action[:-1]) < 1e-4
        if small and (not kept or action[-1] == kept[-1][-1]):
            continue
        kept.append(action)
    return kept


def test_no_ops_are_those_of_the_published_data(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    for _ in range(200):
        actions = rng.uniform(-1, 1, (12, 7))
        actions[rng.random(12) < 0.6, :6] *= 1e-5
        actions[:, 6] = rng.choice([-1.0, 1.0], 12)
        kept = libero.kept_steps(actions)
        assert kept.dtype == bool and np.array_equal(actions[kept], np.reshape(rule(actions), (-1, 7)))
    still, edge = np.zeros((3, 7)), np.zeros((2, 7))
    edge[:, 0] = 0.99e-4, 1.01e-4
    assert libero.kept_steps(still).tolist() == [False] * 3
    assert libero.kept_steps(edge).tolist() == [False, True]
    moving = np.full((3, 7), 0.5)
    moving[1, :6] = 0  # the gripper's is the last one's
    path = write(tmp_path / "a.hdf5", [None] * 2, [3, 3], actions=[moving, still])
    found = load_demonstrations(path, None, ("agentview_rgb",), kept_steps=libero.kept_steps)
    assert np.array_equal(found["actions"], moving[[0, 2]].astype(np.float32)) and found["left_out"] == 4
    assert np.allclose(found["proprio"][:, 0], [0, 0.02]) and found["episode_starts"].tolist() == [0]
    with h5py.File(path) as file:
        assert np.array_equal(found["image"], file["data/demo_0/obs/agentview_rgb"][()][[0, 2], None])
    assert len(found["task"]) == 2
    path = write(tmp_path / "b.hdf5", [None], [3], actions=[still])
    with pytest.raises(UserError, match="has no step worth imitating"):
        load_demonstrations(path, None, ("agentview_rgb",), kept_steps=libero.kept_steps)


def test_the_console_says_what_was_read_and_that_pictures_differ(tmp_path, capsys):
    """Of LIBERO's own files: 128 x 128 with no-ops, where an evaluation renders 256 x 256."""
    moving = np.full((3, 7), 0.5)
    moving[1, :6] = 0
    path = write(tmp_path / "a.hdf5", [None, False], [3, 3], actions=[moving] * 2, size=(128, 128))
    box = gymnasium.spaces.Box
    spaces = {"image": box(0, 255, (1, 256, 256, 3), np.uint8), "proprio": box(-9, 9, (8,), np.float32)}
    envs = SimpleNamespace(
        single_observation_space=spaces, single_action_space=box(-1, 1, (7,)),
        instructions=["lift the red cube"],
    )  # fmt: skip
    args = SimpleNamespace(env="libero", demos=str(path), num_demos=9, demos_filter="all", action_history=0)
    args.cameras = ("agentview",)
    demos = training_demonstrations(args, envs)
    said = capsys.readouterr().out.splitlines()
    assert len(demos["task"]) == 4 and len(said) == 3
    assert said[1] == "2 demonstrations of 4 steps, 1 successful; 2 steps of no motion left out"
    wanted = f"warning: the pictures of {path} are 128 x 128, those of an evaluation 256 x 256"
    assert said[2].startswith(wanted)
    write(path, [True], [3], actions=[moving], size=(256, 256))
    training_demonstrations(args, envs)
    assert "warning" not in capsys.readouterr().out


def folder_of_libero(tmp_path, size):
    """Arguments and environments, as far as they are needed to read demonstrations of one camera."""
    box = gymnasium.spaces.Box
    spaces = {"image": box(0, 255, (1, *size, 3), np.uint8), "proprio": box(-9, 9, (8,), np.float32)}
    envs = SimpleNamespace(
        single_observation_space=spaces, single_action_space=box(-1, 1, (7,)),
        instructions=["lift the red cube"],
    )  # fmt: skip
    args = SimpleNamespace(env="libero", demos=str(tmp_path), num_demos=9, demos_filter="all")
    args.action_history, args.cameras = 0, ("agentview",)
    return args, envs


def test_memory_holds_the_pictures_of_several_files_once(tmp_path):
    args, envs = folder_of_libero(tmp_path, (128, 128))
    for name in "abc":
        write(tmp_path / f"{name}.hdf5", [True] * 8, [10] * 8, size=(128, 128))
    training_demonstrations(args, envs)  # imports
    tracemalloc.start()
    images = np.asarray(training_demonstrations(args, envs)["image"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.shape == (240, 1, 128, 128, 3) and images.nbytes < peak < 1.3 * images.nbytes


def test_pictures_of_several_files_stay_in_them(tmp_path):
    """And are read, turned as the world shows them, when they are asked for, in any order."""
    (args, envs), whole = folder_of_libero(tmp_path, (8, 6)), []
    for name, lengths in (("a", [3, 1]), ("b", [2, 5, 4])):
        write(tmp_path / f"{name}.hdf5", [True] * len(lengths), lengths, size=(8, 6))
        with h5py.File(tmp_path / f"{name}.hdf5") as file:
            whole += [demo["obs/agentview_rgb"][()] for demo in file["data"].values()]
    images, whole = training_demonstrations(args, envs)["image"], np.concatenate(whole)[:, None, ::-1, ::-1]
    rows = np.random.default_rng(1).integers(15, size=40)
    assert np.array_equal(images[rows], whole[rows]) and images.shape == whole.shape == (15, 1, 8, 6, 3)
    (tmp_path / "b.hdf5").write_bytes((tmp_path / "b.hdf5").read_bytes()[:3000])
    assert np.array_equal(images[np.arange(4)], whole[:4])
    with pytest.raises(UserError, match="b.hdf5 is truncated"):
        images[rows]
    write(tmp_path / "b.hdf5", [True], [2], size=(8, 8))
    shapes = r"image of shapes \(1, 8, 6, 3\) and \(1, 8, 8, 3\); give files of one kind"
    with pytest.raises(UserError, match=shapes):
        training_demonstrations(args, envs)


# --- advantage weights


def test_advantage_weights_against_a_loop():
    rng = np.random.default_rng(2)
    for beta, gamma in ((0.5, 0.9), (0.05, 0.98), (2.0, 1.0)):
        success, lengths, task = rng.random(30) < 0.4, rng.integers(1, 9, 30), rng.integers(0, 3, 30)
        to_come = [
            [gamma ** (n - 1 - t) * float(good) for t in range(n)]
            for good, n in zip(success, lengths, strict=True)
        ]
        wanted = []
        for i in range(30):
            for t in range(lengths[i]):
                peers = [to_come[j][t] for j in range(30) if task[j] == task[i] and t < lengths[j]]
                advantage = to_come[i][t] - np.mean(peers)
                wanted.append(min(math.exp(advantage / beta), bc_warmup.MAX_WEIGHT))
        wanted = np.array(wanted) / np.mean(wanted)
        columns = map(torch.as_tensor, (success, lengths, task))
        found = bc_warmup.advantage_weights(*columns, beta, gamma)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert wanted.max() / wanted.min() > 1.3


def test_nothing_to_compare_means_equal_weights():
    lengths, task = torch.tensor([3, 5, 2]), torch.tensor([0, 0, 1])
    for success in (True, False):
        weights = bc_warmup.advantage_weights(torch.full((3,), success), lengths, task, 0.1, 1.0)
        assert torch.equal(weights, torch.ones(10))
    late = bc_warmup.advantage_weights(torch.ones(3, dtype=torch.bool), lengths, task, 0.1, 0.9)
    assert late[0] > 1 > late[3] and late[8] == late[9]  # of two successes the faster one counts more


@pytest.mark.parametrize("head", ["tokens", "gaussian", "discrete"])
def test_a_loss_is_weighed_by_its_decision(head):
    """Weights of one change nothing, and one of zero leaves a decision out, but for its share of the mean."""
    torch.manual_seed(0)

    class Backbone(torch.nn.Module):
        chunk, action_dim, hidden_size, autoregressive, config = 2, 3, 8, False, {"name": "x"}
        vision_parameters = staticmethod(lambda: [1])

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Linear(8, 256)

        def action_logits(self, hidden):
            return self.logits(hidden)

        def forward(self, batch, vision, actions):
            return batch, None

    args = SimpleNamespace(
        head=head,
        label_sigma=0.0,
        temperature=1.0,
        greedy="mean",
        init_std=0.2,
        learn_std=False,
        deterministic=True,
    )
    space = gymnasium.spaces.Discrete(5) if head == "discrete" else gymnasium.spaces.Box(-1, 1, (3,))
    agent = bc_warmup.Agent(Backbone(), args, SimpleNamespace(single_action_space=space))
    hidden, mask = torch.randn(4, 6, 8), torch.rand(4, 6) < 0.7
    choices = {"tokens": 256, "discrete": 5}.get(head)
    targets = torch.randint(choices, (4, 6)) if choices else torch.rand(4, 6)
    plain = agent.imitation_loss(hidden, None, targets, mask, args, None)
    if choices:  # cross-entropy, a number at a time
        logits = agent.head.logits if head == "discrete" else agent.backbone.logits
        log_probs = [logits(hidden[b, n]).log_softmax(-1)[targets[b, n]] for b, n in mask.nonzero().tolist()]
        torch.testing.assert_close(plain, -sum(log_probs) / len(log_probs))
    assert torch.equal(agent.imitation_loss(hidden, None, targets, mask, args, None, torch.ones(4)), plain)
    rows = [slice(i, i + 1) for i in range(4)]
    parts = [
        agent.imitation_loss(hidden[i], None, targets[i], mask[i], args, None) * mask[i].sum() for i in rows
    ]
    weights = torch.tensor([0.0, 2.0, 0.5, 3.0])
    found = agent.imitation_loss(hidden, None, targets, mask, args, None, weights)
    wanted = sum(w * part for w, part in zip(weights, parts, strict=True)) / mask.sum()
    torch.testing.assert_close(found, wanted)


def test_of_rollouts_the_decisions_are_imitated():
    """Amid a chunk an action was chosen without the step being seen: it is a target, but no example."""
    rng, spaces = np.random.default_rng(3), {"image": gymnasium.spaces.Box(0, 255, (1, 4, 4, 3), np.uint8)}
    envs = SimpleNamespace(single_observation_space=spaces, active_dims=np.ones(2, bool))
    demos = dict(image=rng.integers(0, 256, (9, 1, 4, 4, 3), np.uint8), actions=rng.uniform(-1, 1, (9, 2)))
    demos |= dict(proprio=np.arange(9.0)[:, None], task=np.zeros(9, int), episode_starts=np.array([0, 5]))
    demos |= dict(success=np.array([True, False]), decided=np.r_[1, 0, 0, 1, 0, 1, 0, 0, 1] > 0)
    args = SimpleNamespace(chunk=3, demos="x", head="gaussian", advantage_weight=0.5, advantage_gamma=0.9)
    backbone = SimpleNamespace(config={}, from_env=lambda actions: actions)
    few = bc_warmup.imitation_tensors(demos, args, envs, backbone, "cpu")
    every = bc_warmup.imitation_tensors(demos | {"decided": np.ones(9, bool)}, args, envs, backbone, "cpu")
    assert few["proprio"][:, 0].tolist() == [0, 3, 5, 8] and len(every["proprio"]) == 9
    assert few.keys() == every.keys() and {"image", "targets", "mask", "weights"} <= few.keys()
    for key, x in every.items():
        assert torch.equal(few[key], x[[0, 3, 5, 8]]), key
    assert few["targets"][0].tolist() == pytest.approx(demos["actions"][:3].ravel().tolist())


# --- the command lines


@pytest.fixture(scope="module")
def warmup(tmp_path_factory):
    home = tmp_path_factory.mktemp("rollouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "reach", "reach_world")
        patch.setattr(reach_world, "DEMO_KEYS", {"overview": "agentview_rgb"}, raising=False)
        run(bc_warmup, BC, f"--chunk 5 --action-history 1 --output-dir {home} --run-name warmup")
        yield home / "warmup"


def collected(script, warmup, folder, name, flags=""):
    base = f"{EVAL} --checkpoint {warmup} --output-dir {folder} --collect 5"
    done = run(script, base, f"--save-dataset {folder}/{name}.hdf5 --run-name {name} {flags}")
    assert not (folder / name / "checkpoint.pt").exists()
    return folder / f"{name}.hdf5", results(folder / name), done.out


def read(path):
    demos = load_demonstrations(path, None, ("agentview_rgb",), 2)
    return demos | {"image": np.asarray(demos["image"])}


def test_training_layouts_are_played_with_samples_and_written(tmp_path, warmup):
    path, found, said = collected(ppo_vla, warmup, tmp_path, "a")
    demos, evaluation = read(path), found["collected"]
    assert evaluation["episodes"] == 5 and len(demos["episode_starts"]) == 5 and "final" not in found
    assert evaluation["success_rate"] == demos["success"].mean()
    assert evaluation["mean_length"] * 5 == len(demos["task"]) and f"5 episodes written to {path}" in said
    assert found["args"]["deterministic"] is False and found["args"]["action_history"] == 1
    assert demos["proprio"].shape[1] == 2  # the history is the reader's
    env = reach_world.make(split="train")
    for start, seed in zip(
        demos["episode_starts"], np.random.SeedSequence([3, 0, 0, 1]).generate_state(5), strict=True
    ):
        obs = env.reset(seed=int(seed))[0]
        assert np.array_equal(obs["image"], demos["image"][start])
        assert demos["instructions"][demos["task"][start]] == env.instructions[env.task]
    again = read(collected(ppo_vla, warmup, tmp_path, "b")[0])
    assert all(np.array_equal(demos[key], again[key]) for key in demos)
    greedy = read(collected(ppo_vla, warmup, tmp_path, "c", "--deterministic")[0])
    assert not np.array_equal(greedy["actions"][:5], demos["actions"][:5])
    other = read(collected(ppo_vla, warmup, tmp_path, "d", "--seed 4")[0])
    assert not np.array_equal(other["image"][0], demos["image"][0])


@pytest.mark.parametrize("script", [bc_warmup, grpo_vla])
def test_every_script_of_a_vla_collects(tmp_path, warmup, script):
    wanted = read(collected(ppo_vla, warmup, tmp_path, "a")[0])
    found = read(collected(script, warmup, tmp_path, "b", "--num-workers 1")[0])
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


def test_a_greedy_rollout_is_what_the_chunks_of_an_evaluation_do(tmp_path, warmup, monkeypatch):
    """One action at a time is the chunk, open loop: outcomes as of chunks in the worlds' processes."""
    _, found, _ = collected(bc_warmup, warmup, tmp_path, "a", "--deterministic")
    made, make_envs = [], evaluation.make_envs

    def in_chunks(args, split, *rest):
        made.append((args.chunk, split))
        return make_envs(SimpleNamespace(**vars(args) | {"chunk": 5}), split, *rest)

    monkeypatch.setattr(evaluation, "make_envs", in_chunks)
    monkeypatch.setattr(evaluation, "OpenLoop", lambda agent, k: setattr(agent, "chunk", k) or agent)
    idle = SimpleNamespace(ended=5, step=lambda *_: None)
    monkeypatch.setattr(evaluation, "recording", lambda *_: contextlib.nullcontext(idle))
    base = f"{EVAL} --checkpoint {warmup} --output-dir {tmp_path} --collect 5 --deterministic"
    run(bc_warmup, base, f"--save-dataset {tmp_path}/b.hdf5 --run-name b")
    assert made == [(1, "train")]
    assert results(tmp_path / "b")["collected"] == found["collected"]


def test_rollouts_are_cloned_by_filter_and_by_advantage(tmp_path, warmup):
    path, _, _ = collected(ppo_vla, warmup, tmp_path, "a")
    with h5py.File(path, "a") as file:  # whatever an untrained policy has done
        for i in range(5):
            file[f"data/demo_{i}"].attrs["success"] = i in (1, 3)
    short = f"{BC} --output-dir {tmp_path} --checkpoint {warmup} --demos {path}"
    said = run(bc_warmup, short, "--run-name few --demos-filter success").out
    assert "2 demonstrations of" in said and ", 2 successful" in said
    run(bc_warmup, short, "--run-name all")
    run(bc_warmup, short, "--run-name weighted --advantage-weight 0.3 --advantage-gamma 0.95")
    names = ("few", "all", "weighted")
    weights = {name: load_checkpoint(tmp_path / name)["agent"] for name in names}
    flat = {name: torch.cat([x.flatten() for x in each.values()]) for name, each in weights.items()}
    for name in ("few", "weighted"):
        assert (flat[name] - flat["all"]).abs().max() > 1e-5, name


def test_a_signal_keeps_the_episodes_that_have_ended(tmp_path, warmup, monkeypatch):
    step = Recording.step

    def stopped(self, *rest):
        step(self, *rest)
        if self.ended >= 3:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(Recording, "step", step)

    monkeypatch.setattr(Recording, "step", stopped)
    base = f"{EVAL} --checkpoint {warmup} --output-dir {tmp_path} --run-name a --collect 20"
    done = call(ppo_vla, base, f"--save-dataset {tmp_path}/a.hdf5")
    kept = len(read(tmp_path / "a.hdf5")["episode_starts"])
    assert done.code == 130 and 3 <= kept < 20 and f"{kept} episodes written" in done.out, done


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (ppo_vla, "--checkpoint WARMUP --collect 3", "need each other"),
        (ppo_vla, "--save-dataset x.hdf5", "need each other"),
        (grpo_vla, "--collect 3 --save-dataset x.hdf5", "--collect needs --checkpoint"),
        (ppo_vla, "--collect 3 --save-dataset x.hdf5 --evaluate --checkpoint WARMUP", "give one of them"),
        (ppo_vla, "--resume WARMUP --collect 3 --save-dataset x.hdf5", "resume it with that script"),
        (ppo_vla, "--collect -3 --save-dataset x.hdf5 --checkpoint WARMUP", "must not be negative"),
        (ppo_vla, f"{EVAL} --collect 3 --save-dataset . --checkpoint WARMUP", ". is a folder"),
        (ppo_vla, f"{EVAL} --collect 3 --save-dataset /dev/null/x --checkpoint WARMUP", "cannot be written"),
        (bc_warmup, "--demos-filter success", "need --demos"),
        (bc_warmup, "--advantage-weight 1", "need --demos"),
        (bc_warmup, "--advantage-gamma 0.5", "does nothing with --advantage-weight 0.0"),
        (bc_warmup, "--advantage-weight nan --demos x", "must be a finite number"),
        (bc_warmup, "--advantage-weight -1 --demos x", "must not be negative"),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, warmup, monkeypatch, script, flags, said):
    monkeypatch.chdir(tmp_path)
    done = call(script, flags.replace("WARMUP", str(warmup)), "--run-name bad")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
    assert not list(tmp_path.rglob("*.hdf5"))
