"""Tiny: a randomly initialised VLA of OpenVLA-OFT's shape that trains on a laptop (0.3 M parameters).

    [BOS] [visual tokens] [proprio] [words of the instruction] [end of prompt] [K*7 action slots]

goes through a small Llama in one forward with full bidirectional attention; the K*7 slots
come out as the chunk's action tokens, all decoded in parallel. Differences to the 7B model are the size, a
convolutional stem in place of the two ViTs, and the projector: a few queries, made from the instruction's
words, attend over the 16x16 feature map, and each yields one token (what it saw and where: features and the
attention's mean position). Two of the queries have a meaning that `bc_warmup.py` teaches: the named object
and the named plate. A critic reads the prompt's tokens as they enter the Llama, the words averaged: imitation
teaches nothing at the prompt's end, where that of a pretrained model reads (benchmarks/README.md).
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from common.backbones import LoraArgs as Args  # noqa: F401 (its flags)

FROM_SCRATCH = True
BOS, END, PAD, UNKNOWN = range(4)
FREQUENCIES = 4  # sin/cos octaves of positions: lets a linear layer resolve millimetres


def build(device="cpu", **config):
    return TinyVLA(**config).to(device)


def from_flags(args, dataset, action_bounds, **shape):
    return shape


def fourier(x):
    """(..., P) in about [-1, 1] -> (..., P * (1 + 2 * FREQUENCIES))"""
    angle = x[..., None] * (torch.pi * 0.5) * 2.0 ** torch.arange(FREQUENCIES, device=x.device)
    return torch.cat([x, angle.sin().flatten(-2), angle.cos().flatten(-2)], -1)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions (Su et al. 2021): features i and i + half of a head
    turn together."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x, keep, cos, sin, first=0):
        """x (B, S, width), keep bool (B, 1, 1, S), cos and sin (B, 1, S, width of a head) -> (B, S - first,
        width), of the positions from `first` on"""
        q, k, v = (
            projection(z).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, S, width of a head)
            for projection, z in ((self.q_proj, x[:, first:]), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = (
            z * cos[:, :, i:]
            + torch.cat([-z[..., z.shape[-1] // 2 :], z[..., : z.shape[-1] // 2]], -1) * sin[:, :, i:]
            for z, i in ((q, first), (k, 0))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.self_attn, self.mlp = Attention(width, heads), GatedMLP(width)
        self.input_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x, keep, cos, sin, first=0):
        x = x[:, first:] + self.self_attn(self.input_layernorm(x), keep, cos, sin, first)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama's layers (Touvron et al. 2023) under transformers' names, whose import takes six seconds."""

    def __init__(self, vocabulary, width, layers, heads=4):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        half = width // heads // 2
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(half) / half), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.1)
        with torch.no_grad():
            self.embed_tokens.weight[PAD] = 0.0

    def forward(self, x, attention_mask, position_ids, first=0):
        """x (B, S, width), attention_mask bool (B, 1, 1, S), position_ids (B, S) -> (B, S - first, width): of
        the last layer only what is read, from position `first` on"""
        angle = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, attention_mask, cos, sin)
        return self.norm(self.layers[-1](x, attention_mask, cos, sin, first))


class TinyVLA(nn.Module):
    """See the module. words: the vocabulary, made from `instructions` when it is not given.

    Raises UserError for an image size that is not a multiple of 4 or for observations without images.
    """

    autoregressive = own_critic = has_files = False
    has_attention = True
    lora_targets = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

    def __init__(
        self,
        *,
        chunk,
        action_dim,
        proprio_dim,
        cameras,
        image_size,
        instructions=(),
        words=None,
        width=96,
        layers=2,
        queries=8,
        channels=64,
    ):
        super().__init__()
        if not cameras or not image_size or image_size % 4:
            raise UserError(
                f"The backbone 'tiny' needs images whose size is a multiple of 4, not {cameras} of "
                f"{image_size}; for vector observations use --backbone mlp."
            )
        words = words or sorted({word for text in instructions for word in text.lower().split()})
        if not {type(word) for word in words} <= {str}:  # of a checkpoint
            raise TypeError("words that are no texts")
        self.config = dict(
            name="tiny", chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, cameras=cameras,
            image_size=image_size, words=words, width=width, layers=layers, queries=queries,
            channels=channels,
        )  # fmt: skip
        self.chunk, self.action_dim, self.hidden_size = chunk, action_dim, width
        self.prompt_size = (cameras * queries + 2) * width
        self.word_ids = {word: i + 4 for i, word in enumerate(words)}
        self.prompts = {}  # tuple of instructions -> ids (I, L)

        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(48, channels, 3, 1, 1),
        )
        side = image_size // 4
        self.place = nn.Parameter(0.02 * torch.randn(cameras, side * side, channels))
        self.key, self.value = nn.Linear(channels, channels), nn.Linear(channels, channels)
        axis = (torch.arange(side) + 0.5) / side * 2 - 1
        self.register_buffer(
            "grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        )
        self.word_score = nn.Parameter(torch.randn(width, cameras * queries) / width**0.5)
        self.query = nn.Parameter(torch.randn(cameras * queries, width, channels) / width**0.5)
        self.query_bias = nn.Parameter(torch.randn(cameras * queries, channels))

        self.see = nn.Linear(channels + 2 * (1 + 2 * FREQUENCIES), width)
        self.visual_slots = nn.Parameter(0.5 * torch.randn(cameras * queries, width))
        self.feel = nn.Linear(proprio_dim * (1 + 2 * FREQUENCIES), width)
        self.action_slots = nn.Parameter(0.5 * torch.randn(chunk * action_dim, width))
        self.language_model = Llama(len(words) + 4, width, layers)
        self.words = self.language_model.embed_tokens
        self.lm_head = nn.Linear(width, 256, bias=False)

    def vision_parameters(self):
        """Everything before the visual tokens, the words' embedding included (it makes the queries)."""
        modules = (self.stem, self.key, self.value, self.words)
        return [p for m in modules for p in m.parameters()] + [
            self.place,
            self.word_score,
            self.query,
            self.query_bias,
        ]

    def layers(self):
        return list(self.language_model.layers)

    def preprocess(self, obs, instructions):
        """obs as in `common.envs` -> batch: image uint8 (B, cameras, H, W, 3), proprio, input_ids (B,
        L)."""
        device = self.grid.device
        key = tuple(instructions)
        if key not in self.prompts:
            rows = [
                [self.word_ids.get(w, UNKNOWN) for w in text.lower().split()] + [END] for text in instructions
            ]
            longest = max(map(len, rows))
            self.prompts[key] = torch.tensor(
                [[PAD] * (longest - len(row)) + row for row in rows], device=device
            )
        task = torch.as_tensor(obs["task"], device=device)
        return {
            "image": torch.as_tensor(obs["image"], device=device),
            "proprio": torch.as_tensor(obs["proprio"], device=device),
            "input_ids": self.prompts[key].to(device)[task],
        }

    def encode_vision(self, batch):
        """-> visual tokens before their projection (B, cameras*queries, channels + 2), attention logits
        (B, cameras, queries, side*side)."""
        image, ids = batch["image"], batch["input_ids"]
        size, cameras = image.shape[0], image.shape[1]
        pixels = (
            image.flatten(0, 1).permute(0, 3, 1, 2).float().div_(255 * 0.2).sub_(3.0)
        )  # mean 0.6, std 0.2
        features = self.stem(pixels).flatten(2).transpose(1, 2).unflatten(0, (size, cameras)) + self.place
        words = self.words(ids)  # (B, L, width)
        focus = (words @ self.word_score).masked_fill((ids == PAD)[..., None], -torch.inf).softmax(1)
        query = torch.einsum("blq,bld,qdc->bqc", focus, words, self.query) + self.query_bias
        query = query.unflatten(1, (cameras, -1))
        attention = query @ self.key(features).transpose(2, 3) / self.key.out_features**0.5
        weights = attention.softmax(-1)
        seen = torch.cat([weights @ self.value(features), weights @ self.grid], -1)
        return seen.flatten(1, 2), attention

    def forward(self, batch, vision=None, actions=None):
        if vision is None:
            vision, _ = self.encode_vision(batch)
        ids = batch["input_ids"]
        size = ids.shape[0]
        channels = self.value.out_features
        visual = (
            self.see(torch.cat([vision[..., :channels], fourier(vision[..., channels:])], -1))
            + self.visual_slots
        )
        proprio = self.feel(fourier(batch["proprio"]))
        words, real = self.words(ids), ids != PAD
        bos = self.words(ids.new_full((size, 1), BOS))
        slots = self.action_slots.expand(size, -1, -1)
        sequence = torch.cat([bos, visual, proprio[:, None], words, slots], 1)  # (B, S, width)
        before, first = 2 + visual.shape[1], sequence.shape[1] - slots.shape[1]
        keep = F.pad(real, (before, slots.shape[1]), value=True)
        # Every row sees every real column. A causal mask would be the silent error (OFT).
        hidden = self.language_model(sequence, keep[:, None, None], keep.cumsum(1) - 1, first)
        instruction = (words * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        prompt = torch.cat([visual.flatten(1), proprio, instruction], 1)
        return hidden, prompt

    def action_logits(self, action_hidden):
        return self.lm_head(action_hidden)

    def to_env(self, actions):
        return actions

    def from_env(self, actions):
        return actions
