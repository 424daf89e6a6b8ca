"""scripts/bench.py and scripts/verify.py on a tiny random model: what they print, what they find, bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
from kernels import BATCH_INVARIANT, FAST
from tests import contract

ROOT = Path(generate.__file__).parent
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 192, "vocab_size": 320}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
CONFIG |= {"max_position_embeddings": 3000, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def run(*argv):
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_bench(config):
    """A table of both kinds, without the flag and, if it is given, with it; the same as lines of JSON."""
    flags = "--batches", "1,2", "--contexts", "16,200", "--prompts", "30", "--runs", "1"
    for more, columns in ((), 6), (("--deterministic",), 8):
        path = config.parent / f"{columns}.jsonl"
        done = run("scripts/bench.py", "--random_weights", config, *flags, *more, "--output", path)
        assert done.returncode == 0, done.stderr
        rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines() if re.match(r"\| (pre|de)", row)]
        asked = [("prefill", "1", "30"), *(("decode", b, n) for n in ("16", "200") for b in ("1", "2"))]
        assert [tuple(row[:3]) for row in rows] == asked and all(len(row) == columns for row in rows)
        assert all(float(x) > 0 for row in rows for x in row[3:])
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [[f"{x:.4g}" for x in list(line.values())[1:]] for line in lines] == [row[1:] for row in rows]
        assert columns == 6 or all(abs(x["cost"] * x["deterministic"] / x["tokens/s"] - 1) < 1e-9 for x in lines)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["bench.py", "--bogus"], "--bogus"),
        (["bench.py", "--batches", "x"], "x"),
        (["bench.py", "--checkpoint_path", "/nowhere"], "config.json"),
        (["verify.py", "--bogus"], "--bogus"),
        (["verify.py", "--size", "x"], "--size"),
        (["verify.py", "--checkpoint_path", "/nowhere"], "config.json"),
    ],
)
def test_bad_input(argv, word):
    done = run(f"scripts/{argv[0]}", *argv[1:])
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and word in done.stderr


def test_tally():
    alone = {0: ([5, 6], [-1.0, -2.0]), 1: ([7], [-3.0])}
    assert contract.tally(alone, list(alone.items())) == ("0 of 2", False)
    assert contract.tally(alone, [(0, ([5, 6], [-1.0, -2.0000001])), (1, ([7], [-3.0]))]) == ("1 of 2, 1", True)
    assert contract.tally(alone, [(0, ([5], [-1.0])), (1, ([8], [-3.0]))]) == ("1 of 2, 0", True)


def rows(config, monkeypatch, flags=(), **broken):
    """The table of one model, with no compiling, which takes minutes."""
    args = generate.parse_args(["--random_weights", str(config), *flags], size=1)
    model, _ = generate.load(args)
    contract.follow(model, model.ops, **broken)
    monkeypatch.setattr(generate, "set_up", lambda *_: None)
    monkeypatch.setattr(contract.multiprocessing, "get_context", lambda kind: SameProcess())
    ids = [torch.randint(320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in contract.LENGTHS]
    requests = [generate.Request(i, "", row, max_new_tokens=6, **contract.OPTIONS[i % 3]) for i, row in enumerate(ids)]
    return {name: (found, differs) for name, found, differs in contract.promises(args, model, requests)}


class SameProcess:
    """In place of a pool of processes."""

    def Pool(self, count):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def apply(self, function, args):
        return function(*args)


def test_verify_finds_nothing_with_the_flag(config, monkeypatch):
    table = rows(config, monkeypatch, ["--deterministic"])
    assert len(table) == 9 and not any(differs for _, differs in table.values()), table


def test_verify_finds_a_broken_rule(config, monkeypatch):
    table = rows(config, monkeypatch, ["--deterministic"], attention=contract.causal_flag)
    assert table["C2 prefill in chunks"][1] and table["C2 rescored by prefill"][1]
    assert not table["C6 cache length"][1]  # which that rule has nothing to do with


@pytest.mark.parametrize("name", ["F.linear with no tiles, leaves or probe", "leaves for several rows only"])
def test_controls_are_other_products(name):
    linear = contract.CONTROLS[name]["linear"]
    weight, x = (torch.randn(n, 384, generator=torch.Generator().manual_seed(n)) for n in (64, 40))
    packed = BATCH_INVARIANT.pack(weight, None, 3)
    want = BATCH_INVARIANT.linear(x, packed)
    torch.testing.assert_close(linear(x, packed), want, rtol=0, atol=1e-4)  # sums of 384 products, in another order
    assert not torch.equal(linear(x[:1], packed), want[:1])


def test_flag_off_is_the_other_table(config):
    for flags, ops in (([], FAST), (["--deterministic"], BATCH_INVARIANT)):
        assert generate.load(generate.parse_args(["--random_weights", str(config), *flags]))[0].ops is ops
