"""The fleet page in a real browser, over a real cluster. DSEC_SCREENSHOT=FILE keeps the picture."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from conftest import Cluster

from dsec.api.client import RemoteTransport

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))
from browser import CHROMIUM, Browser

COMMANDS = ("git clone repo", "cat README.md", "sed -i s/teh/the/ README.md", "make test", "echo '<b>done</b>'")
EVIL = "<img src=x onerror=document.title='taken'>"


async def populate(cluster: Cluster) -> None:
    transport = RemoteTransport(cluster.url, cluster.blue)
    spec = {"substrate": "container", "timeout": 1200, "memory": 64, "pids": 16}
    for n in range(5):
        changes = {"trajectory": f"repair/sample-{n}"} if n < 4 else {"trajectory": EVIL}
        box, _ = await transport.call("create", {"spec": spec | changes})
        for command in COMMANDS:
            await transport.call("commands.run", {"id": box["id"], "command": command})
        if n == 3:
            await transport.call("pause", {"id": box["id"]})
    await transport.close()


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_the_fleet_page_shows_what_is_there(cluster: Cluster, tmp_path: Path) -> None:
    asyncio.run(populate(cluster))
    with Browser(cluster.url, width=1280, height=1100) as page:
        assert "administrator" in page.text("#note")
        page.evaluate(
            f"document.querySelector('#key').value = '{cluster.red}'; document.querySelector('#key').oninput()"
        )
        page.until("document.querySelector('#note').className === 'wrong'")
        page.evaluate(
            f"document.querySelector('#key').value = '{cluster.admin}'; document.querySelector('#key').oninput()"
        )
        page.until("document.querySelectorAll('#boxes tr').length === 5")
        assert page.text("#live") == "5" and "1 paused" in page.text("#states") and page.text("#hosts") == "2 of 2"
        assert "ms" in page.text("#lag") or " s" in page.text("#lag")
        page.evaluate("document.querySelectorAll('#boxes tr')[1].click()")
        page.until(f"document.querySelectorAll('#steps tr').length === {len(COMMANDS)}")
        steps = page.text("#steps")
        assert "make test" in steps and "exit 0" in steps and "<b>done</b>" in steps
        assert EVIL in page.text("#boxes") and page.evaluate("document.title") == "DSec fleet"
        page.until("document.querySelectorAll('#plot rect').length >= 5")
        picture = Path(os.environ.get("DSEC_SCREENSHOT", tmp_path / "fleet.png"))
        page.screenshot(picture)
        assert page.complaints == [] and picture.stat().st_size > 10_000
