"""sac.py, iql.py, cql.py, td3_bc.py through their command lines: results, resume, SAC's data sets, learning,
wrong inputs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from test_cli import (  # noqa: F401
    CONTRACT,
    EVALUATION,
    assert_same_run,
    call,
    check_evaluation,
    command,
    frames,
    one_thread,
    results,
    run,
    scalars,
    stopped_by,
)  # fmt: skip
from test_decision_transformer import write_pendulum

import cql
import decision_transformer
import iql
import sac
import td3_bc
from common import replay
from common.checkpoint import load_checkpoint, save_checkpoint
from common.datasets import D4RL_FILES, load_dataset, save_d4rl, transition_tensors
from common.envs import make_envs
from common.run import read_flags

SCRIPTS = (sac, iql, cql, td3_bc)
SMALL = "--width 16 --depth 1 --batch-size 8 --eval-episodes 2 --seed 3 --device cpu"
SAC = """--env Pendulum-v1 --num-envs 2 --total-timesteps 500 --learning-starts 300 --eval-freq 200
    --save-freq 100 --buffer-size 401"""
OFFLINE = "--total-timesteps 60 --eval-freq 25 --save-freq 10"


class Aim(gymnasium.Env):
    """Observes (10 + 3 x, noise) with a new x of [-1, 1] at each of 4 steps; the reward of the action 2 a is
    1 - 5 (a - 0.4 x)^2."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 4
        return self.observe(), {}

    def observe(self):
        self.x = self.np_random.uniform(-1, 1)
        return np.float32([10 + 3 * self.x, self.np_random.normal()])

    def step(self, action):
        reward = 1 - 5 * (float(action[0]) / 2 - 0.4 * self.x) ** 2
        self.left -= 1
        return self.observe(), reward, self.left == 0, False, {}

    def render(self):
        return np.full((96, 128, 3), 50 * self.left, np.uint8)


class Lopsided(Aim):
    action_space = gymnasium.spaces.Box(-1.0, 4.0, (1,), np.float32)


gymnasium.register("Aim-v0", entry_point=Aim)
gymnasium.register("Lopsided-v0", entry_point=Lopsided)
gymnasium.register("AimCut-v0", entry_point=Aim, max_episode_steps=3)


class Endless(Aim):
    """No episode ends; step 20 of an environment's second one has `spoiled`, a reward or an observation."""

    resets, spoiled = 0, None

    def reset(self, **kwargs):
        self.resets += 1
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        if self.resets == 2 and self.left == 4 - 20:
            obs, reward = Endless.spoiled or (obs, reward)
        return obs, reward, False, False, info

    def render(self):
        return np.zeros((96, 128, 3), np.uint8)


gymnasium.register("Endless-v0", entry_point=Endless)


def write_aim(path, gain=-0.2, noise=0.8, steps=4000):
    """A behaviour that does the opposite of what is right, with much noise: a = gain x +- noise."""
    rng, env, rows = np.random.default_rng(0), Aim(), []
    obs, _ = env.reset(seed=0)
    for _ in range(steps):
        action = 2 * np.float32([np.clip(gain * env.x + rng.uniform(-noise, noise), -1, 1)])
        after, reward, ended, _, _ = env.step(action)
        rows.append((obs, action, reward, after, ended, False))
        obs = env.reset()[0] if ended else after
    save_d4rl(path, *(np.array(column) for column in zip(*rows, strict=True)), env_id="Aim-v0")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    write_pendulum(folder / "pendulum.hdf5")
    write_aim(folder / "aim.hdf5")
    return folder


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def whole(request, home):
    """A run -> script, flags, folder."""
    script = request.param
    flags = f"{SMALL} " + (SAC if script is sac else f"{OFFLINE} --dataset {home}/pendulum.hdf5")
    run(script, flags, f"--output-dir {home} --run-name {script.__name__}")
    return script, flags, home / script.__name__


@pytest.fixture(scope="module")
def trained_sac(home):
    run(sac, SMALL, SAC, f"--output-dir {home} --run-name for_data")
    return home / "for_data"


# --- what a run leaves behind


def test_results_of_a_run(whole):
    script, _, folder = whole
    found, online = results(folder), script is sac
    assert sorted(found) == sorted(CONTRACT)
    for key in EVALUATION:
        check_evaluation(found[key], 2, False)
    rewards = {key: found[key]["mean_reward"] for key in EVALUATION}
    assert rewards["best"] >= max(rewards.values()) and found["final"]["mean_length"] == 200
    # several environments: each step of each counts, and has an update after the first 300
    assert found["environment_steps"] == (500 if online else 0)
    assert found["gradient_steps"] == (200 if online else 60)
    events = scalars(folder)
    steps = [0, 200, 400, 500] if online else [0, 25, 50, 60]
    assert [step for step, _ in events["eval/mean_reward"]] == steps
    assert max(value for _, value in events["eval/mean_reward"]) == pytest.approx(rewards["best"], rel=1e-6)
    speed = {f"time/{'env_steps' if online else 'updates'}_per_second"}
    assert {"loss/critic", "loss/policy", "value/q"} | speed <= events.keys()
    assert {name for name in events if name.endswith("_per_second")} == speed
    best, saved = load_checkpoint(folder / "best.pt"), load_checkpoint(folder)
    assert best.keys() == {"format", "version", "script", "args", "agent"}
    assert best["script"] == saved["script"] == script.__name__ and best["args"] == found["args"]
    whole = {"optimizers", "processes", "initial", "best", "seconds"}
    assert saved.keys() == best.keys() | whole | ({"counters", "recent", "replay"} if online else {"step"})
    assert [each.keys() for each in saved["processes"]] == [{"state", "rng"}]
    if script is td3_bc:  # no numbers of an update before: their memory may be another update's
        steps = {key: {step for step, _ in events[key]} for key in ("loss/critic", "loss/policy")}
        assert steps["loss/policy"] == steps["loss/critic"] - {25} and 25 in steps["loss/critic"]
    if online:
        assert load_checkpoint(folder)["replay"].shape == (200, 2, 10)  # 401 // 2 steps of 2 environments
        assert {"rollout/mean_reward", "rollout/mean_length"} <= events.keys()


def test_evaluation_is_the_runs_final_one(home, whole):
    script, flags, folder = whole
    for name, key in (("checkpoint", "final"), ("best", "best")):
        where = f"--output-dir {home} --run-name {script.__name__}_{name}"
        done = run(script, flags, f"--evaluate --checkpoint {folder}/{name}.pt", where)
        found = results(home / f"{script.__name__}_{name}")
        assert sorted(found) == ["args", "final", "hardware", "versions"]
        assert found["final"] == results(folder)[key] and done.out.startswith("evaluated ")


def test_an_evaluation_prepares_no_rewards(home, tmp_path):
    """Returns that are all equal cannot be scaled, and need not be."""
    one = np.ones((4, 1))
    save_d4rl(tmp_path / "even.hdf5", one * [1, 2], 0 * one, one, one * [1, 2], one, 0 * one, "Aim-v0")
    flags = f"{SMALL} --output-dir {tmp_path} --total-timesteps 3"
    run(iql, flags, f"--dataset {home}/aim.hdf5 --run-name r --no-normalize-rewards")
    done = call(iql, flags, f"--dataset {tmp_path}/even.hdf5 --run-name refused")
    assert done.code == 2 and "has nearly equal returns alone; use --no-normalize-rewards" in done.err, done
    where = f"--dataset {tmp_path}/even.hdf5 --run-name evaluated"
    run(iql, flags, f"{where} --evaluate --checkpoint {tmp_path}/r")
    assert results(tmp_path / "evaluated")["final"] == results(tmp_path / "r")["final"]


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.__name__)
def test_observations_as_they_are(home, tmp_path, script):
    flags = f"{SMALL} --dataset {home}/aim.hdf5 --total-timesteps 1 --eval-episodes 0 --no-normalize"
    run(script, flags, f"--no-normalize-rewards --output-dir {tmp_path} --run-name r")
    agent = load_checkpoint(tmp_path / "r")["agent"]
    assert agent["obs_mean"].tolist() == [0, 0] and agent["obs_std"].tolist() == [1, 1]


def test_updates_draw_from_all_of_the_replay(tmp_path, monkeypatch):
    """Of both environments, also once the ring of 4 steps has turned, and half an update a step."""
    sizes, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda n, *a, **k: (sizes.append(n), randint(n, *a, **k))[1])
    flags = f"{SMALL} --env Pendulum-v1 --num-envs 2 --buffer-size 9 --learning-starts 4 --utd-ratio 0.5"
    run(sac, flags, f"--total-timesteps 14 --eval-episodes 0 --output-dir {tmp_path} --run-name r")
    assert sizes == [6, 8, 8, 8, 8]


def test_frequencies_that_the_number_of_environments_does_not_divide(tmp_path):
    flags = f"{SMALL} --env Pendulum-v1 --num-envs 3 --learning-starts 99 --total-timesteps 30 --eval-freq 10"
    run(sac, flags, f"--output-dir {tmp_path} --run-name r")
    assert [step for step, _ in scalars(tmp_path / "r")["eval/mean_reward"]] == [0, 12, 21, 30]


def test_one_seed_gives_one_run(tmp_path, whole):
    script, flags, folder = whole
    run(script, flags, f"--output-dir {tmp_path} --run-name again")
    assert_same_run(tmp_path / "again", folder)
    run(script, flags, f"--output-dir {tmp_path} --run-name other --seed 4 --total-timesteps 10")
    other, here = load_checkpoint(tmp_path / "other"), load_checkpoint(folder)
    assert not torch.equal(other["agent"]["actor.0.weight"], here["agent"]["actor.0.weight"])
    if script is sac:  # its environments and its random actions are others as well
        run(sac, flags, f"--output-dir {tmp_path} --run-name short --total-timesteps 10")
        a, b = other["replay"], load_checkpoint(tmp_path / "short")["replay"]
        assert (a[0, :, :3] != b[0, :, :3]).any(1).all() and (a[..., 3] != b[..., 3]).all()


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.__name__)
def test_evaluation_normalises_observations_by_the_training_data(home, tmp_path, script):
    flags = f"{SMALL} {OFFLINE} --eval-freq 0 --env Aim-v0 --output-dir {tmp_path}"
    run(script, flags, f"--dataset {home}/aim.hdf5 --run-name r")
    saved, dataset = load_checkpoint(tmp_path / "r"), load_dataset(home / "aim.hdf5")
    np.testing.assert_allclose(saved["agent"]["obs_mean"], dataset.observations.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(saved["agent"]["obs_std"], dataset.observations.std(0) + 1e-3, rtol=1e-4)
    final = results(tmp_path / "r")["final"]
    save_d4rl(tmp_path / "other.hdf5", *(np.tile(x, (2, 1)) for x in ([[1.0, 5]], [[0.1]])), [0, 1],
              [[1, 5], [1, 6]], [1, 1], [0, 0])  # fmt: skip
    evaluate = "--evaluate --no-normalize-rewards --dataset"
    run(script, flags, f"{evaluate} {tmp_path}/other.hdf5 --checkpoint {tmp_path}/r --run-name same")
    assert results(tmp_path / "same")["final"] == final  # by the training's data, not by this
    saved["agent"] |= {"obs_mean": torch.zeros(2), "obs_std": torch.ones(2)}
    save_checkpoint(tmp_path / "raw.pt", script.__name__, {key: saved[key] for key in ("agent", "args")})
    run(script, flags, f"{evaluate} {home}/aim.hdf5 --checkpoint {tmp_path}/raw.pt --run-name raw")
    assert results(tmp_path / "raw")["final"]["mean_reward"] != final["mean_reward"]


@pytest.mark.parametrize("script", (*SCRIPTS, decision_transformer), ids=lambda script: script.__name__)
def test_videos_of_the_first_six_episodes(home, tmp_path, script):
    """Four steps of Aim each, and its end for half a second."""
    flags = "--env Aim-v0 --total-timesteps 1 --eval-episodes 7 --batch-size 8 --device cpu --capture-video"
    data = "" if script is sac else f"--dataset {home}/aim.hdf5"
    data += " --no-normalize-rewards" if script is iql else ""
    run(script, flags, data, f"--output-dir {tmp_path} --run-name r")
    files = sorted((tmp_path / "r/videos").iterdir())
    assert [file.name for file in files] == [f"episode_{i}.mp4" for i in range(6)]
    assert [frames(file)[1] for file in files] == 6 * [4 + 10]


def test_a_run_without_evaluation_learns_the_same(home, tmp_path):
    """The environment says what its actions' units are all the same; best.pt is then the last."""
    flags = f"{SMALL} {OFFLINE} --dataset {home}/pendulum.hdf5 --output-dir {tmp_path}"
    run(td3_bc, flags, "--run-name with")
    run(td3_bc, flags, "--run-name without --eval-episodes 0")
    assert results(tmp_path / "without")["final"] == results(tmp_path / "without")["best"] == {"episodes": 0}
    wanted = load_checkpoint(tmp_path / "with")["agent"]
    for name in ("checkpoint.pt", "best.pt"):
        found = load_checkpoint(tmp_path / "without" / name)["agent"]
        assert all(torch.equal(found[key], x) for key, x in wanted.items())


# --- exact resume


def position(path):
    """The step at which a checkpoint was written."""
    saved = load_checkpoint(path)
    return saved["counters"][0] if "counters" in saved else saved["step"]


@pytest.mark.parametrize("at", [17, 60])  # within a run, and in its last update but one or later
def test_a_signal_within_an_update(tmp_path, whole, monkeypatch, at):
    script, flags, folder = whole
    at = 110 if script is sac and at == 60 else at  # its ring has turned, its first episodes have ended
    td_target, calls = script.td_target, []

    def patched(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return td_target(*args)

    monkeypatch.setattr(script, "td_target", patched)
    done = call(script, flags, f"--output-dir {tmp_path} --run-name r")
    monkeypatch.undo()
    if script is not sac and at == 60:  # nothing is left to stop
        assert (done.code, done.err) == (0, "")
    else:
        assert done.code == 128 + signal.SIGINT and not done.err, done
        where = f"{300 + 2 * -(-at // 2)} env_steps" if script is sac else f"{at} updates"
        assert f"stopped at {where}; go on with: python {script.__name__}.py --resume" in done.out
        assert not (tmp_path / "r/results.json").exists()
        run(script, f"--resume {tmp_path}/r")
    assert_same_run(tmp_path / "r", folder)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, whole):
    script, flags, folder = whole
    process = subprocess.Popen(
        command(script, flags, f"--output-dir {tmp_path} --run-name r"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    limit = time.monotonic() + 200
    file = tmp_path / "r/checkpoint.pt"
    while not (file.exists() and position(file)):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert position(tmp_path / "r") < (500 if script is sac else 60)
    run(script, f"--resume {tmp_path}/r")
    assert_same_run(tmp_path / "r", folder)


def test_a_resumed_run_keeps_the_best_of_before(tmp_path, whole, monkeypatch):
    script, flags, _ = whole
    good = {"episodes": 2, "mean_reward": 1e9, "mean_length": 1.0}

    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return good

    monkeypatch.setattr(script, "evaluate", evaluate)
    done = call(script, flags, f"--output-dir {tmp_path} --run-name r")
    assert done.code == 128 + signal.SIGINT and "stopped at 0" in done.out, done
    monkeypatch.undo()
    kept = (tmp_path / "r/best.pt").read_bytes()
    run(script, f"--resume {tmp_path}/r")
    assert results(tmp_path / "r")["best"] == results(tmp_path / "r")["initial"] == good
    assert (tmp_path / "r/best.pt").read_bytes() == kept


def test_what_a_crashed_run_logged_after_its_checkpoint_is_logged_again(tmp_path, whole, monkeypatch):
    script, flags, folder = whole
    td_target, calls = script.td_target, []

    def patched(*args):
        calls.append(1)
        if len(calls) == 27:  # offline, after the evaluation at 25 and before the checkpoint at 30
            raise RuntimeError("a power cut")
        return td_target(*args)

    monkeypatch.setattr(script, "td_target", patched)
    with pytest.raises(RuntimeError, match="a power cut"):
        call(script, flags, f"--output-dir {tmp_path} --run-name r")
    monkeypatch.undo()
    time.sleep(1.1)  # TensorBoard orders a run's files by the second at which they began
    run(script, f"--resume {tmp_path}/r")
    assert_same_run(tmp_path / "r", folder)
    found, wanted = scalars(tmp_path / "r"), scalars(folder)
    assert found["eval/mean_reward"] == wanted["eval/mean_reward"]


def test_episodes_that_a_resume_cuts_are_time_outs(tmp_path, monkeypatch):
    """Aim cannot be saved: its episodes of 4 steps go on from a reset."""
    step_envs, calls = replay.step_envs, []

    def patched(*args):
        calls.append(1)
        if len(calls) == 22:
            os.kill(os.getpid(), signal.SIGINT)
        return step_envs(*args)

    monkeypatch.setattr(replay, "step_envs", patched)
    flags = f"{SMALL} --env Aim-v0 --total-timesteps 30 --learning-starts 99 --eval-episodes 0"
    assert call(sac, flags, f"--output-dir {tmp_path} --run-name r").code == 128 + signal.SIGINT
    monkeypatch.undo()
    assert call(sac, f"--resume {tmp_path}/r --save-dataset {tmp_path}/x.hdf5").code == 0
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert np.flatnonzero(file["timeouts"]).tolist() == [21]
        assert np.flatnonzero(file["terminals"]).tolist() == [3, 7, 11, 15, 19, 25, 29]


def test_resume_refuses_changed_flags_and_mere_weights(whole):
    script, _, folder = whole
    done = call(script, f"--resume {folder} --width 8 --gamma 0.9")
    assert done.code == 2 and "drop --gamma, --width, or use --checkpoint instead" in done.err, done
    done = call(script, f"--resume {folder}/best.pt")
    assert done.code == 2 and "holds weights alone" in done.err, done


@pytest.mark.parametrize("script", [sac, cql], ids=lambda script: script.__name__)
def test_a_given_temperature_holds_also_beside_a_checkpoint(home, tmp_path, script):
    flags = f"{SMALL} --eval-episodes 0 --output-dir {tmp_path} --total-timesteps 9 "
    flags += "--learning-starts 3" if script is sac else f"--dataset {home}/pendulum.hdf5"
    flags += " --env Pendulum-v1"
    run(script, flags, "--run-name auto")
    assert load_checkpoint(tmp_path / "auto")["agent"]["log_alpha"] != 0
    run(script, flags, f"--checkpoint {tmp_path}/auto --alpha 0.5 --run-name fixed")
    assert load_checkpoint(tmp_path / "fixed")["agent"]["log_alpha"].exp().item() == pytest.approx(0.5)


# --- the data sets that SAC writes


def assert_pendulum(dataset):
    """Each transition is the pendulum's own, in its own units, also at the ends of episodes."""
    cos, sin, speed = dataset.observations.T.astype(np.float64)
    angle, torque = np.arctan2(sin, cos), dataset.actions[:, 0].astype(np.float64)
    assert 1 < np.abs(torque).max() <= 2
    cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
    np.testing.assert_allclose(dataset.rewards, -cost, atol=1e-3)
    speed = np.clip(speed + (15 * sin + 3 * torque) * 0.05, -8, 8)
    after = np.stack([np.cos(angle + 0.05 * speed), np.sin(angle + 0.05 * speed), speed], 1)
    np.testing.assert_allclose(dataset.next_observations, after, atol=1e-3)


@pytest.mark.parametrize(
    "buffer, starts", [(10**6, [0, 200, 400, 450, 650, 850]), (600, [0, 50, 250, 300, 350, 550])]
)
def test_the_replay_as_a_data_set(tmp_path, buffer, starts):
    """Also where the ring has turned. Time-outs end episodes and are no terminations."""
    flags = (
        f"{SMALL} --env Pendulum-v1 --num-envs 2 --total-timesteps 900 --learning-starts 880 --save-freq 400"
    )
    save = (
        f"--buffer-size {buffer} --save-dataset {tmp_path}/replay.hdf5 --output-dir {tmp_path} --run-name r"
    )
    done = run(sac, flags, save, "--eval-episodes 0")
    dataset = load_dataset(tmp_path / "replay.hdf5")
    assert len(dataset.actions) == min(buffer, 900) and f"{min(buffer, 900)} steps written to" in done.out
    assert dataset.episode_starts.tolist() == starts and not dataset.terminations.any()
    with h5py.File(tmp_path / "replay.hdf5") as file:  # also for those who read nothing else
        assert (np.flatnonzero(file["timeouts"]) + 1).tolist() == [*starts[1:], min(buffer, 900)]
    assert dataset.env_id == "Pendulum-v1"
    assert_pendulum(dataset)
    assert (tmp_path / "r/checkpoint.pt").stat().st_size < 200_000  # not the million rows of the buffer
    flags = f"{OFFLINE} --dataset {tmp_path}/replay.hdf5 --output-dir {tmp_path}"
    run(td3_bc, SMALL, flags, "--run-name bc")
    assert results(tmp_path / "bc")["gradient_steps"] == 60
    run(td3_bc, SMALL, flags, "--eval-episodes 0 --run-name blind")  # the world says what actions mean
    seen, blind = (load_checkpoint(tmp_path / name)["agent"] for name in ("bc", "blind"))
    assert all(torch.equal(seen[name], blind[name]) for name in seen)


def test_steps_of_the_policy_as_a_data_set(tmp_path, trained_sac):
    flags = f"{SMALL} --env Pendulum-v1 --output-dir {tmp_path} --save-dataset {tmp_path}/policy.hdf5"
    run(sac, flags, f"--evaluate --checkpoint {trained_sac} --collect 2055 --run-name a")
    assert results(tmp_path / "a")["final"] == results(trained_sac)["final"]
    dataset = load_dataset(tmp_path / "policy.hdf5")
    assert len(dataset.actions) == 2055
    starts = sorted([*range(0, 2055, 206), *range(200, 2055, 206)])
    assert dataset.episode_starts.tolist() == [start for start in starts if start < 2055]
    envs = make_envs(sac.Args(env="Pendulum-v1", seed=3), "train", 10)
    for seen in (envs.reset()["proprio"].copy(), envs.reset(np.arange(10))["proprio"]):
        # episodes neither of training nor of evaluation
        assert not np.isin(seen[:, 0], dataset.observations[dataset.episode_starts, 0]).any()
    assert_pendulum(dataset)
    agent = sac.Agent(3, 1, sac.Args(width=16, depth=1))
    agent.load_state_dict(load_checkpoint(trained_sac)["agent"])
    with torch.no_grad():
        mean, log_std = agent.policy(torch.from_numpy(dataset.observations))
    z = (torch.from_numpy(dataset.actions / 2).clamp(-1 + 1e-6, 1 - 1e-6).atanh() - mean) / log_std.exp()
    inside = z[np.abs(dataset.actions) < 1.99]  # sampled, as in training
    assert abs(z.median().item()) < 0.1 and 0.8 < inside.std() < 1.1
    run(sac, flags, f"--evaluate --checkpoint {trained_sac} --collect 250 --append --run-name c")
    both = load_dataset(tmp_path / "policy.hdf5")
    for name in ("observations", "actions", "rewards", "next_observations", "terminations"):
        assert np.array_equal(getattr(both, name)[:2055], getattr(dataset, name)), name
    assert_pendulum(both)
    assert both.episode_starts.tolist() == [*dataset.episode_starts, *range(2055, 2305, 25)]
    with h5py.File(tmp_path / "policy.hdf5") as file:
        assert (np.flatnonzero(file["timeouts"]) + 1).tolist() == [*both.episode_starts[1:], 2305]
    run(sac, flags, f"--checkpoint {trained_sac} --collect 30 --total-timesteps 20 --run-name b")
    assert len(load_dataset(tmp_path / "policy.hdf5").actions) == 30  # at the end of a training


@pytest.mark.parametrize("env, length", [("Aim-v0", 4), ("AimCut-v0", 3)])
def test_terminations_and_time_outs_in_a_data_set(tmp_path, env, length):
    flags = f"{SMALL} --env {env} --total-timesteps 24 --learning-starts 99 --eval-episodes 0"
    run(sac, flags, f"--save-dataset {tmp_path}/x.hdf5 --output-dir {tmp_path} --run-name r")
    dataset = load_dataset(tmp_path / "x.hdf5")
    assert dataset.episode_starts.tolist() == list(range(0, 24, length))
    ends = (np.arange(24) % length == length - 1) & (env == "Aim-v0")
    assert dataset.terminations.tolist() == ends.tolist()
    with h5py.File(tmp_path / "x.hdf5") as file:
        cuts = (np.arange(24) % length == length - 1) & (env == "AimCut-v0")
        assert np.array_equal(file["timeouts"], cuts) and np.array_equal(file["terminals"], ends)
    found = scalars(tmp_path / "r")
    assert found["rollout/mean_length"][-1] == (24, length)
    assert found["rollout/mean_reward"][-1][1] == pytest.approx(dataset.rewards.sum() * length / 24, rel=1e-5)


def test_actions_whose_bounds_are_not_symmetric(tmp_path):
    """-1 to 4: in the file as they are, and for the scripts that read it from -1 to 1 again."""
    flags = f"{SMALL} --env Lopsided-v0 --total-timesteps 24 --learning-starts 99 --eval-episodes 0"
    run(sac, flags, f"--save-dataset {tmp_path}/x.hdf5 --output-dir {tmp_path} --run-name r")
    dataset, action = load_dataset(tmp_path / "x.hdf5"), load_checkpoint(tmp_path / "r")["replay"][:, 0, 2]
    np.testing.assert_allclose(dataset.actions[:, 0], 1.5 + 2.5 * action, atol=1e-6)
    envs = make_envs(sac.Args(env="Lopsided-v0"), "eval", 1)
    bounds, raw, of_pieces = (
        envs.action_bounds,
        iql.Args(normalize_rewards=False),
        decision_transformer.Args(),
    )
    for rest in (
        transition_tensors(dataset, bounds, raw, "cpu")[2],
        decision_transformer.episode_tensors(dataset, bounds, of_pieces, "cpu")[1],
    ):
        np.testing.assert_allclose(rest[:, 0], action, atol=1e-6)


# --- learning


LEARNING = """--width 64 --batch-size 64 --learning-rate 3e-3 --critic-learning-rate 3e-3 --gamma 0.5
    --tau 0.02 --eval-episodes 40 --eval-freq 0 --seed 1 --device cpu"""


def learn(script, home, name, flags, data="aim"):
    flags = f"{LEARNING} {flags} --output-dir {home} --run-name {name}"
    run(script, flags, "" if script is sac else f"--dataset {home}/{data}.hdf5")
    return results(home / name)["final"]["mean_reward"]


@pytest.mark.parametrize(
    "script, flags",
    [
        (sac, "--env Aim-v0 --total-timesteps 1000 --learning-starts 200"),
        (iql, "--total-timesteps 500 --temperature 10 --no-normalize-rewards"),
        (cql, "--total-timesteps 300 --cql-alpha 0.5 --cql-samples 4 --depth 2 --critic-depth 2"),
        (td3_bc, "--total-timesteps 600"),
    ],
)
def test_learning_what_the_data_do_not_show(home, script, flags):
    """The behaviour's return is -2.7, its imitation's 1.6, the best 4."""
    assert learn(script, home, f"learned_{script.__name__}", flags) > 3.2


def test_cql_stays_where_there_are_data(home):
    """The best actions and few others: a penalty of the other sign makes unknown ones look better."""
    write_aim(home / "narrow.hdf5", gain=0.4, noise=0.3)
    flags = "--total-timesteps 200 --cql-alpha 5 --cql-samples 4 --depth 2 --critic-depth 2"
    assert learn(cql, home, "narrow", flags, "narrow") > 3.2


@pytest.mark.parametrize(
    "script, flags", [(td3_bc, "--alpha 0 --policy-delay 1"), (iql, "--temperature 0 --no-normalize-rewards")]
)
def test_behaviour_cloning_is_a_case_of_both(home, script, flags):
    name = f"cloned_{script.__name__}"
    assert 1.0 < learn(script, home, name, f"{flags} --total-timesteps 500") < 2.2
    agent, x = script.Agent(2, 1, script.Args(width=64)), torch.linspace(-0.8, 0.8, 9)
    agent.load_state_dict(load_checkpoint(home / name)["agent"])
    with torch.no_grad():
        found = agent.act({"proprio": torch.stack([10 + 3 * x, torch.zeros(9)], 1)}, None)[0][:, 0, 0]
    assert np.abs(found + 0.2 * x.numpy()).mean() < 0.06


def test_cql_asks_its_critics_in_pieces(tmp_path, home, monkeypatch):
    """On a CPU at most 1024 rows at once; the penalty gets all of them, in order and at the batch's obs."""
    forward, penalty, asked, got = cql.TwinCritic.forward, cql.cql_penalty, [], []

    def spy(critic, obs, action):
        q = forward(critic, obs, action)
        if q.requires_grad:
            asked.append((obs, action, q))
        return q

    def final(*args):
        got.extend(args)
        return penalty(*args)

    monkeypatch.setattr(cql.TwinCritic, "forward", spy)
    monkeypatch.setattr(cql, "cql_penalty", final)
    flags = f"{SMALL} --eval-episodes 0 --output-dir {tmp_path} --dataset {home}/pendulum.hdf5 --width 64"
    run(cql, flags, "--env Pendulum-v1 --total-timesteps 1 --batch-size 90 --cql-samples 10")
    (obs, _, _), *pieces = asked  # the policy's loss comes first
    assert [len(x) for x, _, _ in pieces] == [1024, 1024, 31 * 90 - 2048]
    everywhere, actions, q = (
        torch.cat(x, dim) for x, dim in zip(zip(*pieces, strict=True), (0, 0, 1), strict=True)
    )
    assert torch.equal(everywhere, obs.repeat(31, 1)) and len(actions.unique()) > 2000
    assert torch.equal(torch.cat([got[0], got[1].flatten(1)], 1), q)


# --- compiled and in half precision


@pytest.fixture
def bfloat16(monkeypatch):
    """No CPU is told that it has none."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def test_half_precision(tmp_path, whole, bfloat16):
    script, flags, folder = whole
    run(script, flags, f"--eval-episodes 0 --output-dir {tmp_path} --run-name r --bf16")
    a, b = (load_checkpoint(path)["agent"] for path in (folder, tmp_path / "r"))
    assert not torch.equal(a["critic.weights.0"], b["critic.weights.0"])
    assert (a["critic.weights.0"] - b["critic.weights.0"]).abs().max() < 0.05


def compare_compiled(tmp_path, home, script, extra=""):
    flags = f"{SMALL} --eval-episodes 0 --output-dir {tmp_path} --env Pendulum-v1 --learning-rate 1e-3 "
    flags += "--total-timesteps 23 --learning-starts 20" if script is sac else "--total-timesteps 3"
    flags += "" if script is sac else f" --dataset {home}/pendulum.hdf5"
    for name in ("eager", "compile"):
        run(script, flags, extra, f"--run-name {name}", "--compile" if name == "compile" else "")
    a, b = (load_checkpoint(tmp_path / name)["agent"] for name in ("eager", "compile"))
    for key, x in a.items():
        torch.testing.assert_close(x, b[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "script, flags, count",
    [
        (sac, "", 1), (sac, "--alpha 0.2", 1), (iql, "", 1), (cql, "--bc-steps 1", 2), (td3_bc, "", 2),
        (cql, "--target-gap 1 --max-backup --min-penalty -9 --bf16", 1),
    ],
)  # fmt: skip
def test_an_update_is_traced_whole(tmp_path, home, graphs, bfloat16, script, flags, count):
    """One graph for each of its variants, with the numbers of the update that is not traced."""
    compare_compiled(tmp_path, home, script, flags)
    assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_compiled_updates_are_the_same(tmp_path, home, script):
    compare_compiled(tmp_path, home, script)


@pytest.mark.slow
@pytest.mark.parametrize("script", (iql, cql), ids=lambda script: script.__name__)
def test_a_compiled_run_goes_on_bit_identically(tmp_path, home, script, monkeypatch):
    flags = f"{SMALL} --eval-episodes 0 --output-dir {tmp_path} --env Pendulum-v1 --compile --save-freq 2"
    flags += f" --dataset {home}/pendulum.hdf5 --total-timesteps 6"
    run(script, flags, "--run-name whole")
    function, calls = script.sample_batch, []

    def patched(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("a power cut")
        return function(*args)

    monkeypatch.setattr(script, "sample_batch", patched)
    with pytest.raises(RuntimeError, match="a power cut"):
        call(script, flags, "--run-name stopped")
    monkeypatch.undo()
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


# --- wrong inputs


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (sac, "--env CartPole-v1", "needs states and continuous actions"),
        (sac, "--env Nowhere-v1", "unknown environment 'Nowhere-v1'"),
        (sac, "--alpha -1", "--alpha must be auto or a positive number"),
        (sac, "--buffer-size 1 --num-envs 2", "must hold a step of all 2 envs"),
        (sac, "--collect 10", "--collect needs --save-dataset"),
        (sac, "--append", "--append needs --save-dataset"),
        (sac, "--append --save-dataset NAMELESS", "steps of Pendulum-v1 need a file of their own"),
        (sac, "--evaluate --checkpoint WEIGHTS --save-dataset y", "add --collect and a number of steps"),
        (sac, "--utd-ratio -1", "--utd-ratio must not be negative"),
        (sac, "--checkpoint DATA", "is truncated or no checkpoint"),
        (iql, "--dataset nowhere.hdf5", "nowhere.hdf5 is not a file"),
        (iql, "--expectile 1.5", "--expectile must be in [0, 1]"),
        (iql, "--env Hopper-v5", "has 3 observations and 1 actions, Hopper-v5 11 and 3"),
        (iql, "--dataset NAMELESS", "names no environment; give --env, or --eval-episodes 0"),
        (
            iql,
            "--dataset NAMELESS --eval-episodes 0",
            "nearly equal returns alone; use --no-normalize-rewards",
        ),
        (td3_bc, "--dataset WIDE --eval-episodes 0", "has actions outside [-1, 1]; give --env"),
        (cql, "--cql-samples 0", "--cql-samples must be positive"),
        (cql, "--alpha 0", "--alpha must be auto or a positive number"),
        (cql, "--evaluate", "--evaluate needs --checkpoint"),
        (td3_bc, "--alpha nan", "--alpha must be a finite number, not nan."),
        (td3_bc, "--alpha -1", "--alpha must not be negative, not -1.0."),
        (sac, "--alpha inf", "--alpha must be a finite number, not inf."),
        (iql, "--reward-bias nan", "--reward-bias must be a finite number, not nan."),
        (cql, "--target-gap inf", "--target-gap must be a finite number, not inf."),
        (cql, "--batch-size 0", "--batch-size must be positive, not 0."),
        (td3_bc, "--gamma 2", "--gamma must be in [0, 1], not 2.0."),
        (iql, "--seed -1", "--seed must be in [0, 2**63), not -1."),
        (td3_bc, "--policy-delay 0", "--policy-delay must be positive"),
        (td3_bc, "--device cuda", "PyTorch finds no CUDA GPU"),
        (td3_bc, "--checkpoint WEIGHTS", "The checkpoint's weights do not fit this run: "),
        (td3_bc, "--resume WEIGHTS", "was written by sac.py; resume it with that script."),
        (iql, "--checkpoint POLICY", "was written by ppo_vla.py, whose networks are none of iql.py's."),
        (iql, "--resume POLICY", "was written by ppo_vla.py, whose networks are none of iql.py's."),
        (
            sac,
            "--checkpoint WEIGHTS --width 8",
            "--width 8 is not what the checkpoint has: 16 is part of it; drop the flag.",
        ),
        (sac, "--checkpoint WEIGHTS --depth 2", "--depth 2 is not what the checkpoint has: 1 is part of it"),
    ],
)
def test_wrong_input_ends_in_one_sentence(home, tmp_path, trained_sac, script, flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    inputs = {"DATA": home / "pendulum.hdf5", "WEIGHTS": trained_sac, "POLICY": tmp_path / "policy.pt"}
    policy = {"agent": {}, "backbone": {}, "args": {"backbone": "tiny", "width": 16}, "processes": []}
    save_checkpoint(inputs["POLICY"], "ppo_vla", policy)
    for name, largest in (("NAMELESS", 1), ("WIDE", 2)):
        inputs[name] = tmp_path / f"{name}.hdf5"
        if name in flags:
            one = np.ones((2, 1))
            save_d4rl(inputs[name], one, largest * one, one, one, one, 0 * one)
    for name, path in inputs.items():
        flags = flags.replace(name, str(path))
    base = f"{SMALL} " + (SAC if script is sac else f"{OFFLINE} --dataset {home}/pendulum.hdf5")
    base += f" --output-dir {tmp_path}/runs"
    done = call(script, *([] if "--resume" in flags else [base]), flags)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done
    assert done.err.startswith("error: ") and not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_the_run(home, tmp_path):
    flags = f"{SMALL} --output-dir {tmp_path} --eval-episodes 0"
    for script, more, words in (
        (iql, f"{OFFLINE} --dataset {home}/pendulum.hdf5 --save-freq 99", "update 25: a number is not "),
        (sac, f"{SAC} --learning-rate 1e38 --save-freq 999", "step 302: "),
    ):
        name = script.__name__
        done = call(script, flags, more, f"--critic-learning-rate 1e38 --run-name {name}")
        assert done.code == 2 and done.err.startswith(f"error: {words}"), done
        assert "is not finite" in done.err and done.err.count("\n") == 1
        assert f"{tmp_path}/{name}/checkpoint.pt is the last good state" in done.err
        assert position(tmp_path / name) == 0


def test_what_a_checkpoint_fixes_needs_no_flag(home, tmp_path, whole):
    """Widths and depths; seed and size of a batch are each run's own."""
    script, _, source = whole
    flags = f"--device cpu --eval-episodes 0 --total-timesteps 1 --checkpoint {source}/best.pt"
    flags += " --env Pendulum-v1" if script is sac else f" --dataset {home}/pendulum.hdf5"
    run(script, flags, f"--output-dir {tmp_path} --run-name r")
    before, after = load_checkpoint(source)["args"], load_checkpoint(tmp_path / "r")["args"]
    assert (before["width"], before["depth"]) == (after["width"], after["depth"]) == (16, 1)
    assert before["seed"] == 3 and after["seed"] == 1 and after["batch_size"] == 256
    if script is cql:
        assert before["critic_depth"] == after["critic_depth"]


def test_defaults_are_those_of_the_published_numbers():
    common = dict(batch_size=256, gamma=0.99, tau=0.005, total_timesteps=1_000_000, width=256)
    td3 = dict(learning_rate=3e-4, critic_learning_rate=3e-4, depth=2, alpha=2.5, policy_noise=0.2)
    for script, wanted in {
        iql: dict(expectile=0.7, temperature=3.0, max_weight=100.0, learning_rate=3e-4, depth=2, dropout=0.0),
        td3_bc: td3 | dict(noise_clip=0.5, policy_delay=2, normalize=True),
        cql: dict(cql_samples=10, alpha="auto", target_gap=None, depth=3, critic_depth=3, bc_steps=0),
        sac: dict(learning_rate=3e-4, critic_learning_rate=1e-3, alpha="auto", buffer_size=10**6, depth=2),
    }.items():
        for name, value in (common | wanted).items():
            assert getattr(script.Args(), name) == value, (script, name)
    antmaze = dict(eval_episodes=100, eval_freq=100_000)
    iql_antmaze = dict(expectile=0.9, temperature=10.0, normalize_rewards=False, reward_bias=-1.0)
    cql_antmaze = dict(target_gap=0.8, min_penalty=-200.0, max_backup=True, critic_depth=5, normalize=False)
    assert iql.PRESETS["antmaze"] == antmaze | iql_antmaze
    assert cql.PRESETS["antmaze"] == antmaze | cql_antmaze | dict(reward_scale=10.0, reward_bias=-5.0)
    assert td3_bc.PRESETS["antmaze"] == antmaze | dict(reward_bias=-1.0)
    human = dict(temperature=0.5, dropout=0.1, normalize_rewards=False)
    assert all(iql.PRESETS[task] == human for task in ("kitchen", "pen", "door", "hammer", "relocate"))


def test_presets_go_by_the_name_of_the_data():
    for script, dataset, name, value in (
        (iql, "antmaze-umaze-v2", "temperature", 10.0),
        (iql, "D4RL/door/human-v2", "dropout", 0.1),
        (iql, "door/hopper-mine.hdf5", "dropout", 0.0),
        (cql, "antmaze/medium-play-v1", "target_gap", 0.8),
        (td3_bc, "antmaze-umaze-v2", "reward_bias", -1.0),
        (td3_bc, "antmaze/hopper.hdf5", "reward_bias", 0.0),
        (iql, f"/x/{Path(D4RL_FILES['antmaze-umaze-v2']).name}", "temperature", 10.0),
        (td3_bc, Path(D4RL_FILES["antmaze-umaze-v0"]).name, "reward_bias", -1.0),
    ):
        args, _ = read_flags(["--dataset", dataset], script.Args, script.PRESETS, script.__name__)
        assert getattr(args, name) == value, (script, dataset)
        args, _ = read_flags(
            ["--dataset", dataset, f"--{name}".replace("_", "-"), "0.25"],
            script.Args, script.PRESETS, script.__name__,
        )  # fmt: skip
        assert getattr(args, name) == 0.25  # the command line is stronger


# --- worlds that break their word

BROKEN = f"""{SMALL} --env Endless-v0 --max-episode-steps 110 --num-envs 2 --total-timesteps 400 --eval-freq 0
    --learning-starts 100 --save-freq 100 --buffer-size 401"""


@pytest.mark.parametrize("what", ["reward", "proprio"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_never_comes_into_the_replay(tmp_path, monkeypatch, what, number):
    obs, reward = np.zeros(2, np.float32), 0.0
    spoiled = (obs, number) if what == "reward" else (np.float32([0, number]), reward)
    monkeypatch.setattr(Endless, "spoiled", spoiled)
    done = call(sac, BROKEN, f"--output-dir {tmp_path} --run-name r")
    named = "a reward" if what == "reward" else "'proprio'"
    said = f"error: environment 'Endless-v0' gave {named} that is NaN or infinite at step 20 of an episode; "
    assert done.code == 2 and done.err.startswith(said) and done.err.count("\n") == 1, done
    saved = load_checkpoint(tmp_path / "r")
    assert saved["counters"][0] == 200 and len(saved["replay"]) == 100 and saved["replay"].isfinite().all()
    assert all(x.isfinite().all() for x in saved["agent"].values())
    monkeypatch.setattr(Endless, "spoiled", None)
    run(sac, f"--resume {tmp_path}/r")
    assert load_checkpoint(tmp_path / "r")["replay"].isfinite().all()
    assert results(tmp_path / "r")["final"]["mean_length"] == 110
    run(sac, f"--evaluate --checkpoint {tmp_path}/r --output-dir {tmp_path} --run-name e {SMALL}")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "r")["final"]  # cut as the run's


def test_an_episode_that_is_cut_goes_on_bit_identically(tmp_path, monkeypatch):
    """The steps of an episode that is running at the save count."""
    flags = f"{SMALL} {SAC} --max-episode-steps 70 --output-dir {tmp_path}"
    run(sac, flags, "--run-name whole")
    stopped_by(monkeypatch, replay, "step_envs", 180)
    assert call(sac, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    done = call(sac, f"--resume {tmp_path}/stopped --max-episode-steps 80")
    assert done.code == 2 and "drop --max-episode-steps, or" in done.err
    run(sac, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    saved = load_checkpoint(tmp_path / "whole")
    terminated, truncated = saved["replay"][:, 0, 5], saved["replay"][:, 0, 6]
    assert not terminated.any() and truncated.nonzero().flatten().tolist() == [9, 69, 139]  # a ring of 200


def test_offline_policies_are_evaluated_in_a_world_with_its_own_flags(tmp_path, home):
    flags = f"{SMALL} {OFFLINE} --dataset {home}/aim.hdf5 --output-dir {tmp_path}"
    done = call(iql, flags, "--max-episode-steps 9")
    assert done.code == 2 and "--max-episode-steps" in done.err  # of no world that is named
    run(iql, flags, "--env Endless-v0 --max-episode-steps 9 --run-name r")
    assert results(tmp_path / "r")["final"]["mean_length"] == 9
    run(iql, f"--resume {tmp_path}/r")
    run(iql, f"--evaluate --checkpoint {tmp_path}/r --output-dir {tmp_path} --run-name e {SMALL}")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "r")["final"]
    run(iql, flags, "--run-name own")  # in the data set's own world
    assert results(tmp_path / "own")["final"]["mean_length"] == 4
