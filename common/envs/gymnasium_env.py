"""Gymnasium environments with vector observations (CartPole-v1, Hopper-v5) in the protocol of `common.envs`:
obs `{"proprio": float32 (P,)}`, one empty instruction, continuous actions in [-1, 1]."""

import contextlib
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


class GymnasiumEnv(gymnasium.Env):
    """Adapter around `gymnasium.make(id, **kwargs)`.

    Box actions come in [-1, 1] (clipped) and are rescaled to the environment's bounds, Discrete ones as ints.
    `get_state`/`set_state` are exact for classic control and Gymnasium's MuJoCo environments; elsewhere
    `get_state` gives None. max_episode_steps: see `Args`. Raises UserError, one sentence, for an unknown id,
    a wrong argument or an unsupported space.
    """

    has_success = False

    def __init__(self, id: str, max_episode_steps=0, **kwargs):
        from common.envs import WORLDS  # which names this file

        limit = max_episode_steps or None  # Gymnasium's TimeLimit, which `get_state` knows
        known = f"{', '.join(WORLDS)} and a Gymnasium id with vector observations"
        try:
            options = {"render_mode": "rgb_array"} | kwargs
            self.env = gymnasium.make(id, max_episode_steps=limit, disable_env_checker=True, **options)
        except (gymnasium.error.Error, ImportError) as error:
            why = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            raise UserError(f"unknown environment {id!r}: known are {known} ({why})") from error
        except TypeError as error:
            raise UserError(
                f"environment {id!r} cannot be made with {kwargs}: {str(error).split(' was raised')[0]}"
            ) from error
        obs_space, action_space = self.env.observation_space, self.env.action_space
        if not isinstance(obs_space, gymnasium.spaces.Box) or len(obs_space.shape) != 1:
            raise UserError(
                f"environment {id!r} observes {type(obs_space).__name__}{obs_space.shape or ''}, "
                f"not a vector: known are {known}"
            )
        low, high = obs_space.low.astype(np.float32), obs_space.high.astype(np.float32)
        self.observation_space = gymnasium.spaces.Dict({"proprio": gymnasium.spaces.Box(low, high)})
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
        self._obs = None  # what the simulator said last; `advance` computes it anyway

    def reset(self, *, seed=None, options=None):
        with self._values("obs, info"):
            obs, info = self.env.reset(seed=seed, options=options)
        self._obs = _float32(obs)
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
        self._obs = _float32(obs)
        return reward, terminated, truncated, info

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
        return {"proprio": self._obs.copy()}

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
        env = self.env.unwrapped
        limit = self._wrapper(gymnasium.wrappers.TimeLimit)
        if hasattr(env, "model") and hasattr(env, "data"):  # Gymnasium's MuJoCo environments
            import mujoco

            spec = mujoco.mjtState.mjSTATE_INTEGRATION
            physics = np.empty(mujoco.mj_stateSize(env.model, spec), np.float64)
            mujoco.mj_getState(env.model, env.data, physics, spec)
            state = {"physics": physics, "derived": {k: getattr(env.data, k).copy() for k in DERIVED}}
        elif type(env).__module__.startswith("gymnasium.envs.classic_control."):
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
