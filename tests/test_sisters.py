"""What two single-file scripts share is identical to the letter: their diff shows the algorithms alone."""

import ast
import dataclasses
import inspect

import pytest

import bc_warmup
import cql
import decision_transformer
import grpo_vla
import iql
import ppo_vla
import sac
import td3_bc

ALL = "TokenHead GaussianHead wilson_interval summarize evaluate score choose_device build_envs main".split()
ONLINE = "clipped_surrogate kl_k3 masked_mean DiscreteHead make_head weights_of micro_batches".split()


@pytest.mark.parametrize(
    ("script", "name"), [(bc_warmup, name) for name in ALL] + [(grpo_vla, name) for name in ALL + ONLINE]
)
def test_shared_blocks_are_identical(script, name):
    assert inspect.getsource(getattr(ppo_vla, name)) == inspect.getsource(getattr(script, name))


def test_common_flags_have_the_same_help():
    """Also in the same order, so that the two files diff well."""
    names = [name for name in ppo_vla.Args.__dataclass_fields__ if name in grpo_vla.Args.__dataclass_fields__]
    assert names == [n for n in grpo_vla.Args.__dataclass_fields__ if n in ppo_vla.Args.__dataclass_fields__]
    assert len(names) > 35


# --- the state-based family

STATES = (sac, iql, cql, td3_bc, decision_transformer)
OFFLINE = (iql, cql, td3_bc, decision_transformer)
SHARED = dict.fromkeys(
    "resume_args check_args build_envs load_weights action_bounds keep_freed_memory score".split(), STATES
)
SHARED |= dict.fromkeys("choose_device main".split(), (ppo_vla, *STATES))
SHARED |= dict.fromkeys("td_target critic_loss evaluate".split(), (sac, iql, cql, td3_bc))
SHARED |= dict.fromkeys("prepare_data sample_batch".split(), (iql, cql, td3_bc))
SHARED |= dict.fromkeys("squashed_gaussian policy_loss temperature_loss".split(), (sac, cql))
SHARED |= {"TwinCritic": (sac, iql, cql), "mlp": (sac, cql, td3_bc)}


def body(script, *cuts):
    """The lines of `train` from one cut to the next, each with the cut that it begins with."""
    text, pieces = inspect.getsource(script.train), []
    for cut in cuts:
        before, found, text = text.partition(cut)
        assert found, (script, cut)
        pieces, text = [*pieces, before], cut + text
    return [*pieces, text]


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_of_the_state_based_scripts_are_identical(name):
    assert len({inspect.getsource(getattr(script, name)) for script in SHARED[name]}) == 1


def test_td3_bc_adds_one_method_to_the_critics():
    assert inspect.getsource(td3_bc.TwinCritic).startswith(inspect.getsource(sac.TwinCritic).rstrip())


def test_the_offline_scripts_train_alike_but_for_the_update():
    """All of `train` but optimizers and update, and what is drawn for it and its learning rate."""
    cuts = ["        stack.callback(writer", "        step, seconds", "            step += 1\n"]
    alike, given = (
        [],
        """        if args.alpha != "auto":  # also where a checkpoint has another
            nn.init.constant_(agent.log_alpha, math.log(args.alpha))\n""",
    )
    for script in (iql, cql, td3_bc):
        before, _, loop, _, after = body(script, *cuts, "            bar.update()\n")
        alike.append([before.replace(given, ""), loop, after])
    assert alike[0] == alike[1] == alike[2]
    assert all(part.count("\n") > 20 for part in alike[0])


def test_the_transformer_trains_like_the_others_but_for_update_and_evaluation():
    cuts = (
        "        references = dataset",
        "        if args.track:\n",
        "        writer = SummaryWriter",
        "        stack.callback(writer",
    )
    assert body(iql, *cuts)[2:4] == body(decision_transformer, *cuts)[2:4]
    cuts = (
        "        step, seconds",
        "        def run_evaluation(",
        "        def due(",
        "            batch = sample",
        "            bar.update()\n",
    )
    for piece in (1, 3, 5):
        assert body(iql, *cuts)[piece] == body(decision_transformer, *cuts)[piece]


def flags(script):
    """The fields of `Args` in their order -> their help."""
    (tree,) = ast.parse(inspect.getsource(script.Args)).body
    return {
        field.target.id: text.value.value
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
    }


@pytest.mark.parametrize("script", (ppo_vla, *STATES))
def test_common_flags_are_in_one_order_and_mean_the_same(script):
    here, model = flags(script), flags(iql)
    assert list(here) == [field.name for field in dataclasses.fields(script.Args)]
    common = [name for name in here if name in model and name != "dropout"]  # the transformer's is another
    assert common == [name for name in model if name in here and name != "dropout"]
    same = "resume evaluate capture_video track output_dir"
    assert {name: here[name] for name in same.split()} == {name: model[name] for name in same.split()}
    if script in (iql, cql, td3_bc):
        same = """dataset env seed device compile bf16 eval_episodes eval_freq save_freq total_timesteps
            batch_size gamma normalize normalize_rewards reward_scale reward_bias width"""
        assert {name: here[name] for name in same.split()} == {name: model[name] for name in same.split()}
