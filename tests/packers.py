"""Weights packed as others publish them, by plain loops and the published descriptions alone. Each
packer is given a float weight [N, K] and returns the tensors by the last word of their names, and
the fp32 weight that they stand for."""

import torch


def words_of(codes, bits, order=None):
    """Integers [R, C] in words of 32 bits along C, I32 [R, ceil(C * bits / 32)]; of each word the
    lowest bits have the code that comes first in the order."""
    count = 32 // bits
    order = order or range(count)
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns // count), dtype=torch.int64)
    for word in range(words.shape[1]):
        for place, i in enumerate(order):
            if word * count + i < columns:
                words[:, word] += codes[:, word * count + i].long() * 2 ** (bits * place)
    return (words - 2**32 * (words >= 2**31)).int()


def group_of(w, group, k):
    """The columns of w that are in a group with column k."""
    return w[:, k // group * group : (k // group + 1) * group]


def rounded(w, bits, group, dtype, zeros):
    """Codes from 0 to 2^bits - 1 [N, K], a scale and a zero of each group [N, K / group] and what
    they stand for. `zeros` says whether a zero is in the middle or where a group needs it."""
    most = 2**bits - 1
    N, K = w.shape
    codes = torch.zeros(N, K, dtype=torch.int64)
    weight = torch.zeros(N, K)
    grid = []
    for k in range(0, K, group):
        part = group_of(w, group, k)
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / most).to(dtype)
        zero = (-low / scale.float()).round().clamp(1, most)
        if zeros == "middle":
            scale = (2 * torch.maximum(-low, high) / most).to(dtype)
            zero = torch.full_like(low, 2 ** (bits - 1))
        for i in range(part.shape[1]):
            code = (part[:, i] / scale.float() + zero).round().clamp(0, most)
            codes[:, k + i] = code.long()
            weight[:, k + i] = (code - zero) * scale.float()
        grid.append((scale, zero.long()))
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*grid, strict=True))
    return codes, scales, zeros, weight


def awq(w, group=64):
    codes, scales, zeros, weight = rounded(w, 4, group, torch.float16, "free")
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": words_of(codes.t(), 4, order), "qzeros": words_of(zeros.t(), 4, order)}
    return tensors | {"scales": scales.t().contiguous()}, weight


def gptq(w, bits=4, group=64, version=1, zeros="free"):
    group = group if group > 0 else w.shape[1]
    codes, scales, zero, weight = rounded(w, bits, group, torch.float16, zeros)
    tensors = {
        "qweight": words_of(codes, bits).t().contiguous(),
        "qzeros": words_of(zero.t() - (1 if version == 1 else 0), bits),
        "scales": scales.t().contiguous(),
        "g_idx": torch.tensor([k // group for k in range(w.shape[1])], dtype=torch.int32),
    }
    return tensors, weight


def packed(w, bits=4, group=64, zeros="middle", dtype=torch.bfloat16):
    """pack-quantized of compressed-tensors, where integers are around 0."""
    group = group or w.shape[1]
    codes, scales, zero, weight = rounded(w, bits, group, dtype, zeros)
    tensors = {
        "weight_packed": words_of(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(w.shape),
    }
    if zeros == "free":
        tensors["weight_zero_point"] = words_of(zero.t(), bits).t().contiguous()
    return tensors, weight


def integers(w, zeros="middle", group=None):
    """int-quantized of compressed-tensors."""
    codes, scales, zero, weight = rounded(w, 8, group or w.shape[1], torch.bfloat16, zeros)
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    if zeros == "free":
        tensors["weight_zero_point"] = (zero - 128).to(torch.int8)
    return tensors, weight


def float8(w, rows=128, columns=128, name="weight_scale_inv", dtype=torch.float32):
    """E4M3, of which 448 is the largest, in blocks; of no size where all is one."""
    N, K = w.shape
    rows, columns = rows or N, columns or K
    codes = torch.zeros(N, K, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(-(-N // rows), -(-K // columns), dtype=dtype)
    weight = torch.zeros(N, K)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = w[block].abs().max() / 448
            scale = scales[i, j].float()
            codes[block] = (w[block] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            weight[block] = codes[block].float() * scale
    return {"weight": codes, name: scales}, weight


def mlx(w, bits=4, group=64, dtype=torch.bfloat16):
    """Affine: a scale, which may be negative, and a bias, the end of a group that is further from
    0."""
    N, K = w.shape
    most = 2**bits - 1
    codes = torch.zeros(N, K, dtype=torch.int64)
    weight = torch.zeros(N, K)
    grid = []
    for k in range(0, K, group):
        part = group_of(w, group, k)
        low, high = part.amin(1), part.amax(1)
        is_low = low.abs() > high.abs()
        scale = ((high - low) / most).clamp(min=1e-7)
        scale = torch.where(is_low, scale, -scale)
        edge = torch.where(is_low, low, high)
        steps = (edge / scale).round()
        scale = torch.where(steps == 0, scale, edge / steps).to(dtype)
        bias = torch.where(steps == 0, 0, edge).to(dtype)
        for i in range(part.shape[1]):
            code = ((part[:, i] - bias.float()) / scale.float()).round().clamp(0, most)
            codes[:, k + i] = code.long()
            weight[:, k + i] = scale.float() * code + bias.float()
        grid.append((scale, bias))
    scales, biases = (torch.stack(parts, dim=1) for parts in zip(*grid, strict=True))
    words = words_of(codes, bits).view(torch.uint32)
    return {"weight": words, "scales": scales, "biases": biases}, weight


def compressed(format, **weights):
    """The quantization_config of compressed-tensors."""
    scheme = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }


def of_int(strategy, bits=4, symmetric=True, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return compressed("pack-quantized", **weights | more)


def of_bytes(format, kind, strategy, symmetric=True, **more):
    weights = {"num_bits": 8, "type": kind, "symmetric": symmetric, "strategy": strategy}
    return compressed(format, **weights | more)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNEL = {"rows": 1, "columns": None, "name": "weight_scale", "dtype": torch.bfloat16}
WHOLE = CHANNEL | {"rows": None}
BLOCK = {"name": "weight_scale", "dtype": torch.bfloat16}
FLOAT, INT = "float-quantized", "int-quantized"

# Of each format: the packer, its options, the settings in config.json and the mode that it becomes.
FORMATS = {
    "awq": (awq, {}, AWQ, "int4"),
    "gptq": (gptq, {}, GPTQ | {"checkpoint_format": "gptq"}, "int4"),
    "gptq_v2": (gptq, {"version": 2}, GPTQ | {"checkpoint_format": "gptq_v2"}, "int4"),
    "gptq of rows": (gptq, {"group": -1}, GPTQ | {"group_size": -1}, "int4"),
    "gptq 8": (gptq, {"bits": 8}, GPTQ | {"bits": 8}, None),
    "gptq 8 of rows": (
        gptq,
        {"bits": 8, "group": -1, "zeros": "middle"},
        GPTQ | {"bits": 8, "group_size": -1, "sym": True},
        "int8",
    ),
    "packed": (packed, {}, of_int("group", group_size=64), "int4"),
    "packed with zeros": (
        packed,
        {"zeros": "free"},
        of_int("group", symmetric=False, group_size=64),
        "int4",
    ),
    "packed of rows": (packed, {"group": None}, of_int("channel"), "int4"),
    "packed 8": (packed, {"bits": 8}, of_int("group", 8, group_size=64), None),
    "packed 8 of rows": (packed, {"bits": 8, "group": None}, of_int("channel", 8), "int8"),
    "integers": (integers, {}, of_bytes(INT, "int", "channel"), "int8"),
    "integers with zeros": (
        integers,
        {"zeros": "free"},
        of_bytes(INT, "int", "channel", False),
        None,
    ),
    "float8 of rows": (float8, CHANNEL, of_bytes(FLOAT, "float", "channel"), None),
    "float8": (float8, WHOLE, of_bytes(FLOAT, "float", "tensor"), None),
    "float8 in blocks": (
        float8,
        BLOCK,
        of_bytes(FLOAT, "float", "block", block_structure=[128, 128]),
        None,
    ),
    "fp8": (float8, {}, FP8, None),
    "mlx": (mlx, {}, {"group_size": 64, "bits": 4}, "int4"),
    "mlx 8": (mlx, {"bits": 8}, {"group_size": 64, "bits": 8}, None),
}
