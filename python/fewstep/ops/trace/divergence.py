"""`divergence`: the trace of a velocity's Jacobian, exactly or by probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.trace.estimator import Divergence, Solver
from fewstep.ops.trace.inputs import Options, check_ids, check_problem, check_time, make_key


def divergence(
    velocity: Callable[..., Any],
    x: Tensor,
    t: float | Tensor,
    *,
    estimator: str = "auto",
    probes: int = 1,
    probe: str = "rademacher",
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    tangent_dtype: torch.dtype | None = None,
    backend: str | None = None,
    engine: str | None = None,
    check: str = "first",
) -> Divergence:
    """Divergence of a velocity field, `tr(dv/dx)` for each sample.

        exact       tr(W3 D2 W2 D1 W1) = d2' [W2 o (W1 W3)'] d1, for linear layers with up to two
                    hidden activations between them: one product of the hidden width, whatever D;
                    other networks: sum_i e_i' J e_i, by D tangents, or for more hidden layers
                    as many as the narrowest has: tr(A B) = tr(B A).
        hutchinson  mean_k v_k' J v_k, with E[v v'] = I; variance 2 (|A|_F^2 - sum A_ii^2) / K for
                    signs and 2 |A|_F^2 / K for Gaussians, A = (J + J') / 2.
        hutch++     probes / 3 products sketch the range of J, as many project on it exactly, and
                    the rest are probes on its complement.
        xtrace      probes / 2 probes, each in turn left out of the sketch that the others make.

    Engines, each for what the one before it cannot serve, with the reason in `info`:

        duals    the primal and all tangents go through the network together, by its own `forward`:
                 each function has a rule in `fewstep.ops.dual`, with a fused forward and backward.
        func     `torch.func`, reverse mode.
        reverse  plain autograd, a pass for each product: whatever trains in eager PyTorch.

    The first time that a network is seen in its modes, some samples go through the engine and
    through plain autograd; where velocity, `v . J v` or gradients differ, the next engine serves,
    with a warning. Probes depend on the seed, the sample's id, the probe's number and the
    coordinate alone; they are not stored, backward draws them again.

    Gradients through `DistributedDataParallel` and `fully_shard` are reduced over ranks as those of
    any loss. For the call and for its backward, the weights of `fully_shard` are gathered whole.

    Args:
        velocity (Callable): a module or function, `velocity(x, t)` of the shape of x; each sample's
            velocity may depend on that sample alone. `torch.nn.Sequential` is called as
            `velocity(x)`.
        x (Tensor): `[B, ...]`, float32 or float64 for the compiled kernels.
        t (float | Tensor): time, a scalar or `[B]`; handed on as it is, floats as `[B]` in
            float32 at least.
        estimator (str): "auto" takes "exact" where it costs less than the probes asked for, else
            "hutchinson". With D probes or more, sketches and "hadamard" signs are "exact", too.
        probes (int): products with the Jacobian, K.
        probe (str): "rademacher"; "hadamard" (signs, distinct random rows of the Hadamard matrix:
            never worse, and exact at `probes = D`); "gaussian"; "sphere".
        seed (int | Tensor): at least 0; an int64 scalar tensor changes without a recompilation.
        sample_ids (Tensor | None): int64 `[B]` in `[0, 2^48)`: a sample keeps its probes in any
            batch. None: its index, so that ranks of a process group draw the same probes: give
            `rank * B + arange(B)` for others.
        tangent_dtype (torch.dtype | None): None: that of x. `torch.bfloat16` with float32 x: the
            tangents are kept in bfloat16, for half the memory, and on a GPU multiplied in it; the
            velocity, activations, norms and sums stay float32. Structural traces and what is left
            to `torch.func` have no such tangents.
        backend (str | None): of the duals' kernels: "cpp", "triton", "reference", or None for the
            fastest one. A named one raises where the network has a function without a rule.
        engine (str | None): "duals", "func" or "reverse", which raises where it cannot serve, or
            None for the first that can.
        check (str): compare with plain autograd "first", "always" or "never". While compiling,
            under `torch.func` and in a CUDA graph's capture nothing is compared. On a GPU a
            comparison waits for the device.

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
