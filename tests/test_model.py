"""model.py and kernels.py against transformers: tiny random checkpoints of every family, then the default model."""

import json
import random
import resource
import shutil
import subprocess
import sys
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
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

from generate import Engine, Request, Tokenizer
from kernels import FAST, causal, sliding_window
from model import InputError, ModelConfig, Transformer, load_checkpoint, rope_table

transformers.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

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
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 48, "rope_theta": 5000.0}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
MIXTRAL, QWEN3_MOE = (MixtralConfig, MixtralForCausalLM), (Qwen3MoeConfig, Qwen3MoeForCausalLM)
EIGHTS = {"hidden_size": 72, "intermediate_size": 88}  # what transformers' experts in half precision need
FAMILIES = {  # classes, what differs from SHAPE, and what config.json says differently (None: does not say)
    "llama": (LLAMA, {}, {}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True, "num_key_value_heads": 6}, {"head_dim": None}),
    "llama-biases": (LLAMA, {"attention_bias": True, "mlp_bias": True, "head_dim": 14}, {}),
    "llama-3.1": (LLAMA, {"rope_parameters": LLAMA3, "head_dim": 16, "num_key_value_heads": 1}, {}),
    "llama-linear": (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}}, {}),
    "mistral": (MISTRAL, {"sliding_window": None}, {}),
    "mistral-window": (MISTRAL, {"sliding_window": 17}, {}),
    # A published Qwen2 names a window that it does not use, and no layer_types.
    "qwen2": (
        QWEN2,
        {"tie_word_embeddings": True},
        {"sliding_window": 17, "max_window_layers": 1, "layer_types": None},
    ),
    "qwen2-window": (
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
        {"layer_types": None},
    ),
    "qwen2-layer-types": (
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2, "layer_types": LAYER_TYPES},
        {},
    ),
    "qwen3": (QWEN3, {"head_dim": 22, "max_window_layers": 1}, {}),
    "mixtral": (MIXTRAL, EIGHTS | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}, {}),
    "mixtral-window": (MIXTRAL, EIGHTS | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 17}, {}),
    # A published Qwen3-MoE calls the number of its experts num_experts.
    "qwen3-moe": (
        QWEN3_MOE,
        EIGHTS | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
        {"num_experts": 7, "num_local_experts": None},
    ),
    "qwen3-moe-no-norm": (
        QWEN3_MOE,
        EIGHTS | {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "head_dim": 22},
        {},
    ),
}
FAMILIES["qwen3-moe-window"] = (  # where all layers slide, whatever an old config says of the first that does
    QWEN3_MOE,
    FAMILIES["qwen3-moe"][1] | {"use_sliding_window": True, "sliding_window": 17},
    {"max_window_layers": 2},
)
ROWS, LENGTH = 4, 150  # three key blocks, and three times what llama-3.1 above was trained on


def old_spelling(raw):
    """config.json as transformers 4 wrote it."""
    rope = dict(raw.pop("rope_parameters"))
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    return raw | {"rope_scaling": None if rope == {"rope_type": "default"} else rope}


def edit_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def random_reference(config_class, model_class, settings, seed=0):
    """A transformers model in which every bias and every norm matters too."""
    torch.manual_seed(seed)
    model = model_class(config_class(**SHAPE | settings)).eval()
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape) * (1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1.0)
    model.model.embed_tokens.weight.data = torch.randn(model.model.embed_tokens.weight.shape)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model


@pytest.fixture(scope="session")
def family_of(tmp_path_factory):
    """name -> directory, reference model, tokens [ROWS, LENGTH] and the reference's logits of them."""

    @cache
    def make(name):
        classes, settings, said = FAMILIES[name]
        directory, reference = tmp_path_factory.mktemp(name), random_reference(*classes, settings)
        reference.save_pretrained(directory)
        edit_json(directory / "config.json", lambda raw: {k: v for k, v in (raw | said).items() if v is not None})
        tokens = torch.randint(SHAPE["vocab_size"], (ROWS, LENGTH))
        with torch.inference_mode():
            return directory, reference, tokens, reference(tokens).logits

    return make


@pytest.fixture(params=FAMILIES)
def family(request, family_of):
    return family_of(request.param)


def load(directory, dtype=torch.float32):
    model = Transformer(ModelConfig.from_file(directory / "config.json"), FAST, CPU, dtype)
    load_checkpoint(model, directory)
    return model


@torch.inference_mode()
def feed(model, tokens_T, cache, chunks, **flags):
    """Logits [T, V] of one row, fed in chunks of these sizes."""
    out, start = [], 0
    for size in chunks:
        end = min(start + size, len(tokens_T))
        out.append(model(tokens_T[None, start:end], torch.arange(start, end)[None], cache, end, **flags)[0])
        if (start := end) == len(tokens_T):
            return torch.cat(out)


def row(cache, b):
    return [(k[b : b + 1], v[b : b + 1]) for k, v in cache]


def relative_error(got, expected):
    assert got.shape == expected.shape and got.dtype == torch.float32
    return ((got - expected).abs().max() / expected.abs().max()).item()


# Tiny checkpoints


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_prefill(family, spelling, tmp_path):
    directory, _, tokens, expected = family
    if spelling == "old":
        directory = Path(shutil.copytree(directory, tmp_path / "old"))
        edit_json(directory / "config.json", old_spelling)
    model = load(directory)
    for b in range(ROWS):
        logits = feed(model, tokens[b], model.new_cache(1, LENGTH), [LENGTH])
        assert relative_error(logits, expected[b]) <= 1e-4
    last = feed(model, tokens[0], model.new_cache(1, LENGTH), [LENGTH], last=True)
    assert relative_error(last, expected[0, -1:]) <= 1e-4


def test_decode(family):
    directory, _, tokens, expected = family
    model = load(directory)
    logits = feed(model, tokens[0], model.new_cache(1, LENGTH), [1] * LENGTH, decode=True)
    assert relative_error(logits, expected[0]) <= 1e-4


@pytest.mark.parametrize("sizes", [(1,), (3,), (7,), (70, 1, 40)], ids=str)
def test_chunked_prefill(family, sizes):
    directory, _, tokens, expected = family
    model = load(directory)
    logits = feed(model, tokens[0], model.new_cache(1, LENGTH), cycle(sizes))
    assert relative_error(logits, expected[0]) <= 1e-4


@pytest.mark.parametrize("step", [1, 5])
def test_rows_of_different_lengths(family, step):
    """Each row is prefilled alone; then all go on together, every one from its own position."""
    directory, _, tokens, expected = family
    model = load(directory)
    lengths, cache = torch.tensor([61, 1, 120, 34]), model.new_cache(ROWS, LENGTH)
    for b, n in enumerate(lengths.tolist()):
        logits = feed(model, tokens[b, :n], row(cache, b), [n])
        assert relative_error(logits, expected[b, :n]) <= 1e-4
    rows = torch.arange(ROWS)[:, None]
    for i in range(0, 30, step):
        pos = lengths[:, None] + torch.arange(i, i + step)
        with torch.inference_mode():
            logits = model(tokens[rows, pos], pos, cache, int(pos.max()) + 1, decode=step == 1)
        assert relative_error(logits, expected[rows, pos]) <= 1e-4


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_sharded_checkpoint(name, family_of, tmp_path):
    _, reference, tokens, expected = family_of(name)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load(tmp_path)
    assert relative_error(feed(model, tokens[0], model.new_cache(1, LENGTH), [LENGTH]), expected[0]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2-window"])
def test_half_precision_checkpoint_in_fp32(name, dtype, tmp_path):
    classes, settings, _ = FAMILIES[name]
    random_reference(*classes, settings).to(dtype).save_pretrained(tmp_path)
    reference, tokens = classes[1].from_pretrained(tmp_path, dtype=torch.float32), torch.randint(203, (1, LENGTH))
    with torch.inference_mode():
        expected = reference(tokens).logits[0]
    model = load(tmp_path)
    assert relative_error(feed(model, tokens[0], model.new_cache(1, LENGTH), [LENGTH]), expected) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model(family, dtype):
    """Rounding is all that may differ: prefill and decode stay as close to fp32 as transformers' own half does."""
    directory, reference, tokens, expected = family
    model = load(directory, dtype)
    with torch.inference_mode():
        theirs = type(reference).from_pretrained(directory, dtype=dtype)(tokens[:1]).logits[0].float()
    limit = 2 * (theirs - expected[0]).abs().mean()
    for chunks in ([LENGTH], [40] * 4, [1] * LENGTH):
        logits = feed(model, tokens[0], model.new_cache(1, LENGTH), chunks)
        assert (logits - expected[0]).abs().mean() <= limit


# What config.json may say


@pytest.fixture
def config_json(family_of, tmp_path):
    """Writes the config.json of llama-3.1 with changes; a value of None takes the key out."""
    raw = json.loads((family_of("llama-3.1")[0] / "config.json").read_text())

    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v is not None}))
        return path

    return write


def test_config_defaults(config_json):
    path = config_json(head_dim=None, num_key_value_heads=None, rope_parameters=None, rope_theta=77.0)
    config = ModelConfig.from_file(path)
    assert (config.head_dim, config.n_kv_heads, config.rope["rope_theta"]) == (10, 6, 77.0)
    assert not config.tied and config.windows == (None, None, None)


SHARED_KEYS = [k for k in SHAPE if k not in ("num_key_value_heads", "rms_norm_eps", "rope_parameters")]
BAD_CONFIGS = {  # changes and what the message must name
    **{f"no {key}": ({key: None}, key) for key in SHARED_KEYS},
    "no rope_theta": ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture"),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn.*llama3"),
    "old rope type": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "activation": ({"hidden_act": "gelu"}, "gelu.*silu"),
    "wrong type": ({"hidden_size": "sixty", "head_dim": None}, "config.json"),
    "zero heads": ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
    "architectures": ({"architectures": [["LlamaForCausalLM"]]}, "config.json"),
    "rope": ({"rope_parameters": ["default"]}, "config.json"),
    "heads": ({"num_key_value_heads": 4}, "KV heads"),
    "odd head_dim": ({"head_dim": 15}, "head_dim"),
    "layer_types": ({"sliding_window": 5, "layer_types": LAYER_TYPES[:2]}, "layer_types"),
    **{f"llama3 without {key}": ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k != key}}, key)
       for key in LLAMA3 if key.endswith("factor") or key.startswith("original")},
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config(config_json, changes, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_file(config_json(**changes))


def test_unknown_architecture_with_other_keys(tmp_path):
    """A GPT-2 calls everything differently; what is wrong with it is still its architecture."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12}))
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        ModelConfig.from_file(path)


def test_rope_of_llama_3_1(config_json):
    """The published settings, up to the last position of the context."""
    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shape = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "max_position_embeddings": 131072}
    got = rope_table(ModelConfig.from_file(config_json(rope_parameters=rope, **shape)), 131072)
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=rope, **shape))(
        torch.zeros(1), torch.arange(131072)[None]
    )
    expected = torch.stack((cos[0, :, :64], sin[0, :, :64]), dim=1)
    # A frequency may be rounded differently, which at position 131071 costs a little.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", ["{", "[1]", None, "\ud800"], ids=["torn", "list", "absent", "not utf-8"])
def test_unreadable_config(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, errors="surrogatepass")
    with pytest.raises(InputError, match="config.json"):
        ModelConfig.from_file(path)


# What a checkpoint may hold

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copied(family_of, tmp_path):
    """A function that copies a family and saves it again with other tensors; returns the directory."""

    def copy(name, **changes):
        directory = Path(shutil.copytree(family_of(name)[0], tmp_path / name, dirs_exist_ok=True))
        tensors = load_file(directory / "model.safetensors") | changes
        save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")
        return directory

    return copy


BAD_TENSORS = {
    "missing": ({UP: None}, f"{UP} is missing"),
    "missing head": ({"lm_head.weight": None}, "lm_head.weight is missing"),
    "missing norm": ({"model.norm.weight": None}, "model.norm.weight is missing"),
    "extra": ({"model.layers.3.mlp.up_proj.weight": torch.randn(92, 60)}, "layers.3.mlp.up_proj.weight is not expec"),
    "bias": ({"model.layers.0.self_attn.q_proj.bias": torch.randn(60)}, "q_proj.bias is not expected"),
    "transposed": ({UP: torch.randn(60, 92)}, rf"{UP} is F32 \[60, 92\].*\[92, 60\]"),
    "flat": ({UP: torch.randn(92 * 60)}, UP),
    "short norm": ({"model.norm.weight": torch.randn(59)}, r"model.norm.weight is F32 \[59\]"),
    "int8": ({UP: torch.randint(-9, 9, (92, 60), dtype=torch.int8)}, f"{UP} is I8"),
    "float64": ({UP: torch.randn(92, 60).double()}, f"{UP} is F64.*BF16, F16 or F32"),
    "float8": ({UP: torch.randn(92, 60).to(torch.float8_e4m3fn)}, f"{UP} is F8_E4M3"),
}


@pytest.mark.parametrize("changes, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensor(copied, changes, message):
    directory = copied("llama", **changes)
    model = Transformer(ModelConfig.from_file(directory / "config.json"), FAST, CPU, torch.float32)
    with pytest.raises(InputError, match=message):
        load_checkpoint(model, directory)
    assert not model.nbytes  # all is checked before anything is read


def test_tied_checkpoint_needs_no_head_and_takes_no_other(copied, family_of):
    """A repeated head, which some exports hold, is left alone; so are the inverse frequencies of the first ones."""
    _, _, tokens, expected = family_of("llama-tied")
    embedding = load_file(copied("llama-tied") / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(5)}
    model = load(copied("llama-tied", **{"lm_head.weight": embedding.clone()}, **frequencies))
    assert relative_error(feed(model, tokens[0], model.new_cache(1, LENGTH), [LENGTH]), expected[0]) <= 1e-4
    assert model.nbytes == load(copied("llama-tied")).nbytes


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


BAD_FILES = {
    "truncated": cut(-1),
    "half": cut(50_000),
    "torn header": cut(100),
    "empty": cut(0),
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
}


@pytest.mark.parametrize("break_file", BAD_FILES.values(), ids=BAD_FILES)
def test_broken_file(copied, break_file):
    directory = copied("llama")
    break_file(directory / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors.* truncated or corrupt"):
        load(directory)


def test_broken_shard_is_named(family_of, tmp_path):
    family_of("llama")[1].save_pretrained(tmp_path, max_shard_size="60KB")
    broken = sorted(tmp_path.glob("*.safetensors"))[1]
    cut(-1)(broken)
    with pytest.raises(InputError, match=broken.name):
        load(tmp_path)


def test_missing_shard(family_of, tmp_path):
    family_of("llama")[1].save_pretrained(tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone.name}.*missing"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": ["model.safetensors"]}'])
def test_broken_index(copied, index):
    directory = copied("llama")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        load(directory)


def test_no_weights(copied):
    directory = copied("llama")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match="llama.*no .*safetensors"):
        load(directory)


# Attention


def by_head(b, h, q_idx, kv_idx):
    """Each head has a window of its own, the first without the query's own key; the second row skips keys."""
    distance = q_idx - kv_idx
    return (distance >= (h == 0)) & (distance < 5 + 13 * h) & ((b == 0) | (distance % 3 < 2))


MASKS = {"causal": causal, "window": sliding_window(21), "by head and row": by_head}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def attend(mask_mod, dtype, T, poison=0.0, D=18):
    """FAST.attention of T new tokens in two rows that stand elsewhere, and the same written out in fp32. What the
    cache holds behind each row's last token is `poison`."""
    B, H, G, L, past = 2, 6, 2, 384, torch.tensor([5, 65])
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, n, L, D, generator=generator).to(dtype) for n in (H, G, G))
    pos, rows = past[:, None] + torch.arange(T), torch.arange(B)[:, None]
    behind = (torch.arange(L) >= past[:, None])[:, None, :, None]
    k_cache, v_cache = (x.masked_fill(behind, poison) for x in (k, v))
    q_new, k_new, v_new = (x[rows, :, pos] for x in (q, k, v))
    span = -(-(int(pos.max()) + 1) // 64) * 64
    mask = FAST.mask(mask_mod, pos, span, torch.arange(H).view(G, -1), dtype)
    got = FAST.attention(q_new, k_new, v_new, k_cache, v_cache, pos, mask, D**-0.5)

    index = [x.view(s) for x, s in zip(map(torch.arange, (B, H)), ((B, 1, 1, 1), (1, H, 1, 1)), strict=True)]
    keep = mask_mod(*index, pos[:, None, :, None], torch.arange(L)).expand(B, H, T, L)
    repeated = (x.float().repeat_interleave(H // G, dim=1) for x in (k, v))
    exact = F.scaled_dot_product_attention(q_new.transpose(1, 2).float(), *repeated, keep, scale=D**-0.5)
    return got, exact.transpose(1, 2).flatten(2)


# 33 and more take the blockwise path in half precision; 128 is one block of queries.
@pytest.mark.parametrize("T", [1, 2, 32, 33, 64, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask_mod", MASKS.values(), ids=MASKS)
def test_attention(mask_mod, dtype, T):
    got, exact = attend(mask_mod, dtype, T)
    assert got.dtype == dtype
    assert (got.float() - exact).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("T", [1, 7, 33, 300])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask_mod", MASKS.values(), ids=MASKS)
def test_keys_behind_a_row_never_matter(mask_mod, dtype, T):
    clean, poisoned = (attend(mask_mod, dtype, T, poison)[0] for poison in (0.0, 1e4))
    assert torch.equal(clean, poisoned)


def test_cache_starts_at_zero_in_whole_blocks(family_of):
    model = load(family_of("llama")[0])
    cache = model.new_cache(3, 65)
    assert len(cache) == 3 and all(k.shape == v.shape == (3, 2, 128 + 64, 10) for k, v in cache)
    assert not any(k.any() or v.any() for k, v in cache)


# The default model

SENTENCES = """The harbour was quiet that morning, and only two of the {n} boats had gone out.
When water is heated to {n} degrees, its molecules move faster and some of them escape into the air.
def area(width, height): return width * height + {n}
In the year {n} the town council voted to build a bridge across the river.
She asked how long the journey would take; the driver said about {n} minutes, perhaps more.
A prime number has exactly two divisors, so {n} has to be tested against the smaller ones.
My grandmother kept her recipes in a tin box, {n} cards written in blue ink.
| item | price |\n|---|---|\n| bread | {n} |
To learn an instrument, practise {n} minutes every day and rest when your hands are tired.
The committee has not published its report, although {n} people asked for it.""".split("\n")
SENTENCES_ELSEWHERE = """Le café fermait à {n} heures, mais personne n'était pressé de rentrer chez soi.
Die Straße über den Hügel ist {n} Meter lang und im Winter oft gesperrt.
Вчера мы прочитали {n} страниц, а сегодня начнём новую главу.
今天的天气很好，我们走了{n}公里，然后在湖边休息。
Η πόλη έχει {n} κατοίκους και ένα παλιό λιμάνι.
مرّ القطار بعد {n} دقيقة من الموعد.
El niño contó {n} estrellas 🌟🌙 antes de dormirse… ¿o fueron más?""".split("\n")
LENGTHS = [1, 2, 13, 65, 233, 610, 1, 3, 5, 8, 21, 34, 55, 64, 100, 144, 377, 987, 1500, 2000]
NEW_TOKENS = 64


def make_prompts(tokenizer, count):
    """Prompts of LENGTHS tokens, each of its own text; every other one leaves ASCII."""
    prompts = []
    for i, n in enumerate(LENGTHS[:count]):
        rng, text = random.Random(i), ""
        while len(ids := tokenizer.encode(text)) < n + 5:
            text += rng.choice(SENTENCES + SENTENCES_ELSEWHERE * (i % 2)).format(n=rng.randrange(2, 2000)) + " "
        prompts.append(ids[:n])
    return prompts


@pytest.fixture(scope="module", params=[6, pytest.param(20, marks=pytest.mark.slow)], ids="{} prompts".format)
def greedy(request, default_checkpoint):
    """Completions that the engine makes in fp32 at temperature 0; the six first prompts share a batch."""
    model = load(default_checkpoint)
    tokenizer = Tokenizer(default_checkpoint)
    batch_size = 3 if request.param == 6 else 1
    settings = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    prompts = make_prompts(tokenizer, request.param)
    requests = [Request(i, "", ids, **settings) for i, ids in enumerate(prompts)]
    engine = Engine(model, tokenizer, batch_size, max(map(len, prompts)) + NEW_TOKENS)
    done = [completion for completion, _ in engine.generate(requests) if completion.finish_reason]
    assert len({tuple(c.request.prompt_ids) for c in done}) == request.param
    return sorted(done, key=lambda c: c.request.id)


def reference_model(directory, dtype):
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    model.generation_config.eos_token_id = None  # as ignore_eos
    return model


def log_probabilities(logits_TV, tokens):
    return logits_TV.float().log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def test_greedy_tokens_equal_transformers(greedy, default_checkpoint):
    reference, worst = reference_model(default_checkpoint, torch.float32), 0.0
    for c in greedy:
        out = reference.generate(
            torch.tensor([c.request.prompt_ids]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert c.tokens == out.sequences[0, len(c.request.prompt_ids) :].tolist()
        expected = log_probabilities(torch.cat(out.logits), c.tokens)
        worst = max(worst, (torch.tensor(c.logprobs) - expected).abs().max().item())
    print(f"largest logprob difference in fp32: {worst:.1e}")
    assert worst <= 1e-3


@torch.inference_mode()
def test_bf16_logprobs_stay_close_to_transformers(greedy, default_checkpoint):
    """Teacher-forced on the fp32 tokens: each prompt prefilled into its row, then all rows decoded together."""
    model, reference = load(default_checkpoint, torch.bfloat16), reference_model(default_checkpoint, torch.bfloat16)
    lengths = torch.tensor([len(c.request.prompt_ids) for c in greedy])
    tokens = torch.tensor([c.tokens for c in greedy])
    cache = model.new_cache(len(greedy), int(lengths.max()) + NEW_TOKENS)
    ours = torch.empty(*tokens.shape, model.config.vocab_size)
    for b, c in enumerate(greedy):
        ours[b, 0] = feed(
            model, torch.tensor(c.request.prompt_ids), row(cache, b), [len(c.request.prompt_ids)], last=True
        )
    for t in range(NEW_TOKENS - 1):
        pos = lengths[:, None] + t
        ours[:, t + 1] = model(tokens[:, t : t + 1], pos, cache, int(pos.max()) + 1, decode=True)[:, 0]

    differences, errors, their_errors = [], [], []
    for b, c in enumerate(greedy):
        mine = log_probabilities(ours[b], c.tokens)
        logits = reference(torch.tensor([c.request.prompt_ids + c.tokens])).logits[0]
        theirs, exact = log_probabilities(logits[lengths[b] - 1 : -1], c.tokens), torch.tensor(c.logprobs)
        differences.append(mine - theirs)
        errors.append(mine - exact)
        their_errors.append(theirs - exact)
    mean, error, their_error = (torch.cat(x).abs().mean().item() for x in (differences, errors, their_errors))
    print(f"mean logprob difference in bf16: {mean:.4f}; from fp32: ours {error:.4f}, transformers' {their_error:.4f}")
    assert mean <= 0.05
    assert error <= their_error


# Memory

LOADER = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from kernels import FAST
from model import ModelConfig, Transformer, load_checkpoint

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while not stop.is_set():
        samples.append(anonymous())
        time.sleep(0.002)

before, samples, stop = anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
directory = Path(sys.argv[1])
model = Transformer(ModelConfig.from_file(directory / "config.json"), FAST, torch.device("cpu"), torch.bfloat16)
load_checkpoint(model, directory)
stop.set()
thread.join()
print(json.dumps([before, max(samples), anonymous(), model.nbytes, len(samples)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_holds_one_model(default_checkpoint):
    """The peak of anonymous memory, and a tied head that is there once."""
    command = [sys.executable, "-c", LOADER, str(default_checkpoint)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, peak, after, nbytes, samples = json.loads(out)
    print(
        *(
            f"{size / 1e6:.0f} MB {what}"
            for size, what in zip((before, peak, after, nbytes), "before peak after weights".split(), strict=True)
        )
    )
    assert samples > 20
    assert peak <= 1.15 * nbytes + before
    assert after >= 0.9 * nbytes + before  # else the samples or model.nbytes do not say what they should
    tensors = load_file(default_checkpoint / "model.safetensors")
    assert nbytes == sum(t.numel() * (4 if t.dim() == 1 else 2) for t in tensors.values())


def most_faults(model):
    """The page faults of a step of 1000 calls, one after another: the most that come of how deep its caller is."""
    nested = lambda n: n and nested(n - 1)
    model.prefill_stack = lambda *args: [nested(5) for _ in range(1000)]
    tokens, cache = torch.zeros(1, 2, dtype=torch.int64), model.new_cache(1, 2)

    def at(depth):
        if depth:
            return at(depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(tokens, tokens, cache, 2)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    at(0)
    return max(map(at, range(200)))


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="how CPython keeps frames there")
def test_a_step_has_a_block_of_frames_to_itself(config_json, monkeypatch):
    """And the negative control: without it there is a depth at which each call takes memory and gives it back."""
    model = Transformer(ModelConfig.from_file(config_json()), FAST, CPU, torch.float32)
    assert most_faults(model) < 100
    as_written = Transformer.forward.__code__.replace(co_stacksize=12)
    monkeypatch.setattr(Transformer.forward, "__code__", as_written)
    assert most_faults(model) >= 1000
