"""Sampling without state: the noise for a token is a hash of (seed, sample, position, vocabulary
id), so that a draw depends on nothing that is drawn beside it. Letters in names are dimensions: B
rows of a batch, N draws, a whole number for each row, K candidates, V vocabulary."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from scripts.requests import Request

WORD = 0xFFFFFFFF
IDLE = Request(0, "", [], temperature=0)  # of a row that draws for nobody


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


def gumbel(key_B2: Tensor, pos_B: Tensor, ids_BK: Tensor) -> Tensor:
    """Gumbel noise [B, K], fp32: a pure function of (key, absolute position, vocabulary id). u =
    (hi + lo 2^-32) 2^-32 keeps its resolution near zero, where the large values come from."""
    keys = mix(key_B2 ^ mix(pos_B)[:, None]).T[:, :, None]
    hi, lo = mix(keys ^ mix(ids_BK ^ keys.flip(0))).float()
    u = hi * 2**-32 + (lo + 0.5) * 2**-64
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2**-24)))


def top(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest fp32 logits and their ids, by (value descending, id ascending): packed into one
    integer no two are alike."""
    V = logits_BV.shape[1]
    ids = torch.arange(V, device=logits_BV.device)
    bits = (logits_BV + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    packed = (ordered << 32 | (WORD - ids)).topk(min(k, V)).values
    ids = WORD - (packed & WORD)
    return logits_BV.gather(-1, ids), ids


class Sampler:
    """Draws a token for each row of a batch by that row's own request; None is an idle row."""

    def __init__(self, requests: list[Request | None], device: torch.device):
        rows = [self.settled(r or IDLE) for r in requests]

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([[getattr(r, name)] for r in rows], device=device, dtype=dtype)

        keys = torch.tensor([noise_key(r.seed, r.sample) for r in rows], device=device)
        dtypes = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float64}
        # In the order in which a draw takes them; each has a row a row of the batch.
        self.settings = [column(name, dtype) for name, dtype in dtypes.items()] + [keys]
        most = max(r.top_k for r in rows)
        self.k = 4 ** math.ceil(math.log(most, 4))  # of which there are few
        self.nucleus = any(r.top_p < 1 for r in rows)
        # What a CUDA graph of a draw has fixed. Tensors go into `settings`, which it is given.
        self.kind = (self.k, self.nucleus)

    @staticmethod
    def settled(request: Request) -> Request:
        """Temperature 0 means the likeliest token."""
        if request.temperature > 1e-30:
            return request
        return replace(request, temperature=1.0, top_k=1, top_p=1.0)

    def __call__(self, logits_NV: Tensor, pos_N: Tensor, settings: list[Tensor]) -> Tensor:
        """Tokens [N] for absolute positions from fp32 logits, N / B for each row in turn: the
        argmax of logits / temperature + Gumbel noise over the ids that top-k, then top-p keep, the
        lowest id on a tie. `settings` are those above, or what a CUDA graph has in their place."""
        values, ids = top(logits_NV, self.k)
        settings = (x.repeat_interleave(len(pos_N) // len(x), 0) for x in settings)
        temperature_N1, top_k_N1, top_p_N1, key_N2 = settings
        scaled = (values - values[:, :1]) / temperature_N1
        keep = torch.arange(ids.shape[1], device=ids.device) < top_k_N1
        if self.nucleus:
            weight = (scaled.exp() * keep * 2.0**40).long()  # integers add up alike in any order
            upto = weight.cumsum(-1)
            keep = keep & ((upto - weight < top_p_N1 * upto[:, -1:]) | (top_p_N1 == 1))
        score = torch.where(keep, scaled + gumbel(key_N2, pos_N, ids), float("-inf"))
        # No comparison with NaN holds: an id is drawn all the same, and its logprob tells of it.
        is_less = score < score.amax(-1, keepdim=True)
        return torch.where(is_less, logits_NV.shape[-1], ids).amin(-1)
