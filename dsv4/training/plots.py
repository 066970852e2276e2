"""The loss curve of a run as a PNG, drawn from its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss (nats per token, smoothed) and held-out bits per byte over tokens, phases shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label in (("lm", "next token"), ("mtp", "token after next (MTP)")):
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
        if points:
            x, y = zip(*points)
            axis.plot(x, smooth(list(y), 20), label=label, linewidth=1)
    for row in rows:
        if row.get("phase_began"):
            axis.axvline(row["tokens"] / 1e6, color="grey", linewidth=0.6, linestyle=":")
            axis.text(row["tokens"] / 1e6, axis.get_ylim()[1], f" {row['phase_began']}", fontsize=7, va="top")
    axis.set(xlabel="million tokens", ylabel="nats per token", title=title)
    held = [(row["tokens"] / 1e6, row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    if held:
        right = axis.twinx()
        right.plot(*zip(*held), "k.-", label="held out", markersize=4, linewidth=0.8)
        right.set_ylabel("held-out bits per byte")
        right.legend(loc="upper right", bbox_to_anchor=(1, 0.85))
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
