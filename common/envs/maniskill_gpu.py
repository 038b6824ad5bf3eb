"""ManiSkill's tasks, all environments at once on the GPU: PhysX, rewards and pictures, one task a run. Never
run on a GPU so far: written after ManiSkill's source, and tested with rows that are its scenes on the CPU.

A layout follows from split and seed, but is another one than on the CPU: it is drawn on the GPU, row by row,
for ManiSkill seeds all rows of a reset together. PhysX's state holds no contacts, and two runs on a GPU do
not agree to the bit, so that a resumed run starts its running episodes anew. The first start fetches PhysX's
library for GPUs.
"""

import numpy as np
import torch

from common import UserError
from common.envs.maniskill import OURS, ManiSkillEnv, _make


def axis_angle(quaternion):
    """As `common.envs.simulation.axis_angle`: (N, 4) -> (N, 3)."""
    w = quaternion[:, :1].clamp(-1, 1)
    length = (1 - w * w).sqrt()
    return torch.where(length > 1e-9, quaternion[:, 1:] * 2 * w.acos() / length, 0.0)


class ManiSkillBatch(ManiSkillEnv):
    """`num_envs` rows of one task, of which `scene` holds all. See the contract of a batch in
    `common/envs/__init__.py`."""

    draws_tasks, DEVICE = False, "cuda"

    def __init__(self, num_envs, device, **kwargs):
        if device.type != self.DEVICE:
            raise UserError(f"ManiSkill's --backend gpu runs on a GPU, not on {device}; drop the flag.")
        self.num_envs, self.device = num_envs, device
        super().__init__(**kwargs)
        if len(self.tasks) > 1:
            raise UserError("ManiSkill's --backend gpu has one task a run; give one of --tasks.")
        self.episodes = np.random.default_rng().integers(2**31, size=(num_envs, 2))
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.signs = torch.tensor(OURS, device=device)
        self._begin(0, 0)

    def _scene(self, name):
        if name not in self.scenes:
            gpu = self.device.index if self.device.index is not None else torch.cuda.current_device()
            key = (name, self.size, "wrist" in self.cameras, self.shaped)
            self.scenes[name] = _make(*key, self.num_envs, gpu)
        return self.scenes[name]

    def reset(self, seeds, options):
        for row, seed in seeds.items():
            self.episodes[row], _, layout = self._draw(self.episodes[row].tolist(), seed, options)
            chosen = torch.tensor([row], device=self.device)
            state, _ = self.scene.reset(seed=layout, options={"env_idx": chosen})
            self.steps[row] = 0
            self.state = self.state.index_copy(0, chosen, state[chosen])

    def advance(self, actions, rows):
        still = (~rows).nonzero()[:, 0]
        before = self.scene.get_state_dict() if len(still) else {}
        state, reward, _, _, info = self.scene.step(self.signs * actions.clamp(-1, 1))
        if len(still):  # all rows go on together: these are put back
            before.pop("controller", None)  # it goes from where the hand is
            kept = {kind: {name: x[still] for name, x in parts.items()} for kind, parts in before.items()}
            self.scene.set_state_dict(kept, still)
        self.state = torch.where(rows[:, None], state, self.state)
        self.steps = self.steps + rows
        success = info["success"]
        truncated = ~success & (self.steps >= self.limit)
        return reward.float() - float(self.shaped), success, truncated, success

    def observe(self):
        if not self.cameras:
            return {"proprio": self.state.float()}
        image = torch.stack(self._pictures(), 1)
        position, quaternion, fingers = self._hand()
        proprio = torch.cat([position, axis_angle(quaternion), fingers], 1).float()
        return {"image": image, "proprio": proprio, "task": torch.zeros_like(self.steps)}

    def render(self, row):
        return self.scene.render_rgb_array()[row].cpu().numpy()

    def close(self):
        for scene in self.scenes.values():
            scene.close()
        self.scenes = {}
