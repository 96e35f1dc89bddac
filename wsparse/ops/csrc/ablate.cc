// AbsTopK and mean ablation in one pass: `gate * kept + (1 - gate) * mean`, and its gradient.

#include "handlers.h"
#include "top_k.h"

namespace wsparse {

// Rows of one item; the gates' gradient is summed over as many at a time, whoever computes it.
constexpr int64_t kRowsOfGates = 64;

// Which lanes of keys, the ones from `first` on, a cut keeps: comparisons give -1.
inline Ints Kept(Ints keys, int64_t first, Cut cut) {
  Ints index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = int32_t(first) + lane;
  return keys - (index < cut.end) > cut.least;
}

inline void Blend(const float* x, const int32_t* keys, Cut cut, const float* gate, const float* closed,
                  int64_t width, float* y) {
  ForVectors(width, [&](int64_t i, int n) WSPARSE_INLINE {
    const Floats value = Kept(Load<Ints>(keys + i, n), i, cut) ? Load<Floats>(x + i, n) : Floats{};
    Store(Load<Floats>(closed + i, n) + Load<Floats>(gate + i, n) * value, y + i, n);
  });
}

inline void BlendGradient(const float* x, const float* dy, Cut cut, const float* gate, int64_t width,
                          float* by_value, float* plain, float* dx) {
  ForVectors(width, [&](int64_t i, int n) WSPARSE_INLINE {
    const Ints kept = Kept(Keys(Load<Ints>(x + i, n)), i, cut);
    const Floats value = kept ? Load<Floats>(x + i, n) : Floats{};
    const Floats tangent = Load<Floats>(dy + i, n);
    Store(Load<Floats>(by_value + i, n) + tangent * value, by_value + i, n);
    Store(Load<Floats>(plain + i, n) + tangent, plain + i, n);
    Store(kept ? tangent * Load<Floats>(gate + i, n) : Floats{}, dx + i, n);
  });
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

// Gates are (..., width) where the leading axes of x begin with their leading axes.
inline int64_t SetsOf(const F32& gates) { return gates.element_count() / FromEnd(gates, 0); }

ffi::Error AblateHandler(ffi::ThreadPool pool, F32 x, F32 gates, F32 means, ffi::Result<F32> y,
                         ffi::Result<S32> cuts, int64_t k) {
  WSPARSE_CHECK(HasRank(x, 1) && HasRank(gates, 1));
  const int64_t width = FromEnd(x, 0);
  WSPARSE_CHECK(0 < k && k <= width);
  WSPARSE_CHECK(FromEnd(gates, 0) == width && SameShape(gates, means) && SameShape(x, *y));
  const int64_t rows = x.element_count() / width, sets = SetsOf(gates);
  WSPARSE_CHECK(int64_t(cuts->element_count()) == 2 * rows);
  if (rows == 0) return ffi::Error::Success();
  WSPARSE_CHECK(rows % sets == 0);
  return Status(Ablate(pool, x.typed_data(), gates.typed_data(), means.typed_data(), sets, rows / sets, width,
                       k, y->typed_data(), reinterpret_cast<Cut*>(cuts->typed_data())));
}

ffi::Error AblateGradientHandler(ffi::ThreadPool pool, F32 x, F32 gates, S32 cuts, F32 dy,
                                 ffi::Result<F32> dx, ffi::Result<F32> sums) {
  WSPARSE_CHECK(HasRank(x, 1) && HasRank(gates, 1));
  const int64_t width = FromEnd(x, 0);
  WSPARSE_CHECK(width > 0);
  WSPARSE_CHECK(FromEnd(gates, 0) == width && SameShape(x, dy) && SameShape(x, *dx));
  const int64_t rows = x.element_count() / width, sets = SetsOf(gates);
  WSPARSE_CHECK(int64_t(cuts.element_count()) == 2 * rows);
  if (rows == 0) return ffi::Error::Success();
  WSPARSE_CHECK(rows % sets == 0);
  const int64_t blocks = CeilDiv(rows / sets, kRowsOfGates);
  WSPARSE_CHECK(int64_t(sums->element_count()) == sets * blocks * 2 * width);
  return Status(AblateGradient(pool, x.typed_data(), gates.typed_data(),
                               reinterpret_cast<const Cut*>(cuts.typed_data()), dy.typed_data(), sets,
                               rows / sets, width, dx->typed_data(), sums->typed_data()));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_ablate, AblateHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<S32>()
                                  .Attr<int64_t>("k"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_ablate_gradient, AblateGradientHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>());

}  // namespace wsparse
