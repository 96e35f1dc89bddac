// What the kernels' handlers share: checks of what XLA hands over, and errors.

#ifndef WSPARSE_OPS_CSRC_HANDLERS_H_
#define WSPARSE_OPS_CSRC_HANDLERS_H_

#include <cstdint>
#include <initializer_list>

#include "xla/ffi/api/ffi.h"

namespace wsparse {

namespace ffi = xla::ffi;

// XLA checks the types and the number of operands and results; their shapes are checked by this.
#define WSPARSE_CHECK(condition) \
  if (!(condition)) return ffi::Error::InvalidArgument("wsparse: expected " #condition)

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Pred = ffi::Buffer<ffi::PRED>;

// The size of an axis counted from the end, 0 is the last.
template <typename Buffer>
int64_t FromEnd(const Buffer& x, size_t axis) {
  return x.dimensions()[x.dimensions().size() - 1 - axis];
}

template <typename Buffer>
bool HasRank(const Buffer& x, size_t least) {
  return x.dimensions().size() >= least;
}

template <typename A, typename B>
bool SameShape(const A& a, const B& b) {
  const auto x = a.dimensions(), y = b.dimensions();
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

template <typename Buffer>
const int32_t* Bits(const Buffer& x) {
  return reinterpret_cast<const int32_t*>(x.untyped_data());
}

inline ffi::Error Status(bool succeeded) {
  if (succeeded) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "wsparse: out of memory");
}

}  // namespace wsparse

#endif  // WSPARSE_OPS_CSRC_HANDLERS_H_
