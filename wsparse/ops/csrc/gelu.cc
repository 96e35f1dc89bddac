// The exact GELU, `x` times the standard normal distribution function, and its gradient.

#include "common.h"
#include "handlers.h"

namespace wsparse {

// `exp(-x^2 / 2)` and the cumulative probability of x.
//
// erfc(z) = exp(-z^2) t P(t) with t = 1 / (1 + z / 2), z >= 0: P fitted to 2e-8, relative.
inline std::pair<Floats, Floats> Normal(Floats x) {
  constexpr float kTerms[] = {-0.138056535f, 0.462348135f,  -0.712596601f, 0.454903752f, -0.115350269f,
                              0.231057982f,  0.237546053f, 0.282978954f,  0.282058765f};
  const Floats e = Exp(-0.5f * x * x);
  const Floats t = 1.0f / (1.0f + 0.353553391f * (x < 0.0f ? -x : x));
  Floats y = Floats{} + 0.0151097491f;
  for (float term : kTerms) y = y * t + term;
  const Floats tail = 0.5f * e * t * y;
  return {e, x < 0.0f ? tail : 1.0f - tail};
}

// y = f(x...), a vector at a time.
template <typename Pool, typename Function, typename... Sources>
bool Map(Pool& pool, int64_t size, float* y, Function f, Sources... x) {
  constexpr int64_t kItem = 4096;
  return ParallelFor(pool, CeilDiv(size, kItem), 4 * kItem, [=] {
    return [=](int64_t item) {
      const int64_t end = std::min((item + 1) * kItem, size);
      int64_t i = item * kItem;
      for (; i + kLanes <= end; i += kLanes) Store(f(Load<Floats>(x + i)...), y + i);
      if (i < end) Store(f(Load<Floats>(x + i, end - i)...), y + i, end - i);
    };
  });
}

template <typename Pool>
bool Gelu(Pool& pool, const float* x, int64_t size, float* y) {
  return Map(pool, size, y, [](Floats x) { return x * Normal(x).second; }, x);
}

template <typename Pool>
bool GeluGradient(Pool& pool, const float* x, const float* dy, int64_t size, float* dx) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const auto gradient = [](Floats x, Floats dy) {
    const auto [e, probability] = Normal(x);
    return dy * (probability + x * (e * kInverseSqrt2Pi));
  };
  return Map(pool, size, dx, gradient, x, dy);
}

ffi::Error GeluHandler(Threads pool, F32 x, ffi::Result<F32> y) {
  WSPARSE_CHECK(SameShape(x, *y));
  return Status(Gelu(pool, x.typed_data(), Size(x), y->typed_data()));
}

ffi::Error GeluGradientHandler(Threads pool, F32 x, F32 dy, ffi::Result<F32> dx) {
  WSPARSE_CHECK(SameShape(x, dy) && SameShape(x, *dx));
  return Status(GeluGradient(pool, x.typed_data(), dy.typed_data(), Size(x), dx->typed_data()));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_gelu, GeluHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_gelu_gradient, GeluGradientHandler);

}  // namespace wsparse
