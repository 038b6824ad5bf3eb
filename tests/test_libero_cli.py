"""`--env libero` through the command lines, with a small random OpenVLA-OFT checkpoint in the real simulator.

Needs what test_libero.py needs.
"""

import collections
import json

import h5py
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import in_workers
from test_cli import call, results, run, scalars, stopped_by
from test_libero import write_demonstration
from test_openvla import STATISTICS, checkpoints  # noqa: F401 (a fixture)

import bc_warmup
import grpo_vla
import ppo_vla
from common.checkpoint import load_checkpoint
from common.envs import libero

LIBERO = "--env libero --suite libero_object --lora-rank 32 --device cpu --num-workers 0 --eval-freq 0"
EVAL = "--tasks 0 5 --eval-episodes 2 --eval-envs 2"


@pytest.fixture(scope="module")
def base(assets, checkpoints, tmp_path_factory):  # noqa: F811
    """Flags of a checkpoint, of statistics in a file of their own as SimpleVLA-RL's need."""
    file = tmp_path_factory.mktemp("statistics") / "dataset_statistics.json"
    file.write_text(json.dumps({"libero_object_no_noops": STATISTICS}))
    return f"{LIBERO} --checkpoint {checkpoints['oft']} --statistics {file}"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Episodes of 40 steps, and a success made up: a random policy has none, and without any nothing is
    learned."""

    def shorten():
        step = libero.Simulation.step
        libero.Simulation.step = lambda self, action: step(self, action) or action[0] > 0.45
        libero.PROTOCOLS["oft"]["libero_object"] = 40

    monkeypatch.setattr(libero.Simulation, "step", libero.Simulation.step)  # set back after the test
    monkeypatch.setitem(libero.PROTOCOLS["oft"], "libero_object", 220)
    shorten()
    in_workers(monkeypatch, shorten)


def film(path):
    """The frames of a video, uint8 (T, H, W, 3)."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_ppo_trains_stops_resumes_evaluates_two_tasks_and_shows_them(tmp_path, base, monkeypatch):
    flags = f"{base} {EVAL} --num-envs 2 --num-steps 2 --total-timesteps 64 --minibatch-size 4 --save-freq 1"
    with pytest.MonkeyPatch.context() as patch:
        stopped_by(patch, ppo_vla, "clipped_surrogate", 1)
        done = call(ppo_vla, flags, f"--output-dir {tmp_path} --run-name run --critic-warmup 0")
    assert done.code == 130, done
    before = load_checkpoint(tmp_path / "run")
    assert before["counters"][1:3] == [1, 1] and 4 <= before["counters"][0] <= 32  # 2 x 2 chunks of 8 steps
    render, scenes = libero.LiberoEnv.render, collections.defaultdict(list)
    monkeypatch.setattr(
        libero.LiberoEnv, "render", lambda env: scenes[env.task].append(render(env)) or scenes[env.task][-1]
    )
    run(ppo_vla, f"--resume {tmp_path}/run --capture-video")
    found, after = results(tmp_path / "run"), load_checkpoint(tmp_path / "run")
    assert found["environment_steps"] >= 64 and after["counters"][1] >= 2
    final = found["final"]
    assert final["episodes"] == 2 and len(final["per_task"]) == 2 and "success_rate_ci95" in final
    assert 0 < final["mean_length"] <= 40
    moved = [n for n in after["agent"] if not torch.equal(after["agent"][n], before["agent"][n])]
    assert any("lora_B" in name for name in moved) and not any("vision" in name for name in after["agent"])
    assert scalars(tmp_path / "run")["policy/first_ratio_error"][0][1] < 1e-4
    for episode, task in enumerate((0, 5)):
        video, rendered = film(tmp_path / f"run/videos/episode_{episode}.mp4"), np.stack(scenes[task])
        assert len(video) == len(rendered) + 10 and rendered.std((1, 2, 3)).min() > 20
        loss = np.abs(video[: len(rendered), :256, :512] - rendered.astype(int))  # of the compression
        assert loss.mean((1, 2, 3)).max() < 5


@pytest.mark.slow
def test_grpo_trains_one_iteration_on_one_task_in_two_workers(tmp_path, base):
    flags = f"{base} --tasks 5 --eval-episodes 1 --eval-envs 1 --num-envs 2 --group-size 2 --num-groups 1"
    flags += f" --max-steps 16 --total-timesteps 60 --save-freq 1 --output-dir {tmp_path} --run-name run"
    flags += " --accuracy-low 0 --accuracy-high 1 --num-workers 2"
    run(grpo_vla, flags)
    state = load_checkpoint(tmp_path / "run")
    assert state["counters"][2] >= 1 and state["counters"][0] >= 60
    assert any(x.any() for name, x in state["agent"].items() if "lora_B" in name)


def test_imitation_of_liberos_own_files(tmp_path, base):
    env = libero.make(suite="libero_object", tasks=(0,), cameras=("agentview", "wrist"), size=32)
    (tmp_path / "demos").mkdir()
    env.reset(seed=3)
    write_demonstration(tmp_path / "demos" / "soup_demo.hdf5", env, seed=3)
    env.close()
    flags = f"{base} --tasks 0 --eval-episodes 1 --eval-envs 1 --demos {tmp_path}/demos --gradient-steps 4"
    said = run(
        bc_warmup, flags, f"--batch-size 8 --warmup-steps 1 --output-dir {tmp_path} --run-name run"
    ).out
    assert "warning: the pictures of" in said and "are 32 x 32, those of an evaluation 256 x 256" in said
    losses = scalars(tmp_path / "run")["loss/policy"]
    assert len(losses) >= 1 and all(x == x for _, x in losses)
    assert results(tmp_path / "run")["gradient_steps"] == 4


@pytest.mark.slow
def test_rollouts_are_recorded_in_liberos_layout_and_imitated(tmp_path, base, monkeypatch):
    """Training's states, every step's pictures; what was seen is what bc_warmup.py reads."""
    demonstrations, read = bc_warmup.training_demonstrations, []
    monkeypatch.setattr(
        bc_warmup, "training_demonstrations", lambda *x: read.append(demonstrations(*x)) or read[-1]
    )
    seen, observe = [], libero.LiberoEnv.observe
    monkeypatch.setattr(
        libero.LiberoEnv, "observe", lambda env: seen.append((env.split, observe(env))) or seen[-1][1]
    )
    flags = f"{base} --tasks 5 --eval-envs 1 --output-dir {tmp_path}"
    done = run(ppo_vla, flags, f"--collect 1 --save-dataset {tmp_path}/r.hdf5 --run-name c")
    steps, success = len(seen), results(tmp_path / "c")["collected"]["success_rate"]
    assert {split for split, _ in seen} == {"train"} and "1 episodes written" in done.out
    with h5py.File(tmp_path / "r.hdf5") as file:
        demo = file["data/demo_0"]
        assert set(demo["obs"]) == {"agentview_rgb", "ee_pos", "ee_ori", "gripper_states"}
        assert demo.attrs["success"] == success and demo.attrs["num_samples"] in (steps, steps - 1)
        assert demo["rewards"][-1] == success and demo["dones"][-1] == 1
    played = [obs for _, obs in seen[: demo_steps(tmp_path / "r.hdf5")]]
    flags += " --eval-episodes 1 --gradient-steps 2 --batch-size 4 --warmup-steps 1 --run-name b"
    said = run(bc_warmup, flags, f"--demos {tmp_path}/r.hdf5").out
    for key in ("image", "proprio"):
        assert np.array_equal(read[0][key], np.stack([obs[key] for obs in played])), key
    assert "warning: the pictures" not in said  # of the size that is rendered


def demo_steps(path):
    with h5py.File(path) as file:
        return len(file["data/demo_0/actions"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--suite libero_lab", "libero_spatial"),
        ("--tasks 10", "has no task '10'"),
        ("--cameras front", "agentview"),
        ("--head discrete", "--head tokens"),
        ("--statistics no.json", "no.json"),
        ("--family openvla", "openvla-oft"),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, base, flags, said):
    flags = f"{base} --tasks 5 --eval-envs 1 {flags} --output-dir {tmp_path} --run-name bad"
    done = call(ppo_vla, flags)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


@pytest.mark.slow
def test_a_small_policy_from_scripted_demonstrations(assets, tmp_path, monkeypatch):
    """bc_warmup.py makes them, ppo_vla.py goes on from it in small pictures and short episodes."""
    monkeypatch.undo()  # the whole episode, and its own success
    flags = "--env libero --suite libero_object --tasks 0 --cameras wrist --size 32 --device cpu --seed 3"
    flags += f" --eval-episodes 1 --eval-envs 1 --num-workers 0 --output-dir {tmp_path} --minibatch-size 4"
    warmup, ppo = flags.replace("--minibatch-size", "--batch-size"), "--temperature 1 --critic-warmup 0"
    said = run(
        bc_warmup, warmup, "--backbone tiny --horizon 120 --num-demos 1 --gradient-steps 3 --warmup-steps 1",
        "--demo-noise 0.1 --run-name warmup",
    ).out  # fmt: skip
    assert "making 1 demonstrations" in said and "loss/grounding" in scalars(tmp_path / "warmup")
    ppo += " --horizon 24 --num-envs 2 --num-steps 2 --total-timesteps 60 --run-name ppo"
    run(ppo_vla, flags, f"--checkpoint {tmp_path}/warmup", ppo)
    found = results(tmp_path / "ppo")
    assert found["environment_steps"] >= 60 and found["final"]["mean_length"] == 24
    assert found["args"]["horizon"] == 24 and found["args"]["size"] == 32
