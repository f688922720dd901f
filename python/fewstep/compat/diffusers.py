"""Networks and schedulers of diffusers as denoisers, velocities, teachers; Heun's as schedulers.

A network takes `x / n`, where `x = a x_data + b eps`, and what it returns has to do with
`D = E[x_data | x]` and `e = E[eps | x]`:

    prediction             n                                output
    epsilon                sqrt(a^2 + b^2)                  e
    sample                 sqrt(a^2 + b^2)                  D
    v_prediction           sqrt(a^2 + b^2)                  (a e - b D) / n
    flow                   a + b                            e - D
    EDM's preconditioning  sqrt((a sigma_data)^2 + b^2)     v of data scaled to unit variance

A denoiser is D at (a, b) = (1, sigma), and a velocity is e - D at (1 - t, t). Neither is computed
from the other, which would divide by zero at an end.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep import conversions
from fewstep._checks import as_float64, function
from fewstep._torch import readable, wide
from fewstep.data.generate import Teacher
from fewstep.data.pairs import digest as digest_of

if TYPE_CHECKING:
    from fewstep.compat.diffusers_schedulers import FlowHeunScheduler, HeunScheduler

__all__ = ["FlowHeunScheduler", "HeunScheduler", "Prediction", "denoiser", "teacher", "velocity"]

# Schedulers by kind; their subclasses are of it too.
_DISCRETE = {
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler"),
    *("DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverSDEScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
}
_EDM = {
    *("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
}
_FLOW = {
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "FlowMatchLCMScheduler",
}
_KINDS = {
    "epsilon": "noise",
    "sample": "denoiser",
    "original_sample": "denoiser",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
# Models whose pipelines hand on the scheduler's timesteps, and those that divide them by 1000.
_AS_THEY_ARE = {
    *("AllegroTransformer3DModel", "CogVideoXTransformer3DModel", "CogView4Transformer2DModel"),
    *("DiTTransformer2DModel", "HunyuanDiT2DModel", "HunyuanVideoTransformer3DModel"),
    *("LatteTransformer3DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"),
    *("UNet2DConditionModel", "UNet2DModel", "UNet3DConditionModel", "WanTransformer3DModel"),
}
_BY_1000 = {
    *("ChromaTransformer2DModel", "Flux2Transformer2DModel", "FluxTransformer2DModel"),
    "QwenImageTransformer2DModel",
}
_SMALLEST = torch.finfo(torch.float32).tiny  # a level where log(sigma) is still finite


def __getattr__(name: str) -> Any:
    if name in ("FlowHeunScheduler", "HeunScheduler"):  # subclasses of diffusers' own
        return getattr(importlib.import_module("fewstep.compat.diffusers_schedulers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class _Scheme:
    """What a scheduler says of its network.

    Attributes:
        kind: prediction, of `fewstep.conversions.KINDS`.
        timestep: function that maps sigma = b / a, float64, to the network's timestep.
        low, high: range of sigma, finite levels within it.
        usual: part of the range that the scheduler samples, where that is not all of it.
        flow: n is a + b.
        data: sigma_data of EDM's preconditioning, else 1.
        sign: factor of the network's output.
        clip: bound of D, or None.
    """

    kind: str
    timestep: Callable[[Tensor], Tensor]
    low: float
    high: float
    flow: bool = False
    data: float = 1.0
    sign: float = 1.0
    clip: float | None = None
    usual: tuple[float, float] | None = None

    @property
    def knows_noise(self) -> bool:
        """Whether the network can be asked about pure noise, sigma = inf."""
        end = self.timestep(torch.tensor(math.inf, dtype=torch.float64))
        return self.kind != "noise" and bool(end.isfinite())


@dataclass(frozen=True)
class _Interpolated:
    """Timesteps between those of a table of sigmas, linear in log(sigma), as diffusers has them.

    Attributes:
        logs: log(sigma) of timesteps 0, 1, ..., float64, finite and increasing.
        noise: timestep of pure noise, or inf.
        end: finite sigma that stands for pure noise, or inf.
    """

    logs: Tensor
    noise: float
    end: float

    def __call__(self, sigma: Tensor) -> Tensor:
        logs, noise = self.logs.to(sigma.device), (sigma == math.inf) | (sigma == self.end)
        log = torch.where(noise, logs[-1], sigma.log())
        index = torch.searchsorted(logs, log.detach(), right=True) - 1
        index = index.clamp(0, len(logs) - 2)
        low, high = logs[index], logs[index + 1]
        share = ((low - log) / (low - high)).clamp(0, 1)
        return torch.where(noise, self.noise, index + share)


def _quarter_log(sigma: Tensor) -> Tensor:
    return 0.25 * sigma.log()


def _time(sigma: float) -> float:
    """t of a flow."""
    return 1.0 if sigma == math.inf else sigma / (1 + sigma)


def _flow_timestep(steps: int, reverse: bool, sigma: Tensor) -> Tensor:
    t = torch.where(sigma == math.inf, 1.0, sigma / (1 + sigma))
    return steps * (1 - t if reverse else t)


def _unchanged(timestep: Tensor) -> Tensor:
    return timestep


def _thousandth(timestep: Tensor) -> Tensor:
    return timestep / 1000


class _Buffer(str):
    """The name of a buffer in place of its tensor."""


class Prediction(nn.Module):
    """A network of diffusers as `D(x, sigma)` or `v(x, t)`, made by `denoiser` or `velocity`.

    The network runs in the dtype of its parameters, and what is done around it in float32 at least.

    Attributes:
        model: network.
        sigma_min, sigma_max: range of the scheduler's noise levels, relative to the data.
        t_min, t_max: that range as times of a flow, `sigma / (1 + sigma)`. t_max is 1 where the
            network knows pure noise: with zero terminal SNR, and for flows.
    """

    def __init__(
        self,
        who: str,
        model: Callable[..., Any],
        scheduler: Any,
        guidance: float | Tensor | None,
        uncond: Mapping[str, Any] | None,
        timestep: Callable[[Tensor], Tensor] | None,
        inputs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        function(who, "model", model)
        self.who, self.model = who, model
        self.scheme = scheme = _scheme(who, scheduler)
        self.timestep = _timestep(who, model, timestep)
        self.noise = who == "velocity" and scheme.knows_noise
        self.sigma_min, self.sigma_max = scheme.usual or (scheme.low, scheme.high)
        self.t_min, self.t_max = _time(self.sigma_min), _time(self.sigma_max)
        if scheme.knows_noise:
            self.t_max = 1.0
        self.guidance = _weight(who, guidance, uncond)
        conditions = [dict(inputs), {**inputs, **(uncond or {})}][: 1 if uncond is None else 2]
        self.conditions = [_each(own, self._put_away) for own in conditions]

    def _put_away(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = _Buffer(f"input_{len(self._buffers)}")
        self.register_buffer(name, value)
        return name

    def extra_repr(self) -> str:
        """What tells it from others with the same weights; `fewstep.data.pairs.digest` sees it."""
        s = self.scheme
        low, high = math.log10(max(s.low, 1e-4)), math.log10(min(s.high, 1e4))
        grid = torch.logspace(low, high, 4096, dtype=torch.float64)
        steps = [round(step, 4) for step in self.timestep(s.timestep(grid)).tolist()]
        own = [self.who, s.kind, s.low, s.high, s.flow, s.data, s.sign, s.clip]
        weight = None if self.guidance is None else self.guidance.tolist()
        sha = hashlib.sha256(repr((own, weight, self.conditions, steps)).encode()).hexdigest()
        return f"{self.who}, {s.kind}, sigma from {s.low:.6g} to {s.high:.6g}, {sha[:16]}"

    def forward(self, x: Tensor, level: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """D(x, sigma) or v(x, t), of the shape and dtype of x.

        Args:
            x (Tensor): points `[B, ...]`.
            level (float | Tensor): sigma or t, a scalar or `[B]`.
            labels (Tensor | None): class labels `[B]`, for the network's `class_labels`.

        Raises:
            ValueError: a level outside of the scheduler's range. The result is NaN there where
                looking at levels would wait for a device.
        """
        s, flow = self.scheme, self.who == "velocity"
        given = torch.as_tensor(level, dtype=torch.float64, device=x.device)
        given = given if given.ndim else given.expand(x.shape[0])
        # A level of any dtype may have been one of float32, as those of schedulers are.
        eps = torch.finfo(level.dtype if isinstance(level, Tensor) else torch.float64).eps
        slack = min(max(64 * eps, 8 * torch.finfo(torch.float32).eps), 4e-3)
        a, b = (1 - given, given) if flow else (torch.ones_like(given), given)
        steps = s.timestep(self._inside(b / a, slack))
        n = a + b if s.flow else (a.square() * s.data**2 + b.square()).sqrt()
        dtype, shape = wide(x.dtype), (-1, *(1,) * (x.ndim - 1))
        scale, a, b = (c.to(dtype).view(shape) for c in (1 / n, a, b))
        own = _dtype_of(self.model) or x.dtype
        out = self._called((x * scale).to(own), self.timestep(steps).to(wide(own)), labels)
        out = s.sign * out.to(dtype)
        if s.kind == "velocity":
            clean, difference = (x - b * out) * scale, out
        else:
            clean, noise = conversions.parts(out, x.to(dtype), a * s.data, b, s.kind)
            clean = s.data * clean
            difference = noise - clean
        clipped = clean if s.clip is None else clean.clamp(-s.clip, s.clip)
        if flow and s.clip is not None:
            difference = difference + (clean - clipped) / b
        return (difference if flow else clipped).to(x.dtype)

    def _inside(self, sigma: Tensor, slack: float) -> Tensor:
        """sigma within the range, at whose ends a level may be rounded by a share of it."""
        s, flow = self.scheme, self.who == "velocity"
        within = slack * (1 + sigma if flow else torch.ones_like(sigma))
        known = (sigma >= s.low * (1 - within)) & (sigma <= s.high * (1 + within))
        endless = sigma == math.inf
        known = torch.where(endless, self.noise, known)
        if readable(known) and not bool(known.all()):
            worst = sigma.detach()[~known][0].item()
            if flow:
                worst, name = _time(worst), "t"
                ends = f"{_time(s.low):.9g} and {_time(s.high):.9g}"
                ends = ends + (", or 1" if self.noise and s.high < math.inf else "")
            else:
                below = "below " if s.high == math.inf else ""
                ends, name = f"{s.low:.9g} and {below}{s.high:.9g}", "sigma"
            cure = "times from t_max to t_min" if flow else "sigma_min and sigma_max"
            raise ValueError(
                f"{self.who}: {name} must be within {ends}, which the network was trained on,"
                f" got {worst:.9g}: give the sampler this object's {cure}"
            )
        held = torch.where(endless, sigma, sigma.clamp(s.low, s.high))
        return torch.where(known, held, math.nan)

    def _called(self, x: Tensor, steps: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output, guided where there are two conditions."""
        outs: list[Tensor] = []
        for kept in self.conditions:
            inputs = _each(kept, lambda v: getattr(self, v) if isinstance(v, _Buffer) else v)
            if labels is not None:
                own = inputs.get("class_labels") if outs else None  # of no class
                inputs["class_labels"] = labels if own is None else own
            if isinstance(classes := inputs.get("class_labels"), int):
                inputs["class_labels"] = torch.full((x.shape[0],), classes, device=x.device)
            outs.append(self._output(self.model(x, timestep=steps, **inputs), x))
        if self.guidance is None:
            return outs[0]
        weight = self.guidance.to(x.device, wide(x.dtype))
        weight = weight.view(-1, *(1,) * (x.ndim - 1)) if weight.ndim else weight
        return outs[1] + weight * (outs[0] - outs[1])

    def _output(self, out: Any, x: Tensor) -> Tensor:
        """The tensor of an output; its first half of channels where the others are variances."""
        out = out.sample if hasattr(out, "sample") else out
        out = out[0] if isinstance(out, tuple) else out
        if out.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]
        if out.shape != x.shape:
            raise ValueError(
                f"{self.who}: model must return {tuple(x.shape)}, or twice the channels where it"
                f" predicts variances, got {tuple(out.shape)}"
            )
        return out  # type: ignore[no-any-return]


def denoiser(
    model: Callable[..., Any],
    scheduler: Any,
    *,
    guidance: float | Tensor | None = None,
    uncond: Mapping[str, Any] | None = None,
    timestep: Callable[[Tensor], Tensor] | None = None,
    **inputs: Any,
) -> Prediction:
    """A network of diffusers as a denoiser `D(x, sigma)`, for `fewstep.edm_sample` and others.

    Here `x = x_data + sigma eps`, whatever the path that the network was trained on. Between the
    scheduler's timesteps those of a level are interpolated as by its Euler and Heun schedulers. D
    is what they call `pred_original_sample`, clipped where the scheduler says `clip_sample`.

    Args:
        model (Callable): network, called as `model(x, timestep=, **inputs)`. The result is a
            tensor, a tuple that begins with one, or has it as `sample`.
        scheduler (SchedulerMixin): scheduler that the network was trained for. Its timesteps need
            not be set. Those with `alphas_cumprod` may predict epsilon, the sample or v, those of
            flow matching the velocity, those of EDM epsilon or v.
        guidance (float | Tensor | None): weight w of classifier-free guidance, a scalar or `[B]`,
            as the pipelines have it: `uncond + w (cond - uncond)` of the network's outputs.
        uncond (Mapping[str, Any] | None): inputs of the unconditional call, in place of those.
        timestep (Callable | None): function of the scheduler's timesteps that gives the network's,
            as the model's pipeline has it. Default: as they are, and a thousandth for Flux and
            others whose pipelines say so.
        inputs: other inputs of the network, as `encoder_hidden_states` and `class_labels`, for the
            whole batch.

    Returns:
        Prediction: module `D(x, sigma)`. With `D.sigma_min` and `D.sigma_max` the sampler stays
        within what the network knows.

    Raises:
        NotImplementedError: a scheduler, or an option of it, that is not served.
        ValueError: a scheduler's prediction_type or sigmas that make no sense; guidance without
            uncond or the other way round; a model of diffusers whose pipeline changes timesteps in
            a way that is not known here, without `timestep`.

    >>> class Half(nn.Module):  # predicts the noise in data of variance 0
    ...     def forward(self, x, timestep):
    ...         return x
    >>> from diffusers import DDIMScheduler
    >>> D = denoiser(Half(), DDIMScheduler(clip_sample=False))
    >>> round(D.sigma_max, 1), D(torch.ones(1, 2), 1.0)
    (157.4, tensor([[0.2929, 0.2929]]))
    """
    return Prediction("denoiser", model, scheduler, guidance, uncond, timestep, inputs)


def velocity(
    model: Callable[..., Any],
    scheduler: Any,
    *,
    guidance: float | Tensor | None = None,
    uncond: Mapping[str, Any] | None = None,
    timestep: Callable[[Tensor], Tensor] | None = None,
    **inputs: Any,
) -> Prediction:
    """A network of diffusers as a velocity `v(x, t)`, for `fewstep.flow_sample` and others.

    Here `x = (1 - t) x_data + t eps`, and v predicts `eps - x_data`. A network of another path is
    asked at `sigma = t / (1 - t)`. At t = 1, which is zero terminal SNR, networks that predict v,
    the sample or a flow are exact where their schedule has that end; those that predict the noise
    know nothing about the data there, and t = 1 is an error. Methods that start at 1, as
    `MarginalReflow`, may take `lambda x, t: v(x, t.clamp_max(v.t_max))`.

    Args:
        model, scheduler, guidance, uncond, timestep, inputs: arguments of `denoiser`.

    Returns:
        Prediction: module `v(x, t)`, for t from `v.t_max` to `v.t_min`.

    Raises:
        NotImplementedError, ValueError: as `denoiser`.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> v = velocity(lambda x, timestep: x * timestep[:, None], FlowMatchEulerDiscreteScheduler())
    >>> v(torch.ones(1, 2), 0.5)
    tensor([[500., 500.]])
    """
    return Prediction("velocity", model, scheduler, guidance, uncond, timestep, inputs)


def teacher(
    model: Callable[..., Any],
    scheduler: Any,
    shape: Sequence[int],
    *,
    classes: int = 0,
    digest: str = "",
    guidance: float | Tensor | None = None,
    uncond: Mapping[str, Any] | None = None,
    timestep: Callable[[Tensor], Tensor] | None = None,
    **inputs: Any,
) -> Teacher:
    """A network of diffusers as the teacher of `fewstep.pairs.generate`.

    Args:
        model, scheduler, guidance, uncond, timestep, inputs: arguments of `denoiser`.
        shape (Sequence[int]): shape of one image.
        classes (int): number of classes, handed on as `class_labels`; 0 for none.
        digest (str): name of the weights, in place of their checksum; needed where model is no
            module.

    Returns:
        Teacher: teacher whose digest covers weights, schedule, guidance and inputs.

    Raises:
        NotImplementedError, ValueError: as `denoiser`, and as `Teacher`.
    """
    if not digest and not isinstance(model, nn.Module):
        raise ValueError("teacher: digest must be given where model is no nn.Module, got ''")
    options: dict[str, Any] = {"guidance": guidance, "uncond": uncond, "timestep": timestep}
    own = denoiser(model, scheduler, **options, **inputs)
    if classes and own.guidance is not None and "class_labels" not in (uncond or {}):
        raise ValueError(f"teacher: uncond must have class_labels for no class, got {uncond!r}")
    if digest:
        inputs_alone = nn.Module()
        for name, buffer in own.named_buffers(recurse=False):
            inputs_alone.register_buffer(name, buffer)
        digest = f"{digest}, {own.extra_repr()}, inputs {digest_of(inputs_alone)[:16]}"
    return Teacher(own, tuple(shape), classes, digest=digest)


def _each(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A structure of dicts, lists and tuples with each of its leaves replaced."""
    if isinstance(value, Mapping):
        return {k: _each(v, leaf) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(v, leaf) for v in value)
    return leaf(value)


def _dtype_of(model: Callable[..., Any]) -> torch.dtype | None:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


def _weight(
    who: str, guidance: float | Tensor | None, uncond: Mapping[str, Any] | None
) -> Tensor | None:
    if (guidance is None) != (uncond is None):
        missing = "uncond" if uncond is None else "guidance"
        raise ValueError(
            f"{who}: {missing} must be given too, got guidance={guidance!r}, uncond={uncond!r}"
        )
    if guidance is None:
        return None
    if not isinstance(uncond, Mapping) or not uncond:
        raise ValueError(f"{who}: uncond must be inputs by their names, got {uncond!r}")
    weight = as_float64(who, "guidance", guidance)
    if weight.ndim > 1 or not bool(weight.isfinite().all()):
        raise ValueError(f"{who}: guidance must be finite, a scalar or [B], got {guidance!r}")
    return weight


def _timestep(
    who: str, model: Callable[..., Any], timestep: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    """What a model's pipeline makes of the scheduler's timesteps."""
    if timestep is not None:
        function(who, "timestep", timestep)
        return timestep
    kind = type(_bare(model))
    names = {own.__name__ for own in kind.__mro__ if own.__module__[:10] == "diffusers."}
    if names & _BY_1000:
        return _thousandth
    if kind.__module__[:10] == "diffusers." and not names & _AS_THEY_ARE:
        raise ValueError(
            f"{who}: timestep must be given for {kind.__name__}, whose pipeline may change"
            " the scheduler's timesteps: a function of them, as lambda t: t. Where the pipeline"
            " changes the output too, as its sign, hand over a module that does so"
        )
    return _unchanged


def _bare(model: Any) -> Any:
    """The model within a method, `torch.compile`, DistributedDataParallel or a PEFT model."""
    while True:
        get = getattr(model, "get_base_model", None)
        inside = (
            getattr(model, "__self__", None),
            getattr(model, "func", None) if isinstance(model, partial) else None,
            getattr(model, "_orig_mod", None),
            getattr(model, "module", None) if isinstance(model, nn.Module) else None,
            get() if callable(get) else None,
        )
        found = next((own for own in inside if own is not None), None)
        if found is None or found is model:
            return model
        model = found


def _option(scheduler: Any, name: str, default: Any = None) -> Any:
    """An option of a scheduler; its config may hold those of another one that it was made from."""
    own = any(name in inspect.signature(kind).parameters for kind in type(scheduler).__mro__[:-1])
    return scheduler.config.get(name, default) if own else default


def _scheme(who: str, scheduler: Any) -> _Scheme:
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    option, own = partial(_option, scheduler), type(scheduler).__name__
    if not names & (_DISCRETE | _EDM | _FLOW):
        raise NotImplementedError(
            f"{who}: scheduler {own} is not served: pass one that the network was trained for, of"
            f" {sorted(_DISCRETE | _EDM | _FLOW)}, or give fewstep.edm_sample a D(x, sigma) of your"
            " own"
        )
    if option("thresholding"):
        raise NotImplementedError(
            f"{who}: thresholding=True of {own} is not served:"
            f" {own}.from_config(scheduler.config, thresholding=False) is, for fewstep.edm_sample"
        )
    steps = option("num_train_timesteps", 1000)
    if names & _FLOW:
        reverse = bool(option("invert_sigmas", False))
        return _flow("velocity", steps, reverse)
    prediction = option("prediction_type", "epsilon")
    kind = _KINDS.get(prediction)
    if kind is None:
        raise ValueError(f"{who}: prediction_type must be one of {(*_KINDS,)}, got {prediction!r}")
    if names & _EDM:
        sign = {"epsilon": -1.0, "v_prediction": 1.0}.get(prediction)
        if sign is None:
            raise ValueError(
                f"{who}: prediction_type of {own} must be 'epsilon' or 'v_prediction', got"
                f" {prediction!r}"
            )
        data = float(option("sigma_data", 0.5))
        usual = float(scheduler.config.sigma_min), float(scheduler.config.sigma_max)
        ends = _SMALLEST, math.inf
        return _Scheme("v", scheduler.precondition_noise, *ends, data=data, sign=sign, usual=usual)
    flow = bool(option("use_flow_sigmas", False))
    if flow != (kind == "velocity") and (not flow or kind == "v"):
        raise NotImplementedError(
            f"{who}: prediction_type={prediction!r} of {own} with use_flow_sigmas={flow} is not"
            " served: a flow has prediction_type='flow_prediction' and use_flow_sigmas=True"
        )
    if flow:
        return _flow(kind, steps)
    clip = float(option("clip_sample_range", 1.0)) if option("clip_sample", False) else None
    own_table = _discrete(who, scheduler, kind, clip)
    if option("timestep_type", "discrete") != "continuous" or kind != "v":
        return own_table
    low, high = option("sigma_min"), option("sigma_max")
    usual = low or own_table.low, high or own_table.high
    return _Scheme(kind, _quarter_log, _SMALLEST, math.inf, clip=clip, usual=usual)


def _flow(kind: str, steps: int, reverse: bool = False) -> _Scheme:
    timestep = partial(_flow_timestep, steps, reverse)
    low = _SMALLEST if kind == "denoiser" else 0.0
    return _Scheme(kind, timestep, low, math.inf, flow=True, sign=-1.0 if reverse else 1.0)


def _discrete(who: str, scheduler: Any, kind: str, clip: float | None) -> _Scheme:
    """Of a table of alphas, whose sigmas are in float32, as diffusers has them.

    With zero terminal SNR the last sigma is inf, or a number in its place that may be below others.
    """
    alphas = scheduler.alphas_cumprod.detach().cpu()
    sigmas = ((1 - alphas) / alphas) ** 0.5
    last, end = len(sigmas) - 1, float(sigmas[-1])
    noise = end == math.inf or bool(_option(scheduler, "rescale_betas_zero_snr", False))
    sigmas = sigmas[:-1] if noise else sigmas
    fine = bool((sigmas.diff() > 0).all() & sigmas.isfinite().all() & (sigmas > 0).all())
    if len(sigmas) < 2 or not fine:
        raise ValueError(
            f"{who}: alphas_cumprod of {type(scheduler).__name__} must decrease between 1 and 0,"
            f" got {alphas.tolist() if last < 8 else alphas[[0, 1, -2, -1]].tolist()}"
        )
    low, high = float(sigmas[0]), float(sigmas[-1])
    logs = sigmas.double().log()
    if not noise:
        return _Scheme(kind, _Interpolated(logs, math.inf, math.inf), low, high, clip=clip)
    usual = None if end == math.inf else (low, end)
    timestep = _Interpolated(logs, float(last), end)
    return _Scheme(
        kind, timestep, low, max(high, usual[1] if usual else 0.0), clip=clip, usual=usual
    )
