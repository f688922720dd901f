"""Compiled kernels for training few-step and one-step generative models."""

from importlib.metadata import version

from fewstep import _library

_library.load_cpp()

from fewstep.ops.heun.solve import HeunResult, heun_solve, heun_step  # noqa: E402
from fewstep.ops.sinkhorn.divergence import (
    ConvergenceWarning,
    DivergenceResult,
    sinkhorn_divergence,
)
from fewstep.ops.sinkhorn.drift import Drift, sinkhorn_drift  # noqa: E402
from fewstep.ops.sinkhorn.implicit import ConvergenceError  # noqa: E402
from fewstep.ops.sinkhorn.solve import SinkhornResult, sinkhorn, transport  # noqa: E402
from fewstep.ops.trace.divergence import Divergence, divergence  # noqa: E402
from fewstep.ops.trace.log_density import LogDensity, log_density  # noqa: E402
from fewstep.samplers.edm import (
    edm_sample,
    few_step_sigmas,
    flow_sample,
    karras_sigmas,
    latents,
    multistep_sample,
)

__version__ = version("fewstep")
__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "Divergence",
    "DivergenceResult",
    "Drift",
    "HeunResult",
    "LogDensity",
    "SinkhornResult",
    "divergence",
    "edm_sample",
    "few_step_sigmas",
    "flow_sample",
    "heun_solve",
    "heun_step",
    "karras_sigmas",
    "latents",
    "log_density",
    "multistep_sample",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_drift",
    "transport",
]
