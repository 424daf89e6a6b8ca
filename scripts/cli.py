"""The command line of generate.py and of the scripts that take its flags: the flags, what they may
be, and errors as one line."""

import argparse
import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from scripts import defaults, download, interrupts, outputs, templates
from scripts.checkpoint import Refusal, is_first_rank, progress
from scripts.checkpoint import say as say  # others know it as cli.say
from scripts.defaults import COUNT, INFINITY, check_range
from scripts.requests import Request, message

PRECISIONS = ("bf16", "fp16", "fp32")
QUANTIZE_MODES = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)

RANGES = defaults.RANGES | {
    "num_samples": (1, 10**6),
    "batch_size": (1, 1 << 16),
    "prefill_chunk": (0, INFINITY),
    "max_seq_length": COUNT,
    "speculate_k": (1, 64),
}
EXCLUDES = {  # a flag, and those that make no sense beside it
    "score": ["interactive", "prompts_file", "prompt"],
    "interactive": ["prompts_file", "prompt", "json", "output"],
    "random_weights": ["checkpoint_path", "chat", "interactive"],
    "prompts_file": ["prompt"],
    "prompt_lookup": ["draft_checkpoint_path", "draft_quantize"],
}
LONGEST = 1000  # characters of an error: what was given may be long


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Argparse would print how the script is used, in several lines, and exit."""
        raise Refusal(message)

    def parse_args(self, argv: list[str] | None = None):
        """Argparse makes a list of no values of --FLAG=--."""
        args = super().parse_args(argv)
        for flag, value in vars(args).items():
            is_none = value == [] and value is not self.get_default(flag)
            if is_none or isinstance(value, list) and [] in value:
                raise Refusal(f"argument --{flag}: expected something else than --")
        return args

    def group(self, title: str) -> None:
        """What follows is listed under a title."""
        self.add = self.add_argument_group(title).add_argument

    def path(self, flag: str, metavar: str, text: str) -> None:
        self.add(flag, type=Path, metavar=metavar, help=text)

    def checkpoint(self, flag: str, text: str) -> None:
        text += "; org/name: of the hub, fetched once"
        self.add(flag, type=download.directory_or_name, metavar="DIR", help=text)

    def number(self, flag: str, default: int | float, text: str) -> None:
        text = f"{text} (%(default)s)"
        self.add(flag, type=type(default), default=default, metavar="N", help=text)

    def switch(self, flag: str, text: str) -> None:
        self.add(flag, action="store_true", help=text)


def parse_args(argv: list[str] | None = None, about: str | None = None, **own):
    """The flags of generate.py and a script's `own` ones, names and defaults, which say what type
    they have; `about` is what --help says first. Raises Refusal for values out of range and flags
    that exclude each other."""
    parser = Parser(
        description=about or sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_request_flags(parser)
    add_running_flags(parser)
    parser.group("of this script")
    for name, default in own.items():
        parser.add(f"--{name}", type=type(default), default=default, help="above (%(default)r)")
    args = parser.parse_args(argv)
    args.given = defaults.given(parser, argv)
    counts = {name: COUNT for name, default in own.items() if type(default) is int and default}
    check_ranges(args, RANGES | counts)
    check_exclusions(args)
    outputs.check_paths(args)
    return args


def add_model_flags(parser: Parser) -> None:
    parser.group("model")
    parser.checkpoint("--checkpoint_path", f"Hugging Face directory ({download.DEFAULT.name})")
    parser.add("--device", help="cpu, cuda or cuda:1 (cuda if there is one)")
    text = "of weights and cache (%(default)s)"
    parser.add("--precision", choices=PRECISIONS, default="bf16", help=text)
    text = "weights of linear layers, while loading"
    parser.add("--quantize", choices=QUANTIZE_MODES, help=text)
    text = "of int4 (%(default)s)"
    parser.add("--group_size", type=int, choices=GROUP_SIZES, default=32, help=text)
    parser.path("--random_weights", "CONFIG.json", "a model of that shape, for benchmarks")
    text = "of a prompt and its completion; less than the checkpoint's takes less memory"
    parser.add("--max_seq_length", type=int, default=INFINITY, metavar="N", help=text)


def add_request_flags(parser: Parser) -> None:
    parser.group("prompts")
    text = "repeatable; an integer means so many random tokens"
    parser.add("--prompt", action="append", metavar="TEXT", help=text)
    text = "text, or .jsonl: prompt or messages, id, settings such as seed; -: stdin"
    parser.path("--prompts_file", "FILE", text)
    parser.switch("--chat", "apply the checkpoint's chat template")
    text = "prompt of a chat"
    parser.add("--system", type=system_messages, default=[], metavar="TEXT", help=text)
    text = "of the template: its variables, tools, documents; chat_template: which of several"
    parser.add("--template_args", type=templates.typed_arguments, metavar="JSON", help=text)
    parser.switch("--interactive", "a conversation in the terminal: /clear, /exit")
    parser.path("--score", "FILE.jsonl", "print such lines again, logprobs recomputed by prefill")

    parser.group("sampling (in a chat, generation_config.json has other defaults)")
    default = Request(0, "", [])
    parser.number("--max_new_tokens", default.max_new_tokens, "of each completion")
    parser.number("--temperature", default.temperature, "0: the likeliest token")
    parser.number("--top_k", default.top_k, "draw from the N likeliest")
    parser.number("--top_p", default.top_p, "draw from the likeliest of this sum")
    parser.number("--min_p", default.min_p, "draw from those so likely beside the likeliest")
    text = "logits of tokens in the text are divided by it, below 0 multiplied"
    parser.number("--repetition_penalty", default.repetition_penalty, text)
    text = 'what to add to logits, by token id: {"5": -100}'
    parser.add("--logit_bias", type=defaults.bias_of_flag, metavar="JSON", help=text)
    parser.number("--seed", default.seed, "of the noise")
    parser.number("--num_samples", 1, "completions of each prompt")
    text = "end a completion there; repeatable"
    parser.add("--stop", action="append", type=typed, default=[], metavar="TEXT", help=text)
    parser.switch("--ignore_eos", "go on past the end token")


def add_running_flags(parser: Parser) -> None:
    parser.group("running")
    parser.number("--batch_size", 1, "slots that prompts stream through")
    parser.number("--prefill_chunk", 0, "feed prompts in chunks of N; 0: whole")
    parser.number("--speculate_k", 5, "drafts a round, by one of the next three")
    parser.checkpoint("--draft_checkpoint_path", "speculate: a smaller model drafts")
    text = "speculate: that model, or the model itself, quantized"
    parser.add("--draft_quantize", choices=QUANTIZE_MODES, help=text)
    parser.switch("--prompt_lookup", "speculate: draft what followed the same words before")
    parser.switch("--compile", "torch.compile decoding")
    parser.switch("--compile_prefill", "torch.compile prefill")
    parser.path("--profile", "FILE", "write a trace for chrome://tracing")
    text = "the same bits at any batch size, chunking or compiler setting"
    parser.switch("--deterministic", text)

    parser.group("output")
    parser.switch("--json", "one JSON object a line")
    parser.path("--output", "FILE", "append those lines to FILE; a rerun skips what is there")


def typed(text: str) -> str:
    """What was typed is UTF-8, whatever Python took it for."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no text, expected UTF-8") from None


def system_messages(text: str) -> list[dict]:
    return [message("system", typed(text))]


def check_ranges(args: argparse.Namespace, ranges: dict[str, tuple]) -> None:
    for flag, limits in ranges.items():
        check_range(f"--{flag}", getattr(args, flag), limits)


def check_exclusions(args: argparse.Namespace) -> None:
    for flag, others in EXCLUDES.items():
        for other in others:
            if getattr(args, flag) and getattr(args, other):
                raise Refusal(f"--{flag} excludes --{other}")
    of_chats = {"system": args.system, "template_args": args.template_args is not None}
    for flag, is_given in of_chats.items():
        if is_given and not (args.chat or args.interactive):
            raise Refusal(f"--{flag} needs --chat or --interactive")
    if "" in args.stop:
        raise Refusal("expected some text after --stop")


def run(steps: list[Callable], *more_errors: type[Exception]) -> None:
    """Call the steps and exit with the status that the last one returns. What a user got wrong,
    which is what `more_errors` mean as well, is one line and status 2; a bug is a traceback, that
    line and status 1. With GPT_EXACT_DEBUG=1 both are tracebacks. The first step is done before
    the processes know each other: what goes wrong there, each of them says."""
    step = steps[0]
    try:
        interrupts.raise_again()
        speak_utf8()
        for step in steps:
            status = step() or 0
        print(end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        if isinstance(error, SystemExit) or os.environ.get("GPT_EXACT_DEBUG") == "1":
            raise
        of_the_user = (Refusal, OSError, UnicodeError, MemoryError, RecursionError, *more_errors)
        status = 2 if isinstance(error, of_the_user) or is_panic_or_memory(error) else 1
        if is_first_rank() or step is steps[0]:
            explain(error, status)
        else:
            let_the_first_speak()
        sys.stdout = None  # an orderly end would once more print what could not be printed
    if "WORLD_SIZE" in os.environ:  # the threads that connect processes may abort an orderly end
        os._exit(status)
    sys.exit(status)


def let_the_first_speak() -> None:
    """A launcher ends all processes as soon as one of them has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1)


def is_panic_or_memory(error: BaseException) -> bool:
    """Whether it is what packages in Rust raise for input that they did not foresee, which is no
    Exception, or what PyTorch raises where a CPU has too little memory."""
    is_panic = type(error).__name__ == "PanicException"
    return is_panic or isinstance(error, RuntimeError) and "allocate memory" in str(error)


def explain(error: BaseException, status: int) -> None:
    """Say what is wrong in one line; of a bug, where."""
    line = " ".join(str(error).split()) or "out of memory"  # of which some say nothing
    if status == 1:
        traceback.print_exception(error)
        line = "this is a bug in the code, not in what you gave"
    if len(line) > LONGEST:
        line = f"{line[:LONGEST]} ... ({len(line)} characters)"
    print("error:", line, file=sys.stderr, flush=True)


def speak_utf8() -> None:
    """Texts are UTF-8, whatever the locale is: where nothing has been read yet, of what Python put
    there itself."""
    if sys.stderr is None:  # print would take the other one
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if sys.__stdout__ is None:
        raise Refusal("standard output is closed, expected a place for what is made")
    kinds = {"stdin": "surrogateescape", "stdout": "strict", "stderr": "backslashreplace"}
    for name, errors in kinds.items():
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(encoding="utf-8", errors=errors)


def progress_of(work: str) -> Callable[[int, int], None]:
    """A function to call with how many of how many are done."""

    def report(done: int, total: int) -> None:
        progress(f"{work} {done}/{total}", end="\n" if done == total else "\r")

    return report
