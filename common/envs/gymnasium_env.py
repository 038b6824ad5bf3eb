"""Gymnasium environments (CartPole-v1, Hopper-v5, gymnasium_robotics:FetchReach-v4) in the protocol of
`common.envs`: obs `{"proprio": float32 (P,)}`, one empty instruction, continuous actions in [-1, 1].

`proprio` is the observation's numbers, those of a Dict in the order of its names, each array flattened; uint8
pictures (H, W, 3) are the cameras of `image`. `success` of the last step's info, or `is_success`, is the
episode's.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass

import gymnasium
import numpy as np

from common import UserError
from common.envs.vector import as_array
from common.flags import NonNegativeInt

# What observations and rewards read between two steps and mjSTATE_INTEGRATION does not hold. These lag one
# physics step behind qpos (Ant's and Humanoid's rewards depend on that), so that mj_forward after mj_setState
# would not do.
DERIVED = ("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat")
DERIVED += ("cvel", "subtree_com", "cinert", "cfrc_ext", "qfrc_actuator", "ten_length", "ten_velocity")


@dataclass
class Args:
    """The flags of a Gymnasium id."""

    max_episode_steps: NonNegativeInt = 0
    """cut episodes (truncated) after this many steps, instead of the environment's own limit; 0 for that"""
    env_kwargs: str = "{}"
    """what else gymnasium.make is given, as JSON: '{"env_name": "reach-v3"}' for metaworld:Meta-World/MT1"""


def leaves(value, name=""):
    """Nested dicts, of spaces or of observations, as one, {names: what is there}, sorted at each level."""
    if not isinstance(value, (dict, gymnasium.spaces.Dict)):
        return {name: value}
    return {path: x for key in sorted(value) for path, x in leaves(value[key], f"{name}/{key}").items()}


def parse_kwargs(text):
    """The JSON `text` of an object -> a dict. UserError for anything else."""
    try:
        if isinstance(found := json.loads(text), dict):
            return found
        reason = type(found).__name__
    except ValueError as error:
        reason = error
    raise UserError(f"--env-kwargs {text} is no JSON object ({reason}); write it as '{{\"name\": 1}}'.")


def is_picture(space):
    return space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[-1] == 3


class GymnasiumEnv(gymnasium.Env):
    """Adapter around `gymnasium.make(id, **kwargs)`, the kwargs as the JSON `env_kwargs`.

    Box actions come in [-1, 1] (clipped) and are rescaled to the environment's bounds, Discrete ones as ints.
    `get_state`/`set_state` are exact for classic control and Gymnasium's MuJoCo environments; elsewhere
    `get_state` gives None. The other arguments: see `Args`. Raises UserError, one sentence, for an unknown
    id, a wrong argument or an unsupported space.
    """

    has_success = False  # what the steps tell counts all the same

    def __init__(self, id: str, max_episode_steps=0, env_kwargs="{}", **kwargs):
        from common.envs import WORLDS  # which names this file

        limit = max_episode_steps or None  # Gymnasium's TimeLimit, which `get_state` knows
        known = f"{', '.join(WORLDS)} and a Gymnasium id that observes vectors or pictures"
        kwargs |= parse_kwargs(env_kwargs)
        try:
            options = {"render_mode": "rgb_array"} | kwargs
            self.env = gymnasium.make(id, max_episode_steps=limit, disable_env_checker=True, **options)
        except (gymnasium.error.Error, ImportError) as error:
            why = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            raise UserError(f"unknown environment {id!r}: known are {known} ({why})") from error
        except (TypeError, ValueError, LookupError, AssertionError) as error:
            raise UserError(
                f"environment {id!r} cannot be made with {kwargs}: {str(error).split(' was raised')[0]}"
            ) from error
        obs_space, action_space = self.env.observation_space, self.env.action_space
        self.parts = leaves(obs_space)
        for part in self.parts.values():
            if not isinstance(part, gymnasium.spaces.Box):
                raise UserError(
                    f"environment {id!r} observes {type(part).__name__}, not a vector or a picture: known "
                    f"are {known}"
                )
        self.pictures = [path for path, part in self.parts.items() if is_picture(part)]
        self.vectors = [path for path in self.parts if path not in self.pictures]
        sizes = {self.parts[path].shape for path in self.pictures}
        if len(sizes) > 1:
            raise UserError(f"environment {id!r} observes pictures of several sizes, {sizes}; it needs one.")
        low, high = (
            np.concatenate([np.zeros(0), *(getattr(self.parts[path], end).ravel() for path in self.vectors)])
            for end in ("low", "high")
        )
        spaces = {"proprio": gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32))}
        if self.pictures:
            shape = (len(self.pictures), *sizes.pop())
            spaces["image"] = gymnasium.spaces.Box(0, 255, shape, np.uint8)
            spaces["task"] = gymnasium.spaces.Box(0, 0, (), np.int64)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.discrete = isinstance(action_space, gymnasium.spaces.Discrete)
        if self.discrete:
            self.action_space = gymnasium.spaces.Discrete(int(action_space.n))
            self.active_dims = np.ones(1, bool)
        elif isinstance(action_space, gymnasium.spaces.Box) and action_space.is_bounded():
            self.action_space = gymnasium.spaces.Box(-1.0, 1.0, action_space.shape, np.float32)
            self.active_dims = np.ones(action_space.shape, bool)
            self.action_bounds = action_space.low, action_space.high
        else:
            raise UserError(f"environment {id!r} acts in {action_space}: Discrete or bounded Box is needed")
        self.instructions = [""]
        self._obs = self._image = None  # what the simulator said last; `advance` computes it anyway

    def reset(self, *, seed=None, options=None):
        with self._values("obs, info"):
            obs, info = self.env.reset(seed=seed, options=options)
        self._take(obs)
        return self.observe(), info

    def advance(self, action):
        """One step: reward, terminated, truncated, info. `action`: (A,) in [-1, 1], or an int."""
        space = self.env.action_space
        if self.discrete:
            action = int(space.start) + int(action)
        else:
            unit = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            action = np.clip(low + unit * (high - low), low, high).astype(space.dtype)
        with self._values("obs, reward, terminated, truncated, info"):
            obs, reward, terminated, truncated, info = self.env.step(action)
        self._take(obs)
        if isinstance(info, dict) and "is_success" in info:  # of others `vector.py` says that they are wrong
            info.setdefault("success", info["is_success"])
        return reward, terminated, truncated, info

    def _take(self, obs):
        """Keeps an observation as `observe` shows it. One that is not of its space stays as it is, and is
        refused by `vector.py`."""
        found = {path: as_array(x) for path, x in leaves(obs).items()}
        self._obs = _float32(obs)
        shapes, wanted = ({path: x.shape for path, x in each.items()} for each in (found, self.parts))
        if shapes == wanted:
            parts = [_float32(found[path]).ravel() for path in self.vectors]
            self._obs = np.concatenate([np.zeros(0, np.float32), *parts])
            self._image = np.stack([found[path] for path in self.pictures]) if self.pictures else None

    @contextlib.contextmanager
    def _values(self, wanted):
        """UserError where the environment, or a wrapper of it, unpacks another number of values."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if "unpack" not in str(error):
                raise
            raise UserError(
                f"environment {self.env.spec.id!r} does not return {wanted} ({error}); it has to be mended "
                "there."
            ) from error

    def observe(self):
        pictures = {} if self._image is None else {"image": self._image.copy(), "task": np.int64(0)}
        return {"proprio": self._obs.copy()} | pictures

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def render(self):
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # no window to draw in
        try:
            return self.env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"--capture-video lacks a package: {' '.join(str(error).split())}") from error
        except Exception as error:  # mujoco, PyOpenGL and the driver each raise their own kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--capture-video needs OpenGL, which failed ({reason}); install EGL and set MUJOCO_GL=egl."
            ) from error

    def close(self):
        self.env.close()

    # -------------------------------------------------------------------------------- exact resume

    def _wrapper(self, kind):
        env = self.env
        while isinstance(env, gymnasium.Wrapper) and not isinstance(env, kind):
            env = env.env
        return env if isinstance(env, kind) else None

    def get_state(self):
        """The simulator's state as plain numbers, strings and arrays; None where it cannot be read."""
        env, family = self.env.unwrapped, type(self.env.unwrapped).__module__
        limit = self._wrapper(gymnasium.wrappers.TimeLimit)
        # Others' MuJoCo environments have goals and counters too, which are a subclass's of this to add.
        own = type(self) is not GymnasiumEnv and hasattr(env, "data")
        if own or family.startswith("gymnasium.envs.mujoco."):
            import mujoco

            spec = mujoco.mjtState.mjSTATE_INTEGRATION
            physics = np.empty(mujoco.mj_stateSize(env.model, spec), np.float64)
            mujoco.mj_getState(env.model, env.data, physics, spec)
            state = {"physics": physics, "derived": {k: getattr(env.data, k).copy() for k in DERIVED}}
        elif family.startswith("gymnasium.envs.classic_control."):
            state = {"physics": np.array(env.state)}
        else:
            return None
        state["obs"] = self._obs.copy()
        state["elapsed_steps"] = limit._elapsed_steps if limit else 0
        return state | {"np_random": _pack(env.np_random.bit_generator.state)}

    def set_state(self, state):
        """Goes on exactly where `get_state` was; also in an environment that was never reset."""
        self.env.reset(seed=0)  # satisfies the order-enforcing wrapper
        self.set_physics(state)
        if limit := self._wrapper(gymnasium.wrappers.TimeLimit):
            limit._elapsed_steps = int(state["elapsed_steps"])
        self._obs = np.asarray(state["obs"], np.float32).copy()
        rng = np.random.default_rng(0)
        rng.bit_generator.state = _unpack(state["np_random"])
        self.env.unwrapped.np_random = rng

    def set_physics(self, state):
        """The simulator's part of a state alone."""
        env, physics = self.env.unwrapped, np.asarray(state["physics"]).copy()
        if "derived" in state:
            import mujoco

            mujoco.mj_setState(env.model, env.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
            for name in DERIVED:
                getattr(env.data, name)[...] = np.asarray(state["derived"][name])
        else:
            env.state = physics


def _float32(obs):
    """Any kind of real numbers; others stay as they are, and are refused by `vector.py`."""
    obs = as_array(obs)
    with np.errstate(over="ignore"):  # what is too large is infinite then, and refused there
        return obs.astype(np.float32, order="C") if obs.dtype.kind in "biuf" else obs


def _pack(value):
    """PCG64's state with its 128-bit integers as strings, which torch.load(weights_only=True) takes."""
    return {k: _pack(v) for k, v in value.items()} if isinstance(value, dict) else str(value)


def _unpack(value):
    if isinstance(value, dict):
        return {k: _unpack(v) for k, v in value.items()}
    return int(value) if value.isdigit() else value


def make(id: str, spec=None, **kwargs) -> GymnasiumEnv:
    """The adapter around `gymnasium.make(id, **kwargs)`. spec: what to register as `id` if nothing is."""
    if spec:
        gymnasium.registry.setdefault(id, spec)
    return GymnasiumEnv(id, **kwargs)
