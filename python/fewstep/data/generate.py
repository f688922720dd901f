"""Making pairs with a teacher, in shards, by any number of workers."""

from __future__ import annotations

import contextlib
import json
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
from fewstep._files import checksum, replacing
from fewstep._torch import one_thread, torch_device
from fewstep.data.pairs import (
    CONFIG,
    DTYPES,
    FORMAT,
    MANIFEST,
    PairsConfig,
    digest,
    file_header,
    file_label,
    file_name,
    pairs_in,
    read_file,
)
from fewstep.samplers.edm import edm_sample
from fewstep.samplers.schedules import karras_sigmas
from fewstep.samplers.seeds import latents


@dataclass(frozen=True)
class Teacher:
    """A denoiser, and what tells its pairs from those of another one.

    Attributes:
        denoiser: `(x [B, ...], sigma [B])`, or with `labels [B]` where there are classes, to
            denoised images, `E[x_data | x_data + sigma eps = x]`.
        shape: of one image.
        classes: to condition on; 0 for none.
        precondition: sigma_data, where `denoiser` is the raw network of EDM's preconditioning.
        digest: identifies the weights; empty: that of the module, see `digest`.

    Raises:
        ValueError: no digest is given, and the denoiser is not an `nn.Module`.
    """

    denoiser: Callable[..., Tensor]
    shape: tuple[int, ...]
    classes: int = 0
    precondition: float | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            if not isinstance(self.denoiser, nn.Module):
                raise ValueError("Teacher: digest must be given where denoiser is no nn.Module")
            object.__setattr__(self, "digest", digest(self.denoiser))


def worker(shard: str = "0/1") -> tuple[int, int]:
    """This process's number and how many there are: `shard` "i/n", times torchrun's ranks.

    Raises:
        ValueError: `shard` is not "i/n" with 0 <= i < n.

    >>> worker("1/4")
    (1, 4)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not index < count:
        raise ValueError(f"shard must be i/n with i from 0 to n - 1, got {shard!r}")
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return index * world + rank, count * world


def generate(
    teacher: Teacher,
    config: PairsConfig,
    out: Path,
    *,
    worker: tuple[int, int] = (0, 1),
    device: str = "auto",
    progress: bool = True,
) -> int:
    """Make the pairs `x0 ~ N(0, I)`, `x1 = fewstep.edm_sample(teacher, x0)`, or a worker's share.

    The folder `out` gets `config.json`, files `pairs-K-of-N.safetensors` with `x0`, `x1` `[S, ...]`
    and, with classes, `labels` int64 `[S]`, and, when the last file is there, `manifest.json` with
    the checksum of each. Files appear whole; those that are there already are verified and kept.
    However the work is split and interrupted, the files are the same to the byte on one kind of
    machine: on the CPU each batch runs on one thread, and threads share the batches.

    Args:
        teacher (Teacher): its denoiser is evaluated without gradient, on the CPU by several
            threads at once.
        config (PairsConfig): see there.
        out (Path): folder, made if need be.
        worker (tuple[int, int]): (i, n): make files i, i + n, ... only.
        device (str): where the denoiser is; "auto": a GPU if there is one, torchrun's own of them.
        progress (bool): show a progress bar on stderr.

    Returns:
        int: files that other workers have still to make.

    Raises:
        ValueError: `out` holds pairs of another configuration or teacher, or a damaged file.
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
    from safetensors.torch import save_file
    from tqdm import tqdm  # type: ignore[import-untyped]

    index, count = worker
    if not 0 <= index < count:
        raise ValueError(f"worker must be (i, n) with 0 <= i < n, got {worker}")
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = torch_device(device)
    if isinstance(teacher.denoiser, nn.Module):
        teacher.denoiser.to(place)
    content = _content(teacher, config)
    _settle(out, content)
    mine = range(index, config.shards, count)
    total = sum(pairs_in(config, k) for k in mine)
    bar = tqdm(
        total=total,
        desc=f"pairs {index + 1}/{count}" if count > 1 else "pairs",
        unit="pair",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    with bar, _workers(place) as run:
        for k in mine:
            path = out / file_name(config, k)
            if path.exists():
                read_file(path, content, k)
                bar.update(pairs_in(config, k))
                continue
            first, pairs = k * config.shard_size, pairs_in(config, k)
            parts = []
            starts = range(first, first + pairs, config.batch)
            made = run(lambda start: _batch(teacher, config, start, place), starts)
            for start, part in zip(starts, made, strict=True):
                parts.append(part)
                bar.update(min(config.batch, first + pairs - start))
            arrays = {
                name: torch.cat([part[name] for part in parts])[:pairs].contiguous()
                for name in parts[0]
            }
            # One key: safetensors writes several in a random order.
            metadata = {"fewstep": json.dumps(file_label(content, k, checksum(arrays)))}
            with replacing(path) as temporary:
                save_file(arrays, temporary, metadata)
    names = [file_name(config, k) for k in range(config.shards)]
    missing = sum(not (out / name).exists() for name in names)
    if not missing and not (out / MANIFEST).exists():
        shards = [file_header(out / name, content, k) for k, name in enumerate(names)]
        _write(out / MANIFEST, {**content, "shards": shards})
    return missing


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
    """Make `out` a folder of these pairs; refuse where it holds others."""
    path = out / CONFIG
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if strangers := sorted(out.glob("*.safetensors")):
            raise ValueError(f"{out} holds {strangers[0].name} but no {CONFIG} of pairs")
        _write(path, content)
    try:
        began = json.loads(path.read_text())
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


@contextlib.contextmanager
def _workers(device: torch.device) -> Iterator[Callable[..., Any]]:
    """`map`, on the CPU by as many threads as torch has, with one thread to each call."""
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    with (
        one_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield pool.map


def _batch(
    teacher: Teacher, config: PairsConfig, start: int, device: torch.device
) -> dict[str, Tensor]:
    """Pairs start to start + batch, on the CPU, in the dtype of the files."""
    dtype = DTYPES[config.dtype]
    seeds = torch.arange(config.seed + start, config.seed + start + config.batch, device=device)
    # The sampler starts from what is stored.
    x0 = latents(seeds, teacher.shape).to(dtype).float()
    labels = seeds % teacher.classes if teacher.classes else None

    def denoiser(x: Tensor, level: Tensor) -> Tensor:
        return teacher.denoiser(x, level) if labels is None else teacher.denoiser(x, level, labels)

    x1 = edm_sample(
        denoiser,
        x0,
        steps=config.steps,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        rho=config.rho,
        precondition=teacher.precondition,
    )
    pair = {"x0": x0, "x1": x1} | ({} if labels is None else {"labels": labels})
    return {
        name: t.to("cpu", dtype if t.is_floating_point() else t.dtype) for name, t in pair.items()
    }
