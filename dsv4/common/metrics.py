"""`metrics.jsonl`: one JSON object a line, append-only, the source of every plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4.common.files import atomic_write


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete rows; a last line cut short by a kill is left out."""
    text = Path(path).read_text() if Path(path).exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class MetricsLog:
    """Appends rows to `path`. With `step`, rows after that step are dropped first: a resumed run writes them again."""

    def __init__(self, path: str | Path, step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step is not None and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= step]
            atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        """One row; numbers, strings, lists. NaN and infinity are refused (no JSON reader takes them)."""
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
