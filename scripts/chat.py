"""A conversation in the terminal, which is `python generate.py --interactive`; all flags of generate.py apply.

python scripts/chat.py --system "You are terse."
Ctrl-C stops an answer, /clear forgets, /exit or the end of input leaves."""

import contextlib
import sys
from pathlib import Path


def converse(engine, system, request):
    """Until /exit: `system` is the messages it begins with; `request` makes one of an entry of prompts."""
    history, context, message = system, engine.model.config.context, lambda role, text: {"role": role, "content": text}
    with contextlib.suppress(EOFError):
        while (line := input("> " if sys.stdin.isatty() else "").strip()) != "/exit":
            history = system if line == "/clear" else history
            if line in ("", "/clear"):
                continue
            turns, answer = [*history, message("user", line)], ""
            with contextlib.suppress(KeyboardInterrupt):
                ids = engine.tokenizer.encode_chat(turns)
                if len(ids) > context:  # no reason to lose the conversation
                    print(
                        f"{len(ids)} tokens are more than the context of {context}: /clear starts over", file=sys.stderr
                    )
                    continue
                entry = {"id": "conversation", "prompt": line, "prompt_ids": ids}
                for _, text in engine.generate([request(entry)]):
                    answer += text
                    print(text, end="", flush=True)
            print(flush=True)
            history = [*turns, message("assistant", answer)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import generate
    from scripts import bench

    bench.command(lambda own, argv: generate.main([*argv, "--interactive"]))
