"""OGBench: its single-task environments as a world, its data sets read and made (common/ogbench.py), and the
offline scripts on them."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from test_cli import (  # noqa: F401 (one is a fixture)
    assert_same_run,
    call,
    one_thread,
    results,
    run,
    shell,
    stopped_by,
)

import cql
import decision_transformer
import iql
import sac
import td3_bc
from common import UserError
from common import ogbench as data
from common.datasets import load_dataset
from common.envs import make_envs, world_flags
from common.envs import ogbench as world
from common.run import read_flags

HERE = all(importlib.util.find_spec(name) for name in world.PACKAGES)
ROOT = Path(iql.__file__).parent
TASK = "cube-single-singletask-task2-v0"
NAME = "cube-single-play-singletask-task2-v0"
SMALL = "--width 16 --depth 1 --batch-size 8 --eval-episodes 3 --eval-envs 2 --seed 3 --device cpu"
SMALL += " --total-timesteps 30 --eval-freq 0 --save-freq 10"

needs_ogbench = pytest.mark.skipif(
    not HERE,
    reason="OGBENCH IS NOT INSTALLED, ITS WORLD AND DATA ARE NOT TESTED: python3 common/install.py --ogbench",
)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def made(folder, name, *flags):
    """The file that `python -m common.ogbench` makes, in this process."""
    data.main([name, "--out", str(folder), "--workers", "1", *map(str, flags)])
    with np.load(folder / f"{name}-v0.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ogbench")
    made(folder, "cube-single-play", "--episodes", 2, "--steps", 51)
    made(folder, "pointmaze-medium-navigate", "--episodes", 2, "--steps", 101)
    return folder


# --- what needs no package


def test_without_the_package_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world.importlib.util, "find_spec", lambda name: None)
    wanted = "OGBench needs ogbench, dm_control, dm_env, lxml, scipy: python3 common/install.py --ogbench"
    with pytest.raises(UserError, match=wanted):
        world.make(TASK, "eval")
    with pytest.raises(SystemExit):
        data.main(["cube-single-play", "--out", str(tmp_path)])
    assert capsys.readouterr().err == f"error: {wanted}\n"
    np.savez(tmp_path / "cube-single-play-v0.npz", terminals=np.array([0, 1]), **dict.fromkeys(
        ("observations", "actions", "qpos"), np.ones((2, 30), np.float32)))  # fmt: skip
    done = call(iql, f"--dataset {tmp_path}/{NAME}")
    assert done.code == 2 and done.err == f"error: {wanted}\n"


@pytest.mark.parametrize(
    "name, words",
    [
        ("cube-single-play-singletask-task6-v0", "is no task of OGBench's cube, scene, puzzle"),
        ("antmaze-large-navigate-singletask-v0", "is no task of OGBench's cube, scene, puzzle"),
        ("cube-single-play-v0.npz", "give one, as cube-single-play-singletask-task2-v0"),
        ("visual-cube-single-play-singletask-v0", "is no task of OGBench's"),
        (NAME, "single-play-v0.npz is not there; make it: python -m common.ogbench cube-single-play\n"),
        ("FOLDER/scene-noisy-singletask-v0", "make it: python -m common.ogbench scene-noisy --out FOLDER\n"),
        ("FOLDER/puzzle-3x3-play-singletask-v0", "puzzle-3x3-play-v0.npz is damaged or not of "),
        ("FOLDER/puzzle-4x4-play-singletask-v0", "has no array 'qpos'"),
        ("FOLDER/puzzle-4x5-play-singletask-v0", "has NaN or infinity in 'actions', row 1"),
    ],
)  # fmt: skip
def test_wrong_names_and_files_are_one_sentence(tmp_path, monkeypatch, name, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "puzzle-3x3-play-v0.npz").write_bytes(b"PK\3\4 no file")
    columns = {"terminals": [0, 0, 1], "observations": np.ones((3, 2)), "actions": np.ones((3, 2))}
    np.savez(tmp_path / "puzzle-4x4-play-v0.npz", **columns)
    columns["actions"][1] = np.nan
    np.savez(tmp_path / "puzzle-4x5-play-v0.npz", qpos=np.ones((3, 20)), **columns)
    done = call(iql, f"--dataset {name.replace('FOLDER', str(tmp_path))} --output-dir {tmp_path}/runs")
    assert done.code == 2 and words.replace("FOLDER", str(tmp_path)) in done.err, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ("antmaze-large-navigate", "is none of OGBench's cube, scene, puzzle"),
        ("cube-single-play --episodes 0", "--episodes must be positive"),
        ("cube-single-play --steps 1", "--steps above 1"),
        ("cube-single-play --seed -1", "no number negative"),
        ("scene-play", "scene-play-v0.npz is there already; delete it, or give another --out"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(data, "check_installed", lambda: None)
    (tmp_path / "scene-play-v0.npz").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        data.main([*words.split(), "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1, err


def test_presets_are_the_published_settings():
    """arXiv:2502.02538, tables 5 to 7 and appendix E.2; ReBRAC's on D4RL, arXiv:2305.09836."""

    def args(script, name, *words):
        return read_flags(["--dataset", name, *words], script.Args, script.PRESETS, script.__name__)[0]

    networks = dict(depth=4, activation="gelu", layer_norm=True, normalize=False, normalize_rewards=False)
    common = networks | dict(batch_size=256, gamma=0.99, tau=0.005, eval_episodes=50, learning_rate=3e-4)
    common |= dict(critic_learning_rate=3e-4, reward_scale=1.0, reward_bias=0.0, total_timesteps=10**6)
    own = dict(expectile=0.9, joint_step=True, learn_std=False, anneal_lr=False, max_weight=100.0, width=256)
    td3 = dict(loss="rebrac", width=512, policy_delay=2, policy_noise=0.2, noise_clip=0.5)
    for name, temperature, actor, critic in (
        ("cube-single", 1.0, 1.0, 0.0), ("cube-double", 0.3, 0.1, 0.0), ("scene", 10.0, 0.1, 0.01),
        ("puzzle-3x3", 10.0, 0.3, 0.01), ("puzzle-4x4", 3.0, 0.3, 0.01),
    ):  # fmt: skip
        for dataset in (f"{name}-play-singletask-v0", f"data/{name}-noisy-singletask-task3-v0"):
            found = vars(args(iql, dataset))
            assert {key: found[key] for key in common | own} == common | own
            assert found["temperature"] == temperature
            found = vars(args(td3_bc, dataset))
            assert {key: found[key] for key in common | td3} == common | td3
            assert (found["actor_bc"], found["critic_bc"]) == (actor, critic)
            assert args(td3_bc, dataset, "--loss", "td3+bc", "--alpha", "0").alpha == 0
    for name, actor, critic in (
        ("hopper-medium-v2", 0.01, 0.01), ("hopper-medium-replay-v2", 0.05, 0.5),
        ("halfcheetah-medium-expert-v2", 0.01, 0.1), ("walker2d-expert-v2", 0.01, 0.5),
        ("antmaze-umaze-diverse-v2", 0.003, 0.001), ("antmaze-large-play-v2", 0.002, 0.001),
    ):  # fmt: skip
        found = args(td3_bc, name)
        assert (found.actor_bc, found.critic_bc, found.loss) == (actor, critic, "td3+bc")
    assert args(iql, "D4RL/pointmaze/umaze-v2") == iql.Args(dataset="D4RL/pointmaze/umaze-v2")


# --- the world


@needs_ogbench
@pytest.mark.parametrize("family", ["scene", "pointmaze-teleport", slow("cube-single"), slow("puzzle-3x3")])
def test_the_world_is_its_stock_environment_and_follows_from_its_seed(family):
    """Also where its history, and numpy's generator, are others; and a state is exact."""
    task = f"{family}-singletask-v0"
    env, other = world.make(task, "eval"), world.make(task, "eval")
    stock = gymnasium.make(f"ogbench:{task}")
    actions = np.random.default_rng(0).uniform(-1, 1, (40, *env.action_space.shape)).astype(np.float32)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    env.reset(seed=8)
    for action in actions[:5]:
        env.step(action)
    first = env.reset(seed=7)[0]["proprio"]
    seen = [env.step(action) for action in actions]
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert np.array_equal(other.reset(seed=7)[0]["proprio"], first)
    if "maze" not in task:  # it draws its start from numpy's generator
        seed = int(np.random.Generator(np.random.PCG64([1, 7])).integers(2**31))
        assert np.array_equal(stock.reset(seed=seed)[0].astype(np.float32), first)
    state, rest = None, []
    for t, action in enumerate(actions):
        obs, reward, *ends, info = other.step(action)
        wanted = seen[t]
        assert np.array_equal(obs["proprio"], wanted[0]["proprio"]) and (reward, *ends) == wanted[1:4]
        assert bool(info["success"]) == bool(wanted[4]["success"])
        if "maze" not in task:
            theirs = stock.step(action)
            assert np.array_equal(theirs[0].astype(np.float32), obs["proprio"]) and theirs[1] == reward
        if t == 20:
            state = other.get_state()
    env.set_state(state)
    for action in actions[21:]:
        rest.append(env.step(action)[0]["proprio"])
    assert np.array_equal(rest, [x[0]["proprio"] for x in seen[21:]])


@needs_ogbench
def test_training_and_evaluation_begin_elsewhere():
    task = "pointmaze-medium-singletask-v0"
    first, second = (world.make(task, split).reset(seed=7)[0]["proprio"] for split in world.SPLITS)
    assert not np.isin(first, second).any()


@needs_ogbench
def test_a_step_from_where_the_task_is_solved_is_a_success_and_the_last():
    env = world.make(TASK, "eval")
    env.reset(seed=1)
    inner, still = env.env.unwrapped, np.zeros(5, np.float32)
    assert env.step(still)[1] == -1
    inner.data.joint("object_joint_0").qpos[:3] = 0.5, 0, 0.02  # the task's goal
    found = [env.step(still)[1:] for _ in range(2)]
    assert [x[0] for x in found] == [0, 0] and [x[1] for x in found] == [False, True]
    assert [bool(x[3]["success"]) for x in found] == [False, True] and env.has_success


@needs_ogbench
def test_the_worlds_flags(tmp_path):
    args = iql.Args(env="ogbench")
    assert world_flags(args) == {"max_episode_steps": 0, "env_kwargs": "{}", "task": TASK}
    vars(args).update(task="pointmaze-medium-singletask-v0", max_episode_steps=3)
    envs = make_envs(args, "eval", 2, states=True)
    envs.reset(np.arange(2))
    ended = [envs.step(np.zeros((2, 1, 2), np.float32))[3].tolist() for _ in range(3)]
    assert ended == [[False] * 2, [False] * 2, [True] * 2] and envs.has_success
    for task, words in (
        (
            "cube-single-v0",
            "--task cube-single-v0 is no single task; give one, as cube-single-singletask-task2-v0",
        ),
        ("cube-single-singletask-task7-v0", "unknown environment 'ogbench:cube-single-singletask-task7-v0'"),
    ):
        done = call(sac, f"--env ogbench --task {task} --output-dir {tmp_path}")
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done


# --- reading


@needs_ogbench
def test_rewards_by_hand():
    """Minus one, or nothing where the cube's centre is within 4 cm of the goal, (0.5, 0, 0.02) in task 2."""
    places = [
        [0.35, 0, 0.02],
        [0.5, 0.0399, 0.02],
        [0.5, 0.0401, 0.02],
        [0.523, 0.0, 0.0527],
        [0.524, 0, 0.0527],
    ]
    qpos = np.zeros((5, 21), np.float32)
    qpos[:, 14:17] = places
    rewards, masks = world.relabel("cube-single-singletask-v0", {"qpos": qpos})  # the default is task 2
    assert rewards.tolist() == [-1, 0, -1, 0, -1] and masks.tolist() == [1, 0, 1, 0, 1]
    assert world.relabel("cube-single-singletask-task3-v0", {"qpos": qpos})[0].tolist() == [0, -1, -1, -1, -1]


@needs_ogbench
@pytest.mark.parametrize("family", ["scene", "pointmaze-large", slow("cube-double"), slow("puzzle-3x3")])
def test_rewards_are_those_that_the_environment_gives(family):
    """In random states about the goal."""
    task = f"{family}-singletask-task3-v0"
    env, rng, rows, wanted = world.make(task, "eval"), np.random.default_rng(0), [], []
    env.reset(seed=0)
    inner = env.env.unwrapped
    for _ in range(100):
        if "maze" in task:
            inner.set_xy(np.array(inner.cur_goal_xy) + rng.normal(0, 0.7, 2))
            reward = float(inner.compute_success()) - 1
        else:
            qpos, goals = inner.data.qpos, inner.data.mocap_pos
            for k in range(len(goals) if "cube" in task else "scene" in task):
                qpos[14 + 7 * k : 17 + 7 * k] = goals[k] + rng.normal(0, 0.02, 3)
            if "scene" in task:
                aims = np.array([inner._target_drawer_pos, inner._target_window_pos])
                qpos[23:25] = aims + rng.normal(0, 0.03, 2)
            buttons = getattr(inner, "_cur_button_states", np.zeros(0))
            if len(buttons):
                flip = rng.random(len(buttons)) < 0.2
                buttons[:] = np.where(flip, 1 - inner._target_button_states, inner._target_button_states)
            reward = inner.compute_reward()
        columns = {"qpos": inner.data.qpos.astype(np.float32)}
        if hasattr(inner, "_cur_button_states"):
            columns["button_states"] = inner._cur_button_states.astype(np.float32)
        rows.append(columns)
        wanted.append(reward)
    rewards, masks = world.relabel(task, {key: np.stack([row[key] for row in rows]) for key in rows[0]})
    assert rewards.tolist() == wanted and masks.tolist() == [float(reward < 0) for reward in wanted]
    assert 3 < wanted.count(0) < 97 and len(set(wanted)) >= 2


@needs_ogbench
def test_a_file_is_read_as_ogbench_reads_it(tmp_path):
    """An episode's last row gives the next observation of the one before, and no more."""
    from ogbench import make_env_and_datasets

    rng, ends = np.random.default_rng(0), np.isin(np.arange(12), [3, 4, 8, 11])  # one of a single row
    columns = {"observations": rng.normal(size=(12, 28)), "actions": rng.uniform(-1, 1, (12, 5))}
    columns |= {"qpos": rng.normal(size=(12, 21)), "qvel": np.zeros((12, 20)), "terminals": ends}
    columns["qpos"][[1, 6, 11], 14:17] = 0.5, 0, 0.02  # solved
    for name in ("cube-single-play-v0.npz", "cube-single-play-v0-val.npz"):
        np.savez(tmp_path / name, **{key: x.astype(bool if key == "terminals" else np.float32)
                                     for key, x in columns.items()})  # fmt: skip
    path = str(tmp_path / "cube-single-play-v0.npz")
    _, theirs, _ = make_env_and_datasets(NAME, dataset_path=path)
    found = load_dataset(f"{tmp_path}/{NAME}")
    assert found.env_id == "ogbench" and found.env_flags == {"task": TASK} and found.name.endswith(NAME)
    assert np.array_equal(found.observations, theirs["observations"])
    assert np.array_equal(found.next_observations, theirs["next_observations"])
    assert np.array_equal(found.actions, theirs["actions"])
    assert np.array_equal(found.rewards, theirs["rewards"]) and found.rewards.sum() == -6
    assert np.array_equal(found.terminations, theirs["masks"] == 0) and found.terminations.sum() == 2
    assert found.episode_starts.tolist() == [0, 3, 6] and len(found.states) == 12
    assert found.next_index.tolist() == [1, 2, 8, 4, 5, 10, 7, 11]


# --- making


def stock_episode(name, steps, seed):
    """OGBench's data_gen_scripts/generate_manipspace.py, its loop over one episode, with random actions that
    numpy draws."""
    env, agents = data.environment(name, steps)
    first, draws = np.random.SeedSequence(seed).generate_state(2).tolist()
    np.random.seed(draws)
    ob, info = env.reset(seed=first)
    p_stack = np.random.uniform(0.0, 0.25) if "double" in name else 0.5
    markov, p_random = "noisy" in name, {"puzzle-3x3-noisy": 0.2, "cube-double-noisy": 0.1}.get(name, 0)
    if markov:
        xi = np.random.uniform(0, 0.1)
    agent = agents[info["privileged/target_task"]]
    agent.reset(ob, info)
    rows, done = [], False
    while not done:
        if np.random.rand() < p_random:
            action = np.random.uniform(-1, 1, 5)
        else:
            action = np.array(agent.select_action(ob, info))
            if markov:
                action = action + np.random.normal(0, [xi, xi, xi, xi * 3, xi * 10], action.shape)
        action = np.clip(action, -1, 1)
        next_ob, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if agent.done:
            agent_ob, agent_info = env.unwrapped.set_new_target(p_stack=p_stack)
            agent = agents[agent_info["privileged/target_task"]]
            agent.reset(agent_ob, agent_info)
        row = [ob, action, done, info["prev_qpos"], info["prev_qvel"], info.get("prev_button_states", ())]
        rows.append([np.array(x) for x in row])
        ob = next_ob
    return [np.stack(column) for column in zip(*rows, strict=True)]


KEYS = ("observations", "actions", "terminals", "qpos", "qvel", "button_states")


@needs_ogbench
@pytest.mark.parametrize("name", ["puzzle-3x3-noisy", "scene-play", slow("cube-double-noisy")])
def test_an_episode_is_that_of_ogbenchs_script(tmp_path, name):
    """Bit for bit, over several tasks of the robot, in an environment that has played others."""
    found = made(tmp_path, name, "--episodes", 2, "--steps", 131, "--seed", 4)
    assert found["terminals"].dtype == bool and np.flatnonzero(found["terminals"]).tolist() == [130, 261]
    for number in (1, 0) if name == "scene-play" else (1,):
        for key, wanted in zip(KEYS, stock_episode(name, 131, [4, number, 0]), strict=True):
            if key in found:
                part = found[key][131 * number : 131 * (number + 1)]
                assert np.array_equal(part, wanted.astype(part.dtype)), key
    assert ("button_states" in found) == ("cube" not in name) and found["seed"] == 4
    assert found["actions"].dtype == np.float32 and np.abs(found["actions"]).max() <= 1
    if name != "scene-play":
        return
    data.environment.cache_clear()  # the same from an environment that is new
    again = made(tmp_path / "new", name, "--episodes", 1, "--validation", 1, "--steps", 131, "--seed", 4)
    with np.load(tmp_path / "new" / f"{name}-v0-val.npz") as file:
        for key in again.keys() - {"seed"}:
            assert np.array_equal(np.concatenate([again[key], file[key]]), found[key]), key


@needs_ogbench
def test_the_points_episode_is_that_of_ogbenchs_script(tmp_path):
    """generate_locomaze.py's loop over an episode; of its 26 free cells 21 are no corridor (medium)."""
    found = made(tmp_path, "pointmaze-medium-navigate", "--episodes", 5, "--steps", 400)
    env, _ = data.environment("pointmaze-medium-navigate", 400)
    inner = env.unwrapped
    cells, goals = data.free_cells(inner.maze_map)
    assert (len(cells), len(goals)) == (26, 21) and (1, 1) in goals and (2, 2) in goals
    assert (5, 1) in cells and (5, 1) not in goals and not any(inner.maze_map[cell] for cell in cells)
    first, draws = np.random.SeedSequence([1, 4, 0]).generate_state(2).tolist()
    np.random.seed(draws)
    init_ij, goal_ij = cells[np.random.randint(26)], goals[np.random.randint(21)]
    ob, _ = env.reset(seed=first, options=dict(task_info=dict(init_ij=init_ij, goal_ij=goal_ij)))
    reached = 0
    for row in range(1600, 2000):
        assert np.array_equal(found["observations"][row], ob.astype(np.float32))
        subgoal_xy, _ = inner.get_oracle_subgoal(inner.get_xy(), inner.cur_goal_xy)
        direction = subgoal_xy - inner.get_xy()
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        action = np.clip(direction + np.random.normal(0, 0.5, direction.shape), -1, 1)
        assert np.array_equal(found["actions"][row], action.astype(np.float32))
        ob, _, _, done, info = env.step(action)
        assert done == found["terminals"][row]
        assert np.array_equal(found["qpos"][row], info["prev_qpos"].astype(np.float32))
        if info["success"]:
            reached += 1
            inner.set_goal(goals[np.random.randint(21)])
    assert reached > 1
    assert load_dataset(f"{tmp_path}/pointmaze-medium-navigate-singletask-v0").actions.shape == (1995, 2)


def test_episodes_in_which_the_cube_is_out_of_sight_are_played_again(tmp_path, monkeypatch):
    qpos = np.zeros((3, 20))
    assert not data.out_of_sight(qpos)
    for y, z, out in ((0.3, 0.0, True), (-0.31, 0.02, True), (-0.31, 0.07, False), (-0.29, 0.2, False)):
        qpos[1, 15:17] = y, z
        assert data.out_of_sight(qpos) == out
    seeds, hidden = [], np.tile(qpos, (1, 1))
    hidden[1, 15] = 0.3

    def play(name, env, oracles, seed):
        seeds.append(seed)
        return {"qpos": hidden if len(seeds) < 3 else qpos}

    monkeypatch.setattr(data, "environment", lambda *_: (None, {"cube": None}))
    monkeypatch.setattr(data, "robot_episode", play)
    data.episodes(([7], "scene-play", 1, 3, str(tmp_path)))
    assert len(set(seeds)) == 3
    with np.load(tmp_path / "7.npz") as file:
        assert np.array_equal(file["qpos"], qpos)
    seeds.clear()
    data.episodes(([8], "cube-single-play", 1, 3, str(tmp_path)))
    assert len(seeds) == 1


@needs_ogbench
def test_what_was_killed_goes_on_and_neither_kills_nor_processes_change_anything(
    tmp_path, capsys, monkeypatch
):
    name, flags = "pointmaze-medium-navigate", ["--episodes", 20, "--steps", 600]
    file, words = (
        tmp_path / "two" / f"{name}-v0.npz",
        [name, *flags, "--out", tmp_path / "two", "--workers", 2],
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "common.ogbench", *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    limit = time.monotonic() + 200

    def episodes():
        return len(list(file.parent.glob(".*/[0-9]*.npz")))

    while episodes() < 4:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 4 <= episodes() < 20 and not file.exists()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "in_parallel", interrupted)
    with pytest.raises(SystemExit) as stop:
        made(file.parent, name, *flags)
    monkeypatch.undo()
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped; the same command goes on\n"
    found, whole = made(file.parent, name, *flags), made(tmp_path / "one", name, *flags)
    assert re.match(r"\d+ of 20 episodes are there already\n20 episodes of 600 rows", capsys.readouterr().out)
    assert found.keys() == whole.keys() and all(np.array_equal(found[key], x) for key, x in whole.items())
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    other = made(tmp_path / "other", name, "--episodes", 1, "--steps", 600, "--seed", 2)
    assert not (other["observations"][0] == whole["observations"][::600]).any()


# --- the offline scripts


@needs_ogbench
def test_a_script_learns_from_the_name_alone(home, tmp_path, monkeypatch):
    """In the form of the published numbers, but narrower; three episodes take turns in two environments."""
    sizes = []
    monkeypatch.setattr(
        "common.evaluation.make_envs", lambda *args, **kw: (sizes.append(args[2]), make_envs(*args, **kw))[1]
    )
    run(td3_bc, SMALL, f"--dataset {home}/{NAME} --output-dir {tmp_path} --run-name r")
    found = results(tmp_path / "r")
    assert sizes == [2] and found["gradient_steps"] == 30
    for key in ("initial", "final", "best"):
        assert found[key]["episodes"] == 3 and found[key]["success_rate"] == 0
        low, high = found[key]["success_rate_ci95"]
        assert low == 0 and 0.5 < high < 0.6
        assert found[key]["mean_length"] == 200 and found[key]["mean_reward"] == -200
    args = found["args"]
    assert (args["loss"], args["activation"], args["layer_norm"]) == ("rebrac", "gelu", True)


MAZE = "pointmaze-medium-navigate-singletask-task1-v0"  # a tenth of the robot's time


@needs_ogbench
@pytest.mark.parametrize("script", [iql, td3_bc], ids=lambda script: script.__name__)
def test_a_run_goes_on_and_is_evaluated_bit_for_bit(home, tmp_path, monkeypatch, script):
    flags = f"{SMALL} --dataset {home}/{MAZE} --output-dir {tmp_path}"
    run(script, flags, "--run-name whole")
    stopped_by(monkeypatch, script, "td_target", 17)
    assert call(script, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    evaluation = f"--evaluate --checkpoint {tmp_path}/whole --run-name e --output-dir {tmp_path}"
    run(script, evaluation, "--eval-episodes 3 --eval-envs 2 --device cpu --seed 3")
    found = results(tmp_path / "e")["final"]
    assert found == results(tmp_path / "whole")["final"] and "success_rate_ci95" in found


@needs_ogbench
@pytest.mark.parametrize("script", [cql, decision_transformer], ids=lambda script: script.__name__)
def test_the_other_scripts_read_the_same_data(home, tmp_path, script):
    flags = SMALL
    if script is decision_transformer:
        flags = SMALL.replace("--width 16 --depth 1", "--embed-dim 16").replace("--eval-envs 2", "")
    run(script, flags, f"--dataset {home}/{MAZE} --output-dir {tmp_path} --run-name r --total-timesteps 3")
    assert "success_rate_ci95" in results(tmp_path / "r")["final"]


@needs_ogbench
def test_a_run_without_evaluation_makes_no_environment(home, tmp_path, monkeypatch):
    monkeypatch.setattr("common.evaluation.make_envs", None)
    flags = f"--dataset {home}/{MAZE} --output-dir {tmp_path} --run-name r"
    run(iql, SMALL.replace("--eval-episodes 3", "--eval-episodes 0"), flags)


@needs_ogbench
@pytest.mark.slow
def test_a_video(home, tmp_path, monkeypatch):
    """In a process of its own: OpenGL is chosen with the first import of mujoco."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    flags = f"{SMALL} --total-timesteps 1 --eval-episodes 1 --env ogbench --task {TASK} --max-episode-steps 9"
    flags += f" --capture-video --run-name r --output-dir {tmp_path}"
    done = shell(iql, flags, f"--dataset {home}/{NAME}", cwd=tmp_path)
    if "OpenGL" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0 and not done.stderr.strip(), done
    assert [path.name for path in (tmp_path / "r/videos").iterdir()] == ["episode_0.mp4"]
