"""Penalties, biases and min-p: what is kept and how often it is drawn is what transformers' own
processors say, and the text that a draw looks at is its own, whatever runs beside it."""

import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import CPU, fits, load, random_ids, write_checkpoint
from test_deterministic import FP32, build
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import generate
from generate import Engine
from kernels import BATCH_INVARIANT
from scripts import sampler as sampling
from scripts.contract import HalfRight, complete
from scripts.drafts import DraftModel, PromptLookup
from scripts.requests import Request
from scripts.sampler import Sampler
from scripts.tokenizer import Tokenizer

V = 60
PROMPT = [3, 5, 8, 5, 40, 41, 59, 0]
LOGITS = 2 * torch.randn(V, generator=torch.Generator().manual_seed(0))
BIAS = {5: 3.0, 17: -1e30, 30: -0.5, 59: 1.25}
ALL = {
    "temperature": 1.4,
    "top_k": 30,
    "top_p": 0.93,
    "min_p": 0.03,
    "repetition_penalty": 1.7,
    "logit_bias": BIAS,
}
NONE = {
    "temperature": 1.0,
    "top_k": V,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
}


def ask(**fields):
    return Request(0, "", PROMPT, **NONE | fields)


@pytest.fixture(scope="module")
def theirs():
    """Logits as generate() of transformers draws from them, its processors in its order."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": V}
    model = LlamaForCausalLM(LlamaConfig(**shape))

    def process(request):
        bias = request.logit_bias or {}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        settings = {name: getattr(request, name) for name in names}
        if bias:
            settings["sequence_bias"] = [[[i], amount] for i, amount in bias.items()]
        config = GenerationConfig(do_sample=True, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, _ = model._prepare_generation_config(config)
            model._prepare_special_tokens(config)
            processors = model._get_logits_processor(config, len(request.prompt_ids))
        return processors(torch.tensor([request.prompt_ids]), LOGITS[None].clone())[0]

    return process


def draws(request, count=10_000):
    """How often each token is drawn next, by so many seeds."""
    found = torch.zeros(V, dtype=torch.int64)
    for start in range(0, count, 1000):
        rows = [replace(request, seed=seed) for seed in range(start, start + 1000)]
        sampler = Sampler(rows, CPU)
        pos_N = torch.full((1000,), len(request.prompt_ids))
        drawn = sampler(LOGITS.expand(1000, -1), pos_N, sampler.settings)
        found += drawn.bincount(minlength=V)
    return found.tolist()


def kept(request, monkeypatch):
    """The ids that can be drawn: each is, where the noise is for it alone, if it is kept."""

    def one_each(key, pos, ids):
        return (ids == torch.arange(V)[:, None]) * 1e6

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "gumbel", one_each)
        sampler = Sampler([request] * V, CPU)
        pos_N = torch.full((V,), len(request.prompt_ids))
        drawn = sampler(LOGITS.expand(V, -1), pos_N, sampler.settings)
    return (drawn == torch.arange(V)).nonzero()[:, 0].tolist()


SETTINGS = {
    "penalty": {"repetition_penalty": 1.5},
    "reward": {"repetition_penalty": 0.6},
    "min-p": {"min_p": 0.1},
    "bias": {"logit_bias": BIAS},
    "penalty and bias": {"repetition_penalty": 1.5, "logit_bias": BIAS},
    "penalty before top-k": {"repetition_penalty": 3.0, "top_k": 7},
    "bias before top-k": {"logit_bias": {30: 9.0, 31: 8.0}, "top_k": 3},
    "min-p after temperature": {"min_p": 0.2, "temperature": 2.5},
    "min-p after top-p": {"min_p": 0.05, "top_p": 0.8},
    "all": ALL,
}
settings = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)


@settings
def test_distribution_is_that_of_transformers(theirs, fields):
    request = ask(**fields)
    expected = theirs(request).softmax(-1).tolist()
    observed = draws(request)
    assert sum(observed) == 10_000
    assert fits(observed, expected)


@pytest.mark.parametrize("name", ALL)
def test_each_setting_shows_in_the_distribution(theirs, name):
    """Control: what is drawn without one of them does not fit all of them. Of filters, the
    narrowest shows."""
    every = ALL | {"min_p": 0.5} if name == "min_p" else ALL
    fields = {**every, name: NONE[name]}
    observed = draws(ask(**fields))
    assert fits(observed, theirs(ask(**fields)).softmax(-1).tolist())
    assert not fits(observed, theirs(ask(**every)).softmax(-1).tolist())


@settings
def test_the_same_ids_are_kept(theirs, monkeypatch, fields):
    request = ask(**fields)
    want = theirs(request).isfinite().nonzero()[:, 0].tolist()
    bias = request.logit_bias or {}
    assert kept(request, monkeypatch) == [i for i in want if bias.get(i) != -1e30]


def test_a_bias_after_the_penalty_differs(theirs, monkeypatch):
    """Control: the order of the two matters, and is the one of transformers."""
    fields = {"repetition_penalty": 1.5, "logit_bias": BIAS}

    def other_order(logits_NV, pos_N, row):
        bias = {name: row[name] for name in ("bias", "biased_ids")}
        rest = {name: x for name, x in row.items() if name not in bias}
        return processed(processed(logits_NV, pos_N, rest), pos_N, bias)

    processed = sampling.processed
    monkeypatch.setattr(sampling, "processed", other_order)
    assert not fits(draws(ask(**fields)), theirs(ask(**fields)).softmax(-1).tolist())


def test_greedy_takes_bias_and_penalty(theirs):
    for fields in SETTINGS.values():
        request = ask(**fields | {"temperature": 0.0})
        sampler = Sampler([request], CPU)
        drawn = sampler(LOGITS[None], torch.tensor([len(PROMPT)]), sampler.settings)
        assert drawn == theirs(replace(request, temperature=1.0)).argmax()


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0, "min_p": 0.5}], ids=str)
def test_what_nobody_asks_for_costs_nothing(monkeypatch, fields):
    """A draw calls no function that others have asked for, and a step reads no text."""
    monkeypatch.setattr(sampling, "spread", None)
    sampler = Sampler([Request(0, "", PROMPT, **fields), None], CPU)
    assert sampler.names == ["temperature", "top_k", "top_p", "key"]
    assert sampler.fork() is sampler
    sampler.read(None, None)
    sampler(LOGITS.expand(2, -1), torch.tensor([8, 8]), sampler.settings)


# ---- beside others


LENGTHS = [1, 9, 10, 30, 64, 65, 3, 17, 100, 2]
OPTIONS = [
    {"temperature": 0.0, "repetition_penalty": 1.6},
    {"top_k": 4, "seed": 7, "repetition_penalty": 1.3, "logit_bias": {7: 4.0, 299: -1e30}},
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.2, "seed": 9, "repetition_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {i: -3.0 for i in range(100)}},
]
REQUESTS = []
for i, length in enumerate(LENGTHS):
    half = random_ids(length // 2 + 1, 400 + i)
    ids = (half * 3)[:length]  # so that prompt lookup finds something
    REQUESTS.append(Request(i, "", ids, max_new_tokens=14, **OPTIONS[i % 5]))
PENALIZED = [r for r in REQUESTS if r.repetition_penalty != 1]
ROOM = 130


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model"), BATCH_INVARIANT, FP32)


@pytest.fixture(scope="module")
def alone(model):
    return dict(complete(model, REQUESTS, length=ROOM))


def assert_alone(alone, answers):
    assert answers
    for name, answer in answers:
        assert answer == alone[name], name


def drafting(model, slots, k, own_size=None):
    """The model is its own draft; of `own_size`, it knows no more ids than that."""
    drafter = DraftModel(Engine(model, Tokenizer(None), slots, ROOM + k), k)
    drafter.own_size = own_size or drafter.own_size
    return drafter


def test_settings_show(model, alone):
    """Each of the requests above has another answer without what it asks for."""
    for request in REQUESTS:
        plain = replace(request, repetition_penalty=1.0, logit_bias=None, min_p=0.0)
        found = dict(complete(model, [plain], length=ROOM))
        asked = plain != request
        assert (found[request.id] != alone[request.id]) is asked


@pytest.mark.parametrize("slots", [2, 3, 10])
def test_same_bits_in_any_batch(model, alone, slots):
    for order in (REQUESTS, REQUESTS[::-1]):
        assert_alone(alone, complete(model, order, slots, ROOM))


def test_same_bits_in_chunks(model, alone):
    for chunk in (1, 7):
        assert_alone(alone, complete(model, REQUESTS, 3, ROOM, prefill_chunk=chunk))


KINDS = {
    "half right": lambda model, alone, slots, k: HalfRight(alone, k),
    "lookup": lambda model, alone, slots, k: PromptLookup(k),
    "model": lambda model, alone, slots, k: drafting(model, slots, k, 150),
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_with_drafts(model, alone, kind):
    """Right ones and wrong ones, those of prompt lookup, and of a model with a smaller table."""
    counts = []
    for slots, k in ((1, 4), (3, 3), (4, 8)):
        drafter = KINDS[kind](model, alone, slots, k)
        engine = Engine(model, Tokenizer(None), slots, ROOM, drafter=drafter)
        found = []
        for completion, _ in engine.generate(REQUESTS):
            if completion.finish_reason:
                answer = (completion.tokens, completion.logprobs)
                found.append((completion.request.id, answer))
        assert_alone(alone, found)
        counts.append(engine.stats.accept_counts)
    assert sum(each[0] for each in counts) > 0
    assert sum(sum(each[1:]) for each in counts) > 0


def differ(alone, answers):
    return [name for name, answer in answers if answer != alone[name]]


def test_a_penalty_that_forgets_drafts_differs(model, alone, monkeypatch):
    """Control: of what is fed in a pass, a text gets the first token alone."""
    read = Sampler.read

    def first(self, tokens_BT, pos_BT):
        read(self, tokens_BT[:, :1], pos_BT[:, :1])

    monkeypatch.setattr(Sampler, "read", first)
    assert_alone(alone, complete(model, REQUESTS, 3, ROOM))
    assert differ(alone, complete(model, REQUESTS, 3, ROOM, drafter=HalfRight(alone, 4)))


def test_a_penalty_for_all_drafts_differs(model, alone, monkeypatch):
    """Control: each position of a pass looks at what is fed behind it as well."""
    processed = sampling.processed

    def far(logits_NV, pos_N, row):
        return processed(logits_NV, pos_N + 4, row)

    monkeypatch.setattr(sampling, "processed", far)
    assert differ(alone, complete(model, REQUESTS, 3, ROOM, drafter=HalfRight(alone, 4)))


def test_a_penalty_that_forgets_the_prompt_differs(model, alone, monkeypatch):
    texts = sampling.texts

    def forgetful(rows):
        return texts([replace(r, prompt_ids=[299] * len(r.prompt_ids)) for r in rows])

    monkeypatch.setattr(sampling, "texts", forgetful)
    assert differ(alone, complete(model, PENALIZED, 3, ROOM))


def test_one_text_for_all_drafters_differs(model, alone, monkeypatch):
    """Control: what a draft of a smaller table makes of a token gets into the text of the model."""
    monkeypatch.setattr(Sampler, "fork", lambda self: self)
    some = [replace(r, temperature=0.0, logit_bias=None) for r in PENALIZED]
    want = dict(complete(model, some, length=ROOM))
    assert differ(want, complete(model, some, 3, ROOM, drafter=drafting(model, 3, 4, 150)))


@pytest.mark.parametrize("broken", [False, True], ids=["right", "deaf"])
def test_a_draft_penalizes_as_its_model(model, alone, monkeypatch, broken):
    """A model that drafts for itself draws what it will draw: each draft is accepted. Control: not
    where its drafts do not get into the text that it looks at."""
    k, slots = 4, 2
    requests = [replace(r, max_new_tokens=1 + 2 * (k + 1)) for r in PENALIZED[:4]]
    drafter = drafting(model, slots, k)
    step = drafter.engine.step

    def deaf(tokens, starts, sampler):
        read = partial(Sampler.read, sampler)
        sampler.read = lambda tokens_BT, pos_BT: tokens_BT.shape[1] == 2 and read(tokens_BT, pos_BT)
        return step(tokens, starts, sampler)

    if broken:
        monkeypatch.setattr(drafter.engine, "step", deaf)
    engine = Engine(model, Tokenizer(None), slots, ROOM, drafter=drafter)
    for _ in engine.generate(requests):
        pass
    counts = engine.stats.accept_counts
    assert (sum(counts[:-1]) == 0) is not broken


def test_texts_that_outgrow_their_room():
    """Drafts go on past the last token of a request; what is drawn before is not changed by it."""
    request = Request(0, "", [1, 2, 3], max_new_tokens=1, repetition_penalty=5.0)
    sampler = Sampler([request], CPU)
    before = sampler.settings[sampler.names.index("text")].clone()
    assert before.shape == (1, 16)
    sampler.read(torch.full((1, 40), 9), torch.arange(3, 43)[None])
    after = sampler.settings[sampler.names.index("text")]
    assert torch.equal(after[:, :3], before[:, :3]) and (after[:, 3:] == 9).all()


# ---- end to end


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_greedy_text_is_that_of_transformers(tiny):
    """Forty tokens by a penalty and biases, in fp32."""
    reference = LlamaForCausalLM.from_pretrained(tiny)
    model, tokenizer = load(tiny)
    ids = random_ids(20, 0)
    bias = {30: 6.0, 31: 5.0, 100: -8.0}
    options = {"max_new_tokens": 40, "eos_token_id": None, "do_sample": False}
    texts = []
    for penalty, biases in ((1.0, {}), (1.4, {}), (1.0, bias), (1.4, bias), (0.7, bias)):
        own = dict(options, repetition_penalty=penalty)
        if biases:
            own["sequence_bias"] = [[[i], amount] for i, amount in biases.items()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = reference.generate(torch.tensor([ids]), pad_token_id=0, **own)[0, 20:].tolist()
        request = Request(0, "", ids, max_new_tokens=40, temperature=0.0, ignore_eos=True)
        request = replace(request, repetition_penalty=penalty, logit_bias=biases)
        for completion, _ in Engine(model, tokenizer, 1, 80).generate([request]):
            found = completion.tokens
        assert found == want
        texts.append(found)
    assert len({str(text) for text in texts}) == 5


def run(capsys, *argv):
    generate.main([*map(str, argv), "--json", "--deterministic", "--max_new_tokens", "12"])
    *completions, _ = map(json.loads, capsys.readouterr().out.splitlines())
    return completions


def test_the_same_lines_in_two_samples_and_resumed(tiny, tmp_path, capsys):
    """Each line of a file with settings of its own, as flags give them; logprobs are of the raw
    logits, so that prefill gives them again."""
    lines = [
        {"prompt": "the dog jumps over the dog", "repetition_penalty": 1.5, "seed": 3},
        {"prompt": "the fox", "min_p": 0.3, "logit_bias": {"40": 5, "50": -100.5}},
        {"prompt": "the fox"},
        {"prompt": "a line, a line", "repetition_penalty": 0.7, "temperature": 0},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = ["--checkpoint_path", tiny, "--num_samples", 2]
    want = []
    for i, line in enumerate(lines):
        flags = [f"--{name}={json.dumps(line[name])}" for name in line if name != "prompt"]
        found = run(capsys, *base, "--prompt", line["prompt"], *flags)
        want += [completion | {"id": i} for completion in found]
    order = [(c["id"], c["sample"]) for c in want]
    assert order == sorted(order) and len(order) == 8

    output = tmp_path / "out.jsonl"
    argv = [*base, "--prompts_file", path, "--output", output]
    found = run(capsys, *argv, "--batch_size", 3, "--prompt_lookup", "--prefill_chunk", 2)
    assert sorted(found, key=lambda c: (c["id"], c["sample"])) == want
    written = output.read_text().splitlines()
    output.write_text("\n".join(written[:3]) + "\n" + written[3][:40])
    run(capsys, *argv, "--batch_size", 2)
    again = sorted(map(json.loads, output.read_text().splitlines()), key=lambda c: c["id"])
    assert sorted(again, key=lambda c: (c["id"], c["sample"])) == want
    scored = run(capsys, "--checkpoint_path", tiny, "--score", output)
    key = [(c["id"], c["sample"]) for c in scored]
    assert sorted(key) == order
    assert sorted(scored, key=lambda c: (c["id"], c["sample"])) == want
