"""Networks as training has them: norms of a batch, buffers, dropout, ranks, sharded weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fewstep.toys import GaussianMixture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.methods import MarginalReflow
from support.networks import DropPath, Of
from support.rows import Velocity, assert_right, quiet, rows
from tolerances import assert_contract


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Timed(nn.Module):
    """A network that t is handed to."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ELU])
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_data_parallel_reduces(
    group: None, activation: type[nn.Module], options: dict[str, bool]
) -> None:
    """Every parameter's gradient goes through the reducer, or a clear error says what to do."""
    net = Timed(nn.Linear(4, 8), activation(), nn.Linear(8, 4))
    wrapped = nn.parallel.DistributedDataParallel(net, **options)
    reduced: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        reduced.append(len(bucket.gradients()))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    x = torch.randn(6, 4)
    for _ in range(3):
        reduced.clear()
        net.zero_grad()
        try:
            out = fewstep.divergence(wrapped, x, 0.0, estimator="hutchinson", probes=2)
            (out.value.mean() + out.velocity.square().mean()).backward()
        except ValueError as error:
            assert "DistributedDataParallel" in str(error)  # noqa: PT017
            return
        found = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
        assert sum(reduced) == 4
        net.zero_grad()
        out = fewstep.divergence(net, x, 0.0, estimator="hutchinson", probes=2)
        (out.value.mean() + out.velocity.square().mean()).backward()
        for a, p in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)


SHARDED = """
import sys, torch, fewstep
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
x = torch.randn(256, 4)
ways = "exact", "hutchinson"
want = [fewstep.divergence(net, x, 0.5, estimator=e) for e in ways]
kept = {}
def gather(m, args):
    for p in m.parameters(recurse=False):
        p.untyped_storage().resize_(kept[p].numel() * 4)
        p.data.copy_(kept[p])
def free(m, args, out):
    for p in m.parameters(recurse=False):
        p.untyped_storage().resize_(0)
for m in net:
    for p in m.parameters():
        kept[p] = p.detach().clone()
        p.requires_grad_(False)
        p.untyped_storage().resize_(0)
    m.register_forward_pre_hook(gather)
    m.register_forward_hook(free)
for e, w in zip(ways, want):
    try:
        out = fewstep.divergence(net, x, 0.5, estimator=e)
    except (ValueError, RuntimeError) as error:
        assert "weight" in str(error) or "storage" in str(error), error
    else:
        torch.testing.assert_close(out.velocity, w.velocity)
        torch.testing.assert_close(out.value, w.value)
"""


def test_weights_that_exist_in_their_layer_alone() -> None:
    """As sharded layers free them: used inside the layer, or refused; never read when freed."""
    ran = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_refusal_is_not_remembered_after_eval() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, 8))
    x = torch.randn(16, 8)
    fewstep.divergence(net.train(), x, 0.0)
    assert fewstep.divergence(net.eval(), x, 0.0).info == ""


def test_forwards_are_few() -> None:
    """A function that falls back does not try again at every call."""
    calls = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.cumsum(self.layer(x).tanh(), -1)

    net, x = Counted(), torch.randn(3, 4)
    for _ in range(3):
        fewstep.divergence(net, x, 0.0)
    calls = 0
    fewstep.divergence(net, x, 0.0)
    assert calls <= 2


class Averaged(nn.Module):
    """Normalises by a running mean that forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return torch.tanh(self.layer(x - self.mean))


def normed(**options: bool) -> nn.Sequential:
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8, **options), nn.SiLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "auto"])
def test_batch_norm_in_training(estimator: str) -> None:
    """Refused with what to do, its counters as they were; right after it."""
    net = normed().double().train()
    before = {k: b.clone() for k, b in net.named_buffers()}
    x = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        fewstep.divergence(net, x, 0.0, estimator=estimator)
    for k, b in net.named_buffers():
        assert torch.equal(b, before[k])
    assert assert_right(by_sample(net.eval()), x).info == ""


def by_sample(net: nn.Module) -> Velocity:
    return lambda x, t: net(x)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_batch_norm_without_statistics(estimator: str) -> None:
    """It mixes samples in evaluation too."""
    net = normed(track_running_stats=False)
    for own in (net.train(), net.eval()):
        with pytest.raises(ValueError, match="samples"):
            fewstep.divergence(own, torch.randn(6, 4), 0.0, estimator=estimator)


def test_batch_norm_in_training_says_what_to_do() -> None:
    for net in (nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))):
        velocity = SimpleNamespace(net=net)
        with pytest.raises(ValueError, match=r"eval\(\)"):
            fewstep.divergence(lambda x, t, v=velocity: v.net(x), torch.randn(6, 4), 0.0)


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_buffers_that_forward_updates(estimator: str) -> None:
    """Updated once, as by one call, or not at all and refused with what to do."""
    net, x = Averaged(), torch.randn(6, 4)
    once = 0.1 * x.mean(0)
    try:
        out = fewstep.divergence(net, x, 0.0, estimator=estimator)
    except ValueError as error:
        assert "eval()" in str(error)  # noqa: PT017
        assert torch.equal(net.mean, torch.zeros(4))
    else:
        torch.testing.assert_close(net.mean, once)
        torch.testing.assert_close(out.velocity, torch.tanh(net.layer(x - once)))


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("make", [partial(nn.Dropout, 0.5), partial(DropPath, 0.5)])
def test_one_mask_a_call(make: Callable[[], nn.Module], estimator: str) -> None:
    """Dropout in training: the trace is that of the velocity that is returned."""
    net = Of(lambda x, t, drop: drop(x), make()).train()
    x = torch.randn(16, 4) + 3
    for _ in range(2):
        with quiet():
            out = fewstep.divergence(net, x, 0.0, estimator=estimator)
        torch.testing.assert_close(out.value, (out.velocity / x).sum(1))
        assert 0 < float((out.velocity == 0).float().mean()) < 1


class Attended(nn.Module):
    """Attention beside a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        q, k, v = F.elu(self.qkv(x)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_training_through_attention(estimator: str, whole: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, batch_first=True) if whole else Attended()
    net, x = net.double(), torch.randn(2, 3, 4, dtype=torch.float64)

    def velocity(x: Tensor, t: Any) -> Tensor:
        return net(x, x, x)[0] if whole else net(x, t)  # type: ignore[no-any-return]

    options = {"probes": 12, "probe": "hadamard"} if estimator == "hutchinson" else {}
    out = fewstep.divergence(velocity, x, 0.0, estimator=estimator, **options)
    (out.value.sum() + out.velocity.square().sum()).backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        v, jacobian = rows(lambda a: velocity(a, 0), x.clone().requires_grad_())
    (jacobian.diagonal(dim1=1, dim2=2).sum() + v.square().sum()).backward()
    want = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(found) == len(want) > 0
    for a, b in zip(found, want, strict=True):
        assert_contract("gradient", a, b)


@pytest.mark.parametrize("ids", [None, torch.tensor([5, 7, 9])])
def test_a_loss_has_probes_of_its_own_on_each_rank(ids: Tensor | None) -> None:
    """By ids, which differ between ranks where they are given."""
    net, x = nn.Linear(8, 8), torch.randn(3, 8)
    teacher = GaussianMixture(torch.zeros(1, 8), torch.ones(1, 8))
    losses = []
    for offset in (0, 100):
        own = None if ids is None else ids + offset
        generator = torch.Generator().manual_seed(0)
        loss = MarginalReflow()(
            lambda x, t: net(x), teacher, x, generator=generator, sample_ids=own
        )
        losses.append(float(loss[0].detach()))
    assert (losses[0] == losses[1]) == (ids is None)


@pytest.mark.filterwarnings("ignore:divergence.*disagree")
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_scripted_modules_train(estimator: str) -> None:
    """In the first calls, when they are profiled, and after."""
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)))
    net, x = scripted.double(), torch.randn(3, 4, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)).double()
    plain.load_state_dict(net.state_dict())
    _, jacobian = rows(plain, x.clone().requires_grad_())
    want = torch.autograd.grad(jacobian.diagonal(dim1=1, dim2=2).sum(), plain[0].weight)[0]
    options = {"probes": 4, "probe": "hadamard"} if estimator == "hutchinson" else {}
    for _ in range(3):
        net.zero_grad()
        out = fewstep.divergence(lambda x, t: net(x), x, 0.0, estimator=estimator, **options)
        out.value.sum().backward()
        assert_contract("gradient", dict(net.named_parameters())["0.weight"].grad, want)
