"""What numba compiles for CPUs; `wsparse.kernels.cpu` is its face to JAX, and imports it when it is needed.

Every kernel is a pair of functions: the handler of XLA's call, which knows how many independent pieces of
work it has, and a task, which does pieces until none are left; every thread of XLA's pool runs it. Each
piece is computed by the same instructions in the same order whichever thread takes it, so results do not
depend on the number of threads.

The functions stand at the module's top, since numba's cache on disk does not recognise closures.
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

# `contract` allows fused multiply-adds, the rest vectorised sums; NaN and infinity keep their meaning.
_njit: Any = numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
_njit_sums: Any = numba.njit(
    cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy"
)
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
_NEXT, _DONE, _OWNERS, _FRAME, _ITEMS, _GRAIN, _THREADS, _SCRATCH, _REQUEST, _JOB_WORDS = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    13,
)


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
def _operand(frame, index):
    return _pointer(_buffer(frame, _FRAME_ARGS, index)[_BUFFER_DATA])


@_njit
def _result(frame, index):
    return _pointer(_buffer(frame, _FRAME_RETS, index)[_BUFFER_DATA])


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


# --- AbsTopK ---

# The key of NaN is one above infinity's; see `wsparse.sparsity.magnitude.magnitude_keys`.
_TOP_KEY = _i32(np.array(np.inf, np.float32).view(np.int32) + 1)

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


@_njit
def _count(keys, threshold):
    n = _i32(0)
    for i in range(keys.shape[0]):
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
def _select(keys, k, top, kept):
    """Mark the k largest of keys, of which at least k are positive; `top` is the largest."""
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
    if n_low == k:
        _write(keys, low, kept)
    else:
        _write_with_ties(keys, low, k - n_high, kept)


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


# --- Functions ---

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
    n = np.floor(x * _LOG2E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    c = _EXP_TERMS
    y = ((((c[7] * r + c[6]) * r + c[5]) * r + c[4]) * r + c[3]) * r + c[2]
    y = (y * r + c[1]) * r + c[0]
    return y * _as_float(_i32(_i32(_i32(n) + _i32(127)) << _i32(23)))


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
        for i in range(start * _PIECE, min(stop * _PIECE, size)):
            y[i] = x[i] * _normal(x[i])[1]
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
        for i in range(start * _PIECE, min(stop * _PIECE, size)):
            e, share = _normal(x[i])
            dx[i] = dy[i] * (share + x[i] * (e * _INVERSE_SQRT_2PI))
        start, stop = _take(job, stop - start)
    return 0


_gelu_gradient_address = _address_of("wsparse_gelu_gradient_task")


def _gelu_gradient(frame):
    if _executes(frame):
        _share(frame, -(-_size(frame) // _PIECE), _gelu_gradient_address())
    return 0


# --- Products with a sparse matrix ---

# Rows of a piece, and outputs that are put in order together.
_ROWS, _OUTPUTS = 64, 16


@_njit
def _product_sizes(frame):
    """Rows, inputs and outputs of a product with a matrix (attribute 0) or its transpose (1)."""
    w = _dims(frame, 1)
    rows = _dims(frame, 0)[0]
    return (rows, w[1], w[0]) if _attribute(frame, 0) else (rows, w[0], w[1])


@_njit
def _compress(w, by_row, starts, indices, values):
    """The nonzeros of a matrix by output: those of output o are `starts[o]` to `starts[o + 1]`.

    Outputs are the matrix's rows or its columns; within one, nonzeros are in order.
    """
    starts[:] = 0
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            if w[i, j] != _ZERO:
                starts[(i if by_row else j) + 1] += 1
    for o in range(starts.shape[0] - 1):
        starts[o + 1] += starts[o]
    # While an output is filled, its start runs ahead; afterwards it is where the next one began.
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            if w[i, j] != _ZERO:
                o = i if by_row else j
                n = starts[o]
                indices[n], values[n] = (j if by_row else i), w[i, j]
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
    table = _words(scratch, 3)
    starts = carray(_pointer(table[0]), n_out + 1, np.int64)
    indices = carray(_pointer(table[1]), starts[n_out], np.int32)
    values = carray(_pointer(table[2]), starts[n_out], np.float32)
    x = carray(_operand(frame, 0), (rows, n_in), np.float32)
    y = carray(_result(frame, 0), (rows, n_out), np.float32)
    x_T, y_T = np.zeros((n_in, _ROWS), np.float32), np.empty((_OUTPUTS, _ROWS), np.float32)
    used = np.zeros(n_in, np.bool_)
    for i in indices:
        used[i] = True
    while start < stop:
        for item in range(start, stop):
            first = item * _ROWS
            n = min(_ROWS, rows - first)
            block = x[first : first + n]
            for i in range(n_in):
                if used[i]:
                    for r in range(n):
                        x_T[i, r] = block[r, i]
            for o in range(0, n_out, _OUTPUTS):
                width = min(_OUTPUTS, n_out - o)
                for c in range(width):
                    line = y_T[c]
                    line[:] = _ZERO
                    i, end = starts[o + c], starts[o + c + 1]
                    while i + 4 <= end:
                        a, b = x_T[indices[i]], x_T[indices[i + 1]]
                        d, e = x_T[indices[i + 2]], x_T[indices[i + 3]]
                        wa, wb, wd, we = values[i], values[i + 1], values[i + 2], values[i + 3]
                        for r in range(_ROWS):
                            line[r] += (wa * a[r] + wb * b[r]) + (wd * d[r] + we * e[r])
                        i += 4
                    while i < end:
                        a, wa = x_T[indices[i]], values[i]
                        for r in range(_ROWS):
                            line[r] += wa * a[r]
                        i += 1
                for r in range(n):
                    for c in range(width):
                        y[first + r, o + c] = y_T[c, r]
        start, stop = _take(job, stop - start)
    return 0


_product_address = _address_of("wsparse_product_task")


def _product(frame):
    if _executes(frame):
        rows, _, outputs = _product_sizes(frame)
        sides = _dims(frame, 1)
        w = carray(_operand(frame, 1), (sides[0], sides[1]), np.float32)
        n = 0
        for i in range(sides[0]):
            for j in range(sides[1]):
                n += w[i, j] != _ZERO
        scratch = _malloc(8 * (3 + outputs + 1 + n))
        table = _words(scratch, 3)
        table[0] = scratch + 24
        table[1] = table[0] + 8 * (outputs + 1)
        table[2] = table[1] + 4 * n
        starts = carray(_pointer(table[0]), outputs + 1, np.int64)
        indices = carray(_pointer(table[1]), n, np.int32)
        values = carray(_pointer(table[2]), n, np.float32)
        _compress(w, _attribute(frame, 0) != 0, starts, indices, values)
        _share_with(frame, -(-rows // _ROWS), _product_address(), scratch)
        _free(scratch)
    return 0


# --- Attention ---


@_njit
def _add_rows(rows, weights, n, out):
    """`out[:n] += weights @ rows[:, :n]`, eight rows at a time."""
    m = weights.shape[0]
    i = 0
    while i + 8 <= m:
        a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        e, f, g, h = rows[i + 4], rows[i + 5], rows[i + 6], rows[i + 7]
        wa, wb, wc, wd = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        we, wf, wg, wh = weights[i + 4], weights[i + 5], weights[i + 6], weights[i + 7]
        for j in range(n):
            left = wa * a[j] + wb * b[j] + wc * c[j] + wd * d[j]
            out[j] += left + (we * e[j] + wf * f[j] + wg * g[j] + wh * h[j])
        i += 8
    while i < m:
        a, wa = rows[i], weights[i]
        for j in range(n):
            out[j] += wa * a[j]
        i += 1


# NaN among the scores may be overlooked here; it comes back with the exponentials.
@numba.njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _max(row, n, most):
    for j in range(n):
        most = max(row[j], most)
    return most


@_njit_sums
def _sum(row, n):
    total = _ZERO
    for j in range(n):
        total += row[j]
    return total


@_njit_sums
def _dot(a, b):
    total = _ZERO
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


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
def _transpose(rows, scale, out):
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[j, i] = rows[i, j] * scale


def _attend_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    batch, time, keys, heads, width, sets = _attention_sizes(frame)
    q_all = carray(_operand(frame, 0), (batch, time, heads, width), np.float32)
    k_all = carray(_operand(frame, 1), (batch, keys, heads, width), np.float32)
    v_all = carray(_operand(frame, 2), (batch, keys, heads, width), np.float32)
    sinks = carray(_operand(frame, 3), (sets, heads), np.float32)
    positions = carray(_operand(frame, 4), (batch, time), np.int32)
    y_all = carray(_result(frame, 0), (batch, time, heads, width), np.float32)
    logs = carray(_result(frame, 1), (batch, time, heads), np.float32)
    scale = _f32(1 / math.sqrt(width))
    k_T = np.empty((width, keys), np.float32)
    v = np.empty((keys, width), np.float32)
    p, y = np.empty(keys, np.float32), np.empty(width, np.float32)
    while start < stop:
        for item in range(start, stop):
            b, h = item // heads, item % heads
            sink = sinks[b * sets // batch, h]
            _transpose(k_all[b, :, h], scale, k_T)
            v[:] = v_all[b, :, h]
            for t in range(time):
                n = min(positions[b, t] + 1, keys)
                p[:n] = _ZERO
                _add_rows(k_T, q_all[b, t, h], n, p)
                most = _max(p, n, sink)
                for j in range(n):
                    p[j] = _exp(p[j] - most)
                total = _sum(p, n) + _exp(sink - most)
                y[:] = _ZERO
                _add_rows(v, p[:n], width, y)
                for c in range(width):
                    y_all[b, t, h, c] = y[c] / total
                logs[b, t, h] = most + _f32(math.log(total))
        start, stop = _take(job, stop - start)
    return 0


_attend_address = _address_of("wsparse_attend_task")


def _attend(frame):
    if _executes(frame):
        batch, _, _, heads, _, _ = _attention_sizes(frame)
        _share(frame, batch * heads, _attend_address())
    return 0


_QUERIES = 8


def _attend_gradient_task(job):
    start, stop = _take(job, 0)
    if start == stop:
        return 0
    frame = _words(job, _JOB_WORDS)[_FRAME]
    batch, time, keys, heads, width, sets = _attention_sizes(frame)
    q_all = carray(_operand(frame, 0), (batch, time, heads, width), np.float32)
    k_all = carray(_operand(frame, 1), (batch, keys, heads, width), np.float32)
    v_all = carray(_operand(frame, 2), (batch, keys, heads, width), np.float32)
    sinks = carray(_operand(frame, 3), (sets, heads), np.float32)
    positions = carray(_operand(frame, 4), (batch, time), np.int32)
    y_all = carray(_operand(frame, 5), (batch, time, heads, width), np.float32)
    logs = carray(_operand(frame, 6), (batch, time, heads), np.float32)
    dy_all = carray(_operand(frame, 7), (batch, time, heads, width), np.float32)
    dq_all = carray(_result(frame, 0), (batch, time, heads, width), np.float32)
    dk_all = carray(_result(frame, 1), (batch, keys, heads, width), np.float32)
    dv_all = carray(_result(frame, 2), (batch, keys, heads, width), np.float32)
    d_sinks = carray(_result(frame, 3), (batch, heads), np.float32)
    scale = _f32(1 / math.sqrt(width))
    k_T, v_T = np.empty((width, keys), np.float32), np.empty((width, keys), np.float32)
    dk_T, dv_T = np.empty((width, keys), np.float32), np.empty((width, keys), np.float32)
    k = np.empty((keys, width), np.float32)
    p, ds = np.empty((_QUERIES, keys), np.float32), np.empty((_QUERIES, keys), np.float32)
    q_T, dy_T = np.empty((width, _QUERIES), np.float32), np.empty((width, _QUERIES), np.float32)
    while start < stop:
        for item in range(start, stop):
            b, h = item // heads, item % heads
            sink = sinks[b * sets // batch, h]
            _transpose(k_all[b, :, h], scale, k_T)
            _transpose(v_all[b, :, h], _ONE, v_T)
            for j in range(keys):
                for c in range(width):
                    k[j, c] = k_all[b, j, h, c] * scale
            dk_T[:], dv_T[:] = _ZERO, _ZERO
            d_sink = _ZERO
            for first in range(0, time, _QUERIES):
                rows = min(_QUERIES, time - first)
                widest = 0
                for r in range(rows):
                    widest = max(widest, min(positions[b, first + r] + 1, keys))
                for r in range(rows):
                    t = first + r
                    n = min(positions[b, t] + 1, keys)
                    weights, d_scores = p[r], ds[r]
                    weights[:widest], d_scores[:widest] = _ZERO, _ZERO
                    _add_rows(k_T, q_all[b, t, h], n, weights)
                    _add_rows(v_T, dy_all[b, t, h], n, d_scores)
                    log, overlap = logs[b, t, h], _dot(dy_all[b, t, h], y_all[b, t, h])
                    for j in range(n):
                        weights[j] = _exp(weights[j] - log)
                        d_scores[j] = weights[j] * (d_scores[j] - overlap)
                    d_sink -= _exp(sink - log) * overlap
                    dq_all[b, t, h] = _ZERO
                    _add_rows(k, d_scores[:n], width, dq_all[b, t, h])
                for c in range(width):
                    for r in range(rows):
                        q_T[c, r] = q_all[b, first + r, h, c] * scale
                        dy_T[c, r] = dy_all[b, first + r, h, c]
                for c in range(width):
                    _add_rows(ds, q_T[c, :rows], widest, dk_T[c])
                    _add_rows(p, dy_T[c, :rows], widest, dv_T[c])
            for j in range(keys):
                for c in range(width):
                    dk_all[b, j, h, c], dv_all[b, j, h, c] = dk_T[c, j], dv_T[c, j]
            d_sinks[b, h] = d_sink
        start, stop = _take(job, stop - start)
    return 0


_attend_gradient_address = _address_of("wsparse_attend_gradient_task")


def _attend_gradient(frame):
    if _executes(frame):
        batch, _, _, heads, _, _ = _attention_sizes(frame)
        _share(frame, batch * heads, _attend_gradient_address())
    return 0


_KERNELS = {
    "top_k": (_top_k_task, _top_k),
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
