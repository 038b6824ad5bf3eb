"""Tabletop, all environments at once in MuJoCo Warp: physics, success and pictures on the device of the
policy, a CUDA graph a step. Never run on a GPU so far; without one it is for tests.

Layouts, colours and cameras are drawn by `TabletopEnv` itself: with one seed both backends start alike.
Physics is in float32: after a quarter of a second of a grasp bodies are within 0.2 mm of C MuJoCo's, but 3 mm
of the cylinder, which has one contact with a finger here. Pictures are shaded as `RayRenderer` does it, and
are the same. Contacts come in any order on a GPU: two runs there do not agree to the bit.
"""

import contextlib
import copy

import mujoco
import numpy as np
import torch

from common import UserError
from common.envs.tabletop import (
    _VARIED,
    HIGH,
    KINDS,
    LOW,
    OPEN,
    PLATE_RADIUS,
    POSITION_SCALE,
    REST_HEIGHT,
    ROTATION_SCALE,
    SUBSTEPS,
    TASKS,
    rng_state,
    set_rng_state,
)

try:
    import warp

    warp.config.log_level = warp.LOG_ERROR  # it tells of every kernel, and of a driver that is not there
    import mujoco_warp
except ImportError as error:
    raise UserError(
        f"--backend warp needs MuJoCo Warp ({error}); python3 common/install.py --warp installs it, "
        "--backend c does without."
    ) from error

BACKGROUND = (0.55, 0.62, 0.7)
CONTACTS, ROWS = 64, 256  # room for an environment's contacts and rows of constraints: some 20 and 110 occur
LIFT, PUT, _ = range(len(KINDS))
GOALS = [(KINDS.index(kind), x, max(y, 0)) for _, kind, x, y, _ in TASKS]  # kind, object, plate
STATE = ("qpos", "qvel", "qacc_warmstart", "mocap_pos")  # what the physics goes on from
GROUPS = warp.types.vector(6, float)(-1.0)  # of geoms: all


class TabletopBatch:
    """`num_envs` of `env`, a `TabletopEnv` that draws their layouts and shows them for videos. See the
    contract of a batch in `common/envs/__init__.py`."""

    def __init__(self, env, num_envs, device):
        self.env, self.num_envs, self.device = env, num_envs, device
        texts = "instructions", "training_instructions"
        for name in (*texts, "active_dims", "has_success", "draws_tasks", "observation_space"):
            setattr(self, name, getattr(env, name))
        self.action_space = env.action_space
        env.begin(0, None)
        model = copy.copy(env.model)
        # A cylinder has one contact with a box here, on which it would rock, but several with a plane. Of the
        # table no camera sees more than the top.
        table = model.geom("table").id
        model.geom_type[table], model.geom_rbound[table] = mujoco.mjtGeom.mjGEOM_PLANE, 0
        model.geom_pos[table, 2] = 0
        warp.set_device(str(device))  # of all its calls: a process has one
        self.model = mujoco_warp.put_model(model)
        self.data = mujoco_warp.put_data(model, env.data, num_envs, CONTACTS, njmax=ROWS)
        # Views of its arrays, which its kernels read and write.
        self.model.cam_pos = warp.array(np.tile(env.model.cam_pos, (num_envs, 1, 1)), dtype=warp.vec3)
        names = (*STATE, "ctrl", "xpos", "cam_xpos", "cam_xmat")
        self.views = {name: warp.to_torch(getattr(self.data, name)) for name in names}
        self.contact = [warp.to_torch(x) for x in (self.data.contact.geom, self.data.contact.worldid)]
        self.num_contacts = warp.to_torch(self.data.nacon)

        # What the resets draw, and the episodes: (N, ...).
        def rows(like):
            return torch.as_tensor(np.tile(like, (num_envs, *[1] * np.ndim(like))), device=device)

        self.varied = {name: rows(getattr(env.model, name).astype(np.float32)) for name in _VARIED}
        self.varied["cam_pos"] = warp.to_torch(self.model.cam_pos)
        self.episode = dict(task=rows(0), steps=rows(0), held=rows(0), dragged=rows(True))
        self.episode["potential"] = rows(np.float32(0))
        self.rng = [np.random.Generator(np.random.PCG64(0)) for _ in range(num_envs)]
        self.goals = torch.tensor(GOALS, device=device)
        plates = [env.model.body(x).mocapid[0] for x in ("yellow plate", "purple plate")]
        self.bodies, self.geoms, self.fingers, self.plates = (
            torch.tensor(np.array(x, np.int64), device=device)
            for x in (env._object_bodies, env._object_geoms, env._fingers, plates)
        )
        self.rest = torch.tensor(REST_HEIGHT, dtype=torch.float32, device=device)
        self.low, self.high = (torch.tensor(x, dtype=torch.float32, device=device) for x in (LOW, HIGH))
        self._prepare_rays(model)
        self.graph = None
        if device.type == "cuda":  # launches would take most of the time
            self._substeps()  # loads the kernels
            with warp.ScopedCapture() as capture:
                self._substeps()
            self.graph = capture.graph

    def close(self):
        self.env.close()

    # --- physics

    def _stream(self):
        """PyTorch's stream, so that each of the two sees what the other wrote."""
        if self.device.type == "cuda":
            return warp.ScopedStream(warp.stream_from_torch(self.device))
        return contextlib.nullcontext()

    def _substeps(self):
        for _ in range(SUBSTEPS):
            mujoco_warp.step(self.model, self.data)

    def _derive(self):
        """Poses, cameras and contacts of the state as it is."""
        with self._stream():
            mujoco_warp.kinematics(self.model, self.data)
            mujoco_warp.camlight(self.model, self.data)
            mujoco_warp.collision(self.model, self.data)

    def reset(self, seeds, options):
        env, numbers = self.env, self._numbers()
        source = dict.fromkeys(STATE, env.data) | dict.fromkeys(_VARIED, env.model)
        drawn = {name: [] for name in numbers}
        for row, seed in seeds.items():
            env.np_random = self.rng[row]
            env.begin(seed, options)
            self.rng[row] = env.np_random
            for name, rows in drawn.items():
                rows.append(np.array(getattr(source.get(name, env), name)))
        for name, view in numbers.items():  # at once: a copy to a GPU takes its time, however small
            view[list(seeds)] = torch.as_tensor(np.array(drawn[name])).to(view)
        self._derive()

    def advance(self, actions, rows):
        q, ctrl, actions = self.views["qpos"], self.views["ctrl"], actions.clamp(-1, 1)
        moved = [self.views[name] for name in STATE[:3]]
        before = [view.clone() for view in moved]
        # as TabletopEnv.advance
        ctrl[:, :3] = (q[:, -6:-3] + POSITION_SCALE * actions[:, :3]).clamp(self.low, self.high)
        ctrl[:, 3] = (q[:, -3] + ROTATION_SCALE * actions[:, 5]).clamp(-1.5, 1.5)
        ctrl[:, 4:] = torch.where(actions[:, 6:] < 0, OPEN, -0.005)
        with self._stream():
            if self.graph:
                warp.capture_launch(self.graph)
            else:
                self._substeps()
        for view, old in zip(moved, before, strict=True):
            view.copy_(torch.where(rows[:, None], view, old))
        self._derive()
        return self._judge(rows)

    # --- success and shaping, as TabletopEnv's

    def _situation(self):
        """-> of the named objects: kind of goal (N,), position (N, 3), height above rest (N,), which finger
        touches it (N, 2) bool, and distance to the named plate (N,)."""
        kind, x, y = self.goals[self.episode["task"]].unbind(1)
        each = torch.arange(self.num_envs, device=self.device)
        position = self.views["xpos"][each, self.bodies[x]]
        geoms, world = self.contact
        real = torch.arange(len(world), device=self.device) < self.num_contacts
        world, named = world.clamp(0, self.num_envs - 1).long(), self.geoms[x]
        ours = (geoms == named[world][:, None]).flip(1)  # where the other one of a pair is the named object
        pairs = (geoms[:, :, None] == self.fingers) & ours[:, :, None] & real[:, None, None]
        touched = torch.zeros(self.num_envs, 2, dtype=torch.int32, device=self.device)
        touched.index_add_(0, world, pairs.any(1).int())
        gap = position[:, :2] - self.views["mocap_pos"][each, self.plates[y], :2]
        return kind, position, position[:, 2] - self.rest[x], touched > 0, gap.norm(dim=1)

    def _judge(self, rows):
        """What the step of these rows came to -> reward, terminated, truncated, success (N,)."""
        episode, (kind, position, height, touched, gap) = self.episode, self._situation()
        lift, pinched, steps = kind == LIFT, touched.all(1), episode["steps"] + 1
        dragged = episode["dragged"] & (height < 0.025)
        placed = (height < 0.01) & (gap < PLATE_RADIUS - 0.01)
        placed &= torch.where(kind == PUT, ~touched.any(1), dragged)
        good = torch.where(lift, pinched & (height > 0.05), placed)
        held = torch.where(good, episode["held"] + 1, 0)
        success = held >= torch.where(lift, 3, 2)
        reward, new = success.float(), dict(steps=steps, held=held, dragged=dragged)
        if self.env.reward == "shaped":
            reach = 1 - (8 * (position - self.views["qpos"][:, -6:-3]).norm(dim=1)).tanh()
            far = torch.where(lift, (height / 0.05).clamp(0, 1), 1 - (8 * gap).tanh())
            new["potential"] = 0.3 * reach + 0.3 * pinched + 0.4 * far
            reward += new["potential"] - episode["potential"]
        for name, value in new.items():
            episode[name] = torch.where(rows, value, episode[name])
        return reward, success, ~success & (steps >= self.env.max_steps), success

    # --- what is seen

    def _prepare_rays(self, model):
        env, num_envs = self.env, self.num_envs
        own = env._renderer(env.size)  # its rays in a camera's frame
        self.rays = torch.tensor(np.stack([own.rays[c] for c in env.cameras]), device=self.device).float()
        shape = (num_envs, self.rays.shape[0] * self.rays.shape[1])
        self.cast = {name: warp.empty(shape, dtype=warp.vec3) for name in ("origin", "direction", "normal")}
        self.cast |= dict(distance=warp.empty(shape, dtype=float), geom=warp.empty(shape, dtype=int))
        self.nobody = warp.full(shape[1], -1, dtype=int)  # bodies that a ray passes through
        off = dict(render_rgb=False, render_depth=False, render_seg=False, use_textures=False)
        self.tree = mujoco_warp.create_render_context(model, num_envs, cam_res=(1, 1), **off)

    def _pictures(self):
        """As `RayRenderer`: uint8 (N, cameras, size, size, 3)."""
        env, cast = self.env, {name: warp.to_torch(x) for name, x in self.cast.items()}
        axes = self.views["cam_xmat"][:, env.cameras, None]  # (N, cameras, 1, 3, 3)
        turned = (axes * self.rays[:, :, None]).sum(-1)  # no matmul, which may round to TF32
        origin = self.views["cam_xpos"][:, env.cameras, None].expand_as(turned)
        cast["direction"].copy_(turned.flatten(1, 2))
        cast["origin"].copy_(origin.flatten(1, 2))
        with self._stream():
            mujoco_warp.refit_bvh(self.model, self.data, self.tree)
            mujoco_warp.rays(
                self.model, self.data, self.cast["origin"], self.cast["direction"], GROUPS, True, self.nobody,
                self.cast["distance"], self.cast["geom"], self.cast["normal"], self.tree,
            )  # fmt: skip
        normal, geom, headlight = cast["normal"], cast["geom"].long(), env.model.vis.headlight
        sun = -torch.nn.functional.normalize(self.varied["light_dir"][:, 0], dim=1)
        shade = (normal * sun[:, None]).sum(-1).clamp(min=0) * self.varied["light_diffuse"][:, :1, 0]
        shade += float(headlight.ambient[0])
        shade -= float(headlight.diffuse[0]) * (normal * cast["direction"]).sum(-1)
        shade[geom < 0] = 1
        palette = torch.nn.functional.pad(self.varied["geom_rgba"][..., :3], (0, 0, 0, 1))
        palette[:, -1] = torch.tensor(BACKGROUND, device=self.device)
        geom[geom < 0] = palette.shape[1] - 1
        each = torch.arange(self.num_envs, device=self.device)[:, None]
        picture = (palette[each, geom] * 255 * shade[..., None]).clamp(max=255).to(torch.uint8)
        return picture.view(-1, len(env.cameras), env.size, env.size, 3)

    def observe(self):
        q = self.views["qpos"][:, -6:]
        zero = torch.zeros_like(q[:, 0])
        fingers = q[:, 4:] / OPEN * 2 - 1
        parts = (q[:, 0] / 0.16, q[:, 1] / 0.16, q[:, 2] / 0.1 - 1, zero, zero, q[:, 3], *fingers.unbind(1))
        return {
            "image": self._pictures(),
            "proprio": torch.stack(parts, 1),
            "task": self.episode["task"].clone(),
        }

    def render(self, row):
        """By MuJoCo's own ray caster, on the host: a video shows few environments."""
        model, data = self.env.model, self.env.data
        for name in ("qpos", "mocap_pos"):
            getattr(data, name)[:] = self.views[name][row].cpu()
        for name, view in self.varied.items():
            getattr(model, name)[:] = view[row].cpu()
        mujoco.mj_forward(model, data)
        return self.env.render()

    # --- exact state

    def _numbers(self):
        physics = {name: self.views[name] for name in STATE}
        return physics | self.varied | self.episode

    def get_state(self):
        state = {name: x.cpu().numpy().copy() for name, x in self._numbers().items()}
        return state | {"rng": [rng_state(rng) for rng in self.rng]}

    def set_state(self, state):
        for name, view in self._numbers().items():
            view[:] = torch.as_tensor(np.array(state[name]), device=self.device)
        for rng, saved in zip(self.rng, state["rng"], strict=True):
            set_rng_state(rng, saved)
        self._derive()
