"""What a plan assumes about a machine that was not measured, each figure with its reason. Must not import torch."""

from __future__ import annotations

from typing import Any

from framework.hardware import Device

MIB = 2**20

CPU = "cpu"

MAX_MATRIX = {"8.0": 0.87, "9.0": 0.80, "gfx942": 0.51}
"""Highest rate of bfloat16 products that a search over shapes found / the peak, by architecture."""

_MATRIX_SOURCE = "ml-engineering by Stas Bekman, maximum achievable matmul FLOPS (v2)"

_TYPICAL_SHAPES = 0.9
"""A model's own shapes are not the best ones that were searched for."""

_LINK = 0.75
_COPY = 0.8

WORKSPACES = 2
"""Threads with a cuBLAS handle of their own: the one of forward passes, and autograd's."""


def workspace_bytes(architecture: str) -> tuple[int, str]:
    """Bytes of one cuBLAS workspace of torch, and where they come from.

    Args:
        architecture: as `Device.architecture`.
    """
    source = "torch, aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: "
    major = architecture.partition(".")[0]
    if architecture.startswith("gfx"):
        return 128 * MIB, source + "128 MiB on gfx942"
    if not architecture:
        return 0, "processors have none"
    # Before torch took Blackwell (10 and above) in, only 9.0 had 32 MiB.
    if int(major) >= 9:
        return 32 * MIB, source + "32 MiB on Hopper and Blackwell"
    return 2 * 4096 * 1024 + 8 * 16 * 1024, source + ":4096:2:16:8"


def assumed_figures(device: Device) -> dict[str, tuple[Any, str]]:
    """Values and reasons, by the names of `framework.planner.profile.Profile`'s figures."""
    if device.name == CPU:
        return _of_processor(device)
    workspace, workspace_source = workspace_bytes(device.architecture)
    matrix = _TYPICAL_SHAPES * MAX_MATRIX.get(device.architecture, 0.80)
    matrix_source = f"assumption: {_TYPICAL_SHAPES} of the best shape's"
    if device.architecture in MAX_MATRIX:
        matrix_source += f" {MAX_MATRIX[device.architecture]} ({_MATRIX_SOURCE})"
    else:
        matrix_source += ", which is taken to be 0.80, as on H100"
    dtypes = ["float16", "float32"] + ["bfloat16"] * device.bfloat16 + ["tf32"] * (device.tf32 is not None)
    hopper = device.architecture == "9.0"
    attention = "FlashAttention-2 reaches 35 % of the peak on H100 (arXiv 2407.08608, abstract)"
    if not hopper:
        attention = (
            "FlashAttention-2 reaches 50 to 73 % of the peak on A100 (arXiv 2307.08691, abstract); the lower end"
        )
    link_source = f"assumption: {_LINK} of the link, about what nccl-tests report within an NVLink machine"
    copy_source = f"assumption: {_COPY} of the link, what packets leave of PCI Express"
    return {
        "context_bytes": (600 * MIB, "assumption: torch with CUDA 12 and 13 takes about 400 to 600 MiB"),
        "communication_bytes": (
            1024 * MIB,
            "assumption: NCCL's channels for several communicators, with buffers of 4 MiB (NCCL_BUFFSIZE) each",
        ),
        "workspace_bytes": (WORKSPACES * workspace, f"{workspace_source}, for {WORKSPACES} threads"),
        "reserved_ratio": (
            1.10,
            "median of 16 runs on one A100 (fms-acceleration, scripts/benchmarks/refs), with 600 MB of nvidia-smi's "
            "figure taken for the context",
        ),
        "matrix_efficiency": (dict.fromkeys(dtypes, matrix), matrix_source),
        "few_rows_efficiency": (
            dict.fromkeys(dtypes, 0.4),
            "assumption: reading the weight takes about as long as the arithmetic, and the two overlap in part",
        ),
        "attention_efficiency": (0.35 if hopper else 0.50, attention),
        "masked_attention_efficiency": (
            0.30,
            "torch 2.11 reaches 24 to 35 % of the peak on one H200, forward and backward, heads of 64 and 128",
        ),
        "memory_efficiency": (0.85, "assumption: streaming kernels commonly reach 80 to 90 % of the bandwidth"),
        "operator_efficiency": (0.45, "assumption: about half of that, for strides, casts and small tensors"),
        "kernel_seconds": (12e-6, "assumption: what Python, torch and the driver take on the CPU for one launch"),
        "host_to_device": (_COPY * device.host_link, copy_source),
        "device_to_host": (_COPY * device.host_link, copy_source),
        "all_gather": (_LINK * device.peer_link, link_source),
        "reduce_scatter": (_LINK * device.peer_link, link_source),
        "network": (None, "not measured"),
    }


def _of_processor(device: Device) -> dict[str, tuple[Any, str]]:
    nothing = "processors have none"
    half = "assumption: emulated, at a tenth of float32's rate"
    copies = "assumption: half of the memory's bandwidth, for reading and writing"
    link = "assumption: gloo's sockets on one machine"
    return {
        "context_bytes": (0, nothing),
        "communication_bytes": (0, nothing),
        "workspace_bytes": (0, nothing),
        "reserved_ratio": (1.0, "nothing is reserved on processors"),
        "matrix_efficiency": (
            {"float32": 0.7, "bfloat16": 0.07, "float16": 0.07},
            f"assumption for float32; half precision {half}",
        ),
        "few_rows_efficiency": ({"float32": 0.5, "bfloat16": 0.05, "float16": 0.05}, "assumption"),
        "attention_efficiency": (0.3, "assumption"),
        "masked_attention_efficiency": (0.3, "assumption"),
        "memory_efficiency": (0.5, "assumption: one process does not use all channels"),
        "operator_efficiency": (0.5, "assumption: the same"),
        "kernel_seconds": (12e-6, "assumption: what Python and torch take to call one operator"),
        "host_to_device": (device.memory_bandwidth / 2, copies),
        "device_to_host": (device.memory_bandwidth / 2, copies),
        "all_gather": (1e9, link),
        "reduce_scatter": (1e9, link),
        "network": (None, "not measured"),
    }
