"""Files of tensors: safetensors, with a convention for tensors of which a file holds a part.

A whole tensor is stored as itself. A range of one is stored as a one-dimensional tensor `NAME@START`, and the metadata
of the file hold the shape of the whole under the same key, as JSON: `"lm_head.weight@4096": "[128, 64]"`. A file
without such ranges is like any other of its format.

The writer is ours because `safetensors.torch.save_file` first copies every tensor of a device to the host, and reports
a full disk as its own exception type; the format is a JSON header followed by the bytes of the tensors
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from framework.sharding.fragments import Fragment, StoredTensors

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_ALIGNMENT = 8


class _Entry(NamedTuple):
    """A tensor of a file; `values` is called when its turn has come."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors, with at most one tensor's copy on the host at a time.

    Args:
        path: The file to write; it is synced to the disk before this returns.
        tensors: Tensors of any shape and device, of a dtype that safetensors knows.

    Raises:
        OSError: The file cannot be written, with the `errno` of the system (`ENOSPC` for a full disk).
    """
    entries = [
        _Entry(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    _write(path, entries, {})


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> None:
    """Write what a rank holds, in the same way. Ranges without elements are left out.

    Args:
        path: See `write_tensors`.
        fragments: At most one that starts at the same element of a tensor.

    Raises:
        OSError: See `write_tensors`.
    """
    entries, shapes = [], {}
    for fragment in fragments:
        values = fragment.values
        if fragment.is_whole:
            entries.append(_Entry(fragment.name, values.dtype, fragment.shape, lambda values=values: values))
        elif values.numel() > 0:
            key = f"{fragment.name}@{fragment.start}"
            shapes[key] = json.dumps(fragment.shape)
            entries.append(_Entry(key, values.dtype, (values.numel(),), lambda values=values: values))
    _write(path, entries, shapes)


def write_assembled(path: Path, stored: StoredTensors) -> None:
    """Write stored tensors whole into one file, reading one after the other.

    Args:
        path: See `write_tensors`.
        stored: Of any number of ranks.

    Raises:
        OSError: See `write_tensors`.
    """
    entries = [
        _Entry(name, stored.dtype(name), stored.shape(name), lambda name=name: stored.read(name))
        for name in stored.names()
    ]
    _write(path, entries, {})


def _write(path: Path, entries: list[_Entry], shapes: dict[str, str]) -> None:
    # Wide dtypes first, as the library does it, so that every tensor starts at a multiple of its item size.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **shapes}}
    offset = 0
    for entry in ordered:
        end = offset + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        dtype = DTYPE_NAMES[entry.dtype]
        assert entry.key not in header, f"{entry.key} is saved twice"
        header[entry.key] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for entry in ordered:
            file.write(_bytes_of(entry.values()))
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The elements of `tensor`, row by row, as bytes on the host; no copy for a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
