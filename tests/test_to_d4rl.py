"""common/envs/to_d4rl.py: a scripted expert's episodes from states as a data set."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest

from common.datasets import load_dataset
from common.envs import WORLDS
from common.envs.to_d4rl import main


@dataclass
class Args:
    cameras: tuple[str, ...] = ("agentview",)
    step: float = 0.1


class Line(gym.Env):
    """A point has to come to 0, and ends there with a reward of 1; else an episode is 12 steps of -1."""

    observation_space = gym.spaces.Dict(proprio=gym.spaces.Box(-9, 9, (3,), np.float32))
    action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def __init__(self, split="train", cameras=(), step=0.1):
        assert split == "train"
        self.scale = step
        if cameras != ("none",):
            image = gym.spaces.Box(0, 255, (1, 8, 8, 3), np.uint8)
            self.observation_space = gym.spaces.Dict(image=image, **self.observation_space.spaces)

    def reset(self, *, seed=None, options=None):
        self.point, self.steps = np.random.default_rng(seed).uniform(-0.5, 0.5, 3), 0
        return {"proprio": self.point.astype(np.float32)}, {}

    def step(self, action):
        self.point, self.steps = self.point + self.scale * action[:3], self.steps + 1
        success = bool(np.abs(self.point).max() < 0.1)
        truncated = not success and self.steps == 12
        obs = {"proprio": self.point.astype(np.float32)}
        return obs, 1.0 if success else -1.0, success, truncated, {"success": success}

    def expert(self):
        return np.append((-self.point / self.scale).clip(-1, 1), [0, 0, 0, -1]).astype(np.float32)


make = Line


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.setitem(WORLDS, "line", "test_to_d4rl")


def test_episodes_are_the_experts_in_time_with_its_rewards_and_ends(tmp_path, capsys):
    path = tmp_path / "line.hdf5"
    main(f"--env line --out {path} --episodes 8 --noise 2 --step 0.2".split())
    data = load_dataset(path)
    starts, seeds = data.episode_starts, np.random.default_rng([1, 1]).integers(2**31, size=8)
    assert len(starts) == 8 and 0 < data.terminations.sum() < 8  # failures are kept
    won = int(data.terminations.sum())
    assert f"8 episodes of {len(data.rewards)} steps, {won} successful" in capsys.readouterr().out
    np.testing.assert_array_equal(data.rewards, np.where(data.terminations, 1, -1))
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(data.rewards)], strict=True)):
        env = Line(cameras=("none",), step=0.2)
        np.testing.assert_array_equal(data.states[start], env.reset(seed=int(seeds[number]))[0]["proprio"])
        exact = True
        for i in range(start, stop):
            exact &= np.array_equal(data.actions[i], env.expert())
            obs, _, terminated, truncated, _ = env.step(data.actions[i])
            np.testing.assert_allclose(data.states[data.next_index[i]], obs["proprio"], atol=1e-6)
            assert (terminated or truncated) == (i == stop - 1)
        assert exact == (number % 4 == 0)  # the others are played with noise


def test_what_cannot_be_is_said_in_a_sentence(tmp_path, capsys, monkeypatch):
    out = f"--out {tmp_path / 'x.hdf5'} --episodes 1"
    for words, sentence in {
        f"--env nowhere {out}": "; not nowhere.",
        out: "; not None.",
        f"--env line --cameras agentview {out}": "has no expert that plays from states",
        "--env line --out /dev/null/x.hdf5 --episodes 1": "/dev/null",
    }.items():
        with pytest.raises(SystemExit) as end:
            main(words.split())
        assert end.value.code == 2 and sentence in capsys.readouterr().err
    monkeypatch.delattr(Line, "expert")
    with pytest.raises(SystemExit) as end:
        main(f"--env line {out}".split())
    assert end.value.code == 2 and "has no expert" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
