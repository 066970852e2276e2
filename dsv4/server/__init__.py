"""HTTP: DeepSeek's Chat Completions over an `Engine`, and the chat page."""

from __future__ import annotations

from dsv4.server.chat import Reply, Service

__all__ = ["Reply", "Service"]
