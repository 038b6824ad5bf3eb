"""TD3+BC and ReBRAC, in one file.

    python td3_bc.py --dataset hopper-medium-v2
    python td3_bc.py --dataset hopper-medium-v2 --alpha 0 --policy-delay 1       # plain behaviour cloning
    python td3_bc.py --dataset cube-single-play-singletask-task2-v0     # ReBRAC on OGBench: common/ogbench.py

Fujimoto and Gu 2021 (arXiv:2106.06860): TD3 whose policy also imitates the data. Its loss is
-lambda Q1(s, pi(s)) + |pi(s) - a|^2 with lambda = alpha / mean |Q1|, so that alpha is the one thing to tune.
Tarasov et al. 2023 (arXiv:2305.09836), --loss rebrac: the critics' target is penalised too, where the policy
leaves the data's next action, each with a weight of its own; layer norm in the critics. On OGBench's data the
presets are the form of its published numbers (arXiv:2502.02538), on D4RL's the paper's two weights. Its
other settings for D4RL's Gym tasks are --layer-norm --depth 3 --batch-size 1024 --learning-rate 1e-3
--critic-learning-rate 1e-3 --no-normalize.
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.datasets import load_dataset, transition_tensors
from common.evaluation import evaluate, evaluation_world
from common.flags import FIXED, Layers, NonNegative, Only, PositiveInt, Share
from common.optim import compile_update, load_optimizer, minimize
from common.run import OfflineArgs, main


@dataclass
class Args(OfflineArgs):
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
        loss="rebrac", actor_bc=0.1, critic_bc=0.01, normalize=False, width=512, depth=4, activation="gelu",
        layer_norm=True, eval_episodes=50, eval_envs=5, eval_freq=100_000,
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


def policy_loss(q, policy_action, action, alpha):
    """-lambda E[Q1(s, pi(s))] + E[(pi(s) - a)^2], lambda = alpha / E|Q1(s, pi(s))| without gradient (arXiv:
    2106.06860, eq. 5): Q1 (B,), actions (B, A) -> (), the imitation's part ()."""
    imitation = (policy_action - action).square().mean()
    return imitation - alpha / q.abs().mean().detach() * q.mean(), imitation


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


class TwinCritic(nn.Module):
    """Q1 and Q2 as one network of batched matrices: obs (B, S), action (B, A) -> (2, B)."""

    def __init__(self, obs_dim, action_dim, width, depth, bf16=False, activation="relu", layer_norm=False):
        super().__init__()
        self.bf16, self.activation = bf16, activation
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
        x = x.relu_() if self.activation == "relu" else F.gelu(x, approximate="tanh")
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


def mlp(inputs, outputs, width, depth, activation):
    sizes, layers = [inputs, *[width] * depth], []
    for m, n in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(m, n), nn.ReLU(inplace=True) if activation == "relu" else nn.GELU("tanh")]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


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
        self.actor = mlp(obs_dim, action_dim, args.width, args.depth, args.activation)
        sizes = obs_dim, action_dim, args.width, args.depth
        self.critic = TwinCritic(*sizes, args.bf16, args.activation, args.layer_norm)
        if args.activation == "gelu":
            xavier(self.actor, last=0.1)
            xavier(self.critic)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, obs, turn):
        """An evaluation's (see common/evaluation.py), from the environment's own observations: (B, 1, A)."""
        obs = torch.as_tensor(obs["proprio"], device=self.obs_mean.device)
        action = self.actor((obs - self.obs_mean) / self.obs_std).tanh()
        return action[:, None].cpu().numpy(), None


# --- data


def sample_batch(states, next_index, rest, size, generator):
    """`size` transitions, uniformly: obs, action, reward, next_obs, termination, with `size` rows each."""
    index = torch.randint(len(rest), (size,), generator=generator, device=rest.device)
    obs, next_obs = states.index_select(0, torch.cat([index, next_index[index]])).split(size)
    action, reward, termination = rest.index_select(0, index).split([rest.shape[1] - 2, 1, 1], -1)
    return obs, action, reward[:, 0], next_obs, termination[:, 0]


def with_next_action(rest, next_index):
    """What ReBRAC needs of the data beside states: action, next action, whether there is one, reward and
    termination, (N, 2A + 3)."""
    action, has_next = rest[:, :-2], next_index < len(rest)  # the other states are the last of episodes
    next_action = action[next_index.clamp(max=len(rest) - 1)] * has_next[:, None]
    return torch.cat([action, next_action, has_next[:, None], rest[:, -2:]], 1)


# --- training


def train(args, run):
    """Sample transitions, update, repeat (arXiv:2106.06860)."""
    dataset, device = load_dataset(args.dataset, args.keys), run.device
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
    del dataset
    run.open()
    actor_parameters, critic_parameters = list(agent.actor.parameters()), list(agent.critic.parameters())
    targets = [*agent.target_actor.parameters(), *agent.target_critic.parameters()]
    actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.critic_learning_rate, fused=True)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    sampler = run.generator("sampler", device)
    rebrac = args.loss == "rebrac"
    rest = with_next_action(rest, next_index) if rebrac else rest

    def update(obs, action, reward, next_obs, termination, noise, delayed):
        """Algorithm 1 of arXiv:1802.09477 with the losses of TD3+BC or ReBRAC; noise (B, A) -> metrics."""
        if rebrac:
            action, data_action, has_next = action.split([action_dim, action_dim, 1], -1)
        with torch.no_grad():
            next_action = agent.target_actor(next_obs).tanh()
            next_action = smoothed_action(next_action, noise, args.policy_noise, args.noise_clip)
            next_value = agent.target_critic(next_obs, next_action).amin(0)
            if rebrac:
                has_next = has_next[:, 0]
                next_value = penalised_value(next_value, next_action, data_action, has_next, args.critic_bc)
            target = td_target(reward, termination, next_value, args.gamma)
        q = agent.critic(obs, action)
        loss_critic = critic_loss(q, target)
        minimize(loss_critic, critic_optimizer)

        metrics = {"loss/critic": loss_critic, "value/q": q, "value/target": target}
        if delayed:
            policy_action = agent.actor(obs).tanh()
            if rebrac:
                policy_q = agent.critic(obs, policy_action)
                loss_policy, loss_bc = rebrac_policy_loss(policy_q, policy_action, action, args.actor_bc)
            else:
                policy_q = agent.critic.q1(obs, policy_action)
                loss_policy, loss_bc = policy_loss(policy_q, policy_action, action, args.alpha)
            minimize(loss_policy, actor_optimizer)
            with torch.no_grad():
                torch._foreach_lerp_(targets, [*actor_parameters, *critic_parameters], args.tau)
            metrics |= {"loss/policy": loss_policy, "loss/bc": loss_bc}
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
        noise = torch.randn(args.batch_size, action_dim, generator=sampler, device=device)
        metrics = update(*batch, noise, step % args.policy_delay == 0)
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
