"""The README's length, links and commands, and benchmarks/plot.py on a run made up here."""

import dataclasses
import functools
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from torch.utils.tensorboard import SummaryWriter

from benchmarks import plot
from common import UserError, install, run
from common.checkpoint import save_checkpoint
from common.run import read_flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
READMES = ("README.md", "benchmarks/README.md")


def text(name):
    return (ROOT / name).read_text()


def commands(name):
    """Every command line of a Markdown file that starts a Python file, in blocks of code and in the text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text(name), flags=re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text(name), flags=re.M | re.S)
    code = "\n".join(blocks).replace("\\\n", " ").split("\n")
    for line in [*code, *re.findall(r"`([^`]+)`", rest.replace("\n", " "))]:
        for part in line.split("&&"):
            if re.match(r"\s*(\S*/)?(python3?|torchrun) .*\.py\b", part):
                part = re.sub(r"\bX\b", "vision", re.sub(r"\bS\b", "2", part))  # the tables' placeholders
                yield shlex.join(shlex.split(part, comments=True))


ALL = sorted({command for name in READMES for command in commands(name)})


@functools.cache
def arguments(script, *words):
    """The script's arguments with these words, as a checkpoint keeps them."""
    module = importlib.import_module(script)
    words = [*words, "--device", "cpu"]
    return dataclasses.asdict(read_flags(words, module.Args, module.PRESETS, script)[0])


def parse(command, monkeypatch):
    """UserError or SystemExit if the command is not understood. Its files need not be there."""
    start, *words = shlex.split(command)
    if start == "torchrun":
        launch = get_args_parser().parse_args(words)
        words = [launch.training_script, *launch.training_script_args]
    name, *words = words
    assert (ROOT / name).is_file(), command
    script = Path(name).stem
    if name == "common/install.py":
        assert all((ROOT / f"requirements-{word[2:]}.txt").is_file() for word in words), command
    elif name == "benchmarks/plot.py":
        monkeypatch.setattr(plot, "collect", lambda folder, name, script: folder)
        monkeypatch.setattr(plot, "draw", lambda path, methods: None)
        monkeypatch.setattr(plot, "draw_splits", lambda path, methods: None)
        plot.main(words)
    elif "/" not in name:
        module = importlib.import_module(script)
        own = [word for pair in zip(words, words[1:], strict=False) if pair[0] == "--env" for word in pair]
        own += ["--head", "flow"] if "runs/flow" in words else []  # as that run has it
        saved = {"script": script, "args": arguments(script, *own), "processes": []}
        saved |= {"backbone": {}} if "backbone" in saved["args"] else {}
        monkeypatch.setattr(run, "load_checkpoint", lambda path: saved)
        try:
            read_flags(words, module.Args, module.PRESETS, script)
        except UserError as error:  # all its flags were understood by then
            if "needs a CUDA GPU" not in str(error):
                raise
        except SystemExit as stop:  # --help
            if stop.code:
                raise


@pytest.mark.parametrize("command", ALL)
def test_a_command_is_understood(command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_docstrings_command_is_understood(script, monkeypatch):
    module = importlib.import_module(script)
    found = re.findall(r"^    ((?:python|torchrun) .*)$", module.__doc__, flags=re.M)
    assert found
    for line in found:
        parse(shlex.join(shlex.split(line, comments=True)), monkeypatch)


def test_the_commands_are_found():
    """A flag that there is not, another world's, and a script that there is not."""
    scripts = {word for command in ALL for word in command.split() if word.removesuffix(".py") in SCRIPTS}
    assert scripts == {f"{script}.py" for script in SCRIPTS}
    assert any(command.startswith("torchrun") for command in ALL) and len(ALL) > 30


@pytest.mark.parametrize(
    "command", ["python ppo_vla.py --no-such-flag", "python ppo_vla.py --suite libero_10", "python ppo.py"]
)
def test_a_wrong_command_is_caught(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        parse(command, monkeypatch)


def test_length():
    lines = text("README.md").split("\n")
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 125 and not line.startswith("|")]


@pytest.mark.parametrize("name", READMES)
def test_links_and_files_exist(name):
    content, folder = text(name), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", content) if not link.startswith("http")]
    assert len(links) >= 2
    assert not [link for link in links if not (folder / link).exists()]
    files = re.findall(r"`((?:benchmarks|common|tests)/[\w./]+|requirements[\w-]*\.txt|\w+\.py)", content)
    ours = [file for file in files if file not in ("my_idea.py", "sac_continuous_action.py")]
    assert len(ours) > 5 and not [file for file in ours if not (ROOT / file).exists()]
    assert not re.search(r"(?<!\w)/(work|tmp|root|home)\b", content)


def test_the_test_command_is_what_ci_extracts():
    """.ci/run runs what stands between the two marks."""
    script = (ROOT / ".ci" / "run").read_text()
    pipe = re.search(r"\$\((sed .*README\.md.*)\)\"", script)[1]
    answer = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (
        answer.stdout == "python3 common/install.py && .venv/bin/python -m pytest -q -n 2 --dist loadfile\n"
    )
    assert install.ROOT == ROOT


# --- benchmarks/plot.py

FINAL = {"episodes": 200, "success_rate": 0.75, "success_rate_ci95": [0.69, 0.8], "mean_reward": 0.75}
FINAL["per_task"] = {
    f"{kind} the red cube": {"episodes": 10, "success_rate": rate}
    for kind, rate in (("lift", 1), ("put", 0.5))
}


def made_up(tmp_path, name, script, words=(), curve=((0, 0.5), (1000, 0.6), (2000, 0.75))):
    """The folder of a run that ended, as the scripts leave it."""
    folder, tag = tmp_path / "out" / name, "eval/success_rate"
    args = arguments(script, *words, "--run-name", name, "--output-dir", str(tmp_path / "out"))
    args = json.loads(json.dumps(args | {"device": "auto"}))
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    results = {"initial": FINAL | {"success_rate": 0.5}, "final": FINAL, "environment_steps": curve[-1][0]}
    results |= {"wall_seconds": 90.0, "args": args}
    (folder / "results.json").write_text(json.dumps(results))
    state = {"agent": {}, "args": args} | ({"backbone": {}} if "backbone" in args else {})
    save_checkpoint(folder / "checkpoint.pt", script, state)
    with SummaryWriter(folder) as writer:
        for step, value in curve:
            writer.add_scalar(tag, value, step)
            writer.add_scalar("loss/policy", 1.0, step)
    return folder


def test_a_run_is_collected_drawn_and_tabulated(tmp_path):
    results = tmp_path / "results"
    warmup = made_up(tmp_path, "warmup", "bc_warmup", ["--seed", "2"], curve=[(0, 0.5)])
    flags = ["--checkpoint", str(warmup), "--seed", "2", "--no-anneal-lr", "--tasks", "lift", "put"]
    ppo = made_up(tmp_path, "ppo", "ppo_vla", flags)
    more = made_up(tmp_path, "more", "grpo_vla", ["--checkpoint", str(ppo / "checkpoint.pt")])
    for folder, name in ((warmup, "bc"), (ppo, "ppo_2"), (more, "grpo_2")):
        path = plot.collect(folder, name, results=results)
        assert path == results / f"{name}.json" and str(tmp_path) not in path.read_text()
    content = json.loads((results / "ppo_2.json").read_text())
    assert content["command"] == (
        "python ppo_vla.py --seed 2 --checkpoint runs/warmup --run-name ppo --no-anneal-lr --tasks lift put"
    )
    assert content["results"]["final"] == FINAL
    assert content["results"]["args"]["checkpoint"] == "runs/warmup"
    curve = {
        "name": "eval/success_rate",
        "first_step": 0,
        "steps": [0, 1000, 2000],
        "values": [0.5, 0.6, 0.75],
    }
    assert content["curve"] == curve and re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])

    lines = plot.lines(results)  # the warm-up has no environment steps
    assert [(name, style) for name, style, *_ in lines] == [("grpo_2", ":"), ("ppo_2", "-")]
    assert lines[0][2].tolist() == [0.002, 0.003, 0.004]  # it went on from the other's 2000 steps
    assert lines[1][3].tolist() == [50, 60, 75]
    assert [name for name, *_ in plot.lines(results, ["ppo"])] == ["ppo_2"]
    row = "| ppo_2 | 0.500 | 0.750 (0.69 to 0.80) | lift 1.00, put 0.50 | 2,000 | 1.5 |"
    assert plot.table(results).split("\n")[-1] == row


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot.collect(made_up(tmp_path, "ppo", "ppo_vla"), "ppo_1", results=tmp_path / "results")
    plot.draw(tmp_path / "curve.png", tmp_path / "results")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_held_out_splits_are_collected_and_drawn(tmp_path):
    results = tmp_path / "results"
    for seed in ("1", "2"):
        run = made_up(tmp_path, f"ppo_{seed}", "ppo_vla")
        for split in plot.SPLITS[1:]:
            folder = tmp_path / "out" / f"ppo_{seed}_{split}"
            folder.mkdir()
            final = FINAL | {"success_rate": 0.5} if split == "vision" else FINAL
            (folder / "results.json").write_text(json.dumps({"final": final}))
        plot.collect(run, f"ppo_{seed}", results=results)
    plot.collect(made_up(tmp_path, "alone", "ppo_vla"), "alone_1", results=results)
    assert json.loads((results / "ppo_2.json").read_text())["splits"]["vision"] == {
        "episodes": 200, "success_rate": 0.5, "success_rate_ci95": [0.69, 0.8],
    }  # fmt: skip
    expected = {split: [(0.5 if split == "vision" else 0.75, 0.69, 0.8)] * 2 for split in plot.SPLITS}
    assert plot.splits(results) == plot.splits(results, ["ppo"]) == {"ppo": expected}
    assert plot.splits(results, ["grpo"]) == {}
    pytest.importorskip("matplotlib")
    plot.draw_splits(tmp_path / "splits.png", results)
    assert (tmp_path / "splits.png").read_bytes()[:4] == b"\x89PNG"


def test_an_evaluation_and_a_run_from_states_are_collected(tmp_path):
    folder = made_up(tmp_path, "iql", "iql", ["--dataset", "medium.hdf5", "--expectile", "0.9"])
    content = json.loads(plot.collect(folder, "iql", results=tmp_path).read_text())
    assert content["command"] == "python iql.py --dataset medium.hdf5 --run-name iql --expectile 0.9"
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="--script"):
        plot.collect(folder, "iql", results=tmp_path)
    for events in folder.glob("events*"):
        events.unlink()
    content = json.loads(plot.collect(folder, "iql", "iql.py", tmp_path).read_text())
    assert content["curve"] is None and content["results"]["final"] == FINAL


def test_a_wrong_folder_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(["--collect", str(tmp_path), "x"])
    assert stop.value.code == 2 and "results.json is not there" in capsys.readouterr().err
    with pytest.raises(UserError, match="--collect a run first"):
        plot.draw(tmp_path / "curve.png", tmp_path)


def test_the_stored_results_are_whole():
    """Each file of benchmarks/results has what the curve and the tables need."""
    files = sorted(plot.RESULTS.glob("*.json"))
    assert len(files) >= 6
    for file in files:
        content = json.loads(file.read_text())
        assert content["command"].startswith("python ") and content["date"] and content["commit"], file
        assert content["results"]["final"]["episodes"] and "curve" in content, file
    assert len(plot.table().split("\n")) >= 8
