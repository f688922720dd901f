"""Heun steps: kernels against the reference, order, gradients, compilation, log-densities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep.ops.heun import dispatch
from support.heun import KINDS, SHAPES, Field, combine_into, exact
from tolerances import assert_contract


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=["f32", "pair", "mixed", "f64"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_combine(
    capability: str,
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
        high, net = torch.empty_like(x), torch.empty(shape, dtype=network)
        rest, wrong = torch.empty_like(x) if paired else None, torch.zeros(1, dtype=torch.int32)
        combine_into(
            *("cpp", x, low, terms, table, 2),
            seeds=seeds,
            high=high,
            out_low=rest,
            net=net,
            wrong=wrong,
        )
        assert not wrong
        if x.numel() == 0:
            continue
        y, z = exact(x, low, terms, table, seeds)
        assert_contract("value", high, y)
        assert_contract("value", net, z)
        if rest is not None:
            assert_contract("value", high.double() + rest, y)
            assert float(rest.abs().max()) <= float(high.abs().max()) * 2**-24


def test_combine_of_strided_and_expanded_terms(capability: str) -> None:
    x, a, b = torch.randn(6, 4).T, torch.randn(4, 1).expand(4, 6), torch.randn(4, 12)[:, ::2]
    table = torch.randn(3, 1, 8, dtype=torch.float64)
    own, _, net = dispatch.combine("cpp", x, None, [a, b], table, 2, want_net=True)
    y, z = exact(x, None, [a, b], table, None)
    assert net is not None
    assert_contract("value", own, y)
    assert_contract("value", net, z)


@pytest.mark.parametrize("place", [0, 6, 16])
def test_what_is_not_finite_is_flagged(capability: str, place: int) -> None:
    for value in (math.nan, math.inf):
        x, table = torch.randn(1, 17), torch.ones(1, 1, 8, dtype=torch.float64)
        f = torch.randn(1, 17)
        f[0, place] = value
        for backend in ("cpp", "reference"):
            wrong = torch.zeros(1, dtype=torch.int32)
            out = torch.empty_like(x)
            combine_into(backend, x, None, [f], table, 0, high=out, wrong=wrong)
            assert wrong.item() == 1
            assert not out[0, place].isfinite()


def test_threads_do_not_change_the_bits() -> None:
    x, f, seeds = torch.randn(9, 9000), torch.randn(9, 9000), torch.arange(9)
    table = torch.randn(1, 1, 8, dtype=torch.float64)
    out = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = torch.empty_like(x)
        combine_into("cpp", x, None, [f], table, 0, seeds=seeds, high=y)
        out.append(y)
    assert torch.equal(*out)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_opcheck() -> None:
    x, table = torch.randn(3, 4, requires_grad=True), torch.randn(2, 3, 8, dtype=torch.float64)
    f, low = torch.randn(3, 4, requires_grad=True), 1e-8 * torch.randn(3, 4)
    op = torch.ops.fewstep.heun_combine.default
    torch.library.opcheck(op, (x, None, [f], table, 1, False, True))
    torch.library.opcheck(op, (x, low, [f, f.detach()], table, 1, True, False))
    out = [torch.zeros(3, 4) for _ in range(3)]
    flag = torch.zeros(1, dtype=torch.int32)
    arguments = (x.detach(), low, [f.detach()], table, 1, torch.arange(3), *out, flag)
    torch.library.opcheck(torch.ops.fewstep.heun_combine_out.default, arguments)


def test_the_table_has_no_gradient_in_the_kernel() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    table = torch.randn(1, 1, 8, dtype=torch.float64, requires_grad=True)
    y, _, _ = torch.ops.fewstep.heun_combine.default(x, None, [], table, 0, False, False)
    with pytest.raises(NotImplementedError, match="table has no gradient"):
        y.sum().backward()


def loop(velocity: Any, x: Tensor, times: Tensor) -> Tensor:
    """Plain Heun; times `[S + 1]` or `[B, S + 1]`."""
    nodes = times.expand(x.shape[0], -1).T
    for now, after in itertools.pairwise(nodes):
        h = (after - now).reshape(-1, *(1,) * (x.ndim - 1))
        v = velocity(x, now)
        x = x + h / 2 * (v + velocity(x + h * v, after))
    return x


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("state", ["float32", "compensated", "float64"])
def test_solve_is_heuns_method(capability: str, backend: str, grad: bool, state: str) -> None:
    net = Field().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    forwards = torch.linspace(0, 1, 8, dtype=torch.float64)
    each = torch.rand(5, 8, dtype=torch.float64).cumsum(1) * torch.tensor([[1.0], [-1.0]] * 3)[:5]
    for times in (forwards, forwards.flip(0), each):
        expected = loop(net, x, times)
        with torch.set_grad_enabled(grad):
            out = fewstep.heun_solve(net, x, times, state=state, keep=True, backend=backend)
        assert_contract("value", out.x, expected.detach())
        assert out.path is not None
        assert torch.equal(out.path[0], x)
        assert torch.equal(out.path[-1], out.x)
        single = net.float()
        with torch.set_grad_enabled(grad):
            out = fewstep.heun_solve(single, x.float(), times, state=state, backend=backend)
        assert out.x.dtype == torch.float32
        assert_contract("value", out.x, expected.detach())
        net = net.double()


def test_order_two() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) + t[:, None].cos() * x

    def solve(steps: int) -> Tensor:
        return fewstep.heun_solve(velocity, x, torch.linspace(0, 1, steps + 1)).x

    exact = solve(4096)
    errors = [float((solve(steps) - exact).norm()) for steps in (16, 32, 64)]
    assert all(3.6 < a / b < 4.4 for a, b in itertools.pairwise(errors))


def test_compensated_rounding_does_not_add_up() -> None:
    x = torch.randn(300, 4)
    times = torch.linspace(0, 3, 3001)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) * 0.3

    errors = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            exact = fewstep.heun_solve(velocity, x.double(), times).x
            for state in ("float32", "compensated", "float64"):
                out = fewstep.heun_solve(velocity, x, times, state=state).x
                errors[state] = float((out - exact).norm())
        assert errors["compensated"] < 2 * errors["float64"]
        assert errors["compensated"] < errors["float32"] / 4


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck(backend: str) -> None:
    net = Field().double()
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    start = torch.randn(3, dtype=torch.float64, requires_grad=True)
    times = torch.linspace(0, 1, 3, dtype=torch.float64)

    def solve(x: Tensor, start: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x @ weight) * (1 + t[:, None])

        out = fewstep.heun_solve(
            velocity, x, times, log_density=start, estimator="exact", backend=backend
        )
        assert out.log_density is not None
        return out.x, out.log_density

    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (x, start, weight))
    assert torch.autograd.gradgradcheck(solve, (x, start, weight))
    nodes = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, nodes: fewstep.heun_solve(net, x, nodes, backend=backend).x, (x, nodes)
    )
    t, dt = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, t, dt: fewstep.heun_step(net, x, t, dt, backend=backend), (x, t, dt)
    )


def test_gradients_are_those_of_the_loop() -> None:
    net, times = Field(), torch.linspace(0, 1, 6)
    x = torch.randn(5, 3, requires_grad=True)
    own = torch.autograd.grad(
        fewstep.heun_solve(net, x, times).x.square().sum(), [x, *net.parameters()]
    )
    double, wide = Field().double(), x.detach().double().requires_grad_()
    double.load_state_dict(net.state_dict())
    out = loop(double, wide, times.double())
    exact = torch.autograd.grad(out.square().sum(), [wide, *double.parameters()])
    for a, b in zip(own, exact, strict=True):
        assert_contract("gradient", a, b)
    pair = fewstep.heun_solve(net, x, times, state="compensated").x
    for a, b in zip(torch.autograd.grad(pair.square().sum(), [x]), exact[:1], strict=True):
        assert_contract("gradient", a, b)


def test_functional_transforms() -> None:
    net = Field().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    times = torch.linspace(0, 1, 4, dtype=torch.float64)

    def end(x: Tensor) -> Tensor:
        return fewstep.heun_solve(net, x, times).x

    own = torch.func.vmap(torch.func.jacrev(lambda x: end(x[None])[0]))(x)
    exact = torch.autograd.functional.jacobian(end, x, vectorize=False)
    for i in range(4):
        torch.testing.assert_close(own[i], exact[i, :, i])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch's rules
def test_forward_mode() -> None:
    net, times = Field().double(), torch.linspace(0, 1, 4, dtype=torch.float64)
    x, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def end(x: Tensor) -> Tensor:
        return fewstep.heun_solve(net, x, times).x

    with torch.autograd.forward_ad.dual_level():
        dual = end(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(end, (x,), (v,))[1])


def test_outputs_and_noise_must_fit() -> None:
    x, table = torch.randn(2, 3), torch.ones(1, 1, 8, dtype=torch.float64)
    op = torch.ops.fewstep.heun_combine_out.default
    for place, wrong in (
        (1, torch.zeros(1)),
        (6, torch.zeros(2, 3).double()),
        (5, torch.arange(3)),
    ):
        arguments: list[Any] = [x, None, [], table, 0, None, torch.empty(2, 3), None, None, None]
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match="heun_combine"):
            op(*arguments)


def test_compiles_without_a_break() -> None:
    net, times = Field(), torch.linspace(0, 1, 4)
    x = torch.randn(4, 3, requires_grad=True)

    def end(x: Tensor) -> Tensor:
        return fewstep.heun_solve(net, x, times, state="compensated").x

    compiled = torch.compile(end, fullgraph=True, backend="aot_eager")
    own, plain = compiled(x), end(x)
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(
        torch.autograd.grad(own.sum(), x), torch.autograd.grad(plain.sum(), x)
    )


def test_log_density_of_a_linear_field() -> None:
    matrix = torch.randn(3, 3, dtype=torch.float64) / 2
    x, start = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    layer = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(matrix)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = fewstep.heun_solve(
                lambda x, t: layer(x), x, [0.0, 0.5, 2.0], log_density=start, estimator="exact"
            )
        assert out.log_density is not None
        assert_contract("value", out.log_density, start - 2 * matrix.trace())
        assert out.stderr is not None
        assert not out.stderr.any()
    # Probes are those of log_density, whose path this is.
    options: dict[str, Any] = {"estimator": "hutchinson", "probes": 2, "seed": 3}
    net, times = Field().double(), torch.linspace(0, 1, 5, dtype=torch.float64)
    for fresh in (True, False):
        own = fewstep.heun_solve(net, x, times, log_density=start, fresh=fresh, **options)
        other = fewstep.log_density(
            net, x, times=times, fresh=fresh, base=lambda x: 0 * x[:, 0], **options
        )
        assert own.log_density is not None
        assert own.stderr is not None
        torch.testing.assert_close(own.log_density - start, -other.log_prob)
        torch.testing.assert_close(own.stderr, other.stderr)


class Count(TorchDispatchMode):
    """Counts what happens outside the network to tensors of the state's size, and host reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.inside = size, False
        self.passes, self.others, self.reads = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        large = [a for a in [*args, out] if isinstance(a, Tensor) and a.numel() >= self.size]
        if large and not self.inside:
            self.passes += "heun_combine" in str(func)
            self.others += "heun_combine" not in str(func)
        self.reads += "_local_scalar_dense" in str(func)
        return out

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        self.inside = True
        out = x / 2
        self.inside = False
        return out


@pytest.mark.parametrize("state", ["float32", "compensated", "float64"])
def test_operations_outside_the_network(state: str) -> None:
    """Two passes over the state a step; the host reads nothing that a step has made."""
    x, seeds = torch.randn(10, 100), torch.arange(10)

    def solve(count: Count, steps: int) -> None:
        fewstep.heun_solve(count.network, x, torch.linspace(0, 1, steps + 1), state=state)

    def sample(count: Count, steps: int) -> None:
        fewstep.edm_sample(
            *(count.network, x),
            steps=steps,
            state=state,
            S_churn=1.0,
            seeds=seeds,
            guidance=2.0,
            uncond=count.network,
            precondition=0.5,
        )

    for run in (solve, sample):
        counts = []
        for steps in (5, 9):
            with torch.no_grad(), Count(x.numel()) as count:
                run(count, steps)
            counts.append((count.passes, count.others, count.reads))
        few, many = counts
        assert many[0] - few[0] == 2 * (9 - 5)
        assert few[0] <= 2 * 5
        assert many[1:] == few[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": [0.0]}, "times must be"),
        ({"times": [0.0, 1.0, 0.5]}, "times must be finite"),
        ({"times": [0.0, 0.5, 0.5]}, "got 0.5 and then 0.5 at step 1 of row 0"),
        ({"times": [[0.0, 1.0], [1.0, 1.0]]}, "got 1.0 and then 1.0 at step 0 of row 1"),
        ({"sample_ids": torch.tensor([0, 2**48])}, "sample_ids must be in"),
        ({"times": [0.0, math.nan]}, "times must be finite"),
        ({"times": torch.zeros(3, 4)}, "times must have 2 rows, got 3"),
        ({"state": "bfloat16"}, "state must be one of"),
        ({"log_density": torch.zeros(3)}, r"log_density must be \(2,\), got \(3,\)"),
        ({"log_density": torch.zeros(2), "probes": 0}, "probes must be"),
        ({"backend": "cuda"}, "backend 'cuda' cannot serve"),
        ({"backend": "numpy"}, "backend must be one of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(ValueError, match=message):
        fewstep.heun_solve(velocity, torch.randn(2, 3), **({"times": [0.0, 1.0]} | options))


@pytest.mark.parametrize(
    ("function", "name", "values"),
    [
        ("heun_solve", "velocity", ("a", None)),
        ("heun_solve", "x", (1.0, torch.eye(2).to_sparse())),
        ("heun_solve", "times", ("a", True, 1.0, [0, "a"], [0, 10**400], torch.ones(2) * 1j)),
        ("heun_solve", "state", (None, ["float32"], torch.ones(2))),
        ("heun_solve", "estimator", (None, "a", np.ones(2))),
        ("heun_solve", "probe", (None, "a", np.ones(2))),
        ("heun_solve", "probes", (0, "a", True, 1.5)),
        ("heun_solve", "seed", ("a", -1, True, 0.5, torch.ones(2))),
        ("heun_solve", "fresh", ("no", 0, None)),
        ("heun_solve", "keep", ("no", 0, None)),
        ("heun_solve", "check_finite", ("no", 0)),
        ("heun_solve", "backend", ("gpu", 0, [], torch.ones(2))),
        ("heun_step", "velocity", ("a", None)),
        ("heun_step", "t", ("a", None, True, 1j, [0, "a"], 10**400, np.array(["a"]))),
        ("heun_step", "dt", ("a", None, True, 1j, torch.ones(2).bool())),
        ("heun_step", "backend", ("gpu", 0, [])),
        ("divergence", "x", (1.0, torch.eye(2).to_sparse())),
        ("divergence", "t", ("a", None, True, 1j, [0.0], 1e300, torch.ones(2).bool())),
        ("divergence", "estimator", (None, "a", np.ones(2))),
        ("divergence", "probe", (None, "a", np.ones(2))),
        ("divergence", "probes", (0, "a", True, 1.5)),
        ("divergence", "seed", ("a", -1, True, 0.5, torch.ones(2))),
        ("divergence", "tangent_dtype", ("a", torch.float16, 1)),
        ("divergence", "backend", ("gpu", 0, [], torch.ones(2))),
    ],
)
def test_wrong_values_are_named(function: str, name: str, values: tuple[Any, ...]) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    own = {"heun_solve": {"times": [0.0, 1.0]}, "heun_step": {"t": 0.0, "dt": 0.1}}
    given = {"velocity": velocity, "x": torch.zeros(2, 3), **own.get(function, {"t": 0.0})}
    for value in values:
        with pytest.raises((ValueError, TypeError), match=rf"^{function}: .*\b{name}\b"):
            getattr(fewstep, function)(**{**given, name: value})


def test_bad_velocities_and_steps() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"must return \(2, 3\), got \(3, 2\) at step 0"):
        fewstep.heun_solve(lambda x, t: x.T, x, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"must return .* got tuple at step 0"):
        fewstep.heun_solve(lambda x, t: (x, t), x, [0.0, 1.0])
    for wrong, got in (
        (lambda x, t: x.to("meta"), "torch.float32 on meta"),
        (lambda x, t: x * 1j, "torch.complex64 on cpu"),
        (lambda x, t: x.to_sparse(), "a tensor of layout torch.sparse_coo"),
        (lambda x, t: torch.nested.nested_tensor(list(x), layout=torch.jagged), "a tensor of"),
    ):
        for context in (torch.no_grad(), torch.enable_grad()):
            message = rf"must return \(2, 3\), got {got}.* at step 0"
            with context, pytest.raises(ValueError, match=message):
                fewstep.heun_solve(wrong, x, [0.0, 1.0])
    for whole in (lambda x, t: x.long(), lambda x, t: x.double()):
        assert torch.equal(
            fewstep.heun_solve(whole, x, [0.0, 1.0]).x,
            fewstep.heun_solve(lambda x, t, f=whole: f(x, t).float(), x, [0.0, 1.0]).x,
        )
    with torch.no_grad(), pytest.raises(ValueError, match="not finite at step 1"):
        fewstep.heun_solve(lambda x, t: x / (1 - t[:, None]), x, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="not finite at step 0"):
        fewstep.heun_solve(lambda x, t: x / 0, x, [0.0, 1.0], check_finite=True)
    with pytest.raises(ValueError, match=r"dt must be a scalar or \(2,\), got \(3,\)"):
        fewstep.heun_step(lambda x, t: x, x, 0.0, torch.ones(3))
    with pytest.raises(TypeError, match="floating"):
        fewstep.heun_solve(lambda x, t: x, torch.ones(2, 3, dtype=torch.int64), [0.0, 1.0])
    for arguments, message in (
        (((x, x), [0.0, 1.0]), "x must be a tensor, got tuple"),
        ((x, "all"), "times must be numbers, got 'all'"),
        ((x, [[0.0], [0.0, 1.0]]), "times must be numbers"),
    ):
        with pytest.raises(TypeError, match=message):
            fewstep.heun_solve(lambda x, t: x, *arguments)  # type: ignore[arg-type]
    for t, dt in ((0.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(ValueError, match=r"(t|dt) must be finite, got (nan|inf)"):
            fewstep.heun_step(lambda x, t: x, x, t, dt)
    assert torch.equal(fewstep.heun_step(lambda x, t: x, x, 0.5, 0.0), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_times_reach_half_precision_velocities_unrounded(dtype: torch.dtype) -> None:
    x, times, seen = torch.randn(2, 3).to(dtype), torch.linspace(0, 1, 601), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        seen.append(float(t[0]))
        return t[:, None] * x

    out = fewstep.heun_solve(velocity, x, times)
    assert out.x.dtype == dtype
    assert seen[::2] == times[:-1].tolist()
