"""pi0: against transformers' own `forward` and `sample_actions`, with small random checkpoints in LeRobot's
layout, and through the scripts' command lines."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PI0Config, PI0ForConditionalGeneration

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError
from common.backbones import add_lora, build_backbone, family_of, load_weights, pi0, stored_weights

INSTRUCTIONS = ["open the drawer", "put the red cube in the drawer", "lift it"]
WORDS = "open the drawer put red cube in lift it"
GEMMA = dict(model_type="gemma", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
SIZES = dict(
    chunk_size=6, max_state_dim=40, max_action_dim=9,
    vlm_config=dict(
        model_type="paligemma", projection_dim=24, image_token_id=200,
        text_config=GEMMA | dict(hidden_size=24, intermediate_size=32, vocab_size=200),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=16, intermediate_size=20, patch_size=14,
            image_size=28, num_hidden_layers=2, num_attention_heads=2, vision_use_head=False,
        ),
    ),
    dit_config=GEMMA | dict(hidden_size=16, intermediate_size=20),
)  # fmt: skip
SHORT = {
    "model.vlm.language_model.embed_tokens": "model.paligemma_with_expert.paligemma.lm_head",
    "model.dit.embed_tokens": "model.paligemma_with_expert.gemma_expert.lm_head",
    "model.vlm.": "model.paligemma_with_expert.paligemma.model.",
    "model.dit.": "model.paligemma_with_expert.gemma_expert.model.",
    "embed_action_time.": "model.", "action_out_proj": "model.action_out_proj",
}  # fmt: skip


def random_model(seed=0):
    torch.manual_seed(seed)
    model = PI0ForConditionalGeneration(PI0Config(**SIZES))
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def write_checkpoint(folder, state=8, action=7, statistics="processor"):
    """A random checkpoint in LeRobot's layout -> the model that it holds."""
    model, tensors = random_model(), {}
    for name, tensor in model.state_dict().items():
        long, short = next((k, v) for k, v in SHORT.items() if name.startswith(k))
        tensors[short + name.removeprefix(long)] = tensor.contiguous()
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    stats = {}
    for key, n in (("observation.state", state), ("action", action)):
        stats |= {f"{key}.mean": torch.randn(n, generator=generator) / 4}
        stats |= {f"{key}.std": 0.2 + torch.rand(n, generator=generator) / 2}
    if statistics == "buffers":
        for name, tensor in stats.items():
            key, stat = name.rsplit(".", 1)
            part = "unnormalize_outputs" if key == "action" else "normalize_inputs"
            tensors[f"{part}.buffer_{key.replace('.', '_')}.{stat}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if statistics == "processor":
        norm_map = dict(VISUAL="IDENTITY", STATE="MEAN_STD", ACTION="MEAN_STD")
        file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
        step = dict(registry_name="normalizer_processor", config=dict(eps=1e-8, norm_map=norm_map), state_file=file)
        steps = [dict(registry_name="rename_observations_processor", config={}), step]
        (folder / "policy_preprocessor.json").write_text(json.dumps(dict(name="policy_preprocessor", steps=steps)))
        save_file(stats, folder / file)
    own = dict(type="pi0", n_obs_steps=1, dtype="float32", device="cpu", paligemma_variant="gemma_2b", use_amp=False)
    (folder / "config.json").write_text(json.dumps(own | SIZES))
    vocabulary = {"<unk>": 3} | {w: 4 + i for i, w in enumerate(dict.fromkeys(WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
