"""The activations that kernels have: which functions of torch they are, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fewstep.ops.dual.rules.plain import refuse
from fewstep.ops.dual.traced import Rule, UnsupportedError

# apply(kind, h, beta, threshold, inplace), kind one of `fewstep.reference.dual.ACTIVATIONS`.
Apply = Callable[[str, Any, float, float, bool], Any]
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_rules(apply: Apply) -> dict[Any, Rule]:
    """A rule for each function that is such an activation, and those in place."""

    def plain(kind: str) -> Rule:
        def rule(input: Any, *, out: None = None) -> Any:
            refuse({"out": out})
            return apply(kind, input, 1.0, 20.0, False)

        return rule

    def switched(kind: str) -> Rule:
        def rule(input: Any, inplace: bool = False) -> Any:
            return apply(kind, input, 1.0, 20.0, inplace)

        return rule

    def in_place(kind: str) -> Rule:
        def rule(input: Any, **options: Any) -> Any:
            refuse(options)
            return apply(kind, input, 1.0, 20.0, True)

        return rule

    def gelu(input: Any, approximate: str = "none") -> Any:
        if approximate not in _GELU:
            raise UnsupportedError(f"no rule for gelu with approximate={approximate}")
        return apply(_GELU[approximate], input, 1.0, 20.0, False)

    def softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        return apply("softplus", input, float(beta), float(threshold), False)

    rules: list[tuple[Rule, tuple[Any, ...]]] = [
        (switched("silu"), (F.silu,)),
        (gelu, (F.gelu,)),
        (softplus, (F.softplus,)),
        (switched("relu"), (F.relu, torch.relu, torch.Tensor.relu)),
        (plain("tanh"), (torch.tanh, torch.Tensor.tanh, F.tanh)),
        (plain("sigmoid"), (torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid, torch.special.expit)),
        (in_place("relu"), (torch.relu_, torch.Tensor.relu_)),
        (in_place("tanh"), (torch.tanh_, torch.Tensor.tanh_)),
        (in_place("sigmoid"), (torch.sigmoid_, torch.Tensor.sigmoid_)),
    ]
    return {function: rule for rule, functions in rules for function in functions}
