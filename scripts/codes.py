"""A quantized weight that somebody else has published: what it is in the checkpoint, in memory, and
as quantize.py has it. The weight [N, K] is (code - zero) * scale, each for a group along K."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.files import Refusal

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Codes:
    """A published weight [N, K] that has been read: (code - zero) * scale, or of MLX code * scale +
    bias, a scale, zero and bias for each `group` inputs [N, K / group]."""

    codes: Tensor  # [N, K] in uint8, int8 or float8, or uint8 [N, K / 2], the low nibble at even k
    group: int
    scale: Tensor
    zero: Tensor | None = None
    bias: Tensor | None = None
    in_pairs: bool = False

    def floats(self, rows: slice = slice(None)) -> Tensor:
        """Some rows in fp32."""
        codes = self.codes[rows]
        codes = (nibbles(codes) if self.in_pairs else codes).float()

        def spread(grid: Tensor) -> Tensor:
            wide = grid[rows].float().repeat_interleave(self.group, dim=1)
            return wide[:, : codes.shape[1]]

        if self.bias is not None:
            return codes * spread(self.scale) + spread(self.bias)
        if self.zero is not None:
            codes -= spread(self.zero)
        return codes * spread(self.scale)

    def int4(self, group: int) -> dict[str, Tensor]:
        """As quantize.py has it, in groups that may be smaller. Raises Refusal where it cannot."""
        scale, zero = self.scale, self.zero
        if self.bias is not None:
            zero = -self.bias.float() / scale.float()
            zero = zero.masked_fill((self.bias == 0) & (scale == 0), 0)
            too_large = zero.abs() >= torch.finfo(torch.float16).max
            if (too_large & self.bias.isfinite()).any():
                raise Refusal("a group has one value, or nearly, which has no zero and scale")
        if scale.dtype == torch.bfloat16 and not (zero == 8).all():
            scale = scale.float()  # else kernels round the value of code 8 as well, even in fp32
        groups = 2 * self.codes.shape[1] // group
        grid = {"scale": scale, "zero": zero if zero.is_floating_point() else zero.half()}
        for kind, tensor in grid.items():
            grid[kind] = tensor.repeat_interleave(self.group // group, dim=1)[:, :groups]
        return {"weight": self.codes} | grid

    def int8(self) -> dict[str, Tensor]:
        """As quantize.py has it, of a weight with a scale a row. Raises Refusal for a zero that is
        not in the middle."""
        codes = self.codes
        if codes.dtype == torch.uint8:
            if self.zero is not None and not (self.zero == 128).all():
                raise Refusal("it has zeros besides 128, though the config says symmetric")
            codes = (codes ^ 128).view(torch.int8)
        return {"weight": codes, "scale": self.scale}


@dataclass(frozen=True)
class Weight:
    """A published weight, of which nothing is read yet; its slices are fp32."""

    shape: tuple[int, int]
    bits: int  # of its codes; of 4 there are two a byte
    group: int  # inputs that share a scale: all of them where it has one a row
    read: Callable[[], Codes]
    symmetric: bool = False  # whether 8 bits are integers around 0

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index) -> Tensor:
        return self.read().floats()[index]

    def fits(self, group: int) -> bool:
        """Whether it is exact as int4 in groups of that size."""
        return self.bits == 4 and self.group % group == 0 and self.shape[1] % group == 0

    def is_int8(self) -> bool:
        """Whether it is exact as int8 with a scale a row."""
        return self.bits == 8 and self.symmetric and self.group >= self.shape[1]


class Layer:
    """The tensors of one layer in a checkpoint, by the last word of their names."""

    def __init__(self, stem: str, slices: dict):
        self.stem, self.slices = stem, slices
        self.taken = set()  # names of what belongs to the format

    def has(self, kind: str) -> bool:
        return f"{self.stem}.{kind}" in self.slices

    def take(self, kind: str, dtypes, *shapes: tuple):
        """A tensor, of which nothing is read yet. Raises Refusal where it is of another dtype or of
        none of the shapes, if there are some."""
        name = f"{self.stem}.{kind}"
        if name not in self.slices:
            raise Refusal(f"tensor {name} is missing")
        found = self.slices[name]
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        fits = shape in shapes if shapes else len(shape) == 2 and 0 not in shape
        if dtype not in dtypes or not fits:
            expected = " or ".join(str(list(shape)) for shape in shapes) or "a matrix"
            what = f"tensor {name} is {dtype} {list(shape)}"
            raise Refusal(f"{what}, expected {' or '.join(dtypes)} {expected}")
        self.taken.add(name)
        return found

    def check_order(self, kind: str, size: int, group: int, needed: bool) -> None:
        """Raise Refusal where inputs are in another order than their groups, or where the tensor
        that says so is needed and missing."""
        if needed or self.has(kind):
            index = self.take(kind, ["I32", "I64"], (size,))[:]
            if not torch.equal(index.long(), torch.arange(size) // group):
                what = f"tensor {self.stem}.{kind} orders inputs by activation (act-order)"
                raise Refusal(f"{what}, expected groups of inputs that are neighbours")


def nibbles(pairs: Tensor) -> Tensor:
    """uint8 [N, K] of two numbers a byte."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def bytes_of(words: Tensor) -> Tensor:
    """Words [R, C] of 32 bits as uint8 [R, 4 * C], the lowest byte first."""
    return words.contiguous().view(torch.uint8)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """The 4 or 8 codes of each word [R, C], the lowest first: uint8 [R, 32 / bits * C]."""
    return nibbles(bytes_of(words)) if bits == 4 else bytes_of(words)


def in_pairs(codes: Tensor) -> Tensor:
    """Two 4-bit codes of [N, K] in each byte [N, K / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def chosen(config: dict, name: str, choices: list, default=None):
    """A setting, which has to be one of those."""
    value = config.get(name, default)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        valid = ", ".join(map(str, choices))
        raise Refusal(f"{name} {value!r} is not supported, choose from {valid}")
    return value


def group_in(config: dict, name: str = "group_size") -> int | None:
    """None for one group a row, which some write as -1."""
    size = config.get(name)
    if size in (None, -1) and not isinstance(size, bool):
        return None
    if type(size) is not int or size < 1:
        raise Refusal(f"{name} is {size!r}, expected an integer > 0, or -1")
    return size
