"""RL4VLA's world (Liu et al. 2025, arXiv:2505.19789): a WidowX puts one of 25 things on a plate, before the
photograph of one of 21 tables, in ManiSkill3 on the CPU.

    pip install --no-deps -r requirements-maniskill.txt      # after requirements.txt; its head names a Vulkan
    python -m mani_skill.utils.download_asset widowx250s     # and bridge_v2_real2sim
    export RL4VLA_ASSETS=RL4VLA/ManiSkill/mani_skill/assets/carrot       # of github.com/gen-robot/RL4VLA
    python bc_warmup.py --env rl4vla --backbone tiny         # of a scripted expert
    python ppo_vla.py --env rl4vla --chunk 1 --num-steps 80 --temperature 1 --lora-rank 32     # OpenVLA 7B

Observation: `image` uint8 (1, size, size, 3), robot and things before the photograph, 640x480 shrunk by PIL's
bicubic as OpenVLA's processor does, and `proprio` float32 (8,): the point between the fingers 3 (m), the
hand's axis-angle 3 (rad), both in the robot's frame, fingers 2 (m).

Action float32 (7,): shift of the hand's target (1 = 5 cm), rotation (1 = 0.25 rad), gripper by its sign (-1
opens, 1 closes). `action_bounds` are in Bridge's units: m, rad, 1 for open and 0 for closed. 5 Hz.

An episode has 80 steps whatever happens, and success is that of the last: the thing lies on the plate. The
reward is the change of 0.1 (it was grasped) + 0.1 (for five steps on end) + 1 (it is on the plate and was
grasped). Splits, by RL4VLA's names of its tests: "train", "eval" (other layouts), "tables" (VisionImage),
"objects" (Carrot), "plates" (Plate), "words" (Instruct), "positions" (Position), "poses" (EEPose). Not built:
moving textures and noise, more things or plates, a thing that is moved amid an episode, a batch on the GPU.

What an episode draws follows from `[split, seed, how many without a seed since]`, and an episode is restored
by acting it out again.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np

from common import UserError
from common.envs import experts, task_chances
from common.envs.experts import carry, descend, play
from common.envs.maniskill import starting
from common.envs.simulation import check_installed, check_memory

SPLITS = ("train", "eval", "tables", "objects", "plates", "words", "positions", "poses")
SEEN, OBJECTS, TABLES, PLATES = 16, 25, 21, 17  # trained on: the first 16 objects and tables, a plate
PHRASES = (  # RL4VLA's, word by word; the first is trained on
    "put $C$ on $P$", "Place the $C$ on the $P$", "set $C$ on $P$", "move the $C$ to the $P$",
    "Take the $C$ and put it on the $P$", "pick up $C$ and set it down on $P$",
    "please put the $C$ on the $P$", "Put $C$ onto $P$.", "place the $C$ onto the $P$ surface",
    "Make sure $C$ is on $P$.", "on the $P$, put the $C$", "put the $C$ where the $P$ is",
    "Move the $C$ from the table to the $P$", "Move $C$ so it’s on $P$.", "Can you put $C$ on $P$?",
    "$C$ on the $P$, please.", "the $C$ should be placed on the $P$.",
)  # fmt: skip
STEPS, HELD = 80, 5
BOUNDS = np.array([0.05] * 3 + [0.25] * 3)  # m and rad of an action of 1
REACH = 0.035  # m, from the fingers' joints to where they grasp
REPOSITORY = "ManiSkill/mani_skill/assets/carrot of github.com/gen-robot/RL4VLA"


@dataclass
class Args:
    """The flags of `--env rl4vla`."""

    cameras: tuple[str, ...] = ("agentview",)
    """the picture that the policy sees (agentview)"""
    size: int = 224
    """the picture's height and width"""
    eval_split: str = "eval"
    """what evaluations show: eval, tables, objects, plates, words, positions, poses"""

    def check(self):
        if self.eval_split not in SPLITS[1:]:
            known = ", ".join(SPLITS[1:])
            raise UserError(f"Unknown split {self.eval_split!r} for RL4VLA's evaluation; known: {known}.")


# --- layouts


def grid(low, high, border=False):
    """-> xy (n, 2) in m: points a fifth of a square of 15 cm apart, from `low` to `high` of its sides; only
    those outside of it, if `border`."""
    line = np.arange(round(low * 5), round(high * 5) + 1) / 5
    points = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    if border:
        points = points[((points < -0.1) | (points > 1.1)).any(1)]
    return (2 * points - 1) * 0.075 + [-0.16, 0.0]


def pairs(points):
    """points (n, 2) -> (P, 2, 2), a thing's and a plate's that are more than 7 cm apart."""
    first, second = np.nonzero(np.linalg.norm(points[:, None] - points[None], axis=-1) > 0.07)
    return np.stack([points[first], points[second]], 1)


@functools.cache
def poses():
    """-> (n, 8), what the robot's joints may differ by at the start, rad; the first is nothing."""
    line, wrist = (-0.15, -0.08, 0.0, 0.08, 0.15), (-0.6, -0.3, 0.0, 0.3, 0.6)
    joints = np.stack(np.meshgrid(*[line] * 5, wrist, indexing="ij"), -1).reshape(-1, 6)
    joints = joints[np.abs(joints[:, 1] + joints[:, 2]) <= 0.25]
    return np.pad(joints, ((1, 0), (0, 2)))


@functools.cache
def choices(split):
    """-> what a split draws from: numbers of `object`, `plate`, `table`, `phrase` and `pose`, `place` (P, 2,
    2), of thing and plate, m, and `turn` of the thing, rad."""
    seen, edge = range(SEEN), split == "positions"
    return SimpleNamespace(
        object=range(SEEN, OBJECTS) if split == "objects" else seen,
        plate=range(1, PLATES) if split == "plates" else range(1),
        table=range(SEEN, TABLES) if split == "tables" else seen,
        phrase=range(1, len(PHRASES)) if split == "words" else range(1),
        pose=range(1, len(poses())) if split == "poses" else range(1),
        place=pairs(grid(-0.2, 1.2, border=True) if edge else grid(0.0, 1.0)),
        turn=np.pi / 8 * np.array([-1, -3, -5, -7] if edge else [0, 2, 4, 6]),
    )


def draw(split, rng, **task):
    """-> a layout, one of each of `choices(split)`, uniformly, but for what `task` fixes. One in eight is the
    evaluation's, and never trained on."""
    found = vars(choices(split))
    while True:
        drawn = {name: int(rng.integers(len(values))) for name, values in found.items()}
        drawn |= {name: found[name].index(value) for name, value in task.items()}
        if split not in ("train", "eval") or (sum(drawn.values()) % 8 == 0) == (split == "eval"):
            return {name: found[name][number] for name, number in drawn.items()}


# --- success and reward


def turned_size(size, rotation):
    """The sides (3,), along the world's axes, of what encloses a box of `size` (3,), m, turned by `rotation`
    (3, 3)."""
    return np.abs(rotation) @ size


def on_plate(thing, plate, thing_size, plate_size, force):
    """Whether the thing lies on the plate: positions and boxes' sides (3,), m; the force between them, N."""
    offset = thing - plate
    near = np.hypot(*offset[:2]) <= plate_size.max() / 2 + 0.01
    low = 0 < offset[2] <= (plate_size[2] + thing_size[2]) / 2 + 0.05
    return bool(near and low and force > 0.03)


def stage(grasped, held, success):
    """What an episode has reached, whose change is the reward: `grasped` at any time, `held` for five steps
    on end at any time, `success` now."""
    return 0.1 * grasped + 0.1 * held + (success and grasped)


# --- assets


def assets_folder():
    """-> RL4VLA's folder. UserError, one sentence, unless all that is needed is there."""
    folder = Path(os.environ.get("RL4VLA_ASSETS", "~/.rl4vla/carrot")).expanduser()
    for need in ("more_carrot/model_db.json", "more_plate/model_db.json", "more_table/imgs"):
        if not (folder / need).exists():
            raise UserError(
                f"RL4VLA's assets are not in {folder}, which has no {need}; set RL4VLA_ASSETS to "
                f"{REPOSITORY}."
            )
    from common.envs import rl4vla_scene

    for file, name in rl4vla_scene.FILES.items():
        if not file.is_file():
            raise UserError(f"{file} is missing: python -m mani_skill.utils.download_asset {name}")
    return folder


@functools.cache
def read_models(folder, kind, count):
    """-> {folder's name: (name, its box's sides (3,) in m, its density)}, in RL4VLA's order."""
    file = folder / f"more_{kind}" / "model_db.json"
    try:
        models = {
            name: (model["name"], np.subtract(model["bbox"]["max"], model["bbox"]["min"]), model["density"])
            for name, model in json.loads(file.read_text()).items()
        }
        if len(models) != count:
            raise ValueError(f"{len(models)} of {count}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not RL4VLA's ({error}); take {REPOSITORY}.") from error
    return models


_idle = {}  # folder and number of plates -> scenes of this process that no environment has


class PutOnPlateEnv(gym.Env):
    """See the module's docstring and `Args`. Raises UserError, one sentence, for what is unknown, not
    installed, missing or without Vulkan."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    has_success, draws_tasks, active_dims, dataset = True, True, np.ones(7, bool), "bridge_orig"
    action_bounds = np.r_[-BOUNDS, 1.0], np.r_[BOUNDS, 0.0]
    WORKER_GB, TASK_GB = 1.5, 0.02  # a worker process, and each further scene in it

    def __init__(self, split="train", cameras=("agentview",), size=224):
        check_installed("rl4vla", ("mani_skill", "sapien"), "maniskill")
        if split not in SPLITS:
            raise UserError(f"RL4VLA has no split {split!r} here; known: {', '.join(SPLITS)}.")
        if tuple(cameras) != ("agentview",):
            raise UserError(f"RL4VLA has one camera, agentview; {' '.join(cameras) or 'none'} is another.")
        if size < 1:
            raise UserError(f"size must be at least 1, got {size}.")
        self.folder, self.split, self.size, self.scene = assets_folder(), split, size, None
        things = read_models(self.folder, "carrot", OBJECTS)
        plates = read_models(self.folder, "plate", PLATES)
        count = PLATES if split == "plates" else 1  # of plates in its scene
        self.models = {"carrot": things, "plate": dict([*plates.items()][:count])}
        self.key = self.folder, count
        things, plates, found = [*things.values()], [*plates.values()], choices(split)
        self.tasks = [
            dict(object=thing, plate=plate, phrase=phrase)
            for thing in found.object for plate in found.plate for phrase in found.phrase
        ]  # fmt: skip
        self.instructions = [
            PHRASES[task["phrase"]].replace("$C$", things[task["object"]][0])
            .replace("$P$", plates[task["plate"]][0])
            for task in self.tasks
        ]  # fmt: skip
        self.episode = [int(np.random.default_rng().integers(2**31)), -1]  # seed, episodes without since
        box = gym.spaces.Box
        self.observation_space = gym.spaces.Dict(
            image=box(0, 255, (1, size, size, 3), np.uint8), proprio=box(-np.inf, np.inf, (8,), np.float32),
            task=box(0, len(self.tasks) - 1, (), np.int64),
        )  # fmt: skip
        self.action_space = box(-1, 1, (7,), np.float32)

    def _make_scene(self, layout):
        check_memory(type(self))
        with starting() as renderer:
            from common.envs.rl4vla_scene import Scene

            return Scene(self.folder, self.models, poses(), layout, renderer)

    def _begin(self, task, layout):
        self.task, self.layout, self.actions = task, layout, []
        if self.scene is None:
            idle = _idle.setdefault(self.key, [])
            self.scene = idle.pop() if idle else self._make_scene(layout)
        self.scene.begin(layout)
        self.grasps, self.grasped, self.held, self.reached = 0, False, False, 0.0

    def reset(self, *, seed=None, options=None):
        self.episode = [int(seed), 0] if seed is not None else [self.episode[0], self.episode[1] + 1]
        rng = np.random.default_rng([SPLITS.index(self.split), *self.episode])
        task = int(rng.choice(len(self.tasks), p=task_chances(options, np.arange(len(self.tasks)))))
        self._begin(task, draw(self.split, rng, **self.tasks[task]))
        return self.observe(), {"success": False}

    def advance(self, action):
        """One control step (0.2 s) of physics. action (7,) -> reward, terminated, truncated, info; renders
        nothing."""
        action = np.clip(action, -1, 1).astype(np.float32)
        self.actions.append(action)
        opens = 1.0 if action[6] < 0 else -1.0
        self.scene.step(np.r_[action[:6] * BOUNDS, opens].astype(np.float32))
        grasps, success = self.scene.found()
        self.grasps = self.grasps + 1 if grasps else 0
        self.grasped, self.held = self.grasped or grasps, self.held or self.grasps >= HELD
        before, self.reached = self.reached, stage(self.grasped, self.held, success)
        return self.reached - before, False, len(self.actions) >= STEPS, {"success": success}

    def observe(self):
        from PIL import Image

        picture = Image.fromarray(self.scene.picture())
        image = np.asarray(picture.resize((self.size, self.size), Image.Resampling.BICUBIC))[None]
        return {"image": image, "proprio": self.scene.hand().astype(np.float32), "task": np.int64(self.task)}

    def step(self, action):
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info

    def render(self):
        """For a video, uint8 (480, 640, 3)."""
        return self.scene.picture()

    def close(self):
        """Leaves its scene to this process's next environment, for which a reset begins all anew."""
        if self.scene is not None:
            _idle[self.key].append(self.scene)
        self.scene = None

    def get_state(self):
        actions = np.array(self.actions, np.float32).reshape(-1, 7)
        layout = {name: np.asarray(value) for name, value in self.layout.items()}
        return {"episode": [*self.episode, self.task], "layout": layout, "actions": actions}

    def set_state(self, state):
        *self.episode, task = map(int, state["episode"])
        layout = {name: np.asarray(value) for name, value in state["layout"].items()}
        self._begin(task, {name: value if value.ndim else value.item() for name, value in layout.items()})
        for action in np.asarray(state["actions"]):
            self.advance(action)

    def expert(self):
        """The action (7,) of a scripted controller, from the state alone: it grasps the thing across, carries
        it, lets go, and stays above the plate."""
        thing, plate, hand, fingers, across = self.scene.for_expert()
        grasps, success = self.scene.found()
        turn, goal = 0.0, plate + [0, 0, self.scene.sizes[0][2] / 2 + 0.01]
        if success and not grasps:
            way, grip = np.array([0, 0, 0.05 * (hand[2] < plate[2] + 0.15)]), -1.0
        elif grasps and np.hypot(*(goal - thing)[:2]) < 0.015 and thing[2] < goal[2] + 0.02:
            way, grip = np.zeros(3), -1.0
        elif grasps:
            way, _, grip = carry(thing, goal, 0.06, 0.0)
        else:
            way, _, grip = descend(thing + [0, 0, REACH] - hand)
            turn = np.arctan2(across[1], across[0]) - np.arctan2(fingers[1], fingers[0])
            turn = (turn + np.pi / 2) % np.pi - np.pi / 2
            if abs(turn) > 0.3 and grip < 0:  # not down yet
                way[2] = max(way[2], 0.0)
        move = np.r_[way * [-1, -1, 1], 0, 0, turn] / BOUNDS  # the robot faces backwards
        return np.r_[move, grip].clip(-1, 1).astype(np.float32)


def make(split="train", eval_split="eval", **kwargs):
    """For `common.envs.make_envs`: its split "eval" is the one that --eval-split names."""
    return PutOnPlateEnv(split=eval_split if split == "eval" else split, **kwargs)


# --- demonstrations


def _demonstrate(job):
    seeds, noise, kwargs = job
    return play(make(**kwargs), seeds, noise)


def demonstrations(num_episodes, seed, num_workers=None, noise=0.1, **kwargs):
    """Successful episodes of the scripted expert, as in the contract of `common/envs/__init__.py`. noise: the
    standard deviation on moves and turn."""
    return experts.demonstrations(_demonstrate, num_episodes, seed, num_workers, noise, kwargs)
