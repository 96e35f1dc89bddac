// The kernels' loops on a pool of threads of their own, to be compiled with a sanitizer: tests/test_ops_sanitizers.py.
//
// Sizes are those of tests/test_ops_cpu.py, odd ones included. Every buffer is exactly as large as it has to be.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "ablate.cc"
#include "attention.cc"
#include "gelu.cc"
#include "product.cc"
#include "top_k.cc"

using namespace wsparse;

// Every task gets a thread, some of them late.
class Pool {
 public:
  int64_t num_threads() const { return 4; }
  template <typename Task>
  void Schedule(Task&& task) {
    threads_.emplace_back([task = std::move(task), late = threads_.size() % 3 == 2]() mutable {
      if (late) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      task();
    });
  }
  ~Pool() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

std::mt19937 generator(0);

template <typename T = float>
std::vector<T> Draw(int64_t n, float fraction = 1) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<T> values(n);
  for (T& value : values) value = uniform(generator) < fraction ? T(normal(generator)) : T(0);
  return values;
}

void Check(bool condition, const char* what) {
  if (!condition) std::printf("failed: %s\n", what), std::exit(1);
}

const int32_t* BitsOf(const std::vector<float>& x) { return reinterpret_cast<const int32_t*>(x.data()); }

void TestSelections(Pool& pool) {
  const int64_t cases[][3] = {{5, 1, 1}, {5, 37, 9}, {300, 200, 199}, {700, 512, 128}, {64, 96, 96}};
  for (const auto& [rows, width, k] : cases) {
    auto x = Draw(rows * width);
    x[0] = NAN;
    for (int64_t i = width; i < 2 * width; ++i) x[i] = 0;  // ties
    std::vector<uint8_t> kept(rows * width);
    Check(TopK(pool, BitsOf(x), rows, width, k, kept.data()), "top k");
    for (int64_t row = 0; row < rows; ++row) {
      const auto begin = kept.begin() + row * width;
      Check(std::count(begin, begin + width, 1) == k, "exactly k are kept");
    }
    const auto gates = Draw(width), means = Draw(width), dy = Draw(rows * width);
    std::vector<float> y(rows * width), dx(rows * width), sums(CeilDiv(rows, kRowsOfGates) * 2 * width);
    std::vector<Cut> cuts(rows);
    Check(Ablate(pool, x.data(), gates.data(), means.data(), 1, rows, width, k, y.data(), cuts.data()), "");
    Check(AblateGradient(pool, x.data(), gates.data(), cuts.data(), dy.data(), 1, rows, width, dx.data(),
                         sums.data()), "");
    std::vector<int32_t> keys(rows * width), budgets(rows, int32_t(k));
    for (int64_t i = 0; i < rows * width; ++i) keys[i] = Key(BitsOf(x)[i]) - 1;
    budgets[rows - 1] = -2;
    Check(Largest(pool, keys.data(), budgets.data(), rows, width, kept.data()), "largest");
  }
}

void TestProducts(Pool& pool) {
  const int64_t shapes[][3] = {{1, 40, 35}, {63, 40, 35}, {130, 20, 2067}, {130, 1050, 35}, {256, 64, 64}};
  for (const auto& [rows, n_in, n_out] : shapes) {
    for (const float fraction : {0.0f, 0.03f, 1.0f}) {
      const auto x = Draw(rows * n_in), w = Draw(n_in * n_out, fraction);
      std::vector<float> y(rows * n_out), back(rows * n_in);
      Check(Product(pool, x.data(), w.data(), rows, n_in, n_out, false, y.data()), "product");
      Check(Product(pool, y.data(), w.data(), rows, n_in, n_out, true, back.data()), "product");
      double expected = 0;
      for (int64_t i = 0; i < n_in; ++i) expected += double(x[i]) * w[i * n_out];
      Check(std::abs(expected - y[0]) < 1e-3, "a product's value");
    }
  }
}

void TestPlaces(Pool& pool) {
  const int64_t shapes[][3] = {{1, 1, 1}, {40, 17, 33}, {600, 64, 48}};
  for (const auto& [rows, n_in, n_out] : shapes) {
    for (const float fraction : {0.0f, 0.1f, 1.0f}) {
      const auto w = Draw(n_in * n_out, fraction), x = Draw(rows * n_in), dy = Draw(rows * n_out);
      const int64_t capacity = n_in * n_out / 2 + 2, blocks = CeilDiv(rows, kRowsOfSums);
      std::vector<int32_t> places(capacity);
      int32_t count = 0;
      Check(FindPlaces(pool, w.data(), n_in, n_out, capacity, places.data(), &count), "places");
      std::vector<float> sums(blocks * capacity);
      Check(SampledProduct(pool, x.data(), dy.data(), places.data(), rows, n_in, n_out, capacity, sums.data()),
            "a sampled product");
      if (count == 0) continue;
      double expected = 0, found = 0;
      const int64_t in = places[0] / n_out, out = places[0] % n_out;
      for (int64_t row = 0; row < rows; ++row) expected += double(x[row * n_in + in]) * dy[row * n_out + out];
      for (int64_t block = 0; block < blocks; ++block) found += sums[block * capacity];
      Check(std::abs(expected - found) < 1e-3, "a sampled product's value");
    }
  }
}

void TestAttention(Pool& pool) {
  const AttentionSizes cases[] = {
      {2, 19, 19, 3, 16, 1}, {2, 3, 21, 3, 5, 2}, {2, 1, 9, 3, 8, 1}, {4, 37, 38, 3, 40, 2}};
  for (const AttentionSizes& s : cases) {
    const int64_t queries = s.batch * s.time * s.heads, keys = s.batch * s.keys * s.heads;
    const auto q = Draw(queries * s.width), dy = Draw(queries * s.width);
    const auto k = Draw(keys * s.width), v = Draw(keys * s.width), sinks = Draw(s.sets * s.heads);
    std::vector<int32_t> positions(s.batch * s.time);
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = i % s.time + (s.keys - s.time) * (i >= size_t(s.time));
    std::vector<float> y(queries * s.width), logs(queries), dq(q.size()), dk(k.size()), dv(v.size());
    std::vector<float> d_sinks(s.batch * s.heads);
    const AttentionOperands in{q.data(), k.data(), v.data(), sinks.data(), positions.data()};
    Check(Attend(pool, s, in, y.data(), logs.data()), "attention");
    Check(AttendGradient(pool, s, in, y.data(), logs.data(), dy.data(), dq.data(), dk.data(), dv.data(),
                         d_sinks.data()), "attention's gradient");
    for (float value : dq) Check(std::isfinite(value), "a finite gradient");
  }
}

void TestGelu(Pool& pool) {
  for (const int64_t n : {1, 7, 4096, 40001}) {
    const auto x = Draw(n), dy = Draw(n);
    std::vector<float> y(n), dx(n);
    Check(Gelu(pool, x.data(), n, y.data()) && GeluGradient(pool, x.data(), dy.data(), n, dx.data()), "");
    Check(std::abs(y[0] - x[0] * 0.5f * std::erfc(-x[0] * std::sqrt(0.5f))) < 1e-5f, "the GELU's value");
  }
}

// What is thrown in a worker reaches the caller as a failure, and everything is still finished.
void TestFailures(Pool& pool) {
  const bool succeeded = ParallelFor(pool, 100, 1 << 20, [] {
    return [](int64_t item) {
      if (item == 50) throw std::bad_alloc();
    };
  });
  Check(!succeeded, "a failure is told");
}

int main() {
  Pool pool;
  TestSelections(pool);
  TestProducts(pool);
  TestPlaces(pool);
  TestAttention(pool);
  TestGelu(pool);
  TestFailures(pool);
  std::puts("passed");
}
