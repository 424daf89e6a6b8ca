"""Logits beside those of transformers: tiny random checkpoints of every family, then the default
model. Also what config.json and the files of weights may say, attention, and memory."""

import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import silent
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from generate import Engine
from kernels import BATCH_INVARIANT, FAST, SlidingWindow, causal
from model import Transformer, rope_table
from scripts import machine
from scripts.checkpoint import Refusal, open_weights
from scripts.loading import load_weights, read_config, tensor_shapes
from scripts.requests import Request
from scripts.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]

# Nothing here is a power of two, a default or a multiple of a block, so that nothing fits by luck.
SHAPE = {
    "vocab_size": 203,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 300,
    "rms_norm_eps": 0.01,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA = (LlamaConfig, LlamaForCausalLM)
MISTRAL = (MistralConfig, MistralForCausalLM)
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
QWEN3 = (Qwen3Config, Qwen3ForCausalLM)
MIXTRAL = (MixtralConfig, MixtralForCausalLM)
QWEN3_MOE = (Qwen3MoeConfig, Qwen3MoeForCausalLM)
EIGHTS = {"hidden_size": 72, "intermediate_size": 88}  # as transformers' experts need in halves
SLIDING = {"use_sliding_window": True, "sliding_window": 17}
SEVEN_EXPERTS = EIGHTS | {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
FOUR_EXPERTS = EIGHTS | {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 40,
    "head_dim": 22,
}
# Classes, what differs from SHAPE, and what config.json says differently (None: does not say).
FAMILIES = {
    "llama": (LLAMA, {}, {}),
    "llama-tied": (
        LLAMA,
        {"tie_word_embeddings": True, "num_key_value_heads": 6},
        {"head_dim": None},
    ),
    "llama-biases": (LLAMA, {"attention_bias": True, "mlp_bias": True, "head_dim": 14}, {}),
    "llama-3.1": (LLAMA, {"rope_parameters": LLAMA3, "head_dim": 16, "num_key_value_heads": 1}, {}),
    "llama-linear": (LLAMA, {"rope_parameters": LINEAR}, {}),
    "mistral": (MISTRAL, {"sliding_window": None}, {}),
    "mistral-window": (MISTRAL, {"sliding_window": 17}, {}),
    # A published Qwen2 names a window that it does not use, and no layer_types.
    "qwen2": (
        QWEN2,
        {"tie_word_embeddings": True},
        {"sliding_window": 17, "max_window_layers": 1, "layer_types": None},
    ),
    "qwen2-window": (QWEN2, SLIDING | {"max_window_layers": 1}, {"layer_types": None}),
    "qwen2-layer-types": (
        QWEN2,
        SLIDING | {"max_window_layers": 2, "layer_types": LAYER_TYPES},
        {},
    ),
    "qwen3": (QWEN3, {"head_dim": 22, "max_window_layers": 1}, {}),
    "mixtral": (
        MIXTRAL,
        EIGHTS | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
        {},
    ),
    "mixtral-window": (
        MIXTRAL,
        EIGHTS | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 17},
        {},
    ),
    # A published Qwen3-MoE calls the number of its experts num_experts.
    "qwen3-moe": (QWEN3_MOE, SEVEN_EXPERTS, {"num_experts": 7, "num_local_experts": None}),
    "qwen3-moe-no-norm": (QWEN3_MOE, FOUR_EXPERTS, {}),
    # Where all layers slide, whatever an old config says of the first that does.
    "qwen3-moe-window": (QWEN3_MOE, SEVEN_EXPERTS | SLIDING, {"max_window_layers": 2}),
}
ROWS = 4
LENGTH = 150  # three key blocks, and three times what llama-3.1 above was trained on


@dataclass(frozen=True)
class Family:
    """A random checkpoint, and what transformers makes of it."""

    directory: Path
    reference: transformers.PreTrainedModel
    tokens: Tensor  # [ROWS, LENGTH]
    logits: Tensor  # of the reference, [ROWS, LENGTH, V]

    @functools.cached_property
    def model(self) -> Transformer:
        return load(self.directory)


def old_spelling(raw: dict) -> dict:
    """config.json as transformers 4 wrote it."""
    rope = dict(raw.pop("rope_parameters"))
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    return raw | {"rope_scaling": None if rope == {"rope_type": "default"} else rope}


def without_nulls(raw: dict) -> dict:
    return {name: value for name, value in raw.items() if value is not None}


def edit_json(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def random_reference(config_class, model_class, settings: dict, seed=0):
    """A transformers model in which every bias and every norm matters too."""
    torch.manual_seed(seed)
    model = model_class(config_class(**SHAPE | settings)).eval()
    for weight in model.parameters():
        deviation = 1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1.0
        weight.data = torch.randn(weight.shape) * deviation
    embedding = model.model.embed_tokens.weight
    embedding.data = torch.randn(embedding.shape)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model


@pytest.fixture(scope="session")
def family_of(tmp_path_factory):
    """A function from the name of a family to the Family."""

    @functools.cache
    def make(name: str) -> Family:
        classes, settings, said = FAMILIES[name]
        directory = tmp_path_factory.mktemp(name)
        reference = random_reference(*classes, settings)
        reference.save_pretrained(directory)
        edit_json(directory / "config.json", lambda raw: without_nulls(raw | said))
        tokens = torch.randint(SHAPE["vocab_size"], (ROWS, LENGTH))
        with torch.inference_mode():
            return Family(directory, reference, tokens, reference(tokens).logits)

    return make


@pytest.fixture(params=FAMILIES)
def family(request, family_of):
    return family_of(request.param)


def load(directory: Path, dtype=torch.float32) -> Transformer:
    model = Transformer(read_config(directory / "config.json"), FAST, CPU, dtype)
    load_weights(model, open_weights(directory, tensor_shapes(model)), silent)
    return model


@torch.inference_mode()
def feed(model: Transformer, tokens_T: Tensor, cache, chunks, **flags) -> Tensor:
    """Logits [T, V] of one row, fed in chunks of these sizes."""
    found = []
    start = 0
    for size in chunks:
        end = min(start + size, len(tokens_T))
        pos_BT = torch.arange(start, end)[None]
        found.append(model(tokens_T[None, start:end], pos_BT, cache, end, **flags)[0])
        start = end
        if end == len(tokens_T):
            break
    return torch.cat(found)


def feed_all(model: Transformer, tokens_T: Tensor, chunks=(LENGTH,), **flags) -> Tensor:
    """The same with a cache of its own."""
    return feed(model, tokens_T, model.new_cache(1, LENGTH), chunks, **flags)


def row(cache, b: int):
    return [(k[b : b + 1], v[b : b + 1]) for k, v in cache]


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and got.dtype == torch.float32
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ---- tiny checkpoints


def test_prefill(family):
    for tokens, expected in zip(family.tokens, family.logits, strict=True):
        assert relative_error(feed_all(family.model, tokens), expected) <= 1e-4
    last = feed_all(family.model, family.tokens[0], last=True)
    assert relative_error(last, family.logits[0, -1:]) <= 1e-4


def test_an_old_config_is_the_same_model(family, tmp_path):
    directory = Path(shutil.copytree(family.directory, tmp_path / "old"))
    edit_json(directory / "config.json", old_spelling)
    logits = feed_all(load(directory), family.tokens[0])
    assert torch.equal(logits, feed_all(family.model, family.tokens[0]))


def test_decode(family):
    """From the first token on, and far into the text."""
    chunks = [1] * 30 + [90] + [1] * 30
    logits = feed_all(family.model, family.tokens[0], chunks, decode=True)
    assert relative_error(logits, family.logits[0]) <= 1e-4


@pytest.mark.parametrize("sizes", [(7,), (70, 1, 40)], ids=str)
def test_chunked_prefill(family, sizes):
    logits = feed_all(family.model, family.tokens[0], itertools.cycle(sizes))
    assert relative_error(logits, family.logits[0]) <= 1e-4


@pytest.mark.parametrize("step", [1, 5])
def test_rows_of_different_lengths(family, step):
    """Each row is prefilled alone; then all go on together, every one from its own position."""
    model = family.model
    tokens, expected = family.tokens, family.logits
    lengths = torch.tensor([61, 1, 120, 34])
    cache = model.new_cache(ROWS, LENGTH)
    for b, n in enumerate(lengths.tolist()):
        logits = feed(model, tokens[b, :n], row(cache, b), [n])
        assert relative_error(logits, expected[b, :n]) <= 1e-4
    rows = torch.arange(ROWS)[:, None]
    for i in range(0, 30, step):
        pos = lengths[:, None] + torch.arange(i, i + step)
        with torch.inference_mode():
            logits = model(tokens[rows, pos], pos, cache, int(pos.max()) + 1, decode=step == 1)
        assert relative_error(logits, expected[rows, pos]) <= 1e-4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_model(family, dtype):
    """Rounding is all that may differ: prefill and decode stay as close to fp32 as transformers'
    own half does."""
    tokens, expected = family.tokens[0], family.logits[0]
    model = load(family.directory, dtype)
    theirs = type(family.reference).from_pretrained(family.directory, dtype=dtype)
    with torch.inference_mode():
        error = (theirs(tokens[None]).logits[0].float() - expected).abs().mean()
    for chunks in ([LENGTH], [40] * 4, [LENGTH - 30] + [1] * 30):
        logits = feed_all(model, tokens, chunks)
        assert (logits - expected).abs().mean() <= 2 * error


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_sharded_checkpoint(name, family_of, tmp_path):
    family = family_of(name)
    family.reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    logits = feed_all(load(tmp_path), family.tokens[0])
    assert relative_error(logits, family.logits[0]) <= 1e-4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2-window"])
def test_half_precision_checkpoint_in_fp32(name, dtype, tmp_path):
    classes, settings, _ = FAMILIES[name]
    random_reference(*classes, settings).to(dtype).save_pretrained(tmp_path)
    reference = classes[1].from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(SHAPE["vocab_size"], (1, LENGTH))
    with torch.inference_mode():
        expected = reference(tokens).logits[0]
    assert relative_error(feed_all(load(tmp_path), tokens[0]), expected) <= 1e-4


# ---- what config.json may say


@pytest.fixture
def config_json(family_of, tmp_path):
    """Writes the config.json of llama-3.1 with changes; a value of None takes the key out."""
    raw = json.loads((family_of("llama-3.1").directory / "config.json").read_text())

    def write(**changes) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(without_nulls(raw | changes)))
        return path

    return write


def test_config_defaults(config_json):
    left_out = {"head_dim": None, "num_key_value_heads": None, "rope_parameters": None}
    config = read_config(config_json(**left_out, rope_theta=77.0))
    assert (config.head_dim, config.num_key_value_heads) == (10, 6)
    assert config.ropes[None]["rope_theta"] == 77.0
    assert not config.tie_word_embeddings
    assert list(config.windows) == [None, None, None]


DEFAULTED = ("num_key_value_heads", "rms_norm_eps", "rope_parameters")
MROPE = {"rope_type": "mrope", "rope_theta": 1e4, "mrope_section": [2, 3]}
OLD_MROPE = {"type": "mrope", "mrope_section": [2, 3]}
UNKNOWN = {"architectures": ["GPT2LMHeadModel"]}
BAD_CONFIGS = {  # changes and what the message must name
    "no rope_theta": ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
    "unknown architecture": (UNKNOWN, "GPT2LMHeadModel.*LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture"),
    "rope type": ({"rope_parameters": MROPE}, "mrope.*llama3.*longrope"),
    "old rope type": ({"rope_parameters": None, "rope_scaling": OLD_MROPE}, "mrope"),
    "activation": ({"hidden_act": "gelu"}, "gelu.*silu"),
    "wrong type": ({"hidden_size": "sixty", "head_dim": None}, "config.json"),
    "zero heads": ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
    "architectures": ({"architectures": [["LlamaForCausalLM"]]}, "config.json"),
    "rope": ({"rope_parameters": ["default"]}, "config.json"),
    "heads": ({"num_key_value_heads": 4}, "KV heads"),
    "odd head_dim": ({"head_dim": 15}, "head_dim"),
    "layer_types": ({"sliding_window": 5, "layer_types": LAYER_TYPES[:2]}, "layer_types"),
}
for key in SHAPE.keys() - DEFAULTED:
    BAD_CONFIGS[f"no {key}"] = ({key: None}, key)
for key in LLAMA3.keys() - {"rope_type", "rope_theta"}:
    rest = {name: value for name, value in LLAMA3.items() if name != key}
    BAD_CONFIGS[f"llama3 without {key}"] = ({"rope_parameters": rest}, key)


@pytest.mark.parametrize("case", sorted(BAD_CONFIGS))
def test_bad_config(config_json, case):
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(Refusal, match=message):
        read_config(config_json(**changes))


def test_unknown_architecture_with_other_keys(tmp_path):
    """A GPT-2 calls everything differently; what is wrong with it is still its architecture."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(UNKNOWN | {"n_embd": 768, "n_head": 12, "n_layer": 12}))
    with pytest.raises(Refusal, match="GPT2LMHeadModel"):
        read_config(path)


UNREADABLE = {"torn": "{", "list": "[1]", "absent": None, "not utf-8": "\ud800"}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_config(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, errors="surrogatepass")
    with pytest.raises(Refusal, match="config.json"):
        read_config(path)


def test_rope_of_llama_3_1(config_json):
    """The published settings, up to the last position of the context."""
    context = 131072
    published = {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    shape = {
        "rope_parameters": LLAMA3 | published,
        "hidden_size": 512,
        "num_attention_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": context,
    }
    config = read_config(config_json(**shape))
    got = rope_table(config, config.ropes[None], context)
    reference = LlamaRotaryEmbedding(LlamaConfig(**shape))
    cos, sin = reference(torch.zeros(1), torch.arange(context)[None])
    expected = torch.stack((cos[0, :, :64], sin[0, :, :64]), dim=1)
    # A frequency may be rounded differently, which at position 131071 costs a little.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# ---- what a checkpoint may hold

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copied(family_of, tmp_path):
    """A function that copies a family, saves it with other tensors, and returns the directory."""

    def copy(name: str, **changes) -> Path:
        source = family_of(name).directory
        directory = Path(shutil.copytree(source, tmp_path / name, dirs_exist_ok=True))
        path = directory / "model.safetensors"
        save_file(without_nulls(load_file(path) | changes), path)
        return directory

    return copy


BAD_TENSORS = {
    "missing": ({UP: None}, f"{UP} is missing"),
    "missing head": ({"lm_head.weight": None}, "lm_head.weight is missing"),
    "missing norm": ({"model.norm.weight": None}, "model.norm.weight is missing"),
    "extra": (
        {"model.layers.3.mlp.up_proj.weight": torch.randn(92, 60)},
        "layers.3.mlp.up_proj.weight is not expected",
    ),
    "bias": (
        {"model.layers.0.self_attn.q_proj.bias": torch.randn(60)},
        "q_proj.bias is not expected",
    ),
    "transposed": ({UP: torch.randn(60, 92)}, rf"{UP} is F32 \[60, 92\].*\[92, 60\]"),
    "flat": ({UP: torch.randn(92 * 60)}, UP),
    "short norm": ({"model.norm.weight": torch.randn(59)}, r"model.norm.weight is F32 \[59\]"),
    "int8": ({UP: torch.randint(-9, 9, (92, 60), dtype=torch.int8)}, f"{UP} is I8"),
    "float64": ({UP: torch.randn(92, 60).double()}, f"{UP} is F64.*BF16, F16 or F32"),
    "float8": ({UP: torch.randn(92, 60).to(torch.float8_e4m3fn)}, f"{UP} is F8_E4M3"),
}


@pytest.mark.parametrize("changes, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensor(copied, changes, message):
    """All is checked before anything is read."""
    directory = copied("llama", **changes)
    model = Transformer(read_config(directory / "config.json"), FAST, CPU, torch.float32)
    with pytest.raises(Refusal, match=message):
        open_weights(directory, tensor_shapes(model))


def test_tied_checkpoint_needs_no_head_and_takes_no_other(copied, family_of):
    """A repeated head, which some exports hold, is left alone; so are the inverse frequencies of
    the first ones."""
    family = family_of("llama-tied")
    embedding = load_file(family.directory / "model.safetensors")["model.embed_tokens.weight"]
    more = {
        "lm_head.weight": embedding.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(5),
    }
    model = load(copied("llama-tied", **more))
    assert relative_error(feed_all(model, family.tokens[0]), family.logits[0]) <= 1e-4
    assert model.nbytes == family.model.nbytes


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BAD_FILES = {
    "truncated": lambda path: cut(path, -1),
    "half": lambda path: cut(path, 50_000),
    "torn header": lambda path: cut(path, 100),
    "empty": lambda path: cut(path, 0),
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
}


@pytest.mark.parametrize("break_file", BAD_FILES.values(), ids=BAD_FILES)
def test_broken_file(copied, break_file):
    directory = copied("llama")
    break_file(directory / "model.safetensors")
    with pytest.raises(Refusal, match="model.safetensors.* truncated or corrupt"):
        load(directory)


def test_broken_shard_is_named(family_of, tmp_path):
    """One that is cut, and then one that is gone."""
    family_of("llama").reference.save_pretrained(tmp_path, max_shard_size="60KB")
    broken = sorted(tmp_path.glob("*.safetensors"))[1]
    cut(broken, -1)
    with pytest.raises(Refusal, match=f"{broken.name}.*truncated"):
        load(tmp_path)
    broken.unlink()
    with pytest.raises(Refusal, match=f"{broken.name}.*missing"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": ["model.safetensors"]}'])
def test_broken_index(copied, index):
    directory = copied("llama")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(Refusal, match="model.safetensors.index.json"):
        load(directory)


def test_no_weights(copied):
    directory = copied("llama")
    (directory / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="llama.*no .*safetensors"):
        load(directory)


# ---- what a model shows of itself

# Multiples of 64, to which the int4 kernel fills up rows.
ROUND = {
    "vocab_size": 192,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def random_model(path: Path, ops=FAST, quantization=None, **changes) -> Transformer:
    path.write_text(json.dumps(SHAPE | ROUND | changes))
    model = Transformer(read_config(path, quantization), ops, CPU, torch.bfloat16)
    machine.randomize(model)
    return model


@pytest.mark.parametrize("ops", [FAST, BATCH_INVARIANT], ids=["fast", "exact"])
@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_buffers_are_the_weights(tmp_path, architecture, quantization, ops):
    """Their bytes are those that every step reads. An embedding is only looked up, and the 8-bit
    head of an int4 model is no tensor on every CPU."""
    flags = {"attention_bias": True, "mlp_bias": True} | EXPERTS
    model = random_model(
        tmp_path / "config.json", ops, quantization, architectures=[architecture], **flags
    )
    shown = [*model.named_parameters(), *model.named_buffers()]
    sizes = {name: tensor.nbytes for name, tensor in shown}
    expected = model.nbytes
    apart = ["embed."]
    if quantization:
        expected -= model.head.packed.nbytes
        apart.append("head.")
    found = sum(size for name, size in sizes.items() if not name.startswith(tuple(apart)))
    assert found == expected
    # Each checkpoint layer is there, the norms and biases among them.
    assert {name for name in sizes if name.endswith("norm.weight")} >= {
        "norm.weight",
        "layers.0.attention_norm.weight",
        "layers.2.ffn_norm.weight",
    }
    assert "layers.1.qkv.packed.bias" in sizes


def test_modules_are_the_structure(tmp_path):
    """By name, each of its class; every one that takes tensors of the checkpoint is among them."""
    model = random_model(tmp_path / "config.json", architectures=["Qwen3MoeForCausalLM"], **EXPERTS)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    expected = {
        "embed": "Embedding",
        "head": "Linear",
        "norm": "RMSNorm",
        "layers.0": "Qwen3MoeBlock",
        "layers.0.attention_norm": "RMSNorm",
        "layers.1.qkv": "Linear",
        "layers.1.q_norm": "RMSNorm",
        "layers.1.o": "Linear",
        "layers.2.ffn_norm": "RMSNorm",
        "layers.2.ffn": "Mixture",
        "layers.2.ffn.router": "Linear",
        "layers.2.ffn.experts.1": "FeedForward",
        "layers.2.ffn.experts.1.gate_up": "Linear",
        "layers.2.ffn.experts.1.down.packed": "Packed",
    }
    assert kinds.items() >= expected.items()
    assert set(model.loaders) <= set(model.modules())
    assert "layers.3" not in kinds


# ---- attention


def by_head(b, h, q_idx, kv_idx):
    """Each head has a window of its own, the first without the query's own key; the second row
    skips keys."""
    distance = q_idx - kv_idx
    return (distance >= (h == 0)) & (distance < 5 + 13 * h) & ((b == 0) | (distance % 3 < 2))


MASKS = {"causal": causal, "window": SlidingWindow(21), "by head and row": by_head}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def attend(mask_mod, dtype, T: int, poison=0.0) -> tuple[Tensor, Tensor]:
    """FAST.attention of T new tokens in two rows that stand elsewhere, and the same written out in
    fp32. What the cache holds behind each row's last token is `poison`."""
    B = 2
    H = 6
    G = 2
    D = 18
    L = 384
    past = torch.tensor([5, 65])
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, n, L, D, generator=generator).to(dtype) for n in (H, G, G))
    pos = past[:, None] + torch.arange(T)
    rows = torch.arange(B)[:, None]
    behind = (torch.arange(L) >= past[:, None])[:, None, :, None]
    caches = [x.masked_fill(behind, poison) for x in (k, v)]
    q_new, k_new, v_new = (x[rows, :, pos] for x in (q, k, v))
    span = -(-(int(pos.max()) + 1) // 64) * 64
    mask = FAST.mask(mask_mod, pos, span, torch.arange(H).view(G, -1), caches[0])
    got = FAST.attention(q_new, k_new, v_new, *caches, pos, mask, D**-0.5)

    b = torch.arange(B).view(B, 1, 1, 1)
    h = torch.arange(H).view(1, H, 1, 1)
    keep = mask_mod(b, h, pos[:, None, :, None], torch.arange(L)).expand(B, H, T, L)
    repeated = (x.float().repeat_interleave(H // G, dim=1) for x in (k, v))
    queries = q_new.transpose(1, 2).float()
    exact = F.scaled_dot_product_attention(queries, *repeated, keep, scale=D**-0.5)
    return got, exact.transpose(1, 2).flatten(2)


# 128 is one block of queries.
@pytest.mark.parametrize("T", [1, 2, 33, 128, 129, 300])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask_mod", MASKS.values(), ids=MASKS)
def test_attention(mask_mod, dtype, T):
    """Close to the definition; what lies behind a row in the cache never matters."""
    got, exact = attend(mask_mod, dtype, T)
    assert got.dtype == dtype
    assert (got.float() - exact).abs().max() <= TOLERANCE[dtype]
    poisoned, _ = attend(mask_mod, dtype, T, poison=1e4)
    assert torch.equal(got, poisoned)


def test_cache_starts_at_zero_in_whole_blocks(family_of):
    cache = family_of("llama").model.new_cache(3, 65)
    assert len(cache) == 3
    for keys, values in cache:
        assert keys.shape == values.shape == (3, 2, 128 + 64, 10)
        assert not keys.any() and not values.any()


# ---- the default model

SENTENCES = """The harbour was quiet that morning, and only two of the {n} boats had gone out.
When water is heated to {n} degrees, its molecules move faster and some of them escape.
def area(width, height): return width * height + {n}
In the year {n} the town council voted to build a bridge across the river.
She asked how long the journey would take; the driver said about {n} minutes, perhaps more.
A prime number has exactly two divisors, so {n} has to be tested against the smaller ones.
My grandmother kept her recipes in a tin box, {n} cards written in blue ink.
| item | price |\n|---|---|\n| bread | {n} |
To learn an instrument, practise {n} minutes every day and rest when your hands are tired.
The committee has not published its report, although {n} people asked for it.""".split("\n")
SENTENCES_ELSEWHERE = """Le café fermait à {n} heures, mais personne n'était pressé.
Die Straße über den Hügel ist {n} Meter lang und im Winter oft gesperrt.
Вчера мы прочитали {n} страниц, а сегодня начнём новую главу.
今天的天气很好，我们走了{n}公里，然后在湖边休息。
Η πόλη έχει {n} κατοίκους και ένα παλιό λιμάνι.
مرّ القطار بعد {n} دقيقة من الموعد.
El niño contó {n} estrellas 🌟🌙 antes de dormirse… ¿o fueron más?""".split("\n")
# Of prompts, the four first in every run.
LENGTHS = [1, 13, 65, 233, 2, 610, 1, 3, 5, 8, 21, 34, 55, 64, 100, 144, 377, 987, 1500, 2000]
SIZES = [(4, 24), pytest.param((20, 64), marks=pytest.mark.slow)]  # prompts, new tokens of each


def make_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Prompts of LENGTHS tokens, each of its own text; every other one leaves ASCII."""
    prompts = []
    for i, n in enumerate(LENGTHS[:count]):
        rng = random.Random(i)
        text = ""
        ids = []
        while len(ids) < n + 5:
            sentence = rng.choice(SENTENCES + SENTENCES_ELSEWHERE * (i % 2))
            text += sentence.format(n=rng.randrange(2, 2000)) + " "
            ids = tokenizer.encode(text)
        prompts.append(ids[:n])
    return prompts


@pytest.fixture(scope="module", params=SIZES, ids="{0[0]} prompts".format)
def greedy(request, default_checkpoint):
    """Completions that the engine makes in fp32 at temperature 0."""
    count, new = request.param
    tokenizer = Tokenizer(default_checkpoint)
    settings = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
    prompts = make_prompts(tokenizer, count)
    requests = [Request(i, "", ids, **settings) for i, ids in enumerate(prompts)]
    engine = Engine(load(default_checkpoint), tokenizer, 4, max(map(len, prompts)) + new)
    done = [completion for completion, _ in engine.generate(requests) if completion.finish_reason]
    assert len({tuple(c.request.prompt_ids) for c in done}) == count
    return sorted(done, key=lambda completion: completion.request.id)


def log_probabilities(logits_TV: Tensor, tokens: list[int]) -> Tensor:
    return logits_TV.float().log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@torch.inference_mode()
def their_logits(directory: Path, completions, dtype):
    """For each completion, what transformers says before each of its tokens, [T, V]."""
    reference = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    for completion in completions:
        logits = reference(torch.tensor([completion.ids[:-1]])).logits[0]
        yield logits[-len(completion.tokens) :]


def test_greedy_tokens_equal_transformers(greedy, default_checkpoint):
    """Each token is the likeliest after those before it."""
    worst = 0.0
    found = their_logits(default_checkpoint, greedy, torch.float32)
    for completion, logits_TV in zip(greedy, found, strict=True):
        assert completion.tokens == logits_TV.argmax(-1).tolist()
        expected = log_probabilities(logits_TV, completion.tokens)
        differences = torch.tensor(completion.logprobs) - expected
        worst = max(worst, differences.abs().max().item())
    print(f"largest logprob difference in fp32: {worst:.1e}")
    assert worst <= 1e-3


@torch.inference_mode()
def test_bf16_logprobs_stay_close_to_transformers(greedy, default_checkpoint):
    """Teacher-forced on the fp32 tokens: each prompt prefilled into its row, then all rows decoded
    together."""
    model = load(default_checkpoint, torch.bfloat16)
    lengths = torch.tensor([len(c.request.prompt_ids) for c in greedy])
    tokens = torch.tensor([c.tokens for c in greedy])
    B, T = tokens.shape
    cache = model.new_cache(B, int(lengths.max()) + T)
    ours = torch.empty(B, T, model.config.vocab_size)
    for b, n in enumerate(lengths.tolist()):
        prompt = torch.tensor(greedy[b].request.prompt_ids)
        ours[b, 0] = feed(model, prompt, row(cache, b), [n], last=True)
    for t in range(T - 1):
        pos = lengths[:, None] + t
        now = tokens[:, t : t + 1]
        ours[:, t + 1] = model(now, pos, cache, int(pos.max()) + 1, decode=True)[:, 0]

    found = their_logits(default_checkpoint, greedy, torch.bfloat16)
    differences = []
    errors = []
    their_errors = []
    for b, (completion, logits_TV) in enumerate(zip(greedy, found, strict=True)):
        mine = log_probabilities(ours[b], completion.tokens)
        theirs = log_probabilities(logits_TV, completion.tokens)
        exact = torch.tensor(completion.logprobs)
        differences.append(mine - theirs)
        errors.append(mine - exact)
        their_errors.append(theirs - exact)
    means = [torch.cat(x).abs().mean().item() for x in (differences, errors, their_errors)]
    difference, error, their_error = means
    print(f"mean logprob difference in bf16: {difference:.4f}")
    print(f"from fp32: ours {error:.4f}, transformers' {their_error:.4f}")
    assert difference <= 0.05
    assert error <= their_error


# ---- memory

LOADER = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from scripts.loading import load_weights, read_config, tensor_shapes
from kernels import FAST
from model import Transformer
from scripts.checkpoint import open_weights

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024

def watch():
    while not stop.is_set():
        samples.append(anonymous())
        time.sleep(0.002)

before = anonymous()
samples = []
stop = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
directory = Path(sys.argv[1])
config = read_config(directory / "config.json")
model = Transformer(config, FAST, torch.device("cpu"), torch.bfloat16)
load_weights(model, open_weights(directory, tensor_shapes(model)), lambda done, total: None)
stop.set()
thread.join()
print(json.dumps([before, max(samples), anonymous(), model.nbytes, len(samples)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_holds_one_model(default_checkpoint):
    """The peak of anonymous memory, and a tied head that is there once."""
    command = [sys.executable, "-c", LOADER, str(default_checkpoint)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak, after, nbytes, samples = json.loads(done.stdout)
    print(f"anonymous memory before, at most, after: {before}, {peak}, {after}; weights {nbytes}")
    assert samples > 20
    assert peak <= 1.15 * nbytes + before
    # Else the samples or model.nbytes do not say what they should.
    assert after >= 0.9 * nbytes + before
    tensors = load_file(default_checkpoint / "model.safetensors")
    assert nbytes == sum(t.numel() * (4 if t.dim() == 1 else 2) for t in tensors.values())
