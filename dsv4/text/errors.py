"""The error of a bad request."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be served; the message is what DeepSeek's service would say, its HTTP status 400."""
