"""Episodes -> an evaluation, a dict as results.json has it, and videos: one loop for every script.

What is evaluated is a module with `act(obs, turn) -> actions, values`: obs as of `common.envs`, but of the n
rows whose turn it is alone; turn a dict of `rows` (n,) (their numbers), `returns` and `steps` (n,) (of their
episodes so far), `instructions` and a random `generator`; actions numpy (n, K, ...); values (n,) for the
videos, or None.
"""

import dataclasses

import numpy as np
import torch

from common import UserError, distributed
from common.datasets import recording, reference_scores
from common.envs import make_envs
from common.video import annotate, write_video

VIDEOS = 6  # episodes of an evaluation that are filmed


def host(x):
    """An array, of what may be a tensor on any device."""
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else x


def wilson_interval(successes, episodes, z=1.96):
    """95 % confidence interval of a success rate (Wilson 1927); sound near 0 and 1, unlike p +- 2 sigma."""
    p, n = successes / episodes, episodes
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return [float(max(low, 0)), float(min(high, 1))]  # else -1e-17 by rounding


def summarize(outcomes, has_success, instructions=(), references=None):
    """outcomes: rows (success, return, length, task) -> the evaluation: `episodes`, `success_rate` and its
    interval `success_rate_ci95` (where the world has success), `mean_reward`, `mean_length`,
    `normalized_score` (with references), and `per_task`, {instruction: the same}.

    references: the returns of D4RL's normalised score (arXiv:2004.07219), 0 and 100. Of two tasks with one
    instruction each is told by its number.
    """
    if not len(outcomes):
        return {"episodes": 0}
    success, reward, length, task = np.asarray(outcomes, dtype=float).T
    result = {"episodes": len(outcomes)}
    if has_success:
        result["success_rate"] = float(success.mean())
        result["success_rate_ci95"] = wilson_interval(success.sum(), len(outcomes))
    result |= {"mean_reward": float(reward.mean()), "mean_length": float(length.mean())}
    if references:
        zero, hundred = references
        result["normalized_score"] = 100 * (result["mean_reward"] - zero) / (hundred - zero)
    if len(instructions) > 1:
        result["per_task"] = {}
        for number in np.unique(task).astype(int).tolist():
            rows, name = [row for row in outcomes if row[3] == number], instructions[number]
            name += f" (task {number})" if instructions.count(name) > 1 else ""
            result["per_task"][name] = summarize(rows, has_success)
    return result


def finished_episodes(info, ended, tasks=None):
    """Rows (success, return, length, task) of the environments whose episode ended with this step of `Envs`;
    tasks (N,), theirs, or None where there are none."""
    columns = [info[key] for key in ("success", "episode_return", "episode_length")]
    columns += [np.zeros(len(ended)) if tasks is None else host(tasks)]
    return np.stack(columns, 1, dtype=float, casting="unsafe")[ended].tolist()


def rollout_metrics(episodes, has_success):
    """Of training's last episodes, as of `finished_episodes`, -> the means by name."""
    names = ("rollout/success_rate", "rollout/mean_reward", "rollout/mean_length")
    means = dict(zip(names, np.mean(episodes, 0)[:3], strict=True)) if episodes else {}
    return means if has_success else {name: x for name, x in means.items() if name != names[0]}


def score(evaluation):
    """What is to be raised: the success rate, or else the mean return (0 of no episodes)."""
    return evaluation.get("success_rate", evaluation.get("mean_reward", 0.0))


def assured(evaluation):
    """What an evaluation is compared by: the lower end of the success rate's interval, in which a rate of few
    episodes counts less, or else the mean return."""
    return evaluation["success_rate_ci95"][0] if "success_rate" in evaluation else score(evaluation)


@torch.no_grad()
def run_episodes(agent, envs, seeds, generator=None, video_folder=None, record=None, stop=lambda: False):
    """One episode from each of the `seeds` -> rows (success, return, length, task) in their order.

    Nothing is computed for finished environments, and neither the training's generators nor its environments
    move. The first `VIDEOS` episodes go to video_folder; all steps of an `OpenLoop` to `record`, a
    `common.datasets.Recording`. stop(): end before the next step; an unfinished episode's row is None.
    """
    training = agent.training
    agent.eval()
    distributed.unshard(agent)  # the processes' episodes end at different times
    total, size, seeds = len(seeds), envs.num_envs, np.asarray(seeds)
    episode = np.arange(size)  # that each environment plays
    running, returns, steps = episode < total, np.zeros(size), np.zeros(size, int)

    def begin(rows):
        return envs.reset(seeds[np.minimum(episode, total - 1)], rows)

    obs = begin(running) if total else None
    outcomes, frames = [None] * total, {i: [] for i in range(min(VIDEOS, total, size) if video_folder else 0)}
    started = len(outcomes[:size])
    while running.any() and not stop():
        rows = np.flatnonzero(running)
        turn = dict(rows=rows, returns=returns[rows], steps=steps[rows])
        turn |= dict(instructions=envs.instructions, generator=generator)
        action, values = agent.act({key: x[rows] for key, x in obs.items()}, turn)
        actions = np.zeros((size, *action.shape[1:]), action.dtype)
        actions[rows] = action
        filmed = np.isin(episode, list(frames)) & running
        tasks, before = host(obs.get("task", np.zeros(size, int))), obs
        obs, rewards, terminated, truncated, info = envs.step(actions, mask=running, record=filmed)
        ended = terminated | truncated
        if record:
            decided = steps % agent.chunk == 0
            before = {key: host(x) for key, x in before.items()}
            record.step(episode, running, before, actions, rewards, ended, terminated, info, decided)
        returns, steps = info["episode_return"].copy(), info["episode_length"].copy()
        for i in np.flatnonzero(filmed):
            value = None if values is None else values[rows == i].item()
            captions = caption(info, i, envs, tasks[i], ended[i], value)
            frames[episode[i]] += [annotate(*pair) for pair in zip(info["frames"][i], captions, strict=True)]
        again = info["lost"] & running  # the worker died: the same episode once more
        for i in np.flatnonzero(again & filmed):
            frames[episode[i]] = []
        for i in np.flatnonzero(ended & running):
            row = [info[key][i] for key in ("success", "episode_return", "episode_length")]
            outcomes[episode[i]] = (*row, tasks[i])
            episode[i], started = started, started + 1
            again[i] = running[i] = episode[i] < total
        if again.any():
            returns[again], steps[again] = 0.0, 0
            obs = begin(again)
    for i, pictures in frames.items():
        write_video(video_folder / f"episode_{i}.mp4", pictures + [pictures[-1]] * 10, fps=20)
    agent.train(training)
    distributed.reshard(agent)
    return outcomes


def caption(info, i, envs, task, ended, value):
    """The lines below each of the frames of environment i's chunk."""
    steps, length = info["steps"][i], info["episode_length"][i]
    for step in range(length - steps + 1, length + 1):
        text = f"step {step}"
        text += "" if value is None else f"   value {value:.2f}"
        if ended and step == length:
            outcome = "success" if info["success"][i] else "failure"
            text += f"   {outcome if envs.has_success else 'return {:.1f}'.format(info['episode_return'][i])}"
        yield [line for line in (envs.instructions[task], text) if line]


def evaluate(agent, envs, args, run, videos=False, references=None):
    """`--eval-episodes` episodes of `envs` with seeds 0, 1, 2, ..., the same at each time, split over
    torchrun's processes -> the evaluation's dict. videos: for --capture-video. envs None: of no episodes."""
    if envs is None:
        return {"episodes": 0}
    generator = torch.Generator(run.device).manual_seed(args.seed + run.rank)
    seeds = np.arange(run.rank, args.eval_episodes, run.processes)
    outcomes = run_episodes(agent, envs, seeds, generator, run.videos if videos else None)
    outcomes = [row for rows in distributed.all_gather(outcomes) for row in rows]
    return summarize(outcomes, envs.has_success, envs.instructions, references)


class OpenLoop(torch.nn.Module):
    """An agent whose chunks of `chunk` actions are executed one by one, so that every step is seen."""

    def __init__(self, agent, chunk):
        super().__init__()
        self.agent, self.chunk, self.plans = agent, chunk, {}

    def act(self, obs, turn):
        """See the module: actions (n, 1, A), and no values. The agent is asked where a chunk begins."""
        place = turn["steps"] % self.chunk
        if (due := place == 0).any():
            asked = turn | {key: turn[key][due] for key in ("rows", "returns", "steps")}
            chunks = self.agent.act({key: x[due] for key, x in obs.items()}, asked)[0]
            self.plans.update(zip(asked["rows"].tolist(), chunks, strict=True))
        pairs = zip(turn["rows"].tolist(), place, strict=True)
        return np.stack([self.plans[row][k : k + 1] for row, k in pairs]), None


def collect(agent, eval_envs, args, run):
    """--collect: so many episodes of training's layouts, played as in an evaluation, into the file of
    --save-dataset, and nothing else. Their seeds follow from --seed, and are neither training's nor an
    evaluation's. A signal ends it with the episodes that have ended by then."""
    if run.processes > 1:
        raise UserError("--collect plays in one process; start it with python instead of torchrun.")
    eval_envs.close()  # its processes have the memory of those that follow
    single_steps, size = dataclasses.replace(args, chunk=1), min(args.eval_envs, args.collect)
    envs = run.closing(make_envs(single_steps, "train", size))
    seeds = np.random.SeedSequence([args.seed, 0, 0, 1]).generate_state(args.collect)
    generator = torch.Generator(run.device).manual_seed(args.seed)
    with recording(args.save_dataset, args, envs) as record:
        run.begin(0, args.collect, "episode")

        def stop():
            run.advance(record.ended)
            return run.signalled

        agent = OpenLoop(agent, args.chunk)
        outcomes = run_episodes(agent, envs, seeds, generator, run.videos, record, stop)
    outcomes = [row for row in outcomes if row]
    run.collected(summarize(outcomes, envs.has_success, envs.instructions))


def evaluation_world(args, dataset, run, episodes):
    """Where a policy learned from `dataset` is evaluated, `episodes` in at most --eval-envs environments:
    --env, or else the data set's own world, which must fit its shapes.

    -> envs (None with --eval-episodes 0), what -1 and 1 mean in the file's units (each (A,), or None without
    a world), and the returns of the normalised scores 0 and 100 (or None). Raises UserError.
    """
    env, references = args.env or dataset.env_id, dataset.reference_scores
    if dataset.encoder:
        return dataset.encoder.envs(episodes, run) if episodes else None, None, references
    if env is None and args.eval_episodes:
        raise UserError(f"{dataset.name} names no environment; give --env, or --eval-episodes 0.")
    if env is None or (dataset.normalized_actions and not args.env and not args.eval_episodes):
        return None, None, references  # actions that need no world to be understood
    if dataset.env_id and env != dataset.env_id:
        references = reference_scores(env)
    world = world_of(args, dataset)
    envs = make_envs(world, "eval", max(1, min(episodes, args.eval_envs)), states=True)
    run.closing(envs)  # also for a run without evaluations it says what the actions mean
    check_shapes(dataset, env, envs)
    return envs if args.eval_episodes else None, envs.action_bounds, references


def world_of(args, dataset):
    """`args` with --env, or else the data set's own world and its flags. UserError where there is neither."""
    if not (env := args.env or dataset.env_id):
        raise UserError(f"{dataset.name} names no environment; give --env.")
    world = dataclasses.replace(args, env=env)
    vars(world).update({} if args.env else dataset.env_flags)
    return world


def check_shapes(dataset, env, envs):
    """UserError unless the data set has the shapes of `env`, whose environments are `envs`."""
    has = dataset.states.shape[1], dataset.actions.shape[1]
    wants = envs.single_observation_space["proprio"].shape + envs.single_action_space.shape
    if has != wants:
        raise UserError(
            f"{dataset.name} has {has[0]} observations and {has[1]} actions, {env} {wants[0]} and "
            f"{wants[1]}; give another --env."
        )
