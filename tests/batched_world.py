"""`reach_world` as a batch: points in the plane that have to come to the discs that instructions name."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import reach_world
import torch


@dataclass
class Args(reach_world.Args):
    """The flags of `--env reach`, and which of the two it is."""

    engine: Literal["one", "batch"] = "batch"
    """each environment for itself, or all as one"""
    stateful: bool = True
    """the batch can save its state"""


def make(engine="one", stateful=True, **kwargs):
    return reach_world.make(**kwargs)


def batched(engine="batch", **kwargs):
    return engine == "batch"


def make_batch(num_envs, device, stateful=True, **kwargs):
    return (ReachBatch if stateful else Forgetful)(num_envs, device, **kwargs)


class Forgetful:
    """All numbers are float64 tensors; a reset draws as a `ReachEnv` does, by one that it owns."""

    has_success, instructions, active_dims = True, reach_world.INSTRUCTIONS, np.ones(2, bool)

    def __init__(self, num_envs, device, engine="batch", **kwargs):
        self.envs = [make(**kwargs) for _ in range(num_envs)]
        self.observation_space, self.action_space = self.envs[0].observation_space, self.envs[0].action_space
        self.speed, self.closed, self.spoiled = self.envs[0].speed, False, False
        for env in self.envs:
            env.reset(seed=0)  # what is seen of environments before their first reset
        self.point = torch.zeros(num_envs, 2, dtype=torch.float64, device=device)
        self.target, self.steps = torch.zeros_like(self.point), torch.zeros(num_envs, device=device)

    def reset(self, seeds, options):
        for row, seed in seeds.items():
            env = self.envs[row]
            env.reset(seed=seed, options=options)
            self.point[row] = torch.as_tensor(env.point)
            self.target[row], self.steps[row] = torch.as_tensor(env.targets[env.task]), 0

    def advance(self, actions, rows):
        moved = (self.point + (self.speed * actions).double()).clamp(-1, 1)
        self.point = torch.where(rows[:, None], moved, self.point)
        self.steps = self.steps + rows
        success = (self.point - self.target).norm(dim=1) < reach_world.RADIUS
        for env, point in zip(self.envs, self.point.cpu().numpy(), strict=True):
            env.point = point
        return success.double(), success, ~success & (self.steps >= reach_world.MAX_STEPS), success

    def observe(self):
        found = [env.observe() for env in self.envs]
        obs = {key: torch.as_tensor(np.stack([x[key] for x in found])) for key in found[0]}
        if self.spoiled:
            obs["proprio"][0, 0] = np.nan
        return {key: x.to(self.point.device) for key, x in obs.items()}

    def render(self, row):
        return self.envs[row].render()

    def close(self):
        self.closed = True


class ReachBatch(Forgetful):
    def get_state(self):
        return {"envs": [env.get_state() for env in self.envs], "steps": self.steps.cpu().numpy().copy()}

    def set_state(self, state):
        for row, (env, saved) in enumerate(zip(self.envs, state["envs"], strict=True)):
            env.reset(seed=0)
            env.set_state(saved)
            self.point[row] = torch.as_tensor(np.array(env.point))
            self.target[row] = torch.as_tensor(np.array(env.targets)[env.task])
        self.steps = torch.as_tensor(np.array(state["steps"]), device=self.point.device)
