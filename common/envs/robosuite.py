"""robosuite 1.4.1 (Zhu et al. 2020): eleven tasks for one Panda arm or two.

    pip install --no-deps -r requirements-robosuite.txt     # after requirements.txt
    python ppo_vla.py --env robosuite --tasks PickPlaceCan --cameras wrist --actions discrete
    python ppo_vla.py --env robosuite --tasks TwoArmLift --cameras agentview wrist0 wrist1

Observation: `image` uint8 (cameras, size, size, 3), upright, without shadows and reflections, which cost half
of a picture; `proprio` float32 (8 an arm,): end effector's position 3 (m) and axis-angle 3 (rad), fingers 2
(m), as LIBERO's. With `--cameras none` robosuite's "object-state" follows, and the observation is `proprio`
alone; of one task then, for its length is the task's.

Action, continuous: float32 (7 an arm,), the set point's shift (1 = 5 cm), rotation (1 = 0.5 rad), gripper (-1
opens, 1 closes): OSC_POSE. Discrete(8), one arm: 2 cm to +x, -x (forward, backward), +y, -y (left, right),
+z, -z (up, down), close, open; the gripper stays as it was told last. 20 Hz. The reward is 1 at success, and
success, which robosuite lets pass, ends the episode. `--reward shaped` is robosuite's staged one, which is 1
at success, less 1 a step: else it would pay to stay short of success.

What an episode draws follows from `[split, seed]`. What robosuite draws when it compiles a task (Lift's cube
size, Handover's hammer) is drawn once, and the same everywhere.
"""

import json
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np

from common import UserError
from common.envs import experts, task_chances
from common.envs.experts import carry, pick, play, reach
from common.envs.simulation import SharingEnv, Simulation, axis_angle, check_installed, check_memory
from common.envs.views import project
from common.flags import NonNegativeInt

TASKS = {  # arms, steps of an episode, instruction
    "Lift": (1, 200, "lift the cube"),
    "Stack": (1, 300, "stack the red cube on the green cube"),
    "PickPlaceCan": (1, 500, "put the can into its bin"),
    "NutAssembly": (1, 800, "put both nuts on their pegs"),
    "NutAssemblySquare": (1, 400, "put the square nut on its peg"),
    "NutAssemblyRound": (1, 400, "put the round nut on its peg"),
    "Door": (1, 300, "open the door"),
    "TwoArmLift": (2, 300, "lift the pot with both arms"),
    "TwoArmHandover": (2, 400, "hand the hammer to the other arm"),
    "TwoArmTransport": (2, 700, "bring the hammer to the other table and clear its bin"),
    "ToolHang": (1, 700, "assemble the frame and hang the tool on it"),
}
DEMO_TASKS = {name: instruction for name, (_, _, instruction) in TASKS.items()}
CAMERAS = {name: name for name in ("agentview", "frontview", "birdview", "sideview")}
CAMERAS |= {f"wrist{k}": f"robot{k}_eye_in_hand" for k in ("0", "1")} | {"wrist": "robot0_eye_in_hand"}
DEMO_KEYS = {name: f"{camera}_image" for name, camera in CAMERAS.items()}
SPLITS = ("train", "eval")
MOVES = ("forward", "backward", "left", "right", "up", "down", "close", "open")
DISCRETE = 0.4 * np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])  # 1 = 5 cm


@dataclass
class Args:
    """The flags of `--env robosuite`."""

    tasks: tuple[str, ...] = ("Lift",)
    """Lift, Stack, PickPlaceCan, NutAssembly, NutAssemblySquare, NutAssemblyRound, Door, ToolHang, or, of two
    arms, TwoArmLift, TwoArmHandover, TwoArmTransport"""
    cameras: tuple[str, ...] = ("agentview", "wrist")
    """the pictures that the policy sees (agentview, frontview, birdview, sideview, wrist; of two arms wrist0,
    wrist1), or none: states"""
    size: int = 84
    """the pictures' height and width"""
    actions: Literal["continuous", "discrete"] = "continuous"
    """7 numbers an arm, or one of 8 moves"""
    reward: Literal["sparse", "shaped"] = "sparse"
    """1 at success, or robosuite's staged reward less 1 at every step"""
    horizon: NonNegativeInt = 0
    """control steps after which an episode ends; 0 for the task's (Lift 200, PickPlaceCan 500)"""

    def defaults(self):
        return {"head": "discrete"} if self.actions == "discrete" else {}


class Task(Simulation):
    """One of `TASKS`, with robosuite's own reset, rewards and object sensors. named: JSON, for its `make`."""

    SHADOWS = False

    def __init__(self, name, shaped, named="{}"):
        check_memory(type(self))
        import robosuite
        from robosuite.controllers import load_controller_config

        controller, outer = load_controller_config(default_controller="OSC_POSE"), np.random.get_state()
        np.random.seed(0)
        env = robosuite.make(
            name, robots=["Panda"] * TASKS[name][0], reward_shaping=shaped, has_renderer=False,
            has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True, hard_reset=False,
            control_freq=20, **{"controller_configs": controller} | json.loads(named),
        )  # fmt: skip
        np.random.set_state(outer)
        super().__init__(env)

    def begin(self, seed):
        """An episode from robosuite's placement distribution."""
        for robot in self.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self.draw(np.random.RandomState(seed).get_state())
        fingers = [self.data.qpos[robot._ref_gripper_joint_pos_indexes] for robot in self.robots]
        self.seen = self.data.qpos.copy(), np.concatenate(fingers)

    def objects(self):
        """robosuite's "object-state", float64, as the task has it."""
        return self.env._get_observations(force_update=True)["object-state"]


class RobosuiteEnv(SharingEnv):
    """See the module's docstring and `Args`; named: of `Task`. Raises UserError, one sentence, for what is
    unknown or not installed."""

    def __init__(self, tasks=("Lift",), split="train", cameras=("agentview", "wrist"), size=84,
                 actions="continuous", reward="sparse", horizon=0, named="{}"):  # fmt: skip
        check_installed("robosuite", ("robosuite",))
        self.cameras = () if tuple(cameras) == ("none",) else tuple(cameras)
        for name, values, known in (
            ("task", tasks or ("none",), TASKS),
            ("camera", self.cameras, CAMERAS),
            ("split", [split], SPLITS),
            ("actions", [actions], ("continuous", "discrete")),
            ("reward", [reward], ("sparse", "shaped")),
        ):
            if unknown := [value for value in values if value not in known]:
                raise UserError(f"robosuite has no {name} {unknown[0]!r}; known: {', '.join(known)}.")
        arms = {TASKS[task][0] for task in tasks}
        if len(arms) > 1:
            raise UserError(f"{' and '.join(tasks)} are not all of one arm, or of two; give such --tasks.")
        (self.arms,) = arms
        if self.arms == 1 and "wrist1" in self.cameras:
            raise UserError(f"{tasks[0]} has one arm: its camera is wrist.")
        if self.arms == 2 and actions == "discrete":
            raise UserError("--actions discrete moves one arm; two need --actions continuous.")
        if not self.cameras and len(tasks) > 1:
            raise UserError("The states of tasks differ in length: give one of --tasks, or --cameras.")
        if size < 1 or horizon < 0:
            raise UserError(f"size must be at least 1 and horizon 0 or more, got {size} and {horizon}.")
        self.tasks, self.split, self.size, self.discrete = list(tasks), split, size, actions == "discrete"
        self.shaped, self.horizon, self.named = reward == "shaped", horizon, named
        self.instructions = [TASKS[task][2] for task in tasks]
        box, width, numbers, spaces = gym.spaces.Box, 8 * self.arms, 7 * self.arms, {}
        if self.cameras:
            spaces["image"] = box(0, 255, (len(self.cameras), size, size, 3), np.uint8)
            spaces["task"] = box(0, len(tasks) - 1, (), np.int64)
        else:
            self._enter(0).begin(0)
            width += len(self.simulation.objects())
            self._leave()
        spaces["proprio"] = box(-np.inf, np.inf, (width,), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Discrete(8) if self.discrete else box(-1, 1, (numbers,), np.float32)
        self.active_dims = np.ones(1 if self.discrete else numbers, bool)
        self.action_names = MOVES if self.discrete else None

    def _enter(self, task):
        self.task, self.limit = task, self.horizon or TASKS[self.tasks[task]][1]
        return self.enter(Task, (self.tasks[task], self.shaped, self.named))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        layout = int(self.np_random.integers(2**31)) if seed is None else seed
        rng = np.random.default_rng([SPLITS.index(self.split), layout])  # training's are no evaluation's
        chances = task_chances(options, np.arange(len(self.tasks)))
        self._enter(int(rng.choice(len(self.tasks), p=chances))).begin(int(rng.integers(2**32)))
        self.steps, self.grip = 0, -1.0
        return self.observe(), {"success": False}

    def advance(self, action):
        """One control step (50 ms) of physics. action (7 an arm,) or an int -> reward, terminated, truncated,
        info; renders nothing."""
        if self.discrete:
            self.grip = {6: 1.0, 7: -1.0}.get(int(action), self.grip)
            move = DISCRETE[action] if action < 6 else np.zeros(3)
            action = np.r_[move, 0, 0, 0, self.grip]
        action = np.clip(action, -1, 1).astype(np.float64)
        simulation = self.turn()
        success = simulation.step(action)
        self.steps += 1
        reward = float(simulation.env.reward(action)) - 1 if self.shaped else float(success)
        return reward, success, not success and self.steps >= self.limit, {"success": success}

    def observe(self):
        simulation = self.turn()
        more = (lambda: []) if self.cameras else simulation.objects
        pictures, hands, found = simulation.look([CAMERAS[name] for name in self.cameras], self.size, more)
        parts = [part for hand in hands for part in (hand[:3], axis_angle(hand[3:7]), hand[7:])]
        obs = {"proprio": np.concatenate([*parts, found]).astype(np.float32)}
        return obs | ({"image": np.stack(pictures), "task": np.int64(self.task)} if pictures else {})

    def render(self):
        """For a video, uint8: overview and wrist side by side (224, 448, 3); of two arms, as in BEHAVIOR's
        videos, the wrists left of the overview, (448, 672, 3)."""
        simulation = self.turn()
        small = simulation.look([f"robot{k}_eye_in_hand" for k in range(self.arms)], 224)[0]
        (overview,) = simulation.look(["agentview"], 224 * self.arms)[0]
        return np.concatenate([overview, *small] if self.arms == 1 else [np.concatenate(small), overview], 1)

    def expert(self):
        """The action of a scripted controller for Lift, PickPlaceCan and TwoArmLift, from the state alone."""
        name = self.tasks[self.task]
        if name not in EXPERTS:
            raise UserError(f"robosuite's {name} has no scripted expert; {', '.join(EXPERTS)} have.")
        wanted = EXPERTS[name](self.turn().env)
        if not self.discrete:
            each = [np.r_[move / 0.05, turn / 0.5, grip] for move, turn, grip in wanted]
            return np.concatenate(each).clip(-1, 1).astype(np.float32)
        ((move, _, grip),) = wanted
        axis = int(np.abs(move).argmax())
        if abs(move[axis]) < 0.01:
            return 6 if grip > 0 else 7
        return 2 * axis + int(move[axis] < 0)

    def pixels(self):
        """Where the first two things of an expert's task are in the pictures: float32 (cameras, 2, 2), x
        right and y down, each in [-1, 1]; nan where there is none or it is out of sight."""
        simulation = self.turn()
        simulation.look([], self.size)  # as the pictures have it
        points = THINGS[self.tasks[self.task]](simulation.env)
        points = np.array([*points, np.full(3, np.nan)][:2])
        physics = simulation.model, simulation.data
        return np.stack([project(*physics, CAMERAS[name], points) for name in self.cameras])

    def get_state(self):
        own = {"simulation": self.turn().save(), "episode": [self.task, self.steps, self.grip]}
        return own | self.random_state()

    def set_state(self, state):
        task, self.steps, self.grip = state["episode"]
        self._enter(task).load(state["simulation"])
        self.set_random_state(state)


# --- demonstrations


def _lift(env):
    cube = env.sim.data.body_xpos[env.cube_body_id]
    return [pick(env, cube, env.cube) or reach(env, cube + [0, 0, 0.1], 1.0)]


def _can(env):
    can = env.sim.data.body_xpos[env.obj_body_id["Can"]]
    hand = env.sim.data.site_xpos[env.robots[0].eef_site_id]
    if not env.not_in_bin(can, env.object_id):  # let go, then up
        held = env._check_grasp(env.robots[0].gripper, env.objects[env.object_id])
        return [reach(env, hand + [0, 0, 0.0 if held else 0.1], -1.0)]
    place = env.target_bin_placements[env.object_id]
    return [pick(env, can, env.objects[env.object_id]) or carry(can, place, 0.3, 0.1)]


def _pot(env):
    """Both hands turn to the pot, grasp a side of its handles, across from each other, and go up together."""
    ready, moves = [], []
    along = (env._handle0_xpos - env._handle1_xpos) / np.linalg.norm(env._handle0_xpos - env._handle1_xpos)
    for k, (handle, side) in enumerate([(env._handle0_xpos, 1), (env._handle1_xpos, -1)]):
        goal = handle - side * 0.035 * along + side * 0.035 * np.array([-along[1], along[0], 0])
        move, turn, grip = reach(env, goal, -1.0, k)
        axis = env.sim.data.site_xmat[env.robots[k].eef_site_id].reshape(3, 3)[:, 1]  # across its fingers
        angle = np.arctan2(along[1], along[0]) - np.arctan2(axis[1], axis[0])
        turn[2] = (angle + np.pi / 2) % np.pi - np.pi / 2
        if np.hypot(*move[:2]) > 0.015 or abs(turn[2]) > 0.1:
            move[2] += 0.08
        elif abs(move[2]) < 0.015:
            grip = 1.0
        ready.append(env._check_grasp(env.robots[k].gripper, getattr(env.pot, f"handle{k}_geoms")))
        moves.append([move, turn, 1.0 if ready[k] else grip])
    for move in moves if all(ready) else ():
        move[0], move[1] = np.array([0, 0, 0.04]), np.zeros(3)
    return moves


EXPERTS = {"Lift": _lift, "PickPlaceCan": _can, "TwoArmLift": _pot}
THINGS = {
    "Lift": lambda env: [env.sim.data.body_xpos[env.cube_body_id]],
    "PickPlaceCan": lambda env: [
        env.sim.data.body_xpos[env.obj_body_id["Can"]],
        env.target_bin_placements[env.object_id],
    ],
    "TwoArmLift": lambda env: [env._handle0_xpos, env._handle1_xpos],
}
make = RobosuiteEnv


def _demonstrate(job):
    seeds, noise, kwargs = job
    return play(make(**kwargs), seeds, noise)


def demonstrations(num_episodes, seed, num_workers=None, noise=0.3, **kwargs):
    """Successful episodes of the scripted expert, as in the contract of `common/envs/__init__.py`. noise: the
    standard deviation on moves and turn, or, of discrete actions, how often a random move is made instead."""
    return experts.demonstrations(_demonstrate, num_episodes, seed, num_workers, noise, kwargs)
