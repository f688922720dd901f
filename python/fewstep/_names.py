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
