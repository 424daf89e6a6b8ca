"""How others publish quantized weights: the settings of each format, and what its tensors are."""

from collections.abc import Callable

from torch import Tensor

from scripts.codes import (
    FLOATS,
    Codes,
    Layer,
    Weight,
    bytes_of,
    chosen,
    codes_of,
    group_in,
    in_pairs,
)
from scripts.compressed import block_in, compressed_tensors, in_blocks
from scripts.settings import json_object

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the nibbles of eight rows are
ONES = {4: 0x11111111, 8: 0x01010101}  # a 1 in each code of a word, by bits


def awq(config: dict) -> Callable[[Layer], Weight]:
    """AWQ in the layout of its GEMM kernel: qweight I32 [K, N / 8], eight rows a word in an order
    of their own, qzeros [K / group, N / 8] likewise, scales [K / group, N]."""
    version = config.get("version") or config.get("format") or "gemm"
    chosen({"version": str(version).lower()}, "version", ["gemm"])
    chosen(config, "bits", [4], config.get("w_bit"))
    size = group_in(config)

    def weight(layer: Layer) -> Weight:
        qweight = layer.take("qweight", ["I32"])
        K, words = qweight.get_shape()
        N, group = 8 * words, min(size or K, K)
        qzeros = layer.take("qzeros", ["I32"], (K // group, words))
        scales = layer.take("scales", FLOATS, (K // group, N))

        def read() -> Codes:
            codes = in_rows(qweight[:])
            zero = in_rows(qzeros[:])
            return Codes(in_pairs(codes), group, scales[:].t(), zero, in_pairs=True)

        return Weight((N, K), 4, group, read)

    def in_rows(words: Tensor) -> Tensor:
        """uint8 [N, C] of the codes in words [C, N / 8]."""
        codes = codes_of(words, 4).unflatten(1, (-1, 8))[..., AWQ_ORDER]
        return codes.flatten(1).t()

    return weight


def gptq(config: dict) -> Callable[[Layer], Weight]:
    """GPTQ: qweight I32 [K * bits / 32, N] of inputs that are neighbours, qzeros
    [K / group, N * bits / 32] and scales [K / group, N]. In the format gptq, as against gptq_v2,
    zeros are less by 1, which is added to all of a word at once."""
    name = config.get("checkpoint_format") or config.get("format") or "gptq"
    layout = chosen({"checkpoint_format": name}, "checkpoint_format", ["gptq", "gptq_v2"])
    bits = chosen(config, "bits", [4, 8])
    size = group_in(config)

    def weight(layer: Layer) -> Weight:
        qweight = layer.take("qweight", ["I32"])
        words, N = qweight.get_shape()
        K = 32 // bits * words
        group = min(size or K, K)
        groups = -(-K // group)
        qzeros = layer.take("qzeros", ["I32"], (groups, -(-N * bits // 32)))
        scales = layer.take("scales", FLOATS, (groups, N))
        layer.check_order("g_idx", K, group, bool(config.get("desc_act")))

        def read() -> Codes:
            zeros = qzeros[:] + (ONES[bits] if layout == "gptq" else 0)
            zero = codes_of(zeros, bits).t()[:N]
            codes = bytes_of(qweight[:].t())
            return Codes(codes, group, scales[:].t(), zero, in_pairs=bits == 4)

        return Weight((N, K), bits, group, read, config.get("sym", True) is True)

    return weight


def fp8(config: dict) -> Callable[[Layer], Weight]:
    """FP8 of transformers: weight F8_E4M3 [N, K], weight_scale_inv one of all or [N / rows, K /
    columns] of blocks, by which, whatever it is called, the weight is multiplied."""
    chosen(config, "fmt", ["e4m3", "float8_e4m3fn"], "e4m3")
    block = config.get("weight_block_size") and block_in(config, "weight_block_size")

    def weight(layer: Layer) -> Weight:
        return in_blocks(layer, "F8_E4M3", block, "weight_scale_inv")

    return weight


def mlx(config: dict) -> Callable[[Layer], Weight]:
    """MLX: weight U32 [N, K * bits / 32], scales and biases [N, K / group]; layers may have
    settings of their own, by name."""

    def weight(layer: Layer) -> Weight:
        own = config | json_object(config, layer.stem)
        chosen(own, "mode", ["affine"], "affine")
        bits = chosen(own, "bits", [4, 8])
        size = group_in(own) or 64
        packed = layer.take("weight", ["U32"])
        N, words = packed.get_shape()
        K = 32 // bits * words
        group = min(size, K)
        scales = layer.take("scales", FLOATS, (N, K // group))
        biases = layer.take("biases", FLOATS, (N, K // group))

        def read() -> Codes:
            codes = bytes_of(packed[:])
            return Codes(codes, group, scales[:], bias=biases[:], in_pairs=bits == 4)

        return Weight((N, K), bits, group, read)

    return weight


# By quant_method: the format, and the tensors that only its layers have.
METHODS = {
    "awq": (awq, ["qweight"]),
    "gptq": (gptq, ["qweight"]),
    "compressed-tensors": (compressed_tensors, ["weight_packed", "weight_scale"]),
    "fp8": (fp8, ["weight_scale_inv"]),
    "mlx": (mlx, ["scales"]),
}
