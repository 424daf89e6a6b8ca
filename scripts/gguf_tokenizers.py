"""What a GGUF file says of a tokenizer: tokenizer.json, or tokenizer.model of sentencepiece."""

import struct

from scripts.files import Refusal
from scripts.pipelines import QWEN_WORDS, byte_level

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = range(1, 7)  # in tokenizer.ggml.token_type, as sentencepiece has them
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
BPE = 2  # as sentencepiece counts kinds of models
# Numbers of fields in sentencepiece_model.proto.
PIECES = 1
TRAINER = 2
NORMALIZER = 3
PIECE = {"text": 1, "score": 2, "kind": 3}
MODEL_TYPE, BYTE_FALLBACK = 3, 35  # of the trainer
IDS = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47)}  # and of the texts of these
NAME, REMOVE_EXTRA_BLANKS = 1, 4  # of the normalizer

PREFIX = "tokenizer.ggml."
KNOWN = ["model", "pre", "tokens", "token_type", "scores", "merges", "add_space_prefix"]
KNOWN += ["add_bos_token", "add_eos_token", "token_type_count"]
WITHOUT_EFFECT = {"add_sep_token": False, "remove_extra_whitespaces": False}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def split(words: str) -> dict:
    """A text is cut into words by an expression, and they are cut into bytes."""
    cut = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level(False, use_regex=False)]}


def single_digits() -> dict:
    digits = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [digits, byte_level(False, use_regex=True)]}


# What a tokenizer.json has beside the vocabulary, by tokenizer.ggml.pre.
PRE = {
    "smollm": {"pre_tokenizer": single_digits()},
    "gpt-2": {"pre_tokenizer": byte_level(False, use_regex=True)},
    "llama-bpe": {"pre_tokenizer": split(LLAMA3_WORDS)},
    "qwen2": {"pre_tokenizer": split(QWEN_WORDS), "normalizer": {"type": "NFC"}},
}
WITH_BOS = ("llama-bpe",)  # where a file does not say it
IGNORE_MERGES = ("llama-bpe",)  # a word that is a token is that token, whatever the merges say


def tokenizer_files(meta: dict, model_type: str, rows: int) -> dict[str, dict | bytes]:
    """The files by their names, and among them generation_config.json. `rows` are those of the
    embedding. Raises Refusal, or KeyError for metadata that are missing."""
    given = check(meta, rows)
    special = {}  # bos, eos, eot and eom -> id
    for name in ("bos", "eos", "eot", "eom"):
        if f"{name}_token_id" in given:
            special[name] = token_id(given, name)
    ends = {i for name, i in special.items() if name != "bos"}
    generation = {"bos_token_id": special.get("bos"), "eos_token_id": sorted(ends)}
    is_pieces = given["model"] == "llama"
    config = {"tokenizer_class": "LlamaTokenizer" if is_pieces else "PreTrainedTokenizerFast"}
    config |= added_ends(given, special)
    for name, i in special.items():
        config[f"{name}_token"] = given["tokens"][i]
    config |= pieces_config(given) if is_pieces else words_config(given, model_type)
    config["chat_template"] = chat_templates(meta)
    if is_pieces:
        tokenizer = {"tokenizer.model": sentencepiece_model(given)}
    else:
        tokenizer = {"tokenizer.json": tokenizer_json(given, special, config)}
    return tokenizer | {"tokenizer_config.json": config, "generation_config.json": generation}


def check(meta: dict, rows: int) -> dict:
    """The metadata of the tokenizer by the last word of their keys. Raises Refusal for those that
    are not known, or do not fit each other."""
    given = {}
    for key, value in meta.items():
        if key.startswith(PREFIX):
            given[key.removeprefix(PREFIX)] = value
    one_of("model", given, ["gpt2", "llama"])
    for name, value in given.items():
        if name not in KNOWN and not name.endswith("_token_id"):
            if name not in WITHOUT_EFFECT or WITHOUT_EFFECT[name] != value:
                raise Refusal(f"{PREFIX}{name} {value!r:.60} is not supported")
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if given.get(name) not in (None, True, False):
            raise Refusal(f"{PREFIX}{name} is {given[name]!r:.60}, expected true or false")
    check_entries(given, rows)
    return given


def check_entries(given: dict, rows: int) -> None:
    """Raise Refusal where there is not one of each for each row."""
    for name in ["tokens", "token_type", "scores" if given["model"] == "llama" else "merges"]:
        if name not in given:
            raise KeyError(f"{PREFIX}{name}")
        values = given[name]
        count = len(values) if isinstance(values, list) else "no list of"
        if count != rows and (name != "merges" or count == "no list of"):
            raise Refusal(f"{PREFIX}{name} has {count} entries, expected {rows}, a row each")
    tokens, kinds = given["tokens"], given["token_type"]
    if not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != rows:
        raise Refusal(f"{PREFIX}tokens are not different texts")
    if not all(type(kind) is int and kind in KINDS for kind in kinds):
        raise Refusal(f"{PREFIX}token_type has other than 1 to 6")


def one_of(name: str, given: dict, known: list) -> None:
    if given.get(name) not in known:
        valid = " or ".join(known)
        raise Refusal(f"tokenizer.ggml.{name} is {given.get(name)!r:.60}, expected {valid}")


def token_id(given: dict, name: str) -> int:
    i = given[f"{name}_token_id"]
    if type(i) is not int or not 0 <= i < len(given["tokens"]):
        expected = f"expected one of the {len(given['tokens'])} tokens"
        raise Refusal(f"tokenizer.ggml.{name}_token_id is {i!r:.60}, {expected}")
    return i


def added_ends(given: dict, special: dict[str, int]) -> dict[str, bool]:
    """Whether a text begins with BOS and ends with EOS. Raises Refusal where there is none."""
    has_bos = given["model"] == "llama" or given.get("pre") in WITH_BOS
    found = {"add_bos_token": given.get("add_bos_token", has_bos)}
    if given.get("add_eos_token"):
        found["add_eos_token"] = True
    for end in ("bos", "eos"):
        if found.get(f"add_{end}_token") and end not in special:
            raise Refusal(f"tokenizer.ggml.{end}_token_id is missing, and a text has it")
    return found


def words_config(given: dict, model_type: str) -> dict:
    """What else tokenizer_config.json says of a vocabulary of bytes."""
    one_of("pre", given, list(PRE))
    if given.get("add_space_prefix"):
        raise Refusal("tokenizer.ggml.add_space_prefix is true, expected false")
    if model_type != "qwen2":
        return {}
    if given["pre"] != "qwen2":  # transformers builds it so whatever the file says
        raise Refusal(f"tokenizer.ggml.pre is {given['pre']}, expected qwen2 of a Qwen2")
    return {"unk_token": None, "pad_token": None}  # else its class would add them


def pieces_config(given: dict) -> dict:
    """The same of pieces of sentencepiece."""
    prefix = given.get("add_space_prefix")
    config = {"legacy": False, "add_prefix_space": prefix is None or prefix}
    return config | {"unk_token": given["tokens"][unknown(given)]}


def chat_templates(meta: dict) -> str | list[dict] | None:
    """One, or several with names. Raises Refusal for what is no text."""
    first = "tokenizer.chat_template"
    found = {"default": meta[first]} if first in meta else {}
    for key, template in meta.items():
        if key.startswith(f"{first}."):
            found[key.removeprefix(f"{first}.")] = template
    if not all(isinstance(template, str) for template in found.values()):
        raise Refusal(f"{first} is no text")
    if found.keys() <= {"default"}:
        return found.get("default")
    return [{"name": name, "template": template} for name, template in found.items()]


def tokenizer_json(given: dict, special: dict[str, int], config: dict) -> dict:
    """Of a vocabulary of bytes and merges. Control tokens print nothing; those of the user print
    what they are; unused ones stand for rows that no text has."""
    tokens, kinds = given["tokens"], given["token_type"]
    vocab = {}
    added = []
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != UNUSED:
            vocab[token] = i
        if kind in (CONTROL, USER_DEFINED):
            flags = {"special": kind == CONTROL, "normalized": False} | FLAGS
            added.append({"id": i, "content": token} | flags)
    merges = [merge.split(" ") for merge in given["merges"]]
    if any(len(merge) != 2 for merge in merges):
        raise Refusal("tokenizer.ggml.merges has other than two pieces")
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    if given["pre"] in IGNORE_MERGES:
        model["ignore_merges"] = True
    content = {"version": "1.0"} | PRE[given["pre"]] | {"decoder": byte_level(True, use_regex=True)}
    content |= {"model": model, "added_tokens": added}
    if config["add_bos_token"] or config.get("add_eos_token"):
        content["post_processor"] = template(given, special, config)
    return content


def template(given: dict, special: dict[str, int], config: dict) -> dict:
    """What puts BOS before a text and EOS behind it."""
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {}
    for end in ("bos", "eos"):
        if config.get(f"add_{end}_token"):
            i = special[end]
            text = given["tokens"][i]
            tokens[text] = {"id": text, "ids": [i], "tokens": [text]}
            part = {"SpecialToken": {"id": text, "type_id": 0}}
            single = [part, *single] if end == "bos" else [*single, part]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    }


def unknown(given: dict) -> int:
    """The id of the unknown token, of which there is one."""
    if "unknown_token_id" in given:
        return token_id(given, "unknown")
    if UNKNOWN not in given["token_type"]:
        raise Refusal("tokenizer.ggml.unknown_token_id is missing")
    return given["token_type"].index(UNKNOWN)


def sentencepiece_model(given: dict) -> bytes:
    """A model of pairs that are merged by their scores. Texts stay as they are otherwise."""
    pieces = zip(given["tokens"], given["scores"], given["token_type"], strict=True)
    fields = []
    for text, score, kind in pieces:
        values = {"text": text, "score": float(score), "kind": kind}
        piece = [(PIECE[name], value) for name, value in values.items()]
        fields.append((PIECES, message(piece)))
    trainer = [(MODEL_TYPE, BPE), (BYTE_FALLBACK, int(BYTE in given["token_type"]))]
    ids = {"unknown": unknown(given)}
    ids |= {name: token_id(given, name) for name in ("bos", "eos") if f"{name}_token_id" in given}
    for name, i in ids.items():
        of_id, of_text = IDS[name]
        trainer += [(of_id, i), (of_text, given["tokens"][i])]
    fields.append((TRAINER, message(trainer)))
    normalizer = [(NAME, "identity"), (REMOVE_EXTRA_BLANKS, 0)]
    return message([*fields, (NORMALIZER, message(normalizer))])


def message(fields: list[tuple[int, int | float | str | bytes]]) -> bytes:
    """A message of protocol buffers, of numbers and values of fields."""
    parts = []
    for number, value in fields:
        if isinstance(value, float):
            parts.append(varint(8 * number + 5) + struct.pack("<f", value))
        elif isinstance(value, int):
            parts.append(varint(8 * number) + varint(value))
        else:
            content = value.encode() if isinstance(value, str) else value
            parts.append(varint(8 * number + 2) + varint(len(content)) + content)
    return b"".join(parts)


def varint(number: int) -> bytes:
    """In bytes of seven bits, the lowest first."""
    found = []
    while number >= 128:
        found.append(number % 128 + 128)
        number //= 128
    return bytes([*found, number])
