"""What Prometheus reads."""

from __future__ import annotations

from typing import Any

from dsec.api.service import Service


def line(name: str, value: float, labels: dict[str, str]) -> str:
    """One sample; quotes, backslashes and line breaks in labels are escaped."""
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    quoted = ",".join(f'{key}="{text.translate(escape)}"' for key, text in labels.items())
    return f"{name}{{{quoted}}} {value:g}" if labels else f"{name} {value:g}"


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


async def metrics(service: Service) -> str:
    """Prometheus text: sandboxes by project and state, Edges and their load, starts, refusals, commands, latency."""
    counts = await service._read(service.store.counts)
    edges = await service._read(service.store.edges)
    of = [(edge, {"edge": edge.id}) for edge in edges]
    held = [(count, {"project": project, "state": state}) for (project, state), count in counts.items()]
    starts = [(quantile(service.latencies, part), {"quantile": str(part)}) for part in (0.5, 0.9, 0.99)]
    rows: list[tuple[str, str, str, list[tuple[float, dict[str, str]]]]] = [
        ("dsec_sandboxes", "gauge", "sandboxes in the store", held),  # type: ignore[list-item]
        ("dsec_edge_up", "gauge", "1 while the Edge holds its lease", [(float(edge.up), who) for edge, who in of]),
        ("dsec_edge_slots", "gauge", "sandboxes it may hold", [(edge.capacity.slots, who) for edge, who in of]),
        ("dsec_edge_used", "gauge", "sandboxes it reports", [(used(edge.report, "slots"), who) for edge, who in of]),
        (
            "dsec_edge_rate",
            "gauge",
            "starts a second it takes",
            [(edge.report.get("rate", 0), who) for edge, who in of],
        ),
        ("dsec_waiting", "gauge", "creates that wait for room", [(len(service.control.queue), {})]),
        ("dsec_started_total", "counter", "creates answered with a sandbox", [(service.started, {})]),
        ("dsec_refused_total", "counter", "creates answered with an error", [(service.refused, {})]),
        ("dsec_commands_total", "counter", "commands passed on", [(service.exec, {})]),
        ("dsec_start_seconds", "summary", "create to answer, of the last thousand", starts),
    ]
    text = []
    for name, kind, help_, values in rows:
        text += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]
        text += [line(name, value, labels) for value, labels in values]
    return "\n".join(text) + "\n"


def used(report: Any, name: str) -> float:
    return float(report.get("used", {}).get(name, 0))
