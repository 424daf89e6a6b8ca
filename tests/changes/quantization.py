"""A directory of 8-bit floats: smaller, close to what it was made of, and bits that no chunk
changes."""

import subprocess
import sys
from pathlib import Path

import torch
from test_quantize import IDS, directory, load, logits

path = directory(Path("m"))
command = [sys.executable, "quantize.py", "--checkpoint_path", "m", "--mode", "fp8"]
done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
out = Path(done.stdout.strip())
size, new_size = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (path, out))
assert new_size < 0.7 * size
for flags in ([], ["--precision", "fp32"]):
    flags = ["--deterministic", *flags]
    model = load(out, *flags)
    want = logits(model, IDS)
    for chunk in (1, 7):
        assert torch.equal(logits(model, IDS, chunk), want)
    assert torch.equal(logits(load(path, "--quantize", "fp8", *flags), IDS), want)
    error = (want - logits(load(path, *flags), IDS)).abs().mean()
    assert 0 < error < 0.1 * want.std()
