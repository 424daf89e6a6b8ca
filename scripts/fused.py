"""What a checkpoint has as one tensor and a model as several: of Phi-3, queries, keys and values,
and the two halves of a feed-forward network. Each part is cut for ranks, and quantized, alone."""

from pathlib import Path

from scripts.files import Refusal

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Rows:
    """Some rows of a tensor of which nothing is read yet: safetensors' get_slice of them."""

    def __init__(self, whole, start: int, count: int):
        self.whole = whole
        self.start, self.count = start, count

    def get_dtype(self) -> str:
        return self.whole.get_dtype()

    def get_shape(self) -> list[int]:
        return [self.count, *self.whole.get_shape()[1:]]

    def __getitem__(self, index):
        return self.whole[self.start : self.start + self.count][index]


def taken_apart(directory: Path, slices: dict, shapes: dict) -> dict:
    """The tensors of a checkpoint by name, with those that are fused by the names of their parts,
    where a model asks for these in its `shapes`. Raises Refusal for another number of rows."""
    found = dict(slices)
    for name, whole in slices.items():
        prefix, _, kind = name.rpartition(".")
        prefix, _, layer = prefix.rpartition(".")
        parts = [f"{prefix}.{part}.{kind}" for part in PARTS.get(layer, ())]
        if not parts or not shapes.keys() >= set(parts) or slices.keys() & set(parts):
            continue
        counts = [shapes[part][0] for part in parts]
        if whole.get_shape()[:1] != [sum(counts)]:
            expected = f"{' + '.join(map(str, counts))} rows"
            what = f"tensor {name} is {whole.get_dtype()} {whole.get_shape()}"
            raise Refusal(f"{directory}: {what}, expected {expected}")
        del found[name]
        start = 0
        for part, count in zip(parts, counts, strict=True):
            found[part] = Rows(whole, start, count)
            start += count
    return found
