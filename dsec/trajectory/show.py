"""Reading a log for people and programs: what happened step by step, whether it is whole, where two runs part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsec.trajectory import key as keys
from dsec.trajectory.log import Branch, Entry, LogReader
from dsec.trajectory.segment import LogCorrupt, limits, scan


def steps(log: LogReader, branch: Branch, results: bool = False) -> Iterator[dict[str, Any]]:
    """One dict per step: step, branch it was recorded in, kind, args, state, attempt, and the result's short fields.

    `state` is "ended", "aborted" or "unknown" (begun, and nobody saw its end). With `results`, outputs are read whole.
    """
    for number, entry in enumerate(branch.entries):
        assert entry.begun
        begin = log.read(entry.begun)[0]
        row = {"step": number, "branch": entry.owner, "kind": entry.kind, "args": begin["args"], "key": entry.key}
        row |= {
            "state": _state(entry),
            "attempt": entry.attempt,
            "idempotent": entry.idempotent,
            "began": begin["time"],
        }
        if entry.ended:
            header, payload = log.read(entry.ended)
            row["seconds"] = round(header["time"] - begin["time"], 6)
            row["result"] = log.decode_result(header, payload) if results else header["result"]
            row["outputs"] = {name: length for name, length, _, _ in header["parts"]}
        yield row


def _state(entry: Entry) -> str:
    return "ended" if entry.ended else "aborted" if entry.aborted else "unknown"


def verify(folder: Path) -> tuple[dict[str, int], list[str]]:
    """(counts, problems): every frame's CRC, then every branch's chain of keys and every blob's digest.

    The chain is computed anew from the recorded arguments, so an altered, missing or foreign step shows.
    """
    counts, problems = {"segments": 0, "frames": 0, "branches": 0, "steps": 0, "blobs": 0, "ignored": 0}, []
    for shard in sorted(path for path in (folder / "shards").glob("*") if path.is_dir()):
        try:
            for path, limit in limits(shard).items():
                found = scan(path, limit)
                counts["segments"] += 1
                counts["frames"] += len(found.frames)
                if found.length > found.end and limit is None:
                    problems.append(f"{path}: a torn tail of {found.length - found.end} bytes (cut at the next start)")
        except LogCorrupt as problem:
            return counts, [*problems, str(problem)]
    with contextlib.closing(LogReader(folder)) as log:
        for trajectory, name in log.names():
            try:
                branch = log.branch(trajectory, name)
                counts["branches"] += 1
                counts["ignored"] += branch.ignored
                problems += _verify_branch(log, branch, counts)
            except LogCorrupt as problem:
                problems.append(f"{trajectory}@{name}: {problem}")
    return counts, problems


def _verify_branch(log: LogReader, branch: Branch, counts: dict[str, int]) -> list[str]:
    problems, previous, spec = [], keys.ROOT, keys.digest(keys.encode(branch.identity))
    for number, entry in enumerate(branch.entries):
        assert entry.begun
        begin = log.read(entry.begun)[0]
        expected = keys.operation_key(
            branch.trajectory, entry.owner, number, begin["kind"], begin["args"], spec, branch.image, previous
        )
        if expected != entry.key:
            problems.append(
                f"{branch.trajectory}@{branch.name}: step {number} does not follow from the steps before it"
            )
        previous = entry.key
        counts["steps"] += entry.owner == branch.name
        if entry.ended:
            header, payload = log.read(entry.ended)
            if header["key"] != entry.key:
                problems.append(f"{branch.trajectory}@{branch.name}: step {number} ends another operation")
            log.decode_result(header, payload)
            counts["blobs"] += sum(blob is not None for *_, blob in header["parts"])
    return problems


def difference(log: LogReader, one: Branch, other: Branch) -> dict[str, Any] | None:
    """The first step in which two branches asked for or got something else; None if one only goes on longer.

    The dict has step, field (dotted; "args..." asked, "result..." got), and what each has.
    """
    specs: tuple[Any, Any] = {"spec": one.identity, "image": one.image}, {"spec": other.identity, "image": other.image}
    if found := keys.first_difference(*specs):
        return {"step": 0, "field": found[0], "one": found[1], "other": found[2]}
    for left, right in zip(steps(log, one, results=True), steps(log, other, results=True)):
        for field in ("kind", "args", "state", "result"):
            values = [_comparable(row.get(field)) for row in (left, right)]
            if found := keys.first_difference(values[0], values[1], field):
                return {"step": left["step"], "field": found[0], "one": found[1], "other": found[2]}
    return None


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if name not in ("duration", "replayed")}
    return keys.canonical(value, b"")
