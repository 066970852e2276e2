"""What an operation *is*: canonical arguments and a key that chains it to everything asked before it.

    key(step) = BLAKE2b-256 of [schema, trajectory, branch, step, kind, arguments, spec, image, key(step - 1)]

so one differing earlier step changes every later key. The chain goes over what was asked, not over results: two
commands may run at once, and the second has its key before the first has ended. Values of environment variables are
secrets until proved otherwise: they enter, and are stored, as digests keyed with a secret of the log's own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
ROOT = "0" * 64  # the key before step 0
NOT_IDENTITY = (
    "timeout",
    "metadata",
    "trajectory",
    "branch",
    "idempotency_key",
    "isolation_min",
    "snapshot_steps",
    "snapshot_seconds",
)
"""Fields of a Spec that do not change what a command does."""

_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
encode = _encoder.encode
"""Canonical JSON: sorted keys, no spaces, no NaN."""
_quoted = json.encoder.encode_basestring


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def stream_of(trajectory: str, branch: str) -> int:
    """The 64-bit number in the frames of one branch, never 0 (the segment's own header)."""
    name = f"{trajectory}\0{branch}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") | 1


def canonical(value: Any, secret: bytes) -> Any:
    """Plain JSON data that means `value`: bytes as their digest and length, each value of an `env` as a keyed digest.

    TypeError for anything that has no canonical form (sets, objects): a key must not depend on a repr.
    """
    if value is None or type(value) in (str, int, bool, float):  # most are; asking an abstract class takes longer
        return value
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"keys of arguments are strings, not {name!r}")
            if type(item) is str:
                plain[name] = item
            elif name == "env" and isinstance(item, Mapping):
                plain[name] = {variable: _keyed(text, secret) for variable, text in item.items()}
            else:
                plain[name] = canonical(item, secret)
        return plain
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$sha256": hashlib.sha256(value).hexdigest(), "$bytes": len(value)}
    if isinstance(value, list | tuple):
        return [canonical(item, secret) for item in value]
    if isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical form: {value!r}")


def _keyed(text: Any, secret: bytes) -> str:
    return "$hmac:" + hmac.digest(secret, str(text).encode("utf-8", "surrogatepass"), "sha256").hex()[:32]


def identity(spec: Mapping[str, Any], secret: bytes) -> dict[str, Any]:
    """The part of a Spec (as a dict) that says what its commands do, canonical."""
    return canonical({name: value for name, value in spec.items() if name not in NOT_IDENTITY}, secret)


def operation_key(
    trajectory: str, branch: str, step: int, kind: str, args: Any, spec_digest: str, image_digest: str, previous: str
) -> str:
    """The key of one operation; `args` must be canonical."""
    # the same text as `encode` of all of it as one list, in half the time
    start = f"{SCHEMA},{_quoted(trajectory)},{_quoted(branch)},{step},{_quoted(kind)},{encode(args)}"
    return digest(f"[{start},{_quoted(spec_digest)},{_quoted(image_digest)},{_quoted(previous)}]")


def first_difference(expected: Any, got: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(dotted path, expected, got) of the first field in which two canonical values differ; None if they are equal."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for name in sorted(expected.keys() | got.keys()):
            found = first_difference(expected.get(name), got.get(name), f"{path}.{name}" if path else name)
            if found:
                return found
        return None
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for index, (one, other) in enumerate(zip(expected, got)):
            if found := first_difference(one, other, f"{path}[{index}]"):
                return found
        return None
    return None if type(expected) is type(got) and expected == got else (path, expected, got)
