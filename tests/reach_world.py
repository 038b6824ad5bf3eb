"""A world in one file, as a user would write it: a point in the plane has to come to the disc of the colour
that the instruction names."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from common.flags import Positive

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 230)}
INSTRUCTIONS = [f"reach the {colour} disc" for colour in COLOURS]
SPLITS = ("train", "eval")
SIZE, MAX_STEPS, RADIUS = 32, 24, 0.2


@dataclass
class Args:
    """The flags of `--env reach`."""

    speed: Positive = 0.15
    """how far an action of 1 moves the point, whose world is [-1, 1]"""


class ReachEnv(gym.Env):
    has_success = True
    instructions = INSTRUCTIONS
    active_dims = np.ones(2, bool)

    def __init__(self, split="train", speed=0.15):
        self.split, self.speed = split, speed
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (1, SIZE, SIZE, 3), np.uint8),
            proprio=gym.spaces.Box(-1, 1, (2,), np.float32),
            task=gym.spaces.Box(0, len(INSTRUCTIONS) - 1, (), np.int64),
        )
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        layout = int(self.np_random.integers(2**31)) if seed is None else seed
        rng = np.random.default_rng([SPLITS.index(self.split), layout])
        self.task = int(rng.integers(3))
        self.targets = np.stack([rng.uniform(-0.8, 0.8, 2) for _ in COLOURS])
        self.point = rng.uniform(-0.8, 0.8, 2)
        self.steps = 0
        return self.observe(), {}

    def advance(self, action):
        self.point = np.clip(self.point + self.speed * np.asarray(action), -1, 1)
        self.steps += 1
        success = bool(np.linalg.norm(self.point - self.targets[self.task]) < RADIUS)
        return float(success), success, not success and self.steps >= MAX_STEPS, {"success": success}

    def draw(self, size):
        axis = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(axis, axis)
        picture = np.full((size, size, 3), 200, np.uint8)
        for target, colour in zip(self.targets, COLOURS.values(), strict=True):
            picture[np.hypot(x - target[0], y - target[1]) < RADIUS] = colour
        picture[np.hypot(x - self.point[0], y - self.point[1]) < 0.1] = 0
        return picture

    def observe(self):
        return {
            "image": self.draw(SIZE)[None],
            "proprio": self.point.astype(np.float32),
            "task": np.int64(self.task),
        }

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def get_state(self):
        return {
            "task": self.task,
            "targets": self.targets,
            "point": self.point,
            "steps": self.steps,
            "rng": self.np_random.bit_generator.state,
        }

    def set_state(self, state):
        self.task, self.targets, self.point = state["task"], state["targets"], state["point"]
        self.steps = state["steps"]
        self.np_random.bit_generator.state = state["rng"]

    def render(self):
        return self.draw(128)


def make(**kwargs):
    return ReachEnv(**kwargs)


def demonstrations(num_episodes, seed, num_workers=None, noise=0.3, **env_kwargs):
    """Straight lines to the target; see tabletop's."""
    env, rows, starts = make(**env_kwargs), [], []
    rng = np.random.default_rng([7, seed])
    for _ in range(num_episodes):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        starts.append(len(rows))
        while True:
            action = np.clip((env.targets[env.task] - env.point) / env.speed, -1, 1).astype(np.float32)
            executed = np.clip(action + noise * rng.standard_normal(2), -1, 1).astype(np.float32)
            rows.append((obs["image"], obs["proprio"], action, executed, obs["task"]))
            obs, _, terminated, truncated, _ = env.step(executed)
            if terminated or truncated:
                break
    image, proprio, actions, executed, task = map(np.stack, zip(*rows, strict=True))
    return {
        "image": image,
        "proprio": proprio,
        "actions": actions,
        "executed": executed,
        "task": task,
        "episode_starts": np.array(starts),
        "instructions": INSTRUCTIONS,
    }
