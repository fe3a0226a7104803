"""The requirements agree: what pyproject.toml states, what `make` installs, and what `make test-lowest` installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of_extra(name: str) -> list[Requirement]:
    """An extra's requirements; where it names another extra of this project, those of that one."""
    requirements = []
    for line in PROJECT["optional-dependencies"][name]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            requirements += [inner for extra in sorted(requirement.extras) for inner in of_extra(extra)]
        else:
            requirements.append(requirement)
    return requirements


def pins(file: str) -> dict[str, Version]:
    """What a constraints file pins: canonical name -> version."""
    found = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{file} has to pin, but says {line}"
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{file} names {name} twice"
            found[name] = Version(specifier.version)
    return found


RUN_AND_TEST = [Requirement(line) for line in PROJECT["dependencies"]] + of_extra("test")
INSTALLED = [Requirement(line) for line in PROJECT["dependencies"]] + of_extra("dev")


@pytest.mark.parametrize("requirement", RUN_AND_TEST, ids=str)
def test_lower_bound_is_what_is_tested(requirement: Requirement) -> None:
    bounds = [Version(specifier.version) for specifier in requirement.specifier if specifier.operator == ">="]
    assert bounds == [pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]]


@pytest.mark.parametrize("requirement", INSTALLED, ids=str)
def test_installed_version_is_pinned_and_within_bounds(requirement: Requirement) -> None:
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier


def test_nothing_is_required_twice() -> None:
    names = [canonicalize_name(requirement.name) for requirement in INSTALLED]
    assert sorted(names) == sorted(set(names))


def test_the_torch_that_comes_first_is_the_pinned_one() -> None:
    (version,) = re.findall(r"pip install torch==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert Version(version) == pins("constraints.txt")["torch"]
