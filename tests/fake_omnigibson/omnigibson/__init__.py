"""A fake of OmniGibson, as far as `common/envs/behavior_server.py` uses it and as its code and BEHAVIOR-1K's
evaluator document it: nothing here was compared with the simulator. What it is to do stands in the JSON file
OMNIGIBSON_FAKE: `api` ("vector": VectorEnvironment; "new": Environment of env.num_envs), `goal` (steps to
each of the goal's predicates), `die`, `hang` (at which step, while the file `once` exists), `absent`, `dim`.

Of a tensor it has numpy's and `cpu()`. The picture of a camera is its number and the step; the instance and
the last action are in the proprioception, where nobody expects them: the eef's quaternion, the velocities.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

assert "common" not in sys.modules and not any(path.endswith("envs") for path in sys.path), sys.path
WISH = {"api": "vector", "goal": [2, 4], "die": 0, "hang": 0, "absent": False, "dim": 23, "once": ""}
WISH |= json.loads(Path(os.environ["OMNIGIBSON_FAKE"]).read_text())
print("Isaac Sim says a lot", flush=True)
if WISH["absent"]:
    raise ModuleNotFoundError("No module named 'isaacsim'")

LINKS = ("zed_link", "left_realsense_link", "right_realsense_link")
sim = SimpleNamespace(step_physics=lambda: None)


class Tensor(np.ndarray):
    def cpu(self):
        return np.asarray(self)


def tensor(*args):
    return np.array(*args).view(Tensor)


class Thing:
    """An object of the task: it knows which instance was loaded, and stays still."""

    def __init__(self):
        self.state, self.still = 0, 0

    def load_state(self, state, serialized):
        assert not serialized
        self.state, self.still = int(state["instance"]), 0

    def keep_still(self):
        self.still += 1


class Environment:
    def __init__(self, configs, in_vec_env=False):
        robot = configs["robots"][0]
        assert robot["action_normalize"] is False and set(robot["obs_modalities"]) == {"rgb", "proprio"}
        assert ("num_envs" in configs["env"]) != in_vec_env
        self.limit, self.names = configs["task"]["termination_config"]["max_steps"], robot["proprio_obs"]
        self.size = robot["sensor_config"]["VisionSensor"]["sensor_kwargs"]["image_height"]
        self.loaded, self.thing, self.vector = 0, Thing(), in_vec_env
        self.sensors = {f"robot_r1:{link}:Camera:0": SimpleNamespace() for link in LINKS}
        agent = SimpleNamespace(
            action_dim=WISH["dim"], sensors=self.sensors, set_position_orientation=lambda *pose: None
        )
        scene = SimpleNamespace(write_task_metadata=lambda key, data: None, reset=lambda: None)
        scene.update_initial_file = self.keep
        goals = [SimpleNamespace(evaluate=lambda k=k: self.steps >= k) for k in WISH["goal"]]
        self.task = SimpleNamespace(object_scope={"radio.n.01_1": self.thing, "floor.n.01_1": None})
        if in_vec_env:
            self.task.ground_goal_state_options, self.scene, self.robots = [goals], scene, [agent]
        else:
            self.task.object_scope = [self.task.object_scope]
            self.task.get_goal_option_satisfaction = lambda i: [[x.evaluate() for x in goals]]
            self.scenes, self.robots = [scene], [[agent]]
        self.steps, self.action = 0, np.zeros(23)

    def keep(self):
        assert self.thing.still == 25
        self.loaded = self.thing.state

    def one(self):
        assert self.sensors["robot_r1:zed_link:Camera:0"].horizontal_aperture == 40.0
        obs = {}
        for k, name in enumerate(self.sensors):
            rgba = np.full((self.size, self.size, 4), 10 * k + self.steps, np.uint8)
            rgba[: self.size // 2, :, 0] = 255
            obs[name] = {"rgb": tensor(rgba)}
        parts = {
            "base_qvel": self.action[:3], "arm_left_qpos": self.action[7:14], "trunk_qpos": self.action[3:7],
            "arm_right_qpos": self.action[15:22], "gripper_left_qpos": [0.01, 0.02],
            "gripper_right_qpos": [0.03, 0.04], "eef_left_pos": [0.1 * self.steps, 0, 0],
            "eef_right_pos": [0, 0, 0.2 * self.steps], "eef_left_quat": [self.loaded, 0, 0, self.action[14]],
            "eef_right_quat": [0, 0, 0, self.action[22]],
        }  # fmt: skip
        width = {"gripper_left_qvel": 2, "gripper_right_qvel": 2, "trunk_qvel": 4}
        obs["proprio"] = tensor(
            np.concatenate([parts.get(name, np.zeros(width.get(name, 7))) for name in self.names])
        )
        return {"robot_r1": obs}

    def reset(self):
        self.steps, self.action = 0, np.zeros(23)
        return [self.one()], [{"obs_info": {}}]

    def step(self, action, n_render_iterations=1):
        assert action.shape == (1, 23) and action.dtype == np.float32
        held = sum(self.steps >= k for k in WISH["goal"])
        self.steps, self.action = self.steps + 1, action[0]
        if self.steps in (WISH["die"], WISH["hang"]) and (not WISH["once"] or os.path.exists(WISH["once"])):
            if WISH["once"]:
                os.remove(WISH["once"])
            if self.steps == WISH["hang"]:
                time.sleep(1000)
            print("Fatal: the GPU fell off the bus", flush=True)
            os.abort()
        now = sum(self.steps >= k for k in WISH["goal"])
        success = now == len(WISH["goal"])
        ends = {"timeout": self.steps >= self.limit - 1, "predicate": success}
        ends = {
            name: {"done": tensor(end), "success": end and name != "timeout"} for name, end in ends.items()
        }
        info = {"done": {"success": tensor(success), "termination_conditions": ends}}
        info["reward"] = {"potential": {"reward_breakdown": {"potential": (now - held) / len(WISH["goal"])}}}
        flags = [self.steps >= 999] if self.vector else tensor([success])  # the fork may leave them False
        rewards = tensor([(now - held) / len(WISH["goal"])])
        return [self.one()], rewards, flags, [False], [info | {"episode_length": self.steps}]
