"""OpenVLA and OpenVLA-OFT: against the published code's outputs (where its tiny checkpoints are at hand) and,
with small random checkpoints, against transformers' own towers and Llama, PIL, peft and scalar loops."""

import contextlib
import copy
import http.server
import json
import math
import os
import shutil
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import ppo_vla
from common import UserError
from common.action_tokenizer import ActionTokenizer
from common.backbones import add_lora, build_backbone, inject_lora, load_adapter, openvla, save_adapter
from common.checkpoint import CheckpointError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
INSTRUCTIONS = ["Open the drawer", "put the red cube in the drawer now please", "lift it"]
WORDS = (
    "In: What action should the robot take to open drawer? put red cube in drawer now please? lift it? Out:"
)
SIZES = dict(
    featurizer=dict(dim=64, depth=3, hidden=128, head_dim=64, patch=14, patches=4, registers=2),
    fused_featurizer=dict(dim=72, depth=4, hidden=50, head_dim=72, patch=14, patches=4, registers=-1),
    text=dict(vocab_size=32064, pad_token_id=32000, hidden_size=32, intermediate_size=56, num_hidden_layers=2)
    | dict(num_attention_heads=4, num_key_value_heads=2),
)
STATISTICS = dict(
    action=dict(q01=[-0.5, -1, -2, -0.1, 0, 0, 0], q99=[0.5, 1, 3, 0.1, 1, 2, 1], mask=[True] * 6 + [False]),
    proprio=dict(q01=[-1.0] * 8, q99=[2.0] * 8),
)
NAMES = {"openvla": "vla", "oft": "token-oft", "l1": "oft-l1"}


def write_checkpoint(folder, family, seed=0):
    """A random checkpoint in the published layout: shards, index, config, tokenizer, OFT's extra files."""
    extra = dict(proprio=8, action_head=7) if family == "l1" else {}
    chunk = 1 if family == "openvla" else 2
    shapes = build_backbone(
        "openvla", path="random", chunk=chunk, sizes=SIZES | extra, device="meta"
    ).state_dict()
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in ((name, tensor.shape) for name, tensor in shapes.items()):
        x = torch.randn(shape, generator=generator) * (
            0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        )
        one = len(shape) == 1 and not name.endswith("bias")
        state[name] = (1.5 * x + one).bfloat16() if "embed" not in name else x.bfloat16()
    folder.mkdir(parents=True)
    for part, prefix in (("proprio_projector", "module."), ("action_head", "module.model.")):
        inner = {n: state.pop(n) for n in list(state) if n.startswith(part)}
        if inner:
            inner = {prefix + name.removeprefix(part + "."): tensor for name, tensor in inner.items()}
            torch.save(inner, folder / f"{part}--150_checkpoint.pt")
    names, weight_map = list(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    config = dict(
        model_type="openvla", image_resize_strategy="resize-naive", n_action_bins=256, pad_to_multiple_of=64,
        text_config=SIZES["text"] | {"torch_dtype": "bfloat16", "model_type": "llama"},
        norm_stats={"bridge_orig": STATISTICS, "fractal": STATISTICS},
    )  # fmt: skip
    if family == "l1":
        (folder / "dataset_statistics.json").write_text(json.dumps({"libero_goal_no_noops": STATISTICS}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        w: 3 + i for i, w in enumerate(dict.fromkeys(WORDS.split()))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("openvla")
    return {family: write_checkpoint(root / name, family) for family, name in NAMES.items()}


def load(checkpoints, kind, **config):
    chunk, key = (1 if kind == "openvla" else 2), (None if kind == "l1" else "fractal")
    config = dict(dtype="float32", chunk=chunk, unnorm_key=key) | config
    return build_backbone(str(checkpoints[kind]), **config)


def observe(size, cameras=1, seed=0, side=28, tasks=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size, cameras, 7, 7, 3), np.uint8)
    return dict(
        image=np.kron(coarse, np.ones((1, 1, side // 7, side // 7, 1), np.uint8)),
        proprio=rng.normal(size=(size, 8)).astype(np.float32), task=rng.integers(0, tasks, size),
    )  # fmt: skip


def make_agent(backbone, head="tokens", **changes):
    torch.manual_seed(0)
    args = ppo_vla.Args(head=head, temperature=1.6, detach_value=True, **changes)
    box = gymnasium.spaces.Box(-1, 1, (7,), np.float32)
    agent = ppo_vla.Agent(backbone, args, SimpleNamespace(single_action_space=box))
    torch.nn.init.normal_(agent.value_head[-1].weight)
    return agent.eval()


def take(batch, index):
    return {key: x[index] for key, x in batch.items()}


def randomize_lora(backbone, std=0.1):
    torch.manual_seed(5)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def close(found, wanted, atol=1e-4):
    wanted = torch.as_tensor(np.asarray(wanted)) if not isinstance(wanted, torch.Tensor) else wanted
    torch.testing.assert_close(torch.as_tensor(found).double(), wanted.double(), atol=atol, rtol=0)


# --- the published code's outputs


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    archive = SHARED / "openvla_tiny.tar.xz"
    if not archive.is_file():
        pytest.skip(f"the published code's reference outputs, {archive}, are not here")
    root = tmp_path_factory.mktemp("published")
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    return root


def test_openvla_equals_the_published_code(published):
    reference = np.load(published / "tiny_openvla" / "reference.npz")
    config = dict(dtype="float32", unnorm_key="tiny_bridge")
    model = build_backbone(str(published / "tiny_openvla"), **config)
    assert model.autoregressive and model.chunk == 1
    for case in range(3):
        want = {
            k.removeprefix(f"c{case}_"): reference[k] for k in reference.files if k.startswith(f"c{case}_")
        }
        obs = dict(image=want["image"][None, None], task=np.zeros(1, int))
        batch = model.preprocess(obs, [str(reference["tasks"][case])])
        assert batch["input_ids"].tolist() == want["input_ids"].tolist()
        pixels = batch["image"][:, 0].float() / 255
        pixels = (torch.cat([pixels, pixels], 1) - model.pixel_mean) / model.pixel_std
        close(pixels, want["pixel_values"], 1e-6)
        with torch.no_grad():
            vision, _ = model.encode_vision(batch)
            dino, siglip = vision.split(
                [want["dino_patches"].shape[-1], want["siglip_patches"].shape[-1]], -1
            )
            close(dino, want["dino_patches"])
            close(siglip, want["siglip_patches"])
            close(model.projector(vision), want["projector_features"])
            actions, hidden, prompt = model.generate(batch, lambda h: model.action_logits(h).argmax(-1))
            assert (actions + model.first_id).tolist() == want["generated_ids"].tolist()
            close(model.language_model.lm_head(hidden), want["generated_logits"])
            close(prompt, want["llm_last_hidden"][:, -1])
            close(model(batch, vision, actions)[0], hidden, 1e-5)
        chunk = ActionTokenizer().decode_bins(actions)[:, None].numpy()
        close(model.to_env(chunk)[0, 0], want["actions"], 1e-6)


def test_fine_tuning_loss_and_gradients_equal_the_published_ones(published):
    """Two prompts of different length, padded on the right; the loss covers the 7 actions and the stop."""
    reference = np.load(published / "tiny_openvla" / "reference.npz")
    model = build_backbone(str(published / "tiny_openvla"), dtype="float32", unnorm_key="tiny_bridge")
    ids, labels = (torch.tensor(reference[f"sft_{name}"]) for name in ("input_ids", "labels"))
    acting = labels != -100
    first = acting.int().argmax(1)
    prompts = torch.where(torch.arange(ids.shape[1]) < first[:, None], ids, model.pad_id)
    images = [torch.tensor(reference[f"c{i}_image"]).permute(2, 0, 1) for i in range(2)]
    image = torch.stack([openvla.resize_bicubic(x, 224) for x in images])[:, None]
    targets = torch.stack([row[keep] for row, keep in zip(ids, acting, strict=True)])  # (B, 8), with the stop
    tail = model.language_model.model.embed_tokens(targets)
    batch = dict(input_ids=prompts, image=image, length=first)
    x, keep, positions, last = model._sequence(batch, None, tail)
    x = model._decode(x, model._mask(keep, x.shape[1]), positions)
    logits = model.language_model.lm_head(model.language_model.model.norm(x[:, last:]))
    close(logits[0], reference["sft_logits_row0"])
    close(logits[1, -1], reference["sft_logits_row1"][0])  # the rest of its last 9 positions are pads
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(float(reference["sft_loss"]), abs=1e-4)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, norm in zip(reference["sft_grad_names"], reference["sft_grad_norms"], strict=True):
        assert parameters[str(name)].grad.norm().item() == pytest.approx(norm, abs=1e-4), name
    untouched = {name for name, p in parameters.items() if not p.requires_grad}
    assert untouched == set(reference["sft_params_without_grad"].tolist())


@pytest.mark.parametrize("cameras", [1, 2])
def test_oft_equals_the_published_code(published, cameras):
    reference = np.load(published / "tiny_openvla_oft" / "reference.npz")
    model = build_backbone(str(published / "tiny_openvla_oft"), dtype="float32")
    assert not model.autoregressive and model.chunk == 8
    name = "2img_proprio" if cameras == 2 else "1img"
    if cameras == 1:
        model.proprio_projector = None
    for case in range(2):
        task, views = str(reference["tasks"][case]), [reference[f"c{case}_image"]]
        if cameras == 2:
            views.append(reference[f"c{case}_wrist_image"])
        views = [np.asarray(Image.fromarray(view).resize((224, 224), Image.BICUBIC)) for view in views]
        proprio = reference[f"c{case}_proprio_raw"][None]
        obs = dict(image=np.stack(views)[None], proprio=proprio, task=np.zeros(1, int))
        batch = model.preprocess(obs, [task])
        if cameras == 2:
            close(batch["proprio"], reference[f"c{case}_proprio_normalized"][None], 1e-6)
        with torch.no_grad():
            hidden, prompt = model(batch)
            logits, mean = model.action_logits(hidden), model.action_mean(hidden).unflatten(1, (8, 7))
            full = model.language_model.lm_head(hidden)
        for kind in ("l1", "disc"):
            close(hidden, reference[f"c{case}_{kind}_{name}_hidden"])
            close(logits, reference[f"c{case}_{kind}_{name}_action_logits_slice"])
        assert full.argmax(-1).tolist() == reference[f"c{case}_disc_{name}_argmax_ids"].tolist()
        close(prompt, hidden[:, 0], 0)
        close(model.to_env(mean.numpy())[0], reference[f"c{case}_l1_{name}_actions"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_log_probs_equal_simplevla(published, side):
    reference = np.load(published / "tiny_openvla_oft" / "reference.npz")
    model = build_backbone(str(published / "tiny_openvla_oft"), dtype="float32")
    model.proprio_projector = None
    ids = torch.tensor(reference["svla_input_ids_leftpad"])
    if side == "right":
        ids = torch.stack([torch.cat([row[row != model.pad_id], row[row == model.pad_id]]) for row in ids])
    views = [torch.tensor(reference[f"c{i}_image"]).permute(2, 0, 1) for i in range(2)]
    image = torch.stack([openvla.resize_bicubic(view, 224) for view in views])[:, None]
    batch = dict(input_ids=ids, image=image, length=(ids != model.pad_id).sum(1))
    agent = make_agent(model)
    agent.head.temperature = float(reference["svla_temperature"])
    with torch.no_grad():
        logits = model.action_logits(model(batch)[0])
        sampled = torch.tensor(reference["svla_sampled_ids"]) - model.first_id
        log_prob, entropy, _ = agent.evaluate_actions(batch, sampled)
    close(logits, reference["svla_logits256"])
    close(log_prob, reference["svla_logprobs"])
    close(entropy, reference["svla_entropy"])
    assert (logits.argmax(-1) + model.first_id).tolist() == reference["svla_greedy_ids"].tolist()


def test_oft_training_pass_equals_the_published_one(published):
    """Its regression targets, right-padded: the hidden states at the action positions and the L1 actions."""
    reference = np.load(published / "tiny_openvla_oft" / "reference.npz")
    model = build_backbone(str(published / "tiny_openvla_oft"), dtype="float32")
    ids = torch.tensor(reference["train_input_ids"])
    acting = torch.tensor(reference["train_labels"]) != -100
    first = acting.int().argmax(1)
    prompts = torch.where(torch.arange(ids.shape[1]) < first[:, None], ids, model.pad_id)
    views = [[reference[f"c{i}_image"], reference[f"c{i}_wrist_image"]] for i in range(2)]
    views = [[torch.tensor(x).permute(2, 0, 1) for x in pair] for pair in views]
    image = torch.stack([torch.stack([openvla.resize_bicubic(x, 224) for x in pair]) for pair in views])
    batch = dict(
        input_ids=prompts, image=image, length=first, proprio=torch.tensor(reference["train_proprio"])
    )
    with torch.no_grad():
        hidden, _ = model(batch)
        mean = model.action_mean(hidden).unflatten(1, (8, 7))
    close(hidden, reference["train_action_hidden"])
    close(mean, reference["train_pred_actions"])


def test_published_adapter_fits_its_base_and_no_other(published):
    """tiny_openvla + its adapter = tiny_openvla_oft's shards, which are merged already, to bfloat16."""
    adapter = published / "tiny_openvla_oft" / "lora_adapter"
    config = dict(dtype="float32", unnorm_key="none")
    model = build_backbone(str(published / "tiny_openvla"), **config)
    load_adapter(model, adapter)
    merged = build_backbone(str(published / "tiny_openvla_oft"), dtype="float32")
    theirs = dict(merged.named_parameters())
    names = [name for name in openvla.read_headers(published / "tiny_openvla") if name.endswith("weight")]
    for name in names:
        ours = model._merge(name, None)
        assert (ours - theirs[name]).norm() <= 5e-3 * theirs[name].norm(), name
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    wanted = model.language_model.lm_head(hidden)[..., 31744:32000]  # it has adapters, too
    close(model.action_logits(hidden), wanted, 1e-6)
    half = build_backbone(str(published / "tiny_openvla"), unnorm_key="none")
    load_adapter(half, adapter)
    close(half.action_logits(hidden), wanted, 0.2)
    with pytest.raises(UserError, match="belongs to another base"):
        load_adapter(merged, adapter)


def test_full_size_has_every_published_name():
    file = SHARED / "openvla7b_keys.json"
    if not file.is_file():
        pytest.skip(f"{file}, the names and shapes of openvla-7b, is not here")
    expected = {}
    for pattern, (shape, count) in json.loads(file.read_text()).items():
        for i in range(count):
            expected[pattern.replace(".N.", f".{i}.")] = tuple(shape)
    model = build_backbone("openvla", path="random", device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184


@pytest.mark.parametrize(("modules", "count"), [("language_model", 79_953_920), ("all-linear", 110_828_288)])
def test_lora_parameters_of_the_full_size_are_the_known_ones(modules, count):
    """The second number is the published one, of suffixes that also hit convolutions and what never runs."""
    model = build_backbone("openvla", path="random", device="meta")
    if modules == "language_model":
        add_lora(model, 32)
    else:
        suffixes = "qkv proj fc1 fc2 fc3 q kv q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"
        inject_lora(model, LoraConfig(r=32, target_modules=suffixes.split()))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# --- transformers' own modules


def test_towers_equal_transformers_ones(checkpoints):
    """DINOv2 with registers and SigLIP of transformers, one block fewer, before the final norm."""
    state = {}
    for file in checkpoints["openvla"].glob("*.safetensors"):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    model = load(checkpoints, "openvla")
    obs = observe(2)
    pictures = obs["image"][:, 0].transpose(0, 3, 1, 2) / 255.0
    means, stds = [np.reshape(x, (3, 1, 1)) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    pixels = {"featurizer": (pictures - means) / stds, "fused_featurizer": pictures * 2 - 1}
    vision = model.encode_vision(model.preprocess(obs, INSTRUCTIONS))[0].split([64, 72], -1)
    dino = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=28,
            patch_size=14, num_register_tokens=2, layer_norm_eps=1e-6, attn_implementation="eager",
        )
    )  # fmt: skip
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=72, intermediate_size=50, num_hidden_layers=3, num_attention_heads=1, image_size=28,
            patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, attn_implementation="eager",
            vision_use_head=False,
        )
    )  # fmt: skip
    towers = (("featurizer", dino, 2, 3, vision[0]), ("fused_featurizer", siglip, 3, 0, vision[1]))
    for name, theirs, depth, prefix, found in towers:
        ours = {k.removeprefix(f"vision_backbone.{name}."): v for k, v in state.items() if f".{name}." in k}
        own = dict(theirs.named_parameters())
        with torch.no_grad():
            if name == "featurizer":
                fixed = {
                    "embeddings.cls_token": ours["cls_token"],
                    "embeddings.register_tokens": ours["reg_token"],
                    "embeddings.position_embeddings": F.pad(ours["pos_embed"], (0, 0, 1, 0)),
                    "embeddings.patch_embeddings.projection.weight": ours["patch_embed.proj.weight"],
                    "embeddings.patch_embeddings.projection.bias": ours["patch_embed.proj.bias"],
                }
                block, layer, out, norm = "encoder.layer", "attention", "o_proj", "norm"
            else:
                fixed = {
                    "embeddings.position_embedding.weight": ours["pos_embed"][0],
                    "embeddings.patch_embedding.weight": ours["patch_embed.proj.weight"],
                    "embeddings.patch_embedding.bias": ours["patch_embed.proj.bias"],
                }
                block, layer, out, norm = "encoder.layers", "self_attn", "out_proj", "layer_norm"
            for i in range(depth):
                for kind in ("weight", "bias"):
                    thirds = ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
                    for letter, third in zip("qkv", thirds, strict=True):
                        fixed[f"{block}.{i}.{layer}.{letter}_proj.{kind}"] = third
                    fixed[f"{block}.{i}.{layer}.{out}.{kind}"] = ours[f"blocks.{i}.attn.proj.{kind}"]
                    for n in "12":
                        fixed[f"{block}.{i}.{norm}{n}.{kind}"] = ours[f"blocks.{i}.norm{n}.{kind}"]
                        fixed[f"{block}.{i}.mlp.fc{n}.{kind}"] = ours[f"blocks.{i}.mlp.fc{n}.{kind}"]
                if name == "featurizer":
                    for n in "12":
                        fixed[f"{block}.{i}.layer_scale{n}.lambda1"] = ours[f"blocks.{i}.ls{n}.scale_factor"]
            for key, tensor in fixed.items():
                own.pop(key).copy_(tensor)
            assert all("norm" in key or "mask_token" in key for key in own), own.keys()
            seen = torch.tensor(pixels[name], dtype=torch.float32)
            wanted = theirs(seen, output_hidden_states=True).hidden_states[-1][:, prefix:]
        close(found, wanted, 2e-5)
        assert found.std() > 0.1


def reference_llama(folder):
    state = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.startswith("language_model."):
                state[name.removeprefix("language_model.")] = tensor.float()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES["text"], attn_implementation="eager")
    )
    llama.load_state_dict(state)
    return llama.eval()


def test_autoregressive_equals_transformers_llama(checkpoints):
    """A padded batch over a cache, against every row alone, without pads and cache, argmax after argmax."""
    model, llama = load(checkpoints, "openvla"), reference_llama(checkpoints["openvla"])
    batch = model.preprocess(observe(6), INSTRUCTIONS)
    assert len(batch["length"].unique()) > 1
    embed = llama.model.embed_tokens
    with torch.no_grad():
        vision = model.encode_vision(batch)[0]
        actions, hidden, prompt = model.generate(batch, lambda h: model.action_logits(h).argmax(-1), vision)
        forced, forced_prompt = model(batch, vision, actions)
        for row in range(6):
            ids = batch["input_ids"][row]
            ids = ids[ids != 32000]
            visual = model.projector(vision[row : row + 1])
            x = torch.cat([embed(ids[:1])[None], visual, embed(ids[1:])[None]], 1)
            for i in range(7):
                out = llama(inputs_embeds=x, output_hidden_states=True)
                last, logits = out.hidden_states[-1][0, -1], out.logits[0, -1, 31744:32000]
                close(hidden[row, i], last, 2e-5)
                close(model.action_logits(hidden[row, i]), logits, 2e-5)
                close(forced[row, i], last, 2e-5)
                if i == 0:
                    close(prompt[row], last, 2e-5)
                    close(forced_prompt[row], last, 2e-5)
                assert actions[row, i] == logits.argmax()
                x = torch.cat([x, embed(actions[row, i] + 31744)[None, None]], 1)
    assert len(actions.unique()) > 7


@pytest.mark.parametrize("family", ["oft", "l1"])
def test_oft_equals_transformers_llama_under_an_open_mask(checkpoints, family):
    model, llama = load(checkpoints, family), reference_llama(checkpoints[family])
    batch, embed = model.preprocess(observe(5, cameras=2), INSTRUCTIONS), llama.model.embed_tokens
    with torch.no_grad():
        hidden, prompt = model(batch)
        vision = model.encode_vision(batch)[0]
        for row in range(5):
            ids = batch["input_ids"][row]
            ids = ids[ids != 32000]
            parts = [embed(ids[:1])[None], model.projector(vision[row : row + 1])]
            if family == "l1":
                p = model.proprio_projector
                feel = F.gelu(F.linear(batch["proprio"][row], p.fc1.weight, p.fc1.bias))
                parts.append(F.linear(feel, p.fc2.weight, p.fc2.bias)[None, None])
            start = sum(part.shape[1] for part in parts) + len(ids) - 2
            parts += [embed(ids[1:])[None], torch.zeros(1, 14, 32), embed(torch.tensor([[2]]))]
            x = torch.cat(parts, 1)
            every = torch.zeros(1, 1, x.shape[1], x.shape[1])  # additive: every row sees every column
            wanted = llama.model(inputs_embeds=x, attention_mask=every).last_hidden_state[0]
            close(hidden[row], wanted[start : start + 14], 2e-5)
            close(prompt[row], wanted[start], 2e-5)


def test_l1_head_by_hand(checkpoints):
    model = load(checkpoints, "l1")
    hidden = torch.randn(3, 14, 32, generator=torch.Generator().manual_seed(0))
    state = {k: v.double() for k, v in model.action_head.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    with torch.no_grad():
        found = model.action_mean(hidden).unflatten(1, (2, 7))
    for k in range(2):
        x = hidden[:, 7 * k : 7 * k + 7].reshape(3, 7 * 32).double()
        x = linear(norm(x, "layer_norm1"), "fc1").clamp(min=0)
        for i in range(2):
            block = f"mlp_resnet_blocks.{i}.ffn"
            x = x + linear(norm(x, f"{block}.0"), f"{block}.1").clamp(min=0)
        close(found[:, k], linear(norm(x, "layer_norm2"), "fc2"), 1e-5)


# --- invariants


def test_oft_sees_every_token_and_openvla_none_ahead(checkpoints):
    """What changes when the last word does: everything before it in OFT, nothing in openvla."""
    for family in ("oft", "openvla"):
        model = load(checkpoints, family)
        batch, seen = model.preprocess(observe(1, tasks=1), ["open the drawer"]), []
        for last in (5, 6):
            tail = model._tail(batch["input_ids"], batch["input_ids"][:, :0])
            ids = torch.cat([batch["input_ids"][:, :-1], torch.tensor([[last]])], 1)
            with torch.no_grad():
                x, keep, positions, _ = model._sequence(batch | {"input_ids": ids}, None, tail)
                seen.append(model._decode(x, keep, positions)[0])
        place = 1 + 4 + ids.shape[1] - 2
        moved = (seen[0] - seen[1]).abs().amax(-1)
        assert moved[place:].min() > 1e-3
        assert moved[:place].min() > 1e-6 if family == "oft" else moved[:place].max() == 0


@pytest.mark.parametrize("family", ["oft", "l1"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_slot_reaches_the_first_action(checkpoints, monkeypatch, family, padded):
    """Through `forward`, whatever transformers does with masks: without one (prompts of one length, where
    SDPA's own default counts) and with one. A causal mask would be the silent error."""
    model = load(checkpoints, family)
    obs = observe(2) | {"task": np.array([0, int(padded)])}
    batch, tail = model.preprocess(obs, ["open the drawer", "put the red cube in drawer"]), model._tail
    assert padded == (len(batch["length"].unique()) == 2)

    def difference():
        """Of the first action's state, once the slot of the last one is another."""
        found = []
        for added in (0.0, 1.0):

            def moved(*inputs, added=added):
                x = tail(*inputs).clone()
                x[:, model.chunk * model.action_dim - 1] += added
                return x

            monkeypatch.setattr(model, "_tail", moved)
            with torch.no_grad():
                found.append(model(batch)[0][:, 0])
        return (found[0] - found[1]).abs().amax(-1).min()

    assert difference() > 1e-4
    run = model._run
    causal = {"is_causal": True}  # of Llama's layers; the towers' take none
    monkeypatch.setattr(model, "_run", lambda m, x, **inputs: run(m, x, **inputs and inputs | causal))
    assert padded or difference() == 0  # it can fail


def test_actions_in_a_worlds_own_units(checkpoints):
    """Bridge's in m, rad and 1 for open -> what RL4VLA's world calls -1 to 1, where -1 opens, and back."""
    low, high = [-0.05] * 3 + [-0.25] * 3 + [1.0], [0.05] * 3 + [0.25] * 3 + [0.0]
    plain, model = load(checkpoints, "oft"), load(checkpoints, "oft", bounds=[low, high])
    tokens = np.random.default_rng(0).uniform(-1, 1, (5, 2, 7)).astype(np.float32)
    theirs, found = np.asarray(plain.to_env(tokens)), np.asarray(model.to_env(tokens))
    wanted = np.concatenate([theirs[..., :3] / 0.05, theirs[..., 3:6] / 0.25, 1 - 2 * theirs[..., 6:]], -1)
    assert np.allclose(found, wanted, atol=1e-6)
    assert np.allclose(model.from_env(found), plain.from_env(theirs), atol=1e-5)
    assert build_backbone(**model.config).config == model.config


@pytest.mark.parametrize("libero", [False, True])
def test_demonstrations_come_back_from_the_models_units(checkpoints, libero):
    """In the data set's range, and LIBERO's gripper (-1 opens) from the model's (1 is open)."""
    model = load(checkpoints, "oft", libero=libero)
    low, high = (np.array(STATISTICS["action"][q], np.float32) for q in ("q01", "q99"))
    actions = low + (high - low) * np.random.default_rng(0).random((5, 2, 7), np.float32)
    actions[..., 4] = 0  # q01 = 0: the low end
    actions[..., 6] = np.sign(actions[..., 6] - 0.5) if libero else actions[..., 6]
    taught = model.from_env(actions)
    assert np.abs(taught[..., :6]).max() <= 1 and np.allclose(taught[..., 4], -1)
    assert np.allclose(model.to_env(taught.astype(np.float32)), actions, atol=1e-5)
    if libero:
        assert set(np.unique(taught[..., 6])) == {0, 1} and taught[actions[..., 6] == -1][0, 6] == 1


def test_a_wrong_mask_is_refused(checkpoints, monkeypatch):
    run = openvla.OpenVLA._run
    monkeypatch.setattr(
        openvla.OpenVLA,
        "_run",
        lambda self, module, x, **inputs: run(self, module, x, **inputs | {"is_causal": True}),
    )
    load(checkpoints, "openvla")
    with pytest.raises(UserError, match="wrong attention mask"):
        load(checkpoints, "oft")


@pytest.mark.parametrize("family", ["openvla", "oft", "l1"])
def test_padding_and_batching_change_nothing(checkpoints, family):
    """Several prompt lengths at once, pads left, right, or more of them, against every row alone."""
    model = load(checkpoints, family).double()  # so that no kernel's rounding hides a leak, or looks like one
    batch = model.preprocess(observe(6), INSTRUCTIONS)
    actions = torch.arange(42).view(6, 7) if family == "openvla" else None
    ids = batch["input_ids"]
    more = F.pad(ids, (3, 0), value=32000)
    right = torch.stack([torch.cat([row[row != 32000], row[row == 32000]]) for row in more])
    with torch.no_grad():
        found = model(batch, None, actions)
        for changed in (more, right):
            for a, b in zip(found, model(batch | {"input_ids": changed}, None, actions), strict=True):
                close(a, b, 1e-9)
        for row in range(6):
            alone = take(batch, slice(row, row + 1))
            text = INSTRUCTIONS[
                [len(model.encode_prompt(t)) for t in INSTRUCTIONS].index(int(alone["length"]))
            ]
            bare = {k: x for k, x in alone.items() if k != "length"} | {
                "input_ids": torch.tensor([model.encode_prompt(text)])
            }
            given = None if actions is None else actions[row : row + 1]
            for part in (alone, bare):
                for a, b in zip(found, model(part, None, given), strict=True):
                    close(a[row : row + 1], b, 1e-9)
    used = []
    mask = openvla.OpenVLA._mask
    model._mask = lambda keep, rows: used.append(keep) or mask(model, keep, rows)
    with torch.no_grad():
        model(take(batch, slice(0, 1)), None, None if actions is None else actions[:1])
    assert used == [None]  # prompts of one length: no mask, whatever the table's longest


@pytest.mark.parametrize(
    ("family", "head", "dtype", "tolerance"),
    [
        ("openvla", "tokens", "float32", 2e-5),
        ("oft", "tokens", "float32", 2e-5),
        ("l1", "gaussian", "float32", 2e-4),
        ("openvla", "tokens", "bfloat16", 0.1),
        ("oft", "tokens", "bfloat16", 0.1),
    ],
)
def test_ratio_is_one_between_sampling_and_evaluation(checkpoints, family, head, dtype, tolerance):
    """Sampled in threes with the vision cached, evaluated shuffled, in other batches, with it and without."""
    model = load(checkpoints, family, dtype=dtype, lora_modules=("language_model", "projector"))
    add_lora(model, 4)
    randomize_lora(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    agent = make_agent(model, head)
    batch, draw = model.preprocess(observe(9), INSTRUCTIONS), torch.Generator().manual_seed(1)
    sampled, visions = [], []
    with torch.no_grad():
        for rows in torch.arange(9).split(3):
            visions.append(model.encode_vision(take(batch, rows))[0])
            sampled.append(agent.get_action_and_value(take(batch, rows), visions[-1], generator=draw))
        actions, log_probs, values = map(torch.cat, zip(*sampled, strict=True))
        order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
        for vision in (torch.cat(visions)[order], None):
            found, entropy, value = agent.evaluate_actions(take(batch, order), actions[order], vision)
            assert (found - log_probs[order]).abs().max() < tolerance
            assert (value - values[order]).abs().max() < tolerance
    assert log_probs.shape == entropy.shape == (9, model.chunk * 7) and log_probs.std() > 0.05
    assert actions.unique().numel() > 20
    assert (agent.get_value(batch) - values).abs().max() < tolerance


def test_sampling_follows_the_distribution(checkpoints):
    """The autoregressive draw: the first token's frequencies and, after each, the second's mean log-prob."""
    model = load(checkpoints, "openvla")
    agent, n = make_agent(model), 3000
    batch = take(model.preprocess(observe(1), INSTRUCTIONS), [0] * n)
    vision = model.encode_vision(take(batch, slice(0, 1)))[0].expand(n, -1, -1)
    with torch.no_grad():
        actions, log_probs, _ = agent.get_action_and_value(
            batch, vision, generator=torch.Generator().manual_seed(3)
        )
        first = agent.head(model, model(take(batch, slice(0, 1)))[0]).softmax(-1)[0, 0]
        _, entropy, _ = agent.evaluate_actions(batch, actions, vision)
    counts = actions[:, 0].bincount(minlength=256) / n
    assert (counts - first).abs().sum() < 0.35  # the expected value is about 0.23
    assert (counts - first.flip(0)).abs().sum() > 0.5
    # E[-log p] = E[entropy], token by token
    assert ((-log_probs - entropy).mean(0).abs() < 5 * (log_probs + entropy).std(0) / n**0.5).all()


def test_bfloat16_is_close_to_float32(checkpoints):
    for family in ("openvla", "oft"):
        outputs = []
        for dtype in ("float32", "bfloat16"):
            model = load(checkpoints, family, dtype=dtype)
            batch = model.preprocess(observe(4), INSTRUCTIONS)
            assert next(model.parameters()).dtype == getattr(torch, dtype)
            with torch.no_grad():
                hidden, _ = model(batch)
                outputs.append(model.action_logits(hidden))
            assert hidden.dtype == outputs[-1].dtype == torch.float32
        assert (outputs[0] - outputs[1]).norm() < 0.03 * outputs[0].norm()


def test_norms_stay_in_16_bits_under_cudas_autocast(checkpoints, monkeypatch):
    """CUDA's autocast would make them, and all that follows, float32. The CPU's does not, so this looks
    whether CUDA's is off where they run, with weights and input in 16 bits."""
    model, seen = load(checkpoints, "l1", dtype="bfloat16"), []

    def watched(name):
        norm = getattr(F, name)

        def watch(x, shape, weight, *rest):
            seen.append((name, x.dtype, weight.dtype, torch.is_autocast_enabled("cuda")))
            return norm(x, shape, weight, *rest)

        return watch

    for name in ("rms_norm", "layer_norm"):
        monkeypatch.setattr(F, name, watched(name))
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.no_grad():
            model.action_mean(model(model.preprocess(observe(1), INSTRUCTIONS))[0])
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    sixteen = (torch.bfloat16, torch.bfloat16, False)
    assert set(seen) == {("rms_norm", *sixteen), ("layer_norm", *sixteen)}
    assert len(seen) == 2 * 2 + 1 + 2 * (2 + 3) + 4  # Llama's, those of the towers' blocks, the L1 head's


def test_four_bits():
    """Against 16 bits with the same rounded weights; adapters train; the size is memory_needed's."""
    if not torch.cuda.is_available():
        pytest.skip("4 BITS ARE NOT TESTED: there is no GPU")
    bnb = pytest.importorskip("bitsandbytes", reason="4 BITS ARE NOT TESTED: pip install bitsandbytes")
    sizes, models = SIZES | dict(text=SIZES["text"] | dict(hidden_size=128, intermediate_size=256)), []
    for four in (False, True):
        torch.manual_seed(0)
        config = dict(path="random", chunk=2, sizes=sizes, device="cuda", load_in_4bit=four)
        models.append(build_backbone("openvla", **config))
    shapes = {name: tensor.shape for name, tensor in models[0].named_parameters()}
    for name, weight in models[1].named_parameters():
        assert isinstance(weight, bnb.nn.Params4bit) == openvla.quantized(name, shapes[name])
        if openvla.quantized(name, shapes[name]):
            exact = models[0].get_parameter(name)
            rounded = bnb.functional.dequantize_4bit(weight, weight.quant_state)
            assert 0.02 < (rounded - exact).norm() / exact.norm() < 0.15
            exact.data = rounded.to(exact.dtype)
    state = models[1].language_model.model.layers[0].mlp.up_proj.weight.quant_state
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    assert 0.5 + scales / (128 * 256) == pytest.approx(0.52, abs=0.01)
    batch = models[0].preprocess(observe(3), INSTRUCTIONS)
    with torch.no_grad():
        wanted, found = (model(batch)[0] for model in models)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    add_lora(models[1], 4)
    models[1].train()
    models[1].action_logits(models[1](batch)[0]).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for n, p in models[1].named_parameters() if "lora_B" in n)


def test_what_trains_gets_a_gradient_and_nothing_else(checkpoints):
    model = load(checkpoints, "oft")
    model.language_model.lm_head(
        model(model.preprocess(observe(2), INSTRUCTIONS))[0]
    ).square().mean().backward()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    rest = {name.rsplit(".", 2)[0] for name, _ in model.named_parameters()} - {
        n.rsplit(".", 2)[0] for n in trains
    }
    assert any("blocks.2" in name for name in rest) and any("attn_pool" in name for name in rest)


def test_proprioception_is_normalised(checkpoints):
    model, obs = load(checkpoints, "l1"), observe(3)
    found = model.preprocess(obs, INSTRUCTIONS)["proprio"]
    close(found, np.clip(2 * (obs["proprio"] + 1) / 3 - 1, -1, 1), 1e-6)  # q01 -1, q99 2
    assert found.abs().max() == 1 and "proprio" not in load(checkpoints, "oft").preprocess(obs, INSTRUCTIONS)


def test_checkpointing_changes_no_gradient(checkpoints):
    model = load(checkpoints, "oft", lora_modules=("language_model", "projector", "vision"))
    add_lora(model, 4)
    randomize_lora(model)
    batch, gradients = model.preprocess(observe(3), INSTRUCTIONS), []
    for model.checkpointing in (False, True):
        model.action_logits(model(batch)[0]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        assert "lora_" in name and gradient.abs().max() > 0, name
        close(gradient, gradients[1][name], 1e-6)
    layers = {name.split(".lora_")[0] for name in gradients[0]}
    # 2 Llama layers of 7, the projector's 3, and 4 in each of the towers' 2 + 3 blocks that run
    assert len(layers) == 14 + 3 + 20


# --- adapters and merged checkpoints


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"), [("l1", "float32", 1e-5), ("openvla", "bfloat16", 0.06)]
)
def test_merged_checkpoint_reloads_to_the_same_outputs(checkpoints, tmp_path, family, dtype, tolerance):
    config = dict(dtype=dtype, lora_modules=("language_model", "projector", "vision"))
    model = load(checkpoints, family, **config)
    batch = model.preprocess(observe(4), INSTRUCTIONS)
    base = model(batch)[0]
    add_lora(model, 4)
    randomize_lora(model)
    folder = tmp_path / ("oft-merged" if family == "l1" else "merged")
    model.save_merged(folder)
    again = load({family: folder}, family, dtype=dtype)
    with torch.no_grad():
        wanted, found = model(batch)[0], again(batch)[0]
    assert (wanted - found).abs().max() < tolerance * wanted.abs().max() < (wanted - base).abs().max()
    source = checkpoints[family]
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()}
    for file in source.glob("*.safetensors"):
        old, new = load_file(file), load_file(folder / file.name)
        assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
        assert {t.dtype for t in new.values()} == {getattr(torch, dtype)}
    for file in source.glob("*.pt"):
        old, new = torch.load(file), torch.load(folder / file.name)
        assert old.keys() == new.keys() and all(t.equal(new[n].bfloat16()) for n, t in old.items())
    for write in (model.check_merge_target, model.save_merged):
        with pytest.raises(UserError, match="replace its own base"):
            write(source)
    with pytest.raises(UserError, match=r"/config.json cannot be made \(.*\); name another folder.$"):
        model.check_merge_target(folder / "config.json")


def test_a_full_disk_while_merging_is_one_sentence(checkpoints, tmp_path, monkeypatch):
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="/proprio_projector--150_checkpoint.pt cannot be written .*No"):
        load(checkpoints, "l1").save_merged(tmp_path / "oft")
    assert not [file for file in (tmp_path / "oft").iterdir() if file.suffix == ".pt"]


def test_adapters_are_pefts(checkpoints, tmp_path):
    """Written here, read by peft itself and by load_adapter; refused on another base."""
    model = load(checkpoints, "oft", lora_modules=("language_model", "vision"))
    batch = model.preprocess(observe(3), INSTRUCTIONS)
    add_lora(model, 4)
    randomize_lora(model)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = model(batch)[0]
        base = load(checkpoints, "oft")
        peft = PeftModel.from_pretrained(base, str(tmp_path))
        close(peft.base_model.model(batch)[0], wanted, 1e-5)
        mine = load(checkpoints, "oft")
        load_adapter(mine, tmp_path)
        close(mine(batch)[0], wanted, 1e-5)
    trained = {name for name, p in mine.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    other = {"oft": write_checkpoint(tmp_path / "other-oft", "oft", seed=1)}
    with pytest.raises(UserError, match="belongs to another base"):
        load_adapter(load(other, "oft"), tmp_path)
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        load_adapter(mine, tmp_path / "other-oft")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_half_an_adapter_is_one_sentence(checkpoints, tmp_path, name):
    model = load(checkpoints, "oft")
    add_lora(model, 2)
    save_adapter(model, tmp_path)
    cut(name)(tmp_path)
    with pytest.raises(UserError, match=rf"/{name} is missing, truncated or damaged \([^\n]+\): down[^\n]+$"):
        load_adapter(model, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"holds no {name}; give a folder in PEFT's format.$"):
        load_adapter(model, tmp_path)


# --- pictures


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (256, 256), (128, 128), (224, 300), (300, 200), (224, 224)]
)
def test_bicubic_is_pils(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    found = openvla.resize_bicubic(torch.tensor(image).permute(2, 0, 1)[None], 224)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(found, np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC)))


@pytest.mark.parametrize(("source", "target"), [(32, 28), (20, 28), (64, 28)])
def test_lanczos_by_a_scalar_loop(source, target):
    image = np.random.default_rng(1).integers(0, 256, (source, source), np.uint8)

    def kernel(x):
        if x == 0:
            return 1.0
        if abs(x) >= 3:
            return 0.0
        return 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2

    def line(values):
        out, stretch = [], max(source / target, 1.0)
        for i in range(target):
            centre = (i + 0.5) * source / target
            weights = [kernel((j + 0.5 - centre) / stretch) for j in range(source)]
            out.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        return np.stack(out)

    wanted = line(line(image.astype(float)).T).T
    found = openvla.resize_lanczos(torch.tensor(image), target).numpy()
    assert np.abs(found - wanted.clip(0, 255)).max() <= 0.5 + 1e-6


def test_centre_crop_by_a_scalar_loop():
    image = np.random.default_rng(2).integers(0, 256, (28, 28), np.uint8)
    found, side, off = openvla.crop_centre(torch.tensor(image)).numpy(), math.sqrt(0.9), 0
    for i in range(28):
        for j in range(28):
            y, x = (((1 - side) / 2 + k * side / 27) * 27 for k in (i, j))
            y0, x0 = min(int(y), 26), min(int(x), 26)
            corners = image[y0 : y0 + 2, x0 : x0 + 2].astype(float)
            value = np.array([y0 + 1 - y, y - y0]) @ corners @ np.array([x0 + 1 - x, x - x0])
            off += int(min(value / 255 * 255.5, 255)) != found[i, j]
    assert off <= 1  # an exact tie may truncate either way


def test_libero_pictures_and_gripper(checkpoints):
    """JPEG, lanczos, crop, in this order; nothing but the crop for pictures of the towers' size."""
    model = load(checkpoints, "l1", libero=True)
    obs = observe(2, cameras=2, side=56)
    batch = model.preprocess(obs, INSTRUCTIONS)
    for n in range(2):
        for camera in range(2):
            image = torch.tensor(openvla.jpeg(obs["image"][n, camera])).permute(2, 0, 1)
            wanted = openvla.crop_centre(openvla.resize_lanczos(image, 28))
            assert batch["image"][n, camera].equal(wanted)
    small = observe(1)
    image = torch.tensor(small["image"][0, 0]).permute(2, 0, 1)
    assert model.preprocess(small, INSTRUCTIONS)["image"][0, 0].equal(openvla.crop_centre(image))
    original = obs["image"][0, 0].astype(int)
    assert 0 < np.abs(openvla.jpeg(obs["image"][0, 0]) - original).mean() < 20
    actions = np.zeros((1, 2, 7), np.float32)
    actions[0, :, 6] = 0.9, 0.1  # open, closed
    found = model.to_env(actions)
    q = STATISTICS["action"]
    np.testing.assert_allclose(found[0, 0, :6], (np.array(q["q01"]) + q["q99"])[:6] / 2, atol=1e-6)
    assert found[0, :, 6].tolist() == [-1, 1]
    assert load(checkpoints, "l1").to_env(actions)[0, :, 6].tolist() == pytest.approx([0.9, 0.1])
    assert load(checkpoints, "oft", unnorm_key="none").to_env(actions) is actions


# --- prompts and statistics


def test_prompt_ends_with_the_lone_space(checkpoints):
    model, asked = load(checkpoints, "openvla"), []
    model.tokenize = lambda text: asked.append(text) or [7, 8]
    assert model.encode_prompt("Open the Drawer") == [1, 7, 8, 29871]
    model.tokenize = lambda text: [7, 29871]
    assert model.encode_prompt("Open the Drawer") == [1, 7, 29871]
    assert asked == ["In: What action should the robot take to open the drawer?\nOut:"]


def test_statistics_are_found_by_name(checkpoints, tmp_path):
    assert load(checkpoints, "l1").statistics == STATISTICS  # the only ones
    assert load(checkpoints, "l1", unnorm_key="libero_goal").statistics == STATISTICS
    assert load(checkpoints, "openvla", unnorm_key="none").statistics is None
    file = tmp_path / "other.json"
    file.write_text(
        json.dumps({"libero_10_no_noops": STATISTICS | {"action": STATISTICS["action"] | {"q01": [-9] * 7}}})
    )
    model = load(checkpoints, "oft", unnorm_key="libero_10", statistics=str(file))
    assert model.statistics["action"]["q01"] == [-9] * 7
    assert build_backbone(**model.config).statistics == model.statistics


# --- loading and its errors


def test_loaded_weights_are_the_files(checkpoints):
    model, seen = load(checkpoints, "l1", dtype="bfloat16"), set()
    for file in checkpoints["l1"].glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert model.state_dict()[name].equal(tensor)
            seen.add(name)
    rest = set(model.state_dict()) - seen
    assert rest and all(name.startswith(("proprio_projector", "action_head")) for name in rest)
    fingerprints = {load(checkpoints, "l1", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")}
    assert len(fingerprints) == 1


def change(folder, **values):
    """In config.json; to ..., for none"""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def drop_tensor(folder):
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    state = load_file(file)
    state.pop("projector.fc2.weight" if "projector.fc2.weight" in state else "projector.fc2.bias")
    save_file(state, file)


def cut(pattern):
    """Half a download: -> what takes away the second half of the folder's file of this name"""

    def spoil(folder):
        (file,) = folder.glob(pattern)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return spoil


@pytest.mark.parametrize(
    ("family", "spoil", "config", "message"),
    [
        ("l1", None, dict(head="tokens"), "trained with an L1 head.*--head gaussian.*Haozhan72"),
        (
            "openvla",
            None,
            dict(unnorm_key="libero_goal"),
            "no statistics of 'libero_goal' but of bridge_orig, fractal, and moojink/openvla-7b-oft-finetuned"
            r"-libero-goal, which may have it, could not be reached \(.+\); choose one of these as --unn",
        ),
        ("openvla", None, dict(unnorm_key=None), "but of bridge_orig, fractal"),
        ("l1", None, dict(family="openvla", chunk=1), "of OpenVLA-OFT: noise under a causal mask"),
        ("openvla", None, dict(chunk=8), "use --chunk 1"),
        ("openvla", None, dict(head="gaussian"), "--head tokens"),
        ("oft", None, dict(action_dim=14), "not for actions of 14"),
        ("oft", None, dict(load_in_4bit=True), "4 bits without bitsandbytes"),
        ("oft", None, dict(load_in_4bit="here"), "4 bits on a GPU only"),
        ("oft", None, dict(statistics="missing.json"), "missing.json cannot be read"),
        ("oft", lambda f: change(f, model_type="llama"), {}, "has the model_type 'llama'"),
        ("oft", lambda f: change(f, image_resize_strategy="letterbox"), {}, "only 'resize-naive' loads"),
        ("oft", lambda f: next(f.glob("*.safetensors")).unlink(), {}, r"lacks model-0000\d-of-00002"),
        ("oft", cut("*1-of-00002.safetensors"), {}, "/model-00001-of-00002.safetensors is missing, trunc"),
        ("oft", cut("config.json"), {}, "/config.json is missing, truncated or damaged"),
        ("oft", cut("*.index.json"), {}, "/model.safetensors.index.json is missing, truncated or damaged"),
        ("oft", cut("tokenizer.json"), {}, "/tokenizer.json is missing, truncated or damaged"),
        ("l1", cut("action_head*"), {}, "/action_head--150_checkpoint.pt is missing, truncated or damaged"),
        ("l1", cut("proprio*"), {}, "/proprio_projector--150_checkpoint.pt is missing, truncated or damaged"),
        ("l1", cut("dataset_statistics.json"), {}, "/dataset_statistics.json cannot be read"),
        ("oft", lambda f: (f / "vision_backbone--1.pt").touch(), {}, "uses FiLM"),
        ("oft", drop_tensor, {}, "1 tensors that do not fit, such as projector.fc2"),
        ("oft", lambda f: (f / "tokenizer.json").unlink(), {}, "/tokenizer.json is missing"),
        ("oft", lambda f: change(f, text_config=...), {}, r"not laid out as openvla-7b: KeyError\('text"),
        ("oft", lambda f: (f / "config.json").unlink(), {}, "has no config.json"),
    ],
)
def test_errors_are_one_sentence(checkpoints, tmp_path, monkeypatch, family, spoil, config, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if config.get("load_in_4bit"):
        found = {True: None, "here": "bitsandbytes"}[config["load_in_4bit"]]
        monkeypatch.setattr(openvla.importlib.util, "find_spec", lambda name: found)
    folder = checkpoints[family]
    if spoil:
        folder = tmp_path / folder.name
        shutil.copytree(checkpoints[family], folder)
        spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load({family: folder}, family, **config)
    assert "\n" not in str(caught.value)


# --- damaged folders, by what is done to them


def text(**values):
    """In config.json's text_config"""

    def spoil(folder):
        old = json.loads((folder / "config.json").read_text())["text_config"]
        change(folder, text_config=old | values)

    return spoil


def statistics(**values):
    """In the statistics of actions of the data set that is chosen, by name; to ..., for none"""

    def spoil(folder):
        own = folder / "dataset_statistics.json"
        config = json.loads((folder / "config.json").read_text())
        stats = config["norm_stats"]["fractal"]
        for name, value in values.items():
            part, _, key = name.partition("_")
            inner = {k: x for k, x in (stats[part] | {key: value}).items() if x is not ...}
            stats = stats | {part: inner if key else value}
        stats = {k: x for k, x in stats.items() if x is not ...}
        change(folder, norm_stats=config["norm_stats"] | {"fractal": stats})
        if own.exists():
            own.write_text(json.dumps({"libero_goal_no_noops": stats}))

    return spoil


def preprocessor(**values):
    def spoil(folder):
        found = dict(means=[[0.5] * 3] * 2, stds=[[0.5] * 3] * 2, input_sizes=[[3, 28, 28]] * 2) | values
        found = {name: value for name, value in found.items() if value is not ...}
        (folder / "preprocessor_config.json").write_text(json.dumps(found))

    return spoil


def index(**values):
    def spoil(folder):
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def tensor(name, function):
    """A tensor of the shards, changed"""

    def spoil(folder):
        for file in folder.glob("*.safetensors"):
            state = load_file(file)
            if name in state:
                save_file(state | {name: function(state[name]).contiguous()}, file)

    return spoil


def extra(pattern, function):
    """What OFT's file of this name holds, changed"""

    def spoil(folder):
        (file,) = folder.glob(pattern)
        torch.save(function(torch.load(file)), file)

    return spoil


def written(name, content):
    """Bytes in place of a file; None for a folder, ... for a pipe that nobody writes to"""

    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).mkdir()
        elif content is ...:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(content)

    return spoil


def spoil_tokenizer(**values):
    def spoil(folder):
        file = folder / "tokenizer.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"model": found["model"] | values}))

    return spoil


def with_nan(x):
    x = x.clone()
    x.view(-1)[-1] = float("nan")
    return x


EYE, LLAMA = "vision_backbone.featurizer.", "language_model.model."
BIG = ["tokenizer.json", "config.json", "model.safetensors.index.json", "dataset_statistics.json"]
DAMAGES = {
    "config: a list": written("config.json", b"[1, 2]"),
    "config: text_config a list": lambda f: change(f, text_config=[1]),
    "config: text_config a text": lambda f: change(f, text_config="llama"),
    "config: text_config empty": lambda f: change(f, text_config={}),
    "config: hidden_size a text": text(hidden_size="32"),
    "config: hidden_size negative": text(hidden_size=-32),
    "config: hidden_size zero": text(hidden_size=0),
    "config: hidden_size another": text(hidden_size=64),
    "config: no heads": text(num_attention_heads=0),
    "config: heads that do not divide": text(num_attention_heads=5),
    "config: heads a text": text(num_attention_heads="four"),
    "config: more heads of keys than there are": text(num_key_value_heads=8),
    "config: layers missing": text(num_hidden_layers=1),
    "config: layers beyond any": text(num_hidden_layers=10**9),
    "config: layers negative": text(num_hidden_layers=-1),
    "config: vocabulary another": text(vocab_size=32000),
    "config: vocabulary null": text(vocab_size=None),
    "config: pad beyond the vocabulary": text(pad_token_id=10**6),
    "config: pad a text": text(pad_token_id="<pad>"),
    "config: eps a text": text(rms_norm_eps="small"),
    "config: eps nan": text(rms_norm_eps=float("nan")),
    "config: eps null": text(rms_norm_eps=None),
    "config: activation unknown": text(hidden_act="nonsense"),
    "config: rope a text": text(rope_theta="x"),
    "config: rope unknown": text(rope_scaling={"rope_type": "nonsense"}),
    "config: rope zero": text(rope_theta=0),
    "config: rope negative": text(rope_theta=-1.0),
    "config: padding negative": lambda f: change(f, pad_to_multiple_of=-64),
    "config: padding beyond the vocabulary": lambda f: change(f, pad_to_multiple_of=10**6),
    "config: padding a text": lambda f: change(f, pad_to_multiple_of="64"),
    "config: padding missing": lambda f: change(f, pad_to_multiple_of=...),
    "config: family a number": lambda f: change(f, family=7),
    "config: family a list": lambda f: change(f, family=["openvla"]),
    "config: bins a text": lambda f: change(f, n_action_bins="256"),
    "config: statistics a list": lambda f: change(f, norm_stats=[1]),
    "config: statistics null": lambda f: change(f, norm_stats=None),
    "config: statistics a text": lambda f: change(f, norm_stats={"fractal": "text"}),
    "config: statistics a number": lambda f: change(f, norm_stats={"fractal": 7}),
    "statistics: equal quantiles": statistics(action_q99=[-0.5, 1, 3, 0.1, 1, 2, 1]),
    "statistics: crossed quantiles": statistics(action_q99=[0.5, -7, 3, 0.1, 1, 2, 1]),
    "statistics: nan": statistics(action_q01=[float("nan")] * 7),
    "statistics: infinite": statistics(action_q99=[float("inf")] * 7),
    "statistics: texts": statistics(action_q01=["a"] * 7),
    "statistics: null": statistics(action_q01=None),
    "statistics: too short": statistics(action_q01=[-1] * 3),
    "statistics: all too short": statistics(action_q01=[-1] * 3, action_q99=[1] * 3, action_mask=[True] * 3),
    "statistics: nested": statistics(action_q01=[[-1] * 7]),
    "statistics: without q99": statistics(action_q99=...),
    "statistics: without action": statistics(action=...),
    "statistics: action a list": statistics(action=[1]),
    "statistics: mask too short": statistics(action_mask=[True]),
    "statistics: mask of numbers": statistics(action_mask=[0.5] * 7),
    "statistics: mask a text": statistics(action_mask="yes"),
    "statistics: mask null": statistics(action_mask=None),
    "preprocessor: a list": written("preprocessor_config.json", b"[]"),
    "preprocessor: without means": preprocessor(means=...),
    "preprocessor: two colours": preprocessor(means=[[0.5] * 2] * 2),
    "preprocessor: one tower": preprocessor(means=[[0.5] * 3], stds=[[0.5] * 3]),
    "preprocessor: texts": preprocessor(means=[["a"] * 3] * 2),
    "preprocessor: std zero": preprocessor(stds=[[0.0] * 3] * 2),
    "preprocessor: std negative": preprocessor(stds=[[-1.0] * 3] * 2),
    "preprocessor: nan": preprocessor(means=[[float("nan")] * 3] * 2),
    "preprocessor: pictures of another size": preprocessor(input_sizes=[[3, 224, 224]] * 2),
    "preprocessor: a folder": written("preprocessor_config.json", None),
    "preprocessor: a pipe": written("preprocessor_config.json", ...),
    "index: a list": written("model.safetensors.index.json", b"[]"),
    "index: without its map": written("model.safetensors.index.json", b"{}"),
    "index: a map that is none": index(weight_map=[1]),
    "index: files that are numbers": index(weight_map={"a": 7}),
    "index: files that are lists": index(weight_map={"a": ["b"]}),
    "index: no files": index(weight_map={}),
    "index: a file that is not there": index(weight_map={"a": "model-00003-of-00003.safetensors"}),
    "index: the folder": index(weight_map={"a": ""}),
    "index: the half": index(weight_map={"a": "model-00001-of-00002.safetensors"}),
    "shard: a pipe": written("model-00001-of-00002.safetensors", ...),
    "shard: a folder": written("model-00001-of-00002.safetensors", None),
    "shard: empty": written("model-00001-of-00002.safetensors", b""),
    "shard: no safetensors": written("model-00001-of-00002.safetensors", b"\xff" * 999),
    "tensor: integers": tensor("projector.fc1.weight", lambda x: x.to(torch.int8)),
    "tensor: bools": tensor("projector.fc1.bias", lambda x: x > 0),
    "tensor: transposed": tensor("projector.fc1.weight", lambda x: x.T),
    "tensor: nan": tensor("projector.fc2.weight", with_nan),
    "tensor: nan in the tower": tensor(EYE + "blocks.1.attn.qkv.weight", with_nan),
    "tensor: infinite": tensor(LLAMA + "embed_tokens.weight", lambda x: x / 0),
    "tensor: a picture that is no square": tensor(EYE + "pos_embed", lambda x: x[:, :3]),
    "tensor: another patch": tensor(EYE + "patch_embed.proj.weight", lambda x: x[..., :7, :7]),
    "tensor: a scalar": tensor(EYE + "patch_embed.proj.weight", lambda x: x.sum()),
    "tensor: patches of one side": tensor(EYE + "patch_embed.proj.weight", lambda x: x[..., :7]),
    "tokenizer: a list": written("tokenizer.json", b"[]"),
    "tokenizer: without a model": written("tokenizer.json", b'{"version": "1.0"}'),
    "tokenizer: words beyond the vocabulary": spoil_tokenizer(vocab={"<unk>": 0, "lift": 10**6}),
    "tokenizer: no word for what is unknown": spoil_tokenizer(vocab={"lift": 5}),
    **{f"{name}: not UTF-8": written(name, b'{"a": "\xff\xfe"}') for name in BIG},
    **{f"{name}: deep": written(name, b'{"a":' * 9999 + b"1" + b"}" * 9999) for name in BIG},
    **{f"{name}: a folder": written(name, None) for name in BIG},
    **{f"{name}: a pipe": written(name, ...) for name in BIG},
}
L1_DAMAGES = {
    "proprioception: without statistics": statistics(proprio=...),
    "proprioception: crossed quantiles": statistics(proprio_q01=[3.0] * 8),
    "proprioception: too short": statistics(proprio_q01=[-1.0] * 3, proprio_q99=[2.0] * 3),
    "projector: no dict": extra("proprio*", lambda state: [1]),
    "projector: no tensors": extra("proprio*", lambda state: dict.fromkeys(state, 7)),
    "projector: integers": extra("proprio*", lambda state: {k: x.int() for k, x in state.items()}),
    "projector: nan": extra("proprio*", lambda state: {k: x.float() / 0 for k, x in state.items()}),
    "projector: keys that are numbers": extra("proprio*", lambda state: {1: torch.ones(2)}),
    "projector: another width": extra("proprio*", lambda state: {k: x[..., :2] for k, x in state.items()}),
    "projector: a folder": written("proprio_projector--150_checkpoint.pt", None),
    "projector: a pipe": written("proprio_projector--150_checkpoint.pt", ...),
    "head: empty": extra("action_head*", lambda state: {}),
    "code: a folder": written("code.py", None),
    "code: a pipe": written("code.py", ...),
}
NO_DAMAGE = {"code: a folder", "code: a pipe"}  # what is looked through, and need not be there


@pytest.mark.parametrize("family", ["oft", "l1"])
def test_a_damaged_folder_is_one_sentence(checkpoints, tmp_path, monkeypatch, family):
    """Of small folders, in every way of the tables, at the speed of one process."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    wrong = {}
    for i, (name, spoil) in enumerate((DAMAGES if family == "oft" else L1_DAMAGES).items()):
        folder = tmp_path / f"case{i}"
        shutil.copytree(checkpoints[family], folder)
        spoil(folder)
        try:
            load({family: folder}, family)
            found = None if name in NO_DAMAGE else "accepted"
        except UserError as error:
            said = str(error)
            found = None if "\n" not in said and folder.name in said and len(said) < 700 else said
        except Exception as error:
            found = repr(error)
        wrong |= {name: found} if found else {}
        shutil.rmtree(folder)
    assert not wrong


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_one_sentence(checkpoints, tmp_path, name):
    base = load(checkpoints, "oft")
    model = copy.deepcopy(base)
    add_lora(model, 2)
    save_adapter(model, tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    first = next(iter(state))

    def config(**values):
        return lambda f: (f / name).write_text(json.dumps(settings | values))

    def tensors(function):
        return lambda f: save_file(function(state), f / name)

    if name == "adapter_config.json":
        damages = [config(r=r) for r in (0, -1, "two", None, 1.5, 10**9)]
        damages += [config(lora_alpha=alpha) for alpha in ("two", None, float("nan"))]
        damages += [config(target_modules=modules) for modules in (7, [], "(", [1], None, {"a": 1})]
        damages += [config(rank_pattern=7), config(alpha_pattern="x"), config(bias="nonsense")]
        damages += [config(peft_type="IA3"), config(peft_type="nonsense"), config(exclude_modules=7)]
        damages += [written(name, content) for content in (b"[]", b"{}", b"\xff", None, ...)]
    else:
        damages = [
            tensors(lambda state: state | {first: state[first].int()}),
            tensors(lambda state: state | {first: with_nan(state[first])}),
            tensors(lambda state: state | {first: state[first].T.contiguous()}),
            tensors(lambda state: {k: x for k, x in state.items() if k != first}),
            tensors(lambda state: {}),
            *(written(name, content) for content in (b"", b"\xff" * 99, None, ...)),
        ]
    wrong = {}
    for i, spoil in enumerate(damages):
        folder = tmp_path / f"case{i}"
        shutil.copytree(tmp_path / "whole", folder)
        spoil(folder)
        try:
            load_adapter(copy.deepcopy(base), folder)
            wrong[i] = "accepted"
        except UserError as error:
            if "\n" in str(error) or folder.name not in str(error):
                wrong[i] = str(error)
        except Exception as error:
            wrong[i] = repr(error)
    assert not wrong


def test_hub_and_paths_that_are_not_there(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download openvla/openvla-7b"):
        build_backbone("openvla/openvla-7b")
    with pytest.raises(UserError, match="does not exist"):
        build_backbone("./no/such/folder")
    with pytest.raises(UserError, match="no such/name cannot be had.*check name and disk"):
        build_backbone("no such/name")
    with pytest.raises(UserError, match="Unknown backbone"):
        build_backbone("opnvla")


def test_the_hub_does_not_answer_or_has_no_such_name(monkeypatch, tmp_path):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match="^The hub has no openvla/openvla-8b, or not for you; [^\n]*$"):
            build_backbone("openvla/openvla-8b")
        server.shutdown()
    with pytest.raises(UserError, match="^openvla/openvla-7b is neither .* hub cannot be reached; [^\n]*$"):
        build_backbone("openvla/openvla-7b")  # nobody listens there any more


@pytest.mark.parametrize(
    ("suite", "repository", "statistics"),
    [
        ("libero_spatial", "Openvla-oft-SFT-libero-spatial-traj1", "libero-spatial"),
        ("libero_object", "Openvla-oft-SFT-libero-object-traj1", "libero-object"),
        ("libero_goal", "Openvla-oft-SFT-libero-goal-traj1", "libero-goal"),
        ("libero_10", "Openvla-oft-SFT-libero10-traj1", "libero-10"),
    ],
)
def test_a_suites_weights_and_statistics_come_from_the_hub(
    checkpoints, tmp_path, monkeypatch, suite, repository, statistics
):
    """The weights' own statistics are of other data, so the suite's come from openvla-oft's checkpoint."""
    asked, own = [], STATISTICS | {"action": STATISTICS["action"] | {"q01": [-9] * 7}}
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps({f"{suite}_no_noops": own}))
    weights = str(checkpoints["oft"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **_: asked.append(a) or weights)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **_: asked.append(a) or str(file))
    monkeypatch.setattr(openvla, "available_memory", lambda: 1e12)
    config = dict(unnorm_key=suite, libero=True, chunk=2, head="tokens", dtype="float32")
    model = build_backbone("openvla", path=suite, **config)
    found = [(f"Haozhan72/{repository}",)]
    found += [(f"moojink/openvla-7b-oft-finetuned-{statistics}", "dataset_statistics.json")]
    assert asked == found and model.statistics == own and not model.autoregressive
    assert model.config["path"] == found[0][0] and model.config["unnorm_key"] == suite
    wanted = load(checkpoints, "oft").state_dict()
    assert all(tensor.equal(wanted[name]) for name, tensor in model.state_dict().items())
    assert build_backbone(**model.config).statistics == own and asked == 2 * found  # as a resumed run does


def test_too_little_memory_is_said_before_loading(checkpoints, monkeypatch):
    """On the host and on a GPU, in 16 and in 4 bits: 32 layers' 4 * 4096^2 + 3 * 4096 * 11008 numbers have
    half a byte and their scales, the rest has two. With an update, what makes it smaller is named."""
    model = build_backbone("openvla", path="random", device="meta")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert openvla.memory_needed(shapes, torch.bfloat16, False) == 2 * 7_541_237_184
    assert openvla.memory_needed(shapes, torch.float32, False) == 4 * 7_541_237_184
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    four = openvla.memory_needed(shapes, torch.bfloat16, True)
    assert four == pytest.approx(2 * (7_541_237_184 - layers) + layers * (0.5 + 1 / 64), rel=0.01)
    # 348 tokens of 2 bytes; adapters of 18 bytes, all weights but the towers' of 12
    layer, gradients = 8 * 4096 + 4 * 11008, 4096 + 2 * 11008
    trained, activations = openvla.update_memory(model, 16, lora_rank=32)
    assert trained == 18 * 79_953_920 and activations == 16 * 348 * 2 * (32 * layer + gradients)
    full = dict(lora_rank=0, cameras=2)
    trained, activations = openvla.update_memory(model, 16, True, **full, train_vision=False)
    assert trained == pytest.approx(12 * (7_541_237_184 - 303_230_976 - 427.68e6), rel=1e-5)
    assert activations == 16 * 604 * 2 * (31 * 4096 + layer + gradients)
    # bc_warmup.py freezes no tower: those have a gradient, and keep what it needs
    whole, more = openvla.update_memory(model, 16, True, **full)
    assert whole == 12 * 7_541_237_184 and more > activations
    # PPO freezes them with their adapters, unless told
    model.config["lora_modules"] = ("language_model", "vision")
    frozen = openvla.update_memory(model, 16, lora_rank=32, train_vision=False)
    assert frozen == (18 * 79_953_920, 16 * 348 * 2 * (32 * layer + gradients))
    for train_vision in (True, None):
        eye = openvla.update_memory(model, 16, lora_rank=32, train_vision=train_vision)
        assert sum(frozen) == pytest.approx(29.1e9, rel=1e-2) and sum(eye) > 36e9
    model.config["lora_modules"] = ("language_model",)

    less = r"a smaller --micro-batch-size \(bc_warmup.py: --batch-size\), --gradient-checkpointing, "
    adapters = dict(micro_batch_size=16, lora_rank=32)
    full = dict(micro_batch_size=1, lora_rank=0, train_vision=False)
    small = dict(micro_batch_size=1, lora_rank=32, checkpointing=True, load_in_4bit=True)
    cases = [
        ("cpu", 15, {}, "15.1 GB for its weights", ""),
        ("cuda", 15, {}, "15.1 GB for its weights", "--load-in-4bit, "),
        ("cuda", 5, dict(load_in_4bit=True), "5.5 GB for its weights", ""),
        ("cuda", 15, adapters, "15.1 GB for its weights and 29.1 GB for an update", "--load-in-4bit, "),
        ("cuda", 40, adapters, "15.1 GB for .* 29.1 GB for an update", f"{less}--load-in-4bit, "),
        ("cpu", 40, adapters, "15.1 GB for .* 29.1 GB for an update", less),
        ("cuda", 80, full, ".* 83.5 GB for .*", "--gradient-checkpointing, --lora-rank 32, --load-in-4bit, "),
        ("cuda", 8, small, None, None),
    ]
    default = dict(load_in_4bit=False, micro_batch_size=0, checkpointing=False, lora_rank=None, cameras=1)
    for device, free, settings, needs, use in cases:
        monkeypatch.setattr(openvla, "available_memory", lambda free=free: free * 1e9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * 1e9, 80e9))
        check = ("openvla", model, torch.device(device))
        if needs is None:
            openvla.check_memory(*check, **default | settings)
            continue
        sentence = (
            f"^openvla needs {needs}, and {device} has {free}.0 GB free; use {use}another device, or --b"
        )
        with pytest.raises(UserError, match=sentence) as caught:
            openvla.check_memory(*check, **default | settings)
        assert "\n" not in str(caught.value)
    # eight processes: each an eighth of the weights and of 81.7 GB that train; and whole weights beside it
    monkeypatch.setattr(openvla.distributed, "ranks", lambda: (0, 8))
    for free, fits in ((27, False), (28, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * 1e9, 80e9))
        sentence = "15.1 GB for its weights and 12.1 GB for an update, .* more processes, --lora-rank 32, "
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match=sentence):
            openvla.check_memory("openvla", model, torch.device("cuda"), **default | full)
    monkeypatch.undo()

    monkeypatch.setattr(openvla, "available_memory", lambda: 15e9)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(UserError, match="^Haozhan72/Openvla-oft-SFT-libero-goal-traj1 needs 15.1 GB for its"):
        build_backbone("openvla", path="libero_goal")
    with pytest.raises(
        UserError, match=f"and [0-9.]+ GB for an update, and cpu has 15.0 GB free; use {less}"
    ):
        load(checkpoints, "oft", micro_batch_size=10**6)
    of_the_run = dict(micro_batch_size=2, checkpointing=True, lora_rank=4, cameras=1)
    model = load(checkpoints, "oft", **of_the_run)
    assert model.checkpointing and not model.config.keys() & of_the_run.keys()
