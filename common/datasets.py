"""Data sets as flat arrays: demonstrations with images (RoboMimic, LIBERO), and from "Offline RL" on
transitions from states (D4RL, Minari, RoboMimic)."""

import contextlib
import dataclasses
import difflib
import fcntl
import http.client
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import h5py
import numpy as np
import torch
from tqdm import tqdm

from common import UserError, say
from common.checkpoint import atomic_path
from common.envs import NAMED, world_flags, world_module
from common.flags import FREE, marks

IMAGE_KEYS = ("agentview_rgb", "eye_in_hand_rgb")  # LIBERO's names, and RoboMimic's for the same cameras
ROBOMIMIC_IMAGE_KEYS = {"agentview_rgb": "agentview_image", "eye_in_hand_rgb": "robot0_eye_in_hand_image"}
PROPRIO_KEYS = (  # the first set that a demonstration has; ours, LIBERO's, RoboMimic's
    ("proprio",),
    ("ee_pos", "ee_ori", "gripper_states"),
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
)

RAW = 10.0  # what a device of teleoperation may say where the controller hears 1
BLOCK_STEPS = 16  # of a recorded episode, that are packed and written together


def load_demonstrations(
    path: str | os.PathLike, max_demos: int | None = None, image_keys: tuple[str, ...] = IMAGE_KEYS,
    action_dim: int = 7, only_success: bool = False, kept_steps: Callable | None = None,
    proprio_keys: tuple[str, ...] = (), names: Mapping = MappingProxyType({}), outcomes: bool = False,
) -> dict:  # fmt: skip
    """Read the first `max_demos` demonstrations by number as flat arrays of S steps in E episodes.

    Returns `image`, `Pictures`, `proprio` float32 (S, P), `actions` float32 (S, A) in [-1, 1], A being
    action_dim, `task` int64 (S,) into `instructions` (list of str), and `episode_starts` int64
    (E,), `success` bool (E,), the demonstration's attribute (published files have none and successes alone),
    `decided` bool (S,), where a recorded policy chose its next chunk (all of demonstrations that do not say),
    and `left_out`, how many steps are not among S.
    With outcomes also `rewards` float32 and `terminated` bool (S,): `dones`, but of recorded rollouts, where
    these are time-outs too, what they say or, of a failure, nothing.
    image_keys: the pictures to read; with none there is no `image`. only_success: those that succeeded alone.
    kept_steps: actions (T, A) -> bool (T,), the steps to read; a demonstration without any is left out.
    `proprio` is what `proprio_keys` name, or the file's own, or position (m), axis-angle (rad) and the two
    fingers (m) of each arm, P = 8 or 16.
    The instruction is the demonstration's, LIBERO's name of the task, the file's, or that of RoboMimic's
    environment: names[its name], or this in words. Images are as stored: LIBERO's published files hold them
    upside down, RoboMimic's upright. Actions of robosuite beyond [-1, 1] are clipped, which is said.
    UserError naming file, demonstration and key if one is missing, misshaped, not finite or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is a folder; give an HDF5 file of demonstrations.")
    if max_demos is not None and max_demos < 1:
        raise UserError(f"max_demos is {max_demos}, it must be at least 1.")
    with _hdf5(path) as file:
        read = image_keys, action_dim, proprio_keys, _action_limit(file.get("data")), outcomes
        return _load(file, path, max_demos, read, only_success, kept_steps, names)


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for bytes that are no HDF5
        raise UserError(f"{path} is truncated or not HDF5 ({error}); download or record it again.") from error


@dataclass
class Pictures:
    """The pictures of S steps in HDF5 files, which stay there: `pictures[rows]`, rows int (n,) -> uint8 (n,
    cameras, H, W, 3), and `np.asarray(pictures)` all of them. UserError for a file that can no longer be
    read."""

    episodes: list[tuple]
    """of each the file's path, its cameras' arrays there, by name, and which of their rows are steps, (T,)"""
    frame: tuple[int, ...]
    """(H, W, 3)"""
    turn: Callable = np.asarray
    """pictures as files hold them -> as the world shows them"""

    def __post_init__(self):
        self.edges = np.cumsum([0, *(len(steps) for *_, steps in self.episodes)])
        self.shape = self.edges[-1], len(self.episodes[0][1]), *self.frame

    def __getitem__(self, rows):
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        episode = np.searchsorted(self.edges, rows, side="right") - 1
        for number in tqdm(np.unique(episode), desc="reading pictures", delay=2, disable=None):
            here, (path, names, steps) = episode == number, self.episodes[number]
            at = steps[rows[here] - self.edges[number]]
            first = at.min()
            with _hdf5(path) as file:
                for camera, name in enumerate(names):
                    images[here, camera] = self.turn(file[name][first : at.max() + 1])[at - first]
        return images

    def __array__(self, dtype=None, copy=None):
        return self[np.arange(self.shape[0])]


def _action_limit(data: h5py.Group | None) -> float:
    """What actions may be: more than 1 where `env_args` are robosuite's, whose controllers clip."""
    with contextlib.suppress(TypeError, ValueError, AttributeError, RecursionError):
        if json.loads(data.attrs.get("env_args")).get("type") == 1:
            return RAW
    return 1.001  # 0.001 for what recorders round


def _clip(actions: np.ndarray, limit: float) -> tuple[np.ndarray, int]:
    """Of robosuite, actions as the controller hears them, and how many rows of them are others; else none."""
    if limit != RAW:
        return actions, 0
    return np.clip(actions, -1, 1), int((np.abs(actions) > 1.001).any(axis=1).sum())


def _say_clipped(where: str | os.PathLike, beyond: int, steps: int) -> None:
    if beyond:
        say(
            f"warning: {where}: {beyond} of {steps} actions are beyond [-1, 1], and clipped as robosuite's "
            "controllers do.",
            sys.stderr,
        )


def _load(
    file: h5py.File, path: Path, max_demos: int | None, read: tuple, only_success: bool,
    kept_steps: Callable | None, names: Mapping,
) -> dict:  # fmt: skip
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        raise UserError(f"{path} has no group 'data'; it is not in the RoboMimic/LIBERO layout.")
    numbers = sorted(int(name[5:]) for name in data if re.fullmatch(r"demo_\d+", name))
    if not numbers:
        raise UserError(f"{path} has no demonstrations, its group 'data' holds no 'demo_0'.")
    success = {i: bool(data[f"demo_{i}"].attrs.get("success", True)) for i in numbers}
    demos = {i: data[f"demo_{i}"] for i in numbers if success[i] or not only_success}
    demos = dict([*demos.items()][:max_demos])
    room = sum(len(_array(demo, "actions", f"{path}, demo_{i}")) for i, demo in demos.items())
    columns, shapes, pictures = {}, {}, []
    instructions, tasks, edges, succeeded, clipped = [], [], [0], [], 0
    for number, demo in demos.items():
        where = f"{path}, demo_{number}"
        episode, cameras, beyond = _load_episode(demo, where, *read)
        clipped += beyond
        kept = np.arange(len(episode["actions"]))
        if kept_steps:
            kept = kept[kept_steps(episode["actions"])]
        if not len(kept):
            continue
        frame = {"image": cameras[0].shape[1:]} if cameras else {}
        for key, shape in (frame | {key: value.shape[1:] for key, value in episode.items()}).items():
            if shapes.setdefault(key, shape) != shape:
                raise UserError(f"{where} has {key} of shape {shape}, those before {shapes[key]}.")
        for key, value in episode.items():
            columns.setdefault(key, []).append(value[kept])
        pictures.append((path, [camera.name for camera in cameras], kept))
        instruction = _instruction(demo, data, where, names)
        instructions += [] if instruction in instructions else [instruction]
        tasks.append(instructions.index(instruction))
        edges.append(edges[-1] + len(kept))
        succeeded.append(success[number])
    if not tasks:
        what = "step worth imitating" if demos else "successful demonstration"
        raise UserError(f"{path} has no {what}; give another file, or --demos-filter all.")
    _say_clipped(path, clipped, room)
    arrays = {key: np.concatenate(values) for key, values in columns.items()}
    arrays |= {"image": Pictures(pictures, shapes["image"])} if "image" in shapes else {}
    return arrays | {
        "task": np.repeat(np.array(tasks, np.int64), np.diff(edges)), "instructions": instructions,
        "episode_starts": np.array(edges[:-1], np.int64), "success": np.array(succeeded),
        "left_out": room - edges[-1],
    }  # fmt: skip


def _array(group: h5py.Group, key: str, where: str) -> h5py.Dataset:
    found = group.get(key) if isinstance(group, h5py.Group) else None
    if not isinstance(found, h5py.Dataset) or found.ndim == 0:
        raise UserError(f"{where} has no array '{key}'; it is not in the RoboMimic/LIBERO layout.")
    return found


def _load_episode(
    demo: h5py.Group, where: str, image_keys: tuple[str, ...], action_dim: int, keys: tuple[str, ...],
    limit: float, outcomes: bool,
) -> tuple[dict, list[h5py.Dataset], int]:  # fmt: skip
    proprio_keys = next((keys for keys in PROPRIO_KEYS if f"obs/{keys[0]}" in demo), PROPRIO_KEYS[0])
    if proprio_keys == PROPRIO_KEYS[-1] and "obs/robot1_eef_pos" in demo:
        proprio_keys += tuple(key.replace("robot0", "robot1") for key in proprio_keys)
    camera_keys = [key if f"obs/{key}" in demo else ROBOMIMIC_IMAGE_KEYS.get(key, key) for key in image_keys]
    actions = _array(demo, "actions", where)[()]
    parts = {key: _array(demo, f"obs/{key}", where)[()] for key in keys or proprio_keys}
    cameras = {key: _array(demo, f"obs/{key}", where) for key in camera_keys}
    _check_episode(actions, parts, cameras, where, action_dim, limit)
    actions, beyond = _clip(actions, limit)
    decided = _array(demo, "decided", where)[()] if "decided" in demo else np.ones(len(actions))
    if decided.shape != (len(actions),):
        raise UserError(f"{where} has decided of shape {decided.shape}; it needs ({len(actions)},).")
    ends = {}
    if outcomes:
        done = "terminated" if "terminated" in demo else "dones"
        ends = {key: _read(demo, key, where, (len(actions),)) for key in ("rewards", done)}
        failed = done == "dones" and not demo.attrs.get("success", True)
        ends["terminated"] = (ends.pop(done) != 0) & (not failed)
    turned = {} if keys else {key for key in parts if key.endswith("_quat")}
    parts = [_axis_angle(value) if key in turned else value for key, value in parts.items()]
    return ends | {
        "proprio": np.concatenate(parts, axis=1).astype(np.float32),
        "actions": actions.astype(np.float32),
        "decided": decided.astype(bool),
    }, [*cameras.values()], beyond  # fmt: skip


def _check_episode(
    actions: np.ndarray, parts: dict[str, np.ndarray], cameras: dict[str, np.ndarray], where: str,
    action_dim: int, limit: float = 1.001,
) -> None:  # fmt: skip
    """UserError unless actions are (T, action_dim), parts of the proprio (T, p), cameras (T, H, W, 3)."""
    for key, value in {"actions": actions, **parts}.items():
        if value.ndim != 2 or len(value) != len(actions) or value.dtype.kind not in "iuf":
            raise UserError(
                f"{where} has {key} {value.dtype} {value.shape}; it needs numbers ({len(actions)}, width)."
            )
        bad = np.flatnonzero(~np.isfinite(value).all(axis=1))
        if len(bad):
            raise UserError(
                f"{where} has NaN or infinity in {key}, row {bad[0]}; remove or repair this demonstration."
            )
    if len(actions) == 0 or actions.shape[1] != action_dim:
        raise UserError(
            f"{where} has actions of shape {actions.shape}; it needs (T, {action_dim}), T at least 1."
        )
    outside = np.flatnonzero((np.abs(actions) > limit).any(axis=1))
    if len(outside):
        raise UserError(f"{where} has actions outside [-1, 1] in row {outside[0]}; normalise them first.")
    size = next(iter(cameras.values())).shape[1:] if cameras else None
    for key, value in cameras.items():
        if value.ndim != 4 or len(value) != len(actions) or value.shape[3] != 3 or value.dtype != np.uint8:
            raise UserError(
                f"{where} has {key} {value.dtype} {value.shape}; it needs uint8 ({len(actions)}, H, W, 3)."
            )
        if value.shape[1:] != size:
            raise UserError(f"{where} has {key} of size {value.shape[1:3]}, its first camera {size[:2]}.")


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternions (T, 4), x y z w -> axis-angle (T, 3), radians, as LIBERO's: 2 acos(w) xyz / |xyz|."""
    xyz, w = quaternion[:, :3].astype(np.float64), quaternion[:, 3:]
    length = np.linalg.norm(xyz, axis=1, keepdims=True)
    # atan2(|xyz|, w) is acos(w) of a unit quaternion, and exact where acos is not, near w = 1
    return 2.0 * np.arctan2(length, w) * xyz / np.maximum(length, 1e-12)


def _instruction(demo: h5py.Group, data: h5py.Group, where: str, names: Mapping) -> str:
    try:
        if "language_instruction" in demo.attrs:
            instruction = demo.attrs["language_instruction"]
        elif "bddl_file_name" in data.attrs:  # LIBERO's own name of the task; problem_info words it otherwise
            instruction = Path(str(data.attrs["bddl_file_name"])).stem
            instruction = re.sub("^[A-Z_]+SCENE[0-9]+_", "", instruction).replace("_", " ")
        elif "problem_info" in data.attrs:  # text or a list of letters
            instruction = "".join(json.loads(data.attrs["problem_info"])["language_instruction"])
        else:  # NutAssemblySquare -> nut assembly square
            name = json.loads(data.attrs["env_args"])["env_name"]
            words = re.sub(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
            instruction = names.get(name, words)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} has no instruction; set its attribute 'language_instruction'.") from error
    instruction = instruction.decode() if isinstance(instruction, bytes) else str(instruction)
    return instruction.strip().strip('"')


def save_demonstrations(
    path: str | os.PathLike, episodes: Iterable[dict], image_keys: tuple[str, ...] = IMAGE_KEYS,
    action_dim: int = 7,
) -> None:  # fmt: skip
    """Write episodes, one at a time and atomically, in the layout that `load_demonstrations` reads.

    An episode is a dict of `image` uint8 (T, cameras, H, W, 3), `proprio` float (T, P), `actions` float
    (T, action_dim) in [-1, 1] and `instruction` (str); `image_keys` names its cameras. UserError as in
    `load_demonstrations`, CheckpointError if the disk refuses.
    """
    count = 0
    with demonstrations_file(path) as (data, _):
        for count, episode in enumerate(episodes, start=1):
            where = f"{path}, demo_{count - 1}"
            image, proprio, actions = (np.asarray(episode[key]) for key in ("image", "proprio", "actions"))
            if image.ndim != 5 or image.shape[1] != len(image_keys):
                raise UserError(
                    f"{where} has image of shape {image.shape}; it needs (T, {len(image_keys)}, H, W, 3)."
                )
            cameras = {key: image[:, i] for i, key in enumerate(image_keys)}
            _check_episode(actions, {"proprio": proprio}, cameras, where, action_dim)
            demo = data.create_group(f"demo_{count - 1}")
            demo.attrs["num_samples"] = len(actions)
            demo.attrs["language_instruction"] = episode["instruction"]
            columns = {"actions": actions.astype(np.float32), "obs/proprio": proprio.astype(np.float32)}
            append_rows(demo, columns | {f"obs/{key}": value for key, value in cameras.items()})


class _Disk(io.FileIO):
    """A file that keeps its first `error` of writing to itself: HDF5 comes to no end with one."""

    error = None

    def write(self, data):
        view = memoryview(data).cast("B")
        try:
            while len(view):  # a disk that is nearly full takes a part
                view = view[super().write(view) :]
        except OSError as error:
            self.error = self.error or error

    def truncate(self, size=None):
        try:
            super().truncate(size)
        except OSError as error:
            self.error = self.error or error


@contextlib.contextmanager
def demonstrations_file(path: str | os.PathLike) -> Iterator[tuple[h5py.Group, _Disk]]:
    """The group that holds the demonstrations of a new file, which is there once the body has written them,
    and the file on the disk, whose `error` ends the body. UserError for no demonstrations."""
    with atomic_path(path) as temporary, _Disk(temporary, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                data = file.create_group("data")
                yield data, disk
                if not len(data):
                    raise UserError(f"{path} would hold no demonstrations; record at least one.")
                data.attrs["num_demos"] = len(data)
                data.attrs["total"] = sum(demo.attrs["num_samples"] for demo in data.values())
        finally:
            if disk.error:
                raise disk.error


def append_rows(demo: h5py.Group, columns: dict[str, np.ndarray]) -> None:
    """More rows of a demonstration, columns {name: (n, ...)}; pictures are packed without loss."""
    for name, rows in columns.items():
        if name not in demo:
            shape, packed = rows.shape[1:], {"compression": "gzip", "compression_opts": 1}
            demo.create_dataset(
                name, (0, *shape), rows.dtype, maxshape=(None, *shape), chunks=(BLOCK_STEPS, *shape),
                **packed if rows.ndim == 4 else {},
            )  # fmt: skip
        demo[name].resize(len(demo[name]) + len(rows), 0)
        demo[name][-len(rows) :] = rows


class Recording:
    """Episodes while they are played: their steps go to the file in blocks, so that memory holds few of them.

    data, disk: `demonstrations_file`'s. cameras: their names in it, in the order of `image`. parts: {name:
    width}, what `proprio` consists of there; what follows in it (--action-history) is left out, since
    `training_demonstrations` makes it anew. to_file: pictures as the world shows them -> as files hold them,
    or None.
    """

    def __init__(self, data, disk, cameras, parts, to_file, envs):
        self.data, self.disk, self.envs = data, disk, envs
        self.cameras, self.parts, self.to_file = cameras, parts, to_file
        self.steps, self.ended = {}, 0  # steps of running episodes that are not in the file yet; how many are

    def step(self, episode, rows, obs, actions, rewards, ended, terminated, info, decided):
        """One step of `Envs` with chunks of one: actions (N, 1, A) in `obs`. episode (N,): what their numbers
        in the file are; rows: bool (N,), the environments that moved; decided: bool (N,), where the action is
        a chunk's first."""
        for i in np.flatnonzero(rows):
            number = int(episode[i])
            if info["lost"][i]:  # its worker died, and it is played once more
                self.drop(number)
                continue
            steps = self.steps.setdefault(number, [])
            seen = obs["image"][i], obs["proprio"][i]
            steps.append((*seen, actions[i, 0], rewards[i], ended[i], terminated[i], decided[i]))
            if len(steps) == BLOCK_STEPS or ended[i]:
                self._write(number)
            if ended[i]:
                del self.steps[number]
                self.ended += 1
                demo, task = self.data[f"demo_{number}"], obs["task"][i]
                demo.attrs["num_samples"] = len(demo["actions"])
                demo.attrs["language_instruction"] = self.envs.instructions[task]
                if self.envs.has_success:
                    demo.attrs["success"] = bool(info["success"][i])

    def _write(self, number):
        columns = map(np.stack, zip(*self.steps[number], strict=True))
        image, proprio, actions, rewards, dones, terminated, decided = columns
        image = self.to_file(image) if self.to_file else image
        parts = np.split(proprio[:, : sum(self.parts.values())], np.cumsum([*self.parts.values()])[:-1], 1)
        columns = {f"obs/{name}": image[:, k] for k, name in enumerate(self.cameras)}
        columns |= {f"obs/{name}": part for name, part in zip(self.parts, parts, strict=True)}
        columns |= {"actions": actions.clip(-1, 1), "rewards": rewards, "dones": dones.astype(np.uint8)}
        columns |= {"terminated": terminated.astype(np.uint8), "decided": decided.astype(np.uint8)}
        append_rows(self.data.require_group(f"demo_{number}"), columns)
        self.steps[number].clear()
        if self.disk.error:
            raise self.disk.error

    def drop(self, number):
        """Forget an episode that has not ended."""
        self.steps.pop(number, None)
        if f"demo_{number}" in self.data:
            del self.data[f"demo_{number}"]


@contextlib.contextmanager
def recording(path: str | os.PathLike, args, envs) -> Iterator[Recording]:
    """-> a `Recording` of `envs`' episodes into the file `path`, in LIBERO's layout, under the names that the
    world of `args` gives its cameras and the parts of its proprioception. The file is there once the body has
    ended, with the episodes that have. UserError for a world that cannot be recorded, or a folder."""
    if "image" not in envs.single_observation_space.spaces:
        raise UserError(f"{args.env} has no pictures to record; give another --env.")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give --save-dataset a file.")
    world, flags = world_module(args.env), lasting_flags(args)
    width = envs.single_observation_space["proprio"].shape[0]
    own = width - args.action_history * envs.single_action_space.shape[0]
    parts = _parts(world, flags) or {"proprio": own}
    with demonstrations_file(path) as (data, disk):
        data.attrs["env_args"] = json.dumps({"env_name": args.env, "env_kwargs": flags})
        record = Recording(data, disk, demo_keys(args), parts, getattr(world, "to_file", None), envs)
        yield record
        for number in [*record.steps]:
            record.drop(number)


def _parts(world, flags: dict) -> dict[str, int]:
    """{name: width} of what `proprio` consists of in files of the world with these flags; {} if unsaid."""
    if hasattr(world, "demo_proprio"):
        return world.demo_proprio(**flags)
    return getattr(world, "DEMO_PROPRIO", {})


def demo_keys(args) -> tuple[str, ...]:
    """The names that files give to the cameras of a run. UserError if the world names none."""
    keys = getattr(world_module(args.env), "DEMO_KEYS", None)
    if keys is None:
        raise UserError(f"The world {args.env} names no DEMO_KEYS, its cameras' names in files.")
    return tuple(keys[camera] for camera in getattr(args, "cameras", keys))


def chunk_targets(
    actions: np.ndarray, episode_starts: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The next K actions of every step: actions (S, A), starts (E,) -> targets (S, K, A) and mask (S, K).

    targets[s, k] = actions[min(s + k, end(s) - 1)], mask[s, k] = s + k < end(s), where end(s) is the first
    step after the episode of s. UserError for a chunk below 1 or starts that do not rise from 0 below S.
    """
    starts = np.asarray(episode_starts)
    lengths = np.diff(np.append(starts, len(actions)))
    if chunk < 1 or len(starts) == 0 or starts[0] != 0 or (lengths < 1).any():
        raise UserError(f"chunk {chunk} must be >= 1 and episode_starts rise from 0 below {len(actions)}.")
    end = np.repeat(starts + lengths, lengths)[:, None]  # (S, 1)
    index = np.arange(len(actions))[:, None] + np.arange(chunk)  # (S, K)
    return actions[np.minimum(index, end - 1)], index < end


def training_demonstrations(args, envs, outcomes=False) -> dict:
    """The demonstrations of a run: --demos' files, or else the scripted expert's of the world. outcomes: as
    of `load_demonstrations`, and of every step, also those that are not worth imitating.

    As `load_demonstrations`, by --demos-filter, with `task` into `envs.instructions`, pictures as the world
    shows them, and --action-history in `proprio`; from an expert also `pixels` (S, cameras, 2, 2). UserError
    where they do not fit the world.
    """
    world, flags = world_module(args.env), world_flags(args)
    if args.demos:
        say(f"reading {args.demos}")
        demos = hasattr(world, "read_demonstrations") and world.read_demonstrations(
            args.demos, args.num_demos, outcomes, **flags
        )
        files = sorted(Path(args.demos).glob("*.hdf5")) if Path(args.demos).is_dir() else [args.demos]
        if not demos and not files:
            raise UserError(f"The folder {args.demos} holds no .hdf5 file; give one with demonstrations.")
        if not envs.single_action_space.shape:
            raise UserError(f"--demos are of numbers; --env {args.env} has {envs.single_action_space} here.")
        pictures = envs.single_observation_space.get("image") is not None
        read = demo_keys(args) if pictures and not demos else (), envs.single_action_space.shape[0]
        read += args.demos_filter == "success", None if outcomes else getattr(world, "kept_steps", None)
        read += (tuple(_parts(world, flags)) if hasattr(world, "demo_proprio") else (),)
        read += (getattr(world, "DEMO_TASKS", {}), outcomes)
        if not demos:
            demos = _concatenate([load_demonstrations(file, args.num_demos, *read) for file in files])
            if pictures and hasattr(world, "from_file"):
                demos["image"] = dataclasses.replace(demos["image"], turn=world.from_file)
        if (has := demos["actions"].shape[1]) != read[1]:
            raise UserError(f"{args.demos} has actions of {has} numbers; those of this world have {read[1]}.")
        _say_what_was_read(demos, args, envs)
        unknown = [text for text in demos["instructions"] if text not in envs.instructions]
        if unknown:
            raise UserError(
                f"{args.demos} has the instruction {unknown[0]!r}, which {args.env} does not know."
            )
        demos["task"] = np.array([envs.instructions.index(t) for t in demos["instructions"]])[demos["task"]]
    elif hasattr(world, "demonstrations"):
        say(f"making {args.num_demos} demonstrations")
        demos = world.demonstrations(
            args.num_demos, args.seed, noise=args.demo_noise, num_workers=args.num_workers, **flags
        )
        demos.setdefault("task", np.zeros(len(demos["actions"]), np.int64))  # of a world of one task
    else:
        raise UserError(
            f"--env {args.env} needs --demos, HDF5 files or a folder of them: it has no expert of its own."
        )
    demos.setdefault("success", np.ones(len(demos["episode_starts"]), bool))
    demos.setdefault("decided", np.ones(len(demos["task"]), bool))
    demos.setdefault("executed", demos["actions"])
    if args.action_history:  # the last n executed actions, oldest first, zeros before the episode's first
        n, starts = args.action_history, demos["episode_starts"]
        lengths = np.diff(np.append(starts, len(demos["task"])))
        position = np.arange(len(demos["task"])) - np.repeat(starts, lengths)
        past = np.arange(len(demos["task"]))[:, None] + np.arange(-n, 0)  # (S, n)
        history = demos["executed"][past.clip(0)] * (position[:, None] + np.arange(-n, 0) >= 0)[..., None]
        demos["proprio"] = np.concatenate([demos["proprio"], history.reshape(len(history), -1)], 1)
    has, wants = demos["proprio"].shape[1], envs.single_observation_space["proprio"].shape[0]
    if has != wants:
        source = args.demos or f"The expert of {args.env}"
        raise UserError(f"{source} has a proprio of {has} numbers; this world's has {wants}.")
    return demos


def _say_what_was_read(demos, args, envs):
    """What was read of --demos, and how it differs from what an evaluation shows."""
    success, steps = demos["success"], len(demos["task"])
    text = f"{len(success)} demonstrations of {steps} steps, {success.sum()} successful"
    say(text + (f"; {demos['left_out']} steps of no motion left out" if demos["left_out"] else ""))
    if "image" not in demos:
        return
    has, wants = demos["image"].shape[2:4], envs.single_observation_space["image"].shape[1:3]
    if has != wants:
        say(
            f"warning: the pictures of {args.demos} are {has[0]} x {has[1]}, those of an evaluation "
            f"{wants[0]} x {wants[1]}: a model learns from others than it will see; better render them anew."
        )


def training_scenes(args, envs, device) -> dict[str, torch.Tensor] | None:
    """Still pictures of the world with the place of what is named, for the grounding stage: image, proprio,
    task, pixels; None from a world or for demonstrations without them."""
    world = world_module(args.env)
    if args.demos or not hasattr(world, "scenes"):
        return None
    scenes = world.scenes(args.grounding_scenes, args.seed, num_workers=args.num_workers, **world_flags(args))
    scenes = {key: torch.as_tensor(x, device=device) for key, x in scenes.items()}
    width = args.action_history * envs.single_action_space.shape[0]
    scenes["proprio"] = torch.cat(
        [scenes["proprio"], scenes["proprio"].new_zeros(len(scenes["task"]), width)], 1
    )
    return scenes


def _concatenate(parts: list[dict]) -> dict:
    """What `load_demonstrations` returns, of several files, as of one."""
    instructions = list(dict.fromkeys(text for part in parts for text in part["instructions"]))
    keys = ("image", "proprio", "actions", "success", "decided", "rewards", "terminated")
    whole = {}
    for key in (key for key in keys if key in parts[0]):
        columns = [part[key] for part in parts]
        if len(shapes := {column.shape[1:] for column in columns}) > 1:
            shapes = " and ".join(map(str, sorted(shapes)))
            raise UserError(f"The files of --demos have {key} of shapes {shapes}; give files of one kind.")
        if isinstance(columns[0], Pictures):
            episodes = [episode for pictures in columns for episode in pictures.episodes]
            whole[key] = Pictures(episodes, columns[0].frame)
        else:
            whole[key] = np.concatenate(columns)
    tasks = [np.array([instructions.index(t) for t in p["instructions"]])[p["task"]] for p in parts]
    offsets = np.cumsum([0] + [len(part["task"]) for part in parts])
    starts = [part["episode_starts"] + offset for part, offset in zip(parts, offsets, strict=False)]
    return whole | {
        "task": np.concatenate(tasks), "episode_starts": np.concatenate(starts), "instructions": instructions,
        "left_out": sum(part["left_out"] for part in parts),
    }  # fmt: skip


# --- Offline RL ---------------------------------------------------------------------------------------------

# D4RL's tasks: Gymnasium id, sizes of observation and action, return of the random and of the expert policy
# (d4rl/infos.py). The data come from Gym's v2 tasks. Hopper and HalfCheetah move in v5 as they did there;
# Walker2d-v5 has another friction of the feet, so that v4 it is; Ant's observation of 111 is nobody's now.
TASKS = {
    "hopper": ("Hopper-v5", (11, 3), (-20.272305, 3234.3)),
    "halfcheetah": ("HalfCheetah-v5", (17, 6), (-280.178953, 12135.0)),
    "walker2d": ("Walker2d-v4", (17, 6), (1.629008, 4592.3)),
    "ant": (None, (111, 8), (-325.6, 3879.7)),
    "pen": (None, (45, 24), (96.262799, 3076.8331017826877)),
    "hammer": (None, (46, 26), (-274.856578, 12794.134825156867)),
    "door": (None, (39, 28), (-56.512833, 2880.5693087298737)),
    "relocate": (None, (39, 30), (-6.425911, 4233.877797728884)),
    "antmaze": (None, (29, 8), (0.0, 1.0)),
    "kitchen": (None, (60, 9), (0.0, 4.0)),
    "maze2d": (None, (4, 2), None),  # a score for each maze
}
MAZE2D = {
    "maze2d-open-v0": (0.01, 20.66),
    "maze2d-umaze-v1": (23.85, 161.86),
    "maze2d-medium-v1": (13.13, 277.39),
    "maze2d-large-v1": (6.7, 273.99),
    "maze2d-open-dense-v0": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482),
    "maze2d-medium-dense-v1": (44.264742, 297.4552547777125),
    "maze2d-large-dense-v1": (30.569041, 303.4857382709002),
}
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
BLOCK = 2**21  # numbers read at once


def _d4rl_files() -> dict[str, str]:
    """D4RL's names -> their files below D4RL_URL (d4rl/infos.py)."""
    files = {}
    for task in ("hopper", "halfcheetah", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-expert", "medium-replay", "full-replay"):
            stem = f"{task}_{kind.replace('-', '_')}"
            files |= {f"{task}-{kind}-v{v}": f"gym_mujoco_v{v}/{stem}-v{v}.hdf5" for v in (1, 2)}
            files[f"{task}-{kind}-v0"] = f"gym_mujoco/{stem.replace('medium_replay', 'mixed')}.hdf5"
        del files[f"{task}-full-replay-v0"]
    files["walker2d-medium-replay-v0"] = "gym_mujoco/walker_mixed.hdf5"
    v0 = {"human": "v0_demos_clipped", "cloned": "demos-v0-bc-combined", "expert": "v0_expert_clipped"}
    for task in ("pen", "hammer", "door", "relocate"):
        for kind, old in v0.items():
            files[f"{task}-{kind}-v0"] = f"hand_dapg/{task}-{old}.hdf5"
            files[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    for maze, old in {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}.items():
        for diverse in (False, True):
            kind = "-diverse" if diverse else "" if maze == "umaze" else "-play"
            stem = f"Ant_maze_{old}_noisy_multistart_{kind != ''}_multigoal_{diverse}_sparse"
            files[f"antmaze-{maze}{kind}-v0"] = f"ant_maze_new/{stem}.hdf5"
            files[f"antmaze-{maze}{kind}-v2"] = f"ant_maze_v2/{stem}_fixed.hdf5"
    for kind, tasks in {
        "complete": "mini_kitchen_microwave_kettle_light_slider",
        "partial": "kitchen_microwave_kettle_light_slider",
        "mixed": "kitchen_microwave_kettle_bottomburner_light",
    }.items():
        files[f"kitchen-{kind}-v0"] = f"kitchen/{tasks}-v0.hdf5"
    for name in MAZE2D:  # maze2d-umaze-v1 -> maze2d-umaze-sparse-v1
        stem = name if "-dense" in name else re.sub(r"(-v\d)$", r"-sparse\1", name)
        files[name] = f"maze2d/{stem.removesuffix('-v0')}.hdf5"
    return files


D4RL_FILES = _d4rl_files()


@dataclass(frozen=True)
class OfflineDataset:
    """N transitions of E episodes, one after another in the order of time. No observation is held twice.

    `states` holds the N observations and then F more that no transition starts from, the last ones of
    episodes. Transition i goes from states[i] to states[next_index[i]]: a script moves both to its device
    once. A termination whose next observation was not recorded has its own in its place: it is never
    bootstrapped from. An episode ends with a termination (OGBench's go on), a time-out or the end of the
    recording.
    """

    name: str  # as asked for
    env_id: str | None  # Gymnasium id, or world, to evaluate in
    states: np.ndarray  # (N + F, S) float32
    next_index: np.ndarray  # (N,) int64 into states
    actions: np.ndarray  # (N, A) float32
    rewards: np.ndarray  # (N,) float32
    terminations: np.ndarray  # (N,) bool, no time-outs
    episode_starts: np.ndarray  # (E,) int64, ascending from 0
    reference_scores: tuple[float, float] | None  # return of the random and of the expert policy
    env_flags: dict = field(default_factory=dict)  # of the world `env_id`, by name
    normalized_actions: bool = False  # all in [-1, 1], as every world has them; else in the world's own units
    encoder: object = None  # `common.features.Encoder`, through which the world is seen

    @property
    def observations(self) -> np.ndarray:
        """(N, S) float32, a view of `states`."""
        return self.states[: len(self.actions)]

    @property
    def next_observations(self) -> np.ndarray:
        """(N, S) float32, a copy made by each access."""
        return self.states[self.next_index]


def unit_actions(dataset: OfflineDataset, bounds: tuple | None) -> np.ndarray:
    """The actions (N, A) in [-1, 1] of `bounds` (low, high), each (A,), clipped as the environment did.
    UserError for actions outside [-1, 1] whose bounds are unknown."""
    actions = dataset.actions
    if bounds:
        actions = 2 * (actions - bounds[0]) / (bounds[1] - bounds[0]) - 1
    elif np.abs(actions).max() > 1.001:  # 0.001 for what recorders round
        raise UserError(f"{dataset.name} has actions outside [-1, 1]; give --env, which says what they mean.")
    return np.clip(actions, -1, 1)


def reward_units(dataset: OfflineDataset, args) -> tuple[float, float]:
    """Scale and bias of the rewards, those of the flags --reward-scale and --reward-bias; with
    --normalize-rewards they first span 1000 from the worst to the best episode's return. UserError where all
    returns are nearly equal."""
    scale = args.reward_scale
    if args.normalize_rewards:
        returns = np.add.reduceat(dataset.rewards, dataset.episode_starts, dtype=np.float64)
        span = returns.max() - returns.min()
        if span <= 0.01 * np.abs(returns).max():  # as of a few demonstrations: rewards would become huge
            raise UserError(f"{dataset.name} has nearly equal returns alone; use --no-normalize-rewards.")
        scale = scale * (1000 / span)
    return scale, args.reward_bias


def transition_tensors(dataset: OfflineDataset, bounds: tuple | None, args, device) -> list[torch.Tensor]:
    """The data set on the device: states (N + F, S), next_index (N,) into them, rest (N, A + 2): action,
    reward and termination, as `reward_units` has it."""
    scale, bias = reward_units(dataset, args)
    rewards = scale * dataset.rewards + bias
    rest = np.c_[unit_actions(dataset, bounds), rewards, dataset.terminations].astype(np.float32)
    return [torch.from_numpy(x).to(device) for x in (dataset.states, dataset.next_index, rest)]


def transition_rows(dataset: OfflineDataset, bounds: tuple | None) -> torch.Tensor:
    """The data set as a replay's rows (N, W), as `common/replay.py` has them: obs, action in [-1, 1], reward,
    terminated, truncated (0: no update asks) and next_obs."""
    columns = (dataset.rewards, dataset.terminations, np.zeros(len(dataset.rewards)))
    rows = np.c_[dataset.observations, unit_actions(dataset, bounds), *columns, dataset.next_observations]
    return torch.from_numpy(rows.astype(np.float32))


def reference_scores(env_id: str) -> tuple[float, float] | None:
    """Returns of D4RL's random and expert policy for a Gymnasium id or a D4RL name; None if it has none."""
    if env_id in ("Walker2d-v5", "Ant-v4", "Ant-v5"):  # not D4RL's tasks
        return None
    return MAZE2D.get(env_id) or TASKS.get(re.split("[-_]", env_id)[0].lower(), (None, None, None))[2]


def d4rl_name(name_or_path: str) -> str:
    """D4RL's name of one of its files; of another file its stem, of what is no file the name as it is."""
    path = Path(name_or_path)
    published = {url.rpartition("/")[2]: known for known, url in D4RL_FILES.items()}
    return published.get(path.name, path.stem if path.suffix else name_or_path)


def load_dataset(name_or_path: str | os.PathLike, keys: tuple[str, ...] = ()) -> OfflineDataset:
    """Read a data set for offline RL, downloading it if it is a name and not on this disk.

    Takes a D4RL name (`hopper-medium-v2`; the file is in $D4RL_DATASET_DIR or ~/.d4rl/datasets), a file in
    D4RL's or RoboMimic's HDF5 layout, a Minari id (`mujoco/hopper/medium-v0`), or an OGBench name with its
    task (`cube-single-play-singletask-task2-v0`, see common/ogbench.py). A RoboMimic or Minari
    observation of several parts is their concatenation in the order of their names, or of a RoboMimic file
    that of `keys`; pictures are not read. An episode ends with its first termination. Transitions whose next
    observation was not recorded are left out, unless they are terminations.
    UserError naming file, key and row if something is missing, misshaped, not finite, or out of reach.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if "-singletask-" in name or path.suffix == ".npz":
        from common.ogbench import load_ogbench  # which imports this file

        return load_ogbench(name)
    minari_id = re.fullmatch(r"[\w-]+(/[\w-]+)+-v\d+", name) and not path.exists()
    if name in D4RL_FILES:
        folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
        path = folder / D4RL_FILES[name].rpartition("/")[2]
        if not path.exists():
            _download(D4RL_URL + D4RL_FILES[name], path)
    elif not minari_id and not path.is_file():
        near = difflib.get_close_matches(name, D4RL_FILES, n=3) or ["hopper-medium-v2"]
        raise UserError(
            f"{name} is not a file, nor a D4RL name (such as {', '.join(near)}), nor a Minari id (such as "
            "mujoco/hopper/medium-v0)."
        )
    try:
        if minari_id:
            return _load_minari(name)
        with h5py.File(path, "r", locking=False) as file:  # who downloaded it may hold its lock yet
            if isinstance(file.get("data"), h5py.Group):
                return _load_robomimic(file, str(path), name, keys)
            return _load_d4rl(file, str(path), name)
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for bytes that are no HDF5
        raise UserError(
            f"{path} is truncated or not HDF5 ({error}); delete and download it again."
        ) from error


def _checked(group: h5py.Group | Mapping, key: str, where: str, shape: tuple[int | None, ...]):
    """The array `key` of a group or dict, unread; UserError unless numbers of `shape`, or (N, 1) for (N,)."""
    found = group.get(key) if hasattr(group, "get") else None
    if not hasattr(found, "shape"):
        raise UserError(f"{where} has no array '{key}'; it is in none of the layouts read here.")
    actual = found.shape[:1] if len(shape) == 1 and found.shape[1:] == (1,) else found.shape
    fits = len(actual) == len(shape) and all(b in (None, a) for a, b in zip(actual, shape, strict=True))
    if not fits or 0 in actual or found.dtype.kind not in "biuf":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{where} has '{key}' {found.dtype} {found.shape}; it needs numbers ({wanted}).")
    return found


def _blocks(found: h5py.Dataset | np.ndarray, key: str, where: str) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows, as float32; UserError naming the row if they are not finite or unreadable."""
    step = max(1, BLOCK // int(np.prod(found.shape[1:])))
    for start in tqdm(range(0, len(found), step), desc=f"reading {key}", delay=2, leave=False, disable=None):
        try:
            with np.errstate(over="ignore"):
                block = np.asarray(found[start : start + step], np.float32)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{where} is damaged in '{key}' from row {start} on ({error}); delete and download it again."
            ) from error
        bad = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1))
        if len(bad):
            raise UserError(
                f"{where} has NaN or infinity in '{key}', row {start + bad[0]}; repair it or take another."
            )
        yield slice(start, start + len(block)), block


def _read(group, key: str, where: str, shape: tuple, position: np.ndarray | None = None, rows: int = 0):
    """float32, row i of the file in row `position[i]`, of `rows` rows if those are more than the file's."""
    found = _checked(group, key, where, shape)
    array = np.empty((max(rows, len(found)), *found.shape[1:]), np.float32)
    for to, block in _blocks(found, key, where):
        array[to if position is None else position[to]] = block
    return array.reshape(-1) if len(shape) == 1 else array


def _load_d4rl(file: h5py.File, where: str, name: str) -> OfflineDataset:
    terminations = _read(file, "terminals", where, (None,)) != 0
    size, has_next = len(terminations), "next_observations" in file
    widths = tuple(getattr(file.get(key), "shape", ())[1:] for key in ("observations", "actions"))
    task, env_id, env_flags, scores = _identify(file, where, name, sum(widths, ()))
    if "timeouts" in file:
        ends = terminations | (_read(file, "timeouts", where, (size,)) != 0)
    elif has_next or task == "kitchen":  # kitchen's terminals mark every end
        ends = terminations.copy()
    else:
        raise UserError(
            f"{where} has neither 'timeouts' nor 'next_observations', so where episodes end is unknown; "
            "add one of them."
        )
    if task == "antmaze":  # v0's time-outs miss the resets (D4RL#77); an ant makes less than 0.5 m in a step
        moved = np.diff(file["observations"][:size, :2], axis=0)
        ends[np.flatnonzero(np.linalg.norm(moved, axis=1) > 1.0)] = True
    ends[-1] = True
    # without `next_observations` the last row before a time-out is only the one before's next observation
    keep = np.ones(size, bool) if has_next else terminations | ~ends
    count = int(keep.sum())
    if count == 0:
        raise UserError(f"{where} has only episodes of one row, and so no transition; take another.")
    if has_next:  # twice the rows for the worst case: memory that is never written is never taken
        position, next_index, used = None, np.arange(1, size + 1), size
        states = _read(file, "observations", where, (size, None), rows=2 * size)
        # Some files' next observations are off by a rounding: no end of an episode, whose jump is far larger.
        tolerance = 1e-5 * np.maximum(states[:size].max(0), -states[:size].min(0))
        found = _checked(file, "next_observations", where, (size, states.shape[1]))
        for here, block in _blocks(found, "next_observations", where):
            following = states[here.start + 1 : min(here.stop + 1, size)]
            differs = np.ones(len(block), bool)
            differs[: len(following)] = (np.abs(block[: len(following)] - following) > tolerance).any(axis=1)
            rows = here.start + np.flatnonzero(differs)
            ends[rows] = True  # medium-replay's are not always marked (D4RL#162)
            next_index[rows] = used + np.arange(len(rows))
            states[used : used + len(rows)] = block[differs]
            used += len(rows)
        states = states[:used]
    else:
        position, rows = np.empty(size, np.int64), np.flatnonzero(keep)
        position[keep], position[~keep] = np.arange(count), np.arange(count, size)
        states = _read(file, "observations", where, (size, None), position)
        next_index = position[rows + ~terminations[rows]]
    firsts = np.append(True, ends[:-1])
    return OfflineDataset(
        name=name,
        env_id=env_id,
        states=states,
        next_index=next_index,
        actions=_read(file, "actions", where, (size, None), position)[:count],
        rewards=_read(file, "rewards", where, (size,), position)[:count],
        terminations=terminations[keep],
        episode_starts=np.flatnonzero(firsts[keep]),
        reference_scores=scores,
        env_flags=env_flags,
    )


def _identify(file: h5py.File, where: str, name: str, widths: tuple) -> tuple:
    """Task, Gymnasium id (or world), its flags and reference scores: from the attributes `env_id` and
    `env_flags`, or D4RL's name of this file."""
    if "env_id" in file.attrs:
        env_id = str(file.attrs["env_id"])
        try:
            if not isinstance(env_flags := json.loads(file.attrs.get("env_flags", "{}")), dict):
                raise ValueError
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} has env_flags that are no JSON object; give another file.") from error
        return None, env_id, env_flags, reference_scores(env_id)
    known = d4rl_name(Path(where).name)
    task = re.split("[-_]", known.lower())[0]
    if task not in TASKS or TASKS[task][1] != widths:  # hopper-mine.hdf5 is Hopper's if it has its sizes
        return None, None, {}, None
    return task, TASKS[task][0], {}, reference_scores(known)


def _load_robomimic(file: h5py.File, where: str, name: str, keys: tuple[str, ...]) -> OfflineDataset:
    data, limit, lengths, clipped = file["data"], _action_limit(file["data"]), [], []
    numbers = sorted(int(key[5:]) for key in data if re.fullmatch(r"demo_\d+", key))
    demos = {f"{where}, demo_{number}": data[f"demo_{number}"] for number in numbers}
    if not demos:
        raise UserError(f"{where} has no demonstrations, its group 'data' holds no 'demo_0'.")
    for here, demo in demos.items():
        rows = len(_checked(demo, "rewards", here, (None,)))
        done = np.flatnonzero(_read(demo, "dones", here, (rows,)))
        # success ends the world, not a person's hand; and without next_obs the last row has no outcome
        lengths.append(done[0] + 1 if len(done) else rows - ("next_obs" not in demo))
    demos = {here: demo for (here, demo), steps in zip(demos.items(), lengths, strict=True) if steps}
    lengths = [int(steps) for steps in lengths if steps]
    if not lengths:
        raise UserError(f"{where} has only episodes of one row, and so no transition; take another.")

    def low_dim(demo) -> list[str]:
        obs = demo.get("obs") if isinstance(demo.get("obs"), h5py.Group) else {}
        return sorted(key for key, value in obs.items() if getattr(value, "ndim", 4) < 4)  # no images

    def episodes() -> Iterator[tuple[str, dict]]:
        for (here, demo), steps in zip(demos.items(), lengths, strict=True):
            rows, parts = len(demo["rewards"]), []
            for key in keys or low_dim(demo):
                part = _read(demo.get("obs"), key, f"{here}, obs", (rows, None))
                if "next_obs" in demo:
                    final = _read(demo["next_obs"], key, f"{here}, next_obs", part.shape)[-1:]
                    part = np.concatenate([part, final])
                # what follows a termination, where it was not recorded, is its own observation
                parts.append(part[np.minimum(np.arange(steps + 1), len(part) - 1)])
            if not parts:
                raise UserError(f"{here} has no low-dimensional observation in its group 'obs'.")
            actions = _checked(demo, "actions", here, (rows, None))[:steps]
            outside = np.flatnonzero((np.abs(actions) > limit).any(axis=1)) if limit == RAW else ()
            if len(outside):
                raise UserError(f"{here} has actions beyond {limit:g}, row {outside[0]}; normalise them.")
            actions, beyond = _clip(actions, limit)
            clipped.append(beyond)
            ends = {key: _checked(demo, key, here, (rows,))[:steps] for key in ("rewards", "dones")}
            yield here, {"obs": np.concatenate(parts, axis=1), "actions": actions, **ends}

    dataset = _from_episodes(name, None, None, episodes(), lengths)
    _say_clipped(where, sum(clipped), sum(lengths))
    if limit != RAW:
        return dataset
    keys = tuple(keys or low_dim(next(iter(demos.values()))))
    flags = {"file": where, "keys": keys, "cameras": ("none",)}
    return dataclasses.replace(dataset, env_id=NAMED, env_flags=flags, normalized_actions=True)


def _load_minari(name: str) -> OfflineDataset:
    try:
        import gymnasium
        import minari  # here, since few need it

        source = minari.load_dataset(name, download=True)
    except Exception as error:  # of many types: no minari, no network, its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} cannot be loaded or downloaded ({reason}); run 'minari download {name}' where there is "
            "a network and copy the folder to $MINARI_DATASETS_PATH or ~/.minari/datasets."
        ) from error

    def episodes() -> Iterator[tuple[str, dict]]:
        for episode in source.iterate_episodes():
            arrays = {key: getattr(episode, key) for key in ("actions", "rewards", "terminations")}
            yield f"{name}, episode {episode.id}", {"observations": _flat(episode.observations), **arrays}

    spec, registered = source.env_spec, gymnasium.registry.get(source.env_spec and source.env_spec.id)
    plain = registered is not None and registered.kwargs == spec.kwargs  # what make(id) gives, unflattened
    env_id = spec.id if plain and isinstance(source.observation_space, gymnasium.spaces.Box) else None
    bounds = tuple(source.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    scores = reference_scores(env_id or "") if None in bounds else bounds
    metadata = source.storage.get_episode_metadata(source.episode_indices)
    lengths = [int(episode["total_steps"]) for episode in metadata]
    return _from_episodes(name, env_id, scores, episodes(), lengths)


def _flat(value) -> np.ndarray:
    """(T, S) of an observation that is a dict of arrays, as Gymnasium's FlattenObservation orders it."""
    if isinstance(value, dict):
        return np.concatenate([_flat(value[key]) for key in sorted(value)], axis=1)
    return np.asarray(value)


def _from_episodes(
    name: str, env_id: str | None, scores: tuple | None, episodes: Iterable[tuple], lengths: list[int]
) -> OfflineDataset:
    """Each episode: where it is, and a dict of T + 1 observations, T actions, rewards and terminations."""
    ends, count, width, action_width = np.cumsum(lengths), sum(lengths), None, None
    rewards, terminations = np.empty(count, np.float32), np.empty(count, bool)
    next_index = np.arange(1, count + 1)
    bar = tqdm(episodes, desc="reading episodes", total=len(lengths), delay=2, disable=None)
    for number, (where, episode) in enumerate(bar):
        observation_key, action_key, reward_key, termination_key = episode
        steps, final = lengths[number], count + number
        rows = slice(ends[number] - steps, ends[number])
        observation = _read(episode, observation_key, where, (steps + 1, width))
        action = _read(episode, action_key, where, (steps, action_width))
        if number == 0:
            width, action_width = observation.shape[1], action.shape[1]
            states = np.empty((count + len(lengths), width), np.float32)
            actions = np.empty((count, action_width), np.float32)
        states[rows], states[final], next_index[rows.stop - 1] = observation[:-1], observation[-1], final
        actions[rows] = action
        rewards[rows] = _read(episode, reward_key, where, (steps,))
        terminations[rows] = _read(episode, termination_key, where, (steps,)) != 0
    starts = ends - lengths
    return OfflineDataset(name, env_id, states, next_index, actions, rewards, terminations, starts, scores)


def save_d4rl(
    path: str | os.PathLike,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    next_observations: np.ndarray,
    terminations: np.ndarray,
    timeouts: np.ndarray,
    env_id: str | None = None,
    env_flags: Mapping = MappingProxyType({}),
) -> None:
    """Write N transitions, one episode after another in the order of time, in D4RL's layout, atomically.

    observations and next_observations (N, S), actions (N, A), rewards, terminations and timeouts (N,); any
    last row ends its episode. `env_id` is the Gymnasium id, or world, to evaluate in, `env_flags` its flags.
    UserError if an array is misshaped or not finite, CheckpointError if the disk refuses; a file that was
    there is then as it was.
    """
    arrays = {"rewards": rewards, "observations": observations, "next_observations": next_observations}
    arrays |= {"actions": actions, "terminals": terminations, "timeouts": timeouts}
    arrays = {key: np.asarray(array) for key, array in arrays.items()}
    shapes = dict.fromkeys(arrays, (arrays["rewards"].size,))
    shapes["observations"] = shapes["actions"] = (arrays["rewards"].size, None)
    shapes["next_observations"] = arrays["observations"].shape
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        for key, shape in shapes.items():
            found = _checked(arrays, key, str(path), shape)
            dtype = bool if key in ("terminals", "timeouts") else np.float32
            written = file.create_dataset(key, found.shape, dtype)
            for rows, block in _blocks(found, key, str(path)):
                written[rows] = block.astype(dtype)
        if env_id is not None:
            file.attrs["env_id"] = env_id
            file.attrs["env_flags"] = json.dumps(dict(env_flags))


def lasting_flags(args) -> dict:
    """The flags of `args`' world that say what it is, by name, as files have them: not what it saves."""
    said = marks(world_module(args.env).Args)
    return {name: value for name, value in world_flags(args).items() if FREE not in said[name]}


def check_append(path: str | os.PathLike, args) -> None:
    """UserError if the file to append to, where there is one, is not of the world of `args`, with its flags
    (which files had not before they were written there)."""
    if not Path(path).exists():
        return
    old, flags = load_dataset(path), json.loads(json.dumps(lasting_flags(args)))
    other = [name for name, value in old.env_flags.items() if value != flags.get(name, value)]
    if old.env_id != args.env or other:
        named = " ".join([old.env_id or "no known world", *(f"{x} {old.env_flags[x]}" for x in other)])
        raise UserError(f"{path} has steps of {named}; steps of {args.env} need a file of their own.")


def write_transitions(args, rows: torch.Tensor, count: int, widths: list[int], envs) -> None:
    """The first `count` rows of (T, N, W), N recordings of T steps in the order of time, as a D4RL file of
    `envs`' world, args.save_dataset, after what it holds already with args.append. widths: of the columns
    obs, action in [-1, 1], reward, terminated, truncated and next_obs."""
    path = args.save_dataset
    obs, action, reward, terminated, truncated, next_obs = rows.split(widths, -1)
    truncated = (truncated > 0).squeeze(-1)
    truncated[-1] |= terminated[-1, :, 0] == 0  # the recording ends here, the episode does not
    low, high = envs.action_bounds or (-1.0, 1.0)
    action = low + (action.numpy() + 1) / 2 * (high - low)
    columns = (obs, action, reward[..., 0], next_obs, terminated[..., 0] > 0, truncated)
    columns = [np.asarray(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count] for x in columns]
    if args.append and Path(path).exists():
        old = load_dataset(path)
        ended = np.zeros(len(old.actions), bool)
        ended[np.append(old.episode_starts[1:], 0) - 1] = True
        before = (old.observations, old.actions, old.rewards, old.next_observations, old.terminations)
        before = (*before, ended & ~old.terminations)
        columns = [np.concatenate(pair) for pair in zip(before, columns, strict=True)]
    save_d4rl(path, *columns, env_id=envs.env_id, env_flags=lasting_flags(args))
    say(f"{count} steps written to {path}")


def _download(url: str, path: Path) -> None:
    """Fetch `url` to `path` through `path`.part, where the next call goes on if this one breaks off."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # several seeds may start at once: the others wait here
            if path.exists():
                part.unlink(missing_ok=True)  # made by the line above, after the other's became `path`
                return
            total = _fetch(url, file)
            size = os.fstat(file.fileno()).st_size
            if total is not None and size < total:
                raise OSError(f"broke off after {size} of {total} bytes")
            with contextlib.suppress(OSError), h5py.File(part, "r", locking=False) as found:
                if size == (total or size) and {"observations", "actions", "rewards"} <= found.keys():
                    os.replace(part, path)
                    return
            file.truncate(0)
            raise OSError(f"its {size} bytes are no HDF5 file in D4RL's layout")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded ({error}); run this again to go on where it stopped, or download it "
            f"elsewhere and put it at {path}."
        ) from error


def _fetch(url: str, file: BinaryIO) -> int | None:
    """Append to `file` what it lacks of `url`, to the disk; the whole size in bytes if the server says it."""
    done = file.seek(0, os.SEEK_END)  # another process may have written while this one waited
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after these bytes: they are all, or of another file
            raise
        answer = error
    with answer:
        if answer.status == 200:  # a server without ranges starts over
            done = file.truncate(0)
        length = answer.headers.get("Content-Range") or answer.headers.get("Content-Length") or ""
        length = length.rpartition("/")[2]  # bytes 100-199/200
        total = int(length) if length.isdecimal() else None
        name = Path(file.name).stem
        with tqdm(desc=name, initial=done, total=total, unit="B", unit_scale=True, disable=None) as bar:
            while answer.status != 416 and (block := answer.read(2**20)):
                bar.update(file.write(block))
    file.flush()
    os.fsync(file.fileno())
    return total
