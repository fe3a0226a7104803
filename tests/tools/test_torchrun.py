from __future__ import annotations

import pytest
from torchrun import launch

SCRIPT = """
import os, pathlib, sys
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"])
if sys.argv[2] == "broken":
    sys.exit("the cable is loose")
"""


@pytest.mark.multiprocess
def test_a_script_is_a_rank_of_so_many_and_a_failure_ends_the_tool(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch(3, script, tmp_path, "whole")
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["3"] * 3
    with pytest.raises(SystemExit, match=r"(?s)^error: the launch with 1 ranks failed:.*the cable is loose"):
        launch(1, script, tmp_path, "broken")
