"""What the environments of a run have shown it: transitions in a ring, and the episodes as they go on."""

import numpy as np
import torch

from common.evaluation import finished_episodes, host


def row_widths(envs):
    """Of a transition's columns: obs, action, reward, terminated, truncated and next_obs."""
    obs_dim, action_dim = envs.single_observation_space["proprio"].shape[0], envs.single_action_space.shape[0]
    return [obs_dim, action_dim, 1, 1, 1, obs_dim]


def step_envs(envs, obs, action, row):
    """One step of all environments, written to `row` (N, W): obs, action, reward, terminated, truncated,
    next_obs, which is the episode's last observation where it ended -> the next obs (N, S), info, ended."""
    after, reward, terminated, truncated, info = envs.step(action[:, None])
    columns = (reward[:, None], terminated[:, None], truncated[:, None], host(info["final_obs"]["proprio"]))
    np.concatenate([host(obs), action, *columns], axis=1, out=row, casting="unsafe")
    return after["proprio"], info, terminated | truncated


class Replay:
    """The last `size` transitions of N environments that reset themselves, on `device`.

    obs (N, S), what they show now; count, steps so far of each; recent, the last 100 episodes that ended, as
    of `finished_episodes`. `reset` or `restore` comes first.
    """

    def __init__(self, envs, size, device):
        self.envs, self.count, self.recent = envs, 0, []
        self.row = np.empty((envs.num_envs, sum(row_widths(envs))), np.float32)
        self.ring = torch.empty(size // envs.num_envs, *self.row.shape, device=device)

    def _filled(self):
        return self.ring[: min(self.count, len(self.ring))]

    def rows(self):
        """All transitions that are held (n, W), in no order; a view."""
        return self._filled().flatten(0, 1)

    def history(self):
        """The same (n, N, W), on the CPU, in the order of time."""
        first = self.count % len(self.ring) if self.count > len(self.ring) else 0  # the oldest
        return self._filled().roll(-first, 0).cpu()

    def reset(self):
        self.obs = self.envs.reset()["proprio"]

    def step(self, action):
        """Each environment takes one step, `action` (N, A), which replaces its oldest transition."""
        self.obs, info, ended = step_envs(self.envs, self.obs, action.cpu().numpy(), self.row)
        self.ring[self.count % len(self.ring)] = torch.from_numpy(self.row).to(self.ring.device)
        self.count += 1
        self.recent = [*self.recent, *finished_episodes(info, ended)][-100:]

    def state(self):
        """For a checkpoint, beside `envs.get_state()`, which is each process's own."""
        return dict(replay=self._filled().clone(), recent=self.recent)  # a view would be saved whole

    def restore(self, saved, count):
        """Go on from a checkpoint that has `state()` and `envs` after `count` steps of each environment."""
        self.count, self.recent = count, saved["recent"]
        filled = self._filled()
        filled[:] = saved["replay"].to(self.ring.device).view_as(filled)
        self.obs = self.envs.set_state(saved["envs"])["proprio"]
        # a step of none tells whose episode could not be restored, and was cut
        still = np.zeros((len(self.row), 1, *self.envs.single_action_space.shape), np.float32)
        lost = self.envs.step(still, mask=np.zeros(len(self.row), bool))[-1]["lost"]
        self.ring[(count - 1) % len(self.ring), lost, -self.obs.shape[1] - 1] = 1
