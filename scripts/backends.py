"""Tokenizers of the package `tokenizers`, from tokenizer.json or from vocab.json and merges.txt, as
transformers 5 builds them."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from scripts.checkpoint import read_json
from scripts.files import Refusal, is_there, refusing, text_in
from scripts.pipelines import BUILDERS, OF_VOCAB, Builder, builder_of_json, class_name, mend_words
from scripts.special_tokens import AddedToken, SpecialTokens, read_token

LARGEST_GROWTH = 1000  # of a text, before it is cut into tokens


class NoText:
    """What random weights have: ids that mean nothing."""

    named = {}
    hidden = {}

    def encode(self, text: str, bos: bool) -> list[int]:
        raise Refusal("random weights have no tokenizer: give --prompt a number of tokens")

    def decode(self, ids: list[int]) -> str:
        return ""

    def vocab(self) -> dict[str, int]:
        return {}


class JsonTokenizer:
    """Of a directory with tokenizer.json, or with vocab.json and merges.txt. `settings` are those
    of tokenizer_config.json, `config` is config.json. `named` are tokens by name, `hidden` by
    id: those that print nothing."""

    def __init__(self, directory: Path, settings: dict, config: dict):
        import tokenizers

        content, builder = read_content(directory, settings, config)
        if builder:
            listed = {t["id"]: read_token(t) for t in content.get("added_tokens", [])}
            tokens = SpecialTokens(directory, settings, builder.names, listed)
            content = rebuilt(content, builder, settings, tokens)
        with refusing(tokenizer_files(directory), Exception), refusing_panics():
            self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.check_growth(tokenizer_files(directory))
        there = self.added()
        if not builder:
            tokens = SpecialTokens(directory, settings, {}, there)
        for token in tokens.to_add(set(there.values())):
            self.tokenizer.add_tokens([tokenizers.AddedToken(**vars(token))])
        if builder and builder.all_special:
            self.tokenizer.add_special_tokens(sorted({token.content for token in tokens.all()}))
        self.named = {name: token.content for name, token in tokens.named.items()}
        self.hidden = {i: token.content for i, token in self.added().items() if token.special}
        if not is_there(directory / "tokenizer.json"):
            self.set_ends(settings)
        elif builder and builder.bos is not None:
            self.set_ends({"add_bos_token": builder.bos})
        mend_words(self.tokenizer, settings, config)
        self.tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        # Some are saved with a length to cut and to fill texts to, which are for training.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def check_growth(self, name: str) -> None:
        """Raise Refusal for files that make much of little; `name` is what they are called."""
        for part in (self.tokenizer.normalizer, self.tokenizer.decoder):
            if part is not None and growth(json.loads(part.__getstate__())) > LARGEST_GROWTH:
                raise Refusal(f"{name}: what replaces text makes it too long")

    def added(self) -> dict[int, AddedToken]:
        """The tokens that were added to the vocabulary, by their ids."""
        found = {}
        for i, token in self.tokenizer.get_added_tokens_decoder().items():
            flags = {name: getattr(token, name) for name in AddedToken.__dataclass_fields__}
            found[i] = AddedToken(**flags)
        return found

    def set_ends(self, settings: dict) -> None:
        """A text begins with BOS and ends with EOS where the settings say so."""
        from tokenizers import processors

        ids = {}
        parts = {"bos": "", "text": "$A:0", "eos": ""}
        for end in ("bos", "eos"):
            token = self.named.get(f"{end}_token")
            if settings.get(f"add_{end}_token") and token:
                parts[end] = f"{token}:0"
                ids[token] = self.tokenizer.token_to_id(token)
        template = [part for part in parts.values() if part]
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(ids.items())
        )

    def encode(self, text: str, bos: bool) -> list[int]:
        with refusing_panics():
            return self.tokenizer.encode(text, add_special_tokens=bos).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


def growth(part: dict) -> float:
    """How many times as long as a text that is which comes out of a normalizer or a decoder, at
    worst: one after the other may double it."""
    found = 1.0
    if part.get("type") == "Replace":
        replaced = part["pattern"].get("String") or " "  # an expression may find a letter
        found = max(found, len(part["content"]) / len(replaced))
    for inner in part.get("normalizers") or part.get("decoders") or []:
        found *= growth(inner)
    return found


@contextlib.contextmanager
def refusing_panics() -> Iterator[None]:
    """Within, what the package did not foresee, such as an expression that takes too long, becomes
    a Refusal. Rust would write pages to standard error and raise what is no Exception."""
    try:
        with silent():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Refusal(f"the package tokenizers cannot do that: {error}") from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within, nothing is written to standard error, by whatever."""
    try:
        before = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def tokenizer_files(directory: Path) -> str:
    is_one = is_there(directory / "tokenizer.json")
    return "tokenizer.json" if is_one else "vocab.json or merges.txt"


def read_content(
    directory: Path, settings: dict, config: dict
) -> tuple[str | dict, Builder | None]:
    """The text of a tokenizer.json and None; or, where a class builds the tokenizer, the content of
    that file, or of vocab.json and merges.txt put the same way, and what builds it. Raises Refusal
    for files of a class that is not known."""
    path = directory / "tokenizer.json"
    name = class_name(settings, config)
    if not is_there(path):
        if name not in OF_VOCAB:
            known = ", ".join(OF_VOCAB)
            raise Refusal(f"tokenizer_class is {name}, beside vocab.json expected one of {known}")
        return {"model": read_vocab(directory)}, BUILDERS[name]
    text = text_in(path)
    builder = builder_of_json(name, config.get("model_type"), text)
    if builder:
        with refusing("tokenizer.json", ValueError, RecursionError):
            content = json.loads(text)
        model = content.get("model") or {}
        if isinstance(model.get("vocab"), dict) and "merges" in model:
            return content, builder
    return text, None


def read_vocab(directory: Path) -> dict:
    """The model of vocab.json and merges.txt. Raises Refusal."""
    path = directory / "merges.txt"
    if not is_there(path):
        raise Refusal("expected merges.txt beside vocab.json")
    merges = []
    for line in text_in(path).split("\n"):
        line = line.removesuffix("\r")
        if line and not line.startswith("#version"):
            merges.append(line.split(" "))
    if any(len(merge) != 2 for merge in merges):
        raise Refusal("merges.txt: expected two pieces a line")
    return {"vocab": read_json(directory / "vocab.json"), "merges": merges}


def rebuilt(content: dict, builder: Builder, settings: dict, tokens: SpecialTokens) -> str:
    """The text of a tokenizer.json with the vocabulary of `content` and the parts of a class."""
    unknown = tokens.named.get("unk_token")
    is_there = unknown and unknown.content in content["model"]["vocab"]
    parts = builder.parts(settings, unknown.content if is_there else None)
    model = {"type": "BPE"} | parts.pop("model")
    for name in ("vocab", "merges"):
        model[name] = content["model"][name]
    parts |= {"version": "1.0", "post_processor": content.get("post_processor"), "model": model}
    return json.dumps(parts)
