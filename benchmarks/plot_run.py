"""The README's pictures and numbers: curves and a table from run folders, and a film strip of the tabletop.

python benchmarks/plot_run.py benchmarks/curve.png runs/ppo_1 runs/ppo_2        (pip install matplotlib)
python benchmarks/plot_run.py table runs/ppo_1 runs/ppo_2
python benchmarks/plot_run.py benchmarks/tabletop.png
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


SEEDS = (8, 4, 6)  # a lift, a put and a move


def curve(path, folders):
    """Greedy success over environment steps; a run that went on from another one starts where that ended."""
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=130)
    for folder in map(Path, folders):
        events = EventAccumulator(str(folder))
        events.Reload()
        points = events.Scalars("eval/success_rate")
        source = Path(json.loads((folder / "args.json").read_text())["checkpoint"] or "") / "results.json"
        before = json.loads(source.read_text())["environment_steps"] if source.is_file() else 0
        steps = [(before + point.step) / 1e6 for point in points]
        style = ":" if before else "--" if folder.name.startswith("grpo") else "-"
        success = [100 * point.value for point in points]
        axis.plot(steps, success, style, marker="o", markersize=3, label=folder.name)
    axis.set(xlabel="million environment steps", ylabel="greedy success, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def table(folders):
    print("| run | success before | after (95 % interval) | by kind | environment steps | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for folder in map(Path, folders):
        result = json.loads((folder / "results.json").read_text())
        first, last = result["initial"], result["final"]
        kinds = {}
        for text, part in last["per_task"].items():
            good, total = kinds.get(text.split()[0], (0, 0))
            kinds[text.split()[0]] = good + part["success_rate"] * part["episodes"], total + part["episodes"]
        by_kind = ", ".join(f"{kind} {good / total:.2f}" for kind, (good, total) in kinds.items())
        interval = "{:.2f} to {:.2f}".format(*last["success_rate_ci95"])
        print(
            f"| {folder.name} | {first['success_rate']:.3f} | {last['success_rate']:.3f} ({interval}) "
            f"| {by_kind} | {result['environment_steps']:,} | {result['wall_seconds'] / 60:.1f} |"
        )


def strip(path):
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        table(sys.argv[2:])
    elif len(sys.argv) == 2:
        strip(sys.argv[1])
    elif len(sys.argv) > 2:
        curve(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
