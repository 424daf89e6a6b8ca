"""The same text by plain formulas, whose logprobs are close and not the same."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import torch
from test_generate import write_checkpoint

import generate

Path("tiny").mkdir()
write_checkpoint(Path("tiny"))
flags = ["--checkpoint_path", "tiny", "--device", "cpu", "--precision", "fp32", "--temperature", "0", "--json"]
flags += ["--prompt", "The quick brown fox", "--prompt", "dog", "--batch_size", "2", "--max_new_tokens", "40"]


def lines(*more):
    with redirect_stdout(out := io.StringIO()):
        generate.main([*flags, *more])
    return [json.loads(line) for line in out.getvalue().splitlines()[:-1]]


plain, reference = lines(), lines("--reference")
assert [x["tokens"] for x in plain] == [x["tokens"] for x in reference]
logprobs = [torch.tensor(sum((line["logprobs"] for line in lines), [])) for lines in (plain, reference)]
assert 0 < (logprobs[0] - logprobs[1]).abs().max() < 1e-4
