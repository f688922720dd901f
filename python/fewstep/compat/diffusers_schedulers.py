"""Heun's schedulers of diffusers, whose steps are fused passes; see `fewstep.compat.diffusers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
    FlowMatchHeunDiscreteScheduler,
    FlowMatchHeunDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_heun_discrete import (
    HeunDiscreteScheduler,
    HeunDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from fewstep._torch import wide
from fewstep.ops.heun import dispatch
from fewstep.ops.heun.inputs import pick

# Pipelines look for SchedulerMixin in the module of a scheduler that they load.
__all__ = ["FlowHeunScheduler", "HeunScheduler", "SchedulerMixin"]


class _Halves:
    """The two halves of a Heun step, each one pass over the state.

    With `D = skip x + out F` and `h = sigma' - sigma` the first half keeps `y = x + h/2 d` for the
    second one and returns `x2 = x + h d`, where `d = (x - D) / sigma`. The second one returns
    `y + h/2 (x2 - D2) / sigma'`.
    """

    sigmas: Tensor
    dt: Tensor | None
    sample: Tensor | None
    _step_index: int | None

    def _half(self, kind: str, output: Tensor, timestep: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next sample and D, of the dtype of x."""
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        assert self._step_index is not None
        dtype, first = wide(x.dtype), self.dt is None
        index = self._step_index if first else self._step_index - 1
        before, after = (float(sigma) for sigma in self.sigmas[index : index + 2])
        now = before if first else after
        skip, out = _denoised(kind, now)
        slope = (after - before) / now
        own, part = slope * (1 - skip), -slope * out  # of h d
        state, term = x.to(dtype), output.to(dtype)
        row: Sequence[float]
        self._step_index += 1
        if first:
            row = 1 + own / 2, part / 2, 0, 0, 1 + own, part, 0, 0
            self.sample, made = _combined(state, [term], row)
            self.dt = self.sigmas[index + 1] - self.sigmas[index]
            clean = torch.add(state if skip == 1 else skip * state, term, alpha=out)
        else:
            assert self.sample is not None
            row = 1, own / 2, part / 2, 0, 0, skip, out, 0
            made, clean = _combined(self.sample, [state, term], row)
            self.dt = self.sample = None
        return made.to(x.dtype), clean.to(x.dtype)


class HeunScheduler(_Halves, HeunDiscreteScheduler):  # type: ignore[misc]
    """`diffusers.HeunDiscreteScheduler` with fused steps, in float32 at least.

    Its options, timesteps and files are those of diffusers, so that
    `HeunScheduler.from_config(pipeline.scheduler.config)` takes the place of any scheduler with a
    table of betas. With `clip_sample` it steps as diffusers does.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """The next sample, and D as `pred_original_sample`."""
        if self.config.clip_sample or not isinstance(sample, Tensor):
            return super().step(model_output, timestep, sample, return_dict)
        made = self._half(self.config.prediction_type, model_output, timestep, sample)
        return HeunDiscreteSchedulerOutput(*made) if return_dict else made


class FlowHeunScheduler(_Halves, FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """`diffusers.FlowMatchHeunDiscreteScheduler` with fused steps, in float32 at least."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next sample.

        Raises:
            NotImplementedError: s_churn.
        """
        if s_churn:
            raise NotImplementedError(
                f"FlowHeunScheduler: s_churn={s_churn} is not served: fewstep.flow_sample has"
                " S_churn, with the data's part of a flow's state"
            )
        whole = isinstance(timestep, Tensor) and not timestep.is_floating_point()
        if isinstance(timestep, int) or whole:
            raise ValueError(
                f"FlowHeunScheduler: timestep must be one of scheduler.timesteps, got {timestep!r}"
            )
        made, _ = self._half("flow", model_output, timestep, sample)
        made = made.to(model_output.dtype)
        return FlowMatchHeunDiscreteSchedulerOutput(prev_sample=made) if return_dict else (made,)


def _denoised(kind: str, sigma: float) -> tuple[float, float]:
    """skip and out of D, for an input that is scaled already."""
    square = sigma * sigma + 1
    known = {
        "epsilon": (1.0, -sigma),
        "flow": (1.0, -sigma),
        "sample": (0.0, 1.0),
        "v_prediction": (1 / square, -sigma / square**0.5),
    }
    if kind not in known:
        raise ValueError(f"HeunScheduler: prediction_type must be one of {(*known,)}, got {kind!r}")
    return known[kind]


def _combined(x: Tensor, terms: list[Tensor], row: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The two combinations of a row of `fewstep.reference.heun`."""
    table = torch.tensor([[row]], dtype=torch.float64, device=x.device)
    backend = pick("HeunScheduler", x, None)
    y, _, net = dispatch.combine(backend, x.contiguous(), None, terms, table, 0, want_net=True)
    assert net is not None
    return y, net
