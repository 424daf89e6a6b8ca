"""Tensor parallelism: `torchrun --nproc_per_node=3 generate.py ...` starts ranks that share a
model. A block needs two sums over ranks and no other exchange, since its weights are cut like this:
    q, k, v    outputs, by heads; ranks share a KV head where there are more ranks than those
    gate, up   outputs
    o, down    inputs: the products of ranks are added
    head       outputs, by vocabulary: logits are gathered whole
Experts are cut like any gate, up and down. All else runs at all ranks alike, also the embedding."""

import math
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import add_leaves, leaf_count, opaque


def variable(name: str) -> int:
    """A number that torchrun sets, -1 where it is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else -1


world = max(variable("WORLD_SIZE"), 1)
rank = variable("RANK") if world > 1 else 0


def degrees(config, exact: bool) -> list[int]:
    """How many ranks can share a model: whole heads, groups and, if bits count, subtrees."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group = config.group_size if config.quantization == "int4" else 1
    summed = (heads * config.head_dim, config.intermediate_size)  # inputs of o and down
    sizes = [heads, config.vocab_size, *(K // group for K in summed)]
    if exact:
        sizes += [leaf_count(kv_heads, K, max(group, 32)) for K in summed]
    common = math.gcd(*sizes)
    divisors = [n for n in range(1, heads + 1) if common % n == 0]
    return [n for n in divisors if kv_heads % n == 0 or n % kv_heads == 0]


def part(tensor: Tensor, axis: int, ranks: int, unit: int = 1) -> Tensor:
    """This rank's part along an axis, in whole units, which ranks may share; all if it has none."""
    if tensor.dim() <= axis or tensor.shape[axis] == 1:
        return tensor
    pieces = min(ranks, tensor.shape[axis] // unit)
    return tensor.chunk(pieces, axis)[rank % ranks * pieces // ranks]


def exchange(collective: Callable, *args) -> None:
    try:
        collective(*args)
    except RuntimeError as e:  # an OSError is one line for the user
        cause = str(e).partition("\n")[0]  # CUDA goes on about how to look for it
        raise ConnectionError(f"another process has stopped, or this one failed: {cause}") from e


@opaque("all_reduce(Tensor x) -> Tensor", torch.empty_like)
def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks, in any order."""
    total = x.clone()
    exchange(dist.all_reduce, total)
    return total


@opaque("all_gather(Tensor x) -> Tensor", lambda x: x.new_empty(world, *x.shape))
def all_gather(x: Tensor) -> Tensor:
    """[world, *x.shape]: the collective moves numbers and adds none."""
    y = x.new_empty(world, *x.shape)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # till 2.12
    exchange(gather, y.flatten(0, 1), x.contiguous())
    return y


def add_up(y: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    """The sum over ranks, then the bias. Exact: in fp32, each rank's subtree in its place."""
    if exact:
        return add_leaves(all_gather(y.float()).unbind(0), bias)
    total = all_reduce(y)
    return total if bias is None else total + bias
