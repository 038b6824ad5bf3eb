"""Offline RL on what a frozen vision-language-action policy sees: `--features RUN`.

    python ppo_vla.py --checkpoint runs/warmup --collect 12000 --reward shaped --save-dataset rollouts.hdf5
    python iql.py --dataset rollouts.hdf5 --features runs/warmup --features-of actions --features-dim 128 \\
      --no-normalize --no-normalize-rewards --gamma 0.9 --temperature 40 --ema-decay 0.999

The pictures of a data set are encoded once, and what learns from states learns from these features: what a
critic of the policy reads (D: a large model's last hidden state at the prompt's end, of tiny the prompt as it
enters the layers), and the proprioception (P). It is evaluated in the data's world, or --env, through the
same encoder. `--features-of actions` takes the hidden states of all action slots instead (K*A*D), and
`--features-dim N` the N principal components of either. One decision changes little of an episode's return,
hence the temperature: advantages of tabletop's shaped rewards are hundredths. Of a file's pictures those that
a decision sees or leads to are read, as they are encoded.

One step of such a data set is a decision, as in `ppo_vla.py`: an action is a whole chunk, K*A numbers, those
that the world ignores left out, which is executed open loop; its reward is the sum over the chunk, and
--gamma is per decision. So nothing is approximated: the next observation is the one that the next decision
sees, and a value is bootstrapped from it with gamma, however many steps lie between. Where a recorded policy
decided is in its file; in demonstrations every step is a decision, whose chunk is what followed.
"""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch
from tqdm import tqdm

from common import UserError
from common.backbones import load_backbone, load_weights, model_module
from common.checkpoint import CheckpointError, load_checkpoint, readable
from common.datasets import OfflineDataset, chunk_targets, load_dataset, training_demonstrations
from common.envs import WORLDS, make_envs, world_flags, world_module
from common.run import check_choices

BATCH = 64  # observations encoded together


def decisions(rewards, terminated, decided, episode_starts, chunk):
    """Steps of E recorded episodes -> the N transitions of a policy that decides on `chunk` actions at once.

    rewards float32 (S,), terminated and decided bool (S,), episode_starts (E,). Of an episode of T steps (cut
    at its first termination) the decision at t < T leads to the observation of step t + K, with the reward
    r_t + ... + r_{t+K-1}; or, where the episode terminates before that, to its end, with the rewards until
    then. Where it was cut off before, nobody knows what followed, and the decision is left out.

    -> at and after (N,), the steps of the decision and of the next observation (of a termination: `at`),
    rewards (N,), terminations (N,) and the starts of chains of decisions, each of which begins where the one
    before ended: K of them for an episode in which each step is a decision.
    """
    total, rows, ends, chains = np.append(0, np.cumsum(rewards, dtype=np.float64)), [], [], []
    for start, stop in zip(episode_starts, [*episode_starts[1:], len(rewards)], strict=True):
        done = np.flatnonzero(terminated[start:stop])
        end = start + done[0] + 1 if len(done) else stop
        at = start + np.flatnonzero(decided[start:end])
        at = at if len(done) else at[at + chunk < end]
        rows.append(at[np.lexsort((at, (at - start) % chunk))])
        ends.append(np.full(len(at), end))
        chains.append(np.append(True, np.diff(rows[-1]) != chunk)[: len(at)])
    at, end, chains = (np.concatenate(x) for x in (rows, ends, chains))
    after = np.minimum(at + chunk, end)
    terminations = after == end
    rewards = (total[after] - total[at]).astype(np.float32)
    return at, np.where(terminations, at, after), rewards, terminations, np.flatnonzero(chains)


def principal_components(features, number):
    """float32 (n, F) -> mean (F,) and matrix (F, number): (x - mean) @ matrix are the first principal
    components of the standardised features, the largest first, of mean square 1 over all of them."""
    x = torch.from_numpy(features)
    mean, std = x.mean(0), x.std(0) + 1e-3
    correlation = torch.cov(x.T).double() / torch.outer(std, std)
    values, vectors = (part[..., -number:].flip(-1) for part in torch.linalg.eigh(correlation))
    return mean, (vectors / std[:, None] / values.mean().sqrt()).float()


def checked_flags(env, given, source):
    """The flags of the world `env` by name, those `given` (a dict, as JSON has them) and else its defaults.
    UserError for a value that the world does not know."""
    flags = world_flags(SimpleNamespace(**given | {"env": env}))
    flags = {name: tuple(x) if isinstance(x, list) else x for name, x in flags.items()}
    check_choices(world_module(env).Args, flags, source)
    return flags


def named_world(args, before):
    """Where a policy of features is evaluated -> the world's name and its flags, a dict: --env, or what
    recorded rollouts name, or else the world of the encoder's run, whose arguments are `before`."""
    if args.env:
        return args.env, world_flags(args)
    env, given, source, path = before["env"], before, args.features, Path(args.dataset)
    path = min(path.glob("*.hdf5"), default=path) if path.is_dir() else path
    errors = OSError, RuntimeError, KeyError, TypeError, ValueError  # `training_demonstrations` says which
    with contextlib.suppress(*errors), h5py.File(path, "r", locking=False) as file:
        named = json.loads(file["data"].attrs["env_args"])
        if named["env_name"] in WORLDS:
            env, given, source = named["env_name"], dict(named["env_kwargs"]), path
    return env, checked_flags(env, given, source)


class Encoder:
    """The backbone of a run, frozen, and the world as it is seen through it.

    saved: what the run's checkpoint `path` holds. world: arguments as `make_envs` takes them, of which `envs`
    are. `mark`, by which a run of features knows its encoder again, follows from all of its weights.
    """

    def __init__(self, path, saved, world, envs, run, of="prompt"):
        self.of, self.world, self.instructions = of, world, envs.instructions
        self.projection = None  # of `principal_components`
        self.acts = world.chunk, len(envs.active_dims)
        felt = envs.active_dims | bool(world.action_history)  # by the world, or seen as a past action
        self.active = np.flatnonzero(np.tile(felt, world.chunk))  # of K*A
        with readable(path):
            defaults = {
                f.name: f.default for f in dataclasses.fields(model_module(saved["args"]["backbone"]).Args)
            }
            own = dict(env=world.env, evaluate=True, collect=0, merge_and_save=None)
            args = SimpleNamespace(**defaults | saved["args"] | own)
        source = SimpleNamespace(saved=saved, source=path, device=run.device, rank=run.rank)
        self.backbone = load_backbone(args, envs, source)
        holder = torch.nn.Module()
        holder.backbone = self.backbone
        load_weights(holder, args, source)
        holder.eval().requires_grad_(False)
        if of == "actions" and (self.backbone.autoregressive or hasattr(self.backbone, "velocity")):
            raise UserError(f"The slots of {path} see the actions themselves; use --features-of prompt.")
        hidden = self.backbone.hidden_size
        if of == "actions":
            hidden *= np.prod(self.acts)
        else:
            hidden = getattr(self.backbone, "prompt_size", hidden)
        self.numbers = hidden + envs.single_observation_space["proprio"].shape[0]
        # of a base's own files, where there are some
        files = getattr(self.backbone, "fingerprint", "")
        digest = hashlib.sha256(repr((saved["backbone"], files)).encode())
        for name in sorted(name for name in saved["agent"] if name.startswith("backbone.")):
            numbers = saved["agent"][name].contiguous().flatten().view(torch.uint8).numpy()
            digest.update(name.encode() + numbers.tobytes())
        self.mark = digest.hexdigest()

    def project(self, features):
        """All features, float32 (n, F) -> those that are learned from, (n, size)."""
        if self.projection is None:
            return features
        mean, matrix = self.projection
        return ((torch.from_numpy(features) - mean) @ matrix).numpy()

    @property
    def size(self):
        return self.numbers if self.projection is None else self.projection[1].shape[1]

    @torch.no_grad()
    def __call__(self, obs, rows, bar=True):
        """Features float32 (n, size), hidden states and proprioception, or of them the principal components,
        of the `rows` (n,) of observations, arrays as of `common.envs`."""
        features = np.empty((len(rows), self.numbers), np.float32)
        for start in tqdm(
            range(0, len(rows), BATCH), desc="encoding", delay=2, disable=None if bar else True
        ):
            part = {key: obs[key][rows[start : start + BATCH]] for key in ("image", "proprio", "task")}
            slots, prompt = self.backbone(self.backbone.preprocess(part, self.instructions))
            hidden = slots.flatten(1) if self.of == "actions" else prompt
            features[start : start + BATCH] = torch.cat(
                [hidden.float().cpu(), torch.as_tensor(part["proprio"]).cpu()], 1
            )
        return self.project(features)

    def envs(self, number, run):
        """-> so many environments for an evaluation."""
        return EncodedEnvs(run.closing(make_envs(self.world, "eval", number)), self)


class EncodedEnvs:
    """`Envs` in which `proprio` is the features, and an action (N, 1, n) the n numbers of a chunk that the
    world feels. A step is a decision."""

    def __init__(self, envs, encoder):
        self.envs, self.encoder = envs, encoder
        self.features = np.zeros((envs.num_envs, encoder.size), np.float32)

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def see(self, obs, rows):
        """-> `obs` with new features of the `rows`, bool (N,)."""
        self.features[rows] = self.encoder(obs, np.flatnonzero(rows), bar=False)
        return {"proprio": self.features.copy(), "task": obs["task"]}

    def reset(self, seeds, mask):
        return self.see(self.envs.reset(seeds, mask), mask)

    def step(self, actions, mask, record):
        chunks = np.zeros((len(actions), np.prod(self.encoder.acts)), np.float32)
        chunks[:, self.encoder.active] = actions[:, 0]
        obs, reward, terminated, truncated, info = self.envs.step(
            chunks.reshape(-1, *self.encoder.acts), mask=mask, record=record
        )
        return self.see(obs, mask & ~terminated & ~truncated), reward, terminated, truncated, info


def offline_dataset(args, run):
    """The data set of a run, --dataset, as it is or, with --features, as its decisions look to the encoder.

    UserError for an encoder that is not there, or is not the one of the run's checkpoint.
    """
    if not args.features:
        dataset = load_dataset(args.dataset, args.keys)
        if args.env or not dataset.env_flags:
            return dataset
        flags = checked_flags(dataset.env_id, dataset.env_flags, dataset.name)
        return dataclasses.replace(dataset, env_flags=flags)
    if getattr(args, "online_steps", 0):
        raise UserError("--online-steps goes on from states alone; drop --features, or the steps.")
    try:
        saved = load_checkpoint(args.features)
    except CheckpointError as error:
        raise UserError(f"--features cannot be read: {error}") from error
    if "backbone" not in saved:
        raise UserError(
            f"{args.features} was written by {saved['script']}.py, which sees no pictures; give --features a "
            "run of a vision-language-action policy."
        )
    with readable(args.features):
        before = dict(saved["args"])
        env, flags = named_world(args, before)
        world = dict(env=env, chunk=before["chunk"], action_history=before["action_history"], seed=args.seed)
    world |= flags | dict(num_workers=None, worker_timeout=600.0)
    reading = SimpleNamespace(
        **world | dict(demos=args.dataset, demos_filter="all", num_demos=None, num_workers=0)
    )
    with contextlib.closing(make_envs(reading, "eval", 1)) as envs:
        encoder = Encoder(args.features, saved, SimpleNamespace(**world), envs, run, args.features_of)
        if run.saved and run.saved.get("encoder") != encoder.mark:
            raise UserError(
                f"{args.features} is not the encoder that {run.source} learned with, its weights have "
                "changed; put the old ones back there, or train anew."
            )
        run.kept["encoder"] = encoder.mark
        if args.features_dim > encoder.numbers:
            raise UserError(f"--features-dim {args.features_dim}, but there are {encoder.numbers} features.")
        encoder.projection = run.saved and run.saved.get("projection")
        demos = training_demonstrations(reading, envs, outcomes=True)
        has, wants = demos["image"].shape[1:], envs.single_observation_space["image"].shape
    if has != wants and "image_size" in encoder.backbone.config:  # it resizes nothing
        raise UserError(f"{args.dataset} holds pictures {has}, the encoder's are {wants}; give other ones.")
    starts, chunk = demos["episode_starts"], encoder.acts[0]
    at, after, rewards, terminations, chains = decisions(
        demos["rewards"], demos["terminated"], demos["decided"], starts, chunk
    )
    if not len(at):
        raise UserError(
            f"{args.dataset} has no episode of more than a chunk, {chunk} steps; give another file."
        )
    actions = chunk_targets(demos["actions"], starts, chunk)[0][at].reshape(len(at), -1)[:, encoder.active]
    order = np.concatenate([at, np.setdiff1d(after, at)])  # whose observations are needed, each once
    place = np.empty(len(demos["rewards"]), np.int64)
    place[order] = np.arange(len(order))
    if args.evaluate:
        states = np.zeros((len(order), encoder.size), np.float32)  # nobody looks at them
    else:
        states = encoder(demos, order)
    if args.features_dim and encoder.projection is None:
        encoder.projection = principal_components(states, args.features_dim)
        states = encoder.project(states)
    if args.features_dim:
        run.kept["projection"] = encoder.projection
    return OfflineDataset(
        name=args.dataset, env_id=env, states=states, next_index=place[after], actions=actions,
        rewards=rewards, terminations=terminations, episode_starts=chains, encoder=encoder,
        reference_scores=getattr(world_module(env), "REFERENCE_SCORES", None),
    )  # fmt: skip
