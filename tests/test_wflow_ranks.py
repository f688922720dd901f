"""W-Flow and drifting over ranks: by the means that DDP takes, the step of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import flow_ranks as cases
from support.processes import Found, of_processes


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each rank has found, by case."""
    return of_processes(cases.__file__, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "kind"), cases.cases())
def test_a_step_is_that_of_one_process(ranks: list[Found], name: str, kind: str) -> None:
    want = cases.step(name, kind)
    assert want["gradient"].abs().max() > 1e-3
    for rank in ranks:
        found = rank[f"{name}, {kind}"]
        assert found.keys() == want.keys()
        for key, exact in want.items():
            torch.testing.assert_close(found[key], exact, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", cases.LOSSES)
def test_micro_batches_are_one_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = cases.step(name, "guided")
    for parts in (2, 5, 1000):
        monkeypatch.setitem(cases.LOSSES, name, replace(cases.LOSSES[name], micro_batches=parts))
        found = cases.step(name, "guided")
        for key, exact in want.items():
            torch.testing.assert_close(found[key], exact, rtol=1e-12, atol=1e-12, msg=key)


def test_micro_batches_keep_the_activations_of_one() -> None:
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[-1] += t.numel()
        return t

    def steps(micro_batches: int) -> torch.Tensor:
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 256), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(256, 2)
        )
        kept.append(0)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            noise, real = torch.randn(2, 64, 4), torch.randn(64, 2)
            flow = cases.WFlow(micro_batches=micro_batches, resample=False)
            loss, _ = flow(net, noise, real)
        loss.backward()
        grad = next(net.parameters()).grad
        assert grad is not None
        return grad

    steps(1)
    steps(8)
    assert kept[1] < kept[0] / 8  # inputs of the parts, and what the loss keeps


def test_the_adversarial_weight_is_that_of_the_batch(ranks: list[Found]) -> None:
    want = cases.adaptive()
    assert 0.01 < want < 10
    for rank in ranks:
        torch.testing.assert_close(rank["adaptive"], want, rtol=1e-12, atol=0)


REFUSED = {
    "unsaid": "ranks_hold must be one of ('points', 'groups') for 6 groups, got None",
    "hold": "ranks_hold must be one of ('points', 'groups'), got 'rows'",
    "both": "ranks_hold must be the same on all ranks of process_group, got groups on rank 0",
    "alone": "ranks_hold must be None without process_group, got 'groups'",
    "object": "process_group must be a process group of torch.distributed, got 'gloo'",
    "no data": "noise must not be empty",
    "no groups": "noise must not be empty",
    "points": "the points of x must be the same on all ranks of process_group, got 3 on rank 0",
    "real": "the points of y must be the same on all ranks of process_group, got 3 on rank 0",
    "groups": "the groups of noise must be the same on all ranks",
    "channels": "features['maps'] must be the same on all ranks",
    "features": "features must be [B, C], [B, L, C] or [B, C, H, W]",
    "scale": "scale must be at least 1 and finite, got 0.5",
    "uncond": "uncond must be the same on all ranks",
    "after": "",
}


def test_wrong_calls_raise_on_all_ranks(ranks: list[Found]) -> None:
    for rank in ranks:
        said = rank["refusals"]
        assert said.keys() == REFUSED.keys()
        assert {n: said[n] for n, text in REFUSED.items() if text not in said[n]} == {}
        assert not said["after"]  # ranks are still in step


def test_without_a_group_a_warning_says_what_is_local(ranks: list[Found]) -> None:
    for rank in ranks:
        (text,) = rank["warnings"]
        assert "WFlow: scale, rms and plans are those of this rank's points alone" in text
        assert "WFlow(.., process_group=)" in text
