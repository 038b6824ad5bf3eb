"""torchrun on two CPU processes (gloo): N processes with batch B / N are one with B."""

import json
import os
import subprocess
import sys

import torch
from test_cli import EVAL, ROOT, call, words

import grpo_vla
from common import distributed
from common.checkpoint import load_checkpoint

PPO = f"""{EVAL} --eval-episodes 4 --eval-envs 2 --num-envs 4 --num-steps 3 --chunk 5 --total-timesteps 30
    --update-epochs 1 --minibatch-size 99 --micro-batch-size 5 --critic-warmup 0 --eval-freq 0
    --kl-coef 0.1 --entropy-coef 0.01 --ratio-level token --max-grad-norm 0.01"""
GRPO = f"""{EVAL} --eval-episodes 4 --eval-envs 2 --num-envs 4 --chunk 5 --group-size 2 --num-groups 2
    --total-timesteps 400 --minibatch-size 20 --micro-batch-size 5 --eval-freq 0 --save-freq 1
    --temperature 1.6 --accuracy-low 0 --accuracy-high 1 --max-steps 20"""
GREEDY = """
sample = script.TokenHead.sample  # so that no number depends on which process drew it
script.TokenHead.sample = lambda self, logits, greedy, generator: sample(self, logits, True, generator)
"""


def launch(tmp_path, script, processes, flags, patch=""):
    """`torchrun --nproc-per-node N driver.py flags`, where the driver is the script and a patch."""
    driver = tmp_path / f"driver_{processes}.py"
    driver.write_text(f"import {script} as script\n{patch}\nscript.main()\n")
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",  # the host may not know its own name
        f"--nproc-per-node={processes}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*start, str(driver), *words(flags, f"--output-dir {tmp_path} --run-name {script}_{processes}")],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_two_processes_take_the_step_of_one(tmp_path):
    for processes in (1, 2):
        done = launch(tmp_path, "ppo_vla", processes, PPO, GREEDY)
        assert done.returncode == 0 and done.stdout.count("success") == 1, done.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / f"ppo_vla_{n}") for n in (1, 2))
    assert one["counters"][:3] == two["counters"][:3] and one["counters"][2] == 1
    found, wanted = two["optimizer"]["state"], one["optimizer"]["state"]
    assert found.keys() == wanted.keys() and found
    for index in wanted:  # Adam's first moment after one step: the clipped gradient
        gradient = wanted[index]["exp_avg"]
        torch.testing.assert_close(found[index]["exp_avg"], gradient, rtol=1e-4, atol=1e-9)
    results = [json.loads((tmp_path / f"ppo_vla_{n}" / "results.json").read_text()) for n in (1, 2)]
    for key in ("success_rate", "mean_length", "episodes"):
        assert results[0]["initial"][key] == results[1]["initial"][key]
    assert len(two["processes"]) == 2 and two["recent"] == one["recent"]


def test_two_processes_of_grpo_stay_one_policy(tmp_path):
    """Each collects its own groups; the sum of their gradients is what both step by."""
    told = """
import atexit, torch.distributed as dist
agents, build = [], script.build_agent
script.build_agent = lambda *inputs: agents.append(build(*inputs)) or agents[-1]
stop = script.distributed.stop
def tell():
    total = sum(p.detach().double().abs().sum() for p in agents[0].parameters()).item()
    print("rank", dist.get_rank(), repr(total), flush=True)
    stop()
script.distributed.stop = tell
"""
    done = launch(tmp_path, "grpo_vla", 2, GRPO, told)
    assert done.returncode == 0, done.stderr[-3000:]
    sums = {line.split()[1]: line.split()[2] for line in done.stdout.splitlines() if line.startswith("rank")}
    assert sums.keys() == {"0", "1"} and sums["0"] == sums["1"]
    state = load_checkpoint(tmp_path / "grpo_vla_2")
    assert state["counters"][2] > 2 and len(state["processes"]) == 2
    groups = [process["rollout"][1] for process in state["processes"]]  # the next of the even, the odd ones
    assert groups[0] % 2 == 0 and groups[1] % 2 == 1 and min(groups) > 1
    done = call(grpo_vla, f"--resume {tmp_path}/grpo_vla_2")
    assert done.code == 2 and "ran as 2 processes, not 1" in done.err


def test_what_cannot_be_split_is_refused(tmp_path):
    done = launch(tmp_path, "ppo_vla", 2, f"{PPO} --eval-envs 3")
    assert done.returncode != 0 and "3 environments cannot be split evenly over 2" in done.stderr


def test_without_torchrun_nothing_changes():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    distributed.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1, 2] and distributed.all_gather([3]) == [[3]]
    assert distributed.ranks() == (0, 1) and distributed.all_sum(torch.tensor(4)) == 4
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
