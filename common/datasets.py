"""Data sets as flat arrays. Here: demonstrations in the HDF5 layout of RoboMimic and LIBERO."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from common import UserError
from common.checkpoint import atomic_path

IMAGE_KEYS = ("agentview_rgb", "eye_in_hand_rgb")  # LIBERO's names, and RoboMimic's for the same cameras
ROBOMIMIC_IMAGE_KEYS = {"agentview_rgb": "agentview_image", "eye_in_hand_rgb": "robot0_eye_in_hand_image"}
PROPRIO_KEYS = (  # the first set that a demonstration has; ours, LIBERO's, RoboMimic's
    ("proprio",),
    ("ee_pos", "ee_ori", "gripper_states"),
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
)


def load_demonstrations(
    path: str | os.PathLike, max_demos: int | None = None, image_keys: tuple[str, ...] = IMAGE_KEYS
) -> dict:
    """Read the first `max_demos` demonstrations by number as flat arrays of S steps in E episodes.

    Returns `image` uint8 (S, cameras, H, W, 3), `proprio` float32 (S, P), `actions` float32 (S, 7) in
    [-1, 1], `task` int64 (S,) into `instructions` (list of str), and `episode_starts` int64 (E,).
    `proprio` is the file's own, or position (m), axis-angle (rad) and the two fingers (m), P = 8.
    The instruction is the demonstration's, the file's, or RoboMimic's environment name in words. Images are
    as stored: LIBERO's published files hold them upside down, RoboMimic's upright.
    UserError naming file, demonstration and key if one is missing, misshaped, not finite or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is a folder; give an HDF5 file of demonstrations.")
    if max_demos is not None and max_demos < 1:
        raise UserError(f"max_demos is {max_demos}, it must be at least 1.")
    try:
        with h5py.File(path, "r") as file:
            return _load(file, path, max_demos, image_keys)
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for bytes that are no HDF5
        raise UserError(f"{path} is truncated or not HDF5 ({error}); download or record it again.") from error


def _load(file: h5py.File, path: Path, max_demos: int | None, image_keys: tuple[str, ...]) -> dict:
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        raise UserError(f"{path} has no group 'data'; it is not in the RoboMimic/LIBERO layout.")
    numbers = sorted(int(name[5:]) for name in data if re.fullmatch(r"demo_\d+", name))[:max_demos]
    demos = {number: data[f"demo_{number}"] for number in numbers}
    if not demos:
        raise UserError(f"{path} has no demonstrations, its group 'data' holds no 'demo_0'.")
    lengths = [len(_array(demo, "actions", f"{path}, demo_{i}")) for i, demo in demos.items()]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    arrays, instructions, tasks = {}, [], []
    for (number, demo), start, end in zip(demos.items(), starts[:-1], starts[1:], strict=True):
        where = f"{path}, demo_{number}"
        episode = _load_episode(demo, where, image_keys)
        for key, value in episode.items():
            if key not in arrays:  # one allocation for the file: images are too large to hold twice
                arrays[key] = np.empty((starts[-1], *value.shape[1:]), value.dtype)
            if arrays[key].shape[1:] != value.shape[1:]:
                raise UserError(
                    f"{where} has {key} of shape {value.shape[1:]}, those before {arrays[key].shape[1:]}."
                )
            arrays[key][start:end] = value
        instruction = _instruction(demo, data, where)
        instructions += [] if instruction in instructions else [instruction]
        tasks.append(instructions.index(instruction))
    task = np.repeat(np.array(tasks, np.int64), lengths)
    return {**arrays, "task": task, "episode_starts": starts[:-1], "instructions": instructions}


def _array(group: h5py.Group, key: str, where: str) -> h5py.Dataset:
    found = group.get(key) if isinstance(group, h5py.Group) else None
    if not isinstance(found, h5py.Dataset) or found.ndim == 0:
        raise UserError(f"{where} has no array '{key}'; it is not in the RoboMimic/LIBERO layout.")
    return found


def _load_episode(demo: h5py.Group, where: str, image_keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    proprio_keys = next((keys for keys in PROPRIO_KEYS if f"obs/{keys[0]}" in demo), PROPRIO_KEYS[0])
    camera_keys = [key if f"obs/{key}" in demo else ROBOMIMIC_IMAGE_KEYS.get(key, key) for key in image_keys]
    actions = _array(demo, "actions", where)[()]
    parts = {key: _array(demo, f"obs/{key}", where)[()] for key in proprio_keys}
    cameras = {key: _array(demo, f"obs/{key}", where)[()] for key in camera_keys}
    _check_episode(actions, parts, cameras, where)
    parts = [_axis_angle(value) if key.endswith("_quat") else value for key, value in parts.items()]
    return {
        "image": np.stack(list(cameras.values()), axis=1),  # (T, cameras, H, W, 3)
        "proprio": np.concatenate(parts, axis=1).astype(np.float32),
        "actions": actions.astype(np.float32),
    }


def _check_episode(
    actions: np.ndarray, parts: dict[str, np.ndarray], cameras: dict[str, np.ndarray], where: str
) -> None:
    """UserError unless actions are (T, 7), parts of the proprioception (T, p), cameras (T, H, W, 3)."""
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
    if len(actions) == 0 or actions.shape[1] != 7:
        raise UserError(
            f"{where} has actions of shape {actions.shape}; it needs (T, 7) with at least one step."
        )
    outside = np.flatnonzero((np.abs(actions) > 1.001).any(axis=1))  # 0.001 for what recorders round
    if len(outside):
        raise UserError(f"{where} has actions outside [-1, 1] in row {outside[0]}; normalise them first.")
    size = next(iter(cameras.values())).shape[1:]
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


def _instruction(demo: h5py.Group, data: h5py.Group, where: str) -> str:
    try:
        if "language_instruction" in demo.attrs:
            instruction = demo.attrs["language_instruction"]
        elif "problem_info" in data.attrs:  # text or a list of letters
            instruction = "".join(json.loads(data.attrs["problem_info"])["language_instruction"])
        else:  # NutAssemblySquare -> nut assembly square
            name = json.loads(data.attrs["env_args"])["env_name"]
            instruction = re.sub(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} has no instruction; set its attribute 'language_instruction'.") from error
    instruction = instruction.decode() if isinstance(instruction, bytes) else str(instruction)
    return instruction.strip().strip('"')


def save_demonstrations(
    path: str | os.PathLike, episodes: Iterable[dict], image_keys: tuple[str, ...] = IMAGE_KEYS
) -> None:
    """Write episodes, one at a time and atomically, in the layout that `load_demonstrations` reads.

    An episode is a dict of `image` uint8 (T, cameras, H, W, 3), `proprio` float (T, P), `actions` float
    (T, 7) in [-1, 1] and `instruction` (str); `image_keys` names its cameras. UserError as in
    `load_demonstrations`, CheckpointError if the disk refuses.
    """
    count = 0
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        for count, episode in enumerate(episodes, start=1):
            where = f"{path}, demo_{count - 1}"
            image, proprio, actions = (np.asarray(episode[key]) for key in ("image", "proprio", "actions"))
            if image.ndim != 5 or image.shape[1] != len(image_keys):
                raise UserError(
                    f"{where} has image of shape {image.shape}; it needs (T, {len(image_keys)}, H, W, 3)."
                )
            cameras = {key: image[:, i] for i, key in enumerate(image_keys)}
            _check_episode(actions, {"proprio": proprio}, cameras, where)
            demo = data.create_group(f"demo_{count - 1}")
            demo.attrs["num_samples"] = len(actions)
            demo.attrs["language_instruction"] = episode["instruction"]
            demo["actions"] = actions.astype(np.float32)
            demo["obs/proprio"] = proprio.astype(np.float32)
            for key, value in cameras.items():
                demo[f"obs/{key}"] = value
        data.attrs["total"] = sum(demo.attrs["num_samples"] for demo in data.values())
        if count == 0:
            raise UserError(f"{path} would hold no demonstrations; record at least one.")


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
