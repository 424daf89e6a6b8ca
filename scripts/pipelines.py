"""What the classes of transformers do to a text before and after it is cut into tokens. Some take
of tokenizer.json no more than the vocabulary and build the rest anew, as is said here in the words
of that file."""

from collections.abc import Callable
from dataclasses import dataclass

GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
QWEN_NAMES = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CODE_LLAMA_NAMES = LLAMA_NAMES | {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
GEMMA_NAMES |= {"pad_token": "<pad>", "mask_token": "<mask>"}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TYPES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
AS_IN_THE_FILE = ("mistral", "mixtral")  # model types for which no class builds anything


def replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def byte_level(prefix_space: bool, use_regex: bool) -> dict:
    flags = {"add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel"} | flags


def bytes_of_pieces(strip: bool) -> dict:
    """What turns pieces of sentencepiece into text, without its first space with `strip`."""
    parts = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if strip:
        parts.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": parts}


def metaspace(scheme: str) -> dict:
    """A space before which words: always the first after an added token, the first, or never."""
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def wants_prefix(settings: dict) -> bool:
    given = settings.get("add_prefix_space")
    return True if given is None else bool(given)


def llama_parts(settings: dict, unk: str | None) -> dict:
    prefix = wants_prefix(settings)
    scheme = "never"
    if prefix:
        scheme = "always" if settings.get("legacy", False) else "first"
    return {
        "normalizer": None,
        "pre_tokenizer": metaspace(scheme),
        "decoder": bytes_of_pieces(strip=prefix),
        "model": {"fuse_unk": True, "byte_fallback": True, "unk_token": None},
    }


def code_llama_parts(settings: dict, unk: str | None) -> dict:
    return {
        "normalizer": None,
        "pre_tokenizer": metaspace("first" if wants_prefix(settings) else "never"),
        "decoder": bytes_of_pieces(strip=True),
        "model": {"fuse_unk": True, "byte_fallback": True, "unk_token": unk},
    }


def gemma_parts(settings: dict, unk: str | None) -> dict:
    split = {"type": "Split", "pattern": {"String": " "}, "invert": False}
    return {
        "normalizer": replace(" ", "▁"),
        "pre_tokenizer": split | {"behavior": "MergedWithPrevious"},
        "decoder": bytes_of_pieces(strip=False),
        "model": {"fuse_unk": True, "byte_fallback": True, "unk_token": unk},
    }


def gpt2_parts(settings: dict, unk: str | None) -> dict:
    return {
        "normalizer": None,
        "pre_tokenizer": byte_level(bool(settings.get("add_prefix_space")), use_regex=True),
        "decoder": byte_level(True, use_regex=True),
        "model": {"fuse_unk": False, "byte_fallback": False, "unk_token": None},
    }


def neox_parts(settings: dict, unk: str | None) -> dict:
    return gpt2_parts(settings, unk) | {"normalizer": {"type": "NFC"}}


def qwen_parts(settings: dict, unk: str | None) -> dict:
    words = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated"}
    letters = byte_level(bool(settings.get("add_prefix_space")), use_regex=False)
    parts = [words | {"invert": False}, letters]
    return neox_parts(settings, unk) | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}
    }


@dataclass(frozen=True)
class Builder:
    """A class that builds a tokenizer. `parts` are those of a tokenizer.json, by the settings and
    the unknown token; `names` the tokens that have a name where no file gives them one. Beside a
    tokenizer.json, `bos` is whether a text begins with BOS; None: as that file says."""

    parts: Callable[[dict, str | None], dict]
    names: dict[str, str]
    bos: bool | None = None
    all_special: bool = False  # whether all that have a name or stand in a list are special


BUILDERS = {
    "LlamaTokenizer": Builder(llama_parts, LLAMA_NAMES),
    "CodeLlamaTokenizer": Builder(code_llama_parts, CODE_LLAMA_NAMES, True),
    "GemmaTokenizer": Builder(gemma_parts, GEMMA_NAMES),
    "GPT2Tokenizer": Builder(gpt2_parts, GPT2_NAMES),
    "GPTNeoXTokenizer": Builder(neox_parts, GPT2_NAMES | {"pad_token": "<|padding|>"}, False),
    "Qwen2Tokenizer": Builder(qwen_parts, QWEN_NAMES, all_special=True),
}
OF_VOCAB = ("Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer")


def class_name(settings: dict, config: dict) -> str | None:
    """The class that a directory names, or else the one of its type of model."""
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    model_type = config.get("model_type")
    if model_type in QWEN_TYPES and (not named or model_type == "qwen2"):
        return "Qwen2Tokenizer"
    return str(named).removesuffix("Fast") if named else None


def builder_of_json(name: str | None, model_type: str | None, text: str) -> Builder | None:
    """What builds a tokenizer of class `name` anew; None where the file with this text says it
    all."""
    if model_type in AS_IN_THE_FILE or name == "LlamaTokenizer" and '"ByteLevel"' in text:
        return None
    return BUILDERS.get(name)


def mend_words(tokenizer, settings: dict, config: dict) -> None:
    """Large vocabularies of Mistral were published with a wrong rule of what a word is. Where the
    settings ask for it, and no newer version has written the files, the right one is put in."""
    from tokenizers import Regex, pre_tokenizers

    version = str(config.get("transformers_version") or 0).split(".")[0]
    is_new = version.isdigit() and int(version) >= 5
    is_mistral = config.get("model_type", "mistral") == "mistral"
    parts = tokenizer.pre_tokenizer
    is_large = parts is not None and tokenizer.get_vocab_size() > 100_000
    if not settings.get("fix_mistral_regex") or is_new or not is_mistral or not is_large:
        return
    words = pre_tokenizers.Split(Regex(MISTRAL_WORDS), behavior="isolated")
    if isinstance(parts, pre_tokenizers.Sequence):
        parts[0] = words
    else:
        if isinstance(parts, pre_tokenizers.Metaspace):
            parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        parts = pre_tokenizers.Sequence([words, parts])
    tokenizer.pre_tokenizer = parts
