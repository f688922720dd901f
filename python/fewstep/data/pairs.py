"""Pairs of noise and a teacher's image of it, in files that are checked and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fewstep._checks import check_integers, check_types, integer, one_of
from fewstep._files import checksum, read_json, read_tensors
from fewstep._names import PairsDtype
from fewstep.samplers.inputs import check_schedule

CONFIG, MANIFEST = "config.json", "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
FORMAT = "fewstep pairs 1"
MOST_MANIFEST = 64 << 20  # bytes, a line for each file


@dataclass(frozen=True)
class PairsConfig:
    """The settings that decide a set of pairs, together with its teacher.

    Pair i has the latent of seed `seed + i` and, for a class-conditional teacher, the label
    `(seed + i) % classes`. The teacher always runs on whole batches that begin at multiples of
    `batch`. A pair therefore does not depend on `n`, on `shard_size`, or on the process that makes
    it.

    Attributes:
        n: number of pairs.
        seed: seed of the first latent, at least 0.
        steps: number N of sampler steps. The sampler evaluates the teacher 2 N - 1 times.
        sigma_min: lowest noise level of the sampler, in units of the data.
        sigma_max: highest noise level of the sampler, in units of the data.
        rho: exponent of the sampler's schedule, see `fewstep.karras_sigmas`. A larger one puts more
            levels near sigma_min.
        batch: number of pairs per evaluation of the teacher.
        shard_size: number of pairs in a file, a multiple of `batch`.
        dtype: dtype of the files, "float32" or "float16". The latter has no values beyond 65504.

    Raises:
        ValueError: a number is outside its range, or a name is unknown.
        TypeError: a value is of the wrong type.
    """

    n: int = 1_000_000
    seed: int = 0
    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    batch: int = 256
    shard_size: int = 8192
    dtype: PairsDtype = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        check_integers(self, "n", "steps", "batch", "shard_size")
        if self.seed + self.shards * self.shard_size > 2**63:
            raise ValueError(f"seed must leave room for n seeds below 2^63, got {self.seed}")
        if self.shard_size % self.batch:
            raise ValueError(
                f"shard_size must be a multiple of batch, {self.batch}, got {self.shard_size}"
            )
        check_schedule("PairsConfig", self.sigma_min, self.sigma_max, self.rho)
        one_of("PairsConfig", "dtype", self.dtype, tuple(DTYPES))

    @property
    def shards(self) -> int:
        """The number of files."""
        return -(-self.n // self.shard_size)


def digest(module: nn.Module) -> str:
    """The SHA-256 of a module's `repr` and of its state's names, shapes, dtypes and values.

    >>> digest(nn.Linear(2, 1)) == digest(nn.Linear(2, 1))
    False
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"digest: module must be an nn.Module, got {module!r}")
    sha = hashlib.sha256(repr(module).encode())
    for name, t in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        sha.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class PairDataset(Dataset[tuple[Tensor, ...]]):
    """The pairs of a folder, memory-mapped, so that memory holds only what is read.

    Item i is `(x0, x1)` in float32, or `(x0, x1, label)` for a class-conditional teacher. Opening
    checks the manifest and the size and header of each file. `verify` reads every byte.

    Args:
        folder (Path): folder that `generate` or `fewstep pairs` filled.

    Attributes:
        shape: shape of one image.
        classes: number of the teacher's classes; 0 for none.
        manifest: content of `manifest.json`.

    Raises:
        ValueError: there is no manifest, or a file is missing, truncated or of other pairs.
        ModuleNotFoundError: safetensors is missing.
    """

    def __init__(self, folder: Path) -> None:
        if not isinstance(folder, str | Path) or not str(folder):
            raise TypeError(f"PairDataset: folder must be a path, got {folder!r}")
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            self.manifest: dict[str, Any] = read_json(path, most=MOST_MANIFEST)
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"format is {self.manifest['format']!r}")
            self.config = PairsConfig(**self.manifest["config"])
            self.shape = tuple(map(int, self.manifest["teacher"]["shape"]))
            self.classes = int(self.manifest["teacher"]["classes"])
            shards = list(self.manifest["shards"])
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} holds no complete pairs, {MANIFEST} is missing: run fewstep pairs"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path} is not a manifest of pairs: {error}") from error
        if len(shards) != self.config.shards:
            raise ValueError(f"{path} must list {self.config.shards} files, got {len(shards)}")
        for k, shard in enumerate(shards):
            found = file_header(self.folder / file_name(self.config, k), self.manifest, k)
            if found != shard:
                raise ValueError(
                    f"{self.folder / found['file']} is not the one of the manifest: it has"
                    f" {found}, not {shard}"
                )
        self._maps: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return self.config.n

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        index = integer("PairDataset", "index", index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be within {len(self)} pairs, got {index}")
        return tuple(t[0] for t in self.batch(torch.tensor([index % len(self)])))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """The items of a batch, in one read. A DataLoader calls this."""
        if not isinstance(indices, Sequence | Tensor | np.ndarray):
            raise TypeError(f"PairDataset: indices must be a sequence, got {indices!r}")
        own = [integer("PairDataset", "indices", index) for index in indices]
        return list(zip(*self.batch(torch.tensor(own, dtype=torch.int64)), strict=True))

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, ...]:
        """The pairs of indices `[B]` in [0, n), as x0 and x1 `[B, ...]` and, if any, labels `[B]`.

        Raises:
            TypeError: indices are not integers.
            IndexError: an index is not in [0, n).
        """
        given = indices
        indices = torch.as_tensor(given)
        real = indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
        if indices.ndim != 1 or (real and indices.numel() > 0):
            raise TypeError(f"PairDataset: indices must be integers [B], got {given!r}")
        indices = indices.long()
        wrong = indices[(indices < 0) | (indices >= len(self))]
        if len(wrong):
            raise IndexError(
                f"PairDataset: indices must be in [0, {len(self)}), got {int(wrong[0])}"
            )
        if not self._maps:
            names = (file_name(self.config, k) for k in range(self.config.shards))
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
            ValueError: a file is damaged. The message names it.
        """
        for k in range(self.config.shards):
            read_file(self.folder / file_name(self.config, k), self.manifest, k)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": []}  # each process maps the files itself


def file_name(config: PairsConfig, k: int) -> str:
    return f"pairs-{k:05d}-of-{config.shards:05d}.safetensors"


def pairs_in(config: PairsConfig, k: int) -> int:
    return min(config.shard_size, config.n - k * config.shard_size)


def file_label(content: dict[str, Any], k: int, crc: str) -> dict[str, Any]:
    """What a file says of itself."""
    same = {name: value for name, value in content.items() if name not in ("fewstep", "shards")}
    pairs = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    return {"format": FORMAT, "pairs": pairs, "shard": k, "crc32": crc}


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, memory-mapped, and its label."""
    try:
        tensors, metadata = read_tensors(path)
        return tensors, dict(json.loads(metadata.get("fewstep", "{}")))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: delete it and run fewstep pairs again ({error})"
        ) from error


def file_header(path: Path, content: dict[str, Any], k: int) -> dict[str, Any]:
    """A file's entry in the manifest, from its header alone."""
    tensors, label = _tensors(path)
    crc = str(label.get("crc32"))
    if label != file_label(content, k, crc):
        raise ValueError(f"{path} is not file {k} of these pairs: it says {label}")
    n, teacher = pairs_in(PairsConfig(**content["config"]), k), content["teacher"]
    expected = dict.fromkeys(("x0", "x1"), (n, *teacher["shape"]))
    expected |= {"labels": (n,)} if teacher["classes"] else {}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        raise ValueError(f"{path} must have {expected}, got {found}")
    return {
        "file": path.name,
        "pairs": n,
        "bytes": path.stat().st_size,
        "crc32": crc,
    }


def read_file(path: Path, content: dict[str, Any], k: int) -> None:
    """Verify every byte of a file.

    Raises:
        ValueError: the file is missing, damaged, or of other pairs.
    """
    tensors, label = _tensors(path)
    crc = checksum(tensors)
    if label.get("crc32") != crc:
        raise ValueError(
            f"{path} is damaged, its checksum does not match: delete it and run fewstep pairs again"
        )
    if label != file_label(content, k, crc):
        raise ValueError(f"{path} is not file {k} of these pairs: it says {label}")
