"""torchrun's processes as one: sums and lists over all of them, which without torchrun change nothing.

torchrun --nproc-per-node 8 ppo_vla.py ...
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from common import UserError


def start(device):
    """Join the other processes of torchrun -> this one's device (a GPU each). UserError if one is missing."""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= (count := torch.cuda.device_count()):
            raise UserError(f"torchrun started more processes than there are GPUs here ({count}).")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Tensors through NCCL, objects through the host; one process may be hours ahead of another.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks():
    """-> this process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(tensor):
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value):
    """-> the list of all processes' values, in their order; plain values and CPU tensors."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather(value):
    """-> `all_gather`'s list in the first process, the only one that needs the memory; None elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def sum_metrics(terms, device):
    """Sums over a list of {name: () tensor}, of micro-batches, and over all processes, which may have
    none."""
    names = list(dict.fromkeys(name for names in all_gather([*terms[0]] if terms else []) for name in names))
    sums = [sum((each[name] for each in terms), torch.zeros((), device=device)) for name in names]
    return dict(zip(names, all_sum(torch.stack(sums)).unbind(), strict=True)) if sums else {}


def sum_gradients(parameters):
    """Add up the gradients of all processes, in one message; one that a process lacks counts as zero."""
    if not dist.is_initialized():
        return
    flat = all_sum(
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])
    )
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)
