"""The files of a multipart/form-data body that lies in memory.

Bodies as curl, browsers and the usual clients write them are cut by `split`; anything unusual goes to python-multipart.
"""

import re
from typing import Any

from ml.serve.problems import Problem

BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
DISPOSITION = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([^"\r\n\\]{1,100})"(?:; filename="([^"\r\n\\]{0,255})")?'
    rb"(?:\r\nContent-(?:Type|Length): [^\r\n]{1,100}){0,2}\r\n\r\n",
    re.IGNORECASE,
)
FILE_FIELDS = ("file", "files", "image", "images", "file[]", "files[]")
MOST_PARTS = 2048

File = tuple[str, bytes]  # name as the client gave it, content


def bad(detail: str) -> Problem:
    return Problem(422, "bad-multipart", f"{detail} Try: curl -F file=@3.png http://HOST/predict")


def read_files(body: bytes, content_type: bytes) -> list[File]:
    """Every part with a file name, and every part called file, files, image or images, in order.

    Raises:
        Problem: 422 when it is no such body, or has no file in it, or fields that mean nothing here.
    """
    found = BOUNDARY.search(content_type)
    if found is None:
        raise bad("The content type multipart/form-data has no boundary.")
    boundary = found[1] or found[2]
    parts = split(body, boundary)
    if parts is None:
        parts = parse(body, boundary)
    files = []
    for name, filename, content in parts:
        if filename is None and name not in FILE_FIELDS:
            raise bad(f"The field {name[:60]!r} is not known; send files as {FILE_FIELDS[0]!r}.")
        files.append((filename if filename is not None else name, content))
    if not files:
        raise bad("There is no file in the body.")
    return files


def split(body: bytes, boundary: bytes) -> list[tuple[str, str | None, bytes]] | None:
    """(field, file name, content) of each part; None where the body is not of the usual form."""
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if pieces[0] or len(pieces) < 3 or pieces[-1] not in (b"--\r\n", b"--") or len(pieces) > MOST_PARTS:
        return None
    parts = []
    for piece in pieces[1:-1]:
        head = DISPOSITION.match(piece)
        if head is None:
            return None
        name, filename = head.groups()
        try:
            parts.append(
                (name.decode(), None if filename is None else filename.decode(), piece[head.end() :])
            )
        except UnicodeDecodeError:
            return None
    return parts


def parse(body: bytes, boundary: bytes) -> list[tuple[str, str | None, bytes]]:
    """The same by python-multipart, for any body that RFC 7578 allows. Raises Problem when it does not."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    parts: list[tuple[str, str | None, bytes]] = []
    header: dict[str, bytes] = {}
    name, value, content = bytearray(), bytearray(), bytearray()
    ended = False

    def begin_part() -> None:
        if len(parts) >= MOST_PARTS:
            raise bad(f"There are more than {MOST_PARTS} parts.")
        header.clear()
        content.clear()

    def end_header() -> None:
        if len(header) > 20:
            raise bad("A part has more than 20 headers.")
        header[bytes(name).decode("latin-1").lower()] = bytes(value)
        name.clear()
        value.clear()

    def end_part() -> None:
        kind, options = parse_options_header(header.get("content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise bad("A part has no Content-Disposition: form-data with a name.")
        filename = options.get(b"filename")
        parts.append(
            (
                options[b"name"].decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
                bytes(content),
            )
        )

    def end() -> None:
        nonlocal ended
        ended = True

    callbacks: Any = {
        "on_part_begin": begin_part,
        "on_header_field": lambda data, start, stop: name.extend(data[start:stop]),
        "on_header_value": lambda data, start, stop: value.extend(data[start:stop]),
        "on_header_end": end_header,
        "on_part_data": lambda data, start, stop: content.extend(data[start:stop]),
        "on_part_end": end_part,
        "on_end": end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise bad(f"The body is not multipart/form-data with this boundary ({str(error)[:80]}).") from None
    if not ended:
        raise bad("The body ends before its last boundary.")
    return parts
