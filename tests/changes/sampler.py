"""Draws of one token from known logits: all that is likely enough, nothing else; 0 keeps what it
was."""

import torch

from scripts.requests import Request
from scripts.sampler import Sampler

logits_NV = torch.tensor([3.0, 1.0, 2.5, 0.0, 2.0]).expand(2000, -1)
pos_N = torch.arange(2000)


def drawn(**settings):
    request = Request(0, "", [], temperature=1.0, **settings)
    sampler = Sampler([request], torch.device("cpu"))
    return set(sampler(logits_NV, pos_N, sampler.settings).tolist())


assert drawn() == drawn(min_p=0.0) == {0, 1, 2, 3, 4}
assert drawn(min_p=0.3) == {0, 2, 4}  # exp(-1) is more than 0.3, exp(-2) is less
assert drawn(min_p=1.0) == {0}
