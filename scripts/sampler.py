"""Sampling without state: the noise for a token is a hash of (seed, sample, position, vocabulary
id), so that a draw depends on nothing that is drawn beside it. Letters in names are dimensions: B
rows of a batch, N draws, a whole number for each row, K candidates, V vocabulary, L places of a
text."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels import fill_up
from scripts.requests import Completion, Request

WORD = 0xFFFFFFFF
CHUNK = 16  # of neighbours in the vocabulary, of which the largest is found first
IDLE = Request(0, "", [], temperature=0)  # of a row that draws for nobody
FIELDS = {  # of a request that a draw takes, one number each
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
}
ALWAYS = ("temperature", "top_k", "top_p")  # what else no row has changed costs nothing


def mix(x):
    """A 32-bit hash of an int or int64 tensor (Wellons' hash-prospector). Its constants are below
    2^31, so that no product overflows."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & WORD
    return x ^ (x >> 15)


def noise_key(seed: int, sample: int) -> list[int]:
    """Two 32-bit words that key the noise of one completion."""
    keys = [0x9E3779B9, 0x85EBCA6B]
    for word in (seed & WORD, seed >> 32 & WORD, sample):
        keys = [mix(key ^ mix(word)) for key in keys]
    return keys


def noise_words(key_B2: Tensor, pos_B: Tensor, ids_BK: Tensor) -> Tensor:
    """Two 32-bit words of noise for each id, int64 [2, B, K]."""
    keys = mix(key_B2 ^ mix(pos_B).unsqueeze(1)).T.unsqueeze(2)
    return mix(keys ^ mix(ids_BK ^ keys.flip(0)))


def sort_keys(bits_BN: Tensor, ids_BN: Tensor) -> Tensor:
    """Of the bits of fp32 numbers, int32: int64 that ascend as the numbers do, and of equal ones as
    the ids descend."""
    bits_BN = torch.where(bits_BN == -(2**31), 0, bits_BN)  # -0 is 0
    ordered = (bits_BN ^ (bits_BN >> 31 & 0x7FFFFFFF)).long()
    return ordered << 32 | (WORD - ids_BN)


integer_parts = {"noise_words": noise_words, "sort_keys": sort_keys}


def compile_integer_parts() -> None:
    """From now on: a GPU would launch a kernel for each of some fifty operations. Of integers no
    compiler changes a bit."""
    for function in (noise_words, sort_keys):
        integer_parts[function.__name__] = torch.compile(function, fullgraph=True)


def gumbel(key_B2: Tensor, pos_B: Tensor, ids_BK: Tensor) -> Tensor:
    """Gumbel noise [B, K], fp32: a pure function of (key, absolute position, vocabulary id). u =
    (hi + lo 2^-32) 2^-32 keeps its resolution near zero, where the large values come from."""
    hi, lo = integer_parts["noise_words"](key_B2, pos_B, ids_BK).float()
    u = hi * 2**-32 + (lo + 0.5) * 2**-64
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2**-24)))


def top(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest fp32 logits and their ids, by (value descending, id ascending)."""
    B, V = logits_BV.shape
    if V <= k * CHUNK:
        ids = torch.arange(V, device=logits_BV.device)
        ids = largest(logits_BV, ids.expand(B, V), min(k, V))
    else:
        # They lie in the k chunks whose own largest come first: nothing else need be compared.
        chunks = fill_up(logits_BV, 0, -V % CHUNK, value=-math.inf).unflatten(1, (-1, CHUNK))
        numbers = torch.arange(chunks.shape[1], device=logits_BV.device)
        best_BK1 = largest(chunks.amax(-1), numbers.expand(B, -1), k)[..., None]
        values = chunks.gather(1, best_BK1.expand(-1, -1, CHUNK))
        ids = best_BK1 * CHUNK + torch.arange(CHUNK, device=logits_BV.device)
        ids = largest(values.flatten(1), ids.flatten(1), k)
    return logits_BV.gather(-1, ids), ids


def largest(values_BN: Tensor, ids_BN: Tensor, k: int) -> Tensor:
    """Which ids have the k largest fp32 values, by (value descending, id ascending): packed into
    one integer no two are alike."""
    keys_BN = integer_parts["sort_keys"](values_BN.view(torch.int32), ids_BN)
    return WORD - (keys_BN.topk(k).values & WORD)


def rounded_up(size: int) -> int:
    """To a power of four, of which there are few: each size has a CUDA graph of its own."""
    return 4 ** math.ceil(math.log(size, 4))


def padded(rows: Sequence[Sequence], fill: float, least: int = 1) -> Tensor:
    """Rows of several lengths as one tensor [B, `least` or more]."""
    size = rounded_up(max(least, *map(len, rows)))
    return torch.tensor([[*row, *[fill] * (size - len(row))] for row in rows])


def columns(rows: list[Request]) -> dict[str, Tensor]:
    """What a draw takes of each request, [B, 1], and the key of its noise, [B, 2]."""
    tables = {}
    for name, dtype in FIELDS.items():
        column = [[getattr(r, name)] for r in rows]
        is_changed = any(value != getattr(IDLE, name) for (value,) in column)
        if is_changed or name in ALWAYS:
            tables[name] = torch.tensor(column, dtype=dtype)
    return tables | {"key": torch.tensor([noise_key(r.seed, r.sample) for r in rows])}


def texts(rows: list[Request]) -> dict[str, Tensor]:
    """The ids of each prompt, with room for what follows, [B, L]."""
    if all(r.repetition_penalty == 1 for r in rows):
        return {}
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in rows)
    return {"text": padded([r.prompt_ids for r in rows], 0, longest + 1)}


def biases(rows: list[Request]) -> dict[str, Tensor]:
    """What is added to the logits of which ids, both [B, K]."""
    if not any(r.logit_bias for r in rows):
        return {}
    each = [r.logit_bias or {} for r in rows]
    amounts = [bias.values() for bias in each]
    return {"biased_ids": padded(each, WORD), "bias": padded(amounts, 0.0)}


def spread(values_NK: Tensor, ids_NK: Tensor, V: int) -> Tensor:
    """[N, V]: values at their ids, elsewhere 0. An id of V or more has no place there."""
    table = values_NK.new_zeros(len(values_NK), V + 1)
    return table.scatter_(1, ids_NK.clamp(max=V), values_NK)[:, :V]


def processed(logits_NV: Tensor, pos_N: Tensor, row: dict[str, Tensor]) -> Tensor:
    """Fp32 logits with what is asked for of these, in the order of transformers: a bias is added to
    some ids; then those that stand in the text before the position are divided by a penalty, or
    multiplied where they are below 0 (Keskar et al. 2019)."""
    V = logits_NV.shape[-1]
    if "bias" in row:
        logits_NV = logits_NV + spread(row["bias"], row["biased_ids"], V)
    if "text" in row:
        text_NL, penalty_N1 = row["text"], row["repetition_penalty"]
        is_before = torch.arange(text_NL.shape[1], device=pos_N.device) < pos_N[:, None]
        seen_NV = spread(is_before, torch.where(is_before, text_NL, V), V)
        is_less = logits_NV < 0
        penalized = torch.where(is_less, logits_NV * penalty_N1, logits_NV / penalty_N1)
        logits_NV = torch.where(seen_NV, penalized, logits_NV)
    return logits_NV


class Sampler:
    """Draws a token for each row of a batch by that row's own request; None is an idle row. A draw
    that penalizes repetition looks at the text before it, by position: the prompt, and what `read`
    is told. As in a cache, what is wrong there is overwritten before anybody looks."""

    def __init__(self, requests: Sequence[Request | None], device: torch.device):
        rows = [self.settled(r or IDLE) for r in requests]
        tables = columns(rows) | texts(rows) | biases(rows)
        self.names = list(tables)
        self.settings = [x.to(device) for x in tables.values()]  # each has a row a row of the batch
        self.k = rounded_up(max(r.top_k for r in rows))
        self.nucleus = any(r.top_p < 1 for r in rows)
        # What a CUDA graph of a draw has fixed. Tensors go into `settings`, which it is given.
        self.kind = (self.k, self.nucleus, *self.names, *(x.shape for x in self.settings))

    @classmethod
    def of_slots(cls, slots: list[Completion | None], device: torch.device) -> "Sampler":
        """For completions that run; None is an idle slot."""
        rows = [c and replace(c.request, prompt_ids=c.ids) for c in slots]
        return cls(rows, device)

    def read(self, tokens_BT: Tensor, pos_BT: Tensor) -> None:
        """Tokens are fed at those positions, which a text may end before: drafts go on."""
        if "text" in self.names:
            text_BL = self.settings[self.names.index("text")]
            text_BL.scatter_(1, pos_BT.clamp(max=text_BL.shape[1] - 1), tokens_BT)

    def fork(self) -> "Sampler":
        """A sampler that may read something else from here on."""
        if "text" not in self.names:
            return self
        other = copy.copy(self)
        other.settings = [x.clone() for x in self.settings]
        return other

    @staticmethod
    def settled(request: Request) -> Request:
        """Temperature 0 means the likeliest token."""
        if request.temperature > 1e-30:
            return request
        return replace(request, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0)

    def __call__(self, logits_NV: Tensor, pos_N: Tensor, settings: list[Tensor]) -> Tensor:
        """Tokens [N] for absolute positions from fp32 logits, N / B for each row in turn: the
        argmax of logits / temperature + Gumbel noise over the ids that top-k, then top-p, then
        min-p keep, the lowest id on a tie. `settings` are those above, or what a CUDA graph has in
        their place."""
        each = len(pos_N) // len(settings[0])
        if each > 1:
            settings = [x.repeat_interleave(each, 0) for x in settings]
        row = dict(zip(self.names, settings, strict=True))
        logits_NV = processed(logits_NV, pos_N, row)
        if self.k == 1:
            return logits_NV.argmax(-1)  # of equal ones the first
        values, ids = top(logits_NV, self.k)
        scaled = (values - values[:, :1]) / row["temperature"]
        keep = torch.arange(ids.shape[1], device=ids.device) < row["top_k"]
        if self.nucleus:
            weight = (scaled.exp() * keep * 2.0**40).long()  # integers add up alike in any order
            upto = weight.cumsum(-1)
            keep = keep & ((upto - weight < row["top_p"] * upto[:, -1:]) | (row["top_p"] == 1))
        if "min_p" in row:
            keep = keep & (scaled.exp() >= row["min_p"])  # the likeliest has 1 there
        noise = gumbel(row["key"], pos_N, ids)
        score = torch.where(keep, scaled + noise, float("-inf"))
        # No comparison with NaN holds: an id is drawn all the same, and its logprob tells of it.
        is_less = score < score.amax(-1, keepdim=True)
        return torch.where(is_less, logits_NV.shape[-1], ids).amin(-1)
