"""Writes chat.png and chat-dark.png: the chat page in the middle of a conversation with a real model.

python tests/e2e/screenshot.py models/nano docs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser import Browser
from scripted import running

from dsv4.server import Service

ASKED = ("What is 47 + 85?", "Which is larger, 9.9 or 9.11?")
CALCULATED = ("What is 38 * 64?", "Compute 512 - 77.")
IDLE = "document.querySelector('#go').textContent === 'Send'"


def main(model: str, folder: str) -> None:
    with running(Service.load(model)) as url:
        for dark in (False, True):
            with Browser(url, width=900, height=840, dark=dark) as page:
                page.until("model.id")
                if dark:
                    page.click("#calculator")
                for turn, text in enumerate(CALCULATED if dark else ASKED):
                    page.click("#input")
                    page.type(text)
                    page.press("Enter")
                    page.until(f"{IDLE} && document.querySelectorAll('.foot').length > {turn}", 300)
                    if turn == 0:
                        page.click("summary")
                page.evaluate("document.querySelector('main').scrollTop = 0")
                page.screenshot(Path(folder, f"chat{'-dark' * dark}.png"))
                assert page.complaints == [], page.complaints


if __name__ == "__main__":
    main(*sys.argv[1:])
