"""Text to token ids and back, and the end tokens and the chat template, as a checkpoint directory
says."""

from pathlib import Path

from scripts import templates
from scripts.backends import JsonTokenizer, NoText
from scripts.checkpoint import read_json
from scripts.files import Refusal, is_there, refusing
from scripts.pipelines import OF_VOCAB, class_name
from scripts.sentencepieces import SentencePiece

FILES = "tokenizer.json, tokenizer.model, or vocab.json and merges.txt"


class TooLong(Refusal):
    """A text has more tokens than a context has room for."""


class Tokenizer:
    """The tokenizer, the end tokens (`eos_ids`) and the chat template of a checkpoint directory. Of
    None, which stands for random weights, there is no text. `hidden` are the tokens that print
    nothing, by their ids. Raises Refusal for files that cannot be read."""

    def __init__(self, directory: Path | None):
        self.eos_ids = set()
        self.template = None
        self.kind = NoText()
        self.hidden = {}
        self.lead = []  # ids that go first where ids are decoded
        self.lead_length = 0  # of their text
        self.context = None  # tokens of a conversation, as far as one knows
        if directory is None:
            return
        settings = read_json(directory / "tokenizer_config.json", {})
        config = read_json(directory / "config.json", {})
        self.context = config.get("max_position_embeddings")
        # The files are by strangers, and so are most packages that read them.
        with refusing(f"{directory}: expected readable files of a tokenizer", Exception):
            self.template = templates.find_template(directory, settings)
            self.kind = find_kind(directory, settings, config)
            self.hidden = self.kind.hidden
            self.eos_ids = end_ids(directory / "config.json")
            self.eos_ids |= end_ids(directory / "generation_config.json")
            self.eos_ids |= {i for i in [self.id_of("eos_token")] if i is not None}
            # Some drop a space before the first word. A completion goes on after a prompt, so its
            # first space is part of it: another word goes first.
            self.lead = self.encode("a", bos=False)
            self.lead_length = len(self.kind.decode(self.lead))

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

    def agrees(self, other: "Tokenizer") -> bool:
        """Whether the ids that both have are the same tokens: one may have more than the other."""
        tokens = {i: token for token, i in self.vocab().items()}
        return all(tokens.get(i, token) == token for token, i in other.vocab().items())

    def id_of(self, name: str) -> int | None:
        """The id of the token of that name, such as bos_token, if there is one."""
        return self.vocab().get(self.kind.named.get(name))

    def check_length(self, text: str, context: int, bos: bool = True) -> None:
        """Raise TooLong for a text that is far too long for a context. Of the longest ones no more
        is encoded than shows that: all of it would take minutes and gigabytes."""
        length = 16 * context + 1000
        while length < len(text):
            if len(self.encode(text[:length], bos)) > 2 * context:
                expected = f"expected 1 to {context} tokens (context)"
                raise TooLong(f"a text of {len(text)} characters is too long, {expected}")
            length *= 4

    def encode_chat(self, messages: list[dict], arguments: dict | None = None) -> list[int]:
        """The ids of a conversation by the checkpoint's template, ready for the next answer, where
        a user gives `arguments` to the template. Raises Refusal for what that can do wrong."""
        with refusing("the chat template failed", Exception):
            text = templates.render(self.template, messages, self.kind.named, arguments)
        if self.context:
            self.check_length(text, self.context, bos=False)
        with refusing("the chat template failed", Exception):
            return self.encode(text, bos=False)


def find_kind(directory: Path, settings: dict, config: dict) -> JsonTokenizer | SentencePiece:
    """By the files that there are. Raises Refusal where there are none."""
    name = class_name(settings, config)
    has = {file: is_there(directory / file) for file in ("tokenizer.model", "vocab.json")}
    is_json = is_there(directory / "tokenizer.json")
    if has["tokenizer.model"] and not is_json and not (has["vocab.json"] and name in OF_VOCAB):
        return SentencePiece(directory, settings, name)
    if not is_json and not has["vocab.json"]:
        raise Refusal(f"there are none, expected {FILES}")
    return JsonTokenizer(directory, settings, config)


def end_ids(path: Path) -> set[int]:
    """The end tokens that a file names, one or several. Raises Refusal."""
    given = read_json(path, {}).get("eos_token_id")
    ids = [i for i in (given if isinstance(given, list) else [given]) if i is not None]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise Refusal(f"{path.name}: eos_token_id is {given!r:.40}, expected ids, 0 or more")
    return set(ids)
