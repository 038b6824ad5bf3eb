"""The policy server, on loopback, with the published openpi-client and with BEHAVIOR's way of asking."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import threading
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import reach_world
import torch
from PIL import Image

import bc_warmup
import grpo_vla
import ppo_vla
from common import serve
from common.backbones import load_backbone
from common.checkpoint import save_checkpoint
from common.envs import WORLDS, behavior, make_envs
from common.run import Run, read_flags

if missing := [x for x in ("websockets", "msgpack", "openpi_client") if not importlib.util.find_spec(x)]:
    pytest.skip(
        f"{', '.join(missing).upper()} NOT INSTALLED, THE POLICY SERVER IS NOT TESTED: pip install --no-deps "
        "-r requirements-serve.txt openpi-client==0.1.2",
        allow_module_level=True,
    )

import msgpack
import websockets.exceptions
import websockets.sync.client
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

pytestmark = pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # the client's
REACH = "--env reach --num-workers 0 --device cpu --seed 3 --chunk 4"
BEHAVIOR = "--env behavior --num-workers 0 --device cpu --seed 3 --chunk 3 --size 16"


@pytest.fixture(autouse=True, scope="module")
def reach():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "reach", "reach_world")
        yield


def checkpoint(script, folder, *flags, name=None):
    """A run's checkpoint of random weights, as the script would save it -> its agent and arguments."""
    words = [word for flag in flags for word in flag.split()]
    args, _ = read_flags(words, script.Args, script.PRESETS, script.__name__)
    with Run(args, None, Path(script.__file__)) as run:
        envs = run.closing(make_envs(args, "eval", 1))
        agent = script.Agent(load_backbone(args, envs, run), args, envs).eval()
    with torch.no_grad():
        for parameter in agent.parameters():  # also those that begin at zero
            parameter += 0.1 * torch.randn_like(parameter)
    state = {"args": dataclasses.asdict(args), "agent": agent.state_dict(), "backbone": agent.backbone.config}
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "checkpoint.pt", name or script.__name__, state)
    return agent, args


@contextlib.contextmanager
def serving(folder, *words):
    """-> the port of a server in a thread of this process."""
    policy, ports, loop = serve.load_policy(folder, words), queue.Queue(), asyncio.new_event_loop()
    task = loop.create_task(serve.listen(policy, "127.0.0.1", 0, ports.put))

    def work():
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ports.get(timeout=30)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
    loop.close()
    assert not thread.is_alive()


def client(port):
    return WebsocketClientPolicy("127.0.0.1", port)


def own(agent, image, state, prompt):
    """What the agent itself does greedily, (K, A), in a thread, which the server computes in."""
    obs = {"proprio": np.float32(state)[None]}
    if image is not None:
        obs |= {"image": np.array(image)[None], "task": np.zeros(1, np.int64)}
    turn = {"instructions": [prompt], "generator": None}

    def act():
        with torch.no_grad():
            return agent.act(obs, turn)[0][0].clip(-1, 1)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def seen(seed):
    """An observation of the reach world as a client has it: the point, the picture and the words."""
    env = reach_world.make(split="eval")
    obs, _ = env.reset(seed=seed)
    told = {"state": obs["proprio"], "prompt": env.instructions[obs["task"]]}
    return told | {"images": {"camera0": obs["image"][0], "another": np.zeros((3, 2))}}


def ask(agent, obs, image=None):
    image = obs["images"]["camera0"][None] if image is None else image
    return own(agent, image, obs["state"], obs["prompt"])


@pytest.mark.parametrize(
    ("script", "head"),
    [(bc_warmup, "tokens"), (ppo_vla, "gaussian"), (grpo_vla, "flow"), (ppo_vla, "tokens")],
)
def test_what_is_served_is_the_agents_own_greedy_action(tmp_path, script, head):
    agent, _ = checkpoint(script, tmp_path / "run", REACH, f"--head {head}")
    with serving(tmp_path / "run") as port:
        policy = client(port)
        assert policy.get_server_metadata() == {
            "env": "reach", "images": {"camera0": [32, 32, 3]}, "state": 2, "deterministic": True,
            "prompts": reach_world.INSTRUCTIONS, "actions": [4, 2],
        }  # fmt: skip
        chunks = []
        for seed in range(3):
            obs = seen(seed)
            chunks.append(policy.infer(obs)["actions"])
            assert chunks[-1].shape == (4, 2) and chunks[-1].dtype == np.float32
            assert np.array_equal(chunks[-1], ask(agent, obs))
        assert not np.array_equal(chunks[0], chunks[1]) and np.std(chunks) > 0.01
        large = obs["images"]["camera0"].repeat(2, 0).repeat(3, 1)[:, :64]
        small = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.BILINEAR))
        obs["images"]["camera0"] = large  # another size
        got = policy.infer(obs)["actions"]
        assert np.array_equal(got, ask(agent, obs, small[None])) and not np.array_equal(got, chunks[-1])
        assert not np.array_equal(policy.infer(obs | {"prompt": "reach"})["actions"], got)


def test_sampled_actions_follow_from_the_seed(tmp_path):
    agent, _ = checkpoint(ppo_vla, tmp_path / "run", REACH, "--head gaussian --init-std 0.1")
    draws = []
    for k in range(2):
        with serving(tmp_path / "run", "--no-deterministic") as port:
            torch.manual_seed(k)  # of no effect: it has a generator of its own
            policy = client(port)
            assert policy.get_server_metadata()["deterministic"] is False
            draws.append([policy.infer(seen(0))["actions"] for _ in range(2)])
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(*draws[0])
    assert 0.01 < np.abs(draws[0][0] - ask(agent, seen(0))).mean() < 0.3


def test_the_clients_own_broker_takes_the_chunk_apart(tmp_path, monkeypatch):
    tree = types.SimpleNamespace(map_structure=lambda f, x: {key: f(y) for key, y in x.items()})
    monkeypatch.setitem(sys.modules, "tree", tree)  # dm-tree, which it needs for no more than this
    from openpi_client.action_chunk_broker import ActionChunkBroker

    agent, _ = checkpoint(ppo_vla, tmp_path / "run", REACH)
    with serving(tmp_path / "run") as port:
        broker = ActionChunkBroker(client(port), 4)
        steps = [broker.infer(seen(k))["actions"] for k in range(8)]
    assert np.array_equal(steps, np.concatenate([ask(agent, seen(0)), ask(agent, seen(4))]))


def test_the_action_history_is_kept_here(tmp_path):
    agent, _ = checkpoint(bc_warmup, tmp_path / "run", REACH, "--action-history 3 --head gaussian")

    def wanted(history):
        return ask(agent, seen(0) | {"state": np.concatenate([seen(0)["state"], np.ravel(history)])})

    with serving(tmp_path / "run") as port:
        policy = client(port)
        assert policy.get_server_metadata()["state"] == 2
        first = policy.infer(seen(0))["actions"]
        assert np.array_equal(first, wanted(np.zeros(6)))
        assert np.array_equal(policy.infer(seen(0))["actions"], wanted(first[1:]))
        assert not np.array_equal(wanted(first[1:]), first)
        assert np.array_equal(policy.infer(seen(0) | {"reset": True})["actions"], first)
        assert np.array_equal(client(port).infer(seen(0))["actions"], first)  # its own episode
        assert np.array_equal(policy.infer(seen(0))["actions"], wanted(first[1:]))


@pytest.mark.parametrize(
    ("flags", "low", "high"),
    [("--env Pendulum-v1 --head gaussian", -2, 2), ("--env CartPole-v1", None, None)],
)
def test_actions_are_in_the_worlds_units(tmp_path, flags, low, high):
    agent, args = checkpoint(ppo_vla, tmp_path / "run", flags, "--device cpu --seed 3")
    with serving(tmp_path / "run") as port:
        policy = client(port)
        assert policy.get_server_metadata()["images"] == {}
        for seed in range(3):
            state = np.random.default_rng(seed).normal(size=policy.get_server_metadata()["state"])
            got, mine = policy.infer({"state": state})["actions"], own(agent, None, state, "")
            if low is None:
                assert got.dtype.kind == "i" and got.shape == (1,) and got[0] == mine[0]
            else:
                assert np.array_equal(got, np.float32(low + (mine.astype(float) + 1) / 2 * (high - low)))


# --- what is wrong


def test_wrong_messages_are_answered_with_one_sentence_and_the_connection_stays(tmp_path, capsys):
    checkpoint(ppo_vla, tmp_path / "run", REACH)
    good, pack = seen(0), msgpack_numpy.packb
    picture = good["images"]["camera0"]
    wrong = {
        "must be msgpack": [b"", b"\xc1", b"\x81\xa1a", pack(good)[:-9], pack(good) + b"\x00", "a text"],
        "is a map, not a list": [pack([1])],
        "is a map, not a int": [pack(3)],
        "'prompt' must be a text, such as 'reach the red disc'": [
            pack({}), pack(good | {"prompt": 7}), pack(good | {"prompt": None}),
            pack(good | {"prompt": b"x"}),
        ],
        "'state' must be 2 finite numbers; got": [
            pack({"prompt": "x"}), pack(good | {"state": np.zeros(3)}), pack(good | {"state": "12"}),
            pack(good | {"state": np.array([0, np.nan])}), pack(good | {"state": [[1], [2, 3]]}),
            pack(good | {"state": {"x": 1}}), pack(good | {"state": np.zeros((1, 2))}),
        ],
        "'images' must be a map with the cameras camera0": [
            pack(good | {"images": picture}), pack(good | {"images": {}}), pack({**good, "images": None}),
        ],
        "Image 'camera0' must be uint8 (H, W, 3); got": [
            pack(good | {"images": {"camera0": x}})
            for x in (picture / 255, picture.transpose(2, 0, 1), picture[0], picture[:0], 1, "x", None)
        ],
        "not of the shape of [32, 32]; pad it first": [pack(good | {"images": {"camera0": picture[:, :30]}})],
    }  # fmt: skip
    for dtype, data in (
        (b"O", b"12345678"),
        (b"<f4", b"123"),
        (b"nonsense", b""),
        (7, b""),
        (b"V8", b"12345678"),
    ):
        array = {b"__ndarray__": True, b"dtype": dtype, b"data": data, b"shape": [2]}
        wrong.setdefault("must be", []).append(
            msgpack.packb(good | {"state": array}, default=msgpack_numpy.pack_array)
        )
    with serving(tmp_path / "run") as port:
        policy = client(port)
        before = policy.infer(good)["actions"]
        for said, frames in wrong.items():
            for frame in frames:
                policy._ws.send(frame)
                reply = policy._ws.recv(timeout=20)
                assert isinstance(reply, str) and said in reply and "\n" not in reply, (
                    said,
                    frame[:40],
                    reply,
                )
        with pytest.raises(RuntimeError, match="Error in inference server:\n'state' must be"):
            policy.infer(good | {"state": np.zeros(1)})  # as the client tells it
        assert np.array_equal(policy.infer(good)["actions"], before)
        assert capsys.readouterr().err == ""


def test_a_policy_that_fails_fails_once(tmp_path, monkeypatch, capsys):
    checkpoint(ppo_vla, tmp_path / "run", REACH)
    agents, end = [], serve.Policy.__init__
    monkeypatch.setattr(
        serve.Policy, "__init__", lambda self, agent, *x: agents.append(agent) or end(self, agent, *x)
    )
    with serving(tmp_path / "run") as port:
        policy, act = client(port), agents[0].act

        def fail(*_):
            raise torch.OutOfMemoryError("no\nroom")

        agents[0].act = fail
        with pytest.raises(RuntimeError, match="The policy failed with OutOfMemoryError: no room."):
            policy.infer(seen(0))
        assert "OutOfMemoryError" in capsys.readouterr().err
        agents[0].act = lambda *_: (np.full((1, 4, 2), np.nan), None)
        with pytest.raises(RuntimeError, match="The policy's actions are NaN or infinite."):
            policy.infer(seen(0))
        agents[0].act = lambda *_: (np.full((1, 4, 2), -3, np.float32), None)  # as an L1 head may
        assert (policy.infer(seen(0))["actions"] == -1).all()
        agents[0].act = act
        assert len(np.unique(policy.infer(seen(0))["actions"])) > 2


def test_clients_in_turn_and_those_who_vanish(tmp_path, capfd):
    agent, _ = checkpoint(ppo_vla, tmp_path / "run", REACH)
    with serving(tmp_path / "run") as port:
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=20).read() == b"OK\n"
        for _ in range(2):
            policy = client(port)
            assert np.array_equal(policy.infer(seen(0))["actions"], ask(agent, seen(0)))
            policy._ws.close()
        one, other = client(port), client(port)
        one._ws.send(msgpack_numpy.packb(seen(1)))
        one._ws.socket.close()  # without a word, and with an answer on its way
        assert np.array_equal(other.infer(seen(2))["actions"], ask(agent, seen(2)))
        with contextlib.closing(__import__("socket").create_connection(("127.0.0.1", port))) as noise:
            noise.sendall(b"\x16\x03\x01 no websocket\r\n\r\n")
            noise.recv(100)
        assert np.array_equal(other.infer(seen(1))["actions"], ask(agent, seen(1)))
    with pytest.raises(websockets.exceptions.ConnectionClosed) as end:
        other.infer(seen(0))
    assert end.value.rcvd.code == 1001  # going away
    assert capfd.readouterr().err == ""


# --- BEHAVIOR's evaluator


def observation(k, kind=b"__ndarray__"):
    """As the benchmark's evaluator packs it: flattened, RGBA, beside much else, with an axis of 1."""

    def array(x):
        dtype = x.dtype.str.encode() if kind == b"__ndarray__" else f"torch.{x.dtype.name}".encode()
        return {kind: True, b"data": x.tobytes(), b"dtype": dtype, b"shape": list(x.shape)}

    rng = np.random.default_rng(k)
    names = [f"robot_r1::robot_r1:{link}:Camera:0::rgb" for link in behavior.CAMERAS.values()]
    obs = {name: array(rng.integers(0, 256, (1, 16, 16, 4), np.uint8)) for name in names}
    obs |= {"robot_r1::proprio": array(rng.normal(size=(1, 61)).astype(np.float32))}
    obs |= {"robot_r1::cam_rel_poses": array(np.zeros(21)), "task_id": array(np.zeros((1, 1), np.int64))}
    return msgpack.packb(obs | {"__action_chunk_size__": 3})


def unpacked(frame):
    images, proprio = behavior.pick(msgpack.unpackb(frame, object_hook=serve.from_wire))
    return np.stack([images[name] for name in behavior.CAMERAS]), behavior.state_of(proprio)


@pytest.mark.parametrize("numbers", [23, 14])
def test_behaviors_evaluator_asks_at_every_step(tmp_path, numbers):
    which = "all" if numbers == 23 else "arms"
    agent, _ = checkpoint(ppo_vla, tmp_path / "run", BEHAVIOR, f"--actions {which}")
    assert agent.backbone.action_dim == numbers

    def wanted(k):
        return behavior.to_client(own(agent, *unpacked(observation(k)), "turning on radio"))

    with serving(tmp_path / "run") as port:
        end = websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
        told = msgpack_numpy.unpackb(end.recv())
        assert told["actions"] == [3, 23] and [*told["images"]] == ["head", "left_wrist", "right_wrist"]

        def act(k, kind=b"__ndarray__"):
            end.send(observation(k, kind))
            return msgpack_numpy.unpackb(end.recv(timeout=20))["action"]

        steps = [act(k) for k in range(5)]  # a chunk, open loop, and the next one
        assert steps[0].shape == (23,) and steps[0].dtype == np.float32
        assert np.array_equal(steps, [*wanted(0), *wanted(3)[:2]])
        end.send(msgpack_numpy.packb({"reset": True}))  # not answered
        assert np.array_equal(act(7, b"__torch__"), wanted(7)[0])
        end.send(msgpack.packb({"robot_r1::proprio": [1.0]}))
        assert end.recv(timeout=20) == "The observation is not of the R1Pro: no rgb of zed_link."
        assert np.array_equal(act(8), wanted(7)[1])
        end.close()
        images, state = unpacked(observation(0))
        obs = {"images": dict(zip(behavior.CAMERAS, images, strict=True)), "state": state}
        assert np.array_equal(client(port).infer(obs)["actions"], wanted(0))  # and openpi's client


# --- where the agent comes from


def test_a_copy_of_a_script_is_served_by_itself(tmp_path, monkeypatch):
    text = Path(ppo_vla.__file__).read_text()
    for name, found, put in (
        (
            "my_idea",
            "return self.tokenizer.decode_bins(actions)",
            "return -self.tokenizer.decode_bins(actions)",
        ),
        ("my_other", "def __init__(self, backbone, args, envs):", "def __init__(self, backbone, args):"),
        ("my_third", "class Agent(", "class Other("),
    ):
        assert text.count(found) == 1
        (tmp_path / f"{name}.py").write_text(text.replace(found, put))
        agent, _ = checkpoint(ppo_vla, tmp_path / name, REACH, name=name)
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "my_idea") as port:
        got = client(port).infer(seen(0))["actions"]
    mine, _ = checkpoint(ppo_vla, tmp_path / "ppo", REACH)
    for name in ("my_other", "my_third"):
        with pytest.raises(serve.UserError, match=rf"{name}.py has no Agent\(backbone, args, envs\): "):
            serve.load_policy(tmp_path / name)
    assert np.abs(got).max() > 0.01 and np.array_equal(got, -ask(mine, seen(0)))
    monkeypatch.chdir("/")
    with pytest.raises(serve.UserError, match="is of my_idea.py, which is neither here nor in"):
        serve.load_policy(tmp_path / "my_idea")


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, words)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as end:
        serve.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_wrong_commands_end_in_one_sentence(tmp_path, monkeypatch, capsys):
    checkpoint(ppo_vla, tmp_path / "run", REACH)
    save_checkpoint(tmp_path / "states.pt", "sac", {"args": {}, "agent": {}})
    save_checkpoint(tmp_path / "far.pt", "../elsewhere", {"args": {}, "backbone": {}})
    (tmp_path / "elsewhere.py").write_text("raise ValueError('it was run')")
    monkeypatch.chdir(tmp_path / "run")
    run = ("--checkpoint", tmp_path / "run")
    with contextlib.closing(__import__("socket").create_server(("127.0.0.1", 0))) as taken:
        busy = taken.getsockname()[1]
        for words, said in (
            ((), "Give --checkpoint, the folder of the run"),
            (("--checkpoint", tmp_path / "nothing"), "nothing does not exist; give a run's folder"),
            (
                ("--checkpoint", tmp_path / "states.pt"),
                "is of sac.py, whose policies of states are not served",
            ),
            (("--checkpoint", tmp_path / "far.pt"), "is of ../elsewhere.py, which is neither here nor in"),
            ((*run, "--port", busy), f"127.0.0.1:{busy} is not to be had ("),
            ((*run, "--port", 70000), "127.0.0.1:70000 is not to be had ("),
            ((*run, "--host", "no.such.host.invalid"), "no.such.host.invalid:8000 is not to be had ("),
            ((*run, "--chunk", 7), "--chunk 7 is not what the checkpoint has: 4 is part of it"),
        ):
            told = call(monkeypatch, capsys, *words)
            assert told.startswith("error: ") and said in told and told.count("\n") == 1, told
        assert "Unrecognized options: --speeed" in call(monkeypatch, capsys, *run, "--speeed", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "It needs websockets and msgpack: pip install -r" in call(monkeypatch, capsys, *run)


def test_the_command_line_until_it_is_told_to_stop(tmp_path):
    agent, _ = checkpoint(ppo_vla, tmp_path / "run", "--num-workers 0 --device cpu --cameras agentview wrist")
    command = [sys.executable, "-m", "common.serve", "--checkpoint", str(tmp_path / "run"), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=serve.ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a script's "&" does
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert line.startswith(f"serving {tmp_path}/run at ws://127.0.0.1:") and "Ctrl-C ends it" in line
        policy = client(int(line.partition("127.0.0.1:")[2].partition(";")[0]))
        images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
        obs = {"state": np.zeros(8), "prompt": "lift the red cube"}
        obs["images"] = {"agentview": images[0], "wrist": images[1]}
        got = policy.infer(obs)["actions"]
        np.testing.assert_allclose(got, own(agent, images, obs["state"], obs["prompt"]), atol=1e-6)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            policy.infer(obs)
        out, err = server.communicate(timeout=60)
        assert (server.returncode, out, err) == (0, "stopped\n", "")
    finally:
        server.kill()
