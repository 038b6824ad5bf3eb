"""Gymnasium ids that tell success, and observe dicts, arrays and pictures: the adapter, and scripts."""

import gymnasium
import h5py
import numpy as np
import pytest
from test_cli import call, one_thread, results, run, scalars  # noqa: F401

import iql
import ppo_vla
import sac
from common import UserError
from common.datasets import load_dataset, save_d4rl
from common.envs.vector import vectorize

box = gymnasium.spaces.Box


class Goal(gymnasium.Env):
    """Moves a point in the plane; success, told as `key`, is a distance of at most 0.5 to the goal."""

    key, success, metadata = "is_success", staticmethod(np.float32), {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Dict(
        observation=box(-9, 9, (2, 2), np.float64),
        desired_goal=box(-9, 9, (2,), np.float64),
        achieved_goal=box(-9, 9, (2,), np.float64),
    )
    action_space = box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.goal = np.zeros(2), self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def observe(self):
        both = np.stack([self.point, self.goal - self.point])
        return {"observation": both, "desired_goal": self.goal, "achieved_goal": self.point}

    def step(self, action):
        self.point = self.point + 0.5 * action
        distance = np.linalg.norm(self.goal - self.point)
        return self.observe(), -distance, False, False, {self.key: self.success(distance < 0.5)}


class MetaWorldLike(Goal):
    key, success = "success", staticmethod(float)


class Grid(Goal):
    """As highway-env's Kinematics: five cars of five numbers."""

    key, observation_space = "crashed", box(-9, 9, (5, 5), np.float32)

    def observe(self):
        return np.float32(np.arange(25).reshape(5, 5) / 5)


class Picture(Goal):
    observation_space = gymnasium.spaces.Dict(
        pixels=box(0, 255, (16, 16, 3), np.uint8), agent_pos=box(-9, 9, (2,), np.float64)
    )

    def observe(self):
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[tuple(np.clip(8 + 3 * self.point, 0, 15).astype(int))] = 255
        return {"pixels": picture, "agent_pos": self.point}


class PictureAlone(Picture):
    observation_space = Picture.observation_space["pixels"]

    def observe(self):
        return super().observe()["pixels"]


class TwoSizes(Goal):
    observation_space = gymnasium.spaces.Dict(
        a=box(0, 255, (16, 16, 3), np.uint8), b=box(0, 255, (8, 8, 3), np.uint8)
    )


class Words(Goal):
    observation_space = gymnasium.spaces.Dict(a=box(0, 1, (2,)), b=gymnasium.spaces.Text(3))


class Named(Goal):
    """As Meta-World's: made by name, and by nothing else."""

    def __init__(self, name, reach=0.5, render_mode=None):
        if name != "reach":
            raise ValueError(f"no {name} here")
        self.reach = reach

    def step(self, action):
        obs, *rest = super().step(action)
        return obs, self.reach, *rest[1:]


KINDS = (Goal, MetaWorldLike, Grid, Picture, PictureAlone, TwoSizes, Words, Named)
for kind in KINDS:
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=4)


def envs(name, count=2, **kwargs):
    world = (f"{name}-v0", "common.envs.gymnasium_env", {"id": f"{name}-v0"})
    return vectorize(world, count, seed=0, num_workers=0, **kwargs)


@pytest.mark.parametrize("name", ["Goal", "MetaWorldLike"])
def test_success_by_either_name(name):
    """Known from the first step on; the episode's is its last step's."""
    found = envs(name, 8, autoreset=False)
    assert not found.has_success
    obs = found.reset()["proprio"]  # achieved, desired, observation: by name
    goal, told = obs[:, 2:4], []
    np.testing.assert_array_equal(obs[:, :2], 0)
    np.testing.assert_array_equal(obs[:, 4:], np.c_[np.zeros((8, 2)), goal])
    for step in range(1, 5):
        _, _, _, truncated, info = found.step(np.clip(goal, -1, 1)[:, None].astype(np.float32))
        assert found.has_success is True and info["success"].dtype == bool
        point = step * 0.5 * np.clip(goal, -1, 1)
        assert info["success"].tolist() == (np.linalg.norm(goal - point, axis=1) < 0.5).tolist()
        told.append(info["success"].mean())
    assert truncated.all() and max(told) == 1 and told[-1] < 0.5  # those that overshoot have failed


def test_arrays_are_flattened_row_by_row():
    found = envs("Grid")
    assert found.single_observation_space["proprio"].shape == (25,)
    np.testing.assert_array_equal(found.reset()["proprio"], np.tile(np.float32(np.arange(25) / 5), (2, 1)))
    found.step(np.zeros((2, 1, 2), np.float32))
    assert found.has_success is False  # nothing has told one


@pytest.mark.parametrize("name, width", [("Picture", 2), ("PictureAlone", 0)])
def test_pictures_are_the_cameras(name, width):
    found = envs(name)
    obs = found.reset()
    assert obs["image"].shape == (2, 1, 16, 16, 3) and obs["image"].dtype == np.uint8
    assert obs["proprio"].shape == (2, width) and obs["task"].tolist() == [0, 0]
    obs = found.step(np.full((2, 1, 2), 1.0, np.float32))[0]
    bright = [np.argwhere(picture[0, ..., 0]).tolist() for picture in obs["image"]]
    assert bright == [[[9, 9]], [[9, 9]]]  # 8 + 3 * 0.5, rounded down


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("TwoSizes", "observes pictures of several sizes"),
        ("Words", "observes Text, not a vector or a picture"),
    ],
)
def test_what_cannot_be_observed_is_one_sentence(name, said):
    with pytest.raises(UserError, match=said):
        envs(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda obs: obs | {"achieved_goal": np.zeros(3)},
        lambda obs: {key: obs[key] for key in ("observation", "achieved_goal")},
        lambda obs: obs | {"more": np.zeros(2)},
        lambda obs: obs["observation"],
        lambda obs: obs | {"achieved_goal": np.array(["a", "b"])},
    ],
)
def test_an_observation_that_is_not_of_its_space(monkeypatch, change):
    observe = Goal.observe
    monkeypatch.setattr(Goal, "observe", lambda self: change(observe(self)))
    with pytest.raises(UserError, match="'proprio' as .* instead of float32 .8,., as its space says"):
        envs("Goal").reset()


def test_a_success_that_is_no_bool(monkeypatch):
    monkeypatch.setattr(Goal, "success", staticmethod(lambda x: np.array([x, x])))
    found = envs("Goal")
    found.reset()
    with pytest.raises(UserError, match="success of shape .2,. instead of a bool"):
        found.step(np.zeros((2, 1, 2), np.float32))


def test_others_mujoco_is_not_restored_by_halves():
    """A goal beside the physics would be another one after a resume: such an episode begins anew."""
    env = gymnasium.make("Hopper-v5")
    foreign = type("Foreign", (type(env.unwrapped),), {"__module__": "somebody.s"})
    gymnasium.register("Foreign-v0", entry_point=lambda **kwargs: foreign(**kwargs), max_episode_steps=9)
    for name, exact in (("Hopper-v5", True), ("Foreign-v0", False)):
        world = (name, "common.envs.gymnasium_env", {"id": name})
        found = vectorize(world, 1, seed=0, num_workers=0)
        found.reset()
        assert (found.get_state()["envs"][0]["env"] is not None) == exact
        found.close()


def test_a_run_reports_success(tmp_path):
    flags = (
        "--total-timesteps 40 --learning-starts 20 --eval-freq 20 --eval-episodes 3 --width 8 --batch-size 4"
    )
    run(sac, f"--env Goal-v0 {flags} --device cpu --output-dir {tmp_path} --run-name r")
    found = results(tmp_path / "r")
    assert {"success_rate", "success_rate_ci95", "mean_reward"} <= found["final"].keys()
    assert {"eval/success_rate", "rollout/success_rate"} <= scalars(tmp_path / "r").keys()
    run(sac, f"--env Grid-v0 {flags} --device cpu --output-dir {tmp_path} --run-name none")
    assert "success_rate" not in results(tmp_path / "none")["final"]


@pytest.mark.parametrize("name", ["Picture", "PictureAlone"])
def test_pictures_train_a_policy_that_sees(tmp_path, name):
    flags = (
        "--num-envs 2 --num-steps 4 --total-timesteps 16 --eval-episodes 2 --eval-envs 2 --minibatch-size 8"
    )
    flags += f" --backbone tiny --head gaussian --device cpu --output-dir {tmp_path} --run-name r"
    done = call(ppo_vla, f"--env {name}-v0 {flags}")
    assert done.code == 0, done
    assert "success_rate" in results(tmp_path / "r")["final"]
    done = call(sac, f"--env {name}-v0 --device cpu --output-dir {tmp_path}")
    assert done.code == 2 and "needs states and continuous actions" in done.err, done


SAC = "--total-timesteps 24 --learning-starts 20 --eval-freq 90 --eval-episodes 2 --width 8 --batch-size 4"


def test_arguments_of_the_environment_go_with_the_run_and_its_data(tmp_path):
    """A data set has the world's flags as well as its name: what learns from it is evaluated in that one."""
    base = f"--device cpu --output-dir {tmp_path}"
    named = ["--env", "Named-v0", "--env-kwargs", '{"name":"reach","reach":7}', "--max-episode-steps", "3"]
    file = tmp_path / "replay.hdf5"
    done = call(sac, f"{SAC} {base} --save-dataset {file} --run-name r", *named)
    assert done.code == 0 and results(tmp_path / "r")["final"]["mean_reward"] == 21, done
    done = call(sac, f"--resume {tmp_path / 'r'}")
    assert done.code == 0, done
    own = "--eval-episodes 2 --width 8 --batch-size 4 --total-timesteps 2 --no-normalize-rewards"
    run(iql, f"--dataset {file} {own} {base} --run-name iql")
    final = results(tmp_path / "iql")["final"]
    assert (final["mean_reward"], final["mean_length"]) == (21, 3)
    other = [*named[:3], '{"name":"reach"}']
    done = call(iql, f"--dataset {file} {own} {base} --run-name other", *other)
    assert done.code == 0, done  # --env is as its own flags say
    assert results(tmp_path / "other")["final"]["mean_reward"] == 0.5 * 4
    run(
        ppo_vla,
        f"--backbone mlp --checkpoint {tmp_path / 'r'} --evaluate --eval-episodes 2 {base} --run-name p",
    )
    assert results(tmp_path / "p")["final"]["mean_reward"] == 21
    more = f"{SAC} {base} --save-dataset {file} --append --run-name"
    done = call(sac, f"{more} refused", *other)
    assert done.code == 2 and "max_episode_steps 3 env_kwargs" in done.err and "file of their own" in done.err
    done = call(sac, f"{more} more", *named)
    assert done.code == 0 and load_dataset(file).env_flags["max_episode_steps"] == 3, done


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reach", "is no JSON object (Expecting value"),
        ("[1]", "is no JSON object (list)"),
        ("{}", "missing 1 required positional argument: 'name'"),
        ('{"name":"push"}', "cannot be made with {'name': 'push'}: no push here"),
        ('{"name":"reach","more":1}', "unexpected keyword argument 'more'"),
    ],
)
def test_wrong_arguments_of_the_environment(tmp_path, text, said):
    done = call(sac, f"{SAC} --device cpu --output-dir {tmp_path}", "--env", "Named-v0", "--env-kwargs", text)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


@pytest.mark.parametrize("flags", ["5", "[", "[[1, 2]]", '{"max_episode_steps": "x"}'])
def test_flags_of_a_file_that_are_none(tmp_path, flags):
    rows = np.zeros((4, 2)), np.zeros((4, 2)), np.zeros(4), np.zeros((4, 2)), np.eye(4)[3], np.zeros(4)
    save_d4rl(tmp_path / "x.hdf5", *rows, env_id="Goal-v0")
    with h5py.File(tmp_path / "x.hdf5", "a") as file:
        file.attrs["env_flags"] = flags
    done = call(iql, f"--dataset {tmp_path / 'x.hdf5'} --device cpu --output-dir {tmp_path}")
    assert done.code == 2 and done.err.count("\n") == 1, done
    assert "env_flags that are no JSON object" in done.err or "has --max-episode-steps x" in done.err, done
