"""The commands of README and docs, as a newcomer would paste them. The first two, which set up, are
what .ci/run runs; the others run here, word for word, in a copy of the tree whose default model is
a tiny one. So do the experiments of docs/numerics.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_checkpoint, write_json, write_weights
from test_download import write_gguf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "usage.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```\n(.*?)^```", re.M | re.S)
EXPERIMENT = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def commands_of(path: Path) -> list[str]:
    """What a page has in blocks of its own, without the words that explain it."""
    lines = []
    for block in BLOCK.findall(path.read_text()):
        lines += [line.partition("  #")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "torchrun ", "bash "))]


def is_slow(command: str) -> bool:
    """Whether it compiles, or starts processes that do what others have done."""
    return "--compile" in command or command.startswith("torchrun")


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
ELSEWHERE = {
    "python scripts/verify.py": "takes minutes",
    "python scripts/download.py org/name": "needs the network",
    "python generate.py --checkpoint_path org/name": "needs the network",
    "python scripts/download.py AWQ --out converted": "tests/test_published.py packs one",
}
SHAPE = {  # which three processes can share
    "num_hidden_layers": 1,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 366,
    "max_position_embeddings": 2048,
}
ENDS = list(range(350, 360))  # so many that most texts are short


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The tree and the files that the commands name; a home of its own."""
    tree = tmp_path_factory.mktemp("newcomer")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.*")):
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    model = write_checkpoint(tmp_path_factory.mktemp("model"))
    write_weights(model, **SHAPE)
    write_json(model / "generation_config.json", {"eos_token_id": ENDS})
    for name in ("checkpoints/SmolLM2-135M-Instruct", "home/models/Qwen3-0.6B", "BIG", "SMALL"):
        shutil.copytree(model, tree / name)
    shutil.copy(model / "config.json", tree / "scripts" / "configs" / "Llama-3.1-8B.json")
    (tree / "prompts.jsonl").write_text(
        '{"prompt": "The quick"}\n{"prompt": "brown fox", "seed": 5}\n'
    )
    for name in ("LICENSE", "book.txt"):
        (tree / name).write_text("The lazy dog jumps over the other fox.\n" * 5)
    (tree / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 1500)
    write_gguf(tree / "model.gguf")
    return tree


def test_the_readme_has_commands():
    assert len(COMMANDS) > 15
    assert set(COMMANDS) > ELSEWHERE.keys()
    assert 2 < sum(map(is_slow, COMMANDS)) < len(COMMANDS) / 2
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("python3 -m venv")]) == 2
    assert len(lines) <= 150


def test_what_shows_a_claim_is_there():
    named = re.findall(r"tests/\w+\.py(?:::\w+)?", (ROOT / "docs" / "claims.md").read_text())
    assert len(named) > 40
    for name in named:
        path, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(), name


@pytest.mark.slow
def test_the_experiments_run(tmp_path):
    """All in one process, as they are; what they count depends on the machine."""
    blocks = EXPERIMENT.findall((ROOT / "docs" / "numerics.md").read_text())
    path = tmp_path / "experiments.py"
    path.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(blocks) > 4


def run(command: str, tree: Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = os.environ | {"PATH": path, "HOME": str(tree / "home"), "OMP_NUM_THREADS": "1"}
    options = {"input": "hello\n/exit\n", "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(["bash", "-c", command], cwd=tree, env=env, **options)
    assert done.returncode == 0, (command, done.stderr)
    assert "Traceback" not in done.stderr and done.stdout + done.stderr, command


def test_the_commands_of_the_readme_run(tree):
    for command in commands_of(ROOT / "README.md"):
        if command not in ELSEWHERE and not is_slow(command):
            run(command, tree)


@pytest.mark.slow
def test_every_quick_command_runs(tree):
    """In the order of the pages, as one makes the file that the next one reads."""
    for command in COMMANDS:
        if command not in ELSEWHERE and not is_slow(command):
            run(command, tree)
    lines = [json.loads(line) for line in (tree / "done.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines if "id" in line} == {0, 1}
    assert (tree / "checkpoints" / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if is_slow(c)])
def test_a_slow_command_runs(tree, command):
    run(command, tree)
