"""Drive's search terms, as "Search for files and folders" documents them for version 2 of the API: a `q` in, a test out.

Only the terms that are needed here are known: title, mimeType, trashed, and `'ID' in parents`; and, or, not, parentheses.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Searched:
    title: str
    mime: str
    parents: list[str]
    trashed: bool


Test = Callable[[Searched], bool]
TOKEN = re.compile(r"\s*(?:(?P<string>'(?:\\.|[^'\\])*')|(?P<word>[A-Za-z]+)|(?P<sign>!=|<=|>=|[=<>()]))")


class BadQuery(Exception):
    """Drive answers 400, reason `invalid`."""


class Query:
    """Raises BadQuery. `parents` are the ids that it asks for, each of which has to be there."""

    def __init__(self, text: str) -> None:
        self.parents: list[str] = []
        self.tokens: list[str] = []
        end = 0
        while text[end:].strip():
            token = TOKEN.match(text, end)
            if token is None:
                raise BadQuery(text[end:])
            self.tokens.append(token.group().strip())
            end = token.end()
        self.test = self.alternatives()
        if self.tokens:
            raise BadQuery(self.tokens[0])

    def next(self, *expected: str) -> str:
        token = self.tokens.pop(0) if self.tokens else ""
        if not token or (expected and token not in expected):
            raise BadQuery(token)
        return token

    def string(self) -> str:
        token = self.next()
        if not token.startswith("'"):
            raise BadQuery(token)
        return re.sub(r"\\(.)", r"\1", token[1:-1])

    def at(self, word: str) -> bool:
        """Take the word where it is next."""
        if self.tokens[:1] == [word]:
            self.tokens.pop(0)
            return True
        return False

    def alternatives(self) -> Test:
        tests = [self.conditions()]
        while self.at("or"):
            tests.append(self.conditions())
        return lambda file: any(test(file) for test in tests)

    def conditions(self) -> Test:
        tests = [self.condition()]
        while self.at("and"):
            tests.append(self.condition())
        return lambda file: all(test(file) for test in tests)

    def condition(self) -> Test:
        if self.at("not"):
            inner = self.condition()
            return lambda file: not inner(file)
        if self.at("("):
            inner = self.alternatives()
            self.next(")")
            return inner
        if self.tokens and self.tokens[0].startswith("'"):
            parent = self.string()
            self.next("in")
            self.next("parents")
            self.parents.append(parent)
            return lambda file: parent in file.parents
        term = self.next("title", "mimeType", "trashed")
        sign = self.next("=", "!=")
        if term == "trashed":
            wanted = self.next("true", "false") == "true"
            test: Test = lambda file: file.trashed == wanted
        elif term == "title":  # Drive does not tell A from a
            title = self.string().casefold()
            test = lambda file: file.title.casefold() == title
        else:
            mime = self.string()
            test = lambda file: file.mime == mime
        return test if sign == "=" else lambda file: not test(file)
