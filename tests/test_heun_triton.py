"""Triton's Heun steps in its interpreter (on a GPU: compiled) against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fewstep
from fewstep.ops.heun import dispatch
from support.denoisers import gaussian
from support.heun import KINDS, SHAPES, Field, combine_into, exact
from tolerances import assert_contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# What the CUDA kernels do is the same: they run where there is a device.
BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=["f32", "pair", "mixed", "f64"])
@pytest.mark.parametrize(("per_sample", "noisy"), [(False, False), (True, True)])
def test_combine(
    backend: str,
    shape: tuple[int, ...],
    kind: tuple[torch.dtype, torch.dtype, bool],
    per_sample: bool,
    noisy: bool,
) -> None:
    dtype, network, paired = kind
    table = torch.randn(3, shape[0] if per_sample else 1, 8, dtype=torch.float64)
    seeds = torch.arange(shape[0]) * 2**33 + 5 if noisy else None
    x = torch.randn(shape, dtype=dtype)
    low = 1e-8 * torch.randn(shape) if paired else None
    for count in range(3):
        terms = [torch.randn(shape, dtype=network) for _ in range(count)]
        y, z = exact(x, low, terms, table, seeds)
        high, net = (
            torch.empty_like(x, device=DEVICE),
            torch.empty(shape, dtype=network, device=DEVICE),
        )
        rest = torch.empty_like(high) if paired else None
        wrong = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        combine_into(
            *(backend, x.to(DEVICE), None if low is None else low.to(DEVICE)),
            *([t.to(DEVICE) for t in terms], table.to(DEVICE), 2),
            seeds=None if seeds is None else seeds.to(DEVICE),
            high=high,
            out_low=rest,
            net=net,
            wrong=wrong,
        )
        assert not wrong
        if x.numel() == 0:
            continue
        assert_contract("value", high.cpu(), y)
        assert_contract("value", net.cpu(), z)
        if rest is not None:
            assert_contract("value", (high.double() + rest).cpu(), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_flagged(backend: str) -> None:
    x, table = (
        torch.randn(2, 1500, device=DEVICE),
        torch.ones(1, 1, 8, dtype=torch.float64, device=DEVICE),
    )
    for place in (0, 1499):
        wrong = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        f = torch.zeros_like(x)
        f[1, place] = torch.nan
        combine_into(backend, x, None, [f], table, 0, high=torch.empty_like(x), wrong=wrong)
        assert wrong.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_a_solve(backend: str) -> None:
    net, times = Field().double().to(DEVICE), torch.linspace(0, 1, 3)
    x = torch.randn(2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    grads: list[tuple[Tensor, ...]] = []
    for name in (backend, "reference"):
        end = fewstep.heun_solve(net, x, times, backend=name).x
        grads.append(torch.autograd.grad(end.square().sum(), [x, *net.parameters()]))
    for own, other in zip(*grads, strict=True):
        assert_contract("gradient", own.cpu(), other.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampler(backend: str) -> None:
    latents, seeds = torch.randn(3, 5, device=DEVICE), torch.arange(3, device=DEVICE)
    options: dict[str, Any] = {"S_churn": 10.0, "steps": 4, "seeds": seeds}
    options |= {"guidance": 1.5, "uncond": gaussian(0.5)}
    for state in ("float32", "compensated", "float64"):
        own = fewstep.edm_sample(gaussian(1.0), latents, state=state, backend=backend, **options)
        other = fewstep.edm_sample(gaussian(1.0), latents, backend="reference", **options)
        assert_contract("value", own.cpu(), other.double().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_sampler_in_a_graph(backend: str, dtype: torch.dtype) -> None:
    net = torch.nn.Linear(8, 8, device="cuda", dtype=dtype)
    latents, seeds = torch.randn(16, 8, device="cuda", dtype=dtype), torch.arange(16, device="cuda")
    options: dict[str, Any] = {
        "S_churn": 5.0,
        "seeds": seeds,
        "backend": backend,
        "precondition": 0.5,
    }

    def network(x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = net(x) + c[:, None]
        return out

    plain = fewstep.edm_sample(network, latents, **options)
    for _ in range(2):
        replayed = fewstep.edm_sample(network, latents, cuda_graph=True, **options)
        assert torch.equal(replayed, plain)
    other = fewstep.edm_sample(network, 2 * latents, cuda_graph=True, sigma_max=20.0, **options)
    assert torch.equal(other, fewstep.edm_sample(network, 2 * latents, sigma_max=20.0, **options))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_opcheck() -> None:
    ops = dispatch._triton()
    x, table = (
        torch.randn(3, 4, device=DEVICE),
        torch.randn(2, 3, 8, dtype=torch.float64, device=DEVICE),
    )
    torch.library.opcheck(
        ops.heun_combine.default, (x.requires_grad_(), None, [x.detach()], table, 1, False, True)
    )
    out = [torch.zeros_like(x.detach()) for _ in range(3)]
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    seeds = torch.arange(3, device=DEVICE)
    arguments = (x.detach(), None, [x.detach()], table, 1, seeds, *out, flag)
    torch.library.opcheck(ops.heun_combine_out.default, arguments)
