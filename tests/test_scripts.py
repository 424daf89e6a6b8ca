"""scripts/verify.py on a tiny random model: what it prints, what it finds, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
from kernels import BATCH_INVARIANT, Fast
from scripts import cli, contract, machine, verify
from scripts.row_loops import RowLoops

ROOT = Path(generate.__file__).parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 3000,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def status_of(main, monkeypatch, *argv):
    """With which status a command ends, in this process."""
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be put back
    with pytest.raises(SystemExit) as end:
        generate.command(main)
    return end.value.code


# ---- bad input

BAD_INPUT = [
    (["verify.py", "--bogus"], "--bogus"),
    (["verify.py", "--size", "x"], "--size"),
    (["verify.py", "--checkpoint_path", "/nowhere"], "config.json"),
]


@pytest.mark.parametrize("argv, word", BAD_INPUT, ids=str)
def test_bad_input(config, monkeypatch, capsys, argv, word):
    model = [] if "--checkpoint_path" in argv else ["--random_weights", config]
    assert status_of(verify.main, monkeypatch, *argv, *model) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_verify_is_a_command():
    argv = [sys.executable, "scripts/verify.py", "--bogus"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "--bogus" in done.stderr


# ---- scripts/verify.py


def test_tally():
    alone = {0: ([5, 6], [-1.0, -2.0]), 1: ([7], [-3.0])}
    last = (1, ([7], [-3.0]))
    assert contract.tally(alone, list(alone.items())) == ("0 of 2", False)
    assert contract.tally(alone, [(0, ([5, 6], [-1.0, -2.0000001])), last]) == ("1 of 2, 1", True)
    assert contract.tally(alone, [(0, ([5], [-1.0])), (1, ([8], [-3.0]))]) == ("1 of 2, 0", True)


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


def differ(found):
    """Whether it says so: "0 of 7", "3 of 7, 0", or a number of unique completions."""
    count = int(found.split()[0])
    return count > (0 if " of " in found else 1)


def test_verify(config, monkeypatch, capsys):
    """With the flag nothing differs. Each broken rule is seen among the controls, and by the
    comparisons that it concerns: here, one is broken in place of the flag being off. Texts are
    short; nothing is compiled and there is one thread, as otherwise it takes minutes."""
    prepare = contract.prepare

    def prepare_or_break(args, deterministic):
        args, model, requests = prepare(args, True)
        if not deterministic:
            contract.follow(model, contract.CausalFlag())
        return args, model, requests

    monkeypatch.setattr(contract, "prepare", prepare_or_break)
    monkeypatch.setattr(contract, "LENGTHS", (1, 9, 10, 64, 65, 30, 100))
    monkeypatch.setattr(contract, "NEW", 5)
    monkeypatch.setattr(contract.multiprocessing, "get_context", lambda kind: SameProcess())
    monkeypatch.setattr(machine, "set_up", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    flags = ["--random_weights", config, "--precision", "fp32"]
    status = status_of(verify.main, monkeypatch, "verify.py", *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    (_, *promised), controls = rows[:10], dict(rows[11:])
    off = {name: found for name, found, _ in promised}
    assert status == 0
    assert not any(differ(on) for _, _, on in promised), promised
    assert controls.keys() == contract.CONTROLS.keys()
    assert all(map(differ, controls.values())), controls
    assert differ(off["C2 prefill in chunks"]) and differ(off["C2 rescored by prefill"])
    assert not differ(off["C6 cache length"])  # which that rule has nothing to do with


@pytest.mark.parametrize("promise, control", [(True, True), (False, False)])
def test_verify_fails(config, monkeypatch, capsys, promise, control):
    """Where a comparison differs with the flag, or where a control does not."""

    def promises(args, model, requests):
        yield "C1", "1 of 1, 0", promise and args.deterministic

    def controls(args, model, requests):
        yield "rule", "0 of 1", control

    monkeypatch.setattr(contract, "promises", promises)
    monkeypatch.setattr(contract, "controls", controls)
    assert status_of(verify.main, monkeypatch, "verify.py", "--random_weights", config) == 1
    assert "does not hold" in capsys.readouterr().out


@pytest.mark.parametrize("flag, table", [(False, Fast), (True, RowLoops)], ids=["off", "on"])
def test_verify_compares_both_tables(config, flag, table):
    args = cli.parse_args(["--random_weights", str(config)], size=2)
    args, model, requests = contract.prepare(args, flag)
    assert type(model.ops) is table and args.deterministic == flag
    lengths = [len(request.prompt_ids) for request in requests]
    assert lengths == [*contract.LENGTHS, *contract.LENGTHS]


@pytest.mark.parametrize("name", list(contract.CONTROLS)[:2])
def test_controls_are_other_products(name):
    """The same sums of 384 products, in another order."""
    ops, _ = contract.CONTROLS[name]
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 384, generator=generator) for n in (64, 40))
    packed = BATCH_INVARIANT.pack(weight, None, 3, False)
    want = BATCH_INVARIANT.linear(x, packed)
    torch.testing.assert_close(ops.linear(x, packed), want, rtol=0, atol=1e-4)
    assert not torch.equal(ops.linear(x[:1], packed), want[:1])
