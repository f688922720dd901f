"""A state and its passes: what is done between two calls of a velocity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import flags
from fewstep._torch import is_dual, is_transformed, wide
from fewstep.ops.heun import dispatch
from fewstep.ops.trace.estimator import Divergence

FIRST = 2  # row of the table for evaluation 0: row 0 draws latents, row 1 starts a sampler


def _called(who: str, network: Callable[..., Any], x: Tensor, level: Tensor) -> Any:
    """A network's output; errors say how it is called. `torch.nn.Sequential` takes no level."""
    if getattr(type(network), "forward", None) is torch.nn.Sequential.forward:
        return network(x)
    try:
        return network(x, level)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise TypeError(
            f"{who}: the network is called as network(x, t): {error}; a network without t is handed"
            " over as lambda x, t: net(x)"
        ) from error
    except RuntimeError as error:
        if "must match the size" in str(error):
            error.add_note(
                f"{who}: the network is called with {tuple(x.shape)} and a level for each sample,"
                f" {tuple(level.shape)}, which is to be reshaped to multiply x"
            )
        raise


class Run:
    """The state of a solve, and the passes over it that a table describes.

    A step is two passes. The first one leaves in the state what is known of the next one, and makes
    the network's input in the middle; the second one adds the rest, so that no output of the
    network is held while it runs again. With autograd or `torch.compile` every pass makes new
    tensors, else they write into buffers. Between steps the network's input is the state itself
    where that has its dtype and scale.

    Attributes:
        high: the state, without what rounding left of it.
        net: the network's next input.
    """

    def __init__(
        self,
        who: str,
        backend: str,
        x: Tensor,
        table: Tensor,
        state: str,
        check_finite: bool | None,
        *,
        scaled: bool = False,
        seeds: Tensor | None = None,
    ) -> None:
        if check_finite is not None:
            flags(who, check_finite=check_finite)
        self.who, self.backend, self.table, self.seeds = who, backend, table, seeds
        self.functional = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if is_transformed() or is_dual(x):
            self.functional, self.backend = True, "reference"
        self.combine = dispatch.into(self.backend, x.dtype)
        self.dtype, self.device = x.dtype, x.device
        double = state == "float64" or x.dtype == torch.float64
        self.compensated = state == "compensated" and not double
        self.high = x.to(torch.float64 if double else torch.float32)
        self.low: Tensor | None = None
        self.scaled = scaled
        self.same = not scaled and self.high.dtype == x.dtype
        self.net = x
        # Whether the state's buffers are ours yet: the first one is the caller's, unless converted,
        # and as strided as the caller's then.
        converted = self.high is not x and self.high.is_contiguous()
        self.own = converted and not self.compensated
        self.buffer: Tensor | None = None  # for inputs that are not the state
        on_cpu = x.device.type == "cpu"
        default = on_cpu and not self.functional
        possible = not torch.compiler.is_compiling() and not is_transformed()
        self.versioned = possible
        self.checked = (default if check_finite is None else check_finite) and possible
        fused = self.checked and not self.functional
        self.wrong = x.new_zeros(1, dtype=torch.int32) if fused else None
        self.flag = self.wrong.numpy() if self.wrong is not None and on_cpu else None

    def call(self, network: Callable[..., Any], level: Tensor, step: int) -> Tensor:
        """The network at its next input, which it must not change: that may be the state itself."""
        net = self.net
        if not self.versioned or net.is_inference():
            sequential = getattr(type(network), "forward", None) is torch.nn.Sequential.forward
            return self.accept(network(net) if sequential else network(net, level), step)
        before = net._version
        out = self.accept(_called(self.who, network, net, level), step)
        if net._version != before:
            raise ValueError(
                f"{self.who}: the network changes its input in place at step {step}; let it change"
                " a clone"
            )
        return out

    def accept(self, out: Any, step: int) -> Tensor:
        """What the network returned, if it has the state's shape and device."""
        got: object = type(out).__name__
        if isinstance(out, Tensor):
            dense = out.layout == torch.strided  # a nested tensor that is has no shape
            if dense and out.shape == self.high.shape and out.device == self.device:
                if out.dtype == self.dtype:
                    return out
                if not out.is_complex():
                    return out.to(wide(self.dtype))  # float32 beside inputs in half precision
            if not dense:
                got = f"a tensor of layout {out.layout}"
            elif out.shape == self.high.shape:
                got = f"{out.dtype} on {out.device}"
            else:
                got = tuple(out.shape)
        raise ValueError(
            f"{self.who}: the network must return {tuple(self.high.shape)}, got {got}"
            f" at step {step}"
        )

    def advance(self, terms: list[Tensor], row: int, step: int, *, middle: bool = False) -> None:
        """The next state and the network's next input, by a row of the table."""
        if self.functional:
            self.high, self.low, net = dispatch.combine(
                *(self.backend, self.high, self.low, terms, self.table, row),
                seeds=self.seeds,
                want_low=self.compensated,
                want_net=middle or self.scaled,
            )
            self.net = self.high.to(self.dtype) if net is None else net.to(self.dtype)
            if self.checked and not bool(self.high.detach().isfinite().all()):
                raise ValueError(f"{self.who}: the state is not finite at step {step}")
            return
        high, low = self.high, self.low
        if not self.own:  # the first state stays as it was
            self.high = torch.empty_like(high, memory_format=torch.contiguous_format)
            self.low = torch.empty_like(self.high) if self.compensated else None
            self.own = True
        net = None
        if middle or not self.same:
            if self.buffer is None:
                self.buffer = torch.empty_like(self.high, dtype=self.dtype)
            net = self.buffer
        self.combine(
            high, low, terms, self.table, row, self.seeds, self.high, self.low, net, self.wrong
        )
        self.net = self.high if net is None else net
        if self.flag is not None and self.flag[0]:
            raise ValueError(f"{self.who}: the state is not finite at step {step}")

    def finish(self) -> Tensor:
        """The state in the dtype of the input."""
        if self.wrong is not None and self.flag is None and bool(self.wrong):
            raise ValueError(f"{self.who}: the state is not finite")
        return self.high.to(self.dtype)


class Tracker:
    """A log-density beside a state, `log q - h/2 (tr J1 + tr J2)`, and its variance over probes."""

    def __init__(self, backend: str, log_density: Tensor, table: Tensor) -> None:
        self.run = Run("log_density", backend, log_density.double(), table, "float64", False)
        self.dtype = wide(log_density.dtype)
        self.variance = torch.zeros_like(log_density, dtype=self.dtype)
        self.estimator = ""

    def advance(self, found: list[Divergence], weights: list[Tensor], row: int) -> None:
        """Past an evaluation; its traces' errors are weighed as the traces are."""
        for one, weight in zip(found, weights, strict=True):
            self.estimator = one.estimator
            if not one.estimator.startswith("exact"):
                self.variance = self.variance + (weight * one.stderr).square()
        self.run.advance([one.value.double() for one in found], row, 0)

    def result(self, constant: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """The log-density, with what does not depend on the network, and its standard error."""
        return (self.run.high + constant).to(self.dtype), self.variance.sqrt().to(self.dtype)


def rows(table: Tensor, start: Tensor | None = None) -> Tensor:
    """A whole table from the rows of the steps `[S, 2, R, 8]`: before them those of no step."""
    own = table.flatten(0, 1)
    lead = own.new_zeros((FIRST, *own.shape[1:]))
    if start is not None:
        lead = torch.cat((lead[:1], start.expand(own.shape[1:])[None]))
    return torch.cat((lead, own)).contiguous()
