"""PyTorch files of tensors (`.pt`), read and written without PyTorch.

Such a file is a zip archive: a pickle that lists the tensors, and beside it one uncompressed entry of raw
bytes per storage. Pickles are programs, and this reader does not run them: it interprets the few instructions
that a dict of tensors needs, over plain values of its own, and rejects a file with any other instruction or
with a name other than tensors, storages and OrderedDict. Nothing is imported or called on behalf of a file.
Tensors are views of the mapped file, so a file cannot cause large allocations.

The standard library's `pickle.Unpickler` with a restricted `find_class` would be shorter, and not as safe: a
file of 30 bytes makes it allocate a memo of gigabytes, and one of 300 makes it hash a tuple for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import struct
from typing import Any
import zipfile
import zlib

import ml_dtypes
import numpy as np

from wsparse import files
from wsparse.errors import UserError, quoted

# Names of PyTorch's storage classes.
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
# The only names that a pickle may contain.
_NAMES = frozenset([_DICT, _TENSOR, _PARAMETER, *(f"torch {name}" for name in _STORAGES)])

# A list of 3,000 tensors takes about half a megabyte. Every byte may be an instruction that makes an object,
# so the limit bounds memory and time as well.
_MAX_PICKLE_BYTES = 1 << 19
# NumPy's limit, and PyTorch's.
_MAX_AXES = 64
# Zip: encrypted, patched, strongly encrypted.
_FORBIDDEN_FLAGS = 0x61
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ALIGNMENT = 64


class TorchFileError(UserError):
    """A `.pt` file that is damaged, or that contains more than a dict of tensors."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name outside the pickle that it refers to."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it: offset and strides in elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a `.pt` file with a dict of tensors, as `torch.save(module.state_dict())` writes it.

    Returns:
      Dict from names to read-only arrays, which are views of the mapped file; tensors that share a storage
      share memory.

    Raises:
      TorchFileError: The file is not such an archive, is damaged (the CRC of every entry is checked), has
        compressed, repeated or overlapping entries, describes a tensor that its storage cannot hold, or its
        pickle contains anything but tensors, storages and OrderedDict.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start[:2] == b"\x80\x02":
                raise TorchFileError(
                    "it is in PyTorch's format from before version 1.6: load it there and save it again"
                )
            if start != b"PK\3\4":
                raise TorchFileError("it is not a PyTorch file (no zip archive)")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read(path, mapped)
    except OSError as error:
        raise TorchFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except TorchFileError as error:
        raise TorchFileError(f"{path} cannot be read: {error}") from error


def _read(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, np.ndarray]:
    entries = _entries(path, mapped)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(f"it must have one entry NAME/data.pkl, it has {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> memoryview:
        start, size, crc = entries[name]
        view = memoryview(mapped)[start : start + size]
        if zlib.crc32(view) != crc:
            raise TorchFileError(f"its entry {quoted(name)} is damaged (CRC)")
        return view

    if f"{root}byteorder" in entries and bytes(content(f"{root}byteorder")) != b"little":
        raise TorchFileError("it was written on a big-endian machine")
    if entries[pickles[0]][1] > _MAX_PICKLE_BYTES:
        raise TorchFileError(f"its list of tensors has more than {_MAX_PICKLE_BYTES} bytes")
    tensors = _tensors(_interpret(bytes(content(pickles[0]))))

    storages: dict[_Storage, np.ndarray] = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage not in storages:
            entry = f"{root}data/{storage.key}"
            if entry not in entries:
                raise TorchFileError(f"{quoted(name)} is stored in {quoted(entry)}, which is missing")
            expected = storage.size * storage.dtype.itemsize
            if entries[entry][1] != expected:
                raise TorchFileError(
                    f"{quoted(entry)} must have {expected} bytes, it has {entries[entry][1]}"
                )
            storages[storage] = np.frombuffer(content(entry), storage.dtype)
    return {name: _view(storages[tensor.storage], tensor) for name, tensor in tensors.items()}


# The archive ---------------------------------------------------------------------------------------


def _entries(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, tuple[int, int, int]]:
    """Returns `(start, size, CRC)` of the bytes of every entry by name, all inside the file and disjoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except Exception as error:  # What zipfile raises for a damaged directory is of many kinds.
        raise TorchFileError(f"its zip directory is damaged ({quoted(str(error))})") from error
    entries: dict[str, tuple[int, int, int]] = {}
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if name in entries:
            raise TorchFileError(f"its entry {quoted(name)} occurs twice")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise TorchFileError(f"its entry {quoted(name)} is compressed, which PyTorch never does")
        if info.flag_bits & _FORBIDDEN_FLAGS:
            raise TorchFileError(f"its entry {quoted(name)} is encrypted")
        if info.header_offset < free:
            raise TorchFileError(f"its entry {quoted(name)} overlaps the one before")
        start = _data_start(info, mapped)
        free = start + info.file_size
        if free > directory:
            raise TorchFileError(f"its entry {quoted(name)} reaches beyond the end of the data")
        entries[name] = (start, info.file_size, info.CRC)
    return entries


def _data_start(info: zipfile.ZipInfo, mapped: mmap.mmap) -> int:
    """Returns where the bytes of an entry start: after its header, which must agree with the directory."""
    names = info.header_offset + _LOCAL_HEADER.size
    if names > len(mapped):
        raise TorchFileError(f"its entry {quoted(info.filename)} starts beyond the end of the file")
    fields = _LOCAL_HEADER.unpack_from(mapped, info.header_offset)
    signature, method, name_size, extra_size = fields[0], fields[3], fields[9], fields[10]
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    name = info.orig_filename.encode(encoding)
    if signature != b"PK\3\4" or method != zipfile.ZIP_STORED or mapped[names : names + name_size] != name:
        raise TorchFileError(f"its entry {quoted(info.filename)} has another header than in the directory")
    return names + name_size + extra_size


# The pickle ----------------------------------------------------------------------------------------


def _instructions(pickled: bytes) -> Iterator[tuple[str, Any]]:
    operations = pickletools.genops(pickled)
    while True:
        try:
            operation, argument, _ = next(operations)
        except StopIteration:
            return
        except Exception as error:  # What pickletools raises for garbage is of many kinds.
            raise TorchFileError(f"its pickle is damaged ({quoted(str(error))})") from error
        yield operation.name, argument


class _Stack(list):
    """The values a pickle works on; `marks` are positions in it."""

    def __init__(self):
        super().__init__()
        self.marks: list[int] = []

    def take(self, count: int) -> list[Any]:
        """Pops the last values; those below the last mark are out of reach."""
        if len(self) - count < (self.marks[-1] if self.marks else 0):
            raise TorchFileError("its pickle takes more values than it has")
        taken = self[len(self) - count :]
        del self[len(self) - count :]
        return taken

    def take_marked(self) -> list[Any]:
        if not self.marks:
            raise TorchFileError("its pickle has a tuple or dict without a beginning")
        return self.take(len(self) - self.marks.pop())


_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _interpret(pickled: bytes) -> Any:
    """Returns the value of a pickle, in dicts, tuples, strings, ints, and the classes of this module."""
    stack, memo = _Stack(), {}
    for name, argument in _instructions(pickled):
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(stack.take(_TUPLES[name])))
            case "MARK":
                stack.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(stack.take_marked()))
            case "SETITEM" | "SETITEMS":
                items = stack.take(2) if name == "SETITEM" else stack.take_marked()
                (target,) = stack.take(1)
                _set_items(target, items)
                stack.append(target)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                (value,) = stack.take(1)
                stack.append(value)
                memo[len(memo) if argument is None else argument] = value
            case "BINGET" | "LONG_BINGET":
                if argument not in memo:
                    raise TorchFileError("its pickle refers to a value that it does not have")
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument))
            case "STACK_GLOBAL":
                module, attribute = (_of_type(part, str) for part in stack.take(2))
                stack.append(_named(f"{module} {attribute}"))
            case "BINPERSID":
                stack.append(_storage(*stack.take(1)))
            case "REDUCE":
                stack.append(_built(*stack.take(2)))
            case "BUILD":
                target, state = stack.take(2)
                # A module's state dict carries the versions of its modules as an attribute.
                if type(target) is not dict or set(_of_type(state, dict)) != {"_metadata"}:
                    raise TorchFileError("its pickle sets attributes")
                stack.append(target)
            case "STOP":
                (value,) = stack.take(1)
                if stack or stack.marks:
                    raise TorchFileError("its pickle leaves values over")
                return value
            case _:
                raise TorchFileError(f"its pickle has the instruction {name}, which no tensor needs")
    raise AssertionError("pickletools refuses a pickle without STOP")


def _named(name: str) -> _Name:
    if name not in _NAMES:
        asked = quoted(name.replace(" ", ".", 1))
        raise TorchFileError(
            f"its pickle asks for {asked}; only tensors, storages and OrderedDict are allowed"
        )
    return _Name(name)


def _of_type(value: Any, kind: type) -> Any:
    # Values are not printed: a few bytes of pickle can describe one of any length.
    if type(value) is not kind:
        raise TorchFileError(f"its pickle has a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise TorchFileError("its pickle has a key without a value")
    pairs = zip(items[::2], items[1::2], strict=True)
    _of_type(target, dict).update((_of_type(key, str), value) for key, value in pairs)


def _storage(identifier: Any) -> _Storage:
    if len(_of_type(identifier, tuple)) != 5:
        raise TorchFileError("its pickle refers to something that is not a storage")
    kind, name, key, _, size = identifier
    dtype = _STORAGES.get(_of_type(name, _Name).name.removeprefix("torch "))
    if _of_type(kind, str) != "storage" or dtype is None or _of_type(size, int) < 0:
        raise TorchFileError("its pickle refers to something that is not a storage")
    return _Storage(dtype, _of_type(key, str), size)


def _built(function: Any, arguments: Any) -> Any:
    """Returns the result of a call that a pickle describes, for the three that are known."""
    name, arguments = _of_type(function, _Name).name, _of_type(arguments, tuple)
    if name == _DICT and not arguments:
        return {}
    if name == _TENSOR and len(arguments) == 6:
        storage, offset, shape, strides, _, _ = arguments
        return _checked(
            _Tensor(
                _of_type(storage, _Storage),
                _of_type(offset, int),
                _of_type(shape, tuple),
                _of_type(strides, tuple),
            )
        )
    if name == _PARAMETER and len(arguments) == 3:
        return _of_type(arguments[0], _Tensor)
    raise TorchFileError(f"its pickle uses {name.replace(' ', '.', 1)} in an unknown way")


def _checked(tensor: _Tensor) -> _Tensor:
    """Rejects a tensor that leaves its storage, or in which two elements share a place."""
    shape, strides = tensor.shape, tensor.strides
    for number in (*shape, *strides):
        _of_type(number, int)
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise TorchFileError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    if min(tensor.offset, *shape, *strides, 0) < 0 or 0 in shape:
        raise TorchFileError("a tensor has a negative size, or none")
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise TorchFileError("a tensor overlaps itself")
            reach += stride * (size - 1)
    if tensor.offset + reach >= tensor.storage.size:
        raise TorchFileError(
            f"a tensor reaches element {tensor.offset + reach} of a storage of {tensor.storage.size}"
        )
    return tensor


def _tensors(value: Any) -> dict[str, _Tensor]:
    for name, tensor in _of_type(value, dict).items():
        if type(tensor) is not _Tensor:
            raise TorchFileError(f"it must hold a dict of tensors, but {quoted(name)} is not a tensor")
    return value


def _view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    size = storage.itemsize
    # The stride of an axis of length 1 means nothing and may be any number.
    strides = [s * size if n > 1 else size for s, n in zip(tensor.strides, tensor.shape, strict=True)]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


# Writing -------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as `torch.load(path, weights_only=True)` reads them, equal arrays as equal bytes.

    An array that occurs under several names (the same object) is stored once, as PyTorch does for tied
    weights.

    Args:
      path: File to write.
      state: Arrays by name.

    Raises:
      UserError: An array has a dtype without a storage class.
    """
    classes = {dtype: name for name, dtype in _STORAGES.items()}
    storages: dict[int, np.ndarray] = {}
    numbers: dict[int, int] = {}
    pickled = [pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for name, array in state.items():
        kind = classes.get(array.dtype)
        if kind is None:
            raise UserError(f"{name!r} is of type {array.dtype}, which a .pt file does not hold")
        number = numbers.setdefault(id(array), len(numbers))
        storages[number] = array
        pickled += [_plain(name), *_pickled_tensor(array, kind, number)]
    pickled += [pickle.SETITEMS, pickle.STOP]
    path = pathlib.Path(path)
    with files.replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        _store(archive, f"{path.stem}/data.pkl", pickletools.optimize(b"".join(pickled)))
        _store(archive, f"{path.stem}/byteorder", b"little")
        for number, array in storages.items():
            _store(archive, f"{path.stem}/data/{number}", array.tobytes())
        _store(archive, f"{path.stem}/version", b"3\n")


def _plain(value: Any) -> bytes:
    """Returns the instructions that push a string, an int or a tuple of ints."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _pickled_tensor(array: np.ndarray, kind: str, number: int) -> list[bytes]:
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    storage = [
        pickle.MARK,
        _plain("storage"),
        _global(f"torch {kind}"),
        _plain(str(number)),
        _plain("cpu"),
        _plain(array.size),
        pickle.TUPLE,
        pickle.BINPERSID,
    ]
    return [
        _global(_TENSOR),
        pickle.MARK,
        *storage,
        _plain(0),
        _plain(tuple(array.shape)),
        _plain(tuple(strides)),
        pickle.NEWFALSE,
        _global(_DICT),
        pickle.EMPTY_TUPLE,
        pickle.REDUCE,
        pickle.TUPLE,
        pickle.REDUCE,
    ]


def _global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _store(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds an entry whose bytes start at a multiple of 64, as in PyTorch, so that they can be mapped."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None
    # A field of padding takes 4 bytes itself.
    start = archive.fp.tell() + _LOCAL_HEADER.size + len(name.encode()) + 4
    info.extra = struct.pack("<2sH", b"FB", -start % _ALIGNMENT) + bytes(-start % _ALIGNMENT)
    archive.writestr(info, content)
