"""Text to token ids and back, as a checkpoint directory says: a tokenizer.json, or a sentencepiece
model, and a chat template."""

import re
import time
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from scripts.checkpoint import Refusal, read_json, refusing

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that a template may name


class NoText:
    """What random weights have: ids that mean nothing."""

    def encode(self, text: str, bos: bool) -> list[int]:
        raise Refusal("random weights have no tokenizer: give --prompt a number of tokens")

    def decode(self, ids: list[int]) -> str:
        return ""

    def vocab(self) -> dict[str, int]:
        return {}


class JsonTokenizer:
    """A tokenizer.json. It says itself what BOS is, and whether a text begins with it."""

    def __init__(self, path: Path):
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # Some are saved with a length to cut and to fill texts to, which are for training.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str, bos: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=bos).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


class SentencePiece:
    """A tokenizer.model. Tokens that were added to it, and whether a text begins with BOS, are in
    tokenizer_config.json: `settings`."""

    def __init__(self, path: Path, settings: dict):
        from sentencepiece import SentencePieceProcessor

        self.pieces = SentencePieceProcessor(model_file=str(path))
        added = settings.get("added_tokens_decoder", {})
        control = [i for i in range(len(self.pieces)) if self.pieces.is_control(i)]
        self.special = {token["content"]: int(i) for i, token in added.items()}
        self.special |= {self.pieces.id_to_piece(i): i for i in control}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.marks = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.add_bos = settings.get("add_bos_token", True) and self.pieces.bos_id() >= 0

    def encode(self, text: str, bos: bool) -> list[int]:
        """With `bos`, of a plain prompt, where what looks like a special token is text; without, of
        a rendered template, where it is that token."""
        if bos:
            return self.pieces.encode(text, add_bos=self.add_bos)
        ids = []
        for part in self.marks.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i < len(self.pieces)])

    def vocab(self) -> dict[str, int]:
        pieces = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces))}
        return pieces | self.special


class Tokenizer:
    """The tokenizer, the end tokens (`eos_ids`) and the chat template of a checkpoint directory. Of
    None, which stands for random weights, there is no text. Raises Refusal for files that cannot be
    read."""

    def __init__(self, directory: Path | None):
        self.eos_ids = set()
        self.settings = {}  # of tokenizer_config.json
        self.template = None
        self.kind = NoText()
        self.lead = []  # ids that go first where ids are decoded
        self.lead_length = 0  # of their text
        if directory is None:
            return
        self.settings = read_json(directory / "tokenizer_config.json", {})
        config = read_json(directory / "config.json", {})
        config |= read_json(directory / "generation_config.json", {})
        # The files are by strangers, and so are most packages that read them.
        with refusing(f"{directory}: expected readable files of a tokenizer", Exception):
            eos = config.get("eos_token_id")
            self.eos_ids = set(eos if isinstance(eos, list) else [eos]) - {None}
            self.template = self.find_template(directory / "chat_template.jinja")
            if (directory / "tokenizer.json").exists():
                self.kind = JsonTokenizer(directory / "tokenizer.json")
            else:
                self.kind = SentencePiece(directory / "tokenizer.model", self.settings)
            # Some drop a space before the first word. A completion goes on after a prompt, so its
            # first space is part of it: another word goes first.
            self.lead = self.encode("a", bos=False)
            self.lead_length = len(self.kind.decode(self.lead))

    def find_template(self, path: Path) -> str | None:
        """A file of its own goes before the settings, which may have a list of several by name."""
        if path.exists():
            return path.read_text(encoding="utf-8")
        given = self.settings.get("chat_template")
        if isinstance(given, list):
            given = {named["name"]: named["template"] for named in given}.get("default")
        return given

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a plain prompt, which begins with BOS if the checkpoint has it so; without
        `bos`, of a text that says itself where special tokens are."""
        return self.kind.encode(text, bos)

    def decode(self, ids: list[int]) -> str:
        """The text of ids that go on after others; special tokens are left out."""
        return self.kind.decode(self.lead + ids)[self.lead_length :]

    def vocab(self) -> dict[str, int]:
        """The id of each token."""
        return self.kind.vocab()

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation by the checkpoint's template, ready for the next answer. Raises
        Refusal for whatever a template can do wrong."""
        with refusing("the chat template failed", Exception):
            return self.encode(self.render(messages), bos=False)

    def render(self, messages: list[dict]) -> str:
        """A template is code by strangers, so it runs in a sandbox."""
        if not self.template:
            raise Refusal("there is none")
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
        sandbox.globals |= {"tools": None, "documents": None}
        for name in SPECIAL_TOKENS:
            token = self.settings.get(name) or ""
            sandbox.globals[name] = token["content"] if isinstance(token, dict) else token
        # {% generation %} marks an answer for training. It becomes a block that does nothing.
        template = re.sub(r"({%-?\s*(end)?)generation\b", r"\1with", self.template)
        return sandbox.from_string(template).render(messages=messages, add_generation_prompt=True)


def raise_exception(message: str):
    """What templates call to refuse a conversation."""
    raise Refusal(message)
