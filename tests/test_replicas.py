"""Traces of networks in data-parallel wrappers: two processes, each with its own samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from tolerances import CONTRACT64, TANGENTS

SCRIPT = Path(__file__).parent / "support" / "ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [run.communicate(timeout=900)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], told
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_means_over_ranks(ranks: list[dict[str, Any]], kind: str) -> None:
    for found in ranks:
        errors = {name: error for name, error in found.items() if name.startswith(kind)}
        assert errors
        assert {n: e for n, e in errors.items() if not e <= CONTRACT64["gradient"]} == {}


def test_gradients_in_mixed_precision(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["rough: fsdp, mixed precision"] < TANGENTS["gradient"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_agree_on_the_way(ranks: list[dict[str, Any]], kind: str) -> None:
    first, second = (found[f"says: {kind}, one rank refuses"] for found in ranks)
    assert first.startswith("torch.func: another rank refuses it")
    assert second.startswith("torch.func: no rule")
    first, second = (found[f"says: {kind}, one rank raises"] for found in ranks)
    assert first == "divergence: another rank could not compare; see its error"
    assert second.startswith("divergence: engine 'duals' cannot serve this velocity")


def test_what_cannot_be_reduced_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "not seen" in found["says: fsdp, hidden"]
        names = ("fully_shard", "DistributedDataParallel", "torch.autocast")
        for name, text in zip(names, found["says: others"], strict=True):
            assert name in text.split("; ")[-1]
        assert "use DistributedDataParallel" in found["says: fsdp, gradients of gradients"]


def freed_between_layers(net: nn.Module) -> None:
    """Weights exist only while their layer's forward runs, as those of a sharded network."""
    kept: dict[nn.Parameter, Tensor] = {}

    def gather(m: nn.Module, args: Any) -> None:
        for p in m.parameters():
            p.untyped_storage().resize_(kept[p].nbytes)
            p.copy_(kept[p])

    def free(m: nn.Module, args: Any, out: Tensor) -> None:
        for p in m.parameters():
            p.untyped_storage().resize_(0)

    for m in net.children():
        for p in m.parameters():
            kept[p.requires_grad_(False)] = p.detach().clone()
        m.register_forward_pre_hook(gather)
        m.register_forward_hook(free)
        free(m, (), torch.empty(0))


@pytest.mark.parametrize("options", [{"estimator": "exact"}, {"estimator": "hutchinson"}])
@pytest.mark.parametrize("tangents", [None, torch.bfloat16])
def test_weights_that_are_freed_after_their_layer(options: dict[str, Any], tangents: Any) -> None:
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()]
    net, x = nn.Sequential(*layers, nn.Linear(8, 4)), torch.randn(6, 4)
    options = {**options, "tangent_dtype": tangents}
    want = fewstep.divergence(net, x, 0.5, engine="duals", **options)
    freed_between_layers(net)
    boxes: Any = [[[[[[net]]]]]]  # deeper than anyone looks for modules
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = fewstep.divergence(net, x, 0.5, **options)
            with pytest.raises(RuntimeError, match="hand over the module itself"):
                fewstep.divergence(lambda x, t: boxes[0][0][0][0][0][0](x), x, 0.5, **options)
        assert not found.info
        torch.testing.assert_close(found.velocity, want.velocity)
        torch.testing.assert_close(found.value, want.value)
