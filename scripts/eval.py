"""How good a model is: perplexity of a text, or tasks of lm_eval. All flags of generate.py that choose a model apply.

python scripts/eval.py --text FILE --window 2048 --stride 1024
python scripts/eval.py --tasks arc_easy,piqa --limit 100      or a task.yaml of your own; `pip install lm_eval`"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate  # noqa: E402
import tp  # noqa: E402


def score(engine, ids: list[int], first: int) -> tuple[list[float], bool]:
    """As --score does, the logprobs of ids[first:], each after all before it; and whether all are the likeliest."""
    both = lambda x, ids: zip(generate.logprobs(engine.model, x, ids).tolist(), x.argmax(-1) == ids, strict=True)
    logprobs, likeliest = zip(*engine.score(ids[:first], ids[first:], both), strict=True)
    return list(logprobs), all(likeliest)


def log_likelihood(engine, ids: list[int], window: int, stride: int) -> float:
    """The sum of the logprobs of ids[1:]; each is scored once, in a window that reaches back as far as it can."""
    total, done = 0.0, 1
    for end in [*range(window, len(ids), stride), len(ids)]:
        total += math.fsum(engine.score(ids[max(end - window, 0) : done], ids[done:end]))
        done = end
        tp.progress(f"{done}/{len(ids)}: perplexity {math.exp(-total / (done - 1)):.4f}", end="\r\n"[done == len(ids)])
    return total


def run_tasks(engine, names: str, limit: int | None) -> str:
    """The table of lm_eval, for tasks that compare likelihoods."""
    with generate.refusing("--tasks needs `pip install lm_eval`", ImportError):
        from lm_eval import simple_evaluate, tasks, utils
    paths = [Path(name) for name in names.split(",")]
    manager = tasks.TaskManager(include_path=[str(path.parent) for path in paths if path.suffix == ".yaml"] or None)
    names = [path.stem for path in paths]
    return utils.make_table(simple_evaluate(adapter(engine), tasks=names, limit=limit, task_manager=manager))


def adapter(engine):
    """The engine as a model of lm_eval."""
    from lm_eval.api.model import LM

    encode, window, eos = engine.tokenizer.encode, engine.model.config.context, min(engine.tokenizer.eos_ids, default=0)

    class Adapter(LM):
        def one(self, before: str, text: str) -> tuple[float, bool]:
            known, whole = encode(before.rstrip()), encode(before + text)  # a token of the text may begin with a space
            known, whole = (known, whole) if known else ([eos], [eos, *whole])
            first = max(len(known) - max(len(whole) - window, 0), 1)
            logprobs, likeliest = score(engine, whole[-window:], first)
            return math.fsum(logprobs), likeliest

        def loglikelihood(self, requests):
            return [self.one(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests):
            texts = [[*(encode("") or [eos]), *encode(r.args[0], bos=False)] for r in requests]
            return [log_likelihood(engine, ids, window, window // 2) for ids in texts]

        def generate_until(self, requests):
            generate.refuse("tasks that generate text are not supported, choose those that compare likelihoods")

    return Adapter()


def main() -> None:
    args = generate.parse_args(text="", tasks="", window=2048, stride=1024, limit=0)
    if not 0 < args.stride < args.window or bool(args.text) == bool(args.tasks):
        generate.refuse("expected --text FILE or --tasks NAME,... and 0 < --stride < --window")
    model, tokenizer = generate.load(args)
    engine = generate.Engine(model, tokenizer, 1, model.config.context)
    if args.tasks:
        return print(run_tasks(engine, args.tasks, args.limit or None))
    with generate.refusing(f"--text {args.text} cannot be read", OSError, ValueError):
        ids = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))
    len(ids) > 1 or generate.refuse(f"--text {args.text} has {len(ids)} tokens, expected 2 or more")
    window, n = min(args.window, model.config.context), len(ids) - 1
    total = log_likelihood(engine, ids, window, args.stride if args.stride < window else window // 2)
    print(f"perplexity {math.exp(-total / n):.4f} of {n} tokens, {len(ids) / engine.seconds['prefill']:.0f} tokens/s")


if __name__ == "__main__":
    generate.command(main)
