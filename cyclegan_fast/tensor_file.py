"""Files of tensors that others wrote, read without trust in anything they say.

`torch.save` writes pickle, a program that may do whatever Python can, and describes tensors by numbers of any size.
Such a file is taken apart here instead, by the few instructions that `torch.save` writes, and can become nothing but
dictionaries, lists, tuples, numbers, text and tensors, which together take no more memory than a small multiple of the
file. Read are the zip files of PyTorch 1.6 and later, the sequences of pickles of those before, which newer versions
write on request, and, with the package of that name, safetensors.
"""

from __future__ import annotations

import io
import os
import pickletools
import stat
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

__all__ = ["Archive", "Refused", "check_directory", "physical_memory", "read_tensors"]

# Limits of what is read: some 90,000 tensors. A usual checkpoint has 500.
DIRECTORY_BYTES = 6 << 20  # of the zip file's directory
_PICKLE_BYTES = 32 << 20  # of the instructions that build everything but the tensors' elements
_INSTRUCTIONS = 4_000_000
_VALUES = 1_000_000  # plain values and characters of text, counted wherever they are referred to
_DEPTH = 32
_SHARED = 4  # how often the tensors together may refer to the bytes of the file

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")
_TAR = (257, b"ustar")  # where a tar file says that it is one


class Refused(Exception):  # noqa: N818 - becomes the caller's error
    """What is wrong with a file, as the rest of a sentence that begins with its name."""


def read_tensors(path: str | Path) -> tuple[Any, str]:
    """What a file holds, its tensors on the CPU, and the name of its format.

    Raises Refused when the file is missing, damaged, too large for the memory or of another kind, or holds anything
    but tensors and plain values; ImportError for safetensors without that package; OSError.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            start = file.read(sum(map(len, _TAR[1:])) + _TAR[0])
            if start.startswith(b"PK\3\4"):
                check_directory(file, file.seek(0, os.SEEK_END))
                return Archive(file).load("cpu"), "torch.save"
            if start.startswith(_LEGACY_START):
                return _Legacy(file).load("cpu"), "torch.save before PyTorch 1.6"
            if start[_TAR[0] :] == _TAR[1]:
                raise Refused(
                    "is a tar file, as the first versions of PyTorch wrote: load it there and save it with a newer one"
                )
            if start[8:9] == b"{":
                return _read_safetensors(path, file), "safetensors"
    except MemoryError:
        raise Refused("cannot be read: there is not enough memory for it") from None
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile, struct.error) as error:
        raise Refused(f"is damaged: {str(error)[:200]}") from None
    raise Refused("is neither a torch.save file nor safetensors")


def _opened(path: Path) -> IO[bytes]:
    """The file, if it is one that can be read to its end, and into memory: opening a pipe would wait for ever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise Refused(f"cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"cannot be read: it is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no file'}")
    memory = physical_memory()
    if memory is not None and status.st_size > memory:
        raise Refused(f"has {status.st_size / 1e9:.0f} GB, more than this machine's memory, {memory / 1e9:.0f} GB")
    return path.open("rb")


def _read_safetensors(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. The package checks that they lie in the file, and one after another."""
    from safetensors import SafetensorError, safe_open

    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > DIRECTORY_BYTES:
        raise Refused(f"has a header of {length} bytes; at most {DIRECTORY_BYTES} are read")
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise Refused(f"is damaged: {str(error)[:200]}") from None


def check_directory(file: IO[bytes], end: int) -> None:
    """Refuse a zip directory too long to be read into memory; the file's end record ends at ``end``.

    torch writes zip64, whose record of 56 bytes and locator of 20 stand before the end record of 22.
    """
    damaged = "is damaged: its zip directory is not where it should be"
    file.seek(max(0, end - 98))
    tail = file.read(98)
    if len(tail) < 98 or (tail[:4], tail[56:60], tail[76:80]) != (b"PK\6\6", b"PK\6\7", b"PK\5\6"):
        raise Refused(damaged)
    length, start = struct.unpack_from("<QQ", tail, 40)
    (located,) = struct.unpack_from("<Q", tail, 64)
    if length > DIRECTORY_BYTES:
        raise Refused(f"has a directory of {length} bytes; at most {DIRECTORY_BYTES} are read")
    if located != end - 98 or start + length != located:
        raise Refused(damaged)


def physical_memory() -> int | None:
    """Bytes of main memory, or None where the platform does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@dataclass(frozen=True)
class _Global:
    """A name that the file refers to. Nothing is looked up by it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Elements of one record of the file."""

    record: str
    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _View:
    """A tensor yet to be made. ``args``: storage, offset, size and stride as the file has them, unchecked."""

    args: tuple[Any, ...]


class _Reader:
    """What both formats of ``torch.save`` have in common: values, and tensors as views of stored elements."""

    def __init__(self, size: int) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._left = _VALUES
        self._bytes_left = _SHARED * size

    def _blocks(self, storage: _Storage) -> Iterator[bytes]:
        """The bytes of a storage, exactly as many as it takes; called before there is memory for them."""
        raise NotImplementedError

    def _finished(self, value: Any, device: str | torch.device, depth: int) -> Any:
        """The value with its tensors made. Shared and nested parts are counted as often as they are met."""
        self._left -= 1 + (len(value) if isinstance(value, str) else 0)
        if self._left < 0 or depth > _DEPTH:
            raise Refused(f"holds more than {_VALUES} values, or nests them more than {_DEPTH} deep")
        if isinstance(value, dict):
            return {self._key(key): self._finished(item, device, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._finished(item, device, depth + 1) for item in value)
        if isinstance(value, _View):
            return self._tensor(value, device)
        if value is not None and not isinstance(value, (bool, int, float, str)):
            _refuse_more(value)
        return value

    def _key(self, key: str | int) -> str | int:
        self._left -= len(key) if isinstance(key, str) else 1
        return key

    def _tensor(self, view: _View, device: str | torch.device) -> Tensor:
        if len(view.args) < 4 or not isinstance(view.args[0], _Storage):
            raise Refused("is damaged: a tensor is not described as torch.save does")
        storage, offset, size, stride = view.args[:4]
        if not (_counts(size) and _counts(stride) and _counts((offset,)) and len(size) == len(stride) <= 8):
            raise Refused(f"is damaged: a tensor has size {size!r:.99}, stride {stride!r:.99}, offset {offset!r:.99}")
        elements, reach = 1, 0
        for length, step in zip(size, stride, strict=True):
            elements *= length
            reach += (length - 1) * step
        if elements and (offset + reach >= storage.count or elements > storage.count):
            raise Refused(
                f"is damaged: a tensor of size {list(size)}, stride {list(stride)} and offset {offset} does not lie "
                f"in its {storage.count} elements"
            )
        self._bytes_left -= elements * storage.dtype.itemsize
        if self._bytes_left < 0:
            raise Refused(f"has tensors that together take more than {_SHARED} times its own bytes")
        if not elements:
            if max(size) > storage.count + _VALUES:
                raise Refused(f"is damaged: an empty tensor has size {list(size)}")
            return torch.empty(size, dtype=storage.dtype, device=device)
        return self._elements(storage, device).as_strided(size, stride, offset)

    def _elements(self, storage: _Storage, device: str | torch.device) -> Tensor:
        """All elements of a storage, on the device; views of one storage share them."""
        key = storage.record, storage.dtype
        if key not in self._flat:
            blocks = self._blocks(storage)
            flat = torch.empty(storage.count, dtype=storage.dtype)
            target, done = flat.view(torch.uint8).numpy(), 0
            for block in blocks:
                target[done : done + len(block)] = np.frombuffer(block, np.uint8)
                done += len(block)
            self._flat[key] = flat.to(device)
        return self._flat[key]


class Archive(_Reader):
    """A ``torch.save`` file of PyTorch 1.6 or later, a zip file, read without trust in anything it says."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        records, size = self._zip.infolist(), file.seek(0, os.SEEK_END)
        super().__init__(size)
        if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
            raise Refused("holds compressed records, which torch.save never writes")
        if sum(r.file_size for r in records) > size:
            raise Refused("is damaged: its records take more bytes than the file has")
        folders = {r.filename.partition("/")[0] for r in records}
        if len(folders) != 1:
            raise Refused("is damaged: its records are not in one folder")
        self._folder = folders.pop()

    def load(self, device: str | torch.device) -> Any:
        """Everything in the file, its tensors on the device. Raises Refused, OSError, MemoryError, BadZipFile."""
        order = "little"  # of a file before PyTorch 2.1, which does not say
        if f"{self._folder}/byteorder" in self._zip.namelist():
            order = self._record("byteorder").decode("ascii", "replace")
        if order != sys.byteorder:
            raise Refused(f"was written with byte order {order!r}; this machine has {sys.byteorder!r}")
        return self._finished(_built(io.BytesIO(self._record("data.pkl")))[0], device, 0)

    def _info(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._zip.getinfo(f"{self._folder}/{name}")
        except KeyError:
            raise Refused(f"is damaged: it has no record {name!r}") from None

    def _record(self, name: str) -> bytes:
        info = self._info(name)
        if info.file_size > _PICKLE_BYTES:
            raise Refused(f"has a record {name} of {info.file_size} bytes; at most {_PICKLE_BYTES} are read")
        return self._zip.read(info)

    def _blocks(self, storage: _Storage) -> Iterator[bytes]:
        info = self._info(f"data/{storage.record}")
        if info.file_size != storage.bytes:
            raise Refused(f"is damaged: {storage.count} {storage.dtype} do not take {info.file_size} bytes")
        return _blocks(self._zip.open(info), info.file_size)


class _Legacy(_Reader):
    """A ``torch.save`` file of PyTorch before 1.6: five pickles (a magic number, the format's version, the machine,
    the value, the names of its storages), then each storage as the count of its elements and these.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file.seek(0, os.SEEK_END))
        self._file = file
        self._places: dict[str, int] = {}

    def load(self, device: str | torch.device) -> Any:
        """Everything in the file, its tensors on the device. Raises Refused, OSError, MemoryError, struct.error."""
        self._file.seek(0)
        head = io.BytesIO(self._file.read(_PICKLE_BYTES))
        _, version, machine = (_built(head)[0] for _ in range(3))
        little = machine.get("little_endian") if isinstance(machine, dict) else None
        if version != 1001 or little is not (sys.byteorder == "little"):
            raise Refused(f"was written by version {version!r:.99} of the format, with little_endian {little!r:.99}")
        (value, storages), (names, _) = _built(head), _built(head)
        if not isinstance(names, list) or len(names) != len(storages) or set(names) != set(storages):
            raise Refused("is damaged: it does not list the storages that its tensors refer to")
        place, end = head.tell(), self._file.seek(0, os.SEEK_END)
        for name in names:
            storage = storages[name]
            self._file.seek(place)
            (count,) = struct.unpack("<q", self._file.read(8))
            if count != storage.count or storage.bytes > end - place - 8:
                raise Refused(f"is damaged: {storage.count} {storage.dtype} do not lie at byte {place}")
            self._places[name] = place + 8
            place += 8 + storage.bytes
        return self._finished(value, device, 0)

    def _blocks(self, storage: _Storage) -> Iterator[bytes]:
        self._file.seek(self._places[storage.record])
        return _blocks(self._file, storage.bytes)


def _blocks(file: IO[bytes], length: int) -> Iterator[bytes]:
    while length and (block := file.read(min(length, 1 << 20))):
        yield block
        length -= len(block)


def _counts(values: Any) -> bool:
    """Whether these are integers that a size, a stride or an offset may have."""
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _refuse_more(what: Any) -> NoReturn:
    name = what.name if isinstance(what, _Global) else type(what).__name__
    raise Refused(f"holds more than tensors and plain values, which is never loaded: {name[:99]}")


def _built(instructions: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    """What the instructions build, with _View in the place of tensors, and the storages that these refer to.

    Nothing is imported or called. The instructions are read up to the one that ends them.
    """
    machine = _Machine()
    with warnings.catch_warnings():  # of texts with odd escapes, in instructions that are refused next
        warnings.simplefilter("ignore", DeprecationWarning)
        return _run(machine, instructions), machine.storages


def _run(machine: _Machine, instructions: IO[bytes]) -> Any:
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(instructions)):
            if count > _INSTRUCTIONS:
                raise Refused(f"takes more than {_INSTRUCTIONS} instructions to build")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.take(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise Refused(f"is damaged: {str(error)[:200]}") from None
    raise Refused("is damaged: its values have no end")


class _Machine:
    """The part of pickle's stack machine that torch.save makes use of, without its power over Python."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def take(self, name: str, argument: Any) -> None:
        """Execute one instruction. Raises IndexError, KeyError, TypeError or ValueError where it makes no sense."""
        if name in _VALUES_OF:
            self.stack.append(_VALUES_OF[name](argument))
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name == "MARK":
            self._marks.append(len(self.stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._popped(int(name[5:]) if name[5:] else None)))
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1 if name == "APPEND" else None)
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2 if name == "SETITEM" else None)
            # Other integers could be chosen to collide in the dictionary, which then takes for ever.
            if not all(type(key) is str or (type(key) is int and 0 <= key < 1 << 31) for key in items[::2]):
                raise TypeError("a dictionary has keys that are neither text nor small integers")
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":  # what torch.save adds to a state_dict: the versions of its modules
            self._popped(1)
            self._top(dict)
        elif name == "BINPERSID":
            storage = _storage(*self._popped(1)[0])
            self.stack.append(self.storages.setdefault(storage.record, storage))
            if self.stack[-1] != storage:
                raise ValueError(f"the storage {storage.record!r:.99} is described in two ways")
        elif name == "REDUCE":
            function, arguments = self._popped(2)
            self.stack.append(_called(function, arguments))
        elif name != "PROTO":
            _refuse_more(_Global(f"instruction {name}"))

    def _popped(self, count: int | None) -> list[Any]:
        """The last ``count`` values of the stack, or for None those since the last mark."""
        start = self._marks.pop() if count is None else len(self.stack) - count
        if start < 0 or start > len(self.stack):
            raise IndexError("its stack of values is too short")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            _refuse_more(self.stack[-1])
        return self.stack[-1]


# Instructions that put a new value on the stack.
_VALUES_OF: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda argument: argument),
    **dict.fromkeys(("BINUNICODE", "BINSTRING", "SHORT_BINSTRING"), lambda argument: argument),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "GLOBAL": _Global,
}


_REBUILD_TENSOR = (_Global("torch._utils _rebuild_tensor_v2"), _Global("torch._utils _rebuild_tensor"))


def _storage(kind: Any, dtype: Any, record: Any, _location: Any, count: Any, part: Any = None) -> _Storage:
    if (
        kind != "storage"
        or part is not None
        or not isinstance(dtype, _Global)
        or not isinstance(record, str)
        or not _counts((count,))
    ):
        raise ValueError("elements are not described as torch.save does")
    module, _, name = dtype.name.partition(" ")
    if module != "torch" or name not in _DTYPES:
        _refuse_more(dtype)
    return _Storage(record, _DTYPES[name], count)


def _called(function: Any, arguments: Any) -> Any:
    """The calls that tensors and state dicts are written with, as values."""
    if function == _Global("collections OrderedDict") and arguments == ():
        return {}
    if isinstance(arguments, tuple) and function in _REBUILD_TENSOR:
        return _View(arguments)
    if isinstance(arguments, tuple) and len(arguments) == 3 and isinstance(arguments[0], _View):
        if function == _Global("torch._utils _rebuild_parameter"):
            return arguments[0]
    elif isinstance(arguments, tuple) and len(arguments) == 1 and function == _Global("collections OrderedDict"):
        return _ordered(arguments[0])
    _refuse_more(function)


def _ordered(items: Any) -> dict[str, Any]:
    """A dictionary as Python 2 wrote it, a list of keys and values."""
    if not isinstance(items, list) or not all(isinstance(i, list) and len(i) == 2 and type(i[0]) is str for i in items):
        raise ValueError("an OrderedDict is not made of names and values")
    return dict(items)
