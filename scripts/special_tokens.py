"""Which tokens the files of a checkpoint directory add to a vocabulary, and which of them have a
name such as bos_token. Four files may say so; they are read as transformers 5 reads them."""

from dataclasses import dataclass, replace
from pathlib import Path

from scripts.checkpoint import read_json
from scripts.files import Refusal, refusing

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NEW_LIST = "extra_special_tokens"
OLD_LIST = "additional_special_tokens"
WRONG = (ValueError, TypeError, AttributeError)  # what wrong types of such settings raise


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands, or only where a word does (`single_word`). It
    takes the blanks on a side with it, where that is to be stripped. `normalized`: it is looked for
    in the normalized text. `special`: it prints nothing."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


def read_token(given: dict | str) -> AddedToken:
    """A text alone is a special token. Raises Refusal for what is no token."""
    if isinstance(given, str):
        return AddedToken(given, special=True, normalized=False)
    if not isinstance(given, dict) or not isinstance(given.get("content"), str):
        raise Refusal(f"expected a token, which is a text or has a content, not {given!r:.40}")
    flags = {name: given[name] for name in AddedToken.__dataclass_fields__ if name in given}
    return AddedToken(**{"normalized": not flags.get("special")} | flags)


def is_token(given) -> bool:
    return isinstance(given, str) or isinstance(given, dict) and "content" in given


def marked_special(given):
    """A token, else what is given."""
    return given | {"special": True} if isinstance(given, dict) and is_token(given) else given


def named_tokens(settings: dict, of_map: dict) -> dict[str, AddedToken]:
    """Those that have a name, the known names first. For these `of_map` counts more, for others the
    settings."""
    given = settings | of_map
    known = {name: given[name] for name in NAMES if given.get(name) not in (None, False)}
    given = of_map | settings
    others = {}
    for name, value in given.items():
        if name.endswith("_token") and name not in NAMES and is_token(value):
            others[name] = value
    for name in (NEW_LIST, OLD_LIST):
        if isinstance(given.get(name), dict):
            others |= given[name]
    return {name: read_token(value) for name, value in (known | others).items()}


def unnamed_tokens(settings: dict, of_map: dict) -> list[AddedToken]:
    """Those of the lists; what `of_map` lists by the older name counts only where nothing else
    does."""
    found = [settings.get(NEW_LIST) or settings.get(OLD_LIST), of_map.get(NEW_LIST)]
    named = [settings.get(name, {}) for name in (NEW_LIST, OLD_LIST)]
    if all(isinstance(given, dict) for given in named) and NEW_LIST not in of_map:
        found = [of_map.get(OLD_LIST)]
    lists = [listed for listed in found if isinstance(listed, list)]
    return [read_token(token) for listed in lists for token in listed]


class SpecialTokens:
    """The tokens of a directory: `named` by their names, `unnamed` ones, and `numbered` by the ids
    that files give them. `settings` are those of tokenizer_config.json, `defaults` what the class
    of the tokenizer calls by a name, `in_json` the added tokens of tokenizer.json by id."""

    def __init__(
        self,
        directory: Path,
        settings: dict,
        defaults: dict[str, str],
        in_json: dict[int, AddedToken],
    ):
        is_complete = "added_tokens_decoder" in settings  # older versions write two more files
        of_map = {}
        if not is_complete:
            given = read_json(directory / "special_tokens_map.json", {})
            of_map = {name: marked_special(value) for name, value in given.items()}
        with refusing("tokenizer_config.json or special_tokens_map.json", *WRONG):
            self.named = named_tokens(defaults | settings, of_map)
            self.unnamed = unnamed_tokens(settings, of_map)
            listed = unnamed_tokens(settings, {NEW_LIST: of_map.get(NEW_LIST)})
        self.numbered = in_json
        if is_complete:
            with refusing("tokenizer_config.json: added_tokens_decoder", *WRONG):
                decoder = settings["added_tokens_decoder"] or {}
                self.numbered = {int(i): read_token(token) for i, token in decoder.items()}
        else:
            older = read_json(directory / "added_tokens.json", {})
            self.numbered = self.flagged(older, listed) | in_json

    def flagged(self, ids: dict[str, int], listed: list[AddedToken]) -> dict[int, AddedToken]:
        """Tokens of which a file says no more than the ids: those that others name are special."""
        known = [self.named[name] for name in NAMES if name in self.named]
        special = {token.content for token in [*known, *listed]}
        found = {}
        for text, i in ids.items():
            found[i] = read_token({"content": text, "special": text in special})
        return found

    def all(self) -> list[AddedToken]:
        """Those that are special, whatever their ids."""
        return [*self.named.values(), *self.unnamed]

    def to_add(self, there: set[AddedToken]) -> list[AddedToken]:
        """What is to be added to a vocabulary that has the tokens `there`, in the order in which
        they get ids."""
        found = [token for _, token in sorted(self.numbered.items())]
        known = {token.content for token in [*there, *found]}
        for token in self.all():
            if token.content not in known:
                found.append(token)
                known.add(token.content)
        names = {token.content for token in self.named.values()}
        return [replace(t, special=t.special or t.content in names) for t in found]
