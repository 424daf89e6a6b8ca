"""Spoiled input at random, and whether generate.py stands it: status 0, or status 2 and one line,
within a time and a memory limit, with no input changed and nothing left behind.

python tests/fuzz.py --count 2000 --seed 0

prints what does not hold, with the seed that repeats it: `--count 1 --seed N --keep` leaves the
folder of that case."""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from helpers import CORPUS, SPECIAL, write_checkpoint, write_json  # noqa: E402

import generate  # noqa: E402
from scripts import machine  # noqa: E402

KINDS = ["plain", "chat", "chat", "plain", "pieces"]  # of cases, in this proportion
SECONDS = 20
MEMORY = 4 << 30  # bytes beyond what a process has at first
OUTPUT = "out.jsonl"
DEEP = "@deep@"  # stands for a value that no recursion reaches the end of
VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**40, 2**63, 10**30, -(10**30)]
VALUES += [0.0, 0.5, -1.5, 1e38, 1e308, float("nan"), float("inf"), "", "x", "64", "a" * 100_000]
VALUES += ["\ud800", "\0", "é🙂", [], [1], [None], [[1]], ["a", 1], {}, {"a": 1}, {"a": {}}, DEEP]
VALUES += [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"},
    {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": []},
    {"type": "ByteFallback"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
]
VALUES += [list(range(1000)), {str(i): i for i in range(300)}, "../x", "/etc/passwd"]
SETTINGS = {  # that a config.json may have beside those that it has
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "quantization_config": {"quant_method": "gpt-exact", "mode": "int4", "group_size": 32},
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "transformers_weights": "model.safetensors",
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
    "quantization": {"bits": 4},
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 2,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
}
FAMILIES = """Llama Mistral Mixtral Qwen2 Qwen3 Qwen3Moe SmolLM3 Olmo2 Phi3 Gemma3 Granite
Gpt9""".split()
JSON_FILES = """config.json generation_config.json tokenizer.json tokenizer_config.json
special_tokens_map.json added_tokens.json model.safetensors.index.json""".split()
FRAGMENTS = """{{|}}|{%|%}|{#|for m in messages|endfor|if|endif|else|set x =|macro f(a)|endmacro
|f(f)|messages|messages[0]|m.content|m['role']|~|**|*|'a'|99999|(|)|[|]|range(99999)|tojson|\\|
|center(99999)|namespace(a=1)|loop.index0|raise_exception('no')|strftime_now('%Y')|include 'x'
|.__class__|is defined|in|not|recursive|loop(m)|break|\0|\ud800|<|end|>""".split("|")
FLAGS = """--device --precision --quantize --group_size --max_seq_length --prompt --system --chat
--max_new_tokens --temperature --top_k --top_p --seed --num_samples --stop --ignore_eos
--batch_size --prefill_chunk --speculate_k --draft_checkpoint_path --draft_quantize
--prompt_lookup --profile --deterministic --json --output --score --prompts_file --interactive
--min_p --repetition_penalty --logit_bias --template_args
--random_weights --checkpoint_path --no_such_flag""".split()
WORDS = [
    "",
    "0",
    "1",
    "-1",
    "2",
    "3",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "x",
    "fox jumps",
    "int8",
    "int4",
]
WORDS += ["32", "cpu", "cuda", "hpu", "meta", "fp32", "fp16", "bf16", "checkpoint", "prompts.jsonl"]
WORDS += ["checkpoint/config.json", "out.jsonl", "new.json", "/", ".", "nowhere/new", "--", "é🙂"]
WORDS += ['{"5": -100}', '{"5": true}', '{"999999": 1}', '{"-1": 1}', "[5, 6]", "{}", "{5: 1}"]
WORDS += ['{"tools": [{"a": 1}], "b": null}', '{"chat_template": "rag"}', '{"a": NaN}', "[]"]
WORDS += ["\udcff", "9" * 30, str(2**62), str(2**63), "a" * 50_000, "-", "=", "\n", "checkpoint/x"]


@dataclass
class Case:
    """A folder with what generate.py reads, and its flags."""

    folder: Path
    argv: list[str]
    random: random.Random

    def path(self, name: str) -> Path:
        return self.folder / "checkpoint" / name


# ---- what is spoiled


def places(tree) -> list[tuple]:
    """All containers of a tree of JSON with the keys in them."""
    keys = {dict: lambda: list(tree), list: lambda: list(range(len(tree)))}.get(type(tree))
    found = []
    for key in keys() if keys else []:
        found += [(tree, key), *places(tree[key])]
    return found


def spoil_tree(tree, chance: random.Random) -> None:
    """Change one thing in it, or remove it, or put something else of it in its place. Large parts
    do not get all of the chances: first it is chosen how deep that is."""
    container, key = tree, None
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = container[key]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.4:
            break
        container = inner
    what = chance.random()
    if what < 0.15:
        del container[key]
    elif what < 0.25:
        _, other = chance.choice(places(tree)[:1000] or [(tree, key)])
        container[key] = copy.deepcopy(tree.get(other, other) if isinstance(tree, dict) else other)
    elif what < 0.35 and isinstance(container, dict):
        container[chance.choice(["x", "", "\ud800", "type"])] = container.pop(key)
    elif what < 0.45 and isinstance(container, list):
        container += container * chance.choice([1, 50])
    else:
        container[key] = copy.deepcopy(chance.choice(VALUES))


def dump(tree, path: Path) -> None:
    text = json.dumps(tree).replace(f'"{DEEP}"', 100_000 * "[")
    path.write_text(text, encoding="utf-8")


def spoil_config(case: Case) -> None:
    path, chance = case.path("config.json"), case.random
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in SETTINGS.items():
        if chance.random() < 0.1:
            config[name] = copy.deepcopy(value)
    if chance.random() < 0.2:
        config["architectures"] = [f"{chance.choice(FAMILIES)}ForCausalLM"]
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        spoil_tree(config, chance)
    dump(config, path)


def spoil_json(case: Case) -> None:
    """One of the files of JSON, most of which say something of tokens."""
    path = case.path(case.random.choice(JSON_FILES))
    content = {"weight_map": {"lm_head.weight": "model.safetensors"}, "bos_token": SPECIAL[0]}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(case.random.choice([1, 1, 2, 3])):
        spoil_tree(content, case.random)
    dump(content, path)


def spoil_header(case: Case) -> None:
    """That of the weights: its length, or what it says of the tensors."""
    path, chance = case.path("model.safetensors"), case.random
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if chance.random() < 0.2:
        wrong = chance.choice([0, 1, size - 1, size + 1, len(content), 2**40, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", wrong) + content[8:])
        return
    tensor = header[chance.choice(list(header))]
    kinds = ["F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "x"]
    what = chance.random()
    if what < 0.3:
        tensor["dtype"] = chance.choice(kinds)
    elif what < 0.5:
        tensor["shape"] = chance.choice([[], [0], [1, 2**62, 4], [64], [-1], [2**64], "x"])
    elif what < 0.7:
        tensor["data_offsets"] = chance.choice([[0, 0], [4, 0], [0, 2**63], [-4, 4], [0], None])
    else:
        spoil_tree(header, chance)
    text = json.dumps(header).replace(f'"{DEEP}"', 10_000 * "[").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def spoil_bytes(case: Case) -> None:
    """Of any file."""
    chance = case.random
    path = chance.choice(sorted(path for path in case.folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    where = chance.randrange(len(content) + 1)
    what = chance.randrange(5)
    if what == 0:
        content = content[:where]
    elif what == 1:
        content[where:where] = chance.randbytes(chance.choice([1, 8, 1000]))
    elif what == 2:
        for _ in range(chance.choice([1, 10])):
            content[chance.randrange(len(content)) : where + 1] = chance.randbytes(1)
    elif what == 3:
        content = bytearray(chance.choice([b"", b"{}", b"[]", b"null", b"\0" * 99, b'{"a":']))
    else:
        content += content[where:] + b"\n"
    path.write_bytes(content)


def spoil_kind(case: Case) -> None:
    """Something that is no file, in place of one."""
    chance = case.random
    path = chance.choice(sorted(path for path in case.folder.rglob("*") if path.is_file()))
    path.unlink()
    make = [os.mkfifo, os.mkdir, lambda path: None]
    make += [lambda path: path.symlink_to(path), lambda path: path.symlink_to("nothing")]
    make += [lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/dev/null")]
    chance.choice(make)(path)


def spoil_template(case: Case) -> None:
    chance = case.random
    parts = [chance.choice(FRAGMENTS).strip() for _ in range(chance.choice([3, 10, 30]))]
    text = " ".join(parts)
    if chance.random() < 0.5:
        text = f"{{% for m in messages %}}{{{{ {text} }}}}{{% endfor %}}"
    case.path("chat_template.jinja").write_text(text, encoding="utf-8", errors="surrogatepass")
    case.argv.append("--chat")


def spoil_prompts(case: Case) -> None:
    path, chance = case.folder / "prompts.jsonl", case.random
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for _ in range(chance.choice([1, 2])):
        spoil_tree(lines, chance)
    texts = [json.dumps(line).replace(f'"{DEEP}"', 100_000 * "[") for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    case.argv += chance.choice([[], ["--chat"]])


def spoil_output(case: Case) -> None:
    """What an earlier run has left, which may also be scored."""
    path, chance = case.folder / OUTPUT, case.random
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for _ in range(chance.choice([0, 1, 2])):
        spoil_tree(lines, chance)
    texts = [json.dumps(line).replace(f'"{DEEP}"', 100_000 * "[") for line in lines]
    text = "\n".join(texts)
    path.write_text(text[: chance.choice([len(text), chance.randrange(len(text) + 1)])] + "\n")
    if chance.random() < 0.3:
        with contextlib.suppress(ValueError):
            case.argv.remove(OUTPUT)
            case.argv.remove("--output")
        case.argv += ["--score", OUTPUT]


def spoil_flags(case: Case) -> None:
    chance = case.random
    for _ in range(chance.choice([1, 2, 4])):
        case.argv.append(chance.choice(FLAGS))
        if chance.random() < 0.8:
            case.argv.append(chance.choice(WORDS))


SPOILERS = [spoil_config, spoil_json, spoil_header, spoil_bytes, spoil_template]
SPOILERS += [spoil_prompts, spoil_output, spoil_flags]
SPOILERS += [spoil_kind]  # the last: of what is no file then, another would wait for an end


# ---- the cases


def prepare(folder: Path) -> None:
    """What is right, to be spoiled: a checkpoint, prompts, and the completions of the first one."""
    (folder / "checkpoint").mkdir(parents=True)
    write_checkpoint(folder / "checkpoint")
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    path = folder / "checkpoint" / "generation_config.json"
    write_json(path, json.loads(path.read_text()) | sampling)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        write_json(folder / "checkpoint" / name, {})
    talk = [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "fox"}]
    lines = [
        {"prompt": "the quick fox", "id": "a", "seed": 3, "stop": ["lazy", "dog"], "top_p": 0.9},
        {"messages": [*talk, *talk[:1]], "temperature": 0, "max_new_tokens": 3, "top_k": 5},
        {"prompt": "the dog", "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": {"7": -2}},
    ]
    lines[1]["template_args"] = {"tools": [{"name": "f"}], "a": {"b": [1, "x"]}}
    lines[1] = lines[1] if folder.name == "chat" else {"prompt": "a dog", "temperature": 0}
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    if folder.name == "pieces":
        (folder / "checkpoint" / "tokenizer.json").unlink()
        (folder / "checkpoint" / "tokenizer.model").write_bytes(pieces())
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    case = Case(folder, flags(folder.name), random.Random(0))
    found = run(case, SECONDS)
    assert found == [], found


def pieces() -> bytes:
    """A small model of sentencepiece."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **options)
    return model.getvalue()


def flags(kind: str) -> list[str]:
    argv = ["--checkpoint_path", "checkpoint", "--precision", "fp32", "--max_new_tokens", "4"]
    argv += ["--prompts_file", "prompts.jsonl", "--output", OUTPUT]
    return argv + (["--chat"] if kind == "chat" else [])


MORE = (AttributeError, RecursionError)


def new_case(seed: int, right: Path, folder: Path) -> Case:
    """The same for the same seed."""
    chance = random.Random(seed)
    kind = chance.choice(KINDS)
    shutil.copytree(right / kind, folder)
    case = Case(folder, flags(kind), chance)
    if chance.random() < 0.5:
        (folder / OUTPUT).unlink()
    spoilers = chance.choices(SPOILERS, k=chance.choice([1, 1, 1, 2]))
    for spoil in sorted(spoilers, key=SPOILERS.index):
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, *MORE):
            spoil(case)  # which may not find what another has spoiled
    return case


# ---- a run and what is wrong with it


def contents(folder: Path) -> dict[str, bytes | str]:
    """What all files hold, and what is no file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "no file"
    return found


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def child(case: Case, streams: list[int]) -> None:
    """Run generate.py with the flags of a case in this process, and end it."""
    status = 99
    try:
        os.chdir(case.folder)
        for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
        )
        limit_memory()
        sys.argv = ["generate.py", *case.argv]
        generate.command(generate.main)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """The status of a child; None where it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def run(case: Case, seconds: float, work: Callable = child) -> list[str]:
    """What is wrong with a run of a case."""
    before = contents(case.folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        process = os.fork()
        if process == 0:
            work(case, [out.fileno(), error.fileno()])
        status = wait(process, seconds)
        error.seek(0)
        lines = error.read().decode(errors="replace").split("\n")[:-1]
    found = wrong_words(status, lines, seconds)
    return found + changes(case, before, contents(case.folder))


def wrong_words(status: int | None, lines: list[str], seconds: float) -> list[str]:
    found = []
    errors = [line for line in lines if line.startswith("error: ")]
    if status is None:
        found.append(f"no end in {seconds} seconds")
    elif status not in (0, 2):
        found.append(f"status {status}: {' / '.join(lines[-6:])}")
    if any("Traceback" in line or "panicked" in line for line in lines):
        found.append(f"a traceback: {' / '.join(lines[-6:])}")
    others = [line for line in lines if not line.startswith(("error: ", "warning: "))]
    others = [line for line in others if not line.endswith(f"completions are in {OUTPUT}")]
    if status == 2 and (len(errors) != 1 or others or lines[-1] != errors[0]):
        found.append(f"not one line: {' / '.join(lines)}")
    if any(len(line) > 5000 for line in errors) or "error: " in errors:
        found.append(f"no line to read: {errors[0][:300]}")
    if status == 0 and errors:
        found.append(f"an error and status 0: {errors[0]}")
    return found


def changes(case: Case, before: dict, after: dict) -> list[str]:
    """Files that are others than before, but for those that a run writes, and adds to."""
    written = {OUTPUT, "new.json"}  # names among the flags
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        is_added_to = isinstance(old, bytes) and isinstance(new, bytes)
        is_added_to = is_added_to and new.startswith(old[: old.rfind(b"\n") + 1])
        is_new = old is None and isinstance(new, bytes) and named(case, name)
        if old != new and not (is_new or name in written and is_added_to):
            found.append(f"{name} was {old!r:.60} and is {new!r:.60}")
    return found


def named(case: Case, name: str) -> bool:
    """Whether a flag that writes is followed by that name, or by that of a link to it."""
    pairs = zip(case.argv, [*case.argv[1:], ""], strict=True)
    given = [value for flag, value in pairs if flag in ("--output", "--profile")]
    given += [word.partition("=")[2] for word in case.argv if word.startswith("--")]
    real = [os.path.realpath(case.folder / value) for value in given if "\0" not in value]
    return os.path.realpath(case.folder / name) in real


# ---- the front door


def warm_up() -> None:
    """All that a child would else do again: imports, and the speed of memory."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)

    def read_bandwidth(device):
        return 12e9

    machine.read_bandwidth = read_bandwidth


def fuzz(seeds, right: Path, seconds: float = SECONDS, work: Callable = child) -> dict[int, list]:
    """What is wrong, by seed, and the flags with it; `right` has what `prepare` made."""
    found = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            case = new_case(seed, right, Path(folder) / "case")
            if wrong := run(case, seconds, work):
                found[seed] = [*wrong, " ".join(map(repr, case.argv))[:500]]
                print(f"seed {seed}:", *found[seed], sep="\n    ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as right:
        for name in set(KINDS):
            prepare(Path(right) / name)
        if args.keep:
            case = new_case(args.seed, Path(right), Path(tempfile.mkdtemp()) / "case")
            print(case.folder, *map(repr, case.argv))
            return
        found = fuzz(range(args.seed, args.seed + args.count), Path(right))
    print(f"{len(found)} of {args.count} cases have findings: {sorted(found)}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
