"""Who imports whom: the imports go one way, the plumbing needs no torch, and the four lower files
of the root can be taken away."""

import ast
import functools
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LADDER = ["kernels", "tp", "quantize", "model", "generate"]  # each may import those before it
LOWER = LADDER[:-1]
PLUMBING = ["checkpoint", "tokenizer", "requests", "prompts", "chat", "cli"]
PLUMBING += ["settings", "backends", "pipelines", "sentencepieces", "special_tokens", "templates"]
PLUMBING += ["outputs", "peers", "files", "sandbox", "interrupts", "defaults", "jobs", "fused"]
PLUMBING += ["rope_settings", "hardware", "tables", "turns", "plot", "picture"]
PLUMBING += ["gguf_models", "gguf_tokenizers"]
NO_ROOT = ["machine", "drafts"]


def is_main(node: ast.AST) -> bool:
    """Whether it is `if __name__ == "__main__"`, where a file is a command and no module."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(source: str) -> set[str]:
    """The modules that a file imports, wherever in it: `from a import b` may mean a or a.b."""
    found = set()
    waiting = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if not is_main(node):
            waiting += ast.iter_child_nodes(node)
    return found


@functools.cache
def house() -> dict[str, set[str]]:
    """What each module outside tests/ imports."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {names[path]: imports(path.read_text()) for path in files}


def breaches(modules: dict[str, set[str]]) -> list[str]:
    """The imports that should not be there."""
    never = {"tests", "helpers", "conftest"}
    forbidden = {name: set(never) for name in modules}
    for i, name in enumerate(LADDER):
        forbidden[name] |= set(LADDER[i:])
        if name in LOWER:
            forbidden[name].add("scripts")
    for name in PLUMBING:
        forbidden[f"scripts.{name}"] |= {"torch", *LADDER}
    for name in NO_ROOT:
        forbidden[f"scripts.{name}"] |= set(LADDER)

    found = []
    for name, imported in modules.items():
        for each in imported:
            top = each.split(".")[0]
            if top in forbidden[name] or top.startswith("test_"):
                found.append(f"{name} imports {each}")
    return found


def check_no_cycle(modules: dict[str, set[str]]) -> None:
    """Raises CycleError where modules import each other."""
    graph = {name: imported & modules.keys() for name, imported in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_go_one_way():
    modules = house()
    assert modules.keys() >= {*LADDER, *(f"scripts.{name}" for name in PLUMBING + NO_ROOT)}
    assert breaches(modules) == []
    check_no_cycle(modules)


BROKEN = [
    ("kernels", "import tp"),
    ("tp", "def f():\n    from scripts import cli"),
    ("quantize", "from model import Layer"),
    ("model", "import generate"),
    ("scripts.cli", "import torch.nn"),
    ("scripts.chat", "from torch import Tensor"),
    ("scripts.requests", "if True:\n    import kernels"),
    ("scripts.machine", "from model import Transformer"),
    ("scripts.drafts", "import tp"),
    ("scripts.verify", "from tests import contract"),
    ("generate", "import helpers"),
    ("scripts.bench", "from test_generate import load"),
]


@pytest.mark.parametrize("name, line", BROKEN, ids=[f"{name}, {line}" for name, line in BROKEN])
def test_a_wrong_import_is_seen(name, line):
    modules = dict.fromkeys(house(), set())
    assert breaches(modules) == []
    assert breaches(modules | {name: imports(line)})


def test_a_cycle_is_seen():
    modules = house() | {"scripts.checkpoint": imports("from scripts import requests")}
    with pytest.raises(graphlib.CycleError):
        check_no_cycle(modules)


def test_a_command_may_import_what_its_module_does_not():
    assert imports('if __name__ == "__main__":\n    import a\nelse:\n    import b') == set()
    assert imports('if __name__ == "main":\n    import a') == {"a"}


def fresh_process(code: str, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


def test_plumbing_leaves_torch_alone():
    names = ", ".join(f"scripts.{name}" for name in PLUMBING)
    fresh_process(f"import sys, {names}\nassert 'torch' not in sys.modules", cwd=ROOT)


def test_the_lower_files_can_be_taken_away(tmp_path):
    """Copied into an empty folder, they can be imported there."""
    for name in LOWER:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    fresh_process(
        f"import model\nassert model.__file__ == {str(tmp_path / 'model.py')!r}", cwd=tmp_path
    )
