"""A run's numbers as a small text file in benchmarks/results/, and the README's pictures from such files.

    python benchmarks/plot.py --collect runs/ppo ppo_1   # -> benchmarks/results/ppo_1.json
    python benchmarks/plot.py                            # benchmarks/curve.png      (pip install matplotlib)
    python benchmarks/plot.py --splits bc_main ppo_main      # benchmarks/splits.png: tabletop's variations
    python benchmarks/plot.py --table                    # the tabletop's runs, in Markdown
    python benchmarks/plot.py --tabletop                 # benchmarks/tabletop.png, a film strip

The pictures show the named methods, METHOD_SEED.json, or all that there are. A file holds the command, the
date, the commit of the working tree when it was collected, the run's results.json (whose `args`, `versions`
and `hardware` say the rest), its evaluations' curve and, of those on another split whose folder is called
RUN_FOLDER_vision or the like, the success. Collect a run before its folder, or that of the run that it
started from, is moved.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import UserError  # noqa: E402
from common.checkpoint import CheckpointError, load_checkpoint, write_results  # noqa: E402
from common.run import flag, read_flags  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CURVES = ("eval/success_rate", "eval/mean_reward")  # the first that a run has is its curve
SEEDS = (8, 4, 6)  # of the film strip: a lift, a put and a move
SPLITS = ("eval", "vision", "semantics", "execution")  # tabletop's


# --- a run -> a text file


def command(script, args):
    """The command line of a run with these `args`: the flags that do not follow from the others."""
    module = importlib.import_module(script)
    start = ["--checkpoint", args["checkpoint"]] if args["checkpoint"] else []
    start += ["--evaluate"] * args["evaluate"]

    def parse(words):
        for more in (start, []):  # without the checkpoint, where it is gone
            with contextlib.suppress(UserError, CheckpointError):
                everything = [*words, *more, "--device", "cpu"]
                return dataclasses.asdict(read_flags(everything, module.Args, module.PRESETS, script)[0])
        return {}

    line = []
    for name in ("env", "dataset", "backbone"):  # which decide what flags there are, and their defaults
        if args.get(name) not in (None, parse(line).get(name)):
            line += [flag(name), args[name]]
    base = parse(line) | {"device": "auto", "checkpoint": None, "evaluate": False, "resume": args["resume"]}
    for name, value in args.items():
        default = list(base[name]) if isinstance(base.get(name), tuple) else base.get(name)
        if value == default or flag(name) in line:
            continue
        if isinstance(value, bool):
            line.append(flag(name if value else f"no_{name}"))
        else:
            line += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(["python", f"{script}.py", *line])


def commit():
    """Of the working tree, with -dirty where files differ from it; None without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read(path):
    if not path.is_file():
        raise UserError(f"{path} is not there; give the folder of a run that has ended.")
    return json.loads(path.read_text())


def collect(folder, name, script=None, results=RESULTS):
    """Write results/NAME.json from a run's folder -> its path. script: needed where the folder holds no
    checkpoint, as an evaluation's. UserError in one sentence."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, args = read(folder / "results.json"), read(folder / "args.json")
    if script is None and not (folder / "checkpoint.pt").is_file():
        raise UserError(f"{folder} holds no checkpoint, which names its script; add --script ppo_vla.")
    script = Path(script).stem if script else load_checkpoint(folder)["script"]
    line, output = command(script, args), args["output_dir"].rstrip("/")
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    tag, curve, ended = next((tag for tag in CURVES if tag in events.Tags()["scalars"]), None), None, None
    if tag:
        points = events.Scalars(tag)
        # a run that went on from another one starts where that ended
        source = Path(args["checkpoint"] or "")
        source = (source if source.is_dir() else source.parent) / "results.json"
        before = json.loads(source.read_text()) if args["checkpoint"] and source.is_file() else {}
        curve = {
            "name": tag,
            "first_step": before.get("environment_steps", 0),
            "steps": [point.step for point in points],
            "values": [float(f"{point.value:.6g}") for point in points],
        }
        ended = points[-1].wall_time
    date = time.strftime("%Y-%m-%d", time.gmtime(ended or (folder / "results.json").stat().st_mtime))
    if output != "runs":  # the machine's folders are nobody's business
        tidy = lambda x: f"runs{x.removeprefix(output)}" if str(x).startswith(f"{output}/") else x  # noqa: E731
        line = line.replace(f" --output-dir {shlex.quote(args['output_dir'])}", "")
        line = shlex.join(map(tidy, shlex.split(line)))
        found["args"] = {name: tidy(x) for name, x in found["args"].items()} | {"output_dir": "runs"}
    content = dict(command=line, date=date, commit=commit(), results=found, curve=curve)
    for split in SPLITS[1:]:
        if (file := Path(f"{folder}_{split}") / "results.json").is_file():
            final = read(file)["final"]
            shown = {key: final[key] for key in ("episodes", "success_rate", "success_rate_ci95")}
            content.setdefault("splits", {})[split] = shown
    results.mkdir(exist_ok=True)
    path = results / f"{name}.json"
    write_results(path, content)
    return path


# --- text files -> pictures and tables


def tabletop_runs(results):
    """-> {name: content} of the files of PPO and GRPO on tabletop, in the names' order."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    args = {name: content["results"].get("args", {}) for name, content in files.items()}
    return {
        name: content
        for name, content in files.items()
        if content["results"].get("environment_steps") and args[name].get("env") == "tabletop"
    }


def method(name):
    return name.rpartition("_")[0]


def lines(results=RESULTS, methods=()):
    """-> [(name, style, million environment steps, greedy success in %)] of the runs that have a curve."""
    found = []
    for name, content in tabletop_runs(results).items():
        if (curve := content["curve"]) and (not methods or method(name) in methods):
            style = ":" if curve["first_step"] else "--" if "grpo" in content["command"] else "-"
            steps = (curve["first_step"] + np.array(curve["steps"])) / 1e6
            found.append((name, style, steps, 100 * np.array(curve["values"])))
    return found


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("The curve is drawn by matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def splits(results=RESULTS, methods=()):
    """-> {method: {split: [(success rate, lower and upper end of its interval) of each seed]}} of the runs
    that were evaluated on the held-out splits too; a file is called METHOD_SEED."""
    found = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        name = method(path.stem)
        if "splits" not in content or (methods and name not in methods):
            continue
        seeds = found.setdefault(name, {split: [] for split in SPLITS})
        for split, success in ({"eval": content["results"]["final"]} | content["splits"]).items():
            seeds[split].append((success["success_rate"], *success["success_rate_ci95"]))
    return found


def draw_splits(path, results=RESULTS, methods=()):
    """Bars: the seeds' mean success of each method on each split; on them each seed with its interval."""
    found = splits(results, methods)
    if not found:
        raise UserError(f"No file in {results} has the splits of tabletop; --collect such runs first.")
    found = {name: found[name] for name in methods or found if name in found}  # in the order as named
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 3.8), dpi=130)
    width = 0.8 / len(found)
    for k, (name, by_split) in enumerate(found.items()):
        for i, split in enumerate(SPLITS):
            seeds = 100 * np.array(by_split[split])
            x = i + (k - (len(found) - 1) / 2) * width
            axis.bar(x, seeds[:, 0].mean(), 0.9 * width, color=f"C{k}", label=name if i == 0 else None)
            spread = x + np.linspace(-0.25, 0.25, len(seeds) + 2)[1:-1] * width
            bars = np.abs(seeds[:, 1:].T - seeds[:, 0])
            axis.errorbar(spread, seeds[:, 0], bars, fmt=".", color="black", markersize=3, linewidth=0.7)
    axis.set(ylabel="greedy success, %", ylim=(0, 100), xticks=range(len(SPLITS)), xticklabels=SPLITS)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw(path, results=RESULTS, methods=()):
    """Greedy success over environment steps."""
    found = lines(results, methods)
    if not found:
        raise UserError(f"No file in {results} has a curve of tabletop; --collect a run first.")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=130)
    for name, style, steps, success in found:
        axis.plot(steps, success, style, marker="o", markersize=3, label=name)
    axis.set(xlabel="million environment steps", ylabel="greedy success, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def table(results=RESULTS):
    """The runs as a table in Markdown."""
    rows = [
        "| run | success before | after (95 % interval) | by kind | environment steps | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, content in tabletop_runs(results).items():
        found, kinds = content["results"], {}
        first, last = found["initial"], found["final"]
        for text, part in last.get("per_task", {}).items():
            good, total = kinds.get(text.split()[0], (0, 0))
            kinds[text.split()[0]] = good + part["success_rate"] * part["episodes"], total + part["episodes"]
        by_kind = ", ".join(f"{kind} {good / total:.2f}" for kind, (good, total) in kinds.items()) or "-"
        interval = "{:.2f} to {:.2f}".format(*last["success_rate_ci95"])
        rows.append(
            f"| {name} | {first['success_rate']:.3f} | {last['success_rate']:.3f} ({interval}) "
            f"| {by_kind} | {found['environment_steps']:,} | {found['wall_seconds'] / 60:.1f} |"
        )
    return "\n".join(rows)


def strip(path):
    """Four frames of an episode of the scripted expert, of each kind of task."""
    from PIL import Image

    from common.envs.tabletop import INSTRUCTIONS, TabletopEnv
    from common.video import annotate

    rows = []
    for seed in SEEDS:
        env, frames = TabletopEnv(split="eval"), []
        env.reset(seed=seed)
        while True:
            frames.append(env.render())
            _, terminated, truncated, _ = env.advance(env.expert())
            if terminated or truncated:
                break
        frames.append(env.render())
        chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, 4).astype(int)]
        rows.append(annotate(np.concatenate(chosen, 1), [INSTRUCTIONS[env.task]]))
    Image.fromarray(np.concatenate(rows)).save(path)


def main(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="draw these alone")
    parser.add_argument("--collect", nargs=2, metavar=("RUN_FOLDER", "NAME"), help="write results/NAME.json")
    parser.add_argument("--script", help="with --collect: the script, where the folder holds no checkpoint")
    parser.add_argument("--table", action="store_true", help="print the runs as a table")
    parser.add_argument("--splits", action="store_true", help="draw the held-out splits")
    parser.add_argument("--tabletop", action="store_true", help="draw the film strip")
    args = parser.parse_args(words)
    try:
        if args.collect:
            print(collect(Path(args.collect[0]), args.collect[1], args.script))
        elif args.table:
            print(table())
        elif args.splits:
            draw_splits(ROOT / "benchmarks" / "splits.png", methods=args.methods)
        elif args.tabletop:
            strip(ROOT / "benchmarks" / "tabletop.png")
        else:
            draw(ROOT / "benchmarks" / "curve.png", methods=args.methods)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
