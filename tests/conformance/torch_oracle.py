"""PyTorch's answers: recurrent layers with any mask, losses, updates and a training run, in double precision.

A masked step carries every state over, so a masked sequence is the sequence of its valid steps: each row is
cut to those, run by nn.LSTM or nn.RNN, and the outputs are laid back where they belong. Autograd does the
rest. Only the recorder and the live tests import this file; the recorded tests need no PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracle import EPSILON, LOSSES, OPTIMIZERS, Sequence, descent, generator, inputs, label, pair, training


def _module(s: Sequence, given: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    if s.cell == "lstm":
        module: torch.nn.Module = torch.nn.LSTM(s.I, s.H, batch_first=True, dtype=dtype)
    else:
        module = torch.nn.RNN(s.I, s.H, nonlinearity=s.cell[4:], batch_first=True, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.from_numpy(given["kernel"].T.copy()))
        module.weight_hh_l0.copy_(torch.from_numpy(given["recurrent_kernel"].T.copy()))
        module.bias_ih_l0.copy_(torch.from_numpy(given["bias"]))
        module.bias_hh_l0.zero_()
    return module


def _run(module: torch.nn.Module, x: Any, state: list[Any]) -> tuple[Any, list[Any]]:
    """Outputs (B, T, H) and last states (B, H) of one batch without a mask."""
    packed = [s[None] for s in state]
    y, final = module(x, tuple(packed) if len(packed) == 2 else packed[0])
    return y, [f[0] for f in (final if len(packed) == 2 else [final])]


def sequence(
    s: Sequence, given: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Outputs, last states and every gradient of one question, as NumPy arrays by name."""
    given = inputs(s) if given is None else given
    module = _module(s, given, dtype)
    tensor = lambda a: torch.tensor(a, dtype=dtype)
    x, state = tensor(given["x"]).requires_grad_(), [tensor(a).requires_grad_() for a in given["state"]]
    if given["mask"] is None:
        y, final = _run(module, x, state)
    else:
        rows = []
        for b, valid in enumerate(torch.from_numpy(given["mask"])):
            start = [a[b : b + 1] for a in state]
            if not valid.any():
                rows.append((start[0].expand(s.T, -1), start))
                continue
            h, last = _run(module, x[b : b + 1, valid], start)
            # row k of `history` is the output after k valid steps; step t has seen cumsum[t] of them
            history = torch.cat([start[0], h[0]])
            rows.append((history[torch.cumsum(valid, 0)], last))
        y = torch.stack([r[0] for r in rows])
        final = [torch.cat([r[1][k] for r in rows]) for k in range(len(state))]
    loss = (y * tensor(given["dy"])).sum() + sum(
        (f * tensor(d)).sum() for f, d in zip(final, given["dfinal"], strict=True)
    )
    loss.backward()
    found = {"y": y, "dx": _gradient(x), "dbias": _gradient(module.bias_ih_l0)}
    found["dkernel"] = _gradient(module.weight_ih_l0).T
    found["drecurrent_kernel"] = _gradient(module.weight_hh_l0).T
    found |= {f"final{k}": f for k, f in enumerate(final)} | {
        f"dstate{k}": a.grad for k, a in enumerate(state)
    }
    return {name: value.detach().numpy() for name, value in found.items()}


def _gradient(p: torch.Tensor) -> torch.Tensor:
    """The parameter's gradient: zeros where no row had a valid step, so that it was never used."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def element(name: str, expression: str) -> dict[str, np.ndarray]:
    """A function of x (6, 5) and its gradient for an upstream gradient."""
    values, upstream = pair(name)
    x = torch.from_numpy(values).requires_grad_()
    y = eval(expression, {"torch": torch, "F": F, "x": x})
    (y * torch.from_numpy(upstream)).sum().backward()
    return {"y": y.detach().numpy(), "dx": x.grad.numpy()}


def loss(name: str, options: dict[str, Any], expression: str) -> dict[str, np.ndarray]:
    values, target = (torch.from_numpy(a) for a in pair(label(name, options)))
    values.requires_grad_()
    value = eval(expression, {"F": F, "p": values, "t": target})
    value.backward()
    return {"loss": value.detach().numpy(), "dp": values.grad.numpy()}


def updates(
    name: str, options: dict[str, Any], peer: str, peer_options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The weights after each of ten updates, (10, 7)."""
    start, gradients = descent(label(name, options))
    w = torch.from_numpy(start).requires_grad_()
    optimizer = getattr(torch.optim, peer)([w], **peer_options)
    path = []
    for g in gradients:
        w.grad = torch.from_numpy(g)
        optimizer.step()
        path.append(w.detach().numpy().copy())
    return {"path": np.array(path)}


def layer_norm() -> dict[str, np.ndarray]:
    """Layer normalisation of (4, 3, 9) with scale and shift, epsilon 1e-3 as in Keras."""
    draw = generator("layer_norm")
    x, dy = (torch.from_numpy(draw.standard_normal((4, 3, 9))) for _ in range(2))
    gamma, beta = (torch.from_numpy(draw.standard_normal(9)) for _ in range(2))
    leaves = [a.requires_grad_() for a in (x, gamma, beta)]
    y = F.layer_norm(x, (9,), gamma, beta, eps=1e-3)
    (y * dy).sum().backward()
    return {"y": y.detach().numpy(), **{f"d{k}": a.grad.numpy() for k, a in enumerate(leaves)}}


def train() -> dict[str, np.ndarray]:
    """Thirty full-batch Adam steps on mean squared error: the losses, and every weight at the end."""
    t = training()
    s = Sequence("lstm", 12, 16, 3, 8, "full")
    module, dense = _module(s, t, torch.float64), torch.nn.Linear(8, 1, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(t["dense"].T.copy()))
        dense.bias.zero_()
    module.bias_hh_l0.requires_grad_(False)
    parameters = [p for p in (*module.parameters(), *dense.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01, eps=EPSILON)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = F.mse_loss(dense(module(torch.from_numpy(t["x"]))[0][:, -1]), torch.from_numpy(t["y"]))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    names = ("kernel", "recurrent_kernel", "bias", "dense", "dense_bias")
    weights = [p.detach().numpy().T for p in parameters]
    return {"losses": np.array(losses), **dict(zip(names, weights, strict=True))}


__all__ = ["LOSSES", "OPTIMIZERS", "element", "layer_norm", "loss", "sequence", "train", "updates"]
