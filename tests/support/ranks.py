"""Two processes that train copies of one network: what each gets against plain autograd's mean.

`python ranks.py RANK FOLDER` runs all cases and writes `RANK.pt`, what each has found.
"""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fewstep

WAYS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "probes": {"estimator": "hutchinson", "probes": 2},
    "func": {"estimator": "hutchinson", "probes": 2, "engine": "func"},
    "reverse": {"estimator": "hutchinson", "probes": 2, "engine": "reverse"},
}
Case = Callable[[int], Any]
CASES: dict[str, Case] = {}


class Net(nn.Module):
    """Two blocks beside each other in a chain, and a buffer."""

    def __init__(self, d: int = 4, width: int = 6, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(d, width), activation())
        self.middle = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), activation())
        self.last = nn.Linear(width, d)
        self.register_buffer("rate", torch.ones(width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) * self.rate
        return self.last(h + self.middle(h))  # type: ignore[no-any-return]


def case(name: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[name] = function
        return function

    return add


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**options).double()


def batch(rank: int, step: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(10 * step + rank)).double()


Loss = Callable[[Callable[..., Tensor], Tensor], Tensor]


def traces(**options: Any) -> Loss:
    def loss(velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
        out = fewstep.divergence(velocity, x, 0.3, **options)
        return out.value.mean() + out.velocity.square().mean()

    return loss


def densities(**options: Any) -> Loss:
    def loss(velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
        return fewstep.log_density(velocity, x, times=[0.0, 0.5, 1.0], **options).log_prob.mean()

    return loss


def reflow(velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
    method = fewstep.MarginalReflow(windows=2, solver_steps=1, lam=0.5)
    generator = torch.Generator().manual_seed(1)
    return method(velocity, lambda x, t: -x, x, generator=generator)[0]


def gradients(net: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in net.parameters()]
    full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return [torch.empty(0) if g is None else g.clone() for g in full]


def mean_over_ranks(grads: list[Tensor]) -> list[Tensor]:
    for g in grads:
        dist.all_reduce(g)
    return [g / dist.get_world_size() for g in grads]


def off(found: list[Tensor], want: list[Tensor]) -> float:
    a, b = (torch.cat([g.flatten() for g in own]) for own in (found, want))
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("inf")


def trained(
    rank: int,
    loss: Loss,
    wrap: Callable[[nn.Module], nn.Module],
    reach: Callable[[nn.Module], Callable[..., Tensor]] = lambda m: m,
    *,
    steps: int = 2,
    **options: Any,
) -> float:
    """The largest relative error of a gradient over some steps."""
    plain = network(**options)
    wrapped = wrap(copy.deepcopy(plain))
    errors = []
    for step in range(steps):
        plain.zero_grad(), wrapped.zero_grad()
        x = batch(rank, step)
        loss(plain, x).backward()
        loss(reach(wrapped), x).backward()
        errors.append(off(gradients(wrapped), mean_over_ranks(gradients(plain))))
        for net in (plain, wrapped):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(0.9)
    return max(errors)


DDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True, "broadcast_buffers": False},
}
for _name, _options in DDP.items():
    for _way, _own in WAYS.items():
        CASES[f"ddp, {_name}, {_way}"] = lambda rank, o=_options, w=_own: trained(
            rank, traces(**w), lambda net: DistributedDataParallel(net, **o)
        )
    CASES[f"ddp, {_name}, log_density"] = lambda rank, o=_options: trained(
        rank, densities(estimator="exact"), lambda net: DistributedDataParallel(net, **o)
    )
    CASES[f"ddp, {_name}, logdet"] = lambda rank, o=_options: trained(
        rank, densities(tracker="logdet"), lambda net: DistributedDataParallel(net, **o)
    )
    CASES[f"ddp, {_name}, MarginalReflow"] = lambda rank, o=_options: trained(
        rank, reflow, lambda net: DistributedDataParallel(net, **o)
    )


def sharded(layers: bool, reshard: bool) -> Callable[[nn.Module], nn.Module]:
    def wrap(net: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if layers:
            for m in (*net.first, *net.middle, net.last):  # type: ignore[misc]
                if list(m.parameters()):
                    fully_shard(m, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(net, mesh=mesh, reshard_after_forward=reshard)

    return wrap


for _layers in (False, True):
    for _reshard in (False, True):
        _name = f"fsdp, {'layers' if _layers else 'root'}, {'reshard' if _reshard else 'keep'}"
        for _way, _own in WAYS.items():
            CASES[f"{_name}, {_way}"] = lambda rank, a=_layers, b=_reshard, w=_own: trained(
                rank, traces(**w), sharded(a, b)
            )
        CASES[f"{_name}, log_density"] = lambda rank, a=_layers, b=_reshard: trained(
            rank, densities(estimator="exact"), sharded(a, b)
        )
        CASES[f"{_name}, MarginalReflow"] = lambda rank, a=_layers, b=_reshard: trained(
            rank, reflow, sharded(a, b)
        )


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    for name, run in CASES.items():
        if only not in name:
            continue
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                out = run(rank)
            except Exception as error:
                out = f"{type(error).__name__}: {error}"
                if only: traceback.print_exc()
        found[name] = out, [str(w.message) for w in told]
        if rank == 0: print(name, out, flush=True)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
