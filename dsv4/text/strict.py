"""Strict tools: the subset of JSON Schema that constrained decoding can enforce, in the one form the model is shown."""

from __future__ import annotations

from typing import Any

from dsv4.text.errors import RequestError

FORMATS = ("email", "hostname", "ipv4", "ipv6", "uuid")
NUMERIC = (
    *("description", "const", "default", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
KEPT = {  # type -> keys that survive, in the order they are rendered
    "string": ("description", "pattern", "format", "enum"),
    "number": NUMERIC,
    "integer": NUMERIC,
    "boolean": ("description",),
    "null": ("description",),
}
TYPES: dict[str, type | tuple[type, ...]] = {
    "type": (str, list),
    "properties": dict,
    "required": list,
    "anyOf": list,
    "format": str,
}


def strict_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a strict function's parameters, with keys in canonical order and unsupported keywords dropped.

    Every object lists all its properties as required and allows no others. Raises RequestError where the schema says
    otherwise. Definitions are kept wherever a `$ref` may point (`$defs`, `$def`, `definitions`).
    """
    _check_types(schema)
    if schema and schema.get("type") != "object":
        if not any(key in schema for key in ("type", "anyOf", "$ref")):
            raise _untyped()
        raise RequestError("The top level of the function parameters schema must be an object.")
    result = _object(schema, top=True)
    for key in ("$defs", "$def", "definitions"):
        if isinstance(schema.get(key), dict):
            result[key] = {name: _node(part) for name, part in schema[key].items()}
    return result


def _node(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise _untyped()
    _check_types(schema)
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    if "anyOf" in schema:
        return {"anyOf": [_node(choice) for choice in schema["anyOf"]]} | _keep(schema, ("description",))
    kind = schema.get("type")
    if kind == "object":
        return _object(schema)
    if kind == "array":
        if "items" not in schema:
            raise RequestError("Invalid tool parameters schema : missing field `items`")
        return {"type": "array", "items": _node(schema["items"])} | _keep(schema, ("description",))
    if isinstance(kind, list):
        return {"type": kind} | _keep(schema, ("description",))
    if kind not in KEPT:
        raise _untyped()
    if kind == "string" and schema.get("format", FORMATS[0]) not in FORMATS:
        names = ", ".join(f"`{name}`" for name in FORMATS)
        raise RequestError(
            f"Invalid tool parameters schema : unknown variant `{schema['format']}`, expected one of {names}"
        )
    return {"type": kind} | _keep(schema, KEPT[kind])


def _object(schema: dict[str, Any], top: bool = False) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    if not properties and not top:
        raise RequestError("An object with no properties is not allowed.")
    if schema.get("additionalProperties"):
        raise RequestError("additionalProperties should not be true")
    required = schema.get("required", list(properties))
    for name in required:
        if not isinstance(name, str) or name not in properties:
            raise RequestError(f"Required property '{name}' not found in object")
    if len(required) != len(properties):
        raise RequestError("Required properties must match all properties in the object")
    parts = {name: _node(part) for name, part in properties.items()}
    closed = {"additionalProperties": False, "required": list(properties)}
    return {"type": "object", "properties": parts, **closed} | _keep(schema, ("description",))


def _check_types(schema: dict[str, Any]) -> None:
    for key, kinds in TYPES.items():
        if key in schema and not isinstance(schema[key], kinds):
            raise RequestError(f"Invalid tool parameters schema : invalid type of `{key}`")


def _keep(schema: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: schema[key] for key in keys if schema.get(key) is not None}


def _untyped() -> RequestError:
    return RequestError("Invalid tool parameters schema : one of `type`, `anyOf`, `$ref` field is required")
