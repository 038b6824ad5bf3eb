"""A run: what every script needs and no paper is about.

`main` reads the command line (presets, `--resume`, what a checkpoint fixes), opens a `Run` and calls the
script's `train(args, run)`. A `Run` is a handle, no trainer: it knows device, processes, folder, log,
progress bar, checkpoints, signals and results, and calls nothing of the script. In the order of a script's
life:

    run.closing(envs)                      closed when the run ends, however it ends
    run.saved                              what --checkpoint or --resume holds, or None
    run.load(agent)                        its weights
    run.open()                             makes the folder: what was wrong in the input has shown by now
    run.generator(name)                    a random generator, saved and restored with the rest
    run.restore()                          --resume: the checkpoint's content, generators set back; else None
    run.begin(step, total, unit)           log, progress bar, and signals from here on
    run.record(evaluation, step)           is it the best so far?
    run.save(name, state, own)             a checkpoint; `own` is each process's
    run.lap(name), run.log(scalars, step)  where the time went; the metrics
    run.check_finite(metrics, when)        ends the run where a number is NaN or infinite
    run.signalled, run.stopping()          after SIGINT or SIGTERM: this process, any of torchrun's
    run.stopped(step)                      the end of a stopped run
    run.finish(step, ...)                  results.json and the last line
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import inspect
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import UserError, distributed, say
from common.backbones import BACKBONES, family_of, model_module
from common.checkpoint import (
    CheckpointError,
    check_free,
    check_kinds,
    claim,
    hardware,
    load_checkpoint,
    map_tensors,
    readable,
    rng_state,
    run_folder,
    save_checkpoint,
    set_rng_state,
    versions,
    write_results,
)
from common.datasets import d4rl_name
from common.envs import WORLDS, is_batch, prepare_workers, world_flags, world_module
from common.evaluation import assured, score
from common.flags import (
    FIXED,
    FREE,
    KEPT,
    LIMITS,
    Layers,
    NonNegative,
    NonNegativeInt,
    Only,
    PositiveInt,
    Unless,
    marks,
)
from common.memory import available_memory

# --- flags


@dataclass
class RunArgs:
    """The flags of every script."""

    seed: int = 1
    """fixes environments, initial weights, sampling and minibatch order"""
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    """where the networks are"""
    checkpoint: str | None = None
    """start from these weights: a file, or a run's folder"""
    resume: Annotated[str | None, FREE] = None
    """continue this run (its folder) exactly where its last checkpoint stands, with its own arguments"""
    evaluate: bool = False
    """no training: evaluate --checkpoint and write results.json"""
    capture_video: Annotated[bool, FREE] = False
    """write annotated videos of the first evaluation episodes"""
    track: Annotated[bool, FREE] = False
    """log to Weights & Biases beside TensorBoard"""
    output_dir: str = "runs"
    """where run folders are made"""
    run_name: str | None = None
    """the run folder's name; default <env or dataset>__<script>__<seed>__<time>"""

    def check(self):
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be in [0, 2**63), not {self.seed}.")
        name = self.run_name and Path(self.run_name)
        if name and (name.is_absolute() or ".." in name.parts or not name.parts):
            raise UserError(f"--run-name {self.run_name!r} leads out of --output-dir; give a plain name.")
        if self.track and not importlib.util.find_spec("wandb"):
            raise UserError("--track needs Weights & Biases; pip install wandb, or drop --track.")


@dataclass
class VLAArgs(RunArgs):
    """And of those that train a vision-language-action policy."""

    env: Annotated[str, KEPT, tyro.conf.arg(help=f"the world: {', '.join(WORLDS)}, or a Gymnasium id with "
        "vector observations; its own flags stand below")] = "tabletop"  # fmt: skip
    backbone: Annotated[str, FIXED, tyro.conf.arg(help=f"the model: {', '.join(BACKBONES)}, or a published "
        "checkpoint's folder or hub id; its own flags stand below")] = "tiny"  # fmt: skip
    chunk: Annotated[PositiveInt, FIXED] = 4
    """K, actions a decision, executed open loop"""
    action_history: Annotated[NonNegativeInt, FIXED] = 0
    """the last n executed actions as an input"""
    num_workers: Annotated[int | None, FREE] = None
    """processes that hold the environments; default one a core, 0 for none"""
    worker_timeout: Annotated[NonNegative, FREE, Unless("num_workers", 0)] = 600.0
    """seconds after which such a process that does not answer is killed and restarted; 0 for never"""
    eval_envs: PositiveInt = 100
    """parallel environments of an evaluation"""
    eval_episodes: PositiveInt = 200
    """episodes of an evaluation, from initial states that training never shows"""
    deterministic: bool = True
    """evaluate greedily; --no-deterministic samples at the training temperature, as --collect does by
    default"""
    collect: NonNegativeInt = 0
    """no training: play so many episodes of training's layouts with --checkpoint, for --save-dataset"""
    save_dataset: str | None = None
    """the file for the episodes of --collect, in LIBERO's layout; bc_warmup.py --demos reads it"""
    eval_freq: NonNegativeInt = 50
    """iterations between evaluations; 0 for the first and the last only"""
    save_freq: PositiveInt = 10
    """iterations between checkpoints"""

    def defaults(self):
        return {"deterministic": False} if self.collect else {}

    def check(self):
        check_eval_episodes(self.eval_episodes)
        if not self.checkpoint and model_module(self.backbone).FROM_SCRATCH:
            if self.evaluate:
                raise UserError("--evaluate needs --checkpoint, the weights to evaluate.")
            if self.collect:
                raise UserError("--collect needs --checkpoint, the weights that play.")
        if bool(self.collect) != (self.save_dataset is not None):
            raise UserError("--collect, a number of episodes, and --save-dataset, a file, need each other.")
        if self.collect and self.evaluate:
            raise UserError("--collect plays training's layouts, --evaluate others; give one of them.")


@dataclass
class StateArgs(RunArgs):
    """And of those that learn from states alone."""

    chunk: ClassVar[int] = 1  # what `make_envs` asks of every run's arguments
    num_workers: ClassVar[int] = 0
    worker_timeout: ClassVar[float] = 0.0
    action_history: ClassVar[int] = 0
    keys: ClassVar[tuple[str, ...]] = ()  # of the data's observations, where a world has a flag for them
    compile: bool = False
    """torch.compile the update; with CUDA graphs on a GPU"""
    bf16: bool = False
    """the networks in bfloat16, but for their last layers; the weights stay float32"""
    eval_episodes: NonNegativeInt = 10
    """episodes of an evaluation, of the mean action, each with a seed of its own; 0 for no evaluation"""
    eval_freq: NonNegativeInt = 5_000
    """updates between evaluations; 0 for the first and the last only"""
    eval_envs: PositiveInt = 100
    """parallel environments of an evaluation"""
    save_freq: PositiveInt = 50_000
    """updates between checkpoints"""

    def check(self):
        check_eval_episodes(self.eval_episodes)
        if self.evaluate and not self.checkpoint:
            raise UserError("--evaluate needs --checkpoint, the weights to evaluate.")
        if self.evaluate and not self.eval_episodes:
            raise UserError("--evaluate needs --eval-episodes above 0.")


@dataclass
class OfflineArgs(StateArgs):
    """And of those that learn from a data set."""

    dataset: Annotated[str, KEPT] = "hopper-medium-v2"
    """D4RL's or OGBench's name, a file in D4RL's or RoboMimic's layout, or a Minari id"""
    env: Annotated[str | None, KEPT] = None
    """the Gymnasium id, or world, to evaluate in; default the data set's"""
    features: Annotated[str | None, FIXED] = None
    """learn from pictures: the data set's, encoded by the frozen backbone of this run or checkpoint, whose
    chunk is then an action"""
    features_of: Annotated[Literal["prompt", "actions"], FIXED, Only("features")] = "prompt"
    """what the features are: what a critic reads, or the hidden states of all action slots, which are many
    numbers, but which imitation has trained"""
    features_dim: Annotated[NonNegativeInt, FIXED, Only("features")] = 0
    """of the features take so many principal components, as the data set has them, in one common unit (see
    --no-normalize): critics learn by heart what has many numbers; 0 for the features themselves"""
    total_timesteps: PositiveInt = 1_000_000
    """updates to train for"""


def flag(name):
    return "--" + name.replace("_", "-")


def fits(value, hint):
    """Whether a checkpoint's value is one of a flag's annotation."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(fits(x, parts[0]) for x in value)
    if parts:  # of a union
        return any(fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)


def check_choices(Args, values, source):
    """UserError for a value of a checkpoint that this script's flag does not know."""
    for name, hint in get_type_hints(Args).items():
        if name not in values or fits(values[name], hint):
            continue
        what = " ".join(str(values[name]).split())[:50]
        known = [getattr(x, "__name__", str(x)) for x in get_args(hint) or [hint] if x is not ...]
        known = ", ".join(known)
        raise UserError(f"{source} has {flag(name)} {what}, which is unknown here; known: {known}.")


def check_values(args, given):
    """UserError in one sentence for the first value that cannot work. given: names of the flags that the
    command line has."""
    for name, said in marks(type(args)).items():
        value = getattr(args, name)
        if value == () and name in given:
            raise UserError(f"{flag(name)} is empty; give it a value or drop it.")
        for number in value if isinstance(value, tuple) else (value,):
            if number == "":
                raise UserError(f"{flag(name)} is empty; give it a value or drop it.")
            if type(number) is int and name != "seed" and abs(number) >= 2**63:
                raise UserError(f"{flag(name)} must be below 2**63, not {number}.")
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{flag(name)} must be a finite number, not {number}.")
        for mark in said:
            want, fits = LIMITS.get(mark, (None, None)) if isinstance(mark, str) else (None, None)
            if want and value is not None and not fits(value):
                raise UserError(f"{flag(name)} must {want}, not {value}.")
            if isinstance(mark, Only) and name in given and mark.forbids(getattr(args, mark.flag)):
                other = f"{flag(mark.flag)} {' or '.join(map(str, mark.values))}".rstrip()
                raise UserError(f"{flag(name)} does nothing without {other}; drop it.")
            if isinstance(mark, Unless) and name in given and mark.forbids(found := getattr(args, mark.flag)):
                raise UserError(f"{flag(name)} does nothing with {flag(mark.flag)} {found}; drop it.")
            if isinstance(mark, Layers):
                # of a number, its gradient and Adam's two moments; and what a layer has beside its numbers
                width, free = getattr(args, mark.width), available_memory()
                if (needs := value * (16 * width**2 + 10_000)) > free:
                    raise UserError(
                        f"{flag(name)} {value} with {flag(mark.width)} {width} needs {needs / 1e9:.0f} GB, "
                        f"and there are {free / 1e9:.0f} GB; give smaller numbers."
                    )
    for part in type(args).__mro__:
        if "check" in vars(part):
            part.check(args)
    idle = {"worker_timeout"} | ({"num_workers"} if not hasattr(args, "num_demos") else set())  # an expert's
    if given & idle and is_batch(args):
        name = flag((given & idle).pop())
        raise UserError(f"{name} does nothing where all environments are stepped as one batch; drop it.")


def read_source(words, Args, script):
    """What has to be known before all flags are: -> the command line's --env, --backbone, --dataset,
    --checkpoint and --resume (each a text or None), and what the latter two hold (or None)."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--evaluate", action="store_true")
    for name in ("env", "backbone", "dataset", "checkpoint", "resume", "collect"):
        peek.add_argument(f"--{name}", nargs="?")
    seen, vla = peek.parse_known_args(words)[0], hasattr(Args, "backbone")
    seen.evaluate |= vla and seen.collect is not None  # neither trains: the same flags are the checkpoint's
    if vla and seen.checkpoint and (Path(seen.checkpoint) / "config.json").is_file():
        # not a run's folder, but one that --backbone takes
        seen.backbone, seen.checkpoint = seen.checkpoint, None
    source = seen.resume or seen.checkpoint
    if not source:
        return seen, None
    saved = load_checkpoint(source)
    adopt = getattr(model_module(seen.backbone), "from_states", None) if vla and seen.backbone else None
    if adopt and "backbone" not in saved and not seen.resume:
        with readable(source):
            learned = SimpleNamespace(**saved["args"])
            saved = adopt(saved)
            if learned.env:
                saved["args"] |= world_flags(learned) | {"env": learned.env}
    if ("backbone" in saved) != vla:
        raise UserError(
            f"{source} was written by {saved['script']}.py, whose networks are none of {script}.py's."
        )
    if seen.resume and saved["script"] != script:
        raise UserError(f"{source} was written by {saved['script']}.py; resume it with that script.")
    if seen.resume and "processes" not in saved:
        raise UserError(f"{source} holds weights alone; use --checkpoint, or resume the run's folder.")
    return seen, saved


def compose(Args, presets, seen, before):
    """The script's flags with those of the world and of the model that `seen`, or the arguments `before` of a
    checkpoint, name. -> the dataclass, the world's part of it or None, and what differs from the defaults: of
    `presets` those apply, in their order, whose key is the world, the Gymnasium id, a word of the data set's
    name or its start up to a hyphen, or the model's family."""
    own = before if seen.resume or seen.evaluate else {}  # an evaluation is in the run's world, unless told
    env = (seen.resume and before.get("env")) or seen.env or own.get("env") or getattr(Args, "env", None)
    keys = [env, env if env in WORLDS else "gymnasium"]
    world = world_module(env).Args if env else None
    parts = [world] if world else []
    if hasattr(Args, "dataset"):
        dataset = (seen.resume and before["dataset"]) or seen.dataset or own.get("dataset") or Args.dataset
        name = d4rl_name(dataset).lower()
        keys += re.split(r"[^a-z0-9]+", name)
        name = name.rpartition("/")[2]
        keys += [name[: hyphen.start()] for hyphen in re.finditer("-", name)]
    preset = {key: value for name in presets if name in keys for key, value in presets[name].items()}
    if hasattr(Args, "backbone"):
        backbone = before.get("backbone") or seen.backbone or preset.get("backbone", Args.backbone)
        preset |= presets.get(family_of(backbone), {}) | {"backbone": backbone}
        parts = [model_module(backbone).Args, *parts]
    if env:
        preset["env"] = env
    taken = [f.name for part in (*parts, Args) for f in dataclasses.fields(part)]
    if twice := {name for name in taken if taken.count(name) > 1}:
        where = " and ".join(part.__module__ for part in (*parts, Args))
        raise UserError(f"Two of {where} have a flag {flag(twice.pop())}; rename it in one.")
    if parts:
        Args = dataclasses.make_dataclass(Args.__name__, [], bases=(*parts, Args))
    return Args, world, preset


def read_flags(words, Args, presets, script):
    """The command line's `words` -> arguments, and what --checkpoint or --resume holds (or None).

    A value is the command line's, else what a checkpoint fixes, else what follows from other flags
    (`defaults(self)` of the world's dataclass or the script's), else the preset's, else the default. Raises
    UserError and CheckpointError.
    """
    seen, saved = read_source(words, Args, script)
    source = seen.resume or seen.checkpoint
    with readable(source):
        before = dict(saved["args"]) if saved else {}
        Args, world, preset = compose(Args, presets, seen, before)
    said, prog = marks(Args), f"{script}.py"
    if "env" in preset:
        prog += f" --env {preset['env']}"
    given = {
        word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in words if word[:2] == "--"
    }
    if seen.resume:
        if other := before.keys() ^ said.keys():
            raise UserError(
                f"{source} is of another version of this script, which differs in "
                f"{', '.join(sorted(other))}; resume it with that version, or use --checkpoint instead."
            )
        check_choices(Args, before, source)
        args = tyro.cli(Args, args=words, default=Args(**before), prog=prog)
        if clash := [flag(n) for n in said if FREE not in said[n] and getattr(args, n) != before[n]]:
            raise UserError(
                f"--resume goes on with the run's own arguments; drop {', '.join(clash)}, or use "
                "--checkpoint instead."
            )
    else:
        keep = {name for name in said if FIXED in said[name] or (seen.evaluate and KEPT in said[name])}
        if seen.evaluate and world and preset["env"] == before.get("env"):
            keep |= {field.name for field in dataclasses.fields(world)}
        kept = {name: before[name] for name in keep if name in before} | {"env": preset.get("env")}
        kept = {name: value for name, value in kept.items() if name in said}
        check_choices(Args, kept, source)
        default = dataclasses.replace(Args(), **preset | kept)
        if hasattr(Args, "defaults"):
            quiet = [word for word in words if word not in ("-h", "--help")]
            chosen = tyro.cli(Args, args=quiet, default=default, prog=prog)
            for part in reversed(Args.__mro__):
                if "defaults" in vars(part):
                    own = {name: x for name, x in part.defaults(chosen).items() if name not in kept}
                    default = dataclasses.replace(default, **own)
        args = tyro.cli(Args, args=words, default=default, prog=prog)
        if seen.backbone and not seen.checkpoint:
            args.backbone, args.checkpoint = seen.backbone, None
        for name in kept:
            if FIXED in said[name] and getattr(args, name) != before[name]:
                raise UserError(
                    f"{flag(name)} {getattr(args, name)} is not what the checkpoint has: {before[name]} is "
                    "part of it; drop the flag."
                )
    check_values(args, given)
    return args, saved


def reserve(batch, columns):
    """-> `columns`, {name: tensor} of decisions. UserError where the backbone's `batch` has such a name."""
    if both := batch.keys() & columns.keys():
        raise UserError(
            f"The backbone's preprocess gives {', '.join(both)}, which is a script's own; rename it."
        )
    return columns


def check_decisions(decisions, columns, size=None):
    """ValueError, or what a wrong type raises, unless a checkpoint's `decisions` are dicts of tensors that
    can be stacked, with these columns among them, and of `size` rows each."""
    kinds = [{name: (x.shape, x.dtype) for name, x in each.items()} for each in decisions]
    for kind in kinds:
        if kind != kinds[0] or not kind.keys() >= set(columns):
            raise ValueError("decisions that do not fit each other")
        if size is not None and any(shape[:1] != (size,) for shape, _ in kind.values()):
            raise ValueError(f"decisions that are not of {size} environments")


def check_eval_episodes(number):
    """UserError where memory does not hold the results of so many, in turns or not."""
    if number * 100 > (free := available_memory()):  # bytes, the least that is kept of one
        raise UserError(f"--eval-episodes {number} do not fit into {free / 1e9:.0f} GB; give fewer of them.")


def check_episodes(episodes):
    """ValueError, or what a wrong type raises, unless a checkpoint's `episodes` are what
    `finished_episodes` gives."""
    if len(episodes) and np.asarray(episodes, float).shape != (len(episodes), 4):
        raise ValueError("episodes that are none")


def mean_metrics(updates):
    """The means over a list of {name: () tensor}, one of an update."""
    return {name: torch.stack([each[name] for each in updates]).mean() for name in (updates or [{}])[0]}


def too_large(error):
    """Whether an exception says that memory cannot hold what was asked for."""
    signs = ("allocate memory", "calculation overflowed", "multiplication overflow", "too big")
    return isinstance(error, (MemoryError, OverflowError)) or (
        isinstance(error, (RuntimeError, ValueError, OSError)) and any(sign in str(error) for sign in signs)
    )


def main(train, Args, presets, parallel=False):
    """The command line of a script: `train(args, run)` with what the flags say. parallel: torchrun may start
    it. Wrong input ends in one sentence on stderr and exit code 2."""
    script = Path(inspect.getfile(train))
    try:
        args, saved = read_flags(sys.argv[1:], Args, presets, script.stem)
        if isinstance(args, VLAArgs) and args.num_workers != 0 and not is_batch(args):
            prepare_workers(args.env)  # gets ready while the model does
        with Run(args, saved, script, parallel) as run:
            train(args, run)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(".")[0]
        print(f"error: {reason}; see --help for smaller batches; checkpoints are intact.", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not too_large(error):
            raise
        reason = str(error).strip().partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
        reason = reason.rstrip(".") or "out of memory"
        print(f"error: this machine cannot hold it ({reason}); give smaller numbers.", file=sys.stderr)
        sys.exit(2)


# --- the handle


class Run:
    """See the module. Attributes: args, device, rank and processes (of torchrun; 0 and 1 without), saved,
    folder, videos (where they go, or None), initial, best and offline (evaluations; the script sets the last
    where its offline part ends, if an online one follows), laps (seconds by name)."""

    def __init__(self, args, saved, script, parallel=False):
        self.args, self.saved, self.script = args, saved, script
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not parallel:
            raise UserError(f"{script.name} trains in one process; start it with python instead of torchrun.")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch finds no CUDA GPU here; use --device cpu.")
        if args.run_name and not args.resume:
            check_free(Path(args.output_dir, args.run_name))  # now, and not after the weights are loaded
        device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        self._stack = contextlib.ExitStack()
        self._stack.callback(distributed.stop)
        self.device = distributed.start(torch.device(device))
        self.rank, self.processes = distributed.ranks()
        has = torch.cpu.get_capabilities() if device == "cpu" and getattr(args, "bf16", False) else {}
        if has and not any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):  # "bf16" is ARM's
            say(
                "warning: this CPU has no products in bfloat16, and --bf16 can take many times as long as "
                "float32; drop it.",
                sys.stderr,
            )
        torch.manual_seed(args.seed)
        if isinstance(args, StateArgs):
            keep_freed_memory()
        self.initial = self.best = self.latest = self.offline = self.videos = self._writer = self._bar = None
        self._warned = self._made = False
        self._generators, self._signals, self.laps, self._before = {}, [], {}, 0.0
        self.kept = {}  # what each checkpoint of this run holds beside the script's state
        self._log_lost = False
        self._start = self._tick = time.perf_counter()
        self.source, self._restoring = args.resume or args.checkpoint, False
        if args.resume:
            self._read = self._stamp()
            with readable(self.source):
                self._before, self.initial, self.best = saved["seconds"], saved["initial"], saved["best"]
                self.offline = saved.get("offline")
                for evaluation in (self.initial, self.best, self.offline or self.best):
                    math.isfinite(self._before + score(evaluation) + evaluation["episodes"])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._stack.close()
        if error and self._made and os.listdir(self.folder) == ["args.json"]:  # it did not get to anything
            (self.folder / "args.json").unlink()
            self.folder.rmdir()
        if self._restoring and error:  # the script's own lines that put a checkpoint's content in its place
            with readable(self.source):
                raise error

    def closing(self, resource):
        """-> `resource`, which is closed when the run ends."""
        self._stack.callback(resource.close)
        return resource

    def seconds(self):
        """Since the start, of all parts of a resumed run."""
        return self._before + time.perf_counter() - self._start

    def _stamp(self):
        path = Path(self.args.resume)
        found = (path / "checkpoint.pt" if path.is_dir() else path).stat()
        return found.st_ino, found.st_mtime_ns

    def _claim(self, name):
        if name:
            there = os.path.lexists(self.folder)
            run_folder(self.args.output_dir, name)
            self._made = not there
        self.closing(claim(self.folder, dataclasses.asdict(self.args), new=bool(name)))
        if not name and self._stamp() != self._read:
            raise CheckpointError(f"{self.folder} was still being written by its run; resume it once more.")

    def open(self):
        """Make the run's folder, or go on in it, and lock it. CheckpointError if it cannot be written, is
        taken, or another run is in it."""
        args, name, refused = self.args, None, None
        if args.resume:
            path = Path(args.resume)
            self.folder = path if path.is_dir() else path.parent
        else:
            what = Path(args.dataset).stem if hasattr(args, "dataset") else args.env
            name = args.run_name or f"{what}__{self.script.stem}__{args.seed}__{int(time.time())}"
            name = distributed.all_gather(name)[0]
            self.folder = Path(args.output_dir) / name
        if self.rank == 0:
            try:
                self._claim(name)
            except CheckpointError as error:
                refused = error
        if distributed.all_gather(refused is not None)[0]:  # all end, and the first process says why
            raise refused or SystemExit(2)
        self.videos = self.folder / "videos" if args.capture_video and self.rank == 0 else None

    def generator(self, name, device="cpu"):
        """A torch.Generator of this process, seeded by --seed, that checkpoints hold under `name`."""
        seed = self.args.seed + self.rank
        self._generators[name] = torch.Generator(device).manual_seed(seed)
        return self._generators[name]

    # --- checkpoints

    def save(self, name, state, own=None):
        """Write `state` as the folder's `name`: the first process's, and with `own`, each process's, all that
        `restore` needs: generators, evaluations and clock too."""
        if own is not None:
            # clones: of a view, all of its tensor would be written
            own = map_tensors(lambda x: x.cpu().clone(), own)
            own = distributed.gather({"state": own, "rng": rng_state(self._generators, {})})
            state = state | dict(
                processes=own, initial=self.initial, best=self.best, seconds=self.seconds()
            ) | ({"offline": self.offline} if self.offline else {})  # fmt: skip
        state = map_tensors(distributed.collect, state)
        if self.rank == 0:
            state = {"args": dataclasses.asdict(self.args)} | self.kept | state
            save_checkpoint(self.folder / name, script=self.script.stem, state=state)
            if self._log_lost and not self._writer:  # a disk that takes a checkpoint takes a log
                self._open_log()
        self._tick = time.perf_counter()

    def load(self, agent):
        """Put the weights of the checkpoint, if there is one, into `agent`, and it on the device. UserError
        where they do not fit. (Of a vision-language-action policy: `common.backbones.load_weights`.)"""
        if self.saved:
            with readable(self.source):
                weights = dict(self.saved["agent"])
                check_kinds(weights, agent.state_dict())
            try:
                agent.load_state_dict(weights)
            except RuntimeError as error:
                reason = " ".join(str(error).splitlines()[1:2]).strip()
                raise UserError(f"The checkpoint's weights do not fit this run: {reason}") from error
        agent.to(self.device)

    def restore(self):
        """--resume: `state` and this process's `own` as one dict, after setting the generators back. Else
        None. UserError if another number of processes wrote it. What fails from here to `begin` does so for
        the checkpoint's content, and is told so."""
        if not self.args.resume:
            return None
        self._restoring = True
        saved, self.saved = self.saved, None
        if (before := len(saved["processes"])) != self.processes:
            raise UserError(
                f"{self.args.resume} ran as {before} processes, not {self.processes}; resume it so."
            )
        own = saved.pop("processes")[self.rank]
        set_rng_state(own["rng"], self._generators, {})
        if "envs" in own["state"]:  # arrays again, as the worlds gave them
            own["state"]["envs"] = map_tensors(lambda x: x.numpy(), own["state"]["envs"])
        saved |= own["state"]
        counters = saved.get("counters", [saved.get("step")])
        if not all(type(count) is int and count >= 0 for count in counters):
            raise ValueError("counters that are none")
        check_episodes(saved.get("recent", []))
        return saved

    # --- while it trains

    def begin(self, step, total, unit):
        """Training goes from `step` to `total` (`unit`s): opens the log and the progress bar. From here on a
        signal asks for an orderly end, and a second one ends at once."""
        self._restoring = False
        self.total, self.unit, self._logged = total, unit, step
        if self.rank == 0:
            if self.args.track:
                import wandb  # an optional package

                config = dataclasses.asdict(self.args)
                wandb.init(project="vla-rl", name=self.folder.name, config=config, sync_tensorboard=True)
            # What a killed run logged after its last checkpoint is logged again.
            self._open_log(step + 1 if self.args.resume else None)
            self._stack.callback(self._close_log)
        self._bar = self.closing(
            tqdm(total=total, initial=step, unit=unit, smoothing=0.1, disable=self.rank > 0 or None)
        )

        def note(number, _):
            self._signals.append(number)
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            self._stack.callback(signal.signal, number, signal.signal(number, note))
        self._tick = time.perf_counter()

    def due(self, count, *freqs):
        """Is it time for what comes every `freq` counts, for one of `freqs`? Never for freq 0."""
        return any(freq and count % freq == 0 for freq in freqs)

    def advance(self, step):
        """Move the progress bar, between two logs."""
        self._bar.update(step - self._bar.n)

    def lap(self, name):
        """The time since the last lap (or log, or checkpoint) went into `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._tick
        self._tick = now

    def log(self, scalars, step):
        """Write numbers (or 0-d tensors) at `step`, with the speed and the shares of the laps since the last
        time, and move the progress bar."""
        self.lap("rest")
        spent = sum(self.laps.values())
        scalars = {name: x.item() if hasattr(x, "item") else float(x) for name, x in scalars.items()}
        scalars[f"time/{self.unit}s_per_second"] = (step - self._logged) / spent
        scalars |= {f"time/{name}_share": x / spent for name, x in self.laps.items() if name != "rest"}
        if self.device.type == "cuda":
            scalars["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.write(scalars, step)
        if scalars.get("policy/first_ratio_error", 0.0) > 0.05 and not self._warned and self.rank == 0:
            self._warned = True
            say(
                f"warning: policy/first_ratio_error is {scalars['policy/first_ratio_error']:.3g}: the policy "
                "that is trained is not the one that acted; see --recompute-logprobs."
            )
        shown = ("rollout/success_rate", "rollout/mean_reward", "loss/policy")
        if name := next((name for name in shown if name in scalars), None):
            self._bar.set_postfix_str(f"{name.partition('/')[2]} {scalars[name]:.2f}")
        self.advance(step)
        self._logged, self.laps, self._tick = step, {}, time.perf_counter()

    def write(self, scalars, step):
        """Numbers by name into the log, and no more. A full disk costs the log and not the run."""
        writer = self._writer  # which its thread's end may take away
        try:
            for name, value in scalars.items() if writer else ():
                writer.add_scalar(name, value, step)
        except OSError as error:
            self._lose_log(error)

    def _open_log(self, purge_step=None):
        def hook(said):  # of TensorBoard's thread, whose error would be shown with its traceback
            if not isinstance(said.exc_value, OSError):
                return threading.__excepthook__(said)
            self._lose_log(said.exc_value)

        threading.excepthook = hook
        try:
            self._writer = SummaryWriter(self.folder, purge_step=purge_step)
        except OSError as error:
            self._lose_log(error)

    def _close_log(self):
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.close()

    def _lose_log(self, error):
        self._writer = None
        if not self._log_lost:
            say(f"warning: the log cannot be written ({error}); the run goes on.", sys.stderr)
        self._log_lost = True

    def record(self, evaluation, step):
        """Log an evaluation -> whether it is the best so far, so that its weights are worth keeping."""
        names = ("success_rate", "mean_reward", "mean_length", "normalized_score")
        self.write({f"eval/{name}": evaluation[name] for name in names if name in evaluation}, step)
        if self.initial is not None and step < self.total and self.rank == 0:
            say(f"{step} {self.unit}s, {self.seconds():.0f} s: eval {score(evaluation):.3f}")
        first = self.initial is None
        self.latest, self.initial = evaluation, evaluation if first else self.initial
        # the latest of all where nothing is evaluated
        better = first or not evaluation["episodes"] or assured(evaluation) > assured(self.best)
        self.best = evaluation if better else self.best
        self._tick = time.perf_counter()
        return better

    def check_finite(self, metrics, when, **data):
        """UserError that shows the metrics ({name: () tensor}) and the range of `data` unless all are
        finite."""
        if torch.stack([x.detach().float().mean() for x in metrics.values()]).isfinite().all():
            return
        shown = ", ".join(f"{name} {x.float().mean().item():.3g}" for name, x in metrics.items())
        ranges = "".join(f", {name} {x.min().item():.3g} to {x.max().item():.3g}" for name, x in data.items())
        raise UserError(
            f"{when}: a number is not finite ({shown}{ranges}); "
            f"{self.folder / 'checkpoint.pt'} is the last good state, and a lower --learning-rate may help."
        )

    @property
    def signalled(self):
        """Did a signal ask this process to stop?"""
        return bool(self._signals)

    def stopping(self):
        """As `signalled`, of any process: torchrun's stop together."""
        self._signals = sum(distributed.all_gather(list(self._signals)), [])
        return bool(self._signals)

    def stopped(self, step):
        """The end of a run that a signal stopped, once its checkpoint is written."""
        self._bar.close()
        if self.rank == 0:
            start = "python" if self.processes == 1 else f"torchrun --nproc-per-node {self.processes}"
            script = sys.argv[0] if Path(sys.argv[0]).name == self.script.name else self.script.name
            command = f"{start} {shlex.quote(script)} --resume {shlex.quote(str(self.folder))}"
            say(f"stopped at {step} {self.unit}s; go on with: {command}")
        sys.exit(128 + self._signals[0])

    # --- results

    def _write(self, results):
        self._results = results
        write_results(
            self.folder / "results.json",
            results | {"args": dataclasses.asdict(self.args), "versions": versions(), "hardware": hardware()},
        )

    def evaluated(self, final):
        """The result of --evaluate."""
        if self.rank == 0:
            self._write({"final": final})
            what = self.args.checkpoint or getattr(self.args, "backbone", "")
            say(f"evaluated {what}: {score(final):.3f} ({self.folder / 'results.json'})")

    def merged(self, folder, evaluation):
        """The result of --merge-and-save, beside the run's own: the same evaluation of what it wrote."""
        if self.rank == 0:
            self._write(self._results | {"merged": evaluation})
            before, after = score(self._results["final"]), score(evaluation)
            say(f"merged into {folder}: {before:.3f} before, {after:.3f} as read from there")

    def collected(self, evaluation):
        """The result of --collect: of the episodes that were written."""
        self._bar.close()
        self._write({"collected": evaluation})
        what = f"{evaluation['episodes']} episodes written to {self.args.save_dataset}"
        say(f"{what}: {score(evaluation):.3f} ({self.folder / 'results.json'})")
        if self._signals:
            sys.exit(128 + self._signals[0])

    def finish(self, environment_steps, gradient_steps):
        """The result of a training, whose final evaluation was recorded."""
        self._bar.close()
        if self.rank == 0:
            found = dict(initial=self.initial, final=self.latest, best=self.best)
            found |= {"offline": self.offline} if self.offline else {}
            counts = dict(environment_steps=environment_steps, gradient_steps=gradient_steps)
            self._write(found | counts | {"wall_seconds": self.seconds()})
            what = "success" if "success_rate" in self.latest else "return"
            before, after, minutes = score(self.initial), score(self.latest), self.seconds() / 60
            between = f" -> {score(self.offline):.3f} offline" if self.offline else ""
            told = f"{what} {before:.3f}{between} -> {after:.3f}"
            told = told if self.latest["episodes"] else "learned, not evaluated,"
            say(f"{told} in {minutes:.1f} minutes ({self.folder})")


def keep_freed_memory():
    """Has glibc keep large freed blocks, which it gives back by default: an update on a CPU is 15% faster."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
