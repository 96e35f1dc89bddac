// What the kernels' handlers share: checks of what XLA hands over, and errors.

#ifndef WSPARSE_OPS_CSRC_HANDLERS_H_
#define WSPARSE_OPS_CSRC_HANDLERS_H_

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace wsparse {

namespace ffi = xla::ffi;

// XLA checks the types and the number of operands and results; their shapes are checked by this.
#define WSPARSE_CHECK(condition) \
  if (!(condition)) return ffi::Error::InvalidArgument("wsparse: expected " #condition)

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Pred = ffi::Buffer<ffi::PRED>;

// XLA's header binds a handler by the types of its parameters, and lacks a type for the threads.
struct Threads : ffi::ThreadPool {
  Threads(ffi::ThreadPool pool) : ffi::ThreadPool(pool) {}  // NOLINT
};

inline constexpr char kNumber[] = "k", kTransposed[] = "transposed";
using Number = ffi::Attr<int64_t, kNumber>;
using Transposed = ffi::Attr<int64_t, kTransposed>;

template <typename Buffer>
int64_t Size(const Buffer& x) {
  return x.element_count();
}

// The size of an axis counted from the end, 0 is the last; -1 where there is none.
template <typename Buffer>
int64_t FromEnd(const Buffer& x, size_t axis) {
  const auto sizes = x.dimensions();
  return axis < sizes.size() ? sizes[sizes.size() - 1 - axis] : -1;
}

template <typename A, typename B>
bool SameShape(const A& a, const B& b) {
  const auto x = a.dimensions(), y = b.dimensions();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

inline ffi::Error Status(bool succeeded) {
  if (succeeded) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "wsparse: out of memory");
}

}  // namespace wsparse

template <>
struct xla::ffi::CtxBinding<wsparse::Threads> {
  using Ctx = xla::ffi::ThreadPool;
};

#endif  // WSPARSE_OPS_CSRC_HANDLERS_H_
