"""multipart/form-data: the fast way agrees with python-multipart, and nothing hostile gets through either."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3.filepost import encode_multipart_formdata

from ml.serve.multipart import parse, read_files, split
from ml.serve.problems import Problem

TYPE = b"multipart/form-data; boundary=B"


def body(*parts: tuple[str, str | None, bytes], boundary: str = "B") -> bytes:
    fields = [
        (name, data if filename is None else (filename, data, "image/png")) for name, filename, data in parts
    ]
    return encode_multipart_formdata(fields, boundary)[0]


names = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\\r\n%', exclude_categories=("Cs", "Cc")),
    min_size=1,
    max_size=20,
)


@given(st.lists(st.tuples(names, st.none() | names, st.binary(max_size=200)), min_size=1, max_size=5))
def test_fast_way_gives_what_was_encoded_and_what_the_library_gives(
    parts: list[tuple[str, str | None, bytes]],
) -> None:
    data = body(*parts, boundary="0f1e2d3c4b5a")
    assert split(data, b"0f1e2d3c4b5a") == parse(data, b"0f1e2d3c4b5a") == parts


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=4))
def test_damaged_body_gives_the_same_as_the_library_or_a_problem(
    content: bytes, place: int, junk: bytes
) -> None:
    data = body(("file", "a.png", content), ("file", "b.png", content[::-1]))
    place = place % len(data)
    data = data[:place] + junk + data[place + len(junk) :]
    fast = split(data, b"B")
    try:
        slow = parse(data, b"B")
    except Problem as problem:
        assert problem.status == 422
        assert fast is None
    else:
        assert fast is None or fast == slow


def test_content_that_looks_like_a_boundary_stays_content() -> None:
    content = b"\r\n--Bx\r\n--\r\n\r\n--"
    assert read_files(body(("file", "a", content)), TYPE) == [("a", content)]


def test_unusual_but_allowed_body_is_read() -> None:
    data = (
        b"--B\r\ncontent-type: image/png\r\nContent-Disposition: form-data; filename=a.png; name=file\r\n"
        b"X-More: 1\r\n\r\nxyz\r\n--B--\r\nepilogue"
    )
    assert split(data, b"B") is None
    assert read_files(data, b'multipart/form-data; charset=utf-8; boundary="B"') == [("a.png", b"xyz")]


@pytest.mark.parametrize(
    "data, content_type",
    [
        (b"", TYPE),
        (body(("file", "a", b"x")), b"multipart/form-data"),
        (body(("file", "a", b"x"))[:-6], TYPE),
        (body(("file", "a", b"x")), b"multipart/form-data; boundary=other"),
        (body(("other", None, b"x")), TYPE),
        (b"--B--\r\n", TYPE),
        (b"--B\r\n\r\nx\r\n--B--\r\n", TYPE),
        (b"--B\r\nContent-Disposition: attachment\r\n\r\nx\r\n--B--\r\n", TYPE),
        (
            b"".join(b"--B\r\nContent-Disposition: form-data; name=file\r\n\r\n\r\n" for _ in range(3000)),
            TYPE,
        ),
        (b"--B\r\n" + b"a: b\r\n" * 50 + b"\r\nx\r\n--B--\r\n", TYPE),
    ],
)
def test_body_without_files_or_out_of_form_is_refused(data: bytes, content_type: bytes) -> None:
    with pytest.raises(Problem) as caught:
        read_files(data, content_type)
    assert caught.value.status == 422
