"""TD3+BC, in one file.

    python td3_bc.py --dataset hopper-medium-v2
    python td3_bc.py --dataset hopper-medium-v2 --alpha 0 --policy-delay 1       # plain behaviour cloning

Fujimoto and Gu 2021 (arXiv:2106.06860): TD3 whose policy also imitates the data. Its loss is
-lambda Q1(s, pi(s)) + |pi(s) - a|^2 with lambda = alpha / mean |Q1|, so that alpha is the one thing to tune.
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
    learning_rate: float = 3e-4
    """Adam, policy"""
    critic_learning_rate: float = 3e-4
    """Adam, critics"""
    gamma: float = 0.99
    """discount per step"""
    tau: float = 0.005
    """the targets move by this share of the way at each of their updates"""
    alpha: float = 2.5
    """weight of Q against imitation; 0 is behaviour cloning"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policy's action"""
    noise_clip: float = 0.5
    """the noise is clipped to this"""
    policy_delay: int = 2
    """updates of the critics per update of the policy and of the targets"""
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
    depth: int = 2
    """hidden layers"""


PRESETS = {"antmaze": dict(reward_bias=-1.0, eval_episodes=100, eval_freq=100_000)}  # by a word of the name
SCRIPT, LOG_FREQ = Path(__file__).stem, 500


# --- the mathematics: pure functions on tensors


def smoothed_action(action, noise, noise_std, noise_clip):
    """Target policy smoothing (arXiv:1802.09477, section 5.3): clip(a + clip(noise_std * noise, -c, c)),
    actions in [-1, 1]."""
    return (action + (noise_std * noise).clamp(-noise_clip, noise_clip)).clamp(-1, 1)


def td_target(rewards, terminations, next_values, gamma):
    """r + gamma (1 - terminated) V(s'), each (B,). A time-out is bootstrapped like any other step."""
    return rewards + gamma * (1 - terminations) * next_values


def critic_loss(q, target):
    """Sum over the critics of the mean squared error: q (2, B), target (B,) -> ()."""
    return (q - target).square().mean(-1).sum()


def policy_loss(q, policy_action, action, alpha):
    """-lambda E[Q1(s, pi(s))] + E[(pi(s) - a)^2], lambda = alpha / E|Q1(s, pi(s))| without gradient (arXiv:
    2106.06860, eq. 5): Q1 (B,), actions (B, A) -> (), the imitation's part ()."""
    imitation = (policy_action - action).square().mean()
    return imitation - alpha / q.abs().mean().detach() * q.mean(), imitation


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

    def q1(self, obs, action):
        """Q1 alone: (B,)"""
        x = torch.cat([obs, action], -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for w, b in hidden:
                x = torch.addmm(b[0], x, w[0]).relu_()  # (B, width)
        return (x * weight[0].T).sum(-1) + bias[0, :, 0]


def mlp(inputs, outputs, width, depth):
    sizes = [inputs, *[width] * depth]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    hidden = [layer for m, n in pairs for layer in (nn.Linear(m, n), nn.ReLU(inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class Agent(nn.Module):
    """Deterministic policy, critics and their targets. Actions are in [-1, 1], observations normalised by
    `obs_mean` and `obs_std` everywhere but in `act`."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.actor = mlp(obs_dim, action_dim, args.width, args.depth)
        self.critic = TwinCritic(obs_dim, action_dim, args.width, args.depth, args.bf16)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, obs):
        """The action of an evaluation, from the environment's own observations: (B, S) -> (B, A)."""
        return self.actor((obs - self.obs_mean) / self.obs_std).tanh()


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
        positive="save_freq total_timesteps batch_size policy_delay width depth",
        nonnegative="eval_episodes eval_freq learning_rate critic_learning_rate reward_scale alpha "
        "policy_noise noise_clip",
        share="gamma tau",
    )
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
        actor_parameters, critic_parameters = list(agent.actor.parameters()), list(agent.critic.parameters())
        targets = [*agent.target_actor.parameters(), *agent.target_critic.parameters()]
        actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
        critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.critic_learning_rate, fused=True)
        optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
        sampler = torch.Generator(device).manual_seed(args.seed)

        def update(obs, action, reward, next_obs, termination, noise, delayed):
            """Algorithm 1 of arXiv:1802.09477 with the policy's loss of TD3+BC; noise (B, A) -> metrics."""
            with torch.no_grad():
                next_action = agent.target_actor(next_obs).tanh()
                next_action = smoothed_action(next_action, noise, args.policy_noise, args.noise_clip)
                next_value = agent.target_critic(next_obs, next_action).amin(0)
                target = td_target(reward, termination, next_value, args.gamma)
            q = agent.critic(obs, action)
            loss_critic = critic_loss(q, target)
            minimize(loss_critic, critic_optimizer)

            metrics = {"loss/critic": loss_critic, "value/q": q, "value/target": target}
            if delayed:
                policy_action = agent.actor(obs).tanh()
                policy_q = agent.critic.q1(obs, policy_action)
                loss_policy, loss_bc = policy_loss(policy_q, policy_action, action, args.alpha)
                minimize(loss_policy, actor_optimizer)
                with torch.no_grad():
                    torch._foreach_lerp_(targets, [*actor_parameters, *critic_parameters], args.tau)
                metrics |= {"loss/policy": loss_policy, "loss/bc": loss_bc}
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
            noise = torch.randn(args.batch_size, action_dim, generator=sampler, device=device)
            metrics = update(*batch, noise, step % args.policy_delay == 0)
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
