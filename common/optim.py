"""An optimizer's step, and an update with its steps as one compiled graph."""

import inspect
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.adam import adam

from common import UserError
from common.distributed import sharded, split


def minimize(loss, optimizer, max_grad_norm=None):
    """One step of `optimizer`, an Adam or AdamW, along the gradient of `loss` () by its own parameters alone,
    scaled down to `max_grad_norm` if that is given -> the gradient's norm before, (), or None."""
    groups, norm = optimizer.param_groups, None
    parameters = [p for group in groups for p in group["params"]]
    if not torch.compiler.is_compiling():
        loss.backward(inputs=parameters)
        if max_grad_norm:
            norm = clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm
    # torch.compile leaves those calls to Python. The same on the same state, in functions that it traces:
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    slopes = {p: slope for p, slope in zip(parameters, slopes, strict=True) if slope is not None}
    with torch.no_grad():
        if max_grad_norm:
            norm = get_total_norm(slopes.values(), foreach=False)
            scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1)
            slopes = {p: slope * scale for p, slope in slopes.items()}
        for group in groups:
            used = [p for p in group["params"] if p in slopes]
            states = [optimizer.state[p] for p in used]
            means, squares, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            options = {key: group[key] for key in ("lr", "weight_decay", "eps", "decoupled_weight_decay")}
            options |= dict(
                zip(("beta1", "beta2"), group["betas"], strict=True), amsgrad=False, maximize=False
            )
            gradients = [slopes[p] for p in used]
            adam(used, gradients, means, squares, [], steps, foreach=True, capturable=True, **options)
    return norm


def load_optimizer(optimizer, saved):
    """Put what `state_dict` of such an Adam or AdamW gave back into `optimizer`. ValueError where it is of
    others: torch compares neither shapes nor names, and would fail, or learn something else, later."""
    fresh = [dict(group) for group in optimizer.param_groups]
    numbers = [[group["params"] for group in x["param_groups"]] for x in (saved, optimizer.state_dict())]
    if numbers[0] != numbers[1]:
        raise ValueError("an optimizer of other parameters")
    parameters = [p for group in fresh for p in group["params"]]
    if any(map(sharded, parameters)):  # each process's part, one tensor at a time
        moments = {i: {k: split(x, parameters[i]) for k, x in s.items()} for i, s in saved["state"].items()}
        saved = saved | {"state": moments}
    optimizer.load_state_dict(saved)
    for old, new in zip(fresh, optimizer.param_groups, strict=True):
        kinds = [{k: type(x) for k, x in group.items() if k != "lr"} for group in (old, new)]
        if kinds[0] != kinds[1] or not 0 <= float(new["lr"]) < float("inf"):
            raise ValueError("an optimizer's settings that are none")
    for p, moments in optimizer.state.items():
        shapes = {name: x.shape for name, x in moments.items()}
        if shapes != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
            raise ValueError("an optimizer's state of other shapes")


def compile_update(update, agent, optimizers):
    """`update(...)`, which steps `optimizers` by `minimize`, as one graph of torch.compile, on a GPU as a
    CUDA graph. To be called when `agent` and `optimizers` have their device and, if any, their saved state.
    Later calls check their arguments and all numbers (say, a learning rate) before they reuse the graph, not
    the modules and tensors from which it was made. UserError without a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not shutil.which(os.environ.get("CXX", "g++")) or not headers.is_file():
        raise UserError(
            f"--compile needs g++, or another C++ compiler named in $CXX, and {headers}; install the "
            "packages g++ and python3-dev, or drop --compile."
        )
    device, tensors = next(agent.parameters()).device, [*agent.parameters(), *agent.buffers()]
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state = optimizer.state.setdefault(p, {"step": torch.zeros((), device=device)} | zeros)
            tensors += state.values()
    for tensor in tensors:  # a CUDA graph takes these where they are, instead of copying them
        torch._dynamo.mark_static_address(tensor)
    arguments = inspect.signature(update).parameters
    numbers = {"CONSTANT_MATCH", "EQUALS_MATCH", "SHAPE_ENV"}

    def keep(guards):  # the check of all of them takes 6% of an update on a CPU
        return [guard.guard_type in numbers or guard.name in arguments for guard in guards]

    torch._dynamo.config.trace_autograd_ops = True
    options = {"triton.cudagraphs": True} if device.type == "cuda" else {"cpp_wrapper": True}
    return torch.compile(update, fullgraph=True, options=options | {"guard_filter_fn": keep})
