"""Tensor parallelism with gloo: several processes against one, bit for bit with --deterministic.

What torchrun itself does is seen in three tests. For all others this file is also a script: it
forks ranks that have imported everything already, with the environment that torchrun gives to its
own, and is asked for one thing after the other."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from helpers import needs_compiler, write_json  # noqa: E402

import generate  # noqa: E402
import kernels  # noqa: E402
import model as model_module  # noqa: E402
import tp  # noqa: E402
from generate import Engine  # noqa: E402
from kernels import FAST, InputError  # noqa: E402
from scripts import cli, quantized  # noqa: E402
from scripts.contract import complete  # noqa: E402
from scripts.drafts import PromptLookup  # noqa: E402
from scripts.loading import read_config, tensor_shapes  # noqa: E402
from scripts.ranks import from_first, join, together  # noqa: E402
from scripts.requests import Request  # noqa: E402
from scripts.tokenizer import Tokenizer  # noqa: E402

LAYERS, DIM, VOCAB = 2, 256, 384
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": 512,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
}
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
SHAPES = {
    "8 KV heads": CONFIG,
    "4 KV heads": CONFIG | {"num_key_value_heads": 4},  # which four ranks share with a leaf each
    "3 KV heads": CONFIG
    | {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 576},
    "1 KV head": CONFIG | {"num_key_value_heads": 1},
    "mixture": CONFIG | MIXTURE,
}
KINDS = {
    "bf16": [],
    "fp32": ["--precision", "fp32"],
    "int8": ["--quantize", "int8"],
    "int4": ["--quantize", "int4"],
}
ALL = [("8 KV heads", kind) for kind in KINDS]
MODES = {  # the models that so many ranks share, (shape or directory, kind)
    2: [*ALL, ("stored", "bf16"), ("tied", "bf16"), ("mixture", "bf16")],
    3: [("3 KV heads", kind) for kind in KINDS],
    4: [*ALL, ("4 KV heads", "int8"), ("mixture", "int4")],
    8: [*ALL, ("stored", "bf16"), ("tied", "bf16"), ("mixture", "bf16")],
}
EVERY_MODE = sorted({mode for modes in MODES.values() for mode in modes})


def requests():
    """Three prompts of different lengths and contents, greedy and sampled."""
    generator = torch.Generator().manual_seed(0)
    options = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}]
    options[2] |= {"repetition_penalty": 1.2, "min_p": 0.01, "logit_bias": {3: 1.5}}
    asked = []
    for i, length in enumerate((3, 70, 9)):
        ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
        asked.append(Request(i, "", ids, max_new_tokens=6, **options[i]))
    return asked


def load(folder, mode, exact, ranks=None):
    name, kind = mode
    path = ["--checkpoint_path", folder / name]
    if name in SHAPES:
        path = ["--random_weights", folder / f"{name}.json"]
    flags = [*KINDS[kind], *path, "--device", "cpu", *["--deterministic"] * exact]
    model, _ = generate.load(cli.parse_args(list(map(str, flags))), ranks)
    return model


def alone(model, slots=1, **settings):
    """{request id: [tokens, logprobs]}, as JSON has them."""
    return json.loads(json.dumps(dict(complete(model, requests(), slots, 96, **settings))))


def answers(model):
    """Of one model: each request alone, and all in a batch, in chunks and beside drafts that are
    mostly wrong."""
    together = alone(model, 2, prefill_chunk=7, drafter=PromptLookup(3))
    return {"alone": alone(model), "together": together}


@torch.inference_mode()
def logits(model):
    """fp32 of a prompt, [T, V]."""
    engine = Engine(model, Tokenizer(None), 1, 96)
    return engine.feed(requests()[1].prompt_ids, 0, slot=0)[0].tolist()


# ---- what a rank does


def sent_for_a_token(model):
    """[(name of the collective, bytes that the other ranks get of this one)]."""
    engine = Engine(model, Tokenizer(None), 1, 96)
    exchange, seen = tp.exchange, []

    def watched(collective, *args):
        seen.append((collective.__name__, args[-1].nbytes * (tp.world - 1)))
        exchange(collective, *args)

    tp.exchange = watched
    with torch.inference_mode():
        engine.feed([1], 0, slot=0)
    tp.exchange = exchange
    return seen


def with_plain_sums(folder, mode):
    """The rule broken: sums over ranks in any order."""
    add_up = tp.add_up

    def plain(y, bias, exact):
        return add_up(y, bias, False)

    tp.add_up = plain
    found = logits(load(folder, mode, True))
    tp.add_up = add_up
    return found


def with_leaves_by_rank(folder, mode):
    """The rule broken: a leaf for each rank."""
    leaf_count = model_module.leaf_count

    def one_each(*_):
        return tp.world

    model_module.leaf_count = one_each
    found = logits(load(folder, mode, True))
    model_module.leaf_count = leaf_count
    return found


def refused_by(who):
    """What all ranks hear of an error of one."""
    try:
        with together():
            if tp.rank == who:
                raise InputError(f"by {who}")
    except InputError as error:
        return str(error)


def work(folder):
    """All answers, and what the negative controls and the counters say."""
    join()
    modes = MODES[tp.world]
    plain, full = modes[:2]
    found = {str(mode): answers(load(folder, mode, True)) for mode in modes}
    off = load(folder, full, False)
    found["flag off"] = answers(off)
    found["logits"] = logits(off)
    found["sent"] = sent_for_a_token(load(folder, plain, True))
    found["plain sums"] = with_plain_sums(folder, full)
    found["leaves by rank"] = with_leaves_by_rank(folder, plain)
    found["refused by"] = [refused_by(0), refused_by(1)]
    found["read by"] = from_first(tp.rank)
    everyone = [None] * tp.world
    torch.distributed.all_gather_object(everyone, json.dumps(found))
    found["alike"] = len(set(everyone)) == 1
    if tp.rank == 0:
        write_json(folder / f"{tp.world}.json", found)


def command(folder, *argv):
    """generate.py with those flags; {rank} stands for its number."""
    own = [word.replace("{rank}", str(tp.rank)) for word in argv]
    generate.command(lambda: generate.main(own))


def become(rank, world, port, folder, function, args):
    """Turn this process into a rank that runs a function; its streams are files."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    tp.rank, tp.world = rank, world
    for stream, name in enumerate((f"stdin{rank}", f"out{rank}", f"err{rank}")):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_TRUNC
        file = os.open(folder / name, flags | os.O_CREAT)
        os.dup2(file, stream)
    function(folder, *args)
    sys.stdout.flush()
    os._exit(0)


def serve(folder):
    """For each line of standard input, [number of ranks, function, arguments], fork so many, and
    print their exit statuses. What every rank would probe is probed here, once."""
    for B, G, dtype in itertools.product((1, 2), (1, 2, 3), (torch.bfloat16, torch.float32)):
        kernels.exact_spans(B, G, CONFIG["head_dim"], 2, dtype, 1)
    for line in sys.stdin:
        world, name, args = json.loads(line)
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        pids = []
        for rank in range(world):
            pids.append(os.fork())
            if pids[-1] == 0:
                become(rank, world, port, folder, {"work": work, "command": command}[name], args)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]))


# ---- the tests


class Ranks:
    """The script that forks ranks."""

    def __init__(self, folder):
        self.folder = folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__, folder]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)

    def run(self, world, name, *args, given=()):
        """Exit statuses, and what each rank has printed on both streams; `given` is what each
        finds on standard input."""
        for rank in range(world):
            text = given[rank] if given else ""
            (self.folder / f"stdin{rank}").write_text(text)
        self.process.stdin.write(json.dumps([world, name, list(map(str, args))]) + "\n")
        self.process.stdin.flush()
        statuses = json.loads(self.process.stdout.readline())
        files = [(self.folder / f"out{rank}", self.folder / f"err{rank}") for rank in range(world)]
        return statuses, [(out.read_text(), err.read_text()) for out, err in files]

    def generate(self, *flags, world=2, given=()):
        """What the first of the ranks prints, which is all that is printed."""
        statuses, printed = self.run(world, "command", *flags, given=given)
        assert statuses == [0] * world, printed
        assert {out for out, _ in printed[1:]} == {""}
        return lines(printed[0][0])


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*argv, **options):
    """Two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*command, *map(str, argv)], cwd=ROOT, env=environment(), **options)


def lines(text):
    """Completions by id and sample, without the stats line."""
    entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    found = [x for x in entries if "stats" not in x]
    return {(x["id"], x["sample"]): (x["tokens"], x["logprobs"]) for x in found}


def write_checkpoint(directory, **changes):
    """A checkpoint whose words are w0 to w383."""
    from safetensors.torch import save_file

    directory.mkdir()
    write_json(directory / "config.json", CONFIG | changes)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
    write_json(directory / "tokenizer.json", tokenizer)
    template = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}w9"
    write_json(directory / "tokenizer_config.json", {"chat_template": template})
    config = read_config(directory / "config.json")
    empty = model_module.Transformer(config, FAST, torch.device("cpu"), torch.bfloat16)
    shapes = tensor_shapes(empty)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)
        tensors[name] = tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configs for random weights, a checkpoint, one with a tied head and one that is quantized."""
    folder = tmp_path_factory.mktemp("tp")
    for name, shape in SHAPES.items():
        write_json(folder / f"{name}.json", shape)
    write_checkpoint(folder / "m")
    write_checkpoint(folder / "tied", tie_word_embeddings=True, num_hidden_layers=1)
    quantized.write(folder / "m", str(folder / "stored"), "int4", 32)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    ranks = Ranks(folder)
    yield ranks
    ranks.process.stdin.close()
    ranks.process.wait(timeout=60)


@pytest.fixture(scope="module")
def one(folder):
    """What one process answers."""
    torch.set_num_threads(1)
    found = {str(mode): alone(load(folder, mode, True)) for mode in EVERY_MODE}
    for shape in ("8 KV heads", "3 KV heads"):
        off = load(folder, (shape, "fp32"), False)
        found[shape] = {"flag off": alone(off), "logits": logits(off)}
        for kind in ("bf16", "fp32"):
            found[shape][kind] = logits(load(folder, (shape, kind), True))
    return found


MANY = [pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 8)]


@pytest.fixture(scope="module", params=[3, *MANY])
def several(request, folder, ranks):
    """(what that many processes answer, how many)."""
    statuses, printed = ranks.run(request.param, "work")
    assert statuses == [0] * request.param, printed
    return json.loads((folder / f"{request.param}.json").read_text()), request.param


def test_ranks_change_no_bits(one, several):
    found, n = several
    for mode in map(str, MODES[n]):
        want = one[mode]
        assert len({str(answer) for answer in want.values()}) == 3
        for kind, other in found[mode].items():
            assert other == want, (mode, kind)


def test_ranks_without_the_flag_have_other_bits(one, several):
    """The negative control, with the tokens that it leaves alike in fp32."""
    found, n = several
    shape, _ = MODES[n][0]
    want = one[shape]["flag off"]
    assert found["flag off"]["alone"] != want
    for kind, other in found["flag off"].items():
        assert {i: x[0] for i, x in other.items()} == {i: x[0] for i, x in want.items()}, kind


def test_plain_sums_or_other_leaves_have_other_bits(one, several):
    """Two numbers have only one sum, and one leaf a rank is the plan where there are eight ranks,
    or three. Leaves in bf16 would hide the order of a sum in fp32."""
    found, n = several
    shape, _ = MODES[n][0]
    assert (found["plain sums"] != one[shape]["fp32"]) == (n > 2)
    assert (found["leaves by rank"] != one[shape]["bf16"]) == (n in (2, 4))


def test_logits_are_those_of_one(one, several):
    """Biases are not zero, so that each is seen to be added once."""
    found, n = several
    shape, _ = MODES[n][0]
    want = torch.tensor(one[shape]["logits"])
    torch.testing.assert_close(torch.tensor(found["logits"]), want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.1


def test_the_tree_ran(several):
    """What a token sends: the sums of two layers a block in fp32 and the logits, and nothing is
    all-reduced."""
    found, n = several
    assert {name for name, _ in found["sent"]} <= {"all_gather_single", "all_gather_into_tensor"}
    numbers = [DIM] * (2 * LAYERS) + [VOCAB // n]
    assert [nbytes for _, nbytes in found["sent"]] == [4 * (n - 1) * x for x in numbers]


def test_all_ranks_find_the_same(several):
    found, _ = several
    assert found["alike"]
    assert found["refused by"] == ["by 0", "by 1"]
    assert found["read by"] == 0


# ---- which degrees there are


@pytest.mark.parametrize(
    ("changes", "fast", "exact"),
    [
        ({}, [1, 2, 4, 8, 16], [1, 2, 4, 8]),
        ({"num_key_value_heads": 2}, [1, 2, 4, 8, 16], [1, 2]),  # shared heads have no own leaves
        ({"group_size": 128, "head_dim": 64}, [1, 2, 4], [1, 2, 4]),
        ({"vocab_size": 385}, [1], [1]),
        ({"intermediate_size": 192}, [1, 2, 4, 8, 16], [1, 2]),  # leaves of at least 32
        (SHAPES["3 KV heads"], [1, 3, 6], [1, 3]),
    ],
)
def test_degrees(tmp_path, changes, fast, exact):
    changes = dict(changes)
    group_size = changes.pop("group_size", None)
    write_json(tmp_path / "config.json", CONFIG | changes)
    mode = "int4" if group_size else None
    config = read_config(tmp_path / "config.json", mode, group_size or 32)
    assert tp.degrees(config, False) == fast
    assert tp.degrees(config, True) == exact


def test_a_rank_takes_whole_units(monkeypatch):
    rows = torch.arange(12)[:, None].expand(-1, 4)
    for rank, want in enumerate([range(6), range(6), range(6, 12), range(6, 12)]):
        monkeypatch.setattr(tp, "rank", rank)
        # Two ranks share each of two heads.
        assert tp.part(rows, 0, 4, unit=6)[:, 0].tolist() == list(want)
        assert tp.part(rows, 0, 4)[:, 0].tolist() == [3 * rank, 3 * rank + 1, 3 * rank + 2]
        assert tp.part(rows, 1, 4).shape == (12, 1)
        assert tp.part(rows[:, 0], 1, 4).shape == (12,)
        assert tp.part(rows, 0, 1).shape == (12, 4)  # a model that is whole at every rank


# ---- the command line


def printed_by_one(capsys, *flags):
    """The lines of one process."""
    generate.main(["--device", "cpu", *map(str, flags)])
    return lines(capsys.readouterr().out)


def test_shared_kv_heads(folder, ranks, capsys):
    """More ranks than KV heads are possible without the flag."""
    flags = ["--random_weights", folder / "1 KV head.json", "--prompt", "20", "--json"]
    flags += ["--max_new_tokens", "6", "--precision", "fp32", "--temperature", "0"]
    ((tokens, logprobs),) = ranks.generate(*flags).values()
    ((want, exact),) = printed_by_one(capsys, *flags).values()
    assert tokens == want
    assert max(abs(a - b) for a, b in zip(logprobs, exact, strict=True)) < 1e-4


def test_torchrun_refuses_in_one_line(folder):
    """With the flag, each rank needs KV heads of its own; both end with status 2, one speaks."""
    flags = ["--random_weights", folder / "1 KV head.json", "--prompt", "20", "--deterministic"]
    process = torchrun("generate.py", *flags)
    out, errors = process.communicate(timeout=300)
    assert process.returncode
    assert out == ""
    said = re.findall("^error: .*", errors, re.M)
    path = folder / "1 KV head.json"
    assert said == [f"error: {path}: 2 processes cannot share this model, choose from 1"]
    assert errors.count("exitcode  : 2") == 2


def test_one_rank_that_fails_alone(folder, ranks):
    """A node without the checkpoint: nobody waits for it, and the first rank says why."""
    (folder / "node0").symlink_to(folder / "m")
    flags = ["--checkpoint_path", folder / "node{rank}", "--prompt", "w1"]
    statuses, printed = ranks.run(2, "command", *flags)
    assert statuses == [2, 2]
    (out, error), silent = printed
    assert (out, *silent) == ("", "", "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "node1" in error


def test_a_rank_that_is_killed_ends_all(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--random_weights", folder / "8 KV heads.json", "--prompt", "5", "--output", out]
    flags += ["--num_samples", "500", "--max_new_tokens", "40", "--json"]
    process = torchrun("generate.py", *flags, stdout=subprocess.DEVNULL)
    while not out.exists() or out.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.2)
    ranks = [pid for pid in children(process) if b"generate.py" in proc(pid, "cmdline")]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert len(re.findall("^error: .*", errors, re.M)) <= 1
    assert "[rank0]" not in errors
    written = out.read_text()
    assert written.endswith("\n")
    assert 3 <= len(lines(written)) < 500


def children(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return list(map(int, listed.stdout.split()))


def proc(pid, name):
    return Path(f"/proc/{pid}/{name}").read_bytes()


def test_only_the_first_reads_and_writes(folder, ranks, capsys, tmp_path):
    """Standard input of one rank, --output by one, and one that prints."""
    out = tmp_path / "out.jsonl"
    flags = ["--checkpoint_path", folder / "m", "--deterministic", "--json", "--batch_size", "2"]
    flags += ["--max_new_tokens", "6", "--ignore_eos"]
    asked = ["--prompts_file", "-", "--output", out]
    given = "w1 w2 w3\nw4 w5\nw6\n"
    found = ranks.generate(*flags, *asked, given=(given, "w7\n"))
    path = tmp_path / "prompts.txt"
    path.write_text(given)
    assert len(found) == 3
    assert found == lines(out.read_text())
    assert found == printed_by_one(capsys, *flags, "--prompts_file", path)


DRAFTS = {
    "itself in int4": ["--quantize", "int8", "--draft_quantize", "int4"],
    "a whole model": ["--draft_checkpoint_path", "tied", "--speculate_k", "3"],
}


@pytest.mark.parametrize("more", DRAFTS.values(), ids=DRAFTS)
def test_drafts_in_a_chat_and_their_scores(folder, ranks, capsys, tmp_path, more):
    """Two ranks, a batch of two and drafts, against one process with none of them; then both score
    what was written."""
    out = tmp_path / "out.jsonl"
    more = [folder / word if word == "tied" else word for word in more]
    flags = ["--checkpoint_path", folder / "m", "--deterministic", "--json", "--ignore_eos"]
    flags += ["--max_new_tokens", "9"]
    asked = ["--chat", "--prompt", "w1 w2 w1 w2", "--prompt", "w3", "--num_samples", "2"]
    plain = [*flags, *(more[:2] if "--quantize" in more else [])]
    found = ranks.generate(*flags, *asked, *more, "--batch_size", "2", "--output", out)
    want = printed_by_one(capsys, *plain, *asked)
    assert len(want) == 4
    assert found == want == lines(out.read_text())
    assert printed_by_one(capsys, *plain, *asked, "--seed", "6") != want
    assert ranks.generate(*plain, "--score", out) == want
    assert printed_by_one(capsys, *plain, "--score", out) == want


@pytest.mark.slow
@needs_compiler
def test_torchrun_compiled(folder, capsys):
    """Two ranks that compile, quantized and in a batch, against one process that does not."""
    flags = ["--checkpoint_path", folder / "tied", "--deterministic", "--json", "--ignore_eos"]
    flags += ["--quantize", "int8", "--max_new_tokens", "5", "--chat", "--prompt", "w1 w2"]
    flags += ["--prompt", "w3"]
    process = torchrun("generate.py", *flags, "--compile", "--batch_size", "2")
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    found = lines(out)
    assert len(found) == 2
    assert found == printed_by_one(capsys, *flags)


@pytest.mark.slow
def test_two_nodes(folder, capsys):
    """Two agents that meet on loopback: the lines of one process, printed by one of them."""
    flags = ["--checkpoint_path", folder / "m", "--deterministic", "--json", "--prompt", "w1 w2"]
    flags += ["--max_new_tokens", "6", "--device", "cpu", "--ignore_eos"]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=a"]
    meet += ["--rdzv_endpoint=localhost:29713"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "generate.py"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"cwd": ROOT, "env": environment()}
    nodes = [subprocess.Popen([*command, *map(str, flags)], **options) for _ in "ab"]
    printed = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    silent, found = sorted((lines(out) for out, _ in printed), key=len)
    assert silent == {}
    assert found == printed_by_one(capsys, *flags)


@pytest.mark.slow
def test_a_rank_holds_its_part(tmp_path):
    """Of a gigabyte of weights on disk, loading and running, by the anonymous memory of each
    process."""
    hidden, vocab = 2048, VOCAB * 40
    changes = {"hidden_size": hidden, "intermediate_size": 8192, "num_hidden_layers": 9}
    changes |= {"num_attention_heads": 32, "attention_bias": False, "mlp_bias": False}
    write_checkpoint(tmp_path / "m", vocab_size=vocab, **changes)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size > 1e9
    embedding = 2 * vocab * hidden  # stays in the file, one row a token
    for flag in ([], ["--deterministic"]):
        flags = ["--checkpoint_path", tmp_path / "m", "--prompt", "64", "--max_new_tokens", "30"]
        process = torchrun("generate.py", *flags, "--ignore_eos", *flag, stdout=subprocess.DEVNULL)
        peaks = {}
        while process.poll() is None:
            for pid in children(process):
                note_memory(pid, peaks)
            time.sleep(0.02)
        assert process.returncode == 0
        print(flag, [f"{peak / 1e6:.0f} MB" for peak in peaks.values()], f"of {size / 1e6:.0f} MB")
        # At the end the first takes memory to measure how fast that is read. The flag's probes take
        # some at first.
        more = 300e6 + (250e6 if flag else 0)
        assert len(peaks) == 2
        assert peaks["1"] < 1.2 * (size - embedding) / 2 + more


def note_memory(pid, peaks):
    """Keep the most anonymous memory that a rank was seen with, by its number."""
    try:
        rank = proc(pid, "environ").decode().split("\0RANK=")[1].split("\0")[0]
        kilobytes = int(proc(pid, "status").decode().split("RssAnon:")[1].split()[0])
    except (OSError, IndexError):  # it has ended, or is no rank
        return
    peaks[rank] = max(peaks.get(rank, 0), kilobytes << 10)
