"""What has never run on a GPU, in one command of at most nine minutes on one of 80 GB, as one table.

    python benchmarks/gpu.py                          # runs/gpu/results.json has the same rows
    python benchmarks/gpu.py --device cpu --small     # the same steps at tiny sizes, on the CPU in minutes
    python benchmarks/gpu.py --steps load openvla     # some of them

The steps come in the order of their worth, each in a process of its own with a time limit of its own: one
that fails, hangs or runs out of memory is a row of the table, and so is one for which no time is left. What
it found before is kept; all that it printed is in runs/gpu/<step>.log.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.0
ROW = "row: "  # begins the lines of a step's output that are rows, as JSON
BC = "--num-demos 200 --grounding-scenes 400 --grounding-steps 50 --gradient-steps 300"
ONLINE = "--num-envs 32 --reward shaped --save-freq 1"
PPO = f"{ONLINE} --total-timesteps 20000"
GRPO = f"{ONLINE} --total-timesteps 40000 --group-size 4 --num-groups 4 --accuracy-low 0 --accuracy-high 1"
EVAL = "--eval-episodes 32 --eval-envs 32 --eval-freq 0"
SMALL = {  # instead, and beside
    BC: "--num-demos 6 --grounding-scenes 40 --grounding-steps 3 --gradient-steps 40 --batch-size 16",
    PPO: PPO + " --num-envs 4 --num-steps 2 --minibatch-size 8 --micro-batch-size 8 --total-timesteps 500",
    GRPO: GRPO + " --num-envs 8 --minibatch-size 8 --micro-batch-size 8 --total-timesteps 900",
    EVAL: "--eval-episodes 2 --eval-envs 2 --eval-freq 0",
}


def tell(what, found, beside=""):
    print(ROW + json.dumps([what, str(found), str(beside)]), flush=True)


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *" ".join(map(str, flags)).split()]


def output(script, *flags, **environ):
    """Runs a script to its end, its lines as they come: what it printed before it is stopped counts too."""
    words = command(script, *flags)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | environ) as p:
        for line in p.stdout:
            print(line, end="", flush=True)
            yield line
    if p.returncode:
        raise SystemExit(f"{script} ended with exit code {p.returncode}")


def cells(line):
    """The cells of a row of a Markdown table, or of anything else none."""
    row = line.startswith("|") and not line.startswith("| ---")
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if row else []


def sized(args, flags):
    return SMALL[flags] if args.small else flags


# --- the steps


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def first_to_last(values):
    """The means of the first and of the last quarter."""
    n = -(-len(values) // 4)
    return f"{sum(values[:n]) / n:.4g} -> {sum(values[-n:]) / n:.4g}"


def bc(args):
    flags = f"{sized(args, BC)} {sized(args, EVAL)} --device {args.device}"
    for _ in output("bc_warmup.py", flags, f"--output-dir {args.folder} --run-name bc"):
        pass
    logged, found = scalars(args.folder / "bc"), json.loads((args.folder / "bc/results.json").read_text())
    tell("loss/policy, first -> last quarter", first_to_last(logged["loss/policy"]), "falls")
    tell("success rate of imitation", found["final"]["success_rate"])


def online(args, script, flags):
    """Stopped by SIGTERM after its first checkpoint, resumed, and finished."""
    start = args.folder / "bc/checkpoint.pt"
    flags = f"{sized(args, flags)} {sized(args, EVAL)} --device {args.device}"
    flags += f" --checkpoint {start}" if start.is_file() else ""
    folder = args.folder / script
    words = command(f"{script}.py", flags, f"--output-dir {args.folder} --run-name {script}")
    with subprocess.Popen(words, cwd=ROOT) as run:
        while run.poll() is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.05)
        run.terminate()
    tell("SIGTERM after a checkpoint: exit code", run.returncode, 128 + signal.SIGTERM)
    for _ in output(f"{script}.py", f"--resume {folder}"):
        pass
    logged, found = scalars(folder), json.loads((folder / "results.json").read_text())
    tell("resumed and finished: environment steps", found["environment_steps"])
    tell("policy/first_ratio_error, largest", f"{max(logged['policy/first_ratio_error']):.2g}", "< 0.05")
    if "loss/value" in logged:
        tell("loss/value, first -> last quarter", first_to_last(logged["loss/value"]), "falls")
    tell("success rate, before -> after", f"{found['initial']['success_rate']:.2f} -> "
         f"{found['final']['success_rate']:.2f}")  # fmt: skip
    if "memory/peak_gb" in logged:
        tell("peak GB", f"{max(logged['memory/peak_gb']):.2f}")


def ppo(args):
    online(args, "ppo_vla", PPO)


def grpo(args):
    online(args, "grpo_vla", GRPO)


def offline(args, *flags):
    flags += ("--scale 0.02",) if args.small else ("--scale 2",)
    for line in output("benchmarks/offline_speed.py", "--scripts iql sac --device", args.device, *flags):
        if (found := cells(line)) and found[0] != "script":
            tell(f"{found[0]} a second, median of 5", found[2], f"{found[3]} to {found[4]}")


def eager(args):
    offline(args)


def compiled(args):
    """With CUDA graphs on a GPU."""
    offline(args, "--compile")


def libero(args):
    """In workers with EGL, beside a process with CUDA; then their speed."""
    if not all(importlib.util.find_spec(name) for name in ("robosuite", "libero", "bddl")):
        return tell("LIBERO", "not installed", "pip install --no-deps -r requirements-libero.txt")
    gl = {"MUJOCO_GL": "egl"} if args.device == "cuda" else {}
    flags = f"--env libero --backbone tiny --tasks 0 --device {args.device} --num-envs 2"
    flags += " --num-steps 2 --total-timesteps 40 --minibatch-size 4 --micro-batch-size 4 --num-workers 2"
    flags += f" --eval-episodes 1 --eval-envs 1 --eval-freq 0 --output-dir {args.folder} --run-name libero"
    for _ in output("ppo_vla.py", flags, **gl):
        pass
    found = json.loads((args.folder / "libero/results.json").read_text())
    tell("PPO with two workers: environment steps", found["environment_steps"])
    flags = "--num-tasks 0 --seconds", 0.1 if args.small else 3
    for line in output("benchmarks/libero_speed.py", *flags, **gl):
        if (found := cells(line)) and found[0] != "environments":
            tell(f"{found[0]} environments, {found[1]} workers, {found[2]}: steps/s", found[4])


def agent_of(args, **config):
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks import vla_speed

    sizes, kind = (vla_speed.TINY, "float32") if args.small else (None, "bfloat16")
    device, start = torch.device(args.device), time.perf_counter()
    agent = vla_speed.make_agent(8, device, sizes, rank=32, dtype=kind, **config)
    if args.device == "cuda":
        torch.cuda.synchronize()
        tell("GB with adapters", f"{torch.cuda.memory_allocated() / 1e9:.1f}")
    tell("seconds to build it from random weights", f"{time.perf_counter() - start:.1f}")
    return agent, device, vla_speed


def load(args):
    agent_of(args)


def openvla(args):
    """Chunks/s, update samples/s, MFU, and the presets' peaks beside `common.memory`'s estimates."""
    flags = f"--models openvla-oft --device {args.device} --seconds {1.0 if args.device == 'cuda' else 0.1}"
    flags += " --tiny --batch-sizes 1 8" if args.small else " --batch-sizes 1 8 32 64"
    table = None
    for line in output("benchmarks/vla_speed.py", flags):
        if line.startswith(("Inference", "PPO", "Presets")):
            table = line.split()[0]
        found = cells(line)
        if not found or found[0] in ("model", "GPU", "forward"):
            continue
        if table == "Inference":
            tell(f"batch {found[1]}: chunks/s", found[2], f"{found[6]} GB, {found[3]} from the pictures")
        elif table == "PPO":
            what = f"update, micro-batch {found[2]}, checkpointing {found[1]}: samples/s"
            tell(what, found[3], f"MFU {found[6]}, {found[7]} GB")
        elif table == "Presets":
            what = f"preset of {found[0]} GB (micro-batch {found[1]}, checkpointing {found[2]}): peak GB"
            tell(what, found[9], f"{found[7]} estimated")


def four_bits(args):
    if not importlib.util.find_spec("bitsandbytes"):
        return tell("bitsandbytes", "not installed", "pip install bitsandbytes")
    if args.device == "cpu":
        return tell("4 bits", "on a GPU only")
    agent, device, speed = agent_of(args, load_in_4bit=True)
    seconds, peak = speed.measure(speed.make_update(agent, 16, 8), device, 1)
    tell("update, micro-batch 8: samples/s", f"{16 / seconds:.1f}", f"{peak:.1f} GB")


def warp(args):
    """Tabletop as one batch: how far from C MuJoCo it is after a fifth of a second, and its speed."""
    if not importlib.util.find_spec("mujoco_warp"):
        return tell("MuJoCo Warp", "not installed", "python3 common/install.py --warp")
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT))
    from common.envs import tabletop

    number, steps, start = (2, 4, time.perf_counter()) if args.small else (1024, 50, time.perf_counter())
    device, rng = torch.device(args.device), np.random.default_rng(0)
    moves = rng.uniform(-1, 1, (steps, number, 7)).astype(np.float32)
    batch, single = tabletop.make_batch(number, device), tabletop.make()
    batch.reset({row: row for row in range(number)}, None)
    obs, wanted = batch.observe(), single.reset(seed=0)[0]
    tell("seconds to the first picture", f"{time.perf_counter() - start:.0f}", f"{number} environments")
    gap = np.abs(obs["image"][0].cpu().numpy().astype(int) - wanted["image"]).mean()
    tell("its distance from the ray caster's, grey levels of 255", f"{gap:.3f}")
    rows = torch.ones(number, dtype=torch.bool, device=device)
    for move in moves[:4]:
        batch.advance(torch.as_tensor(move, device=device), rows)
        single.advance(move[0])
    gap = np.abs(batch.views["xpos"][0].cpu().numpy() - single.data.xpos).max()
    tell("a body's distance from C MuJoCo's after 4 steps, mm", f"{1000 * gap:.2f}")
    for what, look in (("without", False), ("with", True)):
        start = time.perf_counter()
        for move in moves:
            batch.advance(torch.as_tensor(move, device=device), rows)
            seen = batch.observe()["image"] if look else rows
        seen.sum().item()  # waits for all of it
        tell(f"steps a second {what} pictures", f"{steps * number / (time.perf_counter() - start):.0f}")


STEPS = {  # name -> the step, its time limit in seconds
    "bc": (bc, 45), "ppo": (ppo, 75), "grpo": (grpo, 75), "eager": (eager, 60), "compiled": (compiled, 120),
    "libero": (libero, 90), "load": (load, 60), "openvla": (openvla, 240), "four_bits": (four_bits, 60),
    "warp": (warp, 120),
}  # fmt: skip


# --- the table


def run_step(words, limit, log):
    """Runs `words` for at most `limit` seconds -> rows (what, found, beside); the last tells of a failure."""
    with log.open("w") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            failure = f"exit code {code}" if (code := process.wait(limit)) else None
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # whatever it has started
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a hung driver may hold it beyond death
            process.wait(10)
    lines = log.read_text(errors="replace").splitlines()
    rows = [json.loads(line.removeprefix(ROW)) for line in lines if line.startswith(ROW)]
    if failure:
        rest = [line.strip() for line in lines if line.strip() and not line.startswith(ROW)]
        errors = [line for line in rest if re.match(r"(error:|\w+(\.\w+)*(Error|Exception)\b)", line)]
        rows.append(["FAILED", failure, (errors or rest or [""])[-1][:200]])
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all steps together")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/gpu"), help="where everything is written anew"
    )
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if args.one:
        return STEPS[args.one][0](args)
    if args.folder.is_dir() and (args.folder / "results.json").is_file():
        shutil.rmtree(args.folder)  # an earlier one of these
    args.folder.mkdir(parents=True, exist_ok=True)
    began, results = time.monotonic(), []
    print("| step | what | found | beside | s |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in args.steps:
        start, left = time.monotonic(), 60 * args.minutes - (time.monotonic() - began)
        words = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--device",
            args.device,
            "--folder",
            str(args.folder),
        ]
        words += ["--small"] * args.small
        limit = min(STEPS[name][1], left) if not args.small else left
        rows = [["FAILED", "no time was left", ""]]
        if left > 1:
            rows = run_step(words, limit, args.folder / f"{name}.log")
        seconds = round(time.monotonic() - start, 1)
        for what, found, beside in rows:
            print(f"| {name} | {what} | {found} | {beside} | {seconds} |".replace("\n", " "), flush=True)
        results.append({"step": name, "seconds": seconds, "rows": rows})
        kept = {"device": args.device, "small": args.small, "steps": results}
        (args.folder / "results.json").write_text(json.dumps(kept, indent=1))  # also if this is stopped


if __name__ == "__main__":
    main()
