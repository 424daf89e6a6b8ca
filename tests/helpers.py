"""Tiny checkpoints and other help that several test files share."""

import json
import math
import shutil
import signal

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kernels import FAST
from model import Transformer
from scripts import checkpoint
from scripts.loading import load_weights, read_config, tensor_shapes
from scripts.tokenizer import Tokenizer

CPU = torch.device("cpu")
CONTEXT = 256
SPECIAL = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|stop|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the other dog jumps over the fox.",
    "A prompt is one line of text; the other lines are other prompts, and none knows of another.",
    "héllo wörld, 你好 世界, 🙂 naïve café",
] * 3

has_compiler = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")


def write_json(path, content):
    path.write_text(json.dumps(content))


def train_bpe(bos=False):
    """A byte-level tokenizer of a few hundred tokens, the special ones first; with `bos` it starts
    prompts so."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
        )
    return tokenizer


def write_weights(directory, vocab_size, seed=0, **config):
    """A random Llama of two layers by transformers; weights so large that greedy text does not run
    in circles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**shape | config)).save_pretrained(directory)


def write_checkpoint(directory, bos=False, **config):
    """A tiny checkpoint directory with a byte-level tokenizer and a chat template; returns its
    path."""
    tokenizer = train_bpe(bos)
    write_weights(directory, tokenizer.get_vocab_size(), **config)
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = [SPECIAL.index("<|end|>"), SPECIAL.index("<|stop|>")]
    write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": ends})
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4], "chat_template": CHAT_TEMPLATE}
    write_json(directory / "tokenizer_config.json", settings)
    return directory


def silent(*_):
    """Progress that nobody watches."""


def load(directory, dtype=torch.float32, ops=FAST):
    """Model and tokenizer of a directory."""
    model = Transformer(read_config(directory / "config.json"), ops, CPU, dtype)
    slices = checkpoint.open_weights(directory, tensor_shapes(model))
    load_weights(model, slices, silent)
    return model, Tokenizer(directory)


def random_ids(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), 300, (n,), generator=generator).tolist()


def fits(observed, expected):
    """Pearson's chi-squared test of counts against probabilities. The critical value is the 1 -
    1e-6 quantile, by Wilson and Hilferty's approximation (z = 4.753): a right sampler fails one
    such test in a million, and the draws are the same in every run. A token that cannot come must
    not have come; rare ones (fewer than 5 expected) are pooled."""
    total = sum(observed)
    cells = []
    rare = [0, 0.0]
    for count, probability in zip(observed, expected, strict=True):
        if count and not probability:
            return False
        if probability * total >= 5:
            cells.append((count, probability * total))
        else:
            rare = [rare[0] + count, rare[1] + probability * total]
    if rare[1] > 0:
        cells.append(tuple(rare))
    statistic = sum((found - mean) ** 2 / mean for found, mean in cells)
    df = len(cells) - 1
    if df == 0:
        return statistic <= 1e-9
    z = 4.753
    return statistic <= df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3


def heed_interrupts():
    """Of a process that is about to start: a shell's background jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
