"""Two processes that train copies of one network: what each gets against plain autograd's mean.

`python ranks.py RANK FOLDER` runs all cases and writes `RANK.pt`, what each has found.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

import fewstep
from fewstep.methods.reflow import MarginalReflow

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


def derivatives(**options: Any) -> Loss:
    """MeanFlow's, with gradients through the target if options say so."""

    def loss(network: Callable[..., Tensor], x: Tensor) -> Tensor:
        t, v = torch.full_like(x[:, 0], 0.3), x.flip(0).cos()
        out = fewstep.jvp(network, (x, t), (v, 1.0), **options)
        return (out.value - v + 0.2 * out.tangent).square().mean()  # type: ignore[no-any-return]

    return loss


def reflow(velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
    method = MarginalReflow(windows=2, solver_steps=1, lam=0.5)
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
    for _engine in ("duals", "func", "reverse"):
        for _through in (False, True):
            CASES[f"ddp, {_name}, jvp by {_engine}, through {_through}"] = (
                lambda rank, o=_options, e=_engine, g=_through: trained(
                    rank,
                    derivatives(engine=e, through=g),
                    lambda net: DistributedDataParallel(net, **o),
                )
            )
    CASES[f"ddp, {_name}, MarginalReflow"] = lambda rank, o=_options: trained(
        rank, reflow, lambda net: DistributedDataParallel(net, **o)
    )


def sharded(layers: bool, reshard: bool, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(net: nn.Module) -> nn.Module:
        options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
        options["reshard_after_forward"] = reshard
        if layers:
            for m in (*net.first, *net.middle, net.last):  # type: ignore[misc]
                if list(m.parameters()):
                    fully_shard(m, **options)
        return fully_shard(net, **options)

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
        for _engine in ("duals", "func", "reverse"):
            for _through in (False, True):
                CASES[f"{_name}, jvp by {_engine}, through {_through}"] = (
                    lambda rank, a=_layers, b=_reshard, e=_engine, g=_through: trained(
                        rank, derivatives(engine=e, through=g), sharded(a, b)
                    )
                )
        CASES[f"{_name}, MarginalReflow"] = lambda rank, a=_layers, b=_reshard: trained(
            rank, reflow, sharded(a, b)
        )


class Holder:
    """What a training script has: a student, and others that no trace calls."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.critic = DistributedDataParallel(nn.Linear(4, 1).double())
        self.encoder = sharded(True, True)(network())

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return 2 * self.student(x, t) - x


def hidden(net: nn.Module) -> Callable[..., Tensor]:
    """Deeper in what a function closes over than anyone looks."""
    boxes: Any = [[[[[[[net]]]]]]]
    return lambda x, t: boxes[0][0][0][0][0][0][0](x, t)


REACH: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "method": lambda net: Holder(net).velocity,
    "function": lambda net: lambda x, t: net(x, t) + net(-x, t).detach(),
    "hidden": hidden,
}
for _name in ("plain", "static graph", "unused"):
    for _reach, _of in REACH.items():

        def _run(rank: int, o: Any = DDP[_name], of: Any = _of) -> float:
            plain_of = of if of is not REACH["method"] else (lambda n: lambda x, t: 2 * n(x, t) - x)

            def loss(velocity: Any, x: Tensor) -> Tensor:
                own = velocity if isinstance(velocity, Net) else None
                return traces(estimator="exact")(plain_of(own) if own else velocity, x)

            return trained(rank, loss, lambda net: DistributedDataParallel(net, **o), of)

        CASES[f"ddp, {_name}, {_reach}"] = _run


def both(velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A plain loss before and after a trace."""
    t = torch.tensor(0.3)
    before = velocity(x, t).sin().mean()
    value = traces(estimator="hutchinson")(velocity, velocity(x, t))
    return before + value + velocity(2 * x, t).square().mean()


for _name, _wrap in {
    "ddp, plain": lambda net: DistributedDataParallel(net),
    "ddp, static graph": lambda net: DistributedDataParallel(net, static_graph=True),
    "ddp, unused": lambda net: DistributedDataParallel(net, find_unused_parameters=True),
    "fsdp, layers, reshard": sharded(True, True),
    "fsdp, root, reshard": sharded(False, True),
}.items():
    CASES[f"{_name}, beside plain losses"] = lambda rank, w=_wrap: trained(rank, both, w)
    CASES[f"{_name}, no rule"] = lambda rank, w=_wrap: trained(
        rank, traces(estimator="exact"), w, activation=nn.ELU
    )


class Partly(Net):
    """A parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


@case("ddp, unused, spare parameter")
def spare(rank: int) -> float:
    net = Partly().double()
    ddp = DistributedDataParallel(copy.deepcopy(net), find_unused_parameters=True)
    for engine in ("duals", "func", "reverse"):
        loss, x = traces(estimator="hutchinson", engine=engine), batch(rank, 0)
        loss(net, x).backward()
        loss(ddp, x).backward()
    return off(gradients(ddp), mean_over_ranks(gradients(net)))


@case("ddp, no_sync")
def accumulated(rank: int) -> float:
    net, loss = network(), traces(estimator="exact")
    ddp = DistributedDataParallel(copy.deepcopy(net))
    for step in range(3):
        loss(net, batch(rank, step)).backward()
        with contextlib.nullcontext() if step == 2 else ddp.no_sync():
            loss(ddp, batch(rank, step)).backward()
    return off(gradients(ddp), mean_over_ranks(gradients(net)))


@case("fsdp, no gradient sync")
def accumulated_shards(rank: int) -> float:
    net, loss = network(), traces(estimator="exact")
    own: Any = sharded(True, True)(copy.deepcopy(net))
    for step in range(3):
        loss(net, batch(rank, step)).backward()
        own.set_requires_gradient_sync(step == 2)
        loss(own, batch(rank, step)).backward()
    return off(gradients(own), mean_over_ranks(gradients(net)))


@case("ddp, hook")
def compressed(rank: int) -> float:
    def wrap(net: nn.Module) -> nn.Module:
        ddp = DistributedDataParallel(net)
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)
        return ddp

    return trained(rank, traces(estimator="exact"), wrap)


@case("ddp, rank 0 alone")
def alone(rank: int) -> float:
    ddp = DistributedDataParallel(network(), broadcast_buffers=False)
    holder = Holder(ddp.module)
    if rank == 0:
        fewstep.divergence(holder.velocity, batch(0, 0), 0.3)
        with torch.no_grad():
            fewstep.divergence(ddp, batch(0, 0), 0.3)
    fewstep.divergence(ddp, batch(rank, 0), 0.3).value.mean().backward()
    found = gradients(ddp)
    return off(found, mean_over_ranks([g.clone() for g in found]))


@case("ddp, empty batch")
def empty(rank: int) -> float:
    ddp = DistributedDataParallel(network())
    out = fewstep.divergence(ddp, batch(rank, 0, rows=3 * rank), 0.3)
    (out.value.sum() + out.velocity.sum()).backward()
    found = gradients(ddp)
    return off(found, mean_over_ranks([g.clone() for g in found]))


@case("fsdp, without gradients")
def values(rank: int) -> float:
    net, x = network(), batch(rank, 0)
    own = sharded(True, True)(copy.deepcopy(net))
    options: dict[str, Any] = {"estimator": "hutchinson", "fresh": False}
    with torch.no_grad():
        want, found = (
            fewstep.log_density(n, x, times=[0.0, 0.5, 1.0], **options) for n in (net, own)
        )
    if {type(p).__name__ for p in own.parameters()} != {"DTensor"}:
        return float("inf")  # weights are still whole
    return off([found.log_prob], [want.log_prob])


@case("rough: fsdp, mixed precision")
def mixed(rank: int) -> float:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    net, loss = network().float(), traces(estimator="exact")
    own = sharded(True, True, mp_policy=policy)(copy.deepcopy(net))
    for n in (net, own):
        loss(n, batch(rank, 0).float()).backward()
    return off(gradients(own), mean_over_ranks(gradients(net)))


class Moody(Net):
    """Looks at values on one rank."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        return -out if dist.get_rank() and bool(out.sum() > 1e9) else out


for _name, _wrap in {"ddp": DistributedDataParallel, "fsdp": sharded(True, True)}.items():

    def _ways(rank: int, w: Any = _wrap) -> str:
        net, loss = w(Moody().double()), traces(estimator="hutchinson")
        loss(net, batch(rank, 0)).backward()
        return fewstep.divergence(net, batch(rank, 1), 0.3, estimator="hutchinson").info

    CASES[f"says: {_name}, one rank refuses"] = _ways
    CASES[f"says: {_name}, one rank raises"] = lambda rank, w=_wrap: said(
        traces(engine="duals"), w(Moody().double()), rank
    )


def said(loss: Loss, velocity: Callable[..., Tensor], rank: int) -> str:
    try:
        loss(velocity, batch(rank, 0)).backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@case("says: fsdp, hidden")
def unseen(rank: int) -> str:
    return said(traces(estimator="exact"), hidden(sharded(False, False)(network())), rank)


@case("says: others")
def others(rank: int) -> list[str]:
    first = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    half = DistributedDataParallel(network())
    half.mixed_precision = object()
    return [said(traces(), net, rank) for net in (first, replicate(network()), half)]


@case("says: fsdp, gradients of gradients")
def second(rank: int) -> str:
    def loss(velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
        x.requires_grad_()
        value = fewstep.divergence(velocity, x, 0.3).value
        return torch.autograd.grad(value.sum(), x, create_graph=True)[0].square().sum()

    return said(loss, sharded(True, True)(network()), rank)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", RuntimeWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({name: run(rank) for name, run in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
