"""OpenVLA (Kim et al. 2024, arXiv 2406.09246) and OpenVLA-OFT (Kim et al. 2025, arXiv 2502.19645), published
weights without their remote code.

    openvla       [BOS] [visual tokens] [words of the prompt] -> 7 action tokens, one after another, causal
    openvla-oft   [BOS] [visual tokens] [proprio] [words of the prompt] [K*7 zeros] [stop] -> all K*7 at once,
                  every token sees every other; a causal mask here is the silent error that costs 40 points

Parameter names and shapes are the published ones, so that loading is a match of names, published LoRA
adapters fit as they are, and what is saved loads in the published code again. What never runs there (the last
block and the norm of each tower, SigLIP's pooling) is kept for that reason, and never run here either.
"""

import hashlib
import importlib.util
import inspect
import io
import json
import math
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from common import UserError, distributed
from common.action_tokenizer import normalize, unnormalize
from common.backbones import LoraArgs, find_checkpoint, intact
from common.checkpoint import atomic_path
from common.flags import FIXED, KEPT
from common.memory import available_memory

BOS, STOP, SPACE = 1, 2, 29871  # SPACE: the lone word start that training put between "Out:" and the actions
BINS = 256
TOWERS = ("featurizer", "fused_featurizer")
FLOATS = ("F32", "F16", "BF16", "F64")  # safetensors' names
CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
FROM_SCRATCH = False
PROMPT = 35  # tokens of a prompt, about: memory is estimated before there is one
CHECKPOINTS = {  # of a world's data set, where RL on tokens can start: SimpleVLA-RL's, and RL4VLA's warm-up
    "libero_spatial": "Haozhan72/Openvla-oft-SFT-libero-spatial-traj1",
    "libero_object": "Haozhan72/Openvla-oft-SFT-libero-object-traj1",
    "libero_goal": "Haozhan72/Openvla-oft-SFT-libero-goal-traj1",
    "libero_10": "Haozhan72/Openvla-oft-SFT-libero10-traj1",
    "bridge_orig": "gen-robot/openvla-7b-rlvla-warmup",
}
SIZES = dict(  # of openvla-7b; a checkpoint's own follow from its tensors' shapes
    featurizer=dict(dim=1024, depth=24, hidden=4096, head_dim=64, patch=14, patches=256, registers=4),
    fused_featurizer=dict(dim=1152, depth=27, hidden=4304, head_dim=72, patch=14, patches=256, registers=-1),
    text=dict(vocab_size=32064, pad_token_id=32000), padding=64, proprio=0, action_head=0,
)  # fmt: skip


@dataclass
class Args(LoraArgs):
    """The flags of OpenVLA's family."""

    lora_modules: Annotated[tuple[Literal["language_model", "projector", "vision"], ...], FIXED] = (
        "language_model",
    )
    """the parts with adapters"""
    adapter: Annotated[str | None, FIXED] = None
    """start from these LoRA adapters, a folder in PEFT's format"""
    merge_and_save: str | None = None
    """at the end, or with --evaluate, write the merged weights in the published layout here, and evaluate
    them as read from there"""
    family: Annotated[Literal["auto", "openvla", "openvla-oft"], FIXED] = "auto"
    """tokens one after another, or OFT's all at once; auto looks for OFT's traces"""
    unnorm_key: Annotated[str | None, FIXED] = None
    """the data set whose statistics scale the actions, or none; default: the world's, or the only one"""
    statistics: Annotated[str | None, FIXED] = None
    """a dataset_statistics.json in place of the checkpoint's own"""
    load_in_4bit: Annotated[bool, KEPT] = False
    """language model in 4 bits, through bitsandbytes"""
    gradient_checkpointing: bool = False
    """recompute each block in the backward pass: a third more time, far less memory"""

    def check(self):
        """The world's published checkpoint is a 7B one: say so before anything is loaded."""
        if self.backbone == "openvla" and self.device == "auto" and not torch.cuda.is_available():
            raise UserError(
                f"--env {self.env} runs OpenVLA 7B, which needs a CUDA GPU, and PyTorch finds none here; for "
                "a small policy from scratch use --backbone tiny, or insist with --device cpu."
            )
        if self.collect and self.merge_and_save:
            raise UserError("--merge-and-save does nothing with --collect; merge with --evaluate.")


# --- pictures: what PIL and TensorFlow do to them, batched, on any device


def cubic(x):
    """Keys' kernel with a = -0.5, of support 2."""
    x = x.abs()
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)


def lanczos3(x):
    return torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)


def resize_weights(source, target, kernel, device):
    """Antialiased resampling of a line, as a matrix (target, source), float64, of rows that add up to 1.

    Half-pixel centres; the kernel is as much wider as the line shrinks, and cut off at the ends.
    """
    centre = (torch.arange(target, dtype=torch.float64, device=device) + 0.5) * (source / target)
    place = torch.arange(source, dtype=torch.float64, device=device) + 0.5
    weights = kernel((place - centre[:, None]) / max(source / target, 1.0))
    return weights / weights.sum(1, keepdim=True)


def resize_bicubic(image, size):
    """uint8 (..., H, W) -> (..., size, size): PIL's BICUBIC, bit for bit unless both sides shrink and H > W.

    Its weights have 22 bits, and it rounds between the passes; the order is Pillow 13's.
    """
    for axis in (-2, -1) if image.shape[-2] > size >= image.shape[-1] else (-1, -2):
        if image.shape[axis] != size:
            weights = resize_weights(image.shape[axis], size, cubic, image.device) * 2**22
            weights = weights.sign() * (weights.abs() + 0.5).floor()
            x = image.movedim(axis, -1).double() @ weights.T  # exact: integers below 2**53
            image = ((x + 2**21) / 2**22).floor().clamp(0, 255).to(torch.uint8).movedim(-1, axis)
    return image


def resize_lanczos(image, size):
    """uint8 (..., H, W) -> (..., size, size): tf.image.resize(method="lanczos3", antialias=True), rounded."""
    rows, columns = (resize_weights(n, size, lanczos3, image.device) for n in image.shape[-2:])
    return (rows @ image.double() @ columns.T).round().clamp(0, 255).to(torch.uint8)


def crop_centre(image, area=0.9):
    """uint8 (..., S, S) -> its centre, of this share of its area, bilinearly scaled up to S again, corners
    on corners: tf.image.crop_and_resize and convert_image_dtype (times 255.5, truncated)."""
    size, side = image.shape[-1], area**0.5
    grid = torch.arange(size, dtype=torch.float64, device=image.device)
    place = grid * side + (1 - side) / 2 * (size - 1)
    weights = (1 - (grid - place[:, None]).abs()).clamp(min=0)
    return (weights @ image.double() @ weights.T / 255 * 255.5).clamp(0, 255).to(torch.uint8)


def jpeg(image):
    """uint8 (H, W, 3) array -> what JPEG at quality 95 makes of it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(file))


# --- modules, with timm's and the published names


class InItsInputsDtype:
    """A norm in 16 bits, as published: CUDA's autocast (the CPU's does not) would cast its input to float32
    and return that, for every layer after it to cast again. The kernels add up in float32 anyway."""

    def forward(self, x):
        with torch.autocast("cuda", enabled=False):
            return super().forward(x)


class LayerNorm(InItsInputsDtype, nn.LayerNorm):
    pass


class RMSNorm(InItsInputsDtype, nn.RMSNorm):
    pass


class MLP(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact GELU, here as everywhere


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim, self.qkv, self.proj = head_dim, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return x * self.scale_factor


class Block(nn.Module):
    def __init__(self, dim, hidden, head_dim, scaled):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim, eps=1e-6), Attention(dim, head_dim)
        self.norm2, self.mlp = LayerNorm(dim, eps=1e-6), MLP(dim, hidden, dim)
        self.ls1, self.ls2 = (LayerScale(dim) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling: stored, never run."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm, self.mlp = LayerNorm(dim, eps=1e-6), MLP(dim, hidden, dim)


class Tower(nn.Module):
    """A ViT: DINOv2 with registers or, with registers -1, SigLIP."""

    def __init__(self, dim, depth, hidden, head_dim, patch, patches, registers):
        super().__init__()
        if registers >= 0:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            self.reg_token = nn.Parameter(torch.empty(1, registers, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, patches, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList(Block(dim, hidden, head_dim, registers >= 0) for _ in range(depth))
        self.norm = LayerNorm(dim, eps=1e-6)
        if registers < 0:
            self.attn_pool = AttentionPool(dim, hidden)
        self.prefix = registers + 1

    def forward(self, pixels, run):
        """(B, 3, S, S) -> (B, patches, dim), the residual stream after the last but one block."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix:
            x = torch.cat([torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1), x], 1)
        for block in self.blocks[:-1]:
            x = run(block, x)
        return x[:, self.prefix :]


class Projector(MLP):
    def __init__(self, vision, width):
        super().__init__(vision, 4 * vision, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x):
        return self.fc3(F.gelu(super().forward(x)))


class ResidualMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ffn = nn.Sequential(LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x):
        return x + self.ffn(x)


class L1Head(nn.Module):
    """OFT's regression head: hidden states of the A tokens of an action (B, K, A*D) -> actions (B, K, A)."""

    def __init__(self, width, action_dim, blocks=2):
        super().__init__()
        self.layer_norm1 = LayerNorm(action_dim * width)
        self.fc1 = nn.Linear(action_dim * width, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualMLP(width) for _ in range(blocks))
        self.layer_norm2, self.fc2 = LayerNorm(width), nn.Linear(width, action_dim)

    def forward(self, x):
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


# --- the model


class OpenVLA(nn.Module):
    """See the module and `build`. Hidden states and logits come out in float32."""

    has_attention = own_critic = False
    has_files = True
    lora_alpha = 16  # OpenVLA's and OFT's, at rank 32

    def __init__(self, config, sizes, tokenize, statistics):
        super().__init__()
        self.config, self.tokenize, self.statistics = config, tokenize, statistics
        self.chunk, self.action_dim = config["chunk"], config["action_dim"]
        self.autoregressive = config["family"] == "openvla"
        text = LlamaConfig(**sizes["text"], attn_implementation="sdpa")
        width = self.hidden_size = text.hidden_size
        towers = {name: Tower(**sizes[name]) for name in TOWERS}
        self.vision_backbone = nn.ModuleDict(towers)
        self.projector = Projector(sum(sizes[name]["dim"] for name in towers), width)
        self.language_model = LlamaForCausalLM(text)
        llama, eps = self.language_model.model, text.rms_norm_eps
        llama.norm = RMSNorm(width, eps)  # the same function; on a GPU in one kernel instead of six
        for layer in llama.layers:
            layer.input_layernorm, layer.post_attention_layernorm = (RMSNorm(width, eps) for _ in range(2))
        self.proprio_projector = MLP(sizes["proprio"], width, width) if sizes["proprio"] else None
        self.action_head = L1Head(width, sizes["action_head"]) if sizes["action_head"] else None
        # the 256 last ids before the vocabulary's padding are the actions; the first is bin 0, a = +1
        self.pad_id, self.first_id = text.pad_token_id, text.vocab_size - sizes["padding"] - BINS
        self.image_size = int(sizes["featurizer"]["patches"] ** 0.5) * sizes["featurizer"]["patch"]
        self.is_loaded_in_4bit = config["load_in_4bit"]  # peft asks
        self.prompts, self.checkpointing = {}, False  # checkpointing: recompute each block in the backward
        self.register_buffer("pixel_mean", torch.empty(6, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.empty(6, 1, 1), persistent=False)

    @property
    def lora_targets(self):
        """The linear layers that run, of the parts that config["lora_modules"] names, as one expression."""
        language = r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
        parts = {"language_model": language, "projector": r"projector\.fc[123]"}
        blocks = {name: range(len(tower.blocks) - 1) for name, tower in self.vision_backbone.items()}
        parts["vision"] = "|".join(
            rf"vision_backbone\.{name}\.blocks\.({'|'.join(map(str, used))})\.(attn\.(qkv|proj)|mlp\.fc[12])"
            for name, used in blocks.items()
        )
        return "|".join(parts[name] for name in self.config["lora_modules"])

    def vision_parameters(self):
        return list(self.vision_backbone.parameters())

    def layers(self):
        blocks = [block for tower in self.vision_backbone.values() for block in tower.blocks]
        return [*blocks, *self.language_model.model.layers]

    def encode_prompt(self, instruction):
        text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
        ids = [BOS, *self.tokenize(text)]
        return ids if ids[-1] == SPACE else [*ids, SPACE]

    @torch.no_grad()
    def preprocess(self, obs, instructions):
        """obs as in `common.envs` -> batch: image uint8 (B, cameras, 3, S, S) as the towers see it,
        input_ids (B, L) padded on the left, proprio (B, P) normalised where the model takes it, and length
        (B,) only where the instructions differ in length."""
        device, key = self.pixel_mean.device, tuple(instructions)
        if key not in self.prompts:
            rows = [self.encode_prompt(text) for text in instructions]
            lengths = [len(row) for row in rows]
            rows = [[self.pad_id] * (max(lengths) - len(row)) + row for row in rows]
            self.prompts[key] = {"input_ids": torch.tensor(rows, device=device)}
            if min(lengths) < max(lengths):
                self.prompts[key]["length"] = torch.tensor(lengths, device=device)
        task = torch.as_tensor(obs["task"], device=device)
        batch = {name: table[task] for name, table in self.prompts[key].items()}
        if self.proprio_projector is not None:
            batch["proprio"] = torch.as_tensor(obs["proprio"], device=device, dtype=torch.float32)
            if self.statistics:
                q01, q99 = (self.statistics["proprio"][q] for q in ("q01", "q99"))
                batch["proprio"] = normalize(batch["proprio"], q01, q99, [True] * len(q01))
        image, size = obs["image"], self.image_size  # in the host's memory where it is `stored`
        stored = self.config["libero"] and image.shape[2:4] != (size, size)  # as the training data were
        if stored:
            with ThreadPoolExecutor() as pool:
                flat = list(pool.map(jpeg, np.asarray(image).reshape(-1, *image.shape[2:])))
            image = np.stack(flat).reshape(image.shape)
        image = torch.as_tensor(image, device=device).permute(0, 1, 4, 2, 3)
        image = (resize_lanczos if stored else resize_bicubic)(image, size)
        batch["image"] = crop_centre(image) if self.config["libero"] else image.contiguous()
        return batch

    def _autocast(self):  # for adapters in float32 among weights in bfloat16
        device = self.pixel_mean.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config["dtype"] == "bfloat16")

    def _run(self, module, x, **inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False, **inputs)
        return module(x, **inputs)

    def encode_vision(self, batch):
        """-> the patch features of both towers (B, cameras*patches, 2176), None"""
        image, dtype = batch["image"], self.vision_backbone["featurizer"].pos_embed.dtype
        pixels = image.flatten(0, 1).float() / 255
        pixels = (torch.cat([pixels, pixels], 1) - self.pixel_mean) / self.pixel_std
        halves = zip(self.vision_backbone.values(), pixels.to(dtype).split(3, 1), strict=True)
        with self._autocast():
            features = torch.cat([tower(half, self._run) for tower, half in halves], -1)
        return features.to(dtype).unflatten(0, image.shape[:2]).flatten(1, 2), None

    def _decode(self, x, mask, positions, cache=None):
        """Llama's layers, without the final norm. mask=None where nothing is padded: then SDPA is flash."""
        llama = self.language_model.model
        inputs = {"attention_mask": mask, "is_causal": self.autoregressive, CACHE: cache}
        inputs["position_embeddings"] = llama.rotary_emb(x, positions)
        for layer in llama.layers:
            x = self._run(layer, x, **inputs)
        return x

    def _sequence(self, batch, vision, tail):
        """-> inputs (B, S, D), keep (B, S) or None, positions (B or 1, S), index of the last prompt token.

        Wherever the batch has its pads, they are moved between the visual tokens and the words, so that the
        prompt ends at one index; they take no position, and nothing looks at them.
        """
        ids, embed, keep = batch["input_ids"], self.language_model.model.embed_tokens, None
        bos, words = ids.new_full((len(ids), 1), BOS), ids[:, 1:]
        if "length" in batch:
            shortest, longest = torch.stack(batch["length"].aminmax()).tolist()
            keep = (ids != self.pad_id) & (ids != BOS)
            order = keep.argsort(dim=1, stable=True)[:, ids.shape[1] - longest + 1 :]
            words, keep = ids.gather(1, order), keep.gather(1, order) if shortest < longest else None
        vision = self.encode_vision(batch)[0] if vision is None else vision
        parts = [embed(bos), self.projector(vision), embed(words), tail]
        if self.proprio_projector is not None:
            proprio = batch["proprio"].to(self.proprio_projector.fc1.weight.dtype)
            parts.insert(2, self.proprio_projector(proprio)[:, None])
        x = torch.cat([part.to(tail.dtype) for part in parts], 1)
        size, after = x.shape[1], tail.shape[1]
        if keep is None:
            return x, None, torch.arange(size, device=x.device)[None], size - after - 1
        keep = F.pad(keep, (size - after - keep.shape[1], after), value=True)
        return x, keep, keep.cumsum(1) - 1, size - after - 1

    def _mask(self, keep, rows):
        """keep (B, S) -> (B, 1, rows, S) bool: what the last `rows` may look at, or None for SDPA's own"""
        if keep is None:
            return None
        mask = keep[:, None, None].expand(-1, 1, rows, -1)
        past = mask[0, 0].new_ones(mask.shape[2:]).tril(keep.shape[1] - rows)
        return mask & past if self.autoregressive else mask

    def _tail(self, ids, actions):
        """What follows the prompt, embedded: the actions' tokens, or OFT's zeros and stop token."""
        embed = self.language_model.model.embed_tokens
        if self.autoregressive:
            return embed(actions + self.first_id)
        zeros = embed.weight.new_zeros(len(ids), self.chunk * self.action_dim, self.hidden_size)
        return torch.cat([zeros, embed(ids.new_full((len(ids), 1), STOP))], 1)

    def forward(self, batch, vision=None, actions=None):
        """actions (B, K*A), slice indices, are what an autoregressive model conditions on (teacher forcing);
        without them it returns the first position alone."""
        ids = batch["input_ids"]
        tail = self._tail(ids, ids[:, :0] if actions is None else actions[:, :-1])
        with self._autocast():
            x, keep, positions, last = self._sequence(batch, vision, tail)
            x = self._decode(x, self._mask(keep, x.shape[1]), positions)
            # an output predicts the token after it, also in OFT: the first action's is at the prompt's end
            hidden = self.language_model.model.norm(x[:, last : last + self.chunk * self.action_dim])
        return hidden.float(), hidden[:, 0].float()

    @torch.no_grad()
    def generate(self, batch, draw, vision=None):
        """Sample the K*A tokens one after another, the batch at once, over a cache of keys and values.

        draw: hidden (B, 1, D) -> slice indices (B, 1). -> actions (B, K*A), and `forward`'s two for them.
        """
        ids, cache, hidden, actions = batch["input_ids"], DynamicCache(), [], []
        with self._autocast():
            x, keep, positions, _ = self._sequence(batch, vision, self._tail(ids, ids[:, :0]))
            for i in range(self.chunk * self.action_dim):
                if i:
                    x, positions = self._tail(ids, actions[-1]), positions[:, -1:] + 1
                    keep = None if keep is None else F.pad(keep, (0, 1), value=True)
                x = self._decode(x, self._mask(keep, x.shape[1]), positions, cache)
                hidden.append(self.language_model.model.norm(x[:, -1:]).float())
                actions.append(draw(hidden[-1]))
        return torch.cat(actions, 1), torch.cat(hidden, 1), hidden[0][:, 0]

    def action_logits(self, action_hidden):
        """over the 256 action tokens alone; the head's other 31808 rows are not multiplied"""
        head, ids = self.language_model.lm_head, slice(self.first_id, self.first_id + BINS)
        if isinstance(head, BaseTunerLayer):  # published adapters have one here
            with self._autocast():
                return head(action_hidden.to(head.weight.dtype)).float()[..., ids]
        return F.linear(action_hidden, head.weight[ids].float())

    def action_mean(self, action_hidden):
        """OFT's L1 head: (B, K*A, D) -> (B, K*A) in about [-1, 1], not clipped"""
        x = action_hidden.unflatten(1, (self.chunk, -1)).flatten(2).to(self.action_head.fc1.weight.dtype)
        with self._autocast():
            return self.action_head(x).flatten(1).float()

    def to_env(self, actions):
        """(..., A) in [-1, 1] -> in the units of the data set, the gripper as it is; or LIBERO's. Where the
        world tells what its -1 and 1 are in these units, its own."""
        if self.statistics:
            q = self.statistics["action"]
            mask = q.get("mask", [True] * (self.action_dim - 1) + [False])
            eps = 0.0 if self.autoregressive else 1e-8
            actions = unnormalize(torch.as_tensor(actions), q["q01"], q["q99"], mask, eps)
        if self.config["libero"]:  # the model has 0 for closed and 1 for open, LIBERO +1 and -1
            actions = torch.as_tensor(actions)
            actions = torch.cat([actions[..., :-1], -torch.sign(2 * actions[..., -1:] - 1)], -1)
        if self.config["bounds"] and self.statistics:
            actions = torch.as_tensor(actions)
            low, high = (actions.new_tensor(x) for x in self.config["bounds"])
            actions = 2 * (actions - low) / (high - low) - 1
        return actions

    def from_env(self, actions):
        """The way back: numpy (..., A) in the environment's units -> in [-1, 1], for imitation."""
        if self.config["bounds"] and self.statistics:
            low, high = np.float32(self.config["bounds"])
            actions = low + (actions + 1) / 2 * (high - low)
        if self.config["libero"]:
            actions = np.concatenate([actions[..., :-1], (1 - actions[..., -1:]) / 2], -1)
        if self.statistics:
            q = self.statistics["action"]
            mask = q.get("mask", [True] * (self.action_dim - 1) + [False])
            actions = normalize(torch.as_tensor(actions), q["q01"], q["q99"], mask).numpy()
        return actions

    def check_merge_target(self, folder):
        """-> the folder of the model's own files. UserError where `save_merged(folder)` would overwrite them
        or `folder` cannot be made: for the start of a run, which merges at its end."""
        source = find_checkpoint(self.config["path"])
        if Path(folder).resolve() == source.resolve():
            raise UserError(f"The merged checkpoint would replace its own base {source}; name another.")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}); name another folder.") from error
        return source

    @torch.no_grad()
    def save_merged(self, folder):
        """Write the model in the published layout, adapters added to the weights: the shards, names and small
        files of its source, one shard in memory at a time. Raises UserError, and CheckpointError for a full
        disk."""
        source, folder = self.check_merge_target(folder), Path(folder)
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".model", ".txt", ".py", ".md"):
                with atomic_path(folder / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        published = json.loads((source / "config.json").read_text()) | {"family": self.config["family"]}
        with atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(published, indent=2))
        shards = {}
        for name, (file, _) in read_headers(source).items():
            shards.setdefault(file, []).append(name)
        for file, names in tqdm(shards.items(), desc="merge", unit="shard", disable=None):
            with safe_open(file, "pt") as stored, atomic_path(folder / file.name) as temporary:
                state = {name: self._merge(name, stored).to("cpu").contiguous() for name in names}
                save_file(state, temporary, stored.metadata())
        for name, prefix in EXTRAS.items():
            if (module := getattr(self, name)) is not None:
                state = {prefix + key: tensor.cpu() for key, tensor in module.state_dict().items()}
                target = folder / find_extra(source, name).name
                with atomic_path(target) as temporary, open(temporary, "wb") as file:
                    torch.save(state, file)

    def _merge(self, name, stored):
        """The published tensor `name` and its adapter's part; from the file where memory has 4 bits."""
        module, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        tuned = isinstance(module, BaseTunerLayer)
        weight = getattr(module.base_layer if tuned else module, leaf)
        if not weight.is_floating_point():
            weight = stored.get_tensor(name).to(weight.device)
        if not tuned or leaf != "weight":
            return weight
        return (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)


# --- loading

EXTRAS = {"proprio_projector": "module.", "action_head": "module.model."}  # files of OFT, and DDP's prefixes


def read_json(file):
    """-> the dict that a JSON file holds. UserError for what is none: a pipe would be waited for."""
    with intact(file):
        if not file.is_file():
            raise FileNotFoundError("it does not exist, or is no file")
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, no object")
    return found


def read_headers(folder):
    """-> {name: (shard, shape)} of all tensors. UserError for missing or truncated shards, and for numbers
    that are no floats."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        published = read_json(index)
        with intact(index):
            names = sorted({str(folder / name) for name in published["weight_map"].values()})
    if missing := [Path(name).name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: finish its download.")
    found = {}
    for file in (folder / name for name in names):
        with intact(file), safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                if part.get_dtype() not in FLOATS:
                    raise TypeError(f"{name} is of {part.get_dtype()}, no {', '.join(FLOATS)}")
                found[name] = file, part.get_shape()
    return found


def find_extra(folder, name):
    """OFT's `proprio_projector--N_checkpoint.pt` or `action_head--...`, of the largest N -> Path or None"""
    return max(folder.glob(f"{name}--*.pt"), key=lambda file: (len(file.name), file.name), default=None)


def read_extras(folder):
    """-> {name: state dict} of OFT's extra files that are there. UserError for truncated ones."""
    found = {}
    for name, prefix in EXTRAS.items():
        if file := find_extra(folder, name):
            with intact(file):
                if not file.is_file():
                    raise FileNotFoundError("it is no file")
                state = torch.load(file, weights_only=True, map_location="cpu")
                found[name] = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
                if not all(tensor.is_floating_point() for tensor in state.values()):
                    raise TypeError("it holds other numbers than floats")
    return found


def infer_sizes(shapes, published, extras):
    """As `SIZES` for openvla-7b: text from the config, the rest from the tensors' shapes. Whatever is missing
    or of a wrong type raises its own exception, and what contradicts itself ValueError."""
    sizes = dict(
        text=published["text_config"], padding=published["pad_to_multiple_of"], proprio=0, action_head=0
    )
    text, llama = LlamaConfig(**sizes["text"]), "language_model.model."
    depth = len({key.split(".")[3] for key in shapes if key.startswith(llama + "layers.")})
    if text.num_hidden_layers != depth or text.vocab_size != shapes[llama + "embed_tokens.weight"][0]:
        raise ValueError("text_config has another depth or vocabulary than the tensors")
    if type(sizes["padding"]) is not int or not 0 <= sizes["padding"] < text.vocab_size - BINS:
        raise ValueError(f"pad_to_multiple_of is {sizes['padding']!r}")
    if type(text.pad_token_id) is not int or not 0 <= text.pad_token_id < text.vocab_size:
        raise ValueError(f"pad_token_id is {text.pad_token_id!r}")
    for name, head_dim in zip(TOWERS, (64, 72), strict=True):
        prefix = f"vision_backbone.{name}."
        dim, _, patch, _ = shapes[prefix + "patch_embed.proj.weight"]
        sizes[name] = dict(
            dim=dim, depth=len({key.split(".")[3] for key in shapes if key.startswith(prefix + "blocks.")}),
            hidden=shapes[prefix + "blocks.0.mlp.fc1.weight"][0], head_dim=head_dim, patch=patch,
            patches=shapes[prefix + "pos_embed"][1], registers=shapes.get(prefix + "reg_token", (0, -1))[1],
        )  # fmt: skip
    sides = {math.isqrt(sizes[name]["patches"]) * sizes[name]["patch"] for name in TOWERS}
    counts = {sizes[name]["patches"] for name in TOWERS}
    if len(sides | counts) > 2 or len(counts) > 1 or any(math.isqrt(n) ** 2 != n for n in counts):
        raise ValueError("the towers' patches are of no square picture that both see")
    if "proprio_projector" in extras:
        sizes["proprio"] = extras["proprio_projector"]["fc1.weight"].shape[1]
    if "action_head" in extras:
        sizes["action_head"] = extras["action_head"]["fc2.weight"].shape[0]
    return sizes


def read_statistics(path, folder, published, key, file):
    """Normalisation statistics of the data set `key`, with or without LIBERO's _no_noops; None for "none"."""
    if key == "none":
        return None
    own = folder / "dataset_statistics.json"
    try:
        if (file or own.exists()) and not Path(file or own).is_file():  # a pipe would be waited for
            raise FileNotFoundError("it does not exist, or is no file")
        text = Path(file or own).read_text() if file or own.exists() else "null"
        found = json.loads(text) or published.get("norm_stats") or {}
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, no object by data set")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"The statistics {file or own} cannot be read ({error}).") from error
    key = next(iter(found)) if key is None and len(found) == 1 else key
    suite = str(key).removesuffix("_no_noops")
    for name in (key, suite, f"{suite}_no_noops"):
        if name in found:
            return found[name]
    elsewhere = ""
    if not file and suite.startswith("libero_"):  # SimpleVLA-RL's checkpoints lack what these have
        repository = f"moojink/openvla-7b-oft-finetuned-{suite.replace('_', '-')}"
        try:
            file = huggingface_hub.hf_hub_download(repository, own.name)
        except Exception as error:  # the hub's many ways to say no
            reason = str(error).strip().partition("\n")[0]
            elsewhere = f", and {repository}, which may have it, could not be reached ({reason})"
        else:
            return read_statistics(path, folder, published, key, file)
    raise UserError(
        f"{path} has no statistics of {key!r} but of {', '.join(found) or 'nothing'}{elsewhere}; choose one "
        "of these as --unnorm-key, or name a dataset_statistics.json that has it as --statistics."
    )


def check_statistics(stats, proprio, action_dim):
    """ValueError, or what a wrong type raises, where statistics cannot scale actions of action_dim numbers,
    or, unless it is 0, a proprioception of `proprio`."""
    for name, what, size in (("action", "actions", action_dim), ("proprio", "a proprioception", proprio)):
        if not size:
            continue
        q01, q99 = (np.asarray(stats[name][q], float) for q in ("q01", "q99"))
        mask = stats[name].get("mask", [True] * (size - 1) + [False]) if name == "action" else [True] * size
        if not q01.shape == q99.shape == (len(mask),) or not {type(x) for x in mask} <= {bool}:
            raise ValueError(f"the q01, q99 or mask of its {name} are no lists of one length")
        if not np.isfinite([q01, q99]).all():
            raise ValueError(f"the q01 or q99 of its {name} are not finite")
        # of proprioception a number may be constant, and stays so; such an action could not move anything
        if ((q01 > q99) | ((q01 == q99) & (name == "action")))[mask].any():
            raise ValueError(f"the q01 of its {name} are not below q99")
        if len(q01) != size:
            raise ValueError(f"they are not for {what} of {size} numbers")


def check_preprocessor(found, size):
    """-> means, stds (2, 3), one row a tower. ValueError, or what a wrong type raises, for others, and where
    the pictures are not of `size`."""
    means, stds = (np.asarray(found[name], float) for name in ("means", "stds"))
    if means.shape != (2, 3) or stds.shape != (2, 3):
        raise ValueError("means and stds are not of 2 towers and 3 colours")
    if not np.isfinite([means, stds]).all() or (stds <= 0).any():
        raise ValueError("means or stds are not finite, or no stds")
    if found.get("input_sizes", [[3, size, size]] * 2) != [[3, size, size]] * 2:
        raise ValueError(f"its input_sizes are {found['input_sizes']}, and the towers' pictures {size}")
    return means, stds


def from_flags(args, chunk, action_dim, dataset, proprio_dim, action_bounds, **_):
    """The config that `build` takes, of weights that are not a run's. `--backbone openvla` is the published
    checkpoint of the world's data set."""
    config = dict(
        family=None if args.family == "auto" else args.family, chunk=chunk, head=args.head,
        action_dim=action_dim, proprio_dim=proprio_dim, unnorm_key=args.unnorm_key or dataset,
        statistics=args.statistics,
        libero=bool(dataset and dataset.startswith("libero")), lora_modules=args.lora_modules,
        bounds=action_bounds and [x.tolist() for x in action_bounds],
    )  # fmt: skip
    if args.backbone == "openvla":
        if dataset is None:
            raise UserError(f"OpenVLA has no checkpoint of --env {args.env}; name a folder or a hub id.")
        config["path"] = dataset
    return config


def own_options(args, device, cameras, micro_batch_size, train_vision):
    """What `build` takes that is the run's affair and not the weights'."""
    trains = not (args.evaluate or args.collect)
    adapters_only = args.lora_rank or args.adapter or not trains
    return dict(
        load_in_4bit=args.load_in_4bit, checkpointing=args.gradient_checkpointing, cameras=cameras,
        train_vision=train_vision,
        lora_rank=None if args.adapter else args.lora_rank,
        micro_batch_size=micro_batch_size if trains else 0,
        # Adapters stay in float32; to train every weight in 16 bits would lose Adam's small steps.
        dtype="bfloat16" if device.type == "cuda" and adapters_only else "float32",
    )  # fmt: skip


def build(
    *, path, family=None, chunk=None, action_dim=7, head=None, unnorm_key=None, statistics=None, libero=False,
    lora_modules=("language_model",), dtype="bfloat16", load_in_4bit=False, sizes=None, device="cpu",
    micro_batch_size=0, checkpointing=False, lora_rank=None, cameras=1, train_vision=None, proprio_dim=None,
    bounds=None, **_,
):  # fmt: skip
    """Load a checkpoint straight onto `device`. path: a folder, a hub id, a suite of `CHECKPOINTS`, or
    "random" for random weights.

    family: openvla or openvla-oft; None looks for OFT's traces (a head, its code, its name), and takes a
    folder without any for openvla's: nothing tells it from OFT's with chunk 1, so name the family of those.
    chunk: None for 1 or 8. head: "tokens" is refused where an L1 head was trained instead, "gaussian" where
    tokens come one after another. unnorm_key: the data set whose statistics apply, or "none"; statistics: a
    file in place of the checkpoint's. libero: pictures and gripper as in the published LIBERO evaluation;
    else the published processor. bounds: what an environment's -1 and 1 are in the data set's units, (A,)
    each; None for the same. lora_modules: of language_model, projector, vision. dtype: bfloat16,
    float32. sizes: for "random", what differs from `SIZES`. device "meta" loads nothing.

    proprio_dim: numbers of the world's, None for any. train_vision: False where the towers are frozen.
    checkpointing: recompute each block in the backward pass. With a micro_batch_size, memory must do for an
    update, too: of all weights (lora_rank 0), of adapters, or without what trains (None); see
    `update_memory`. These are the run's affair, and not in `config`. Raises UserError.
    """
    device, loaded, extras, path = torch.device(device), {}, {}, CHECKPOINTS.get(path, path)
    needs = dict(
        load_in_4bit=load_in_4bit, micro_batch_size=micro_batch_size, checkpointing=checkpointing,
        lora_rank=lora_rank, cameras=cameras, train_vision=train_vision,
    )  # fmt: skip
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3]
    if path == "random":
        sizes, stats, oft = SIZES | (sizes or {}), None, chunk != 1

        def tokenize(text):
            return [3 + zlib.crc32(word.encode()) % 31000 for word in text.split()]
    else:
        if path in CHECKPOINTS.values() and device.type != "meta":  # before 15 GB are downloaded
            same = build(path="random", chunk=chunk, lora_modules=lora_modules, dtype=dtype, device="meta")
            check_memory(path, same, device, **needs)
        folder = find_checkpoint(path)
        published = read_json(folder / "config.json")
        known = dict(model_type="openvla", image_resize_strategy="resize-naive", n_action_bins=BINS)
        for name, value in known.items():
            if published.get(name) != value:
                raise UserError(f"{path} has the {name} {published.get(name)!r}; only {value!r} loads here.")
        if (found := published.get("family", "openvla")) not in ("openvla", "openvla-oft"):
            raise UserError(f"{path} has the family {found!r}; known are openvla and openvla-oft.")
        for part, what in (("vision_backbone", "FiLM"), ("noisy_action_projector", "a diffusion head")):
            if any(folder.glob(f"{part}--*.pt")):
                raise UserError(f"{path} uses {what}, which is not built here; give one without.")
        loaded, extras = read_headers(folder), read_extras(folder)
        try:
            sizes = infer_sizes({name: shape for name, (_, shape) in loaded.items()}, published, extras)
        except Exception as error:  # a config of anything: transformers has exceptions of its own
            reason = " ".join(repr(error).split())[:200]
            raise UserError(f"{path} is incomplete, or not laid out as openvla-7b: {reason}.") from error
        stats = read_statistics(path, folder, published, unnorm_key, statistics)

        def tokenize(text):
            return tokenizer.encode(text, add_special_tokens=False).ids

        read_json(file := folder / "tokenizer.json")
        with intact(file):
            tokenizer = Tokenizer.from_file(str(file))
            largest = max(*tokenizer.get_vocab().values(), *tokenize("In: lift it?\nOut:"))
            if largest >= (size := LlamaConfig(**sizes["text"]).vocab_size):
                raise ValueError(f"it has the token {largest}, and the model {size} of them")
        if (file := folder / "preprocessor_config.json").exists():
            found, picture = read_json(file), sizes["featurizer"]
            with intact(file):
                means, stds = check_preprocessor(found, math.isqrt(picture["patches"]) * picture["patch"])

        # The families share one config.json, but where `save_merged` wrote it. OFT shows in its heads, in the
        # code beside it, or in the name.
        texts = [file.read_bytes() for file in folder.glob("*.py") if file.is_file()]
        code = any(b"NUM_ACTIONS_CHUNK" in text for text in texts)
        oft = bool(extras) or code or "oft" in str(published.get("family", Path(path).name.lower()))
    family = family or ("openvla-oft" if oft else "openvla")
    chunk = chunk or (8 if family == "openvla-oft" else 1)
    for wrong, sentence in (
        (family == "openvla" and oft, "is of OpenVLA-OFT: noise under a causal mask; use openvla-oft."),
        (family == "openvla" and (chunk > 1 or head == "gaussian"),
         "emits one action, token after token; use --chunk 1 --head tokens, or the family openvla-oft if it "
         "was trained for that."),
        (head == "tokens" and "action_head" in extras,
         "was trained with an L1 head: its tokens were not, and decode to noise (0 % success); use --head "
         f"gaussian, or a token-trained checkpoint such as {CHECKPOINTS['libero_spatial']}."),
        (sizes["action_head"] not in (0, action_dim), f"is not for actions of {action_dim} numbers."),
        (proprio_dim and sizes["proprio"] not in (0, proprio_dim),
         f"takes a proprioception of {sizes['proprio']} numbers, and here there are {proprio_dim}; drop "
         "--action-history, or give another."),
        (load_in_4bit and not importlib.util.find_spec("bitsandbytes"),
         "cannot be loaded in 4 bits without bitsandbytes; pip install it, or load 16 bits."),
        (load_in_4bit and device.type == "cpu",  # there its layers lose their gradients after an evaluation
         "can be loaded in 4 bits on a GPU only; load 16 bits."),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{path} {sentence}")
    if stats:
        try:
            check_statistics(stats, sizes["proprio"], action_dim)
        except Exception as error:
            reason = " ".join(f"{error}".split()) if type(error) is ValueError else repr(error)
            raise UserError(
                f"The statistics {statistics or unnorm_key or ''} of {path} cannot be used ({reason}); "
                "choose others as --unnorm-key or --statistics."
            ) from error
    config = dict(
        name="openvla", path=str(path), family=family, chunk=chunk, action_dim=action_dim,
        unnorm_key=unnorm_key, statistics=statistics, libero=libero, lora_modules=tuple(lora_modules),
        dtype=dtype, load_in_4bit=load_in_4bit, sizes=sizes if path == "random" else None, bounds=bounds,
    )  # fmt: skip
    with torch.device("meta"), intact(path):
        model = OpenVLA(config, sizes, tokenize, stats)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, state in extras.items():
        loaded |= {f"{name}.{key}": (tensor, list(tensor.shape)) for key, tensor in state.items()}
    wrong = sorted(name for name in loaded.keys() | shapes if loaded.get(name, (0, 0))[1] != shapes.get(name))
    if path != "random" and wrong:
        raise UserError(f"{path} has {len(wrong)} tensors that do not fit, such as {', '.join(wrong[:3])}.")
    model.checkpointing = checkpointing
    if device.type != "meta":
        check_memory(path, model, device, **needs)
        fill(model, shapes, loaded, device)
        for name, values in (("pixel_mean", means), ("pixel_std", stds)):
            setattr(model, name, torch.tensor(values, device=device).reshape(6, 1, 1))
        check_attention(model)
    return model.eval()


def quantized(name, shape):
    """Whether 4 bits are of use to the tensor: the matrices of Llama's layers."""
    return name.startswith("language_model.model.layers.") and len(shape) == 2


def memory_needed(shapes, dtype, load_in_4bit):
    """Bytes of the weights {name: shape}; of 4 bits, with their blocks' scales, 0.52 bytes a number."""
    return sum(
        math.prod(shape) * (0.52 if load_in_4bit and quantized(name, shape) else dtype.itemsize)
        for name, shape in shapes.items()
    )


def update_memory(model, micro_batch_size, checkpointing=False, lora_rank=None, cameras=1, train_vision=None):
    """About how many bytes an update of `model`, on whatever device, holds beside the weights
    -> of what trains, of a micro-batch's activations.

    What trains has its gradient and AdamW's two moments in float32; adapters also themselves, and their
    copies in 16 bits. For the backward, a layer keeps eight tensors of its width (its input, both norms'
    outputs, q, k, v, attention's output, the sum with it) and of its MLP's width Llama four (gate, SiLU, up,
    their product), a tower's block two. Beside that there are gradients, of one layer at a time: one of its
    width, and half as many of its MLP's. With checkpointing there is every layer's input, and the rest of
    one layer at a time. train_vision: False where the towers are frozen, adapters and all.
    """
    llama, trained = model.language_model.config, 0
    vision = train_vision is not False and (lora_rank == 0 or "vision" in model.config["lora_modules"])
    if lora_rank:
        tuned = [m.weight.shape for n, m in model.named_modules() if re.fullmatch(model.lora_targets, n)
                 and (vision or not n.startswith("vision_backbone."))]  # fmt: skip
        trained = 18 * lora_rank * sum(map(sum, tuned))
    elif lora_rank == 0:
        frozen = () if vision else model.vision_parameters()
        trained = 12 * (sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in frozen))
    patches = cameras * model.vision_backbone["featurizer"].pos_embed.shape[1]
    actions = model.chunk * model.action_dim
    tokens = patches + PROMPT + actions + (-1 if model.autoregressive else 1)
    stacks = [(tokens, llama.num_hidden_layers, llama.hidden_size, 4 * llama.intermediate_size)]
    for tower in model.vision_backbone.values() if vision else ():
        fc1, tokens = tower.blocks[0].mlp.fc1, patches + cameras * tower.prefix
        stacks.append((tokens, len(tower.blocks) - 1, fc1.in_features, 2 * fc1.out_features))
    kept = sum(n * depth * (dim if checkpointing else 8 * dim + mlp) for n, depth, dim, mlp in stacks)
    moment = max(n * (dim + mlp // 2 + checkpointing * (7 * dim + mlp)) for n, _, dim, mlp in stacks)
    return trained, getattr(torch, model.config["dtype"]).itemsize * micro_batch_size * (kept + moment)


def check_memory(
    path, model, device, load_in_4bit, micro_batch_size, checkpointing, lora_rank, cameras, train_vision=None
):
    """UserError if `device` has too little free memory for the weights of `model`, which is on the meta
    device, or, where micro_batch_size is not 0, for its update.

    Of torchrun's processes that train all weights each has its part of them and of what trains; while they
    are loaded and in rollouts it has the whole weights beside that, in an update the activations.
    """
    processes = distributed.ranks()[1] if lora_rank == 0 else 1
    shapes, update = {name: tensor.shape for name, tensor in model.state_dict().items()}, 0
    weights = memory_needed(shapes, getattr(torch, model.config["dtype"]), load_in_4bit)
    if micro_batch_size:
        trained, update = update_memory(
            model, micro_batch_size, checkpointing, lora_rank, cameras, train_vision
        )
        if processes > 1:
            trained, update = (weights + trained) / processes, max(0, update - weights)
        update += trained
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if weights + update <= free:
        return
    training = update and weights < free  # else no smaller update is of help
    hints = {
        "a smaller --micro-batch-size (bc_warmup.py: --batch-size)": training and micro_batch_size > 1,
        "--gradient-checkpointing": training and not checkpointing,
        "more processes": training and processes > 1,
        "--lora-rank 32": training and lora_rank == 0,
        "--load-in-4bit": device.type == "cuda" and not load_in_4bit,
        "another device": True,
    }
    needs = f"{weights / 1e9:.1f} GB for its weights"
    needs += f" and {update / 1e9:.1f} GB for an update" if update else ""
    raise UserError(
        f"{path} needs {needs}, and {device} has {free / 1e9:.1f} GB free; use "
        f"{', '.join(hint for hint, fits in hints.items() if fits)}, or --backbone tiny."
    )


@torch.no_grad()
def fill(model, shapes, loaded, device):
    """Move every tensor from its shard to its place on the device, one at a time; random without `loaded`."""
    dtype, path, four = getattr(torch, model.config["dtype"]), model.config["path"], model.is_loaded_in_4bit
    digest, shards = hashlib.sha256(), {}
    for name in tqdm(shapes, desc=f"load {path}", unit="tensor", disable=None):
        parent, _, leaf = name.rpartition(".")
        source = loaded[name][0] if loaded else torch.empty(shapes[name], device=device, dtype=dtype)
        if isinstance(source, Path):
            shard = shards.setdefault(source, None) or safe_open(source, "pt", device=str(device))
            shards[source], source = shard, shard.get_tensor(name)
        elif not loaded and source.ndim > 1:
            source.normal_(0, source.shape[-1] ** -0.5)
        elif not loaded:
            source.fill_(float(leaf != "bias"))
        tensor = source.to(device, dtype, copy=device.type == "cpu")  # a copy has no tie to the file
        if loaded and not tensor.isfinite().all():
            raise UserError(f"{path} has numbers in {name} that are not finite; download it again.")
        digest.update(tensor.flatten()[:8].float().cpu().bfloat16().view(torch.int16).numpy().tobytes())
        module, parameter = model.get_submodule(parent), nn.Parameter(tensor)
        if four and quantized(name, tensor.shape):
            import bitsandbytes as bnb  # an optional package

            kind = dict(compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            module = bnb.nn.Linear4bit(module.in_features, module.out_features, False, **kind)
            parameter = bnb.nn.Params4bit(tensor, requires_grad=False, quant_type="nf4").to(device)
            model.set_submodule(parent, module)
        setattr(module, leaf, parameter)
    model.fingerprint = digest.hexdigest()[:16]
    llama = model.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)  # its buffers are in no file
    for tower in model.vision_backbone.values():
        for part in (tower.blocks[-1], tower.norm, getattr(tower, "attn_pool", tower.norm)):
            part.requires_grad_(False)


@torch.no_grad()
def check_attention(model):
    """UserError if the first token does not see the last where it must, or does where it must not: which mask
    transformers applies when it is given none is its own affair."""
    ids = torch.tensor([[BOS, 5, 6], [BOS, 5, 7]], device=model.pixel_mean.device)
    with model._autocast():
        x = model.language_model.model.embed_tokens(ids)
        x = model._decode(x, None, torch.arange(3, device=ids.device)[None])
    if not x.isfinite().all():
        raise UserError(f"{model.config['path']} computes what is not finite; its config.json is damaged.")
    if x[0, 0].equal(x[1, 0]) != model.autoregressive:
        raise UserError(
            f"This transformers gives {model.config['family']} the wrong attention mask; install the version "
            "in requirements.txt."
        )
