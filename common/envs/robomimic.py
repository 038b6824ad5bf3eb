"""RoboMimic's files (Mandlekar et al. 2021), and the robosuite environment that their `env_args` name, as a
world.

    python -m common.envs.to_robomimic --source lift --out lift.hdf5     # makes such a file
    python iql.py --dataset lift.hdf5
    python bc_warmup.py --env robomimic --demos lift.hdf5 --backbone mlp --head gaussian

It is `robosuite.py`'s task with the controller (in robosuite 1.4's form or 1.5's), the arms' places and the
steps of an episode that the file names. `proprio`, float32, is what the file holds of numbers, as it has
them; of a file with pictures position (m), quaternion (x y z w) and fingers (m) of each arm. `image` is as
large as the file's, and upright like them. A file is not trusted: known names and plain numbers alone make
the environment, and the model that it holds is never read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np

from common import UserError
from common.envs.robosuite import CAMERAS, DEMO_KEYS, DEMO_TASKS, TASKS, RobosuiteEnv
from common.flags import NonNegativeInt

__all__ = ["DEMO_KEYS", "DEMO_TASKS"]  # the contract's, of its tasks

STEPS, LONG = 400, {"TwoArmTransport": 700, "ToolHang": 700}  # of an episode, RoboMimic's; a file seldom says
ARMS = re.compile("robot[01]_(eef_pos|eef_quat|gripper_qpos)")  # the keys that a policy sees beside pictures
SENSORS = {"object": "object-state"}  # a file's key -> robosuite's, where they differ
NAMES = {key: name for name, key in DEMO_KEYS.items()}  # a file's pictures -> their camera
LAYOUTS = {"opposed": "single-arm-opposed", "parallel": "single-arm-parallel"}  # robosuite 1.5's -> 1.4's
LAYOUTS |= {name: name for name in ("default", *LAYOUTS.values())}


def numbers(x):
    """a number, or six"""
    x = x if isinstance(x, list) and len(x) == 6 else [x]
    return all(type(each) in (int, float) and abs(each) < 1e6 for each in x)  # nor nan


def steps(x):
    """a number of steps, or null"""
    return x is None or type(x) is int and 0 < x < 10**6


# What env_args may hold -> the values that run here, or None: it shows the environment, is decided here, or
# has no effect, as of a controller the limits of what is fixed.
ARGUMENTS = """has_renderer has_offscreen_renderer render_camera render_collision_mesh render_visual_mesh
    renderer render_gpu_device_id renderer_config use_camera_obs use_object_obs camera_names camera_heights
    camera_widths camera_depths camera_segmentations reward_shaping reward_scale ignore_done hard_reset"""
ARGUMENTS = dict.fromkeys([*ARGUMENTS.split(), "lite_physics", "controller_configs"])
ARGUMENTS |= {"control_freq": [20], "horizon": steps, "gripper_types": ["default", "PandaGripper"]}
ARGUMENTS |= dict.fromkeys(("mount_types", "base_types", "initialization_noise"), ["default"])
NUMBERS = ("kp", "damping_ratio", "output_max", "output_min")
OSC = dict.fromkeys("gripper ramp_ratio kp_limits damping damping_limits damping_ratio_limits".split())
OSC |= {"type": ["OSC_POSE"], "input_max": [1], "input_min": [-1], "impedance_mode": ["fixed"]}
OSC |= {"control_delta": [True], "input_type": ["delta"], "uncouple_pos_ori": [True], "interpolation": [None]}
OSC |= {"position_limits": [None], "orientation_limits": [None]} | dict.fromkeys(NUMBERS, numbers)


@dataclass
class Args:
    """The flags of `--env robomimic`."""

    file: str | None = None
    """a file in RoboMimic's layout, whose environment it is; default that of --dataset or --demos"""
    keys: tuple[str, ...] = ()
    """what is seen of the file's numbers, in this order; default all, or beside pictures those of the arms"""
    cameras: tuple[str, ...] = ()
    """the pictures that the policy sees (agentview, wrist, ... as of --env robosuite), or none; default the
    file's, and none for what learns from states"""
    horizon: NonNegativeInt = 0
    """steps of an episode; 0 for the file's, or RoboMimic's 400 (TwoArmTransport and ToolHang 700)"""

    def defaults(self):
        states = getattr(self, "dataset", None)
        file = self.file or states or getattr(self, "demos", None)
        if not file or not Path(file).is_file():
            return {}
        found = read(file)
        cameras = self.cameras or (() if states else tuple(found["cameras"])) or ("none",)
        keys = self.keys or seen_keys(found["widths"], cameras)
        return {"file": file, "cameras": cameras, "keys": keys}


# --- what a file says


def read(path):
    """What a file in RoboMimic's layout names and holds -> `task`, `named` (of `Task`), `horizon` (or None),
    `widths` {key: its numbers}, in their order, and `cameras` {name: its pictures' height}. UserError."""
    if not Path(path).is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file; give one in RoboMimic's layout.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            data, text = file["data"], file["data"].attrs.get("env_args")
            demos = [int(name[5:]) for name in data if re.fullmatch(r"demo_\d+", name)]
            obs = data[f"demo_{min(demos, default=0)}/obs"]
            shapes = {key: obs[key].shape for key in sorted(obs) if isinstance(obs[key], h5py.Dataset)}
    except (OSError, RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not in RoboMimic's layout ({reason}); give another file.") from error
    widths = {key: shape[1] for key, shape in shapes.items() if len(shape) == 2}
    cameras = {NAMES[key]: shape[1] for key, shape in shapes.items() if len(shape) == 4 and key in NAMES}
    return named_environment(text, path) | {"widths": widths, "cameras": cameras}


def seen_keys(widths, cameras):
    return tuple(key for key in widths if cameras == ("none",) or ARMS.fullmatch(key))


def check(where, given, known):
    """UserError unless all of `given` are known names with values that run here."""
    for name, value in given.items():
        fits = known.get(name, ())
        if fits is not None and not (fits(value) if callable(fits) else value in fits):
            shown = " ".join(str(value).split())[:60]
            names = fits.__doc__ if callable(fits) else ", ".join(map(str, fits)) or "no such name"
            raise UserError(f"{where}: env_args have {name} {shown}, which is not run here; known: {names}.")


def named_environment(text, where):
    """What the JSON `text` of env_args names -> `task`, `named` (of `Task`), `horizon` (or None). UserError
    for all but known names and plain numbers: it comes from a file."""
    try:
        env_args = json.loads(text)
        task, given, kind = env_args["env_name"], dict(env_args["env_kwargs"]), env_args.get("type", 1)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"{where} has no env_args that name an environment; give another file.") from error
    check(where, {"env_name": task, "type": kind}, {"env_name": list(TASKS), "type": [1]})
    arms = TASKS[task][0]
    own = {"robots": [["Panda"] * arms, *["Panda"] * (arms == 1)]}
    own |= {"env_configuration": list(LAYOUTS) if arms == 2 else ["default", "single-robot"]}
    check(where, given, ARGUMENTS | own)
    controllers, osc = given.get("controller_configs"), []
    whole = isinstance(controllers, list) and len(controllers) == arms
    for config in controllers if whole else [controllers] * arms:
        config, frame = config if isinstance(config, dict) else {"controller_configs": config}, {}
        if "body_parts" in config:  # robosuite 1.5's
            check(where, {"type": config.get("type")}, {"type": ["BASIC"]})
            parts = config["body_parts"]
            parts = parts.get("arms", parts) if isinstance(parts, dict) else {}
            config = parts.get("right") if isinstance(parts, dict) else None
            frame = {"input_ref_frame": "base"}  # its own, where it does not say
            config = config if isinstance(config, dict) else {"body_parts": config}
        # 1.4's moves in the world's frame; the base of a single arm stands like it
        frames = {"input_ref_frame": ["world"] if arms == 2 else ["world", "base"]}
        check(where, frame | config | {"type": config.get("type")}, OSC | frames)
        gains = {name: config[name] for name in NUMBERS if name in config}
        osc.append({"type": "OSC_POSE", "interpolation": None} | gains)
    named = {"controller_configs": osc}
    if layout := given.get("env_configuration") if arms == 2 else None:
        named["env_configuration"] = LAYOUTS[layout]
    return {"task": task, "named": json.dumps(named), "horizon": given.get("horizon")}


# --- the world


class RoboMimicEnv(RobosuiteEnv):
    """See the module's docstring and `Args`. Raises UserError, one sentence, for what is unknown, not
    installed, or not of the file's environment."""

    def __init__(self, file=None, keys=(), cameras=(), horizon=0, split="train"):
        if not file:
            raise UserError("--env robomimic needs --file, a file in RoboMimic's layout.")
        found, cameras = read(file), tuple(cameras) or ("none",)
        task, size = found["task"], max(found["cameras"].values(), default=84)
        limit = horizon or found["horizon"] or LONG.get(task, STEPS)
        super().__init__((task,), split, cameras, size, horizon=limit, named=found["named"])
        self.keys, widths = tuple(keys) or seen_keys(found["widths"], cameras), found["widths"]
        if unknown := [key for key in self.keys or ("",) if key not in widths]:
            raise UserError(f"{file} has no numbers {unknown[0]!r} in its obs; it has {', '.join(widths)}.")
        self._enter(0).begin(0)
        for key in {*self.keys} & {*self.simulation.env._observables}:  # some are off unless asked for
            self.simulation.env.modify_observable(key, "active", True)
        shown = self._sensors()
        self._leave()
        for key in self.keys:
            if (has := np.size(shown.get(SENSORS.get(key, key), ()))) != widths[key]:
                raise UserError(
                    f"{file} has {widths[key]} numbers of {key}, robosuite's {task} shows {has}; give --env "
                    "robomimic and --keys without it."
                )
        box = gym.spaces.Box(-np.inf, np.inf, (sum(widths[key] for key in self.keys),), np.float32)
        self.observation_space["proprio"] = box

    def _sensors(self):
        return self.simulation.env._get_observations(force_update=True)

    def observe(self):
        cameras = [CAMERAS[name] for name in self.cameras]
        pictures, _, shown = self.turn().look(cameras, self.size, self._sensors)
        proprio = [shown[SENSORS.get(key, key)] for key in self.keys]
        obs = {"proprio": np.concatenate(proprio).astype(np.float32)}
        return obs | ({"image": np.stack(pictures), "task": np.int64(0)} if pictures else {})


make = RoboMimicEnv  # the world's constructor for `common.envs.make_envs`


def demo_proprio(file, keys, **_):
    """What `proprio` consists of in a file -> {key: width}."""
    widths = read(file)["widths"]
    return {key: widths.get(key, 0) for key in keys}
