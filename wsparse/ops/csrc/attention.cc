// Causal attention with sinks for one head at a time: scores stay in the cache.
//
// Queries are taken sixteen at a time and lie along the lanes of vectors ("lanes" below: 16 floats, one for
// each query), keys and channels along the rows of small matrices. Shapes: T query time, S key time, H head,
// K channels of a head, P channels padded to sixteens.

#include <cmath>

#include "common.h"
#include "handlers.h"

namespace wsparse {

constexpr int64_t kQueries = 16;
constexpr int kPerRow = kQueries / kLanes;
// Rows of a matrix product that are summed in registers at once.
constexpr int kTile = kLanes == 16 ? 8 : 4;
// Far below every score, and not infinite: the difference of two infinities is NaN.
constexpr float kHidden = -1e30f;

struct AttentionSizes {
  int64_t batch, time, keys, heads, width;
  int64_t sets;  // of sinks: each is for batch / sets consecutive sequences

  int64_t Padded() const { return CeilDiv(width, kQueries) * kQueries; }
  int64_t PaddedKeys() const { return CeilDiv(keys, kTile) * kTile; }
};

// out[m, :16] (+)= sum of a[m, d] * b[d, :16] over d < depth, for m < rows, a multiple of kTile.
template <bool add>
inline void Multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                     int64_t rows, int64_t depth, float* out, int64_t out_row) {
  for (int64_t m = 0; m < rows; m += kTile, a += kTile * a_row, out += kTile * out_row) {
    Floats sums[kTile][kPerRow];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPerRow; ++j) {
        sums[i][j] = add ? Load<Floats>(out + i * out_row + j * kLanes) : Floats{};
      }
    }
    for (int64_t d = 0; d < depth; ++d) {
      Floats right[kPerRow];
#pragma GCC unroll 4
      for (int j = 0; j < kPerRow; ++j) right[j] = Load<Floats>(b + d * b_row + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        const float left = a[i * a_row + d * a_column];
#pragma GCC unroll 4
        for (int j = 0; j < kPerRow; ++j) sums[i][j] += left * right[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPerRow; ++j) Store(sums[i][j], out + i * out_row + j * kLanes);
    }
  }
}

// Copies n rows of `width` floats times `scale` to rows of `padded`; pads with zeros to `rows` rows.
inline void Pack(const float* source, int64_t stride, int64_t n, int64_t width, float scale, int64_t rows,
                 int64_t padded, float* target) {
  for (int64_t row = 0; row < rows; ++row, target += padded) {
    const float* from = source + row * stride;
    const int64_t count = row < n ? width : 0;
    for (int64_t c = 0; c < count; ++c) target[c] = from[c] * scale;
    std::fill(target + count, target + padded, 0.0f);
  }
}

// Sixteen queries of a sequence: how far each may look, and the keys that any of them sees.
struct Window {
  int64_t n, clear, seen;  // queries; keys that all see; keys that any sees, filled up to tiles
  int32_t last[kQueries];  // the last key in sight of each query

  Window(const AttentionSizes& sizes, const int32_t* positions, int64_t first)
      : n(std::min(kQueries, sizes.time - first)), clear(sizes.keys), seen(0) {
    std::fill(last, last + kQueries, INT32_MAX);
    for (int64_t lane = 0; lane < n; ++lane) {
      last[lane] = positions[first + lane];
      const int64_t keys = std::clamp<int64_t>(int64_t{last[lane]} + 1, 0, sizes.keys);
      clear = std::min(clear, keys);
      seen = std::max(seen, keys);
    }
    seen = CeilDiv(seen, kTile) * kTile;
    // Keys that fill up a tile are nobody's.
    for (int64_t lane = 0; lane < kQueries; ++lane) {
      last[lane] = std::min<int64_t>(last[lane], sizes.keys - 1);
    }
  }

  // scores_SL = value where a query does not see a key.
  void Hide(float* scores, float value) const {
    for (int64_t j = clear; j < seen; ++j) {
      for (int64_t lane = 0; lane < kQueries; ++lane) {
        float& score = scores[j * kQueries + lane];
        score = last[lane] >= j ? score : value;
      }
    }
  }
};

// scores = exp(scores - shift), lane by lane; adds their sums to `total`.
inline void Exponentiate(float* scores, int64_t n, const float* shift, float* total) {
  for (int part = 0; part < kPerRow; ++part) {
    const Floats by = Load<Floats>(shift + part * kLanes);
    Floats sum = Load<Floats>(total + part * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      float* at = scores + j * kQueries + part * kLanes;
      const Floats weight = Exp(Load<Floats>(at) - by);
      Store(weight, at);
      sum += weight;
    }
    Store(sum, total + part * kLanes);
  }
}

inline float ExpOne(float x) { return Exp(Floats{} + x)[0]; }

// most = max(most, scores), lane by lane.
inline void Raise(const float* scores, int64_t n, float* most) {
  for (int part = 0; part < kPerRow; ++part) {
    Floats top = Load<Floats>(most + part * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      const Floats score = Load<Floats>(scores + j * kQueries + part * kLanes);
      top = score > top ? score : top;
    }
    Store(top, most + part * kLanes);
  }
}

struct AttentionOperands {
  const float *q, *k, *v, *sinks;
  const int32_t* positions;
};

// y (B, T, H, K) and the logarithms (B, T, H) of what exponentials of scores were divided by.
template <typename Pool>
bool Attend(Pool& pool, const AttentionSizes& sizes, const AttentionOperands& in, float* y, float* logs) {
  const int64_t width = sizes.width, padded = sizes.Padded(), keys = sizes.PaddedKeys();
  const int64_t stride = sizes.heads * width, block = kQueries * padded;
  const auto make_worker = [=] {
    return [=, of_queries = Scratch(3 * block), of_keys = Scratch(keys * (2 * padded + kQueries))](
               int64_t item) {
      float *q = of_queries, *q_T = q + block, *y_T = q + 2 * block;
      float *k = of_keys, *v = k + keys * padded, *p = v + keys * padded;
      const int64_t b = item / sizes.heads, h = item % sizes.heads, head = h * width;
      const float sink = in.sinks[b * sizes.sets / sizes.batch * sizes.heads + h];
      Pack(in.k + b * sizes.keys * stride + head, stride, sizes.keys, width, 1, keys, padded, k);
      Pack(in.v + b * sizes.keys * stride + head, stride, sizes.keys, width, 1, keys, padded, v);
      for (int64_t first = 0; first < sizes.time; first += kQueries) {
        const Window window(sizes, in.positions + b * sizes.time, first);
        const int64_t at = (b * sizes.time + first) * stride + head;
        Pack(in.q + at, stride, window.n, width, 1 / std::sqrt(float(width)), kQueries, padded, q);
        Transpose(q, padded, kQueries, padded, q_T, kQueries);
        Multiply<false>(k, padded, 1, q_T, kQueries, window.seen, padded, p, kQueries);
        window.Hide(p, kHidden);
        float most[kQueries], total[kQueries] = {};
        std::fill(most, most + kQueries, sink);
        Raise(p, window.seen, most);
        Exponentiate(p, window.seen, most, total);
        // Exp is never less than 1e-38; no total changes by that.
        window.Hide(p, 0);
        Multiply<false>(v, 1, padded, p, kQueries, padded, window.seen, y_T, kQueries);
        Transpose(y_T, kQueries, padded, kQueries, q, padded);
        for (int64_t lane = 0; lane < window.n; ++lane) {
          const float sum = total[lane] + ExpOne(sink - most[lane]);
          logs[(b * sizes.time + first + lane) * sizes.heads + h] = most[lane] + std::log(sum);
          Pack(q + lane * padded, 0, 1, width, 1 / sum, 1, width, y + at + lane * stride);
        }
      }
    };
  };
  const int64_t cost = sizes.time * (sizes.keys + 16) * padded / 8;
  return ParallelFor(pool, sizes.batch * sizes.heads, cost, make_worker);
}

// Gradients of q, k, v, and of the sinks for each sequence (B, H).
template <typename Pool>
bool AttendGradient(Pool& pool, const AttentionSizes& sizes, const AttentionOperands& in, const float* y,
                    const float* logs, const float* dy, float* dq, float* dk, float* dv, float* d_sinks) {
  const int64_t width = sizes.width, padded = sizes.Padded(), keys = sizes.PaddedKeys();
  const int64_t stride = sizes.heads * width, block = kQueries * padded;
  const float scale = 1 / std::sqrt(float(width));
  const auto make_worker = [=] {
    return [=, of_queries = Scratch(6 * block), of_keys = Scratch(keys * (4 * padded + 2 * kQueries))](
               int64_t item) {
      float *q = of_queries, *q_T = q + block, *y_T = q + 2 * block;
      float *dy_rows = q + 3 * block, *dy_T = q + 4 * block, *dq_T = q + 5 * block;
      float *k = of_keys, *v = k + keys * padded, *dk_rows = v + keys * padded;
      float *dv_rows = dk_rows + keys * padded, *p = dv_rows + keys * padded, *ds = p + keys * kQueries;
      const int64_t b = item / sizes.heads, h = item % sizes.heads, head = h * width;
      const float sink = in.sinks[b * sizes.sets / sizes.batch * sizes.heads + h];
      const int64_t first_key = b * sizes.keys * stride + head;
      Pack(in.k + first_key, stride, sizes.keys, width, 1, keys, padded, k);
      Pack(in.v + first_key, stride, sizes.keys, width, 1, keys, padded, v);
      std::fill(dk_rows, dk_rows + 2 * keys * padded, 0.0f);
      float d_sink = 0;
      for (int64_t first = 0; first < sizes.time; first += kQueries) {
        const Window window(sizes, in.positions + b * sizes.time, first);
        const int64_t at = (b * sizes.time + first) * stride + head;
        Pack(y + at, stride, window.n, width, 1, kQueries, padded, q);
        Transpose(q, padded, kQueries, padded, y_T, kQueries);
        Pack(dy + at, stride, window.n, width, 1, kQueries, padded, dy_rows);
        Transpose(dy_rows, padded, kQueries, padded, dy_T, kQueries);
        Pack(in.q + at, stride, window.n, width, scale, kQueries, padded, q);
        Transpose(q, padded, kQueries, padded, q_T, kQueries);
        float overlap[kQueries] = {}, log[kQueries] = {}, ignored[kQueries] = {};
        for (int64_t c = 0; c < padded; ++c) {
          for (int64_t lane = 0; lane < kQueries; ++lane) {
            overlap[lane] += dy_T[c * kQueries + lane] * y_T[c * kQueries + lane];
          }
        }
        for (int64_t lane = 0; lane < window.n; ++lane) {
          log[lane] = logs[(b * sizes.time + first + lane) * sizes.heads + h];
          d_sink -= ExpOne(sink - log[lane]) * overlap[lane];
        }
        Multiply<false>(k, padded, 1, q_T, kQueries, window.seen, padded, p, kQueries);
        window.Hide(p, kHidden);
        Exponentiate(p, window.seen, log, ignored);
        window.Hide(p, 0);
        Multiply<false>(v, padded, 1, dy_T, kQueries, window.seen, padded, ds, kQueries);
        for (int64_t j = 0; j < window.seen; ++j) {
          for (int64_t lane = 0; lane < kQueries; ++lane) {
            float& d_score = ds[j * kQueries + lane];
            d_score = p[j * kQueries + lane] * (d_score - overlap[lane]);
          }
        }
        Multiply<false>(k, 1, padded, ds, kQueries, padded, window.seen, dq_T, kQueries);
        for (int64_t c = 0; c < padded; c += kQueries) {
          Multiply<true>(ds, kQueries, 1, q + c, padded, window.seen, kQueries, dk_rows + c, padded);
          Multiply<true>(p, kQueries, 1, dy_rows + c, padded, window.seen, kQueries, dv_rows + c, padded);
        }
        Transpose(dq_T, kQueries, padded, kQueries, q, padded);
        for (int64_t lane = 0; lane < window.n; ++lane) {
          Pack(q + lane * padded, 0, 1, width, scale, 1, width, dq + at + lane * stride);
        }
      }
      for (int64_t j = 0; j < sizes.keys; ++j) {
        std::copy_n(dk_rows + j * padded, width, dk + first_key + j * stride);
        std::copy_n(dv_rows + j * padded, width, dv + first_key + j * stride);
      }
      d_sinks[item] = d_sink;
    };
  };
  const int64_t cost = sizes.time * (sizes.keys + 16) * padded / 3;
  return ParallelFor(pool, sizes.batch * sizes.heads, cost, make_worker);
}

// Sizes of operands (..., T, H, K), (..., S, H, K) twice, (..., H), (..., T), and of logarithms (..., T, H).
inline ffi::Error FindSizes(const F32& q, const F32& k, const F32& v, const F32& sinks, const S32& positions,
                            const F32& logs, AttentionSizes* sizes) {
  WSPARSE_CHECK(FromEnd(q, 2) > 0 && Size(q) > 0 && FromEnd(k, 2) > 0 && Size(k) > 0 && Size(sinks) > 0);
  const int64_t time = FromEnd(q, 2), heads = FromEnd(q, 1), width = FromEnd(q, 0), keys = FromEnd(k, 2);
  const int64_t batch = Size(q) / (time * heads * width), sets = Size(sinks) / heads;
  WSPARSE_CHECK(SameShape(k, v) && FromEnd(k, 1) == heads && Size(k) == batch * keys * heads * width);
  WSPARSE_CHECK(FromEnd(k, 0) == width && FromEnd(sinks, 0) == heads && batch % sets == 0);
  WSPARSE_CHECK(Size(positions) == batch * time && Size(logs) == batch * time * heads);
  *sizes = {batch, time, keys, heads, width, sets};
  return ffi::Error::Success();
}

ffi::Error AttendHandler(Threads pool, F32 q, F32 k, F32 v, F32 sinks, S32 positions, ffi::Result<F32> y,
                         ffi::Result<F32> logs) {
  AttentionSizes sizes;
  if (auto error = FindSizes(q, k, v, sinks, positions, *logs, &sizes); error.failure()) return error;
  WSPARSE_CHECK(SameShape(q, *y));
  const AttentionOperands operands{q.typed_data(), k.typed_data(), v.typed_data(), sinks.typed_data(),
                                   positions.typed_data()};
  return Status(Attend(pool, sizes, operands, y->typed_data(), logs->typed_data()));
}

ffi::Error AttendGradientHandler(Threads pool, F32 q, F32 k, F32 v, F32 sinks, S32 positions, F32 y, F32 logs,
                                 F32 dy, ffi::Result<F32> dq, ffi::Result<F32> dk, ffi::Result<F32> dv,
                                 ffi::Result<F32> d_sinks) {
  AttentionSizes sizes;
  if (auto error = FindSizes(q, k, v, sinks, positions, logs, &sizes); error.failure()) return error;
  WSPARSE_CHECK(SameShape(q, y) && SameShape(q, dy) && SameShape(q, *dq));
  WSPARSE_CHECK(SameShape(k, *dk) && SameShape(v, *dv) && Size(*d_sinks) == sizes.batch * sizes.heads);
  const AttentionOperands operands{q.typed_data(), k.typed_data(), v.typed_data(), sinks.typed_data(),
                                   positions.typed_data()};
  return Status(AttendGradient(pool, sizes, operands, y.typed_data(), logs.typed_data(), dy.typed_data(),
                               dq->typed_data(), dk->typed_data(), dv->typed_data(), d_sinks->typed_data()));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_attend, AttendHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(wsparse_attend_gradient, AttendGradientHandler);

}  // namespace wsparse
