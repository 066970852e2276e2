"""What can go wrong in the control plane beyond the sandbox errors of `dsec.errors`."""

from __future__ import annotations

from dsec.errors import DsecError


class StoreUnavailable(DsecError):
    """The database did not answer. What was being written may or may not be there; repeating it is safe."""

    status = 503


class Conflict(DsecError):
    """An idempotency key was used for two different requests."""

    status = 409


class UnknownProject(DsecError):
    """There is no such project."""

    status = 404
