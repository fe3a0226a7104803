"""Token-selective gradients of tiny random models against the slow reference, family by family.

    python tools/check_families.py                       # the families that are promised to be exact
    python tools/check_families.py llama mamba --dtype float32 --json families.json

Errors are the worst over all parameters of max |difference| / max |reference|. Some families compute parts (norms,
routers, scores) in float32 whatever the model's dtype, and the sums in there depend on the number of rows; so the two
exact columns let these parts run in the model's dtype, and `as is` is the larger of the two errors without that. int8
keys and values are rounded: their column is the relative error of the whole gradient, ‖difference‖ / ‖reference‖.
Blocks that fall back are compared with the reference that cuts them at input and output only. Exit code 1 if a family
is outside a limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from families import TINY, build, sample_inputs
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from framework import disable_token_selection, enable_token_selection, fixed_selection
from framework.retention import blocks_of
from framework.retention.reference import reference_gradients
from framework.training.loss import LossKind, loss_kind

PROMISED = (
    "llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 olmo2 opt gpt2 gpt_neox mixtral deepseek_v3 bert roberta vit"
).split()
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-3}
AS_IS_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}
INT8_LIMIT = 0.02

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"retain_linears": False},
    "retained": {"retain_linears": True},
    "int8": {"retain_linears": False, "kv_format": "int8"},
}
Gradients = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class FamilyResult:
    """One row of the table.

    Attributes:
        model_type: the family.
        blocks: blocks that are replayed on selected rows.
        fallen_back: reason by name of the blocks that are not.
        error: worst relative error of a parameter's gradient, without retained linears, no part in float32.
        error_retained: the same with retained linears.
        error_as_is: the larger of the two with the family's own float32 parts.
        error_int8: relative error of the whole gradient with int8 keys and values.
        same_parameters: whether exactly the reference's parameters received a gradient, in all of these.
        passed: whether every figure is within its limit.
        failure: what stopped the check, if anything did.
    """

    model_type: str
    blocks: int = 0
    fallen_back: dict[str, str] = dataclasses.field(default_factory=dict)
    error: float = float("nan")
    error_retained: float = float("nan")
    error_as_is: float = float("nan")
    error_int8: float = float("nan")
    same_parameters: bool = False
    passed: bool = False
    failure: str | None = None


class NoFloat32(TorchDispatchMode):
    """Gives float64 to whatever asks for float32. A dispatch mode, because these hold in backward passes too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def gradients(model: torch.nn.Module) -> Gradients:
    """The gradients by parameter name, cleared from the model."""
    result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def worst_error(found: Gradients, wanted: Gradients) -> float:
    """Largest over tensors of max |difference| / max |reference|.

    A gradient that is zero but for rounding has no relative error: tensors below 1e-5 of the largest are measured
    against that.
    """
    floor = 1e-5 * max(float(gradient.abs().max()) for gradient in wanted.values())
    return max(
        float((found[name] - wanted[name]).abs().max()) / max(float(wanted[name].abs().max()), floor)
        for name in wanted.keys() & found.keys()
    )


def total_error(found: Gradients, wanted: Gradients) -> float:
    """Norm of the difference over the norm of the reference, all tensors together."""
    names = wanted.keys() & found.keys()
    square = sum(float((found[name] - wanted[name]).double().square().sum()) for name in names)
    return (square / sum(float(wanted[name].double().square().sum()) for name in names)) ** 0.5


def draw_positions(*, batch: int, tokens: int, selected: int, seed: int = 0) -> Tensor:
    """Sorted distinct positions, int64 `[batch, selected]`, the first among them, which encoders pool."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens - 1, generator=generator)[: selected - 1] + 1 for _ in range(batch)]
    return torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), row]).sort().values for row in rows])


def reference_loss(model: torch.nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Mean over the labelled tokens at selected positions, spelt out; a classifier's own loss."""
    kind = loss_kind(model)
    if kind is LossKind.POOLED:
        return model(**inputs).loss
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    if kind is LossKind.CAUSAL:
        logits, labels, mask = logits[:, :-1], labels[:, 1:], mask[:, :-1]
    return functional.cross_entropy(logits[mask], labels[mask])


def compare(model: PreTrainedModel, inputs: dict[str, Tensor], positions: Tensor, tokens: int) -> FamilyResult:
    """A model's token-selective gradients against the reference, in the parts' own precision.

    Args:
        model: plain, in train mode.
        inputs: as `sample_inputs` gives them.
        positions: int64 `[batch, selected]`.
        tokens: tokens of a sequence or patches of an image.
    """
    found = {}
    for name, options in OPTIONS.items():
        state = enable_token_selection(model, strategy="uniform", ratio=0.5, **options)
        with fixed_selection(model, positions):
            model(**inputs).loss.backward()
        found[name] = gradients(model)
        fallbacks = dict(state.retention.fallbacks)
        disable_token_selection(model)
    mask = torch.zeros(len(positions), tokens, dtype=torch.bool).scatter_(1, positions, True)
    with reference_gradients(model, mask, fallbacks):
        reference_loss(model, inputs, mask).backward()
    wanted = gradients(model)
    return FamilyResult(
        model_type=model.config.model_type,
        blocks=len(blocks_of(model)) - len(fallbacks),
        fallen_back=fallbacks,
        error=worst_error(found["plain"], wanted),
        error_retained=worst_error(found["retained"], wanted),
        error_int8=total_error(found["int8"], wanted),
        same_parameters=all(set(gradient) == set(wanted) for gradient in found.values()),
    )


def check(model_type: str, *, dtype: torch.dtype = torch.float64, tokens: int = 24, padding: int = 5) -> FamilyResult:
    """Compare one family's gradients with the reference, without and with retained linears, and with int8.

    Args:
        model_type: a key of `families.TINY`, or any that transformers knows.
        dtype: of the model, float32 or float64.
        tokens: sequence length; an image's follows from the config.
        padding: padded positions of the last sequence.
    """
    model = build(model_type, dtype=dtype)
    inputs = sample_inputs(model, tokens=tokens, padding=padding)
    if "pixel_values" in inputs:
        tokens, padding = (model.config.image_size // model.config.patch_size) ** 2 + 1, 0
    positions = draw_positions(batch=2, tokens=tokens - padding, selected=8)
    as_is = result = compare(model, inputs, positions, tokens)
    if dtype is torch.float64:
        with NoFloat32():
            result = compare(model, inputs, positions, tokens)
    error_as_is = max(as_is.error, as_is.error_retained)
    same = as_is.same_parameters and result.same_parameters
    within = max(result.error, result.error_retained) <= LIMITS[dtype] and error_as_is <= AS_IS_LIMITS[dtype]
    passed = same and within and result.error_int8 <= INT8_LIMIT
    return dataclasses.replace(result, error_as_is=error_as_is, same_parameters=same, passed=passed)


def try_to_check(model_type: str, dtype: torch.dtype) -> FamilyResult:
    """`check`, with any error in the row's place: one family must not hide the others."""
    try:
        return check(model_type, dtype=dtype)
    except Exception as error:
        return FamilyResult(model_type, failure=f"{type(error).__name__}: {error}")


def table(results: Sequence[FamilyResult], title: str) -> Table:
    """One row a family."""
    result = Table(title=title)
    columns = ("family", "selective", "fall back", "error", "with linears", "as is", "int8", "same parameters", "")
    for number, column in enumerate(columns):
        result.add_column(column, justify="left" if number in (0, 8) else "right")
    for row in results:
        if row.failure is not None:
            result.add_row(row.model_type, *[""] * 7, row.failure.splitlines()[0])
            continue
        result.add_row(
            row.model_type,
            str(row.blocks),
            str(len(row.fallen_back)),
            f"{row.error:.1e}",
            f"{row.error_retained:.1e}",
            f"{row.error_as_is:.1e}",
            f"{row.error_int8:.1e}",
            "yes" if row.same_parameters else "NO",
            "" if row.passed else "OUTSIDE A LIMIT",
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", default=PROMISED, help=f"model types; known tiny ones: {', '.join(TINY)}"
    )
    parser.add_argument("--all", action="store_true", help="all families that have a tiny configuration")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    families = [*TINY] if args.all else args.families
    results = [try_to_check(family, getattr(torch, args.dtype)) for family in families]
    Console(width=160).print(table(results, f"transformers {transformers.__version__}, {args.dtype}"))
    for row in results:
        for block, reason in row.fallen_back.items():
            print(f"{row.model_type}: {block} falls back: {reason}")
    if args.json:
        rows = [dataclasses.asdict(row) for row in results]
        args.json.write_text(json.dumps({"transformers": transformers.__version__, "rows": rows}, indent=1) + "\n")
    return 0 if all(row.passed for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
