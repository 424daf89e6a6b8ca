"""Spoiled input at random, for a minute at most, and bugs that are planted to be found."""

import os
import signal
import time
from pathlib import Path

import fuzz
import pytest

from scripts import machine, requests
from scripts.files import Refusal

COUNT, SECONDS = 50, 45


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """What is right, to be spoiled."""
    folder = tmp_path_factory.mktemp("right")
    with pytest.MonkeyPatch.context() as patch:
        # To be put back: what fuzz.warm_up sets.
        patch.setattr(machine, "read_bandwidth", machine.read_bandwidth)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        fuzz.warm_up()
        for name in set(fuzz.KINDS):
            fuzz.prepare(folder / name)
        yield folder


def test_spoiled_input(right):
    """By hand there are more: tests/fuzz.py says how."""
    end = time.monotonic() + SECONDS
    done = 0
    for seed in range(COUNT):
        if time.monotonic() < end:
            assert fuzz.fuzz([seed], right) == {}
            done += 1
    assert done >= 20


def test_a_case_is_the_same_for_its_seed(right, tmp_path):
    found = []
    for name in ("a", "b"):
        case = fuzz.new_case(7, right, tmp_path / name)
        found.append((case.argv, fuzz.contents(case.folder)))
    assert found[0] == found[1]
    assert len({str(fuzz.new_case(i, right, tmp_path / str(i)).argv) for i in range(30)}) > 3


# ---- bugs that are planted


def find(right, monkeypatch, place, name, bug, seconds=fuzz.SECONDS):
    """What is wrong with a few cases where a function has a bug."""
    monkeypatch.setattr(place, name, bug)
    found = fuzz.fuzz(range(6), right, seconds)
    return " ".join(line for lines in found.values() for line in lines)


def test_a_traceback_is_found(right, monkeypatch):
    def bug(*_):
        raise LookupError("planted")

    found = find(right, monkeypatch, requests, "resume", bug)
    assert "status 1" in found and "LookupError: planted" in found


def test_a_run_without_end_is_found(right, monkeypatch):
    def bug(*_):
        time.sleep(60)

    assert "no end in 2 seconds" in find(right, monkeypatch, requests, "resume", bug, seconds=2)


def test_a_crash_is_found(right, monkeypatch):
    def bug(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    assert "status -9" in find(right, monkeypatch, requests, "resume", bug)


def test_what_is_written_over_is_found(right, monkeypatch):
    def bug(*_):
        Path("checkpoint/config.json").write_text("{}")
        Path("left behind").touch()
        raise Refusal("planted")

    found = find(right, monkeypatch, requests, "resume", bug)
    assert "checkpoint/config.json was" in found and "left behind was None" in found


def test_two_lines_are_found(right, monkeypatch):
    def bug(*_):
        os.write(2, b"something else\n")
        raise Refusal("planted")

    assert "not one line: something else / error: planted" in find(
        right, monkeypatch, requests, "resume", bug
    )
