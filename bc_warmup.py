"""Behaviour cloning of a vision-language-action policy from demonstrations, in one file: stage 1.

    python bc_warmup.py --run-name warmup                        # scripted demonstrations, made on the fly
    python bc_warmup.py --demos demos.hdf5 --run-name warmup     # RoboMimic's and LIBERO's layout
    python ppo_vla.py --checkpoint runs/warmup/checkpoint.pt     # stage 2

Cross-entropy on the 256-bin action tokens of the next K actions (OpenVLA, Kim et al. 2024; chunks after
OpenVLA-OFT, 2025). The 7B models come with a pretrained eye for words and things; the tiny one is random, so
a short grounding stage comes first: on random pictures its attention learns to point at the object and the
plate that the instruction names, whose pixels the simulator knows. It stands in for the pretrained VLM and
uses nothing but the training layouts. Expect on 2 CPU cores (3 seeds): 0.44 greedy success (median; 0.39 to
0.62) in 4 minutes.
"""

import contextlib
import dataclasses
import importlib.util
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import UserError, distributed
from common.action_tokenizer import ActionTokenizer
from common.backbones import add_lora, load_adapter, load_backbone, save_adapter
from common.checkpoint import (
    CheckpointError,
    hardware,
    load_checkpoint,
    rng_state,
    run_folder,
    save_checkpoint,
    set_rng_state,
    versions,
    write_results,
)
from common.datasets import chunk_targets, load_demonstrations
from common.envs import make_envs, tabletop
from common.video import annotate, write_video


@dataclass
class Args:
    # --- experiment
    env: Literal["tabletop", "libero"] = "tabletop"
    """the world that evaluates; tabletop makes the demonstrations when no --demos are given"""
    tasks: tuple[str, ...] = ()
    """kinds of task (tabletop: lift, put, move), numbers (libero) or instructions; empty for all"""
    suite: str = "libero_spatial"
    """libero: libero_spatial, libero_object, libero_goal, libero_10, libero_90"""
    protocol: Literal["oft", "simplevla"] = "oft"
    """libero: whose evaluation is followed, openvla-oft's or SimpleVLA-RL's"""
    cameras: tuple[str, ...] = ("agentview",)
    """the pictures that the policy sees (agentview, wrist)"""
    renderer: Literal["ray", "gl"] = "ray"
    """tabletop: MuJoCo's ray caster, which needs no GL, or mujoco.Renderer"""
    reward: Literal["sparse", "shaped"] = "sparse"
    """tabletop: 1 at success, or with a difference of potentials added"""
    eval_split: str = "eval"
    """eval; tabletop: or a held-out variation (vision, semantics, execution)"""
    demos: str | None = None
    """HDF5 file of demonstrations in RoboMimic's or LIBERO's layout, or a folder of them (LIBERO has a file a
    task); default: the scripted expert makes them"""
    seed: int = 1
    """fixes demonstrations, initial weights, sampling and minibatch order"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy runs"""
    checkpoint: str | None = None
    """start from these weights: a file, a run's folder, or an OpenVLA checkpoint's folder"""
    resume: str | None = None
    """continue this run (its folder) exactly where its last checkpoint stands, with its own arguments"""
    evaluate: bool = False
    """no training: evaluate --checkpoint and write results.json"""
    deterministic: bool = True
    """evaluate greedily; --no-deterministic samples at --temperature"""
    capture_video: bool = False
    """write annotated videos of the first evaluation episodes"""
    track: bool = False
    """log to Weights & Biases beside TensorBoard"""
    output_dir: str = "runs"
    """where run folders are made"""
    run_name: str | None = None
    """the run folder's name; default <env>__<script>__<seed>__<time>"""
    num_workers: int | None = None
    """processes for environments and demonstrations; default one a core, 0 for none"""
    eval_envs: int = 100
    """parallel environments of an evaluation"""
    eval_episodes: int = 200
    """episodes of an evaluation, on layouts that training never shows"""
    eval_freq: int = 0
    """gradient steps between evaluations; 0 for the last only"""
    save_freq: int = 200
    """gradient steps between checkpoints"""

    # --- algorithm
    backbone: str = "tiny"
    """tiny, the folder or hub id of an OpenVLA checkpoint, or openvla for the suite's published one;
    when no --checkpoint says which"""
    head: Literal["tokens", "gaussian"] = "tokens"
    """256-bin action tokens by cross-entropy, or a continuous chunk by its L1 distance (OpenVLA-OFT)"""
    chunk: int = 4
    """K, actions a decision, executed open loop"""
    action_history: int = 0
    """the last n executed actions as an input"""
    lora_rank: int = 0
    """rank of the adapters; 0 trains every weight"""
    lora_modules: tuple[Literal["language_model", "projector", "vision"], ...] = (
        "language_model",
        "projector",
        "vision",
    )
    """openvla: the parts with adapters"""
    adapter: str | None = None
    """openvla: start from these LoRA adapters, a folder in PEFT's format"""
    merge_and_save: str | None = None
    """openvla: at the end, or with --evaluate, write the merged weights in the published layout here"""
    family: Literal["auto", "openvla", "openvla-oft"] = "auto"
    """openvla: tokens one after another, or OFT's all at once; auto looks for OFT's traces"""
    unnorm_key: str | None = None
    """openvla: the data set whose statistics scale the actions, or none; default: the suite, or the only
    one"""
    statistics: str | None = None
    """openvla: a dataset_statistics.json in place of the checkpoint's own"""
    load_in_4bit: bool = False
    """openvla: language model in 4 bits, through bitsandbytes"""
    gradient_checkpointing: bool = False
    """openvla: recompute each block in the backward pass: a third more time, far less memory"""
    num_demos: int = 600
    """demonstrations: scripted ones to make, or the first of each file of --demos"""
    demo_noise: float = 0.3
    """standard deviation of the noise on the scripted expert's executed actions; its labels stay clean"""
    grounding_scenes: int = 6000
    """random pictures for the grounding stage (scripted demonstrations only)"""
    grounding_steps: int = 300
    """gradient steps of the grounding stage"""
    grounding_coef: float = 0.1
    """weight of the grounding loss beside the imitation loss"""
    gradient_steps: int = 1000
    """gradient steps of imitation"""
    batch_size: int = 128
    """decisions per gradient step"""
    learning_rate: float = 1.5e-3
    """AdamW; cosine decay to zero over the imitation steps"""
    warmup_steps: int = 50
    """linear warm-up of the learning rate in both stages"""
    label_sigma: float = 3.0
    """tokens: the target is a Gaussian of this many bins around the demonstrated bin: near misses cost
    less"""
    max_grad_norm: float = 1.0
    """global gradient norm clip"""
    temperature: float = 0.35
    """divides the logits when sampling (--no-deterministic)"""
    init_std: float = 0.2
    """gaussian head: the standard deviation that PPO starts with"""
    learn_std: bool = False
    """gaussian head: imitation leaves the standard deviation alone"""


PRESETS = {  # what differs from the defaults, which are tabletop's; flags on the command line win
    "libero": dict(
        backbone="openvla", chunk=8, eval_envs=32, num_demos=50, grounding_steps=0, gradient_steps=10_000,
        batch_size=16, learning_rate=5e-4, label_sigma=0.0, temperature=1.6, save_freq=1000,
    ),
}  # fmt: skip


# --- the mathematics: pure functions on tensors


def soft_cross_entropy(logits, bins, sigma):
    """Cross-entropy (M,) of logits (M, 256) against a Gaussian of `sigma` bins around each target bin (M,),
    cut off at the ends and normalised. sigma -> 0 is the plain cross-entropy."""
    if sigma <= 0:
        return F.cross_entropy(logits, bins, reduction="none")
    index = torch.arange(logits.shape[-1], device=logits.device)
    table = (-0.5 * ((index[:, None] - index) / sigma).square()).softmax(-1)  # (256, 256)
    return -(table[bins] * logits.log_softmax(-1)).sum(-1)


def grounding_loss(attention, pixels):
    """Cross-entropy between attention maps and where the named things are: a scalar.

    attention: logits (B, cameras, >=2, side*side), the first two queries belong to object and plate. pixels
    (B, cameras, 2, 2) in [-1, 1], x right and y down, nan where a thing is not named or not in sight. The
    target puts bilinear weights on the four nearest cells, so that its mean position is the pixel exactly.
    """
    side = int(attention.shape[-1] ** 0.5)
    cell = (pixels + 1) / 2 * side - 0.5
    there = ~cell.isnan().any(-1)
    cell = cell.nan_to_num().clamp(0, side - 1)
    low = cell.floor().clamp(max=side - 2)
    x, y = (cell - low).unbind(-1)
    corner = (low[..., 1] * side + low[..., 0]).long()
    corners = torch.stack([corner, corner + 1, corner + side, corner + side + 1], -1)
    weights = torch.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], -1)
    loss = -(weights * attention[:, :, :2].log_softmax(-1).gather(-1, corners)).sum(-1)
    return (loss * there).sum() / there.sum().clamp(min=1)


def learning_rate_at(step, args):
    """Constant through the grounding stage, then a cosine to zero; linear warm-up at the start of either."""
    if step < args.grounding_steps:
        return args.learning_rate * min(1.0, (step + 1) / args.warmup_steps)
    done = step - args.grounding_steps
    cosine = 0.5 * (1 + np.cos(np.pi * done / args.gradient_steps))
    return args.learning_rate * cosine * min(1.0, (done + 1) / args.warmup_steps)


# --- heads and agent


class TokenHead(nn.Module):
    """Action tokens: a categorical over 256 bins for each of the K*A numbers. Actions are slice indices (B,
    K*A)."""

    def __init__(self, backbone, args):
        super().__init__()
        self.temperature, self.tokenizer = args.temperature, ActionTokenizer()
        self.shape = (backbone.chunk, backbone.action_dim)

    def forward(self, backbone, action_hidden):
        return backbone.action_logits(action_hidden).float() / self.temperature  # (B, K*A, 256)

    def sample(self, logits, deterministic, generator):
        if deterministic:
            return logits.argmax(-1)
        # argmax(p / Exp(1)) is a draw from p, without multinomial's synchronisation
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=generator)).argmax(-1)

    def log_prob(self, logits, actions):
        return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]  # (B, K*A)

    def entropy(self, logits):
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    def to_env(self, actions):
        return self.tokenizer.decode_bins(actions).unflatten(1, self.shape).cpu().numpy()


class GaussianHead(nn.Module):
    """A Gaussian per number of the continuous chunk: means from the hidden states, one standard deviation per
    action dimension. Actions are floats (B, K*A); the environment clips them, the log-prob is of the
    unclipped ones."""

    def __init__(self, backbone, args):
        super().__init__()
        self.shape = (backbone.chunk, backbone.action_dim)
        self.mean = None  # the backbone has a trained head of its own (OFT's L1 head)
        if getattr(backbone, "action_head", None) is None:
            self.mean = nn.Linear(backbone.hidden_size, 1)
            nn.init.orthogonal_(self.mean.weight, 0.01)
            nn.init.zeros_(self.mean.bias)
        log_std = torch.full((backbone.action_dim,), float(np.log(args.init_std)))
        self.log_std = nn.Parameter(log_std, requires_grad=args.learn_std)

    def forward(self, backbone, action_hidden):
        if self.mean is None:
            mean = backbone.action_mean(action_hidden)
        else:
            mean = self.mean(action_hidden).squeeze(-1).float()  # (B, K*A)
        std = self.log_std.exp().repeat(self.shape[0]).expand_as(mean)
        return torch.distributions.Normal(mean, std, validate_args=False)  # checks would wait for the GPU

    def sample(self, normal, deterministic, generator):
        if deterministic:
            return normal.mean
        noise = torch.empty_like(normal.mean).normal_(generator=generator)
        return normal.mean + normal.stddev * noise

    def log_prob(self, normal, actions):
        return normal.log_prob(actions)

    def entropy(self, normal):
        return normal.entropy()

    def to_env(self, actions):
        actions = actions.unflatten(1, self.shape)
        return (actions if self.mean is None else actions.clamp(-1, 1)).cpu().numpy()  # L1: as published


def make_head(backbone, args):
    if not backbone.vision_parameters():
        raise UserError(f"The backbone {backbone.config['name']!r} sees no images; use --backbone tiny.")
    return TokenHead(backbone, args) if args.head == "tokens" else GaussianHead(backbone, args)


class Agent(nn.Module):
    """Backbone and action head; the value head comes with reinforcement learning."""

    def __init__(self, backbone, args):
        super().__init__()
        self.backbone, self.head = backbone, make_head(backbone, args)

    def get_action_and_value(self, batch, vision=None, deterministic=False, generator=None):
        """-> actions and their log-probs (B, K*A), no value"""
        if self.backbone.autoregressive:  # a token needs those before it

            def draw(hidden):
                return self.head.sample(self.head(self.backbone, hidden), deterministic, generator)

            actions, action_hidden, _ = self.backbone.generate(batch, draw, vision)
            distribution = self.head(self.backbone, action_hidden)
        else:
            distribution = self.head(self.backbone, self.backbone(batch, vision)[0])
            actions = self.head.sample(distribution, deterministic, generator)
        return actions, self.head.log_prob(distribution, actions), None

    def imitation_loss(self, batch, vision, targets, mask, sigma):
        """targets: bins (tokens) or actions (gaussian), and mask, both (B, K*A) -> scalar, the mean over the
        mask"""
        tokens = isinstance(self.head, TokenHead)
        action_hidden = self.backbone(batch, vision, targets if tokens else None)[0]
        if tokens:  # logits of the valid ones only
            logits = self.backbone.action_logits(action_hidden[mask]).float()
            return soft_cross_entropy(logits, targets[mask], sigma).mean()
        return (self.head(self.backbone, action_hidden).mean - targets).abs()[mask].mean()


# --- evaluation


def wilson_interval(successes, episodes, z=1.96):
    """95 % confidence interval of a success rate (Wilson 1927); sound near 0 and 1, unlike p +- 2 sigma."""
    p, n = successes / episodes, episodes
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return [float(max(low, 0)), float(min(high, 1))]  # else -1e-17 by rounding


def summarize(outcomes, has_success, instructions):
    """outcomes: rows (success, return, length, task) -> the evaluation's dict of the run folder's
    contract."""
    success, reward, length, task = np.asarray(outcomes, dtype=float).T
    result = {"episodes": len(outcomes)}
    if has_success:
        result["success_rate"] = float(success.mean())
        result["success_rate_ci95"] = wilson_interval(success.sum(), len(outcomes))
    result |= {"mean_reward": float(reward.mean()), "mean_length": float(length.mean())}
    if len(instructions) > 1:
        groups = {instructions[int(i)]: [row for row in outcomes if row[3] == i] for i in np.unique(task)}
        result["per_task"] = {name: summarize(rows, has_success, ()) for name, rows in groups.items()}
    return result


@torch.no_grad()
def evaluate(agent, envs, args, device, video_folder=None):
    """`--eval-episodes` episodes with seeds 0, 1, 2, ... of the evaluation split -> the evaluation's dict.

    Nothing is computed for finished environments, and neither the training's generators nor its environments
    move.
    """
    agent.eval()
    rank, world = distributed.ranks()
    generator = torch.Generator(device).manual_seed(args.seed + rank)
    total, size = len(range(rank, args.eval_episodes, world)), envs.num_envs
    seeds = np.arange(size)  # the episode that each environment plays, of this process's
    running = seeds < total
    obs = envs.reset(seeds * world + rank, running)
    outcomes, frames = [None] * total, {i: [] for i in range(min(6, total, size) if video_folder else 0)}
    started = len(outcomes[:size])
    while running.any():
        rows = np.flatnonzero(running)
        batch = agent.backbone.preprocess({key: x[rows] for key, x in obs.items()}, envs.instructions)
        action, _, value = agent.get_action_and_value(batch, None, args.deterministic, generator)
        action = agent.backbone.to_env(agent.head.to_env(action))
        actions = np.zeros((size, *action.shape[1:]), action.dtype)
        actions[rows] = action
        record = np.isin(seeds, list(frames)) & running
        tasks = obs.get("task", np.zeros(size, int))
        obs, _, terminated, truncated, info = envs.step(actions, mask=running, record=record)
        for i in np.flatnonzero(record):
            for k, frame in enumerate(info["frames"][i]):
                step = info["episode_length"][i] - info["steps"][i] + k + 1
                last = (terminated | truncated)[i] and k + 1 == info["steps"][i]
                text = f"step {step}"
                text += f"   value {value[rows == i].item():.2f}" if value is not None else ""
                text += f"   {'success' if info['success'][i] else 'failure'}" if last else ""
                frames[seeds[i]].append(annotate(frame, [envs.instructions[tasks[i]], text]))
        again = info["lost"] & running  # the worker died: the same episode once more
        for i in np.flatnonzero(again & record):
            frames[seeds[i]] = []
        for i in np.flatnonzero((terminated | truncated) & running):
            row = [info[key][i] for key in ("success", "episode_return", "episode_length")]
            outcomes[seeds[i]] = (*row, tasks[i])
            seeds[i], started = started, started + 1
            again[i] = running[i] = seeds[i] < total
        if again.any():
            obs = envs.reset(seeds * world + rank, again)
    for i, pictures in frames.items():
        last = pictures[-1]
        write_video(Path(video_folder) / f"episode_{i}.mp4", pictures + [last] * 10, fps=20)
    outcomes = [row for rows in distributed.all_gather(outcomes) for row in rows]
    return summarize(outcomes, envs.has_success, envs.instructions)


def score(evaluation):
    return evaluation.get("success_rate", evaluation["mean_reward"])


# --- set-up


def resolve_args(args):
    """Presets below the command line's flags; with --resume, the run's own arguments. UserError for values
    that cannot work."""
    preset = PRESETS.get(args.env, {})
    if args.env == "libero":  # the protocol's 50 initial states a task, each once
        tasks = len(args.tasks) or (90 if args.suite == "libero_90" else 10)
        preset = preset | {"eval_episodes": 50 * tasks}
    args = tyro.cli(Args, default=dataclasses.replace(Args(), env=args.env, **preset))
    if args.checkpoint and (Path(args.checkpoint) / "config.json").is_file():
        args.backbone, args.checkpoint = args.checkpoint, None
    if args.resume:
        free = {"resume", "device", "num_workers", "capture_video", "track"}
        saved = load_checkpoint(args.resume, scripts=("bc_warmup",))["args"]
        if other := saved.keys() ^ {f.name for f in dataclasses.fields(Args)}:
            raise UserError(
                f"{args.resume} is of another version of this script, which differs in "
                f"{', '.join(sorted(other))}; resume it with that version, or use --checkpoint instead."
            )
        args = tyro.cli(Args, default=Args(**saved))
        clash = [name for name in saved if name not in free and getattr(args, name) != saved[name]]
        if clash:
            flags = ", ".join("--" + name.replace("_", "-") for name in clash)
            raise UserError(
                f"--resume goes on with the run's own arguments; drop {flags}, or use --checkpoint instead."
            )
    positive = "eval_envs eval_episodes save_freq chunk num_demos gradient_steps batch_size warmup_steps "
    for name in (positive + "learning_rate max_grad_norm temperature init_std").split():
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}.")
    nonnegative = "lora_rank action_history eval_freq demo_noise grounding_scenes grounding_steps "
    for name in (nonnegative + "grounding_coef label_sigma").split():
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}.")
    if args.backbone == "openvla" and args.device == "auto" and not torch.cuda.is_available():
        raise UserError(
            "--env libero runs OpenVLA 7B, which needs a CUDA GPU, and PyTorch finds none here; for a small "
            "policy from scratch use --backbone tiny, or insist with --device cpu."
        )
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be in [0, 2**63), not {args.seed}.")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs Weights & Biases; pip install wandb, or drop --track.")
    if args.evaluate and not args.checkpoint and args.backbone == "tiny":
        raise UserError("--evaluate needs --checkpoint, the weights to evaluate.")
    if args.env == "libero" and not (args.demos or args.evaluate):
        raise UserError(
            "--env libero needs --demos, the folder of the suite's HDF5 files; only tabletop makes its own."
        )
    return args


def choose_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no CUDA GPU here; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def build_envs(args, split, num_envs, autoreset):
    """This process's share of `num_envs` environments."""
    rank, world = distributed.ranks()
    if num_envs % world:
        raise UserError(f"{num_envs} environments cannot be split evenly over {world} processes.")
    names = {
        "tabletop": ("tasks", "cameras", "renderer", "reward"),
        "libero": ("tasks", "cameras", "suite", "protocol", "train_on_eval_states"),
    }.get(args.env, ())
    kwargs = {name: getattr(args, name) for name in names if hasattr(args, name)}
    kwargs |= {"split": split} if names else {}
    return make_envs(
        args.env, num_envs // world, seed=args.seed, first=rank * num_envs // world, chunk=args.chunk,
        num_workers=args.num_workers, autoreset=autoreset, action_history=args.action_history, **kwargs,
    )  # fmt: skip


def concatenate(parts):
    """What `load_demonstrations` returns, of several files, as of one."""
    instructions = list(dict.fromkeys(text for part in parts for text in part["instructions"]))
    whole = {key: np.concatenate([part[key] for part in parts]) for key in ("image", "proprio", "actions")}
    tasks = [np.array([instructions.index(t) for t in p["instructions"]])[p["task"]] for p in parts]
    offsets = np.cumsum([0] + [len(part["task"]) for part in parts])
    starts = [part["episode_starts"] + offset for part, offset in zip(parts, offsets, strict=False)]
    return whole | {
        "task": np.concatenate(tasks), "episode_starts": np.concatenate(starts), "instructions": instructions
    }  # fmt: skip


def load_data(args, envs, backbone, device):
    """-> demonstrations and grounding scenes (or None) as tensors on the device."""
    world = dict(tasks=args.tasks, cameras=args.cameras, renderer=args.renderer, num_workers=args.num_workers)
    scenes = None
    if args.demos:
        keys = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
        keys = tuple(keys[camera] for camera in args.cameras)
        files = sorted(Path(args.demos).glob("*.hdf5")) if Path(args.demos).is_dir() else [args.demos]
        if not files:
            raise UserError(f"The folder {args.demos} holds no .hdf5 file; give one with demonstrations.")
        demos = concatenate([load_demonstrations(file, args.num_demos, keys) for file in files])
        if args.env == "libero":  # stored as OpenGL has them: turned as the world shows them, which resizes
            demos["image"] = np.ascontiguousarray(demos["image"][:, :, ::-1, ::-1])
        want = envs.single_observation_space["image"].shape
        if args.env == "tabletop" and demos["image"].shape[1:] != want:
            raise UserError(
                f"{args.demos} holds images {demos['image'].shape[1:]}; this run's world has {want}."
            )
        unknown = [text for text in demos["instructions"] if text not in envs.instructions]
        if unknown:
            raise UserError(
                f"{args.demos} has the instruction {unknown[0]!r}, which {args.env} does not know."
            )
        demos["task"] = np.array([envs.instructions.index(t) for t in demos["instructions"]])[demos["task"]]
        demos["executed"] = demos["actions"]
    else:
        demos = tabletop.demonstrations(args.num_demos, args.seed, noise=args.demo_noise, **world)
        if (
            args.grounding_scenes and args.grounding_steps and not args.lora_rank
        ):  # LoRA leaves the eye as it is
            scenes = tabletop.scenes(args.grounding_scenes, args.seed, **world)
            scenes = {key: torch.as_tensor(x, device=device) for key, x in scenes.items()}
            extra = scenes["proprio"].new_zeros(args.grounding_scenes, args.action_history * 7)
            scenes["proprio"] = torch.cat([scenes["proprio"], extra], 1)
    if args.action_history:  # the last n executed actions, oldest first, zeros before the episode's first
        n, starts = args.action_history, demos["episode_starts"]
        lengths = np.diff(np.append(starts, len(demos["task"])))
        position = np.arange(len(demos["task"])) - np.repeat(starts, lengths)
        past = np.arange(len(demos["task"]))[:, None] + np.arange(-n, 0)  # (S, n)
        history = demos["executed"][past.clip(0)] * (position[:, None] + np.arange(-n, 0) >= 0)[..., None]
        demos["proprio"] = np.concatenate([demos["proprio"], history.reshape(len(history), -1)], 1)
    if demos["proprio"].shape[1] != envs.single_observation_space["proprio"].shape[0]:
        want = envs.single_observation_space["proprio"].shape[0]
        raise UserError(
            f"{args.demos} has a proprio of {demos['proprio'].shape[1]} numbers; this world's has {want}."
        )
    actions = backbone.from_env(demos["actions"])
    targets, mask = chunk_targets(actions, demos["episode_starts"], args.chunk)
    keys = ("image", "proprio", "task", "pixels")
    data = {key: torch.as_tensor(demos[key], device=device) for key in keys if key in demos}
    if args.env == "libero":  # larger than a GPU
        data["image"] = torch.as_tensor(demos["image"])
    data["targets"] = torch.as_tensor(targets, device=device).flatten(1)  # (S, K*A)
    data["mask"] = torch.as_tensor(mask[..., None] & envs.active_dims, device=device).flatten(1)
    if args.head == "tokens":
        data["targets"] = ActionTokenizer().encode_bins(data["targets"])
    return data, scenes


def build_agent(args, envs, saved, device):
    """The agent of `saved` (a checkpoint of bc_warmup.py), of published weights, or a random one."""
    image = envs.single_observation_space["image"]
    shape = dict(
        chunk=args.chunk, action_dim=len(envs.active_dims), cameras=image.shape[0] if image else 0,
        proprio_dim=envs.single_observation_space["proprio"].shape[0],
        image_size=image.shape[1] if image else 0,
    )  # fmt: skip
    config = dict(name=args.backbone, instructions=envs.instructions, **shape)
    libero = args.env == "libero"
    if args.backbone not in ("tiny", "mlp"):
        adapters_only = args.lora_rank or args.adapter or args.evaluate
        config = dict(
            name=args.backbone,
            family=None if args.family == "auto" else args.family, chunk=args.chunk, head=args.head,
            action_dim=len(envs.active_dims), unnorm_key=args.unnorm_key or (args.suite if libero else None),
            statistics=args.statistics, libero=libero, load_in_4bit=args.load_in_4bit,
            lora_modules=args.lora_modules,
            # Adapters stay in float32; to train every weight in 16 bits would lose Adam's small steps.
            dtype="bfloat16" if device.type == "cuda" and adapters_only else "float32",
        )  # fmt: skip
        if args.backbone == "openvla":
            config["path"] = args.suite
    if saved:
        if saved["args"]["head"] != args.head:
            raise UserError(
                f"The checkpoint has the head {saved['args']['head']!r}, not {args.head!r}; set --head."
            )
        for name, value in shape.items():
            if saved["backbone"].get(name, value) != value:
                hints = {"proprio_dim": "--action-history or --env", "action_dim": "--env"}
                raise UserError(
                    f"The checkpoint's {name} is {saved['backbone'][name]}, but this run's is {value}; "
                    f"set {hints.get(name, '--' + name)} as it was."
                )
        config = saved["backbone"]
    old_rank, needs = saved["args"]["lora_rank"] if saved else 0, {}
    if config["name"] not in ("tiny", "mlp"):  # the run's affair, not the weights'
        needs = dict(
            micro_batch_size=0 if args.evaluate else args.batch_size, cameras=shape["cameras"],
            lora_rank=None if args.adapter else args.lora_rank or old_rank,
            checkpointing=args.gradient_checkpointing,
        )  # fmt: skip
    backbone = load_backbone(**config, **needs, device=device)
    published = backbone.config["name"] == "openvla"
    if old_rank and args.lora_rank not in (0, old_rank):
        raise UserError(f"The checkpoint's adapters have rank {old_rank}; use --lora-rank {old_rank} or 0.")
    if old_rank:
        args.adapter = saved["args"].get("adapter")  # its scale and modules are its own
        load_adapter(backbone, args.adapter) if args.adapter else add_lora(backbone, old_rank)
        args.lora_rank = old_rank  # what this run's own checkpoints hold
    agent = Agent(backbone, args)
    if saved:
        missing, unexpected = agent.load_state_dict(saved["agent"], strict=False)
        if published and old_rank:  # the base is in its own files
            missing = [name for name in missing if "lora_" in name or not name.startswith("backbone.")]
        if unexpected or missing:
            raise UserError(
                "The checkpoint's tensors do not fit this agent: " + ", ".join((*missing, *unexpected)[:4])
            )
    if not published and (args.adapter or args.merge_and_save or args.gradient_checkpointing):
        raise UserError("--adapter, --merge-and-save, --gradient-checkpointing are for OpenVLA's backbone.")
    if args.merge_and_save:
        backbone.check_merge_target(args.merge_and_save)
    if args.adapter and not saved:
        load_adapter(backbone, args.adapter)
        args.lora_rank = backbone.peft_config["default"].r
    elif args.lora_rank and not old_rank:
        add_lora(backbone, args.lora_rank)
    return agent.to(device)


# --- training


def train(args):
    """Make or read the data, ground, imitate, evaluate."""
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        start = clock()
        device = choose_device(args.device)
        torch.manual_seed(args.seed)
        source = args.resume or args.checkpoint
        saved = load_checkpoint(source, scripts=("bc_warmup",)) if source else None
        eval_envs = build_envs(args, args.eval_split, args.eval_envs, autoreset=False)
        stack.callback(eval_envs.close)
        agent = build_agent(args, eval_envs, saved, device)
        results = {"args": dataclasses.asdict(args), "versions": versions(), "hardware": hardware()}
        if args.resume:
            folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        else:
            name = args.run_name or f"{args.env}__bc_warmup__{args.seed}__{int(time.time())}"
            folder = run_folder(args.output_dir, name)
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        videos = folder / "videos" if args.capture_video else None
        if args.evaluate:
            final = evaluate(agent, eval_envs, args, device, videos)
            write_results(folder / "results.json", {"final": final} | results)
            name = args.checkpoint or agent.backbone.config["path"]
            print(f"evaluated {name}: {score(final):.3f} ({folder / 'results.json'})")
            if args.merge_and_save:
                agent.backbone.save_merged(args.merge_and_save)
            return

        print(
            f"reading {args.demos}" if args.demos else f"making {args.num_demos} demonstrations", flush=True
        )
        data, scenes = load_data(args, eval_envs, agent.backbone, device)
        if args.track:
            import wandb  # an optional package

            wandb.init(project="vla-rl", name=folder.name, config=results["args"], sync_tensorboard=True)
        # What a killed run logged after its last checkpoint is logged again.
        writer = SummaryWriter(folder, purge_step=saved["step"] + 1 if args.resume else None)
        stack.callback(writer.close)
        backbone, published = agent.backbone, agent.backbone.config["name"] == "openvla"
        trained = [p for p in agent.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=1e-5, weight_decay=1e-4)
        shuffler = torch.Generator().manual_seed(args.seed)
        generators = {"shuffler": shuffler}

        step, seconds, initial, best = 0, 0.0, None, None
        first = 0 if scenes is not None else args.grounding_steps
        total = args.grounding_steps + args.gradient_steps
        step = first
        if args.resume:
            optimizer.load_state_dict(saved["optimizer"])
            step, seconds, initial, best = saved["step"], saved["seconds"], saved["initial"], saved["best"]
            set_rng_state(saved["rng"], generators, {})
        start = start - seconds

        def save(name):
            weights = agent.state_dict()
            if published and args.lora_rank:  # the base is in its own files
                weights = {k: x for k, x in weights.items() if "lora_" in k or not k.startswith("backbone.")}
            state = dict(
                args=dataclasses.asdict(args), backbone=backbone.config, agent=weights, step=step,
                seconds=clock() - start, optimizer=optimizer.state_dict(), rng=rng_state(generators, {}),
                initial=initial, best=best,
            )  # fmt: skip
            save_checkpoint(folder / name, script="bc_warmup", state=state)

        def log_evaluation(evaluation):
            for key in ("success_rate", "mean_reward", "mean_length"):
                writer.add_scalar(f"eval/{key}", evaluation[key], step)

        stop = []  # a signal asks for a checkpoint and an orderly end; a second one ends at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

        if initial is None:
            initial = evaluate(agent, eval_envs, args, device, videos)  # what a video lacks shows now
            best = initial
            log_evaluation(initial)
            save("checkpoint.pt")
            save("best.pt")
        agent.train()
        bar = tqdm(total=total, initial=step, unit="step", disable=None, smoothing=0.1)
        while step < total and not stop:
            grounding = step < args.grounding_steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args)
            source = scenes if grounding else data
            index = torch.randint(len(source["task"]), (args.batch_size,), generator=shuffler).to(device)
            obs = {key: source[key][index.to(source[key].device)] for key in ("image", "proprio", "task")}
            batch = backbone.preprocess(obs, eval_envs.instructions)
            vision, attention = backbone.encode_vision(batch)
            losses = {}
            if attention is not None and "pixels" in source:
                losses["grounding"] = grounding_loss(attention, source["pixels"][index])
            if grounding:
                loss = losses["grounding"]
            else:
                targets, mask = data["targets"][index], data["mask"][index]
                loss = losses["policy"] = agent.imitation_loss(batch, vision, targets, mask, args.label_sigma)
                if "grounding" in losses:
                    loss = loss + args.grounding_coef * losses["grounding"]
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}: the gradient is not finite (loss {loss.item()}); "
                    f"{folder / 'checkpoint.pt'} is the last good state."
                )
            if step % 20 == 0:
                scalars = {f"loss/{name}": x.item() for name, x in (losses | {"total": loss}).items()}
                lr = optimizer.param_groups[0]["lr"]
                scalars |= {"optim/learning_rate": lr, "optim/grad_norm": norm.item()}
                for name, x in scalars.items():
                    writer.add_scalar(name, x, step)
                bar.set_postfix_str(", ".join(f"{name} {x.item():.2f}" for name, x in losses.items()))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            imitated = step - args.grounding_steps
            if args.eval_freq and imitated > 0 and imitated % args.eval_freq == 0 and step < total:
                latest = evaluate(agent, eval_envs, args, device)
                agent.train()
                log_evaluation(latest)
                tqdm.write(f"{step} gradient steps, {clock() - start:.0f} s: eval {score(latest):.3f}")
                if score(latest) > score(best):
                    best = latest
                    save("best.pt")
            if step % args.save_freq == 0 or step == total:
                save("checkpoint.pt")

        bar.close()
        if stop and step < total:
            save("checkpoint.pt")
            print(f"stopped at gradient step {step}; go on with: python bc_warmup.py --resume {folder}")
            sys.exit(128 + stop[0])
        final = evaluate(agent, eval_envs, args, device, videos)
        log_evaluation(final)
        if score(final) > score(best):
            best = final
            save("best.pt")
        save("checkpoint.pt")
        if published and args.lora_rank:
            save_adapter(backbone, folder / "adapter")
        numbers = dict(environment_steps=0, gradient_steps=step - first, wall_seconds=clock() - start)
        write_results(
            folder / "results.json", dict(initial=initial, final=final, best=best) | numbers | results
        )
        minutes = (clock() - start) / 60
        print(f"success {score(initial):.3f} -> {score(final):.3f} in {minutes:.1f} minutes ({folder})")
        if args.merge_and_save:
            backbone.save_merged(args.merge_and_save)


def main():
    try:
        train(resolve_args(tyro.cli(Args)))
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(".")[0]
        print(f"error: {reason}; see --help for smaller batches; checkpoints are intact.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
