"""Two libraries: fewstep._C (C++, always) and fewstep._C_cuda (CUDA, where it is asked for).

FEWSTEP_CUDA=1 builds the CUDA library too, which takes minutes; auto does so where nvcc is found.
FEWSTEP_CUDA_ARCHITECTURES=90 (or 80,90,100: the default) says for which compute capabilities.
FEWSTEP_SANITIZE=1 builds the C++ library with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
# The oldest torch that the libraries run on; the stable ABI serves every later one.
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
CXX = ["-O3", "-std=c++20", "-fvisibility=hidden", "-pthread", "-Wall", "-g0"]
# What lets plain loops become vector code without giving up inf and NaN.
SIMD = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined"]
STRIP = [] if sys.platform == "darwin" else ["-Wl,-s"]
DEBUG = ["-O1", "-g", "-fno-omit-frame-pointer"]
ARCHITECTURES = os.environ.get("FEWSTEP_CUDA_ARCHITECTURES", "80,90,100").split(",")


def find_toolkit() -> Path | None:
    """The CUDA toolkit with nvcc and headers: CUDA_HOME if set, else by PATH or the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [*os.get_exec_path(), "/usr/local/cuda/bin"]
    found = [
        Path(nvcc).resolve().parents[1] for f in folders if (nvcc := shutil.which("nvcc", path=f))
    ]
    return next((t for t in found if (t / "include/cuda_runtime_api.h").exists()), None)


def compiler_fault() -> str | None:
    """Why the C++ compiler that torch will call cannot build C++20 as it is written here."""
    if sys.platform == "win32":
        return "Windows is not supported: install it under WSL (wsl --install)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "c++")
    wanted = "GCC 11 or clang 14 or later is needed"
    try:
        command = [*compiler.split(), "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        how = "xcode-select --install" if sys.platform == "darwin" else "apt install g++"
        return f"no C++ compiler: {compiler} cannot be run; {wanted} ({how}, or set CXX)"
    found = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", macros))
    name, least = ("clang", 14) if "__clang_major__" in found else ("GCC", 11)
    version = int(found.get("__clang_major__") or found.get("__GNUC__") or 0)
    return f"{compiler} is {name} {version}: {wanted}" if version < least else None


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


class Build(BuildExtension):
    def run(self) -> None:
        if fault := compiler_fault():
            sys.exit(f"fewstep: {fault}")
        super().run()

    def build_extension(self, ext) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += pool.map(self.compile_cuda, getattr(ext, "cuda_sources", []))
        super().build_extension(ext)

    def compile_cuda(self, source: str) -> str:
        """Compile a torch-free .cu for every architecture; registers and spills go to the log."""
        target = Path(self.build_temp, *ARCHITECTURES, source).with_suffix(".o")
        newest = max(Path(d).stat().st_mtime for d in [source, *sources("csrc/**/*.[ch]*")])
        if not target.exists() or target.stat().st_mtime < newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
            newest_arch = f"compute_{ARCHITECTURES[-1]}"
            gencode.append(f"-gencode=arch={newest_arch},code={newest_arch}")  # PTX, later GPUs
            flags = ["-O3", "-std=c++20", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC", *gencode]
            command = [str(CUDA / "bin/nvcc"), "--threads=0", *flags, "-c", source]
            subprocess.run([*command, "-o", str(target)], check=True)
        return str(target)


sanitized = os.environ.get("FEWSTEP_SANITIZE") == "1"
common = {"depends": sources("csrc/**/*.h") + sources("csrc/**/*.inl"), "language": "c++"}
extensions = [
    CppExtension(
        "fewstep._C",
        ["csrc/ops.cpp", "csrc/module.cpp", *sources("csrc/cpu/**/*.cpp")],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=[*CXX, *SIMD, *STABLE, *((SANITIZE + DEBUG) * sanitized)],
        extra_link_args=SANITIZE if sanitized else STRIP,
        **common,
    )
]

wanted = os.environ.get("FEWSTEP_CUDA", "0")
if wanted not in ("0", "1", "auto"):
    sys.exit(f"fewstep: FEWSTEP_CUDA must be 0, 1 or auto, got {wanted!r}")
CUDA = find_toolkit() if wanted != "0" else None
if wanted == "1" and CUDA is None:
    sys.exit("fewstep: FEWSTEP_CUDA=1 needs nvcc: set CUDA_HOME or put nvcc on PATH")
if CUDA is not None:
    library = next(d for d in (CUDA / "lib64", CUDA / "lib") if d.exists())
    extension = CppExtension(
        "fewstep._C_cuda",
        sources("csrc/cuda/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), str(CUDA / "include")],
        extra_compile_args=[*CXX, *STABLE],
        # libtorch brings libtorch_cuda, which has the current stream, where torch has CUDA.
        extra_link_args=[
            "-Wl,--no-as-needed",
            *STRIP,
            "-ltorch",
            f"-L{library}",
            "-lcudart_static",
        ],
        **common,
    )
    extension.cuda_sources = sources("csrc/cuda/*.cu")
    extension.depends = [*extension.depends, *sources("csrc/cuda/*.cu*")]
    extensions.append(extension)

kernels = ["fewstep.kernels"] + [f"fewstep.kernels.{p}" for p in find_packages("kernels")]
setup(
    packages=find_packages("python") + kernels,
    package_dir={"": "python", "fewstep.kernels": "kernels"},
    package_data={"fewstep": ["py.typed"]},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
