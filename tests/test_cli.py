"""Both scripts through their command lines: results, resume after any end, variants, and wrong inputs."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import imageio_ffmpeg
import mujoco
import numpy as np
import pytest
import torch
from conftest import in_workers, live_workers
from gymnasium.envs.classic_control import CartPoleEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bc_warmup
import common.run
import ppo_vla
from common.checkpoint import load_checkpoint, save_checkpoint
from common.datasets import save_demonstrations
from common.envs import tabletop
from common.envs.vector import Envs

ROOT = Path(ppo_vla.__file__).parent
EVAL = "--eval-episodes 5 --eval-envs 3 --reward shaped --device cpu --num-workers 0 --seed 3"
BC = f"""{EVAL} --num-demos 6 --grounding-scenes 40 --grounding-steps 3 --gradient-steps 6 --batch-size 16
    --warmup-steps 2 --learning-rate 1e-3 --chunk 5 --save-freq 100 --eval-freq 0 --temperature 1.6"""
FROM_FILE = BC.replace("--grounding-scenes 40 --grounding-steps 3", "")  # beside --demos
PPO = f"""{EVAL} --num-envs 4 --num-steps 2 --total-timesteps 120 --chunk 5 --update-epochs 2
    --minibatch-size 5 --micro-batch-size 3 --critic-warmup 1 --eval-freq 2 --save-freq 1 --learning-rate 1e-3
    --value-learning-rate 1e-3 --temperature 1.6 --ratio-level step --value-coef 0.5
    --entropy-coef 0 --kl-coef 0 --policy-warmup 0"""
CARTPOLE = """--env CartPole-v1 --num-envs 4 --num-steps 16 --total-timesteps 800 --minibatch-size 24
    --micro-batch-size 24 --update-epochs 2 --eval-episodes 5 --eval-envs 3 --eval-freq 3 --save-freq 1
    --seed 3 --device cpu --num-workers 0"""
EVALUATION = ["initial", "final", "best"]
COUNTS = ["environment_steps", "gradient_steps", "wall_seconds"]
CONTRACT = [*EVALUATION, *COUNTS, "args", "versions", "hardware"]
SCALARS = """policy/approx_kl policy/clip_fraction policy/entropy loss/policy loss/value loss/total
    optim/grad_norm optim/learning_rate value/explained_variance rollout/mean_reward rollout/mean_length
    eval/mean_reward eval/mean_length time/env_steps_per_second time/samples_per_second"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As OMP_NUM_THREADS=1 of the subprocesses, so that both compare bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(*flags):
    """Strings are split at spaces; a list is taken as it stands."""
    return [word for flag in flags for word in (flag if isinstance(flag, list) else str(flag).split())]


def call(script, *flags):
    """A script in this process -> exit code, standard output and error."""
    argv, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{script.__name__}.py", *words(*flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            parallel = script.__name__ in ("ppo_vla", "grpo_vla")
            common.run.main(script.train, script.Args, script.PRESETS, parallel=parallel)
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def run(script, *flags):
    """As `call`, for what must succeed."""
    done = call(script, *flags)
    assert (done.code, done.err) == (0, ""), done
    return done


def command(script, *flags):
    return [sys.executable, str(ROOT / f"{script.__name__}.py"), *words(*flags)]


def shell(script, *flags, cwd):
    """The command line itself -> the finished process."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(script, *flags), cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def flat(value, name=""):
    """Any nesting of dicts, lists and tensors as {path: leaf}."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, item in pairs for path, leaf in flat(item, f"{name}/{key}").items()}


def assert_same_run(folder, other):
    """The same results and the same last checkpoint, bit by bit, but for clocks and the arguments."""
    a, b = results(folder), results(other)
    for key in (*EVALUATION, "environment_steps", "gradient_steps"):
        assert a[key] == b[key], key
    a, b = flat(load_checkpoint(folder)), flat(load_checkpoint(other))
    assert a.keys() == b.keys() and any("optimizer" in key for key in a)
    for key, value in a.items():
        # nothing draws from Python's and numpy's global generators, and nothing seeds them
        quiet = ("/rng/global_python" in key, "/rng/global_numpy" in key)
        if key.startswith("/args/") or any(quiet) or key == "/seconds":
            continue
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def check_evaluation(evaluation, episodes, has_success):
    keys = {"episodes", "mean_reward", "mean_length"} | ({"per_task"} if has_success else set())
    keys |= {"success_rate", "success_rate_ci95"} if has_success else set()
    assert set(evaluation) == keys and evaluation["episodes"] == episodes
    if has_success:
        assert sum(each["episodes"] for each in evaluation["per_task"].values()) == episodes
        assert all(set(each) == keys - {"per_task"} for each in evaluation["per_task"].values())
        low, high = evaluation["success_rate_ci95"]
        assert 0 <= low <= evaluation["success_rate"] <= high <= 1


def scalars(folder):
    """TensorBoard's {name: [(step, value), ...]}"""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def frames(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    size = next(reader)["size"]
    return size, sum(1 for _ in reader)


# --- from the warm-up to the evaluation, and what a run leaves behind


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def warmup(home):
    done = shell(
        bc_warmup, BC, "--run-name warmup --eval-freq 3 --gradient-steps 20 --num-workers 2", cwd=home
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.strip().splitlines()[-1].startswith("success 0.")
    return home / "runs/warmup"


@pytest.fixture(scope="module")
def trained(home, warmup):
    """PPO from the warm-up with LoRA, which is what the big models run."""
    flags = f"--checkpoint {warmup}/checkpoint.pt --lora-rank 4 --run-name ppo --capture-video"
    done = shell(ppo_vla, PPO, flags, "--total-timesteps 280 --num-workers 2", cwd=home)
    assert (done.returncode, done.stderr) == (0, ""), done
    last = done.stdout.strip().splitlines()[-1]
    found = results(home / "runs/ppo")
    assert f"{found['initial']['success_rate']:.3f} -> {found['final']['success_rate']:.3f}" in last
    return home / "runs/ppo"


def test_results_and_files_of_a_run(warmup, trained):
    for folder, script in ((warmup, "bc_warmup"), (trained, "ppo_vla")):
        found = results(folder)
        assert sorted(found) == sorted(CONTRACT)
        for key in EVALUATION:
            check_evaluation(found[key], 5, True)
        assert found["best"]["success_rate"] >= max(found[k]["success_rate"] for k in ("initial", "final"))
        assert found["wall_seconds"] > 0 and found["gradient_steps"] > 0
        assert found["args"]["run_name"] == folder.name and found["args"]["seed"] == 3
        assert {"python", "torch", "mujoco"} <= set(found["versions"]) and "cpu" in found["hardware"]
        assert json.loads((folder / "args.json").read_text()) == found["args"]
        for name in ("checkpoint.pt", "best.pt"):
            assert load_checkpoint(folder / name)["script"] == script
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert results(warmup)["environment_steps"] == 0 and results(warmup)["gradient_steps"] == 23
    assert results(trained)["environment_steps"] >= 280
    initial, before = results(trained)["initial"], results(warmup)["final"]
    assert initial == before  # PPO starts from exactly what the warm-up ended with


def test_tensorboard_has_the_contracts_names(warmup, trained):
    found = scalars(trained)
    assert {*SCALARS.split(), "rollout/success_rate", "eval/success_rate"} <= set(found)
    steps = [step for step, _ in found["loss/policy"]]
    assert steps == sorted(steps) and steps[-1] == results(trained)["environment_steps"]  # x axis: env steps
    assert found["eval/success_rate"][0][0] == 0
    total = [p[1] + 0.5 * v[1] for p, v in zip(found["loss/policy"], found["loss/value"], strict=True)]
    total = np.subtract([value for _, value in found["loss/total"]], total)[1:]  # after the critic's warm-up
    np.testing.assert_allclose(total, 0, atol=1e-5)
    found = scalars(warmup)
    wanted = "loss/policy loss/grounding loss/total optim/learning_rate optim/grad_norm eval/success_rate"
    assert set(wanted.split()) <= set(found)


def test_ratio_is_one_on_the_first_minibatch(trained):
    """Temperature 1.6, adapters that have trained, float32, chunks that their episode's end cut off."""
    errors = [value for _, value in scalars(trained)["policy/first_ratio_error"]]
    assert len(errors) > 2 and max(errors) < 1e-5


def test_lora_trains_the_adapters_alone(warmup, trained):
    before, after = load_checkpoint(warmup)["agent"], load_checkpoint(trained)["agent"]
    renamed = {key.replace(".base_layer", ""): value for key, value in after.items() if ".lora_" not in key}
    assert all(torch.equal(renamed[key], value) for key, value in before.items())
    assert {key.split(".")[0] for key in renamed.keys() - before.keys()} == {"value_head"}
    assert sum(".lora_B." in key and value.any().item() for key, value in after.items()) > 4


def test_videos(home, trained):
    videos = sorted((trained / "videos").iterdir())
    assert [video.name for video in videos] == [f"episode_{i}.mp4" for i in range(3)]  # as --eval-envs
    size, count = frames(videos[0])
    assert size[0] == 384 and size[1] > 192 and count > 10
    flags = f"--evaluate --checkpoint {trained} --capture-video --output-dir {home}/videos"
    done = run(ppo_vla, EVAL, flags)
    assert "evaluated" in done.out and len(list((home / "videos").glob("*/videos/*.mp4"))) == 3


@pytest.mark.parametrize("through", [call, shell])
def test_evaluation_of_the_saved_file_is_the_runs_final_one(home, trained, through):
    """What the checkpoint fixes (here --chunk) needs no flag."""
    flags = f"--evaluate --checkpoint {trained}/checkpoint.pt"
    where = home / through.__name__
    arguments = (EVAL, flags, f"--output-dir {where} --run-name again")
    done = through(ppo_vla, *arguments, **({"cwd": home} if through is shell else {}))
    assert (done.returncode if through is shell else done.code) == 0, done
    found = results(where / "again")
    assert sorted(found) == ["args", "final", "hardware", "versions"]
    assert found["final"] == results(trained)["final"]
    assert sorted(path.name for path in (where / "again").iterdir()) == ["args.json", "results.json"]


def test_sampled_evaluation_repeats_itself_and_differs_from_the_greedy_one(tmp_path, trained):
    """Without --temperature at the one of the training, which was not the default."""
    flags = f"--evaluate --no-deterministic --checkpoint {trained} --output-dir {tmp_path}"
    for name, temperature in (("a", ""), ("b", "--temperature 1.6"), ("c", "--temperature 0.1")):
        run(ppo_vla, EVAL, flags, f"--run-name {name}", temperature)
    a, b, c = (results(tmp_path / name)["final"] for name in "abc")
    assert a == b != c and a != results(trained)["final"]


def test_evaluation_of_a_warmup_and_of_its_best(tmp_path, warmup):
    for script in (bc_warmup, ppo_vla):
        name = script.__name__
        flags = f"--evaluate --checkpoint {warmup} --output-dir {tmp_path} --run-name {name}"
        run(script, EVAL, flags)
        assert results(tmp_path / name)["final"] == results(warmup)["final"]
    flags = f"--evaluate --checkpoint {warmup}/best.pt --output-dir {tmp_path} --run-name best"
    run(ppo_vla, EVAL, flags)
    assert results(tmp_path / "best")["final"] == results(warmup)["best"]


def test_best_holds_the_weights_alone(warmup, trained):
    for folder in (warmup, trained):
        best, last = load_checkpoint(folder / "best.pt"), load_checkpoint(folder)
        assert best.keys() == {"format", "script", "version", "args", "agent", "backbone"}
        assert best["agent"].keys() == last["agent"].keys() and best["backbone"] == last["backbone"]
        assert last.keys() > best.keys() | {"optimizer", "processes", "initial", "best", "seconds"}


def test_imitation_goes_on_from_a_policy_that_ppo_trained(tmp_path, trained):
    """Its value head is left behind, its adapters go on."""
    flags = f"--checkpoint {trained} --output-dir {tmp_path} --run-name r"
    run(bc_warmup, BC, flags)
    assert results(tmp_path / "r")["initial"] == results(trained)["final"]
    before, after = load_checkpoint(trained)["agent"], load_checkpoint(tmp_path / "r")["agent"]
    assert after.keys() == {key for key in before if not key.startswith("value_head.")}
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed and all(".lora_" in key for key in changed)


def test_one_seed_gives_one_run(tmp_path, warmup):
    for name, flags in (("a", "--num-workers 0"), ("b", "--num-workers 2"), ("c", "--seed 4")):
        base = f"--total-timesteps 40 --critic-warmup 0 --output-dir {tmp_path} --run-name {name}"
        run(ppo_vla, PPO, base, f"--checkpoint {warmup}", flags)
    assert_same_run(tmp_path / "a", tmp_path / "b")  # whatever the number of workers
    a, c = (load_checkpoint(tmp_path / name)["agent"] for name in "ac")
    assert not torch.equal(a["backbone.action_slots"], c["backbone.action_slots"])


# --- variants


def test_a_random_start_does_not_crash(tmp_path):
    run(ppo_vla, PPO, f"--output-dir {tmp_path} --run-name r --total-timesteps 40")
    check_evaluation(results(tmp_path / "r")["final"], 5, True)
    agent = load_checkpoint(tmp_path / "r")["agent"]
    assert all(torch.isfinite(value).all() for value in agent.values())


def test_the_default_name_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ppo_vla, CARTPOLE, "--total-timesteps 60")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("CartPole-v1__ppo_vla__3__")
    found = results(folder)
    assert sorted(found) == sorted(CONTRACT)
    check_evaluation(found["final"], 5, False)
    names = set(scalars(folder))
    assert set(SCALARS.split()) <= names and not {"rollout/success_rate", "eval/success_rate"} & names


def test_gaussian_head_from_warmup_to_ppo(tmp_path):
    base = f"--output-dir {tmp_path}"
    run(bc_warmup, BC, base, "--head gaussian --init-std 0.3 --run-name bc")
    run(ppo_vla, PPO, base, f"--checkpoint {tmp_path}/bc --run-name ppo --kl-coef 0.1 --entropy-coef 0.01")
    assert results(tmp_path / "ppo")["initial"] == results(tmp_path / "bc")["final"]
    before, after = (load_checkpoint(tmp_path / name)["agent"] for name in ("bc", "ppo"))
    assert not torch.equal(before["head.log_std"], after["head.log_std"])
    made = results(tmp_path / "ppo")["args"]
    assert (made["head"], made["init_std"]) == ("gaussian", 0.3)  # what the checkpoint fixes
    assert max(value for _, value in scalars(tmp_path / "ppo")["policy/first_ratio_error"]) < 1e-5
    run(ppo_vla, EVAL, base, f"--evaluate --checkpoint {tmp_path}/ppo --run-name again")
    assert results(tmp_path / "again")["final"] == results(tmp_path / "ppo")["final"]


def test_action_history_from_warmup_to_ppo(tmp_path):
    base = f"--output-dir {tmp_path}"
    run(bc_warmup, BC, base, "--action-history 2 --run-name bc")
    run(ppo_vla, PPO, base, f"--checkpoint {tmp_path}/bc --run-name ppo")
    assert results(tmp_path / "ppo")["initial"] == results(tmp_path / "bc")["final"]
    assert load_checkpoint(tmp_path / "ppo")["backbone"]["proprio_dim"] == 8 + 2 * 7
    assert results(tmp_path / "ppo")["args"]["action_history"] == 2
    done = call(ppo_vla, PPO, base, f"--action-history 0 --checkpoint {tmp_path}/bc --run-name without")
    assert done.code == 2 and "--action-history 0 is not what the checkpoint has: 2 is part of" in done.err


def test_a_lora_warmup_goes_on_as_lora(tmp_path):
    """Without --lora-rank the adapters of the checkpoint are trained on, and the run's own files say so."""
    base = f"--output-dir {tmp_path}"
    run(bc_warmup, BC, base, "--lora-rank 2 --run-name bc")
    run(ppo_vla, PPO, base, f"--lora-rank 0 --checkpoint {tmp_path}/bc --run-name ppo --kl-coef 0.1")
    assert results(tmp_path / "ppo")["initial"] == results(tmp_path / "bc")["final"]
    assert results(tmp_path / "ppo")["args"]["lora_rank"] == 2
    before, after = (load_checkpoint(tmp_path / name)["agent"] for name in ("bc", "ppo"))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed and all(".lora_" in key for key in changed)
    run(ppo_vla, EVAL, base, f"--evaluate --checkpoint {tmp_path}/ppo --run-name again")
    assert results(tmp_path / "again")["final"] == results(tmp_path / "ppo")["final"]
    done = call(ppo_vla, PPO, base, f"--lora-rank 3 --checkpoint {tmp_path}/bc --run-name rank")
    assert done.code == 2 and "rank 2; use --lora-rank 2 or 0" in done.err


def test_both_cameras_and_some_tasks(tmp_path):
    base = f"--cameras agentview wrist --tasks lift put --output-dir {tmp_path}"
    run(bc_warmup, BC, base, "--run-name bc")
    run(bc_warmup, BC, base, f"--checkpoint {tmp_path}/bc --run-name more")
    assert results(tmp_path / "more")["initial"] == results(tmp_path / "bc")["final"]
    run(ppo_vla, PPO, base, f"--checkpoint {tmp_path}/more --run-name ppo")
    found = results(tmp_path / "ppo")
    assert found["initial"] == results(tmp_path / "more")["final"]
    assert all(name.startswith(("lift", "put")) for name in found["final"]["per_task"])


@pytest.mark.parametrize("split", ["vision", "semantics", "execution"])
def test_evaluation_of_held_out_splits(tmp_path, warmup, split):
    flags = f"--evaluate --checkpoint {warmup} --eval-split {split}"
    run(ppo_vla, EVAL, flags, f"--output-dir {tmp_path} --run-name r")
    found = results(tmp_path / "r")["final"]
    check_evaluation(found, 5, True)
    assert found["mean_reward"] != results(warmup)["final"]["mean_reward"]


def test_pendulum_has_a_gaussian_head_by_its_preset(tmp_path):
    flags = "--num-envs 2 --num-steps 8 --total-timesteps 40 --eval-episodes 2 --eval-envs 2 --device cpu"
    run(ppo_vla, "--env Pendulum-v1", flags, f"--output-dir {tmp_path} --run-name r")
    found = results(tmp_path / "r")
    assert found["args"]["head"] == "gaussian" and found["args"]["backbone"] == "mlp"
    assert found["final"]["mean_reward"] < 0 and found["final"]["mean_length"] == 200


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "no answer for 2 s")]
)
def test_a_worker_that_dies_or_hangs_does_not_end_the_run(tmp_path, warmup, monkeypatch, number, reason):
    gae, calls = ppo_vla.compute_gae, []

    def murderous(*args):
        calls.append(1)
        if len(calls) == 2:
            for child in live_workers():
                os.kill(child.pid, number)
        return gae(*args)

    monkeypatch.setattr(ppo_vla, "compute_gae", murderous)
    flags = f"--checkpoint {warmup} --num-workers 2 --output-dir {tmp_path} --run-name r --worker-timeout 2"
    with pytest.warns(RuntimeWarning, match=f"was restarted.*episodes lost so far.*{reason}"):
        done = call(ppo_vla, PPO, flags)
    assert done.code == 0
    check_evaluation(results(tmp_path / "r")["final"], 5, True)  # the evaluation is complete nonetheless
    lost = [value for _, value in scalars(tmp_path / "r")["rollout/lost_episodes"]]
    assert lost[0] == 0 and lost[-1] == 4


def test_a_signal_while_a_worker_hangs_still_saves(tmp_path, warmup, monkeypatch):
    gae, calls = ppo_vla.compute_gae, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            for child in live_workers():
                os.kill(child.pid, signal.SIGSTOP)
            # while the next step is waited for
            threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return gae(*args)

    monkeypatch.setattr(ppo_vla, "compute_gae", stop)
    flags = f"--checkpoint {warmup} --num-workers 2 --output-dir {tmp_path} --run-name r --worker-timeout 5"
    with pytest.warns(RuntimeWarning, match="no answer for 5 s"):
        done = call(ppo_vla, PPO, flags, "--save-freq 99 --eval-freq 0 --total-timesteps 240")
    assert done.code == 128 + signal.SIGTERM and "go on with" in done.out
    saved = load_checkpoint(tmp_path / "r")
    assert saved["counters"][1] >= 2 and saved["processes"][0]["state"]["envs"]["lost_episodes"] == 4
    run(ppo_vla, f"--resume {tmp_path}/r --worker-timeout 30 --num-workers 1")


@pytest.mark.parametrize("flags", ["", "--lora-rank 2 --detach-value"])
def test_micro_batches_give_the_same_update(tmp_path, warmup, flags):
    """One iteration, chunks partly masked (max 48 steps), in micro-batches of 1, 3 and all at once."""
    weights = []
    for micro in (1, 3, 64):
        base = f"--output-dir {tmp_path} --run-name {micro} --micro-batch-size {micro} --entropy-coef 0.01"
        run(ppo_vla, PPO, f"--checkpoint {warmup} --total-timesteps 1 --critic-warmup 0", base, flags)
        weights.append(load_checkpoint(tmp_path / str(micro))["agent"])
    start = load_checkpoint(warmup)["agent"]
    moved = 0.0
    for key, value in weights[-1].items():
        if value.is_floating_point():
            moved = max(moved, (value - start[key]).abs().max().item() if key in start else 0.0)
            for other in weights[:-1]:
                torch.testing.assert_close(other[key], value, rtol=0, atol=2e-5, msg=key)
    assert flags or moved > 5e-4  # each weight by about the learning rate and step


@pytest.mark.parametrize("detach", ["--detach-value", "--no-detach-value"])
def test_critic_warmup_trains_the_value_head_alone(tmp_path, warmup, detach):
    flags = (
        f"--checkpoint {warmup} --critic-warmup 99 --total-timesteps 60 --output-dir {tmp_path} --run-name r"
    )
    run(ppo_vla, PPO, flags, detach)
    before, after = load_checkpoint(warmup)["agent"], load_checkpoint(tmp_path / "r")["agent"]
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert any(after[key].any() for key in after if key == "value_head.3.weight")


def test_target_kl_ends_the_update(tmp_path):
    for name, kl in (("all", "10"), ("few", "1e-9")):
        run(
            ppo_vla,
            CARTPOLE,
            f"--total-timesteps 200 --target-kl {kl} --output-dir {tmp_path} --run-name {name}",
        )
    every, few = (results(tmp_path / name)["gradient_steps"] for name in ("all", "few"))
    assert 0 < few < every and every % 6 == 0  # 2 epochs of 3 minibatches


def test_demonstrations_from_a_file(tmp_path):
    made = tabletop.demonstrations(3, seed=0, num_workers=0)
    edges = [*made["episode_starts"], len(made["task"])]
    episodes = [
        {key: made[key][a:b] for key in ("image", "proprio", "actions")}
        | {"instruction": made["instructions"][made["task"][a]]}
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    save_demonstrations(tmp_path / "demos.hdf5", episodes, ("agentview_rgb",))
    run(
        bc_warmup,
        FROM_FILE,
        f"--demos {tmp_path}/demos.hdf5 --action-history 1 --output-dir {tmp_path} --run-name r",
    )
    assert results(tmp_path / "r")["gradient_steps"] == 6  # no grounding: nobody knows the pixels


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, warmup, monkeypatch
):
    calls = {"soft_cross_entropy": 0, "value_loss": 0}

    def poison(script, name, at):
        healthy = getattr(script, name)

        def loss(*args):
            calls[name] += 1
            return healthy(*args) * (float("nan") if calls[name] > at else 1)

        monkeypatch.setattr(script, name, loss)

    poison(bc_warmup, "soft_cross_entropy", 3)
    done = call(bc_warmup, BC, f"--save-freq 1 --output-dir {tmp_path} --run-name bc")
    assert done.code == 2 and re.fullmatch("error: step 6: .*not finite.*nan.*last good state.*\n", done.err)
    poison(ppo_vla, "value_loss", 9)
    done = call(ppo_vla, PPO, f"--checkpoint {warmup} --output-dir {tmp_path} --run-name ppo")
    wanted = "error: iteration 2: .*not finite.*nan.*returns .* to .*last good state.*\n"
    assert done.code == 2 and re.fullmatch(wanted, done.err)
    for name in ("bc", "ppo"):
        agent = load_checkpoint(tmp_path / name)["agent"]
        assert all(torch.isfinite(value).all() for value in agent.values())


# --- stop and go on


RESUMED = {
    "CartPole-v1": f"{CARTPOLE} --total-timesteps 2400",
    "tabletop": f"{PPO} --total-timesteps 400 --action-history 1 --entropy-coef 0.01",
}


@pytest.fixture(scope="module")
def whole(home):
    """Uninterrupted runs, each made once."""
    made = {}

    def make(name, script, *flags):
        if name not in made:
            run(script, *flags, f"--output-dir {home}/whole --run-name {name}")
            made[name] = home / "whole" / name
        return made[name]

    return make


def saves(path, count, process):
    """Waits until `path` was written `count` times."""
    seen, limit = set(), time.monotonic() + 200
    while len(seen) < count:
        assert process.poll() is None and time.monotonic() < limit, "it ended before it could be stopped"
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("env", ["tabletop", pytest.param("CartPole-v1", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_identically(tmp_path, whole, env, number):
    wanted = whole(env, ppo_vla, RESUMED[env])
    rng = random.Random(f"{env} {number}")
    flags = f"--output-dir {tmp_path} --run-name stopped"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(ppo_vla, RESUMED[env], flags),
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            saves(tmp_path / "stopped/checkpoint.pt", rng.randint(2, 4), process)
            time.sleep(rng.uniform(0, 0.02))
        finally:
            process.send_signal(number)
            process.wait(60)
    said = (tmp_path / "log").read_text()
    if number == signal.SIGTERM:
        go_on = rf"stopped at \d+ env_steps; go on with: python \S*ppo_vla.py --resume {tmp_path}/stopped\n"
        assert process.returncode == 128 + number and re.search(go_on, said), said
    else:
        assert process.returncode == -number
    assert not (tmp_path / "stopped/results.json").exists()
    step = load_checkpoint(tmp_path / "stopped")["counters"][0]
    assert step < results(wanted)["environment_steps"]
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", wanted)


def test_the_policys_learning_rate_rises_after_the_critics_warm_up(tmp_path):
    flags = f"--output-dir {tmp_path} --run-name r --critic-warmup 2 --policy-warmup 4 --no-anneal-lr"
    run(ppo_vla, CARTPOLE, flags, "--learning-rate 1e-3 --eval-freq 0 --total-timesteps 500")
    rates = [value for _, value in scalars(tmp_path / "r")["optim/learning_rate"]]
    wanted = [0.0, 0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]
    assert rates[: len(wanted)] == pytest.approx(wanted)


def stopped_by(monkeypatch, script, name, at):
    """A signal arrives during the `at`-th call of `script.name`."""
    function, calls = getattr(script, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(script, name, patched)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-rank 2 --kl-coef 0.1",  # the reference is the model without its adapters
        "--kl-coef 0.1 --no-detach-value",  # the reference is a copy
        "--checkpoint LORA --kl-coef 0.1",  # adapters from the warm-up: a copy as well
        pytest.param(
            "--train-vision --ratio-level token --huber-delta 0.5 --no-anneal-lr", marks=pytest.mark.slow
        ),
        pytest.param(
            "--head gaussian --lora-rank 2 --kl-coef 0.1 --ratio-level chunk", marks=pytest.mark.slow
        ),
        "--head flow --flow-noise learned --kl-coef 0.1",
    ],
)
def test_every_variant_goes_on_bit_identically(tmp_path, home, whole, monkeypatch, flags):
    if "LORA" in flags:
        flags = flags.replace("LORA", str(whole("lora", bc_warmup, BC, "--lora-rank 2")))
    run(ppo_vla, PPO, flags, f"--output-dir {tmp_path} --run-name whole")
    assert results(tmp_path / "whole")["gradient_steps"] > 8
    stopped_by(monkeypatch, ppo_vla, "compute_gae", 2)
    done = call(ppo_vla, PPO, flags, f"--output-dir {tmp_path} --run-name stopped --save-freq 1000")
    assert done.code == 128 + signal.SIGINT and "stopped at" in done.out and not done.err
    assert 0 < load_checkpoint(tmp_path / "stopped")["counters"][1] < 4
    monkeypatch.undo()
    if "checkpoint" in flags:  # resuming needs the run's own folder alone
        shutil.rmtree(flags.split()[1])
    assert call(ppo_vla, f"--resume {tmp_path}/stopped/checkpoint.pt").code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(
    ("env", "flags", "at"),
    [
        ("CartPole-v1", "", 2),
        pytest.param("CartPole-v1", "", 11, marks=pytest.mark.slow),
        ("tabletop", "--kl-coef 0.1 --curriculum --exploration-end 0.5", 2),
        ("tabletop", "--train-vision --num-workers 2", 11),
    ],
)
def test_a_run_stopped_amid_a_rollout_goes_on_bit_identically(tmp_path, whole, monkeypatch, env, flags, at):
    """The signal comes while the environments make their `at`-th step of the training."""
    base, script = f"{RESUMED[env]} {flags} --num-steps 5 --output-dir {tmp_path}", ppo_vla
    wanted = whole(f"{env}-{len(flags)}", script, RESUMED[env], flags, "--num-steps 5")
    step, calls = Envs.step, []

    def patched(self, *args, **kwargs):
        calls.extend([1] if self.autoreset else [])
        if self.autoreset and len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Envs, "step", patched)
    done = call(script, base, "--run-name stopped --save-freq 1000")
    assert (done.code, done.err) == (128 + signal.SIGTERM, ""), done
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / "stopped")
    rollout, num_steps, _ = saved["processes"][0]["state"]["rollout"]
    assert len(rollout) == at % 5 and saved["counters"][1] == at // 5 and num_steps > 0
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", wanted)
    check_schedules(wanted, script, "--curriculum" in flags)


def check_schedules(folder, script, scheduled):
    """A finished run has drawn its tasks by what is teachable, and has what --exploration-end 0.5 leaves."""
    saved = load_checkpoint(folder)
    own = saved["processes"][0]["state"]
    weights = np.asarray(own["envs"]["task_weights"])
    recent = saved.get("recent", own.get("recent"))
    left = saved["agent"]["head.exploration"]  # GRPO's last iteration may have had no update
    assert (0.5 <= left < 0.6 if scheduled else left == 1) and len(recent) > 5
    wanted = script.teachable(recent, weights.shape[1]) if scheduled else np.zeros(weights.shape[1])
    assert (weights == wanted).all()


# in the grounding stage, in the imitation, whose default on tabletop varies colours and words
@pytest.mark.parametrize(("at", "flags"), [(2, "--image-aug 0"), (6, "")])
def test_a_stopped_warmup_goes_on_bit_identically(tmp_path, whole, monkeypatch, at, flags):
    wanted = whole(f"bc{at}", bc_warmup, BC, "--eval-freq 2", flags)
    stopped_by(monkeypatch, bc_warmup, "learning_rate_at", at)
    done = call(bc_warmup, BC, flags, f"--eval-freq 2 --output-dir {tmp_path} --run-name stopped")
    assert (
        done.code == 128 + signal.SIGINT
        and f"stopped at {at} gradient_steps; go on with: python bc_warmup.py" in done.out
    )
    monkeypatch.undo()
    run(bc_warmup, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", wanted)


def test_varied_colours_and_blank_words_are_what_is_learned_from(whole):
    """From the first step on, whose rows are the same; copies without a blank are what they are copies of."""
    plain, copied, blank, coloured = (
        scalars(whole(f"bc{at}", bc_warmup, BC, "--eval-freq 2", flags))["loss/grounding"][0][1]
        for at, flags in (
            (0, "--image-aug 0 --word-dropout 0"),
            (1, "--image-aug 0 --word-dropout 1e-9"),
            (2, "--image-aug 0"),
            (6, ""),
        )
    )
    assert plain == copied and len({plain, blank, coloured}) == 3


def test_resuming_a_finished_run_changes_nothing(tmp_path, whole):
    wanted = whole("CartPole-v1", ppo_vla, RESUMED["CartPole-v1"])
    shutil.copytree(wanted, tmp_path / "copy")
    run(ppo_vla, f"--resume {tmp_path}/copy")
    assert_same_run(tmp_path / "copy", wanted)


def test_resume_takes_repeated_flags_and_refuses_changed_ones(tmp_path, whole):
    """Also a flag set to its default, where the run had another value."""
    folder = tmp_path / "copy"
    shutil.copytree(whole("CartPole-v1", ppo_vla, RESUMED["CartPole-v1"]), folder)
    (folder / "results.json").unlink()
    default = ppo_vla.Args()
    for flags, named in (
        ("--gamma 0.5", "--gamma"),
        (f"--seed {default.seed} --eval-episodes 6", "--seed, --eval-episodes"),
        ("--env tabletop", "--env"),
        ("--evaluate", "--evaluate"),
    ):
        done = call(ppo_vla, f"--resume {folder}", flags)
        assert done.code == 2 and f"drop {named}, or" in done.err, done
    assert not (folder / "results.json").exists()
    flags = "--env CartPole-v1 --num-steps 16 --seed 3 --num-workers 1 --worker-timeout 30"
    done = call(ppo_vla, f"--resume {folder}", flags, f"--run-name CartPole-v1 --output-dir {folder.parent}")
    assert done.code == 2 and "--output-dir" in done.err  # it was another one
    run(ppo_vla, f"--resume {folder}", flags)
    assert results(folder)["args"]["seed"] == 3


# --- wrong inputs


@pytest.fixture(scope="module")
def bad(home, warmup, trained):
    """Files that are wrong in some way, by name."""
    folder = home / "bad"
    folder.mkdir()
    data = (warmup / "checkpoint.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(data[: len(data) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.ones(3)}, folder / "foreign.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    save_checkpoint(folder / "sac.pt", script="sac", state={"args": {}, "agent": {}})
    state = load_checkpoint(warmup)
    state["agent"]["backbone.extra"] = state["agent"].pop("backbone.action_slots")
    save_checkpoint(folder / "other.pt", script="bc_warmup", state=state)
    state = load_checkpoint(trained)
    state["args"]["an_old_flag"] = 1
    (folder / "old").mkdir()
    save_checkpoint(folder / "old/checkpoint.pt", script="ppo_vla", state=state)
    (folder / "a folder").mkdir()
    run(ppo_vla, CARTPOLE, f"--total-timesteps 60 --output-dir {folder} --run-name cartpole")
    (folder / "garbage.hdf5").write_bytes(b"garbage" * 1000)
    episode = {
        "image": np.zeros((5, 1, 64, 64, 3), np.uint8),
        "proprio": np.zeros((5, 8), np.float32),
        "actions": np.zeros((5, 7), np.float32),
        "instruction": "lift the red cube",
    }

    def write(name, **changes):
        save_demonstrations(folder / name, [episode | changes], ("agentview_rgb",))

    write("good.hdf5")
    good = (folder / "good.hdf5").read_bytes()
    (folder / "truncated.hdf5").write_bytes(good[: len(good) // 2])
    write("size.hdf5", image=np.zeros((5, 1, 84, 84, 3), np.uint8))
    write("instruction.hdf5", instruction="fold the towel")
    write("proprio.hdf5", proprio=np.zeros((5, 9), np.float32))
    with h5py.File(folder / "layout.hdf5", "w") as file:
        file["numbers"] = np.arange(3)
    return folder


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What each begins with: PPO or BC, unless it says another, is put before it.
WRONG_PPO = [
    (
        "CARTPOLE --env NoSuchWorld-v1",
        "unknown environment 'NoSuchWorld-v1': known are tabletop, libero, robosuite, robomimic",
    ),
    ("CARTPOLE --env no_such_module:World-v1", "unknown environment"),
    ("CARTPOLE --env FrozenLake-v1", "not a vector"),
    ("--tasks dance", "Unknown task 'dance'"),
    ("--cameras top", "Unknown cameras"),
    ("--eval-split nowhere", "Unknown split 'nowhere'"),
    ("--backbone huge", "Unknown backbone 'huge'; known: tiny, mlp"),
    ("--backbone mlp", "has no action tokens; use --head gaussian"),
    ("--head discrete", "use --head tokens, gaussian or flow"),
    ("CARTPOLE --backbone tiny", "--backbone mlp"),
    ("CARTPOLE --head tokens", "use --head discrete"),
    ("CARTPOLE --head gaussian", "use --head discrete"),
    ("CARTPOLE --action-history 2", "needs continuous actions"),
    ("--num-envs 0", "--num-envs must be positive, not 0."),
    ("--eval-envs 0", "--eval-envs must be positive"),
    ("--eval-episodes 0", "--eval-episodes must be positive"),
    ("--num-steps 0", "--num-steps must be positive"),
    ("--total-timesteps 0", "--total-timesteps must be positive"),
    ("--update-epochs 0", "--update-epochs must be positive"),
    ("--minibatch-size 0", "--minibatch-size must be positive"),
    ("--micro-batch-size -1", "--micro-batch-size must be positive"),
    ("--save-freq 0", "--save-freq must be positive"),
    ("--chunk 0", "--chunk must be positive"),
    ("--temperature 0", "--temperature must be positive"),
    ("--temperature nan", "--temperature must be a finite number, not nan."),
    ("--learning-rate -1", "--learning-rate must not be negative"),
    ("--learning-rate inf", "--learning-rate must be a finite number, not inf."),
    ("--entropy-coef nan", "--entropy-coef must be a finite number"),
    ("--lora-rank -1", "--lora-rank must not be negative"),
    ("--lora-alpha 8", "--lora-alpha does nothing without --lora-rank; drop it"),
    ("--dual-clip 1", "--dual-clip must be above 1, or 0 for none, not 1.0"),
    ("--action-history -1", "--action-history must not be negative"),
    ("--kl-coef -1", "--kl-coef must not be negative"),
    ("--clip-low -0.1", "--clip-low must be in [0, 1]"),
    ("--clip-low 1.5", "--clip-low must be in [0, 1]"),
    ("--clip-high -0.1", "--clip-high must not be negative"),
    ("--huber-delta -1", "--huber-delta must not be negative"),
    ("--value-clip -1", "--value-clip must not be negative"),
    ("--target-kl -1", "--target-kl must be positive"),
    ("--max-grad-norm 0", "--max-grad-norm must be positive"),
    ("--gamma 1.5", "--gamma must be in [0, 1], not 1.5."),
    ("--gae-lambda -1", "--gae-lambda must be in [0, 1]"),
    ("--seed -1", "--seed must be in"),
    ("--seed 99999999999999999999", "--seed must be in"),
    ("--num-workers -1", "num_workers must be at least 0"),
    ("--num-workers 0 --worker-timeout 5", "--worker-timeout does nothing with --num-workers 0; drop it"),
    ("--num-workers 1 --worker-timeout -1", "--worker-timeout must not be negative"),
    ("--evaluate", "--evaluate needs --checkpoint"),
    ("--checkpoint BAD/missing.pt", "does not exist"),
    ("--checkpoint BAD/truncated.pt", "is truncated or no checkpoint"),
    ("--checkpoint BAD/empty.pt", "is truncated or no checkpoint"),
    ("--checkpoint BAD/text.pt", "is truncated or no checkpoint"),
    ("--checkpoint BAD/foreign.pt", "was not written by this project"),
    ("--checkpoint BAD/module.pt", "is not loaded since that can run code"),
    ("--checkpoint BAD/sac.pt", "was written by sac.py, whose networks are none of ppo_vla.py's."),
    ("--checkpoint BAD/other.pt", "do not fit this agent (backbone.action_slots"),
    ("--checkpoint BAD", "checkpoint.pt does not exist"),
    (
        "--checkpoint BAD/cartpole",
        "--chunk 5 is not what the checkpoint has: 1 is part of it; drop the flag.",
    ),
    ("EVAL --checkpoint BAD/cartpole", "action_dim is 1, but this run's is 7; set --env as it was"),
    (
        "CARTPOLE --checkpoint WARMUP --head discrete",
        "--head discrete is not what the checkpoint has: tokens is part of it; drop the flag.",
    ),
    ("CARTPOLE --checkpoint WARMUP", "action_dim is 7, but this run's is 1; set --env as it was"),
    (
        "--checkpoint WARMUP --chunk 2",
        "--chunk 2 is not what the checkpoint has: 5 is part of it; drop the flag.",
    ),
    ("--checkpoint WARMUP --action-history 2", "--action-history 2 is not what the checkpoint has: 0 is"),
    ("--checkpoint WARMUP --head gaussian", "--head gaussian is not what the checkpoint has: tokens is"),
    ("--checkpoint WARMUP --backbone mlp", "--backbone mlp is not what the checkpoint has: tiny is"),
    ("--checkpoint WARMUP --cameras agentview wrist", "cameras is 1, but this run's is 2; set --cameras"),
    ("--evaluate --checkpoint WARMUP --chunk 2", "--chunk 2 is not what the checkpoint has: 5 is"),
    ("--output-dir BAD/text.pt/runs", "cannot be written"),
    ("--output-dir BAD --run-name text.pt", "cannot be written"),
    ("--output-dir BAD --run-name cartpole", "already holds a checkpoint; continue it with --resume"),
    ("NONE --resume BAD/missing", "does not exist"),
    (["NONE", "--resume", "BAD/a folder"], "does not exist"),
    ("NONE --resume BAD/truncated.pt", "is truncated or no checkpoint"),
    ("NONE --resume WARMUP", "was written by bc_warmup.py; resume it with that script."),
    ("NONE --resume BAD/sac.pt", "was written by sac.py, whose networks are none of ppo_vla.py's."),
    (
        "NONE --resume PPO/best.pt",
        "best.pt holds weights alone; use --checkpoint, or resume the run's folder.",
    ),
    ("NONE --resume BAD/cartpole --num-envs 5", "drop --num-envs, or use --checkpoint instead"),
    ("NONE --resume BAD/old", "is of another version of this script, which differs in an_old_flag"),
]
WRONG_BC = [
    ("--tasks dance", "Unknown task 'dance'"),
    ("--backbone huge", "Unknown backbone 'huge'"),
    ("--backbone mlp", "sees no images; give a --backbone that does"),
    ("--backbone mlp --head gaussian", "sees no images; give a --backbone that does"),
    ("--num-demos 0", "--num-demos must be positive"),
    ("--gradient-steps 0", "--gradient-steps must be positive"),
    ("--batch-size -3", "--batch-size must be positive"),
    ("--eval-envs 0", "--eval-envs must be positive"),
    ("--lora-rank -1", "--lora-rank must not be negative"),
    ("--demo-noise -1", "--demo-noise must not be negative"),
    ("--grounding-steps -1", "--grounding-steps must not be negative"),
    ("--label-sigma -1", "--label-sigma must not be negative"),
    ("--label-sigma nan", "--label-sigma must be a finite number"),
    ("--learning-rate 0", "--learning-rate must be positive"),
    ("--demo-noise 1000 --num-demos 1", "succeeded in none of 1 episodes"),
    ("--seed -1", "--seed must be in"),
    ("--evaluate", "--evaluate needs --checkpoint"),
    ("--demos BAD/missing.hdf5", "does not exist or is a folder"),
    ("--demos BAD", "garbage.hdf5 is truncated or not HDF5"),
    ("--demos WARMUP", "holds no .hdf5 file"),
    ("--demos BAD/garbage.hdf5", "is truncated or not HDF5"),
    ("--demos BAD/truncated.hdf5", "is truncated or not HDF5"),
    ("--demos BAD/layout.hdf5", "is not in the RoboMimic/LIBERO layout"),
    ("--demos BAD/size.hdf5", "holds images (1, 84, 84, 3); this run's world has (1, 64, 64, 3)"),
    ("--demos BAD/instruction.hdf5", "has the instruction 'fold the towel'"),
    ("--demos BAD/proprio.hdf5", "has a proprio of 9 numbers; this world's has 8"),
    ("--demos BAD/good.hdf5 --cameras wrist", "eye_in_hand"),
    ("--checkpoint BAD/truncated.pt", "is truncated or no checkpoint"),
    ("--checkpoint BAD/sac.pt", "was written by sac.py, whose networks are none of bc_warmup.py's."),
    ("--checkpoint WARMUP --chunk 2", "--chunk 2 is not what the checkpoint has: 5 is part of it"),
    ("--checkpoint WARMUP --action-history 1", "--action-history 1 is not what the checkpoint has: 0 is"),
    ("--output-dir BAD/text.pt/runs", "cannot be written"),
    ("NONE --resume BAD/missing", "does not exist"),
    ("NONE --resume PPO", "was written by ppo_vla.py; resume it with that script."),
    ("NONE --resume WARMUP/best.pt", "holds weights alone"),
    ("NONE --resume WARMUP --num-demos 7", "drop --num-demos, or use --checkpoint instead"),
]


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [(ppo_vla, *case) for case in WRONG_PPO] + [(bc_warmup, *case) for case in WRONG_BC],
)
def test_wrong_input_ends_in_one_sentence(
    bad, warmup, trained, tmp_path, monkeypatch, script, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    bases = {"NONE": "", "CARTPOLE": CARTPOLE, "EVAL": EVAL}
    first, *rest = words(flags)
    imitation = FROM_FILE if "--demos" in flags else BC
    base = bases.get(first, imitation if script is bc_warmup else PPO)
    flags = rest if first in bases else [first, *rest]
    for name, value in {"BAD": bad, "WARMUP": warmup, "PPO": trained}.items():
        flags = [word.replace(name, str(value)) if word.startswith(name) else word for word in flags]
    before = {folder: tree(folder) for folder in (bad, warmup, trained)}
    done = call(script, base, flags)
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert sentence in done.err
    assert before == {folder: tree(folder) for folder in before}  # nothing is lost
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("results.json"))


def test_no_opengl_ends_in_one_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no display\nand no EGL")

    monkeypatch.setattr("mujoco.Renderer", refuse)
    in_workers(monkeypatch, lambda: setattr(mujoco, "Renderer", refuse))
    for workers in (0, 1):
        done = call(ppo_vla, PPO, f"--renderer gl --num-workers {workers} --output-dir {tmp_path}")
        assert done.code == 2 and done.err.count("\n") == 1 and "--renderer ray needs none" in done.err


def test_a_video_without_its_package_ends_in_one_sentence_before_the_training(tmp_path, monkeypatch):
    def refuse(self):
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")

    monkeypatch.setattr(CartPoleEnv, "render", refuse)
    in_workers(monkeypatch, lambda: setattr(CartPoleEnv, "render", refuse))
    for workers in (0, 1):
        flags = f"--capture-video --num-workers {workers} --output-dir {tmp_path} --run-name {workers}"
        done = call(ppo_vla, CARTPOLE, flags)
        assert done.code == 2 and done.err.count("\n") == 1 and "pygame is not installed" in done.err
        assert not list(tmp_path.rglob("*.pt"))


def test_a_missing_package_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for script, flags in ((ppo_vla, PPO), (bc_warmup, BC)):
        done = call(script, flags, f"--track --output-dir {tmp_path}")
        assert done.code == 2 and done.err.count("\n") == 1 and "pip install wandb" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_full_gpu_ends_in_one_sentence(monkeypatch):
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n a total capacity of 8 GiB"

    def train(args, run):
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr(ppo_vla, "train", train)
    done = call(ppo_vla, "--micro-batch-size 64")
    assert done.code == 2 and done.err.startswith("error: CUDA out of memory; see --help"), done
    assert done.err.count("\n") == 1


def test_no_gpu_ends_in_one_sentence(tmp_path):
    for script, flags in ((ppo_vla, PPO), (bc_warmup, BC)):
        done = call(script, flags, f"--device cuda --output-dir {tmp_path}")
        assert done.code == 2 and done.err.count("\n") == 1 and "use --device cpu" in done.err


@pytest.mark.parametrize("flags", ["--head nosuch", "--num-envs many", "--no-such-flag 3", "--device tpu"])
def test_tyros_own_errors_exit_with_2_as_well(flags):
    for script in (ppo_vla, bc_warmup):
        done = call(script, flags)
        assert done.code == 2 and "Traceback" not in done.err + done.out


def test_the_shell_sees_one_line_and_exit_code_2(tmp_path, bad):
    """Without pytest's capture: no warning, no traceback of a worker, no library's chatter."""
    cases = [
        (ppo_vla, f"{PPO} --tasks dance --num-workers 2"),
        (ppo_vla, "--env NoSuchWorld-v1"),
        (bc_warmup, f"{FROM_FILE} --demos {bad}/garbage.hdf5 --num-workers 2"),
    ]
    for script, flags in cases:
        done = shell(script, flags, cwd=tmp_path)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
