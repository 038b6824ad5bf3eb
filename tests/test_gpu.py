"""benchmarks/gpu.py: its table, whatever happens to a step, and how it reads what others print."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("end", "limit", "what", "why"),
    [
        ("", 60, None, None),
        ("import time; time.sleep(60)", 3, "stopped after 3 s", "then"),
        ("print('error: no GPU'); print('bye'); sys.exit(2)", 60, "exit code 2", "error: no GPU"),
        ("x = [][1]", 60, "exit code 1", "IndexError: list index out of range"),
        ("import os; os.kill(os.getpid(), 9)", 60, "exit code -9", "then"),
    ],
)
def test_a_step_that_ends_badly_is_a_row_beside_what_it_found(tmp_path, end, limit, what, why):
    row = gpu.ROW + json.dumps(["updates", "3", ""])
    code = f"import sys; print({row!r}); print('then', flush=True); {end}"
    rows = gpu.run_step([sys.executable, "-c", code], limit, tmp_path / "log")
    assert rows[0] == ["updates", "3", ""]
    assert rows[1:] == ([["FAILED", what, why]] if what else [])


def test_what_a_step_starts_ends_with_it(tmp_path):
    code = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    )
    gpu.run_step([sys.executable, "-c", code], 3, tmp_path / "log")
    started = Path("/proc", (tmp_path / "log").read_text().strip(), "stat")

    def over():
        return not started.exists() or started.read_text().rpartition(")")[2].split()[0] == "Z"

    until = time.monotonic() + 5  # a kill takes its time on a busy machine
    while not over() and time.monotonic() < until:
        time.sleep(0.05)
    assert over()


def test_every_row_of_the_tables_of_others_is_read(monkeypatch, capsys):
    """The columns of vla_speed.py and offline_speed.py, whose headers are taken from them."""
    printed = []
    monkeypatch.setattr(gpu, "output", lambda *_, **__: [f"{line}\n" for line in printed])
    args = SimpleNamespace(device="cuda", small=False)

    def rows(step):
        step(args)
        return [json.loads(line.removeprefix(gpu.ROW)) for line in capsys.readouterr().out.splitlines()]

    source = (ROOT / "benchmarks/vla_speed.py").read_text().replace('" \n        "', "")
    assert "model | batch | chunks/s | with preprocessing | ms an environment action | of the" in source
    assert "model | checkpointing | micro-batch | samples/s | ms a sample | of the floor's" in source
    assert "GPU | micro-batch | checkpointing | bits | weights | adapters, AdamW | activations" in source
    printed[:] = [
        "FLOPs of a forward", "| openvla, prefill | 0.4 |", "Inference", "| model | batch |", "| --- | --- |",
        "| openvla-oft | 8 | 41.0 | 33.0 | 3.79 | 60 % | 17.2 |",
        "| openvla-oft | 64 | out of memory | - | - | - | - |",
        "PPO update, LoRA rank 32", "| openvla-oft | on | 16 | 12.5 | 80 | 50 % | 35 % | 61.0 |",
        "Presets of the full size", "| 24 | 8 | on | 16 | 14 | 2 | 3 | 19.0 | 3.1 | 20.5 |",
    ]  # fmt: skip
    assert rows(gpu.openvla) == [
        ["batch 8: chunks/s", "41.0", "17.2 GB, 33.0 from the pictures"],
        ["batch 64: chunks/s", "out of memory", "- GB, - from the pictures"],
        ["update, micro-batch 16, checkpointing on: samples/s", "12.5", "MFU 35 %, 61.0 GB"],
        ["preset of 24 GB (micro-batch 8, checkpointing on): peak GB", "20.5", "19.0 estimated"],
    ]
    source = (ROOT / "benchmarks/offline_speed.py").read_text()
    assert '"| script | batch | per second (median of 5) | least | most |' in source
    printed[:] = [
        "a GPU",
        "| script | batch |",
        "| --- | --- |",
        "| `iql.py` | 256 | 900 updates | 880 | 910 |",
    ]
    assert rows(gpu.compiled) == [["`iql.py` a second, median of 5", "900 updates", "880 to 910"]]


def test_the_table_and_the_file(tmp_path):
    """Two steps on the CPU, of which one needs a package or a GPU."""
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--small",
        "--steps",
        "four_bits",
        "load",
    ]
    command += ["--folder", str(tmp_path / "gpu")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    four, load = json.loads((tmp_path / "gpu/results.json").read_text())["steps"]
    assert four["step"] == "four_bits" and four["rows"][0][1] in ("not installed", "on a GPU only")
    assert [row[0] for row in load["rows"]] == ["seconds to build it from random weights"], load
    lines = [line.split(" | ") for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == ["| step", "| ---", "| four_bits", "| load"]
    assert all(len(line) == 5 for line in lines)


@pytest.mark.slow
def test_all_steps_on_a_cpu(tmp_path):
    """All but the compiled ones, which need a C++ compiler, LIBERO, and MuJoCo Warp (tests/test_warp.py)."""
    steps = [name for name in gpu.STEPS if name not in ("compiled", "libero", "warp")]
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--steps", *steps]
    subprocess.run([*command, "--minutes", "30", "--folder", str(tmp_path / "gpu")], cwd=ROOT, check=True)
    found = {x["step"]: x["rows"] for x in json.loads((tmp_path / "gpu/results.json").read_text())["steps"]}
    assert not any(row[0] == "FAILED" for rows in found.values() for row in rows), found
    assert len(found["ppo"]) >= 4 and len(found["grpo"]) >= 4 and len(found["eager"]) == 2
    assert len(found["openvla"]) == 2 + 2 + 3
