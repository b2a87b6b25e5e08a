"""Protected branches, tags and container tags: who may push, merge, make or delete what.

Behaviour of doc/user/project/repository/branches/protected.md, doc/user/project/protected_tags.md,
doc/user/packages/container_registry/protected_container_tags.md and Gitlab::UserAccess. A level is a role, 0 nobody.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER, NO_ACCESS


@dataclass(frozen=True)
class BranchRule:
    push: int = MAINTAINER
    merge: int = MAINTAINER
    force_push: bool = False


@dataclass(frozen=True)
class TagRule:
    create: int = MAINTAINER


@dataclass(frozen=True)
class ContainerTagRule:
    """`pattern` is a regular expression that the whole tag matches, as GitLab's RE2 reads it."""

    id: int
    pattern: str
    push: int = MAINTAINER
    delete: int = MAINTAINER


Rule = TypeVar("Rule", BranchRule, TagRule)


def rules_of(name: str, rules: Mapping[str, Rule]) -> list[Rule]:
    """Those that protect the branch or tag: `*` stands for any text, `/` included (RefMatcher)."""
    return [rule for pattern, rule in rules.items() if matches(pattern, name)]


def matches(pattern: str, name: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def allowed(level: int, needed: int) -> bool:
    return needed != NO_ACCESS and level >= needed


def may_push(name: str, level: int, rules: Mapping[str, BranchRule]) -> bool:
    """The most generous of the rules counts; a branch that is not protected takes a Developer's push."""
    found = rules_of(name, rules)
    return any(allowed(level, rule.push) for rule in found) if found else level >= DEVELOPER


def may_merge(name: str, level: int, rules: Mapping[str, BranchRule]) -> bool:
    found = rules_of(name, rules)
    if not found:
        return level >= DEVELOPER
    return any(allowed(level, rule.merge) or allowed(level, rule.push) for rule in found)


def may_create_tag(name: str, level: int, rules: Mapping[str, TagRule]) -> bool:
    found = rules_of(name, rules)
    return any(allowed(level, rule.create) for rule in found) if found else level >= DEVELOPER


def refused_image(tag: str, level: int, rules: Sequence[ContainerTagRule], action: str = "push") -> bool:
    """Whether a Developer's right to push or delete image tags ends at a protected one; all rules that match count."""
    needed = [getattr(rule, action) for rule in rules if re.fullmatch(rule.pattern, tag)]
    return level < max(needed, default=DEVELOPER)


def refused_push(
    ref: str,
    change: str,
    level: int,
    branches: Mapping[str, BranchRule],
    tags: Mapping[str, TagRule],
    default_branch: str,
) -> str | None:
    """Why GitLab refuses a ref of a push by HTTP, in its words; None if it does not.

    `change` is create, update, rewrite (not a fast-forward) or delete. Read in Gitlab::Checks::BranchCheck and TagCheck.
    """
    kind, _, name = ref.removeprefix("refs/").partition("/")
    if kind == "tags":
        return _refused_tag(name, change, level, tags)
    if kind != "heads":
        return None
    protected = rules_of(name, branches)
    if change == "delete" and name == default_branch:
        return "The default branch of a project cannot be deleted."
    if change == "rewrite" and protected and not any(rule.force_push for rule in protected):
        return "You are not allowed to force push code to a protected branch on this project."
    if change == "delete" and protected:
        if level < MAINTAINER:
            return (
                "You are not allowed to delete protected branches from this project. "
                "Only a project maintainer or owner can delete a protected branch."
            )
        return "You can only delete protected branches using the web interface."
    if not may_push(name, level, branches):
        return "You are not allowed to push code to protected branches on this project."
    return None


def _refused_tag(name: str, change: str, level: int, tags: Mapping[str, TagRule]) -> str | None:
    protected = rules_of(name, tags)
    if change != "create" and level < DEVELOPER:
        return "You are not allowed to change existing tags on this project."
    if protected and change in ("update", "rewrite"):
        return "Protected tags cannot be updated."
    if protected and change == "delete":
        if level < MAINTAINER:
            return (
                "You are not allowed to delete protected tags from this project. "
                "Only a project maintainer or owner can delete a protected tag."
            )
        return "You can only delete protected tags using the web interface."
    if change == "create" and not may_create_tag(name, level, tags):
        return "You are not allowed to create this tag as it is protected."
    return None
