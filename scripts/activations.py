"""Feed-forward networks with another activation than SiLU, for Block.feed_forward."""

import math

import torch.nn.functional as F
from torch import Tensor

from kernels import sigmoid
from model import FeedForward


class GeluFeedForward(FeedForward):
    """GEGLU: down(gelu(gate(x)) * up(x)) (Shazeer 2020), with the tanh form of GELU (Hendrycks and
    Gimpel 2016)."""

    def inner(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        gate, up = gate_up.chunk(2, dim=-1)
        if not self.ops.exact:
            return F.gelu(gate, approximate="tanh") * up
        gate, up = gate.float(), up.float()
        # (1 + tanh u) / 2 is the sigmoid of 2 u, which is opaque to a compiler.
        twice_u = (gate + gate * gate * gate * 0.044715) * math.sqrt(8 / math.pi)
        return (sigmoid(twice_u) * gate * up).to(gate_up.dtype)
