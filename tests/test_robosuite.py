"""robosuite's world: physics and sensors against the stock loop, tasks, experts, states, command lines.

Needs requirements-robosuite.txt.
"""

import importlib.util

import numpy as np
import pytest
from test_cli import assert_same_run, call, frames, results, run, scalars, stopped_by

import bc_warmup
import ppo_vla
import sac
from common import UserError
from common.envs import robosuite as world
from common.envs import simulation

if not importlib.util.find_spec("robosuite"):
    pytest.skip(
        "ROBOSUITE IS NOT INSTALLED, ITS WORLD IS NOT TESTED: python3 common/install.py --robosuite",
        allow_module_level=True,
    )

SMALL = dict(size=32)


@pytest.fixture
def make():
    made = []

    def build(*tasks, **kwargs):
        made.append(world.make(tasks=tasks or ("Lift",), **SMALL | kwargs))
        return made[-1]

    yield build
    for env in made:
        env.close()


def moves(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


# --- against the stock loop


@pytest.mark.parametrize("task", ["Lift", "TwoArmLift"])
def test_it_is_the_stock_loop_bit_for_bit(make, task):
    """Physics, staged reward, object-state and proprioception of robosuite's own step."""
    import robosuite
    from robosuite.controllers import load_controller_config

    env = make(task, cameras=("none",), reward="shaped")
    env.reset(seed=3)
    rng = np.random.default_rng([0, 3])
    rng.choice(1)
    state = np.random.RandomState(int(rng.integers(2**32))).get_state()
    np.random.seed(0)
    stock = robosuite.make(
        task, robots=["Panda"] * world.TASKS[task][0], has_renderer=False, has_offscreen_renderer=False,
        controller_configs=load_controller_config(default_controller="OSC_POSE"), use_camera_obs=False,
        reward_shaping=True, ignore_done=True, hard_reset=False, control_freq=20,
    )  # fmt: skip
    np.random.set_state(state)
    stock.reset()
    for action in moves(env, 6):
        reward, *_ = env.advance(action)
        seen, stock_reward, *_ = stock.step(action.astype(np.float64))
        assert np.array_equal(env.simulation.data.qpos, stock.sim.data.qpos) and reward == stock_reward - 1
        proprio = env.observe()["proprio"]
        for k in range(env.arms):
            own = proprio[8 * k : 8 * k + 8]
            assert np.array_equal(own[:3], seen[f"robot{k}_eef_pos"].astype(np.float32))
            assert np.array_equal(own[6:], seen[f"robot{k}_gripper_qpos"].astype(np.float32))
            quaternion = np.roll(seen[f"robot{k}_eef_quat"], 1)
            assert np.array_equal(own[3:6], simulation.axis_angle(quaternion).astype(np.float32))
        np.testing.assert_array_equal(proprio[8 * env.arms :], seen["object-state"].astype(np.float32))
    stock.close()


# --- episodes


@pytest.mark.parametrize("task", world.TASKS)
def test_every_task_is_made_and_seeded(make, task):
    env = make(task, cameras=("none",), horizon=3)
    first, again = env.reset(seed=5)[0], env.reset(seed=5)[0]
    assert env.observation_space.contains(first) and np.array_equal(first["proprio"], again["proprio"])
    assert not np.array_equal(first["proprio"], env.reset(seed=6)[0]["proprio"])
    assert not np.array_equal(
        first["proprio"], make(task, cameras=("none",), split="eval").reset(seed=5)[0]["proprio"]
    )
    env.reset(seed=5)
    ends = [env.advance(action)[1:3] for action in moves(env, 3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert (len(moves(env, 1)[0]), len(env.instructions)) == (7 * world.TASKS[task][0], 1)


def test_pictures_and_videos(make):
    env = make("TwoArmLift", cameras=("agentview", "wrist0", "wrist1"))
    obs = env.reset(seed=0)[0]
    assert obs["image"].shape == (3, 32, 32, 3) and obs["proprio"].shape == (16,)
    assert all(a.std() > 5 for a in obs["image"]) and env.observation_space.contains(obs)
    film = env.render()
    assert film.shape == (448, 672, 3)
    for place, name in (
        (film[:224, :224], "wrist0"),
        (film[224:, :224], "wrist1"),
        (film[:, 224:], "agentview"),
    ):
        (picture,), *_ = env.turn().look([world.CAMERAS[name]], len(place))
        assert np.array_equal(place, picture)
    assert make().reset(seed=0)[0]["image"].shape == (2, 32, 32, 3)


def test_one_arms_video_is_overview_and_wrist(make):
    env = make()
    env.reset(seed=0)
    film = env.render()
    for place, name in ((film[:, :224], "agentview"), (film[:, 224:], "wrist")):
        assert np.array_equal(place, env.turn().look([world.CAMERAS[name]], 224)[0][0])


def test_what_stands_beside_a_picture_is_left_out_and_changes_nothing(make, monkeypatch):
    env = make("TwoArmLift", cameras=("agentview", "wrist0", "wrist1"), size=84)
    env.reset(seed=0)
    left_out, found = simulation.outside, []

    def outside(*args):
        found.append(left_out(*args))
        return found[-1]

    for action in moves(env, 9):
        env.advance(action)
        monkeypatch.setattr(simulation, "outside", outside)
        fast = env.observe()["image"]
        monkeypatch.setattr(simulation, "outside", lambda model, *_: np.zeros(model.ngeom, bool))
        assert np.array_equal(env.observe()["image"], fast)
    shares = np.mean(found, 1).reshape(-1, 3)[:, 1:]  # of the wrists' pictures: much, and it moves with them
    assert shares.min() > 0.3 and len(np.unique(shares)) > 2


def test_environments_take_turns_and_states_are_exact(make):
    """Two episodes interleaved in one simulation equal each alone; a saved one goes on, in another too."""
    alone = []
    for seed in (1, 2):
        env = make()
        env.reset(seed=seed)
        alone.append([env.step(action)[0] for action in moves(env, 4, seed)])
        env.close()
    pair = [make(), make()]
    for seed, env in zip((1, 2), pair, strict=True):
        env.reset(seed=seed)
    assert pair[0].simulation is pair[1].simulation
    for t in range(4):
        if t == 2:
            state, pair[1] = pair[1].get_state(), make()
            pair[1].set_state(state)
        for k, env in enumerate(pair):
            obs = env.step(moves(env, 4, k + 1)[t])[0]
            assert all(np.array_equal(obs[key], alone[k][t][key]) for key in obs)


def test_what_a_reward_is(make):
    env, shaped = make(), make(reward="shaped")
    for each in (env, shaped):
        each.reset(seed=0)
    rewards = []
    for _ in range(60):
        action = env.expert()
        (plain, ended, _, info), (staged, *_) = env.advance(action), shaped.advance(action)
        rewards.append((plain, staged))
        assert plain == float(ended) == float(info["success"])
        if ended:
            break
    assert ended and len(rewards) < 50 and rewards[-1] == (1.0, 0.0)
    assert all(a == 0 and -1 < b < -0.2 for a, b in rewards[:-1])


def test_eight_moves(make):
    """2 cm of the set point along an axis, and the gripper stays as it was told last."""
    env = make(actions="discrete", cameras=("none",))
    for move in range(6):
        env.reset(seed=0)
        before = env.observe()["proprio"][:3].copy()
        for _ in range(10):
            env.advance(move)
        way = env.observe()["proprio"][:3] - before
        axis, sign = divmod(move, 2)
        assert np.abs(way).argmax() == axis and np.sign(way[axis]) == 1 - 2 * sign and abs(way[axis]) > 0.03
    widths = []
    for move in (6, 4, 7, 4):
        for _ in range(8):
            env.advance(move)
        widths.append(np.ptp(env.observe()["proprio"][6:8]))
    assert widths[0] < 0.03 and widths[1] < 0.01 and widths[2] > 0.05 and widths[3] > 0.07, widths
    state = env.get_state()
    env.advance(6)
    env.set_state(state)
    env.advance(4)
    assert env.grip == -1.0


@pytest.mark.parametrize(
    ("task", "actions", "steps"),
    [
        ("Lift", "continuous", 50),
        ("Lift", "discrete", 90),
        ("TwoArmLift", "continuous", 60),
        ("PickPlaceCan", "continuous", 160),
        pytest.param("PickPlaceCan", "discrete", 400, marks=pytest.mark.slow),
    ],
)
def test_experts_succeed_on_evaluations_layouts(make, task, actions, steps):
    env = make(task, actions=actions, split="eval", cameras=("none",), horizon=steps)
    won = 0
    for seed in range(3):
        env.reset(seed=seed)
        success = truncated = False
        while not (success or truncated):
            _, success, truncated, _ = env.advance(env.expert())
        won += success
    assert won == 3


@pytest.mark.parametrize("task, joint", [("Lift", "cube_joint0"), ("PickPlaceCan", "Can_joint0")])
def test_pixels_are_where_the_thing_is_seen(make, task, joint):
    """What changes in the pictures when the thing is taken away."""
    env = make(task, cameras=("agentview", "wrist"), size=48)
    env.reset(seed=0)
    for _ in range(12):
        env.advance(env.expert())
    before, pixels = env.observe()["image"].astype(int), env.pixels()
    assert pixels.shape == (2, 2, 2) and pixels.dtype == np.float32
    simulation = env.simulation
    simulation.seen[0][simulation.model.joint(joint).qposadr[0] + 2] += 9
    gone = np.abs(env.observe()["image"] - before).sum(-1) > 30
    for there, (x, y) in zip(gone, pixels[:, 0], strict=True):
        rows, columns = np.nonzero(there)
        assert len(rows) > 5
        np.testing.assert_allclose([x, y], [columns.mean() / 24 - 1, rows.mean() / 24 - 1], atol=0.12)
    assert np.isnan(pixels[:, 1]).all() == (task == "Lift")  # no place; the can's bin


def test_pixels_are_of_ones_own_turn(make):
    one, other = make(cameras=("agentview",)), make(cameras=("agentview",))
    one.reset(seed=0)
    for _ in range(5):
        one.advance(one.expert())
    one.observe()
    pixels = one.pixels()
    other.reset(seed=1)
    assert not np.array_equal(other.pixels(), pixels, equal_nan=True)
    assert np.array_equal(one.pixels(), pixels, equal_nan=True)


def test_both_handles_are_pixels(make):
    env = make("TwoArmLift", cameras=("agentview",))
    env.reset(seed=0)
    assert np.isfinite(env.pixels()).all()


def test_demonstrations_whatever_the_number_of_workers():
    demos, same = (world.demonstrations(2, 0, n, 0.2, cameras=("wrist",), **SMALL) for n in (1, 2))
    starts, size = demos["episode_starts"], len(demos["task"])
    assert starts[0] == 0 and len(starts) == 2 and demos["image"].shape == (size, 1, 32, 32, 3)
    assert demos["pixels"].shape == (size, 1, 2, 2) and np.isfinite(demos["pixels"][:, 0, 0]).mean() > 0.8
    assert (
        demos["proprio"].shape == (size, 8)
        and demos["actions"].dtype == demos["executed"].dtype == np.float32
    )
    assert np.abs(demos["actions"]).max() <= 1 and not np.array_equal(demos["actions"], demos["executed"])
    assert all(np.array_equal(demos[key], same[key], equal_nan=key == "pixels") for key in demos)


# --- what is refused, and runs


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(tasks=("Pour",)), "robosuite has no task 'Pour'; known: Lift, "),
        (dict(tasks=()), "robosuite has no task 'none'"),
        (dict(cameras=("nose",)), "robosuite has no camera 'nose'"),
        (dict(cameras=("wrist1",)), "Lift has one arm: its camera is wrist"),
        (dict(tasks=("Lift", "TwoArmLift")), "Lift and TwoArmLift are not all of one arm, or of two"),
        (dict(tasks=("Lift", "Door"), cameras=("none",)), "The states of tasks differ in length"),
        (dict(tasks=("TwoArmLift",), actions="discrete"), "moves one arm; two need --actions continuous"),
        (dict(size=0), "size must be at least 1 and horizon 0 or more, got 0"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(kwargs, sentence):
    with pytest.raises(UserError, match=sentence):
        world.make(**kwargs)


def test_without_robosuite_or_an_expert(make, monkeypatch):
    env = make("Door", cameras=("none",))
    env.reset(seed=0)
    with pytest.raises(
        UserError, match="robosuite's Door has no scripted expert; Lift, PickPlaceCan, TwoArm"
    ):
        env.expert()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="needs robosuite: pip install --no-deps -r requirements-robosuite.txt"
    ):
        world.make()


EVAL = "--env robosuite --eval-episodes 1 --eval-envs 1 --num-workers 0 --device cpu --size 32 --seed 3"
BC = f"{EVAL} --num-demos 2 --gradient-steps 3 --batch-size 8 --warmup-steps 1 --demo-noise 0.1"
PPO = "--num-envs 2 --num-steps 2 --total-timesteps 30 --minibatch-size 4 --critic-warmup 0 --save-freq 1"
PPO += " --policy-warmup 0"


@pytest.mark.parametrize("actions", [pytest.param("continuous", marks=pytest.mark.slow), "discrete"])
def test_warmup_then_ppo_and_its_resume(tmp_path, monkeypatch, actions):
    monkeypatch.setitem(world.TASKS, "Lift", (1, 90, "lift the cube"))
    out = f"--cameras wrist --actions {actions} --output-dir {tmp_path}"
    ppo = f"{EVAL} {PPO} {out} --checkpoint {tmp_path}/warmup"
    run(bc_warmup, BC, f"{out} --run-name warmup")
    monkeypatch.setitem(world.TASKS, "Lift", (1, 12, "lift the cube"))
    run(ppo_vla, ppo, "--run-name whole")
    found = results(tmp_path / "whole")
    assert found["args"]["head"] == ("discrete" if actions == "discrete" else "tokens")
    assert found["args"]["cameras"] == ["wrist"] and found["gradient_steps"] > 2
    errors = [value for _, value in scalars(tmp_path / "whole")["policy/first_ratio_error"]]
    assert max(errors) < 1e-5
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 1)
    assert call(ppo_vla, ppo, "--run-name stopped").code == 130
    monkeypatch.undo()
    monkeypatch.setitem(world.TASKS, "Lift", (1, 12, "lift the cube"))
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_two_arms_are_trained_filmed_and_cloned_from_their_rollouts(tmp_path, monkeypatch):
    monkeypatch.setitem(world.TASKS, "TwoArmLift", (2, 8, "lift the pot with both arms"))
    arms = f"{EVAL} --tasks TwoArmLift --cameras agentview wrist0 wrist1 --output-dir {tmp_path}"
    run(ppo_vla, arms, f"{PPO} --run-name ppo --capture-video")
    (film, *_) = sorted((tmp_path / "ppo" / "videos").rglob("*.mp4"))
    (width, height), _ = frames(film)
    assert width == 672 and 448 < height < 500
    collect = f"--collect 1 --save-dataset {tmp_path}/one.hdf5 --run-name got"
    run(ppo_vla, arms, f"--checkpoint {tmp_path}/ppo {collect}")
    run(bc_warmup, arms, f"--demos {tmp_path}/one.hdf5 --gradient-steps 2 --batch-size 4 --run-name bc")


def test_the_expert_is_cloned_from_states_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.setitem(world.TASKS, "Lift", (1, 90, "lift the cube"))
    states = f"--cameras none --backbone mlp --head gaussian --chunk 2 --output-dir {tmp_path}"
    run(bc_warmup, BC, f"{states} --run-name warmup")
    monkeypatch.setitem(world.TASKS, "Lift", (1, 12, "lift the cube"))
    run(ppo_vla, f"{EVAL} {PPO} {states} --checkpoint {tmp_path}/warmup --run-name ppo")
    errors = [value for _, value in scalars(tmp_path / "ppo")["policy/first_ratio_error"]]
    assert max(errors) < 1e-5


def test_states_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(world.TASKS, "Lift", (1, 10, "lift the cube"))
    states = f"--env robosuite --cameras none --reward shaped --device cpu --output-dir {tmp_path}"
    train = "--total-timesteps 40 --learning-starts 20 --eval-episodes 1 --run-name sac"
    run(sac, states, train)
    assert results(tmp_path / "sac")["final"]["success_rate"] == 0.0
