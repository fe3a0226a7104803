"""What the ranks of tests/sharding/test_fsdp.py do: train the cases and write down what they saw."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fsdp_cases import CASES, HYBRID, PRECISIONS, engine_of, fragments, held_bytes, train

from framework.sharding.ranks import Place, joined_ranks


def trained(case, ranks):
    engine = engine_of(case, ranks)
    results = train(engine, case, ranks)
    held = engine.held()
    return {
        "results": [tuple(vars(result).values()) for result in results],
        "weights": fragments(engine.weights()),
        "optimizer": fragments(engine.optimizer_state()),
        "bytes": {kind: held_bytes(tensors) for kind, tensors in held._asdict().items()},
    }


def main(directory: Path) -> None:
    place = Place.of_environment()
    cases = HYBRID if place.world_size == 4 else CASES | PRECISIONS
    names = sys.argv[2:] or cases
    with joined_ranks(place, timeout_seconds=60) as ranks:
        found = {name: trained(cases[name], ranks) for name in names}
    torch.save(found, directory / f"{place.world_size}-{place.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
