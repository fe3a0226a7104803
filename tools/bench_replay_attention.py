"""The replay's attention kernels on a GPU: right, and how fast beside what libraries offer.

    python tools/bench_replay_attention.py --output replay_attention.json

First every feature against dense attention in float64, then a few tiles of each kernel, of which the best are kept,
then times. Rates count the visible pairs of query and key only: `2 * size` operations a pair, head and product. The
forward pass has two products, the gradient of the queries three, those of keys and values four (of selected pairs), a
library's backward pass five. Ratios are over full causal attention by FlashAttention in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from replay_cases import CANDIDATES, DEVICE, HEADS, KV_HEADS, candidates, checked_and_compiled, relative_error
from replay_problems import scattered, take
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from framework.retention.attention.replay_kernels import (
    TILES,
    Tile,
    attend,
    attend_backward,
    key_gradients,
    prepare,
    query_gradient,
    tile_of,
)

TOKENS = (4096, 32768)
RATIOS = (0.1, 0.25, 0.5)


def milliseconds(function: Callable[[], Any]) -> float:
    """Median time on the device."""
    return triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")


@dataclass
class Case:
    """Selected queries of one sequence, and all its keys."""

    tokens: int
    position: Tensor
    size: int = 128
    query: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    keys: list[Tensor] = field(init=False)
    selected: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        slots = len(self.position)
        normal = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
        self.query, self.grad = (normal(1, slots, HEADS, self.size).transpose(1, 2) for _ in range(2))
        self.keys = [normal(1, self.tokens, KV_HEADS, self.size).transpose(1, 2) for _ in range(2)]
        self.position = self.position.int().to(DEVICE)[None]
        self.first = torch.zeros_like(self.position)
        self.selected = [take(matrix, self.position) for matrix in self.keys]
        self.scale = self.size**-0.5

    @classmethod
    def of(cls, tokens: int, ratio: float, kind: str, size: int = 128) -> Case:
        """Selected at random, or the last ones."""
        slots = round(ratio * tokens)
        position = scattered(tokens, slots) if kind == "scattered" else torch.arange(tokens - slots, tokens)
        return cls(tokens, position, size)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The kernels' calls by name."""
        intervals = self.first, self.position
        output, lse = attend(self.query, *self.keys, *intervals, scale=self.scale)
        queries = tile_of("key_gradients", self.query, self.keys[1]).queries
        prepared = prepare(self.grad, output, lse, *intervals, queries)
        rows = *self.selected, self.position
        return {
            "attend": lambda: attend(self.query, *self.keys, *intervals, scale=self.scale),
            "prepare": lambda: prepare(self.grad, output, lse, *intervals, queries),
            "query_gradient": lambda: query_gradient(
                self.grad, self.query, *self.keys, *intervals, prepared, scale=self.scale
            ),
            "key_gradients": lambda: key_gradients(
                self.grad, self.query, *rows, *intervals, prepared, scale=self.scale
            ),
        }

    def operations(self) -> dict[str, float]:
        """Operations of each part, over 10⁹ (so that over milliseconds they are TFLOP/s)."""
        slots, product = self.position.shape[1], 2 * self.size * HEADS / 1e9
        visible = (self.position.double() + 1).sum().item() * product
        selected = slots * (slots + 1) / 2 * product
        return {
            "attend": 2 * visible,
            "query_gradient": 3 * visible,
            "key_gradients": 4 * selected,
            "native_backward": 5 * visible,
        }


def sweep(size: int, unusable: dict[tuple[str, int, Tile], str | None]) -> dict[str, Any]:
    """Times of the candidates at 8192 tokens, a quarter of them selected; keeps the best in the table."""
    report = {}
    case = Case.of(8192, 0.25, "scattered", size)
    for kernel in CANDIDATES:
        default, times = TILES[kernel, size], {}
        for tile in candidates(kernel, size):
            if unusable[kernel, size, tile] is None:
                TILES[kernel, size] = tile
                times[tile] = milliseconds(case.parts()[kernel])
        if not times:
            print(f"  {kernel:15} size {size:3}: no tile is usable", flush=True)
            TILES[kernel, size] = default
            continue
        best = min(times, key=lambda tile: times[tile])
        TILES[kernel, size] = best
        rate = case.operations()[kernel] / times[best]
        gain = times[default] / times[best] if default in times else float("nan")
        print(
            f"  {kernel:15} size {size:3}: {rate:4.0f} TFLOP/s with {best}, {gain:.2f} times the default's", flush=True
        )
        report[kernel] = {str(tile): {"ms": ms, "tflops": case.operations()[kernel] / ms} for tile, ms in times.items()}
    return report


def full_attention(tokens: int, backend: SDPBackend, size: int = 128) -> dict[str, float]:
    """Milliseconds of the forward and backward pass of causal attention over all tokens by a library."""
    case = Case(tokens, torch.arange(tokens), size)
    inputs = [tensor.requires_grad_() for tensor in (case.query, *case.keys)]
    with sdpa_kernel(backend):
        call = partial(scaled_dot_product_attention, *inputs, is_causal=True, enable_gqa=True)
        output = call()
        with torch.no_grad():
            forward = milliseconds(call)
        backward = milliseconds(lambda: torch.autograd.grad(output, inputs, case.grad, retain_graph=True))
    rate = 4 * size * HEADS * tokens * (tokens + 1) / 2 / 1e9
    print(f"  {backend.name:16} {tokens:6}: {forward:7.3f} ms, {rate / forward:4.0f} TFLOP/s forward, ", end="")
    print(f"{backward:7.3f} ms, {2.5 * rate / backward:4.0f} TFLOP/s backward", flush=True)
    return {"forward_ms": forward, "backward_ms": backward}


def with_mask(case: Case) -> dict[str, float]:
    """Milliseconds of the library's attention with the selected rows of the mask."""
    mask = (torch.arange(case.tokens, device=DEVICE) <= case.position[0, :, None])[None, None]

    def attention(query: Tensor, *keys: Tensor) -> Tensor:
        # The kernel that takes masks wants as many heads of keys as of queries.
        keys = tuple(matrix.repeat_interleave(HEADS // KV_HEADS, 1) for matrix in keys)
        return scaled_dot_product_attention(query, *keys, attn_mask=mask)

    return differentiated(case, attention, "sdpa_mask")


def with_flex_attention(case: Case) -> dict[str, float]:
    """Milliseconds of FlexAttention with a mask over positions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    position = case.position[0]
    mask = create_block_mask(lambda b, h, q, k: position[q] >= k, None, None, len(position), case.tokens, device=DEVICE)
    compiled = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask, enable_gqa=True)
    return differentiated(case, compiled, "flex")


def differentiated(case: Case, attention: Callable[..., Tensor], name: str) -> dict[str, float]:
    """Milliseconds of a differentiable attention function and of its backward pass."""
    inputs = [tensor.detach().requires_grad_() for tensor in (case.query, *case.keys)]
    output = attention(*inputs)
    times = {
        f"{name}_forward_ms": milliseconds(lambda: attention(*inputs)),
        f"{name}_backward_ms": milliseconds(lambda: torch.autograd.grad(output, inputs, case.grad, retain_graph=True)),
    }
    expected, _ = attend(case.query, *case.keys, case.first, case.position, scale=case.scale)
    assert_close(output.detach(), expected, name)
    return times


def native_suffix(case: Case) -> dict[str, float]:
    """Milliseconds of FlashAttention's own passes for the last queries: causal with the bottom right corner aligned."""
    flash = torch.ops.aten
    forward = partial(flash._scaled_dot_product_flash_attention, case.query, *case.keys, 0.0, True, scale=case.scale)
    output, padded_lse, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = forward()
    backward = partial(
        flash._scaled_dot_product_flash_attention_backward,
        case.grad, case.query, *case.keys, output, padded_lse, starts_q, starts_k, longest_q, longest_k, 0.0, True,
        seed, offset, scale=case.scale,
    )  # fmt: skip
    intervals = case.first, case.position
    expected, expected_lse = attend(case.query, *case.keys, *intervals, scale=case.scale)
    assert_close(output, expected, "native output")
    lse = padded_lse[..., : expected_lse.shape[-1]]
    assert_close(lse, expected_lse, "native log-sum-exp")
    rows = *case.selected, case.position
    # From the native record: what the replay does where the record pass keeps its output and log-sum-exp.
    ours = attend_backward(case.grad, case.query, *case.keys, output, lse, *intervals, *rows, scale=case.scale)
    theirs = backward()
    for name, left, right in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert_close(right if name == "query" else take(right, case.position), left, f"native gradient of {name}")
    return {"native_forward_ms": milliseconds(forward), "native_backward_ms": milliseconds(backward)}


class WrongResultError(Exception):
    """A library's result and the kernels' differ."""


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Compare a library's result with the kernels': both are rounded to bfloat16."""
    error = relative_error(actual, expected)
    if not error < 2e-2:
        raise WrongResultError(f"{name}: error {error:.1e}")


def attempted(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The function's report, or in its place what it raised: a library may lack a kernel."""
    try:
        return function(*args)
    except Exception as error:
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        print(f"  {function.__name__} failed: {message}", flush=True)
        return {"wrong" if isinstance(error, WrongResultError) else "failed": message}


def compare(tokens: int, ratio: float, kind: str, full: dict[str, float], others: bool) -> dict[str, Any]:
    """Times of one selection by every way there is, with ratios over full attention."""
    case = Case.of(tokens, ratio, kind)
    row: dict[str, Any] = {"tokens": tokens, "ratio": ratio, "kind": kind}
    row |= {f"{name}_ms": milliseconds(call) for name, call in case.parts().items()}
    row["backward_ms"] = row["prepare_ms"] + row["query_gradient_ms"] + row["key_gradients_ms"]
    if kind == "suffix":
        row |= attempted(native_suffix, case)
    if others:
        row |= attempted(with_mask, case)
    for name, operations in case.operations().items():
        if f"{name}_ms" in row:
            row[f"{name}_tflops"] = operations / row[f"{name}_ms"]
    for name in [name for name in row if name.endswith("ward_ms") or name == "attend_ms"]:
        over = "backward_ms" if "backward" in name else "forward_ms"
        if over in full:
            row[name.replace("_ms", "_over_full")] = row[name] / full[over]
    return row


def describe(row: dict[str, Any]) -> str:
    """One line."""
    parts = [f"{row['tokens']:6} {row['ratio']:4} {row['kind']:9}"]
    for name in ("attend", "query_gradient", "key_gradients", "native_backward"):
        if f"{name}_ms" in row:
            parts.append(f"{name} {row[f'{name}_ms']:.3f} ms {row[f'{name}_tflops']:.0f} TFLOP/s")
    parts.append("over full: " + ", ".join(f"{k[:-10]} {v:.3f}" for k, v in row.items() if k.endswith("_over_full")))
    return " | ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, sweep, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=80, help="what is not begun by then is left out")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"triton": triton.__version__, "heads": HEADS, "kv_heads": KV_HEADS, "size": 128, "rows": []}

    def in_time(what: str) -> bool:
        elapsed = time.monotonic() - begin
        print(f"[{elapsed:3.0f} s] {what}" + (": left out" if elapsed > arguments.seconds else ""), flush=True)
        arguments.output.write_text(json.dumps(report, indent=1))
        return elapsed <= arguments.seconds

    in_time("largest error over largest magnitude")
    report["errors"], unusable, wrong = checked_and_compiled(arguments.workers)
    in_time("tiles")
    report["tiles"] = {size: sweep(size, unusable) for size in (128, 64)}
    in_time("full causal attention")
    report["full"] = {
        tokens: {backend.name: attempted(full_attention, tokens, backend) for backend in backends()}
        for tokens in TOKENS
    }
    for tokens, ratio, kind in itertools.product(TOKENS, RATIOS, ("scattered", "suffix")):
        if in_time("selections"):
            full = report["full"][tokens]["FLASH_ATTENTION"]
            report["rows"].append(compare(tokens, ratio, kind, full, others=tokens == TOKENS[0]))
            print(" ", describe(report["rows"][-1]), flush=True)
    report["flex"] = {}
    for ratio in (0.25, 0.1, 0.5):
        if in_time(f"FlexAttention, scattered {ratio}"):
            report["flex"][ratio] = attempted(with_flex_attention, Case.of(TOKENS[0], ratio, "scattered"))
            print(" ", report["flex"][ratio], flush=True)
    wrong += [row["wrong"] for row in (*report["rows"], *report["flex"].values()) if "wrong" in row]
    report["wrong"] = wrong
    in_time("end")
    if wrong:
        parser.exit(1, f"wrong: {', '.join(wrong)}\n")


def backends() -> tuple[SDPBackend, ...]:
    """The libraries' kernels for full attention; the first is what ratios are over."""
    return SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION


if __name__ == "__main__":
    main()
