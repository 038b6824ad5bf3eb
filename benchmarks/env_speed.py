"""Environment steps per second of the tabletop on one core, with and without pictures, and of the vector of
workers.

python benchmarks/env_speed.py
python benchmarks/env_speed.py --worlds      # and what a step and a picture of each installed world cost
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import UserError  # noqa: E402
from common.envs import WORLDS, world_module  # noqa: E402
from common.envs.tabletop import TabletopEnv  # noqa: E402
from common.envs.vector import vectorize  # noqa: E402
from common.memory import available_cores  # noqa: E402


def expert_episodes(num_episodes=100, **kwargs):
    """The scripted expert's actions, a list of (steps, 7) for each seed: found beforehand, so that thinking
    them out is not timed."""
    env, episodes = TabletopEnv(**kwargs), []
    for seed in range(num_episodes):
        env.reset(seed=seed)
        actions, ended = [], False
        while not ended:
            actions.append(env.expert())
            _, terminated, truncated, _ = env.advance(actions[-1])
            ended = terminated or truncated
        episodes.append(actions)
    return episodes


def one_core(episodes, render_every, **kwargs):
    """Steps per second over whole episodes, resets included, with a picture every `render_every` steps."""
    env, steps = TabletopEnv(**kwargs), 0
    start = time.perf_counter()
    for seed, actions in enumerate(episodes):
        env.reset(seed=seed)
        for action in actions:
            env.advance(action)
            steps += 1
            if render_every and steps % render_every == 0:
                env.observe()
    return steps / (time.perf_counter() - start)


def vector(num_envs=128, chunk=4, seconds=5.0):
    world, rng, steps = ("tabletop", WORLDS["tabletop"], {}), np.random.default_rng(0), 0
    envs = vectorize(world, num_envs, seed=1, chunk=chunk)
    envs.reset()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        *_, info = envs.step(rng.uniform(-1, 1, (num_envs, chunk, 7)).astype(np.float32))
        steps += int(info["steps"].sum())
    elapsed, workers = time.perf_counter() - start, envs.num_workers
    envs.close()
    return steps / elapsed, workers


def costs(world, **kwargs):
    """-> milliseconds of this process's CPU of a step of random moves, and of an observation."""
    env, rng = world_module(world).make(**kwargs), np.random.default_rng(0)
    env.reset(seed=0)

    def step():
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        _, terminated, truncated, _ = env.advance(action)
        if terminated or truncated:
            env.reset()

    found = []
    for act, times in ((step, 40), (env.observe, 15)):
        act()
        start = time.process_time()
        for _ in range(times):
            act()
        found.append((time.process_time() - start) / times * 1e3)
    env.close()
    return found


WORLD_ROWS = (
    ("tabletop", {}), ("libero", dict(suite="libero_object", tasks=(0,))), ("robosuite", {}),
    ("maniskill", {}), ("rl4vla", {}), ("driving", {}), ("dmc", {}), ("dmc", dict(pictures=True)),
)  # fmt: skip


if __name__ == "__main__":
    for world, kwargs in WORLD_ROWS if "--worlds" in sys.argv[1:] else ():
        try:
            step, see = costs(world, **kwargs)
            print(f"{world:10s} {str(kwargs or ''):45s} {step:6.2f} ms a step, {see:6.2f} ms an observation")
        except UserError as error:
            print(f"{world:10s} {error}")
    rows = [
        ("no picture", dict(render_every=0)),
        ("a 64x64 picture every step", dict(render_every=1)),
        ("a 64x64 picture every 4 steps (chunk 4)", dict(render_every=4)),
        ("both cameras every step", dict(render_every=1, cameras=("agentview", "wrist"))),
    ]
    episodes = expert_episodes()
    for name, kwargs in rows:
        rates = sorted(one_core(episodes, **kwargs) for _ in range(3))
        print(f"one core, {name:42s} {rates[1]:7.0f} steps/s (of 3: {rates[0]:.0f} to {rates[2]:.0f})")
    rate, workers = vector()
    print(f"128 environments, {workers} workers on {available_cores()} cores, chunk 4: {rate:.0f} steps/s")
