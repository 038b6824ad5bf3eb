"""Conservative Q-learning, in one file.

    python cql.py --dataset hopper-medium-v2 --cql-alpha 5.0 --cql-samples 10

Kumar et al. 2020 (arXiv:2006.04779): soft actor-critic whose critics also push Q down where it is high on
actions outside the data, and up on the data's. This is CQL(H), the importance-weighted logsumexp over uniform
actions and actions of the policy, with the fixed weight --cql-alpha or, with --target-gap, a Lagrange one.
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from common.datasets import transition_tensors
from common.evaluation import evaluate, evaluation_world
from common.features import offline_dataset
from common.flags import FIXED, Layers, NonNegative, NonNegativeInt, PositiveInt, Share, Unless
from common.optim import compile_update, load_optimizer, minimize
from common.run import OfflineArgs, main


@dataclass
class Args(OfflineArgs):
    batch_size: PositiveInt = 256
    """transitions per update"""
    learning_rate: NonNegative = 1e-4
    """Adam, policy and temperature"""
    critic_learning_rate: NonNegative = 3e-4
    """Adam, critics"""
    gamma: Share = 0.99
    """discount per step"""
    tau: Share = 0.005
    """the target critics move by this share of the way at each update"""
    alpha: float | Literal["auto"] = "auto"
    """the entropy's temperature; auto tunes it to the target entropy -A"""
    cql_alpha: NonNegative = 5.0
    """weight of the penalty"""
    cql_samples: PositiveInt = 10
    """actions per observation from each of: uniform, policy, policy at the next observation"""
    target_gap: Annotated[float | None, Unless("cql_alpha", 0)] = None
    """tune the penalty's weight so that it stays about this (Lagrange); --cql-alpha multiplies it"""
    min_penalty: Annotated[float | None, Unless("cql_alpha", 0)] = None
    """the penalty of a transition is clipped from below to this"""
    max_backup: bool = False
    """bootstrap from the best of --cql-samples actions of the policy instead of one"""
    bc_steps: NonNegativeInt = 0
    """the policy first imitates the data for this many updates"""
    normalize: bool = True
    """observations to mean 0 and standard deviation 1 over the data"""
    normalize_rewards: bool = False
    """scale rewards so that the episodes' returns span 1000"""
    reward_scale: NonNegative = 1.0
    """then multiply rewards by this"""
    reward_bias: float = 0.0
    """and add this to them"""
    width: Annotated[PositiveInt, FIXED] = 256
    """units of a hidden layer"""
    depth: Annotated[PositiveInt, FIXED, Layers("width")] = 3
    """hidden layers"""
    critic_depth: Annotated[PositiveInt, FIXED, Layers("width")] = 3
    """hidden layers of the critics"""

    def check(self):
        if self.alpha != "auto" and not self.alpha > 0:
            raise UserError(f"--alpha must be auto or a positive number, not {self.alpha}.")


PRESETS = {  # by a word of the data set's name
    "antmaze": dict(
        target_gap=0.8, min_penalty=-200.0, max_backup=True, critic_depth=5, normalize=False,
        reward_scale=10.0, reward_bias=-5.0, eval_episodes=100, eval_freq=100_000,
    ),
    "singletask": dict(eval_episodes=50, eval_envs=5, eval_freq=100_000),  # a word of all of OGBench's names
}  # fmt: skip
LOG_FREQ = 100  # updates between two points of the log


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
        self.actor = orthogonal(MLP(obs_dim, 2 * action_dim, args.width, args.depth, args.bf16))
        critic = TwinCritic(obs_dim, action_dim, args.width, args.critic_depth, args.bf16)
        self.critic = orthogonal(critic)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.zeros(()))

    def policy(self, obs):
        """obs (B, S) -> mean and log_std (B, A), the latter squashed to [-5, 2]."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        return mean, 3.5 * log_std.tanh() - 1.5

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py), from the environment's own observations: (B, 1, A)."""
        obs = torch.as_tensor(obs["proprio"], device=self.obs_mean.device)
        action = self.policy((obs - self.obs_mean) / self.obs_std)[0].tanh()
        return action[:, None].cpu().numpy(), None


# --- data


def sample_batch(states, next_index, rest, size, generator):
    """`size` transitions, uniformly: obs, action, reward, next_obs, termination, with `size` rows each."""
    index = torch.randint(len(rest), (size,), generator=generator, device=rest.device)
    obs, next_obs = states.index_select(0, torch.cat([index, next_index[index]])).split(size)
    action, reward, termination = rest.index_select(0, index).split([rest.shape[1] - 2, 1, 1], -1)
    return obs, action, reward[:, 0], next_obs, termination[:, 0]


# --- training


def train(args, run):
    """Sample transitions, update, repeat (arXiv:2006.04779, algorithm 1)."""
    dataset, device = offline_dataset(args, run), run.device
    eval_envs, bounds, references = evaluation_world(args, dataset, run, args.eval_episodes)
    action_dim = dataset.actions.shape[1]
    agent = Agent(dataset.states.shape[1], action_dim, args)
    run.load(agent)
    if args.alpha != "auto":  # also where a checkpoint has another
        nn.init.constant_(agent.log_alpha, math.log(args.alpha))
    if args.evaluate:
        run.open()
        return run.evaluated(evaluate(agent, eval_envs, args, run, True, references))

    states, next_index, rest = transition_tensors(dataset, bounds, args, device)
    if not run.saved and args.normalize:
        agent.obs_mean[:] = states[: len(rest)].mean(0)
        agent.obs_std[:] = states[: len(rest)].std(0, correction=0) + 1e-3
    states.sub_(agent.obs_mean).div_(agent.obs_std)  # in place: also the data set's array on the CPU
    del dataset
    run.open()
    critic_parameters = list(agent.critic.parameters())
    target_parameters = list(agent.target_critic.parameters())
    tuned = [*agent.actor.parameters(), *([agent.log_alpha] if args.alpha == "auto" else [])]
    actor_optimizer = torch.optim.Adam(tuned, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(
        [*critic_parameters, agent.log_multiplier], lr=args.critic_learning_rate, fused=True
    )
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    sampler = run.generator("sampler", device)
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
        if run.record(evaluate(agent, eval_envs, args, run, videos, references), step):
            save("best.pt")

    run.begin(step, args.total_timesteps, "update")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    while step < args.total_timesteps and not run.signalled:
        batch = sample_batch(states, next_index, rest, args.batch_size, sampler)
        step += 1
        size = (args.cql_samples, args.batch_size, action_dim)
        uniform = torch.rand(size, generator=sampler, device=device) * 2 - 1
        noise = torch.randn(1 + 2 * size[0], *size[1:], generator=sampler, device=device)
        metrics = update(*batch, uniform, noise, step <= args.bc_steps)
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
