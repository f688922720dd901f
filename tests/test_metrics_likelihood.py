"""Bits per dimension against laws whose probabilities of integers are known."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.metrics import bits_per_dim, dequantize
from tolerances import assert_contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [2, 3, 256])
def test_values_stay_in_their_cells(levels: int, dtype: torch.dtype) -> None:
    k = torch.arange(levels).repeat(500)
    x = dequantize(k, levels=levels, dtype=dtype)
    assert x.dtype == dtype
    if dtype != torch.bfloat16:  # which has fewer digits than cells
        assert torch.equal(((x.double() + 1) * levels / 2).floor().long(), k)
    assert bool((x >= -1).all() & (x < 1).all())


def test_draws_are_uniform_and_repeat() -> None:
    k = torch.full((100_000,), 7, dtype=torch.uint8)
    rng = [torch.Generator().manual_seed(3) for _ in range(2)]
    x, again = (dequantize(k, dtype=torch.float64, generator=g) for g in rng)
    assert torch.equal(x, again)
    u = (x + 1) * 128 - 7
    assert abs(float(u.mean()) - 0.5) < 0.005
    assert abs(float(u.var()) - 1 / 12) < 0.002


def test_bits_of_a_piecewise_constant_law() -> None:
    """Where the density is constant in each cell the bound is the entropy of the integers."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    k = torch.tensor([[0, 1, 2, 3, 0, 1]])
    x = dequantize(k, levels=4, dtype=torch.float64)
    cell = ((x + 1) * 2).floor().long()
    log_density = (p[cell] / 0.5).log().sum(-1)  # cells are 1/2 wide
    exact = -p[k].log2().mean(-1)
    assert_contract("value", bits_per_dim(log_density, 6, levels=4), exact)


def test_the_bound_of_a_smooth_law() -> None:
    """Bits by a density exceed those by the law's own probabilities, and hardly for fine cells."""
    sd, levels = 0.2, 256
    edges = torch.linspace(-1, 1, levels + 1, dtype=torch.float64) / sd
    p = torch.special.ndtr(edges).diff()
    k = torch.multinomial(p, 50_000, replacement=True)
    x = dequantize(k[:, None], dtype=torch.float64)
    log_density = -(x / sd).square().sum(-1) / 2 - math.log(sd * math.sqrt(2 * math.pi))
    own = -p[k].log2()
    excess = float((bits_per_dim(log_density, 1) - own).mean())
    assert -1e-4 < excess < 5e-4


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="values must be from 0 to 255, got 0 to 256"):
        dequantize(torch.tensor([0, 256]))
    with pytest.raises(ValueError, match="values must be from 0 to 3, got -1 to 2"):
        dequantize(torch.tensor([-1, 2]), levels=4)
    with pytest.raises(TypeError, match=r"values must be a Tensor of integers, got torch\.float32"):
        dequantize(torch.zeros(2))
    with pytest.raises(ValueError, match="dimensions must be an integer of at least 1, got 0"):
        bits_per_dim(torch.zeros(2), 0)
    with pytest.raises(ValueError, match="levels must be an integer of at least 2, got 1"):
        bits_per_dim(torch.zeros(2), 3, levels=1)
    with pytest.raises(TypeError, match="log_density must be a floating Tensor"):
        bits_per_dim(torch.zeros(2, dtype=torch.int64), 3)
    assert dequantize(torch.empty(0, 3, dtype=torch.uint8)).shape == (0, 3)
