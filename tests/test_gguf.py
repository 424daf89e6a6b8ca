"""GGUF files of several families, tokenizers and quantizations: each is written here, converted,
and compared with transformers, with sentencepiece, or with a formula."""

import json
import os

import gguf
import numpy as np
import pytest
import torch
from helpers import load, train_bpe, write_json
from safetensors.torch import load_file
from test_download import run_script, write_value
from test_model import feed_all
from test_tokenizer import as_transformers, check_equal, train_pieces

from scripts import download, gguf_files
from scripts.tokenizer import Tokenizer

DIM, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
CONTEXT = 512
SHAPE = {
    "hidden_size": DIM,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "rms_norm_eps": 2.0**-17,
    "head_dim": HEAD_DIM,
}
NAMES = {  # of Hugging Face -> of GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = {"<|endoftext|>": 3, "<|end|>": 3, "<think>": 4, "[PAD3]": 5}  # and their kinds
KIND = gguf.GGMLQuantizationType


def byte_level_metadata(pre="gpt-2"):
    """Metadata of a vocabulary of bytes and some hundred merges."""
    model = json.loads(train_bpe().to_str())["model"]
    words = [token for token in model["vocab"] if not token.startswith("<|")]
    merges = [" ".join(merge) for merge in model["merges"]]
    tokens = [*SPECIAL, *words]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [SPECIAL.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


TOKENIZER = byte_level_metadata()
VOCAB = len(TOKENIZER["tokenizer.ggml.tokens"])


def metadata(arch, **changed):
    """Those of the tiny model; `changed` by the name without the architecture, "__" for ".", and
    None for what is left out."""
    given = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": DIM,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 2.0**-17,
        "rope.dimension_count": HEAD_DIM,
        "rope.freq_base": 10000.0,
    }
    given |= {key.replace("__", "."): value for key, value in changed.items()}
    return {f"{arch}.{key}": value for key, value in given.items() if value is not None}


def write(path, arch, tensors, meta):
    """A GGUF of tensors, each numpy or numpy and a kind of quantization."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        write_value(writer, key, value)
    for name, tensor in tensors.items():
        values, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_pairs(weight, heads):
    """The order of rows that llama.cpp's converter gives to a Llama: LlamaModel.permute."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model, arch):
    """The weights of a model of transformers, by the names of a GGUF, in float32."""
    found = {}
    for name, weight in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        if stem.startswith("model.layers."):
            new = f"blk.{layer}.{NAMES[rest]}.{kind}"
        else:
            new = f"{NAMES[stem]}.{kind}"
        weight = weight.float().numpy()
        if arch == "llama" and ".attn_q." in new:
            weight = in_pairs(weight, HEADS)
        if arch == "llama" and ".attn_k." in new:
            weight = in_pairs(weight, KV_HEADS)
        if not (new == "output.weight" and model.config.tie_word_embeddings):
            found[new] = weight
    return found


def make(family, **config):
    """A random model of transformers with weights that bfloat16 has, for evaluation in fp32."""
    import transformers

    torch.manual_seed(0)
    settings = SHAPE | {"vocab_size": VOCAB, "tie_word_embeddings": False} | config
    of_family = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(of_family(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms are ones and biases zeros, as they are made
                weight += torch.randn(weight.shape) * 0.2
            weight.copy_(weight.bfloat16().float())
    return model.eval()


def convert(tmp_path, arch, tensors, meta):
    path = write(tmp_path / "in.gguf", arch, tensors, meta)
    download.fetch(tmp_path / "model", str(path))
    return tmp_path / "model"


def logprobs(model, ids):
    """[T, V] in fp32."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def own_logprobs(directory, ids):
    tokens = torch.tensor(ids)
    return feed_all(load(directory)[0], tokens, chunks=(len(ids),)).log_softmax(-1)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
YARN_METADATA = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
YARN_METADATA["rope__scaling__original_context_length"] = 128


def llama3_factors(theta=10000.0):
    """As llama.cpp's converter computes them, in fp32."""
    freqs = 1.0 / theta ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    found = []
    for freq in freqs:
        length = 2 * torch.pi / freq
        smooth = (8192 / length - 1.0) / 3.0
        blended = 1 / ((1 - smooth) / 8.0 + smooth)
        found.append(1.0 if length < 2048 else 8.0 if length > 8192 else blended)
    return torch.tensor(found, dtype=torch.float32).numpy()


IDS = torch.randint(4, 300, (120,), generator=torch.Generator().manual_seed(1)).tolist()
TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
WIDE = {"head_dim": 32}
WIDE_METADATA = dict.fromkeys(["attention__key_length", "attention__value_length"], 32)
WIDE_METADATA["rope__dimension_count"] = 32
WINDOW = {"sliding_window": 17}


def rope(**settings):
    return {"rope_parameters": settings | {"rope_theta": 10000.0}}


# The architecture in a GGUF, the family of transformers with its settings, and metadata.
CASES = {
    "llama": ("llama", "Llama", {}, {}),
    "tied": ("llama", "Llama", TIED, {}),
    "nothing said": (
        "llama",
        "Llama",
        {},
        dict.fromkeys(WIDE_METADATA) | {"rope__freq_base": None},
    ),
    "biases": ("llama", "Llama", BIASES, {"expert_count": 0, "vocab_size": VOCAB}),
    "wide heads": ("llama", "Llama", WIDE, WIDE_METADATA),
    "llama3": ("llama", "Llama", rope(**LLAMA3), {}),
    "linear": (
        "llama",
        "Llama",
        rope(rope_type="linear", factor=8.0),
        {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
    ),
    "llama, yarn": ("llama", "Llama", rope(**YARN), YARN_METADATA),
    "mistral": ("llama", "Mistral", WINDOW, {"attention__sliding_window": 17}),
    "window that is wider": (
        "llama",
        "Mistral",
        {"sliding_window": None},
        {"attention__sliding_window": CONTEXT},
    ),
    "qwen2": ("qwen2", "Qwen2", {}, {}),
    "qwen2, yarn": ("qwen2", "Qwen2", TIED | rope(**YARN), YARN_METADATA),
    "qwen3": ("qwen3", "Qwen3", TIED, {}),
    "qwen3, wide heads": ("qwen3", "Qwen3", WIDE, WIDE_METADATA),
}
WORDS = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}


def worst(directory, model):
    """Of all logprobs of a text, beside a model of transformers."""
    difference = own_logprobs(directory, IDS) - logprobs(model, IDS)
    return difference.abs().max().item()


def converted(tmp_path, case):
    """A directory, and the model of transformers whose weights went into the GGUF."""
    arch, family, config, changed = CASES[case]
    model = make(family, **config)
    tensors = gguf_tensors(model, arch)
    if case == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors()
    meta = metadata(arch, **changed) | byte_level_metadata(WORDS[arch])
    return convert(tmp_path, arch, tensors, meta), model


@pytest.mark.parametrize("case", CASES)
def test_logprobs(tmp_path, case):
    directory, model = converted(tmp_path, case)
    assert worst(directory, model) <= 1e-4
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"][0] == type(model).__name__.replace(
        "Mistral", "Llama" if case == "window that is wider" else "Mistral"
    )
    if case == "llama3":
        assert config["rope_scaling"] == LLAMA3


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_file_alike(tmp_path, arch):
    """Its own conversion of the same GGUF shares nothing with ours: the same bits of each weight.
    It reads the directory, too."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    directory, model = converted(tmp_path, arch)
    path = str(tmp_path / "in.gguf")
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(directory / "model.safetensors")
    assert ours.keys() >= theirs.keys() >= ours.keys() - {"lm_head.weight"}
    for name, weight in theirs.items():
        assert torch.equal(ours[name].float(), weight.float()), name
    auto = AutoModelForCausalLM.from_pretrained
    read_back, info = auto(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert worst(directory, read_back.eval()) <= 1e-4


def test_the_order_of_rows_matters(tmp_path):
    """The control of the comparison: rows of a Llama in the order of a Qwen."""
    model = make("Llama")
    meta = metadata("llama") | TOKENIZER
    directory = convert(tmp_path, "llama", gguf_tensors(model, "qwen2"), meta)
    assert worst(directory, model) > 1e-2


def test_any_factors_of_rope(tmp_path):
    """Such as no Llama 3 has: each pair has its own."""
    model = make("Llama")
    factors = torch.linspace(1.5, 40, HEAD_DIM // 2)
    tensors = gguf_tensors(model, "llama") | {"rope_freqs.weight": factors.numpy()}
    directory = convert(tmp_path, "llama", tensors, metadata("llama") | TOKENIZER)
    assert worst(directory, model) > 1e-2
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / factors
    assert worst(directory, model) <= 1e-4
    from transformers import AutoModelForCausalLM

    read_back = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert worst(directory, read_back) <= 1e-4


def test_factors_of_one_are_none(tmp_path):
    ones = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    tensors = gguf_tensors(make("Llama"), "llama") | ones
    directory = convert(tmp_path, "llama", tensors, metadata("llama") | TOKENIZER)
    assert json.loads((directory / "config.json").read_text())["rope_scaling"] is None


# ---- quantizations


HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
BLOCK = 256  # numbers of one of these


def random_blocks(kind, rows, count, size_of_scale):
    """Bytes of blocks that mean finite numbers: the scales in fp16 are of the size they have."""
    _, size = gguf.GGML_QUANT_SIZES[KIND[kind]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, count, size), np.uint8)
    for place in HALVES[kind]:
        scales = rng.standard_normal((rows, count, 1)) * size_of_scale
        blocks[:, :, place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def quantized(kind, weight, size_of_scale=1e-3):
    """The tensor as the package writes it, or where it cannot, random blocks of the same shape."""
    if kind in HALVES:
        count = weight.shape[1] // BLOCK
        return random_blocks(kind, weight.shape[0], count, size_of_scale), KIND[kind]
    return gguf.quantize(weight, KIND[kind]), KIND[kind]


def of_q4_k(block):
    """256 numbers of 144 bytes, by the formula of ggml-quants.c: eight scales and minima of six
    bits, and codes of four."""
    d, least = block[:4].view(np.float16).astype(np.float32)
    packed, codes = block[4:16].astype(int), block[16:]
    found = []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        part = codes[32 * (j // 2) : 32 * (j // 2) + 32]
        code = part >> 4 if j % 2 else part & 15
        found += [d * np.float32(scale) * np.float32(c) - least * np.float32(minimum) for c in code]
    return np.array(found)


def of_q6_k(block):
    """256 numbers of 210 bytes: sixteen scales of eight bits, and codes of six, less 32."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208]
    scales, d = scales.view(np.int8), block[208:].view(np.float16).astype(np.float32)[0]
    found = np.zeros(BLOCK, np.float32)
    for i in range(BLOCK):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        code = low[64 * half + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        code |= (high[32 * half + place] >> 2 * quarter & 3) << 4
        found[i] = d * np.float32(scales[i // 16]) * np.float32(code - 32)
    return found


FORMULAS = {"Q4_K": of_q4_k, "Q6_K": of_q6_k}


@pytest.mark.parametrize("kind", gguf_files.KINDS)
def test_kinds_of_quantization(tmp_path, kind):
    """What is stored is what gguf makes of the blocks, rounded once; what a formula does, and
    transformers' own code, where it knows the kind."""
    model = make("Llama", intermediate_size=BLOCK)
    tensors = gguf_tensors(model, "llama")
    name = "blk.1.ffn_down.weight"
    blocks, _ = tensors[name] = quantized(kind, tensors[name] + 1 / 3)
    meta = metadata("llama", feed_forward_length=BLOCK) | TOKENIZER
    found = load_file(convert(tmp_path, "llama", tensors, meta) / "model.safetensors")
    expected = torch.tensor(gguf.dequantize(blocks, KIND[kind]))
    assert expected.abs().max() > 0.01
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], expected.bfloat16())
    if kind in FORMULAS:
        size = gguf.GGML_QUANT_SIZES[KIND[kind]][1]
        by_formula = [FORMULAS[kind](block) for block in blocks.reshape(-1, size)]
        by_formula = torch.tensor(np.array(by_formula)).reshape(expected.shape)
        torch.testing.assert_close(by_formula, expected, rtol=1e-6, atol=1e-8)
    from transformers.integrations.gguf import dequant

    if KIND[kind].value in dequant.GGML_BLOCK:
        theirs = dequant.dequantize(torch.tensor(blocks), KIND[kind].value)
        torch.testing.assert_close(theirs.reshape(expected.shape), expected, rtol=1e-6, atol=1e-8)


def test_a_mixture_of_kinds(tmp_path, capsys):
    """As published files have it: most in Q4_K, some in Q6_K, also where rows are put in order.
    The model of transformers gets what gguf makes of them, rounded as ours."""
    size = {"hidden_size": BLOCK, "intermediate_size": BLOCK, "head_dim": 64}
    model = make("Llama", **size)
    tensors = gguf_tensors(model, "llama")
    for name, weight in tensors.items():
        if weight.ndim == 2:
            kind = "Q6_K" if "down" in name or "embd" in name else "Q4_K"
            tensors[name] = quantized(kind, weight, 1e-4)
    lengths = dict.fromkeys(["attention__key_length", "attention__value_length"], 64)
    lengths |= {"rope__dimension_count": 64, "embedding_length": BLOCK}
    meta = metadata("llama", feed_forward_length=BLOCK, **lengths) | TOKENIZER
    directory = convert(tmp_path, "llama", tensors, meta)
    assert "rounding to bfloat16 changes a weight by 0.0" in capsys.readouterr().err
    for name, weight in gguf_tensors(model, "qwen2").items():
        if weight.ndim == 2:
            values = gguf.dequantize(*tensors[name])
            for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
                if part in name:  # undone: the halves of pairs side by side become rows of pairs
                    pairs = values.reshape(heads, -1, 2, BLOCK)
                    values = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1)
            weight[:] = torch.tensor(values).bfloat16().float().numpy().reshape(weight.shape)
    assert worst(directory, model) <= 1e-4


def test_in_parts(tmp_path, monkeypatch):
    """Tensors that are read a few rows at a time are the same; the control is another order."""
    model = make("Llama")
    tensors = gguf_tensors(model, "llama")
    path = write(tmp_path / "in.gguf", "llama", tensors, metadata("llama") | TOKENIZER)
    whole = tmp_path / "whole"
    download.fetch(whole, str(path))
    monkeypatch.setattr(gguf_files, "AT_ONCE", 3 * HEAD_DIM * DIM)
    download.fetch(tmp_path / "parts", str(path))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    stored = load_file(whole / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(stored[name].float(), weight), name
    other = in_pairs(tensors["blk.0.attn_q.weight"], HEADS)
    assert not np.array_equal(stored["model.layers.0.self_attn.q_proj.weight"].float(), other)


def test_the_file_is_that_of_the_package(tmp_path):
    """Byte by byte: what is written by hand is what safetensors writes."""
    from safetensors.torch import save_file

    meta = metadata("qwen3") | TOKENIZER
    tensors = gguf_tensors(make("Qwen3"), "qwen3")
    path = convert(tmp_path, "qwen3", tensors, meta) / "model.safetensors"
    save_file(load_file(path), tmp_path / "theirs", {"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


# ---- tokenizers


NASTY = [
    "",
    " ",
    "   ",
    "hello hello",
    "  two\t\ttabs\n\n lines  ",
    " \n \r\n\r x\u00a0y\u3000z",
    "héllo 你好 🙂 e\u0301 \u212b ｆｕｌｌ ﬁ",
    "def f(x):\n    return x ** 2  # ok!!\n\n",
    "I'll I'LL we'Re 'tis don't",
    "1 12 123 1234 12345678901 3.14 ½ ² ४५६ x1y22",
    "<|end|>a<|endoftext|> <think> b<think>\n<|end|>",
    "[PAD3] <|im_start|> <s> </s> <0x0A> <unk>",
    "👩‍👩‍👧‍👦🇩🇪\ufeff\u200b\u202e",
    "a" * 200 + "!" * 60 + " " * 33 + "b",
    "\x00\x01\x7f\x85",
    "The quick brown fox jumps over the lazy dog",
    "▁under▁ ▁▁x",
    "https://x.y/z?a=b&c=d#e_f-g__h",
]


def write_tokenizer(tmp_path, arch, meta, family=None):
    """A directory with that tokenizer; the model does not matter."""
    model = make(family or arch.title(), vocab_size=len(meta["tokenizer.ggml.tokens"]))
    return convert(tmp_path, arch, gguf_tensors(model, arch), metadata(arch) | meta)


@pytest.mark.parametrize(
    "arch, pre",
    [("llama", "gpt-2"), ("llama", "llama-bpe"), ("llama", "qwen2"), ("qwen3", "qwen2")],
)
def test_ids_of_bytes(tmp_path, arch, pre):
    """Those of transformers, from the same GGUF, which does not bring a text into a normal form as
    a Qwen2Tokenizer does, and from the directory."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    directory = write_tokenizer(tmp_path, arch, byte_level_metadata(pre))
    ours = check_equal(directory, *SPECIAL)
    _, given, _ = theirs.get_gguf_tokenizer(str(tmp_path / "in.gguf"))
    reference, _ = theirs.convert_gguf_tokenizer(arch, given)
    again = AutoTokenizer.from_pretrained(directory)
    for text in NASTY:
        ids = ours.encode(text, bos=False)
        assert ids == again(text, add_special_tokens=False).input_ids, text
        if pre != "qwen2" or text.isascii():
            assert ids == reference.encode(text, add_special_tokens=False).ids, text
    assert ours.encode("a")[: -len(ours.encode("a", bos=False))] == [0] * (pre == "llama-bpe")
    assert ours.encode("x<think>", bos=False)[-1] == 2 and 2 not in ours.hidden
    assert ours.encode("<|end|>", bos=False) == [1] and ours.hidden[1] == "<|end|>"


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_ids_of_qwen(tmp_path, arch):
    """Those of its class, made of the same vocabulary."""
    from transformers import Qwen2Tokenizer

    meta = byte_level_metadata("qwen2")
    ours = Tokenizer(write_tokenizer(tmp_path, arch, meta))
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|end|>")
    theirs.add_tokens(["<think>"])
    for text in NASTY:
        assert ours.encode(text) == theirs(text).input_ids, text
    assert ours.encode("e\u0301") == ours.encode("é")


def test_words_differ_by_their_names(tmp_path):
    """The control of both: digits one by one, three by three or all together."""
    counts = []
    for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm"):
        (tmp_path / pre).mkdir()
        meta = byte_level_metadata(pre)
        meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"], "12", "34", "1234"]
        meta["tokenizer.ggml.token_type"] = [*meta["tokenizer.ggml.token_type"], 1, 1, 1]
        meta["tokenizer.ggml.merges"] = [*meta["tokenizer.ggml.merges"], "1 2", "3 4", "12 34"]
        tokenizer = Tokenizer(write_tokenizer(tmp_path / pre, "llama", meta))
        counts.append(len(tokenizer.encode("1234", bos=False)))
    assert counts == [1, 3, 4, 4]


def test_a_word_that_no_merge_makes(tmp_path):
    """Is one token for Llama 3, and several for others."""
    found = []
    for pre in ("llama-bpe", "gpt-2"):
        (tmp_path / pre).mkdir()
        meta = byte_level_metadata(pre)
        meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"], "qqxz"]
        meta["tokenizer.ggml.token_type"] = [*meta["tokenizer.ggml.token_type"], 1]
        tokenizer = Tokenizer(write_tokenizer(tmp_path / pre, "llama", meta))
        found.append(len(tokenizer.encode("qqxz", bos=False)))
    assert found == [1, 4]


def test_ends(tmp_path):
    """BOS and EOS around a text, where a file says so; all that end a text; several templates."""
    meta = byte_level_metadata("gpt-2") | {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.chat_template": "a {{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "b",
    }
    tokenizer = check_equal(write_tokenizer(tmp_path, "llama", meta), *SPECIAL)
    ids = tokenizer.encode("hi")
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.encode("hi", bos=False) == ids[1:-1]
    assert tokenizer.eos_ids == {0, 1, 2}
    assert tokenizer.template == {"default": "a {{ messages[0].content }}", "tool_use": "b"}


def pieces_metadata(pieces):
    """What llama.cpp's converter makes of a model of sentencepiece."""
    count = range(len(pieces))
    kinds = []
    for i in count:
        kind = 4 if pieces.id_to_piece(i) == "<think>" else 1
        for number, test in ((2, "unknown"), (3, "control"), (5, "unused"), (6, "byte")):
            if getattr(pieces, f"is_{test}")(i):
                kind = number
        kinds.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in count],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in count],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_of_pieces(tmp_path, byte_fallback):
    """Those of a directory with the original model, of transformers from its pieces, and of
    transformers from the GGUF."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    (tmp_path / "original").mkdir()
    options = {"user_defined_symbols": ["<think>"], "control_symbols": ["<|end|>"]}
    pieces = train_pieces(tmp_path / "original", byte_fallback=byte_fallback, **options)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    write_json(tmp_path / "original" / "tokenizer_config.json", settings)
    original = Tokenizer(tmp_path / "original")
    ours = Tokenizer(write_tokenizer(tmp_path, "llama", pieces_metadata(pieces)))
    added = ["<think>", "<|end|>"]
    reference = as_transformers(tmp_path, pieces, {"legacy": False, "add_bos_token": True}, added)
    _, given, _ = theirs.get_gguf_tokenizer(str(tmp_path / "in.gguf"))
    from_gguf, _ = theirs.convert_gguf_tokenizer("llama", given)
    for text in NASTY:
        ids = ours.encode(text)
        assert ids == original.encode(text) == reference(text).input_ids, text
        assert ids[1:] == from_gguf.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids[1:]) == original.decode(ids[1:])
    assert ours.encode("hi")[0] == 1 and ours.eos_ids == {2}
    assert ours.vocab() == original.vocab() and ours.hidden == original.hidden


def test_pieces_without_a_space_first(tmp_path):
    """And without BOS, where a file says so."""
    meta = pieces_metadata(train_pieces(tmp_path))
    with_space = Tokenizer(write_tokenizer(tmp_path, "llama", meta)).encode("fox")
    meta |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    (tmp_path / "other").mkdir()
    without = Tokenizer(write_tokenizer(tmp_path / "other", "llama", meta))
    assert [1, *without.encode(" fox")] == with_space != [1, *without.encode("fox")]


# ---- several files


def split_files(tmp_path, arch="llama", tensors=None, **options):
    """A model in three parts, written by the package."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch, split_max_tensors=9)
    for key, value in (metadata(arch) | TOKENIZER).items():
        write_value(writer, key, value)
    for name, tensor in gguf_tensors(make("Llama"), arch).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path for path in tmp_path.iterdir() if path.suffix == ".gguf")


def test_a_model_in_several_files(tmp_path):
    paths = split_files(tmp_path)
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    download.fetch(tmp_path / "model", str(paths[0]))
    assert worst(tmp_path / "model", make("Llama")) <= 1e-4


BAD_PARTS = {
    "second": (lambda paths: paths[1], "expected the first, called NAME-00001-of-00003.gguf"),
    "renamed": (lambda paths: paths[0].rename(paths[0].with_name("x.gguf")), "expected the first"),
    "missing": (lambda paths: paths[2].unlink() or paths[0], "m-00003-of-00003.gguf is missing"),
    "cut": (lambda paths: os.truncate(paths[2], 5000) or paths[0], "m-00003-of-00003.gguf"),
    "swapped": (
        lambda paths: paths[1].replace(paths[2]) and paths[0],
        "00002-of-00003.gguf is mis",
    ),
    "twice": (
        lambda paths: paths[2].write_bytes(paths[1].read_bytes()) and paths[0],
        "m-00003-of-00003.gguf says that it is (1, 3), expected (2, 3)",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit(tmp_path, monkeypatch, capsys, case):
    spoil, word = BAD_PARTS[case]
    path = spoil(split_files(tmp_path))
    assert_refused(tmp_path, monkeypatch, capsys, path, word)


# ---- what is refused


def assert_refused(tmp_path, monkeypatch, capsys, path, word):
    """One line, and nothing is left."""
    before = sorted(os.listdir(tmp_path))
    status, lines = run_script(monkeypatch, capsys, path, "--out", tmp_path / "out")
    assert (
        status == 2 and [line for line in lines if not line.startswith("converting ")] == lines[-1:]
    )
    assert lines[-1].startswith(f"error: {path}: ") and word in lines[-1], lines
    assert sorted(os.listdir(tmp_path)) == before


OTHER_METADATA = {
    "scale of scores": ("attention.scale", 0.5),
    "scale of logits": ("logit_scale", 0.5),
    "capped": ("final_logit_softcapping", 30.0),
    "half a head turns": ("rope.dimension_count", 8),
    "values of another size": ("attention.value_length", 8),
    "both ways": ("attention.causal", False),
    "experts": ("expert_count", 8),
    "unknown RoPE": ("rope.scaling.type", "longrope"),
    "yarn": ("rope.scaling.yarn_log_multiplier", 0.1),
    "window of a Qwen": ("attention.sliding_window", 17),
    "window": ("attention.sliding_window", -1),
    "heads": ("attention.head_count", 3),
    "no heads": ("attention.head_count", 0),
    "heads of layers": ("attention.head_count_kv", [2, 1]),
    "odd head": ("attention.key_length", 15),
    "epsilon": ("attention.layer_norm_rms_epsilon", float("nan")),
    "base": ("rope.freq_base", float("inf")),
    "context": ("context_length", 2**31),
    "layers": ("block_count", 2**31),
    "fewer layers": ("block_count", 1),
    "rows": ("vocab_size", 7),
    "text": ("embedding_length", "64"),
    "pooling": ("pooling_type", 1),
    "something new": ("attention.temperature_scale", 1.0),
}


@pytest.mark.parametrize("case", OTHER_METADATA)
def test_metadata_that_change_the_model(tmp_path, monkeypatch, capsys, case):
    key, value = OTHER_METADATA[case]
    meta = metadata("qwen3") | TOKENIZER | {f"qwen3.{key}": value}
    if key == "attention.sliding_window" and value < 0:
        meta[f"qwen3.{key}"] = True
    tensors = gguf_tensors(make("Qwen3"), "qwen3")
    path = write(tmp_path / "in.gguf", "qwen3", tensors, meta)
    words = {"layers": "num_hidden_layers", "fewer layers": "tensor blk.1."}
    words |= {"context": "max_position_embeddings"}
    assert_refused(tmp_path, monkeypatch, capsys, path, words.get(case, key))


TOKENIZER_FAULTS = {
    "no tokenizer": ({"model": None}, "tokenizer.ggml.model is None, expected gpt2 or llama"),
    "another": ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "words of nobody": ({"pre": None}, "tokenizer.ggml.pre is None, expected smollm"),
    "other words": ({"pre": "default"}, "tokenizer.ggml.pre is 'default'"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges"),
    "wrong merges": ({"merges": ["x yz"]}, "its tokenizer cannot be read"),
    "three pieces": ({"merges": ["a b c"]}, "other than two pieces"),
    "fewer tokens": ({"tokens": ["a", "b"]}, "tokens has 2 entries"),
    "tokens twice": ({"tokens": ["a"] * VOCAB}, "not different texts"),
    "numbers": ({"tokens": list(range(VOCAB))}, "not different texts"),
    "kinds": ({"token_type": [7] * VOCAB}, "token_type"),
    "fewer kinds": ({"token_type": [1]}, "token_type has 1 entries"),
    "end": ({"eos_token_id": VOCAB}, "eos_token_id"),
    "end as text": ({"eos_token_id": "1"}, "eos_token_id"),
    "no first": ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id is missing"),
    "spaces": ({"add_space_prefix": True}, "add_space_prefix"),
    "normalizer": ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
    "something new": ({"fold_case": True}, "fold_case"),
    "template": ({".chat_template": 7}, "chat_template is no text"),
    "pieces without scores": ({"model": "llama"}, "tokenizer.ggml.scores"),
    "no unknown piece": ({"model": "llama", "scores": [0.0] * VOCAB}, "unknown_token_id"),
    "endless score": (
        {"model": "llama", "scores": [float("nan")] * VOCAB, "unknown_token_id": 9},
        "tokenizer",
    ),
}


@pytest.mark.parametrize("case", TOKENIZER_FAULTS)
def test_a_tokenizer_that_is_none(tmp_path, monkeypatch, capsys, case):
    changes, word = TOKENIZER_FAULTS[case]
    meta = metadata("llama") | TOKENIZER
    for name, value in changes.items():
        key = f"tokenizer{name}" if name.startswith(".") else f"tokenizer.ggml.{name}"
        meta[key] = value
    meta = {key: value for key, value in meta.items() if value is not None}
    tensors = gguf_tensors(make("Llama"), "llama")
    path = write(tmp_path / "in.gguf", "llama", tensors, meta)
    assert_refused(tmp_path, monkeypatch, capsys, path, word)


def test_a_qwen2_with_other_words(tmp_path, monkeypatch, capsys):
    meta = metadata("qwen2") | byte_level_metadata("llama-bpe")
    tensors = gguf_tensors(make("Qwen2"), "qwen2")
    path = write(tmp_path / "in.gguf", "qwen2", tensors, meta)
    assert_refused(tmp_path, monkeypatch, capsys, path, "expected qwen2 of a Qwen2")


def with_nan(tensors):
    name = "blk.0.ffn_up.weight"
    weight = tensors[name].copy()
    weight[3, 5] = np.nan
    return tensors | {name: weight}


def iq4(tensors):
    blocks = np.zeros((DIM, FFN // 32 * 18), np.uint8)
    return tensors | {"blk.0.ffn_down.weight": (blocks, KIND.IQ4_NL)}


ZEROS = np.zeros(HEAD_DIM // 2, np.float32)
TENSOR_FAULTS = {
    "NaN": (with_nan, "blk.0.ffn_up.weight has NaN"),
    "too large": (lambda t: t | {"output_norm.weight": np.full(DIM, 3.4e38, np.float32)}, "large"),
    "kind": (iq4, "blk.0.ffn_down.weight is IQ4_NL, expected F32"),
    "turned": (
        lambda t: t | {"blk.0.ffn_up.weight": t["blk.0.ffn_up.weight"].T.copy()},
        "blk.0.ffn_up.weight is [64, 96], expected [96, 64]",
    ),
    "vector": (lambda t: t | {"token_embd.weight": np.ones(7, np.float32)}, "token_embd.weight"),
    "three dimensions": (
        lambda t: t | {"blk.0.ffn_up.weight": np.ones((2, FFN, DIM), np.float32)},
        "blk.0.ffn_up.weight",
    ),
    "expert": (
        lambda t: t | {"blk.0.ffn_up_exps.weight": np.ones((2, FFN, DIM), np.float32)},
        "blk.0.ffn_up_exps.weight is not expected",
    ),
    "norms of heads": (lambda t: t | {"blk.0.attn_q_norm.weight": ZEROS}, "not expected"),
    "some biases": (lambda t: t | {"blk.0.attn_q.bias": np.ones(DIM, np.float32)}, "is missing"),
    "factors of nothing": (lambda t: t | {"rope_freqs.weight": ZEROS}, "rope_freqs.weight has"),
    "factors": (lambda t: t | {"rope_freqs.weight": ZEROS[:3] + 1}, "rope_freqs.weight is [3]"),
    "half factors": (
        lambda t: t | {"rope_freqs.weight": (ZEROS + 1).astype(np.float16)},
        "rope_freqs.weight is F16",
    ),
    "none": (lambda t: {}, "token_embd.weight"),
}


@pytest.mark.parametrize("case", TENSOR_FAULTS)
def test_tensors_that_do_not_fit(tmp_path, monkeypatch, capsys, case):
    spoil, word = TENSOR_FAULTS[case]
    tensors = spoil(gguf_tensors(make("Llama"), "llama"))
    path = write(tmp_path / "in.gguf", "llama", tensors, metadata("llama") | TOKENIZER)
    assert_refused(tmp_path, monkeypatch, capsys, path, word)


def test_what_is_no_model(tmp_path, monkeypatch, capsys):
    """What sees, an adapter, and another architecture."""
    tensors = {"v.patch_embd.weight": np.ones((4, 4), np.float32)}
    for arch, kind in (("clip", "mmproj"), ("llama", "adapter"), ("gemma3", "model")):
        meta = metadata("llama") | TOKENIZER | {"general.type": kind}
        path = write(tmp_path / f"{kind}.gguf", arch, tensors, meta)
        word = (
            "expected llama or qwen2 or qwen3" if arch != "llama" else "general.type is 'adapter'"
        )
        assert_refused(tmp_path, monkeypatch, capsys, path, word)


def test_another_byte_order(tmp_path, monkeypatch, capsys):
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    for key, value in (metadata("llama") | TOKENIZER).items():
        write_value(writer, key, value)
    for name, tensor in gguf_tensors(make("Llama"), "llama").items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(tmp_path, monkeypatch, capsys, tmp_path / "in.gguf", "byte order")


def test_tensors_in_one_another(tmp_path, monkeypatch, capsys):
    """The second tensor of a file says that it begins where the first does."""
    tensors = gguf_tensors(make("Llama"), "llama")
    path = write(tmp_path / "in.gguf", "llama", tensors, metadata("llama") | TOKENIZER)
    second = list(tensors)[1].encode()
    content = path.read_bytes()
    place = content.index(second) + len(second) + 4 + 8 * tensors[second.decode()].ndim + 4
    path.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    assert_refused(tmp_path, monkeypatch, capsys, path, "begins within another one")
