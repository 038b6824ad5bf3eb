"""`load_backbone`: one file a model family, one contract.

A family is one file and one line in `BACKBONES`. The file has
- `build(device, **config)`, which makes the backbone, and `from_flags(args, **shape)`, the config of fresh
  weights; shape: instructions, chunk, action_dim, proprio_dim, cameras and image_size (0 without pictures),
  dataset and action_bounds (the world's, or None);
- `Args`, a dataclass of its own flags (`LoraArgs` where it takes adapters), in which `FIXED` marks what is
  part of the weights; it may have `check(self)`, which raises UserError for values that cannot work together;
- `FROM_SCRATCH`: whether it starts at random weights; optionally `own_options(args, device, cameras,
  micro_batch_size, train_vision)`, what `build` takes that is the run's affair and not the weights',
  `owns(path)`, whether a checkpoint's folder or hub id is of the family (OpenVLA's are those that no other's
  are), and `from_states(saved)`, which makes a checkpoint of a script that learns from states into one.
A backbone is an `nn.Module` with
    preprocess(obs, instructions) -> batch          of arrays or tensors, a dict of tensors on its device
    encode_vision(batch) -> vision, attention       what may be cached while the vision part is frozen
    forward(batch, vision=None, actions=None) -> action_hidden (B, K*A, D), prompt_hidden (B, D)
    action_logits(action_hidden) -> (B, K*A, 256)   token models only; column 0 is id 31744, i.e. action +1
    vision_parameters() -> list                     all that encode_vision uses
    to_env(actions) -> tensor (B, K, A)             from [-1, 1] to the environment's units, on any device
    from_env(actions) -> numpy (..., A)             and back, for demonstrations
The batch's pictures are `image`, which a rollout drops once `encode_vision` has seen them; `length`, if
there, is the prompts'; names that PPO and GRPO give to their own columns are refused. And it has
`hidden_size` (D; of prompt_hidden, which a critic reads, `prompt_size` if there is one), `chunk`,
`action_dim`, `autoregressive`, `config` (a dict of plain values, `name` among them, that
`build_backbone(**config)` rebuilds: a vocabulary made from `instructions` belongs there), `lora_targets` (a
regular expression of module names, or None), `has_attention` (encode_vision returns attention logits and
not None), `own_critic` (prompt_hidden comes from parameters that no action depends on) and `has_files` (the
base's weights are in files of their own, and no checkpoint repeats them while they are frozen: True for all,
or how the names of those that are begin, a tuple). The last of `proprio`'s numbers are args.action_history
past actions, oldest first. An autoregressive one
emits its tokens in turn: forward conditions on `actions`, and generate(batch, draw, vision=None) samples
them. One with an `action_head` that is not None has action_mean(action_hidden) -> (B, K*A), the trained
continuous actions. One with a trained flow (its `action_hidden` may be of any kind that has a length, B) has
velocity(action_hidden, x, t) -> as x, where x is (B, n) and t () or (B,), or (B, P, n) and (B, P), and
`flow_shape`, the chunk that it denoises, n numbers as (actions, numbers of one): the first K and A are
executed. One with the flag --merge-and-save has save_merged(folder) and check_merge_target(folder).
`lora_alpha`, where there is one, is new adapters' (else twice the rank); `new_parts`, a list of modules
and parameters that are in no file of the base, train beside adapters. A language model has
embed_words(words) -> (n, D), with which a head over n named actions starts: its logits are then what the
model would say. A large one has layers() -> list,
the modules, each of which runs by its __call__, whose weights torchrun's processes gather one after another
where they train all. To copy: `mlp.py`, `tiny.py`.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import UserError, distributed, say
from common.checkpoint import atomic_path, check_kinds, readable
from common.evaluation import evaluate
from common.flags import NonNegativeInt
from common.memory import available_memory

BACKBONES = {
    "tiny": "common.backbones.tiny",
    "mlp": "common.backbones.mlp",
    "openvla": "common.backbones.openvla",
    "pi0": "common.backbones.pi0",
    "qwen": "common.backbones.qwen",
    "dinobert": "common.backbones.dinobert",
}
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern")
LORA += ("alpha_pattern", "bias")  # what an adapter's function depends on


@dataclass
class LoraArgs:
    """The flags of every model that takes adapters."""

    lora_rank: NonNegativeInt = 0
    """rank of the adapters; 0 trains every weight"""
    lora_alpha: NonNegativeInt = 0
    """adapters are scaled by this / rank; 0 for the checkpoint's, or of new ones the model's (of tiny: twice
    the rank; of OpenVLA: 16, as published)"""


def peft():
    """The library, which takes seconds to import: scripts that learn from states do without it."""
    return importlib.import_module("peft")


def family_of(name):
    """The family of a backbone's name, of the table or a checkpoint's folder or hub id. UserError for
    others."""
    if name in BACKBONES:
        return name
    if "/" not in name and not Path(name).is_dir():
        raise UserError(f"Unknown backbone {name!r}; known: {', '.join(BACKBONES)}, or a checkpoint's path.")
    for family, file in BACKBONES.items():
        if getattr(importlib.import_module(file), "owns", lambda path: False)(name):
            return family
    return "openvla"


def kind_of(path):
    """What a checkpoint's folder says of itself in its config.json, or a hub id in its name, in lower case;
    nothing where it says nothing."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        return Path(path).name.lower()
    if not file.is_file():  # a pipe would be waited for
        return ""
    try:
        published = json.loads(file.read_text())
        return str(published.get("type") or published.get("model_type")).lower()
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def model_module(name):
    """The file of a backbone's family."""
    return importlib.import_module(BACKBONES[family_of(name)])


def build_backbone(name, device="cpu", lora=None, **config):
    """Build the backbone `name`, one of the table or a checkpoint's folder or hub id, with its `config` (see
    its file) and the settings `lora` of its adapters on `device`.

    Raises UserError in one sentence for an unknown name or a value the backbone cannot take.
    """
    config |= {} if name in BACKBONES else {"path": name}
    backbone = model_module(name).build(device=device, **config)
    if lora:
        inject_lora(backbone, peft().LoraConfig(**lora))
    return backbone


def load_backbone(args, envs, run, micro_batch_size=0, train_vision=None):
    """The backbone of a run: of its checkpoint, of published weights, or a random one.

    micro_batch_size: of the update that memory must do for, 0 for none. train_vision: True lets the adapters,
    if any, reach the vision part. `load_weights` comes next, once there is an agent. Raises UserError.
    """
    image, saved = envs.single_observation_space.get("image"), run.saved
    shape = dict(
        chunk=args.chunk, action_dim=len(envs.active_dims), cameras=image.shape[0] if image else 0,
        proprio_dim=envs.single_observation_space["proprio"].shape[0],
        image_size=image.shape[1] if image else 0,
    )  # fmt: skip
    module, old_rank, lora_rank = model_module(args.backbone), 0, getattr(args, "lora_rank", 0)
    if saved:
        with readable(run.source):
            config = dict(saved["backbone"])
            old_rank = config["lora"]["r"] if config.get("lora") else 0
        for name, value in shape.items():
            if config.get(name, value) != value:
                hint = {"proprio_dim": "--action-history or --env", "action_dim": "--env"}.get(
                    name, f"--{name}"
                )
                raise UserError(
                    f"The checkpoint's {name} is {config[name]}, but this run's is {value}; set {hint} as it "
                    "was."
                )
    else:
        shape |= {"instructions": envs.training_instructions or envs.instructions}
        shape |= {"dataset": envs.dataset, "action_bounds": envs.action_bounds}
        config = {"name": args.backbone} | module.from_flags(args, **shape)
    if old_rank and lora_rank not in (0, old_rank):
        raise UserError(f"The checkpoint's adapters have rank {old_rank}; use --lora-rank {old_rank} or 0.")
    if old_rank:
        args.lora_rank = old_rank  # what this run's own checkpoints hold
        keep_alpha(args, config["lora"]["lora_alpha"])
    if hasattr(module, "own_options"):
        config |= module.own_options(args, run.device, shape["cameras"], micro_batch_size, train_vision)
    if train_vision and "vision" not in config.get("lora_modules", ("vision",)):
        config["lora_modules"] = (*config["lora_modules"], "vision")
    with readable(run.source):
        backbone = build_backbone(**config, device=run.device)
    if backbone.vision_parameters() and not shape["cameras"]:
        raise UserError(
            f"--env {args.env} has no pictures for the backbone {args.backbone!r}; use --backbone mlp."
        )
    if train_vision and not backbone.vision_parameters():
        raise UserError(f"The backbone {args.backbone!r} sees no images; drop --train-vision.")
    if train_vision and (old_rank or lora_rank) and "lora_modules" not in config:
        raise UserError(f"The adapters of {args.backbone!r} leave its eye as it is; drop --train-vision.")
    if getattr(args, "merge_and_save", None):
        backbone.check_merge_target(args.merge_and_save)
    return backbone


def load_weights(agent, args, run, new=(), train_vision=None):
    """Put the weights of the run's checkpoint, if it has one, into `agent`, then new adapters on its
    backbone.

    new: how the names of what a checkpoint may lack begin; parts of one that the agent lacks are left
    out. train_vision: False freezes the vision part. UserError for what does not fit.
    """
    backbone, saved = agent.backbone, run.saved
    backbone.moved = set()  # what a checkpoint has in the place of the files'
    if saved:
        parts = {name for name, _ in agent.named_children()}
        with readable(run.source):
            weights = {name: x for name, x in saved["agent"].items() if name.partition(".")[0] in parts}
            check_kinds(weights, agent.state_dict())
            missing, unexpected = agent.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.startswith(new)]
        backbone.moved = {name.replace(".base_layer", "") for name in weights}
        if files := in_files(backbone):  # the rest of the base
            missing = [name for name in missing if "lora_" in name or not name.startswith(files)]
        if missing or unexpected:
            names = ", ".join((*missing, *unexpected)[:4])
            raise UserError(f"The checkpoint's tensors do not fit this agent ({names}); give its own flags.")
    if not saved and getattr(args, "adapter", None):
        load_adapter(backbone, args.adapter)
        args.lora_rank = backbone.config["lora"]["r"]
        keep_alpha(args, backbone.config["lora"]["lora_alpha"])
    elif getattr(args, "lora_rank", 0) and not backbone.config.get("lora"):
        add_lora(backbone, args.lora_rank, args.lora_alpha)
        args.lora_alpha = backbone.config["lora"]["lora_alpha"]
    elif getattr(args, "lora_alpha", 0) and not args.lora_rank:
        raise UserError("--lora-alpha does nothing without --lora-rank; drop it.")
    if train_vision is False:
        for parameter in backbone.vision_parameters():
            parameter.requires_grad_(False)
        blind = model_module(args.backbone).FROM_SCRATCH and not saved and backbone.vision_parameters()
        blind = blind and not backbone.has_files
        if blind and not run.rank:
            say(
                "warning: the policy starts at random weights, and its eye stays so; "
                "bc_warmup.py makes a --checkpoint to start from, --train-vision trains the eye."
            )
    agent.to(run.device)


def in_files(backbone):
    """How the names in an agent begin of the weights that are in files of the backbone's own."""
    files = ("",) if backbone.has_files is True else backbone.has_files or ()
    return tuple(f"backbone.{name}" for name in files)


def stored_weights(agent):
    """What a checkpoint holds of `agent.backbone` and its heads: all adapters, and all weights but those that
    are in the base's own files as they are, for they are frozen and came from no other checkpoint."""
    weights, backbone = agent.state_dict(), agent.backbone
    frozen = {name for name in weights if name.startswith(in_files(backbone)) and "lora_" not in name}
    frozen -= {f"backbone.{name}" for name, p in backbone.named_parameters() if p.requires_grad}
    frozen = {name for name in frozen if name.replace(".base_layer", "") not in backbone.moved}
    return {name: x for name, x in weights.items() if name not in frozen}


def export(agent, envs, args, run):
    """At a run's end: the adapters in PEFT's format, and with --merge-and-save the merged weights, which then
    take the place of the agent's backbone and are evaluated as the run was. Weights that were trained in
    parts, without adapters, are the run's own and evaluated already."""
    backbone, parts = agent.backbone, distributed.sharded(agent)
    folder = getattr(args, "merge_and_save", None)
    if folder and parts:
        distributed.collect_weights(backbone)
    if not run.rank and backbone.has_files and backbone.config.get("lora") and not args.evaluate:
        save_adapter(backbone, run.folder / "adapter")
    if folder and not run.rank:
        backbone.save_merged(folder)
    if not folder or parts:
        return
    distributed.all_gather(None)  # the others wait for the files
    for tensor in (*backbone.parameters(), *backbone.buffers()):  # two models may not fit
        tensor.grad, tensor.data = None, tensor.new_empty(0)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # what is free is asked of the driver
    own = dict(backbone=folder, checkpoint=None, adapter=None, merge_and_save=None, lora_rank=0, lora_alpha=0)
    run.saved = None  # the weights are those files' alone
    args = dataclasses.replace(args, evaluate=True, **own)
    agent.backbone = load_backbone(args, envs, run).to(run.device)
    run.merged(folder, evaluate(agent, envs, args, run))


def keep_alpha(args, alpha):
    """The adapters that are there have this alpha: UserError if --lora-alpha is another."""
    if args.lora_alpha not in (0, alpha):
        raise UserError(f"The adapters have alpha {alpha}; use --lora-alpha {alpha} or 0.")
    args.lora_alpha = alpha


def add_lora(backbone, rank, alpha=0):
    """Freeze the backbone and put LoRA adapters (Hu et al. 2021; B = 0) on the modules that match its
    `lora_targets`, a regular expression. The model computes the same function until it is trained. alpha: 0
    for the backbone's `lora_alpha`, or twice the rank.
    """
    if not backbone.lora_targets:
        raise UserError(f"The backbone {backbone.config['name']!r} takes no LoRA; use --lora-rank 0.")
    targets = backbone.lora_targets
    alpha = alpha or getattr(backbone, "lora_alpha", 2 * rank)
    inject_lora(backbone, peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))


def inject_lora(backbone, config):
    """Put the adapters of PEFT's `config` on the backbone, whose own config keeps their settings."""
    config.lora_dropout = 0.0  # else the policy that is trained is not the one that acts: no ratio is 1
    settings = {name: getattr(config, name) for name in LORA}
    backbone.config["lora"] = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    peft().inject_adapter_in_model(config, backbone)  # freezes all but the adapters
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # Adam's small steps would be lost in bfloat16
    for part in getattr(backbone, "new_parts", ()):  # frozen, they would stay random
        part.requires_grad_(True)
    for module in backbone.modules():
        if isinstance(module, peft().tuners.tuners_utils.BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # the backbone's autocast does it once


def find_checkpoint(path):
    """A folder, or a hub id, from the hub or its cache -> Path. UserError in one sentence."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give a checkpoint's folder.")
        return folder
    if path.count("/") != 1 or path[0] in "./~":
        raise UserError(f"{path} does not exist; give a checkpoint's folder or a hub id.")
    others = ["*/*", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot"]  # the weights once more
    try:
        return Path(huggingface_hub.snapshot_download(path, ignore_patterns=others))
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{path} is neither a folder nor, complete, in the hub's cache, and the hub cannot be reached; "
            f"download it where it can (hf download {path} --local-dir FOLDER), or use --backbone tiny."
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no {path}, or not for you; check the name, or log in (hf auth login)."
        ) from error
    except Exception as error:  # the hub's many ways to say no
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be had from the hub ({reason}); check name and disk.") from error


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


def read_weights(Model, path, folder, config, dtype, missing=(), unexpected=(), **options):
    """transformers' class `Model` of `config` with the weights in `folder`, rounded to `dtype`. UserError for
    damaged files, and for tensors that do not fit, but for those that may be missing or unexpected (None:
    any may be, as heads of another use)."""
    from transformers.utils import logging  # whose import takes seconds

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is told below
    logging.disable_progress_bar()
    with intact(folder):
        model, report = Model.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True,
            ignore_mismatched_sizes=True, use_safetensors=True, **options,
        )  # fmt: skip
    logging.set_verbosity(level)
    wrong = {key[0] for key in report["mismatched_keys"]} | set(report["missing_keys"]) - set(missing)
    wrong |= set(report["unexpected_keys"]) - set(unexpected) if unexpected is not None else set()
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise UserError(f"{path} has {len(wrong)} tensors that do not fit, such as {names}.")
    return model


def check_memory(path, device, weights, update, smaller="--lora-rank 32"):
    """UserError if `device` has too little free memory for the weights, or for an update (0 for none), which
    `smaller` would shrink."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if weights + update > free:
        needs = f"{weights / 1e9:.1f} GB for its weights"
        needs += f" and {update / 1e9:.1f} GB for an update" if update else ""
        hints = f"{smaller}, a smaller --micro-batch-size (bc_warmup.py: --batch-size), "
        hints = hints if update and weights < free else ""
        raise UserError(
            f"{path} needs {needs}, and {device} has {free / 1e9:.1f} GB free; use {hints}another device, or "
            "--backbone tiny."
        )


def fingerprint(model):
    """A few numbers of every weight, by which an adapter knows its base."""
    digest = hashlib.sha256()
    for tensor in model.parameters():
        digest.update(tensor.detach().flatten()[:8].cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


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
        config = peft().LoraConfig.from_pretrained(folder)
        largest = max((tensor.shape[0] for name, tensor in state.items() if "lora_A" in name), default=0)
        if max(config.r, *config.rank_pattern.values(), 0) > largest:  # before it is allocated
            raise ValueError(f"no tensor has its rank {config.r}")
        if not math.isfinite(config.lora_alpha + sum(config.alpha_pattern.values())):
            raise ValueError("its alpha is not finite")
    with intact(file):
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("its numbers are not finite, or no floats")
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
    except Exception as error:  # no module of the names that it has, or settings of any type
        raise wrong from error
    mine = {n.replace(".default", ""): p for n, p in backbone.named_parameters() if "lora_" in n}
    if {n: p.shape for n, p in mine.items()} != {n: tensor.shape for n, tensor in state.items()}:
        raise wrong
    for name, parameter in mine.items():
        parameter.data.copy_(state[name])
