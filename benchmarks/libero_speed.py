"""LIBERO's environment steps per second, with a picture a chunk of 8 actions, and the memory of a worker.

python benchmarks/libero_speed.py [--suite libero_spatial] [--seconds 20]
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.envs import libero, make_envs  # noqa: E402

CHUNK = 8


@dataclass
class Args:
    suite: str = "libero_spatial"
    """one of LIBERO's five; the workers all run its task 0"""
    seconds: float = 20.0
    """that each rate is measured for"""


def rate(seconds, work):
    """Mean seconds of work() over at least `seconds`, after a first call"""
    work()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def vector(args, num_envs, num_workers, cameras):
    """-> seconds until the first observation, environment steps per second, memory of a worker in GB (its own
    pages), and of the same share of what the workers have in common"""
    rng, start = np.random.default_rng(0), time.perf_counter()
    envs = make_envs(
        "libero", num_envs, seed=1, chunk=CHUNK, num_workers=num_workers, suite=args.suite, tasks=("0",),
        cameras=cameras, max_steps=10**9,
    )  # fmt: skip
    envs.reset()
    began = time.perf_counter() - start
    shape = (num_envs, CHUNK, 7)
    chunk = rate(args.seconds, lambda: envs.step(rng.uniform(-0.3, 0.3, shape).astype(np.float32)))
    memory = [process.memory_full_info() for process in psutil.Process().children()]
    envs.close()
    mean = [np.mean([getattr(m, kind) for m in memory]) / 1e9 for kind in ("uss", "pss")]
    return began, num_envs * CHUNK / chunk, *mean


def main(args):
    print(f"{args.suite} task 0, {psutil.cpu_count()} cores, pictures of 256x256, chunks of {CHUNK}\n")
    print(
        "| environments | workers | cameras | steps/s | first observation, s | GB a worker | with its share |"
    )
    print("|" + " --- |" * 7)
    both = ("agentview", "wrist")
    for num_envs, num_workers, cameras in (
        (1, 1, both[:1]),
        (1, 1, both),
        (2, 2, both[:1]),
        (4, 2, both[:1]),
    ):
        began, steps, own, shared = vector(args, num_envs, num_workers, cameras)
        numbers = f"{steps:.1f} | {began:.1f} | {own:.2f} | {shared:.2f}"
        print(f"| {num_envs} | {num_workers} | {', '.join(cameras)} | {numbers} |", flush=True)
    env, rng = (
        libero.make(suite=args.suite, tasks=(0,), split="eval", max_steps=10**9),
        np.random.default_rng(0),
    )
    env.reset(seed=0)  # in this process only now: a worker must not inherit OpenGL
    step = rate(args.seconds / 2, lambda: env.advance(rng.uniform(-0.3, 0.3, 7)))
    look = rate(args.seconds / 2, env.observe)
    reset = rate(args.seconds / 2, lambda: env.reset(seed=int(rng.integers(500))))
    times = f"a step of physics {1e3 * step:.1f} ms, a picture {1e3 * look:.0f} ms, a reset {reset:.2f} s"
    print(f"\nin one process: {times}")


if __name__ == "__main__":
    main(tyro.cli(Args))
