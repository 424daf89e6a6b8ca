"""scripts/eval.py: perplexity against Engine.score, the adapter of lm_eval where that is installed, bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generate import train_bpe, write_checkpoint

import generate
from scripts import eval as evaluation

ROOT = Path(generate.__file__).parent
TEXT = "The quick brown fox jumps over the lazy dog, and the dog, which had seen worse, went back to sleep. " * 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=700)
    model, tokenizer = generate.load(
        generate.parse_args(["--checkpoint_path", str(directory), "--precision", "fp32", "--deterministic"])
    )
    return generate.Engine(model, tokenizer, 1, model.config.context)


def test_one_window_is_what_score_says(engine):
    ids = engine.tokenizer.encode(TEXT)
    assert evaluation.log_likelihood(engine, ids, len(ids), 1) == math.fsum(engine.score(ids[:1], ids[1:]))
    assert evaluation.log_likelihood(engine, ids[::-1], len(ids), 1) != math.fsum(engine.score(ids[:1], ids[1:]))


@pytest.mark.parametrize("window, stride", [(8, 1), (8, 7), (50, 20)])
def test_windows_score_each_token_once(engine, window, stride):
    """Each after as many tokens as its window has room for: written out, a token at a time."""
    ids, total, end = engine.tokenizer.encode(TEXT)[:70], 0.0, window
    starts = []
    for i in range(1, len(ids)):
        if i >= end:
            end = min(end + stride, len(ids))
        starts.append(max(min(end, len(ids)) - window, 0))
        total += engine.score(ids[starts[-1] : i], ids[i : i + 1])[0]
    assert evaluation.log_likelihood(engine, ids, window, stride) == pytest.approx(total, abs=1e-9)
    assert len(set(starts)) > 1  # a window that never moved would show nothing
    assert evaluation.log_likelihood(engine, ids, len(ids), 1) != pytest.approx(total, abs=1e-6)


def test_likeliest_is_greedy(engine):
    prompt = engine.tokenizer.encode("The quick")
    request = generate.Request(0, "", prompt, max_new_tokens=6, temperature=0.0, ignore_eos=True)
    tokens = [completion.tokens for completion, _ in engine.generate([request])][-1]
    logprobs, likeliest = evaluation.score(engine, prompt + tokens, len(prompt))
    assert likeliest and logprobs == engine.score(prompt, tokens)
    assert not evaluation.score(engine, prompt + tokens[:-1] + [(tokens[-1] + 1) % 300], len(prompt))[1]


def test_a_task_of_lm_eval(engine, tmp_path):
    """A local task is run offline; its loglikelihoods are those of --score."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    pairs = [("The quick brown", " fox jumps"), ("The quick brown ", "fox"), ("", "The dog")]
    wanted = []
    for before, text in pairs:
        known = engine.tokenizer.encode(before.rstrip())
        ids = engine.tokenizer.encode(before + text)
        known, ids = (known, ids) if known else ([min(engine.tokenizer.eos_ids)], [min(engine.tokenizer.eos_ids), *ids])
        wanted.append(math.fsum(engine.score(ids[: len(known)], ids[len(known) :])))
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    assert [total for total, _ in evaluation.adapter(engine).loglikelihood(requests)] == wanted
    rows = [{"q": "The quick brown", "choices": [" fox", " dog"], "a": i} for i in (0, 1)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "tiny", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}, "doc_to_text": "{{q}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    table = evaluation.run_tasks(engine, str(tmp_path / "tiny.yaml"), None)
    assert "|tiny" in table and "0.5" in table  # the same question with either answer: one is right


def run(*argv):
    argv = [sys.executable, "scripts/eval.py", *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_as_a_command(tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text(TEXT)
    done = run("--text", tmp_path / "text.txt", "--checkpoint_path", directory, "--window", 32, "--stride", 16)
    assert done.returncode == 0 and done.stdout.startswith("perplexity "), done
    (tmp_path / "short.txt").write_text("")
    for argv, word in [
        ([], "--text FILE"),
        (["--text", tmp_path / "none.txt"], "cannot be read"),
        (["--text", tmp_path / "short.txt"], "tokens"),
        (["--text", tmp_path / "text.txt", "--stride", 0], "--stride"),
        (["--text", tmp_path / "text.txt", "--bogus"], "--bogus"),
        (["--text", tmp_path / "text.txt", "--tasks", "x"], "--tasks"),
    ]:
        done = run(*argv, "--checkpoint_path", directory)
        assert done.returncode == 2 and done.stdout == "" and word in done.stderr, (argv, done)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done


@pytest.mark.parametrize("context", [256, 64])
def test_a_short_context(tmp_path, context):
    """The window that is left is what --window would have said, with strides of half of it."""
    directory = write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=context)
    (tmp_path / "text.txt").write_text(TEXT * 3)
    argv = "--text", tmp_path / "text.txt", "--checkpoint_path", directory
    done, wanted = run(*argv), run(*argv, "--window", context, "--stride", context // 2)
    assert done.returncode == 0 and done.stdout.split(",")[0] == wanted.stdout.split(",")[0], done


def test_a_whole_text_begins_with_bos_or_an_end(tmp_path):
    """In lm_eval's rolling loglikelihood only what the text says is scored."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    for bos in (False, True):
        directory = write_checkpoint(tmp_path / str(bos), bos=bos)
        model, tokenizer = generate.load(generate.parse_args(["--checkpoint_path", str(directory)]))
        engine = generate.Engine(model, tokenizer, 1, model.config.context)
        text = train_bpe().encode(TEXT).ids
        first = 0 if bos else min(tokenizer.eos_ids)
        wanted = math.fsum(engine.score([first], text))
        request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
        assert evaluation.adapter(engine).loglikelihood_rolling([request]) == [pytest.approx(wanted, abs=1e-6)]


def test_without_lm_eval(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(generate.InputError, match="pip install lm_eval"):
        evaluation.run_tasks(engine, "arc_easy", None)


def test_tokens_are_scored_in_pieces(engine):
    """More than one piece of 512: the same as Engine.score, which has its own pieces."""
    ids = torch.randint(300, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    assert evaluation.score(engine, ids, 1)[0] == engine.score(ids[:1], ids[1:])
    assert evaluation.score(engine, ids[::-1], 1)[0] != engine.score(ids[:1], ids[1:])
