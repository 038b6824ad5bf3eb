"""The README's pictures: evaluation curves over wall time from run folders, and a film strip of the tabletop.

python benchmarks/plot_run.py benchmarks/curve.png runs/ppo_1 runs/ppo_2 runs/ppo_3      (pip install
matplotlib) python benchmarks/plot_run.py benchmarks/tabletop.png
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def curve(path, folders):
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=130)
    for folder in folders:
        events = EventAccumulator(folder)
        events.Reload()
        points = events.Scalars("eval/success_rate")
        minutes = [(point.wall_time - points[0].wall_time) / 60 for point in points]
        axis.plot(
            minutes,
            [100 * point.value for point in points],
            marker="o",
            markersize=3,
            label=Path(folder).name,
        )
    axis.set(xlabel="minutes of training, evaluations included", ylabel="greedy success, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def strip(path):
    from PIL import Image

    from common.envs.tabletop import INSTRUCTIONS, TabletopEnv
    from common.video import annotate

    rows = []
    for seed in (3, 0, 1):
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
    if len(sys.argv) == 2:
        strip(sys.argv[1])
    elif len(sys.argv) > 2:
        curve(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
