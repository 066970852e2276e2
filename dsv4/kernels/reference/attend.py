"""Inference attention and the indexer's choice, in pieces of queries whose scratch stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.kernels.reference.select import top_mask

_SCRATCH = 1 << 21  # floats of one piece


def _pieces(tokens: int, per_query: int) -> Iterator[slice]:
    step = max(_SCRATCH // per_query, 1)
    return (slice(start, start + step) for start in range(0, tokens, step))


def choose(q: Tensor, weights: Tensor, keys: Tensor, low: Tensor, high: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `dsv4.kernels.choose`."""
    batch, tokens, heads, _ = q.shape
    count = keys.shape[1]
    entry = torch.arange(count, device=q.device)
    chosen = torch.zeros(batch, tokens, k, dtype=torch.int32, device=q.device)
    found = torch.zeros(batch, tokens, dtype=torch.int32, device=q.device)
    for b in range(batch):
        if tokens == 1:  # decoding: no masks, the entries it may see are a slice
            start, stop = int(low[b]), int(high[b])
            dots = (q[b, 0] @ keys[b, start:stop].mT).float().relu_()
            found[b, 0] = some = min(stop - start, k)
            chosen[b, 0, :some] = top_mask(weights[b, 0] @ dots, k).nonzero()[:, 0] + start
            continue
        for part in _pieces(tokens, heads * count):
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
    out = torch.empty_like(q)
    for b in range(len(q)):
        rows = near[b, int(near_from[b]) : int(near_to[b])]
        if far is not None and picked is not None:
            rows = torch.cat((rows, far[b].index_select(0, picked[0][b, 0, : int(picked[1][b])])))
        elif far is not None:
            assert low is not None and high is not None
            rows = torch.cat((rows, far[b, int(low[b]) : int(high[b])]))
        scores = (q[b, 0] @ rows.mT).float().mul_(scale)
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
    window = near.shape[1] - tokens + 64  # the rows that 64 queries read
    out = torch.empty_like(q)
    for b in range(batch):
        for part in _pieces(tokens, heads * (window + shared + own) + own * dim):
            queries, first, last = q[b, part], near_from[b, part, None], near_to[b, part, None]
            start, stop = int(first.min()), int(last.max())
            r = torch.arange(start, stop, device=q.device)
            rows, seen = near[b, start:stop], (r >= first) & (r < last)
            if far is not None and picked is None:
                assert low is not None and high is not None
                e = torch.arange(shared, device=q.device)
                rows = torch.cat((rows, far[b]))
                seen = torch.cat((seen, (e >= low[b, part, None]) & (e < high[b, part, None])), 1)
            scores = (queries.flatten(0, 1) @ rows.mT).view(len(queries), heads, -1).float()
            parts = [scores.mul_(scale).masked_fill_(~seen.unsqueeze(1), -torch.inf)]
            parts.append(sink.float().view(-1, 1).expand(len(queries), -1, 1))
            gathered = None
            if far is not None and picked is not None:
                chosen, found = (t[b, part] for t in picked)
                gathered = far[b].index_select(0, chosen.flatten()).view(-1, own, dim)
                scores = torch.bmm(queries, gathered.mT).float().mul_(scale)
                if int(found.min()) < own:
                    unused = torch.arange(own, device=q.device) >= found[:, None]
                    scores.masked_fill_(unused.unsqueeze(1), -torch.inf)
                parts.append(scores)
            p = torch.softmax(torch.cat(parts, -1), -1).to(q.dtype)
            near_p = p[..., : len(rows)].reshape(-1, len(rows))
            result = (near_p @ rows).view(len(queries), heads, dim)
            out[b, part] = result if gathered is None else result + torch.bmm(p[..., len(rows) + 1 :], gathered)
    return out
