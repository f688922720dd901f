"""Tensor cores as Triton's compiler lays out their fragments, a second reading of the manual.

PTX_DEVICE=a100 takes mma.sync, h100 wgmma where it can (tf32 only here).
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
import triton
import triton.language as tl

from ptx import sim, triton_driver

triton_driver.activate(sim.ARCH)


@triton.jit
def product(
    A,
    B,
    C,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    HOW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    if TRANSPOSED:
        b = tl.trans(tl.load(B + n[:, None] * K + k[None, :]))
    else:
        b = tl.load(B + k[:, None] * N + n[None, :])
    tl.store(
        C + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=HOW).to(C.dtype.element_ty)
    )


KINDS = [
    (torch.float16, "tf32", 1e-6),
    (torch.bfloat16, "tf32", 1e-6),
    (torch.float32, "tf32", 2e-3),
    (torch.float32, "tf32x3", 3e-6),
    (torch.float64, "ieee", 1e-14),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 32, 64), (128, 64, 32)], ids=str)
@pytest.mark.parametrize(("dtype", "how", "bound"), KINDS, ids=lambda v: str(v))
def test_product(
    dtype: torch.dtype, how: str, bound: float, shape: tuple[int, int, int], transposed: bool
) -> None:
    if sim.ARCH == 90 and dtype.itemsize == 2 and shape[0] >= 64:
        pytest.skip("wgmma on halves is not interpreted")
    m, n, k = shape
    a, b = (
        torch.randn(m, k, dtype=torch.float64).to(dtype),
        torch.randn(k, n, dtype=torch.float64).to(dtype),
    )
    c = torch.empty(m, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    sim.findings()
    product[(1,)](
        a,
        b.T.contiguous() if transposed else b,
        c,
        m,
        n,
        k,
        how,
        transposed,
        num_warps=4,
        enable_fp_fusion=True,
    )
    exact = a.double() @ b.double()
    assert ((c - exact).abs().max() / exact.abs().max()).item() < bound
    assert not sim.findings()
    kinds = {r.kind for r in sim.counters()}
    assert "tensor" in kinds or dtype == torch.float64
