"""PPO for vision-language-action policies, in one file.

    python bc_warmup.py --run-name warmup                              # stage 1: imitation, a few minutes
    python ppo_vla.py --checkpoint runs/warmup/checkpoint.pt           # stage 2: this file
    python ppo_vla.py --env CartPole-v1                                # plain PPO, the sanity check
    python ppo_vla.py --env libero --lora-rank 32                      # OpenVLA-OFT 7B on LIBERO, one GPU
    torchrun --nproc-per-node 8 ppo_vla.py --env libero --lora-rank 32 # the same data, split over 8 GPUs

Proximal policy optimisation (Schulman et al. 2017) where one decision is a chunk of K actions of A numbers,
emitted as K*A tokens in one parallel forward (OpenVLA-OFT, Kim et al. 2025) and executed open loop. The value
is read off the prompt, before any action token. Log-probs are taken at the sampling temperature over the
sampling support. Expect on 2 fast CPU cores: tabletop 0.985 to 0.995 greedy success (4 seeds) in 3
minutes after the warm-up's 4; CartPole 500 in half a minute.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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
from common.memory import available_memory
from common.optim import load_optimizer
from common.run import VLAArgs, check_decisions, check_episodes, main, mean_metrics, reserve


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
    num_steps: PositiveInt = 16
    """decisions per environment and iteration"""
    update_epochs: PositiveInt = 2
    """passes over an iteration's data"""
    minibatch_size: PositiveInt = 256
    """decisions per optimizer step"""
    micro_batch_size: PositiveInt = 128
    """decisions per backward pass; smaller fits less memory and gives the same gradient"""
    learning_rate: NonNegative = 5e-5
    """AdamW, policy"""
    value_learning_rate: NonNegative = 1e-3
    """AdamW, value head"""
    anneal_lr: bool = True
    """linear decay of both learning rates to zero"""
    policy_warmup: NonNegativeInt = 10
    """iterations over which the policy's learning rate rises from 0"""
    gamma: Share = 0.9
    """discount per decision: an episode is 3 to 12 of them, and 0.9 makes a late success worth visibly
    less"""
    gae_lambda: Share = 0.95
    """lambda of generalised advantage estimation"""
    ratio_level: Literal["token", "step", "chunk"] = "step"
    """what one importance ratio covers: a token, the tokens of one environment step, or the whole chunk"""
    clip_low: Share = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: NonNegative = 0.28
    """a wider upper bound keeps exploration alive (DAPO, Yu et al. 2025)"""
    dual_clip: NonNegative = 0.0
    """bound on the ratio where the advantage is negative, 3 for example (Ye et al. 2020); 0 for none"""
    recompute_logprobs: bool = False
    """old log-probs once more before the update, in micro-batches of its size: for kernels whose results
    depend on it, as on GPUs in bfloat16; one more forward pass"""
    temperature: Annotated[Positive, KEPT] = 0.6
    """divides the logits, in sampling and in every log-prob alike"""
    greedy: Annotated[Literal["mean", "mode"], KEPT, Only("head", "tokens")] = "mean"
    """what an evaluation does: the bin of the action's mean, or the likeliest one"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: NonNegative = 0.0
    """weight of the k3 estimate of KL(policy || initial policy)"""
    target_kl: Annotated[float | None, POSITIVE] = None
    """end the iteration's update once approx_kl of a minibatch exceeds it"""
    value_coef: NonNegative = 0.5
    """weight of the value loss"""
    value_clip: NonNegative = 0.2
    """the new value is kept within this of the old one in the clipped branch; 0 for no clipping"""
    huber_delta: NonNegative = 0.0
    """Huber's delta for the value loss; 0 for the squared error"""
    detach_value: bool = True
    """keep the value loss's gradient out of the backbone that the policy shares"""
    critic_warmup: NonNegativeInt = 5
    """iterations that train only the value head: by a poor one a good warm-up is unlearned"""
    normalize_advantages: bool = True
    """to mean 0 and std 1 over an iteration's data"""
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
        """A chain of several steps moves further than tokens at the same rate."""
        own = dict(learning_rate=2e-5) if self.head == "flow" else {}
        return {name: x for name, x in own.items() if getattr(self, name) == getattr(Args, name)}

    def check(self):
        if self.num_steps * self.num_envs * 100 > (free := available_memory()):  # the smallest takes more
            raise UserError(
                f"--num-steps {self.num_steps} of {self.num_envs} environments do not fit into "
                f"{free / 1e9:.0f} GB; give fewer of them."
            )
        if 0 < self.dual_clip <= 1:
            raise UserError(f"--dual-clip must be above 1, or 0 for none, not {self.dual_clip}.")


PRESETS = {  # what differs from the defaults; flags on the command line win
    "tabletop": dict(randomize=0.6),
    "libero": dict(
        backbone="openvla", num_envs=32, eval_envs=32, update_epochs=4, learning_rate=1e-4, gamma=0.95,
        eval_freq=20, save_freq=5, total_timesteps=2_000_000,
    ),
    "robosuite": dict(
        num_envs=32, eval_envs=16, eval_episodes=50, update_epochs=4, learning_rate=1e-4, gamma=0.95,
        target_kl=0.03, total_timesteps=150_000,
    ),
    "behavior": dict(num_envs=4, eval_envs=4, eval_episodes=20, num_steps=64, gamma=0.99),  # never run
    "driving": dict(  # from states; with pictures: --cameras topdown --backbone tiny --head tokens
        backbone="mlp", cameras=("none",), head="gaussian", init_std=0.4, chunk=1, num_envs=8, eval_envs=4,
        eval_episodes=40, num_steps=256, update_epochs=10, micro_batch_size=256, learning_rate=1e-3,
        gamma=0.99, ratio_level="chunk", clip_high=0.2, value_clip=0.0, critic_warmup=0, policy_warmup=0,
        max_grad_norm=0.5, total_timesteps=500_000,
    ),
    "maniskill": dict(num_envs=16, eval_envs=16, eval_episodes=50, total_timesteps=100_000),
    "rl4vla": dict(  # of RL4VLA's: 64 episodes of 80 steps an iteration, with --num-steps 80
        backbone="openvla", num_envs=64, eval_envs=32, eval_episodes=64, save_freq=5,
        total_timesteps=2_000_000,
    ),
    "gymnasium": dict(  # any Gymnasium id: plain PPO
        backbone="mlp", chunk=1, num_envs=8, num_workers=0, eval_envs=20, eval_episodes=100, num_steps=128,
        update_epochs=10, minibatch_size=256, micro_batch_size=256, learning_rate=1e-3,
        value_learning_rate=1e-3, gamma=0.98, ratio_level="chunk", clip_high=0.2, temperature=1.0,
        value_clip=0.0, detach_value=False, critic_warmup=0, policy_warmup=0, max_grad_norm=0.5, save_freq=50,
        total_timesteps=150_000,
    ),
    "CartPole-v1": dict(head="discrete"),
    "Pendulum-v1": dict(head="gaussian", gamma=0.9, num_steps=256, init_std=1.0, total_timesteps=300_000),
    "openvla": dict(  # greedy as published
        greedy="mode", chunk=8, num_steps=32, update_epochs=1, minibatch_size=256, micro_batch_size=16,
        learning_rate=1e-4, gamma=0.99, temperature=1.6, ratio_level="token", critic_warmup=4,
        policy_warmup=0,
    ),
    # RLinf's and piRL's (arXiv:2510.25889) for LIBERO, but joint over the steps, and in 1024 decisions an
    # iteration for 2048 or more: a decision's prefix of two cameras is 10 MB in bfloat16.
    "pi0": dict(
        head="flow", chunk=5, num_steps=16, num_envs=64, update_epochs=4, minibatch_size=512,
        micro_batch_size=32, learning_rate=5e-6, value_learning_rate=1e-4, gamma=0.99, ratio_level="chunk",
        clip_high=0.2, dual_clip=3.0, huber_delta=10.0, critic_warmup=4, policy_warmup=10, flow_steps=4,
        noise_level=0.5,
    ),
    # A public run's of Qwen2-VL-2B with adapters of rank 16 on robosuite's eight moves: 128 decisions of one
    # step an iteration. Without its dropout, under which no ratio is 1; the value head's rate and warm-up are
    # ours, not tuned.
    "qwen": dict(
        chunk=1, num_envs=16, num_steps=8, eval_envs=16, eval_episodes=50, update_epochs=4, minibatch_size=4,
        micro_batch_size=4, learning_rate=3e-5, value_learning_rate=1e-4, gamma=0.99, clip_high=0.2,
        temperature=1.0, entropy_coef=0.01, critic_warmup=5, total_timesteps=100_000,
    ),
}  # fmt: skip
FPO_DRAWS = 8  # noises, each at its own time, whose losses are a flow's log-prob in FPO


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


def ppo_loss(log_probs, entropies, values, batch, totals, args, critic_only=False):
    """PPO's loss of a micro-batch (Schulman et al. 2017, eq. 9, and a penalty on the KL) and its metrics.

    log_probs, entropies (B, K*A), values (B,): of the network in training. batch: of the same decisions as
    they were made, `mask` (B, K*A), `old_log_probs` (B, G) as `merge_tokens` makes them, `values`, `returns`,
    `advantages` (B,), and with a kl_coef `reference_log_probs` (B, K*A). totals: the minibatch's numbers of
    ratios, tokens and decisions, (3,), by which the sums are divided: those of its micro-batches add up to
    its means. critic_only: the value's part alone. -> loss (), {name: ()} without gradients
    """
    merged, covered = merge_tokens(log_probs, batch["mask"], args.ratio_level, args.chunk)
    log_ratio = merged - batch["old_log_probs"]
    surrogate = clipped_surrogate(
        log_ratio, batch["advantages"], args.clip_low, args.clip_high, args.dual_clip
    )
    policy_loss = masked_mean(surrogate, covered, totals[0])
    errors = value_loss(values, batch["values"], batch["returns"], args.value_clip, args.huber_delta)
    critic_loss = errors.sum() / totals[2]
    entropy = masked_mean(entropies, batch["mask"], totals[1])
    loss = args.value_coef * critic_loss
    if not critic_only:
        loss = loss + policy_loss - args.entropy_coef * entropy
        if args.kl_coef > 0:
            kl = kl_k3(batch["reference_log_probs"] - log_probs)
            loss = loss + args.kl_coef * masked_mean(kl, batch["mask"], totals[1])
    metrics = {"loss/policy": policy_loss, "loss/value": critic_loss, "loss/total": loss}
    metrics |= {"policy/entropy": entropy}
    metrics |= ratio_metrics(log_ratio, covered, totals[0], args.clip_low, args.clip_high)
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


def valid_decisions(lost, ended):
    """Which decisions teach: not those of an episode that was lost with its worker. lost, ended (T, N) bool,
    true at the decision that the episode was lost or ended with -> (T, N) bool."""
    valid, doomed = torch.empty_like(lost), torch.zeros_like(lost[0])
    for t in reversed(range(len(lost))):
        doomed = lost[t] | (doomed & ~ended[t])
        valid[t] = ~doomed
    return valid


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
    """Backbone, action head and value head. `batch` is what `backbone.preprocess` returns."""

    def __init__(self, backbone, args, envs):
        super().__init__()
        self.backbone, self.deterministic = backbone, args.deterministic
        self.detach_value = args.detach_value and not backbone.own_critic  # which nothing else would train
        self.head = make_head(backbone, args, envs)
        width = getattr(backbone, "prompt_size", backbone.hidden_size)
        layers = [nn.LayerNorm(width), nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1)]
        self.value_head = nn.Linear(width, 1) if backbone.own_critic else nn.Sequential(*layers)
        last = self.value_head if backbone.own_critic else layers[-1]
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


def minibatches(num_rows, epochs, per_epoch, generator):
    """Row numbers (B,), in each epoch all of them, in random order and in `per_epoch` minibatches."""
    for _ in range(epochs):
        yield from torch.randperm(num_rows, generator=generator).tensor_split(per_epoch)


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
    """Collect with the current policy, estimate advantages, update, repeat (Schulman et al. 2017, alg. 1)."""
    eval_envs = run.closing(make_envs(args, "eval", args.eval_envs))
    backbone = load_backbone(args, eval_envs, run, args.micro_batch_size, args.train_vision)
    agent = Agent(backbone, args, eval_envs)
    load_weights(agent, args, run, new=("value_head", "head.exploration"), train_vision=args.train_vision)
    run.open()
    if args.collect:
        return collect(agent, eval_envs, args, run)
    if args.evaluate:
        run.evaluated(evaluate(agent, eval_envs, args, run, videos=True))
        return export(agent, eval_envs, args, run)

    envs, device = run.closing(make_envs(args, "train", args.num_envs, autoreset=True)), run.device
    distributed.shard(agent)
    trained = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    policy = [p for name, p in trained.items() if not name.startswith("value_head")]
    groups = [
        {"params": policy, "lr": args.learning_rate},
        {"params": list(agent.value_head.parameters()), "lr": args.value_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    cache_vision = not any(p.requires_grad for p in backbone.vision_parameters())
    # The KL's reference: what is trained, as it was at first. Adapters that are new add nothing then.
    reference = [p.detach().clone() for p in trained.values()] if args.kl_coef > 0 else None
    sampler, shuffler = run.generator("sampler", device), run.generator("shuffler")
    active_dims = torch.as_tensor(envs.active_dims, device=device)
    order_in_chunk = torch.arange(args.chunk, device=device)

    step, iteration, gradient_steps, recent = 0, 0, 0, []  # recent: the last episodes
    rollout, num_steps, episodes = [], 0, []  # this iteration's decisions, environment steps, ended episodes
    if saved := run.restore():
        load_optimizer(optimizer, saved["optimizer"])
        step, iteration, gradient_steps = saved["counters"]
        recent, (rollout, num_steps, episodes) = saved["recent"], saved["rollout"]
        rollout = map_tensors(lambda x: x.to(device), rollout)
        if args.kl_coef > 0:
            pairs = zip(saved["reference"], trained.values(), strict=True)
            reference = [distributed.split(x.view(p.shape).to(device), p) for x, p in pairs]
        envs.set_state(saved["envs"])
        obs = {key: np.asarray(x) for key, x in saved["envs"]["obs"].items()}  # of lost episodes too
        columns = backbone.preprocess(obs, envs.instructions).keys() - {"image"}
        check_decisions(rollout, columns | {"actions", "log_probs", "values", "rewards"}, envs.num_envs)
        check_episodes(episodes)
        if type(num_steps) is not int:
            raise ValueError("a number of steps that is none")
    else:
        agent.head.exploration.fill_(1.0)
        obs = envs.reset()

    def save(name):
        """`best.pt` holds the weights, `checkpoint.pt` all that the run needs to go on."""
        state, own = {"agent": stored_weights(agent), "backbone": backbone.config}, None
        if name == "checkpoint.pt":
            state |= dict(optimizer=optimizer.state_dict(), counters=[step, iteration, gradient_steps])
            state |= dict(recent=recent, reference=reference)
            own = dict(envs=envs.get_state(), rollout=[rollout, num_steps, episodes])
        run.save(name, state, own)

    def evaluate_now(videos=False):
        if run.record(evaluate(agent, eval_envs, args, run, videos), step):
            save("best.pt")

    run.begin(step, args.total_timesteps, "env_step")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    while step < args.total_timesteps:
        # --- collect num_steps decisions of every environment
        agent.eval()
        distributed.unshard(agent)
        while len(rollout) < args.num_steps and not run.signalled:
            with torch.no_grad():
                batch = backbone.preprocess(obs, envs.instructions)
                vision = backbone.encode_vision(batch)[0] if cache_vision else None
                actions, log_probs, values = agent.get_action_and_value(batch, vision, generator=sampler)
            if cache_vision:
                batch.pop("image", None)
            tasks = obs.get("task")
            run.lap("policy")
            obs, rewards, terminated, truncated, info = envs.step(backbone.to_env(agent.head.to_env(actions)))
            run.lap("env")
            # Tokens that the environment never saw (after the end, or of a joint it lacks) teach nothing.
            executed = torch.as_tensor(info["steps"], device=device)[:, None] > order_in_chunk
            mask = (executed[..., None] & active_dims).flatten(1)
            final_values = torch.zeros_like(values)  # V(final observation) after a truncation, else 0
            if truncated.any():
                final_obs = {key: x[truncated] for key, x in info["final_obs"].items()}
                with torch.no_grad():
                    bootstrap = agent.get_value(backbone.preprocess(final_obs, envs.instructions))
                final_values[torch.as_tensor(truncated, device=device)] = bootstrap
            told = dict(rewards=rewards, ended=terminated | truncated, lost=info["lost"])
            told = {key: torch.as_tensor(x, device=device) for key, x in told.items()}
            told |= dict(actions=actions, log_probs=log_probs, mask=mask, values=values)
            told |= {"final_values": final_values} | ({} if vision is None else {"vision": vision})
            rollout.append(batch | reserve(batch, told))
            num_steps += int(info["steps"].sum())
            episodes += finished_episodes(info, terminated | truncated, tasks)
        if run.stopping():
            break

        # --- advantages
        iteration += 1
        with torch.no_grad():
            last_value = agent.get_value(backbone.preprocess(obs, envs.instructions))
        # (T, N, ...); popped, so that one copy is enough
        data = {key: torch.stack([decision.pop(key) for decision in rollout]) for key in list(rollout[0])}
        ended, values = data.pop("ended"), data["values"]
        valid = valid_decisions(data.pop("lost"), ended)
        next_values = torch.cat([values[1:], last_value[None]])
        next_values = torch.where(ended | ~valid, data.pop("final_values"), next_values)
        data["advantages"], data["returns"] = compute_gae(
            data.pop("rewards"), values, next_values, ended | ~valid, args.gamma, args.gae_lambda
        )

        # --- flatten, valid decisions only
        keep = slice(None) if valid.all() else valid.flatten().nonzero().squeeze(1)
        data = {key: x.flatten(0, 1)[keep] for key, x in data.items()}
        num_rows = len(data["values"])
        everyone = distributed.all_gather([num_rows, num_steps, episodes, envs.lost_episodes])
        all_rows, all_steps, all_episodes, all_lost = zip(*everyone, strict=True)
        first_step, step = step, step + sum(all_steps)
        recent = (recent + sum(all_episodes, []))[-200:]
        if args.curriculum:
            envs.draw_tasks(teachable(recent, len(envs.instructions)))
        rollout, num_steps, episodes = [], 0, []
        if not min(all_rows):  # every environment's worker died
            continue
        if args.normalize_advantages and sum(all_rows) > 1:
            whole = torch.cat(distributed.all_gather(data["advantages"].cpu())).to(device)
            data["advantages"] = (data["advantages"] - whole.mean()) / (whole.std() + 1e-8)
        rows = torch.arange(num_rows)
        lengths = data.pop("length").cpu() if "length" in data else None  # of prompts, where they differ
        if args.recompute_logprobs:
            log_probs = current_log_probs(agent, rows, data, lengths, args.micro_batch_size)
            data["log_probs"] = log_probs
        data["old_log_probs"], data["covered"] = merge_tokens(
            data["log_probs"], data["mask"], args.ratio_level, args.chunk
        )
        if args.kl_coef > 0:
            with weights_of(reference, trained.values()):
                log_probs = current_log_probs(agent, rows, data, lengths, args.micro_batch_size)
            data["reference_log_probs"] = log_probs
        run.lap("policy")

        # --- update
        agent.train()
        distributed.reshard(agent)
        fraction = max(0.0, 1 - first_step / args.total_timesteps) if args.anneal_lr else 1.0
        rise = min(1.0, max(0, iteration - args.critic_warmup) / (args.policy_warmup or 1))
        optimizer.param_groups[0]["lr"] = args.learning_rate * fraction * rise
        optimizer.param_groups[1]["lr"] = args.value_learning_rate * fraction
        critic_only, updates = iteration <= args.critic_warmup, []
        per_epoch = math.ceil(sum(all_rows) / args.minibatch_size)
        for rows in minibatches(num_rows, args.update_epochs, per_epoch, shuffler):
            # What the means divide by is the minibatch's, so that micro-batches, here and in torchrun's other
            # processes, add up to it exactly.
            covered, mask = data["covered"][rows.to(device)], data["mask"][rows.to(device)]
            totals = torch.stack([covered.sum(), mask.sum(), mask.new_tensor(len(rows), dtype=torch.int64)])
            distributed.all_sum(totals)
            if not totals[2]:  # fewer decisions than minibatches
                continue
            terms = []
            micros = micro_batches(rows, data, lengths, args.micro_batch_size)
            for _, micro in distributed.in_step(micros, data, agent):
                new = agent.evaluate_actions(micro, micro["actions"], micro.get("vision"))
                loss, term = ppo_loss(*new, micro, totals, args, critic_only)
                loss.backward()
                terms.append(term)
            metrics = distributed.sum_metrics(terms, device)
            if args.target_kl is not None and metrics["policy/approx_kl"] > args.target_kl:
                optimizer.zero_grad()
                break
            distributed.sum_gradients(trained.values())
            if critic_only:
                for parameter in policy:  # reached through the value where it is not detached
                    parameter.grad = None
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            metrics["optim/grad_norm"] = distributed.whole(norm)
            run.check_finite(metrics, f"iteration {iteration}", returns=data["returns"])
            optimizer.step()
            optimizer.zero_grad()
            gradient_steps += 1
            updates.append(metrics)
        if updates:  # else what waits is still of this policy
            done = min(1.0, step / args.total_timesteps)
            agent.head.exploration.fill_(1 + (args.exploration_end - 1) * done)
        run.lap("update")

        # --- log, evaluate, save
        scalars = mean_metrics(updates) | rollout_metrics(recent, envs.has_success)
        scalars |= {
            "policy/first_ratio_error": updates[0]["policy/ratio_error"] if updates else 0.0,
            "value/explained_variance": explained_variance(data["values"], data["returns"]),
            "optim/learning_rate": optimizer.param_groups[0]["lr"],
            "rollout/lost_episodes": sum(all_lost),
            "time/samples_per_second": sum(all_rows) * args.update_epochs / run.laps["update"],
        }
        run.log(scalars, step)
        if run.due(iteration, args.eval_freq) and step < args.total_timesteps:
            evaluate_now()
        if run.due(iteration, args.save_freq) or step >= args.total_timesteps:
            save("checkpoint.pt")

    if step < args.total_timesteps:
        save("checkpoint.pt")
        run.stopped(step)
    evaluate_now(videos=True)
    save("checkpoint.pt")
    run.finish(step, gradient_steps)
    export(agent, eval_envs, args, run)


if __name__ == "__main__":
    main(train, Args, PRESETS, parallel=True)
