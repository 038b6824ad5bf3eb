"""Demonstrations with the simulator's states -> a file in RoboMimic's layout, which `robomimic.py` reads.

    python -m common.envs.to_robomimic --source lift --out lift.hdf5         # three of a person's
    python -m common.envs.to_robomimic --source Lift --out expert.hdf5 --episodes 100       # a script's
    python -m common.envs.to_robomimic --source low_dim.hdf5 --out image.hdf5 --cameras agentview wrist

Every state is set in the environment's own model, whatever model it was recorded with, and what robosuite's
sensors and our cameras show there is written. The reward is 1, and the step done, where the next state is a
success. The last action is left out where its outcome was not recorded.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro

from common import UserError, say
from common.checkpoint import CheckpointError
from common.datasets import append_rows, demonstrations_file
from common.envs.experts import episode
from common.envs.robomimic import STEPS, named_environment
from common.envs.robosuite import CAMERAS, DEMO_KEYS, DEMO_TASKS, EXPERTS, TASKS, RobosuiteEnv, Task
from common.envs.simulation import check_installed

PEOPLES = {"lift": "lift/demo.hdf5", "handover": "handover/panda_panda/demo.hdf5"}  # in robosuite's package


@dataclass
class Args:
    """Demonstrations with the simulator's states -> a file in RoboMimic's layout."""

    out: str
    """the file to write"""
    source: str = "lift"
    """lift or handover, people's demonstrations in robosuite's package; a file in its or RoboMimic's layout;
    or a task whose scripted expert plays: Lift, PickPlaceCan, TwoArmLift"""
    cameras: tuple[str, ...] = ()
    """pictures to write beside the numbers: agentview, wrist, ..., as of --env robosuite"""
    size: int = 84
    """their height and width"""
    episodes: int = 50
    """of a scripted expert, successful or not"""
    noise: float = 0.3
    """standard deviation of the noise on its executed actions"""
    seed: int = 1
    """of its layouts and noise"""


def recorded(path):
    """A file with states -> its env_args, and its episodes: states (T, 1 + nq + nv), actions (T, A)."""
    if not Path(path).is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file with states; give another --source.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            data = file["data"]
            text = data.attrs.get("env_args")
            if text is None:  # robosuite's own layout
                kwargs = json.loads(data.attrs["env_info"])
                text = json.dumps({"env_name": kwargs.pop("env_name"), "env_kwargs": kwargs})
            numbers = sorted(int(name[5:]) for name in data if re.fullmatch(r"demo_\d+", name))
            if not numbers:
                raise KeyError("no demo_0")
            demos = [data[f"demo_{number}"] for number in numbers]
            return text, [(demo["states"][()], demo["actions"][()]) for demo in demos]
    except (OSError, RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} holds no episodes with states ({reason}); give another --source.") from error


def played(task, args):
    """The same of a task's scripted expert; states (T + 1, 1 + nq + nv)."""
    from robosuite.controllers import load_controller_config

    env, episodes = RobosuiteEnv((task,), cameras=("none",)), []

    def state(_=None):
        return {"states": env.turn().env.sim.get_state().flatten()}

    for layout in np.random.default_rng([1, args.seed]).integers(2**31, size=args.episodes).tolist():
        rows, _ = episode(env, layout, args.noise, state)
        states = np.stack([row["states"] for row in (*rows, state())])
        episodes.append((states, np.stack([row["executed"] for row in rows])))
    env.close()
    kwargs = {"robots": ["Panda"] * TASKS[task][0]}
    kwargs |= {"controller_configs": load_controller_config(default_controller="OSC_POSE")}
    return json.dumps({"env_name": task, "env_kwargs": kwargs}), episodes


def columns(simulation, states, actions, cameras, size, where):
    """One episode -> its datasets {name: (T, ...)}, T the steps whose outcome is known."""
    env, sizes = simulation.env, (simulation.model.nq, simulation.model.nv)
    if states.ndim != 2 or states.shape[1] != 1 + sum(sizes) or not np.isfinite(states).all():
        raise UserError(f"{where} has states {states.shape}, not finite ones (T, {1 + sum(sizes)}).")
    rows, success = [], []
    for state in states:
        env.sim.set_state_from_flattened(state)
        env.sim.forward()
        shown = env._get_observations(force_update=True)
        row = {key: x for key, x in shown.items() if re.fullmatch("robot[01]_(?!proprio-state).*", key)}
        row |= {DEMO_KEYS[name]: simulation.render(CAMERAS[name], size) for name in cameras}
        rows.append(row | {"object": shown["object-state"]})
        success.append(bool(env._check_success()))
    count, known = min(len(actions), len(states) - 1), np.array(success, np.float32)
    found = {f"obs/{key}": np.stack([row[key] for row in rows]) for key in rows[0]}
    after = {f"next_{key}": x[1 : count + 1] for key, x in found.items() if x.ndim == 2 and not cameras}
    found = {key: x[:count] for key, x in found.items()} | after
    found |= {"actions": actions[:count], "states": states[:count], "rewards": known[1 : count + 1]}
    return found | {"dones": known[1 : count + 1].astype(np.int64)}


def convert(args):
    """`args.source` -> the file `args.out`. UserError, one sentence, for what is wrong."""
    check_installed("robosuite", ("robosuite",))
    if min(args.size, args.episodes) < 1 or args.noise < 0 or args.seed < 0:
        raise UserError("--size and --episodes must be positive, --noise and --seed not negative.")
    if unknown := [name for name in args.cameras if name not in CAMERAS]:
        raise UserError(f"robosuite has no camera {unknown[0]!r}; known: {', '.join(CAMERAS)}.")
    import robosuite

    package = Path(robosuite.__file__).parent / "models/assets/demonstrations"
    if args.source in EXPERTS:
        text, episodes = played(args.source, args)
    else:
        text, episodes = recorded(package / PEOPLES[args.source] if args.source in PEOPLES else args.source)
    named = named_environment(text, args.source)
    simulation = Task(named["task"], False, named["named"])
    longest = 100 * math.ceil(max(len(actions) for _, actions in episodes) / 100)
    kwargs = json.loads(text)["env_kwargs"] | {"control_freq": 20, "ignore_done": True, "has_renderer": False}
    kwargs |= {"horizon": named["horizon"] or max(STEPS, longest), "reward_shaping": False}
    kwargs |= dict.fromkeys(("use_camera_obs", "has_offscreen_renderer"), bool(args.cameras))
    if args.cameras:
        kwargs |= {"camera_names": [CAMERAS[name] for name in args.cameras]}
        kwargs |= {"camera_heights": args.size, "camera_widths": args.size}
    env_args = {"env_name": named["task"], "env_version": robosuite.__version__, "type": 1}
    won = steps = 0
    with demonstrations_file(args.out) as (data, disk):
        data.attrs["env_args"] = json.dumps(env_args | {"env_kwargs": kwargs})
        for number, (states, actions) in enumerate(episodes):
            where, demo = f"{args.source}, episode {number}", f"demo_{number}"
            found = columns(simulation, states, actions, args.cameras, args.size, where)
            append_rows(data.create_group(demo), found)
            success = bool(found["rewards"].any())
            data[demo].attrs["num_samples"], data[demo].attrs["success"] = len(found["actions"]), success
            data[demo].attrs["language_instruction"] = DEMO_TASKS[named["task"]]
            data[demo].attrs["model_file"] = simulation.env.sim.model.get_xml()
            won, steps = won + success, steps + len(found["actions"])
            if disk.error:
                raise disk.error
        held = len(episodes) // 10
        masks = {"train": range(len(episodes) - held), "valid": range(len(episodes) - held, len(episodes))}
        for name, members in masks.items():
            if not members:
                continue
            data.file[f"mask/{name}"] = [f"demo_{number}".encode() for number in members]
    say(f"{len(episodes)} demonstrations of {steps} steps, {won} successful, written to {args.out}")


def main(words=None):
    try:
        convert(tyro.cli(Args, args=words, prog="python -m common.envs.to_robomimic"))
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
