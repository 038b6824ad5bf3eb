"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191), Qwen2.5-VL and Qwen3-VL on transformers' classes: published
vision-language models that know nothing of actions, without their processors (these need torchvision).

    [system turn] user: [pictures] [What action should the robot take to ...?] assistant: [proprio] [newline]
    and after this prompt K*A learned slots, whose hidden states the head reads; all of it causal

The critic reads the prompt's last token, which sees no slot. So does `--head discrete`: its first action is
what the model would say next, and begins as that where the world has a word for each of its actions; only a
chunk's further actions have slots. New, beside the head, are the slots, the projection of the proprioception
and, of `--head tokens`, 256 bins: with adapters they train too.

A picture is a token for each 28x28 pixels (Qwen3: 32x32); those of other sizes are resized to the nearest.
What `encode_vision` returns are these tokens and, of Qwen3, the maps that its first layers add to them.
"""

import json
import re

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import nn

from common import UserError
from common.backbones import LoraArgs as Args  # noqa: F401 (its flags)
from common.backbones import check_memory, find_checkpoint, fingerprint, intact, kind_of, read_weights

FROM_SCRATCH = False
DEFAULT = "Qwen/Qwen2-VL-2B-Instruct"  # what `--backbone qwen` is
PROMPT = 35  # tokens of a prompt, about: memory is estimated before there is one
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and std of colours
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
FAMILIES = {  # a config's model_type -> class, colours, system turn; all else is in the config
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, CLIP, SYSTEM),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, CLIP, SYSTEM),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, ((0.5,) * 3, (0.5,) * 3), ""),
}


def owns(path):
    """Whether a checkpoint's folder or hub id is of this family: by its config, or its name on the hub."""
    return re.search(r"qwen.*vl", kind_of(path)) is not None


# --- observations


def resize(image, step):
    """uint8 (..., H, W, 3) -> sides that are multiples of `step`, the nearest, and at least two: bicubic."""
    sides = [max(2, round(side / step)) * step for side in image.shape[-3:-1]]
    if sides == list(image.shape[-3:-1]):
        return image
    x = image.flatten(0, -4).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, sides, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().unflatten(0, image.shape[:-3])


def patchify(image, patch, mean, std):
    """uint8 (N, H, W, 3), H and W multiples of 2 * patch -> float32 (N * H/patch * W/patch, 6 * patch^2), as
    the vision part takes patches: 2x2 of them, which become a token, together, and each twice, for a still
    picture is two frames."""
    mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (mean, std))
    x = (image.permute(0, 3, 1, 2).float() / 255 - mean) / std
    x = x.unflatten(3, (-1, 2, patch)).unflatten(2, (-1, 2, patch))  # (N, 3, h, 2, p, w, 2, p)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # (N, h, w, 2, 2, 3, 1, p, p)
    return x.expand(*x.shape[:6], 2, -1, -1).flatten(0, 4).flatten(1)


def rope_positions(ids, image_id, height, width):
    """Positions (3, L), in time, height and width, of the tokens `ids`, a list, whose pictures have height x
    width tokens: of words all three count on, a picture's are those of its grid, from where it begins."""
    parts, start, i = [], 0, 0
    while i < len(ids):
        if ids[i] == image_id:
            k = torch.arange(height * width)
            parts.append(start + torch.stack([0 * k, k // width, k % width]))
            start, i = start + max(height, width), i + len(k)
        else:
            parts.append(torch.full((3, 1), start))
            start, i = start + 1, i + 1
    return torch.cat(parts, 1)


# --- the model


class Qwen(nn.Module):
    """See the module and `build`. What comes out is float32."""

    autoregressive = has_attention = own_critic = False
    has_files = True
    # By their whole names: Qwen2.5's vision part has gate, up and down projections too.
    lora_targets = r"qwen\.model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"

    def __init__(self, config, model, tokenize):
        super().__init__()
        self.config, self.qwen, self.tokenize = config, model, tokenize
        (_, self.colours, self.system), text = FAMILIES[model.config.model_type], model.config.text_config
        self.chunk, self.action_dim = config["chunk"], config["action_dim"]
        self.hidden_size, self.image_id = text.hidden_size, model.config.image_token_id
        self.patch, self.vocabulary = model.config.vision_config.patch_size, text.vocab_size
        self.prompts = {}
        numbers, scale = self.chunk * self.action_dim, text.initializer_range  # the words' embeddings'
        self.feel = nn.Linear(config["proprio_dim"], self.hidden_size)
        for parameter in self.feel.parameters():
            nn.init.normal_(parameter, std=scale)
        self.num_slots = numbers - (config["head"] == "discrete")  # the first is read at the prompt's end
        slots = scale * torch.randn(self.num_slots, self.hidden_size)
        self.slots = nn.Parameter(slots) if self.num_slots else None
        self.bins = nn.Linear(self.hidden_size, 256, bias=False) if config["head"] == "tokens" else None

    @property
    def new_parts(self):
        return [part for part in (self.feel, self.slots, self.bins) if part is not None]

    @property
    def device(self):
        return self.feel.weight.device

    def vision_parameters(self):
        return list(self.qwen.model.visual.parameters())

    def encode_prompt(self, instruction, pictures, tokens):
        """-> ids of the prompt, a list; the last but one is the proprioception's place"""
        picture = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
        text = f"What action should the robot take to {instruction.lower()}?"
        user = f"<|im_start|>user\n{picture * pictures}{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenize(self.system + user)
        if ids.count(self.image_id) != pictures * tokens or max(ids) >= self.vocabulary:
            raise UserError(f"The tokenizer.json of {self.config['path']} is not its own: download it again.")
        return [*ids[:-1], 0, ids[-1]]

    def encode_prompts(self, instructions, pictures, height, width):
        """-> input_ids (I, L), padded on the left, position_ids (I, 3, L+S) and, where the instructions
        differ in length, keep bool (I, L+S), with S slots."""
        rows = [self.encode_prompt(text, pictures, height * width) for text in instructions]
        pads, slots = [max(map(len, rows)) - len(row) for row in rows], [0] * self.num_slots
        places = [rope_positions(row + slots, self.image_id, height, width) for row in rows]
        table = {
            "input_ids": torch.tensor([[0] * n + row for n, row in zip(pads, rows, strict=True)]),
            "position_ids": torch.stack([F.pad(x, (n, 0)) for n, x in zip(pads, places, strict=True)]),
        }
        if any(pads):
            table["keep"] = torch.arange(table["position_ids"].shape[2]) >= torch.tensor(pads)[:, None]
        return {name: x.to(self.device) for name, x in table.items()}

    @torch.no_grad()
    def preprocess(self, obs, instructions):
        """obs as in `common.envs` -> batch: image uint8 (B, cameras, H, W, 3), proprio (B, P), and the rows
        of `encode_prompts`."""
        image = resize(torch.as_tensor(obs["image"], device=self.device), 2 * self.patch)
        key = (image.shape[1:4], *instructions)
        if key not in self.prompts:
            grid = (side // (2 * self.patch) for side in image.shape[2:4])
            self.prompts[key] = self.encode_prompts(instructions, image.shape[1], *grid)
        task = torch.as_tensor(obs["task"], device=self.device)
        batch = {name: table[task] for name, table in self.prompts[key].items()}
        proprio = torch.as_tensor(obs["proprio"], device=self.device, dtype=torch.float32)
        return {"image": image, "proprio": proprio} | batch

    def encode_vision(self, batch):
        """-> the pictures' tokens (B, 1 + maps, cameras * tokens, D), None"""
        image = batch["image"].flatten(0, 1)  # a sample's pictures one after another, as in its prompt
        grid = torch.tensor([[1, *(side // self.patch for side in image.shape[1:3])]], device=self.device)
        found = self.qwen.model.get_image_features(
            patchify(image, self.patch, *self.colours), grid.expand(len(image), -1)
        )
        maps = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
        size = batch["image"].shape[:2]
        return torch.stack([torch.stack(x).unflatten(0, size).flatten(1, 2) for x in maps], 1), None

    def _autocast(self):  # for adapters in float32 among weights in bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config["dtype"] == "bfloat16")

    def forward(self, batch, vision=None, actions=None):
        vision = self.encode_vision(batch)[0] if vision is None else vision
        ids, words, more = batch["input_ids"], self.qwen.get_input_embeddings(), {}
        seen = ids == self.image_id
        with self._autocast():
            x = words(ids).masked_scatter(seen[..., None], vision[:, 0].to(words.weight.dtype))
            parts = [x[:, :-2], self.feel(batch["proprio"])[:, None], x[:, -1:]]
            if self.num_slots:
                parts.append(self.slots.expand(len(ids), -1, -1))
            if vision.shape[1] > 1:
                maps = [each.flatten(0, 1) for each in vision[:, 1:].unbind(1)]
                places = F.pad(seen, (0, self.num_slots))
                more = dict(visual_pos_masks=places, deepstack_visual_embeds=maps)
            hidden = self.qwen.model.language_model(
                inputs_embeds=torch.cat([part.to(x.dtype) for part in parts], 1), use_cache=False,
                attention_mask=batch.get("keep"), position_ids=batch["position_ids"].transpose(0, 1), **more,
            ).last_hidden_state.float()  # fmt: skip
        return hidden[:, -self.chunk * self.action_dim :], hidden[:, ids.shape[1] - 1]

    def action_logits(self, action_hidden):
        return self.bins(action_hidden)

    def embed_words(self, words):
        """The rows (n, D) of the language model's head for the words' first tokens."""
        ids = [self.tokenize(word)[0] for word in words]
        return self.qwen.get_output_embeddings().weight[ids].float()

    def to_env(self, actions):
        return actions

    def from_env(self, actions):
        return actions


# --- loading


def from_flags(args, chunk, action_dim, proprio_dim, image_size, **_):
    """The config that `build` takes, of weights that are not a run's."""
    config = dict(
        chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, head=args.head, side=image_size
    )
    return config | ({"path": DEFAULT} if args.backbone == "qwen" else {})


def own_options(args, device, cameras, micro_batch_size, train_vision):
    """What `build` takes that is the run's affair and not the weights'."""
    trains = not (args.evaluate or args.collect)
    return dict(
        lora_rank=args.lora_rank, cameras=cameras, train_vision=train_vision,
        micro_batch_size=micro_batch_size if trains else 0,
        # Adapters stay in float32; to train every weight in 16 bits would lose Adam's small steps.
        dtype="bfloat16" if device.type == "cuda" and (args.lora_rank or not trains) else "float32",
    )  # fmt: skip


def build(
    *, path, chunk=1, action_dim=7, proprio_dim=8, head="tokens", side=224, dtype="float32", device="cpu",
    micro_batch_size=0, lora_rank=0, cameras=1, train_vision=None, **_,
):  # fmt: skip
    """Load a checkpoint in the hub's layout onto `device`. path: a folder or a hub id.

    head: "discrete" has a slot less than the others, "tokens" 256 bins. With a micro_batch_size, memory must
    do for an update of it, with pictures of `side`. device "meta" loads nothing. Raises UserError.
    """
    device, folder = torch.device(device), find_checkpoint(path)
    with intact(file := folder / "config.json"):
        kind = dict(json.loads(file.read_text())).get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path} is a {kind}; only {', '.join(FAMILIES)} load here.")
    Model = FAMILIES[kind][0]
    with intact(file):
        sizes = Model.config_class.from_pretrained(folder)
        sizes.text_config.attention_dropout = 0.0  # else the policy that is trained is not the one that acts
        with torch.device("meta"):
            model = Model(sizes)
    with intact(file := folder / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(file))

    def tokenize(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    config = dict(
        name="qwen", path=str(path), chunk=chunk, action_dim=action_dim, proprio_dim=proprio_dim, head=head,
        side=side, dtype=dtype,
    )  # fmt: skip
    if device.type != "meta":
        needs = memory_needed(model, dtype, micro_batch_size, lora_rank, cameras, side, train_vision)
        check_memory(path, device, *needs)
        model = read_weights(Model, path, folder, sizes, dtype).to(device)
    if (head := model.get_output_embeddings().weight) is not model.get_input_embeddings().weight:
        head.requires_grad_(False)  # only `embed_words` reads it
    backbone = Qwen(config, model, tokenize).to(device).eval()
    if device.type != "meta":
        backbone.fingerprint = fingerprint(model)
    return backbone


def memory_needed(model, dtype, micro_batch_size, lora_rank, cameras, side, train_vision):
    """About how many bytes the weights of `model`, on whatever device, and an update hold.

    What trains has a gradient and AdamW's two moments in float32; adapters also themselves, and their copies
    in 16 bits. For the backward a layer keeps eight tensors of its width and four of its MLP's, of the vision
    part too where that trains; beside that there are gradients, of one layer at a time.
    """
    item, text, eye = getattr(torch, dtype).itemsize, model.config.text_config, model.model.visual
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    weights = item * count(model)
    if not micro_batch_size:
        return weights, 0
    sees = not lora_rank and train_vision is not False
    trained = 12 * (count(model) - (0 if sees else count(eye)))
    if lora_rank:
        tuned = [m for n, m in model.named_modules() if re.fullmatch(Qwen.lora_targets, f"qwen.{n}")]
        trained = 18 * lora_rank * sum(m.in_features + m.out_features for m in tuned)
    patches = 4 * cameras * max(2, round(side / (2 * eye.config.patch_size))) ** 2
    stacks = [(patches // 4 + PROMPT, text.num_hidden_layers, text.hidden_size, text.intermediate_size)]
    if sees:
        widths = {m.in_features for m in eye.blocks[0].modules() if isinstance(m, nn.Linear)}
        stacks.append((patches, len(eye.blocks), min(widths), max(widths)))
    kept = sum(n * depth * (8 * dim + 4 * mlp) for n, depth, dim, mlp in stacks)
    moment = max(n * (dim + 2 * mlp) for n, _, dim, mlp in stacks)
    return weights, trained + item * micro_batch_size * (kept + moment)
