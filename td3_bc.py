"""TD3+BC and ReBRAC, in one file.

    python td3_bc.py --dataset hopper-medium-v2
    python td3_bc.py --dataset hopper-medium-v2 --alpha 0 --policy-delay 1       # plain behaviour cloning
    python td3_bc.py --dataset cube-single-play-singletask-task2-v0     # ReBRAC on OGBench: common/ogbench.py
    python td3_bc.py --dataset hopper-medium-v2 --online-steps 1000000

Fujimoto and Gu 2021 (arXiv:2106.06860): TD3 whose policy also imitates the data. Its loss is
-lambda Q1(s, pi(s)) + |pi(s) - a|^2 with lambda = alpha / mean |Q1|, so that alpha is the one thing to tune.
Tarasov et al. 2023 (arXiv:2305.09836), --loss rebrac: the critics' target is penalised too, where the policy
leaves the data's next action, each with a weight of its own; layer norm in the critics. On OGBench's data the
presets are the form of its published numbers (arXiv:2502.02538), on D4RL's the paper's two weights. Its
other settings for D4RL's Gym tasks are --layer-norm --depth 3 --batch-size 1024 --learning-rate 1e-3
--critic-learning-rate 1e-3 --no-normalize.
--online-steps goes on with the same networks in the environment: the policy's steps, with noise, join the
data, one update a step.
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
from common.flags import FIXED, SHARE, Layers, NonNegative, NonNegativeInt, Only, PositiveInt, Share, Unless
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
    """Adam, policy"""
    critic_learning_rate: NonNegative = 3e-4
    """Adam, critics"""
    gamma: Share = 0.99
    """discount per step"""
    tau: Share = 0.005
    """the targets move by this share of the way at each of their updates"""
    loss: Literal["td3+bc", "rebrac"] = "td3+bc"
    """of policy and critics"""
    alpha: Annotated[NonNegative, Only("loss", "td3+bc")] = 2.5
    """weight of Q against imitation; 0 is behaviour cloning"""
    actor_bc: Annotated[NonNegative, Only("loss", "rebrac")] = 0.01
    """beta_1, weight of imitation in the policy's loss"""
    critic_bc: Annotated[NonNegative, Only("loss", "rebrac")] = 0.01
    """beta_2, weight of the distance from the data's next action in the critics' target"""
    policy_noise: NonNegative = 0.2
    """standard deviation of the noise on the target policy's action"""
    noise_clip: NonNegative = 0.5
    """the noise is clipped to this"""
    exploration_noise: Annotated[NonNegative, Unless("online_steps", 0)] = 0.1
    """standard deviation of the noise on online actions"""
    online_bc: Annotated[Share, Unless("online_steps", 0)] = 1.0
    """imitation's weight at the end of the online steps, as a share of that before: it falls linearly"""
    policy_delay: PositiveInt = 2
    """updates of the critics per update of the policy and of the targets"""
    normalize: bool = True
    """observations to mean 0 and standard deviation 1 over the data"""
    normalize_rewards: bool = False
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


PRESETS = {  # by a word, or the start, of the data set's name
    "antmaze": dict(reward_bias=-1.0, eval_episodes=100, eval_freq=100_000),
    "singletask": dict(  # OGBench's names all have this word
        loss="rebrac", actor_bc=0.1, critic_bc=0.01, exploration_noise=0.2, normalize=False, width=512,
        depth=4, activation="gelu", layer_norm=True, eval_episodes=50, eval_envs=5, eval_freq=100_000,
    ),
}  # fmt: skip
PRESETS |= {  # of ReBRAC: D4RL's by its paper's tables, OGBench's by arXiv:2502.02538's
    name: dict(actor_bc=actor, critic_bc=critic)
    for name, actor, critic in (
        ("halfcheetah-random", 0.001, 0.1), ("halfcheetah-medium", 0.001, 0.01),
        ("halfcheetah-expert", 0.01, 0.01), ("halfcheetah-medium-expert", 0.01, 0.1),
        ("halfcheetah-medium-replay", 0.01, 0.001), ("halfcheetah-full-replay", 0.001, 0.1),
        ("hopper-random", 0.001, 0.01), ("hopper-medium", 0.01, 0.01), ("hopper-expert", 0.1, 0.1),
        ("hopper-medium-expert", 0.1, 0.01), ("hopper-medium-replay", 0.05, 0.5),
        ("hopper-full-replay", 0.01, 0.01), ("walker2d-random", 0.01, 0.0), ("walker2d-medium", 0.05, 0.1),
        ("walker2d-expert", 0.01, 0.5), ("walker2d-medium-expert", 0.01, 0.01),
        ("walker2d-medium-replay", 0.05, 0.01), ("walker2d-full-replay", 0.01, 0.01),
        ("antmaze-umaze", 0.003, 0.002), ("antmaze-umaze-diverse", 0.003, 0.001),
        ("antmaze-medium-play", 0.001, 0.0005), ("antmaze-medium-diverse", 0.001, 0.0),
        ("antmaze-large-play", 0.002, 0.001), ("antmaze-large-diverse", 0.002, 0.002),
        ("cube-single", 1.0, 0.0), ("cube-double", 0.1, 0.0), ("scene", 0.1, 0.01),
        ("puzzle-3x3", 0.3, 0.01), ("puzzle-4x4", 0.3, 0.01),
    )
}  # fmt: skip
LOG_FREQ = 500  # updates between two points of the log


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


def policy_loss(q, policy_action, action, alpha, bc):
    """bc E[(pi(s) - a)^2] - lambda E[Q1(s, pi(s))], lambda = alpha / E|Q1(s, pi(s))| without gradient, bc 1
    in arXiv:2106.06860, eq. 5: Q1 (B,), actions (B, A) -> (), the imitation's part ()."""
    imitation = (policy_action - action).square().mean()
    return bc * imitation - alpha / q.abs().mean().detach() * q.mean(), imitation


def imitation_weight(step, steps, end):
    """At an online step of 1 .. `steps`, as a share of that before: it falls linearly from 1 to `end`, as
    SPOT's does (arXiv:2202.06239)."""
    return 1 + (end - 1) * step / steps


def squared_distance(a, b):
    """|a - b|^2, summed over the action's numbers: (B, A) twice -> (B,)."""
    return (a - b).square().sum(-1)


def penalised_value(next_value, next_action, data_action, has_next, critic_bc):
    """V(s') = min_i Q_i(s', a~) - beta_2 |a~ - a'|^2 (arXiv:2305.09836): a~ is the target policy's action, a'
    what the data do in s', if has_next (B,) is 1 and not 0. min_i Q_i (B,), actions (B, A) -> (B,)."""
    return next_value - critic_bc * has_next * squared_distance(next_action, data_action)


def rebrac_policy_loss(q, policy_action, action, actor_bc):
    """beta_1 E|pi(s) - a|^2 - lambda E[min_i Q_i(s, pi(s))], lambda = 1 / E|min_i Q_i| without gradient
    (arXiv:2305.09836): q (2, B), actions (B, A) -> (), the imitation's part ()."""
    q, imitation = q.amin(0), squared_distance(policy_action, action).mean()
    return actor_bc * imitation - q.mean() / q.abs().mean().detach(), imitation


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

    def q1(self, obs, action):
        """Q1 alone: (B,)"""
        if self.scales or self.activation != "relu":
            return self(obs, action)[0]
        x = torch.cat([obs, action], -1)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for w, b in hidden:
                x = torch.addmm(b[0], x, w[0]).relu_()  # (B, width)
        return (x * weight[0].T).sum(-1) + bias[0, :, 0]


class MLP(nn.Sequential):
    """`depth` hidden layers of `width` units: (B, inputs) -> (B, outputs)."""

    def __init__(self, inputs, outputs, width, depth, bf16=False, activation="relu"):
        sizes, layers = [inputs, *[width] * depth], []
        for m, n in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(m, n), nn.ReLU(inplace=True) if activation == "relu" else GELU()]
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
    """Deterministic policy, critics and their targets. Actions are in [-1, 1], observations normalised by
    `obs_mean` and `obs_std` everywhere but in `act`."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        form = args.width, args.depth, args.bf16, args.activation
        self.actor = MLP(obs_dim, action_dim, *form)
        self.critic = TwinCritic(obs_dim, action_dim, *form, args.layer_norm)
        if args.activation == "gelu":
            xavier(self.actor, last=0.1)
            xavier(self.critic)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        average = copy.deepcopy(self.actor).requires_grad_(False) if args.ema_decay else None
        self.average = average  # of the policy's weights

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py), from the environment's own observations: (B, 1, A)."""
        obs = torch.as_tensor(obs["proprio"], device=self.obs_mean.device)
        actor = self.actor if self.average is None else self.average
        action = actor((obs - self.obs_mean) / self.obs_std).tanh()
        return action[:, None].cpu().numpy(), None

    @torch.no_grad()
    def explore(self, obs, noise):
        """Online: pi(s) + noise from the environment's own obs (N, S); noise (N, A) -> (N, A) in [-1, 1]."""
        return (self.actor((obs - self.obs_mean) / self.obs_std).tanh() + noise).clamp(-1, 1)


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


def with_next_action(rest, next_index):
    """What ReBRAC needs of the data beside states: action, next action, whether there is one, reward and
    termination, (N, 2A + 3)."""
    action, has_next = rest[:, :-2], next_index < len(rest)  # the other states are the last of episodes
    next_action = action[next_index.clamp(max=len(rest) - 1)] * has_next[:, None]
    return torch.cat([action, next_action, has_next[:, None], rest[:, -2:]], 1)


def with_next_row(rows, index, widths):
    """The same of a replay's rows (n, W), in the order of time, for `index` (B,): action, next action and
    whether there is one, (B, 2A + 1)."""
    _, action, _, terminated, truncated, _ = rows.split(widths, -1)
    has_next = (terminated + truncated == 0)[index] & (index + 1 < len(rows))[:, None]
    next_action = action[(index + 1).clamp(max=len(rows) - 1)] * has_next
    return torch.cat([action[index], next_action, has_next], 1)


# --- training


def train(args, run):
    """Sample transitions, update, repeat (arXiv:2106.06860)."""
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
    actor_parameters, critic_parameters = list(agent.actor.parameters()), list(agent.critic.parameters())
    average_parameters = list(agent.average.parameters()) if args.ema_decay else []
    targets = [*agent.target_actor.parameters(), *agent.target_critic.parameters()]
    actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.critic_learning_rate, fused=True)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    bc = torch.ones((), device=device)  # a tensor, which changes without recompiling
    sampler = run.generator("sampler", device)
    rebrac = args.loss == "rebrac"
    rest = with_next_action(rest, next_index) if rebrac else rest

    def update(obs, action, reward, next_obs, termination, noise, bc, delayed):
        """Algorithm 1 of arXiv:1802.09477, losses of TD3+BC or ReBRAC; noise (B, A), bc () -> metrics."""
        if rebrac:
            action, data_action, has_next = action.split([action_dim, action_dim, 1], -1)
        with torch.no_grad():
            next_action = agent.target_actor(next_obs).tanh()
            next_action = smoothed_action(next_action, noise, args.policy_noise, args.noise_clip)
            next_value = agent.target_critic(next_obs, next_action).amin(0)
            if rebrac:
                has_next = has_next[:, 0]
                critic_bc = bc * args.critic_bc
                next_value = penalised_value(next_value, next_action, data_action, has_next, critic_bc)
            target = td_target(reward, termination, next_value, args.gamma)
        q = agent.critic(obs, action)
        loss_critic = critic_loss(q, target)
        minimize(loss_critic, critic_optimizer)

        metrics = {"loss/critic": loss_critic, "value/q": q, "value/target": target}
        if delayed:
            policy_action = agent.actor(obs).tanh()
            if rebrac:
                policy_q = agent.critic(obs, policy_action)
                loss_policy, loss_bc = rebrac_policy_loss(policy_q, policy_action, action, bc * args.actor_bc)
            else:
                policy_q = agent.critic.q1(obs, policy_action)
                loss_policy, loss_bc = policy_loss(policy_q, policy_action, action, args.alpha, bc)
            minimize(loss_policy, actor_optimizer)
            with torch.no_grad():
                torch._foreach_lerp_(targets, [*actor_parameters, *critic_parameters], args.tau)
                if args.ema_decay:
                    torch._foreach_lerp_(average_parameters, actor_parameters, 1 - args.ema_decay)
            metrics |= {"loss/policy": loss_policy, "loss/bc": loss_bc}
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
            noise = args.exploration_noise * torch.randn(1, action_dim, generator=sampler, device=device)
            action = agent.explore(torch.as_tensor(replay.obs, device=device), noise)
            run.check_finite({"action": action}, f"update {step}")
            replay.step(action)
            rows = replay.rows()
            index = torch.randint(len(rows), (args.batch_size,), generator=sampler, device=device)
            new = replay_batch(rows[index], widths, agent, *units)
            if rebrac:
                new = new[0], with_next_row(rows, index, widths), *new[2:]
            share = len(rest) / (len(rest) + len(rows)) if args.offline_ratio is None else args.offline_ratio
            batch = mixed_batch(batch, new, share, sampler)
        step += 1
        if step > args.total_timesteps:
            bc.fill_(imitation_weight(step - args.total_timesteps, args.online_steps, args.online_bc))
        noise = torch.randn(args.batch_size, action_dim, generator=sampler, device=device)
        metrics = update(*batch, noise, bc, step % args.policy_delay == 0)
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
