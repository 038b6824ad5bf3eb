"""robosuite's simulation as its environments here share it: the ground of `robosuite.py` and `libero.py`.

A `Simulation` is a task's compiled model and its renderers; the environments of a worker process take turns
in it, `SharingEnv`. Physics and, with SHADOWS, pictures are robosuite 1.4.1's, bit for bit, in half its time.
"""

import atexit
import functools
import gc
import importlib.util
import logging
import os
import traceback
import weakref
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil

from common import UserError
from common.memory import available_memory


def no_gl(error):
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    return UserError(
        f"robosuite needs OpenGL, which failed with {what}; install EGL (apt-get install libegl1 "
        "libgl1-mesa-dri), choose a GPU with MUJOCO_EGL_DEVICE_ID, or set MUJOCO_GL=osmesa (apt-get install "
        "libosmesa6)."
    )


try:
    import mujoco  # with the OpenGL that MUJOCO_GL names
except (AttributeError, OSError, RuntimeError) as error:
    raise no_gl(error) from error

from common.envs import osc  # noqa: E402  (which imports mujoco too)
from common.envs.views import outside  # noqa: E402

SUBSTEPS = 25  # of 2 ms: 20 Hz
INSTALL = "pip install --no-deps -r requirements-{}.txt"
GPUS = len([*Path("/dev").glob("nvidia[0-9]*")])
STATE = mujoco.mjtState.mjSTATE_INTEGRATION
PLACED = ("body_pos", "body_quat", "site_rgba")  # what an episode changes in the model
# and in a controller, with what it has seen of the robot, which until its first step is of its making
CONTROLLED = ("goal_pos", "goal_ori", "initial_joint", "new_update", "ee_pos", "ee_ori_mat", "ee_pos_vel")
CONTROLLED += ("ee_ori_vel", "joint_pos", "joint_vel", "J_pos", "J_ori", "J_full", "mass_matrix")


def check_installed(env, packages, file=None):
    """UserError unless `packages`, which --env `env` needs, are there; robosuite is told to be quiet. file:
    the requirements' name, where that is not the world's."""
    if missing := [name for name in packages if not importlib.util.find_spec(name)]:
        raise UserError(f"--env {env} needs {' and '.join(missing)}: {INSTALL.format(file or env)}")
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # software rendering: a core for each worker


class Simulation:
    """A compiled task and its renderers. The environments of a process share it and take turns, which keeps
    host and GPU memory to one copy a task; all that belongs to an episode is in `save` and `load`. It takes
    seconds to compile, so that a process keeps its tasks' while there is memory."""

    WORKER_GB, TASK_GB = 1.5, 0.4  # a worker process, and each further task in it
    SHADOWS = True
    SEEN = 24  # the substep of a step that robosuite's sensors show

    def __init__(self, env):
        self.env, self.robots = env, env.robots
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.owner, self.renderers, self.seen = None, {}, None

    def draw(self, random_state):
        """robosuite's reset from numpy's `random_state`, which is global there -> the state after it."""
        from robosuite.utils.errors import RandomizationError

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

    def step(self, action):
        """One control step -> success. robosuite computes the dynamics three times in a substep; MuJoCo's two
        half steps around the controller give the same bits in half the time."""
        self.env.sim.forward = lambda: None
        each = np.split(action, len(self.robots))
        amid = [osc.prepare(self.model, self.data, *pair) for pair in zip(self.robots, each, strict=True)]
        for substep in range(SUBSTEPS):
            before = self.data.qpos.copy() if substep == self.SEEN else None
            mujoco.mj_step1(self.model, self.data)
            if substep in (0, SUBSTEPS - 1):  # sets the goal; leaves in the controller what it saw last
                self.env._pre_action(action, substep == 0)
            else:
                for run in amid:
                    run()
            mujoco.mj_step2(self.model, self.data)
            if substep == self.SEEN:  # bodies are seen where it found them, joints where it left them
                fingers = [self.data.qpos[r._ref_gripper_joint_pos_indexes] for r in self.robots]
                self.seen = before, np.concatenate(fingers)
        del self.env.sim.forward
        return bool(self.env._check_success())

    def look(self, cameras, size, more=lambda: None):
        """What robosuite's sensors show: pictures, upright, uint8 (cameras, size, size, 3), of each arm the
        end effector's position 3, quaternion 4 (w first) and fingers 2, (arms, 9), and what `more` reads."""
        d, now = self.data, self.data.qpos.copy()
        d.qpos[:] = self.seen[0]
        mujoco.mj_kinematics(self.model, d)
        mujoco.mj_camlight(self.model, d)
        pictures = [self.render(camera, size) for camera in cameras]
        d.qpos[:] = now  # what was computed from the other the next step computes anew
        found = more()
        hands = [d.body(robot.robot_model.eef_name).xquat.copy() for robot in self.robots]
        places = [d.site_xpos[robot.eef_site_id].copy() for robot in self.robots]
        fingers = self.seen[1].reshape(len(self.robots), -1)
        return pictures, np.concatenate([places, hands, fingers], 1), found

    def render(self, camera, size):
        if size not in self.renderers:
            try:
                backend = importlib.import_module("mujoco." + os.environ["MUJOCO_GL"])  # robosuite's choice
                if os.environ["MUJOCO_GL"] == "egl" and GPUS:  # some may not be EGL's
                    os.environ |= egl_device(os.environ, min(GPUS, len(backend.EGL.eglQueryDevicesEXT())))
                mujoco.rendering.classic.gl_context.GLContext = backend.GLContext
                self.model.vis.global_.offwidth = max(self.model.vis.global_.offwidth, size)
                self.model.vis.global_.offheight = max(self.model.vis.global_.offheight, size)
                self.renderers[size] = mujoco.Renderer(self.model, size, size)
            except Exception as error:  # PyOpenGL, mujoco and robosuite each raise their own kind
                raise no_gl(error) from error
            release_at_exit()
            self.options = mujoco.MjvOption()
            self.options.geomgroup[0] = 0  # the collision shapes
        renderer, groups = self.renderers[size], self.model.geom_group.copy()
        if not self.SHADOWS:  # nor mirrors: what stands beside the picture only costs half its time
            self.model.geom_group[outside(self.model, self.data, camera)] = 0
        renderer.update_scene(self.data, camera, self.options)
        self.model.geom_group[:] = groups
        if not self.SHADOWS:
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
        return renderer.render()

    def save(self):
        physics = np.empty(mujoco.mj_stateSize(self.model, STATE))
        mujoco.mj_getState(self.model, self.data, physics, STATE)
        state = {name: getattr(self.model, name) for name in PLACED}
        for k, robot in enumerate(self.robots):
            state |= {f"{name}{k or ''}": getattr(robot.controller, name) for name in CONTROLLED}
            state |= {f"gripper{k or ''}": robot.gripper.current_action}
        state |= {"physics": physics, "qpos": self.seen[0], "fingers": self.seen[1]}
        return {k: np.array(x) for k, x in state.items()}

    def load(self, state):
        state = {k: np.asarray(x).copy() for k, x in state.items()}
        for name in PLACED:
            getattr(self.model, name)[:] = state[name]
        for k, robot in enumerate(self.robots):
            for name in CONTROLLED:
                setattr(robot.controller, name, state[f"{name}{k or ''}"])
            robot.gripper.current_action = state[f"gripper{k or ''}"]
        mujoco.mj_setState(self.model, self.data, state["physics"], STATE)
        self.seen = state["qpos"], state["fingers"]

    def release(self):
        for renderer in getattr(self, "renderers", {}).values():
            renderer._gl_context.make_current()  # else it frees another simulation's textures
            renderer.close()
        self.renderers = {}

    __del__ = release


_open = weakref.WeakSet()  # this process's environments that have begun an episode and are not closed
simulations = {}  # key -> Simulation, the least recently used first


@functools.cache
def release_at_exit():
    """Once, and before EGL ends itself, which the first renderer has just registered."""
    atexit.register(lambda: [simulation.release() for simulation in list(simulations.values())])


def memory(kind):
    """-> GB by which this worker and each of its like may grow with one more simulation, GB that are free."""
    me = psutil.Process()
    parent, growth = me.parent(), []
    forked = parent and parent.cmdline() == me.cmdline()  # a worker has its fork server's
    for process in parent.children() if forked else [me]:
        try:
            least = kind.TASK_GB if process == me else 0
            growth.append(max(least, kind.WORKER_GB - process.memory_full_info().uss / 1e9))
        except psutil.Error:  # it has ended
            continue
    return growth, available_memory() / 1e9


def check_memory(kind):
    """UserError unless this worker and its like can all grow to what a simulation takes."""
    gc.collect()  # robosuite's reference cycles keep the memory of the last one
    growth, free = memory(kind)
    if sum(growth) > free:
        env = kind.__module__.rpartition(".")[2]
        raise UserError(
            f"--env {env} takes {kind.WORKER_GB} GB for each worker process, and {len(growth)} of them need "
            f"{sum(growth):.1f} GB more where {free:.1f} GB are free; use fewer --num-workers."
        )


def _idle():
    """-> the keys of the simulations that no episode runs in, the least recently used first."""
    used = {env.simulation for env in _open}
    return [key for key, simulation in simulations.items() if simulation not in used]


class SharingEnv(gym.Env):
    """An environment that takes turns in its task's simulation, made by `kind(*key)`; `step` is `advance`
    (physics), then `observe` (renders)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    has_success, draws_tasks = True, True
    simulation = parked = None

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def close(self):
        """Gives up the episode; the last environment of a process gives up the simulations too."""
        self._leave()
        _open.discard(self)
        if not _open:
            simulations.clear()

    def _leave(self):
        if self.simulation and self.simulation.owner is self:
            self.simulation.owner = None
        self.simulation = self.parked = None

    def enter(self, kind, key):
        """-> the simulation of `key`, this process's or a new one, for a new episode."""
        self._leave()
        _open.add(self)
        if key not in simulations:
            for old in _idle():  # until a new one leaves the memory of a further worker to each
                growth, free = memory(kind)
                if sum(growth) + len(growth) * kind.WORKER_GB <= free:
                    break
                del simulations[old]
                gc.collect()
            simulations[key] = kind(*key)
        self.simulation = simulations.pop(key)
        simulations[key] = self.simulation  # now the last
        for idle in _idle() if GPUS else ():
            simulations[idle].release()  # the memory is the model's, and the renderer soon made anew
        return self.turn()

    def turn(self):
        """-> the simulation, in the state of this environment's episode."""
        simulation = self.simulation
        if simulation.owner is not self:
            if simulation.owner:
                simulation.owner.parked = simulation.save()
            if self.parked:
                simulation.load(self.parked)
            simulation.owner, self.parked = self, None
        return simulation

    def random_state(self):
        rng = self.np_random.bit_generator.state
        return {
            "rng": {k: str(v) for k, v in rng["state"].items()},
            "rng_buffer": [int(rng["has_uint32"]), int(rng["uinteger"])],
        }

    def set_random_state(self, state):
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
