"""Speculation: drafts change nothing but the time. With BATCH_INVARIANT bits are compared, and the
same comparison is made with a rule broken on purpose; without, the distribution is compared with
the exact one."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import fits, load, needs_compiler, random_ids, write_checkpoint
from safetensors.torch import load_file, save_file
from test_deterministic import BF16, CPU, FP32, build, randn

import generate
from generate import Engine
from kernels import BATCH_INVARIANT, FAST
from model import Transformer
from scripts import cli, drafts
from scripts import sampler as sampling
from scripts.checkpoint import Refusal
from scripts.contract import HalfRight
from scripts.drafts import DraftModel, Pauses, PromptLookup
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

ROOM = 160


def blurred(model, amount=0.02):
    """A model like `model` as `build` makes it, its weights changed a little: a draft that is right
    now and then."""
    other = Transformer(model.config, model.ops, CPU, model.dtype)
    for i, loader in enumerate(other.loaders):
        tensors = []
        for shape in loader.shapes.values():
            is_norm = len(loader.shapes) == 1 and len(shape) == 1
            tensor = randn(*shape, seed=i) * 0.3 + is_norm
            noise = randn(*shape, seed=1000 + i) * amount
            tensors.append((tensor + noise).to(model.dtype))
        loader.load(tensors)
    return other


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """By dtype, a model and one that drafts for it."""
    models = {}
    for dtype in (BF16, FP32):
        model = build(tmp_path_factory.mktemp("model"), BATCH_INVARIANT, dtype)
        models[dtype] = model, blurred(model)
    return models


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    model = build(tmp_path_factory.mktemp("model"), FAST, FP32)
    return model, blurred(model)


def speculating(models, kind, slots, k, chunk=0, room=ROOM):
    """An engine whose drafts come by lookup or by the second of two models, whatever they cost."""
    model, small = models
    drafter = PromptLookup(k)
    if kind == "model":
        drafter = DraftModel(Engine(small, Tokenizer(None), slots, room + k, chunk), k)
    return Engine(model, Tokenizer(None), slots, room, chunk, drafter)


def answers(engine, requests):
    found = {}
    for completion, _ in engine.generate(requests):
        if completion.finish_reason:
            found[completion.request.id] = completion.tokens, completion.logprobs
    return found


def tokens_of(engine, requests):
    return {i: tokens for i, (tokens, _) in answers(engine, requests).items()}


def plain(model, slots=1):
    return Engine(model, Tokenizer(None), slots, ROOM)


def repeating(i, length, new=12, **fields):
    """A prompt that says everything twice, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(300, (max(length // 2, 1),), generator=generator).tolist()
    return Request(i, "", (ids * 2 + ids)[:length], max_new_tokens=new, **fields)


OPTIONS = [{"temperature": 0.0}, {"top_k": 2, "seed": 7}, {"top_k": 50, "top_p": 0.9}]
LENGTHS = [1, 9, 10, 30, 64, 65, 3, 17, 100, 2, 8, 15, 22, 36, 43, 50, 71, 85, 120, 134]
REQUESTS = [repeating(i, n, 5 + i % 9, **OPTIONS[i % 3]) for i, n in enumerate(LENGTHS)]
KINDS = ["lookup", "model"]
kinds = pytest.mark.parametrize("kind", KINDS)


def narrowed(logits, pos, row, processed=sampling.processed):
    """Few tokens to draw from, so that text repeats itself and lookup is right now and then."""
    is_chosen = torch.arange(logits.shape[-1]) % 300 < 5
    return processed(torch.where(is_chosen, logits, logits - 1e4), pos, row)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(sampling, "processed", narrowed)


@pytest.fixture(scope="module")
def alone(exact):
    """By dtype, the answers to REQUESTS of few tokens without speculation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "processed", narrowed)
        return {dtype: answers(plain(exact[dtype][0]), REQUESTS) for dtype in exact}


# ---- the same bits


@pytest.mark.parametrize(
    "dtype, slots, ks",
    [
        (BF16, 1, (1, 2, 5, 8)),
        (BF16, 8, (3, 4, 6, 7)),
        pytest.param(FP32, 1, (1, 2, 5, 8), marks=pytest.mark.slow),
        (FP32, 8, (3, 4, 6, 7)),
    ],
    ids=str,
)
@kinds
def test_same_bits(exact, alone, narrow, kind, dtype, slots, ks):
    """At twenty lengths of the prompt and k = 1 to 8, tokens and logprobs are those without
    speculation; drafts were accepted, and others rejected."""
    want = alone[dtype]
    assert len({str(answer) for answer in want.values()}) == len(REQUESTS)
    for k in ks:
        engine = speculating(exact[dtype], kind, slots, k)
        assert answers(engine, REQUESTS) == want
        counts = engine.stats.accept_counts
        assert counts[0] > 0 and sum(counts[1:]) > 0
        assert sum((i + 1) * n for i, n in enumerate(counts)) <= engine.stats.new_tokens


@kinds
def test_same_bits_in_chunks_and_order(tmp_path, narrow, kind):
    model = build(tmp_path, BATCH_INVARIANT, FP32, "3 KV heads, biases")
    models = model, blurred(model)
    some = REQUESTS[:4] + REQUESTS[6:8]
    want = answers(plain(model), some)
    for chunk in (1, 7):
        engine = speculating(models, kind, 3, 4, chunk)
        assert answers(engine, some[::-1]) == want


@kinds
def test_noise_by_draft_order_differs(exact, alone, narrow, kind, monkeypatch):
    """Broken: noise keyed by the place in a round instead of the position."""

    def by_place(key, pos, ids, real=sampling.gumbel):
        return real(key, pos - pos[0], ids)

    sampled = [request for request in REQUESTS if request.temperature]
    monkeypatch.setattr(sampling, "gumbel", by_place)
    want = answers(plain(exact[FP32][0]), sampled)
    assert answers(speculating(exact[FP32], kind, 1, 4), sampled) != want


def test_flag_off_differs(fast, narrow):
    """The comparison can fail: FAST rounds several rows of fp32 otherwise than one."""
    want = answers(plain(fast[0]), REQUESTS)
    assert answers(speculating(fast, "model", 1, 4), REQUESTS) != want


def test_wrong_accept_rule_differs(exact, alone, narrow, monkeypatch):
    """Broken: every draft is accepted."""
    want = {i: tokens for i, (tokens, _) in alone[FP32].items()}
    engine = speculating(exact[FP32], "lookup", 1, 4)
    monkeypatch.setattr(drafts, "agreement", lambda draft, drawn: len(draft))
    assert tokens_of(engine, REQUESTS) != want


@pytest.mark.parametrize("slots", [1, 3])
def test_the_model_as_its_own_draft(exact, slots):
    """Every draft is accepted: k + 1 tokens a round."""
    model, k = exact[BF16][0], 4
    requests = [repeating(i, LENGTHS[i], 1 + 3 * (k + 1), **OPTIONS[i]) for i in range(3)]
    engine = speculating((model, model), "model", slots, k)
    assert answers(engine, requests) == answers(plain(model), requests)
    assert engine.stats.accept_counts == [0] * k + [9]


def test_greedy_fp32_tokens_without_the_flag(fast, narrow):
    """As vLLM's n-gram speculation once failed to: greedy text is the same at 1 and at k + 1 tokens
    a pass."""
    requests = [replace(request, temperature=0.0) for request in REQUESTS]
    want = tokens_of(plain(fast[0]), requests)
    for kind, slots in itertools.product(KINDS, (1, 5)):
        assert tokens_of(speculating(fast, kind, slots, 4), requests) == want


# ---- the distribution


FIRST = torch.tensor([1, 2, 3, 4]) / 10
SECOND = torch.tensor([[7, 1, 1, 1], [2, 2, 2, 4], [1, 5, 3, 1], [4, 3, 2, 1]]) / 10
LAW = (FIRST[:, None] * SECOND).flatten().tolist()  # of pairs


class Pairs:
    """A model of pairs of tokens over a vocabulary of 4: at odd positions the first of a pair,
    whatever came before, and then a second by that."""

    config = None
    device = CPU
    ops = FAST
    graphed = False
    table = torch.cat([FIRST[None], SECOND]).log()

    def new_cache(self, batch_size, length):
        return []

    def __call__(self, tokens_BT, pos_BT, cache, end, last=False, decode=False):
        makes_a_first = pos_BT % 2 == 0
        return self.table[torch.where(makes_a_first, 0, tokens_BT + 1)]


class Guesses:
    """Drafts of two tokens that know nothing."""

    k = 2

    def propose(self, slots, sampler):
        return [self.guess(completion) for completion in slots]

    def guess(self, completion):
        if completion is None:
            return [0, 0]
        number = completion.request.seed + len(completion.ids)
        return [number % 4, number // 4 % 4]


def pairs(seeds=1000, each=20):
    """How often each pair of tokens came; a draft is for a first or for a second."""
    engine = Engine(Pairs(), Tokenizer(None), 200, 2 * each + 1, drafter=Guesses())
    requests = []
    for seed in range(seeds):
        options = {"max_new_tokens": 2 * each, "temperature": 1.0, "seed": seed}
        requests.append(Request(seed, "", [0], **options))
    found = tokens_of(engine, requests)
    assert len(found) == seeds
    assert min(engine.stats.accept_counts) > 0
    a_b = torch.tensor(list(found.values())).view(-1, 2)
    return (4 * a_b[:, 0] + a_b[:, 1]).bincount(minlength=16).tolist()


def test_distribution():
    found = pairs()
    assert sum(found) == 20_000
    assert fits(found, LAW)


def test_wrong_accept_rule_fails(monkeypatch):
    """Broken: a draft also passes where the model draws the token next to it."""

    def wrong(draft, drawn):
        count = 0
        while count < len(draft) and abs(draft[count] - drawn[count]) <= 1:
            count += 1
        drawn[:count] = draft[:count]
        return count

    monkeypatch.setattr(drafts, "agreement", wrong)
    assert not fits(pairs(), LAW)


# ---- what is drafted


class Text:
    """What PromptLookup reads of a completion."""

    def __init__(self, *ids):
        self.ids = list(ids)


LOOKUPS = {
    "what followed": ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),
    "the last place": ([1, 2, 3, 1, 2, 4, 9, 1, 2], [4, 9, 1, 2]),
    "the longest match": ([1, 2, 3, 5, 6, 9, 2, 3, 7, 1, 2, 3], [5, 6, 9, 2]),
    "what was drafted is text as well": ([5, 5, 5], [5, 5, 5, 5]),
    "two in turns": ([1, 2, 1, 2], [1, 2, 1, 2]),
    "nothing": ([1, 2, 3, 4], None),
    "too short": ([0, 0], None),
    "one token": ([7], None),
    "a surrogate is an id like others": ([151935, 55296, 1] * 2, [151935, 55296, 1, 151935]),
}


@pytest.mark.parametrize("ids, expected", LOOKUPS.values(), ids=LOOKUPS)
def test_lookup(ids, expected):
    text = Text(*ids)
    assert PromptLookup(4).propose([text], None) == (expected and [expected])
    assert text.ids == ids


def test_lookup_needs_half_of_the_batch():
    found = Text(1, 2, 3, 1, 2)
    none = Text(1, 2, 3, 4)
    lookup = PromptLookup(2)
    assert lookup.propose([found, none, None], None) == [[3, 1], [0, 0], [0, 0]]
    assert lookup.propose([found, none, none, None], None) is None


def test_a_draft_of_a_short_context_stops(exact):
    """Beyond the context of the draft model the model goes on alone."""
    model = exact[FP32][0]
    small = blurred(model, amount=0)
    small.config = replace(small.config, max_position_embeddings=30)
    requests = [repeating(0, 10, 60, temperature=0.0)]
    engine = speculating((model, small), "model", 1, 4)
    assert answers(engine, requests) == answers(plain(model), requests)
    assert 3 <= sum(engine.stats.accept_counts) <= 5


# ---- whether it pays


def drafting_rounds(pauses, accepted, rounds):
    """The numbers of the rounds that draft, where each of them accepts so many in each slot."""
    found = []
    for number in range(rounds):
        if not pauses.now():
            found.append(number)
            pauses.record(accepted)
    return found


def test_pauses_double_up_to_64_rounds():
    rounds = drafting_rounds(Pauses(pays=2), [1], 300)
    lengths = [after - before - 1 for before, after in itertools.pairwise(rounds)]
    assert rounds[0] == 0
    assert lengths == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_a_round_that_pays_ends_the_doubling():
    pauses = Pauses(pays=2)
    drafting_rounds(pauses, [1], 37)
    # Now a pause of 32 rounds begins.
    assert drafting_rounds(pauses, [2], 35) == [32, 33, 34]
    assert drafting_rounds(pauses, [1], 10) == [0, 2, 5]


@pytest.mark.parametrize("pays, accepted", [(0, [0]), (2, [2]), (2, [0, 2, 3]), (1.5, [2, 2, 0])])
def test_no_pause_where_most_slots_accept_enough(pays, accepted):
    assert drafting_rounds(Pauses(pays), accepted, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pays, accepted", [(1, [0]), (2.5, [2]), (2, [9, 1, 0])])
def test_pause_where_most_slots_accept_too_few(pays, accepted):
    assert drafting_rounds(Pauses(pays), accepted, 5) == [0, 2]


def test_drafts_pause_by_what_a_round_needs(exact):
    """Of three drafts, two are accepted each time: every round drafts where that is enough, and few
    do where it is not. The answer is the same."""
    model = exact[FP32][0]
    requests = [repeating(0, 3, 130)]
    want = answers(plain(model), requests)

    def rounds(pays):
        engine = Engine(model, Tokenizer(None), 1, ROOM, drafter=HalfRight(want, 3))
        engine.pauses = Pauses(pays)
        assert answers(engine, requests) == want
        return sum(engine.stats.accept_counts)

    assert rounds(2) >= 40
    assert 2 <= rounds(2.1) <= 7


# ---- ends inside a round


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("tiny")))


ENDLESS = Request(0, "", [9, 20, 30], max_new_tokens=30, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("flags", [["--draft_quantize", "int8"], ["--prompt_lookup"]], ids=str)
def test_all_that_is_compiled_is_warm(tmp_path, monkeypatch, flags):
    """A run feeds no model a number of tokens that was not tried while the engine was built: each
    has code, and on a GPU a graph, of its own."""
    fed = []
    own = Engine.step

    def step(self, tokens, *more):
        fed.append((self.drafter is None, len(tokens[0])))
        return own(self, tokens, *more)

    monkeypatch.setattr(Engine, "step", step)
    directory = write_checkpoint(tmp_path, num_hidden_layers=1)
    argv = ["--checkpoint_path", str(directory), "--deterministic", "--speculate_k", "3"]
    args = generate.cli.parse_args([*argv, *flags])
    engine = generate.build(args, *generate.load(args), 60)
    warm = set(fed)
    fed.clear()
    complete(engine, replace(ENDLESS, prompt_ids=[9, 20, 30] * 3))
    assert set(fed) and set(fed) <= warm


def complete(engine, request):
    for completion, _ in engine.generate([request]):
        if completion.finish_reason:
            return completion


def assert_alike(tiny, request, room=ROOM, k=5):
    """The completion without speculation, which is the same with speculation by the model itself,
    which accepts each draft."""
    model, tokenizer = tiny
    drafter = DraftModel(Engine(model, tokenizer, 1, room + k), k)
    want = complete(Engine(model, tokenizer, 1, room), request)
    found = complete(Engine(model, tokenizer, 1, room, drafter=drafter), request)
    assert found.tokens == want.tokens
    assert found.text == want.text
    assert found.finish_reason == want.finish_reason
    return want


def test_max_new_tokens_inside_a_round(tiny):
    for new in range(1, 14):
        found = assert_alike(tiny, replace(ENDLESS, max_new_tokens=new))
        assert len(found.tokens) == new


def test_end_token_inside_a_round(tiny, monkeypatch):
    _, tokenizer = tiny
    firsts = {}
    for i, token in enumerate(assert_alike(tiny, ENDLESS).tokens):
        firsts.setdefault(token, i)
    for token, i in list(firsts.items())[:12]:
        monkeypatch.setattr(tokenizer, "eos_ids", {token})
        found = assert_alike(tiny, replace(ENDLESS, ignore_eos=False))
        assert found.finish_reason == "stop" and len(found.tokens) == i + 1


def test_stop_string_across_a_round(tiny):
    text = assert_alike(tiny, ENDLESS).text
    for start in range(0, len(text) - 3, 3):
        stop = text[start : start + 3]
        found = assert_alike(tiny, replace(ENDLESS, stop=(stop,)))
        assert found.finish_reason == "stop" and stop not in found.text


def test_context_ends_inside_a_round(tiny):
    context = tiny[0].config.max_position_embeddings
    for room in range(1, 9):
        ids = random_ids(context - room, 0)
        request = replace(ENDLESS, prompt_ids=ids, max_new_tokens=room)
        found = assert_alike(tiny, request, room=context)
        assert len(found.tokens) == room


# ---- the command line


def lines(capsys, *flags):
    generate.main([*map(str, flags), "--json", "--max_new_tokens", "20", "--deterministic"])
    *completions, stats = map(json.loads, capsys.readouterr().out.splitlines())
    return completions, stats["stats"]["accept_counts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a draft for it that is right now and then, and one of another vocabulary."""
    model, draft, other = (tmp_path_factory.mktemp(name) for name in ("model", "draft", "other"))
    for folder in (model, draft, other):
        write_checkpoint(folder, num_hidden_layers=1)
    weights = load_file(draft / "model.safetensors")
    for i, (name, weight) in enumerate(weights.items()):
        weights[name] = weight + 0.01 * randn(*weight.shape, seed=i)
    save_file(weights, draft / "model.safetensors")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|end|>"', '"<|fin|>"'))
    return model, draft, other


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_flags(folders, capsys, temperature):
    flags = ["--checkpoint_path", folders[0], "--temperature", temperature]
    flags += ["--prompt", "a b a b a b", "--prompt", "one"]
    want, counts = lines(capsys, *flags)
    assert counts == []
    draft = ["--draft_checkpoint_path", folders[1], "--speculate_k", 3]
    found, counts = lines(capsys, *flags, *draft)
    assert found == want and len(counts) == 4 and counts[3] > 0
    found, counts = lines(capsys, *flags, *draft, "--batch_size", 2, "--prefill_chunk", 2)
    assert sorted(found, key=lambda line: line["id"]) == want and counts[3] > 0
    found, counts = lines(capsys, *flags, "--prompt_lookup")
    assert found == want and len(counts) == 6


@pytest.mark.parametrize("kind, pays", [("lookup", 2.5), ("model", 2)])
def test_what_pays(folders, monkeypatch, kind, pays):
    """Drafts that cost nothing have to make up for what a round takes longer than a step, as it is
    measured; of a model's drafts half have to be accepted."""
    flags = ["--checkpoint_path", str(folders[0]), "--speculate_k", "4"]
    if kind == "lookup":
        flags += ["--prompt_lookup"]
    else:
        flags += ["--draft_checkpoint_path", str(folders[1])]
    args = cli.parse_args(flags)
    monkeypatch.setattr(generate.machine, "warm_up", lambda engine, row: 0.07 / 0.02 - 1)
    engine = generate.build(args, *generate.load(args), length=64)
    assert engine.k == 4 and engine.pauses.pays == pytest.approx(pays)


def padded(folder, path, rows):
    """The same model and tokenizer, of a table with more rows; what they say is likely."""
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        more = 0.3 * randn(rows, weights[name].shape[1], seed=i)
        weights[name] = torch.cat((weights[name], more))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["vocab_size"] += rows
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_vocabularies(folders, tmp_path):
    """One may have tokens more than the other, but no other tokens by the same ids."""
    model, draft, other = folders
    more = shutil.copytree(draft, tmp_path / "more")
    (more / "added_tokens.json").write_text(json.dumps({"<|new|>": 380}))
    assert len(Tokenizer(more).vocab()) == len(Tokenizer(model).vocab()) + 1
    for one, two in ((model, draft), (model, more), (more, model)):
        assert Tokenizer(one).agrees(Tokenizer(two))
    for one in (model, more):
        assert not Tokenizer(one).agrees(Tokenizer(other))
        assert not Tokenizer(other).agrees(Tokenizer(one))
    assert Tokenizer(None).agrees(Tokenizer(model))


@pytest.mark.parametrize("temperature", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("rows", [(64, 0), (0, 64), (64, 128)], ids=str)
def test_tables_of_other_sizes(folders, tmp_path, capsys, rows, temperature):
    """Of the model and of its draft; either may say what the other has not."""
    model, draft = (padded(folders[i], tmp_path / str(i), rows[i]) for i in (0, 1))
    flags = ["--checkpoint_path", model, "--temperature", temperature, "--ignore_eos"]
    flags += ["--prompt", "a b a b a b", "--prompt", "one"]
    want, _ = lines(capsys, *flags)
    size = json.loads((folders[0] / "config.json").read_text())["vocab_size"]
    if rows[0] and temperature:
        assert any(i >= size for line in want for i in line["tokens"])
    for more in ([], ["--batch_size", 2, "--prefill_chunk", 2]):
        draft_flags = ["--draft_checkpoint_path", draft, "--speculate_k", 3]
        found, counts = lines(capsys, *flags, *draft_flags, *more)
        assert sorted(found, key=lambda line: line["id"]) == want
        assert sum(counts[1:]) > 0


REFUSED = {
    "speculate_k": (["--prompt_lookup", "--speculate_k", "0"], "speculate_k 0"),
    "both": (["--prompt_lookup", "--draft_checkpoint_path", "x"], "excludes"),
    "no directory": (["--draft_checkpoint_path", "nowhere"], "nowhere"),
    "vocabulary": (["--draft_checkpoint_path", "OTHER"], "vocabulary"),
}


@pytest.mark.parametrize("flags, word", REFUSED.values(), ids=REFUSED)
def test_refused(folders, flags, word):
    flags = [flag.replace("OTHER", str(folders[2])) for flag in flags]
    with pytest.raises(Refusal, match=word):
        generate.main(["--checkpoint_path", str(folders[0]), "--prompt", "a", *flags])


@pytest.mark.slow
@needs_compiler
def test_compiled(folders, capsys):
    """A draft and its model, of one shape, in one process: each computes with its own weights, so
    that some drafts are accepted and others are not, and the answers are those of the model."""
    flags = ["--checkpoint_path", folders[0], "--temperature", 0]
    flags += ["--prompt", "a b a b a b", "--prompt", "one two three"]
    want, _ = lines(capsys, *flags)
    draft = ["--draft_checkpoint_path", folders[1], "--speculate_k", 2]
    _, eager_counts = lines(capsys, *flags, *draft)
    torch._dynamo.reset()
    found, counts = lines(capsys, *flags, *draft, "--compile")
    torch._dynamo.reset()
    assert found == want
    assert counts == eager_counts and counts[0] > 0 and counts[2] > 0
