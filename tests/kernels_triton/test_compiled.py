"""Every Triton kernel compiles for a GPU at the released shapes, on a machine without one.

Tensors are on the meta device, so that the host code runs in full and nothing is computed; each launch is turned into
machine code for compute capability 9.0 (Hopper) and its shared memory counted. What the interpreter lets pass and the
compiler does not (a name that changes its type, an argument that is 1) is caught here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import numerics
from dsv4.kernels import triton as ours

pytest.importorskip("triton", reason="triton is not installed (script/setup dev installs it on Linux x86-64)")

SHARED_MEMORY = 163 * 1024
"""Bytes a program may use on compute capability 8.0; 9.0 has 227 KiB."""
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
DONE: set[str] = set()
NAMES = (
    "_round _linear _enter _leave _add_up _score _collect _attend _logits _maps _mix _norm _rotate _project _pool "
    "_kv_row _index_row _route _total _odds _likely _sample"
).split()


def test_every_kernel_compiles_for_a_gpu(root: Path, tmp_path: Path) -> None:
    """In a process of its own: here Triton may be the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == set(NAMES)
    assert all(int(shared) <= SHARED_MEMORY for _, shared in lines), done.stdout


def compile_instead(kernel: Any, *args: Any, grid: object, warmup: bool, **keywords: Any) -> None:
    """In place of a launch: one line per kernel, its name and its bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    values = dict(zip(kernel.arg_names, args)) | keywords
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # 1 is compiled in, as a launch does
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    key = str((kernel.fn.__name__, signature, constants, aligned))
    if key in DONE:
        return
    DONE.add(key)
    options = {"num_warps": keywords["num_warps"]} if "num_warps" in keywords else {}
    built = compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.fn.__name__, built.metadata.shared)


def flash(tokens: int) -> None:
    """Every kernel once, as V4-Flash launches it for one token; the largest products also for many."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    def packed(form: numerics.Format, *shapes: tuple[int, ...]) -> list[numerics.Packed]:
        return [numerics.Packed.empty(shape, form, device="meta") for shape in shapes]

    def project(dtype: torch.dtype) -> None:
        x, position, ape = empty(1, tokens, 4096, dtype=dtype), empty(1, tokens, dtype=torch.int64), wide(4, 1024)
        ours.compress.project(x, *(empty(1024, 4096, dtype=dtype) for _ in range(2)), ape, position, 512)

    ours.linear.packed_linear(empty(tokens, 4096), *packed(numerics.FP8_BASE, (1024, 4096)))
    ours.linear.grouped_linear(empty(tokens, 8, 4096), *packed(numerics.FP8, (8192, 4096)))
    ours.linear.linear(wide(tokens, 4096), wide(1024, 4096))
    shapes = ((256, 2048, 4096), (256, 4096, 2048), (256, 2048, 4096))
    routes = empty(tokens, 6, dtype=torch.int64), wide(tokens, 6)
    for form in (numerics.FP4, numerics.FP8_BASE):
        ours.experts.packed_experts(empty(tokens, 4096), *routes, *packed(form, *shapes), 10.0)
    project(torch.bfloat16)
    if tokens > 1:  # only products have other tiles for many rows
        return
    project(torch.float32)
    ours.linear.packed_linear(empty(tokens, 4096), *packed(numerics.FP8, (1024, 4096)))
    ours.experts.routed_experts(empty(tokens, 4096), *routes, *(empty(*shape) for shape in shapes), 10.0)
    low, high = empty(1, tokens, dtype=torch.int64), empty(1, tokens, dtype=torch.int64)
    picked = ours.attend.choose(empty(1, tokens, 64, 128), wide(1, tokens, 64), empty(1, 16384, 128), low, high, 512)
    first, last = empty(1, tokens, dtype=torch.int32), empty(1, tokens, dtype=torch.int32)
    q, near, far, sink = empty(1, tokens, 64, 512), empty(1, tokens + 128, 512), empty(1, 16384, 512), wide(64)
    for rows, chosen in ((None, None), (far, None), (far, picked)):
        ours.attend.attend(q, near, first, last, rows, low, high, chosen, sink, 512**-0.5)
    streams = empty(1, tokens, 4, 4096)
    x, post, comb = ours.hyper_connections.hc_enter(streams, wide(24, 16384), wide(24), wide(3), 20, 1e-6, 1e-6)
    ours.hyper_connections.hc_leave(streams, x, post, comb)
    ours.norm.rms_norm(x, wide(4096), 1e-6)
    ours.norm.rms_norm(q, None, 1e-6)
    ours.norm.rotate(q, empty(1, tokens, 1, 32, dtype=torch.complex64))
    for slots in (8, 128):
        ours.compress.pool(wide(1, tokens, slots, 512), wide(1, tokens, slots, 512))
    for dtype in (torch.float32, torch.bfloat16):
        ours.rows.kv_row(empty(1, tokens, 512, dtype=dtype), 64)
        ours.rows.index_row(empty(1, tokens, 64, 128, dtype=dtype))
    ours.route.route(wide(tokens, 256), wide(256), None, 6, 1.5)
    ours.route.route(wide(tokens, 256), None, empty(tokens, 6, dtype=torch.int64), 6, 1.5)
    ours.sample.sample(wide(tokens, 129280), *(empty(tokens, dtype=torch.float64) for _ in range(3)))


if __name__ == "__main__":
    from triton.runtime.jit import JITFunction

    JITFunction.run = compile_instead
    for count in (1, 2048):
        flash(count)
