"""The chat page, clicked in a headless Chromium. The network is scripted; server, codec and page are real."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from scripted import running, scripted_service, still

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="calculator">\n<｜DSML｜parameter name="expression" string="true">'
    "12 * (3 + 4)</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
IDLE = "document.querySelector('#go').textContent === 'Send'"


def script(prompt: str) -> str:
    last = prompt.rpartition("<｜User｜>")[2]
    thought = "Easy enough.</think>" if prompt.endswith("<think>") else ""
    if "long" in last:
        return thought + "word " * 500
    if "<tool_result>" in last:
        return thought + "It is " + last.split("<tool_result>")[1].split("</tool_result>")[0] + "."
    if "calculator" in prompt:
        return thought + CALL
    return thought + "**Bold**, `code` and <b>no markup</b>:\n\n```python\nprint(1)\n```\nThe end."


def test_a_conversation(tmp_path: Path) -> None:
    service = scripted_service(script, delay=0.005)
    with running(service) as url, Browser(url) as page:
        page.until("document.title === 'scripted'")
        assert "4,096 tokens of context" in page.text("header")
        page.click(".samples button")
        page.until(f"{IDLE} && document.querySelector('.answer pre')")
        assert page.text(".user") == "What is 47 + 85?"
        assert page.text("summary").startswith("Thought for ") and "Easy enough." not in page.text("main")
        page.click("summary")
        assert page.text("details > div") == "Easy enough."
        assert page.text(".answer").replace("\n\n", "\n") == "Bold, code and <b>no markup</b>:\nprint(1)\nThe end."
        assert page.text(".answer pre code") == "print(1)" and page.text(".answer p b") == "Bold"
        assert " tokens · " in page.text(".foot") and "tokens/s" in page.text(".foot")
        assert "of 4,096 tokens of context used" in page.text("#note")

        page.click("[value=none]")
        page.click("#calculator")
        page.click("#input")
        page.type("first")
        page.press("Enter", shift=True)
        page.type("second")
        page.press("Enter")
        page.until(f"{IDLE} && document.querySelectorAll('.answer').length === 3")
        assert page.evaluate("document.querySelectorAll('.user')[1].innerText") == "first\nsecond"
        assert page.text(".call") == 'calculator {"expression": "12 * (3 + 4)"}\n→ 84'
        assert page.evaluate("[...document.querySelectorAll('.answer')].at(-1).innerText") == "It is 84."
        assert page.evaluate("document.querySelectorAll('summary').length") == 1

        page.type("a long one")
        page.press("Enter")
        page.until("document.querySelector('#go').textContent === 'Stop' && document.body.innerText.includes('word')")
        page.click("#go")
        page.until(f"{IDLE} && document.body.innerText.includes('stopped')")
        before = service.engine.model.steps
        assert still(service) < before + 400, "it does not go on to the five hundredth word"
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000

        page.size(360, 700, mobile=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.click("#clear")
        assert page.evaluate("document.querySelectorAll('.turn').length") == 0
        page.type("hello again")
        page.press("Enter")
        page.until(f"{IDLE} && document.querySelector('.foot')")
        assert page.evaluate("messages.length") == 4  # question, call, result, answer: nothing from before
        assert page.complaints == []


def test_errors_are_shown_and_can_be_retried() -> None:
    with running(scripted_service(script), api_key="sk-page") as url, Browser(url) as page:
        page.type("hello")
        page.press("Enter")
        page.until("document.querySelector('.error')")
        assert "Authentication Fails" in page.text(".error")
        page.click(".error input")
        page.type("sk-page")
        page.click(".error button")
        page.until(f"{IDLE} && document.querySelector('.answer pre')")
        assert page.evaluate("document.querySelectorAll('.error').length") == 0
        page.click("#input")
        page.type("x" * 5000)
        page.press("Enter")
        page.until("document.querySelector('.error')")
        assert "maximum context length is 4096 tokens" in page.text(".error")
