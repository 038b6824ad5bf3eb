"""OGBench's data sets (Park et al. 2024, arXiv:2410.20092): read with the rewards of a task, and made here.

    python -m common.ogbench cube-single-play --episodes 1000 --workers 2
    python iql.py --dataset cube-single-play-singletask-task2-v0

A file is in OGBench's place and layout, ~/.ogbench/data/cube-single-play-v0.npz, one for all tasks. What is
made here is another sample of the published file's distribution: the same scripted oracles, noise and resets,
after OGBench's data_gen_scripts/, which no seed fixes. Here an episode follows from --seed and its number
alone, however many processes there are; what was stopped or killed goes on with the same command.
"""

import contextlib
import fcntl
import functools
import importlib
import itertools
import re
import shutil
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import tyro

from common import UserError, say
from common.checkpoint import CheckpointError, atomic_path
from common.envs.jobs import in_parallel
from common.envs.ogbench import check_installed, relabel

FOLDER = "~/.ogbench/data"
ROBOT = "(?:cube-(?:single|double|triple|quadruple|octuple)|scene|puzzle-(?:3x3|4x4|4x5|4x6))-(?:play|noisy)"
SETS = re.compile(f"{ROBOT}|pointmaze-(?:medium|large|giant|teleport)-navigate")
TASKS = re.compile(f"({SETS.pattern})-(singletask(?:-task[1-5])?-v0)")

STACKING = {  # an episode's chance that a cube's goal is on another cube is between these
    "double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5), "octuple": (0.0, 0.35)
}  # fmt: skip
KNOWN = "cube, scene, puzzle (-play, -noisy) and pointmaze (-navigate)"
MOVED = {"cube": ["cube"], "puzzle": ["button"], "scene": ["cube", "button", "drawer", "window"]}
DTYPES = {"terminals": bool, "button_states": np.int64}  # the other arrays are float32


# --- reading


def load_ogbench(name):
    """`cube-single-play-singletask-task2-v0` -> its `common.datasets.OfflineDataset`; without `-task2` the
    default task's. A folder before the name is where the file is, instead of OGBench's own.

    Rewards and terminations are of the step from an observation; the data go on after a termination.
    UserError for a name that is none, and a file that is missing, damaged or has other arrays."""
    from common.datasets import OfflineDataset, _read  # which imports this file

    found = TASKS.fullmatch(Path(name).name.removesuffix(".npz"))
    if not found:
        raise UserError(
            f"{name} is no task of OGBench's {KNOWN}; give one, as cube-single-play-singletask-task2-v0."
        )
    kind, task = found.groups()
    folder = Path(name).parent if "/" in name else Path(FOLDER)
    path = folder.expanduser() / f"{kind}-v0.npz"
    if not path.is_file():
        where = f" --out {folder}" if "/" in name else ""
        raise UserError(f"{path} is not there; make it: python -m common.ogbench {kind}{where}")
    where, task = str(path), f"{kind.rpartition('-')[0]}-{task}"
    try:
        with np.load(path) as file:
            ends = _read(file, "terminals", where, (None,)) != 0
            size, ends[-1] = len(ends), True
            rows, count = np.flatnonzero(~ends), int((~ends).sum())
            if not count:
                raise UserError(f"{where} has only episodes of one row, and so no transition; take another.")
            position = np.empty(size, np.int64)  # an episode's last row gives the last next observation alone
            position[~ends], position[ends] = np.arange(count), np.arange(count, size)
            states = _read(file, "observations", where, (size, None), position)
            actions = _read(file, "actions", where, (size, None))[rows]
            columns = {"qpos": _read(file, "qpos", where, (size, None))[rows]}
            if "button_states" in file:
                columns["button_states"] = _read(file, "button_states", where, (size, None))[rows]
        rewards, masks = relabel(task, columns)
    except UserError:
        raise
    except (OSError, LookupError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or not of {task} ({error}); delete it, make it again.") from error
    return OfflineDataset(
        name=name,
        env_id="ogbench",
        states=states,
        next_index=position[rows + 1],
        actions=actions,
        rewards=rewards,
        terminations=masks == 0,
        episode_starts=np.flatnonzero(np.append(True, ends[:-1])[~ends]),
        reference_scores=None,
        env_flags={"task": task},
        normalized_actions=True,
    )


# --- making


@dataclass
class Args:
    """OGBench's scripted oracles -> a data set in its layout; a killed one goes on with the same command."""

    name: tyro.conf.Positional[str]
    """OGBench's, as cube-single-play: of cube, scene, puzzle (-play, -noisy) or pointmaze (-navigate)"""
    episodes: int = 1000
    """as many as OGBench has of cube-single, cube-double, scene, puzzle-3x3 and puzzle-4x4"""
    validation: int = 0
    """episodes of a file beside it, for OGBench's own loader (100)"""
    seed: int = 1
    """of the first state, the goals and the noise of each episode"""
    workers: int | None = None
    """processes; default one a core"""
    out: str = FOLDER
    """folder of the file"""
    steps: int | None = None
    """rows of an episode; default 1001, of the giant maze 2001, as OGBench"""


@functools.cache
def environment(name, steps):
    """OGBench's environment for the data set `name`, with episodes of so many rows, and the oracles that act
    in it, {what they move: oracle}."""
    family, _, kind = name.rpartition("-")
    options = {"terminate_at_goal": False, "max_episode_steps": steps, "disable_env_checker": True}
    check_installed()
    if kind == "navigate":
        return gymnasium.make(f"ogbench:{family}-v0", **options), {}
    env, oracles = gymnasium.make(f"ogbench:{family}-v0", mode="data_collection", **options), {}
    style = "plan" if kind == "play" else "markov"  # open loop along a plan, or closed loop
    options = {"noise": 0.1, "noise_smoothing": 0.5} if kind == "play" else {"min_norm": 0.4}
    options |= {"gripper_always_closed": True} if "puzzle" in family else {}
    for thing in MOVED[family.partition("-")[0]]:
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{thing}_{style}")
        oracles[thing] = getattr(module, f"{thing.title()}{style.title()}Oracle")(env=env, **options)
    return env, oracles


def robot_episode(name, env, oracles, seed):
    """The robot at one random task after another -> the episode's columns."""
    ob, info = env.reset(seed=seed)
    limits = [STACKING[word] for word in STACKING if word in name]
    p_stack = np.random.uniform(*limits[0]) if limits else 0.0
    noisy = name.endswith("noisy")
    spread = np.random.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10]) if noisy else None
    p_random = noisy * (0.2 if "puzzle" in name else 0.1)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(ob, info)

    def choose(ob, info):
        if np.random.rand() < p_random:
            return np.random.uniform(-1, 1, 5)
        action = np.array(oracle.select_action(ob, info))
        return action + np.random.normal(0, spread) if noisy else action

    def after(info):
        nonlocal oracle
        if oracle.done:  # the next action sees the new task in its plan alone: `info` is the step's, as there
            goal_ob, goal_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[goal_info["privileged/target_task"]]
            oracle.reset(goal_ob, goal_info)

    return played(env, ob, info, choose, after)


def free_cells(maze):
    """A map's free cells (row, column), which are 0, and those that are no corridor: free along one axis."""
    cells = [tuple(cell) for cell in np.argwhere(maze == 0).tolist()]
    axes = [{tuple(maze[i - 1 : i + 2, j]), tuple(maze[i, j - 1 : j + 2])} for i, j in cells]
    return cells, [cell for cell, x in zip(cells, axes, strict=True) if x != {(0, 0, 0), (1, 0, 1)}]


def maze_episode(env, seed):
    """The point from one random cell that is no corridor to another -> the episode's columns."""
    maze = env.unwrapped
    cells, goals = free_cells(maze.maze_map)

    def draw(cells):
        return cells[np.random.randint(len(cells))]

    def choose(ob, info):
        xy = maze.get_xy()
        way = maze.get_oracle_subgoal(xy, maze.cur_goal_xy)[0] - xy
        return way / (np.linalg.norm(way) + 1e-6) + np.random.normal(0, 0.5, 2)

    def after(info):
        if info["success"]:
            maze.set_goal(draw(goals))

    start = {"task_info": {"init_ij": draw(cells), "goal_ij": draw(goals)}}
    return played(env, *env.reset(seed=seed, options=start), choose, after)


def played(env, ob, info, choose, after):
    """Steps until the episode ends -> its columns {name: (rows, ...)}, of the state before each step. What
    the last row's action does is not among them."""
    rows, ended = [], False
    while not ended:
        action = np.clip(choose(ob, info), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        row = {"observations": ob, "actions": action, "terminals": ended}
        before = {key.removeprefix("prev_"): x for key, x in info.items() if key.startswith("prev_")}
        rows.append(row | before)  # qpos, qvel and, if there are some, button_states
        after(info)
        ob = next_ob
    return {key: np.array([row[key] for row in rows], DTYPES.get(key, np.float32)) for key in rows[0]}


def out_of_sight(qpos):
    """Whether a scene's cube is ever beside the table and not in the drawer: then OGBench plays again."""
    y, z = qpos[:, 15], qpos[:, 16]
    return bool(((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any())


def episodes(job):
    """job: numbers, data set, seed, rows of an episode, folder. Writes each episode into its own file."""
    numbers, name, seed, steps, folder = job
    env, oracles = environment(name, steps)
    for number in numbers:
        for attempt in itertools.count():
            first, draws = np.random.SeedSequence([seed, number, attempt]).generate_state(2).tolist()
            np.random.seed(draws)  # for the oracles; the environment has a generator of its own
            columns = robot_episode(name, env, oracles, first) if oracles else maze_episode(env, first)
            if not (name.startswith("scene") and out_of_sight(columns["qpos"])):
                break
        try:
            with atomic_path(Path(folder, f"{number}.npz")) as path:
                np.savez(path, **columns)
        except CheckpointError as error:
            raise UserError(str(error)) from error
    return numbers


def joined(folder, numbers):
    """The columns of these episodes, one after another, with room for them once."""
    columns = {}
    for place, number in enumerate(numbers):
        with np.load(folder / f"{number}.npz") as episode:
            for key, rows in episode.items():
                if not place:
                    columns[key] = np.empty((len(numbers), *rows.shape), rows.dtype)
                columns[key][place] = rows
    return {key: rows.reshape(-1, *rows.shape[2:]) for key, rows in columns.items()}


@contextlib.contextmanager
def locked(folder, path):
    """`folder`, the place of the episodes of the file `path`, is made and is this process's, or UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 (closed below)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{path} is being made by another process.") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); give another --out.") from error
    with lock:
        yield


def make(args):
    """`args.name` -> its file. UserError, one sentence, for what is wrong."""
    name, total = args.name.removesuffix("-v0"), args.episodes + args.validation
    if not SETS.fullmatch(name):
        raise UserError(f"{name} is none of OGBench's {KNOWN}; give one, as cube-single-play.")
    steps = args.steps or (2001 if "giant" in name else 1001)
    if args.episodes < 1 or min(args.validation, args.seed, args.workers or 0) < 0 or steps < 2:
        raise UserError("--episodes must be positive, --steps above 1, and no number negative.")
    check_installed()
    path = Path(args.out).expanduser() / f"{name}-v0.npz"
    if path.exists():
        raise UserError(f"{path} is there already; delete it, or give another --out.")
    folder = path.with_name(f".{name}-v0-{args.seed}-{steps}")
    with locked(folder, path):
        missing = [number for number in range(total) if not (folder / f"{number}.npz").is_file()]
        if len(missing) < total:
            say(f"{total - len(missing)} of {total} episodes are there already")
        in_parallel(episodes, missing, args.workers, name, args.seed, steps, str(folder), parts=len(missing))
        validation = path.with_name(f"{name}-v0-val.npz"), range(args.episodes, total)
        for file, numbers in ([validation] if args.validation else []) + [(path, range(args.episodes))]:
            columns = joined(folder, numbers)
            with atomic_path(file) as temporary:
                np.savez_compressed(temporary, **columns, seed=args.seed)
        shutil.rmtree(folder)
        say(f"{args.episodes} episodes of {steps} rows written to {path}")


def main(words=None):
    try:
        make(tyro.cli(Args, args=words, prog="python -m common.ogbench"))
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    from common.ogbench import main  # noqa: F811 (processes import it by its name)

    main()
