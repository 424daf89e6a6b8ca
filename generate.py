"""Text from an open-weight language model: the engine, and the front door."""

import time
from collections import deque
from collections.abc import Callable, Iterator

if __name__ == "__main__":
    from scripts import interrupts

    interrupts.end_quietly()

import torch
from safetensors import SafetensorError
from torch import Tensor

import tp
from kernels import InputError
from model import Transformer
from scripts import chat, cli, drafts, machine, prompts, ranks, requests
from scripts.loading import load, load_drafter, take_defaults
from scripts.requests import Completion, Request
from scripts.sampler import Sampler
from scripts.tokenizer import Tokenizer


def logprobs_of(ids: Tensor, logits: Tensor, model: Transformer) -> Tensor:
    """Of raw logits [..., V] the logprobs of ids [...], fp32."""
    return model.ops.log_softmax(logits).gather(-1, ids[..., None])[..., 0]


def draw(model, logits_BTV: Tensor, pos_BT: Tensor, sampler: Sampler, settings):
    """Tokens for those positions and their logprobs, both [B, T]."""
    drawn_BT = sampler(logits_BTV.flatten(0, 1), pos_BT.flatten(), settings).view(pos_BT.shape)
    return drawn_BT, logprobs_of(drawn_BT, logits_BTV, model)


class Engine:
    """A model and a cache of `batch_size` slots that requests stream through. In a round a drafter
    may propose k tokens a slot, which one pass checks: a draft is accepted iff the model draws it
    there. What is wrong in the cache is overwritten before it is read."""

    def __init__(self, model, tokenizer, batch_size, length, prefill_chunk=0, drafter=None):
        self.model = model
        self.tokenizer = tokenizer
        self.drafter = drafter
        self.k = drafter.k if drafter else 0
        self.chunk = prefill_chunk
        self.slots: list[Completion | None] = [None] * batch_size
        self.sampler = None  # of the slots, until one changes hands
        self.reserve(length)
        self.pauses = drafts.Pauses()
        self.stats = machine.Stats(accept_counts=[0] * (self.k + 1 if drafter else 0))

    def reserve(self, length: int) -> None:
        """A new cache, for texts of so many tokens."""
        self.length = length
        self.graphs = {}  # CUDA graphs of a step
        self.cache = None  # gone before there is another
        self.cache = self.model.new_cache(len(self.slots), length + self.k)

    def feed(self, ids: list[int], start: int, slot: int, last=False) -> Tensor:
        """Feed a slot ids from a position on; fp32 logits [1, T, V], T = 1 with `last`."""
        end = start + len(ids)
        cache = [(keys[slot, None], values[slot, None]) for keys, values in self.cache]
        tokens_BT = torch.tensor([ids], device=self.model.device)
        pos_BT = torch.arange(start, end, device=self.model.device)[None]
        return self.model(tokens_BT, pos_BT, cache, end, last)

    def prefill(self, ids: list[int], slot: int, start: int = 0) -> Tensor:
        """Feed a slot ids[start:] in chunks; the last logits [1, 1, V]."""
        chunk = self.chunk or len(ids)
        for i in range(start, len(ids), chunk):
            logits_BTV = self.feed(ids[i : i + chunk], i, slot, last=True)
        return logits_BTV

    def step(self, tokens, starts: list[int], sampler: Sampler) -> tuple[Tensor, Tensor]:
        """Feed every slot its tokens [B, T], lists or a tensor, from its start on, and draw what
        follows each, with logprobs; on a GPU, compiled, one CUDA graph launches all of it."""
        model, cache = self.model, self.cache
        T = len(tokens[0])
        pos_BT = torch.tensor([range(start, start + T) for start in starts], device=model.device)
        given = (torch.as_tensor(tokens, device=model.device), pos_BT, *sampler.settings)
        sampler.read(*given[:2])

        def run(tokens_BT, pos_BT, *settings):  # of no `self`: a cycle would keep the cache alive
            logits_BTV = model(tokens_BT, pos_BT, cache, max(starts) + T, decode=True)
            return draw(model, logits_BTV, pos_BT + 1, sampler, settings)

        if not model.graphed:
            return run(*given)
        key = (pos_BT.shape, sampler.kind)
        if key not in self.graphs:
            samples = tuple(x.clone() for x in given)
            self.graphs[key] = torch.cuda.make_graphed_callables(run, samples)
        return tuple(x.clone() for x in self.graphs[key](*given))  # a replay overwrites them

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Iterator[tuple[Completion, str]]:
        """Yield (completion, new text) for each token; a finished slot takes the next request."""
        waiting = deque(requests)
        self.slots = [None] * len(self.slots)
        began = time.perf_counter()
        while waiting or any(self.slots):
            yield from self.admit(waiting, began)
            if any(self.slots):
                proposed = self.propose()
                drawn, logprobs = self.verify(proposed)
                yield from self.accept(proposed, drawn, logprobs)

    def admit(self, waiting: deque, began: float) -> Iterator[tuple[Completion, str]]:
        """Each free slot takes a request: its prompt is fed, its first token drawn."""
        while waiting and None in self.slots:
            completion = Completion(waiting.popleft(), self.tokenizer)
            if completion.finish_reason:  # no room for a token
                yield completion, ""
                continue
            start, slot = time.perf_counter(), self.slots.index(None)
            sampler = Sampler([completion.request], self.model.device)
            pos_BT = torch.tensor([[len(completion.ids)]], device=self.model.device)
            logits_BTV = self.prefill(completion.ids, slot)
            token, logprob = draw(self.model, logits_BTV, pos_BT, sampler, sampler.settings)
            made = (token.item(), logprob.item())  # waits for the device
            now = time.perf_counter()
            self.stats.prefill_tokens += len(completion.ids)
            self.stats.prefill_seconds += now - start
            self.stats.first_token_seconds = self.stats.first_token_seconds or now - began
            self.stats.new_tokens += 1
            self.slots[slot], self.sampler = completion, None
            yield completion, completion.push(*made)
            if completion.finish_reason:
                self.slots[slot] = None

    def propose(self) -> list[list[int]] | None:
        """k drafts a slot, or none where there are no good ones or they have not paid."""
        if self.sampler is None:
            self.sampler = Sampler.of_slots(self.slots, self.model.device)
        self.started = time.perf_counter()
        if self.drafter and not self.pauses.now():
            return self.drafter.propose(self.slots, self.sampler)
        return None

    def verify(self, proposed: list[list[int]] | None) -> tuple[list, list]:
        """One pass over every slot: what the model draws after its last token and after each draft,
        and logprobs. An idle slot computes at position 0, which its next prompt overwrites."""
        last = [[c.tokens[-1] if c else 0] for c in self.slots]
        fed = [a + b for a, b in zip(last, proposed, strict=True)] if proposed else last
        starts = [len(c.ids) - 1 if c else 0 for c in self.slots]
        drawn_BT, logprobs_BT = self.step(fed, starts, self.sampler)
        return drawn_BT.tolist(), logprobs_BT.tolist()

    def accept(self, proposed, drawn, logprobs) -> Iterator[tuple[Completion, str]]:
        """Hand over what was drawn, up to the first draft that is another token."""
        self.stats.decode_seconds += time.perf_counter() - self.started
        self.stats.steps += 1
        accepted = []
        for slot, completion in enumerate(self.slots):
            if completion is None:
                continue
            made = 0
            agreed = drafts.agreement(proposed[slot], drawn[slot]) if proposed else 0
            for token, logprob in zip(drawn[slot][: agreed + 1], logprobs[slot], strict=False):
                if not completion.finish_reason:
                    made += 1  # counted before the yield, after which a caller may leave
                    self.stats.new_tokens += 1
                    self.stats.decode_tokens += 1
                    yield completion, completion.push(token, logprob)
            if proposed:
                self.stats.accept_counts[made - 1] += 1
                accepted.append(made - 1)
            if completion.finish_reason:
                self.slots[slot] = self.sampler = None
        if proposed:
            self.pauses.record(accepted)

    @torch.inference_mode()
    def score(self, prompt_ids: list[int], tokens: list[int], measure=None) -> list:
        """The logprobs of `tokens` after a prompt, by prefill in chunks, as whole logits would be
        gigabytes. A `measure` of logits [T, V] and tokens [T] may give other T numbers."""
        ids, scores = prompt_ids + tokens, []
        chunk = min(self.chunk or 512, 512)
        start = time.perf_counter()
        for i in range(0, len(ids) - 1, chunk):
            targets_T = torch.tensor(ids[i + 1 : i + 1 + chunk], device=self.model.device)
            logits_TV = self.feed(ids[i : i + len(targets_T)], i, slot=0)[0]
            measured = measure and measure(logits_TV, targets_T)
            scores += measured or logprobs_of(targets_T, logits_TV, self.model).tolist()
        self.stats.prefill_tokens += len(ids)
        self.stats.prefill_seconds += time.perf_counter() - start
        return scores[len(prompt_ids) - 1 :]


def build(args, model: Transformer, tokenizer: Tokenizer, length: int) -> Engine:
    """An engine for texts of `length` tokens, with what drafts by the flags, warm."""
    machine.check_cache_fits(model, args.batch_size, length)
    drafter = load_drafter(args, model, tokenizer, length, build)
    machine.set_up(model, args.compile, args.compile_prefill)
    engine = Engine(model, tokenizer, args.batch_size, length, args.prefill_chunk, drafter)
    compiled = args.compile or args.compile_prefill
    if compiled or args.deterministic or drafter:
        cli.progress("compiling" if compiled else "probing")
        pays = machine.warm_up(engine, Request(0, "", [], **requests.settings_of(args)))
        engine.pauses = drafts.Pauses(drafter.pays if drafter and drafter.pays else pays)
    return engine


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    with ranks.together():
        args = cli.parse_args(argv)
        model, tokenizer = load(args)
        by_checkpoint = take_defaults(args)
        context = min(model.config.max_position_embeddings, args.max_seq_length)
        maker = requests.RequestMaker.from_flags(args, tokenizer, model.config.vocab_size, context)
    load_s = time.perf_counter() - start
    with ranks.together():
        wanted, output = prompts.wanted(args, maker)
    wanted = ranks.from_first(wanted)
    sizes = [len(r.prompt_ids) + r.max_new_tokens for r in wanted]
    length = min(context, chat.LENGTH) if args.interactive else max(sizes, default=1)
    start = time.perf_counter()
    with ranks.together():
        engine = build(args, model, tokenizer, length)
    engine.pauses.pays = ranks.from_first(engine.pauses.pays)  # one clock for all
    compile_s = time.perf_counter() - start
    with output, machine.profile(args.profile if tp.rank == 0 else None):
        if args.interactive:
            return chat.converse(engine, args.system, maker, ranks.from_first)
        as_json = args.json or args.score is not None
        requests.write(engine, wanted, as_json, output, not args.chat, args.batch_size == 1)
    if tp.rank == 0:
        machine.report(engine.stats, model, load_s, compile_s, args.json, by_checkpoint)


def command(main: Callable) -> None:
    """Join the other ranks, run main() and exit with its status; bad input is one line."""
    cli.run([ranks.join, main], InputError, SafetensorError, torch.OutOfMemoryError)


if __name__ == "__main__":
    command(main)
