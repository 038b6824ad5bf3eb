"""MetaDrive 0.4.3 (Li et al. 2022): drive a car to its destination over a drawn road, among other cars.

    pip install --no-deps -r requirements-driving.txt     # after requirements.txt; Python 3.11
    python ppo_vla.py --env driving                       # from states: the script's preset
    python ppo_vla.py --env driving --map-blocks 1 2 3 --traffic 0 0.1 --curriculum

Observation from states (`--cameras none`): `proprio` float32 (259,) in [-1, 1]: MetaDrive's 9 numbers of the
car (borders, heading, speed, last action, yaw, offset) and 10 of the next two checkpoints of its route, each
turned from [0, 1] to [-1, 1], and how near what each of 240 lidar rays meets is, 0 for nothing within 50 m.
With pictures: `proprio` are the first 19, and `image` uint8 (1, size, size, 3) is the road from above, 80 m
wide, the car in the middle and heading up; drawn by pygame, without OpenGL.

Action float32 (2,): steering (1 is left) and throttle (below 0: the brake), 10 Hz. Success is arrival, which
ends the episode, as do a crash and leaving the road, solid lines included; `--horizon` truncates it. The
reward is 1 at arrival, and by default, `--reward shaped`, the weighted `reward_terms` of every step too.

A level is a number of blocks and a density of traffic; each is a task with an instruction of its own. Levels
are drawn alike, or with `--curriculum` by what they can teach: those that succeed now and then.
Episodes of split "eval" are MetaDrive's scenarios 0 to 999, training's are 1000 to 10999. A scenario and its
actions give the same bits always, so that a state is these, and played once more (`set_state`).

MetaDrive has one engine in a process: every environment has a process of its own, whatever --num-workers. It
fetches assets for its 3-D pictures, which nothing here needs, and is kept from it.

CARLA has no file: its server, 20 GB and a GPU, could not be tried, and a fake client would prove nothing.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np

from common import UserError
from common.envs import experts, task_chances
from common.envs.experts import play
from common.flags import NonNegative, NonNegativeInt, Only
from common.memory import available_memory

OWN_PROCESS = True
DEMO_KEYS = {"topdown": "topdown_rgb"}
PACKAGES = ("metadrive", "panda3d", "gltf", "simplepbr", "pygame", "shapely", "seaborn", "progressbar", "cv2")
SPLITS = ("train", "eval")
SCENARIOS = {"eval": (0, 1000), "train": (1000, 10_000)}  # the first, and how many
PROCESS_BYTES = 120e6  # that an environment takes
STATES = 19  # numbers of the observation before the lidar's
STEPS = (100, 300)  # of an episode, and for each block of its road: 30 km/h are enough
VIEW = 80  # m that a picture is wide


@dataclass
class Args:
    """The flags of `--env driving`."""

    cameras: tuple[Literal["topdown", "none"], ...] = ("topdown",)
    """the picture that the policy sees, or none: states"""
    size: int = 84
    """the picture's height and width"""
    map_blocks: tuple[int, ...] = (3,)
    """blocks of the road (curves, crossings, roundabouts, ramps, ...); several values are levels"""
    traffic: tuple[float, ...] = (0.1,)
    """density of the traffic, cars per 10 m of lane; several values are levels, with each of --map-blocks"""
    horizon: NonNegativeInt = 0
    """steps of 0.1 s after which an episode ends; 0 for 100 and 300 a block"""
    reward: Literal["sparse", "shaped"] = "shaped"
    """1 at arrival, or the terms of every step, weighted by the next five, too"""
    progress_weight: Annotated[NonNegative, Only("reward", "shaped")] = 0.1
    """of each metre along the road"""
    lane_weight: Annotated[NonNegative, Only("reward", "shaped")] = 0.01
    """against being off the lane's middle: the square of the distance, 1 at its edge"""
    speed_weight: Annotated[NonNegative, Only("reward", "shaped")] = 0.01
    """of speed along the road, 1 at the car's fastest"""
    collision_weight: Annotated[NonNegative, Only("reward", "shaped")] = 1.0
    """against a crash, or leaving the road"""
    comfort_weight: Annotated[NonNegative, Only("reward", "shaped")] = 0.01
    """against jerks: the mean square of the action's change, 1 for the largest"""

    def check(self):
        for name, (low, high) in {"map_blocks": (1, 10), "traffic": (0, 1), "size": (1, 1024)}.items():
            values = np.atleast_1d(getattr(self, name))
            if not ((low <= values) & (values <= high)).all():
                shown = " ".join(map(str, values))
                raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {shown}.")
        if "none" in self.cameras and len(self.cameras) > 1:
            raise UserError("--cameras none is no picture beside another; give one of them.")
        if vars(self).get("num_workers") is not None:
            raise UserError("--num-workers does nothing here: a driving environment is a process; drop it.")
        needs = PROCESS_BYTES * (getattr(self, "num_envs", 0) + getattr(self, "eval_envs", 0))
        if needs > (free := available_memory()):
            raise UserError(
                f"A driving environment takes {PROCESS_BYTES / 1e6:.0f} MB: these need {needs / 1e9:.1f} GB "
                f"where {free / 1e9:.1f} GB are free; use fewer --num-envs and --eval-envs."
            )


# --- the reward


def reward_terms(progress, offset, speed, failed, change):
    """What a step is worth, term by term, before the weights.

    progress: m along the road, less than 0 the wrong way; offset: from the lane's middle, in half lane
    widths; speed: a share of the car's fastest; failed: it crashed or left the road; change (2,): of the
    action, each in [-2, 2], since the step before -> {"progress", "lane", "speed", "collision", "comfort"}
    """
    return {
        "progress": progress,
        "lane": -min(offset**2, 1.0),
        "speed": speed if progress > 0 else 0.0,
        "collision": -float(failed),
        "comfort": -float(np.square(change).mean()) / 4,
    }


# --- the world


def preload():
    """What all processes of environments share: the server that they are forked off imports it once."""
    import metadrive.envs  # noqa: F401
    import metadrive.policy.idm_policy  # noqa: F401


class DrivingEnv(gym.Env):
    """See the module's docstring and `Args`, whose fields it takes. Raises UserError, one sentence."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    has_success, draws_tasks = True, True
    active_dims = np.ones(2, bool)

    def __init__(self, split="train", **flags):
        if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
            what = f"--env driving needs {' and '.join(missing)}"
            raise UserError(f"{what}: pip install --no-deps -r requirements-driving.txt")
        self.args = args = Args(**flags)
        args.check()
        self.pictured, self.split = args.cameras != ("none",), split
        self.levels = [(blocks, density) for blocks in args.map_blocks for density in args.traffic]
        self.instructions = [
            f"drive to the destination, {blocks} blocks away, in traffic of density {density:g}"
            for blocks, density in self.levels
        ]
        box, spaces = gym.spaces.Box, {}
        if self.pictured:
            spaces["image"] = box(0, 255, (1, args.size, args.size, 3), np.uint8)
        if self.pictured or len(self.levels) > 1:
            spaces["task"] = box(0, len(self.levels) - 1, (), np.int64)
        self.world = self._start()
        spaces["proprio"] = box(-1, 1, self.world.observation_space.shape, np.float32)
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), box(-1, 1, (2,), np.float32)
        self.origin, self.episodes = 0, 0

    def _start(self):
        """-> MetaDrive's environment, in this process's engine."""
        import metadrive
        from metadrive.engine.asset_loader import AssetLoader
        from metadrive.engine.engine_utils import engine_initialized

        if engine_initialized():
            raise UserError("MetaDrive has one environment in a process; close the other first.")
        AssetLoader.asset_path = PurePosixPath(metadrive.__file__).parent  # which is there, and
        AssetLoader.should_update_asset = classmethod(lambda cls: False)  # up to date
        lidar = {"num_lasers": 0 if self.pictured else 240, "distance": 50}
        world = metadrive.envs.MetaDriveEnv(
            dict(
                num_scenarios=sum(SCENARIOS["train"]), map=self.levels[0][0], vehicle_config={"lidar": lidar},
                store_map=False, log_level=50, force_destroy=True,  # a used car drives 1e-6 m/s otherwise
                driving_reward=1.0, speed_reward=0.0,  # so that `step_reward` is the progress
            )
        )  # fmt: skip
        world.lazy_init()
        return world

    def reset(self, *, seed=None, options=None):
        self.origin, self.episodes = (self.origin, self.episodes + 1) if seed is None else (seed, 0)
        rng = np.random.default_rng([SPLITS.index(self.split), self.origin, self.episodes])
        level = int(rng.choice(len(self.levels), p=task_chances(options, np.arange(len(self.levels)))))
        first, number = SCENARIOS[self.split]
        # an evaluation's seeds 0, 1, 2, ... are as many scenarios
        drawn = self.origin + self.episodes if self.split == "eval" else rng.integers(number)
        self._begin(level, first + int(drawn) % number)
        return self.observe(), {"success": False}

    def _begin(self, level, scenario):
        self.level, self.scenario, self.actions, self.idm, self.pictures = level, scenario, [], None, {}
        blocks, self.world.config["traffic_density"] = self.levels[level]
        self.world.config["map_config"]["config"] = blocks
        self.seen, _ = self.world.reset(seed=scenario)
        self.car, self.limit = self.world.agent, self.args.horizon or STEPS[0] + STEPS[1] * blocks

    def advance(self, action):
        """One control step (0.1 s) of physics. action (2,) -> reward, terminated, truncated, info; draws
        nothing."""
        action = np.clip(action, -1, 1).astype(np.float32)
        self.seen, _, terminated, _, found = self.world.step(action.astype(np.float64))
        before = self.actions[-1] if self.actions else np.zeros(2, np.float32)
        self.actions.append(action)
        success, reward = bool(found["arrive_dest"]), float(found["arrive_dest"])
        if self.args.reward == "shaped":
            _, offset = self.car.lane.local_coordinates(self.car.position)
            terms = reward_terms(
                found["step_reward"], 2 * offset / self.car.lane.width,
                self.car.speed_km_h / self.car.max_speed_km_h, terminated and not success, action - before,
            )  # fmt: skip
            reward += sum(getattr(self.args, f"{name}_weight") * term for name, term in terms.items())
        truncated = not terminated and len(self.actions) >= self.limit
        return float(reward), bool(terminated), truncated, {"success": success}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def observe(self):
        own, rays = np.split(self.seen, [STATES])
        obs = {"proprio": np.concatenate([2 * own - 1, 1 - rays], dtype=np.float32)}
        obs |= {"image": self._look(self.args.size)[None]} if self.pictured else {}
        return obs | ({"task": np.int64(self.level)} if "task" in self.observation_space.spaces else {})

    def render(self):
        """For a video, uint8 (448, 448, 3)."""
        return self._look(448)

    def _look(self, size):
        if size not in self.pictures:
            from metadrive.engine.top_down_renderer import TopDownRenderer

            west, east, south, north = self.world.current_map.road_network.get_bounding_box()
            film = int((size / VIEW + 0.2) * max(east - west, north - south)) + 1  # as large as the road
            self.pictures[size] = TopDownRenderer(
                film_size=(film, film), scaling=size / VIEW, screen_size=(size, size), num_stack=1,
                target_agent_heading_up=True, semantic_map=True, window=False,
            )  # fmt: skip
        return np.ascontiguousarray(self.pictures[size].render(None))

    def expert(self):
        """The action (2,) of MetaDrive's IDM policy, which keeps its distance and changes lanes, at 30
        km/h."""
        if not self.idm:
            from metadrive.policy.idm_policy import IDMPolicy

            self.idm = IDMPolicy(self.car, self.scenario)
        return np.clip(self.idm.act(), -1, 1).astype(np.float32)

    def get_state(self):
        return {
            "episode": [self.origin, self.episodes, self.level, self.scenario],
            "actions": np.reshape(self.actions, (-1, 2)).astype(np.float32),
        }

    def set_state(self, state):
        self.origin, self.episodes, *drawn = state["episode"]
        self._begin(*drawn)
        for action in np.asarray(state["actions"]):
            self.advance(action)

    def close(self):
        self.world.close()


make = DrivingEnv


# --- demonstrations


def _demonstrate(job):
    seeds, noise, kwargs = job
    return play(make(**kwargs), seeds, noise)


def demonstrations(num_episodes, seed, num_workers=None, noise=0.3, **kwargs):
    """Successful episodes of the IDM policy, as in the contract of `common/envs/__init__.py`. noise: the
    standard deviation on the actions that are executed."""
    return experts.demonstrations(_demonstrate, num_episodes, seed, num_workers, noise, kwargs)
