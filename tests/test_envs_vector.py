"""common.envs.vector: the chunk wrapper, the workers and exact resume, on a fake world and on Gymnasium's."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_world
import gymnasium
import numpy as np
import pytest
from conftest import live_workers
from gymnasium.envs.classic_control import PendulumEnv

import common.envs
from common import UserError, distributed, forkserver
from common.envs import vector
from common.envs.gymnasium_env import make as make_gymnasium
from common.envs.vector import vectorize

OWN = ("chunk", "num_workers", "autoreset", "action_history", "seed", "first", "timeout")  # of `vectorize`


@pytest.fixture
def envs():
    """`vectorize` of the fake world or a Gymnasium id, which closes what it made."""
    made = []

    def build(env_id="fake", num_envs=2, **kwargs):
        own = {"seed": 0, "num_workers": 0} | {key: x for key, x in kwargs.items() if key in OWN}
        kwargs = {key: x for key, x in kwargs.items() if key not in OWN}
        world = ("fake", "fake_world", kwargs)
        if env_id != "fake":
            world = (env_id, common.envs.GYMNASIUM, {"id": env_id} | kwargs)
        made.append(vectorize(world, num_envs, **own))
        return made[-1]

    build.made = made
    yield build
    for each in made:
        each.close()


def actions(envs, value=0.5):
    return np.full((envs.num_envs, envs.chunk, *envs.single_action_space.shape), value, np.float32)


def flat(value):
    """Any nesting of dicts, lists and arrays as (path, bytes) pairs."""
    if isinstance(value, dict):
        return [(f"{k}/{p}", b) for k in sorted(value, key=str) for p, b in flat(value[k])]
    if isinstance(value, (list, tuple)):
        return [(f"{k}/{p}", b) for k, v in enumerate(value) for p, b in flat(v)]
    return [("", value.tobytes() if hasattr(value, "tobytes") else repr(value))]


def rollout(envs, steps, seed=0):
    rng, out = np.random.default_rng(seed), []
    space, shape = envs.single_action_space, (envs.num_envs, envs.chunk)
    for _ in range(steps):
        chosen = (
            rng.integers(0, space.n, shape)
            if space.shape == ()
            else rng.uniform(-1, 1, (*shape, *space.shape))
        )
        out.append(envs.step(chosen))
    return out


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("end", ["truncated", "terminated"])
def test_chunk_stops_at_the_end_and_final_obs_is_before_the_reset(envs, num_workers, end):
    """Rendered where it is bootstrapped, after a truncation; else it is the last that was rendered."""
    e = envs(chunk=3, num_workers=num_workers, end=end)
    first = e.reset()
    assert (
        first["proprio"].shape == (2, 3)
        and first["image"].shape == (2, 1, 4, 4, 3)
        and first["task"].shape == (2,)
    )
    obs, rewards, terminated, truncated, info = e.step(actions(e))
    assert info["steps"].tolist() == [3, 3] and rewards.tolist() == [3, 3] and rewards.dtype == np.float32
    assert not terminated.any() and not info["success"].any() and (info["episode_length"] == 3).all()
    np.testing.assert_array_equal(info["final_obs"]["proprio"], obs["proprio"])
    assert (obs["image"] == 2).all()  # rendered by reset and once for the chunk
    obs, rewards, terminated, truncated, info = e.step(actions(e))
    assert info["steps"].tolist() == [2, 2] and rewards.tolist() == [2, 2]
    assert (truncated == (end == "truncated")).all() and (terminated != truncated).all()
    assert info["success"].all()
    count, total, renders = (5, 2.5, 3) if end == "truncated" else (3, 1.5, 2)
    expected = np.c_[[count, count], first["proprio"][:, 1], [total, total]]
    assert (info["final_obs"]["proprio"] == expected).all()
    assert (obs["proprio"][:, 0] == 0).all() and (obs["proprio"][:, 1] != first["proprio"][:, 1]).all()
    assert (info["final_obs"]["image"] == renders).all() and (obs["image"] == renders + 1).all()
    assert (info["episode_return"] == 5).all() and (info["episode_length"] == 5).all()
    assert (e.step(actions(e))[4]["episode_length"] == 3).all()


@pytest.mark.parametrize(
    ("end", "expected"), [("terminated", (1, 0)), ("truncated", (0, 1)), ("both", (1, 0))]
)
def test_terminated_and_truncated_are_never_mixed(envs, end, expected):
    e = envs(length=1, end=end)
    e.reset()
    _, _, terminated, truncated, _ = e.step(actions(e))
    assert (terminated == expected[0]).all() and (truncated == expected[1]).all()


def test_time_limit_truncates(envs):
    e = envs("Pendulum-v1", 1, chunk=64)
    e.reset()
    out = [e.step(actions(e, 0.0)) for _ in range(4)]
    assert [o[4]["steps"][0] for o in out] == [64, 64, 64, 8]  # 200 steps
    assert out[3][3].all() and not out[3][2].any() and not out[2][3].any()


@pytest.mark.parametrize(("limit", "steps"), [(0, 200), (30, 30), (230, 230)])
def test_episodes_are_cut_after_max_episode_steps(envs, limit, steps):
    """Truncated, and exactly so after a resume."""
    e, other = (envs("Pendulum-v1", 1, chunk=20, max_episode_steps=limit) for _ in range(2))
    e.reset()
    out = [e.step(actions(e, 0.0)) for _ in range(-(-steps // 20))]
    assert sum(o[4]["steps"][0] for o in out) == steps and out[-1][3].all() and not out[-1][2].any()
    assert not any(o[3].any() for o in out[:-1])
    e.step(actions(e, 0.0))
    other.set_state(e.get_state())
    assert flat(rollout(other, 14)) == flat(rollout(e, 14))


@pytest.mark.parametrize("autoreset", [True, False])
def test_gymnasium_tells_every_last_observation(envs, autoreset):
    e = envs("CartPole-v1", 1, autoreset=autoreset)
    e.reset()
    terminated = False
    while not terminated:
        obs, _, terminated, _, info = e.step(np.ones((1, 1), np.int64))
    assert info["final_obs"]["proprio"][0, 2] < -0.2095  # rad, where the pole has fallen
    assert (obs["proprio"][0, 2] < -0.2095) == (not autoreset)


def test_observations_are_copies(envs):
    e = envs()
    first = e.reset()
    before = flat(first)
    _, _, _, _, info = e.step(actions(e))
    saved = flat(info)
    e.step(actions(e))
    assert flat(first) == before and flat(info) == saved


def test_mask_reset_and_record_without_autoreset(envs):
    e = envs(num_envs=3, num_workers=2, autoreset=False, chunk=2, length=3)
    assert e.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED
    e.reset(seeds=np.arange(3))
    mask = np.array([True, False, True])
    obs, rewards, _, _, info = e.step(actions(e), mask=mask, record=np.array([True, True, False]))
    assert info["steps"].tolist() == [2, 0, 2] and rewards.tolist() == [2, 0, 2] and obs["proprio"][1, 0] == 0
    assert [f.max() for f in info["frames"][0]] == [1, 2] and set(info["frames"]) == {0}
    obs, _, terminated, _, info = e.step(actions(e), mask=mask)
    assert terminated.tolist() == mask.tolist()
    assert obs["proprio"][:, 0].tolist() == [2, 0, 2]  # the end of an episode is not rendered
    assert flat(info["final_obs"]) == flat(obs)
    with pytest.raises(ValueError, match=r"environments \[0, 2\] have no running episode"):
        e.step(actions(e))
    obs2 = e.reset(seeds=np.array([0, 5, 7]), mask=np.array([True, False, False]))
    assert obs2["proprio"][0, 0] == 0 and (obs2["proprio"][1:] == obs["proprio"][1:]).all()
    assert e.step(actions(e), mask=np.array([True, True, False]))[4]["steps"].tolist() == [2, 2, 0]


def test_action_history(envs):
    e = envs(num_envs=1, chunk=2, action_history=3, length=3, end="truncated")
    assert e.single_observation_space["proprio"].shape == (3 + 3 * 2,)
    assert (e.reset()["proprio"][0, 3:] == 0).all()
    chunk = np.array([[[0.1, 0.2], [0.3, 4.0]]], np.float32)
    obs = e.step(chunk)[0]["proprio"][0]
    np.testing.assert_array_equal(
        obs[3:], np.array([0, 0, 0.1, 0.2, 0.3, 1.0], np.float32)
    )  # clipped, oldest first
    obs, _, _, _, info = e.step(-chunk)
    expected = np.array([0.1, 0.2, 0.3, 1.0, -0.1, -0.2], np.float32)  # the second action was not executed
    np.testing.assert_array_equal(info["final_obs"]["proprio"][0, 3:], expected)
    assert (obs["proprio"][0, 3:] == 0).all()


@pytest.mark.parametrize("env_id", ["fake", "CartPole-v1"])
def test_results_do_not_depend_on_num_workers(envs, env_id):
    runs = []
    for num_workers in (0, 1, 2):
        e = envs(env_id, 3, num_workers=num_workers, chunk=4, seed=3)
        assert e.num_workers == num_workers
        runs.append(flat([e.reset(), rollout(e, 12)]))
    assert runs[0] == runs[1] == runs[2]


def test_a_worker_for_each_core_that_may_be_used(envs, monkeypatch):
    monkeypatch.setattr(vector, "available_cores", lambda: 2)
    assert envs(num_envs=3, num_workers=None).num_workers == 2
    assert envs(num_envs=1, num_workers=None).num_workers == 1
    assert envs(num_envs=3, num_workers=3).num_workers == 3


def test_seeds(envs):
    starts = [envs(num_envs=4, seed=seed).reset()["proprio"][:, 1] for seed in (0, 0, 1)]
    assert (starts[0] == starts[1]).all() and (starts[0] != starts[2]).any() and len(set(starts[0])) > 1
    e = envs(num_envs=4)
    given = e.reset(seeds=np.array([7, 7, 8, 9]))["proprio"][:, 1]
    expected = [np.random.default_rng(seed).integers(1000) for seed in (7, 7, 8, 9)]
    assert given.tolist() == expected
    seed = int(np.random.SeedSequence([0, 1, 0]).generate_state(1)[0])
    assert starts[0][1] == np.random.default_rng(seed).integers(1000)


@pytest.mark.parametrize(
    ("env_id", "chunk", "before", "after"),
    [("fake", 2, 4, 8), ("CartPole-v1", 3, 7, 30), ("Pendulum-v1", 9, 5, 25), ("Hopper-v5", 4, 8, 40)],
)
def test_state_is_bit_exact(envs, env_id, chunk, before, after):
    history = 0 if env_id == "CartPole-v1" else chunk + 2  # reaches back before the save
    options = {"num_envs": 2, "chunk": chunk, "action_history": history}
    if env_id == "Hopper-v5":
        pytest.importorskip("mujoco")
    e = envs(env_id, **options)
    e.reset()
    rollout(e, before)
    state = e.get_state()
    kept = flat(state)
    want = rollout(e, after, seed=1)
    assert any((o[2] | o[3]).any() for o in want)  # over an auto-reset
    assert flat(state) == kept  # a state is not a view
    other = envs(env_id, **options, seed=9, num_workers=1)
    obs = other.set_state(state)
    assert flat(obs) == flat(state["obs"])
    assert flat(rollout(other, after, seed=1)) == flat(want)
    assert flat(envs(env_id, **options).reset()) != flat(obs)  # the comparison can fail


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tasks_are_drawn_by_weights(envs, num_workers):
    """In resets and autoresets, of every row; the state has them along; none are all tasks alike."""
    from common.envs import tabletop

    world = ("tabletop", "common.envs.tabletop", {"max_steps": 1})
    e, again = (vectorize(world, 2, seed=0, num_workers=num_workers) for _ in range(2))
    envs.made += [e, again]
    assert e.draws_tasks and len({*e.reset(np.arange(2))["task"], *again.reset(np.arange(2, 4))["task"]}) > 2
    plain = e.reset(np.arange(2))
    often, seldom = tabletop.TRAIN_TASKS[2:4]
    weights = np.zeros(len(tabletop.TASKS))
    weights[[often, seldom]] = 3.0, 1.0
    e.draw_tasks(weights)
    seen = [e.reset(np.arange(100 + 2 * i, 102 + 2 * i))["task"] for i in range(60)]
    assert {*np.ravel(seen)} == {often, seldom} and 70 < np.sum(np.array(seen) == often) < 110
    again.set_state(e.get_state())
    for each in (e, again):
        told = [each.step(np.zeros((2, 1, 7), np.float32))[0]["task"] for _ in range(6)]
        assert {*np.ravel(told)} == {often, seldom}
    again.draw_tasks(0.0)
    assert all(np.array_equal(again.reset(np.arange(2))[key], plain[key]) for key in plain)


def test_worlds_that_draw_no_task_get_no_options_and_refuse_a_curriculum(envs, monkeypatch):
    e = envs()
    e.reset()
    assert not e.draws_tasks and e._workers[0].local.envs[0].options is None
    monkeypatch.setitem(common.envs.WORLDS, "fake", "fake_world")
    args = SimpleNamespace(env="fake", seed=0, chunk=1, action_history=0, num_workers=0, worker_timeout=9.0)
    common.envs.make_envs(args, "train", 1).close()
    args.curriculum = True
    with pytest.raises(UserError, match="--env fake draws no tasks that succeed or fail; drop --curriculum"):
        common.envs.make_envs(args, "train", 1)


def test_state_holds_no_large_ints(envs):
    e = envs("CartPole-v1", 1)
    e.reset()

    def check(value):
        if isinstance(value, (dict, list)):
            return all(map(check, value.values() if isinstance(value, dict) else value))
        return isinstance(value, (str, float, bool, np.ndarray)) or (isinstance(value, int) and value < 2**63)

    assert check(e.get_state())


def test_without_state_the_episode_restarts_and_is_counted(envs):
    e = envs(stateful=False)
    e.reset()
    e.step(actions(e))
    other = envs(stateful=False, num_workers=1)
    obs = other.set_state(e.get_state())
    assert other.lost_episodes == 2 and (obs["proprio"][:, 0] == 0).all()
    obs, _, _, _, info = other.step(actions(e))
    assert info["lost"].all() and (info["steps"] == 0).all() and (obs["proprio"][:, 0] == 0).all()
    obs, _, _, _, info = other.step(actions(e))
    assert not info["lost"].any() and (obs["proprio"][:, 0] == 1).all()
    with pytest.raises(ValueError, match="use num_envs=2"):
        envs(num_envs=3).set_state(e.get_state())


@pytest.mark.parametrize("die", ["kill", "raise", "stop", "sleep"])
def test_dead_or_hung_worker_is_restarted(envs, tmp_path, die):
    marker = tmp_path / "marker"
    timeout = 1.5 if die in ("stop", "sleep") else 0
    e = envs(num_envs=4, num_workers=2, die=die, marker=str(marker), length=50, timeout=timeout)
    first = e.reset()["proprio"]
    e.step(actions(e))
    marker.touch()
    reason = {"kill": "SIGKILL", "raise": "gripper fell off"}.get(
        die, r"no answer for 1.5 s \(--worker-timeout"
    )
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        obs, rewards, terminated, truncated, info = e.step(actions(e))
    lost = info["lost"]
    assert timeout <= time.monotonic() - began < 10
    assert len(caught) == 1 and lost.tolist() in ([True, True, False, False], [False, False, True, True])
    assert (info["restarted"] == lost).all() and e.lost_episodes == 2
    assert (rewards == ~lost).all() and (info["steps"] == ~lost).all() and not (terminated | truncated).any()
    assert (obs["proprio"][lost, 0] == 0).all() and (obs["proprio"][~lost, 0] == 2).all()
    seeds = [int(np.random.SeedSequence([0, i, 1]).generate_state(1)[0]) for i in np.flatnonzero(lost)]
    assert obs["proprio"][lost, 1].tolist() == [np.random.default_rng(s).integers(1000) for s in seeds]
    assert (obs["proprio"][lost, 1] != first[lost, 1]).any()
    obs, _, _, _, info = e.step(actions(e))
    assert not info["lost"].any() and obs["proprio"][:, 0].tolist() == np.where(lost, 1, 3).tolist()


def test_worker_killed_between_steps(envs):
    e = envs(num_envs=2, num_workers=2, autoreset=False, length=2)
    e.reset()
    mine = live_workers()
    e.step(actions(e), mask=np.array([True, False]))
    os.kill(mine[0].pid, signal.SIGKILL)
    mine[0].wait(5)
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        state = e.get_state()  # the loss shows here, and is told by the next step
    assert e.lost_episodes == 1 and state["lost"].sum() == 1
    info = e.step(actions(e))[4]
    assert info["lost"].sum() == 1 and (info["steps"] == ~info["lost"]).all()
    assert e.step(actions(e), mask=info["lost"])[4]["steps"].sum() == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_worker_that_keeps_dying_ends_the_run(envs, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    marker.touch()
    e = envs(num_envs=1, num_workers=1, die="raise", marker=str(marker), once=False, length=50)
    e.reset()
    with pytest.raises(RuntimeError, match=r"died 4 times(.|\n)*Traceback(.|\n)*gripper fell off"):
        for _ in range(8):
            e.step(actions(e))
    assert e.lost_episodes == 4 and e.closed
    with pytest.raises(RuntimeError, match="closed"):
        e.reset()
    monkeypatch.setattr(vector, "GOOD_STEPS", 1)  # one good step forgives
    e = envs(num_envs=1, num_workers=1, die="raise", marker=str(marker), once=False, length=50)
    e.reset()
    for _ in range(12):
        e.step(actions(e))
    assert e.lost_episodes == 6


def test_workers_that_hang_together_are_waited_for_together(envs, tmp_path):
    (tmp_path / "marker").touch()
    e = envs(num_workers=2, die="sleep", marker=str(tmp_path / "marker"), once=False, length=50, timeout=2)
    e.reset()
    e.step(actions(e))
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match="no answer for 2 s") as caught:
        assert e.step(actions(e))[4]["lost"].all()
    assert len(caught) == 2 and time.monotonic() - began < 3.5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_world_that_always_hangs_ends_in_one_sentence(envs, tmp_path):
    (tmp_path / "marker").touch()
    envs(num_workers=1)  # the fork server is up
    options = dict(num_envs=1, num_workers=1, marker=str(tmp_path / "marker"), once=False, timeout=0.3)
    e = envs(die="stop", length=50, **options)
    e.reset()
    with pytest.raises(UserError, match="'fake' died 4 times: no answer for 0.3 s") as caught:
        for _ in range(8):
            e.step(actions(e))
    assert "\n" not in str(caught.value) and e.closed and len(live_workers()) == 1
    with pytest.raises(UserError, match="'fake' could not start: no answer for 0.3 s") as caught:
        envs(slow=60, **options)
    assert "\n" not in str(caught.value) and len(live_workers()) == 1


def test_a_worker_that_is_stopped_amid_its_answer_is_restarted(envs):
    e = envs(num_envs=1, num_workers=1, frame=2048, length=50, timeout=1)  # 12 MB, more than a pipe holds
    e.reset()
    e.step_async(actions(e), record=np.ones(1, bool))
    (worker,) = live_workers()
    assert e._workers[0].conn.poll(10)  # it has begun to tell
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.warns(RuntimeWarning, match="no answer for 1 s"):
        assert e.step_wait()[4]["lost"].all()
    assert e.step(actions(e), record=np.ones(1, bool))[4]["frames"][0][0].shape == (2048, 2048, 3)


def test_a_slow_worker_is_waited_for_while_nobody_asks_how_long(envs):
    """What counts is waiting: not the time before `step_wait`, and not that of a parent that was stopped."""
    e = envs(num_workers=2, timeout=1)
    e.reset()
    e.step_async(actions(e))
    time.sleep(1.5)
    assert not e.step_wait()[4]["lost"].any() and not e.lost_episodes


def test_step_async_and_close_in_flight(envs):
    e = envs(num_workers=1)
    e.reset()
    e.step_async(actions(e))
    with pytest.raises(RuntimeError, match="in flight"):
        e.get_state()
    assert e.step_wait()[4]["steps"].tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="no step is in flight"):
        e.step_wait()
    e.step_async(actions(e))
    process = e._workers[0].process
    e.close()
    e.close()
    assert not process.is_alive()


def test_spawn_start_method(envs, monkeypatch):
    monkeypatch.setattr(vector, "START_METHOD", "spawn")
    e = envs("CartPole-v1", 2, num_workers=1)
    monkeypatch.undo()
    assert flat(e.reset()) == flat(envs("CartPole-v1", 2).reset())


def test_no_worker_outlives_a_killed_parent():
    code = """
import os, time
from common.envs.vector import vectorize
world = ("CartPole-v1", "common.envs.gymnasium_env", {"id": "CartPole-v1"})
e = vectorize(world, 2, seed=0, num_workers=2)
f = vectorize(world, 2, seed=0, num_workers=1)
stranger = os.fork()  # holds the parent's ends of all pipes open
if stranger:
    print(stranger, *[w.process.pid for w in e._workers + f._workers], flush=True)
time.sleep(30)
os._exit(0)
"""
    root = Path(common.envs.__file__).parents[2]
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    stranger, *pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3 and all(map(running, pids))
    parent.kill()
    parent.wait()
    deadline = time.time() + 8
    while any(map(running, pids)) and time.time() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if running(pid)]
    os.kill(stranger, signal.SIGKILL)
    assert not left
    if shared:
        assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("die", ["sleep", "stop"])
def test_no_worker_outlives_a_killed_parent_in_the_middle_of_a_step(tmp_path, die):
    code = f"""
import pathlib, psutil
from common.envs.vector import vectorize
marker = pathlib.Path({str(tmp_path)!r}, "marker")
e = vectorize(("fake", "fake_world", dict(die={die!r}, marker=str(marker))), 1, seed=0, num_workers=1)
e.reset()
e.step([[[0.0, 0.0]]])
marker.touch()
e.step_async([[[0.0, 0.0]]])
while marker.exists():
    pass
print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
e.step_wait()
"""
    root = Path(common.envs.__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = os.environ | {"PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(running, pids))  # the fork server and the worker
    parent.kill()
    parent.wait()
    deadline = time.time() + 5
    while any(map(running, pids)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids))


def test_workers_have_nothing_of_this_process(envs, monkeypatch):
    """As CUDA's state, without which alone NVIDIA's EGL makes a context: first ones and restarted ones."""
    forkserver.stop()  # the one that is may have met a world that takes torch
    monkeypatch.setitem(sys.modules, "only_in_the_test", distributed)

    def inherited(e):
        return [each["env"]["inherited"] for each in e.get_state()["envs"]]

    local, e = envs(), envs(num_workers=2)
    local.reset()
    e.reset()
    assert inherited(local) == [["only_in_the_test", "torch"]] * 2  # which tests that it is seen
    assert inherited(e) == [[], []]
    for worker in live_workers():
        worker.kill()
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        e.step(actions(e))
    assert e.lost_episodes == 2 and inherited(e) == [[], []]


def test_workers_outlive_a_signal_to_the_whole_group_and_the_thread_that_made_them(envs):
    forkserver.stop()
    thread = threading.Thread(target=lambda: envs(num_workers=2))
    thread.start()
    thread.join()
    (e,) = envs.made
    e.reset()
    server = forkserver._server.pid
    for pid in (server, *[worker.pid for worker in live_workers()]):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert not e.step(actions(e))[4]["lost"].any() and forkserver._server.poll() is None
    forkserver.stop()  # and one that the main thread started gets them before it can ignore them
    e = envs(num_workers=1)
    assert forkserver._server.pid != server
    os.kill(forkserver._server.pid, signal.SIGTERM)
    e.reset()


def test_the_death_of_the_fork_server_is_that_of_its_workers(envs):
    e = envs(num_workers=2)
    e.reset()
    pids = [worker.pid for worker in live_workers()]
    forkserver._server.kill()
    deadline = time.time() + 5
    while any(map(running, pids)) and time.time() < deadline:
        time.sleep(0.05)
    with pytest.warns(RuntimeWarning, match="killed by SIGKILL"):
        assert e.step(actions(e))[4]["lost"].all()
    assert not {worker.pid for worker in live_workers()} & {*pids} and len(live_workers()) == 2
    assert not e.step(actions(e))[4]["lost"].any()


def test_a_kill_that_comes_after_the_end_is_no_error():
    """The server has seen the end before the parent has read of it: a race that a busy machine loses."""
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        process = forkserver.Process("os", theirs, lambda conn: None, ())
        while process._read(60) and process._pid is None:
            continue
        while Path(f"/proc/{process.pid}").exists():  # a zombie could still be killed
            time.sleep(0.01)
        read, process._read = process._read, lambda timeout: False  # the word of the end is still on its way
        process.kill()
        process._read = read
        process.join(60)
        assert process.exitcode == 0


def test_a_world_that_hangs_in_its_import_ends_in_one_sentence(envs, tmp_path, monkeypatch):
    (tmp_path / "hanging_world.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'hanging' could not start: no answer for 1 s") as caught:
        vectorize(("hanging", "hanging_world", {}), 2, seed=0, num_workers=2, timeout=1)
    assert "\n" not in str(caught.value)
    assert forkserver._server.returncode is not None  # dead, not dying: nobody asks it for a worker
    assert envs(num_workers=1).reset()["task"].tolist() == [0, 0]


def test_a_worker_has_the_environment_and_the_folder_of_now(envs, tmp_path, monkeypatch):
    """Not those of the start of the fork server."""
    envs(num_workers=1)
    (tmp_path / "told_world.py").write_text(
        "import os; from fake_world import FakeEnv\n"
        "def make(): return FakeEnv(split=os.environ['TOLD'] + os.getcwd())"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOLD", "here: ")
    e = vectorize(("told", "told_world", {}), 1, seed=0, num_workers=1)
    e.close()
    assert e.instructions == [f"here: {tmp_path}"]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"action_history": -1}, "action_history must be at least 0, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"bad": "the table is missing: install a table"}, "the table is missing: install a table"),
        ({"colour": 1}, "'fake' does not take these arguments: .*colour"),
        ({"env_id": "NoSuchWorld-v0"}, "unknown environment 'NoSuchWorld-v0': known are tabletop, libero"),
        ({"env_id": "FrozenLake-v1"}, "a Gymnasium id that observes vectors"),
        ({"env_id": "CartPole-v1", "colour": 1}, "cannot be made with .*colour"),
        ({"env_id": "CartPole-v1", "action_history": 1}, "action_history needs continuous actions"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_arguments_end_in_one_sentence(envs, num_workers, kwargs, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        envs(**{"num_workers": num_workers} | kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_world_that_does_not_tell_success_ends_in_one_sentence(envs, num_workers):
    e = envs(num_workers=num_workers, told="succeeded")
    e.reset()
    with pytest.raises(UserError, match="'fake' has has_success, but its info has no 'success'") as caught:
        e.step(actions(e))
    assert "\n" not in str(caught.value) and (e.closed or not num_workers)


BAD = [
    ("proprio", np.array([0, np.nan, 0], np.float32), "'proprio' that is NaN or infinite"),
    ("proprio", np.array([0, -np.inf, 0], np.float32), "'proprio' that is NaN or infinite"),
    ("proprio", np.array([0, 1e39, 0]), "'proprio' that is NaN or infinite"),  # in float32
    ("proprio", np.float32(1.0), r"'proprio' as float32 \(\) instead of float32 \(3,\)"),
    ("proprio", np.ones(1, np.float32), r"'proprio' as float32 \(1,\) instead of float32 \(3,\)"),
    ("proprio", np.ones((1, 3), np.float32), r"'proprio' as float32 \(1, 3\) instead of float32 \(3,\)"),
    ("proprio", np.arange(3), r"'proprio' as int64 \(3,\) instead of float32 \(3,\)"),
    ("proprio", np.ones(3, complex), r"'proprio' as complex128 \(3,\) instead of float32"),
    ("proprio", ["0", "1", "2"], r"'proprio' as <U1 \(3,\) instead of float32"),
    ("proprio", [[0.0], [0.0, 1.0]], r"'proprio' as object \(0,\) instead of float32"),
    ("proprio", None, r"observations of \['image', 'task'\], which are \['image', 'proprio', 'task'\]"),
    ("depth", np.ones(3), r"observations of \['depth', 'image', 'proprio', 'task'\], which are"),
    ("image", np.ones((4, 4, 3), np.uint8), r"'image' as uint8 \(4, 4, 3\) instead of uint8 \(1, 4, 4, 3\)"),
    ("image", np.ones((1, 4, 4, 3)), r"'image' as float64 \(1, 4, 4, 3\) instead of uint8"),
    ("image", np.ones((1, 4, 4, 3), np.uint16), r"'image' as uint16 \(1, 4, 4, 3\) instead of uint8"),
    ("task", 0.5, r"'task' as float64 \(\) instead of int64"),
    ("reward", np.nan, "a reward that is NaN or infinite"),
    ("reward", -np.inf, "a reward that is NaN or infinite"),
    ("reward", 1e39, "a reward that is NaN or infinite"),  # in float32
    ("reward", np.ones((2, 2)), "a reward of type ndarray"),
    ("reward", "much", "a reward of type str"),
]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("key", "value", "what"), BAD)
def test_what_a_policy_cannot_learn_from_is_refused(envs, num_workers, key, value, what):
    """With the environment's name, what it is, and the step of the episode."""
    e = envs(num_envs=1, num_workers=num_workers, chunk=2, spoil={4: {key: value}})
    e.reset()
    e.step(actions(e))
    with pytest.raises(
        UserError, match=f"^environment 'fake' gave {what}.* at step 4 of an episode; "
    ) as caught:
        e.step(actions(e))
    assert "\n" not in str(caught.value)
    assert all(np.isfinite(e._shared[name]).all() for name in ("obs/proprio", "rewards", "episode_return"))
    if key != "reward":
        e = envs(num_envs=1, num_workers=num_workers, spoil={0: {key: value}})
        with pytest.raises(UserError, match=f"^environment 'fake' gave {what}.* at an episode's reset; "):
            e.reset()


def test_numbers_beyond_float32_are_refused_without_a_warning(monkeypatch, recwarn):
    from gymnasium.envs.classic_control import PendulumEnv

    monkeypatch.setattr(PendulumEnv, "reset", lambda self, **_: (np.full(3, 1e300), {}))
    e = vectorize(("Pendulum-v1", common.envs.GYMNASIUM, {"id": "Pendulum-v1"}), 1, seed=0, num_workers=0)
    with pytest.raises(UserError, match="gave 'proprio' that is NaN or infinite at an episode's reset"):
        e.reset()
    assert not recwarn.list


@pytest.mark.parametrize("name", ["restarts", "fresh", "ended", "lost", "rebuilt", "obs"])
@pytest.mark.parametrize("junk", [{"x": 1}, "text", 1.5, np.ones(1), None])
def test_a_state_of_other_kinds_is_refused(envs, name, junk):
    e = envs(num_envs=2, num_workers=0)
    e.reset()
    state = e.get_state()
    junk = state["obs"] | {"proprio": junk} if name == "obs" else junk
    with pytest.raises(ValueError, match="^the state's [a-z]+ is .*, not "):
        e.set_state(state | {name: junk})


RETURNS = [
    (lambda found: found[:3], "3 values instead of reward, terminated, truncated, info"),
    (lambda found: (*found, 7), "5 values instead of reward, terminated, truncated, info"),
    (lambda found: None, "a NoneType instead of reward, terminated, truncated, info"),
    (lambda found: (*found[:3], None), "info as a NoneType instead of a dict"),
    (lambda found: (0.0, "no", False, {}), "an end that is 'no' instead of a bool"),
    (lambda found: (0.0, False, np.zeros(2, bool), {}), r"an end that is array\(.*\) instead of a bool"),
]


@pytest.mark.parametrize(("change", "what"), RETURNS)
def test_a_step_of_other_values_is_refused(envs, monkeypatch, change, what):
    advance = fake_world.FakeEnv.advance
    monkeypatch.setattr(fake_world.FakeEnv, "advance", lambda self, action: change(advance(self, action)))
    e = envs(num_envs=1, num_workers=0, chunk=2)
    e.reset()
    with pytest.raises(UserError, match=f"^environment 'fake' gave {what} at step 1 of an episode; "):
        e.step(actions(e))


@pytest.mark.parametrize("limit", [0, 5])  # with one, a wrapper of Gymnasium's unpacks
@pytest.mark.parametrize("count", [None, 1, 4, 6])
def test_a_gymnasium_environment_of_other_values_is_refused(monkeypatch, count, limit):
    from gymnasium.envs.classic_control import PendulumEnv

    env = make_gymnasium("Pendulum-v1", max_episode_steps=limit)
    monkeypatch.setattr(
        PendulumEnv, "reset", lambda self, **_: count and (np.zeros(3), {}, 1, 2, 3, 4)[:count]
    )
    with pytest.raises(UserError, match="^environment 'Pendulum-v1' does not return obs, info [(]"):
        env.reset()
    monkeypatch.undo()
    env.reset()
    parts = (np.zeros(3), 0.0, False, False, {}, 7)
    monkeypatch.setattr(PendulumEnv, "step", lambda self, action: count and parts[:count])
    with pytest.raises(UserError, match="^environment 'Pendulum-v1' does not return obs, reward, .* mended"):
        env.step(np.zeros(1))
    env.close()


def test_the_same_kind_in_another_width_is_taken(envs):
    e = envs(spoil={1: {"proprio": np.array([0.1, 2, 3]), "task": np.int32(0)}})
    e.reset()
    np.testing.assert_array_equal(e.step(actions(e))[0]["proprio"], np.float32([[0.1, 2, 3]] * 2))


def test_a_gymnasium_environment_is_held_to_its_space(envs):
    class Odd(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.int64)  # whole numbers are told as floats
        action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        metadata = {"render_modes": ["rgb_array"]}
        later = [3, 4]

        def __init__(self, render_mode=None):
            pass

        def reset(self, *, seed=None, options=None):
            return np.array([1, 2]), {}

        def step(self, action):
            return self.later, 0.0, False, False, {}

    gymnasium.register("Odd-v0", entry_point=Odd)
    bad = {"object": [[3], [3, 4]], "<U": ["a", "b"], "NaN or infinite": [3, np.nan], "float32 .1,.": [3]}
    for sentence, later in ({"": [3, 4]} | bad).items():
        Odd.later = later
        e = envs("Odd-v0", 1)
        assert e.reset()["proprio"].tolist() == [[1, 2]]
        if not sentence:
            assert e.step(actions(e))[0]["proprio"].tolist() == [[3, 4]]
            continue
        with pytest.raises(
            UserError, match=f"'Odd-v0' gave 'proprio' .*{sentence}.* at step 1 of an episode"
        ):
            e.step(actions(e))


def test_bad_actions_end_in_one_sentence(envs):
    e = envs(chunk=2)
    with pytest.raises(ValueError, match=r"environments \[0, 1\] have no running episode"):
        e.step(actions(e))
    e.reset()
    with pytest.raises(ValueError, match=r"floats \(2, 2, 2\), got float32 \(2, 2\)"):
        e.step(actions(e)[:, 0])
    bad = actions(e)
    bad[1, 0, 1] = np.nan
    with pytest.raises(ValueError, match=r"environments \[1\] are NaN"):
        e.step(bad)
    e.step(bad, mask=np.array([True, False]))  # not read where it is not executed
    with pytest.raises(ValueError, match="mask must be bool"):
        e.step(actions(e), mask=np.array([0, 1]))
    with pytest.raises(ValueError, match="seeds must be 2 ints"):
        e.reset(seeds=[1])
    e = envs("CartPole-v1")
    e.reset()
    with pytest.raises(ValueError, match=r"integers \(2, 1\), got float32"):
        e.step(np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        e.step(np.array([[0], [2]]))


def test_box_actions_are_rescaled_and_clipped(envs):
    e = envs("Pendulum-v1", 1)  # torque in [-2, 2]
    plain = gymnasium.make("Pendulum-v1")
    for unit, torque in ((0.25, 0.5), (3.0, 2.0), (-1.0, -2.0)):
        e.reset(seeds=[4])
        plain.reset(seed=4)
        obs, reward = plain.step(np.array([torque], np.float32))[:2]
        got = e.step(actions(e, unit))
        np.testing.assert_array_equal(got[0]["proprio"][0], obs)
        assert got[1][0] == np.float32(reward)
    plain.close()


def test_adapter_observes_what_it_restored():
    first, second = make_gymnasium("Pendulum-v1"), make_gymnasium("Pendulum-v1")
    first.reset(seed=3)
    obs = first.step(np.array([0.5]))[0]
    second.set_state(first.get_state())
    np.testing.assert_array_equal(second.observe()["proprio"], obs["proprio"])
    first.close()
    second.close()


def test_make_envs_of_a_run(monkeypatch):
    """A world gets its flags and the split; a Gymnasium id its flags; the rest is the run's."""
    monkeypatch.setitem(common.envs.WORLDS, "fake", "fake_world")
    run = dict(seed=4, chunk=2, action_history=1, num_workers=0, worker_timeout=9.0, gamma=0.9)
    args = SimpleNamespace(env="fake", length=3, end="truncated", **run)
    assert common.envs.world_flags(args) == {"length": 3, "end": "truncated"}
    e = common.envs.make_envs(args, "eval", 2)
    assert e.instructions == ["eval"] and (e.num_envs, e.chunk, e.seed, e.autoreset) == (2, 2, 4, False)
    assert e.timeout == 9.0
    assert e.single_observation_space["proprio"].shape == (3 + 2,)
    e.reset()
    e.step(actions(e))
    assert e.step(actions(e))[3].all()
    e.close()
    args = SimpleNamespace(env="Pendulum-v1", max_episode_steps=2, **run)
    e = common.envs.make_envs(args, "train", 3, True, states=True)
    e.reset()
    assert e.step(actions(e))[3].all()
    assert e.instructions == [""] and e.autoreset and e.action_bounds[1] == [2.0]
    e.close()
    assert not live_workers()


def test_workers_know_an_id_that_only_this_process_has_registered():
    class Here(PendulumEnv):
        pass

    gymnasium.register("Here-v0", entry_point=Here, max_episode_steps=3)
    run = dict(seed=4, chunk=1, action_history=0, worker_timeout=9.0, max_episode_steps=0)
    for num_workers in (0, 1):
        args = SimpleNamespace(env="Here-v0", num_workers=num_workers, **run)
        e = common.envs.make_envs(args, "train", 1)
        e.reset()
        assert [bool(e.step(actions(e))[3]) for _ in range(3)] == [False, False, True]
        e.close()


@pytest.mark.parametrize("env", ["fake", "CartPole-v1"])
def test_what_does_not_act_from_states_alone_is_refused(monkeypatch, env):
    monkeypatch.setitem(common.envs.WORLDS, "fake", "fake_world")
    args = SimpleNamespace(env=env, length=3, end="both", seed=0, chunk=1, action_history=0, num_workers=1)
    args.worker_timeout = 0.0
    with pytest.raises(UserError, match=f"^--env {env} is not for this script: it needs states and"):
        common.envs.make_envs(args, "train", 1, states=True)
    assert not live_workers()


def test_environments_are_split_over_processes(monkeypatch):
    """As one process would have them: the second half's seeds are those of the numbers 2 and 3."""
    args = SimpleNamespace(env="CartPole-v1", seed=0, chunk=1, action_history=0, num_workers=0)
    args.worker_timeout = 0.0
    whole = common.envs.make_envs(args, "train", 4)
    monkeypatch.setattr(distributed, "ranks", lambda: (1, 2))
    half = common.envs.make_envs(args, "train", 4)
    assert half.num_envs == 2
    assert (half.reset()["proprio"] == whole.reset()["proprio"][2:]).all()
    with pytest.raises(UserError, match="5 environments cannot be split evenly over 2 processes"):
        common.envs.make_envs(args, "train", 5)


def test_workers_import_no_torch():
    code = "import sys, common.envs.vector, common.envs.gymnasium_env; sys.exit('torch' in sys.modules)"
    root = Path(common.envs.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
