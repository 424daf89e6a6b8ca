"""The code that Triton and Inductor make of the GPU path for cards that need not be there."""

import collections
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import BATCH_INVARIANT, FAST, causal

pytest.importorskip("triton")
HERE = Path(__file__).parent


@functools.cache
def rows_of(script, *cards):
    """{card: the rows that a script of this folder prints of it}, in a process of its own, where
    nothing is interpreted."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent)
    command = [sys.executable, str(HERE / script), *map(str, cards)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = collections.defaultdict(list)
    for line in done.stdout.splitlines():
        card, *row = line.split("|")
        rows[int(card)].append(row)
    return rows


# Instructions for 64 x 64 weights in bfloat16 and 64 x 128 of 8 and of 4 bits, of up to 16 rows.
LAUNCHES = {"FastOps": 12, "RowOps": 13}  # of a layer
LAUNCHES |= {"noise_words": 1, "sort_keys": 1}  # of the sampler
LONGEST = {"bf16": 80, "int8": 300, "int4": 300}


@pytest.mark.slow
@pytest.mark.parametrize("card", [80, 89, 90])
def test_kernels_compile_for_real_cards(card):
    """For an A100, an L4 and an H100: they fit the shared memory of the smallest, and registers;
    what a product reads is on its way before it is wanted, its loop is short, and at every number
    of rows it is added by one kind of instruction in ascending k."""
    rows = rows_of("compile_triton.py", card)[card]
    # Of one of them also fp32, and two masks that a fork might write.
    assert len(rows) == 2 + (4 * 4 + 2 * 3 + 2 if card == 90 else 3 * 4 + 3)
    for kernel, name, which, shared, spilled, ahead, late, kinds, width, length in rows:
        most = 227 if card == 90 and kernel == "attention" else 99
        assert int(shared) <= most << 10, (kernel, name, which, shared)
        if kernel in ("rms_norm", "silu_mul"):
            assert int(spilled) == 0, (kernel, spilled)
        if kernel == "silu_mul":  # as PyTorch divides
            assert set(kinds.split(", ")) == {"div.rn.f32"}
        if kernel == "linear" and name != "fp32":  # which has no such instructions
            assert int(spilled) == 0, (name, which, spilled)
            assert int(ahead) > 0 and int(late) == 0, (name, which, ahead, late)
            want = "wgmma.mma_async k16" if card == 90 else "mma k16"
            assert kinds == want, (name, which, kinds)
            assert int(width) == 2, (name, which, width)
            assert which[:2] != "16" or 0 < int(length) <= LONGEST[name], (name, length)


@pytest.mark.slow
@pytest.mark.parametrize("card", [80, 89, 90])
def test_compiled_code_divides_and_rounds_as_eager_code_does(card):
    """Eager code divides exactly and rounds each product. The negative controls are the settings
    left out."""
    divisions = collections.defaultdict(list)
    fused = collections.Counter()
    kernels = collections.Counter()
    for setting, name, kinds, count in rows_of("compile_inductor.py", card)[card]:
        if setting == "launches":
            assert int(count) == LAUNCHES[name]
            continue
        kernels[setting] += 1
        fused[setting] += int(count)
        if kinds:
            divisions[setting].append(kinds)
    assert set(kernels.values()) == {kernels["exact"]}
    assert divisions["exact"] == ["div.rn.f32"] and fused["exact"] == 0
    assert divisions["without division"] == ["div.full.f32"]
    assert fused["without casts"] > 0


@pytest.mark.parametrize(
    "ops, tokens, calls",
    [(FAST, 1, False), (FAST, 2, True), (BATCH_INVARIANT, 1, False), (BATCH_INVARIANT, 2, True)],
    ids=["one token", "two tokens", "exact, one token", "exact, two tokens"],
)
def test_attention_of_one_token_is_traced(ops, tokens, calls):
    """A compiler sees what attention of one token is made of: loops that are quicker than the op
    that is called for all else, or with the flag PyTorch's attention, whose bits are kept."""
    torch.manual_seed(0)
    q = torch.randn(2, tokens, 6, 16)
    k, v = torch.randn(2, 2, tokens, 3, 16)
    caches = torch.randn(2, 2, 3, 128, 16)
    pos = torch.tensor([[40 + i for i in range(tokens)], [7 + i for i in range(tokens)]])
    mask = ops.mask(causal, pos, 64, torch.arange(6).view(3, 2), caches[0])
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def attention(k_cache, v_cache):
        return ops.attention(q, k, v, k_cache, v_cache, pos, mask, 0.25)

    want = attention(*caches.clone())
    found = torch.compile(attention, backend=backend, fullgraph=True)(*caches.clone())
    assert ("gpt_exact.attend.default" in targets) == calls
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, want) or not ops.exact
