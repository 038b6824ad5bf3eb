"""Two MLPs (actor, critic) for vector observations: with it `ppo_vla.py --env CartPole-v1` is plain PPO.

    python ppo_vla.py --env Hopper-v5 --backbone mlp --head gaussian --checkpoint runs/iql

goes on with the policy of a script that learns from states.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common import UserError

FROM_SCRATCH = True
ACTIVATIONS = {"relu": nn.ReLU, "gelu": functools.partial(nn.GELU, "tanh")}  # of the state-based scripts


@dataclass
class Args:
    """It has no flags of its own."""


def build(device="cpu", **config):
    return (StatePolicy if "squash" in config else MLP)(**config).to(device)


def from_flags(args, action_bounds, **shape):
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
        # Each number of a chunk is read from the features by weights of its own: the head's times its scales.
        n = chunk * action_dim
        signs = 2.0 * torch.randint(2, (n, width)) - 1 if n > 1 else torch.ones(n, width)
        self.scales = nn.Parameter(signs, requires_grad=n > 1)
        self.slots = nn.Parameter(torch.zeros(n, width))

    def preprocess(self, obs, instructions):
        device = next(self.parameters()).device
        return {"proprio": torch.as_tensor(obs["proprio"], device=device, dtype=torch.float32)}

    def encode_vision(self, batch):
        return None, None

    def vision_parameters(self):
        return []

    def forward(self, batch, vision=None, actions=None):
        hidden = self.actor(batch["proprio"])[:, None] * self.scales + self.slots
        return hidden, self.critic(batch["proprio"])

    def to_env(self, actions):
        return actions

    def from_env(self, actions):
        return actions


class StatePolicy(MLP):
    """The policy of a script that learns from states, and a critic that starts with its hidden layers. The
    last layer is the policy's own too, as `action_head`: MLP's one for all actions could not be it."""

    def __init__(self, *, chunk, action_dim, proprio_dim, width, depth, activation, squash):
        nn.Module.__init__(self)
        self.config = dict(name="mlp", chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim)
        self.config |= dict(width=width, depth=depth, activation=activation, squash=squash)
        self.chunk, self.action_dim, self.hidden_size, self.squash = chunk, action_dim, width, squash
        self.register_buffer("obs_mean", torch.zeros(proprio_dim))
        self.register_buffer("obs_std", torch.ones(proprio_dim))
        sizes = [proprio_dim, *[width] * depth]
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.actor, self.critic = (
            nn.Sequential(*(x for pair in pairs for x in (nn.Linear(*pair), ACTIVATIONS[activation]())))
            for _ in range(2)
        )
        self.action_head = nn.Linear(width, action_dim)

    def forward(self, batch, vision=None, actions=None):
        obs = (batch["proprio"] - self.obs_mean) / self.obs_std
        return self.actor(obs)[:, None].expand(-1, self.action_dim, -1), self.critic(obs)

    def action_mean(self, action_hidden):
        mean = self.action_head(action_hidden[:, 0])
        return mean.tanh() if self.squash else mean  # (B, A)


def from_states(saved):
    """The checkpoint of a script that learns from states as one that policies of this family load: its mean
    action, as it was evaluated (say, of averaged weights), with its own normalisation, and a Gaussian's
    deviation, the policy's where that is one number an action, else 0.2. Nothing drops out. UserError where
    there is no such policy."""
    old, args = dict(saved["agent"]), saved["args"]
    old |= {f"actor{name[7:]}": old[name] for name in old if name.startswith("average.")}
    layers = sorted({int(name.split(".")[1]) for name in old if name.startswith("actor.")})
    if not layers or old[f"actor.{layers[0]}.weight"].ndim != 2:
        raise UserError(f"{saved['script']}.py's policy is no MLP that ppo_vla.py could go on with.")
    last = f"actor.{layers.pop()}"
    action_dim = len(old[f"{last}.bias"]) // (2 if "log_alpha" in old else 1)  # else it has deviations too
    width, proprio_dim = old[f"{last}.weight"].shape[1], old[f"actor.{layers[0]}.weight"].shape[1]
    weights = {
        "backbone.obs_mean": old.get("obs_mean", torch.zeros(proprio_dim)),
        "backbone.obs_std": old.get("obs_std", torch.ones(proprio_dim)),
        "head.log_std": old.get("log_std", torch.full((action_dim,), math.log(0.2))).clamp(-5, 2),
    }
    for part in ("weight", "bias"):
        weights[f"backbone.action_head.{part}"] = old[f"{last}.{part}"][:action_dim].clone()
        for i, layer in enumerate(layers):
            for name in ("actor", "critic"):
                weights[f"backbone.{name}.{2 * i}.{part}"] = old[f"actor.{layer}.{part}"].clone()
    config = dict(name="mlp", chunk=1, action_dim=action_dim, proprio_dim=proprio_dim, width=width)
    config |= dict(depth=len(layers), activation=args.get("activation", "relu"))
    config |= dict(squash=args.get("learn_std", True))
    flags = dict(backbone="mlp", head="gaussian", chunk=1, action_history=0)
    flags |= dict(init_std=weights["head.log_std"].exp().mean().item())
    return {"agent": weights, "backbone": config, "args": flags, "script": saved["script"]}
