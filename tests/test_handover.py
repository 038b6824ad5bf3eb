"""A policy that was learned from states goes on as PPO's: ppo_vla.py --backbone mlp --checkpoint runs/iql."""

import dataclasses

import numpy as np
import pytest
import torch
from test_cli import call, one_thread, results, run  # noqa: F401
from test_offline_cli import SAC, SMALL, home  # noqa: F401 (one is a fixture)

import cql
import decision_transformer
import iql
import ppo_vla
import sac
import td3_bc
from common.checkpoint import load_checkpoint

PPO = """--backbone mlp --head gaussian --env Pendulum-v1 --num-envs 2 --num-steps 8 --total-timesteps 32
    --eval-episodes 2 --eval-envs 2 --minibatch-size 16 --device cpu --max-episode-steps 30"""
FORMS = {
    "iql": (iql, "--dropout 0.2 --depth 3"),
    "iql-ogbench": (iql, "--no-learn-std --activation gelu --layer-norm --ema-decay 0.9"),
    "td3_bc": (td3_bc, ""),
    "cql": (cql, ""),
    "sac": (sac, SAC.replace("500", "320")),
}


@pytest.fixture(scope="module", params=FORMS)
def policy(request, home):  # noqa: F811
    """A trained policy -> its name, script, folder."""
    script, more = FORMS[request.param]
    data = "" if script is sac else f"--dataset {home}/pendulum.hdf5 --total-timesteps 40 --eval-freq 0"
    flags = f"{SMALL} --learning-rate 1e-2 --critic-learning-rate 1e-2 --eval-episodes 0 {data} {more}"
    run(script, flags, f"--output-dir {home} --run-name {request.param}")
    return request.param, script, home / request.param


def test_the_first_greedy_actions_are_the_policys(policy, tmp_path, monkeypatch):
    """And so is the whole first evaluation. The deviation is the Gaussian's own, where it has one."""
    _, script, folder = policy
    act, seen = ppo_vla.Agent.act, []

    def spy(agent, obs, turn):
        found = act(agent, obs, turn)
        seen.append((obs["proprio"].copy(), found[0].copy(), agent.head.log_std.exp()))
        return found

    monkeypatch.setattr(ppo_vla.Agent, "act", spy)
    run(ppo_vla, f"{PPO} --checkpoint {folder} --output-dir {tmp_path} --run-name r")
    saved, names = load_checkpoint(folder), {field.name for field in dataclasses.fields(script.Args)}
    old = script.Agent(3, 1, script.Args(**{key: x for key, x in saved["args"].items() if key in names}))
    old.load_state_dict(saved["agent"])
    old.eval()
    for obs, action, std in seen[:30]:  # the first evaluation's
        with torch.no_grad():
            wanted = old.act({"proprio": obs}, None)[0]
        np.testing.assert_allclose(np.clip(action, -1, 1), wanted, atol=1e-6)
        wanted = saved["agent"]["log_std"].exp() if script is iql else torch.tensor([0.2])
        torch.testing.assert_close(std, wanted)
    assert np.concatenate([action for _, action, _ in seen[:30]]).std() > 1e-3  # it is not a constant
    flags = f"--evaluate --checkpoint {folder} --env Pendulum-v1 --max-episode-steps 30 --eval-episodes 2"
    data = "" if script is sac else f"--dataset {saved['args']['dataset']}"
    run(script, flags, data, f"--device cpu --output-dir {tmp_path} --run-name own")
    for key, value in results(tmp_path / "own")["final"].items():
        assert results(tmp_path / "r")["initial"][key] == pytest.approx(value, rel=1e-5), key


def test_ppo_goes_on_from_it(policy, tmp_path):
    """With ratio 1 at first, a checkpoint like any other's, and no flag but the backbone's name."""
    _, _, folder = policy
    run(ppo_vla, f"{PPO} --checkpoint {folder} --output-dir {tmp_path} --run-name r")
    saved = load_checkpoint(tmp_path / "r")
    weights, before = saved["agent"], load_checkpoint(folder)["agent"]
    assert not torch.equal(weights["backbone.actor.0.weight"], before["actor.0.weight"])  # it learns
    assert not torch.equal(weights["backbone.actor.0.weight"], weights["backbone.critic.0.weight"])
    assert torch.equal(weights["backbone.obs_mean"], before.get("obs_mean", torch.zeros(3)))
    run(ppo_vla, f"--evaluate --checkpoint {tmp_path}/r --output-dir {tmp_path} --run-name e --device cpu",
        "--eval-episodes 2 --eval-envs 2")  # fmt: skip
    assert results(tmp_path / "e")["final"] == results(tmp_path / "r")["final"]


def test_what_is_no_such_policy_is_one_sentence(home, tmp_path):  # noqa: F811
    flags = f"--dataset {home}/aim.hdf5 --total-timesteps 1 --eval-episodes 0 --device cpu --env Aim-v0"
    run(decision_transformer, flags, f"--output-dir {tmp_path} --run-name dt --batch-size 2")
    flags = flags.replace("aim", "pendulum").replace("Aim-v0", "Pendulum-v1")
    run(iql, flags, f"--output-dir {tmp_path} --run-name iql --width 8")
    folder = tmp_path / "iql"
    for more, said in (
        (f"--checkpoint {tmp_path}/dt", "decision_transformer.py's policy is no MLP"),
        (f"--checkpoint {folder} --env Hopper-v5", "action_dim is 1, but this run's is 3; set --env"),
        (f"--checkpoint {folder} --chunk 2", "--chunk 2 is not what the checkpoint has: 1 is part of it"),
        (f"--checkpoint {folder} --init-std 0.3", "is not what the checkpoint has"),
        (f"--resume {folder}", "was written by iql.py, whose networks are none of ppo_vla.py's"),
    ):
        base = "--backbone mlp" if "--resume" in more else PPO
        done = call(ppo_vla, base, f"--output-dir {tmp_path}/runs", more)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
    done = call(ppo_vla, f"--env Pendulum-v1 --checkpoint {folder} --output-dir {tmp_path}/runs")
    assert done.code == 2 and "whose networks are none of ppo_vla.py's" in done.err, done
