"""Speculation: drafts change nothing but the time. With BATCH_INVARIANT bits are compared, and the same comparison is
made with a rule broken on purpose; without, the distribution is compared with the exact one."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from test_deterministic import BF16, CPU, FP32, build, randn
from test_generate import fits, load, needs_compiler, write_checkpoint

import generate
from generate import DraftModel, Engine, Request, Tokenizer, prompt_lookup
from kernels import BATCH_INVARIANT, FAST
from model import Transformer
from tests.contract import HalfRight

ROOM = 160


def blurred(model, seed=1, much=0.02):
    """A model like `model` as `build` makes it, its weights changed a little: a draft that is right now and then."""
    other = Transformer(model.config, model.ops, CPU, model.dtype)
    for i, taker in enumerate(other.takers):
        tensors = [randn(*shape, seed=i) * 0.3 for shape in taker.shapes.values()]
        noise = [randn(*shape, seed=1000 * seed + i) * much for shape in taker.shapes.values()]
        is_norm = len(taker.shapes) == 1 and tensors[0].dim() == 1
        pairs = zip(tensors, noise, strict=True)
        taker.load([(t + is_norm + n).to(model.dtype) for t, n in pairs])
    return other


def speculating(model, kind, slots, k, chunk=0, room=ROOM, draft=None):
    """An engine whose drafts come by prompt lookup, or by a draft model, `model` itself where none is given."""
    if kind == "lookup":
        propose = prompt_lookup
    else:
        propose = DraftModel(Engine(draft or model, Tokenizer(None), slots, room, chunk, k=k), k)
    engine = Engine(model, Tokenizer(None), slots, room, chunk, propose, k)
    engine.pays = 0 if kind == "lookup" else engine.pays  # whatever it costs
    return engine


def answers(engine, requests):
    return {c.request.id: (c.tokens, c.logprobs) for c, _ in engine.generate(requests) if c.finish_reason}


def plain(model, requests, slots=1):
    return answers(Engine(model, Tokenizer(None), slots, ROOM), requests)


def repeating(i, length, new=12, **fields):
    """A prompt that says everything twice, so that prompt lookup finds something."""
    ids = torch.randint(300, (max(length // 2, 1),), generator=torch.Generator().manual_seed(i)).tolist()
    return Request(i, "", (ids * 2 + ids)[: max(length, 1)], max_new_tokens=new, **fields)


OPTIONS = [{"temperature": 0.0}, {"temperature": 0.0}, {"top_k": 2, "seed": 7}, {"top_k": 50, "top_p": 0.9}]
LENGTHS = [1, 9, 10, 30, 64, 65, 3, 17, 100, 2]
REQUESTS = [repeating(i, LENGTHS[i % 10], 5 + i % 9, **OPTIONS[i % 4]) for i in range(24)]


@pytest.fixture
def narrow(monkeypatch):
    """Few tokens to draw from, so that the text repeats itself and lookup is right now and then."""
    real = generate.top
    few = lambda logits: torch.where(torch.arange(logits.shape[-1]) % 300 < 5, logits, logits - 1e4)
    monkeypatch.setattr(generate, "top", lambda logits, k: real(few(logits), k))


# ---- the same bits


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_same_bits(tmp_path, narrow, kind, dtype, slots):
    """k = 1 to 8: tokens and logprobs are those without speculation; drafts were accepted, and others rejected."""
    model = build(tmp_path, BATCH_INVARIANT, dtype)
    draft, want = blurred(model), plain(model, REQUESTS)
    assert len({str(answer) for answer in want.values()}) == len(REQUESTS)
    for k in range(1, 9):
        engine = speculating(model, kind, slots, k, draft=draft)
        assert answers(engine, REQUESTS) == want
        assert engine.accept_counts[0] > 0 and sum(engine.accept_counts[1:]) > 0
        assert sum((i + 1) * n for i, n in enumerate(engine.accept_counts)) <= engine.tokens["new"]


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_same_bits_in_chunks_and_order(tmp_path, narrow, kind):
    model = build(tmp_path, BATCH_INVARIANT, FP32, "3 KV heads, biases")
    want = plain(model, REQUESTS)
    for chunk in (1, 7):
        assert answers(speculating(model, kind, 3, 4, chunk, draft=blurred(model)), REQUESTS[::-1]) == want


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_noise_by_draft_order_differs(tmp_path, narrow, kind, monkeypatch):
    """Broken: noise keyed by the place in a round instead of the position."""
    model, sampled = build(tmp_path, BATCH_INVARIANT, FP32), [r for r in REQUESTS if r.temperature]
    real = generate.gumbel
    monkeypatch.setattr(generate, "gumbel", lambda key, pos, ids: real(key, pos - pos[0], ids))
    assert answers(speculating(model, kind, 1, 4), sampled) != plain(model, sampled)


def test_flag_off_differs(tmp_path, narrow):
    """The comparison can fail: FAST rounds several rows of fp32 otherwise than one."""
    model = build(tmp_path, FAST, FP32)
    assert answers(speculating(model, "model", 1, 4), REQUESTS) != plain(model, REQUESTS)


def test_wrong_accept_rule_differs(tmp_path, narrow, monkeypatch):
    """Broken: every draft is accepted."""
    model = build(tmp_path, BATCH_INVARIANT, FP32)
    monkeypatch.setattr(generate, "agreement", lambda draft, drawn: len(draft))
    engine = speculating(model, "lookup", 1, 4)
    assert {i: tokens for i, (tokens, _) in answers(engine, REQUESTS).items()} != {
        i: tokens for i, (tokens, _) in plain(model, REQUESTS).items()
    }


@pytest.mark.parametrize("slots", [1, 3])
def test_the_model_as_its_own_draft(tmp_path, slots):
    """Every draft is accepted: k + 1 tokens a round."""
    model, k = build(tmp_path, BATCH_INVARIANT, BF16), 4
    requests = [repeating(i, LENGTHS[i], 1 + 3 * (k + 1), **OPTIONS[i % 4]) for i in range(3)]
    engine = speculating(model, "model", slots, k)
    assert answers(engine, requests) == plain(model, requests)
    assert engine.accept_counts == [0] * k + [9]


def test_greedy_fp32_tokens_without_the_flag(tmp_path, narrow):
    """As vLLM's n-gram speculation once failed to: greedy text is the same at 1 and at k + 1 tokens a pass."""
    model, requests = build(tmp_path, FAST, FP32), [replace(r, temperature=0.0) for r in REQUESTS]
    want = {i: tokens for i, (tokens, _) in plain(model, requests).items()}
    for kind, slots in itertools.product(("lookup", "model"), (1, 5)):
        found = answers(speculating(model, kind, slots, 4, draft=blurred(model)), requests)
        assert {i: tokens for i, (tokens, _) in found.items()} == want


def test_prompts_of_twenty_lengths(tmp_path, narrow):
    model = build(tmp_path, BATCH_INVARIANT, FP32)
    requests = [repeating(i, 1 + 7 * i, 9, **OPTIONS[i % 4]) for i in range(20)]
    for kind, slots in itertools.product(("lookup", "model"), (1, 6)):
        assert answers(speculating(model, kind, slots, 5, draft=blurred(model)), requests) == plain(model, requests)


# ---- the distribution


class Pairs:
    """A model of a first and a second token over a vocabulary of 4, whatever came before the first."""

    FIRST, SECOND = (
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        torch.tensor([[7, 1, 1, 1], [2, 2, 2, 4], [1, 5, 3, 1], [4, 3, 2, 1]]),
    )


def law():
    first, second = Pairs.FIRST, Pairs.SECOND / 10
    return (first[:, None] * second).flatten().tolist()


def pairs(seeds=20000):
    """How often each pair of tokens came, over seeds; the second token was drafted along with the first."""
    table = torch.cat([Pairs.FIRST[None], Pairs.SECOND / 10]).log()

    class Model:
        config, device, ops, graphed = None, CPU, FAST, False

        def new_cache(self, batch_size, length):
            return []

        def __call__(self, tokens_BT, pos_BT, cache, end, last=False, decode=False):
            # The prompt is one token 0 at position 0; the token at position 1 is always 0 as well.
            rows = torch.where(pos_BT == 1, 0, tokens_BT + 1)
            logits = table[torch.where(pos_BT == 0, 1, rows)]
            return torch.where((pos_BT == 0)[..., None], torch.tensor([0.0, -99, -99, -99]), logits)

    propose = lambda slots, sampler, k: [[seed % 4, 0] for seed in (c.request.seed if c else 0 for c in slots)]
    propose.pays = 0
    engine = Engine(Model(), Tokenizer(None), 200, 8, propose=propose, k=2)
    requests = [Request(i, "", [0], max_new_tokens=3, temperature=1.0, seed=i) for i in range(seeds)]
    drawn = [c.tokens for c, _ in engine.generate(requests) if c.finish_reason]
    assert sum(engine.accept_counts[1:]) > 0 and engine.accept_counts[0] > 0
    return torch.tensor([4 * a + b for _, a, b in drawn]).bincount(minlength=16).tolist()


def test_distribution():
    assert fits(pairs(), law())


def test_wrong_accept_rule_fails(monkeypatch):
    """Broken: a draft also passes where the model draws the token next to it."""
    near = lambda a, b: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if abs(x - y) > 1), len(a))

    def wrong(draft, drawn):
        n = near(draft, drawn)
        drawn[:n] = draft[:n]
        return n

    monkeypatch.setattr(generate, "agreement", wrong)
    assert not fits(pairs(), law())


# ---- drafts


class Text:
    """What prompt_lookup reads of a completion."""

    def __init__(self, *ids):
        self.ids = list(ids)


@pytest.mark.parametrize(
    "ids, drafts",
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 9, 1, 2], [4, 9, 1, 2]),  # the last place
        ([1, 2, 3, 5, 6, 9, 2, 3, 7, 1, 2, 3], [5, 6, 9, 2]),  # the longest match
        ([5, 5, 5], [5, 5, 5, 5]),  # what was drafted is text as well
        ([1, 2, 1, 2], [1, 2, 1, 2]),
        ([1, 2, 3, 4], None),
        ([0, 0], None),
        ([7], None),
        ([151935, 55296, 1, 151935, 55296], [1, 151935, 55296, 1]),  # a surrogate is an id like others
    ],
)
def test_lookup(ids, drafts):
    text = Text(*ids)
    assert prompt_lookup([text], None, 4) == (drafts and [drafts])
    assert text.ids[len(ids) :] in ([], drafts)


def test_lookup_needs_half_of_the_batch():
    found, none = Text(1, 2, 3, 1, 2), Text(1, 2, 3, 4)
    assert prompt_lookup([found, none, None], None, 2) == [[3, 1], [0, 0], [0, 0]]
    assert prompt_lookup([found, none, none, None], None, 2) is None


def test_pauses_where_drafts_do_not_pay(tmp_path):
    """Wrong drafts are proposed less and less; right ones each time."""
    model, asked = build(tmp_path, FAST, FP32), []

    def wrong(slots, sampler, k):
        asked.append(len(slots[0].tokens))
        return [[299] * k]

    wrong.pays = 1
    list(Engine(model, Tokenizer(None), 1, ROOM, propose=wrong, k=3).generate([repeating(0, 3, 130)]))
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert gaps == sorted(gaps) and gaps[0] == 1 and gaps[-1] >= 32 and len(asked) <= 10


def test_drafts_pause_by_what_a_round_costs(tmp_path):
    """Three tokens a round pay where it takes as long as two steps, not where it takes as long as six: such drafts
    cost nothing, so that they are compared with what comes before any is checked."""
    model, asked = build(tmp_path, BATCH_INVARIANT, FP32), [repeating(0, 3, 130)]
    want = plain(model, asked)

    def rounds(pays):
        engine = Engine(model, Tokenizer(None), 1, ROOM, propose=lambda *args: half_right(*args), k=3)
        half_right, engine.pays = HalfRight(want), pays
        assert answers(engine, asked) == want
        return sum(engine.accept_counts)

    assert rounds(1.0) >= 40
    assert rounds(5.0) == 0


def test_a_draft_of_a_short_context_stops(tmp_path):
    """Beyond the context of the draft model the model goes on alone."""
    model = build(tmp_path, BATCH_INVARIANT, FP32)
    draft = build(tmp_path, BATCH_INVARIANT, FP32)
    draft.config = replace(draft.config, context=30)
    requests = [repeating(0, 10, 60, temperature=0.0)]
    engine = speculating(model, "model", 1, 4, draft=draft)
    assert answers(engine, requests) == plain(model, requests)
    assert 3 <= sum(engine.accept_counts) <= 5


# ---- ends inside a round


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("tiny")))


def both(tiny, requests, k=5, room=ROOM):
    """Completions without and with speculation by the model itself, which accepts each draft."""
    model, tokenizer = tiny
    engine = Engine(model, tokenizer, 1, room)
    drafts = DraftModel(Engine(model, tokenizer, 1, room, k=k), k)
    fast = Engine(model, tokenizer, 1, room, propose=drafts, k=k)
    return [[c for c, _ in e.generate(requests) if c.finish_reason] for e in (engine, fast)]


def alike(a, b):
    return (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)


@pytest.mark.parametrize("new", range(1, 14))
def test_max_new_tokens_inside_a_round(tiny, new):
    (want,), (found,) = both(tiny, [Request(0, "", [9, 20, 30], max_new_tokens=new, temperature=0.0, ignore_eos=True)])
    assert alike(want, found) and len(found.tokens) == new


def test_end_token_inside_a_round(tiny):
    model, tokenizer = tiny
    (want,), _ = both(tiny, [Request(0, "", [9, 20, 30], max_new_tokens=30, temperature=0.0, ignore_eos=True)])
    ends = {}
    for i, token in enumerate(want.tokens):
        ends.setdefault(token, i)
    for token, i in list(ends.items())[:12]:
        tokenizer.eos_ids, before = {token}, tokenizer.eos_ids
        (short,), (found,) = both(tiny, [Request(0, "", [9, 20, 30], max_new_tokens=30, temperature=0.0)])
        tokenizer.eos_ids = before
        assert alike(short, found) and found.finish_reason == "stop" and len(found.tokens) == i + 1


def test_stop_string_across_a_round(tiny):
    (want,), _ = both(tiny, [Request(0, "", [9, 20, 30], max_new_tokens=30, temperature=0.0, ignore_eos=True)])
    for start in range(0, len(want.text) - 3, 3):
        stop = (want.text[start : start + 3],)
        request = Request(0, "", [9, 20, 30], max_new_tokens=30, temperature=0.0, ignore_eos=True, stop=stop)
        (short,), (found,) = both(tiny, [request])
        assert alike(short, found) and found.finish_reason == "stop" and stop[0] not in found.text


def test_context_ends_inside_a_round(tiny):
    context = tiny[0].config.context
    for room in range(1, 9):
        ids = [9 + i % 90 for i in range(context - room)]
        request = Request(0, "", ids, max_new_tokens=room, temperature=0.0, ignore_eos=True)
        (want,), (found,) = both(tiny, [request], room=context)
        assert alike(want, found) and len(found.tokens) == room


# ---- the command line


def lines(capsys, *flags):
    generate.main([*map(str, flags), "--json", "--max_new_tokens", "20", "--deterministic"])
    *completions, stats = map(json.loads, capsys.readouterr().out.splitlines())
    return completions, stats["stats"]["accept_counts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a draft for it, one of another vocabulary, and one of another number of ids."""
    made = [write_checkpoint(tmp_path_factory.mktemp("m")), write_checkpoint(tmp_path_factory.mktemp("d"), seed=0)]
    made += [write_checkpoint(tmp_path_factory.mktemp("other"))]
    path = made[2] / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|end|>"', '"<|fin|>"'))
    return made


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_flags(folders, capsys, temperature):
    flags = [
        "--checkpoint_path",
        folders[0],
        "--prompt",
        "a b a b a b",
        "--prompt",
        "one",
        "--temperature",
        temperature,
    ]
    want, counts = lines(capsys, *flags)
    assert counts == []
    draft = ["--draft_checkpoint_path", folders[1], "--speculate_k", 3]
    found, counts = lines(capsys, *flags, *draft)
    assert found == want and len(counts) == 4 and counts[3] > 0
    found, counts = lines(capsys, *flags, *draft, "--batch_size", 2, "--prefill_chunk", 2)
    assert sorted(found, key=lambda c: c["id"]) == want and counts[3] > 0
    found, counts = lines(capsys, *flags, "--prompt_lookup")
    assert found == want and len(counts) == 6


REFUSED = {
    "speculate_k": (["--prompt_lookup", "--speculate_k", "0"], "speculate_k 0"),
    "both": (["--prompt_lookup", "--draft_checkpoint_path", "x"], "excludes"),
    "no directory": (["--draft_checkpoint_path", "nowhere"], "nowhere"),
    "vocabulary": (["--draft_checkpoint_path", 2], "vocabulary"),
}


@pytest.mark.parametrize("flags, word", REFUSED.values(), ids=REFUSED)
def test_refused(folders, flags, word):
    flags = [str(folders[flag]) if flag == 2 else flag for flag in flags]
    with pytest.raises(generate.InputError, match=word):
        generate.main(["--checkpoint_path", str(folders[0]), "--prompt", "a", *flags])


@needs_compiler
def test_compiled(folders, capsys):
    """One graph for each number of tokens a row: nothing compiles after the warm-up."""
    flags = ["--checkpoint_path", folders[0], "--prompt", "a b a b a b", "--prompt", "one two three"]
    want, _ = lines(capsys, *flags)
    torch._dynamo.reset()
    found, counts = lines(capsys, *flags, "--compile", "--draft_checkpoint_path", folders[1], "--speculate_k", 2)
    torch._dynamo.reset()
    assert found == want and counts[2] > 0
