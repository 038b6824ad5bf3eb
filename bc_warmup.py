"""Behaviour cloning of a vision-language-action policy from demonstrations, in one file: stage 1.

    python bc_warmup.py --run-name warmup                        # scripted demonstrations, made on the fly
    python bc_warmup.py --demos demos.hdf5 --run-name warmup     # RoboMimic's and LIBERO's layout
    python ppo_vla.py --checkpoint runs/warmup/checkpoint.pt     # stage 2

Cross-entropy on the 256-bin action tokens of the next K actions (OpenVLA, Kim et al. 2024; chunks after
OpenVLA-OFT, 2025). The 7B models come with a pretrained eye for words and things; the tiny one is random, so
a short grounding stage comes first: on random pictures its attention learns to point at the object and the
plate that the instruction names, whose pixels the simulator knows. It stands in for the pretrained VLM and
uses nothing but the training layouts. Expect 0.96 to 0.995 greedy success (4 seeds) in 4 minutes of 2 fast
cores, 25 of a slow one (a flow of 600 demonstrations: 0.91).
"""

import functools
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from common.action_tokenizer import ActionTokenizer
from common.backbones import export, load_backbone, load_weights, stored_weights
from common.datasets import chunk_targets, training_demonstrations, training_scenes
from common.envs import make_envs
from common.evaluation import collect, evaluate
from common.flags import FIXED, KEPT, NonNegative, NonNegativeInt, Only, Positive, PositiveInt, Share, Unless
from common.optim import load_optimizer
from common.run import VLAArgs, main


@dataclass
class Args(VLAArgs):
    demos: str | None = None
    """HDF5 file of demonstrations in RoboMimic's or LIBERO's layout, or a folder of them (LIBERO has a file a
    task); default: the world's scripted expert makes them"""
    num_demos: PositiveInt = 2400
    """demonstrations: scripted ones to make, or the first of each file of --demos"""
    demos_filter: Literal["all", "success"] = "all"
    """those of --demos that are imitated: all, or the successful ones, as of recorded rollouts; published
    files, which do not say, hold these alone"""
    advantage_weight: NonNegative = 0.0
    """beta: a step's loss is weighed by exp(A / beta), A the advantage that its episode of --demos had from
    there on; 0 for equal weights"""
    advantage_gamma: Annotated[Share, Unless("advantage_weight", 0.0)] = 0.98
    """discount per environment step of the success to come, in the advantage"""
    demo_noise: Annotated[NonNegative, Unless("demos")] = 0.3
    """standard deviation of the noise on the scripted expert's executed actions; its labels stay clean"""
    head: Annotated[Literal["tokens", "gaussian", "flow", "discrete"], FIXED] = "tokens"
    """256-bin action tokens by cross-entropy, a continuous chunk by its L1 distance (OpenVLA-OFT), or by flow
    matching (pi0); gymnasium's Discrete by cross-entropy"""
    grounding_scenes: Annotated[NonNegativeInt, Unless("demos")] = 6000
    """random pictures for the grounding stage (scripted demonstrations only)"""
    grounding_steps: Annotated[NonNegativeInt, Unless("demos")] = 300
    """gradient steps of the grounding stage"""
    grounding_coef: Annotated[NonNegative, Unless("demos")] = 0.1
    """weight of the grounding loss beside the imitation loss"""
    image_aug: Share = 0.0
    """the pictures' colours vary in training, by factors in 1 +- this"""
    word_dropout: Share = 0.0
    """the chance of each word of an instruction to be a blank in training, so that what is unknown is guessed
    from the rest (to tiny, words that training never shows look like a blank)"""
    gradient_steps: PositiveInt = 2000
    """gradient steps of imitation"""
    batch_size: PositiveInt = 128
    """decisions per gradient step"""
    learning_rate: Positive = 1.5e-3
    """AdamW; cosine decay to zero over the imitation steps"""
    warmup_steps: PositiveInt = 50
    """linear warm-up of the learning rate in both stages"""
    label_sigma: Annotated[NonNegative, Only("head", "tokens")] = 3.0
    """tokens: the target is a Gaussian of this many bins around the demonstrated bin: near misses cost
    less"""
    temperature: Annotated[Positive, KEPT] = 1.0
    """divides the logits when it acts; cloning fits them at 1"""
    greedy: Annotated[Literal["mean", "mode"], KEPT, Only("head", "tokens")] = "mean"
    """what an evaluation does: the bin of the action's mean, or the likeliest one"""
    max_grad_norm: Positive = 1.0
    """global gradient norm clip"""
    init_std: Annotated[Positive, FIXED, Only("head", "gaussian")] = 0.2
    """gaussian head: the standard deviation that PPO starts with"""
    learn_std: ClassVar[bool] = False  # imitation leaves the standard deviation alone
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
    flow_samples: Annotated[PositiveInt, Only("head", "flow")] = 8
    """flow head: noises and times drawn for each decision of a batch"""
    eval_freq: NonNegativeInt = 0
    """gradient steps between evaluations; 0 for the last only"""
    save_freq: PositiveInt = 200
    """gradient steps between checkpoints"""

    def check(self):
        if not self.demos and (self.demos_filter != "all" or self.advantage_weight):
            raise UserError(
                "--demos-filter and --advantage-weight need --demos, a file that says who succeeded."
            )


PRESETS = {  # what differs from the defaults; flags on the command line win
    "tabletop": dict(randomize=0.6, image_aug=0.3, word_dropout=0.1),
    "libero": dict(backbone="openvla", chunk=8, eval_envs=32, num_demos=50, grounding_steps=0),
    "robosuite": dict(num_demos=100, gradient_steps=1000, eval_envs=16, eval_episodes=50),
    "driving": dict(num_demos=40, demo_noise=0.1, gradient_steps=1000, eval_envs=4, eval_episodes=40),
    "maniskill": dict(num_demos=100, gradient_steps=1000, eval_envs=16, eval_episodes=50, demo_noise=0.1),
    "rl4vla": dict(backbone="openvla", num_demos=140, demo_noise=0.1, eval_envs=32, eval_episodes=64),
    "openvla": dict(
        lora_modules=("language_model", "projector", "vision"), greedy="mode", gradient_steps=10_000,
        batch_size=16, learning_rate=5e-4, label_sigma=0.0, temperature=1.6, save_freq=1000,
    ),
    "robomimic": dict(gradient_steps=1000, eval_envs=16, eval_episodes=50),
    "behavior": dict(eval_envs=4, eval_episodes=20),
    "pi0": dict(  # openpi's
        head="flow", chunk=5, grounding_steps=0, gradient_steps=30_000, batch_size=32, learning_rate=2.5e-5,
        warmup_steps=1000, flow_steps=10, flow_samples=1, save_freq=1000,
    ),
    "qwen": dict(  # of adapters; not tuned
        chunk=1, grounding_steps=0, eval_envs=16, eval_episodes=50, gradient_steps=10_000, batch_size=16,
        learning_rate=1e-4, warmup_steps=100, save_freq=1000,
    ),
}  # fmt: skip
FPO_DRAWS = 8  # noises, each at its own time, whose losses are a flow's log-prob in FPO
BLANKED = 100  # copies of each instruction, with other words blank
MAX_WEIGHT = 20.0  # of a step with a large advantage (AWR's)


# --- the mathematics: pure functions on tensors


def soft_cross_entropy(logits, bins, sigma):
    """Cross-entropy (M,) of logits (M, 256) against a Gaussian of `sigma` bins around each target bin (M,),
    cut off at the ends and normalised. sigma -> 0 is the plain cross-entropy."""
    if sigma <= 0:
        return F.cross_entropy(logits, bins, reduction="none")
    index = torch.arange(logits.shape[-1], device=logits.device)
    table = (-0.5 * ((index[:, None] - index) / sigma).square()).softmax(-1)  # (256, 256)
    return -(table[bins] * logits.log_softmax(-1)).sum(-1)


def flow_matching_loss(velocity, actions, noise):
    """(v - (noise - actions))^2 elementwise: the velocity of the straight line x = t noise + (1 - t) actions
    (Lipman et al. 2023, eq. 23, with time as in pi0's code)."""
    return (velocity - (noise - actions)).square()


def pi0_times(uniform):
    """Times of flow matching from uniform draws, more of them near the noise: Beta(1.5, 1), scaled to
    [0.001, 1] (Black et al. 2024, appendix B)."""
    return 0.001 + 0.999 * uniform ** (1 / 1.5)


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


def advantage_weights(success, lengths, task, beta, gamma):
    """What each step counts in cloning, by its advantage, as in AWR (Peng et al. 2019) and simpler than RECAP
    (pi*0.6, 2025), which conditions on it: exp(A / beta), at most MAX_WEIGHT, divided by the mean of all.

    A = G - V: G = gamma^(steps after this one) * success, the discounted success to come, and V, in place of
    a learned value, its mean over the episodes with the same instruction that are as long in progress.
    success bool (E,), lengths int64 (E,) in steps, task int64 (E,) -> float32 (S,), S the sum of lengths.
    Where nothing is to be compared, as among demonstrations that all succeed (gamma 1), all weights are 1.
    """
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    step = torch.arange(len(episode)) - (lengths.cumsum(0) - lengths)[episode]
    to_come = gamma ** (lengths[episode] - 1 - step).double() * success[episode]
    peers = task[episode] * lengths.max() + step
    value = torch.bincount(peers, to_come) / torch.bincount(peers).clamp(min=1)
    weights = ((to_come - value[peers]) / beta).exp().clamp(max=MAX_WEIGHT)
    return (weights / weights.mean()).float()


def learning_rate_at(step, args):
    """Constant through the grounding stage, then a cosine to zero; linear warm-up at the start of either."""
    if step < args.grounding_steps:
        return args.learning_rate * min(1.0, (step + 1) / args.warmup_steps)
    done = step - args.grounding_steps
    cosine = 0.5 * (1 + np.cos(np.pi * done / args.gradient_steps))
    return args.learning_rate * cosine * min(1.0, (done + 1) / args.warmup_steps)


def jitter_colours(image, strength, generator):
    """Pictures uint8 (B, ..., 3), each in other colours: contrast about its mean, saturation about its
    grey and each channel are multiplied by factors uniform in 1 +- strength."""
    factors = torch.rand(len(image), 1, 5, generator=generator, device=image.device)
    contrast, saturation, channels = (1 + strength * (2 * factors - 1)).split([1, 1, 3], -1)
    x = image.flatten(1, -2).float()  # (B, P, 3)
    saturate = saturation * torch.eye(3, device=image.device) + (1 - saturation) / 3
    offset = (1 - contrast) * channels * x.mean((1, 2), keepdim=True)
    x = torch.baddbmm(offset, x, contrast * saturate * channels)  # all of it is linear
    return x.round_().clamp_(0, 255).to(torch.uint8).view_as(image)


def blank_words(instructions, share, copies, rng):
    """-> `copies` of each instruction, next to each other, whose words are blanks with the chance `share`."""
    return [
        " ".join("___" if rng.random() < share else word for word in text.split())
        for text in instructions
        for _ in range(copies)
    ]


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
    """Backbone and action head; the value head comes with reinforcement learning."""

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

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py): actions, numpy (B, K, A), and their values (B,)."""
        batch = self.backbone.preprocess(obs, turn["instructions"])
        actions, _, value = self.get_action_and_value(batch, None, self.deterministic, turn["generator"])
        return self.backbone.to_env(self.head.to_env(actions)).cpu().numpy(), value

    def imitation_loss(self, batch, vision, targets, mask, args, generator, weights=None):
        """targets: bins (tokens), or actions, and mask, both (B, K*A), or (B, n) of a backbone's own flow;
        weights (B,) or None for ones -> scalar, the mean over the mask"""
        discrete = isinstance(self.head, DiscreteHead)
        tokens = isinstance(self.head, TokenHead) and not discrete
        action_hidden = self.backbone(batch, vision, targets if tokens else None)[0]
        if tokens:  # logits of the valid ones only
            logits = self.backbone.action_logits(action_hidden[mask]).float()
            losses = soft_cross_entropy(logits, targets[mask], args.label_sigma)
        elif discrete:
            losses = soft_cross_entropy(self.head.logits(action_hidden[mask]).float(), targets[mask], 0)
        elif isinstance(self.head, FlowHead):
            noise = targets[:, None].repeat(1, args.flow_samples, 1).normal_(generator=generator)
            t = pi0_times(torch.empty_like(noise[..., 0]).uniform_(generator=generator))
            x = t[..., None] * noise + (1 - t[..., None]) * targets[:, None]
            velocity, _ = self.head(self.backbone, action_hidden)
            losses = flow_matching_loss(velocity(x, t), targets[:, None], noise).mean(1)[mask]
        else:
            losses = (self.head(self.backbone, action_hidden).mean - targets).abs()[mask]
        if weights is not None:
            losses = losses * weights[:, None].expand_as(mask)[mask]
        return losses.mean()


# --- training


def imitation_tensors(demos, args, envs, backbone, device):
    """Demonstrations -> what a gradient step draws from: the observations' keys, and where they are known
    `pixels`; `targets` (S, K*A), bins or actions, of the next K actions, and `mask` (S, K*A), those that the
    episode has and the world feels; with --advantage-weight `weights` (S,). S are the steps, of a policy's
    rollouts those where it decided: what it did amid a chunk it chose without having seen the step. A
    backbone that is a flow learns all that it denoises: (S, n), 0 and not in the mask beyond the world's."""
    if "image" in demos and "image_size" in backbone.config:  # it resizes nothing
        has, wants = demos["image"].shape[1:], envs.single_observation_space["image"].shape
        if has != wants:
            raise UserError(f"{args.demos} holds images {has}; this run's world has {wants}.")
    actions = backbone.from_env(demos["actions"])
    actions = actions[:, None] if args.head == "discrete" else actions
    chunk, numbers = getattr(backbone, "flow_shape", (args.chunk, actions.shape[1]))
    targets, mask = chunk_targets(actions, demos["episode_starts"], chunk)
    beyond = (0, numbers - actions.shape[1])
    data = {
        key: torch.as_tensor(demos[key], device=device)
        for key in ("proprio", "task", "pixels")
        if key in demos
    }
    data["targets"] = F.pad(torch.as_tensor(targets, device=device), beyond).flatten(1)
    mask = torch.as_tensor(mask[..., None] & envs.active_dims, device=device)
    data["mask"] = F.pad(mask, beyond).flatten(1)
    if args.head == "tokens":
        data["targets"] = ActionTokenizer().encode_bins(data["targets"])
    if args.advantage_weight:
        starts = demos["episode_starts"]
        lengths, task = np.diff(np.append(starts, len(demos["task"]))), demos["task"][starts]
        episodes = map(torch.as_tensor, (demos["success"], lengths, task))
        weights = advantage_weights(*episodes, args.advantage_weight, args.advantage_gamma)
        data["weights"] = weights.to(device)
    images = demos.get("image")
    if not demos["decided"].all():
        kept = np.flatnonzero(demos["decided"])
        images = images if images is None else images[kept]
        data = {key: x[torch.as_tensor(kept, device=device)] for key, x in data.items()}
    if images is not None:  # those of files may be larger than a GPU
        data["image"] = torch.as_tensor(np.asarray(images), device="cpu" if args.demos else device)
    return data


def train(args, run):
    """Make or read the data, ground, imitate, evaluate."""
    eval_envs, device = run.closing(make_envs(args, "eval", args.eval_envs)), run.device
    pictures = "image" in eval_envs.single_observation_space.spaces
    if not pictures and (args.image_aug or args.word_dropout):
        raise UserError(
            f"--env {args.env} shows no pictures, so that no backbone for it sees or reads; drop --image-aug "
            "and --word-dropout."
        )
    backbone = load_backbone(args, eval_envs, run, args.batch_size)
    if pictures and not backbone.vision_parameters():
        raise UserError(
            f"The backbone {backbone.config['name']!r} sees no images; give a --backbone that does."
        )
    agent = Agent(backbone, args, eval_envs)
    load_weights(agent, args, run, new=("head.exploration",))
    if args.collect or args.evaluate:
        run.open()
    if args.collect:
        return collect(agent, eval_envs, args, run)
    if args.evaluate:
        run.evaluated(evaluate(agent, eval_envs, args, run, videos=True))
        return export(agent, eval_envs, args, run)

    data = imitation_tensors(training_demonstrations(args, eval_envs), args, eval_envs, backbone, device)
    scenes, learns_to_see = None, any(p.requires_grad for p in backbone.vision_parameters())
    if backbone.has_attention and learns_to_see and args.grounding_steps and args.grounding_scenes:
        scenes = training_scenes(args, eval_envs, device)
    run.open()
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=1e-5, weight_decay=1e-4)
    shuffler, sampler = run.generator("shuffler"), run.generator("sampler", device)
    instructions = eval_envs.instructions
    if args.word_dropout:
        rng = np.random.default_rng(args.seed)
        instructions = blank_words(instructions, args.word_dropout, BLANKED, rng)

    first = 0 if scenes is not None else args.grounding_steps  # nothing to ground on: that stage is left out
    step, total = first, args.grounding_steps + args.gradient_steps
    if saved := run.restore():
        load_optimizer(optimizer, saved["optimizer"])
        step = saved["step"]

    def save(name):
        """`best.pt` holds the weights, `checkpoint.pt` all that the run needs to go on."""
        state, own = {"agent": stored_weights(agent), "backbone": backbone.config}, None
        if name == "checkpoint.pt":
            state, own = state | dict(optimizer=optimizer.state_dict(), step=step), {}
        run.save(name, state, own)

    def evaluate_now(videos=False):
        if run.record(evaluate(agent, eval_envs, args, run, videos), step):
            save("best.pt")

    run.begin(step, total, "gradient_step")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    agent.train()
    while step < total and not run.signalled:
        grounding = step < args.grounding_steps
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, args)
        source = scenes if grounding else data
        index = torch.randint(len(source["task"]), (args.batch_size,), generator=shuffler).to(device)
        names = [key for key in ("image", "proprio", "task") if key in source]
        obs = {key: source[key][index.to(source[key].device)] for key in names}
        if args.image_aug:
            obs["image"] = jitter_colours(obs["image"].to(device), args.image_aug, sampler)
        if args.word_dropout:
            copy = torch.randint(BLANKED, index.shape, generator=shuffler).to(device)
            obs["task"] = obs["task"] * BLANKED + copy
        batch = backbone.preprocess(obs, instructions)
        vision, attention = backbone.encode_vision(batch)
        losses, loss = {}, 0.0
        if not grounding:
            targets, mask = data["targets"][index], data["mask"][index]
            weights = data["weights"][index] if "weights" in data else None
            loss = losses["loss/policy"] = agent.imitation_loss(
                batch, vision, targets, mask, args, sampler, weights
            )
        if attention is not None and "pixels" in source:
            losses["loss/grounding"] = grounding_loss(attention, source["pixels"][index])
            loss = loss + (1.0 if grounding else args.grounding_coef) * losses["loss/grounding"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        metrics = losses | {"loss/total": loss, "optim/grad_norm": norm}
        run.check_finite(metrics, f"step {step}")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        run.advance(step)

        # --- log, evaluate, save
        if step % 20 == 1:
            run.log(metrics | {"optim/learning_rate": optimizer.param_groups[0]["lr"]}, step)
        if (
            step > args.grounding_steps
            and step < total
            and run.due(step - args.grounding_steps, args.eval_freq)
        ):
            evaluate_now()
        if run.due(step, args.save_freq) or step == total:
            save("checkpoint.pt")

    if step < total:
        save("checkpoint.pt")
        run.stopped(step)
    evaluate_now(videos=True)
    save("checkpoint.pt")
    run.finish(0, step - first)
    export(agent, eval_envs, args, run)


if __name__ == "__main__":
    main(train, Args, PRESETS)
