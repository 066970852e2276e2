"""DSec: four kinds of sandbox behind one call, with a log that lets a trainer die and come back."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Sandbox": "dsec.sandbox",
    "AsyncSandbox": "dsec.sandbox",
    "register": "dsec.substrates.function",
}
_ERRORS = (
    "DsecError NotFound Timeout Capacity Preempted Diverged OutcomeUnknown StateLost SubstrateUnavailable "
    "CommandFailed Fenced Forbidden QuotaExceeded ImageError InvalidRequest SandboxFailed"
).split()
_RECORDS = (
    "CommandInfo CommandResult EntryInfo FilesystemEvent PtySize SandboxInfo SandboxQuery SnapshotInfo Spec "
    "Stats WriteInfo"
).split()
_HOME |= dict.fromkeys(_RECORDS, "dsec.types")
_HOME |= dict.fromkeys(_ERRORS, "dsec.errors")

__all__ = sorted(_HOME)  # noqa: PLE0605 - the names are data, so that importing the package stays cheap


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsec' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
