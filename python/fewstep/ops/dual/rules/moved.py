"""Rules where the batch is not the first axis, or shares one with others: the table `MOVED`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual.engine import MOVED, Dual, Moved, placed
from fewstep.ops.dual.rules import attention, composite, elementwise, linear, norms, resampling
from fewstep.ops.dual.rules.shapes import laid_out, permuted, reshaped, unsqueezed
from fewstep.ops.dual.traced import RULES, Rule, UnsupportedError

_REFUSED = "no rule along the batch"
_READ = (linear, norms, resampling)  # whose rules are looked up here


def _functions(*names: str) -> list[Any]:
    """Those of torch, of tensors and of torch.nn.functional that have a rule."""
    own = " ".join(names).split()
    found = [getattr(space, n, None) for n in own for space in (torch, torch.Tensor, F)]
    return [f for f in found if f in RULES]


def _add(rule: Callable[[Any], Rule], functions: Iterable[Any]) -> None:
    for f in functions:
        MOVED[f] = rule(RULES.get(f))


def _on(*functions: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        MOVED.update(dict.fromkeys(functions, rule))
        return rule

    return add


def _tensors(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if isinstance(v, (Tensor, Dual)) and v.ndim > 0]


def aligned(values: Sequence[Any]) -> tuple[list[Any], Callable[[Any], Any]]:
    """What broadcasts together, with the batch of all first, and how the result is put back."""
    tensors = _tensors(values)
    n = max(v.ndim for v in tensors)
    duals = [laid_out(v) for v in tensors if isinstance(v, Dual)]
    right = {(inner.ndim - at, pre, inner.shape[0]) for inner, at, pre in duals}
    if len(right) != 1:
        raise UnsupportedError(_REFUSED)
    ((behind, pre, lead),) = right
    at, batch = n - behind, duals[0][0].source.batch
    if at < 0:
        raise UnsupportedError(_REFUSED)
    of_place = placed(duals[0][0], 1, pre) if pre > 1 else None

    def own(v: Any) -> Any:
        if not isinstance(v, (Tensor, Dual)) or v.ndim == 0:
            return v
        if isinstance(v, Dual):
            inner = laid_out(v)[0]
            for _ in range(n - v.ndim):
                inner = unsqueezed(inner, 1)
            return inner
        if v.ndim < behind:
            return v
        v = v.reshape((1,) * (n - v.ndim) + tuple(v.shape)).movedim(at, 0)
        if v.shape[0] not in (1, lead):
            raise UnsupportedError(_REFUSED)
        if of_place is not None and v.shape[0] > 1:
            v = v.unflatten(0, (pre, batch, -1)).transpose(0, 1).flatten(0, 2)
        return v

    return [own(v) for v in values], lambda out: _back(out, at, pre, duals[0][0])


def _back(out: Any, at: int, pre: int, like: Dual) -> Any:
    """A result with its batch first, at its place."""
    if isinstance(out, Dual):
        return placed(out, at, pre)
    if isinstance(out, Tensor) and out.ndim > at and out.shape[0] == like.shape[0]:
        frame = placed(like, min(at, like.ndim - 1), pre)
        if not isinstance(frame, Moved):
            return out
        if frame.at == at:
            return frame.placed(out)
    if isinstance(out, Tensor):
        raise UnsupportedError(_REFUSED)
    return out


def _pointwise(rule: Rule) -> Rule:
    """Of a function of each element, and of what broadcasts with it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        values, back = aligned([*args, *kwargs.values()])
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        out = rule(*values[: len(args)], **named)
        for given, own in zip((*args, *kwargs.values()), values, strict=True):
            if out is own and isinstance(given, Dual):
                return given
        return back(out)

    return run


_add(
    _pointwise,
    _functions(
        *elementwise.UNARY,
        *elementwise.STEPS,
        *elementwise.COMPARED,
        *(f.__name__ for f in elementwise.ACTIVATIONS),
        *elementwise.IN_PLACE,
        "silu gelu softplus relu tanh sigmoid logsigmoid tanhshrink softsign celu selu",
        "add sub rsub subtract mul multiply div divide true_divide neg negative pow remainder fmod",
        "clamp clip clamp_min clamp_max where masked_fill maximum minimum lerp addcmul absolute",
        "nan_to_num atan2 arctan2 clone contiguous zeros_like ones_like empty_like full_like",
        "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__",
        "__rpow__ __neg__ __abs__ __mod__ __div__ __rdiv__ __gt__ __ge__ __lt__ __le__ __eq__",
        "__ne__ relu_ tanh_ sigmoid_ elu_ leaky_relu_ hardtanh_ selu_ celu_",
    ),
)


def _plainly(rule: Rule) -> Rule:
    """Of a function that asks for the dtype and device alone."""

    def run(input: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(rows, args)), {k: rows(v) for k, v in kwargs.items()}
        return rule(rows(input), *args, **kwargs)

    def rows(value: Any) -> Any:
        return value.rows if isinstance(value, Moved) else value

    return run


def _converted(rule: Rule) -> Rule:
    """Of a conversion, perhaps to the dtype of another tensor."""
    plainly = _plainly(rule)

    def run(input: Any, *args: Any, **kwargs: Any) -> Any:
        out = plainly(input, *args, **kwargs)
        if not isinstance(input, Moved):
            return out
        return input if out is input.rows else _back(out, input.at, input.pre, input.rows)

    return run


_add(
    _plainly,
    _functions(
        "new_zeros new_ones new_empty new_full new_tensor",
        "is_floating_point is_complex numel nelement",
    ),
)


_add(
    _converted,
    _functions("to float double half bfloat16 type type_as long int short char byte bool cpu cuda"),
)


def _inner(h: Dual, dim: int) -> int:
    """An axis of h, in what it is laid out as."""
    at = laid_out(h)[1]
    if not isinstance(dim, int) or isinstance(dim, bool) or not -h.ndim <= dim < h.ndim:
        raise UnsupportedError(_REFUSED)
    own = dim % h.ndim
    if own == at:
        raise UnsupportedError(_REFUSED)
    return own + (own < at)


@functools.lru_cache(None)
def _signature(rule: Rule) -> inspect.Signature:
    return inspect.signature(rule)


def _along(rule: Rule, name: str = "dim") -> Rule:
    """Of a function along an axis, or several, that it keeps or takes away."""

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = _signature(rule).bind(*args, **kwargs)
        bound.apply_defaults()
        first, *rest = bound.arguments
        h, dims = bound.arguments[first], bound.arguments[name]
        if not isinstance(h, Moved) or dims is None or _tensors_among(bound.arguments, rest):
            raise UnsupportedError(_REFUSED)
        many = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
        own = tuple(_inner(h, d) for d in many)
        bound.arguments[first] = h.rows
        bound.arguments[name] = own if isinstance(dims, (tuple, list)) else own[0]
        out = rule(*bound.args, **bound.kwargs)
        left = sum(d <= h.at for d in own)

        def back(z: Any) -> Any:
            if not isinstance(z, (Tensor, Dual)):
                return z
            at = h.at if z.ndim == h.ndim else h.at - left
            return _back(z, at, h.pre, h.rows)

        if not isinstance(out, tuple):
            return [back(z) for z in out] if isinstance(out, list) else back(out)
        parts = [back(z) for z in out]
        kind: Any = type(out)
        return tuple(parts) if kind is tuple else kind(parts)

    return run


def _tensors_among(arguments: dict[str, Any], names: Sequence[str]) -> bool:
    return any(isinstance(arguments[n], (Tensor, Dual)) for n in names if n != "index")


_add(
    _along,
    _functions(
        "sum mean var std var_mean std_mean norm max min amax amin topk sort argmax argmin",
        "softmax log_softmax logsumexp chunk split split_with_sizes narrow select unbind",
        "index_select glu normalize",
    ),
)
_add(_along, (torch.linalg.vector_norm, torch.linalg.norm, torch.special.softmax))
_add(functools.partial(_along, name="dims"), (torch.flip,))


@_on(torch.Tensor.flip)
def _flip(input: Dual, *order: Any, dims: Any = None) -> Any:
    return torch.flip(input, dims or (order if isinstance(order[0], int) else order[0]))  # type: ignore[arg-type]


def _along_batch(name: str) -> None:
    """Parts of what was joined along the batch."""
    for f in _functions(name):
        usual, rule = MOVED[f], RULES[f]

        def run(*args: Any, usual: Rule = usual, rule: Rule = rule, **kwargs: Any) -> Any:
            bound = _signature(rule).bind(*args, **kwargs)
            bound.apply_defaults()
            h, size, dim = bound.arguments.values()
            if not isinstance(h, Moved) or dim % h.ndim != h.at:
                return usual(*args, **kwargs)
            lead = h.shape[h.at]
            sizes = [size] if isinstance(size, int) else list(size)
            count = size if name == "chunk" else lead // max(sizes[0], 1)
            whole = count * (lead // max(count, 1)) == lead
            if not whole or (name == "split" and len({*sizes, lead // count}) != 1):
                raise UnsupportedError(_REFUSED)
            return _parts(h, count)

        MOVED[f] = run


def _parts(h: Moved, count: int) -> tuple[Dual, ...]:
    """As many equal parts along the batch, which each have whole batches."""
    shape = h.shape
    split = reshaped(h, (*shape[: h.at], count, shape[h.at] // count, *shape[h.at + 1 :]))
    if laid_out(split)[1] == h.at:
        raise UnsupportedError(_REFUSED)
    return tuple(split.unbind(h.at))


_along_batch("chunk")
_along_batch("split")


def _trailing(rule: Rule, axes: Callable[..., int]) -> Rule:
    """Of a function of the last axes, of which the batch is none."""

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = _signature(rule).bind(*args, **kwargs)
        first = next(iter(bound.arguments))
        h = bound.arguments[first]
        if not isinstance(h, Moved) or h.at >= h.ndim - axes(*bound.arguments.values()):
            raise UnsupportedError(_REFUSED)
        bound.arguments[first] = h.rows
        return placed(rule(*bound.args, **bound.kwargs), h.at, h.pre)

    return run


_add(lambda rule: _trailing(rule, lambda *_: 1), (F.linear,))
_add(
    lambda rule: _trailing(rule, lambda _, shape, *__: len(shape)),
    (F.layer_norm, F.rms_norm),
)
_add(lambda rule: _trailing(rule, lambda _, pad, *__: len(pad) // 2), (F.pad,))


def _whole(rule: Rule) -> Rule:
    """Of a function of each row of the first axis, which the batch is merged into."""

    def run(*args: Any, **kwargs: Any) -> Any:
        h = next((a for a in args if isinstance(a, Moved)), None)
        if h is None or h.at or any(isinstance(v, Dual) for v in kwargs.values()):
            raise UnsupportedError(_REFUSED)
        if any(isinstance(a, Dual) and a is not h for a in args):
            raise UnsupportedError(_REFUSED)
        return placed(rule(*(a.rows if a is h else a for a in args), **kwargs), 0, h.pre)

    return run


_add(
    _whole,
    [
        f
        for f in RULES
        if getattr(f, "__name__", "").startswith(("conv", "avg_pool", "adaptive_avg", "max_pool"))
        or f in (F.group_norm, F.instance_norm, F.interpolate, F.pixel_shuffle, F.pixel_unshuffle)
        or f in (F.prelu, F.batch_norm)
    ],
)


def _products(rule: Rule, square: bool) -> Rule:
    """Of products of the last two axes."""

    def run(input: Any, other: Any, **rest: Any) -> Dual:
        left, right = isinstance(input, Moved), isinstance(other, Moved)
        if left and not isinstance(other, Dual):
            if other.ndim == 2 and input.at < input.ndim - 1:
                return placed(rule(input.rows, other, **rest), input.at, input.pre)
            if input.ndim == other.ndim > 2 and input.at == input.ndim - 2:
                # The batch is the rows: each is a product by itself.
                rows = torch.matmul(input.unsqueeze(-2), other.unsqueeze(-3), **rest)
                return rows.squeeze(-2)  # type: ignore[return-value]
        columns = right and not isinstance(input, Dual) and other.at == other.ndim - 1
        if columns and input.ndim == other.ndim == 2 and other.pre == 1:
            return placed(rule(other.rows, input.T, **rest), 1)
        if any(laid_out(m)[1] > m.ndim - 3 for m in (input, other) if isinstance(m, Dual)):
            raise UnsupportedError(_REFUSED)
        if max(input.ndim, other.ndim) < 3 or (square and input.ndim != other.ndim):
            raise UnsupportedError(_REFUSED)
        (a, b), back = aligned((input, other))
        return back(rule(a, b, **rest))  # type: ignore[no-any-return]

    return run


_add(lambda rule: _products(rule, False), _functions("matmul __matmul__"))
_add(lambda rule: _products(rule, True), _functions("bmm"))


@_on(torch.Tensor.__rmatmul__)
def _rmatmul(input: Any, other: Any) -> Any:
    return torch.matmul(other, input)


@_on(F.scaled_dot_product_attention)
def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    given = (query, key, value)
    if any(laid_out(m)[1] > m.ndim - 3 for m in given if isinstance(m, Dual)):
        raise UnsupportedError(_REFUSED)
    mask = args[0] if args else kwargs.pop("attn_mask", None)
    own, back = aligned((*given, mask))
    return back(RULES[F.scaled_dot_product_attention](*own, *args[1:], **kwargs))


@_on(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(input: Moved, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise UnsupportedError(_REFUSED)
    return input


MOVED[torch.einsum] = attention.einsum
for _f in composite.COMPOSITE:
    MOVED[_f] = RULES[_f]


@_on(torch.permute)
def _permute(input: Dual, dims: Sequence[int]) -> Dual:
    return permuted(input, dims)


for _f in (
    *_functions("permute reshape view view_as reshape_as flatten unflatten transpose"),
    *_functions("swapdims swapaxes movedim moveaxis unsqueeze expand expand_as"),
    *_functions("broadcast_to repeat tile stack cat concat concatenate t squeeze"),
    *_functions("__getitem__ mm baddbmm addmm bilinear"),
    *(torch.Tensor.mT.__get__, torch.Tensor.T.__get__),  # type: ignore[attr-defined]
):
    MOVED[_f] = RULES[_f]
