"""Have Inductor write the Triton kernels of a block of the model for a card that need not be there,
compile them, and print of each: settings, kernel, kinds of division in its PTX, and how many
multiplications it fuses with an addition. Then, of two op tables, how many kernels a layer
launches, and how many the integer parts of the sampler do.

python tests/compile_inductor.py 80 89 90

The settings are those of the exact table, and the same without what keeps divisions and sums as
eager code has them."""

import contextlib
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from model import Transformer
from scripts import row_kernels, sampler
from scripts.loading import read_config

# With its number: without one, PyTorch would ask for the current device.
CARD = torch.device("cuda:0")
SETTINGS = {
    "architectures": ["Qwen3ForCausalLM"],  # which has norms of queries and keys
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 300,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}

LLAMA = {"architectures": ["LlamaForCausalLM"]}


class Driver:
    """Stands in for the driver of a card, as far as code is only written and compiled."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def like_queries(q, k, v):
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


SCHEMA = "attend_all(Tensor q, Tensor k_cache, Tensor v_cache) -> Tensor"
attend = kernels.opaque(SCHEMA, like_queries)(None)


def like_products(x, shape, dtype):
    return x.new_empty(*x.shape[:-1], *shape, dtype=dtype)


SCHEMA = "product(Tensor x, int[] shape, ScalarType? dtype) -> Tensor"
product = kernels.opaque(SCHEMA, like_products)(None)


class OpaqueOps(kernels.Fast):
    """With ops that have no handle and no mask: the model's own cannot be traced in this way."""

    def attention(self, q, k, v, k_cache, v_cache, pos, rows, scale):
        """Writes to the caches as kernels.write_cache does, which would ask for a card."""
        for new, cache in ((k, k_cache), (v, v_cache)):
            torch.ops.aten.index_put_(cache, [rows, None, pos], new)
        return attend(q, k_cache, v_cache)

    def linear(self, x, packed):
        y = product(x, packed.shape, packed.sum_dtype)
        return y if packed.leaves == 1 else kernels.add_leaves(y.unbind(-2), packed.bias)


class FastOps(OpaqueOps, kernels.Fast):
    pass


class ExactOps(OpaqueOps, kernels.BatchInvariant):
    """With a division, as a fork might have one."""

    def silu_mul(self, gate_up):
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (gate / kernels.sigmoid(gate) * up).to(gate_up.dtype)


class RowOps(OpaqueOps, row_kernels.RowKernels):
    pass


@contextlib.contextmanager
def pretend(arch: int):
    """PyTorch finds a card of that generation, in all else an H100."""

    def properties(device):
        return DeviceProperties("cuda", 0, 132, arch, arch // 10, 65536, 2048, 1024, 32)

    def capability(*device):
        return arch // 10, arch % 10

    triton.runtime.driver.set_active(Driver(arch))
    cuda = {
        "get_device_capability": capability,
        "get_device_properties": properties,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
    }
    with (
        mock.patch.object(DeviceProperties, "create", properties),
        mock.patch.object(CudaInterface, "get_device_properties", properties),
        mock.patch.object(fake_tensor, "init_gpu_context"),  # which would look for the card
        mock.patch.multiple(torch.cuda, **cuda),
    ):
        yield


def trace_block(directory: str, ops: kernels.Fast, settings: dict = SETTINGS):
    """The graph of one block in bfloat16, of three rows, what it is given, and the mode in which
    nothing is computed."""
    path = Path(directory, "config.json")
    path.write_text(json.dumps(settings))
    llama = read_config(path)
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = Transformer(llama, ops, CARD, torch.bfloat16)
        options = {"device": CARD, "dtype": torch.bfloat16}
        for layer in model.loaders:
            layer.load([torch.empty(shape, **options) for shape in layer.shapes.values()])
        D = settings["head_dim"]
        x = torch.empty(3, 1, settings["hidden_size"], device=CARD)
        cos = torch.empty(3, 1, 1, D // 2, device=CARD)
        pos, rows = torch.empty(2, 3, 1, device=CARD, dtype=torch.int64).unbind()
        caches = torch.empty(2, 3, settings["num_key_value_heads"], 512, D, **options).unbind()
        given = [x, pos, cos, torch.empty_like(cos), rows, *caches]

    def block(*given):
        return model.layers[0](*given)

    traced = make_fx(torch.func.functionalize(block), decomposition_table=select_decomp_table())
    with mode, mock.patch("torch.compiler.is_compiling", return_value=True):
        graph = traced(*given)
    with V.set_fake_mode(mode):
        reinplace_inplaceable_ops(FakeTensorUpdater(graph), graph.graph)
    graph.recompile()
    return graph, given, mode


def trace_integers(name: str):
    """The graph of a part of the sampler for three rows of 64 candidates."""
    function = getattr(sampler, name)
    mode = fake_tensor.FakeTensorMode()
    with mode:
        shapes = [(3, 2), (3,), (3, 64)] if name == "noise_words" else [(3, 64)] * 2
        given = [torch.empty(shape, device=CARD, dtype=torch.int64) for shape in shapes]
        if name == "sort_keys":
            given[0] = given[0].int()
        return make_fx(function, decomposition_table=select_decomp_table())(*given), given, mode


def write_kernels(graph, given, mode, options: dict) -> str:
    """The module that Inductor writes for a graph."""
    with config.patch(options), V.set_fake_mode(mode):
        lowering = GraphLowering(graph, example_inputs=given)
        with V.set_graph_handler(lowering), DebugContext():
            lowering.run(*given)
            return lowering.codegen()[0].value


def count_launches(text: str) -> int:
    """Of the module that Inductor writes: its own kernels, and those of the ops that it calls."""
    attention = 2  # every program has a part of the keys, and then the parts are added
    own = len(re.findall(r"^\s+triton_\w+\.run\(", text, re.M))
    called = re.findall(r"^\s+buf\d+ = torch\.ops\.gpt_exact\.(\w+)", text, re.M)
    return own + len(called) + (attention - 1) * called.count("attend_all")


def read_kernels(text: str, directory: str) -> list[tuple]:
    """(function, what Inductor would have Triton know of it) of each kernel in such a module."""
    found = []

    def record(triton_meta, **others):
        def keep(function):
            found.append((function, triton_meta))

        return keep

    recorders = dict.fromkeys(("pointwise", "reduction", "persistent_reduction"), record)
    with (
        mock.patch.multiple(triton_heuristics, **recorders),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        sources = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", text, re.S)
        for i, source in enumerate(sources):
            path = Path(directory, f"kernel{i}.py")  # Triton reads a function's source from there
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(f"kernel{i}", path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return found


def compile_kernel(function, meta: dict, arch: int) -> str:
    """The PTX of a kernel that Inductor wrote."""
    kinds = meta["signature"].values()
    constants = {(i,): 128 for i, kind in enumerate(kinds) if kind == "constexpr"}
    source = ASTSource(function, meta["signature"], constants, meta["configs"][0])
    options = {"num_warps": 4, "enable_fp_fusion": meta["enable_fp_fusion"]}
    return triton.compile(source, GPUTarget("cuda", arch, 32), options).asm["ptx"]


def settings() -> dict[str, dict]:
    exact = kernels.BATCH_INVARIANT.compile_options
    return {
        "exact": exact,
        "without division": {name: x for name, x in exact.items() if "division" not in name},
        "without casts": exact | {"emulate_precision_casts": False},
    }


def main() -> None:
    for arch in map(int, sys.argv[1:]):
        with pretend(arch), tempfile.TemporaryDirectory() as directory:
            traced = trace_block(directory, ExactOps())
            for name, options in settings().items():
                for function, meta in read_kernels(write_kernels(*traced, options), directory):
                    ptx = compile_kernel(function, meta, arch)
                    divisions = ", ".join(sorted(set(re.findall(r"div\.\w+\.f32", ptx))))
                    fused = len(re.findall(r"\bfma\.", ptx))
                    print(arch, name, function.__name__, divisions, fused, sep="|")

            for ops in FastOps(), RowOps(torch.bfloat16):
                traced = trace_block(directory, ops, SETTINGS | LLAMA)
                text = write_kernels(*traced, ops.compile_options)
                print(arch, "launches", type(ops).__name__, "", count_launches(text), sep="|")
            for name in sampler.integer_parts:
                text = write_kernels(*trace_integers(name), {})
                print(arch, "launches", name, "", count_launches(text), sep="|")


if __name__ == "__main__":
    main()
