"""Vectorised environments in worker processes; the wrapper that executes an action chunk lives in the worker.

The parent holds of each environment, a row, what its worker cannot tell once it is dead:

| `Envs.`    | bool (N,), true from                                | to                                   |
| ---------- | --------------------------------------------------- | ------------------------------------ |
| `_fresh`   | its construction, in the first process or a new one | its first reset, which needs a seed  |
| `_ended`   | its construction, and without autoreset its end     | its reset: there is nothing to step  |
| `_lost`    | the death of a worker in which its episode ran      | the next step, which tells of it     |
| `_rebuilt` | its construction in a new process                   | the next step, which tells of it     |

`_restarts` counts its processes: with seed and number it is what the seed after a death follows from.
"""

import contextlib
import importlib
import itertools
import mmap
import multiprocessing
import os
import signal
import socket
import struct
import sys
import tempfile
import traceback
import warnings
from multiprocessing import reduction

import gymnasium
import numpy as np

from common import UserError, forkserver
from common.memory import available_cores

START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
MAX_DEATHS, GOOD_STEPS = 3, 100  # a worker may die 3 times; 100 good steps clear its record
OUTCOME = {"rewards": np.float32, "terminated": bool, "truncated": bool, "success": bool, "steps": np.int64}
OUTCOME |= {"episode_return": np.float64, "episode_length": np.int64, "tells_success": bool}
LARGEST = float(np.finfo(np.float32).max)  # beyond it, float32 is infinite


def vectorize(
    world: tuple, num_envs: int, *, seed: int, first: int = 0, chunk: int = 1,
    num_workers: int | None = None, autoreset: bool = True, action_history: int = 0, timeout: float = 600.0,
) -> "Envs":  # fmt: skip
    """`num_envs` copies of `world`: its name, its module and what the module's `make` is called with.

    first: their first number, from which their seeds follow, where other processes have those before.
    chunk: actions executed open loop in one `step`. num_workers: processes, None for one a core, 0 for this
    process (an environment's exception then simply propagates). autoreset: True resets in the step that ends
    an episode (SAME_STEP), False waits for `reset(mask=...)` (DISABLED). action_history: this many last
    actions, oldest first, zeros at reset, are appended to `proprio`. timeout: a worker that does not answer
    for so many seconds counts as dead, 0 for never. Results do not depend on `num_workers`. Raises UserError,
    one sentence.
    """
    least = {"num_envs": (num_envs, 1), "chunk": (chunk, 1), "action_history": (action_history, 0)}
    least["timeout"] = (timeout, 0)
    for name, (value, low) in (least | {"num_workers": (num_workers or 0, 0), "seed": (seed, 0)}).items():
        if not value >= low:
            raise UserError(f"{name} must be at least {low}, got {value}")
    workers = min(num_envs, available_cores() if num_workers is None else num_workers)
    return Envs(world, num_envs, (seed, first), chunk, workers, autoreset, action_history, timeout)


def _build(env_id, module, kwargs):
    try:
        return importlib.import_module(module).make(**kwargs)
    except ImportError as error:
        raise UserError(f"environment {env_id!r} needs something that is not installed: {error}") from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"environment {env_id!r} does not take these arguments: {error}") from error


def _check_contract(name, env):
    """UserError for a world that breaks the contract of `common.envs` in what can be seen before it moves."""
    spaces, action = env.observation_space.spaces, env.action_space
    image, proprio = spaces.get("image"), spaces.get("proprio")
    width = action.shape[0] if action.shape else 1
    names = getattr(env, "action_names", None)
    wrong = {
        "its observations need 'proprio', float32 (P,)": proprio is None
        or (proprio.dtype, len(proprio.shape)) != (np.float32, 1),
        "'image' must be uint8 (cameras, H, W, 3)": image is not None
        and (image.dtype, len(image.shape), image.shape[-1]) != (np.uint8, 4, 3),
        "observations with 'image' need 'task' too": image is not None and "task" not in spaces,
        f"active_dims must be bool ({width},)": np.shape(env.active_dims) != (width,),
        "instructions must be a list of texts": not all(isinstance(text, str) for text in env.instructions),
        "action_names must be a word for each action": names is not None
        and (len(names) != getattr(action, "n", 0) or not all(isinstance(x, str) and x for x in names)),
    }
    if found := [sentence for sentence, is_so in wrong.items() if is_so]:
        raise UserError(f"environment {name!r} breaks the contract in common/envs/__init__.py: {found[0]}")


def describe(name, env, action_history):
    """What a vector environment tells of the worlds `env` that it holds, by attribute. UserError for one that
    breaks the contract."""
    _check_contract(name, env)
    spaces, obs_space = gymnasium.spaces, dict(env.observation_space.spaces)
    if action_history and isinstance(env.action_space, spaces.Discrete):
        raise UserError(f"action_history needs continuous actions: {name!r} has discrete ones")
    if action_history:
        box, size = obs_space["proprio"], action_history * env.action_space.shape[0]
        low, high = np.r_[box.low, -np.ones(size)], np.r_[box.high, np.ones(size)]
        obs_space["proprio"] = spaces.Box(low.astype(np.float32), high.astype(np.float32))
    spec = {"single_observation_space": spaces.Dict(obs_space), "single_action_space": env.action_space}
    spec |= {"instructions": list(env.instructions), "has_success": bool(env.has_success)}
    spec |= {"active_dims": np.array(env.active_dims, bool)}
    optional = "dataset", "action_bounds", "action_names", "training_instructions"
    spec |= {key: getattr(env, key, None) for key in optional}
    return spec | {"draws_tasks": bool(getattr(env, "draws_tasks", False))}


def as_array(value):
    """Any value as an array; lists of different lengths as one of no numbers, which `_Slice` refuses."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.empty(0, object)


# --------------------------------------------------------------------------------------------- in the worker


class _Slice:
    """Environments [start, stop) of the batch, in whatever process holds them, and their chunk wrapper."""

    def __init__(self, world, start, stop, num_envs, chunk, autoreset, action_history):
        self.rows, self.num_envs, self.chunk, self.autoreset = range(start, stop), num_envs, chunk, autoreset
        self.name, self.envs = world[0], [_build(*world) for _ in self.rows]
        env = self.envs[0]
        self.spec, self.own_spaces = describe(self.name, env, action_history), env.observation_space.spaces
        self.keys = tuple(self.spec["single_observation_space"].spaces)
        self.discrete = isinstance(env.action_space, gymnasium.spaces.Discrete)
        width = 0 if self.discrete else env.action_space.shape[0]
        self.history = [np.zeros((action_history, width), np.float32) for _ in self.rows]
        self.returns, self.lengths = [0.0] * len(self.rows), [0] * len(self.rows)
        self.started = [False] * len(self.rows)  # reset at least once, so that there is a state to save

    def attach(self, fd=-1):
        """Maps the arrays that parent and worker share: in the file `fd`, or in this process."""
        self.shared = _map_arrays(self.spec, self.num_envs, self.chunk, fd)

    def _refuse(self, what, step):
        when = f"at step {step} of an episode" if step else "at an episode's reset"
        raise UserError(f"environment {self.name!r} gave {what} {when}; it has to be mended there.")

    def _parts(self, found, wanted, step):
        """What a world returned, as many values as `wanted` names."""
        if not isinstance(found, (tuple, list)) or len(found) != len(wanted.split(", ")):
            has = f"{len(found)} values" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
            self._refuse(f"{has} instead of {wanted}", step)
        if not isinstance(found[-1], dict):
            self._refuse(f"info as a {type(found[-1]).__name__} instead of a dict", step)
        return found

    def _write(self, j, obs):
        """Shows the parent an observation, once it is what the space says, and finite: assigned to the shared
        arrays, any shape and type would fit, and a NaN would end up in weights and replays."""
        step = self.lengths[j]
        if not isinstance(obs, dict) or obs.keys() != self.own_spaces.keys():
            has = sorted(map(str, obs)) if isinstance(obs, dict) else type(obs).__name__
            self._refuse(f"observations of {has}, which are {sorted(self.own_spaces)} in its space,", step)
        for key, value in obs.items():
            space, value = self.own_spaces[key], as_array(value)
            dtype, floats = space.dtype, space.dtype.kind == "f"
            # nothing is rounded, wrapped or parsed: one kind, and not wider, but for floats (see the range)
            fits = value.dtype == dtype or (
                value.dtype.kind == dtype.kind and (floats or np.can_cast(value.dtype, dtype))
            )
            if value.shape != space.shape or not fits:
                wants = f"{dtype} {space.shape}, as its space says,"
                self._refuse(f"{key!r} as {value.dtype} {value.shape} instead of {wants}", step)
            if floats and not (np.abs(value) <= LARGEST).all():
                self._refuse(f"{key!r} that is NaN or infinite", step)
            if key == "proprio" and self.history[j].size:
                value = np.concatenate([value, self.history[j].ravel()])
            self.shared[f"obs/{key}"][self.rows[j]] = value

    def _begin(self, j, seed):
        weights = self.shared["task_weights"][self.rows[j]]
        options = {"options": {"task_weights": weights.copy()}} if weights.any() else {}
        obs, _ = self._parts(self.envs[j].reset(seed=seed, **options), "obs, info", 0)
        self.history[j][:], self.returns[j], self.lengths[j], self.started[j] = 0.0, 0.0, 0, True
        self._write(j, obs)

    def reset(self, seeds: dict):
        """seeds: row -> seed, or None to go on with the environment's own random state."""
        for row, seed in seeds.items():
            self._begin(row - self.rows.start, seed)

    def step(self, rows: list, record: list):
        """Executes the chunk of each of `rows`; {row: frames} for those of `record`."""
        frames, shared = {}, self.shared
        for row in self.rows:  # the running totals of the environments that do not move are told too
            j = row - self.rows.start
            shared["episode_return"][row], shared["episode_length"][row] = self.returns[j], self.lengths[j]
        for row in rows:
            j, reward, steps, shots = row - self.rows.start, 0.0, 0, []
            env, history = self.envs[j], self.history[j]
            for chosen in shared["actions"][row].copy():
                action = int(chosen) if self.discrete else chosen
                found, steps = env.advance(action), steps + 1
                step_reward, terminated, truncated, info = self._parts(
                    found, "reward, terminated, truncated, info", self.lengths[j] + steps
                )
                for end in (terminated, truncated):
                    if np.ndim(end) or end not in (0, 1):
                        self._refuse(f"an end that is {end!r} instead of a bool", self.lengths[j] + steps)
                try:
                    reward += float(step_reward)
                except (TypeError, ValueError):
                    self._refuse(f"a reward of type {type(step_reward).__name__}", self.lengths[j] + steps)
                if not abs(reward) <= LARGEST:
                    self._refuse("a reward that is NaN or infinite", self.lengths[j] + steps)
                if history.size:
                    history[:-1], history[-1] = history[1:].copy(), action
                if row in record:
                    shots.append(np.array(env.render()))
                if terminated or truncated:
                    break
            if row in record:
                frames[row] = shots
            self.returns[j] += reward
            self.lengths[j] += steps
            shared["rewards"][row], shared["steps"][row] = reward, steps
            shared["terminated"][row], shared["truncated"][row] = terminated, truncated and not terminated
            if self.spec["has_success"] and "success" not in info:
                raise UserError(
                    f"environment {self.name!r} has has_success, but its info has no 'success' after a step; "
                    "tell it there, or set has_success to False."
                )
            if np.ndim(success := info.get("success", False)):
                self._refuse(f"success of shape {np.shape(success)} instead of a bool", self.lengths[j])
            shared["success"][row], shared["tells_success"][row] = success, "success" in info
            shared["episode_return"][row], shared["episode_length"][row] = self.returns[j], self.lengths[j]
            ended = terminated or truncated
            if not ended or "image" not in self.keys or (self.autoreset and not terminated):
                self._write(j, env.observe())  # elsewhere nobody reads the picture
            if ended and self.autoreset:
                for key in self.keys:
                    shared[f"final/{key}"][row] = shared[f"obs/{key}"][row]
                self._begin(j, None)
        return frames

    def get_state(self):
        can = [
            started and hasattr(env, "get_state")
            for started, env in zip(self.started, self.envs, strict=True)
        ]
        return [
            {"env": env.get_state() if can[j] else None, "history": self.history[j].copy(),
             "return": self.returns[j], "length": self.lengths[j]}
            for j, env in enumerate(self.envs)
        ]  # fmt: skip

    def set_state(self, states):
        """Whether each environment could be restored; those that could not have to be reset."""
        for j, state in enumerate(states):
            if state["env"] is not None:
                if not self.started[j]:
                    self.envs[j].reset(seed=0)
                self.envs[j].set_state(state["env"])
                self.history[j][:] = np.asarray(state["history"])
                self.returns[j], self.lengths[j] = float(state["return"]), int(state["length"])
                self.started[j] = True
        return [state["env"] is not None for state in states]

    def close(self):
        for env in self.envs:
            env.close()


def _map_arrays(spec, num_envs, chunk, fd):
    """One block of memory as named arrays (num_envs, ...); the layout follows from the arguments alone."""
    action = spec["single_action_space"]
    fields = {name: ((num_envs,), dtype) for name, dtype in OUTCOME.items()}
    fields["actions"] = ((num_envs, chunk, *action.shape), action.dtype)
    fields["task_weights"] = ((num_envs, len(spec["instructions"])), np.dtype(float))  # 0: all alike
    for key, space in spec["single_observation_space"].spaces.items():
        fields[f"obs/{key}"] = fields[f"final/{key}"] = ((num_envs, *space.shape), space.dtype)
    offset, offsets = 0, {}
    for name, (shape, dtype) in fields.items():
        offsets[name] = offset
        offset += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64  # aligned to a cache line
    if fd >= 0:
        os.ftruncate(fd, offset)
    block = mmap.mmap(fd, offset)
    return {k: np.ndarray(shape, dtype, block, offsets[k]) for k, (shape, dtype) in fields.items()}


def _work(conn, *args):
    """The worker: answers (True, value), or (False, (UserError's sentence or None, traceback)) and ends."""
    parent = os.getppid()  # the fork server, or whose worker it is
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also of the whole process group (slurm, systemd)

    def send(message):
        try:
            conn.send(message)
        except OSError:
            os._exit(1)  # nobody listens any more

    try:
        held = _Slice(*args)
        send((True, held.spec))
        while True:
            try:
                while not conn.poll(1.0):
                    if os.getppid() != parent:
                        os._exit(1)
                command, payload = conn.recv()
            except (EOFError, OSError):
                break
            if command == "close":
                break
            if command == "attach":
                payload = (reduction.recv_handle(conn),)
            send((True, getattr(held, command)(*payload)))
            if command == "attach":
                os.close(payload[0])
        held.close()
    except BaseException as error:  # noqa: BLE001 (it travels to the parent)
        send((False, (str(error) if isinstance(error, UserError) else None, traceback.format_exc())))


# --------------------------------------------------------------------------------------------- in the parent


def _list(mask):
    return np.flatnonzero(mask).tolist()


class _Worker:
    """The parent's end of the process of environments [start, stop); with num_workers=0 the slice itself."""

    def __init__(self, start, stop):
        self.start, self.stop, self.deaths, self.good_steps = start, stop, 0, 0
        self.process = self.conn = self.local = self.reply = None
        self.due = 0.0  # when its answer is, on the clock of `Envs._waited`


class _Death(Exception):
    def __init__(self, reason, sentence=None, hung=False):
        super().__init__(reason)
        self.sentence = sentence  # of the UserError that ended the worker
        self.kind = (
            UserError if hung else RuntimeError
        )  # of a worker that hangs there is no traceback to show


class Envs(gymnasium.vector.VectorEnv):
    """The vector environment; see `vectorize`.

    Attributes: num_envs, chunk, num_workers, single_observation_space, single_action_space, instructions,
    active_dims, has_success (also of a world that does not say so, once a step has told one), draws_tasks,
    dataset, action_bounds, and lost_episodes: running episodes that died with a worker or could not be
    restored.
    """

    def __init__(self, world, num_envs, seed, chunk, num_workers, autoreset, action_history, timeout):
        self._workers, self._fd, self._pid = [], -1, os.getpid()
        self.timeout, self._waited = timeout or np.inf, 0.0  # seconds that it waited for any worker, so far
        self.env_id, self.num_envs, self.chunk, self.num_workers = world[0], num_envs, chunk, num_workers
        (self.seed, self.first), self.autoreset, self.lost_episodes = seed, autoreset, 0
        mode = gymnasium.vector.AutoresetMode
        self.metadata = {"autoreset_mode": mode.SAME_STEP if autoreset else mode.DISABLED}
        self._args = (num_envs, chunk, autoreset, action_history)
        self._world = world
        self._restarts = np.zeros(num_envs, np.int64)
        self._fresh = np.ones(num_envs, bool)  # built and never seeded
        self._ended = np.ones(num_envs, bool)  # no running episode: has to be reset
        self._lost = np.zeros(num_envs, bool)  # lost since the last step, and not yet told
        self._rebuilt = np.zeros(num_envs, bool)
        self._outstanding, self._frames = None, {}
        edges = np.linspace(0, num_envs, max(num_workers, 1) + 1).astype(int).tolist()
        self._workers = [_Worker(*edge) for edge in itertools.pairwise(edges)]
        try:
            if num_workers == 0:
                worker = self._workers[0]
                worker.local = _Slice(world, 0, num_envs, *self._args)
                worker.local.attach()
                spec, self._shared = worker.local.spec, worker.local.shared
            else:
                for worker in self._workers:
                    self._start(worker)
                spec, *_ = [self._receive(worker) for worker in self._workers]
                # A file without a name: nothing stays behind in /dev/shm, however this process ends.
                if hasattr(os, "memfd_create"):
                    self._fd = os.memfd_create("envs")
                else:
                    with tempfile.TemporaryFile() as file:
                        self._fd = os.dup(file.fileno())
                self._shared = _map_arrays(spec, num_envs, chunk, self._fd)
                for worker in self._workers:
                    self._attach(worker)
        except BaseException as error:
            self.close()
            if not isinstance(error, _Death):
                raise
            if error.sentence:
                raise UserError(error.sentence) from None
            raise error.kind(f"a worker of {self.env_id!r} could not start: {error}") from None
        for name, value in spec.items():
            setattr(self, name, value)
        self._obs_keys = list(self.single_observation_space.spaces)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        batch_action = gymnasium.vector.utils.batch_space(self.single_action_space, chunk)
        self.action_space = gymnasium.vector.utils.batch_space(batch_action, num_envs)

    # ---------------------------------------------------------------------------------------- processes

    def _start(self, worker):
        worker.conn, child = multiprocessing.Pipe()
        args = (self._world, worker.start, worker.stop, *self._args)
        if START_METHOD == "forkserver":
            worker.process = forkserver.Process(self._world[1], child, _work, args)
        else:
            context = multiprocessing.get_context(START_METHOD)
            worker.process = context.Process(target=_work, args=(child, *args), daemon=True)
            worker.process.start()
        child.close()
        worker.due = self._waited + self.timeout
        if self.timeout < 1e9 and sys.platform != "win32":  # for a worker that hangs amid a message
            seconds = struct.pack("ll", int(self.timeout), int(self.timeout % 1 * 1e6))
            with socket.socket(fileno=os.dup(worker.conn.fileno())) as end:
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    end.setsockopt(socket.SOL_SOCKET, option, seconds)

    def _attach(self, worker):
        self._send(worker, "attach")
        with contextlib.suppress(OSError):  # it died: `_receive` will say so
            reduction.send_handle(worker.conn, self._fd, worker.process.pid)
        self._receive(worker)

    def _send(self, worker, command, *payload):
        if worker.local:
            worker.reply = getattr(worker.local, command)(*payload)
            return
        worker.due = self._waited + self.timeout
        with contextlib.suppress(OSError):
            worker.conn.send((command, payload))

    def _receive(self, worker):
        """The worker's answer. Raises _Death if it ended, or is silent beyond `timeout`: counted in naps, so
        that time in which this process itself was stopped (Ctrl-Z) does not count."""
        if worker.local:
            return worker.reply
        try:
            while not worker.conn.poll(nap := min(1.0, max(worker.due - self._waited, 0.0))):
                self._waited += nap
                if not worker.process.is_alive() and not worker.conn.poll():
                    raise EOFError
                if self._waited >= worker.due:
                    raise BlockingIOError
            good, value = worker.conn.recv()
        except BlockingIOError:
            raise _Death(f"no answer for {self.timeout:g} s (--worker-timeout)", hung=True) from None
        except (EOFError, OSError):
            worker.process.join(10)
            code = worker.process.exitcode
            name = signal.Signals(-code).name if code is not None and code < 0 else None
            raise _Death(f"killed by {name}" if name else f"exit code {code}") from None
        if not good:
            raise _Death(value[1].strip(), sentence=value[0])
        return value

    def _ask(self, command, payload, workers=None):
        """`command(*payload(worker))` in all workers at once; one that dies is restarted and asked again."""
        workers, replies = self._workers if workers is None else workers, []
        for worker in workers:
            self._send(worker, command, *payload(worker))
        for worker in workers:
            while True:
                try:
                    replies.append(self._receive(worker))
                    break
                except _Death as death:
                    self._restart(worker, death)
                    self._send(worker, command, *payload(worker))
        return replies

    def _restart(self, worker, death):
        """Rebuilds the environments of a dead worker and resets those that ran; `self._lost` tells them."""
        rows = slice(worker.start, worker.stop)
        running = ~self._ended[rows]
        self._lost[rows] |= running
        self._rebuilt[rows] = True
        self.lost_episodes += int(running.sum())
        while True:
            if death.sentence:  # a UserError: it would come again
                self.close()
                raise UserError(death.sentence) from None
            self._stop(worker)
            if worker.deaths >= MAX_DEATHS:
                self.close()
                times = f"{worker.deaths + 1} times"
                raise death.kind(f"a worker of {self.env_id!r} died {times}: {death}") from None
            worker.deaths, worker.good_steps = worker.deaths + 1, 0
            self._restarts[rows] += 1
            self._fresh[rows] = True
            what = f"the worker of environments {worker.start} to {worker.stop - 1} was restarted"
            why = f"{self.lost_episodes} episodes lost so far: {str(death).splitlines()[-1]}"
            warnings.warn(f"{what}, {why}", RuntimeWarning, stacklevel=3)
            try:
                self._start(worker)
                self._receive(worker)
                self._attach(worker)
                lost = (worker.start + np.flatnonzero(running)).tolist()
                self._send(worker, "reset", {row: self._next_seed(row) for row in lost})
                self._receive(worker)
                break
            except _Death as error:
                death = error
        self._fresh[rows] &= ~running
        for name in OUTCOME:
            self._shared[name][rows] = 0

    def _next_seed(self, row):
        """The seed of an environment that has none yet, else None: its own random state goes on."""
        if not self._fresh[row]:
            return None
        entropy = [self.seed, self.first + int(row), int(self._restarts[row])]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _stop(self, worker):
        worker.process.kill()
        worker.process.join(10)  # a hung driver may hold it beyond death
        worker.conn.close()
        worker.conn = None

    def close_extras(self, **kwargs):
        """Ends the workers, also in the middle of a step."""
        if os.getpid() != self._pid:
            return  # a forked copy of this object
        workers = [worker for worker in self._workers if worker.conn]
        for worker in workers:
            self._send(worker, "close")
            worker.conn.close()
        for worker in workers:
            worker.process.join(2)
            self._stop(worker)
        for worker in self._workers:
            if worker.local:
                worker.local.close()
        if self._fd >= 0:
            os.close(self._fd)
        self._workers, self._fd, self._outstanding = [], -1, None

    def __del__(self):
        if hasattr(self, "_workers") and not sys.is_finalizing():
            self.close()

    # ---------------------------------------------------------------------------------------- reset and step

    def _idle(self):
        if self.closed:
            raise RuntimeError("the environments are closed")
        if self._outstanding is not None:
            raise RuntimeError("a step is in flight: call step_wait first")

    def _copy(self):
        return {key: self._shared[f"obs/{key}"].copy() for key in self._obs_keys}

    def _rows(self, mask, name="mask"):
        mask = np.ones(self.num_envs, bool) if mask is None else np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"{name} must be bool ({self.num_envs},), got {mask.dtype} {mask.shape}")
        return mask

    def _seeds(self, seeds, mask):
        if seeds is not None:
            seeds = np.asarray(seeds)
            if seeds.shape != (self.num_envs,) or seeds.dtype.kind not in "iu" or (seeds[mask] < 0).any():
                raise ValueError(f"seeds must be {self.num_envs} ints >= 0, got {seeds.dtype} {seeds.shape}")
        return seeds

    def _check_running(self, mask):
        if (mask & self._ended).any():
            raise ValueError(f"environments {_list(mask & self._ended)} have no running episode: reset them")

    def reset(self, seeds=None, mask=None):
        """First observations, each array (N, ...), a fresh copy.

        seeds: ints (N,), one an environment; without them each goes on with its own random state, which
        begins from `SeedSequence([seed, first + i, 0])`. mask: bool (N,), the environments to reset; the
        others' episodes go on.
        """
        self._idle()
        mask = self._rows(mask)
        seeds = self._seeds(seeds, mask)
        self._ended |= mask  # whatever ran there is given up, not lost
        self._lost &= ~mask

        def payload(worker):
            rows = range(worker.start, worker.stop)
            return ({i: self._next_seed(i) if seeds is None else int(seeds[i]) for i in rows if mask[i]},)

        self._ask("reset", payload, [w for w in self._workers if mask[w.start : w.stop].any()])
        self._ended &= ~mask
        self._fresh &= ~mask
        return self._copy()

    def draw_tasks(self, weights):
        """From now on a reset draws its task with `weights`, floats >= 0, one an instruction, that need not
        add up to 1. For worlds with `draws_tasks`."""
        self._idle()
        self._shared["task_weights"][:] = weights

    def step_async(self, actions, mask=None, record=None):
        """Sends the chunks off; see `step`."""
        self._idle()
        space, mask = self.single_action_space, self._rows(mask)
        actions = np.asarray(actions.cpu() if hasattr(actions, "cpu") else actions)
        shape, discrete = (self.num_envs, self.chunk, *space.shape), space.shape == ()
        if actions.shape != shape or actions.dtype.kind not in ("iu" if discrete else "fiu"):
            kind = "integers" if discrete else "floats"
            raise ValueError(f"actions must be {kind} {shape}, got {actions.dtype} {actions.shape}")
        bad = ~np.isfinite(actions) if not discrete else (actions < 0) | (actions >= space.n)
        if bad[mask].any():
            what = f"outside [0, {space.n - 1}]" if discrete else "NaN or infinite"
            rows = bad.reshape(self.num_envs, -1).any(1) & mask
            raise ValueError(f"actions of environments {_list(rows)} are {what}")
        self._check_running(mask)
        record = mask & (np.zeros(self.num_envs, bool) if record is None else self._rows(record, "record"))
        move = mask & ~self._lost  # an episode lost since the last step is told first
        for name in ("rewards", "terminated", "truncated", "success", "steps"):
            self._shared[name][:] = 0
        self._shared["actions"][:] = actions if discrete else actions.clip(space.low, space.high)
        self._frames = {int(i): [] for i in np.flatnonzero(record)}
        self._outstanding = list(self._workers)
        for w in self._workers:
            rows = [w.start + int(j) for j in np.flatnonzero(move[w.start : w.stop])]
            self._send(w, "step", rows, [i for i in rows if record[i]])

    def step_wait(self):
        """Collects what `step_async` sent off; see `step`."""
        if self._outstanding is None:
            raise RuntimeError("no step is in flight: call step_async first")
        while self._outstanding:
            worker = self._outstanding[0]
            try:
                self._frames |= self._receive(worker)
                worker.good_steps += 1
                if worker.good_steps >= GOOD_STEPS:
                    worker.deaths = 0
            except _Death as death:
                self._restart(worker, death)
            self._outstanding.pop(0)
        self._outstanding = None
        out = {name: self._shared[name].copy() for name in OUTCOME}
        self.has_success |= bool(out["tells_success"].any())
        obs, done = self._copy(), out["terminated"] | out["truncated"]
        final_obs = {key: value.copy() for key, value in obs.items()}
        if self.autoreset:
            for key, value in final_obs.items():
                value[done] = self._shared[f"final/{key}"][done]
        else:
            self._ended |= done
        info = {name: out[name] for name in ("steps", "success", "episode_return", "episode_length")}
        info |= {"lost": self._lost.copy(), "restarted": self._rebuilt.copy()}
        info |= {"final_obs": final_obs, "frames": self._frames}
        self._lost[:], self._rebuilt[:] = False, False
        return obs, out["rewards"], out["terminated"], out["truncated"], info

    def step(self, actions, mask=None, record=None):
        """Executes a chunk in each environment, open loop, until its episode ends.

        actions: float32 (N, K, A), clipped to [-1, 1], or ints (N, K) for Discrete actions, an array or a
        tensor. mask: bool (N,), the environments to step. record: bool (N,), those to render after each
        executed step.

        Returns obs (where autoreset acted, the next episode's first), rewards float32 (N,) summed over the
        chunk, terminated and truncated bool (N,) (never both) and info, arrays (N,) unless said otherwise:
        `steps` executed; `success`; `final_obs`, like obs, but the episode's last where it ended;
        `episode_return`, `episode_length` so far; `lost`, the running episode died with its worker, obs is
        the first of a new one (0 steps, for any mask); `restarted`, rebuilt since the last step; `frames`,
        {row: list of uint8 (H, W, 3)}. Pictures are rendered only where they are read: with `image` in obs,
        an episode's last observation is its end after a truncation with autoreset, whose value is
        bootstrapped, and otherwise the one that its last chunk was chosen from. Raises ValueError for bad
        actions, RuntimeError when a worker keeps dying.
        """
        self.step_async(actions, mask, record)
        return self.step_wait()

    # ---------------------------------------------------------------------------------------- exact resume

    def get_state(self) -> dict:
        """All that stepping needs to go on bit-identically, in plain Python and numpy containers."""
        self._idle()
        envs = list(itertools.chain(*self._ask("get_state", lambda worker: ())))
        names = ("restarts", "fresh", "ended", "lost", "rebuilt")
        own = {name: getattr(self, f"_{name}").copy() for name in names}
        own |= {"obs": self._copy(), "task_weights": self._shared["task_weights"].copy()}
        return {"envs": envs, "lost_episodes": self.lost_episodes} | own

    def set_state(self, state: dict) -> dict:
        """Goes on from `get_state` of an equal Envs (any num_workers); returns the current obs.

        Environments that cannot save their state start a new episode from a seed, counted in `lost_episodes`
        and told as `lost` by the next step. Raises ValueError for another num_envs.
        """
        self._idle()
        if len(state["envs"]) != self.num_envs:
            saved = len(state["envs"])
            raise ValueError(
                f"the state is of {saved} environments, not {self.num_envs}: use num_envs={saved}"
            )
        self._ended[:] = True  # what runs here now is given up
        replies = self._ask("set_state", lambda w: (state["envs"][w.start : w.stop],))
        restored = np.array(list(itertools.chain(*replies)))
        self.lost_episodes = int(state["lost_episodes"])
        places = {name: (getattr(self, f"_{name}"), state[name]) for name in
                  ("restarts", "fresh", "ended", "lost", "rebuilt")}  # fmt: skip
        places |= {key: (self._shared[f"obs/{key}"], state["obs"][key]) for key in self._obs_keys}
        places |= {"task_weights": (self._shared["task_weights"], state["task_weights"])}
        for name, (place, saved) in places.items():
            saved = np.asarray(saved)
            if (saved.shape, saved.dtype) != (place.shape, place.dtype):
                kind = f"{saved.dtype} {saved.shape}, not {place.dtype} {place.shape}"
                raise ValueError(f"the state's {name} is {kind}")
            place[:] = saved
        self._restarts += ~restored & ~self._fresh
        self._fresh |= ~restored
        gone = ~restored & ~self._ended
        if gone.any():
            self.lost_episodes += int((gone & ~self._lost).sum())  # the rest were counted before the save
            self.reset(mask=gone)
            self._lost |= gone
        return self._copy()
