"""LIBERO (Liu et al. 2023): 130 language-conditioned tasks in five suites, in robosuite.

    pip install --no-deps -r requirements-libero.txt      # after requirements.txt
    export LIBERO_ASSETS=/folder/with/the/assets          # else LIBERO downloads them from the Hub

The protocol "oft" is openvla-oft's (Kim et al. 2025, run_libero_eval.py) to the letter: physics, pictures and
proprioception equal its stock loop's bit for bit. Environment seed 0 and the k-th initial state in a task's
k-th episode (a stored state does not hold the fixtures; the random numbers that follow from the seed place
them), 10 settling steps with [0, 0, 0, 0, 0, 0, -1], then 220, 280, 300, 520, 400 steps for spatial, object,
goal, 10, 90. "simplevla" is SimpleVLA-RL's: 512 steps, the fixtures of episode 0 in every episode.

Observation: `image` uint8 (cameras, size, size, 3), rendered and turned by 180 degrees; JPEG, Lanczos, crop
and all normalisation are the model's. `proprio` float32 (8,): end effector's position 3 (m) and axis-angle 3
(rad), fingers 2 (m). Action float32 (7,), LIBERO's own: the set point's shift (1 = 5 cm), rotation (1 = 0.5
rad), gripper by its sign (-1 opens, 1 closes; OpenVLA's 1 = open, 0 = closed is turned round where the model
un-normalises). 20 Hz. The reward is 1 at success, which ends the episode.

Split "eval": reset(seed=k) is task k % T of T, initial state k // T % 50. Split "train": fresh draws from the
distribution that these states came from, so that none of them is trained on; elsewhere training uses the
evaluation's 50, which `train_on_eval_states` reproduces.
"""

import atexit
import functools
import gc
import importlib.util
import logging
import os
import tempfile
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import psutil
import torch

from common import UserError
from common.envs import task_chances
from common.memory import available_memory


def _no_gl(error):
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    return UserError(
        f"LIBERO needs OpenGL, which failed with {what}; install EGL (apt-get install libegl1 libgl1-mesa-dri"
        "), choose a GPU with MUJOCO_EGL_DEVICE_ID, or set MUJOCO_GL=osmesa (apt-get install libosmesa6)."
    )


try:
    import mujoco  # with the OpenGL that MUJOCO_GL names
except (AttributeError, OSError, RuntimeError) as error:
    raise _no_gl(error) from error

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
PROTOCOLS = {  # steps of an episode
    "oft": dict(zip(SUITES, (220, 280, 300, 520, 400), strict=True)),
    "simplevla": dict.fromkeys(SUITES, 512),
}
SPLITS = ("train", "eval")
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
DEMO_KEYS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
DEMO_PROPRIO = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}
NOOP = 1e-4  # a smaller motion is none
NUM_STATES = 50  # initial states of a task
SETTLE_STEPS, SETTLE_ACTION = 10, np.array([0.0, 0, 0, 0, 0, 0, -1])
SUBSTEPS = 25  # of 2 ms: 20 Hz
SEEN = 23  # the substep that robosuite's sensors, by their arithmetic, show for each of them
WORKER_GB, TASK_GB = 1.5, 0.4  # a worker process (spatial 1.1, 10 1.9), and each further task in it
ASSETS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")
INSTALL = "pip install --no-deps -r requirements-libero.txt"
GPUS = len([*Path("/dev").glob("nvidia[0-9]*")])
STATE = mujoco.mjtState.mjSTATE_INTEGRATION
PLACED = ("body_pos", "body_quat", "site_rgba")  # what an episode changes in the model
CONTROLLED = ("goal_pos", "goal_ori", "initial_joint")  # and in the controller


@dataclass
class Args:
    """The flags of `--env libero`."""

    suite: str = "libero_spatial"
    """libero_spatial, libero_object, libero_goal, libero_10, libero_90"""
    tasks: tuple[str, ...] = ()
    """numbers in the suite, or instructions; empty for all"""
    cameras: tuple[str, ...] = ("agentview",)
    """the pictures that the policy sees (agentview, wrist)"""
    protocol: Literal["oft", "simplevla"] = "oft"
    """whose evaluation is followed, openvla-oft's or SimpleVLA-RL's"""
    train_on_eval_states: bool = False
    """train on the initial states of the evaluation, as published results do"""

    def defaults(self):
        """The protocol's 50 initial states of a task, each once."""
        tasks = len(self.tasks) or (90 if self.suite == "libero_90" else 10)
        return {"eval_episodes": NUM_STATES * tasks}


@functools.cache
def _libero():
    """The package `libero.libero`, imported without its questions on stdin."""
    missing = [name for name in ("robosuite", "libero", "bddl") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--env libero needs {' and '.join(missing)}: {INSTALL}")
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # software rendering: a core for each worker
    config = os.environ.get("LIBERO_CONFIG_PATH")
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.yaml").touch()  # there, hence no questions; nothing here reads it
            os.environ["LIBERO_CONFIG_PATH"] = folder
            import libero.libero as package
            import libero.libero.benchmark
            import libero.libero.envs.env_wrapper
    except ModuleNotFoundError as error:
        raise UserError(f"--env libero needs {error.name}: {INSTALL}") from error
    except Exception as error:  # PyOpenGL, mujoco and robosuite each raise their own kind
        raise _no_gl(error) from error
    finally:
        os.environ.pop("LIBERO_CONFIG_PATH", None)
        os.environ |= {"LIBERO_CONFIG_PATH": config} if config else {}
    assets = package._assets_path_cache = os.environ.get("LIBERO_ASSETS") or package.get_assets_path()
    if not all((Path(assets) / name).is_dir() for name in ASSETS):
        raise UserError(
            f"LIBERO's assets are not in {assets}; set LIBERO_ASSETS to the folder with {', '.join(ASSETS)}."
        )
    return package


def _memory():
    """-> GB by which this worker and each of its like may grow with one more simulation, GB that are free."""
    me = psutil.Process()
    parent, growth = me.parent(), []
    forked = parent and parent.cmdline() == me.cmdline()  # a worker has its fork server's
    for process in parent.children() if forked else [me]:
        try:
            least = TASK_GB if process == me else 0
            growth.append(max(least, WORKER_GB - process.memory_full_info().uss / 1e9))
        except psutil.Error:  # it has ended
            continue
    return growth, available_memory() / 1e9


def _check_memory():
    """UserError unless this worker and its like can all grow to what a simulation takes."""
    growth, free = _memory()
    if sum(growth) > free:
        raise UserError(
            f"LIBERO takes {WORKER_GB} GB for each worker process, and {len(growth)} of them need "
            f"{sum(growth):.1f} GB more where {free:.1f} GB are free; use fewer --num-workers."
        )


class Simulation:
    """A compiled task and its renderer. The environments of a process share it and take turns, which keeps
    host and GPU memory to one copy a task; all that belongs to an episode is in `save` and `load`. It takes
    seconds to compile, so that a process keeps its tasks' while there is memory."""

    def __init__(self, suite, task, size):
        libero = _libero()
        gc.collect()  # robosuite's reference cycles keep the memory of the last one
        _check_memory()
        root, self.task = Path(libero.__file__).parent, list(libero.benchmark.task_maps[suite].values())[task]
        reconstruct = np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"
        allowed = [reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]  # a pickle that can do no more
        with torch.serialization.safe_globals(allowed):
            states = root / "init_files" / suite / self.task.init_states_file
            self.states = torch.load(states, weights_only=True)  # float64 (50, time + qpos + qvel)
        self.wrapper = libero.envs.env_wrapper.ControlEnv(
            str(root / "bddl_files" / suite / self.task.bddl_file),
            use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False,
        )  # fmt: skip
        env = self.env = self.wrapper.env
        env._observables = {}  # the sensors run in every substep, and nobody reads them
        self.model, self.data, self.robot = env.sim.model._model, env.sim.data._data, env.robots[0]
        self.fixtures = [env.obj_body_id[name] for name in env.fixtures_dict]
        self.samplers = list(env.object_property_initializers)
        self.free = self.model.jnt_qposadr[self.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        seeded = [np.random.RandomState(0).get_state()]
        self.random_states = _random_states.setdefault((suite, task), seeded)
        self.owner, self.size, self.renderer, self.seen = None, size, None, None

    def _place(self, random_state, resets=0, noise=0.0):
        """robosuite's reset, but compiling nothing -> numpy's random state after it. One that compiles has
        the fixtures at the origin and registers the drawers' and knobs' samplers again: draws that count."""
        from robosuite.utils.errors import RandomizationError

        self.model.body_pos[self.fixtures], self.model.body_quat[self.fixtures] = 0, (1, 0, 0, 0)
        self.env.object_property_initializers = self.samplers * (resets + 2)
        self.robot.initialization_noise["magnitude"] = noise
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        outer = np.random.get_state()
        np.random.set_state(random_state)
        try:
            while True:
                try:
                    self.env.reset()
                    return np.random.get_state()
                except RandomizationError:  # no room for an object
                    continue
        finally:
            np.random.set_state(outer)

    def begin_fixed(self, state, resets):
        """An episode from initial state `state`, the fixtures where the `resets`-th reset after env.seed(0)
        puts them."""
        known = self.random_states
        for k in range(min(resets, len(known) - 1), resets + 1):  # from the last that is known
            after = self._place(known[k], k)
            if k + 1 == len(known):
                known.append(after)
        self.wrapper.set_init_state(self.states[state])
        self._settle()

    def begin_random(self, seed):
        """An episode from LIBERO's placement distribution, with the noise in the arm's joints (0.02 rad) that
        the stored states have. A draw in which something is knocked away by 5 cm is repeated."""
        random_state = np.random.RandomState(seed).get_state()
        for _ in range(10):
            random_state = self._place(random_state, noise=0.02)
            before = self.data.qpos.copy()
            self._settle()
            moved = self.data.qpos - before
            if np.hypot(moved[self.free], moved[self.free + 1]).max(initial=0) < 0.05:
                break

    def _settle(self):
        for _ in range(SETTLE_STEPS):
            self.step(SETTLE_ACTION)

    def step(self, action):
        """One control step -> success. robosuite computes the dynamics three times in a substep; MuJoCo's two
        half steps around the controller give the same bits in half the time."""
        self.env._post_process()  # the stove's flame, a step late as in robosuite
        self.env.sim.forward = lambda: None
        for substep in range(SUBSTEPS):
            before = self.data.qpos.copy() if substep == SEEN else None
            mujoco.mj_step1(self.model, self.data)
            self.env._pre_action(action, substep == 0)
            mujoco.mj_step2(self.model, self.data)
            if substep == SEEN:  # bodies are seen where this substep found them, joints where it left them
                self.seen = before, self.data.qpos[self.robot._ref_gripper_joint_pos_indexes]
        del self.env.sim.forward
        return bool(self.env._check_success())

    def look(self, cameras):
        """What robosuite's sensors show: pictures, upright, uint8 (cameras, size, size, 3), the end
        effector's position (3,) and quaternion (4,), w first, fingers (2,)."""
        d, now = self.data, self.data.qpos.copy()
        d.qpos[:] = self.seen[0]
        mujoco.mj_kinematics(self.model, d)
        mujoco.mj_camlight(self.model, d)
        pictures = np.stack([self._render(CAMERAS[name]) for name in cameras])
        d.qpos[:] = now  # what was computed from the other the next step computes anew
        hand = d.body(self.robot.robot_model.eef_name).xquat.copy()
        return pictures, d.site_xpos[self.robot.eef_site_id].copy(), hand, self.seen[1]

    def _render(self, camera):
        if self.renderer is None:
            try:
                backend = importlib.import_module("mujoco." + os.environ["MUJOCO_GL"])  # robosuite's choice
                if os.environ["MUJOCO_GL"] == "egl" and GPUS:  # some may not be EGL's
                    os.environ |= egl_device(os.environ, min(GPUS, len(backend.EGL.eglQueryDevicesEXT())))
                mujoco.rendering.classic.gl_context.GLContext = backend.GLContext
                self.model.vis.global_.offwidth = max(self.model.vis.global_.offwidth, self.size)
                self.model.vis.global_.offheight = max(self.model.vis.global_.offheight, self.size)
                self.renderer = mujoco.Renderer(self.model, self.size, self.size)
            except Exception as error:  # as above
                raise _no_gl(error) from error
            _release_at_exit()
            self.options = mujoco.MjvOption()
            self.options.geomgroup[0] = 0  # the collision shapes
        self.renderer.update_scene(self.data, camera, self.options)
        return self.renderer.render()

    def save(self):
        physics = np.empty(mujoco.mj_stateSize(self.model, STATE))
        mujoco.mj_getState(self.model, self.data, physics, STATE)
        state = {name: getattr(self.model, name) for name in PLACED}
        state |= {name: getattr(self.robot.controller, name) for name in CONTROLLED}
        state |= {"physics": physics, "qpos": self.seen[0], "fingers": self.seen[1]}
        return {k: np.array(x) for k, x in (state | {"gripper": self.robot.gripper.current_action}).items()}

    def load(self, state):
        state = {k: np.asarray(x).copy() for k, x in state.items()}
        for name in PLACED:
            getattr(self.model, name)[:] = state[name]
        for name in CONTROLLED:
            setattr(self.robot.controller, name, state[name])
        self.robot.controller.new_update = True  # what it has cached is another episode's
        self.robot.gripper.current_action = state["gripper"]
        mujoco.mj_setState(self.model, self.data, state["physics"], STATE)
        self.seen = state["qpos"], state["fingers"]

    def release(self):
        if getattr(self, "renderer", None):
            self.renderer._gl_context.make_current()  # else it frees another simulation's textures
            self.renderer.close()
            self.renderer = None

    __del__ = release


_open = weakref.WeakSet()  # this process's environments that have begun an episode and are not closed
_simulations = {}  # (suite, task, size) -> their Simulation, the least recently used first
_random_states = {}  # (suite, task) -> numpy's before the k-th reset after env.seed(0)


@functools.cache
def _release_at_exit():
    """Once, and before EGL ends itself, which the first renderer has just registered."""
    atexit.register(lambda: [simulation.release() for simulation in list(_simulations.values())])


def _idle():
    """-> the keys of the simulations that no episode runs in, the least recently used first."""
    used = {env.simulation for env in _open}
    return [key for key, simulation in _simulations.items() if simulation not in used]


def _make_room():
    """Ends idle simulations until a new one leaves the memory of a further worker to each."""
    for key in _idle():
        growth, free = _memory()
        if sum(growth) + len(growth) * WORKER_GB <= free:
            break
        del _simulations[key]
        gc.collect()  # robosuite's reference cycles keep its memory


class LiberoEnv(gym.Env):
    """See the module's docstring. `step` is `advance` (physics), then `observe` (renders).

    suite: one of `SUITES`. tasks: numbers in the suite, or instructions; default all. split: "train" or
    "eval". protocol: "oft" or "simplevla". cameras: of "agentview" and "wrist". size: of the pictures, 256 in
    both protocols. max_steps: default the protocol's. Raises UserError, in one sentence, for what is unknown,
    not installed or missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    has_success, draws_tasks = True, True
    active_dims = np.ones(7, bool)

    def __init__(self, suite="libero_spatial", tasks=(), split="train", protocol="oft",
                 train_on_eval_states=False, cameras=("agentview",), size=256, max_steps=None):  # fmt: skip
        for name, value, known in (
            ("suite", suite, SUITES),
            ("split", split, SPLITS),
            ("protocol", protocol, tuple(PROTOCOLS)),
            *(("camera", camera, tuple(CAMERAS)) for camera in cameras or ("none",)),
        ):
            if value not in known:
                raise UserError(f"LIBERO has no {name} {value!r}; known: {', '.join(known)}.")
        if size < 1 or (max_steps is not None and max_steps < 1):
            raise UserError(f"size and max_steps must be at least 1, got {size} and {max_steps}.")
        self.instructions = [task.language for task in _libero().benchmark.task_maps[suite].values()]
        numbers = {str(i): i for i in range(len(self.instructions))}
        numbers |= {text: i for i, text in reversed([*enumerate(self.instructions)])}
        for task in tasks:
            if str(task) not in numbers:
                last = len(self.instructions) - 1
                raise UserError(f"{suite} has no task {task!r}; give numbers (0 to {last}) or instructions.")
        self.tasks = [numbers[str(task)] for task in tasks] or list(range(len(self.instructions)))
        self.suite, self.split, self.protocol, self.cameras, self.size = suite, split, protocol, cameras, size
        self.dataset = suite
        self.fixed = split == "eval" or train_on_eval_states
        self.max_steps = max_steps or PROTOCOLS[protocol][suite]
        self.simulation = self.parked = None
        box = gym.spaces.Box
        self.observation_space = gym.spaces.Dict(
            image=box(0, 255, (len(cameras), size, size, 3), np.uint8),
            proprio=box(-np.inf, np.inf, (8,), np.float32),
            task=box(0, len(self.instructions) - 1, (), np.int64),
        )
        self.action_space = box(-1, 1, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng, tasks = self.np_random, self.tasks
        chances = task_chances(options, tasks)
        if self.fixed:
            k = seed if self.split == "eval" and seed is not None else rng.integers(len(tasks) * NUM_STATES)
            state, task = int(k) // len(tasks) % NUM_STATES, tasks[k % len(tasks)]
            task = task if chances is None else int(rng.choice(tasks, p=chances))
            self._enter(task).begin_fixed(state, state if self.protocol == "oft" else 0)
        else:
            self._enter(int(rng.choice(tasks, p=chances))).begin_random(rng.integers(2**32))
        self.steps = 0
        return self.observe(), {"success": False}

    def advance(self, action):
        """One control step (50 ms) of physics. action (7,) -> reward, terminated, truncated, info; renders
        nothing."""
        success = self._turn().step(np.clip(action, -1, 1).astype(np.float64))
        self.steps += 1
        return float(success), success, not success and self.steps >= self.max_steps, {"success": success}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def observe(self):
        pictures, position, quaternion, fingers = self._turn().look(self.cameras)
        proprio = np.concatenate([position, axis_angle(quaternion), fingers]).astype(np.float32)
        # OpenGL's picture is upside down; turned by 180 degrees it is upright and mirrored.
        image = np.ascontiguousarray(pictures[:, :, ::-1])
        return {"image": image, "proprio": proprio, "task": np.int64(self.task)}

    def render(self):
        """Both cameras side by side, not mirrored, for a video: uint8 (size, 2 size, 3)."""
        return np.concatenate(self._turn().look(CAMERAS)[0], 1)

    def close(self):
        """Gives up the episode; the last environment of a process gives up the simulations too."""
        self._leave()
        _open.discard(self)
        if not _open:
            _simulations.clear()

    def _leave(self):
        if self.simulation and self.simulation.owner is self:
            self.simulation.owner = None
        self.simulation = self.parked = None

    def _enter(self, task):
        """-> the simulation of `task`, this process's or a new one, for a new episode."""
        key = (self.suite, task, self.size)
        self._leave()
        _open.add(self)
        if key not in _simulations:
            _make_room()
            _simulations[key] = Simulation(*key)
        self.task, self.simulation = task, _simulations.pop(key)
        _simulations[key] = self.simulation  # now the last
        for idle in _idle() if GPUS else ():
            _simulations[idle].release()  # the memory is the model's, and the renderer soon made anew
        return self._turn()

    def _turn(self):
        """-> the simulation, in the state of this environment's episode."""
        simulation = self.simulation
        if simulation.owner is not self:
            if simulation.owner:
                simulation.owner.parked = simulation.save()
            if self.parked:
                simulation.load(self.parked)
            simulation.owner, self.parked = self, None
        return simulation

    def get_state(self):
        rng = self.np_random.bit_generator.state
        return {
            "simulation": self._turn().save(),
            "episode": [self.task, self.steps],
            "rng": {k: str(v) for k, v in rng["state"].items()},
            "rng_buffer": [int(rng["has_uint32"]), int(rng["uinteger"])],
        }

    def set_state(self, state):
        task, self.steps = state["episode"]
        self._enter(task).load(state["simulation"])
        self.np_random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {k: int(v) for k, v in state["rng"].items()},
            "has_uint32": state["rng_buffer"][0],
            "uinteger": state["rng_buffer"][1],
        }


def egl_device(environ, gpus):
    """-> {"MUJOCO_EGL_DEVICE_ID": n}, which of EGL's first `gpus` devices this process's model is on: the
    LOCAL_RANK-th of CUDA_VISIBLE_DEVICES (robosuite accepts no other), else of all. {} leaves it to EGL:
    neither is set, the user has chosen, or n is unknown, as where GPUs are named by UUID."""
    visible, rank = environ.get("CUDA_VISIBLE_DEVICES"), environ.get("LOCAL_RANK")
    if "MUJOCO_EGL_DEVICE_ID" in environ or (visible is None and rank is None):
        return {}
    names = [str(i) for i in range(gpus)] if visible is None else visible.replace(" ", "").split(",")
    name = names[int(rank or 0) % len(names)]
    return {"MUJOCO_EGL_DEVICE_ID": name} if name.isdigit() and int(name) < gpus else {}


def axis_angle(quaternion):
    """Unit quaternion (4,), w first -> axis times angle (3,) in [0, 2 pi] rad, as robosuite: 2 acos(w) xyz /
    sqrt(1 - w^2)."""
    w = np.clip(quaternion[0], -1, 1)
    length = np.sqrt(1 - w * w)
    return quaternion[1:] * 2 * np.arccos(w) / length if length > 1e-9 else np.zeros(3)


def make(**kwargs):
    """The world's constructor for `common.envs.make_envs`."""
    return LiberoEnv(**kwargs)


def from_file(images):
    """Pictures (..., H, W, 3) as HDF5 files hold them, which is as OpenGL has them -> as the world shows
    them."""
    return np.ascontiguousarray(images[..., ::-1, ::-1, :])


to_file = from_file  # turned twice they are as before


def kept_steps(actions):
    """Which steps of a recorded demonstration are imitated, actions (T, 7) -> bool (T,): all but the no-ops,
    on which a policy would come to rest, and which the published statistics and checkpoints (`_no_noops`)
    know none of.

    A no-op has motion's six numbers below 1e-4 in norm and the gripper's of the last kept step (of a first
    one, any): OpenVLA's regenerate_libero_dataset.py. That plays the rest once more; here pictures and
    proprioception are the recorded ones.
    """
    still, kept = np.linalg.norm(actions[:, :6], axis=1) < NOOP, np.ones(len(actions), bool)
    gripper = None
    for t in range(len(actions)):
        kept[t] = not still[t] or gripper not in (None, actions[t, 6])
        gripper = actions[t, 6] if kept[t] else gripper
    return kept
