"""Weights in safetensors files that transformers' loading takes without reading them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from safetensors import safe_open
from torch import Tensor
from transformers import modeling_utils
from transformers.modeling_utils import str_to_torch_dtype

from framework.models.deferred import Deferred


@contextmanager
def stored_weights_deferred(deferred: Deferred) -> Iterator[None]:
    """Within this context `from_pretrained` gets recorded tensors for what is in safetensors files.

    Renaming, conversion, dtypes, missing weights and tying are transformers' own, and are recorded. Its loading is kept
    on this thread, since each thread has its own dispatch modes.

    Args:
        deferred: entered by the caller; reads each tensor from its memory-mapped file when its value is needed.
    """

    def opened(path: Any, *args: Any, **kwargs: Any) -> _File:
        return _File(deferred, path, *args, **kwargs)

    with patch.object(modeling_utils, "safe_open", opened), patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
        yield


class _File:
    """A safetensors file whose slices give recorded tensors; stands for what `safe_open` gives."""

    def __init__(self, deferred: Deferred, path: Any, *args: Any, **kwargs: Any) -> None:
        self._deferred = deferred
        self._file = safe_open(path, *args, **kwargs)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Keep the file open, since its tensors are read later."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._deferred, self._file, name)


class _Slice:
    """A tensor of a file, not read."""

    def __init__(self, deferred: Deferred, file: Any, name: str) -> None:
        self._deferred = deferred
        self._file = file
        self._name = name
        self._slice = file.get_slice(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, index: Any) -> Tensor:
        whole = self._deferred.source(
            lambda: self._file.get_tensor(self._name),
            self._slice.get_shape(),
            str_to_torch_dtype[self._slice.get_dtype()],
        )
        return whole[index]
