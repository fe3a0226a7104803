"""An optional package is named when it is missing, imported when it is needed, and not before."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework import extras

NAME = "package_that_takes_long"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of another name in the place of bitsandbytes, which is imported only once in a process."""
    (tmp_path / f"{NAME}.py").write_text(
        "import logging\n"
        f"log = logging.getLogger('{NAME}.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'no such package')\n"
        "log.warning('the library is broken')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extras, "_NAME", NAME)
    yield
    sys.modules.pop(NAME, None)


def test_within_the_context_others_cannot_import_it() -> None:
    with extras.put_off_import(NAME):
        with pytest.raises(ImportError):
            importlib.import_module(NAME)
        assert importlib.util.find_spec(NAME) is None
        assert extras.is_installed()
    assert NAME not in sys.modules
    importlib.import_module(NAME)


def test_what_needs_it_imports_it_and_it_stays() -> None:
    with extras.put_off_import(NAME):
        module = extras.bitsandbytes()
        assert importlib.import_module(NAME) is module is extras.bitsandbytes()
    assert sys.modules[NAME] is module


def test_what_is_imported_already_is_left_alone() -> None:
    module = importlib.import_module(NAME)
    with extras.put_off_import(NAME):
        assert importlib.import_module(NAME) is module
    assert sys.modules[NAME] is module


def test_it_is_quiet_about_a_kernel_that_nothing_uses_and_about_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        extras.bitsandbytes()
    assert caplog.messages == ["the library is broken"]


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_NAME", "no_such_package")
    assert not extras.is_installed()
    with extras.put_off_import("no_such_package"):
        assert "no_such_package" not in sys.modules
