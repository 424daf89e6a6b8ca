"""scripts/eval.py: perplexity against Engine.score, the adapter of lm_eval, bad input."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers import SPECIAL, train_bpe, write_checkpoint, write_json

import generate
from scripts import cli
from scripts import eval as evaluation
from scripts.checkpoint import Refusal
from scripts.requests import Request

ROOT = Path(generate.__file__).parent
SCRIPT = str(ROOT / "scripts" / "eval.py")
TEXT = """The quick brown fox jumps over the lazy dog, and the dog, which had seen worse, went back
to sleep. """
TEXT = TEXT.replace("\n", " ") * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(directory):
    return make_engine(directory)


def make_engine(directory, prefill_chunk=0):
    argv = ["--checkpoint_path", str(directory), "--precision", "fp32", "--deterministic"]
    model, tokenizer = generate.load(cli.parse_args(argv))
    context = model.config.max_position_embeddings
    return generate.Engine(model, tokenizer, 1, context, prefill_chunk)


def test_one_window_is_what_score_says(engine):
    ids = engine.tokenizer.encode(TEXT)
    wanted = math.fsum(engine.score(ids[:1], ids[1:]))
    assert evaluation.log_likelihood(engine, ids, len(ids), 1) == wanted
    assert evaluation.log_likelihood(engine, ids[::-1], len(ids), 1) != wanted


@pytest.mark.parametrize("window, stride", [(8, 1), (8, 7), (50, 20)])
def test_windows_score_each_token_once(engine, window, stride):
    """Each after as many tokens as its window has room for: written out, a token at a time."""
    ids = engine.tokenizer.encode(TEXT)[:70]
    total = 0.0
    end = window
    starts = set()
    for i in range(1, len(ids)):
        if i >= end:
            end = min(end + stride, len(ids))
        start = max(min(end, len(ids)) - window, 0)
        starts.add(start)
        total += engine.score(ids[start:i], ids[i : i + 1])[0]
    found = evaluation.log_likelihood(engine, ids, window, stride)
    assert found == pytest.approx(total, abs=1e-9)
    assert len(starts) > 1, "a window that never moved would show nothing"
    whole = evaluation.log_likelihood(engine, ids, len(ids), 1)
    assert whole != pytest.approx(total, abs=1e-6)


def test_likeliest_is_greedy(engine, directory):
    """As long as no token is another one, in whatever pieces they are scored."""
    prompt = engine.tokenizer.encode("The quick")
    options = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    *_, (completion, _) = engine.generate([Request(0, "", prompt, **options)])
    tokens = completion.tokens
    wanted = engine.score(prompt, tokens)
    in_pieces = make_engine(directory, prefill_chunk=7)
    assert wanted == completion.logprobs
    for each in (engine, in_pieces):
        logprobs, likeliest = evaluation.score(each, prompt + tokens, len(prompt))
        assert logprobs == wanted and likeliest
        for i in (0, 9, 19):
            others = tokens[:i] + [(tokens[i] + 1) % 300] + tokens[i + 1 :]
            logprobs, likeliest = evaluation.score(each, prompt + others, len(prompt))
            assert logprobs != wanted and not likeliest


# ---- lm_eval


@pytest.fixture
def lm_eval(monkeypatch):
    """Where it is not installed, the class that the adapter needs of it."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError:
        model = ModuleType("lm_eval.api.model")
        model.LM = type("LM", (), {})
        monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
        monkeypatch.setitem(sys.modules, "lm_eval.api", ModuleType("lm_eval.api"))
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", model)


def request(*args):
    """What lm_eval hands over."""
    return SimpleNamespace(args=args)


def test_likelihoods_are_those_of_score(engine, lm_eval):
    """A space before a text belongs to it, whichever of the two has it."""
    pairs = [("The quick brown", " fox jumps"), ("The quick brown ", "fox"), ("", "The dog")]
    bos = 0  # prompts get none
    wanted = []
    for before, text in pairs:
        known = engine.tokenizer.encode(before.rstrip())
        ids = engine.tokenizer.encode(before + text)
        if not known:
            known = [bos]
            ids = [bos, *ids]
        wanted.append(math.fsum(engine.score(ids[: len(known)], ids[len(known) :])))
    requests = [request(*pair) for pair in pairs]
    found = evaluation.adapter(engine).loglikelihood(requests)
    assert [total for total, _ in found] == wanted


def test_a_text_past_the_context(engine, lm_eval):
    """What is scored is its end, after as much as there is room for."""
    context = engine.model.config.max_position_embeddings
    before, text = "The lazy dog. " * 100, "jumps over the fox"
    ids = engine.tokenizer.encode(before + text)
    known = engine.tokenizer.encode(before.rstrip())
    assert len(known) > context
    new = len(ids) - len(known)
    wanted = math.fsum(engine.score(ids[-context:-new], ids[-new:]))
    ((found, _),) = evaluation.adapter(engine).loglikelihood([request(before, text)])
    assert found == wanted


# Whether prompts begin with BOS, what tokenizer_config.json says, and the first token.
FIRST = [
    (False, {"bos_token": "<|bos|>", "eos_token": "<|end|>"}, "<|bos|>"),
    (True, {"bos_token": "<|bos|>", "eos_token": "<|end|>"}, "<|bos|>"),
    (False, {"bos_token": None, "eos_token": "<|stop|>"}, "<|stop|>"),
    (False, {"eos_token": {"content": "<|user|>"}}, "<|user|>"),
    (False, {}, "<|end|>"),
]


@pytest.mark.parametrize("bos, settings, first", FIRST)
def test_a_whole_text_begins_with_bos_or_an_end(directory, tmp_path, lm_eval, bos, settings, first):
    """Only what the text says is scored. BOS goes first though prompts get none."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in directory.iterdir():
        (path / file.name).symlink_to(file)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    train_bpe(bos).save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", settings)
    engine = make_engine(path)
    ids = [SPECIAL.index(first), *train_bpe().encode(TEXT).ids]
    wanted = math.fsum(engine.score(ids[:1], ids[1:]))
    (found,) = evaluation.adapter(engine).loglikelihood_rolling([request(TEXT)])
    assert found == pytest.approx(wanted, abs=1e-6)


def test_tasks_that_generate_are_refused(engine, lm_eval):
    with pytest.raises(Refusal, match="compare likelihoods"):
        evaluation.adapter(engine).generate_until([request("The quick", {})])


def test_a_task_of_lm_eval(engine, tmp_path):
    """A local task is run offline: of the same question with either answer, one is right."""
    pytest.importorskip("lm_eval")
    rows = [{"q": "The quick brown", "choices": [" fox", " dog"], "a": i} for i in (0, 1)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    table = evaluation.run_tasks(engine, str(tmp_path / "tiny.yaml"), None)
    assert "|tiny" in table and "0.5" in table


def test_without_lm_eval(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Refusal, match="pip install lm_eval"):
        evaluation.run_tasks(engine, "arc_easy", None)


# ---- the command


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3)
    return path


def test_as_a_process(directory, text):
    argv = ["--text", text, "--checkpoint_path", directory, "--window", "32", "--stride", "16"]
    done = subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("perplexity "), done


def run(monkeypatch, *argv):
    """The script, in this process; its status."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [SCRIPT, *map(str, argv)])
        patch.setattr(sys, "stdout", sys.stdout)  # to be put back
        runpy.run_path(SCRIPT, run_name="__main__")
    return end.value.code


BAD = {
    "nothing to do": ([], "--text FILE"),
    "no file": (["--text", "none.txt"], "cannot be read"),
    "an empty file": (["--text", "empty.txt"], "tokens"),
    "stride 0": (["--text", "text.txt", "--stride", 0], "--stride"),
    "unknown flag": (["--text", "text.txt", "--bogus"], "--bogus"),
    "two things to do": (["--text", "text.txt", "--tasks", "x"], "--tasks"),
}


@pytest.mark.parametrize("argv, word", BAD.values(), ids=BAD)
def test_bad_input(directory, text, monkeypatch, capsys, argv, word):
    """One line, status 2."""
    monkeypatch.chdir(text.parent)
    Path("empty.txt").write_text("")
    assert run(monkeypatch, *argv, "--checkpoint_path", directory) == 2
    out, err = capsys.readouterr()
    assert out == "" and word in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("context", [256, 64])
def test_a_short_context(directory, tmp_path, text, monkeypatch, capsys, context):
    """The window that is left is what --window would have said, with strides of half of it."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in directory.iterdir():
        (path / file.name).symlink_to(file)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").unlink()
    config["max_position_embeddings"] = context
    (path / "config.json").write_text(json.dumps(config))

    def perplexity(*flags):
        assert run(monkeypatch, "--text", text, "--checkpoint_path", path, *flags) == 0
        return capsys.readouterr().out.split(",")[0]

    found = perplexity()
    assert found == perplexity("--window", context, "--stride", context // 2)
    assert found != perplexity("--window", context, "--stride", context - 1)
    if context == 256:
        assert found != perplexity("--max_seq_length", 64)
    else:
        assert found == perplexity("--max_seq_length", 64)
    assert run(monkeypatch, "--text", text, "--checkpoint_path", path, "--max_seq_length", 1) == 2
    assert "expected 2 or more" in capsys.readouterr().err
