"""Decision Transformer, in one file.

    python decision_transformer.py --dataset hopper-medium-v2
    python decision_transformer.py --dataset hopper-medium-v2 --target-returns 3600 1800 --eval-episodes 100

Chen et al. 2021 (arXiv:2106.01345): a GPT-2 over (return-to-go, observation, action) tokens, trained to give
the data's next action. Acting, it is told the return that it shall reach: all --target-returns are evaluated
at once, and as in the literature the score is that of the best of them; results.json has each.
Initialisation is as in CORL (all weights small), so that time steps which no data have do no harm. In a file
without next_observations an episode that a time-out ends lacks its last step, and the returns that reward.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from common.datasets import unit_actions
from common.evaluation import evaluation_world, run_episodes, score, summarize
from common.features import offline_dataset
from common.flags import FIXED, Layers, NonNegative, NonNegativeInt, Positive, PositiveInt, Share
from common.optim import compile_update, load_optimizer, minimize
from common.run import OfflineArgs, main


@dataclass
class Args(OfflineArgs):
    total_timesteps: PositiveInt = 100_000
    """updates to train for"""
    batch_size: PositiveInt = 64
    """pieces of episodes per update"""
    context_length: Annotated[PositiveInt, FIXED] = 20
    """time steps that the policy sees, of three tokens each"""
    n_layer: Annotated[PositiveInt, FIXED, Layers("embed_dim")] = 3
    """blocks of the transformer"""
    n_head: Annotated[PositiveInt, FIXED] = 1
    """heads of an attention"""
    embed_dim: Annotated[PositiveInt, FIXED] = 128
    """width of a token"""
    dropout: Share = 0.1
    """of embeddings, attention and residuals"""
    learning_rate: NonNegative = 1e-4
    """AdamW, after the warm-up"""
    weight_decay: NonNegative = 1e-4
    """AdamW, of all weights"""
    warmup_steps: PositiveInt = 10_000
    """updates in which the learning rate rises from 0"""
    max_grad_norm: Positive = 0.25
    """the gradient's norm is clipped to this"""
    max_timesteps: Annotated[PositiveInt, FIXED] = 1000
    """time steps of an episode with an embedding of their own; later ones share the last"""
    return_scale: Annotated[Positive, FIXED] = 1000.0
    """returns-to-go are divided by this"""
    target_returns: tuple[float, ...] | None = None
    """returns to ask for in evaluations; default the preset's, or the best of the data"""
    eval_episodes: NonNegativeInt = 10
    """episodes of each target return, with seeds of their own; 0 for no evaluation"""
    eval_freq: NonNegativeInt = 10_000
    """updates between evaluations; 0 for the first and the last only"""
    eval_envs: ClassVar[int] = 2**63  # each episode has an environment of its own
    save_freq: PositiveInt = 10_000
    """updates between checkpoints"""
    bf16: bool = False
    """matrix products in bfloat16"""

    def check(self):
        if self.embed_dim % self.n_head:
            raise UserError(f"--embed-dim {self.embed_dim} must be a multiple of --n-head {self.n_head}.")


PRESETS = {  # by a word of the data set's name
    "hopper": dict(target_returns=(3600.0, 1800.0)),
    "halfcheetah": dict(target_returns=(12000.0, 6000.0)),
    "walker2d": dict(target_returns=(5000.0, 2500.0)),
    "antmaze": dict(target_returns=(1.0, 0.5), return_scale=1.0),
}
LOG_FREQ = 500  # updates between two points of the log


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


# --- evaluation


class Prompted(nn.Module):
    """What an evaluation asks (see common/evaluation.py): the agent, told in each environment which return
    its episode shall reach, with the last --context-length steps of all of them."""

    def __init__(self, agent, wanted, args, device):
        super().__init__()
        self.agent, self.wanted, self.args, self.device, self.step = agent, wanted, args, device, 0
        width = 1 + len(agent.obs_mean) + agent.head.out_features
        self.context = torch.empty(len(wanted), 0, width, device=device)  # return-to-go, obs, action

    def act(self, obs, turn):
        """-> actions (B, 1, A). All episodes are at the same step: each environment plays one."""
        agent, rows = self.agent, torch.as_tensor(turn["rows"], device=self.device)
        left = (self.wanted[turn["rows"]] - turn["returns"]) / self.args.return_scale
        blank = np.zeros((len(left), agent.head.out_features), np.float32)
        row = np.c_[left, obs["proprio"], blank].astype(np.float32)
        new = torch.zeros(len(self.wanted), 1, row.shape[1], device=self.device)
        new[rows, 0] = torch.as_tensor(row, device=self.device)
        self.context = torch.cat([self.context, new], 1)[:, -self.args.context_length :]
        returns, seen, action = self.context[rows].split([1, len(agent.obs_mean), blank.shape[1]], -1)
        seen = (seen - agent.obs_mean) / agent.obs_std
        length = self.context.shape[1]
        timestep = torch.arange(self.step + 1 - length, self.step + 1, device=self.device)
        action = agent(returns[..., 0], seen, action, timestep.expand(len(rows), -1), last=True)[:, 0]
        self.context[rows, -1, -action.shape[1] :] = action
        self.step += 1
        return action[:, None].cpu().numpy(), None


def evaluate_targets(agent, envs, args, run, references, targets, videos=False):
    """`--eval-episodes` episodes for each of the target returns, with seeds 0, 1, 2, ... -> the evaluation's
    dict of the best target, and `per_target` of all."""
    if envs is None:
        return {"episodes": 0}
    seeds = np.tile(np.arange(args.eval_episodes), len(targets))
    prompted = Prompted(agent, np.repeat(targets, args.eval_episodes), args, run.device)
    outcomes = run_episodes(prompted, envs, seeds, video_folder=run.videos if videos else None)
    per_target = {}
    for i, target in enumerate(targets):
        rows = outcomes[i * args.eval_episodes : (i + 1) * args.eval_episodes]
        found = summarize(rows, envs.has_success, (), references)
        per_target[f"{target:.12g}"] = found | {"target_return": target}
    return max(per_target.values(), key=score) | {"per_target": per_target}


# --- data


def episode_tensors(dataset, bounds, args, device):
    """The data set on the device: states (N + F, S), rest (N, A + 1): action, scaled return-to-go, starts (E
    + 1,) of the episodes, and N."""
    starts = torch.from_numpy(dataset.episode_starts)
    returns = returns_to_go(torch.from_numpy(dataset.rewards), starts) / args.return_scale
    rest = np.c_[unit_actions(dataset, bounds), returns].astype(np.float32)
    starts = torch.cat([starts, torch.tensor([len(rest)])])
    return torch.from_numpy(dataset.states).to(device), torch.from_numpy(rest).to(device), starts.to(device)


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


def train(args, run):
    """Sample pieces of episodes, update, repeat (arXiv:2106.01345, algorithm 1)."""
    dataset, device = offline_dataset(args, run), run.device
    returns = np.add.reduceat(dataset.rewards, dataset.episode_starts, dtype=np.float64)
    targets = args.target_returns or (float(returns.max()),)
    episodes = args.eval_episodes * len(targets)
    eval_envs, bounds, references = evaluation_world(args, dataset, run, episodes)
    agent = Agent(dataset.states.shape[1], dataset.actions.shape[1], args)
    run.load(agent)
    if args.evaluate:
        run.open()
        return run.evaluated(evaluate_targets(agent, eval_envs, args, run, references, targets, True))

    states, rest, starts = episode_tensors(dataset, bounds, args, device)
    if not run.saved:
        agent.obs_mean[:] = states[: len(rest)].mean(0)
        agent.obs_std[:] = states[: len(rest)].std(0, correction=0) + 1e-6
    states.sub_(agent.obs_mean).div_(agent.obs_std)  # in place: also the data set's array on the CPU
    del dataset
    run.open()
    optimizer = torch.optim.AdamW(
        agent.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    rate = torch.zeros((), device=device)  # the learning rate, which changes without recompiling
    optimizers, sampler = {"actor": optimizer}, run.generator("sampler", device)

    def update(obs, action, returns, timestep, mask):
        """One step of supervised learning -> metrics."""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            predicted = agent(returns, obs, action, timestep)
        loss = action_loss(predicted, action, mask)
        norm = minimize(loss, optimizer, args.max_grad_norm)
        metrics = {"loss/policy": loss, "optim/grad_norm": norm}
        return {name: x.detach() for name, x in metrics.items()}

    step = 0
    if saved := run.restore():
        for name in optimizers:
            load_optimizer(optimizers[name], saved["optimizers"][name])
        step = saved["step"]
    if args.compile:
        update = compile_update(update, agent, optimizers.values())

    def save(name):
        """`best.pt` holds the weights, `checkpoint.pt` all that the run needs to go on."""
        state, own = {"agent": agent.state_dict()}, None
        if name == "checkpoint.pt":
            moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            state, own = state | dict(optimizers=moments, step=step), {}
        run.save(name, state, own)

    def evaluate_now(videos=False):
        found = evaluate_targets(agent, eval_envs, args, run, references, targets, videos)
        per_target = found.get("per_target", {}).items()
        run.write({f"eval/mean_reward_of_{target}": each["mean_reward"] for target, each in per_target}, step)
        if run.record(found, step):
            save("best.pt")

    run.begin(step, args.total_timesteps, "update")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    while step < args.total_timesteps and not run.signalled:
        batch = sample_batch(states, rest, starts, args.batch_size, args.context_length, sampler)
        step += 1
        warmup = min(1.0, step / args.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate.fill_(args.learning_rate * warmup)
        metrics = update(*batch)
        run.advance(step)

        # --- log, evaluate, save
        if run.due(step, LOG_FREQ, args.eval_freq, args.save_freq) or step == args.total_timesteps:
            metrics = {name: x.mean() for name, x in metrics.items()}
            run.check_finite(metrics, f"update {step}", batch=torch.cat([x.flatten() for x in batch]))
            run.log(metrics, step)
        if run.due(step, args.eval_freq) and step < args.total_timesteps:
            evaluate_now()
        if run.due(step, args.save_freq):
            save("checkpoint.pt")

    if step < args.total_timesteps:
        save("checkpoint.pt")
        run.stopped(step)
    evaluate_now(videos=True)
    save("checkpoint.pt")
    run.finish(environment_steps=0, gradient_steps=step)


if __name__ == "__main__":
    main(train, Args, PRESETS)
