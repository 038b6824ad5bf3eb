"""pi0: against transformers' own `forward` and `sample_actions`, with small random checkpoints in LeRobot's
layout, and through the scripts' command lines."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
    words,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PI0Config, PI0ForConditionalGeneration

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError
from common.backbones import add_lora, build_backbone, family_of, load_weights, pi0, stored_weights
from common.checkpoint import load_checkpoint
from common.run import read_flags

INSTRUCTIONS = ["open the drawer", "put the red cube in the drawer", "lift it"]
WORDS = "open the drawer put red cube in lift it"
GEMMA = dict(
    model_type="gemma", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
)
SIZES = dict(
    chunk_size=6, max_state_dim=40, max_action_dim=9,
    vlm_config=dict(
        model_type="paligemma", projection_dim=24, image_token_id=200,
        text_config=GEMMA | dict(hidden_size=24, intermediate_size=32, vocab_size=200),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=16, intermediate_size=20, patch_size=14,
            image_size=28, num_hidden_layers=2, num_attention_heads=2, vision_use_head=False,
        ),
    ),
    dit_config=GEMMA | dict(hidden_size=16, intermediate_size=20),
)  # fmt: skip
LEROBOT = {
    "model.vlm.language_model.embed_tokens": "model.paligemma_with_expert.paligemma.lm_head",
    "model.dit.embed_tokens": "model.paligemma_with_expert.gemma_expert.lm_head",
    "model.vlm.": "model.paligemma_with_expert.paligemma.model.",
    "model.dit.": "model.paligemma_with_expert.gemma_expert.model.",
    "embed_action_time.": "model.", "action_out_proj": "model.action_out_proj",
}  # fmt: skip


def random_model(seed=0):
    torch.manual_seed(seed)
    model = PI0ForConditionalGeneration(PI0Config(**SIZES))
    for p in model.parameters():
        p.data.normal_(0, 0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def write_checkpoint(folder, state=8, action=7, statistics="processor"):
    """A random checkpoint in LeRobot's layout -> the model that it holds."""
    model, tensors = random_model(), {}
    for name, tensor in model.state_dict().items():
        long, short = next((k, v) for k, v in LEROBOT.items() if name.startswith(k))
        tensors[short + name.removeprefix(long)] = tensor.contiguous()
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    stats = {}
    for key, n in (("observation.state", state), ("action", action)):
        stats |= {f"{key}.mean": torch.randn(n, generator=generator) / 4}
        stats |= {f"{key}.std": 0.2 + torch.rand(n, generator=generator) / 2}
    if statistics == "buffers":
        for name, tensor in stats.items():
            key, stat = name.rsplit(".", 1)
            part = "unnormalize_outputs" if key == "action" else "normalize_inputs"
            tensors[f"{part}.buffer_{key.replace('.', '_')}.{stat}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if statistics == "processor":
        norm_map = dict(VISUAL="IDENTITY", STATE="MEAN_STD", ACTION="MEAN_STD")
        file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
        step = dict(
            registry_name="normalizer_processor", config=dict(eps=1e-8, norm_map=norm_map), state_file=file
        )
        steps = [dict(registry_name="rename_observations_processor", config={}), step]
        (folder / "policy_preprocessor.json").write_text(
            json.dumps(dict(name="policy_preprocessor", steps=steps))
        )
        save_file(stats, folder / file)
    own = dict(
        type="pi0", n_obs_steps=1, dtype="float32", device="cpu", paligemma_variant="gemma_2b", use_amp=False
    )
    (folder / "config.json").write_text(json.dumps(own | SIZES))
    vocabulary = {"<unk>": 3} | {w: 4 + i for i, w in enumerate(dict.fromkeys(WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pi0") / "tiny"
    return SimpleNamespace(folder=folder, model=write_checkpoint(folder))


def load(published, **config):
    return build_backbone(str(published.folder), **dict(dtype="float32", chunk=3) | config)


def observe(size=4, cameras=2, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        image=rng.integers(0, 256, (size, cameras, 20, 28, 3), np.uint8),
        proprio=rng.normal(size=(size, 8)).astype(np.float32), task=np.arange(size) % 3,
    )  # fmt: skip


def inputs(batch):
    """What transformers' class takes, of the same observations."""
    pixels = pi0.resize_with_pad(batch["image"], 28)
    return dict(
        state=batch["proprio"], input_ids=batch["input_ids"], pixel_values=pixels,
        pixel_attention_mask=torch.ones(pixels.shape[:2], dtype=torch.bool),
        attention_mask=(batch["input_ids"] != pi0.PAD).long(),
    )  # fmt: skip


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-5)


def flow_head(backbone, **flags):
    return ppo_vla.FlowHead(backbone, ppo_vla.Args(head="flow", chunk=backbone.chunk, **flags))


# --- the model


def test_every_weight_is_loaded_and_the_unused_embedding_dropped(published):
    wanted = dict(published.model.named_parameters())
    del wanted["model.dit.embed_tokens.weight"]
    found = dict(load(published).pi0.named_parameters())
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    half = dict(load(published, dtype="bfloat16").pi0.named_parameters())
    assert all(p.equal(wanted[n].bfloat16() if ".vlm." in n else wanted[n]) for n, p in half.items())


@torch.no_grad()
def test_velocity_and_state_are_those_of_transformers(published):
    backbone, generator = load(published), torch.Generator().manual_seed(0)
    batch = backbone.preprocess(observe(), INSTRUCTIONS)
    x, t = torch.randn(4, 2, 54, generator=generator), torch.rand(4, 2, generator=generator)
    context, state = backbone(batch)
    cached, same = backbone(batch, backbone.encode_vision(batch)[0])
    found = backbone.velocity(context, x, t)
    assert len(context) == 4 and state.equal(same) and found.equal(backbone.velocity(cached, x, t))
    for i in range(2):
        noise = x[:, i].unflatten(1, (6, 9))
        tokens = published.model.embed_action_time(batch["proprio"], noise, t[:, i])
        given = {name: x for name, x in inputs(batch).items() if name != "state"}
        hidden = published.model.model(action_embeds=tokens, **given).last_hidden_state
        close(state, hidden[:, 0])
        wanted = published.model(noise=noise, timestep=t[:, i], **inputs(batch)).logits
        assert wanted.std() > 0.1 and (state - hidden[:, 1]).abs().max() > 0.1
        close(found[:, i], wanted.flatten(1))


@torch.no_grad()
def test_the_greedy_steps_are_sample_actions(published):
    backbone = load(published)
    batch, head = backbone.preprocess(observe(), INSTRUCTIONS), flow_head(backbone, flow_steps=5)
    noise = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    wanted = published.model.sample_actions(noise=noise, num_steps=5, **inputs(batch))
    velocity, _ = head(backbone, backbone(batch)[0])
    x = noise.flatten(1)
    for k in range(5):
        x = head.mean(velocity, x, k, None)
    close(x.unflatten(1, (6, 9)), wanted)
    chain = torch.stack([x], 1)
    assert np.allclose(head.to_env(chain), wanted[:, :3, :7], atol=1e-5)  # the first chunk, not clipped


@torch.no_grad()
def test_a_row_alone_is_the_row_among_others(published):
    backbone = load(published)
    batch = backbone.preprocess(observe(), INSTRUCTIONS)
    lengths = (batch["input_ids"] != pi0.PAD).sum(1)
    assert lengths.min() < lengths.max() == batch["input_ids"].shape[1]
    x = torch.randn(4, 54, generator=torch.Generator().manual_seed(0))
    context, state = backbone(batch)
    velocity = backbone.velocity(context, x, torch.tensor(0.7))
    for i in range(4):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        row["input_ids"] = row["input_ids"][:, : lengths[i]]  # no padding
        alone, hidden = backbone(row)
        close(hidden, state[i : i + 1])
        close(backbone.velocity(alone, x[i : i + 1], torch.tensor(0.7)), velocity[i : i + 1])


@pytest.mark.parametrize(("noise", "points"), [("sde", 5), ("fpo", 9)])
@torch.no_grad()
def test_a_chain_has_one_log_prob_whoever_caches(published, noise, points):
    """Ratio 1 on the first minibatch: cached and not, also of a chain that was saved."""
    backbone = load(published)
    batch = backbone.preprocess(observe(), INSTRUCTIONS)
    head = flow_head(backbone, noise_level=0.5, flow_noise=noise)
    vision, _ = backbone.encode_vision(batch)
    flow = head(backbone, backbone(batch, vision)[0])
    chain = head.sample(flow, False, torch.Generator().manual_seed(0))
    log_prob = head.log_prob(flow, chain)
    assert chain.shape == (4, points, 54)
    assert log_prob.shape == (4, 21) and head.entropy(flow).shape == (4, 21)
    assert head.log_prob(head(backbone, backbone(batch)[0]), chain.clone()).equal(log_prob)
    greedy = [head.sample(flow, True, None) for _ in range(2)]
    assert greedy[0].equal(greedy[1]) and not greedy[0][:, 0].any()


@pytest.mark.slow
def test_bfloat16_is_near(published):
    batch = load(published).preprocess(observe(), INSTRUCTIONS)
    x, t = torch.randn(4, 54, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    found = [b.velocity(b(batch)[0], x, t) for b in (load(published), load(published, dtype="bfloat16"))]
    assert found[1].dtype == torch.float32 and (found[0] - found[1]).abs().max() < 0.2 * found[0].std()


class Line:
    """A flow of two numbers, one of them executed: v = x w. The policies differ in how the other moves."""

    chunk, action_dim, flow_shape, hidden_size = 1, 1, (1, 2), 1

    def __init__(self, last):
        self.weight = torch.tensor([[0.5, 0.5], [1.0, last]])

    def velocity(self, context, x, t):
        return x @ self.weight


@torch.no_grad()
@pytest.mark.parametrize("noise", ["sde", "learned"])
def test_weights_turn_one_policys_actions_into_anothers(noise):
    """The executed number's log-prob is exact, although the other, which moves it, is not scored: the old
    policy's chains, weighted by the ratio, have the new one's spread."""
    old, new, context = Line(0.3), Line(1.0), torch.zeros(100_000, 1)
    head, generator = flow_head(old, noise_level=1.0, flow_noise=noise), torch.Generator().manual_seed(0)
    own, wanted = (
        head.sample(head(line, context), False, generator)[:, -1, 0].square().mean() for line in (old, new)
    )
    chain = head.sample(head(old, context), False, generator)
    ratio = (head.log_prob(head(new, context), chain) - head.log_prob(head(old, context), chain)).exp()[:, 0]
    assert abs(ratio.mean() - 1) < 0.01 and abs(own - wanted) > 0.05 * wanted
    assert abs((ratio * chain[:, -1, 0].square()).mean() - wanted) < 0.02 * wanted


# --- what trains


def test_only_the_expert_trains_and_all_of_it(published):
    backbone = load(published)
    batch, head = backbone.preprocess(observe(), INSTRUCTIONS), flow_head(backbone)
    for train_prefix, frozen in ((False, None), (True, 7)):
        backbone = load(published, train_prefix=train_prefix)
        names = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        if train_prefix:  # the last layer's q, o, MLP (3) and norm, and the final norm
            assert len(dict(backbone.named_parameters())) - len(names) == frozen
        else:
            assert not any(".vlm." in n for n in names)
            assert not any(p.requires_grad for p in backbone.vision_parameters())
        context, state = backbone(batch)
        flow = head(backbone, context)
        chain = head.sample(flow, False, torch.Generator().manual_seed(0)).detach()
        (head.log_prob(flow, chain).sum() + state.sum()).backward()
        assert names and all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())


def test_adapters_are_on_the_expert_and_add_nothing_at_first(published):
    backbone = load(published)
    batch, x = backbone.preprocess(observe(), INSTRUCTIONS), torch.zeros(4, 54)
    before = backbone.velocity(backbone(batch)[0], x, torch.tensor(0.5))
    add_lora(backbone, 2)
    after = backbone.velocity(backbone(batch)[0], x, torch.tensor(0.5))
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("dit.layers" in n and "lora_" in n for n in trained)
    close(after, before)


def test_a_checkpoint_holds_what_is_in_no_file_of_the_base(published):
    """The frozen prefix is in its own files; the expert that another run trained is not, also under new
    adapters."""

    def agent_of(saved, lora_rank=0, lora=None):
        agent = torch.nn.Module()
        agent.backbone = load(published, lora=lora)
        args = SimpleNamespace(backbone=str(published.folder), lora_rank=lora_rank, lora_alpha=0)
        run = SimpleNamespace(saved=saved, source="x", rank=0, device=torch.device("cpu"))
        load_weights(agent, args, run)
        return agent

    first = agent_of(None)
    stored = stored_weights(first)
    assert stored and all(".vlm." not in name for name in stored)
    trained = {"agent": {name: x + 1 for name, x in stored.items()}}
    tuned = agent_of(trained, lora_rank=2)
    stored = stored_weights(tuned)
    assert any("lora_" in name for name in stored) and all(".vlm." not in name for name in stored)
    again = agent_of({"agent": stored}, lora=tuned.backbone.config["lora"])
    wanted = tuned.state_dict()
    assert all(x.equal(wanted[name]) for name, x in again.state_dict().items())
    assert any(".base_layer" in name for name in stored_weights(again))


# --- observations and statistics


def test_pictures_keep_their_shape():
    image = torch.full((2, 1, 10, 20, 3), 255, dtype=torch.uint8)
    image[..., 1] = 0
    x = pi0.resize_with_pad(image, 28)
    assert x.shape == (2, 1, 3, 28, 28)
    assert (x[..., :7, :] == -1).all() and (x[..., 21:, :] == -1).all() and (x[:, :, 1] == -1).all()
    close(x[:, :, 0, 7:21], torch.ones(2, 1, 14, 28))
    same = torch.arange(28 * 28 * 3, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 28, 28, 3)
    close(pi0.resize_with_pad(same, 28), same.permute(0, 3, 1, 2) / 127.5 - 1)


def test_the_prompt_is_pictures_then_words_then_a_newline(published):
    backbone = load(published)
    ids = backbone.preprocess(observe(), INSTRUCTIONS)["input_ids"]
    known = list(dict.fromkeys(WORDS.split()))
    words = [4 + known.index(word) for word in ("lift", "it")]
    wanted = [200] * 8 + [pi0.BOS, *words, pi0.NEWLINE]
    assert ids[2, : len(wanted)].tolist() == wanted and not ids[2, len(wanted) :].any()


def test_another_models_tokenizer_is_refused(published):
    backbone = load(published)
    backbone.tokenize = lambda text: [200]
    with pytest.raises(UserError, match="not PaliGemma's"):
        backbone.preprocess(observe(), INSTRUCTIONS)


@pytest.mark.parametrize("where", ["processor", "buffers", "lerobot", "openpi", "none"])
def test_statistics_scale_states_and_actions(tmp_path, where):
    write_checkpoint(tmp_path / "c", statistics=where)
    generator, file = torch.Generator().manual_seed(1), None
    mean, std = torch.randn(8, generator=generator) / 4, 0.2 + torch.rand(8, generator=generator) / 2
    low, high = torch.randn(7, generator=generator) / 4, 0.2 + torch.rand(7, generator=generator) / 2
    if where in ("lerobot", "openpi"):
        names = ("observation.state", "action") if where == "lerobot" else ("state", "actions")
        stats = {names[0]: dict(mean=mean.tolist(), std=std.tolist(), count=[3])}
        stats |= {names[1]: dict(mean=low.tolist(), std=high.tolist())}
        file = tmp_path / "stats.json"
        file.write_text(json.dumps(stats if where == "lerobot" else {"norm_stats": stats}))
    if where == "none":
        mean, std, low, high = torch.zeros(8), torch.ones(8), torch.zeros(7), torch.ones(7)
    backbone = build_backbone(
        str(tmp_path / "c"), dtype="float32", statistics="none" if where == "none" else file and str(file)
    )
    obs, actions = observe(), np.random.default_rng(0).normal(size=(4, 6, 7)).astype(np.float32)
    state = backbone.preprocess(obs, INSTRUCTIONS)["proprio"]
    assert state.shape == (4, 40) and not state[:, 8:].any()
    close(state[:, :8], (torch.as_tensor(obs["proprio"]) - mean) / std)
    found = backbone.to_env(actions)
    assert found.dtype == torch.float32
    close(found, torch.as_tensor(actions) * high + low)
    close(torch.as_tensor(backbone.from_env(found.numpy())), torch.as_tensor(actions))


# --- bad input


def change(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def retensor(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


OUT = "model.action_out_proj.weight"
BAD = {
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "--tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is missing"),
    "weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "half the weights": (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "truncated"),
    "config": (lambda f: (f / "config.json").write_text('{"type": "pi0"'), "config.json"),
    "pi0.5": (lambda f: change(f, "config.json", type="pi05"), "is a pi05; only pi0 loads"),
    "a config's kind": (lambda f: change(f, "config.json", chunk_size="six"), "config.json is missing"),
    "a tensor less": (lambda f: retensor(f, lambda t: t.pop(OUT)), "that do not fit, such as action_out"),
    "a tensor more": (lambda f: retensor(f, lambda t: t.update(new=torch.zeros(1))), "such as new"),
    "a shape": (lambda f: retensor(f, lambda t: t.update({OUT: torch.zeros(3, 16)})), "that do not fit"),
    "no statistics": (lambda f: (f / "policy_preprocessor.json").unlink(), "--statistics"),
    "no such file": (lambda f: next(f.glob("*normalizer*")).unlink(), "policy_preprocessor.json is missing"),
    "quantiles": (
        lambda f: change(f, "policy_preprocessor.json", steps=[
            dict(state_file=next(f.glob("*normalizer*")).name, config=dict(norm_map=dict(STATE="QUANTILES")))
        ]), "normalises by QUANTILES",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_one_sentence(tmp_path, what):
    write_checkpoint(tmp_path / "pi0")
    spoil, said = BAD[what]
    spoil(tmp_path / "pi0")
    with pytest.raises(UserError) as caught:
        pi0.build(path=str(tmp_path / "pi0"), dtype="float32")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(chunk=7), "at most 6 actions a chunk, not 7"),
        (dict(action_dim=10), "at most 9 numbers an action"),
        (dict(action_dim=6), "statistics of 7 numbers of action"),
        (dict(proprio_dim=9), "statistics of 8 numbers of state"),
        (dict(statistics="nowhere.json"), "nowhere.json is missing"),
        (dict(tokenizer="nowhere"), "--tokenizer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(published, config, said):
    with pytest.raises(UserError, match=said):
        load(published, **config)


def test_the_family_is_found_by_config_or_name(tmp_path, published):
    assert family_of(str(published.folder)) == "pi0" == family_of("lerobot/pi0_base")
    (tmp_path / "config.json").write_text('{"model_type": "pi0"}')
    assert family_of(str(tmp_path)) == "pi0"
    for text in ('{"model_type": "openvla"}', "[]", "{", '{"type": null}'):
        (tmp_path / "config.json").write_text(text)
        assert family_of(str(tmp_path)) == "openvla"


# --- sizes and memory


@pytest.fixture(scope="module")
def whole():
    return build_backbone("pi0", path="random", dtype="float32", device="meta")


def test_parameters_at_full_size(whole):
    model = whole.pi0.model
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.vlm.vision_tower) == 412_442_352
    assert count(model.vlm.language_model) == 2_508_531_712
    assert count(model.dit) == 311_464_960
    assert count(whole) == 3_238_048_528
    assert sum(p.numel() for p in whole.parameters() if p.requires_grad) == 314_713_120


@pytest.mark.slow
def test_operations_at_full_size(whole):
    """Of a decision of two cameras: an expert pass is a 70th of its prefix."""
    batch = dict(
        image=torch.zeros(1, 2, 224, 224, 3, dtype=torch.uint8, device="meta"),
        input_ids=torch.ones(1, 532, dtype=torch.long, device="meta"),
        proprio=torch.zeros(1, 32, device="meta"),
    )
    with FlopCounterMode(display=False) as prefix:
        vision = whole.encode_vision(batch)[0]
    with FlopCounterMode(display=False) as state:
        context, _ = whole(batch, vision)
    with FlopCounterMode(display=False) as expert:
        whole.velocity(context, torch.zeros(1, 1600, device="meta"), torch.tensor(0.5, device="meta"))
    assert vision.shape == (1, 18, 2, 1, 532, 256)
    assert prefix.get_total_flops() == pytest.approx(2.7e12, rel=0.1)
    assert expert.get_total_flops() == pytest.approx(0.036e12, rel=0.1)
    assert state.get_total_flops() < 0.05 * expert.get_total_flops()


def test_too_little_memory_is_said_before_loading(whole, published, monkeypatch):
    weights, update = pi0.memory_needed(whole.pi0, torch.bfloat16, 32, 0, 2, 4)
    assert weights == 2 * 2_923_335_408 + 4 * 314_713_120 and 12e9 < update < 20e9
    assert pi0.memory_needed(whole.pi0, torch.bfloat16, 32, 32, 2, 4)[1] < update - 3e9
    monkeypatch.setattr("common.backbones.available_memory", lambda: weights + update - 1)
    said = "needs 7.1 GB for its weights and 16.3 GB for an update.* --lora-rank 32, a smaller"
    with pytest.raises(UserError, match=said):
        pi0.check_memory("x", torch.device("cpu"), weights, update)
    monkeypatch.setattr("common.backbones.available_memory", lambda: 10_000)
    monkeypatch.setattr(pi0, "load", lambda *_: pytest.fail("a download"))
    with pytest.raises(UserError, match="GB free; use another device, or --backbone tiny"):
        load(published)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "passes"), [("float32", 1), ("bfloat16", 4)])
def test_the_estimate_of_an_update_is_near_what_it_keeps(dtype, passes):
    expert = GEMMA | dict(hidden_size=128, intermediate_size=512, head_dim=32, num_hidden_layers=6)
    text = SIZES["vlm_config"]["text_config"] | dict(head_dim=32, num_hidden_layers=6)
    sizes = SIZES | dict(
        chunk_size=50, dit_config=expert, vlm_config=SIZES["vlm_config"] | dict(text_config=text)
    )
    backbone, kept = build_backbone("pi0", path="random", sizes=sizes, dtype=dtype), {}
    batch = dict(
        image=torch.zeros(3, 1, 28, 28, 3, dtype=torch.uint8), proprio=torch.zeros(3, 40),
        input_ids=torch.tensor([[200] * 4 + [5] * pi0.PROMPT] * 3),
    )  # fmt: skip
    vision, weights = backbone.encode_vision(batch)[0], {p.data_ptr() for p in backbone.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        context, _ = backbone(batch, vision)
        for _ in range(passes):
            backbone.velocity(context, torch.randn(3, 450), torch.tensor(0.5))
    _, update = pi0.memory_needed(backbone.pi0, getattr(torch, dtype), 3, 0, 1, passes)
    update -= 12 * sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert update == pytest.approx(sum(x.untyped_storage().nbytes() for x in kept.values()), rel=0.1)


# --- command lines

FEW = EVAL.replace("--eval-episodes 5 --eval-envs 3", "--eval-episodes 2 --eval-envs 2")
PI0 = f"{FEW} --chunk 3 --eval-freq 0 --save-freq 1 --head flow --flow-steps 2"
BC = f"{PI0} --num-demos 2 --gradient-steps 3 --batch-size 8 --warmup-steps 1"
SHORT = "--update-epochs 2 --minibatch-size 6 --micro-batch-size 4 --learning-rate 1e-3"
PPO = f"{PI0} {SHORT} --num-envs 4 --num-steps 2 --total-timesteps 40 --critic-warmup 0 --tasks lift"
PPO += " --policy-warmup 0"
GRPO = f"{PI0} {SHORT} --num-envs 4 --group-size 2 --num-groups 1 --total-timesteps 100"
GRPO += " --accuracy-low 0 --accuracy-high 1 --max-steps 6"


def read(script, *flags):
    return read_flags(words(*flags), script.Args, script.PRESETS, script.__name__)[0]


def test_the_published_recipe_is_the_preset(published):
    """The flow head's own rate is the tiny policy's: it is not that of a family that has a preset."""
    args = read(ppo_vla, f"--backbone {published.folder}")
    found = (args.head, args.learning_rate, args.value_learning_rate, args.gamma, args.noise_level)
    assert found == ("flow", 5e-6, 1e-4, 0.99, 0.5) and args.chunk == 5 and args.flow_steps == 4
    assert read(ppo_vla, "--head flow").learning_rate == 2e-5 == read(grpo_vla, "--head flow").learning_rate
    assert read(ppo_vla, f"--backbone {published.folder} --learning-rate 1e-4").learning_rate == 1e-4
    args = read(grpo_vla, f"--backbone {published.folder} --env libero")
    assert (args.head, args.learning_rate, args.chunk, args.flow_steps) == ("flow", 5e-6, 5, 4)
    args = read(bc_warmup, f"--backbone {published.folder}")
    assert (args.head, args.learning_rate, args.flow_samples) == ("flow", 2.5e-5, 1)


@pytest.mark.parametrize(
    ("script", "flags", "passes"),
    [
        (ppo_vla, "", 4),
        (ppo_vla, "--flow-noise fpo", ppo_vla.FPO_DRAWS),
        (bc_warmup, "--flow-samples 12", 12),
        (bc_warmup, "--flow-noise fpo", 10),  # of an evaluation
    ],
)
def test_memory_is_estimated_for_the_passes_of_an_update(published, script, flags, passes):
    args = read(script, f"--backbone {published.folder} {flags}")
    assert pi0.own_options(args, torch.device("cpu"), 1, 8, False)["passes"] == passes


def test_ppo_trains_and_evaluates(tmp_path, published):
    run(ppo_vla, PPO, f"--backbone {published.folder} --output-dir {tmp_path} --run-name ppo")
    log = scalars(tmp_path / "ppo")
    assert log["policy/first_ratio_error"][0][1] < 1e-5 and log["policy/approx_kl"][0][1] > 0
    names = load_checkpoint(tmp_path / "ppo")["agent"]
    assert any("pi0.model.dit" in name for name in names) and not any(".vlm." in name for name in names)
    run(ppo_vla, PPO, f"--evaluate --checkpoint {tmp_path}/ppo --output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "ppo")["final"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo_vla, grpo_vla])
def test_imitation_then_a_stopped_run_goes_on_bit_identically(tmp_path, monkeypatch, published, script):
    base = f"--output-dir {tmp_path}"
    run(bc_warmup, BC, f"{base} --backbone {published.folder} --run-name warmup")
    before, after = (load_checkpoint(tmp_path / "warmup" / n)["agent"] for n in ("best.pt", "checkpoint.pt"))
    assert before.keys() == after.keys() and any("dit" in name for name in after)
    base += f" {PPO if script is ppo_vla else GRPO} --checkpoint {tmp_path}/warmup"
    run(script, base, "--run-name whole")
    stopped_by(monkeypatch, script, "clipped_surrogate", 2)
    assert call(script, base, "--run-name stopped").code == 130
    monkeypatch.undo()
    run(script, f"--resume {tmp_path}/stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert scalars(tmp_path / "whole")["policy/first_ratio_error"][0][1] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--lora-rank 2", "--train-vision", "--flow-noise learned --noise-level 0.1"]
)
def test_other_ways_to_train(tmp_path, published, flags):
    run(ppo_vla, PPO, flags, f"--backbone {published.folder} --output-dir {tmp_path} --run-name ppo")
    assert scalars(tmp_path / "ppo")["policy/first_ratio_error"][0][1] < 1e-5
    run(ppo_vla, PPO, f"--evaluate --checkpoint {tmp_path}/ppo --output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == results(tmp_path / "ppo")["final"]
    trained = load_checkpoint(tmp_path / "ppo")["agent"]
    assert any(".vlm." in name for name in trained) == ("vision" in flags)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (ppo_vla, "--backbone {folder} --head gaussian", "is a flow; use --head flow"),
        (ppo_vla, "--backbone pi0", "needs a checkpoint"),
        (ppo_vla, "--backbone {folder} --chunk 9", "at most 6 actions a chunk"),
        (bc_warmup, "--backbone {folder} --head tokens", "is a flow; use --head flow"),
    ],
)
def test_wrong_input_ends_in_one_sentence(tmp_path, published, script, flags, said):
    base = {ppo_vla: PPO, bc_warmup: BC}[script].replace("--head flow --flow-steps 2", "")
    done = call(
        script, base, flags.format(folder=published.folder), f"--output-dir {tmp_path} --run-name bad"
    )
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done
