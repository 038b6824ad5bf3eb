"""GRPO for vision-language-action policies, in one file: the critic-free sister of ppo_vla.py.

    python bc_warmup.py --run-name warmup                              # stage 1: imitation, a few minutes
    python grpo_vla.py --checkpoint runs/warmup/checkpoint.pt          # stage 2: this file
    python grpo_vla.py --env CartPole-v1                               # the sanity check
    python grpo_vla.py --env libero --lora-rank 32                     # OpenVLA-OFT 7B on LIBERO, one GPU

Group-relative policy optimisation (Shao et al. 2024): G episodes from one task and one initial state; an
episode's advantage is its outcome less its group's mean, so that nothing has to be learned but the policy.
Groups whose outcomes are all alike teach nothing: they are dropped and others take their place until the
batch is full (DAPO, Yu et al. 2025). Rollouts never wait: an environment whose episode ends starts the next
member of a group at once, a running episode outlives an update (every chunk keeps the log-probs of the policy
that sampled it), and complete groups too many wait for the next batch. So no forward pass is spent after an
episode's end, and the update sees valid chunks only. Expect on 2 CPU cores
(3 seeds): tabletop from 0.44 to 0.915 greedy success (median) in 14 minutes; CartPole 495 in half a minute.
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
    total_timesteps: int = 1_050_000
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
    group_size: int = 8
    """G, episodes from one task and one initial state"""
    num_groups: int = 16
    """groups in a batch; uniform ones are dropped and others take their place"""
    max_refill: int = 8
    """an iteration ends after this many times num_groups groups, its batch full or not"""
    max_steps: int = 0
    """end an episode with the decision that reaches this many environment steps: 1 compares G actions for
    one state; 0 for no bound"""
    accuracy_low: float = 0.1
    """drop a group whose success rate is below this"""
    accuracy_high: float = 0.9
    """or above this (DAPO's dynamic sampling)"""
    verifier_gamma: float = 1.0
    """discount per --chunk environment steps of an episode's outcome: below 1 a late success counts less"""
    advantage_level: Literal["episode", "decision"] = "episode"
    """compare outcomes of whole episodes (GRPO), or at each decision the returns to go of the members still
    running, so that who is late already is not blamed for it again; the next two are for whole episodes"""
    std_normalisation: bool = True
    """divide by the group's standard deviation; --no-std-normalisation is Dr. GRPO (Liu et al. 2025)"""
    leave_one_out: bool = False
    """compare with the mean of the other members only (RLOO, Ahmadian et al. 2024)"""
    update_epochs: int = 1
    """passes over an iteration's data"""
    minibatch_size: int = 128
    """decisions per optimizer step"""
    micro_batch_size: int = 128
    """decisions per backward pass; smaller fits less memory and gives the same gradient"""
    learning_rate: float = 1e-4
    """AdamW, policy"""
    anneal_lr: bool = True
    """linear decay of the learning rate to zero"""
    ratio_level: Literal["token", "step", "chunk", "sequence"] = "step"
    """what one importance ratio covers: a token, the tokens of one environment step, the whole chunk, or the
    episode's geometric mean (GSPO, Zheng et al. 2025; one more forward pass)"""
    aggregation: Literal["token-mean", "sequence-mean-token-mean", "constant-length"] = (
        "sequence-mean-token-mean"
    )
    """weights of the batch's terms: all alike (DAPO), every episode alike (GRPO), or the episode's sum
    divided by --constant-length decisions (Dr. GRPO)"""
    constant_length: int = 12
    """decisions that constant-length divides an episode by"""
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
    max_grad_norm: float = 1.0
    """global gradient norm clip"""
    init_std: float = 0.2
    """gaussian head: initial standard deviation, actions being in [-1, 1]"""
    learn_std: bool = True
    """gaussian head: train the standard deviation, one per action dimension"""


PLAIN = dict(
    backbone="mlp", chunk=1, num_envs=32, num_workers=0, eval_envs=20, eval_episodes=100, num_groups=4,
    aggregation="token-mean",
    update_epochs=4, minibatch_size=512, micro_batch_size=512, learning_rate=1e-3, ratio_level="chunk",
    temperature=1.0, max_grad_norm=0.5, eval_freq=50, save_freq=50, total_timesteps=300_000,
)  # fmt: skip
PRESETS = {  # what differs from the defaults; flags on the command line win
    # A late success counts less than an early one, which also gives groups of successes something to compare.
    # The last 12 of an evaluation's 48 steps see a thirtieth of the successes.
    "tabletop": dict(
        verifier_gamma=0.9, max_steps=36, accuracy_high=1.0, advantage_level="decision",
        std_normalisation=False, aggregation="token-mean", minibatch_size=96, micro_batch_size=96,
    ),
    "libero": dict(
        backbone="openvla", chunk=8, num_envs=32, eval_envs=32, minibatch_size=256, micro_batch_size=16,
        learning_rate=2e-5, temperature=1.6, ratio_level="token", eval_freq=10, save_freq=2,
        total_timesteps=4_000_000,
    ),
    "CartPole-v1": dict(PLAIN, head="discrete"),
}  # fmt: skip


# --- the mathematics: pure functions on tensors


def discounted_returns(rewards, steps, gamma, chunk):
    """Return-to-go of each of an episode's decisions; the first is the episode's outcome.

    rewards of the decisions, each of them paid at the last of the decision's executed `steps` -> list of
    sum gamma^(i / chunk) r_i, with i the environment steps from the decision's first one to the reward's.
    """
    returns, following = [], 0.0
    for reward, executed in zip(reversed(rewards), reversed(steps), strict=True):
        following = gamma ** ((executed - 1) / chunk) * reward + gamma ** (executed / chunk) * following
        returns.append(following)
    return returns[::-1]


def informative(outcomes, successes, low, high):
    """Is there anything to compare in a group? outcomes (G,) floats, successes (G,) bools, or None where the
    world has none. False for equal outcomes, and for a success rate outside [low, high]."""
    if min(outcomes) == max(outcomes):
        return False
    return successes is None or low <= sum(successes) / len(successes) <= high


def grpo_advantages(outcomes, std_normalisation, leave_one_out, eps=1e-6):
    """A = (R - mean) / (std + eps) within each group (Shao et al. 2024, section 4.1.2), std unbiased.

    outcomes (M, G) float32 -> advantages (M, G); exactly 0 in a uniform group. Without std_normalisation it
    is R - mean (Dr. GRPO); leave_one_out takes the mean of the G - 1 others.
    """
    centred = outcomes - outcomes.mean(1, keepdim=True)
    if leave_one_out:  # R_i - mean of the others = G / (G - 1) (R_i - mean)
        centred = centred * outcomes.shape[1] / (outcomes.shape[1] - 1)
    if std_normalisation:
        centred = centred / (outcomes.std(1, keepdim=True) + eps)
    uniform = outcomes.amin(1, keepdim=True) == outcomes.amax(1, keepdim=True)
    return torch.where(uniform, 0.0, centred)  # a mean's rounding must not become an advantage


def decision_advantages(returns, present):
    """Group-relative at every decision: A = G_t - mean of G_t over the members of the group still running.

    returns, present (M, G, T), present where an episode has a decision t -> advantages (M, G, T), exactly 0
    elsewhere and where all who still run end alike. Who is late already is compared with those who are late
    too, not blamed for it again.
    """
    returns = torch.where(present, returns, 0.0)
    mean = returns.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    lowest = returns.masked_fill(~present, torch.inf).amin(1, keepdim=True)
    highest = returns.masked_fill(~present, -torch.inf).amax(1, keepdim=True)
    return torch.where(present & (lowest < highest), returns - mean, 0.0)


def aggregation_weights(counts, episode, num_episodes, aggregation, constant):
    """The weight of each term of the batch's loss, one a chunk.

    counts (B,) terms of each chunk, episode (B,) int64 in [0, num_episodes) -> (B,) float32. "token-mean":
    1 / all terms; "sequence-mean-token-mean": 1 / (episodes * terms of its episode); "constant-length": 1 /
    (episodes * constant). But for the last, weights times counts add up to 1.
    """
    if aggregation == "token-mean":
        return torch.full(counts.shape, 1.0, device=counts.device) / counts.sum()
    if aggregation == "constant-length":
        return torch.full(counts.shape, 1.0 / (num_episodes * constant), device=counts.device)
    terms = torch.zeros(num_episodes, device=counts.device).index_add(0, episode, counts.float())
    return 1.0 / (num_episodes * terms[episode])


def sequence_log_ratio(log_ratio, mask, episode, num_episodes):
    """GSPO's ratio (Zheng et al. 2025, eq. 7): the mean log-ratio of an episode's tokens.

    log_ratio, mask (B, K*A), episode (B,) -> (num_episodes,); 0 for an episode that is not among them.
    """
    sums, counts = (
        torch.zeros(num_episodes, device=log_ratio.device).index_add(0, episode, x.sum(1))
        for x in (torch.where(mask, log_ratio, 0.0), mask.float())
    )
    return sums / counts.clamp(min=1)


def merge_tokens(x, mask, level, chunk):
    """Sum token log-probs (B, K*A) over what one ratio covers, leaving masked tokens out.

    -> sums (B, G), any valid token (B, G) bool; G = K*A for "token" and "sequence", K for "step", 1 for
    "chunk".
    """
    x = torch.where(mask, x, 0.0)
    if level in ("token", "sequence"):
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


def kl_k3(log_ratio):
    """Schulman's k3 estimate of KL(p || q) from samples of p, with log_ratio = log q - log p: exp(x) - 1 - x
    >= 0."""
    return log_ratio.exp() - 1 - log_ratio


def masked_mean(x, mask, total=None):
    """Sum of x over mask divided by `total` (default: the mask's own count). Dividing micro-batches by their
    minibatch's total makes their gradients add up to the minibatch's."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if total is None else total).clamp(min=1)


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
    """Backbone and action head. `batch` is what `backbone.preprocess` returns."""

    def __init__(self, backbone, args, envs):
        super().__init__()
        self.backbone, self.head = backbone, make_head(backbone, args, envs)

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

    def evaluate_actions(self, batch, actions, vision=None):
        """-> log-probs and entropies (B, K*A)"""
        distribution = self.head(self.backbone, self.backbone(batch, vision, actions)[0])
        return self.head.log_prob(distribution, actions), self.head.entropy(distribution)


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
        saved = load_checkpoint(args.resume, scripts=("grpo_vla",))["args"]
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
    positive = "num_envs eval_envs eval_episodes save_freq total_timesteps chunk num_groups max_refill "
    positive += "update_epochs minibatch_size micro_batch_size constant_length temperature init_std "
    for name in (positive + "max_grad_norm").split():
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}.")
    nonnegative = "lora_rank action_history eval_freq learning_rate kl_coef clip_high max_steps"
    for name in nonnegative.split():
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}.")
    if args.target_kl is not None and not args.target_kl > 0:
        raise UserError(f"--target-kl must be positive, not {args.target_kl}.")
    for name in ("verifier_gamma", "accuracy_low", "accuracy_high", "clip_low"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}.")
    if args.group_size < 2:
        raise UserError(f"--group-size must be at least 2, not {args.group_size}: one episode has no rival.")
    if args.advantage_level == "decision" and (args.std_normalisation or args.leave_one_out):
        raise UserError(
            "--std-normalisation and --leave-one-out are for whole episodes; switch them off, or add "
            "--advantage-level episode."
        )
    if args.accuracy_low > args.accuracy_high:
        raise UserError(f"--accuracy-low {args.accuracy_low} is above --accuracy-high {args.accuracy_high}.")
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
    """The agent of `saved` (a checkpoint of one of the three scripts), of published weights, or a random
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
        weights = {name: x for name, x in saved["agent"].items() if not name.startswith("value_head")}
        missing, unexpected = agent.load_state_dict(weights, strict=False)
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
    if not args.train_vision:
        for parameter in backbone.vision_parameters():
            parameter.requires_grad_(False)
    return agent.to(device)


# --- training


def map_tensors(function, value):
    """`function` of every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return [map_tensors(function, item) for item in value] if isinstance(value, list) else value


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
    """One process, top to bottom: collect groups with the current policy, compare within them, update,
    repeat."""
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        device = distributed.start(choose_device(args.device))
        stack.callback(distributed.stop)
        rank, world = distributed.ranks()
        if args.num_groups % world:
            raise UserError(f"{args.num_groups} groups cannot be split evenly over {world} processes.")
        torch.manual_seed(args.seed)
        source = args.resume or args.checkpoint
        saved = load_checkpoint(source, scripts=("grpo_vla", "ppo_vla", "bc_warmup")) if source else None
        eval_envs = build_envs(args, args.eval_split, args.eval_envs, autoreset=False)
        stack.callback(eval_envs.close)
        agent = build_agent(args, eval_envs, saved, device)
        results = {"args": dataclasses.asdict(args), "versions": versions(), "hardware": hardware()}
        if args.resume:
            folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        else:
            name = args.run_name or f"{args.env}__grpo_vla__{args.seed}__{int(time.time())}"
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

        envs = build_envs(args, "train", args.num_envs, autoreset=False)
        stack.callback(envs.close)
        if args.track and rank == 0:
            import wandb  # an optional package

            wandb.init(project="vla-rl", name=folder.name, config=results["args"], sync_tensorboard=True)
        # What a killed run logged after its last checkpoint is logged again.
        if rank == 0:
            writer = SummaryWriter(folder, purge_step=saved["counters"][0] + 1 if args.resume else None)
            stack.callback(writer.close)
        backbone, published = agent.backbone, agent.backbone.config["name"] == "openvla"
        trained = [p for p in agent.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
        cache_vision = not any(p.requires_grad for p in backbone.vision_parameters())
        # The KL's reference: what is trained, as it was at first. Adapters that are new add nothing then.
        reference = [p.detach().clone() for p in trained] if args.kl_coef > 0 else None
        sampler = torch.Generator(device).manual_seed(args.seed + rank)
        shuffler = torch.Generator().manual_seed(args.seed + rank)
        generators = {"sampler": sampler, "shuffler": shuffler}

        step, iteration, gradient_steps, seconds = 0, 0, 0, 0.0
        initial, best, recent = None, None, []
        N, G = envs.num_envs, args.group_size
        jobs, next_group = [], rank  # the groups of the episodes that are still to be started
        playing = [None] * N  # the running episodes' groups, chunks, rewards and environment steps
        chunks, rewards, steps = ([[] for _ in range(N)] for _ in range(3))
        groups, ready = {}, []  # finished episodes of incomplete groups; complete groups that wait to be used
        tally = {"groups": 0, "chunks": 0}  # finished groups and computed chunks since the last update
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
            jobs, next_group, playing, chunks, rewards, steps, groups, ready, tally = map_tensors(
                lambda x: x.to(device), saved["processes"][rank]["rollout"]
            )
            obs = envs.set_state(saved["processes"][rank]["envs"])
            set_rng_state(saved["processes"][rank]["rng"], generators, {})
        start = clock() - seconds

        def save(name):
            rollout = [jobs, next_group, playing, chunks, rewards, steps, groups, ready, tally]
            rollout = map_tensors(lambda x: x.cpu().clone(), rollout)  # a view would take its batch along
            own = {"envs": envs.get_state(), "rng": rng_state(generators, {}), "rollout": rollout}
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
            save_checkpoint(folder / name, script="grpo_vla", state=state)

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
        active = torch.as_tensor(envs.active_dims, device=device)
        if args.head == "discrete":
            active = active[:1]
        order_in_chunk = torch.arange(args.chunk, device=device)
        clips = (args.clip_low, args.clip_high)
        bar = tqdm(total=args.total_timesteps, initial=step, unit="step", smoothing=0.1,
                   disable=rank > 0 or None)  # fmt: skip

        halted = []
        while step < args.total_timesteps:
            seconds_env = seconds_policy = 0.0
            first_step, collected = step, 0

            # --- collect until the batch is full; every environment always plays an unfinished episode
            agent.eval()
            wanted = args.num_groups // world
            limit = args.max_refill * wanted
            while len(ready) < wanted and tally["groups"] < limit:
                if stop or step + collected * world >= args.total_timesteps:
                    break
                tick = clock()
                if None in playing:  # the next member of a group starts at once
                    idle, seeds = np.array([group is None for group in playing]), np.zeros(N, np.int64)
                    for n in np.flatnonzero(idle):
                        if not jobs:
                            jobs, next_group = [next_group] * G, next_group + world
                        playing[n], chunks[n], rewards[n], steps[n] = jobs.pop(), [], [], []
                        # a reset with a seed fixes task, layout and all that the simulator draws
                        seeds[n] = np.random.SeedSequence([args.seed, playing[n]]).generate_state(1)[0]
                    obs = envs.reset(seeds, idle)
                tock = clock()
                with torch.no_grad():
                    batch = backbone.preprocess(obs, envs.instructions)
                    vision = backbone.encode_vision(batch)[0] if cache_vision else None
                    action, log_prob, _ = agent.get_action_and_value(batch, vision, generator=sampler)
                if cache_vision:
                    batch.pop("image", None)
                env_action = backbone.to_env(agent.head.to_env(action))
                tuck = clock()
                obs, reward, terminated, truncated, info = envs.step(env_action)
                seconds_policy += tuck - tock
                seconds_env += clock() - tuck + tock - tick
                # Tokens that the environment never saw (after the end, or of a joint it lacks) teach nothing.
                executed = torch.as_tensor(info["steps"], device=device)[:, None] > order_in_chunk
                columns = batch | {"actions": action, "log_probs": log_prob}
                columns["masks"] = (executed[..., None] & active).flatten(1)
                columns["version"] = torch.full((N,), iteration, device=device)
                if vision is not None:
                    columns["vision"] = vision
                collected += int(info["steps"].sum())
                tally["chunks"] += N
                for n, row in enumerate(zip(*(x.unbind() for x in columns.values()), strict=True)):
                    group = playing[n]
                    if info["lost"][n]:  # its worker died: this member once more
                        jobs.append(group)
                        playing[n] = None
                        continue
                    chunks[n].append(dict(zip(columns, row, strict=True)))
                    rewards[n].append(float(reward[n]))
                    steps[n].append(int(info["steps"][n]))
                    cut = 0 < args.max_steps <= sum(steps[n])
                    if not (terminated[n] or truncated[n] or cut):
                        continue
                    row = [info[x][n] for x in ("success", "episode_return", "episode_length")]
                    recent.append([float(x) for x in row])
                    playing[n] = None
                    returns = discounted_returns(rewards[n], steps[n], args.verifier_gamma, args.chunk)
                    episode = {"chunks": chunks[n], "returns": returns, "success": bool(info["success"][n])}
                    members = groups.setdefault(group, [])
                    members.append(episode)
                    if len(members) == G:
                        outcomes = [episode["returns"][0] for episode in members]
                        successes = [episode["success"] for episode in members] if envs.has_success else None
                        tally["groups"] += 1
                        if informative(outcomes, successes, args.accuracy_low, args.accuracy_high):
                            ready.append(members)
                        del groups[group]
            everyone = distributed.all_gather([len(ready), collected, tally, list(stop), envs.lost_episodes])
            counts, collected, tallies, signals, lost = zip(*everyone, strict=True)
            step, halted = step + sum(collected), sum(signals, [])  # torchrun's processes stop together
            if halted:
                break
            bar.update(step - first_step)
            if not min(counts):  # every group was uniform
                tally = dict.fromkeys(tally, 0)
                continue
            iteration += 1
            fraction = max(0.0, 1 - step / args.total_timesteps) if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * fraction

            # --- advantages
            batch, ready = ready[:wanted], ready[wanted:]  # too many wait for the next
            episodes = [e["chunks"] for members in batch for e in members]
            lengths = torch.tensor([len(each) for each in episodes], device=device)
            episode = torch.arange(len(episodes), device=device).repeat_interleave(lengths)
            returns = [torch.tensor(e["returns"]) for members in batch for e in members]
            returns = nn.utils.rnn.pad_sequence(returns, batch_first=True).to(device)  # (episodes, decisions)
            present = torch.arange(returns.shape[1], device=device) < lengths[:, None]
            outcomes = returns[:, 0].view(len(batch), G)
            if args.advantage_level == "episode":
                advantages = grpo_advantages(outcomes, args.std_normalisation, args.leave_one_out)
                advantages = advantages.flatten()[episode]
            else:
                each = (len(batch), G, -1)
                advantages = decision_advantages(returns.view(each), present.view(each))[present.view(each)]

            # --- flatten: valid chunks only, one after another
            rows = [chunk for each in episodes for chunk in each]
            data = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            actions, log_probs, masks = (data.pop(key) for key in ("actions", "log_probs", "masks"))
            vision, fresh = data.pop("vision", None), data.pop("version") == iteration - 1
            words = data.pop("length").cpu() if "length" in data else None
            for row in rows:
                row.clear()  # one copy is enough
            old_log_probs, covered = merge_tokens(log_probs, masks, args.ratio_level, args.chunk)
            constant = args.constant_length * (covered.shape[1] // args.chunk if covered.shape[1] > 1 else 1)
            weights = aggregation_weights(covered.sum(1), episode, len(episodes), args.aggregation, constant)
            if args.kl_coef > 0:
                reference_log_probs = torch.empty_like(log_probs)
                with torch.no_grad(), weights_of(reference, trained):
                    for index, part, seen in micro_batches(
                        torch.arange(len(rows)), data, vision, words, args.micro_batch_size
                    ):
                        reference_log_probs[index] = agent.evaluate_actions(part, actions[index], seen)[0]

            # --- update
            tick = clock()
            agent.train()
            metrics, kl_stop = [], False
            # What is shuffled: whole episodes where a ratio covers one, else the chunks that have a gradient.
            units, pool = torch.arange(len(rows)), torch.arange(len(rows))
            if args.ratio_level == "sequence":
                units, pool = episode.cpu(), torch.arange(len(episodes))
            elif not args.kl_coef and not args.entropy_coef:
                pool = advantages.nonzero().squeeze(1).cpu()
            used = len(rows) if args.ratio_level == "sequence" else len(pool)
            amount = int(covered.sum()) if args.aggregation == "token-mean" else len(episodes)
            everyone = distributed.all_gather([len(rows), used, len(batch), amount, recent[-200:]])
            num_rows, num_used, kept, amounts, recents = (list(x) for x in zip(*everyone, strict=True))
            share = amount / max(sum(amounts), 1)  # of this process in what the batch's mean is taken over
            parts_of_epoch = math.ceil(max(sum(num_used), 1) / args.minibatch_size)
            for _ in range(args.update_epochs):
                order = pool[torch.randperm(len(pool), generator=shuffler)]
                for drawn in order.tensor_split(parts_of_epoch):
                    chosen = torch.isin(units, drawn).nonzero().squeeze(1)
                    minibatch = chosen.to(device)
                    # The minibatches' losses average to the batch's.
                    scale = share * len(pool) / max(len(drawn), 1)
                    # What the means divide by is the minibatch's, so that micro-batches, here and in
                    # torchrun's other processes, add up to it exactly.
                    totals = [covered[minibatch].sum(), masks[minibatch].sum()]
                    totals.append((covered[minibatch] & fresh[minibatch, None]).sum())
                    totals = distributed.all_sum(torch.stack(totals))
                    if args.ratio_level == "sequence":  # of all of an episode's chunks
                        drift = torch.zeros_like(log_probs)
                        with torch.no_grad():
                            for index, part, seen in micro_batches(
                                chosen, data, vision, words, args.micro_batch_size
                            ):
                                drift[index] = agent.evaluate_actions(part, actions[index], seen)[0]
                        drift = drift[minibatch] - log_probs[minibatch]
                        drift = sequence_log_ratio(drift, masks[minibatch], episode[minibatch], len(episodes))
                    sums = torch.zeros(6, device=device)
                    for index, part, seen in micro_batches(
                        chosen, data, vision, words, args.micro_batch_size
                    ):
                        new_log_prob, entropy = agent.evaluate_actions(part, actions[index], seen)
                        merged, group = merge_tokens(new_log_prob, masks[index], args.ratio_level, args.chunk)
                        log_ratio = merged - old_log_probs[index]
                        if args.ratio_level == "sequence":  # the episode's value, each token's own gradient
                            log_ratio = drift[episode[index], None] + merged - merged.detach()
                        surrogate = clipped_surrogate(log_ratio, advantages[index], *clips)
                        surrogate = torch.where(group, surrogate, 0.0).sum(1)
                        policy_loss = (surrogate * weights[index]).sum() * scale
                        entropy = masked_mean(entropy, masks[index], totals[1])
                        loss = policy_loss - args.entropy_coef * entropy
                        if args.kl_coef > 0:
                            kl = kl_k3(reference_log_probs[index] - new_log_prob)
                            loss = loss + args.kl_coef * masked_mean(kl, masks[index], totals[1])
                        loss.backward()
                        with torch.no_grad():
                            ratio = log_ratio.exp()
                            clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                            approx_kl = masked_mean(kl_k3(log_ratio), group, totals[0])
                            clipped = masked_mean(clipped.float(), group, totals[0])
                            error = masked_mean((ratio - 1).abs(), group & fresh[index, None], totals[2])
                            terms = [policy_loss, entropy, approx_kl, clipped, error, loss]
                            sums += torch.stack(terms)
                    distributed.all_sum(sums)
                    if args.target_kl is not None and sums[2] > args.target_kl:
                        optimizer.zero_grad()
                        kl_stop = True
                        break
                    distributed.sum_gradients(trained)
                    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    if not torch.isfinite(norm + sums.sum()):
                        raise FloatingPointError(
                            f"iteration {iteration}: a loss or its gradient is not finite (policy, entropy, "
                            f"approx_kl, clip fraction, |ratio - 1|, total = {sums.tolist()}, norm "
                            f"{norm.item()}, outcomes {outcomes.min().item():.3g} to {outcomes.max():.3g}); "
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
            means = torch.stack(metrics).mean(0).tolist() if metrics else [float("nan")] * 7
            spent = seconds_env + seconds_policy + seconds_update
            recent = recent[-200:]
            success, reward, length = np.mean(np.asarray(sum(recents, []), float), 0)
            groups_done, computed = (sum(t[key] for t in tallies) for key in ("groups", "chunks"))
            scalars = {
                "loss/policy": means[0], "loss/total": means[5],
                "policy/entropy": means[1], "policy/approx_kl": means[2], "policy/clip_fraction": means[3],
                "optim/grad_norm": means[6],
                "policy/first_ratio_error": metrics[0][4].item() if metrics else 0.0,
                "policy/stale_share": 1 - fresh.float().mean().item(),
                "optim/learning_rate": args.learning_rate * fraction,
                "rollout/mean_reward": reward, "rollout/mean_length": length,
                "rollout/groups_kept": sum(counts), "rollout/groups_waiting": sum(counts) - sum(kept),
                "rollout/refill_factor": groups_done / sum(kept),
                "rollout/kept_share": sum(num_rows) / max(computed, 1),
                "rollout/trained_share": sum(num_used) / max(computed, 1),
                "rollout/lost_episodes": sum(lost),
                "time/chunks_per_second": computed / spent,
                "time/env_steps_per_second": (step - first_step) / spent,
                "time/samples_per_second": sum(num_used) * args.update_epochs / seconds_update,
                "time/env_share": seconds_env / spent, "time/policy_share": seconds_policy / spent,
                "time/update_share": seconds_update / spent,
            }  # fmt: skip
            if envs.has_success:
                scalars["rollout/success_rate"] = success
            bar.set_postfix_str(f"success {success:.2f}" if envs.has_success else f"return {reward:.1f}")
            tally = dict.fromkeys(tally, 0)
            if device.type == "cuda":
                scalars["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            for name, value in scalars.items() if rank == 0 else ():
                writer.add_scalar(name, value, step)
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
                print(f"stopped at {step} steps; go on with: python grpo_vla.py --resume {folder}")
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
