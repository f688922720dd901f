"""Which way serves a velocity: those that are faster, if plain autograd agrees with them.

A network's forward is run on stand-ins by duals, and on wrapped tensors by `torch.func`. Both may
take another branch than a plain call does. So the first time that a velocity is seen, a few samples
go through each way and through plain autograd, and a way is taken only where all agree:

    velocity      v(x, t), under the same random state
    w . J v       for one probe v = w, by one reverse pass
    gradients     of <r, v(x, t)> + w . J v, for the leaves that autograd finds

Ways, from the fastest: "mlp" (all layers in one op), "structural" (an exact trace), "duals", "func"
and "reverse", which is plain autograd itself.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from fewstep._torch import is_transformed
from fewstep.ops.dual.traced import MixingError, UnsupportedError, autocasts, normed, notes, path
from fewstep.ops.trace import replicas
from fewstep.ops.trace import velocity as velocities
from fewstep.reference import trace as reference

FEW = 8  # samples that are compared
# Relative errors of norms between two right ways: float32 through deep networks, TF32 on GPUs.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 2e-3}
ROUGH = 0.1  # bfloat16, float16, autocast
# No other way helps: too little memory, samples that mix, a checkpoint that has what it needs.
FATAL = (MixingError, torch.OutOfMemoryError, MemoryError, _StopRecomputationError)


@dataclass
class Known:
    """What is known of a velocity in its modes.

    Attributes:
        refused: ways that do not serve, and why.
        worked: ways that have.
        notes: what the user should know of the forward, and was warned of.
        checked: samples that were compared.
        paths: ways, and the branches of the forward that were compared with each.
        again: comparisons for the sake of other branches.
        called: see `replicas.agree`.
        hooked, compiled, scripted: see `velocities`.
    """

    hooked: bool = False
    compiled: bool = False
    scripted: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    worked: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    checked: int = 0
    paths: set[tuple[str, int]] = field(default_factory=set)
    again: int = 0
    called: list[weakref.ref[Any]] = field(default_factory=list)

    def agreed(self, way: str) -> None:
        """The last forward was compared, and is right."""
        self.worked.add(way)
        self.paths.add((way, path()))

    def met(self, way: str, x: Tensor, compare: Callable[[bool], None]) -> str:
        """Compare the branch that the last forward took, if that has not been done.

        A few samples may take another one than all of them do, and so may any by chance.

        Args:
            way (str): which served it.
            compare (Callable): of a few samples, or of all.

        Returns:
            str: what `info` should say of it. The way may be refused since.
        """
        own = (way, path())
        if not self.checked or own in self.paths or not checkable(x):
            return ""
        if self.again < _BRANCHES and replicas.alone():
            self.again += 1
            for few in (True, False):
                try:
                    compare(few)
                except (torch.OutOfMemoryError, MemoryError):
                    break
                if own in self.paths or way in self.refused:
                    return ""
        return BRANCH

    def take_notes(self, *texts: str, who: str = "divergence") -> None:
        """These, and those of the last forward, with a warning for each that is new."""
        for text in (*texts, *notes()):
            if text not in self.notes:
                self.notes.append(text)
                warnings.warn(f"{who}: {text}", RuntimeWarning, stacklevel=2)


UNCOMPARED = "not compared with plain autograd"
BRANCH = f"this branch of the network is {UNCOMPARED}"
_BRANCHES = 64  # other branches of a forward for which it is compared again
_KNOWN: weakref.WeakKeyDictionary[Any, dict[Any, Known]] = weakref.WeakKeyDictionary()
_MOST = 256  # signatures of one function that are kept
_COARSE = 16  # from here on, counters and names among them are not looked at
UNSEEN = (
    "velocity changes with x by steps without a derivative (no_grad, detach, numpy, or"
    " autograd.grad without create_graph), so that its trace is 0"
)


def _stored(velocity: Callable[..., Any]) -> dict[Any, Known]:
    try:
        store = _KNOWN.setdefault(velocities.owner(velocity), {})
    except TypeError:  # no weak references to it
        return {}
    if len(store) > _MOST:
        store.clear()
    return store


def known(velocity: Callable[..., Any], *rest: Any, mixes: bool = False) -> Known:
    """What is known of a velocity, where all of `rest` is the same.

    Args:
        mixes: samples may depend on each other.

    Raises:
        MixingError: one of its modules mixes samples, and may not.
    """
    store = _stored(velocity)
    own, modules = velocities.signature(velocity, coarse=len(store) > _COARSE)
    name = None if mixes else velocities.mixing(modules)
    if name is not None:
        raise MixingError(
            f"divergence: {name}: BatchNorm in training, or without running statistics, mixes"
            " samples, so that they have no Jacobians of their own: call eval() on it, and keep"
            " track_running_stats"
        )
    key = (own, *rest)
    found = store.get(key)
    if found is None:
        found = store[key] = Known(
            velocities.hooked(modules),
            velocities.compiled(modules),
            velocities.scripted(own, modules),
        )
    return found


class _Once(torch.autograd.Function):
    """A tensor whose gradient has none of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "divergence: second derivatives through layer_norm or instance_norm are wrong in"
                " torch, by which this network is served: ask for engine='duals', or write the norm"
                " out, by mean and rsqrt"
            )
        return g


def once(products: Tensor) -> Tensor:
    """Products of the last watched forward, whose second derivatives raise if they were wrong."""
    if not normed() or is_transformed() or not products.requires_grad:
        return products
    out: Tensor = _Once.apply(products)  # type: ignore[no-untyped-call]
    return out


def checkable(x: Tensor) -> bool:
    """Whether values can be compared: not while compiling, under transforms, or in a capture."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def eagerly(known: Known) -> contextlib.AbstractContextManager[Any]:
    """Stand-ins, and wrapped tensors, are not for compiled graphs."""
    if not known.compiled:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def first_line(error: Exception) -> str:
    """Why a way does not serve, in short."""
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def isolated(x: Tensor, modules: list[torch.nn.Module]) -> Iterator[None]:
    """Random states and buffers are as they were, and nobody's hooks see saved tensors.

    Attention is that which has second derivatives throughout, as checkpoints compute it again.
    """
    buffers = [(b, b.clone()) for m in modules for b in m._buffers.values() if b is not None]
    versions = [b._version for b, _ in buffers]
    named = [(m, dict(m._buffers)) for m in modules if m._buffers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        stack.enter_context(reference.own_saved_tensors())
        stack.enter_context(reference.attention_by_math())
        try:
            yield
        finally:
            for m, own in named:
                m._buffers.update(own)
            with torch.no_grad():
                for (b, before), version in zip(buffers, versions, strict=True):
                    if b._version != version:
                        b.copy_(before)


@contextlib.contextmanager
def weights_at_hand() -> Iterator[None]:
    """Says what to do where torch finds that weights are gone."""
    try:
        yield
    except RuntimeError as error:
        if "storage of size 0" not in str(error):
            raise
        raise RuntimeError(
            "divergence: weights are freed after their layer's forward: hand over the module"
            " itself, whose hooks are then seen"
        ) from error


@dataclass(frozen=True)
class Sample:
    """A few samples, and what plain autograd has for them.

    Attributes:
        x, t: the samples.
        probe: v = w, of the shape of x.
        weights: r.
        velocity: v(x, t).
        pulled: `J' w` of every other sample; None where weights are freed before a backward.
        leaves: tensors that `loss` is differentiable in, x among them, and their gradients.
        twice: the dots are in that sum: plain autograd has their gradients.
        tolerance: see `AGREEMENT`.
        unseen: the velocity changes with x, and autograd has no derivative of it.
    """

    x: Tensor
    t: Tensor
    probe: Tensor
    weights: Tensor
    velocity: Tensor
    pulled: Tensor | None
    leaves: list[Tensor]
    gradients: list[Tensor]
    twice: bool
    tolerance: float
    unseen: bool = False

    @property
    def rounding(self) -> float:
        """Of derivatives that are small as differences of larger ones, as those of norms are."""
        return 100 * torch.finfo(self.velocity.dtype).eps

    def difference(self, velocity: Tensor, dots: Tensor | None, *, rough: bool) -> str | None:
        """What another way has different, or None; `rough`: its tangents are of few bits."""
        tolerance = ROUGH if rough else self.tolerance
        if not bool(self.velocity.isfinite().all()):
            return None
        if velocity.shape != self.velocity.shape:
            return f"velocity is {tuple(velocity.shape)}, not {tuple(self.velocity.shape)}"
        off = _error(velocity, self.velocity)
        if not off <= self.tolerance:
            return f"velocity is off by {off:.2g} of its norm"
        if dots is not None and self.pulled is not None:
            dots = dots.reshape(-1)[::2]
            exact = (self.pulled * self.probe).flatten(1).sum(1)[::2]
            size = self.pulled.flatten(1).norm(dim=1) * self.probe.flatten(1).norm(dim=1)
            size = size + self.rounding / tolerance * self.probe.flatten(1).square().sum(1)
            off = _error(dots, exact, size[::2].norm())
            if bool(exact.isfinite().all()) and not off <= tolerance:
                return f"v . J v is off by {off:.2g} of |v| |J' v|"
        return self._gradients(velocity, dots, tolerance)

    def _gradients(self, velocity: Tensor, dots: Tensor | None, tolerance: float) -> str | None:
        live = list(zip(self.leaves, self.gradients, strict=True))
        if not live or dots is None:  # of a way that has traces alone
            return None
        own = loss(velocity, self.weights, dots if self.twice else None)
        least = self.rounding / tolerance * float(self.weights.norm())
        return gradient_difference(own, live, tolerance, least)


def gradient_difference(
    own: Tensor, live: list[tuple[Tensor, Tensor]], tolerance: float, least: float
) -> str | None:
    """What the gradients of a loss have different from those of each leaf, or None.

    Args:
        least: errors are relative to a norm of this at least.
    """
    ends = {id(leaf) for leaf in leaves_of(own)}
    missing = [leaf for leaf, _ in live if id(leaf) not in ends]
    if missing:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in missing[:3])
        return f"{len(missing)} of {len(live)} leaves get no gradient: {shapes}"
    found = gradients(own, [leaf for leaf, _ in live])
    pairs = [
        (torch.zeros_like(g) if f is None else f, g) for f, (_, g) in zip(found, live, strict=True)
    ]
    sizes = [float(g.norm()) for _, g in pairs]
    least = 0.05 * max(sizes) + least
    for (f, g), size in zip(pairs, sizes, strict=True):
        off = float((f - g).norm()) / max(size, least, 1e-300)
        if size == size and not off <= tolerance:  # NaN is nobody's
            return f"a gradient {tuple(g.shape)} is off by {off:.2g} of its norm"
    return None


def _error(actual: Tensor, exact: Tensor, size: Tensor | None = None) -> float:
    a, e = actual.detach().double(), exact.detach().double()
    scale = e.norm() if size is None else size.double()
    return float((a - e).norm() / scale.clamp_min(1e-30))


def leaves_of(out: Tensor) -> list[Tensor]:
    """Tensors that a result's gradients end at."""
    stack, seen, found = [out.grad_fn], set(), []
    if out.grad_fn is None and out.requires_grad:
        return [out]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        stack.extend(following for following, _ in node.next_functions)
    return found


def loss(velocity: Tensor, weights: Tensor, dots: Tensor | None) -> Tensor:
    out = (velocity * weights).sum()
    return out if dots is None else out + dots.sum()


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if not leaves or not out.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True))


def sample(
    run: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    probe: Callable[[Tensor], Tensor],
    freed: bool,
    few: bool = True,
) -> Sample:
    """A few samples through a plain call; all of them where a context has a row for each.

    Raises:
        MixingError: the velocity of one sample depends on others.
    """
    if few and x.shape[0] > 2 * FEW:
        times = t[:FEW].clone() if t.ndim else t
        try:
            return _sample(run, x[:FEW].detach().clone(), times, probe, freed)
        except FATAL:
            raise
        except Exception:  # of this many rows only
            pass
    return _sample(run, x.detach().clone(), t, probe, freed)


def _sample(
    run: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    probe: Callable[[Tensor], Tensor],
    freed: bool,
) -> Sample:
    y = x.requires_grad_(True)
    torch.manual_seed(0)
    with _one_argument():
        out = reference.checked(run(y.clone(), t.detach()), y)  # which may be changed in place
    v = probe(x.detach())
    weights = v.flip(0)
    tolerance = _tolerance(x, [x])
    velocity_alone = Sample(
        *(x.detach(), t.detach(), v, weights, out.detach(), None, [], []),
        twice=False,
        tolerance=tolerance,
    )
    if freed:
        return velocity_alone
    alone = v.clone()
    alone[1::2] = 0
    try:
        row = reference.pulled_back(out, y, alone, twice=True)
    except FATAL:
        raise
    except RuntimeError:  # an operator without autograd, a change in place
        return velocity_alone
    pulled = row.detach()
    _refuse_mixing(out, y, v)
    if not bool(pulled.any()) and _unseen(run, y.detach(), t.detach(), v, out.detach(), tolerance):
        velocity_alone = replace(velocity_alone, pulled=pulled, unseen=True)
    live: list[tuple[Tensor, Tensor]] = []
    twice = True
    for dots in ((row * v).flatten(1).sum(1)[::2], None):
        own = loss(out, weights, dots)
        leaves = leaves_of(own)
        try:
            pairs = list(zip(leaves, gradients(own, leaves), strict=True))
        except RuntimeError as error:  # some functions of torch have no second derivative
            if dots is None and "use_reentrant=True" not in str(error):
                raise
            twice = False
            continue
        live = [(leaf, g) for leaf, g in pairs if g is not None]
        break
    return replace(
        velocity_alone,
        x=y,
        pulled=pulled,
        leaves=[leaf for leaf, _ in live],
        gradients=[g for _, g in live],
        twice=twice,
        tolerance=_tolerance(x, [leaf for leaf, _ in live]),
    )


@contextlib.contextmanager
def _one_argument() -> Iterator[None]:
    """Says how a velocity is called, where it takes no time."""
    try:
        yield
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise TypeError(
            f"divergence: velocity is called as velocity(x, t): {error}; a network without t is"
            " handed over as lambda x, t: net(x)"
        ) from error


def _tolerance(x: Tensor, leaves: list[Tensor]) -> float:
    if any(z.dtype not in AGREEMENT for z in (x, *leaves)) or autocasts():
        return ROUGH
    rough = x.is_cuda and torch.backends.cudnn.allow_tf32
    return max(AGREEMENT[x.dtype], 1e-2 if rough else 0.0)


def _refuse_mixing(out: Tensor, x: Tensor, v: Tensor) -> None:
    """By the gradients of some samples' velocities, which must be 0 at all others.

    Two samples are apart in one of the sets at least.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    for bit in range((x.shape[0] - 1).bit_length()):
        for own in ((rows >> bit) % 2 == 0, (rows >> bit) % 2 == 1):
            mask = own.view(-1, *(1,) * (v.ndim - 1))
            pulled = reference.pulled_back(out, x, v * mask, twice=False).detach()
            inside, outside = (pulled * mask).norm(), (pulled * ~mask).norm()
            if bool(outside > 1e-4 * inside):
                raise MixingError(
                    "divergence: velocity mixes samples: that of one depends on others, so that"
                    " they have no Jacobians of their own; call eval() where it normalises by the"
                    " batch"
                )


def _unseen(
    run: Callable[..., Any], x: Tensor, t: Tensor, v: Tensor, out: Tensor, tolerance: float
) -> bool:
    """Whether a velocity without a derivative changes with x."""
    step = 1e-2 * x.flatten(1).norm(dim=1).mean().clamp_min(1e-3) / x[0].numel() ** 0.5
    torch.manual_seed(0)
    with torch.no_grad():
        moved = run(x + step * v, t)
    return bool((moved - out).norm() > max(tolerance, 1e-6) * out.norm())


def autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def warn(way: str, reason: str, who: str = "divergence") -> None:
    warnings.warn(
        f"{who}: {way} and plain autograd disagree on this network, {reason}; a slower way is"
        " taken",
        RuntimeWarning,
        stacklevel=2,
    )
