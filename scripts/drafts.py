"""What drafts tokens for the engine of generate.py to check, and when it does not pay to draft."""

import torch

FED = 2  # tokens that a draft model is fed first: the last but one may be a draft nobody has fed


def agreement(a: list[int], b: list[int]) -> int:
    """How many ids two texts begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def within(ids: list[int], vocab_size: int) -> list[int]:
    """The ids for a table of that size: of those past it, which are no text, the first one."""
    return [i if i < vocab_size else 0 for i in ids]


class Pauses:
    """Whether drafts pay. After a round in which most slots accepted fewer than `pays` drafts, the
    engine drafts no more for a while, twice as long each time, up to 64 rounds."""

    def __init__(self, pays: float = 0):
        self.pays = pays
        self.length = 1
        self.left = 0

    def now(self) -> bool:
        """Whether this round is one of a pause."""
        self.left -= 1
        return self.left >= 0

    def record(self, accepted: list[int]) -> None:
        """The drafts that each slot has accepted in a round."""
        if sorted(accepted)[(len(accepted) - 1) // 2] >= self.pays:
            self.length = 1
        else:
            self.left = self.length
            self.length = min(2 * self.length, 64)


class PromptLookup:
    """Drafts what followed the last tokens where they stood before (Saxena 2023)."""

    pays = None  # how many accepted drafts a round needs is measured

    def __init__(self, k: int):
        self.k = k

    def propose(self, slots: list, sampler) -> list[list[int]] | None:
        """k drafts a slot. None where under half of the slots have any."""
        drafts = [self.follow(c.ids) if c else [] for c in slots]
        if 2 * sum(map(bool, drafts)) < sum(map(bool, slots)):
            return None
        return [draft or [0] * self.k for draft in drafts]

    def follow(self, ids: list[int]) -> list[int]:
        text = "".join(map(chr, ids))  # quick to search
        for n in (4, 3, 2):
            found = text.rfind(text[-n:], 0, -1)
            if found >= 0 and len(ids) > n:
                after = ids[found + n : found + n + self.k]
                return (after * self.k)[: self.k]  # it goes on into the drafts, and so comes again
        return []


class DraftModel:
    """Drafts by a smaller model, which draws with the noise that the model itself will draw
    with. The tables of the two may be padded to other sizes: the model takes ids under
    `vocab_size`, by default those of the smaller model."""

    def __init__(self, engine, k: int, vocab_size: int | None = None):
        self.engine = engine
        self.k = k
        self.own_size = engine.model.config.vocab_size
        self.vocab_size = vocab_size or self.own_size
        self.pays = k / 2
        self.fed = [[] for _ in engine.slots]  # the ids that each slot of its cache holds

    def propose(self, slots: list, sampler) -> list[list[int]] | None:
        """k drafts a slot. None where a text outgrows the context of the smaller model."""
        engine, texts = (
            self.engine,
            [within(c.ids, self.own_size) if c else [0] * FED for c in slots],
        )
        longest = max(map(len, texts)) + self.k
        if longest > engine.model.config.max_position_embeddings:
            return None
        if longest > engine.length:  # a conversation has grown
            engine.reserve(2 * longest)
            self.fed = [[] for _ in slots]
        for slot, ids in enumerate(texts):
            start = agreement(self.fed[slot], ids)
            if slots[slot] and start < len(ids) - FED:
                engine.prefill(ids[:-FED], slot, start)
        sampler = sampler.fork()
        drafts = []
        tokens = [ids[-FED:] for ids in texts]
        for i in range(self.k):  # all on the device, which nobody waits for
            starts = [len(ids) + i - len(tokens[0]) for ids in texts]
            tokens = engine.step(tokens, starts, sampler)[0][:, -1:]
            drafts.append(tokens)
        drafts = torch.cat(drafts, dim=1).tolist()
        self.fed = [ids + draft[:-1] for ids, draft in zip(texts, drafts, strict=True)]
        # What is past the model's table cannot be drawn, so another id is as good a draft.
        return [within(draft, self.vocab_size) for draft in drafts]
