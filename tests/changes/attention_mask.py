"""A text of which the first tokens stay in sight, and the others leave it with the window."""

import json
from pathlib import Path

import torch

import generate
from scripts.cli import parse_args

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "sliding_window": 24,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
FLAGS = ["--random_weights", "config.json", "--device", "cpu", "--precision", "fp32"]
LENGTH = 80

Path("config.json").write_text(json.dumps(CONFIG))
model, tokenizer = generate.load(parse_args([*FLAGS, "--deterministic"]))
generator = torch.Generator().manual_seed(0)
ids = torch.randint(300, (LENGTH,), generator=generator).tolist()


@torch.inference_mode()
def last_logits(ids, chunk=0):
    engine = generate.Engine(model, tokenizer, 1, LENGTH, prefill_chunk=chunk)
    return engine.prefill(ids, 0)


want = last_logits(ids)
seen = []
for i in range(LENGTH):
    others = [*ids[:i], ids[i] ^ 1, *ids[i + 1 :]]
    if not torch.equal(last_logits(others), want):
        seen.append(i)
assert seen == [0, 1, 2, 3, *range(56, LENGTH)]
for chunk in (1, 7, 64):
    assert torch.equal(last_logits(ids, chunk), want)
