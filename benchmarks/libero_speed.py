"""LIBERO's environment steps per second, with a picture a chunk of 8 actions, and the memory of a worker: in
episodes that do not end, and as in training, with the protocol's episodes of random tasks.

python benchmarks/libero_speed.py [--suite libero_spatial] [--num-tasks 3] [--seconds 20]
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.envs import libero  # noqa: E402
from common.envs.vector import vectorize  # noqa: E402

CHUNK = 8


@dataclass
class Args:
    suite: str = "libero_spatial"
    """one of LIBERO's five; where episodes do not end, its task 0"""
    num_tasks: int = 3
    """the first tasks of the suite, where episodes end; 0 leaves this out"""
    seconds: float = 20.0
    """that each rate is measured for; where episodes end, for each task, and twice"""


def rate(seconds, work):
    """Mean seconds of work() over at least `seconds`, after a first call"""
    work()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def vector(args, num_envs, num_workers, cameras, num_tasks):
    """-> seconds until the first observation, environment steps per second, memory of a worker in GB (its own
    pages), and of the same share of what the workers have in common"""
    rng, start, shape = np.random.default_rng(0), time.perf_counter(), (num_envs, CHUNK, 7)
    tasks, horizon = range(num_tasks or 1), 0 if num_tasks else 10**9
    kwargs = dict(suite=args.suite, cameras=cameras, tasks=tuple(map(str, tasks)), horizon=horizon)
    world = ("libero", libero.__name__, kwargs)
    envs = vectorize(world, num_envs, seed=1, chunk=CHUNK, num_workers=num_workers)
    envs.reset()
    began, steps = time.perf_counter() - start, []

    def work():
        steps.append(envs.step(rng.uniform(-0.3, 0.3, shape).astype(np.float32))[-1]["steps"].sum())

    if num_tasks:  # until the workers have met most of them
        rate(args.seconds * num_tasks, work)
        steps.clear()
    seconds = rate(args.seconds * len(tasks), work)
    memory = [psutil.Process(worker.process.pid).memory_full_info() for worker in envs._workers]
    envs.close()
    mean = [np.mean([getattr(m, kind) for m in memory]) / 1e9 for kind in ("uss", "pss")]
    return began, np.mean(steps) / seconds, *mean


def main(args):
    print(f"{args.suite}, {psutil.cpu_count()} cores, pictures of 256x256, chunks of {CHUNK}\n")
    columns = "environments | workers | cameras | tasks | steps/s | first observation, s | GB a worker"
    print(f"| {columns} | with its share |\n|" + " --- |" * 8)
    both = ("agentview", "wrist")
    rows = [(1, 1, both[:1], 0), (1, 1, both, 0), (2, 2, both[:1], 0), (4, 2, both[:1], 0)]
    rows += [(2, 2, both[:1], args.num_tasks)] if args.num_tasks else []
    for num_envs, num_workers, cameras, num_tasks in rows:
        began, steps, own, shared = vector(args, num_envs, num_workers, cameras, num_tasks)
        numbers = f"{steps:.1f} | {began:.1f} | {own:.2f} | {shared:.2f}"
        which = f"{num_tasks}, episodes end" if num_tasks else "0, no end"
        print(f"| {num_envs} | {num_workers} | {', '.join(cameras)} | {which} | {numbers} |", flush=True)
    env = libero.make(suite=args.suite, tasks=(0,), split="eval", horizon=10**9)
    rng, seeds = np.random.default_rng(0), itertools.count()
    env.reset(seed=0)
    step = rate(args.seconds / 2, lambda: env.advance(rng.uniform(-0.3, 0.3, 7)))
    look = rate(args.seconds / 2, env.observe)
    reset = rate(args.seconds / 2, lambda: env.reset(seed=next(seeds)))
    times = f"a step of physics {1e3 * step:.1f} ms, a picture {1e3 * look:.0f} ms, a reset {reset:.2f} s"
    if args.num_tasks > 1:
        env.close()
        env, seeds = (
            libero.make(suite=args.suite, tasks=range(args.num_tasks), split="eval"),
            itertools.count(),
        )
        for _ in range(args.num_tasks):
            env.reset(seed=next(seeds))
        change = rate(args.seconds / 2, lambda: env.reset(seed=next(seeds)))
        times += f", one to another of {args.num_tasks} tasks {change:.2f} s"
    print(f"\nin one process: {times}")


if __name__ == "__main__":
    main(tyro.cli(Args))
