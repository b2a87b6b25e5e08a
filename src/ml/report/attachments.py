"""The pictures of a report: read from inside its folder, uploaded once each, and linked."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ml.errors import UserError

COMMENT = Path("reports/comment.md")
PICTURES_LIMIT = 50  # pictures in a report
PICTURE_BYTES = 10_000_000  # of one picture
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")

# A code span or fence, which stays as it is, or the target of a Markdown link or image, or of an HTML attribute.
LINK_TARGET = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+)(?s:.*?)^(?P=fence)|(?<!`)(?P<ticks>`+)(?!`)[^\n]*?(?<!`)(?P=ticks)(?!`))"
    r'|(?P<before>\]\(|\b(?:src|href)=")(?P<target>[^)"\s]+)',
    re.MULTILINE,
)


def manifest_path(report: Path) -> Path:
    """The list of pictures that the report made: reports/comment.pictures.json for reports/comment.md."""
    return report.with_suffix(".pictures.json")


def read_manifest(path: Path) -> list[str]:
    """A JSON list of at most PICTURES_LIMIT picture paths, relative to the report's folder."""
    try:
        return TypeAdapter(Annotated[list[str], Field(max_length=PICTURES_LIMIT)]).validate_json(
            path.read_bytes()
        )
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing. Run `python -m ml.report.comment`, or leave out --pictures."
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f'{path} is no list of pictures such as ["plots/a.png"]: {problem}.') from None


def read_picture(folder: Path, name: str) -> bytes:
    """The bytes of the picture `name`, a relative path, from inside `folder`, following no symbolic link.

    Raises UserError for any other path, a missing or special file, another kind of file, or one that is too big.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(
            f"Picture {name!r} is not a relative path inside {folder}. Correct the list of pictures."
        )
    if not name.lower().endswith(PICTURE_SUFFIXES):
        raise UserError(
            f"Picture {name!r} is none of {', '.join(PICTURE_SUFFIXES)}. Correct the list of pictures."
        )
    try:
        with _open_inside(folder, parts) as file:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UserError(
                    f"Picture {folder / name} is not a regular file. Correct the list of pictures."
                )
            with os.fdopen(file, "rb", closefd=False) as stream:
                content = stream.read(PICTURE_BYTES + 1)
    except FileNotFoundError:
        raise UserError(
            f"Picture {folder / name} is missing. Run `python -m ml.report.comment` again."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise UserError(
            f"Picture {folder / name} is behind a symbolic link or a file. Put the file itself there."
        ) from None
    if len(content) > PICTURE_BYTES:
        raise UserError(f"Picture {folder / name} has more than {PICTURE_BYTES:,} bytes. Make it smaller.")
    return content


@contextmanager
def _open_inside(folder: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """A descriptor of folder/parts for reading; each is opened in its parent, so none can be swapped for a link."""
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in parts[:-1]:
            opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
        opened.append(os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
        yield opened[-1]
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)


def upload_pictures(report: str, pictures: Mapping[str, bytes], upload: Callable[[str, bytes], str]) -> str:
    """Upload each picture that the report links outside code, once, and return the report with the new addresses."""
    uploaded: dict[bytes, str] = {}  # content to address

    def linked(match: re.Match[str]) -> str:
        link = match["target"]
        if link not in pictures:
            return match[0]
        content = pictures[link]
        if content not in uploaded:
            uploaded[content] = upload(PurePosixPath(link).name, content)
        return match["before"] + uploaded[content]

    return LINK_TARGET.sub(linked, report)
