"""Accuracy by task family and effort mode, on contents that training can not have seen.

    python benchmarks/nano_tasks.py models/nano --items 100 --out docs/runs/nano

Greedy decoding in ragged batches. A tool task counts only if the model makes the right call, gets the result from a
real calculator, and then gives the right answer. An answer may take twice the tokens of the reference and 32 more.
Standard errors: of a proportion for each cell; of the paired difference (same items) for high against non-think.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import dsv4
from dsv4.common.console import Progress
from dsv4.common.files import atomic_write
from dsv4.data.tasks import FAMILIES, MODES, Item, calculate, evaluation_items, verify, verify_call
from dsv4.text import parse, render_ids, render_training


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    """Greedy continuations, end-of-sentence left out. Rows of different length run together and leave when done."""
    stops = {tokenizer.eos_id, tokenizer.special["<｜User｜>"]}
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.full((len(prompts), max(lengths)), tokenizer.eos_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    state = model.new_state(batch=len(prompts))
    logits = model.last_logits(ids.to(model.device), state, lengths=lengths)
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    while True:
        chosen = logits[:, : tokenizer.vocab_size].argmax(-1).tolist()
        going = []
        for place, (row, token) in enumerate(zip(active, chosen)):
            if token not in stops:
                answers[row].append(token)
                if len(answers[row]) < limits[row]:
                    going.append(place)
        if not going:
            return answers
        if len(going) < len(active):
            state = state.select(going)
        active = [active[place] for place in going]
        step = torch.tensor([[answers[row][-1]] for row in active], device=model.device)
        logits = model.last_logits(step, state)


def replies(
    model: Any, tokenizer: Any, requests: list[dict[str, Any]], limits: list[int], rows: int, progress: Progress
) -> list[tuple[dict[str, Any], int]]:
    """(parsed reply, tokens spent) for each request; requests of like length share a batch."""
    prompts = [render_ids(request, tokenizer) for request in requests]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), limits[i]))
    found: dict[int, tuple[dict[str, Any], int]] = {}
    for at in range(0, len(order), rows):
        batch = order[at : at + rows]
        for i, answer in zip(
            batch, complete(model, tokenizer, [prompts[i] for i in batch], [limits[i] for i in batch])
        ):
            thinking = requests[i]["thinking"]["type"] == "enabled"
            reply = parse(tokenizer.decode(answer), thinking=thinking, tools="tools" in requests[i])
            found[i] = (reply, len(answer))
        progress.update(len(batch))
    return [found[i] for i in range(len(requests))]


def judge(
    model: Any, tokenizer: Any, items: list[Item], mode: str, rows: int, progress: Progress
) -> list[tuple[bool, int]]:
    """(right, tokens spent) for each item in one mode."""
    requests = [item.request(mode) for item in items]
    limits = [2 * sum(render_training(item.training_request(mode), tokenizer)[1]) + 32 for item in items]
    first = replies(model, tokenizer, requests, limits, rows, progress)
    results = [(verify(item, reply), spent) for item, (reply, spent) in zip(items, first)]
    called = [i for i, item in enumerate(items) if item.call and verify_call(item, first[i][0])]
    follow = []
    for i in called:
        reply = first[i][0]
        call = {"id": "call_0", "type": "function", "function": reply["tool_calls"][0]}
        turn = {"role": "assistant", "content": reply["content"] or "", "tool_calls": [call]}
        if reply["reasoning_content"]:
            turn["reasoning_content"] = reply["reasoning_content"]
        result = calculate(json.loads(call["function"]["arguments"])["expression"])
        messages = [*requests[i]["messages"], turn, {"role": "tool", "tool_call_id": "call_0", "content": result}]
        follow.append(requests[i] | {"messages": messages})
    for i, item in enumerate(items):
        if item.call:  # an answer without the call does not count
            results[i] = (False, results[i][1])
    second = replies(model, tokenizer, follow, [limits[i] for i in called], rows, progress)
    for i, (reply, spent) in zip(called, second):
        results[i] = (verify(items[i], reply), first[i][1] + spent)
    return results


def share(right: list[bool]) -> tuple[float, float]:
    """Proportion and its standard error."""
    p = statistics.mean(right)
    return p, math.sqrt(p * (1 - p) / len(right))


def markdown(report: dict[str, Any]) -> str:
    """The table and the statement on high against non-think."""
    modes = report["modes"]
    lines = [f"| family | {' | '.join(modes)} |", f"|---|{'---|' * len(modes)}"]
    for family, row in (report["families"] | {"**all**": report["all"]}).items():
        cells = [f"{100 * row[m]['accuracy']:.1f} +- {100 * row[m]['standard_error']:.1f} %" for m in modes]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    spent = [f"{report['all'][m]['tokens']:.0f}" for m in modes]
    lines.append(f"| tokens per answer | {' | '.join(spent)} |")
    text = "\n".join(lines) + "\n"
    for mode, gain in report["against_non_think"].items():
        verb = "beats" if gain["difference"] > 2 * gain["standard_error"] else "does not beat"
        text += (
            f"\n{mode} {verb} non-think by two standard errors: difference {100 * gain['difference']:.1f} points, "
            f"standard error {100 * gain['standard_error']:.1f} (paired, {report['items']} items).\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--items", type=int, default=100, help="items per family, levels 1 to 5 in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--rows", type=int, default=64, help="answers in one batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for tasks.json and tasks.md")
    options = parser.parse_args()
    model = dsv4.load(options.model, dtype="auto", device=options.device).eval()
    tokenizer = dsv4.load_tokenizer(options.model)
    items = [item for family in options.families for item in evaluation_items(family, options.items, options.seed)]
    started = time.time()
    results: dict[str, list[tuple[bool, int]]] = {}
    calls = sum(bool(item.call) for item in items)
    for mode in options.modes:
        with Progress(len(items) + calls, mode, "answers") as progress:
            results[mode] = judge(model, tokenizer, items, mode, options.rows, progress)

    def row(chosen: list[int]) -> dict[str, dict[str, float]]:
        cells = {}
        for mode, found in results.items():
            accuracy, error = share([found[i][0] for i in chosen])
            tokens = statistics.mean(found[i][1] for i in chosen)
            cells[mode] = {"accuracy": accuracy, "standard_error": error, "tokens": tokens}
        return cells

    every = range(len(items))
    gains = {}
    for mode in [m for m in options.modes if m != "non-think" and "non-think" in results]:
        pairs = [int(a) - int(b) for (a, _), (b, _) in zip(results[mode], results["non-think"])]
        gains[mode] = {
            "difference": statistics.mean(pairs),
            "standard_error": statistics.stdev(pairs) / math.sqrt(len(pairs)),
        }
    report = {
        "model": options.model.name,
        "items": len(items),
        "seed": options.seed,
        "modes": options.modes,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "seconds": round(time.time() - started, 1),
        "all": row(list(every)),
        "against_non_think": gains,
        "families": {f: row([i for i in every if items[i].family == f]) for f in options.families},
        "levels": {
            f"{f} {level}": row([i for i in every if items[i].family == f and items[i].level == level])
            for f in options.families
            for level in sorted({item.level for item in items if item.family == f})
        },
    }
    text = markdown(report)
    print(text)
    if options.out:
        atomic_write(options.out / "tasks.json", json.dumps(report, indent=1) + "\n")
        atomic_write(options.out / "tasks.md", text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
