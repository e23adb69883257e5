"""The texts that the server gets: parts of `scripts/lib/` and a script, put together. Each test also shows that its check works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from hashlib import sha1
from importlib.resources import files

from conveyor.store.script import Script

FOLDER = files("conveyor.store").joinpath("scripts")
FILES = {path.name.removesuffix(".lua"): path.read_text("utf-8") for path in FOLDER.iterdir() if path.is_file()}
PARTS = {path.name.removesuffix(".lua"): path.read_text("utf-8") for path in FOLDER.joinpath("lib").iterdir()}

_DIGESTS = "import sys; from conveyor.store.script import Script; print(*[Script(name).sha for name in sys.argv[1:]])"


def needs(text: str, word: str = "needs") -> list[str]:
    """Return the parts that the header of a script names behind *word*, in their order."""
    header = re.match(r"(?:--.*\n)*", text)
    assert header is not None
    return [part for line in re.findall(rf"^-- {word}: (.+)$", header[0], re.MULTILINE) for part in line.split()]


def lazy(text: str) -> list[str]:
    """Return the parts whose functions a script makes only when it asks for one."""
    return needs(text, "lazy")


def functions(text: str) -> list[str]:
    """Return the names of the functions that a text defines, wherever they stand."""
    return re.findall(r"^ *local function (\w+)", text, re.MULTILINE)


def code(text: str) -> str:
    """Return a text without its comments."""
    return re.sub(r"--.*", "", text)


def without_comments(text: str) -> str:
    """Return the lines of a text that have more than comments, without these and without their indentation."""
    lines = (line.partition(" -- ")[0].strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("--"))


def doubled(text: str) -> list[str]:
    """Return the functions that a text defines more than once."""
    return [name for name, count in Counter(functions(text)).items() if count > 1]


def called_before_defined(text: str, names: set[str]) -> list[str]:
    """Return those of the functions *names* that a text calls before it defines them, or without defining them."""
    defined: dict[str, int] = {}
    called: dict[str, int] = {}
    for found in re.finditer(r"^ *local function (\w+)", text, re.MULTILINE):
        defined.setdefault(found[1], found.start())
    for found in re.finditer(r"\b(?<![.'\"])(?<!function )(\w+)\(", text):
        called.setdefault(found[1], found.start())
    return [name for name in sorted(names & called.keys()) if called[name] < defined.get(name, len(text))]


def not_asked_for(text: str, names: set[str]) -> list[str]:
    """Return those of the lazy functions *names* that a text calls outside of `lazy`, and not as `lazy().name(…)`."""
    outside = re.sub(r"^function lazy\(\)$.*?^local made = .*?\nend\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return sorted(set(re.findall(r"(?<![.\w])(?<!function )(\w+)\b", outside)) & names)


def idle_parts(text: str, parts: dict[str, str]) -> list[str]:
    """Return the parts that a script names, and whose functions neither it nor a later part calls."""
    named = [*needs(text), *lazy(text)]
    later = {part: "".join(code(parts[one]) for one in named[place + 1 :]) for place, part in enumerate(named)}
    return [
        part
        for part in named
        if not any(re.search(rf"\b{name}\(", later[part] + code(text)) for name in functions(parts[part]))
    ]


def test_every_part_that_is_named_exists() -> None:
    """Each `needs` names parts that are there, once; only scripts name parts, and each part is named by a script."""
    assert needs("-- Do it.\n-- needs: one two\n--\nreturn 1\n-- needs: three\n") == ["one", "two"]
    assert needs("return 1\n-- needs: one\n") == []

    assert needs("-- needs: one two\n-- lazy: three\n", "lazy") == ["three"]

    named = {name: [*needs(text), *lazy(text)] for name, text in FILES.items()}
    assert {name: missing for name, found in named.items() if (missing := set(found) - PARTS.keys())} == {}
    assert {name: found for name, found in named.items() if len(found) != len(set(found))} == {}
    assert [name for name, text in FILES.items() if text.count("-- needs:") > 1] == []
    assert [name for name, text in FILES.items() if text.count("-- lazy:") > 1] == []
    assert [name for name, text in PARTS.items() if "-- needs:" in text or "-- lazy:" in text] == []
    assert PARTS.keys() - {part for found in named.values() for part in found} == set()


def test_no_part_is_named_in_vain() -> None:
    """A script, or a later part of its text, calls a function of each part that it names."""
    parts = {"one": "local function f()\nend\n", "two": "local function g()\n  f()\nend\n"}
    assert idle_parts("-- needs: one two\nreturn g()\n", parts) == []
    assert idle_parts("-- needs: one two\nreturn f() -- not g()\n", parts) == ["two"]
    assert idle_parts("-- needs: two one\nreturn g()\n", parts) == ["one"]

    found = {name: idle_parts(text, PARTS) for name, text in FILES.items()}
    assert {name: parts for name, parts in found.items() if parts} == {}


def test_nothing_is_defined_twice() -> None:
    """No text defines a function twice, and no two parts define one of the same name."""
    assert doubled("local function f()\nend\n  local function f(a)\n  end\nlocal function ff()\nend\n") == ["f"]

    assert {name: found for name in FILES if (found := doubled(Script(name).text))} == {}
    assert doubled("".join(PARTS.values())) == []


def test_functions_are_defined_before_they_are_called() -> None:
    """A text has each function of a part that it calls, and has it before the call: any other name is an error at run time."""
    text = "local function f()\n  g()\nend\nlocal function g()\nend\nf()\nredis.call('h()')\nx.k()\n"
    assert called_before_defined(text, {"f", "g", "h", "k"}) == ["g"]
    assert called_before_defined("f(1)\n", {"f"}) == ["f"]

    names = set(functions("".join(PARTS.values())))
    assert len(names) > 20
    found = {name: called_before_defined(code(Script(name).text), names) for name in FILES}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_lazy_functions_are_asked_for() -> None:
    """
    A call of a lazy function, from outside of the lazy parts, asks for it, and no call asks for one that is not there: any other
    name is an error at run time.
    """
    text = "local lazy\nlocal function f()\ng()\nend\nfunction lazy()\ng()\nlocal made = {g = g}\nreturn made\nend\nlazy().g()\n"
    assert not_asked_for(text, {"g"}) == ["g"]
    assert not_asked_for(text.replace("\ng()", "", 1), {"g"}) == []

    for name, text in FILES.items():
        names = set(functions("".join(PARTS[part] for part in lazy(text))))
        whole = Script(name).code
        assert not_asked_for(code(whole), names) == [], name
        assert set(re.findall(r"\blazy\(\)\.(\w+)", whole)) <= names, name


def test_texts_are_the_parts_and_the_file() -> None:
    """A text is its parts in the order of the header, then the file, without comments, empty lines and indentation, whatever the order in a folder."""
    assert Script("held_ids").text != without_comments(FILES["held_ids"])
    assert Script("wake").text == without_comments(FILES["wake"]) != FILES["wake"]
    assert "[[" not in "".join([*FILES.values(), *PARTS.values()])  # no text of several lines could hold such a line
    for line in "".join([*FILES.values(), *PARTS.values()]).splitlines():
        code, comment, _ = line.partition(" -- ")
        assert not comment or code.count("'") % 2 == 0, f"what is no comment looks like one: {line}"

    for name, text in FILES.items():
        parts = [*(PARTS[part] for part in needs(text))]
        if lazy(text):
            made = ", ".join(
                f"{one} = {one}" for one in sorted(set(re.findall(r"\blazy\(\)\.(\w+)", "".join([*parts, text]))))
            )
            parts = ["local lazy\n", *parts, "function lazy()\n", "if KEYS.lazy then return KEYS.lazy end\n"]
            parts += [*(PARTS[part] for part in lazy(text))]
            parts += [f"local made = {{{made}}}\n", "KEYS.lazy = made\n", "return made\nend\n"]
        assert Script(name).text == without_comments("".join([*parts, text])), name


def test_digests_are_stable() -> None:
    """The same release makes the same texts: put together again, and in another process with another hash seed."""
    names = sorted(FILES)
    digests = [sha1(Script(name).text.encode()).hexdigest() for name in names]
    assert [Script(name).sha for name in names] == digests
    assert len(set(digests)) == len(names)

    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = [sys.executable, "-c", _DIGESTS, *names]
        assert subprocess.check_output(run, env=environment, text=True).split() == digests


def test_texts_stay_small() -> None:
    """
    Print the size of each text. A server that does not know a script gets the whole text with the call.

    The turn is the largest: groups and limits are most of it.
    """
    sizes = {name: (len(Script(name).text.encode()), Script(name).text.count("\n")) for name in FILES}
    for name, (size, lines) in sorted(sizes.items(), key=lambda item: -item[1][0]):
        print(f"{name:16} {size:6} bytes {lines:4} lines   {Script(name).sha}   {' '.join(needs(FILES[name]))}")

    assert max(size for size, _ in sizes.values()) < 84 * 1024
    assert sum(size for size, _ in sizes.values()) < 768 * 1024


def test_a_publish_has_the_parts_of_a_push() -> None:
    """publish.lua and schedule_fire.lua store what push.lua would: they need the same parts in the same order, and their own."""
    parts = needs(FILES["push"])
    assert needs(FILES["publish"]) == [*parts, "topics"]
    assert needs(FILES["schedule_fire"]) == [*(part for part in parts if part != "sequence"), "schedules"]
