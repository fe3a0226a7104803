"""Tokenised data on disk, found again by the content of what it was made from.

```
CACHE/
├── 3f…a1/                 one data set; the name is a hash of everything that its tokens depend on
│   ├── input_ids.bin …    arrays, little-endian, mapped into memory when read
│   └── manifest.json      sizes and checksums of the arrays, the report; written last
└── .5c….tmp/              being written, or left by a killed process
```

An entry gets its name by one rename when it is complete, so two processes that make the same one do not meet; the
second finds the first one's. Entries are never changed, only made anew where they are damaged. They may be deleted at
any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from framework.data.dataset import TokenizedDataset
from framework.data.report import DataReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
ARRAYS = {
    "input_ids": np.dtype("<i4"),
    "supervised": np.dtype("?"),
    "lengths": np.dtype("<i8"),
    "digests": np.dtype("<u8"),
    "contents": np.dtype("<u8"),
}
TEMPORARY = ".{}.tmp"
ABANDONED_SECONDS = 24 * 3600
"""A temporary directory that nothing was written to for so long belongs to a process that was killed."""

READ_BYTES = 1 << 22


class CacheError(Exception):
    """An entry cannot be written; the message is the reason."""


class DamagedEntryError(Exception):
    """An entry that is not what its manifest says; the message is the reason."""


def default_cache_directory() -> Path:
    """`$XDG_CACHE_HOME/selectrain/tokens`, by default `~/.cache/selectrain/tokens`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "selectrain" / "tokens"


class TokenCache:
    """The entries of one directory that were made with one tokenizer."""

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing is read or written yet, but the tokenizer is hashed as it is."""
        self.directory = directory
        self._common = {"tokenizer": _tokenizer_hash(tokenizer), "code": _code_hash()}

    def key(self, **ingredients: Any) -> str:
        """The name of an entry.

        Args:
            ingredients: JSON values that the tokens depend on, apart from the tokenizer and the code: what was read,
                as hashes of its content, and the options.
        """
        return hashlib.sha256(json.dumps(self._common | ingredients, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> TokenizedDataset | None:
        """The entry of that name, mapped into memory; None where there is none, or a damaged one, which is logged."""
        path = self.directory / key
        # Not `Path.is_dir`, which fails in a directory that may not be entered; there, writing tells the reason.
        if not os.path.isdir(path):
            return None
        try:
            return _read(path)
        except (DamagedEntryError, OSError) as error:
            logger.warning("token cache: %s cannot be used and is made anew: %s", path, error)
            return None

    def writer(self, key: str) -> CacheWriter:
        """For making the entry of that name, as a context.

        Raises:
            CacheError: The directory cannot be written to.
        """
        return CacheWriter(self.directory, key)


class CacheWriter:
    """An entry in the making. Leaving the context without `finish` drops it."""

    def __init__(self, directory: Path, key: str) -> None:
        self._final = directory / key
        self._path = directory / TEMPORARY.format(uuid.uuid4().hex)
        self._checksums = dict.fromkeys(ARRAYS, 0)
        with _as_cache_error():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory)
            self._path.mkdir()
            self._files: dict[str, BinaryIO] = {name: (self._path / f"{name}.bin").open("wb") for name in ARRAYS}

    def add(self, input_ids: np.ndarray, supervised: np.ndarray, *, digest: int, content: int) -> None:
        """Append a sample, see `TokenizedDataset`.

        Raises:
            CacheError: It cannot be written, such as on a full disk.
        """
        values = (input_ids, supervised, len(input_ids), digest, content)
        for (name, dtype), value in zip(ARRAYS.items(), values, strict=True):
            data = np.asarray(value, dtype).tobytes()
            self._checksums[name] = zlib.crc32(data, self._checksums[name])
            with _as_cache_error():
                self._files[name].write(data)

    def finish(self, report: DataReport) -> TokenizedDataset:
        """Give the entry its name and read it.

        Raises:
            CacheError: It cannot be written.
        """
        with _as_cache_error():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            manifest = {
                "arrays": {
                    name: {"bytes": file.tell(), "crc32": self._checksums[name]} for name, file in self._files.items()
                },
                "report": asdict(report),
            }
            with (self._path / MANIFEST_FILE).open("w", encoding="utf-8") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            return self._publish()

    def _publish(self) -> TokenizedDataset:
        while True:
            try:
                os.rename(self._path, self._final)
            except OSError:
                if not self._final.is_dir():
                    raise
            else:
                return _read(self._final)
            # Another process was faster, or what is there is damaged: then it makes way, in one rename as well.
            try:
                return _read(self._final)
            except (DamagedEntryError, OSError):
                aside = self._final.with_name(TEMPORARY.format(uuid.uuid4().hex))
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self._final, aside)
                shutil.rmtree(aside, ignore_errors=True)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what is still in the buffer of a full disk's file
                file.close()
        if self._path.exists():
            shutil.rmtree(self._path, ignore_errors=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> TokenizedDataset:
    """The data set of an entry, its arrays mapped.

    Raises:
        DamagedEntryError: A file is missing, or is not what the manifest says.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        report = DataReport(**manifest["report"])
        expected = {name: (manifest["arrays"][name]["bytes"], manifest["arrays"][name]["crc32"]) for name in ARRAYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(f"{MANIFEST_FILE}: {error!r}") from error
    arrays = {}
    for name, dtype in ARRAYS.items():
        file = path / f"{name}.bin"
        try:
            found = (file.stat().st_size, _checksum(file))
        except OSError as error:
            raise DamagedEntryError(str(error)) from error
        if found != expected[name]:
            raise DamagedEntryError(f"{file.name} has not the bytes that were written to it")
        # A plain view: the memmap class makes every slice slow.
        arrays[name] = np.asarray(np.memmap(file, dtype, mode="r"))
    return TokenizedDataset(report=report, **arrays)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            checksum = zlib.crc32(data, checksum)
    return checksum


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all files that the tokenizer saves: vocabulary, special tokens, chat template."""
    # It keeps the padding and truncation of the last call and saves them too; this call has none, as labelling has.
    tokenizer("")
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return _files_hash(Path(directory))


@cache
def _code_hash() -> str:
    """A hash of this package's code and of the versions of the libraries that make tokens."""
    libraries = {name: version(name) for name in ("transformers", "tokenizers", "jinja2")}
    return hashlib.sha256(json.dumps([libraries, _files_hash(Path(__file__).parent, "*.py")]).encode()).hexdigest()


def _files_hash(directory: Path, pattern: str = "*") -> str:
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    hashes = [(path.relative_to(directory).as_posix(), file_hash(path)) for path in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _remove_abandoned(directory: Path) -> None:
    for path in directory.glob(TEMPORARY.format("*")):
        with contextlib.suppress(OSError):
            newest = max((file.stat().st_mtime for file in path.iterdir()), default=path.stat().st_mtime)
            if newest < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _as_cache_error() -> Iterator[None]:
    try:
        yield
    except (OSError, DamagedEntryError) as error:
        raise CacheError(str(error)) from error
