"""A GGUF file, of one part or several, becomes a checkpoint directory in bfloat16. Its memory is
that of some rows of a tensor."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts import gguf_models, gguf_tokenizers
from scripts.checkpoint import progress
from scripts.files import Refusal, cause, refusing
from scripts.tokenizer import Tokenizer

MOST_PARTS = 5_000_000  # of the metadata of a GGUF, ten times those of a large vocabulary
PART_OF = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
KINDS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
AT_ONCE = 1 << 22  # numbers that are in memory as floats


def convert(path: str, out: Path) -> None:
    """Fill the directory `out` from a GGUF file. Raises Refusal for what it cannot convert."""
    if not Path(path).is_file():
        raise Refusal("no such file, expected a GGUF")
    meta, tensors = open_parts(path)
    wrong = (IndexError, TypeError, AttributeError, ArithmeticError, NotImplementedError)
    try:
        with refusing("its metadata do not fit its architecture", *wrong):
            files, names = plan(meta, tensors)
            print(f"converting {Path(path).name}", file=sys.stderr)
            write_files(files, out)
            check_tokenizer(out)
            pairs = gguf_models.in_pairs(names, files["config.json"]["head_dim"], meta)
            print_rounding(write_weights(tensors, names, pairs, out))
    except KeyError as error:
        raise Refusal(f"{error} is missing or not supported") from error


def plan(meta: dict, tensors: dict) -> tuple[dict[str, dict | bytes], dict[str, str]]:
    """What the files beside the weights hold, by name, and the names of the tensors at Hugging
    Face by those of a GGUF. Raises Refusal, or KeyError for metadata that are missing."""
    gguf_models.architecture(meta)
    shapes = {name: t.shape[::-1].tolist() for name, t in tensors.items()}
    config = gguf_models.model_config(meta, shapes, rope_factors(tensors))
    if gguf_models.ROPE_FACTORS in shapes:
        expected = [config["head_dim"] // 2]
        if shapes[gguf_models.ROPE_FACTORS] != expected:
            found = shapes[gguf_models.ROPE_FACTORS]
            raise Refusal(f"tensor {gguf_models.ROPE_FACTORS} is {found}, expected {expected}")
    names = gguf_models.new_names(config, meta, shapes)
    for name in names:
        if tensors[name].tensor_type.name not in KINDS:
            kind = tensors[name].tensor_type.name
            raise Refusal(f"tensor {name} is {kind}, expected {', '.join(KINDS)}")
    family = gguf_models.architecture(meta)
    files = gguf_tokenizers.tokenizer_files(meta, family, config["vocab_size"])
    config |= files["generation_config.json"]
    return {"config.json": config} | files, names


def rope_factors(tensors: dict) -> list[float] | None:
    """What the periods of RoPE are multiplied by, where a file says it."""
    tensor = tensors.get(gguf_models.ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.tensor_type.name != "F32":
        raise Refusal(f"tensor {tensor.name} is {tensor.tensor_type.name}, expected F32")
    return tensor.data.ravel().tolist()


def open_parts(path: str) -> tuple[dict, dict]:
    """The metadata by key and the tensors by name, of one file or of all parts of a model. Raises
    Refusal for what is no GGUF or ends too early, or a part that is missing."""
    reader, meta = open_gguf(path)
    count = meta.get("split.count", 1)
    readers = [reader]
    if count != 1:
        name = PART_OF.fullmatch(Path(path).name)
        if meta.get("split.no") != 0 or not name or int(name[2]) != 1 or int(name[3]) != count:
            expected = f"expected the first, called NAME-00001-of-{count:05}.gguf"
            raise Refusal(f"it is a part of a model of {count}, {expected}")
        for i in range(1, count):
            readers.append(open_part(Path(path).with_name(part_name(name[1], i, count)), i, count))
    tensors = {}
    for reader in readers:
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise Refusal(f"tensor {tensor.name} is in two parts")
            tensors[tensor.name] = tensor
    if meta.get("split.tensors.count", len(tensors)) != len(tensors):
        expected = meta["split.tensors.count"]
        raise Refusal(f"its parts have {len(tensors)} tensors, expected {expected}")
    return meta, tensors


def part_name(name: str, i: int, count: int) -> str:
    return f"{name}-{i + 1:05}-of-{count:05}.gguf"


def open_part(path: Path, i: int, count: int):
    """A reader of part i, counted from 0."""
    if not path.is_file():
        raise Refusal(f"its part {path.name} is missing")
    with refusing(path.name, ValueError):
        reader, meta = open_gguf(str(path))
    found = (meta.get("split.no"), meta.get("split.count"))
    if found != (i, count):
        raise Refusal(f"{path.name} says that it is {found}, expected {(i, count)}")
    return reader


def open_gguf(path: str) -> tuple:
    """A reader and the metadata by key. Raises Refusal for what is no GGUF or ends too early."""
    import gguf
    import numpy

    class Reader(gguf.GGUFReader):
        parts = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            """At the end of a file the original gives nothing, and would go on for as long as a
            broken number says."""
            self.parts += 1
            end = int(offset) + numpy.dtype(dtype).itemsize * int(count)
            if end > len(self.data) or self.parts > MOST_PARTS:
                raise ValueError("it ends too early or says that it holds too much")
            return super()._get(offset, dtype, count, override_order)

    wrong = (LookupError, TypeError, ValueError, ArithmeticError, RecursionError)
    try:
        reader = Reader(path)
        if reader.byte_order != "I":
            raise ValueError("its numbers are in the byte order of other machines")
        check_places(reader)
        return reader, {key: field.contents() for key, field in reader.fields.items()}
    except wrong as error:
        raise Refusal(f"expected a whole GGUF file: {error}") from error


def check_places(reader) -> None:
    """Raise ValueError where tensors lie in one another, or where none may begin."""
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda t: t.data_offset):
        if tensor.data_offset < end or tensor.data_offset % reader.alignment:
            raise ValueError(f"tensor {tensor.name} begins within another one, or between places")
        end = tensor.data_offset + tensor.n_bytes


def write_files(files: dict[str, dict | bytes], out: Path) -> None:
    for name, content in files.items():
        if isinstance(content, dict):
            content = (json.dumps(content, indent=2) + "\n").encode()
        with refusing(f"{out.name}/{name} cannot be written", OSError):
            (out / name).write_bytes(content)


def check_tokenizer(out: Path) -> None:
    """Raise Refusal where it cannot be read again."""
    try:
        Tokenizer(out)
    except Refusal as error:
        why = cause(error.__cause__ or error)
        raise Refusal(f"its tokenizer cannot be read: {why}") from error


class Rounding:
    """What becomes of numbers that bfloat16 has not."""

    def __init__(self):
        self.worst = 0.0  # change of a number
        self.changes = 0.0  # and their squares, added up
        self.squares = 0.0  # of the numbers themselves

    def add(self, before, after) -> None:
        """Tensors of floats."""
        change = after - before
        self.worst = max(self.worst, change.abs().max().item())
        self.changes += change.square().sum().item()
        self.squares += before.square().sum().item()


def print_rounding(rounding: Rounding) -> None:
    if rounding.worst:
        share = math.sqrt(rounding.changes / rounding.squares)
        what = f"a weight by {rounding.worst:.2g} at most, the root mean square is {share:.2g}"
        print(f"rounding to bfloat16 changes {what} of theirs", file=sys.stderr)


def write_weights(tensors: dict, names: dict, pairs: dict, out: Path) -> Rounding:
    """One file of safetensors, as its package writes it; that would have all tensors in memory.
    `names` are the new ones by the old, `pairs` is that of gguf_models.in_pairs."""
    ordered = sorted((new, name) for name, new in names.items())
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for new, name in ordered:
        start, end = end, end + 2 * tensors[name].n_elements
        shape = tensors[name].shape[::-1].tolist()
        header[new] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    rounding = Rounding()
    path = out / "model.safetensors"
    with refusing(f"{out.name}/{path.name} cannot be written", OSError), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, (_, name) in enumerate(ordered, start=1):
            for part in parts_in_bfloat16(tensors[name], pairs.get(name), rounding):
                file.write(part)
            progress(f"\r{done} of {len(ordered)} tensors", end="")
        progress()
    return rounding


def parts_in_bfloat16(tensor, head_dim: int | None, rounding: Rounding) -> Iterator[bytes]:
    """The bytes of some rows after others, which are put in order if the rows of heads are in
    pairs. Raises Refusal for numbers that are none."""
    import numpy
    import torch

    for rows in some_rows(tensor, head_dim or 1):
        if head_dim:
            rows = hugging_face_rows(rows, head_dim)
        before = torch.from_numpy(numpy.array(rows, numpy.float32))  # own, and as rows are read
        after = before.bfloat16()
        if not after.isfinite().all():
            raise Refusal(f"tensor {tensor.name} has NaN, inf or numbers too large")
        rounding.add(before, after.float())
        yield after.view(torch.int16).numpy().astype("<i2").tobytes()


def some_rows(tensor, unit: int) -> Iterator:
    """Float32 of a tensor: numpy [K], or [N, K] with a multiple of `unit` rows."""
    import gguf

    if tensor.data.ndim == 1:
        yield gguf.dequantize(tensor.data, tensor.tensor_type)
        return
    count = max(AT_ONCE // (int(tensor.shape[0]) * unit), 1) * unit
    for start in range(0, len(tensor.data), count):
        yield gguf.dequantize(tensor.data[start : start + count], tensor.tensor_type)


def hugging_face_rows(weight, head_dim: int):
    """The rows of a query or key projection, numpy [N, K], or its bias, [N], in the order of
    Hugging Face. RoPE turns rows 2i and 2i + 1 of a head together in a GGUF, and there rows i and
    i + head_dim / 2."""
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
