"""Several seeds as one number with its interval: a table in Markdown, and a plot (pip install matplotlib).

    python benchmarks/aggregate.py 'iql=runs/iql_*' 'rlpd=runs/rlpd_*'          # NAME=folders of runs, quoted
    python benchmarks/aggregate.py 'bc=benchmarks/results/bc_2400_?.json' --plot runs/bc.png

A name's runs differ in their seed, and where they are of several environments or data sets, in those. Of each
evaluation counts --metric, by default the first that all have of success_rate, normalized_score and
mean_reward. `last` is the run's final evaluation, `best` its best by the same episodes, and so flattered;
`offline` where the offline part of a run with --online-steps ended.

The interquartile mean, of the middle half of all scores, and its 95 % interval by the bootstrap, which draws
runs with replacement within each task, are rliable's (Agarwal et al. 2021, arXiv:2108.13264). Three seeds
have 27 such draws, ten different ones: their interval is no more than a range.
"""

import argparse
import glob
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import UserError  # noqa: E402

METRICS = ("success_rate", "normalized_score", "mean_reward")
STAGES = {"offline": "offline", "last": "final", "best": "best"}  # a column -> the key in results.json
# what may differ between the runs of a name: where and when, the seed, and what it started from
OWN = {"seed", "run_name", "output_dir", "checkpoint", "resume", "device", "num_workers", "worker_timeout"}
OWN |= {"capture_video", "track", "env", "dataset", "file", "save_dataset"}


# --- the statistics


def interquartile_mean(scores):
    """The mean of what is left of all scores (..., n) once the lowest and the highest quarter, rounded down,
    are left out -> (...)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap_interval(tasks, draws=10_000, seed=0):
    """The percentiles 2.5 and 97.5 of the interquartile mean over `draws` samples: of each task, scores (R,),
    R of its runs with replacement. tasks: a list of such scores."""
    rng = np.random.default_rng(seed)
    samples = [scores[rng.integers(len(scores), size=(draws, len(scores)))] for scores in tasks]
    return np.percentile(interquartile_mean(np.concatenate(samples, 1)), (2.5, 97.5))


# --- runs -> scores


def read(path):
    """The results of a run's folder, its results.json, or a file of benchmarks/results/."""
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
        found = found.get("results", found)
        {**found["args"], **found["final"]}  # which are dicts
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give runs that have ended.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no results.json of a run; give runs that have ended.") from error
    return found


def load(group):
    """NAME=PATTERN -> the name, and {task: [results of each seed]}. UserError in one sentence."""
    name, named, pattern = group.partition("=")
    pattern = pattern if named else name
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError(f"nothing is at {pattern}; give NAME=PATTERN in quotes, the folders of runs.")
    tasks, first = {}, None
    for path in paths:
        found = read(path)
        args = {key: value for key, value in found["args"].items() if key not in OWN}
        first = first or args
        if other := sorted(key for key in args.keys() | first.keys() if args.get(key) != first.get(key)):
            raise UserError(
                f"{paths[0]} and {path} differ in {', '.join(other)}; give them a name of their own each."
            )
        runs = tasks.setdefault(str(found["args"].get("dataset") or found["args"].get("env")), {})
        seed = found["args"].get("seed")
        if seed in runs:
            raise UserError(f"{path} has a seed, {seed}, that another run of {pattern} has; leave one out.")
        runs[seed] = found
    return name, {task: [runs[seed] for seed in sorted(runs)] for task, runs in tasks.items()}


def summary(name, tasks, metric=None):
    """The row of a table: the name, task, metric, number of seeds, and {column: (IQM, low, high, scores of
    all runs)}. tasks: {task: [results]}."""
    everything = [found for runs in tasks.values() for found in runs]
    has = [each for each in (metric,) if each] or METRICS
    metric = next((x for x in has if all(x in found["final"] for found in everything)), None)
    if metric is None:
        raise UserError(f"not all runs of {name} have {' or '.join(has)}; give another --metric.")
    columns = {}
    for column, key in STAGES.items():
        if all(metric in found.get(key, {}) for found in everything):
            scores = [np.array([found[key][metric] for found in runs], float) for runs in tasks.values()]
            both = np.concatenate(scores)
            columns[column] = (interquartile_mean(both), *bootstrap_interval(scores), both)
    seeds = {len(runs) for runs in tasks.values()}
    what = next(iter(tasks)) if len(tasks) == 1 else f"{len(tasks)} tasks"
    return name, what, metric, "-".join(map(str, sorted({min(seeds), max(seeds)}))), columns


# --- table and plot


def table(rows):
    """Markdown: of each column the interquartile mean, its interval, and mean and standard deviation."""
    stages = [stage for stage in STAGES if any(stage in row[-1] for row in rows)]
    lines = [["name", "task", "metric", "seeds"]]
    for stage in stages:
        lines[0] += [f"{stage}: IQM [95 %]", "mean ± std"]
    lines.append(["---"] * len(lines[0]))
    for name, task, metric, seeds, columns in rows:
        line = [name, task, metric, seeds]
        for stage in stages:
            iqm, low, high, scores = columns.get(stage, (None, None, None, None))
            spread = scores.std(ddof=1) if scores is not None and len(scores) > 1 else 0.0
            line += ["", ""] if iqm is None else [
                f"{iqm:.4g} [{low:.4g}, {high:.4g}]", f"{scores.mean():.4g} ± {spread:.3g}"
            ]  # fmt: skip
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows, path):
    """A bar from low to high for each row and column, the interquartile mean and the seeds upon it."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib; pip install matplotlib.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{row[0]}: {row[1]}, {stage}" for row in rows for stage in row[-1]]
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.35 * len(labels)))
    bars = [(row[2], *column) for row in rows for column in row[-1].values()]
    for y, (_, iqm, low, high, scores) in enumerate(bars):
        axis.barh(y, high - low, left=low, height=0.6, color="tab:blue", alpha=0.35)
        axis.plot([iqm, iqm], [y - 0.3, y + 0.3], color="black")
        axis.plot(scores, [y] * len(scores), "o", color="tab:blue", markersize=3)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel(", ".join(dict.fromkeys(bar[0] for bar in bars)))
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("groups", nargs="+", metavar="NAME=PATTERN")
    parser.add_argument("--metric", choices=(*METRICS, "mean_length"))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    try:
        rows = [summary(*load(group), args.metric) for group in args.groups]
        print(table(rows))
        if args.plot:
            plot(rows, args.plot)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
