"""Sampler, engine, text stream, tokenizers and compiling of generate.py, on tiny random checkpoints written here."""

import io
import json
import math
import random
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import kernels
from generate import Completion, Engine, Request, Sampler, Tokenizer
from kernels import FAST
from model import InputError, ModelConfig, Transformer, load_checkpoint

CPU = torch.device("cpu")
CONTEXT = 256
SPECIAL = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|stop|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the other dog jumps over the fox.",
    "A prompt is one line of text; the other lines are other prompts, and none knows of another.",
    "héllo wörld, 你好 世界, 🙂 naïve café",
] * 3


# ---- helpers, which test_cli.py uses too


def write_json(path, content):
    path.write_text(json.dumps(content))


def train_bpe(bos=False):
    """A byte-level tokenizer of a few hundred tokens, the special ones first; with `bos` it starts prompts so."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        start = [(SPECIAL[0], 0)]
        tokenizer.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A", special_tokens=start)
    return tokenizer


def write_weights(directory, vocab_size, seed=0, **config):
    """A random Llama of two layers by transformers; weights so large that greedy text does not run in circles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
    shape |= {"initializer_range": 0.3, "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": None}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**shape | config)).save_pretrained(directory)


def write_checkpoint(directory, bos=False, **config):
    """A tiny checkpoint directory with a byte-level tokenizer and a chat template; returns its path."""
    tokenizer = train_bpe(bos)
    write_weights(directory, tokenizer.get_vocab_size(), **config)
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = [SPECIAL.index("<|end|>"), SPECIAL.index("<|stop|>")]
    write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": ends})
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4], "chat_template": CHAT_TEMPLATE}
    write_json(directory / "tokenizer_config.json", settings)
    return directory


def load(directory, dtype=torch.float32):
    """Model and tokenizer of a directory."""
    config = ModelConfig.from_file(directory / "config.json")
    model = Transformer(config, FAST, CPU, dtype)
    load_checkpoint(model, directory)
    return model, Tokenizer(directory)


def random_ids(n, seed):
    return torch.randint(len(SPECIAL), 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def complete(engine, requests):
    """{(id, sample): finished completion}; the streamed pieces of each must add up to its text."""
    done, pieces = {}, {}
    for completion, text in engine.generate(requests):
        key = completion.request.id, completion.request.sample
        assert key not in done, "a completion went on after its end"
        pieces[key] = pieces.get(key, "") + text
        if completion.finish_reason:
            done[key] = completion
            assert pieces[key] == completion.text
            assert len(completion.logprobs) == len(completion.tokens)
    assert len(done) == len(requests)
    return done


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return load(tiny_dir)


# ---- the hash and the noise


def test_mix_avalanche():
    """Every input bit flips every output bit half of the time, ints and tensors agree, and nothing collides."""
    words = torch.randint(0, 2**32, (8192,), generator=torch.Generator().manual_seed(0))
    mixed = generate.mix(words)
    assert mixed.tolist()[:100] == [generate.mix(word) for word in words.tolist()[:100]]
    flips = torch.stack([mixed ^ generate.mix(words ^ (1 << bit)) for bit in range(32)])
    rate = torch.stack([(flips >> bit & 1).double().mean(1) for bit in range(32)])
    assert (rate - 0.5).abs().max() < 0.05  # 9 standard deviations
    in_a_row = generate.mix(torch.arange(1 << 18))
    assert len(in_a_row.unique()) == 1 << 18
    assert 0 <= in_a_row.min() and in_a_row.max() < 2**32


def test_noise_is_gumbel():
    """Mean, variance and tails of 2 million draws."""
    keys = torch.tensor([generate.noise_key(seed, 0) for seed in range(20)])
    noise = torch.cat([generate.gumbel(keys, torch.full((20,), pos), torch.arange(1000)[None]) for pos in range(100)])
    noise = noise.double()
    assert abs(noise.mean() - 0.5772157) < 5 * 1.2825 / 2e6**0.5
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    for x in (-2, -1, 0, 1, 2, 5, 8):
        p = math.exp(-math.exp(-x))
        assert abs((noise <= x).double().mean() - p) < 5 * (p * (1 - p) / 2e6) ** 0.5


def test_noise_keyed_by_all():
    """Another seed (all 64 bits and the sign), sample or position is other, uncorrelated noise, in any row."""
    cases = [(1234, 0, 5), (1235, 0, 5), (1234, 1, 5), (1235, 1, 5), (1234, 0, 6), (1234, 5, 0), (0, 0, 0), (0, 1, 0)]
    cases += [(1, 0, 0), (0, 0, 1), (-1, 0, 5), (1234 + 2**32, 0, 5), (1234 + 2**63, 0, 5)]
    ids = torch.arange(20000)[None]
    rows = [
        generate.gumbel(torch.tensor([generate.noise_key(*case[:2])]), torch.tensor(case[2:]), ids) for case in cases
    ]
    correlation = torch.corrcoef(torch.cat(rows).double()) - torch.eye(len(cases))
    assert correlation.abs().max() < 0.04  # the standard deviation is 0.007
    keys = torch.tensor([generate.noise_key(*case[:2]) for case in cases])
    together = generate.gumbel(keys, torch.tensor([case[2] for case in cases]), ids)
    assert torch.equal(together, torch.cat(rows))


@pytest.mark.parametrize("word", [0, generate.WORD], ids=["zero", "ones"])
def test_noise_finite_at_the_ends(monkeypatch, word):
    """u rounds neither to 0 nor to 1, and resolves far less than 2^-24: the noise is finite, at most about 45."""
    monkeypatch.setattr(generate, "mix", lambda x: x * 0 + word)
    noise = generate.gumbel(torch.tensor([[0, 0]]), torch.tensor([0]), torch.arange(4)[None])
    assert noise.isfinite().all()
    assert (noise > 40).all() if word == 0 else (noise < -2.5).all()


def test_least_noise_keeps_the_filter():
    """Seed 1234 at position 1588 gives token 48572 the least noise there is, u = 1 - 2^-25 or nearer to 1. It still is
    the only token that top_k = 1 keeps, whatever the batch-mate wants."""
    logits = torch.zeros(2, 49152)
    logits[:, 48572] = 5.0
    sampler = Sampler([Request(0, "", [], top_k=1), Request(1, "", [], top_k=50)], CPU)
    assert sampler(logits, torch.tensor([1588, 1588]))[0] == 48572


# ---- the distribution


LOGITS = [2.0, 1.2, 1.2, 0.3, -0.4, -1.0, 0.9, -2.5]  # with a tie


def exact(temperature, top_k, top_p):
    """Probabilities by the definition: (value descending, id ascending), k of them, up to the one that crosses p."""
    order = sorted(range(len(LOGITS)), key=lambda i: (-LOGITS[i], i))[:top_k]
    weights = [math.exp(LOGITS[i] / temperature) for i in order]
    kept, before = {}, 0.0
    for i, weight in zip(order, weights, strict=True):
        if before < top_p * sum(weights):
            kept[i] = weight
        before += weight
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(LOGITS))]


def counts(temperature, top_k, top_p, seeds=100, positions=200):
    """How often each token was drawn, over seeds and positions: 20,000 draws."""
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampler = Sampler([Request(0, "", [], seed=seed, **fields) for seed in range(seeds)], CPU)
    logits = torch.tensor([LOGITS]).expand(seeds, -1)
    drawn = torch.stack([sampler(logits, torch.full((seeds,), pos)) for pos in range(positions)])
    return drawn.flatten().bincount(minlength=len(LOGITS)).tolist()


def fits(observed, expected):
    """Pearson's chi-squared test of counts against probabilities. The critical value is the 1 - 1e-6 quantile, by
    Wilson and Hilferty's approximation (z = 4.753): a right sampler fails one such test in a million, and the draws are
    the same in every run. A token that cannot come must not have come; rare ones (fewer than 5 expected) are pooled."""
    total = sum(observed)
    if any(o and not p for o, p in zip(observed, expected, strict=True)):
        return False
    cells, rare = [], [0, 0.0]
    for o, p in zip(observed, expected, strict=True):
        if p * total >= 5:
            cells.append((o, p * total))
        else:
            rare = [rare[0] + o, rare[1] + p * total]
    cells += [tuple(rare)] if rare[1] > 0 else []
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    df = len(cells) - 1
    return statistic <= (df * (1 - 2 / (9 * df) + 4.753 * math.sqrt(2 / (9 * df))) ** 3 if df else 1e-9)


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
    return -torch.log(-torch.log1p(-(generate.mix(key[:, :1] ^ generate.mix(pos)[:, None] ^ ids) % 16 + 0.5) / 16))


GUMBEL = generate.gumbel
BROKEN_NOISE = {
    "low resolution": coarse,
    "tail on the wrong side": lambda key, pos, ids: -GUMBEL(key, pos, ids),
    "uniform": lambda key, pos, ids: torch.exp(-torch.exp(-GUMBEL(key, pos, ids))),
    "scaled": lambda key, pos, ids: 1.1 * GUMBEL(key, pos, ids),
    "deaf to the position": lambda key, pos, ids: GUMBEL(key, pos * 0, ids),
    "deaf to the seed": lambda key, pos, ids: GUMBEL(key * 0, pos, ids),
    "deaf to the id": lambda key, pos, ids: GUMBEL(key, pos, ids * 0),
}


@pytest.mark.parametrize("noise", BROKEN_NOISE.values(), ids=BROKEN_NOISE)
def test_broken_noise_fails(monkeypatch, noise):
    """The same test tells a wrong sampler from a right one."""
    monkeypatch.setattr(generate, "gumbel", noise)
    assert not fits(counts(1.0, 200, 1.0), exact(1.0, 200, 1.0))


@pytest.mark.parametrize(
    "drawn,meant",
    [
        ((0.9, 200, 1.0), (1.0, 200, 1.0)),
        ((1.0, 4, 1.0), (1.0, 3, 1.0)),
        ((1.0, 2, 1.0), (1.0, 3, 1.0)),
        ((1.0, 200, 0.6), (1.0, 200, 0.9)),
        ((1.0, 200, 1.0), (1.0, 200, 0.9)),
    ],
    ids=["temperature", "one too many", "tie dropped", "the crossing token dropped", "top-p ignored"],
)
def test_wrong_settings_fail(drawn, meant):
    assert not fits(counts(*drawn), exact(*meant))


# ---- filters, ties, independence


def test_top_breaks_ties_by_id():
    values = [0.0, -0.0, 3.5, 3.5, -7.0, float("-inf"), 3.5, 2.0**-149, -(2.0**-149), 2.0**127, -(2.0**127), 0.0]
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for k in (1, 2, 3, 5, 12, 50):
        got_values, got_ids = generate.top(torch.tensor([values, values]), k)
        assert got_ids.tolist() == [want[:k]] * 2
        assert got_values.tolist()[0] == [values[i] for i in want[:k]]


def drawn_ids(logits, n=3000, **fields):
    sampler = Sampler([Request(0, "", [], **fields)], CPU)
    return {int(sampler(torch.tensor([logits]), torch.tensor([pos]))) for pos in range(n)}


def test_top_k_keeps_exactly_k():
    """All values equal: the first k ids and no others."""
    for k in (1, 2, 5):
        assert drawn_ids([1.0] * 9, n=600, top_k=k) == set(range(k))
    assert drawn_ids([0.0, 2.0, 1.0, 1.0, 1.0], top_k=3, temperature=1.0) == {1, 2, 3}


@pytest.mark.parametrize("top_p,kept", [(1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)])
def test_top_p_keeps_the_crossing_token(top_p, kept):
    """Of probabilities 1/2, 1/4, 1/8, 1/8, as many as it takes to reach p, the one that crosses included."""
    logits = [math.log(2.0**-n) for n in (1, 2, 3, 3)]
    assert drawn_ids(logits, n=400, top_p=top_p, temperature=1.0) == set(range(kept))


def test_top_p_after_top_k():
    """p is a share of what top-k kept: half of 1/2 + 1/4 is reached by the first token alone."""
    assert drawn_ids([math.log(2.0**-n) for n in (1, 2, 3, 3)], n=400, top_p=0.6, top_k=2, temperature=1.0) == {0}


def test_temperature_zero_is_argmax():
    """The lowest of the largest, whatever the seed, alone or beside rows that sample."""
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    logits[0] = 0.0
    want = [int((row == row.max()).nonzero()[0]) for row in logits]
    greedy = [Request(i, "", [], temperature=0.0, seed=i) for i in range(4)]
    mixed = [Request(i, "", [], temperature=1.0) if i == 2 else r for i, r in enumerate(greedy)]
    for pos in range(20):
        assert Sampler(greedy, CPU)(logits, torch.full((4,), pos)).tolist() == want
        drawn = Sampler(mixed, CPU)(logits, torch.full((4,), pos)).tolist()
        assert drawn[:2] + drawn[3:] == want[:2] + want[3:]


def test_top_k_1_is_greedy_in_bf16(tiny_dir):
    """Logits of bf16 weights at top_k = 1 and temperature 0.01, four seeds: one text, the greedy one."""
    model, tokenizer = load(tiny_dir, torch.bfloat16)
    ids = random_ids(9, 0)
    engine = Engine(model, tokenizer, 1, 64)
    fields = [{"temperature": 0.0}] + [{"temperature": 0.01, "top_k": 1, "seed": seed} for seed in range(4)]
    done = complete(engine, [Request(i, "", ids, max_new_tokens=30, **f) for i, f in enumerate(fields)])
    assert len({tuple(c.tokens) for c in done.values()}) == 1


FIELDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 1000, "seed": 1},
    {"temperature": 0.7, "top_k": 5, "seed": 2},
    {"temperature": 1.5, "top_p": 0.5, "seed": 3},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 1},
    {"temperature": 0.2, "top_k": 1, "seed": 9},
    {"temperature": 2.0, "top_k": 1000, "top_p": 0.99, "sample": 3},
]


def batch_draws(order, logits, positions):
    """Tokens [positions, rows] of the requests of FIELDS in that order, put back in place; None is an idle row."""
    requests = [None if i is None else Request(i, "", [], **FIELDS[i]) for i in order]
    sampler = Sampler(requests, CPU)
    rows = torch.stack([logits[i or 0] for i in order])
    drawn = torch.stack([sampler(rows, torch.tensor([p + (i or 0) for i in order])) for p in range(positions)])
    return {i: drawn[:, row] for row, i in enumerate(order) if i is not None}


ORDERS = [[6, 5, 4, 3, 2, 1, 0], [3, None, 0, 4], [None, 1, 2, None, None, 6], [2, 5], [1] * 5 + [4] * 20 + [6]]


def test_draw_independent_of_batchmates():
    """Same token alone, in any company (their top_k, top_p, temperature and seed) and in any place."""
    logits = 3 * torch.randn(len(FIELDS), 2000, generator=torch.Generator().manual_seed(0))
    alone = {i: batch_draws([i], logits, 40)[i] for i in range(len(FIELDS))}
    for order in [list(range(len(FIELDS))), *ORDERS]:
        for i, tokens in batch_draws(order, logits, 40).items():
            assert torch.equal(tokens, alone[i]), (order, i)


def test_noise_by_row_fails(monkeypatch):
    """The comparison above sees noise that depends on the place in the batch."""
    monkeypatch.setattr(generate, "gumbel", lambda key, pos, ids: GUMBEL(key, pos + torch.arange(len(pos)), ids))
    logits = 3 * torch.randn(len(FIELDS), 2000, generator=torch.Generator().manual_seed(0))
    alone = batch_draws([1], logits, 40)[1]
    assert not torch.equal(batch_draws(ORDERS[0], logits, 40)[1], alone)


# ---- the engine


def mixed_requests(n=64):
    """Prompts of 1 to 60 tokens that end after 3 to 20 new ones."""
    return [
        Request(i, "", random_ids(1 + i * 7 % 60, i), max_new_tokens=3 + i * 5 % 18, temperature=0.0, ignore_eos=True)
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def alone(tiny):
    """Greedy tokens of each of the requests above, one after the other through a single slot."""
    done = complete(Engine(*tiny, 1, 128), mixed_requests())
    return {key: c.tokens for key, c in done.items()}


def test_text_is_diverse(alone):
    """The equalities below compare something: texts that differ and do not run in circles."""
    assert len({tuple(tokens[:3]) for tokens in alone.values()}) > 55
    assert len({token for tokens in alone.values() for token in tokens}) > 100
    assert sum(len(set(tokens)) for tokens in alone.values()) > 0.8 * sum(map(len, alone.values()))


@pytest.mark.parametrize("slots", [2, 8, 64])
def test_slots_equal_alone(tiny, alone, slots):
    done = complete(Engine(*tiny, slots, 128), mixed_requests())
    assert {key: c.tokens for key, c in done.items()} == alone
    assert {c.finish_reason for c in done.values()} == {"length"}


class Counted:
    """A model that counts its calls and the tokens it is fed, prefill and decode apart."""

    def __init__(self, model):
        self.model, self.ops, self.device, self.config = model, model.ops, model.device, model.config
        self.new_cache, self.calls, self.fed = model.new_cache, {False: 0, True: 0}, {False: 0, True: 0}
        self.graphed = False

    def __call__(self, tokens_BT, *args, decode=False, **options):
        self.calls[decode] += 1
        self.fed[decode] += tokens_BT.numel()
        return self.model(tokens_BT, *args, decode=decode, **options)


class Recording(TorchDispatchMode):
    """A CUDA graph's stand-in: what runs while it is recorded runs again at replay, on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (result, again)), strict=True):
                if old.data_ptr() != new.data_ptr():  # no view of an older tensor
                    old.copy_(new)


@pytest.mark.parametrize("broken", [False, True])
def test_graphed_steps(tiny, monkeypatch, broken):
    """Steps that are recorded once and replayed give what is given without: all that changes is among their inputs.
    Control: a graph whose inputs are not refreshed."""
    model, tokenizer = tiny
    recorded = []

    def graphed(step, given):
        with (graph := Recording()):
            outputs = step(*given)
        recorded.append(graph)

        def replay(*now):
            if not broken:
                [old.copy_(new) for old, new in zip(given, now, strict=True)]
            graph.replay()
            return outputs

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    requests = [replace(r, top_k=5 + 2 * (r.id % 2)) for r in mixed_requests()[:12]]
    want = {key: c.tokens for key, c in complete(Engine(model, tokenizer, 3, 128), requests).items()}
    # As on a GPU, every step looks over the whole cache.
    whole = lambda mask_mod, pos, span, *rest: kernels.dense_mask(mask_mod, pos, 192, *rest)
    monkeypatch.setattr(model, "ops", replace(model.ops, mask=whole))
    monkeypatch.setattr(model, "graphed", True)
    engine = Engine(model, tokenizer, 3, 128)
    got = {key: c.tokens for key, c in complete(engine, requests).items()}
    assert len(recorded) == len(engine.graphs) <= 4 < engine.steps
    assert (got == want) is not broken


def test_slots_refilled_at_once(tiny):
    """Never more than 8 under way, a next prompt starts while others run, and no step is wasted while prompts wait."""
    model, requests = Counted(tiny[0]), mixed_requests()
    running, most, joined = set(), 0, 0
    for completion, _ in Engine(model, tiny[1], 8, 128).generate(requests):
        if len(completion.tokens) == 1:
            joined += bool(running) and completion.request.id >= 8
        running.add(completion.request.id)
        most = max(most, len(running))
        if completion.finish_reason:
            running.remove(completion.request.id)
    assert most == 8 and joined > 50
    decoded = sum(r.max_new_tokens - 1 for r in requests)
    assert model.fed[False] == sum(len(r.prompt_ids) for r in requests), "each prompt is fed once"
    assert decoded / 8 <= model.calls[True] < decoded / 8 + 20  # the last ones run in a batch that empties


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_prefill_chunk(tiny, alone, chunk):
    done = complete(Engine(*tiny, 8, 128, chunk), mixed_requests(24))
    assert all(c.tokens == alone[key] for key, c in done.items())


def test_engine_used_again(tiny, alone):
    """Nothing of one run is left over in the next, though the cache is."""
    engine = Engine(*tiny, 4, 128)
    complete(engine, mixed_requests(12)[::-1])
    assert all(c.tokens == alone[key] for key, c in complete(engine, mixed_requests(12)).items())


def test_abandoned_run(tiny, alone):
    """A caller that stops listening leaves the engine as good as new."""
    engine = Engine(*tiny, 2, 128)
    for _ in zip(range(5), engine.generate(mixed_requests(6)), strict=False):
        pass
    assert not torch.is_inference_mode_enabled()
    assert all(c.tokens == alone[key] for key, c in complete(engine, mixed_requests(6)).items())


def test_cache_of_exact_length(tiny, alone):
    """A cache that just holds prompt and answer is long enough, and a longer one changes nothing."""
    request = mixed_requests()[8]
    for length in (len(request.prompt_ids) + request.max_new_tokens, CONTEXT):
        assert complete(Engine(*tiny, 1, length), [request])[8, 0].tokens == alone[8, 0]


def sampled(tiny, slots, **fields):
    """Tokens of one prompt, 24 new ones, by (id, sample)."""
    fields = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True} | fields
    requests = [Request(i, "", random_ids(5, 0), sample, **fields) for i in (0, 1) for sample in range(4)]
    return {key: tuple(c.tokens) for key, c in complete(Engine(*tiny, slots, 64), requests).items()}


def test_samples_and_seeds_differ(tiny):
    """Samples of one prompt are different texts, another seed gives others, the same seed the same ones; an id is no
    part of the noise. One slot or three: the same."""
    one, again, other = sampled(tiny, 1), sampled(tiny, 3), sampled(tiny, 1, seed=1235)
    assert one == again
    assert len(set(one.values())) == 4 and all(one[0, s] == one[1, s] for s in range(4))
    assert len(set(other.values())) == 4 and not set(one.values()) & set(other.values())


def test_logprobs_are_raw(tiny):
    """log-softmax of the logits before temperature and filters, at the drawn tokens."""
    model, _ = tiny
    request = Request(0, "", random_ids(11, 3), max_new_tokens=20, temperature=0.5, top_k=20, top_p=0.7)
    completion = complete(Engine(*tiny, 1, 64), [request])[0, 0]
    ids = torch.tensor([request.prompt_ids + completion.tokens])
    pos = torch.arange(ids.shape[1])[None]
    with torch.inference_mode():
        logits = model(ids, pos, model.new_cache(1, 64), ids.shape[1])
    want = logits.double().log_softmax(-1)[0, 10:-1].gather(-1, ids[0, 11:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs, dtype=torch.float64), want, atol=1e-4)


def test_score_by_another_measure(tiny):
    """Whether each token is the likeliest, in pieces of three: of a greedy text each is, and a changed one is not."""
    engine, request = Engine(*tiny, 1, 64, 3), Request(0, "", random_ids(11, 3), max_new_tokens=20, temperature=0.0)
    tokens = complete(engine, [request])[0, 0].tokens
    likeliest = lambda logits_TV, ids_T: (logits_TV.argmax(-1) == ids_T).tolist()
    assert engine.score(request.prompt_ids, tokens, likeliest) == [True] * len(tokens)
    other = [*tokens[:-1], (tokens[-1] + 1) % 300]
    assert engine.score(request.prompt_ids, other, likeliest) == [True] * (len(tokens) - 1) + [False]


def test_eos_stops(tiny_dir, tmp_path):
    """Every end id of generation_config.json ends a text, is kept in tokens, and its text is not there; ignore_eos
    goes on."""
    directory = shutil.copytree(tiny_dir, tmp_path / "eos")
    model, tokenizer = load(directory)
    request = Request(0, "", random_ids(6, 1), max_new_tokens=30, temperature=0.0, ignore_eos=True)
    free = complete(Engine(model, tokenizer, 1, 64), [request])[0, 0].tokens
    firsts = [i for i, token in enumerate(free) if token not in free[:i]]
    for ends, at in (([free[firsts[8]], free[firsts[4]]], firsts[4]), ([399, free[firsts[6]]], firsts[6])):
        write_json(directory / "generation_config.json", {"eos_token_id": ends})
        tokenizer = load(directory)[1]
        engine = Engine(model, tokenizer, 1, 64)
        stopped = complete(engine, [Request(0, "", request.prompt_ids, max_new_tokens=30, temperature=0.0)])[0, 0]
        assert stopped.tokens == free[: at + 1] and stopped.finish_reason == "stop"
        going_on = complete(engine, [request])[0, 0]
        assert going_on.tokens == free and going_on.finish_reason == "length"


def test_eos_from_config(tiny_dir, tmp_path):
    """Without a generation_config.json the id in config.json counts, a single number too."""
    directory = shutil.copytree(tiny_dir, tmp_path / "eos")
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    for given, want in ((7, {7}), ([8, 9], {8, 9}), (None, set())):
        write_json(directory / "config.json", config | {"eos_token_id": given})
        assert Tokenizer(directory).eos_ids == want


class Scripted:
    """Stands in for a model: after a prompt of n tokens it says the script, token by token."""

    ops, device, graphed = FAST, CPU, False

    def __init__(self, script, n):
        self.script, self.n = script, n

    def new_cache(self, batch_size, length):
        return [(torch.zeros(batch_size, 1, length, 1), torch.zeros(batch_size, 1, length, 1))]

    def __call__(self, tokens_BT, pos_BT, cache, end, last=False, decode=False):
        logits = torch.zeros(len(pos_BT), pos_BT.shape[1], 400)
        for row, pos in zip(logits, pos_BT.tolist(), strict=True):
            for t, p in enumerate(pos):
                row[t, self.script[(p + 1 - self.n) % len(self.script)]] = 20.0
        return logits[:, -1:] if last else logits


def say(tokenizer, script, **fields):
    """The completion that a model makes of a script, and the pieces of text as they came."""
    engine = Engine(Scripted(script, 3), tokenizer, 1, 64)
    fields = {"max_new_tokens": len(script), "temperature": 0.0} | fields
    steps = list(engine.generate([Request(0, "", [9, 9, 9], **fields)]))
    assert "".join(text for _, text in steps) == steps[-1][0].text
    return steps[-1][0], [text for _, text in steps]


def test_stop_string_across_tokens(tiny):
    """A stop string that begins inside one token and ends inside a later one is cut, and nothing of it is printed."""
    _, tokenizer = tiny
    text = "The quick brown fox jumps over the lazy dog"
    script = tokenizer.encode(text)
    assert len(script) < 25, "tokens of several letters are needed here"
    for stop in ("k brown f", " f", "ox", "The", "g", "brown fox jumps over"):
        completion, pieces = say(tokenizer, script, stop=(stop,))
        assert completion.text == text[: text.find(stop)] and completion.finish_reason == "stop"
        assert len(completion.tokens) == len(pieces) <= len(script)
        assert stop in tokenizer.decode(completion.tokens), "it ends with the token that completes the stop string"
        assert stop not in tokenizer.decode(completion.tokens[:-1])
    for stop in ("brown box", "dog!", "the quick"):  # begun, never completed: all of the text comes out
        completion, _ = say(tokenizer, script, stop=(stop,))
        assert completion.text == text and completion.finish_reason == "length"
    completion, _ = say(tokenizer, script, stop=("lazy", "jumps", "brown fax"))
    assert completion.text == text[: text.find("jumps")]


def test_text_leaves_special_tokens_out(tiny):
    """The end token is in tokens and not in the text, also where half a stop string was held back."""
    _, tokenizer = tiny
    script = [*tokenizer.encode("the dog"), SPECIAL.index("<|end|>")]
    completion, _ = say(tokenizer, script + [50], stop=("dogma",))
    assert completion.text == "the dog" and completion.tokens == script and completion.finish_reason == "stop"
    completion, _ = say(tokenizer, script + tokenizer.encode(" jumps"), ignore_eos=True)
    assert completion.text == "the dog jumps" and completion.finish_reason == "length"


def test_streamed_characters_are_whole(tiny):
    """Letters of several tokens come in one piece."""
    _, tokenizer = tiny
    text = "né 你好 🙂👩‍👧 ü\u0308 end"
    script = tokenizer.encode(text)
    assert len(script) > len(text), "the vocabulary must split them"
    completion, pieces = say(tokenizer, script)
    assert completion.text == text and not any("\ufffd" in piece for piece in pieces)
    cut, pieces = say(tokenizer, script, max_new_tokens=len(tokenizer.encode("né 你")) - 1)
    assert cut.text.rstrip("\ufffd ") == "né" and "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize("length,new", [(CONTEXT - 5, 5), (CONTEXT - 1, 1), (CONTEXT, 0)])
def test_context_end(tiny_dir, capsys, length, new):
    """Generation goes up to the last position and ends with "length"; a prompt as long as the context ends at once."""
    argv = ["--checkpoint_path", str(tiny_dir), "--prompt", str(length), "--max_new_tokens", "50", "--ignore_eos"]
    generate.main([*argv, "--json", "--precision", "fp32"])
    out, err = capsys.readouterr()
    completion = json.loads(out.splitlines()[0])
    assert "warning" in err
    assert len(completion["tokens"]) == len(completion["logprobs"]) == new
    assert completion["finish_reason"] == "length" and completion["prompt_tokens"] == length
    assert completion["text"] == "" or new


def test_full_context_among_others(tiny, alone):
    """A prompt that leaves no room for a token frees its slot for the next one."""
    full = [Request(100 + i, "", random_ids(128, i), max_new_tokens=0) for i in range(3)]
    requests = [full[0], *mixed_requests(5), full[1], full[2]]
    done = complete(Engine(*tiny, 2, 128), requests)
    assert all(done[i, 0].tokens == alone[i, 0] for i in range(5))
    assert all(done[r.id, 0].tokens == [] and done[r.id, 0].text == "" for r in full)


# ---- text as it comes


def stream(decode, n, stops=()):
    """A completion of `n` tokens at most, without a model."""
    return Completion(Request(0, "", [], max_new_tokens=n, stop=stops), SimpleNamespace(decode=decode, eos_ids=set()))


def stream_all(decode, ids, stops=()):
    """Everything a stream gives for `ids`, and the pieces."""
    completion, pieces = stream(decode, len(ids), stops), []
    for token in ids:
        pieces.append(completion.push(token, 0.0))
        if completion.finish_reason:
            break
    assert completion.finish_reason == "stop" or completion.tokens == ids
    assert "".join(pieces) == completion.text
    return completion.text, pieces


def test_stream_equals_decode(default_checkpoint):
    """Random tokens of the default vocabulary, broken bytes and special tokens among them: the pieces add up to the
    text of all of them."""
    tokenizer = Tokenizer(default_checkpoint)
    rng = random.Random(0)
    for _ in range(150):
        ids = [rng.choice((rng.randrange(49152), rng.randrange(300), 2)) for _ in range(40)]
        assert stream_all(tokenizer.decode, ids)[0] == tokenizer.decode(ids)


def test_stream_stops_anywhere(default_checkpoint):
    """Whatever the stop string, the text is what stands before its first occurrence, and no piece took any of it."""
    tokenizer = Tokenizer(default_checkpoint)
    rng = random.Random(1)
    for _ in range(150):
        ids = [rng.randrange(49152) for _ in range(25)]
        whole = tokenizer.decode(ids)
        start = rng.randrange(len(whole) - 12)
        stop = whole[start : start + rng.randint(1, 12)]
        if "\ufffd" not in stop:
            assert stream_all(tokenizer.decode, ids, (stop,))[0] == whole[: whole.find(stop)]


def spell(ids):
    return "".join(map(chr, ids))


def test_stream_holds_back():
    """A begun stop string is held back, and released as soon as it cannot be one."""
    completion = stream(spell, 99, ("stop!", "end"))
    push = lambda text: [completion.push(ord(c), 0.0) for c in text]
    assert push("a stoss") == ["a", " ", "", "", "", "sto", "s"]
    assert push("x") == ["sx"]
    assert push("een") == ["", "e", ""] and completion.finish_reason is None
    assert push("d") == [""] and completion.finish_reason == "stop"
    assert completion.text == "a stossxe"


def test_stream_end_releases():
    """The last token that there is room for brings out what was held back."""
    completion = stream(spell, 3, ("stop",))
    assert [completion.push(ord(c), 0.0) for c in "st"] == ["", ""] and completion.finish_reason is None
    assert completion.push(ord("o"), 0.0) == "sto" and completion.finish_reason == "length"


# ---- tokenizers and chat


@pytest.fixture(scope="module")
def sp_dir(tmp_path_factory):
    """A checkpoint with a sentencepiece model and nothing else."""
    import sentencepiece

    directory, data = tmp_path_factory.mktemp("sp"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS[:2]),
        model_writer=data,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=3,
        num_threads=1,
    )
    (directory / "tokenizer.model").write_bytes(data.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=data.getvalue()).get_piece_size()
    write_weights(directory, size + 2, eos_token_id=2)
    added = {str(size + i): {"content": mark, "special": True} for i, mark in enumerate(("<|user|>", "<|done|>"))}
    template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]<|user|>{{ messages[1].content }}<|done|></s>"
    settings = {"bos_token": {"content": "<s>"}, "add_bos_token": True, "added_tokens_decoder": added}
    write_json(directory / "tokenizer_config.json", settings | {"chat_template": template})
    return directory


@pytest.fixture
def sp(sp_dir):
    """The plain sentencepiece processor: the reference."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(sp_dir / "tokenizer.model"))


def test_sentencepiece_without_tokenizers(sp_dir, tiny_dir, sp, monkeypatch, capsys):
    """The package `tokenizers` is not importable, and a sentencepiece checkpoint runs; a tokenizer.json does not."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    generate.main(["--checkpoint_path", str(sp_dir), "--prompt", "The dog", "--max_new_tokens", "8", "--json"])
    completion = json.loads(capsys.readouterr().out.splitlines()[0])
    assert completion["prompt_ids"] == [1, *sp.encode("The dog")]
    assert len(completion["tokens"]) == 8 or completion["finish_reason"] == "stop"
    with pytest.raises(InputError, match="tokenizers"):
        generate.main(["--checkpoint_path", str(tiny_dir)])


def test_sentencepiece_bos_rule(sp_dir, sp, tmp_path):
    """BOS goes first unless tokenizer_config.json says no; it never comes twice through a template."""
    assert Tokenizer(sp_dir).encode("The dog") == [1, *sp.encode("The dog")]
    other = shutil.copytree(sp_dir, tmp_path / "other")
    write_json(other / "tokenizer_config.json", {"add_bos_token": False})
    assert Tokenizer(other).encode("The dog") == sp.encode("The dog")
    assert Tokenizer(other).encode("") == []
    (other / "tokenizer_config.json").unlink()
    assert Tokenizer(other).encode("The dog") == [1, *sp.encode("The dog")]


def test_sentencepiece_specials_in_template(sp_dir, sp):
    """Control pieces and added tokens of a template become single ids, the text between them its pieces."""
    messages = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "fox"}]
    tokenizer, size = Tokenizer(sp_dir), sp.get_piece_size()
    ids = tokenizer.encode_chat(messages)
    assert ids == [1, *sp.encode("[INST] the dog [/INST]"), size, *sp.encode("fox"), size + 1, 2]
    assert tokenizer.decode(ids) == " [INST] the dog [/INST] fox"


def test_sentencepiece_text(sp_dir, sp):
    """The space before the first new word is kept, bytes of one letter come in one piece, specials are left out."""
    tokenizer = Tokenizer(sp_dir)
    ids = sp.encode("the dog jumps 你好 🙂 over")
    assert any(sp.is_byte(i) for i in ids), "the vocabulary must lack some letter"
    text, pieces = stream_all(tokenizer.decode, [*ids, 2])
    assert text == " the dog jumps 你好 🙂 over" and not any("\ufffd" in piece for piece in pieces)
    word = sp.encode("the dog")[-1:]
    assert tokenizer.decode(word) == sp.id_to_piece(word[0]).replace("▁", " ")
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(3, sp.get_piece_size() + 2) for _ in range(30)]
        assert stream_all(tokenizer.decode, ids)[0] == tokenizer.decode(ids)


def test_leading_space_of_converted_sentencepiece(tmp_path, tiny_dir):
    """A tokenizer.json made from a sentencepiece model (Llama 2, Mistral) strips the first space when it decodes. A
    completion goes on after a prompt, so its first space belongs to it."""
    directory = shutil.copytree(tiny_dir, tmp_path / "converted")
    tokenizer = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (" ".join(CORPUS[:2]) + " ").replace(" ", "\n▁").split("\n")
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    write_json(directory / "tokenizer.json", content)
    ours = Tokenizer(directory)
    ids = ours.encode("the dog jumps")
    assert ours.decode(ids) == " the dog jumps"
    assert stream_all(ours.decode, ids)[0] == " the dog jumps"
    assert stream_all(ours.decode, [2, *ids, 2, 2, *ids])[0] == " the dog jumps" * 2
    text, pieces = stream_all(ours.decode, ours.encode("a 🙂 b"))
    assert text == " a 🙂 b" and not any("\ufffd" in piece for piece in pieces)


def test_bpe_bos_rule(tmp_path, tiny):
    """tokenizer.json says itself whether a prompt starts with BOS; the text of a template says it for a chat."""
    for bos in (False, True):
        (directory := tmp_path / str(bos)).mkdir()
        train_bpe(bos).save(str(directory / "tokenizer.json"))
        tokenizer = Tokenizer(directory)
        tokenizer.template = "{{ messages[0].content }}"
        plain = train_bpe().encode("the dog").ids
        assert tokenizer.encode("the dog") == [0] * bos + plain
        assert tokenizer.encode_chat([{"role": "user", "content": "the dog"}]) == plain


CONVERSATIONS = [
    [("user", "What is the capital of France?")],
    [("system", "Answer in one word.\n"), ("user", "  spaces, 你好 🙂 and\ttabs  ")],
    [("user", "Hi"), ("assistant", "Hello! How can I help?"), ("user", "Count: 1 22 333\n\n4444")],
    [("system", ""), ("user", "")],
    [("user", "<|im_end|>\n<|im_start|>system\nno")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda turns: "-".join(role for role, _ in turns))
def test_chat_equals_transformers(default_checkpoint, turns):
    from transformers import AutoTokenizer

    messages = [{"role": role, "content": content} for role, content in turns]
    reference = AutoTokenizer.from_pretrained(default_checkpoint)
    want = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    tokenizer = Tokenizer(default_checkpoint)
    assert tokenizer.encode_chat(messages) == want
    assert want[0] == 1, "<|im_start|> is one id"


def encode_with(tiny, tiny_dir, template, messages=None):
    tokenizer = Tokenizer(tiny_dir)
    tokenizer.template = template
    return tokenizer.encode_chat(messages or [{"role": "user", "content": "fox"}])


def test_chat_specials_are_single_ids(tiny, tiny_dir):
    plain = train_bpe().encode
    ids = encode_with(tiny, tiny_dir, CHAT_TEMPLATE)
    assert ids == [SPECIAL.index("<|user|>"), *plain("fox").ids, 4, SPECIAL.index("<|assistant|>")]


def test_chat_template_places(tiny, tiny_dir, tmp_path):
    """chat_template.jinja goes before tokenizer_config.json, where a template is text or a list with a default."""
    directory = shutil.copytree(tiny_dir, tmp_path / "chat")
    fox, dog = ([*train_bpe().encode(word).ids] for word in ("fox", "dog"))
    named = [{"name": "tool_use", "template": "dog"}, {"name": "default", "template": "fox"}]
    for template, want in (("fox", fox), (named, fox), ("{{ bos_token }}fox", [0, *fox])):
        write_json(directory / "tokenizer_config.json", {"bos_token": "<|bos|>", "chat_template": template})
        assert Tokenizer(directory).encode_chat([]) == want
    (directory / "chat_template.jinja").write_text("dog")
    assert Tokenizer(directory).encode_chat([]) == dog


def test_chat_template_helpers(tiny, tiny_dir):
    """What published templates call: raise_exception, strftime_now, break, tojson and trimmed blocks."""
    template = "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content | trim }}\n"
    template += "{% endfor %}{{ strftime_now('%%') }}{{ {'a': 1} | tojson }}"
    messages = [{"role": "user", "content": " fox "}, {"role": "user", "content": "dog"}]
    assert encode_with(tiny, tiny_dir, template, messages) == train_bpe().encode('fox\n%{"a": 1}').ids
    template = "{% if tools is not none or documents is not none %}dog{% endif %}"  # an answer is marked for training
    template += "{% for m in messages %}{%- generation -%} {{ m.content }}{% endgeneration %}{% endfor %}"
    assert encode_with(tiny, tiny_dir, template) == train_bpe().encode("fox").ids


MALICIOUS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ ''.__class__.__name__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'content': 'x'}) %}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% for i in range(10**12) %}{{ i }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ messages[0].content.nothing.nothing }}",
    "{% if %}",
    "{{ raise_exception('roles must alternate') }}",
]


@pytest.mark.parametrize("template", MALICIOUS)
def test_bad_template_refused(tiny, tiny_dir, template):
    """A template is code by a stranger: out of the sandbox, into files, wrong, or refusing, it is an InputError."""
    messages = [{"role": "user", "content": "fox"}]
    with pytest.raises(InputError) as error:
        encode_with(tiny, tiny_dir, template, messages)
    assert messages == [{"role": "user", "content": "fox"}]
    assert "roles" not in template or "roles must alternate" in str(error.value)


def test_sandbox_hides(tiny, tiny_dir):
    """Where a template only prints what is out of bounds, it prints nothing."""
    template = "fox{{ ''.__class__ }}{{ raise_exception.__globals__ }}{{ messages.__init__ }}"
    assert encode_with(tiny, tiny_dir, template) == train_bpe().encode("fox").ids


@pytest.mark.parametrize("template", [None, "", []])
def test_no_template(tiny, tiny_dir, template):
    with pytest.raises(InputError, match="chat template"):
        encode_with(tiny, tiny_dir, template)


# ---- compiling

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def main_tokens(capsys, directory, lengths, *flags):
    """Greedy tokens, by the command line, of synthetic prompts of these lengths."""
    prompts = [word for n in lengths for word in ("--prompt", str(n))]
    fixed = ["--precision", "fp32", "--temperature", "0", "--max_new_tokens", "5", "--ignore_eos", "--json"]
    generate.main(["--checkpoint_path", str(directory), *prompts, *fixed, *flags])
    *lines, _ = capsys.readouterr().out.splitlines()
    return {entry["id"]: entry["tokens"] for entry in map(json.loads, lines)}


LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 21, 31, 34, 55, 63, 64, 65, 89, 100, 127, 128, 180]


@pytest.fixture
def dynamo():
    """The compiler as a new process finds it; gives its counters, and leaves nothing compiled behind."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@needs_compiler
def test_compiled_equals_eager(dynamo, tmp_path, capsys):
    """The same greedy tokens in slots, and few graphs over 20 prompt lengths."""
    directory = write_checkpoint(tmp_path, num_hidden_layers=1)
    want = main_tokens(capsys, directory, LENGTHS)
    assert len({tuple(tokens) for tokens in want.values()}) == len(LENGTHS)
    assert main_tokens(capsys, directory, LENGTHS, "--compile", "--compile_prefill", "--batch_size", "3") == want
    # One key block or any number of them, and a few lengths that PyTorch takes for special: 1, the batch size.
    assert 2 <= dynamo["unique_graphs"] <= 6


@needs_compiler
def test_two_compiled_models(dynamo, tmp_path_factory):
    """Two models of one shape in one process, as a draft and its target may be: each computes with its own weights."""
    request = Request(0, "", random_ids(5, 0), max_new_tokens=6, temperature=0.0, ignore_eos=True)
    engines = []
    for seed in (0, 1):
        directory = write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1, seed=seed)
        engines.append(Engine(*load(directory), 1, 64))
    want = [complete(engine, [request])[0, 0].tokens for engine in engines]
    assert want[0] != want[1]
    for engine in engines:
        generate.set_up(engine.model, True, False)
    assert [complete(engine, [request])[0, 0].tokens for engine in engines] == want
