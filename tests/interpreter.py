"""Triton's interpreter with a dot that adds as a GPU does, for where there is none."""

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


def install(set_attribute=setattr):
    """From now on, or as long as a test's monkeypatch.setattr lasts."""
    set_attribute(interpreter.InterpreterBuilder, "create_dot", dot_in_ascending_k)
