"""The Triton kernels at the shapes of full-size V4-Flash layers, on a CUDA device: right, and how near to its limits?

    python benchmarks/triton_kernels.py --json triton.json

Each kernel is first compared with its plain torch reference on the same device (largest difference relative to the
largest value), then timed as a CUDA graph: median of device times, the L2 cache overwritten before each. Bytes count
every input and output once (of experts only those that some token chose), so caches cannot make a kernel look better
than it is; FLOPs are those of the products. Both stand beside what the device did in the same run: GB/s of a large
copy, FLOP/s of a large bf16 product. The last lines name the date, the device and the versions, which a figure must
carry wherever it is quoted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dsv4 import numerics
from dsv4.kernels import reference
from dsv4.kernels import triton as ours
from dsv4.numerics import Packed

D, INNER, EXPERTS, CHOICES, HEADS, HEAD_DIM, INDEX_HEADS, INDEX_DIM, TOPK, WINDOW, VOCABULARY = (
    4096, 2048, 256, 6, 64, 512, 64, 128, 512, 128, 129280,
)  # fmt: skip
CHECKED = 16  # queries of an attention that are compared with the reference
Result = Tensor | tuple[Tensor, ...]


@dataclass
class Case:
    """One kernel at one shape; ``wanted`` computes what ``run`` should give (or its first queries)."""

    name: str
    run: Callable[[], Result]
    wanted: Callable[[], Result]
    bytes: int
    flops: int


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cuda").to(dtype)


def packed(form: numerics.Format, *shape: int) -> Packed:
    """Random bytes: every code, scales around the size that keeps activations near 1."""
    weight = Packed.empty(shape, form, device="cuda")
    weight.elements.random_(0, 256)
    if form.per_byte == 1:
        weight.elements[(weight.elements & 127) == 127] = 0  # NaN
    weight.scale.random_(118, 121)
    return weight


def size(*parts: Tensor | Packed) -> int:
    tensors = [t for p in parts for t in ((p.elements, p.scale) if isinstance(p, Packed) else (p,))]
    return sum(t.numel() * t.element_size() for t in tensors)


def linears(tokens: int) -> Iterator[Case]:
    for name, out, width in (("wq_a", 1024, D), ("wq_b", HEADS * HEAD_DIM, 1024), ("wo_b", D, 8192)):
        x, w = normal(tokens, width), packed(numerics.FP8, out, width)
        run, wanted = lambda x=x, w=w: ours.linear.packed_linear(x, w), lambda x=x, w=w: numerics.packed_linear(x, w)
        yield Case(f"{name} FP8", run, wanted, size(x, w) + 2 * tokens * out, 2 * tokens * out * width)
    x, w = normal(tokens, 8, D), packed(numerics.FP8, 8 * 1024, D)
    matrices = w.dequantise(torch.bfloat16).view(8, 1024, D)
    yield Case(
        "wo_a FP8, grouped", lambda: ours.linear.grouped_linear(x, w),
        lambda: torch.einsum("mgk,gnk->mgn", x, matrices), size(x, w) + 2 * tokens * 8192, 2 * tokens * 8192 * D,
    )  # fmt: skip


def experts(tokens: int) -> Iterator[Case]:
    for name, form in (("FP4", numerics.FP4), ("FP8", numerics.FP8)):
        w1, w2, w3 = (packed(form, EXPERTS, *s) for s in ((INNER, D), (D, INNER), (INNER, D)))
        x, weights = normal(tokens, D), torch.rand(tokens, CHOICES, device="cuda")
        chosen = torch.rand(tokens, EXPERTS, device="cuda").argsort(1)[:, :CHOICES]
        arguments = (x, chosen, weights, w1, w2, w3, 10.0)
        read = size(w1, w2, w3) * len(chosen.unique()) // EXPERTS
        flops = 2 * tokens * CHOICES * 3 * D * INNER
        run = lambda a=arguments: ours.experts.packed_experts(*a)  # noqa: E731
        yield Case(
            f"experts {name}", run, lambda a=arguments: numerics.packed_experts(*a), read + size(x) * 3, flops
        )  # fmt: skip


def attention(tokens: int) -> Iterator[Case]:
    q, sink = normal(1, tokens, HEADS, HEAD_DIM), normal(HEADS, dtype=torch.float32)
    near = normal(1, tokens + WINDOW, HEAD_DIM)
    last = torch.arange(1, tokens + 1, dtype=torch.int32, device="cuda")[None] + WINDOW
    for context in (4096, 65536):
        entries = context // 4
        far, keys = normal(1, entries, HEAD_DIM), normal(1, entries, INDEX_DIM)
        low = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
        high = torch.full_like(low, entries)
        index, weights = normal(1, tokens, INDEX_HEADS, INDEX_DIM), normal(1, tokens, INDEX_HEADS, dtype=torch.float32)
        choice = (index, weights, keys, low, high, TOPK)
        yield Case(
            f"choose, {context // 1024}k", lambda a=choice: marked(ours.attend.choose(*a)[0], a[2]),
            lambda a=choice: chosen(*a), size(index, weights, keys) + 4 * tokens * TOPK,
            2 * tokens * entries * INDEX_HEADS * INDEX_DIM,
        )  # fmt: skip
        picked = ours.attend.choose(*choice)
        csa = (q, near, last - WINDOW, last, far, low, high, picked, sink, HEAD_DIM**-0.5)
        rows = min(TOPK, entries) + WINDOW
        yield read(f"attend CSA, {context // 1024}k", csa, rows)
        far = normal(1, context // 128, HEAD_DIM)
        high = torch.full_like(low, context // 128)
        hca = (q, near, last - WINDOW, last, far, low, high, None, sink, HEAD_DIM**-0.5)
        yield read(f"attend HCA, {context // 1024}k", hca, context // 128 + WINDOW)


def read(name: str, a: tuple, rows: int) -> Case:
    q, near, far, tokens = a[0], a[1], a[4], a[0].shape[1]
    touched = size(near) + min(size(far), tokens * (rows - WINDOW) * HEAD_DIM * 2)
    flops = 4 * tokens * HEADS * rows * HEAD_DIM
    return Case(name, lambda: ours.attend.attend(*a)[:, :CHECKED], lambda: attended(*a), 2 * size(q) + touched, flops)


def chosen(q: Tensor, weights: Tensor, keys: Tensor, low: Tensor, high: Tensor, k: int) -> Tensor:
    dots = torch.einsum("bthd,bed->bthe", q[:, :CHECKED].float(), keys.float()).relu()
    return marked(torch.einsum("bth,bthe->bte", weights[:, :CHECKED], dots).topk(k).indices, keys)


def marked(indices: Tensor, keys: Tensor) -> Tensor:
    """The first queries' choices as a mask over the entries."""
    indices = indices[:, :CHECKED].long()
    return torch.zeros(*indices.shape[:2], keys.shape[1], dtype=torch.bool, device=keys.device).scatter_(
        2, indices, True
    )


def attended(q, near, first, last, far, low, high, picked, sink, scale) -> Tensor:  # type: ignore[no-untyped-def]
    outputs = []
    for t in range(min(CHECKED, q.shape[1])):
        entries = far[0, picked[0][0, t].long()] if picked is not None else far[0, : high[0, t]]
        rows = torch.cat((near[0, first[0, t] : last[0, t]], entries)).float()
        logits = torch.cat((q[0, t].float() @ rows.T * scale, sink[:, None]), 1)
        outputs.append(torch.softmax(logits, 1)[:, :-1] @ rows)
    return torch.stack(outputs)[None]


def small(tokens: int) -> Iterator[Case]:
    streams, fn = normal(tokens, 4, D), normal(24, 4 * D, dtype=torch.float32) * 0.01
    base, scale = normal(24, dtype=torch.float32), torch.ones(3, device="cuda")
    enter = (streams, fn, base, scale, 20, 1e-6, 1e-6)
    yield Case(
        "hc_enter", lambda: ours.hyper_connections.hc_enter(*enter), lambda: reference.hc_enter(*enter),
        size(streams, fn) + 2 * tokens * D, 2 * tokens * 24 * 4 * D,
    )  # fmt: skip
    y, (_, post, comb) = normal(tokens, D), reference.hc_enter(*enter)
    yield Case(
        "hc_leave", lambda: ours.hyper_connections.hc_leave(streams, y, post, comb),
        lambda: reference.hc_leave(streams, y, post, comb), 2 * size(streams) + size(y), 2 * tokens * 20 * D,
    )  # fmt: skip
    q, weight = normal(tokens, HEADS, HEAD_DIM), normal(D, dtype=torch.float32)
    turns = torch.rand(tokens, 1, 32, device="cuda")
    angles = torch.polar(torch.ones_like(turns), turns)
    rms, rotate = ours.norm.rms_norm, ours.norm.rotate
    yield Case("rms_norm, D", lambda: rms(y, weight, 1e-6), lambda: reference.rms_norm(y, weight, 1e-6), 2 * size(y), 0)
    yield Case("rms_norm, heads", lambda: rms(q, None, 1e-6), lambda: reference.rms_norm(q, None, 1e-6), 2 * size(q), 0)
    yield Case("rotate, heads", lambda: rotate(q, angles), lambda: reference.rotate(q, angles), 2 * size(q), 0)
    kv, gate = (normal(max(tokens // 4, 1), 8, HEAD_DIM, dtype=torch.float32) for _ in range(2))
    pooled = lambda: (torch.softmax(gate, -2) * kv).sum(-2)  # noqa: E731
    yield Case("pool, CSA", lambda: ours.compress.pool(kv, gate), pooled, 2 * size(kv) + size(kv) // 8, 0)
    values, gates = (normal(2 * HEAD_DIM, D) for _ in range(2))
    ape, position = normal(4, 2 * HEAD_DIM, dtype=torch.float32), torch.arange(tokens, device="cuda")[None]
    yield Case(
        "project, CSA", lambda: ours.compress.project(y[None], values, gates, ape, position, HEAD_DIM),
        lambda: reference.project(*(y[None].float() @ w.float().T for w in (values, gates)), ape, position, HEAD_DIM),
        size(y, values, gates) + 16 * tokens * HEAD_DIM, 8 * tokens * HEAD_DIM * D,
    )  # fmt: skip
    row, index = normal(tokens, HEAD_DIM), normal(tokens, INDEX_HEADS, INDEX_DIM)
    yield Case("kv_row", lambda: ours.rows.kv_row(row, 64), lambda: numerics.kv_row(row, 64), 2 * size(row), 0)
    yield Case(
        "index_row, heads", lambda: ours.rows.index_row(index), lambda: numerics.index_row(index), 2 * size(index), 0
    )


def choices(tokens: int) -> Iterator[Case]:
    logits, bias = normal(tokens, EXPERTS, dtype=torch.float32), normal(EXPERTS, dtype=torch.float32)
    router = (logits, bias, None, CHOICES, 1.5)
    moved = 2 * size(logits) + 12 * tokens * CHOICES
    yield Case("route", lambda: ours.route.route(*router), lambda: reference.route(*router), moved, 0)
    rows = min(tokens, 64)  # of a vocabulary each; so many sequences decode together
    draw = torch.rand(rows, dtype=torch.float64, device="cuda")
    for name, temperature, top_p, spread in (
        ("greedy", 0, 1, 4), ("top-p 1", 1, 1, 4), ("top-p 0.95", 1, 0.95, 4), ("top-p 0.95, flat", 1, 0.95, 0.1)
    ):  # fmt: skip
        logits = normal(rows, VOCABULARY, dtype=torch.float32) * spread
        a = (logits, torch.full_like(draw, temperature), torch.full_like(draw, top_p), draw)
        run, wanted = lambda a=a: ours.sample.sample(*a), lambda a=a: reference.sample(*a)
        yield Case(f"sample, {name}", run, wanted, size(logits) + 8 * rows, 0)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as a CUDA graph: its device time without the host's launches, which are longer than small kernels."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median device time; the L2 cache holds other data before each round."""
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds + 3):
        other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])  # the first rounds compile and warm up


def difference(result: Result, wanted: Result) -> float:
    """Of numbers the largest, of choices the share that differs: another order of addition may turn a near-tie."""
    if isinstance(result, Tensor) and isinstance(wanted, Tensor) and wanted.dtype == torch.bool:
        return float((result & ~wanted).sum() / wanted.sum())
    pairs = zip(result, wanted) if isinstance(result, tuple) else [(result, wanted)]
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 2048])
    parser.add_argument("--rounds", type=int, default=20, help="timed repetitions; the median is reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or find_spec("triton") is None:
        sys.exit("no CUDA device with triton here: nothing was measured")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    source, square = torch.empty(1 << 30, dtype=torch.uint8, device="cuda"), normal(8192, 8192)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), arguments.rounds) / 1e9
    product = 2 * 8192**3 / seconds(lambda: square @ square, arguments.rounds) / 1e12
    print(f"copy {copy:.0f} GB/s, bf16 product {product:.0f} TFLOP/s")
    print(
        f"{'kernel':24s} {'tokens':>6s} {'us':>9s} {'torch us':>9s} {'GB/s':>6} {'':>5s} {'TFLOP/s':>8s} {'':>5s} error"
    )
    records = []
    for tokens in arguments.tokens:
        for family in (linears, experts, attention, small, choices):
            for case in family(tokens):
                error = difference(case.run(), case.wanted())
                took, torch_took = seconds(captured(case.run), arguments.rounds), seconds(case.wanted, 3)
                rate, flops = case.bytes / took / 1e9, case.flops / took / 1e12
                print(
                    f"{case.name:24s} {tokens:6d} {took * 1e6:9.1f} {torch_took * 1e6:9.1f} {rate:6.0f} "
                    f"{rate / copy:5.0%} {flops:8.1f} {flops / product:5.0%} {error:.1e}"
                )
                records.append(
                    {"kernel": case.name, "tokens": tokens, "seconds": took, "torch_seconds": torch_took,
                     "gb_s": rate, "tflop_s": flops, "error": error}
                )  # fmt: skip
    import triton

    where = {
        "date": datetime.now(UTC).date().isoformat(), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "copy_gb_s": copy, "bf16_tflop_s": product,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print("(torch us: the plain reference; of choose and attend it computes the first queries only)")
    if arguments.json:
        arguments.json.write_text(json.dumps({**where, "kernels": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
