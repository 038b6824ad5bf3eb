"""torchrun on two CPU processes (gloo): N processes with batch B / N are one with B."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_cli import (
    EVAL,
    ROOT,
    assert_same_run,
    call,
    one_thread,  # noqa: F401 (a fixture)
    results,
    run,
    scalars,
    words,
)
from test_openvla import checkpoints, write_checkpoint  # noqa: F401 (a fixture)

import grpo_vla
import ppo_vla
from common import UserError, distributed
from common.checkpoint import load_checkpoint

PPO = f"""{EVAL} --eval-episodes 4 --eval-envs 2 --num-envs 4 --num-steps 3 --chunk 5 --total-timesteps 30
    --update-epochs 1 --minibatch-size 99 --micro-batch-size 5 --critic-warmup 0 --eval-freq 0
    --policy-warmup 0 --kl-coef 0.1 --entropy-coef 0.01 --ratio-level token --max-grad-norm 1e9"""
GRPO = f"""{EVAL} --eval-episodes 4 --eval-envs 2 --num-envs 4 --chunk 5 --group-size 2 --num-groups 2
    --total-timesteps 400 --minibatch-size 20 --micro-batch-size 5 --eval-freq 0 --save-freq 1
    --temperature 1.6 --accuracy-low 0 --accuracy-high 1 --max-steps 20"""
GREEDY = """
sample = script.TokenHead.sample  # so that no number depends on which process drew it
script.TokenHead.sample = lambda self, logits, greedy, generator: sample(self, logits, True, generator)
"""
# All members of a group play alike, then, so that their outcomes are made up, and what half of them executed.
# Every other group's episodes are half as long: the processes have unlike shares of the batch.
OUTCOMES = """
import torch
add, end = script.Groups.add, script.Groups.end
def cut(groups, n, chunk, *rest):
    chunk["mask"] = chunk["mask"] & (torch.arange(35) < 35 - 21 * (n % 2))
    episode = add(groups, n, chunk, *rest)
    return {"steps": [99]} if episode["group"] % 2 and len(episode["steps"]) == 2 else episode
def made_up(groups, n, *rest):
    episode = groups.playing[n]
    episode["rewards"] = [1.0 + episode["group"] + n % 2] * len(episode["steps"])
    end(groups, n, *rest)
script.Groups.add, script.Groups.end = cut, made_up
"""
GRADIENT = """
import os, torch
sum_gradients = script.distributed.sum_gradients
def keep(parameters):
    sum_gradients(parameters)
    gradients = [script.distributed.whole(p.grad) for p in parameters]
    if script.distributed.ranks()[0] == 0 and not os.path.exists("gradient_PROCESSES.pt"):
        torch.save(gradients, "gradient_PROCESSES.pt")
script.distributed.sum_gradients = keep
"""
TOLD = """
import sys
import torch.distributed as dist
import torch
agents, build, stop = [], script.Agent.__init__, script.distributed.stop
script.Agent.__init__ = lambda self, *inputs: agents.append(self) or build(self, *inputs)
optimizers, make = [], torch.optim.AdamW.__init__
torch.optim.AdamW.__init__ = lambda self, *x, **options: optimizers.append(self) or make(self, *x, **options)
def tell():
    weights = [script.distributed.whole(p.detach()) for p in agents[0].parameters()]
    total = sum(x.double().abs().sum() for x in weights).item()
    sys.stdout.write(f"rank {dist.get_rank()} {total!r}\\n")  # in one piece: torchrun's have no buffer
    moments = [x for state in optimizers[0].state.values() for x in state.values() if x.ndim]
    mine, all = (sum(x.numel() for x in part) for part in ([x.to_local() for x in moments], moments))
    sys.stdout.write(f"holds {dist.get_rank()} {mine} {all}\\n")
    stop()
script.distributed.stop = tell
"""
SIGNAL = """
import os, signal
end, ends = script.Groups.end, []
def stopped(groups, *rest):
    end(groups, *rest)
    ends.append(1)
    if script.distributed.ranks()[0] == 1 and len(ends) == 5:
        os.kill(os.getpid(), signal.SIGINT)
script.Groups.end = stopped
"""


def launch(tmp_path, script, processes, flags, patch="", name=None):
    """`torchrun --nproc-per-node N driver.py flags`, the script and a patch; `python` for 1."""
    driver = tmp_path / f"driver_{processes}.py"
    start = "common.run.main(script.train, script.Args, script.PRESETS, parallel=True)"
    patch = patch.replace("PROCESSES", str(processes))
    driver.write_text(f"import {script} as script, common.run\n{patch}\n{start}\n")
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",  # the host may not know its own name
        f"--nproc-per-node={processes}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    if "--resume" not in flags:
        flags += f" --output-dir {tmp_path} --run-name {name or f'{script}_{processes}'}"
    return subprocess.run(
        [*(start if processes > 1 else start[:1]), str(driver), *words(flags)],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def assert_one_process_plays_it(script, tmp_path, folder):
    """The checkpoint of two processes, alike but for the sizes of the batches."""
    run(script, EVAL, "--eval-episodes 4 --eval-envs 2 --evaluate --checkpoint", [str(folder)],
        f"--output-dir {tmp_path} --run-name alone")  # fmt: skip
    found, wanted = results(tmp_path / "alone")["final"], results(folder)["final"]
    for key in ("episodes", "mean_length", "mean_reward"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-4), key


def test_two_processes_take_the_step_of_one(tmp_path):
    for processes in (1, 2):
        done = launch(tmp_path, "ppo_vla", processes, PPO, GREEDY)
        assert done.returncode == 0 and done.stdout.count("success") == 1, done.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / f"ppo_vla_{n}") for n in (1, 2))
    assert one["counters"] == two["counters"] and one["counters"][2] == 1
    found, wanted = two["optimizer"]["state"], one["optimizer"]["state"]
    assert found.keys() == wanted.keys() and found
    for index in wanted:  # Adam's first moment after one step: a tenth of the gradient, which nothing clipped
        gradient = wanted[index]["exp_avg"]
        torch.testing.assert_close(found[index]["exp_avg"], gradient, rtol=1e-4, atol=1e-7)
    assert max(state["exp_avg"].abs().max() for state in wanted.values()) > 1e-3
    for name in ("optim/grad_norm", "loss/total", "loss/value", "policy/entropy"):
        of_one, of_two = (scalars(tmp_path / f"ppo_vla_{n}")[name][0][1] for n in (1, 2))
        assert of_two == pytest.approx(of_one, rel=1e-4) and of_one != 0, name
    for key in ("success_rate", "mean_length", "episodes"):
        assert (
            results(tmp_path / "ppo_vla_1")["initial"][key] == results(tmp_path / "ppo_vla_2")["initial"][key]
        )
    assert len(two["processes"]) == 2 and two["recent"] == one["recent"]


@pytest.mark.slow
def test_two_processes_evaluate_what_one_has_merged(tmp_path):
    write_checkpoint(tmp_path / "oft", "oft")
    flags = f"{EVAL} --eval-episodes 4 --eval-envs 2 --chunk 2 --unnorm-key none --lora-rank 2 --evaluate"
    flags += f" --backbone {tmp_path}/oft --merge-and-save {tmp_path}/merged"
    done = launch(tmp_path, "ppo_vla", 2, flags, TOLD)
    assert done.returncode == 0 and done.stdout.count("merged into") == 1, done.stderr[-3000:]
    found = results(tmp_path / "ppo_vla_2")
    assert found["merged"] == found["final"] and found["final"]["episodes"] == 4
    told = re.findall(r"rank \d (.*)", done.stdout)  # the sums of both's weights
    assert len(told) == 2 and told[0] == told[1] and (tmp_path / "merged/config.json").is_file()


@pytest.mark.slow
def test_rollouts_are_played_in_one_process(tmp_path):
    write_checkpoint(tmp_path / "oft", "oft")
    flags = f"{EVAL} --eval-envs 2 --chunk 2 --unnorm-key none --backbone {tmp_path}/oft"
    done = launch(tmp_path, "ppo_vla", 2, f"{flags} --collect 2 --save-dataset {tmp_path}/r.hdf5")
    assert done.returncode and "--collect plays in one process" in done.stderr
    assert not (tmp_path / "r.hdf5").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--aggregation token-mean --entropy-coef 0.01 --kl-coef 0.1",
        pytest.param("--aggregation sequence-mean-token-mean --ratio-level sequence", marks=pytest.mark.slow),
        pytest.param("--aggregation token-mean --lora-rank 4", marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_grpo_have_the_gradient_of_one(tmp_path, flags):
    for processes in (1, 2):
        flags = f"{GRPO} --minibatch-size 99 --total-timesteps 81 --max-grad-norm 1e9 {flags}"
        done = launch(tmp_path, "grpo_vla", processes, flags, GREEDY + OUTCOMES + GRADIENT)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"gradient_{n}.pt", weights_only=True) for n in (1, 2))
    size = max(0.0 if x is None else x.abs().max() for x in one)
    assert len(one) == len(two) and size > 1e-3
    for wanted, found in zip(one, two, strict=True):
        wanted = torch.zeros_like(found) if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * size.item())


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A run of GRPO in two processes: its folder and what it said."""
    home = tmp_path_factory.mktemp("together")
    done = launch(home, "grpo_vla", 2, f"{GRPO} --kl-coef 0.1", TOLD)
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "grpo_vla_2", done.stdout


def test_two_processes_of_grpo_stay_one_policy(tmp_path, together):
    """Each collects its own groups; the sum of their gradients is what both step by. Each has half of Adam's
    moments, and their checkpoint is one process's."""
    folder, said = together
    sums = {line.split()[1]: line.split()[2] for line in said.splitlines() if line.startswith("rank")}
    assert sums.keys() == {"0", "1"} and sums["0"] == sums["1"]
    state = load_checkpoint(folder)
    assert state["counters"][2] > 2 and len(state["processes"]) == 2
    groups = [process["state"]["groups"]["next_group"] for process in state["processes"]]
    assert groups[0] % 2 == 0 and groups[1] % 2 == 1 and min(groups) > 1  # the even and the odd ones
    held = [[*map(int, line.split()[2:])] for line in said.splitlines() if line.startswith("holds")]
    assert held[0][1] == held[1][1] == held[0][0] + held[1][0]
    assert all(0.4 < mine / whole < 0.6 for mine, whole in held)
    moments = state["optimizer"]["state"].values()
    assert sum(x.numel() for each in moments for x in each.values() if x.ndim) == held[0][1]
    done = call(grpo_vla, f"--resume {folder}")
    assert done.code == 2 and "ran as 2 processes, not 1" in done.err
    assert_one_process_plays_it(grpo_vla, tmp_path, folder)


def test_two_processes_stop_together_and_go_on_bit_identically(tmp_path, together):
    """The second one alone gets the signal."""
    done = launch(tmp_path, "grpo_vla", 2, f"{GRPO} --kl-coef 0.1", SIGNAL, "stopped")
    folder = tmp_path / "stopped"
    assert done.returncode != 0, done
    command = rf"go on with: torchrun --nproc-per-node 2 grpo_vla.py --resume {folder}\n"
    assert len(re.findall(rf"stopped at \d+ env_steps; {command}", done.stdout)) == 1, done
    assert 0 < load_checkpoint(folder)["counters"][0] < 400
    done = launch(tmp_path, "grpo_vla", 2, f"--resume {folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(folder, together[0])


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_openvla(tmp_path, checkpoints):  # noqa: F811
    """All of it trained, the towers too, with prompts of unlike lengths, which each process has its own
    number of micro-batches of; merged weights and checkpoints are whole."""
    flags = f"""{PPO} --backbone {checkpoints["oft"]} --lora-rank 0 --unnorm-key none --chunk 2 --train-vision
        --critic-warmup 1 --policy-warmup 0 --learning-rate 1e-3 --micro-batch-size 2 --gradient-checkpointing
        --recompute-logprobs"""
    for processes in (1, 2):
        merge = f"--merge-and-save {tmp_path}/merged_{processes}"
        done = launch(tmp_path, "ppo_vla", processes, f"{flags} {merge}", GREEDY)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / f"ppo_vla_{n}") for n in (1, 2))
    assert one["counters"] == two["counters"] and one["counters"][2] == 2  # the critic's step, and all's
    assert one["agent"].keys() == two["agent"].keys()
    found, wanted = two["optimizer"]["state"], one["optimizer"]["state"]
    assert found.keys() == wanted.keys()
    for index in wanted:
        gradient = wanted[index]["exp_avg"]
        torch.testing.assert_close(found[index]["exp_avg"], gradient, rtol=1e-3, atol=1e-6)
    for name, weight in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], weight, rtol=0, atol=1e-4)
    for file in (tmp_path / "merged_2").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.equal(two["agent"][f"backbone.{name}"]), name
    assert_one_process_plays_it(ppo_vla, tmp_path, tmp_path / "ppo_vla_2")


def test_what_cannot_be_split_is_refused(tmp_path):
    done = launch(tmp_path, "ppo_vla", 2, f"{PPO} --eval-envs 3")
    assert done.returncode != 0 and "3 environments cannot be split evenly over 2" in done.stderr


class Part(torch.nn.Module):
    """A backbone and its agent at once."""

    config = {}

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)

    backbone = property(lambda self: self)

    def layers(self):
        return [self]


def test_what_is_sharded(monkeypatch):
    """Every weight of a large model: not adapters, not a small model's, not one process's; nor can 4 bits
    be."""
    for processes, changes in ((1, {}), (2, {"config": {"lora": {"r": 2}}}), (2, {"layers": list})):
        monkeypatch.setattr(distributed, "ranks", lambda n=processes: (0, n))
        agent = type("Other", (Part,), changes)()
        distributed.shard(agent)
        assert type(agent).__name__ == "Other" and type(agent.weight) is torch.nn.Parameter
    with pytest.raises(UserError, match="4 bits cannot be split over processes; use --lora-rank 32"):
        distributed.shard(Part(torch.uint8))
    with pytest.raises(ValueError, match="Error initializing torch.distributed"):  # no torchrun here
        distributed.shard(Part())


def test_without_torchrun_nothing_changes():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    distributed.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1, 2] and distributed.all_gather([3]) == [[3]]
    assert distributed.ranks() == (0, 1) and distributed.all_sum(torch.tensor(4)) == 4
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
