// Arrays that Python has packed: one compressed blob, and the name, type and size of each array in it.

const ARRAYS = {
  int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
  float32: Float32Array,
};

/** The arrays of a blob by name. */
async function unpackArrays({ blob, arrays }) {
  const compressed = Uint8Array.from(atob(blob), (c) => c.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream('deflate'));
  const buffer = await new Response(stream).arrayBuffer();
  const found = {};
  let offset = 0;
  for (const [name, dtype, size] of arrays) {
    found[name] = new ARRAYS[dtype](buffer, offset, size);
    offset += Math.ceil(found[name].byteLength / 4) * 4;
  }
  return found;
}

/** Bit i of what NumPy's packbits wrote. */
const bitAt = (bytes, i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1;

/** A matrix from the nonzeros of its rows: those of row i are at starts[i] up to starts[i + 1]. */
function sparseMatrix(arrays, path) {
  const counts = arrays[`${path}:counts`];
  const starts = new Int32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i += 1) starts[i + 1] = starts[i] + counts[i];
  // Of one type for all matrices, which makes the loops over them several times faster.
  return { starts, columns: Int32Array.from(arrays[`${path}:columns`]), values: arrays[`${path}:values`] };
}

