"""One simulated run as a picture."""

from __future__ import annotations

from dsec.cluster.simulator import World


def draw(world: World, path: str) -> None:
    """Writes a PNG: sandboxes that run, creates that wait and hosts that answer over virtual time, faults marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times, live, waiting, up = ([sample[n] for sample in world.series] for n in range(4))
    picture = Figure(figsize=(9, 5.2), layout="constrained")
    FigureCanvasAgg(picture)
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(times, live, color="#1f6feb", label="running")
    above.plot(times, waiting, color="#d1742f", label="creates that wait")
    above.axhline(world.slots * world.scene.hosts, color="#999999", linestyle=":", label="what fits")
    above.set_ylabel("sandboxes")
    above.set_ylim(0, world.slots * world.scene.hosts * 1.3)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    above.legend(loc="upper left", frameon=False, ncols=3)
    below.plot(times, up, color="#2d7d46")
    below.set_ylabel("hosts that answer")
    below.set_ylim(0, world.scene.hosts * 1.05)
    below.set_xlabel("virtual seconds")
    for when, name in world.marks:
        for axes in (above, below):
            axes.axvline(when, color="#bbbbbb", linewidth=0.8, zorder=0)
        above.text(when + 3, 0.03, name, transform=above.get_xaxis_transform(), rotation=90, fontsize=7, va="bottom")
    found = ", ".join(f"{name} {n}" for name, n in world.violations.items()) or "no violation"
    picture.suptitle(f"{world.scene.hosts:,} hosts, {world.peak:,} sandboxes at most: {found}", fontsize=10)
    picture.savefig(path, dpi=110)
