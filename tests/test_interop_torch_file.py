"""`.pt` files without PyTorch: what is read is what was written, and a hostile file gets one typed error."""

import codecs
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zipfile

from helpers import assert_bitwise
import ml_dtypes
import numpy as np
import pytest

from wsparse.errors import UserError
from wsparse.interop import torch_file
from wsparse.interop.torch_file import TorchFileError

GOLDEN = pathlib.Path(__file__).parent / "golden"
PUBLISHED = GOLDEN / "dense_layernorm_tied" / "final_model.pt"
TYPES = [
    np.float32, np.float64, np.float16, ml_dtypes.bfloat16,
    np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_,
]  # fmt: skip


def state() -> dict[str, np.ndarray]:
    """Every dtype, some shapes, and an array under two names."""
    rng = np.random.default_rng(0)
    arrays = {np.dtype(t).name: (rng.normal(size=(3, 4)) * 9).astype(t) for t in TYPES}
    return arrays | {
        "scalar": np.float32(2.5).reshape(()),
        "vector": np.arange(7, dtype=np.float32),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "tied": arrays["float32"],
    }


def assert_same(got, want):
    assert list(got) == list(want)
    assert_bitwise(got, want)


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in entries.items():
            out.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compression)
    return file.getvalue()


def entries_of(path: pathlib.Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def refused(tmp_path: pathlib.Path, content: bytes) -> str:
    """The message with which a file is refused."""
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(TorchFileError) as error:
        torch_file.read(path)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be read: ") and "\n" not in message
    return message.removeprefix(f"{path} cannot be read: ")


# What is right -------------------------------------------------------------------------------------


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    torch_file.write(tmp_path / "model.pt", state())
    assert_same(torch_file.read(tmp_path / "model.pt"), state())


def test_arrays_are_stored_once_and_aligned(tmp_path):
    torch_file.write(tmp_path / "model.pt", state())
    got = torch_file.read(tmp_path / "model.pt")
    assert np.shares_memory(got["tied"], got["float32"])
    assert not np.shares_memory(got["vector"], got["float32"])
    assert all(array.ctypes.data % 64 == 0 for array in got.values())
    with pytest.raises(ValueError, match="read-only"):
        got["vector"][0] = 1


def test_a_type_without_a_storage_class_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(UserError, match="'x' is of type complex64"):
        torch_file.write(tmp_path / "model.pt", {"x": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/final_model.pt")))
def test_published_files_are_read_and_rewritten(name, tmp_path):
    got = torch_file.read(GOLDEN / name / "final_model.pt")
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in got.values())
    torch_file.write(tmp_path / "model.pt", got)
    assert_same(torch_file.read(tmp_path / "model.pt"), got)


def test_tensors_are_those_that_pytorch_reads(tmp_path):
    torch = pytest.importorskip("torch")
    torch_file.write(tmp_path / "model.pt", state())
    ours = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(ours) == list(state())
    for name, array in state().items():
        same_bits = torch.from_numpy(np.array(array).view(f"u{array.dtype.itemsize}").copy())
        assert torch.equal(ours[name].view(same_bits.dtype), same_bits), name
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"rows": base[1:3], "columns": base[:, 2:4], "turned": base.T, "all": base}
    module = torch.nn.Linear(3, 2)
    for number, value in enumerate((views, module.state_dict(), dict(module.named_parameters()))):
        for protocol in (2, 4):
            path = tmp_path / f"{number}-{protocol}.pt"
            torch.save(value, path, pickle_protocol=protocol)
            want = {name: tensor.detach().numpy() for name, tensor in value.items()}
            assert_same(torch_file.read(path), want)


# What is wrong -------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def with_pickle(pickled: bytes) -> bytes:
    return archive({"m/data.pkl": pickled, "m/byteorder": b"little", "m/data/0": bytes(64)})


FLOATS = torch_file._global("torch FloatStorage")
TENSOR = torch_file._global("torch._utils _rebuild_tensor_v2")
plain = torch_file._plain


def tensor(
    *, offset=0, shape=(4, 4), strides=(4, 1), size=16, key="0", kind=FLOATS, function=TENSOR
) -> bytes:
    """A pickle of one tensor, with anything in the places of its parts."""
    storage = b"".join([b"(", plain("storage"), kind, plain(key), plain("cpu"), plain(size), b"tQ"])
    parts = [plain(offset), plain(shape), plain(strides), b"\x89}"]
    return b"\x80\x02}" + plain("x") + function + b"(" + storage + b"".join(parts) + b"tRs."


def test_the_pickle_of_these_tests_is_a_good_one(tmp_path):
    """The control of what follows."""
    (tmp_path / "model.pt").write_bytes(with_pickle(tensor()))
    assert torch_file.read(tmp_path / "model.pt")["x"].shape == (4, 4)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "touch {}"), f"{os.name}.system"),
        (Call(eval, "open({!r}, 'w')"), "__builtin__.eval"),
        (Call(exec, "open({!r}, 'w')"), "__builtin__.exec"),
        (Call(pathlib.Path.touch, pathlib.PurePosixPath("x")), "getattr"),
        ({"x": Call(collections.Counter, "abc")}, "collections.Counter"),
        ({"x": np.ones(3)}, "numpy"),
    ],
    ids=["system", "eval", "exec", "method", "counter", "array"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_unexecuted(value, name, protocol, tmp_path):
    proof = tmp_path / "executed"
    if isinstance(value, Call):
        function, arguments = value.call
        texts = [a.format(str(proof)) if isinstance(a, str) else a for a in arguments]
        value = Call(function, *texts)
    message = refused(tmp_path, with_pickle(pickle.dumps(value, protocol=protocol)))
    assert "pickle" in message
    if protocol == 2:
        assert f"asks for '{name}" in message or "asks for '__builtin__.getattr" in message
    assert not proof.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor(offset=1), "reaches element 16 of a storage of 16"),
        (tensor(shape=(5, 4)), "reaches element 19"),
        (tensor(strides=(1, 1)), "overlaps itself"),
        (tensor(shape=(10**9,), strides=(0,)), "overlaps itself"),
        (tensor(shape=(2**62, 2**62), strides=(2**62, 1)), "reaches element"),
        (tensor(shape=(0, 4)), "negative size, or none"),
        (tensor(shape=(-4, 4)), "negative size, or none"),
        (tensor(offset=-1), "negative size, or none"),
        (tensor(strides=(4, -1)), "negative size, or none"),
        (tensor(shape=(4,)), "1 axes and 2 strides"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "65 axes"),
        (tensor(shape=(True, 4)), "a bool in place of a int"),
        (tensor(size=17, shape=(4, 4)), "'m/data/0' must have 68 bytes, it has 64"),
        (tensor(size=2**60, shape=(2**30, 2**30), strides=(2**30, 1)), "must have 4611686018427387904 bytes"),
        (tensor(size=-16), "not a storage"),
        (tensor(key="1"), "'m/data/1', which is missing"),
        (tensor(key="../byteorder"), "which is missing"),
        (tensor(kind=TENSOR), "a function in place of a str"),
        (tensor(kind=plain("x")), "not a storage"),
        (tensor(function=FLOATS), "a str in place of a function"),
        (tensor(function=torch_file._global("collections OrderedDict")), "takes 0 positional arguments"),
        (tensor(kind=b"ctorch\nComplexFloatStorage\n"), "asks for 'torch.ComplexFloatStorage'"),
        (tensor()[:-9], "pickle is damaged"),
        (b"\x80\x02.", "pickle is damaged"),
        (b"\x80\x02}}.", "leaves values over"),
        (b"\x80\x02h\x07.", "Memo value not found"),
        (b"\x80\x02}X\x01\x00\x00\x00xK\x01s.", "must hold a dict of tensors, but 'x' is not a tensor"),
        (b"\x80\x02}K\x01K\x01s.", "a int in place of a str"),
        (b"\x80\x02).", "a tuple in place of a dict"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02}}b.", "sets attributes"),
        (b"\x80\x02t.", "pickle is damaged"),
        (b"\x80\x02]\x8b\xff\xff\xff\x7f.", "pickle"),
    ],
)  # fmt: skip
def test_a_pickle_that_describes_no_tensors_in_the_file_is_refused(pickled, message, tmp_path):
    assert message in refused(tmp_path, with_pickle(pickled))


def test_a_small_pickle_of_a_huge_value_is_refused_at_once(tmp_path):
    # Tuples of two of the last one: 2^60 leaves in 240 bytes, as a key and in place of a tensor.
    bomb = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    started = time.monotonic()
    for pickled in (
        b"\x80\x02}" + bomb + b"Ns.",
        b"\x80\x02}" + plain("x") + bomb + b"s.",
        b"\x80\x02" + bomb + b".",
    ):
        refused(tmp_path, with_pickle(pickled))
    assert time.monotonic() - started < 2


def test_a_memo_of_a_huge_index_takes_no_memory(tmp_path):
    (tmp_path / "model.pt").write_bytes(with_pickle(tensor().replace(b"}", b"}r\xfe\xff\xff\x7f", 1)))
    assert torch_file.read(tmp_path / "model.pt")["x"].shape == (4, 4)


@pytest.mark.parametrize("instruction", [b"}", b"}\x94", b"\x85"], ids=["dicts", "memo", "tuples"])
def test_the_largest_pickle_takes_little_memory(instruction, tmp_path):
    """As many objects as fit: a dict each, a memo entry each, a tuple around the last one."""
    size = 1 << 16
    count = size // len(instruction)
    tracemalloc.start()
    message = refused(tmp_path, with_pickle(b"\x80\x02}" + instruction * count + b"."))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "leaves values over" in message or "a tuple in place of a dict" in message
    assert peak / size * torch_file._MAX_PICKLE_BYTES < 200e6


@pytest.mark.parametrize("instruction", [b"}", b"}\x94", b"\x85", b"(", b"\x8c\x02ab"])
def test_a_tree_of_many_small_values_is_refused_before_it_takes_much_memory(
    instruction, tmp_path, monkeypatch
):
    limit, whole = 1 << 14, torch_file._MAX_TREE_INSTRUCTIONS
    monkeypatch.setattr(torch_file, "_MAX_TREE_INSTRUCTIONS", limit)
    (tmp_path / "tree.pt").write_bytes(with_pickle(b"\x80\x02}" + instruction * limit + b"."))
    tracemalloc.start()
    with pytest.raises(TorchFileError, match="its pickle has more than 16384 instructions"):
        torch_file.read_tree(tmp_path / "tree.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / limit * whole < 1e9


def test_an_empty_or_foreign_or_older_file_is_refused(tmp_path):
    assert "no zip archive" in refused(tmp_path, b"")
    assert "no zip archive" in refused(tmp_path, b"\x93NUMPY")
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    assert "before version 1.6" in refused(tmp_path, legacy)
    with pytest.raises(TorchFileError, match="cannot be read: No such file"):
        torch_file.read(tmp_path / "missing.pt")
    with pytest.raises(TorchFileError, match="cannot be read: Is a directory"):
        torch_file.read(tmp_path)


@pytest.mark.parametrize("size", [5, 64, 1000, -400, -22, -1])
def test_a_truncated_file_is_refused(size, tmp_path):
    assert "zip directory is damaged" in refused(tmp_path, PUBLISHED.read_bytes()[:size])


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    content = bytearray(PUBLISHED.read_bytes())
    with zipfile.ZipFile(PUBLISHED) as file:
        entry = next(info for info in file.infolist() if info.filename.endswith("data/5"))
    content[entry.header_offset + 200] ^= 1
    assert "data/5' is damaged (CRC)" in refused(tmp_path, bytes(content))


def test_a_compressed_bomb_is_refused_without_unpacking(tmp_path):
    entries = {"m/data.pkl": tensor(size=2**24, shape=(2**24,), strides=(1,))}
    bomb = archive(entries | {"m/data/0": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**17
    assert "is compressed" in refused(tmp_path, bomb)


def test_an_entry_that_occurs_twice_is_refused(tmp_path):
    content = with_pickle(tensor())
    assert "occurs twice" in refused(tmp_path, content.replace(b"m/byteorder", b"m/data.pkl\0"[:11]))


def directory_field(content: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """The archive with a field of an entry's record in the directory changed."""
    record = content.rindex(b"PK\1\2", 0, content.rindex(name))
    start = record + offset
    return content[:start] + value + content[start + len(value) :]


def test_overlapping_and_outlying_entries_are_refused(tmp_path):
    content = with_pickle(tensor())
    first = content.index(b"PK\3\4")
    assert first == 0
    overlapping = directory_field(content, b"m/data/0", 42, struct.pack("<L", 0))
    assert "overlaps the one before" in refused(tmp_path, overlapping)
    both = struct.pack("<LL", 2**31, 2**31)
    outlying = directory_field(content, b"m/data/0", 20, both)
    assert "beyond the end of the data" in refused(tmp_path, outlying)
    elsewhere = directory_field(content, b"m/data/0", 42, struct.pack("<L", 2**31))
    assert "Truncated file header" in refused(tmp_path, elsewhere)
    encrypted = directory_field(content, b"m/data/0", 8, struct.pack("<H", 1))
    assert "encrypted" in refused(tmp_path, encrypted)
    renamed = content.replace(b"m/data/0", b"m/data/1", 1)
    assert "File name in directory" in refused(tmp_path, renamed)


def test_an_archive_needs_one_list_of_tensors_in_little_endian(tmp_path):
    good = {"m/data.pkl": tensor(), "m/data/0": bytes(64)}
    assert "one entry NAME/data.pkl, it has 0" in refused(tmp_path, archive({"a": b""}))
    assert "it has 2" in refused(tmp_path, archive(good | {"n/data.pkl": b""}))
    assert "big-endian" in refused(tmp_path, archive(good | {"m/byteorder": b"big"}))
    large = tensor()[:-1] + b"0" * (torch_file._MAX_PICKLE_BYTES + 1)
    assert "list of tensors has more than" in refused(tmp_path, archive(good | {"m/data.pkl": large}))


# Fuzzing -------------------------------------------------------------------------------------------

_FORBIDDEN = ("import", "exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen")
_watched: list[str] | None = None


def _watch(event, arguments):
    if _watched is not None and event in _FORBIDDEN:
        _watched.append(f"{event} {arguments!r}")


@pytest.fixture
def executed():
    """What was imported or executed meanwhile."""
    global _watched
    if not hasattr(sys, "_wsparse_watch"):
        # An audit hook cannot be removed again.
        sys.addaudithook(_watch)
        sys._wsparse_watch = True
    # The standard library's own codecs for names in archives and text in pickles, imported on first use.
    for codec in ("cp437", "raw-unicode-escape"):
        codecs.lookup(codec)
    _watched = []
    yield _watched
    _watched = None


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to four changes of a byte string: bits, bytes, numbers, pieces dropped, doubled, or moved."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 30, 200])
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(min(size, 8))
        elif kind == 2:
            number = rng.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63])
            data[at : at + 8] = struct.pack("<Q", number)[: rng.choice([1, 2, 4, 8])]
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        elif kind == 5:
            source = rng.randrange(len(data) + 1)
            data[at:at] = data[source : source + size]
        else:
            del data[at if rng.random() < 0.2 else len(data) :]
        data = data or bytearray(b"P")
    return bytes(data)


def fuzz(count: int, seed: int, folder: pathlib.Path) -> collections.Counter[str]:
    """Read `count` mutated files; how many were read, and why the others were refused."""
    rng = random.Random(seed)
    torch_file.write(
        folder / "good.pt", {name: state()[name] for name in ("float32", "vector", "int8", "tied")}
    )
    whole, parts = (folder / "good.pt").read_bytes(), entries_of(folder / "good.pt")
    path, outcomes = folder / "mutated.pt", collections.Counter()
    for _ in range(count):
        if rng.random() < 0.5:
            content = mutate(rng, whole)
        else:
            # A pickle inside an archive that is whole, or the CRC would hide it.
            name = rng.choice(["good/data.pkl"] * 4 + list(parts))
            content = archive(parts | {name: mutate(rng, parts[name])})
        path.write_bytes(content)
        try:
            arrays = torch_file.read(path)
        except TorchFileError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 400
            outcomes[message.removeprefix(f"{path} cannot be read: ").split("(")[0][:24]] += 1
        else:
            outcomes["read"] += 1
            assert all(array.nbytes <= len(content) for array in arrays.values())
    return outcomes


def check_fuzzing(outcomes: collections.Counter[str], executed: list[str]):
    assert not executed
    # The files are neither all broken nor all whole, and are refused for many reasons.
    assert 0.02 < outcomes["read"] / outcomes.total() < 0.5
    assert len(outcomes) > 10


def test_mutated_files_are_read_or_refused_with_the_typed_error(tmp_path, executed):
    check_fuzzing(fuzz(400, 0, tmp_path), executed)


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_read_or_refused(tmp_path, executed):
    check_fuzzing(fuzz(10_000, 1, tmp_path), executed)


def test_the_watch_over_execution_notices_a_plain_unpickling(executed):
    """Negative control of the fuzzing: the standard library's reader is caught."""
    pickle.loads(pickle.dumps(Call(eval, "1")))
    assert any(each.startswith("pickle.find_class") for each in executed)
