"""Two tanh MLPs (actor, critic) for vector observations: with it `ppo_vla.py --env CartPole-v1` is plain
PPO."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

FROM_SCRATCH = True


@dataclass
class Args:
    """It has no flags of its own."""


def build(device="cpu", **config):
    return MLP(**config).to(device)


def from_flags(args, **shape):
    return shape


def _trunk(inputs, width):
    layers = [nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, np.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """proprio (B, P) -> action hidden (B, K*A, width) from the actor, prompt hidden (B, width) from the
    critic."""

    autoregressive = has_attention = has_files = False
    own_critic = True
    lora_targets = None

    def __init__(self, *, chunk, action_dim, proprio_dim, width=64, **_):
        super().__init__()
        self.config = dict(
            name="mlp", chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, width=width
        )
        self.chunk, self.action_dim, self.hidden_size = chunk, action_dim, width
        self.actor, self.critic = _trunk(proprio_dim, width), _trunk(proprio_dim, width)
        self.slots = nn.Parameter(
            torch.zeros(chunk * action_dim, width)
        )  # tells the actions of one chunk apart

    def preprocess(self, obs, instructions):
        return {"proprio": torch.as_tensor(obs["proprio"], device=self.slots.device, dtype=torch.float32)}

    def encode_vision(self, batch):
        return None, None

    def vision_parameters(self):
        return []

    def forward(self, batch, vision=None, actions=None):
        return self.actor(batch["proprio"])[:, None] + self.slots, self.critic(batch["proprio"])

    def to_env(self, actions):
        return actions

    def from_env(self, actions):
        return actions
