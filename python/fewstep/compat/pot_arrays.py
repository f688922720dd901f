"""What the functions of `fewstep.compat.pot` take and return: tensors for tensors, else arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = Any  # a Tensor, an array of NumPy or a list of numbers
F = TypeVar("F", bound=Callable[..., Any])


class OTResult:
    """What `solve` and its relatives return. The dense plan is formed when it is asked for.

    Attributes:
        potentials: log u and log v, as POT's solver of the same call has them.
        potential_a: the first of these.
        potential_b: the second.
        value: the objective.
        value_linear: `<P, M>`.
        plan: plan `[.., N, M]`.
        marginals: sums of the plan's rows and columns.
        marginal_a: the first of these.
        marginal_b: the second.
        status: "Converged", or what the residual is.
        log: dictionary of what else there is.
    """

    def __init__(
        self,
        parts: dict[str, Callable[[OTResult], Any]],
        convert: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._parts, self._convert = parts, convert
        self._known: dict[str, Any] = {}

    def _part(self, name: str) -> Any:
        if name not in self._known:
            make = self._parts.get(name)
            self._known[name] = None if make is None else make(self)
        return self._known[name]

    def __repr__(self) -> str:
        return f"OTResult(value={self.value}, status={self.status!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "value_quad":  # of Gromov-Wasserstein
            return None
        if name in ("potentials", "value", "value_linear", "plan", "marginals", "status", "log"):
            return self._convert(self._part(name))
        if name in ("potential_a", "potential_b", "marginal_a", "marginal_b"):
            pair = self._part(f"{name[:-2]}s")
            return None if pair is None else self._convert(pair["ab".index(name[-1])])
        if name in ("sparse_plan", "lazy_plan", "a_to_b", "b_to_a"):
            raise NotImplementedError(
                f"OTResult: {name} of POT is not served here; use plan, or fewstep.sinkhorn with"
                " its transport and barycenter, which form no plan"
            )
        raise AttributeError(name)


def takes_arrays(function: F) -> F:
    """Tensors inside; what was given as arrays or lists comes back as arrays."""

    @functools.wraps(function)
    def given(*args: Any, **options: Any) -> Any:
        values = [*args, *options.values()]
        values += [v for pair in values if isinstance(pair, tuple) for v in pair]
        arrays = any(isinstance(v, np.ndarray) and v.ndim for v in values)
        if any(isinstance(v, Tensor) for v in values):
            if arrays:
                raise TypeError(
                    f"{function.__name__}: all must be tensors or all arrays, got an array beside"
                    " a Tensor: torch.from_numpy makes one of the other"
                )
            return function(*map(_listed, args), **{k: _listed(v) for k, v in options.items()})
        out = function(*map(_tensor, args), **{k: _tensor(v) for k, v in options.items()})
        return _arrays(out)

    return given  # type: ignore[return-value]


def _listed(value: Any) -> Any:
    """POT's empty list, for weights that are uniform, is None."""
    return None if isinstance(value, list) and not value else value


def _tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_tensor, value))
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("masked arrays are not supported: leave masked points out, or weigh them 0")
    if isinstance(value, list):
        value = _listed(value)
        value = value if value is None else np.asarray(value, dtype=np.float64)
    if not isinstance(value, np.ndarray) or not value.ndim:
        return value
    kind = np.float64 if value.dtype.kind in "iu" else value.dtype.newbyteorder("=")
    return torch.tensor(np.ascontiguousarray(value, kind))


def _arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()[()]
    if isinstance(value, dict):
        return {name: _arrays(v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_arrays, value))
    if isinstance(value, OTResult):
        return OTResult(value._parts, _arrays)
    return value
