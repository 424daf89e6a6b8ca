"""How good a model is: perplexity of a text, or tasks of lm_eval. All flags of generate.py that
choose a model apply.

python scripts/eval.py --text FILE --window 2048 --stride 1024
python scripts/eval.py --tasks arc_easy,piqa --limit 100      or a task.yaml of your own

Tasks need `pip install lm_eval`."""

import math
import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has names that would hide those of packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts import interrupts

    interrupts.end_quietly()

import torch

import generate
from scripts import cli
from scripts.files import Refusal, read_stream, refusing, text_of
from scripts.requests import check_numbers
from scripts.tokenizer import Tokenizer


def score(engine, ids: list[int], first: int) -> tuple[list[float], bool]:
    """As --score does, the logprobs of ids[first:], each after all before it; and whether all are
    the likeliest."""

    def measure(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> list[tuple[float, bool]]:
        logprobs = generate.logprobs_of(ids_T, logits_TV, engine.model).tolist()
        likeliest = (logits_TV.argmax(-1) == ids_T).tolist()
        return list(zip(logprobs, likeliest, strict=True))

    scores = engine.score(ids[:first], ids[first:], measure)
    logprobs = [logprob for logprob, _ in scores]
    check_numbers(logprobs)
    return logprobs, all(is_likeliest for _, is_likeliest in scores)


def log_likelihood(engine, ids: list[int], window: int, stride: int) -> float:
    """The sum of the logprobs of ids[1:]; each is scored once, in a window that reaches back as far
    as it can."""
    total = 0.0
    done = 1
    for end in [*range(window, len(ids), stride), len(ids)]:
        start = max(end - window, 0)
        logprobs = engine.score(ids[start:done], ids[done:end])
        check_numbers(logprobs)
        total += math.fsum(logprobs)
        done = end
        perplexity = math.exp(-total / (done - 1))
        end_of_line = "\n" if done == len(ids) else "\r"
        cli.progress(f"{done}/{len(ids)}: perplexity {perplexity:.4f}", end=end_of_line)
    return total


def run_tasks(engine, names: str, limit: int | None) -> str:
    """The table of lm_eval, for tasks that compare likelihoods; a task is a name of theirs, or the
    path of a .yaml file."""
    with refusing("--tasks needs `pip install lm_eval`", ImportError):
        from lm_eval import simple_evaluate, tasks, utils

    paths = [Path(name) for name in names.split(",")]
    folders = [str(path.parent) for path in paths if path.suffix == ".yaml"]
    manager = tasks.TaskManager(include_path=folders or None)
    settings = {"tasks": [path.stem for path in paths], "limit": limit, "task_manager": manager}
    return utils.make_table(simple_evaluate(adapter(engine), **settings))


def prefix_token(tokenizer: Tokenizer) -> int:
    """What lm_eval puts before a text that nothing goes before: BOS, whether or not prompts get it,
    else EOS."""
    for name in ("bos_token", "eos_token"):
        token = tokenizer.id_of(name)
        if token is not None:
            return token
    return min(tokenizer.eos_ids, default=0)


def adapter(engine):
    """The engine as a model of lm_eval."""
    from lm_eval.api.model import LM

    encode = engine.tokenizer.encode
    window = engine.length
    first = prefix_token(engine.tokenizer)

    class Adapter(LM):
        def one(self, before: str, text: str) -> tuple[float, bool]:
            whole = encode(before + text)
            known = encode(before.rstrip())  # a token of the text may begin with a space
            if not known:
                known = [first]
                whole = [first, *whole]
            cut = max(len(whole) - window, 0)
            logprobs, likeliest = score(engine, whole[cut:], max(len(known) - cut, 1))
            return math.fsum(logprobs), likeliest

        def loglikelihood(self, requests):
            return [self.one(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests):
            totals = []
            for request in requests:
                (text,) = request.args
                ids = (encode("") or [first]) + encode(text, bos=False)
                totals.append(log_likelihood(engine, ids, window, window // 2))
            return totals

        def generate_until(self, requests):
            what = "tasks that generate text are not supported"
            raise Refusal(f"{what}, choose those that compare likelihoods")

    return Adapter()


def report_perplexity(engine, path: str, window: int, stride: int) -> None:
    name = f"--text {path}"
    text = text_of(name, read_stream(name, Path(path)))
    ids = engine.tokenizer.encode(text)
    if len(ids) < 2:
        raise Refusal(f"--text {path} has {len(ids)} tokens, expected 2 or more")
    window = min(window, engine.length)
    if stride >= window:
        stride = window // 2
    total = log_likelihood(engine, ids, window, stride)
    scored = len(ids) - 1
    speed = len(ids) / engine.stats.prefill_seconds
    perplexity = math.exp(-total / scored)
    print(f"perplexity {perplexity:.4f} of {scored} tokens, {speed:.0f} tokens/s")


def main() -> None:
    args = cli.parse_args(text="", tasks="", window=2048, stride=1024, limit=0)
    if not 0 < args.stride < args.window or bool(args.text) == bool(args.tasks):
        raise Refusal("expected --text FILE or --tasks NAME,... and 0 < --stride < --window")
    model, tokenizer = generate.load(args)
    length = min(model.config.max_position_embeddings, args.max_seq_length)
    if length < 2:
        raise Refusal(f"a context of {length} tokens has nothing to score, expected 2 or more")
    if args.text:
        length = min(length, args.window)
    engine = generate.Engine(model, tokenizer, 1, length)
    if args.tasks:
        print(run_tasks(engine, args.tasks, args.limit or None))
    else:
        report_perplexity(engine, args.text, args.window, args.stride)


if __name__ == "__main__":
    generate.command(main)
