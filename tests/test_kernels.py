"""Launch parameters of the Triton kernels, and what they compile to for GPUs that are not here."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.ops.sinkhorn.inputs import PRECISIONS, from_numbers

pytest.importorskip("triton")

from fewstep.kernels import config
from fewstep.kernels.sinkhorn.alternating import sinkhorn_row_kernel

# Bytes of shared memory that every GPU of a family gives one program.
SHARED = {"sm": 99 * 1024, "gfx": 64 * 1024}


@pytest.mark.parametrize(
    ("batch", "rows", "dim", "dtype", "arch", "block"),
    [
        (1, 512, 3, "float32", "sm_90", 32),  # 4 large blocks would leave 128 processors idle
        (1, 132 * 128, 3, "float32", "sm_90", 128),
        (1, 132 * 128, 3, "float32", "gfx942", 32),
        (4096, 64, 3, "float32", "sm_90", 32),  # half of a large block would be padding
        (4096, 120, 3, "float32", "sm_90", 128),
        (4096, 64, 64, "float32", "sm_90", 64),
        (1, 64, 64, "float32", "sm_90", 16),
        (4096, 128, 64, "float64", "sm_100", 128),
    ],
)
def test_blocks_fill_the_machine_without_much_padding(
    batch: int, rows: int, dim: int, dtype: str, arch: str, block: int
) -> None:
    assert config.sinkhorn_update(batch, rows, dim, dtype, arch)["BLOCK_M"] == block


@pytest.mark.parametrize("arch", [*config.ARCHITECTURES, "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_launches_are_legal(arch: str, dtype: str) -> None:
    for batch in (1, 10**5):
        for rows in (1, 64, 1000):
            for dim in (1, 16, 17, 784):
                for width in (1, 16, 17, 784):
                    launch = config.sinkhorn_apply(batch, rows, dim, width, dtype, arch)
                    blocks = [v for name, v in launch.items() if name.startswith("BLOCK")]
                    assert all(v & (v - 1) == 0 for v in blocks)
                    if launch["DOT"] or launch["DOT_V"]:
                        assert dtype == "float32"
                        assert min(blocks) >= 16  # the smallest side of a dot
                    if not launch["DOT"]:
                        assert launch["BLOCK_M"] == 32 * launch["num_warps"]


def test_precisions_have_one_order() -> None:
    header = (Path(__file__).parents[1] / "csrc/shared/halves.h").read_text()
    assert config.PRECISIONS == PRECISIONS == ("tf32x3", "tf32", "float32")
    assert "enum Precision : int { kThree, kOne, kFloat32 };" in header
    how = [config.sinkhorn_update(1, 64, 17, "float32", "sm_90", p) for p in PRECISIONS]
    assert [launch["DOT"] for launch in how] == [True, True, False]
    assert [launch["PRECISION"] for launch in how[:2]] == ["tf32x3", "tf32"]


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got 'bfloat16'"):
        config.sinkhorn_update(1, 1, 1, "bfloat16", "sm_90")


def test_temperatures_are_not_copied_from_the_host() -> None:
    """Which a graph of CUDA could not capture; a fill it can."""

    class Ops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Ops() as seen:
        filled = from_numbers([2.0, 0.5], torch.device("meta"), torch.float32)
    assert filled.shape == (2,)
    assert set(seen.names) == {"aten.full.default", "aten.stack.default"}
    on_cpu = from_numbers([2.0, 0.5], torch.device("cpu"), torch.float64)
    assert on_cpu.tolist() == [2.0, 0.5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
def test_compiling_interpreted_kernels_is_refused() -> None:
    from fewstep.kernels.compile import compile_kernel

    launch = config.sinkhorn_update(1, 64, 3, "float32", "sm_90")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_kernel(sinkhorn_row_kernel, dtype="float32", arch="sm_90", launch=launch)
    with pytest.raises(ValueError, match=r"arch must be one of .*, got 'sm_20'"):
        compile_kernel(sinkhorn_row_kernel, dtype="float32", arch="sm_20", launch=launch)


COUNT_VARIANTS = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature
from fewstep.kernels import config
from fewstep.kernels.sinkhorn import apply, solve

backend = CUDABackend(GPUTarget("cuda", 90, 32))
variants = {}

def launch(kernel, *args, grid, warmup, **kwargs):
    assert all(size < 2**16 for size in grid[1:])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    key = bind(*args, **kwargs)[1]
    variants.setdefault(kernel.__name__, set()).add(tuple(map(tuple, key)))

JITFunction.run = launch
config._KEPT_FROM_DOT = 16
cases = ((1, 70, 4, 1), (3, 99, 17, 1), (4, 97, 16, 1), (2, 64, 5, 2))
for count, n, max_iter, temperatures in cases:
    x, y = torch.randn(count, n, 20), torch.randn(count, n + 30, 20)
    a, b = torch.rand(count, n), torch.rand(count, n + 30)
    eps = torch.rand(count * temperatures)
    for simultaneous, kept in ((False, 0), (False, 2**40), (True, 0)):
        how = (1e-3, None, 1.0, None, None, None, 1.0, simultaneous, False, kept, 0)
        points = (x, y, a, b, eps, None, None, 0, None)
        f, g, *_ = solve.sinkhorn(*points, max_iter, *how)
    v = torch.rand(count * temperatures, n + 30, 20)
    apply.sinkhorn_transport(x, y, f, g, b, eps, v, 0, None, 0)
print(json.dumps({name: len(keys) for name, keys in variants.items()}))
"""


def test_kernels_are_not_compiled_for_every_shape() -> None:
    """Launched without a device, up to the key under which a compiled kernel is kept."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COUNT_VARIANTS], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    variants = json.loads(run.stdout)
    assert variants == dict.fromkeys(variants, 1)
    assert len(variants) == 8


@pytest.mark.slow
def test_compiled_kernels_do_not_spill(tmp_path: Path) -> None:
    """The heaviest kernels; `python -m fewstep.kernels.compile` compiles them all in minutes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    module = ["-Werror", "-m", "fewstep.kernels.compile"]
    command = [sys.executable, *module, "--heaviest", "--arch"]
    runs = [
        subprocess.Popen(
            [*command, *pair],
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path / pair[0])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for pair in (("sm_80", "gfx942"), ("sm_90", "sm_100"))
    ]
    tables = [run.communicate()[0] for run in runs]
    rows = [row for table in tables for row in csv.DictReader(table.splitlines(), delimiter="\t")]
    assert {row["arch"] for row in rows} == set(config.ARCHITECTURES)
    kinds = {(row["kernel"], row["dtype"]) for row in rows}
    assert len(kinds) == 33
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["registers"]) > 0
        assert int(row["shared"]) <= SHARED[row["arch"].split("_")[0].rstrip("0123456789")]
    assert [run.returncode for run in runs] == [0, 0]
