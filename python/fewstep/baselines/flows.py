"""Flow matching between noise and data that are independent, paired in a batch, or given in pairs.

Sources: Lipman et al., Flow matching, arXiv 2210.02747; Liu et al., Rectified flow, arXiv
2209.03003; Tong et al., arXiv 2302.00482, and Pooladian et al., Multisample flow matching, arXiv
2304.14772, for optimal transport in batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep._checks import check_types, one_of
from fewstep.methods.draws import Draws, per_sample
from fewstep.ops.sinkhorn.solve import sinkhorn

Pairing = Literal["independent", "optimal"]


@dataclass(frozen=True)
class FlowMatching:
    """The loss `mean |v(x_t, t) - (eps - x)|^2` on the path `x_t = (1 - t) x + t eps`, t uniform.

    With independent pairs this is OT-CFM as flow matching has it, and the first rectified flow.
    With "optimal" ones, noise and data of a batch are assigned to each other at the least squared
    distance: BOT-CFM. Given pairs of noise and a flow's samples of it make the next rectified flow.

    Attributes:
        pairing: "independent" or "optimal".

    Raises:
        ValueError: the pairing is unknown.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Linear(2, 2)
    >>> loss, metrics = FlowMatching("optimal")(lambda x, t: net(x), torch.randn(16, 2))
    >>> loss.backward()
    >>> metrics["alignment"] > 0.5
    tensor(True)
    """

    pairing: Pairing = "independent"

    def __post_init__(self) -> None:
        check_types(self)
        one_of("FlowMatching", "pairing", self.pairing, get_args(Pairing))

    def __call__(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        data: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one step.

        Args:
            velocity (Callable): `v(x [B, ...], t [B])`.
            data (Tensor): samples `[B, ...]` of the data, float32 or float64.
            noise (Tensor | None): noise of the same shape, for pairs that are given. The pairing
                then has to be "independent". None draws it.
            generator (torch.Generator | None): generator of times and noise.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `alignment` is the mean of
            `<x, eps> / D` over the pairs.

        Raises:
            ValueError: noise of another shape, or noise beside optimal pairs.
        """
        draws = Draws("FlowMatching", data, generator, None)
        t, eps = draws.uniform(dtype=data.dtype), draws.normal()
        if noise is not None:
            if noise.shape != data.shape or self.pairing != "independent":
                raise ValueError(
                    f"FlowMatching: noise must be {tuple(data.shape)} like data, for independent"
                    f" pairing, got {tuple(noise.shape)} and {self.pairing!r}"
                )
            eps = noise
        elif self.pairing == "optimal":
            eps = eps[optimal_assignment(data, eps)]
        x = data + per_sample(t, data) * (eps - data)
        loss = (velocity(x, t) - (eps - data)).square().mean()
        with torch.no_grad():
            return loss, {"alignment": (data * eps).mean()}


@torch.no_grad()
def optimal_assignment(x: Tensor, y: Tensor) -> Tensor:
    """The permutation of y at the least total squared distance from x, int64 `[B]`.

    >>> x = torch.tensor([[0.0], [5.0], [9.0]])
    >>> optimal_assignment(x, x.flip(0)).tolist()
    [2, 1, 0]
    """
    plan = sinkhorn(x.flatten(1), y.flatten(1), eps="auto", max_iter=20)
    return plan.assignment("permutation")
