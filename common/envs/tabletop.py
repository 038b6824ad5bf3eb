"""Tabletop: a small language-conditioned manipulation world in pure MuJoCo; needs no GL, no assets, no
download.

A parallel gripper (three position-controlled slides and a yaw hinge) over a table with three coloured objects
of different shape and two coloured plates. Instructions are of three kinds: lift X, put X on Y, move X to Y.
Grasps are real contacts; nothing is welded. Observation and action follow LIBERO's: `image` uint8 (cameras,
H, W, 3), `proprio` float32 (8,) = position 3, axis-angle 3, fingers 2, each scaled to about [-1, 1]; action
float32 (7,) in [-1, 1] = delta position (1 = 3 cm), delta rotation (1 = 0.2 rad; roll and pitch are ignored),
gripper (< 0 opens, >= 0 closes). Control runs at 20 Hz. The reward is 1 at success, else 0 (`reward="shaped"`
adds a difference of potentials).

Variations (`split`): "train"; "eval" (same distribution, other layouts); and three held-out ones after RL4VLA
(Liu et al. 2025): "vision" (table colour, light, camera jitter), "semantics" (unseen object-plate pairs and
paraphrases), "execution" (unseen start poses). Layouts of two splits never share a seed. `randomize` lets
training layouts vary around what is nominal; up to 0.6 hands never start where those of "execution" do.
"""

import itertools
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np

from common import UserError
from common.envs import task_chances
from common.envs.jobs import in_parallel
from common.flags import Share

OBJECTS = ("red cube", "green cylinder", "blue ball")
PLATES = ("yellow plate", "purple plate")
REST_HEIGHT = np.array([0.018, 0.022, 0.020])  # m, centre of each object when it stands on the table
KINDS = ("lift", "put", "move")
SPLITS = ("train", "eval", "vision", "semantics", "execution")
CAMERAS = ("agentview", "wrist")
DEMO_KEYS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}  # LIBERO's names
PLATE_RADIUS = 0.045
POSITION_SCALE, ROTATION_SCALE = 0.03, 0.2  # m and rad for an action of 1
LOW, HIGH = np.array([-0.16, -0.16, 0.0]), np.array([0.16, 0.16, 0.2])  # m, the fingertips' workspace
OPEN = 0.04  # m, a finger's travel from closed to open
SUBSTEPS = 10  # of 5 ms: 20 Hz


@dataclass
class Args:
    """The flags of `--env tabletop`."""

    tasks: tuple[str, ...] = ()
    """kinds of task (lift, put, move) or instructions; empty for all"""
    cameras: tuple[str, ...] = ("agentview",)
    """the pictures that the policy sees (agentview, wrist)"""
    renderer: Literal["ray", "gl"] = "ray"
    """MuJoCo's ray caster, which needs no GL, or mujoco.Renderer"""
    reward: Literal["sparse", "shaped"] = "sparse"
    """1 at success, or with a difference of potentials added"""
    randomize: Share = 0.0
    """training layouts vary in colours, light, cameras and the hand's start, by this share of what the
    held-out splits do; 0 for not at all"""
    eval_split: str = "eval"
    """evaluate on eval, or on a held-out variation: vision, semantics, execution"""
    backend: Literal["c", "warp"] = "c"
    """MuJoCo in worker processes, or all environments at once on the GPU (MuJoCo Warp, whose first start
    compiles for minutes)"""

    def check(self):
        if self.backend == "warp" and self.renderer == "gl":
            raise UserError("--renderer gl is MuJoCo's in worker processes; drop it, or --backend warp.")
        if self.eval_split not in SPLITS[1:]:
            known = ", ".join(SPLITS[1:])
            raise UserError(f"Unknown split {self.eval_split!r} for tabletop's evaluation; known: {known}.")


# The pairs that no training episode and no demonstration shows: every object, plate and kind is still seen.
_HELD_OUT = {("put", 1, 0), ("put", 2, 1), ("move", 0, 1), ("move", 2, 0)}
_TEMPLATES = {  # the first phrase of each kind is the training one, the others are paraphrases
    "lift": ("lift the {x}", "pick up the {x}", "raise the {x}"),
    "put": ("put the {x} on the {y}", "place the {x} onto the {y}", "set the {x} down on the {y}"),
    "move": ("move the {x} to the {y}", "push the {x} over to the {y}", "slide the {x} to the {y}"),
}


def _tasks():
    """All (instruction, kind, object, plate or -1, phrase) in a fixed order: training phrases first."""
    goals = [("lift", x, -1) for x in range(3)]
    goals += [(kind, x, y) for kind, x, y in itertools.product(KINDS[1:], range(3), range(2))]
    return [
        (_TEMPLATES[kind][phrase].format(x=OBJECTS[x], y=PLATES[y]), kind, x, y, phrase)
        for phrase in range(3)
        for kind, x, y in goals
    ]


TASKS = _tasks()
INSTRUCTIONS = [task[0] for task in TASKS]
TRAIN_TASKS = [
    i for i, (_, k, x, y, phrase) in enumerate(TASKS) if phrase == 0 and (k, x, y) not in _HELD_OUT
]
SEMANTICS_TASKS = [i for i, (_, k, x, y, phrase) in enumerate(TASKS) if phrase > 0 or (k, x, y) in _HELD_OUT]

_XML = """
<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="10"
    iterations="100" ls_iterations="50"/>
  <visual><headlight ambient="0.45 0.45 0.45" diffuse="0.1 0.1 0.1" specular="0 0 0"/>
    <global offwidth="640" offheight="640"/></visual>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.55 0.62 0.7" rgb2="0.55 0.62 0.7" width="8" height="8"/>
  </asset>
  <default>
    <geom solref="0.02 1" friction="1 0.01 0.001"/>
    <default class="finger">
      <geom type="box" size="0.009 0.004 0.03" rgba="0.2 0.2 0.22 1" friction="2 0.05 0.002" condim="4"
        mass="0.03"/>
      <joint type="slide" range="0 0.04" limited="true" damping="1"/>
    </default>
    <default class="object"><geom friction="1 0.02 0.002" condim="6" mass="0.05"/></default>
    <default class="plate">
      <geom type="cylinder" size="0.045 0.001" contype="0" conaffinity="0"/>
    </default>
  </default>
  <worldbody>
    <light name="sun" directional="true" pos="0 0 1" dir="0.3 0.2 -1" diffuse="0.6 0.6 0.6"
      specular="0 0 0" castshadow="false"/>
    <camera name="agentview" pos="0.42 0 0.40" xyaxes="0 1 0 -0.66 0 0.75" fovy="38"/>
    <geom name="table" type="box" size="0.3 0.3 0.02" pos="0 0 -0.02" rgba="0.72 0.68 0.62 1"/>
    <body name="yellow plate" mocap="true"><geom class="plate" rgba="0.95 0.85 0.1 1"/></body>
    <body name="purple plate" mocap="true"><geom class="plate" rgba="0.6 0.15 0.75 1"/></body>
    <body name="red cube"><freejoint/>
      <geom name="red cube" class="object" type="box" size="0.018 0.018 0.018" rgba="0.9 0.1 0.1 1"/></body>
    <body name="green cylinder"><freejoint/>
      <geom name="green cylinder" class="object" type="cylinder" size="0.018 0.022" rgba="0.1 0.7 0.15 1"/>
    </body>
    <body name="blue ball"><joint type="free" damping="0.0002"/>
      <geom name="blue ball" class="object" type="sphere" size="0.02" rgba="0.1 0.25 0.95 1"/></body>
    <body name="gripper" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/>
      <joint name="z" type="slide" axis="0 0 1"/>
      <joint name="yaw" type="hinge" axis="0 0 1" armature="0.001"/>
      <geom name="palm" type="box" size="0.014 0.03 0.01" pos="0 0 0.065" mass="0.4" rgba="0.45 0.45 0.48 1"/>
      <camera name="wrist" pos="0.075 0 0.1" xyaxes="0 1 0 -0.8 0 0.6" fovy="75"/>
      <body name="left" gravcomp="1"><joint name="left" class="finger" axis="0 1 0"/>
        <geom name="left" class="finger" pos="0 0.004 0.03"/></body>
      <body name="right" gravcomp="1"><joint name="right" class="finger" axis="0 -1 0"/>
        <geom name="right" class="finger" pos="0 -0.004 0.03"/></body>
    </body>
  </worldbody>
  <actuator>
    <position joint="x" kp="1500" dampratio="1"/><position joint="y" kp="1500" dampratio="1"/>
    <position joint="z" kp="1500" dampratio="1"/><position joint="yaw" kp="10" dampratio="1"/>
    <position joint="left" kp="300" dampratio="1" forcerange="-8 8"/>
    <position joint="right" kp="300" dampratio="1" forcerange="-8 8"/>
  </actuator>
</mujoco>
"""


class RayRenderer:
    """Pinhole camera by MuJoCo's own ray caster (no GL): geom colour times Lambert's cosine of the surface
    normal.

    `render(camera) -> uint8 (size, size, 3)`. Lights, colours and cameras are read from the MjModel, as
    `mujoco.Renderer` reads them, so the two renderers show the same variations.
    """

    def __init__(self, model, data, size):
        self.model, self.data, self.n = model, data, size * size
        self.size = size
        pixel = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(pixel, -pixel)
        self.rays = [  # camera frame: x right, y up, looking along -z
            np.stack([x * tan, y * tan, -np.ones_like(x)], -1).reshape(-1, 3)
            / np.sqrt((x * tan) ** 2 + (y * tan) ** 2 + 1).reshape(-1, 1)
            for tan in np.tan(np.deg2rad(model.cam_fovy) / 2)
        ]
        self.axes, self.turned = np.zeros((model.ncam, 9)), [None] * model.ncam  # each camera's last ones
        self.geom = np.empty(self.n, np.int32)
        self.distance = np.empty(self.n)
        self.normal = np.empty(self.n * 3)

    def render(self, camera):
        m, d = self.model, self.data
        axes = d.cam_xmat[camera].copy()
        if not np.array_equal(axes, self.axes[camera]):  # a fixed camera's rays are turned once
            self.axes[camera], self.turned[camera] = axes, self.rays[camera] @ axes.reshape(3, 3).T
        rays = self.turned[camera]
        mujoco.mj_multiRay(
            m, d, d.cam_xpos[camera], rays.ravel(), None, 1, -1,
            self.geom, self.distance, self.normal, self.n, 3.0,
        )  # fmt: skip
        normal = self.normal.reshape(-1, 3)
        shade = normal @ (-m.light_dir[0] / np.linalg.norm(m.light_dir[0]))
        np.maximum(shade, 0, out=shade)
        shade *= m.light_diffuse[0, 0]
        shade += m.vis.headlight.ambient[0]
        shade -= m.vis.headlight.diffuse[0] * np.einsum("ij,ij->i", normal, rays)
        shade[self.geom < 0] = 1
        palette = np.append(m.geom_rgba[:, :3], [[0.55, 0.62, 0.7]], 0) * 255  # geom -1 is the background
        picture = palette.take(self.geom, 0, mode="wrap")
        picture *= shade[:, None]
        picture = np.minimum(picture, 255, out=picture).astype(np.uint8)
        return picture.reshape(self.size, self.size, 3)

    def close(self):
        pass


class GLRenderer:
    """The same interface over `mujoco.Renderer`; needs a working OpenGL (EGL, OSMesa or a display)."""

    def __init__(self, model, data, size):
        try:
            gl = os.environ.get("MUJOCO_GL", "egl")
            if sys.platform == "linux" and not os.environ.get("DISPLAY") and gl == "egl":
                from mujoco.egl import GLContext  # MUJOCO_GL is read when mujoco is imported: too late here

                mujoco.rendering.classic.gl_context.GLContext = GLContext
            self.renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # mujoco, PyOpenGL and the driver each raise their own kind
            raise UserError(
                "--renderer gl needs OpenGL (on a headless machine EGL, or OSMesa with MUJOCO_GL=osmesa), "
                f"which failed with {' '.join(''.join(traceback.format_exception_only(error)).split())}; "
                "--renderer ray needs none."
            ) from error
        self.data = data

    def render(self, camera):
        self.renderer.update_scene(self.data, camera)
        return self.renderer.render()

    def close(self):
        self.renderer.close()


RENDERERS = {"ray": RayRenderer, "gl": GLRenderer}


class TabletopEnv(gym.Env):
    """See the module's docstring. `step` is `advance` (physics) then `observe` (renders); a chunk wrapper
    calls the two apart so that only frames that a policy sees are rendered.

    tasks: kinds ("lift", "put", "move") or instructions; default all of the split.  max_steps: time limit (20
    Hz). Raises UserError, in one sentence, for an unknown split, task, camera, renderer, reward or size.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    has_success, draws_tasks = True, True
    instructions, training_instructions = INSTRUCTIONS, [INSTRUCTIONS[i] for i in TRAIN_TASKS]
    active_dims = np.array([True, True, True, False, False, True, True])

    def __init__(
        self,
        split="train",
        tasks=(),
        cameras=("agentview",),
        size=64,
        renderer="ray",
        reward="sparse",
        randomize=0.0,
        max_steps=48,
    ):
        for name, value, known in (
            ("split", split, SPLITS),
            ("renderer", renderer, tuple(RENDERERS)),
            ("reward", reward, ("sparse", "shaped")),
        ):
            if value not in known:
                raise UserError(f"Unknown {name} {value!r} for tabletop; known: {', '.join(known)}.")
        if not cameras or any(c not in CAMERAS for c in cameras):
            raise UserError(f"Unknown cameras {list(cameras)} for tabletop; known: {', '.join(CAMERAS)}.")
        if not 8 <= size <= 640 or max_steps < 1:
            raise UserError(
                f"tabletop needs 8 <= size <= 640 and max_steps >= 1, not {size} and {max_steps}."
            )
        self.split, self.reward, self.max_steps, self.size = split, reward, max_steps, size
        self.randomize = randomize if split == "train" else 0.0
        self.task_ids = self._select(tasks)
        self.model = mujoco.MjModel.from_xml_string(_XML)
        self.data = mujoco.MjData(self.model)
        self.renderer_name = renderer
        self._renderers = {}
        self.cameras = [self.model.camera(c).id for c in cameras]
        self._object_bodies = [self.model.body(name).id for name in OBJECTS]
        self._object_geoms = [self.model.geom(name).id for name in OBJECTS]
        self._fingers = (self.model.geom("left").id, self.model.geom("right").id)
        self._plate_mocap = [self.model.body(name).mocapid[0] for name in PLATES]
        self._nominal = {key: getattr(self.model, key).copy() for key in _VARIED}
        self._state = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        self.task, self.steps, self.held, self.dragged, self.potential = 0, 0, 0, True, 0.0
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (len(cameras), size, size, 3), np.uint8),
            proprio=gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
            task=gym.spaces.Discrete(len(INSTRUCTIONS)),
        )
        self.action_space = gym.spaces.Box(-1, 1, (7,), np.float32)
        self.render_mode = "rgb_array"
        self._renderer(size)  # without OpenGL "gl" fails here, and not later in a worker

    def _select(self, tasks):
        available = SEMANTICS_TASKS if self.split == "semantics" else TRAIN_TASKS
        for name in tasks:
            if not any(name in (TASKS[i][1], TASKS[i][0]) for i in available):
                known = ", ".join(KINDS) + "; " + "; ".join(INSTRUCTIONS[i] for i in available)
                raise UserError(f"Unknown task {name!r} for tabletop's split {self.split!r}; known: {known}.")
        return [i for i in available if not tasks or TASKS[i][1] in tasks or TASKS[i][0] in tasks]

    # --- episode

    def reset(self, *, seed=None, options=None):
        self.begin(seed, options)
        return self.observe(), {"success": False}

    def begin(self, seed, options):
        """`reset`, but for the pictures."""
        super().reset(seed=seed)
        # An evaluation layout's stream is keyed by its split: no training seed can reproduce it.
        layout = int(self.np_random.integers(2**31)) if seed is None else seed
        rng = np.random.default_rng([SPLITS.index(self.split), layout])
        m, d = self.model, self.data
        mujoco.mj_resetData(m, d)
        self.task = int(rng.choice(self.task_ids, p=task_chances(options, self.task_ids)))
        positions = _layout(rng)
        for k, name in enumerate(OBJECTS):
            yaw = rng.uniform(-0.3, 0.3)
            turn = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
            d.joint(m.body(name).jntadr[0]).qpos = [*positions[k], REST_HEIGHT[k], *turn]
        for k, mocap in enumerate(self._plate_mocap):
            d.mocap_pos[mocap] = [*positions[3 + k], 0.001]
        start = np.array([*rng.uniform(-0.05, 0.05, 2), rng.uniform(0.11, 0.15), 0.0])
        if self.split == "execution":
            side = rng.uniform(0.08, 0.14, 2) * rng.choice([-1, 1], 2)
            start = np.array([*side, rng.uniform(0.09, 0.19), rng.uniform(-0.6, 0.6)])
        if self.randomize:
            start += self.randomize * rng.uniform(-1, 1, 4) * [0.05, 0.05, 0.05, 0.6]
        d.qpos[-6:-2] = start
        d.qpos[-2:] = OPEN
        d.ctrl[:] = [*start, OPEN, OPEN]
        self._vary(rng)
        mujoco.mj_forward(m, d)
        self.steps, self.held, self.dragged = 0, 0, True
        self.potential = self._potential()

    def _vary(self, rng):
        """Colours of table and light and a jitter of the cameras: split "vision", and training with
        `randomize`."""
        for key, value in self._nominal.items():
            getattr(self.model, key)[:] = value
        if self.split == "vision":
            m = self.model
            m.geom_rgba[m.geom("table").id, :3] = rng.uniform(0.25, 0.9, 3)
            m.light_diffuse[0] = rng.uniform(0.35, 0.75)
            m.light_dir[0] = [*rng.uniform(-0.6, 0.6, 2), -1]
            m.cam_pos[:] += rng.uniform(-0.015, 0.015, m.cam_pos.shape)
        elif self.randomize:
            m, r = self.model, self.randomize
            m.geom_rgba[m.geom("table").id, :3] += r * rng.uniform(-0.3, 0.3, 3)
            m.light_diffuse[0] += r * rng.uniform(-0.2, 0.2)
            m.light_dir[0, :2] += r * rng.uniform(-0.6, 0.6, 2)
            m.cam_pos[:] += r * rng.uniform(-0.015, 0.015, m.cam_pos.shape)

    def advance(self, action):
        """One control step (50 ms) of physics. action (7,) -> reward, terminated, truncated, info; renders
        nothing."""
        d = self.data
        action = np.clip(action, -1, 1)
        # Set points follow the true pose, so that a blocked arm does not wind up.
        d.ctrl[:3] = np.clip(d.qpos[-6:-3] + POSITION_SCALE * action[:3], LOW, HIGH)
        d.ctrl[3] = np.clip(d.qpos[-3] + ROTATION_SCALE * action[5], -1.5, 1.5)
        d.ctrl[4:] = OPEN if action[6] < 0 else -0.005  # past the pads' contact: a steady squeeze
        mujoco.mj_step(self.model, d, SUBSTEPS)
        # Poses and contacts of this very state, not of the last substep's start.
        mujoco.mj_forward(self.model, d)
        self.steps += 1
        success = self._success()
        reward = float(success)
        if self.reward == "shaped":
            potential = self._potential()
            reward += potential - self.potential
            self.potential = potential
        return reward, success, not success and self.steps >= self.max_steps, {"success": success}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def observe(self):
        q = self.data.qpos[-6:]
        fingers = q[4:] / OPEN * 2 - 1
        proprio = [q[0] / 0.16, q[1] / 0.16, q[2] / 0.1 - 1, 0, 0, q[3], *fingers]
        return {
            "image": np.stack([self._renderer(self.size).render(camera) for camera in self.cameras]),
            "proprio": np.array(proprio, np.float32),
            "task": np.int64(self.task),
        }

    def _renderer(self, size):
        if size not in self._renderers:
            self._renderers[size] = RENDERERS[self.renderer_name](self.model, self.data, size)
        return self._renderers[size]

    def render(self):
        """Both cameras side by side for a video: uint8 (192, 384, 3), whatever the policy sees."""
        return np.concatenate([self._renderer(192).render(camera) for camera in range(len(CAMERAS))], 1)

    def close(self):
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    # --- success and shaping

    def _situation(self):
        """-> named object's position (3,), its height above rest, is it pinched by both fingers, touched by
        one."""
        x = TASKS[self.task][2]
        position = self.data.xpos[self._object_bodies[x]]
        pairs = self.data.contact.geom
        touching = pairs[(pairs == self._object_geoms[x]).any(1)]
        left, right = (bool((touching == finger).any()) for finger in self._fingers)
        return position, position[2] - REST_HEIGHT[x], left and right, left or right

    def _plate_distance(self, position):
        plate = self.data.mocap_pos[self._plate_mocap[TASKS[self.task][3]]]
        return float(np.hypot(*(position[:2] - plate[:2])))

    def _success(self):
        """The named goal, held for a moment: lift 5 cm in the grasp (3 steps); put: at rest on the plate and
        let go (2 steps); move: on the plate (2 steps) without ever having left the table."""
        kind = TASKS[self.task][1]
        position, height, pinched, touched = self._situation()
        self.dragged &= height < 0.025
        if kind == "lift":
            good = pinched and height > 0.05
        else:
            good = height < 0.01 and self._plate_distance(position) < PLATE_RADIUS - 0.01
            good = good and (not touched if kind == "put" else self.dragged)
        self.held = self.held + 1 if good else 0
        return self.held >= (3 if kind == "lift" else 2)

    def _potential(self):
        """In [0, 1): approach, grasp, then lift or carry. Differences of it leave the optimal policy as it is
        (Ng, Harada and Russell 1999, with discount 1)."""
        kind = TASKS[self.task][1]
        position, height, pinched, _ = self._situation()
        reach = 1 - np.tanh(8 * np.linalg.norm(position - self.data.qpos[-6:-3]))
        far = np.clip(height / 0.05, 0, 1)
        if kind != "lift":
            far = 1 - np.tanh(8 * self._plate_distance(position))
        return 0.3 * reach + 0.3 * pinched + 0.4 * far

    # --- privileged information: expert, pixels, exact state

    def expert(self):
        """The scripted expert's action (7,) float32: a stateless funnel over the named object, close, then
        the goal."""
        d, (_, kind, _, y, _) = self.data, TASKS[self.task]
        hand, yaw = d.qpos[-6:-3], d.qpos[-3]
        position, height, pinched, touched = self._situation()
        grasp = 0.012
        if pinched and kind == "lift":
            goal, close = np.array([hand[0], hand[1], 0.14]), True
        elif pinched:
            plate = d.mocap_pos[self._plate_mocap[y]]
            goal, close = np.array([*(hand[:2] + plate[:2] - position[:2]), grasp], float), True
            error = np.hypot(*(plate[:2] - position[:2]))
            if kind == "put":
                goal[2] = grasp + np.clip(4 * (error - 0.012), 0, 0.06)
                if hand[2] < 0.035 and error > 0.03:
                    goal[:2] = hand[:2]  # straight up first
                close = not (error < 0.015 and height < 0.008)
        elif kind == "put" and self._plate_distance(position) < PLATE_RADIUS - 0.015 and height < 0.01:
            goal, close = np.array([hand[0], hand[1], 0.08]), False  # let go: retreat
        else:
            error = np.hypot(*(position[:2] - hand[:2]))
            goal = np.array([*position[:2], grasp + np.clip(4 * (error - 0.012), 0, 0.06)])
            close = bool(error < 0.015 and hand[2] < grasp + 0.012)
            if not close and hand[2] < 0.045 and error > 0.025:
                goal[:2] = hand[:2]  # low and off: rise before moving sideways
        # The servo covers some 3/4 of a command within a step, hence 1.3.
        delta = np.clip(1.3 * (goal - hand) / POSITION_SCALE, -1, 1)
        turn = np.clip(-yaw / ROTATION_SCALE, -1, 1)
        return np.array([*delta, 0, 0, turn, 1.0 if close else -1.0], np.float32)

    def pixels(self):
        """Image positions of the named object and plate: float32 (cameras, 2, 2), x right and y down, each in
        [-1, 1]; nan where the task names no plate or the point lies outside the picture."""
        x, y = TASKS[self.task][2:4]
        points = [self.data.xpos[self._object_bodies[x]]]
        points.append(self.data.mocap_pos[self._plate_mocap[y]] if y >= 0 else np.full(3, np.nan))
        out = np.empty((len(self.cameras), 2, 2), np.float32)
        for i, camera in enumerate(self.cameras):
            local = (np.stack(points) - self.data.cam_xpos[camera]) @ self.data.cam_xmat[camera].reshape(3, 3)
            tan = np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2)
            out[i] = local[:, :2] / -local[:, 2:] / tan * [1, -1]
            out[i][(np.abs(out[i]) > 1).any(1) | (local[:, 2] > 0)] = np.nan
        return out

    def get_state(self):
        mujoco.mj_getState(self.model, self.data, self._state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return {
            "physics": self._state.copy(),
            "varied": {key: getattr(self.model, key).copy() for key in _VARIED},
            "episode": [self.task, self.steps, self.held, int(self.dragged), float(self.potential)],
        } | rng_state(self.np_random)

    def set_state(self, state):
        for key, value in state["varied"].items():
            getattr(self.model, key)[:] = np.asarray(value)
        physics = np.ascontiguousarray(state["physics"])
        mujoco.mj_setState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(self.model, self.data)  # contacts and camera poses; may move the warm start, hence:
        mujoco.mj_setState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self.task, self.steps, self.held, dragged, self.potential = state["episode"]
        self.dragged = bool(dragged)
        set_rng_state(self.np_random, state)


def rng_state(rng):
    """A Generator's state as a checkpoint can hold it: its integers are too long for an array."""
    state = rng.bit_generator.state
    numbers = {k: str(v) for k, v in state["state"].items()}
    return {"rng": numbers, "rng_buffer": [int(state["has_uint32"]), int(state["uinteger"])]}


def set_rng_state(rng, state):
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {k: int(v) for k, v in state["rng"].items()},
        "has_uint32": state["rng_buffer"][0],
        "uinteger": state["rng_buffer"][1],
    }


_VARIED = ("geom_rgba", "light_diffuse", "light_dir", "cam_pos")


def _layout(rng):
    """Positions (5, 2) in m of the three objects and two plates: no two overlap, and the open gripper fits
    between."""
    radius = (0.0375, 0.0375, 0.0375, 0.0475, 0.0475)
    pairs = [(i, j, (radius[i] + radius[j]) ** 2) for i, j in itertools.combinations(range(5), 2)]
    low, high = np.array([-0.12, -0.13]), np.array([0.12, 0.13])
    while True:
        xy = low + (high - low) * rng.random((5, 2))
        p = xy.tolist()  # some thirty tries a layout: plain floats are quicker than five-row arrays
        if all((p[i][0] - p[j][0]) ** 2 + (p[i][1] - p[j][1]) ** 2 >= least for i, j, least in pairs):
            return xy


def make(split="train", eval_split="eval", backend="c", **kwargs):
    """The world's constructor for `common.envs.make_envs`: split "eval" is the one that --eval-split
    names."""
    return TabletopEnv(split=eval_split if split == "eval" else split, **kwargs)


def batched(backend="c", **kwargs):
    return backend == "warp"


def make_batch(num_envs, device, **kwargs):
    from common.envs.tabletop_warp import TabletopBatch  # its library is an optional one

    return TabletopBatch(make(**kwargs), num_envs, device)


# --- demonstrations


def _demonstrate(job):
    """Worker: episodes of the expert with noisy execution and clean labels -> list of per-episode arrays."""
    seeds, noise, kwargs = job
    env, episodes = make(**kwargs), []
    for seed in seeds:
        rng = np.random.default_rng([7, seed])
        obs, _ = env.reset(seed=seed)
        images, proprio, actions, executed, pixels = [], [], [], [], []
        while True:
            action = env.expert()
            images.append(obs["image"])
            proprio.append(obs["proprio"])
            actions.append(action)
            pixels.append(env.pixels())
            noisy = action + noise * rng.standard_normal(7) * [1, 1, 1, 0, 0, 0.5, 0]
            executed.append(noisy.clip(-1, 1).astype(np.float32))
            obs, _, terminated, truncated, info = env.step(executed[-1])
            if terminated or truncated:
                break
        if info["success"]:  # a failed demonstration is dropped
            episodes.append(
                [np.stack(rows) for rows in (images, proprio, actions, executed, pixels)] + [env.task]
            )
    return episodes


def _ground(job):
    """Worker: one still picture per seed with a random gripper pose -> images, proprio, pixels, task."""
    seeds, kwargs = job
    env, rows = make(**kwargs), []
    for seed in seeds:
        env.reset(seed=seed)
        rng = np.random.default_rng([8, seed])
        env.data.qpos[-6:-3] = rng.uniform([-0.12, -0.13, 0.06], [0.12, 0.13, 0.15])
        mujoco.mj_forward(env.model, env.data)
        obs = env.observe()
        rows.append((obs["image"], obs["proprio"], env.pixels(), env.task))
    return rows


def demonstrations(num_episodes, seed, num_workers=None, noise=0.3, **env_kwargs):
    """Successful episodes of the scripted expert, on training layouts.

    Returns flat arrays over all S steps: image uint8 (S, cameras, H, W, 3), proprio float32 (S, 8), actions
    float32 (S, 7) as labelled and `executed`, task int64 (S,), pixels float32 (S, cameras, 2, 2) (see
    `TabletopEnv.pixels`), episode_starts int64 (E,), and instructions. `noise` is the standard deviation
    added to the executed action; the label stays clean.
    """
    seeds = np.random.default_rng([1, seed]).integers(2**31, size=num_episodes)
    episodes = in_parallel(_demonstrate, seeds, num_workers, noise, env_kwargs)
    if not episodes:
        raise UserError(
            f"The expert succeeded in none of {num_episodes} episodes with noise {noise}; use less noise."
        )
    lengths = np.array([len(episode[2]) for episode in episodes])
    image, proprio, actions, executed, pixels = (np.concatenate([e[k] for e in episodes]) for k in range(5))
    return {
        "image": image,
        "proprio": proprio,
        "actions": actions,
        "executed": executed,
        "pixels": pixels,
        "task": np.repeat(np.array([e[5] for e in episodes], np.int64), lengths),
        "episode_starts": np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        "instructions": list(INSTRUCTIONS),
    }


def scenes(num_scenes, seed, num_workers=None, **env_kwargs):
    """Still pictures of training layouts with the place of what the instruction names: image, proprio,
    pixels, task."""
    seeds = np.random.default_rng([2, seed]).integers(2**31, size=num_scenes)
    rows = in_parallel(_ground, seeds, num_workers, env_kwargs)
    image, proprio, pixels, task = (np.stack([row[k] for row in rows]) for k in range(4))
    return {"image": image, "proprio": proprio, "pixels": pixels, "task": task.astype(np.int64)}
