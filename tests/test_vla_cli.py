"""The scripts with OpenVLA's backbone through their command lines: small random checkpoints, tabletop."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import (
    EVAL,
    assert_same_run,
    call,
    flat,
    one_thread,  # noqa: F401 (a fixture)
    results,
    run,
    scalars,
    stopped_by,
)
from test_openvla import DAMAGES, checkpoints, write_checkpoint  # noqa: F401 (a fixture)

import bc_warmup
import common.backbones
import grpo_vla
import ppo_vla
from common.backbones.openvla import OpenVLA
from common.checkpoint import load_checkpoint

OFT = f"{EVAL} --chunk 2 --unnorm-key none --lora-rank 2 --temperature 1.6"
BC = f"{OFT} --num-demos 2 --gradient-steps 3 --batch-size 8 --warmup-steps 1 --learning-rate 1e-3"
SHORT = "--update-epochs 2 --minibatch-size 6 --micro-batch-size 4 --save-freq 1 --learning-rate 1e-3"
PPO = f"{OFT} {SHORT} --num-envs 4 --num-steps 3 --total-timesteps 40 --eval-freq 0 --critic-warmup 0"
PPO += " --policy-warmup 0 --ratio-level token --tasks lift"
GRPO = f"{OFT} {SHORT} --num-envs 4 --group-size 2 --num-groups 1 --total-timesteps 400 --eval-freq 0"
GRPO += " --ratio-level token --accuracy-low 0 --accuracy-high 1 --max-steps 6"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("vla")


@pytest.fixture(scope="module")
def warmup(home, checkpoints):  # noqa: F811
    run(bc_warmup, BC, f"--backbone {checkpoints['oft']} --output-dir {home} --run-name warmup")
    return home / "warmup"


@pytest.fixture(scope="module")
def trained(home, warmup):
    run(
        ppo_vla,
        PPO,
        f"--checkpoint {warmup} --output-dir {home} --run-name ppo --merge-and-save {home}/merged",
    )
    return home / "ppo"


def test_merged_weights_are_evaluated_as_read_from_their_folder(tmp_path, monkeypatch, trained, checkpoints):  # noqa: F811
    """At a training's end and with --evaluate; one model is in memory at a time, whoever holds the other."""
    found = results(trained)
    assert found["merged"] == found["final"] and found["final"]["episodes"] == 5 and "initial" in found
    load, models, sizes = common.backbones.load_backbone, [], []

    def spy(*rest):
        sizes.extend(sum(x.numel() for x in model.state_dict().values()) for model in models)
        models.append(load(*rest))
        return models[-1]

    for module in (common.backbones, ppo_vla):
        monkeypatch.setattr(module, "load_backbone", spy)
    flags = f"--evaluate --checkpoint {trained} --output-dir {tmp_path} --run-name e"
    done = run(ppo_vla, PPO, flags, f"--merge-and-save {tmp_path}/merged")
    evaluated = results(tmp_path / "e")
    assert evaluated["final"] == evaluated["merged"] == found["final"] and "initial" not in evaluated
    assert len(models) == 2 and sizes == [0]
    assert models[1].config["path"] == str(tmp_path / "merged") and not models[1].config.get("lora")
    rate = f"{found['final']['success_rate']:.3f}"
    assert f"merged into {tmp_path}/merged: {rate} before, {rate} as read from there" in done.out
    shards = [*(tmp_path / "merged").glob("*.safetensors")]
    assert shards and evaluated["args"]["checkpoint"] == str(trained)

    def broken(model, folder):
        save_merged(model, folder)
        for file in shards:
            file.write_bytes((checkpoints["oft"] / file.name).read_bytes())  # the adapters are forgotten

    save_merged = OpenVLA.save_merged
    monkeypatch.setattr(OpenVLA, "save_merged", broken)
    monkeypatch.setattr(ppo_vla.Agent, "act", told := act_and_tell(ppo_vla.Agent.act))
    run(ppo_vla, PPO, flags.replace("name e", "name f"), f"--merge-and-save {tmp_path}/merged")
    before, after = told.actions[: len(told.actions) // 2], told.actions[len(told.actions) // 2 :]
    assert any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def act_and_tell(act):
    """`act`, which keeps what it chose in its list `actions`."""

    def told(self, obs, turn):
        chosen = act(self, obs, turn)
        told.actions.append(chosen[0])
        return chosen

    told.actions = []
    return told


def test_a_checkpoint_holds_what_was_trained_and_no_more(warmup, trained):
    for folder, heads in ((warmup, {"head"}), (trained, {"head", "value_head"})):
        names = load_checkpoint(folder)["agent"]
        assert any("lora_" in name for name in names)
        rest = {name.split(".")[0] for name in names if "lora_" not in name}
        assert "backbone" not in rest and rest <= heads
    before, after = (flat(load_checkpoint(folder)["agent"]) for folder in (warmup, trained))
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


def test_ratio_is_one_on_the_first_minibatch(trained):
    assert scalars(trained)["policy/first_ratio_error"][0][1] < 1e-4


@pytest.mark.parametrize("flags", ["--checkpoint {run}", "--checkpoint {run}/../merged --lora-rank 0",
                                   "--backbone {base} --adapter {run}/adapter"])  # fmt: skip
def test_checkpoint_adapter_and_merged_model_are_one_policy(tmp_path, trained, checkpoints, flags):  # noqa: F811
    flags = flags.format(run=trained, base=checkpoints["oft"])
    run(ppo_vla, PPO, f"--evaluate {flags} --output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == results(trained)["final"]


@pytest.mark.parametrize("script", [ppo_vla, grpo_vla])
def test_a_stopped_run_goes_on_bit_identically(tmp_path, monkeypatch, warmup, script):
    base = f"{PPO if script is ppo_vla else GRPO} --checkpoint {warmup} --output-dir {tmp_path}"
    run(script, base, "--run-name whole")
    stopped_by(monkeypatch, script, "clipped_surrogate", 2)
    assert call(script, base, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, warmup, trained):
    flags = f"--checkpoint {warmup} --output-dir {tmp_path} --run-name less --gradient-checkpointing"
    run(ppo_vla, PPO, flags)
    wanted = load_checkpoint(trained)["agent"]
    for name, found in load_checkpoint(tmp_path / "less")["agent"].items():
        torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=0)


def test_tokens_one_after_another(tmp_path, checkpoints):  # noqa: F811
    flags = f"--backbone {checkpoints['openvla']} --chunk 1 --train-vision --gradient-checkpointing"
    run(ppo_vla, PPO, f"{flags} --output-dir {tmp_path} --run-name ar")
    assert scalars(tmp_path / "ar")["policy/first_ratio_error"][0][1] < 1e-4
    names = [name for name in load_checkpoint(tmp_path / "ar")["agent"] if "lora_" in name]
    assert any("vision_backbone" in name for name in names)


def test_the_l1_head_as_the_mean_of_a_gaussian(tmp_path, checkpoints):  # noqa: F811
    flags = f"--backbone {checkpoints['l1']} --head gaussian --output-dir {tmp_path} --run-name l1"
    run(ppo_vla, PPO, flags)
    assert scalars(tmp_path / "l1")["policy/first_ratio_error"][0][1] < 1e-4
    names = load_checkpoint(tmp_path / "l1")["agent"].keys()
    assert "head.log_std" in names and not any(name.startswith("head.mean") for name in names)


def test_an_adapter_keeps_its_own_scale_and_is_the_reference(tmp_path, monkeypatch, trained, checkpoints):  # noqa: F811
    """Published adapters have another alpha than this project's: it must outlive checkpoints, which need the
    adapter's files no more. Their dropout would make the policy in training another one."""
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 60, "lora_dropout": 0.1}))
    flags = f"--backbone {checkpoints['oft']} --adapter {tmp_path}/adapter --output-dir {tmp_path}"
    run(ppo_vla, PPO, flags, "--run-name run --kl-coef 0.1")
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 2)
    assert call(ppo_vla, PPO, flags, "--run-name stopped --kl-coef 0.1").code == 130
    monkeypatch.undo()
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    saved, trained_here = load_checkpoint(tmp_path / "run"), [n for n in adapter if "language_model" in n]
    for name in trained_here:  # adapters off would be another policy
        wanted = adapter[name]
        assert any(x.shape == wanted.shape and torch.equal(x, wanted) for x in saved["reference"]), name
    assert trained_here
    trained_ones = [x for group in saved["optimizer"]["param_groups"] for x in group["params"]]
    assert len(saved["reference"]) == len(trained_ones)  # the base is in its own files
    shutil.rmtree(tmp_path / "adapter")
    run(ppo_vla, PPO, f"--evaluate --checkpoint {tmp_path}/run --output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "run")["final"]
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "run")
    found = load_checkpoint(tmp_path / "stopped")
    assert found["backbone"]["lora"]["lora_alpha"] == found["args"]["lora_alpha"] == 60
    assert max(value for _, value in scalars(tmp_path / "run")["policy/first_ratio_error"]) < 1e-4
    assert found["backbone"]["lora"]["lora_dropout"] == 0


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (ppo_vla, "--backbone {base} --adapter {tmp}/none", "adapter_model.safetensors"),
        (ppo_vla, "--checkpoint {run} --load-in-4bit", "in 4 bits"),  # this run's, not the weights'
        (ppo_vla, "--backbone {stranger} --adapter {run}/adapter", "another base"),
        (ppo_vla, "--backbone {l1}", "noise"),
        (ppo_vla, "--backbone {base} --unnorm-key bridge", "bridge_orig"),
        (ppo_vla, "--backbone {other} --chunk 2", "--chunk 1"),
        (
            ppo_vla,
            "--checkpoint {run} --unnorm-key fractal",
            "--unnorm-key fractal is not what the checkpoint",
        ),
        (
            ppo_vla,
            "--checkpoint {run} --adapter {run}/adapter",
            "/adapter is not what the checkpoint has: None",
        ),
        (grpo_vla, "--checkpoint {run} --lora-rank 3", "adapters have rank 2; use --lora-rank 2 or 0"),
        (grpo_vla, "--checkpoint {run} --lora-alpha 4", "have alpha 16; use --lora-alpha 16 or 0"),
        (ppo_vla, "--backbone {tmp}", "config.json"),
        (ppo_vla, "--backbone no-such/model", "no-such/model"),
        (bc_warmup, "--backbone {base} --merge-and-save {base}", "would replace"),
        (
            ppo_vla,
            "--checkpoint {run} --merge-and-save {tmp}/m --collect 2 --save-dataset {tmp}/x",
            "--merge-and-save does nothing with --collect",
        ),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, trained, checkpoints, script, flags, said):  # noqa: F811
    base = {ppo_vla: PPO, grpo_vla: GRPO, bc_warmup: BC}[script]
    if "stranger" in flags:
        write_checkpoint(tmp_path / "oft-stranger", "oft", seed=1)
    flags = flags.replace("{stranger}", f"{tmp_path}/oft-stranger")
    names = dict(base=checkpoints["oft"], other=checkpoints["openvla"], l1=checkpoints["l1"], run=trained)
    done = call(script, base, flags.format(**names, tmp=tmp_path), f"--output-dir {tmp_path} --run-name bad")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


def test_the_projects_cover_command_says_what_is_missing(tmp_path, monkeypatch):
    """No LIBERO, no weights, no network: one sentence each, and which command runs instead."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for flags, wanted in (
        ("--lora-rank 32", "needs a CUDA GPU.*--backbone tiny"),
        ("--lora-rank 32 --device cpu", "libero-spatial-traj1|LIBERO_ASSETS|pip install"),
        ("--suite libero_90 --lora-rank 32 --device cpu", "libero_90|LIBERO_ASSETS|pip install"),
    ):
        if "--device" not in flags and torch.cuda.is_available():
            continue
        flags += f" --env libero --output-dir {tmp_path} --run-name cover --num-workers 0"
        done = call(ppo_vla, flags)
        assert done.code == 2 and done.err.count("\n") == 1 and re.search(wanted, done.err), done
    assert not (tmp_path / "cover").exists()


@pytest.mark.parametrize(
    ("kind", "damage", "flags", "message"),
    [
        ("oft", "config: layers beyond any", "", "another depth or vocabulary than the tensors"),
        ("oft", "statistics: equal quantiles", "--unnorm-key fractal", "its action are not below q99"),
        ("oft", "tensor: nan", "", "numbers in projector.fc2.weight that are not finite"),
        ("l1", None, "--action-history 2 --head gaussian", "of 8 numbers, and here there are 22"),
    ],
)
def test_damaged_folders_on_the_command_line(tmp_path, checkpoints, kind, damage, flags, message):  # noqa: F811
    folder = shutil.copytree(checkpoints[kind], tmp_path / "oft-folder")
    if damage:
        DAMAGES[damage](folder)
    done = call(ppo_vla, PPO, f"--backbone {folder} --output-dir {tmp_path} --run-name r", flags)
    assert done.code == 2 and re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", done.err), done
    assert not (tmp_path / "r").exists()
