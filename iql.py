"""Implicit Q-learning, in one file.

    python iql.py --dataset hopper-medium-v2 --expectile 0.7 --temperature 3.0
    python iql.py --dataset cube-single-play-singletask-task2-v0    # OGBench: common/ogbench.py makes it
    python iql.py --dataset hopper-medium-v2 --online-steps 1000000

Kostrikov et al. 2021 (arXiv:2110.06169): V is an expectile of Q over the actions of the data, Q is backed up
with V, and the policy imitates the data weighted by exp(advantage). No action outside the data is ever
evaluated. On OGBench's data the presets are the form of its published numbers (arXiv:2502.02538, appendix E).
--online-steps goes on with the same networks in the environment: samples of the policy join the data, one
update a step.
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.datasets import reward_units, transition_tensors
from common.envs import make_envs
from common.evaluation import evaluate, evaluation_world, rollout_metrics, world_of
from common.features import offline_dataset
from common.flags import (
    FIXED,
    SHARE,
    Layers,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Share,
    Unless,
)
from common.optim import compile_update, load_optimizer, minimize
from common.replay import Replay, row_widths
from common.run import OfflineArgs, main


@dataclass
class Args(OfflineArgs):
    online_steps: NonNegativeInt = 0
    """after the updates on the data so many steps in the environment, each with an update"""
    offline_ratio: Annotated[float | None, SHARE, Unless("online_steps", 0)] = None
    """the chance of each transition of an online batch to be the data set's; default as if what is seen
    online were appended to it"""
    batch_size: PositiveInt = 256
    """transitions per update"""
    learning_rate: NonNegative = 3e-4
    """Adam, policy; decays to 0 as a cosine"""
    anneal_lr: bool = True
    """else, and online, it stays as it is"""
    critic_learning_rate: NonNegative = 3e-4
    """Adam, critics and value"""
    gamma: Share = 0.99
    """discount per step"""
    tau: Share = 0.005
    """the target critics move by this share of the way at each update"""
    expectile: Share = 0.7
    """of Q over the data's actions, which is V: 0.5 is the mean, 1 the maximum"""
    temperature: NonNegative = 3.0
    """beta, the policy's weights are exp(beta * advantage): 0 is behaviour cloning"""
    max_weight: Positive = 100.0
    """the weights are clipped to this"""
    joint_step: bool = False
    """V, policy and Q step from the same weights, the advantage is of the critics and not of their targets"""
    dropout: Share = 0.0
    """of the policy's hidden layers"""
    learn_std: Annotated[bool, FIXED] = True
    """the policy's standard deviation; else it is 1, around a mean that tanh does not squash"""
    normalize: bool = True
    """observations to mean 0 and standard deviation 1 over the data"""
    normalize_rewards: bool = True
    """scale rewards so that the episodes' returns span 1000"""
    reward_scale: NonNegative = 1.0
    """then multiply rewards by this"""
    reward_bias: float = 0.0
    """and add this to them"""
    ema_decay: Annotated[Share, FIXED] = 0.0
    """evaluations take an average of the policy's weights, which keeps this share of itself at each of the
    policy's updates (0.999: of the last 1,000 or so); 0 for the weights themselves"""
    width: Annotated[PositiveInt, FIXED] = 256
    """units of a hidden layer"""
    depth: Annotated[PositiveInt, FIXED, Layers("width")] = 2
    """hidden layers"""
    activation: Annotated[Literal["relu", "gelu"], FIXED] = "relu"
    """of hidden layers; gelu comes with Xavier's initial weights"""
    layer_norm: Annotated[bool, FIXED] = False
    """after each hidden layer of the value networks"""


HUMAN = dict(temperature=0.5, dropout=0.1, normalize_rewards=False)
PRESETS = {  # by a word, or the start, of the data set's name
    "antmaze": dict(
        expectile=0.9, temperature=10.0, normalize_rewards=False, reward_bias=-1.0, eval_episodes=100,
        eval_freq=100_000,
    ),
    "kitchen": HUMAN, "pen": HUMAN, "door": HUMAN, "hammer": HUMAN, "relocate": HUMAN,
    "singletask": dict(  # OGBench's names all have this word
        expectile=0.9, temperature=10.0, anneal_lr=False, joint_step=True, learn_std=False, normalize=False,
        normalize_rewards=False, depth=4, activation="gelu", layer_norm=True, eval_episodes=50, eval_envs=5,
        eval_freq=100_000,
    ),
    "cube-single": dict(temperature=1.0), "cube-double": dict(temperature=0.3),
    "puzzle-4x4": dict(temperature=3.0),
}  # fmt: skip
LOG_FREQ = 500  # updates between two points of the log


# --- the mathematics: pure functions on tensors


def expectile_loss(diff, expectile):
    """E[|expectile - 1(diff < 0)| diff^2] (arXiv:2110.06169, eq. 4 and 5): diff = Q - V (B,) -> ()."""
    return (torch.where(diff < 0, 1 - expectile, expectile) * diff.square()).mean()


def td_target(rewards, terminations, next_values, gamma):
    """r + gamma (1 - terminated) V(s'), each (B,). A time-out is bootstrapped like any other step."""
    return rewards + gamma * (1 - terminations) * next_values


def critic_loss(q, target):
    """Sum over the critics of the mean squared error: q (2, B), target (B,) -> ()."""
    return (q - target).square().mean(-1).sum()


def advantage_weights(advantage, temperature, max_weight):
    """min(exp(temperature * advantage), max_weight) (eq. 7): (B,) -> (B,)."""
    return (temperature * advantage).exp().clamp(max=max_weight)


def gaussian_log_prob(mean, log_std, action):
    """log N(action; mean, exp(log_std)^2), summed: mean, action (B, A), log_std (A,) -> (B,)."""
    z = (action - mean) * (-log_std).exp()
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


# --- networks


class GELU(nn.Module):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (arXiv:1606.08415): (...) -> (...)"""

    def forward(self, x):
        if torch.compiler.is_compiling():  # 1 + tanh(u) = 2 sigmoid(2u): its tanh is slow on a CPU
            return x * (2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).sigmoid()
        return F.gelu(x, approximate="tanh")


class TwinCritic(nn.Module):
    """Q1 and Q2 as one network of batched matrices: obs (B, S), action (B, A) -> (2, B)."""

    def __init__(self, obs_dim, action_dim, width, depth, bf16=False, activation="relu", layer_norm=False):
        super().__init__()
        self.bf16, self.activation, self.gelu = bf16, activation, GELU()
        sizes = [obs_dim + action_dim, *[width] * depth, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):  # nn.Linear's initialisation
            for group, rows in ((self.weights, inputs), (self.biases, 1)):
                group.append(torch.empty(2, rows, outputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        layers = depth if layer_norm else 0
        self.scales = nn.ParameterList(torch.ones(2, 1, width) for _ in range(layers))
        self.shifts = nn.ParameterList(torch.zeros(2, 1, width) for _ in range(layers))

    def activate(self, x, layer):
        """The activation of a hidden layer's sums (2, B, width), and layer norm if there is one."""
        x = x.relu_() if self.activation == "relu" else self.gelu(x)
        if self.scales:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = torch.addcmul(self.shifts[layer], self.scales[layer], x)
        return x

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1).expand(2, -1, -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for layer, (w, b) in enumerate(hidden):
                x = self.activate(torch.baddbmm(b, x, w), layer)  # (2, B, width)
        return (x * weight.mT).sum(-1) + bias[..., 0]  # faster than a product with one column


class MLP(nn.Sequential):
    """`depth` hidden layers of `width` units: (B, inputs) -> (B, outputs)."""

    def __init__(
        self, inputs, outputs, width, depth, bf16=False, activation="relu", layer_norm=False, dropout=0.0
    ):
        sizes, layers = [inputs, *[width] * depth], []
        for m, n in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(m, n), nn.ReLU(inplace=True) if activation == "relu" else GELU()]
            layers += [nn.Dropout(dropout), *([nn.LayerNorm(n, eps=1e-6)] if layer_norm else [])]
        super().__init__(*layers, nn.Linear(width, outputs))
        self.bf16 = bf16

    def forward(self, x):
        *hidden, last = self
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in hidden:
                x = layer(x)
        return last(x.to(last.weight.dtype))


@torch.no_grad()
def xavier(network, last=1.0):
    """Xavier's uniform matrices, +-sqrt(6 / (inputs + outputs)), the last layer's times `last`, and biases of
    0: in place."""
    weights = [p for name, p in network.named_parameters() if "weight" in name and p.ndim > 1]
    for weight in weights:
        bound = math.sqrt(6 / sum(weight.shape[-2:])) * (last if weight is weights[-1] else 1)
        weight.uniform_(-bound, bound)
    for name, p in network.named_parameters():
        if "bias" in name:
            p.zero_()


class Agent(nn.Module):
    """Policy, value, critics and target critics. Actions are in [-1, 1], observations normalised by
    `obs_mean` and `obs_std` everywhere but in `act`."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.learn_std = args.learn_std
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        form = args.width, args.depth, args.bf16, args.activation
        self.actor = MLP(obs_dim, action_dim, *form, dropout=args.dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim), requires_grad=args.learn_std)
        self.value = MLP(obs_dim, 1, *form, args.layer_norm)
        self.critic = TwinCritic(obs_dim, action_dim, *form, args.layer_norm)
        if args.activation == "gelu":
            xavier(self.actor, last=0.1)
            xavier(self.value)
            xavier(self.critic)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        average = copy.deepcopy(self.actor).requires_grad_(False) if args.ema_decay else None
        self.average = average  # of the policy's weights

    def policy(self, obs, average=None):
        """(B, S) -> mean (B, A), the actor's or `average`'s, and log_std (A,) of a Gaussian. The mean alone
        is squashed by tanh, so that actions at the bounds, which are many in data, have a finite density;
        with a width of 1 nothing is."""
        mean = (self.actor if average is None else average)(obs)
        return mean.tanh() if self.learn_std else mean, self.log_std.clamp(-5, 2)

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py), from the environment's own observations: (B, 1, A)."""
        obs = torch.as_tensor(obs["proprio"], device=self.obs_mean.device)
        action = self.policy((obs - self.obs_mean) / self.obs_std, self.average)[0].clamp(-1, 1)
        return action[:, None].cpu().numpy(), None

    @torch.no_grad()
    def explore(self, obs, noise):
        """Online: a sample of the policy from the environment's own obs (N, S); noise (N, A) -> (N, A)."""
        self.eval()  # nothing drops out
        mean, log_std = self.policy((obs - self.obs_mean) / self.obs_std)
        self.train()
        return (mean + log_std.exp() * noise).clamp(-1, 1)


# --- data


def sample_batch(states, next_index, rest, size, generator):
    """`size` transitions, uniformly: obs, action, reward, next_obs, termination, with `size` rows each."""
    index = torch.randint(len(rest), (size,), generator=generator, device=rest.device)
    obs, next_obs = states.index_select(0, torch.cat([index, next_index[index]])).split(size)
    action, reward, termination = rest.index_select(0, index).split([rest.shape[1] - 2, 1, 1], -1)
    return obs, action, reward[:, 0], next_obs, termination[:, 0]


def replay_batch(rows, widths, agent, scale, bias):
    """As `sample_batch`'s the transitions that rows of a replay (B, W) hold (common/replay.py): observations
    normalised and rewards scaled as the data's are."""
    obs, action, reward, termination, _, next_obs = rows.split(widths, -1)
    obs, next_obs = ((x - agent.obs_mean) / agent.obs_std for x in (obs, next_obs))
    return obs, action, reward[:, 0] * scale + bias, next_obs, termination[:, 0]


def mixed_batch(old, new, share, generator):
    """`old`, a batch, each of whose transitions stays with probability `share`, and else becomes that of
    `new`, in place: to a compiled update it is what it was."""
    is_new = torch.rand(len(old[0]), generator=generator, device=old[0].device) >= share
    for x, y in zip(old, new, strict=True):
        x[is_new] = y[is_new]
    return old


# --- training


def train(args, run):
    """Sample transitions, update, repeat (arXiv:2110.06169, algorithm 1)."""
    dataset, device = offline_dataset(args, run), run.device
    eval_envs, bounds, references = evaluation_world(args, dataset, run, args.eval_episodes)
    action_dim = dataset.actions.shape[1]
    agent = Agent(dataset.states.shape[1], action_dim, args)
    run.load(agent)
    if args.evaluate:
        run.open()
        return run.evaluated(evaluate(agent, eval_envs, args, run, True, references))

    states, next_index, rest = transition_tensors(dataset, bounds, args, device)
    if not run.saved and args.normalize:
        agent.obs_mean[:] = states[: len(rest)].mean(0)
        agent.obs_std[:] = states[: len(rest)].std(0, correction=0) + 1e-3
    states.sub_(agent.obs_mean).div_(agent.obs_std)  # in place: also the data set's array on the CPU
    if args.online_steps:
        envs = run.closing(make_envs(world_of(args, dataset), "train", 1, autoreset=True, states=True))
        replay, widths = Replay(envs, args.online_steps, device), row_widths(envs)
        units = reward_units(dataset, args)
    del dataset
    run.open()
    critic_parameters = list(agent.critic.parameters())
    target_parameters = list(agent.target_critic.parameters())
    actor_parameters = list(agent.actor.parameters())
    average_parameters = list(agent.average.parameters()) if args.ema_decay else []
    policy_parameters = [*actor_parameters, *([agent.log_std] if args.learn_std else [])]
    groups = [{"params": policy_parameters}, {"params": critic_parameters}]
    value_optimizer = torch.optim.Adam(agent.value.parameters(), args.critic_learning_rate, fused=True)
    optimizer = torch.optim.Adam(groups, lr=args.critic_learning_rate, fused=True)
    rate = torch.zeros((), device=device)  # the policy's learning rate, which changes without recompiling
    optimizers = {"value": value_optimizer, "actor and critic": optimizer}
    sampler = run.generator("sampler", device)

    def update(obs, action, reward, next_obs, termination):
        """Algorithm 1 of arXiv:2110.06169: V, then the policy and Q, both with the new V, or all at once with
        the old one -> metrics."""
        with torch.no_grad():
            target_q = agent.target_critic(obs, action).amin(0)
        value = agent.value(obs)[:, 0]
        loss_value = expectile_loss(target_q - value, args.expectile)
        if not args.joint_step:
            minimize(loss_value, value_optimizer)

        q = agent.critic(obs, action)
        with torch.no_grad():
            if args.joint_step:
                next_value = agent.value(next_obs)[:, 0]
            else:
                value, next_value = agent.value(torch.cat([obs, next_obs]))[:, 0].chunk(2)
            advantage = (q.amin(0) if args.joint_step else target_q) - value
            weights = advantage_weights(advantage, args.temperature, args.max_weight)
            target = td_target(reward, termination, next_value, args.gamma)
        loss_policy = -(weights * gaussian_log_prob(*agent.policy(obs), action)).mean()
        loss_critic = critic_loss(q, target)
        minimize(loss_policy + loss_critic, optimizer)  # they share no weights
        if args.joint_step:
            minimize(loss_value, value_optimizer)

        with torch.no_grad():
            torch._foreach_lerp_(target_parameters, critic_parameters, args.tau)
            if args.ema_decay:
                torch._foreach_lerp_(average_parameters, actor_parameters, 1 - args.ema_decay)
        metrics = {"loss/critic": loss_critic, "loss/value": loss_value, "loss/policy": loss_policy}
        metrics |= {"value/q": q, "value/v": value, "policy/weight": weights}
        return {name: x.detach() for name, x in metrics.items()}

    step = 0
    if saved := run.restore():
        for name in optimizers:
            load_optimizer(optimizers[name], saved["optimizers"][name])
        step = saved["step"]
    if args.online_steps and saved:
        replay.restore(saved, max(0, step - args.total_timesteps))
    elif args.online_steps:
        replay.reset()
    if args.compile:
        update = compile_update(update, agent, optimizers.values())

    def save(name):
        """`best.pt` holds the weights, `checkpoint.pt` all that the run needs to go on."""
        state, own = {"agent": agent.state_dict()}, None
        if name == "checkpoint.pt":
            moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            state, own = state | dict(optimizers=moments, step=step), {}
            if args.online_steps:
                state, own = state | replay.state(), dict(envs=envs.get_state())
        run.save(name, state, own)

    def evaluate_now(videos=False):
        if run.record(evaluate(agent, eval_envs, args, run, videos, references), step):
            save("best.pt")

    total = args.total_timesteps + args.online_steps
    run.begin(step, total, "update")
    if run.initial is None:
        evaluate_now(videos=True)  # what a video lacks shows now
        save("checkpoint.pt")
    while step < total and not run.signalled:
        batch = sample_batch(states, next_index, rest, args.batch_size, sampler)
        if step >= args.total_timesteps:  # online: a step of the environment, and its part of the batch
            noise = torch.randn(1, action_dim, generator=sampler, device=device)
            action = agent.explore(torch.as_tensor(replay.obs, device=device), noise)
            run.check_finite({"action": action}, f"update {step}")
            replay.step(action)
            rows = replay.rows()
            index = torch.randint(len(rows), (args.batch_size,), generator=sampler, device=device)
            new = replay_batch(rows[index], widths, agent, *units)
            share = len(rest) / (len(rest) + len(rows)) if args.offline_ratio is None else args.offline_ratio
            batch = mixed_batch(batch, new, share, sampler)
        step += 1
        anneals = args.anneal_lr and step <= args.total_timesteps
        decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.total_timesteps) if anneals else 1.0
        optimizer.param_groups[0]["lr"] = rate.fill_(args.learning_rate * decay)
        metrics = update(*batch)
        run.advance(step)

        # --- log, evaluate, save
        turns = step == args.total_timesteps < total  # from the data to the environment
        if run.due(step, LOG_FREQ, args.eval_freq, args.save_freq) or turns or step == total:
            metrics = {name: x.mean() for name, x in metrics.items()}
            run.check_finite(metrics, f"update {step}", batch=torch.cat([x.flatten() for x in batch]))
            if step > args.total_timesteps:
                metrics |= rollout_metrics(replay.recent, envs.has_success)
            run.log(metrics, step)
        if (run.due(step, args.eval_freq) or turns) and step < total:
            evaluate_now()
        run.offline = run.latest if turns else run.offline
        if run.due(step, args.save_freq) or turns:
            save("checkpoint.pt")

    if step < total:
        save("checkpoint.pt")
        run.stopped(step)
    evaluate_now(videos=True)
    save("checkpoint.pt")
    run.finish(environment_steps=args.online_steps, gradient_steps=step)


if __name__ == "__main__":
    main(train, Args, PRESETS)
