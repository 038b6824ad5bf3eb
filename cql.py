"""Conservative Q-learning, in one file.

    python cql.py --dataset hopper-medium-v2 --cql-alpha 5.0 --cql-samples 10

Kumar et al. 2020 (arXiv:2006.04779): soft actor-critic whose critics also push Q down where it is high on
actions outside the data, and up on the data's. This is CQL(H), the importance-weighted logsumexp over uniform
actions and actions of the policy, with the fixed weight --cql-alpha or, with --target-gap, a Lagrange one.
"""

import contextlib
import copy
import ctypes
import dataclasses
import importlib.util
import json
import math
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import UserError
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
from common.datasets import d4rl_name, load_dataset
from common.envs import make_envs
from common.optim import compile_update, minimize
from common.video import annotate, write_video


@dataclass
class Args:
    # --- experiment
    dataset: str = "hopper-medium-v2"
    """D4RL's name, a file in D4RL's or RoboMimic's layout, or a Minari id"""
    env: str | None = None
    """the Gymnasium id to evaluate in; default the data set's"""
    seed: int = 1
    """fixes initial weights, sampling and evaluation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks and the data are"""
    compile: bool = False
    """torch.compile the update; with CUDA graphs on a GPU"""
    bf16: bool = False
    """matrix products of the critics in bfloat16, but for the last layer's"""
    checkpoint: str | None = None
    """start from these weights: a file, or a run's folder"""
    resume: str | None = None
    """continue this run (its folder) exactly where its last checkpoint stands, with its own arguments"""
    evaluate: bool = False
    """no training: evaluate --checkpoint and write results.json"""
    capture_video: bool = False
    """write annotated videos of the first evaluation episodes"""
    track: bool = False
    """log to Weights & Biases beside TensorBoard"""
    output_dir: str = "runs"
    """where run folders are made"""
    run_name: str | None = None
    """the run folder's name; default <dataset>__<script>__<seed>__<time>"""
    eval_episodes: int = 10
    """episodes of an evaluation, each with a seed of its own; 0 for no evaluation"""
    eval_freq: int = 5_000
    """updates between evaluations; 0 for the first and the last only"""
    save_freq: int = 50_000
    """updates between checkpoints"""

    # --- algorithm
    total_timesteps: int = 1_000_000
    """updates to train for"""
    batch_size: int = 256
    """transitions per update"""
    learning_rate: float = 1e-4
    """Adam, policy and temperature"""
    critic_learning_rate: float = 3e-4
    """Adam, critics"""
    gamma: float = 0.99
    """discount per step"""
    tau: float = 0.005
    """the target critics move by this share of the way at each update"""
    alpha: float | Literal["auto"] = "auto"
    """the entropy's temperature; auto tunes it to the target entropy -A"""
    cql_alpha: float = 5.0
    """weight of the penalty"""
    cql_samples: int = 10
    """actions per observation from each of: uniform, policy, policy at the next observation"""
    target_gap: float | None = None
    """tune the penalty's weight so that it stays about this (Lagrange); --cql-alpha multiplies it"""
    min_penalty: float | None = None
    """the penalty of a transition is clipped from below to this"""
    max_backup: bool = False
    """bootstrap from the best of --cql-samples actions of the policy instead of one"""
    bc_steps: int = 0
    """the policy first imitates the data for this many updates"""
    normalize: bool = True
    """observations to mean 0 and standard deviation 1 over the data"""
    normalize_rewards: bool = False
    """scale rewards so that the episodes' returns span 1000"""
    reward_scale: float = 1.0
    """then multiply rewards by this"""
    reward_bias: float = 0.0
    """and add this to them"""
    width: int = 256
    """units of a hidden layer"""
    depth: int = 3
    """hidden layers"""
    critic_depth: int = 3
    """hidden layers of the critics"""


PRESETS = {  # by a word of the data set's name
    "antmaze": dict(
        target_gap=0.8, min_penalty=-200.0, max_backup=True, critic_depth=5, normalize=False,
        reward_scale=10.0, reward_bias=-5.0, eval_episodes=100, eval_freq=100_000,
    )
}  # fmt: skip
SCRIPT, LOG_FREQ = Path(__file__).stem, 100


# --- the mathematics: pure functions on tensors


def squashed_gaussian(mean, log_std, noise):
    """a = tanh(u) with u = mean + exp(log_std) * noise, noise ~ N(0, I) -> a (..., A), log pi(a) (...).

    log pi(a) = sum_i [log N(u_i) - log(1 - tanh(u_i)^2)] (arXiv:1812.05905, eq. 26), where
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)) does not lose its digits where tanh saturates.
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def squashed_log_prob(mean, log_std, action):
    """log pi(action) (...) of that policy; actions at the bounds, which have none, are moved inside."""
    u = action.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    return squashed_gaussian(mean, log_std, (u - mean) * (-log_std).exp())[1]


def td_target(rewards, terminations, next_values, gamma):
    """r + gamma (1 - terminated) V(s'), each (B,). A time-out is bootstrapped like any other step."""
    return rewards + gamma * (1 - terminations) * next_values


def critic_loss(q, target):
    """Sum over the critics of the mean squared error: q (2, B), target (B,) -> ()."""
    return (q - target).square().mean(-1).sum()


def policy_loss(log_prob, q, alpha):
    """E[alpha log pi(a|s) - min_i Q_i(s, a)] (eq. 9): log_prob (B,), q (2, B), alpha () -> ()."""
    return (alpha * log_prob - q.amin(0)).mean()


def temperature_loss(log_alpha, log_prob, target_entropy):
    """-alpha E[log pi + target entropy] (eq. 18): alpha rises while the entropy is below its target."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def cql_penalty(q_data, q_samples, log_density):
    """log sum_j exp(Q(s, a_j)) / density(a_j) - Q(s, a): up to a constant, the importance-weighted estimate
    of log integral exp(Q(s, .)) - Q(s, a) (arXiv:2006.04779, eq. 4 and appendix F).

    q_data (2, B), of the data's actions; q_samples (2, M, B), log_density (M, B), of the sampled ones, all at
    the same s; -> (2, B)
    """
    return (q_samples - log_density).logsumexp(1) - q_data


# --- networks


class TwinCritic(nn.Module):
    """Q1 and Q2 as one network of batched matrices: obs (B, S), action (B, A) -> (2, B)."""

    def __init__(self, obs_dim, action_dim, width, depth, bf16=False):
        super().__init__()
        self.bf16 = bf16
        sizes = [obs_dim + action_dim, *[width] * depth, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):  # nn.Linear's initialisation
            for group, rows in ((self.weights, inputs), (self.biases, 1)):
                group.append(torch.empty(2, rows, outputs).uniform_(-(inputs**-0.5), inputs**-0.5))

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1).expand(2, -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for w, b in hidden:
                x = torch.baddbmm(b, x, w).relu_()  # (2, B, width)
        return (x * weight.mT).sum(-1) + bias[..., 0]  # faster than a product with one column


def mlp(inputs, outputs, width, depth):
    sizes = [inputs, *[width] * depth]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    hidden = [layer for m, n in pairs for layer in (nn.Linear(m, n), nn.ReLU(inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


@torch.no_grad()
def orthogonal(network):
    """Orthogonal matrices with gain sqrt(2), 0.01 in the last layer, and biases of 0: in place, returned."""
    weights = [p for name, p in network.named_parameters() if "weight" in name]
    for weight in weights:
        for matrix in weight.view(-1, *weight.shape[-2:]):
            nn.init.orthogonal_(matrix, 0.01 if weight is weights[-1] else math.sqrt(2))
    for name, p in network.named_parameters():
        if "bias" in name:
            p.zero_()
    return network


class Agent(nn.Module):
    """Policy, critics, target critics, temperature and Lagrange multiplier. Actions are in [-1, 1],
    observations normalised by `obs_mean` and `obs_std` everywhere but in `act`."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.actor = orthogonal(mlp(obs_dim, 2 * action_dim, args.width, args.depth))
        critic = TwinCritic(obs_dim, action_dim, args.width, args.critic_depth, args.bf16)
        self.critic = orthogonal(critic)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.zeros(()))

    def policy(self, obs):
        """obs (B, S) -> mean and log_std (B, A), the latter squashed to [-5, 2]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        return mean, 3.5 * log_std.tanh() - 1.5

    def act(self, obs):
        """The action of an evaluation, from the environment's own observations: (B, S) -> (B, A)."""
        return self.policy((obs - self.obs_mean) / self.obs_std)[0].tanh()


# --- evaluation


@torch.no_grad()
def evaluate(agent, envs, device, references, video_folder=None):
    """One episode of each of `envs`, with seeds 0, 1, 2, ... -> the evaluation's dict of the run folder's
    contract. `references` are the returns of D4RL's normalised score, 0 and 100, or None."""
    if envs is None:
        return {"episodes": 0}
    agent.eval()
    running = np.ones(envs.num_envs, bool)
    record = np.arange(envs.num_envs) < (3 if video_folder else 0)
    frames = {i: [] for i in np.flatnonzero(record)}
    actions = np.zeros((envs.num_envs, 1, *envs.single_action_space.shape), np.float32)
    obs = envs.reset(np.arange(envs.num_envs))["proprio"]
    while running.any():
        actions[running, 0] = agent.act(torch.as_tensor(obs[running], device=device)).cpu().numpy()
        obs, _, terminated, truncated, info = envs.step(actions, mask=running, record=record & running)
        obs = obs["proprio"]
        for i, shots in info["frames"].items():
            text = f"step {info['episode_length'][i]}   return {info['episode_return'][i]:.1f}"
            frames[i] += [annotate(shot, [text]) for shot in shots]
        running &= ~(terminated | truncated)
    for i, pictures in frames.items():
        write_video(Path(video_folder) / f"episode_{i}.mp4", pictures, fps=30)
    mean_reward, mean_length = (float(info[f"episode_{key}"].mean()) for key in ("return", "length"))
    result = {"episodes": envs.num_envs, "mean_reward": mean_reward, "mean_length": mean_length}
    agent.train()
    if references:
        result["normalized_score"] = 100 * (mean_reward - references[0]) / (references[1] - references[0])
    return result


def score(evaluation):
    return evaluation.get("mean_reward", 0.0)


# --- set-up


def resolve_args(args):
    """Presets below the command line's flags; with --resume, the run's own arguments. UserError for values
    that cannot work."""
    words = re.split(r"[^a-z0-9]+", d4rl_name(args.dataset).lower())
    presets = next((preset for word, preset in PRESETS.items() if word in words), {})
    args = tyro.cli(Args, default=dataclasses.replace(Args(), **presets))
    if args.resume:
        args = resume_args(args, free={"resume", "device", "capture_video", "track"})
    check_args(
        args,
        positive="save_freq total_timesteps batch_size cql_samples width depth critic_depth",
        nonnegative="eval_episodes eval_freq learning_rate critic_learning_rate reward_scale cql_alpha "
        "bc_steps",
        share="gamma tau",
    )
    if args.alpha != "auto" and not 0 < args.alpha < math.inf:
        raise UserError(f"--alpha must be auto or a positive number, not {args.alpha}.")
    return args


def resume_args(args, free):
    """The run's own arguments, but for the `free` ones; UserError if the command line changes others."""
    saved = load_checkpoint(args.resume, scripts=(SCRIPT,))
    if "optimizers" not in saved:
        raise UserError(f"{args.resume} holds weights alone; use --checkpoint, or resume the run's folder.")
    saved = saved["args"]
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
    return args


def check_args(args, positive, nonnegative, share):
    """UserError unless the named values are in (0, inf), [0, inf) and [0, 1]."""
    wants = {name: ("be positive", lambda x: 0 < x < math.inf) for name in positive.split()}
    wants |= {name: ("not be negative", lambda x: 0 <= x < math.inf) for name in nonnegative.split()}
    wants |= {name: ("be in [0, 1]", lambda x: 0 <= x <= 1) for name in share.split()}
    wants["seed"] = ("be in [0, 2**63)", lambda x: 0 <= x < 2**63)
    for name, (want, fits) in wants.items():
        if not fits(getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} must {want}, but is {getattr(args, name)}.")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs Weights & Biases; pip install wandb, or drop --track.")
    if args.evaluate and not args.checkpoint:
        raise UserError("--evaluate needs --checkpoint, the weights to evaluate.")


def choose_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no CUDA GPU here; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def build_envs(env_id, num_envs, seed, autoreset=False):
    """`num_envs` copies of a Gymnasium environment, in this process; their actions are in [-1, 1]."""
    envs = make_envs(env_id, num_envs, seed=seed, num_workers=0, autoreset=autoreset)
    if "image" in envs.single_observation_space.spaces or not envs.single_action_space.shape:
        raise UserError(
            f"--env {env_id} is not for {SCRIPT}.py; it needs vector observations and continuous actions."
        )
    return envs


def load_weights(agent, saved):
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise UserError(f"The checkpoint's weights do not fit this run: {reason}") from error


def action_bounds(env_id):
    """What -1 and 1 mean in the environment's own units, which D4RL's files have: each (A,)."""
    space = gymnasium.make(env_id).action_space
    return space.low, space.high


def keep_freed_memory():
    """Has glibc keep large freed blocks, which it gives back by default: an update on a CPU is 15% faster."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


# --- data


def prepare_data(dataset, args, bounds):
    """The data set for the updates: actions in [-1, 1] of the environment's `bounds` (low, high), rewards
    scaled. -> states (N + F, S), next_index (N,) into them, rest (N, A + 2): action, reward, termination."""
    actions, rewards = dataset.actions, dataset.rewards
    if bounds:
        actions = 2 * (actions - bounds[0]) / (bounds[1] - bounds[0]) - 1
    elif np.abs(actions).max() > 1.001:  # 0.001 for what recorders round
        raise UserError(f"{dataset.name} has actions outside [-1, 1]; give --env, which says what they mean.")
    if args.normalize_rewards:
        returns = np.add.reduceat(rewards, dataset.episode_starts, dtype=np.float64)
        span = returns.max() - returns.min()
        if span <= 0.01 * np.abs(returns).max():  # as of a few demonstrations: rewards would become huge
            raise UserError(f"{dataset.name} has nearly equal returns alone; use --no-normalize-rewards.")
        rewards = rewards * (1000 / span)
    rewards = args.reward_scale * rewards + args.reward_bias
    actions = np.clip(actions, -1, 1)  # as the environment did
    rest = np.c_[actions, rewards, dataset.terminations].astype(np.float32)
    return [torch.from_numpy(x) for x in (dataset.states, dataset.next_index, rest)]


def sample_batch(states, next_index, rest, size, generator):
    """`size` transitions, uniformly: obs, action, reward, next_obs, termination, with `size` rows each."""
    index = torch.randint(len(rest), (size,), generator=generator, device=rest.device)
    obs, next_obs = states.index_select(0, torch.cat([index, next_index[index]])).split(size)
    action, reward, termination = rest.index_select(0, index).split([rest.shape[1] - 2, 1, 1], -1)
    return obs, action, reward[:, 0], next_obs, termination[:, 0]


# --- training


def train(args):
    """One process, top to bottom: sample transitions, update, repeat."""
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        device = choose_device(args.device)
        keep_freed_memory()
        torch.manual_seed(args.seed)
        source = args.resume or args.checkpoint
        saved = load_checkpoint(source, scripts=(SCRIPT,)) if source else None
        dataset = load_dataset(args.dataset)
        (_, action_dim), obs_dim = dataset.actions.shape, dataset.states.shape[1]
        env_id, eval_envs, bounds = args.env or dataset.env_id, None, None
        if args.eval_episodes and env_id is None:
            raise UserError(f"{dataset.name} names no environment; give --env, or --eval-episodes 0.")
        if env_id:  # it says what the actions mean, also to a run without evaluations
            envs = build_envs(env_id, max(1, args.eval_episodes), args.seed)
            stack.callback(envs.close)
            bounds = action_bounds(env_id)
            wants = envs.single_observation_space["proprio"].shape + bounds[0].shape
            if wants != (obs_dim, action_dim):
                raise UserError(
                    f"{dataset.name} has {obs_dim} observations and {action_dim} actions, {env_id} "
                    f"{wants[0]} and {wants[1]}; give another --env."
                )
            eval_envs = envs if args.eval_episodes else None
        references = dataset.reference_scores
        agent = Agent(obs_dim, action_dim, args)
        states, next_index, rest = (x.to(device) for x in prepare_data(dataset, args, bounds))
        if saved:
            load_weights(agent, saved)
        if args.alpha != "auto":  # also where a checkpoint has another
            nn.init.constant_(agent.log_alpha, math.log(args.alpha))
        agent.to(device)
        if not saved and args.normalize:
            agent.obs_mean[:] = states[: len(rest)].mean(0)
            agent.obs_std[:] = states[: len(rest)].std(0, correction=0) + 1e-3
        states.sub_(agent.obs_mean).div_(agent.obs_std)  # in place: also the data set's array on the CPU
        del dataset
        results = {"args": dataclasses.asdict(args), "versions": versions(), "hardware": hardware()}
        if args.resume:
            folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        else:
            name = args.run_name or f"{Path(args.dataset).stem}__{SCRIPT}__{args.seed}__{int(time.time())}"
            folder = run_folder(args.output_dir, name)
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        videos = folder / "videos" if args.capture_video else None
        if args.evaluate:
            final = evaluate(agent, eval_envs, device, references, videos)
            write_results(folder / "results.json", {"final": final} | results)
            print(f"evaluated {args.checkpoint}: {score(final):.1f} ({folder / 'results.json'})")
            return

        if args.track:
            import wandb  # an optional package

            wandb.init(project="vla-rl", name=folder.name, config=results["args"], sync_tensorboard=True)
        # What a killed run logged after its last checkpoint is logged again.
        writer = SummaryWriter(folder, purge_step=saved["counters"][0] + 1 if args.resume else None)
        stack.callback(writer.close)
        critic_parameters = list(agent.critic.parameters())
        target_parameters = list(agent.target_critic.parameters())
        tuned = [*agent.actor.parameters(), *([agent.log_alpha] if args.alpha == "auto" else [])]
        actor_optimizer = torch.optim.Adam(tuned, lr=args.learning_rate, fused=True)
        critic_optimizer = torch.optim.Adam(
            [*critic_parameters, agent.log_multiplier], lr=args.critic_learning_rate, fused=True
        )
        optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
        sampler = torch.Generator(device).manual_seed(args.seed)
        rows = 1024 if device.type == "cpu" else 2**30  # through the critics at a time: a CPU caches them

        def update(obs, action, reward, next_obs, termination, uniform, noise, imitate):
            """Algorithm 1 of arXiv:2006.04779, all gradients at the same weights: uniform actions (n, B, A),
            noise (1 + 2n, B, A) -> metrics."""
            alpha = agent.log_alpha.detach().exp()
            mean, log_std = agent.policy(obs)
            new_action, log_prob = squashed_gaussian(mean, log_std, noise[0])
            if imitate:
                loss_policy = (alpha * log_prob - squashed_log_prob(mean, log_std, action)).mean()
            else:
                loss_policy = policy_loss(log_prob, agent.critic(obs, new_action), alpha)
            loss_alpha = temperature_loss(agent.log_alpha, log_prob, -action_dim)

            with torch.no_grad():
                noise_here, noise_next = noise[1:].chunk(2)
                actions_here, density_here = squashed_gaussian(mean, log_std, noise_here)  # (n, B, A), (n, B)
                actions_next, density_next = squashed_gaussian(*agent.policy(next_obs), noise_next)
                k = args.cql_samples if args.max_backup else 1
                tried = next_obs.expand(k, -1, -1).flatten(0, 1), actions_next[:k].flatten(0, 1)
                next_value = agent.target_critic(*tried).amin(0).unflatten(0, (k, -1)).amax(0)
                target = td_target(reward, termination, next_value, args.gamma)
                density_uniform = torch.full_like(density_here, -action_dim * math.log(2))
                log_density = torch.cat([density_uniform, density_here, density_next])  # (3n, B)
                actions = torch.cat([action[None], uniform, actions_here, actions_next])  # (1 + 3n, B, A)
            here = obs.expand(len(actions), -1, -1).flatten(0, 1).split(rows)
            q = [agent.critic(*x) for x in zip(here, actions.flatten(0, 1).split(rows), strict=True)]
            q = torch.cat(q, 1).unflatten(1, (len(actions), -1))  # (2, 1 + 3n, B), all at obs
            loss_critic = critic_loss(q[:, 0], target)
            penalty = cql_penalty(q[:, 0], q[:, 1:], log_density)  # (2, B)
            if args.min_penalty is not None:
                penalty = penalty.clamp(min=args.min_penalty)
            penalty = penalty.mean(-1)
            multiplier = torch.ones((), device=device)
            loss = loss_critic + args.cql_alpha * penalty.sum()
            if args.target_gap is not None:
                multiplier = agent.log_multiplier.exp().clamp(max=1e6)
                gap = args.cql_alpha * (penalty - args.target_gap)
                loss = loss_critic + multiplier.detach() * gap.sum() - multiplier * gap.detach().mean()
            minimize(loss_policy + loss_alpha, actor_optimizer)
            minimize(loss, critic_optimizer)

            with torch.no_grad():
                torch._foreach_lerp_(target_parameters, critic_parameters, args.tau)
            metrics = {"loss/critic": loss_critic, "loss/policy": loss_policy, "loss/penalty": penalty}
            metrics |= {"policy/entropy": -log_prob, "policy/alpha": alpha, "value/q": q[:, 0]}
            metrics["value/multiplier"] = multiplier
            return {name: x.detach() for name, x in metrics.items()}

        step, seconds, initial, best = 0, 0.0, None, None
        if args.resume:
            for name, state in saved["optimizers"].items():
                optimizers[name].load_state_dict(state)
            step, seconds = saved["counters"]
            initial, best = saved["initial"], saved["best"]
            set_rng_state(saved["rng"], {"sampler": sampler}, {})
        if args.compile:
            update = compile_update(update, agent, optimizers.values())
        start = clock() - seconds

        def save(name):
            state = dict(args=dataclasses.asdict(args), agent=agent.state_dict())
            if name == "checkpoint.pt":  # with all that the run needs to go on
                state |= dict(
                    counters=[step, clock() - start], initial=initial, best=best,
                    optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                    rng=rng_state({"sampler": sampler}, {}),
                )  # fmt: skip
            save_checkpoint(folder / name, script=SCRIPT, state=state)

        def run_evaluation(videos=None):
            """Evaluates, logs, and keeps the best weights."""
            nonlocal best
            found = evaluate(agent, eval_envs, device, references, videos)
            for key in found.keys() - {"episodes"}:
                writer.add_scalar(f"eval/{key}", found[key], step)
            if best is None or score(found) >= score(best):  # the latest of equals, as without evaluations
                best = found
                save("best.pt")
            return found

        def due(freq):
            return freq and (step % freq == 0 or step == args.total_timesteps)

        stop = []  # a signal asks for a checkpoint and an orderly end; a second one ends at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

        if initial is None:
            initial = run_evaluation(videos)  # what a video lacks shows now
            save("checkpoint.pt")
        tick, tick_step, stopping = clock(), step, bool(stop)
        bar = tqdm(total=args.total_timesteps, initial=step, unit="update", disable=None, smoothing=0.1)
        while step < args.total_timesteps and not stopping:
            batch = sample_batch(states, next_index, rest, args.batch_size, sampler)
            step += 1
            size = (args.cql_samples, args.batch_size, action_dim)
            uniform = torch.rand(size, generator=sampler, device=device) * 2 - 1
            noise = torch.randn(1 + 2 * size[0], *size[1:], generator=sampler, device=device)
            metrics = update(*batch, uniform, noise, step <= args.bc_steps)
            bar.update()

            # --- log, evaluate, save
            stopping = bool(stop)  # a signal from here on waits for the next update
            if not (due(LOG_FREQ) or due(args.eval_freq) or due(args.save_freq) or stopping):
                continue
            scalars = {name: x.mean().item() for name, x in metrics.items()}
            if not np.isfinite(list(scalars.values())).all():
                ranges = [f"{x.min().item():.3g} to {x.max().item():.3g}" for x in batch]
                raise FloatingPointError(
                    f"update {step}: a loss is not finite ({scalars}; the last batch was in {ranges}); "
                    f"{folder / 'checkpoint.pt'} is the last good state."
                )
            scalars["time/updates_per_second"] = (step - tick_step) / (clock() - tick)
            if device.type == "cuda":
                scalars["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            if due(args.eval_freq) and step < args.total_timesteps:
                found = score(run_evaluation())
                tqdm.write(f"{step} updates, {clock() - start:.0f} s: eval {found:.1f}")
            if due(args.save_freq) or stopping:
                save("checkpoint.pt")
            tick, tick_step = clock(), step

        bar.close()
        if stopping and step < args.total_timesteps:
            print(f"stopped at {step} updates; go on with: python {SCRIPT}.py --resume {folder}")
            sys.exit(128 + stop[0])
        final = run_evaluation(videos)
        save("checkpoint.pt")
        numbers = dict(environment_steps=0, gradient_steps=step, wall_seconds=clock() - start)
        write_results(
            folder / "results.json", dict(initial=initial, final=final, best=best) | numbers | results
        )
        minutes = (clock() - start) / 60
        print(f"return {score(initial):.1f} -> {score(final):.1f} in {minutes:.1f} minutes ({folder})")


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
