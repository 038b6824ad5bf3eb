"""OGBench's single-task environments (Park et al. 2024, arXiv:2410.20092) as a world, from states.

    python iql.py --dataset cube-single-play-singletask-task2-v0     # evaluated here; data: common/ogbench.py
    python sac.py --env ogbench --task puzzle-3x3-singletask-task1-v0

A reward is minus the number of things that are not yet as the task wants them; a step from where all are is a
success, and the episode's last. An environment takes 160 MB and a second to make.
"""

import contextlib
import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np

from common import UserError
from common.envs.gymnasium_env import Args as GymnasiumArgs
from common.envs.gymnasium_env import GymnasiumEnv, _float32, _pack, _unpack

PACKAGES = ("ogbench", "dm_control", "dm_env", "lxml", "scipy")
SPLITS = ("train", "eval")


@dataclass
class Args(GymnasiumArgs):
    """The flags of `--env ogbench`."""

    task: str = "cube-single-singletask-task2-v0"
    """OGBench's id of a single-task environment"""


def check_installed():
    """UserError without OGBench, which is told to be quiet."""
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise UserError(f"OGBench needs {', '.join(missing)}: python3 common/install.py --ogbench")
    for words in ("DISPLAY environment variable is missing", "lowered by casting", "possible render_modes"):
        warnings.filterwarnings("ignore", f".*{words}")


class OGBenchEnv(GymnasiumEnv):
    """The environment of the id `task`. An episode follows from its seed alone, a state is exact; what
    OGBench draws elsewhere is drawn here from that seed too."""

    has_success = True

    def __init__(self, task, split="eval", **kwargs):
        if "-singletask-" not in task:
            raise UserError(f"--task {task} is no single task; give one, as {Args.task}.")
        self.split, self.draws = SPLITS.index(split), np.random.PCG64()
        check_installed()
        with self.numpy_draws():
            super().__init__(f"ogbench:{task}", **kwargs)

    @contextlib.contextmanager
    def numpy_draws(self):
        """The mazes draw from numpy's global generator: for a call it is this environment's."""
        before = np.random.get_bit_generator()
        np.random.set_bit_generator(self.draws)
        try:
            yield
        finally:
            np.random.set_bit_generator(before)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.draws = np.random.PCG64([self.split, seed])
            seed = int(np.random.Generator(self.draws).integers(2**31))
        with self.numpy_draws():
            _, info = super().reset(seed=seed, options=options)
        inner = self.env.unwrapped
        if hasattr(inner, "compute_observation"):  # the arm has moved, by actions that no seed fixes
            for left in (inner.data.ctrl, inner.data.qacc_warmstart, inner.data.cfrc_ext):
                left[:] = 0
            self._obs = _float32(inner.compute_observation())
        return self.observe(), info

    def advance(self, action):
        with self.numpy_draws():
            return super().advance(action)

    def get_state(self):
        inner = self.env.unwrapped
        buttons = np.array(getattr(inner, "_cur_button_states", ()), np.int64)
        state = {"success": bool(getattr(inner, "_success", False)), "buttons": buttons}
        return super().get_state() | state | {"draws": _pack(self.draws.state)}

    def set_state(self, state):
        inner = self.env.unwrapped
        with self.numpy_draws():
            super().set_state(state)
        self.draws.state = _unpack(state["draws"])
        inner._success = state["success"]
        if len(state["buttons"]):
            inner._cur_button_states[:] = np.asarray(state["buttons"])
            inner._apply_button_states()  # locks; it moves what lags behind
            self.set_physics(state)


def make(task, split, **kwargs):
    """The contract's environment for these flags."""
    return OGBenchEnv(task, split, **kwargs)


def relabel(task, columns):
    """Rewards (N,) and masks (N,), 0 where the task is solved, of a step from each state, as the environment
    `task` gives them. columns: qpos (N, Q) and, if it has buttons, button_states (N, B)."""
    env, columns = OGBenchEnv(task), dict(columns)
    from ogbench.relabel_utils import relabel_dataset

    with env.numpy_draws():
        relabel_dataset(task, env.env, columns)
    env.close()
    return columns["rewards"], columns["masks"]
