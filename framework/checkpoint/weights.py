"""The weights of one process as one safetensors file, read and written tensor by tensor.

The file holds the named parameters and persistent buffers of the model as it trains (names of a PEFT-wrapped model are
those of the wrapper). With an adapter, only the trainable parameters and the buffers are stored: the frozen ones come
from the base model. A tensor that is known under several names (tied embeddings) is stored once, under the first.

The writer is ours because `safetensors.torch.save_file` first copies every tensor of a device to the host, and reports
a full disk as its own exception type; the format is a JSON header followed by the bytes of the tensors
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from framework.errors import UserError

WEIGHTS_FILE = "model.safetensors"

_DTYPE_NAMES = {
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
_LISTED_NAMES = 8


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights of `model` to `path`, one tensor at a time.

    Args:
        path: The file to write; its directory must exist. It is synced to the disk before this returns.
        model: A model with materialised tensors on any device, plain or wrapped by PEFT.

    Raises:
        OSError: The file cannot be written, with the `errno` of the system (`ENOSPC` for a full disk).
    """
    write_tensors(path, stored_tensors(model))


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy the weights stored at `path` into `model`, in place, one tensor at a time.

    A value is converted to the dtype of the tensor that receives it. Tied tensors may be stored under any of their
    names; frozen parameters of a model with an adapter may be absent.

    Args:
        path: A file written by `save_weights`.
        model: The model, built from the same architecture and adapter, with materialised tensors on any device.

    Raises:
        UserError: The file is not a safetensors file, or its names or shapes are not those of the model. Nothing has
            been copied then.
    """
    with _matching_file(path, model) as (file, stored), torch.no_grad():
        tensors = _tensors_by_name(model)
        for name in stored:
            tensors[name].copy_(file.get_tensor(name))


def map_weights(path: Path, model: nn.Module) -> None:
    """Give a model on the meta device the weights stored at `path`, mapped from the file and not read.

    Tensors that the file does not hold (the frozen ones beside an adapter, buffers that are not persistent) stay on
    the meta device. Tied parameters share their storage, but are separate objects afterwards.

    Args:
        path: A file written by `save_weights`.
        model: The model, built on the meta device.

    Raises:
        UserError: As for `load_weights`.
    """
    with _matching_file(path, model) as (file, stored):
        tensors = _tensors_by_name(model)
        mapped = {id(tensors[name]): file.get_tensor(name) for name in stored}
        every_name = {name: mapped[id(tensor)] for name, tensor in tensors.items() if id(tensor) in mapped}
        model.load_state_dict(every_name, strict=False, assign=True)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint of `model` holds, by their first name: the model's own, not copies.

    Args:
        model: The model, plain or wrapped by PEFT.

    Returns:
        Parameters in the order of `named_parameters` (only trainable ones with PEFT), then persistent buffers.
    """
    adapted = isinstance(model, PeftModel)
    trained: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or not adapted
    }
    return trained | _persistent_buffers(model)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as a safetensors file, with at most one tensor's copy on the host at a time.

    Args:
        path: The file to write; it is synced to the disk before this returns.
        tensors: Tensors of any shape and device, of a dtype that safetensors knows.

    Raises:
        OSError: The file cannot be written.
    """
    # Wide dtypes first, as the library does it, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, tensor in ordered:
            file.write(_bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The elements of `tensor`, row by row, as bytes on the host; no copy for a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


@contextmanager
def _matching_file(path: Path, model: nn.Module) -> Iterator[tuple[Any, list[str]]]:
    """An opened weights file and the names in it, checked against the model."""
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as weights: {error}") from error
    with file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        problems = _mismatches(shapes, model)
        if problems:
            raise UserError(
                f"{path}: these weights are not those of the configured model; "
                "use the `model` section that they were saved with\n" + "\n".join(problems)
            )
        yield file, list(shapes)


def _mismatches(shapes: dict[str, tuple[int, ...]], model: nn.Module) -> list[str]:
    """Lines about what a file with these tensors lacks, has too much, or has in another shape."""
    tensors = _tensors_by_name(model)
    found = {id(tensors[name]) for name in shapes if name in tensors}
    missing = [name for name, tensor in stored_tensors(model).items() if id(tensor) not in found]
    unexpected = [name for name in shapes if name not in tensors]
    wrong_shape = [
        f"{name} {list(shape)} in the file, {list(tensors[name].shape)} in the model"
        for name, shape in shapes.items()
        if name in tensors and shape != tuple(tensors[name].shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shape", wrong_shape))
    return [f"  {title}: {_listed(entries)}" for title, entries in kinds if entries]


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                buffers[f"{prefix}.{name}" if prefix else name] = buffer
    return buffers


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _listed(entries: list[str]) -> str:
    more = f", and {len(entries) - _LISTED_NAMES} more" if len(entries) > _LISTED_NAMES else ""
    return ", ".join(entries[:_LISTED_NAMES]) + more
