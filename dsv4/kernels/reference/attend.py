"""Inference attention and the indexer's choice, in pieces of queries whose scratch stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.kernels.reference.select import top_mask

_SCRATCH = 1 << 20  # floats of one piece
_RUN = 64  # queries of one piece at most: together they read their windows' rows, window + 64


def _pieces(tokens: int, per_query: int, most: int) -> Iterator[slice]:
    step = max(min(_SCRATCH // per_query, most), 1)
    return (slice(start, start + step) for start in range(0, tokens, step))


def choose(q: Tensor, weights: Tensor, keys: Tensor, low: Tensor, high: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `dsv4.kernels.choose`."""
    batch, tokens, heads, _ = q.shape
    count = keys.shape[1]
    chosen = torch.zeros(batch, tokens, k, dtype=torch.int32, device=q.device)
    found = torch.zeros(batch, tokens, dtype=torch.int32, device=q.device)
    for b in range(batch):
        if tokens == 1:  # decoding: no masks, the entries it may see are a slice
            start, stop = int(low[b]), int(high[b])
            dots = (q[b, 0] @ keys[b, start:stop].mT).float().relu_()
            found[b, 0] = some = min(stop - start, k)
            chosen[b, 0, :some] = top_mask(torch.mv(dots.T, weights[b, 0]), k).nonzero()[:, 0] + start
            continue
        entry = torch.arange(count, device=q.device)
        for part in _pieces(tokens, heads * count, tokens):
            dots = (q[b, part].flatten(0, 1) @ keys[b].mT).float().relu_().view(-1, heads, count)
            scores = torch.bmm(weights[b, part].unsqueeze(1), dots).squeeze(1)
            hidden = (entry < low[b, part, None]) | (entry >= high[b, part, None])
            picked = top_mask(scores.masked_fill_(hidden, -torch.inf), k) & ~hidden
            row, column = picked.nonzero(as_tuple=True)
            number = picked.sum(-1)
            place = torch.arange(len(row), device=q.device) - (number.cumsum(0) - number)[row]
            chosen[b, part].index_put_((row, place), column.int())
            found[b, part] = number.int()
    return chosen, found


def _decode(
    q: Tensor, near: Tensor, near_from: Tensor, near_to: Tensor, far: Tensor | None,
    low: Tensor | None, high: Tensor | None, picked: tuple[Tensor, Tensor] | None, sink: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """`attend` for one query a sequence: without masks, over exactly the rows that it reads."""
    out, starts, stops = torch.empty_like(q), near_from.flatten().tolist(), near_to.flatten().tolist()
    for b in range(len(q)):
        rows = near[b, starts[b] : stops[b]]
        if far is not None and picked is not None:
            rows = torch.cat((rows, far[b].index_select(0, picked[0][b, 0, : int(picked[1][b])])))
        elif far is not None:
            assert low is not None and high is not None
            rows = torch.cat((rows, far[b, int(low[b]) : int(high[b])]))
        scores = torch.mm(q[b, 0], rows.mT).float().mul_(scale)
        p = torch.softmax(torch.cat((scores, sink.float().unsqueeze(1)), 1), 1)
        torch.mm(p[:, :-1].to(q.dtype), rows, out=out[b, 0])
    return out


def attend(
    q: Tensor, near: Tensor, near_from: Tensor, near_to: Tensor, far: Tensor | None,
    low: Tensor | None, high: Tensor | None, picked: tuple[Tensor, Tensor] | None, sink: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `dsv4.kernels.attend`. Window rows and entries that all queries share go through one product; picked entries
    are gathered, so the cost follows the window and k, not the context."""
    batch, tokens, heads, dim = q.shape
    if tokens == 1:
        return _decode(q, near, near_from, near_to, far, low, high, picked, sink, scale)
    shared = 0 if far is None or picked is not None else far.shape[1]
    own = 0 if picked is None else picked[0].shape[-1]
    out = torch.empty_like(q)
    for b in range(batch):
        for part in _pieces(tokens, heads * (near.shape[1] - tokens + _RUN + shared + own) + own * dim, _RUN):
            queries, first, last = q[b, part], near_from[b, part, None], near_to[b, part, None]
            start, stop = int(first.min()), int(last.max())
            r = torch.arange(start, stop, device=q.device)
            rows, seen = near[b, start:stop], (r >= first) & (r < last)
            if far is not None and picked is None:
                assert low is not None and high is not None
                e = torch.arange(shared, device=q.device)
                rows = torch.cat((rows, far[b]))
                seen = torch.cat((seen, (e >= low[b, part, None]) & (e < high[b, part, None])), 1)
            common = len(rows)
            # [queries, heads, common rows, the sink, own rows]: one array, written by the products where they can
            scores = torch.empty(len(queries), heads, common + 1 + own, device=q.device)
            _product(queries.flatten(0, 1), rows.mT, scores.flatten(0, 1)[:, :common])
            gathered = None
            if far is not None and picked is not None:
                chosen, found = (t[b, part] for t in picked)
                gathered = far[b].index_select(0, chosen.flatten()).view(-1, own, dim)
                scores[..., common + 1 :] = torch.bmm(queries, gathered.mT)
                if int(found.min()) < own:
                    unused = torch.arange(own, device=q.device) >= found[:, None]
                    scores[..., common + 1 :].masked_fill_(unused.unsqueeze(1), -torch.inf)
            scores.mul_(scale)
            hidden = torch.where(seen, 0.0, -torch.inf)  # adding is faster than filling under a mask
            scores[..., :common].add_(hidden.unsqueeze(1))
            scores[..., common] = sink.float()
            p = torch.softmax(scores, -1).to(q.dtype)
            result = (p.flatten(0, 1)[:, :common] @ rows).view(len(queries), heads, dim)
            out[b, part] = result if gathered is None else result + torch.bmm(p[..., common + 1 :], gathered)
    return out


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b into float32 ``out``, whose rows may be part of longer ones."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
