"""A directory of 8-bit floats: smaller, close to what it was made of, and bits that no chunk changes."""

import subprocess
import sys
from pathlib import Path

import torch
from test_quantize import IDS, directory, load, logits

path = directory(Path("m"))
command = [sys.executable, "quantize.py", "--checkpoint_path", "m", "--mode", "fp8"]
out = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
size = lambda path: (path / "model-00000.safetensors" if path == out else path / "model.safetensors").stat().st_size
assert size(out) < 0.7 * size(path)
for flags in ([], ["--precision", "fp32"]):
    model, plain = load(out, "--deterministic", *flags), load(path, "--deterministic", *flags)
    want = logits(model, IDS)
    assert all(torch.equal(logits(model, IDS, chunk), want) for chunk in (1, 7))
    assert 0 < (want - logits(plain, IDS)).abs().mean() < 0.1 * want.std()
    assert torch.equal(logits(load(path, "--quantize", "fp8", "--deterministic", *flags), IDS), want)
