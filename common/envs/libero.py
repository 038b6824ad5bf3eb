"""LIBERO (Liu et al. 2023): its five suites of language-conditioned manipulation in robosuite, 130 tasks.

    pip install --no-deps -r requirements-libero.txt      # after requirements.txt
    export LIBERO_ASSETS=/folder/with/the/assets          # else LIBERO downloads them from the Hub

The default protocol "oft" is openvla-oft's (Kim et al. 2025, run_libero_eval.py), to the letter: what the policy
sees and the physics equal its stock loop bit for bit (`tests/test_libero.py`). Environment seed 0, the k-th of
the task's 50 initial states in the k-th episode (the seed matters: it places the fixtures, which a stored state
does not hold), 10 settling steps with [0, 0, 0, 0, 0, 0, -1], 220/280/300/520/400 steps for
spatial/object/goal/10/90, success = the goal's predicates after any step. "simplevla" is SimpleVLA-RL's: 512
steps everywhere, a fresh simulator (so the fixtures of episode 0) in every episode.

Observation: `image` uint8 (cameras, size, size, 3), rendered at 256 and turned by 180 degrees as OpenVLA's training
data; `proprio` float32 (8,) = end effector's position 3 (m) and axis-angle 3 (rad), fingers 2 (m). JPEG, resizing
to 224, the 0.9 crop and all normalisation belong to the model: `common/backbones`. Action float32 (7,), LIBERO's
own: delta position (1 = 5 cm) and axis-angle (1 = 0.5 rad), gripper by its sign (-1 opens, +1 closes), 20 Hz. What
maps a model's gripper (OpenVLA: 1 = open, 0 = closed) to it belongs to the model's un-normalisation.

Split "eval": reset(seed=k) is task k % T of the T chosen ones, initial state k // T % 50. Split "train": fresh
draws from LIBERO's own placement distribution, so no evaluation state is trained on; everybody else trains on the
50 evaluated states, which `train_on_eval_states` reproduces.
"""

import functools
import importlib.util
import logging
import multiprocessing
import os
import sys
import tempfile
import weakref
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import psutil
import torch

from common import UserError

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
PROTOCOLS = {  # steps of an episode, after the settling
    "oft": dict(zip(SUITES, (220, 280, 300, 520, 400), strict=True)),
    "simplevla": dict.fromkeys(SUITES, 512),
}
SPLITS = ("train", "eval")
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
SETTLE_STEPS, SETTLE_ACTION = 10, np.array([0, 0, 0, 0, 0, 0, -1.0])
NUM_STATES = 50  # initial states of a task
SUBSTEPS = 25  # of 2 ms: 20 Hz
SEEN = (
    23  # the substep that robosuite's sensors show, by their own arithmetic: 2 to 4 ms before the step's end
)
WORKER_BYTES = 1.2e9  # of its own, measured, for one task and software rendering
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "textures")
GL_HINT = (
    "LIBERO renders with OpenGL, which failed ({}); install EGL (apt-get install libegl1 libgl1-mesa-dri), choose the "
    "GPU with MUJOCO_EGL_DEVICE_ID, or set MUJOCO_GL=osmesa (apt-get install libosmesa6)."
)


def _oneline(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


@functools.cache
def _libero():
    """Imports robosuite and LIBERO, quietly -> the packages' root `libero.libero`."""
    missing = [name for name in ("robosuite", "libero", "bddl") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--env libero needs {' and '.join(missing)}; pip install --no-deps -r requirements-libero.txt."
        )
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # software rendering: one thread a worker
    root = Path(importlib.util.find_spec("libero").origin).parent / "libero"
    folder = os.environ.get("LIBERO_CONFIG_PATH")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            # Without this file LIBERO asks questions on stdin when imported; none of its paths is used here.
            (Path(temporary) / "config.yaml").write_text(f"benchmark_root: {root}\n")
            os.environ["LIBERO_CONFIG_PATH"] = temporary
            import libero.libero as package
            import libero.libero.benchmark
            import libero.libero.envs.env_wrapper
    except ImportError as error:
        if error.name and not error.name.startswith(("OpenGL", "mujoco")):
            raise UserError(
                f"--env libero needs {error.name}; pip install --no-deps -r requirements-libero.txt."
            ) from error
        raise UserError(GL_HINT.format(_oneline(error))) from error
    except (
        AttributeError,
        OSError,
        RuntimeError,
        ValueError,
        AssertionError,
    ) as error:  # PyOpenGL and robosuite
        raise UserError(GL_HINT.format(_oneline(error))) from error
    finally:
        os.environ.pop("LIBERO_CONFIG_PATH")
        if folder:
            os.environ["LIBERO_CONFIG_PATH"] = folder
    assets = os.environ.get("LIBERO_ASSETS")
    if assets and not all((Path(assets) / name).is_dir() for name in ASSET_FOLDERS):
        raise UserError(
            f"LIBERO_ASSETS={assets} holds no LIBERO assets (the folders {', '.join(ASSET_FOLDERS)})."
        )
    package._assets_path_cache = assets
    if not all((Path(package.get_assets_path()) / name).is_dir() for name in ASSET_FOLDERS):
        raise UserError(
            "LIBERO's assets are missing and could not be downloaded; set LIBERO_ASSETS to their folder."
        )
    return package


def _initial_states(suite, task):
    """The benchmark's states of a task, float64 (50, time + qpos + qvel)."""
    file = Path(_libero().__file__).parent / "init_files" / suite / task.init_states_file
    array = np._core.multiarray
    # A pickle; with these four names allowed and no others, nothing in it can run.
    allowed = [(array._reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    with torch.serialization.safe_globals([*allowed, type(np.dtype(np.float64))]):
        return torch.load(file, weights_only=True)


def _check_memory():
    """UserError unless this worker and those beside it can grow to what a simulation takes."""
    parent = multiprocessing.parent_process()
    workers = psutil.Process(parent.pid).children() if parent else [psutil.Process()]
    growth = 0
    for worker in workers:
        try:
            growth += max(0, WORKER_BYTES - worker.memory_full_info().uss)
        except psutil.Error:  # it ended
            continue
    free = psutil.virtual_memory().available
    if growth > free:
        raise UserError(
            f"LIBERO takes about {WORKER_BYTES / 1e9:.1f} GB for each worker process, and {len(workers)} of them "
            f"need {growth / 1e9:.1f} GB more than the {free / 1e9:.1f} GB that are free; use fewer --num-workers."
        )


class Simulation:
    """A task's compiled simulator and renderer. The environments of a process share it and take turns, which
    keeps host and GPU memory to one copy a task; what belongs to an episode is in `save` and `load`."""

    def __init__(self, suite, index, size):
        libero = _libero()
        self.task = list(libero.benchmark.task_maps[suite].values())[index]
        self.states = _initial_states(suite, self.task)
        self.owner, self.renderer, self.size = None, None, size
        _check_memory()
        bddl = Path(libero.__file__).parent / "bddl_files" / suite / self.task.bddl_file
        self.wrapper = libero.envs.env_wrapper.ControlEnv(
            str(bddl), use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False
        )
        self.env = self.wrapper.env
        self.env._observables = {}  # object poses in every substep: nobody asks
        self.properties = list(self.env.object_property_initializers)
        self.random_states = [np.random.RandomState(0).get_state()]  # before the k-th reset after seed(0)
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot = self.env.robots[0]
        self.fingers = np.array(self.robot._ref_gripper_joint_pos_indexes)
        self.hand = self.model.body(self.robot.robot_model.eef_name).id
        self.seen = self.data.qpos.copy(), self.data.qpos[self.fingers].copy()
        self.physics = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))

    # --- episodes

    def _place(self, random_state, resets):
        """robosuite's reset without compiling the model anew -> numpy's random state after it. A compiling reset
        would have registered the drawers' and knobs' samplers once more each time: draws that count."""
        from robosuite.utils.errors import RandomizationError

        outer = np.random.get_state()
        np.random.set_state(random_state)
        self.env.object_property_initializers = self.properties * (resets + 2)
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        try:
            while True:
                try:
                    self.env.reset()
                    return np.random.get_state()
                except RandomizationError:  # no room: draw again
                    continue
        finally:
            np.random.set_state(outer)

    def begin(self, seed=None, state=None, resets=0):
        """An episode from a random placement (`seed`), or from initial state number `state` with the fixtures where
        the `resets`-th reset after env.seed(0) puts them."""
        if state is None:
            self._place(np.random.RandomState(seed).get_state(), 0)
        else:
            while len(self.random_states) <= resets:
                self.random_states.append(self._place(self.random_states[-1], len(self.random_states) - 1))
            self._place(self.random_states[resets], resets)
            self.wrapper.set_init_state(self.states[state])
        for _ in range(SETTLE_STEPS):
            self.step(SETTLE_ACTION)

    def step(self, action):
        """One control step (50 ms) -> success. robosuite computes the dynamics three times in a substep; MuJoCo's
        step in two halves around the controller gives the same bits in half the time."""
        self.env._post_process()  # the stove's flame, of the last state: the picture shows it a step late
        self.env.sim.forward = lambda: None
        for substep in range(SUBSTEPS):
            if substep == SEEN:
                qpos = self.data.qpos.copy()  # the bodies are seen where this substep found them,
            mujoco.mj_step1(self.model, self.data)
            self.env._pre_action(action, substep == 0)
            mujoco.mj_step2(self.model, self.data)
            if substep == SEEN:
                self.seen = (
                    qpos,
                    self.data.qpos[self.fingers].copy(),
                )  # the fingers' joints where it left them
        del self.env.sim.forward
        return bool(self.env._check_success())

    def save(self):
        mujoco.mj_getState(self.model, self.data, self.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        controller, m = self.robot.controller, self.model
        arrays = {
            "physics": self.physics,
            "body_pos": m.body_pos,
            "body_quat": m.body_quat,
            "seen": self.seen[0],
        }
        arrays |= {"fingers": self.seen[1], "site_rgba": m.site_rgba, "goal_pos": controller.goal_pos}
        arrays |= {"goal_ori": controller.goal_ori, "gripper": self.robot.gripper.current_action}
        return {name: np.array(x) for name, x in arrays.items()}

    def load(self, saved):
        saved = {name: np.array(x) for name, x in saved.items()}
        for name in ("body_pos", "body_quat", "site_rgba"):
            getattr(self.model, name)[:] = saved[name]
        mujoco.mj_setState(self.model, self.data, saved["physics"], mujoco.mjtState.mjSTATE_INTEGRATION)
        self.robot.controller.goal_pos, self.robot.controller.goal_ori = saved["goal_pos"], saved["goal_ori"]
        self.robot.controller.new_update = True  # nothing cached of another episode
        self.robot.gripper.current_action = saved["gripper"]
        self.seen = saved["seen"], saved["fingers"]

    # --- what is seen

    def look(self, cameras, mirrored):
        """-> pictures uint8 (cameras, size, size, 3), end effector's position (3,), quaternion (4,) w first, fingers
        (2,), as robosuite's sensors give them after the last step. mirrored: turned by 180 degrees from
        OpenGL's upside-down, which is upright and left-right flipped."""
        d, qpos = self.data, self.data.qpos.copy()
        d.qpos[:] = self.seen[0]
        mujoco.mj_kinematics(self.model, d)
        mujoco.mj_camlight(self.model, d)
        pictures = [self._render(CAMERAS[name])[:, :: -1 if mirrored else 1] for name in cameras]
        d.qpos[:] = qpos  # all that was computed from it, the next step computes again
        return pictures, d.site_xpos[self.robot.eef_site_id].copy(), d.xquat[self.hand].copy(), self.seen[1]

    def _render(self, camera):
        if self.renderer is None:
            try:
                backend = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")  # robosuite sets it
                mujoco.rendering.classic.gl_context.GLContext = backend.GLContext
                buffer = self.model.vis.global_
                buffer.offwidth, buffer.offheight = (
                    max(buffer.offwidth, self.size),
                    max(buffer.offheight, self.size),
                )
                self.renderer = mujoco.Renderer(self.model, self.size, self.size, max_geom=1000)
            except Exception as error:  # mujoco, PyOpenGL and the driver each raise their own kind
                raise UserError(GL_HINT.format(_oneline(error))) from error
            self.options = mujoco.MjvOption()
            self.options.geomgroup[0] = 0  # collision shapes
        self.renderer.update_scene(self.data, camera, self.options)
        return self.renderer.render()

    def __del__(self):
        if getattr(self, "renderer", None):
            self.renderer._gl_context.make_current()  # else it would free the objects of another simulation
            self.renderer.close()


_simulations = weakref.WeakValueDictionary()  # of this process; the environments hold them


class LiberoEnv(gym.Env):
    """See the module's docstring; `advance` is the physics, `observe` renders.

    suite: one of `SUITES`.  tasks: numbers within it, or instructions; default all.  split: "train" or "eval".
    protocol: "oft" or "simplevla".  cameras: of "agentview" and "wrist", in this order for OpenVLA-OFT.  size:
    pixels, the protocols' 256.  max_steps: instead of the protocol's.  Raises UserError, in one sentence, for what
    is unknown, not installed, or missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    has_success = True
    active_dims = np.ones(7, bool)

    def __init__(self, suite="libero_spatial", tasks=(), split="train", protocol="oft", train_on_eval_states=False,
                 cameras=("agentview",), size=256, max_steps=None):  # fmt: skip
        known = {"suite": (suite, SUITES), "split": (split, SPLITS), "protocol": (protocol, tuple(PROTOCOLS))}
        for name, (value, values) in known.items():
            if value not in values:
                raise UserError(f"LIBERO has no {name} {value!r}; known: {', '.join(values)}.")
        if not cameras or any(camera not in CAMERAS for camera in cameras):
            raise UserError(
                f"LIBERO has the cameras {' and '.join(CAMERAS)}, not {' '.join(cameras) or 'none'}."
            )
        if size < 1 or (max_steps or 1) < 1:
            raise UserError(f"size and max_steps must be at least 1, got {size} and {max_steps}.")
        self.instructions = [task.language for task in _libero().benchmark.task_maps[suite].values()]
        self.tasks = [self._number(task, suite) for task in tasks] or list(range(len(self.instructions)))
        self.suite, self.split, self.protocol, self.cameras, self.size = suite, split, protocol, cameras, size
        self.fixed_states = split == "eval" or train_on_eval_states
        self.max_steps = max_steps or PROTOCOLS[protocol][suite]
        box = gym.spaces.Box
        self.observation_space = gym.spaces.Dict(
            image=box(0, 255, (len(cameras), size, size, 3), np.uint8),
            proprio=box(-np.inf, np.inf, (8,), np.float32),
            task=box(0, len(self.instructions) - 1, (), np.int64),
        )
        self.action_space = box(-1, 1, (7,), np.float32)
        self.simulation, self.parked = None, None

    def _number(self, task, suite):
        if str(task).isdecimal() and int(task) < len(self.instructions):
            return int(task)
        if task in self.instructions:
            return self.instructions.index(task)
        last = len(self.instructions) - 1
        raise UserError(f"{suite} has no task {task!r}; give numbers from 0 to {last}, or instructions.")

    def _turn(self):
        """This environment's simulation, in the state of its episode."""
        simulation = self.simulation
        if simulation.owner is not self:
            if simulation.owner:
                simulation.owner.parked = simulation.save()
            if self.parked:
                simulation.load(self.parked)
            simulation.owner, self.parked = self, None
        return simulation

    def _enter(self, task):
        """Gives up the running episode and takes a place at the simulation of `task`."""
        if self.simulation and self.simulation.owner is self:
            self.simulation.owner = None
        self.parked, self.task = None, task
        key = (self.suite, task, self.size)
        if not (self.simulation and self.key == key):
            self.close()
            self.simulation = _simulations.get(key)
            if self.simulation is None:
                self.simulation = _simulations[key] = Simulation(*key)
            self.key = key
        return self._turn()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fixed_states:
            number = seed if self.split == "eval" else None
            if number is None:
                number = int(self.np_random.integers(len(self.tasks) * NUM_STATES))
            state = number // len(self.tasks) % NUM_STATES
            resets = state if self.protocol == "oft" else 0
            self._enter(self.tasks[number % len(self.tasks)]).begin(state=state, resets=resets)
        else:
            task = self.tasks[self.np_random.integers(len(self.tasks))]
            self._enter(task).begin(seed=self.np_random.integers(2**32))
        self.steps = 0
        return self.observe(), {"success": False}

    def advance(self, action):
        """One control step of physics: action (7,) -> reward, terminated, truncated, info; renders nothing."""
        success = self._turn().step(np.clip(action, -1, 1).astype(np.float64))
        self.steps += 1
        return float(success), success, not success and self.steps >= self.max_steps, {"success": success}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def observe(self):
        pictures, position, quaternion, fingers = self._turn().look(self.cameras, True)
        proprio = np.concatenate([position, axis_angle(quaternion), fingers])
        return {
            "image": np.stack(pictures), "proprio": proprio.astype(np.float32), "task": np.int64(self.task)
        }  # fmt: skip

    def render(self):
        """Both cameras side by side, upright, for a video: uint8 (size, 2 size, 3)."""
        return np.concatenate(self._turn().look(CAMERAS, False)[0], 1)

    def close(self):
        if self.simulation and self.simulation.owner is self:
            self.simulation.owner = None
        self.simulation = None

    def get_state(self):
        rng = self.np_random.bit_generator.state
        return {
            "episode": [self.task, self.steps],
            "simulation": self._turn().save(),
            "rng": {k: str(v) for k, v in rng["state"].items()},
            "rng_buffer": [int(rng["has_uint32"]), int(rng["uinteger"])],
        }

    def set_state(self, state):
        task, self.steps = (int(x) for x in state["episode"])
        self._enter(task).load(state["simulation"])
        self.np_random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {k: int(v) for k, v in state["rng"].items()},
            "has_uint32": state["rng_buffer"][0],
            "uinteger": state["rng_buffer"][1],
        }


def axis_angle(quaternion):
    """Unit quaternion (4,), w first -> axis times angle (3,) in rad, robosuite's formula: 2 acos(w) xyz / sqrt(1 -
    w^2), so the angle is in [0, 2 pi]."""
    w = np.clip(quaternion[0], -1, 1)
    length = np.sqrt(1 - w * w)
    return np.zeros(3) if length < 1e-12 else quaternion[1:] * 2 * np.arccos(w) / length


def make(**kwargs):
    """The world's constructor for `common.envs.make_envs`."""
    return LiberoEnv(**kwargs)
