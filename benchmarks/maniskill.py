"""ManiSkill on one core: milliseconds a step, and scripted episodes of PickCube from states, with rewards,
for sac.py --prior-data.

python benchmarks/maniskill.py --speed
python benchmarks/maniskill.py --episodes 60 --out demos.hdf5
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.datasets import save_d4rl  # noqa: E402
from common.envs import maniskill  # noqa: E402


@dataclass
class Args:
    speed: bool = False
    """measure"""
    steps: int = 200
    """of each measurement"""
    episodes: int = 60
    """of the expert, with a noise of 0.1"""
    out: str | None = None
    """the file for them, in D4RL's layout"""


def milliseconds(steps, cameras):
    """Of a step with its observation, after the first episode: of this process's CPU, and of the wall."""
    env, rng = maniskill.make(cameras=cameras), np.random.default_rng(0)
    env.reset(seed=0)
    cpu, wall = time.process_time(), time.perf_counter()
    for step in range(steps):
        if env.step(rng.uniform(-1, 1, 7))[3]:
            env.reset(seed=step)
    return (time.process_time() - cpu) / steps * 1000, (time.perf_counter() - wall) / steps * 1000


def demonstrate(episodes, out):
    env = maniskill.make(cameras=("none",), reward="shaped")
    rows, rng = [], np.random.default_rng(1)
    for seed in rng.integers(2**31, size=episodes):
        obs, ended = env.reset(seed=int(seed))[0]["proprio"], False
        while not ended:
            noise = 0.1 * np.array([1, 1, 1, 0.5, 0.5, 0.5, 0]) * rng.standard_normal(7)
            action = (env.expert() + noise).clip(-1, 1).astype(np.float32)
            after, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, after["proprio"], terminated, truncated))
            obs, ended = after["proprio"], terminated or truncated
    print(f"{episodes} episodes, {len(rows)} steps, {sum(row[4] for row in rows)} successes")
    save_d4rl(out, *map(np.array, zip(*rows, strict=True)))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    for cameras in (("none",), ("agentview",), ("agentview", "wrist")) if args.speed else ():
        milliseconds(1, cameras)  # compiles the shaders
        cpu, wall = milliseconds(args.steps, cameras)
        print(f"cameras {' '.join(cameras)}: {cpu:.1f} ms of CPU, {wall:.1f} ms of wall a step")
    if args.out:
        demonstrate(args.episodes, args.out)
