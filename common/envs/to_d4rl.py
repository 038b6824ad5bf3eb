"""Episodes of a world's scripted expert, from states and with rewards -> a data set in D4RL's layout, for
`sac.py --prior-data` and the offline scripts.

    python -m common.envs.to_d4rl --env robosuite --tasks Lift --horizon 80 --reward shaped --out lift.hdf5
    python -m common.envs.to_d4rl --env maniskill --reward shaped --out pick.hdf5

Failures are kept, and of four episodes one is played as the expert means it, two with noise and one with
twice that: a critic learns from what goes wrong as well.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass

import numpy as np
import tyro
from tqdm import tqdm

from common import UserError, say
from common.checkpoint import CheckpointError
from common.datasets import save_d4rl
from common.envs import WORLDS, world_module
from common.envs.experts import perturb
from common.flags import NonNegative, NonNegativeInt, PositiveInt


@dataclass(kw_only=True)
class Args:
    """Episodes of a world's scripted expert -> a data set in D4RL's layout."""

    out: str
    """the file to write"""
    env: str
    """a world that has an expert, and states alone"""
    episodes: PositiveInt = 60
    """successful or not"""
    noise: NonNegative = 0.3
    """standard deviation of the noise on the executed actions of two episodes in four"""
    seed: NonNegativeInt = 1
    """of the layouts, which are training's, and of the noise"""


def transitions(env, seed, noise):
    """One episode -> T transitions: obs (S,), action (A,), reward, next obs (S,), terminated, truncated."""
    rng, obs, rows, ended = np.random.default_rng([7, seed]), env.reset(seed=seed)[0], [], False
    while not ended:
        action = perturb(env, env.expert(), noise, rng)
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs["proprio"], action, reward, after["proprio"], terminated, truncated))
        obs, ended = after, terminated or truncated
    return rows


def write(args, flags):
    env = world_module(args.env).make(**flags)
    if (
        not hasattr(env, "expert")
        or set(env.observation_space.spaces) != {"proprio"}
        or not env.action_space.shape
    ):
        raise UserError(
            f"--env {args.env} has no expert that plays from states with continuous actions here."
        )
    seeds = np.random.default_rng([1, args.seed]).integers(2**31, size=args.episodes)
    rows = []
    for number, seed in enumerate(tqdm(seeds, unit="episode", disable=None)):
        rows += transitions(env, int(seed), args.noise * (0, 1, 1, 2)[number % 4])
    env.close()
    save_d4rl(args.out, *map(np.array, zip(*rows, strict=True)), env_id=args.env, env_flags=flags)
    won = sum(bool(row[4]) for row in rows)
    say(f"{args.episodes} episodes of {len(rows)} steps, {won} successful, written to {args.out}")


def main(words=None):
    words = sys.argv[1:] if words is None else words
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env")
    try:
        name = early.parse_known_args(words)[0].env
        if name not in WORLDS:
            raise UserError(f"--env has to name a world with an expert, of {', '.join(WORLDS)}; not {name}.")
        world = world_module(name).Args
        own = [(f.name, f.type, ("none",)) for f in dataclasses.fields(world) if f.name == "cameras"]
        joined = dataclasses.make_dataclass("Args", own, bases=(Args, world))
        args = tyro.cli(joined, args=words, prog="python -m common.envs.to_d4rl", description=__doc__)
        write(args, {f.name: getattr(args, f.name) for f in dataclasses.fields(world)})
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
