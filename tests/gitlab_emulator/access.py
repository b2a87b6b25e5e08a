"""Tokens, members, protection and variables: who may do what, as the API shows and changes it.

doc/api/personal_access_tokens.md, members.md, protected_branches.md, protected_tags.md,
container_registry_protection_tag_rules.md, project_level_variables.md, jobs.md "Get job token's job".
"""

import re
from typing import Any

from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.protection import BranchRule, ContainerTagRule, TagRule
from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER, NO_ACCESS, ROLES
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import Json, Variable
from tests.gitlab_emulator.views import user_json

# ---- Tokens and members


@route("GET", "/personal_access_tokens/self")
def get_own_token(call: Call) -> Any:
    """The token that asks, whatever its scopes."""
    token = call.token
    assert token is not None
    return {
        "id": token.id,
        "name": token.name,
        "revoked": token.revoked,
        "scopes": sorted(token.scopes),
        "user_id": token.user.id,
        "active": not token.revoked and not token.expired,
        "expires_at": token.expires_at and token.expires_at.isoformat(),
    }


@route("GET", "/job")
def get_own_job(call: Call) -> Any:
    """The job of a job token; 404 for any other token."""
    assert call.token is not None
    if not call.token.is_job:
        raise not_found("Job")
    return {
        "id": call.token.id,
        "name": call.token.name,
        "status": "running",
        "user": user_json(call.token.user, call.base_url),
    }


@route("GET", "/projects/:id/members/all")
def list_members(call: Call) -> Any:
    found = [_member(call, user_id) for user_id in call.project.members]
    return paged(call, found, f"/projects/{call.project.id}/members/all")


@route("GET", "/projects/:id/members/all/:user_id")
def get_member(call: Call) -> Any:
    user_id = int(call["user_id"]) if call["user_id"].isdecimal() else 0
    if user_id not in call.project.members:
        raise not_found()
    return _member(call, user_id)


def _member(call: Call, user_id: int) -> Json:
    user = next(token.user for token in call.state.tokens.values() if token.user.id == user_id)
    shown = user_json(user, call.base_url)
    return shown | {"access_level": call.project.members[user_id], "expires_at": None}


# ---- Protected branches and tags


def _level(call: Call, name: str, lowest: int = NO_ACCESS) -> int:
    """A role from a parameter; Maintainer where it is not given."""
    level = int(call.get(name, MAINTAINER))
    if level not in (lowest, DEVELOPER, MAINTAINER):
        raise ApiError(400, {"error": f"{name} does not have a valid value"})
    return level


def _levels(level: int) -> list[Json]:
    return [{"id": level + 1, "access_level": level, "access_level_description": ROLES[level]}]


def _branch_json(name: str, rule: BranchRule) -> Json:
    return {
        "id": 1,
        "name": name,
        "push_access_levels": _levels(rule.push),
        "merge_access_levels": _levels(rule.merge),
        "allow_force_push": rule.force_push,
    }


def _tag_json(name: str, rule: TagRule) -> Json:
    return {"name": name, "create_access_levels": _levels(rule.create)}


@route("GET", "/projects/:id/protected_branches")
def list_protected_branches(call: Call) -> Any:
    shown = [_branch_json(name, rule) for name, rule in call.project.protected_branches.items()]
    return paged(call, shown, f"/projects/{call.project.id}/protected_branches")


@route("GET", "/projects/:id/protected_branches/:name")
def get_protected_branch(call: Call) -> Any:
    if call["name"] not in call.project.protected_branches:
        raise not_found()
    return _branch_json(call["name"], call.project.protected_branches[call["name"]])


@route("POST", "/projects/:id/protected_branches")
def protect_branch(call: Call) -> Any:
    [name] = call.require("name")
    if name in call.project.protected_branches:
        raise ApiError(409, f"Protected branch '{name}' already exists")
    force = str(call.get("allow_force_push", "false")).lower() == "true"
    rule = BranchRule(_level(call, "push_access_level"), _level(call, "merge_access_level"), force)
    call.project.protected_branches[name] = rule
    return _branch_json(name, rule)


@route("DELETE", "/projects/:id/protected_branches/:name")
def unprotect_branch(call: Call) -> Any:
    if call.project.protected_branches.pop(call["name"], None) is None:
        raise not_found()


@route("GET", "/projects/:id/protected_tags")
def list_protected_tags(call: Call) -> Any:
    shown = [_tag_json(name, rule) for name, rule in call.project.protected_tags.items()]
    return paged(call, shown, f"/projects/{call.project.id}/protected_tags")


@route("GET", "/projects/:id/protected_tags/:name")
def get_protected_tag(call: Call) -> Any:
    if call["name"] not in call.project.protected_tags:
        raise not_found()
    return _tag_json(call["name"], call.project.protected_tags[call["name"]])


@route("POST", "/projects/:id/protected_tags")
def protect_tag(call: Call) -> Any:
    [name] = call.require("name")
    if name in call.project.protected_tags:
        raise ApiError(409, f"Protected tag '{name}' already exists")
    call.project.protected_tags[name] = TagRule(_level(call, "create_access_level"))
    return _tag_json(name, call.project.protected_tags[name])


@route("DELETE", "/projects/:id/protected_tags/:name")
def unprotect_tag(call: Call) -> Any:
    if call.project.protected_tags.pop(call["name"], None) is None:
        raise not_found()


# ---- Protected container tags

_REGISTRY_LEVELS = {"maintainer": 40, "owner": 50, "admin": 60}


def _rule_json(call: Call, rule: ContainerTagRule) -> Json:
    names = {level: name for name, level in _REGISTRY_LEVELS.items()}
    return {
        "id": rule.id,
        "project_id": call.project.id,
        "tag_name_pattern": rule.pattern,
        "minimum_access_level_for_push": names[rule.push],
        "minimum_access_level_for_delete": names[rule.delete],
    }


@route("GET", "/projects/:id/registry/protection/tag/rules")
def list_container_tag_rules(call: Call) -> Any:
    path = f"/projects/{call.project.id}/registry/protection/tag/rules"
    return paged(call, call.project.protected_container_tags, path, lambda rule: _rule_json(call, rule))


@route("POST", "/projects/:id/registry/protection/tag/rules")
def protect_container_tag(call: Call) -> Any:
    """At most five in a project; the pattern is a regular expression."""
    [pattern, push, delete] = call.require(
        "tag_name_pattern", "minimum_access_level_for_push", "minimum_access_level_for_delete"
    )
    for level in (push, delete):
        if level not in _REGISTRY_LEVELS:
            raise ApiError(400, {"error": "minimum_access_level_for_push does not have a valid value"})
    try:
        re.compile(pattern)
    except re.error:
        raise ApiError(422, {"message": ["Tag name pattern not valid RE2 syntax"]}) from None
    if len(call.project.protected_container_tags) == 5:
        raise ApiError(422, {"message": ["Maximum number of protection rules have been reached."]})
    rule = ContainerTagRule(call.state.new_id(), pattern, _REGISTRY_LEVELS[push], _REGISTRY_LEVELS[delete])
    call.project.protected_container_tags.append(rule)
    return _rule_json(call, rule)


# ---- Variables

_KEY = re.compile(r"[A-Za-z0-9_]{1,255}")
# Ci::Maskable: one line of at least eight characters, none of them blank, and few kinds unless the value is raw.
_MASKABLE = {True: re.compile(r"\S{8,}"), False: re.compile(r"[a-zA-Z0-9_+=/@:.~-]{8,}")}


def _variable_json(variable: Variable) -> Json:
    return {
        "variable_type": variable.kind,
        "key": variable.key,
        "value": None if variable.hidden else variable.value,
        "protected": variable.protected,
        "masked": variable.masked,
        "hidden": variable.hidden,
        "raw": variable.raw,
        "environment_scope": variable.scope,
        "description": None,
    }


def _flag(call: Call, name: str, default: bool = False) -> bool:
    return str(call.get(name, default)).lower() in ("true", "1")


def _checked(call: Call, old: Variable | None, key: str) -> Variable:
    """Raises ApiError for what GitLab does not keep: a masked value with a line break, a blank or too few characters."""
    old = old or Variable(key, "")
    hidden = old.hidden or _flag(call, "masked_and_hidden")
    variable = Variable(
        key,
        str(call.get("value", old.value)),
        call.get("environment_scope", old.scope),
        _flag(call, "protected", old.protected),
        hidden or _flag(call, "masked", old.masked),
        hidden,
        _flag(call, "raw", old.raw),
        call.get("variable_type", old.kind),
    )
    if not _KEY.fullmatch(key):
        raise ApiError(400, {"message": {"key": ["can contain only letters, digits and '_'."]}})
    if variable.masked and not _MASKABLE[variable.raw].fullmatch(variable.value):
        raise ApiError(400, {"message": {"value": ["is invalid"]}})
    return variable


def _find_variable(call: Call) -> Variable:
    """`filter[environment_scope]` tells variables of one name apart."""
    scope = call.query.get("filter[environment_scope]")
    for variable in call.project.variables:
        if variable.key == call["key"] and scope in (None, variable.scope):
            return variable
    raise not_found("Variable")


@route("GET", "/projects/:id/variables")
def list_variables(call: Call) -> Any:
    return paged(call, call.project.variables, f"/projects/{call.project.id}/variables", _variable_json)


@route("POST", "/projects/:id/variables")
def create_variable(call: Call) -> Any:
    key, _ = call.require("key", "value")
    variable = _checked(call, None, key)
    if any((known.key, known.scope) == (key, variable.scope) for known in call.project.variables):
        raise ApiError(400, {"message": {"key": [f"({key}) has already been taken"]}})
    call.project.variables.append(variable)
    return _variable_json(variable)


@route("GET", "/projects/:id/variables/:key")
def get_variable(call: Call) -> Any:
    return _variable_json(_find_variable(call))


@route("PUT", "/projects/:id/variables/:key")
def update_variable(call: Call) -> Any:
    old = _find_variable(call)
    variable = _checked(call, old, old.key)
    call.project.variables[call.project.variables.index(old)] = variable
    return _variable_json(variable)


@route("DELETE", "/projects/:id/variables/:key")
def delete_variable(call: Call) -> Any:
    call.project.variables.remove(_find_variable(call))
