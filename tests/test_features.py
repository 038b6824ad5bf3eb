"""Offline RL on features: decisions of recorded episodes, the encoder's features, the world seen through it,
and the scripts on them."""

import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import reach_world
import torch
from test_cli import assert_same_run, call, one_thread, results, run, stopped_by  # noqa: F401 (one is a fixture)

import bc_warmup
import cql
import decision_transformer
import iql
import ppo_vla
import td3_bc
from common import UserError, features
from common.backbones import build_backbone
from common.checkpoint import load_checkpoint, save_checkpoint
from common.datasets import Pictures, load_demonstrations
from common.envs import WORLDS, make_envs
from common.features import EncodedEnvs, decisions, offline_dataset, principal_components

CHUNK = 3
SCRIPTS = (iql, td3_bc, cql, decision_transformer)
WORLD = "--env reach --eval-episodes 4 --eval-envs 2 --num-workers 0 --device cpu --seed 3"
BC = f"{WORLD} --num-demos 4 --gradient-steps 3 --batch-size 8 --warmup-steps 1 --chunk {CHUNK}"
SMALL = {script: "--width 16 --depth 1 --batch-size 8 --gamma 0.9" for script in SCRIPTS}
SMALL[decision_transformer] = "--embed-dim 16 --n-layer 1 --batch-size 4 --context-length 4 --warmup-steps 5"
RUN = "--eval-episodes 3 --eval-freq 20 --save-freq 10 --total-timesteps 30 --device cpu --seed 5"


@pytest.fixture(autouse=True, scope="module")
def world():
    """The point in the plane that moves along y alone, to large discs, and environments in this process."""
    move = reach_world.ReachEnv.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "reach", "reach_world")
        patch.setattr(reach_world, "DEMO_KEYS", {"overview": "overview"}, raising=False)
        patch.setattr(reach_world, "RADIUS", 0.5)
        patch.setattr(reach_world.ReachEnv, "active_dims", np.array([False, True]))
        patch.setattr(
            reach_world.ReachEnv, "advance", lambda env, action: move(env, action * np.array([0, 1]))
        )
        patch.setattr("common.envs.vector.available_cores", lambda: 0)
        yield


def make_home(folder, history):
    """An encoder and rollouts of it, of which some end by their time."""
    run(bc_warmup, BC, f"--action-history {history} --output-dir {folder} --run-name eye --speed 0.3")
    flags = f"{WORLD} --checkpoint {folder}/eye --speed 0.3 --output-dir {folder} --run-name c"
    run(ppo_vla, flags, f"--collect 12 --save-dataset {folder}/rollouts.hdf5")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, world):
    return make_home(tmp_path_factory.mktemp("features"), 0)


@pytest.fixture(scope="module")
def remembering(tmp_path_factory, world):
    """Where past actions are observed, and so all of their numbers are chosen."""
    return make_home(tmp_path_factory.mktemp("remembering"), 2)


BOTH = pytest.mark.parametrize(("folder", "history"), [("home", 0), ("remembering", 2)])


def arguments(home, **changed):
    """A run's arguments and the run, as far as they are needed to read a data set."""
    args = dict(
        dataset=f"{home}/rollouts.hdf5", features=f"{home}/eye", features_of="prompt", features_dim=0,
        env=None, keys=(), seed=1, evaluate=False,
    )  # fmt: skip
    run = SimpleNamespace(
        device=torch.device("cpu"), rank=0, saved=None, source=None, kept={}, closing=lambda x: x
    )
    return SimpleNamespace(**args | changed), run


def episodes(home):
    with h5py.File(home / "rollouts.hdf5") as file:
        demos = [file[f"data/demo_{i}"] for i in range(len(file["data"]))]
        return [
            {key: x[()] for key, x in [*demo.items(), *demo["obs"].items()] if key != "obs"} for demo in demos
        ]


# --- decisions


def test_decisions_by_hand():
    """Chunks of 3. Of 7 steps that a time-out cuts: 0 -> 3, and 3 -> 6, whose picture is there; after 6
    nobody knows. Of 5 that end in a termination: 0 -> 3, and 3 -> the end, with the rewards of both steps."""
    rewards = np.float32([1, 2, 4, 8, 16, 32, 64, 1, 2, 4, 8, 16])
    terminated, decided = np.arange(12) == 11, np.isin(np.arange(12), [0, 3, 6, 7, 10])
    at, after, summed, terminations, chains = decisions(rewards, terminated, decided, [0, 7], 3)
    assert at.tolist() == [0, 3, 7, 10] and after.tolist() == [3, 6, 10, 10]
    assert summed.tolist() == [7, 56, 7, 24] and summed.dtype == np.float32
    assert terminations.tolist() == [False, False, False, True] and chains.tolist() == [0, 2]
    # without the next picture a cut decision is none; nothing comes after a first termination
    at, after, _, terminations, _ = decisions(rewards[:6], np.arange(6) == 9, decided[:6], [0], 3)
    assert at.tolist() == [0] and after.tolist() == [3] and not terminations.any()
    at, _, summed, terminations, _ = decisions(
        rewards[:6], np.isin(np.arange(6), [1, 4]), decided[:6], [0], 3
    )
    assert (at.tolist(), summed.tolist(), terminations.tolist()) == ([0], [3], [True])


@pytest.mark.parametrize("every", [1, 3, 2])
def test_decisions_against_a_loop(every):
    rng, chunk = np.random.default_rng(every), 3
    lengths, ends = rng.integers(1, 12, 20), rng.random(20) < 0.5
    starts = np.cumsum(lengths) - lengths
    rewards = rng.normal(size=lengths.sum()).astype(np.float32)
    terminated = np.zeros(len(rewards), bool)
    terminated[(starts + lengths - 1)[ends]] = True
    step = np.arange(len(rewards)) - np.repeat(starts, lengths)
    found, wanted = decisions(rewards, terminated, step % every == 0, starts, chunk), {}
    for start, length, end in zip(starts, lengths, ends, strict=True):
        for t in range(0, length, every):
            last = min(t + chunk, length)
            if t + chunk < length or end:
                gone = t + chunk >= length
                place = start + (t if gone else t + chunk)
                wanted[start + t] = (place, rewards[start + t : start + last].sum(), gone)
    at, after, summed, terminations, chains = found
    assert sorted(at) == sorted(wanted)
    for i, row in enumerate(at):
        assert (after[i], terminations[i]) == wanted[row][::2] and np.isclose(
            summed[i], wanted[row][1], atol=1e-5
        )
    edges = [*chains, len(at)]
    for a, b in zip(edges[:-1], edges[1:], strict=True):  # in a chain the next begins where one ended
        assert (after[a : b - 1] == at[a + 1 : b]).all() and not terminations[a : b - 1].any()


def test_what_ends_an_episode_of_a_file(tmp_path):
    """What `terminated` says; else `dones`, as of demonstrations, but of a rollout that failed nothing."""
    for name, column, success, wanted in (
        ("a", "terminated", None, [0, 1]), ("b", "dones", None, [0, 1]), ("c", "dones", True, [0, 1]),
        ("d", "dones", False, [0, 0]),
    ):  # fmt: skip
        with h5py.File(tmp_path / name, "w") as file:
            demo = file.create_group("data/demo_0")
            demo["actions"], demo["obs/proprio"] = np.zeros((2, 7)), np.zeros((2, 3))
            demo["rewards"], demo[column] = np.uint8([0, 1]), np.uint8([0, 1])
            if column == "terminated":
                demo["dones"] = np.uint8([1, 1])
            demo.attrs["language_instruction"] = "go"
            if success is not None:
                demo.attrs["success"] = success
        read = load_demonstrations(tmp_path / name, image_keys=(), outcomes=True)
        assert read["terminated"].tolist() == wanted and read["rewards"].tolist() == [0, 1]
        with h5py.File(tmp_path / name, "r+") as file:
            del file["data/demo_0/rewards"]
        with pytest.raises(UserError, match="demo_0 has no array 'rewards'"):
            load_demonstrations(tmp_path / name, image_keys=(), outcomes=True)


# --- features


@pytest.mark.parametrize("of", ["prompt", "actions"])
@BOTH
def test_features_are_the_backbones_hidden_states_and_the_proprioception(request, folder, history, of):
    home = request.getfixturevalue(folder)
    args, run = arguments(home, features_of=of)
    dataset = offline_dataset(args, run)
    saved = load_checkpoint(home / "eye")
    backbone = build_backbone(**saved["backbone"])
    weights = {name[9:]: x for name, x in saved["agent"].items() if name.startswith("backbone.")}
    backbone.load_state_dict(weights)
    row, ends = 0, []
    for episode in episodes(home):
        steps, ended = len(episode["actions"]), episode["terminated"].any()
        assert episode["decided"].tolist() == [t % CHUNK == 0 for t in range(steps)]
        for t in range(0, steps, CHUNK):
            if t + CHUNK >= steps and not ended:
                continue
            past = [episode["actions"][t - k] if t >= k else np.zeros(2) for k in range(history, 0, -1)]
            proprio = np.float32(np.concatenate([episode["proprio"][t], *past]))
            obs = {"image": episode["overview"][t][None, None], "proprio": proprio[None]}
            found = []
            for task in range(3):
                with torch.no_grad():
                    batch = backbone.preprocess(obs | {"task": np.array([task])}, reach_world.INSTRUCTIONS)
                    slots, prompt = backbone(batch)
                found.append((slots if of == "actions" else prompt)[0].flatten().numpy())
            state = dataset.states[row]
            close = [np.allclose(state[: -len(proprio)], hidden, atol=1e-5) for hidden in found]
            assert sum(close) == 1 and np.array_equal(state[-len(proprio) :], proprio)  # of one instruction
            actions = episode["actions"][t : t + CHUNK]
            actions = np.concatenate([actions, *[actions[-1:]] * (CHUNK - len(actions))])
            assert np.array_equal(dataset.actions[row], actions.ravel() if history else actions[:, 1])
            assert dataset.rewards[row] == episode["rewards"][t : t + CHUNK].sum()
            ends.append(t + CHUNK >= steps)
            row += 1
    assert row == len(dataset.actions) > 20 and 0 < sum(ends) == dataset.rewards.sum() < 12
    assert np.array_equal(dataset.terminations, ends)
    assert dataset.encoder.world.speed == 0.3 and run.kept == {"encoder": dataset.encoder.mark}


def test_principal_components():
    """Against the singular vectors of what is standardised."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) * [1, 10, 1, 0.1, 3, 1] + 5)
    mean, matrix = principal_components(x, 4)
    z = (x - x.mean(0)) / x.std(0)
    left, size, _ = np.linalg.svd(z, full_matrices=False)
    wanted = left[:, :4] * size[:4]
    found = ((torch.from_numpy(x) - mean) @ matrix).numpy()
    assert np.square(found).mean() == pytest.approx(1, rel=0.02)
    for a, b in zip(found.T, wanted.T / np.sqrt(np.square(wanted).mean()), strict=True):
        assert np.allclose(a, b * np.sign(a @ b), atol=0.05)


def test_components_of_features(home):
    """Of the data set's; what is saved makes the same again."""
    whole, (args, run) = offline_dataset(*arguments(home)), arguments(home, features_dim=5)
    dataset = offline_dataset(args, run)
    mean, matrix = run.kept["projection"]
    assert matrix.shape == (whole.states.shape[1], 5) and dataset.states.shape == (len(whole.states), 5)
    assert np.allclose(dataset.states, (torch.from_numpy(whole.states) - mean) @ matrix, atol=1e-5)
    run.saved = {"encoder": dataset.encoder.mark, "projection": (mean, 2 * matrix)}
    assert np.allclose(offline_dataset(args, run).states, 2 * dataset.states, atol=1e-4)
    with pytest.raises(UserError, match="--features-dim 9999, but there are 962 features"):
        offline_dataset(*arguments(home, features_dim=9999))


@pytest.mark.parametrize("components", [0, 5])
@BOTH
def test_the_worlds_transitions_are_the_data_sets(request, folder, history, components):
    """Through the same encoder: the first observation of an episode, and what follows when its chunks are
    played once more, is what the data set holds for them."""
    home = request.getfixturevalue(folder)
    args, run = arguments(home, features_dim=components)
    dataset = offline_dataset(args, run)
    envs = EncodedEnvs(make_envs(dataset.encoder.world, "train", 12), dataset.encoder)
    obs, everyone = envs.reset(np.random.SeedSequence([3, 0, 0, 1]).generate_state(12), np.ones(12, bool)), 0
    starts, row = dataset.episode_starts, 0
    for i, episode in enumerate(episodes(home)):
        lasts = not episode["terminated"].any() and len(episode["actions"]) <= CHUNK
        if lasts:
            continue
        alone, first = np.arange(12) == i, starts[row]
        assert np.allclose(obs["proprio"][i], dataset.states[first], atol=1e-5)
        for k in range(first, [*starts, len(dataset.actions)][row + 1]):
            actions = np.zeros((12, 1, dataset.actions.shape[1]), np.float32)
            actions[i] = dataset.actions[k]
            after, rewards, terminated, _, _ = envs.step(actions, alone, alone)
            assert rewards[i] == dataset.rewards[k] and terminated[i] == dataset.terminations[k]
            if not terminated[i]:
                assert np.allclose(after["proprio"][i], dataset.next_observations[k], atol=1e-5)
                everyone += 1
        row += 1
    assert row == len(starts) and everyone > 10


def test_what_features_cannot_be_of_is_refused(home, monkeypatch):
    with pytest.raises(UserError, match="--online-steps goes on from states alone"):
        offline_dataset(*arguments(home, online_steps=5))
    monkeypatch.setattr("common.backbones.tiny.TinyVLA.autoregressive", True)
    with pytest.raises(UserError, match="see the actions themselves; use --features-of prompt"):
        offline_dataset(*arguments(home, features_of="actions"))


def test_pictures_of_another_size_are_refused(home, tmp_path):
    shutil.copy(home / "rollouts.hdf5", tmp_path / "r.hdf5")
    with h5py.File(tmp_path / "r.hdf5", "r+") as file:
        for demo in file["data"].values():
            image = demo["obs/overview"][:, ::2, ::2]
            del demo["obs/overview"]
            demo["obs/overview"] = image
    with pytest.raises(
        UserError, match=r"holds pictures \(1, 16, 16, 3\), the encoder's are \(1, 32, 32, 3\)"
    ):
        offline_dataset(*arguments(home, dataset=f"{tmp_path}/r.hdf5"))


# --- the scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_learns_from_features_stops_resumes_and_is_evaluated(home, tmp_path, monkeypatch, script):
    flags = (
        f"--dataset {home}/rollouts.hdf5 --features {home}/eye --output-dir {tmp_path} {RUN} {SMALL[script]}"
    )
    flags += "" if script is decision_transformer else " --no-normalize-rewards"
    flags += " --features-dim 7" if script is td3_bc else ""
    run(script, flags, "--run-name whole --capture-video")
    assert list((tmp_path / "whole/videos").glob("*.mp4"))
    found, saved = results(tmp_path / "whole"), load_checkpoint(tmp_path / "whole")
    assert "success_rate" in found["final"] and found["args"]["features"] == f"{home}/eye"
    assert len(saved["agent"]["obs_mean"]) == (7 if script is td3_bc else 10 * 96 + 2) and "encoder" in saved
    stopped_by(monkeypatch, script, "sample_batch", 13)
    assert call(script, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    encoded = []
    monkeypatch.setattr(features, "tqdm", lambda rows, **_: encoded.append(len(rows)) or rows)
    monkeypatch.setattr(Pictures, "__getitem__", None)
    evaluated = "--eval-episodes 3 --device cpu"
    run(script, f"--evaluate --checkpoint {tmp_path}/whole --output-dir {tmp_path} --run-name e {evaluated}")
    assert (
        results(tmp_path / "e")["final"] == found["final"] and max(encoded) == 1
    )  # what is seen, and no data


def test_an_encoder_that_is_missing_or_another_is_told_in_one_sentence(home, tmp_path):
    shutil.copytree(home / "eye", tmp_path / "eye")
    data = f"--dataset {home}/rollouts.hdf5 {RUN} {SMALL[iql]} --no-normalize-rewards --output-dir {tmp_path}"
    run(iql, data, f"--features {tmp_path}/eye --run-name a")
    again = (f"--resume {tmp_path}/a", f"--evaluate --checkpoint {tmp_path}/a --output-dir {tmp_path}")
    state = load_checkpoint(tmp_path / "eye")
    name = "backbone.feel.weight"
    state["agent"][name] = state["agent"][name] * 1.001
    save_checkpoint(tmp_path / "eye/checkpoint.pt", "bc_warmup", state)
    for flags in again:
        done = call(iql, flags)
        assert done.code == 2 and done.err.count("\n") == 1, done
        assert f"{tmp_path}/eye is not the encoder that {tmp_path}/a learned with" in done.err
    shutil.rmtree(tmp_path / "eye")
    for flags in again:
        done = call(iql, flags)
        assert done.code == 2 and done.err.count("\n") == 1, done
        assert f"--features cannot be read: {tmp_path}/eye does not exist" in done.err
    for flags, said in (
        (f"{data} --features {tmp_path}/a", "was written by iql.py, which sees no pictures; give --features"),
        (f"{data} --features {home}/eye --checkpoint {tmp_path}/a", f"{tmp_path}/eye is part of it; drop"),
        (f"--features {home}/eye --dataset none {RUN}", "none does not exist"),
        (
            f"{data} --features {home}/eye --env CartPole-v1",
            "The checkpoint's action_dim is 2, but this run's is 1",
        ),
    ):
        done = call(iql, flags)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
