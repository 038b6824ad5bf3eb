"""The agent on the tiny backbone: ratio, temperature, sampling, heads, attention, caches and adapters."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import bc_warmup
import grpo_vla
import ppo_vla
from common import UserError
from common.backbones import add_lora, build_backbone, load_backbone
from common.backbones.tiny import END, PAD, UNKNOWN, Llama
from common.envs import make_envs, tabletop

K, A, TEMPERATURE = 2, 7, 1.6
INSTRUCTIONS = ["lift the red cube", "put the blue ball on the yellow plate now", "wait"]
BOX, DISCRETE = gymnasium.spaces.Box(-1, 1, (A,), np.float32), gymnasium.spaces.Discrete(5)


def make_agent(seed=0, lora_rank=0, **changes):
    """A small agent whose every part has an effect: LoRA's B and the value head are not left at zero."""
    torch.manual_seed(seed)
    discrete = changes.get("head") == "discrete"
    args = (
        dict(head="tokens", temperature=TEMPERATURE, detach_value=True, init_std=0.2, learn_std=True)
        | changes
    )
    backbone = build_backbone(
        "tiny", chunk=K, action_dim=1 if discrete else A, proprio_dim=8, cameras=2, image_size=16,
        instructions=INSTRUCTIONS, width=32, queries=3, channels=16,
    )  # fmt: skip
    envs = SimpleNamespace(single_action_space=DISCRETE if discrete else BOX)
    agent = ppo_vla.Agent(backbone, dataclasses.replace(ppo_vla.Args(), **args), envs)
    torch.nn.init.normal_(agent.value_head[-1].weight)
    if lora_rank:
        add_lora(backbone, lora_rank)
        for name, parameter in agent.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return agent.eval()


def make_batch(agent, size, seed=0, instructions=INSTRUCTIONS):
    rng = np.random.default_rng(seed)
    obs = {
        "image": rng.integers(0, 256, (size, 2, 16, 16, 3), np.uint8),
        "proprio": rng.normal(size=(size, 8)).astype(np.float32),
        "task": rng.integers(0, len(INSTRUCTIONS), size),
    }
    return agent.backbone.preprocess(obs, instructions)


def take(batch, index):
    return {key: x[index] for key, x in batch.items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- ratio and temperature


RATIOS = [("tokens", 4), ("tokens", 0), ("gaussian", 4), ("flow", 0), ("flow", 4), ("discrete", 0)]


@pytest.mark.parametrize("level", ["token", "step", "chunk"])
@pytest.mark.parametrize(("head", "rank"), RATIOS)
def test_ratio_is_one_on_the_first_minibatch(head, rank, level):
    """Sampled in batches of 3 with the vision cached, evaluated shuffled in 12s and 5s, part masked."""
    agent = make_agent(lora_rank=rank, head=head)
    batch, draw = make_batch(agent, 12), generator(1)
    actions, log_probs, visions = [], [], []
    with torch.no_grad():
        for rows in torch.arange(12).split(3):
            part = take(batch, rows)
            vision = agent.backbone.encode_vision(part)[0]
            action, log_prob, _ = agent.get_action_and_value(part, vision, generator=draw)
            actions, log_probs, visions = actions + [action], log_probs + [log_prob], visions + [vision]
    actions, log_probs, vision = torch.cat(actions), torch.cat(log_probs), torch.cat(visions)
    assert log_probs.dtype == torch.float32 and log_probs.shape == (12, K * (1 if head == "discrete" else A))
    mask = torch.rand(log_probs.shape, generator=draw) < 0.7
    mask[:, -1] = False
    old, _ = ppo_vla.merge_tokens(log_probs, mask, level, K)
    agent.train()  # as the update does
    for size in (12, 5):
        rows = torch.randperm(12, generator=draw)[:size]
        new = agent.evaluate_actions(take(batch, rows), actions[rows], vision[rows])[0]
        merged, covered = ppo_vla.merge_tokens(new, mask[rows], level, K)
        assert covered.any()
        ratio = (merged - old[rows]).exp()
        assert (ratio - 1).abs().max() < 1e-5


def test_log_probs_are_those_of_the_temperature():
    """Against softmax(logits / T) by hand in float64; those at temperature 1 are far off."""
    agent = make_agent()
    batch = make_batch(agent, 6)
    with torch.no_grad():
        actions, log_probs, _ = agent.get_action_and_value(batch, generator=generator())
        evaluated, entropy, _ = agent.evaluate_actions(batch, actions)
        logits = agent.backbone.action_logits(agent.backbone(batch)[0]).double().numpy()

    def by_hand(temperature):
        x = logits / temperature
        x = x - x.max(-1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return np.take_along_axis(log_p, actions.numpy()[..., None], -1)[..., 0], -(
            np.exp(log_p) * log_p
        ).sum(-1)

    for found in (log_probs, evaluated):
        np.testing.assert_allclose(found, by_hand(TEMPERATURE)[0], atol=1e-5)
        assert np.abs(found.numpy() - by_hand(1.0)[0]).mean() > 0.05
    np.testing.assert_allclose(entropy, by_hand(TEMPERATURE)[1], atol=1e-5)


@pytest.mark.parametrize("script", [ppo_vla, bc_warmup])
def test_sampling_frequencies_are_those_of_the_temperature(script):
    """Chi-square of 5000 draws of each of 14 tokens against softmax(logits / T); 5 standard deviations."""
    agent, draws = make_agent(), 5000
    head = script.TokenHead(agent.backbone, SimpleNamespace(temperature=TEMPERATURE, greedy="mean"))
    with torch.no_grad():
        hidden = agent.backbone(make_batch(agent, 1))[0]
        logits = agent.backbone.action_logits(hidden)[0]
        samples = head.sample(head(agent.backbone, hidden).expand(draws, -1, -1), False, generator(3))
    counts = np.stack([np.bincount(samples[:, i], minlength=256) for i in range(K * A)])

    def excess(temperature):  # (chi-square - its mean) / its standard deviation, over bins with >= 5 expected
        expected = draws * (logits.double() / temperature).softmax(-1).numpy()
        enough = expected >= 5
        chi = ((counts - expected) ** 2 / expected)[enough].sum()
        return (chi - enough.sum()) / math.sqrt(2 * enough.sum())

    assert abs(excess(TEMPERATURE)) < 5
    assert excess(1.0) > 20  # the test can tell


@pytest.mark.parametrize("head", ["tokens", "gaussian", "flow", "discrete"])
def test_what_is_left_of_exploration_is_that_much_temperature_or_deviation(head):
    """Half of it is the head with half the flag, in samples, log-probs and entropies; checkpoints keep it."""
    flags = {"gaussian": "init_std", "flow": "noise_level"}
    flag = flags.get(head, "temperature")
    agents = [make_agent(head=head, **{flag: value}) for value in (0.6, 0.3)]
    agents[0].head.exploration.fill_(0.5)
    batch = make_batch(agents[0], 5)
    actions = [agent.get_action_and_value(batch, generator=generator())[0] for agent in agents]
    torch.testing.assert_close(*actions)
    torch.testing.assert_close(*(agent.evaluate_actions(batch, actions[0])[:2] for agent in agents))
    full = make_agent(head=head, **{flag: 0.6})
    assert not torch.equal(*(each.evaluate_actions(batch, actions[0])[0] for each in (full, agents[0])))
    full.load_state_dict(agents[0].state_dict())
    assert full.head.exploration == 0.5


def test_deterministic_actions_are_the_most_likely_ones():
    for head in ("tokens", "discrete"):
        agent = make_agent(head=head, **({"greedy": "mode"} if head == "tokens" else {}))
        batch = make_batch(agent, 5)
        with torch.no_grad():
            logits = agent.head(agent.backbone, agent.backbone(batch)[0])
            actions, log_probs, _ = agent.get_action_and_value(batch, deterministic=True)
        assert torch.equal(actions, logits.argmax(-1))
        assert torch.equal(log_probs, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("script", [ppo_vla, grpo_vla, bc_warmup])
def test_deterministic_tokens_are_the_bin_of_the_mean(script):
    """Of a bin at -0.9 and a half as likely one at 0.6 the mean is -0.4; 255 bins are 0.0078 apart."""
    agent = make_agent()
    head = script.TokenHead(agent.backbone, SimpleNamespace(temperature=TEMPERATURE, greedy="mean"))
    low, high = head.tokenizer.encode_bins(torch.tensor([-0.9, 0.6]))
    logits = torch.full((1, 2, 256), -torch.inf)
    logits[..., low], logits[..., high] = math.log(2), 0.0
    logits[:, 1, high] = -torch.inf
    found = head.tokenizer.decode_bins(head.sample(logits, True, None))
    assert (found - torch.tensor([-0.4, -0.9])).abs().max() < 0.006
    ends = torch.full((1, 2, 256), -torch.inf)
    ends[0, 0, 0] = ends[0, 1, 255] = 0.0
    assert torch.equal(head.tokenizer.decode_bins(head.sample(ends, True, None)),
                       head.tokenizer.decode_bins(torch.tensor([[0, 255]])))  # fmt: skip


# --- micro-batches


@pytest.mark.parametrize("critic_only", [False, True])
@pytest.mark.parametrize("head", ["tokens", "gaussian", "flow"])
@pytest.mark.parametrize("level", ["token", "step"])
def test_micro_batches_give_the_gradient_and_the_metrics_of_one_batch(level, head, critic_only):
    agent = make_agent(head=head, detach_value=False)
    coefficients = dict(kl_coef=0.1, entropy_coef=0.01, value_coef=0.5)
    args = dataclasses.replace(ppo_vla.Args(), ratio_level=level, chunk=K, **coefficients)
    data = make_batch(agent, 11)
    with torch.no_grad():
        actions, log_probs, values = agent.get_action_and_value(data, generator=generator())
        vision = agent.backbone.encode_vision(data)[0]
    rng = generator(5)
    noise, other = torch.randn((2, *log_probs.shape), generator=rng)
    mask = torch.rand(log_probs.shape, generator=rng) < 0.4
    mask[0], mask[6:8] = False, False  # rows, and with micro-batches of 2 a whole one, without any token
    old, covered = ppo_vla.merge_tokens(log_probs + 0.2 * noise, mask, level, K)
    advantages, returns = torch.randn(2, 11, generator=rng)
    data |= dict(actions=actions, values=values, vision=vision, mask=mask, old_log_probs=old)
    data |= dict(advantages=advantages, returns=returns, reference_log_probs=log_probs + 0.1 * other)
    totals = torch.stack([covered.sum(), mask.sum(), torch.tensor(11)])

    def gradient(size):
        agent.zero_grad()
        terms = []
        for _, batch in ppo_vla.micro_batches(torch.arange(11), data, None, size):
            new = agent.evaluate_actions(batch, batch["actions"], batch["vision"])
            loss, metrics = ppo_vla.ppo_loss(*new, batch, totals, args, critic_only)
            loss.backward()
            terms.append(metrics)
        assert len(terms) == math.ceil(11 / size)
        grads = torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])
        return grads, {name: sum(each[name] for each in terms) for name in terms[0]}

    whole, metrics = gradient(11)
    assert whole.norm() > 1e-2
    for size in (1, 2, 4, 7):
        grads, sums = gradient(size)
        assert (grads - whole).norm() < 1e-4 * whole.norm()  # float32
        for name, value in metrics.items():
            torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("different", [True, False])
def test_micro_batches_hold_every_row_once_and_prompts_of_one_length(size, different):
    data = {"proprio": torch.randn(12, 2), "task": torch.arange(12), "vision": torch.randn(12, 3)}
    words = torch.tensor([5, 7, 5, 5, 6, 7, 5, 5, 5, 5, 7, 5]) if different else None
    rows, seen = torch.tensor([11, 3, 0, 1, 10, 8, 4, 6, 2, 5]), []
    for index, batch in ppo_vla.micro_batches(rows, data, words, size):
        assert 0 < len(index) <= size and torch.equal(batch["task"], index)
        for key, column in data.items():
            assert torch.equal(batch[key], column[index])
        assert ("length" in batch) == different
        if different:
            assert torch.equal(batch["length"], words[index]) and len(set(batch["length"].tolist())) == 1
        seen.append(index)
    assert sorted(torch.cat(seen).tolist()) == sorted(rows.tolist())
    assert different or torch.equal(torch.cat(seen), rows)  # in the order that was drawn
    assert different or len(seen) == math.ceil(10 / size)
    assert not list(ppo_vla.micro_batches(rows[:0], data, words, size))


def test_minibatches_hold_every_row_once_an_epoch():
    found = list(ppo_vla.minibatches(10, 3, 4, generator(7)))
    assert [len(rows) for rows in found] == [3, 3, 2, 2] * 3
    epochs = [torch.cat(found[i : i + 4]).tolist() for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = ppo_vla.minibatches(10, 3, 4, generator(7))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


# --- where the value is read, and who sees whom


def test_tinys_llama_is_transformers():
    """Names, initial spread and outputs, of rows with pads amid them too."""
    from transformers import LlamaConfig, LlamaModel

    reference = LlamaModel(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, pad_token_id=PAD, attn_implementation="sdpa", initializer_range=0.1,
        )
    )  # fmt: skip
    model = Llama(40, 32, 2)
    for (name, own), (_, theirs) in zip(
        sorted(model.state_dict().items()), sorted(reference.state_dict().items()), strict=True
    ):
        assert own.std() == pytest.approx(theirs.std().item(), rel=0.15, abs=1e-9), name
    model.load_state_dict(reference.state_dict())
    keep = torch.rand(5, 30, generator=generator()) < 0.8
    keep[:, 0] = True
    x, mask = torch.randn(5, 30, 32, generator=generator(1)), keep[:, None, None, :].expand(-1, 1, 30, -1)
    position_ids = keep.cumsum(1) - 1
    with torch.no_grad():
        wanted = reference(
            inputs_embeds=x, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        torch.testing.assert_close(model(x, mask, position_ids), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model(x, keep[:, None, None], position_ids, 20), wanted[:, 20:], rtol=1e-5, atol=1e-5
        )
        assert (model(x, mask, position_ids + keep) - wanted).abs().max() > 1e-3  # positions count


def hidden_states(agent, batch, vision=None):
    """(inputs, outputs) of the language model, besides what the backbone makes of them."""
    caught = {}

    def hook(module, args, output):
        caught.update(inputs=args[0], outputs=output)

    handle = agent.backbone.language_model.register_forward_hook(hook)
    with torch.no_grad():
        agent.backbone(batch, vision)
    handle.remove()
    return caught["inputs"], caught["outputs"]


@pytest.mark.parametrize("head", ["tokens", "gaussian", "flow"])
def test_value_is_read_off_the_prompt(head):
    """Off its tokens as they enter the layers: what is seen, the proprioception, the words' mean."""
    agent = make_agent(head=head)
    batch = make_batch(agent, 6)
    inputs, _ = hidden_states(agent, batch)
    last = inputs.shape[1] - K * A - 1
    words = agent.backbone.words.weight
    assert torch.equal(inputs[:, last], words[END].expand(6, -1))  # after it stand the action slots alone
    assert torch.equal(inputs[:, last + 1 :], agent.backbone.action_slots.expand(6, -1, -1))
    before = last + 1 - batch["input_ids"].shape[1]
    mean = [
        x[ids != PAD].mean(0) for x, ids in zip(inputs[:, before : last + 1], batch["input_ids"], strict=True)
    ]
    prompt = torch.cat([inputs[:, 1:before].flatten(1), torch.stack(mean)], 1)
    with torch.no_grad():
        wanted = agent.value_head(prompt)[:, 0]
        assert wanted.std() > 0.01
        torch.testing.assert_close(agent.get_value(batch), wanted)
        wanted = agent.get_value(batch)
        first, second = (agent.get_action_and_value(batch, generator=generator(i)) for i in (1, 2))
        assert not torch.equal(first[0], second[0]) and torch.equal(
            first[2], second[2]
        )  # whatever is sampled
        for action in (first[0], second[0]):
            assert torch.equal(agent.evaluate_actions(batch, action)[2], wanted)


def test_words_that_training_never_shows_look_like_a_blank():
    own = dict(env="tabletop", backbone="tiny", chunk=K, num_workers=0)
    args = SimpleNamespace(**vars(bc_warmup.Args()) | vars(tabletop.Args()) | own)
    run = SimpleNamespace(saved=None, source=None, device="cpu", rank=0)
    with contextlib.closing(make_envs(args, "eval", 1)) as envs:
        backbone = load_backbone(args, envs, run)
        assert len(envs.training_instructions) == 11 < len(envs.instructions)
    obs = {"image": np.zeros((3, 1, 64, 64, 3), np.uint8), "proprio": np.zeros((3, 8), np.float32)}
    texts = ["push the red cube over to the yellow plate", "___ the red cube ___ to the yellow plate"]
    batch = backbone.preprocess(
        obs | {"task": np.arange(3)}, [*texts, "move the red cube to the yellow plate"]
    )
    first, second, known = batch["input_ids"]
    assert torch.equal(first, second) and first.tolist().count(UNKNOWN) == 2 and UNKNOWN not in known


def test_attention_is_bidirectional_and_blind_to_pads():
    agent = make_agent()
    backbone, batch = agent.backbone, make_batch(agent, 6)
    assert (batch["input_ids"] == PAD).any() and (batch["input_ids"][:, -1] == END).all()
    with torch.no_grad():
        action, prompt = backbone(batch)
        backbone.words.weight[PAD] += 100
        for found, wanted in zip(backbone(batch), (action, prompt), strict=True):
            assert torch.equal(found, wanted)
        backbone.action_slots[-1] += 1  # the last slot moves the first action, and not what a critic reads
        moved, moved_prompt = backbone(batch)
    assert ((moved[:, 0] - action[:, 0]).abs().amax(-1) > 1e-4).all()
    assert torch.equal(moved_prompt, prompt)


def test_longer_neighbours_do_not_change_an_instruction():
    """More pads on the left, because another instruction is longer."""
    agent = make_agent()
    longer = [*INSTRUCTIONS, "put " * 9 + "now"]
    short, padded = make_batch(agent, 6), make_batch(agent, 6, instructions=longer)
    assert padded["input_ids"].shape[1] > short["input_ids"].shape[1]
    with torch.no_grad():
        for a, b in zip(agent.backbone(short), agent.backbone(padded), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_every_input_reaches_every_action():
    agent = make_agent()
    batch = make_batch(agent, 1)
    with torch.no_grad():
        before, _ = agent.backbone(batch)
        changes = {
            "image": 255 - batch["image"],
            "proprio": batch["proprio"] + 1,
            "input_ids": agent.backbone.preprocess(
                {"image": [], "proprio": [], "task": np.array([1])}, INSTRUCTIONS
            )["input_ids"],
        }
        for key, value in changes.items():
            assert not torch.equal(batch[key], value)
            moved = (agent.backbone({**batch, key: value})[0] - before).abs().amax(-1)
            assert (moved > 1e-4).all(), key


def test_cached_vision_is_the_same_vision():
    agent = make_agent(lora_rank=4)
    batch = make_batch(agent, 5)
    with torch.no_grad():
        vision = agent.backbone.encode_vision(batch)[0]
        rest = {key: x for key, x in batch.items() if key != "image"}  # as the rollout stores it
        for found, wanted in zip(agent.backbone(rest, vision), agent.backbone(batch), strict=True):
            assert torch.equal(found, wanted)


def test_vision_parameters_are_all_that_the_cache_depends_on():
    agent = make_agent()
    vision, _ = agent.backbone.encode_vision(make_batch(agent, 3))
    named = dict(agent.backbone.named_parameters())
    used = torch.autograd.grad(vision.sum(), list(named.values()), allow_unused=True)
    used = {name for name, grad in zip(named, used, strict=True) if grad is not None}
    declared = {id(p) for p in agent.backbone.vision_parameters()}
    assert used == {name for name, p in named.items() if id(p) in declared}


# --- adapters


def test_lora_starts_as_the_same_function_and_switches_off_exactly():
    agent = make_agent()
    batch = make_batch(agent, 5)
    with torch.no_grad():
        base = agent.backbone(batch)
        add_lora(agent.backbone, 4)
        for found, wanted in zip(agent.backbone(batch), base, strict=True):
            assert torch.equal(found, wanted)
        adapters = [p for name, p in agent.named_parameters() if "lora_" in name]
        reference = [p.clone() for p in adapters]
        for parameter in adapters:
            parameter.normal_()
        adapted = agent.backbone(batch)
        assert adapters and not torch.allclose(adapted[0], base[0], atol=1e-3)
        with ppo_vla.weights_of(reference, adapters):
            for found, wanted in zip(agent.backbone(batch), base, strict=True):
                assert torch.equal(found, wanted)
        assert torch.equal(agent.backbone(batch)[0], adapted[0])


@pytest.mark.parametrize("head", ["tokens", "gaussian"])
def test_lora_trains_adapters_and_heads_only(head):
    agent = make_agent(lora_rank=4, head=head)
    trained = {name for name, p in agent.named_parameters() if p.requires_grad}
    outside = {name for name in trained if ".lora_A." not in name and ".lora_B." not in name}
    assert len(trained) > len(outside) > 0
    heads = {name for name, _ in agent.named_parameters() if name.startswith(("head.", "value_head."))}
    assert outside == heads
    layers = len(agent.backbone.language_model.layers)
    assert len(trained) - len(outside) == layers * 7 * 2  # A and B of q, k, v, o, gate, up and down
    # and every one of them gets a gradient
    batch = make_batch(agent, 4)
    actions = agent.get_action_and_value(batch, generator=generator())[0].detach()
    log_probs, entropy, value = agent.evaluate_actions(batch, actions)
    (log_probs.sum() + entropy.sum() + value.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.parameters() if p.requires_grad)


def test_adapters_are_scaled_by_alpha_over_rank():
    for alpha, wanted in ((0, 8), (3, 3)):  # twice the rank, or what is given
        agent = make_agent()
        add_lora(agent.backbone, 4, alpha)
        assert agent.backbone.config["lora"]["lora_alpha"] == wanted
        scales = {m.scaling["default"] for m in agent.modules() if hasattr(m, "lora_A")}
        assert scales == {wanted / 4}


def test_a_backbone_without_targets_takes_no_lora():
    with pytest.raises(UserError, match="takes no LoRA"):
        add_lora(build_backbone("mlp", chunk=1, action_dim=1, proprio_dim=4), 4)


# --- heads


@pytest.mark.parametrize("learn_std", [True, False])
def test_gaussian_head_in_closed_form(learn_std):
    agent = make_agent(head="gaussian", learn_std=learn_std)
    assert agent.head.log_std.requires_grad == learn_std
    with torch.no_grad():
        agent.head.log_std.copy_(torch.linspace(-2, 0.5, A))
        torch.nn.init.normal_(agent.head.mean.weight)
        batch = make_batch(agent, 6)
        actions, log_probs, _ = agent.get_action_and_value(batch, generator=generator())
        evaluated, entropy, _ = agent.evaluate_actions(batch, actions)
        mean = agent.head.mean(agent.backbone(batch)[0])[..., 0].double()
        greedy = agent.get_action_and_value(batch, deterministic=True)[0]
    log_std = np.tile(
        np.linspace(-2, 0.5, A), K
    )  # one an action dimension, the same for every step of the chunk
    z = (actions.double() - mean).numpy() / np.exp(log_std)
    wanted = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
    for found in (log_probs, evaluated):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(
        entropy, np.tile(log_std + 0.5 * math.log(2 * math.pi * math.e), (6, 1)), atol=1e-5
    )
    assert torch.equal(greedy, mean.float())
    # the environment gets the clipped action, the log-prob is of the unclipped one
    assert (actions.abs() > 1).any()
    np.testing.assert_array_equal(agent.head.to_env(actions), actions.view(6, K, A).clamp(-1, 1))


def test_gaussian_samples_have_the_mean_and_the_deviation():
    agent = make_agent(head="gaussian", init_std=0.3)
    normal = torch.distributions.Normal(torch.full((50000, 2), 0.4), torch.full((50000, 2), 0.3))
    x = agent.head.sample(normal, False, generator(2))
    assert (x.mean(0) - 0.4).abs().max() < 0.01 and (x.std(0) - 0.3).abs().max() < 0.01
    assert torch.allclose(agent.head.log_std.exp(), torch.tensor(0.3))


def test_discrete_head_in_closed_form():
    agent = make_agent(head="discrete")
    with torch.no_grad():
        torch.nn.init.normal_(agent.head.logits.weight)
        batch = make_batch(agent, 6)
        actions, log_probs, _ = agent.get_action_and_value(batch, generator=generator())
        evaluated, entropy, _ = agent.evaluate_actions(batch, actions)
        x = agent.head.logits(agent.backbone(batch)[0]).double().numpy() / TEMPERATURE
    assert actions.shape == (6, K) and actions.min() >= 0 and actions.max() < 5
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    wanted = np.log(np.take_along_axis(p, actions.numpy()[..., None], -1)[..., 0])
    for found in (log_probs, evaluated):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(agent.head.to_env(actions), actions)


def test_token_head_hands_the_chunk_in_order_to_the_environment():
    agent = make_agent()
    bins = torch.arange(6 * K * A).view(6, K * A) % 256
    found = agent.head.to_env(bins)
    assert found.shape == (6, K, A) and found.dtype == torch.float32
    # bin 0 is a = +1, bin 255 a = -1; 255 centres
    assert found[0, 0, 0] == pytest.approx(1 - 1 / 255, abs=1e-6)
    assert found[0, 1, 3] == pytest.approx(1 - (2 * (1 * A + 3) - 1) / 255, abs=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_value_gradient_enters_the_backbone_only_if_asked(detach):
    agent = make_agent(detach_value=detach)
    agent.get_value(make_batch(agent, 4)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in agent.value_head[1].parameters())
    reached = {name for name, p in agent.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert bool(reached) != detach


@pytest.mark.parametrize(
    ("head", "space", "sentence"),
    [("tokens", DISCRETE, "use --head discrete"), ("discrete", BOX, "use --head tokens, gaussian or flow")],
)
def test_a_head_that_does_not_fit_the_actions_is_refused(head, space, sentence):
    backbone = build_backbone("mlp", chunk=1, action_dim=1, proprio_dim=4)
    args = dataclasses.replace(ppo_vla.Args(), head=head)
    with pytest.raises(UserError, match=sentence):
        ppo_vla.make_head(backbone, args, SimpleNamespace(single_action_space=space))


def test_an_mlps_actions_are_functions_of_their_own():
    """Where the numbers of a chunk all shared one weight vector they would differ by constants alone."""
    torch.manual_seed(0)
    backbone = build_backbone("mlp", chunk=2, action_dim=3, proprio_dim=4)
    head = ppo_vla.GaussianHead(backbone, ppo_vla.Args(head="gaussian"))
    obs = torch.randn(256, 4)
    wanted = 0.5 * obs @ torch.randn(4, 6)
    optimizer = torch.optim.Adam([*backbone.actor.parameters(), backbone.scales, head.mean.weight], lr=1e-2)
    for _ in range(300):
        found = head(backbone, backbone({"proprio": obs})[0]).mean
        loss = (found - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02 * wanted.var(), loss


def test_action_tokens_need_a_backbone_that_has_them():
    backbone = build_backbone("mlp", chunk=1, action_dim=A, proprio_dim=4)
    with pytest.raises(UserError, match="has no action tokens"):
        ppo_vla.make_head(backbone, ppo_vla.Args(head="tokens"), SimpleNamespace(single_action_space=BOX))


def test_wrong_backbones_are_refused():
    with pytest.raises(UserError, match="Unknown backbone 'huge'; known: tiny, mlp"):
        build_backbone("huge")
    for cameras, size in ((0, 0), (1, 30)):
        with pytest.raises(UserError, match="multiple of 4"):
            build_backbone("tiny", chunk=1, action_dim=7, proprio_dim=8, cameras=cameras, image_size=size)
