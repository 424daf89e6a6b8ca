"""How much code there is and how closely it is written: part of what the project promises."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOT_FILES = [ROOT / f"{name}.py" for name in "generate model quantize tp kernels".split()]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
PLUMBING = "cli checkpoint tokenizer requests chat".split()
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.Assert)


def tokens_by_line(source: str) -> dict[int, int]:
    """How many tokens begin on each line of code: not those of docstrings and comments."""
    documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    counts = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.type == tokenize.ENDMARKER:
            continue
        for line in range(token.start[0], token.end[0] + 1):
            counts.setdefault(line, 0)
        if token.type in COUNTED:
            counts[token.start[0]] += 1
    return {line: count for line, count in counts.items() if line not in docstrings}


def children(function) -> list[ast.AST]:
    """The nodes of a function, without those of functions and classes within."""
    found = []
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.append(node)
            waiting += ast.iter_child_nodes(node)
    return found


def decisions(function) -> int:
    """1, and 1 for every place where a reader must think of two ways."""
    count = 1
    for node in children(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def golf(source: str) -> list[str]:
    """What is shorter than it is plain, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        kind = ""
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(value, ast.Lambda):
                kind = "lambda with a name"
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                if len(value.elts) > 2:
                    kind = "three things in one assignment"
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp)):
            kind = "expression as a statement"
        if kind:
            found.append(f"line {node.lineno}: {kind}")
    return found


def density(paths: list[Path]) -> tuple[float, float]:
    """Tokens on a line of code, and the share of lines with more than 30."""
    counts = []
    for path in paths:
        counts += tokens_by_line(path.read_text()).values()
    return sum(counts) / len(counts), sum(count > 30 for count in counts) / len(counts)


def physical_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


SAMPLE = '''"""Doc
string."""

# comment
x = 1  # why


def f(a):
    """Doc."""
    if a and x:
        return [i for i in a if i]
    a or f(x)
    g = lambda: 0
    p, q, r = a, g, """1
2"""
'''


def test_how_it_is_counted():
    counts = tokens_by_line(SAMPLE)
    assert counts[5] == 3 and 2 not in counts and 4 not in counts and 9 not in counts
    assert counts[15] == 0, "a line of a string that began before"
    assert decisions(ast.parse(SAMPLE).body[2]) == 6
    assert [line.split(": ")[0] for line in sorted(golf(SAMPLE))] == [
        "line 12",
        "line 13",
        "line 14",
    ]


def test_root_files_stay_under_1500_lines():
    assert set(ROOT_FILES) == set(ROOT.glob("*.py"))
    assert physical_lines(ROOT_FILES) < 1500


def test_plumbing_stays_under_900_lines():
    assert physical_lines([ROOT / "scripts" / f"{name}.py" for name in PLUMBING]) < 900


@pytest.mark.parametrize("paths", [ROOT_FILES, ROOT_FILES + SCRIPTS], ids=["root", "all"])
def test_lines_are_not_packed(paths):
    tokens, wide = density(paths)
    assert tokens <= 13.4 and wide <= 0.03


@pytest.mark.parametrize("path", ROOT_FILES + SCRIPTS, ids=lambda path: path.stem)
def test_a_file_is_plain(path):
    source = path.read_text()
    assert golf(source) == []
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    assert [f.name for f in functions if decisions(f) > 15] == []
