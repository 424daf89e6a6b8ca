"""Logits of a random Gemma, the first one, beside those of transformers."""

from pathlib import Path

import torch
from test_model import feed, load, random_reference, relative_error
from transformers import GemmaConfig, GemmaForCausalLM

settings = {"head_dim": 22, "num_hidden_layers": 4}
reference = random_reference(GemmaConfig, GemmaForCausalLM, settings)
reference.save_pretrained("gemma")
ids = torch.randint(203, (100,))
with torch.inference_mode():
    want = reference(ids[None]).logits[0]
model = load(Path("gemma"))
for chunks in ([100], [1] * 100, [30] * 4):
    assert relative_error(feed(model, ids, model.new_cache(1, 100), chunks), want) < 1e-4
