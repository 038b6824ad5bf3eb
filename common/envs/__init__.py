"""`make_envs`: one file a world, one contract.

A world is one file and one line in `WORLDS`. The file has `make(**kwargs) -> gymnasium.Env`, called with the
fields of its `Args` and with `split`, "train" or "eval", which never share an initial state (as with a random
state seeded by `[split's number, seed]`). `Args`, a dataclass, holds the world's own flags, with the marks of
`common/flags.py` if need be; it may have `check(self)`, which raises UserError for values that cannot work
together, and `defaults(self)`, a dict of a run's defaults that follow from the flags. The file may have
`preload()`, which imports what worker processes share, and `OWN_PROCESS = True` where a process holds one
environment at most. Beyond Gymnasium's the environment has
- `reset(seed=n)`, which fixes task, initial state and all that the episode draws: evaluations and groups rest
  on it; `reset(seed=None)` goes on with the environment's own random state;
- `instructions: list[str]`, `active_dims: bool (A,)` (those that have any effect), `has_success: bool`: then
  every step's info has `success` (of others the first step tells); optionally `dataset: str`, the published
  data set that is of this world, `action_bounds`, what -1 and 1 mean in its own units, each (A,),
  `action_names`, a word for each action of a Discrete space, and `training_instructions`, those that split
  "train" shows, where it keeps some back;
- `observation_space`, a Dict: `image` uint8 (cameras, H, W, 3), `proprio` float32 (P,), `task` int64 () into
  the instructions; from states `proprio` alone, or with `task`; `action_space`, a Box from -1 to 1 (A,), or
  Discrete; observations of another shape or kind, and any number that is not finite, also a reward, end the
  run;
- `advance(action) -> reward, terminated, truncated, info` (no rendering) and `observe() -> obs` (renders);
- `render() -> uint8 (H, W, 3)`, a frame for a video;
- optionally `draws_tasks = True`: `reset` draws its task with the chances `task_chances(options, tasks)`;
- optionally `get_state() -> dict | None` and `set_state(dict)`, exact, with its own random state: plain
  values and arrays.

A simulator that steps many environments at once, as on a GPU, needs no workers and no copies: the file may
have `batched(**flags) -> bool`, whether its flags ask for that, and `make_batch(num_envs, device, **kwargs)`,
called as `make` is. What this gives has the environment's attributes and spaces, `close()`, and
- `reset(seeds, options)`, which starts the episodes of some rows: {row: seed, or None to go on with the row's
  own random state}; options as Gymnasium's `reset` has them, or None;
- `advance(actions, rows) -> reward, terminated, truncated, success`, tensors (N,) on `device`, as actions
  (N, A) and rows, bool (N,), are: the other rows stay as they are, and what is told of them is not read;
- `observe() -> obs`, tensors (N, ...) that are not written to again; `render(row)`, an array for a video;
- optionally `get_state()` and `set_state(dict)`, of all rows. To copy: `tabletop_warp.py`.

For imitation the file may also have
- `DEMO_KEYS`, camera -> its name in an HDF5 file (all are read, or those of a flag `cameras`),
  `from_file(images)`, pictures as files hold them -> as the world shows them, where these differ, and
  `to_file(images)`, the way back; `DEMO_PROPRIO`, {name in a file: width}, what `proprio` consists of there
  (default: "proprio" whole), or `demo_proprio(**flags)`, which gives it, all as the world shows it;
  `DEMO_TASKS`, {RoboMimic's name of a task: instruction}; `kept_steps(actions)`, (T, A) -> bool (T,), where
  not all are imitated;
- `read_demonstrations(path, max_demos, outcomes, **flags)`, files of a layout of its own as
  `common.datasets.load_demonstrations` gives others, or None for other files; `REFERENCE_SCORES`, the returns
  of a normalised score of 0 and of 100;
- `demonstrations(num_episodes, seed, noise, num_workers, **flags)` of a scripted expert -> flat arrays of S
  steps: `proprio` and, where they are observed, `image` and `task`; `actions` (S, A) as labelled,
  `episode_starts` (E,), optionally `executed` (S, A), where these are not the labels, and `pixels`
  (S, cameras, 2, 2), where the first two things that the instruction names are in the picture, in [-1, 1];
- `scenes(num_scenes, seed, num_workers, **flags)`, still pictures -> `image`, `proprio`, `task`, `pixels`.
For `common/serve.py` it may have `from_client(message)`, the dict of a client of its own, which asks at each
step -> a dict of `images`, {camera: uint8 (H, W, 3)}, and `state`, UserError for any other; `to_client`,
actions (K, A) in [-1, 1] -> in its client's units.
Any other name is a Gymnasium id that observes vectors or pictures (`gymnasium_env.py`). To copy:
`tabletop.py`.
"""

import dataclasses
import importlib

import gymnasium

from common import UserError, forkserver
from common.envs.vector import START_METHOD, vectorize
from common.memory import available_memory

WORLDS = {
    name: f"common.envs.{name}"
    for name in (
        "tabletop", "libero", "robosuite", "robomimic", "maniskill", "rl4vla", "driving", "dmc", "behavior",
        "ogbench",
    )
}  # fmt: skip
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


def is_batch(args):
    """Whether the flags of a run's `args` ask for a simulator that steps all environments at once."""
    ask = getattr(world_module(args.env), "batched", None) if args.env else None
    return ask is not None and ask(**world_flags(args))


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
    module, flags = WORLDS.get(args.env, GYMNASIUM), world_flags(args) | named
    num_envs, first = num_envs // processes, rank * num_envs // processes
    own = dict(seed=args.seed, first=first, chunk=args.chunk, autoreset=autoreset)
    own |= dict(action_history=args.action_history)
    if is_batch(args):
        from common.envs.batched import BatchedEnvs

        device = distributed.device(getattr(args, "device", "auto"))
        batch = world_module(args.env).make_batch(num_envs, device, **flags)
        envs = BatchedEnvs(args.env, batch, num_envs, device, **own)
    else:
        alone = getattr(world_module(args.env), "OWN_PROCESS", False)
        workers = num_envs if alone else args.num_workers
        world = (args.env, module, flags)
        envs = vectorize(world, num_envs, num_workers=workers, timeout=args.worker_timeout, **own)
    if states and ("image" in envs.single_observation_space.spaces or not envs.single_action_space.shape):
        envs.close()
        raise UserError(f"--env {args.env} is not for this script: it needs states and continuous actions.")
    if getattr(args, "curriculum", False) and not (envs.draws_tasks and envs.has_success):
        envs.close()
        raise UserError(f"--env {args.env} draws no tasks that succeed or fail; drop --curriculum.")
    return envs
