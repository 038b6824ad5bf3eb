"""The half of `behavior.py` that runs in the simulator's own interpreter: OmniGibson behind a socket.

`behavior.py` starts it as `PYTHON behavior_server.py FD PID`, with its own process id. It imports nothing of
this project, runs on Python 3.10 and either numpy, and ends with the process that started it. A message is
two lengths, JSON and the arrays' bytes; nothing is pickled, which two versions of numpy could not read.

Written against OmniGibson's `VectorEnvironment(1, config)` (3.7, and RLinf's fork) and its successor, an
`Environment` with `env.num_envs` (3.8): both give lists of one. It has never run there, but on a fake.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path

import numpy as np

CAMERAS = {"head": "zed_link", "left_wrist": "left_realsense_link", "right_wrist": "right_realsense_link"}
PICTURE = 448  # pixels, of every camera; the policy's are made smaller
PROPRIO = {  # of the robot, and their numbers
    "base_qvel": 3, "arm_left_qpos": 7, "arm_left_qvel": 7, "eef_left_pos": 3, "eef_left_quat": 4,
    "gripper_left_qpos": 2, "gripper_left_qvel": 2, "arm_right_qpos": 7, "arm_right_qvel": 7,
    "eef_right_pos": 3, "eef_right_quat": 4, "gripper_right_qpos": 2, "gripper_right_qvel": 2,
    "trunk_qpos": 4, "trunk_qvel": 4,
}  # fmt: skip
TORSO = (1.025, -1.45, -0.47, 0.0)  # rad, of an episode's beginning
SETTLE = 25  # physics steps after an instance is loaded, as the benchmark's evaluator makes them


def send(end, message, arrays=None):
    """A dict of plain values and one of arrays through the socket `end`."""
    arrays = {name: np.ascontiguousarray(x) for name, x in (arrays or {}).items()}
    head = json.dumps([message, {name: [x.dtype.str, x.shape] for name, x in arrays.items()}]).encode()
    body = b"".join(x.tobytes() for x in arrays.values())
    end.sendall(struct.pack("<QQ", len(head), len(body)) + head + body)


def receive(end):
    """-> what `send` sent, as one dict. EOFError if nobody is at the other end any more."""

    def take(size):
        block = bytearray(size)
        view = memoryview(block)
        while view:
            count = end.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return block

    head, body = struct.unpack("<QQ", take(16))
    (message, kinds), body, at = json.loads(take(head)), take(body), 0
    for name, (dtype, shape) in kinds.items():
        message[name] = np.frombuffer(body, dtype, int(np.prod(shape)), at).reshape(shape)
        at += message[name].nbytes
    return message


def pick(obs):
    """OmniGibson's observation, nested or flattened, of tensors or arrays, with a first axis of 1 or without
    -> {camera: uint8 (H, W, 3)}, proprio (n,). LookupError names what is not in it."""
    flat, images = {}, {}

    def flatten(value, path):
        for key, x in value.items() if isinstance(value, dict) else ():
            flatten(x, f"{path}::{key}")
        flat[path] = value

    flatten(obs, "")
    for name, link in {**CAMERAS, "proprio": "proprio"}.items():
        kind = "proprio" if name == "proprio" else "rgb"
        found = [x for path, x in flat.items() if link in path and path.endswith(kind)]
        if not found or isinstance(found[0], dict):
            raise LookupError(f"no {kind} of {link}")
        images[name] = np.asarray(found[0].cpu() if hasattr(found[0], "cpu") else found[0])
    proprio = images.pop("proprio")
    for name, image in images.items():
        image = image[0] if image.ndim == 4 and len(image) == 1 else image
        image = np.round(image * 255).astype(np.uint8) if image.dtype.kind == "f" else image
        images[name] = image[..., :3]  # of RGBA
    return images, proprio[0] if proprio.ndim == 2 and len(proprio) == 1 else proprio


# --- the simulator


def configuration(activity, scene, horizon):
    """OmniGibson's, with the benchmark's robot, controllers and frequencies."""
    none = dict.fromkeys(("command_input_limits", "command_output_limits"))
    joints = {"name": "JointController", "motor_type": "position", "pos_kp": 150, "use_impedances": False}
    joints = {**joints, **none, "use_delta_commands": False}
    gripper = {"name": "MultiFingerGripperController", "mode": "smooth", **dict.fromkeys(none, "default")}
    base = {"name": "HolonomicBaseJointController", "motor_type": "velocity", "vel_kp": 150}
    base["command_input_limits"] = [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
    base["command_output_limits"] = [[-0.75, -0.75, -1.0], [0.75, 0.75, 1.0]]
    base["use_impedances"] = False
    parts = dict.fromkeys(("trunk", "arm_left", "arm_right"), joints)
    sensor = {"sensor_kwargs": {"image_height": PICTURE, "image_width": PICTURE}}
    robot = {
        "type": "R1Pro", "name": "robot_r1", "obs_modalities": ["rgb", "proprio"],
        "proprio_obs": list(PROPRIO), "action_normalize": False, "grasping_mode": "assisted",
        "sensor_config": {"VisionSensor": sensor},
        "controller_config": {"base": base, **parts, "gripper_left": gripper, "gripper_right": gripper},
        "reset_joint_pos": [0.0] * 6 + [*TORSO] + [0.0] * 14 + [0.05] * 4,
    }  # fmt: skip
    task = {
        "type": "BehaviorTask", "activity_name": activity, "activity_definition_id": 0,
        "activity_instance_id": 0, "online_object_sampling": False, "include_obs": False,
        "termination_config": {"max_steps": horizon + 1}, "reward_config": {"r_potential": 1.0},
    }  # fmt: skip
    env = {"action_frequency": 30, "rendering_frequency": 30, "physics_frequency": 120, "num_envs": 1}
    place = {"type": "InteractiveTraversableScene", "scene_model": scene, "include_robots": False}
    return {"env": {**env, "automatic_reset": False}, "scene": place, "robots": [robot], "task": task}


def first(value):
    """Of lists of one, also nested, what is in them."""
    return first(value[0]) if isinstance(value, (list, tuple)) else value


class Simulator:
    """One robot in one scene. Its methods are `behavior.py`'s commands: -> a dict and arrays."""

    def __init__(self, activity, scene, horizon):
        import omnigibson as og
        from omnigibson.macros import gm

        gm.HEADLESS, gm.USE_GPU_DYNAMICS, gm.ENABLE_TRANSITION_RULES = True, False, True
        from omnigibson import envs

        config = configuration(activity, scene, horizon)
        if hasattr(envs, "VectorEnvironment"):
            del config["env"]["num_envs"]
            self.env = envs.VectorEnvironment(1, config)
        else:
            self.env = og.Environment(configs=config)
        gc.enable()  # Isaac Sim has disabled it, and OmniGibson leaks without
        one = first(getattr(self.env, "envs", self.env))
        self.og, self.task, self.instance = og, one.task, 0
        self.scene, self.robot = first(getattr(one, "scenes", None) or one.scene), first(one.robots)
        if self.robot.action_dim != 23:
            raise ValueError(f"its robot takes {self.robot.action_dim} numbers, not 23")
        for name, sensor in self.robot.sensors.items():
            if CAMERAS["head"] in name:
                sensor.horizontal_aperture = 40.0  # as in the benchmark's data
        pattern = (
            f"*task-instances/scenes/{scene}/json/**/{scene}_task_{activity}_0_%d_template-tro_state.json"
        )
        self.files, self.pattern = Path(gm.DATA_PATH), pattern

    def satisfied(self):
        """Of each of the goal's alternatives, which of its predicates hold."""
        if hasattr(self.task, "get_goal_option_satisfaction"):
            return [[bool(x) for x in option] for option in self.task.get_goal_option_satisfaction(0)]
        return [[bool(x.evaluate()) for x in option] for option in self.task.ground_goal_state_options]

    def load(self, instance):
        """The task's instance of this number, as the benchmark's evaluator loads it."""
        from omnigibson.utils.python_utils import recursively_convert_to_torch

        if not (found := sorted(self.files.glob(self.pattern % instance))):
            raise LookupError(f"{self.files / (self.pattern % instance)} does not exist")
        scope = first(getattr(self.task, "object_scopes", None) or self.task.object_scope)
        for key, state in recursively_convert_to_torch(json.loads(found[-1].read_text())).items():
            if key != "robot_poses":
                scope[key].load_state(state, serialized=False)
                continue
            poses = {name.lower(): value for name, value in state.items()}
            pose = poses.get("robot", poses.get("r1pro"))[0]
            self.robot.set_position_orientation(pose["position"], pose["orientation"])
            self.scene.write_task_metadata(key=key, data=state)
        if hasattr(self.og.sim, "update_handles"):
            self.og.sim.update_handles()
        for _ in range(SETTLE):
            self.og.sim.step_physics()
            for thing in scope.values():
                if hasattr(thing, "keep_still"):
                    thing.keep_still()
        self.scene.update_initial_file()
        self.scene.reset()
        self.instance = instance

    def reset(self, instance):
        if instance != self.instance:
            self.env.reset()
            self.load(instance)
        self.seen = pick(self.env.reset()[0][0])
        self.before = self.satisfied()
        return {}, {"proprio": self.seen[1]}

    def step(self, action):
        obs, reward, terminated, _, info = self.env.step(action[None])
        self.seen, done = pick(obs[0]), info[0]["done"]
        ends = [x["done"] for name, x in done["termination_conditions"].items() if name != "timeout"]
        found = {"reward": float(reward[0]), "success": bool(done["success"])}
        return {**found, "terminated": bool(terminated[0]) or any(map(bool, ends))}, {"proprio": self.seen[1]}

    def look(self):
        return {}, self.seen[0]

    def score(self):
        """The benchmark's q_score but for success, which is 1: the share of the goal's predicates that hold
        and did not at first, of the best alternative."""
        pairs = zip(self.satisfied(), self.before, strict=True)
        gained = [[now and not then for now, then in zip(*pair, strict=True)] for pair in pairs]
        return {"q_score": max(sum(option) / len(option) for option in gained)}, {}


def main(fd, parent):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also one that hangs ends
    if os.getppid() != parent:
        os._exit(1)
    end = socket.socket(fileno=fd)
    try:
        simulator = Simulator(**receive(end))
        send(end, {})
        while True:
            message = receive(end)
            try:
                reply = getattr(simulator, message.pop("do"))(**message)
            except LookupError as error:
                reply = (
                    {"error": f"OmniGibson has not what is asked for: {' '.join(map(str, error.args))}"},
                )
            send(end, *reply)
    except (EOFError, ConnectionError):
        os._exit(0)  # Isaac Sim's own end can hang
    except ImportError as error:
        send(end, {"error": f"--simulator {sys.executable} has no OmniGibson ({error}); give its Python."})
    except Exception:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose names would hide packages
    main(*map(int, sys.argv[1:]))
