"""Registers, spills, shared memory and theoretical occupancy of every GPU kernel; no GPU is needed.

    python -m benchmarks.occupancy [--arch sm_90] [--only cuda]

nvcc compiles the CUDA kernels, and the Triton kernels are compiled ahead of time in the
configurations that the launchers can ask for. Occupancy is the share of a multiprocessor's warps
that registers, threads and static shared memory allow; "dynamic" is what a block may take besides
before it falls. Exits with 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Limits:
    """What the blocks on one multiprocessor share.

    Attributes:
        warps: at most; each of `lanes` threads, and spread evenly over 4 schedulers.
        registers: per lane and scheduler, given out in units of 8.
        blocks: at most.
        shared: bytes, given out in units of `shared_unit` after `reserved` bytes per block.
    """

    warps: int
    lanes: int
    registers: int
    blocks: int
    shared: int
    shared_unit: int
    reserved: int


# CUDA programming guide, technical specifications per compute capability; AMD CDNA 3 ISA.
LIMITS = {
    "sm_80": Limits(64, 32, 512, 32, 164 << 10, 128, 1024),
    "sm_90": Limits(64, 32, 512, 32, 228 << 10, 128, 1024),
    "sm_100": Limits(64, 32, 512, 32, 228 << 10, 128, 1024),
    "gfx942": Limits(32, 64, 512, 32, 64 << 10, 512, 0),
}
CUDA_ARCHITECTURES = tuple(arch for arch in LIMITS if arch.startswith("sm_"))
SCHEDULERS = 4
REGISTER_UNIT = 8


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel takes: registers per thread, bytes of spills per thread, static (or,
    of Triton, all) shared memory per block, threads per block at most."""

    arch: str
    name: str
    registers: int
    spills: int
    shared: int
    threads: int


def resident(kernel: Kernel, dynamic: int = 0) -> int:
    """Blocks that a multiprocessor holds at once, with so much dynamic shared memory each.

    >>> resident(Kernel("sm_90", "k", registers=64, spills=0, shared=0, threads=256))
    4
    """
    limits = LIMITS[kernel.arch]
    warps = -(-kernel.threads // limits.lanes)
    registers = -(-max(kernel.registers, 1) // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = limits.registers // registers * SCHEDULERS // warps
    used = kernel.shared + dynamic + limits.reserved
    by_shared = limits.shared // max(-(-used // limits.shared_unit) * limits.shared_unit, 1)
    return min(limits.warps // warps, by_registers, by_shared, limits.blocks)


def occupancy(kernel: Kernel) -> tuple[float, int]:
    """Share of the warps that can be resident, and dynamic shared memory up to which it stays."""
    limits = LIMITS[kernel.arch]
    blocks = resident(kernel)
    warps = blocks * -(-kernel.threads // limits.lanes)
    if blocks == 0:
        return 0.0, 0
    share = limits.shared // blocks // limits.shared_unit * limits.shared_unit
    return warps / limits.warps, max(share - limits.reserved - kernel.shared, 0)


def parse_ptxas(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory by mangled name, from `ptxas -v`."""
    found, name, spills = {}, "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match[1]) + int(match[2])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = (int(match[1]), spills, int(shared[1]) if shared else 0)
            name = ""
    return found


def parse_threads(ptx: str) -> dict[str, int]:
    """The launch bounds by mangled name."""
    return {
        name: int(threads)
        for name, threads in re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx)
    }


def demangled(names: list[str]) -> list[str]:
    """Kernel and template arguments, without namespaces and parameters."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    plain = [line.replace("(anonymous namespace)", "") for line in done.stdout.splitlines()]
    plain = [re.sub(r"^void |\((?!.*::)[^()]*\)$|\b\w+::|^::|(?<=[<, ])::", "", s) for s in plain]
    return [re.sub(r"^:+|\(\w+\)(?=-?\w)", "", s.split(">(")[0] + ">" * (">(" in s)) for s in plain]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    return shutil.which("nvcc", path=path)


def compile_cuda(source: Path, arch: str) -> list[Kernel]:
    """The kernels of one .cu file."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("occupancy: nvcc is neither on PATH nor in CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-O3", "-std=c++20", "-Xptxas=-v", f"-arch={arch}", "-keep", "-keep-dir", folder]
        command = [compiler, *flags, "-cubin", "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"occupancy: {source.name} for {arch}: {done.stderr[-2000:]}")
        ptx = Path(folder, source.stem + ".ptx").read_text()
    usage, threads = parse_ptxas(done.stderr), parse_threads(ptx)
    return [
        Kernel(arch, name, *usage[mangled], threads=threads[mangled])
        for mangled, name in zip(usage, demangled(list(usage)), strict=True)
    ]


def cuda_kernels(architectures: list[str]) -> Iterator[Kernel]:
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    jobs = [partial(compile_cuda, s, arch) for arch in architectures for s in sources]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for kernels in pool.map(lambda job: job(), jobs):
            yield from kernels


def triton_kernels(architectures: list[str]) -> Iterator[Kernel]:
    from fewstep.kernels import compile as ahead

    for arch in architectures:
        for function, dtype, launch in ahead.shipped(arch):
            usage = ahead.compile_kernel(function, dtype=dtype, arch=arch, launch=launch)
            flags = " ".join(f"{k}={v}" for k, v in launch.items() if k.isupper())
            threads = launch["num_warps"] * LIMITS[arch].lanes
            name = f"{function.__name__} {dtype} {flags}"
            yield Kernel(arch, name, usage.registers, usage.spills, usage.shared, threads)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.occupancy",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--arch", action="append", choices=LIMITS, help="default: all")
    parser.add_argument("--only", choices=["cuda", "triton"])
    args = parser.parse_args(argv)
    architectures = args.arch or list(LIMITS)
    nvidia = [arch for arch in architectures if arch in CUDA_ARCHITECTURES]
    spilled = total = 0
    sys.stdout.write("arch\tregisters\tspills\tshared\tthreads\toccupancy\tdynamic\tkernel\n")
    for kind, kernels in (
        ("cuda", cuda_kernels(nvidia)),
        ("triton", triton_kernels(architectures)),
    ):
        if args.only not in (None, kind):
            continue
        for k in kernels:
            share, dynamic = occupancy(k)
            fields = (k.arch, k.registers, k.spills, k.shared, k.threads, f"{share:.0%}", dynamic)
            sys.stdout.write("\t".join(map(str, fields)) + f"\t{kind} {k.name}\n")
            sys.stdout.flush()
            spilled += k.spills > 0
            total += 1
    sys.stdout.write(f"{total} kernels, {spilled} that spill\n")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
