"""The parameters of a function: resolved annotations, the signature as text, and values from text."""

from __future__ import annotations

import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Union

from conveyor.errors import ConfigurationError
from conveyor.payload.codec import from_builtin, reason, show, typed_decoder

_EMPTY = inspect.Parameter.empty
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


def read_parameters(
    function: Callable[..., Any], name: str, injected: Callable[[inspect.Parameter], bool]
) -> tuple[list[inspect.Parameter], Any]:
    """
    Return the parameters with their annotations resolved, and the return annotation.

    Raises ConfigurationError for an annotation that does not resolve; that of an injected parameter need not.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigurationError(f"{name}: the parameters of {show(function)} cannot be read: {error}.") from error
    scope = _globals(function)
    parameters = []
    for parameter in signature.parameters.values():
        try:
            annotation = _resolved(parameter.annotation, scope)
        except Exception as error:
            if not injected(parameter):
                raise _unresolved(name, f"parameter '{parameter.name}'", parameter.annotation, error) from error
            annotation = parameter.annotation
        parameters.append(parameter.replace(annotation=annotation))
    try:
        return parameters, _resolved(signature.return_annotation, scope)
    except Exception as error:
        raise _unresolved(name, "the result", signature.return_annotation, error) from error


def _globals(function: Any) -> dict[str, Any]:
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    if not hasattr(function, "__globals__"):
        function = type(function).__call__
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    return scope


def _resolved(annotation: Any, scope: dict[str, Any]) -> Any:
    if annotation is _EMPTY:
        return annotation

    def holder() -> None: ...

    # One at a time, so that an error can name it.
    holder.__annotations__ = {"it": annotation}
    return typing.get_type_hints(holder, scope, include_extras=True)["it"]


def _unresolved(name: str, where: str, annotation: object, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{name}(): the annotation {show(annotation)} of {where} does not resolve: {reason(error)}.\n"
        "    Define it at the top of a module. If its import stands under `if TYPE_CHECKING:`, import it at run time."
    )


def payload_signature(parameters: Iterable[inspect.Parameter], injected: Iterable[str], name: str) -> inspect.Signature:
    """Return the signature without the injected parameters; those behind one can be given by name only."""
    kept: list[inspect.Parameter] = []
    by_name = False
    for parameter in parameters:
        if parameter.name in injected:
            if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
                raise ConfigurationError(
                    f"{name}(): '{parameter.name}' cannot be filled by name. Make it keyword-only."
                )
            by_name = by_name or parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        elif by_name and parameter.kind is parameter.VAR_POSITIONAL:
            raise ConfigurationError(
                f"{name}(): the parameter that the worker fills stands before '*{parameter.name}'. Move it behind, as keyword-only."
            )
        elif by_name and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            kept.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
        else:
            kept.append(parameter)
    return inspect.Signature(kept)


def payload_type(annotation: Any) -> Any:
    """Return the type of an annotation in a payload: Any where there is none."""
    if annotation is _EMPTY or isinstance(annotation, typing.ParamSpecArgs | typing.ParamSpecKwargs):
        return Any
    return annotation


def signature_text(name: str, parameters: Iterable[inspect.Parameter], result: Any) -> str:
    """Return a signature in Python's notation, e.g. ``greet(name: str, excited: bool = False) -> str``."""
    parts: list[str] = []
    before = None
    for parameter in parameters:
        if before is parameter.POSITIONAL_ONLY and parameter.kind is not before:
            parts.append("/")
        if parameter.kind is parameter.KEYWORD_ONLY and before not in _STARRED:
            parts.append("*")
        parts.append(_written(parameter))
        before = parameter.kind
    if before is inspect.Parameter.POSITIONAL_ONLY:
        parts.append("/")
    returns = "" if result is _EMPTY else f" -> {_annotation_text(result)}"
    return f"{name}({', '.join(parts)}){returns}"


def _written(parameter: inspect.Parameter) -> str:
    stars = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    text = "*" * (stars.index(parameter.kind) + 1 if parameter.kind in stars else 0) + parameter.name
    annotated = parameter.annotation is not _EMPTY
    if annotated:
        text += f": {_annotation_text(parameter.annotation)}"
    if parameter.default is not _EMPTY:
        text += f" = {show(parameter.default)}" if annotated else f"={show(parameter.default)}"
    return text


def _annotation_text(annotation: Any) -> str:
    return "None" if annotation is type(None) else str(inspect.formatannotation(annotation))


def from_text(type_: Any, text: str) -> Any:
    """
    Return *text* in that type: a str as it is, else JSON, else a date, UUID, Enum value or Enum name.

    With Any it is JSON if possible, else the text. Raises msgspec.ValidationError for a text that does not fit.
    """
    members = _members(type_)
    if set(members) <= {str, type(None)} and str in members:
        return text
    try:
        return typed_decoder(type_, "value")(text.encode())
    except Exception:
        if Any in members or object in members:
            return text
    for member in members:
        if isinstance(member, type) and issubclass(member, enum.Enum) and text in member.__members__:
            return member[text]
    return from_builtin(text, type_)


def _members(type_: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(type_)
    if origin is typing.Annotated:
        return _members(typing.get_args(type_)[0])
    if origin is Union or origin is types.UnionType:
        return tuple(inner for member in typing.get_args(type_) for inner in _members(member))
    return (type_,)
