// AbsTopK of activations, and the projection's selection of weights.

#include "top_k.h"

#include "handlers.h"

namespace wsparse {

template <typename Pool>
bool TopK(Pool& pool, const int32_t* bits, int64_t rows, int64_t width, int64_t k, uint8_t* kept) {
  return ParallelFor(pool, rows, 2 * width, [=] {
    return [=, keys = std::vector<int32_t>(width)](int64_t row) mutable {
      const Cut cut = CutRow(bits + row * width, width, k, keys.data());
      Mark(keys.data(), width, cut, kept + row * width);
    };
  });
}

// The largest positive keys of every slice, as many as its budget or as there are.
template <typename Pool>
bool Largest(Pool& pool, const int32_t* keys, const int32_t* budgets, int64_t slices, int64_t size,
             uint8_t* kept) {
  return ParallelFor(pool, slices, 4 * size, [=] {
    return [=](int64_t slice) {
      const int32_t* row = keys + slice * size;
      const int64_t k = std::min<int64_t>(budgets[slice], Count(row, size, 1));
      const int32_t top = size > 0 ? *std::max_element(row, row + size) : 0;
      const Cut none{INT32_MAX, int32_t(size)};
      Mark(row, size, k > 0 ? FindCut(row, size, k, top) : none, kept + slice * size);
    };
  });
}

ffi::Error TopKHandler(Threads pool, F32 x, ffi::Result<Pred> kept, Number k) {
  const int64_t width = FromEnd(x, 0);
  WSPARSE_CHECK(0 < *k && *k <= width && SameShape(x, *kept));
  const auto* bits = static_cast<const int32_t*>(x.untyped_data());
  auto* out = static_cast<uint8_t*>(kept->untyped_data());
  return Status(TopK(pool, bits, Size(x) / width, width, *k, out));
}

ffi::Error LargestHandler(Threads pool, S32 keys, S32 budgets, ffi::Result<Pred> kept) {
  const int64_t slices = Size(budgets);
  if (slices == 0) return ffi::Error::Success();
  const int64_t size = Size(keys) / slices;
  WSPARSE_CHECK(SameShape(keys, *kept) && size * slices == Size(keys) && size <= INT32_MAX);
  auto* out = static_cast<uint8_t*>(kept->untyped_data());
  return Status(Largest(pool, keys.typed_data(), budgets.typed_data(), slices, size, out));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_top_k, TopKHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_largest, LargestHandler);

}  // namespace wsparse
