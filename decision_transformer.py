"""Decision Transformer, in one file.

    python decision_transformer.py --dataset hopper-medium-v2
    python decision_transformer.py --dataset hopper-medium-v2 --target-returns 3600 1800 --eval-episodes 100

Chen et al. 2021 (arXiv:2106.01345): a GPT-2 over (return-to-go, observation, action) tokens, trained to give
the data's next action. Acting, it is told the return that it shall reach: all --target-returns are evaluated
at once, and as in the literature the score is that of the best of them; results.json has each.
Initialisation is as in CORL (all weights small), so that time steps which no data have do no harm. In a file
without next_observations an episode that a time-out ends lacks its last step, and the returns that reward.
"""

import contextlib
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
    """matrix products in bfloat16"""
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
    """episodes of each target return, with seeds of their own; 0 for no evaluation"""
    eval_freq: int = 10_000
    """updates between evaluations; 0 for the first and the last only"""
    save_freq: int = 10_000
    """updates between checkpoints"""

    # --- algorithm
    total_timesteps: int = 100_000
    """updates to train for"""
    batch_size: int = 64
    """pieces of episodes per update"""
    context_length: int = 20
    """time steps that the policy sees, of three tokens each"""
    n_layer: int = 3
    """blocks of the transformer"""
    n_head: int = 1
    """heads of an attention"""
    embed_dim: int = 128
    """width of a token"""
    dropout: float = 0.1
    """of embeddings, attention and residuals"""
    learning_rate: float = 1e-4
    """AdamW, after the warm-up"""
    weight_decay: float = 1e-4
    """AdamW, of all weights"""
    warmup_steps: int = 10_000
    """updates in which the learning rate rises from 0"""
    max_grad_norm: float = 0.25
    """the gradient's norm is clipped to this"""
    max_timesteps: int = 1000
    """time steps of an episode with an embedding of their own; later ones share the last"""
    return_scale: float = 1000.0
    """returns-to-go are divided by this"""
    target_returns: tuple[float, ...] | None = None
    """returns to ask for in evaluations; default the preset's, or the best of the data"""


PRESETS = {  # by a word of the data set's name
    "hopper": dict(target_returns=(3600.0, 1800.0)),
    "halfcheetah": dict(target_returns=(12000.0, 6000.0)),
    "walker2d": dict(target_returns=(5000.0, 2500.0)),
    "antmaze": dict(target_returns=(1.0, 0.5), return_scale=1.0),
}
SCRIPT, LOG_FREQ = Path(__file__).stem, 500


# --- the mathematics: pure functions on tensors


def returns_to_go(rewards, episode_starts):
    """Sum of rewards from each step to its episode's end, undiscounted: (N,), (E,) -> (N,) float64."""
    total = rewards.double().cumsum(0)
    lengths = torch.cat([episode_starts, episode_starts.new_tensor([len(rewards)])]).diff()
    at_end = total[episode_starts + lengths - 1].repeat_interleave(lengths)
    return at_end - total + rewards


def action_loss(predicted, action, mask):
    """Mean squared error over steps that are no padding: (B, K, A) twice, mask (B, K) of 0 and 1 -> ()."""
    return ((predicted - action).square().mean(-1) * mask).sum() / mask.sum()


def dropout(x, p):
    """F.dropout; on a CPU with p in steps of 1/256, since a byte of noise an element is 3 times as fast."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.dropout(x, p)
    noise = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    level = min(round(256 * p), 255)
    return x * ((noise[: x.numel()].view(x.shape) >= level) * (256 / (256 - level)))


# --- networks


class Block(nn.Module):
    """GPT-2's block: attention to the past and a two-layer network, each normalised before."""

    def __init__(self, dim, heads, p):
        super().__init__()
        self.heads, self.p = heads, p
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.merge = nn.Linear(dim, dim)
        self.expand, self.shrink = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, at=slice(None), visible=None):
        """x (B, L, D) -> the outputs of the tokens `at`, L' of them: (B, L', D). Each sees itself and those
        before it, which `visible` bool (L', L) says if `at` leaves some out."""
        p = self.p if self.training else 0.0
        y = self.norm_1(x)
        x = x[:, at]
        q, k, v = self.query(y[:, at]), *self.key_value(y).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))  # (B, H, L, D/H)
        y = F.scaled_dot_product_attention(q, k, v, visible, p, is_causal=visible is None)
        y = self.merge(y.transpose(1, 2).flatten(2))
        x = x + (dropout(y, p) if p else y)
        y = self.shrink(self.expand(self.norm_2(x)).relu_())
        return x + (dropout(y, p) if p else y)


class Agent(nn.Module):
    """Actions are in [-1, 1], observations normalised by `obs_mean` and `obs_std` everywhere but in `act`,
    returns-to-go divided by the return scale."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.p, dim = args.dropout, args.embed_dim
        self.embed_return, self.embed_obs = nn.Linear(1, dim), nn.Linear(obs_dim, dim)
        self.embed_action, self.embed_time = nn.Linear(action_dim, dim), nn.Embedding(args.max_timesteps, dim)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, args.n_head, self.p) for _ in range(args.n_layer))
        self.head = nn.Linear(dim, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, returns, obs, action, timestep, last=False):
        """Returns-to-go (B, K), obs (B, K, S), action (B, K, A), time steps (B, K) -> actions (B, K, A), each
        from its observation's token, or of the `last` step alone (B, 1, A). The last action is not read.
        Padding belongs at the end, where causality hides it from all that counts."""
        tokens = [self.embed_return(returns[..., None]), self.embed_obs(obs), self.embed_action(action)]
        time = self.embed_time(timestep.clamp(max=self.embed_time.num_embeddings - 1))
        x = self.norm_in((torch.stack(tokens, 2) + time[:, :, None]).flatten(1, 2)[:, :-1])  # (B, 3K - 1, D)
        x = dropout(x, self.p) if self.training else x
        for block in self.blocks[:-1]:
            x = block(x)
        at = slice(-1, None) if last else slice(1, None, 3)  # what nobody looks at is not computed
        order = torch.arange(x.shape[1], device=x.device)
        x = self.blocks[-1](x, at, order[at, None] >= order)
        return self.head(self.norm_out(x)).tanh()

    def act(self, context, step):
        """The action of an evaluation: context (B, K, 1 + S + A), the return-to-go, the environment's own
        observation and the action of the last K steps up to `step` -> (B, A)."""
        returns, obs, action = context.split([1, len(self.obs_mean), self.head.out_features], -1)
        obs = (obs - self.obs_mean) / self.obs_std
        timestep = torch.arange(step + 1 - context.shape[1], step + 1, device=context.device)
        return self(returns[..., 0], obs, action, timestep.expand(len(context), -1), last=True)[:, 0]


# --- evaluation


@torch.no_grad()
def evaluate(agent, envs, device, references, targets, args, video_folder=None):
    """One episode of each of `envs`, as many for each of the `targets`, with seeds 0, 1, 2, ... -> the
    evaluation's dict of the run folder's contract, of the best target, and `per_target` of all.
    `references` are the returns of D4RL's normalised score, 0 and 100, or None."""
    if envs is None:
        return {"episodes": 0}
    agent.eval()
    running = np.ones(envs.num_envs, bool)
    record = np.arange(envs.num_envs) < (3 if video_folder else 0)
    frames = {i: [] for i in np.flatnonzero(record)}
    actions = np.zeros((envs.num_envs, 1, *envs.single_action_space.shape), np.float32)
    episodes = envs.num_envs // len(targets)
    obs = envs.reset(np.tile(np.arange(episodes), len(targets)))["proprio"]
    wanted, step = np.repeat(targets, episodes), 0
    width = 1 + obs.shape[1] + actions.shape[2]
    context = torch.empty(envs.num_envs, 0, width, device=device)  # the last steps, as `act` takes them
    while running.any():
        row = np.c_[wanted / args.return_scale, obs, np.zeros_like(actions[:, 0])].astype(np.float32)
        row = torch.as_tensor(row, device=device)[:, None]
        context = torch.cat([context, row], 1)[:, -args.context_length :]
        actions[running, 0] = agent.act(context[torch.as_tensor(running)], step).cpu().numpy()
        context[:, -1, -actions.shape[-1] :] = torch.as_tensor(actions[:, 0], device=device)
        obs, _, terminated, truncated, info = envs.step(actions, mask=running, record=record & running)
        obs = obs["proprio"]
        wanted = np.repeat(targets, episodes) - info["episode_return"]
        step += 1
        for i, shots in info["frames"].items():
            text = f"step {info['episode_length'][i]}   return {info['episode_return'][i]:.1f}"
            frames[i] += [annotate(shot, [text]) for shot in shots]
        running &= ~(terminated | truncated)
    for i, pictures in frames.items():
        write_video(Path(video_folder) / f"episode_{i}.mp4", pictures, fps=30)
    agent.train()
    per_target = {}
    for i, target in enumerate(targets):
        rows = slice(i * episodes, (i + 1) * episodes)
        mean_reward, mean_length = (
            float(info[f"episode_{key}"][rows].mean()) for key in ("return", "length")
        )
        result = {"episodes": episodes, "mean_reward": mean_reward, "mean_length": mean_length}
        if references:
            result["normalized_score"] = 100 * (mean_reward - references[0]) / (references[1] - references[0])
        per_target[f"{target:.12g}"] = result | {"target_return": target}
    return max(per_target.values(), key=score) | {"per_target": per_target}


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
        positive="save_freq total_timesteps batch_size context_length n_layer n_head embed_dim warmup_steps "
        "max_grad_norm max_timesteps return_scale",
        nonnegative="eval_episodes eval_freq learning_rate weight_decay",
        share="dropout",
    )
    if args.embed_dim % args.n_head:
        raise UserError(f"--embed-dim {args.embed_dim} must be a multiple of --n-head {args.n_head}.")
    if not np.isfinite(args.target_returns or 0.0).all():
        raise UserError(f"--target-returns must be finite, but are {args.target_returns}.")
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
    """The data set for the updates: actions in [-1, 1] of the environment's `bounds` (low, high). -> states
    (N + F, S), rest (N, A + 1): action, scaled return-to-go, starts (E + 1,) of the episodes, and N."""
    actions = dataset.actions
    if bounds:
        actions = 2 * (actions - bounds[0]) / (bounds[1] - bounds[0]) - 1
    elif np.abs(actions).max() > 1.001:  # 0.001 for what recorders round
        raise UserError(f"{dataset.name} has actions outside [-1, 1]; give --env, which says what they mean.")
    actions = np.clip(actions, -1, 1)  # as the environment did
    starts = torch.from_numpy(dataset.episode_starts)
    returns = returns_to_go(torch.from_numpy(dataset.rewards), starts) / args.return_scale
    rest = np.c_[actions, returns].astype(np.float32)
    starts = torch.cat([starts, torch.tensor([len(rest)])])
    return torch.from_numpy(dataset.states), torch.from_numpy(rest), starts


def sample_batch(states, rest, starts, size, context, generator):
    """`size` pieces of episodes of `context` steps: obs (B, K, S), action (B, K, A), return-to-go, time step
    and mask (B, K). All steps are equally likely as the first, and so episodes in proportion to their
    lengths. What is beyond the end repeats the last step and has mask 0."""
    first = torch.randint(len(rest), (size,), generator=generator, device=rest.device)
    episode = torch.searchsorted(starts, first, right=True)  # it ends before starts[episode]
    row = first[:, None] + torch.arange(context, device=rest.device)  # (B, K)
    last = starts[episode, None] - 1
    mask, row = (row <= last).float(), row.minimum(last)
    obs, action_return = (x.index_select(0, row.view(-1)).view(size, context, -1) for x in (states, rest))
    timestep = row - starts[episode - 1, None]
    return obs, action_return[..., :-1], action_return[..., -1], timestep, mask


# --- training


def train(args):
    """One process, top to bottom: sample pieces of episodes, update, repeat."""
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        device = choose_device(args.device)
        keep_freed_memory()
        torch.manual_seed(args.seed)
        source = args.resume or args.checkpoint
        saved = load_checkpoint(source, scripts=(SCRIPT,)) if source else None
        dataset = load_dataset(args.dataset)
        (_, action_dim), obs_dim = dataset.actions.shape, dataset.states.shape[1]
        returns = np.add.reduceat(dataset.rewards, dataset.episode_starts, dtype=np.float64)
        targets = args.target_returns or (float(returns.max()),)
        env_id, eval_envs, bounds = args.env or dataset.env_id, None, None
        if args.eval_episodes and env_id is None:
            raise UserError(f"{dataset.name} names no environment; give --env, or --eval-episodes 0.")
        if env_id:  # it says what the actions mean, also to a run without evaluations
            envs = build_envs(env_id, max(1, args.eval_episodes * len(targets)), args.seed)
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
        states, rest, starts = (x.to(device) for x in prepare_data(dataset, args, bounds))
        if saved:
            load_weights(agent, saved)
        agent.to(device)
        if not saved:
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
            final = evaluate(agent, eval_envs, device, references, targets, args, videos)
            write_results(folder / "results.json", {"final": final} | results)
            print(f"evaluated {args.checkpoint}: {score(final):.1f} ({folder / 'results.json'})")
            return

        if args.track:
            import wandb  # an optional package

            wandb.init(project="vla-rl", name=folder.name, config=results["args"], sync_tensorboard=True)
        # What a killed run logged after its last checkpoint is logged again.
        writer = SummaryWriter(folder, purge_step=saved["counters"][0] + 1 if args.resume else None)
        stack.callback(writer.close)
        decay = args.weight_decay
        optimizer = torch.optim.AdamW(
            agent.parameters(), lr=args.learning_rate, weight_decay=decay, fused=True
        )
        rate = torch.zeros((), device=device)  # the learning rate, which changes without recompiling
        optimizers = {"actor": optimizer}
        sampler = torch.Generator(device).manual_seed(args.seed)

        def update(obs, action, returns, timestep, mask):
            """One step of supervised learning -> metrics."""
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                predicted = agent(returns, obs, action, timestep)
            loss = action_loss(predicted, action, mask)
            norm = minimize(loss, optimizer, args.max_grad_norm)
            metrics = {"loss/policy": loss, "optim/grad_norm": norm}
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
            found = evaluate(agent, eval_envs, device, references, targets, args, videos)
            for key in found.keys() - {"episodes", "per_target"}:
                writer.add_scalar(f"eval/{key}", found[key], step)
            for target, each in found.get("per_target", {}).items():
                writer.add_scalar(f"eval/mean_reward_of_{target}", each["mean_reward"], step)
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
            batch = sample_batch(states, rest, starts, args.batch_size, args.context_length, sampler)
            step += 1
            warmup = min(1.0, step / args.warmup_steps)
            optimizer.param_groups[0]["lr"] = rate.fill_(args.learning_rate * warmup)
            metrics = update(*batch)
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
