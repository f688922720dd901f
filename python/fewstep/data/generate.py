"""Pairs are made with a teacher, in files, by any number of workers."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep
from fewstep._checks import check_types, count, flags, function
from fewstep._files import checksum, one_writer, read_json, replacing, write_tensors
from fewstep._torch import one_thread, torch_device
from fewstep.data.pairs import (
    CONFIG,
    DTYPES,
    FORMAT,
    MANIFEST,
    MOST_MANIFEST,
    PairsConfig,
    digest,
    file_header,
    file_label,
    file_name,
    pairs_in,
    read_file,
)
from fewstep.samplers.edm import edm_sample
from fewstep.samplers.inputs import check_precondition, check_shape
from fewstep.samplers.schedules import karras_sigmas
from fewstep.samplers.seeds import latents


@dataclass(frozen=True)
class Teacher:
    """A denoiser, and what tells its pairs from those of another one.

    Attributes:
        denoiser: function that maps `(x [B, ...], sigma [B])` to denoised images
            `E[x_data | x_data + sigma eps = x]`. With classes a third argument is `labels [B]`.
        shape: shape of one image.
        classes: number of classes that the denoiser is conditioned on; 0 for none.
        precondition: sigma_data of EDM's preconditioning, if `denoiser` is its raw network.
        digest: name of the weights, any string. Empty takes `fewstep.data.pairs.digest` of the
            module.

    Raises:
        ValueError: a number is outside its range, or the denoiser is not an `nn.Module` and no
            digest is given.
        TypeError: the denoiser cannot be called, or the shape does not hold integers.
    """

    denoiser: Callable[..., Tensor]
    shape: tuple[int, ...]
    classes: int = 0
    precondition: float | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        function("Teacher", "denoiser", self.denoiser)
        check_types(self)
        sizes = check_shape("Teacher", self.shape)
        object.__setattr__(self, "shape", tuple(sizes))
        object.__setattr__(self, "classes", count("Teacher", "classes", self.classes, low=0))
        precondition = check_precondition("Teacher", self.precondition)
        object.__setattr__(self, "precondition", precondition)
        if not self.digest:
            if not isinstance(self.denoiser, nn.Module):
                raise ValueError("Teacher: digest must be given where denoiser is no nn.Module")
            object.__setattr__(self, "digest", digest(self.denoiser))


def worker(shard: str = "0/1") -> tuple[int, int]:
    """This process's number, and the number of all, from `shard` "i/n" and torchrun's ranks.

    Raises:
        ValueError: `shard` is not "i/n" with 0 <= i < n.

    >>> worker("1/4")
    (1, 4)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard) if isinstance(shard, str) else None
    index, count = map(int, match.groups()) if match else (0, 0)
    if not index < count:
        raise ValueError(f"shard must be i/n with i from 0 to n - 1, got {shard!r}")
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return index * world + rank, count * world


def generate(
    teacher: Teacher,
    config: PairsConfig,
    out: str | Path,
    *,
    worker: tuple[int, int] = (0, 1),
    device: str = "auto",
    progress: bool = True,
) -> int:
    """Make the pairs `x0 ~ N(0, I)`, `x1 = fewstep.edm_sample(teacher, x0)`, or a worker's share.

    The folder `out` gets `config.json` and files `pairs-K-of-N.safetensors`. A file holds `x0` and
    `x1` `[S, ...]` and, with classes, `labels` int64 `[S]`. When the last file is there, the folder
    gets `manifest.json` with the checksum of each. A damaged manifest is replaced.

    Files appear whole. Those that are there already are verified and kept. The files are the same
    to the byte however the work is split and interrupted, on one kind of machine. On the CPU each
    batch runs on one thread, and threads share the batches.

    Args:
        teacher (Teacher): teacher, whose denoiser is evaluated without gradient. On the CPU a
            module runs on several threads. Each batch then has a copy that shares its parameters,
            so that no state gets from one batch to another. A function runs on one thread. So does
            a module that cannot be copied, is compiled, or has a hook that holds variables.
        config (PairsConfig): settings of the pairs.
        out (str | Path): folder of the pairs, made if need be.
        worker (tuple[int, int]): share (i, n) of the work, which is files i, i + n, and so on.
        device (str): device of the denoiser. "auto" takes a GPU if there is one, and under torchrun
            the rank's own.
        progress (bool): show a progress bar on stderr.

    Returns:
        int: number of files that other workers have still to make.

    Raises:
        ValueError: `out` holds other pairs or a damaged file; another process writes there, unless
            it has another share of the same n; images are not finite, or beyond the dtype of the
            files.
        OSError: a file cannot be written.
        ModuleNotFoundError: safetensors or tqdm is missing.

    >>> import tempfile
    >>> from fewstep.data.pairs import PairDataset
    >>> from fewstep.networks import EDMPrecond, ResidualMLP
    >>> folder = Path(tempfile.mkdtemp())
    >>> teacher = Teacher(EDMPrecond(ResidualMLP((2,), width=8)), (2,))
    >>> generate(teacher, PairsConfig(n=10, steps=4, batch=4, shard_size=8), folder, progress=False)
    0
    >>> len(PairDataset(folder))
    10
    """
    import safetensors  # noqa: F401  # named before anything is written where it is missing
    import tqdm  # type: ignore[import-untyped]  # noqa: F401

    for name, value, kind in (
        ("teacher", teacher, Teacher),
        ("config", config, PairsConfig),
        ("out", out, str | Path),
        ("device", device, str),
    ):
        if not isinstance(value, kind):
            word = "path" if name == "out" else getattr(kind, "__name__", kind)
            raise TypeError(f"generate: {name} must be a {word}, got {value!r}")
    out = Path(out)
    flags("generate", progress=progress)
    pair = isinstance(worker, tuple) and len(worker) == 2
    if not pair or not all(type(n) is int for n in worker) or not 0 <= worker[0] < worker[1]:
        raise ValueError(f"generate: worker must be (i, n) with 0 <= i < n, got {worker!r}")
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = torch_device(device)
    if isinstance(teacher.denoiser, nn.Module):
        teacher.denoiser.to(place)
    content = _content(teacher, config)
    with one_writer(out, worker):
        _settle(out, content)
        return _make(teacher, config, out, content, worker, place, progress=progress)


def _make(
    teacher: Teacher,
    config: PairsConfig,
    out: Path,
    content: dict[str, Any],
    worker: tuple[int, int],
    place: torch.device,
    *,
    progress: bool,
) -> int:
    from tqdm import tqdm

    index, count = worker
    mine = range(index, config.shards, count)
    total = sum(pairs_in(config, k) for k in mine)
    bar = tqdm(
        total=total,
        desc=f"pairs {index + 1}/{count}" if count > 1 else "pairs",
        unit="pair",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    own = _copies(teacher.denoiser) if place.type == "cpu" else None
    with bar, _workers(place, alone=own is None) as run:
        for k in mine:
            path = out / file_name(config, k)
            if path.exists():
                read_file(path, content, k)
                bar.update(pairs_in(config, k))
                continue
            first, pairs = k * config.shard_size, pairs_in(config, k)
            parts = []
            starts = range(first, first + pairs, config.batch)
            made = run(lambda start: _batch(teacher, config, start, place, own), starts)
            for start, part in zip(starts, made, strict=True):
                parts.append(part)
                bar.update(min(config.batch, first + pairs - start))
            arrays = {
                name: torch.cat([part[name] for part in parts])[:pairs].contiguous()
                for name in parts[0]
            }
            # One key: safetensors writes several in a random order.
            metadata = {"fewstep": json.dumps(file_label(content, k, checksum(arrays)))}
            write_tensors(path, arrays, metadata)
    names = [file_name(config, k) for k in range(config.shards)]
    missing = sum(not (out / name).exists() for name in names)
    if not missing:
        shards = [file_header(out / name, content, k) for k, name in enumerate(names)]
        whole = {**content, "shards": shards}
        if not _says(out / MANIFEST, whole):
            _write(out / MANIFEST, whole)
    return missing


def _says(path: Path, content: dict[str, Any]) -> bool:
    """Whether a manifest is there and right, whichever version wrote it."""
    try:
        found = dict(read_json(path, most=MOST_MANIFEST))
    except (OSError, ValueError, TypeError):
        return False
    return {**found, "fewstep": content["fewstep"]} == content


def _content(teacher: Teacher, config: PairsConfig) -> dict[str, Any]:
    sigmas = karras_sigmas(
        config.steps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho
    )
    return {
        "format": FORMAT,
        "config": asdict(config),
        "sampler": "edm_sample, Heun, S_churn 0",
        "sigmas": sigmas.tolist(),
        "teacher": {
            "digest": teacher.digest,
            "shape": list(teacher.shape),
            "classes": teacher.classes,
            "precondition": teacher.precondition,
        },
        "fewstep": fewstep.__version__,
    }


def _settle(out: Path, content: dict[str, Any]) -> None:
    """Make `out` a folder of these pairs, or raise ValueError if it holds others."""
    path = out / CONFIG
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if strangers := sorted(out.glob("*.safetensors")):
            raise ValueError(f"{out} holds {strangers[0].name} but no {CONFIG} of pairs")
        _write(path, content)
    try:
        began = read_json(path)
        entries = _flat(began)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of pairs: {error}") from error
    for name, value in _flat(content).items():
        if name != "fewstep" and entries.get(name) != value:
            raise ValueError(
                f"{out} holds pairs of another configuration: {name} is {entries.get(name)!r},"
                f" not {value!r}"
            )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path, shared=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _copies(denoiser: Callable[..., Tensor]) -> Callable[[], nn.Module] | None:
    """A function that copies a module in its present state and shares its parameters.

    None if copies could write to the same place.
    """
    if not isinstance(denoiser, nn.Module):
        return None
    for module in denoiser.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        closed = any(getattr(hook, "__closure__", None) for hook in hooks)
        bound = any(inspect.ismethod(hook) for hook in hooks)
        compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        if closed or bound or compiled or "forward" in vars(module):
            return None
    shared = {id(p): p for p in denoiser.parameters()}
    try:
        first = copy.deepcopy(denoiser, dict(shared))
    except Exception:
        return None  # there is no telling what a module holds
    return lambda: copy.deepcopy(first, dict(shared))


@contextlib.contextmanager
def _workers(device: torch.device, *, alone: bool) -> Iterator[Callable[..., Any]]:
    """A `map`, on the CPU by torch's number of threads, or one. Each call runs on one thread."""
    if device.type != "cpu":
        yield map
        return
    threads = 1 if alone else torch.get_num_threads()
    with (
        one_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield pool.map


def _batch(
    teacher: Teacher,
    config: PairsConfig,
    start: int,
    device: torch.device,
    own: Callable[[], nn.Module] | None,
) -> dict[str, Tensor]:
    """Pairs start to start + batch, on the CPU, in the dtype of the files."""
    network = teacher.denoiser if own is None else own()
    dtype = DTYPES[config.dtype]
    seeds = torch.arange(config.seed + start, config.seed + start + config.batch, device=device)
    # The sampler starts from what is stored.
    x0 = latents(seeds, teacher.shape).to(dtype).float()
    labels = seeds % teacher.classes if teacher.classes else None

    def denoiser(x: Tensor, level: Tensor) -> Tensor:
        out: Tensor = network(x, level) if labels is None else network(x, level, labels)
        return out

    x1 = edm_sample(
        denoiser,
        x0,
        steps=config.steps,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        rho=config.rho,
        precondition=teacher.precondition,
    )
    x1 = x1.cpu()
    largest = float(x1.abs().max())
    if not largest <= torch.finfo(dtype).max:
        cure = "" if not math.isfinite(largest) else ": dtype 'float32' has them"
        raise ValueError(f"images must be finite in {config.dtype}, got {largest:g}{cure}")
    pair = {"x0": x0.to("cpu", dtype), "x1": x1.to(dtype)}
    return pair if labels is None else pair | {"labels": labels.cpu()}
