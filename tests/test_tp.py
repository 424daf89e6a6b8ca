"""Tensor parallelism with gloo: several processes against one, bit for bit with --deterministic. Each number of
processes is started once, by `several`, and answers for all that its tests ask; this file is also what they run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import generate  # noqa: E402
import model as model_module  # noqa: E402
import tp  # noqa: E402
from generate import Engine, Request, Tokenizer  # noqa: E402
from tests.contract import complete  # noqa: E402

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "vocab_size": 384}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
CONFIG |= {"max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False}
CONFIG |= {"attention_bias": True, "mlp_bias": True}
MODES = {"bf16": [], "fp32": ["--precision", "fp32"], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4"]}
MODES |= {"stored": [], "tied": []}  # an int4 directory, a tied head
FEW = "int8, 4 KV heads"  # which four ranks share with one leaf each, eight not at all
MODES |= {FEW: ["--quantize", "int8"]}
SHAPES = {FEW: CONFIG | {"num_key_value_heads": 4}}
EXPERTS = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6, "num_experts_per_tok": 2}
SHAPES |= dict.fromkeys(("mixture", "mixture, int4"), CONFIG | EXPERTS)
MODES |= {"mixture": [], "mixture, int4": ["--quantize", "int4"]}
HEADS, LAYERS, DIM, VOCAB = 16, 2, 256, 384


def requests():
    """Three prompts of different lengths and contents, greedy and sampled."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCAB, (n,), generator=draw).tolist() for n in (3, 70, 9)]
    options = [{"temperature": 0.0}, {"seed": 7}, {"top_k": 50, "top_p": 0.9}]
    return [Request(i, "", row, max_new_tokens=8, **options[i]) for i, row in enumerate(ids)]


def flags_of(folder, mode, exact):
    """Of generate.py, for random weights, for a quantized directory or for a tied head."""
    flags = [] if mode in ("stored", "tied") else MODES[mode]
    name = {"stored": "m-int4-g32", "tied": "tied"}.get(mode)
    shape = folder / f"{mode if mode in SHAPES else 'config'}.json"
    path = ["--checkpoint_path", folder / name] if name else ["--random_weights", shape]
    return [*map(str, [*flags, *path]), "--device", "cpu", *["--deterministic"] * exact]


def answers(model):
    """Of one model, alone, in a batch, in chunks and beside drafts that are mostly wrong."""
    asked = requests()
    found = {"alone": complete(model, asked, length=96), "batch": complete(model, asked, 8, 96)}
    found["chunks"] = complete(model, asked, 2, 96, chunk=7)
    found["drafts"] = complete(model, asked, 2, 96, propose=generate.prompt_lookup, k=3)
    return {kind: dict(pairs) for kind, pairs in found.items()}


@torch.inference_mode()
def logits(model):
    """fp32 of a prompt, [T, V], after its first token."""
    engine = Engine(model, Tokenizer(None), 1, 96)
    return engine.feed(requests()[1].prompt_ids, 0, slot=0)[0]


def load(folder, mode, exact, ranks=None):
    args = generate.parse_args(flags_of(folder, mode, exact))
    return generate.load(args, ranks or tp.world)[0]


def exchanges_of_a_token(model):
    """[(name of the collective, bytes of what this rank gives to it)]."""
    engine, exchange, seen = Engine(model, Tokenizer(None), 1, 96), tp.exchange, []

    def watched(collective, *args):
        seen.append((collective.__name__, args[-1].nbytes))
        exchange(collective, *args)

    tp.exchange = watched
    with torch.inference_mode():
        engine.feed([1], 0, slot=0)
    tp.exchange = exchange
    return seen


def work(folder: Path):
    """What each process does: all answers, and what the negative control and the counters say."""
    found = {}
    for mode in [mode for mode in MODES if mode != FEW or tp.world <= 4]:
        for exact in (True, False):
            found[f"{mode} {exact}"] = answers(load(folder, mode, exact))
    found["logits"] = logits(load(folder, "fp32", False)).tolist()
    exact = load(folder, "bf16", True)
    found["sent"] = [(name, nbytes * (tp.world - 1)) for name, nbytes in exchanges_of_a_token(exact)]
    add_up = tp.add_up
    tp.add_up = lambda y, bias, exact: add_up(y, bias, False)  # the rule broken
    found["plain all-reduce"] = answers(load(folder, "fp32", True))
    tp.add_up, leaf_count = add_up, model_module.leaf_count
    model_module.leaf_count = lambda *_: tp.world
    found["leaves by rank"] = answers(load(folder, "bf16", True))
    model_module.leaf_count = leaf_count
    complain = lambda who: lambda: generate.refuse(f"by {tp.rank}") if tp.rank == who else None
    for who, alone in ((0, True), (1, False)):
        try:
            tp.agreed(complain(who), alone)()
        except generate.InputError as error:
            found[f"refused by {who}"] = str(error)
    found["read by"] = tp.agreed(lambda: tp.rank, alone=True)()
    everyone = [None] * tp.world
    torch.distributed.all_gather_object(everyone, json.dumps(found))
    found["alike"] = len(set(everyone)) == 1
    if not tp.rank:
        (folder / f"{tp.world}.json").write_text(json.dumps(found))


def torchrun(*argv, n=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *map(str, argv)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def lines(text):
    """Completions by id and sample, without the stats line."""
    entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {(x["id"], x["sample"]): (x["tokens"], x["logprobs"]) for x in entries if "stats" not in x}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config for random weights, a checkpoint with a tied head and one that is quantized."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tp")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, shape in SHAPES.items():
        (folder / f"{name}.json").write_text(json.dumps(shape))
    for name in ("m", "tied"):
        (folder / name).mkdir()
        config = CONFIG | {"tie_word_embeddings": name == "tied"}
        (folder / name / "config.json").write_text(json.dumps(config))
        words = {f"w{i}": i for i in range(VOCAB)}
        tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
        tokenizer |= {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        template = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}w9"
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        shapes = model_module.Transformer(
            model_module.ModelConfig.from_file(folder / name / "config.json"),
            generate.FAST,
            torch.device("cpu"),
            torch.bfloat16,
        ).takers
        draw = torch.Generator().manual_seed(1)
        shapes = {tensor: shape for layer in shapes for tensor, shape in layer.shapes.items()}
        tensors = {n: torch.randn(s, generator=draw) * 0.1 + ("norm" in n) for n, s in shapes.items()}
        save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / name / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "quantize.py", "--mode", "int4", "--checkpoint_path", folder / "m"], cwd=ROOT, check=False
    )
    assert not done.returncode
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """What one process answers."""
    torch.set_num_threads(1)
    found = {f"{mode} {exact}": answers(load(folder, mode, exact)) for mode in MODES for exact in (True, False)}
    return json.loads(json.dumps(found | {"logits": logits(load(folder, "fp32", False)).tolist()}))


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def several(request, folder):
    """(what that many processes answer, how many)."""
    process = torchrun(__file__, folder, n=request.param)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads((folder / f"{request.param}.json").read_text()), request.param


@pytest.mark.parametrize("mode", MODES)
def test_ranks_change_no_bits(one, several, mode):
    several, n = several
    if mode == FEW and n > 4:
        pytest.skip("refused")
    want = one[f"{mode} True"]["alone"]
    for kind, found in several[f"{mode} True"].items():
        assert found == want, kind
    assert len({str(answer) for answer in want.values()}) == 3


def test_ranks_without_the_flag_have_other_bits(one, several):
    """The negative control, with the tokens that it leaves alike in fp32."""
    several, _ = several
    assert several["fp32 False"]["alone"] != one["fp32 False"]["alone"]
    for kind, found in several["fp32 False"].items():
        assert {i: tokens for i, (tokens, _) in found.items()} == {
            i: tokens for i, (tokens, _) in one["fp32 False"]["alone"].items()
        }, kind


def test_a_plain_sum_or_other_leaves_have_other_bits(one, several):
    """Two numbers have only one sum, and one leaf a rank is the plan where there are eight ranks. Leaves in bf16 would
    hide the order of a sum in fp32."""
    found, n = several
    differs = lambda broken, mode: found[broken]["alone"] != one[f"{mode} True"]["alone"]
    assert differs("plain all-reduce", "fp32") == (n > 2)
    assert differs("leaves by rank", "bf16") == (n < 8)


def test_logits_are_those_of_one(one, several):
    """Biases are not zero, so that each is seen to be added once."""
    found, want = torch.tensor(several[0]["logits"]), torch.tensor(one["logits"])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.1


def test_the_tree_ran(several):
    """What a token sends: the sums of two layers a block in fp32 and the logits, and nothing is all-reduced."""
    found, n = several
    assert {name for name, _ in found["sent"]} <= {"all_gather_single", "all_gather_into_tensor"}
    assert [nbytes for _, nbytes in found["sent"]] == [4 * (n - 1) * x for x in [DIM] * (2 * LAYERS) + [VOCAB // n]]


def test_all_ranks_find_the_same(several):
    assert several[0]["alike"]


def test_an_error_of_one_is_raised_by_all(several):
    found, _ = several
    assert (found["refused by 0"], found["refused by 1"], found["read by"]) == ("by 0", "by 1", 0)


# Which degrees there are.


def config(**changes):
    names = {"n_heads": 16, "n_kv_heads": 8, "head_dim": 64, "ffn_dim": 512, "vocab_size": 384, "mode": None}
    return type("Config", (), names | {"group_size": 32} | changes)


@pytest.mark.parametrize(
    ("changes", "fast", "exact"),
    [
        ({}, [1, 2, 4, 8, 16], [1, 2, 4, 8]),
        ({"n_heads": 9, "n_kv_heads": 3, "ffn_dim": 1536, "vocab_size": 49152}, [1, 3], [1, 3]),
        ({"n_kv_heads": 2}, [1, 2, 4, 8, 16], [1, 2]),  # shared KV heads have no leaves of their own
        ({"mode": "int4"}, [1, 2, 4, 8, 16], [1, 2, 4, 8]),
        ({"mode": "int4", "group_size": 128}, [1, 2, 4], [1, 2, 4]),
        ({"vocab_size": 385}, [1], [1]),
        ({"ffn_dim": 192}, [1, 2, 4, 8, 16], [1, 2]),  # leaves of at least 32
    ],
)
def test_degrees(changes, fast, exact):
    assert tp.degrees(config(**changes), False) == fast
    assert tp.degrees(config(**changes), True) == exact


def test_a_rank_takes_whole_units(monkeypatch):
    rows = torch.arange(12)[:, None].expand(-1, 4)
    for rank, want in enumerate([range(6), range(6), range(6, 12), range(6, 12)]):
        monkeypatch.setattr(tp, "rank", rank)
        assert tp.part(rows, 0, 4, unit=6)[:, 0].tolist() == list(want)  # two ranks share each of two heads
        assert tp.part(rows, 0, 4)[:, 0].tolist() == [3 * rank, 3 * rank + 1, 3 * rank + 2]
        assert tp.part(rows, 1, 4).shape == (12, 1) and tp.part(rows[:, 0], 1, 4).shape == (12,)
        assert tp.part(rows, 0, 1).shape == (12, 4)  # a model that is whole at every rank


# The command line.


def test_shared_kv_heads_and_bad_input(folder, tmp_path):
    """More ranks than KV heads are possible without the flag, and refused with it in one line by all."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 1}))
    asked = ["--random_weights", tmp_path / "config.json", "--prompt", "20", "--max_new_tokens", "6", "--json"]
    asked += ["--precision", "fp32", "--temperature", "0"]
    runs = [torchrun("generate.py", *asked, *more) for more in ([], ["--deterministic"])]
    alone = subprocess.run([sys.executable, "generate.py", *map(str, asked)], cwd=ROOT, capture_output=True, text=True)
    (out, errors), (none, refused) = (run.communicate(timeout=300) for run in runs)
    assert runs[0].returncode == 0, errors
    (tokens, logprobs), (want, exact) = lines(out)[0, 0], lines(alone.stdout)[0, 0]
    assert tokens == want and max(abs(a - b) for a, b in zip(logprobs, exact, strict=True)) < 1e-4
    assert runs[1].returncode and not none
    said = re.findall("^error: .*", refused, re.M)
    assert said == ["error: 2 processes cannot share this model, choose from 1"]
    assert refused.count("exitcode  : 2") == 2


SPECULATION = {
    "itself in int4, compiled": ["--draft_quantize", "int4", "--quantize", "int8", "--compile"],
    "a whole model": ["--draft_checkpoint_path", "tied", "--speculate_k", "3"],
}


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("more", SPECULATION.values(), ids=SPECULATION)
def test_drafts_in_a_chat_and_their_scores(folder, tmp_path, more):
    """Two ranks, a batch of two and drafts, against one process with none of them, that does not compile; then both
    score what was written."""
    out, more = tmp_path / "out.jsonl", [folder / x if x == "tied" else x for x in more]
    flags = ["--checkpoint_path", folder / "m", "--deterministic", "--json", "--max_new_tokens", "9", "--ignore_eos"]
    asked = ["--chat", "--prompt", "w1 w2 w1 w2", "--prompt", "w3", "--num_samples", "2", "--seed", "5"]
    plain = [x for x in ("--quantize", "int8") if x in more]
    cut = torchrun("generate.py", *flags, *asked, *more, "--batch_size", "2", "--output", out)
    found, errors = cut.communicate(timeout=300)
    assert cut.returncode == 0, errors
    command = [sys.executable, "generate.py", *map(str, flags + plain)]
    one = lambda *more: lines(subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True).stdout)
    want = one(*asked)
    assert len(want) == 4 and lines(found) == want == lines(out.read_text())
    assert one(*asked, "--seed", "6") != want
    scored, errors = torchrun("generate.py", *flags, *plain, "--score", out).communicate(timeout=300)
    assert lines(scored) == want == one("--score", str(out)), errors


def test_two_nodes_and_a_conversation_of_files(folder, tmp_path):
    """Two agents that meet on loopback, one of which is given the prompts: the lines of one process."""
    flags = [
        "--checkpoint_path",
        folder / "m",
        "--deterministic",
        "--json",
        "--batch_size",
        "2",
        "--max_new_tokens",
        "6",
    ]
    flags += ["--prompts_file", "-", "--device", "cpu", "--output", tmp_path / "out.jsonl", "--ignore_eos"]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:29713", "--rdzv_id=a"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "generate.py", *map(str, flags)]
    options = {
        "cwd": ROOT,
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    nodes = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options) for _ in "ab"]
    given = "w1 w2 w3\nw4 w5\nw6\n"
    outs = [node.communicate(given, timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    alone = subprocess.run(
        [sys.executable, "generate.py", *map(str, flags[:-3])], cwd=ROOT, input=given, capture_output=True, text=True
    )
    printed = [lines(out) for out, _ in outs]
    assert sorted(map(len, printed)) == [0, 3]  # only the first rank prints and writes
    assert max(printed, key=len) == lines(alone.stdout) == lines((tmp_path / "out.jsonl").read_text())


def test_a_rank_that_dies_ends_all(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--random_weights", folder / "config.json", "--prompt", "5", "--num_samples", "500", "--output", out]
    process = torchrun("generate.py", *flags, "--max_new_tokens", "40", "--json", stdout=subprocess.DEVNULL)
    while not out.exists() or out.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = [int(x) for x in children if b"generate.py" in Path(f"/proc/{x}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert len(re.findall("^error: .*", errors, re.M)) <= 1 and "[rank0]" not in errors
    written = out.read_text()
    assert written.endswith("\n") and 3 <= len(lines(written)) < 500


@pytest.mark.slow
def test_a_rank_holds_its_part(tmp_path):
    """Of a gigabyte of weights on disk, loading and running, by the anonymous memory of each process."""
    shape = CONFIG | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 9, "vocab_size": 16384}
    shape |= {"num_attention_heads": 32, "attention_bias": False, "mlp_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    code = """import sys; sys.path.insert(0, {root!r})
import generate, torch
from safetensors.torch import save_file
from pathlib import Path
model = generate.Transformer(generate.ModelConfig.from_file(Path("config.json")), generate.FAST, torch.device("cpu"),
                             torch.bfloat16)
shapes = {{name: shape for layer in model.takers for name, shape in layer.shapes.items()}}
save_file({{name: (torch.randn(shape) * 0.02 + ("norm" in name)).bfloat16() for name, shape in shapes.items()}},
          "model.safetensors")"""
    subprocess.run([sys.executable, "-c", code.format(root=str(ROOT))], cwd=tmp_path, check=True)
    (tmp_path / "tokenizer.json").write_bytes((download_tokenizer()).read_bytes())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 1e9
    embedding = 2 * 16384 * 2048  # stays in the file, one row a token
    for n, flag in ((2, []), (4, []), (2, ["--deterministic"])):
        flags = ["--checkpoint_path", tmp_path, "--prompt", "64", "--max_new_tokens", "30", "--ignore_eos", *flag]
        process, peaks = torchrun("generate.py", *flags, n=n, stdout=subprocess.DEVNULL), {}
        while process.poll() is None:
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            for pid in children:
                try:
                    status, environ = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "environ"))
                    rank = environ.split("\0RANK=")[1].split("\0")[0]
                    peaks[rank] = max(peaks.get(rank, 0), int(status.split("RssAnon:")[1].split()[0]) << 10)
                except (OSError, IndexError):
                    continue
            time.sleep(0.02)
        assert process.returncode == 0
        print(n, flag, [f"{peak / 1e6:.0f} MB" for peak in peaks.values()], f"of {size / 1e6:.0f} MB")
        # At the end the first takes 256 MB to measure how fast memory is read. The flag's probes take some at first.
        more = 300e6 + (250e6 if flag else 0)
        assert len(peaks) == n and max(peaks[str(rank)] for rank in range(1, n)) < 1.2 * (size - embedding) / n + more


def download_tokenizer():
    from scripts import download

    download.fetch()
    return download.DEFAULT / "tokenizer.json"


if __name__ == "__main__":
    tp.start()
    work(Path(sys.argv[1]))
    os._exit(0)
