"""benchmarks/vla_speed.py: FLOPs and memory, counted on the meta device, against arithmetic by hand; the
command line at a tiny width."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_openvla import write_checkpoint

from benchmarks import vla_speed
from common import UserError
from common.backbones import openvla
from common.backbones.openvla import SIZES

ROOT = Path(__file__).resolve().parents[1]
WIDTH, MLP, VOCABULARY = 4096, 11008, 32064


@pytest.mark.parametrize("name", vla_speed.SPECIFIED)
def test_flops_of_the_full_size_are_the_specified_ones(name, monkeypatch):
    """Where the specification counts more than is run here, the prompt is longer (its scoring sees the last
    action token too) or the difference is added (the rows of lm_head that are no action tokens)."""
    chunk, cameras, tokens, vision, language, floor = vla_speed.SPECIFIED[name]
    if tokens:
        monkeypatch.setattr(vla_speed, "INSTRUCTION", vla_speed.INSTRUCTION + " word")
    agent = vla_speed.make_agent(chunk, "meta", dict(proprio=8) if cameras == 2 else None)
    batch = vla_speed.empty_batch(agent.backbone, 1, cameras)
    actions = torch.empty(1, 7 * chunk if chunk > 1 else tokens + 1, dtype=torch.long, device="meta")
    found = vla_speed.count(agent, batch, actions)
    rest = 2 * actions.shape[1] * WIDTH * (VOCABULARY - 256)
    assert found[0] / 1e12 == pytest.approx(vision, abs=0.0006)
    assert (found[1] + rest) / 1e12 == pytest.approx(language, abs=0.006)
    assert 1e3 * (sum(found) + rest) / vla_speed.FLOPS == pytest.approx(floor, rel=0.002)


@pytest.mark.parametrize("chunk", [8, 1])
def test_flops_and_memory_of_an_update(chunk):
    """A second pass for the inputs' gradients, but for q, k and v of the first layer; two for the adapters;
    attention's backward with its scores formed once more (2.5 times)."""
    rank, layers = 32, 2
    text = dict(hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=layers)
    text |= dict(num_attention_heads=32, num_key_value_heads=32)
    agent = vla_speed.make_agent(chunk, "meta", dict(text=vla_speed.TINY["text"] | text), rank)
    batch = vla_speed.empty_batch(agent.backbone, 3, 1)
    actions = torch.empty(3, 7 * chunk, dtype=torch.long, device="meta")
    tokens = 256 + 35 + (57 if chunk > 1 else 6)
    matrices = layers * (4 * WIDTH**2 + 3 * WIDTH * MLP)
    adapters = layers * rank * (8 * WIDTH + 3 * (WIDTH + MLP))
    attention = 4 * tokens**2 * WIDTH * layers * (1 if chunk > 1 else 0.5)
    head = 2 * 7 * chunk * 256 * WIDTH
    forward = 2 * tokens * (matrices + adapters) + attention + head
    unused = 3 * WIDTH * (WIDTH + rank)
    backward = 2 * tokens * (matrices + 2 * adapters - unused) + 2.5 * attention + head
    assert vla_speed.count(agent, batch, actions)[1] == pytest.approx(3 * forward, rel=1e-3)
    both = vla_speed.count(agent, batch, actions, train=True)[1]
    assert both == pytest.approx(3 * (forward + backward), rel=1e-3)
    # kept for the backward, in bfloat16: in a layer eight tensors of the model's width and four of the MLP's
    layer = 3 * tokens * 2 * (8 * WIDTH + 4 * MLP)
    kept = vla_speed.count_memory(agent, batch, actions)
    assert layers * layer < kept < (layers + 0.8) * layer
    assert vla_speed.update_memory(agent.backbone, 3)[1] == pytest.approx(kept, rel=0.05)
    agent.backbone.checkpointing = True
    less = vla_speed.count_memory(agent, batch, actions)
    assert vla_speed.update_memory(agent.backbone, 3, True)[1] == pytest.approx(less, rel=0.05)
    assert less < kept - 0.5 * layer


def test_the_estimate_that_loading_makes_is_what_is_counted():
    """With and without checkpointing, of the full width, the towers trained, too."""
    sizes = {name: SIZES[name] | dict(depth=9) for name in ("featurizer", "fused_featurizer")}
    sizes["text"] = SIZES["text"] | dict(num_hidden_layers=8)
    modules = ("language_model", "vision")
    agent = vla_speed.make_agent(8, "meta", sizes, 32, lora_modules=modules)
    model, actions = agent.backbone, torch.empty(2, 56, dtype=torch.long, device="meta")
    for model.checkpointing in (False, True):
        trained, activations = vla_speed.update_memory(model, 2, model.checkpointing, 32)
        counted = vla_speed.count_memory(agent, vla_speed.empty_batch(model, 2, 1), actions)
        assert activations == pytest.approx(counted, rel=0.08)  # the projector is left out
        assert trained == 18 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_no_memory_for_one_row_loses_no_other(monkeypatch):
    agent = vla_speed.make_agent(8, "cpu", vla_speed.TINY, 2, dtype="float32")
    preprocess, args = agent.backbone.preprocess, vla_speed.Args(batch_sizes=(1, 2, 3), seconds=0)

    def short(obs, instructions):
        if len(obs["task"]) == 2:
            raise torch.OutOfMemoryError("of 24 GB")
        return preprocess(obs, instructions)

    monkeypatch.setattr(agent.backbone, "preprocess", short)
    rows = list(vla_speed.inference_rows("openvla-oft", agent, 1e9, args, torch.device("cpu")))
    assert [row[1] for row in rows] == [1, 2, 3] and rows[1][2:] == ("out of memory", *"----")
    assert all(float(rows[i][2]) > 0 for i in (0, 2)) and len({len(row) for row in rows}) == 1


def test_published_weights_take_the_place_of_random_ones(monkeypatch, tmp_path):
    asked, folder = [], str(write_checkpoint(tmp_path / "oft", "oft"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or folder)
    monkeypatch.setattr(openvla, "available_memory", lambda: 1e12)
    agent = vla_speed.make_agent(8, "cpu", rank=2, path=vla_speed.PUBLISHED[8], dtype="float32")
    assert asked == ["Haozhan72/Openvla-oft-SFT-libero-spatial-traj1"] and agent.backbone.chunk == 8
    with pytest.raises(UserError, match="drop --tiny or --no-random-init"):
        vla_speed.main(vla_speed.Args(tiny=True, random_init=False))


@pytest.mark.slow
def test_the_command_line_at_a_tiny_width():
    command = [sys.executable, "benchmarks/vla_speed.py", "--tiny", "--seconds", "0", "--device", "cpu"]
    command += ["--batch-sizes", "1", "2", "--minibatch-size", "2", "--random-init"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if "|" in line
    ]
    assert [row[0] for row in rows if row[0] in vla_speed.SPECIFIED] == list(vla_speed.SPECIFIED)
    inference = [row for row in rows if row[0] in vla_speed.MODELS and row[1] in "12"]
    assert len(inference) == 4 and all(float(row[i]) > 0 for row in inference for i in (2, 3, 4))
    updates = [row for row in rows if row[0] in vla_speed.MODELS and row[1] in ("on", "off")]
    assert len(updates) == 4 and all(float(row[3]) > 0 for row in updates)
    presets = {int(row[0]): row for row in rows if row[0] in ("24", "48", "80")}
    for size, row in presets.items():
        parts = [float(cell) for cell in row[4:8]]
        assert sum(parts[:3]) == pytest.approx(parts[3], abs=0.2) and parts[3] < 0.9 * size
        assert float(row[8]) == pytest.approx(parts[2], rel=0.05, abs=0.1) and row[9] == "not measured yet"
    assert presets.keys() == vla_speed.PRESETS.keys()
