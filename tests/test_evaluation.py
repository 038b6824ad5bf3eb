"""common.evaluation: the loop of all scripts against one by hand, its dict, videos and worlds."""

import math
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

from common import UserError, evaluation
from common.datasets import OfflineDataset, reference_scores
from common.envs.vector import vectorize
from common.evaluation import evaluate, evaluation_world, run_episodes, summarize, wilson_interval
from common.run import OfflineArgs


class Walk(gymnasium.Env):
    """Adds the action to its place, which a seed begins and moves; two tasks, of which one never succeeds.

    An episode has 3 to 7 steps. `die` kills the worker once, at the second step of the seed 2's.
    """

    instructions, active_dims = ["go", "go back"], np.array([True])

    def __init__(self, has_success=True, instructions=None, die=""):
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            proprio=box(-np.inf, np.inf, (2,), np.float32), task=box(0, 1, (), np.int64)
        )
        self.action_space, self.has_success, self.die = box(-1.0, 1.0, (1,), np.float32), has_success, die
        self.instructions = instructions or self.instructions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.task, self.steps = seed, int(seed) % 2, 0
        self.place, self.left = self.np_random.standard_normal(), 3 + int(seed) % 5
        return self.observe(), {}

    def observe(self):
        return {"proprio": np.float32([self.place, self.left]), "task": np.int64(self.task)}

    def advance(self, action):
        if self.die and self.seed == 2 and self.steps == 2 and Path(self.die).exists():
            Path(self.die).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        self.place += float(action[0]) + 0.1 * self.np_random.standard_normal()
        self.left, self.steps = self.left - 1, self.steps + 1
        success = self.left == 0 and self.task == 0
        info = {"success": success} if self.has_success else {}
        return self.place, self.left == 0, False, info

    def render(self):
        return np.full((64, 64, 3), 10 * self.steps, np.uint8)


make = Walk


class Agent(torch.nn.Module):
    """Half of the way back, in a chunk of two; notes what it was asked."""

    def __init__(self, values=False):
        super().__init__()
        self.asked, self.values = [], values

    def act(self, obs, turn):
        assert not self.training and not torch.is_grad_enabled()
        assert len(obs["proprio"]) == len(obs["task"]) == len(turn["rows"]) == len(turn["returns"])
        self.asked.append((obs, {key: np.copy(turn[key]) for key in ("rows", "returns")}))
        action = np.clip(-obs["proprio"][:, :1] / 2, -1, 1).astype(np.float32)
        values = np.arange(len(action), dtype=np.float32) + 0.25 if self.values else None
        return np.stack([action, action], 1), values


def alone(seed):
    """One episode by hand -> its row, and before each chunk its observation and its return so far."""
    env, total, length, ended, seen = Walk(), 0.0, 0, False, []
    obs, _ = env.reset(seed=seed)
    while not ended:
        seen.append((*obs["proprio"].tolist(), total))
        action = np.clip(-obs["proprio"][:1] / 2, -1, 1)
        for _ in range(2):
            reward, ended, _, info = env.advance(action)
            total, length = total + reward, length + 1
            if ended:
                break
        obs = env.observe()
    return (info["success"], total, length, env.task), seen


@pytest.fixture
def walk():
    made = []

    def build(num_envs, num_workers=0, **kwargs):
        made.append(vectorize(("walk", __name__, kwargs), num_envs, seed=0, chunk=2,
                              num_workers=num_workers, autoreset=False))  # fmt: skip
        return made[-1]

    yield build
    for envs in made:
        envs.close()


# --- the loop


@pytest.mark.parametrize("size", [1, 3, 7, 9])
def test_episodes_against_a_loop(walk, size):
    """More and fewer environments than episodes; each asks for its own rows and no finished one's."""
    seeds, agent = [5, 0, 3, 11, 2, 8, 14], Agent()
    outcomes = run_episodes(agent, walk(size), seeds)
    wanted = [alone(seed) for seed in seeds]
    np.testing.assert_allclose(np.array(outcomes, float), np.array([row for row, _ in wanted], float))
    asked = [
        (*obs["proprio"][i].tolist(), turn["returns"][i])
        for obs, turn in agent.asked
        for i in range(len(turn["rows"]))
    ]
    chunks = [each for _, seen in wanted for each in seen]
    assert len(asked) == len(chunks)
    np.testing.assert_allclose(sorted(asked), sorted(chunks), rtol=1e-6)
    assert agent.training and all((np.diff(turn["rows"]) > 0).all() for _, turn in agent.asked)
    assert len(agent.asked[0][1]["rows"]) == min(size, 7)
    agent.eval()
    run_episodes(agent, walk(size), seeds[:1])
    assert not agent.training  # as it was


def test_no_episodes(walk):
    envs = walk(2)
    assert run_episodes(Agent(), envs, []) == [] and summarize([], True) == {"episodes": 0}
    args, here = SimpleNamespace(eval_episodes=4), SimpleNamespace()
    assert evaluate(Agent(), None, args, here) == {"episodes": 0}


def test_an_episode_whose_worker_dies_is_played_again(walk, tmp_path):
    """With its own seed, from its start, also in its video."""
    seeds, marker = [4, 2, 1, 3, 6], tmp_path / "marker"
    wanted = run_episodes(Agent(), walk(2), seeds, video_folder=tmp_path / "a")
    marker.touch()
    envs = walk(2, num_workers=2, die=str(marker))
    with pytest.warns(RuntimeWarning, match="SIGKILL"):
        found = run_episodes(Agent(), envs, seeds, video_folder=tmp_path / "b")
    assert found == wanted and envs.lost_episodes == 1 and not marker.exists()
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert len(files[0]) == len(files[1]) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_nothing_global_moves(walk):
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run_episodes(Agent(), walk(3), range(5))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_an_evaluation_takes_the_first_seeds(walk, monkeypatch):
    """0, 1, 2, ..., of which torchrun's processes take turns, with a generator that --seed begins."""
    drawn = []

    class Sampler(Agent):
        def act(self, obs, turn):
            drawn.append(torch.rand((), generator=turn["generator"]).item())
            return super().act(obs, turn)

    args = SimpleNamespace(eval_episodes=7, seed=5)
    here = SimpleNamespace(rank=0, processes=1, device="cpu", videos=None)
    found = evaluate(Sampler(), walk(3), args, here, references=(-2.0, 6.0))
    first, drawn[:] = list(drawn), []
    assert evaluate(Sampler(), walk(3), args, here, references=(-2.0, 6.0)) == found and drawn == first
    rows = np.array([alone(seed)[0] for seed in range(7)], float)
    assert found["episodes"] == 7 and found["success_rate"] == rows[:, 0].mean()
    assert found["mean_reward"] == pytest.approx(rows[:, 1].mean())
    assert found["mean_length"] == rows[:, 2].mean()
    assert found["normalized_score"] == pytest.approx(100 * (rows[:, 1].mean() + 2) / 8)
    assert {text: each["episodes"] for text, each in found["per_task"].items()} == {"go": 4, "go back": 3}
    seeds = []
    monkeypatch.setattr(evaluation, "run_episodes", lambda agent, envs, own, *_: (seeds.append(own), [])[1])
    for rank in range(3):
        evaluate(Agent(), walk(3), args, SimpleNamespace(rank=rank, processes=3, device="cpu", videos=None))
    assert [each.tolist() for each in seeds] == [[0, 3, 6], [1, 4], [2, 5]]


# --- the dict


def test_wilson_interval():
    for successes, episodes, low, high in (  # Newcombe 1998, table I; the last by hand
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ):
        assert wilson_interval(successes, episodes) == pytest.approx([low, high], abs=6e-5)
    for n in (1, 7, 200):
        for k in range(n + 1):
            low, high = wilson_interval(k, n)
            assert 0 <= low <= k / n <= high <= 1
            for bound in (low, high):  # where the normal test of p = bound has z = 1.96
                if 0 < bound < 1:
                    z = (k / n - bound) / math.sqrt(bound * (1 - bound) / n)
                    assert abs(z) == pytest.approx(1.96, rel=1e-6)


def test_tasks_with_one_instruction_are_told_by_their_number():
    """All their episodes appear: one dict's entry would hold but the last task's."""
    texts = ["open it", "close it", "open it", "wait", "open it"]
    outcomes = [(1, 1.0, 5, 0), (0, 0.0, 9, 2), (1, 1.0, 7, 2), (0, 0.0, 9, 1), (1, 1.0, 6, 4)]
    found = summarize(outcomes, True, texts)
    names = {"open it (task 0)": 1, "close it": 1, "open it (task 2)": 2, "open it (task 4)": 1}
    assert {name: each["episodes"] for name, each in found["per_task"].items()} == names
    assert sum(names.values()) == found["episodes"] == 5
    assert found["per_task"]["open it (task 2)"] == summarize(outcomes[1:3], True)
    assert found["per_task"]["open it (task 2)"]["success_rate"] == 0.5
    assert found["per_task"]["open it (task 2)"]["mean_length"] == 8


def test_duplicates_through_the_loop(walk):
    envs = walk(2, instructions=["go", "go"])
    found = summarize(run_episodes(Agent(), envs, range(6)), True, envs.instructions)
    assert {name: each["episodes"] for name, each in found["per_task"].items()} == {
        "go (task 0)": 3,
        "go (task 1)": 3,
    }
    assert [each["success_rate"] for each in found["per_task"].values()] == [1.0, 0.0]


def test_a_world_without_success_has_no_rate():
    outcomes = [(0, 2.0, 5, 0), (0, 4.0, 7, 0)]
    found = summarize(outcomes, False, [""], (0.0, 6.0))
    assert found == {"episodes": 2, "mean_reward": 3.0, "mean_length": 6.0, "normalized_score": 50.0}
    assert evaluation.score(found) == 3.0 and evaluation.score({"episodes": 0}) == 0.0
    assert evaluation.score(summarize([(1, 9.0, 5, 0)], True)) == 1.0
    few, many = (summarize([(1, 1.0, 5, 0)] * n + [(0, 0.0, 5, 0)] * m, True) for n, m in ((3, 0), (95, 5)))
    assert evaluation.score(few) > evaluation.score(many)
    assert evaluation.assured(few) == few["success_rate_ci95"][0] < evaluation.assured(many)
    assert evaluation.assured(found) == 3.0 and evaluation.assured({"episodes": 0}) == 0.0


def test_means_of_the_last_episodes():
    names = ("rollout/success_rate", "rollout/mean_reward", "rollout/mean_length")
    info = dict(success=[True, True, False], episode_return=[2.0, 9.0, 4.0], episode_length=[3, 1, 8])
    info, ended = {key: np.array(x) for key, x in info.items()}, np.array([True, False, True])
    episodes = evaluation.finished_episodes(info, ended, np.array([5, 6, 7]))
    assert episodes == [[1.0, 2.0, 3.0, 5.0], [0.0, 4.0, 8.0, 7.0]]
    assert evaluation.finished_episodes(info, ended)[1] == [0.0, 4.0, 8.0, 0.0]
    assert evaluation.rollout_metrics(episodes, True) == dict(zip(names, (0.5, 3.0, 5.5), strict=True))
    found = evaluation.rollout_metrics(episodes, False)
    assert found == {"rollout/mean_reward": 3.0, "rollout/mean_length": 5.5}
    assert evaluation.rollout_metrics([], True) == evaluation.rollout_metrics([], False) == {}


# --- videos


@pytest.mark.parametrize("has_success", [True, False])
@pytest.mark.parametrize("values", [True, False])
def test_frames_and_captions(walk, monkeypatch, has_success, values):
    """Of the first six episodes: a caption at each frame, the outcome at the last, which stays."""
    written, captions = {}, []

    def annotate(frame, lines):
        captions.append(lines)
        return frame, lines

    monkeypatch.setattr(evaluation, "annotate", annotate)
    write = lambda path, frames, fps: written.update({path.name: frames})  # noqa: E731
    monkeypatch.setattr(evaluation, "write_video", write)
    seeds = [0, 1, 2, 3, 4, 5, 6, 7]
    run_episodes(Agent(values), walk(8, has_success=has_success), seeds, video_folder=Path("videos"))
    assert sorted(written) == [f"episode_{i}.mp4" for i in range(6)]
    for i in range(6):
        (success, total, length, task), _ = alone(seeds[i])
        frames, still = written[f"episode_{i}.mp4"][:length], written[f"episode_{i}.mp4"][length:]
        assert len(still) == 10 and all(each is frames[-1] for each in still)
        assert [int(frame[0, 0, 0]) for frame, _ in frames] == [10 * step for step in range(1, length + 1)]
        for step, (_, lines) in enumerate(frames, 1):
            text = lines[1]
            assert len(lines) == 2 and lines[0] == Walk.instructions[task]
            assert text.startswith(f"step {step}") and ("   value " in text) == values
            end = ("success" if success else "failure") if has_success else f"return {total:.1f}"
            assert text.endswith(f"   {end}") == (step == length)
            assert step == length or not any(word in text for word in ("success", "failure", "return"))
        if values:  # of its row among those that are asked: all run at the first chunk
            assert f"   value {i + 0.25:.2f}" in frames[0][1][1]


def test_no_instruction_has_no_line():
    envs = SimpleNamespace(instructions=[""], has_success=False)
    info = {"steps": [2], "episode_length": [4], "episode_return": [-3.14], "success": [False]}
    lines = [list(each) for each in evaluation.caption(info, 0, envs, 0, True, None)]
    assert lines == [["step 3"], ["step 4   return -3.1"]]


# --- where a data set's policy is evaluated


class Bounce(gymnasium.Env):
    """Of Hopper's sizes, and with no one's scores."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float32)
    action_space = gymnasium.spaces.Box(-3.0, 3.0, (3,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        pass


gymnasium.register("Bounce-v0", entry_point=Bounce)
HOPPER = reference_scores("Hopper-v5")


@pytest.mark.parametrize(
    ("env", "own", "scores", "wanted"),
    [
        (None, "Hopper-v5", HOPPER, HOPPER),
        (None, "Hopper-v5", (1.0, 2.0), (1.0, 2.0)),  # a file's own
        ("Hopper-v5", "Hopper-v5", (1.0, 2.0), (1.0, 2.0)),
        ("Hopper-v4", "Hopper-v5", HOPPER, HOPPER),  # D4RL's task as well
        ("Bounce-v0", "Hopper-v5", HOPPER, None),
        ("Bounce-v0", None, (1.0, 2.0), (1.0, 2.0)),  # a file that names no world may still have scores
    ],
)
def test_scores_follow_the_world(env, own, scores, wanted):
    dataset = SimpleNamespace(name="x", env_id=own, env_flags={}, normalized_actions=False,
                              reference_scores=scores, encoder=None,
                              states=np.zeros((5, 11)), actions=np.zeros((4, 3)))  # fmt: skip
    closed, here = [], SimpleNamespace(closing=lambda envs: closed.append(envs) or envs)
    for episodes in (3, 0):
        args = OfflineArgs(env=env, eval_episodes=episodes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            envs, (low, high), found = evaluation_world(args, dataset, here, episodes)
        assert found == wanted and len(closed[-1].active_dims) == 3
        bound = 3.0 if env == "Bounce-v0" else 1.0
        assert low.tolist() == 3 * [-bound] and high.tolist() == 3 * [bound]
        assert (envs is None) == (episodes == 0) and (envs is None or envs.num_envs == 3)
    for envs in closed:
        envs.close()
    with pytest.raises(UserError, match="x has 11 observations and 3 actions, Pendulum-v1 3 and 1; give"):
        evaluation_world(OfflineArgs(env="Pendulum-v1"), dataset, here, 1)


def test_a_data_set_without_a_world():
    dataset = OfflineDataset("x", None, *[None] * 6, (1.0, 2.0))
    with pytest.raises(UserError, match="^x names no environment; give --env, or --eval-episodes 0.$"):
        evaluation_world(OfflineArgs(), dataset, None, 1)
    assert evaluation_world(OfflineArgs(eval_episodes=0), dataset, None, 1) == (None, None, (1.0, 2.0))
