"""Every error a user of the sandboxes can meet, and how each crosses a wire: a name, a line of text, its fields.

`to_wire` and `from_wire` are inverse to each other, so an error raised in the Edge is the same class in the SDK.
"""

from __future__ import annotations

from typing import Any


class DsecError(Exception):
    """Base of all errors; keyword fields become attributes and cross the wire (they must be JSON)."""

    status = 500
    """HTTP status the API server answers with."""

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message or type(self).__name__)
        self.message = message
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return from_wire, (to_wire(self),)


class InvalidRequest(DsecError, ValueError):
    """The caller asked for something that has no meaning (names the field and the value)."""

    status = 400


class NotFound(DsecError):
    """No such sandbox, command, file or image."""

    status = 404


class Timeout(DsecError, TimeoutError):
    """A command or a sandbox ran past its time; its processes are dead."""

    status = 408


class Capacity(DsecError):
    """The host or the cluster is full; trying again later may work."""

    status = 503


class Preempted(DsecError):
    """The sandbox was taken away for a more important one."""

    status = 410


class Diverged(DsecError):
    """A resumed program asked for something else than the log holds. Fields: step, expected, got, field."""

    status = 409
    step: int
    expected: Any
    got: Any
    field: str


class OutcomeUnknown(DsecError):
    """A command was begun and nobody saw its end; it may or may not have had its effect. Field: step."""

    status = 409
    step: int


class StateLost(DsecError):
    """The log has results but the sandbox's files are gone, so a new command cannot run. Field: step."""

    status = 410
    step: int


class SubstrateUnavailable(DsecError):
    """This host cannot run that kind of sandbox. Fields: reason, fix (what to install or set)."""

    status = 501
    reason: str
    fix: str


class CommandFailed(DsecError):
    """A command ended with a non-zero exit code and check was on. Field: result, a CommandResult."""

    status = 200

    def __init__(self, result: Any = None, message: str = "", **fields: Any) -> None:
        from dsec.types import CommandResult

        self.result = CommandResult(**result) if isinstance(result, dict) else result
        text = message or f"exit code {self.result.exit_code}: {(self.result.stderr or self.result.stdout)[-500:]}"
        super().__init__(text, result=self.result.as_dict(), **fields)
        self.result = CommandResult(**self.fields["result"])


class SandboxFailed(DsecError):
    """The sandbox broke (its agent died or lied) and was destroyed."""

    status = 410


class Fenced(DsecError):
    """This Edge's lease is over; another one owns its sandboxes now."""

    status = 409


class Forbidden(DsecError):
    """The key may not do that."""

    status = 403


class QuotaExceeded(DsecError):
    """The project has used up what it was given."""

    status = 429


class ImageError(DsecError):
    """An image cannot be built, found, verified or mounted."""

    status = 422


def _classes(base: type[DsecError]) -> dict[str, type[DsecError]]:
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found |= _classes(child)
    return found


def to_wire(error: DsecError) -> dict[str, Any]:
    """JSON of an error: {"error": class name, "message": text, and its fields}."""
    return {"error": type(error).__name__, "message": error.message, "fields": error.fields}


def from_wire(value: dict[str, Any]) -> DsecError:
    """The error a `to_wire` dict was made from; an unknown class (a newer peer) becomes a plain DsecError."""
    kind = _classes(DsecError).get(str(value.get("error")), DsecError)
    return kind(message=str(value.get("message", "")), **dict(value.get("fields") or {}))
