"""Compiled kernels for training few-step and one-step generative models."""

import importlib
from importlib.metadata import version
from typing import Any

from fewstep import _aliases, _library

_library.load_cpp()
_aliases.install()

from fewstep.ops.dual.custom import register_rule
from fewstep.ops.heun.solve import HeunResult, heun_solve, heun_step
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning
from fewstep.ops.sinkhorn.divergence import DivergenceResult, sinkhorn_divergence
from fewstep.ops.sinkhorn.drift import Drift, sinkhorn_drift
from fewstep.ops.sinkhorn.newton import ConvergenceError
from fewstep.ops.sinkhorn.potentials import eps_for_entropy, from_potentials
from fewstep.ops.sinkhorn.result import SinkhornResult
from fewstep.ops.sinkhorn.solve import sinkhorn, transport
from fewstep.ops.trace.divergence import divergence
from fewstep.ops.trace.estimator import Divergence
from fewstep.ops.trace.explain import Explanation, explain
from fewstep.ops.trace.jvp import Jvp, jvp
from fewstep.ops.trace.log_density import LogDensity, log_density
from fewstep.ops.trace.targets import Target, meanflow_target, scm_target
from fewstep.samplers.edm import edm_sample
from fewstep.samplers.flow import flow_sample
from fewstep.samplers.multistep import multistep_sample
from fewstep.samplers.schedules import few_step_sigmas, karras_sigmas
from fewstep.samplers.seeds import latents

__version__ = version("fewstep")
__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "Divergence",
    "DivergenceResult",
    "Drift",
    "Explanation",
    "HeunResult",
    "Jvp",
    "LogDensity",
    "SinkhornResult",
    "Target",
    "divergence",
    "edm_sample",
    "eps_for_entropy",
    "explain",
    "few_step_sigmas",
    "flow_sample",
    "from_potentials",
    "heun_solve",
    "heun_step",
    "jvp",
    "karras_sigmas",
    "latents",
    "log_density",
    "meanflow_target",
    "multistep_sample",
    "register_rule",
    "scm_target",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_drift",
    "transport",
    "verify",
]

# Imported when first asked for.
_SUBMODULES = (
    "cli",
    "conversions",
    "data",
    "func",
    "info",
    "kernels",
    "methods",
    "metrics",
    "networks",
    "training",
    "verification",
)
# What stands in modules that are imported when first asked for; `load` needs the extra `train`.
_FUNCTIONS = {"load": "training.registry", "verify": "verification.report"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"fewstep.{_FUNCTIONS[name]}"), name)
    if name in _SUBMODULES or f"fewstep.{name}" in _aliases.ALIASES:
        return importlib.import_module(f"fewstep.{name}")
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_FUNCTIONS})
