"""The ranks of torchrun: what each trains on, and what they tell each other.

A step draws the numbers of its whole batch on every rank. Each takes its rows, and gradients are
means over the ranks, as DDP takes them: once after the backward pass, since methods call a network
several times in a step, with and without gradients.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep._ranks import RankError, agreed, check_group

TIMEOUT = timedelta(hours=1)  # in which all ranks must come to an exchange
_BUCKET = 1 << 25  # bytes of gradients that are sent at once
_LOST = re.compile("gloo|connection (closed|reset|refused)|timed out|broken pipe", re.IGNORECASE)
_ASIDE = 1.0  # seconds that a rank which knows no reason leaves to one that does
_store: Any = None
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number.
        world: number of all.
        group: their process group; None for one process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def rows(self, n: int, accumulate: int) -> list[slice]:
        """This rank's micro-batches of a batch of n."""
        size = n // (self.world * accumulate)
        start = self.rank * accumulate * size
        return [slice(start + k * size, start + (k + 1) * size) for k in range(accumulate)]

    def divide(self, name: str, n: int, accumulate: int) -> None:
        """Raise ValueError unless a batch of n has as many samples for each of its parts."""
        if n % (self.world * accumulate):
            ranks = f"{self.world} ranks times " if self.world > 1 else ""
            raise ValueError(
                f"{name} must be divisible by {ranks}accumulate, {self.world * accumulate}, got {n}"
            )

    def agreed(self, make: Callable[[], tuple[T, dict[str, str]]]) -> T:
        """What `make` makes on each rank, with facts that must be the same on all.

        Raises:
            ValueError: facts differ, or `make` raises on another rank. What it raises here, here.
        """
        if self.group is None:
            return make()[0]
        return agreed("train", self.group, torch.empty(0), lambda: (*make(), {}))[0]

    def once(self, make: Callable[[], T]) -> T:
        """What `make` makes on the first rank, for all."""
        if self.group is None:
            return make()

        def local() -> tuple[None, dict[str, Any], dict[str, Any]]:
            return None, {}, {"made": make() if self.first else None}

        made: T = agreed("train", self.group, torch.empty(0), local)[1][0]["made"]
        return made

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.group is None:
            return flag
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags[0] > 0)

    def wait(self) -> None:
        """For all ranks."""
        self.any(False)

    def means(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Means over the ranks of numbers that all have."""
        if self.group is None:
            return dict(scalars)
        values = torch.tensor([*scalars.values()], dtype=torch.float64)
        dist.all_reduce(values, group=self.group)
        return dict(zip(scalars, (values / self.world).tolist(), strict=True))

    def shard(self, module: nn.Module, device: torch.device) -> None:
        """Divide the parameters of a module between the ranks, by FSDP2: of each block, and of the
        rest. Its gradients are then means over the ranks."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        # A view would lose FSDP's hook for the backward pass if anyone wrote into it.
        module.register_forward_hook(lambda m, inputs, output: output.clone())
        mesh = DeviceMesh.from_group(self.group, device.type)
        for block in _blocks(module):
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    def mean_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their means over the ranks."""
        if self.group is None:
            return
        parameters = [p for p in parameters if not is_sharded(p)]
        buckets: list[list[Tensor]] = [[]]
        room = _BUCKET
        for p in parameters:
            if not p.requires_grad:
                continue
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if buckets[-1] and (buckets[-1][0].dtype != p.dtype or room < p.nbytes):
                buckets.append([])
                room = _BUCKET
            buckets[-1].append(p)
            room -= p.nbytes
        sent = []
        for bucket in filter(None, buckets):
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            sent.append((bucket, flat, dist.all_reduce(flat, group=self.group, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            flat /= self.world
            for p, own in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                assert p.grad is not None
                p.grad.copy_(own.view_as(p))


ALONE = Ranks()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists in a module."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child
        else:
            yield from _blocks(child)


def is_sharded(t: Tensor) -> bool:
    """Whether ranks have parts of it."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of it; all ranks must ask."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def among(process_group: Any) -> Ranks:
    """The ranks of a process group; this process alone for None.

    Raises:
        ValueError: it is no process group.
    """
    if process_group is None:
        return ALONE
    check_group("train", process_group, {})
    rank, world = dist.get_rank(process_group), dist.get_world_size(process_group)
    return Ranks(rank, world, process_group)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this rank on its machine, where a GPU is asked for without its number.

    Raises:
        ValueError: the machine has fewer GPUs than ranks.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"device: rank {local} of this machine needs a GPU, got {count} of them")
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined() -> Iterator[Any]:
    """The process group of torchrun, None for a single process.

    Raises:
        ValueError: torchrun's variables are incomplete.
        ConnectionError: a rank ended, or did not answer in time.
    """
    global _store
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ValueError(f"train: WORLD_SIZE needs {missing[0]} beside it, as torchrun sets them")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        _store = PrefixStore("fewstep", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        if torch.cuda.is_available():
            torch.cuda.set_device(own_device(torch.device("cuda")))
        yield dist.group.WORLD
        dist.destroy_process_group()
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun would cut us short
        lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
        if not isinstance(error, RuntimeError) or not lost:
            raise
        raise ConnectionError(
            f"train: another rank ended, or did not answer within {TIMEOUT}; --resume continues"
            " from the last checkpoint"
        ) from error


def speaks(error: BaseException) -> bool:
    """Whether this process is the first of its ranks that says why it ends."""
    if _store is None:
        return True
    if isinstance(error, RankError | ConnectionError):
        time.sleep(_ASIDE)
    try:
        return bool(_store.add("said", 1) == 1)
    except RuntimeError:  # the store ended with its rank
        return True
