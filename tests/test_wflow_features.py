from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fewstep.methods import WFlow, features, problems

G, N, Z = 3, 6, 5


def plan(x: Tensor, z: Tensor, eps: float, b: Tensor, max_iter: int) -> Tensor:
    """Columns of weight zero have none of it."""
    log_k = -(x[:, None] - z[None]).square().sum(2) / (2 * eps)
    log_b = b.log() + math.log(len(x))
    log_v = torch.where(b > 0, 0.0, log_b)
    for _ in range(max_iter):
        log_u = -torch.logsumexp(log_k + log_v, 1)
        log_v = log_b - torch.logsumexp(log_k + log_u[:, None], 0)
    return (log_u[:, None] + log_k + log_v).exp()


def average(x: Tensor, z: Tensor, eps: float, b: Tensor, max_iter: int) -> Tensor:
    weights = plan(x, z, eps, b / b.sum(), max_iter)
    return weights / weights.sum(1, keepdim=True) @ z


def vectors(t: Tensor, n: int) -> Tensor:
    """Features `[G n, ...]` as `[G, n, L, C]`, by hand."""
    if t.ndim == 2:
        t = t[:, :, None, None]
    elif t.ndim == 3:
        t = t.transpose(1, 2)[..., None]
    samples, c, h, w = t.shape
    rows = [t[i, :, a, b] for i in range(samples) for a in range(h) for b in range(w)]
    return torch.stack(rows).reshape(samples // n, n, h * w, c)


def dense_loss(flow: WFlow, types: list[tuple[Tensor, ...]], w: Tensor) -> Tensor:
    """The loss of types (x, x', y[, u]), in loops over groups and locations."""
    several = flow.eps if isinstance(flow.eps, tuple) else (flow.eps,)
    losses = []
    for made in types:
        x, x2, y, *u = (vectors(t, len(t) // G) for t in made)
        d, targets, own_scale = x.shape[3], torch.zeros_like(x), torch.ones_like(x)
        for groups in [[g] for g in range(G)] if flow.per_group else [list(range(G))]:
            sums, mass = torch.zeros(()).double(), torch.zeros(()).double()
            for g, k in itertools.product(groups, range(x.shape[2])):
                clouds = [(x, 1.0), (x2, 1.0), (y, 1.0)]
                if u and flow.guide == "distribution":
                    clouds.append((u[0], float(w[g]) * x2.shape[1] / u[0].shape[1]))
                for cloud, weight in clouds:
                    pairs = (x[g, :, None, k] - cloud[g, None, :, k]).square().sum(2).detach()
                    sums, mass = sums + weight * pairs.sum(), mass + weight * pairs.numel()
            s = (sums / mass / d).sqrt()
            for e in several:
                v = torch.zeros_like(x.detach())
                for g, k in itertools.product(groups, range(x.shape[2])):
                    p, p2, q = (t[g, :, k].detach() / s for t in (x, x2, y))
                    eps, ones = e * d, torch.ones_like(p2[:, 0])
                    to_real = average(p, q, eps, torch.ones_like(q[:, 0]), flow.max_iter)
                    if not u:
                        v[g, :, k] = to_real - average(p, p2, eps, ones, flow.max_iter)
                        continue
                    r = u[0][g, :, k] / s
                    if flow.guide == "distribution":
                        b = torch.cat([ones, w[g] * len(p2) / len(r) * torch.ones_like(r[:, 0])])
                        away = average(p, torch.cat([p2, r]), eps, b, flow.max_iter)
                        v[g, :, k] = to_real - away
                        continue
                    v[g, :, k] = to_real - average(p, p2, eps, ones, flow.max_iter)
                    away = average(p, r, eps, torch.ones_like(r[:, 0]), flow.max_iter)
                    v[g, :, k] += w[g] * (to_real - away)
                rms = v[groups].square().mean().sqrt() if flow.normalize else 1.0
                targets[groups] += flow.step_size * (v / rms)[groups]
            own_scale[groups] = s
        losses.append(((x / own_scale) - (x.detach() / own_scale + targets)).square().mean())
    total = torch.stack(losses)
    return total.mean() if flow.reduction == "mean" else total.sum()


class Encoder(nn.Module):
    """Types of every rank: maps, tokens and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(2, 3, 3, padding=1)
        self.tokens = nn.Conv2d(2, 4, 2, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.maps(images).tanh()
        tokens = self.tokens(images).sigmoid().flatten(2).transpose(1, 2)
        return {"maps": maps, "tokens": tokens, "vector": maps.mean((2, 3)).square()}


def scene(
    *, m: int = N, u: int = 4
) -> tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Parameter], dict[str, Tensor], Encoder]:
    torch.manual_seed(0)
    net, encoder = nn.Linear(Z + G, 2 * 4 * 2).double(), Encoder().double()
    for p in encoder.parameters():
        p.requires_grad_(False)

    def generator(z: Tensor, labels: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(labels, G)
        return net(torch.cat([z, one_hot], 1)).reshape(-1, 2, 4, 2).tanh()

    inputs = {
        "noise": torch.randn(2, G, N, Z, dtype=torch.float64),
        "real": torch.randn(G, m, 2, 4, 2, dtype=torch.float64) + 0.5,
        "labels": torch.tensor([2, 0, 1]),
        "uncond": torch.randn(G, u, 2, 4, 2, dtype=torch.float64),
    }
    return generator, list(net.parameters()), inputs, encoder


OPTIONS: list[dict[str, Any]] = [
    {},
    {"per_group": True},
    {"reduction": "sum", "step_size": 0.5},
    {"eps": (0.02, 0.3)},
    {"eps": (0.02, 0.3), "normalize": False, "per_group": True},
    {"guide": "velocity"},
    {"guide": "distribution"},
    {"guide": "distribution", "per_group": True},
]


@pytest.mark.parametrize("memory_limit", [2**28, 1, 4000])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_its_gradient_against_loops(
    options: dict[str, Any], backend: str, memory_limit: int
) -> None:
    """Chunks of one problem, of some locations and of all, by the definition."""
    generator, parameters, inputs, encoder = scene()
    flow = WFlow(
        **{"eps": 0.1, "max_iter": 7, **options}, backend=backend, memory_limit=memory_limit
    )
    noise, real, labels = inputs["noise"], inputs["real"], inputs["labels"]
    guided = {"uncond": inputs["uncond"], "guidance": torch.tensor([0.5, 0.0, 1.5])}
    loss, metrics = flow(
        generator, noise, real, labels, features=encoder, **(guided if flow.guide else {})
    )
    actual = torch.autograd.grad(loss, parameters)

    conditions = labels.repeat_interleave(N)
    samples = [generator(z.flatten(0, 1), conditions) for z in noise]
    samples += [real.flatten(0, 1)] + ([inputs["uncond"].flatten(0, 1)] if flow.guide else [])
    made = [encoder(t) for t in samples]
    types = [tuple(m[name] for m in made) for name in made[0]]
    expected = dense_loss(flow, types, guided["guidance"].double())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(actual, gradients, rtol=1e-8, atol=1e-11)
    names = {f"{name}/{key}" for name in ("drift", "scale") for key in made[0]}
    assert metrics.keys() == {"drift", "scale", "residual"} | names
    assert not any(t.requires_grad for t in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"form": "joint"}, {"eps": (0.02, 0.2)}], ids=str)
def test_vectors_of_all_values_are_the_loss_without_features(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    generator, parameters, inputs, _ = scene()
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}

    def call(**options_of_call: Any) -> list[Tensor]:
        loss, metrics = WFlow(**options)(
            lambda z, k: generator(z.double(), k).to(dtype),
            guidance=0.3,
            **given,
            **options_of_call,
        )
        return [loss, *torch.autograd.grad(loss, parameters), *metrics.values()]

    for t, expected in zip(call(features=lambda x: x.flatten(1)), call(), strict=True):
        assert torch.equal(t, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "joint"},
        {"form": "joint", "resample": False},
        {"resample": False},
        {"eps": (0.1, 1.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("per_group", [False, True])
def test_chunks_change_nothing_but_the_rounding(options: dict[str, Any], per_group: bool) -> None:
    generator, parameters, inputs, encoder = scene()

    def call(memory_limit: int) -> list[Tensor]:
        flow = WFlow(**options, per_group=per_group, memory_limit=memory_limit)
        guided = {} if options.get("eps") else {"guidance": torch.tensor([0.0, 0.4, 2.0])}
        given = {k: t for k, t in inputs.items() if guided or k != "uncond"}
        loss, metrics = flow(generator, features=encoder, **given, **guided)
        return [loss, *torch.autograd.grad(loss, parameters), *metrics.values()]

    for t, expected in zip(call(1), call(2**28), strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-10, atol=1e-12)


def test_features_of_reals_that_are_ready() -> None:
    generator, _, inputs, encoder = scene()
    called: list[int] = []

    def counted(samples: Tensor) -> dict[str, Tensor]:
        called.append(len(samples))
        return encoder(samples)

    def ready(samples: Tensor) -> dict[str, Tensor]:
        own = encoder(samples.flatten(0, 1))
        return {name: t.unflatten(0, samples.shape[:2]) for name, t in own.items()}

    flow = WFlow()
    expected, _ = flow(generator, features=encoder, guidance=0.2, **inputs)
    given = {**inputs, "real": ready(inputs["real"]), "uncond": ready(inputs["uncond"])}
    loss, _ = flow(generator, features=counted, guidance=0.2, **given)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert called == [G * N, G * N]

    as_list, _ = flow(
        generator,
        features=lambda t: list(encoder(t).values()),
        guidance=0.2,
        **{**given, "real": list(given["real"].values()), "uncond": list(given["uncond"].values())},
    )
    assert torch.equal(as_list, loss)


def test_only_generated_features_keep_a_graph() -> None:
    generator, _, inputs, encoder = scene()
    seen: list[bool] = []

    def watched(samples: Tensor) -> dict[str, Tensor]:
        made = encoder(samples)
        seen.append(made["maps"].requires_grad)
        return made

    for p in encoder.parameters():
        p.requires_grad_()
    WFlow()(generator, features=watched, guidance=0.2, **inputs)
    assert seen == [True, False, False, False]


def test_gradients_reach_a_trained_encoder_too() -> None:
    generator, _, inputs, encoder = scene()
    for p in encoder.parameters():
        p.requires_grad_()
    inputs.pop("uncond")
    loss, _ = WFlow()(generator, features=encoder, **inputs)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_autocast_and_bfloat16_features_are_computed_in_float32() -> None:
    net, encoder = nn.Linear(4, 8), nn.Linear(8, 6)
    noise, real = torch.randn(2, 2, 16, 4), torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for limit in (1, 2**28):
            loss, metrics = WFlow(memory_limit=limit)(net, noise, real, features=encoder)
            assert loss.dtype == metrics["scale"].dtype == torch.float32
            net.zero_grad()
            loss.backward()
            assert net.weight.grad is not None


@pytest.mark.parametrize("memory_limit", [1, 2**28])
def test_nan_and_inf_come_out(memory_limit: int) -> None:
    for bad in (math.nan, math.inf):
        x, x2, y = torch.randn(3, 2, 8, 3)
        x[1, 0, 0] = bad
        loss, _ = WFlow(memory_limit=memory_limit)(lambda z: z, torch.stack([x, x2]), y)
        assert not loss.isfinite()


def test_far_from_the_origin_float32_keeps_its_digits() -> None:
    """Values of 1000 about which points spread by 1."""
    x, x2, y = torch.randn(3, 2, 16, 3, dtype=torch.float64)
    expected, _ = WFlow()(lambda z: z, torch.stack([x, x2]), y)
    for limit in (1, 2**28):
        flow = WFlow(memory_limit=limit)
        loss, _ = flow(lambda z: z, torch.stack([x, x2]).float() + 1000, y.float() + 1000)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_other_numbers_of_reals_and_a_warning_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_warned", False)
    generator, _, inputs, encoder = scene(m=9)
    inputs.pop("uncond")
    with pytest.warns(UserWarning, match="9 real beside 6 generated") as caught:
        loss, _ = WFlow(max_iter=7)(generator, features=encoder, **inputs)
    assert caught[0].filename == __file__
    labels = inputs["labels"].repeat_interleave(N)
    made = [encoder(generator(z.flatten(0, 1), labels)) for z in inputs["noise"]]
    made.append(encoder(inputs["real"].flatten(0, 1)))
    types = [tuple(m[name] for m in made) for name in made[0]]
    expected = dense_loss(WFlow(max_iter=7), types, torch.zeros(G))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    WFlow()(generator, features=encoder, **inputs)  # silent from now on


BAD_FEATURES: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: x[:-1], r"features must .*B = 18.*\(17, 2, 4, 2\)"),
    (lambda x: x[:, 0, 0, 0], r"features must be \[B, C\].*\(18,\)"),
    (lambda x: x[..., None], r"features must be \[B, C\].*\(18, 2, 4, 2, 1\)"),
    (lambda x: {"a": x, "b": None}, r"features\['b'\] must be a tensor, got NoneType"),
    (lambda x: [x, 3], r"features\['1'\] must be a tensor, got int"),
    (lambda x: 3.0, "features must be a tensor, or a list or dict of them, got float"),
    (lambda x: {1: x, "1": x}, r"features must have names that differ .*\[1, '1'\]"),
    (lambda x: {}, "features must be a tensor, or a list or dict of them, got none"),
    (lambda x: {"a": x, "b": x.detach()}, r"features\['b'\] must keep the graph"),
    (lambda x: x[:, :, :0], r"features must .*\(18, 2, 0, 2\)"),
]


@pytest.mark.parametrize(("encoder", "message"), BAD_FEATURES)
def test_bad_features(encoder: Callable[[Tensor], Any], message: str) -> None:
    generator, _, inputs, _ = scene()
    inputs.pop("uncond")
    with pytest.raises(ValueError, match=f"WFlow: {message}"):
        WFlow()(generator, features=encoder, **inputs)


def test_bad_features_of_reals() -> None:
    generator, _, inputs, encoder = scene()
    inputs.pop("uncond")
    maps = torch.zeros(G, N, 3, 4, 2, dtype=torch.float64)
    tokens, vector = torch.zeros(G, N, 2, 4).double(), torch.zeros(G, N, 3).double()
    for real, message in (
        ({"maps": maps}, r"features of real must be \['maps', 'tokens', 'vector'\].*\['maps'\]"),
        (
            {"maps": maps.mT, "tokens": tokens, "vector": vector},
            r"features\['maps'\] of real .*\(18, 3, 2, 4\) beside \(18, 3, 4, 2\)",
        ),
        ({"maps": maps[:2]}, r"real\['maps'\] must be \(3, 'M', '...'\).*\(2, 6, 3, 4, 2\)"),
        ({"maps": maps, "tokens": tokens[:, :4]}, r"real\['tokens'\] .*as many.*\(3, 4, 2, 4\)"),
        ({"maps": "x"}, r"real\['maps'\] must be a tensor, got str"),
        ([], "real must be a tensor, or a list or dict of them, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            WFlow()(generator, features=encoder, **{**inputs, "real": real})
    with pytest.raises(ValueError, match="real must be a tensor unless features are given"):
        WFlow()(generator, **{**inputs, "real": {"maps": maps}})
    with pytest.raises(TypeError, match="features must be callable"):
        WFlow()(generator, features=3, **inputs)
    with pytest.raises(TypeError, match=r"features must have a floating dtype, got torch.int64"):
        WFlow()(
            lambda z, k: z.long(), features=lambda x: x, **{**inputs, "real": inputs["noise"][0]}
        )


def test_around_an_encoder() -> None:
    torch.manual_seed(0)
    images = torch.randn(5, 2, 8, 4, dtype=torch.float64)
    encoder = Encoder().double()
    found = features.around(encoder, patches=(2, 4, 8))(images)
    made = encoder(images)
    shapes = {
        "maps": (32, 3), "maps/mean": (3,), "maps/std": (3,), "maps/mean2": (8, 3),
        "maps/std2": (8, 3), "maps/mean4": (2, 3), "maps/std4": (2, 3), "tokens": (8, 4),
        "tokens/mean": (4,), "tokens/std": (4,), "vector": (3,), "input/rms": (2,), "input": (64,),
    }  # fmt: skip
    assert {name: tuple(t.shape[1:]) for name, t in found.items()} == shapes
    maps = made["maps"]
    assert torch.equal(found["maps"][3, 5], maps[3, :, 1, 1])
    patch = maps[1, :, 2:4, 0:2].flatten(1)  # the second row of patches, its first
    torch.testing.assert_close(found["maps/mean2"][1, 2], patch.mean(1))
    expected = (patch.var(1, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(found["maps/std2"][1, 2], expected)
    torch.testing.assert_close(found["tokens/mean"], made["tokens"].mean(1))
    torch.testing.assert_close(found["input/rms"], (images.square().mean((2, 3)) + 1e-6).sqrt())
    only = features.around(whole=False, raw=False)(images)
    assert only.keys() == {"input/rms"}


def test_vectors_of_patches() -> None:
    images = torch.randn(5, 2, 4, 6)
    found = features.patch_vectors(images, 2)
    assert found.shape == (5, 6, 8)
    assert torch.equal(found[3, 4], images[3, :, 2:4, 2:4].flatten())


def test_statistics_are_finite_and_exact_where_they_are_hard() -> None:
    flat = torch.ones(2, 3, 4, 4, requires_grad=True)
    for t in (features.std(flat), features.std(flat, 2), features.channel_rms(0 * flat)):
        (grad,) = torch.autograd.grad(t.sum(), flat)
        assert grad.isfinite().all()
    noise = torch.randn(2, 3, 4, 4)
    expected = features.std(noise.double())
    torch.testing.assert_close(features.std(noise + 1000).double(), expected, rtol=1e-3, atol=0)
    assert features.std(noise.half()).dtype == torch.float32


def test_bad_statistics() -> None:
    maps = torch.zeros(2, 3, 4, 6)
    for call, message in (
        (
            lambda: features.mean(maps, 4),
            r"mean: size must divide H and W, got 4 and \(2, 3, 4, 6\)",
        ),
        (lambda: features.patch_vectors(maps, 5), r"patch_vectors: size must divide .* got 5 and"),
        (lambda: features.patch_vectors(maps[0], 2), r"samples must be \[B, C, H, W\], got"),
        (lambda: features.std(maps, 0), "std: size must be an integer of at least 1, got 0"),
        (lambda: features.mean(maps[0], 2), r"mean: maps must be \[B, C, H, W\], got \(3, 4, 6\)"),
        (lambda: features.std(maps[0, 0]), r"std: maps must be .*, got \(4, 6\)"),
        (lambda: features.channel_rms(maps[0, 0]), r"samples must be .*, got \(4, 6\)"),
        (lambda: features.around(raw=False, input_rms=False), "around: must take some features"),
        (lambda: features.around(patches=(1,)), "patches must be an integer of at least 2, got 1"),
        (lambda: features.around(lambda x: x[0, 0, 0])(maps), r"encoder must return .*\(6,\)"),
        (lambda: features.around(lambda x: 3)(maps), "encoder must be a tensor, or a list"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_loss_around_an_encoder_against_loops() -> None:
    generator, parameters, inputs, encoder = scene()
    inputs.pop("uncond")
    flow, made = WFlow(max_iter=5, memory_limit=2000), features.around(encoder, patches=(2,))
    loss, _ = flow(generator, features=made, **inputs)
    actual = torch.autograd.grad(loss, parameters)
    labels = inputs["labels"].repeat_interleave(N)
    x, x2 = (generator(z.flatten(0, 1), labels) for z in inputs["noise"])
    found = [made(t) for t in (x, x2, inputs["real"].flatten(0, 1))]
    types = [tuple(f[name] for f in found) for name in found[0]]
    expected = dense_loss(flow, types, torch.zeros(G))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(actual, gradients, rtol=1e-8, atol=1e-11)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors hold at once beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_memory_beyond_the_features_is_bounded() -> None:
    """Three tensors of the size of the generated features, their gradient, and the chunks."""
    x, x2, y = torch.randn(3, 4 * 16, 32, 8, 8)
    uncond = torch.randn(4, 64, 32, 8, 8)
    maps: Iterator[Tensor] = iter(())

    def call(memory_limit: int) -> Callable[[], object]:
        def run() -> None:
            nonlocal maps
            maps = iter([x.requires_grad_(), x2])
            loss, _ = WFlow(memory_limit=memory_limit)(
                lambda z: z,
                torch.zeros(2, 4, 16, 1),
                [y.reshape(4, 16, 32, 8, 8)],
                features=lambda _: [next(maps)],
                uncond=[uncond],
                guidance=0.5,
            )
            loss.backward()

        return run

    own, limit = x.numel() * x.element_size(), 2**16
    call(limit)()  # x has its gradient from now on
    assert own < peak_bytes(call(limit)) <= 4 * own + 2 * limit
    assert peak_bytes(call(2**30)) > 7 * own
