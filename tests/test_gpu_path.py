"""What concerns a GPU and can be seen without one: what is refused, how weights are cut, messages,
and scripts/gpu.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import generate
import quantize
import tp
from kernels import BATCH_INVARIANT, FAST, InputError, TritonPacked
from model import Transformer
from scripts import cli, machine
from scripts.checkpoint import Refusal
from scripts.loading import read_config

ROOT = Path(generate.__file__).parent
CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": 1536,
    "vocab_size": 480,
    "num_hidden_layers": 1,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "head_dim": 32,
    "max_position_embeddings": 300,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


# ---- ROCm


def load(*flags):
    return generate.load(cli.parse_args(["--checkpoint_path", "/nowhere", *flags]))


@pytest.mark.parametrize("flags", [["--device", "cuda:0"], ["--device", "cuda"], []], ids=str)
def test_rocm_refuses_the_flag_before_anything_is_read(monkeypatch, flags):
    """Without the flag, nothing is refused but a directory that is not there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "find_device", lambda name, world: CPU)
    with pytest.raises(InputError, match="--deterministic is not available on ROCm") as error:
        load("--deterministic", *flags)
    assert "\n" not in str(error.value)
    with pytest.raises(Refusal, match="config.json"):
        load(*flags)


def test_the_flag_is_taken_where_there_is_no_rocm(monkeypatch):
    monkeypatch.setattr(machine, "find_device", lambda name, world: CPU)
    with pytest.raises(Refusal, match="config.json"):
        load("--deterministic", "--device", "cuda:0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(Refusal, match="config.json"):
        load("--deterministic", "--device", "cpu")


# ---- an exchange


def test_what_stops_an_exchange_is_named_in_one_line():
    def collective():
        first = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(f"{first}\nCUDA kernel errors might be")

    with pytest.raises(ConnectionError, match="an illegal memory access was encountered$"):
        tp.exchange(collective)


# ---- leaves


@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "exact"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_on_a_gpu_quantized_products_are_cut_into_leaves_either_way(ops, mode):
    """With one leaf, the programs of a row would not fill a card. The tensors are stand-ins, on a
    card that is none."""
    parts = quantize.quantized(mode, torch.ones(64, 2048), 32)
    on_cpu = quantize.pack(mode, ops, parts, leaves=8)
    assert on_cpu.leaves == (8 if ops.exact else 1)
    with FakeTensorMode():
        fakes = {}
        for kind, x in parts.items():
            fakes[kind] = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
        on_gpu = quantize.pack(mode, ops, fakes, leaves=8)
    assert type(on_gpu) is TritonPacked and on_gpu.leaves == 8


@pytest.mark.parametrize(("ranks", "want"), [(1, 8), (2, 4), (4, 2), (3, 1)])
def test_a_rank_has_whole_leaves_or_one(ranks, want, tmp_path, monkeypatch):
    """With the flag off, ranks need not divide the leaves of a layer, here 8: then a rank cuts its
    part no further."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SETTINGS))
    model = Transformer(read_config(path), FAST, CPU, torch.bfloat16, ranks)
    asked = []
    pack = quantize.pack

    def watched(mode, ops, tensors, bias=None, leaves=1, partial=False):
        asked.append((tensors["weight"].shape[1], leaves, partial))
        return pack(mode, ops, tensors, bias, leaves, partial)

    monkeypatch.setattr(quantize, "pack", watched)
    for layer in model.loaders:
        if any("o_proj" in name for name in layer.shapes):
            layer.load([torch.ones(shape) for shape in layer.shapes.values()])
    assert asked == [(768 // ranks, want, ranks > 1)]


# ---- scripts/gpu.sh


def gpu_sh(*argv, **environment):
    """What `scripts/gpu.sh --dry-run` does, and {step: how it ended} of the table that it ends
    with."""
    command = ["bash", ROOT / "scripts" / "gpu.sh", "--dry-run", *map(str, argv)]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return done, {name: ended for name, ended, *_ in rows[1:]}


def test_steps_that_would_begin_too_late_wait(tmp_path):
    """All that there are; but for the first, a dry run begins with the next when it can."""
    done, steps = gpu_sh("--minutes", "0", tmp_path)
    assert done.returncode == 1, done.stderr
    assert set(steps.values()) == {"waits"}
    modes = ("bf16", "int8", "int4")
    bits = {"bits", "tests-1", "tests-2", "verify-bf16", "verify-int4", "graph", "ranks", "logits"}
    speed = {f"speed-{batch}-{mode}" for batch in (1, 8, 16) for mode in modes}
    traces = {f"{what}-{mode}" for what in ("trace", "kernels") for mode in modes}
    assert steps.keys() == {"device", "shapes"} | bits | speed | traces
    assert next(iter(steps)) == "device"


@pytest.mark.slow
def test_one_step_that_fails_leaves_the_others(tmp_path):
    """Without pytest, as on a bare machine, and with a package that does not import: each says so
    in its line."""
    (tmp_path / "pytest.py").write_text("raise ImportError")
    chosen = ("tests", "device", "kernels-int8")
    done, steps = gpu_sh(tmp_path / "out", *chosen, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert steps == {"tests": "no pytest", "device": "well", "kernels-int8": "status 2"}
    lines = (tmp_path / "out" / "device.jsonl").read_text().splitlines()
    versions, memory = map(json.loads, lines)
    assert versions["torch"] == torch.__version__ and memory["bandwidth_gb_s"] > 0
    log = (tmp_path / "out" / "kernels-int8.log").read_text()
    assert log.startswith("error: ") and log.count("\n") == 1  # there is no trace


def test_gpu_sh_names_a_flag_that_is_wrong():
    command = ["bash", ROOT / "scripts" / "gpu.sh", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "--dry-run" in done.stderr
