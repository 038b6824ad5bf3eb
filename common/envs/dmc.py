"""The DeepMind Control Suite (Tassa et al. 2018), from states or pictures, and Visual D4RL's data of it (Lu
et al. 2023, arXiv:2206.04779).

    pip install --no-deps -r requirements-dmc.txt             # after requirements.txt
    python sac.py --env dmc --task walker-walk --run-name walker
    python sac.py --env dmc --task walker-walk --evaluate --checkpoint runs/walker --collect 20000 \\
      --save-dataset states.hdf5 --save-episodes walker_walk/           # pictures, as V-D4RL has them
    python bc_warmup.py --env dmc --demos walker_walk/ --chunk 1 --head gaussian --run-name eye
    python iql.py --dataset walker_walk/ --features runs/eye --no-normalize-rewards

Observation: the suite's own, one after another, as `proprio`, float32; or with --pictures the last
--frame-stack of them as `image`, uint8 (frames, size, size, 3), oldest first, the first one repeated, and
nothing else: `proprio` is a 0. Action float32 (A,) in [-1, 1], held for --action-repeat steps, whose rewards
are added: a return is between 0 and 1000. An episode ends by its time alone, which is a truncation.

V-D4RL's files are read in both of their layouts: folders of .npz, one an episode, `image` uint8 (T + 1, H, W,
3), or of .hdf5, `observation` uint8 (N, 3, H, W) of episodes that begin where `step_type` is 0. Row t has the
action and the reward that led to its picture. What they were drawn with, shadows, reflections and smooth
edges, takes ten times as long as without: what --save-episodes writes has none, and says so.
"""

import itertools
import os
import sys
import time
import traceback
import uuid
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np

from common import UserError
from common.flags import FREE, NonNegativeInt, PositiveInt

SPLITS = ("train", "eval")
REFERENCE_SCORES = (0.0, 1000.0)  # what V-D4RL's tables divide by, in percent
EXACT = ("acrobot", "ball_in_cup", "cartpole", "cheetah", "hopper", "humanoid", "pendulum", "walker")
LAYOUTS = {".npz": ("image", "action", "reward", "is_terminal")}
LAYOUTS |= {".hdf5": ("observation", "action", "reward", "discount", "step_type")}


@dataclass
class Args:
    """The flags of `--env dmc`."""

    task: str = "walker-walk"
    """domain and task, such as cheetah-run or humanoid-walk"""
    pictures: bool = False
    """see pictures instead of states"""
    size: PositiveInt = 64
    """the pictures' height and width; default the data's"""
    frame_stack: PositiveInt = 3
    """pictures of an observation"""
    action_repeat: PositiveInt = 2
    """steps of the suite that an action is held for"""
    shadows: bool = False
    """draw as V-D4RL's data are, ten times slower: with shadows, reflections and smooth edges; default as the
    data say"""
    horizon: NonNegativeInt = 0
    """decisions of an episode; 0 for the suite's 1000 steps"""
    save_episodes: Annotated[str | None, FREE] = None
    """a folder for the pictures of the training's episodes, or of --collect's, in V-D4RL's layout of 64
    pixels: a file an episode"""

    def defaults(self):
        """--dataset or --demos of pictures say how these were drawn."""
        data = getattr(self, "dataset", None) or getattr(self, "demos", None)
        files = episode_files(data) if data else []
        if not files:
            return {}
        first = next(episodes(files[:1]))
        return {"pictures": True, "size": first["image"].shape[1], "shadows": first["shadows"]}


class DMC(gym.Env):
    """See the module's docstring and `Args`. Raises UserError, one sentence, for what is unknown or not
    installed."""

    has_success = False

    def __init__(self, task="walker-walk", split="train", pictures=False, size=64, frame_stack=3,
                 action_repeat=2, shadows=False, horizon=0, save_episodes=None):  # fmt: skip
        try:
            with warnings.catch_warnings(action="ignore"):  # it looks for a display
                from dm_control import suite
        except ImportError as error:
            raise UserError(
                f"--env dmc lacks a package ({error}): pip install --no-deps -r requirements-dmc.txt"
            ) from error
        domain, _, name = task.partition("-")
        if (domain, name) not in suite.ALL_TASKS:
            known = ", ".join(f"{a}-{b}" for a, b in suite.ALL_TASKS)
            raise UserError(f"dmc has no task {task!r}; known: {known}.")
        self.env, self.domain, self.split = suite.load(domain, name), domain, split
        self.size, self.stack, self.repeat, self.shadows = size, frame_stack, action_repeat, shadows
        self.limit = horizon or -(-1000 // action_repeat)
        self.folder = Path(save_episodes) if save_episodes and split == "train" else None
        self.instructions, self.pictures, self.renderers = [f"{domain} {name}"], pictures, {}
        self.frames = self.rows = None  # the observation's pictures; what is to be written of the episode
        box, spec = gym.spaces.Box, self.env.action_spec()
        self.low, self.high = spec.minimum, spec.maximum
        width = 1 if pictures else sum(int(np.prod(x.shape)) for x in self.env.observation_spec().values())
        spaces = {"proprio": box(-np.inf, np.inf, (width,), np.float32)}
        if pictures:
            spaces["image"] = box(0, 255, (frame_stack, size, size, 3), np.uint8)
            spaces["task"] = box(0, 0, (), np.int64)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = box(-1, 1, spec.shape, np.float32)
        self.active_dims = np.ones(spec.shape, bool)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        layout = int(self.np_random.integers(2**31)) if seed is None else seed
        (number,) = np.random.SeedSequence([SPLITS.index(self.split), layout]).generate_state(1)
        self.env.task._random = np.random.RandomState(number)  # which draws nothing once the episode runs
        self.shown, self.steps = self.env.reset().observation, 0
        if self.pictures:
            self.frames = np.stack([self.draw(self.size)] * self.stack)
        if self.folder:
            self.rows = [(self.draw(self.size), np.zeros(self.action_space.shape, np.float32), 0.0, False)]
        return self.observe(), {}

    def advance(self, action):
        """A decision -> reward, terminated, truncated, info. What stacks pictures has to draw each."""
        action, reward = np.clip(action, -1, 1), 0.0
        for _ in range(self.repeat):
            found = self.env.step(self.low + (action + 1) / 2 * (self.high - self.low))
            reward += found.reward
            if found.last():
                break
        self.shown, self.steps = found.observation, self.steps + 1
        terminated = found.last() and found.discount == 0
        truncated = not terminated and (found.last() or self.steps >= self.limit)
        if self.pictures:
            self.frames = np.concatenate([self.frames[1:], self.draw(self.size)[None]])
        if self.rows:
            picture = self.frames[-1] if self.pictures else self.draw(self.size)
            self.rows.append((picture, action, reward, terminated))
            if terminated or truncated:
                self.write()
        return reward, terminated, truncated, {}

    def observe(self):
        if self.pictures:
            return {"image": self.frames.copy(), "proprio": np.zeros(1, np.float32), "task": np.int64(0)}
        parts = [np.ravel(x) for x in self.shown.values()]
        return {"proprio": np.concatenate(parts).astype(np.float32)}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def render(self):
        return self.draw(240)

    def draw(self, size):
        """uint8 (size, size, 3), by V-D4RL's camera."""
        import mujoco

        model, data = self.env.physics.model.ptr, self.env.physics.data.ptr
        if size not in self.renderers:
            try:
                headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
                if headless and os.environ.get("MUJOCO_GL", "egl") == "egl":
                    from mujoco.egl import GLContext  # MUJOCO_GL is read when mujoco is imported: too late

                    mujoco.rendering.classic.gl_context.GLContext = GLContext
                model.vis.quality.offsamples = 4 if self.shadows else 0
                self.renderers[size] = mujoco.Renderer(model, size, size)
            except Exception as error:  # mujoco, PyOpenGL and the driver each raise their own kind
                what = " ".join("".join(traceback.format_exception_only(error)).split())
                raise UserError(
                    "dmc's pictures need OpenGL (on a headless machine EGL, or OSMesa with "
                    f"MUJOCO_GL=osmesa), which failed with {what}."
                ) from error
        renderer = self.renderers[size]
        renderer.update_scene(data, 2 if self.domain == "quadruped" else 0)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = self.shadows
        return renderer.render()

    def close(self):
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}

    # -------------------------------------------------------------------------------- exact resume

    def get_state(self):
        """None for domains whose episodes change the model."""
        if self.domain not in EXACT:
            return None
        import mujoco

        model, data = self.env.physics.model.ptr, self.env.physics.data.ptr
        physics = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        rng, shown = self.np_random.bit_generator.state, {k: np.array(x) for k, x in self.shown.items()}
        return {
            "physics": physics, "sensors": data.sensordata.copy(), "frames": self.frames, "shown": shown,
            "steps": [self.steps, self.env._step_count],
            "rng": {k: str(v) for k, v in rng["state"].items()},
            "rng_buffer": [int(rng["has_uint32"]), int(rng["uinteger"])],
        }  # fmt: skip

    def set_state(self, state):
        """Goes on exactly; the episode that runs is not written to --save-episodes."""
        import mujoco

        self.env.reset()
        model, data = self.env.physics.model.ptr, self.env.physics.data.ptr
        physics = np.ascontiguousarray(state["physics"])
        mujoco.mj_setState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_step1(model, data)  # where dm_control leaves off, but for what it has of the step before:
        data.sensordata[:] = np.asarray(state["sensors"])
        self.steps, self.env._step_count = state["steps"]
        self.shown, self.rows = {k: np.asarray(x) for k, x in state["shown"].items()}, None
        self.frames = None if state["frames"] is None else np.asarray(state["frames"]).copy()
        self.np_random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {k: int(v) for k, v in state["rng"].items()},
            "has_uint32": state["rng_buffer"][0],
            "uinteger": state["rng_buffer"][1],
        }

    # -------------------------------------------------------------------------------- Visual D4RL

    def write(self):
        """The episode as a file of V-D4RL's, and whether it has shadows."""
        from common.checkpoint import atomic_path  # torch, which a worker does without until here

        image, action, reward, terminal = (np.stack(x) for x in zip(*self.rows, strict=True))
        place = np.arange(len(image))
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex}-{len(image) - 1}.npz"
        with atomic_path(self.folder / name) as temporary:
            np.savez_compressed(
                temporary, image=image, action=action.astype(np.float32), reward=reward.astype(np.float32),
                discount=1 - terminal.astype(np.float32), is_first=place == 0, is_last=place == place[-1],
                is_terminal=terminal, shadows=self.shadows,
            )  # fmt: skip
        self.rows = None


make = DMC


def episode_files(path):
    """V-D4RL's files of the folder `path`, or that one, in the order of their names; [] where there are none
    of its layouts."""
    import h5py

    path = Path(path)
    files = sorted(x for x in path.iterdir() if x.suffix in LAYOUTS) if path.is_dir() else [path]
    if not files or not files[0].is_file() or files[0].suffix not in LAYOUTS:
        return []
    if files[0].suffix == ".hdf5":
        try:
            with h5py.File(files[0], "r", locking=False) as file:
                return files if "observation" in file else []
        except OSError:
            return []
    return files


def episodes(files):
    """Of each episode `image` uint8 (T + 1, H, W, 3), `action` (T + 1, A), `reward` and `terminal` (T + 1,),
    as in the files, and whether they were drawn with `shadows`. UserError for what they should not be."""
    import h5py

    for file in files:
        keys, is_h5 = LAYOUTS[file.suffix], file.suffix == ".hdf5"
        try:
            with h5py.File(file, "r", locking=False) if is_h5 else np.load(file) as found:
                columns = {key: found[key] for key in keys}
                shadows = bool(found["shadows"][()]) if "shadows" in found else True
                image, action, *rest = columns.values()
                width = image.shape[-1] if is_h5 else image.shape[1]
                pictures = (3, width, width) if is_h5 else (width, width, 3)
                wrong = [
                    key for key, x in columns.items() if len(x) != len(image) or x.dtype.kind not in "biuf"
                ]
                if image.shape[1:] != pictures or image.dtype != np.uint8:
                    raise ValueError(f"pictures of {image.dtype} {image.shape[1:]}")
                if wrong or action.ndim != 2 or any(x.ndim != 1 for x in rest):
                    raise ValueError("columns that do not belong together")
                starts = np.flatnonzero(columns["step_type"][()] == 0) if is_h5 else np.zeros(1, int)
                for rows in map(slice, starts, [*starts[1:], len(image)]):
                    part = {key: x[rows] for key, x in columns.items()}
                    shown, action, reward, end, *_ = part.values()
                    if not (np.isfinite(action).all() and np.isfinite(reward).all()):
                        raise ValueError("NaN or infinity")
                    shown, ended = (shown.transpose(0, 2, 3, 1), end == 0) if is_h5 else (shown, end != 0)
                    yield dict(image=shown, action=action, reward=reward, terminal=ended, shadows=shadows)
        except (
            OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError, RuntimeError,
            zipfile.BadZipFile,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file} is damaged or not Visual D4RL's ({reason}); download it again."
            ) from error


def read_demonstrations(path, max_demos=None, outcomes=False, task="walker-walk", frame_stack=3, **_):
    """V-D4RL's episodes as `common.datasets.load_demonstrations` gives others; None for files of another
    layout. Row t has the action that followed its picture. With outcomes an episode's last picture is a row
    of its own, where nobody `decided`."""
    if not (files := episode_files(path)):
        return None
    found = list(itertools.islice(episodes(files), max_demos))
    lengths = np.array([len(episode["image"]) - (not outcomes) for episode in found])
    starts, side = np.cumsum(lengths) - lengths, found[0]["image"].shape[1]
    image = np.empty((lengths.sum(), frame_stack, side, side, 3), np.uint8)
    columns = {"action": [], "reward": [], "terminal": [], "decided": []}
    for episode, start, rows in zip(found, starts, lengths, strict=True):
        shown = episode.pop("image")  # of which all are too large to hold twice
        if shown.shape[1] != side:
            raise UserError(f"{path} has pictures of {side} and of {shown.shape[1]} pixels; give one kind.")
        image[start : start + rows] = shown[
            (np.arange(rows)[:, None] + np.arange(1 - frame_stack, 1)).clip(0)
        ]
        episode["decided"] = np.ones(len(shown))
        for (
            key,
            parts,
        ) in columns.items():  # what follows row t stands in row t + 1; the last picture has none
            parts.append(np.concatenate([episode[key][1:], np.zeros_like(episode[key][:1])])[:rows])
    action, reward, terminal, decided = (np.concatenate(parts) for parts in columns.values())
    return {
        "image": image, "actions": action.astype(np.float32).clip(-1, 1), "left_out": 0,
        "rewards": reward.astype(np.float32), "terminated": terminal.astype(bool),
        "decided": decided.astype(bool),
        "proprio": np.zeros((len(image), 1), np.float32), "task": np.zeros(len(image), np.int64),
        "instructions": [task.replace("-", " ", 1)], "episode_starts": starts,
        "success": np.ones(len(starts), bool),
    }  # fmt: skip
