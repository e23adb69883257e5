"""The OpenAPI description of the HTTP API, made from its routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conveyor.dashboard.endpoint import LARGEST, ApiRoute, Field

_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"}, "number": {"type": "number"}, "flag": {"type": "boolean"},
    "texts": {"type": "array", "items": {"type": "string"}}, "object": {"type": "object"}, "list": {"type": "array", "items": {}},
}  # fmt: skip
_ERRORS = {
    "401": "not logged in", "403": "not allowed", "404": "not found", "405": "another method is taken", "409": "in use",
    "421": "a host name that is not allowed", "422": "bad input", "429": "too many wrong passwords",
    "500": "an error of the dashboard", "503": "Redis does not answer", "504": "a worker does not answer",
}  # fmt: skip


def describe(routes: Sequence[ApiRoute], version: str, base: str) -> dict[str, Any]:
    """Return the description of *routes*, which are below *base*."""
    paths: dict[str, dict[str, Any]] = {}
    for one in routes:
        paths.setdefault(f"/{one.path}", {})[one.method.lower()] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Conveyor", "version": version},
        "servers": [{"url": f"{base}api/v1"}],
        "security": [{"bearer": []}, {"basic": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["schema", "error"],
                    "properties": {
                        "schema": {"const": "conveyor/error@1"},
                        "error": {
                            "type": "object",
                            "required": ["code", "message", "status"],
                            "properties": {
                                "code": {"type": "string"}, "message": {"type": "string"}, "status": {"type": "integer"},
                                "position": {"type": "integer"}, "action": {"type": "string"},
                                "retry_after": {"type": "integer"},
                            },
                        },
                    },
                }
            },
        },
    }  # fmt: skip


def _operation(one: ApiRoute) -> dict[str, Any]:
    needed = [one.action] if isinstance(one.action, str) else sorted(set((one.action or {}).values()))
    found: dict[str, Any] = {
        "operationId": f"{one.method.lower()}_{one.path.replace('/', '_').replace('.', '_')}",
        "summary": one.summary,
        "description": f"Needs {' or '.join(needed)}." if needed else "Needs the right to look.",
        "responses": {
            str(one.status): {"description": "done", "content": {one.media: {"schema": _answer_schema(one)}}},
            **({"304": {"description": "as the visitor has it already (If-None-Match)"}} if one.method == "GET" else {}),
            **({"204": {"description": "no events are sent below WSGI"}} if one.media == "text/event-stream" else {}),
            **{
                status: {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
                for status, text in _ERRORS.items()
            },
        },
    }  # fmt: skip
    if one.method == "GET":
        found["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": field.required,
                "description": _description(field),
                "schema": _schema(field),
            }
            for name, field in one.fields.items()
        ]
    else:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body_schema(one.fields)}}}
    return found


def input_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON schema of an object of *fields*."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, one in fields.items() if one.required],
        "properties": {name: {**_schema(one), "description": _description(one)} for name, one in fields.items()},
    }


def _answer_schema(one: ApiRoute) -> dict[str, Any]:
    if one.media != "application/json":
        return {"type": "string"}
    if not one.schema:  # the description itself
        return {"type": "object"}
    return {"type": "object", "required": ["schema"], "properties": {"schema": {"const": f"conveyor/{one.schema}@1"}}}


def _description(one: Field) -> str:
    if one.kind != "number":
        return one.text
    return f"{one.text}; clamped to {one.least:g} and more" + ("" if one.most == LARGEST else f", {one.most:g} at most")


def _body_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON schema of a body, whose members may be null where they may be left out."""
    schema = input_schema(fields)
    for name, one in schema["properties"].items():
        if name not in schema["required"] and "type" in one:
            one["type"] = [one["type"], "null"]
            if "enum" in one:
                one["enum"] = [*one["enum"], None]
    return schema


def _schema(one: Field) -> dict[str, Any]:
    schema = dict(_TYPES[one.kind])
    if one.kind in {"list", "texts"} and one.most != LARGEST:
        schema["maxItems"] = int(one.most)
    if one.choices:
        schema["enum"] = list(one.choices)
    if one.default is not None:
        schema["default"] = one.default
    return schema
