"""Checkpoints that survive kills and full disks, refuse what is not theirs, and continue bit for bit."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from common import checkpoint
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

FORK = multiprocessing.get_context("fork")  # a spawned process would import torch for seconds


def one_sentence(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_roundtrip_is_exact_and_plain(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "mean": np.array([[1.5, np.nan]], np.float64).T,
        "scalar_array": np.array(3, np.int32),
        "step": np.int64(7),
        "args": {"name": "x", "rate": np.float32(0.1), "none": None, "pair": (1, [True, np.bool_(False)])},
    }
    path = tmp_path / "new" / "checkpoint.pt"
    save_checkpoint(path, script="ppo_vla", state=state)
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    loaded = load_checkpoint(path.parent)  # the folder stands for the file in it
    assert (loaded["format"], loaded["script"], loaded["version"]) == ("vla-rl", "ppo_vla", 2)
    assert loaded["mean"].dtype == torch.float64 and np.array_equal(
        loaded["mean"], state["mean"], equal_nan=True
    )
    assert loaded["scalar_array"].shape == () and loaded["scalar_array"].dtype == torch.int32
    assert type(loaded["step"]) is int and type(loaded["args"]["rate"]) is float
    assert loaded["args"]["pair"] == (1, [True, False]) and loaded["args"]["none"] is None
    twin = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    twin.load_state_dict(loaded["model"])
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1.0)
    twin_optimizer.load_state_dict(loaded["optimizer"])
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        opt.zero_grad()
        net(torch.ones(4, 3) * torch.arange(4)[:, None]).square().sum().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "value", [Path("x"), {1, 2}, np.array(["a"]), np.array([None]), torch.nn.Linear(1, 1)]
)
def test_a_value_that_could_not_be_loaded_is_refused_before_writing(tmp_path, value):
    save_checkpoint(tmp_path / "c.pt", "ppo_vla", {"step": 1})
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path / "c.pt", "ppo_vla", {"a": [value]})
    assert "state['a'][0]" in one_sentence(error)
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 1


def _save_forever(path: Path, start: int) -> None:
    for version in range(start, 10**6):
        content = np.full(300_000, version, np.float64)
        save_checkpoint(path, "ppo_vla", {"version_number": version, "content": content, "tail": version})


def test_sigkill_during_saves_never_leaves_a_broken_file(tmp_path):
    path, delays, newest, torn = tmp_path / "checkpoint.pt", random.Random(0), 0, 0
    save_checkpoint(path, "ppo_vla", {"version_number": 0, "content": np.zeros(300_000), "tail": 0})
    for _ in range(25):
        process = FORK.Process(target=_save_forever, args=(path, newest + 1))
        process.start()
        time.sleep(0.01 + 0.06 * delays.random())
        process.kill()
        process.join()
        assert process.exitcode == -9
        torn += len(list(tmp_path.iterdir())) > 1
        loaded = load_checkpoint(path)
        assert loaded["version_number"] == loaded["tail"] >= newest
        assert (loaded["content"] == loaded["version_number"]).all() and len(loaded["content"]) == 300_000
        newest = loaded["version_number"]
    assert newest > 0 and torn > 0  # some processes did save, some were killed while they wrote
    save_checkpoint(path, "ppo_vla", {})
    assert list(tmp_path.iterdir()) == [path]  # the temporary files of the killed are gone


def test_the_temporary_file_of_a_living_process_stays(tmp_path):
    other = tmp_path / f".{os.getppid()}.checkpoint.pt"
    other.write_text("being written")
    foreign = tmp_path / ".99999999.other.pt"
    foreign.write_text("of another file")
    save_checkpoint(tmp_path / "checkpoint.pt", "ppo_vla", {})
    assert other.exists() and foreign.exists()


def _save_on_full_disk(path: Path, library: str, queue) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        if library == "torch":
            save_checkpoint(path, "ppo_vla", {"content": np.zeros(1_000_000)})
        else:
            with checkpoint.atomic_path(path) as temporary:
                save_file({"content": np.zeros(1_000_000)}, temporary)  # torch's threads die in a fork
    except CheckpointError as error:
        queue.put(str(error))


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path, library):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "ppo_vla", {"step": 1})
    queue = FORK.Queue()
    process = FORK.Process(target=_save_on_full_disk, args=(path, library, queue))
    process.start()
    message = queue.get(timeout=20)
    process.join()
    assert str(path) in message and "File too large" in message and "\n" not in message
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_oserror_becomes_one_sentence_and_other_errors_pass(tmp_path, monkeypatch, code):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "ppo_vla", {"step": 1})

    def fail(error):
        def save(content, file):
            file.write(b"half")
            raise error

        return save

    monkeypatch.setattr(torch, "save", fail(OSError(code, os.strerror(code))))
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(path, "ppo_vla", {"step": 2})
    assert os.strerror(code) in one_sentence(error) and str(path) in str(error.value)
    monkeypatch.setattr(torch, "save", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, "ppo_vla", {"step": 2})
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path / "file" / "checkpoint.pt", "ppo_vla", {})
    one_sentence(error)
    for name in ("run", "a\0b", "x" * 300):
        with pytest.raises(CheckpointError) as error:
            checkpoint.run_folder(tmp_path / ("file" if name == "run" else "ok"), name)
        assert "--output-dir" in one_sentence(error)


def test_run_folder_does_not_overwrite_a_run(tmp_path):
    folder = checkpoint.run_folder(tmp_path / "runs", "a")
    assert folder.is_dir() and checkpoint.run_folder(tmp_path / "runs", "a") == folder  # still empty
    save_checkpoint(folder / "checkpoint.pt", "ppo_vla", {})
    with pytest.raises(CheckpointError) as error:
        checkpoint.run_folder(tmp_path / "runs", "a")
    assert "--resume" in one_sentence(error) and "--run-name" in str(error.value)


class Code:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_whatever_is_not_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pt"
    save_checkpoint(good, "bc_warmup", {"weight": torch.ones(10_000)})
    whole = good.read_bytes()
    for name, content in {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "almost": whole[:-1],
        "flipped": whole[:200] + bytes(200) + whole[400:],
        "text": b"hello",
        "pickle": pickle.dumps(Code()),
    }.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"format": "vla-rl", "script": "bc_warmup", "version": 2, "x": Code()}, tmp_path / "code")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "foreign")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"format": "other", "script": "bc_warmup", "version": 2}, tmp_path / "format")
    for version in (1, 3):
        content = {"format": "vla-rl", "script": "bc_warmup", "version": version}
        torch.save(content, tmp_path / f"version {version}")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name in [*(path.name for path in tmp_path.iterdir() if path != good), "missing"]:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(tmp_path / name)
        assert name in one_sentence(error)
    with pytest.raises(CheckpointError, match="checkpoint.pt does not exist"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "hacked").exists()
    assert "not 2; use the code" in str(
        pytest.raises(CheckpointError, load_checkpoint, tmp_path / "version 1").value
    )
    assert "run code" in str(pytest.raises(CheckpointError, load_checkpoint, tmp_path / "code").value)


def test_a_function_of_every_tensor():
    state = {"a": torch.ones(2), "b": [torch.ones(1), {"c": torch.zeros(1)}, "text"], "d": 3, "e": None}
    found = checkpoint.map_tensors(lambda x: (x + 1).tolist(), state)
    assert found == {"a": [2, 2], "b": [[2], {"c": [1]}, "text"], "d": 3, "e": None}
    assert state["a"].tolist() == [1, 1]


def test_rng_continues_bit_for_bit(tmp_path):
    generators = {"sampling": torch.Generator().manual_seed(1), "shuffle": torch.Generator().manual_seed(2)}
    numpy_generators = {"env": np.random.default_rng(3), "mt": np.random.Generator(np.random.MT19937(4))}

    def draw():
        return [
            *(torch.randn(5, generator=g).tolist() for g in generators.values()),
            *(g.normal(size=5).tolist() for g in numpy_generators.values()),
            # leaves half of a word behind
            numpy_generators["env"].integers(0, 9, 3, dtype=np.int32).tolist(),
            random.gauss(0, 1),
            np.random.randn(),
            np.random.randint(1 << 30),
            torch.rand(3).tolist(),
        ]

    draw()  # odd numbers of Gaussians: the cached second ones are part of the states
    state = checkpoint.rng_state(generators, numpy_generators)
    save_checkpoint(tmp_path / "c.pt", "ppo_vla", {"rng": state})
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    checkpoint.set_rng_state(load_checkpoint(tmp_path / "c.pt")["rng"], generators, numpy_generators)
    assert [draw(), draw()] == expected
    with pytest.raises(CheckpointError) as error:
        checkpoint.set_rng_state(state, {"sampling": generators["sampling"]}, numpy_generators)
    assert "shuffle" in one_sentence(error)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    """A device would be gone for all its users, with the rights to it."""
    make(path := tmp_path / "checkpoint.pt")
    before = path.lstat()
    with pytest.raises(CheckpointError, match="cannot be written .*it is there, and no file") as error:
        save_checkpoint(path, "iql", {"step": 1})
    assert one_sentence(error) and path.lstat() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_results_are_json_and_atomic(tmp_path):
    path = tmp_path / "results.json"
    results = {
        "final": {
            "success_rate": np.float32(0.5),
            "mean_reward": float("nan"),
            "ci": np.array([0.1, np.inf]),
        },
        "versions": checkpoint.versions(),
        "hardware": checkpoint.hardware(),
        "args": {"path": Path("a/b")},
    }
    checkpoint.write_results(path, results)
    loaded = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert loaded["final"] == {"success_rate": 0.5, "mean_reward": None, "ci": [0.1, None]}
    assert loaded["args"] == {"path": "a/b"} and list(tmp_path.iterdir()) == [path]
    assert loaded["versions"]["torch"] == torch.__version__ and "python" in loaded["versions"]
    hardware = loaded["hardware"]
    assert hardware["cpu"] and hardware["cores"] >= 1 and hardware["ram_gb"] > 0 and "gpu" in hardware
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        checkpoint.write_results(tmp_path / "file" / "results.json", results)
