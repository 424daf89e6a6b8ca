"""A tokenizer.model of sentencepiece, where there is no tokenizer.json."""

import re
from collections.abc import Iterator
from pathlib import Path

from scripts.files import Refusal, read_file, refusing
from scripts.pipelines import BUILDERS
from scripts.special_tokens import AddedToken, SpecialTokens

# A model with such bytes behind it has another normalizer, as the last of a setting counts.
NO_SPACE_FIRST = b"\x1a\x02\x18\x00"  # add_dummy_prefix is false
AS_IT_IS = b"\x1a\x06\x12\x00\x18\x00\x20\x00"  # that, and letters and blanks stay as they are
PIECE, KIND = 1, 3  # fields of a model, and of a piece of it
USER_DEFINED = 4  # a kind
LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")


class SentencePiece:
    """Tokens that are added, and what goes before a text, are in tokenizer_config.json: `settings`.
    With `legacy` a space goes before each text between such tokens, else before one that goes
    first. Of class `name` LlamaTokenizer, texts stay as they are otherwise; else the model itself
    says what changes.

    `named` are tokens by their names, `hidden` by their ids: those that print nothing."""

    def __init__(self, directory: Path, settings: dict, name: str | None):
        from sentencepiece import SentencePieceProcessor

        content = read_file(directory / "tokenizer.model")
        with refusing("tokenizer.model", Exception):
            self.pieces = SentencePieceProcessor(model_proto=content)
            self.inner = SentencePieceProcessor(model_proto=content + NO_SPACE_FIRST)
            self.plain = SentencePieceProcessor(model_proto=content + AS_IT_IS)
        self.is_llama = name in LLAMA
        has_bytes = any(map(self.pieces.is_byte, range(len(self.pieces))))
        self.only_known = name == "LlamaTokenizer" and not has_bytes
        legacy = settings.get("legacy") if name != "CodeLlamaTokenizer" else False
        self.legacy = not self.is_llama if legacy is None else legacy
        self.prefix = settings.get("add_prefix_space") in (None, True)

        tokens = SpecialTokens(directory, settings, self.names(name), {})
        self.named = {name: token.content for name, token in tokens.named.items()}
        self.tokens = {}  # those that are found before a text is cut in pieces
        self.ids = {}
        self.add(self.known_tokens(content), tokens)
        self.hidden = {self.ids[text]: text for text, token in self.tokens.items() if token.special}
        self.shown = {i: text for text, i in self.ids.items() if i not in self.hidden}
        self.marks = sorted(self.tokens, key=len, reverse=True)
        groups = [f"({pattern(self.tokens[text])})" for text in self.marks]
        self.expression = re.compile("|".join(groups) or "(?!)")
        self.first = self.end("bos", settings.get("add_bos_token", True))
        self.last = self.end("eos", settings.get("add_eos_token", False))

    def names(self, name: str | None) -> dict[str, str]:
        """The tokens that have a name where no file gives them one."""
        names = dict(BUILDERS[name].names) if self.is_llama else {}
        for end in ("bos", "eos", "unk"):
            i = getattr(self.pieces, f"{end}_id")()
            if i >= 0:
                names[f"{end}_token"] = self.pieces.id_to_piece(i)
        return names

    def known_tokens(self, content: bytes) -> set[AddedToken]:
        """Those that the model itself has."""
        found = set()
        for i, kind in enumerate(kinds(content)):
            special = self.pieces.is_control(i)
            if special or kind == USER_DEFINED and self.is_llama:
                found.add(AddedToken(self.pieces.id_to_piece(i), normalized=False, special=special))
        return found

    def add(self, there: set[AddedToken], tokens: SpecialTokens) -> None:
        """A token has the id that it has in the model, else that of the piece whose place a file
        gives to it, else the next that is free."""
        places = {token.content: i for i, token in tokens.numbered.items()}
        size = len(self.pieces)
        free = size
        for token in [*there, *tokens.to_add(there)]:
            text = token.content
            i = self.pieces.piece_to_id(text)
            if self.pieces.id_to_piece(i) != text:
                i = self.ids.get(text, places.get(text, size))
            if i >= size and text not in self.ids:
                i = free
                free += 1
            if text:
                self.tokens[text] = token
                self.ids[text] = i

    def end(self, name: str, wanted: bool) -> list[int]:
        """What goes before or after a plain prompt: the token of that name, else the model's."""
        own = getattr(self.pieces, f"{name}_id")()
        i = self.ids.get(self.named.get(f"{name}_token"), own)
        return [i] if wanted and i >= 0 else []

    def encode(self, text: str, bos: bool) -> list[int]:
        """With `bos`, of a plain prompt; without, of a rendered template, which has all that goes
        around a text."""
        ids = []
        done = 0
        for found in self.expression.finditer(text):
            ids += self.encode_part(text[done : found.start()], is_first=done == 0)
            ids.append(self.ids[self.marks[found.lastindex - 1]])
            done = found.end()
        ids += self.encode_part(text[done:], is_first=done == 0)
        return [*self.first, *ids, *self.last] if bos else ids

    def encode_part(self, text: str, is_first: bool) -> list[int]:
        prefix = self.prefix and (self.legacy or is_first)
        if not text:
            return []
        if not self.is_llama:
            return (self.pieces if prefix else self.inner).encode(text)
        text = text.replace(" ", "▁")
        if prefix and not text.startswith("▁"):
            text = "▁" + text
        return self.plain.encode("".join(filter(self.is_known, text)))

    def is_known(self, letter: str) -> bool:
        """Class LlamaTokenizer leaves out what is neither a piece nor bytes."""
        return not self.only_known or self.pieces.piece_to_id(letter) != self.pieces.unk_id()

    def decode(self, ids: list[int]) -> str:
        text = ""
        run = []
        for i in ids:
            if i in self.shown:
                text += self.plain.decode(run) + self.shown[i]
                run = []
            elif i not in self.hidden and i < len(self.pieces):
                run.append(i)
        return text + self.plain.decode(run)

    def vocab(self) -> dict[str, int]:
        pieces = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces))}
        return pieces | self.ids


def pattern(token: AddedToken) -> str:
    """What finds a token in a text, with the blanks that it takes along."""
    found = re.escape(token.content)
    if token.single_word:
        found = rf"(?<!\w){found}(?!\w)"
    if token.lstrip:
        found = rf"\s*{found}"
    if token.rstrip:
        found = rf"{found}\s*"
    return found


def kinds(content: bytes) -> Iterator[int]:
    """The kind of each piece of a serialized model."""
    for number, piece in fields(content):
        if number == PIECE:
            yield dict(fields(piece)).get(KIND, 1)


def fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and values of a message of protocol buffers."""
    place = 0
    while place < len(content):
        key, place = read_number(content, place)
        kind = key % 8
        if kind == 0:
            value, place = read_number(content, place)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                size, place = read_number(content, place)
            value = content[place : place + size]
            place += size
        yield key // 8, value


def read_number(content: bytes, place: int) -> tuple[int, int]:
    """A number in bytes of seven bits, the lowest first, and the place behind it."""
    number = 0
    shift = 0
    while content[place] >= 128:
        if shift > 63:
            raise Refusal("tokenizer.model has a number of more than 64 bits")
        number += (content[place] - 128) << shift
        shift += 7
        place += 1
    return number + (content[place] << shift), place + 1
