"""ManiSkill3 (Tao et al. 2024): eight tabletop tasks for one Panda arm, in SAPIEN, on the CPU;
`--backend gpu`: all environments of a task at once on a GPU, which nobody has run yet (maniskill_gpu.py).

    pip install --no-deps -r requirements-maniskill.txt      # after requirements.txt; its head names a Vulkan
    python -m common.envs.to_d4rl --env maniskill --reward shaped --out pick.hdf5
    python sac.py --env maniskill --cameras none --reward shaped --prior-data pick.hdf5
    python ppo_vla.py --env maniskill --tasks StackCube-v1 --cameras agentview wrist

Observation: `image` uint8 (cameras, size, size, 3) and `proprio` float32 (8,), as LIBERO's: the point between
the fingers 3 (m, the table's top is 0), its axis-angle 3 (rad), fingers 2 (m). With `--cameras none` it is
`proprio` alone, ManiSkill's own "state" (joints, their velocities, task); of one task then, for its length is
the task's. A goal that ManiSkill hides from cameras and tells as numbers is seen here: PickCube's green ball;
the body of the wrist's camera is not: its 425,000 triangles are two thirds of a picture's time.

Action float32 (7,): shift of the hand from where it is (1 = 10 cm), rotation about the base's axes (1 = 0.1
rad), gripper (-1 opens, 1 closes): pd_ee_delta_pose, whose last four numbers have the opposite sign. 20 Hz.
The reward is 1 at success, which ends the episode. `--reward shaped` is ManiSkill's normalized dense one,
which is 1 at success, less 1 a step: else it would pay to stay short of success.

What an episode draws follows from `[split, seed, how many without a seed since]`. PhysX keeps contacts that
its own state does not hold, so that an episode is restored exactly by acting it out again from its start.
"""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np

from common import UserError
from common.envs import experts, task_chances
from common.envs.experts import carry, descend, play
from common.envs.simulation import axis_angle, check_installed, check_memory
from common.flags import NonNegativeInt

TASKS = {  # steps of an episode, instruction; those that need no files but the package's
    "PickCube-v1": (50, "bring the red cube to the green ball"),
    "StackCube-v1": (50, "stack the red cube on the green cube"),
    "PushCube-v1": (50, "push the blue cube onto the target"),
    "PullCube-v1": (50, "pull the blue cube onto the target"),
    "PlaceSphere-v1": (50, "put the blue ball into the bin"),
    "LiftPegUpright-v1": (50, "stand the peg upright"),
    "PokeCube-v1": (50, "push the red cube with the peg onto the target"),
    "RollBall-v1": (80, "roll the blue ball onto the target"),
}
CAMERAS = {"agentview": "base_camera", "wrist": "hand_camera"}
DEMO_KEYS = {name: f"{camera}_rgb" for name, camera in CAMERAS.items()}
SPLITS = ("train", "eval")
OURS = np.array([1, 1, 1, -1, -1, -1, -1], np.float32)  # times ManiSkill's action
VULKAN = "install Mesa 24.3 or newer (Debian 12: apt-get install -t bookworm-backports mesa-vulkan-drivers)"


@dataclass
class Args:
    """The flags of `--env maniskill`."""

    tasks: tuple[str, ...] = ("PickCube-v1",)
    """PickCube-v1, StackCube-v1, PushCube-v1, PullCube-v1, PlaceSphere-v1, LiftPegUpright-v1, PokeCube-v1,
    RollBall-v1"""
    cameras: tuple[str, ...] = ("agentview",)
    """the pictures that the policy sees (agentview, wrist), or none: states"""
    size: int = 128
    """the pictures' height and width"""
    reward: Literal["sparse", "shaped"] = "sparse"
    """1 at success, or ManiSkill's normalized dense reward less 1 at every step"""
    horizon: NonNegativeInt = 0
    """control steps after which an episode ends; 0 for the task's (50, RollBall 80)"""
    backend: Literal["cpu", "gpu"] = "cpu"
    """PhysX in worker processes, or all environments of one task at once on the GPU"""


_idle = {}  # what `_make` made and no environment has: its arguments -> scenes


@contextlib.contextmanager
def starting():
    """For a scene to be made in -> the renderer of this machine. Quiet about what ManiSkill can do without;
    UserError where Vulkan fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from mani_skill import logger

        logger.setLevel("ERROR")
        try:
            yield "gpu" if torch.cuda.is_available() else "cpu"
        except RuntimeError as error:
            raise UserError(f"ManiSkill needs Vulkan, which failed ({error}); {VULKAN}.") from error


def _make(name, size, wrist, shaped, num_envs=1, gpu=None):
    """-> ManiSkill's own environment of the task `name`, one row: a scene; on the GPU of that number,
    `num_envs` rows."""
    with starting() as renderer:
        from sapien.render import RenderBodyComponent

        physics = "physx_cpu"
        if gpu is not None:
            physics, renderer = f"physx_cuda:{gpu}", f"sapien_cuda:{gpu}"
        made = gym.make(
            f"mani_skill.envs:{name}", num_envs=num_envs, obs_mode="state",
            sim_backend=physics, render_backend=renderer,
            control_mode="pd_ee_delta_pose", reward_mode="normalized_dense" if shaped else "sparse",
            sensor_configs=dict(width=size, height=size),
            human_render_camera_configs=dict(width=224, height=224),
            **({"robot_uids": "panda_wristcam"} if wrist else {}),
        )  # fmt: skip
    scene = made.unwrapped
    if camera := scene.agent.robot.links_map.get("camera_link"):
        for body in camera._objs:
            body.entity.find_component_by_type(RenderBodyComponent).disable()
    return scene


class ManiSkillEnv(gym.Env):
    """See the module's docstring and `Args`. Raises UserError, one sentence, for what is unknown, not
    installed or without Vulkan."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    has_success, draws_tasks, active_dims = True, True, np.ones(7, bool)
    WORKER_GB, TASK_GB = 1.2, 0.1  # a worker process, and each further scene in it

    def __init__(self, tasks=("PickCube-v1",), split="train", cameras=("agentview",), size=128,
                 reward="sparse", horizon=0):  # fmt: skip
        check_installed("maniskill", ("mani_skill", "sapien"))
        self.cameras = () if tuple(cameras) == ("none",) else tuple(cameras)
        for name, values, known in (
            ("task", tasks or ("none",), TASKS),
            ("camera", self.cameras, CAMERAS),
            ("split", [split], SPLITS),
            ("reward", [reward], ("sparse", "shaped")),
        ):
            if unknown := [value for value in values if value not in known]:
                raise UserError(f"ManiSkill has no {name} {unknown[0]!r} here; known: {', '.join(known)}.")
        if not self.cameras and len(tasks) > 1:
            raise UserError("The states of tasks differ in length: give one of --tasks, or --cameras.")
        if size < 1 or horizon < 0:
            raise UserError(f"size must be at least 1 and horizon 0 or more, got {size} and {horizon}.")
        self.tasks, self.split, self.size, self.horizon = list(tasks), split, size, horizon
        self.shaped, self.scenes = reward == "shaped", {}
        self.instructions = [TASKS[task][1] for task in tasks]
        self.episode = [int(np.random.default_rng().integers(2**31)), -1]  # seed, episodes without since
        box, width, spaces = gym.spaces.Box, 8, {}
        if self.cameras:
            spaces["image"] = box(0, 255, (len(self.cameras), size, size, 3), np.uint8)
            spaces["task"] = box(0, len(tasks) - 1, (), np.int64)
        else:
            self._begin(0, 0)
            width = self.state.shape[1]
        spaces["proprio"] = box(-np.inf, np.inf, (width,), np.float32)
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), box(-1, 1, (7,), np.float32)

    def _scene(self, name):
        """This environment's scene of the task `name`, taken on first use."""
        if name not in self.scenes:
            key = (name, self.size, "wrist" in self.cameras, self.shaped)
            if not _idle.get(key):
                check_memory(type(self))
                _idle[key] = [_make(*key)]
            self.scenes[name] = _idle[key].pop()
        return self.scenes[name]

    def _begin(self, task, layout):
        self.task, self.layout, self.actions = task, layout, []
        self.limit = self.horizon or TASKS[self.tasks[task]][0]
        self.scene = self._scene(self.tasks[task])
        self.scene.reset(seed=layout)
        self.scene.scene.step()  # or what the last episode held would be told as grasped
        self.state, _ = self.scene.reset(seed=layout)

    def _draw(self, episode, seed, options):
        """-> of the one after `episode`, or the first of `seed`: [seed, episodes without since], task and
        layout."""
        episode = [int(seed), 0] if seed is not None else [episode[0], episode[1] + 1]
        rng = np.random.default_rng([SPLITS.index(self.split), *episode])
        layout = 2 * int(rng.integers(2**31)) + SPLITS.index(self.split)  # training's are no evaluation's
        chances = task_chances(options, np.arange(len(self.tasks)))
        return episode, int(rng.choice(len(self.tasks), p=chances)), layout

    def reset(self, *, seed=None, options=None):
        self.episode, *drawn = self._draw(self.episode, seed, options)
        self._begin(*drawn)
        return self.observe(), {"success": False}

    def advance(self, action):
        """One control step (50 ms) of physics. action (7,) -> reward, terminated, truncated, info; renders
        nothing."""
        action = np.clip(action, -1, 1).astype(np.float32)
        self.actions.append(action)
        self.state, reward, _, _, info = self.scene.step(OURS * action)
        success = bool(info["success"])
        truncated = not success and len(self.actions) >= self.limit
        return float(reward) - self.shaped, success, truncated, {"success": success}

    def observe(self):
        if not self.cameras:
            return {"proprio": self.state[0].numpy().astype(np.float32)}
        image = np.stack([picture[0].cpu().numpy() for picture in self._pictures()])
        position, quaternion, fingers = (x[0].numpy() for x in self._hand())
        proprio = np.concatenate([position, axis_angle(quaternion), fingers]).astype(np.float32)
        return {"image": image, "proprio": proprio, "task": np.int64(self.task)}

    def _pictures(self):
        """-> of each camera a tensor, uint8 (rows, size, size, 3)."""
        scene = self.scene
        scene.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        pictures = []
        for camera in (scene.scene.sensors[CAMERAS[name]] for name in self.cameras):
            camera.capture()
            seen = camera.get_obs(depth=False, position=False, segmentation=False)
            pictures.append(seen["rgb"])
        return pictures

    def _hand(self):
        """-> tensors: position (rows, 3), quaternion (rows, 4), w first, and fingers (rows, 2)."""
        position, quaternion = self.scene.agent.tcp.pose.raw_pose.split([3, 4], 1)
        return position, quaternion, self.scene.agent.robot.get_qpos()[:, -2:]

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def render(self):
        """For a video, uint8 (224, 224, 3): ManiSkill's own view from the side."""
        return self.scene.render_rgb_array()[0].cpu().numpy()

    def close(self):
        """Leaves its scenes to this process's next environment: a reset begins all anew, and with the last of
        them the compiled shaders would go, which take 10 seconds."""
        for name, scene in self.scenes.items():
            _idle[name, self.size, "wrist" in self.cameras, self.shaped].append(scene)
        self.scenes = {}

    def get_state(self):
        actions = np.array(self.actions, np.float32).reshape(-1, 7)
        return {"episode": [*self.episode, self.task, self.layout], "actions": actions}

    def set_state(self, state):
        *self.episode, task, layout = map(int, state["episode"])
        self._begin(task, layout)
        for action in np.asarray(state["actions"]):
            self.advance(action)

    def expert(self):
        """The action (7,) of a scripted controller for the tasks of `EXPERTS`, from the state alone."""
        name = self.tasks[self.task]
        if name not in EXPERTS:
            raise UserError(f"ManiSkill's {name} has no scripted expert here; {', '.join(EXPERTS)} have.")
        way, turn, grip = EXPERTS[name](self.scene, self.scene.agent.tcp.pose.p[0].numpy().astype(float))
        return np.r_[way / 0.1, turn / 0.1, grip].clip(-1, 1).astype(np.float32)


# --- demonstrations


def _place(actor):
    return actor.pose.p[0].numpy().astype(float)


def _pick_cube(scene, hand):
    cube = _place(scene.cube)
    if not scene.agent.is_grasping(scene.cube):
        return descend(cube - hand)
    return _place(scene.goal_site) - cube, np.zeros(3), 1.0


def _stack_cube(scene, hand):
    cube, place = _place(scene.cubeA), _place(scene.cubeB) + [0, 0, 0.04]
    if np.hypot(*(place - cube)[:2]) < 0.01 and abs(place[2] - cube[2]) < 0.005:
        return np.zeros(3), np.zeros(3), -1.0
    return carry(cube, place, 0.06, 0.0) if scene.agent.is_grasping(scene.cubeA) else descend(cube - hand)


EXPERTS = {"PickCube-v1": _pick_cube, "StackCube-v1": _stack_cube}


def make(backend="cpu", **kwargs):
    return ManiSkillEnv(**kwargs)


def batched(backend="cpu", **kwargs):
    return backend == "gpu"


def make_batch(num_envs, device, backend="gpu", **kwargs):
    from common.envs.maniskill_gpu import ManiSkillBatch  # which imports torch

    return ManiSkillBatch(num_envs, device, **kwargs)


def _demonstrate(job):
    seeds, noise, kwargs = job
    return play(make(**kwargs), seeds, noise)


def demonstrations(num_episodes, seed, num_workers=None, noise=0.3, **kwargs):
    """Successful episodes of the scripted expert, as in the contract of `common/envs/__init__.py`. noise: the
    standard deviation on moves and turn."""
    return experts.demonstrations(_demonstrate, num_episodes, seed, num_workers, noise, kwargs)
