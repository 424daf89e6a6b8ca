"""The sampler: its hash and noise, what distribution it draws from, what top-k and top-p keep, and
that no row of a batch knows of another."""

import math

import pytest
import torch
from helpers import CPU, fits

from scripts import sampler as sampling
from scripts.requests import Request
from scripts.sampler import Sampler, gumbel, mix, noise_key, top


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(requests, logits_NV, pos_N):
    """Tokens [N], for N / B positions of each request in turn."""
    sampler = Sampler(requests, CPU)
    return sampler(logits_NV, pos_N, sampler.settings)


# ---- the hash and the noise


def test_mix_avalanche():
    """Every input bit flips every output bit half of the time, ints and tensors agree, and nothing
    collides."""
    words = torch.randint(0, 2**32, (8192,), generator=seeded(0))
    mixed = mix(words)
    assert mixed.tolist()[:100] == [mix(word) for word in words.tolist()[:100]]
    flips = torch.stack([mixed ^ mix(words ^ (1 << bit)) for bit in range(32)])
    rate = torch.stack([(flips >> bit & 1).double().mean(1) for bit in range(32)])
    assert (rate - 0.5).abs().max() < 0.05  # 9 standard deviations
    in_a_row = mix(torch.arange(1 << 18))
    assert len(in_a_row.unique()) == 1 << 18
    assert 0 <= in_a_row.min() and in_a_row.max() < 2**32


def test_noise_is_gumbel():
    """Mean, variance and tails of 2 million draws."""
    keys = torch.tensor([noise_key(seed, 0) for seed in range(20)])
    ids = torch.arange(1000)[None]
    noise = torch.cat([gumbel(keys, torch.full((20,), pos), ids) for pos in range(100)]).double()
    assert abs(noise.mean() - 0.5772157) < 5 * 1.2825 / 2e6**0.5
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    for x in (-2, -1, 0, 1, 2, 5, 8):
        p = math.exp(-math.exp(-x))
        assert abs((noise <= x).double().mean() - p) < 5 * (p * (1 - p) / 2e6) ** 0.5


def test_noise_keyed_by_all():
    """Another seed (all 64 bits and the sign), sample or position is other, uncorrelated noise, in
    any row."""
    cases = [(1234, 0, 5), (1235, 0, 5), (1234, 1, 5), (1235, 1, 5), (1234, 0, 6), (1234, 5, 0)]
    cases += [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    cases += [(-1, 0, 5), (1234 + 2**32, 0, 5), (1234 + 2**63, 0, 5)]
    ids = torch.arange(20000)[None]
    keys = torch.tensor([noise_key(seed, sample) for seed, sample, _ in cases])
    pos = torch.tensor([pos for _, _, pos in cases])
    together = gumbel(keys, pos, ids)
    correlation = torch.corrcoef(together.double()) - torch.eye(len(cases))
    assert correlation.abs().max() < 0.04  # the standard deviation is 0.007
    rows = [gumbel(keys[i, None], pos[i, None], ids) for i in range(len(cases))]
    assert torch.equal(together, torch.cat(rows))


def test_integers_are_alike_compiled(monkeypatch):
    """As a GPU has them. The negative control: with floats in place of integers bits differ."""
    monkeypatch.setattr(sampling, "integer_parts", dict(sampling.integer_parts))
    keys = torch.randint(2**32, (5, 2), generator=seeded(0))
    ids = torch.randint(2**17, (5, 300), generator=seeded(1))
    values = torch.randn(5, 300, generator=seeded(2)).repeat(1, 2)
    values[0, :7] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45])
    given = {
        "noise_words": (keys, torch.tensor([0, 1, 7, 500, 131071]), ids),
        "sort_keys": (values.view(torch.int32), ids.repeat(1, 2)),
    }
    parts = dict(sampling.integer_parts)
    assert parts.keys() == given.keys()
    sampling.compile_integer_parts()
    for name, compiled in sampling.integer_parts.items():
        assert compiled is not parts[name]
        assert torch.equal(compiled(*given[name]), parts[name](*given[name]))

    def scaled(x):
        return x.exp() / 3 + x * 1.7

    assert not torch.equal(torch.compile(scaled)(values[1:]), scaled(values[1:]))


@pytest.mark.parametrize("word", [0, sampling.WORD], ids=["zero", "ones"])
def test_noise_finite_at_the_ends(monkeypatch, word):
    """u rounds neither to 0 nor to 1, and resolves far less than 2^-24: the noise is finite, at
    most about 45."""
    monkeypatch.setattr(sampling, "mix", lambda x: x * 0 + word)
    noise = gumbel(torch.tensor([[0, 0]]), torch.tensor([0]), torch.arange(4)[None])
    assert noise.isfinite().all()
    assert (noise > 40).all() if word == 0 else (noise < -2.5).all()


def test_least_noise_keeps_the_filter():
    """Seed 1234 at position 1588 gives token 48572 the least noise there is, u = 1 - 2^-25 or
    nearer to 1. It still is the only token that top_k = 1 keeps, whatever the batch-mate wants."""
    logits = torch.zeros(2, 49152)
    logits[:, 48572] = 5.0
    requests = [Request(0, "", [], top_k=1), Request(1, "", [], top_k=50)]
    assert draw(requests, logits, torch.tensor([1588, 1588]))[0] == 48572


# ---- the distribution


LOGITS = [2.0, 1.2, 1.2, 0.3, -0.4, -1.0, 0.9, -2.5]  # with a tie


def exact(temperature, top_k, top_p):
    """Probabilities by the definition: (value descending, id ascending), k of them, up to the one
    that crosses p."""
    order = sorted(range(len(LOGITS)), key=lambda i: (-LOGITS[i], i))[:top_k]
    weights = [math.exp(LOGITS[i] / temperature) for i in order]
    kept = {}
    before = 0.0
    for i, weight in zip(order, weights, strict=True):
        if before < top_p * sum(weights):
            kept[i] = weight
        before += weight
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(LOGITS))]


def counts(temperature, top_k, top_p, seeds=100, positions=200):
    """How often each token was drawn, over seeds and positions: 20,000 draws."""
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    requests = [Request(0, "", [], seed=seed, **fields) for seed in range(seeds)]
    logits = torch.tensor([LOGITS]).expand(seeds * positions, -1)
    drawn = draw(requests, logits, torch.arange(positions).repeat(seeds))
    return drawn.bincount(minlength=len(LOGITS)).tolist()


SETTINGS = [
    (1.0, 200, 1.0),
    (0.8, 200, 1.0),
    (2.5, 200, 1.0),
    (0.3, 200, 1.0),
    (1.0, 3, 1.0),
    (1.0, 2, 1.0),
    (0.8, 1, 1.0),
    (1.0, 200, 0.9),
    (1.0, 200, 0.5),
    (1.5, 200, 0.999),
    (0.7, 5, 0.8),
    (1.3, 4, 0.95),
    (1.0, 200, 1e-9),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution(setting):
    observed = counts(*setting)
    assert sum(observed) == 20_000
    assert fits(observed, exact(*setting))


def coarse(key, pos, ids):
    """Gumbel noise from a uniform number of four bits."""
    word = mix(key[:, :1] ^ mix(pos)[:, None] ^ ids)
    return -torch.log(-torch.log1p(-(word % 16 + 0.5) / 16))


BROKEN_NOISE = {
    "low resolution": coarse,
    "tail on the wrong side": lambda key, pos, ids: -gumbel(key, pos, ids),
    "uniform": lambda key, pos, ids: torch.exp(-torch.exp(-gumbel(key, pos, ids))),
    "scaled": lambda key, pos, ids: 1.1 * gumbel(key, pos, ids),
    "deaf to the position": lambda key, pos, ids: gumbel(key, pos * 0, ids),
    "deaf to the seed": lambda key, pos, ids: gumbel(key * 0, pos, ids),
    "deaf to the id": lambda key, pos, ids: gumbel(key, pos, ids * 0),
}


@pytest.mark.parametrize("noise", BROKEN_NOISE.values(), ids=BROKEN_NOISE)
def test_broken_noise_fails(monkeypatch, noise):
    """The same test tells a wrong sampler from a right one."""
    monkeypatch.setattr(sampling, "gumbel", noise)
    assert not fits(counts(1.0, 200, 1.0), exact(1.0, 200, 1.0))


WRONG_SETTINGS = {  # what was drawn with, and what was meant
    "temperature": ((0.9, 200, 1.0), (1.0, 200, 1.0)),
    "one too many": ((1.0, 4, 1.0), (1.0, 3, 1.0)),
    "tie dropped": ((1.0, 2, 1.0), (1.0, 3, 1.0)),
    "the crossing token dropped": ((1.0, 200, 0.6), (1.0, 200, 0.9)),
    "top-p ignored": ((1.0, 200, 1.0), (1.0, 200, 0.9)),
}


@pytest.mark.parametrize("drawn, meant", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings_fail(drawn, meant):
    assert not fits(counts(*drawn), exact(*meant))


# ---- filters and ties


def test_top_breaks_ties_by_id():
    values = [0.0, -0.0, 3.5, 3.5, -7.0, float("-inf"), 3.5, 0.0]
    values += [2.0**-149, -(2.0**-149), 2.0**127, -(2.0**127)]
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for k in (1, 2, 3, 5, 12, 50):
        got_values, got_ids = top(torch.tensor([values, values]), k)
        assert got_ids.tolist() == [want[:k]] * 2
        assert got_values.tolist()[0] == [values[i] for i in want[:k]]


@pytest.mark.parametrize("V", [5000, 4096, 300])
@pytest.mark.parametrize("k", [1, 7, 64, 256])
def test_top_of_many_with_ties(V, k):
    """By chunks, where there are enough of them, as by a stable sort of all. Of the rows one has
    few values, one is ordered, one has infinities."""
    torch.manual_seed(V + k)
    rows = torch.randn(5, V)
    rows[1] = rows[1].round()
    rows[2] = rows[2].sort().values
    rows[3, V // 2 :] = float("-inf")
    rows[4] = float("-inf")
    values, ids = top(rows, k)
    want = rows.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, want.indices[:, :k])
    assert torch.equal(values, want.values[:, :k])


def test_chunks_by_their_value_alone_lose_a_tie(monkeypatch):
    """The negative control: of chunks with the same largest value, the last ones."""
    rows = torch.zeros(1, 4096)
    assert top(rows, 4)[1].tolist() == [[0, 1, 2, 3]]
    monkeypatch.setattr(sampling, "largest", lambda values, ids, k: ids[:, -k:])
    assert top(rows, 4)[1].tolist() != [[0, 1, 2, 3]]


def drawn_ids(logits, n=600, **fields):
    """All that is drawn at positions 0 to n - 1."""
    logits_NV = torch.tensor([logits]).expand(n, -1)
    return set(draw([Request(0, "", [], **fields)], logits_NV, torch.arange(n)).tolist())


def test_top_k_keeps_exactly_k():
    """All values equal: the first k ids and no others."""
    for k in (1, 2, 5):
        assert drawn_ids([1.0] * 9, top_k=k) == set(range(k))
    tied = [0.0, 2.0, 1.0, 1.0, 1.0]
    assert drawn_ids(tied, n=3000, top_k=3, temperature=1.0) == {1, 2, 3}


HALVES = [math.log(2.0**-n) for n in (1, 2, 3, 3)]  # of probabilities 1/2, 1/4, 1/8, 1/8


def test_top_p_keeps_the_crossing_token():
    """As many as it takes to reach p, the one that crosses included."""
    cases = [(1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)]
    for top_p, kept in cases:
        assert drawn_ids(HALVES, top_p=top_p, temperature=1.0) == set(range(kept)), top_p


def test_top_p_after_top_k():
    """p is a share of what top-k kept: 0.6 of 1/2 + 1/4 is reached by the first token alone."""
    assert drawn_ids(HALVES, top_p=0.6, top_k=2, temperature=1.0) == {0}


def test_temperature_zero_is_argmax():
    """The lowest of the largest, whatever the seed, alone or beside rows that sample."""
    logits = torch.randn(4, 500, generator=seeded(0)).round(decimals=1)
    logits[0] = 0.0
    want = [int((row == row.max()).nonzero()[0]) for row in logits]
    greedy = [Request(i, "", [], temperature=0.0, seed=i) for i in range(4)]
    mixed = list(greedy)
    mixed[2] = Request(2, "", [], temperature=1.0)
    for pos in range(20):
        pos_N = torch.full((4,), pos)
        assert draw(greedy, logits, pos_N).tolist() == want
        drawn = draw(mixed, logits, pos_N).tolist()
        assert drawn[:2] + drawn[3:] == want[:2] + want[3:]


# ---- rows of a batch


FIELDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 1000, "seed": 1},
    {"temperature": 0.7, "top_k": 5, "seed": 2},
    {"temperature": 1.5, "top_p": 0.5, "seed": 3},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 1},
    {"temperature": 0.2, "top_k": 1, "seed": 9},
    {"temperature": 2.0, "top_k": 1000, "top_p": 0.99, "sample": 3},
]
IDLE = None
ORDERS = [
    [0, 1, 2, 3, 4, 5, 6],
    [6, 5, 4, 3, 2, 1, 0],
    [3, IDLE, 0, 4],
    [IDLE, 1, 2, IDLE, IDLE, 6],
    [2, 5],
    [1] * 5 + [4] * 20 + [6],
]


@pytest.fixture(scope="module")
def logits():
    return 3 * torch.randn(len(FIELDS), 2000, generator=seeded(0))


def batch_draws(order, logits, positions=40):
    """Tokens [positions] of each of the requests of FIELDS, drawn by rows in that order."""
    requests = [None if i is None else Request(i, "", [], **FIELDS[i]) for i in order]
    rows = torch.stack([logits[i or 0] for i in order])
    drawn = []
    for start in range(positions):
        pos = torch.tensor([start + (i or 0) for i in order])
        drawn.append(draw(requests, rows, pos))
    by_row = torch.stack(drawn, dim=1).tolist()
    return [(i, tokens) for i, tokens in zip(order, by_row, strict=True) if i is not None]


def test_draw_independent_of_batchmates(logits):
    """Same token alone, in any company (their top_k, top_p, temperature and seed) and in any
    place."""
    alone = dict(pair for i in range(len(FIELDS)) for pair in batch_draws([i], logits))
    for order in ORDERS:
        for i, tokens in batch_draws(order, logits):
            assert tokens == alone[i], (order, i)


def test_positions_of_a_row_are_drawn_together(logits):
    """Several positions a row, as speculation has them, are what each is alone."""
    chosen = [1, 4, 6]
    requests = [Request(i, "", [], **FIELDS[i]) for i in chosen]
    rows = logits[chosen].repeat_interleave(40, dim=0)
    pos = torch.cat([torch.arange(40) + i for i in chosen])
    drawn = draw(requests, rows, pos).view(3, 40).tolist()
    assert list(zip(chosen, drawn, strict=True)) == batch_draws(chosen, logits)


def test_noise_by_row_fails(monkeypatch, logits):
    """The comparison above sees noise that depends on the place in the batch."""

    def by_row(key, pos, ids):
        return gumbel(key, pos + torch.arange(len(pos)), ids)

    alone = batch_draws([1], logits)
    monkeypatch.setattr(sampling, "gumbel", by_row)
    assert batch_draws([1], logits) == alone
    assert dict(batch_draws(ORDERS[1], logits))[1] != alone[0][1]
