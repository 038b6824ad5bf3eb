"""OpenVLA's 256-bin action tokens, exact to its quirks, and the quantile (un)normalisation around them.

Kim et al. 2024 (arXiv 2406.09246), `prismatic/vla/action_tokenizer.py`. An action walks: metres and radians
-> `normalize` -> [-1, 1] -> `encode` -> token id, and back. A policy's logits cover only the 256 action ids
in ascending order, so a *bin* here is `id - 31744`: bin 0 is a = +1 and bin 255 is a = -1 (ids fall as the
action rises).
"""

import numpy as np
import torch

from common import UserError


class ActionTokenizer:
    """Maps actions in [-1, 1] to token ids and back, for tensors of any shape on any device.

    256 edges make only 255 centres, so that ids 31744 and 31745 decode alike, as published. The tables
    follow the device of the last input.
    """

    def __init__(self, bins: int = 256, vocab_size: int = 32000):
        """The last `bins` of `vocab_size` ids are actions; `vocab_size` is from before padding to 64."""
        # numpy's own float64, since torch.linspace may differ in the last bit
        edges = np.linspace(-1.0, 1.0, bins)
        self.bins = bins
        self.vocab_size = vocab_size
        self.first_id = vocab_size - bins
        self.edges = torch.from_numpy(edges)  # (bins,) float64
        self.centres = torch.from_numpy(((edges[:-1] + edges[1:]) / 2.0).astype(np.float32))  # (bins - 1,)

    def _follow(self, device: torch.device) -> None:
        if self.edges.device != device:
            self.edges, self.centres = self.edges.to(device), self.centres.to(device)

    def encode(self, actions: torch.Tensor) -> torch.Tensor:
        """Actions (..., A), clipped to [-1, 1] -> ids (..., A) int64, 31999 (a = -1) to 31744 (a = +1).

        id = vocab_size - d with edges[d - 1] <= a < edges[d], as `np.digitize`.
        """
        self._follow(actions.device)
        # float64, as np.digitize compares: edges rounded to float32 would move the actions next to them
        clipped = actions.to(torch.float64).clamp(-1.0, 1.0).contiguous()
        return self.vocab_size - torch.bucketize(clipped, self.edges, right=True)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (..., A) -> actions (..., A) float32, centres[clip(vocab_size - id - 1, 0, 254)].

        An id that is no action token clips silently to an end, as published.
        """
        self._follow(ids.device)
        return self.centres[(self.vocab_size - 1 - ids.long()).clamp(0, self.bins - 2)]

    def to_bin(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids -> index into the policy's slice of logits, `id - 31744`, unchecked."""
        return ids - self.first_id

    def to_id(self, index: torch.Tensor) -> torch.Tensor:
        """Index into the policy's slice of logits -> id, `index + 31744`, unchecked."""
        return index + self.first_id

    def encode_bins(self, actions: torch.Tensor) -> torch.Tensor:
        """Actions (..., A) in [-1, 1] -> slice index (..., A) int64 in 0..255, a cross-entropy's target."""
        return self.to_bin(self.encode(actions))

    def decode_bins(self, index: torch.Tensor) -> torch.Tensor:
        """Slice index (..., A) in 0..255, as sampled from the logits -> actions (..., A) float32."""
        return self.decode(self.to_id(index))


def _statistics(x: torch.Tensor, q01, q99, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = (torch.as_tensor(q, dtype=x.dtype, device=x.device) for q in (q01, q99))
    mask = torch.as_tensor(mask, dtype=torch.bool, device=x.device)
    if not low.shape == high.shape == mask.shape == x.shape[-1:]:
        raise UserError(
            f"q01 {tuple(low.shape)}, q99 {tuple(high.shape)} and mask {tuple(mask.shape)} must be of shape "
            f"{tuple(x.shape[-1:])}; take the statistics of a data set with this action space."
        )
    return low, high, mask


def unnormalize(actions: torch.Tensor, q01, q99, mask, eps: float = 0.0) -> torch.Tensor:
    """Actions (..., A) in [-1, 1] -> actions (..., A) in the data set's units (metres, radians).

    0.5 (a + 1) (q99 - q01 + eps) + q01 where `mask`, else a. `q01`, `q99`, `mask` are (A,): the 1 % and 99 %
    quantiles, and the dimensions they apply to (not the gripper). OpenVLA has eps 0, OpenVLA-OFT 1e-8.
    UserError if a shape differs.
    """
    low, high, mask = _statistics(actions, q01, q99, mask)
    return torch.where(mask, 0.5 * (actions + 1) * (high - low + eps) + low, actions)


def normalize(x: torch.Tensor, q01, q99, mask, eps: float = 1e-8, clip: bool = True) -> torch.Tensor:
    """Actions or proprioception (..., A) in the data set's units -> (..., A) in [-1, 1].

    2 (x - q01) / (q99 - q01 + eps) - 1 where `mask`, else x; `clip` limits the former to [-1, 1]. The inverse
    of `unnormalize`. UserError if a shape differs.
    """
    low, high, mask = _statistics(x, q01, q99, mask)
    scaled = 2 * (x - low) / (high - low + eps) - 1
    return torch.where(mask, scaled.clamp(-1, 1) if clip else scaled, x)
