"""`load_backbone`: one file a model family, one contract.

A backbone is an `nn.Module` with
    preprocess(obs, instructions) -> batch          dict of tensors on the backbone's device
    encode_vision(batch) -> vision, attention       what may be cached while the vision part is frozen
    forward(batch, vision=None) -> action_hidden (B, K*A, D), prompt_hidden (B, D)
    action_logits(action_hidden) -> (B, K*A, 256)   token models only; column 0 is id 31744, i.e. action +1
    vision_parameters() -> list                     all that encode_vision uses
and `hidden_size`, `chunk`, `action_dim`, `config` (a dict of plain values that `load_backbone(**config)`
rebuilds).
"""

import contextlib
import importlib

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from common import UserError

BACKBONES = {"tiny": "common.backbones.tiny", "mlp": "common.backbones.mlp"}


def load_backbone(name, **config):
    """Build the backbone `name` with its `config` (see its file).

    Raises UserError in one sentence for an unknown name or a value the backbone cannot take.
    """
    if name not in BACKBONES:
        raise UserError(f"Unknown backbone {name!r}; known: {', '.join(BACKBONES)}.")
    return importlib.import_module(BACKBONES[name]).build(**config)


def add_lora(backbone, rank):
    """Freeze the backbone and put LoRA adapters (Hu et al. 2021; alpha = 2 rank, B = 0) on the modules that
    match its `lora_targets`, a regular expression. The model computes the same function until it is trained.
    """
    if not backbone.lora_targets:
        raise UserError(f"The backbone {backbone.config['name']!r} takes no LoRA; use --lora-rank 0.")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=backbone.lora_targets)
    inject_adapter_in_model(config, backbone)  # freezes all but the adapters


@contextlib.contextmanager
def adapters_disabled(backbone):
    """The model as it was before LoRA, for reference log-probs: no second copy in memory."""
    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
