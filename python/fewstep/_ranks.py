"""The ranks of a process group of torch.distributed: what they agree on, sums and what they gather.

All ranks must come to every call here, in the same order.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep._torch import is_dual, is_transformed

T = TypeVar("T")
Facts = dict[str, Any]
_warned = _looked_after = False


class RankError(ValueError):
    """What a rank raises for another one's sake."""


def check_group(op: str, group: Any, tensors: dict[str, Any]) -> None:
    """Raise ValueError unless the ranks of `group` can exchange tensors on the device of x."""
    if not dist.is_available():
        raise ValueError(f"{op}: process_group needs torch.distributed, got {group!r}")
    if not isinstance(group, dist.ProcessGroup):
        hint = ""
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            hint = ", which says that this rank is no member of the group"
        elif hasattr(group, "get_group"):
            hint = ": give the group of one of its dimensions, mesh.get_group(..)"
        kind = "a process group of torch.distributed"
        raise ValueError(f"{op}: process_group must be {kind}, got {group!r}{hint}")
    if not dist.is_initialized():
        raise ValueError(f"{op}: process_group must be initialised, got {group!r}")
    if is_transformed() or any(is_dual(t) for t in tensors.values() if isinstance(t, Tensor)):
        raise ValueError(
            f"{op}: process_group must be None under torch.func and in forward mode, got {group!r}"
        )


def _check_device(op: str, group: Any, x: Any) -> None:
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if device not in _devices(group):
        serves = " and ".join(_devices(group))
        raise ValueError(
            f"{op}: process_group must serve the device of x, {device}, got"
            f" {dist.get_backend(group)!r}, which serves {serves}"
        )


def _devices(group: Any) -> list[str]:
    """The kinds of devices whose tensors a group exchanges."""
    pairs = dist.get_backend_config(group).split(",")
    return [pair.split(":")[0] for pair in pairs]


def agreed(
    op: str, group: Any, x: Any, local: Callable[[], tuple[T, Facts, Facts]]
) -> tuple[T, list[Facts]]:
    """What `local` makes on this rank, and what each rank says of its own.

    `local` returns that, facts that must be the same on all ranks, and facts of its rank. Where it
    raises on one rank, or facts differ, all ranks raise.
    """
    made: list[T] = []
    error, shared, own = None, Facts(), Facts()
    try:
        _check_device(op, group, x)
        mine, shared, own = local()
        made.append(mine)
    except Exception as caught:
        error = caught
    told: list[Any] = [None] * dist.get_world_size(group)
    said = None if error is None else f"{type(error).__name__}: {error}"
    on_gpu = isinstance(x, Tensor) and x.is_cuda  # where NCCL sends objects from
    with torch.cuda.device(x.device) if on_gpu else contextlib.nullcontext():
        dist.all_gather_object(told, (said, shared, own), group=group)
    if error is not None:
        raise error
    for rank, (theirs, _, _) in enumerate(told):
        if theirs is not None:
            raise RankError(f"{op}: rank {rank} of process_group raises: {theirs}")
    first = told[0][1]
    for rank, (_, facts, _) in enumerate(told):
        for name in [*first, *(name for name in facts if name not in first)]:
            if first.get(name) != facts.get(name):
                raise ValueError(
                    f"{op}: {name} must be the same on all ranks of process_group, got"
                    f" {first.get(name)} on rank 0 and {facts.get(name)} on rank {rank}"
                )
    return made[0], [facts for _, _, facts in told]


def checksum(t: Tensor | None) -> str:
    """Of the bits of a tensor and their order."""
    if t is None:
        return "None"
    flat = t.detach().contiguous().flatten()
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = 0
    for i, piece in enumerate(torch.split(bits, 2**18)):
        place = torch.arange(1, 2 * len(piece), 2, device=t.device) + i
        total += int((piece.to(torch.int64) * place).sum())
    return f"{tuple(t.shape)} of checksum {total % 2**64:016x}"


def summed(t: Tensor, group: Any) -> Tensor:
    """In place, over the ranks."""
    dist.all_reduce(t, dist.ReduceOp.SUM, group=group)
    return t


def largest(t: Tensor, group: Any) -> Tensor:
    """Over the ranks; NaN counts as inf."""
    t = torch.nan_to_num(t, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    dist.all_reduce(t, dist.ReduceOp.MAX, group=group)
    return t


def gathered(t: Tensor, counts: list[int], group: Any) -> list[Tensor]:
    """`t [n_r, ..]` of each rank r, with n_r of `counts`."""
    most = max(counts)
    own = t.new_zeros((most, *t.shape[1:]))
    own[: t.shape[0]] = t
    parts = [torch.empty_like(own) for _ in counts]
    dist.all_gather(parts, own, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


@contextmanager
def looked_after() -> Iterator[None]:
    """Calls of ops in the block are of one process by intent."""
    global _looked_after
    before, _looked_after = _looked_after, True
    try:
        yield
    finally:
        _looked_after = before


def warn_of_ranks(op: str, what: str) -> None:
    """Once, where there are other ranks that a call does not look at."""
    global _warned
    if torch.compiler.is_compiling() or _warned or _looked_after:
        return
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _warned = True
    warnings.warn(
        f"{op}: {what} are those of this rank's points alone; {op}(.., process_group=) makes them"
        " those of all ranks; this is said once",
        stacklevel=4,
    )
