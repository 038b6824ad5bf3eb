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
episode's end, and the update sees valid chunks only. Expect on a fast CPU core: tabletop 0.965 to 0.985
greedy success (3 seeds) in 4 minutes after the warm-up's 8; CartPole 495 in half a minute.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn

from common import UserError, distributed
from common.action_tokenizer import ActionTokenizer
from common.backbones import export, load_backbone, load_weights, stored_weights
from common.checkpoint import map_tensors
from common.envs import make_envs
from common.evaluation import collect, evaluate, finished_episodes, rollout_metrics
from common.flags import (
    FIXED,
    KEPT,
    POSITIVE,
    NonNegative,
    NonNegativeInt,
    Only,
    Positive,
    PositiveInt,
    Share,
    Unless,
)
from common.optim import load_optimizer
from common.run import VLAArgs, check_decisions, main, mean_metrics, reserve


@dataclass
class Args(VLAArgs):
    total_timesteps: PositiveInt = 300_000
    """environment steps to train for"""
    num_envs: PositiveInt = 64
    """parallel environments"""
    head: Annotated[Literal["tokens", "gaussian", "flow", "discrete"], FIXED] = "tokens"
    """256-bin action tokens, a Gaussian on the continuous chunk, a flow from noise to it (pi0), or a
    categorical over gymnasium's Discrete"""
    train_vision: bool = False
    """train the vision part too; frozen, its output is computed once and reused over the epochs"""
    group_size: int = 8
    """G, episodes from one task and one initial state"""
    num_groups: PositiveInt = 16
    """groups in a batch; uniform ones are dropped and others take their place"""
    max_refill: PositiveInt = 8
    """an iteration ends after this many times num_groups groups, its batch full or not"""
    max_steps: NonNegativeInt = 0
    """end an episode with the decision that reaches this many environment steps: 1 compares G actions for
    one state; 0 for no bound"""
    accuracy_low: Share = 0.1
    """drop a group whose success rate is below this"""
    accuracy_high: Share = 0.9
    """or above this (DAPO's dynamic sampling)"""
    verifier_gamma: Share = 1.0
    """discount per --chunk environment steps of an episode's outcome: below 1 a late success counts less"""
    advantage_level: Literal["episode", "decision"] = "episode"
    """compare outcomes of whole episodes (GRPO), or at each decision the returns to go of the members still
    running, so that who is late already is not blamed for it again; the next two are for whole episodes"""
    std_normalisation: bool = True
    """divide by the group's standard deviation; --no-std-normalisation is Dr. GRPO (Liu et al. 2025)"""
    leave_one_out: bool = False
    """compare with the mean of the other members only (RLOO, Ahmadian et al. 2024)"""
    update_epochs: PositiveInt = 1
    """passes over an iteration's data"""
    minibatch_size: PositiveInt = 128
    """decisions per optimizer step"""
    micro_batch_size: PositiveInt = 128
    """decisions per backward pass; smaller fits less memory and gives the same gradient"""
    learning_rate: NonNegative = 1e-4
    """AdamW, policy"""
    anneal_lr: bool = True
    """linear decay of the learning rate to zero"""
    policy_warmup: NonNegativeInt = 0
    """iterations over which the policy's learning rate rises from 0"""
    ratio_level: Literal["token", "step", "chunk", "sequence"] = "step"
    """what one importance ratio covers: a token, the tokens of one environment step, the whole chunk, or the
    episode's geometric mean (GSPO, Zheng et al. 2025; one more forward pass)"""
    aggregation: Literal["token-mean", "sequence-mean-token-mean", "constant-length"] = (
        "sequence-mean-token-mean"
    )
    """weights of the batch's terms: all alike (DAPO), every episode alike (GRPO), or the episode's sum
    divided by what --constant-length decisions have (Dr. GRPO)"""
    constant_length: Annotated[PositiveInt, Only("aggregation", "constant-length")] = 12
    """decisions that constant-length divides an episode by"""
    clip_low: Share = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]; default with --ratio-level sequence 3e-4"""
    clip_high: NonNegative = 0.28
    """a wider upper bound keeps exploration alive (DAPO, Yu et al. 2025); default with --ratio-level sequence
    4e-4"""
    dual_clip: NonNegative = 0.0
    """bound on the ratio where the advantage is negative, 3 for example (Ye et al. 2020); 0 for none"""
    recompute_logprobs: bool = False
    """old log-probs once more before the update, in micro-batches of its size: for kernels whose results
    depend on it, as on GPUs in bfloat16; one more forward pass"""
    temperature: Annotated[Positive, KEPT] = 0.35
    """divides the logits, in sampling and in every log-prob alike"""
    greedy: Annotated[Literal["mean", "mode"], KEPT, Only("head", "tokens")] = "mean"
    """what an evaluation does: the bin of the action's mean, or the likeliest one"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: NonNegative = 0.0
    """weight of the k3 estimate of KL(policy || initial policy)"""
    target_kl: Annotated[float | None, POSITIVE] = None
    """end the iteration's update once approx_kl of a minibatch exceeds it"""
    max_grad_norm: Positive = 1.0
    """global gradient norm clip"""
    init_std: Annotated[Positive, FIXED, Only("head", "gaussian")] = 0.2
    """gaussian head: initial standard deviation, actions being in [-1, 1]"""
    learn_std: Annotated[bool, Only("head", "gaussian")] = True
    """gaussian head: train the standard deviation, one per action dimension"""
    flow_steps: Annotated[PositiveInt, KEPT, Only("head", "flow")] = 4
    """flow head: S, Euler steps from the noise to the chunk"""
    flow_noise: Annotated[Literal["sde", "learned", "fpo"], KEPT, Only("head", "flow")] = "sde"
    """flow head: the noise of sampled steps: Flow-SDE's, which keeps the flow's marginals, or a standard
    deviation per action dimension, trained, that starts at --noise-level (Flow-Noise), or none, and
    flow-matching losses for log-probs (FPO)"""
    noise_level: Annotated[Positive, KEPT, Only("head", "flow")] = 0.3
    """flow head: how much of it; with fpo the deviation by which losses count"""
    flow_start: Annotated[NonNegative, KEPT, Only("head", "flow"), Unless("flow_noise", "fpo")] = 1.0
    """flow head: the deviation of the noise in which sampled chains start, the flow's own is 1; 0 starts all
    where greedy ones do"""
    exploration_end: Positive = 1.0
    """how much of the temperature, or of a Gaussian's or flow's deviation, is left at the end; linear"""
    curriculum: bool = False
    """draw a task by how much its running success p can teach, p (1 - p); the rollouts' success rate is then
    that of the tasks drawn"""

    def defaults(self):
        """A chain of several steps moves further than tokens at the same rate, and too far in Adam's
        first steps, its largest; a mean over an episode moves little: GSPO's own bounds (Zheng et al. 2025,
        section 5.1)."""
        own = dict(learning_rate=2e-5, policy_warmup=10) if self.head == "flow" else {}
        own |= dict(clip_low=3e-4, clip_high=4e-4) if self.ratio_level == "sequence" else {}
        return {name: x for name, x in own.items() if getattr(self, name) == getattr(Args, name)}

    def check(self):
        if self.group_size < 2:
            raise UserError(
                f"--group-size must be at least 2, not {self.group_size}: one episode has no rival."
            )
        if self.advantage_level == "decision" and (self.std_normalisation or self.leave_one_out):
            raise UserError(
                "--std-normalisation and --leave-one-out are for whole episodes; switch them off, or add "
                "--advantage-level episode."
            )
        if 0 < self.dual_clip <= 1:
            raise UserError(f"--dual-clip must be above 1, or 0 for none, not {self.dual_clip}.")
        if self.accuracy_low > self.accuracy_high:
            low, high = self.accuracy_low, self.accuracy_high
            raise UserError(f"--accuracy-low {low} is above --accuracy-high {high}.")


PRESETS = {  # what differs from the defaults; flags on the command line win
    # A late success counts less than an early one, which also gives groups of successes something to compare.
    # The last 12 of an evaluation's 48 steps see a thirtieth of the successes.
    "tabletop": dict(
        verifier_gamma=0.9, max_steps=36, accuracy_high=1.0, advantage_level="decision",
        std_normalisation=False, aggregation="token-mean", minibatch_size=96, micro_batch_size=96,
    ),
    "libero": dict(
        backbone="openvla", num_envs=32, eval_envs=32, eval_freq=10, save_freq=2, total_timesteps=4_000_000
    ),
    "robosuite": dict(
        num_groups=4, num_envs=16, eval_envs=16, eval_episodes=50, total_timesteps=100_000
    ),
    "behavior": dict(num_groups=1, num_envs=4, eval_envs=4, eval_episodes=20),  # never run
    "driving": dict(  # from states; with pictures: --cameras topdown --backbone tiny --head tokens
        backbone="mlp", cameras=("none",), head="gaussian", init_std=0.4, chunk=1, num_envs=8, eval_envs=4,
        eval_episodes=40, num_groups=4, accuracy_low=0.0, accuracy_high=1.0, verifier_gamma=0.99,
        advantage_level="decision", std_normalisation=False, aggregation="token-mean", update_epochs=4,
        minibatch_size=512, micro_batch_size=512, learning_rate=1e-3, ratio_level="chunk", max_grad_norm=0.5,
        total_timesteps=500_000,
    ),
    "maniskill": dict(
        num_groups=4, num_envs=16, eval_envs=16, eval_episodes=50, total_timesteps=100_000
    ),
    "rl4vla": dict(
        backbone="openvla", num_groups=8, num_envs=64, eval_envs=32, eval_episodes=64, save_freq=5,
        total_timesteps=2_000_000,
    ),
    "gymnasium": dict(  # any Gymnasium id
        backbone="mlp", chunk=1, num_envs=32, num_workers=0, eval_envs=20, eval_episodes=100, num_groups=4,
        aggregation="token-mean", update_epochs=4, minibatch_size=512, micro_batch_size=512,
        learning_rate=1e-3, ratio_level="chunk", temperature=1.0, max_grad_norm=0.5, save_freq=50,
    ),
    "CartPole-v1": dict(head="discrete"),
    "openvla": dict(  # greedy as published
        greedy="mode", chunk=8, minibatch_size=256, micro_batch_size=16, learning_rate=2e-5, temperature=1.6,
        ratio_level="token",
    ),
    "pi0": dict(  # RLinf's and piRL's flow (arXiv:2510.25889)
        head="flow", chunk=5, minibatch_size=256, micro_batch_size=32, learning_rate=5e-6,
        ratio_level="chunk", flow_steps=4, noise_level=0.5,
    ),
    "qwen": dict(  # from PPO's, not tuned
        chunk=1, num_groups=4, num_envs=16, eval_envs=16, eval_episodes=50, micro_batch_size=4,
        learning_rate=3e-5, clip_high=0.2, temperature=1.0, total_timesteps=100_000,
    ),
}  # fmt: skip
FPO_DRAWS = 8  # noises, each at its own time, whose losses are a flow's log-prob in FPO


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


def aggregation_weights(covered, episode, full, totals, aggregation, constant_length):
    """The weight of each term of the batch's loss, one a chunk.

    covered (B, G) bool: the terms of each chunk; episode (B,) int64: which one it is of; full: terms of a
    chunk that was executed in full; totals: terms and episodes of the whole batch, of which torchrun's other
    processes may have more -> (B,) float32.
    "token-mean": 1 / all terms; "sequence-mean-token-mean": 1 / (episodes * terms of its episode);
    "constant-length": 1 / (episodes * constant_length * full), whatever a ratio covers. But for the last,
    weights times terms add up to 1.
    """
    all_terms, all_episodes = totals
    if aggregation == "token-mean":
        return torch.full_like(episode, 1, dtype=torch.float32) / all_terms
    if aggregation == "constant-length":
        return torch.full_like(episode, 1 / (all_episodes * constant_length * full), dtype=torch.float32)
    terms = torch.bincount(episode, covered.sum(1).float())
    return 1.0 / (all_episodes * terms[episode])


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


def clipped_surrogate(log_ratio, advantages, clip_low, clip_high, dual_clip=0.0):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) elementwise (Schulman et al. 2017, eq. 7), and for A < 0 at
    most -dual_clip A, else unbounded, unless that is 0 (Ye et al. 2020, arXiv:1912.09729, eq. 5).

    log_ratio (B, G), advantages (B,) -> loss (B, G)
    """
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def kl_k3(log_ratio):
    """Schulman's k3 estimate of KL(p || q) from samples of p, with log_ratio = log q - log p: exp(x) - 1 - x
    >= 0."""
    return log_ratio.exp() - 1 - log_ratio


def masked_mean(x, mask, total=None):
    """Sum of x over mask divided by `total` (default: the mask's own count). Dividing micro-batches by their
    minibatch's total makes their gradients add up to the minibatch's."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if total is None else total).clamp(min=1)


def grpo_loss(log_probs, entropies, batch, totals, args, scale=1.0):
    """The loss of a micro-batch (Shao et al. 2024, eq. 3, without a critic) and its metrics.

    log_probs, entropies (B, K*A): of the policy in training. batch: of the same decisions as they were made,
    `mask` (B, K*A), `old_log_probs` (B, G) as `merge_tokens` makes them, `advantages` and `weights` (B,),
    `fresh` (B,) bool (made by the policy that this update started from), with a kl_coef `reference_log_probs`
    (B, K*A), and for GSPO `episode_log_ratio` (B,). totals: the minibatch's numbers of ratios, tokens and
    fresh ratios, (3,); scale: units of the batch per unit of the minibatch. -> loss (), {name: ()} without
    gradients
    """
    merged, covered = merge_tokens(log_probs, batch["mask"], args.ratio_level, args.chunk)
    log_ratio = merged - batch["old_log_probs"]
    if args.ratio_level == "sequence":  # the episode's value, each token's own gradient
        log_ratio = batch["episode_log_ratio"][:, None] + merged - merged.detach()
    surrogate = clipped_surrogate(
        log_ratio, batch["advantages"], args.clip_low, args.clip_high, args.dual_clip
    )
    surrogate = torch.where(covered, surrogate, 0.0).sum(1)
    policy_loss = (surrogate * batch["weights"]).sum() * scale
    entropy = masked_mean(entropies, batch["mask"], totals[1])
    loss = policy_loss - args.entropy_coef * entropy
    if args.kl_coef > 0:
        kl = kl_k3(batch["reference_log_probs"] - log_probs)
        loss = loss + args.kl_coef * masked_mean(kl, batch["mask"], totals[1])
    metrics = {"loss/policy": policy_loss, "loss/total": loss, "policy/entropy": entropy}
    metrics |= ratio_metrics(log_ratio, covered, totals[0], args.clip_low, args.clip_high)
    first = (log_ratio.exp() - 1).abs()
    metrics["policy/ratio_error"] = masked_mean(first, covered & batch["fresh"][:, None], totals[2])
    return loss, {name: x.detach() for name, x in metrics.items()}


@torch.no_grad()
def ratio_metrics(log_ratio, covered, total, clip_low, clip_high):
    """How far the policy has moved, means over `total` ratios: log_ratio, covered (B, G) -> {name: ()}."""
    ratio = log_ratio.exp()
    clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    return {
        "policy/approx_kl": masked_mean(kl_k3(log_ratio), covered, total),
        "policy/clip_fraction": masked_mean(clipped.float(), covered, total),
        "policy/ratio_error": masked_mean((ratio - 1).abs(), covered, total),
    }


def teachable(episodes, num_tasks):
    """p (1 - p) of each task (num_tasks,), the variance of its success, from which alone advantages come;
    p = (successes + 1) / (episodes + 2), so that a task that is hardly seen is drawn. episodes: rows
    (success, return, length, task)."""
    success, task = np.reshape(episodes, (-1, 4))[:, [0, 3]].T
    counts = np.bincount(task.astype(int), minlength=num_tasks)
    p = (np.bincount(task.astype(int), success, num_tasks) + 1) / (counts + 2)
    return p * (1 - p)


def flow_matching_loss(velocity, actions, noise):
    """(v - (noise - actions))^2 elementwise: the velocity of the straight line x = t noise + (1 - t) actions
    (Lipman et al. 2023, eq. 23, with time as in pi0's code)."""
    return (velocity - (noise - actions)).square()


def flow_times(steps):
    """t_k = 1 - k / S, k = 0..S-1: when each denoising step begins. t is 1 at the noise, 0 at the action."""
    return torch.arange(steps, 0, -1) / steps


def sde_std(steps, level):
    """Standard deviations (S,) of Flow-SDE's denoising steps (piRL, Chen et al. 2025, arXiv:2510.25889):
    sigma_t / sqrt(S) with sigma_t = level * sqrt(t / (1 - t)), and 1 - t = 1 / S where it would be 0."""
    t = flow_times(steps)
    return level * (t / (1 - t).clamp(min=1 / steps) / steps).sqrt()


def denoising_mean(x, velocity, t, steps, std):
    """Where a denoising step leads on average: x - v / S - std^2 / (2 t) * (x + (1 - t) v).

    Euler's step, and Flow-SDE's drift towards the data, which undoes what noise of `std` adds, so that the
    marginals stay the flow's; x + (1 - t) v is the noise that it sees in x. std 0 is the flow's ODE.
    """
    return x - velocity / steps - std**2 / (2 * t) * (x + (1 - t) * velocity)


# --- heads and agent


class TokenHead(nn.Module):
    """Action tokens: a categorical over 256 bins for each of the K*A numbers. Actions are slice indices (B,
    K*A)."""

    def __init__(self, backbone, args):
        super().__init__()
        self.temperature, self.greedy, self.tokenizer = args.temperature, args.greedy, ActionTokenizer()
        self.shape = (backbone.chunk, backbone.action_dim)
        self.register_buffer("exploration", torch.ones(()))  # what the schedule has left of the temperature

    def forward(self, backbone, action_hidden):
        logits = backbone.action_logits(action_hidden).float()
        return logits / (self.temperature * self.exploration)  # (B, K*A, 256)

    def sample(self, logits, deterministic, generator):
        if deterministic:
            return logits.argmax(-1) if self.greedy == "mode" else self.mean(logits)
        # argmax(p / Exp(1)) is a draw from p, without multinomial's synchronisation
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=generator)).argmax(-1)

    def mean(self, logits):
        """The bins (B, K*A) of the actions' means. Demonstrations that are clipped pile up in the end bins,
        so that one of these is the likeliest where it is far from likely: full speed, past the goal."""
        actions = self.tokenizer.decode_bins(torch.arange(logits.shape[-1], device=logits.device))
        return self.tokenizer.encode_bins(logits.softmax(-1) @ actions)

    def log_prob(self, logits, actions):
        return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]  # (B, K*A)

    def entropy(self, logits):
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    def to_env(self, actions):
        return self.tokenizer.decode_bins(actions).unflatten(1, self.shape)


class DiscreteHead(TokenHead):
    """A categorical over gymnasium's Discrete(n) for each action of the chunk. Actions are ints (B, K)."""

    def __init__(self, backbone, args, num_actions, names):
        super().__init__(backbone, args)
        self.greedy = "mode"
        self.logits = nn.Linear(backbone.hidden_size, num_actions)
        nn.init.orthogonal_(self.logits.weight, 0.01)
        nn.init.zeros_(self.logits.bias)
        if names and hasattr(backbone, "embed_words"):  # it begins with what a language model would say
            self.logits.weight.data.copy_(backbone.embed_words(names))

    def forward(self, backbone, action_hidden):
        return self.logits(action_hidden).float() / (self.temperature * self.exploration)  # (B, K, n)

    def to_env(self, actions):
        return actions


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
        log_std = torch.full((backbone.action_dim,), math.log(args.init_std))
        self.log_std = nn.Parameter(log_std, requires_grad=args.learn_std)
        self.register_buffer("exploration", torch.ones(()))  # what the schedule has left of it

    def forward(self, backbone, action_hidden):
        if self.mean is None:
            mean = backbone.action_mean(action_hidden)
        else:
            mean = self.mean(action_hidden).squeeze(-1).float()  # (B, K*A)
        std = (self.log_std.exp() * self.exploration).repeat(self.shape[0]).expand_as(mean)
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
        return actions if self.mean is None else actions.clamp(-1, 1)  # L1: as published


class Velocity(nn.Module):
    """v(x, t) of a chunk of n numbers, given the hidden states of its n action slots; 0 at first."""

    def __init__(self, hidden_size, numbers, width=256, frequencies=6):
        super().__init__()
        self.read, self.context = nn.Linear(hidden_size, 16), nn.Linear(16 * numbers, width)
        self.noisy, self.time = nn.Linear(numbers, width), nn.Linear(2 * frequencies, width)
        self.register_buffer("octaves", torch.pi / 2 * 2.0 ** torch.arange(frequencies), persistent=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, numbers))
        nn.init.zeros_(self.last[-1].weight)
        nn.init.zeros_(self.last[-1].bias)

    def encode(self, action_hidden):
        return self.context(self.read(action_hidden.float()).flatten(1))  # (B, n, D) -> (B, width)

    def forward(self, context, x, t):
        """context (B, width), x (B, n), t (B,) or () -> velocity (B, n); x (B, P, n), t (B, P) likewise."""
        angle = t[..., None] * self.octaves
        context = context.view(len(x), *[1] * (x.dim() - 2), -1)
        hidden = context + self.noisy(x) + self.time(torch.cat([angle.sin(), angle.cos()], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


class FlowHead(nn.Module):
    """A flow from noise to the continuous chunk in S Euler steps (Lipman et al. 2023; pi0, 2024).

    Actions are chains, floats (B, S+1, n): the noise, and where each step led; the environment gets the last.
    Each step is Gaussian, so that a chain has a log-prob: of a number, the sum over its steps. The noise's
    own, of deviation `start`, is the same for all policies and left out. Greedily the ODE starts at zero.

    With FPO (McAllister et al. 2025, arXiv:2507.21053) no step is noisy. Actions are FPO_DRAWS noises and
    where the ODE led from another one, (B, FPO_DRAWS+1, n). In the place of a log-prob stands minus the
    flow-matching loss, mean over these noises, each at its own time: as a Gaussian's of deviation `level`.

    n is K*A, but where the backbone has a flow of its own, of longer chunks and more numbers than are
    executed. The steps' noise is in those that are; the others follow the ODE from theirs, so that they are a
    function of the chain and the policy, and `log_prob` is the executed ones' exactly.
    """

    def __init__(self, backbone, args):
        super().__init__()
        self.shape, self.steps = (backbone.chunk, backbone.action_dim), args.flow_steps
        self.velocity = None  # the backbone has a trained flow of its own
        if not hasattr(backbone, "velocity"):
            self.velocity = Velocity(backbone.hidden_size, backbone.chunk * backbone.action_dim)
        numbers = torch.arange(math.prod(flow := getattr(backbone, "flow_shape", self.shape))).view(flow)
        executed = numbers[: self.shape[0], : self.shape[1]].flatten()
        self.register_buffer("executed", executed, persistent=False)
        self.others = numbers.numel() - executed.numel()
        self.register_buffer("times", flow_times(args.flow_steps), persistent=False)
        self.register_buffer("draw_times", flow_times(FPO_DRAWS) - 0.5 / FPO_DRAWS, persistent=False)
        self.register_buffer("sde", sde_std(args.flow_steps, args.noise_level), persistent=False)
        self.learned, self.fpo = args.flow_noise == "learned", args.flow_noise == "fpo"
        self.level, self.start = args.noise_level, args.flow_start
        # of the learned noise; a checkpoint's goes with every level
        self.log_scale = nn.Parameter(torch.zeros(backbone.action_dim), requires_grad=self.learned)
        self.register_buffer("exploration", torch.ones(()))  # what the schedule has left of the noise

    def forward(self, backbone, action_hidden):
        """-> the decisions' velocity as a function of x and t, and how many they are"""
        if self.velocity is None:
            return functools.partial(backbone.velocity, action_hidden), len(action_hidden)
        return functools.partial(self.velocity, self.velocity.encode(action_hidden)), len(action_hidden)

    def std(self):
        """Of each step and executed number, (S, K*A)."""
        if self.learned:
            return (self.level * self.exploration * self.log_scale.exp()).repeat(self.steps, self.shape[0])
        return (self.sde * self.exploration)[:, None].expand(-1, math.prod(self.shape))

    def whole(self, std):
        """(S, K*A) -> (S, n), 0 for the numbers that are not executed."""
        return std.new_zeros(len(std), len(self.executed) + self.others).index_copy(1, self.executed, std)

    def mean(self, velocity, x, k, std):
        """Where step k leads from x (B, n) on average, (B, n); std of the steps (S, n), None for the ODE."""
        std = 0.0 if std is None or self.learned else std[k]
        return denoising_mean(x, velocity(x, self.times[k]), self.times[k], self.steps, std)

    def sample(self, flow, deterministic, generator):
        velocity, size = flow
        if self.fpo:
            noise = self.sde.new_zeros(size, FPO_DRAWS + 1, len(self.executed) + self.others)
            if not deterministic:
                noise.normal_(generator=generator)
            x = self.exploration * noise[:, -1]
            for k in range(self.steps):
                x = self.mean(velocity, x, k, None)
            return torch.cat([noise[:, :-1], x[:, None]], 1)
        std = self.whole(self.std())
        noise = std.new_zeros(size, self.steps + 1, std.shape[1])
        if not deterministic:
            noise.normal_(generator=generator)
        chain = [self.start * noise[:, 0]]
        for k in range(self.steps):
            mean = self.mean(velocity, chain[k], k, None if deterministic else std)
            chain.append(mean + std[k] * noise[:, k + 1])
        return torch.stack(chain, 1)

    def log_prob(self, flow, actions):
        if self.fpo:
            noise, action = actions[:, :-1], actions[:, -1:]
            t = self.draw_times
            x = t[:, None] * noise + (1 - t[:, None]) * action
            losses = flow_matching_loss(flow[0](x, t.expand(len(x), -1)), action, noise)
            return -losses.mean(1)[:, self.executed] / (2 * self.level**2)
        std, x, means = self.std(), actions[:, 0], []
        whole = self.whole(std)
        for k in range(self.steps):
            mean, x = self.mean(flow[0], x, k, whole), actions[:, k + 1]
            means.append(mean[:, self.executed])
            if self.others:
                x = mean.index_copy(1, self.executed, x[:, self.executed])
        normal = torch.distributions.Normal(torch.stack(means, 1), std, validate_args=False)
        return normal.log_prob(actions[:, 1:, self.executed]).sum(1)  # (B, K*A)

    def entropy(self, flow):
        if self.fpo:  # unknown
            return self.sde.new_zeros(flow[1], len(self.executed))
        normal = torch.distributions.Normal(0.0, self.std(), validate_args=False)
        return normal.entropy().sum(0).expand(flow[1], -1)

    def to_env(self, actions):
        actions = actions[:, -1, self.executed].unflatten(1, self.shape)
        return actions if self.velocity is None else actions.clamp(-1, 1)


def make_head(backbone, args, envs):
    discrete = hasattr(envs.single_action_space, "n")
    if discrete != (args.head == "discrete"):
        wanted = "discrete" if discrete else "tokens, gaussian or flow"
        raise UserError(f"--env {args.env} has {envs.single_action_space} actions; use --head {wanted}.")
    if args.head != "flow" and hasattr(backbone, "velocity"):
        raise UserError(f"The backbone {backbone.config['name']!r} is a flow; use --head flow.")
    if args.head == "tokens" and not hasattr(backbone, "action_logits"):
        raise UserError(
            f"The backbone {backbone.config['name']!r} has no action tokens; use --head gaussian."
        )
    if args.head == "flow" and backbone.autoregressive:
        raise UserError(
            f"The backbone {backbone.config['name']!r} emits its tokens in turn; use --head tokens."
        )
    if discrete:
        names = getattr(envs, "action_names", None)
        return DiscreteHead(backbone, args, int(envs.single_action_space.n), names)
    return {"tokens": TokenHead, "gaussian": GaussianHead, "flow": FlowHead}[args.head](backbone, args)


class Agent(nn.Module):
    """Backbone and action head. `batch` is what `backbone.preprocess` returns."""

    def __init__(self, backbone, args, envs):
        super().__init__()
        self.backbone, self.deterministic = backbone, args.deterministic
        self.head = make_head(backbone, args, envs)

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

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py): actions, numpy (B, K, A), and their values (B,)."""
        batch = self.backbone.preprocess(obs, turn["instructions"])
        actions, _, value = self.get_action_and_value(batch, None, self.deterministic, turn["generator"])
        return self.backbone.to_env(self.head.to_env(actions)).cpu().numpy(), value


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


class Groups:
    """Who plays what: every environment always has an unfinished episode of some group. All in it is plain
    values and tensors, so that a checkpoint holds `vars` of it."""

    def __init__(self, num_envs, first):
        self.jobs, self.next_group = [], first  # the groups of the episodes that are still to be started
        self.playing = [None] * num_envs  # the running episodes
        self.incomplete = {}  # group -> its finished episodes
        self.ready = []  # complete groups that wait to be used
        self.finished = self.computed = 0  # groups and chunks since the last update

    def check(self):
        """ValueError, or what a wrong type raises, where a checkpoint's content is none of this."""
        numbers = [self.next_group, self.finished, self.computed, *self.jobs, *self.incomplete]
        for episode in filter(None, self.playing):
            numbers += [episode["group"], *episode["steps"]]
            check_decisions(episode["chunks"], ("actions", "log_probs"))
            if not len(episode["chunks"]) == len(episode["rewards"]) == len(episode["steps"]):
                raise ValueError("an episode of parts of different lengths")
            math.isfinite(sum(episode["rewards"]))
        for member in sum([*self.incomplete.values(), *self.ready], []):
            check_decisions([member["chunks"]], ("actions", "log_probs"), len(member["returns"]))
            math.isfinite(sum(member["returns"]))
            numbers.append(member["success"])
        if not {type(number) for number in numbers} <= {int, bool}:
            raise ValueError("groups that are none")

    def start(self, seed, group_size, stride):
        """The next member of a group starts in each idle environment -> seeds (N,), who is idle (N,)."""
        idle = np.array([episode is None for episode in self.playing])
        seeds = np.zeros(len(idle), np.int64)
        for n in np.flatnonzero(idle):
            if not self.jobs:
                self.jobs, self.next_group = [self.next_group] * group_size, self.next_group + stride
            group = self.jobs.pop()
            self.playing[n] = {"group": group, "chunks": [], "rewards": [], "steps": []}
            # a reset with a seed fixes task, layout and all that the simulator draws
            seeds[n] = np.random.SeedSequence([seed, group]).generate_state(1)[0]
        return seeds, idle

    def repeat(self, n):
        """The worker of environment n died: this member once more."""
        self.jobs.append(self.playing[n]["group"])
        self.playing[n] = None

    def add(self, n, chunk, reward, steps):
        """-> the running episode of environment n, with one more chunk."""
        self.playing[n]["chunks"].append(chunk)
        self.playing[n]["rewards"].append(float(reward))
        self.playing[n]["steps"].append(int(steps))
        return self.playing[n]

    def end(self, n, success, args, has_success):
        """The episode of environment n is over; its group, once complete, is ready if it has something to
        compare."""
        episode, self.playing[n] = self.playing[n], None
        returns = discounted_returns(episode["rewards"], episode["steps"], args.verifier_gamma, args.chunk)
        group = episode["group"]
        members = self.incomplete.setdefault(group, [])
        # Rows of a batch keep all of it: copies let go of what the other environments did.
        chunks = {key: torch.stack([x[key] for x in episode["chunks"]]) for key in episode["chunks"][0]}
        members.append({"chunks": chunks, "returns": returns, "success": bool(success)})
        if len(members) < args.group_size:
            return
        outcomes = [member["returns"][0] for member in members]
        successes = [member["success"] for member in members] if has_success else None
        self.finished += 1
        if informative(outcomes, successes, args.accuracy_low, args.accuracy_high):
            self.ready.append(members)
        del self.incomplete[group]


def minibatches(units, pool, epochs, per_epoch, generator):
    """In each epoch the `pool` of units in random order and in `per_epoch` minibatches -> the rows whose unit
    (B,) is drawn, and by what their losses are scaled to average to the batch's. Of more minibatches than
    units, as one of torchrun's processes may have, some are empty.
    """
    for _ in range(epochs):
        for drawn in pool[torch.randperm(len(pool), generator=generator)].tensor_split(per_epoch):
            scale = max(len(pool), per_epoch) / max(len(drawn), 1)
            yield torch.isin(units, drawn).nonzero().squeeze(1), scale


def micro_batches(rows, data, lengths, size):
    """-> (rows on the device, their columns of `data`) of at most `size` of `rows` at a time.

    rows (B,) int64 and lengths, the prompts' where they differ, in the host's memory. Prompts of one length
    come together: they need no mask, run the fastest kernel, and nobody asks the GPU for the length.
    """
    groups = [rows] if lengths is None else [rows[lengths[rows] == n] for n in lengths[rows].unique()]
    parts = [part for x in groups for part in x.tensor_split(math.ceil(len(x) / size) or 1) if len(part)]
    sizes, device = [len(part) for part in parts], next(iter(data.values())).device
    for part, index in zip(parts, torch.cat([rows[:0], *parts]).to(device).split(sizes), strict=True):
        batch = {key: x[index] for key, x in data.items()}
        if lengths is not None:
            batch["length"] = lengths[part]
        yield index, batch


@torch.no_grad()
def current_log_probs(agent, rows, data, lengths, size):
    """The log-probs (all rows, K*A) that the agent now gives to what was done in `rows`, and 0 elsewhere."""
    log_probs = torch.zeros_like(data["log_probs"])
    distributed.unshard(agent)
    for index, micro in micro_batches(rows, data, lengths, size):
        log_probs[index] = agent.evaluate_actions(micro, micro["actions"], micro.get("vision"))[0]
    distributed.reshard(agent)
    return log_probs


def train(args, run):
    """Collect groups with the current policy, compare within them, update, repeat (Shao et al. 2024)."""
    if args.num_groups % run.processes:
        raise UserError(f"{args.num_groups} groups cannot be split evenly over {run.processes} processes.")
    eval_envs = run.closing(make_envs(args, "eval", args.eval_envs))
    backbone = load_backbone(args, eval_envs, run, args.micro_batch_size, args.train_vision)
    agent = Agent(backbone, args, eval_envs)
    load_weights(agent, args, run, new=("head.exploration",), train_vision=args.train_vision)
    run.open()
    if args.collect:
        return collect(agent, eval_envs, args, run)
    if args.evaluate:
        run.evaluated(evaluate(agent, eval_envs, args, run, videos=True))
        return export(agent, eval_envs, args, run)

    envs, device = run.closing(make_envs(args, "train", args.num_envs)), run.device
    distributed.shard(agent)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
    cache_vision = not any(p.requires_grad for p in backbone.vision_parameters())
    # The KL's reference: what is trained, as it was at first. Adapters that are new add nothing then.
    reference = [p.detach().clone() for p in trained] if args.kl_coef > 0 else None
    sampler, shuffler = run.generator("sampler", device), run.generator("shuffler")
    active_dims = torch.as_tensor(envs.active_dims, device=device)
    order_in_chunk = torch.arange(args.chunk, device=device)
    mask = active_dims.repeat(1, args.chunk)  # of a chunk that was executed in full
    full = int(merge_tokens(mask.float(), mask, args.ratio_level, args.chunk)[1].sum())

    step, iteration, gradient_steps, recent = 0, 0, 0, []  # recent: the last episodes
    groups, wanted = Groups(envs.num_envs, run.rank), args.num_groups // run.processes
    if saved := run.restore():
        load_optimizer(optimizer, saved["optimizer"])
        step, iteration, gradient_steps = saved["counters"]
        playing = map_tensors(lambda x: x.to(device), saved["groups"])
        if args.kl_coef > 0:
            pairs = zip(saved["reference"], trained, strict=True)
            reference = [distributed.split(x.view(p.shape).to(device), p) for x, p in pairs]
        vars(groups).update({name: playing[name] for name in vars(groups)})
        groups.check()
        if len(groups.playing) != envs.num_envs:
            raise ValueError("groups of other environments")
        recent, obs = saved["recent"], envs.set_state(saved["envs"])
    else:
        agent.head.exploration.fill_(1.0)

    def save(name):
        """`best.pt` holds the weights, `checkpoint.pt` all that the run needs to go on."""
        state, own = {"agent": stored_weights(agent), "backbone": backbone.config}, None
        if name == "checkpoint.pt":
            state |= dict(optimizer=optimizer.state_dict(), counters=[step, iteration, gradient_steps])
            state |= dict(reference=reference)
            own = dict(envs=envs.get_state(), groups=vars(groups), recent=recent)
        run.save(name, state, own)

    def evaluate_now(videos=False):
        if run.record(evaluate(agent, eval_envs, args, run, videos), step):
            save("best.pt")

    def log_evaluate_save(scalars):
        """The end of an iteration, with an update or without one."""
        run.log(scalars, step)
        if run.due(iteration, args.eval_freq) and step < args.total_timesteps:
            evaluate_now()
        if run.due(iteration, args.save_freq) or step >= args.total_timesteps:
            save("checkpoint.pt")

    run.begin(step, args.total_timesteps, "env_step")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    while step < args.total_timesteps:
        # --- collect until the batch is full; every environment always plays an unfinished episode
        agent.eval()
        distributed.unshard(agent)
        num_steps = 0
        while len(groups.ready) < wanted and groups.finished < args.max_refill * wanted:
            if run.signalled or step + num_steps * run.processes >= args.total_timesteps:
                break
            if None in groups.playing:
                obs = envs.reset(*groups.start(args.seed, args.group_size, run.processes))
            run.lap("env")
            with torch.no_grad():
                batch = backbone.preprocess(obs, envs.instructions)
                vision = backbone.encode_vision(batch)[0] if cache_vision else None
                actions, log_probs, _ = agent.get_action_and_value(batch, vision, generator=sampler)
            if cache_vision:
                batch.pop("image", None)
            tasks = obs.get("task")
            run.lap("policy")
            obs, rewards, terminated, truncated, info = envs.step(backbone.to_env(agent.head.to_env(actions)))
            run.lap("env")
            # Tokens that the environment never saw (after the end, or of a joint it lacks) teach nothing.
            executed = torch.as_tensor(info["steps"], device=device)[:, None] > order_in_chunk
            mask = (executed[..., None] & active_dims).flatten(1)
            version = torch.full((envs.num_envs,), gradient_steps, device=device)  # of the policy
            told = dict(actions=actions, log_probs=log_probs, mask=mask, version=version)
            told |= {} if vision is None else {"vision": vision}
            batch |= reserve(batch, told)
            num_steps += int(info["steps"].sum())
            groups.computed += envs.num_envs
            ended = terminated | truncated
            for n, decision in enumerate(zip(*(x.unbind() for x in batch.values()), strict=True)):
                if info["lost"][n]:
                    groups.repeat(n)
                    continue
                episode = groups.add(n, dict(zip(batch, decision, strict=True)), rewards[n], info["steps"][n])
                ended[n] |= 0 < args.max_steps <= sum(episode["steps"])
                if ended[n]:
                    groups.end(n, info["success"][n], args, envs.has_success)
            recent = [*recent, *finished_episodes(info, ended, tasks)][-200:]
        everyone = distributed.all_gather(
            [len(groups.ready), num_steps, groups.finished, groups.computed, envs.lost_episodes, recent]
        )
        all_ready, all_steps, all_finished, all_computed, all_lost, all_recent = zip(*everyone, strict=True)
        step += sum(all_steps)
        if run.stopping():
            break
        groups.finished = groups.computed = 0
        iteration += 1
        if args.curriculum:
            envs.draw_tasks(teachable(sum(all_recent, []), len(envs.instructions)))
        scalars = rollout_metrics(sum(all_recent, []), envs.has_success)
        scalars |= {"rollout/groups_kept": sum(all_ready), "rollout/lost_episodes": sum(all_lost)}
        if not min(all_ready):  # every group was uniform
            log_evaluate_save(scalars)
            continue

        # --- advantages
        chosen, groups.ready = groups.ready[:wanted], groups.ready[wanted:]  # too many wait for the next
        members = [member for group in chosen for member in group]
        decisions = torch.tensor([len(member["returns"]) for member in members], device=device)
        episode = torch.arange(len(members), device=device).repeat_interleave(decisions)
        returns = [torch.tensor(member["returns"]) for member in members]
        returns = nn.utils.rnn.pad_sequence(returns, batch_first=True).to(device)  # (episodes, decisions)
        present = torch.arange(returns.shape[1], device=device) < decisions[:, None]
        by_group = (len(chosen), args.group_size, -1)
        returns, present = returns.view(by_group), present.view(by_group)
        if args.advantage_level == "episode":
            advantages = grpo_advantages(returns[..., 0], args.std_normalisation, args.leave_one_out)
            advantages = advantages.flatten()[episode]
        else:
            advantages = decision_advantages(returns, present)[present]

        # --- flatten: valid chunks only, one after another
        columns = list(members[0]["chunks"])  # popped, so that one copy is enough
        data = {key: torch.cat([member["chunks"].pop(key) for member in members]) for key in columns}
        num_rows, rows = len(episode), torch.arange(len(episode))
        data["fresh"], data["advantages"] = data.pop("version") == gradient_steps, advantages
        lengths = data.pop("length").cpu() if "length" in data else None  # of prompts, where they differ
        if args.recompute_logprobs:  # of earlier policies' chunks only the rollout knows them
            fresh = data["fresh"].cpu().nonzero().squeeze(1)
            log_probs = current_log_probs(agent, fresh, data, lengths, args.micro_batch_size)
            data["log_probs"] = torch.where(data["fresh"][:, None], log_probs, data["log_probs"])
        data["old_log_probs"], data["covered"] = merge_tokens(
            data["log_probs"], data["mask"], args.ratio_level, args.chunk
        )
        # What is shuffled: whole episodes where a ratio covers one, else the chunks that have a gradient.
        units = pool = rows
        if args.ratio_level == "sequence":
            units, pool = episode.cpu(), torch.arange(len(members))
        elif not args.kl_coef and not args.entropy_coef:
            pool = advantages.nonzero().squeeze(1).cpu()
        num_used = num_rows if args.ratio_level == "sequence" else len(pool)
        num_terms = int(data["covered"].sum())
        everyone = distributed.all_gather([num_rows, num_used, len(pool), num_terms, len(chosen)])
        all_rows, all_used, all_units, all_terms, all_chosen = zip(*everyone, strict=True)
        whole_batch = sum(all_terms), sum(all_chosen) * args.group_size  # terms, episodes
        data["weights"] = aggregation_weights(
            data["covered"], episode, full, whole_batch, args.aggregation, args.constant_length
        )
        if args.kl_coef > 0:
            with weights_of(reference, trained):
                log_probs = current_log_probs(agent, rows, data, lengths, args.micro_batch_size)
            data["reference_log_probs"] = log_probs
        run.lap("policy")

        # --- update
        agent.train()
        distributed.reshard(agent)
        fraction = max(0.0, 1 - step / args.total_timesteps) if args.anneal_lr else 1.0
        rise = min(1.0, iteration / (args.policy_warmup or 1))
        optimizer.param_groups[0]["lr"] = args.learning_rate * fraction * rise
        updates, per_epoch = [], math.ceil(sum(all_used) / args.minibatch_size)
        per_epoch = max(1, min(per_epoch, max(all_units)))  # an episode is not split
        for rows, scale in minibatches(units, pool, args.update_epochs, per_epoch, shuffler):
            # What the means divide by is the minibatch's, so that micro-batches, here and in torchrun's other
            # processes, add up to it exactly.
            index = rows.to(device)
            covered, mask, fresh = (data[key][index] for key in ("covered", "mask", "fresh"))
            totals = torch.stack([covered.sum(), mask.sum(), (covered & fresh[:, None]).sum()])
            distributed.all_sum(totals)
            if not totals[1]:  # nothing has an advantage
                continue
            if args.ratio_level == "sequence":  # of all of an episode's chunks
                log_ratio = current_log_probs(agent, rows, data, lengths, args.micro_batch_size)
                log_ratio = (log_ratio - data["log_probs"])[index]
                log_ratio = sequence_log_ratio(log_ratio, mask, episode[index], len(members))
                data["episode_log_ratio"] = log_ratio[episode]
            terms = []
            micros = micro_batches(rows, data, lengths, args.micro_batch_size)
            for _, micro in distributed.in_step(micros, data, agent):
                new = agent.evaluate_actions(micro, micro["actions"], micro.get("vision"))
                loss, term = grpo_loss(*new, micro, totals, args, scale)
                loss.backward()
                terms.append(term)
            metrics = distributed.sum_metrics(terms, device)
            if args.target_kl is not None and metrics["policy/approx_kl"] > args.target_kl:
                optimizer.zero_grad()
                break
            distributed.sum_gradients(trained)
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            metrics["optim/grad_norm"] = distributed.whole(norm)
            run.check_finite(metrics, f"iteration {iteration}", outcomes=returns[..., 0])
            optimizer.step()
            optimizer.zero_grad()
            gradient_steps += 1
            updates.append(metrics)
        if updates:  # else what waits is still of this policy
            done = min(1.0, step / args.total_timesteps)
            agent.head.exploration.fill_(1 + (args.exploration_end - 1) * done)
        run.lap("update")

        # --- log, evaluate, save
        scalars |= mean_metrics(updates) | {
            "policy/first_ratio_error": updates[0]["policy/ratio_error"] if updates else 0.0,
            "policy/stale_share": 1 - data["fresh"].float().mean(),
            "optim/learning_rate": optimizer.param_groups[0]["lr"],
            "rollout/groups_waiting": sum(all_ready) - sum(all_chosen),
            "rollout/refill_factor": sum(all_finished) / sum(all_chosen),
            "rollout/kept_share": sum(all_rows) / max(sum(all_computed), 1),
            "rollout/trained_share": sum(all_used) / max(sum(all_computed), 1),
            "time/samples_per_second": sum(all_used) * args.update_epochs / run.laps["update"],
        }
        log_evaluate_save(scalars)

    if step < args.total_timesteps:
        save("checkpoint.pt")
        run.stopped(step)
    evaluate_now(videos=True)
    save("checkpoint.pt")
    run.finish(step, gradient_steps)
    export(agent, eval_envs, args, run)


if __name__ == "__main__":
    main(train, Args, PRESETS, parallel=True)
