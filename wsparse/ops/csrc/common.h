// What the kernels share: vectors, memory, and the division of work among XLA's threads.

#ifndef WSPARSE_OPS_CSRC_COMMON_H_
#define WSPARSE_OPS_CSRC_COMMON_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

namespace wsparse {

// As wide as a register of the processor that the kernels are compiled for.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// Loads `count` lanes, the others 0; stores `count` lanes.
template <typename Vector, typename Scalar>
inline Vector Load(const Scalar* source, int count = sizeof(Vector) / 4) {
  Vector vector{};
  std::memcpy(&vector, source, 4 * count);
  return vector;
}

template <typename Vector, typename Scalar>
inline void Store(Vector vector, Scalar* target, int count = sizeof(Vector) / 4) {
  std::memcpy(target, &vector, 4 * count);
}

// exp(x) for x <= 0, within 2 units in the last place; at least 1.6e-38. NaN stays NaN.
inline Floats Exp(Floats x) {
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  // Truncated after half was taken away: the nearest integer.
  const Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats n = __builtin_convertvector(power, Floats);
  // ln 2 in two parts: the first has few bits, so that its products with small integers are exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = r * (1 / 5040.0f) + (1 / 720.0f);
  y = y * r + (1 / 120.0f);
  y = y * r + (1 / 24.0f);
  y = y * r + (1 / 6.0f);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * (Floats)((power + 127) << 23);
}

typedef float Quad __attribute__((vector_size(16)));

#ifdef __clang__
#define WSPARSE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t QuadOfInts __attribute__((vector_size(16)));
#define WSPARSE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (QuadOfInts){__VA_ARGS__})
#endif

// target[j, i] = source[i, j] for i, j < 4.
inline void Transpose4x4(const float* source, int64_t stride, float* target, int64_t target_stride) {
  const Quad a = Load<Quad>(source), b = Load<Quad>(source + stride);
  const Quad c = Load<Quad>(source + 2 * stride), d = Load<Quad>(source + 3 * stride);
  const Quad ab_low = WSPARSE_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = WSPARSE_SHUFFLE(a, b, 2, 6, 3, 7);
  const Quad cd_low = WSPARSE_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = WSPARSE_SHUFFLE(c, d, 2, 6, 3, 7);
  Store(WSPARSE_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5), target);
  Store(WSPARSE_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7), target + target_stride);
  Store(WSPARSE_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5), target + 2 * target_stride);
  Store(WSPARSE_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7), target + 3 * target_stride);
}

// target[j, i] = source[i, j] for i < rows, j < columns. Inlined: it is fast where the sizes are constants.
__attribute__((always_inline)) inline void Transpose(const float* source, int64_t stride, int64_t rows,
                                                     int64_t columns, float* target, int64_t target_stride) {
  for (int64_t j = 0; j < columns; j += 4) {
    for (int64_t i = 0; i < rows; i += 4) {
      if (i + 4 <= rows && j + 4 <= columns) {
        Transpose4x4(source + i * stride + j, stride, target + j * target_stride + i, target_stride);
        continue;
      }
      for (int64_t a = i; a < std::min(i + 4, rows); ++a) {
        for (int64_t b = j; b < std::min(j + 4, columns); ++b) {
          target[b * target_stride + a] = source[a * stride + b];
        }
      }
    }
  }
}

// Floats on whole cache lines; not initialized.
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<float*>(::operator new(4 * n, std::align_val_t(64)))) {}
  operator float*() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Delete> data_;
};

struct Job {
  int64_t items, grain;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::condition_variable finished;
  int64_t done = 0;  // guarded by `mutex`
};

// Takes items of a job until none are left. `make_worker` is touched only while the job has an item of ours.
template <typename Make>
void Work(Job& job, const Make& make_worker) {
  int64_t done = 0;
  {
    std::optional<decltype(make_worker())> worker;
    for (int64_t begin; (begin = job.next.fetch_add(job.grain)) < job.items;) {
      const int64_t end = std::min(begin + job.grain, job.items);
      try {
        if (!worker) worker.emplace(make_worker());
        for (int64_t item = begin; item < end; ++item) (*worker)(item);
      } catch (const std::exception&) {
        job.failed = true;
      }
      done += end - begin;
    }
  }
  if (done == 0) return;
  const std::lock_guard<std::mutex> lock(job.mutex);
  job.done += done;
  if (job.done == job.items) job.finished.notify_all();
}

// Calls `make_worker()(item)` for every item on the pool's threads and this one; each makes a worker.
//
// An item's result must not depend on who computes it. The caller takes whatever helpers have not begun, so a
// busy pool cannot block it, and sleeps while they finish. Returns whether nothing was thrown. `cost` is
// about how many cycles an item takes.
template <typename Pool, typename Make>
bool ParallelFor(Pool& pool, int64_t items, int64_t cost, const Make& make_worker) {
  if (items == 0) return true;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  // Eight turns for each thread, so that they finish together; none shorter than it takes to wake a thread.
  constexpr int64_t kLeast = 1 << 15;
  auto job = std::make_shared<Job>();
  job->items = items;
  job->grain = std::max({items / (8 * threads), kLeast / std::max<int64_t>(cost, 1), int64_t{1}});
  const int64_t turns = (items + job->grain - 1) / job->grain;
  for (int64_t helper = 1; helper < std::min(threads, turns); ++helper) {
    pool.Schedule([job, make = &make_worker] { Work(*job, *make); });
  }
  Work(*job, make_worker);
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done == items; });
  return !job->failed;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace wsparse

#endif  // WSPARSE_OPS_CSRC_COMMON_H_
