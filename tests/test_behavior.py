"""BEHAVIOR's world, on a FAKE of OmniGibson (tests/fake_omnigibson): its documented API, both generations of
it, through the real socket, in a process of its own. Nothing here says that the simulator itself would run.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_cli import call, frames, results, run, scalars, shell, stopped_by

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError
from common.checkpoint import load_checkpoint
from common.envs import behavior as world
from common.envs import behavior_server as server
from common.envs import make_envs
from common.run import read_flags

SCENE = "house_double_floor_lower"
TINY = "--size 16 --chunk 2 --device cpu --seed 3 --eval-episodes 2 --eval-envs 1 --horizon 6"


@pytest.fixture
def fake(tmp_path):
    """-> makes an interpreter in which the fake is installed and does what it is told."""
    names = f"{SCENE}_task_turning_on_radio"
    folder = tmp_path / f"data/2025-challenge-task-instances/scenes/{SCENE}/json/{names}_instances"
    folder.mkdir(parents=True)
    for instance in (1, 2, 301, 302):
        state = {"radio.n.01_1": {"instance": instance}}
        state |= {"robot_poses": {"R1Pro": [{"position": [0, 0, 0], "orientation": [0, 0, 0, 1]}]}}
        (folder / f"{names}_0_{instance}_template-tro_state.json").write_text(json.dumps(state))

    def build(**wish):
        (tmp_path / "wish.json").write_text(json.dumps(wish))
        python = tmp_path / "python"
        python.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={Path(__file__).parent / 'fake_omnigibson'} OMNIGIBSON_FAKE="
            f'{tmp_path}/wish.json OMNIGIBSON_DATA_PATH={tmp_path}/data\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        return str(python)

    return build


@pytest.fixture
def make(fake):
    made = []

    def build(wish=None, **flags):
        flags = dict(train_instances=(1, 2), eval_instances=(301, 302), size=16) | flags
        made.append(world.make(simulator=fake(**(wish or {})), **flags))
        return made[-1]

    yield build
    for env in made:
        env.close()


def simulators():
    found = psutil.Process().children(recursive=True)
    return [x for x in found if any("behavior_server.py" in word for word in x.cmdline())]


@pytest.mark.parametrize("api", ["vector", "new"])
def test_an_episode(make, tmp_path, api):
    env = make({"api": api, "goal": [2, 4]}, split="eval", horizon=9, metrics=str(tmp_path / "metrics"))
    obs, _ = env.reset(seed=3)  # the second instance, the second time
    assert (
        all(env.observation_space[x].contains(obs[x]) for x in ("image", "proprio"))
        and len(simulators()) == 1
    )
    assert [image[15, 0].tolist() for image in obs["image"]] == [[0] * 3, [10] * 3, [20] * 3]
    assert obs["image"][0, 0, 0].tolist() == [255, 0, 0]  # red above: neither BGR nor upside down
    assert env.proprio[17:24].tolist()[3] == 302  # loaded, settled and kept
    assert obs["proprio"][21:].tolist() == pytest.approx([0.03, 0.07])  # both fingers
    action = np.linspace(-1, 1, 23, dtype=np.float32)
    rewards, ends = [], []
    for _ in range(4):
        reward, terminated, truncated, info = env.advance(action)
        rewards.append(reward)
        ends.append((terminated, truncated, info["success"]))
    assert rewards == [0, 0.5, 0, 0.5] and ends == [(False, False, False)] * 3 + [(True, False, True)]
    seen = env.observe()["proprio"]
    wanted = world.LOW + (action.astype(float) + 1) / 2 * (world.HIGH - world.LOW)
    np.testing.assert_allclose(seen[:21], np.r_[wanted[:14], wanted[15:22]], rtol=1e-6)
    frame = env.render()
    assert frame.shape == (448, 672, 3) and frame.dtype == np.uint8
    corners = [frame[200, 10, 1], frame[440, 10, 1], frame[440, 600, 1]]
    assert corners == [14, 24, 4]  # the left wrist above the right one, left of the head
    found = json.loads((tmp_path / "metrics/turning_on_radio_302_1.json").read_text())
    speed = np.hypot(*wanted[:2])
    distance = found.pop("agent_distance")
    assert distance == pytest.approx({"base": 4 * speed / 30, "left": 0.4, "right": 0.8}, rel=1e-5)
    time = {"simulator_steps": 4, "simulator_time": 4 / 30}
    assert found == {
        "task": "turning_on_radio", "instance_id": 302, "rollout_id": 1, "steps": 4, "success": True,
        "q_score": {"final": 1.0}, "time": time,
    }  # fmt: skip
    env.reset(seed=0)
    assert env.instance == 301 and env.proprio[20] == 301


def test_time_runs_out_and_half_of_the_goal_counts_half(make, tmp_path):
    env = make({"goal": [0, 2, 99]}, split="eval", horizon=3, metrics=str(tmp_path / "m"))
    env.reset(seed=0)
    ends = [env.advance(np.zeros(23, np.float32))[1:3] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    found = json.loads((tmp_path / "m/turning_on_radio_301_0.json").read_text())
    assert found["q_score"]["final"] == pytest.approx(1 / 3) and not found["success"]  # one held at first


def test_training_and_evaluation_share_no_instance(make):
    with pytest.raises(UserError, match="have none in common"):
        make(train_instances=(1, 301))
    env = make(train_instances=(2, 2))
    for seed in (None, 0, 7):
        env.reset(seed=seed)
        assert env.instance == 2


def test_the_arms_alone():
    actions = np.stack([np.full(14, -1, np.float32), np.full(14, 1, np.float32)])
    low, high = world.to_client(actions)
    assert low.dtype == np.float32 and low.shape == (23,)
    for got, edge in ((low, world.LOW), (high, world.HIGH)):
        np.testing.assert_allclose(got[world.ARMS], edge[world.ARMS], rtol=1e-6)
        np.testing.assert_allclose(got[:7], [0, 0, 0, 1.025, -1.45, -0.47, 0], rtol=1e-6)
        assert got[14] == got[22] == 1
    whole = world.to_client(np.zeros((1, 23), np.float32))[0]
    np.testing.assert_allclose(whole, (world.LOW + world.HIGH) / 2, atol=1e-7)


def test_the_state_is_the_same_of_both_proprioceptions():
    count = np.arange(256.0)  # as the benchmark's table of 2025 has it
    arms = [*range(158, 165), *range(197, 204)]
    assert world.state_of(count).tolist() == [253, 254, 255, *range(236, 240), *arms, 193 + 194, 232 + 233]
    assert world.part(count, "eef_left_pos").tolist() == [186, 187, 188]
    assert world.part(count, "eef_right_pos").tolist() == [225, 226, 227]
    named = {name: np.random.default_rng(0).normal(size=width) for name, width in server.PROPRIO.items()}
    short, long = np.concatenate([*named.values()]), np.full(256, np.nan)
    for name, where in world.LAYOUTS[256].items():
        long[where] = named[name]
    assert len(short) == 61
    assert np.array_equal(world.state_of(short), world.state_of(long))
    left = named["gripper_left_qpos"].astype(np.float32)
    assert world.state_of(short)[21] == left.sum() and world.state_of(short).dtype == np.float32
    for name in ("eef_left_pos", "eef_right_pos"):
        assert np.array_equal(world.part(short, name), world.part(long, name))
    with pytest.raises(UserError, match=r"must be \(61,\) or \(256,\) numbers"):
        world.state_of(short[:60])


def test_an_observation_in_all_its_forms():
    rgb = {link: np.full((2, 2, 4), k, np.uint8) for k, link in enumerate(server.CAMERAS.values())}
    nested = {"robot_r1": {f"robot_r1:{x}:Camera:0": {"rgb": y} for x, y in rgb.items()}}
    nested["robot_r1"]["proprio"] = np.arange(61.0)
    flat = {f"robot_r1::robot_r1:{x}:Camera:0::rgb": y[None] / 255 for x, y in rgb.items()}
    flat |= {"robot_r1::proprio": np.arange(61.0)[None], "robot_r1::cam_rel_poses": np.zeros(21)}
    flat |= {f"robot_r1::robot_r1:{x}:Camera:0::depth_linear": np.zeros((2, 2)) for x in rgb}
    for obs in (nested, flat):
        images, proprio = server.pick(obs)
        assert [images[name][0, 0].tolist() for name in server.CAMERAS] == [[k] * 3 for k in range(3)]
        assert {(x.shape, x.dtype.name) for x in images.values()} == {((2, 2, 3), "uint8")}
        assert proprio.shape == (61,)
    del nested["robot_r1"]["robot_r1:zed_link:Camera:0"]
    with pytest.raises(UserError, match="not of the R1Pro: no rgb of zed_link"):
        world.from_client(nested)


def test_messages_of_any_array_come_back(tmp_path):
    import socket

    arrays = {
        "a": np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::-1],
        "b": np.float64([1.5]),
        "c": np.eye(3),
    }
    one, other = socket.socketpair()
    server.send(one, {"do": "x"}, arrays)
    found = server.receive(other)
    assert found.pop("do") == "x" and all(np.array_equal(found[name], x) for name, x in arrays.items())
    one.close()
    with pytest.raises(EOFError):
        server.receive(other)


@pytest.mark.parametrize(
    ("wish", "flags", "said"),
    [
        ({"absent": True}, {}, "has no OmniGibson (No module named 'isaacsim'); give its Python"),
        ({"dim": 21}, {}, "exit code 1: ValueError: its robot takes 21 numbers, not 23"),
        ({}, {"activity": "make_pizza"}, "make_pizza_0_301_template-tro_state.json does not exist"),
        (None, {"simulator": "/nowhere/python"}, "/nowhere/python cannot be started: No such file"),
        (None, {"simulator": "/bin/false"}, "/bin/false: the simulator ended with exit code 1"),
        (None, {"simulator": None}, "needs --simulator, the Python of an environment with OmniGibson"),
    ],
)
def test_what_is_missing_is_one_sentence(fake, wish, flags, said):
    env = world.make(**{"simulator": wish is not None and fake(**wish)} | flags, split="eval")
    with pytest.raises(UserError) as error:
        env.reset(seed=0)
    assert said in str(error.value) and "\n" not in str(error.value), error.value
    env.close()
    assert not simulators()


def envs_of(fake, wish, flags=""):
    words = f"--env behavior --size 16 --num-workers 1 --chunk 8 {flags} --train-instances 1 2".split()
    args, _ = read_flags([*words, "--simulator", fake(**wish)], ppo_vla.Args, ppo_vla.PRESETS, "ppo_vla")
    return make_envs(args, "train", 1, autoreset=True)


@pytest.mark.parametrize(("how", "said"), [("die", "GPU fell off the bus"), ("hang", "no answer for 3 s")])
def test_a_simulator_that_dies_or_hangs_is_replaced_and_counted(fake, tmp_path, how, said):
    (tmp_path / "once").touch()
    wish = {how: 2, "once": str(tmp_path / "once"), "goal": [9]}
    envs = envs_of(fake, wish, "--worker-timeout 3" if how == "hang" else "")
    envs.reset()
    old = simulators()
    actions = np.zeros((1, 8, 23), np.float32)
    with pytest.warns(RuntimeWarning, match=said):
        *_, info = envs.step(actions)
    assert info["lost"].all() and envs.lost_episodes == 1
    *_, info = envs.step(actions)
    assert info["steps"] == 8 and not any(x.is_running() and x.status() != "zombie" for x in old)
    new = simulators()
    envs.close()
    psutil.wait_procs(new, 5)
    assert len(new) == 1 and not new[0].is_running()


FLAGS = f"{TINY} --env behavior --train-instances 1 2 --eval-instances 301 302"
PPO = f"{FLAGS} --num-envs 2 --num-steps 2 --total-timesteps 8 --critic-warmup 0 --policy-warmup 0"
PPO += " --minibatch-size 4"


def test_the_command_lines(fake, tmp_path):
    """PPO, stopped runs' resume, evaluation with videos and metrics, GRPO."""
    simulator = f"--simulator {fake(goal=[2, 4])}"
    done = shell(
        ppo_vla, PPO, simulator, f"--num-workers 1 --output-dir {tmp_path} --run-name ppo", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "ppo")
    assert found["final"]["success_rate"] == 1.0 and found["final"]["mean_length"] == 4.0
    assert found["final"]["mean_reward"] == 1.0 and found["args"]["gamma"] == 0.99
    assert scalars(tmp_path / "ppo")["policy/first_ratio_error"][0][1] < 1e-5
    evaluation = (
        f"--evaluate --checkpoint {tmp_path}/ppo --output-dir {tmp_path} --num-workers 0 --device cpu"
    )
    run(
        ppo_vla,
        evaluation,
        f"--run-name e --capture-video --metrics {tmp_path}/m --eval-episodes 2 --eval-envs 1",
    )
    assert results(tmp_path / "e")["final"] == found["final"]
    assert [x.name for x in sorted((tmp_path / "m").iterdir())] == [
        f"turning_on_radio_{k}_0.json" for k in (301, 302)
    ]
    (width, height), count = frames(tmp_path / "e/videos/episode_0.mp4")
    assert width == 672 and 470 < height < 520 and count == 4 + 10  # with task, step and success below
    run(grpo_vla, f"{FLAGS} {simulator} --checkpoint {tmp_path}/ppo --num-workers 0 --output-dir {tmp_path}",
        "--run-name grpo --num-envs 2 --group-size 2 --num-groups 1 --total-timesteps 8 --minibatch-size 4",
        "--accuracy-low 0 --accuracy-high 1 --max-refill 1")  # fmt: skip
    assert not simulators()


def test_a_stopped_run_goes_on_with_new_episodes_that_are_counted(fake, tmp_path, monkeypatch):
    flags = f"{PPO} --simulator {fake(goal=[2, 99])} --num-workers 0 --actions arms --output-dir {tmp_path}"
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 1)
    assert call(ppo_vla, flags, "--run-name r --total-timesteps 16").code == 130
    monkeypatch.undo()
    run(ppo_vla, f"--resume {tmp_path}/r")
    assert scalars(tmp_path / "r")["rollout/lost_episodes"][-1][1] == 2
    final = results(tmp_path / "r")["final"]  # half of the goal, until time is up
    assert (final["success_rate"], final["mean_reward"], final["mean_length"]) == (0, 0.5, 6)
    assert load_checkpoint(tmp_path / "r")["backbone"]["action_dim"] == 14


def test_wrong_flags_are_one_sentence(tmp_path):
    for script, flags, said in (
        (ppo_vla, "--cameras heads", "has no camera 'heads'; known: head, left_wrist, right_wrist"),
        (ppo_vla, "--eval-instances 5 1", "must be ranges that have none in common"),
        (ppo_vla, "--size 16", "needs --simulator, the Python of"),
        (bc_warmup, "--size 16", "needs --demos"),
    ):
        done = call(script, "--env behavior", flags, f"--output-dir {tmp_path} --num-workers 0 --device cpu")
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
    assert not [*tmp_path.iterdir()]


def test_a_killed_run_leaves_no_simulator(fake, tmp_path):
    """kill -9 of the process that holds the simulator, in the middle of a step."""
    import subprocess

    code = f"""
import numpy as np
from common.envs import behavior
env = behavior.make(simulator={fake(hang=1)!r}, size=16)
env.reset(seed=0)
print(env.process.pid, flush=True)
env.advance(np.zeros(23, np.float32))
"""
    held = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(ppo_vla.__file__).parent
    )
    simulator = psutil.Process(int(held.stdout.readline()))
    time.sleep(0.3)
    held.kill()
    held.wait()
    held.stdout.close()
    _, alive = psutil.wait_procs([simulator], 5)
    for process in alive:
        process.kill()
    assert not alive
