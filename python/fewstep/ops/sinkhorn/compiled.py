"""Value and products as custom ops, for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.ops.sinkhorn import implicit
from fewstep.ops.sinkhorn.function import FIELDS, Grads, completed, placed, scaled, transpose
from fewstep.ops.sinkhorn.problem import VARIABLES, Constants, Problem
from fewstep.ops.sinkhorn.problem import product as plan_product

# Dynamo does not trace a Function that has a jvp, so compiled graphs have ops instead.
_SCHEMA = (
    "Tensor x, Tensor y, Tensor a, Tensor b, Tensor? matrix, Tensor f, Tensor g, Tensor eps,"
    " Tensor? segment_x, Tensor? segment_y, Tensor? label_x, Tensor? label_y, Tensor? label_cost,"
    " str cost, str backend, float? rho_x, float? rho_y, int? diagonal, bool symmetric,"
    ' str precision="tf32x3"'
)


@torch.library.custom_op(
    "fewstep::sinkhorn_value",
    mutates_args=(),
    schema=f"(Tensor value, Tensor? grad_x, Tensor? grad_y, {_SCHEMA}) -> Tensor",
)
def compiled_value(value: Tensor, *args: Any) -> Tensor:
    return value.clone()


@torch.library.custom_op(
    "fewstep::sinkhorn_product", mutates_args=(), schema=f"(Tensor v, {_SCHEMA}) -> Tensor"
)
def compiled_product(v: Tensor, *args: Any) -> Tensor:
    p = Problem._make(args[:FIELDS])
    return plan_product(p, Constants(*args[FIELDS:]), v, p.b)


@compiled_value.register_fake
def _(value: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(value)


@compiled_product.register_fake
def _(v: Tensor, *args: Any) -> Tensor:
    f = Problem._make(args[:FIELDS]).f
    return v.new_empty((*f.shape, v.shape[-1]))


def scalars(c: Constants) -> tuple[Any, ...]:
    if c.formula is not None:
        raise NotImplementedError("sinkhorn: a cost function cannot be compiled")
    return c[:-1]


def _compiled_value_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *args = inputs
    ctx.save_for_backward(*args[: 2 + FIELDS])
    ctx.constants = Constants(*args[2 + FIELDS :])


def _compiled_value_backward(ctx: Any, w: Tensor) -> Grads:
    need = ctx.needs_input_grad[3 : 3 + VARIABLES]
    known, p, c = ctx.saved_tensors[:2], Problem._make(ctx.saved_tensors[2:]), ctx.constants
    grads = completed(known, need, lambda unknown: implicit.gradient(p, c, unknown))
    rest = FIELDS - VARIABLES + len(scalars(c))
    return None, None, None, *placed(scaled(w, grads, p, need), need), *(None,) * rest


def _compiled_product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *args = inputs
    ctx.save_for_backward(*args[:FIELDS])
    ctx.constants = Constants(*args[FIELDS:])


def _compiled_product_backward(ctx: Any, u: Tensor) -> Grads:
    p, c = Problem._make(ctx.saved_tensors), ctx.constants
    q, d = transpose(p, c)
    out = p.b[..., None] * compiled_product(u, *q, *scalars(d))
    return out, *(None,) * (FIELDS + len(scalars(c)))


compiled_value.register_autograd(_compiled_value_backward, setup_context=_compiled_value_setup)


compiled_product.register_autograd(
    _compiled_product_backward, setup_context=_compiled_product_setup
)
