"""`load_backbone`: one file a model family, one contract.

A backbone is an `nn.Module` with
    preprocess(obs, instructions) -> batch          dict of tensors on the backbone's device
    encode_vision(batch) -> vision, attention       what may be cached while the vision part is frozen
    forward(batch, vision=None, actions=None) -> action_hidden (B, K*A, D), prompt_hidden (B, D)
    action_logits(action_hidden) -> (B, K*A, 256)   token models only; column 0 is id 31744, i.e. action +1
    vision_parameters() -> list                     all that encode_vision uses
    to_env(actions) -> numpy (B, K, A)              from [-1, 1] to the environment's units
    from_env(actions) -> numpy (..., A)             and back, for demonstrations
and `hidden_size`, `chunk`, `action_dim`, `autoregressive`, `config` (a dict of plain values that
`load_backbone(**config)` rebuilds). An autoregressive one emits its tokens in turn: forward conditions on
`actions`, and generate(batch, draw, vision=None) samples them. One with an `action_head` that is not None has
action_mean(action_hidden) -> (B, K*A), the trained continuous actions.
"""

import contextlib
import importlib
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file

from common import UserError
from common.checkpoint import atomic_path

BACKBONES = {
    "tiny": "common.backbones.tiny",
    "mlp": "common.backbones.mlp",
    "openvla": "common.backbones.openvla",
}


def load_backbone(name, device="cpu", **config):
    """Build the backbone `name`, one of the table or a checkpoint's folder or hub id, with its `config` (see
    its file) on `device`.

    Raises UserError in one sentence for an unknown name or a value the backbone cannot take.
    """
    if name not in BACKBONES:
        if "/" not in name and not Path(name).is_dir():
            raise UserError(
                f"Unknown backbone {name!r}; known: {', '.join(BACKBONES)}, or a checkpoint's path."
            )
        name, config = "openvla", config | {"path": name}
    return importlib.import_module(BACKBONES[name]).build(device=device, **config)


def add_lora(backbone, rank):
    """Freeze the backbone and put LoRA adapters (Hu et al. 2021; alpha = 2 rank, B = 0) on the modules that
    match its `lora_targets`, a regular expression. The model computes the same function until it is trained.
    """
    if not backbone.lora_targets:
        raise UserError(f"The backbone {backbone.config['name']!r} takes no LoRA; use --lora-rank 0.")
    inject_lora(backbone, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=backbone.lora_targets))


def inject_lora(backbone, config):
    inject_adapter_in_model(config, backbone)  # freezes all but the adapters
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # Adam's small steps would be lost in bfloat16
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # the backbone's autocast does it once


@contextlib.contextmanager
def intact(file):
    """One UserError about `file` for whatever goes wrong while it is read: half a file fails in many ways."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{file} is missing, truncated or damaged ({reason}): download it again.") from error


def save_adapter(backbone, folder):
    """Write the LoRA adapters as PEFT does: adapter_config.json and adapter_model.safetensors."""
    state = {name: p.detach().contiguous() for name, p in backbone.named_parameters() if "lora_" in name}
    state = {"base_model.model." + name.replace(".default", ""): p for name, p in state.items()}
    metadata = {"format": "pt", "base": backbone.fingerprint}
    with atomic_path(Path(folder) / "adapter_model.safetensors") as temporary:
        save_file(state, temporary, metadata)
    config = backbone.peft_config["default"]
    config.base_model_name_or_path = backbone.config.get("path")
    config.save_pretrained(folder)


def load_adapter(backbone, folder):
    """Put PEFT's adapters in `folder`, of this project or published, on the backbone, their base.

    Raises UserError for missing or damaged files, and for the adapters of another base: by the fingerprint
    that `save_adapter` left, by a base weight that PEFT stored with them, or by names and shapes.
    """
    file, settings = (Path(folder) / f"adapter_{name}" for name in ("model.safetensors", "config.json"))
    for name in (file.name, settings.name):
        if not (Path(folder) / name).is_file():
            raise UserError(f"{folder} holds no {name}; give a folder in PEFT's format.")
    device = next(backbone.parameters()).device
    with intact(file), safe_open(file, "pt", device=str(device)) as stored:
        mark = (stored.metadata() or {}).get("base", backbone.fingerprint)
        state = {n.removeprefix("base_model.model."): stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118
    with intact(settings):
        config = LoraConfig.from_pretrained(folder)
    wrong = UserError(
        f"The adapter {folder} belongs to another base ({config.base_model_name_or_path}), not to "
        f"{backbone.config.get('path')}; load its own, or drop it where the weights hold it already."
    )
    copies = {n.replace(".base_layer", ""): state.pop(n) for n in list(state) if ".base_layer." in n}
    base = dict(backbone.named_parameters())
    if mark != backbone.fingerprint or any(
        n not in base or not base[n].bfloat16().equal(tensor.bfloat16()) for n, tensor in copies.items()
    ):
        raise wrong
    if apart := [n for n in ("proprio_projector", "action_head") if getattr(backbone, n, None)]:
        config.exclude_modules = rf"({'|'.join(apart)})\..*"  # no part of the class that PEFT saw
    try:
        inject_lora(backbone, config)
    except ValueError as error:  # no module of the names that it has
        raise wrong from error
    mine = {n.replace(".default", ""): p for n, p in backbone.named_parameters() if "lora_" in n}
    if {n: p.shape for n, p in mine.items()} != {n: tensor.shape for n, tensor in state.items()}:
        raise wrong
    for name, parameter in mine.items():
        parameter.data.copy_(state[name])
