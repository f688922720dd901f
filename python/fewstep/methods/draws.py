"""The random numbers of a training step, from torch's generator or from the samples' ids."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.ops.trace.inputs import check_ids
from fewstep.samplers.seeds import normals


class Draws:
    """Random numbers for each sample of a batch.

    Without ids they come from the generator, in the order of the batch. With ids the generator
    gives one number, and a sample's numbers depend on that one and on its id. Processes whose
    generators are in the same state then draw what one process would, each for its own samples.

    Args:
        who (str): name of the caller, for errors.
        like (Tensor): the batch `[B, ...]`.
        generator (torch.Generator | None): generator to draw from. None takes torch's own.
        sample_ids (Tensor | None): ids of the samples, int64 `[B]` in `[0, 2^48)`.
    """

    def __init__(
        self,
        who: str,
        like: Tensor,
        generator: torch.Generator | None,
        sample_ids: Tensor | None,
    ) -> None:
        self.like, self.generator = like, generator
        self.device = like.device if generator is None else generator.device
        self.ids = check_ids(sample_ids, like, who)
        self.seeds: Tensor | None = None
        self.row = 0
        if self.ids is not None:
            start = torch.randint(2**62, (), generator=generator, device=self.device)
            self.seeds = start.to(like.device) + self.ids.to(like.device)

    def uniform(self, *lead: int, dtype: torch.dtype) -> Tensor:
        """Uniform numbers `[*lead, B]` in [0, 1)."""
        if self.seeds is None:
            shape = (*lead, self.like.shape[0])
            drawn = torch.rand(shape, generator=self.generator, dtype=dtype, device=self.device)
            return drawn.to(self.like.device)
        unit: Tensor = torch.special.ndtr(self._normal(self.seeds, lead, torch.float64)).to(dtype)
        return unit.clamp_max(1 - torch.finfo(dtype).eps / 2).movedim(0, -1)

    def integers(self, high: int) -> Tensor:
        """Integers `[B]` in [0, high)."""
        if self.seeds is None:
            shape = self.like.shape[:1]
            drawn = torch.randint(high, shape, generator=self.generator, device=self.device)
            return drawn.to(self.like.device)
        return (self.uniform(dtype=torch.float64) * high).long().clamp_max(high - 1)

    def normal(self) -> Tensor:
        """Standard normal numbers of the shape and dtype of the batch."""
        shape, dtype = self.like.shape, self.like.dtype
        if self.seeds is None:
            drawn = torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device)
            return drawn.to(self.like.device)
        return self._normal(self.seeds, tuple(shape[1:]), dtype)

    def _normal(self, seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.row += 1
        return normals(seeds, shape, dtype=dtype, row=self.row)


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """Numbers `[B]` as `[B, 1, ...]`, to multiply a batch x `[B, ...]`."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))
