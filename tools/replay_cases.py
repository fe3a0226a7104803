"""Checks of the replay's attention kernels on a GPU, and tiles to try, each a job for a process of its own.

A job leaves its compiled kernels in Triton's cache, so that they are there when they are timed.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from replay_problems import Inputs, Problem, by_kernels, causal, dense, packed, padded, scattered, window
from torch import Tensor

from framework.retention.attention.replay_kernels import (
    TILES,
    Tile,
    attend,
    key_gradients,
    prepare,
    query_gradient,
    tile_of,
)

DEVICE = "cuda"
HEADS, KV_HEADS = 32, 8
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
GROUPED = {"heads": 4, "kv_heads": 2, "dtype": torch.bfloat16}
CHECKS: dict[str, dict[str, Any]] = {
    "causal": {"size": 128},
    "causal, size 64": {"size": 64},
    "causal, size 80": {"size": 80},
    "causal, size 96": {"size": 96},
    "causal, size 256": {"size": 256},
    "causal, sizes 192 and 128": {"size": 192, "value_size": 128},
    "causal, float16": {"size": 128, "dtype": torch.float16},
    "causal, float32": {"size": 64, "dtype": torch.float32},
    "causal, int8": {"size": 128, "int8": True},
    "causal, soft cap": {"size": 128, "softcap": 5.0, "spread": 1.5},
    "causal, one head a group": {"size": 128, "heads": 2},
    "window": {"size": 128},
    "packed": {"size": 128},
    "fillers": {"size": 128},
    "bidirectional": {"size": 128},
    "suffix": {"size": 128},
}
CANDIDATES = {
    "attend": [Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3)],
    "query_gradient": [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 1), Tile(64, 64, 4, 2)],
    "key_gradients": [
        Tile(64, 128, 8, 2), Tile(32, 128, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 1)
    ],
}  # fmt: skip


def problem_of(name: str, tokens: int = 700) -> Problem:
    """A small problem of the kind that the check's name begins with."""
    rows = [scattered(tokens, 310), scattered(tokens, 310, seed=1)]
    interval = {"window": window(200), "packed": packed(0, 40, 130, 420, 421), "bidirectional": padded(tokens, 500)}
    if name == "fillers":
        rows[0] = scattered(tokens, 310, fillers=140)
    if name == "bidirectional":
        rows[1] = scattered(500, 310, fillers=20)
    if name == "suffix":
        rows = [torch.arange(tokens - 310, tokens)] * 2
    return Problem.of(tokens, rows, interval.get(name, causal)).to(DEVICE)


def check(name: str) -> dict[str, float] | str:
    """Errors of a feature, or what kept it from running."""
    try:
        problem = problem_of(name.split(",")[0])
        inputs = Inputs.draw(problem, **(GROUPED | CHECKS[name]))
        return by_kernels(problem, inputs).errors(dense(problem, inputs))
    except Exception as error:  # the others are still worth their time on the device
        return f"{type(error).__name__}: {error}"


def candidates(kernel: str, size: int) -> list[Tile]:
    """The default first."""
    return list(dict.fromkeys([TILES[kernel, size], *CANDIDATES[kernel]]))


def compile_tile(kernel: str, size: int, tile: Tile) -> str | None:
    """Compile a kernel with a tile, as `sweep` will want it; returns what is wrong with it."""
    problem = Problem.of(300, [scattered(300, 200)], causal).to(DEVICE)
    inputs = Inputs.draw(problem, heads=HEADS, kv_heads=KV_HEADS, size=size, dtype=torch.bfloat16)
    expected, default, scale = dense(problem, inputs), TILES[kernel, size], inputs.options["scale"]
    intervals = problem.first, problem.last
    TILES[kernel, size] = tile
    try:
        queries = tile_of("key_gradients", inputs.query, inputs.exact[1]).queries
        output, lse = expected.output.bfloat16(), expected.lse.float()
        prepared = prepare(inputs.grad, output, lse, *intervals, queries)
        if kernel == "attend":
            actual, wanted = attend(inputs.query, *inputs.exact, *intervals, scale=scale)[0], expected.output
        elif kernel == "query_gradient":
            call = partial(query_gradient, inputs.grad, inputs.query, *inputs.exact, *intervals, prepared)
            actual, wanted = call(scale=scale), expected.grad_query
        else:
            rows = *inputs.selected, problem.position
            actual, _ = key_gradients(inputs.grad, inputs.query, *rows, *intervals, prepared, scale=scale)
            wanted = expected.grad_key
    except Exception as refusal:  # too much shared memory, most often
        return f"{type(refusal).__name__}: {refusal}"
    finally:
        TILES[kernel, size] = default
    error = relative_error(actual, wanted)
    return None if error < TOLERANCE[torch.bfloat16] else f"error {error:.1e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over largest magnitude."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def checked_and_compiled(workers: int) -> tuple[dict[str, Any], dict[tuple[str, int, Tile], str | None], list[str]]:
    """All jobs side by side: errors by feature, what is wrong with each candidate, and features that are wrong."""
    jobs = [(kernel, size, tile) for size in (128, 64) for kernel in CANDIDATES for tile in candidates(kernel, size)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        # What takes longest to compile comes first.
        names = sorted(CHECKS, key=lambda name: "float32" not in name and "256" not in name)
        checks = {name: pool.submit(check, name) for name in names}
        compiled = {job: pool.submit(compile_tile, *job) for job in jobs}
        errors = {name: checks[name].result() for name in CHECKS}
        unusable = {job: future.result() for job, future in compiled.items()}
    for name, found in errors.items():
        print(f"  {name:26}", found if isinstance(found, str) else " ".join(f"{k} {v:.1e}" for k, v in found.items()))
    for job, wrong in unusable.items():
        if wrong is not None:
            print("  refused:", *job, wrong)
    tolerance = {name: TOLERANCE[options.get("dtype", torch.bfloat16)] for name, options in CHECKS.items()}
    right = {
        name for name, found in errors.items() if isinstance(found, dict) and max(found.values()) < tolerance[name]
    }
    return errors, unusable, [name for name in CHECKS if name not in right]
