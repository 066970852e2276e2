"""A headless Chromium driven over the DevTools protocol: real mouse, real keys, screenshots."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One page. Use as a context manager."""

    def __init__(self, url: str, width: int = 1100, height: int = 820, dark: bool = False) -> None:
        assert CHROMIUM is not None
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        command = [CHROMIUM, *flags, f"--user-data-dir={self._home.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = wait_for(lambda: self._port(), 60, "Chromium's port")
        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        target = json.load(urllib.request.urlopen(request))
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(
            connect(target["webSocketDebuggerUrl"], max_size=None, compression=None)
        )
        self._number = 0
        self.complaints: list[str] = []
        self.call("Runtime.enable")
        self.call("Page.enable")
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()
        self._process.terminate()
        self._process.wait(30)
        self._home.cleanup()

    def _port(self) -> str | None:
        file = Path(self._home.name, "DevToolsActivePort")
        return file.read_text().split()[0] if file.is_file() and file.read_text() else None

    def call(self, method: str, **params: Any) -> Any:
        """One DevTools command; the page's errors and console messages are kept in `complaints`."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("method") == "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(message["params"]["args"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        wait_for(lambda: self.evaluate(f"Boolean({expression})"), seconds, expression)

    def text(self, selector: str) -> str:
        """The text of every element that matches, as a reader sees it."""
        return str(self.evaluate(f"[...document.querySelectorAll({selector!r})].map(e => e.innerText).join('\\n')"))

    def click(self, selector: str) -> None:
        """A mouse click in the middle of the first element that matches."""
        place = "(e => { e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect(); "
        place += f"return [r.x + r.width / 2, r.y + r.height / 2] }})(document.querySelector({selector!r}))"
        x, y = self.evaluate(place)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into the focused field."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """A key by its name: Enter, Escape ..."""
        code = {"Enter": 13, "Escape": 27}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0, **text if kind == "keyDown" else {},
            )  # fmt: skip

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        """The size of the window in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=mobile)

    def screenshot(self, path: Path) -> None:
        """The visible page as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def wait_for(condition: Any, seconds: float, what: str) -> Any:
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value
