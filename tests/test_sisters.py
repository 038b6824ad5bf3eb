"""What single-file scripts share by design is identical to the letter: their diff shows the algorithms alone.
And the house's rule: a script knows its algorithm, and names no world, no model and no other script."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

import bc_warmup
import cql
import decision_transformer
import grpo_vla
import iql
import ppo_vla
import sac
import td3_bc
from common.backbones import BACKBONES
from common.envs import GYMNASIUM, WORLDS

STATES = (sac, iql, cql, td3_bc, decision_transformer)
SCRIPTS = (bc_warmup, ppo_vla, grpo_vla, *STATES)
ROOT = Path(ppo_vla.__file__).parent
NAMES = [script.__name__ for script in SCRIPTS]

# --- blocks

SHARED = dict.fromkeys("TokenHead GaussianHead".split(), (bc_warmup, ppo_vla, grpo_vla))
SHARED |= dict.fromkeys("Velocity FlowHead flow_times sde_std denoising_mean".split(), SHARED["TokenHead"])
SHARED |= dict.fromkeys("DiscreteHead make_head".split(), SHARED["TokenHead"])
SHARED |= dict.fromkeys("weights_of micro_batches teachable".split(), (ppo_vla, grpo_vla))
SHARED |= dict.fromkeys("clipped_surrogate kl_k3 masked_mean ratio_metrics".split(), (ppo_vla, grpo_vla))
SHARED |= {"current_log_probs": (ppo_vla, grpo_vla)}
SHARED |= dict.fromkeys("td_target critic_loss".split(), (sac, iql, cql, td3_bc))
SHARED |= dict.fromkeys("squashed_gaussian policy_loss temperature_loss".split(), (sac, cql))
SHARED |= {"MLP": (sac, cql), "sample_batch": (iql, cql, td3_bc), "xavier": (iql, td3_bc)}
SHARED |= dict.fromkeys("replay_batch mixed_batch".split(), (iql, td3_bc))


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_are_identical(name):
    assert len({inspect.getsource(getattr(script, name)) for script in SHARED[name]}) == 1


def test_all_mlps_run_alike():
    assert len({inspect.getsource(script.MLP.forward) for script in (sac, iql, cql, td3_bc)}) == 1


def test_td3_bc_adds_one_method_to_the_critics():
    assert inspect.getsource(td3_bc.TwinCritic).startswith(inspect.getsource(iql.TwinCritic).rstrip())


def pieces(script, *cuts):
    """The lines of `train` from one cut to the next, each with the cut that it begins with."""
    text, found = inspect.getsource(script.train), []
    for cut in cuts:
        before, here, text = text.partition(cut)
        assert here, (script, cut)
        found, text = [*found, before], cut + text
    return [*found, text]


CUTS = ["    dataset, device =", "    del dataset\n", "    step = 0\n", "        step += 1\n"]
CUTS += ["        run.advance(step)\n"]


def test_the_offline_scripts_train_alike_but_for_the_update():
    """All of `train` but optimizers and update, and what is drawn for it and its learning rate. The two that
    go on online add to what is CQL's, and change its end, and how they explore."""
    given = """    if args.alpha != "auto":  # also where a checkpoint has another
        nn.init.constant_(agent.log_alpha, math.log(args.alpha))\n"""
    own = """            if rebrac:
                new = new[0], with_next_row(rows, index, widths), *new[2:]\n"""
    alike = []
    for script in (iql, td3_bc, cql):
        _, head, _, loop, _, tail = pieces(script, *CUTS)
        loop = loop.replace("args.exploration_noise * ", "").replace(own, "")
        alike.append([head.replace(given, ""), loop, tail])
    assert alike[0] == alike[1]
    assert all(part.count("\n") > 12 for part in alike[0])
    for with_online, without in zip(alike[0], alike[2], strict=True):
        for ours, theirs in ONLINE.items():
            with_online = with_online.replace(ours, theirs)
        lines = iter(with_online.split("\n"))
        assert all(line in lines for line in without.split("\n"))  # in this order


ONLINE = {"step < total": "step < args.total_timesteps", "step == total": "step == args.total_timesteps"}
ONLINE |= {"(step, total, ": "(step, args.total_timesteps, ", " or turns or ": " or "}
ONLINE |= {"(run.due(step, args.eval_freq) or turns)": "run.due(step, args.eval_freq)", " or turns:": ":"}
ONLINE |= {"environment_steps=args.online_steps": "environment_steps=0"}


def test_the_transformer_trains_like_the_others_but_for_update_and_evaluation():
    cuts = ["    step = 0\n", "    def evaluate_now(", "    run.begin(", "        batch = sample_batch("]
    ours, theirs = (pieces(x, *cuts, "        run.advance(step)\n") for x in (cql, decision_transformer))
    for piece in (1, 3, 5):
        assert ours[piece] == theirs[piece] and ours[piece].count("\n") > 3


# --- flags


def flags(script):
    """A script's own flags in their order -> their help."""
    (tree,) = ast.parse(inspect.getsource(script.Args)).body
    pairs = zip(tree.body, tree.body[1:], strict=False)
    helps = [(field, text) for field, text in pairs if isinstance(field, ast.AnnAssign)]
    return {
        field.target.id: text.value.value
        for field, text in helps
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    own = set(vars(script.Args)["__annotations__"]) & {f.name for f in dataclasses.fields(script.Args)}
    assert set(flags(script)) == own and all(flags(script).values()) and len(own) > 10


def assert_same_flags(here, model, others=()):
    """Common flags in one order, and with one help but for `others`."""
    common = [name for name in here if name in model]
    assert common == [name for name in model if name in here]
    assert {name for name in common if here[name] != model[name]} == set(others)
    return common


def test_common_flags_of_both_policy_gradients():
    """Both rates decay in PPO; GRPO has a ratio of its own, the sequence's, with bounds of its own."""
    others = ("anneal_lr", "ratio_level", "clip_low", "clip_high")
    common = assert_same_flags(flags(grpo_vla), flags(ppo_vla), others)
    assert len(common) > 15


@pytest.mark.parametrize("script", (sac, cql, td3_bc))
def test_common_flags_of_the_state_based_scripts(script):
    """Learning rates say what they are of, the transformer's dropout is of other layers."""
    others = {sac: ("offline_ratio", "layer_norm"), cql: (), td3_bc: ("tau",)}[script]
    others = {"learning_rate", "critic_learning_rate", *others}
    common = assert_same_flags(flags(script), flags(iql), others)
    assert {"batch_size", "gamma", "tau", "width", "depth"} <= set(common)


def test_flags_of_the_transformer_are_in_the_others_order():
    here, model = ([name for name in flags(x) if name != "dropout"] for x in (decision_transformer, iql))
    assert [name for name in here if name in model] == [name for name in model if name in here]


# --- who knows whom


def imports(path):
    """Names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, path
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_script_imports_a_script_and_common_none():
    files = [ROOT / f"{name}.py" for name in NAMES] + sorted((ROOT / "common").rglob("*.py"))
    assert {path.stem for path in ROOT.glob("*.py")} == set(NAMES) and len(files) > 20
    for path in files:
        assert not {name.partition(".")[0] for name in imports(path)} & set(NAMES), path
    assert "ppo_vla" in imports(Path(__file__))  # it can fail


def test_worlds_know_no_models_and_models_no_worlds():
    for one, other in (("envs", "backbones"), ("backbones", "envs")):
        for path in (ROOT / "common" / one).glob("*.py"):
            assert not {name for name in imports(path) if name.startswith(f"common.{other}")}, path


# The names of two families are everyone's words as well: these count as whole strings alone.
WORDS = {*WORLDS, *BACKBONES} - {"tiny", "mlp"}
STRINGS = {*WORLDS, *BACKBONES}


def named(source):
    """Where a script's code, without docstrings, comments and PRESETS, names a world or a model family."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        for body in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, body, None), list):
                setattr(node, body, [each for each in getattr(node, body) if not skipped(each)])
    for node in ast.walk(tree):
        values = [value for _, value in ast.iter_fields(node)]
        values += [each for value in values if isinstance(value, list) for each in value]
        for text in (value for value in values if isinstance(value, str)):
            parts = re.findall("[A-Z]?[a-z]+", text)  # of LiberoEnv
            parts += re.findall("[a-z]+", text.lower())  # of OpenVLA, is_libero, common.envs.libero
            whole = text.lower() in STRINGS and isinstance(node, ast.Constant)
            if whole or WORDS & {part.lower() for part in parts}:
                found.append(f"line {getattr(node, 'lineno', '?')}: {text}")
    return found


def skipped(statement):
    """A docstring, also of a flag, and PRESETS."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "PRESETS"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_names_a_world_or_a_model(script):
    assert {"tabletop", "libero", "openvla"} <= WORDS
    assert named(Path(script.__file__).read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        'if args.env == "libero":\n    pass',
        'args.backbone = "tiny"',
        'small = args.backbone in ("mlp", "other")',
        "from common.envs.libero import make",
        "from common.envs import tabletop",
        "import common.backbones.openvla as model",
        "libero_suite = 3",
        "def f(openvla=None):\n    pass",
        "f(tabletop=1)",
        "args.libero.suite",
        "class TabletopHead:\n    pass",
        "model = OpenVLA()",
        "def f():\n    global openvla",
        'raise UserError("this needs --env libero")',
        'f"{x} is for OpenVLA alone"',
        '@dataclass\nclass Args:\n    env: str = "tabletop"\n    """the world"""',
        "match env:\n    case 'libero':\n        pass",
    ],
)
def test_the_detector_finds_what_is_planted(planted):
    """Anywhere in a script: at its top, in its `train`, at its end."""
    for script in (ppo_vla, sac):
        text, train = Path(script.__file__).read_text(), "def train(args, run):\n"
        deeper = "".join(f"    {line}\n" for line in planted.split("\n"))
        for source in (f"{planted}\n{text}", text.replace(train, train + deeper), f"{text}\n\n{planted}"):
            assert source != text and len(named(source)) == 1, planted


@pytest.mark.parametrize(
    "fine",
    [
        '"""LIBERO and OpenVLA."""',
        "x = 1  # as libero has it",
        'PRESETS = {"libero": dict(backbone="openvla")}',
        'def f():\n    """For tabletop."""',
        'class A:\n    env: str = "x"\n    """tabletop, libero"""',
        "torch.finfo(x.dtype).tiny",
        "def mlp(inputs):\n    return nn.Sequential()",
        "deliberote = tabletops = 1",
    ],
)
def test_the_detector_lets_the_rest_alone(fine):
    assert named(fine) == []


def test_every_world_and_model_has_its_file():
    """The tables name modules, and these are all files of their folders but those that are of no world."""
    for table, folder, rest in (
        (
            {**WORLDS, "gymnasium": GYMNASIUM},
            "envs",
            {
                "vector",
                "batched",
                "simulation",
                "osc",
                "views",
                "jobs",
                "experts",
                "to_robomimic",
                "behavior_server",
            }
            | {"tabletop_warp", "maniskill_gpu", "rl4vla_scene", "to_d4rl"},
        ),
        (BACKBONES, "backbones", set()),
    ):
        stems = {path.stem for path in (ROOT / "common" / folder).glob("*.py")} - {"__init__"} - rest
        assert {module.rpartition(".")[2] for module in table.values()} == stems
        assert all(dataclasses.is_dataclass(importlib.import_module(m).Args) for m in table.values())
