"""Reads the tensors in a .pth file of torch.save without torch, and runs nothing that is in it.

The file is a zip of a pickle and of raw storages. The pickle is not given to Python's unpickler:
`_Machine` knows only the operations that a dictionary of tensors needs, and a global is never
looked up, it stays a word that either is on a short list or ends the reading.
Format: torch/serialization.py and the comments of Python's pickletools.py.
"""

import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from pronk.backends.protocol import U8
from pronk.checkpoints.fields import brief
from pronk.checkpoints.mapped import MappedFile, quoted
from pronk.core.errors import CheckpointError

_MAX_PICKLE: Final = 64 << 20
"""Of Llama 3.1 405B it has under a megabyte."""

_STORAGES: Final = {
    "torch BFloat16Storage": ("BF16", 2),
    "torch HalfStorage": ("F16", 2),
    "torch FloatStorage": ("F32", 4),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
)  # fmt: skip
_GLOBALS: Final = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}


@dataclass(frozen=True, slots=True)
class _Global:
    """A word that the pickle asked for, as "module name"."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Elements of one kind at a byte of the file."""

    kind: str
    item: int
    start: int
    n_items: int


@dataclass(frozen=True, slots=True)
class PthTensor:
    """A matrix (or a vector: one row) of a mapped file. Rows are contiguous; `row_stride` bytes
    lie from one to the next."""

    file: MappedFile
    kind: str
    shape: tuple[int, ...]
    start: int
    n_rows: int
    row_bytes: int
    row_stride: int

    @property
    def span(self) -> int:
        """Bytes from the first to the last of the tensor."""
        return self.row_stride * (self.n_rows - 1) + self.row_bytes

    def rows(self) -> U8:
        """Raw rows `[n_rows, row_bytes]`, in the file until they are touched."""
        view = self.file.view(self.start, self.span)
        strides = (self.row_stride, 1)
        return np.lib.stride_tricks.as_strided(
            view, (self.n_rows, self.row_bytes), strides, writeable=False
        )

    def release(self) -> None:
        self.file.release(self.start, self.span)


def read_pth(file: MappedFile) -> dict[str, PthTensor]:
    """Tensors by name. CheckpointError when the file is no zip of torch.save, asks for code, or
    points outside of itself."""
    members = _members(file)
    names = [name for name in members if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError(f"{file.path}: {len(names)} data.pkl in the zip, expected one")
    prefix = names[0].removesuffix("data.pkl")
    _check_byte_order(file, members.get(prefix + "byteorder"))
    start, length = members[names[0]]
    if length > _MAX_PICKLE:
        raise CheckpointError(f"{file.path}: data.pkl has {length} bytes, at most {_MAX_PICKLE}")
    result = _Machine(file, members, prefix + "data/", file.bytes(start, length)).run()
    if not isinstance(result, dict):
        raise CheckpointError(f"{file.path}: holds no dictionary of tensors")
    for name, tensor in result.items():
        if not isinstance(tensor, PthTensor):
            raise CheckpointError(f"{file.path}: {quoted(name)} is no tensor")
    return result


def _members(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Byte range of each stored member of the zip."""
    magic = file.bytes(0, 4)
    if magic[:1] == b"\x80":
        raise CheckpointError(
            f"{file.path}: an old pickle that is no zip; load and save it again with torch >= 1.6"
        )
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"{file.path}: not a .pth of torch.save: it starts with {magic!r}")
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file.path}: truncated or damaged zip: {brief(error)}") from None
    members: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.filename in members:
            raise CheckpointError(f"{file.path}: {quoted(info.filename)} is in the zip twice")
        members[info.filename] = _member_range(file, info)
    return members


def _member_range(file: MappedFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    what = f"{file.path}: {quoted(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{what} is compressed or encrypted; torch.save stores it plainly")
    # The local header repeats the name, with an extra field of its own length.
    header = file.bytes(max(0, info.header_offset), 30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{what} has no header at byte {info.header_offset}")
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if info.file_size != info.compress_size or start + info.file_size > file.size:
        raise CheckpointError(
            f"{what} of {info.file_size} bytes at byte {start} is not inside the file of"
            f" {file.size}"
        )
    return start, info.file_size


def _check_byte_order(file: MappedFile, member: tuple[int, int] | None) -> None:
    if member is not None:
        order = file.bytes(member[0], min(member[1], 16))
        if order.strip() != b"little":
            raise CheckpointError(f"{file.path}: byte order {order!r}; only little is read")


class _Stop(Exception):
    """The pickle's last operation."""


class _Machine:
    """Runs a pickle that builds nothing but dictionaries, lists, tuples, numbers, strings and
    tensors. Stack and memo are Python lists and dictionaries, so no number in the file decides
    how much memory is taken."""

    def __init__(
        self, file: MappedFile, members: dict[str, tuple[int, int]], folder: str, code: bytes
    ) -> None:
        self.file, self.members, self.folder = file, members, folder
        self.code, self.at = code, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: data.pkl {what}")

    def run(self) -> Any:
        try:
            while True:
                opcode = self.take(1)
                operation = _OPERATIONS.get(opcode)
                if operation is None:
                    raise self.fail(f"has operation {opcode!r} at {self.at - 1}, tensors need none")
                operation(self)
        except _Stop:
            return self.pop()

    def take(self, length: int) -> bytes:
        raw = self.code[self.at : self.at + length]
        if len(raw) < length:
            raise self.fail(f"is truncated at {len(self.code)}")
        self.at += length
        return raw

    def skip(self, length: int) -> None:
        self.take(length)

    def unsigned(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def line(self) -> bytes:
        end = self.code.find(b"\n", self.at)
        if end < 0:
            raise self.fail("is truncated in a name")
        return self.take(end + 1 - self.at)[:-1]

    def string(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail("has a string that is not valid UTF-8") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.fail("takes more from its stack than there is")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.fail("closes a list that it did not open")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def put(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.fail(f"refers to value {index}, which it did not store")
        self.push(self.memo[index])

    def find(self, module: str, name: str) -> None:
        """The one place where a pickle could ask for code: a word of the list, or the end."""
        word = f"{module} {name}"
        if word not in _GLOBALS:
            raise self.fail(f"asks for {quoted(f'{module}.{name}')}; only tensors are read")
        self.push(_Global(word))

    def stack_global(self) -> None:
        module, name = self.pop_many(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.fail("asks for a global by something that is no name")
        self.find(module, name)

    def set_items(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise self.fail("fills something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self.fail(f"has a key that is no string but {type(key).__name__}")
            if key in target:
                raise self.fail(f"gives {quoted(key)} twice")
            target[key] = value
        self.push(target)

    def append(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list):
            raise self.fail("fills something that is no list")
        target.extend(items)
        self.push(target)

    def build(self) -> None:
        """Attributes of an object. The one object there is, a dictionary, has only bookkeeping
        of torch's modules (`_metadata`)."""
        _, target = self.pop(), self.pop()
        if not isinstance(target, dict):
            raise self.fail("sets attributes of something that is no dictionary")
        self.push(target)

    def reduce(self) -> None:
        """A call: of one of three functions, none of which exists here."""
        args, function = self.pop(), self.pop()
        name = function.name if isinstance(function, _Global) else None
        if not isinstance(args, tuple):
            raise self.fail("calls a function without a tuple of arguments")
        if name == _DICT and not args:
            return self.push({})
        if name == _TENSOR and len(args) in (6, 7):
            return self.push(self.tensor(*args[:4]))
        if name == _PARAMETER and args and isinstance(args[0], PthTensor):
            return self.push(args[0])
        raise self.fail(f"calls {quoted(name or type(function).__name__)} in an unknown way")

    def storage(self) -> None:
        """A persistent id ("storage", type, key, device, elements): a member of the zip."""
        match self.pop():
            case ("storage", _Global(kind), str(key), str(), int(n_items)) if kind in _STORAGES:
                pass
            case _:
                raise self.fail("has a storage of an unknown form")
        member = self.members.get(self.folder + key)
        if member is None:
            raise self.fail(f"refers to storage {quoted(key)}, which is not in the zip")
        name, item = _STORAGES[kind]
        if not 0 <= n_items * item <= member[1]:
            raise self.fail(f"wants {n_items} of {name} from {member[1]} bytes of {quoted(key)}")
        self.push(_Storage(name, item, member[0], n_items))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> PthTensor:
        """Sizes and strides count elements. Rows must be contiguous, and not overlap."""
        sizes = isinstance(storage, _Storage) and _are_sizes(size) and _are_sizes(stride)
        if not sizes or not _are_sizes((offset,)) or len(size) != len(stride):
            raise self.fail("has a tensor of an unknown form")
        n_rows, columns = (1, prod(size)) if len(size) < 2 else (prod(size[:-1]), size[-1])
        row_stride = columns if n_rows == 1 else stride[-2]
        if n_rows * columns == 0 or len(size) > 2:
            raise self.fail(f"has a tensor of shape {list(size)}; Llama has none")
        if (columns > 1 and stride[-1] != 1) or row_stride < columns:
            raise self.fail(f"has a tensor of shape {list(size)} with strides {list(stride)}")
        if offset + row_stride * (n_rows - 1) + columns > storage.n_items:
            raise self.fail(
                f"has a tensor of shape {list(size)} at {offset} of {storage.n_items} elements"
            )
        item = storage.item
        start = storage.start + offset * item
        return PthTensor(
            self.file, storage.kind, size, start, n_rows, columns * item, row_stride * item
        )


def _are_sizes(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) > 8:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _stop(_: _Machine) -> None:
    raise _Stop


_OPERATIONS: Final[dict[bytes, Callable[[_Machine], None]]] = {
    b"\x80": lambda m: m.skip(1),  # protocol
    b"\x95": lambda m: m.skip(8),  # frame
    b".": _stop,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.unsigned(1)),
    b"M": lambda m: m.push(m.unsigned(2)),
    b"J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.unsigned(1)), "little", signed=True)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.push(m.string(m.take(m.unsigned(4)))),
    b"\x8c": lambda m: m.push(m.string(m.take(m.unsigned(1)))),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.push(tuple(m.pop_many(1))),
    b"\x86": lambda m: m.push(tuple(m.pop_many(2))),
    b"\x87": lambda m: m.push(tuple(m.pop_many(3))),
    b"s": lambda m: m.set_items(m.pop_many(2)),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"a": lambda m: m.append(m.pop_many(1)),
    b"e": lambda m: m.append(m.pop_mark()),
    b"q": lambda m: m.put(m.unsigned(1)),
    b"r": lambda m: m.put(m.unsigned(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.recall(m.unsigned(1)),
    b"j": lambda m: m.recall(m.unsigned(4)),
    b"c": lambda m: m.find(m.string(m.line()), m.string(m.line())),
    b"\x93": _Machine.stack_global,
    b"Q": _Machine.storage,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
"""Every operation of a pickle that is accepted; pickletools.opcodes names them all."""
