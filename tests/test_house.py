"""A world and a model of a user's, each one file and one line of a table, through all that there is."""

import dataclasses

import numpy as np
import pytest
import reach_world
import torch
from cnn_backbone import CNN
from test_cli import call, one_thread, results, run, scalars, stopped_by  # noqa: F401 (one is a fixture)

import bc_warmup
import grpo_vla
import iql
import ppo_vla
import sac
from common.backbones import BACKBONES, build_backbone
from common.checkpoint import load_checkpoint, save_checkpoint
from common.datasets import save_demonstrations
from common.envs import WORLDS
from common.run import read_flags, reserve

SMALL = "--eval-episodes 4 --eval-envs 2 --num-workers 0 --device cpu"
EVAL = f"{SMALL} --seed 3"
BC = f"--env reach {EVAL} --num-demos 6 --gradient-steps 4 --batch-size 8 --warmup-steps 1"
PPO = (
    f"--env reach {EVAL} --num-envs 4 --num-steps 2 --total-timesteps 90 --critic-warmup 0 "
    "--minibatch-size 6 --policy-warmup 0"
)
GRPO = f"--env reach {EVAL} --num-envs 4 --group-size 2 --num-groups 1 --total-timesteps 200 --accuracy-low 0"
GRPO += " --accuracy-high 1"


@pytest.fixture(autouse=True, scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "reach", "reach_world")
        patch.setitem(BACKBONES, "cnn", "cnn_backbone")
        yield


@pytest.fixture(scope="module")
def warmup(tmp_path_factory):
    home = tmp_path_factory.mktemp("house")
    run(bc_warmup, BC, f"--backbone cnn --channels 8 --chunk 2 --output-dir {home} --run-name warmup")
    return home / "warmup"


@pytest.mark.parametrize("script", [ppo_vla, grpo_vla])
def test_a_new_world_and_a_new_model_train_stop_resume_and_are_evaluated(
    tmp_path, monkeypatch, warmup, script
):
    flags = f"{PPO if script is ppo_vla else GRPO} --checkpoint {warmup} --speed 0.3 --output-dir {tmp_path}"
    run(script, flags, "--run-name whole --capture-video")
    assert list((tmp_path / "whole/videos").glob("*.mp4"))
    assert scalars(tmp_path / "whole")["policy/first_ratio_error"][0][1] < 1e-5
    stopped_by(monkeypatch, script, "clipped_surrogate", 2)
    assert call(script, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(script, f"--resume {tmp_path}/stopped")
    whole, stopped = (load_checkpoint(tmp_path / name)["agent"] for name in ("whole", "stopped"))
    assert all(torch.equal(x, stopped[name]) for name, x in whole.items())
    assert results(tmp_path / "whole")["args"]["channels"] == 8  # as the checkpoint has it
    run(script, f"--evaluate --checkpoint {tmp_path}/whole --output-dir {tmp_path} --run-name e {SMALL}")
    found = results(tmp_path / "e")  # in the run's own world, with its flags
    assert found["final"] == results(tmp_path / "whole")["final"] and found["args"]["speed"] == 0.3


def test_the_tiny_backbone_sees_a_new_world(tmp_path):
    base = f"--action-history 2 --head gaussian --output-dir {tmp_path}"
    run(bc_warmup, BC, base, "--run-name bc")
    run(ppo_vla, PPO, f"--checkpoint {tmp_path}/bc --output-dir {tmp_path} --run-name ppo")
    assert load_checkpoint(tmp_path / "ppo")["backbone"]["proprio_dim"] == 2 + 2 * 2


def write_file(path, width=2):
    made = reach_world.demonstrations(2, 1)
    edges = [*made["episode_starts"], len(made["task"])]
    episodes = [
        {"image": made["image"][a:b], "proprio": made["proprio"][a:b]}
        | {"actions": np.resize(made["actions"][a:b], (b - a, width))}
        | {"instruction": made["instructions"][made["task"][a]]}
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    save_demonstrations(path, episodes, ("overview",), width)


def test_demonstrations_of_another_width_come_from_a_file(tmp_path, monkeypatch):
    write_file(tmp_path / "demos.hdf5")
    write_file(tmp_path / "wide.hdf5", 3)
    base = f"--output-dir {tmp_path} --demos {tmp_path}"
    done = call(bc_warmup, BC, f"{base}/demos.hdf5")
    assert done.code == 2 and "reach names no DEMO_KEYS" in done.err
    monkeypatch.setattr(reach_world, "DEMO_KEYS", {"overview": "overview"}, raising=False)
    run(bc_warmup, BC, f"{base}/demos.hdf5 --run-name r")
    done = call(bc_warmup, BC, f"{base}/wide.hdf5")
    assert done.code == 2 and "it needs (T, 2)" in done.err and done.err.count("\n") == 1


def test_a_user_error_of_the_world_is_one_sentence(tmp_path, monkeypatch, warmup):
    base = f"--output-dir {tmp_path} --run-name r"
    for script, flags, said in (
        (sac, f"--env reach {base}", "needs states and continuous actions"),
        (iql, f"--env reach --dataset none {base}", "none is not a file"),
        (ppo_vla, f"{PPO} --speed -1 {base}", "--speed must be positive"),
        (ppo_vla, f"{PPO} --checkpoint {warmup} --channels 16 {base}", "8 is part of it"),
        (
            ppo_vla,
            f"--env CartPole-v1 --backbone cnn --chunk 1 {base}",
            "has no pictures for the backbone 'cnn'",
        ),
        (bc_warmup, f"--env CartPole-v1 --backbone mlp --head discrete {base}", "needs --demos"),
    ):
        done = call(script, flags)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
    monkeypatch.delattr(reach_world, "demonstrations")
    done = call(bc_warmup, BC, base)
    assert done.code == 2 and "needs --demos" in done.err
    monkeypatch.delattr(CNN, "action_logits")
    done = call(bc_warmup, BC, base, "--backbone cnn")
    assert done.code == 2 and "no action tokens; use --head gaussian" in done.err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("active_dims", np.ones(3, bool), r"active_dims must be bool (2,)"),
        ("instructions", [1, 2, 3], "instructions must be a list of texts"),
    ],
)
def test_a_world_that_breaks_the_contract_is_told_so(tmp_path, monkeypatch, name, value, said):
    monkeypatch.setattr(reach_world.ReachEnv, name, value)
    done = call(ppo_vla, PPO, f"--output-dir {tmp_path}")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("image", dict(shape=(32, 32, 3), dtype=np.uint8), "'image' must be uint8 (cameras, H, W, 3)"),
        ("image", dict(shape=(1, 32, 32, 3), dtype=np.float32), "'image' must be uint8 (cameras, H, W, 3)"),
        ("proprio", dict(shape=(2,), dtype=np.float64), "'proprio', float32 (P,)"),
        ("task", None, "need 'task' too"),
    ],
)
def test_a_world_with_other_observations_is_told_so(tmp_path, monkeypatch, key, change, said):
    import gymnasium

    begin = reach_world.ReachEnv.__init__

    def changed(self, **kwargs):
        begin(self, **kwargs)
        spaces = dict(self.observation_space.spaces)
        spaces.pop(key)
        if change:
            spaces[key] = gymnasium.spaces.Box(0, 1, **change)
        self.observation_space = gymnasium.spaces.Dict(spaces)

    monkeypatch.setattr(reach_world.ReachEnv, "__init__", changed)
    done = call(ppo_vla, PPO, f"--output-dir {tmp_path}")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


def test_a_head_that_a_script_does_not_know_is_refused(tmp_path, warmup):
    """As of a checkpoint by a changed sister, which was trained with a head of its own."""
    state = load_checkpoint(warmup)
    state["args"]["head"] = "laplace"
    save_checkpoint(tmp_path / "checkpoint.pt", "bc_warmup", state)
    for script, flags in ((ppo_vla, "--checkpoint"), (grpo_vla, "--checkpoint"), (bc_warmup, "--resume")):
        done = call(script, f"{flags} {tmp_path}")
        assert done.code == 2 and "has --head laplace, which is unknown here; known: tokens" in done.err, done
        assert done.err.count("\n") == 1


def test_a_flag_that_two_parts_have_is_refused(monkeypatch):
    @dataclasses.dataclass
    class Args(reach_world.Args):
        max_steps: int = 24

    monkeypatch.setattr(reach_world, "Args", Args)
    done = call(grpo_vla, "--env reach")
    assert done.code == 2 and "have a flag --max-steps; rename it in one" in done.err
    assert done.err.count("\n") == 1


def test_marks_are_read_from_annotations_that_are_texts(monkeypatch):
    """As with `from __future__ import annotations`."""
    space = {"dataclass": dataclasses.dataclass, "__name__": reach_world.__name__}
    exec("from common.flags import Positive\n@dataclass\nclass Args:\n    speed: 'Positive' = 1.0", space)
    monkeypatch.setattr(reach_world, "Args", space["Args"])
    done = call(ppo_vla, "--env reach --speed 0")
    assert done.code == 2 and "--speed must be positive" in done.err


def test_names_of_the_scripts_own_columns_are_refused(tmp_path, monkeypatch, warmup):
    assert reserve({"ids": 1}, {"mask": 2}) == {"mask": 2}
    preprocess = CNN.preprocess
    both = lambda *args: (b := preprocess(*args)) | {"mask": b["ids"] > 0}  # noqa: E731
    monkeypatch.setattr(CNN, "preprocess", both)
    for script, flags in ((ppo_vla, PPO), (grpo_vla, GRPO)):
        done = call(script, f"{flags} --checkpoint {warmup} --output-dir {tmp_path}")
        assert done.code == 2 and "preprocess gives mask, which is a script's own; rename it" in done.err


def test_the_tables_are_in_the_help():
    for flags in ("", "--env reach", "--backbone cnn"):
        text = " ".join(call(ppo_vla, f"{flags} --help").out.replace("│", " ").split())
        assert "tabletop, libero" in text and "tiny, mlp, openvla" in text
    assert "(default: cnn)" in text and "--channels" in text
    args = read_flags(["--env", "reach"], ppo_vla.Args, ppo_vla.PRESETS, "ppo_vla")[0]
    assert args.speed == 0.15 and args.backbone == "tiny"


def test_flags_that_do_not_exist_here_point_to_the_right_help():
    done = call(ppo_vla, "--env reach --tasks red")
    assert done.code == 2 and "--tasks" in done.err and "ppo_vla.py --env reach --help" in done.err


# --- flags that did nothing


def test_adapters_that_cannot_reach_the_eye_refuse_to_train_it(tmp_path):
    done = call(ppo_vla, f"{PPO} --lora-rank 2 --train-vision --output-dir {tmp_path}")
    assert done.code == 2 and "leave its eye as it is; drop --train-vision" in done.err, done


def test_a_critic_of_its_own_is_trained_also_where_the_value_is_detached(tmp_path):
    """Of the mlp: nothing but the value reaches that trunk."""
    flags = (
        f"--env CartPole-v1 {EVAL} --num-envs 2 --num-steps 8 --total-timesteps 40 --output-dir {tmp_path}"
    )
    run(ppo_vla, flags, "--detach-value --critic-warmup 0 --run-name r --save-freq 1")
    after = load_checkpoint(tmp_path / "r")["agent"]["backbone.critic.2.weight"]
    torch.manual_seed(3)  # as the run did before it built its backbone, first of all
    fresh = build_backbone("mlp", chunk=1, action_dim=1, proprio_dim=4).critic[2].weight
    kept = run(ppo_vla, flags, "--critic-warmup 0 --run-name still --learning-rate 0 --value-learning-rate 0")
    still = load_checkpoint(tmp_path / "still")["agent"]["backbone.critic.2.weight"]
    assert torch.equal(still, fresh) and not torch.equal(after, fresh), kept


def test_a_policy_from_random_weights_is_told_what_stays_random(tmp_path, warmup):
    said = "starts at random weights, and its eye stays so"
    assert said in run(ppo_vla, f"{PPO} --output-dir {tmp_path} --run-name a").out
    assert said not in run(ppo_vla, f"{PPO} --train-vision --output-dir {tmp_path} --run-name b").out
    assert said not in run(ppo_vla, f"{PPO} --checkpoint {warmup} --output-dir {tmp_path} --run-name c").out
