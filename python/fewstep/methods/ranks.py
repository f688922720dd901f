"""Problems of a batch that is spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep._checks import one_of
from fewstep._ranks import (
    Facts,
    agreed,
    check_group,
    checksum,
    gathered,
    largest,
    looked_after,
    summed,
    warn_of_ranks,
)
from fewstep._torch import exactly, wide
from fewstep.methods.problems import Batch, Problems, Reduction, Velocity, say_unequal, stepped

Hold = Literal["points", "groups"]
Move = Callable[[Problems, Any], Velocity]
Stepped = tuple[Tensor, dict[str, Tensor]]
_CLOUDS = ("x", "x_self", "y", "uncond")


@dataclass(frozen=True)
class Ranks:
    """What the ranks of a group have of a batch.

    Attributes:
        group: the process group.
        hold: whether each has its part of the points of every group, or groups of its own.
        told: for each rank, its number of groups, and of points of each cloud.
        per_group: whether each label group is solved by itself.
    """

    group: Any
    hold: Hold
    told: list[Facts]
    per_group: bool

    @property
    def weight(self) -> float:
        """What the mean over this rank's points counts in the mean over the ranks."""
        sizes = [
            own["groups"] * own["x"] if self.hold == "groups" else own["x"] for own in self.told
        ]
        share: float = sizes[dist.get_rank(self.group)] / sum(sizes)
        return share * len(sizes)

    def moved(self, p: Problems, move: Move) -> Velocity:
        """The velocity of this rank's points, for a `move` that is given problems of all points.

        Where ranks hold points, they gather them. Each then solves its share of the problems, or
        all, where they are fewer than the ranks.
        """
        if self.hold == "groups":
            return move(p, None if self.per_group else self.group)
        names = _CLOUDS[: 3 + (p.uncond is not None)]
        groups, locations, _, channels = p.x.shape
        count, ranks, rank = groups * locations, len(self.told), dist.get_rank(self.group)
        sizes = [count // ranks + (r < count % ranks) for r in range(ranks)]
        share = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) if count >= ranks else slice(None)

        def gather(name: str) -> Tensor:
            """`[P, 1, N, C]` of all ranks, for this rank's share of the problems."""
            t = getattr(p, name).detach().flatten(0, 1).transpose(0, 1)
            parts = gathered(t.to(wide(t.dtype)), [own[name] for own in self.told], self.group)
            return torch.cat([part[:, share] for part in parts]).transpose(0, 1)[:, None]

        clouds = {name: gather(name).contiguous() for name in names}
        w = p.w[:, None].expand(groups, locations).flatten()[share]
        own = Problems(clouds["x"], clouds["x_self"], clouds["y"], clouds.get("uncond"), w)
        if count < ranks:
            moved = move(own, None)
            v = moved.v[:, 0]
        else:
            moved = move(own, self.group)
            v = torch.cat(gathered(moved.v[:, 0].contiguous(), sizes, self.group))
        first = sum(of["x"] for of in self.told[:rank])
        rows = v[:, first : first + self.told[rank]["x"]]
        return replace(moved, v=rows.reshape(groups, locations, -1, channels))

    def mean(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the ranks of metrics, by what each rank has, and the largest residual."""
        share, found = self.weight / len(self.told), {}
        if "residual" in metrics:
            found["residual"] = largest(metrics.pop("residual"), self.group)
        total = summed(torch.stack([*metrics.values()]).double() * share, self.group)
        means = zip(metrics.items(), total, strict=True)
        return {name: one.to(t.dtype) for (name, t), one in means} | found


def over_ranks(t: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of a group, or of this process alone."""
    return t if group is None else summed(t, group)


def take(
    who: str,
    make: Callable[[], Batch],
    generator: Callable[..., Tensor],
    move: Move,
    *,
    noise: Tensor,
    resample: bool,
    per_group: bool,
    step_size: float,
    reduction: Reduction,
    micro_batches: int,
    process_group: Any,
    ranks_hold: Hold | None,
) -> Stepped:
    """The loss and metrics of a step, for the V of `move`, of this process or of a group's ranks.

    What is wrong on one rank raises on all, before any network is called or after all were.
    """

    def stepped_by(types: dict[str, Problems], by: Callable[[Problems], Velocity]) -> Stepped:
        with exactly(noise.device), looked_after():
            return stepped(types, by, per_group=per_group, step_size=step_size, reduction=reduction)

    if process_group is None:
        if ranks_hold is not None:
            raise ValueError(
                f"{who}: ranks_hold must be None without process_group, got {ranks_hold!r}"
            )
        given = make()
        if resample:
            say_unequal(who, given.real_points, given.noise.shape[2])
        warn_of_ranks(who, "scale, rms and plans")
        types = given.gather(generator, resample=resample, micro_batches=micro_batches)
        return stepped_by(types, lambda p: move(p, None))

    check_group(who, process_group, {"noise": noise})

    def checked() -> tuple[tuple[Batch, Hold], Facts, Facts]:
        given = make()
        groups = given.noise.shape[1]
        hold = ranks_hold if ranks_hold is not None or groups > 1 else "points"
        if hold is None:
            raise ValueError(
                f"{who}: ranks_hold must be one of {get_args(Hold)} for {groups} groups, got None"
            )
        one_of(who, "ranks_hold", hold, get_args(Hold))
        same = {"ranks_hold": hold, "uncond": "None" if given.uncond is None else "given"}
        if hold == "points":
            same["the groups of noise"] = str(groups)
            same["labels"] = checksum(given.labels)
            same["guidance"] = checksum(given.w)
        else:
            same["labels"] = "None" if given.labels is None else "given"
        return (given, hold), same, {}

    (given, hold), _ = agreed(who, process_group, noise, checked)

    def gather() -> tuple[dict[str, Problems], Facts, Facts]:
        types = given.gather(generator, resample=resample, micro_batches=micro_batches)
        one = next(iter(types.values()))
        counts = {name: t.shape[2] for name in _CLOUDS if (t := getattr(one, name)) is not None}
        same = {
            f"features[{name!r}]"
            if name
            else "the samples": f"{tuple(p.x.shape[1::2])} {p.x.dtype}"
            for name, p in types.items()
        }
        if hold == "groups":
            same |= {f"the points of {name}": str(n) for name, n in counts.items()}
        return types, same, {"groups": one.x.shape[0], **counts}

    types, told = agreed(who, process_group, noise, gather)
    if resample:
        say_unequal(who, *(sum(of[name] for of in told) for name in ("y", "x")))
    ranks = Ranks(process_group, hold, told, per_group)
    loss, metrics = stepped_by(types, lambda p: ranks.moved(p, move))
    return loss * ranks.weight, ranks.mean(metrics)
