"""The tensors of a checkpoint, read from the files of all ranks that saved it."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.checkpoint.tensor_files import DTYPE_NAMES
from framework.errors import UserError

Kind = Literal["model", "optimizer"]
"""What a file of a rank holds."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_OF_A_RANK = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors")


def rank_file(kind: Kind, rank: int = 0, world_size: int = 1) -> str:
    """The name of the file that a rank writes: `model.safetensors`, or `model-00001-of-00002.safetensors`."""
    return f"{kind}.safetensors" if world_size == 1 else f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def rank_files(directory: Path, kind: Kind) -> list[Path]:
    """The files of all ranks in a checkpoint, by rank.

    Raises:
        UserError: one of them is missing.
    """
    numbered = [(path, _OF_A_RANK.fullmatch(path.name.removeprefix(kind))) for path in directory.glob(f"{kind}-*")]
    world_size = max((int(match[2]) for _, match in numbered if match), default=1)
    paths = [directory / rank_file(kind, rank, world_size) for rank in range(world_size)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: cannot be read as weights: there is no such file")
    return paths


class _Piece(NamedTuple):
    """A range of a tensor's elements, and where it is stored."""

    start: int
    count: int
    path: Path
    key: str


@dataclass
class _Tensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[_Piece] = field(default_factory=list)


class StoredFragments:
    """The weights, or the optimiser's tensors, of a checkpoint: `StoredTensors` over any number of files.

    The files are mapped: what is not asked for is not read. A range that lies in one file is a view of the mapping,
    which outlives the file's name; writing to it changes the view alone.
    """

    def __init__(self, directory: Path, kind: Kind) -> None:
        """Index the files of a checkpoint.

        Args:
            directory: of the checkpoint.
            kind: which of its tensors.

        Raises:
            UserError: a file is missing or is no safetensors file, or an element of a tensor is stored nowhere, or
                twice.
        """
        self.paths = rank_files(directory, kind)
        self._files: dict[Path, Any] = {path: _opened(path) for path in self.paths}
        self._tensors: dict[str, _Tensor] = {}
        for path, file in self._files.items():
            self._index(path, file)
        for name, tensor in self._tensors.items():
            tensor.pieces.sort()
            _check_coverage(name, tensor)

    def __str__(self) -> str:
        """Where they are, for messages."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def names(self) -> Iterator[str]:
        """Of the tensors."""
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """In which it is stored."""
        return self._tensors[name].dtype

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """A range of its elements in row-major order, `[count]` on the CPU; mapped if one file holds it, else read."""
        tensor = self._tensors[name]
        size = prod(tensor.shape)
        end = size if count is None else start + count
        assert 0 <= start <= end <= size
        first = max(0, bisect_right(tensor.pieces, start, key=lambda piece: piece.start) - 1)
        if end <= tensor.pieces[first].start + tensor.pieces[first].count:
            return self._mapped(tensor.pieces[first], start, end)
        values = torch.empty(end - start, dtype=tensor.dtype)
        for piece in tensor.pieces[first:]:
            low, high = max(start, piece.start), min(end, piece.start + piece.count)
            if low < high:
                values[low - start : high - start] = self._mapped(piece, low, high)
        return values

    def _mapped(self, piece: _Piece, start: int, end: int) -> Tensor:
        stored: Tensor = self._files[piece.path].get_tensor(piece.key)
        return stored.view(-1)[start - piece.start : end - piece.start]

    def _index(self, path: Path, file: Any) -> None:
        partial: dict[str, str] = file.metadata() or {}
        for key in file.keys():
            stored = file.get_slice(key)
            dtype, shape = _DTYPES[stored.get_dtype()], tuple(stored.get_shape())
            name, start, count = key, 0, prod(shape)
            if key in partial:
                name, _, first = key.rpartition("@")
                start, shape = int(first), tuple(json.loads(partial[key]))
            tensor = self._tensors.setdefault(name, _Tensor(shape, dtype))
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                other = tensor.pieces[0].path
                raise UserError(
                    f"{path}: {name} is {list(shape)} {dtype} here, {list(tensor.shape)} {tensor.dtype} in {other.name}"
                )
            tensor.pieces.append(_Piece(start, count, path, key))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as weights: {error}") from error


def _check_coverage(name: str, tensor: _Tensor) -> None:
    """Every element once; of tensors without any, several ranks may hold all."""
    position, before = 0, tensor.pieces[0]
    for piece in tensor.pieces:
        if piece.start < position:
            raise UserError(f"{piece.path}: {name}: {_range(piece.start, position)} is in {before.path.name} too")
        _check_reached(name, position, piece.start, piece.path)
        position, before = piece.start + piece.count, piece
    _check_reached(name, position, prod(tensor.shape), before.path)


def _check_reached(name: str, position: int, end: int, path: Path) -> None:
    if position != end:
        raise UserError(f"{path}: {name}: {_range(position, end)} is in no file of this checkpoint")


def _range(start: int, end: int) -> str:
    return f"the range of elements {start} to {end - 1}"
