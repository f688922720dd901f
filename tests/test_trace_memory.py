"""What `divergence` keeps for backward: no probe, and no stack that can be made again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.reference.probe import probes
from support.traces import F64, FIRST, saved
from support.velocity_nets import TimeMLP


def test_no_probe_is_kept_for_backward() -> None:
    """Saved: x, and the stack before and after each activation, twice what plain training keeps."""
    net = TimeMLP(64, 32, 2)
    x, t = torch.randn(16, 64), torch.rand(16)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def size(run: Callable[[], Tensor]) -> int:
        storages = [z.untyped_storage() for z in saved(run)[1]]
        return sum(s.nbytes() for s in storages if s.data_ptr() not in own)

    plain = size(lambda: net(x, t))
    ours = size(lambda: fewstep.divergence(net, x, t, estimator="hutchinson").value)
    hidden = 4 * 16 * 32 * 4  # bytes: four stacks of activations
    assert ours <= plain + hidden + 64


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("estimator", ["hutchinson", "exact"])
def test_no_network_keeps_the_stack_that_it_starts_with(name: str, estimator: str) -> None:
    """The gradients are those with the stack kept: where hooks are forbidden it is."""
    make, shape = FIRST[name]
    net, x, t = make().to(F64), torch.randn(shape, dtype=F64), torch.rand(4, dtype=F64)
    x.requires_grad_()
    inputs = [x, *net.parameters()]
    probes_ = 3 if estimator == "hutchinson" else 48

    if estimator == "exact":
        v = torch.eye(48, dtype=F64)[:, None].expand(-1, 4, -1)
    else:
        v = probes(torch.zeros(3, dtype=torch.int64), None, (3, 4, 48), "rademacher", F64)

    def drawn(z: Tensor) -> bool:
        return z.numel() >= v.numel() and torch.equal(z.flatten()[-v.numel() :], v.flatten())

    def value() -> Tensor:
        out = fewstep.divergence(net, x, t, estimator=estimator, probes=probes_)
        assert not out.info
        return out.value.square().sum()

    out, seen = saved(value)
    assert not any(map(drawn, seen))
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        expected = torch.autograd.grad(value(), inputs, allow_unused=True)
    for again in (True, False):  # the graph is kept for a second backward
        found = torch.autograd.grad(out, inputs, allow_unused=True, retain_graph=again)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_stacks_are_made_again_under_hooks_and_checkpoints() -> None:
    make, shape = FIRST["convolution"]
    net, t = make().to(F64), torch.rand(4, dtype=F64)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    ids = torch.tensor([7, 3, 2**40, 0])
    inputs = [x, *net.parameters()]

    def value(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, t, estimator="hutchinson", probes=2, sample_ids=ids)
        return out.value.square().sum()

    expected = torch.autograd.grad(value(x), inputs)
    moved = 0

    def pack(z: Tensor) -> Tensor:
        nonlocal moved
        moved += 1
        return z.clone()

    def hooked(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
            return value(x)

    for way in (
        hooked,
        lambda x: checkpoint(value, x, use_reentrant=False),
        lambda x: checkpoint(value, x, use_reentrant=True),
    ):
        for p in inputs:
            p.grad = None
        way(x).backward()
        for p, want in zip(inputs, expected, strict=True):
            torch.testing.assert_close(p.grad, want)
    assert moved > 15  # hooks around ours get all that is kept
    checkpointed = saved(lambda: checkpoint(value, x, use_reentrant=False))[1]  # type: ignore[arg-type]
    assert len([p for p in checkpointed if p.numel() > 0]) <= 1

    def parts(x: Tensor) -> Tensor:
        return fewstep.divergence(net, x, t[:1], estimator="hutchinson").value

    own = torch.randn(1, 3, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(parts, own)


@pytest.mark.parametrize("name", ["convolution", "norm"])
def test_inputs_changed_in_place_are_refused(name: str) -> None:
    make, shape = FIRST[name]
    net, x, t = make(), torch.randn(shape), torch.rand(4)
    for changed in (x, next(iter(net.parameters()))):
        out = fewstep.divergence(net, x, t, estimator="hutchinson", probes=2)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            out.value.sum().backward()
    grads = []
    for change in (0, 1):
        ids = torch.arange(4)
        out = fewstep.divergence(net, x, t, estimator="hutchinson", sample_ids=ids)
        ids += change
        grads.append(torch.autograd.grad(out.value.sum(), list(net.parameters())[:1]))
    assert torch.equal(*grads[0], *grads[1])
