"""Samplers: EDM's, of flows, and few-step ones."""

from fewstep.samplers.edm import edm_sample
from fewstep.samplers.flow import flow_sample
from fewstep.samplers.multistep import multistep_sample
from fewstep.samplers.plan import SamplerStep
from fewstep.samplers.schedules import few_step_sigmas, karras_sigmas
from fewstep.samplers.seeds import latents

__all__ = [
    "SamplerStep",
    "edm_sample",
    "few_step_sigmas",
    "flow_sample",
    "karras_sigmas",
    "latents",
    "multistep_sample",
]
