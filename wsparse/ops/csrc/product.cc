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
      // Lanes beyond n hold anything: they are summed and not written.
      for (int64_t row = 0; row < n; row += kLine) {
        for (int64_t i = 0; i < n_in; i += kLine) {
          if (!sparse.used[i / kLine]) continue;
          TransposeLine(source + row * n_in + i, n_in, n - row, n_in - i, of_x + i * kPanel + row, kPanel);
        }
      }
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

ffi::Error ProductHandler(Threads pool, F32 x, F32 w, ffi::Result<F32> y, Transposed transposed) {
  WSPARSE_CHECK(x.dimensions().size() == 2 && w.dimensions().size() == 2 && y->dimensions().size() == 2);
  WSPARSE_CHECK(FromEnd(x, 0) == FromEnd(w, *transposed ? 0 : 1));
  WSPARSE_CHECK(FromEnd(*y, 1) == FromEnd(x, 1) && FromEnd(*y, 0) == FromEnd(w, *transposed ? 1 : 0));
  return Status(Product(pool, x.typed_data(), w.typed_data(), FromEnd(x, 1), FromEnd(w, 1), FromEnd(w, 0),
                        *transposed != 0, y->typed_data()));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_product, ProductHandler);

}  // namespace wsparse
