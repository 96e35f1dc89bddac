// What the forward pass is made of. Values are float32 as in the model; sums are taken in float64.

/** Keeps the k entries of largest magnitude of a row, of equal ones those of lowest index; the others become 0. */
function keepLargest(values, offset, width, k, scratch) {
  if (k >= width) return;
  for (let i = 0; i < width; i += 1) scratch[i] = Math.abs(values[offset + i]);
  const threshold = largest(scratch, width, k);
  let left = k;
  for (let i = 0; i < width; i += 1) if (Math.abs(values[offset + i]) > threshold) left -= 1;
  for (let i = 0; i < width; i += 1) {
    const size = Math.abs(values[offset + i]);
    if (size > threshold) continue;
    if (size === threshold && left > 0) left -= 1;
    else values[offset + i] = 0;
  }
}

/** The k-th largest of the first entries of an array, which are reordered (Hoare's selection). */
function largest(array, width, k) {
  let [low, high] = [0, width - 1];
  const wanted = k - 1;
  while (low < high) {
    const pivot = array[(low + high) >> 1];
    let [i, j] = [low, high];
    while (i <= j) {
      while (array[i] > pivot) i += 1;
      while (array[j] < pivot) j -= 1;
      if (i <= j) {
        const swapped = array[i];
        array[i] = array[j];
        array[j] = swapped;
        i += 1;
        j -= 1;
      }
    }
    if (wanted <= j) high = j;
    else if (wanted >= i) low = i;
    else break;
  }
  return array[wanted];
}

// Coefficients of erfc by Chebyshev fitting, within 1.2e-7 of itself everywhere (Numerical Recipes, erfcc).
const ERFC = [
  -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277,
];

/** The complement of the error function. */
function erfc(x) {
  const z = Math.abs(x);
  const t = 1 / (1 + 0.5 * z);
  let sum = ERFC[9];
  for (let i = 8; i >= 0; i -= 1) sum = ERFC[i] + t * sum;
  const value = t * Math.exp(-z * z + sum);
  return x >= 0 ? value : 2 - value;
}

/** The exact GELU, x times the share of a normal distribution below x. */
const gelu = (x) => 0.5 * x * erfc(-x * Math.SQRT1_2);

const relu = (x) => (x > 0 ? x : 0);

/** log(1 + exp(x)), for any x. */
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

/** RMS or layer norm of rows of `width`, from row `first` on, written into rows of `stride`. */
function normalize(x, rows, width, first, { layer, eps, gain, bias }, into, stride, at) {
  for (let t = first; t < rows; t += 1) {
    const row = t * width;
    let mean = 0;
    if (layer) {
      for (let i = 0; i < width; i += 1) mean += x[row + i];
      mean /= width;
    }
    let square = 0;
    for (let i = 0; i < width; i += 1) square += (x[row + i] - mean) ** 2;
    const scale = Math.fround(1 / Math.sqrt(square / width + eps));
    for (let i = 0; i < width; i += 1) {
      // Rounded step by step, so that magnitudes that are equal in the model are equal here.
      const scaled = Math.fround(Math.fround(Math.fround(x[row + i] - mean) * scale) * gain[i]);
      into[t * stride + at + i] = bias ? scaled + bias[i] : scaled;
    }
  }
}

/** Causal attention of one head; `pattern`, where it is given, is filled with its weights, a row for each query. */
function attend(q, k, v, y, { rows, first, width, offset, size, sink, pattern }) {
  const weights = new Float64Array(rows);
  const root = 1 / Math.sqrt(size);
  for (let t = first; t < rows; t += 1) {
    let top = sink ?? -Infinity;
    for (let s = 0; s <= t; s += 1) {
      let score = 0;
      for (let i = 0; i < size; i += 1) score += q[t * width + offset + i] * k[s * width + offset + i];
      weights[s] = score * root;
      if (weights[s] > top) top = weights[s];
    }
    let total = sink === null ? 0 : Math.exp(sink - top);
    for (let s = 0; s <= t; s += 1) {
      weights[s] = Math.exp(weights[s] - top);
      total += weights[s];
    }
    for (let i = 0; i < size; i += 1) {
      let sum = 0;
      for (let s = 0; s <= t; s += 1) sum += weights[s] * v[s * width + offset + i];
      y[t * width + offset + i] = sum / total;
    }
    if (pattern) for (let s = 0; s <= t; s += 1) pattern[t * rows + s] = weights[s] / total;
  }
}
