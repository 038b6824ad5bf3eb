"""BEHAVIOR-1K (Li et al. 2024): household activities for a robot with two arms, in OmniGibson.

    python ppo_vla.py --env behavior --simulator ~/behavior/bin/python --activity turning_on_radio
    python -m common.serve --checkpoint runs/ppo     # what the benchmark asks: python -m omnigibson.eval.eval

NOT RUN ON THE SIMULATOR: Isaac Sim needs an RTX GPU, 30 GB of assets and a Python of its own, which was not
at hand. All tests are on a fake of the documented API. `--simulator` is that Python; each environment starts
one (10 GB of GPU memory) at its first reset and speaks to `behavior_server.py` in it through a socket. Its
vector of scenes steps all of them at once, and here each environment executes chunks of its own: it has one.

Observation: `image` uint8 (cameras, size, size, 3), resized; `proprio` float32 (23,): velocity of the base 3
(x, y, yaw), torso 4, left arm 7, right arm 7 (rad), and the opening of either gripper (m). Action, float32 in
[-1, 1]: `--actions all`, 23: the base's velocity 3 (1 is 0.75 m/s, 1 rad/s), and absolute joint positions,
-1 to 1 from end to end, of torso 4, left arm 7, gripper (-1 closes, 1 opens), right arm 7, gripper; `arms`,
14: the arms' joints, where the base stands, the torso stays as it begins and the grippers are open. 30 Hz.

The reward is the gain in the share of the goal's predicates that hold, so that `mean_reward` of an evaluation
is about the benchmark's q_score; success, all of them, ends an episode, 2000 steps truncate it. A seed fixes
the instance, its layout; training's are no evaluation's. The simulator is not exactly repeatable, and saves
no state. `--metrics FOLDER`: a JSON file an episode of an evaluation, as the benchmark's evaluator writes it,
but for what it normalises by its human data.
"""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
from PIL import Image

from common import UserError
from common.envs.behavior_server import CAMERAS, PROPRIO, TORSO, pick, receive, send
from common.flags import PositiveInt

DEMO_KEYS = {name: f"{name}_rgb" for name in CAMERAS}
SPLITS = ("train", "eval")
RATE = 30  # steps a second
ARM = [-4.4506, -0.1745, -2.3562, -2.0944, -2.3562, -1.0472, -1.5708]  # rad, the left one's least
ARM_HIGH = [1.3090, 3.1416, 2.3562, 0.3491, 2.3562, 1.0472, 1.5708]
RIGHT, RIGHT_HIGH = [ARM[0], -ARM_HIGH[1], *ARM[2:]], [ARM_HIGH[0], -ARM[1], *ARM_HIGH[2:]]
LOW = np.array([-1, -1, -1, -1.1345, -2.7925, -1.8326, -3.0543, *ARM, -1, *RIGHT, -1])
HIGH = np.array([1, 1, 1, 1.8326, 2.5307, 1.5708, 3.0543, *ARM_HIGH, 1, *RIGHT_HIGH, 1])
ARMS = np.r_[7:14, 15:22]
HELD = np.array([0, 0, 0, *TORSO, *[0] * 7, 1, *[0] * 7, 1])  # what `arms` leaves as it is
STATE = (
    "base_qvel",
    "trunk_qpos",
    "arm_left_qpos",
    "arm_right_qpos",
    "gripper_left_qpos",
    "gripper_right_qpos",
)
ENDS = dict(zip(PROPRIO, np.cumsum([*PROPRIO.values()]).tolist(), strict=True))
LAYOUTS = {  # by its length, where a proprioception has its parts: the benchmark's of 2026, and of 2025
    61: {name: slice(ENDS[name] - width, ENDS[name]) for name, width in PROPRIO.items()},
    256: {
        "base_qvel": slice(253, 256), "trunk_qpos": slice(236, 240), "arm_left_qpos": slice(158, 165),
        "arm_right_qpos": slice(197, 204), "gripper_left_qpos": slice(193, 195),
        "gripper_right_qpos": slice(232, 234), "eef_left_pos": slice(186, 189),
        "eef_right_pos": slice(225, 228),
    },
}  # fmt: skip


@dataclass
class Args:
    """The flags of `--env behavior`."""

    simulator: str | None = None
    """the Python of an environment in which OmniGibson is installed"""
    activity: str = "turning_on_radio"
    """the benchmark's name of the task"""
    instruction: str | None = None
    """what the policy is told; default the activity's name in words"""
    scene: str = "house_double_floor_lower"
    """the scene that has instances of the activity"""
    cameras: tuple[str, ...] = ("head", "left_wrist", "right_wrist")
    """the pictures that the policy sees"""
    size: PositiveInt = 224
    """the pictures' height and width"""
    actions: Literal["all", "arms"] = "all"
    """23 numbers, or the 14 of the arms' joints"""
    horizon: PositiveInt = 2000
    """control steps after which an episode ends"""
    train_instances: tuple[int, int] = (1, 200)
    """the first and the last that training draws from"""
    eval_instances: tuple[int, int] = (301, 320)
    """and those that evaluations play, one after another"""
    metrics: str | None = None
    """a folder for the metrics of each episode of an evaluation"""

    def check(self):
        (a, b), (c, d) = self.train_instances, self.eval_instances
        if not (0 <= a <= b and 0 <= c <= d and (b < c or d < a)):
            raise UserError("--train-instances and --eval-instances must be ranges that have none in common.")
        if unknown := [name for name in self.cameras if name not in CAMERAS]:
            raise UserError(f"behavior has no camera {unknown[0]!r}; known: {', '.join(CAMERAS)}.")


def part(proprio, name):
    """One of `PROPRIO` in a robot's proprioception (n,). UserError for one of another length."""
    if proprio.shape not in [(length,) for length in LAYOUTS]:
        raise UserError(f"'proprio' must be (61,) or (256,) numbers of the R1Pro, got {proprio.shape}.")
    return proprio[LAYOUTS[len(proprio)][name]].astype(np.float32)


def state_of(proprio):
    """The robot's proprioception (n,) -> the policy's, float32 (23,)."""
    parts = [part(proprio, name) for name in STATE]
    return np.concatenate([*parts[:4], [parts[4].sum()], [parts[5].sum()]]).astype(np.float32)


def from_client(message):
    """The observation of the benchmark's evaluator -> what `common/serve.py` takes. Raises UserError."""
    try:
        images, proprio = pick(message)
    except LookupError as error:
        raise UserError(f"The observation is not of the R1Pro: {error.args[0]}.") from error
    return {"images": images, "state": state_of(proprio)}


def to_client(actions):
    """Actions (K, 14) or (K, 23) in [-1, 1] -> float32 (K, 23): rad, and -1 to 1 for base and grippers."""
    which = slice(None) if actions.shape[-1] == len(LOW) else ARMS
    out = np.tile(HELD, (len(actions), 1))
    out[:, which] = LOW[which] + (actions.astype(np.float64) + 1) / 2 * (HIGH - LOW)[which]
    return out.astype(np.float32)


class BehaviorEnv(gym.Env):
    """See the module's docstring and `Args`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": RATE}
    has_success = True
    socket = process = None

    def __init__(self, split="train", **flags):
        self.flags, self.split = Args(**flags), split
        self.flags.check()
        self.instructions = [self.flags.instruction or self.flags.activity.replace("_", " ")]
        box, size, numbers = gym.spaces.Box, self.flags.size, {"all": 23, "arms": 14}[self.flags.actions]
        self.observation_space = gym.spaces.Dict(
            image=box(0, 255, (len(self.flags.cameras), size, size, 3), np.uint8),
            proprio=box(-np.inf, np.inf, (23,), np.float32),
            task=box(0, 0, (), np.int64),
        )
        self.action_space, self.active_dims = box(-1, 1, (numbers,), np.float32), np.ones(numbers, bool)

    # --- the simulator's process

    def start(self):
        """Starts the simulator, which takes minutes. UserError, one sentence, where it cannot."""
        python = self.flags.simulator
        if not python:
            raise UserError("--env behavior needs --simulator, the Python of an environment with OmniGibson.")
        self.socket, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (what it prints, of which the end is told)
        server = Path(__file__).with_name("behavior_server.py")
        command = [os.path.expanduser(python), str(server), str(theirs.fileno()), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.log,
                stderr=subprocess.STDOUT, start_new_session=True,  # Ctrl-C is for this process alone
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"--simulator {python} cannot be started: {error.strerror}.") from error
        finally:
            theirs.close()
        names = ("activity", "scene", "horizon")
        try:
            self.ask(**{name: getattr(self.flags, name) for name in names})
        except ConnectionError as error:
            raise UserError(f"--simulator {python}: {error}") from error

    def ask(self, action=None, **message):
        """The simulator's answer. ConnectionError if it has died: this worker then dies too, and is
        restarted with a new one. One that hangs is `--worker-timeout`'s matter."""
        try:
            send(self.socket, message, None if action is None else {"action": action})
            reply = receive(self.socket)
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            code = self.process.poll()
            self.log.seek(max(self.log.seek(0, os.SEEK_END) - 2000, 0))
            words = self.log.read().decode(errors="replace").strip().splitlines()
            self.close()
            last = f": {words[-1].strip()}" if words else ""
            raise ConnectionError(f"the simulator ended with exit code {code}{last}") from None
        if "error" in reply:
            raise UserError(reply["error"])
        return reply

    def close(self):
        if self.process:
            self.socket.close()
            self.process.kill()
            self.process.wait()
            self.log.close()
        self.process = None

    # --- episodes

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        layout = int(self.np_random.integers(2**31)) if seed is None else seed
        low, high = getattr(self.flags, f"{self.split}_instances")
        self.rollout, instance = divmod(layout, high - low + 1)
        self.instance = low + instance
        if not self.process:
            self.start()
        self.proprio = self.ask(do="reset", instance=self.instance)["proprio"]
        self.steps, self.moved = 0, dict.fromkeys(("base", "left", "right"), 0.0)
        return self.observe(), {"success": False}

    def advance(self, action):
        """One control step -> reward, terminated, truncated, info. The simulator renders at each."""
        before = self.proprio
        found = self.ask(do="step", action=to_client(np.clip(action, -1, 1)[None])[0])
        self.proprio, self.steps = found["proprio"], self.steps + 1
        self.moved["base"] += float(np.linalg.norm(part(self.proprio, "base_qvel")[:2])) / RATE
        for side in ("left", "right"):
            was, now = (part(x, f"eef_{side}_pos") for x in (before, self.proprio))
            self.moved[side] += float(np.linalg.norm(now - was))
        truncated = not found["terminated"] and self.steps >= self.flags.horizon
        info = {"success": found["success"]}
        if self.flags.metrics and self.split == "eval" and (found["terminated"] or truncated):
            self.report(found["success"])
        return found["reward"], found["terminated"], truncated, info

    def report(self, success):
        """Writes the episode's metrics; distances (m) are by the proprioception, as those of the human
        data: the base's from its velocity, the hands' in the robot's frame."""
        score = 1.0 if success else self.ask(do="score")["q_score"]
        name = f"{self.flags.activity}_{self.instance}_{self.rollout}.json"
        found = {"task": self.flags.activity, "instance_id": self.instance, "rollout_id": self.rollout}
        found |= {"steps": self.steps, "success": success, "q_score": {"final": score}}
        found |= {"time": {"simulator_steps": self.steps, "simulator_time": self.steps / RATE}}
        file = Path(self.flags.metrics) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found | {"agent_distance": self.moved}, indent=2))

    def pictures(self, **sizes):
        """{camera: its picture, uint8 (size, size, 3)}"""
        seen = self.ask(do="look")
        images = {name: Image.fromarray(seen[name]) for name in sizes}
        box = Image.Resampling.BILINEAR
        return {name: np.asarray(image.resize((sizes[name],) * 2, box)) for name, image in images.items()}

    def observe(self):
        images = self.pictures(**dict.fromkeys(self.flags.cameras, self.flags.size))
        image = np.stack([images[name] for name in self.flags.cameras])
        return {"image": image, "proprio": state_of(self.proprio), "task": np.int64(0)}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def render(self):
        """For a video, as the benchmark's: the wrists left of the head, uint8 (448, 672, 3)."""
        seen = self.pictures(head=448, left_wrist=224, right_wrist=224)
        return np.concatenate([np.concatenate([seen["left_wrist"], seen["right_wrist"]]), seen["head"]], 1)


def make(**kwargs):
    return BehaviorEnv(**kwargs)
