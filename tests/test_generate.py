"""The engine of generate.py, compiled and not, on tiny random checkpoints."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (
    CONTEXT,
    SPECIAL,
    fits,
    load,
    needs_compiler,
    random_ids,
    train_bpe,
    write_checkpoint,
    write_json,
    write_weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

import generate
from generate import Engine
from kernels import BATCH_INVARIANT, Fast
from model import FAMILIES, Block, Transformer
from scripts import machine
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

# Other files may import these from here, too.
__all__ = ["CONTEXT", "SPECIAL", "fits", "load", "needs_compiler", "train_bpe"]
__all__ += ["write_checkpoint", "write_json", "write_weights"]


def complete(engine, requests):
    """{(id, sample): finished completion}; the streamed pieces of each must add up to its text."""
    done = {}
    pieces = {}
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


def tokens_of(engine, requests):
    return {key: completion.tokens for key, completion in complete(engine, requests).items()}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return load(tiny_dir)


# ---- slots


def greedy(i, ids, new):
    return Request(i, "", ids, max_new_tokens=new, temperature=0.0, ignore_eos=True)


def mixed_requests(n=64):
    """Prompts of 1 to 60 tokens that end after 3 to 20 new ones."""
    return [greedy(i, random_ids(1 + i * 7 % 60, i), 3 + i * 5 % 18) for i in range(n)]


@pytest.fixture(scope="module")
def alone(tiny):
    """Greedy tokens of each of the requests above, one after the other through a single slot."""
    return tokens_of(Engine(*tiny, 1, 128), mixed_requests())


def assert_as_alone(engine, requests, alone):
    for key, tokens in tokens_of(engine, requests).items():
        assert tokens == alone[key], key


def test_text_is_diverse(alone):
    """The equalities below compare something: texts that differ and do not run in circles."""
    texts = alone.values()
    assert len({tuple(tokens[:3]) for tokens in texts}) > 55
    assert len({token for tokens in texts for token in tokens}) > 100
    assert sum(len(set(tokens)) for tokens in texts) > 0.8 * sum(map(len, texts))


@pytest.mark.parametrize("slots", [2, 8, 64])
def test_slots_equal_alone(tiny, alone, slots):
    done = complete(Engine(*tiny, slots, 128), mixed_requests())
    assert {key: completion.tokens for key, completion in done.items()} == alone
    assert {completion.finish_reason for completion in done.values()} == {"length"}


class Counted:
    """A model that counts its calls and the tokens it is fed, prefill and decode apart."""

    graphed = False

    def __init__(self, model):
        self.model = model
        self.ops = model.ops
        self.device = model.device
        self.config = model.config
        self.new_cache = model.new_cache
        self.calls = {False: 0, True: 0}
        self.fed = {False: 0, True: 0}

    def __call__(self, tokens_BT, *args, decode=False, **options):
        self.calls[decode] += 1
        self.fed[decode] += tokens_BT.numel()
        return self.model(tokens_BT, *args, decode=decode, **options)


def test_slots_refilled_at_once(tiny):
    """Never more than 8 under way, a next prompt starts while others run, and no step is wasted
    while prompts wait."""
    model = Counted(tiny[0])
    requests = mixed_requests()
    running = set()
    most = joined = 0
    for completion, _ in Engine(model, tiny[1], 8, 128).generate(requests):
        is_first_token = len(completion.tokens) == 1
        if is_first_token and running and completion.request.id >= 8:
            joined += 1
        running.add(completion.request.id)
        most = max(most, len(running))
        if completion.finish_reason:
            running.remove(completion.request.id)
    assert most == 8 and joined > 50
    decoded = sum(request.max_new_tokens - 1 for request in requests)
    prompts = sum(len(request.prompt_ids) for request in requests)
    assert model.fed[False] == prompts, "each prompt is fed once"
    # The last ones run in a batch that empties.
    assert decoded / 8 <= model.calls[True] < decoded / 8 + 20


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_prefill_chunk(tiny, alone, chunk):
    assert_as_alone(Engine(*tiny, 8, 128, chunk), mixed_requests(24), alone)


def test_engine_used_again(tiny, alone):
    """Nothing of one run is left over in the next, though the cache is."""
    engine = Engine(*tiny, 4, 128)
    complete(engine, mixed_requests(12)[::-1])
    assert_as_alone(engine, mixed_requests(12), alone)


def test_abandoned_run(tiny, alone):
    """A caller that stops listening leaves the engine as good as new, and all it heard counted."""
    engine = Engine(*tiny, 2, 128)
    for _ in zip(range(5), engine.generate(mixed_requests(6)), strict=False):
        pass
    assert not torch.is_inference_mode_enabled()
    assert engine.stats.new_tokens == 5
    assert_as_alone(engine, mixed_requests(6), alone)


def test_cache_of_exact_length(tiny, alone):
    """A cache that just holds prompt and answer is long enough, and a longer one changes
    nothing."""
    request = mixed_requests()[8]
    for length in (len(request.prompt_ids) + request.max_new_tokens, CONTEXT):
        assert_as_alone(Engine(*tiny, 1, length), [request], alone)


def test_full_context_among_others(tiny, alone):
    """A prompt that leaves no room for a token frees its slot for the next one."""
    full = [greedy(100 + i, random_ids(128, i), 0) for i in range(3)]
    requests = [full[0], *mixed_requests(5), full[1], full[2]]
    done = complete(Engine(*tiny, 2, 128), requests)
    for i in range(5):
        assert done[i, 0].tokens == alone[i, 0]
    for request in full:
        completion = done[request.id, 0]
        assert completion.tokens == [] and completion.text == ""


# ---- graphs


class Recording(TorchDispatchMode):
    """A CUDA graph's stand-in: what runs while it is recorded runs again at replay, on the same
    tensors."""

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
            for old, new in zip(as_list(result), as_list(again), strict=True):
                is_view_of_older = old.data_ptr() == new.data_ptr()
                if not is_view_of_older:
                    old.copy_(new)


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else result


class WholeCache(Fast):
    """As on a GPU, every step looks over the whole cache: 128 positions and a spare block."""

    def mask(self, mask_mod, pos_BT, span, heads_GR, k_cache):
        return super().mask(mask_mod, pos_BT, 192, heads_GR, k_cache)


PENALIZED = {"repetition_penalty": 1.5, "logit_bias": {7: 3.0, 300: -9.0}, "min_p": 0.1}


@pytest.mark.parametrize("some", [{}, PENALIZED], ids=["plain", "some penalized"])
@pytest.mark.parametrize("broken", [False, True], ids=["right", "inputs not refreshed"])
def test_graphed_steps(tiny, monkeypatch, broken, some):
    """Steps that are recorded once and replayed give what is given without: all that changes is
    among their inputs. Control: a graph whose inputs are not refreshed."""
    model, tokenizer = tiny
    recorded = []

    def graphed(step, given):
        graph = Recording()
        with graph:
            outputs = step(*given)
        recorded.append(graph)

        def replay(*now):
            if not broken:
                for old, new in zip(given, now, strict=True):
                    old.copy_(new)
            graph.replay()
            return outputs

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    requests = [replace(r, top_k=5 + 2 * (r.id % 2)) for r in mixed_requests(12)]
    requests = [replace(r, **some if r.id % 3 else {}) for r in requests]
    want = tokens_of(Engine(model, tokenizer, 3, 128), requests)
    monkeypatch.setattr(model, "ops", WholeCache())
    monkeypatch.setattr(model, "graphed", True)
    engine = Engine(model, tokenizer, 3, 128)
    got = tokens_of(engine, requests)
    assert len(recorded) == len(engine.graphs) <= (8 if some else 4) < engine.stats.steps
    assert (got == want) is not broken


# ---- what is drawn, and its logprobs


def test_top_k_1_is_greedy_in_bf16(tiny_dir):
    """Logits of bf16 weights at top_k = 1 and temperature 0.01, four seeds: one text, the greedy
    one."""
    engine = Engine(*load(tiny_dir, torch.bfloat16), 1, 64)
    likeliest = greedy(0, random_ids(9, 0), 30)
    requests = [likeliest]
    for seed in range(4):
        requests.append(replace(likeliest, id=1 + seed, temperature=0.01, top_k=1, seed=seed))
    texts = tokens_of(engine, requests).values()
    assert len({tuple(tokens) for tokens in texts}) == 1


def sampled(tiny, slots, seed=1234):
    """Tokens of one prompt, 24 new ones, by (id, sample)."""
    request = Request(0, "", random_ids(5, 0), max_new_tokens=24, temperature=1.0, seed=seed)
    requests = []
    for i in (0, 1):
        for sample in range(4):
            requests.append(replace(request, id=i, sample=sample, ignore_eos=True))
    found = tokens_of(Engine(*tiny, slots, 64), requests)
    return {key: tuple(tokens) for key, tokens in found.items()}


def test_samples_and_seeds_differ(tiny):
    """Samples of one prompt are different texts, another seed gives others, the same seed the same
    ones; an id is no part of the noise. One slot or three: the same."""
    one = sampled(tiny, 1)
    other = sampled(tiny, 1, seed=1235)
    assert sampled(tiny, 3) == one
    assert len(set(one.values())) == 4 and all(one[0, s] == one[1, s] for s in range(4))
    assert len(set(other.values())) == 4 and not set(one.values()) & set(other.values())


def test_logprobs_are_raw(tiny):
    """log-softmax of the logits before temperature and filters, at the drawn tokens."""
    model, _ = tiny
    filters = {"temperature": 0.5, "top_k": 20, "top_p": 0.7}
    request = Request(0, "", random_ids(11, 3), max_new_tokens=20, **filters)
    completion = complete(Engine(*tiny, 1, 64), [request])[0, 0]
    ids = torch.tensor([request.prompt_ids + completion.tokens])
    pos = torch.arange(ids.shape[1])[None]
    with torch.inference_mode():
        logits = model(ids, pos, model.new_cache(1, 64), ids.shape[1])
    logprobs = logits.double().log_softmax(-1)[0, 10:-1]
    want = logprobs.gather(-1, ids[0, 11:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs).double(), want, atol=1e-4)


def is_likeliest(logits_TV, ids_T):
    return (logits_TV.argmax(-1) == ids_T).tolist()


def test_score_by_another_measure(tiny):
    """Whether each token is the likeliest, in pieces of three: of a greedy text each is, and a
    changed one is not."""
    engine = Engine(*tiny, 1, 64, 3)
    request = greedy(0, random_ids(11, 3), 20)
    tokens = complete(engine, [request])[0, 0].tokens
    yes = [True] * len(tokens)
    assert engine.score(request.prompt_ids, tokens, is_likeliest) == yes
    changed = [*tokens[:-1], (tokens[-1] + 1) % 300]
    assert engine.score(request.prompt_ids, changed, is_likeliest) == [*yes[:-1], False]


# ---- the end of a text


def test_eos_stops(tiny_dir, tmp_path):
    """Every end id of generation_config.json ends a text, is kept in tokens, and its text is not
    there; ignore_eos goes on."""
    directory = shutil.copytree(tiny_dir, tmp_path / "eos")
    model, tokenizer = load(directory)
    request = greedy(0, random_ids(6, 1), 30)
    free = complete(Engine(model, tokenizer, 1, 64), [request])[0, 0].tokens
    firsts = [i for i, token in enumerate(free) if token not in free[:i]]
    early, later, latest = firsts[4:9:2]
    for ends, at in (([free[latest], free[early]], early), ([399, free[later]], later)):
        write_json(directory / "generation_config.json", {"eos_token_id": ends})
        engine = Engine(model, Tokenizer(directory), 1, 64)
        stopped = complete(engine, [replace(request, ignore_eos=False)])[0, 0]
        assert stopped.tokens == free[: at + 1] and stopped.finish_reason == "stop"
        going_on = complete(engine, [request])[0, 0]
        assert going_on.tokens == free and going_on.finish_reason == "length"


def test_eos_from_config(tiny_dir, tmp_path):
    """Without a generation_config.json the id in config.json counts, a single number too, beside
    the end token of the tokenizer."""
    end = SPECIAL.index("<|end|>")
    directory = shutil.copytree(tiny_dir, tmp_path / "eos")
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    for given, want in ((7, {7}), ([8, 9], {8, 9}), (None, set())):
        write_json(directory / "config.json", config | {"eos_token_id": given})
        assert Tokenizer(directory).eos_ids == want | {end}


@pytest.mark.parametrize("length, new", [(CONTEXT - 5, 5), (CONTEXT - 1, 1), (CONTEXT, 0)])
def test_context_end(tiny_dir, capsys, length, new):
    """Generation goes up to the last position and ends with "length"; a prompt as long as the
    context ends at once."""
    flags = ["--prompt", str(length), "--max_new_tokens", "50", "--ignore_eos", "--json"]
    generate.main(["--checkpoint_path", str(tiny_dir), "--precision", "fp32", *flags])
    out, err = capsys.readouterr()
    completion = json.loads(out.splitlines()[0])
    assert "warning" in err
    assert len(completion["tokens"]) == len(completion["logprobs"]) == new
    assert completion["finish_reason"] == "length" and completion["prompt_tokens"] == length
    assert completion["text"] == "" or new


# ---- compiling


LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 21, 31, 34, 55, 63, 64, 65, 89, 100, 127, 128, 180]


def main_tokens(capsys, directory, *flags):
    """Greedy tokens, by the command line, of synthetic prompts of these lengths."""
    prompts = []
    for length in LENGTHS:
        prompts += ["--prompt", str(length)]
    fixed = ["--precision", "fp32", "--temperature", "0", "--max_new_tokens", "5", "--ignore_eos"]
    generate.main(["--checkpoint_path", str(directory), *prompts, *fixed, "--json", *flags])
    *lines, _ = capsys.readouterr().out.splitlines()
    return {entry["id"]: entry["tokens"] for entry in map(json.loads, lines)}


@pytest.fixture
def dynamo():
    """The compiler as a new process finds it; gives its counters, and leaves nothing compiled
    behind."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@needs_compiler
def test_compiled_equals_eager(dynamo, tmp_path, capsys):
    """The same greedy tokens in slots, and few graphs over 20 prompt lengths."""
    directory = write_checkpoint(tmp_path, num_hidden_layers=1)
    want = main_tokens(capsys, directory)
    assert len({tuple(tokens) for tokens in want.values()}) == len(LENGTHS)
    compiled = ["--compile", "--compile_prefill", "--batch_size", "3"]
    assert main_tokens(capsys, directory, *compiled) == want
    # One key block or any number of them, and a few lengths that PyTorch takes for special: 1, the
    # batch size.
    assert 2 <= dynamo["unique_graphs"] <= 6


class Positionless(Block):
    """Every other layer takes its queries and keys as they are."""

    def __init__(self, model, index):
        super().__init__(model, index)
        self.rotary = index % 2 == 0


def logits_of_steps(model):
    """Of a prompt, and of a step of decoding after it."""
    engine = Engine(model, Tokenizer(None), 1, 32)
    ids = random_ids(9, seed=1)
    with torch.inference_mode():
        whole = engine.feed(ids, 0, 0)
        tokens, pos = torch.tensor([[5]]), torch.tensor([[9]])
        return whole, model(tokens, pos, engine.cache, 10, decode=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("alike", [False, True], ids=["by kind", "taken for alike"])
def test_layers_that_differ_have_code_of_their_own(dynamo, tmp_path, monkeypatch, alike):
    """Layers that differ in a plain attribute are not taken for alike, and those that do not are
    compiled once: six layers in runs of one, of two kinds."""
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", (Positionless, {"use_sliding_window": False}))
    directory = write_checkpoint(tmp_path, num_hidden_layers=6)
    model, _ = load(directory, torch.bfloat16, BATCH_INVARIANT)
    want = logits_of_steps(model)
    if alike:
        monkeypatch.setattr(machine, "kind_of", lambda layer: "")
    model.prefill = machine.compiled(model, [1], dynamic=True)
    model.decode = machine.compiled(model, [1])
    found = logits_of_steps(model)
    same = [torch.equal(a, b) for a, b in zip(found, want, strict=True)]
    assert same == [not alike] * 2
    assert dynamo["unique_graphs"] == (2 if alike else 4)


seen = []


def count_layers(layers, *others):
    seen.append(len(layers))


def test_runs_divide_the_layers(tmp_path, monkeypatch):
    """The first size that does, else the last one."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(Transformer, "stack", staticmethod(count_layers))
    for count, sizes, runs in ((6, [5, 3, 4], [3, 3]), (7, [5, 4], [4, 3]), (3, [1], [1] * 3)):
        directory = tmp_path / str(count)
        directory.mkdir()
        model, _ = load(write_checkpoint(directory, num_hidden_layers=count))
        seen.clear()
        views, cache = [(None, None, None, (1, None))] * count, [None] * count
        machine.compiled(model, sizes)(model.layers, None, views, cache)
        assert seen == runs
