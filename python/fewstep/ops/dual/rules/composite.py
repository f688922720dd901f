"""Functions of torch that are written in others: these have the rules."""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F

from fewstep.ops.dual.engine import COMPOSED
from fewstep.ops.dual.traced import RULES, Rule

# How they ask whether an argument is a tensor of another kind: then they would be called as whole.
_ASKED = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
COMPOSITE: tuple[Any, ...] = (
    F.multi_head_attention_forward,
    F.local_response_norm,
)


def _opened(function: types.FunctionType) -> Rule:
    """The same body, whatever the kinds of its arguments are."""
    known = function.__globals__ | {name: lambda *_: False for name in _ASKED}
    own = types.FunctionType(
        *(function.__code__, known, function.__name__),
        *(function.__defaults__, function.__closure__),
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


for _f in COMPOSITE:
    RULES[_f] = _opened(_f)
    COMPOSED.add(_f)
