"""`divergence`: the trace of a velocity's Jacobian, exactly or by probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep._names import Backend, Check, Engine, Estimator, Probe
from fewstep.ops.trace.estimator import Divergence, Solver
from fewstep.ops.trace.inputs import Options, check_ids, check_problem, check_time, make_key


def divergence(
    velocity: Callable[..., Any],
    x: Tensor,
    t: float | Tensor,
    *,
    estimator: Estimator = "auto",
    probes: int = 1,
    probe: Probe = "rademacher",
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    tangent_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    engine: Engine | None = None,
    check: Check = "first",
) -> Divergence:
    """Divergence of a velocity field, `tr(dv/dx)` for each sample.

        exact       tr(W3 D2 W2 D1 W1) = d2' [W2 o (W1 W3)'] d1 for an MLP with one or two hidden
                    layers. It costs one matrix product of hidden size, independent of D. Other
                    networks: sum_i e_i' J e_i, by D tangents, or by as many as the narrowest hidden
                    layer of a deeper MLP has, since tr(A B) = tr(B A).
        hutchinson  mean_k v_k' J v_k, with E[v v'] = I. Its variance is
                    2 (|A|_F^2 - sum A_ii^2) / K for signs and 2 |A|_F^2 / K for Gaussians, with
                    A = (J + J') / 2.
        hutch++     probes / 3 products sketch the range of J, as many project on it exactly, and
                    the rest are probes on its complement.
        xtrace      probes / 2 probes, each of which is left out in turn of the sketch that the
                    others make.

    Gradients of `value` by hutch++ and xtrace hold their sketch's basis Q constant. For hutch++
    they are unbiased, and differ from those of the same sketch and probes.

    Three engines are tried in order. Each serves what the one before it cannot, and `info` has the
    reason:

        duals    run the network's own `forward` on the primal and all tangents together. Each
                 function has a rule in `fewstep.ops.dual`, with a fused forward and backward.
        func     is `torch.func` in reverse mode.
        reverse  is plain autograd, with a pass for each product. It serves whatever trains in eager
                 PyTorch.

    The first time a network is seen in its modes, some samples go through the engine and through
    plain autograd. Where velocity, `v . J v` or gradients differ, the next engine serves, with a
    warning. Probes depend on the seed, the sample's id, the probe's number and the coordinate. They
    are not stored; backward draws them again.

    Gradients through `DistributedDataParallel` and `fully_shard` are reduced over ranks like those
    of any loss. The weights of `fully_shard` are gathered whole for the call and for its backward.

    Args:
        velocity (Callable): module or function, `velocity(x, t)` of the shape of x. Each sample's
            velocity may depend on that sample alone. `torch.nn.Sequential` is called as
            `velocity(x)`.
        x (Tensor): `[B, ...]`, float32 or float64 for the compiled kernels.
        t (float | Tensor): time, a scalar or `[B]`. Tensors are handed on as they are, floats as
            `[B]` in float32 at least.
        estimator (str): "auto", "exact", "hutchinson", "hutch++" or "xtrace". "auto" is "exact"
            where that costs less than the probes asked for, and "hutchinson" otherwise. With D
            probes or more, sketches and "hadamard" signs are exact too.
        probes (int): number K of products with the Jacobian.
        probe (str): "rademacher"; "hadamard", which are signs from distinct random rows of the
            Hadamard matrix, never worse and exact at `probes = D`; "gaussian"; "sphere".
        seed (int | Tensor): seed of the probes, at least 0. An int64 scalar tensor changes without
            a recompilation.
        sample_ids (Tensor | None): int64 `[B]` in `[0, 2^48)`. A sample keeps its probes in any
            batch. Default: its index. The ranks of a process group then draw the same probes; give
            `rank * B + arange(B)` for different ones.
        tangent_dtype (torch.dtype | None): dtype of the tangents. `torch.bfloat16` with float32 x
            takes half the memory, and on a GPU multiplies in bfloat16. Velocity, activations, norms
            and sums stay float32. Structural traces and what is left to `torch.func` ignore it.
            Default: that of x.
        backend (str | None): kernels of the duals: "cpp", "triton" or "reference". A backend that
            is named raises where the network has a function without a rule. Default: as for
            `fewstep.sinkhorn`, the fastest, on a GPU of those that have matched float64 there.
        engine (str | None): "duals", "func" or "reverse", which raises where it cannot serve.
            Default: the first that can.
        check (str): how often to compare with plain autograd, "first", "always" or "never". Nothing
            is compared while compiling, under `torch.func` and in a CUDA graph's capture. On a GPU
            a comparison waits for the device.

    Returns:
        Divergence: differentiable with respect to parameters, x and t.

    Raises:
        ValueError: an unknown estimator, probe, backend, engine, check or tangent_dtype; a velocity
            that mixes samples, as BatchNorm in training does; probes below 1, above D
            for "hadamard", below 3 for "hutch++", odd, below 4 or above 2 D for "xtrace";
            "hadamard" with either; t that is not finite or neither a scalar nor `[B]`; ids, or a
            velocity, of the wrong shape.
        TypeError: x, ids or seed of the wrong dtype.

    Source: Hutchinson, A stochastic estimator of the trace, 1990; Grathwohl et al., FFJORD, 2019,
    equation 8; hutch++: Meyer et al. 2021; xtrace: Epperly, Tropp, Webber 2024.

    >>> import fewstep
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> x = torch.randn(5, 3)
    >>> out = fewstep.divergence(net, x, 0.0)
    >>> out.estimator, torch.allclose(out.velocity, net(x), atol=1e-6), out.value.shape
    ('exact (structural)', True, torch.Size([5]))
    """
    options = Options(estimator, probes, probe, backend, tangent_dtype, engine, check)
    check_problem(options, x, "divergence")
    ids = check_ids(sample_ids, x)
    t = check_time(t, x)
    solver = Solver(velocity, options, ids)
    return solver(x, t, make_key(seed))
