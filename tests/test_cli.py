"""How command lines report failures."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record

from framework.cli import run_command
from framework.errors import RunError, UserError
from framework.importing import quick_imports


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


def test_at_its_end_a_command_looks_for_no_garbage() -> None:
    code = "import atexit, gc, sys; from framework.cli import run_command; "
    # Called in the reverse order.
    code += "atexit.register(lambda: print(gc.get_freeze_count() > 1000)); sys.exit(run_command(lambda: 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n")


def test_imports_look_for_no_garbage() -> None:
    assert gc.isenabled()
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_torchrun_gets_the_message_and_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    @record
    def main() -> None:
        raise UserError("bad\n  key")

    assert run_command(main) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    summary = ChildFailedError("main", {0: failure}).format_msg()
    assert "error: bad\n    key" in summary
    assert "Traceback" not in summary and "line" not in summary
