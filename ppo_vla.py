"""PPO for vision-language-action policies, in one file.

    python bc_warmup.py --run-name warmup                              # stage 1: imitation, a few minutes
    python ppo_vla.py --checkpoint runs/warmup/checkpoint.pt           # stage 2: this file
    python ppo_vla.py --env CartPole-v1                                # plain PPO, the sanity check
    python ppo_vla.py --env libero --lora-rank 32                      # OpenVLA-OFT 7B on LIBERO, one GPU
    torchrun --nproc-per-node 8 ppo_vla.py --env libero --lora-rank 32 # the same data, split over 8 GPUs

Proximal policy optimisation (Schulman et al. 2017) where one decision is a chunk of K actions of A numbers,
emitted as K*A tokens in one parallel forward (OpenVLA-OFT, Kim et al. 2025) and executed open loop. The value
is read at the last prompt position, before any action token. Log-probs are taken at the sampling temperature
over the sampling support. Expect on 2 CPU cores (3 seeds): tabletop from 0.44 to 0.91 greedy success (median)
in 11 minutes; CartPole 500 in half a minute.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
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
from common.envs import make_envs
from common.video import annotate, write_video


@dataclass
class Args:
    # --- experiment
    env: str = "tabletop"
    """the world: tabletop, libero, or a Gymnasium id with vector observations"""
    tasks: tuple[str, ...] = ()
    """kinds of task (tabletop: lift, put, move), numbers (libero) or instructions; empty for all"""
    suite: str = "libero_spatial"
    """libero: libero_spatial, libero_object, libero_goal, libero_10, libero_90"""
    protocol: Literal["oft", "simplevla"] = "oft"
    """libero: whose evaluation is followed, openvla-oft's or SimpleVLA-RL's"""
    train_on_eval_states: bool = False
    """libero: train on the initial states of the evaluation, as published results do"""
    cameras: tuple[str, ...] = ("agentview",)
    """the pictures that the policy sees (agentview, wrist)"""
    renderer: Literal["ray", "gl"] = "ray"
    """tabletop: MuJoCo's ray caster, which needs no GL, or mujoco.Renderer"""
    reward: Literal["sparse", "shaped"] = "sparse"
    """tabletop: 1 at success, or with a difference of potentials added"""
    eval_split: str = "eval"
    """eval; tabletop: or a held-out variation (vision, semantics, execution)"""
    seed: int = 1
    """fixes environments, sampling, initial states and minibatch order"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy runs"""
    checkpoint: str | None = None
    """start from these weights: a file, a run's folder, or an OpenVLA checkpoint's folder"""
    resume: str | None = None
    """continue this run (its folder) exactly where its last checkpoint stands, with its own arguments"""
    evaluate: bool = False
    """no training: evaluate --checkpoint and write results.json"""
    deterministic: bool = True
    """evaluate greedily; --no-deterministic samples at the training temperature"""
    capture_video: bool = False
    """write annotated videos of the first evaluation episodes"""
    track: bool = False
    """log to Weights & Biases beside TensorBoard"""
    output_dir: str = "runs"
    """where run folders are made"""
    run_name: str | None = None
    """the run folder's name; default <env>__<script>__<seed>__<time>"""
    num_envs: int = 64
    """parallel environments"""
    num_workers: int | None = None
    """processes that hold them; default one a core, 0 for none"""
    eval_envs: int = 100
    """parallel environments of an evaluation"""
    eval_episodes: int = 200
    """episodes of an evaluation, on layouts that training never shows"""
    eval_freq: int = 50
    """iterations between evaluations; 0 for the first and the last only"""
    save_freq: int = 10
    """iterations between checkpoints"""

    # --- algorithm
    total_timesteps: int = 650_000
    """environment steps to train for"""
    backbone: str = "tiny"
    """tiny, mlp, the folder or hub id of an OpenVLA checkpoint, or openvla for the suite's published one;
    when no --checkpoint says which"""
    head: Literal["tokens", "gaussian", "discrete"] = "tokens"
    """256-bin action tokens, a Gaussian on the continuous chunk, or a categorical over gymnasium's
    Discrete"""
    chunk: int = 4
    """K, actions a decision, executed open loop"""
    action_history: int = 0
    """the last n executed actions as an input"""
    lora_rank: int = 0
    """rank of the adapters; 0 trains every weight"""
    lora_modules: tuple[Literal["language_model", "projector"], ...] = ("language_model",)
    """openvla: the parts with adapters; --train-vision adds the towers"""
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
    train_vision: bool = False
    """train the vision part too; frozen, its output is computed once and reused over the epochs"""
    num_steps: int = 8
    """decisions per environment and iteration"""
    update_epochs: int = 2
    """passes over an iteration's data"""
    minibatch_size: int = 128
    """decisions per optimizer step"""
    micro_batch_size: int = 128
    """decisions per backward pass; smaller fits less memory and gives the same gradient"""
    learning_rate: float = 1e-4
    """AdamW, policy"""
    value_learning_rate: float = 1e-3
    """AdamW, value head"""
    anneal_lr: bool = True
    """linear decay of both learning rates to zero"""
    gamma: float = 0.9
    """discount per decision: an episode is 3 to 12 of them, and 0.9 makes a late success worth visibly
    less"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    ratio_level: Literal["token", "step", "chunk"] = "step"
    """what one importance ratio covers: a token, the tokens of one environment step, or the whole chunk"""
    clip_low: float = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: float = 0.28
    """a wider upper bound keeps exploration alive (DAPO, Yu et al. 2025)"""
    temperature: float = 0.35
    """divides the logits, in sampling and in every log-prob alike"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: float = 0.0
    """weight of the k3 estimate of KL(policy || initial policy)"""
    target_kl: float | None = None
    """end the iteration's update once approx_kl of a minibatch exceeds it"""
    value_coef: float = 0.5
    """weight of the value loss"""
    value_clip: float = 0.2
    """the new value is kept within this of the old one in the clipped branch; 0 for no clipping"""
    huber_delta: float = 0.0
    """Huber's delta for the value loss; 0 for the squared error"""
    detach_value: bool = True
    """keep the value loss's gradient out of the backbone"""
    critic_warmup: int = 2
    """iterations that train only the value head"""
    normalize_advantages: bool = True
    """to mean 0 and std 1 over an iteration's data"""
    max_grad_norm: float = 1.0
    """global gradient norm clip"""
    init_std: float = 0.2
    """gaussian head: initial standard deviation, actions being in [-1, 1]"""
    learn_std: bool = True
    """gaussian head: train the standard deviation, one per action dimension"""


PLAIN = dict(
    backbone="mlp", chunk=1, num_envs=8, num_workers=0, eval_envs=20, eval_episodes=100, num_steps=128,
    update_epochs=10, minibatch_size=256, micro_batch_size=256, learning_rate=1e-3, value_learning_rate=1e-3,
    gamma=0.98, ratio_level="chunk", clip_high=0.2, temperature=1.0, value_clip=0.0, detach_value=False,
    critic_warmup=0, max_grad_norm=0.5, eval_freq=50, save_freq=50, total_timesteps=150_000,
)  # fmt: skip
PRESETS = {  # what differs from the defaults, which are tabletop's; flags on the command line win
    "libero": dict(
        backbone="openvla", chunk=8, num_envs=32, eval_envs=32, num_steps=32, update_epochs=1,
        minibatch_size=256, micro_batch_size=16, gamma=0.99, temperature=1.6, ratio_level="token",
        critic_warmup=4, eval_freq=20, save_freq=5, total_timesteps=2_000_000,
    ),
    "CartPole-v1": dict(PLAIN, head="discrete"),
    "Pendulum-v1": dict(
        PLAIN, head="gaussian", gamma=0.9, num_steps=256, init_std=1.0, total_timesteps=300_000
    ),
}  # fmt: skip


# --- the mathematics: pure functions on tensors


def compute_gae(rewards, values, next_values, ends, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016), for T decisions of N environments.

    delta_t = r_t + gamma * next_value_t - v_t;  A_t = delta_t + gamma * lambda * (1 - end_t) * A_{t+1}
    rewards, values, next_values (T, N) float32; ends (T, N) bool: the episode ended at t, in whatever way.
    next_values is v_{t+1} within an episode, 0 after a termination and V(final observation) after a
    truncation: the way of ending is in next_values alone. -> advantages, returns (T, N)
    """
    delta = rewards + gamma * next_values - values
    carry = gamma * gae_lambda * (~ends).to(delta.dtype)
    advantages = torch.empty_like(delta)
    advantage = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage = delta[t] + carry[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def merge_tokens(x, mask, level, chunk):
    """Sum token log-probs (B, K*A) over what one ratio covers, leaving masked tokens out.

    -> sums (B, G), any valid token (B, G) bool; G = K*A for "token", K for "step", 1 for "chunk".
    """
    x = torch.where(mask, x, 0.0)
    if level == "token":
        return x, mask
    groups = chunk if level == "step" else 1
    return x.unflatten(1, (groups, -1)).sum(-1), mask.unflatten(1, (groups, -1)).any(-1)


def clipped_surrogate(log_ratio, advantages, clip_low, clip_high):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) elementwise (Schulman et al. 2017, eq. 7).

    log_ratio (B, G), advantages (B,) -> loss (B, G)
    """
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def value_loss(values, old_values, returns, clip, huber_delta):
    """Elementwise (B,): 0.5 * (v - R)^2, or Huber's; with clip > 0 the worse of it and the loss of v kept
    within clip of the old value (PPO's value clipping)."""

    def error(prediction):
        if huber_delta > 0:
            return F.huber_loss(prediction, returns, reduction="none", delta=huber_delta)
        return 0.5 * (prediction - returns).square()

    if clip <= 0:
        return error(values)
    return torch.maximum(error(values), error(old_values + (values - old_values).clamp(-clip, clip)))


def kl_k3(log_ratio):
    """Schulman's k3 estimate of KL(p || q) from samples of p, with log_ratio = log q - log p: exp(x) - 1 - x
    >= 0."""
    return log_ratio.exp() - 1 - log_ratio


def masked_mean(x, mask, total=None):
    """Sum of x over mask divided by `total` (default: the mask's own count). Dividing micro-batches by their
    minibatch's total makes their gradients add up to the minibatch's."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if total is None else total).clamp(min=1)


def explained_variance(values, returns):
    """1 - Var(R - v) / Var(R): 1 is a perfect critic, 0 one no better than a constant."""
    return 1 - (returns - values).var() / returns.var().clamp(min=1e-8)


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


class DiscreteHead(TokenHead):
    """A categorical over gymnasium's Discrete(n) for each action of the chunk. Actions are ints (B, K)."""

    def __init__(self, backbone, args, num_actions):
        super().__init__(backbone, args)
        self.logits = nn.Linear(backbone.hidden_size, num_actions)
        nn.init.orthogonal_(self.logits.weight, 0.01)
        nn.init.zeros_(self.logits.bias)

    def forward(self, backbone, action_hidden):
        return self.logits(action_hidden).float() / self.temperature  # (B, K, n)

    def to_env(self, actions):
        return actions.cpu().numpy()


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


def make_head(backbone, args, envs):
    discrete = hasattr(envs.single_action_space, "n")
    if discrete != (args.head == "discrete"):
        wanted = "discrete" if discrete else "tokens or gaussian"
        raise UserError(f"--env {args.env} has {envs.single_action_space} actions; use --head {wanted}.")
    if args.head == "tokens" and not hasattr(backbone, "action_logits"):
        raise UserError(
            f"The backbone {backbone.config['name']!r} has no action tokens; use --head gaussian."
        )
    if discrete:
        return DiscreteHead(backbone, args, int(envs.single_action_space.n))
    return TokenHead(backbone, args) if args.head == "tokens" else GaussianHead(backbone, args)


class Agent(nn.Module):
    """Backbone, action head and value head. `batch` is what `backbone.preprocess` returns."""

    def __init__(self, backbone, args, envs):
        super().__init__()
        self.backbone, self.detach_value = backbone, args.detach_value
        self.head = make_head(backbone, args, envs)
        width = backbone.hidden_size
        self.value_head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1)
        )
        if backbone.config["name"] == "mlp":  # its critic is a network of its own
            self.value_head = nn.Linear(width, 1)
        last = self.value_head[-1] if isinstance(self.value_head, nn.Sequential) else self.value_head
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def value(self, prompt_hidden):
        if self.detach_value:
            prompt_hidden = prompt_hidden.detach()
        return self.value_head(prompt_hidden.float()).squeeze(-1)

    def get_value(self, batch, vision=None):
        """-> value (B,)"""
        return self.value(self.backbone(batch, vision)[1])

    def get_action_and_value(self, batch, vision=None, deterministic=False, generator=None):
        """-> actions and their log-probs (B, K*A), value (B,)"""
        if self.backbone.autoregressive:  # a token needs those before it

            def draw(hidden):
                return self.head.sample(self.head(self.backbone, hidden), deterministic, generator)

            actions, action_hidden, prompt_hidden = self.backbone.generate(batch, draw, vision)
            distribution = self.head(self.backbone, action_hidden)
        else:
            action_hidden, prompt_hidden = self.backbone(batch, vision)
            distribution = self.head(self.backbone, action_hidden)
            actions = self.head.sample(distribution, deterministic, generator)
        return actions, self.head.log_prob(distribution, actions), self.value(prompt_hidden)

    def evaluate_actions(self, batch, actions, vision=None):
        """-> log-probs and entropies (B, K*A), value (B,)"""
        action_hidden, prompt_hidden = self.backbone(batch, vision, actions)
        distribution = self.head(self.backbone, action_hidden)
        return (
            self.head.log_prob(distribution, actions),
            self.head.entropy(distribution),
            self.value(prompt_hidden),
        )


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
    preset = PRESETS.get(args.env, {} if args.env == "tabletop" else PLAIN)
    if args.env == "libero":  # the protocol's 50 initial states a task, each once
        tasks = len(args.tasks) or (90 if args.suite == "libero_90" else 10)
        preset = preset | {"eval_episodes": 50 * tasks}
    args = tyro.cli(Args, default=dataclasses.replace(Args(), env=args.env, **preset))
    if args.checkpoint and (Path(args.checkpoint) / "config.json").is_file():
        args.backbone, args.checkpoint = args.checkpoint, None
    if args.resume:
        free = {"resume", "device", "num_workers", "capture_video", "track"}
        saved = load_checkpoint(args.resume, scripts=("ppo_vla",))["args"]
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
    positive = "num_envs eval_envs eval_episodes save_freq total_timesteps chunk num_steps update_epochs "
    for name in (positive + "minibatch_size micro_batch_size temperature init_std max_grad_norm").split():
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}.")
    nonnegative = "lora_rank action_history eval_freq critic_warmup learning_rate value_learning_rate kl_coef"
    for name in (nonnegative + " value_coef clip_high value_clip huber_delta").split():
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}.")
    if args.target_kl is not None and not args.target_kl > 0:
        raise UserError(f"--target-kl must be positive, not {args.target_kl}.")
    for name in ("gamma", "gae_lambda", "clip_low"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}.")
    if args.backbone == "openvla" and args.device == "auto" and not torch.cuda.is_available():
        raise UserError(
            "--env libero runs OpenVLA 7B, which needs a CUDA GPU, and PyTorch finds none here; for a small "
            "policy from scratch use --backbone tiny, or insist with --device cpu."
        )
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be in [0, 2**63), not {args.seed}.")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs Weights & Biases; pip install wandb, or drop --track.")
    if args.evaluate and not args.checkpoint and args.backbone in ("tiny", "mlp"):
        raise UserError("--evaluate needs --checkpoint, the weights to evaluate.")
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


def build_agent(args, envs, saved, device):
    """The agent of `saved` (a checkpoint of bc_warmup.py or ppo_vla.py), of published weights, or a random
    one."""
    image = envs.single_observation_space.get("image")
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
            lora_modules=args.lora_modules + ("vision",) * args.train_vision,
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
            micro_batch_size=0 if args.evaluate else args.micro_batch_size, cameras=shape["cameras"],
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
    agent = Agent(backbone, args, envs)
    if saved:
        missing, unexpected = agent.load_state_dict(saved["agent"], strict=False)
        if published and old_rank:  # the base is in its own files
            missing = [name for name in missing if "lora_" in name or not name.startswith("backbone.")]
        if unexpected or any(not name.startswith("value_head") for name in missing):
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
    if not args.train_vision:
        for parameter in backbone.vision_parameters():
            parameter.requires_grad_(False)
    return agent.to(device)


# --- training


@contextlib.contextmanager
def weights_of(reference, parameters):
    """For a while, the values of `reference` in the place of the parameters' own."""
    own = [p.detach().clone() for p in parameters]
    for p, x in zip(parameters, reference, strict=True):
        p.data.copy_(x)
    yield
    for p, x in zip(parameters, own, strict=True):
        p.data.copy_(x)


def micro_batches(rows, data, vision, words, size):
    """-> (rows on the device, their batch, their vision features) of at most `size` of `rows` at a time.

    rows (B,) int64 and words, the prompts' lengths where they differ, in the host's memory. Prompts of one
    length come together: they need no mask, run the fastest kernel, and nobody asks the GPU for the length.
    """
    groups = [rows] if words is None else [rows[words[rows] == n] for n in words[rows].unique()]
    parts = [part for x in groups for part in x.tensor_split(math.ceil(len(x) / size) or 1) if len(part)]
    sizes, device = [len(part) for part in parts], next(iter(data.values())).device
    for part, index in zip(parts, torch.cat([rows[:0], *parts]).to(device).split(sizes), strict=True):
        batch = {key: x[index] for key, x in data.items()}
        if words is not None:
            batch["length"] = words[part]
        yield index, batch, vision[index] if vision is not None else None


def train(args):
    """One process, top to bottom: collect with the current policy, estimate advantages, update, repeat."""
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        device = distributed.start(choose_device(args.device))
        stack.callback(distributed.stop)
        rank, world = distributed.ranks()
        torch.manual_seed(args.seed)
        source = args.resume or args.checkpoint
        saved = load_checkpoint(source, scripts=("ppo_vla", "bc_warmup")) if source else None
        eval_envs = build_envs(args, args.eval_split, args.eval_envs, autoreset=False)
        stack.callback(eval_envs.close)
        agent = build_agent(args, eval_envs, saved, device)
        results = {"args": dataclasses.asdict(args), "versions": versions(), "hardware": hardware()}
        if args.resume:
            folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        else:
            name = args.run_name or f"{args.env}__ppo_vla__{args.seed}__{int(time.time())}"
            name = distributed.all_gather(name)[0]
            if rank == 0:
                folder = run_folder(args.output_dir, name)
                (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
            folder = Path(args.output_dir) / name
        videos = folder / "videos" if args.capture_video and rank == 0 else None
        if args.evaluate:
            final = evaluate(agent, eval_envs, args, device, videos)
            if rank == 0:
                write_results(folder / "results.json", {"final": final} | results)
                name = args.checkpoint or agent.backbone.config["path"]
                print(f"evaluated {name}: {score(final):.3f} ({folder / 'results.json'})")
                if args.merge_and_save:
                    agent.backbone.save_merged(args.merge_and_save)
            return

        envs = build_envs(args, "train", args.num_envs, autoreset=True)
        stack.callback(envs.close)
        if args.track and rank == 0:
            import wandb  # an optional package

            wandb.init(project="vla-rl", name=folder.name, config=results["args"], sync_tensorboard=True)
        # What a killed run logged after its last checkpoint is logged again.
        if rank == 0:
            writer = SummaryWriter(folder, purge_step=saved["counters"][0] + 1 if args.resume else None)
            stack.callback(writer.close)
        backbone, published = agent.backbone, agent.backbone.config["name"] == "openvla"
        trained = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
        policy = [p for name, p in trained if not name.startswith("value_head")]
        groups = [
            {"params": policy, "lr": args.learning_rate},
            {"params": list(agent.value_head.parameters()), "lr": args.value_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
        cache_vision = not any(p.requires_grad for p in backbone.vision_parameters())
        # The KL's reference: what is trained, as it was at first. Adapters that are new add nothing then.
        reference = [p.detach().clone() for _, p in trained] if args.kl_coef > 0 else None
        sampler = torch.Generator(device).manual_seed(args.seed + rank)
        shuffler = torch.Generator().manual_seed(args.seed + rank)
        generators = {"sampler": sampler, "shuffler": shuffler}

        step, iteration, gradient_steps, seconds = 0, 0, 0, 0.0
        initial, best, recent = None, None, []
        if args.resume:
            optimizer.load_state_dict(saved["optimizer"])
            step, iteration, gradient_steps, seconds = saved["counters"]
            initial, best, recent = saved["initial"], saved["best"], saved["recent"]
            if reference is not None:
                reference = [x.to(device) for x in saved["reference"]]
            if len(saved["processes"]) != world:
                raise UserError(
                    f"{args.resume} ran as {len(saved['processes'])} processes, not {world}; resume it so."
                )
            obs = envs.set_state(saved["processes"][rank]["envs"])
            set_rng_state(saved["processes"][rank]["rng"], generators, {})
        else:
            obs = envs.reset()
        start = clock() - seconds

        def save(name):
            own = {"envs": envs.get_state(), "rng": rng_state(generators, {})}
            processes = distributed.gather(own)
            if rank:
                return
            weights = agent.state_dict()
            if published and args.lora_rank:  # the base is in its own files
                weights = {k: x for k, x in weights.items() if "lora_" in k or not k.startswith("backbone.")}
            state = dict(
                args=dataclasses.asdict(args), backbone=backbone.config, agent=weights, processes=processes,
                optimizer=optimizer.state_dict(), initial=initial, best=best, recent=recent,
                reference=reference,
                counters=[step, iteration, gradient_steps, clock() - start],
            )  # fmt: skip
            save_checkpoint(folder / name, script="ppo_vla", state=state)

        def log_evaluation(evaluation):
            if rank:
                return
            for key in ("success_rate", "mean_reward", "mean_length"):
                if key in evaluation:
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
        latest = initial
        T, N = args.num_steps, envs.num_envs
        active = torch.as_tensor(envs.active_dims, device=device)
        if args.head == "discrete":
            active = active[:1]
        order_in_chunk = torch.arange(args.chunk, device=device)
        clips = (args.clip_low, args.clip_high)
        bar = tqdm(total=args.total_timesteps, initial=step, unit="step", smoothing=0.1,
                   disable=rank > 0 or None)  # fmt: skip

        halted = []
        while step < args.total_timesteps:
            halted = sum(distributed.all_gather(list(stop)), [])  # torchrun's processes stop together
            if halted:
                break
            iteration += 1
            fraction = max(0.0, 1 - step / args.total_timesteps) if args.anneal_lr else 1.0
            for group, name in zip(
                optimizer.param_groups, ("learning_rate", "value_learning_rate"), strict=True
            ):
                group["lr"] = getattr(args, name) * fraction
            seconds_env = seconds_policy = 0.0

            # --- collect num_steps decisions of every environment
            agent.eval()
            batches, visions, actions, log_probs, values, masks = [], [], [], [], [], []
            rewards, terminated, truncated = (np.zeros((T, N), dtype) for dtype in (np.float32, bool, bool))
            valid, began = np.ones((T, N), bool), np.zeros(N, int)
            final_values = torch.zeros(T, N, device=device)
            finished, first_step, collected = [], step, 0
            for t in range(T):
                tick = clock()
                with torch.no_grad():
                    batch = backbone.preprocess(obs, envs.instructions)
                    vision = backbone.encode_vision(batch)[0] if cache_vision else None
                    action, log_prob, value = agent.get_action_and_value(batch, vision, generator=sampler)
                if cache_vision:
                    batch.pop("image", None)
                env_action = backbone.to_env(agent.head.to_env(action))
                tock = clock()
                obs, rewards[t], terminated[t], truncated[t], info = envs.step(env_action)
                seconds_policy, seconds_env = seconds_policy + tock - tick, seconds_env + clock() - tock
                batches.append(batch)
                visions.append(vision)
                actions.append(action)
                log_probs.append(log_prob)
                values.append(value)
                # Tokens that the environment never saw (after the end, or of a joint it lacks) teach nothing.
                executed = torch.as_tensor(info["steps"], device=device)[:, None] > order_in_chunk
                masks.append((executed[..., None] & active).flatten(1))
                collected += int(info["steps"].sum())
                if truncated[t].any():
                    rows = np.flatnonzero(truncated[t])
                    with torch.no_grad():
                        last = {key: x[rows] for key, x in info["final_obs"].items()}
                        last = agent.get_value(backbone.preprocess(last, envs.instructions))
                    final_values[t, rows] = last
                for n in np.flatnonzero(info["lost"]):  # a worker died: its episode teaches nothing
                    valid[began[n] : t + 1, n] = False
                    began[n] = t + 1
                for n in np.flatnonzero(terminated[t] | truncated[t]):
                    finished.append([info[x][n] for x in ("success", "episode_return", "episode_length")])
                    began[n] = t + 1

            # --- advantages
            with torch.no_grad():
                last_value = agent.get_value(backbone.preprocess(obs, envs.instructions))
            values = torch.stack(values)
            ends = torch.as_tensor(terminated | truncated | ~valid, device=device)
            next_values = torch.cat([values[1:], last_value[None]])
            # final_values is V(final observation) after a truncation and 0 after a termination
            next_values = torch.where(ends, final_values, next_values)
            rewards = torch.as_tensor(rewards, device=device)
            advantages, returns = compute_gae(rewards, values, next_values, ends, args.gamma, args.gae_lambda)

            # --- flatten, valid decisions only
            rows, keep = int(valid.sum()), slice(None)
            if rows < valid.size:
                keep = torch.as_tensor(valid.reshape(-1), device=device).nonzero().squeeze(1)
            everyone = distributed.all_gather([rows, collected, finished, envs.lost_episodes])
            kept, collected, finished, lost = zip(*everyone, strict=True)
            step, finished = step + sum(collected), sum(finished, [])
            if not min(kept):  # every environment's worker died
                continue
            data = {key: torch.cat([b.pop(key) for b in batches])[keep] for key in list(batches[0])}
            words = data.pop("length").cpu() if "length" in data else None
            vision = torch.cat(visions)[keep] if cache_vision and visions[0] is not None else None
            visions.clear()  # the largest of all: one copy is enough
            actions, log_probs, masks = (torch.cat(x)[keep] for x in (actions, log_probs, masks))
            advantages, returns, values = (x.reshape(-1)[keep] for x in (advantages, returns, values))
            if args.normalize_advantages and sum(kept) > 1:
                whole = torch.cat(distributed.all_gather(advantages.cpu())).to(device)
                advantages = (advantages - whole.mean()) / (whole.std() + 1e-8)
            old_log_probs, covered = merge_tokens(log_probs, masks, args.ratio_level, args.chunk)
            if args.kl_coef > 0:
                reference_log_probs = torch.empty_like(log_probs)
                with torch.no_grad(), weights_of(reference, [p for _, p in trained]):
                    for index, part, seen in micro_batches(
                        torch.arange(rows), data, vision, words, args.micro_batch_size
                    ):
                        reference_log_probs[index] = agent.evaluate_actions(part, actions[index], seen)[0]

            # --- update
            tick = clock()
            agent.train()
            metrics, kl_stop = [], False
            for _ in range(args.update_epochs):
                order = torch.randperm(rows, generator=shuffler)
                for drawn in order.tensor_split(math.ceil(sum(kept) / args.minibatch_size)):
                    minibatch = drawn.to(device)
                    # What the means divide by is the minibatch's, so that micro-batches, here and in
                    # torchrun's other processes, add up to it exactly.
                    totals = [covered[minibatch].sum(), masks[minibatch].sum()]
                    totals = torch.stack([*totals, totals[0].new_tensor(len(minibatch))])
                    totals = distributed.all_sum(totals)
                    sums = torch.zeros(7, device=device)
                    for index, part, seen in micro_batches(drawn, data, vision, words, args.micro_batch_size):
                        new_log_prob, entropy, new_value = agent.evaluate_actions(part, actions[index], seen)
                        merged, group = merge_tokens(new_log_prob, masks[index], args.ratio_level, args.chunk)
                        log_ratio = merged - old_log_probs[index]
                        surrogate = clipped_surrogate(log_ratio, advantages[index], *clips)
                        policy_loss = masked_mean(surrogate, group, totals[0])
                        errors = value_loss(
                            new_value, values[index], returns[index], args.value_clip, args.huber_delta
                        )
                        critic_loss = errors.sum() / totals[2]
                        entropy = masked_mean(entropy, masks[index], totals[1])
                        loss = args.value_coef * critic_loss
                        if iteration > args.critic_warmup:
                            loss = loss + policy_loss - args.entropy_coef * entropy
                            if args.kl_coef > 0:
                                kl = kl_k3(reference_log_probs[index] - new_log_prob)
                                loss = loss + args.kl_coef * masked_mean(kl, masks[index], totals[1])
                        loss.backward()
                        with torch.no_grad():
                            ratio = log_ratio.exp()
                            clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                            approx_kl = masked_mean(kl_k3(log_ratio), group, totals[0])
                            clipped = masked_mean(clipped.float(), group, totals[0])
                            error = masked_mean((ratio - 1).abs(), group, totals[0])
                            terms = [policy_loss, critic_loss, entropy, approx_kl, clipped, error, loss]
                            sums += torch.stack(terms)
                    distributed.all_sum(sums)
                    if args.target_kl is not None and sums[3] > args.target_kl:
                        optimizer.zero_grad()
                        kl_stop = True
                        break
                    distributed.sum_gradients([p for _, p in trained])
                    if iteration <= args.critic_warmup:
                        for parameter in policy:  # reached through the value where it is not detached
                            parameter.grad = None
                    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    if not torch.isfinite(norm + sums.sum()):
                        raise FloatingPointError(
                            f"iteration {iteration}: a loss or its gradient is not finite (policy, value, "
                            f"entropy, approx_kl, clip fraction, |ratio - 1|, total = {sums.tolist()}, norm "
                            f"{norm.item()}, returns {returns.min().item():.3g} to {returns.max():.3g}); "
                            f"{folder / 'checkpoint.pt'} is the last good state."
                        )
                    optimizer.step()
                    optimizer.zero_grad()
                    gradient_steps += 1
                    metrics.append(torch.cat([sums, norm[None]]))
                if kl_stop:
                    break

            # --- log, evaluate, save
            seconds_update = clock() - tick
            recent = (recent + finished)[-200:]
            means = torch.stack(metrics).mean(0).tolist() if metrics else [float("nan")] * 8
            spent = seconds_env + seconds_policy + seconds_update
            scalars = {
                "loss/policy": means[0], "loss/value": means[1], "loss/total": means[6],
                "policy/entropy": means[2], "policy/approx_kl": means[3], "policy/clip_fraction": means[4],
                "optim/grad_norm": means[7],
                "policy/first_ratio_error": metrics[0][5].item() if metrics else 0.0,
                "value/explained_variance": explained_variance(values, returns).item(),
                "optim/learning_rate": args.learning_rate * fraction,
                "time/env_steps_per_second": (step - first_step) / spent,
                "time/samples_per_second": sum(kept) * args.update_epochs / seconds_update,
                "time/env_share": seconds_env / spent, "time/policy_share": seconds_policy / spent,
                "time/update_share": seconds_update / spent, "rollout/lost_episodes": sum(lost),
            }  # fmt: skip
            if recent:
                success, reward, length = np.mean(np.asarray(recent, float), 0)
                scalars |= {"rollout/mean_reward": reward, "rollout/mean_length": length}
                if envs.has_success:
                    scalars["rollout/success_rate"] = success
                bar.set_postfix_str(f"success {success:.2f}" if envs.has_success else f"return {reward:.1f}")
            if device.type == "cuda":
                scalars["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            for name, value in scalars.items() if rank == 0 else ():
                writer.add_scalar(name, value, step)
            bar.update(step - first_step)
            if args.eval_freq and iteration % args.eval_freq == 0 and step < args.total_timesteps:
                latest = evaluate(agent, eval_envs, args, device)
                log_evaluation(latest)
                if rank == 0:
                    tqdm.write(f"{step} steps, {clock() - start:.0f} s: eval {score(latest):.3f}")
                if score(latest) > score(best):
                    best = latest
                    save("best.pt")
            if iteration % args.save_freq == 0 or step >= args.total_timesteps:
                save("checkpoint.pt")

        bar.close()
        if halted:
            save("checkpoint.pt")
            if rank == 0:
                print(f"stopped at {step} steps; go on with: python ppo_vla.py --resume {folder}")
            sys.exit(128 + halted[0])
        final = evaluate(agent, eval_envs, args, device, videos)
        log_evaluation(final)
        if score(final) > score(best):
            best = final
            save("best.pt")
        save("checkpoint.pt")
        if rank:
            return
        if published and args.lora_rank:
            save_adapter(backbone, folder / "adapter")
        numbers = dict(environment_steps=step, gradient_steps=gradient_steps, wall_seconds=clock() - start)
        write_results(
            folder / "results.json", dict(initial=initial, final=final, best=best) | numbers | results
        )
        what, minutes = "success" if envs.has_success else "return", (clock() - start) / 60
        print(f"{what} {score(initial):.3f} -> {score(final):.3f} in {minutes:.1f} minutes ({folder})")
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
