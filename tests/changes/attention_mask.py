"""A text of which the first tokens stay in sight, and the others leave it with the window."""

import json
from pathlib import Path

import torch

import generate

CONFIG = {"architectures": ["MistralForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIG |= {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 300, "sliding_window": 24}
CONFIG |= {"max_position_embeddings": 256, "tie_word_embeddings": False}
Path("config.json").write_text(json.dumps(CONFIG))
flags = ["--random_weights", "config.json", "--device", "cpu", "--precision", "fp32", "--deterministic"]
model, tokenizer = generate.load(generate.parse_args(flags))
ids = torch.randint(300, (80,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.inference_mode()
def last(ids, chunk=0):
    return generate.Engine(model, tokenizer, 1, 80, chunk).prefill(ids, 0)


sees = lambda i: not torch.equal(last(ids[:i] + [ids[i] ^ 1] + ids[i + 1 :]), last(ids))
assert [i for i in range(80) if sees(i)] == [0, 1, 2, 3, *range(56, 80)]
assert all(torch.equal(last(ids, chunk), last(ids)) for chunk in (1, 7, 64))
