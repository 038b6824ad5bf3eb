"""The DeepMind Control Suite as a world, what it writes, and Visual D4RL's files in both of their layouts."""

import importlib.util
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from test_cli import call, one_thread, results, run  # noqa: F401 (one is a fixture)

import bc_warmup
import iql
import sac
from common import UserError
from common.datasets import load_dataset, training_demonstrations
from common.envs import dmc, make_envs

INSTALLED = all(importlib.util.find_spec(name) for name in ("dm_control", "dm_env", "lxml"))
needs_suite = pytest.mark.skipif(
    not INSTALLED, reason="DM_CONTROL IS NOT INSTALLED: pip install --no-deps -r requirements-dmc.txt"
)
LENGTHS, SIDE = (4, 1, 6), 8  # decisions of the files' episodes, and their pictures


def written(ended=()):
    """Episodes as V-D4RL has them: row t has what led to its picture. Those of `ended` are terminated."""
    rng, made = np.random.default_rng(0), []
    for i, length in enumerate(LENGTHS):
        image = rng.integers(0, 256, (length + 1, SIDE, SIDE, 3), np.uint8)
        action = rng.uniform(-1, 1, (length + 1, 6)).astype(np.float32)
        reward = rng.random(length + 1).astype(np.float32)
        action[0], reward[0] = 0, 0
        terminal = (np.arange(length + 1) == length) & (i in ended)
        made.append(dict(image=image, action=action, reward=reward, terminal=terminal))
    return made


def write_npz(folder, made, **more):
    folder.mkdir(exist_ok=True)
    for i, each in enumerate(made):
        place = np.arange(len(each["image"]))
        np.savez_compressed(
            folder / f"2022{i:02}01T000000-abc-{place[-1]}.npz", image=each["image"], action=each["action"],
            reward=each["reward"], discount=1 - each["terminal"].astype(np.float32), is_first=place == 0,
            is_last=place == place[-1], is_terminal=each["terminal"], **more,
        )  # fmt: skip
    return folder


def write_hdf5(folder, made):
    """Two files: the first holds two episodes, one after another."""
    folder.mkdir(exist_ok=True)
    for name, part in (("a", made[:2]), ("b", made[2:])):
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            file["observation"] = np.concatenate([each["image"].transpose(0, 3, 1, 2) for each in part])
            file["action"] = np.concatenate([each["action"] for each in part])
            file["reward"] = np.concatenate([each["reward"] for each in part])
            file["discount"] = np.concatenate([1 - each["terminal"].astype(np.float32) for each in part])
            steps = [np.minimum(np.arange(len(each["image"])), 1) for each in part]
            for step in steps:
                step[-1] = 2
            file["step_type"] = np.concatenate(steps)
    return folder


@pytest.mark.parametrize("write", [write_npz, write_hdf5])
def test_both_layouts_are_read(tmp_path, write):
    made = written(ended=(2,))
    read = dmc.read_demonstrations(write(tmp_path / "data", made), outcomes=True, task="walker-walk")
    assert read["instructions"] == ["walker walk"] and read["episode_starts"].tolist() == [0, 5, 7]
    row = 0
    for each in made:
        length = len(each["image"]) - 1
        for t in range(length + 1):
            stack = [each["image"][max(t - k, 0)] for k in (2, 1, 0)]
            assert np.array_equal(read["image"][row], stack)
            assert read["decided"][row] == (t < length)
            if t < length:  # what follows the picture
                assert np.array_equal(read["actions"][row], each["action"][t + 1])
                assert read["rewards"][row] == each["reward"][t + 1]
            assert read["terminated"][row] == (t == 5 and length == 6)  # the third's last decision
            row += 1
    assert row == len(read["image"]) == len(read["proprio"])
    imitated = dmc.read_demonstrations(tmp_path / "data", frame_stack=1, max_demos=2)
    assert len(imitated["actions"]) == 4 + 1 and imitated["image"].shape == (5, 1, SIDE, SIDE, 3)
    assert imitated["decided"].all() and imitated["episode_starts"].tolist() == [0, 4]


def test_other_files_are_left_to_others_and_damage_is_told(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"] = np.zeros(3)
    for path in (tmp_path / "other.hdf5", tmp_path / "none", tmp_path):
        assert dmc.read_demonstrations(path) is None and dmc.Args.defaults(SimpleNamespace(demos=path)) == {}
    (tmp_path / "empty").mkdir()
    assert dmc.episode_files(tmp_path / "empty") == []
    made = written()[0]
    for name, change, said in (
        ("long", dict(reward=made["reward"][:-1]), "columns that do not belong together"),
        ("nan", dict(reward=made["reward"] * np.nan), "NaN or infinity"),
        ("wide", dict(image=made["image"][:, :, :4]), r"pictures of uint8 \(8, 4, 3\)"),
        ("float", dict(image=made["image"] / 255), "pictures of float64"),
        ("flat", dict(action=made["action"][:, 0]), "columns that do not belong together"),
    ):
        folder = write_npz(tmp_path / name, [made | change])
        with pytest.raises(UserError, match=f"abc-4.npz is damaged or not Visual D4RL's.*{said}"):
            dmc.read_demonstrations(folder)
    (tmp_path / "cut").mkdir()
    whole = next((tmp_path / "nan").iterdir()).read_bytes()
    (tmp_path / "cut/x.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "cut/y.npz", image=made["image"])
    for name in ("x", "y"):
        with pytest.raises(UserError, match=f"{name}.npz is damaged or not"):
            dmc.read_demonstrations(tmp_path / f"cut/{name}.npz")
    write_npz(tmp_path / "two", [made, made | dict(image=made["image"][:, :4, :4])])
    with pytest.raises(UserError, match="has pictures of 8 and of 4 pixels"):
        dmc.read_demonstrations(tmp_path / "two")


# --- the world


@needs_suite
def test_a_decision_is_the_suites_steps():
    """The reward of an action that is held is the sum; 1000 steps are 500 decisions, and no termination."""
    from dm_control import suite

    env = dmc.make(task="cheetah-run", action_repeat=4, horizon=3)
    obs, _ = env.reset(seed=5)
    plain = suite.load("cheetah", "run")
    seed = np.random.SeedSequence([0, 5]).generate_state(1)[0]
    plain.task._random = np.random.RandomState(seed)
    step, rng = plain.reset(), np.random.default_rng(0)
    for k in range(3):
        assert np.array_equal(obs["proprio"], np.float32(np.concatenate([*step.observation.values()])))
        action, wanted = rng.uniform(-2, 2, 6), 0.0
        for _ in range(4):
            step = plain.step(action.clip(-1, 1))
            wanted += step.reward
        obs, reward, terminated, truncated, _ = env.step(action)
        assert (reward, terminated, truncated) == (wanted, False, k == 2)
    other = dmc.make(task="cheetah-run", split="eval").reset(seed=5)[0]["proprio"]
    assert not np.array_equal(other, dmc.make(task="cheetah-run").reset(seed=5)[0]["proprio"])
    env = dmc.make(task="cartpole-balance")
    env.reset(seed=1)
    ends = [env.advance(np.zeros(1))[1:3] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]


@needs_suite
@pytest.mark.parametrize("task", ["walker-walk", "hopper-hop", "humanoid-walk"])
def test_a_state_goes_on_exactly(task):
    env, rng = dmc.make(task=task), np.random.default_rng(0)
    env.reset(seed=1)
    actions = rng.uniform(-1, 1, (24, *env.action_space.shape))
    for action in actions[:12]:
        env.step(action)
    other = dmc.make(task=task)
    other.set_state(env.get_state())
    for action in actions[12:]:
        (a, *rest), (b, *others) = env.step(action), other.step(action)
        assert np.array_equal(a["proprio"], b["proprio"]) and rest == others
    assert np.array_equal(env.reset()[0]["proprio"], other.reset()[0]["proprio"])
    assert dmc.make(task="reacher-easy").get_state() is None


@needs_suite
def test_what_is_unknown_is_told():
    with pytest.raises(UserError, match="dmc has no task 'walker-fly'; known: .*walker-walk"):
        dmc.make(task="walker-fly")


@pytest.fixture(scope="module")
def gl():
    """A picture can be drawn here."""
    if not INSTALLED:
        pytest.skip("DM_CONTROL IS NOT INSTALLED: pip install --no-deps -r requirements-dmc.txt")
    env = dmc.make(pictures=True, size=16)
    try:
        env.reset(seed=0)
    except UserError as error:
        pytest.skip(f"NO PICTURES OF DM_CONTROL: {error}")
    env.close()


def test_pictures_are_stacked_and_written(tmp_path, gl):
    env = dmc.make(pictures=True, size=16, horizon=5, save_episodes=tmp_path / "data")
    seen, rewards, rng = [env.reset(seed=1)[0]], [], np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (5, 6)).astype(np.float32)
    for k, action in enumerate(actions):
        obs, reward, _, truncated, _ = env.step(action)
        seen.append(obs)
        rewards.append(reward)
        assert truncated == (k == 4)
        if k == 1:
            middle = env.get_state()
    for before, after in zip(seen[:-1], seen[1:], strict=True):
        assert np.array_equal(before["image"][1:], after["image"][:2])
        assert not np.array_equal(after["image"][1], after["image"][2])  # it moves
    assert np.array_equal(seen[0]["image"][0], seen[0]["image"][2]) and not seen[0]["proprio"].any()
    read = dmc.read_demonstrations(tmp_path / "data", outcomes=True)
    assert np.array_equal(read["image"], np.stack([obs["image"] for obs in seen]))
    assert np.array_equal(read["actions"][:5], actions) and np.allclose(read["rewards"][:5], rewards)
    assert not read["terminated"].any() and read["decided"].tolist() == [True] * 5 + [False]
    assert dmc.Args.defaults(SimpleNamespace(demos=tmp_path / "data")) == {
        "pictures": True, "size": 16, "shadows": False,
    }  # fmt: skip
    other = dmc.make(pictures=True, size=16, horizon=5)
    other.set_state(middle)
    assert np.array_equal(other.step(actions[2])[0]["image"], seen[3]["image"])
    for each in (env, other):
        each.close()
    shadows = dmc.make(pictures=True, size=16, shadows=True)
    assert not np.array_equal(shadows.reset(seed=1)[0]["image"], seen[0]["image"])
    shadows.close()


def test_published_files_have_shadows(tmp_path):
    write_npz(tmp_path / "a", written())
    write_hdf5(tmp_path / "b", written())
    for name in ("a", "b"):
        found = dmc.Args.defaults(SimpleNamespace(dataset=tmp_path / name))
        assert found == {"pictures": True, "size": SIDE, "shadows": True}


def test_from_states_to_pictures_to_features(tmp_path, gl, monkeypatch):
    """SAC learns from states and its episodes are written with pictures; an encoder is cloned from them, and
    IQL learns on its features, in the world of the data."""
    monkeypatch.setattr("common.envs.vector.available_cores", lambda: 0)
    world, small = "--env dmc --task walker-walk --horizon 12 --device cpu --seed 3", "--width 16 --depth 1"
    base = f"--output-dir {tmp_path} --eval-episodes 2"
    flags = f"{world} {small} {base} --total-timesteps 60 --learning-starts 40 --batch-size 8"
    run(sac, flags, "--run-name sac")
    data = f"--collect 240 --save-dataset {tmp_path}/states.hdf5 --save-episodes {tmp_path}/data --size 16"
    run(sac, f"{world} {base} --evaluate --checkpoint {tmp_path}/sac --run-name c {data}")
    assert len(list((tmp_path / "data").iterdir())) == 20  # of ten environments, and no evaluation's
    flags = load_dataset(tmp_path / "states.hdf5").env_flags
    assert flags["horizon"] == 12 and "save_episodes" not in flags
    bc = f"--env dmc --horizon 12 --demos {tmp_path}/data --chunk 1 --head gaussian --gradient-steps 3"
    run(bc_warmup, f"{bc} {base} --eval-envs 2 --num-workers 0 --device cpu --warmup-steps 1 --run-name eye")
    assert (
        results(tmp_path / "eye")["args"] | {"pictures": True, "size": 16}
        == results(tmp_path / "eye")["args"]
    )
    off = f"--dataset {tmp_path}/data --features {tmp_path}/eye {small} --total-timesteps 10 --batch-size 8"
    run(iql, f"{off} {base} --device cpu --no-normalize-rewards --run-name iql")
    final = results(tmp_path / "iql")["final"]
    assert final["mean_length"] == 12 and final["normalized_score"] == pytest.approx(
        final["mean_reward"] / 10
    )
    run(iql, f"--evaluate --checkpoint {tmp_path}/iql {base} --device cpu --run-name e")
    assert results(tmp_path / "e")["final"] == final
    done = call(iql, f"{off} {base} --env dmc --task cheetah-run --frame-stack 2 --run-name x")
    assert done.code == 2 and "The checkpoint's cameras is 3, but this run's is 2" in done.err, done
    args = SimpleNamespace(
        env="dmc", task="hopper-hop", pictures=True, size=16, demos=tmp_path / "data", num_demos=9,
        demos_filter="all", action_history=0, seed=0, chunk=1, num_workers=0, worker_timeout=0.0,
    )  # fmt: skip
    with pytest.raises(UserError, match="has actions of 6 numbers; those of this world have 4"):
        training_demonstrations(args, make_envs(args, "eval", 1))
