"""Files of a run that survive a killed process or a full disk, and the random state for an exact resume."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import pickle
import platform
import random
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from common import UserError
from common.memory import available_cores

FORMAT, VERSION = "vla-rl", 2
FINITE = ("agent", "optimizer", "optimizers", "reference", "replay")  # one NaN there is in every weight soon


class CheckpointError(RuntimeError):
    """A file of the run cannot be written or read; the message is one sentence: which, why, what to do."""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # alive, but somebody else's
        return True
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, moved over `path` once the body has written it (POSIX).

    A reader sees the old file or the whole new one, also after a kill or a power cut. Missing folders are
    made; on failure the temporary file goes and `path` stays. An OSError, or what torch.save and safetensors
    make of it, becomes a CheckpointError.
    """
    path = Path(path)
    # the suffix stays: ffmpeg picks the format by it
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe would be gone for good
            raise FileExistsError(errno.EEXIST, "it is there, and no file")
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.iterdir():  # of a predecessor that was killed while it wrote
            pid, _, name = stale.name[1:].partition(".")
            if stale.name[0] == "." and name == path.name and pid.isdecimal() and not _alive(int(pid)):
                stale.unlink(missing_ok=True)
        yield temporary
        _fsync(temporary)  # first the bytes, then the name that points at them
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save wraps it
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = str(cause).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be written ({reason}) and is as it was; free some space or choose another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _plain(value, name: str):
    """Only what `torch.load(weights_only=True)` reads: arrays become tensors."""
    if isinstance(value, dict):
        return {key: _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, complex, str, bytes)):
        return value
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; store tensors, numbers or text."
    )


@contextlib.contextmanager
def readable(path):
    """One CheckpointError about `path` for whatever goes wrong while its content is put to use: what is
    missing, of another type or of another shape fails in many ways. Sentences of the project's own pass,
    and all errors where there is no `path`."""
    try:
        yield
    except (UserError, CheckpointError, torch.OutOfMemoryError):
        raise
    except (
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    ) as error:  # fmt: skip
        if not path:
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".") or "no reason given"
        raise CheckpointError(
            f"{path} is damaged or of another version ({type(error).__name__}: {reason}); give another "
            "checkpoint."
        ) from error


def check_kinds(weights, own):
    """UserError where a checkpoint's `weights` are numbers of another kind than the module's `own`: to load
    them would round them or drop what is imaginary."""
    for name in weights.keys() & own.keys():
        kinds = [(x.is_floating_point(), x.is_complex()) for x in (weights[name], own[name])]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"The checkpoint's {name} is of {weights[name].dtype} instead of {own[name].dtype}; give "
                "another checkpoint."
            )


def save_checkpoint(path: str | os.PathLike, script: str, state: dict) -> None:
    """Write `state` atomically, so that `load_checkpoint` gives it back bit for bit.

    `script` names the writer. `state` nests dicts, lists and tuples of tensors, numbers, text and numpy
    values; arrays come back as tensors, numpy scalars as Python numbers. CheckpointError if a value is of
    another type or the disk refuses; the old checkpoint is then intact.
    """
    content = {**_plain(state, "state"), "format": FORMAT, "script": script, "version": VERSION}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load_checkpoint(path: str | os.PathLike, device="cpu") -> dict:
    """Read what `save_checkpoint` wrote, without ever unpickling code.

    Returns the state with `format`, `script` and `version` beside its keys, tensors on `device`. `path` may
    be a run's folder, then its `checkpoint.pt`. CheckpointError if the file is missing, truncated, damaged by
    as much as a bit, holds code or numbers that are not finite, or was written by something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a run's folder or a checkpoint file.")
    try:
        is_zip = zipfile.is_zipfile(path)  # a zip's directory is at its end, so that a truncated one is none
        if is_zip:
            with zipfile.ZipFile(path) as file:  # torch does not compare the sums
                if damaged := file.testzip():
                    raise zipfile.BadZipFile(f"the sum of {damaged} is wrong")
        content = torch.load(path, map_location=device, weights_only=True) if is_zip else None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects besides tensors, and is not loaded since that can run code; give a "
            "checkpoint of this project."
        ) from error
    except Exception as error:  # torch raises many types here, with messages of many lines
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be loaded to {device} ({reason}); give another checkpoint."
        ) from error
    if not is_zip:
        raise CheckpointError(f"{path} is truncated or no checkpoint; give another one.")
    if not isinstance(content, dict) or content.get("format") != FORMAT or "script" not in content:
        raise CheckpointError(
            f"{path} was not written by this project; give a checkpoint.pt or best.pt of a run."
        )
    if content.get("version") != VERSION:
        found = content.get("version")
        raise CheckpointError(f"{path} has version {found}, not {VERSION}; use the code that wrote it.")

    def check(tensor):
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} holds numbers that are not finite; give an earlier checkpoint.")

    map_tensors(check, [content.get(name) for name in FINITE])
    return content


def rng_state(
    generators: dict[str, torch.Generator], numpy_generators: dict[str, np.random.Generator]
) -> dict:
    """States of the named generators and the global ones: Python's, numpy's, torch's on the CPU and each GPU.

    numpy's states are JSON text, since PCG64 has integers of 128 bits.
    """
    return {
        "torch": {name: generator.get_state() for name, generator in generators.items()},
        "numpy": {name: _dump(generator.bit_generator.state) for name, generator in numpy_generators.items()},
        "global_python": random.getstate(),
        "global_numpy": _dump(np.random.get_state(legacy=False)),
        "global_torch": torch.get_rng_state(),
        "global_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(
    state: dict, generators: dict[str, torch.Generator], numpy_generators: dict[str, np.random.Generator]
) -> None:
    """Put the generators, in place, and the global ones back to where `rng_state` found them, bit for bit.

    Global GPU states are set for the GPUs that are there. CheckpointError if names or devices differ.
    """
    for kind, named in (("torch", generators), ("numpy", numpy_generators)):
        if state[kind].keys() != named.keys():
            raise CheckpointError(
                f"The checkpoint has {kind} generators {sorted(state[kind])} and this run {sorted(named)}; "
                "resume with the code and arguments that wrote it."
            )
    for name, generator in generators.items():
        try:
            # states are CPU bytes, wherever the checkpoint was mapped
            generator.set_state(state["torch"][name].cpu())
        except RuntimeError as error:
            raise CheckpointError(
                f"Generator {name} was not saved on {generator.device}; resume with the same --device."
            ) from error
    for name, generator in numpy_generators.items():
        generator.bit_generator.state = json.loads(state["numpy"][name])
    random.setstate(state["global_python"])
    np.random.set_state(json.loads(state["global_numpy"]))
    torch.set_rng_state(state["global_torch"].cpu())
    for index, cuda_state in enumerate(state["global_cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), index)


def map_tensors(function, value):
    """`function` of every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return [map_tensors(function, item) for item in value] if isinstance(value, list) else value


def _dump(value) -> str:
    return json.dumps(value, default=lambda item: item.tolist() if hasattr(item, "tolist") else str(item))


def run_folder(output_dir: str | os.PathLike, run_name: str) -> Path:
    """Make and return `output_dir/run_name`; CheckpointError if it is unwritable or holds a checkpoint."""
    folder = Path(output_dir) / run_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a read-only disk may still have the folder
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{folder} cannot be written ({reason}); choose another --output-dir or --run-name."
        ) from error
    check_free(folder)
    return folder


def check_free(folder: Path) -> None:
    """CheckpointError if the folder holds a checkpoint, which a new run would replace."""
    if (folder / "checkpoint.pt").exists():
        raise CheckpointError(
            f"{folder} already holds a checkpoint; continue it with --resume or give another --run-name."
        )


def claim(folder: Path, args: dict, new=False):
    """Lock a run's folder, whose args.json has its `args`, written where it is `new` or has lost them -> the
    file that holds the lock until it is closed or this process ends, however. CheckpointError if another
    process has it.

    A lock of fcntl's kind is this process's alone: workers that outlive it for a moment do not keep it.
    """
    path = folder / "args.json"
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")  # of a pipe it does not wait
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise CheckpointError(
                f"{folder} belongs to a run that still goes on; stop it first, or give another --run-name."
            ) from error
        except OSError:  # a file system without locks
            pass
        if new:
            check_free(folder)
        if new or not os.fstat(file.fileno()).st_size:
            file.truncate()
            json.dump(args, file, indent=2)
            file.flush()
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{path} cannot be written ({reason}); free some space or choose another --output-dir."
        ) from error
    return file


def write_results(path: str | os.PathLike, results: dict) -> None:
    """Write results as JSON, atomically; CheckpointError if the disk refuses.

    Arrays become lists, NaN and infinity null, other objects their text.
    """
    finite = json.loads(_dump(results), parse_constant=lambda _: None)  # JSON has no NaN
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite, indent=2) + "\n")


def hardware() -> dict:
    """The machine: `cpu` name, `cores` this process may use, `gpu` name or None, `ram_gb` in 2^30 bytes."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of those packages the numbers depend on that are installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "transformers", "peft", "gymnasium", "mujoco"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
