"""The changes that the README works out: each patch applies to this tree, has the size that is stated, and does what
the script beside it asks, which fails without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "tests" / "changes").glob("*.patch"))


def ask(patch, work, patched):
    """Run the script in a copy of the tree."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.*"), *ROOT.glob("tests/*.py")):
        copy = work / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    if patched:
        subprocess.run(["git", "apply", patch], cwd=work, check=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (work, work / "tests"))), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, patch.with_suffix(".py")]
    return subprocess.run(script, cwd=work, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("patch", PATCHES, ids=[path.stem for path in PATCHES])
def test_change(patch, tmp_path):
    without = ask(patch, tmp_path / "without", False)
    assert without.returncode and "ModuleNotFoundError" not in without.stderr
    found = ask(patch, tmp_path / "with", True)
    assert not found.returncode, found.stderr


def test_the_sizes_are_those_of_the_readme():
    stated = re.findall(r"\(tests/changes/(\w+)\.patch\) \| \+(\d+) -(\d+)", (ROOT / "README.md").read_text())
    lines = {path.stem: path.read_text().splitlines() for path in PATCHES}
    count = lambda stem, sign: str(sum(line.startswith(sign) and line[:3] != sign * 3 for line in lines[stem]))
    assert sorted(stated) == [(stem, count(stem, "+"), count(stem, "-")) for stem in lines]
