"""The world of the vector's tests, in a file of its own so that a worker imports no more."""

import ast
import os
import signal
import sys
import time
from dataclasses import dataclass

import gymnasium
import numpy as np

from common import UserError


@dataclass
class Args:
    """The fake world's flags, and those of a run that `make_envs` reads."""

    length: int = 5
    end: str = "terminated"


class FakeEnv(gymnasium.Env):
    """Counts its steps in `proprio` [count, start, sum of actions]; every episode has `length` steps.

    `die` (kill, raise, stop, sleep) strikes at count 2 while the file `marker` exists; with `once` it removes
    the marker.
    """

    has_success = True
    active_dims = np.array([True, False])

    def __init__(self, split="count", length=5, end="terminated", die="", marker="", once=True,
                 stateful=True, bad="", told="success", slow=0, frame=2, spoil=None):  # fmt: skip
        if bad:
            raise UserError(bad)
        time.sleep(slow)
        box = gymnasium.spaces.Box
        images = {"image": box(0, 255, (1, 4, 4, 3), np.uint8), "task": box(0, 0, (), np.int64)}
        self.observation_space = gymnasium.spaces.Dict(
            {"proprio": box(-np.inf, np.inf, (3,), np.float32)} | images
        )
        self.action_space = box(-1.0, 1.0, (2,), np.float32)
        self.instructions = (split,)
        self.length, self.end, self.die, self.marker, self.once = length, end, die, marker, once
        self.renders, self.told, self.frame = 0, told, frame
        self.spoil = spoil or {}  # step -> what observations (or "reward") have instead
        if not stateful:
            self.get_state = lambda: None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.options = options
        self.count, self.total, self.start = 0, 0.0, int(self.np_random.integers(1000))
        return self.observe(), {}

    def observe(self):
        self.renders += 1
        image = np.full((1, 4, 4, 3), self.renders, np.uint8)
        proprio = np.array([self.count, self.start, self.total], np.float32)
        obs = {"proprio": proprio, "image": image, "task": 0} | self.spoil.get(self.count, {})
        return {key: x for key, x in obs.items() if x is not None and key != "reward"}

    def advance(self, action):
        self.count, self.total = self.count + 1, self.total + float(action[0])
        if self.die and self.count == 2 and self.struck():
            if self.die == "raise":
                raise ArithmeticError("the gripper fell off")
            if self.die == "sleep":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGSTOP if self.die == "stop" else signal.SIGKILL)
        over = self.count >= self.length
        reward = self.spoil.get(self.count, {}).get("reward", 1.0)
        return reward, over and self.end != "truncated", over and self.end != "terminated", {self.told: over}

    def struck(self):
        if not self.once:
            return os.path.exists(self.marker)
        try:
            os.remove(self.marker)  # by one of the two workers only
        except FileNotFoundError:
            return False
        return True

    def render(self):
        return np.full((self.frame, self.frame, 3), self.count, np.uint8)

    def get_state(self):
        rng = repr(self.np_random.bit_generator.state)
        inherited = sorted({"torch", "only_in_the_test"} & sys.modules.keys())
        numbers = [self.count, self.total, self.start, self.renders]
        return {"numbers": numbers, "rng": rng, "inherited": inherited}

    def set_state(self, state):
        self.count, self.total, self.start, self.renders = state["numbers"]
        self.np_random.bit_generator.state = ast.literal_eval(state["rng"])


make = FakeEnv
