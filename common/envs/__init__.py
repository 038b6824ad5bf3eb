"""`make_envs`: one file a world, one contract.

A world is one file and one line in `WORLDS`. The file has `make(**kwargs) -> gymnasium.Env`, called with the
fields of its `Args` and with `split`, "train" or "eval", which never share an initial state (as with a random
state seeded by `[split's number, seed]`). `Args`, a dataclass, holds the world's own flags, with the marks of
`common/flags.py` if need be; it may have `check(self)`, which raises UserError for values that cannot work
together, and `defaults(self)`, a dict of a run's defaults that follow from the flags. Beyond Gymnasium's the
environment has
- `reset(seed=n)`, which fixes task, initial state and all that the episode draws: evaluations and groups rest
  on it; `reset(seed=None)` goes on with the environment's own random state;
- `instructions: list[str]`, `active_dims: bool (A,)` (those that have any effect), `has_success: bool`: then
  every step's info has `success` (of others the first step tells); optionally `dataset: str`, the published
  data set that is of this world, `action_bounds`, what -1 and 1 mean in its own units, each (A,), and
  `action_names`, a word for each action of a Discrete space;
- `observation_space`, a Dict: `image` uint8 (cameras, H, W, 3), `proprio` float32 (P,), `task` int64 () into
  the instructions; from states `proprio` alone; `action_space`, a Box from -1 to 1 (A,), or Discrete;
  observations of another shape or kind, and any number that is not finite, also a reward, end the run;
- `advance(action) -> reward, terminated, truncated, info` (no rendering) and `observe() -> obs` (renders);
- `render() -> uint8 (H, W, 3)`, a frame for a video;
- optionally `draws_tasks = True`: `reset` draws its task with the chances `task_chances(options, tasks)`;
- optionally `get_state() -> dict | None` and `set_state(dict)`, exact, with its own random state: plain
  values and arrays.

For imitation the file may also have
- `DEMO_KEYS`, camera -> its name in an HDF5 file (all are read, or those of a flag `cameras`),
  `from_file(images)`, pictures as files hold them -> as the world shows them, where these differ, and
  `to_file(images)`, the way back; `DEMO_PROPRIO`, {name in a file: width}, what `proprio` consists of there
  (default: "proprio" whole), or `demo_proprio(**flags)`, which gives it, all as the world shows it;
  `DEMO_TASKS`, {RoboMimic's name of a task: instruction}; `kept_steps(actions)`, (T, A) -> bool (T,), where
  not all are imitated;
- `demonstrations(num_episodes, seed, noise, num_workers, **flags)` of a scripted expert -> flat arrays of S
  steps: `image`, `proprio`, `task` as observed, `actions` (S, A) as labelled, `episode_starts` (E,),
  optionally `executed` (S, A), where these are not the labels, and `pixels` (S, cameras, 2, 2), where the
  first two things that the instruction names are in the picture, in [-1, 1];
- `scenes(num_scenes, seed, num_workers, **flags)`, still pictures -> `image`, `proprio`, `task`, `pixels`.
Any other name is a Gymnasium id that observes vectors or pictures (`gymnasium_env.py`). To copy:
`tabletop.py`.
"""

import dataclasses
import importlib

import gymnasium

from common import UserError, forkserver
from common.envs.vector import START_METHOD, vectorize
from common.memory import available_memory

WORLDS = {name: f"common.envs.{name}" for name in ("tabletop", "libero", "robosuite", "robomimic", "ogbench")}
NAMED = "robomimic"  # the world that a file in RoboMimic's layout names
GYMNASIUM = "common.envs.gymnasium_env"


def world_module(env):
    """The file of the world `env`."""
    return importlib.import_module(WORLDS.get(env, GYMNASIUM))


def prepare_workers(env):
    """Starts what the worker processes of the world `env` will be forked from, and returns at once: it
    imports the world while this process does other things."""
    if START_METHOD == "forkserver":
        forkserver.start(WORLDS.get(env, GYMNASIUM))


def world_flags(args):
    """The world's own flags among a run's `args`, by name."""
    fields = dataclasses.fields(world_module(args.env).Args)
    return {field.name: getattr(args, field.name, field.default) for field in fields}


def task_chances(options, tasks):
    """The chances (len(tasks),) with which a `reset` draws one of `tasks`, numbers of instructions: by its
    `options["task_weights"]`, one an instruction, that need not add up to 1; None, all alike, without."""
    if not options:
        return None
    weights = options["task_weights"][tasks]
    return weights / weights.sum()


def make_envs(args, split, num_envs, autoreset=False, states=False):
    """This process's share of `num_envs` environments of `args.env`, split "train" or "eval".

    `args` are a run's: its seed, chunk, action_history, num_workers, worker_timeout and the world's flags
    count. states: only vector observations and continuous actions will do. Raises UserError, one sentence.
    """
    from common import distributed  # torch, which a worker that is spawned does without

    rank, processes = distributed.ranks()
    if num_envs % processes:
        raise UserError(f"{num_envs} environments cannot be split evenly over {processes} processes.")
    if num_envs * 10_000 > (free := available_memory()):  # the smallest takes more
        raise UserError(f"{num_envs} environments do not fit into {free / 1e9:.0f} GB; give fewer of them.")
    named = {"split": split}
    if args.env not in WORLDS:  # an id that this process has registered a worker does not know
        named = {"id": args.env, "spec": gymnasium.registry.get(args.env)}
    envs = vectorize(
        (args.env, WORLDS.get(args.env, GYMNASIUM), world_flags(args) | named), num_envs // processes,
        seed=args.seed, first=rank * num_envs // processes, chunk=args.chunk, num_workers=args.num_workers,
        autoreset=autoreset, action_history=args.action_history, timeout=args.worker_timeout,
    )  # fmt: skip
    if states and ("image" in envs.single_observation_space.spaces or not envs.single_action_space.shape):
        envs.close()
        raise UserError(f"--env {args.env} is not for this script: it needs states and continuous actions.")
    if getattr(args, "curriculum", False) and not (envs.draws_tasks and envs.has_success):
        envs.close()
        raise UserError(f"--env {args.env} draws no tasks that succeed or fail; drop --curriculum.")
    return envs
