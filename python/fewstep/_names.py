"""The names that options take, for type checkers and editors; each op checks them itself."""

from __future__ import annotations

from typing import Literal

Backend = Literal["reference", "cpp", "cuda", "triton", "keops"]
CostName = Literal["sqeuclidean", "half_sqeuclidean", "euclidean", "cosine", "dot", "l1"]
DistanceCost = Literal["half_sqeuclidean", "sqeuclidean", "euclidean"]
Update = Literal["alternating", "symmetric", "averaged"]
Precision = Literal["tf32x3", "tf32", "float32"]
Form = Literal["split", "joint"]
Estimator = Literal["auto", "exact", "hutchinson", "hutch++", "xtrace"]
Check = Literal["first", "always", "never"]
Engine = Literal["duals", "func", "reverse"]
Probe = Literal["rademacher", "hadamard", "gaussian", "sphere"]
OdeMethod = Literal["euler", "heun"]
Tracker = Literal["trace", "logdet", "series"]
SamplerTracker = Literal["trace", "logdet"]
SamplerSolver = Literal["heun", "euler", "dpm++2m"]
State = Literal["float32", "compensated", "float64"]
Reuse = Literal["fresh", "line", "reuse"]
Grid = Literal["edm_subset", "uniform_sigma", "uniform_s"]
Kind = Literal["velocity", "denoiser", "noise", "score", "v", "dx/dalphas_cumprod"]
TimePath = Literal["noise-at-1", "data-at-1", "ve", "vp"]
Law = Literal["uniform", "levels", "sot"]
Metric = Literal["l2", "pseudo_huber", "lpips"]
Start = Literal["teacher", "student"]
WindowWeight = Literal["one", "t^2"]
Parameterisation = Literal["edm", "unified"]
PairsDtype = Literal["float32", "float16"]
