"""Qwen's vision-language models: against transformers' own forward, positions and image processor, with small
random checkpoints in the hub's layouts, and through the scripts' command lines."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from reach_world import ReachEnv
from safetensors.torch import load_file, save_file
from test_cli import (
    EVAL,
    assert_same_run,
    call,
    one_thread,  # noqa: F401 (a fixture)
    results,
    run,
    scalars,
    stopped_by,
    words,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError
from common.backbones import add_lora, build_backbone, check_memory, family_of, qwen, stored_weights
from common.checkpoint import load_checkpoint
from common.envs import WORLDS, robosuite
from common.run import read_flags

INSTRUCTIONS = ["open the drawer", "put the red cube on the green plate now", "lift it"]
SPECIAL = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
WORDS = "system you are a helpful assistant . user what action should the robot take to ? "
WORDS += " ".join((*INSTRUCTIONS, *robosuite.MOVES))
FAMILIES = tuple(qwen.FAMILIES)
EYES = {
    "qwen2_vl": dict(embed_dim=32, hidden_size=24, mlp_ratio=2),
    "qwen2_5_vl": dict(hidden_size=32, intermediate_size=40, out_hidden_size=24, window_size=56,
                       fullatt_block_indexes=[1]),
    "qwen3_vl": dict(hidden_size=32, intermediate_size=40, out_hidden_size=24, num_position_embeddings=16,
                     deepstack_visual_indexes=[0, 2]),
}  # fmt: skip
TEXT = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    rms_norm_eps=1e-6, vocab_size=80, max_position_embeddings=4096, attention_dropout=0.1,
)  # fmt: skip
FULL = {  # as the hub has them: vision, text, parameters in all and of vision, and adapters of rank 32
    "qwen2_vl": (
        dict(depth=32, embed_dim=1280, hidden_size=1536, mlp_ratio=4, num_heads=16),
        dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
             num_key_value_heads=2),
        2209, 665, 36.9,
    ),
    "qwen2_5_vl": (
        dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=2048, num_heads=16),
        dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
             num_key_value_heads=2),
        3755, 669, 59.9,
    ),
    "qwen3_vl": (
        dict(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2048, num_heads=16,
             deepstack_visual_indexes=[5, 11, 17]),
        dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
             num_key_value_heads=8),
        2128, 407, 34.9,
    ),
}  # fmt: skip


def tiny_tokenizer():
    vocabulary = ("<unk>", *dict.fromkeys(WORDS.lower().split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    return tokenizer


def write_config(folder, family, eye, text, tie=True):
    """config.json and tokenizer.json: of Qwen2 and Qwen2.5 the language model's sizes stand flat in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in SPECIAL}
    config = {f"{x}_token_id": ids[x] for x in ("vision_start", "vision_end")}
    config |= {"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"]}
    text = text | dict(bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"])
    config |= dict(model_type=family, torch_dtype="bfloat16", tie_word_embeddings=tie)
    if family == "qwen3_vl":
        eye = eye | dict(patch_size=16, model_type=family)
        head, rope = text.get("head_dim", 128), dict(mrope_interleaved=True, rope_type="default")
        rope["mrope_section"] = [24, 20, 20] if head == 128 else [4, 2, 2]
        text = text | dict(head_dim=head, rope_theta=5e6, rope_scaling=rope, model_type="qwen3_vl_text")
        config |= dict(text_config=text | dict(tie_word_embeddings=tie))
    else:
        eye = eye | dict(in_chans=3, patch_size=14, spatial_patch_size=14, spatial_merge_size=2)
        head = text["hidden_size"] // text["num_attention_heads"]
        sections = [16, 24, 24] if head == 128 else [2, 2, 2]
        config |= text | dict(rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=sections))
        config |= dict(sliding_window=32768, use_sliding_window=False, max_window_layers=28)
    (folder / "config.json").write_text(json.dumps(config | dict(vision_config=eye)))


def write_checkpoint(folder, family, tie=True):
    """A random checkpoint in the hub's layout, in two shards -> transformers' model that it holds."""
    eye, text = EYES[family] | dict(depth=3, num_heads=2), TEXT
    if family == "qwen3_vl":
        text = text | dict(head_dim=16)
    write_config(folder, family, eye, text, tie)
    Model = qwen.FAMILIES[family][0]
    torch.manual_seed(0)
    model = Model(Model.config_class.from_pretrained(folder)).float().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3 if p.dim() == 1 else 1.5 * p[0].numel() ** -0.5)
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    if tie:
        del tensors["lm_head.weight"]
    if family != "qwen3_vl":
        tensors = {n.replace("model.language_model.", "model."): x for n, x in tensors.items()}
        tensors = {n.replace("model.visual.", "visual."): x for n, x in tensors.items()}
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, name in enumerate(sorted(tensors)):
        list(parts.values())[i % 2][name] = tensors[name].clone()
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    home = tmp_path_factory.mktemp("qwen")
    folders = {family: home / family for family in FAMILIES}
    return {
        family: SimpleNamespace(folder=folder, model=write_checkpoint(folder, family))
        for family, folder in folders.items()
    }


@pytest.fixture(params=FAMILIES)
def published(request, checkpoints):
    return checkpoints[request.param]


def load(published, **config):
    torch.manual_seed(1)
    backbone = build_backbone(str(published.folder), **dict(chunk=2, action_dim=3, proprio_dim=5) | config)
    for p in backbone.new_parts:  # large enough to count
        for x in p.parameters() if isinstance(p, torch.nn.Module) else [p]:
            x.data.normal_(0, 1 if x.dim() == 1 else 0.5)
    return backbone


def observe(backbone, size=4, cameras=2, grid=(2, 3), seed=0):
    """Pictures that need no resizing, of `grid` tokens."""
    rng, step = np.random.default_rng(seed), 2 * backbone.patch
    return dict(
        image=rng.integers(0, 256, (size, cameras, grid[0] * step, grid[1] * step, 3), np.uint8),
        proprio=rng.normal(size=(size, 5)).astype(np.float32), task=np.arange(size) % 3,
    )  # fmt: skip


def processed(backbone, image):
    """What the published processor makes of pictures (N, H, W, 3) -> pixel_values, image_grid_thw"""
    mean, std = backbone.colours
    processor = Qwen2VLImageProcessorPil(
        patch_size=backbone.patch, image_mean=list(mean), image_std=list(std),
        size=dict(shortest_edge=3136, longest_edge=12845056),
    )  # fmt: skip
    found = processor(images=list(np.asarray(image)), return_tensors="pt")
    return found["pixel_values"], found["image_grid_thw"]


def full_forward(published, backbone, batch, image):
    """transformers' own forward of prompt and pictures, in which the proprioception's embedding takes the
    place of a token's -> hidden states (B, L, D)"""
    model = published.model.model
    pixels, grid = processed(backbone, image.reshape(-1, *image.shape[2:]))
    ids, pads = batch["input_ids"], pads_of(batch)

    def put(module, inputs, output):
        output[:, -2] = backbone.feel(batch["proprio"])
        return output

    hook = model.get_input_embeddings().register_forward_hook(put)
    try:
        return model(
            input_ids=ids, attention_mask=(~pads).long(), pixel_values=pixels, image_grid_thw=grid,
            mm_token_type_ids=(ids == backbone.image_id).int(), use_cache=False,
        ).last_hidden_state  # fmt: skip
    finally:
        hook.remove()


def pads_of(batch):
    """Which of the prompt's tokens (B, L) are pads."""
    ids = batch["input_ids"]
    return ~batch["keep"][:, : ids.shape[1]] if "keep" in batch else torch.zeros_like(ids, dtype=torch.bool)


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-5)


# --- the model


def test_every_weight_is_loaded(published):
    wanted = published.model.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        found = load(published, dtype=str(dtype).removeprefix("torch.")).qwen.state_dict()
        assert found.keys() == wanted.keys() and "lm_head.weight" in found
        assert all(x.dtype == dtype and x.equal(wanted[name].to(dtype)) for name, x in found.items())


@torch.no_grad()
@pytest.mark.parametrize("cameras", [1, 2])
def test_prompt_and_pictures_are_transformers_own(published, cameras):
    """Padded, alone, and with vision from before."""
    backbone = load(published)
    obs = observe(backbone, cameras=cameras)
    batch = backbone.preprocess(obs, INSTRUCTIONS)
    assert pads_of(batch).any() and not pads_of(batch).all(1).any()
    action_hidden, prompt_hidden = backbone(batch)
    wanted = full_forward(published, backbone, batch, obs["image"])
    assert wanted.std() > 0.1 and action_hidden.shape == (4, 6, 24)
    close(prompt_hidden, wanted[:, -1])
    vision, attention = backbone.encode_vision(batch)
    assert attention is None and vision.shape[1] == (3 if backbone.patch == 16 else 1)
    pixels, grid = processed(backbone, obs["image"].reshape(-1, *obs["image"].shape[2:]))
    features = published.model.model.get_image_features(pixels, grid)
    maps = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
    for i, each in enumerate(maps):
        close(vision[:, i].flatten(0, 1), torch.cat(each))
    cached = backbone({name: x for name, x in batch.items() if name != "image"}, vision)
    assert cached[0].equal(action_hidden) and cached[1].equal(prompt_hidden)
    for i in range(3):
        row = {name: x[i : i + 1] for name, x in obs.items()} | {"task": np.array([0])}
        alone = backbone.preprocess(row, [INSTRUCTIONS[i]])
        assert "keep" not in alone
        hidden, prompt = backbone(alone)
        close(prompt, full_forward(published, backbone, alone, row["image"])[:, -1])
        close(prompt, prompt_hidden[i : i + 1])
        close(hidden, action_hidden[i : i + 1])


@torch.no_grad()
def test_slots_see_the_prompt_and_those_before_them(published):
    backbone = load(published)
    batch = backbone.preprocess(observe(backbone), INSTRUCTIONS)
    before, prompt = backbone(batch)
    backbone.slots[3] += 1.0
    after, same = backbone(batch)
    moved = (after - before).abs().amax((0, 2))
    assert same.equal(prompt) and not moved[:3].any() and (moved[3:] > 1e-3).all()
    for name in ("proprio", "image"):
        other = backbone({**batch, name: batch[name].flip(0)})
        assert all((x - y).abs().max() > 1e-3 for x, y in zip(other, (after, same), strict=True))


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (3, 2)])
def test_positions_are_get_rope_index(published, cameras, grid):
    backbone = load(published)
    obs = observe(backbone, size=3, cameras=cameras, grid=grid)
    batch = backbone.preprocess(obs, INSTRUCTIONS)
    ids = batch["input_ids"]
    patches = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * 3 * cameras)
    ids = torch.cat([ids, torch.ones(3, 6, dtype=ids.dtype)], 1)  # words in the slots' place
    wanted, _ = published.model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == backbone.image_id).int(), image_grid_thw=patches,
        attention_mask=batch["keep"].long(),
    )  # fmt: skip
    assert batch["position_ids"].transpose(0, 1).equal(wanted) and (wanted[0] != wanted[1]).any()


def test_pictures_are_those_of_the_processor(published):
    backbone = load(published)
    image = observe(backbone, cameras=1)["image"][:, 0]
    wanted, grid = processed(backbone, image)
    found = qwen.patchify(torch.as_tensor(image), backbone.patch, *backbone.colours)
    assert found.equal(wanted) and grid.tolist() == [[1, 4, 6]] * 4


@pytest.mark.parametrize("size", [(64, 64), (84, 84), (100, 130), (224, 224)])
def test_other_pictures_are_resized_as_by_the_processor(checkpoints, size):
    """To 56, 84, 112 x 140, 224; by a level of 255 more or less where PIL rounds twice."""
    backbone = load(checkpoints["qwen2_vl"])
    image = np.random.default_rng(0).integers(64, 192, (*size, 3), np.uint8)  # PIL clips between its passes
    obs = dict(image=image[None, None], proprio=np.zeros((1, 5), np.float32), task=np.zeros(1, int))
    batch = backbone.preprocess(obs, INSTRUCTIONS)
    wanted, grid = processed(backbone, image[None])
    assert [[1, *(side // 14 for side in batch["image"].shape[2:4])]] == grid.tolist()
    found = qwen.patchify(batch["image"][0], 14, *backbone.colours)
    level = 1 / 255 / min(backbone.colours[1])
    assert (found - wanted).abs().max() <= 1.01 * level and (found != wanted).float().mean() < 0.3


def test_the_prompt(checkpoints):
    """A system turn, but of Qwen3; words of every case; the proprioception before the last token."""
    for family, system in (("qwen2_5_vl", 9), ("qwen3_vl", 0)):
        backbone = load(checkpoints[family])
        tokenizer, ids = tiny_tokenizer(), backbone.encode_prompt("LIFT it", 2, 3)
        picture = "<|vision_start|> " + "<|image_pad|> " * 3 + "<|vision_end|> "
        text = f"<|im_start|> user {picture * 2} what action should the robot take to lift it ?"
        text += "<|im_end|> <|im_start|> assistant"
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        known = [i if i else None for i in ids[system:]]  # "What" is not among the words
        assert known[:-2] == [x if x != tokenizer.token_to_id("what") else None for x in wanted[:-1]]
        assert ids[-2] == 0 and ids[-1] == tokenizer.token_to_id("assistant")
        assert len(ids) == system + len(wanted) + 1


# --- heads


def make_agent(published, head, script=ppo_vla, chunk=2, lora_rank=2, **config):
    discrete = head == "discrete"
    args = script.Args(head=head, chunk=chunk, temperature=1.3)
    backbone = load(published, head=head, chunk=chunk, action_dim=1 if discrete else 3, **config)
    box = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    names = robosuite.MOVES if discrete else None
    space = gymnasium.spaces.Discrete(8) if discrete else box
    agent = script.Agent(backbone, args, SimpleNamespace(single_action_space=space, action_names=names))
    if lora_rank:
        add_lora(backbone, lora_rank)
    for name, p in agent.named_parameters():
        if "lora_B" in name or (name.startswith(("value_head", "head.velocity.last")) and p.dim() > 1):
            torch.nn.init.normal_(p, std=0.3)
    for p in backbone.vision_parameters():
        p.requires_grad_(False)
    return agent.eval()


@pytest.mark.parametrize(("head", "chunk"), [("tokens", 2), ("gaussian", 2), ("flow", 2), ("discrete", 1)])
def test_the_first_ratio_is_one_and_all_that_trains_has_a_gradient(published, head, chunk):
    agent = make_agent(published, head, chunk=chunk)
    batch = agent.backbone.preprocess(observe(agent.backbone, size=3), INSTRUCTIONS)
    with torch.no_grad():
        vision = agent.backbone.encode_vision(batch)[0]
        generator = torch.Generator().manual_seed(0)
        actions, old, values = agent.get_action_and_value(batch, vision, generator=generator)
    del batch["image"]
    agent.train()
    log_probs, entropies, again = agent.evaluate_actions(batch, actions, vision)
    assert (log_probs - old).abs().max() == 0 and again.equal(values)
    (log_probs.sum() + 0.1 * entropies.sum() + (again - 1).square().sum()).backward()
    trained = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    adapters = [name for name in trained if "lora_" in name]
    assert len(adapters) == 2 * 7 * 3 and all("language_model.layers" in name for name in adapters)
    new = {name.split(".")[1] for name in trained if name.startswith("backbone.")} - {"qwen"}
    slots = {"slots"} if head != "discrete" else set()
    assert new == {"feel"} | slots | ({"bins"} if head == "tokens" else set())
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == [] and all(p.grad.isfinite().all() for p in trained.values())


def test_without_adapters_the_language_model_trains_whole(published):
    agent = make_agent(published, "gaussian", lora_rank=0)
    batch = agent.backbone.preprocess(observe(agent.backbone, size=3), INSTRUCTIONS)
    agent.evaluate_actions(batch, torch.zeros(3, 6))[0].sum().backward()
    trained = {n: p for n, p in agent.backbone.named_parameters() if p.requires_grad}
    assert len([n for n in trained if "language_model" in n]) >= 3 * 9 + 2
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    agent = make_agent(published, "gaussian", lora_rank=0)
    for p in agent.backbone.vision_parameters():
        p.requires_grad_(True)
    agent.evaluate_actions(batch, torch.zeros(3, 6))[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.backbone.vision_parameters())


@torch.no_grad()
def test_adapters_add_nothing_at_first_and_reach_no_eye(published):
    backbone = load(published)
    batch = backbone.preprocess(observe(backbone), INSTRUCTIONS)
    before = backbone(batch)
    add_lora(backbone, 4)
    assert all(x.equal(y) for x, y in zip(backbone(batch), before, strict=True))
    assert backbone.config["lora"]["lora_alpha"] == 8
    assert not any("lora_" in name for name, _ in backbone.qwen.model.visual.named_modules())


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
def test_eight_moves_begin_as_what_the_model_would_say(tmp_path, checkpoints, tie):
    """The logits of the actions are those that the language model gives to their words at the prompt's end,
    also where its head is not its embedding."""
    published = checkpoints["qwen2_vl"]
    if not tie:
        model = write_checkpoint(tmp_path, "qwen2_vl", tie)
        published = SimpleNamespace(folder=tmp_path, model=model)
    agent = make_agent(published, "discrete", chunk=1, lora_rank=0)
    assert sum(p.requires_grad for p in agent.backbone.qwen.lm_head.parameters()) == tie
    obs = observe(agent.backbone)
    batch = agent.backbone.preprocess(obs, INSTRUCTIONS)
    ids = [tiny_tokenizer().token_to_id(word) for word in robosuite.MOVES]
    hidden = full_forward(published, agent.backbone, batch, obs["image"])[:, -1]
    wanted = published.model.lm_head(hidden)[:, ids]
    action_hidden, prompt_hidden = agent.backbone(batch)
    assert action_hidden[:, 0].equal(prompt_hidden) and len(set(ids)) == 8 and wanted.std() > 0.2
    close(agent.head(agent.backbone, action_hidden)[:, 0], wanted / 1.3, 2e-5)


@torch.no_grad()
def test_a_chunk_of_moves_begins_at_the_prompts_end(checkpoints):
    agent = make_agent(checkpoints["qwen3_vl"], "discrete", chunk=3, lora_rank=0)
    batch = agent.backbone.preprocess(observe(agent.backbone), INSTRUCTIONS)
    action_hidden, prompt_hidden = agent.backbone(batch)
    assert action_hidden.shape == (4, 3, 24) and len(agent.backbone.slots) == 2
    assert action_hidden[:, 0].equal(prompt_hidden) and not action_hidden[:, 1].allclose(prompt_hidden)
    assert agent.get_action_and_value(batch)[0].shape == (4, 3)


@torch.no_grad()
def test_bfloat16_is_near(published):
    both = [load(published, dtype=dtype) for dtype in ("float32", "bfloat16")]
    found = [x(x.preprocess(observe(x), INSTRUCTIONS))[0] for x in both]
    assert found[1].dtype == torch.float32 and (found[0] - found[1]).abs().mean() < 0.1 * found[0].std()


def test_a_checkpoint_holds_what_is_in_no_file_of_the_base(checkpoints):
    """Adapters and new parts; the base, and its head that is its embedding, are in its own files."""
    agent = make_agent(checkpoints["qwen2_vl"], "tokens")
    agent.backbone.moved = set()
    stored = {name for name in stored_weights(agent) if name.startswith("backbone.")}
    new = {f"backbone.{name}" for name in ("feel.weight", "feel.bias", "slots", "bins.weight")}
    assert new <= stored and all("lora_" in name for name in stored - new) and len(stored) == 4 + 42


# --- bad input


def change(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def retensor(folder, edit):
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def drop_word(folder):
    """A tokenizer that does not know a picture's token."""
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|image_pad|>", "<|picture|>"))


SHARD = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "qwen2_vl"'), "config.json"),
    "another model": (lambda f: change(f, "config.json", model_type="qwen3_vl_moe"), "is a qwen3_vl_moe"),
    "a config's kind": (lambda f: change(f, "config.json", hidden_size="wide"), "config.json is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is missing"),
    "another tokenizer": (drop_word, "tokenizer.json of"),
    "no weights": (lambda f: [x.unlink() for x in f.glob("model*")], "missing, truncated or damaged"),
    "a shard less": (lambda f: (f / SHARD).unlink(), "missing, truncated or damaged"),
    "half a shard": (lambda f: (f / SHARD).write_bytes(b"12345678"), "missing, truncated or damaged"),
    "a tensor more": (lambda f: retensor(f, lambda t: t.update(new=torch.zeros(1))), "such as new"),
    "a tensor less": (lambda f: retensor(f, lambda t: t.pop(sorted(t)[0])), "that do not fit, such as"),
    "a shape": (lambda f: change(f, "config.json", vocab_size=81), "that do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_one_sentence(tmp_path, what):
    write_checkpoint(tmp_path / "q", "qwen2_vl")
    spoil, said = BAD[what]
    spoil(tmp_path / "q")
    with pytest.raises(UserError) as caught:
        qwen.build(path=str(tmp_path / "q")).preprocess(
            dict(image=np.zeros((1, 1, 56, 56, 3), np.uint8), proprio=np.zeros((1, 8)), task=[0]), ["lift it"]
        )
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_family_is_found_by_config_or_name(tmp_path, published):
    assert family_of(str(published.folder)) == "qwen"
    for name in ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"):
        assert family_of(name) == "qwen"
    assert family_of("lerobot/pi0_base") == "pi0" and family_of("openvla/openvla-7b") == "openvla"
    assert family_of("Qwen/Qwen2-7B") == "openvla"  # a language model that sees nothing
    for text in ('{"model_type": "qwen2"}', "[]", "{", '{"model_type": null}'):
        (tmp_path / "config.json").write_text(text)
        assert family_of(str(tmp_path)) == "openvla"


# --- sizes and memory


def full_size(folder, family, **config):
    eye, text, *_ = FULL[family]
    write_config(folder, family, eye, text | dict(vocab_size=151936))
    return build_backbone(str(folder), device="meta", **config)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_at_full_size(tmp_path, family):
    model = full_size(tmp_path, family, chunk=1, action_dim=1, head="discrete").qwen
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    *_, whole, eye, adapters = FULL[family]
    assert abs(count(model) - whole) < 1 and abs(count(model.model.visual) - eye) < 1
    weights, update = qwen.memory_needed(model, "bfloat16", 4, 32, 1, 224, False)
    assert weights == 2e6 * count(model) and 18e6 * adapters < update < 18e6 * adapters + 4 * 0.6e9
    everything = qwen.memory_needed(model, "float32", 4, 0, 1, 224, False)[1]
    assert everything > 12e6 * (whole - eye)
    assert qwen.memory_needed(model, "float32", 4, 0, 1, 224, True)[1] > everything + 12e6 * eye
    backbone = full_size(tmp_path, family)
    with torch.device("meta"):
        add_lora(backbone, 32)
    found = sum(p.numel() for n, p in backbone.named_parameters() if "lora_" in n) / 1e6
    assert abs(found - adapters) < 0.06


def test_too_little_memory_is_said_before_loading(checkpoints, monkeypatch):
    monkeypatch.setattr("common.backbones.available_memory", lambda: 4.5e9)
    with pytest.raises(UserError, match="4.4 GB for its weights and 1.0 GB for an update, and cpu has 4.5"):
        check_memory("x", torch.device("cpu"), 4.4e9, 1e9)
    monkeypatch.setattr("common.backbones.available_memory", lambda: 10_000)
    monkeypatch.setattr(qwen, "read_weights", lambda *_: pytest.fail("a download"))
    with pytest.raises(UserError, match="GB free; use another device, or --backbone tiny"):
        load(checkpoints["qwen2_vl"])


@pytest.mark.parametrize(("family", "lora_rank"), [("qwen2_vl", 4), ("qwen2_5_vl", 0), ("qwen3_vl", 4)])
def test_the_estimate_of_an_update_is_near_what_it_keeps(tmp_path, family, lora_rank):
    """Of adapters, and of all weights, where the vision part's blocks count too."""
    text = TEXT | dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    eye = EYES[family] | dict(depth=6, num_heads=2)
    eye |= {"qwen2_vl": dict(hidden_size=128), "qwen2_5_vl": dict(hidden_size=96, intermediate_size=256)}.get(
        family, {}
    )
    eye |= {} if family == "qwen2_vl" else dict(out_hidden_size=128)
    write_config(tmp_path, family, eye, text | (dict(head_dim=16) if family == "qwen3_vl" else {}))
    config = json.loads((tmp_path / "config.json").read_text())
    if family != "qwen3_vl":
        config["rope_scaling"]["mrope_section"] = [8, 12, 12]  # of heads of 64
        (tmp_path / "config.json").write_text(json.dumps(config))
    Model, kept = qwen.FAMILIES[family][0], {}
    model = Model(Model.config_class.from_pretrained(tmp_path)).float()
    settings = dict(chunk=1, action_dim=1, proprio_dim=5, head="discrete", dtype="float32", name="qwen")
    backbone = qwen.Qwen(settings, model, lambda text: [])
    prompt = [5] * qwen.PROMPT + [backbone.image_id] * 36
    backbone.encode_prompt = lambda *_: [*prompt[::-1], 0, 5]
    if lora_rank:
        add_lora(backbone, lora_rank)
    obs = dict(image=np.zeros((3, 1, 12 * backbone.patch, 12 * backbone.patch, 3), np.uint8))
    batch = backbone.preprocess(obs | dict(proprio=np.zeros((3, 5)), task=[0, 0, 0]), ["a"])
    weights = {p.data_ptr() for p in backbone.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backbone(batch)
    found = sum(x.untyped_storage().nbytes() for x in kept.values())
    side = 12 * backbone.patch
    plain = Model(Model.config_class.from_pretrained(tmp_path))
    update = qwen.memory_needed(plain, "float32", 3, lora_rank, 1, side, None)[1]
    update -= qwen.memory_needed(plain, "float32", 1e-9, lora_rank, 1, side, None)[1]
    assert update == pytest.approx(found, rel=0.25)


# --- command lines

FEW = EVAL.replace("--eval-episodes 5 --eval-envs 3", "--eval-episodes 2 --eval-envs 2")
QWEN = f"{FEW} --chunk 3 --eval-freq 0 --save-freq 1"
SHORT = "--update-epochs 2 --minibatch-size 6 --micro-batch-size 4 --learning-rate 1e-3 --num-envs 4"
PPO = f"{SHORT} --num-steps 2 --critic-warmup 0 --policy-warmup 0"
TABLETOP = f"{QWEN} {PPO} --total-timesteps 40 --tasks lift"
GRPO = f"{QWEN} {SHORT} --group-size 2 --num-groups 1 --total-timesteps 100 --max-steps 6"
GRPO += " --accuracy-low 0 --accuracy-high 1 --tasks lift"
BC = f"{QWEN} --tasks lift --num-demos 2 --gradient-steps 3 --batch-size 8 --warmup-steps 1"


def read(script, *flags):
    return read_flags(words(*flags), script.Args, script.PRESETS, script.__name__)[0]


def test_the_published_recipe_is_the_preset(checkpoints):
    command = "--env robosuite --tasks PickPlaceCan --cameras wrist --actions discrete --lora-rank 16"
    for name in (checkpoints["qwen3_vl"].folder, "Qwen/Qwen2-VL-2B-Instruct"):
        args = read(ppo_vla, command, f"--backbone {name}")
        found = (args.learning_rate, args.update_epochs, args.minibatch_size, args.entropy_coef, args.gamma)
        assert found == (3e-5, 4, 4, 0.01, 0.99) and args.num_envs * args.num_steps == 128
        found = (args.clip_low, args.clip_high, args.value_coef, args.gae_lambda, args.temperature)
        assert found == (0.2, 0.2, 0.5, 0.95, 1.0) and args.head == "discrete" and args.chunk == 1
        assert args.total_timesteps == 100_000 and args.lora_rank == 16
        assert read(grpo_vla, command, f"--backbone {name}").learning_rate == 3e-5
        assert read(bc_warmup, command, f"--backbone {name}").chunk == 1
    assert read(ppo_vla, "--backbone qwen").entropy_coef == 0.01


@pytest.mark.parametrize("family", ["qwen2_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_a_stopped_run_with_adapters_goes_on_bit_identically(tmp_path, monkeypatch, checkpoints, family):
    base = f"{TABLETOP} --backbone {checkpoints[family].folder} --lora-rank 2 --output-dir {tmp_path}"
    run(ppo_vla, base, "--run-name whole")
    log = scalars(tmp_path / "whole")
    assert log["policy/first_ratio_error"][0][1] < 1e-5 and log["policy/approx_kl"][0][1] > 0
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 2)
    assert call(ppo_vla, base, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    names = [name for name in load_checkpoint(tmp_path / "whole")["agent"] if name.startswith("backbone.")]
    assert len([name for name in names if "lora_" not in name]) == 4 and len(names) == 4 + 42
    assert load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    run(ppo_vla, FEW, f"--evaluate --checkpoint {tmp_path}/whole --output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "whole")["final"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_vla, grpo_vla])
def test_imitation_then_the_rest(tmp_path, checkpoints, script):
    base = f"--output-dir {tmp_path}"
    folder = checkpoints["qwen2_5_vl"].folder
    run(bc_warmup, BC, f"{base} --backbone {folder} --lora-rank 2 --run-name warmup")
    flags = TABLETOP if script is ppo_vla else GRPO
    run(script, flags, f"{base} --checkpoint {tmp_path}/warmup --run-name rl")
    assert scalars(tmp_path / "rl")["policy/first_ratio_error"][0][1] < 1e-5
    assert results(tmp_path / "rl")["initial"] == results(tmp_path / "warmup")["final"]


@dataclass
class NoFlags:
    """Of the world below."""


class MovesEnv(ReachEnv):
    """Four moves in the plane, which have names."""

    action_names = robosuite.MOVES[:4]
    active_dims = np.ones(1, bool)

    def __init__(self, split="train"):
        super().__init__(split)
        self.action_space = gymnasium.spaces.Discrete(4)

    def advance(self, action):
        return super().advance(((1, 0), (-1, 0), (0, 1), (0, -1))[action])


@pytest.fixture
def moves(monkeypatch):
    world = ModuleType("moves_world")
    world.Args, world.make = NoFlags, MovesEnv
    monkeypatch.setitem(sys.modules, "moves_world", world)
    monkeypatch.setitem(WORLDS, "moves", "moves_world")


@pytest.mark.parametrize("names", [robosuite.MOVES, ("up", "down", "left", 4)])
def test_a_world_must_name_each_of_its_actions(monkeypatch, moves, names):
    monkeypatch.setattr(MovesEnv, "action_names", names)
    done = call(ppo_vla, "--env moves --head discrete --num-workers 0 --device cpu")
    assert done.code == 2 and "action_names must be a word for each action" in done.err


@pytest.mark.parametrize("flags", ["--lora-rank 2", "--chunk 2", "--train-vision"])
def test_ppo_trains_named_moves(tmp_path, moves, checkpoints, flags):
    few = f"--env moves --head discrete {PPO} --eval-episodes 2 --eval-envs 2 --num-workers 0 --device cpu"
    few += f" --seed 3 --total-timesteps 20 --eval-freq 0 --save-freq 1 --output-dir {tmp_path} {flags}"
    run(ppo_vla, few, f"--backbone {checkpoints['qwen3_vl'].folder} --run-name r")
    log = scalars(tmp_path / "r")
    assert log["policy/first_ratio_error"][0][1] < 1e-5 and log["policy/approx_kl"][0][1] > 0
    head = load_checkpoint(tmp_path / "r")["agent"]["head.logits.weight"]
    ids = [tiny_tokenizer().token_to_id(word) for word in robosuite.MOVES[:4]]
    moved = (head - checkpoints["qwen3_vl"].model.lm_head.weight[ids]).abs().max()
    assert 0 < moved < 0.1


@pytest.mark.slow
def test_the_published_command_trains_on_robosuite(tmp_path, monkeypatch, checkpoints):
    if not importlib.util.find_spec("robosuite"):
        pytest.skip("ROBOSUITE IS NOT INSTALLED, THE PUBLISHED COMMAND IS NOT TESTED")
    monkeypatch.setitem(robosuite.TASKS, "PickPlaceCan", (1, 4, "lift it"))
    command = "--env robosuite --tasks PickPlaceCan --cameras wrist --actions discrete --lora-rank 16"
    few = "--num-envs 2 --eval-envs 1 --eval-episodes 1 --num-workers 0 --total-timesteps 30 --device cpu"
    few += f" --num-steps 4 --critic-warmup 0 --size 64 --output-dir {tmp_path} --run-name r"
    run(ppo_vla, command, few, f"--backbone {checkpoints['qwen2_vl'].folder}")
    assert scalars(tmp_path / "r")["policy/first_ratio_error"][0][1] < 1e-5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--backbone {folder} --lora-rank 2 --train-vision", "leave its eye as it is; drop --train-vision"),
        ("--backbone {folder} --head discrete", "use --head tokens, gaussian or flow"),
        ("--backbone {folder}/none", "does not exist"),
        ("--backbone {folder}/..", "has no config.json"),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, checkpoints, flags, said):
    flags = flags.format(folder=checkpoints["qwen2_vl"].folder)
    done = call(ppo_vla, TABLETOP, flags, f"--output-dir {tmp_path} --run-name bad")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
