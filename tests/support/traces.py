"""Networks whose divergence is known, their Jacobians, and what a run keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.velocity_nets import Attention, Convolutions, Film, Residual, TimeMLP, Unknown

F64 = torch.float64
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two hidden layers": (lambda: TimeMLP(5, 7, 2), (4, 5)),
    "one hidden layer": (lambda: TimeMLP(5, 7, 1, nn.Tanh), (4, 5)),
    "three hidden layers": (lambda: TimeMLP(5, 7, 3, nn.Softplus), (4, 5)),
    "film": (lambda: Film(5, 6), (4, 5)),
    "residual": (lambda: Residual(5, 6), (4, 5)),
    "convolutions": (lambda: Convolutions(1, 4), (3, 1, 4, 4)),
    "attention": (lambda: Attention(3, 4), (2, 5, 3)),
    "causal attention": (lambda: Attention(3, 4, True), (2, 5, 3)),
    "unknown": (lambda: Unknown(4), (3, 4)),
}
# Each by the function that it begins with.
FIRST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: Convolutions(3, 6), (4, 3, 4, 4)),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48)), (4, 48)),
    "activation": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(48, 48)), (4, 48)),
    "tokens": (lambda: Attention(8, 6), (4, 6, 8)),
    "linear": (lambda: Residual(48, 7), (4, 48)),
}


def case(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETS[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)


def jacobians(net: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    """`[B, D, D]`, differentiable."""

    def one(xi: Tensor, ti: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(  # type: ignore[no-any-return]
            lambda y: net(y[None], ti[None])[0].flatten(), xi, create_graph=True
        ).flatten(1)

    return torch.stack([one(xi, ti) for xi, ti in zip(x, t, strict=True)])


def saved(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `run` returns, and what it keeps for backward, once for each storage."""
    seen: dict[int, Tensor] = {}

    def pack(z: Tensor) -> Tensor:
        seen.setdefault(z.untyped_storage().data_ptr(), z)
        return z

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        out = run()
    return out, list(seen.values())
