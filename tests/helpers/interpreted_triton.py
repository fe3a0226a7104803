"""Triton's interpreter as of Triton 3.6, made fit for NumPy 2.4 and bfloat16.

`tests/conftest.py` turns the interpreter on where there is no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = not torch.cuda.is_available()


def mend(patch: pytest.MonkeyPatch) -> None:
    """Let loops have bounds that kernels compute, and let products and rounding of bfloat16 be right."""
    patch_tensor, first_call, patched = interpreter._patch_lang_tensor, interpreter.InterpretedFunction.__call__, set()
    create_dot, cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def patched_tensor(tensor, scope):
        # https://github.com/triton-lang/triton/issues/9171: int() of an array of one element
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot(self, a, b, d, *options):
        # https://github.com/triton-lang/triton/issues/11584: the bit patterns were multiplied
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, d, *options)

    def cast_rounding(self, source, target):
        # The interpreter cuts the low bits off.
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    def call(self, *arguments, **options):
        # Each call of a function inside a kernel patches the whole language again, which takes most of the time.
        if self.fn.__module__ in patched:
            return self.rewrite()(*arguments, **options)
        patched.add(self.fn.__module__)
        return first_call(self, *arguments, **options)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    patch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    for name in ("cast_impl", "create_fp_trunc"):
        patch.setattr(interpreter.InterpreterBuilder, name, cast_rounding)
    patch.setattr(
        interpreter.InterpreterBuilder,
        "create_fp_to_fp",
        lambda self, source, target, _: self.cast_impl(source, target),
    )
