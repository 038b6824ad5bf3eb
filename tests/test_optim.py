"""`minimize` beside Adam and AdamW written out, in both of its forms, and the compiled update."""

import math

import pytest
import torch

from common import UserError
from common.optim import compile_update, load_optimizer, minimize

OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


def make(kind):
    """Groups of two, no and one weights, of which the first gets no gradient."""
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, -2.0], [[0.5]]))
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS[kind](
        [
            {"params": [unused, x]},
            {"params": []},
            {"params": [y], "lr": torch.tensor(0.02, dtype=torch.float64)},
        ]
    )
    for p in (unused, x, y):
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float64)} | zeros
    return x, y, unused, optimizer


def loss_of(x, y, other):
    return (x.square() * torch.tensor([1.0, 3.0])).sum() * y[0, 0] + other * y[0, 0] ** 3


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0, 1e9])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_minimize(graphs, kind, max_grad_norm, traced):
    """Five steps beside a scalar loop, Kingma & Ba 2015 and Loshchilov & Hutter 2019."""
    x, y, unused, optimizer = make(kind)
    other = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)  # of another optimizer
    beta1, beta2, eps, decay = (0.8, 0.95, 1e-3, 0) if kind == "adam" else (0.9, 0.999, 1e-8, 0.1)

    def step():
        return minimize(loss_of(x, y, other), optimizer, max_grad_norm)

    step = compile_update(step, torch.nn.Linear(1, 1), [optimizer]) if traced else step
    weights, rates, m, v = [1.0, -2.0, 0.5], [0.01, 0.01, 0.02], [0.0] * 3, [0.0] * 3
    for t in range(1, 6):
        a, b, c = weights
        slopes = [2 * a * c, 6 * b * c, a * a + 3 * b * b + 6 * c * c]
        length = math.sqrt(sum(g * g for g in slopes))
        found = step()
        if max_grad_norm is None:
            assert found is None
        else:
            assert found.item() == pytest.approx(length, rel=1e-12)
            slopes = [g * min(1, max_grad_norm / (length + 1e-6)) for g in slopes]
        for i, g in enumerate(slopes):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            weights[i] *= 1 - rates[i] * decay
            weights[i] -= rates[i] * (m[i] / (1 - beta1**t)) / (math.sqrt(v[i] / (1 - beta2**t)) + eps)
        assert [*x.tolist(), y.item()] == pytest.approx(weights, rel=1e-12)
    assert unused.tolist() == [1, 1, 1] and optimizer.state[unused]["step"] == 0
    assert optimizer.state[x]["step"] == 5
    assert all(p.grad is None for p in (x, y, unused, other))
    assert len(graphs) == traced  # one graph, which served all steps


def test_the_compiled_update_heeds_numbers(graphs):
    """Of its guards those on numbers and arguments are kept: another rate, flag or shape is seen."""
    agent = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(agent.weight)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.1)
    scale = {"by": 1.0}

    def update(x, negate):
        loss = (agent(x) * scale["by"]).sum() / len(x) * (-1 if negate else 1)
        minimize(loss, optimizer)
        return loss.detach()

    update, x = compile_update(update, agent, [optimizer]), torch.ones(3, 2)
    assert update(x, False) == 2
    torch.testing.assert_close(agent.weight, torch.full((1, 2), 0.9))
    assert len(graphs) == 1
    optimizer.param_groups[0]["lr"] = 0.2
    assert update(x, False).item() == pytest.approx(1.8, rel=1e-4)
    torch.testing.assert_close(agent.weight, torch.full((1, 2), 0.7))
    scale["by"] = 3.0
    assert update(x, False).item() == pytest.approx(4.2, rel=1e-4)
    for y in (x, x[:2]):
        wanted = -3 * agent.weight.sum().item()
        assert update(y, True).item() == pytest.approx(wanted, rel=1e-4)
    assert len(graphs) == 5 and optimizer.state[agent.weight]["step"] == 5


def test_without_a_compiler(monkeypatch, tmp_path):
    agent = torch.nn.Linear(1, 1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="needs g\\+\\+, or another C"):
        patch.setenv("CXX", "no-such-compiler")
        compile_update(lambda x: x, agent, [])
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"and {tmp_path}/Python.h"):
        patch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        compile_update(lambda x: x, agent, [])


@pytest.mark.parametrize("numbers", [[0], [1, 0], [0, 7], [0, "text"], [0, torch.ones(3)]])
def test_an_optimizer_of_other_parameters_is_refused(numbers):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(n)) for n in (2, 3)])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = numbers
    with pytest.raises((ValueError, RuntimeError)):
        load_optimizer(optimizer, saved)
