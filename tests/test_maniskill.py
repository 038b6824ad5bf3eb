"""ManiSkill's world: its stock environment, signs, seeds, rewards, restored episodes, command lines.

Needs requirements-maniskill.txt and the Vulkan that its head names.
"""

import importlib.util
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from test_cli import assert_same_run, call, frames, results, run, scalars, stopped_by

import bc_warmup
import ppo_vla
import sac
from common import UserError
from common.envs import maniskill as world
from common.envs import maniskill_gpu
from common.envs.batched import BatchedEnvs
from common.envs.vector import vectorize

if not all(importlib.util.find_spec(name) for name in ("mani_skill", "sapien")):
    pytest.skip(
        "MANISKILL IS NOT INSTALLED, ITS WORLD IS NOT TESTED: python3 common/install.py --maniskill",
        allow_module_level=True,
    )

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # ManiSkill's, of NumPy
SMALL = dict(size=32)


@pytest.fixture(scope="module", autouse=True)
def vulkan():
    try:
        world.make(cameras=("none",)).close()
    except UserError as error:
        if "needs Vulkan" not in str(error):
            raise
        pytest.skip(f"MANISKILL'S WORLD IS NOT TESTED: {error}")


@pytest.fixture
def make():
    made = []

    def build(*tasks, **kwargs):
        made.append(world.make(tasks=tasks or ("PickCube-v1",), **SMALL | dict(cameras=("none",)) | kwargs))
        return made[-1]

    yield build
    for env in made:
        env.close()


def moves(steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


def act(env, steps, seed=0):
    return [env.step(action) for action in moves(steps, seed)]


# --- against the stock environment


def test_no_episode_tells_what_the_last_one_held(make):
    """ManiSkill's own first state has the contacts of the step before."""
    env = make(split="eval")
    first = env.reset(seed=4)[0]["proprio"]
    env.reset(seed=3)
    while not env.scene.agent.is_grasping(env.scene.cube):
        env.advance(env.expert())
    again = env.reset(seed=4)[0]["proprio"]
    assert np.array_equal(first, again) and not env.scene.agent.is_grasping(env.scene.cube)


def test_it_is_the_stock_environment_with_its_signs_turned(make):
    """States, staged reward and success, bit for bit, of the layout that split and seed name."""
    env = make(reward="shaped", split="eval")
    first = env.reset(seed=3)[0]["proprio"]
    stock = gymnasium.make(
        "PickCube-v1", num_envs=1, obs_mode="state", control_mode="pd_ee_delta_pose", sim_backend="physx_cpu",
        render_backend="cpu",
    )  # fmt: skip
    layout = 2 * int(np.random.default_rng([1, 3, 0]).integers(2**31)) + 1
    assert np.array_equal(first, stock.reset(seed=layout)[0][0])
    for action in moves(5):
        theirs = np.r_[action[:3], -action[3:]]
        obs, reward, *_ = stock.step(theirs)
        mine = env.step(action)
        assert np.array_equal(mine[0]["proprio"], obs[0].numpy()) and mine[1] == float(reward) - 1
    stock.close()


def test_what_each_number_of_an_action_does(make):
    """1 moves the hand forward, left, up and turns it about these axes; -1 opens the gripper."""
    env = make()
    hand = lambda: env.scene.agent.tcp.pose.raw_pose[0].numpy().astype(float)  # noqa: E731
    for axis in range(6):
        env.reset(seed=0)
        before = hand()
        for _ in range(4):
            env.advance(np.eye(7)[axis] * 0.5 + [0, 0, 0, 0, 0, 0, -1])
        after = hand()
        w, x = before[3], before[4:]  # of the turn after * conjugate(before)
        turn = w * after[4:] - after[3] * x - np.cross(after[4:], x)
        turn *= np.sign(after[3:] @ before[3:])
        way = after[:3] - before[:3] if axis < 3 else turn
        assert np.abs(way).argmax() == axis % 3 and way[axis % 3] > 0.03, (axis, way)
    widths = []
    for grip in (1, -1):
        for _ in range(6):
            env.advance(np.eye(7)[6] * grip)
        widths.append(env.scene.agent.robot.get_qpos()[0, -2:].sum())
    assert widths[0] < 0.01 and widths[1] > 0.07, widths


# --- episodes


@pytest.mark.parametrize("task", world.TASKS)
def test_every_task_is_made_and_seeded(make, task):
    env = make(task, horizon=3)
    first, again = env.reset(seed=5)[0], env.reset(seed=5)[0]
    assert env.observation_space.contains(first) and np.array_equal(first["proprio"], again["proprio"])
    assert not np.array_equal(first["proprio"], env.reset(seed=6)[0]["proprio"])
    env.split = "eval"
    assert not np.array_equal(first["proprio"], env.reset(seed=5)[0]["proprio"])
    ends = [env.advance(action)[1:3] for action in moves(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    registered = gymnasium.spec(task).max_episode_steps
    assert (world.TASKS[task][0], len(env.instructions)) == (registered, 1)


def test_no_layout_is_of_both_splits(make, monkeypatch):
    layouts = {}
    for split in world.SPLITS:
        env = make(split=split)
        with monkeypatch.context() as patch:
            patch.setattr(env, "_begin", lambda task, layout, split=split: layouts.setdefault(layout, split))
            patch.setattr(env, "observe", dict)
            for seed in range(300):
                env.reset(seed=seed)
                env.reset()
    assert len(layouts) == 1200 and all(split == world.SPLITS[n % 2] for n, split in layouts.items())


def test_a_layout_is_its_seeds_whatever_ran_before_and_a_state_is_exact(make):
    """Bit for bit: after other episodes, in another environment, in the middle, and in the next episode."""
    env, other = make(), make()
    env.reset(seed=1)
    alone = [obs["proprio"] for obs, *_ in act(env, 8)]
    following = [env.reset()[0]["proprio"], *(obs["proprio"] for obs, *_ in act(env, 3))]
    third = env.reset()[0]["proprio"]
    for seed in (7, 8, 1):
        other.reset(seed=seed)
        act(other, 4, seed if seed != 1 else 0)
    state = other.get_state()
    fresh = make()
    fresh.set_state({name: np.asarray(value).tolist() for name, value in state.items()})
    for each in (other, fresh):
        rest = [each.step(action)[0]["proprio"] for action in moves(8)[4:]]
        assert all(np.array_equal(a, b) for a, b in zip(rest, alone[4:], strict=True))
        then = [each.reset()[0]["proprio"], *(obs["proprio"] for obs, *_ in act(each, 3))]
        assert all(np.array_equal(a, b) for a, b in zip(then, following, strict=True))
    fresh.set_state(other.get_state())  # of an episode without a seed
    assert np.array_equal(fresh.reset()[0]["proprio"], third)


def test_what_a_reward_is_and_that_success_ends(make):
    env, shaped = make(split="eval"), make(split="eval", reward="shaped")
    for each in (env, shaped):
        each.reset(seed=0)
    rewards = []
    for _ in range(50):
        action = env.expert()
        (plain, ended, _, info), (staged, *_) = env.advance(action), shaped.advance(action)
        rewards.append((plain, staged))
        assert plain == float(ended) == float(info["success"])
        if ended:
            break
    assert ended and len(rewards) < 40 and rewards[-1] == (1.0, 0.0)
    assert all(a == 0 and -1 < b < -0.05 for a, b in rewards[:-1])
    assert rewards[-2][1] > rewards[0][1] + 0.4  # it rises on the way


@pytest.mark.parametrize("task", world.EXPERTS)
def test_experts_succeed_on_evaluations_layouts(make, task):
    env, won = make(task, split="eval"), 0
    for seed in range(2):
        env.reset(seed=seed)
        success = truncated = False
        while not (success or truncated):
            _, success, truncated, _ = env.advance(env.expert())
        won += success
    assert won == 2


def test_pictures_of_two_tasks(make):
    """Both cameras, one width of proprio, and the goal that ManiSkill's own cameras do not see."""
    env = make("PickCube-v1", "PushCube-v1", cameras=("agentview", "wrist"), size=64)
    seen = {}
    for seed in range(20):
        obs = env.reset(seed=seed, options={"task_weights": np.eye(2)[len(seen)]})[0]
        seen[int(obs["task"])] = obs
        if len(seen) == 2:
            break
    assert sorted(seen) == [0, 1]
    for obs in seen.values():
        assert env.observation_space.contains(obs) and obs["image"].shape == (2, 64, 64, 3)
        assert obs["proprio"].shape == (8,) and all(a.std() > 5 for a in obs["image"])
    red, green, blue = seen[0]["image"][0].reshape(-1, 3).astype(int).T
    assert ((green > 80) & (green > 2 * red) & (green > 2 * blue)).sum() > 3
    assert ((red > 80) & (red > 2 * green) & (red > 2 * blue)).sum() > 3
    assert env.render().shape == (224, 224, 3) and env.render().std() > 5
    for _ in range(6):
        after = env.step(np.float32([0.5, 0.5, 0, 0, 0, 0, -1]))[0]  # PushCube's hand, open
    changed = (np.abs(after["image"].astype(int) - seen[1]["image"]).max(-1) > 20).mean((1, 2))
    assert changed[0] < changed[1], changed  # the wrist's camera moves, the other stands
    scene = env.scene
    assert np.allclose(after["proprio"][:3], scene.agent.tcp.pose.p[0])
    assert np.allclose(np.linalg.norm(after["proprio"][3:6]), np.pi, atol=0.3)  # it points down
    fingers = scene.agent.robot.get_qpos()[0, -2:]
    assert np.allclose(after["proprio"][6:], fingers) and fingers.min() > 0.03


# --- as a batch


class Rows:
    """Stands for ManiSkill on a GPU: scenes of one row on the CPU, behind the calls of one with many."""

    def __init__(self, scenes):
        self.scenes, names = scenes, [*scenes[0].scene.sensors]
        self.scene = SimpleNamespace(update_render=self.update_render)
        self.scene.step = lambda: [scene.scene.step() for scene in scenes]
        self.scene.sensors = {name: SimpleNamespace(capture=lambda: None) for name in names}
        for name, sensor in self.scene.sensors.items():
            sensor.get_obs = lambda name=name, **flags: {"rgb": self.each(self.picture, name, flags)}
        self.agent = SimpleNamespace(robot=self)

    def each(self, read, *args):
        return torch.cat([read(scene, *args) for scene in self.scenes])

    def picture(self, scene, name, flags):
        scene.scene.sensors[name].capture()
        return scene.scene.sensors[name].get_obs(**flags)["rgb"]

    def update_render(self, **flags):
        for scene in self.scenes:
            scene.scene.update_render(**flags)
        pose = self.each(lambda scene: scene.agent.tcp.pose.raw_pose)
        self.agent.tcp = SimpleNamespace(pose=SimpleNamespace(raw_pose=pose))

    def get_qpos(self):
        return self.each(lambda scene: scene.agent.robot.get_qpos())

    def reset(self, seed, options=None):
        for row in range(len(self.scenes)) if options is None else options["env_idx"].tolist():
            self.scenes[row].reset(seed=seed)
        return self.each(lambda scene: scene._last_obs), {}

    def step(self, actions):
        told = [scene.step(action[None]) for scene, action in zip(self.scenes, actions, strict=True)]
        *columns, info = zip(*told, strict=True)
        return *map(torch.cat, columns), {"success": torch.cat([x["success"] for x in info])}

    def get_state_dict(self):
        states = [scene.get_state_dict() for scene in self.scenes]
        return {
            kind: {name: torch.cat([x[kind][name] for x in states]) for name in states[0][kind]}
            for kind in ("actors", "articulations")
        }

    def set_state_dict(self, state, rows):
        for i, row in enumerate(rows.tolist()):
            mine = {kind: {name: x[i : i + 1] for name, x in parts.items()} for kind, parts in state.items()}
            self.scenes[row].set_state_dict(mine)

    def render_rgb_array(self):
        return self.each(lambda scene: scene.render_rgb_array())

    def close(self):
        pass


@pytest.fixture
def rows(monkeypatch):
    def build(name, size, wrist, shaped, num_envs, gpu):
        assert gpu == 0
        return Rows([world._make(name, size, wrist, shaped) for _ in range(num_envs)])

    monkeypatch.setattr(maniskill_gpu.ManiSkillBatch, "DEVICE", "cpu")
    monkeypatch.setattr(maniskill_gpu, "_make", build)


@pytest.mark.parametrize(("cameras", "steps"), [(("none",), 5), (("agentview",), 2)])
def test_a_batch_is_its_rows(rows, cameras, steps):
    """Of rows that are scenes on the CPU it tells what `Envs` does, with ends in the middle of a chunk."""
    flags = SMALL | dict(tasks=("PickCube-v1",), cameras=cameras, reward="shaped", horizon=5, split="train")
    own = dict(seed=3, first=0, chunk=3, autoreset=True, action_history=0)
    theirs = vectorize(("maniskill", "common.envs.maniskill", flags), 2, num_workers=0, **own)
    device = torch.device("cpu", 0)
    ours = BatchedEnvs("maniskill", world.make_batch(2, device, **flags, backend="gpu"), 2, device, **own)
    assert ours.single_observation_space == theirs.single_observation_space

    def same(found, wanted):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            off = np.abs(value.numpy().astype(float) - wanted[name].astype(float))
            assert off.max() < 1e-5 if name != "image" else off.mean() < 0.2, (name, off.max())

    same(ours.reset(), theirs.reset())
    for step in range(steps):
        actions = np.random.default_rng(step).uniform(-1, 1, (2, 3, 7)).astype(np.float32)
        (obs, *told, info), (theirs_obs, *theirs_told, theirs_info) = ours.step(actions), theirs.step(actions)
        same(obs, theirs_obs)
        same(info["final_obs"], theirs_info["final_obs"])
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(told, theirs_told, strict=True))
        assert (info["steps"] == theirs_info["steps"]).all() and told[2].all() == (step % 2 == 1)
    if cameras != ("none",):
        assert ours.batch.render(1).shape == (224, 224, 3)
    ours.close()
    theirs.close()


def test_a_row_that_is_not_to_move_stays_and_success_is_told(rows):
    batch = world.make_batch(2, torch.device("cpu", 0), cameras=("none",), reward="sparse", split="eval")
    batch.reset({0: 5, 1: 6}, None)
    first, still = batch.observe()["proprio"].clone(), torch.tensor([True, False])
    expert, told = world.make(cameras=("none",), split="eval"), []
    expert.reset(seed=5)
    for _ in range(50):
        action = expert.expert()
        ended = expert.advance(action)[1]
        told.append(batch.advance(torch.tensor(np.stack([action, action])), still))
        if ended:
            break
    assert ended and [bool(x[1][0]) for x in told] == [False] * (len(told) - 1) + [True]
    assert told[-1][0][0] == 1.0 and not told[-1][2][0] and batch.steps.tolist() == [len(told), 0]
    now = batch.observe()["proprio"]
    assert torch.equal(now[1], first[1]) and not torch.equal(now[0], first[0])
    fresh = batch.scene.scenes[1].get_obs({"is_grasped": torch.tensor([False])})
    assert torch.allclose(fresh[0, :9], first[1, :9], atol=1e-5)  # its joints, in the simulator
    batch.reset({0: None}, None)
    assert batch.episodes[0].tolist() == [5, 1] and batch.episodes[1].tolist() == [6, 0]
    assert not torch.equal(batch.observe()["proprio"][0], first[0])


def test_a_batch_needs_a_gpu_and_one_task():
    with pytest.raises(UserError, match="runs on a GPU, not on cpu; drop the flag"):
        world.make_batch(2, torch.device("cpu"))
    done = call(ppo_vla, "--env maniskill --backend gpu --device cpu")
    assert done.code == 2 and "runs on a GPU, not on cpu" in done.err and done.err.count("\n") == 1


# --- what is refused, and runs


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(tasks=("Pour",)), "ManiSkill has no task 'Pour' here; known: PickCube-v1, "),
        (dict(tasks=()), "ManiSkill has no task 'none'"),
        (dict(cameras=("nose",)), "ManiSkill has no camera 'nose' here; known: agentview, wrist"),
        (
            dict(tasks=("PickCube-v1", "PushCube-v1"), cameras=("none",)),
            "The states of tasks differ in length",
        ),
        (dict(size=0), "size must be at least 1 and horizon 0 or more, got 0"),
        (dict(horizon=-1), "got 128 and -1"),
        (dict(split="test"), "ManiSkill has no split 'test'"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(kwargs, sentence):
    with pytest.raises(UserError, match=sentence):
        world.make(**kwargs)


def test_without_maniskill_a_vulkan_or_an_expert(make, monkeypatch):
    env = make("PushCube-v1")
    env.reset(seed=0)
    with pytest.raises(UserError, match="PushCube-v1 has no scripted expert here; PickCube-v1, StackCube-v1"):
        env.expert()

    def fails(*args, **kwargs):
        raise RuntimeError('Failed to find a supported physical device "cpu"')

    with monkeypatch.context() as patch, pytest.raises(UserError, match="needs Vulkan, .* install Mesa 24.3"):
        patch.setattr(world, "_idle", {})
        patch.setattr(world.gym, "make", fails)
        make()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="needs mani_skill and sapien: pip install --no-deps -r requirements-m"
    ):
        make()


def test_wrong_flags_end_in_one_line():
    for flags, said in (
        ("--tasks PickCube", "ManiSkill has no task 'PickCube'"),
        ("--cameras top", "ManiSkill has no camera 'top'"),
        ("--reward dense", "reward"),
        ("--horizon -1", "--horizon must not be negative"),
    ):
        done = call(ppo_vla, f"--env maniskill --device cpu --num-workers 0 {flags}")
        assert done.code == 2 and said in done.err, done
    done = call(sac, "--env maniskill --device cpu --eval-episodes 1 --size 32")
    assert done.code == 2 and "needs states and continuous actions" in done.err and done.err.count("\n") == 1


ONE = "--eval-episodes 1 --eval-envs 1 --num-workers 0 --device cpu --seed 3"
EVAL = f"--env maniskill --size 32 {ONE}"
BC = f"{EVAL} --num-demos 1 --gradient-steps 3 --batch-size 8 --warmup-steps 1 --demo-noise 0"
PPO = "--num-envs 2 --num-steps 2 --total-timesteps 20 --minibatch-size 4 --critic-warmup 0 --save-freq 1"
PPO += " --policy-warmup 0"


def test_warmup_then_ppo_and_its_resume_and_evaluation(tmp_path, monkeypatch):
    """Of pictures: demonstrations, cloning, PPO stopped in the middle of episodes, as one that was not."""
    out = f"--output-dir {tmp_path}"
    ppo = f"{EVAL} --horizon 6 {PPO} {out} --checkpoint {tmp_path}/warmup"
    run(bc_warmup, BC, f"--horizon 30 {out} --run-name warmup")
    run(ppo_vla, ppo, "--run-name whole --capture-video")
    found = results(tmp_path / "whole")
    assert found["args"]["cameras"] == ["agentview"] and found["gradient_steps"] > 2
    assert max(value for _, value in scalars(tmp_path / "whole")["policy/first_ratio_error"]) < 1e-5
    (film, *_) = sorted((tmp_path / "whole" / "videos").rglob("*.mp4"))
    (width, height), _ = frames(film)
    assert width == 224 and 224 <= height < 280
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 1)
    assert call(ppo_vla, ppo, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    run(ppo_vla, f"--evaluate --checkpoint {tmp_path}/whole --run-name e {out} {ONE}")
    assert results(tmp_path / "e")["final"] == found["final"]


def test_states_alone(tmp_path):
    states = (
        f"--env maniskill --cameras none --reward shaped --device cpu --output-dir {tmp_path} --horizon 10"
    )
    run(sac, states, "--total-timesteps 40 --learning-starts 20 --eval-episodes 1 --run-name sac")
    found = results(tmp_path / "sac")["final"]
    assert found["success_rate"] == 0.0 and -10 < found["mean_reward"] < -5
