"""The changes that the README works out: each patch applies to this tree, has the size that is
stated, and does what the script beside it asks, which fails without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = {path.stem: path for path in sorted(ROOT.glob("tests/changes/*.patch"))}
ROW = re.compile(r"\(tests/changes/(\w+)\.patch\) \| \+(\d+) -(\d+)")


def copy_tree(work):
    for pattern in ("*.py", "scripts/**/*.*", "tests/*.py"):
        for path in ROOT.glob(pattern):
            copy = work / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def run_script(patch, work):
    """The script beside the patch, on the tree in `work`."""
    paths = os.pathsep.join([str(work), str(work / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, patch.with_suffix(".py")]
    return subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHES)
def test_change(name, tmp_path):
    patch, before, after = PATCHES[name], tmp_path / "before", tmp_path / "after"
    copy_tree(before)
    shutil.copytree(before, after)
    found = run_script(patch, before)
    assert found.returncode and "ModuleNotFoundError" not in found.stderr
    subprocess.run(["git", "apply", patch], cwd=after, check=True)
    found = run_script(patch, after)
    assert not found.returncode, found.stderr


def count(path, sign):
    lines = path.read_text().splitlines()
    return sum(line.startswith(sign) and not line.startswith(sign * 3) for line in lines)


def test_the_sizes_are_those_of_the_readme():
    stated = ROW.findall((ROOT / "README.md").read_text())
    counts = [(name, count(path, "+"), count(path, "-")) for name, path in PATCHES.items()]
    assert sorted(stated) == [(name, str(plus), str(minus)) for name, plus, minus in counts]
