"""How command lines report failures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from framework.cli import run_command
from framework.errors import RunError, UserError


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(("error", "code"), [(UserError("bad\n  key"), 2), (RunError("full"), 1)])
def test_known_failures_print_their_message_and_give_their_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: raising(error)) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_success_is_zero_and_a_returned_code_is_kept() -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3


def test_other_exceptions_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run_command(lambda: raising(KeyError("bug")))


def test_importing_does_not_import_torch() -> None:
    code = "import sys, framework.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
