"""common/run.py: flags and presets, what a checkpoint fixes, the handle, a copy of a script."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from tensorboard.summary.writer import record_writer
from test_cli import (  # noqa: F401
    BC,
    FROM_FILE,
    PPO,
    ROOT,
    call,
    one_thread,
    results,
    run,
    scalars,
    shell,
    words,
)
from test_decision_transformer import write_pendulum

import bc_warmup
import common.run
import cql
import decision_transformer
import grpo_vla
import iql
import ppo_vla
import sac
import td3_bc
from common import UserError, forkserver
from common.backbones import BACKBONES, family_of, model_module
from common.backbones.openvla import read_statistics
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.envs import WORLDS, world_module
from common.flags import FIXED, KEPT, NonNegative, Only, Positive, Share
from common.run import Run, RunArgs, VLAArgs, check_values, mean_metrics, read_flags

SCRIPTS = (bc_warmup, ppo_vla, grpo_vla, sac, iql, cql, td3_bc, decision_transformer)


def read(script, text, saved=None):
    return read_flags(text.split(), script.Args, script.PRESETS, script.__name__)[0]


# --- which flags a run has, and their values


def test_a_value_is_the_command_lines_else_the_presets_else_the_default():
    args = read(ppo_vla, "--env CartPole-v1 --gamma 0.5")
    assert (args.gamma, args.head, args.backbone, args.chunk) == (0.5, "discrete", "mlp", 1)
    assert args.save_freq == 50 and args.gae_lambda == ppo_vla.Args.gae_lambda
    args = read(ppo_vla, "--env Acrobot-v1")  # any other Gymnasium id
    assert (args.head, args.backbone, args.gamma) == ("tokens", "mlp", 0.98)
    args = read(grpo_vla, "")
    assert args.advantage_level == "decision" and args.env == "tabletop"
    assert read(ppo_vla, "--env=Pendulum-v1").init_std == 1.0


def test_a_world_without_a_preset_has_the_defaults_and_not_those_of_gymnasium_ids(monkeypatch):
    monkeypatch.setitem(WORLDS, "lab", "common.envs.tabletop")
    args = read(ppo_vla, "--env lab")
    assert args.backbone == "tiny" and args.chunk == 4 and args.num_steps == ppo_vla.Args.num_steps


def test_worlds_and_models_bring_their_own_flags_and_no_others(capsys):
    args = read(ppo_vla, "--env libero --device cpu --suite libero_90 --tasks 1 2 --lora-rank 32")
    assert (
        args.suite == "libero_90" and args.eval_episodes == 100 and args.lora_modules == ("language_model",)
    )
    assert read(ppo_vla, "--env libero --device cpu --suite libero_90").eval_episodes == 50 * 90
    assert read(ppo_vla, "--env libero --device cpu --eval-episodes 7").eval_episodes == 7
    large, small = (read(bc_warmup, f"--env libero --device cpu {x}") for x in ("", "--backbone tiny"))
    assert large.lora_modules == ("language_model", "projector", "vision")
    assert (large.num_demos, large.batch_size) == (small.num_demos, 16) == (50, 16)
    assert (small.batch_size, small.label_sigma) == (bc_warmup.Args.batch_size, 3.0)
    for script, text in (
        (ppo_vla, "--suite libero_90"),
        (ppo_vla, "--env CartPole-v1 --tasks lift"),
        (ppo_vla, "--env CartPole-v1 --reward shaped"),
        (ppo_vla, "--env CartPole-v1 --lora-rank 2"),
        (ppo_vla, "--env libero --device cpu --renderer gl"),
        (ppo_vla, "--unnorm-key none"),
        (bc_warmup, "--learn-std"),
        (iql, "--tasks lift"),
    ):
        with pytest.raises(SystemExit) as error:
            read(script, text)
        assert error.value.code == 2 and "Unrecognized" in capsys.readouterr().err


def test_gspo_has_clips_of_its_own_unless_a_flag_or_a_preset_has_others(monkeypatch):
    def clips(flags):
        args = read(grpo_vla, flags)
        return args.clip_low, args.clip_high

    assert clips("") == clips("--ratio-level token") == (0.2, 0.28)
    assert clips("--ratio-level sequence") == (3e-4, 4e-4)
    assert clips("--env libero --device cpu --ratio-level sequence") == (3e-4, 4e-4)  # which has others too
    assert read(grpo_vla, "--env libero --device cpu --ratio-level sequence").eval_episodes == 500
    assert clips("--ratio-level sequence --clip-low 0.2 --clip-high 0.28") == (0.2, 0.28)
    assert clips("--ratio-level sequence --clip-low 0.01 --clip-high 0.02") == (0.01, 0.02)
    monkeypatch.setitem(grpo_vla.PRESETS, "CartPole-v1", dict(head="discrete", clip_low=0.1, clip_high=0.3))
    assert clips("--env CartPole-v1 --ratio-level sequence") == (0.1, 0.3)
    said = " ".join(call(grpo_vla, "--ratio-level sequence --help").out.replace("│", " ").split())
    assert all(f"(default: {bound:g})" in said or f"(default: {bound})" in said for bound in (3e-4, 4e-4))


CARTPOLE = """--env CartPole-v1 --num-envs 8 --minibatch-size 64 --micro-batch-size 64 --update-epochs 2
    --eval-episodes 2 --eval-envs 2 --eval-freq 0 --device cpu --num-workers 0 --total-timesteps 1200"""
ONLINE = {ppo_vla: f"{CARTPOLE} --num-steps 32", grpo_vla: f"{CARTPOLE} --num-groups 2 --group-size 4"}


@pytest.mark.parametrize("script", ONLINE, ids=lambda script: script.__name__)
def test_old_log_probs_once_more_and_a_warning_where_they_are_others(tmp_path, monkeypatch, script):
    """In float32 on a CPU they are the same; a rollout whose kernels are off by 0.3 is warned of, once."""
    run(script, ONLINE[script], f"--output-dir {tmp_path} --run-name a")
    run(script, ONLINE[script], f"--output-dir {tmp_path} --run-name b --recompute-logprobs")
    a, b = (load_checkpoint(tmp_path / name)["agent"] for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
    act = script.Agent.get_action_and_value

    def off(*inputs, **options):
        actions, log_probs, value = act(*inputs, **options)
        return actions, log_probs + 0.3, value

    monkeypatch.setattr(script.Agent, "get_action_and_value", off)
    errors = {}
    for name, flag in (("off", ""), ("again", "--recompute-logprobs")):
        done = call(script, ONLINE[script], f"--output-dir {tmp_path} --run-name {name} {flag}")
        errors[name] = [value for _, value in scalars(tmp_path / name)["policy/first_ratio_error"]]
        said = (done.out + done.err).count("warning: policy/first_ratio_error is 0.2")
        assert done.code == 0 and len(errors[name]) > 1 and said == (not flag)
    assert errors["off"] == pytest.approx([1 - 2.718281828**-0.3] * len(errors["off"]), rel=1e-3)
    assert max(errors["again"]) < 1e-5


@pytest.mark.parametrize("script", ONLINE, ids=lambda script: script.__name__)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_gradient_that_is_not_finite_is_ever_applied(tmp_path, monkeypatch, script, where):
    calls, steps, surrogate, step = [], [], script.clipped_surrogate, torch.optim.AdamW.step

    def spoil(log_ratio, *inputs):
        calls.append(1)
        loss = surrogate(log_ratio, *inputs)
        bad = len(calls) == 4
        if bad and where == "gradient":  # a loss that looks well
            log_ratio.register_hook(lambda gradient: gradient * float("nan"))
        return loss * float("nan") if bad and where == "loss" else loss

    def watch(self, *inputs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        steps.append(all(x.isfinite().all() for x in gradients if x is not None))
        return step(self, *inputs)

    monkeypatch.setattr(script, "clipped_surrogate", spoil)
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    flags = "--critic-warmup 0 --policy-warmup 0" if script is ppo_vla else ""
    done = call(script, ONLINE[script], f"--output-dir {tmp_path} --run-name r --target-kl 99 {flags}")
    assert done.code == 2 and "a number is not finite" in done.err and steps == [True] * 3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_shows_every_flag_of_the_run_with_its_value(script):
    worlds = [("--env libero", "libero", "openvla"), ("", "tabletop", "tiny")]
    for flags, env, backbone in worlds if issubclass(script.Args, VLAArgs) else [("", None, None)]:
        done = call(script, f"{flags} --help")
        parts = [script.Args] + ([world_module(env).Args, model_module(backbone).Args] if env else [])
        for name in (field.name for part in parts for field in dataclasses.fields(part)):
            assert f"--{name.replace('_', '-')}" in done.out or f"--no-{name.replace('_', '-')}" in done.out
        assert done.code == 0 and not done.err
        if env == "libero" and script is ppo_vla:
            text = " ".join(done.out.replace("│", " ").split())
            assert "(default: 500)" in text and "(default: openvla)" in text and "(default: 1.6)" in text


def test_flags_of_a_script_a_world_and_a_model_never_clash():
    for script in SCRIPTS:
        own = {field.name for field in dataclasses.fields(script.Args)}
        for env in WORLDS:
            world = {field.name for field in dataclasses.fields(world_module(env).Args)}
            assert not own & world
            for name in BACKBONES:
                model = {field.name for field in dataclasses.fields(model_module(name).Args)}
                assert not (own | world) & model


@dataclass
class Small(RunArgs):
    rate: Positive = 1.0
    weight: NonNegative = 0.0
    part: Share = 0.5
    plain: float = 0.0
    head: Literal["a", "b"] = "a"
    width: Annotated[int, Only("head", "b")] = 3
    size: Annotated[int, FIXED] = 3
    heat: Annotated[float, KEPT] = 1.0
    targets: tuple[float, ...] = ()
    limit: float | None = None
    alpha: float | Literal["auto"] = "auto"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--rate 0", "--rate must be positive, not 0.0"),
        ("--weight -1", "--weight must not be negative, not -1.0"),
        ("--part 1.5", r"--part must be in \[0, 1\], not 1.5"),
        ("--plain nan", "--plain must be a finite number, not nan"),
        ("--rate inf", "--rate must be a finite number"),
        ("--targets 1 nan", "--targets must be a finite number"),
        ("--targets 1 inf", "--targets must be a finite number"),
        ("--limit nan", "--limit must be a finite number"),
        ("--heat=-inf", "--heat must be a finite number"),
        ("--alpha nan", "--alpha must be a finite number"),
        ("--size 9223372036854775808", "--size must be below"),
        ("--checkpoint=", "--checkpoint is empty; give it a value or drop it"),
        ("--resume=", "--resume is empty"),
        ("--run-name=", "--run-name is empty"),
        ("--output-dir=", "--output-dir is empty"),
        ("--run-name .", "leads out of --output-dir"),
        ("--run-name ..", "leads out of --output-dir"),
        ("--run-name a/../../b", "leads out of --output-dir"),
        ("--run-name /tmp/x", "leads out of --output-dir"),
        ("--seed -1", "--seed must be in"),
        ("--width 4", "--width does nothing without --head b; drop it"),
        ("--width=3", "--width does nothing without --head b; drop it"),
    ],
)
def test_values_that_cannot_work_are_refused_in_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        read_flags(flags.split(), Small, {}, "small")
    assert read_flags("--width 4 --head b".split(), Small, {}, "small")[0].width == 4


def test_every_part_of_the_arguments_is_checked():
    @dataclass
    class World:
        grip: int = 0

        def check(self):
            if self.grip < 0:
                raise UserError("no grip")

    both = dataclasses.make_dataclass("Args", [], bases=(World, Small))
    check_values(both(), set())
    with pytest.raises(UserError, match="no grip"):
        check_values(both(grip=-1), set())
    with pytest.raises(UserError, match="seed"):
        check_values(both(seed=-1), set())


# --- what a checkpoint fixes


@pytest.fixture
def stored(tmp_path):
    args = dataclasses.asdict(Small(size=7, heat=2.0, rate=5.0))
    save_checkpoint(tmp_path / "checkpoint.pt", "small", {"args": args, "agent": {}})
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_fixes_what_is_part_of_it(stored):
    parse = lambda flags: read_flags(f"--checkpoint {stored} {flags}".split(), Small, {}, "other")[0]  # noqa: E731
    assert parse("").size == 7 and parse("--size 7").size == 7 and parse("").rate == 1.0
    with pytest.raises(UserError, match="--size 3 is not what the checkpoint has: 7 is part of it"):
        parse("--size 3")
    assert parse("").heat == 1.0  # training goes on at this command's
    assert parse("--evaluate").heat == 2.0 and parse("--evaluate --heat 3").heat == 3.0


def test_a_checkpoint_of_the_other_family_is_refused(stored):
    with pytest.raises(UserError, match="was written by small.py, whose networks are none of ppo_vla.py's"):
        read(ppo_vla, f"--checkpoint {stored}")
    with pytest.raises(UserError, match="holds weights alone"):
        read_flags(f"--resume {stored}".split(), Small, {}, "small")
    with pytest.raises(UserError, match="was written by small.py; resume it with that script"):
        read_flags(f"--resume {stored}".split(), Small, {}, "other")


def test_the_family_of_a_backbone(tmp_path):
    assert family_of("tiny") == "tiny" and family_of("someone/model") == "openvla" == family_of(str(tmp_path))
    with pytest.raises(UserError, match="Unknown backbone 'huge'; known: tiny, mlp"):
        family_of("huge")


# --- the handle


def open_run(tmp_path, **changes):
    handle = Run(Small(output_dir=str(tmp_path), run_name="r", **changes), None, Path("small.py"))
    handle.args.env = "nowhere"
    handle.open()
    handle.begin(0, 100, "step")
    return handle


def test_the_best_evaluation_is_kept_and_the_latest_of_none(tmp_path):
    with open_run(tmp_path) as handle:
        scores = [0.5, 0.4, 0.5, 0.6, 0.2]
        each = [{"episodes": 2, "success_rate": x, "success_rate_ci95": [x - 0.1, 1.0]} for x in scores]
        found = [handle.record(evaluation, 1) for evaluation in each]
        assert found == [True, False, False, True, False]
        assert (handle.initial["success_rate"], handle.best["success_rate"]) == (0.5, 0.6)
        handle.finish(5, 6)
        written = json.loads((tmp_path / "r/results.json").read_text())
        assert written["final"]["success_rate"] == 0.2 and written["environment_steps"] == 5
    with open_run(tmp_path / "none") as handle:  # without evaluations best.pt is the last
        assert [handle.record({"episodes": 0}, 1) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    "bf16, has, said", [(True, "avx2", True), (True, "avx512_bf16", False), (False, "avx2", False)]
)
def test_a_cpu_without_bfloat16_is_told_so(tmp_path, monkeypatch, capsys, bf16, has, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, has: True})
    args = read(iql, "--device cpu --bf16" if bf16 else "--device cpu")
    with Run(args, None, Path("iql.py")):
        assert ("--bf16 can take many times as long" in capsys.readouterr().err) == said


def test_numbers_that_are_not_finite_end_the_run_with_their_names(tmp_path):
    with open_run(tmp_path) as handle:
        good = {"loss/total": torch.tensor(1.0)}
        handle.check_finite(good, "step 3")
        for bad in (float("nan"), float("inf")):
            with pytest.raises(
                UserError, match="step 3: .*not finite.*loss/value.*reward -1 to 2.*last good state"
            ):
                loss = torch.tensor(bad)
                handle.check_finite(good | {"loss/value": loss}, "step 3", reward=torch.tensor([-1.0, 2.0]))


def test_time_is_shared_out_among_the_laps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with open_run(tmp_path) as handle:
        for name, seconds in (("policy", 3.0), ("env", 5.0), ("policy", 1.0)):
            now[0] += seconds
            handle.lap(name)
        now[0] += 1.0
        handle.log({"loss": 2.0}, 50)
        now[0] += 1.0
        handle.save("checkpoint.pt", {"agent": {}}, own={})  # the time of a checkpoint is nobody's
        now[0] += 2.0
        handle.log({"loss": 1.0}, 60)
    found = scalars(tmp_path / "r")
    assert found["time/policy_share"] == [(50, pytest.approx(0.4))]
    assert found["time/env_share"] == [(50, pytest.approx(0.5))]
    assert [value for _, value in found["time/steps_per_second"]] == pytest.approx([5.0, 5.0])


def test_an_interval_of_zero_is_never_due(tmp_path):
    with open_run(tmp_path) as handle:
        assert handle.due(10, 5) and handle.due(10, 0, 2) and not handle.due(10, 3) and not handle.due(10, 0)


def test_the_means_of_no_updates_are_none():
    assert mean_metrics([]) == {}
    found = mean_metrics([{"a": torch.tensor(1.0)}, {"a": torch.tensor(4.0)}])
    assert found == {"a": torch.tensor(2.5)}


@pytest.mark.parametrize(
    ("script", "flags", "world"),
    [
        (ppo_vla, "--env CartPole-v1 --num-workers 1", "common.envs.gymnasium_env"),
        (bc_warmup, "--num-workers 2", "common.envs.tabletop"),
        (grpo_vla, "--num-workers 0", None),
        (sac, "", None),
    ],
)
def test_what_workers_are_forked_from_is_started_before_the_run(monkeypatch, script, flags, world):
    """Once, with the world's file, before CUDA is asked for; nothing where there are no workers."""
    order = []
    monkeypatch.setattr(forkserver, "start", order.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: order.append("CUDA"))
    assert call(script, flags, "--device cuda").code == 2
    assert order == [world, "CUDA"][world is None :]


def test_several_processes_are_refused_where_one_trains(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for script in set(SCRIPTS) - {ppo_vla, grpo_vla}:
        done = call(script, "--device cpu")
        assert done.code == 2 and f"{script.__name__}.py trains in one process" in done.err


def test_a_taken_name_is_noticed_before_anything_is_loaded(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/checkpoint.pt").write_text("of another run")
    done = call(bc_warmup, f"--output-dir {tmp_path} --run-name taken")
    assert done.code == 2 and "already holds a checkpoint" in done.err and not done.out


# --- one run a folder

HOLD = """
import os, sys, time
sys.path[:0] = ["{root}", "{root}/tests"]
from pathlib import Path
from test_run import open_run
open_run(Path(sys.argv[1]))
if not os.fork():  # as a worker that is stuck: the lock is not its
    time.sleep(20)
    os._exit(0)
print("open", flush=True)
time.sleep(60)
"""


def test_a_folder_is_one_living_runs(tmp_path):
    code = HOLD.replace("{root}", str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    before = (tmp_path / "r/args.json").read_text()
    with pytest.raises(CheckpointError, match="belongs to a run that still goes on; stop it first"):
        open_run(tmp_path, seed=7)
    assert (tmp_path / "r/args.json").read_text() == before
    process.kill()
    process.wait()
    process.stdout.close()
    with open_run(tmp_path, seed=7) as handle:
        assert sorted(path.name for path in handle.folder.iterdir())[0] == "args.json"
        assert json.loads((tmp_path / "r/args.json").read_text())["seed"] == 7


def test_a_running_run_is_not_resumed(tmp_path, monkeypatch):
    run(bc_warmup, BC, f"--output-dir {tmp_path} --run-name r")
    code = f"import fcntl, time; f = open({str(tmp_path / 'r/args.json')!r}, 'a'); "
    code += "fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    done = call(bc_warmup, f"--resume {tmp_path}/r")
    process.kill()
    process.wait()
    process.stdout.close()
    assert done.code == 2 and "belongs to a run that still goes on" in done.err, done
    assert done.err.count("\n") == 1
    stamps = iter([(1, 1), (2, 2)])  # it was saved once more between the reading and the lock
    monkeypatch.setattr(Run, "_stamp", lambda self: next(stamps))
    done = call(bc_warmup, f"--resume {tmp_path}/r")
    assert done.code == 2 and "was still being written by its run; resume it once more" in done.err, done


# --- full disks, too little memory


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["__init__", "add_scalar", "close"])
def test_a_log_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch, what):
    monkeypatch.setattr(common.run.SummaryWriter, what, full)
    done = call(bc_warmup, BC, f"--output-dir {tmp_path} --run-name r")
    assert done.code == 0 and results(tmp_path / "r")["gradient_steps"] == 9
    assert done.err.count("the log cannot be written") == (what != "close"), done
    assert done.err.count("\n") <= 1


def test_a_log_goes_on_once_there_is_room_for_a_checkpoint(tmp_path, monkeypatch):
    with open_run(tmp_path) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(common.run.SummaryWriter, "add_scalar", full)
            handle.log({"loss": 2.0}, 10)
        handle.log({"loss": 3.0}, 15)
        handle.save("checkpoint.pt", {"agent": {}})
        handle.log({"loss": 1.0}, 20)
    assert scalars(tmp_path / "r")["loss"] == [(20, 1.0)]


def test_a_full_disk_in_the_logs_thread_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    hook = threading.excepthook
    done = call(bc_warmup, BC, f"--output-dir {tmp_path} --run-name r")
    monkeypatch.setattr(threading, "excepthook", hook)
    assert done.code == 0 and results(tmp_path / "r")["gradient_steps"] == 9
    assert re.fullmatch("warning: the log cannot be written .*; the run goes on.\n", done.err), done


def test_a_folder_that_lost_its_args_gets_them_back(tmp_path):
    small = "--width 8 --depth 1 --batch-size 8 --total-timesteps 2 --eval-episodes 0 --device cpu"
    run(iql, small, f"--dataset {write_pendulum(tmp_path / 'd.hdf5')} --output-dir {tmp_path} --run-name r")
    file = tmp_path / "r" / "args.json"
    wanted = json.loads(file.read_text())
    for lose in (file.unlink, lambda: file.write_text("")):
        lose()
        run(iql, f"--resume {tmp_path}/r")
        assert json.loads(file.read_text()) == wanted | {"resume": f"{tmp_path}/r"}


LAYERS = [(script, name) for script in (sac, iql, td3_bc, cql) for name in ("depth", "width")]
LAYERS += [(cql, "critic_depth"), (decision_transformer, "n_layer"), (decision_transformer, "embed_dim")]


@pytest.mark.parametrize(("script", "name"), LAYERS)
def test_layers_that_no_memory_holds_are_refused_before_any_is_made(monkeypatch, script, name):
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("a layer was made"))
    done = call(script, f"--device cpu --{name} {10**9}")
    assert re.fullmatch(
        r"error: --[a-z-]+ \d+ with --[a-z-]+ \d+ needs \d+ GB, and .* smaller numbers.\n", done.err
    )
    assert done.code == 2


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (decision_transformer, "--target-returns", "--target-returns is empty; give it a value or drop it."),
        (cql, "--cql-alpha 0 --target-gap 1", "--target-gap does nothing with --cql-alpha 0.0; drop it."),
        (cql, "--cql-alpha 0 --min-penalty 1", "--min-penalty does nothing with --cql-alpha 0.0; drop it."),
        (ppo_vla, f"--num-steps {10**12}", f"--num-steps {10**12} of 64 environments do not fit into"),
        (sac, "--env Pendulum-v1 --save-dataset {pipe}", "--save-dataset .* is there, and no file; "),
        (sac, "--env Pendulum-v1 --save-dataset {pipe}/../d/e", "--save-dataset .* leads through a file; "),
        (sac, "--env Pendulum-v1 --append --save-dataset {pipe}/../loop", "--save-dataset .*, and no file; "),
    ],
)
def test_what_cannot_work_shows_at_the_start(tmp_path, script, flags, said):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "d").touch()
    (tmp_path / "loop").symlink_to("loop")
    done = call(
        script,
        flags.replace("{pipe}/..", str(tmp_path)).format(pipe=tmp_path / "pipe"),
        f"--device cpu --output-dir {tmp_path}",
    )
    assert done.code == 2 and re.match(f"error: {said}", done.err) and done.err.count("\n") == 1, done


def test_a_run_that_got_to_nothing_leaves_no_folder(tmp_path):
    flags = f"--env Pendulum-v1 --eval-episodes 0 --device cpu --output-dir {tmp_path} --run-name r"
    done = call(sac, flags, f"--buffer-size {10**15}")
    assert done.code == 2 and not list(tmp_path.iterdir()), done
    (tmp_path / "file").touch()  # no place at all
    done = call(sac, flags.replace(str(tmp_path), f"{tmp_path}/file"))
    assert done.code == 2 and done.err.count("\n") == 1 and "cannot be written" in done.err, done
    (tmp_path / "r").mkdir()  # somebody's
    done = call(sac, flags, f"--buffer-size {10**15}")
    assert done.code == 2 and (tmp_path / "r").is_dir()


@pytest.mark.parametrize("name", ["grounding-scenes", "grounding-steps", "grounding-coef", "demo-noise"])
def test_what_only_a_scripted_expert_has_is_refused_beside_demos(name):
    done = call(bc_warmup, f"--demos d.hdf5 --{name} 3")
    assert (done.code, done.err) == (2, f"error: --{name} does nothing with --demos d.hdf5; drop it.\n")


def test_words_that_nobody_can_read_cost_no_run(tmp_path, monkeypatch):
    flags = words(BC, f"--output-dir {tmp_path} --run-name r")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as out:
        command = [sys.executable, str(ROOT / "bc_warmup.py"), *flags]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env=env, check=False)
    assert b"Traceback" not in done.stderr, done
    assert results(tmp_path / "r")["gradient_steps"] == 9


def test_args_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/args.json").symlink_to("/dev/full")
    done = call(bc_warmup, BC, f"--output-dir {tmp_path} --run-name r")
    assert done.code == 2 and "args.json cannot be written" in done.err and done.err.count("\n") == 1, done
    (tmp_path / "r/args.json").unlink()
    os.mkfifo(tmp_path / "r/args.json")
    done = call(bc_warmup, BC, f"--output-dir {tmp_path} --run-name r")
    assert done.code == 2 and "args.json cannot be written" in done.err and done.err.count("\n") == 1, done


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (sac, "--env Pendulum-v1 --buffer-size 1000000000000"),
        (sac, "--env Pendulum-v1 --buffer-size 1000000000000000000"),
        (sac, "--env Pendulum-v1 --num-envs 1000000000 --buffer-size 1000000000"),
        (sac, "--env Pendulum-v1 --eval-episodes 1000000000"),
        (sac, "--env Pendulum-v1 --eval-episodes 50000000 --eval-envs 50000000"),
        (ppo_vla, "--env CartPole-v1 --num-envs 1000000000 --eval-envs 1"),
        (ppo_vla, "--env CartPole-v1 --eval-episodes 1000000000"),
    ],
)
def test_what_no_memory_holds_is_one_sentence(tmp_path, script, flags):
    done = call(script, flags, f"--output-dir {tmp_path}")
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.endswith(".\n"), done


def test_other_errors_pass_as_they_are(tmp_path, monkeypatch):
    def broken(args, run):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["small.py", "--output-dir", str(tmp_path)])
    with pytest.raises(RuntimeError, match="a bug"):
        common.run.main(broken, Small, {})


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, kind):
    place = tmp_path / "checkpoint.pt"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(place))
        listening.close()
    else:
        place.mkdir()
    for script, flags in (
        (bc_warmup, f"--checkpoint {place}"),
        (bc_warmup, f"--resume {tmp_path}"),
        (bc_warmup, f"{FROM_FILE} --demos {place}"),
        (iql, f"--dataset {place}"),
    ):
        done = call(script, flags, *([] if "--resume" in flags else [f"--output-dir {tmp_path}/runs"]))
        assert done.code == 2 and done.err.count("\n") == 1, done
    with pytest.raises(UserError, match="is not a file|cannot be read"):
        read_statistics("x", tmp_path, {}, "key", str(place))
    save = f"--env Pendulum-v1 --save-dataset {place} --append"
    done = call(sac, save, f"--output-dir {tmp_path}/runs")
    assert done.code == 2 and done.err.count("\n") == 1, done


# --- a copy of a script


def test_a_copy_of_a_script_works_under_its_own_name(tmp_path):
    (tmp_path / "common").symlink_to(ROOT / "common")
    shutil.copy(ROOT / "ppo_vla.py", tmp_path / "my_idea.py")
    (tmp_path / "my_idea.py").write_text((tmp_path / "my_idea.py").read_text().replace(
        "            gradient_steps += 1\n",
        "            gradient_steps += 1\n"
        "            import os, signal\n"
        "            if gradient_steps == 3 and not args.resume:\n"
        "                os.kill(os.getpid(), signal.SIGTERM)\n",
    ))  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def mine(*flags):
        command = [sys.executable, "my_idea.py", *words(*flags)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = mine(PPO, "--total-timesteps 200")
    assert done.returncode == 128 + signal.SIGTERM, done
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tabletop__my_idea__3__")
    assert load_checkpoint(folder)["script"] == "my_idea"
    told = done.stdout.strip().splitlines()[-1].partition("go on with: ")[2]
    assert told == f"python my_idea.py --resume runs/{folder.name}"
    done = mine(told.partition("my_idea.py ")[2])
    assert done.returncode == 0 and results(folder)["environment_steps"] >= 200
    run(ppo_vla, PPO, f"--evaluate --checkpoint {folder} --output-dir {tmp_path} --run-name again")
    assert results(tmp_path / "again")["final"] == results(folder)["final"]
    done = call(ppo_vla, f"--resume {folder}")
    assert done.code == 2 and "was written by my_idea.py; resume it with that script" in done.err


# --- the log


def test_a_point_is_logged_once_after_a_crash(tmp_path, monkeypatch):
    """Between a checkpoint at step 20 and the next: what was logged there is logged again, and not twice."""
    rate, calls = bc_warmup.learning_rate_at, []

    def crash(step, args):
        calls.append(step)
        if len(calls) == 24:
            raise RuntimeError("a power cut")
        return rate(step, args)

    monkeypatch.setattr(bc_warmup, "learning_rate_at", crash)
    flags = f"--grounding-steps 0 --gradient-steps 30 --save-freq 20 --eval-freq 20 --output-dir {tmp_path}"
    with pytest.raises(RuntimeError, match="power cut"):
        call(bc_warmup, BC, flags, "--run-name r")
    assert load_checkpoint(tmp_path / "r")["step"] == 20
    monkeypatch.undo()
    run(bc_warmup, f"--resume {tmp_path}/r")
    found = scalars(tmp_path / "r")
    assert [step for step, _ in found["loss/policy"]] == [1, 21]
    assert [step for step, _ in found["eval/success_rate"]] == [0, 20, 30]
