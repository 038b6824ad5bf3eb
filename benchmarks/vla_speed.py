"""Speed, memory and FLOPs of OpenVLA and OpenVLA-OFT, as tables in Markdown.

    python benchmarks/vla_speed.py --random-init    # a GPU with 24 GB or more; the default: downloads nothing
    python benchmarks/vla_speed.py --tiny           # the same code at a tiny width, on the CPU in seconds

Pictures are noise of LIBERO's size, the prompt has 35 tokens. FLOPs and the presets' estimated memory are
those of the full size in either case: PyTorch counts them on the meta device, where nothing is computed.
"""

import contextlib
import gc
import sys
import time
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_vla  # noqa: E402
from common import UserError  # noqa: E402
from common.backbones import add_lora, build_backbone  # noqa: E402
from common.backbones.openvla import CHECKPOINTS, memory_needed, update_memory  # noqa: E402

PRESETS = {  # GPU memory in GB -> settings of the PPO update, one picture, LoRA on the language model
    24: dict(micro_batch_size=8, gradient_checkpointing=True, load_in_4bit=False),
    48: dict(micro_batch_size=8, gradient_checkpointing=False, load_in_4bit=False),
    80: dict(micro_batch_size=16, gradient_checkpointing=False, load_in_4bit=False),
}
FLOPS, BANDWIDTH = 798e12, 3.0e12  # a second, of an H100's bf16 matrix products and copies: for the floors
# By hand, from the published sizes: forward -> chunk, cameras, action tokens seen, TFLOPs of vision and of
# the language model, floor in ms.
SPECIFIED = {
    "openvla, prefill": (1, 1, 0, 0.405, 3.79, 5.26),
    "openvla, scoring": (1, 1, 6, 0.405, 3.88, 5.38),
    "openvla-oft, 1 picture": (8, 1, 0, 0.405, 4.59, 6.25),
    "openvla-oft, 2 pictures, proprioception": (8, 2, 0, 0.810, 8.04, 11.1),
}
MODELS = {"openvla-oft": 8, "openvla": 1}  # -> chunk
PUBLISHED = {8: CHECKPOINTS["libero_spatial"], 1: "openvla/openvla-7b-finetuned-libero-spatial"}
INSTRUCTION = " ".join(["word"] * 24)  # with "In: What action should the robot take to" and so on 35 tokens
TINY = dict(
    featurizer=dict(dim=64, depth=3, hidden=128, head_dim=64, patch=14, patches=16, registers=4),
    fused_featurizer=dict(dim=72, depth=3, hidden=128, head_dim=72, patch=14, patches=16, registers=-1),
    text=dict(vocab_size=32064, pad_token_id=32000, hidden_size=64, intermediate_size=128)
    | dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4),
)  # fmt: skip


@dataclass
class Args:
    random_init: bool = True
    """random weights; with --no-random-init the published ones, from the hub or its cache"""
    tiny: bool = False
    """measure a tiny width instead of the full size"""
    models: tuple[Literal["openvla-oft", "openvla"], ...] = ("openvla-oft", "openvla")
    """whose inference and update are measured"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where it is measured"""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)
    """of inference"""
    minibatch_size: int = 64
    """decisions per optimizer step of the update"""
    lora_rank: int = 32
    """rank of the adapters on the language model"""
    seconds: float = 2.0
    """each figure is the mean over at least this long, with --tiny a tenth of it"""
    peak_tflops: float = 989.0
    """what MFU divides by: the GPU's dense bf16 peak (H100 and H200 989, A100 312, RTX 4090 165)"""


# --- counted on the meta device


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make, and that are alive: their largest sum, in `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known.update(storages((args, kwargs)))  # the weights, of which views are made
        out = func(*args, **(kwargs or {}))
        for storage in (x for x in storages(out) if x not in self.known):
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def storages(tree):
    return {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What SDPA runs on a GPU where nothing is padded; the meta device would take the plain formula."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


class FusedNorm(torch.autograd.Function):
    """What RMSNorm's kernel on a GPU keeps, its input; the meta device would take the plain formula."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient), None, None, None


def count_flops(work):
    """FLOPs of work(), 2 a multiplication and addition, and how many of them are attention's"""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        FlopCounterMode(display=False) as counter,
    ):
        work()
    operations = counter.get_flop_counts()["Global"]
    attention = sum(flops for name, flops in operations.items() if "attention" in str(name))
    return np.array([counter.get_total_flops(), attention])


def count(agent, batch, actions, train=False):
    """FLOPs of vision and projector, and of the language model, with `train` forward and backward; of causal
    attention, of which the kernel skips what nobody sees, half."""
    model, features = agent.backbone, []
    with torch.no_grad():
        towers = count_flops(lambda: features.append(model.encode_vision(batch)[0]))
        projector = count_flops(lambda: model.projector(features[0]))
    with torch.set_grad_enabled(train):
        rest = count_flops(lambda: losses(agent, batch, actions, features[0])) - projector
    return (towers + projector)[0], rest[0] - rest[1] / 2 * model.autoregressive


def count_memory(agent, batch, actions):
    """Bytes that a micro-batch's forward and backward hold at their peak, weights and adapters apart."""
    vision = None
    if not any(p.requires_grad for p in agent.backbone.vision_parameters()):
        with torch.no_grad():
            vision = agent.backbone.encode_vision(batch)[0]
    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        mock.patch.object(F, "rms_norm", FusedNorm.apply),
        PeakMemory() as memory,
    ):
        losses(agent, batch, actions, vision)
    return memory.peak


# --- the model and the work


def make_agent(chunk, device, sizes=None, rank=0, path="random", **config):
    config |= dict(path=path, sizes=sizes, chunk=chunk, libero=True, unnorm_key="none", device=device)
    model = build_backbone("openvla", **config)
    if rank:
        add_lora(model, rank)
    if device == "meta":  # it has no autocast; all that is kept has 16 bits with it, too
        model.bfloat16()._autocast = contextlib.nullcontext
    box = gymnasium.spaces.Box(-1, 1, (7,), np.float32)
    args = ppo_vla.Args(head="tokens", chunk=chunk, temperature=1.6, detach_value=True)
    return ppo_vla.Agent(model, args, SimpleNamespace(single_action_space=box)).to(device)


def observe(size, cameras=1):
    rng = np.random.default_rng(0)
    return dict(
        image=rng.integers(0, 256, (size, cameras, 256, 256, 3), np.uint8),
        proprio=rng.normal(size=(size, 8)).astype(np.float32), task=np.zeros(size, int),
    )  # fmt: skip


def empty_batch(model, size, cameras):
    """What `preprocess` returns, on the meta device."""
    side, empty = model.image_size, torch.empty
    return dict(
        image=empty(size, cameras, 3, side, side, dtype=torch.uint8, device="meta"),
        input_ids=empty(size, len(model.encode_prompt(INSTRUCTION)), dtype=torch.long, device="meta"),
        proprio=empty(size, 8, device="meta"),
    )


def losses(agent, batch, actions, vision, size=1):
    """ppo_vla.py's loss for a micro-batch of a minibatch of this size, and its gradients."""
    args, one = ppo_vla.Args(chunk=agent.backbone.chunk), torch.ones(len(actions), device=actions.device)
    log_probs, entropies, values = agent.evaluate_actions(batch, actions, vision)
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    old_log_probs, _ = ppo_vla.merge_tokens(log_probs.detach(), mask, args.ratio_level, args.chunk)
    made = dict(mask=mask, old_log_probs=old_log_probs, values=one, returns=one, advantages=one)
    totals = size * torch.tensor([args.chunk, mask.shape[1], 1], device=actions.device)
    loss, _ = ppo_vla.ppo_loss(log_probs, entropies, values, made, totals, args)
    if loss.requires_grad:
        loss.backward()


def make_update(agent, size, micro_batch_size):
    """-> one optimizer step of `size` decisions, of which the vision features are at hand, as a function"""
    model, trained = agent.backbone, [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, eps=1e-5, weight_decay=0.0)
    with torch.no_grad():
        batch = model.preprocess(observe(size), [INSTRUCTION])
        parts = [take(batch, slice(i, i + 8)) for i in range(0, size, 8)]
        vision = torch.cat([model.encode_vision(part)[0] for part in parts])
    del batch["image"]
    actions = torch.randint(256, (size, model.chunk * 7), device=vision.device)

    def update():
        for i in range(0, size, micro_batch_size):
            rows = slice(i, i + micro_batch_size)
            losses(agent, take(batch, rows), actions[rows], vision[rows], size)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def take(batch, rows):
    return {key: x[rows] for key, x in batch.items()}


# --- measured


def measure(work, device, seconds):
    """Mean seconds of work() after a first call, and the peak memory in GB (None on the CPU)"""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    wait = torch.cuda.synchronize if cuda else lambda: None
    work()
    wait()
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        work()
        wait()  # as an environment does, which waits for its actions
        calls += 1
    return (time.perf_counter() - start) / calls, torch.cuda.max_memory_allocated() / 1e9 if cuda else None


def inference_rows(name, agent, flops, args, device):
    """Chunks/s from the preprocessed batch on the device to actions on the host, and from the pictures."""
    model, generator = agent.backbone, torch.Generator(device).manual_seed(0)
    weights = sum(p.numel() * p.element_size() for p in model.language_model.parameters())

    @torch.no_grad()
    def act(batch):
        actions = agent.get_action_and_value(batch, generator=generator)[0]
        return model.to_env(agent.head.to_env(actions)).cpu().numpy()

    def see_and_act(obs):
        return act(model.preprocess(obs, [INSTRUCTION]))

    for size in args.batch_sizes:
        obs, memory = observe(size), "out of memory"
        with contextlib.suppress(torch.OutOfMemoryError):
            batch = model.preprocess(obs, [INSTRUCTION])
            bare, _ = measure(partial(act, batch), device, args.seconds)
            whole, memory = measure(partial(see_and_act, obs), device, args.seconds)
        if memory == "out of memory":
            release()
            yield name, size, memory, *"----"
            continue
        floor = max(flops * size / FLOPS, weights / BANDWIDTH)
        if model.autoregressive:  # its later tokens are bounded by reading the weights
            floor += 6 * weights / BANDWIDTH
        step = 1e3 * whole / size / model.chunk
        rates = (f"{size / seconds:.1f}" for seconds in (bare, whole))
        yield name, size, *rates, f"{step:.2f}", percent(floor / bare, device), gigabytes(memory)


def update_rows(name, agent, flops, args, device):
    micro = min(args.minibatch_size, PRESETS[80]["micro_batch_size"])
    row = "openvla, scoring" if agent.backbone.autoregressive else "openvla-oft, 1 picture"
    for agent.backbone.checkpointing in (False, True):
        passes = 3 if agent.backbone.checkpointing else 2  # forwards' worth of FLOPs
        floor = passes * sum(SPECIFIED[row][3:5]) * 1e12 / FLOPS
        start, memory = (name, on(agent.backbone.checkpointing), micro), "out of memory"
        with contextlib.suppress(torch.OutOfMemoryError):
            update = make_update(agent, args.minibatch_size, micro)
            seconds, memory = measure(update, device, args.seconds)
        if memory == "out of memory":
            release()
            yield *start, memory, *"----"
            continue
        seconds /= args.minibatch_size
        mfu = flops / seconds / args.peak_tflops / 1e12
        rates = f"{1 / seconds:.1f}", f"{1e3 * seconds:.1f}"
        yield *start, *rates, percent(floor / seconds, device), percent(mfu, device), gigabytes(memory)


def preset_rows(args, device):
    """The full size's estimates and, where the GPU is large enough, the peak of an update."""
    agent = make_agent(8, "meta", rank=args.lora_rank)
    shapes = {name: p.shape for name, p in agent.backbone.named_parameters() if "lora_" not in name}
    for size, preset in PRESETS.items():
        four, micro = preset["load_in_4bit"], preset["micro_batch_size"]
        agent.backbone.checkpointing = preset["gradient_checkpointing"]
        actions = torch.empty(micro, 56, dtype=torch.long, device="meta")
        estimate = (
            memory_needed(shapes, torch.bfloat16, four),
            *update_memory(agent.backbone, micro, agent.backbone.checkpointing, args.lora_rank),
        )
        counted = count_memory(agent, empty_batch(agent.backbone, micro, 1), actions)
        measured = "not measured yet"
        if device.type == "cuda" and not args.tiny:
            measured = "does not fit here"
            with contextlib.suppress(torch.OutOfMemoryError, UserError):
                real = make_agent(8, device, rank=args.lora_rank, load_in_4bit=four)
                real.backbone.checkpointing = preset["gradient_checkpointing"]
                measured = gigabytes(measure(make_update(real, 2 * micro, micro), device, 0)[1])
            real = None
            release()
        sums = (gigabytes(x / 1e9) for x in (*estimate, sum(estimate), counted))
        yield size, micro, on(preset["gradient_checkpointing"]), 4 if four else 16, *sums, measured


def release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- tables


def on(flag):
    return "on" if flag else "off"


def gigabytes(x):
    return "-" if x is None else f"{x:.1f}"


def percent(share, device):
    return f"{100 * share:.0f} %" if device.type == "cuda" else "-"  # the floors are a GPU's


def table(title, header, rows):
    print(f"\n{title}\n\n| {header} |\n|{' --- |' * len(header.split('|'))}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def specified_rows():
    for name, (chunk, cameras, tokens, *wanted) in SPECIFIED.items():
        sizes = dict(proprio=8) if cameras == 2 else None
        agent = make_agent(chunk, "meta", sizes)
        batch = empty_batch(agent.backbone, 1, cameras)
        actions = torch.empty(1, tokens + 1 if chunk == 1 else 56, dtype=torch.long, device="meta")
        vision, language = (x / 1e12 for x in count(agent, batch, actions))
        counted = [f"{vision:.3f}", f"{language:.2f}", f"{1e15 * (vision + language) / FLOPS:.2f}"]
        yield name, *(x for pair in zip(counted, wanted, strict=True) for x in pair)


def main(args):
    if args.tiny and not args.random_init:
        raise UserError("There are no published weights of a tiny width; drop --tiny or --no-random-init.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no CUDA GPU here; use --device cpu.")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    args.seconds /= 10 if args.tiny else 1
    sizes, dtype = (TINY, "float32") if args.tiny else (None, "bfloat16")
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    width = "a tiny width" if args.tiny else "full size"
    weights = "random" if args.random_init else "published"
    print(f"{where}, PyTorch {torch.__version__}, {width}, {dtype}, {weights} weights")

    table(
        "FLOPs of a forward of the full size: counted, and by hand from the published sizes. By hand, the "
        "scoring sees the last action too, and lm_head has all its 32064 rows.",
        "forward | vision, T | by hand | language model, T | by hand | floor, ms | by hand",
        specified_rows(),
    )
    flops = {}
    for name, chunk in MODELS.items():
        agent = make_agent(chunk, "meta", sizes, args.lora_rank)
        actions = torch.empty(1, chunk * 7, dtype=torch.long, device="meta")
        batch = empty_batch(agent.backbone, 1, 1)
        forward, update = sum(count(agent, batch, actions)), count(agent, batch, actions, train=True)[1]
        flops[name] = dict(forward=forward, update=update)
        print(f"\n{name}: {forward / 1e12:.3g} TFLOPs a forward with the adapters", end=", ")
        print(f"{update / 1e12:.3g} an update of them, vision features at hand (of a decision, {width})")

    def rows(kind, work):  # as they come: what is measured stays, whatever happens next
        for name in args.models:
            chunk = MODELS[name]
            path = "random" if args.random_init else PUBLISHED[chunk]
            agent = make_agent(chunk, device, sizes, args.lora_rank, path, dtype=dtype)
            yield from kind(name, agent, flops[name][work], args, device)
            agent = None
            release()

    table(
        "Inference",
        "model | batch | chunks/s | with preprocessing | ms an environment action | of the floor's speed | "
        "peak GB",
        rows(inference_rows, "forward"),
    )
    table(
        f"PPO update, LoRA rank {args.lora_rank} on the language model, minibatch {args.minibatch_size}",
        "model | checkpointing | micro-batch | samples/s | ms a sample | of the floor's speed | MFU | "
        "peak GB",
        rows(update_rows, "update"),
    )
    table(
        f"Presets of the full size, LoRA rank {args.lora_rank}: estimated GB of an update. A rollout keeps "
        "the vision features of its decisions, 1.1 MB each, on top.",
        "GPU | micro-batch | checkpointing | bits | weights | adapters, AdamW | activations | sum | "
        "activations, counted | measured peak",
        preset_rows(args, device),
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
