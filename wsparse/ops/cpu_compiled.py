"""What numba compiles for CPUs; `wsparse.ops.cpu` is its face to JAX, and imports it when it is needed.

Every kernel is a pair of functions: the handler of XLA's call, which knows how many independent pieces of
work it has, and a task, which does pieces until none are left; every thread of XLA's pool runs it. Each
piece is computed by the same instructions in the same order whichever thread takes it, so results do not
depend on the number of threads.

The functions stand at the module's top, since numba's cache on disk does not recognize closures.
Shapes: B batch, T time, H head, K channels of a head, E = H * K.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from llvmlite import binding, ir
import numba
from numba import carray, extending, types
from numba.core import cgutils
import numpy as np

_i32, _f32 = np.int32, np.float32
_intrinsic: Any = extending.intrinsic

# Multiply-adds may be fused; NaN and infinity keep their meaning.
_njit: Any = numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")

# Positions, in 8-byte words, of what a handler reads in the structs of XLA's C interface for foreign
# functions (xla/ffi/api/c_api.h, stable by its own promise).
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT, _FRAME_STAGE = 1, 2, 3, 4
_FRAME_ARGS, _FRAME_RETS, _FRAME_ATTRS = 9, 14, 20
_EXTENSION_TYPE, _EXTENSION_METADATA = 1, 3
_METADATA_VERSION = 3
_BUFFER_DATA, _BUFFER_RANK, _BUFFER_DIMS = 3, 4, 5
_SCALAR_VALUE = 1
_STAGE_EXECUTE = 3
_API_DESTROY_ERROR, _API_SCHEDULE, _API_THREADS = 8, 17, 18

# Words of a job that threads share, and of the requests that its owner makes.
_NEXT, _DONE, _OWNERS, _FRAME, _ITEMS, _GRAIN, _THREADS, _SCRATCH, _REQUEST = range(9)
_JOB_WORDS = _REQUEST + 5


@_intrinsic
def _pointer(typing_context, address):
    """An integer as a `void *`."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@_intrinsic
def _add_atomically(typing_context, address, value):
    """Add to the int64 at an address; returns what was there."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "seq_cst")

    return types.int64(address, value), codegen


@_intrinsic
def _call(typing_context, address, argument):
    """Call the C function `void *f(void *)` at an address."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        word = ir.IntType(64)
        function = builder.inttoptr(arguments[0], ir.FunctionType(word, [word]).as_pointer())
        return builder.call(function, [arguments[1]])

    return types.int64(address, argument), codegen


def _address_of(symbol: str) -> Any:
    """A function that gives the address of a symbol known to LLVM by name.

    Unlike a number, a name can stand in code that is kept on disk.
    """

    @_intrinsic
    def address(typing_context):
        del typing_context

        def codegen(context, builder, signature, arguments):
            del context, signature, arguments
            word = ir.IntType(64)
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(word, [word]), symbol
            )
            return builder.ptrtoint(function, word)

        return types.int64(), codegen

    return address


@_intrinsic
def _as_float(typing_context, bits):
    """The float32 of 32 bits."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))


@_njit
def _words(address, n):
    return carray(_pointer(address), n, np.int64)


@_njit
def _buffer(frame, list_word, index):
    return _words(_words(_words(frame, _FRAME_ATTRS + 1)[list_word], index + 1)[index], 6)


@_njit
def _dims(frame, index):
    """Sizes of an operand's axes."""
    buffer = _buffer(frame, _FRAME_ARGS, index)
    return _words(buffer[_BUFFER_DIMS], buffer[_BUFFER_RANK])


@_njit
def _operand_address(frame, index):
    return _buffer(frame, _FRAME_ARGS, index)[_BUFFER_DATA]


@_njit
def _result_address(frame, index):
    return _buffer(frame, _FRAME_RETS, index)[_BUFFER_DATA]


@_njit
def _operand(frame, index):
    return _pointer(_operand_address(frame, index))


@_njit
def _result(frame, index):
    return _pointer(_result_address(frame, index))


@_njit
def _attribute(frame, index):
    """An int64 attribute; attributes are sorted by name."""
    attributes = _words(_words(frame, _FRAME_ATTRS + 1)[_FRAME_ATTRS], index + 1)
    return _words(_words(attributes[index], 2)[_SCALAR_VALUE], 1)[0]


@_njit
def _rows_and_width(frame):
    dims = _dims(frame, 0)
    rows = 1
    for axis in range(dims.shape[0] - 1):
        rows *= dims[axis]
    return rows, dims[dims.shape[0] - 1]


@_njit
def _succeeded(api, request, error):
    """Whether the interface returned no error; one that it returned is destroyed."""
    if error == 0:
        return True
    words = _words(request, 3)
    context, words[0], words[2] = words[2], 24, error
    _call(api[_API_DESTROY_ERROR], request)
    words[2] = context
    return False


@_njit
def _aligned(memory):
    """The first whole cache line of memory that has a line more than is needed: vectors straddle none."""
    return (memory + 63) // 64 * 64


@_njit
def _fill(array, value):
    """Set a matrix, by a loop that compiles faster than a slice."""
    for i in range(array.shape[0]):
        for j in range(array.shape[1]):
            array[i, j] = value


@_njit
def _copy(source, target):
    """Copy a matrix into the first rows and columns of another."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@_njit
def _release(job):
    """Give up a thread's share of a job; the last one frees it."""
    if _add_atomically(job + 8 * _OWNERS, -1) == 1:
        _free(job)


@_njit
def _take(job, finished):
    """The next pieces `start, stop` of a job after `finished` ones; without any, gives up the thread's share.

    Only a thread that has pieces may look at the call's frame: without, the call may be over.
    """
    state = _words(job, _JOB_WORDS)
    _add_atomically(job + 8 * _DONE, finished)
    start = _add_atomically(job + 8 * _NEXT, state[_GRAIN])
    if start >= state[_ITEMS]:
        _release(job)
        return 0, 0
    return start, min(start + state[_GRAIN], state[_ITEMS])


@_njit
def _executes(frame_address):
    """Whether a call is there to compute; XLA also makes some to ask and to prepare."""
    frame = _words(frame_address, _FRAME_ATTRS + 1)
    if frame[_FRAME_EXTENSION] != 0:
        extension = _words(frame[_FRAME_EXTENSION], _EXTENSION_METADATA + 1)
        if extension[_EXTENSION_TYPE] & 0xFFFFFFFF == 1:
            # XLA asks which version of the interface this was written against: 0.1.
            _words(extension[_EXTENSION_METADATA], 5)[_METADATA_VERSION] = 1 << 32
            return False
    return frame[_FRAME_STAGE] & 0xFFFFFFFF == _STAGE_EXECUTE


@_njit
def _share(frame_address, items, task):
    _share_with(frame_address, items, task, 0)


@_njit
def _share_with(frame_address, items, task, scratch):
    """Do a call's pieces, together with the threads of XLA's pool; `scratch` is an address for the task.

    The caller works too and never waits for a thread that has not begun, so a pool that is busy or has
    one thread cannot block it.
    """
    frame = _words(frame_address, _FRAME_ATTRS + 1)
    api = _words(frame[_FRAME_API], _API_THREADS + 1)
    job = _malloc(8 * _JOB_WORDS)
    state = _words(job, _JOB_WORDS)
    # The interface takes its arguments in structs: size, extension, context, and what follows.
    request, state[_THREADS] = job + 8 * _REQUEST, 1
    state[_REQUEST], state[_REQUEST + 1], state[_REQUEST + 2] = 32, 0, frame[_FRAME_CONTEXT]
    state[_REQUEST + 3] = job + 8 * _THREADS
    helpers = 0
    if items > 1 and _succeeded(api, request, _call(api[_API_THREADS], request)):
        helpers = min(state[_THREADS], items) - 1
    state[_NEXT], state[_DONE], state[_FRAME], state[_ITEMS] = 0, 0, frame_address, items
    state[_SCRATCH] = scratch
    # The caller has two shares, one for its work and one to see the end.
    state[_OWNERS] = helpers + 2
    # Eight turns for each thread: small enough that they finish together.
    state[_GRAIN] = max(1, items // (8 * (helpers + 1))) if helpers else max(1, items)
    for _ in range(helpers):
        state[_REQUEST], state[_REQUEST + 3], state[_REQUEST + 4] = 40, task, job
        if not _succeeded(api, request, _call(api[_API_SCHEDULE], request)):
            _release(job)
    _call(task, job)
    while _add_atomically(job + 8 * _DONE, 0) < items:
        pass
    _release(job)


# --- Functions ---

# The key of NaN is one above infinity's; see `wsparse.ops.selection.magnitude_keys`.
_TOP_KEY = _i32(np.array(np.inf, np.float32).view(np.int32) + 1)
_EXP_LEAST = _f32(-87.0)
_LOG2E = _f32(math.log2(math.e))
# ln 2 in two parts: the first has few bits, so that its products with small integers are exact.
_LN2_HIGH, _LN2_LOW = _f32(0.693359375), _f32(math.log(2) - 0.693359375)
_EXP_TERMS = tuple(_f32(1 / math.factorial(n)) for n in range(8))
_HALF, _ONE, _ZERO = _f32(0.5), _f32(1), _f32(0)


@_njit
def _exp(x):
    """exp of a float32 at most 0, within 2 units in the last place; at least 1.6e-38. NaN stays NaN."""
    x = _EXP_LEAST if x < _EXP_LEAST else x
    # Rounded towards zero after half was taken away: the nearest integer.
    power = _i32(x * _LOG2E - _HALF)
    n = _f32(power)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    c = _EXP_TERMS
    y = ((((c[7] * r + c[6]) * r + c[5]) * r + c[4]) * r + c[3]) * r + c[2]
    y = (y * r + c[1]) * r + c[0]
    return y * _as_float(_i32(_i32(power + _i32(127)) << _i32(23)))


# --- Vectors of 16 float32 ---
#
# What the compiler would not vectorize by itself, written with LLVM's vectors: it makes the instructions that
# the machine has of them. Operands are addresses.

_LANES = 16
_VECTOR, _WORD, _INT = ir.VectorType(ir.FloatType(), _LANES), ir.IntType(64), ir.IntType(32)
_INTEGERS = ir.VectorType(_INT, _LANES)
_CONTRACT = ("contract",)


def _operation(emit: Any, n: int) -> Any:
    """A compiled function of n int64s, without a result, from a function that builds its body."""

    def codegen(context, builder, signature, arguments):
        del signature
        emit(builder, *arguments)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * n)
    # The number of arguments must show in the function's own signature.
    makers = {
        3: lambda typing_context, a, b, c: (signature, codegen),
        4: lambda typing_context, a, b, c, d: (signature, codegen),
        5: lambda typing_context, a, b, c, d, e: (signature, codegen),
        6: lambda typing_context, a, b, c, d, e, f: (signature, codegen),
    }
    return _intrinsic(makers[n])


def _at(builder, address, index, kind):
    """A pointer to an element of an array."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _load(builder, address, index=0):
    index = ir.Constant(_WORD, index) if isinstance(index, int) else index
    return builder.load(_at(builder, address, index, _VECTOR), align=4)


def _store(builder, value, address, index=0):
    index = ir.Constant(_WORD, index) if isinstance(index, int) else index
    builder.store(value, _at(builder, address, index, _VECTOR), align=4)


def _broadcast(builder, address, index):
    """A vector of one float of an array."""
    value = builder.load(_at(builder, address, index, ir.FloatType()), align=4)
    return _splat(builder, value)


def _splat(builder, value, kind=_VECTOR):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    lanes = ir.Constant(_INTEGERS, [0] * _LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)


def _groups(builder, n, size):
    """How many groups of a size hold n."""
    return builder.sdiv(builder.add(n, ir.Constant(_WORD, size - 1)), ir.Constant(_WORD, size))


def _constant(value):
    return ir.Constant(_VECTOR, [float(value)] * _LANES)


def _multiply_add(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _accumulators(builder, n):
    """Registers that start at zero."""
    slots = [cgutils.alloca_once(builder, _VECTOR) for _ in range(n)]
    for slot in slots:
        builder.store(_constant(0), slot)
    return slots


def _add_to(builder, slot, a, b):
    builder.store(_multiply_add(builder, a, b, builder.load(slot)), slot)


def _emit_scores(builder, columns, rows, n, width, out):
    # Four rows at once share the loads of the columns; four sums of each hide the latency of adding.
    four = ir.Constant(_WORD, 4)
    with cgutils.for_range(builder, _groups(builder, n, 4)) as group:
        first = builder.mul(group.index, four)
        slots = [_accumulators(builder, 4) for _ in range(4)]
        with cgutils.for_range(builder, builder.sdiv(width, four)) as loop:
            for lane in range(4):
                i = builder.add(builder.mul(loop.index, four), ir.Constant(_WORD, lane))
                column = _load(builder, columns, i)
                for row in range(4):
                    at = builder.mul(builder.add(first, ir.Constant(_WORD, row)), width)
                    _add_to(
                        builder,
                        slots[row][lane],
                        column,
                        _broadcast(builder, rows, builder.add(at, i)),
                    )
        for row in range(4):
            a, b, c, d = (builder.load(slot) for slot in slots[row])
            total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
            _store(builder, total, out, builder.add(first, ir.Constant(_WORD, row)))


def _emit_mix(builder, weights, rows, n, width, out):
    with cgutils.for_range(builder, _groups(builder, width, _LANES)) as block:
        first = builder.mul(block.index, ir.Constant(_WORD, _LANES))
        slots = _accumulators(builder, _LANES)
        with cgutils.for_range(builder, n) as loop:
            weight = _load(builder, weights, loop.index)
            at = builder.add(first, builder.mul(loop.index, width))
            for i, slot in enumerate(slots):
                scalar = _broadcast(builder, rows, builder.add(at, ir.Constant(_WORD, i)))
                _add_to(builder, slot, weight, scalar)
        for i, slot in enumerate(slots):
            _store(builder, builder.load(slot), out, builder.add(first, ir.Constant(_WORD, i)))


def _emit_gather(builder, weights, rows, n, blocks, out):
    with cgutils.for_range(builder, blocks) as block:
        # The rows' vectors stay in registers.
        vectors = [
            _load(
                builder,
                rows,
                builder.add(builder.mul(blocks, ir.Constant(_WORD, lane)), block.index),
            )
            for lane in range(_LANES)
        ]
        with cgutils.for_range(builder, n) as loop:
            at = builder.add(builder.mul(loop.index, blocks), block.index)
            sums = [_load(builder, out, at), _constant(0)]
            for lane, vector in enumerate(vectors):
                scalar = builder.add(
                    builder.mul(loop.index, ir.Constant(_WORD, _LANES)), ir.Constant(_WORD, lane)
                )
                weight = _broadcast(builder, weights, scalar)
                sums[lane % 2] = _multiply_add(builder, weight, vector, sums[lane % 2])
            _store(builder, builder.fadd(*sums), out, at)


def _emit_overlap(builder, a, b, n, out):
    slot = _accumulators(builder, 1)[0]
    with cgutils.for_range(builder, n) as loop:
        each = builder.fmul(_load(builder, a, loop.index), _load(builder, b, loop.index))
        builder.store(builder.fadd(builder.load(slot), each), slot)
    _store(builder, builder.load(slot), out)


def _emit_scale(builder, values, n, by):
    factor = _load(builder, by)
    with cgutils.for_range(builder, n) as loop:
        _store(
            builder, builder.fmul(_load(builder, values, loop.index), factor), values, loop.index
        )


def _emit_hide(builder, positions, first, n, value, rows):
    seen_to = builder.load(_at(builder, positions, ir.Constant(_WORD, 0), _INTEGERS), align=4)
    hidden = _load(builder, value)
    with cgutils.for_range(builder, n) as loop:
        j = builder.add(first, loop.index)
        row = builder.trunc(j, _INT)
        seen = builder.icmp_signed(">=", seen_to, _splat(builder, row, _INTEGERS))
        _store(builder, builder.select(seen, _load(builder, rows, j), hidden), rows, j)


def _emit_copy_rows(builder, source, source_stride, n, target, target_stride):
    with cgutils.for_range(builder, n) as loop:
        value = _load(builder, builder.add(source, builder.mul(source_stride, loop.index)))
        _store(builder, value, builder.add(target, builder.mul(target_stride, loop.index)))


def _emit_raise(builder, values, n, most):
    slot = cgutils.alloca_once(builder, _VECTOR)
    builder.store(_load(builder, most), slot)
    with cgutils.for_range(builder, n) as loop:
        value, top = _load(builder, values, loop.index), builder.load(slot)
        builder.store(builder.select(builder.fcmp_ordered(">", value, top), value, top), slot)
    _store(builder, builder.load(slot), most)


def _exponential(builder, x):
    """`_exp` of every lane."""
    least = _constant(_EXP_LEAST)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    scaled = _multiply_add(builder, x, _constant(_LOG2E), _constant(-0.5))
    power = builder.fptosi(scaled, _INTEGERS)
    n = builder.sitofp(power, _VECTOR)
    r = _multiply_add(builder, n, _constant(-_LN2_HIGH), x)
    r = _multiply_add(builder, n, _constant(-_LN2_LOW), r)
    y = _constant(_EXP_TERMS[-1])
    for term in _EXP_TERMS[-2::-1]:
        y = _multiply_add(builder, y, r, _constant(term))
    bits = builder.add(power, ir.Constant(_INTEGERS, [127] * _LANES))
    bits = builder.shl(bits, ir.Constant(_INTEGERS, [23] * _LANES))
    return builder.fmul(y, builder.bitcast(bits, _VECTOR))


def _emit_exponentials(builder, values, n, shift, total):
    by, slot = _load(builder, shift), cgutils.alloca_once(builder, _VECTOR)
    builder.store(_load(builder, total), slot)
    with cgutils.for_range(builder, n) as loop:
        each = _exponential(builder, builder.fsub(_load(builder, values, loop.index), by))
        _store(builder, each, values, loop.index)
        builder.store(builder.fadd(builder.load(slot), each), slot)
    _store(builder, builder.load(slot), total)


def _emit_score_gradients(builder, weights, d_weights, n, overlap):
    by = _load(builder, overlap)
    with cgutils.for_range(builder, n) as loop:
        excess = builder.fsub(_load(builder, d_weights, loop.index), by)
        each = builder.fmul(_load(builder, weights, loop.index), excess)
        _store(builder, each, d_weights, loop.index)


def _integers(value):
    return ir.Constant(_INTEGERS, [int(value)] * _LANES)


def _kept(builder, x, index, limits):
    """Which lanes of a vector of floats, the one at `index` of its row, a row's `_limits` keep."""
    bits = builder.and_(builder.bitcast(x, _INTEGERS), _integers(0x7FFFFFFF))
    top = _integers(_TOP_KEY)
    bits = builder.select(builder.icmp_signed("<", bits, top), bits, top)
    keys = builder.add(bits, _integers(1))
    least, last = (
        _splat(builder, builder.load(_at(builder, limits, ir.Constant(_WORD, i), _INT)), _INTEGERS)
        for i in range(2)
    )
    first = builder.trunc(builder.mul(index, ir.Constant(_WORD, _LANES)), _INT)
    lanes = builder.add(
        _splat(builder, first, _INTEGERS), ir.Constant(_INTEGERS, list(range(_LANES)))
    )
    tied = builder.and_(
        builder.icmp_signed("==", keys, least), builder.icmp_signed("<=", lanes, last)
    )
    return builder.or_(builder.icmp_signed(">", keys, least), tied)


def _emit_blend(builder, x, limits, constants, n, y):
    with cgutils.for_range(builder, n) as loop:
        value, gate = _load(builder, x, loop.index), _load(builder, constants, loop.index)
        rest = _load(builder, constants, builder.add(n, loop.index))
        kept = _kept(builder, value, loop.index, limits)
        value = builder.select(kept, value, _constant(0))
        _store(builder, _multiply_add(builder, gate, value, rest), y, loop.index)


def _emit_blend_gradient(builder, x, dy, limits, constants, n, dx):
    with cgutils.for_range(builder, n) as loop:
        value, gate = _load(builder, x, loop.index), _load(builder, constants, loop.index)
        d_value = _load(builder, dy, loop.index)
        kept = _kept(builder, value, loop.index, limits)
        value = builder.select(kept, value, _constant(0))
        d_x = builder.select(kept, builder.fmul(d_value, gate), _constant(0))
        _store(builder, d_x, dx, loop.index)
        for part, added in ((1, builder.fmul(d_value, value)), (2, d_value)):
            at = builder.add(builder.mul(n, ir.Constant(_WORD, part)), loop.index)
            _store(builder, builder.fadd(_load(builder, constants, at), added), constants, at)


def _row_at(builder, base, stride, i):
    return builder.add(base, builder.mul(stride, ir.Constant(_WORD, 4 * i)))


def _transposed(builder, source, stride):
    rows = [_load(builder, _row_at(builder, source, stride, i)) for i in range(_LANES)]
    half = _LANES // 2
    masks = [
        ir.Constant(
            ir.VectorType(_INT, _LANES),
            [side * half + lane // 2 + _LANES * (lane % 2) for lane in range(_LANES)],
        )
        for side in range(2)
    ]
    # Interleaving row i with row i + 8 moves a bit of the row's number into the lane's; four times is all.
    for _ in range(4):
        rows = [
            builder.shuffle_vector(rows[i], rows[i + half], mask)
            for i in range(half)
            for mask in masks
        ]
    return rows


def _emit_transpose(builder, source, source_stride, target, target_stride):
    for i, vector in enumerate(_transposed(builder, source, source_stride)):
        _store(builder, vector, _row_at(builder, target, target_stride, i))


def _emit_transpose_away(builder, source, source_stride, target, target_stride):
    past_caches = builder.module.add_metadata([ir.Constant(_INT, 1)])
    for i, vector in enumerate(_transposed(builder, source, source_stride)):
        row = _row_at(builder, target, target_stride, i)
        pointer = _at(builder, row, ir.Constant(_WORD, 0), _VECTOR)
        builder.store(vector, pointer, align=64).set_metadata("nontemporal", past_caches)


# How many vectors of rows a product takes at once.
_BLOCKS = 4


def _emit_combine(builder, values, indices, n, columns, out):
    slots = _accumulators(builder, _BLOCKS)
    with cgutils.for_range(builder, n) as loop:
        value = _broadcast(builder, values, loop.index)
        index = builder.sext(builder.load(_at(builder, indices, loop.index, _INT)), _WORD)
        for block, slot in enumerate(slots):
            i = builder.add(
                builder.mul(index, ir.Constant(_WORD, _BLOCKS)), ir.Constant(_WORD, block)
            )
            _add_to(builder, slot, value, _load(builder, columns, i))
    for block, slot in enumerate(slots):
        _store(builder, builder.load(slot), out, block)


# scores(columns, rows, n, width, out): out[j] = sum of rows[j, i] * columns[i] over i < width, for j < n
# rounded up to a multiple of 4; width is a multiple of 4.
_scores = _operation(_emit_scores, 5)
# mix(weights, rows, n, width, out): out[i] = sum of rows[j, i] * weights[j] over j < n; width in 16s.
_mix = _operation(_emit_mix, 5)
# gather(weights, rows, n, blocks, out): out[j] += sum of weights[j, lane] * rows[lane] over lanes, for j < n;
# rows of rows and out are `blocks` vectors.
_gather = _operation(_emit_gather, 5)
# overlap(a, b, n, out): out = sum of a[i] * b[i], lane by lane.
_overlap = _operation(_emit_overlap, 4)
# scale(values, n, by): values[i] *= by, lane by lane.
_scale = _operation(_emit_scale, 3)
# hide(positions, first, n, value, rows): rows[j] = value where positions < j, for first <= j < first + n.
_hide = _operation(_emit_hide, 5)
# copy_rows(source, stride, n, target, stride): n vectors, strides in bytes.
_copy_rows = _operation(_emit_copy_rows, 5)
# raise(values, n, most): most = max(most, values[0], ..., values[n - 1]).
_raise = _operation(_emit_raise, 3)
# exponentials(values, n, shift, total): values[i] = exp(values[i] - shift); their sum is added to total.
_exponentials = _operation(_emit_exponentials, 4)
# score_gradients(weights, d_weights, n, overlap): d_weights[i] = weights[i] * (d_weights[i] - overlap).
_score_gradients = _operation(_emit_score_gradients, 4)
# transpose(source, stride, target, stride): 16 rows of 16, strides in floats.
_transpose = _operation(_emit_transpose, 4)
# The same, written past the caches to whole cache lines, which are then not read first.
_transpose_away = _operation(_emit_transpose_away, 4)
# combine(values, indices, n, columns, out): out = sum of values[i] * columns[indices[i]]; of _BLOCKS vectors.
_combine = _operation(_emit_combine, 5)
# blend(x, limits, constants, n, y): y = gate * (x where it is kept, else 0) + rest; the constants are n
# vectors of gates and n of rests.
_blend = _operation(_emit_blend, 5)
# blend_gradient(x, dy, limits, sums, n, dx): the gradient of x; the sums are n vectors of gates, to n more
# dy * (x where it is kept) is added, and to n more dy.
_blend_gradient = _operation(_emit_blend_gradient, 6)


# --- AbsTopK ---

# Every sum is cast back to 32 bits: numba would widen it, and half the vector lanes would idle.


@_njit
def _read_keys(bits, keys):
    top = _i32(0)
    for i in range(keys.shape[0]):
        magnitude = _i32(bits[i] & _i32(0x7FFFFFFF))
        key = _i32(_i32(min(magnitude, _TOP_KEY)) + _i32(1))
        keys[i] = key
        top = _i32(max(top, key))
    return top


@_intrinsic
def _count_vectors(typing_context, keys, n, threshold):
    """How many of n vectors' int32 are at least a threshold."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        address, n, threshold = arguments
        least = _splat(builder, threshold, _INTEGERS)
        slots = [cgutils.alloca_once(builder, _INTEGERS) for _ in range(4)]
        for slot in slots:
            builder.store(_integers(0), slot)

        def add(slot, index):
            key = builder.load(_at(builder, address, index, _INTEGERS), align=4)
            reached = builder.sext(builder.icmp_signed(">=", key, least), _INTEGERS)
            builder.store(builder.sub(builder.load(slot), reached), slot)

        four = ir.Constant(_WORD, 4)
        with cgutils.for_range(builder, builder.udiv(n, four)) as loop:
            for i, slot in enumerate(slots):
                add(slot, builder.add(builder.mul(loop.index, four), ir.Constant(_WORD, i)))
        rest = builder.urem(n, four)
        with cgutils.for_range(builder, rest) as loop:
            add(slots[0], builder.add(builder.sub(n, rest), loop.index))
        a, b, c, d = (builder.load(slot) for slot in slots)
        total = builder.add(builder.add(a, b), builder.add(c, d))
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INT, [_INTEGERS]), "llvm.vector.reduce.add.v16i32"
        )
        return builder.call(reduce, [total])

    return types.int32(types.int64, types.int64, types.int32), codegen


@_njit
def _count(keys, threshold):
    vectors = keys.shape[0] // _LANES
    n = _count_vectors(np.int64(keys.ctypes.data), np.int64(vectors), threshold)
    for i in range(vectors * _LANES, keys.shape[0]):
        n = _i32(n + _i32(keys[i] >= threshold))
    return n


@_njit
def _lower_bound(keys, k, top):
    """A key that at least k keys reach: the least of the maxima of k groups of four."""
    if 4 * k > keys.shape[0]:
        return _i32(1)
    a, b, c, d = keys[:k], keys[k : 2 * k], keys[2 * k : 3 * k], keys[3 * k : 4 * k]
    low = top
    for i in range(k):
        low = _i32(min(low, _i32(max(max(a[i], b[i]), max(c[i], d[i])))))
    return _i32(max(low, _i32(1)))


@_njit
def _write(keys, threshold, kept):
    for i in range(keys.shape[0]):
        kept[i] = np.uint8(keys[i] >= threshold)


@_njit
def _write_with_ties(keys, threshold, ties, kept):
    for i in range(keys.shape[0]):
        chosen = keys[i] > threshold
        if keys[i] == threshold and ties > 0:
            chosen, ties = True, ties - 1
        kept[i] = np.uint8(chosen)


@_njit
def _threshold(keys, k, top):
    """What separates the k largest of keys, of which at least k are positive; `top` is the largest.

    Returns the least key to be kept, and how many of those that equal it, 0 for all.
    """
    low, high, n_high = _lower_bound(keys, k, top), _i32(top + _i32(1)), _i32(0)
    n_low = _count(keys, low)
    passes = 0
    while n_low != k and high - low > 1:
        span = _i32(high - low)
        if passes % 3 == 2:
            # Interpolation alone can creep; every third pass halves.
            middle = _i32(low + span // _i32(2))
        else:
            share = _f32(n_low - k + 0.5) / _f32(n_low - n_high + 1)
            middle = _i32(low + _i32(_f32(span) * share))
            middle = _i32(max(_i32(low + _i32(1)), min(middle, _i32(high - _i32(1)))))
        n = _count(keys, middle)
        passes += 1
        if n >= k:
            low, n_low = middle, n
        else:
            high, n_high = middle, n
    return low, (0 if n_low == k else k - n_high)


@_njit
def _select(keys, k, top, kept):
    """Mark the k largest of keys."""
    least, ties = _threshold(keys, k, top)
    if ties == 0:
        _write(keys, least, kept)
    else:
        _write_with_ties(keys, least, ties, kept)


def _top_k_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    rows, width = _rows_and_width(frame)
    k = _i32(_attribute(frame, 0))
    bits = carray(_operand(frame, 0), (rows, width), np.int32)
    kept = carray(_result(frame, 0), (rows, width), np.uint8)
    keys = np.empty(width, np.int32)
    while start < stop:
        for row in range(start, stop):
            _select(keys, k, _read_keys(bits[row], keys), kept[row])
        start, stop = _take(job, stop - start)
    return 0


_top_k_address = _address_of("wsparse_top_k_task")


def _top_k(frame):
    if _executes(frame):
        _share(frame, _rows_and_width(frame)[0], _top_k_address())
    return 0


# --- AbsTopK and mean ablation ---

# Rows that a thread takes at a time.
_ABLATED = 64


@_njit
def _ablation_sizes(frame):
    """Sets of gates, rows of each, and channels."""
    rows, width = _rows_and_width(frame)
    gates, sets = _dims(frame, 1), 1
    for axis in range(gates.shape[0] - 1):
        sets *= gates[axis]
    return sets, rows // sets, width


@_njit
def _limits(x, keys, k, limits):
    """What is kept of a row: keys above `limits[0]`, and those equal to it up to place `limits[1]`."""
    width = _i32(x.shape[0])
    limits[0], limits[1] = _i32(0), width
    if k < width:
        limits[0], ties = _threshold(keys, k, _read_keys(x, keys))
        if ties > 0:
            limits[1] = _i32(-1)
            while ties > 0:
                limits[1] += _i32(1)
                ties -= keys[limits[1]] == limits[0]


@_njit
def _lay_gates(gates, means, constants):
    """Gates, and what closed ones add, each filled up to whole vectors."""
    _fill(constants, _ZERO)
    for i in range(gates.shape[0]):
        constants[0, i], constants[1, i] = gates[i], (_ONE - gates[i]) * means[i]


def _ablate_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    sets, rows, width = _ablation_sizes(frame)
    k = _i32(_attribute(frame, 0))
    x = carray(_operand(frame, 0), (sets * rows, width), np.float32)
    bits = carray(_operand(frame, 0), (sets * rows, width), np.int32)
    gates = carray(_operand(frame, 1), (sets, width), np.float32)
    means = carray(_operand(frame, 2), (sets, width), np.float32)
    y = carray(_result(frame, 0), (sets * rows, width), np.float32)
    limits = carray(_result(frame, 1), (sets * rows, 2), np.int32)
    # Gates and rests, and a copy of rows that fill no vector.
    pieces, n = -(-rows // _ABLATED), -(-width // _LANES)
    vector = 4 * _LANES
    memory = _malloc(4 * n * vector + 64)
    constants_at = _aligned(memory)
    x_at, y_at = constants_at + 2 * n * vector, constants_at + 3 * n * vector
    scratch = carray(_pointer(constants_at), (4, n * _LANES), np.float32)
    _fill(scratch, _ZERO)
    keys = np.empty(width, np.int32)
    while start < stop:
        for item in range(start, stop):
            group, first = item // pieces, item % pieces * _ABLATED
            _lay_gates(gates[group], means[group], scratch)
            for i in range(first, min(first + _ABLATED, rows)):
                row = group * rows + i
                _limits(bits[row], keys, k, limits[row])
                limits_at = _result_address(frame, 1) + 8 * row
                if width % _LANES:
                    _copy(x[row : row + 1], scratch[2:])
                    _blend(x_at, limits_at, constants_at, n, y_at)
                    _copy(scratch[3:, :width], y[row:])
                else:
                    at = 4 * width * row
                    source, target = _operand_address(frame, 0), _result_address(frame, 0)
                    _blend(source + at, limits_at, constants_at, n, target + at)
        start, stop = _take(job, stop - start)
    _free(memory)
    return 0


_ablate_address = _address_of("wsparse_ablate_task")


def _ablate(frame):
    if _executes(frame):
        sets, rows, _ = _ablation_sizes(frame)
        _share(frame, sets * -(-rows // _ABLATED), _ablate_address())
    return 0


def _ablate_gradient_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    sets, rows, width = _ablation_sizes(frame)
    piece = _attribute(frame, 0)
    gates = carray(_operand(frame, 1), (sets, width), np.float32)
    x = carray(_operand(frame, 0), (sets * rows, width), np.float32)
    dy = carray(_operand(frame, 3), (sets * rows, width), np.float32)
    dx = carray(_result(frame, 0), (sets * rows, width), np.float32)
    pieces, n = -(-rows // piece), -(-width // _LANES)
    sums = carray(_result(frame, 1), (sets * pieces, 2, width), np.float32)
    # Gates and sums, and a copy of rows that fill no vector.
    vector = 4 * _LANES
    memory = _malloc(6 * n * vector + 64)
    sums_at = _aligned(memory)
    x_at = sums_at + 3 * n * vector
    dy_at, dx_at = x_at + n * vector, x_at + 2 * n * vector
    scratch = carray(_pointer(sums_at), (6, n * _LANES), np.float32)
    _fill(scratch, _ZERO)
    while start < stop:
        for item in range(start, stop):
            group, first = item // pieces, item % pieces * piece
            _copy(gates[group : group + 1], scratch)
            _fill(scratch[1:3], _ZERO)
            for i in range(first, min(first + piece, rows)):
                row = group * rows + i
                limits_at = _operand_address(frame, 2) + 8 * row
                if width % _LANES:
                    _copy(x[row : row + 1], scratch[3:])
                    _copy(dy[row : row + 1], scratch[4:])
                    _blend_gradient(x_at, dy_at, limits_at, sums_at, n, dx_at)
                    _copy(scratch[5:, :width], dx[row:])
                else:
                    at = 4 * width * row
                    _blend_gradient(
                        _operand_address(frame, 0) + at,
                        _operand_address(frame, 3) + at,
                        limits_at,
                        sums_at,
                        n,
                        _result_address(frame, 0) + at,
                    )
            _copy(scratch[1:3, :width], sums[item])
        start, stop = _take(job, stop - start)
    _free(memory)
    return 0


_ablate_gradient_address = _address_of("wsparse_ablate_gradient_task")


def _ablate_gradient(frame):
    if _executes(frame):
        sets, rows, _ = _ablation_sizes(frame)
        piece = _attribute(frame, 0)
        _share(frame, sets * -(-rows // piece), _ablate_gradient_address())
    return 0


# --- The projection's selections ---


@_njit
def _largest_sizes(frame):
    """Slices of the first operand, one for each budget in the second, and the size of a slice."""
    size, slices = 1, 1
    for each in _dims(frame, 0):
        size *= each
    for each in _dims(frame, 1):
        slices *= each
    return slices, size // slices


def _largest_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    slices, size = _largest_sizes(frame)
    keys = carray(_operand(frame, 0), (slices, size), np.int32)
    budgets = carray(_operand(frame, 1), slices, np.int32)
    kept = carray(_result(frame, 0), (slices, size), np.uint8)
    while start < stop:
        for i in range(start, stop):
            k = _i32(min(budgets[i], _count(keys[i], _i32(1))))
            if k > 0:
                top = _i32(0)
                for j in range(size):
                    top = _i32(max(top, keys[i, j]))
                _select(keys[i], k, top, kept[i])
            else:
                kept[i] = np.uint8(0)
        start, stop = _take(job, stop - start)
    return 0


_largest_address = _address_of("wsparse_largest_task")


def _largest(frame):
    if _executes(frame):
        _share(frame, _largest_sizes(frame)[0], _largest_address())
    return 0


# --- GELU ---

# erfc(z) = exp(-z^2) t P(t) with t = 1 / (1 + z / 2), z >= 0: P fitted to 2e-8, relative.
_ERFC_TERMS = tuple(
    _f32(c)
    for c in (
        0.282058765,
        0.282978954,
        0.237546053,
        0.231057982,
        -0.115350269,
        0.454903752,
        -0.712596601,
        0.462348135,
        -0.138056535,
        0.0151097491,
    )
)
_SQRT_HALF, _INVERSE_SQRT_2PI = _f32(math.sqrt(0.5)), _f32(1 / math.sqrt(2 * math.pi))


@_njit
def _normal(x):
    """The standard normal distribution of x: `exp(-x^2 / 2)` and the cumulative probability."""
    e = _exp(-_HALF * x * x)
    t = _ONE / (_ONE + _HALF * _SQRT_HALF * abs(x))
    c = _ERFC_TERMS
    y = ((((c[9] * t + c[8]) * t + c[7]) * t + c[6]) * t + c[5]) * t + c[4]
    y = (((y * t + c[3]) * t + c[2]) * t + c[1]) * t + c[0]
    tail = _HALF * e * t * y
    return e, tail if x < _ZERO else _ONE - tail


# Loops count from 0: an index that might be negative, which would count from the end, is not vectorized.


@_njit
def _gelu_of(x, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * _normal(x[i])[1]


@_njit
def _gelu_gradient_of(x, dy, dx):
    for i in range(x.shape[0]):
        e, share = _normal(x[i])
        dx[i] = dy[i] * (share + x[i] * (e * _INVERSE_SQRT_2PI))


_PIECE = 4096


@_njit
def _size(frame):
    size = 1
    for each in _dims(frame, 0):
        size *= each
    return size


def _gelu_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    size = _size(frame)
    x = carray(_operand(frame, 0), size, np.float32)
    y = carray(_result(frame, 0), size, np.float32)
    while start < stop:
        _gelu_of(x[start * _PIECE : stop * _PIECE], y[start * _PIECE : stop * _PIECE])
        start, stop = _take(job, stop - start)
    return 0


_gelu_address = _address_of("wsparse_gelu_task")


def _gelu(frame):
    if _executes(frame):
        _share(frame, -(-_size(frame) // _PIECE), _gelu_address())
    return 0


def _gelu_gradient_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    size = _size(frame)
    x = carray(_operand(frame, 0), size, np.float32)
    dy = carray(_operand(frame, 1), size, np.float32)
    dx = carray(_result(frame, 0), size, np.float32)
    while start < stop:
        first, last = start * _PIECE, stop * _PIECE
        _gelu_gradient_of(x[first:last], dy[first:last], dx[first:last])
        start, stop = _take(job, stop - start)
    return 0


_gelu_gradient_address = _address_of("wsparse_gelu_gradient_task")


def _gelu_gradient(frame):
    if _executes(frame):
        _share(frame, -(-_size(frame) // _PIECE), _gelu_gradient_address())
    return 0


# --- Products with a sparse matrix ---

# Rows of a piece.
_ROWS = _LANES * _BLOCKS
# Bytes of an output of which the caches would hold little until it is read.
_LARGE = 1 << 25
# Outputs of a block of rows that are found before they are written: a page of each row at a time.
_OUTPUTS = 1024


@_njit
def _product_sizes(frame):
    """Rows, inputs and outputs of a product with a matrix (attribute 0) or its transpose (1)."""
    w = _dims(frame, 1)
    rows = _dims(frame, 0)[0]
    return (rows, w[1], w[0]) if _attribute(frame, 0) else (rows, w[0], w[1])


@_intrinsic
def _nonzero_bits(typing_context, address):
    """A bit for each of 16 floats, the first one's lowest: whether it is not zero."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        zeros = ir.Constant(_VECTOR, [0.0] * _LANES)
        found = builder.fcmp_unordered("!=", _load(builder, arguments[0]), zeros)
        return builder.zext(builder.bitcast(found, ir.IntType(_LANES)), _WORD)

    return types.int64(types.int64), codegen


@_intrinsic
def _lowest(typing_context, bits):
    """The position of the lowest bit of a number that is not 0."""
    del typing_context

    def codegen(context, builder, signature, arguments):
        del context, signature
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@_njit
def _find(address, size, positions):
    """How many of some floats are not zero; positions in order, as many as there is room for."""
    n = 0
    whole = size - size % _LANES
    for first in range(0, whole, _LANES):
        bits = _nonzero_bits(address + 4 * first)
        while bits:
            if n < positions.size:
                positions[n] = first + _lowest(bits)
            n += 1
            bits &= bits - 1
    rest = carray(_pointer(address + 4 * whole), size - whole, np.float32)
    for i in range(size - whole):
        if rest[i] != _ZERO:
            if n < positions.size:
                positions[n] = whole + i
            n += 1
    return n


@_njit
def _compress(w, positions, by_row, starts, indices, values):
    """The nonzeros of a matrix by output: those of output o are `starts[o]` to `starts[o + 1]`.

    Outputs are the matrix's rows or its columns; within one, nonzeros are in order.
    """
    starts[:] = 0
    row, end = 0, w.shape[1]
    for p in positions:
        while p >= end:
            row, end = row + 1, end + w.shape[1]
        starts[(row if by_row else p - end + w.shape[1]) + 1] += 1
    for o in range(starts.shape[0] - 1):
        starts[o + 1] += starts[o]
    # While an output is filled, its start runs ahead; afterwards it is where the next one began.
    row, end = 0, w.shape[1]
    for p in positions:
        while p >= end:
            row, end = row + 1, end + w.shape[1]
        column = p - end + w.shape[1]
        o = row if by_row else column
        n = starts[o]
        indices[n], values[n] = (column if by_row else row), w[row, column]
        starts[o] = n + 1
    for o in range(starts.shape[0] - 1, 0, -1):
        starts[o] = starts[o - 1]
    starts[0] = 0


def _product_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame, scratch = _words(job, _JOB_WORDS)[_FRAME], _words(job, _JOB_WORDS)[_SCRATCH]
    rows, n_in, n_out = _product_sizes(frame)
    table = _words(scratch, 4)
    starts = carray(_pointer(table[0]), n_out + 1, np.int64)
    x = carray(_operand(frame, 0), (rows, n_in), np.float32)
    y = carray(_result(frame, 0), (rows, n_out), np.float32)
    # Inputs and outputs with the rows along the lanes, and a copy of rows that fill no vector.
    wide = -(-max(n_in, _LANES) // _LANES) * _LANES
    memory = _malloc(4 * _ROWS * (2 * wide + _OUTPUTS + _LANES) + 64)
    x_T_at = _aligned(memory)
    edge_at = x_T_at + 4 * _ROWS * wide
    y_T_at = edge_at + 4 * _ROWS * wide
    y_edge_at = y_T_at + 4 * _ROWS * _OUTPUTS
    edge = carray(_pointer(edge_at), (_ROWS, wide), np.float32)
    y_edge = carray(_pointer(y_edge_at), (_ROWS, _LANES), np.float32)
    used = carray(_pointer(table[3]), wide // _LANES, np.bool_)
    result, large = _result_address(frame, 0), 4 * rows * n_out > _LARGE
    while start < stop:
        for item in range(start, stop):
            first = item * _ROWS
            n = min(_ROWS, rows - first)
            source, stride = _operand_address(frame, 0) + 4 * first * n_in, n_in
            if n < _ROWS or n_in % _LANES:
                _fill(edge, _ZERO)
                _copy(x[first : first + n], edge)
                source, stride = edge_at, wide
            for block in range(_BLOCKS):
                for i in range(wide // _LANES):
                    if used[i]:
                        _transpose(
                            source + 4 * _LANES * (i + block * stride),
                            stride,
                            x_T_at + 4 * _LANES * (i * _ROWS + block),
                            _ROWS,
                        )
            for begin in range(0, n_out, _OUTPUTS):
                end = min(begin + _OUTPUTS, n_out)
                for o in range(begin, end):
                    i = starts[o]
                    _combine(
                        table[2] + 4 * i,
                        table[1] + 4 * i,
                        starts[o + 1] - i,
                        x_T_at,
                        y_T_at + 4 * _ROWS * (o - begin),
                    )
                whole = end - (end - begin) % _LANES if n == _ROWS else begin
                for block in range(_BLOCKS):
                    for o in range(begin, whole, _LANES):
                        turned = y_T_at + 4 * (_ROWS * (o - begin) + _LANES * block)
                        target = result + 4 * ((first + _LANES * block) * n_out + o)
                        if large and (target | 4 * n_out) % 64 == 0:
                            _transpose_away(turned, _ROWS, target, n_out)
                        else:
                            _transpose(turned, _ROWS, target, n_out)
                for o in range(whole, end, _LANES):
                    for block in range(_BLOCKS):
                        turned = y_T_at + 4 * (_ROWS * (o - begin) + _LANES * block)
                        _transpose(turned, _ROWS, y_edge_at + 4 * _LANES**2 * block, _LANES)
                    width = min(_LANES, end - o)
                    _copy(y_edge[:n, :width], y[first : first + n, o : o + width])
        start, stop = _take(job, stop - start)
    _free(memory)
    return 0


_product_address = _address_of("wsparse_product_task")


def _product(frame):
    if _executes(frame):
        rows, inputs, outputs = _product_sizes(frame)
        sides = _dims(frame, 1)
        w = carray(_operand(frame, 1), (sides[0], sides[1]), np.float32)
        address, size = _operand_address(frame, 1), sides[0] * sides[1]
        n = _find(address, size, carray(_pointer(address), 0, np.int32))
        # Where each output's nonzeros start, their inputs, their values, which 16 inputs have any, and where
        # the nonzeros are in the matrix.
        scratch = _malloc(8 * (4 + outputs + 1) + 12 * n + inputs + 1)
        table = _words(scratch, 4)
        table[0] = scratch + 32
        table[1] = table[0] + 8 * (outputs + 1)
        table[2] = table[1] + 4 * n
        positions = carray(_pointer(table[2] + 4 * n), n, np.int32)
        table[3] = table[2] + 8 * n
        starts = carray(_pointer(table[0]), outputs + 1, np.int64)
        indices = carray(_pointer(table[1]), n, np.int32)
        values = carray(_pointer(table[2]), n, np.float32)
        used = carray(_pointer(table[3]), -(-inputs // _LANES), np.bool_)
        _find(address, size, positions)
        _compress(w, positions, _attribute(frame, 0) != 0, starts, indices, values)
        used[:] = False
        for i in range(n):
            used[indices[i] // _LANES] = True
        _share_with(frame, -(-rows // _ROWS), _product_address(), scratch)
        _free(scratch)
    return 0


# --- Attention ---


@_njit
def _attention_sizes(frame):
    """Batch, queries, keys, heads, channels, and rows of sinks."""
    dims, keys, sinks = _dims(frame, 0), _dims(frame, 1), _dims(frame, 3)
    rank = dims.shape[0]
    batch = 1
    for axis in range(rank - 3):
        batch *= dims[axis]
    sets = 1
    for axis in range(sinks.shape[0] - 1):
        sets *= sinks[axis]
    return batch, dims[rank - 3], keys[rank - 3], dims[rank - 2], dims[rank - 1], sets


@_njit
def _sight(positions, keys, seen_to):
    """How many keys some queries see: the least and the most; fills the lanes of their positions."""
    least, most = keys, 0
    for lane in range(_LANES):
        seen_to[lane] = keys
    for lane in range(positions.shape[0]):
        seen_to[lane] = positions[lane]
        seen = min(_i32(positions[lane] + 1), keys)
        least, most = min(least, seen), max(most, seen)
    return least, most


@_njit
def _lay_head(source, stride, n, width, target):
    """Copy n rows of a head's channels, `stride` bytes apart, side by side."""
    for c in range(0, width, _LANES):
        _copy_rows(source + 4 * c, stride, n, target + 4 * c, 4 * width)


@_njit
def _put_head(source, n, width, target, stride):
    """The reverse of `_lay_head`."""
    for c in range(0, width, _LANES):
        _copy_rows(source + 4 * c, 4 * width, n, target + 4 * c, stride)


@_njit
def _turn(rows, width, columns):
    """16 rows of channels to channels of 16 lanes."""
    for c in range(0, width, _LANES):
        _transpose(rows + 4 * c, width, columns + 4 * _LANES * c, _LANES)


@_njit
def _turn_back(columns, width, rows):
    """The reverse of `_turn`."""
    for c in range(0, width, _LANES):
        _transpose(columns + 4 * _LANES * c, _LANES, rows + 4 * c, width)


# Far below every score, and not infinite: the difference of two infinities is no number.
_HIDDEN = _f32(-1e30)


def _attend_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    batch, time, keys, heads, width, sets = _attention_sizes(frame)
    sinks = carray(_operand(frame, 3), (sets, heads), np.float32)
    positions = carray(_operand(frame, 4), (batch, time), np.int32)
    logs = carray(_result(frame, 1), (batch, time, heads), np.float32)
    vector, row, stride = 4 * _LANES, 4 * width, 4 * heads * width
    # Scores are found for four keys at a time.
    padded = (keys + 3) // 4 * 4
    memory = _malloc(vector * (3 * width + padded + 6) + 2 * row * padded + 64)
    q_at = _aligned(memory)
    q_T_at = q_at + vector * width
    y_T_at = q_T_at + vector * width
    p_at = y_T_at + vector * width
    k_at = p_at + vector * padded
    v_at = k_at + row * padded
    most_at = v_at + row * padded
    total_at, scale_at = most_at + vector, most_at + 2 * vector
    hidden_at, seen_to_at = most_at + 3 * vector, most_at + 4 * vector
    q = carray(_pointer(q_at), (_LANES, width), np.float32)
    k_and_v = carray(_pointer(k_at), (2 * padded, width), np.float32)
    most = carray(_pointer(most_at), (1, _LANES), np.float32)
    total = carray(_pointer(total_at), (1, _LANES), np.float32)
    constants = carray(_pointer(scale_at), (2, _LANES), np.float32)
    seen_to = carray(_pointer(seen_to_at), _LANES, np.int32)
    _fill(constants[:1], _f32(1 / math.sqrt(width)))
    _fill(constants[1:], _HIDDEN)
    _fill(k_and_v, _ZERO)
    while start < stop:
        for item in range(start, stop):
            b, h = item // heads, item % heads
            sink = sinks[b * sets // batch, h]
            head = row * h
            # Side by side: a head's keys lie so far apart that they would share few of the cache's sets.
            of_keys = stride * keys * b + head
            _lay_head(_operand_address(frame, 1) + of_keys, stride, keys, width, k_at)
            _lay_head(_operand_address(frame, 2) + of_keys, stride, keys, width, v_at)
            for first in range(0, time, _LANES):
                n = min(_LANES, time - first)
                of_queries = stride * (time * b + first) + head
                least, seen = _sight(positions[b, first : first + n], keys, seen_to)
                _fill(q, _ZERO)
                _lay_head(_operand_address(frame, 0) + of_queries, stride, n, width, q_at)
                _scale(q_at, width, scale_at)
                _turn(q_at, width, q_T_at)
                _scores(q_T_at, k_at, seen, width, p_at)
                _hide(seen_to_at, least, seen - least, hidden_at, p_at)
                _fill(most, sink)
                _fill(total, _ZERO)
                _raise(p_at, seen, most_at)
                _exponentials(p_at, seen, most_at, total_at)
                _mix(p_at, v_at, seen, width, y_T_at)
                for lane in range(_LANES):
                    whole = total[0, lane] + _exp(sink - most[0, lane])
                    total[0, lane] = _ONE / whole
                    if lane < n:
                        logs[b, first + lane, h] = most[0, lane] + _f32(math.log(whole))
                _scale(y_T_at, width, total_at)
                _turn_back(y_T_at, width, q_at)
                _put_head(q_at, n, width, _result_address(frame, 0) + of_queries, stride)
        start, stop = _take(job, stop - start)
    _free(memory)
    return 0


_attend_address = _address_of("wsparse_attend_task")


def _attend(frame):
    if _executes(frame):
        batch, _, _, heads, _, _ = _attention_sizes(frame)
        _share(frame, batch * heads, _attend_address())
    return 0


def _attend_gradient_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    batch, time, keys, heads, width, sets = _attention_sizes(frame)
    sinks = carray(_operand(frame, 3), (sets, heads), np.float32)
    positions = carray(_operand(frame, 4), (batch, time), np.int32)
    logs = carray(_operand(frame, 6), (batch, time, heads), np.float32)
    d_sinks = carray(_result(frame, 3), (batch, heads), np.float32)
    vector, row, stride = 4 * _LANES, 4 * width, 4 * heads * width
    blocks = width // _LANES
    # Scores are found for four keys at a time.
    padded = (keys + 3) // 4 * 4
    memory = _malloc(vector * (6 * width + 2 * padded + 7) + 4 * row * padded + 64)
    q_at = _aligned(memory)
    dy_at = q_at + vector * width
    y_at = dy_at + vector * width
    q_T_at = y_at + vector * width
    dy_T_at = q_T_at + vector * width
    dq_T_at = dy_T_at + vector * width
    p_at = dq_T_at + vector * width
    ds_at = p_at + vector * padded
    k_at = ds_at + vector * padded
    v_at = k_at + row * padded
    dk_at = v_at + row * padded
    dv_at = dk_at + row * padded
    log_at = dv_at + row * padded
    overlap_at, ignored_at, seen_to_at = log_at + vector, log_at + 2 * vector, log_at + 3 * vector
    scale_at, hidden_at, zero_at = log_at + 4 * vector, log_at + 5 * vector, log_at + 6 * vector
    queries = carray(_pointer(q_at), (3 * _LANES, width), np.float32)
    k_and_v = carray(_pointer(k_at), (2 * padded, width), np.float32)
    gradients = carray(_pointer(dk_at), (2 * padded, width), np.float32)
    log = carray(_pointer(log_at), (1, _LANES), np.float32)
    overlap = carray(_pointer(overlap_at), _LANES, np.float32)
    constants = carray(_pointer(scale_at), (3, _LANES), np.float32)
    seen_to = carray(_pointer(seen_to_at), _LANES, np.int32)
    _fill(constants[:1], _f32(1 / math.sqrt(width)))
    _fill(constants[1:2], _HIDDEN)
    _fill(constants[2:], _ZERO)
    _fill(k_and_v, _ZERO)
    while start < stop:
        for item in range(start, stop):
            b, h = item // heads, item % heads
            sink = sinks[b * sets // batch, h]
            head = row * h
            # Side by side: a head's keys lie so far apart that they would share few of the cache's sets.
            of_keys = stride * keys * b + head
            _lay_head(_operand_address(frame, 1) + of_keys, stride, keys, width, k_at)
            _lay_head(_operand_address(frame, 2) + of_keys, stride, keys, width, v_at)
            _fill(gradients, _ZERO)
            d_sink = _ZERO
            for first in range(0, time, _LANES):
                n = min(_LANES, time - first)
                of_queries = stride * (time * b + first) + head
                least, seen = _sight(positions[b, first : first + n], keys, seen_to)
                _fill(queries, _ZERO)
                _lay_head(_operand_address(frame, 0) + of_queries, stride, n, width, q_at)
                _lay_head(_operand_address(frame, 7) + of_queries, stride, n, width, dy_at)
                _lay_head(_operand_address(frame, 5) + of_queries, stride, n, width, y_at)
                _scale(q_at, width, scale_at)
                # The scaled queries' columns are needed last, the outputs' only for the overlap.
                _turn(dy_at, width, dy_T_at)
                _turn(y_at, width, q_T_at)
                _overlap(dy_T_at, q_T_at, width, overlap_at)
                _turn(q_at, width, q_T_at)
                _fill(log, _ZERO)
                for lane in range(n):
                    log[0, lane] = logs[b, first + lane, h]
                    d_sink -= _exp(sink - log[0, lane]) * overlap[lane]
                hidden = seen - least
                _scores(q_T_at, k_at, seen, width, p_at)
                _hide(seen_to_at, least, hidden, hidden_at, p_at)
                _exponentials(p_at, seen, log_at, ignored_at)
                _hide(seen_to_at, least, hidden, zero_at, p_at)
                _scores(dy_T_at, v_at, seen, width, ds_at)
                _score_gradients(p_at, ds_at, seen, overlap_at)
                _mix(ds_at, k_at, seen, width, dq_T_at)
                _gather(ds_at, q_at, seen, blocks, dk_at)
                _gather(p_at, dy_at, seen, blocks, dv_at)
                _scale(dq_T_at, width, scale_at)
                _turn_back(dq_T_at, width, q_at)
                _put_head(q_at, n, width, _result_address(frame, 0) + of_queries, stride)
            _put_head(dk_at, keys, width, _result_address(frame, 1) + of_keys, stride)
            _put_head(dv_at, keys, width, _result_address(frame, 2) + of_keys, stride)
            d_sinks[b, h] = d_sink
        start, stop = _take(job, stop - start)
    _free(memory)
    return 0


_attend_gradient_address = _address_of("wsparse_attend_gradient_task")


def _attend_gradient(frame):
    if _executes(frame):
        batch, _, _, heads, _, _ = _attention_sizes(frame)
        _share(frame, batch * heads, _attend_gradient_address())
    return 0


_KERNELS = {
    "top_k": (_top_k_task, _top_k),
    "ablate": (_ablate_task, _ablate),
    "ablate_gradient": (_ablate_gradient_task, _ablate_gradient),
    "largest": (_largest_task, _largest),
    "gelu": (_gelu_task, _gelu),
    "gelu_gradient": (_gelu_gradient_task, _gelu_gradient),
    "product": (_product_task, _product),
    "attend": (_attend_task, _attend),
    "attend_gradient": (_attend_gradient_task, _attend_gradient),
}


@functools.cache
def handler(name: str) -> int:
    """The address of a kernel's handler, compiled on first use and kept on disk."""
    task, handle = _KERNELS[name]
    compiled: Any = numba.cfunc(types.int64(types.int64), cache=True)(task)
    binding.add_symbol(f"wsparse_{name}_task", compiled.address)
    compiled: Any = numba.cfunc(types.int64(types.int64), cache=True)(handle)
    # Kept alive for as long as XLA may call it.
    _alive.append(compiled)
    return compiled.address


_alive: list[Any] = []
