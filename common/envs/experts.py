"""What scripted experts share: demonstrations of them and, of simulated arms, the moves of a hand.

A move is (way, turn, grip): of the hand, in m and rad along the world's axes, (3,) each, and the gripper's
command, -1 to open and 1 to close. All follow from the state alone, so that an expert finds back after noise.
"""

import itertools

import numpy as np

from common import UserError
from common.envs.jobs import in_parallel


def reach(env, goal, grip, robot=0):
    """-> the move of a hand to `goal` (3,)."""
    return goal - env.sim.data.site_xpos[env.robots[robot].eef_site_id], np.zeros(3), grip


def pick(env, goal, geoms, hover=0.08):
    """-> the next move of a hand that grasps at `goal` (3,) what has the `geoms`: from up to `hover` m above
    it down, the closer the lower, close; None once it holds them."""
    move, *_ = reach(env, goal, -1.0)
    fingers = env.robots[0].gripper.important_geoms
    if env._check_grasp([fingers["left_finger"], fingers["right_finger"]], geoms):
        return None
    return descend(move, hover)


def descend(way, hover=0.08):
    """-> the next move of an open hand that is `way` (3,) off what it is to grasp: from up to `hover` m above
    it down, the closer the lower, close."""
    off = np.hypot(*way[:2])
    if off < 0.02 and abs(way[2]) < 0.015:
        return 0 * way, np.zeros(3), 1.0
    way[2] += np.clip(5 * off - 0.05, 0, hover)
    return way, np.zeros(3), -1.0


def carry(thing, place, high, low):
    """-> the move of a hand that has hold of what is at `thing` (3,): up to `high` m above `place` (3,), over
    it, and the closer the lower, down to `low`."""
    way = place - thing
    way[2] += np.clip(5 * np.hypot(*way[:2]) - 0.05, low, high)
    if way[2] > 0.1:  # straight up first
        way[:2] = 0
    return way, np.zeros(3), 1.0


def perturb(env, action, noise, rng):
    """The action that is executed: another move with the chance `noise`, or with that deviation of the hand's
    way and of its turn about the vertical."""
    if hasattr(env.action_space, "n"):
        return int(rng.integers(6)) if rng.random() < noise else action
    if not noise:
        return action
    scale = np.resize([1, 1, 1, 0, 0, 0.5, 0], len(action))
    return (action + noise * scale * rng.standard_normal(len(action))).clip(-1, 1).astype(np.float32)


def episode(env, seed, noise, see):
    """`env.expert()` on layout `seed`, its actions executed with noise -> rows, dicts of `see(obs)` with
    `actions` and `executed`; whether it succeeded."""
    obs, rows, rng = env.reset(seed=seed)[0], [], np.random.default_rng([7, seed])
    terminated = truncated = False
    while not (terminated or truncated):
        action = env.expert()
        executed = perturb(env, action, noise, rng)
        rows.append(see(obs) | {"actions": action, "executed": executed})
        obs, _, terminated, truncated, info = env.step(executed)
    return rows, info["success"]


def play(env, seeds, noise):
    """Worker: the rows of the episodes that succeed, with the observations, and `pixels` of pictures in
    a world that knows them."""

    def see(obs):
        return obs | ({"pixels": env.pixels()} if "image" in obs and hasattr(env, "pixels") else {})

    episodes = [episode(env, seed, noise, see) for seed in seeds]
    env.close()
    return [rows for rows, success in episodes if success]


def demonstrations(function, num_episodes, seed, num_workers, noise, kwargs):
    """As in the contract of `common/envs/__init__.py`, of what `function((seeds, noise, kwargs))`, a world's
    `play`, gives."""
    seeds = np.random.default_rng([1, seed]).integers(2**31, size=num_episodes)
    episodes = in_parallel(function, seeds, num_workers, noise, kwargs)
    if not episodes:
        raise UserError(f"The expert succeeded in none of {num_episodes} episodes; use less --demo-noise.")
    rows = [*itertools.chain(*episodes)]
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    starts = np.cumsum([0, *map(len, episodes[:-1])])
    return columns | {"episode_starts": starts.astype(np.int64)}
