"""The OpenAPI description of the HTTP API, made from its routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conveyor.dashboard.endpoint import ApiRoute, Field

_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"}, "number": {"type": "number"}, "flag": {"type": "boolean"},
    "texts": {"type": "array", "items": {"type": "string"}}, "object": {"type": "object"}, "list": {"type": "array", "items": {}},
    "any": {},
}  # fmt: skip
_ERRORS = {
    "401": "not logged in", "403": "not allowed", "404": "not found", "409": "in use", "422": "bad input",
    "503": "Redis does not answer",
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
            str(one.status): {
                "description": "done",
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "object", "required": ["schema"],
                            "properties": {"schema": {"const": f"conveyor/{one.schema}@1"}},
                        }
                    }
                },
            },
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
                "description": field.text,
                "schema": _schema(field),
            }
            for name, field in one.fields.items()
        ]
    else:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": input_schema(one.fields)}}}
    return found


def input_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON schema of an object of *fields*."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, one in fields.items() if one.required],
        "properties": {name: {**_schema(one), "description": one.text} for name, one in fields.items()},
    }


def _schema(one: Field) -> dict[str, Any]:
    schema = dict(_TYPES[one.kind])
    if one.choices:
        schema["enum"] = list(one.choices)
    if one.default is not None:
        schema["default"] = one.default
    return schema
