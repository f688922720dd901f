"""Steps of W-Flow and of drifting over the ranks of a process group, in float64, under DDP.

`support.processes.of_processes` runs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.baselines import Drifting
from fewstep.methods import LinesMatching, WFlow

Saved = dict[str, Any]
G, N, M, U, Z = 6, 12, 9, 6, 4
LOSSES: dict[str, Any] = {
    "split": WFlow(eps=(0.05, 0.2)),
    "summed": WFlow(eps=0.05, normalize=False, reduction="sum", micro_batches=3),
    "by distribution": WFlow(eps=0.1, guide="distribution"),
    "joint": WFlow(eps=0.1, form="joint", resample=False),
    "per group": WFlow(eps=0.1, per_group=True),
    "little memory": WFlow(eps=(0.1, 0.3), memory_limit=6000),
    "drifting": Drifting(),
    "drifting, resampled": Drifting(tau=0.1, resample=True, memory_limit=6000, micro_batches=2),
    "drifting, per group": Drifting(per_group=True),
}
KINDS = ("groups", "points", "one group", "vectors", "guided")


class Generator(nn.Module):
    """Images `[B, 2, 2, 3]` of noise, classes and scales."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(Z, 12, dtype=torch.float64)
        self.classes = nn.Embedding(G, 12, dtype=torch.float64)

    def forward(
        self, noise: Tensor, labels: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        out = self.noise(noise).tanh()
        if labels is not None:
            out = out + self.classes(labels)
        if scale is not None:
            out = out * scale[:, None]
        return out.reshape(-1, 2, 2, 3)


def features(x: Tensor) -> dict[str, Tensor]:
    """Maps, tokens and vectors."""
    return {"maps": x, "tokens": x.flatten(2), "vectors": x.flatten(1).sin()}


def share(t: Tensor, rank: int, world: int, axis: int, even: bool) -> Tensor:
    """A rank's part along an axis; uneven ones differ by two and more."""
    n = t.shape[axis]
    ends = [n * r // world for r in range(world + 1)]
    if not even:
        ends[1] -= 1
    return t.narrow(axis, ends[rank], ends[rank + 1] - ends[rank])


def step(name: str, kind: str, rank: int = 0, world: int = 1, group: Any = None) -> Saved:
    """Loss, metrics and gradient of a step, as DDP has them."""
    rng = torch.Generator().manual_seed(len(name))
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    groups = 1 if kind == "one group" else G
    noise, real = draw(2, groups, N, Z), draw(groups, N, 2, 2, 3)
    away, labels, scale = draw(groups, U, 2, 2, 3), torch.arange(groups), 1 + draw(groups).abs()
    inputs: dict[str, Any] = {"process_group": group}
    if kind != "groups" and world > 1:
        noise, real = share(noise, rank, world, 2, False), share(real, rank, world, 1, False)
        away = share(away, rank, world, 1, False)
        inputs["ranks_hold"] = None if kind == "one group" else "points"
    elif world > 1:
        noise, real = share(noise, rank, world, 1, False), share(real, rank, world, 0, False)
        away, labels = share(away, rank, world, 0, False), share(labels, rank, world, 0, False)
        scale, inputs["ranks_hold"] = share(scale, rank, world, 0, False), "groups"
    torch.manual_seed(0)
    net: nn.Module = Generator()
    if world > 1:
        net = DistributedDataParallel(net)
    if kind != "vectors":
        inputs["features"] = features
    if kind == "guided":
        inputs |= {"uncond": away, "scale": scale}
    loss, metrics = LOSSES[name](net, noise, real, labels, **inputs)
    loss.backward()
    value = loss.detach().clone()
    if world > 1:
        dist.all_reduce(value)
        value /= world
    grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    return {"loss": value, "gradient": torch.cat(grads), **metrics}


def cases() -> list[tuple[str, str]]:
    return [
        (name, kind)
        for name in LOSSES
        for kind in KINDS
        if kind in ("groups", "guided") or name in ("split", "per group", "drifting")
    ]


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int, group: Any) -> dict[str, str]:
    """What each rank says of calls that are wrong, on this one or on another."""
    last = rank == 1
    net = Generator()

    def call(noise: tuple[int, ...] = (2, G, 3, Z), real: int = 3, **more: Any) -> Any:
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        flow = more.pop("flow", WFlow())
        options = {"process_group": group, "ranks_hold": "groups", "features": features} | more
        images = draw(noise[1], real, 2, 2, 3)
        return flow(net, draw(*noise), images, torch.arange(noise[1]) % G, **options)

    def narrow(x: Tensor) -> dict[str, Tensor]:
        return {"maps": x[:, :1] if last else x}

    def broken(x: Tensor) -> Tensor:
        return x.flatten(1)[: 2 if last else len(x)]

    calls: dict[str, Callable[[], object]] = {
        "unsaid": lambda: call(ranks_hold=None),
        "hold": lambda: call(ranks_hold="rows"),
        "both": lambda: call(ranks_hold="points" if last else "groups"),
        "alone": lambda: call(process_group=None),
        "object": lambda: call(process_group="gloo"),
        "no data": lambda: call((2, G, 0 if last else 3, Z)),
        "no groups": lambda: call((2, 0 if last else G, 3, Z)),
        "points": lambda: call((2, G, 4 if last else 3, Z), 4 if last else 3),
        "real": lambda: call(real=4 if last else 3, flow=Drifting()),
        "groups": lambda: call((2, G - last, 3, Z), ranks_hold="points"),
        "channels": lambda: call(features=narrow),
        "features": lambda: call(features=broken),
        "scale": lambda: call(scale=0.5 if last else 1.0),
        "uncond": lambda: call(uncond=torch.randn(G, 2, 2, 2, 3).double() if last else None),
    }
    found = {name: said(run) for name, run in calls.items()}
    found["after"] = said(call)
    return found


def adaptive(rank: int = 0, world: int = 1, group: Any = None) -> Tensor:
    """The weight of the adversarial part of `LinesMatching`, of a batch that ranks share."""
    rng = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 12, 5, generator=rng, dtype=torch.float64)
    x0, x1 = (share(t, rank, world, 0, True) for t in (x0, x1))
    net = nn.Linear(5, 5, dtype=torch.float64)
    nn.init.constant_(net.weight, 0.3)
    nn.init.zeros_(net.bias)
    _, metrics = LinesMatching(levels=3, indices=(0,), augment=())(
        lambda x, sigma: net(x) / sigma[:, None].to(x.dtype),
        x0,
        x1,
        discriminator=lambda x: x.square().sum(1),
        last_layer=net.weight,
        generator=rng,
        sample_ids=share(torch.arange(12), rank, world, 0, True),
        process_group=group,
    )
    return metrics["lam"]


def find(rank: int, world: int, group: Any) -> Saved:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for flow in (WFlow(), Drifting()):
            flow(Generator(), torch.randn(2, 8, Z).double(), torch.randn(8, 12).double())
    found: Saved = {"warnings": [str(w.message) for w in caught]}
    for name, kind in cases():
        found[f"{name}, {kind}"] = step(name, kind, rank, world, group)
    found["adaptive"] = adaptive(rank, world, group)
    warnings.simplefilter("ignore")
    found["refusals"] = refusals(rank, group)
    return found


if __name__ == "__main__":
    from processes import serve

    serve(find)
