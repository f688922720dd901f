"""`multistep_sample`: few-step students, by steps that add noise again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep._checks import as_float64, function, one_of
from fewstep._names import Backend, Reuse
from fewstep._torch import wide
from fewstep.ops.heun.engine import FIRST, Run
from fewstep.ops.heun.inputs import check_state, pick
from fewstep.reference.heun import COLUMNS, NOISE, SCALE
from fewstep.samplers.plan import Network
from fewstep.samplers.seeds import seeds_for

MODES: tuple[Reuse, ...] = ("fresh", "line", "reuse")


@torch.no_grad()
def multistep_sample(
    network: Network,
    latents: Tensor,
    *,
    sigmas: Tensor | Sequence[float],
    mode: Reuse = "fresh",
    seeds: Tensor | None = None,
    check_finite: bool | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Draw samples of a few-step generator that predicts the clean endpoint at every level.

    The sampler starts from `x = sigma_0 latents`. At each level it takes `x1 = N(x, sigma)`, which
    is the sample at the last level. Before that it moves to the next level sigma', with new noise
    eta:

        fresh   x = x1 + sigma' eta                    (consistency models, CTM, LMM)
        line    x = x1 + sigma' / sigma (x - x1)       (stays on the line through x and x1)
        reuse   x = x1 + sigma' latents                (the line through the first latents)

    Args:
        network (Callable): `N(x, sigma)` with sigma `[B]`, float32 at least.
        latents (Tensor): standard normal noise `[B, ...]`.
        sigmas (Tensor | Sequence[float]): levels `[K]`, positive and decreasing; see
            `few_step_sigmas`.
        mode (str): "fresh", "line" or "reuse". With levels near the first one "fresh" is close to a
            new draw.
        seeds, check_finite, backend: options of `edm_sample`.

    Returns:
        Tensor: samples of the shape and dtype of latents.

    Raises:
        ValueError: levels that are not positive and decreasing, an unknown mode, seeds of the wrong
            length, an output of another shape, or not finite, with the step.

    Source: Song et al., Consistency models, arXiv 2303.01469, algorithm 1; Matityahu and Fattal,
    LMM, arXiv 2412.06403, section 3.

    >>> import fewstep
    >>> half = lambda x, sigma: x / 2
    >>> fewstep.multistep_sample(half, torch.ones(1, 2), sigmas=[4.0, 1.0], mode="line")
    tensor([[1.2500, 1.2500]])
    """
    function("multistep_sample", "network", network)
    check_state("multistep_sample", latents, "float32", "latents")
    one_of("multistep_sample", "mode", mode, MODES)
    levels = as_float64("multistep_sample", "sigmas", sigmas, torch.device("cpu"))
    positive = levels.ndim == 1 and levels.numel() > 0 and bool((levels > 0).all())
    if not positive or not bool((levels.diff() < 0).all()) or not bool(levels.isfinite().all()):
        raise ValueError(
            f"multistep_sample: sigmas must be positive and decreasing, got {levels.tolist()}"
        )
    seeds = seeds_for("multistep_sample", seeds, latents, mode == "fresh" and len(levels) > 1)
    table = levels.new_zeros((FIRST + len(levels), 1, COLUMNS))
    table[..., SCALE] = 1
    table[1, :, 0] = levels[0]
    ratio = (levels[1:] / levels[:-1])[:, None]
    if mode == "line":
        table[FIRST:-1, :, 0], table[FIRST:-1, :, 1] = ratio, 1 - ratio
    else:
        table[FIRST:-1, :, 1] = 1
        table[FIRST:-1, :, 2 if mode == "reuse" else NOISE] = levels[1:, None]
    table[-1, :, 1] = 1
    name = pick("multistep_sample", latents, backend)
    table = table.to(latents.device)
    run = Run("multistep_sample", name, latents, table, "float32", check_finite, seeds=seeds)
    given = levels.to(latents.device, wide(latents.dtype))[:, None]
    inputs = given.expand(-1, latents.shape[0]).contiguous().unbind()
    run.advance([], 1, 0)
    for k in range(len(levels)):
        endpoint = run.call(network, inputs[k], k)
        run.advance([endpoint, latents] if mode == "reuse" else [endpoint], FIRST + k, k)
    return run.finish()
