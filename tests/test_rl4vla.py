"""RL4VLA's world: layouts, success, reward and sentences; with ManiSkill and a Vulkan its simulation, of
boxes and a robot of sticks that the tests make."""

import importlib.util
import json

import numpy as np
import pytest
from test_cli import assert_same_run, call, results, run, stopped_by

import ppo_vla
from common import UserError
from common.envs import rl4vla as world

# --- layouts, success, reward


def test_the_grids_are_the_published_ones():
    """36 points of a square of 15 cm, 28 around it; a thing and a plate more than 7 cm apart."""
    inner, outer = world.grid(0.0, 1.0), world.grid(-0.2, 1.2, border=True)
    assert inner.shape == (36, 2) and outer.shape == (28, 2)
    assert np.allclose([inner.min(0), inner.max(0)], [[-0.235, -0.075], [-0.085, 0.075]])
    assert np.allclose([outer.min(0), outer.max(0)], [[-0.265, -0.105], [-0.055, 0.105]])
    apart = [np.hypot(*(a - b)) for a in inner for b in inner]
    found = world.pairs(inner)
    assert len(found) == sum(x > 0.07 for x in apart)
    assert np.hypot(*(found[:, 0] - found[:, 1]).T).min() > 0.07


def test_poses_of_the_robot():
    """The first is its own; two joints together move 0.25 rad at most."""
    found = world.poses()
    assert found.shape == (1 + 5 * 23 * 5 * 5 * 5, 8) and not found[0].any() and not found[:, 6:].any()
    assert np.abs(found[:, 1] + found[:, 2]).max() <= 0.25 and np.abs(found[:, 5]).max() == 0.6


@pytest.mark.parametrize(
    ("split", "varies"),
    [("train", {}), ("eval", {}), ("tables", dict(table=(16, 20))), ("objects", dict(object=(16, 24))),
     ("plates", dict(plate=(1, 16))), ("words", dict(phrase=(1, 16))), ("positions", {}),
     ("poses", dict(pose=(1, 14375)))],
)  # fmt: skip
def test_what_a_split_draws(split, varies):
    usual = dict(object=(0, 15), plate=(0, 0), table=(0, 15), phrase=(0, 0), pose=(0, 0))
    rng = np.random.default_rng(0)
    drawn = [world.draw(split, rng) for _ in range(3000)]
    for name, (first, last) in (usual | varies).items():
        seen = {layout[name] for layout in drawn}
        assert min(seen) >= first and max(seen) <= last and (len(seen) == last - first + 1 or last > 999), (
            name
        )
    edges = np.abs(np.array([x["place"] for x in drawn]) - [-0.16, 0]).max((1, 2)) > 0.08
    assert edges.all() if split == "positions" else not edges.any()
    turns = sorted({round(8 * layout["turn"] / np.pi) for layout in drawn})
    assert turns == ([-7, -5, -3, -1] if split == "positions" else [0, 2, 4, 6])


def test_training_and_evaluation_share_no_layout():
    def key(layout):
        return (layout["object"], layout["table"], layout["turn"], layout["place"].tobytes())

    rng = np.random.default_rng(0)
    train, held = (
        {key(world.draw(split, rng, object=3)) for _ in range(4000)} for split in ("train", "eval")
    )
    assert len(train) > 3500 and len(held) > 2500 and not train & held
    assert {x[0] for x in train | held} == {3}


def test_success():
    """On the plate by place and by force; a box that lies on its side is as wide as it is there."""
    quarter = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    assert np.allclose(world.turned_size(np.array([0.02, 0.04, 0.1]), quarter), [0.1, 0.04, 0.02])
    half = np.sqrt(0.5)
    eighth = np.array([[half, -half, 0], [half, half, 0], [0, 0, 1]])
    assert np.allclose(
        world.turned_size(np.array([0.02, 0.04, 0.1]), eighth), [0.06 * half, 0.06 * half, 0.1]
    )
    plate, sizes = np.array([0.1, 0.2, 0.87]), (np.array([0.04, 0.04, 0.03]), np.array([0.11, 0.11, 0.006]))
    for x, z, force, wanted in (
        (0.0, 0.02, 1.0, True), (0.064, 0.02, 1.0, True), (0.066, 0.02, 1.0, False), (0.0, -0.01, 1.0, False),
        (0.0, 0.067, 1.0, True), (0.0, 0.069, 1.0, False), (0.0, 0.02, 0.02, False),
    ):  # fmt: skip
        assert world.on_plate(plate + [x, 0, z], plate, *sizes, force) == wanted, (x, z, force)


def test_the_stages_of_the_reward():
    found = [world.stage(*map(bool, x)) for x in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 0, 1))]
    assert found == pytest.approx([0, 0.1, 0.2, 1.2, 0])  # pushed onto the plate is no success of a grasp


# --- the simulation

INSTALLED = all(importlib.util.find_spec(name) for name in ("mani_skill", "sapien"))
needs_maniskill = pytest.mark.skipif(
    not INSTALLED, reason="MANISKILL IS NOT INSTALLED, RL4VLA'S SIMULATION IS NOT TESTED"
)

JOINTS = (  # name, parent, child, place, axis, limits
    ("waist", "base_link", "shoulder_link", "0 0 0.072", "0 0 1", "-3 3"),
    ("shoulder", "shoulder_link", "upper_arm_link", "0 0 0.039", "0 1 0", "-2 2"),
    ("elbow", "upper_arm_link", "upper_forearm_link", "0.05 0 0.25", "0 1 0", "-2 2"),
    ("forearm_roll", "upper_forearm_link", "lower_forearm_link", "0.175 0 0", "1 0 0", "-3 3"),
    ("wrist_angle", "lower_forearm_link", "wrist_link", "0.075 0 0", "0 1 0", "-2 2"),
    ("wrist_rotate", "wrist_link", "gripper_link", "0.065 0 0", "1 0 0", "-3 3"),
    ("left_finger", "gripper_link", "left_finger_link", "0.066 0 0", "0 1 0", "0.015 0.037"),
    ("right_finger", "gripper_link", "right_finger_link", "0.066 0 0", "0 -1 0", "0.015 0.037"),
    ("ee_gripper", "gripper_link", "ee_gripper_link", "0.093 0 0", None, None),
)


def robot_of_sticks():
    """URDF: WidowX's joints, about where they are."""
    parts = []
    for name in ["base_link", *(child for _, _, child, *_ in JOINTS)]:
        box = '<origin xyz="0.02 0 0"/><geometry><box size="0.04 0.01 0.01"/></geometry>'
        parts.append(
            f'<link name="{name}"><inertial><mass value="0.2"/><inertia ixx="1e-4" iyy="1e-4" izz="1e-4" '
            f'ixy="0" ixz="0" iyz="0"/></inertial><visual>{box}</visual><collision>{box}</collision></link>'
        )
    for name, parent, child, place, axis, limits in JOINTS:
        kind = "fixed" if axis is None else "prismatic" if "finger" in name else "revolute"
        moves = ""
        if axis:
            low, high = limits.split()
            moves = f'<axis xyz="{axis}"/><limit lower="{low}" upper="{high}" effort="100" velocity="3"/>'
        parts.append(
            f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>'
            f'<origin xyz="{place}" rpy="0 0 0"/>{moves}</joint>'
        )
    return f'<robot name="wx250s">{"".join(parts)}</robot>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """RL4VLA's layout: 25 cubes, 17 tiles, 21 pictures of one colour each; a room and a robot."""
    import cv2
    import trimesh

    root = tmp_path_factory.mktemp("rl4vla")
    for kind, count, size in (("carrot", 25, (0.03, 0.03, 0.03)), ("plate", 17, (0.11, 0.11, 0.006))):
        models = {}
        for number in range(count):
            part = root / f"more_{kind}" / f"{number:03d}_{kind}"
            part.mkdir(parents=True)
            shape = trimesh.creation.box(size)
            shape.export(part / "collision.obj")
            shape.export(part / "textured.glb")
            half = [x / 2 for x in size]
            box = {"min": [-x for x in half], "max": half}
            models[part.name] = dict(name=f"{kind} {number}", bbox=box, scales=[1.0], density=500)
        (root / f"more_{kind}" / "model_db.json").write_text(json.dumps(models))
    (root / "more_table" / "imgs").mkdir(parents=True)
    for number in range(21):
        picture = np.full((12, 16, 3), 10 * number + 20, np.uint8)
        cv2.imwrite(str(root / "more_table" / "imgs" / f"{number:03d}.png"), picture)
    room = trimesh.creation.box((2, 0.1, 2))
    room.apply_translation((-2.0634, 0.82, 2.8313))  # its top at 0.87 m, where y is up
    room.export(root / "room.glb")
    (root / "robot.urdf").write_text(robot_of_sticks())
    return root


@pytest.fixture
def make(folder, monkeypatch):
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import base_env

    from common.envs import rl4vla_scene as simulation

    monkeypatch.setenv("RL4VLA_ASSETS", str(folder))
    monkeypatch.setattr(simulation, "ROOM", folder / "room.glb")
    monkeypatch.setattr(simulation, "FILES", {folder / "room.glb": "room", folder / "robot.urdf": "robot"})
    robot = base_env.WidowX250SBridgeDatasetFlatTable
    monkeypatch.setattr(robot, "urdf_path", str(folder / "robot.urdf"))
    made = []

    def build(**kwargs):
        env = world.make(**dict(size=32) | kwargs)
        try:
            env.reset(seed=0)
        except UserError as error:
            if "needs Vulkan" not in str(error):
                raise
            pytest.skip(f"RL4VLA'S SIMULATION IS NOT TESTED: {error}")
        made.append(env)
        return env

    yield build
    for env in made:
        env.close()


def moves(steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


@needs_maniskill
def test_robot_and_things_are_seen_before_the_photograph(make):
    env = make()
    assert env.instructions[env.task] == f"put carrot {env.layout['object']} on plate 0"
    picture, table = env.render(), 10 * env.layout["table"] + 20
    share = (picture == table).all(-1).mean()
    assert picture.shape == (480, 640, 3) and 0.5 < share < 0.99  # the rest is robot, cube and tile
    obs = env.observe()
    assert obs["image"].shape == (1, 32, 32, 3) and obs["proprio"].shape == (8,)
    assert env.observation_space.contains(obs) and obs["task"] == env.layout["object"]
    (thing, plate), (cube, tile) = env.scene.for_expert()[:2], env.layout["place"]
    assert np.allclose(thing, [*cube, 0.885], atol=3e-3) and np.allclose(plate, [*tile, 0.873], atol=3e-3)


@needs_maniskill
def test_the_hand_goes_where_it_is_sent(make):
    """5 cm at 1, in the robot's frame; -1 opens."""
    env = make()
    before = env.scene.hand()
    for _ in range(2):
        env.advance(np.array([0.2, -0.2, 0.2, 0, 0, 0, 1]))
    for _ in range(4):
        env.advance(np.array([0, 0, 0, 0, 0, 0, 1]))
    after = env.scene.hand()
    assert np.allclose(after[:3] - before[:3], [0.02, -0.02, 0.02], atol=6e-3)
    assert after[6] < 0.02 < before[6]
    for _ in range(4):
        env.advance(np.array([0, 0, 0, 0, 0, 0, -1]))
    assert env.scene.hand()[6] > 0.03


@needs_maniskill
def test_success_ends_nothing_and_the_last_step_counts(make, monkeypatch):
    """The reward is the change of what has been reached, and goes again with it; 80 steps."""
    env = make()
    told = [(True, False)] * 5 + [(True, True), (False, True), (False, False), (False, True)]
    monkeypatch.setattr(env.scene, "found", lambda: told[min(len(env.actions), len(told)) - 1])
    steps = [env.advance(np.zeros(7)) for _ in range(80)]
    rewards = [reward for reward, *_ in steps]
    assert rewards[:9] == pytest.approx([0.1, 0, 0, 0, 0.1, 1, 0, -1, 1]) and not any(rewards[9:])
    assert not any(terminated for _, terminated, *_ in steps)
    assert [truncated for _, _, truncated, _ in steps] == [False] * 79 + [True]
    assert [info["success"] for *_, info in steps[4:9]] == [False, True, True, False, True]


@needs_maniskill
def test_the_thing_on_the_plate_is_success(make):
    import sapien

    env = make()
    assert env.scene.found() == (False, False)
    thing, plate = env.scene.pair
    thing.set_pose(sapien.Pose(plate.pose.p[0].numpy() + [0, 0, 0.03]))
    env.advance(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    assert env.scene.found() == (False, True)


@needs_maniskill
def test_an_episode_is_the_same_after_others_and_when_restored(make):
    env, other = make(split="words"), make(split="words")
    actions = moves(12)
    for seed in (4, 5):
        other.reset(seed=seed)
        for action in actions[:5]:
            other.step(action)
    first, again = env.reset(seed=3)[0], other.reset(seed=3)[0]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for action in actions[:6]:
        env.step(action)
    state = env.get_state()
    other.set_state(state)
    assert other.get_state()["episode"] == state["episode"]
    for action in actions[6:]:
        (mine, *told), (theirs, *also) = env.step(action), other.step(action)
        assert told == also and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    (mine, *_), (theirs, *_) = env.reset(), other.reset()  # both go on with their own random state
    assert (
        np.array_equal(mine["image"], theirs["image"]) and env.layout["phrase"] == other.layout["phrase"] > 0
    )


@needs_maniskill
def test_the_expert_grasps_and_lets_go(make):
    """Sticks hold nothing for sure: it comes down over the thing and closes, and opens above the plate."""
    env = make()
    for _ in range(30):
        if (action := env.expert())[6] > 0:
            break
        env.advance(action)
    thing, _, hand, *_ = env.scene.for_expert()
    assert action[6] == 1 and np.hypot(*(hand - thing)[:2]) < 0.02
    assert abs(hand[2] - thing[2] - world.REACH) < 0.015


@needs_maniskill
def test_demonstrations(make, monkeypatch):
    env = make()
    monkeypatch.setattr(world, "STEPS", 3)
    monkeypatch.setattr(type(env.scene), "found", lambda scene: (False, True))
    found = world.demonstrations(2, 1, num_workers=0, noise=0.0, size=32)
    assert found["episode_starts"].tolist() == [0, 3] and found["image"].shape == (6, 1, 32, 32, 3)
    assert (found["actions"] == [0, 0, 0, 0, 0, 0, -1]).all()  # above the plate already, open


RUN = "--env rl4vla --backbone tiny --chunk 1 --size 32 --num-workers 0 --device cpu --seed 3 --eval-envs 1"
RUN += " --eval-episodes 1"


@needs_maniskill
def test_ppo_goes_on_exactly(make, tmp_path, monkeypatch):
    make()
    monkeypatch.setattr(world, "STEPS", 6)
    ppo = f"{RUN} --num-envs 2 --num-steps 2 --total-timesteps 8 --minibatch-size 4 --critic-warmup 0"
    ppo, out = f"{ppo} --save-freq 1 --policy-warmup 0 --update-epochs 1", f"--output-dir {tmp_path}"
    run(ppo_vla, ppo, f"{out} --run-name whole")
    with monkeypatch.context() as patch:
        stopped_by(patch, ppo_vla, "clipped_surrogate", 1)
        assert call(ppo_vla, ppo, f"{out} --run-name stopped").code == 130
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    run(ppo_vla, f"--evaluate --checkpoint {tmp_path}/whole --eval-split objects {out} --run-name e")
    assert results(tmp_path / "e")["args"]["eval_split"] == "objects"


@needs_maniskill
def test_what_is_missing_is_one_sentence(make, folder, tmp_path, monkeypatch):
    for split, kwargs, said in (
        ("dark", {}, "no split 'dark' here; known: train, eval, tables"),
        ("train", dict(cameras=("wrist",)), "one camera, agentview; wrist is another"),
        ("train", dict(size=0), "size must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            world.PutOnPlateEnv(split, **kwargs)
    done = call(ppo_vla, f"{RUN} --eval-split dark")
    assert done.code == 2 and "Unknown split 'dark' for RL4VLA's evaluation; known: eval, tables" in done.err
    from common.envs import rl4vla_scene as simulation

    monkeypatch.setattr(simulation, "FILES", {tmp_path / "wx250s.urdf": "widowx250s"})
    with pytest.raises(UserError, match="is missing: python -m mani_skill.utils.download_asset widowx250s$"):
        world.make()
    (tmp_path / "more_carrot").mkdir()
    for text, said in (("{}", "0 of 25"), ("[]", "AttributeError|no attribute"), ("{", "Expecting")):
        (tmp_path / "more_carrot" / "model_db.json").write_text(text)
        world.read_models.cache_clear()
        with pytest.raises(UserError, match=f"model_db.json is not RL4VLA's .*({said})"):
            world.read_models(tmp_path, "carrot", 25)
    monkeypatch.setenv("RL4VLA_ASSETS", str(tmp_path))
    done = call(ppo_vla, RUN)
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"not in {tmp_path}, which has no more_plate/model_db.json; set RL4VLA_ASSETS to Mani" in done.err


def test_without_maniskill_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "--env rl4vla needs mani_skill and sapien: pip install --no-deps -r requirements-maniskill.txt"
    with pytest.raises(UserError, match=said):
        world.make()
