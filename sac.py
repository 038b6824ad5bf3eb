"""Soft actor-critic, in one file.

    python sac.py --env HalfCheetah-v5
    python sac.py --env Hopper-v5 --total-timesteps 300000 --run-name hopper --save-dataset replay.hdf5
    python sac.py --env Hopper-v5 --evaluate --checkpoint runs/hopper --collect 200000 --save-dataset med.hdf5
    python sac.py --env Hopper-v5 --prior-data med.hdf5                  # RLPD

Haarnoja et al. 2018 (arXiv:1812.05905): a tanh-squashed Gaussian policy, two critics, a temperature that is
tuned to a target entropy of -A. One update per environment step. A time-out is no termination: only the
latter ends the bootstrap. --save-dataset writes D4RL's layout, the replay so far or --collect steps of the
policy. Expect Pendulum-v1 above -200 in 10 000 steps.

--prior-data is RLPD (Ball et al. 2023, arXiv:2302.02948): half of each batch comes from a data set, ten
critics with layer norm take 20 updates a step, each towards the minimum of a random two, and the policy one,
by their mean. `RLPD` below has these defaults; each is a flag, and a world's preset goes before them.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError
from common.datasets import check_append, load_dataset, reference_scores, transition_rows, write_transitions
from common.envs import make_envs
from common.evaluation import check_shapes, evaluate, rollout_metrics
from common.flags import FIXED, FREE, Layers, NonNegative, NonNegativeInt, Only, PositiveInt, Share
from common.optim import compile_update, load_optimizer, minimize
from common.replay import Replay, row_widths, step_envs
from common.run import StateArgs, main


@dataclass
class Args(StateArgs):
    env: str = "HalfCheetah-v5"
    """a Gymnasium id with vector observations and continuous actions"""
    num_envs: PositiveInt = 1
    """environments stepped together; each step of each counts"""
    eval_freq: NonNegativeInt = 10_000
    """environment steps between evaluations; 0 for the first and the last only"""
    save_freq: PositiveInt = 50_000
    """environment steps between checkpoints, which hold the replay"""
    save_dataset: Annotated[str | None, FREE] = None
    """at the end write the replay to this file, in D4RL's layout"""
    collect: Annotated[NonNegativeInt, FREE] = 0
    """write this many steps of the final policy (sampled, as in training) instead of the replay"""
    append: Annotated[bool, FREE] = False
    """add to what the file of --save-dataset holds, as medium-expert is both"""
    prior_data: str | None = None
    """a data set of this environment, as iql.py's --dataset: half of each batch is from it (RLPD)"""
    offline_ratio: Annotated[Share, Only("prior_data")] = 0.5
    """share of a batch that is from it"""
    total_timesteps: PositiveInt = 1_000_000
    """environment steps to train for"""
    buffer_size: PositiveInt = 1_000_000
    """transitions in the replay"""
    learning_starts: NonNegativeInt = 5_000
    """steps of uniformly random actions before the first update"""
    utd_ratio: NonNegative = 1.0
    """updates per environment step"""
    policy_delay: NonNegativeInt = 1
    """updates of the critics per update of the policy and of the temperature; 0 for one of these after all
    that an environment step has"""
    batch_size: PositiveInt = 256
    """transitions per update"""
    learning_rate: NonNegative = 3e-4
    """Adam, policy"""
    critic_learning_rate: NonNegative = 1e-3
    """Adam, critics and temperature"""
    gamma: Share = 0.99
    """discount per step"""
    tau: Share = 0.005
    """the target critics move by this share of the way at each update"""
    alpha: float | Literal["auto"] = "auto"
    """the temperature; auto tunes it to the target entropy"""
    action_entropy: float = -1.0
    """the target entropy is this times A, the number of an action's dimensions"""
    backup_entropy: bool = True
    """the critics' target has the entropy of the next action too"""
    critics: Annotated[PositiveInt, FIXED] = 2
    """networks in the ensemble"""
    target_critics: PositiveInt = 2
    """of them, drawn for each update, the targets' minimum is over"""
    policy_q: Literal["min", "mean"] = "min"
    """what the policy raises: the ensemble's minimum or mean"""
    width: Annotated[PositiveInt, FIXED] = 256
    """units of a hidden layer"""
    depth: Annotated[PositiveInt, FIXED, Layers("width")] = 2
    """hidden layers"""
    layer_norm: Annotated[bool, FIXED] = False
    """in the critics' hidden layers, before the activation"""

    def defaults(self):
        return RLPD | PRESETS.get(self.env, {}) if self.prior_data else {}

    def check(self):
        if self.alpha != "auto" and not self.alpha > 0:
            raise UserError(f"--alpha must be auto or a positive number, not {self.alpha}.")
        if self.buffer_size < self.num_envs:
            raise UserError(f"--buffer-size {self.buffer_size} must hold a step of all {self.num_envs} envs.")
        if self.target_critics > self.critics:
            raise UserError(f"--target-critics {self.target_critics} are more than --critics {self.critics}.")
        if self.collect and not self.save_dataset:
            raise UserError("--collect needs --save-dataset, the file to write.")
        if self.append and not self.save_dataset:
            raise UserError("--append needs --save-dataset, the file to add to.")
        if path := self.save_dataset and Path(self.save_dataset):  # now, and not after the training
            if (path.is_symlink() or path.exists()) and not path.is_file():
                raise UserError(f"--save-dataset {path} is there, and no file; name another.")
            if any(parent.is_file() for parent in path.parents):
                raise UserError(f"--save-dataset {path} leads through a file; name another.")
        if self.evaluate and self.save_dataset and not self.collect:
            raise UserError("--evaluate has no replay to save; add --collect and a number of steps.")


RLPD = dict(
    utd_ratio=20.0, policy_delay=0, critic_learning_rate=3e-4, action_entropy=-0.5, critics=10,
    policy_q="mean", layer_norm=True,
)  # fmt: skip
SCRIPTED = dict(  # measured with --prior-data of 60 scripted episodes, --reward shaped, on one core
    tau=0.01, utd_ratio=1.0, policy_delay=2, batch_size=128, critic_learning_rate=1e-3, critics=2, alpha=0.01,
    learning_starts=300, eval_episodes=20, eval_envs=1, eval_freq=5_000,
)  # fmt: skip
PRESETS = {
    "Pendulum-v1": dict(total_timesteps=20_000, learning_starts=1_000, eval_freq=5_000),
    "robosuite": SCRIPTED | dict(gamma=0.9, total_timesteps=60_000),
    "maniskill": SCRIPTED | dict(gamma=0.8, total_timesteps=40_000),
}
LOG_FREQ = 1000  # steps between two points of the log


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


class Critics(nn.Module):
    """N critics as one network of batched matrices: obs (B, S), action (B, A) -> (N, B), or of those `chosen`
    (n,) alone -> (n, B)."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.bf16, N = args.bf16, args.critics
        sizes = [obs_dim + action_dim, *[args.width] * args.depth, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):  # nn.Linear's initialisation
            for group, rows in ((self.weights, inputs), (self.biases, 1)):
                group.append(torch.empty(N, rows, outputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        norms = [(N, 1, args.width)] * (args.depth if args.layer_norm else 0)
        self.scales, self.shifts = (nn.ParameterList(map(x, norms)) for x in (torch.ones, torch.zeros))

    def forward(self, obs, action, chosen=None):
        groups = (self.weights, self.biases, self.scales, self.shifts)
        groups = [[p if chosen is None else p[chosen] for p in group] for group in groups]
        (*weights, last), (*biases, bias), scales, shifts = groups
        x = torch.cat([obs, action], -1).expand(len(last), -1, -1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for i in range(len(weights)):
                x = torch.baddbmm(biases[i], x, weights[i])  # (N, B, width)
                if scales:
                    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scales[i] + shifts[i]
                x = x.relu_()
        return (x * last.mT).sum(-1) + bias[..., 0]  # faster than a product with one column


class MLP(nn.Sequential):
    """`depth` hidden layers of `width` units: (B, inputs) -> (B, outputs)."""

    def __init__(self, inputs, outputs, width, depth, bf16=False):
        sizes = [inputs, *[width] * depth]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        hidden = [layer for m, n in pairs for layer in (nn.Linear(m, n), nn.ReLU(inplace=True))]
        super().__init__(*hidden, nn.Linear(width, outputs))
        self.bf16 = bf16

    def forward(self, x):
        *hidden, last = self
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in hidden:
                x = layer(x)
        return last(x.to(last.weight.dtype))


class Agent(nn.Module):
    """Policy, critics, target critics and temperature. Actions are in [-1, 1]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.actor = MLP(obs_dim, 2 * action_dim, args.width, args.depth, args.bf16)
        self.critic = Critics(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def policy(self, obs):
        """obs (B, S) -> mean and log_std (B, A), the latter squashed to [-5, 2]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        return mean, 3.5 * log_std.tanh() - 1.5

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py), the Gaussian's mean: (B, 1, A)."""
        obs = torch.as_tensor(obs["proprio"], device=self.log_alpha.device)
        return self.policy(obs)[0].tanh()[:, None].cpu().numpy(), None


# --- data


@torch.no_grad()
def collect(agent, args, widths, device):
    """--collect steps of the sampled policy, 10 episodes at a time -> rows (T, 10, W) as the replay's."""
    envs = make_envs(args, "train", 10, autoreset=True, states=True)
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


def draw(rows, size, generator):
    """`size` rows (B, W) of (n, W), uniformly."""
    index = torch.randint(len(rows), (size,), generator=generator, device=rows.device)
    return rows.index_select(0, index)


def mixed_batch(prior, replay, size, offline_ratio, generator):
    """`size` rows (B, W): of the prior data (M, W) that share, rounded, the rest of the replay's (n, W)."""
    count = round(offline_ratio * size)
    return torch.cat([draw(prior, count, generator), draw(replay, size - count, generator)])


# --- training


def train(args, run):
    """Act, store, update, repeat (arXiv:1812.05905, algorithm 1; arXiv:2302.02948, algorithm 1)."""
    envs = run.closing(make_envs(args, "train", args.num_envs, autoreset=True, states=True))
    device = run.device
    if args.append:
        check_append(args.save_dataset, args)
    widths = row_widths(envs)
    obs_dim, action_dim, *_ = widths
    if args.prior_data:
        dataset = load_dataset(args.prior_data, args.keys)
        check_shapes(dataset, args.env, envs)
        prior = transition_rows(dataset, envs.action_bounds).to(device)
        del dataset
    eval_envs, references = None, reference_scores(args.env)
    if args.eval_episodes:
        num_envs = min(args.eval_episodes, args.eval_envs)
        eval_envs = run.closing(make_envs(args, "eval", num_envs, states=True))
    agent = Agent(obs_dim, action_dim, args)
    run.load(agent)
    if args.alpha != "auto":  # also where a checkpoint has another
        nn.init.constant_(agent.log_alpha, math.log(args.alpha))
    run.open()
    if args.evaluate:
        run.evaluated(evaluate(agent, eval_envs, args, run, True, references))
        if args.collect:
            rows = collect(agent, args, widths, device)
            write_transitions(args, rows, args.collect, widths, envs)
        return

    critic_parameters = list(agent.critic.parameters())
    target_parameters = list(agent.target_critic.parameters())
    tuned = [agent.log_alpha] if args.alpha == "auto" else []
    groups = [{"params": agent.actor.parameters()}, {"params": tuned, "lr": args.critic_learning_rate}]
    actor_optimizer = torch.optim.Adam(groups, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.critic_learning_rate, fused=True)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    sampler = run.generator("sampler", device)
    replay, N = Replay(envs, args.buffer_size, device), args.num_envs

    def update(rows, noise, chosen, delayed):
        """Algorithm 1 of arXiv:1812.05905: rows (B, W), noise (2, B, A), or (1, B, A) if it is not the
        policy's turn too (delayed), `chosen` target critics, None for all -> metrics."""
        obs, action, reward, terminated, _, next_obs = rows.split(widths, -1)
        alpha = agent.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = squashed_gaussian(*agent.policy(next_obs), noise[0])
            next_value = agent.target_critic(next_obs, next_action, chosen).amin(0)
            if args.backup_entropy:
                next_value = next_value - alpha * next_log_prob
            target = td_target(reward[:, 0], terminated[:, 0], next_value, args.gamma)
        q = agent.critic(obs, action)
        loss_critic = critic_loss(q, target)
        minimize(loss_critic, critic_optimizer)

        metrics = {"loss/critic": loss_critic, "policy/alpha": alpha, "value/q": q}
        if delayed:
            action, log_prob = squashed_gaussian(*agent.policy(obs), noise[1])
            q = agent.critic(obs, action)
            if args.policy_q == "mean":  # as if it were one critic's
                q = q.mean(0, keepdim=True)
            loss_policy = policy_loss(log_prob, q, alpha)
            loss_alpha = temperature_loss(agent.log_alpha, log_prob, args.action_entropy * action_dim)
            minimize(loss_policy + loss_alpha, actor_optimizer)
            metrics |= {"loss/policy": loss_policy, "loss/alpha": loss_alpha, "policy/entropy": -log_prob}

        with torch.no_grad():
            torch._foreach_lerp_(target_parameters, critic_parameters, args.tau)
        return {name: x.detach() for name, x in metrics.items()}

    step, gradient_steps = 0, 0
    if saved := run.restore():
        for name in optimizers:
            load_optimizer(optimizers[name], saved["optimizers"][name])
        step, gradient_steps = saved["counters"]
        replay.restore(saved, step // N)
    else:
        replay.reset()
    saved = None  # it holds a replay as well
    if args.compile:
        update = compile_update(update, agent, optimizers.values())

    def save(name):
        """`best.pt` holds the weights, `checkpoint.pt` all that the run needs to go on."""
        state, own = {"agent": agent.state_dict()}, None
        if name == "checkpoint.pt":
            moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            state |= dict(optimizers=moments, counters=[step, gradient_steps]) | replay.state()
            own = dict(envs=envs.get_state())
        run.save(name, state, own)

    def evaluate_now(videos=False):
        if run.record(evaluate(agent, eval_envs, args, run, videos, references), step):
            save("best.pt")

    def due(*freqs):
        return any(freq and step % freq < N for freq in freqs)

    run.begin(step, args.total_timesteps, "env_step")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    metrics = {}
    while step < args.total_timesteps and not run.signalled:
        # --- act and store
        if step < args.learning_starts:
            action = torch.rand(N, action_dim, generator=sampler, device=device) * 2 - 1
        else:
            with torch.no_grad():
                noise = torch.randn(N, action_dim, generator=sampler, device=device)
                obs = torch.as_tensor(replay.obs, device=device)
                action = squashed_gaussian(*agent.policy(obs), noise)[0]
        run.check_finite({"action": action}, f"step {step}")
        replay.step(action)
        step += N

        # --- update
        while gradient_steps < (wanted := (step - args.learning_starts) * args.utd_ratio):
            if args.prior_data:
                rows = mixed_batch(prior, replay.rows(), args.batch_size, args.offline_ratio, sampler)
            else:
                rows = draw(replay.rows(), args.batch_size, sampler)
            gradient_steps += 1
            delay = args.policy_delay
            delayed = gradient_steps % delay == 0 if delay else gradient_steps >= wanted
            noise = torch.randn(1 + delayed, args.batch_size, action_dim, generator=sampler, device=device)
            chosen = None
            if args.target_critics < args.critics:
                chosen = torch.randperm(args.critics, generator=sampler, device=device)[: args.target_critics]
            metrics = update(rows, noise, chosen, delayed)
        run.advance(step)

        # --- log, evaluate, save
        if due(LOG_FREQ, args.eval_freq, args.save_freq) or step >= args.total_timesteps:
            means = {name: x.mean() for name, x in metrics.items()}
            if means:
                run.check_finite(means, f"step {step}", batch=rows)
            run.log(means | rollout_metrics(replay.recent, envs.has_success), step)
        if due(args.eval_freq) and step < args.total_timesteps:
            evaluate_now()
        if due(args.save_freq):
            save("checkpoint.pt")

    if step < args.total_timesteps:
        save("checkpoint.pt")
        run.stopped(step)
    evaluate_now(videos=True)
    save("checkpoint.pt")
    run.finish(step, gradient_steps)
    if args.save_dataset and args.collect:
        rows = collect(agent, args, widths, device)
        write_transitions(args, rows, args.collect, widths, envs)
    elif args.save_dataset:
        rows = replay.history()
        write_transitions(args, rows, len(rows) * N, widths, envs)


if __name__ == "__main__":
    main(train, Args, PRESETS)
