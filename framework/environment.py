"""What a run runs on, for a bug report: versions, devices, settings.

python -m framework.environment [--json]

Nothing here fails, whatever is missing, and nothing secret is shown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import framework

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "peft",
    "accelerate",
    "trl",
    "datasets",
    "deepspeed",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
    "triton",
    "bitsandbytes",
    "torchao",
    "pydantic",
    "numpy",
    "tensorboard",
    "wandb",
)

VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|CUBLAS|CUDNN|NVIDIA|HIP|ROCR|OMP|MKL|KMP|HF|TRANSFORMERS|ACCELERATE|"
    r"DS|DEEPSPEED|TRITON|WANDB|TOKENIZERS|SLURM_(JOB|NNODES|NTASKS|GPUS|NODELIST|RESTART)|FI|UCX)(_.*|$)"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|"
    r"VIRTUAL_ENV|CONDA_DEFAULT_ENV"
)
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|TOKENS|KEY|KEYS|APIKEY|SECRET|SECRETS|PASS|PASSWORD|PASSWD|CREDENTIAL|CREDENTIALS|AUTH)(_|$)", re.I
)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
HIDDEN = "(set, not shown)"

COMMAND_SECONDS = 5


def environment(*, commands: bool = True) -> dict[str, Any]:
    """Everything that is known, as JSON values; what cannot be found out is null or left out.

    Args:
        commands: also ask `nvidia-smi` for the driver and the topology, and `git` for the revision, which takes a
            moment.
    """
    report: dict[str, Any] = {
        "selectrain": {"version": framework.__version__, "path": str(Path(framework.__file__).parent)},
        "python": {"version": sys.version.split()[0], "executable": sys.executable},
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "system": _system(),
        "torch": _attempt(_torch),
        "gpus": _attempt(_gpus),
        "variables": shown_variables(os.environ),
    }
    if commands:
        report["selectrain"]["git"] = _git_revision(Path(framework.__file__).parents[1])
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        report["nvidia_smi"] = _output(["nvidia-smi", *query])
        report["topology"] = _output(["nvidia-smi", "topo", "-m"])
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The report to paste into an issue."""
    lines = ["## Environment", ""]
    for name, value in report.items():
        if value in (None, {}, []):
            lines.append(f"- **{name}**: none found")
        elif isinstance(value, Mapping):
            lines.append(f"- **{name}**")
            lines += [f"  - {key}: {_inline(item)}" for key, item in value.items() if item is not None]
        elif isinstance(value, list):
            lines.append(f"- **{name}**")
            lines += [f"  - {_inline(item)}" for item in value]
        else:
            lines += [f"- **{name}**", "  ```", *(f"  {line}" for line in str(value).splitlines()), "  ```"]
    return "\n".join(lines)


def shown_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that matter to training, without what is or may hold a secret."""
    shown = {}
    for name in sorted(variables):
        if VARIABLES.fullmatch(name):
            secret = _SECRET_NAME.search(name) is not None
            shown[name] = HIDDEN if secret else _SECRET_IN_URL.sub("…", variables[name])
    return shown


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_inline, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attempt(ask: Callable[[], Any]) -> Any:
    """The answer, or one line on why there is none: a broken installation is what a report is for."""
    try:
        return ask()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}".strip()}


def _system() -> dict[str, Any]:
    return {
        "os": platform.platform(),
        "cpu": _attempt(_cpu_name),
        "cores": _attempt(lambda: len(os.sched_getaffinity(0))),
        "memory_gib": _attempt(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)),
        "container_memory_limit_gib": _attempt(_container_limit),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _container_limit() -> float | None:
    """Of the control group (version 2), which kills where the machine itself has memory left."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return None if text == "max" else round(int(text) / 2**30, 1)


def _torch() -> dict[str, Any]:
    if _version("torch") is None and importlib.util.find_spec("torch") is None:
        return {}
    import torch

    cuda = torch.cuda.is_available()
    nccl = torch.cuda.nccl.version() if cuda and torch.distributed.is_nccl_available() else None
    return {
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "cuda_available": cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "attention": _attention_kernels(cuda),
    }


def _attention_kernels(cuda: bool) -> list[str]:
    """What attention may run on here: torch's own kernels, and packages that transformers takes kernels from."""
    import torch

    kernels = ["sdpa (math)"]
    if cuda:
        enabled = {
            "flash": torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        }
        kernels += [f"sdpa ({name})" for name, usable in enabled.items() if usable]
        kernels += ["flash_attention_2"] if _version("flash-attn") else []
        kernels += ["flex_attention"] if _version("triton") else []
    return kernels


def _gpus() -> list[dict[str, Any]]:
    if _version("torch") is None and importlib.util.find_spec("torch") is None:
        return []
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "compute_capability": f"{device.major}.{device.minor}",
        }
        for device in properties
    ]


def _git_revision(directory: Path) -> str | None:
    """Of the checkout that the package is imported from; None if it is not a checkout of its own."""
    if not (directory / ".git").exists():
        return None
    revision = _output(["git", "-C", str(directory), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no"])
    return revision and revision + (" with uncommitted changes" if changed else "")


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it is missing, fails, or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    """Print the report."""
    options = argparse.ArgumentParser(prog="python -m framework.environment", description=__doc__.splitlines()[0])
    options.add_argument("--json", action="store_true", help="as JSON instead of Markdown")
    report = environment()
    print(json.dumps(report, indent=2) if options.parse_args().json else markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
