"""benchmarks/aggregate.py: interquartile means and intervals against sums by hand, and its table."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "aggregate.py"
spec = importlib.util.spec_from_file_location("aggregate", PATH)
aggregate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aggregate)


def test_the_interquartile_mean_by_hand():
    """A quarter of the scores, rounded down, is left out at either end, as scipy's trim_mean does."""
    for scores, wanted in (
        ([3, 1, 100, 5, 6, 2, 4, -70], (2 + 3 + 4 + 5) / 4),
        ([9, 1, 2, 6, 3, 4], (2 + 3 + 4 + 6) / 4),  # 1.5 rounded down
        ([7, 1, 100], 36),
        ([5], 5),
    ):
        assert aggregate.interquartile_mean(np.array(scores)) == wanted
    both = np.array([[1.0, 2, 3, 40], [5, 5, 7, -9]])
    assert aggregate.interquartile_mean(both).tolist() == [2.5, 5]


def exact(tasks):
    """All equally likely resamples, by hand: percentiles of the interquartile mean."""
    draws = [list(itertools.product(scores, repeat=len(scores))) for scores in tasks]
    found = []
    for choice in itertools.product(*draws):
        merged = sorted(sum(map(list, choice), []))
        cut = len(merged) // 4
        kept = merged[cut : len(merged) - cut]
        found.append(sum(kept) / len(kept))
    return np.percentile(found, (2.5, 97.5), method="inverted_cdf")


@pytest.mark.parametrize("tasks", [[[0, 1, 5]], [[0.5, 0.6, 0.9, 0.91]], [[0, 1, 2], [10, 11, 12]]])
def test_the_bootstrap_against_all_resamples(tasks):
    """The last of two tasks: whoever drew runs of either from both would have an interval from 1 to 11."""
    found = aggregate.bootstrap_interval([np.array(scores, float) for scores in tasks], draws=40_000)
    np.testing.assert_allclose(found, exact(tasks), atol=0.02)
    again = aggregate.bootstrap_interval([np.array(scores, float) for scores in tasks], draws=40_000)
    assert found.tolist() == again.tolist()  # the same table each time


def write(folder, seed, final, best, **more):
    folder.mkdir(parents=True)
    args = {"env": "Hopper-v5", "seed": seed, "gamma": 0.99, "run_name": folder.name} | more
    found = {"args": args, "final": {"mean_reward": final}, "best": {"mean_reward": best}}
    (folder / "results.json").write_text(json.dumps(found))


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["aggregate.py", *map(str, words)])
    try:
        aggregate.main()
        code = 0
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_of_folders_and_files(tmp_path, monkeypatch, capsys):
    for seed, final in ((1, 10.0), (2, 40.0), (3, 100.0)):
        write(tmp_path / f"a_{seed}", seed, final, final + 1)
    file = tmp_path / "b_1.json"
    found = json.loads((tmp_path / "a_2/results.json").read_text())
    found["offline"] = {"mean_reward": 4.0}
    file.write_text(json.dumps({"command": "python sac.py", "results": found}))
    code, out, err = call(monkeypatch, capsys, f"a={tmp_path}/a_*", f"b={file}")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert (code, err) == (0, "") and len(lines) == 4
    assert lines[0][4:] == [f"{s}: IQM [95 %]" if k else "mean ± std" for s in ("offline", "last", "best")
                            for k in (1, 0)]  # fmt: skip
    assert lines[2][:6] == ["a", "Hopper-v5", "mean_reward", "3", "", ""]
    assert lines[2][6] == "50 [10, 100]" and lines[2][7] == "50 ± 45.8"  # std with n - 1
    assert lines[2][8] == "51 [11, 101]"
    assert lines[3][:6] == ["b", "Hopper-v5", "mean_reward", "1", "4 [4, 4]", "4 ± 0"]


def test_several_tasks_are_strata(tmp_path, monkeypatch, capsys):
    for task, base in (("x-v0", 0.0), ("y-v0", 10.0)):
        for seed in range(3):
            write(tmp_path / f"{task}_{seed}", seed, base + seed, base + seed, env=task)
    name, what, _, seeds, columns = aggregate.summary(*aggregate.load(f"a={tmp_path}/*"))
    low, high = exact([[0, 1, 2], [10, 11, 12]])
    assert (name, what, seeds) == ("a", "2 tasks", "3") and columns["last"][0] == (1 + 2 + 10 + 11) / 4
    np.testing.assert_allclose(columns["last"][1:3], (low, high), atol=0.1)
    code, _, _ = call(monkeypatch, capsys, f"a={tmp_path}/*", "--metric", "success_rate")
    assert code == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(seed=1), "has a seed, 1, that another run of"),
        (dict(gamma=0.9), "differ in gamma; give them a name of their own each"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, monkeypatch, capsys, change, said):
    write(tmp_path / "a", 1, 1.0, 1.0)
    write(tmp_path / "b", **{"seed": 2, "final": 1.0, "best": 1.0} | change)
    code, out, err = call(monkeypatch, capsys, f"{tmp_path}/*")
    assert code == 2 and not out and said in err and err.count("\n") == 1


def test_what_is_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.json").write_text("[1, 2")
    (tmp_path / "other.json").write_text('{"args": 3, "final": {}}')
    for pattern, said in (
        ("nothing*", "nothing is at"),
        ("broken.json", "is no results.json of a run"),
        ("other.json", "is no results.json of a run"),
        (".", "cannot be read"),
    ):
        code, out, err = call(monkeypatch, capsys, f"a={tmp_path}/{pattern}")
        assert code == 2 and not out and said in err and err.count("\n") == 1, err


def test_a_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="MATPLOTLIB IS NOT INSTALLED, --plot IS NOT TESTED")
    write(tmp_path / "a_1", 1, 10.0, 11.0)
    code, _, err = call(monkeypatch, capsys, f"a={tmp_path}/a_*", "--plot", tmp_path / "p.png")
    assert code == 0 and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG", err
