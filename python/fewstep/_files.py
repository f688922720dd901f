"""Files that are whole or absent, folders with one writer, and what is read of either."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MOST_JSON = 1 << 20  # bytes of a configuration
_MOST_HEADER = 16 << 20  # bytes of what a file of tensors says of itself
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name if the block succeeds.

    Its folder is made if need be. The file is on the disk before it has its name, and has the mode
    of any new file. Errors name `path`. With `shared`, several processes may write the file at
    once: each has its own temporary path.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('whole', 1)
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system has this for folders
            _sync(path.parent)
    except OSError as error:
        if error.filename is None or Path(error.filename) != temporary:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # as where the folder takes no files
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def one_writer(folder: Path, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Hold a folder, made if need be, for this process, or for the i-th of n that share its files.

    The lock is that of `flock` on a file in the folder: it ends with its process, however that
    does.

    Raises:
        ValueError: another process holds the folder, and is not another share of the same n.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, count = share
    path = folder / f".lock-{index}-of-{count}"
    in_use = f"{folder} is in use: another process is writing there"
    try:
        held = _lock(path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder} cannot be locked: {error}", stacklevel=3)
        yield
        return
    if held is None:
        raise ValueError(in_use)
    try:
        for other in folder.glob(".lock-*-of-*"):
            if other == path or other.name.endswith(f"-of-{count}"):
                continue
            its = _lock(other)
            if its is None:
                raise ValueError(in_use)
            _unlock(other, its)  # left by a process that is dead
        yield
    finally:
        _unlock(path, held)


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[bool]:
    """Hold a lock that is waited for; False where another process has it all the time.

    True without one where the folder takes no files or its file system has no locks.
    """
    deadline = time.monotonic() + seconds
    held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (held := _lock(path)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
    except OSError:
        yield True
        return
    try:
        yield held is not None
    finally:
        if held is not None:
            _unlock(path, held)


def _lock(path: Path) -> int | None:
    """A descriptor of the file that holds its lock; None where another process does."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed it since it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)


def _unlock(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def read_json(path: Path, *, most: int = _MOST_JSON) -> Any:
    """What a JSON file of up to `most` bytes holds.

    Raises:
        ValueError: it is larger, or not JSON.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
        ModuleNotFoundError: safetensors is missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors has a temporary file of its own, which a killed process leaves: in a folder by
    # itself, for the next one to remove.
    scratch = path.with_name(f".{path.name}.d")
    with replacing(path) as temporary:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            save_file(dict(tensors), scratch / path.name, metadata)
            os.replace(scratch / path.name, temporary)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or its header is too large.
        ModuleNotFoundError: safetensors is missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MOST_HEADER:
            raise ValueError(f"its header has {header} bytes, more than {_MOST_HEADER}")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of names and values of tensors on the CPU, in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        content = tensors[name].contiguous().flatten().view(torch.uint8)
        crc = zlib.crc32(content.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
