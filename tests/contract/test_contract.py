"""What agents were built against never changes: the public protos against a text written down beside this test.

After a deliberate, compatible addition: `python -m tests.contract.test_contract` writes the text anew.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2

_PROTO = Path(__file__).resolve().parents[2] / "proto"
_FROZEN = Path(__file__).with_name("memshard_v1.txt")
# google/rpc/*.proto lie beside the modules that googleapis-common-protos generated from them.
_GOOGLE_RPC = Path(status_pb2.__file__).resolve().parents[2]

_Field = descriptor_pb2.FieldDescriptorProto
_Message = descriptor_pb2.DescriptorProto
_File = descriptor_pb2.FileDescriptorProto
# Field numbers of descriptor.proto, of which the paths of source locations are made.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_NESTED, _MESSAGE_ENUM, _SERVICE_METHOD = 3, 4, 2


@pytest.fixture(scope="module")
def files() -> list[_File]:
    return _compile()


def test_public_contract_is_frozen(files: list[_File]) -> None:
    now, frozen = _described(files), _FROZEN.read_text(encoding="utf-8").splitlines()
    gone = [line for line in frozen if line not in now]
    assert gone == [], "agents in the field rely on these"
    new = [line for line in now if line not in frozen]
    assert new == [], "an addition: run `python -m tests.contract.test_contract` if it is meant to be there for good"
    assert now == frozen


def test_every_message_enum_service_and_rpc_says_what_it_is(files: list[_File]) -> None:
    silent = [name for file in files for name, path in _documented(file) if not _comment(file, path)]
    assert silent == []


def test_field_numbers_are_without_gaps(files: list[_File]) -> None:
    """A gap is a field that was removed: its number must be reserved, not forgotten."""
    for file in files:
        for name, message, _ in _messages(file):
            reserved = {n for span in message.reserved_range for n in range(span.start, span.end)}
            used = {field.number for field in message.field}
            assert used | reserved == set(range(1, len(used | reserved) + 1)), name


def _compile() -> list[_File]:
    """The descriptors of the project's own .proto files, with their comments."""
    sources = sorted(path.relative_to(_PROTO).as_posix() for path in _PROTO.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc"),
                *(f"--proto_path={_PROTO}", f"--proto_path={_GOOGLE_RPC}"),
                *(f"--descriptor_set_out={out}", "--include_source_info"),
                *sources,
            ],
            check=True,
            timeout=60,
        )
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def _described(files: Iterable[_File]) -> list[str]:
    """One line for each field, enum value and rpc of memshard.v1."""
    lines: list[str] = []
    for file in files:
        if file.package != "memshard.v1":
            continue
        enums = [(enum.name, enum) for enum in file.enum_type]
        for name, message, _ in _messages(file):
            lines += [f"{name}.{field.name} = {_field(field, message)}" for field in message.field] or [f"{name} {{}}"]
            enums += [(f"{name}.{enum.name}", enum) for enum in message.enum_type]
        for name, enum in enums:
            lines += [f"enum {name}.{value.name} = {value.number}" for value in enum.value]
        for service in file.service:
            for rpc in service.method:
                asked = "stream " * rpc.client_streaming + _short(rpc.input_type)
                given = "stream " * rpc.server_streaming + _short(rpc.output_type)
                lines.append(f"rpc {service.name}.{rpc.name}({asked}) returns ({given})")
    return sorted(lines)


def _field(field: _Field, message: _Message) -> str:
    """Number, type, and whether it is repeated, optional or one of several."""
    words = [str(field.number), _short(field.type_name) or _Field.Type.Name(field.type).removeprefix("TYPE_").lower()]
    if field.label == _Field.LABEL_REPEATED:
        words.append("repeated")
    if field.proto3_optional:
        words.append("optional")
    elif field.HasField("oneof_index"):
        words.append(f"oneof {message.oneof_decl[field.oneof_index].name}")
    return " ".join(words)


def _short(type_name: str) -> str:
    return type_name.removeprefix(".memshard.v1.").removeprefix(".")


def _messages(file: _File) -> Iterator[tuple[str, _Message, list[int]]]:
    """Every message of a file, nested ones too, with its full name within the package and its path."""
    waiting = [(message.name, message, [_FILE_MESSAGE, i]) for i, message in enumerate(file.message_type)]
    while waiting:
        name, message, path = waiting.pop(0)
        yield name, message, path
        waiting += [
            (f"{name}.{nested.name}", nested, [*path, _MESSAGE_NESTED, i])
            for i, nested in enumerate(message.nested_type)
            if not nested.options.map_entry
        ]


def _documented(file: _File) -> Iterator[tuple[str, list[int]]]:
    for name, message, path in _messages(file):
        yield f"message {name}", path
        for i, enum in enumerate(message.enum_type):
            yield f"enum {name}.{enum.name}", [*path, _MESSAGE_ENUM, i]
    for i, enum in enumerate(file.enum_type):
        yield f"enum {enum.name}", [_FILE_ENUM, i]
    for i, service in enumerate(file.service):
        yield f"service {service.name}", [_FILE_SERVICE, i]
        for j, rpc in enumerate(service.method):
            yield f"rpc {service.name}.{rpc.name}", [_FILE_SERVICE, i, _SERVICE_METHOD, j]


def _comment(file: _File, path: list[int]) -> str:
    return "".join(place.leading_comments for place in file.source_code_info.location if list(place.path) == path)


if __name__ == "__main__":
    _FROZEN.write_text("\n".join(_described(_compile())) + "\n", encoding="utf-8")
