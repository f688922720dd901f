"""Cases of the steps of samplers, and of the duals and probes behind traces of networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewstep
from fewstep._names import Backend
from fewstep.ops.dual import attention
from fewstep.ops.dual import dispatch as duals
from fewstep.ops.heun import dispatch as heun
from fewstep.reference.dual import ACTIVATIONS
from fewstep.reference.probe import PROBES
from fewstep.verification.cases import BEYOND, Case, Output, Timing, normal
from fewstep.verification.contract import TANGENTS
from fewstep.verification.record import Group

Maybe = Tensor | None
NETWORKS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KEY = (12345678901234, 7, 3)  # every word of Philox is used
IDS = (3, 2**40 + 5, 0, 99)
# batch, width, tangents, elements that share a shift, what is shifted
ACTIVATED = [
    (1, 1, 1, 1, "none"),
    (5, 37, 2, 1, "channels"),
    (3, 40, 3, 1, "full"),
    (2, 24, 1, 6, "channels"),
    (4, 33, 5, 1, "shared"),
    (3, 7, 0, 1, "channels"),
    (9, 1100, 2, 1, "none"),
]
# (tangents, heads, groups, n, m, d, dv), mask
ATTENDED = [
    ((1, 2, 1, 35, 20, 17, 9), "bool"),
    ((2, 1, 1, 20, 35, 8, 70), "added"),
    ((1, 2, 2, 40, 33, 64, 64), "causal"),
]
# batch, groups, elements of a group, tangents, centred, elements of the shift, affine
NORMED = [
    (1, 1, 5, 1, True, None, True),
    (4, 1, 33, 2, True, 33, True),
    (3, 4, 18, 2, True, None, True),
    (5, 1, 64, 3, False, 64, True),
    (2, 2, 7, 0, True, None, False),
    (6, 1, 1000, 2, True, None, True),
]


def _on(t: Maybe, device: torch.device, dtype: torch.dtype) -> Maybe:
    return None if t is None else t.to(device, dtype)


def _passes(
    shape: tuple[int, ...],
    state: torch.dtype,
    network: torch.dtype,
    paired: bool,
    noisy: bool,
    count: int,
    seed: int,
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    """A pass of a sampler into buffers, and its gradients where there is no noise."""

    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rng = torch.Generator().manual_seed(seed)
        rows = shape[0] if noisy else 1
        table = normal(rng, 3, rows, 8).to(device)
        x = normal(rng, *shape).to(device, state)
        low = (1e-8 * normal(rng, *shape)).to(device, state) if paired else None
        terms = [normal(rng, *shape).to(device, network) for _ in range(count)]
        seeds = (torch.arange(shape[0]) * 2**33 + 5).to(device) if noisy else None
        unit = torch.finfo(network).eps if network in (torch.bfloat16, torch.float16) else 0.0
        if exact:
            x, terms = x.double(), [t.double() for t in terms]
            low = None if low is None else low.double()
        high, net = torch.empty_like(x), torch.empty_like(x, dtype=(terms or [x])[0].dtype)
        rest = torch.empty_like(x) if paired else None
        wrong = torch.zeros(1, dtype=torch.int32, device=device)
        step = heun.into("reference" if exact else backend, net.dtype)
        step(x, low, terms, table, 2, seeds, high, rest, net, wrong)
        out = high.double() if rest is None else high.double() + rest
        strict = network if state == torch.float64 and network == torch.float64 else torch.float32
        found = [
            Output("state", "value", out.to(torch.float64 if exact else strict)),
            Output("network's input", "value", net, unit=unit),
            Output("flag", "same", wrong),
        ]
        if not noisy:
            live = [t.detach().requires_grad_() for t in (x, *terms)]
            y, _, z = heun.combine(
                *("reference" if exact else backend, live[0], low, live[1:], table, 2),
                want_low=paired,
                want_net=True,
            )
            assert z is not None
            up = [normal(rng, *shape).to(device, torch.float32) for _ in range(2)]
            loss = (y.double() * up[0]).sum() + (z.double() * up[1]).sum()
            for i, g in enumerate(torch.autograd.grad(loss, live)):
                own = g.to(torch.float64 if exact else strict)
                found.append(Output(f"gradient {i}", "gradient", own, unit=unit))
        return found

    return run


def _not_finite(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
    """A NaN at either end is flagged."""
    flags = []
    for place in (0, 1499):
        x = torch.zeros(2, 1500, device=device)
        f = torch.zeros_like(x)
        f[1, place] = torch.nan
        wrong = torch.zeros(1, dtype=torch.int32, device=device)
        table = torch.ones(1, 1, 8, dtype=torch.float64, device=device)
        step = heun.into("reference" if exact else backend, torch.float32)
        step(x, None, [f], table, 0, None, torch.empty_like(x), None, None, wrong)
        flags.append(wrong)
    return [Output("flag", "same", torch.cat(flags))]


def _large_pass(
    backend: Backend, device: torch.device, exact: bool, *, elements: int
) -> list[Output]:
    """The end of a state of 2^31 elements, with noise."""
    rng, width, last = torch.Generator(device).manual_seed(3), 2**15, 3
    rows = elements // width + 2
    x = torch.empty(rows, width, device=device).normal_(generator=rng)
    f = x.cos()
    seeds = torch.arange(rows, device=device)
    table = torch.linspace(-1, 1, 8, dtype=torch.float64, device=device)[None, None]
    if exact:
        x, f, seeds = x[-last:].double(), f[-last:].double(), seeds[-last:]
    high = torch.empty_like(x)
    step = heun.into("reference" if exact else backend, torch.float32)
    step(x, None, [f], table, 0, seeds, high, None, None, None)
    return [Output("last rows", "value", high[-last:].clone())]


def _steps(network: torch.dtype) -> Iterator[Case]:
    group: Group = heun.group(network)
    shapes: list[tuple[int, ...]] = [(1, 1), (5, 7), (3, 130), (2, 3, 5), (2, 1100)]
    kinds = [(torch.float32, network, False), (torch.float32, network, True)]
    kinds += [(torch.float64, network, False)]
    if network == torch.float64:
        kinds = kinds[2:]
    seed = 0
    for shape, (state, net, paired) in itertools.product(shapes, kinds):
        for count in range(3):
            seed += 1
            noisy = seed % 2 == 0
            name = (
                f"{shape}, state {state}{' compensated' * paired}, network {net},"
                f" {count} terms{', noise' * noisy}, seed {seed}"
            )
            yield Case(group, name, _passes(shape, state, net, paired, noisy, count, seed))
    # The log-density beside a state is in float64.
    wide = _passes((3,), torch.float64, torch.float64, False, False, 1, 1)
    yield Case(group, "(3,), a log-density, seed 1", wide)
    yield Case(group, "(2, 1500) with NaN", _not_finite)
    if network == torch.float32:
        large = partial(_large_pass, elements=BEYOND)
        yield Case(group, "a state of 2^31 elements", large, elements=BEYOND)


def _timed_step(network: torch.dtype) -> Callable[[Backend, torch.device], Callable[[], object]]:
    def make(backend: Backend, device: torch.device) -> Callable[[], object]:
        x = torch.randn(256, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        own = x.to(device, network)
        state = own.to(torch.promote_types(network, torch.float32))
        table = torch.ones(1, 1, 8, dtype=torch.float64, device=device)
        high, net, step = (
            torch.empty_like(state),
            torch.empty_like(own),
            heun.into(backend, network),
        )
        return lambda: step(state, None, [own], table, 0, None, high, None, net, None)

    return make


def _activation(
    shape: tuple[int, int, int, int, str], kind: str, dtype: torch.dtype, seed: int
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rng = torch.Generator().manual_seed(seed)
        batch, width, tangents, inner, shifted = shape
        alone = shifted == "shared"
        z = 3 * normal(rng, batch * (1 if alone else tangents + 1), width)
        shared = normal(rng, tangents, width) if alone else None
        sizes = {"none": None, "channels": (width // inner,), "full": (batch, width)}
        size = sizes.get(shifted, (width,))
        shift = None if size is None else normal(rng, *size)
        own = [_on(t, device, torch.float64 if exact else dtype) for t in (z, shared, shift)]
        live = [t.requires_grad_() for t in (own[0], own[2]) if t is not None]
        assert own[0] is not None
        out = duals.activate(backend, own[0], own[1], own[2], tangents, kind, 1.3, 20.0, inner)
        return _with_gradients([out], live, rng)

    return run


def _norm(
    shape: tuple[int, int, int, int, bool, int | None, bool], dtype: torch.dtype, seed: int
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rng = torch.Generator().manual_seed(seed)
        batch, groups, n, tangents, centred, shifted, affine = shape
        tensors = [
            2 * normal(rng, (tangents + 1) * batch, groups * n),
            None if shifted is None else normal(rng, shifted),
            *(normal(rng, groups, n) if affine else None for _ in range(2)),
        ]
        own = [_on(t, device, torch.float64 if exact else dtype) for t in tensors]
        live = [t.requires_grad_() for t in own if t is not None]
        z, shift, w, b = own
        assert z is not None
        out = duals.norm(backend, z, shift, w, b, tangents, groups, centred, 1e-5)
        return _with_gradients([out], live, rng)

    return run


def _with_gradients(
    outs: list[Tensor], live: list[Tensor], rng: torch.Generator, unit: float = 0.0
) -> list[Output]:
    g = [normal(rng, *o.shape).bfloat16().to(o.device, o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, live, g)
    units = [0.0, unit]  # of the primal, of the tangents
    return [
        *(Output(f"result {i}", "value", o, unit=units[i]) for i, o in enumerate(outs)),
        *(
            Output(f"gradient {i}", "gradient", grad, unit=unit if i == 1 else 0.0)
            for i, grad in enumerate(grads)
        ),
    ]


def _pair(
    kind: str, shape: tuple[Any, ...], seed: int
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    """A primal in float32 beside tangents in bfloat16."""

    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rng = torch.Generator().manual_seed(seed)
        batch, tangents = shape[0], shape[2] if kind in ACTIVATIONS else shape[3]
        width = shape[1] if kind in ACTIVATIONS else shape[1] * shape[2]
        z, u = 2 * normal(rng, batch, width), normal(rng, tangents * batch, width).bfloat16()
        wide = torch.float64 if exact else torch.float32
        own = [z.to(device, wide), u.to(device, torch.float64 if exact else torch.bfloat16)]
        live = [t.requires_grad_() for t in own]
        if kind in ACTIVATIONS:
            outs = duals.activate_pair(backend, live[0], live[1], None, kind, 1.3, 20.0, shape[3])
        else:
            w, b = (normal(rng, width).to(device, wide).requires_grad_() for _ in range(2))
            live += [w, b]
            outs = duals.norm_pair(backend, live[0], live[1], None, w, b, shape[1], shape[4], 1e-5)
        return _with_gradients(list(outs), live, rng, TANGENTS["rounded"])

    return run


def _probes(
    kind: str, d: int, dtype: torch.dtype, low: bool
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        key, ids, count = torch.tensor(KEY), torch.tensor(IDS, device=device), min(3, d)
        wide = torch.float64 if exact else dtype
        kept = torch.bfloat16 if low and not exact else wide
        v = duals.probe(
            backend, torch.empty(4, d, dtype=kept, device=device), key, ids, count, kind
        )
        rng = torch.Generator().manual_seed(d)
        y = normal(rng, count * 4, d).bfloat16().to(device, kept)
        dots = duals.probe_dot(backend, y, key, ids, count, kind)
        g = normal(rng, count, 4).to(device, wide)
        scaled = duals.probe_scale(backend, g, key, ids, d, kind)
        signs = kind in ("rademacher", "hadamard")
        size = v.double().square().sum(-1).max().sqrt() * y.double().norm(dim=-1).max()
        unit = TANGENTS["rounded"] if low else 0.0
        return [
            Output("probes", "same", v.double())
            if signs
            else Output("probes", "value", v, unit=unit),
            Output("products", "value", dots, size),
            Output("scaled", "value", scaled),
        ]

    return run


def _attention(
    sizes: tuple[int, ...], mask: str, dtype: torch.dtype, seed: int
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        rng = torch.Generator().manual_seed(seed)
        tangents, heads, groups, n, m, d, dv = sizes
        shapes = ((2, heads, n, d), (2, groups, m, d), (2, groups, m, dv))
        own = [normal(rng, *lead, *shape) for lead in ((), (tangents,)) for shape in shapes]
        live = [t.to(device, torch.float64 if exact else dtype).requires_grad_() for t in own]
        scores = normal(rng, 1, heads, n, m).to(device, live[0].dtype)
        masks = {"bool": scores > -1, "added": scores}
        outs = attention.attention(
            backend,
            *(live[0], live[1], live[2], live[3], live[4], live[5], masks.get(mask)),
            causal=mask == "causal",
            scale=0.3,
            tangents=tangents,
        )
        return _with_gradients(list(outs), live, rng)

    return run


class _Net(nn.Module):
    """Activations, norms, residuals and a shift by time."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, width), nn.Linear(width, width), nn.Linear(width, d)
        self.layer, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.time = nn.Linear(1, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.a(x) + self.time(t[:, None]))
        h = h + F.gelu(self.b(self.layer(h)))
        return self.c(torch.tanh(self.rms(h)))  # type: ignore[no-any-return]


def _network(dtype: torch.dtype, d: int, width: int, device: torch.device) -> _Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Net(d, width)
    return net.to(device=device, dtype=dtype)


def _trace(
    dtype: torch.dtype, low: torch.dtype | None
) -> Callable[[Backend, torch.device, bool], list[Output]]:
    """A whole network. Its products are torch's, which may use TF32 if the user has said so."""

    def run(backend: Backend, device: torch.device, exact: bool) -> list[Output]:
        wide = torch.float64 if exact else dtype
        net = _network(wide, 5, 37, device)
        rng = torch.Generator().manual_seed(4)
        x, t = normal(rng, 6, 5).to(device, wide), torch.full((6,), 0.3, device=device, dtype=wide)
        options: dict[str, Any] = {"estimator": "hutchinson", "probes": 2, "seed": 4}
        out = fewstep.divergence(
            net, x, t, backend=backend, tangent_dtype=None if exact else low, **options
        )
        grads = torch.autograd.grad(
            out.value.sum() + out.velocity.square().sum(), list(net.parameters())
        )
        scale = torch.full((), 10.0)
        value, gradient = (TANGENTS[k] if low else 0.0 for k in ("value", "gradient"))
        return [
            Output("trace", "value", out.value, scale, unit=value),
            Output("velocity", "value", out.velocity),
            *(
                Output(f"gradient {n}", "gradient", g, unit=gradient)
                for (n, _), g in zip(net.named_parameters(), grads, strict=True)
            ),
        ]

    return run


def _duals(dtype: torch.dtype) -> Iterator[Case]:
    group: Group = duals.group(dtype)
    acts = [("silu", s) for s in ACTIVATED] + [(k, ACTIVATED[1]) for k in ACTIVATIONS[1:]]
    for seed, (kind, shape) in enumerate(acts):
        name = f"{kind}, batch, width, tangents, inner, shift = {shape}, seed {seed}"
        yield Case(group, name, _activation(shape, kind, dtype, seed))
    for seed, normed in enumerate(NORMED):
        name = f"norm, batch, groups, n, tangents, centred, shift, affine = {normed}, seed {seed}"
        yield Case(group, name, _norm(normed, dtype, seed))
    for seed, (sizes, mask) in enumerate(ATTENDED):
        name = (
            f"attention, tangents, heads, groups, n, m, d, dv = {sizes}, mask {mask}, seed {seed}"
        )
        yield Case(group, name, _attention(sizes, mask, dtype, seed))
    for kind, d in itertools.product(PROBES, (1, 3, 513)):
        yield Case(group, f"{kind} probes, D = {d}", _probes(kind, d, dtype, low=False))
    yield Case(group, "a network's trace, seed 4", _trace(dtype, None), bits=False)


def _pairs() -> Iterator[Case]:
    group: Group = duals.group(torch.float32, torch.bfloat16)
    for seed, shape in enumerate(s for s in ACTIVATED if s[4] != "shared" and s[2]):
        yield Case(group, f"silu, {shape}, seed {seed}", _pair("silu", shape, seed))
    for seed, normed in enumerate(n for n in NORMED if n[3]):
        yield Case(group, f"norm, {normed}, seed {seed}", _pair("norm", normed, seed))
    for kind in PROBES:
        yield Case(group, f"{kind} probes", _probes(kind, 130, torch.float32, low=True))
    net = _trace(torch.float32, torch.bfloat16)
    yield Case(group, "a network's trace, seed 4", net, bits=False)


def _timed_trace(
    dtype: torch.dtype, low: torch.dtype | None
) -> Callable[[Backend, torch.device], Callable[[], object]]:
    def make(backend: Backend, device: torch.device) -> Callable[[], object]:
        net = _network(dtype, 64, 512, device)
        x, t = torch.randn(512, 64, device=device, dtype=dtype), torch.zeros(512, device=device)
        options: dict[str, Any] = {"estimator": "hutchinson", "tangent_dtype": low}

        def call() -> object:
            out = fewstep.divergence(net, x, t.to(dtype), backend=backend, **options)
            return torch.autograd.grad(out.value.sum(), list(net.parameters()), allow_unused=True)

        return call

    return make


def groups() -> Iterator[tuple[Group, list[Case], Timing]]:
    for network in NETWORKS:
        group = heun.group(network)
        yield group, list(_steps(network)), Timing(group, _timed_step(network))
    for dtype in (torch.float32, torch.float64):
        group = duals.group(dtype)
        yield group, list(_duals(dtype)), Timing(group, _timed_trace(dtype, None))
    group = duals.group(torch.float32, torch.bfloat16)
    yield group, list(_pairs()), Timing(group, _timed_trace(torch.float32, torch.bfloat16))
