"""The size of the code, which is part of what the project promises."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_counting_leaves_out_what_is_not_code():
    assert (
        code_lines(
            '"""Doc\nstring."""\n\n# comment\nx = 1  # why\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
        )
        == 4
    )


def test_root_files_stay_under_1500_lines():
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py")) < 1500


def test_code_stays_under_1500_lines():
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert sum(code_lines(path.read_text()) for path in files) < 1500


def test_no_line_is_longer_than_120_columns():
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    long = [
        f"{path.name}:{i}" for path in files for i, x in enumerate(path.read_text().splitlines(), 1) if len(x) > 120
    ]
    assert not long
