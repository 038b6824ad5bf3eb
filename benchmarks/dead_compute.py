"""Forward and training passes of grpo_vla.py beside the fixed-horizon schedule, at equal useful data.

python benchmarks/dead_compute.py

The world is a dummy whose episodes end after 1 to 15 decisions, uniformly, of a horizon of 16: half of it is
unused. The fixed schedule is SimpleVLA-RL's: whole groups play in lockstep to the horizon, the policy runs
for finished episodes too, old log-probs are computed anew, and every chunk is trained on, those after the end
masked out. Both use the same model, loss functions, minibatches and groups a batch.
"""

import contextlib
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_vla  # noqa: E402
from common import envs, run  # noqa: E402
from common.backbones import load_backbone  # noqa: E402

HORIZON, CHUNK, GROUPS, GROUP_SIZE, ITERATIONS = 16, 4, 8, 8, 20
FLAGS = f"""--env lengths --num-envs {GROUPS * GROUP_SIZE} --num-workers 0 --group-size {GROUP_SIZE}
    --num-groups {GROUPS} --chunk {CHUNK} --eval-freq 0 --eval-envs 2 --eval-episodes 2 --device cpu
    --update-epochs 1 --aggregation sequence-mean-token-mean --total-timesteps 1_000_000_000
    --save-freq 1000000 --run-name ours"""


class Lengths(gym.Env):
    """Pictures of noise; a coin decides on success at an end that was drawn at the reset."""

    instructions, active_dims, has_success = ["do it"], np.ones(7, bool), True
    observation_space = gym.spaces.Dict(
        image=gym.spaces.Box(0, 255, (1, 64, 64, 3), np.uint8),
        proprio=gym.spaces.Box(-1, 1, (8,), np.float32),
        task=gym.spaces.Discrete(1),
    )
    action_space = gym.spaces.Box(-1, 1, (7,), np.float32)
    made = 0

    def __init__(self):
        Lengths.made += 1
        self.noise = np.random.default_rng(Lengths.made)  # what differs between members of a group

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.image = self.np_random.integers(0, 256, (1, 64, 64, 3), np.uint8)
        self.left, self.steps = int(self.noise.integers(1, HORIZON)) * CHUNK, 0
        return self.observe(), {}

    def observe(self):
        return {"image": self.image, "proprio": np.zeros(8, np.float32), "task": np.int64(0)}

    def advance(self, action):
        self.left -= 1
        success = self.left == 0 and bool(self.noise.random() < 0.5)
        return float(success), self.left == 0, False, {"success": success}


def make(split):
    return Lengths()


@dataclass
class Args:
    """The world has no flags."""


envs.WORLDS["lengths"] = __name__


class Count:
    """Rows that go through the policy, by purpose."""

    def __init__(self):
        self.rows = {"rollout": 0, "old log-probs": 0, "training": 0}

    def watch(self, agent_class):
        def patched(name, kind, function):
            def call(agent, batch, *rest, **kwargs):
                if agent.training or kind == "rollout":
                    self.rows[kind] += len(batch["proprio"])
                return function(agent, batch, *rest, **kwargs)

            setattr(agent_class, name, call)

        patched("get_action_and_value", "rollout", agent_class.get_action_and_value)
        patched("evaluate_actions", "training", agent_class.evaluate_actions)


class Done(Exception):
    pass


def ours(args, run, count):
    """grpo_vla.py itself, for `ITERATIONS` batches -> useful chunks, seconds."""
    useful, weigh, evaluate = [], grpo_vla.aggregation_weights, grpo_vla.evaluate
    start = []

    def watch(covered, *rest):
        if len(useful) == ITERATIONS:
            raise Done
        useful.append(len(covered))
        return weigh(covered, *rest)

    def begin(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        count.rows = dict.fromkeys(count.rows, 0)  # the evaluation before the training
        start.append(time.perf_counter())
        return result

    grpo_vla.aggregation_weights, grpo_vla.evaluate = watch, begin
    with contextlib.suppress(Done):
        grpo_vla.train(args, run)
    grpo_vla.aggregation_weights, grpo_vla.evaluate = weigh, evaluate
    return sum(useful), time.perf_counter() - start[0]


def fixed_horizon(args, run, count):
    """The lockstep schedule, for `ITERATIONS` batches -> useful chunks, seconds."""
    world = run.closing(envs.make_envs(args, "train", args.num_envs))
    backbone, useful, group = load_backbone(args, world, run), 0, 0
    agent = grpo_vla.Agent(backbone, args, world)
    optimizer = torch.optim.AdamW([p for p in agent.parameters() if p.requires_grad], lr=args.learning_rate)
    sampler, start = torch.Generator().manual_seed(1), time.perf_counter()
    for _ in range(ITERATIONS):
        agent.eval()
        seeds = np.repeat(np.arange(group, group + GROUPS), GROUP_SIZE)
        group += GROUPS
        obs, alive = world.reset(seeds), np.ones(args.num_envs, bool)
        outcomes, columns = np.zeros(args.num_envs, np.float32), []
        for _ in range(HORIZON):
            with torch.no_grad():
                batch = backbone.preprocess(obs, world.instructions)
                vision = backbone.encode_vision(batch)[0]
                actions, *_ = agent.get_action_and_value(batch, vision, generator=sampler)
            batch.pop("image")
            obs, reward, terminated, truncated, info = world.step(agent.head.to_env(actions), mask=alive)
            executed = torch.as_tensor(info["steps"])[:, None] > torch.arange(CHUNK)
            mask = executed[..., None].expand(-1, -1, 7).flatten(1)
            columns.append(batch | dict(vision=vision, actions=actions, mask=mask))
            outcomes += reward
            useful += int(alive.sum())
            alive &= ~(terminated | truncated)
        data = {key: torch.cat([c[key] for c in columns]) for key in columns[0]}
        episode = torch.arange(args.num_envs).repeat(HORIZON)
        outcomes = torch.as_tensor(outcomes).view(GROUPS, GROUP_SIZE)
        data["advantages"] = grpo_vla.grpo_advantages(outcomes, True, False).flatten()[episode]
        rows, log_probs = torch.arange(len(episode)), torch.empty(data["mask"].shape)
        with torch.no_grad():
            for index, micro in grpo_vla.micro_batches(rows, data, None, args.minibatch_size):
                log_probs[index] = agent.evaluate_actions(micro, micro["actions"], micro["vision"])[0]
                count.rows["old log-probs"] += len(index)
        old_log_probs, covered = grpo_vla.merge_tokens(log_probs, data["mask"], args.ratio_level, CHUNK)
        totals = int(covered.sum()), args.num_envs
        weights = grpo_vla.aggregation_weights(
            covered, episode, covered.shape[1], totals, args.aggregation, args.constant_length
        )
        data |= dict(old_log_probs=old_log_probs, weights=weights, fresh=torch.ones(len(rows), dtype=bool))
        agent.train()
        per_epoch = math.ceil(len(rows) / args.minibatch_size)
        for drawn, scale in grpo_vla.minibatches(rows, rows, 1, per_epoch, sampler):
            _, micro = next(grpo_vla.micro_batches(drawn, data, None, args.minibatch_size))
            new = agent.evaluate_actions(micro, micro["actions"], micro["vision"])
            totals = torch.stack([covered[drawn].sum(), micro["mask"].sum(), covered[drawn].sum()])
            loss, _ = grpo_vla.grpo_loss(*new, micro, totals, args, scale)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return useful, time.perf_counter() - start


if __name__ == "__main__":
    count = Count()
    count.watch(grpo_vla.Agent)
    print("| schedule | useful chunks | rollout | old log-probs | training | passes a useful chunk | ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, schedule in (("fixed horizon", fixed_horizon), ("grpo_vla.py", ours)):
        count.rows = dict.fromkeys(count.rows, 0)
        words = [*FLAGS.split(), "--output-dir", tempfile.mkdtemp()]
        args, _ = run.read_flags(words, grpo_vla.Args, grpo_vla.PRESETS, "grpo_vla")
        handle = run.Run(args, None, Path(grpo_vla.__file__))
        with handle, contextlib.redirect_stdout(sys.stderr):  # the table alone goes to stdout
            useful, seconds = schedule(args, handle, count)
        rows = list(count.rows.values())
        cells = [name, useful, *rows, f"{sum(rows) / useful:.2f}", f"{1000 * seconds / useful:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
