"""The arguments of a call as one JSON object: checked when enqueued, decoded into the annotated types to run."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Sequence, Set
from typing import Any

import msgspec
from msgspec.structs import astuple

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import (
    MAX_PAYLOAD,
    SHALLOW,
    UnreadablePayload,
    encode_json,
    exceeded_limit,
    reason,
    show,
    too_large,
    typed_decoder,
)
from conveyor.payload.formats import JSON, MARK, Format, FormatCodec, FormatRegistry
from conveyor.payload.key_text import member_reader
from conveyor.payload.parameters import from_text, payload_signature, payload_type, read_parameters, signature_text

_EMPTY = inspect.Parameter.empty
_IMMUTABLE = frozenset({str, int, float, bool, bytes, type(None)})


def _none_injected(_: inspect.Parameter) -> bool:
    return False


class TaskSignature:
    """
    The parameters and the result of a task.

    `injected` holds the parameters that the worker fills, with their defaults. `result` is the return annotation
    (`inspect.Signature.empty` when there is none); `returns_none` is true when it is None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        max_payload: int = MAX_PAYLOAD,
        formats: FormatRegistry = JSON,
        injected: Callable[[inspect.Parameter], bool] = _none_injected,
    ) -> None:
        """
        Read *function*; *name* is the task's, for errors; *injected* picks the parameters left out of the payload.

        Raises ConfigurationError for an annotation that does not resolve or that JSON cannot carry.
        """
        self.name = name
        self._function_name = getattr(function, "__name__", name)
        self.max_payload = max_payload
        self.formats = formats
        parameters, self.result = read_parameters(function, name, injected)
        self.injected = {parameter.name: parameter.default for parameter in parameters if injected(parameter)}
        self.returns_none = self.result is None or self.result is type(None)
        self._signature = payload_signature(parameters, self.injected, name)
        self._parameters = dict(self._signature.parameters)
        self._positional_only = self._of_kind(inspect.Parameter.POSITIONAL_ONLY)
        self._positional = self._positional_only + self._of_kind(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._keyword = self._of_kind(inspect.Parameter.KEYWORD_ONLY)
        self._rest = next(iter(self._of_kind(inspect.Parameter.VAR_POSITIONAL)), None)
        self._others = next(iter(self._of_kind(inspect.Parameter.VAR_KEYWORD)), None)
        named = [*self._positional[len(self._positional_only) :], *self._keyword, *self.injected]
        self._by_name = frozenset(named)  # names that ``**others`` can never contain
        # The common case binds in C; all other cases, and all errors, take the careful way.
        simple = not (self._rest or self._others or self._positional_only or formats.writes)
        self._bind: Callable[..., Any] | None = self._sending_struct() if simple else None
        self._all_positional = len(self._positional) == len(self._parameters)
        self._arguments: dict[str, _ArgumentCodec] = {}
        self._decode = self._receiving_decoder()

    def __repr__(self) -> str:
        return f"<Signature {self.describe()}>"

    def describe(self) -> str:
        """Return the signature as people write it, without the injected parameters."""
        return signature_text(self.name, self._parameters.values(), self.result)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that the payload fills."""
        return tuple(self._parameters)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of those that each call has to give."""
        optional = {self._rest, self._others}
        return tuple(name for name in self._parameters if name not in optional and self._default(name) is _EMPTY)

    def argument_reader(self, path: str, what: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        """
        Return a function that reads an argument of a call that fits: ``tenant``, or a part of one, ``order.customer``.

        *what*, such as ``Rate(by)``, is named in errors. Raises ConfigurationError for a name that is no parameter; the
        function raises PayloadError (E03) for a part that an argument does not have.
        """
        name, *steps = path.split(".")
        if name not in self._parameters or name in {self._rest, self._others}:
            known = [n for n in self._parameters if n not in {self._rest, self._others}]
            filled = f" '{name}' is filled by the worker." if name in self.injected else ""
            raise ConfigurationError(
                f"{what} names '{name}', which is no argument of {self.name}().{filled}{_did_you_mean(name, known)}\n"
                f"    {self.describe()}"
            )
        at = self._positional.index(name) if name in self._positional else sys.maxsize
        default = self._default(name)
        follow = member_reader(tuple(steps)) if steps else None

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = args[at] if at < len(args) else kwargs.get(name, default)
            if follow is None:
                return value
            try:
                return follow(value)
            except LookupError:
                raise self.refusal(f"{what} names '{path}', and {name}={show(value)} has no such part.") from None

        return read

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of a call that fits, by parameter, with the defaults of those that were not given."""
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        return {self._key(name): value for name, value in given.arguments.items()}

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """
        Return an object of the given arguments, by parameter, in the task's format; `decode` accepts it.

        Raises PayloadError: E03 missing, unexpected or of a wrong type, E04 not storable, E21 too large, E22 too deep.
        """
        if self._bind is not None:
            try:
                data = encode_json(self._bind(*args, **kwargs))
                if (len(data) <= SHALLOW or not exceeded_limit(data, self.max_payload)) and self._arrives(
                    data, args, kwargs
                ):
                    return data
            except Exception:  # noqa: S110  the careful way finds the error, if there is one
                pass
        return self._encode_carefully(args, kwargs)

    def _arrives(self, data: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        decoded = self._decode(data)
        nulls = data.count(b"null")
        if nulls and nulls != sum(value is None for value in (*args, *kwargs.values())):
            return False  # perhaps NaN
        values = astuple(decoded)
        if args != (values if len(args) == len(values) else values[: len(args)]):
            return False
        for name, value in kwargs.items():  # noqa: SIM110  all() takes half a microsecond more
            if getattr(decoded, name) != value:
                return False
        return True

    def _encode_carefully(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        if misfit := self._misfit(args, kwargs):
            raise self.refusal(misfit)
        given = self._signature.bind(*args, **kwargs).arguments
        encoded = {}
        for name, value in given.items():
            encoded[self._key(name)] = self._argument(name).encode_unmarked(
                list(value) if name == self._rest else value
            )
        form = self.formats.writes
        if form is not None:
            data = self.formats.encode_arguments(encoded)
            excess = too_large(data, self.max_payload, form.name)
        else:
            data = b"{" + b",".join(encode_json(key) + b":" + one for key, one in encoded.items()) + b"}"
            excess = exceeded_limit(data, self.max_payload)
        if excess:
            raise self.refusal(f"The call of {self.name}() {excess[1]}", excess[0])
        return data

    def _misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        positional, name = self._positional, self.name
        known = [n for n in self._parameters if n not in {self._rest, self._others}]
        only = self._positional_only
        for key in kwargs:
            if key in self.injected:
                return f"{name}() got the argument '{key}', which the worker fills. Leave it out."
            if key in only and not self._others:
                return f"{name}() takes '{key}' by position only."
            if key not in known and not self._others:
                return f"{name}() got an unexpected argument '{key}'.{_did_you_mean(key, known)}"
        if len(args) > len(positional) and not self._rest:
            by_name = f" Pass by name: {', '.join(self._keyword)}." if self._keyword else ""
            return f"{name}() takes {len(positional)} arguments by position, and {len(args)} were given.{by_name}"
        for key in positional[: len(args)]:
            if key in kwargs and key not in only:
                return f"{name}() got the argument '{key}' twice."
        rest = [n for n in positional[len(args) :] if n in only or n not in kwargs]
        rest += [n for n in self._keyword if n not in kwargs]
        missing = [f"'{n}'" for n in rest if self._parameters[n].default is _EMPTY]
        return f"{name}() is missing {', '.join(missing)}." if missing else None

    def refusal(self, text: str, code: str = "E03") -> PayloadError:
        """Return the error of a call that was not enqueued, with the signature."""
        return PayloadError(f"{text}\n    {self.describe()}          Nothing was enqueued.", code=code)

    def decode(self, body: bytes) -> tuple[list[Any], dict[str, Any]]:
        """
        Return the arguments for ``function(*args, **kwargs)``, without the injected ones.

        Raises PayloadError: E15 it does not fit the function, E21 too large, E22 nested too deep.
        """
        try:
            if len(body) > SHALLOW and (excess := exceeded_limit(body, self.max_payload)):
                raise UnreadablePayload(f"The payload of {self.name}() {excess[1]}", code=excess[0])
            values = astuple(self._decode(body))
        except MemoryError:
            raise
        except Exception as error:
            if body[:1] == MARK:
                values = self._unmarked(body)
            elif (bound := self._bind_external(body)) is not None:
                values = bound
            else:
                raise error if isinstance(error, PayloadError) else self._undecodable(reason(error)) from error
        if self._all_positional:
            return list(values), {}
        return self._spread(values)

    def changed(self, body: bytes, changes: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        Return the arguments of a stored call with some of them replaced by name; those that were not given stay away.

        Raises PayloadError: E03 for a name that is no argument, E15 where the stored ones do not fit the function.
        """
        for name in changes:
            if name in self.injected or not (name in self._parameters or self._others):
                raise self.refusal(str(self._misfit((), {name: None})))
        args, kwargs = self.decode(body)
        values = self._signature.bind(*args, **kwargs).arguments
        given = _names(body) if body[:1] != MARK else self.formats.split_arguments(body)[1].keys()
        if self._rest or self._others or not given <= {"*", "**"}:  # else it was enqueued without this signature
            for name in [name for name in values if self._key(name) not in given]:
                del values[name]
        others = dict(values.pop(self._others, {})) if self._others else {}
        rest = values.pop(self._rest, ()) if self._rest else ()
        for name, value in changes.items():
            own = name in self._parameters and name not in {self._rest, self._others}
            (values if own else others)[name] = value
        by_position = self._positional if rest else self._positional_only
        positional = [values.pop(name) for name in by_position if name in values]
        return (*positional, *rest), values | others

    def _bind_external(self, body: bytes) -> tuple[Any, ...] | None:
        """Return the values of a call that was enqueued without this signature: ``{"*": […], "**": {…}}``; else None."""
        try:
            call = _external_call(body)
        except Exception:  # no such call: the first error is the one to tell
            return None
        if not call.args and not call.kwargs:
            return None
        if misfit := self._misfit(tuple(call.args), call.kwargs):
            raise self._undecodable(misfit.rstrip("."))
        given = self._signature.bind(*call.args, **call.kwargs).arguments
        try:
            return astuple(self._decode(encode_json({self._key(name): value for name, value in given.items()})))
        except Exception as error:
            raise self._undecodable(reason(error)) from error

    def _unmarked(self, body: bytes) -> tuple[Any, ...]:
        """Return the values of arguments that are not in JSON, in the order of the parameters; UnreadablePayload."""
        if excess := too_large(body, self.max_payload, "a call"):
            raise UnreadablePayload(f"The payload of {self.name}() {excess[1]}", code=excess[0])
        try:
            form, given = self.formats.split_arguments(body)
            if unknown := given.keys() - set(map(self._key, self._parameters)):
                raise self._undecodable(f"Object contains unknown field {show(min(unknown))}")
            return tuple(self._one(form, name, given.get(self._key(name))) for name in self._parameters)
        except UnreadablePayload:
            raise
        except PayloadError as error:
            raise UnreadablePayload(f"The payload of {self.name}(): {error}", code=error.code) from error

    def _one(self, form: Format, name: str, data: bytes | None) -> Any:
        if data is not None:
            return self._argument(name).decode_unmarked(form, data)
        if name in {self._rest, self._others}:
            return [] if name == self._rest else {}
        if self._default(name) is _EMPTY:
            raise self._undecodable(f"Object missing required field '{name}'")
        return self._default(name)

    def _spread(self, values: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        by_name = dict(zip(self._parameters, values, strict=True))
        others = by_name.pop(self._others) if self._others else {}
        rest = by_name.pop(self._rest) if self._rest else []
        positional = [by_name.pop(name) for name in self._positional]
        # A foreign producer could otherwise evade the types, or fill an injected parameter.
        if clash := self._by_name & others.keys():
            raise self._undecodable(f"'{min(clash)}' is a parameter of its own - at $.**")
        return positional + rest, by_name | others

    def _undecodable(self, why: str) -> UnreadablePayload:
        return UnreadablePayload(
            f"The arguments stored for {self.name}() do not fit it: {why}.\n"
            f"    {self.describe()}          Was it changed while jobs were waiting?",
            code="E15",
        )

    def convert_text(self, name: str, text: str) -> Any:
        """
        Return *text*, the right side of ``name=text``, in the parameter's type; raises PayloadError (E03).

        A str stays as it is. Other types are read as JSON, or from text without quotes: a date, a UUID, an Enum's
        value or name. Without an annotation the value is JSON if possible, else the text.
        """
        if name in self.injected or name in {self._rest, self._others} or name not in self._parameters:
            if name in self.injected or not self._others:
                raise self.refusal(self._misfit((), {name: text}) or f"'{name}' cannot be given as name=value.")
            annotation = self._parameters[self._others].annotation
            codec: FormatCodec[Any] = _ArgumentCodec(name, payload_type(annotation), self, self._function_name)
        else:
            annotation = self._parameters[name].annotation
            codec = self._argument(name)
        try:
            value = from_text(payload_type(annotation), text)
        except Exception as error:
            raise self.refusal(f"{name}={show(text)} does not fit: {reason(error)}.") from None
        codec.encode_unmarked(value)
        return value

    def from_json(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return arguments that were read from JSON in the types of the parameters, for another format; PayloadError."""
        if self._misfit(tuple(args), kwargs):
            return args, kwargs  # `encode` reports the error
        bound = self._signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._argument(name).decode(encode_json(value))
        return bound.args, bound.kwargs

    def _argument(self, name: str) -> _ArgumentCodec:
        if name not in self._arguments:
            self._arguments[name] = _ArgumentCodec(name, self._type(name), self, self._function_name)
        return self._arguments[name]

    def _type(self, name: str) -> Any:
        annotation = self._parameters[name].annotation
        if name == self._rest:
            return list[payload_type(annotation)]  # type: ignore[misc]
        if name == self._others:
            packed = typing.get_origin(annotation) is typing.Unpack
            return typing.get_args(annotation)[0] if packed else dict[str, payload_type(annotation)]  # type: ignore[misc]
        return payload_type(annotation)

    def _key(self, name: str) -> str:
        return "*" if name == self._rest else "**" if name == self._others else name

    def _sending_struct(self) -> Any:
        # UNSET is left out of the bytes, so jobs that relied on a default get the default of the time when they run.
        def fields(names: list[str]) -> list[Any]:
            return [(n, Any) if self._default(n) is _EMPTY else (n, Any, msgspec.UNSET) for n in names]

        by_name = self._struct(fields(self._keyword), kw_only=True)
        return self._struct(fields(self._positional), bases=(by_name,))

    def _receiving_decoder(self) -> Callable[[bytes], Any]:
        fields: list[Any] = []
        for name in self._parameters:
            default = self._default(name)
            if name in {self._rest, self._others}:
                empty = list if name == self._rest else dict
                fields.append((name, self._type(name), msgspec.field(default_factory=empty)))
            elif default is _EMPTY:
                fields.append((name, self._type(name)))
            else:
                fields.append((name, self._type(name), _as_field(default)))
        rename = {name: self._key(name) for name in (self._rest, self._others) if name}
        struct = self._struct(fields, kw_only=True, rename=rename, forbid_unknown_fields=True)
        try:
            return typed_decoder(struct, f"What {self.name}() takes")
        except ConfigurationError:
            for name in self._parameters:
                self._argument(name)  # raises with the name of the argument
            raise

    def _struct(self, fields: list[Any], **options: Any) -> Any:
        try:
            return msgspec.defstruct("Arguments", fields, gc=False, **options)
        except Exception as error:  # names such as __x
            raise ConfigurationError(f"{self.name}(): rename its parameters: {reason(error)}.") from error

    def _of_kind(self, kind: object) -> list[str]:
        return [parameter.name for parameter in self._parameters.values() if parameter.kind is kind]

    def _default(self, name: str) -> Any:
        return self._parameters[name].default


def _names(body: bytes) -> Set[str]:
    return msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()


class _ExternalCall(msgspec.Struct, forbid_unknown_fields=True, rename={"args": "*", "kwargs": "**"}):
    """The arguments of a call by a program that does not have the function."""

    args: list[msgspec.Raw] = []
    kwargs: dict[str, msgspec.Raw] = {}


_external_call = msgspec.json.Decoder(_ExternalCall).decode


class _ArgumentCodec(FormatCodec[Any]):
    """The codec of one argument: the careful way of encoding, with errors that name the argument."""

    def __init__(self, name: str, type: Any, signature: TaskSignature, function: str) -> None:  # noqa: A002
        super().__init__(
            type,
            formats=signature.formats,
            max_payload=signature.max_payload,
            what=f"Argument '{name}' of {signature.name}()",
        )
        self._name = name
        self._function = function
        self._signature = signature

    def _refusal(self, code: str, text: str) -> PayloadError:
        return self._signature.refusal(text, code)

    def _model_advice(self) -> str:
        name = self._name
        return f"Pass its key and load it in the task:  {self._function}.enqueue({name}_id={name}.pk)"


def _as_field(default: Any) -> Any:
    if type(default) in _IMMUTABLE:
        return msgspec.field(default=default)
    return msgspec.field(default_factory=lambda: default)  # the same object for every call, as Python passes it


def _did_you_mean(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, 1)
    return f"  Did you mean '{close[0]}'?" if close else ""
