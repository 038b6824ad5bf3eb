"""The vector environment of a world that is many environments at once, as on a GPU: its observations are
tensors that never leave the device of the policy, and there are no workers. See `make_batch` in
`common/envs/__init__.py`.
"""

import gymnasium
import numpy as np
import torch

from common import UserError
from common.envs.vector import LARGEST, OUTCOME, Envs, describe

COLUMNS = [name for name in OUTCOME if name != "tells_success"]  # what a chunk tells the host, as one tensor


class BatchedEnvs(gymnasium.vector.VectorEnv):
    """As `Envs`, with its attributes, calls and results, but that
    - observations, `final_obs` too, are tensors (N, ...) on `device`, which nobody writes to again, and
      actions may be. What steers Python's control flow (rewards, ends, lengths) is arrays, fetched once a
      chunk;
    - `restarted` is never true, and `lost` only of episodes that `set_state` could not restore.

    batch: as a world's `make_batch` gives it. The other arguments are those of `vectorize`.
    """

    _outstanding = None  # a step never is
    _idle, _rows, _next_seed = Envs._idle, Envs._rows, Envs._next_seed
    _seeds, _check_running, draw_tasks = Envs._seeds, Envs._check_running, Envs.draw_tasks

    def __init__(self, env_id, batch, num_envs, device, *, seed, first, chunk, autoreset, action_history):
        self.env_id, self.batch, self.num_envs, self.device = env_id, batch, num_envs, device
        self.chunk, self.num_workers, self.lost_episodes = chunk, 0, 0
        (self.seed, self.first), self.autoreset = (seed, first), autoreset
        mode = gymnasium.vector.AutoresetMode
        self.metadata = {"autoreset_mode": mode.SAME_STEP if autoreset else mode.DISABLED}
        for name, value in describe(env_id, batch, action_history).items():
            setattr(self, name, value)
        batch_space = gymnasium.vector.utils.batch_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(batch_space(self.single_action_space, chunk), num_envs)
        self._discrete = isinstance(self.single_action_space, gymnasium.spaces.Discrete)
        # per environment as in `Envs`: see the table there
        self._restarts = np.zeros(num_envs, np.int64)
        self._fresh, self._ended = np.ones(num_envs, bool), np.ones(num_envs, bool)
        self._lost = np.zeros(num_envs, bool)
        self._shared = {"task_weights": np.zeros(len(self.instructions))}
        width = 0 if self._discrete else self.single_action_space.shape[0]
        self._history = torch.zeros(num_envs, action_history, width, device=device)
        self._return = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self._length = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._obs = {
            key: torch.as_tensor(np.zeros((num_envs, *space.shape), space.dtype), device=device)
            for key, space in self.single_observation_space.spaces.items()
        }

    def close_extras(self, **kwargs):
        self.batch.close()

    def _tensor(self, array):
        return torch.as_tensor(array, device=self.device)

    def _refuse(self, what):
        raise UserError(f"environment {self.env_id!r} gave {what}; it has to be mended there.")

    # ---------------------------------------------------------------------------------------- reset and step

    def reset(self, seeds=None, mask=None):
        """As `Envs.reset`."""
        self._idle()
        mask = self._rows(mask)
        seeds = self._seeds(seeds, mask)
        self._ended |= mask  # whatever ran there is given up, not lost
        self._lost &= ~mask
        if mask.any():
            self._begin(mask, seeds)
        self._ended &= ~mask
        self._fresh &= ~mask
        return dict(self._obs)

    def _begin(self, mask, seeds=None):
        rows, weights = np.flatnonzero(mask).tolist(), self._shared["task_weights"]
        options = {"task_weights": weights.copy()} if weights.any() else None
        self.batch.reset({i: self._next_seed(i) if seeds is None else int(seeds[i]) for i in rows}, options)
        rows = self._tensor(mask)
        self._history[rows], self._return[rows], self._length[rows] = 0.0, 0.0, 0
        self._show(mask)

    def _show(self, mask):
        """Take the observations of these rows; the others' stay as they were shown."""
        found, spaces = self.batch.observe(), self.batch.observation_space.spaces
        if found.keys() != spaces.keys():
            self._refuse(f"observations of {sorted(found)}, which are {sorted(spaces)} in its space")
        for key, value in found.items():
            has, wants = (str(value.dtype)[6:], tuple(value.shape)), (self.num_envs, *spaces[key].shape)
            if has != (spaces[key].dtype.name, wants):
                self._refuse(f"{key!r} as {has[0]} {has[1]} instead of {spaces[key].dtype.name} {wants}")
        rows = self._tensor(mask)
        if not (found["proprio"].abs() <= LARGEST)[rows].all():
            self._refuse("'proprio' that is NaN or infinite")
        if self._history.numel():
            found["proprio"] = torch.cat([found["proprio"], self._history.flatten(1)], 1)
        for key, value in found.items():
            chosen = rows.view(-1, *[1] * (value.ndim - 1))
            self._obs[key] = torch.where(chosen, value, self._obs[key])

    def _actions(self, actions, mask):
        """Checked as by `Envs.step_async` -> on the device, clipped."""
        actions, space = self._tensor(actions), self.single_action_space
        shape, floats = (self.num_envs, self.chunk, *space.shape), actions.is_floating_point()
        if tuple(actions.shape) != shape or (self._discrete and floats) or actions.dtype == torch.bool:
            kind = "integers" if self._discrete else "floats"
            raise ValueError(f"actions must be {kind} {shape}, got {actions.dtype} {tuple(actions.shape)}")
        bad = (actions < 0) | (actions >= space.n) if self._discrete else ~actions.isfinite()
        bad = bad.flatten(1).any(1).cpu().numpy() & mask
        if bad.any():
            what = f"outside [0, {space.n - 1}]" if self._discrete else "NaN or infinite"
            raise ValueError(f"actions of environments {np.flatnonzero(bad).tolist()} are {what}")
        return actions if self._discrete else actions.float().clamp(-1, 1)

    def step(self, actions, mask=None, record=None):
        """As `Envs.step`."""
        self._idle()
        mask = self._rows(mask)
        actions = self._actions(actions, mask)
        self._check_running(mask)
        record = mask & (np.zeros(self.num_envs, bool) if record is None else self._rows(record, "record"))
        move, frames = mask & ~self._lost, {int(i): [] for i in np.flatnonzero(record)}
        moving, reward = self._tensor(move), torch.zeros_like(self._return)
        steps, terminated = torch.zeros_like(self._length), torch.zeros_like(moving)
        truncated, success = terminated, terminated
        for action in actions.unbind(1):  # nothing is asked of the device, which need not be waited for
            gained, end, cut, good = self.batch.advance(action, moving)
            reward = reward + torch.where(moving, gained, 0.0)
            steps = steps + moving
            terminated, truncated, success = (
                torch.where(moving, now, before)
                for now, before in ((end, terminated), (cut & ~end, truncated), (good, success))
            )
            if self._history.numel():
                later = torch.cat([self._history[:, 1:], action[:, None]], 1)
                self._history = torch.where(moving[:, None, None], later, self._history)
            for i in np.flatnonzero(record & moving.cpu().numpy()) if record.any() else ():
                frames[int(i)].append(np.array(self.batch.render(int(i))))
            moving = moving & ~(end | cut)
        self._return, self._length = self._return + reward, self._length + steps
        told = (reward, terminated, truncated, success, steps, self._return, self._length)
        told = dict(zip(COLUMNS, torch.stack([x.double() for x in told]).cpu().numpy(), strict=True))
        if not (np.abs(told["rewards"]) <= LARGEST).all():
            self._refuse("a reward that is NaN or infinite")
        told = {name: x.astype(OUTCOME[name]) for name, x in told.items()}
        ended = told["terminated"] | told["truncated"]
        read = told["truncated"] & self.autoreset | ~ended  # elsewhere nobody reads the picture
        shown = move & (read if "image" in self._obs else True)
        if shown.any():
            self._show(shown)
        obs = final_obs = dict(self._obs)
        if self.autoreset and ended.any():
            self._begin(ended)
            obs = dict(self._obs)
        if not self.autoreset:
            self._ended |= ended
        info = {name: told[name] for name in ("steps", "success", "episode_return", "episode_length")}
        info |= {"lost": self._lost.copy(), "restarted": np.zeros(self.num_envs, bool)}
        self._lost[:] = False
        info |= {"final_obs": final_obs, "frames": frames}
        return obs, told["rewards"], told["terminated"], told["truncated"], info

    # ---------------------------------------------------------------------------------------- exact resume

    def _saved(self):
        """What `get_state` holds beside the batch's own: by name, all of it (N, ...) arrays or tensors."""
        own = {name: getattr(self, f"_{name}") for name in ("restarts", "fresh", "ended", "lost")}
        own |= {name: getattr(self, f"_{name}") for name in ("history", "return", "length")}
        return own | {"task_weights": self._shared["task_weights"]}

    def get_state(self) -> dict:
        """As `Envs.get_state`: in the host's memory, of plain values and arrays."""
        self._idle()
        state = {"lost_episodes": self.lost_episodes}
        state["batch"] = self.batch.get_state() if hasattr(self.batch, "get_state") else None
        state |= {name: torch.as_tensor(x).cpu().numpy().copy() for name, x in self._saved().items()}
        return state | {"obs": {key: x.cpu().numpy().copy() for key, x in self._obs.items()}}

    def set_state(self, state: dict) -> dict:
        """As `Envs.set_state`: without the batch's own state all running episodes start anew, and are told as
        lost. Raises ValueError for another num_envs."""
        self._idle()
        if (saved := len(state["ended"])) != self.num_envs:
            raise ValueError(
                f"the state is of {saved} environments, not {self.num_envs}: use num_envs={saved}"
            )
        places = {name: (x, state[name]) for name, x in self._saved().items()}
        places |= {key: (x, state["obs"][key]) for key, x in self._obs.items()}
        for name, (place, value) in places.items():
            value = torch.as_tensor(np.array(value))
            has, wants = (value.dtype, value.shape), (torch.as_tensor(place).dtype, place.shape)
            if has != wants:
                raise ValueError(f"the state's {name} is {has[0]} {has[1]}, not {wants[0]} {wants[1]}")
            if name in self._obs:
                self._obs[name] = self._tensor(value).clone()
            elif isinstance(place, np.ndarray):
                place[:] = value.numpy()
            else:
                setattr(self, f"_{name}", self._tensor(value).clone())
        self.lost_episodes = int(state["lost_episodes"])
        if state["batch"] is not None:
            self.batch.set_state(state["batch"])
            return dict(self._obs)
        self._restarts += ~self._fresh
        self._fresh[:] = True
        if (gone := ~self._ended).any():
            self.lost_episodes += int((gone & ~self._lost).sum())  # the rest were counted before the save
            self.reset(mask=gone)
            self._lost |= gone
        return dict(self._obs)
