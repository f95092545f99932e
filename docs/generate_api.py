"""Writes docs/api.md from the comments of the public contract: `python docs/generate_api.py [FILE]`.

What the contract's comments cannot say, the codes and reasons of errors, is in api_errors.md, and ends the page.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.rpc import status_pb2
from grpc_tools import protoc

_DOCS = Path(__file__).resolve().parent
_PROTO = _DOCS.parent / "proto"
_CONTRACT = "memshard/v1/memory.proto"
# google/rpc/*.proto lie beside the modules that googleapis-common-protos generated from them.
_INCLUDES = (_PROTO, Path(status_pb2.__file__).resolve().parents[2], Path(protoc.__file__).resolve().parent / "_proto")

_Field = descriptor_pb2.FieldDescriptorProto
_Message = descriptor_pb2.DescriptorProto
_Enum = descriptor_pb2.EnumDescriptorProto
_Method = descriptor_pb2.MethodDescriptorProto
# Field numbers of descriptor.proto, of which the paths of source locations are made.
_FILE_SYNTAX, _FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 12, 4, 5, 6
_SERVICE_METHOD, _MESSAGE_FIELD, _ENUM_VALUE = 2, 2, 2


def page() -> str:
    """The page's text."""
    return "\n".join(_Page(_compiled()).lines()) + "\n"


def _compiled() -> descriptor_pb2.FileDescriptorProto:
    """The contract with its comments. Raises SystemExit with protoc's code when it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        includes = [f"--proto_path={path}" for path in _INCLUDES]
        code = protoc.main(
            ["protoc", *includes, f"--descriptor_set_out={out}", "--include_source_info", _CONTRACT],
        )
        if code:
            raise SystemExit(code)
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


class _Page:
    """The contract in the order of the file: rpcs with what they take and give, then the rest."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._file = file
        self._places = {tuple(place.path): place for place in file.source_code_info.location}
        self._messages = {message.name: (i, message) for i, message in enumerate(file.message_type)}
        self._methods = [
            ((_FILE_SERVICE, i, _SERVICE_METHOD, j), method)
            for i, service in enumerate(file.service)
            for j, method in enumerate(service.method)
        ]
        # Tables of requests and responses stand with their rpc; everything else is linked to.
        self._inlined = {_short(name) for _, rpc in self._methods for name in (rpc.input_type, rpc.output_type)}

    def lines(self) -> Iterator[str]:
        yield "# The API"
        yield ""
        yield f"<!-- Made by docs/generate_api.py from proto/{_CONTRACT} and docs/api_errors.md: `make docs`. -->"
        yield ""
        yield self._comment(_FILE_SYNTAX)
        for i, service in enumerate(self._file.service):
            yield ""
            yield f"**`{self._file.package}.{service.name}`.** {self._comment(_FILE_SERVICE, i)}"
        yield from self._contents()
        yield from ("", "## Calls")
        for path, method in self._methods:
            yield from self._call(path, method)
        yield from ("", "## Messages")
        for name in self._messages:
            if name not in self._inlined:
                yield from ("", f"### {name}", "", *self._message(name))
        yield from ("", "## Enums")
        for i, enum in enumerate(self._file.enum_type):
            yield from ("", f"### {enum.name}", *self._enum(i, enum))
        yield ""
        yield (_DOCS / "api_errors.md").read_text(encoding="utf-8").rstrip("\n")

    def _contents(self) -> Iterator[str]:
        messages = [name for name in self._messages if name not in self._inlined]
        for title, names in (
            ("Calls", [method.name for _, method in self._methods]),
            ("Messages", messages),
            ("Enums", [enum.name for enum in self._file.enum_type]),
        ):
            yield ""
            yield f"**{title}**: " + " · ".join(f"[{name}](#{name.lower()})" for name in names)
        yield ""
        yield "**[Errors](#errors)**"

    def _call(self, path: tuple[int, ...], method: _Method) -> Iterator[str]:
        yield from ("", f"### {method.name}", "", self._comment(*path))
        for word, type_name in (("Request", method.input_type), ("Response", method.output_type)):
            name = _short(type_name)
            about, *table = self._message(name)
            yield from ("", f"**{word}** `{name}`: {about[:1].lower()}{about[1:]}", *table)

    def _message(self, name: str) -> list[str]:
        i, message = self._messages[name]
        lines = [self._comment(_FILE_MESSAGE, i), "", "| field | type | meaning |", "|---|---|---|"]
        for j, field in enumerate(message.field):
            meaning = self._comment(_FILE_MESSAGE, i, _MESSAGE_FIELD, j)
            lines.append(f"| `{field.name}` | {self._type(field, message)} | {_cell(meaning)} |")
        return lines

    def _enum(self, i: int, enum: _Enum) -> Iterator[str]:
        yield from ("", self._comment(_FILE_ENUM, i), "", "| value | number | meaning |", "|---|---|---|")
        for j, value in enumerate(enum.value):
            meaning = self._comment(_FILE_ENUM, i, _ENUM_VALUE, j)
            yield f"| `{value.name}` | {value.number} | {_cell(meaning)} |"

    def _type(self, field: _Field, message: _Message) -> str:
        """A field's type, linked if it is of this page, with what it is besides: optional, repeated, one of several."""
        name = _short(field.type_name)
        if not name:
            name = f"`{_Field.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
        elif field.type_name.startswith(f".{self._file.package}."):
            name = f"[{name}](#{name.lower()})"
        else:
            name = f"`{name}`"
        if field.label == _Field.LABEL_REPEATED:
            return f"repeated {name}"
        if field.proto3_optional:
            return f"optional {name}"
        if field.HasField("oneof_index"):
            return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
        return name

    def _comment(self, *path: int) -> str:
        """The comment above something, or behind it on its line; paragraphs stay apart."""
        place = self._places[path]
        text = place.leading_comments or place.trailing_comments
        return "\n".join(line.removeprefix(" ").rstrip() for line in text.strip("\n").splitlines())


def _short(type_name: str) -> str:
    return type_name.removeprefix(".memshard.v1.").removeprefix(".")


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else _DOCS / "api.md").write_text(page(), encoding="utf-8")
