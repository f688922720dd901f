"""The contenders of every case, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.registry import GRAD_RTOL, STREAMED, AnyCase, Case, Workload

# With bfloat16 in it, 8 bits: a value is the sum of products that are larger than itself.
LOW_RTOL = 0.05
# A row says so where other processes kept more cores than this busy while it was timed: libraries
# that wait at a barrier for every thread are then slower by orders of magnitude.
BUSY_CORES = 0.2


@dataclass(frozen=True)
class Contender:
    """Who is timed.

    Attributes:
        package: the distribution that must be installed and whose version is reported.
        kind: a backend of ours, plain torch, or another library (`--peers`).
        definitions: the workloads that it serves, and the one of `peers.DEFINITIONS` that it must
            agree with in each. "alternating" has the envelope's gradient, "unrolled" the same value
            and the gradient through all iterations.
        devices: where it runs.
        note: what differs from the plain alternating iteration of a solve.
        low: less exact than float32: bfloat16, or differences.
        also: packages that it needs beside its own.
    """

    name: str
    label: str
    package: str
    kind: Literal["fewstep", "torch", "peer"]
    definitions: Mapping[Workload, str]
    devices: tuple[str, ...] = ("cpu", "cuda")
    note: str = ""
    low: bool = False
    also: tuple[str, ...] = ()

    def enters(self, case: AnyCase) -> bool:
        """Whether it is timed on this case; the reference only where that is quick.

        What keeps nothing is for the sweep, which names it.
        """
        if case.workload not in self.definitions or (self.name == "reference" and not case.quick):
            return False
        if not case.contenders:
            return self.name != STREAMED
        return self.name in case.contenders

    def definition_for(self, case: AnyCase) -> str:
        """The entry of `definitions`, less the distinction that only gradients make."""
        name = self.definitions[case.workload]
        return "alternating" if name == "unrolled" and not case.backward else name

    def allowed(self, case: AnyCase) -> tuple[float, float]:
        """Errors of values and gradients that it may have."""
        return (LOW_RTOL, LOW_RTOL) if self.low else (case.value_rtol, GRAD_RTOL)

    def note_for(self, case: AnyCase) -> str:
        if not isinstance(case, Case):
            return self.note
        if case.workload != "solve":
            return ""
        unrolled = case.backward and self.definition_for(case) == "unrolled"
        notes = [self.note, "gradient through all iterations" if unrolled else ""]
        return "; ".join(filter(None, notes))


_GEOMLOSS = "averaged (symmetric) updates, as many soft-mins"
_KERNEL: Mapping[Workload, str] = {"solve": "alternating"}
_FEWSTEP: Mapping[Workload, str] = {
    "solve": "alternating",
    "divergence": "symmetric",
    "drift": "drift",
    "trace": "trace",
    "trace-training": "trace-training",
    "log-density": "log-density",
    "edm": "edm",
    "attention": "attention",
}


_TRACES: Mapping[Workload, str] = {w: w for w in ("trace", "trace-training", "log-density")}
_FIXED: Mapping[Workload, str] = {"trace": "trace", "log-density": "log-density-fixed"}
_TRAINED: Mapping[Workload, str] = {"trace": "trace", "trace-training": "trace-training"}
_FIXED_TRAINED: Mapping[Workload, str] = {**_FIXED, **_TRAINED}
_JVPS: Mapping[Workload, str] = {w: w for w in ("jvp", "meanflow", "jvp-training")}
_STEP: Mapping[Workload, str] = {w: w for w in ("jvp", "meanflow")}
_PLAIN: Mapping[Workload, str] = {w: f"plain-{w}" for w in (*_TRACES, "edm", "attention", *_JVPS)}
_TORCH: Mapping[Workload, str] = {
    "solve": "unrolled",
    "divergence": "geomloss",
    "drift": "drift",
    "edm": "edm",
    "attention": "attention",
}


_AVERAGED: Mapping[Workload, str] = {"solve": "averaged", "divergence": "geomloss"}


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("cpp", "fewstep (cpp)", "fewstep", "fewstep", {**_FEWSTEP, **_JVPS}, ("cpu",)),
        Contender(STREAMED, "fewstep (cpp), nothing kept", "fewstep", "fewstep", _KERNEL, ("cpu",)),
        Contender("triton", "fewstep (triton)", "fewstep", "fewstep", _KERNEL, ("cuda",)),
        Contender("cuda", "fewstep (cuda)", "fewstep", "fewstep", _KERNEL, ("cuda",)),
        Contender("reference", "fewstep (reference)", "fewstep", "fewstep", _FEWSTEP),
        Contender("eager", "eager torch", "torch", "torch", _TORCH),
        Contender(
            "compile", "torch.compile", "torch", "torch", {**_TORCH, "trace": "trace", **_STEP}
        ),
        Contender(
            "geomloss-tensorized",
            "geomloss tensorized",
            "geomloss",
            "peer",
            _AVERAGED,
            note=_GEOMLOSS,
        ),
        Contender(
            "geomloss-online",
            "geomloss online",
            "geomloss",
            "peer",
            _AVERAGED,
            note=_GEOMLOSS,
            also=("pykeops",),
        ),
        Contender("pykeops", "KeOps", "pykeops", "peer", {"solve": "unrolled"}),
        Contender(
            "pot",
            "POT",
            "pot",
            "peer",
            {"solve": "unrolled"},
            note="forms the plan too, and checks it every 10 iterations",
        ),
        Contender(
            "ott-jax",
            "OTT-JAX (jit)",
            "ott-jax",
            "peer",
            {"solve": "alternating", "divergence": "ott"},
        ),
        Contender(
            "cpp-solve",
            "fewstep (cpp), within a solve",
            "fewstep",
            "fewstep",
            _FIXED,
            ("cpu",),
            note="probes and weights as in the call before: their products are kept",
        ),
        Contender(
            "cpp-bf16",
            "fewstep (cpp), bfloat16 tangents",
            "fewstep",
            "fewstep",
            _TRAINED,
            ("cpu",),
            low=True,
        ),
        Contender("plain", "network alone", "torch", "torch", _PLAIN),
        Contender(
            "reverse",
            "flow_matching-style",
            "torch",
            "torch",
            _FIXED_TRAINED,
            note="a reverse pass for each of its fixed probes, re-implemented",
        ),
        Contender(
            "ffjord",
            "FFJORD-style",
            "torch",
            "torch",
            {w: f"{d}-gaussian" for w, d in _FIXED_TRAINED.items()},
            note="a fixed Gaussian probe, the graph always built; re-implemented",
        ),
        Contender(
            "autocast",
            "flow_matching-style, autocast",
            "torch",
            "torch",
            _TRAINED,
            note="products of network and passes in bfloat16",
            low=True,
        ),
        Contender(
            "torch-func",
            "torch.func",
            "torch",
            "torch",
            {"trace": "trace", "attention": "attention", **_JVPS},
        ),
        Contender("forward-ad", "forward_ad", "torch", "torch", {"jvp": "jvp"}),
        Contender(
            "separate",
            "py-meanflow-style",
            "torch",
            "torch",
            {"meanflow": "meanflow"},
            note="torch.func.jvp without gradients, then a second forward pass; re-implemented",
        ),
        Contender(
            "central",
            "central differences",
            "torch",
            "torch",
            _STEP,
            note="tangents to 1 % or so",
            low=True,
        ),
        Contender("double-backward", "double backward", "torch", "torch", _JVPS),
        Contender(
            "zuko",
            "zuko-style",
            "torch",
            "torch",
            {"trace": "trace"},
            note="one batched reverse pass with the identity, re-implemented",
        ),
        Contender(
            "k-diffusion",
            "k-diffusion-style",
            "torch",
            "torch",
            {"edm": "edm"},
            note="its sample_heun, re-implemented",
        ),
        Contender("diffusers", "diffusers Heun", "diffusers", "peer", {"edm": "edm"}),
        Contender("torchdiffeq", "torchdiffeq heun2", "torchdiffeq", "peer", {"edm": "edm"}),
    )
}
