"""PyTorch files of tensors (`.pt`), read and written without PyTorch.

Such a file is a zip archive: a pickle that lists the tensors, and beside it one uncompressed entry of raw
bytes per storage. Pickles are programs. Here the standard library's interpreter in Python runs the few
instructions that a dict of tensors needs; it rejects a file with any other, with a call of anything but the
two functions below, and with a key that is not a string (hashing a nested tuple can take for ever). The one
in C would allocate a memo of gigabytes for a file of 30 bytes. Nothing is imported on behalf of a file.
Tensors are views of the mapped file, so a file cannot cause large allocations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import io
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import struct
import types
from typing import Any
import zipfile
import zlib

import ml_dtypes
import numpy as np

from wsparse import files
from wsparse.errors import UserError, quoted

# PyTorch's storage classes.
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

# A list of 3,000 tensors takes about half a megabyte. Every byte may be an instruction that makes an object,
# so the limit bounds memory and time as well.
_MAX_PICKLE_BYTES = 1 << 19
# A tree of tensors may have many more; most of its bytes are names and numbers.
_MAX_TREE_BYTES = 1 << 26
_MAX_TREE_INSTRUCTIONS = 1 << 22
# NumPy's limit, and PyTorch's.
_MAX_AXES = 64
_ALIGNMENT, _LOCAL_HEADER_SIZE = 64, 30


class TorchFileError(UserError):
    """A `.pt` file that is damaged, or that contains more than a dict of tensors."""


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
    tensors = _opened(path, _Interpreter, _MAX_PICKLE_BYTES, "list of tensors")
    if (bad := _not_tensor(tensors)) is not None:
        reason = f"it must hold a dict of tensors, but {bad}"
        raise TorchFileError(f"{path} cannot be read: {reason}")
    return tensors


def read_tree(path: str | os.PathLike[str]) -> Any:
    """Reads a `.pt` file of nested dicts, lists and tuples of tensors, numbers, strings, bools and None.

    Keys of dicts are strings, ints, floats, or tensors of one number, which become that number. What is the
    same object in the file is the same object in the tree, so a list may hold itself: do not walk a tree
    without knowing its form.

    Returns:
      The tree; tensors are read-only arrays, as `read` gives them, or empty ones.

    Raises:
      TorchFileError: As `read`; the pickle contains anything else.
    """
    return _opened(path, _TreeInterpreter, _MAX_TREE_BYTES, "tree")


def _opened(path: str | os.PathLike[str], interpreter: type[_Interpreter], max_bytes: int, what: str) -> Any:
    """Returns the content of a file; its pickle, "what", may have `max_bytes`."""
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
        return _read(path, mapped, interpreter, max_bytes, what)
    except OSError as error:
        raise TorchFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except TorchFileError as error:
        raise TorchFileError(f"{path} cannot be read: {error}") from error


def _not_tensor(tensors: Any) -> str | None:
    """Returns what of a file's content is not as a dict of tensors."""
    if type(tensors) is not dict:
        return f"its pickle has a {type(tensors).__name__} in place of a dict"
    names = (name for name, tensor in tensors.items() if type(tensor) is not np.ndarray)
    return next((f"{quoted(name)} is not a tensor" for name in names), None)


def _read(
    path: pathlib.Path, mapped: mmap.mmap, interpreter: type[_Interpreter], max_bytes: int, what: str
) -> Any:
    entries = _entries(path, mapped)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(f"it must have one entry NAME/data.pkl, it has {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")

    @functools.cache
    def content(name: str) -> memoryview:
        view, crc = entries[name]
        if zlib.crc32(view) != crc:
            raise TorchFileError(f"its entry {quoted(name)} is damaged (CRC)")
        return view

    def storage(key: str, dtype: np.dtype, size: int) -> np.ndarray:
        name, expected = f"{root}data/{key}", size * dtype.itemsize
        if name not in entries:
            raise TorchFileError(f"a tensor is stored in {quoted(name)}, which is missing")
        if len(entries[name][0]) != expected:
            raise TorchFileError(f"{quoted(name)} must have {expected} bytes, it has {len(entries[name][0])}")
        return np.frombuffer(content(name), dtype) if size else np.empty(0, dtype)

    if f"{root}byteorder" in entries and bytes(content(f"{root}byteorder")) != b"little":
        raise TorchFileError("it was written on a big-endian machine")
    if len(entries[pickles[0]][0]) > max_bytes:
        raise TorchFileError(f"its {what} has more than {max_bytes} bytes")
    return interpreter(bytes(content(pickles[0])), storage).result()


def _entries(path: pathlib.Path, mapped: mmap.mmap) -> dict[str, tuple[memoryview, int]]:
    """Returns the bytes and the CRC of every entry by name; entries are inside the file and disjoint."""
    entries: dict[str, tuple[memoryview, int]] = {}
    free = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                name = info.filename
                if name in entries:
                    raise TorchFileError(f"its entry {quoted(name)} occurs twice")
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise TorchFileError(f"its entry {quoted(name)} is compressed, which PyTorch never does")
                if info.flag_bits & 1:
                    raise TorchFileError(f"its entry {quoted(name)} is encrypted")
                if info.header_offset < free:
                    raise TorchFileError(f"its entry {quoted(name)} overlaps the one before")
                # Reads its header, which must agree with the directory, up to where its bytes begin.
                archive.open(info).close()
                assert archive.fp is not None
                start = archive.fp.tell()
                free = start + info.file_size
                if free > archive.start_dir:
                    raise TorchFileError(f"its entry {quoted(name)} reaches beyond the end of the data")
                entries[name] = memoryview(mapped)[start:free], info.CRC
    except TorchFileError:
        raise
    except Exception as error:  # What zipfile raises for a damaged archive is of many kinds.
        raise TorchFileError(f"its zip directory is damaged ({quoted(error)})") from error
    return entries


@dataclasses.dataclass(frozen=True)
class _Storage:
    array: np.ndarray


class _Instructions(dict):
    """The instructions that are run, by code."""

    def __missing__(self, code: int):
        raise TorchFileError(f"its pickle has the instruction {bytes([code])!r}, which no tensor needs")


class _Counted(_Instructions):
    """Instructions of which a limited number is run: the smallest take a hundred times their size."""

    run = 0

    def __getitem__(self, code: int):
        self.run += 1
        if self.run > _MAX_TREE_INSTRUCTIONS:
            raise TorchFileError(f"its pickle has more than {_MAX_TREE_INSTRUCTIONS} instructions")
        return super().__getitem__(code)


class _Interpreter(pickle._Unpickler):
    """Runs a pickle of dicts, tuples, strings, ints, and tensors in the storages that a function returns."""

    stack: list[Any]
    metastack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, pickled: bytes, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(io.BytesIO(pickled))
        self._storage = storage

    def result(self) -> Any:
        try:
            value = self.load()
        except TorchFileError:
            raise
        except Exception as error:  # What garbage raises is of many kinds.
            reason = quoted(f"{type(error).__name__}: {error}")
            raise TorchFileError(f"its pickle is damaged ({reason})") from error
        if self.stack or self.metastack:
            raise TorchFileError("its pickle leaves values over")
        return value

    def find_class(self, module: str, name: str) -> Any:
        functions = {_DICT: _empty_dict, _TENSOR: _tensor, _PARAMETER: _parameter}
        if f"{module} {name}" in functions:
            return functions[f"{module} {name}"]
        if module == "torch" and name in _STORAGES:
            return name
        raise TorchFileError(
            f"its pickle asks for {quoted(f'{module}.{name}')}; only tensors, storages and OrderedDict are "
            "allowed"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, size = _of_type(pid, tuple)
        dtype = _STORAGES.get(_of_type(name, str))
        if _of_type(kind, str) != "storage" or dtype is None or _of_type(size, int) < 0:
            raise TorchFileError("its pickle refers to something that is not a storage")
        return _Storage(self._storage(_of_type(key, str), dtype, size))

    def load_reduce(self) -> None:
        arguments = _of_type(self.stack.pop(), tuple)
        self.append(_of_type(self.stack.pop(), types.FunctionType)(*arguments))

    def load_build(self) -> None:
        # A module's state dict carries the versions of its modules as an attribute.
        if set(_of_type(self.stack.pop(), dict)) != {"_metadata"}:
            raise TorchFileError("its pickle sets attributes")
        _of_type(self.stack[-1], dict)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise TorchFileError("its pickle has a key without a value")
        if bad := [key for key in items[::2] if type(key) not in self._key_types]:
            raise TorchFileError(f"its pickle has a {type(bad[0]).__name__} in place of a str")
        _of_type(self.stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))

    # Of types whose hashes are quick.
    _key_types: tuple[type, ...] = (str,)
    _allowed = (
        *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
        *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
        *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
        *(pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
    )
    dispatch = _Instructions(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _allowed}
        | {
            pickle.REDUCE[0]: load_reduce,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
        }
    )


class _TreeInterpreter(_Interpreter):
    """Runs a pickle that has lists and floats too, empty tensors, and numbers as keys."""

    def __init__(self, pickled: bytes, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(pickled, storage)
        self.dispatch = _Counted(self.dispatch)  # pyrefly: ignore

    def find_class(self, module: str, name: str) -> Any:
        return _tensor_or_none if f"{module} {name}" == _TENSOR else super().find_class(module, name)

    def load_append(self) -> None:
        value = self.stack.pop()
        _of_type(self.stack[-1], list).append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        _of_type(self.stack[-1], list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        super()._set_items([_scalar(item) if i % 2 == 0 else item for i, item in enumerate(items)])

    _key_types = (str, int, float)
    dispatch = _Instructions(
        {
            **_Interpreter.dispatch,
            pickle.BINFLOAT[0]: pickle._Unpickler.dispatch[pickle.BINFLOAT[0]],
            pickle.EMPTY_LIST[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.SETITEM[0]: _Interpreter.load_setitem,
            pickle.SETITEMS[0]: _Interpreter.load_setitems,
        }
    )


def _scalar(key: Any) -> Any:
    """Returns the number of a tensor of one number; other keys as they are."""
    return key.item() if type(key) is np.ndarray and key.size == 1 else key


def _tensor_or_none(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
) -> np.ndarray:
    """Returns what `_tensor` does, and an empty array for a tensor without numbers."""
    if type(shape) is tuple and 0 in shape and len(shape) <= _MAX_AXES:
        for size in shape:
            if _of_type(size, int) < 0 or size >= 1 << 31:
                raise TorchFileError("an empty tensor has a size that is none")
        return np.ndarray(shape, _of_type(storage, _Storage).array.dtype)
    return _tensor(storage, offset, shape, strides, requires_grad, hooks)


def _of_type(value: Any, kind: type) -> Any:
    # Values are not printed: a few bytes of pickle can describe one of any length.
    if type(value) is not kind:
        raise TorchFileError(f"its pickle has a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _empty_dict() -> dict[str, Any]:
    return {}


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> np.ndarray:
    del requires_grad, hooks
    return _of_type(tensor, np.ndarray)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
) -> np.ndarray:
    """Returns a view of a storage; offset and strides are in elements.

    Rejects a tensor that leaves its storage, or in which two elements share a place.
    """
    del requires_grad, hooks
    array: np.ndarray = _of_type(storage, _Storage).array
    for number in (_of_type(offset, int), *_of_type(shape, tuple), *_of_type(strides, tuple)):
        _of_type(number, int)
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise TorchFileError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    if min(offset, *shape, *strides, 0) < 0 or 0 in shape:
        raise TorchFileError("a tensor has a negative size, or none")
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise TorchFileError("a tensor overlaps itself")
            reach += stride * (size - 1)
    if offset + reach >= array.size:
        raise TorchFileError(f"a tensor reaches element {offset + reach} of a storage of {array.size}")
    # The stride of an axis of length 1 means nothing and may be any number.
    steps = [(s if n > 1 else 1) * array.itemsize for s, n in zip(strides, shape, strict=True)]
    return np.ndarray(shape, array.dtype, array, offset * array.itemsize, steps)


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
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    storage = [_plain("storage"), _global(f"torch {kind}"), *map(_plain, (str(number), "cpu", array.size))]
    empty_dict = [_global(_DICT), pickle.EMPTY_TUPLE, pickle.REDUCE]
    return [
        *(_global(_TENSOR), pickle.MARK, pickle.MARK, *storage, pickle.TUPLE, pickle.BINPERSID),
        *map(_plain, (0, tuple(array.shape), strides, False)),
        *(*empty_dict, pickle.TUPLE, pickle.REDUCE),
    ]


def _global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _store(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds an entry whose bytes start at a multiple of 64, as in PyTorch, so that they can be mapped."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None
    # A field of padding takes 4 bytes itself.
    start = archive.fp.tell() + _LOCAL_HEADER_SIZE + len(name.encode()) + 4
    info.extra = struct.pack("<2sH", b"FB", -start % _ALIGNMENT) + bytes(-start % _ALIGNMENT)
    archive.writestr(info, content)
