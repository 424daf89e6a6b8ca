"""The same text by plain formulas, whose logprobs are close and not the same."""

import contextlib
import io
import json
from pathlib import Path

import torch
from helpers import write_checkpoint

import generate

FLAGS = ["--checkpoint_path", "tiny", "--device", "cpu", "--precision", "fp32"]
FLAGS += ["--prompt", "The quick brown fox", "--prompt", "dog", "--batch_size", "2"]
FLAGS += ["--max_new_tokens", "40", "--temperature", "0", "--json"]

Path("tiny").mkdir()
write_checkpoint(Path("tiny"))


def completions(*more):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        generate.main([*FLAGS, *more])
    *lines, _ = map(json.loads, out.getvalue().splitlines())  # the last one has the stats
    return lines


largest = 0
for fast, plain in zip(completions(), completions("--reference"), strict=True):
    assert fast["tokens"] == plain["tokens"]
    difference = torch.tensor(fast["logprobs"]) - torch.tensor(plain["logprobs"])
    largest = max(largest, difference.abs().max())
assert 0 < largest < 1e-4
