// AbsTopK and mean ablation in one pass: `gate * kept + (1 - gate) * mean`, and its gradient.

#include "handlers.h"
#include "top_k.h"

namespace wsparse {

// Rows of one item; the gates' gradient is summed over as many at a time, whoever computes it.
constexpr int64_t kRowsOfGates = 64;

inline void Blend(const float* __restrict x, const int32_t* __restrict keys, Cut cut,
                  const float* __restrict gate, const float* __restrict closed, int64_t width,
                  float* __restrict y) {
  for (const auto [begin, end, below] : Stretches(cut, width)) {
    for (int64_t i = begin; i < end; ++i) {
      const float value = keys[i] > below ? x[i] : 0;
      y[i] = closed[i] + gate[i] * value;
    }
  }
}

inline void BlendGradient(const float* __restrict x, const float* __restrict dy, Cut cut,
                          const float* __restrict gate, int64_t width, float* __restrict by_value,
                          float* __restrict plain, float* __restrict dx) {
  const auto* bits = reinterpret_cast<const int32_t*>(x);
  for (const auto [begin, end, below] : Stretches(cut, width)) {
    for (int64_t i = begin; i < end; ++i) {
      const bool kept = Key(bits[i]) > below;
      const float value = kept ? x[i] : 0, tangent = dy[i] * gate[i];
      by_value[i] += dy[i] * value;
      plain[i] += dy[i];
      dx[i] = kept ? tangent : 0;
    }
  }
}

// `sets` sets of gates, each for `rows` rows; `cuts` gets two integers for every row.
template <typename Pool>
bool Ablate(Pool& pool, const float* x, const float* gates, const float* means, int64_t sets, int64_t rows,
            int64_t width, int64_t k, float* y, Cut* cuts) {
  const int64_t blocks = CeilDiv(rows, kRowsOfGates);
  return ParallelFor(pool, sets * blocks, 2 * kRowsOfGates * width, [=] {
    return [=, keys = std::vector<int32_t>(width), closed = std::vector<float>(width)](int64_t item) mutable {
      const int64_t set = item / blocks, first = item % blocks * kRowsOfGates;
      const float* gate = gates + set * width;
      for (int64_t i = 0; i < width; ++i) closed[i] = (1 - gate[i]) * means[set * width + i];
      for (int64_t row = set * rows + first; row < set * rows + std::min(first + kRowsOfGates, rows); ++row) {
        const float* from = x + row * width;
        cuts[row] = CutRow(reinterpret_cast<const int32_t*>(from), width, k, keys.data());
        Blend(from, keys.data(), cuts[row], gate, closed.data(), width, y + row * width);
      }
    };
  });
}

// `sums` gets, for every block of rows, the sums of dy times what was kept, and of dy.
template <typename Pool>
bool AblateGradient(Pool& pool, const float* x, const float* gates, const Cut* cuts, const float* dy,
                    int64_t sets, int64_t rows, int64_t width, float* dx, float* sums) {
  const int64_t blocks = CeilDiv(rows, kRowsOfGates);
  return ParallelFor(pool, sets * blocks, kRowsOfGates * width, [=] {
    return [=](int64_t item) {
      const int64_t set = item / blocks, first = item % blocks * kRowsOfGates;
      const float* gate = gates + set * width;
      float* by_value = sums + 2 * item * width;
      std::fill(by_value, by_value + 2 * width, 0.0f);
      for (int64_t row = set * rows + first; row < set * rows + std::min(first + kRowsOfGates, rows); ++row) {
        BlendGradient(x + row * width, dy + row * width, cuts[row], gate, width, by_value, by_value + width,
                      dx + row * width);
      }
    };
  });
}

// Sizes of operands (..., width), (..., width) and (..., 2): the axes before x's rows are those of the gates.
inline ffi::Error FindSizes(const F32& x, const F32& gates, const S32& cuts, int64_t* sets, int64_t* rows) {
  const int64_t width = FromEnd(x, 0);
  WSPARSE_CHECK(width > 0 && FromEnd(gates, 0) == width);
  *sets = std::max<int64_t>(Size(gates) / width, 1);
  *rows = Size(x) / width / *sets;
  WSPARSE_CHECK(*sets * *rows * width == Size(x) && Size(cuts) == 2 * *sets * *rows);
  WSPARSE_CHECK(*rows == 0 || Size(gates) == *sets * width);
  return ffi::Error::Success();
}

ffi::Error AblateHandler(Threads pool, F32 x, F32 gates, F32 means, ffi::Result<F32> y, ffi::Result<S32> cuts,
                         Number k) {
  int64_t sets, rows;
  if (auto error = FindSizes(x, gates, *cuts, &sets, &rows); error.failure()) return error;
  const int64_t width = FromEnd(x, 0);
  WSPARSE_CHECK(0 < *k && *k <= width && SameShape(gates, means) && SameShape(x, *y));
  return Status(Ablate(pool, x.typed_data(), gates.typed_data(), means.typed_data(), sets, rows, width, *k,
                       y->typed_data(), reinterpret_cast<Cut*>(cuts->typed_data())));
}

ffi::Error AblateGradientHandler(Threads pool, F32 x, F32 gates, S32 cuts, F32 dy, ffi::Result<F32> dx,
                                 ffi::Result<F32> sums) {
  int64_t sets, rows;
  if (auto error = FindSizes(x, gates, cuts, &sets, &rows); error.failure()) return error;
  const int64_t width = FromEnd(x, 0);
  WSPARSE_CHECK(SameShape(x, dy) && SameShape(x, *dx));
  WSPARSE_CHECK(Size(*sums) == sets * CeilDiv(rows, kRowsOfGates) * 2 * width);
  return Status(AblateGradient(pool, x.typed_data(), gates.typed_data(),
                               reinterpret_cast<const Cut*>(cuts.typed_data()), dy.typed_data(), sets, rows,
                               width, dx->typed_data(), sums->typed_data()));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_ablate, AblateHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_ablate_gradient, AblateGradientHandler);

}  // namespace wsparse
