"""Rules where the batch is moved to another axis, or merged with one, and back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewstep
from fewstep.ops.dual.jvp import by_duals
from fewstep.ops.dual.source import Source
from fewstep.ops.dual.traced import UnsupportedError
from support.jvp import right
from support.rules import F64, V, W, check

# Of torch.func.jvp, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
Function = Callable[[Tensor], Tensor]
S = torch.tensor([0.3, 1.2, -0.4], dtype=F64)  # of each sample
PAIR = torch.stack([W, W.T])


def attended(h: Tensor) -> Tensor:
    """With heads in the batch and the sequence first."""
    q = h.view(3, 2, 2).transpose(0, 1).reshape(2, 3 * 2, 1).transpose(0, 1)
    p = torch.baddbmm(q @ q.mT, q, q.transpose(-2, -1), beta=0.1).softmax(-1)
    out = torch.bmm(p, q).transpose(0, 1).contiguous().view(2 * 3, 2)
    return F.linear(out, W[:2, :2]).view(2, 3, 2).transpose(0, 1).flatten(1)


MOVED: dict[str, Function] = {
    "transpose": lambda h: (h.T.tanh() * V[:, None] + S).T,
    "rows": lambda h: F.linear(h.view(3, 2, 2).transpose(0, 1), W[:2, :2]).permute(1, 0, 2),
    "movedim": lambda h: h.view(3, 2, 2).movedim(0, 2).cos().movedim(-1, 0),
    "moveaxis": lambda h: h.view(3, 2, 2).moveaxis((0, 1), (2, 0)).square().permute(2, 0, 1),
    "unbind": lambda h: sum(torch.stack([h, h.sin(), h * h]).unbind()),  # type: ignore[arg-type,return-value]
    "reduced": lambda h: torch.stack([h, h.sin()]).sum(0) * torch.stack([h, h * h]).mean(0),
    "softmax": lambda h: (h.T.softmax(0) * F.softmax(h.T, dim=0)).T,
    "var": lambda h: h.T.var(0)[:, None] + (h.T - h.T.amax(0, keepdim=True)).T,
    "sorted": lambda h: h.T.sort(0)[0].T * h.T.argmax(0)[:, None] + h.T.topk(1, 0)[0].T,
    "layer_norm": lambda h: F.layer_norm(h.view(3, 2, 2).transpose(0, 1), (2,)).transpose(0, 1),
    "attention": attended,
    "SDPA": lambda h: F.scaled_dot_product_attention(
        *(h.view(3, 2, 2, 1).permute(1, 0, 2, 3),) * 3
    ).movedim(1, 0),
    "both": lambda h: h.T.mul(h.sin().T).add(h.T, alpha=2).T,
    "ensemble": lambda h: torch.einsum("bi,kij->kbj", h, PAIR).tanh().mean(0),
    "ensemble by bmm": lambda h: torch.bmm(h.expand(2, 3, 4), PAIR).sin().sum(0),
    "ensemble by matmul": lambda h: (h[None].repeat(2, 1, 1) @ PAIR).unbind(0)[1],
    "matrix first": lambda h: (W @ h.T).tanh().T,
    "guidance": lambda h: torch.lerp(*F.linear(torch.cat([h, h * h]), W).tanh().chunk(2), 1.5),
    "guidance by splits": lambda h: torch.add(*torch.cat([h, V.expand(3, 4)]).sin().split(3)),
    "guidance with terms": lambda h: (
        (torch.cat([h, -h]) + torch.arange(6.0, dtype=F64)[:, None]).sin().view(2, 3, 4).sum(0)
    ),
    "pictures": lambda h: F.conv1d(
        torch.cat([h, h.cos()]).view(6, 2, 2), W[:2, :2, None]
    ).unflatten(0, (2, 3))[0],
    "repeat": lambda h: (h.repeat(2, 1).sin() * h.repeat(2, 2)[:, :4]).view(2, 3, 4).mean(0),
    "tile": lambda h: h.tile((2, 1, 1)).sin()[0] + h.tile((2, 1)).cos().view(2, 3, 4)[1],
    "repeat_interleave": lambda h: h.repeat_interleave(2, 0).sin().view(3, 2, 4).sum(1),
    "merged behind": lambda h: h.view(3, 2, 2).transpose(0, 1).reshape(6, 2).sin().view(2, 3, 2)[0],
    "indices": lambda h: h[None][:, :, [1, 0, 3, 2]][0] * h.T[1:, None, ..., None][0, 0],
    "where": lambda h: torch.where(W[:, :3] > 0, h.T, h.T.square()).T,
    "where by value": lambda h: torch.where(h.T > 0, h.T, 0.1).masked_fill(W[:, :3] > 0.5, 2).T,
    "cat": lambda h: torch.cat([h.T, W[:, :3], h.T.sin()], 0).view(3, 4, 3).sum(0).T,
    "roll": lambda h: h.T.flip(0).T * h.unsqueeze(0).transpose(1, 2).squeeze(0).T,
    "steps": lambda h: (h.T * h.T.sign() + torch.zeros_like(h.T) + h.T.new_ones(4, 3)).T,
    "in place": lambda h: F.relu(h.view(3, 2, 2).transpose(0, 1).mul(2), inplace=False)[0],
    "expand": lambda h: h.expand(2, 3, 4)[1] + h.T.expand(2, -1, -1).sum(0).T,
    "pad": lambda h: F.pad(h.view(3, 2, 2).transpose(0, 1), (1, 0))[..., 1:].transpose(0, 1),
    "dtype": lambda h: h.T.double().to(V).T + h.T.contiguous().clone().T,
}


@pytest.mark.parametrize("name", MOVED)
def test_rule(name: str) -> None:
    f = MOVED[name]

    def row(h: Tensor) -> Tensor:
        out = f(h)
        return out if out.numel() == h.numel() else out.reshape(3, -1).repeat(1, 2)[:, :4]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check(row, (3, 4), 1e-10)


def steps(r: random.Random, h: Any, other: Tensor) -> Any:
    """Some step that shapes allow; whether rules do is what is tested."""
    n = h.ndim
    dim = r.randrange(-n, n)
    kind = r.randrange(16)
    if kind == 0:
        return h.permute(r.sample(range(n), n))
    if kind == 1:
        return h.transpose(dim, r.randrange(n))
    if kind in (2, 3):
        sizes, left = [], h.numel()
        while left > 1 and len(sizes) < 3:
            sizes.append(r.choice([d for d in range(1, left + 1) if left % d == 0]))
            left //= sizes[-1]
        return h.reshape(*sizes, left)
    if kind == 4 and n < 5:
        return h.unsqueeze(dim)
    if kind == 5 and n > 1 and h.shape[dim] == 1:
        return h.squeeze(dim)
    if kind == 6 and n < 5:
        return torch.stack([h, h.sin()], dim)
    if kind == 7:
        return torch.cat([h, h.cos()], dim)
    if kind == 8:
        return h.chunk(2, dim)[0]
    if kind == 9 and n > 1:
        return h.sum(dim) if r.random() < 0.5 else h.unbind(dim)[-1]
    if kind == 10:
        return h.softmax(dim) if r.random() < 0.5 else h.flip(dim)
    if kind == 11:
        return torch.tanh(h) * other[: h.shape[-1]]
    if kind == 12:
        shape = [s if r.random() < 0.6 else 1 for s in h.shape[r.randrange(n) :]]
        return h * (1 + torch.arange(float(torch.Size(shape).numel()), dtype=F64).view(shape))
    if kind == 13 and n > 1:
        index = [slice(None)] * n
        index[dim] = r.choice([0, slice(0, None, 2), None, torch.tensor([0, -1])])
        return h[tuple(index)]
    if kind == 14 and n > 2:
        return h @ h.mT
    if kind == 15:
        return h.repeat(*(r.choice([1, 1, 2]) for _ in range(n)))
    return h + h.sin()


@pytest.mark.parametrize("first", range(0, 1200, 100))
def test_random_steps_are_right_or_refused(first: int) -> None:
    served = 0
    for seed in range(first, first + 100):
        sizes = random.Random(seed)
        shape = tuple(sizes.choice([1, 2, 2, 3, 4]) for _ in range(sizes.choice([2, 3, 3, 4])))
        x = torch.sin(1 + torch.arange(float(torch.Size(shape).numel()), dtype=F64)).view(shape)
        other = torch.linspace(0.5, 2, 512, dtype=F64)

        def f(h: Any, seed: int = seed, other: Tensor = other) -> Any:
            r = random.Random(seed)
            for _ in range(6):
                if h.numel() > 512:
                    break
                h = steps(r, h, other)
            return h

        u = x.cos()
        for constant in (True, False):
            source = Source("reference", 1, constant=constant)
            try:
                _, ((value, tangent),) = by_duals(f, (x,), (u[None],), {}, source, expand=False)
            except UnsupportedError:
                continue
            served += 1
            exact, along = torch.func.jvp(f, (x,), (u,))
            assert tangent is not None
            torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(tangent[0], along, rtol=1e-10, atol=1e-10)
    assert served > 40


def test_batches_elsewhere_in_what_is_returned() -> None:
    x = torch.randn(3, 4, dtype=F64)
    out = right(lambda x: x.T.sin(), (x,), (x.cos(),))
    assert out.engine == "duals"
    several = torch.stack([x, x.sin()])
    found = fewstep.jvp(lambda x: torch.cat([x * x, x]), (x,), (several,))
    torch.testing.assert_close(found.tangent, torch.cat([2 * x * several, several], 1))
