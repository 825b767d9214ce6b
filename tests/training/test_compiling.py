"""A lock of torch's that a killed compilation has left: taken away, told; one that somebody has is waited for by torch."""

from __future__ import annotations

import os
import time

import pytest

from vlm_dist.training.compiling import wait_for_compilation


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock as torch leaves it, of an hour ago, and the folder of its operator."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_one_that_was_left_is_taken_away(lock, capsys):
    wait_for_compilation("async_io")
    assert lock.exists()
    wait_for_compilation("cpu_adam")
    told = capsys.readouterr().out
    assert not lock.exists() and told.count("\n") == 1 and "cpu_adam that was killed" in told and "for 3600 s" in told


def test_one_that_a_process_has_open_stays(lock, capsys):
    with lock.open():
        wait_for_compilation("cpu_adam")
    assert lock.exists() and not capsys.readouterr().out


def test_one_where_something_is_written_is_waited_for(lock):
    """Another machine's, in a home that is shared."""
    written = lock.parent / "cpu_adam.o"
    written.touch()
    begin = time.time()
    os.utime(written, (begin - 1,) * 2)
    wait_for_compilation("cpu_adam", abandoned_s=2.0)
    assert time.time() - begin >= 1.0 and not lock.exists()


def test_nothing_to_wait_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    wait_for_compilation("cpu_adam")
