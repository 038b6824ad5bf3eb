"""`make_envs`: one file a world, one contract.

A world is one file and one line in `WORLDS`. The file has `make(**kwargs) -> gymnasium.Env`, called with the
fields of its `Args` and with `split`, "train" or "eval", which never share an initial state. `Args`, a
dataclass, holds the world's own flags; it may have `check(self)`, which raises UserError for values that
cannot work together, and `defaults(self)`, a dict of a run's defaults that follow from the flags. Beyond
Gymnasium's the environment has
- `instructions: list[str]`, `active_dims: bool (A,)` (those that have any effect), `has_success: bool`: then
  every step's info has `success`; optionally `dataset: str`, the published data set that is of this world,
  and `action_bounds`, what -1 and 1 mean in its own units, each (A,);
- `observation_space`, a Dict: `image` uint8 (cameras, H, W, 3), `proprio` float32 (P,), `task` int64 (); from
  states `proprio` alone;
- `advance(action) -> reward, terminated, truncated, info` (no rendering) and `observe() -> obs` (renders);
- `render() -> uint8 (H, W, 3)`, a frame for a video;
- optionally `get_state() -> dict | None` and `set_state(dict)`, exact, with its own random state. For
  imitation the file may also have `DEMO_KEYS` (camera -> its name in an HDF5 file), `from_file(images)` (as
  the world shows what files hold), and the functions `demonstrations` and `scenes`, as tabletop's, of a
  scripted expert. Any other name is a Gymnasium id with vector observations (`gymnasium_env.py`).
"""

import dataclasses
import importlib

from common import UserError
from common.envs.vector import vectorize

WORLDS = {"tabletop": "common.envs.tabletop", "libero": "common.envs.libero"}
GYMNASIUM = "common.envs.gymnasium_env"


def world_module(env):
    """The file of the world `env`."""
    return importlib.import_module(WORLDS.get(env, GYMNASIUM))


def world_flags(args):
    """The world's own flags among a run's `args`, by name."""
    fields = dataclasses.fields(world_module(args.env).Args)
    return {field.name: getattr(args, field.name) for field in fields}


def make_envs(args, split, num_envs, autoreset=False, states=False):
    """This process's share of `num_envs` environments of `args.env`, split "train" or "eval".

    `args` are a run's: its seed, chunk, action_history, num_workers and the world's flags count. states: only
    vector observations and continuous actions will do. Raises UserError, one sentence.
    """
    from common import distributed  # torch, which a worker that is spawned does without

    rank, processes = distributed.ranks()
    if num_envs % processes:
        raise UserError(f"{num_envs} environments cannot be split evenly over {processes} processes.")
    kwargs = world_flags(args) | {"split": split} if args.env in WORLDS else {"id": args.env}
    envs = vectorize(
        (args.env, WORLDS.get(args.env, GYMNASIUM), kwargs), num_envs // processes, seed=args.seed,
        first=rank * num_envs // processes, chunk=args.chunk, num_workers=args.num_workers,
        autoreset=autoreset, action_history=args.action_history,
    )  # fmt: skip
    if states and ("image" in envs.single_observation_space.spaces or not envs.single_action_space.shape):
        envs.close()
        raise UserError(f"--env {args.env} is not for this script: it needs states and continuous actions.")
    return envs
