"""What the Triton kernels cost in registers, compiled ahead of time; no GPU is needed.

`python -m fewstep.kernels.compile` prints a table of the shipped configurations.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fewstep.reference.dual import ACTIVATIONS

from . import attention, config, dual, heun, norms
from .probe import probe_kernel
from .sinkhorn import hessian
from .sinkhorn.alternating import sinkhorn_column_kernel, sinkhorn_row_kernel
from .sinkhorn.apply import sinkhorn_apply_kernel
from .sinkhorn.kept import sinkhorn_cost_kernel, sinkhorn_kept_kernel, sinkhorn_kept_merge_kernel
from .sinkhorn.layout import Clouds
from .sinkhorn.symmetric import sinkhorn_merge_kernel, sinkhorn_symmetric_kernel

# With float32, tangents and probes may be bfloat16.
_POINTER = {"float32": "*fp32", "float64": "*fp64", "bfloat16 tangents": "*fp32"}
_TANGENTS = ("U", "Grad_u", "Out_u")
_OTHER = {
    "Iterations": "*i64",
    "Annealing": "*i32",
    "Done": "*i32",
    "cost_scale": "fp32",
    "Key": "*i64",
    "Ids": "*i64",
    "Coefficients": "*fp64",
    "Seeds": "*i64",
    "Wrong": "*i32",
}
_INTEGERS = (
    "N",
    "M",
    "D",
    "K",
    "partials",
    "temperatures",
    "diagonal",
    "step",
    "max_iter",
    "row_pieces",
    "column_pieces",
    "batch",
    "bits",
    "channels",
    "count",
    "d",
    "dv",
    "groups",
    "heads",
    "inner",
    "m",
    "n",
    "per_sample",
    "period",
    "row",
    "rows",
    "stride_b",
    "stride_h",
    "stride_m",
    "stride_n",
    "tangents",
)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread.
        spills: bytes per thread stored to memory for want of registers.
        shared: bytes of shared memory per program.
    """

    registers: int
    spills: int
    shared: int


def compile_kernel(kernel: Any, *, dtype: str, arch: str, launch: dict[str, Any]) -> Usage:
    """Compile a kernel for an architecture and read off what it uses.

    Args:
        kernel: a `triton.jit` function of this package.
        dtype (str): "float32", "float64", or of duals "bfloat16 tangents" beside float32.
        arch (str): one of `config.ARCHITECTURES`.
        launch (dict): constants (upper case; those that the kernel does not have are left out)
            and options of the compiler (lower case).

    Returns:
        Usage: registers, spills, shared memory.

    Raises:
        ValueError: an unknown dtype or architecture.
        RuntimeError: the kernels were imported for the interpreter.
    """
    if dtype not in _POINTER:
        raise ValueError(f"compile_kernel: dtype must be one of {list(_POINTER)}, got {dtype!r}")
    if arch not in config.ARCHITECTURES:
        raise ValueError(
            f"compile_kernel: arch must be one of {config.ARCHITECTURES}, got {arch!r}"
        )
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("compile_kernel: unset TRITON_INTERPRET before importing the kernels")
    names = kernel.arg_names
    constants = {name: value for name, value in launch.items() if name in names}
    signature: dict[str, Any] = {name: _OTHER.get(name, _POINTER[dtype]) for name in names}
    if dtype == "bfloat16 tangents":
        drawn = "Out" if launch.get("MODE") == 0 else "Y"
        low = (drawn,) if kernel is probe_kernel else _TANGENTS
        signature |= {name: "*bf16" for name in low if name in names}
    signature |= {name: "i32" for name in _INTEGERS if name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    if "clouds" in names:
        of_fields = (
            "i32" if name in ("n", "m", "d") else _POINTER[dtype] for name in Clouds._fields
        )
        signature["clouds"] = Clouds._make(of_fields)
    # The launchers pad the points, and the coordinates of a dot, to multiples of 16.
    aligned = {"N", "M"} | ({"D"} if launch.get("DOT") else set())
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for p in kernel.params:
        own = signature[p.name]
        places: list[tuple[tuple[int, ...], str, str]] = [((p.num,), p.name, own)]
        if isinstance(own, Clouds):
            fields = enumerate(own._asdict().items())
            places = [((p.num, k), name.upper(), str(one)) for k, (name, one) in fields]
        for place, name, one in places:
            if not p.do_not_specialize and (one[0] == "*" or name in aligned):
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    options = {name: value for name, value in launch.items() if name.islower()}
    compiled = triton.compile(source, target=target, options=options)
    if amd:
        listing = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", listing)
        spills = _number(r"\.private_segment_fixed_size:\s+(\d+)", listing)
    else:
        log = _assemble(compiled.asm["ptx"], int(arch[3:]))
        registers = _number(r"Used (\d+) registers", log)
        spills = _number(r"(\d+) bytes spill stores", log)
    return Usage(registers=registers, spills=spills, shared=compiled.metadata.shared)


def _assemble(ptx: str, capability: int) -> str:
    name = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        assembler = get_ptxas(capability).path
        command = [assembler, "-v", f"--gpu-name={name}", source, "-o", f"{source}.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"compile_kernel: no {pattern!r} in the compiler's output")
    return int(match.group(1))


def shipped(arch: str, *, heaviest: bool = False) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Every (kernel, dtype, launch) that the launchers can ask for on an architecture.

    With `heaviest` one per family of kernels: those closest to the limit of 255 registers.
    """
    seen: list[tuple[str, str, dict[str, Any]]] = []
    for kernel, dtype, launch in _launches(arch):
        key = (kernel.__name__, dtype, launch)
        if key in seen:
            continue
        seen.append(key)
        if heaviest and dtype == "bfloat16 tangents" and not _heavy(kernel, launch):
            continue
        if "DOT" not in launch:
            most = {"EUCLIDEAN": True, "DIAGONAL": True, "SUMS": False}
            if not heaviest or all(launch.get(name, most[name]) == most[name] for name in most):
                yield kernel, dtype, launch
            continue
        large = launch["BLOCK_M"] == (64 if launch["DOT"] else 128)
        apply = kernel is sinkhorn_apply_kernel
        row = kernel in (sinkhorn_row_kernel, sinkhorn_symmetric_kernel)
        symmetric = kernel is sinkhorn_symmetric_kernel
        lightest = launch["PRECISION"] == "tf32" and not symmetric
        heavy = launch["EUCLIDEAN"] and large and (row or apply) and not lightest
        heavy = heavy and launch["BLOCK_D"] != 32
        # Leaving out a diagonal takes registers, so that wide products have smaller tiles then.
        heavy = heavy and launch["DIAGONAL"] == (launch.get("BLOCK_K") != 64)
        if apply:
            plain_gradient = launch["GRADIENT"] and not launch["NEAR_ONLY"] and launch["DOT"]
            narrow = launch["BLOCK_K"] < 32 and not launch["GRADIENT"]
            heavy = heavy and not plain_gradient and not narrow and launch["BLOCK_K"] > 4
        if heavy or not heaviest:
            yield kernel, dtype, launch


def _heavy(kernel: Any, launch: dict[str, Any]) -> bool:
    """Of duals: gelu's backward, the longest rows, products with the sphere."""
    if kernel is dual.dual_activate_kernel:
        own = launch["KIND"] == "gelu" and launch["BACKWARD"]
    elif kernel is probe_kernel:
        own = launch["KIND"] == 3 and launch["MODE"] == 1
    else:
        own = launch["BLOCK"] >= min(config.LONGEST_ROW.values())
    return bool(own)


def _dual_launches(arch: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    for dtype in _POINTER:
        low, own = dtype == "bfloat16 tangents", dtype if dtype == "float64" else "float32"
        launch = config.dual_activate(own, arch)
        shared = (False,) if low else (False, True)
        for kind, backward, alone in itertools.product(ACTIVATIONS, (False, True), shared):
            flags: dict[str, Any]
            flags = {"KIND": kind, "BACKWARD": backward, "SHARED": alone, "SHIFT": True}
            flags |= {"BETA": 1.0, "THRESHOLD": 20.0}
            yield dual.dual_activate_kernel, dtype, launch | flags
        for n, centred in itertools.product((64, config.LONGEST_ROW[own]), (False, True)):
            flags = {"CENTRED": centred, "SHIFT": True, "WEIGHT": True, "EPS": 1e-5}
            launch = config.dual_norm(n, own, arch) | flags
            yield norms.dual_norm_kernel, dtype, launch | {"BIAS": True}
            yield norms.dual_norm_backward_kernel, dtype, launch
        for drawn, mode in itertools.product(range(4), range(2 if low else 3)):
            flags = {"KIND": drawn, "MODE": mode, "IDS": True}
            yield probe_kernel, dtype, config.probe(own, arch) | flags


def _heun_launches(arch: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    for (dtype, pair), terms, noise in itertools.product(
        (("float32", False), ("float32", True), ("float64", False)),
        range(heun.MOST_TERMS + 1),
        (False, True),
    ):
        wide = pair or dtype == "float64"
        flags = {"WIDE": wide, "TERMS": terms, "NOISE": noise, "LOW": pair, "OUT_LOW": pair}
        flags |= {"HIGH": True, "NET": True, "WRONG": True}
        launch = config.heun_combine("float64" if wide else "float32", arch)
        yield heun.heun_combine_kernel, dtype, launch | flags


def _attention_launches(arch: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    for dtype, tangents in itertools.product(("float32", "float64"), (False, True)):
        flags = {"SCALE": 0.125, "CAUSAL": True, "MASK": 2}
        flags |= dict.fromkeys(("TANGENTS", "TQ", "TK", "TV"), tangents)
        launch = config.dual_attention(64, dtype, arch) | flags
        yield attention.dual_attention_kernel, dtype, launch
        yield attention.dual_attention_rows_kernel, dtype, launch
        yield attention.dual_attention_columns_kernel, dtype, launch


def _launches(arch: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    # precision="float32" takes what few dimensions do.
    points = (
        *itertools.product(("float32",), (32, 64, 128), ("tf32x3", "tf32")),
        ("float32", 3, "float32"),
        ("float32", 3, "tf32x3"),
        ("float64", 64, "tf32x3"),
    )
    cases = itertools.product(points, (False, True), (False, True), (1, 1024))
    for (dtype, dim, precision), euclidean, diagonal, batch in cases:
        cost = {"EUCLIDEAN": euclidean, "DIAGONAL": diagonal}
        update = config.sinkhorn_update(batch, 1024, dim, dtype, arch, precision) | cost
        yield sinkhorn_row_kernel, dtype, update
        yield sinkhorn_column_kernel, dtype, update
        yield sinkhorn_symmetric_kernel, dtype, config.sinkhorn_symmetric(update, arch)
        yield sinkhorn_cost_kernel, dtype, update
        yield sinkhorn_merge_kernel, dtype, config.sinkhorn_merge()
        yield sinkhorn_kept_kernel, dtype, config.sinkhorn_kept(dtype, arch)
        yield sinkhorn_kept_merge_kernel, dtype, config.sinkhorn_kept_merge()
        if dtype == "float64":
            second = config.sinkhorn_hessian(batch, 1024, arch) | cost
            yield hessian.sinkhorn_hessian_kernel, dtype, second | {"SUMS": False}
            yield hessian.sinkhorn_hessian_kernel, dtype, second | {"SUMS": True}
        for width in (1, 10, 40, 128):
            for gradient, near_only in ((False, False), (True, False), (True, True)):
                if near_only and not (euclidean and update["DOT"]):
                    continue
                launch = config.sinkhorn_apply(
                    *(batch, 1024, dim, width, dtype, arch, precision),
                    gradient=gradient,
                    near_only=near_only,
                    diagonal=diagonal,
                )
                launch |= cost | {"GRADIENT": gradient}
                yield sinkhorn_apply_kernel, dtype, launch
    yield from _dual_launches(arch)
    yield from _attention_launches(arch)
    yield from _heun_launches(arch)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fewstep.kernels.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=config.ARCHITECTURES)
    parser.add_argument("--heaviest", action="store_true", help="one per family of kernels")
    arguments = parser.parse_args()
    write = sys.stdout.write
    write("arch\tkernel\tdtype\tregisters\tspills\tshared\tlaunch\n")
    spilled = False
    for arch in arguments.arch or config.ARCHITECTURES:
        for kernel, dtype, launch in shipped(arch, heaviest=arguments.heaviest):
            usage = compile_kernel(kernel, dtype=dtype, arch=arch, launch=launch)
            spilled |= usage.spills > 0
            columns = (arch, kernel.__name__, dtype, usage.registers, usage.spills, usage.shared)
            flags = " ".join(f"{name}={value}" for name, value in launch.items())
            write("\t".join(map(str, columns)) + f"\t{flags}\n")
            sys.stdout.flush()
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
