"""The GitLab release of a model: the reviewed comment, the model card, checksums, and the files as generic packages.

Everything is looked at before it is written, so repeating it changes nothing: a file with the same bytes is not
uploaded again, a release or a link that exists is updated. Packages can be written by Developers, and a second upload
of a name hides the first one; so what is downloaded has to have the sum that stands in the release's tag.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gitlab.exceptions import GitlabError

from ml.errors import UserError
from ml.release.access import Project
from ml.release.tag import SUMS, Tag
from ml.release.version import Version

PACKAGE = "model"  # generic package; its versions are the model's
TEXT_LIMIT = 400_000  # characters of the comment and of the model card; GitLab takes a million in all
PICTURE = re.compile(r"!\[(?P<alt>[^\]\n]*)\]\((?!https?://|/uploads/)[^)\n]*\)")
IMAGE_LINK = "image"  # name of the link to the image that was deployed and passed its smoke test


@dataclass(frozen=True)
class Asset:
    name: str
    url: str
    sha256: str
    size: int  # bytes


def package_path(version: Version, name: str) -> str:
    return f"/packages/generic/{PACKAGE}/{version}/{quote(name, safe='')}"


def upload(project: Project, version: Version, name: str, content: bytes) -> tuple[Asset, bytes | None]:
    """The file in the project's package registry, and what lay there before under its name. Raises GitlabError."""
    path = package_path(version, name)
    before = project.raw(path)
    if before != content:
        project.client.http_request(
            "put",
            f"{project.path}{path}",
            post_data=content,
            raw=True,
            extra_headers={"Content-type": "application/octet-stream"},
        )
    url = f"{project.client.api_url}{project.path}{path}"
    return Asset(name, url, sha256(content), len(content)), before


def download(project: Project, tag: Tag, name: str) -> bytes | None:
    """The file as it was released; None where the tag does not name it, or its package has it no more.

    Raises GitlabError, and UserError when somebody has put other bytes in its place.
    """
    if name not in tag.sums:
        return None
    content = project.raw(package_path(tag.version, name))
    if content is not None and sha256(content) != tag.sums[name]:
        raise UserError(
            f"{name} in the package {PACKAGE}/{tag.version} is not the file that {tag.name} was released with: its "
            f"sha256 is {sha256(content)}, and {SUMS} in the tag says {tag.sums[name]}. Somebody with the role Developer "
            "or higher has put it there: look who, delete that file of the package (Deploy → Package registry), then run "
            "the job again."
        )
    return content


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read(project: Project, tag: str) -> dict[str, Any] | None:
    try:
        return dict(project.get(f"/releases/{quote(tag, safe='')}"))
    except GitlabError as error:
        if error.response_code == 404:
            return None
        raise


def write(project: Project, tag: str, name: str, description: str) -> tuple[str, bool]:
    """Make or update the release of a tag that is there; its address and whether it is new. Raises GitlabError."""
    fields = {"name": name, "description": description}
    found, new = read(project, tag), False
    if found is None:
        try:
            project.client.http_post(f"{project.path}/releases", post_data={"tag_name": tag, **fields})
            new = True
        except GitlabError as error:
            if error.response_code != 409:  # 409: an earlier answer got lost, and it is there now
                raise
        found = read(project, tag) or {}
    if any(found.get(key) != value for key, value in fields.items()):
        project.client.http_put(f"{project.path}/releases/{quote(tag, safe='')}", post_data=fields)
    return str(found.get("_links", {}).get("self", tag)), new


def link(project: Project, tag: str, name: str, url: str, kind: str) -> str | None:
    """Give the release this link; where one of the same name led elsewhere before. Raises GitlabError."""
    path = f"{project.path}/releases/{quote(tag, safe='')}/assets/links"
    fields = {"name": name, "url": url, "link_type": kind}
    found = next((each for each in links(project, tag) if each["name"] == name), None)
    if found is None:
        project.client.http_post(path, post_data=fields)
    elif found["url"] != url:
        project.client.http_put(f"{path}/{found['id']}", post_data=fields)
        return str(found["url"])
    return None


def links(project: Project, tag: str) -> list[dict[str, Any]]:
    return project.all(f"/releases/{quote(tag, safe='')}/assets/links")


def image_of(release: dict[str, Any]) -> str | None:
    """The image, by digest, that was last deployed from this release and answered as it should."""
    links = release.get("assets", {}).get("links", [])
    found = next((str(each["url"]) for each in links if each["name"] == IMAGE_LINK), None)
    return found.removeprefix("https://") if found else None


def describe(
    tag: str,
    summary: list[tuple[str, str]],
    comment: str | None,
    card: str,
    assets: list[Asset],
    merge_request: str | None,
) -> str:
    """The release's text as Markdown."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary)
    blocks = [f"| | |\n|---|---|\n{rows}"]
    if comment:
        blocks += ["## What the reviewers saw", cut(PICTURE.sub(r"*\g<alt>*", comment))]
    blocks += [folded("Model card", cut(card))]
    if assets:
        sums = "\n".join(
            f"| [{each.name}]({each.url}) | `{each.sha256}` | {each.size:,} |" for each in assets
        )
        blocks += [
            "## Files",
            f"| file | sha256 | bytes |\n|---|---|---:|\n{sums}",
            f"The sums stand in the tag's message, too: `git tag --list --format='%(contents)' {tag}`. Trust those.",
        ]
    blocks += [
        "## The same bytes again",
        f"```sh\npython -m ml.release.reproduce {tag}\n```",
    ]
    if merge_request:
        blocks.append(f"Reviewed in {merge_request}")
    return "\n\n".join(blocks) + "\n"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def cut(text: str) -> str:
    text = text.strip("\n")
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}\n\n… (cut)"


def checksums(sums: dict[str, str]) -> str:
    """What `sha256sum --check` reads."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def files_of(bundle: Path, *more: Path) -> dict[str, bytes]:
    """Name to content, of the bundle's files and `more`."""
    paths = [*sorted(bundle.iterdir()), *more]
    return {path.name: path.read_bytes() for path in paths}
