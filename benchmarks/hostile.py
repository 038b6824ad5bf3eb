"""Hostile inputs to all eight scripts: flags, files, checkpoints, run folders, worlds.

python benchmarks/hostile.py                     # every case, about ten minutes on two cores
python benchmarks/hostile.py --only 'worlds.*sac'

A case is a command line, what is prepared for it in a folder of its own, and what has to happen:

    refused    exit code 2 and one sentence on stderr; what was prepared is as it was, and nothing is left
    fine       exit code 0, no traceback
    raises     a world's own exception: it ends with its author's traceback, and nothing prepared is touched

Each runs in a forked child of this process, which has imported torch and the scripts' modules already: a case
costs a second, not five. The table counts what happened; whatever is not as declared is listed, and then the
exit status is 1.
"""

import argparse
import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing.util
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a child that is forked has no threads but its own
os.environ["HF_HUB_OFFLINE"] = "1"

import gymnasium  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from common.datasets import save_d4rl, save_demonstrations  # noqa: E402
from common.envs import WORLDS, tabletop  # noqa: E402
from common.flags import NONNEGATIVE, POSITIVE, SHARE  # noqa: E402
from common.run import compose, flag, read_source  # noqa: E402

ONLINE_RL = ("ppo_vla", "grpo_vla")
VLA = ("ppo_vla", "grpo_vla", "bc_warmup")
OFFLINE = ("iql", "cql", "td3_bc", "decision_transformer")
SCRIPTS = (*VLA, *OFFLINE, "sac")
FEW = "--eval-episodes 1 --device cpu --run-name r --output-dir {case}/runs"
ONLINE = f"{FEW} --eval-envs 1 --num-workers 0 --save-freq 1"
LEARN = "--minibatch-size 4 --micro-batch-size 4 --update-epochs 1"
DATA = f"{FEW} --dataset {{home}}/pendulum.hdf5 --total-timesteps 2 --batch-size 8 --eval-freq 1"
SMALL = "--width 8 --depth 1"
BASE = {  # the smallest run of each script
    "ppo_vla": f"{ONLINE} {LEARN} --env CartPole-v1 --num-envs 2 --num-steps 4 --total-timesteps 16",
    "grpo_vla": f"{ONLINE} {LEARN} --env CartPole-v1 --num-envs 4 --group-size 2 --num-groups 1 "
    "--total-timesteps 60",
    "bc_warmup": f"{ONLINE} --num-demos 2 --grounding-scenes 4 --grounding-steps 1 --gradient-steps 2 "
    "--batch-size 4 --warmup-steps 1 --chunk 5",
    "iql": f"{DATA} {SMALL}",
    "cql": f"{DATA} {SMALL} --critic-depth 1 --cql-samples 2",
    "td3_bc": f"{DATA} {SMALL}",
    "decision_transformer": f"{DATA} --embed-dim 8 --n-layer 1 --context-length 4 --warmup-steps 1",
    "sac": f"{FEW} {SMALL} --env Pendulum-v1 --num-envs 1 --total-timesteps 310 --learning-starts 300 "
    "--batch-size 8 --buffer-size 400",
}


@dataclass
class Case:
    kind: str
    script: str
    what: str
    words: str | list
    prepare: object = None  # called with the case's folder, before
    within: object = None  # called in the child, just before the script
    expect: str = "refused"
    leaves: bool = False  # a refusal amid the training, so that its run's folder is there
    say: str = ""  # a regular expression that the sentence has to match
    after: object = None  # called with the folder -> a complaint or None


# --- worlds that break their promises


@dataclass
class Args:
    """The flags of `--env hostile`, a world of pictures."""

    defect: str = "none"
    """what is wrong with it"""


def make(split, defect):
    return Hostile(defect, pictures=True)


class Hostile(gymnasium.Env):
    """Four numbers, maybe a picture, 8 steps an episode; `defect` strikes at the third step, or at once."""

    has_success, instructions, render_mode = False, ["do it"], "rgb_array"
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, defect="none", pictures=False, render_mode=None):
        self.defect, self.pictures, width = defect, pictures, 7 if pictures else 2
        box = gymnasium.spaces.Box
        vector = box(-9, 9, (4,), np.float32)
        self.action_space = box(-1, 1, (width,), np.float32)
        self.active_dims, self.observation_space = np.ones(width, bool), vector
        if pictures:
            picture, task = box(0, 255, (1, 64, 64, 3), np.uint8), box(0, 0, (), np.int64)
            self.observation_space = gymnasium.spaces.Dict(proprio=vector, image=picture, task=task)
        spaces = {
            "dict space": gymnasium.spaces.Dict(a=vector),
            "discrete space": gymnasium.spaces.Discrete(4),
            "picture space": box(0, 255, (8, 8, 3), np.uint8),
            "tuple space": gymnasium.spaces.Tuple([vector]),
        }
        if defect in spaces:
            self.observation_space = spaces[defect]
        if defect == "unbounded actions":
            self.action_space = box(-np.inf, np.inf, (width,), np.float32)
        if defect == "binary actions":
            self.action_space = gymnasium.spaces.MultiBinary(3)
        if defect == "raises when made":
            raise KeyError("no such robot")
        if defect == "wants a display":
            raise ImportError("no display")

    def observation(self):
        value = np.zeros(4, np.float32)
        strange = {
            "nan": value * np.nan,
            "infinite": value + np.inf,
            "short": value[:2],
            "long": np.zeros(9, np.float32),
            "text": "nothing",
            "none": None,
            "ragged": [[1.0], [1.0, 2.0]],
            "complex": value * 1j,
            "objects": np.array([None] * 4),
            "huge": np.full(4, 1e300),
            "scalar": 0.0,
        }
        kind = self.defect.removesuffix(" observation")
        if kind != self.defect and self.steps >= 3:
            value = strange[kind]
        if self.defect == "nan at reset":
            value = value * np.nan
        if not self.pictures:
            return value
        picture = np.zeros((1, 64, 64, 3), np.uint8)
        if self.steps >= 3:
            picture = {"float picture": picture / 1.0, "small picture": picture[:, :8]}.get(
                self.defect, picture
            )
        return {"proprio": value, "image": picture, "task": np.int64(0)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if self.defect == "raises at reset":
            raise KeyError("lost the robot")
        return self.observation() if self.defect == "reset of one value" else (self.observation(), {})

    def observe(self):
        return self.observation()

    def advance(self, action):
        reward, ended, info, defect = -1.0, False, {}, self.defect
        self.steps += 1
        if self.steps >= 3:
            reward = {
                "nan reward": np.nan,
                "infinite reward": np.inf,
                "reward of text": "a",
                "no reward": None,
                "reward of two": [1, 2],
            }.get(defect, reward)
            if defect == "raises":
                raise KeyError("the robot fell apart")
            if defect == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if defect == "hangs":
                time.sleep(10**6)
            if defect == "four values":
                return reward, ended, info
            if defect == "six values":
                return reward, ended, False, info, 7
            if defect == "nothing":
                return None
            if defect == "ends with text":
                ended = "no"
        return reward, ended, self.steps >= 8 and defect != "endless", info

    def step(self, action):
        found = self.advance(action)
        return found if found is None else (self.observation(), *found)

    def render(self):
        if self.defect == "raises in a picture":
            raise KeyError("no light")
        return (
            np.zeros((8, 8), np.float32) if self.defect == "flat picture" else np.zeros((64, 64, 3), np.uint8)
        )


DEFECTS = [  # of every world; what happens
    *[
        (f"{kind} observation", "refused", "which|that is|instead of|observations")
        for kind in (
            "nan",
            "infinite",
            "short",
            "long",
            "text",
            "none",
            "ragged",
            "complex",
            "objects",
            "huge",
            "scalar",
        )
    ],
    *[(f"{kind} reward", "refused", "a reward that is NaN or infinite") for kind in ("nan", "infinite")],
    *[(kind, "refused", "a reward of type") for kind in ("reward of text", "no reward", "reward of two")],
    *[
        (kind, "refused", "")
        for kind in (
            "nan at reset",
            "four values",
            "six values",
            "nothing",
            "reset of one value",
            "wants a display",
            "unbounded actions",
            "binary actions",
        )
    ],
    ("raises", "raises", "KeyError"),
    ("raises at reset", "raises", "KeyError"),
    ("raises when made", "raises", "KeyError"),
]
SPACES = ("dict space", "discrete space", "picture space", "tuple space")  # of Gymnasium's worlds
PICTURES = ("float picture", "small picture")  # of the contract's
for name in {name for name, _, _ in DEFECTS} | {*SPACES, "none", "dies", "hangs", "endless"}:
    gymnasium.register(f"Hostile{name.title().replace(' ', '')}-v0", Hostile, kwargs={"defect": name})


def gym_id(defect):
    return f"Hostile{defect.title().replace(' ', '')}-v0"


# --- cases: flags


def bad_values(name, hint, said):
    """Texts that a flag of this type and these limits cannot have."""
    parts = get_args(hint)
    if hint is float or (parts and float in parts and str not in map(type, parts)):
        yield from ("nan", "inf", "-inf", "", "many")
    elif hint is int or (parts and int in parts):
        yield from ("1.5", "", "many", str(10**30), str(-(10**30)))
    elif get_origin(hint) is Literal:
        yield from ("nonsense", "")
    elif hint is bool:
        return
    elif hint is str or (parts and str in parts):
        yield ""
    low = {POSITIVE: ("0", "-1"), NONNEGATIVE: ("-1", "-3"), SHARE: ("-0.1", "1.1")}
    for mark in said:
        yield from low.get(mark, ()) if isinstance(mark, str) else ()


def plain(hint):
    """-> the type, and what is annotated to it"""
    if get_origin(hint) is Annotated:
        inner, *said = get_args(hint)
        below, more = plain(inner)
        return below, [*more, *said]
    return hint, []


def flag_cases(modules):
    """Every flag of every script with two values that it cannot have, in turn, and all the limits."""
    for script, module in modules.items():
        seen, _ = read_source(BASE[script].split(), module.Args, script)
        Full, *_ = compose(module.Args, module.PRESETS, seen, {})
        for turn, field in enumerate(dataclasses.fields(Full)):
            hint = next(
                c.__annotations__[field.name]
                for c in Full.__mro__
                if field.name in c.__dict__.get("__annotations__", {})
            )
            hint, said = plain(hint)
            values = list(bad_values(field.name, hint, said))
            limits = [value for value in values if value in ("0", "-1", "-0.1", "1.1")]
            others = [value for value in values if value not in limits]
            others = [others[turn % len(others)]] if others else []
            for value in limits[:1] + others:
                words = [*BASE[script].split(), f"{flag(field.name)}={value}"]
                yield Case("flags", script, f"{flag(field.name)} {value or 'empty'}", words)
        yield Case("flags", script, "unknown name", f"{BASE[script]} --no-such-flag 1")
        yield Case("flags", script, "a word too many", f"{BASE[script]} surplus")
        yield Case("flags", script, "a flag without its value", f"{BASE[script]} --seed")
    for script, what, words in SPECIAL_FLAGS:  # what only an update needs is refused at the first of them
        late = re.search("(batch-size|group-size|context-length|cql-samples) 10{8}", what)
        yield Case("flags", script, what, words, leaves=bool(late))


def special(script, *flags):
    return [(script, words, f"{BASE[script]} {words}") for words in flags]


SPECIAL_FLAGS = [  # contradictions, what has no effect, and what no machine can hold
    *special(
        "ppo_vla",
        "--env nonsense",
        "--env NoSuch-v9",
        "--backbone nonsense",
        "--backbone {case}",
        "--backbone tiny",
        "--head gaussian",
        "--init-std 0.1",
        "--evaluate",
        "--dual-clip 0.5",
        "--num-envs 1000000000",
        "--num-steps 1000000000000",
        "--chunk 1000000000",
        "--suite libero_goal",
        "--lora-rank 4",
        "--worker-timeout 5",
        "--env Blackjack-v1",
        "--env FrozenLake-v1",
        "--resume {case}",
        "--resume {home}/ppo_vla --checkpoint {home}/ppo_vla",
        "--train-vision",
        "--num-workers -2",
        "--action-history 3",
        "--seed -1",
        "--seed 9223372036854775808",
        "--run-name ../out",
        "--run-name /out",
        "--output-dir {home}/demos.hdf5",
        "--track",
        "--checkpoint {home}/ppo_vla --chunk 3",
        "--checkpoint {home}/ppo_vla --head tokens",
        "--checkpoint {home}/iql",
        "--checkpoint {home}/pendulum.hdf5",
        "--max-episode-steps -1",
        "--env robosuite --horizon -1",
        "--env robosuite --size 0",
        "--env robosuite --cameras wrist1",
        "--env robosuite --cameras none --actions discrete --tasks TwoArmLift",
        "--env robosuite --tasks Lift TwoArmLift",
        "--env robomimic",
        "--env robomimic --file {case}",
        "--env robomimic --file {home}/pendulum.hdf5",
        "--env robomimic --keys nonsense",
        "--env driving --traffic 2",
        "--env driving --map-blocks 0",
        "--env driving --num-workers 2",
        "--env libero --size 0 --backbone tiny",
        "--env libero --horizon -1 --backbone tiny",
        "--env tabletop --backbone dinobert --picture-size 0",
        "--env tabletop --backbone dinobert --fusion-width 100",
        "--env tabletop --backbone dinobert --vision-tower {home}/ppo_vla",
        "--env tabletop --backbone dinobert --lora-rank 4",
        "--env tabletop --backbone {home}/qwen-vl --lora-rank 4",
        "--picture-size 224",
    ),
    *special(
        "grpo_vla",
        "--group-size 1",
        "--group-size 0",
        "--group-size -2",
        "--accuracy-low 0.9 --accuracy-high 0.1",
        "--constant-length 5",
        "--env nonsense",
        "--num-envs 1000000000",
        "--chunk 1000000000",
        "--group-size 1000000000",
        "--evaluate",
        "--env Pendulum-v1 --head discrete",
        "--dual-clip 1",
        "--verifier-gamma 2",
        "--init-std 1",
        "--num-groups 1000000000 --num-envs 1000000000",
        "--leave-one-out --group-size 1",
    ),
    *special(
        "bc_warmup",
        "--env CartPole-v1",
        "--backbone mlp",
        "--init-std 0.1",
        "--head gaussian --label-sigma 2",
        "--demos {home}/demos.hdf5 --grounding-scenes 5",
        "--demos {home}/demos.hdf5 --grounding-steps 5",
        "--demos {home}/demos.hdf5 --grounding-coef 1",
        "--demos {home}/demos.hdf5 --demo-noise 0.1",
        "--num-demos 1000000000",
        "--batch-size 100000000000",
        "--grounding-scenes 1000000000000",
        "--chunk 1000000000",
        "--evaluate",
        "--image-aug 2",
        "--image-aug nan",
        "--env robomimic --demos {home}/demos.hdf5",
        "--env robomimic --demos {home}/pendulum.hdf5",
        "--tasks nonsense",
        "--reward nonsense",
        "--checkpoint {home}/sac",
        "--lora-rank 1000000000",
    ),
    *[
        case
        for script in ("iql", "td3_bc", "cql", "sac")
        for case in special(
            script,
            "--width 1000000000",
            "--depth 1000000000",
            "--width 1000000 --depth 1000000",
            "--batch-size 1000000000000",
            "--evaluate",
            "--eval-episodes 0 --evaluate --checkpoint {home}/iql",
            "--env CartPole-v1",
            "--env tabletop",
            "--checkpoint {home}/decision_transformer",
        )
    ],
    *special(
        "iql",
        "--keys object",
        "--env robomimic --keys object",
        "--env robomimic --dataset {home}/demos.hdf5",
        "--dataset nonsense",
        "--dataset hopper",
        "--env nonsense",
        "--checkpoint {home}/cql",
        "--expectile 2",
        "--dropout 1.5",
        "--resume {home}/cql",
        "--seed 1.5",
        "--bf16 maybe",
        "--offline-ratio 0.5",
        "--online-steps -1",
        "--online-steps 1000000000000000",
    ),
    *special(
        "cql",
        "--cql-samples 1000000000000",
        "--critic-depth 1000000000",
        "--alpha nonsense",
        "--target-gap 1 --cql-alpha 0",
        "--min-penalty 1 --cql-alpha 0",
        "--alpha -1",
    ),
    *special(
        "td3_bc",
        "--policy-delay 0",
        "--alpha -1",
        "--noise-clip -1",
        "--dataset {case}",
        "--exploration-noise 0.2",
    ),
    *special(
        "decision_transformer",
        "--embed-dim 1000000000",
        "--n-layer 1000000000",
        "--n-head 3",
        "--context-length 1000000000",
        "--max-timesteps 1000000000000",
        "--target-returns nan",
        "--target-returns",
        "--return-scale 0",
        "--n-head 1000000000",
        "--checkpoint {home}/iql",
    ),
    *special(
        "sac",
        "--buffer-size 1000000000000000",
        "--alpha -1",
        "--alpha nonsense",
        "--append",
        "--collect 5",
        "--utd-ratio nan",
        "--num-envs 1000000000",
        "--env tabletop",
        "--save-dataset {home}/sac",
        "--save-dataset {home}/demos.hdf5/d.hdf5",
        "--offline-ratio 0.5",
        "--target-critics 3",
        "--critics 1000000000000",
        "--prior-data {case}",
        "--prior-data {home}/demos.hdf5",
    ),
]


# --- cases: files


def hdf5(name, function):
    """A copy of the home's file, changed"""

    def prepare(case):
        shutil.copy(HOME / name, case / name)
        with h5py.File(case / name, "r+") as file:
            function(file)

    return prepare


def replaced(key, function):
    def change(file):
        value = function(file[key][()])
        del file[key]
        file[key] = value

    return change


def raw(name, function):
    """A copy of the home's file, its bytes changed"""
    return lambda case: (case / name).write_bytes(function((HOME / name).read_bytes()))


def pipe(name):
    return lambda case: os.mkfifo(case / name)


def unix_socket(name):
    def prepare(case):
        here = os.getcwd()
        os.chdir(case)  # its path has to be short
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as end:
            end.bind(name)
        os.chdir(here)

    return prepare


def loop(name):
    return lambda case: (case / name).symlink_to(name)


def nobody():
    """In the child: another user than the owner of the files."""
    os.setgid(65534)
    os.setuid(65534)


def file_damages(name):
    """What can stand where a file is expected, of any kind: description, prepare."""
    yield from [
        ("is not there", None),
        ("is empty", raw(name, lambda b: b"")),
        ("is a half", raw(name, lambda b: b[: len(b) // 2])),
        ("is of noise", raw(name, lambda b: random.Random(1).randbytes(9999))),
        ("lacks its end", raw(name, lambda b: b[:-99])),
        ("is a text", raw(name, lambda b: b"hello\n")),
        ("is a pipe", pipe(name)),
        ("is a socket", unix_socket(name)),
        ("is a folder", lambda case: (case / name).mkdir()),
        ("is a loop", loop(name)),
        ("is a device", lambda case: (case / name).symlink_to("/dev/zero")),
        ("begins with noise", raw(name, lambda b: b"\xff" * 64 + b[64:])),
    ]


DATASETS = [  # of pendulum.hdf5
    *[
        (f"{key} are not there", lambda file, key=key: file.__delitem__(key))
        for key in ("observations", "actions", "rewards", "terminals")
    ],
    *[
        (f"{key} are NaN", replaced(key, lambda x: x * np.nan))
        for key in ("observations", "actions", "rewards")
    ],
    *[(f"{key} are infinite", replaced(key, lambda x: x + np.inf)) for key in ("observations", "rewards")],
    *[
        (f"{key} are texts", replaced(key, lambda x: np.array([b"a"] * len(x))))
        for key in ("observations", "actions", "rewards", "terminals")
    ],
    *[(f"{key} are too few", replaced(key, lambda x: x[:-7])) for key in ("actions", "rewards", "terminals")],
    *[(f"{key} are none", replaced(key, lambda x: x[:0])) for key in ("observations", "actions")],
    (
        "all are none",
        lambda file: [
            replaced(key, lambda x: x[:0])(file) for key in list(file) if isinstance(file[key], h5py.Dataset)
        ],
    ),
    ("observations are flat", replaced("observations", lambda x: x[:, 0])),
    ("observations are wider", replaced("observations", lambda x: np.tile(x, 3))),
    ("observations are pictures", replaced("observations", lambda x: np.zeros((len(x), 8, 8, 3)))),
    ("observations are complex", replaced("observations", lambda x: x * 1j)),
    ("actions are a group", lambda file: (file.__delitem__("actions"), file.create_group("actions"))),
    ("actions are a number", replaced("actions", lambda x: np.float32(1))),
    ("actions are wider", replaced("actions", lambda x: np.tile(x, 3))),
    ("rewards are a matrix", replaced("rewards", lambda x: np.stack([x, x], 1))),
    ("there is nothing", lambda file: [file.__delitem__(key) for key in list(file)]),
]
DEMOS = [  # of demos.hdf5
    *[
        (f"{key} are not there", lambda file, key=key: file.__delitem__(f"data/demo_0/{key}"))
        for key in ("actions", "obs", "obs/proprio", "obs/agentview_rgb")
    ],
    *[
        (f"{key} are NaN", replaced(f"data/demo_1/{key}", lambda x: x * np.nan))
        for key in ("actions", "obs/proprio")
    ],
    *[
        (f"{key} are texts", replaced(f"data/demo_1/{key}", lambda x: np.array([b"a"] * len(x))))
        for key in ("actions", "obs/proprio", "obs/agentview_rgb")
    ],
    *[
        (f"{key} are too few", replaced(f"data/demo_1/{key}", lambda x: x[:-1]))
        for key in ("actions", "obs/proprio", "obs/agentview_rgb")
    ],
    *[
        (f"{key} are none", replaced(f"data/demo_0/{key}", lambda x: x[:0]))
        for key in ("actions", "obs/agentview_rgb")
    ],
    ("actions are beyond 1", replaced("data/demo_0/actions", lambda x: x + 7)),
    ("actions are of two numbers", replaced("data/demo_0/actions", lambda x: x[:, :2])),
    ("pictures are floats", replaced("data/demo_0/obs/agentview_rgb", lambda x: x / 255)),
    ("pictures are grey", replaced("data/demo_0/obs/agentview_rgb", lambda x: x[..., :1])),
    ("pictures are small", replaced("data/demo_0/obs/agentview_rgb", lambda x: x[:, :8, :8])),
    ("proprio is wider", replaced("data/demo_1/obs/proprio", lambda x: np.tile(x, 2))),
    (
        "the instruction is unknown",
        lambda file: file["data/demo_0"].attrs.__setitem__("language_instruction", "fly"),
    ),
    (
        "the instruction is a number",
        lambda file: file["data/demo_0"].attrs.__setitem__("language_instruction", 7),
    ),
    (
        "there is no demonstration",
        lambda file: [file.__delitem__(f"data/{key}") for key in list(file["data"])],
    ),
    ("there is nothing", lambda file: file.__delitem__("data")),
    (
        "a demonstration is an array",
        lambda file: (file.__delitem__("data/demo_0"), file.__setitem__("data/demo_0", np.ones(3))),
    ),
]


def file_cases():
    for script in OFFLINE:
        base = BASE[script].replace("{home}/pendulum.hdf5", "{case}/pendulum.hdf5")
        damages = [*file_damages("pendulum.hdf5")]
        damages += [(what, hdf5("pendulum.hdf5", change)) for what, change in DATASETS]
        # all of them read the same way: each damage in two of the four
        turn = OFFLINE.index(script)
        for i, (what, prepare) in enumerate(damages):
            if i % 2 == turn % 2:
                yield Case("files", script, f"data set: {what}", base, prepare)
        yield Case("files", script, "data set: unreadable", base, secret("pendulum.hdf5"), within=nobody)
    base = f"{BASE['bc_warmup']} --demos {{case}}/demos.hdf5".replace(
        "--grounding-scenes 4 --grounding-steps 1 ", ""
    )
    damages = [*file_damages("demos.hdf5"), *((what, hdf5("demos.hdf5", change)) for what, change in DEMOS)]
    for what, prepare in damages:
        say = "" if what != "is a folder" else "holds no .hdf5"
        yield Case("files", "bc_warmup", f"demonstrations: {what}", base, prepare, say=say)
    yield Case("files", "bc_warmup", "demonstrations: unreadable", base, secret("demos.hdf5"), within=nobody)
    save = f"{BASE['sac']} --save-dataset {{case}}/pendulum.hdf5"
    for what, prepare in file_damages("pendulum.hdf5"):
        if prepare:
            yield Case("files", "sac", f"--append: the file {what}", f"{save} --append", prepare)
        if what in ("is a pipe", "is a socket", "is a folder"):
            yield Case("files", "sac", f"--save-dataset: the file {what}", save, prepare)


def secret(name):
    def prepare(case):
        shutil.copy(HOME / name, case / name)
        (case / name).chmod(0)
        case.chmod(0o777)

    return prepare


# --- cases: checkpoints


def content(function):
    """A copy of the script's run folder, its checkpoint's content changed"""

    def prepare(case, script):
        shutil.copytree(HOME / script, case / "run")
        state = function(load_checkpoint(case / "run"), script)
        save_checkpoint(case / "run" / "checkpoint.pt", state.pop("script", script), state)

    return prepare


def bits(function):
    """A copy of the script's run folder, the bytes of its checkpoint changed; None for no file"""

    def prepare(case, script):
        shutil.copytree(HOME / script, case / "run")
        path = case / "run" / "checkpoint.pt"
        found = function(path.read_bytes(), script)
        path.unlink()
        if found is not None:
            path.write_bytes(found)

    return prepare


def flipped(seed):
    def flip(whole, script):
        with zipfile.ZipFile(io.BytesIO(whole)) as file:  # not between its parts, where nobody looks
            part = max(file.infolist(), key=lambda part: part.file_size)
        place = part.header_offset + 200 + random.Random(seed).randrange(part.file_size - 200)
        return whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]

    return bits(flip)


class Code:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def evil(whole, script):
    file = io.BytesIO()
    torch.save({"agent": Code(), "format": "vla-rl", "script": script, "version": 2}, file)
    return file.getvalue()


def first_tensor(tree, function):
    """`tree` with `function` of its first float tensor of more than one number"""
    done = []

    def walk(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1 and not done:
            done.append(1)
            return function(value)
        if isinstance(value, dict):
            return {k: walk(x) for k, x in value.items()}
        return [walk(x) for x in value] if isinstance(value, list) else value

    return walk(tree)


def leaves(tree, path=()):
    """-> the paths of what is no dict and no list"""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return [path]
    return [leaf for key, x in items for leaf in leaves(x, (*path, key))]


def put(tree, path, value):
    if not path:
        return value
    if isinstance(tree, dict):
        return tree | {path[0]: put(tree[path[0]], path[1:], value)}
    return [put(x, path[1:], value) if i == path[0] else x for i, x in enumerate(tree)]


HARMLESS = ("seconds", "episode_return", "return", "lost_episodes")  # as good as what was there, for a reader


def deep(seed):
    """Something else in a place deep in what a process saved, or in what all share"""

    def change(state, script):
        draw = random.Random(f"{seed} {script}")
        shared = {k: x for k, x in state.items() if k not in ("args", "format", "version", "script")}
        paths = [p for p in leaves(shared) if p[-1] not in HARMLESS and "global_cuda" not in p]
        own = [p for p in paths if p[0] == "processes"]
        path = draw.choice(own if seed % 2 else paths)
        junk = draw.choice([{"x": 1}, torch.ones(2, 3, 5), "text", [[]]])
        return state | put(shared, path, junk)

    return content(change)


def without_betas(tree):
    """Adam's settings of text"""
    if isinstance(tree, dict):
        return {k: "text" if k == "betas" else without_betas(x) for k, x in tree.items()}
    return [without_betas(x) for x in tree] if isinstance(tree, list) else tree


def nan_like(x):
    return torch.full_like(x, float("nan"))


CHECKPOINTS = [  # what is done to a run's checkpoint before it is resumed
    ("not there", bits(lambda b, s: None)),
    ("empty", bits(lambda b, s: b"")),
    ("half", bits(lambda b, s: b[: len(b) // 2])),
    ("without its end", bits(lambda b, s: b[:-1])),
    ("a text", bits(lambda b, s: b"weights\n")),
    ("noise", bits(lambda b, s: random.Random(2).randbytes(5000))),
    ("code", bits(evil)),
    ("a pickle", bits(lambda b, s: pickle.dumps({"agent": 1}))),
    ("zeros within", bits(lambda b, s: b[:3000] + bytes(2000) + b[5000:])),
    *[(f"a flipped byte {i}", flipped(i)) for i in range(2)],
    ("version 1", content(lambda c, s: c)),  # below
    ("of another script", content(lambda c, s: c | {"script": "sac" if s != "sac" else "iql"})),
    ("without its agent", content(lambda c, s: {k: x for k, x in c.items() if k != "agent"})),
    ("with no agent", content(lambda c, s: c | {"agent": None})),
    ("with an agent of nothing", content(lambda c, s: c | {"agent": {}})),
    ("with an agent of text", content(lambda c, s: c | {"agent": dict.fromkeys(c["agent"], "text")})),
    ("with NaN", content(lambda c, s: c | {"agent": first_tensor(c["agent"], nan_like)})),
    (
        "with another shape",
        content(lambda c, s: c | {"agent": first_tensor(c["agent"], lambda x: torch.cat([x, x]))}),
    ),
    ("with complex weights", content(lambda c, s: c | {"agent": first_tensor(c["agent"], lambda x: x + 1j)})),
    (
        "with a weight too many",
        content(lambda c, s: c | {"agent": c["agent"] | {"head.extra": torch.ones(2)}}),
    ),
    ("with a weight too few", content(lambda c, s: c | {"agent": dict(list(c["agent"].items())[1:])})),
    ("with arguments of text", content(lambda c, s: c | {"args": "text"})),
    ("with an unknown argument", content(lambda c, s: c | {"args": c["args"] | {"new": 1}})),
    ("with a seed of text", content(lambda c, s: c | {"args": c["args"] | {"seed": "one"}})),
    ("with a NaN argument", content(lambda c, s: c | {"args": c["args"] | {"learning_rate": float("nan")}})),
    ("without processes", content(lambda c, s: c | {"processes": []})),
    ("with two processes", content(lambda c, s: c | {"processes": c["processes"] * 2})),
    ("with a process of nothing", content(lambda c, s: c | {"processes": [{}]})),
    ("with an optimizer of text", content(lambda c, s: without_betas(c))),
    *[(f"with junk {i}", deep(i)) for i in range(8)],
]


def old_version(case, script):
    shutil.copytree(HOME / script, case / "run")
    path = case / "run" / "checkpoint.pt"
    torch.save(load_checkpoint(case / "run") | {"version": 1}, path)


def checkpoint_cases():
    for script in SCRIPTS:
        for what, prepare in CHECKPOINTS:
            prepare = old_version if what == "version 1" else prepare
            yield Case(
                "checkpoints",
                script,
                f"resume: {what}",
                "--resume {case}/run",
                lambda case, prepare=prepare, script=script: prepare(case, script),
            )
        for what in ("is a pipe", "is a folder", "is a loop", "is a device", "is a socket"):
            prepare = dict(file_damages("checkpoint.pt"))[what]
            yield Case(
                "checkpoints",
                script,
                f"weights: the file {what}",
                f"{BASE[script]} --checkpoint {{case}}/checkpoint.pt",
                prepare,
            )
        yield Case(
            "checkpoints",
            script,
            "resume: weights alone",
            "--resume {case}/run/best.pt",
            lambda case, script=script: shutil.copytree(HOME / script, case / "run"),
        )
        yield Case(
            "checkpoints",
            script,
            "resume: untouched",
            "--resume {case}/run",
            whole_run(script),
            expect="fine",
        )
        other = "iql" if script in (*VLA, "sac") else "sac"
        yield Case(
            "checkpoints", script, "weights of another kind", f"{BASE[script]} --checkpoint {{home}}/{other}"
        )


# --- cases: run folders


def whole_run(script, function=lambda folder: None):
    def prepare(case):
        shutil.copytree(HOME / script, case / "run")
        function(case / "run")

    return prepare


def has_args(case):
    """args.json is the run's, after all"""
    found = json.loads((case / "run" / "args.json").read_text())
    wanted = json.loads(json.dumps(load_checkpoint(case / "run")["args"]))
    return None if found == wanted else "another args.json"


def locked(name):
    """In the child: another process holds the folder's lock."""

    def within():
        import fcntl

        Path(name).parent.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        if not os.fork():
            file = open(name, "a+")  # noqa: SIM115
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(writer, b"x")
            time.sleep(600)
            os._exit(0)
        os.read(reader, 1)

    return within


def folder_cases():
    for script in SCRIPTS:
        resume, base = "--resume {case}/run", BASE[script]

        def unlink(folder):
            (folder / "args.json").unlink()

        def text(content):
            return lambda folder: (folder / "args.json").write_bytes(content)

        def no_results(folder):
            (folder / "results.json").unlink(missing_ok=True)
            (folder / "results.json").mkdir()

        def pipe_args(folder):
            (folder / "args.json").unlink()
            os.mkfifo(folder / "args.json")

        yield Case(
            "folders",
            script,
            "without args.json",
            resume,
            whole_run(script, unlink),
            expect="fine",
            after=has_args,
        )
        yield Case(
            "folders",
            script,
            "args.json is broken",
            resume,
            whole_run(script, text(b'{"seed": ')),
            expect="fine",
        )
        yield Case(
            "folders",
            script,
            "args.json is not UTF-8",
            resume,
            whole_run(script, text(b"\xff\xfe")),
            expect="fine",
        )
        yield Case(
            "folders",
            script,
            "args.json is empty",
            resume,
            whole_run(script, text(b"")),
            expect="fine",
            after=has_args,
        )
        yield Case("folders", script, "args.json is a pipe", resume, whole_run(script, pipe_args))
        yield Case(
            "folders", script, "results.json is a folder", resume, whole_run(script, no_results), leaves=True
        )
        yield Case("folders", script, "does not exist", resume)
        yield Case("folders", script, "is empty", resume, lambda case: (case / "run").mkdir())
        yield Case("folders", script, "is a loop", resume, loop("run"))
        yield Case("folders", script, "is a file", resume, lambda case: (case / "run").write_text("x"))
        yield Case("folders", script, "is in use", resume, whole_run(script), within=locked("run/args.json"))
        yield Case(
            "folders",
            script,
            "has a checkpoint already",
            base.replace("{case}/runs", "{home}").replace("--run-name r ", f"--run-name {script} "),
        )
        yield Case(
            "folders", script, "its place is a file", base, lambda case: (case / "runs").write_text("x")
        )
        yield Case("folders", script, "its place is a loop", base, loop("runs"))
        yield Case(
            "folders",
            script,
            "its place is not ours",
            base,
            lambda case: (case / "runs").mkdir(0o755),
            within=nobody,
        )
        yield Case(
            "folders",
            script,
            "the disk is full for the log",
            base,
            within=full_log,
            expect="fine",
            say="warning: the log cannot be written",
        )
        yield Case("folders", script, "the disk is full", base, within=full_disk, leaves=True)


def full_log():
    """In the child: TensorBoard's thread finds the disk full."""
    from tensorboard.summary.writer import record_writer

    def write(self, data):
        raise OSError(28, "No space left on device")

    record_writer.RecordWriter.write = write


def full_disk():
    """In the child: no file can be larger than 2000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


# --- cases: worlds

WORLD_BASE = {
    "ppo_vla": BASE["ppo_vla"].replace("--env CartPole-v1", "--head gaussian --env {env}"),
    "grpo_vla": BASE["grpo_vla"].replace("--env CartPole-v1", "--head gaussian --env {env}"),
    "bc_warmup": f"{ONLINE} --env hostile --demos {{home}}/demos.hdf5 --gradient-steps 2 --batch-size 4",
    "sac": BASE["sac"].replace("Pendulum-v1", "{env}").replace("300", "6").replace("310", "20"),
} | {
    script: f"{BASE[script]} --env {{env}}".replace("{home}/pendulum", "{home}/hostile") for script in OFFLINE
}


def world_cases():
    for script, base in WORLD_BASE.items():
        if script == "bc_warmup":
            continue
        for defect, expect, say in DEFECTS:
            yield Case(
                "worlds",
                script,
                defect,
                base.replace("{env}", gym_id(defect)),
                expect=expect,
                say=say,
                leaves=True,
            )
        for defect in SPACES:
            yield Case("worlds", script, defect, base.replace("{env}", gym_id(defect)))
        yield Case("worlds", script, "nothing is wrong", base.replace("{env}", gym_id("none")), expect="fine")
    for script in ("ppo_vla", "grpo_vla"):
        pictures = WORLD_BASE[script].replace("{env}", "hostile --chunk 2 --backbone tiny --head tokens")
        workers = pictures.replace("--num-workers 0", "--num-workers 1")
        for defect in (
            *PICTURES,
            "nan observation",
            "nan reward",
            "four values",
            "none observation",
            "nothing",
        ):
            yield Case(
                "worlds", script, f"of pictures: {defect}", f"{pictures} --defect '{defect}'", leaves=True
            )
            yield Case(
                "worlds", script, f"in a worker: {defect}", f"{workers} --defect '{defect}'", leaves=True
            )
        yield Case("worlds", script, "of pictures: nothing is wrong", pictures, expect="fine")
        yield Case("worlds", script, "in a worker: raises", f"{workers} --defect raises", expect="raises")
        yield Case("worlds", script, "in a worker: dies", f"{workers} --defect dies", expect="raises")
        hangs = f"{workers} --defect hangs --worker-timeout 0.5"
        yield Case("worlds", script, "in a worker: hangs", hangs, leaves=True, say="no answer for 0.5 s")
        endless = WORLD_BASE[script].replace("{env}", f"{gym_id('endless')} --max-episode-steps 5")
        yield Case("worlds", script, "never ends, but for the limit", endless, expect="fine")


# --- running them


HOME = Path(tempfile.gettempdir())  # replaced by `main`


def stop_early():
    """In the child: a signal amid the collection, whose decisions the checkpoint then holds."""
    from common.envs.vector import Envs

    step, calls = Envs.step, []

    def counted(self, *args, **kwargs):
        calls.extend([1] * (self.num_envs > 1))  # not the evaluation's
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    Envs.step = counted


def write_home(jobs):
    """The data sets, demonstrations and runs that the cases damage."""
    rng = np.random.default_rng(0)
    for name, width, actions in (("pendulum", 3, 1), ("hostile", 4, 2)):
        ends = np.arange(300) % 60 == 59
        obs, after = rng.normal(size=(2, 300, width))
        action = rng.uniform(-1, 1, (300, actions))
        env = "Pendulum-v1" if name == "pendulum" else gym_id("none")
        save_d4rl(HOME / f"{name}.hdf5", obs, action, -rng.random(300), after, ends, np.zeros(300), env)
    found = tabletop.demonstrations(2, 1, noise=0.0, num_workers=0)
    starts = [*found["episode_starts"], len(found["task"])]
    instructions = tabletop.make(split="train").instructions
    episodes = [
        {key: found[key][a:b] for key in ("image", "proprio", "actions")}
        | {"instruction": instructions[found["task"][a]]}
        for a, b in itertools.pairwise(starts)
    ]
    save_demonstrations(HOME / "demos.hdf5", episodes, (tabletop.DEMO_KEYS["agentview"],))
    cases = [
        Case(
            "home",
            script,
            "a run",
            words.replace("{case}/runs", "{home}").replace("--run-name r ", f"--run-name {script} "),
            within=stop_early if script in ONLINE_RL else None,
            expect="stopped" if script in ONLINE_RL else "fine",
        )
        for script, words in BASE.items()
    ]
    for case, verdict, said in execute(cases, jobs, 300, "prepare"):
        if verdict != "ok":
            sys.exit(f"{case.script} fails without any damage: {verdict}\n{said}")


def snapshot(folder):
    """{path: its kind and content} of all in a folder, no link followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, kind = str(path.relative_to(folder)), path.lstat().st_mode
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = kind, hashlib.sha1(path.read_bytes()).hexdigest()
        else:
            found[name] = kind
    return found


def child(case, folder):
    """The script in this process, as if it had been started: never returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))  # no case takes the machine's memory
    atexit._clear()  # what the parent does at its end
    tqdm._instances.clear()
    code = 1
    try:
        os.chdir(folder)
        for number, name in enumerate(("/dev/null", ".out", ".err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0)), number)
        words = case.words if isinstance(case.words, list) else shlex.split(case.words)
        sys.argv = [
            f"{case.script}.py",
            *(w.replace("{case}", str(folder)).replace("{home}", str(HOME)) for w in words),
        ]
        if case.within:
            case.within()
        try:
            runpy.run_path(str(ROOT / f"{case.script}.py"), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        multiprocessing.util._exit_function()  # its children
        atexit._run_exitfuncs()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def judge(case, folder, before, code):
    """-> what happened, in a word, and what the script said."""
    out, err = ((folder / name).read_text(errors="replace") for name in (".out", ".err"))
    lines = err.strip().splitlines()
    after = {k: x for k, x in snapshot(folder).items() if k not in (".out", ".err")}
    if code is None:
        return "hang", err
    if code < 0:
        return f"killed by {signal.Signals(-code).name}", err
    if "Traceback" in err and case.expect != "raises":
        return "traceback", err
    if case.expect == "raises":
        return ("ok" if code == 1 and "Traceback" in err and re.search(case.say, err) else "silent"), err
    if case.expect == "stopped":
        return "ok" if code == 128 + signal.SIGINT else "wrong exit", err
    if case.expect == "fine":
        if code:
            return "wrong exit", err
        if case.say and not re.search(case.say, err):
            return "wrong sentence", err
        complaint = case.after(folder) if case.after else None
        return (complaint or "ok"), err
    if code == 0:
        return "silent", out + err
    if code != 2:
        return "wrong exit", f"{code}\n{err}"
    # tyro's own refusals are of several lines in a box, and are the parser's
    boxed = "╭" in err or "usage" in err.lower()
    said = [line for line in lines if not re.match(r"(warning|.*Warning:|  )", line)]
    if not boxed and (len(said) != 1 or not said[0].startswith("error: ")):
        return "wrong sentence", err
    if case.say and not re.search(case.say, err):
        return "wrong sentence", err
    if (folder / "pwned").exists():
        return "ran code", err
    changed = [k for k, x in before.items() if after.get(k) != x]
    changed = [k for k in changed if not (case.leaves and k.startswith("run/"))]
    if changed:
        return "lost", f"{', '.join(changed)} changed\n{err}"
    left = [
        k for k in after.keys() - before.keys() if k != "runs" and not (case.leaves and k.startswith("run"))
    ]
    if left:
        return "left", f"{', '.join(sorted(left))} left behind\n{err}"
    return "ok", err


def execute(cases, jobs, timeout, title):
    """Runs the cases, `jobs` at once -> of each the case, the verdict and what was said."""
    running, waiting = {}, list(enumerate(cases))[::-1]
    with tqdm(total=len(cases), desc=title, unit="case") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, case = waiting.pop()
                folder = Path(tempfile.mkdtemp(prefix=f"{number}_", dir=HOME.parent))
                folder.chmod(0o777)
                if case.prepare:
                    case.prepare(folder)
                before = snapshot(folder)
                if not (pid := os.fork()):
                    child(case, folder)
                running[pid] = case, folder, before, time.monotonic() + timeout
            done, status = os.waitpid(-1, os.WNOHANG)
            late = [pid for pid, (*_, due) in running.items() if time.monotonic() > due]
            for pid in late:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for pid in late + ([done] if done in running else []):
                case, folder, before, _ = running.pop(pid)
                with contextlib.suppress(ProcessLookupError):  # what it left running
                    os.killpg(pid, signal.SIGKILL)
                code = None if pid in late else os.waitstatus_to_exitcode(status)
                yield case, *judge(case, folder, before, code)
                shutil.rmtree(folder, ignore_errors=True)
                bar.update()
            if not done:
                time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose 'kind script description' matches this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a case hangs")
    args = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    modules = {script: importlib.import_module(script) for script in SCRIPTS}
    for name in ("peft", "transformers", "torch.utils.tensorboard", "tyro", "common.backbones.openvla"):
        importlib.import_module(name)
    sys.modules["hostile"] = sys.modules["__main__"]
    WORLDS["hostile"] = "hostile"
    global HOME
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="hostile")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        HOME = Path(folder) / "home"
        HOME.mkdir()
        Path(folder).chmod(0o755)
        write_home(args.jobs)
        protected = snapshot(HOME)
        makers = (flag_cases(modules), file_cases(), checkpoint_cases(), folder_cases(), world_cases())
        cases = [case for maker in makers for case in maker]
        if os.getuid():  # only root can become nobody
            cases = [case for case in cases if case.within is not nobody]
        cases = [c for c in cases if re.search(args.only, f"{c.kind} {c.script} {c.what}")]
        table, failures = Counter(), []
        for case, verdict, said in execute(cases, args.jobs, args.timeout, "cases"):
            table[case.kind, case.script, verdict == "ok"] += 1
            if verdict != "ok":
                failures.append(
                    f"{case.kind} | {case.script} | {case.what} | {verdict} | {said.strip()[-1500:]}"
                )
        touched = [k for k, x in snapshot(HOME).items() if protected.get(k) != x]
    kinds = list(dict.fromkeys(kind for kind, _, _ in table))
    width = max(map(len, SCRIPTS))
    print(f"| {'script':{width}} | " + " | ".join(kinds) + " | all |")
    print("| --- " * (len(kinds) + 2) + "|")

    def cell(kind, script):
        pick = [(key, n) for key, n in table.items() if kind in (key[0], None) and script in (key[1], None)]
        good, total = sum(n for key, n in pick if key[2]), sum(n for _, n in pick)
        return f"{good}/{total}" if total else "-"

    for script in (*SCRIPTS, None):
        row = " | ".join(cell(kind, script) for kind in (*kinds, None))
        print(f"| {script or 'all':{width}} | {row} |")
    for failure in failures:
        print("\nFAILED", failure)
    if touched:
        print("\nFAILED: protected files changed:", ", ".join(touched))
    print(
        f"\n{len(cases)} cases in {(time.monotonic() - start) / 60:.1f} minutes, {len(failures)} not as "
        "declared"
    )
    sys.exit(bool(failures or touched))


if __name__ == "__main__":
    main()
