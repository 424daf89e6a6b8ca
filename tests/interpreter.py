"""Triton's interpreter with a dot that adds as a GPU does, and with arithmetic in bfloat16, for
where there is none."""

import numpy as np
from triton.runtime import interpreter


def number(x):
    """fp32 of what the interpreter holds: it keeps bfloat16 as integers."""
    if x.dtype.name == "bf16":
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def dot_in_ascending_k(self, a, b, acc, *settings):
    """In place of create_dot, which gives a dot to BLAS, where a row's bits depend on its place."""
    a, b = number(a), number(b)
    total = acc.data.copy()
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return interpreter.TensorHandle(total, acc.dtype.scalar)


def rounded(x):
    """Numbers as bfloat16, to nearest, ties to even: as the interpreter keeps them."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    return interpreter.TensorHandle((bits >> 16).astype(np.uint16), interpreter.tl.bfloat16)


def in_bfloat16(original, formula):
    """An operation of the builder, and of bfloat16 a formula in fp64, rounded."""

    def operate(self, *operands):
        if operands[0].dtype.scalar != interpreter.tl.bfloat16:
            return original(self, *operands)
        return rounded(formula(*(number(x).astype(np.float64) for x in operands)))

    return operate


FORMULAS = {
    "create_fadd": np.add,
    "create_fsub": np.subtract,
    "create_fmul": np.multiply,
    "create_fma": lambda x, y, z: x * y + z,
}


def install(set_attribute=setattr):
    """From now on, or as long as a test's monkeypatch.setattr lasts."""
    builder = interpreter.InterpreterBuilder
    set_attribute(builder, "create_dot", dot_in_ascending_k)
    for name, formula in FORMULAS.items():
        set_attribute(builder, name, in_bfloat16(getattr(builder, name), formula))
