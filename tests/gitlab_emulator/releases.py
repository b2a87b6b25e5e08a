"""Tags and releases with their links (doc/api/tags.md, doc/api/releases/index.md, doc/api/releases/links.md)."""

from typing import Any

from tests.gitlab_emulator.git import git
from tests.gitlab_emulator.paging import paged
from tests.gitlab_emulator.protection import may_create_tag, rules_of
from tests.gitlab_emulator.rights import MAINTAINER
from tests.gitlab_emulator.routing import ApiError, Call, not_found, route
from tests.gitlab_emulator.state import Json, Project, now

RELEASES = "/projects/:id/releases"
PROTECTED = "You are not allowed to create this tag as it is protected."
DESCRIPTION_LIMIT = 1_000_000  # characters
LINK_TYPES = ("other", "runbook", "image", "package")


def check_tag_right(call: Call, tag: str, told: str = "403 Forbidden") -> None:
    """Raises ApiError for a release of a tag that the token's user may not create: ReleasePolicy, for its links as well."""
    assert call.token is not None
    if not may_create_tag(tag, call.token.access_level, call.project.protected_tags):
        raise ApiError(403, told)


def checked_description(call: Call, before: str = "") -> str:
    """Of the call, else the one before. Raises ApiError for one that is too long (Release validates it)."""
    description = str(call.get("description", before))
    if len(description) > DESCRIPTION_LIMIT:
        raise ApiError(400, f"Description is too long (maximum is {DESCRIPTION_LIMIT} characters)")
    return description


def all_tags(project: Project) -> dict[str, Json]:
    """By name; those of the repository where there is one."""
    if project.repository is None:
        return project.tags
    form = "%(refname:strip=2)%00%(objectname)%00%(*objectname)%00%(contents)%00%01"
    listed = git(project.repository, "for-each-ref", f"--format={form}", "refs/tags")
    found = {}
    for entry in listed.split("\x01")[:-1]:
        name, target, peeled, message = entry.strip("\n").split("\0")[:4]
        commit = {"id": peeled or target}
        text = message.strip() if peeled else ""
        found[name] = {
            "name": name,
            "message": text,
            "target": target,
            "commit": commit,
        }
    return found


def add_tag(call: Call, name: str, ref: str, message: str = "") -> Json:
    """An annotated tag where there is a message. Raises ApiError when git does not know `ref`, or likes it not."""
    project = call.project
    if project.repository is None:
        project.tags[name] = {
            "name": name,
            "message": message,
            "target": ref,
            "commit": {"id": ref},
        }
        return project.tags[name]
    commit = git(project.repository, "rev-parse", "--verify", f"{ref}^{{commit}}", check=False)
    if not commit:
        raise ApiError(400, f"Target {ref} is invalid")
    options = ["--annotate", "--cleanup=verbatim", "--message", message] if message else []
    git(project.repository, "tag", *options, name, commit)
    return all_tags(project)[name]


@route("GET", "/projects/:id/repository/tags")
def list_tags(call: Call) -> Any:
    rules = call.project.protected_tags
    tags = [
        tag | {"protected": bool(rules_of(tag["name"], rules))} for tag in all_tags(call.project).values()
    ]
    return paged(call, tags[::-1], f"/projects/{call.project.id}/repository/tags")


@route("POST", "/projects/:id/repository/tags")
def create_tag(call: Call) -> Any:
    name, ref = call.require("tag_name", "ref")
    assert call.token is not None
    if not may_create_tag(name, call.token.access_level, call.project.protected_tags):
        raise ApiError(400, PROTECTED)
    if name in all_tags(call.project):
        raise ApiError(400, f"Tag {name} already exists")
    return add_tag(call, name, ref, call.get("message", ""))


@route("GET", "/projects/:id/repository/tags/:tag")
def get_tag(call: Call) -> Any:
    tags = all_tags(call.project)
    if call["tag"] not in tags:
        raise not_found("Tag")
    return tags[call["tag"]] | {"protected": bool(rules_of(call["tag"], call.project.protected_tags))}


@route("DELETE", "/projects/:id/repository/tags/:tag")
def delete_tag(call: Call) -> Any:
    """A protected one goes by a Maintainer's hand only, here and not by git."""
    name, project = call["tag"], call.project
    if name not in all_tags(project):
        raise not_found("Tag")
    assert call.token is not None
    if rules_of(name, project.protected_tags) and call.token.access_level < MAINTAINER:
        raise ApiError(403, "403 Forbidden")
    if project.repository is None:
        del project.tags[name]
    else:
        git(project.repository, "tag", "--delete", name)


@route("GET", RELEASES)
def list_releases(call: Call) -> Any:
    """By the time of the release, newest first."""
    return paged(call, list(call.project.releases.values())[::-1], f"/projects/{call.project.id}/releases")


@route("POST", RELEASES)
def create_release(call: Call) -> Any:
    """409 if there is one. Makes the tag from `ref` where it is missing; 422 if that is missing too.

    403 for a protected tag that one may not create, be it there or not (Releases::CreateService).
    """
    [tag] = call.require("tag_name")
    check_tag_right(call, tag, PROTECTED)
    if tag in call.project.releases:
        raise ApiError(409, "Release already exists")
    links = [_checked_link(call, link, []) for link in (call.get("assets") or {}).get("links", [])]
    description = checked_description(call)
    if tag not in all_tags(call.project):
        if call.get("ref") is None:
            raise ApiError(422, "Ref is not specified")
        add_tag(call, tag, call.get("ref"), call.get("tag_message") or "")
    release = {
        "tag_name": tag,
        "name": call.get("name") or tag,
        "description": description,
        "created_at": now(),
        "released_at": now(),
        "commit": all_tags(call.project)[tag]["commit"],
        "assets": {"count": len(links), "links": links},
        "_links": {"self": f"{call.project_url}/-/releases/{tag}"},
    }
    call.project.releases[tag] = release
    return release


def _release(call: Call, to_write: bool = False) -> Json:
    if call["tag"] not in call.project.releases:
        raise not_found()
    if to_write:
        check_tag_right(call, call["tag"])
    return call.project.releases[call["tag"]]


@route("GET", f"{RELEASES}/:tag")
def get_release(call: Call) -> Any:
    return _release(call)


@route("PUT", f"{RELEASES}/:tag")
def update_release(call: Call) -> Any:
    """name, description, released_at. Links have routes of their own."""
    release = _release(call, to_write=True)
    release["description"] = checked_description(call, release["description"])
    for name in ("name", "released_at"):
        release[name] = call.get(name, release[name])
    return release


@route("DELETE", f"{RELEASES}/:tag")
def delete_release(call: Call) -> Any:
    """The tag stays."""
    release = _release(call, to_write=True)
    del call.project.releases[call["tag"]]
    return release


LINKS = f"{RELEASES}/:tag/assets/links"


def _checked_link(call: Call, link: Json, others: list[Json]) -> Json:
    """Name and address are required, and each is unique within the release."""
    if not link.get("name") or not link.get("url"):
        raise ApiError(400, {"error": "assets[links][name] or assets[links][url] is missing"})
    if not str(link["url"]).startswith(("http://", "https://", "ftp://")):
        raise ApiError(400, {"message": {"url": ["is blocked: Only allowed schemes are http, https, ftp"]}})
    if link.get("link_type", "other") not in LINK_TYPES:
        raise ApiError(400, {"error": "link_type does not have a valid value"})
    for name in ("name", "url"):
        if any(other[name] == link[name] for other in others):
            raise ApiError(400, {"message": {name: ["has already been taken"]}})
    kept = {name: link[name] for name in ("name", "url")}
    return {"id": call.state.new_id(), "link_type": link.get("link_type", "other"), **kept}


@route("GET", LINKS)
def list_links(call: Call) -> Any:
    path = f"/projects/{call.project.id}/releases/{call['tag']}/assets/links"
    return paged(call, _release(call)["assets"]["links"][::-1], path)


@route("POST", LINKS)
def create_link(call: Call) -> Any:
    links = _release(call, to_write=True)["assets"]["links"]
    links.append(_checked_link(call, call.data, links))
    return links[-1]


@route("PUT", f"{LINKS}/:link_id")
def update_link(call: Call) -> Any:
    links = _release(call, to_write=True)["assets"]["links"]
    for place, link in enumerate(links):
        if str(link["id"]) == call["link_id"]:
            others = links[:place] + links[place + 1 :]
            links[place] = _checked_link(call, link | call.data, others) | {"id": link["id"]}
            return links[place]
    raise not_found()


@route("DELETE", f"{LINKS}/:link_id")
def delete_link(call: Call) -> Any:
    links = _release(call, to_write=True)["assets"]["links"]
    for link in links:
        if str(link["id"]) == call["link_id"]:
            links.remove(link)
            return link
    raise not_found()
