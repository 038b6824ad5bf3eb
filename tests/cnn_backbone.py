"""A model in one file, as a user would write it: a small CNN, the mean of the instruction's words, an MLP."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from common.flags import FIXED, PositiveInt

FROM_SCRATCH = True


@dataclass
class Args:
    """The flags of `--backbone cnn`."""

    channels: Annotated[PositiveInt, FIXED] = 16
    """of the first convolution"""


def build(device="cpu", **config):
    return CNN(**config).to(device)


def from_flags(args, dataset, action_bounds, **shape):
    return shape | {"channels": args.channels}


class CNN(nn.Module):
    autoregressive = own_critic = has_files = has_attention = False
    lora_targets = None

    def __init__(
        self, *, chunk, action_dim, proprio_dim, cameras, image_size, channels, instructions=(), words=None,
        width=128,
    ):  # fmt: skip
        super().__init__()
        words = words or sorted({word for text in instructions for word in text.lower().split()})
        self.config = dict(
            name="cnn", chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, cameras=cameras,
            image_size=image_size, channels=channels, words=words, width=width,
        )  # fmt: skip
        self.chunk, self.action_dim, self.hidden_size = chunk, action_dim, width
        self.word_ids = {word: i + 2 for i, word in enumerate(words)}  # 0 pads, 1 is unknown
        self.eye = nn.Sequential(
            nn.Conv2d(3 * cameras, channels, 5, 2, 2), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(128 * channels, width),
        )  # fmt: skip
        self.words = nn.Embedding(len(words) + 2, width, padding_idx=0)
        self.feel = nn.Linear(proprio_dim, width)
        self.mlp = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.slots = nn.Parameter(0.5 * torch.randn(chunk * action_dim, width))
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 256)

    def vision_parameters(self):
        return list(self.eye.parameters())

    def preprocess(self, obs, instructions):
        device = self.slots.device
        rows = [[self.word_ids.get(word, 1) for word in text.lower().split()] for text in instructions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        return {
            "image": torch.as_tensor(obs["image"], device=device),
            "proprio": torch.as_tensor(obs["proprio"], device=device),
            "ids": ids[torch.as_tensor(obs["task"], device=device)],
        }

    def encode_vision(self, batch):
        image = batch["image"].permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, cameras * 3, H, W)
        return self.eye(image.float() / 255 - 0.5), None

    def forward(self, batch, vision=None, actions=None):
        if vision is None:
            vision, _ = self.encode_vision(batch)
        known = batch["ids"] > 0
        words = self.words(batch["ids"]).sum(1) / known.sum(1, keepdim=True)
        hidden = self.mlp(torch.cat([vision, words, self.feel(batch["proprio"])], -1))
        return self.out(hidden[:, None] + self.slots), hidden

    def action_logits(self, action_hidden):
        return self.head(action_hidden)

    def to_env(self, actions):
        return actions

    def from_env(self, actions):
        return actions
