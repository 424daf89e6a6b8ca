"""Logits of a random SmolLM3, whose even layers have no positions, beside those of transformers."""

from pathlib import Path

import torch
from test_model import feed, load, random_reference, relative_error
from transformers import SmolLM3Config, SmolLM3ForCausalLM

settings = {"no_rope_layer_interval": 2, "pad_token_id": 0, "num_hidden_layers": 5}
reference = random_reference(SmolLM3Config, SmolLM3ForCausalLM, settings)
assert reference.config.no_rope_layers == [1, 0, 1, 0, 1]
reference.save_pretrained("smollm3")
ids = torch.randint(203, (100,))
with torch.inference_mode():
    want = reference(ids[None]).logits[0]
model = load(Path("smollm3"))
for chunks in ([100], [1] * 100, [30] * 4):
    assert relative_error(feed(model, ids, model.new_cache(1, 100), chunks), want) < 1e-4
