"""pi0 (Black et al. 2024, arXiv 2410.24164) on transformers' classes, with checkpoints in LeRobot's layout.

    prefix   [256 tokens a camera] [BOS] [words of the prompt] [newline]    PaliGemma 3B, sees itself
    suffix   [state] [50 noisy actions]                                      the expert, 300M

The state's token sees the prefix, the actions see all: what the state's token becomes, which the critic
reads, depends on no noise. The prefix goes through PaliGemma once a decision; its keys and values are what
`encode_vision` returns (18 layers, 5 MB a camera in bfloat16), so that while it is frozen, as by default,
only the expert runs in an update. Time is 1 at the noise and 0 at the action.
"""

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import DynamicCache, PI0Config, PI0ForConditionalGeneration
from transformers.models.gemma.modeling_gemma import GemmaModel

from common import UserError
from common.backbones import (
    LoraArgs,
    check_memory,
    find_checkpoint,
    fingerprint,
    intact,
    kind_of,
    read_weights,
)
from common.flags import FIXED

PAD, BOS, NEWLINE = 0, 2, 108  # of PaliGemma's tokenizer
PROMPT = 20  # tokens of a prompt, about: memory is estimated before there is one
CACHE = "cache" if "cache" in inspect.signature(GemmaModel.forward).parameters else "past_key_values"
FROM_SCRATCH = False
EPS = np.float32(1e-8)
NONE = dict.fromkeys(("state", "action"), (torch.zeros(1), torch.ones(1)))  # statistics that do nothing
KEYS = {"state": ("observation.state", "state"), "action": ("action", "actions")}  # LeRobot's, openpi's names


@dataclass
class Args(LoraArgs):
    """The flags of pi0's family."""

    tokenizer: Annotated[str | None, FIXED] = None
    """the folder with PaliGemma's tokenizer.json (google/paligemma-3b-pt-224; its terms must be accepted);
    default: the checkpoint's folder"""
    statistics: Annotated[str | None, FIXED] = None
    """a data set's stats.json (LeRobot) or norm_stats.json (openpi) in place of the checkpoint's own, or none
    for states and actions as they are"""


def owns(path):
    """Whether a checkpoint's folder or hub id is of this family: by its config, or its name on the hub."""
    return "pi0" in kind_of(path)


# --- observations


def resize_with_pad(image, size):
    """uint8 (..., H, W, 3) -> float32 (..., 3, size, size) in [-1, 1], its shape kept, black around it: as
    LeRobot and openpi in PyTorch, bilinear without antialiasing."""
    x = image.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[2:]
    ratio = max(height, width) / size
    inner = int(height / ratio), int(width / ratio)
    x = F.interpolate(x, inner, mode="bilinear", align_corners=False).clamp(0, 1)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    x = F.pad(x, (left, size - inner[1] - left, top, size - inner[0] - top))
    return (x * 2 - 1).unflatten(0, image.shape[:-3])


def read_statistics(path, folder, buffers, file):
    """Mean and standard deviation of "state" and "action", each two float32 tensors; None for "none".

    From `file`, or where LeRobot keeps them: in the files of its processors or, older, in the model's
    `buffers` {name: tensor}. Raises UserError where there are none, and for another normalisation.
    """
    if file == "none":
        return None
    found, where = {}, file or path
    if file:
        with intact(file):
            read = json.loads(Path(file).read_text())
            read = read.get("norm_stats", read)
            found = {
                f"{k}.{n}": torch.tensor(x[n]) for k, x in read.items() for n in ("mean", "std") if n in x
            }
    else:
        for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
            if not (folder / name).is_file():
                continue
            with intact(folder / name):
                steps = [x for x in json.loads((folder / name).read_text())["steps"] if x.get("state_file")]
                modes = [mode for x in steps for kind, mode in x["config"].get("norm_map", {}).items()
                         if kind in ("STATE", "ACTION")]  # fmt: skip
                for step in steps:
                    found |= load_file(folder / step["state_file"])
            if other := set(modes) - {"MEAN_STD"}:
                raise UserError(f"{path} normalises by {other.pop()}; only MEAN_STD is built here.")
        for name, tensor in buffers.items():  # normalize_inputs.buffer_observation_state.mean
            part, stat = name.split(".buffer_")[1].split(".")
            found[f"{part.replace('observation_', 'observation.')}.{stat}"] = tensor
    stats = {}
    for part, names in KEYS.items():
        for key in (name for name in names if f"{name}.mean" in found and f"{name}.std" in found):
            mean, std = (found[f"{key}.{stat}"].float().flatten() for stat in ("mean", "std"))
            if mean.isfinite().all() and std.isfinite().all():  # LeRobot's were infinite until set
                stats[part] = mean, std
    if missing := KEYS.keys() - stats.keys():
        raise UserError(
            f"{where} has no mean and standard deviation of {' and '.join(sorted(missing))}; name the data "
            "set's stats.json as --statistics, or none for states and actions as they are."
        )
    return stats


# --- the model


@dataclass
class Context:
    """What the velocity depends on beside x and t: keys and values (B, heads, L+1, D) of each layer, of the
    prefix and the state, and which of them are no padding (B, L+1)."""

    past: list
    keep: torch.Tensor

    def __len__(self):
        return len(self.keep)


class PI0(nn.Module):
    """See the module and `build`. What comes out is float32."""

    autoregressive = has_attention = own_critic = False
    has_files = True
    lora_targets = r"pi0\.model\.dit\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

    def __init__(self, config, model, tokenize, statistics):
        super().__init__()
        self.config, self.pi0, self.tokenize, self.statistics = config, model, tokenize, statistics
        sizes, eye = model.config, model.config.vlm_config.vision_config
        self.chunk, self.action_dim = config["chunk"], config["action_dim"]
        self.flow_shape = (sizes.chunk_size, sizes.max_action_dim)
        self.hidden_size, self.max_state_dim = sizes.dit_config.hidden_size, sizes.max_state_dim
        self.image_size, self.image_tokens = eye.image_size, (eye.image_size // eye.patch_size) ** 2
        self.image_id, self.prompts = sizes.vlm_config.image_token_id, {}

    def vision_parameters(self):
        """The whole prefix's."""
        return list(self.pi0.model.vlm.parameters())

    @property
    def device(self):
        return self.pi0.action_out_proj.weight.device

    def encode_prompt(self, instruction, cameras):
        ids = self.tokenize(instruction.strip().replace("_", " ").replace("\n", " "))
        if max(ids, default=0) >= self.pi0.config.vlm_config.text_config.vocab_size:
            raise UserError("The tokenizer is not PaliGemma's: it has more words; name that as --tokenizer.")
        return [self.image_id] * (self.image_tokens * cameras) + [BOS, *ids, NEWLINE]

    @torch.no_grad()
    def preprocess(self, obs, instructions):
        """obs as in `common.envs` -> batch: image uint8 (B, cameras, H, W, 3), input_ids (B, L) padded on the
        right, proprio (B, 32), normalised and filled up with zeros."""
        device, image = self.device, torch.as_tensor(obs["image"], device=self.device)
        key = (image.shape[1], *instructions)
        if key not in self.prompts:
            rows = [self.encode_prompt(text, image.shape[1]) for text in instructions]
            longest = max(map(len, rows))
            rows = [row + [PAD] * (longest - len(row)) for row in rows]
            self.prompts[key] = torch.tensor(rows, device=device)
        state = torch.as_tensor(obs["proprio"], device=device, dtype=torch.float32)
        mean, std = (x.to(device) for x in (self.statistics or NONE)["state"])
        state = (state - mean) / (std + EPS)
        state = F.pad(state, (0, self.max_state_dim - state.shape[1]))
        ids = self.prompts[key][torch.as_tensor(obs["task"], device=device)]
        return {"image": image, "input_ids": ids, "proprio": state}

    def encode_vision(self, batch):
        """-> the prefix's keys and values (B, layers, 2, heads, L, D), None"""
        ids, model = batch["input_ids"], self.pi0.model
        keep = (ids != PAD).long()
        pixels = resize_with_pad(batch["image"], self.image_size).to(model.vlm.dtype)
        x = model.embed_prefix(ids, pixels, ids.new_ones(pixels.shape[:2], dtype=torch.bool))
        cache = DynamicCache()
        model.vlm(
            inputs_embeds=x, attention_mask=keep, position_ids=keep.cumsum(1) - 1, use_cache=True,
            token_type_ids=torch.zeros_like(ids), **{CACHE: cache},
        )  # fmt: skip
        return torch.stack([torch.stack([x.keys, x.values], 1) for x in cache.layers], 1), None

    def _autocast(self):
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        return torch.autocast(kind, torch.bfloat16, enabled=self.config["dtype"] == "bfloat16")

    def _expert(self, x, past, keep):
        """Tokens x (B, n, D) after `past`, which see it and each other -> their hidden states, and the keys
        and values of all. keep (B, L+n)."""
        cache, length = DynamicCache(), x.shape[1]
        for i, (keys, values) in enumerate(past):
            cache.update(keys, values, i)
        mask = keep[:, None, None].expand(-1, 1, length, -1)
        positions = (keep.cumsum(1) - 1)[:, -length:]
        hidden = self.pi0.model.dit(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache}
        ).last_hidden_state
        return hidden, [(layer.keys, layer.values) for layer in cache.layers]

    def forward(self, batch, vision=None, actions=None):
        """-> Context, the state token's hidden state (B, D)"""
        vision = self.encode_vision(batch)[0] if vision is None else vision
        keep = F.pad(batch["input_ids"] != PAD, (0, 1), value=True)
        with self._autocast():
            state = self.pi0.embed_action_time.state_proj(batch["proprio"])[:, None]
            hidden, past = self._expert(state, [layer.unbind(1) for layer in vision.unbind(1)], keep)
        return Context(past, keep), hidden[:, 0].float()

    def velocity(self, action_hidden, x, t):
        """The flow's at x (B, 50*32) and t (B,) or () -> (B, 50*32); x (B, P, 50*32), t (B, P) likewise, one
        after another, for the prefix is larger than all else."""
        if x.dim() == 3:
            return torch.stack([self.velocity(action_hidden, x[:, i], t[:, i]) for i in range(x.shape[1])], 1)
        state, t = x.new_zeros(len(x), self.max_state_dim), t.expand(len(x)).float()
        keep = F.pad(action_hidden.keep, (0, self.flow_shape[0]), value=True)
        with self._autocast():
            tokens = self.pi0.embed_action_time(state, x.unflatten(1, self.flow_shape), t)[:, 1:]
            hidden, _ = self._expert(tokens, action_hidden.past, keep)
            return self.pi0.action_out_proj(hidden).float().flatten(1)

    def to_env(self, actions):
        """(..., A), normalised -> in the data set's units"""
        actions = torch.as_tensor(actions)
        mean, std = (x.to(actions.device) for x in (self.statistics or NONE)["action"])
        return actions * std + mean

    def from_env(self, actions):
        mean, std = (x.numpy() for x in (self.statistics or NONE)["action"])
        return (actions - mean) / (std + EPS)


# --- loading


def from_flags(args, chunk, action_dim, proprio_dim, **_):
    """The config that `build` takes, of weights that are not a run's."""
    if args.backbone == "pi0":
        raise UserError("pi0 needs a checkpoint; give its folder or hub id as --backbone.")
    return dict(
        chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, tokenizer=args.tokenizer,
        statistics=args.statistics,
    )  # fmt: skip


def own_options(args, device, cameras, micro_batch_size, train_vision):
    """What `build` takes that is the run's affair and not the weights'."""
    train_prefix = bool(train_vision) and not args.evaluate
    draws = 8 if getattr(args, "flow_noise", None) == "fpo" else 1  # FPO_DRAWS
    passes = max(getattr(args, "flow_steps", 1), getattr(args, "flow_samples", draws))
    return dict(
        train_prefix=train_prefix, lora_rank=args.lora_rank, cameras=cameras, passes=passes,
        micro_batch_size=0 if args.evaluate else micro_batch_size,
        # To train the prefix in 16 bits would lose Adam's small steps.
        dtype="bfloat16" if device.type == "cuda" and not train_prefix else "float32",
    )  # fmt: skip


def build(
    *, path, chunk=None, action_dim=7, proprio_dim=8, tokenizer=None, statistics=None, dtype="bfloat16",
    train_prefix=False, sizes=None, device="cpu", micro_batch_size=0, lora_rank=0, cameras=1, passes=4, **_,
):  # fmt: skip
    """Load a checkpoint in LeRobot's layout onto `device`. path: a folder, a hub id, or "random" for random
    weights, of pi0's size but for what `sizes` has of `PI0Config`'s.

    chunk: actions to execute of those that it makes; None for all. dtype: of the prefix; the expert is in
    float32, and in bfloat16 its products are. train_prefix: else only the expert trains. With a
    micro_batch_size, memory must do for an update of it with `passes` of the expert. device "meta" loads
    nothing. Raises UserError.
    """
    device, published, stats, encode = torch.device(device), sizes or {}, None, None
    if path == "random":

        def encode(text):
            return [3 + len(word) for word in text.split()]
    else:
        folder = find_checkpoint(path)
        with intact(file := folder / "config.json"):
            published = dict(json.loads(file.read_text()))
        kind = published.get("type") or published.get("model_type")
        if kind != "pi0":
            raise UserError(f"{path} is a {kind}; only pi0 loads here.")
        found = Path(tokenizer or folder)
        found = found / "tokenizer.json" if found.is_dir() else found
        if not found.is_file():
            raise UserError(
                f"{found} does not exist; name a folder with PaliGemma's tokenizer.json (the hub's "
                "google/paligemma-3b-pt-224, once its terms are accepted) as --tokenizer."
            )
        with intact(found):
            words = Tokenizer.from_file(str(found))

        def encode(text):
            return words.encode(text, add_special_tokens=False).ids

    known = PI0Config().to_dict().keys() - {"dtype"}
    with intact(f"{path}/config.json"):
        sizes = PI0Config(**{name: x for name, x in published.items() if name in known})
    chunk = chunk or sizes.chunk_size
    for what, mine, most in (
        ("actions a chunk", chunk, sizes.chunk_size), ("numbers an action", action_dim, sizes.max_action_dim),
        ("numbers a state", proprio_dim, sizes.max_state_dim),
    ):  # fmt: skip
        if mine > most:
            raise UserError(f"{path} has at most {most} {what}, not {mine}; see --chunk and --env.")
    config = dict(
        name="pi0", path=str(path), chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, dtype=dtype,
        tokenizer=tokenizer, statistics=statistics, sizes=published if path == "random" else None,
    )  # fmt: skip
    with torch.device("meta"):
        model = prepare(PI0ForConditionalGeneration(sizes), train_prefix)
    needs = memory_needed(model, getattr(torch, dtype), micro_batch_size, lora_rank, cameras, passes)
    if device.type != "meta":
        check_memory(path, device, *needs)
    if device.type != "meta" and path == "random":
        model = prepare(PI0ForConditionalGeneration(sizes), train_prefix)
    elif device.type != "meta":
        model, buffers = load(path, folder, sizes, dtype)
        stats = read_statistics(path, folder, buffers, statistics)
        model = prepare(model, train_prefix)
        for part, dims in (("state", proprio_dim), ("action", action_dim)):
            if stats and len(stats[part][0]) != dims:
                raise UserError(
                    f"{path} has statistics of {len(stats[part][0])} numbers of {part}, but this world has "
                    f"{dims}; name the right --statistics, or another --env."
                )
    model.model.vlm.to(getattr(torch, dtype))
    backbone = PI0(config, model.to(device), encode, stats).eval()
    if device.type != "meta":
        backbone.fingerprint = fingerprint(model)
    return backbone


def prepare(model, train_prefix):
    """Drop the expert's embedding, which nobody uses, and freeze the prefix, or what no gradient reaches."""
    model.model.dit.embed_tokens = None
    language = model.model.vlm.language_model
    last = language.layers[-1]
    unused = (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, last.post_attention_layernorm)
    for part in (*unused, language.norm) if train_prefix else (model.model.vlm,):
        part.requires_grad_(False)
    return model


def load(path, folder, sizes, dtype):
    """-> the model with the weights of `folder`, the prefix's rounded to `dtype`; and the older layout's
    statistics {name: tensor} among them. UserError for weights that are not pi0's."""

    class Mixed(PI0ForConditionalGeneration):
        _keep_in_fp32_modules_strict = ["dit", "embed_action_time", "action_out_proj"]  # noqa: RUF012

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no model.safetensors; give a checkpoint in LeRobot's layout.")
    buffers = {}
    for file in files:
        with intact(file), safe_open(file, "pt") as stored:
            buffers |= {n: stored.get_tensor(n) for n in stored.keys() if ".buffer_" in n}  # noqa: SIM118
    missing = ["model.dit.embed_tokens.weight"]
    return read_weights(Mixed, path, folder, sizes, dtype, missing, buffers), buffers


def memory_needed(model, dtype, micro_batch_size, lora_rank, cameras, passes):
    """About how many bytes the weights of `model`, on whatever device, and an update of the expert hold.

    What trains has a gradient and AdamW's two moments in float32; adapters also themselves, and their copies
    in 16 bits. For the backward, each of `passes` of the expert keeps of a layer 28 bytes a token and number
    of its width (norms are in float32), and in `dtype` four tensors of its MLP's width, queries, attention's
    output and all keys and values, and in 16 bits a copy of its weights.
    """
    eye, expert, item = model.config.vlm_config.vision_config, model.config.dit_config, dtype.itemsize
    prefix, dit = (sum(p.numel() for p in getattr(model.model, part).parameters()) for part in ("vlm", "dit"))
    weights = item * prefix + 4 * (sum(p.numel() for p in model.parameters()) - prefix)
    if not micro_batch_size:
        return weights, 0
    trained = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if lora_rank:
        tuned = (
            m.weight.shape for n, m in model.named_modules() if re.fullmatch(PI0.lora_targets, f"pi0.{n}")
        )
        trained = 18 * lora_rank * sum(map(sum, tuned))
    own, heads = model.config.chunk_size, expert.num_attention_heads * expert.head_dim
    keys = (cameras * (eye.image_size // eye.patch_size) ** 2 + PROMPT + own) * expert.num_key_value_heads
    layer = own * (28 * expert.hidden_size + item * (4 * expert.intermediate_size + 2 * heads))
    layer += 2 * item * keys * expert.head_dim
    copies = (passes + 1) * item * dit if item < 4 else 0
    return weights, trained + copies + micro_batch_size * passes * expert.num_hidden_layers * layer
