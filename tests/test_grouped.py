"""All leaves of a weight in one call (scripts/grouped.py): each has the bits it has alone."""

import functools

import pytest
import torch

from kernels import LeafPacked, cancelling
from scripts import exact_rows, grouped
from scripts.grouped import MOST_ROWS, GroupedLeaves

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = [1, 2, 5, 9, 16, 17, 24, 25, MOST_ROWS, MOST_ROWS + 1, 130]
SHAPES = [(96, 576, 3), (64, 1536, 3), (40, 320, 5), (64, 256, 8)]  # N, K and leaves


def case(N, K, leaves, dtype):
    """A packed weight, and inputs with which sums are near 0, so that their order shows."""
    x, weight = cancelling((130,), (N,), K, dtype)
    return LeafPacked(weight, weight[:, 0].clone(), leaves), x


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is known of an order, and a test may break it."""
    counts = functools.cache(grouped.grouped_counts.__wrapped__)
    monkeypatch.setattr(grouped, "grouped_counts", counts)


def watch(monkeypatch, broken_from=1000):
    """The numbers of rows that go through groups, backwards where there are so many."""
    seen = []
    product = grouped.grouped_product

    def watched(x, weight, leaves):
        seen.append(len(x))
        if len(x) < broken_from:
            return product(x, weight, leaves)
        flipped = weight.to_dense().flatten(1).flip(1).contiguous()
        x = x.unflatten(1, (leaves, -1)).flip(2).flatten(1)
        return product(x, grouped.grouped(list(flipped.chunk(leaves))), leaves)

    monkeypatch.setattr(grouped, "grouped_product", watched)
    return seen


def skip_without(packed, dtype):
    if grouped.with_groups(packed, dtype) is packed:
        pytest.skip("this processor has no such convolution")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_have_the_bits_of_leaves(shape, dtype, monkeypatch):
    """At any number of rows and threads, with a bias and without."""
    packed, x = case(*shape, dtype)
    skip_without(packed, dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # conftest.py sets it back
        layer = grouped.with_groups(packed, dtype)
        assert type(layer) is GroupedLeaves
        for n in ROWS:
            assert torch.equal(layer.products(x[:n]), packed.products(x[:n]))
            assert torch.equal(layer.forward(x[:n, None]), packed.forward(x[:n, None]))
    seen = watch(monkeypatch)
    for n in ROWS:
        layer.products(x[:n])
    assert set(seen) <= set(grouped.COUNTS) and len(seen) == len(ROWS) - 2


def test_a_wrong_group_is_seen(monkeypatch):
    """Rows at which it is wrong are computed leaf by leaf; the control is that nobody looks."""
    packed, x = case(96, 576, 3, FP32)
    skip_without(packed, FP32)
    grouped.grouped_counts.cache_clear()
    watch(monkeypatch, broken_from=9)
    layer = grouped.with_groups(packed, FP32)
    counts = grouped.grouped_counts(96, 192, FP32, torch.get_num_threads(), 3)
    assert counts and max(counts) == 8
    for n in ROWS:
        assert torch.equal(layer.products(x[:n]), packed.products(x[:n]))
    monkeypatch.setattr(grouped, "grouped_counts", lambda *shape: grouped.COUNTS)
    assert torch.equal(layer.products(x[:8]), packed.products(x[:8]))
    assert not torch.equal(layer.products(x[:9]), packed.products(x[:9]))


def test_what_has_no_groups_stays_as_it_is(monkeypatch):
    """A dtype that oneDNN does not have, another layout for one row, a leaf, a full memory."""

    def refuse(*given):
        raise RuntimeError

    packed, _ = case(96, 576, 3, FP32)
    prepared = functools.partial(exact_rows.prepared_exactly, dtype=FP32, one_slot=False)
    with monkeypatch.context() as patch:
        patch.setattr(grouped, "layout", lambda weight: torch.randn(9))
        assert prepared(packed, fits_twice=True) is packed
    grouped.grouped_counts.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(grouped, "grouped", refuse)
        assert prepared(packed, fits_twice=True) is packed
    grouped.grouped_counts.cache_clear()
    assert prepared(packed, fits_twice=False) is packed
    whole, _ = case(96, 576, 1, FP32)
    assert prepared(whole, fits_twice=True) is whole
    skip_without(packed, FP32)
    assert type(prepared(packed, fits_twice=True)) is GroupedLeaves
