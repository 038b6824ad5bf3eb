"""torchrun's processes as one: sums and lists over all of them, which without torchrun change nothing.

    torchrun --nproc-per-node 8 ppo_vla.py ...

Of adapters each process has all, and `sum_gradients` adds up their gradients. Where every weight is trained,
`shard` splits weights, gradients and the optimizer's moments over the processes (ZeRO's stage 3, Rajbhandari
et al. 2020, by PyTorch's fully_shard):

    shard(agent)                 before there is an optimizer
    unshard(agent)               all weights in each process, and none waits for another: rollouts, evaluation
    reshard(agent)               split again; an update gathers one layer after another
    in_step(micro batches, ...)  as many in each process, since each forward and backward now waits for all

Weights that are whole are the price of the rollouts: gathered once, instead of in every forward, as many of
which every process would then need, whoever's episodes end first.
"""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

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


def device(wish):
    """This process's device by --device, after `start`."""
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # a thread of gloo that still frees a tensor when the interpreter ends aborts it


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
    """Add up the gradients of all processes, in one message; one that a process lacks counts as zero. Those
    of sharded parameters the backward pass has added up."""
    parameters = [p for p in parameters if not sharded(p)]
    if not dist.is_initialized() or not parameters:
        return
    flat = all_sum(
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])
    )
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


# --- every weight trained: each process has its part of it


def sharded(x):
    """Is `x`, a tensor or a module, one of which each process has a part?"""
    if not dist.is_initialized():  # what follows takes seconds to import
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return isinstance(x, (DTensor, FSDPModule))


def shard(agent):
    """Split the weights of `agent`, its backbone's `layers()` one by one and the rest as one, over all
    processes. Nothing changes in one process, with adapters, or where the backbone names no layers: it is
    small. UserError for weights in 4 bits.

    Its `evaluate_actions` is then the one forward of which there is a backward.
    """
    layers = getattr(agent.backbone, "layers", list)()
    if ranks()[1] == 1 or not layers or agent.backbone.config.get("lora"):
        return
    if not all(p.is_floating_point() for p in agent.parameters()):
        raise UserError("Weights in 4 bits cannot be split over processes; use --lora-rank 32, or 16 bits.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(agent.parameters()).device.type, (ranks()[1],))
    for module in (*layers, agent):
        fully_shard(module, mesh=mesh)  # computes in the dtype that the weights have
        # A sum, as of `sum_gradients`: the losses are divided by what the whole minibatch counts. Every
        # micro-batch adds to it at once: to wait for the last one, all gradients would have to be kept whole.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    evaluate = agent.evaluate_actions

    def evaluate_actions(batch, actions, vision=None):
        if len(actions):
            return evaluate(batch, actions, vision)
        # `in_step`'s empty batch, which attention's kernels refuse: a row of zeros, of which nothing is kept
        row = {key: x.new_zeros(1, *x.shape[1:]) for key, x in batch.items()}
        return [x[:0] for x in evaluate(row, row["actions"], row.get("vision"))]

    agent.evaluate_actions, agent.forward = evaluate_actions, lambda: None
    register_fsdp_forward_method(agent, "evaluate_actions")
    agent()  # FSDP's root is what is called first
    agent.reshard()


def unshard(agent):
    """Gather all weights, as they now are, in each process until `reshard`, or until they are saved."""
    reshard(agent)
    for module in filter(sharded, agent.modules()):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def reshard(agent):
    """Free what of the weights is other processes' part; so does then each layer after its forward."""
    for module in filter(sharded, agent.modules()):
        module.reshard()
        module.set_reshard_after_forward(module is not agent, recurse=False)


def in_step(batches, data, agent):
    """`batches`, an iterator of (rows, their columns of `data`), and of a sharded `agent` empty ones after
    them until no process has another."""
    if not sharded(agent):
        yield from batches
        return
    empty = None, {key: x[:0] for key, x in data.items()}
    while True:
        batch = next(batches, None)
        if not all_sum(torch.tensor(int(batch is not None))):
            return
        yield batch or empty


def whole(tensor):
    """A sharded tensor -> all of it, in every process; another one as it is."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def collect(tensor):
    """A sharded tensor -> all of it in the first process's host memory, None in the others; another one as it
    is."""
    if not sharded(tensor):
        return tensor
    tensor = tensor.full_tensor()
    return None if dist.get_rank() else tensor.cpu()


def split(tensor, like):
    """`tensor`, the same in every process, sharded as `like` is, or as it is."""
    if not sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def collect_weights(module):
    """Put whole weights, in the first process's host memory, in the place of sharded ones, for good."""
    for part in module.modules():
        for name, p in [pair for pair in part.named_parameters(recurse=False) if sharded(pair[1])]:
            weight = collect(p.detach())
            setattr(part, name, None if weight is None else nn.Parameter(weight, requires_grad=False))
