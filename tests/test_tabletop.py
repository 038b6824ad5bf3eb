"""The tabletop: its contract, tasks, physics and success, splits, renderers, and an exact state."""

import itertools
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from common import UserError
from common.envs import WORLDS, tabletop
from common.envs.tabletop import INSTRUCTIONS, KINDS, OBJECTS, OPEN, SPLITS, TASKS, TabletopEnv
from common.envs.vector import vectorize

IDLE = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


def env_with(kind=None, seed=0, **kwargs):
    """An environment whose first layout has a task of this kind."""
    env = TabletopEnv(**kwargs)
    for layout in itertools.count(seed):
        env.reset(seed=layout)
        if kind in (None, TASKS[env.task][1]):
            return env


def run(env, policy):
    """Plays the running episode without rendering -> rewards, success, terminated, truncated."""
    rewards = []
    while True:
        reward, terminated, truncated, info = env.advance(policy(env))
        rewards.append(reward)
        if terminated or truncated:
            return rewards, info["success"], terminated, truncated


def expert(env):
    return env.expert()


def task_of(kind, x, y):
    return next(i for i, task in enumerate(TASKS) if task[1:4] == (kind, x, y))


def one_sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) > 20


# --- contract


@pytest.mark.parametrize("kwargs", [{}, {"cameras": tabletop.CAMERAS, "size": 32, "reward": "shaped"}])
def test_gymnasium_accepts_it(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the proprioception's range is physics', not declared
        warnings.filterwarnings("ignore", message=".*Box observation space (minimum|maximum) value is.*")
        env = TabletopEnv(**kwargs)
        check_env(env, skip_render_check=True)
    obs, info = env.reset(seed=1)
    cameras, size = len(kwargs.get("cameras", [0])), kwargs.get("size", 64)
    assert obs["image"].shape == (cameras, size, size, 3) and obs["image"].dtype == np.uint8
    assert obs["proprio"].shape == (8,) and obs["proprio"].dtype == np.float32
    assert env.observation_space.contains(obs) and info["success"] is False
    frame = env.render()
    assert frame.shape == (192, 384, 3) and frame.dtype == np.uint8
    env.close()


def test_instructions_are_three_kinds_and_at_least_ten():
    trained = {INSTRUCTIONS[i] for i in TabletopEnv().task_ids}
    assert len(trained) >= 10 and {TASKS[i][1] for i in TabletopEnv().task_ids} == set(KINDS)
    assert len(set(INSTRUCTIONS)) == len(INSTRUCTIONS) == len(TASKS)
    for text, _, x, y, _ in TASKS:
        assert OBJECTS[x] in text and (y < 0 or tabletop.PLATES[y] in text)
    env = TabletopEnv()
    seen = {env.reset(seed=seed)[0]["task"] for seed in range(300)}
    assert seen == set(env.task_ids)


def test_held_out_pairs_are_never_trained_yet_their_parts_are():
    train = [TASKS[i] for i in TabletopEnv("train").task_ids]
    held_out = {TASKS[i][1:4] for i in TabletopEnv("semantics").task_ids} - {task[1:4] for task in train}
    assert len(held_out) >= 2
    unseen = [TASKS[i][0] for i in TabletopEnv("semantics").task_ids]
    assert not set(unseen) & {task[0] for task in train}
    for split in ("eval", "vision", "execution"):
        assert TabletopEnv(split).task_ids == TabletopEnv("train").task_ids
    for kind, x, y in held_out:  # each part is known, their combination is new
        assert any(task[1] == kind for task in train)
        assert any(task[2] == x for task in train) and any(task[3] == y for task in train)
    assert {task[2] for task in train} == {0, 1, 2} and {task[3] for task in train} >= {0, 1}
    words = {word for task in train for word in task[0].split()}
    assert {word for name in OBJECTS + tabletop.PLATES for word in name.split()} <= words
    demos = tabletop.demonstrations(30, seed=0, num_workers=0, size=8)
    assert {TASKS[i][1:4] for i in demos["task"]}.isdisjoint(held_out)
    scenes = tabletop.scenes(60, seed=0, num_workers=0, size=8)
    assert {TASKS[i][1:4] for i in scenes["task"]}.isdisjoint(held_out)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"split": "test"}, "Unknown split 'test'.*known: train, eval"),
        ({"tasks": ("dance",)}, "Unknown task 'dance'.*known: lift, put, move; lift the red cube"),
        (
            {"tasks": ("pick up the red cube",)},
            "Unknown task",
        ),  # a paraphrase is of the split semantics alone
        ({"cameras": ("top",)}, "Unknown cameras"),
        ({"cameras": ()}, "Unknown cameras"),
        ({"renderer": "blender"}, "Unknown renderer 'blender'.*known: ray, gl"),
        ({"reward": "dense"}, "Unknown reward 'dense'.*known: sparse, shaped"),
        ({"size": 4}, "size"),
        ({"size": 10000}, "size"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(kwargs, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        TabletopEnv(**kwargs)
    assert one_sentence(error)
    with pytest.raises(UserError, match=sentence):
        vectorize(("tabletop", WORLDS["tabletop"], kwargs), 2, seed=0, num_workers=1)


def test_an_argument_that_does_not_exist_ends_in_one_sentence():
    with pytest.raises(UserError, match="'tabletop' does not take these arguments.*colour") as error:
        vectorize(("tabletop", WORLDS["tabletop"], {"colour": "red"}), 1, seed=0, num_workers=0)
    assert one_sentence(error)


def test_tasks_may_be_kinds_or_instructions():
    lift = TabletopEnv(tasks=("lift",))
    assert {TASKS[i][1] for i in lift.task_ids} == {"lift"}
    two = TabletopEnv(tasks=("lift", "put the red cube on the yellow plate"))
    assert len(two.task_ids) == len(lift.task_ids) + 1
    assert {two.reset(seed=i)[0]["task"] for i in range(40)} == set(two.task_ids)


# --- policies


def test_expert_succeeds_and_chance_does_not():
    env, won, steps = TabletopEnv(), {}, []
    for seed in range(100):
        env.reset(seed=seed)
        rewards, success, _, _ = run(env, expert)
        assert sum(rewards) == success
        won.setdefault(TASKS[env.task][1], []).append(success)
        steps.append(len(rewards))
    assert sum(map(sum, won.values())) >= 98, {kind: (sum(x), len(x)) for kind, x in won.items()}
    assert set(won) == set(KINDS) and max(steps) <= env.max_steps and np.mean(steps) < 35
    rng = np.random.default_rng(0)
    lucky = 0
    for seed in range(60):
        env.reset(seed=seed)
        lucky += run(env, lambda _: rng.uniform(-1, 1, 7))[1]
    assert lucky <= 2


@pytest.mark.parametrize("split", ["semantics", "execution", "vision"])
def test_expert_solves_the_held_out_splits(split):
    env, won = TabletopEnv(split), 0
    for seed in range(20):
        env.reset(seed=seed)
        won += run(env, expert)[1]
    assert won >= 18


# --- seeds and splits


def layout(env):
    return env.data.qpos[:21].copy(), env.data.mocap_pos.copy()


def test_a_seed_fixes_the_episode_and_the_ones_after_it():
    first, second = TabletopEnv(), TabletopEnv()
    second.reset(seed=77)
    for env in (first, second):
        env.log = [env.reset(seed=5)[0]]
        env.log += [env.step(env.expert())[0] for _ in range(8)]
        env.log += [env.reset()[0], env.reset()[0]]
    for a, b in zip(first.log, second.log, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not np.array_equal(first.log[-1]["image"], first.log[-2]["image"])
    assert not np.array_equal(first.log[0]["image"], first.reset(seed=6)[0]["image"])


def test_splits_share_no_layout():
    envs = {split: TabletopEnv(split) for split in SPLITS}
    positions = {}
    for split, env in envs.items():
        for seed in range(40):
            env.reset(seed=seed)
            key = tuple(np.round(np.concatenate([x.ravel() for x in layout(env)]), 6))
            assert key not in positions, (split, positions.get(key))
            positions[key] = (split, seed)
    # and what stays random after reset() without a seed is not the evaluation's either
    env = envs["train"]
    for _ in range(40):
        env.reset()
        key = tuple(np.round(np.concatenate([x.ravel() for x in layout(env)]), 6))
        assert key not in positions


def test_each_held_out_split_varies_what_it_says():
    nominal, vision, execution = TabletopEnv("eval"), TabletopEnv("vision"), TabletopEnv("execution")
    table = nominal.model.geom("table").id
    colours, lights, poses = [], [], {"eval": [], "execution": []}
    for seed in range(20):
        for env in (nominal, vision, execution):
            env.reset(seed=seed)
        colours.append(vision.model.geom_rgba[table, :3].copy())
        lights.append([*vision.model.light_diffuse[0], *vision.model.light_dir[0]])
        assert np.abs(vision.model.cam_pos - nominal.model.cam_pos).max() > 0.001
        assert np.array_equal(vision.model.geom_rgba[table + 1 :], nominal.model.geom_rgba[table + 1 :])
        assert np.array_equal(execution.model.geom_rgba, nominal.model.geom_rgba)
        poses["eval"].append(nominal.data.qpos[-6:-2].copy())
        poses["execution"].append(execution.data.qpos[-6:-2].copy())
    assert np.std(colours, 0).min() > 0.05 and np.std(lights, 0)[[0, 3, 4]].min() > 0.05
    known, new = np.abs(poses["eval"]), np.abs(poses["execution"])
    assert known[:, :2].max() <= 0.05 and (new[:, :2].min(1) > 0.05).all()  # start poses never overlap
    assert known[:, 3].max() == 0 and new[:, 3].max() > 0.1


# --- actions


def test_randomize_varies_training_layouts_alone_by_its_share():
    plain, varied, held_out = (TabletopEnv(randomize=r, split=s) for r, s in
                               ((0.0, "train"), (0.5, "train"), (0.5, "eval")))  # fmt: skip
    colours, starts = [], []
    for seed in range(40):
        obs = [env.reset(seed=seed)[0] for env in (plain, varied)]
        assert obs[0]["task"] == obs[1]["task"] and np.array_equal(
            *(env.data.qpos[:21] for env in (plain, varied))
        )
        starts.append(varied.data.qpos[-6:-2] - plain.data.qpos[-6:-2])
        colours.append(varied.model.geom("table").rgba[:3] - plain.model.geom("table").rgba[:3])
        assert np.abs(varied.model.cam_pos - plain.model.cam_pos).max() <= 0.0075
        held_out.reset(seed=seed)
        assert np.array_equal(held_out.model.cam_pos, plain.model.cam_pos)
        assert np.abs(held_out.data.qpos[-6:-4]).max() <= 0.05
    starts, colours = np.abs(starts), np.abs(colours)
    assert (starts <= [0.025, 0.025, 0.025, 0.3]).all() and (starts.max(0) > [0.02, 0.02, 0.02, 0.25]).all()
    assert 0.12 < colours.max() <= 0.15
    again = TabletopEnv(randomize=0.5)  # a seed fixes the episode
    assert np.array_equal(varied.reset(seed=3)[0]["image"], again.reset(seed=3)[0]["image"])
    assert not np.array_equal(plain.reset(seed=3)[0]["image"], again.observe()["image"])


def test_roll_and_pitch_are_ignored_and_the_rest_is_not():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (12, 7)).astype(np.float32)

    def end(change):
        env = env_with()
        for action in actions:
            env.advance(action + change)
        return env.data.qpos.copy()

    plain = end(np.zeros(7))
    assert np.array_equal(plain, end(np.array([0, 0, 0, 0.7, -0.9, 0, 0])))
    for dim in np.flatnonzero(TabletopEnv.active_dims):
        change = np.zeros(7)
        change[dim] = -2 if dim == 6 else 0.3
        assert not np.array_equal(plain, end(change)), dim


def test_the_arm_moves_as_commanded():
    """20 Hz, 3 cm and 0.2 rad for an action of 1, in the axes of the proprioception."""
    for axis, scale in ((0, 0.16), (1, 0.16), (2, 0.1)):
        for sign in (-1, 1):
            env = env_with()
            before = env.observe()["proprio"]
            for _ in range(2):
                env.advance(np.eye(7, dtype=np.float32)[axis] * sign + IDLE)
            moved = (env.observe()["proprio"] - before) * scale
            assert 0.02 < moved[axis] * sign < 0.065
            assert np.abs(np.delete(moved[:3], axis)).max() < 0.005
    env = env_with()
    env.advance(np.eye(7, dtype=np.float32)[5] + IDLE)
    assert 0.05 < env.observe()["proprio"][5] < 0.25
    assert env.data.time == pytest.approx(1 / env.metadata["render_fps"])


@pytest.mark.parametrize(
    ("command", "closes"), [(-1, False), (-1e-6, False), (0, True), (1e-6, True), (1, True)]
)
def test_gripper_closes_from_zero_on(command, closes):
    env = env_with()
    for _ in range(10):
        env.advance(np.array([0, 0, 0, 0, 0, 0, command], np.float32))
    fingers = env.data.qpos[-2:]
    assert (fingers < 0.1 * OPEN).all() if closes else (fingers > 0.9 * OPEN).all()
    assert (env.observe()["proprio"][6:] < -0.8).all() == closes


def test_actions_beyond_the_bounds_are_clipped():
    first, second = env_with(), env_with()
    for _ in range(4):
        first.advance(np.array([9, -9, 3, 0, 0, 5, -7.0]))
        second.advance(np.array([1, -1, 1, 0, 0, 1, -1.0]))
    assert np.array_equal(first.data.qpos, second.data.qpos)


# --- success, ends, reward


def test_time_limit_truncates():
    env = env_with(max_steps=7)
    rewards, success, terminated, truncated = run(env, lambda _: IDLE)
    assert (len(rewards), sum(rewards), success, terminated, truncated) == (7, 0, False, False, True)
    env = env_with()
    assert run(env, expert)[1:] == (True, True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_success_at_the_very_last_step_terminates(kind):
    env = env_with(kind)
    seed = next(s for s in range(100) if env.reset(seed=s) and TASKS[env.task][1] == kind)
    steps = len(run(env, expert)[0])
    for limit, ends in ((steps, (True, True, False)), (steps - 1, (False, False, True))):
        env = TabletopEnv(max_steps=limit)
        env.reset(seed=seed)
        assert run(env, expert)[1:] == ends


def lifted(env):
    """The named object's height above its rest, m."""
    x = TASKS[env.task][2]
    return env.data.body(OBJECTS[x]).xpos[2] - tabletop.REST_HEIGHT[x]


def test_lift_needs_a_hold():
    """Above 5 cm in the grasp for three steps; one such step and a drop is no success."""
    env = env_with("lift")
    high = []
    while True:
        _, success, _, _ = env.advance(env.expert())
        high.append(lifted(env) > 0.05)
        if success:
            break
        assert len(high) < env.max_steps
    assert high[-3:] == [True] * 3 and sum(high) == 3
    env = env_with("lift")
    while lifted(env) <= 0.05:
        assert not env.advance(env.expert())[1]
    drop = [env.advance(IDLE) for _ in range(12)]
    assert not any(success for _, success, _, _ in drop) and lifted(env) < 0.03


def test_a_throw_is_no_lift():
    """High but not between the fingers, for as long as one likes."""
    env = env_with("lift")
    joint = env.model.body(OBJECTS[TASKS[env.task][2]]).jntadr[0]
    for _ in range(6):
        env.data.joint(joint).qpos[2] = 0.3
        env.data.joint(joint).qvel[:] = 0
        _, success, _, info = env.advance(IDLE)
        assert lifted(env) > 0.05 and not success and info["success"] is False


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_move_that_lifted_the_object_is_no_success(seed):
    """The expert carries the cube through the air onto the plate: a put, and no move."""
    for judge in ("put", "move"):
        env = TabletopEnv()
        env.reset(seed=seed)
        heights, successes = [], []
        for _ in range(40):
            env.task = task_of("put", 0, 0)
            action = env.expert()
            env.task = task_of(judge, 0, 0)
            successes.append(env.advance(action)[1])
            heights.append(lifted(env))
        distance = env._plate_distance(env.data.body(OBJECTS[0]).xpos)
        assert max(heights) > 0.03 and heights[-1] < 0.005 and distance < 0.03
        assert any(successes) == (judge == "put")


def test_a_put_counts_only_once_the_object_is_let_go():
    env, held_there = env_with("put"), 0
    x = TASKS[env.task][2]
    for _ in range(env.max_steps):
        action = env.expert()
        position = env.data.body(OBJECTS[x]).xpos
        if env._plate_distance(position) < 0.02 and lifted(env) < 0.01:
            action = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)  # do not let go
            held_there += 1
        assert not env.advance(action)[1]
    assert held_there > 5
    results = [env.advance(env.expert()) for _ in range(8)]
    first = [success for _, success, _, _ in results].index(True)
    assert first >= 1  # at rest and untouched for two steps


@pytest.mark.parametrize("kind", ["put", "move"])
def test_passing_over_the_plate_is_no_success(kind):
    """The object on its plate for one step alone."""
    env = env_with(kind)
    x, y = TASKS[env.task][2:4]
    joint = env.data.joint(env.model.body(OBJECTS[x]).jntadr[0])
    home = joint.qpos.copy()
    plate = env.data.mocap_pos[env._plate_mocap[y]][:2].copy()
    successes = []
    for step in range(7):
        joint.qpos[:] = home
        joint.qvel[:] = 0
        if step % 2:
            joint.qpos[:2] = plate
        successes.append(env.advance(IDLE)[1])
    assert not any(successes)
    joint.qpos[:2], joint.qvel[:] = plate, 0
    assert [env.advance(IDLE)[1] for _ in range(2)] == [False, True]  # two steps in a row are


@pytest.mark.parametrize("kind", KINDS)
def test_shaped_reward_is_a_difference_of_potentials(kind):
    rng = np.random.default_rng(0)
    for seed, policy in ((0, expert), (10, lambda _: rng.uniform(-1, 1, 7))):
        env = env_with(kind, seed, reward="shaped")
        start = env._potential()
        rewards, success, _, _ = run(env, policy)
        assert sum(rewards) == pytest.approx(env._potential() - start + success, abs=1e-9)
        assert success == (policy is expert) and 0 <= env._potential() <= 1
        if success:
            assert np.mean(np.array(rewards) > 0) > 0.6  # it leads there
    plain = env_with(kind)
    assert set(run(plain, expert)[0]) == {0.0, 1.0}


# --- exact state


def test_state_goes_on_bit_exactly_from_the_middle_of_a_grasp():
    kwargs = dict(split="vision", cameras=tabletop.CAMERAS, reward="shaped")
    env = env_with("put", **kwargs)
    while not env._situation()[2]:
        env.step(env.expert())
    env.step(env.expert())
    assert env._situation()[2] and env.steps < 30
    state = env.get_state()
    other = TabletopEnv(**kwargs)
    other.reset(seed=999)
    other.step(IDLE)
    other.set_state(state)
    for _ in range(20):
        actions = [e.expert() for e in (env, other)]
        assert np.array_equal(*actions)
        found, wanted = (e.step(actions[0] + 0.1) for e in (other, env))
        for key, value in wanted[0].items():
            assert np.array_equal(found[0][key], value), key
        assert found[1:] == wanted[1:]
        assert np.array_equal(*(e.pixels() for e in (env, other)), equal_nan=True)
    found, wanted = other.reset()[0], env.reset()[0]  # the random state went along
    assert all(np.array_equal(found[key], value) for key, value in wanted.items())


def test_observing_changes_nothing():
    seen, blind = env_with(cameras=tabletop.CAMERAS), env_with()
    for _ in range(15):
        seen.render()
        seen.step(seen.expert())
        seen.pixels()
        seen.get_state()
        blind.advance(blind.expert())
    assert np.array_equal(seen.data.qpos, blind.data.qpos) and np.array_equal(seen.data.qvel, blind.data.qvel)


# --- pictures


def gl_environment(**kwargs):
    try:
        return TabletopEnv(renderer="gl", **kwargs)
    except UserError as error:
        pytest.skip(f"NO OPENGL HERE, THE GL RENDERER IS NOT TESTED: {error}")


@pytest.mark.parametrize("split", ["eval", "vision"])
def test_ray_and_gl_renderers_agree(split):
    ray, gl = (
        TabletopEnv(split, cameras=tabletop.CAMERAS),
        gl_environment(split=split, cameras=tabletop.CAMERAS),
    )
    try:
        for seed in range(3):
            for env in (ray, gl):
                env.reset(seed=seed)
                for _ in range(6):
                    env.advance(env.expert())
            pictures = [env.observe()["image"].astype(float) for env in (ray, gl)]
            difference = np.abs(pictures[0] - pictures[1]).max(-1)  # edges are anti-aliased in one alone
            assert np.median(difference) < 12 and (difference > 60).mean() < 0.06
        assert gl.render().shape == ray.render().shape
    finally:
        gl.close()


def test_pixels_point_at_the_named_things():
    """The colour at the point that `pixels` gives is the thing's, but where the gripper hides it."""
    env, right, named = TabletopEnv(cameras=tabletop.CAMERAS), 0, 0
    for seed in range(60):
        obs, _ = env.reset(seed=seed)
        x, y = TASKS[env.task][2:4]
        names = (OBJECTS[x], tabletop.PLATES[y] if y >= 0 else None)
        pixels = env.pixels()
        assert pixels.shape == (2, 2, 2) and pixels.dtype == np.float32
        assert np.isnan(pixels[:, 1]).all() or y >= 0
        for camera, thing in np.ndindex(2, 2):
            place = pixels[camera, thing]
            if np.isnan(place).any():
                assert camera == 1 or names[thing] is None  # agentview sees the whole table
                continue
            named += 1
            column, row = np.minimum(((place + 1) / 2 * 64).astype(int), 63)
            seen = obs["image"][camera, row, column].astype(float)
            geom = next(
                g
                for g in range(env.model.ngeom)
                if env.model.body(env.model.geom_bodyid[g]).name == names[thing]
            )
            colour = env.model.geom_rgba[geom, :3]
            alike = seen @ colour / (np.linalg.norm(seen) * np.linalg.norm(colour) + 1e-9)
            right += alike > 0.97
    assert named > 120 and right / named > 0.95


def test_demonstrations_and_scenes_have_one_row_a_picture():
    demos = tabletop.demonstrations(4, seed=3, num_workers=0, size=16, noise=0.1)
    S = len(demos["task"])
    assert demos["image"].shape == (S, 1, 16, 16, 3) and demos["proprio"].shape == (S, 8)
    assert demos["actions"].shape == demos["executed"].shape == (S, 7)
    assert np.abs(demos["actions"]).max() <= 1 and np.abs(demos["executed"]).max() <= 1
    noise = demos["executed"] - demos["actions"]
    assert noise[:, :3].std() > 0.03 and not noise[:, [3, 4, 6]].any()
    assert demos["episode_starts"][0] == 0 and (np.diff(demos["episode_starts"]) > 3).all()
    again = tabletop.demonstrations(4, seed=3, num_workers=2, size=16, noise=0.1)  # whatever makes them
    assert all(np.array_equal(demos[key], again[key], equal_nan=key == "pixels") for key in demos)
    other = tabletop.demonstrations(4, seed=4, num_workers=0, size=16, noise=0.1)
    assert not np.array_equal(demos["proprio"][0], other["proprio"][0])
    scenes = tabletop.scenes(5, seed=3, num_workers=0, size=16)
    assert scenes["image"].shape == (5, 1, 16, 16, 3) and scenes["pixels"].shape == (5, 1, 2, 2)


def test_an_expert_that_never_succeeds_is_told():
    with pytest.raises(UserError, match="succeeded in none of 1 episodes with noise 50"):
        tabletop.demonstrations(1, seed=0, num_workers=0, noise=50.0, size=8)
