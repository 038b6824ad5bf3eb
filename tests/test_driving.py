"""MetaDrive's world: reward, ends, levels, pictures, exact states, command lines.

Needs requirements-driving.txt.
"""

import importlib.util

import numpy as np
import pytest
from conftest import live_workers
from test_cli import assert_same_run, call, one_thread, results, run, scalars, stopped_by  # noqa: F401

import bc_warmup
import grpo_vla
import ppo_vla
import sac
from common import UserError
from common.checkpoint import load_checkpoint
from common.envs import driving as world
from common.envs import make_envs

if not importlib.util.find_spec("metadrive"):
    pytest.skip(
        "METADRIVE IS NOT INSTALLED, ITS WORLD IS NOT TESTED: python3 common/install.py --driving",
        allow_module_level=True,
    )

STATES = dict(cameras=("none",), map_blocks=(1,), traffic=(0.0,))


@pytest.fixture
def make():
    """Of which there is one at a time."""
    made = []

    def build(**kwargs):
        while made:
            made.pop().close()
        made.append(world.make(**STATES | kwargs))
        return made[-1]

    yield build
    while made:
        made.pop().close()


def wander(env, steps, seed=0):
    """Random driving, mostly straight on -> what is seen and paid, in one row a step."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(steps):
        obs, reward, terminated, *_ = env.step(rng.normal([0.0, 0.5], [0.05, 0.5]))
        rows.append(np.r_[obs["proprio"], reward, env.car.position])
        if terminated:
            break
    return np.array(rows)


# --- the reward


@pytest.mark.parametrize(
    ("what", "terms"),
    [
        ((2.0, 0.5, 0.25, False, (0.0, 0.0)), (2.0, -0.25, 0.25, 0.0, 0.0)),
        ((-1.5, -3.0, 0.5, True, (2.0, -2.0)), (-1.5, -1.0, 0.0, -1.0, -1.0)),
        ((0.0, 0.0, 0.9, False, (0.0, 1.0)), (0.0, 0.0, 0.0, 0.0, -0.125)),
    ],
)
def test_terms_of_the_reward(what, terms):
    *scalars, change = what
    found = world.reward_terms(*scalars, np.array(change))
    assert found == dict(zip(("progress", "lane", "speed", "collision", "comfort"), terms, strict=True))


def test_terms_are_read_off_the_car(make):
    """On the first straight: metres, offset, speed and the action's change, each weighed alone."""
    only = dict.fromkeys(("progress_weight", "lane_weight", "speed_weight", "comfort_weight"), 0.0)
    env = make(**only | {"progress_weight": 2.0})
    env.reset(seed=0)
    before = env.car.position[0]
    ways = [env.advance([0.0, 1.0])[0] for _ in range(15)]
    assert sum(ways) / 2 == pytest.approx(env.car.position[0] - before, abs=1e-3) and sum(ways) > 5
    env.args.progress_weight, env.args.speed_weight = 0.0, 1.0
    assert env.advance([0.0, 1.0])[0] == pytest.approx(env.car.speed_km_h / env.car.max_speed_km_h)
    env.args.speed_weight, env.args.comfort_weight = 0.0, 3.0
    assert env.advance([0.5, 0.0])[0] == pytest.approx(-3.0 * (0.5**2 + 1.0**2) / 2 / 4)
    env.args.comfort_weight, env.args.lane_weight = 0.0, 1.0
    paid = env.advance([0.5, 0.0])[0]
    offset = env.car.lane.local_coordinates(env.car.position)[1] / (env.car.lane.width / 2)
    assert paid == pytest.approx(-min(1.0, offset**2)) and paid < 0


# --- episodes


def test_arrival_is_success(make):
    env, ends = make(split="eval"), []
    for seed in range(2):
        env.reset(seed=seed)
        while True:
            reward, terminated, truncated, info = env.advance(env.expert())
            ends.append((terminated, truncated, info["success"]))
            if terminated or truncated:
                break
        assert ends.pop() == (True, False, True) and 1 < reward < 1.5
    assert set(ends) == {(False, False, False)}
    env = make(reward="sparse")
    env.reset(seed=0)
    rewards = [env.advance(env.expert())[0] for _ in range(len(ends))][:50]
    assert set(rewards) == {0.0}


def test_leaving_the_road_fails_and_time_is_up(make):
    env = make()
    env.reset(seed=1)
    for _ in range(100):
        reward, terminated, truncated, info = env.advance([1.0, 1.0])
        if terminated:
            break
    assert (terminated, truncated, info) == (True, False, {"success": False}) and -1.2 < reward < -0.7
    env = make(horizon=3)
    env.reset(seed=1)
    assert [env.advance([0.0, 0.0])[1:3] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]


def test_a_crash_fails(make):
    """Full throttle into the traffic ahead."""
    env, terminated = make(split="eval", traffic=(0.5,)), False
    env.reset(seed=0)
    while not terminated:
        reward, terminated, truncated, info = env.advance([env.expert()[0], 1.0])
    assert env.car.crash_vehicle and not info["success"] and not truncated and -1.2 < reward < -0.5


def test_an_episode_follows_from_its_seed_alone(make):
    """Whatever was driven before, in this process or another; and from its state, played once more."""
    env = make(traffic=(0.3,))
    first, _ = env.reset(seed=3)
    whole = wander(env, 40)
    env.reset(seed=4)
    wander(env, 20)
    again, _ = env.reset(seed=3)
    assert np.array_equal(first["proprio"], again["proprio"])
    part = wander(env, 10)
    state = env.get_state()
    env = make(traffic=(0.3,))
    env.set_state(state)
    rng = np.random.default_rng(0)
    for _ in part:
        rng.normal(size=2)
    for row in whole[len(part) :]:
        obs, reward, *_ = env.step(rng.normal([0.0, 0.5], [0.05, 0.5]))
        assert np.array_equal(np.r_[obs["proprio"], reward, env.car.position], row)
    assert np.array_equal(part, whole[: len(part)]) and len(whole) > 15
    other, _ = env.reset()
    assert not np.array_equal(first["proprio"], other["proprio"])
    state = env.get_state()
    nexts = [env.reset()[0]["proprio"] for _ in range(2)]
    env.set_state(state)
    assert all(np.array_equal(env.reset()[0]["proprio"], x) for x in nexts)


def test_splits_share_no_scenario(make, monkeypatch):
    numbers = {"train": [], "eval": []}
    monkeypatch.setattr(
        world.DrivingEnv, "_begin", lambda env, _, scenario: numbers[env.split].append(scenario)
    )
    monkeypatch.setattr(world.DrivingEnv, "observe", lambda env: None)
    for split in numbers:
        env = make(split=split)
        for seed in (0, 1, 2, 999, 1000, 2**31, 2**32 + 5):
            for again in (seed, None, None):
                env.reset(seed=again)
    assert max(numbers["eval"]) < 1000 <= min(numbers["train"]) and max(numbers["train"]) < 11_000
    assert numbers["eval"][0::3][:5] == [0, 1, 2, 999, 0] and numbers["eval"][:3] == [0, 1, 2]
    assert len(set(numbers["train"])) > 15


def test_levels_are_tasks(make):
    env = make(map_blocks=(1, 2), traffic=(0.0, 0.4))
    assert env.instructions[1] == "drive to the destination, 1 blocks away, in traffic of density 0.4"
    assert env.levels == [(1, 0.0), (1, 0.4), (2, 0.0), (2, 0.4)]
    seen = {int(env.reset(seed=seed)[0]["task"]) for seed in range(12)}
    assert seen == {0, 1, 2, 3}
    for level, (blocks, density) in enumerate(env.levels):
        weights = np.eye(4)[level]
        obs, _ = env.reset(seed=7, options={"task_weights": weights})
        assert obs["task"] == level and env.limit == 100 + 300 * blocks
        engine = env.world.engine
        assert len(engine.map_manager.current_map.blocks) == blocks + 1  # and the one that it begins on
        assert (engine.traffic_manager.get_vehicle_num() > 0) == (density > 0)
    assert "task" not in make().reset(seed=0)[0]


def test_pictures_are_of_the_moment_alone(make):
    env = make(cameras=("topdown",), size=64, traffic=(0.3,))
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs) and obs["proprio"].shape == (19,) and obs["task"] == 0
    assert obs["image"].shape == (1, 64, 64, 3) and env.render().shape == (448, 448, 3)
    car = env.render()[220:228, 222:226]
    assert (car == car[0, 0]).all() and not (env.render()[150:160, 222:226] == car[0, 0]).all()
    for _ in range(10):
        env.advance([0.1, 1.0])
    late = env.observe()["image"]
    assert not np.array_equal(late, obs["image"]) and np.array_equal(late, env.observe()["image"])
    state = env.get_state()
    env.reset(seed=5)
    env.set_state(state)
    assert np.array_equal(late, env.observe()["image"])
    assert len(make(cameras=("none",)).reset(seed=0)[0]["proprio"]) == 259


def test_what_is_near_is_what_metadrive_sees(make):
    env = make(split="eval", traffic=(0.5,))
    obs, _ = env.reset(seed=0)
    seen = env.world.observations["default_agent"].observe(env.car)
    np.testing.assert_allclose(obs["proprio"], np.r_[2 * seen[:19] - 1, 1 - seen[19:]], atol=1e-6)
    assert obs["proprio"][19:].max() > 0.1 and (obs["proprio"][19:] == 0).any()


def test_demonstrations_whatever_the_number_of_workers(monkeypatch):
    flags = dict(cameras=("topdown",), size=32, map_blocks=(1,), traffic=(0.0,))
    demos, same = (world.demonstrations(1, 2, n, 0.1, **flags) for n in (1, 2))
    size = len(demos["task"])
    assert demos["episode_starts"].tolist() == [0] and 100 < size < 200
    assert demos["image"].shape == (size, 1, 32, 32, 3) and demos["actions"].shape == (size, 2)
    assert not np.array_equal(demos["actions"], demos["executed"]) and np.abs(demos["actions"]).max() <= 1
    assert all(np.array_equal(demos[key], same[key]) for key in demos)
    monkeypatch.setattr(world.DrivingEnv, "expert", lambda env: np.ones(2, np.float32))  # off the road
    with pytest.raises(UserError, match="The expert succeeded in none of 1 episodes"):
        world.demonstrations(1, 2, 1, 0.1, **flags)


# --- what is refused, and runs


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(map_blocks=(11,)), "--map-blocks must be from 1 to 10, not 11."),
        (dict(size=2000), "--size must be from 1 to 1024, not 2000."),
        (dict(cameras=("none", "topdown")), "none is no picture beside another"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(kwargs, sentence):
    with pytest.raises(UserError, match=sentence):
        world.make(**kwargs)


def test_without_metadrive_or_a_second_time(make, monkeypatch):
    make()
    with pytest.raises(UserError, match="MetaDrive has one environment in a process"):
        world.make(**STATES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="metadrive .*: pip install --no-deps -r requirements-driving.txt"):
        world.make()


EVAL = "--env driving --map-blocks 1 --traffic 0 --horizon 12 --eval-episodes 2 --eval-envs 1 --device cpu"
EVAL += " --seed 3"
PPO = f"{EVAL} --num-envs 2 --num-steps 6 --total-timesteps 36 --minibatch-size 8 --save-freq 1"
PPO += " --update-epochs 1"
GRPO = f"{EVAL} --num-envs 2 --group-size 2 --num-groups 1 --max-refill 1 --total-timesteps 40"


@pytest.mark.parametrize(
    "flags",
    [
        "--env driving --traffic 1.5",
        "--env driving --traffic nan",
        "--env driving --map-blocks 0",
        "--env driving --map-blocks 99",
        "--env driving --size 0",
        "--env driving --horizon -1",
        "--env driving --num-workers 2",
        "--env driving --num-workers 0",
        "--env driving --num-envs 100000",
        "--env driving --reward sparse --comfort-weight 1",
        "--env driving --speed-weight -1",
        "--env driving --cameras none topdown",
        "--env driving --backbone tiny --head tokens",
        "--env driving --head discrete",
        "--env tabletop --traffic 0.1",
    ],
)
def test_hostile_flags(tmp_path, flags):
    done = call(ppo_vla, flags, f"--output-dir {tmp_path}")
    assert done.code == 2 and not list(tmp_path.iterdir()) and "Traceback" not in done.err, done


@pytest.mark.parametrize("script", [ppo_vla, grpo_vla])
def test_a_stopped_run_from_states_goes_on_bit_identically(tmp_path, monkeypatch, script):
    base = f"{PPO if script is ppo_vla else GRPO} --output-dir {tmp_path}"
    run(script, base, "--run-name whole")
    found = results(tmp_path / "whole")
    assert found["args"]["backbone"] == "mlp" and found["gradient_steps"] >= 3
    assert scalars(tmp_path / "whole")["policy/first_ratio_error"][0][1] < 1e-5
    stopped_by(monkeypatch, script, "clipped_surrogate", 2)
    assert call(script, base, "--run-name stopped").code == 130
    monkeypatch.undo()
    lost = load_checkpoint(tmp_path / "stopped")["processes"][0]["state"]["envs"]["lost_episodes"]
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert lost == 0
    if script is ppo_vla:
        run(ppo_vla, f"--evaluate --checkpoint {tmp_path}/whole --output-dir {tmp_path} --run-name e {EVAL}")
        assert results(tmp_path / "e")["final"] == found["final"]


def test_cloned_from_the_expert_and_trained_on_pictures(tmp_path):
    demos = "--seed 2 --num-demos 1 --gradient-steps 2 --batch-size 4 --warmup-steps 1"
    base = f"--output-dir {tmp_path} --size 32"
    run(bc_warmup, EVAL.replace("--horizon 12", "--horizon 0"), demos, base, "--run-name bc")
    start = f"--checkpoint {tmp_path}/bc --cameras topdown {base}"
    run(ppo_vla, PPO, start, "--run-name ppo --capture-video --chunk 4")
    assert list((tmp_path / "ppo/videos").glob("*.mp4"))
    run(grpo_vla, GRPO, f"{start} --run-name grpo")
    assert results(tmp_path / "grpo")["args"]["backbone"] == "tiny"


def test_the_curriculum_is_over_levels(tmp_path):
    levels = PPO.replace("--traffic 0", "--traffic 0 0.2").replace("--map-blocks 1", "--map-blocks 1 2")
    run(ppo_vla, levels, f"--curriculum --output-dir {tmp_path} --run-name c")
    saved = load_checkpoint(tmp_path / "c")
    weights = saved["processes"][0]["state"]["envs"]["task_weights"]
    assert {int(row[3]) for row in saved["recent"]} <= set(range(4)) and weights.shape == (2, 4)
    assert (weights > 0).all() and len(results(tmp_path / "c")["final"]["per_task"]) >= 1


def test_states_for_sac_and_a_process_for_each(tmp_path):
    states = f"--env driving --cameras none --map-blocks 1 --traffic 0 --horizon 10 --output-dir {tmp_path}"
    run(sac, states, "--device cpu --total-timesteps 30 --learning-starts 10 --eval-episodes 1 --run-name s")
    assert results(tmp_path / "s")["final"]["success_rate"] == 0.0
    args = ppo_vla.Args(env="driving", num_workers=None)
    vars(args).update(cameras=("none",), map_blocks=(1,), traffic=(0.0,))
    before, envs = len(live_workers()), make_envs(args, "train", 3)
    try:
        assert envs.num_workers == 3 and len(live_workers()) == before + 3
    finally:
        envs.close()
