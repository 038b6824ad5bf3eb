"""GRPO through its command line: groups, refill, carry-over, dead compute, and an exact resume."""

import os
import random
import signal
import subprocess

import pytest
import torch
from conftest import live_workers
from test_cli import (
    BC,
    CONTRACT,
    EVAL,
    assert_same_run,
    call,
    check_evaluation,
    check_schedules,
    command,
    one_thread,  # noqa: F401 (a fixture)
    results,
    run,
    saves,
    scalars,
    stopped_by,
)

import bc_warmup
import grpo_vla
import ppo_vla
from common.checkpoint import load_checkpoint, save_checkpoint

GRPO = f"""{EVAL} --num-envs 6 --group-size 3 --num-groups 1 --total-timesteps 1500 --chunk 5
    --update-epochs 2 --minibatch-size 9 --micro-batch-size 4 --eval-freq 0 --save-freq 99
    --learning-rate 1e-3 --temperature 1.6 --accuracy-low 0 --accuracy-high 1 --max-steps 0"""
CARTPOLE = """--env CartPole-v1 --num-envs 5 --num-groups 2 --group-size 4 --total-timesteps 1500
    --minibatch-size 64 --micro-batch-size 64 --update-epochs 2 --eval-episodes 5 --eval-envs 3 --eval-freq 3
    --save-freq 1 --seed 3 --device cpu --num-workers 0"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def warmup(home):
    run(bc_warmup, BC, f"--output-dir {home} --run-name warmup --gradient-steps 20")
    return home / "warmup"


@pytest.fixture(scope="module")
def trained(home, warmup):
    flags = f"--checkpoint {warmup} --lora-rank 4 --output-dir {home} --run-name grpo --num-workers 2"
    run(grpo_vla, GRPO, flags, "--eval-freq 2 --save-freq 1")
    return home / "grpo"


class Spy:
    """What the update was given, and every group that was complete, kept or not."""

    def __init__(self, monkeypatch, keep=None):
        self.complete, self.kept, self.batches, self.decisions = [], [], [], []
        informative, advantages = grpo_vla.informative, grpo_vla.decision_advantages

        def watch(outcomes, *rest):
            kept = informative(outcomes, *rest) if keep is None else keep(len(self.complete))
            self.complete.append(outcomes)
            self.kept += [outcomes] if kept else []
            return kept

        def batch(returns, present):
            self.batches.append(returns[:, :, 0].tolist())
            self.decisions.append(present.shape[2])
            return advantages(returns, present)

        monkeypatch.setattr(grpo_vla, "informative", watch)
        monkeypatch.setattr(grpo_vla, "decision_advantages", batch)


# --- a run


def test_results_logs_and_ratio_of_a_run(warmup, trained):
    found = results(trained)
    assert sorted(found) == sorted(CONTRACT) and found["environment_steps"] >= 1500
    assert found["initial"] == results(warmup)["final"]
    check_evaluation(found["final"], 5, True)
    logged = scalars(trained)
    assert set("rollout/trained_share rollout/refill_factor rollout/groups_kept".split()) <= set(logged)
    # temperature 1.6, adapters that have trained, chunks cut off by the end: what is fresh has ratio 1
    errors = [value for _, value in logged["policy/first_ratio_error"]]
    assert len(errors) > 2 and max(errors) < 1e-5
    assert logged["policy/stale_share"][0][1] == 0
    before, after = load_checkpoint(warmup)["agent"], load_checkpoint(trained)["agent"]
    assert any(".lora_B." in key and value.any() for key, value in after.items())
    assert not any("value_head" in key for key in {**before, **after})


def test_evaluation_of_the_saved_file_is_the_runs_final_one(home, trained):
    """Greedy, and drawn at the temperature that it was trained with, from which another one differs."""
    flags = f"{EVAL} --evaluate --checkpoint {trained} --output-dir {home}"
    run(grpo_vla, flags, "--run-name again")
    assert results(home / "again")["final"] == results(trained)["final"]
    drawn = {}
    for name, temperature in (("own", ""), ("same", "--temperature 1.6"), ("other", "--temperature 0.35")):
        run(grpo_vla, flags, f"--no-deterministic --eval-episodes 12 --run-name {name}", temperature)
        drawn[name] = results(home / name)
    assert drawn["own"]["args"]["temperature"] == 1.6 and drawn["own"]["final"] == drawn["same"]["final"]
    assert drawn["own"]["final"] != drawn["other"]["final"]  # which is the default


def test_it_starts_from_a_checkpoint_of_ppo(home, warmup, tmp_path):
    flags = "--num-envs 2 --num-steps 2 --total-timesteps 20 --temperature 1.6"
    run(ppo_vla, EVAL, flags, f"--checkpoint {warmup} --output-dir {tmp_path} --run-name ppo")
    base = f"--checkpoint {tmp_path}/ppo --output-dir {tmp_path} --total-timesteps 60"
    run(grpo_vla, GRPO, base, "--run-name grpo")
    assert results(tmp_path / "grpo")["initial"] == results(tmp_path / "ppo")["final"]


def test_the_number_of_workers_changes_nothing(tmp_path, warmup):
    for name, workers in (("a", 0), ("b", 2)):
        flags = f"--num-workers {workers} --output-dir {tmp_path} --run-name {name} --total-timesteps 700"
        run(grpo_vla, GRPO, flags, f"--checkpoint {warmup}")
    assert results(tmp_path / "a")["gradient_steps"] > 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


# --- groups


def groups_of(state):
    return state["processes"][0]["state"]["groups"]


def episodes_of(state):
    """(group, episode's chunks) of all that a checkpoint holds."""
    groups = groups_of(state)
    found = [(e["group"], e["chunks"]) for e in groups["playing"] if e and e["chunks"]]
    for n, members in groups["incomplete"].items():
        columns = [e["chunks"] for e in members]
        found += [
            (n, [dict(zip(x, row, strict=True)) for row in zip(*x.values(), strict=True)]) for x in columns
        ]
    return found


def test_members_of_a_group_share_their_state(trained):
    """Bit-equal first observations within a group, other ones in other groups."""
    first, several = {}, 0
    for group, chunks in episodes_of(load_checkpoint(trained)):
        several += group in first
        seen = first.setdefault(group, chunks[0])
        for key in ("proprio", "input_ids", "vision"):
            assert torch.equal(seen[key], chunks[0][key]), key
    assert several > 0 and len(first) > 1
    a, b = list(first.values())[:2]
    assert not torch.equal(a["vision"], b["vision"])


def test_kept_groups_are_used_once_in_order_and_dropped_ones_never(tmp_path, warmup, monkeypatch):
    """Every third group is kept; several finish at once, so that some have to wait."""
    spy = Spy(monkeypatch, keep=lambda index: index % 3 != 1)
    flags = f"--checkpoint {warmup} --output-dir {tmp_path} --run-name r --num-envs 12 --max-steps 10"
    run(grpo_vla, GRPO, flags, "--total-timesteps 1000 --num-groups 2")
    used = [outcomes for batch in spy.batches for outcomes in batch]
    assert len(spy.batches) > 3 and all(len(batch) == 2 for batch in spy.batches[:-1])
    assert set(spy.decisions) == {2}  # 10 steps are 2 chunks of 5
    assert used == [pytest.approx(outcomes) for outcomes in spy.kept[: len(used)]]
    assert 0 <= len(spy.kept) - len(used) <= 4
    logged = scalars(tmp_path / "r")
    assert max(value for _, value in logged["rollout/groups_waiting"]) > 0  # carried over, not thrown away
    refill = [value for _, value in logged["rollout/refill_factor"]]
    # all complete groups are counted once, in the iteration that saw them
    counted = sum(2 * value for value in refill)
    assert counted == pytest.approx(len(spy.complete), abs=4)


def test_uniform_groups_are_dropped_until_the_refill_limit(tmp_path, warmup):
    """Nobody succeeds: no update at all, and the run ends all the same."""
    flags = f"--checkpoint {warmup} --reward sparse --output-dir {tmp_path} --run-name r --max-steps 1"
    run(grpo_vla, GRPO, flags, "--total-timesteps 300 --max-refill 2 --eval-freq 4")
    assert results(tmp_path / "r")["gradient_steps"] == 0
    logged = scalars(tmp_path / "r")  # each of them tells, evaluates and saves all the same
    assert len(logged["rollout/success_rate"]) > 4 and len(logged["eval/success_rate"]) > 3
    assert all(value == 0 for _, value in logged["rollout/groups_kept"])
    assert load_checkpoint(tmp_path / "r")["counters"][1] == len(logged["rollout/success_rate"])
    before, after = load_checkpoint(warmup)["agent"], load_checkpoint(tmp_path / "r")["agent"]
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_finished_episodes_let_go_of_their_batch():
    """A row of a batch would keep what all other environments did, dropped groups' too."""
    groups = grpo_vla.Groups(8, 0)
    groups.start(1, 2, 1)
    args = grpo_vla.Args(group_size=2, accuracy_low=0.0, accuracy_high=1.0)
    for reward in (0.0, 1.0):
        for n, row in enumerate(torch.randn(8, 1000).unbind()):
            groups.add(n, {"vision": row}, reward * (n < 3), 1)
    for n in range(8):
        groups.end(n, n < 3, args, True)
    assert len(groups.ready) == 1 and not groups.incomplete  # of four groups two and two succeed or fail
    for member in groups.ready[0]:
        assert member["chunks"]["vision"].untyped_storage().nbytes() == 2 * 1000 * 4


def test_single_decisions_compare_actions_for_one_state(tmp_path, warmup, monkeypatch):
    """--max-steps 1: all chunks of a group see the same observation, and outcomes are one reward."""
    seen, cat = [], torch.cat

    def watch(tensors, *args, **kwargs):
        found = cat(tensors, *args, **kwargs)
        if {x.shape for x in tensors} == {(1, 8)} and found.dtype == torch.float32:
            seen.append(found)  # proprio of a batch
        return found

    monkeypatch.setattr(torch, "cat", watch)
    flags = f"--checkpoint {warmup} --output-dir {tmp_path} --run-name r --max-steps 1"
    run(grpo_vla, GRPO, flags, "--total-timesteps 300 --num-groups 2")
    assert len(seen) > 2
    for proprio in seen:
        assert len(proprio) == 6  # 2 groups of 3 episodes of one chunk
        for group in proprio.split(3):
            assert (group == group[0]).all()


def test_no_chunk_is_computed_after_an_end(tmp_path, warmup, monkeypatch):
    """Forward passes of the rollout = chunks of complete, running and dropped episodes, none else."""
    computed, trained = [], []
    act, update = grpo_vla.Agent.get_action_and_value, grpo_vla.aggregation_weights

    def watch(self, batch, vision=None, deterministic=False, generator=None):
        computed.extend([1] * (len(batch["proprio"]) if not deterministic else 0))
        return act(self, batch, vision, deterministic, generator)

    def count(covered, *rest):
        trained.append(len(covered))
        assert covered.any(1).all()  # every chunk in the update was executed at least in part
        return update(covered, *rest)

    monkeypatch.setattr(grpo_vla.Agent, "get_action_and_value", watch)
    monkeypatch.setattr(grpo_vla, "aggregation_weights", count)
    monkeypatch.setattr(grpo_vla, "informative", lambda *_: True)
    flags = f"--checkpoint {warmup} --output-dir {tmp_path} --run-name r"
    run(grpo_vla, GRPO, flags)
    state = load_checkpoint(tmp_path / "r")
    left = sum(len(chunks) for _, chunks in episodes_of(state))
    left += sum(len(e["returns"]) for members in groups_of(state)["ready"] for e in members)
    assert sum(computed) == sum(trained) + left


def test_no_chunk_without_an_advantage_is_trained_on(tmp_path, warmup, monkeypatch):
    trained, informed = [], []
    evaluate, advantages = grpo_vla.Agent.evaluate_actions, grpo_vla.decision_advantages

    def watch(self, batch, *rest):
        trained.append(len(batch["proprio"]))
        return evaluate(self, batch, *rest)

    def count(returns, present):
        found = advantages(returns, present)
        found[:, :, 1::2] = 0  # as if all had ended alike from there
        informed.append((int((found != 0).sum()), int(present.sum())))
        return found

    monkeypatch.setattr(grpo_vla.Agent, "evaluate_actions", watch)
    monkeypatch.setattr(grpo_vla, "decision_advantages", count)
    run(grpo_vla, GRPO, f"--checkpoint {warmup} --output-dir {tmp_path} --run-name r")
    some, every = (sum(column) for column in zip(*informed, strict=True))
    assert sum(trained) == some * results(tmp_path / "r")["args"]["update_epochs"] and 0 < some < every
    logged = scalars(tmp_path / "r")
    shares = (logged[f"rollout/{name}_share"] for name in ("trained", "kept"))
    for (_, used), (_, kept) in zip(*shares, strict=True):
        assert 0 < used < kept


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "no answer for 2 s")]
)
def test_a_worker_that_dies_or_hangs_does_not_end_the_run(tmp_path, warmup, monkeypatch, number, reason):
    """Its members are played once more: complete groups still have all their members."""
    spy, calls, act = Spy(monkeypatch), [], grpo_vla.Agent.get_action_and_value

    def murderous(*args, **kwargs):
        calls.append(1)
        if len(calls) == 24:  # in the first episodes; the evaluation takes 20
            for child in live_workers():
                os.kill(child.pid, number)
        return act(*args, **kwargs)

    monkeypatch.setattr(grpo_vla.Agent, "get_action_and_value", murderous)
    flags = f"--checkpoint {warmup} --num-workers 2 --output-dir {tmp_path} --run-name r --worker-timeout 2"
    with pytest.warns(RuntimeWarning, match=f"was restarted.*episodes lost so far.*{reason}"):
        done = call(grpo_vla, GRPO, flags)
    assert done.code == 0
    assert scalars(tmp_path / "r")["rollout/lost_episodes"][-1][1] > 0
    assert spy.complete and all(len(outcomes) == 3 for outcomes in spy.complete)


# --- variants


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            "--ratio-level sequence --aggregation sequence-mean-token-mean --kl-coef 0.1 --lora-rank 2",
            marks=pytest.mark.slow,
        ),
        "--num-groups 2 --num-envs 9 --ratio-level token --aggregation constant-length --leave-one-out "
        "--advantage-level episode",
        pytest.param(
            "--ratio-level chunk --kl-coef 0.1 --train-vision --verifier-gamma 0.9", marks=pytest.mark.slow
        ),
        pytest.param("--ratio-level sequence --entropy-coef 0.01 --head gaussian", marks=pytest.mark.slow),
        "--ratio-level token --head flow --flow-noise fpo --flow-steps 2 --curriculum --exploration-end 0.5",
    ],
)
def test_every_variant_goes_on_bit_identically(tmp_path, monkeypatch, flags):
    """Stopped in the middle of an iteration: running episodes and groups that wait go along."""
    run(grpo_vla, GRPO, flags, f"--output-dir {tmp_path} --run-name whole")
    found = results(tmp_path / "whole")
    assert found["gradient_steps"] > 8
    assert max(value for _, value in scalars(tmp_path / "whole")["policy/first_ratio_error"]) < (
        1e-5 if "sequence" not in flags else 1  # an episode's ratio mixes old chunks with fresh ones
    )
    stopped_by(monkeypatch, grpo_vla.Agent, "get_action_and_value", 36)  # in the second episodes
    done = call(grpo_vla, GRPO, flags, f"--output-dir {tmp_path} --run-name stopped")
    assert done.code == 128 + signal.SIGINT and "stopped at" in done.out and not done.err
    state = load_checkpoint(tmp_path / "stopped")
    assert episodes_of(state) and state["counters"][0] < found["environment_steps"]
    if "--num-groups 2" in flags:
        assert len(groups_of(state)["ready"]) == 1  # the third group waits
    monkeypatch.undo()
    assert call(grpo_vla, f"--resume {tmp_path}/stopped/checkpoint.pt").code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    check_schedules(tmp_path / "whole", grpo_vla, "--curriculum" in flags)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_bit_identically(tmp_path, number):
    run(grpo_vla, CARTPOLE, f"--output-dir {tmp_path} --run-name whole")
    rng = random.Random(int(number))
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(grpo_vla, CARTPOLE, f"--output-dir {tmp_path} --run-name stopped"),
            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            saves(tmp_path / "stopped/checkpoint.pt", rng.randint(2, 4), process)
        finally:
            process.send_signal(number)
            process.wait(60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    run(grpo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("flags", ["", "--lora-rank 2", "--ratio-level sequence"])
def test_micro_batches_give_the_same_update(tmp_path, warmup, flags):
    weights = []
    for micro in (1, 4, 64):
        base = f"--output-dir {tmp_path} --run-name {micro} --micro-batch-size {micro} --minibatch-size 64"
        base += f" --checkpoint {warmup} --update-epochs 1 --total-timesteps 300"
        run(grpo_vla, GRPO, base, flags)
        assert results(tmp_path / str(micro))["gradient_steps"] > 0
        weights.append(load_checkpoint(tmp_path / str(micro))["agent"])
    for key, value in weights[-1].items():
        for other in weights[:-1]:
            if value.is_floating_point():
                torch.testing.assert_close(other[key], value, rtol=0, atol=5e-5, msg=key)


def test_no_minibatch_of_gspo_is_empty(tmp_path, warmup, monkeypatch):
    """Twenty times fewer episodes than decisions: an update has at most as many steps as episodes."""
    seen, minibatches = [], grpo_vla.minibatches

    def watch(*inputs):
        for rows, scale in minibatches(*inputs):
            seen.append(len(rows))
            yield rows, scale

    monkeypatch.setattr(grpo_vla, "minibatches", watch)
    flags = f"--checkpoint {warmup} --output-dir {tmp_path} --run-name r --minibatch-size 1"
    run(grpo_vla, GRPO, flags, "--ratio-level sequence --total-timesteps 300")
    assert seen and min(seen) > 0 and results(tmp_path / "r")["gradient_steps"] == len(seen)


# --- wrong inputs


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--group-size 1", "--group-size must be at least 2, not 1"),
        ("--num-groups 0", "--num-groups must be positive"),
        ("--max-refill 0", "--max-refill must be positive"),
        ("--max-steps -1", "--max-steps must not be negative"),
        ("--constant-length 0", "--constant-length must be positive"),
        ("--accuracy-low 1.5", "--accuracy-low must be in [0, 1]"),
        ("--accuracy-low 0.8 --accuracy-high 0.2", "--accuracy-low 0.8 is above --accuracy-high 0.2"),
        ("--verifier-gamma 2", "--verifier-gamma must be in [0, 1]"),
        ("--leave-one-out", "--advantage-level episode"),  # else it would do nothing
        ("--std-normalisation", "--advantage-level episode"),
        ("--env NoSuchWorld-v1", "unknown environment"),
        ("--checkpoint missing.pt", "does not exist"),
        ("--resume WARMUP", "was written by bc_warmup.py; resume it with that script"),
        ("--resume WARMUP/best.pt", "was written by bc_warmup.py; resume it with that script"),
        ("--checkpoint WARMUP --chunk 4", "--chunk 4 is not what the checkpoint has: 5 is part of it; drop"),
        ("--checkpoint WARMUP --head gaussian", "--head gaussian is not what the checkpoint has: tokens is"),
        ("--checkpoint STATES", "was written by sac.py, whose networks are none of grpo_vla.py's"),
        ("--resume STATES", "was written by sac.py, whose networks are none of grpo_vla.py's"),
        ("--evaluate", "--evaluate needs --checkpoint"),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, warmup, flags, sentence):
    save_checkpoint(tmp_path / "sac.pt", script="sac", state={"args": {"chunk": 1}, "agent": {}})
    flags = flags.replace("WARMUP", str(warmup)).replace("STATES", f"{tmp_path}/sac.pt")
    base = "" if "--resume" in flags or "NoSuchWorld" in flags else GRPO  # whose flags are tabletop's
    done = call(grpo_vla, base, flags, f"--output-dir {tmp_path}/runs")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done
    assert sentence in done.err and not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(tmp_path, warmup, monkeypatch):
    """The third minibatch's, of the second iteration; the last checkpoint is the one before."""
    calls, surrogate = [], grpo_vla.clipped_surrogate

    def spoil(*inputs):
        calls.append(1)
        return surrogate(*inputs) * (float("nan") if len(calls) > 7 else 1)

    monkeypatch.setattr(grpo_vla, "clipped_surrogate", spoil)
    flags = f"--checkpoint {warmup} --output-dir {tmp_path} --run-name r --save-freq 1"
    done = call(grpo_vla, GRPO, flags)
    assert done.code == 2 and done.err.count("\n") == 1 and "is not finite (loss/policy nan" in done.err, done
    assert f"{tmp_path}/r/checkpoint.pt is the last good state" in done.err
    saved = load_checkpoint(tmp_path / "r")
    assert f"iteration {saved['counters'][1] + 1}: " in done.err
    assert all(x.isfinite().all() for x in saved["agent"].values())


def test_help_documents_every_flag():
    done = call(grpo_vla, "--help")
    assert done.code == 0
    for name in grpo_vla.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.out or f"--no-{name.replace('_', '-')}" in done.out
