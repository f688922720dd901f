"""Pairs of noise and a teacher's image of it, in shards on disk: made, checked and read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fewstep
from fewstep._checks import check_integers
from fewstep._files import checksum, replacing
from fewstep._torch import one_thread, torch_device
from fewstep.samplers.edm import edm_sample, karras_sigmas, latents

CONFIG, MANIFEST = "config.json", "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_FORMAT = "fewstep pairs 1"


@dataclass(frozen=True)
class PairsConfig:
    """What decides a set of pairs, beside its teacher.

    Pair i has the latent of seed `seed + i` and, for a class-conditional teacher, the label
    `(seed + i) % classes`. The teacher always runs on whole batches that begin at multiples of
    `batch`, so a pair does not depend on `n`, `shard_size` or on which process makes it.

    Attributes:
        n: pairs.
        seed: of the first latent.
        steps: N of the sampler, which evaluates the teacher 2 N - 1 times.
        sigma_min, sigma_max, rho: of the sampler's schedule, `fewstep.karras_sigmas`.
        batch: of the teacher's evaluations.
        shard_size: pairs in a file, a multiple of `batch`.
        dtype: of the files, "float32" or "float16".

    Raises:
        ValueError: a number outside its range.
    """

    n: int = 1_000_000
    seed: int = 0
    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    batch: int = 256
    shard_size: int = 8192
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_integers(self, "n", "steps", "batch", "shard_size")
        if self.seed + self.shards * self.shard_size > 2**63:
            raise ValueError(f"seed must leave room for n seeds below 2^63, got {self.seed}")
        if self.shard_size % self.batch:
            raise ValueError(
                f"shard_size must be a multiple of batch, {self.batch}, got {self.shard_size}"
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0 < self.rho < math.inf:
            raise ValueError(
                "sigma_min, sigma_max and rho must be positive and finite, the first two"
                f" increasing, got {self.sigma_min}, {self.sigma_max} and {self.rho}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {self.dtype!r}")

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.n // self.shard_size)


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


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's `repr` and of the names, shapes, dtypes and values of its state.

    >>> digest(nn.Linear(2, 1)) == digest(nn.Linear(2, 1))
    False
    """
    sha = hashlib.sha256(repr(module).encode())
    for name, t in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        sha.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


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
    total = sum(_pairs_in(config, k) for k in mine)
    bar = tqdm(
        total=total,
        desc=f"pairs {index + 1}/{count}" if count > 1 else "pairs",
        unit="pair",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    with bar, _workers(place) as run:
        for k in mine:
            path = out / _name(config, k)
            if path.exists():
                _read(path, content, k)
                bar.update(_pairs_in(config, k))
                continue
            first, pairs = k * config.shard_size, _pairs_in(config, k)
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
            metadata = {"fewstep": json.dumps(_label(content, k, checksum(arrays)))}
            with replacing(path) as temporary:
                save_file(arrays, temporary, metadata)
    names = [_name(config, k) for k in range(config.shards)]
    missing = sum(not (out / name).exists() for name in names)
    if not missing and not (out / MANIFEST).exists():
        shards = [_header(out / name, content, k) for k, name in enumerate(names)]
        _write(out / MANIFEST, {**content, "shards": shards})
    return missing


class PairDataset(Dataset[tuple[Tensor, ...]]):
    """The pairs of a folder, memory-mapped: only what is read is loaded.

    Item i is `(x0, x1)`, or `(x0, x1, label)` of a class-conditional teacher, in float32. Opening
    checks the manifest, and of each file its size and header; `verify` reads every byte.

    Args:
        folder (Path): that `generate` or `fewstep pairs` filled.

    Attributes:
        shape: of one image.
        classes: of the teacher; 0 for none.
        manifest: the content of `manifest.json`.

    Raises:
        ValueError: no manifest, or a file that is missing, truncated or of other pairs.
        ModuleNotFoundError: safetensors is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            if self.manifest["format"] != _FORMAT:
                raise ValueError(f"format is {self.manifest['format']!r}")
            self.config = PairsConfig(**self.manifest["config"])
            self.shape = tuple(map(int, self.manifest["teacher"]["shape"]))
            self.classes = int(self.manifest["teacher"]["classes"])
            shards = self.manifest["shards"]
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} holds no complete pairs, {MANIFEST} is missing: run fewstep pairs"
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a manifest of pairs: {error}") from error
        if len(shards) != self.config.shards:
            raise ValueError(f"{path} must list {self.config.shards} files, got {len(shards)}")
        for k, shard in enumerate(shards):
            found = _header(self.folder / _name(self.config, k), self.manifest, k)
            if found != shard:
                raise ValueError(
                    f"{self.folder / found['file']} is not the one of the manifest: it has"
                    f" {found}, not {shard}"
                )
        self._maps: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return self.config.n

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be within {len(self)} pairs, got {index}")
        return tuple(t[0] for t in self.batch(torch.tensor([index % len(self)])))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """What a DataLoader asks for: one read for a whole batch."""
        return list(zip(*self.batch(torch.as_tensor(indices)), strict=True))

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Pairs of int64 indices `[B]` in [0, n): x0 and x1 `[B, ...]`, and labels `[B]` if any."""
        if not self._maps:
            names = (_name(self.config, k) for k in range(self.config.shards))
            self._maps = [_tensors(self.folder / name)[0] for name in names]
        shard = indices // self.config.shard_size
        row = indices % self.config.shard_size
        out: dict[str, Tensor] = {}
        for k in sorted(set(shard.tolist())):
            where = (shard == k).nonzero()[:, 0]
            for name, t in self._maps[k].items():
                kind = torch.float32 if t.is_floating_point() else t.dtype
                if name not in out:
                    out[name] = torch.empty((len(indices), *t.shape[1:]), dtype=kind)
                out[name][where] = t[row[where]].to(kind)
        return tuple(out[name] for name in ("x0", "x1", "labels") if name in out)

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            ValueError: one is damaged, by its name.
        """
        for k in range(self.config.shards):
            _read(self.folder / _name(self.config, k), self.manifest, k)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": []}  # each process maps the files itself


def _content(teacher: Teacher, config: PairsConfig) -> dict[str, Any]:
    sigmas = karras_sigmas(
        config.steps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho
    )
    return {
        "format": _FORMAT,
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


def _name(config: PairsConfig, k: int) -> str:
    return f"pairs-{k:05d}-of-{config.shards:05d}.safetensors"


def _pairs_in(config: PairsConfig, k: int) -> int:
    return min(config.shard_size, config.n - k * config.shard_size)


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


def _label(content: dict[str, Any], k: int, crc: str) -> dict[str, Any]:
    """What a file says of itself."""
    same = {name: value for name, value in content.items() if name not in ("fewstep", "shards")}
    pairs = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    return {"format": _FORMAT, "pairs": pairs, "shard": k, "crc32": crc}


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, memory-mapped, and its label."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            label = json.loads((file.metadata() or {}).get("fewstep", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, label  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged: delete it and run fewstep pairs again ({error})"
        ) from error


def _header(path: Path, content: dict[str, Any], k: int) -> dict[str, Any]:
    """A file's line in the manifest, from its header alone."""
    _, label = _tensors(path)
    crc = str(label.get("crc32"))
    if label != _label(content, k, crc):
        raise ValueError(f"{path} is not file {k} of these pairs: it says {label}")
    return {
        "file": path.name,
        "pairs": _pairs_in(PairsConfig(**content["config"]), k),
        "bytes": path.stat().st_size,
        "crc32": crc,
    }


def _read(path: Path, content: dict[str, Any], k: int) -> None:
    """Verify a file.

    Raises:
        ValueError: it is missing, damaged, or of other pairs.
    """
    tensors, label = _tensors(path)
    crc = checksum(tensors)
    if label.get("crc32") != crc:
        raise ValueError(
            f"{path} is damaged, its checksum does not match: delete it and run fewstep pairs again"
        )
    if label != _label(content, k, crc):
        raise ValueError(f"{path} is not file {k} of these pairs: it says {label}")
