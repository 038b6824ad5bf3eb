"""A policy server: a run's policy, asked by a simulator or a robot in another process.

    pip install -r requirements-serve.txt
    python -m common.serve --checkpoint runs/ppo        # and --host, --port, and flags of the run's script

Websocket and msgpack, as openpi's server and BEHAVIOR's evaluator have it. Arrays travel as maps of bytes,
dtype and shape; nothing is pickled. The first message is the server's, what it expects (`metadata`). Then

    {"images": {camera: uint8 (H, W, 3)}, "state": float (P,), "prompt": text}      openpi-client's `infer`
    -> {"actions": (K, A)}                                                   a chunk, in the world's units

A client whose world has `from_client` may send that world's own dict, once a step, for {"action": (A,)}, the
chunk's actions in turn, as they were trained to be executed. Without a prompt the world's only instruction
holds. Other cameras are ignored. A picture of another size is resized (PIL, bilinear), of another shape
refused: pad it as in training. {"reset": True} begins an episode, as a new connection does, and has no answer
unless an observation is with it; it matters to who asks once a step, and with --action-history, which is kept
here, as if all of a chunk were executed. What is wrong is answered by a text of one sentence, an error for
clients, and the connection stays. GET /healthz says OK.

How a policy is rebuilt: a checkpoint names the script that wrote it, also a user's copy of one. The file of
that name, in the current folder or beside `common`, is imported; its flags are read as those of its
`--evaluate --checkpoint`, by which all are checked; its `Agent(backbone, args, envs)` gets the weights. The
world is made for its spaces and instructions, and never reset. Scripts that learn from states are not served.
"""

import argparse
import asyncio
import contextlib
import http
import importlib.util
import logging
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UserError, say
from common.backbones import load_backbone, load_weights
from common.checkpoint import CheckpointError, load_checkpoint
from common.envs import make_envs, world_module
from common.envs.vector import as_array
from common.run import Run, read_flags

ROOT = Path(__file__).resolve().parents[1]


def import_script(name):
    """The script that a checkpoint names, as a module. UserError if it is not there."""
    files = [folder / f"{name}.py" for folder in (Path.cwd(), ROOT) if Path(name).name == name]
    if not (found := [file for file in files if file.is_file()]):
        raise UserError(f"The checkpoint is of {name}.py, which is neither here nor in {ROOT}.")
    spec = importlib.util.spec_from_file_location(f"served_{name}", found[0])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_policy(checkpoint, words=()):
    """-> a run's `Policy`; words: flags of its script. Raises UserError and CheckpointError."""
    saved = load_checkpoint(checkpoint)
    if "backbone" not in saved:
        raise UserError(f"{checkpoint} is of {saved['script']}.py, whose policies of states are not served.")
    script, words = import_script(saved["script"]), ["--evaluate", "--checkpoint", str(checkpoint), *words]
    args, saved = read_flags(words, script.Args, script.PRESETS, saved["script"])
    args.num_workers = 0
    with Run(args, saved, Path(script.__file__)) as run:
        envs = run.closing(make_envs(args, "eval", 1))
        backbone = load_backbone(args, envs, run)
        try:
            agent = script.Agent(backbone, args, envs)
        except (AttributeError, TypeError) as error:
            raise UserError(f"{script.__file__} has no Agent(backbone, args, envs): {error}") from error
        load_weights(agent, args, run)
        return Policy(agent.eval(), args, envs, run.device)


class Policy:
    """An agent, and what its world said: spaces, instructions and units. metadata: for the client."""

    def __init__(self, agent, args, envs, device):
        self.agent, self.world, self.instructions = agent, world_module(args.env), list(envs.instructions)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.space, self.bounds = envs.single_action_space, envs.action_bounds
        cameras, *self.size = getattr(envs.single_observation_space.get("image"), "shape", (0, 0, 0))[:3]
        names = tuple(getattr(args, "cameras", ()) or getattr(self.world, "DEMO_KEYS", ()))
        self.cameras = names if len(names) == cameras else tuple(f"camera{k}" for k in range(cameras))
        self.history = np.zeros((args.action_history, sum(self.space.shape)), np.float32)
        self.width = envs.single_observation_space["proprio"].shape[0] - self.history.size
        chunk = np.zeros((args.chunk, *self.space.shape), self.space.dtype)
        images = {name: [*self.size, 3] for name in self.cameras}
        self.metadata = {"env": args.env, "images": images, "state": self.width, "prompts": self.instructions}
        self.metadata |= {"actions": list(self.in_units(chunk).shape), "deterministic": args.deterministic}

    def answer(self, message, episode):
        """A client's message -> the reply, None where there is none. episode: its connection's dict, of the
        actions that wait and the last ones executed. Raises UserError for what is wrong with the message."""
        if not isinstance(message, dict):
            raise UserError(f"A message is a map, not a {type(message).__name__}.")
        if message.pop("reset", False):
            episode.clear()
            if not message:
                return None
        steps = "state" not in message and hasattr(self.world, "from_client")
        history, plan = episode.get("history", self.history), episode.get("plan", ())
        obs, prompt = self.observe(self.world.from_client(message) if steps else message, history)
        actions = plan if steps and len(plan) else self.act(obs, prompt)
        taken, episode["plan"] = (actions[:1], actions[1:]) if steps else (actions, ())
        episode["history"] = np.concatenate([history, taken])[-len(history) :] if history.size else history
        return {"action": self.in_units(taken)[0]} if steps else {"actions": self.in_units(taken)}

    def observe(self, message, history):
        """-> obs of one row, as of `common.envs`, and the prompt."""
        alone = self.instructions[0] if len(self.instructions) == 1 else None
        if not isinstance(prompt := message.get("prompt", alone), str):
            raise UserError(f"'prompt' must be a text, such as {self.instructions[0]!r}.")
        state = as_array(message.get("state"))
        if state.dtype.kind not in "fiu" or state.shape != (self.width,) or not np.isfinite(state).all():
            raise UserError(f"'state' must be {self.width} finite numbers; got {state.dtype} {state.shape}.")
        obs = {"proprio": np.concatenate([state, history.ravel()]).astype(np.float32)[None]}
        if not self.cameras:
            return obs, prompt
        images = message.get("images")
        if not isinstance(images, dict) or not images.keys() >= set(self.cameras):
            raise UserError(f"'images' must be a map with the cameras {', '.join(self.cameras)}.")
        image = np.stack([self.picture(name, as_array(images[name])) for name in self.cameras])
        return obs | {"image": image[None], "task": np.zeros(1, np.int64)}, prompt

    def picture(self, name, image):
        """-> uint8 (H, W, 3) of the size that the policy has seen in training."""
        size, (height, width) = image.shape[:2], self.size
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise UserError(f"Image {name!r} must be uint8 (H, W, 3); got {image.dtype} {image.shape}.")
        if size[0] * width != size[1] * height:
            raise UserError(f"Image {name!r} is {size}, not of the shape of {self.size}; pad it first.")
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return image if size == (height, width) else np.asarray(resized)

    def act(self, obs, prompt):
        """-> the chunk as the world would execute it, (K, A) in [-1, 1] or ints (K,)."""
        row = np.zeros(1, np.int64)
        turn = dict(rows=row, returns=row, steps=row, instructions=[prompt], generator=self.generator)
        with torch.no_grad():
            actions = self.agent.act(obs, turn)[0][0]
        if not np.isfinite(actions).all():
            raise UserError("The policy's actions are NaN or infinite.")
        return actions.clip(self.space.low, self.space.high) if self.space.shape else actions

    def in_units(self, actions):
        """A chunk in [-1, 1] -> in the world's own units, float32; ints as they are."""
        if hasattr(self.world, "to_client"):
            return self.world.to_client(actions)
        if self.bounds is None:
            return actions
        low, high = self.bounds
        return (low + (actions.astype(np.float64) + 1) / 2 * (high - low)).astype(np.float32)


# --- the wire


def from_wire(value):
    """msgpack's `object_hook`: a map, or the array or number that it stands for."""
    if not {b"__ndarray__", b"__torch__", b"__npgeneric__"} & value.keys():
        return value
    name = value[b"dtype"]
    dtype = np.dtype((name.decode() if isinstance(name, bytes) else name).removeprefix("torch."))
    data, single = value[b"data"], b"__npgeneric__" in value
    return np.asarray(data, dtype) if single else np.frombuffer(data, dtype).reshape(value[b"shape"])


def respond(policy, frame, episode):
    """A client's message -> the server's: msgpack, a text where it is an error, or None."""
    import msgpack  # optional

    try:
        message = msgpack.unpackb(frame, object_hook=from_wire, strict_map_key=False)
    except Exception as error:  # of many types
        return f"A message must be msgpack, as openpi-client packs it: {' '.join(str(error).split())}."
    try:
        reply = policy.answer(message, episode)
    except UserError as error:
        return str(error)
    except Exception as error:  # of the model, or of a driver
        traceback.print_exc()
        return f"The policy failed with {type(error).__name__}: {' '.join(str(error).split())}."
    for name, x in (reply or {}).items():
        reply[name] = {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
    return reply and msgpack.packb(reply)


async def listen(policy, host, port, ready):
    """Answers until it is cancelled; ready(port) once it listens. Raises UserError."""
    import msgpack
    from websockets.asyncio.server import serve
    from websockets.exceptions import ConnectionClosed

    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # who speaks no websocket is no event
    lock = asyncio.Lock()

    async def talk(connection):
        episode = {}  # of `Policy.answer`
        with contextlib.suppress(ConnectionClosed):
            await connection.send(msgpack.packb(policy.metadata))
            async for frame in connection:
                async with lock:  # in a thread, so that pings are answered meanwhile
                    reply = await asyncio.to_thread(respond, policy, frame, episode)
                if reply is not None:
                    await connection.send(reply)

    def health(connection, request):
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    options = dict(compression=None, max_size=2**28, ping_interval=None, process_request=health)
    try:
        server = await serve(talk, host, port, **options)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port} is not to be had ({error}); give another --port.") from error
    async with server:
        ready(server.sockets[0].getsockname()[1])
        await server.wait_closed()


def main():
    parser = argparse.ArgumentParser("python -m common.serve", allow_abbrev=False, epilog=f"See {__file__}.")
    parser.add_argument("--checkpoint", help="a run's folder, or a checkpoint file")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens; 0.0.0.0 for every network")
    parser.add_argument("--port", type=int, default=8000, help="0 for one that is free")
    own, words = parser.parse_known_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        if missing := [name for name in ("websockets", "msgpack") if not importlib.util.find_spec(name)]:
            raise UserError(f"It needs {' and '.join(missing)}: pip install -r requirements-serve.txt")
        if not own.checkpoint:
            raise UserError("Give --checkpoint, the folder of the run whose policy is to be served.")
        policy, what = load_policy(own.checkpoint, words), f"serving {own.checkpoint} at ws://{own.host}"
        asyncio.run(listen(policy, own.host, own.port, lambda port: say(f"{what}:{port}; Ctrl-C ends it")))
    except KeyboardInterrupt:
        say("stopped")
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
