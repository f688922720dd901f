"""Transport over the ranks of a process group: what each of some processes has of a problem.

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

import fewstep

Options = dict[str, Any]
Saved = dict[str, Any]
N, M, D = 61, 38, 3
DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Of `sinkhorn` and `sinkhorn_divergence`; "init" and "weights" stand for tensors.
TRANSPORT: dict[str, Options] = {
    "plain": {"eps": 0.05, "max_iter": 20},
    "to a tolerance": {"eps": 0.05, "tol": 1e-4, "weights": True},
    "annealed": {"eps": 0.02, "anneal": 0.5, "tol": 1e-4},
    "annealed by temperatures": {"eps": 0.05, "anneal": [2.0, 0.5], "max_iter": 9, "weights": True},
    "reach": {"eps": 0.05, "reach": (0.6, 0.9), "max_iter": 20, "weights": True},
    "reach of y": {"eps": 0.05, "reach": (None, 0.5), "tol": 1e-4},
    "warm": {"eps": 0.05, "init": True, "max_iter": 7},
    "automatic eps": {"eps": "auto", "tol": 1e-4, "weights": True},
    "euclidean": {"eps": 0.05, "cost": "euclidean", "tol": 1e-4},
    "l1": {"eps": 0.1, "cost": "l1", "max_iter": 30},
    "dot": {"eps": 0.1, "cost": "dot", "max_iter": 30},
    "far": {"eps": 0.1, "max_iter": 9, "far": 40.0},  # sums of columns underflow at first
    "mass dropped": {"eps": 0.05, "reach": 0.3, "max_iter": 9, "far": 0.5},
    "flat": {"eps": 2e3, "max_iter": 9, "weights": True},
    "reference": {"eps": 0.05, "backend": "reference", "tol": 1e-4, "weights": True},
    "reference, far": {"eps": 0.1, "backend": "reference", "max_iter": 9, "far": 40.0},
}
DRIFTS: dict[str, Options] = {
    "split": {"eps": [0.1, 0.4]},
    "guided": {"eps": 0.1, "uncond": True, "guidance": 0.3, "weights": True},
    "joint": {"eps": [0.1, 0.4], "form": "joint", "uncond": True, "guidance": 0.3},
    "one batch": {"eps": 0.1, "exclude_diagonal": True},
    "euclidean": {"eps": 0.1, "cost": "euclidean"},
    "scaled": {"eps": [0.1, 0.4], "normalize": "scale"},
    "raw": {"eps": 0.4, "normalize": False},
    "one group": {"eps": [0.1, 0.4], "uncond": True, "guidance": 0.3, "weights": True},
}


def part(t: Tensor, rank: int, world: int, axis: int = 0) -> Tensor:
    """An uneven share: a single point of the first rank."""
    n = t.shape[axis]
    ends = [*[0, 1, n // 2][:world], n]
    return t.narrow(axis, ends[rank], ends[rank + 1] - ends[rank])


def problem(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Options]:
    """Tensors and options of a transport case, of all ranks."""
    generator = torch.Generator().manual_seed(len(name))
    draw = lambda *shape: torch.rand(*shape, generator=generator).to(dtype)  # noqa: E731
    options = dict(TRANSPORT[name])
    x, y = draw(N, D), draw(M, D) + 0.2 + options.pop("far", 0.0)
    tensors = {"x": x, "y": y}
    if options.pop("weights", False):
        a, b = draw(N) + 0.1, draw(M) + 0.1
        a[4], b[3] = 0, 0
        a[9] *= 1e-5
        tensors |= {"a": a / a.sum(), "b": b / b.sum()}
    if options.pop("init", False):
        tensors |= {key: draw(n) / 9 for key, n in (("f", N), ("g", M), ("xx", N), ("yy", M))}
    return tensors, options


ROWS = {"x", "a", "f", "xx"}  # of which each rank has some


def solve(
    of: str, name: str, dtype: torch.dtype, rank: int = 0, world: int = 1, group: Any = None
) -> Saved:
    """What a transport case is, with its gradients."""
    tensors, options = problem(name, dtype)
    if world > 1:
        tensors = {k: part(t, rank, world) if k in ROWS else t for k, t in tensors.items()}
    leaves = {k: tensors[k].clone().requires_grad_() for k in ("x", "y", "a", "b") if k in tensors}
    if "f" in tensors:
        keys = ("f", "g") if of == "sinkhorn" else ("f", "g", "xx", "yy")
        options["init"] = tuple(tensors[key] for key in keys)
    out = getattr(fewstep, of)(**leaves, **options, process_group=group)
    grads = torch.autograd.grad(3 * out.value, list(leaves.values()))
    saved = {key: getattr(out, key) for key in ("value", "residual", "iterations", "converged")}
    saved |= {"eps": out.eps, "f": out.f, "g": out.g}
    saved |= {f"gradient of {key}": g for key, g in zip(leaves, grads, strict=True)}
    between = out if of == "sinkhorn" else out.xx
    saved |= {"plan": between.plan(), "barycenter": between.barycenter()}
    saved |= {"product": between.transport(between.g), "best": between.assignment()}
    return {key: t.detach() for key, t in saved.items()}


def drift(name: str, hold: str, rank: int = 0, world: int = 1, group: Any = None) -> Saved:
    """What a drift is in float64; ranks hold points of a group, or groups."""
    generator = torch.Generator().manual_seed(len(name))
    draw = lambda *shape: torch.rand(*shape, generator=generator).double()  # noqa: E731
    options, single = dict(DRIFTS[name]), DRIFTS[name].get("exclude_diagonal", False)
    x, y, x_self, uncond = (draw(5, n, D) for n in (17, 14, 12, 9))
    if name == "one group" and hold == "points":
        x, y, x_self, uncond = (t[:1] for t in (x, y, x_self, uncond))
    axis = 1 if hold == "points" else 0
    x_self, y = x if single else x_self, y + 0.5
    weights = [draw(len(x), t.shape[1]) for t in (y, x_self, uncond)]
    clouds = [x, y, x_self]
    if world > 1:
        clouds = [part(t, rank, world, axis) for t in clouds]
        clouds = [clouds[0], clouds[1], clouds[0]] if single else clouds
        uncond = part(uncond, rank, world, axis)
        weights = [part(t, rank, world, axis) for t in weights]
        options |= {"process_group": group, "ranks_hold": hold}
    if options.pop("uncond", False):
        options["uncond"] = uncond
    if options.pop("weights", False):
        options["weights"] = torch.cat(weights, 1)
    out = fewstep.sinkhorn_drift(*clouds, **options)
    names = ("velocity", "scale", "rms", "residual", "entropy", "peak")
    return {key: getattr(out, key) for key in names}


def step(rank: int, world: int, group: Any) -> Tensor:
    """The gradient of a generator in a step of a drifting model, under DDP where ranks share it."""
    torch.manual_seed(0)
    net: nn.Module = nn.Linear(2, D).double()
    z, z_self, y = (torch.randn(12, k).double() for k in (2, 2, D))
    if world > 1:
        net = DistributedDataParallel(net)
        z, z_self, y = (t[rank * 12 // world : (rank + 1) * 12 // world] for t in (z, z_self, y))
    x = net(z)
    with torch.no_grad():
        d = fewstep.sinkhorn_drift(x, y, net(z_self), eps=0.1, process_group=group)
    loss = (x / d.scale - (x / d.scale + d.velocity).detach()).square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def transported(rank: int, world: int, group: Any) -> Tensor:
    """The gradient of a generator for a divergence of all points, under DDP, which takes means."""
    torch.manual_seed(0)
    net: nn.Module = nn.Linear(2, D).double()
    z, y = torch.randn(13, 2).double(), torch.randn(9, D).double()
    if world > 1:
        net, z = DistributedDataParallel(net), part(z, rank, world)
    out = fewstep.sinkhorn_divergence(net(z), y, eps=0.5, tol=1e-6, process_group=group)
    (world * out.value).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int, group: Any) -> dict[str, str]:
    """What each rank says of calls that are wrong, on this one or on another."""
    x, y = torch.rand(4 + rank, D), torch.rand(6, D, generator=torch.Generator().manual_seed(0))
    last = rank == 1

    def solve(x: Any = x, y: Any = y, **more: Any) -> Any:
        return fewstep.sinkhorn(x, y, **{"eps": 0.3, "process_group": group} | more)

    calls: dict[str, Callable[[], object]] = {
        "no rows": lambda: solve(x[:0] if last else x),
        "columns": lambda: solve(y=y[:5] if last else y),
        "values": lambda: solve(y=y + 1 if last else y),
        "order": lambda: solve(y=y.flip(0) if last else y),
        "dtype": lambda: solve(x.double(), y.double()) if last else solve(),
        "eps": lambda: solve(eps=0.5 if last else 0.3),
        "tol": lambda: solve(tol=1e-3 if last else None),
        "anneal": lambda: solve(anneal=[1.0, 0.5] if last else 0.5),
        "init": lambda: solve(init=(x[:, 0], y[:, 0]) if last else None),
        "gradient": lambda: solve(y=y.clone().requires_grad_(last)),
        "mass": lambda: solve(a=torch.ones(4 + rank)),
        "weights": lambda: solve(a=torch.full((4 + rank,), -1.0 if last else 1.0)),
        "device": lambda: solve(x.to("meta"), y.to("meta")),
        "object": lambda: solve(process_group="gloo"),
        "labels": lambda: solve(labels=(x[:, 0].long(), y[:, 0].long()), label_cost=torch.eye(1)),
        "cu_seqlens": lambda: solve(cu_seqlens=(torch.tensor([0, 4]), torch.tensor([0, 6]))),
        "batch": lambda: solve(x[None]),
        "temperatures": lambda: solve(eps=[0.1, 0.3]),
        "update": lambda: solve(update="symmetric"),
        "relax": lambda: solve(relax=1.5),
        "diagonal": lambda: solve(exclude_diagonal=0),
        "C": lambda: solve(None, None, C=torch.rand(4, 6)),
        "function": lambda: solve(cost=lambda x, y: (x - y).abs().sum(-1)),
        "cosine": lambda: solve(cost="cosine"),
        "backend": lambda: solve(backend="triton"),
        "func": lambda: torch.func.grad(lambda t: solve(t).value)(x),
        "too small": lambda: solve(x.clone().requires_grad_(), eps=1e-9).value.backward(),
        "second": lambda: torch.autograd.grad(
            solve(t := x.clone().requires_grad_()).value, t, create_graph=True
        ),
    }
    result = solve()
    for name in ("potentials", "marginals", "cost", "entropy"):
        calls[name] = getattr(result, name)
    calls["sample"] = lambda: result.sample(3)
    calls["of columns"] = lambda: result.transport(result.f, axis=1)
    calls["implicit"] = lambda: result.barycenter(implicit=True)
    calls["permutation"] = lambda: result.assignment("permutation")
    groups = torch.rand(2, 4 + rank, D)
    drift: Callable[..., Any] = lambda x, **more: fewstep.sinkhorn_drift(  # noqa: E731
        x, x, x, **{"eps": 0.3, "process_group": group} | more
    )
    calls |= {
        "drift, unsaid": lambda: drift(groups),
        "drift, points": lambda: drift(groups, ranks_hold="groups"),
        "drift, groups": lambda: drift(groups[:1] if last else groups, ranks_hold="points"),
        "drift, eps": lambda: drift(x, eps=0.5 if last else 0.3),
        "drift, hold": lambda: drift(x, ranks_hold="rows"),
        "drift, alone": lambda: drift(x, ranks_hold="points", process_group=None),
        "drift, diagonal": lambda: drift(x, exclude_diagonal=1),
    }
    found = {name: said(call) for name, call in calls.items()}
    with torch.no_grad():
        found["after"] = said(lambda: solve(tol=1e-2))
    return found


def alone(rank: int) -> tuple[list[str], Saved, str]:
    """Warnings of calls without a group, and a group of one rank."""
    x, y = torch.rand(5, D), torch.rand(6, D)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fewstep.sinkhorn_drift(x, y, x, eps=0.3)
        fewstep.sinkhorn(x, y, eps=0.3)
    one = dist.new_group([0])
    found = Saved()
    message = ""
    if rank == 0:
        x.requires_grad_()
        whole, same = (fewstep.sinkhorn(x, y, eps=0.3, process_group=g) for g in (None, one))
        found = {"difference": (whole.value - same.value).detach(), "cost": same.cost().detach()}
        solve = lambda t: 2 * fewstep.sinkhorn(t, y, eps=0.3, process_group=one).value  # noqa: E731
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo looks at the .grad of what is no leaf
            compiled = torch.compile(solve, backend="eager")(x)  # type: ignore[no-untyped-call]
        found["compiled"] = (compiled - 2 * same.value).detach()
        found["gradient"] = torch.autograd.grad(whole.value - same.value, x)[0]
    else:
        message = said(lambda: fewstep.sinkhorn(x, y, eps=0.3, process_group=one))
    return [str(w.message) for w in caught], found, message


def find(rank: int, world: int, group: Any) -> Saved:
    warnings.filterwarnings("ignore", message="sinkhorn.*not converged")
    found: Saved = {"alone": alone(rank)}
    for dtype_name, dtype in DTYPES.items():
        for of in ("sinkhorn", "sinkhorn_divergence"):
            if dtype == torch.float32 and of == "sinkhorn_divergence":
                continue
            for name in TRANSPORT:
                found[f"{of}, {name}, {dtype_name}"] = solve(of, name, dtype, rank, world, group)
    for name in DRIFTS:
        for hold in ("points", "groups"):
            found[f"drift, {name}, {hold}"] = drift(name, hold, rank, world, group)
    found["step"] = step(rank, world, group)
    found["transported"] = transported(rank, world, group)
    found["refusals"] = refusals(rank, group)
    return found


if __name__ == "__main__":
    from processes import serve

    serve(find)
