"""The CUDA kernel of Heun steps: its arithmetic compiled for the host, under a sanitizer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import nan

import pytest
import torch

from support.emulation import Emulator, arrays, emulator, split
from support.heun import KINDS, SHAPES, exact
from tolerances import assert_contract


@pytest.fixture(scope="session")
def run() -> Iterator[Emulator]:
    with emulator("emulate_heun.cpp", "address", optimise="-O1") as running:
        yield running


def header(
    state: torch.dtype,
    network: torch.dtype,
    shape: tuple[int, ...],
    *,
    terms: int,
    rows: int,
    low: bool,
    seeds: bool,
) -> bytes:
    d = torch.Size(shape[1:]).numel()
    double = (state == torch.float64, network == torch.float64)
    return struct.pack("10q", *double, d % 4 == 0, shape[0], d, terms, rows, low, seeds, 2)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=["f32", "pair", "mixed", "f64"])
@pytest.mark.parametrize(("per_sample", "noisy"), [(False, False), (False, True), (True, True)])
def test_combine(
    run: Emulator,
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
        given = [t for t in (x, low, *terms, table[2], seeds) if t is not None]
        rows = table.shape[1]
        asked = header(
            dtype, network, shape, terms=count, rows=rows, low=paired, seeds=noisy
        ) + arrays(*given)
        rest_shape = shape if paired else (0,)
        parts = ((torch.int64, (1,)), (dtype, shape), (dtype, rest_shape), (network, shape))
        finite, high, rest, net = split(run(asked), *parts)
        assert finite.item() == 1
        if x.numel() == 0:
            continue
        y, z = exact(x, low, terms, table, seeds)
        assert_contract("value", high, y)
        assert_contract("value", net, z)
        if paired:
            assert_contract("value", high.double() + rest, y)


def test_what_is_not_finite_is_flagged(run: Emulator) -> None:
    x, f = torch.randn(2, 7), torch.randn(2, 7)
    f[1, 6] = nan
    asked = header(x.dtype, f.dtype, (2, 7), terms=1, rows=1, low=False, seeds=False)
    answer = run(asked + arrays(x, f, torch.ones(8, dtype=torch.float64)))
    assert struct.unpack_from("q", answer) == (0,)
