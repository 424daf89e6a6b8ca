"""What a config.json may say, in all its spellings, and what it may leave out; which files beside
it are weights. What is right comes from transformers, as far as it loads such a directory."""

import copy
import json
import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import edit_json, feed_all, load, relative_error
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import generate
from model import rope_table
from scripts import checkpoint, configuration, machine, quantized
from scripts.checkpoint import EMBEDDING, HEAD, INDEX, Refusal
from scripts.loading import read_config, read_shape

transformers.logging.set_verbosity_error()
BASE = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}


def family(architecture, kind, **more):
    return BASE | {"architectures": [f"{architecture}ForCausalLM"], "model_type": kind} | more


EXPERTS = {"num_experts_per_tok": 3, "norm_topk_prob": True}
LLAMA = family("Llama", "llama")
MISTRAL = family("Mistral", "mistral", sliding_window=None)
MIXTRAL = family("Mixtral", "mixtral", num_local_experts=4, sliding_window=7, **EXPERTS)
QWEN2 = family("Qwen2", "qwen2", use_sliding_window=False)
QWEN3 = family("Qwen3", "qwen3", head_dim=32)
QWEN3_MOE = family("Qwen3Moe", "qwen3_moe", num_experts=5, moe_intermediate_size=32, **EXPERTS)


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def write_config(path, config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path / "config.json"


def write(path, config):
    """A directory with random weights for what transformers reads in `config`."""
    write_config(path, config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).float()
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape) * (0.2 if weight.dim() > 1 else 1.0)
    model.tie_weights()
    model.save_pretrained(path)
    write_config(path, config)
    return path


def assert_like_transformers(path, length=40):
    ids = torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(1))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    assert relative_error(feed_all(load(path), ids, [length]), expected) <= 1e-4


def edit_weights(path, **changes):
    """Change tensors of a directory; None takes one out."""
    file = path / "model.safetensors"
    tensors = load_file(file) | {
        name.replace("_weight", ".weight"): t for name, t in changes.items()
    }
    save_file({name: t for name, t in tensors.items() if t is not None}, file, {"format": "pt"})


# ---- a head beside a table that is said to be tied


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "m"
    return write(path, LLAMA | {"tie_word_embeddings": True})


@pytest.fixture
def copied(tied, tmp_path):
    return shutil.copytree(tied, tmp_path / "m")


def other_head(scale=0.2):
    return scale * torch.randn(128, 64, generator=torch.Generator().manual_seed(2))


def last_row_differs(path):
    head = load_file(path / "model.safetensors")[EMBEDDING]
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize("make", [lambda path: other_head(), last_row_differs])
def test_a_head_that_differs_counts(copied, make):
    edit_weights(copied, lm_head_weight=make(copied))
    assert_like_transformers(copied)
    assert not read_config(copied / "config.json").tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_equal_tables_one_is_held(copied, tied, dtype):
    table = load_file(copied / "model.safetensors")[EMBEDDING].bfloat16()
    edit_weights(copied, lm_head_weight=table.clone(), **{EMBEDDING: table.to(dtype)})
    assert_like_transformers(copied)
    assert load(copied).nbytes == load(tied).nbytes


def test_a_head_alone_serves_as_both(copied):
    table = load_file(copied / "model.safetensors")[EMBEDDING]
    edit_weights(copied, lm_head_weight=table, **{EMBEDDING: None})
    assert_like_transformers(copied)


def test_no_table_at_all_is_refused(copied):
    edit_weights(copied, **{EMBEDDING: None})
    with pytest.raises(Refusal, match=f"{EMBEDDING} is missing"):
        load(copied)


def test_an_untied_head_is_not_made_up(copied):
    write_config(copied, LLAMA)
    with pytest.raises(Refusal, match=f"{HEAD} is missing"):
        load(copied)


def test_a_head_of_another_size_is_refused(copied):
    edit_weights(copied, lm_head_weight=torch.randn(100, 64))
    with pytest.raises(Refusal, match=rf"{HEAD} is F32 \[100, 64\]"):
        load(copied)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_directory_keeps_its_head(copied, tmp_path, mode):
    head = other_head()
    edit_weights(copied, lm_head_weight=head)
    out = quantized.write(copied, "", mode, 32)
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    model = load(out)
    assert not model.config.tie_word_embeddings
    ids = torch.arange(20)
    edit_weights(copied, lm_head_weight=None)
    other = load(quantized.write(copied, str(tmp_path / "other"), mode, 32))
    assert other.config.tie_word_embeddings
    assert relative_error(feed_all(model, ids), feed_all(other, ids)) > 0.1


def test_a_quantized_directory_of_a_head_alone(copied):
    table = load_file(copied / "model.safetensors")[EMBEDDING]
    edit_weights(copied, lm_head_weight=table, **{EMBEDDING: None})
    out = quantized.write(copied, "", "int8", 32)
    assert load(out).config.tie_word_embeddings


def test_random_weights_look_at_no_other(copied):
    edit_weights(copied, lm_head_weight=other_head())
    assert read_shape(copied / "config.json").tie_word_embeddings


# ---- where RoPE settings may stand

LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default", "rope_theta": 77.0}
NO_ORIGINAL = without(LLAMA3, "original_max_position_embeddings")
ROPES = {
    "theta alone": {"rope_theta": 33.0},
    "nothing": {},
    "empty": {"rope_parameters": {}, "rope_scaling": {}},
    "new": {"rope_parameters": DEFAULT},
    "new, theta beside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 33.0},
    "new, theta in both": {"rope_parameters": DEFAULT, "rope_theta": 33.0},
    "old": {"rope_scaling": LINEAR, "rope_theta": 33.0},
    "old, no theta": {"rope_scaling": LINEAR},
    "old, theta within": {"rope_scaling": LINEAR | {"rope_theta": 12.0}, "rope_theta": 33.0},
    "both": {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
    "both, theta beside": {"rope_scaling": LINEAR, "rope_parameters": DEFAULT, "rope_theta": 33.0},
    "default wins": {"rope_scaling": DEFAULT, "rope_parameters": LINEAR | {"rope_theta": 9.0}},
    "null beside": {"rope_scaling": None, "rope_parameters": LINEAR | {"rope_theta": 9.0}},
    "both types": {"rope_scaling": LINEAR | {"rope_type": "default"}},
    "factor without a type": {"rope_scaling": {"factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama3 in new": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "original beside": {"rope_scaling": NO_ORIGINAL, "original_max_position_embeddings": 48},
    "original in both": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 48},
    "original beside new": {
        "rope_parameters": NO_ORIGINAL | {"rope_theta": 5e5},
        "original_max_position_embeddings": 48,
    },
    "original of no use": {"rope_theta": 33.0, "original_max_position_embeddings": 48},
}


def written(tmp_path, base, changes):
    return write_config(tmp_path, without(base, "rope_theta") | copy.deepcopy(changes))


@pytest.mark.parametrize("base", [LLAMA, MIXTRAL, QWEN3], ids=["llama", "mixtral", "qwen3"])
@pytest.mark.parametrize("name", ROPES)
def test_rope(tmp_path, name, base):
    config = read_config(written(tmp_path, base, ROPES[name]))
    (rope,) = config.ropes.values()
    got = rope_table(config, rope, 300)
    cos, sin = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))(
        torch.zeros(1), torch.arange(300)[None]
    )
    half = got.shape[-1]
    expected = torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def by_type(full, sliding):
    return {"full_attention": full, "sliding_attention": sliding}


SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
BY_TYPE = {
    "same": (LLAMA, by_type(DEFAULT, DEFAULT)),
    "one": (LLAMA, {"full_attention": DEFAULT}),
    "the other is not used": (LLAMA, by_type(DEFAULT, DEFAULT | {"rope_theta": 9.0})),
    "all slide": (MIXTRAL, by_type(DEFAULT | {"rope_theta": 9.0}, DEFAULT)),
    "some slide": (QWEN3 | SLIDING, by_type(DEFAULT, DEFAULT)),
    "said beside": (LLAMA, by_type(DEFAULT, None) | {"rope_theta": 77.0}),
}


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", BY_TYPE)
def test_rope_by_type_of_layer(tmp_path, name, place):
    """transformers 5.23 writes them for families in which layers differ, and for these does not
    read them."""
    base, rope = BY_TYPE[name]
    config = read_config(written(tmp_path, base, {place: rope, "rope_theta": 33.0}))
    assert {rope["rope_theta"] for rope in config.ropes.values()} == {77.0}


MROPE = {"rope_type": "mrope", "mrope_section": [2, 3, 3]}
HALF = {"partial_rotary_factor": 0.5}
BAD_ROPES = {
    "mrope": (LLAMA, {"rope_scaling": MROPE}, "mrope"),
    "mrope beside": (QWEN2, {"rope_scaling": MROPE, "rope_parameters": DEFAULT}, "mrope"),
    "mrope behind": (MISTRAL, {"rope_scaling": LINEAR, "rope_parameters": MROPE}, "mrope"),
    "by type": (LLAMA, {"rope_parameters": by_type(DEFAULT, MROPE)}, "mrope"),
    "no such type": (LLAMA, {"rope_scaling": {"type": "su"}}, "su"),
    "a list": (LLAMA, {"rope_scaling": {"type": ["linear"]}}, "linear"),
    "text": (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    "differ from beside": (
        LLAMA,
        {"rope_parameters": by_type(DEFAULT, DEFAULT) | {"rope_theta": 9.0}},
        "rope_parameters .* differ",
    ),
    "none for these": (LLAMA, {"rope_parameters": {"sliding_attention": DEFAULT}}, "none for full"),
    "half": (LLAMA, HALF, "partial_rotary_factor 0.5"),
    "half in new": (LLAMA, {"rope_parameters": DEFAULT | HALF}, "partial_rotary_factor 0.5"),
    "half in old": (QWEN2, {"rope_scaling": LINEAR | HALF}, "partial_rotary_factor 0.5"),
    "half behind": (QWEN2, {"rope_scaling": LINEAR, "rope_parameters": HALF}, "partial_rotary"),
    "half by type": (LLAMA, {"rope_parameters": by_type(DEFAULT, HALF)}, "partial_rotary"),
    "no factor": (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "null": (LLAMA, {"rope_scaling": {"type": "linear", "factor": None}}, "factor is missing"),
    "low": (LLAMA, {"rope_scaling": without(LLAMA3, "low_freq_factor")}, "low_freq_factor"),
    "equal": (LLAMA, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "4.0 and 4.0"),
    "crossed": (LLAMA, {"rope_scaling": LLAMA3 | {"low_freq_factor": 5}}, "5.0 and 4.0"),
    "original": (
        LLAMA,
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": -1},
        "original_max_position_embeddings is -1",
    ),
}
for bad in (0, -1.0, math.inf, math.nan, "8", True, [8.0], {"__float__": "Infinity"}, 10**400):
    BAD_ROPES[f"factor {str(bad)[:20]}"] = (
        LLAMA,
        {"rope_scaling": LINEAR | {"factor": bad}},
        "factor" if isinstance(bad, dict) else "factor is",
    )
    BAD_ROPES[f"theta {str(bad)[:20]}"] = (LLAMA, {"rope_theta": bad}, "rope_theta is")


@pytest.mark.parametrize("name", BAD_ROPES)
def test_bad_rope(tmp_path, name):
    base, changes, message = BAD_ROPES[name]
    with pytest.raises(Refusal, match=rf"config.json: .*{message}"):
        read_config(written(tmp_path, base, changes))


# ---- what a family means by what is left out

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}
MANY = SLIDING | {"num_hidden_layers": 30, "hidden_size": 32, "head_dim": 8}
LEFT_OUT = {
    "llama heads": (LLAMA | {"num_key_value_heads": 4}, "num_key_value_heads"),
    "llama": (LLAMA | {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    "mistral heads": (MISTRAL | EIGHT, "num_key_value_heads"),
    "mistral": (MISTRAL, "rope_theta", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    "mixtral theta": (MIXTRAL, "rope_theta"),
    "mixtral eps": (MIXTRAL, "rms_norm_eps"),
    "mixtral experts": (MIXTRAL, "num_local_experts", "num_experts_per_tok"),
    "mixtral window": (MIXTRAL, "sliding_window", "norm_topk_prob"),
    "qwen2 layers": (QWEN2 | MANY, "max_window_layers"),
    "qwen3 layers": (QWEN3 | MANY, "max_window_layers"),
    "qwen3 head_dim": (QWEN3, "head_dim"),
    "qwen3 window": (QWEN3 | SLIDING, "use_sliding_window"),
    "qwen3-moe experts": (QWEN3_MOE, "num_experts", "num_experts_per_tok"),
    "qwen3-moe size": (QWEN3_MOE, "moe_intermediate_size"),
    "qwen3-moe": (QWEN3_MOE | EIGHT, "norm_topk_prob", "num_key_value_heads", "rope_theta"),
    "qwen3-moe window": (QWEN3_MOE | SLIDING, "max_window_layers"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(tmp_path, name):
    config, *names = LEFT_OUT[name]
    assert_like_transformers(write(tmp_path / "m", without(config, *names)))


NULL = {"sliding_window": None}
WINDOWS = {  # a config.json, and the windows of its two layers
    "mistral": (without(MISTRAL, "sliding_window"), [4096, 4096]),
    "mistral null": (MISTRAL | NULL, [None, None]),
    "mistral of a first layer": (MISTRAL | SLIDING, [5, 5]),
    "mistral of types": (
        MISTRAL | SLIDING | {"layer_types": ["full_attention", "sliding_attention"]},
        [5, 5],
    ),
    "mixtral": (without(MIXTRAL, "sliding_window"), [None, None]),
    "qwen2": (without(QWEN2 | SLIDING, "sliding_window"), [None, 4096]),
    "qwen2 null": (QWEN2 | SLIDING | NULL, [None, None]),
    "qwen2 first": (without(QWEN2 | SLIDING, "max_window_layers"), [None, None]),
    "qwen3 types": (QWEN3 | SLIDING | {"layer_types": ["sliding_attention"] * 2}, [5, 5]),
    "qwen3 old types": (QWEN3 | SLIDING | {"layer_types": ["attention"] * 2}, [None, None]),
    "qwen3 unused": (QWEN3 | {"sliding_window": -1}, [None, None]),
    "llama": (LLAMA | SLIDING | {"layer_types": ["sliding_attention"] * 2}, [None, None]),
    "qwen3-moe": (without(QWEN3_MOE | SLIDING, "sliding_window"), [4096, 4096]),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(tmp_path, name):
    config, expected = WINDOWS[name]
    assert read_config(write_config(tmp_path, config)).windows == expected


def test_null_heads_are_as_many_as_there_are(tmp_path):
    for base in (LLAMA, QWEN2, QWEN3):
        config = base | {"num_key_value_heads": None, "head_dim": None}
        found = read_config(write_config(tmp_path, config))
        assert (found.num_key_value_heads, found.head_dim) == (4, 16)


BIASES = {"attention_bias": True, "mlp_bias": True, "qkv_bias": True, "qk_norm": True}
NO_BIASES = dict.fromkeys(BIASES, False)


@pytest.mark.parametrize("said", [BIASES, NO_BIASES], ids=["said", "denied"])
@pytest.mark.parametrize(
    "base", [LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE], ids=lambda base: base["model_type"]
)
def test_biases_are_those_of_the_family(tmp_path, base, said):
    assert_like_transformers(write(tmp_path / "m", base | said))


def test_the_size_of_experts_means_nothing_elsewhere(tmp_path):
    for base in (LLAMA, MIXTRAL):
        config = write_config(tmp_path, base | {"moe_intermediate_size": 32})
        assert read_config(config).intermediate_size == 96


# ---- which files are weights


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "m", LLAMA)


@pytest.fixture
def directory(plain, tmp_path):
    """One whose weights may be spread and renamed."""
    return shutil.copytree(plain, tmp_path / "m")


def noise(path, name):
    """A second set of weights."""
    tensors = load_file(path / "model.safetensors")
    save_file({key: torch.randn_like(t) for key, t in tensors.items()}, path / name)


def shard(path, names, indexed=True):
    """Spread model.safetensors over files of those names."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    spread = {name: {} for name in names}
    for i, (key, tensor) in enumerate(tensors.items()):
        spread[names[i % len(names)]][key] = tensor
    for name, part in spread.items():
        (path / name).parent.mkdir(exist_ok=True)
        save_file(part, path / name)
    if indexed:
        places = {key: name for name, part in spread.items() for key in part}
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def assert_same(path, plain):
    ids = torch.arange(20)
    assert torch.equal(feed_all(load(path), ids), feed_all(load(plain), ids))


TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("name", ["model_old.safetensors", "model-00001-of-00001.safetensors"])
def test_a_second_set_does_not_count(directory, plain, name):
    noise(directory, name)
    assert_like_transformers(directory)
    assert_same(directory, plain)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model_old.safetensors", "model-3.safetensors"]
)
def test_an_index_counts_alone(directory, plain, name):
    noise(directory, "kept")
    shard(directory, TWO)
    (directory / "kept").rename(directory / name)
    assert_same(directory, plain)


def test_shards_without_an_index(directory, plain):
    noise(directory, "model_old.safetensors")
    shard(directory, TWO, indexed=False)
    assert_same(directory, plain)


@pytest.mark.parametrize(
    "names", [["model_fp32.safetensors"], ["model_a.safetensors", "modelb.safetensors"]]
)
def test_other_names(directory, plain, names):
    shard(directory, names, indexed=False)
    assert_same(directory, plain)


def test_folders_within(directory, plain):
    shard(directory, ["part/a.safetensors", "part/b.safetensors"])
    assert_same(directory, plain)


@pytest.mark.parametrize("name", TWO)
def test_a_name_is_read_from_the_file_of_the_index(directory, plain, name):
    """Both hold it."""
    shard(directory, TWO)
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    right = load_file(directory / places[HEAD])[HEAD]
    for file in TWO:
        tensors = load_file(directory / file)
        tensors[HEAD] = right if file == name else torch.randn(128, 64)
        save_file(tensors, directory / file)
    places[HEAD] = name
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    assert_same(directory, plain)


def test_a_name_that_an_index_forgets_is_read(directory, plain):
    shard(directory, TWO)
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    places = without(places, HEAD)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    assert_same(directory, plain)


def test_two_sets_of_shards_are_refused(directory):
    noise(directory, "model-00001-of-00001.safetensors")
    shard(directory, TWO, indexed=False)
    with pytest.raises(Refusal, match="00002.safetensors: tensor .* is in another file too"):
        load(directory)


BAD_INDEXES = {
    "a list": [{"weight_map": {}}],
    "a list within": {"weight_map": ["model.safetensors"]},
    "a number": {"weight_map": {HEAD: 1}},
    "null": {"weight_map": {HEAD: None}},
    "outside": {"weight_map": {HEAD: "../m/model.safetensors"}},
    "up within": {"weight_map": {HEAD: "part/../../m/model.safetensors"}},
    "absolute": {"weight_map": {HEAD: "/m/model.safetensors"}},
}


@pytest.mark.parametrize("index", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_bad_index(directory, index):
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(Refusal, match=f"{INDEX}: .*expected"):
        load(directory)


def test_a_missing_shard_is_named(directory):
    shard(directory, TWO)
    (directory / TWO[1]).unlink()
    with pytest.raises(Refusal, match=f"{TWO[1]}: missing"):
        load(directory)


# ---- what is refused

INT4 = {"mode": "int4", "group_size": 32}
OTHERS = {
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "mlx.*download.py"),
    "mlx twice": (
        {"quantization": {"bits": 8}, "quantization_config": {"group_size": 64, "bits": 8}},
        "mlx",
    ),
    "mlx beside ours": ({"quantization": {"bits": 8}, "quantization_config": INT4}, "mlx"),
    "no method": ({"quantization_config": {"group_size": 64, "bits": 4}}, "'bits': 4"),
    "no mode": ({"quantization_config": {"quant_method": "gpt-exact"}}, "gpt-exact"),
    "another with our mode": ({"quantization_config": {"quant_method": "x"} | INT4}, "x"),
    "a mode of ours to come": ({"quantization_config": {"mode": "int3"}}, "int3.*int4"),
    "text": ({"quantization_config": "int4"}, "quantization_config is 'int4'"),
}
for method in ("fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "modelopt"):
    OTHERS[method] = ({"quantization_config": {"quant_method": method}}, method)
    if method in ("fp8", "gptq", "awq", "compressed-tensors"):
        OTHERS[method] = (OTHERS[method][0], f"{method}; convert it: .*download.py DIR.* --out NEW")


@pytest.mark.parametrize("name", OTHERS)
def test_quantizations_of_others(tmp_path, name):
    changes, message = OTHERS[name]
    path = write_config(tmp_path, LLAMA | changes)
    for read in (read_config, read_shape):
        with pytest.raises(Refusal, match=rf"config.json: .*{message}"):
            read(path)


def test_no_quantization_is_none(tmp_path):
    for none in ({"quantization": None}, {"quantization_config": {}}, {"quantization": {}}):
        assert read_config(write_config(tmp_path, LLAMA | none)).quantization is None


NOTHING = {
    "text for a flag": (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    "text for a bias": (LLAMA, {"attention_bias": "no"}, "attention_bias"),
    "a list for a flag": (QWEN3, {"use_sliding_window": []}, "use_sliding_window"),
    "two for a flag": (QWEN3_MOE, {"norm_topk_prob": 2}, "norm_topk_prob is 2"),
    "text for an end": (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id has '</s>'"),
    "texts for ends": (LLAMA, {"eos_token_id": [2, "3"]}, "eos_token_id has '3'"),
    "true for an end": (LLAMA, {"eos_token_id": True}, "eos_token_id has True"),
    "negative window": (MISTRAL, {"sliding_window": -5}, "sliding_window is -5"),
    "no window": (MIXTRAL, {"sliding_window": 0}, "sliding_window is 0"),
    "text for a window": (
        QWEN2,
        SLIDING | {"sliding_window": "5"},
        "sliding_window is 5, expected an integer",
    ),
    "layers": (QWEN2, {"layer_types": ["full_attention", "conv"]}, "layer_types has 'conv'"),
    "layers of a llama": (LLAMA, {"layer_types": ["mamba"] * 2}, "layer_types has 'mamba'"),
    "too few layers": (QWEN3, {"layer_types": ["full_attention"]}, "layer_types has 1"),
    "text for a layer": (QWEN2, {"max_window_layers": "x"}, "max_window_layers is 'x'"),
    "kv heads": (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads is 3, .* the 4 heads"),
    "more kv heads": (LLAMA, {"num_key_value_heads": 8}, "KV heads"),
    "gelu": (LLAMA, {"hidden_act": "gelu"}, "hidden_act gelu"),
    "per layer": (LLAMA, {"per_layer_config": {"0": {}}}, "per_layer_config"),
    "other weights": (LLAMA, {"transformers_weights": "x.safetensors"}, "transformers_weights"),
    "experts": (MIXTRAL, {"num_local_experts": 10**9}, "num_experts is 1000000000"),
    "size of experts": (QWEN3_MOE, {"moe_intermediate_size": 10**9}, "moe_intermediate_size is"),
}
for bad in (math.inf, -math.inf, math.nan, -1e-6, "1e-6", True, 1e39):
    NOTHING[f"rms_norm_eps {bad}"] = (LLAMA, {"rms_norm_eps": bad}, "rms_norm_eps is")
for size in configuration.SIZES:
    for bad in (0, -1, 64.0, "64", True, 10**9):
        NOTHING[f"{size} {bad!r}"] = (LLAMA, {size: bad}, f"{size} is")


@pytest.mark.parametrize("name", NOTHING)
def test_settings_that_mean_nothing(tmp_path, name):
    base, changes, message = NOTHING[name]
    path = write_config(tmp_path, base | changes)
    with pytest.raises(Refusal, match=f"config.json: .*{message}"):
        read_shape(path)
    with pytest.raises(Refusal, match=message):
        generate.main(["--random_weights", str(path), "--prompt", "3"])


def test_no_epsilon_is_one(tmp_path):
    assert_like_transformers(write(tmp_path / "m", LLAMA | {"rms_norm_eps": 0.0}))


def test_what_means_the_same_is_not_refused(tmp_path):
    """Nor is what the family does not look at."""
    config = LLAMA | {"tie_word_embeddings": 1, "attention_bias": 0, "hidden_act": "swish"}
    config |= {"use_sliding_window": "no", "eos_token_id": [2, None], "sliding_window": "5"}
    found = read_config(write_config(tmp_path, config))
    assert found.tie_word_embeddings is True and found.attention_bias is False


@pytest.mark.parametrize("dense", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}], ids=str)
def test_layers_without_experts_are_named(tmp_path, dense):
    path = write_config(tmp_path, QWEN3_MOE | dense)
    with pytest.raises(Refusal, match=f"{path}: {next(iter(dense))}"):
        generate.main(["--random_weights", str(path), "--prompt", "3"])


LARGE = {
    "vocab_size": 10**8,
    "intermediate_size": 10**7,
    "hidden_size": 10**6,
    "max_position_embeddings": 2 * 10**7,
}


@pytest.mark.parametrize("name", LARGE)
def test_what_no_machine_holds_is_refused_before(tmp_path, name, monkeypatch):
    """With 64 heads of 128, each of them takes more than the memory of this one."""
    monkeypatch.setattr(machine, "randomize", None)
    shape = {"num_attention_heads": 64, "hidden_size": 4096, "head_dim": 128}
    path = write_config(tmp_path, LLAMA | shape | {name: LARGE[name]})
    monkeypatch.setattr(machine, "memory", lambda device: 16e9)
    with pytest.raises(Refusal, match="config.json: .* takes .* GB or more, and cpu has 16 GB"):
        generate.main(["--random_weights", str(path), "--prompt", "3"])


def test_a_checkpoint_is_refused_as_well(directory):
    edit_json(directory / "config.json", lambda raw: raw | {"vocab_size": 10**9})
    with pytest.raises(Refusal, match="vocab_size is 1000000000"):
        generate.main(["--checkpoint_path", str(directory), "--prompt", "3"])
    assert checkpoint.open_tensors(directory)
