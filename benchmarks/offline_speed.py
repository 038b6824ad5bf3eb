"""Updates per second of the state-based scripts, through their own training code, on data of Hopper's shape.

python benchmarks/offline_speed.py
python benchmarks/offline_speed.py --scripts iql cql --device cuda --compile --scale 20

Median, least and most of 5 windows after one of warm-up (three with --compile), without evaluations, with the
scripts' own defaults. For sac.py it is steps of Hopper-v5 with an update each.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.run  # noqa: E402
from common.checkpoint import hardware  # noqa: E402
from common.datasets import save_d4rl  # noqa: E402

WINDOWS = {"sac": 500, "iql": 500, "cql": 30, "td3_bc": 700, "decision_transformer": 20}  # updates


def write_data(path, rows):
    """Noise in episodes of 1000 steps; its actions, rewards and sizes are Hopper's."""
    rng = np.random.default_rng(0)
    obs, after = rng.standard_normal((2, rows, 11), np.float32)
    ends = np.arange(rows) % 1000 == 999
    after[:-1][~ends[:-1]] = obs[1:][~ends[:-1]]
    save_d4rl(path, obs, rng.uniform(-1, 1, (rows, 3)), rng.standard_normal(rows), after, 0 * ends, ends)


def measure(name, args, dataset, folder):
    """The rates of 5 windows, as the script logs them."""
    script, rates, window = importlib.import_module(name), [], round(WINDOWS[name] * args.scale)
    rate = f"time/{'env_steps' if name == 'sac' else 'updates'}_per_second"

    class Writer:
        def __init__(self, *_, **__):
            pass

        def add_scalar(self, key, value, step):
            if key == rate:
                rates.append(value)

        def close(self):
            pass

    common.run.SummaryWriter, script.LOG_FREQ = Writer, window
    windows = 5 + (3 if args.compile else 1) + (name == "sac")
    flags = ["--output-dir", folder, "--run-name", name, "--device", args.device, "--eval-episodes", "0"]
    flags += ["--total-timesteps", str(windows * window), "--save-freq", str(10**9)]
    flags += ["--compile"] * args.compile + ["--bf16"] * args.bf16
    if name == "sac":
        flags += ["--env", "Hopper-v5", "--learning-starts", str(window)]
    else:
        flags += ["--dataset", dataset]
    sys.argv = [f"{name}.py", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        common.run.main(script.train, script.Args, script.PRESETS)
    return np.array(rates[-5:]), script.Args.batch_size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", choices=WINDOWS, default=list(WINDOWS), metavar="SCRIPT")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="of the scripts that have it")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the length of the windows")
    parser.add_argument("--dataset", help="instead of noise: a file or name that the scripts take")
    args = parser.parse_args()
    machine = hardware()
    kind = "bfloat16" if args.bf16 else "float32"
    kind += ", compiled" if args.compile else ""
    where = machine["gpu"] if args.device != "cpu" and machine["gpu"] else machine["cpu"]
    print(
        f"{where}, {torch.get_num_threads()} threads, {machine['cores']} cores, {kind}, {torch.__version__}\n"
    )
    print("| script | batch | per second (median of 5) | least | most |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        dataset = args.dataset or f"{folder}/hopper-noise.hdf5"
        if not args.dataset:
            write_data(dataset, 100_000)
        for name in args.scripts:
            if args.bf16 and "bf16" not in importlib.import_module(name).Args.__dataclass_fields__:
                continue
            rates, batch = measure(name, args, dataset, folder)
            what = "steps and updates" if name == "sac" else "updates"
            cells = [f"`{name}.py`", batch, f"{np.median(rates):.4g} {what}", f"{rates.min():.4g}"]
            print(f"| {' | '.join(map(str, cells))} | {rates.max():.4g} |", flush=True)


if __name__ == "__main__":
    main()
