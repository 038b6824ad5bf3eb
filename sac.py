"""Soft actor-critic, in one file.

    python sac.py --env HalfCheetah-v5
    python sac.py --env Hopper-v5 --total-timesteps 300000 --run-name hopper --save-dataset replay.hdf5
    python sac.py --env Hopper-v5 --evaluate --checkpoint runs/hopper --collect 200000 --save-dataset med.hdf5

Haarnoja et al. 2018 (arXiv:1812.05905): a tanh-squashed Gaussian policy, two critics, a temperature that is
tuned to a target entropy of -A. One update per environment step. A time-out is no termination: only the
latter ends the bootstrap. --save-dataset writes D4RL's layout, the replay so far or --collect steps of the
policy. Expect Pendulum-v1 above -200 in 10 000 steps.
"""

import contextlib
import copy
import ctypes
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
from common.datasets import load_dataset, reference_scores, save_d4rl
from common.envs import make_envs
from common.optim import compile_update, minimize
from common.video import annotate, write_video


@dataclass
class Args:
    # --- experiment
    env: str = "HalfCheetah-v5"
    """a Gymnasium id with vector observations and continuous actions"""
    seed: int = 1
    """fixes environments, sampling, initial states and minibatch order"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks and the replay are"""
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
    """the run folder's name; default <env>__<script>__<seed>__<time>"""
    num_envs: int = 1
    """environments stepped together; each step of each counts"""
    eval_episodes: int = 10
    """episodes of an evaluation, of the mean action, with seeds of their own; 0 for no evaluation"""
    eval_freq: int = 10_000
    """environment steps between evaluations; 0 for the first and the last only"""
    save_freq: int = 50_000
    """environment steps between checkpoints, which hold the replay"""
    save_dataset: str | None = None
    """at the end write the replay to this file, in D4RL's layout"""
    collect: int = 0
    """write this many steps of the final policy (sampled, as in training) instead of the replay"""
    append: bool = False
    """add to what the file of --save-dataset holds, as medium-expert is both"""

    # --- algorithm
    total_timesteps: int = 1_000_000
    """environment steps to train for"""
    buffer_size: int = 1_000_000
    """transitions in the replay"""
    learning_starts: int = 5_000
    """steps of uniformly random actions before the first update"""
    utd_ratio: float = 1.0
    """updates per environment step"""
    batch_size: int = 256
    """transitions per update"""
    learning_rate: float = 3e-4
    """Adam, policy"""
    critic_learning_rate: float = 1e-3
    """Adam, critics and temperature"""
    gamma: float = 0.99
    """discount per step"""
    tau: float = 0.005
    """the target critics move by this share of the way at each update"""
    alpha: float | Literal["auto"] = "auto"
    """the temperature; auto tunes it to the target entropy -A"""
    width: int = 256
    """units of a hidden layer"""
    depth: int = 2
    """hidden layers"""


PRESETS = {"Pendulum-v1": dict(total_timesteps=20_000, learning_starts=1_000, eval_freq=5_000)}
SCRIPT, LOG_FREQ = Path(__file__).stem, 1000


# --- the mathematics: pure functions on tensors


def squashed_gaussian(mean, log_std, noise):
    """a = tanh(u) with u = mean + exp(log_std) * noise, noise ~ N(0, I) -> a (..., A), log pi(a) (...).

    log pi(a) = sum_i [log N(u_i) - log(1 - tanh(u_i)^2)] (arXiv:1812.05905, eq. 26), where
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)) does not lose its digits where tanh saturates.
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


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


class Agent(nn.Module):
    """Policy, critics, target critics and temperature. Actions are in [-1, 1]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.actor = mlp(obs_dim, 2 * action_dim, args.width, args.depth)
        self.critic = TwinCritic(obs_dim, action_dim, args.width, args.depth, args.bf16)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def policy(self, obs):
        """obs (B, S) -> mean and log_std (B, A), the latter squashed to [-5, 2]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        return mean, 3.5 * log_std.tanh() - 1.5

    def act(self, obs):
        """The action of an evaluation, the Gaussian's mean: (B, S) -> (B, A)."""
        return self.policy(obs)[0].tanh()


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
    args = tyro.cli(Args, default=dataclasses.replace(Args(), env=args.env, **PRESETS.get(args.env, {})))
    if args.resume:
        free = {"resume", "device", "capture_video", "track", "save_dataset", "collect", "append"}
        args = resume_args(args, free)
    check_args(
        args,
        positive="num_envs save_freq total_timesteps buffer_size batch_size width depth",
        nonnegative="eval_episodes eval_freq collect learning_starts utd_ratio learning_rate "
        "critic_learning_rate",
        share="gamma tau",
    )
    if args.alpha != "auto" and not 0 < args.alpha < math.inf:
        raise UserError(f"--alpha must be auto or a positive number, not {args.alpha}.")
    if args.buffer_size < args.num_envs:
        raise UserError(f"--buffer-size {args.buffer_size} must hold a step of all {args.num_envs} envs.")
    if args.collect and not args.save_dataset:
        raise UserError("--collect needs --save-dataset, the file to write.")
    if args.append and not args.save_dataset:
        raise UserError("--append needs --save-dataset, the file to add to.")
    if args.evaluate and args.save_dataset and not args.collect:
        raise UserError("--evaluate has no replay to save; add --collect and a number of steps.")
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


# --- data sets


def write_dataset(path, rows, count, widths, env_id, append):
    """The first `count` rows of (T, N, W), N recordings of T steps in the order of time, as a D4RL file,
    after what it holds already where they are to be appended."""
    obs, action, reward, terminated, truncated, next_obs = rows.split(widths, -1)
    truncated = (truncated > 0).squeeze(-1)
    truncated[-1] |= terminated[-1, :, 0] == 0  # the recording ends here, the episode does not
    low, high = action_bounds(env_id)
    action = low + (action.numpy() + 1) / 2 * (high - low)
    columns = (obs, action, reward[..., 0], next_obs, terminated[..., 0] > 0, truncated)
    columns = [np.asarray(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count] for x in columns]
    if append and Path(path).exists():
        old = load_dataset(path)
        ended = np.zeros(len(old.actions), bool)
        ended[np.append(old.episode_starts[1:], 0) - 1] = True
        before = (old.observations, old.actions, old.rewards, old.next_observations, old.terminations)
        before = (*before, ended & ~old.terminations)
        columns = [np.concatenate(pair) for pair in zip(before, columns, strict=True)]
    save_d4rl(path, *columns, env_id=env_id)
    print(f"{count} steps written to {path}")


@torch.no_grad()
def collect(agent, args, widths, device):
    """--collect steps of the sampled policy, 10 episodes at a time -> rows (T, 10, W) as the replay's."""
    envs = build_envs(args.env, 10, args.seed, autoreset=True)
    generator = torch.Generator(device).manual_seed(args.seed)
    rows = torch.empty(-(-args.collect // 10), 10, sum(widths))
    # neither training's nor evaluation's
    seeds = np.random.SeedSequence([args.seed, 0, 0, 1]).generate_state(10)
    obs = envs.reset(seeds)["proprio"]
    for row in tqdm(rows, unit_scale=10, unit="step", disable=None):
        mean, log_std = agent.policy(torch.as_tensor(obs, device=device))
        noise = torch.randn(mean.shape, generator=generator, device=device)
        action = squashed_gaussian(mean, log_std, noise)[0].cpu().numpy()
        obs = step_envs(envs, obs, action, row.numpy())[0]
    envs.close()
    return rows


def step_envs(envs, obs, action, row):
    """One step of all environments, written to `row` (N, W): obs, action, reward, terminated, truncated,
    next_obs, which is the episode's last observation where it ended -> the next obs (N, S), info, ended."""
    after, reward, terminated, truncated, info = envs.step(action[:, None])
    columns = (reward[:, None], terminated[:, None], truncated[:, None], info["final_obs"]["proprio"])
    np.concatenate([obs, action, *columns], axis=1, out=row, casting="unsafe")
    return after["proprio"], info, terminated | truncated


# --- training


def train(args):
    """One process, top to bottom: act, store, update, repeat."""
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        device = choose_device(args.device)
        keep_freed_memory()
        torch.manual_seed(args.seed)
        source = args.resume or args.checkpoint
        saved = load_checkpoint(source, scripts=(SCRIPT,)) if source else None
        envs = build_envs(args.env, args.num_envs, args.seed, autoreset=True)
        stack.callback(envs.close)
        if args.append and Path(args.save_dataset).exists():
            world = load_dataset(args.save_dataset).env_id
            if world != args.env:
                raise UserError(
                    f"{args.save_dataset} has steps of {world}; steps of {args.env} need a file of their own."
                )
        obs_dim = envs.single_observation_space["proprio"].shape[0]
        action_dim = envs.single_action_space.shape[0]
        widths = [obs_dim, action_dim, 1, 1, 1, obs_dim]  # a row of the replay, as `step_envs` writes it
        eval_envs = build_envs(args.env, args.eval_episodes, args.seed) if args.eval_episodes else None
        if eval_envs:
            stack.callback(eval_envs.close)
        references = reference_scores(args.env)
        agent = Agent(obs_dim, action_dim, args)
        if saved:
            load_weights(agent, saved)
        if args.alpha != "auto":  # also where a checkpoint has another
            nn.init.constant_(agent.log_alpha, math.log(args.alpha))
        agent.to(device)
        results = {"args": dataclasses.asdict(args), "versions": versions(), "hardware": hardware()}
        if args.resume:
            folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        else:
            name = args.run_name or f"{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}"
            folder = run_folder(args.output_dir, name)
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        videos = folder / "videos" if args.capture_video else None
        if args.evaluate:
            final = evaluate(agent, eval_envs, device, references, videos)
            write_results(folder / "results.json", {"final": final} | results)
            print(f"evaluated {args.checkpoint}: {score(final):.1f} ({folder / 'results.json'})")
            if args.collect:
                rows = collect(agent, args, widths, device)
                write_dataset(args.save_dataset, rows, args.collect, widths, args.env, args.append)
            return

        if args.track:
            import wandb  # an optional package

            wandb.init(project="vla-rl", name=folder.name, config=results["args"], sync_tensorboard=True)
        # What a killed run logged after its last checkpoint is logged again.
        writer = SummaryWriter(folder, purge_step=saved["counters"][0] + 1 if args.resume else None)
        stack.callback(writer.close)
        critic_parameters = list(agent.critic.parameters())
        target_parameters = list(agent.target_critic.parameters())
        tuned = [agent.log_alpha] if args.alpha == "auto" else []
        groups = [{"params": agent.actor.parameters()}, {"params": tuned, "lr": args.critic_learning_rate}]
        actor_optimizer = torch.optim.Adam(groups, lr=args.learning_rate, fused=True)
        critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.critic_learning_rate, fused=True)
        optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
        sampler = torch.Generator(device).manual_seed(args.seed)
        T, N = args.buffer_size // args.num_envs, args.num_envs
        replay = torch.empty(T, N, sum(widths), device=device)  # a ring, used as far as it is filled

        def update(rows, noise):
            """Algorithm 1 of arXiv:1812.05905: rows (B, W), noise (2, B, A) -> metrics."""
            obs, action, reward, terminated, _, next_obs = rows.split(widths, -1)
            alpha = agent.log_alpha.detach().exp()
            with torch.no_grad():
                next_action, next_log_prob = squashed_gaussian(*agent.policy(next_obs), noise[0])
                next_value = agent.target_critic(next_obs, next_action).amin(0) - alpha * next_log_prob
                target = td_target(reward[:, 0], terminated[:, 0], next_value, args.gamma)
            q = agent.critic(obs, action)
            loss_critic = critic_loss(q, target)
            minimize(loss_critic, critic_optimizer)

            action, log_prob = squashed_gaussian(*agent.policy(obs), noise[1])
            loss_policy = policy_loss(log_prob, agent.critic(obs, action), alpha)
            loss_alpha = temperature_loss(agent.log_alpha, log_prob, -action_dim)
            minimize(loss_policy + loss_alpha, actor_optimizer)

            with torch.no_grad():
                torch._foreach_lerp_(target_parameters, critic_parameters, args.tau)
            metrics = {"loss/critic": loss_critic, "loss/policy": loss_policy, "loss/alpha": loss_alpha}
            metrics |= {"policy/entropy": -log_prob, "policy/alpha": alpha, "value/q": q}
            return {name: x.detach() for name, x in metrics.items()}

        step, gradient_steps, seconds = 0, 0, 0.0
        initial, best, recent = None, None, []
        if args.resume:
            for name, state in saved["optimizers"].items():
                optimizers[name].load_state_dict(state)
            step, gradient_steps, seconds = saved["counters"]
            initial, best, recent = saved["initial"], saved["best"], saved["recent"]
            replay[: len(saved["replay"])] = saved["replay"].to(device)
            obs = envs.set_state(saved["envs"])["proprio"]
            # tells whose episode could not be restored, and was cut
            info = envs.step(np.zeros((N, 1, action_dim), np.float32), mask=np.zeros(N, bool))[-1]
            replay[(step // N - 1) % T, info["lost"], -obs_dim - 1] = 1
            set_rng_state(saved["rng"], {"sampler": sampler}, {})
        else:
            obs = envs.reset()["proprio"]
        saved = None  # it holds a replay as well
        if args.compile:
            update = compile_update(update, agent, optimizers.values())
        start = clock() - seconds

        def save(name):
            state = dict(args=dataclasses.asdict(args), agent=agent.state_dict())
            if name == "checkpoint.pt":  # with all that the run needs to go on
                state |= dict(
                    counters=[step, gradient_steps, clock() - start], initial=initial, best=best,
                    optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                    rng=rng_state({"sampler": sampler}, {}), envs=envs.get_state(), recent=recent,
                    replay=replay[: min(step // N, T)].clone(),  # a view would be saved with all of the ring
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
            return freq and (step % freq < N or step >= args.total_timesteps)

        stop = []  # a signal asks for a checkpoint and an orderly end; a second one ends at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

        if initial is None:
            initial = run_evaluation(videos)  # what a video lacks shows now
            save("checkpoint.pt")
        row = np.empty((N, sum(widths)), np.float32)
        metrics, tick, tick_steps, stopping = {}, clock(), (step, gradient_steps), bool(stop)
        bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None, smoothing=0.1)
        while step < args.total_timesteps and not stopping:
            # --- act and store
            if step < args.learning_starts:
                action = torch.rand(N, action_dim, generator=sampler, device=device) * 2 - 1
            else:
                with torch.no_grad():
                    noise = torch.randn(N, action_dim, generator=sampler, device=device)
                    action = squashed_gaussian(*agent.policy(torch.as_tensor(obs, device=device)), noise)[0]
            action = action.cpu().numpy()
            if not np.isfinite(action).all():
                raise FloatingPointError(
                    f"step {step}: the policy's action is not finite; {folder / 'checkpoint.pt'} is the last "
                    "good state."
                )
            obs, info, ended = step_envs(envs, obs, action, row)
            replay[step // N % T] = torch.from_numpy(row).to(device)
            step += N
            for n in np.flatnonzero(ended):
                recent = [*recent, [float(info["episode_return"][n]), int(info["episode_length"][n])]][-100:]

            # --- update
            filled = min(step // N, T) * N
            while gradient_steps < (step - args.learning_starts) * args.utd_ratio:
                index = torch.randint(filled, (args.batch_size,), generator=sampler, device=device)
                rows = replay.view(T * N, -1).index_select(0, index)
                noise = torch.randn(2, args.batch_size, action_dim, generator=sampler, device=device)
                metrics = update(rows, noise)
                gradient_steps += 1

            # --- log, evaluate, save
            evaluation_due = due(args.eval_freq) and step < args.total_timesteps
            stopping = bool(stop)  # a signal from here on waits for the next step
            if not (due(LOG_FREQ) or due(args.save_freq) or evaluation_due or stopping):
                continue
            scalars = {name: x.mean().item() for name, x in metrics.items()}
            if not np.isfinite(list(scalars.values())).all():
                ranges = [f"{x.min().item():.3g} to {x.max().item():.3g}" for x in rows.split(widths, -1)]
                raise FloatingPointError(
                    f"step {step}: a loss is not finite ({scalars}; the last batch was in {ranges}); "
                    f"{folder / 'checkpoint.pt'} is the last good state."
                )
            scalars["time/env_steps_per_second"] = (step - tick_steps[0]) / (clock() - tick)
            scalars["time/updates_per_second"] = (gradient_steps - tick_steps[1]) / (clock() - tick)
            if device.type == "cuda":
                scalars["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if recent:
                mean_reward, mean_length = np.mean(recent, 0)
                scalars |= {"rollout/mean_reward": mean_reward, "rollout/mean_length": mean_length}
                bar.set_postfix_str(f"return {mean_reward:.1f}")
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            bar.update(step - bar.n)
            if evaluation_due:
                found = score(run_evaluation())
                tqdm.write(f"{step} steps, {clock() - start:.0f} s: eval {found:.1f}")
            if due(args.save_freq) or stopping:
                save("checkpoint.pt")
            tick, tick_steps = clock(), (step, gradient_steps)

        bar.close()
        if stopping and step < args.total_timesteps:
            print(f"stopped at {step} steps; go on with: python {SCRIPT}.py --resume {folder}")
            sys.exit(128 + stop[0])
        final = run_evaluation(videos)
        save("checkpoint.pt")
        numbers = dict(environment_steps=step, gradient_steps=gradient_steps, wall_seconds=clock() - start)
        write_results(
            folder / "results.json", dict(initial=initial, final=final, best=best) | numbers | results
        )
        minutes = (clock() - start) / 60
        print(f"return {score(initial):.1f} -> {score(final):.1f} in {minutes:.1f} minutes ({folder})")
        if args.save_dataset and args.collect:
            rows = collect(agent, args, widths, device)
            write_dataset(args.save_dataset, rows, args.collect, widths, args.env, args.append)
        elif args.save_dataset:
            first = step // N % T if step // N > T else 0  # the oldest row of the ring
            rows = replay[: min(step // N, T)].roll(-first, 0).cpu()
            write_dataset(args.save_dataset, rows, len(rows) * N, widths, args.env, args.append)


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
