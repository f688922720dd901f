"""Kernel results as tensors that autograd, forward mode and functorch can differentiate.

The mathematics is in `implicit`. Here are the `torch.autograd.Function`s around it. All take
`(leading tensors, *Problem, constants, ..)`, and under `vmap` the mapped dimension joins the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep._torch import InJvp, is_dual, is_transformed, readable
from fewstep.ops.sinkhorn import dispatch, implicit
from fewstep.ops.sinkhorn.compiled import compiled_product, compiled_value, scalars
from fewstep.ops.sinkhorn.function import (
    FIELDS,
    Batched,
    Grads,
    Once,
    Refuse,
    call,
    completed,
    inner,
    placed,
    save,
    scaled,
    transpose,
)
from fewstep.ops.sinkhorn.plans import mean_cost
from fewstep.ops.sinkhorn.problem import (
    VARIABLES,
    Constants,
    Directions,
    Flags,
    Problem,
    Tensors,
    points_of,
    to_points,
    total,
    transposed,
)
from fewstep.ops.sinkhorn.problem import check_digits as check_plain_digits
from fewstep.ops.sinkhorn.problem import product as plan_product
from fewstep.reference.sinkhorn import Inputs, Outputs, Points


def solve(backend: str, inputs: Inputs) -> Outputs:
    """`dispatch.solve` with a differentiable value, and functorch's transforms.

    The reference stays as it is, differentiable through its iterations, except in forward mode
    and under transforms.
    """
    transformed = is_transformed()
    points, a, b, eps, schedule = inputs.points, inputs.a, inputs.b, inputs.eps, inputs.schedule
    variables = [t for t in (points.x, points.y, a, b, points.matrix) if t is not None]
    if not transformed and not any(is_dual(t) for t in variables):
        constant = not torch.is_grad_enabled() or not any(t.requires_grad for t in variables)
        if constant or backend == "reference":
            return dispatch.solve(backend, inputs)
    c = constants(backend, points, schedule.rho, schedule.single)
    fixed = points.detached()
    if transformed:
        p = _problem(fixed, a.detach(), b.detach(), inputs.f0, inputs.g0, eps)
        bare = replace(schedule, start=None, temperatures=None)
        out = call(_Solve, schedule.start, *p, schedule.temperatures, c, bare)
        grads: tuple[Tensor | None, Tensor | None] = (None, None)
    else:
        need = (points.x.requires_grad, points.y.requires_grad and not c.symmetric)
        constant_inputs = Inputs(fixed, a.detach(), b.detach(), eps, inputs.f0, inputs.g0, schedule)
        out, grads = dispatch.solve_with_gradient(backend, constant_inputs, need)
    f, g, value, residual, iterations, converged = out
    ps = problems(points, a, b, f, g, eps)
    if len(ps) == 1:
        value = differentiable_value(value, ps[0], c, grads)
    else:
        parts = []
        for t, p in enumerate(ps):
            gx, gy = (None if grad is None else grad[t : t + 1] for grad in grads)
            parts.append(differentiable_value(value[t :: len(ps)], p, c, (gx, gy)))
        value = torch.stack(parts, 1).flatten()
    return f, g, value, residual, iterations, converged


def constants(
    backend: str,
    points: Points,
    rho: tuple[float | None, float | None],
    symmetric: bool = False,
) -> Constants:
    symmetric = symmetric and points.formula is None  # which may not be symmetric
    cost, diagonal, precision = points.cost, points.diagonal, points.precision
    return Constants(cost, backend, *rho, diagonal, symmetric, precision, points.formula)


def _problem(
    points: Points, a: Tensor, b: Tensor, f: Tensor | None, g: Tensor | None, eps: Tensor
) -> Problem:
    """Whatever the number of temperatures."""
    segments, labels = points.segments or (None, None), points.labels or (None, None)
    tensors = (points.x, points.y, a, b, points.matrix, f, g, eps)
    return Problem._make([*tensors, *segments, *labels, points.label_cost])


def problems(
    points: Points, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: Tensor
) -> list[Problem]:
    """Solved problems at one temperature each: one batch of all, or, ragged, T batches.

    Potentials, with their T temperatures of every problem, are `[B T, N]`, or flat `[T, N]`.
    """
    T = eps.shape[0] // max(points.count, 1)
    whole = _problem(points, a, b, f, g, eps)
    if T == 1:
        return [whole]
    if points.segments is not None:
        return [whole._replace(f=f[t : t + 1], g=g[t : t + 1], eps=eps[t::T]) for t in range(T)]
    repeated = {
        name: t[:, None].expand(-1, T, *t.shape[1:]).flatten(0, 1)
        for name, t in zip(Problem._fields, whole, strict=True)
        if t is not None and name not in ("f", "g", "eps", "label_cost")
    }
    return [whole._replace(**repeated)]


def differentiable_value(
    value: Tensor,
    problem: Problem,
    constants: Constants,
    grads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`value [B]`, the dual objective at (f, g), with its derivatives for x, y, a, b and matrix.

    `grads` are those for x and y where they are known already.

    `value`, f, g and eps must be detached. First derivatives hold f and g fixed; second ones, in
    reverse or forward over reverse, are implicit, and raise `ConvergenceError` where f and g
    have not converged. Third ones raise NotImplementedError. Where both marginals are fixed,
    derivatives for a and b are defined up to a constant, and directions along a and b must keep the
    mass.
    """
    if constants.symmetric:
        problem = problem._replace(y=problem.x.detach(), b=problem.a.detach())
    out: Tensor
    if torch.compiler.is_compiling():
        out = compiled_value(value, *grads, *problem, *scalars(constants))
    else:
        out = call(_Value, value, *grads, *problem, constants)
    return out


def potentials(problem: Problem, constants: Constants) -> tuple[Tensor, Tensor]:
    """f and g with their derivatives for x, y, a, b and matrix, by implicit differentiation.

    Where both marginals are fixed the pair is shifted so that `<a, f> = <b, g>` for every problem,
    which makes it a function of the problem. Second derivatives raise NotImplementedError.
    """
    f, g = call(_Potentials, *problem, constants)
    if constants.balanced:
        p = problem
        excess = total(p.a * f, p.segment_x) - total(p.b * g, p.segment_y)
        shift = excess / (total(p.a, p.segment_x) + total(p.b, p.segment_y))
        f = f - _partnered(p, constants, to_points(shift, f, p.segment_x))
        q, d = transposed(p, constants)
        g = g + _partnered(q, d, to_points(shift, g, p.segment_y))
    return f, g


def _partnered(p: Problem, c: Constants, shift: Tensor) -> Tensor:
    """`shift`, but 0 for points of x without a partner, whose potential is 0."""
    finite = p.matrix is None and p.label_cost is None and c.diagonal is None
    if finite or (readable(p.a) and not bool((p.a == 0).any())):
        return shift
    detached = Problem._make(t if t is None else t.detach() for t in p)
    mass = product(torch.ones_like(detached.b)[..., None], detached, c)[..., 0]
    return torch.where((p.a > 0) | (mass > 0), shift, 0.0)


def product(v: Tensor, problem: Problem, constants: Constants) -> Tensor:
    """`sum_j b_j e_ij v_j`, `[B, N, K]`, differentiable without limit in v and in nothing else."""
    out: Tensor
    if torch.compiler.is_compiling():
        out = compiled_product(v, *problem, *scalars(constants))
    else:
        out = call(_Product, v, *problem, constants)
    return out


def product_through_plan(v: Tensor, problem: Problem, constants: Constants) -> Tensor:
    """The same, differentiable once in x, y, b, f, g, matrix and v."""
    out: Tensor = call(_ProductThroughPlan, v, *problem, constants)
    return out


def plan_cost(problem: Problem, constants: Constants) -> Tensor:
    """`<P, C> [B]`, differentiable once in x, y, a, b, f, g and matrix."""
    out: Tensor = call(_PlanCost, *problem, constants)
    return out


def read(
    function: Callable[[Problem, Constants], Tensor], problem: Problem, constants: Constants
) -> Tensor:
    """What a function reads off a problem, without derivatives, under transforms too.

    It is `[B]` or `[B, N]`, and where ragged flat.
    """
    if not is_transformed():
        return function(problem, constants)
    detached = Problem._make(t if t is None else t.detach() for t in problem)
    out: Tensor = call(_Read, *detached, constants, function)
    return out


def check_digits(problem: Problem, constants: Constants) -> None:
    """That the plan is more than rounding, as far as looking costs nothing."""
    read(_checked, problem, constants)


def _checked(p: Problem, c: Constants) -> Tensor:
    check_plain_digits(p, c)
    return p.eps


class _Read(Batched):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        *tensors, constants, function = args
        out: Tensor = function(Problem._make(tensors), constants)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)


class _Solve(Batched):
    """`dispatch.solve`, without derivatives; f and g of the Problem are where it starts."""

    lead = 1

    @staticmethod
    def forward(start: Tensor | None, *args: Any) -> Outputs:
        *tensors, temperatures, c, schedule = args
        p = Problem._make(tensors)
        schedule = replace(schedule, start=start, temperatures=temperatures)
        inputs = Inputs(points_of(p, c), p.a, p.b, p.eps, p.f, p.g, schedule)
        return dispatch.solve(c.backend, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.mark_non_differentiable(*output)


class _Value(Batched):
    """Identity on the value that knows the value's gradient."""

    lead = 3

    @staticmethod
    def forward(value: Tensor, *args: Any) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.constants = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, w: Tensor | None) -> Grads:
        need = ctx.needs_input_grad[3 : 3 + VARIABLES]
        if w is None or not any(need):
            return (None,) * (FIELDS + 4)
        p, c = Problem._make(ctx.saved_tensors[2:]), ctx.constants
        if need[0] or need[1] or need[4]:
            check_digits(p, c)
        # What is known already has no derivative of its own.
        known = () if torch.is_grad_enabled() else ctx.saved_tensors[:2]
        grads = completed(known, need, lambda unknown: call(_Gradient, *p, c, unknown))
        parts = placed(scaled(w, grads, p, need), need)
        return None, None, None, *parts, *(None,) * (FIELDS - VARIABLES + 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with InJvp() as here:
            p = Problem._make(here.primals(ctx.saved_tensors[2:]))
            u = here.primals(tangents[3 : 3 + VARIABLES])
            need = tuple(t is not None for t in u)
            if not any(need):
                return torch.zeros_like(p.eps)
            if need[0] or need[1] or need[4]:
                check_digits(p, ctx.constants)
            return inner(call(_Gradient, *p, ctx.constants, need), u, p)


class _Gradient(Batched):
    """The envelope gradient, whose derivative is the Hessian."""

    @staticmethod
    def forward(*args: Any) -> Tensors:
        *tensors, constants, need = args
        return implicit.gradient(Problem._make(tensors), constants, need)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.constants, ctx.need = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Grads:
        need = ctx.needs_input_grad[:VARIABLES]
        if not any(need) or all(g is None for g in grads):
            return (None,) * (FIELDS + 2)
        u = placed(grads, ctx.need)
        parts = _hessian_product(u, Problem._make(ctx.saved_tensors), ctx.constants, need)
        return *placed(parts, need), *(None,) * (FIELDS - VARIABLES + 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        with InJvp() as here:
            p = Problem._make(here.primals(ctx.saved_tensors))
            return _hessian_product(here.primals(tangents[:VARIABLES]), p, ctx.constants, ctx.need)


def _hessian_product(u: Any, p: Problem, c: Constants, need: Flags) -> Tensors:
    variables = [t if t is None else call(Refuse, t) for t in p[:VARIABLES]]
    out: Tensors = call(_Hessian, *u, *variables, *p[VARIABLES:], c, need)
    return out


class _Hessian(Batched):
    """A Hessian-vector product, differentiable for the vector, in which it is linear."""

    lead = VARIABLES

    @staticmethod
    def forward(*args: Any) -> Tensors:
        *tensors, constants, need = args
        u: Directions = tuple(tensors[:VARIABLES])
        return implicit.hessian_product(u, Problem(*tensors[VARIABLES:]), constants, need)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.constants, ctx.need = inputs
        save(ctx, tensors[VARIABLES:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Grads:
        # The variables get no gradient, and through `_Refuse` an error if one was asked for.
        need = ctx.needs_input_grad[:VARIABLES]
        if not any(need) or all(g is None for g in grads):
            return (None,) * (VARIABLES + FIELDS + 2)
        u = placed(grads, ctx.need)
        parts = _hessian_product(u, Problem._make(ctx.saved_tensors), ctx.constants, need)
        return *placed(parts, need), *(None,) * (FIELDS + 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        with InJvp() as here:
            p = Problem._make(here.primals(ctx.saved_tensors))
            return _hessian_product(here.primals(tangents[:VARIABLES]), p, ctx.constants, ctx.need)


class _Potentials(Batched):
    """Identity on (f, g) that knows how they depend on the problem."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        p = Problem._make(args[:FIELDS])
        return p.f.clone(), p.g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.constants = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, uf: Tensor | None, ug: Tensor | None) -> Grads:
        need = ctx.needs_input_grad[:VARIABLES]
        if not any(need) or (uf is None and ug is None):
            return (None,) * (FIELDS + 1)
        p = Problem._make(ctx.saved_tensors)
        uf = torch.zeros_like(p.f) if uf is None else uf
        ug = torch.zeros_like(p.g) if ug is None else ug
        parts = call(_PotentialsAdjoint, uf, ug, *p, ctx.constants, need)
        return *placed(parts, need), *(None,) * (FIELDS - VARIABLES + 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        with InJvp() as here:
            p = Problem._make(here.primals(ctx.saved_tensors))
            u = here.primals(tangents[:VARIABLES])
            out: Tensors = call(_PotentialsTangent, *u, *p, ctx.constants)
            return out


class _PotentialsAdjoint(Once):
    lead = 2

    @staticmethod
    def forward(uf: Tensor, ug: Tensor, *args: Any) -> Tensors:
        *tensors, constants, need = args
        return implicit.potentials_adjoint(uf, ug, Problem._make(tensors), constants, need)


class _PotentialsTangent(Once):
    lead = VARIABLES

    @staticmethod
    def forward(*args: Any) -> Tensors:
        *tensors, constants = args
        u: Directions = tuple(tensors[:VARIABLES])
        return implicit.potentials_tangent(u, Problem(*tensors[VARIABLES:]), constants)


def _weighted(u: Tensor, p: Problem, c: Constants) -> Tensor:
    """`b_j sum_i e_ij u_i`, the transpose of `product`."""
    return p.b[..., None] * product(u, *transpose(p, c))


class _Product(Batched):
    lead = 1

    @staticmethod
    def forward(v: Tensor, *args: Any) -> Tensor:
        *tensors, constants = args
        p = Problem._make(tensors)
        return plan_product(p, constants, v, p.b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.constants = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Grads:
        p = Problem._make(ctx.saved_tensors)
        out = None if u is None else _weighted(u, p, ctx.constants)
        return out, *(None,) * (FIELDS + 1)

    @staticmethod
    def jvp(ctx: Any, dv: Tensor, *tangents: Any) -> Tensor:
        with InJvp() as here:
            p = Problem._make(here.primals(ctx.saved_tensors))
            (u,) = here.primals([dv])
            assert u is not None
            return product(u, p, ctx.constants)


class _ProductThroughPlan(Batched):
    lead = 1
    forward = _Product.forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.constants = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Grads:
        if u is None:
            return (None,) * (FIELDS + 2)
        v, *tensors = ctx.saved_tensors
        p = Problem._make(tensors)
        need = ctx.needs_input_grad[1 : 1 + VARIABLES]
        f, g, *parts = call(_ConditionalPullback, u, v, *p, ctx.constants, need)
        of_v = _weighted(u, p, ctx.constants) if ctx.needs_input_grad[0] else None
        return of_v, *placed(parts, need), f, g, *(None,) * (FIELDS - VARIABLES - 1)

    @staticmethod
    def jvp(ctx: Any, dv: Tensor | None, *tangents: Any) -> Tensor:
        with InJvp() as here:
            v, *tensors = here.primals(ctx.saved_tensors)
            p = Problem._make(tensors)
            u = Problem._make(here.primals(tangents[:FIELDS]))
            df = torch.zeros_like(p.f) if u.f is None else u.f
            dg = torch.zeros_like(p.g) if u.g is None else u.g
            directions = (u.x, u.y, None, u.b, u.matrix)
            out: Tensor = call(_ConditionalTangent, *directions, df, dg, v, *p, ctx.constants)
            if dv is not None:
                out = out + product(dv, p, ctx.constants)
            return out


class _ConditionalPullback(Once):
    lead = 2

    @staticmethod
    def forward(u: Tensor, v: Tensor, *args: Any) -> Tensors:
        *tensors, constants, need = args
        return implicit.conditional_pullback(u, v, Problem._make(tensors), constants, need)


class _ConditionalTangent(Once):
    lead = VARIABLES + 3

    @staticmethod
    def forward(*args: Any) -> Tensor:
        *tensors, constants = args
        (*u, df, dg, v), p = tensors[: VARIABLES + 3], Problem(*tensors[VARIABLES + 3 :])
        return implicit.conditional_tangent(tuple(u), df, dg, v, p, constants)


class _PlanCost(Batched):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        *tensors, constants = args
        p = Problem._make(tensors)
        return mean_cost(p, constants).to(p.eps.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.constants = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Grads:
        if u is None:
            return (None,) * (FIELDS + 1)
        p, need = Problem._make(ctx.saved_tensors), ctx.needs_input_grad[:VARIABLES]
        f, g, *parts = call(_PlanCostGradient, *p, ctx.constants, need)
        f, g = to_points(u, f, p.segment_x) * f, to_points(u, g, p.segment_y) * g
        rest = (None,) * (FIELDS - VARIABLES - 1)
        return *placed(scaled(u, tuple(parts), p, need), need), f, g, *rest

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with InJvp() as here:
            p = Problem._make(here.primals(ctx.saved_tensors))
            u = Problem._make(here.primals(tangents[:FIELDS]))
            need = tuple(t is not None for t in u[:VARIABLES])
            f, g, *parts = call(_PlanCostGradient, *p, ctx.constants, need)
            out = torch.zeros_like(p.eps)
            for t, part, segment in ((u.f, f, p.segment_x), (u.g, g, p.segment_y)):
                out = out if t is None else out + total(part * t, segment)
            return out + inner(tuple(parts), u[:VARIABLES], p) if any(need) else out


class _PlanCostGradient(Once):
    @staticmethod
    def forward(*args: Any) -> Tensors:
        *tensors, constants, need = args
        return implicit.cost_gradient(Problem._make(tensors), constants, need)
