"""Lookup of the app: from the command line, the environment or pyproject.toml to an object."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import msgspec

from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.jobs.include import INCLUDE_VARIABLE

WORKER_SETTINGS = (
    "queues", "concurrency", "threads", "processes", "grace", "max_jobs", "max_memory", "health_port", "labels", "autoscale",
)  # fmt: skip
_SEVERAL = ("queues", "labels")
SETTINGS = ("app", "include", "url", "namespace", *WORKER_SETTINGS)
_SKIPPED_FOLDERS = {"node_modules", "site-packages", "__pycache__", "build", "dist"}
_MAX_FILES = 3000
_DEFINES_TASK = re.compile(r"^@\w+\.task\b", re.MULTILINE)


class Settings(msgspec.Struct, frozen=True):
    """
    The settings in ``[tool.conveyor]`` of the nearest pyproject.toml.

    `file`: that file, None without one.
    """

    file: Path | None = None
    app: str | None = None
    include: tuple[str, ...] = ()
    url: str | None = None
    namespace: str | None = None
    worker: dict[str, Any] = msgspec.field(default_factory=dict)


def read_settings() -> Settings:
    """Read ``[tool.conveyor]``, upwards from the working directory; raises ConfigurationError."""
    here = Path.cwd()
    file = next((p for directory in (here, *here.parents) if (p := directory / "pyproject.toml").is_file()), None)
    if file is None:
        return Settings()
    import tomllib

    try:
        tool = tomllib.loads(file.read_text("utf-8")).get("tool", {})
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"Cannot read {file}: {error}.") from error
    table = tool.get("conveyor", {}) if isinstance(tool, dict) else None
    if not isinstance(table, dict):
        raise ConfigurationError(
            f'[tool.conveyor] in {file} must be a table of settings, such as app = "shop.app:app".'
        )
    unknown = set(table) - set(SETTINGS)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ConfigurationError(
            f"[tool.conveyor] in {file} has unknown settings: {names}. Known: {', '.join(SETTINGS)}."
        )
    for name in ("app", "url", "namespace"):
        if not isinstance(table.get(name, ""), str):
            raise ConfigurationError(f"[tool.conveyor] {name} in {file} must be a string, not {table[name]!r}.")
    include = table.get("include", [])
    if not isinstance(include, list) or not all(isinstance(name, str) for name in include):
        raise ConfigurationError(
            f'[tool.conveyor] include in {file} must be a list of modules, such as ["shop.mail"], not {include!r}.'
        )
    worker = {name: _worker_setting(name, table[name], file) for name in WORKER_SETTINGS if name in table}
    return Settings(file, table.get("app"), tuple(include), table.get("url"), table.get("namespace"), worker)


def _worker_setting(name: str, value: Any, file: Path) -> str | list[str]:
    """Return a setting of the worker as its option takes it: a text, or several. Raises ConfigurationError."""
    if name == "queues" and isinstance(value, dict):
        value = [f"{queue}:{weight}" for queue, weight in value.items()]
    several = isinstance(value, list) and name in _SEVERAL
    texts = [one if isinstance(one, str) else str(one) for one in (value if several else [value]) if _is_scalar(one)]
    if len(texts) < (len(value) if several else 1):
        words = "a text, a number or a list of texts" if name in _SEVERAL else "a text or a number"
        raise ConfigurationError(f"[tool.conveyor] {name} in {file} must be {words}, not {value!r}.")
    return texts if several else texts[0]


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def reference(given: str | None, settings: Settings) -> str | None:
    """Return the reference of the app by the order of settings; None: none is set."""
    return given or os.environ.get("CONVEYOR_APP") or settings.app or None


def load(given: str | None, settings: Settings) -> tuple[str, Any]:
    """
    Import the app and return (``module:object``, app).

    The working directory is importable, and so is the directory of the pyproject.toml that names the app. Raises
    ConfigurationError: E02 no app is named, E08 it cannot be imported, E09 the module has several.
    """
    name = reference(given, settings)
    if name is None:
        raise ConfigurationError(
            "No app is named. Give it as module:object (or the module alone when it has one app),\n"
            'or set CONVEYOR_APP, or [tool.conveyor] app = "module:object" in pyproject.toml.' + _module_suggestions("")
        )
    module_name, _, attribute = name.partition(":")
    module = _import_configured(name, module_name, settings)
    if attribute:
        return name, _with_included(_attribute(module, module_name, attribute))
    apps = _apps(module)
    if not apps:
        raise ConfigurationError(
            f"{module_name!r} has no app. Is there an  app = Conveyor()  at its top level?"
            + _module_suggestions(module_name),
            code="E08",
        )
    if len(apps) > 1:
        listed = ", ".join(f"{module_name}:{one}" for one in apps)
        raise ConfigurationError(
            f"{module_name!r} has {len(apps)} apps: {listed}.\nSay which:  {module_name}:{next(iter(apps))}", code="E09"
        )
    return next((f"{module_name}:{one}", _with_included(app)) for one, app in apps.items())


def _with_included(app: Any) -> Any:
    """Return the app with the tasks of the modules that it includes."""
    from conveyor.jobs.core import core_of
    from conveyor.jobs.include import import_included

    core = core_of(app)
    try:
        import_included(core.include)
    except ConveyorError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed_import(f"the modules that {app!r} includes", error) from error
    return app


def load_outbox(name: str, settings: Settings) -> Any:
    """Import the Outbox named ``module:object``. Raises ConfigurationError (E08)."""
    module_name, _, path = name.partition(":")
    value: Any = _import_configured(name, module_name, settings)
    for part in path.split("."):
        value = getattr(value, part, None)
    if not _is_instance(value, "Outbox"):
        raise ConfigurationError(
            f"{name!r} is not an Outbox. Name, as module:object, what the program made with  outbox = Outbox(app, connect)",
            code="E08",
        )
    return value


def _import_configured(name: str, module_name: str, settings: Settings) -> ModuleType:
    """Import a module as every command does. *name*: the reference as it was given."""
    directories = [str(Path.cwd())]
    if settings.file is not None and name == settings.app:
        directories.append(str(settings.file.parent))
    sys.path[:0] = [directory for directory in directories if directory not in sys.path]
    if settings.url and not os.environ.get("CONVEYOR_URL"):
        os.environ["CONVEYOR_URL"] = settings.url  # for Conveyor() in the app, and for the processes of a worker
    if settings.include and not os.environ.get(INCLUDE_VARIABLE):
        os.environ[INCLUDE_VARIABLE] = ",".join(settings.include)
    return _import(module_name)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ConveyorError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"Cannot import {name!r}: {error}.\nLooked in {Path.cwd()} (the working directory) and sys.path."
                + (_advice_on_directory(name) or _module_suggestions(name)),
                code="E08",
            ) from error
        raise _import_error(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error


def _import_error(name: str, error: BaseException) -> ConfigurationError:
    if not all(name.split(".")):
        return ConfigurationError(
            f"{name!r} is not a module. Write it with dots: shop.jobs:app" + _module_suggestions(name), code="E08"
        )
    return _failed_import(repr(name), error)


def _failed_import(what: str, error: BaseException) -> ConfigurationError:
    """Return the error for an import that began and raised; it names the line where that was."""
    frame = error.__traceback__
    location = ""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and file not in {__file__, importlib.__file__}:
            location = f" ({file}:{frame.tb_lineno})"
        frame = frame.tb_next
    if isinstance(error, SyntaxError):
        location = f" ({error.filename}:{error.lineno})"
        error = SyntaxError(error.msg)
    advice = _advice_on_directory(error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    return ConfigurationError(
        f"Importing {what} failed: {type(error).__name__}: {error}{location}.{advice}\nThe full traceback:  -v",
        code="E08",
    )


def _advice_on_directory(name: str) -> str:
    """Return a line for a command that was given inside the package of *name*, where Python does not find it; else ""."""
    here = Path.cwd()
    package = next((one for one in (here, *here.parents) if one.name == name.partition(".")[0]), None)
    if package is None or not package.name:
        return ""
    above = shlex.quote(str(package.parent))
    return f"\nThis directory lies in the package {package.name!r}. Run the command above it:  cd {above}"


def _attribute(module: ModuleType, module_name: str, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            apps = _apps(module)
            known = f" Its apps: {', '.join(f'{module_name}:{one}' for one in apps)}." if apps else " It has no app."
            raise ConfigurationError(f"{module_name!r} has no {path!r}.{known}", code="E08")
        value = getattr(value, part)
    if not _is_app(value):
        raise ConfigurationError(f"{module_name}:{path} is not an app but a {type(value).__name__}.", code="E08")
    return value


def _apps(module: ModuleType) -> dict[str, Any]:
    """Return the apps at the top level of *module*, each once, by its first public name."""
    by_identity: dict[int, tuple[str, Any]] = {}
    for name, value in vars(module).items():
        if _is_app(value) and (id(value) not in by_identity or by_identity[id(value)][0].startswith("_")):
            by_identity[id(value)] = (name, value)
    return dict(by_identity.values())


def _is_app(value: object) -> bool:
    return _is_instance(value, "Conveyor")


def _is_instance(value: object, name: str) -> bool:
    # Looks at the class only: the top level of a module may hold proxies that fail when they are used.
    return any(kind.__name__ == name and kind.__module__.startswith("conveyor") for kind in type(value).__mro__)


def _module_suggestions(name: str) -> str:
    """Return lines that name nearby modules with a similar name or an app; "" without any."""
    wanted = name.removesuffix(".py").removeprefix("./").replace("/", ".")
    ranked: list[tuple[int, Path, str]] = []
    for path in _python_files():
        module = _module_name(path)
        has_app = "Conveyor(" in path.read_text("utf-8", "replace")[:100_000]
        if has_app and (module == wanted or module.startswith(f"{wanted}.")):
            ranked.append((0, path, module))
        elif path.stem == wanted.rpartition(".")[2]:
            ranked.append((1, path, module))
        elif has_app:
            ranked.append((2, path, module))
    ranked = sorted(ranked, key=lambda one: one[0])[:5]
    if not ranked:
        return ""
    return f"\nModules here: {', '.join(str(path) for _, path, _ in ranked)}\nTry:  {_usage(ranked[0][2])}"


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def task_modules(app_module: str) -> list[str]:
    """Return the modules beside that of an app which define tasks and have no app of their own, five at most."""
    found = []
    for path in _python_files():
        module = _module_name(path)
        text = path.read_text("utf-8", "replace")[:100_000]
        if module != app_module and _DEFINES_TASK.search(text) and "Conveyor(" not in text:
            found.append(module)
    return found[:5]


def _usage(module: str) -> str:
    """Return the present command with *module* as the one that holds its app or outbox."""
    context = click.get_current_context(silent=True)
    command = "conveyor worker" if context is None else context.command_path
    if command.endswith(" worker"):
        return f"{command} {module}"
    return f"{command} {module}:outbox" if command.endswith(" relay") else f"{command} --app {module}"


def _python_files() -> Iterator[Path]:
    """
    Yield Python files as relative paths.

    Up to three levels below the working directory, and a bounded number.
    """
    here, seen = Path.cwd(), 0
    for directory, folders, files in os.walk(here):
        depth = len(Path(directory).relative_to(here).parts)
        kept = [
            f
            for f in folders
            if not f.startswith(".") and f not in _SKIPPED_FOLDERS and not _is_environment(directory, f)
        ]
        folders[:] = sorted(kept) if depth < 2 else []
        for file in sorted(files):
            seen += 1
            if seen > _MAX_FILES:
                return
            if file.endswith(".py"):
                yield Path(directory, file).relative_to(here)


def _is_environment(directory: str, folder: str) -> bool:
    return Path(directory, folder, "pyvenv.cfg").exists()
