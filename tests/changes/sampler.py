"""Draws of one token from known logits: what is far from the likeliest comes no more, what is near
comes as often as the formula says; 0 changes nothing, also beside a row that has another value."""

import math

import torch

from scripts.requests import Request
from scripts.sampler import Sampler

logits = torch.tensor([3.0, 1.0, 2.5, 0.0, 2.0])
pos_N = torch.arange(2000)


def drawn(*factors):
    """Tokens [B, 2000], a row for each factor; None leaves it out."""
    given = [{} if factor is None else {"smoothing": factor} for factor in factors]
    requests = [Request(0, "", [], temperature=1.0, **fields) for fields in given]
    sampler = Sampler(requests, torch.device("cpu"))
    logits_NV = logits.expand(2000 * len(requests), -1)
    tokens_N = sampler(logits_NV, pos_N.repeat(len(requests)), sampler.settings)
    return tokens_N.view(len(requests), -1)


plain = drawn(None)
assert set(plain[0].tolist()) == {0, 1, 2, 3, 4}
assert torch.equal(drawn(0.0), plain)
beside = drawn(4.0, 0.0)
assert torch.equal(beside[1:], plain)
assert set(beside[0].tolist()) == {0, 2, 4}  # of logits 0, 0.5 and 1 below the likeliest
share = (beside[0] == 2).float().mean().item()
weights = [math.exp(-4 * below**2) for below in (0, 0.5, 1)]
assert abs(share - weights[1] / sum(weights)) < 0.04
