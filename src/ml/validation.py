"""What is wrong with a file's or the environment's values, in words that a person can act on."""

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator

from ml.errors import UserError

MOST = 5  # problems that are told of one file
# Cc control, Cf format (zero width, BOM, bidi overrides), Cs lone surrogates (no UTF-8), Zl, Zp and Zs other blanks
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
# What is in files of keys, JSON or known hosts, and in no path of one.
CONTENT = re.compile(r"\n\S|^\s*[\[{]|-----BEGIN|\b(ssh|ecdsa|sk-ssh|sk-ecdsa)-\S+ AAAA")

Kind = Literal["value", "token", "line", "file", "command", "text"]


def checked(value: str, kind: Kind = "value") -> str:
    """`value`, where nothing in it is invisible; raises ValueError that describes it and never quotes it.

    Args:
        kind: what may be in it: "value": visible characters, blanks in the middle; "token": what an HTTP header
            takes, so visible ASCII without blanks; "line": the same as a value, for JSON in one line; "file": the path
            of a variable of type File, no content; "command": lines as well; "text": anything, as people wrote it
            elsewhere, with a replacement character for what is no UTF-8.
    """
    if kind == "text":
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if kind == "file" and CONTENT.search(value):
        raise ValueError("holds the content of a file, and a path is needed: make it a variable of type File")
    if kind == "line" and value.startswith("/"):
        raise ValueError(
            "holds the path of a file, and its content is needed: make it a variable of type Variable"
        )
    allowed = "\n\t " if kind == "command" else "" if kind == "token" else " "
    for place, character in enumerate(value):
        if character in allowed or unicodedata.category(character) not in INVISIBLE:
            continue
        where = "at its end" if place == len(value) - 1 else f"as character {place + 1} of {len(value)}"
        remedy = "; write it in one line" if kind == "line" and character in "\r\n" else ""
        raise ValueError(f"has {described(character)} {where}{remedy}")
    if kind != "command" and value != value.strip():
        raise ValueError(f"{'begins' if value[0] == ' ' else 'ends'} with a blank")
    if kind == "token" and not value.isascii():
        raise ValueError("has a character that is not ASCII, which no token has")
    return value


def described(character: str) -> str:
    """In words, as it cannot be seen."""
    if character in "\r\n":
        return "a line break"
    if character == " ":
        return "a blank"
    if "\udc80" <= character <= "\udcff":
        return "a byte that is no UTF-8"
    name = unicodedata.name(character, "")
    return f"an invisible character, U+{ord(character):04X}{f' ({name.lower()})' if name else ''}"


@dataclass(frozen=True)
class Holds:
    """Of a field of settings: `field: Annotated[str | None, Holds("command")]`. Without one it holds a "value"."""

    kind: Kind


class Environment(BaseModel):
    """A base of settings: what each variable may hold is checked before it is parsed."""

    @field_validator("*", mode="before")
    @classmethod
    def checked(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        marks = cls.model_fields[str(info.field_name)].metadata
        return checked(value, next((mark.kind for mark in marks if isinstance(mark, Holds)), "value"))


def check_environment(names: Iterable[str], files: Iterable[str] = ()) -> None:
    """Refuse invisible characters in variables that no `Settings` has: credentials that libraries read themselves.

    Raises UserError naming each bad variable of `names`, or of `files`, which hold paths; never a value.
    """
    kinds: dict[str, Kind] = {**dict.fromkeys(names, "value"), **dict.fromkeys(files, "file")}
    found = {}
    for name, kind in kinds.items():
        try:
            checked(os.environ.get(name, ""), kind)
        except ValueError as error:
            found[name] = str(error)
    if found:
        raise bad_variables(found)


def problems(error: ValidationError) -> str:
    """One line: each key and what is wrong with it."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:MOST])


def bad_environment(error: ValidationError) -> UserError:
    """Names each bad variable, never its value: it may be a secret."""
    return bad_variables(
        {str(each["loc"][0]).upper(): each["msg"].removeprefix("Value error, ") for each in error.errors()}
    )


def bad_variables(found: dict[str, str]) -> UserError:
    lines = [f"  {name}: {problem}" for name, problem in found.items()]
    return UserError("The environment has bad variables; correct or unset them:\n" + "\n".join(lines))
