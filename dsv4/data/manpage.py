"""Manual pages to plain text: enough of roff to read the words, not a typesetter."""

from __future__ import annotations

import re

# Font changes, sizes, zero-width marks, colours and registers vanish; the named characters of prose are spelled.
_VANISH = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d|[&|^%/,:~!?]|[mM]\[[^]]*\]|[nh]'[^']*'|v'[^']*'|\*\(..|\*\[[^]]*\])"
)
_NAMED = {
    "aq": "'", "dq": '"', "lq": '"', "rq": '"', "oq": "'", "cq": "'", "ha": "^", "ti": "~", "em": "--", "en": "-",
    "bu": "*", "co": "(C)", "bv": "|", "rs": "\\", "mi": "-", "pl": "+", "<=": "<=", ">=": ">=", "->": "->",
}  # fmt: skip
_CHARACTER = re.compile(r"\\\((..)|\\\[([^]]+)\]")
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')
_BREAKS = {"PP", "P", "LP", "Pp", "sp", "HP", "RS", "RE", "nf", "fi", "EX", "EE", "Bd", "Ed", "Bl", "El", "TQ", "br"}
_WORDS = {"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "R", "Nm", "Ar", "Pa", "Cm", "Xr", "Em", "Sy", "Va",
          "Dv", "Ev", "Li", "Ql", "Sq", "Dq", "Ic", "Fa", "Fn", "Ft", "Tn", "Nd", "Op", "UR", "MT"}  # fmt: skip


def _inline(text: str) -> str:
    text = _CHARACTER.sub(lambda m: _NAMED.get(m[1] or m[2], ""), _VANISH.sub("", text))
    return text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\'", "'").replace("\\`", "`")


def _arguments(text: str) -> list[str]:
    return [quoted or plain for quoted, plain in _ARGUMENT.findall(text)]


def plain_text(roff: str) -> str:
    """The readable text of a page written in the man or mdoc macros; "" for a page that only includes another."""
    lines: list[str] = []
    bullet = ""  # the mark of a list item, waiting for the item's first line
    ignoring = False  # inside a macro definition (.de ... ..) or an ignored block (.ig ... ..)
    for raw in roff.replace("\\\n", "").splitlines():
        if ignoring:
            ignoring = raw.strip() != ".."
            continue
        if not raw.startswith((".", "'")):
            lines.append(bullet + _inline(raw.split('\\"')[0]))
            bullet = ""
            continue
        macro, _, rest = raw[1:].strip().partition(" ")
        rest = rest.split('\\"')[0].strip()
        if macro in ("de", "ig", "am"):
            ignoring = True
        elif macro == "so":
            return ""
        elif macro in ("TH", "Dt"):
            lines.append("(".join(_arguments(rest)[:2]) + ")")
        elif macro in ("SH", "SS", "Sh", "Ss"):
            lines += ["", _inline(" ".join(_arguments(rest)))]
        elif macro in ("TP", "IP", "It"):
            lines.append("")
            if macro == "IP" and rest:
                rest = _arguments(rest)[0]
            mark = "" if macro == "TP" else _inline(re.sub(r"\bFl ", "-", rest))
            if len(mark) > 2:
                lines.append(mark)
            bullet = mark + " " if 0 < len(mark) <= 2 else ""
        elif macro == "Fl":
            lines.append(_inline("-" + rest))
        elif macro in _WORDS and rest:
            glue = "" if len(macro) == 2 and macro.isupper() and macro != "SM" else " "
            lines.append(_inline(glue.join(_arguments(rest))))
        elif macro in _BREAKS:
            lines.append("")
    text = "\n".join(line.rstrip() for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
