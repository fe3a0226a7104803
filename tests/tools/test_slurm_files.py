from __future__ import annotations

import socket

import pytest
from slurm_files import BLOCK, free_ports


def test_labs_that_come_up_side_by_side_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for process in (12, 13):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        found.append(free_ports())
    assert [len(ports) for ports in found] == [BLOCK, BLOCK]
    assert not {*found[0]} & {*found[1]}
    # One that is up already.
    with socket.socket() as used:
        used.bind(("127.0.0.1", found[1][1]))
        again = free_ports()
    assert not {*again} & {*found[1]}
