"""Record the laws that come with the package: of common families and ways to train, for all that a plan may choose.

    python tools/record_laws.py            what is missing; what is asked for no more is removed
    python tools/record_laws.py --anew     all of them, such as for new versions of the libraries

Laws are those of the installed versions of the libraries, so record with those of constraints.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from framework.cli import run_command
from framework.config import Config
from framework.models.configured import base_config
from framework.planner.extraction import law_key, law_settings
from framework.planner.kinds import config_of_law
from framework.planner.laws import SHIPPED, kept_law, laws_of, shipped_laws
from framework.planner.planning import PlannedJob
from framework.planner.small_models import Family

CONFIGS = Path(__file__).parents[1] / "configs"
BEGINNING = (1980, 1, 1, 0, 0, 0)
"""The time of every file in an archive, so that the same laws are the same bytes."""


def _described(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / name).read_text(encoding="utf-8"))["model"]["from_config"]
    return found


MODELS = {
    "Llama 2": _described("llama13b.json"),
    "Llama 3": _described("llama8b-lora.json"),
}

LORA = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}
TRAINED: dict[str, dict[str, Any]] = {
    "all": {"optimizer": {"learning_rate": 1e-5, "precision": "fp32_master"}},
    "LoRA": {"model": {"adapter": LORA}, "optimizer": {"learning_rate": 2e-4, "precision": "pure_bf16"}},
}


@dataclass(frozen=True)
class Job:
    """Laws of one model and way to train, by keys of `MODELS` and `TRAINED`.

    Attributes:
        places: ranks and machines that plans are for: one rank, several, several machines.
    """

    model: str
    trained: str
    places: tuple[tuple[int, int], ...]

    def config(self) -> Config:
        """With everything open that a plan chooses."""
        given = TRAINED[self.trained]
        model = {"from_config": MODELS[self.model], "tokenizer": "unused"} | given.get("model", {})
        return Config.model_validate(
            {
                "run": {"output_dir": "unused"},
                "model": model,
                "data": {"train": "unused", "sequence_length": 4096},
                "selection": {"strategy": "supervised", "ratio": "auto"},
                "retention": {"policy": "auto"},
                "sharding": {"engine": "auto", "zero_stage": "auto"},
                "optimizer": given["optimizer"],
                "training": {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": "auto"},
            }
        )


JOBS = (
    Job("Llama 2", "all", places=((8, 1), (16, 2))),
    Job("Llama 3", "LoRA", places=((1, 1), (8, 1))),
)


def configs_of(job: Job) -> Iterator[Config]:
    """A run for each law that a job asks for."""
    config = job.config()
    planned = PlannedJob(config, 0.5, lambda line: None)
    kinds = {kind: None for ranks, nodes in job.places for kind in planned.unrecorded(planned.space(ranks, nodes))}
    return (config_of_law(config, kind) for kind in kinds)


def recorded(job: Job) -> dict[str, dict[str, Any]]:
    """The laws of a job by their names, as they are stored."""
    configs = [*configs_of(job)]
    family = Family(base_config(configs[0]))
    keys = [law_key(law_settings(config, family)) for config in configs]
    known = shipped_laws(family.model_type)
    missing = [config for key, config in zip(keys, configs, strict=True) if key not in known]
    print(f"{job.model}, {job.trained}: {len(keys)} laws, {len(missing)} to record", flush=True)
    laws_of(missing, family, lambda line: print(line, flush=True))
    laws = {key: known.get(key) or kept_law(key) for key in keys}
    return {key: content for key, content in laws.items() if "law" in content}


def write_archive(path: Path, laws: dict[str, dict[str, Any]]) -> None:
    """Write laws, in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".written")
    with ZipFile(written, "w", ZIP_DEFLATED, compresslevel=9) as archive:
        for key in sorted(laws):
            archive.writestr(ZipInfo(f"{key}.json", BEGINNING), json.dumps(laws[key]), ZIP_DEFLATED, 9)
    written.replace(path)


def main() -> int:
    """Record and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--anew", action="store_true", help="record all laws, also those that are there")
    arguments = options.parse_args()
    if arguments.anew:
        for path in SHIPPED.glob("*.zip"):
            path.unlink()
    wanted: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        # What this machine has recorded before may be of other code.
        os.environ["XDG_CACHE_HOME"] = cache
        for job in JOBS:
            model_type = MODELS[job.model]["model_type"]
            laws = wanted.setdefault(model_type, {})
            laws |= recorded(job)
            # Those of the jobs to come stay until it is their turn.
            write_archive(SHIPPED / f"{model_type}.zip", shipped_laws(model_type) | laws)
    for path in SHIPPED.glob("*.zip"):
        if path.stem not in wanted:
            path.unlink()
    for model_type, laws in wanted.items():
        write_archive(SHIPPED / f"{model_type}.zip", laws)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
