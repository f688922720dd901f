"""Philox and the probes drawn from it: known answers, the same bits everywhere, their moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.ops.dual import dispatch
from fewstep.reference.probe import PROBES, philox, probes
from support.probes import IDS, KEY


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # known answers of Random123 for philox4x32, 10 rounds
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert tuple(int(w) for w in philox(words(*counter), key)) == answer  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("d", [1, 2, 3, 33, 130, 784])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_draw_the_bits_of_the_reference(
    capability: str, kind: str, d: int, dtype: torch.dtype
) -> None:
    count = min(3, d)
    actual = dispatch.probe("cpp", torch.empty(4, d, dtype=dtype), KEY, IDS, count, kind)
    expected = probes(KEY, IDS, (count, 4, d), kind, dtype)
    if kind in ("rademacher", "hadamard"):
        assert torch.equal(actual, expected)
        assert set(actual.unique().tolist()) <= {-1.0, 1.0}
    else:  # logarithms and norms of two libraries differ in the last place
        ulps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual, expected, rtol=ulps, atol=ulps)


@pytest.mark.parametrize("kind", PROBES)
def test_dot_and_scale_draw_the_same_probes(capability: str, kind: str) -> None:
    y, g = torch.randn(3 * 4, 37), torch.randn(3, 4)
    v = probes(KEY, IDS, (3, 4, 37), kind, torch.float32)
    dots = dispatch.probe_dot("cpp", y, KEY, IDS, 3, kind)
    torch.testing.assert_close(dots, (v * y.reshape(3, 4, 37)).sum(-1), rtol=1e-5, atol=1e-5)
    scaled = dispatch.probe_scale("cpp", g, KEY, IDS, 37, kind)
    torch.testing.assert_close(scaled, v * g[..., None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PROBES)
def test_a_sample_keeps_its_probes_in_any_batch(kind: str) -> None:
    whole = dispatch.probe("cpp", torch.empty(4, 9), KEY, IDS, 3, kind)
    for i in range(4):
        alone = dispatch.probe("cpp", torch.empty(1, 9), KEY, IDS[i : i + 1], 3, kind)
        assert torch.equal(alone[:, 0], whole[:, i])
    fewer = dispatch.probe("cpp", torch.empty(4, 9), KEY, IDS, 2, kind)
    assert torch.equal(fewer, whole[:2])


@pytest.mark.parametrize("kind", PROBES)
def test_second_moment_is_the_identity(kind: str) -> None:
    v = probes(torch.tensor((1, 0, 0)), None, (2, 20000, 5), kind, torch.float64)
    moment = torch.einsum("kbi,kbj->ij", v, v) / 40000
    assert (moment - torch.eye(5)).abs().max() < 0.04  # 5 standard deviations of a Gaussian's


def test_every_part_of_the_key_counts() -> None:
    def draw(key: tuple[int, int, int], sample: int) -> Tensor:
        ids = torch.tensor([sample])
        return probes(torch.tensor(key), ids, (1, 1, 256), "rademacher", torch.float32)

    base = draw((1, 1, 1), 1)
    changed = [draw((2, 1, 1), 1), draw((1 + 2**33, 1, 1), 1), draw((1, 2, 1), 1)]
    changed += [draw((1, 1, 2), 1), draw((1, 1, 1), 2), draw((1, 1, 1), 1 + 2**33)]
    for other in changed:
        assert 90 < int((base != other).sum()) < 166  # half of 256, 5 standard deviations


def test_hadamard_rows_are_orthogonal_and_distinct() -> None:
    v = probes(KEY, IDS, (64, 4, 64), "hadamard", torch.float64)
    assert torch.equal(torch.einsum("kbi,lbi->bkl", v, v), 64 * torch.eye(64).expand(4, 64, 64))
