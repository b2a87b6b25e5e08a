"""What an ONNX file says of itself, read from its bytes before ONNX Runtime parses it, without the package onnx.

The file is a protocol buffer (onnx.proto3); the numbers below are its field numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Value = int | memoryview
UINT8, FLOAT = 2, 1
DEEPEST = 16  # subgraphs within subgraphs
# TensorProto.data_type → bytes of one element; 4-bit types and strings are not among what a network is made of here.
ITEM_SIZES = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    16: 2,
    17: 1,
    18: 1,
    19: 1,
    20: 1,
}


class Malformed(ValueError):
    """The bytes are not such a file, or hold what a served model must not have."""


@dataclass(frozen=True)
class Port:
    """An input or output: dims are None where the file leaves them open."""

    name: str
    element: int
    dims: tuple[int | None, ...] | None


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """(number, value) of every field; numbers as int, anything with a length as a view."""
    position, end = 0, len(data)
    while position < end:
        key, position = varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = varint(data, position)
            yield number, value
            continue
        if kind == 2:
            length, position = varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise Malformed(f"has a field of wire type {kind}, which ONNX has not")
        if number == 0 or position + length > end:
            raise Malformed("is cut short, or not an ONNX file")
        yield number, data[position : position + length]
        position += length


def varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise Malformed("is cut short, or not an ONNX file")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), position
    raise Malformed("has a number of more than 64 bits, so it is not an ONNX file")


def views(data: memoryview, number: int) -> list[memoryview]:
    return [value for found, value in fields(data) if found == number and isinstance(value, memoryview)]


def numbers(data: memoryview, number: int) -> list[int]:
    """All values of a repeated integer field, packed or not."""
    found: list[int] = []
    for each, value in fields(data):
        if each != number:
            continue
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            item, position = varint(value, position)
            found.append(item)
    return found


def text(data: memoryview, number: int) -> str:
    found = views(data, number)
    return bytes(found[-1]).decode("utf-8", "replace") if found else ""


@dataclass(frozen=True)
class OnnxFile:
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    graph: memoryview
    functions: tuple[memoryview, ...]

    def check_values(self) -> None:
        """Raises Malformed when a constant is not finite, not within the file, or not as long as its shape says."""
        check_graph(self.graph, 0)
        for function in self.functions:
            for node in views(function, 7):
                check_node(node, 0)


def parse(data: memoryview) -> OnnxFile:
    """Raises Malformed when the bytes are not a model with one graph."""
    graphs = views(data, 7)
    if len(graphs) != 1 or not numbers(data, 1):
        raise Malformed("is not an ONNX model (no version, or not one graph)")
    if views(data, 20):
        raise Malformed("carries training information, which a served model has not")
    (graph,) = graphs
    constants = {text(tensor, 8) for tensor in views(graph, 5)}
    inputs = tuple(port for port in map(parse_port, views(graph, 11)) if port.name not in constants)
    return OnnxFile(inputs, tuple(map(parse_port, views(graph, 12))), graph, tuple(views(data, 25)))


def parse_port(data: memoryview) -> Port:
    """A ValueInfoProto that is a tensor."""
    for kind in views(data, 2):
        for tensor in views(kind, 1):
            shapes = views(tensor, 2)
            dims = None
            if shapes:
                dims = tuple(next(iter(numbers(dim, 1)), None) for dim in views(shapes[0], 1))
            return Port(text(data, 1), (numbers(tensor, 1) or [0])[0], dims)
    return Port(text(data, 1), 0, None)


def check_graph(graph: memoryview, depth: int) -> None:
    if depth > DEEPEST:
        raise Malformed(f"has subgraphs more than {DEEPEST} deep")
    if views(graph, 15):
        raise Malformed("has sparse constants, which serving does not check")
    for tensor in views(graph, 5):
        check_tensor(tensor)
    for node in views(graph, 1):
        check_node(node, depth)


def check_node(node: memoryview, depth: int) -> None:
    for attribute in views(node, 5):
        name = text(attribute, 1)
        for number, value in fields(attribute):
            if isinstance(value, int):
                continue
            if number in (5, 10):
                check_tensor(value)
            elif number in (6, 11):
                check_graph(value, depth + 1)
            elif number in (22, 23):
                raise Malformed("has sparse constants, which serving does not check")
            elif number in (2, 7) and not finite(value, "<f4"):
                raise Malformed(f"attribute {name!r} of a node holds a value that is not finite")


def check_tensor(tensor: memoryview) -> None:
    name = text(tensor, 8)[:60]
    if views(tensor, 13) or 1 in numbers(tensor, 14):
        raise Malformed(f"constant {name!r} lies outside the file; a served model is one file")
    kind, dims = (numbers(tensor, 2) or [0])[0], numbers(tensor, 1)
    if kind not in ITEM_SIZES:
        raise Malformed(f"constant {name!r} has type {kind}, which serving does not check")
    count = math.prod(dims)
    raw = views(tensor, 9)
    if raw:
        if len(raw) > 1 or len(raw[0]) != count * ITEM_SIZES[kind]:
            raise Malformed(f"constant {name!r} is not as long as its shape {tuple(dims)} says")
        types = {1: "<f4", 10: "<f2", 11: "<f8"}
        if kind == 16:  # bfloat16: not finite where all bits of the exponent are set
            good = not ((np.frombuffer(raw[0], "<u2") & 0x7F80) == 0x7F80).any()
        else:
            good = kind not in types or finite(raw[0], types[kind])
    else:
        floats, doubles = views(tensor, 4), views(tensor, 10)
        given = sum(len(each) // 4 for each in floats) + sum(len(each) // 8 for each in doubles)
        if kind in (1, 11) and given != count or count > len(tensor) * 2:
            raise Malformed(f"constant {name!r} is not as long as its shape {tuple(dims)} says")
        good = all(finite(each, "<f4") for each in floats) and all(finite(each, "<f8") for each in doubles)
        if kind in (10, 16):  # half precision, kept as integers
            bits = np.array(numbers(tensor, 5), np.int64)
            exponent = 0x7C00 if kind == 10 else 0x7F80
            good = not ((bits & exponent) == exponent).any()
    if not good:
        raise Malformed(f"constant {name!r} holds values that are not finite")


def finite(data: memoryview, kind: str) -> bool:
    if len(data) % np.dtype(kind).itemsize:
        raise Malformed("has a list of numbers that is cut short")
    return bool(np.isfinite(np.frombuffer(data, kind)).all())
