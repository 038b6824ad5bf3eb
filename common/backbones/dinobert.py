"""DINOv2 sees, BERT reads, and a small Llama makes actions of both.

    [patches of each camera] [past actions, oldest first] [proprio] [words of the instruction] [K*A slots]

go through the Llama in one forward with full bidirectional attention; the slots come out as the chunk's
actions. The words are BERT's states, one a token and not pooled: MiniLM's pooled "lift the red cube" and
"lift the blue cube" have a cosine of 0.82. The towers (Oquab et al. 2023, arXiv 2304.07193; Devlin et al.
2018, arXiv 1810.04805) are published weights in transformers' layout, and frozen: patches are computed once
a decision, words once an instruction, and a checkpoint holds the rest alone, with the towers' fingerprint.
PPO's and GRPO's --train-vision trains DINOv2 too.
"""

import json
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel, Dinov2Model, LlamaConfig, LlamaModel

from common import UserError
from common.backbones import check_memory, find_checkpoint, intact, read_weights
from common.backbones import fingerprint as fingerprint_of
from common.flags import FIXED, Layers, PositiveInt

FROM_SCRATCH = True
HEADS = 4  # of the fusion
PROMPT = 20  # tokens of an instruction, about: memory is estimated before there is one
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass
class Args:
    """The flags of `--backbone dinobert`."""

    vision_tower: Annotated[str, FIXED] = "facebook/dinov2-small"
    """a DINOv2 without registers, a folder or hub id"""
    text_tower: Annotated[str, FIXED] = "sentence-transformers/all-MiniLM-L6-v2"
    """a BERT with its tokenizer.json, such as google-bert/bert-base-uncased too, a folder or hub id"""
    picture_size: Annotated[PositiveInt, FIXED] = 224
    """side, in pixels, to which pictures are resized for it: a multiple of its patches' 14"""
    fusion_layers: Annotated[PositiveInt, FIXED, Layers("fusion_width")] = 4
    """layers of the Llama"""
    fusion_width: Annotated[PositiveInt, FIXED] = 256
    """its width"""

    def check(self):
        if self.fusion_width % (2 * HEADS):
            raise UserError(f"--fusion-width must be a multiple of {2 * HEADS}, not {self.fusion_width}.")


def from_flags(args, dataset, action_bounds, instructions, image_size, **shape):
    own = ("vision_tower", "text_tower", "picture_size", "fusion_layers", "fusion_width")
    return shape | {"history": args.action_history} | {name: getattr(args, name) for name in own}


def own_options(args, device, cameras, micro_batch_size, train_vision):
    """What `build` takes that is the run's affair and not the weights'."""
    train_vision = bool(train_vision) and not args.evaluate
    return dict(train_vision=train_vision, micro_batch_size=0 if args.evaluate else micro_batch_size)


def pixels(image, size):
    """uint8 (N, H, W, 3) -> float32 (N, 3, size, size) as DINOv2 has them, bicubic as PIL's, but of the whole
    picture: the published crop would cut off the table's edge."""
    x = image.permute(0, 3, 1, 2).float()
    for shape in ((x.shape[2], size), (size, size)):  # PIL rounds after each pass
        x = F.interpolate(x, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    mean, std = (x.new_tensor(each)[:, None, None] for each in (MEAN, STD))
    return (x / 255 - mean) / std


class DinoBert(nn.Module):
    """See the module and `build`. vision, text: the towers; tokenize: an instruction -> its ids."""

    autoregressive = has_attention = own_critic = False
    has_files = ("vision.", "text.")
    lora_targets = None

    def __init__(self, config, vision, text, tokenize):
        super().__init__()
        self.config, self.vision, self.text, self.tokenize = config, vision, text, tokenize
        self.chunk, self.action_dim, self.history = (config[x] for x in ("chunk", "action_dim", "history"))
        self.cameras, width = config["cameras"], config["fusion_width"]
        self.hidden_size, self.own = width, config["proprio_dim"] - self.history * self.action_dim
        self.states = {}  # tuple of instructions -> what preprocess gives of them

        def mlp(inputs):
            return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

        def projection(tower):
            inputs = tower.config.hidden_size
            return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width))

        self.see, self.read = projection(vision), projection(text)
        self.feel, self.recall = mlp(self.own), mlp(self.action_dim) if self.history else None
        # what tells the cameras, the past actions, proprio and words apart
        self.kinds = nn.Parameter(0.5 * torch.randn(self.cameras + self.history + 2, width))
        self.action_slots = nn.Parameter(0.5 * torch.randn(self.chunk * self.action_dim, width))
        sizes = LlamaConfig(
            vocab_size=1, hidden_size=width, num_hidden_layers=config["fusion_layers"],
            num_attention_heads=HEADS, intermediate_size=2 * width, initializer_range=width**-0.5,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.fusion = LlamaModel(sizes)
        self.fusion.embed_tokens = None  # its tokens are no words
        self.lm_head = nn.Linear(width, 256, bias=False)

    def train(self, mode=True):
        """The towers stay as they are in an evaluation: with their dropout no ratio would be 1."""
        super().train(mode)
        self.vision.eval(), self.text.eval()
        return self

    def vision_parameters(self):
        return list(self.vision.parameters())

    @torch.no_grad()
    def encode_text(self, instructions):
        """-> BERT's states of each (I, L, D), zeros before the shorter ones, so that the end of the prompt,
        where the value is read, has one index; and which are no such pads, bool (I, L)."""
        device, states = self.action_slots.device, {}
        for text in dict.fromkeys(instructions):  # with --word-dropout many are alike
            ids, sizes = self.tokenize(text), self.text.config
            if max(ids) >= sizes.vocab_size:
                raise UserError("The text tower's tokenizer.json is not its own: it has more words.")
            if len(ids) > (most := sizes.max_position_embeddings):
                raise UserError(f"{text[:40]!r}... has {len(ids)} tokens; the text tower reads {most}.")
            states[text] = self.text(torch.tensor([ids], device=device)).last_hidden_state[0]
        rows = [states[text] for text in instructions]
        longest = max(map(len, rows))
        words = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        lengths = torch.tensor([[len(row)] for row in rows], device=device)
        return words, torch.arange(longest, device=device) >= longest - lengths

    def preprocess(self, obs, instructions):
        """obs as in `common.envs` -> batch: image uint8 (B, cameras, H, W, 3), proprio, words (B, L, D),
        known bool (B, L)."""
        device, key = self.action_slots.device, tuple(instructions)
        if key not in self.states:
            self.states[key] = self.encode_text(instructions)
        task = torch.as_tensor(obs["task"], device=device)
        words, known = (x[task] for x in self.states[key])
        batch = {name: torch.as_tensor(obs[name], device=device) for name in ("image", "proprio")}
        return batch | {"words": words, "known": known}

    def encode_vision(self, batch):
        """-> patch tokens (B, cameras*patches, D), None"""
        image = batch["image"]
        x = pixels(image.flatten(0, 1), self.config["picture_size"])
        patches = self.vision(x).last_hidden_state[:, 1:]  # the first is no patch
        return patches.unflatten(0, image.shape[:2]).flatten(1, 2), None

    def forward(self, batch, vision=None, actions=None):
        vision = self.encode_vision(batch)[0] if vision is None else vision
        seen, recalled, felt, read = self.kinds.split([self.cameras, self.history, 1, 1])
        proprio, past = batch["proprio"].tensor_split([self.own], 1)
        patches = self.see(vision).unflatten(1, (self.cameras, -1)) + seen[:, None]
        parts = [patches.flatten(1, 2), self.feel(proprio)[:, None] + felt, self.read(batch["words"]) + read]
        if self.history:
            parts.insert(1, self.recall(past.unflatten(1, (self.history, -1))) + recalled)
        x = torch.cat([*parts, self.action_slots.expand(len(vision), -1, -1)], 1)  # (B, S, width)
        length, after = x.shape[1], len(self.action_slots)
        start = length - after
        keep = F.pad(batch["known"], (start - batch["known"].shape[1], after), value=True)
        # An explicit 4-D mask: of a 2-D one Llama would make a causal mask.
        mask = keep[:, None, None].expand(-1, 1, length, -1)
        hidden = self.fusion(
            inputs_embeds=x, attention_mask=mask, position_ids=keep.cumsum(1) - 1, use_cache=False
        ).last_hidden_state
        return hidden[:, start:], hidden[:, start - 1]

    def action_logits(self, action_hidden):
        return self.lm_head(action_hidden)

    def to_env(self, actions):
        return actions

    def from_env(self, actions):
        return actions


# --- loading


def build(
    *, chunk, action_dim, proprio_dim, cameras, history=0, vision_tower=Args.vision_tower,
    text_tower=Args.text_tower, picture_size=Args.picture_size, fusion_layers=Args.fusion_layers,
    fusion_width=Args.fusion_width, fingerprint=None, train_vision=False, micro_batch_size=0, device="cpu",
):  # fmt: skip
    """The towers' published weights and a random fusion on `device`, all in float32.

    history: of the proprio_dim numbers the last history*action_dim are past actions. fingerprint: the towers'
    that a checkpoint was trained with. train_vision: else both are frozen. With a micro_batch_size, memory
    must do for an update of it. Raises UserError.
    """
    device, folder = torch.device(device), find_checkpoint(text_tower)
    eye = read_tower(vision_tower, find_checkpoint(vision_tower), Dinov2Model)
    text = read_tower(text_tower, folder, BertModel, add_pooling_layer=False)
    side = eye.embeddings.patch_embeddings.patch_size[0]
    if picture_size % side:
        raise UserError(f"--picture-size must be a multiple of {side}, a patch's side, not {picture_size}.")
    with intact(file := folder / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    config = dict(
        name="dinobert", chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, cameras=cameras,
        history=history, vision_tower=str(vision_tower), text_tower=str(text_tower),
        picture_size=picture_size, fusion_layers=fusion_layers, fusion_width=fusion_width,
    )  # fmt: skip
    with torch.device("meta"):
        needs = memory_needed(DinoBert(config, eye, text, None), micro_batch_size, train_vision)
    check_memory("--backbone dinobert", device, *needs, smaller="a smaller --picture-size")
    eye = read_weights(
        Dinov2Model, vision_tower, find_checkpoint(vision_tower), eye.config, "float32", unexpected=None
    )
    text = read_weights(
        BertModel, text_tower, folder, text.config, "float32", unexpected=None, add_pooling_layer=False
    ).requires_grad_(False)
    config["fingerprint"] = fingerprint_of(nn.ModuleList([eye, text]))
    if fingerprint not in (None, config["fingerprint"]):
        names = f"{vision_tower} or {text_tower}"
        raise UserError(f"{names} has other weights than the checkpoint was trained with; put those back.")
    eye.requires_grad_(train_vision)
    if eye.embeddings.mask_token is not None:  # of pretraining alone
        eye.embeddings.mask_token.requires_grad_(False)
    backbone = DinoBert(config, eye, text, lambda words: tokenizer.encode(words).ids)
    return backbone.to(device).eval()


def read_tower(path, folder, kind, **options):
    """-> the model of the class `kind` that the config in `folder` describes, on the meta device. UserError
    for another model's, or a damaged one."""
    with intact(file := folder / "config.json"):
        found = json.loads(file.read_text()).get("model_type")
        if found == kind.config_class.model_type:
            with torch.device("meta"):
                return kind(kind.config_class.from_pretrained(folder), **options)
    raise UserError(f"{path} is of the type {found}; only {kind.config_class.model_type} loads here.")


def memory_needed(model, micro_batch_size, train_vision):
    """About how many bytes the weights of `model`, on whatever device, and an update of it hold, in float32.

    What trains has a gradient and AdamW's two moments. For the backward, a layer of the fusion keeps of a
    token eleven tensors of its width and four of its MLP's, twice as wide; a block of DINOv2, where it
    trains, ten and two; a projection two of what it projects.
    """
    config, eye, read = model.config, model.vision.config, model.text.config.hidden_size
    weights = 4 * sum(p.numel() for p in model.parameters())
    if not micro_batch_size:
        return weights, 0
    parts = [x for name, x in model.named_children() if name != "text" and (train_vision or name != "vision")]
    trained = 12 * sum(p.numel() for part in parts for p in part.parameters())
    patches = config["cameras"] * (config["picture_size"] // eye.patch_size) ** 2
    tokens = patches + config["history"] + 1 + PROMPT + len(model.action_slots)
    kept = tokens * config["fusion_layers"] * 19 * config["fusion_width"]
    kept += 2 * (patches * eye.hidden_size + PROMPT * read)
    if train_vision:
        kept += patches * eye.num_hidden_layers * (10 + 2 * eye.mlp_ratio) * eye.hidden_size
    return weights, trained + 4 * micro_batch_size * kept
