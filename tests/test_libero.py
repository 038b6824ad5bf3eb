"""LIBERO: the stock protocol bit for bit, a scripted controller, demonstrations, exact state, wrong input.

Needs requirements-libero.txt and the assets (LIBERO_ASSETS, or ../shared/data/libero_assets.tar.xz).
"""

import collections
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import UserError
from common.datasets import load_demonstrations
from common.envs import libero, simulation
from common.envs.vector import vectorize

RNG, WORLD = np.random.default_rng(0), ("libero", "common.envs.libero")


def physics(env):
    return np.r_[env.simulation.data.time, env.simulation.data.qpos, env.simulation.data.qvel]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# --- the assets

UPSTREAM = """
6de4776381809fdc  scenes/floor_lamp/visual/floor_lamp_vis.msh
6b2487166e07650b  scenes/kitchen_background/visual/kitchen_background_vis.msh
0efe7517df5bb767  scenes/kitchen_background_stove/visual/kitchen_background_stove_vis.msh
326c50b18dfce7d3  scenes/living_room/visual/living_room_vis.msh
8a646d98b084b740  stable_scanned_objects/akita_black_bowl/texture.png
6474d536a740e995  stable_scanned_objects/akita_black_bowl/visual/akita_black_bowl_vis.msh
89c2107a39ce27d7  stable_scanned_objects/basket/texture.png
51ca04e71fbca8a4  stable_scanned_objects/basket/visual/basket_vis.msh
6b742142bf0e29a9  stable_scanned_objects/plate/texture.png
a850aaf925421f49  stable_scanned_objects/white_bowl/texture.png
ea07fb85ab5ef716  turbosquid_objects/desk_caddy/desk_caddy_texture.png
bab4363b4e86e335  turbosquid_objects/porcelain_mug/porcelain_mug_texture.png
056fe075297343bd  turbosquid_objects/red_coffee_mug/red_coffee_mug_texture.png
152a4b711c33e8cb  turbosquid_objects/white_yellow_mug/white_yellow_mug_texture.png
3524386ee45899ff  turbosquid_objects/wooden_tray/crate_mat_BaseColor.png
"""  # what upstream's Git LFS pointers say of its large files, the first 64 bits


def test_the_packaged_assets_are_upstreams(assets):
    folder = libero._packaged_assets()
    if folder is None:
        pytest.skip("LIBERO'S PACKAGED ASSETS ARE NOT INSTALLED OR CHECKED: common/install.py --libero")
    for line in UPSTREAM.split("\n")[1:-1]:
        digest, name = line.split()
        assert hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest().startswith(digest), name


# --- the protocol


@pytest.mark.slow
def test_in_a_worker_with_chunks(assets):
    """Two environments of two tasks in one process, chunks of actions, exact resume in another worker."""
    world = (*WORLD, dict(suite="libero_object", tasks=("0", "5"), split="eval", size=32, horizon=6))
    actions = RNG.uniform(-1, 1, (3, 2, 2, 7)).astype(np.float32)
    envs = vectorize(world, 2, seed=0, chunk=2, num_workers=1, autoreset=False)
    first = envs.reset(np.array([0, 1]))
    assert first["task"].tolist() == [0, 5] and first["image"].shape == (2, 1, 32, 32, 3)
    assert envs.instructions[5] == "pick up the tomato sauce and place it in the basket"
    envs.step(actions[0])
    state = envs.get_state()
    expected = [envs.step(chunk) for chunk in actions[1:]]
    assert expected[-1][3].all() and not expected[-1][2].any()
    envs.close()
    envs = vectorize(world, 2, seed=0, chunk=2, num_workers=1, autoreset=False)
    envs.set_state(state)
    for chunk, (obs, *_) in zip(actions[1:], expected, strict=True):
        assert same(envs.step(chunk)[0], obs)
    envs.close()


@pytest.mark.parametrize(
    "suite,task", [("libero_goal", 2), pytest.param("libero_spatial", 4, marks=pytest.mark.slow)]
)
def test_stock_loop_bit_for_bit(assets, suite, task):
    """openvla-oft's run_libero_eval.py with LIBERO's own OffScreenRenderEnv, and ours in another order;
    tasks with a stove, and with a bowl in a drawer."""
    package = libero._libero()
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    root, description = Path(package.__file__).parent, list(package.benchmark.task_maps[suite].values())[task]
    bddl = str(root / "bddl_files" / suite / description.bddl_file)
    states = torch.load(root / "init_files" / suite / description.init_states_file, weights_only=False)
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 3, 7)).astype(np.float32)
    stock = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=64, camera_widths=64)
    stock.seed(0)
    expected = collections.defaultdict(list)
    for episode in range(2):
        stock.reset()
        obs = stock.set_init_state(states[episode])
        for t in range(13):
            obs, _, done, _ = stock.step([0, 0, 0, 0, 0, 0, -1] if t < 10 else actions[episode, t - 10])
            if t >= 9:
                pictures = [obs[f"{name}_image"][::-1, ::-1] for name in ("agentview", "robot0_eye_in_hand")]
                axis_angle = quat2axisangle(obs["robot0_eef_quat"].copy())
                proprio = np.r_[obs["robot0_eef_pos"], axis_angle, obs["robot0_gripper_qpos"]]
                state = stock.sim.get_state().flatten()
                expected[episode].append((np.stack(pictures), proprio.astype(np.float32), state, bool(done)))
    stock.sim._render_context_offscreen.gl_ctx.make_current()
    stock.close()
    env = libero.make(suite=suite, tasks=[task], split="eval", cameras=("agentview", "wrist"), size=64)
    for episode in (1, 0):
        obs, done = env.reset(seed=episode)[0], False
        for t, (image, proprio, state, stock_done) in enumerate(expected[episode]):
            if t:
                obs, _, done, _, _ = env.step(actions[episode, t - 1])
            assert np.array_equal(physics(env), state) and done == stock_done
            assert np.array_equal(obs["proprio"], proprio)
            assert np.array_equal(obs["image"], image)
    fixtures = env.simulation.model.body_pos[env.simulation.fixtures].copy()
    env.reset(seed=1)  # another placement of the fixtures in the next episode, but for SimpleVLA-RL the same
    assert not np.array_equal(fixtures, env.simulation.model.body_pos[env.simulation.fixtures])
    other = libero.make(suite=suite, tasks=[task], split="eval", protocol="simplevla", size=64)
    other.reset(seed=1)
    assert np.array_equal(fixtures, other.simulation.model.body_pos[other.simulation.fixtures])
    assert (env.max_steps, other.max_steps) == (libero.PROTOCOLS["oft"][suite], 512)
    env.close()
    other.close()


class FakeSimulation:
    """Records how episodes begin."""

    WORKER_GB, TASK_GB = 1.5, 0.4

    def __init__(self, suite, task, size):
        self.task, self.owner, self.log, self.renderers = task, None, LOG, "the GPU's memory"

    def save(self):
        return {}

    def load(self, state):
        pass

    def release(self):
        self.renderers = None

    def begin_fixed(self, state, resets):
        self.log.append((self.task, state, resets))

    def begin_random(self, seed):
        self.log.append((self.task, int(seed)))


LOG = []


@pytest.fixture
def fake(monkeypatch):
    tasks = {f"t{i}": types.SimpleNamespace(language=f"do {i % 4}") for i in range(5)}
    maps = dict.fromkeys(libero.SUITES, tasks)
    package = types.SimpleNamespace(benchmark=types.SimpleNamespace(task_maps=maps))
    monkeypatch.setattr(libero, "_libero", lambda: package)
    monkeypatch.setattr(libero, "Simulation", FakeSimulation)
    monkeypatch.setattr(simulation, "simulations", {})
    monkeypatch.setattr(simulation, "_open", weakref.WeakSet())
    monkeypatch.setattr(libero.LiberoEnv, "observe", lambda self: {})
    LOG.clear()


def test_evaluation_seeds_enumerate_tasks_and_states(fake):
    env = libero.make(split="eval", tasks=("3", "do 1"))
    for k in range(100):
        env.reset(seed=k)
    assert [([3, 1][k % 2], k // 2, k // 2) for k in range(100)] == LOG
    assert len(set(LOG)) == 100
    env.reset(seed=100)
    assert LOG[-1] == LOG[0]
    env = libero.make(split="eval", protocol="simplevla")
    env.reset(seed=23)
    assert LOG[-1] == (3, 4, 0)
    env.reset()  # goes on with the environment's own random state
    first = LOG[-1]
    env.reset(seed=23)
    env.reset()
    assert LOG[-1] == first


def test_training_draws(fake):
    env = libero.make(tasks=(0, 2, 4))
    env.reset(seed=7)
    for _ in range(60):
        env.reset()
    assert {len(entry) for entry in LOG} == {2} and len({seed for _, seed in LOG}) == 61
    counts = collections.Counter(task for task, _ in LOG)
    assert set(counts) == {0, 2, 4} and min(counts.values()) > 8
    again = list(LOG[:3])
    LOG.clear()
    env.reset(seed=7)
    env.reset()
    env.reset()
    assert again == LOG
    LOG.clear()
    env = libero.make(tasks=(0,), train_on_eval_states=True)
    for k in range(400):
        env.reset(seed=k)
    assert {entry for entry in LOG} == {(0, i, i) for i in range(50)}


def test_simulations_are_kept_while_memory_allows(fake, monkeypatch):
    """Four fit beside the margin; the least recently used that no episode runs in gives way to a fifth."""
    each, kept_ones = 0.4, simulation.simulations
    monkeypatch.setattr(simulation, "GPUS", 1)  # whose memory only running episodes take
    monkeypatch.setattr(simulation, "memory", lambda kind: ([each], 3.2 - each * len(kept_ones)))
    one, two = libero.make(split="eval"), libero.make(split="eval")
    two.reset(seed=0)
    for task in (1, 2, 1):
        one.reset(seed=task)
    kept = one.simulation
    one.reset(seed=3)
    assert [task for _, task, _ in kept_ones] == [0, 2, 1, 3]
    one.reset(seed=4)
    assert [task for _, task, _ in kept_ones] == [0, 1, 3, 4]
    assert [bool(x.renderers) for x in kept_ones.values()] == [True, False, False, True]
    one.reset(seed=1)
    assert one.simulation is kept
    monkeypatch.setattr(simulation, "memory", lambda kind: ([each], 0.1))
    one.reset(seed=2)
    assert [task for _, task, _ in kept_ones] == [0, 2]
    one.close()
    assert len(kept_ones) == 2
    one.reset(seed=2)
    two.close()
    one.close()
    assert not kept_ones


def test_resets_are_replayed_once():
    """Reset k begins from the random state that reset k - 1 left."""
    placed = []
    simulation = types.SimpleNamespace(
        random_states=[0], _place=lambda state, k: placed.append((state, k)) or 10 * (k + 1),
        wrapper=types.SimpleNamespace(set_init_state=placed.append), states="abcd", _settle=lambda: None,
    )  # fmt: skip
    for resets, expected in ((2, [(0, 0), (10, 1), (20, 2), "c"]), (3, [(30, 3), "d"]), (1, [(10, 1), "b"])):
        placed.clear()
        libero.Simulation.begin_fixed(simulation, resets, resets)
        assert placed == expected
    assert simulation.random_states == [0, 10, 20, 30, 40]


# --- the real simulator


@pytest.fixture(scope="module")
def env(assets):
    env = libero.make(suite="libero_object", tasks=(0,), size=48)
    env.reset(seed=0)
    yield env
    env.close()


def write_demonstration(path, env, seed):
    """The expert's episode in the layout of LIBERO's own files -> is it solved, observations."""
    obs, seen, actions, states, robot = env.reset(seed=seed)[0], [], [], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        action = env.expert()
        seen.append(obs)
        actions.append(action)
        states.append(physics(env))
        robot.append(np.zeros(9))
        obs, reward, terminated, truncated, info = env.step(action)
    proprio = np.stack([obs["proprio"] for obs in seen])
    ends = np.r_[np.zeros(len(actions) - 1), 1].astype(np.uint8)
    problem = env.simulation.env.parsed_problem
    info_json = {"problem_name": problem["problem_name"], "domain_name": "robosuite"}
    info_json["language_instruction"] = " ".join(problem["language_instruction"])
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps(info_json)
        data.attrs["bddl_file_name"] = "libero/bddl_files/libero_object/" + env.simulation.task.bddl_file
        data.attrs["env_args"] = json.dumps({"type": 1, "env_name": "Libero_Floor_Manipulation"})
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["num_demos"], data.attrs["total"] = 1, len(actions)
        demo = data.create_group("demo_0")
        demo.attrs["num_samples"], demo.attrs["init_state"] = len(actions), states[0]
        demo["actions"] = np.stack(actions).astype(np.float64)
        demo["states"], demo["robot_states"], demo["rewards"], demo["dones"] = states, robot, ends, ends
        names = {"ee_pos": slice(0, 3), "ee_ori": slice(3, 6), "ee_states": slice(0, 6)}
        for name, part in (names | {"gripper_states": slice(6, 8)}).items():
            demo[f"obs/{name}"] = proprio[:, part].astype(np.float64)
        for i, name in enumerate(("agentview_rgb", "eye_in_hand_rgb")):  # OpenGL's, upside down
            demo[f"obs/{name}"] = np.stack([obs["image"][i, ::-1, ::-1] for obs in seen])
    return bool(reward == 1 and info["success"] and terminated and not truncated), seen


def test_expert_demonstrations_and_replay(assets, tmp_path):
    env = libero.make(suite="libero_object", tasks=(0,), cameras=("agentview", "wrist"), size=32)
    solved, seen = write_demonstration(tmp_path / "soup_demo.hdf5", env, seed=3)
    assert solved and 90 < len(seen) < 200
    demos = load_demonstrations(tmp_path / "soup_demo.hdf5")
    for key in ("image", "proprio"):
        turned = np.asarray(demos[key])
        turned = turned[:, :, ::-1, ::-1] if key == "image" else turned
        assert np.array_equal(turned, np.stack([obs[key] for obs in seen]))
    assert set(np.unique(demos["actions"][:, 6])) == {-1, 1}
    hands = demos["proprio"][:, 6] - demos["proprio"][:, 7]  # m between the fingers
    assert hands[0] > 0.04 and hands[40:80].min() < 0.075 and demos["proprio"][40:100, 2].max() > 0.2
    env.reset(seed=3)
    successes = [env.advance(action)[3]["success"] for action in demos["actions"]]  # rendering nothing
    assert successes == [False] * (len(successes) - 1) + [True]
    env.close()


def won(env, seed, noise=0.3):
    """Whether the expert solves an episode, its actions executed with noise; nothing is rendered."""
    env.reset(seed=seed)
    rng, success, truncated = np.random.default_rng(seed), False, False
    while not (success or truncated):
        noisy = env.expert() + noise * rng.standard_normal(7) * [1, 1, 1, 0, 0, 0.5, 0]
        _, success, truncated, _ = env.advance(noisy)
    return success


TASKS = [(suite, task) for suite, tasks in libero.EXPERTS.items() for task in tasks]


@pytest.mark.parametrize(("suite", "task"), [("libero_object", 2), ("libero_spatial", 2)])
def test_the_expert_succeeds(assets, suite, task):
    """A tall bottle into the basket, and a bowl, wider than the hand, onto the plate."""
    env = libero.make(suite=suite, tasks=(task,), size=48, horizon=200)
    assert [won(env, seed) for seed in (0, 1)] == [True, True]
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), TASKS)
def test_the_expert_succeeds_in_eight_of_ten(assets, suite, task):
    env = libero.make(suite=suite, tasks=(task,), size=48)
    assert np.mean([won(env, seed) for seed in range(100, 120)]) >= 0.8
    env.close()


@pytest.mark.slow
def test_demonstrations_are_of_fresh_states_and_succeed_replayed(env, monkeypatch):
    """Whatever the number of workers."""
    flags = dict(suite="libero_object", tasks=("0",), size=48, noise=0.2)
    demos = libero.demonstrations(2, 5, num_workers=2, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(libero.Simulation, "begin_fixed", None)
        patch.setattr(libero.Simulation, "render", lambda *_: np.zeros((48, 48, 3), np.uint8))  # is slow
        blind = libero.demonstrations(2, 5, num_workers=0, **flags)
    assert demos.keys() == blind.keys()
    assert all(demos[key].tobytes() == x.tobytes() for key, x in blind.items() if key != "image")
    size, starts = len(demos["task"]), demos["episode_starts"]
    assert starts[0] == 0 and len(starts) == 2 and demos["image"].shape == (size, 1, 48, 48, 3)
    assert demos["proprio"].shape == (size, 8) and demos["pixels"].shape == (size, 1, 2, 2)
    assert demos["actions"].dtype == demos["executed"].dtype == demos["pixels"].dtype == np.float32
    assert np.abs(demos["actions"]).max() <= 1 and not np.array_equal(demos["actions"], demos["executed"])
    seeds = np.random.default_rng([1, 5]).integers(2**31, size=2)
    things = (env.simulation.free[:, None] + [0, 1]).flatten()
    fixed = env.simulation.states[:, 1:][:, things]
    for seed, start, actions in zip(seeds, starts, np.split(demos["executed"], starts[1:]), strict=True):
        assert same(env.reset(seed=int(seed))[0], {key: demos[key][start] for key in env.observation_space})
        assert np.abs(fixed - env.simulation.data.qpos[things]).max(1).min() > 1e-3
        ends = [env.advance(action)[3]["success"] for action in actions]
        assert ends == [False] * (len(ends) - 1) + [True]


def test_pixels_are_where_the_thing_is_seen(assets):
    """What changes in the pictures when the thing is taken away; and the basket, out of the hand's sight."""
    env = libero.make(suite="libero_object", tasks=(0,), cameras=("agentview", "wrist"), size=48)
    env.reset(seed=0)
    for _ in range(30):
        env.advance(env.expert())
    env.expert()  # computes the state as it is now
    simulation = env.simulation
    simulation.seen = simulation.data.qpos.copy(), simulation.seen[1]
    pixels, before = env.pixels(), env.observe()["image"].astype(int)
    thing = simulation.env.objects_dict[simulation.env.obj_of_interest[0]]
    simulation.seen[0][simulation.model.joint(thing.joints[0]).qposadr[0] + 2] += 9
    gone = np.abs(env.observe()["image"] - before).sum(-1) > 30
    for there, (x, y) in zip(gone, pixels[:, 0], strict=True):
        rows, columns = np.nonzero(there)
        assert len(rows) > 5
        np.testing.assert_allclose([x, y], [columns.mean() / 24 - 1, rows.mean() / 24 - 1], atol=0.12)
    assert np.isfinite(pixels[0, 1]).all() and np.isnan(pixels[1, 1]).all()
    env.close()


def test_tasks_without_an_expert_are_told(fake):
    known = "--tasks libero_object 0 1 2 3 4 5 6 7 8 9; libero_spatial 0 1 2 3 5 6 7 8"
    for suite, task in (("libero_spatial", 4), ("libero_goal", 0)):
        env = libero.make(suite=suite, tasks=(task,))
        with pytest.raises(UserError, match=f"{suite} has no scripted expert for task {task}; .*{known}"):
            env.expert()


def test_actions_and_gripper_have_the_documented_sign_and_scale(env):
    for dimension in range(3):
        env.reset(seed=1)
        before, action = env.observe()["proprio"], np.zeros(7, np.float32)
        action[dimension], action[6] = 0.5, -1
        for _ in range(8):
            env.advance(action)
        moved = env.observe()["proprio"][:3] - before[:3]
        assert 0.03 < moved[dimension] < 0.1 and np.abs(np.delete(moved, dimension)).max() < 0.01
    fingers = []
    for gripper in (-0.2, 1.0, -1.0):
        for _ in range(12):
            env.advance(np.array([0, 0, 0, 0, 0, 0, gripper]))
        fingers.append(np.ptp(env.observe()["proprio"][6:]))
    assert fingers[0] > 0.07 and fingers[1] < 0.01 and fingers[2] > 0.07


def test_training_states_are_fresh_and_repeatable(env):
    seen = []
    for seed in (5, 6, 5):
        obs, _ = env.reset(seed=seed)
        seen.append((physics(env), obs))
    assert same(seen[0][1], seen[2][1]) and np.array_equal(seen[0][0], seen[2][0])
    assert not np.array_equal(seen[0][0], seen[1][0])
    joints = env.simulation.states[:, 1:8]
    env.simulation._place(np.random.RandomState(0).get_state(), noise=0.02)
    placed = env.simulation.data.qpos.copy()
    assert np.abs(env.simulation.states[:, 1 : 1 + len(placed)] - placed).max(1).min() > 1e-3
    assert 0.015 < joints.std(0).mean() < 0.025  # the noise that begin_random gives the arm's joints
    assert env.simulation.states.shape[0] == libero.NUM_STATES
    random_state = np.random.get_state()[1].copy()
    env.reset(seed=5)
    assert np.array_equal(np.random.get_state()[1], random_state)  # numpy's own is left alone


def test_time_limit_video_and_spaces(env):
    limited = libero.make(suite="libero_object", tasks=(0,), size=48, horizon=3)
    obs, _ = limited.reset(seed=0)
    assert limited.observation_space.contains(obs) and obs["task"] == 0
    ends = [limited.advance(np.zeros(7))[1:3] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    frame = limited.render()
    assert frame.shape == (48, 96, 3) and frame.dtype == np.uint8 and frame.std() > 20
    assert np.array_equal(frame[:, :48], limited.observe()["image"][0, :, ::-1])  # the policy's is mirrored
    sky, floor = frame[:8, :48].mean(), frame[-8:, :48].mean()
    assert floor > sky  # upright: the lit floor is below
    limited.close()


def test_environments_take_turns_and_states_are_exact(env):
    """Two episodes interleaved in one simulation equal each alone; a saved state goes on, in another too."""
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 4, 7)).astype(np.float32)
    pair = [libero.make(suite="libero_object", tasks=(0,), size=48) for _ in range(2)]
    alone = [[e.reset(seed=i)[0]] + [e.step(a)[0] for a in actions[i]] for i, e in enumerate(pair)]
    assert pair[0].simulation is pair[1].simulation is env.simulation
    together = [[e.reset(seed=i)[0]] for i, e in enumerate(pair)]
    for t in range(4):
        if t == 2:
            saved = pair[0].get_state()
        for i in (1, 0):
            together[i].append(pair[i].step(actions[i, t])[0])
    assert all(same(a, b) for i in range(2) for a, b in zip(alone[i], together[i], strict=True))
    pair[1].set_state(saved)
    resumed = [pair[1].observe()] + [pair[1].step(a)[0] for a in actions[0, 2:]]
    assert all(same(a, b) for a, b in zip(alone[0][2:], resumed, strict=True)) and pair[1].steps == 4
    assert pair[0].np_random.integers(2**32) == pair[1].np_random.integers(2**32)
    for e in pair:
        e.close()
    assert env.simulation in simulation.simulations.values()


def test_a_kept_simulation_begins_the_same_episode(env, monkeypatch):
    other = libero.make(suite="libero_object", tasks=(0, 5), split="eval", size=48)
    first, began = other.reset(seed=3)[0], physics(other)
    assert other.simulation.random_states is libero._random_states["libero_object", 5]
    other.step(np.ones(7))
    other.reset(seed=0)
    assert other.simulation is env.simulation
    monkeypatch.setattr(libero, "Simulation", None)  # nothing is compiled
    assert same(other.reset(seed=3)[0], first) and np.array_equal(physics(other), began)
    other.close()


# --- pure functions and wrong input


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({}, None),
        ({"LOCAL_RANK": "1"}, "1"),
        ({"LOCAL_RANK": "5"}, "1"),  # more processes than GPUs
        ({"CUDA_VISIBLE_DEVICES": "2"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "3, 2", "LOCAL_RANK": "1"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "7", "LOCAL_RANK": "0"}, None),  # no such device: EGL sees other GPUs
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f3a,GPU-91c2", "LOCAL_RANK": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "1"}, None),
        ({"MUJOCO_EGL_DEVICE_ID": "0", "LOCAL_RANK": "1"}, None),
    ],
)
def test_egl_device_of_a_rank(environ, expected):
    assert simulation.egl_device(environ, 4).get("MUJOCO_EGL_DEVICE_ID") == expected


@pytest.mark.parametrize("angle", [1e-6, 0.7, 3.0, 4.5])
def test_axis_angle(angle):
    axis = np.array([2.0, -1, 2]) / 3
    turned = simulation.axis_angle(np.r_[np.cos(angle / 2), np.sin(angle / 2) * axis])
    np.testing.assert_allclose(turned, axis * angle, atol=1e-9, rtol=1e-4)
    assert np.array_equal(simulation.axis_angle(np.array([1.0, 0, 0, 0])), np.zeros(3))


def test_unknown_names_are_told(fake):
    for kwargs, words in (
        (dict(suite="libero_spatail"), ("'libero_spatail'", "libero_spatial")),
        (dict(split="test"), ("'test'", "eval")),
        (dict(protocol="rlinf"), ("'rlinf'", "simplevla")),
        (dict(cameras=("front",)), ("'front'", "wrist")),
        (dict(cameras=()), ("camera", "agentview")),
        (dict(tasks=("5",)), ("'5'", "0 to 4")),
        (dict(tasks=("open the fridge",)), ("open the fridge", "instructions")),
        (dict(size=0), ("size",)),
        (dict(horizon=-1), ("horizon",)),
    ):
        with pytest.raises(UserError) as error:
            libero.make(**kwargs)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-libero.txt"):
        libero._libero.__wrapped__()


def test_assets_missing(assets, monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "/mine")
    package = libero._libero()
    monkeypatch.setattr(package, "_assets_path_cache", package._assets_path_cache)
    with pytest.raises(UserError, match="LIBERO_ASSETS"):
        libero._libero.__wrapped__()
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere; set LIBERO_ASSETS"):
        libero._libero.__wrapped__()
    assert os.environ["LIBERO_CONFIG_PATH"] == "/mine"


def test_no_gl(env, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no\ndisplay")

    monkeypatch.setattr(simulation.mujoco, "Renderer", broken)
    monkeypatch.setattr(env.simulation, "renderers", {})
    with pytest.raises(UserError, match="no display; install EGL.*MUJOCO_EGL_DEVICE_ID.*MUJOCO_GL"):
        env.observe()


def test_no_gl_at_import():
    """Which mujoco loads, or fails to, in the first import of a process."""
    code = f"from common.envs.vector import vectorize; vectorize({(*WORLD, {})}, 1, seed=0, num_workers=0)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=os.environ | {"MUJOCO_GL": "none"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("common.UserError: robosuite needs OpenGL, which failed with ")
    assert "install EGL" in last


def test_a_worker_renders_what_this_process_renders(env):
    """OpenGL, in use here, does not survive a fork: the worker is none of this process's."""
    env.reset(seed=0)
    world = (*WORLD, dict(suite="libero_object", size=32))
    pictures = []
    for num_workers in (0, 1):
        envs = vectorize(world, 1, seed=0, num_workers=num_workers)
        pictures.append(envs.reset(seeds=[3])["image"])
        envs.close()
    assert pictures[0].any() and np.array_equal(*pictures)


def test_memory_is_short(monkeypatch):
    monkeypatch.setattr(simulation, "available_memory", lambda: 1e8)
    with pytest.raises(UserError, match="--env libero takes 1.5 GB for each .* use fewer --num-workers"):
        simulation.check_memory(libero.Simulation)
    monkeypatch.setattr(simulation, "available_memory", lambda: 2e9)
    simulation.check_memory(libero.Simulation)
