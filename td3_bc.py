"""TD3+BC, in one file.

    python td3_bc.py --dataset hopper-medium-v2
    python td3_bc.py --dataset hopper-medium-v2 --alpha 0 --policy-delay 1       # plain behaviour cloning

Fujimoto and Gu 2021 (arXiv:2106.06860): TD3 whose policy also imitates the data. Its loss is
-lambda Q1(s, pi(s)) + |pi(s) - a|^2 with lambda = alpha / mean |Q1|, so that alpha is the one thing to tune.
"""

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn

from common.datasets import transition_tensors
from common.evaluation import evaluate, evaluation_world
from common.features import offline_dataset
from common.flags import FIXED, Layers, NonNegative, PositiveInt, Share
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
    alpha: NonNegative = 2.5
    """weight of Q against imitation; 0 is behaviour cloning"""
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


PRESETS = {"antmaze": dict(reward_bias=-1.0, eval_episodes=100, eval_freq=100_000)}  # by a word of the name
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
    del dataset
    run.open()
    actor_parameters, critic_parameters = list(agent.actor.parameters()), list(agent.critic.parameters())
    targets = [*agent.target_actor.parameters(), *agent.target_critic.parameters()]
    actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.critic_learning_rate, fused=True)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}
    sampler = run.generator("sampler", device)

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
