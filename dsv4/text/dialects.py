"""The prompt dialects as data: what one released generation of V4 models expects that another does not.

`v4-preview` is what the April 2026 checkpoints were trained on (their encoding script); `v4-ga` is what the front-end
of Flash-0731 and Pro-0813 sends. The same word, "high" say, gives different prompts, so a dialect must always be
named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"
URL, READ_URL = "<｜extracted_url｜>", "<｜read_url｜>"
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
"""Quick instructions: short side jobs that reuse the KV cache of the conversation (report section 3.4)."""

HIGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
MAX = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
TOOLS = """\n\n## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas\n\n"""
AFTER_TOOLS = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
SCHEMA = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
JSON_OBJECT = (
    "\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
)


@dataclass(frozen=True)
class Dialect:
    """One row of the table.

    effort             text after BOS by level, in thinking mode
    hoist_system       every system message moves to the front, joined by a blank line; else they stay in place
    header_at_answer   `<｜Assistant｜>` belongs to the answer (so it follows a reminder); else it ends the user's turn
    skip_empty         empty user messages add no blank line when consecutive ones merge
    empty_invoke       what stands inside an invoke without parameters
    complete_tools     a tool is always shown as name, description, parameters; else its keys as they were sent
    rust_numbers       numbers as serde_json spells them (1e-7, integers beyond 64 bits as floats); else as Python does
    unsupported        what stands for a content part that is no text
    """

    effort: Mapping[str, str]
    hoist_system: bool
    header_at_answer: bool
    skip_empty: bool
    empty_invoke: str
    complete_tools: bool
    rust_numbers: bool
    unsupported: str


DIALECTS = {
    "v4-preview": Dialect(
        effort={"low": "", "high": "", "max": HIGH},
        hoist_system=False,
        header_at_answer=False,
        skip_empty=False,
        empty_invoke="\n",
        complete_tools=False,
        rust_numbers=False,
        unsupported="[Unsupported {type}]",
    ),
    "v4-ga": Dialect(
        effort={"low": "", "high": HIGH, "max": MAX},
        hoist_system=True,
        header_at_answer=True,
        skip_empty=True,
        empty_invoke="",
        complete_tools=True,
        rust_numbers=True,
        unsupported="[Unsupported Image]",
    ),
}


def get_dialect(name: str) -> Dialect:
    """The row `name`, or a ValueError with the names there are."""
    if name not in DIALECTS:
        raise ValueError(f"prompt dialect {name!r} is none of {', '.join(DIALECTS)}")
    return DIALECTS[name]
