// Products of activations with a matrix of few nonzeros, or with its transpose: over the nonzeros alone.
//
// Rows are taken 32 at a time and transposed, so that they lie along the lanes of vectors; a nonzero then
// costs a multiply-add for each vector, and the sums are transposed back.

#include "common.h"
#include "handlers.h"

namespace wsparse {

constexpr int64_t kPanel = 32;
constexpr int kPanelVectors = kPanel / kLanes;
// Floats of a cache line. As many rows are read or written together, a line of each, as prefetchers like.
constexpr int64_t kLine = 16;
// Outputs of a panel that are summed before they are written.
constexpr int64_t kOutputs = 512;

// A matrix by its outputs: the nonzeros of output o are `starts[o]` to `starts[o + 1]`, in order of inputs.
struct Nonzeros {
  std::vector<int64_t> starts;
  std::vector<int32_t> inputs;
  std::vector<float> values;
  std::vector<uint8_t> used;  // for every line of inputs, whether any has a nonzero
};

struct Entry {
  int32_t row, column;
};

// The nonzeros of a matrix, row by row, found by all threads: a list for every block of rows.
template <typename Pool>
bool FindNonzeros(Pool& pool, const float* w, int64_t rows, int64_t columns,
                  std::vector<std::vector<Entry>>* found) {
  const int64_t block = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(columns, 1));
  found->resize(CeilDiv(rows, block));
  return ParallelFor(pool, found->size(), block * columns / 4, [=] {
    return [=](int64_t item) {
      std::vector<Entry>& entries = (*found)[item];
      for (int64_t row = item * block; row < std::min((item + 1) * block, rows); ++row) {
        const auto* bits = reinterpret_cast<const uint32_t*>(w + row * columns);
        for (int64_t first = 0; first < columns; first += 16) {
          const int64_t end = std::min(first + 16, columns);
          uint32_t any = end < first + 16;
          // Shifted, both zeros are 0.
          if (!any) {
            for (int i = 0; i < 16; ++i) any |= bits[first + i] << 1;
          }
          if (any == 0) continue;
          for (int64_t column = first; column < end; ++column) {
            if (bits[column] << 1) entries.push_back({int32_t(row), int32_t(column)});
          }
        }
      }
    };
  });
}

// Sorts nonzeros by output: the matrix's columns, or its rows where it is transposed.
inline Nonzeros Compress(const float* w, int64_t columns, int64_t n_in, int64_t n_out, bool transposed,
                         const std::vector<std::vector<Entry>>& found) {
  Nonzeros sparse{std::vector<int64_t>(n_out + 1), {}, {}, std::vector<uint8_t>(CeilDiv(n_in, kLine))};
  for (const auto& entries : found) {
    for (const Entry& entry : entries) ++sparse.starts[transposed ? entry.row : entry.column];
  }
  int64_t n = 0;
  for (int64_t& start : sparse.starts) start = std::exchange(n, n + start);
  sparse.inputs.resize(n);
  sparse.values.resize(n);
  std::vector<int64_t> next(sparse.starts.begin(), sparse.starts.end() - 1);
  for (const auto& entries : found) {
    for (const Entry& entry : entries) {
      const int32_t input = transposed ? entry.column : entry.row;
      const int64_t at = next[transposed ? entry.row : entry.column]++;
      sparse.inputs[at] = input;
      sparse.values[at] = w[entry.row * columns + entry.column];
      sparse.used[input / kLine] = 1;
    }
  }
  return sparse;
}

// Transposes what there is of a line of rows and columns.
inline void TransposeLine(const float* source, int64_t stride, int64_t rows, int64_t columns, float* target,
                          int64_t target_stride) {
  if (rows >= kLine && columns >= kLine) {
    Transpose(source, stride, kLine, kLine, target, target_stride);
  } else {
    Transpose(source, stride, std::min(rows, kLine), std::min(columns, kLine), target, target_stride);
  }
}

// target[i, row] = source[row, i] for `rows` rows of at most 32, and 0 for the rest, in the lines that are used.
inline void TransposePanel(const float* source, int64_t rows, int64_t width, const std::vector<uint8_t>& used,
                           float* target) {
  for (int64_t i = 0; i < width; i += kLine) {
    if (!used[i / kLine]) continue;
    const int64_t n = std::min(kLine, width - i);
    if (rows < kPanel) std::fill(target + i * kPanel, target + (i + n) * kPanel, 0.0f);
    for (int64_t row = 0; row < rows; row += kLine) {
      TransposeLine(source + row * width + i, width, rows - row, width - i, target + i * kPanel + row, kPanel);
    }
  }
}

// out[:32] = sum of a nonzero's value times its input's row of the panel, over nonzeros `begin` to `end`.
inline void SumPanel(const Nonzeros& sparse, int64_t begin, int64_t end, const float* panel, float* out) {
  Floats sums[kPanelVectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    const float value = sparse.values[i];
    const float* row = panel + sparse.inputs[i] * kPanel;
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVectors; ++j) sums[j] += value * Load<Floats>(row + j * kLanes);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kPanelVectors; ++j) Store(sums[j], out + j * kLanes);
}

// y = x @ w, or x @ w.T; w is (w_rows, w_columns).
template <typename Pool>
bool Product(Pool& pool, const float* x, const float* w, int64_t rows, int64_t w_rows, int64_t w_columns,
             bool transposed, float* y) {
  const int64_t n_in = transposed ? w_columns : w_rows, n_out = transposed ? w_rows : w_columns;
  std::vector<std::vector<Entry>> found;
  if (!FindNonzeros(pool, w, w_rows, w_columns, &found)) return false;
  const Nonzeros sparse = Compress(w, w_columns, n_in, n_out, transposed, found);
  const int64_t cost = 8 * sparse.values.size() + 16 * (n_in + n_out);
  return ParallelFor(pool, CeilDiv(rows, kPanel), cost, [&, n_in, n_out] {
    return [&, n_in, n_out, of_x = Scratch(n_in * kPanel),
            of_y = Scratch(std::min(n_out, kOutputs) * kPanel)](int64_t item) {
      const int64_t n = std::min(kPanel, rows - item * kPanel);
      const float* source = x + item * kPanel * n_in;
      // Lanes beyond n are summed and not written.
      TransposePanel(source, n, n_in, sparse.used, of_x);
      for (int64_t begin = 0; begin < n_out; begin += kOutputs) {
        const int64_t count = std::min(kOutputs, n_out - begin);
        for (int64_t o = 0; o < count; ++o) {
          SumPanel(sparse, sparse.starts[begin + o], sparse.starts[begin + o + 1], of_x, of_y + o * kPanel);
        }
        float* target = y + item * kPanel * n_out + begin;
        for (int64_t row = 0; row < n; row += kLine) {
          for (int64_t o = 0; o < count; o += kLine) {
            TransposeLine(of_y + o * kPanel + row, kPanel, count - o, n - row, target + row * n_out + o,
                          n_out);
          }
        }
      }
    };
  });
}

// The places of a matrix's nonzeros in row-major order, then `size` for what is left of `capacity`; returns
// whether that was possible, and in `count` how many nonzeros there are, which may be more than fit.
template <typename Pool>
bool FindPlaces(Pool& pool, const float* w, int64_t rows, int64_t columns, int64_t capacity, int32_t* places,
                int32_t* count) {
  std::vector<std::vector<Entry>> found;
  if (!FindNonzeros(pool, w, rows, columns, &found)) return false;
  int64_t n = 0;
  for (const auto& entries : found) {
    for (const Entry& entry : entries) {
      if (n < capacity) places[n] = int32_t(entry.row * columns + entry.column);
      ++n;
    }
  }
  *count = int32_t(n);
  std::fill(places + std::min(n, capacity), places + capacity, int32_t(rows * columns));
  return true;
}

// Rows whose gradients are summed in one go, by one thread.
constexpr int64_t kRowsOfSums = 8 * kPanel;

// sums[b, n] = sum over the rows of block b of x[row, i] * dy[row, o], where place n is (i, o): the gradient of
// the weights of x @ w that are listed, in parts. Places of w's size or more have 0.
template <typename Pool>
bool SampledProduct(Pool& pool, const float* x, const float* dy, const int32_t* places, int64_t rows,
                    int64_t n_in, int64_t n_out, int64_t n_places, float* sums) {
  const int64_t n_listed = std::lower_bound(places, places + n_places, n_in * n_out) - places;
  std::vector<Entry> entries(n_listed);
  std::vector<uint8_t> used_in(CeilDiv(n_in, kLine)), used_out(CeilDiv(n_out, kLine));
  for (int64_t n = 0; n < n_listed; ++n) {
    entries[n] = {int32_t(places[n] / n_out), int32_t(places[n] % n_out)};
    used_in[entries[n].row / kLine] = used_out[entries[n].column / kLine] = 1;
  }
  const int64_t cost = kRowsOfSums * (n_in + n_out) + 4 * kRowsOfSums * n_listed / kLanes;
  return ParallelFor(pool, CeilDiv(rows, kRowsOfSums), cost, [&, n_in, n_out, n_listed] {
    return [&, n_in, n_out, n_listed, of_x = Scratch(n_in * kPanel), of_dy = Scratch(n_out * kPanel),
            lanes = Scratch(n_listed * kLanes)](int64_t item) {
      std::fill_n(static_cast<float*>(lanes), n_listed * kLanes, 0.0f);
      const int64_t end = std::min((item + 1) * kRowsOfSums, rows);
      for (int64_t first = item * kRowsOfSums; first < end; first += kPanel) {
        const int64_t n_rows = std::min(kPanel, end - first);
        TransposePanel(x + first * n_in, n_rows, n_in, used_in, of_x);
        TransposePanel(dy + first * n_out, n_rows, n_out, used_out, of_dy);
        for (int64_t n = 0; n < n_listed; ++n) {
          const float* a = of_x + entries[n].row * kPanel;
          const float* b = of_dy + entries[n].column * kPanel;
          Floats sum = Load<Floats>(lanes + n * kLanes);
#pragma GCC unroll 16
          for (int j = 0; j < kPanelVectors; ++j) {
            sum += Load<Floats>(a + j * kLanes) * Load<Floats>(b + j * kLanes);
          }
          Store(sum, lanes + n * kLanes);
        }
      }
      float* out = sums + item * n_places;
      std::fill(out, out + n_places, 0.0f);
      for (int64_t n = 0; n < n_listed; ++n) {
        for (int lane = 0; lane < kLanes; ++lane) out[n] += lanes[n * kLanes + lane];
      }
    };
  });
}

ffi::Error ProductHandler(Threads pool, F32 x, F32 w, ffi::Result<F32> y, Transposed transposed) {
  WSPARSE_CHECK(x.dimensions().size() == 2 && w.dimensions().size() == 2 && y->dimensions().size() == 2);
  WSPARSE_CHECK(FromEnd(x, 0) == FromEnd(w, *transposed ? 0 : 1));
  WSPARSE_CHECK(FromEnd(*y, 1) == FromEnd(x, 1) && FromEnd(*y, 0) == FromEnd(w, *transposed ? 1 : 0));
  return Status(Product(pool, x.typed_data(), w.typed_data(), FromEnd(x, 1), FromEnd(w, 1), FromEnd(w, 0),
                        *transposed != 0, y->typed_data()));
}

ffi::Error PlacesHandler(Threads pool, F32 w, ffi::Result<S32> places, ffi::Result<S32> counts) {
  const int64_t capacity = FromEnd(*places, 0), columns = FromEnd(w, 0), rows = FromEnd(w, 1);
  WSPARSE_CHECK(w.dimensions().size() >= 2 && rows * columns < INT32_MAX && rows * columns > 0);
  const int64_t matrices = Size(w) / (rows * columns);
  WSPARSE_CHECK(Size(*counts) == matrices && Size(*places) == matrices * capacity);
  for (int64_t i = 0; i < matrices; ++i) {
    if (!FindPlaces(pool, w.typed_data() + i * rows * columns, rows, columns, capacity,
                    places->typed_data() + i * capacity, counts->typed_data() + i)) {
      return Status(false);
    }
  }
  return ffi::Error::Success();
}

ffi::Error SampledProductHandler(Threads pool, F32 x, F32 dy, S32 places, ffi::Result<F32> sums) {
  WSPARSE_CHECK(x.dimensions().size() == 2 && dy.dimensions().size() == 2 && FromEnd(x, 1) == FromEnd(dy, 1));
  WSPARSE_CHECK(FromEnd(*sums, 0) == Size(places) && FromEnd(*sums, 1) == CeilDiv(FromEnd(x, 1), kRowsOfSums));
  WSPARSE_CHECK(std::is_sorted(places.typed_data(), places.typed_data() + Size(places)));
  return Status(SampledProduct(pool, x.typed_data(), dy.typed_data(), places.typed_data(), FromEnd(x, 1),
                               FromEnd(x, 0), FromEnd(dy, 0), Size(places), sums->typed_data()));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_product, ProductHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_places, PlacesHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_sampled_product, SampledProductHandler);

}  // namespace wsparse
