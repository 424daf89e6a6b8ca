"""Tensor parallelism: `torchrun --nproc_per_node=3 generate.py ...` starts ranks that share a model. Which weight is
cut along which axis, so that a block needs two sums over ranks and no other exchange:
    q, k, v    outputs, by heads; ranks share a KV head where there are more ranks than those
    gate, up   outputs
    o, down    inputs: the products of ranks are added
    head       outputs, by vocabulary: logits are gathered whole
Experts are cut like any gate, up and down. Norms, routers, caches of a rank's own heads, sampling and all else run at
every rank alike; the embedding, of which a token reads one row, is whole at each."""

import datetime
import math
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import add_leaves, leaf_count, opaque

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
say = lambda *words, **options: rank or print(*words, file=sys.stderr, flush=True, **options)
progress = lambda *words, **options: sys.stderr.isatty() and say(*words, **options)


def start() -> None:
    """Join the other ranks, if torchrun has started some, of which only the first prints."""
    if world > 1:
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # as long as a user may think


def degrees(config, exact: bool) -> list[int]:
    """How many ranks can share a model: whole heads and groups, and whole subtrees of leaves if bits count."""
    group, heads = config.group_size if config.mode == "int4" else 1, config.n_kv_heads
    inputs = config.n_heads * config.head_dim, config.ffn_dim  # of the layers whose products are added
    leaves = math.gcd(*(leaf_count(heads, K, max(group, 32)) for K in inputs)) if exact else 0
    whole = lambda n: not any(x % n for x in (config.n_heads, config.vocab_size, leaves, *(K // group for K in inputs)))
    return [n for n in range(1, config.n_heads + 1) if whole(n) and (heads % n == 0 or n % heads == 0)]


def part(tensor: Tensor, axis: int, ranks: int, unit: int = 1) -> Tensor:
    """This rank's part along an axis, in whole units, of which ranks may share one; all of what has no such axis."""
    if tensor.dim() <= axis or tensor.shape[axis] == 1:
        return tensor
    pieces = min(ranks, tensor.shape[axis] // unit)
    return tensor.chunk(pieces, axis)[rank % ranks * pieces // ranks]


def agreed(work: Callable, alone: bool = False) -> Callable:
    """The same function for all ranks to call, or if it is the first rank's `alone`, to be told what it returns there.
    A ValueError or OSError of any rank is raised at all of them: none waits for one that has left."""

    def work_of_all(*args, **options):
        if not dist.is_initialized():
            return work(*args, **options)
        result = error = None
        try:
            result = work(*args, **options) if not (alone and rank) else None
        except (ValueError, OSError) as e:
            error = e
        exchange(dist.all_gather_object, found := [None] * world, (error, result if alone else None))
        for error in (e for e, _ in found if e):
            raise error
        return found[0][1] if alone else result

    return work_of_all


def exchange(collective: Callable, *args) -> None:
    try:
        collective(*args)
    except RuntimeError as e:  # an OSError is one line for the user
        raise ConnectionError("another process has stopped") from e


@opaque("all_reduce(Tensor x) -> Tensor", torch.empty_like)
def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks, in any order."""
    exchange(dist.all_reduce, x := x.clone())
    return x


@opaque("all_gather(Tensor x) -> Tensor", lambda x: x.new_empty(world, *x.shape))
def all_gather(x: Tensor) -> Tensor:
    """[world, *x.shape]: the collective moves numbers and adds none."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    exchange(gather, y := x.new_empty(world * len(x), *x.shape[1:]), x.contiguous())
    return y.view(world, *x.shape)


def add_up(y: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    """The sum over ranks, then the bias. Exact: in fp32, each rank's subtree in its place of the tree of leaves."""
    if exact:
        return add_leaves(all_gather(y.float()).movedim(0, -2), bias)
    return all_reduce(y) if bias is None else all_reduce(y) + bias
