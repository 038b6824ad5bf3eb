"""The simulation of `--env rl4vla`: ManiSkill's WidowX, everything that it may have to move, one row.

Written after RL4VLA's put_on_in_scene_multi.py, PutOnPlateInScene25Main-v3.
"""

import functools

import cv2
import numpy as np
import sapien
import torch
from mani_skill import ASSET_DIR
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import base_env
from mani_skill.utils import sapien_utils
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig

from common import UserError
from common.envs.rl4vla import on_plate, turned_size
from common.envs.simulation import axis_angle

# The room's shape: the photograph hides it. The robot is ManiSkill's own.
ROOM = ASSET_DIR / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb"
FILES = {ROOM: "bridge_v2_real2sim", ASSET_DIR / "robots/widowx/wx250s.urdf": "widowx250s"}
QPOS = np.array([-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037])
HERE, AWAY = ([0.147, 0.028, z] for z in (0.87, 1.87))  # the robot, m
DROP = 0.95  # m, from where things fall on the table
CONTROL = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"


@functools.cache
def photograph(folder, number):
    """-> of table `number`, uint8 (480, 640, 3). UserError where it is missing or no picture."""
    files = sorted((folder / "more_table" / "imgs").glob("*.png"))
    picture = cv2.imread(str(files[number])) if number < len(files) else None
    if picture is None:
        raise UserError(f"{folder}/more_table/imgs has no picture {number + 1}; take RL4VLA's again.")
    return cv2.resize(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), (640, 480))


def place(thing):
    return thing.pose.p[0].numpy().astype(float)


class Scene(BaseEnv):
    """models: {kind: {folder's name: (name, box's sides (3,) in m, density)}} of carrots, as RL4VLA calls all
    that is moved, and plates; poses (n, 8), what the joints may differ by at the start, rad."""

    SUPPORTED_REWARD_MODES = ("none",)

    def __init__(self, folder, models, poses, layout, renderer):
        self.folder, self.models, self.poses, self.layout = folder, models, poses, layout
        super().__init__(
            robot_uids=base_env.WidowX250SBridgeDatasetFlatTable, num_envs=1, obs_mode="none",
            reward_mode="none", control_mode=CONTROL, sim_backend="physx_cpu", render_backend=renderer,
        )  # fmt: skip

    @property
    def _default_sim_config(self):
        return SimConfig(sim_freq=500, control_freq=5, spacing=20)

    # --- what it consists of

    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose(p=[0.127, 0.060, 0.85], q=[0, 0, 0, 1]))

    def _load_scene(self, options):
        sapien_utils.set_articulation_render_material(self.agent.robot._objs[0], specular=0.9, roughness=0.3)
        room = self.scene.create_actor_builder()
        room.add_nonconvex_collision_from_file(str(ROOM), pose=sapien.Pose(q=[0.707, 0.707, 0, 0]))
        room.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])
        room.build_static(name="room")
        rubber = sapien.physx.PhysxMaterial(static_friction=1.0, dynamic_friction=1.0, restitution=0.0)
        self.parts, self.there = {kind: [] for kind in self.models}, []
        for kind, models in self.models.items():
            for name, (_, _, density) in models.items():
                builder, path = self.scene.create_actor_builder(), self.folder / f"more_{kind}" / name
                looks = [path / f"textured.{end}" for end in ("obj", "dae", "glb")]
                look = next(filter(type(path).is_file, looks), looks[-1])
                for file in (path / "collision.obj", look):
                    if not file.is_file():
                        raise UserError(f"{file} is missing; take RL4VLA's assets again.")
                builder.add_multiple_convex_collisions_from_file(
                    str(path / "collision.obj"), material=rubber, density=density
                )
                builder.add_visual_from_file(str(look))
                builder.initial_pose = sapien.Pose([len(self.parts), 0.3 * len(self.there), 1.0])
                self.parts[kind].append(builder.build(name=f"{kind} {name}"))
                self.there.append(self.parts[kind][-1]._objs[0])

    def _load_lighting(self, options):
        self.scene.set_ambient_light([0.3] * 3)
        self.scene.add_directional_light([0, 0, -1], [2.2] * 3)
        self.scene.add_directional_light([-1, -0.5, -1], [0.7] * 3)
        self.scene.add_directional_light([1, 1, -1], [0.7] * 3)

    # --- an episode

    def begin(self, layout):
        """An episode of a layout (see `rl4vla.draw`)."""
        self.layout = layout
        self.reset(seed=0)

    def _initialize_episode(self, env_idx, options):
        """Two things fall on the table, then the robot comes. The others are not there, and these are put
        there anew: what PhysX remembers of them would let an episode depend on those before it."""
        layout, room = self.layout, self.scene.sub_scenes[0]
        self.agent.robot.set_pose(sapien.Pose(AWAY, [0, 0, 0, 1]))
        for entity in self.there:
            room.remove_entity(entity)
        half, chosen = layout["turn"] / 2, [layout["object"], layout["plate"]]
        self.pair = [bodies[which] for bodies, which in zip(self.parts.values(), chosen, strict=True)]
        self.there = [body._objs[0] for body in self.pair]
        turns = [np.cos(half), 0, 0, np.sin(half)], [1, 0, 0, 0]
        for body, entity, xy, turn in zip(self.pair, self.there, layout["place"], turns, strict=True):
            room.add_entity(entity)
            at, facing = (torch.tensor(x, dtype=torch.float32)[None] for x in ([*xy, DROP], turn))
            body.set_pose(Pose.create_from_pq(at, facing))
            body.set_linear_velocity(torch.zeros(1, 3))
            body.set_angular_velocity(torch.zeros(1, 3))
        self._settle(50)
        speeds = [[x.norm() for x in (b.linear_velocity, b.angular_velocity)] for b in self.pair]
        if sum(x for x, _ in speeds) > 1e-3 or sum(x for _, x in speeds) > 1e-2:
            self._settle(600)
        self.agent.robot.set_pose(sapien.Pose(HERE, [0, 0, 0, 1]))
        seen = [*self.there, *(link._objs[0].entity for link in self.agent.robot.get_links())]
        self.solid = np.isin(np.arange(2**15), [x.per_scene_id for x in seen])[:, None]  # of a segmentation's
        self.agent.reset(init_qpos=QPOS + self.poses[layout["pose"]])
        models = zip(self.models.values(), chosen, strict=True)
        self.boxes = [[*known.values()][which][1] for known, which in models]  # their own sides
        self.sizes = [  # along the world's axes
            turned_size(box, body.pose.to_transformation_matrix()[0, :3, :3].numpy())
            for box, body in zip(self.boxes, self.pair, strict=True)
        ]

    def _settle(self, substeps):
        for _ in range(substeps):
            self.scene.step()

    def evaluate(self):
        return {}

    def found(self):
        """-> whether the thing is grasped, and whether it lies on the plate."""
        thing, plate = self.pair
        force = float(self.scene.get_pairwise_contact_forces(thing, plate).norm())
        return bool(self.agent.is_grasping(thing)), on_plate(place(thing), place(plate), *self.sizes, force)

    # --- what is seen of it

    def picture(self):
        """uint8 (480, 640, 3): robot and things before the photograph."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self.scene.sensors["3rd_view_camera"]
        camera.capture()
        seen = camera.get_obs(depth=False, position=False)
        solid = self.solid[seen["segmentation"][0, :, :, 0].cpu().numpy()]
        return np.where(solid, seen["rgb"][0].cpu().numpy(), photograph(self.folder, self.layout["table"]))

    def _fingers(self):
        return place(self.agent.finger1_link), place(self.agent.finger2_link)

    def hand(self):
        """-> in the robot's frame, which faces backwards: the point between the fingers (3,), the hand's
        axis-angle (3,); fingers (2,)."""
        robot = self.agent.robot
        turn = (robot.pose.inv() * robot.links_map["ee_gripper_link"].pose).q[0].numpy()
        between = (sum(self._fingers()) / 2 - place(robot)) * [-1, -1, 1]
        return np.r_[between, axis_angle(turn), robot.get_qpos()[0, -2:]]

    def for_expert(self):
        """-> (3,) each, in the world's frame: thing, plate, hand, the directions from finger to finger and
        across the thing, on its narrowest side that lies flat."""
        thing, (one, other) = self.pair[0], self._fingers()
        axes = thing.pose.to_transformation_matrix()[0, :3, :3].numpy().T
        flat = [k for k in range(3) if abs(axes[k, 2]) < 0.7]
        across = axes[min(flat, key=lambda k: self.boxes[0][k])]
        return place(thing), place(self.pair[1]), (one + other) / 2, other - one, across
