// How many elements a nanosecond GELU and GELU′ take from cached data, and how far off they are: the formulas of the
// kernels ("now"), those this project began with ("before") and a plain loop over libm. One JSON object to stdout:
//
//   gelu_throughput throughput ROUNDS         contestants in turns; median and quartiles of ns an element
//   gelu_throughput errors STRIDE THREADS     every STRIDE-th float of [−10, 10] against libm in double
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "gelu_formulas.h"
#include "kernels/cpu/half.h"
#include "kernels/activation.h"

namespace fastlane {
namespace {

constexpr Activation kActivations[] = {Activation::gelu, Activation::gelu_tanh};

enum class Function { value, derivative };
constexpr Function kFunctions[] = {Function::value, Function::derivative};
const char* name_of(Function function) { return function == Function::value ? "value" : "derivative"; }

const char* name_of(float) { return "float32"; }
const char* name_of(double) { return "float64"; }
const char* name_of(BFloat16) { return "bfloat16"; }

float to_compute(float x) { return x; }
double to_compute(double x) { return x; }
float to_compute(BFloat16 x) { return to_float(x); }
void round_to(float x, float& y) { y = x; }
void round_to(double x, double& y) { y = x; }
void round_to(double x, BFloat16& y) { y = to_bfloat16(static_cast<float>(x)); }

// GELU as its textbook formula reads, in the type in which the kernels compute.
template <class T, Activation activation, Function function>
void libm_loop(const T* x, T* y, int64_t count) {
  using E = decltype(to_compute(T{}));
  constexpr E half = 0.5, one = 1, cubic = static_cast<E>(gelu_constants::tanh_cubic);
  constexpr E sqrt_half = static_cast<E>(gelu_constants::sqrt_half);
  constexpr E inv_sqrt_2pi = static_cast<E>(gelu_constants::inv_sqrt_2pi);
  constexpr E sqrt_2_over_pi = static_cast<E>(gelu_constants::two_sqrt_2_over_pi / 2);
  for (int64_t i = 0; i < count; ++i) {
    const E z = to_compute(x[i]);
    E cdf, pdf;
    if constexpr (activation == Activation::gelu) {
      cdf = half * (one + std::erf(z * sqrt_half));
      if constexpr (function == Function::derivative) pdf = inv_sqrt_2pi * std::exp(-half * z * z);
    } else {
      const E tanh_u = std::tanh(sqrt_2_over_pi * (z + cubic * z * z * z));
      cdf = half * (one + tanh_u);
      if constexpr (function == Function::derivative)
        pdf = half * (one - tanh_u * tanh_u) * sqrt_2_over_pi * (one + 3 * cubic * z * z);
    }
    if constexpr (function == Function::value) round_to(z * cdf, y[i]);
    if constexpr (function == Function::derivative) round_to(cdf + z * pdf, y[i]);
  }
}

template <class T, Activation activation>
Formulas<T> libm_formulas() {
  return {libm_loop<T, activation, Function::value>, libm_loop<T, activation, Function::derivative>};
}

template <class T>
struct Contestant {
  const char *formulas, *isa;
  Formulas<T> loops;

  Loop<T> loop(Function function) const { return function == Function::value ? loops.value : loops.derivative; }
};

template <class T>
std::vector<Contestant<T>> all_contestants(Activation activation) {
  std::vector<Contestant<T>> all;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back({"before", "avx2", avx2_formulas<T>(/*now=*/false, activation)});
    all.push_back({"now", "avx2", avx2_formulas<T>(/*now=*/true, activation)});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    all.push_back({"before", "avx512", avx512_formulas<T>(/*now=*/false, activation)});
    all.push_back({"now", "avx512", avx512_formulas<T>(/*now=*/true, activation)});
  }
#endif
  all.push_back({"libm", "baseline",
                 activation == Activation::gelu ? libm_formulas<T, Activation::gelu>()
                                                : libm_formulas<T, Activation::gelu_tanh>()});
  return all;
}

class JsonRows {
 public:
  // The caller goes on with more members of the row.
  void begin(const char* first_member, const char* text) {
    std::printf("%s\n    {\"%s\": \"%s\"", empty_ ? "" : ",", first_member, text);
    empty_ = false;
  }
  void member(const char* name, const char* text) { std::printf(", \"%s\": \"%s\"", name, text); }
  void member(const char* name, double value) {
    // JSON has no NaN and no infinity.
    if (std::isfinite(value)) {
      std::printf(", \"%s\": %.9g", name, value);
    } else {
      std::printf(", \"%s\": null", name);
    }
  }
  void end() { std::printf("}"); }

 private:
  bool empty_ = true;
};

// As statistics.quantiles(method="inclusive") has it.
double quantile(const std::vector<double>& sorted, double part) {
  const double place = part * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(place), above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

constexpr int64_t kElements = 4096;
constexpr double kSampleSeconds = 5e-4;

template <class T>
struct Stopwatch {
  alignas(64) T x[kElements];
  alignas(64) T y[kElements];

  double seconds(Loop<T> loop, int64_t passes) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t pass = 0; pass < passes; ++pass) {
      loop(x, y, kElements);
      __asm__ volatile("" : : "r"(y) : "memory");
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  int64_t passes_in_a_sample(Loop<T> loop) {
    seconds(loop, 2);
    int64_t passes = 1;
    while (seconds(loop, passes) < kSampleSeconds / 2) passes *= 2;
    return 2 * passes;
  }
};

template <class T>
void measure(int rounds, JsonRows& rows) {
  static Stopwatch<T> watch;
  std::mt19937_64 generator(1);
  std::normal_distribution<double> normal;
  for (T& x : watch.x) round_to(normal(generator), x);

  for (const Activation activation : kActivations) {
    const std::vector<Contestant<T>> contestants = all_contestants<T>(activation);
    for (const Function function : kFunctions) {
      std::vector<int64_t> passes;
      for (const auto& contestant : contestants)
        passes.push_back(watch.passes_in_a_sample(contestant.loop(function)));
      std::vector<std::vector<double>> samples(contestants.size());
      for (int round = 0; round < rounds; ++round) {
        for (size_t c = 0; c < contestants.size(); ++c) {
          const double seconds = watch.seconds(contestants[c].loop(function), passes[c]);
          samples[c].push_back(1e9 * seconds / static_cast<double>(passes[c] * kElements));
        }
      }
      for (size_t c = 0; c < contestants.size(); ++c) {
        std::sort(samples[c].begin(), samples[c].end());
        rows.begin("dtype", name_of(T{}));
        rows.member("activation", name_of(activation).data());
        rows.member("function", name_of(function));
        rows.member("formulas", contestants[c].formulas);
        rows.member("isa", contestants[c].isa);
        rows.member("median_ns", quantile(samples[c], 0.5));
        rows.member("q1_ns", quantile(samples[c], 0.25));
        rows.member("q3_ns", quantile(samples[c], 0.75));
        rows.member("elements_per_ns", 1 / quantile(samples[c], 0.5));
        rows.end();
      }
    }
  }
}

int throughput(int rounds) {
  std::printf("{\"elements\": %lld, \"rounds\": %d, \"rows\": [", static_cast<long long>(kElements), rounds);
  JsonRows rows;
  measure<float>(rounds, rows);
  measure<double>(rounds, rows);
  measure<BFloat16>(rounds, rows);
  std::printf("\n  ]}\n");
  return 0;
}

// GELU and GELU′ in double through libm's erfc and exp, and what their errors are relative to: |GELU|, and the sum of
// the moduli of GELU′'s two terms.
struct Exact {
  double value, derivative, derivative_size;
};
Exact exact(Activation activation, double x) {
  if (activation == Activation::gelu) {
    const double cdf = normal_cdf(x), tilt = x * gelu_constants::inv_sqrt_2pi * std::exp(-0.5 * x * x);
    return {x * cdf, cdf + tilt, cdf + std::fabs(tilt)};
  }
  const double two_u = gelu_constants::two_sqrt_2_over_pi * (x + gelu_constants::tanh_cubic * x * x * x);
  const double e = std::exp(-std::fabs(two_u)), inverse = 1 / (1 + e), cdf = x < 0 ? e * inverse : inverse;
  const double slope = gelu_constants::two_sqrt_2_over_pi * (1 + 3 * gelu_constants::tanh_cubic * x * x);
  const double tilt = x * slope * e * inverse * inverse;
  return {x * cdf, cdf + tilt, cdf + std::fabs(tilt)};
}

constexpr float kEnd = 10.0f;
constexpr int64_t kBlock = 1024;

// The references of one block of x, for all contestants.
struct Block {
  struct Column {
    alignas(64) double exact[kBlock];
    alignas(64) double inverse_size[kBlock];
  };
  int64_t place;  // of the first x
  alignas(64) float x[kBlock];
  alignas(64) float y[kBlock];
  Column columns[2][2];  // activation, function

  void fill(int64_t first, int64_t stride, bool negative) {
    place = 2 * first + (negative ? kBlock : 0);
    const uint32_t sign = negative ? 0x80000000u : 0;
    const int64_t last = float_bits(kEnd) / stride;
    for (int64_t i = 0; i < kBlock; ++i)
      x[i] = float_from_bits(static_cast<uint32_t>(std::min(first + i, last) * stride) | sign);
    for (int a = 0; a < 2; ++a)
      for (int64_t i = 0; i < kBlock; ++i) {
        const Exact found = fastlane::exact(kActivations[a], double{x[i]});
        set(columns[a][0], i, found.value, std::fabs(found.value));
        set(columns[a][1], i, found.derivative, found.derivative_size);
      }
  }

 private:
  // Below the smallest normal float an error relative to the result means nothing.
  static void set(Column& column, int64_t i, double exact, double size) {
    column.exact[i] = exact;
    column.inverse_size[i] = 1 / std::max(size, 0x1p-126);
  }
};

struct Worst {
  double error = 0;
  float x = 0;
  int64_t place = std::numeric_limits<int64_t>::max();
};

// NaN is worse than everything; of equals the first place stays, whichever thread met it.
bool worse(const Worst& a, const Worst& b) {
  if (std::isnan(a.error) != std::isnan(b.error)) return std::isnan(a.error);
  return a.error > b.error || (!(a.error < b.error) && a.place < b.place);
}

// How many results are further off than `limit`, NaN included: a loop that the compiler turns into vectors.
int64_t count_beyond(const float* y, const double* exact, const double* inverse_size, double limit, int64_t count) {
  int64_t beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond += !(std::fabs(y[i] - exact[i]) * inverse_size[i] <= limit);
  return beyond;
}

struct Sweep {
  std::vector<Contestant<float>> contestants[2];  // by activation

  Sweep() {
    for (int a = 0; a < 2; ++a) contestants[a] = all_contestants<float>(kActivations[a]);
  }

  size_t number(int activation, int function, size_t contestant) const {
    return (static_cast<size_t>(activation) * 2 + static_cast<size_t>(function)) * contestants[0].size() + contestant;
  }

  void compare(Block& block, std::vector<Worst>& worst) const {
    for (int a = 0; a < 2; ++a)
      for (int f = 0; f < 2; ++f)
        for (size_t c = 0; c < contestants[a].size(); ++c) {
          const Contestant<float>& contestant = contestants[a][c];
          const Block::Column& column = block.columns[a][f];
          Worst& record = worst[number(a, f, c)];
          contestant.loop(kFunctions[f])(block.x, block.y, kBlock);
          if (!count_beyond(block.y, column.exact, column.inverse_size, record.error, kBlock)) continue;
          for (int64_t i = 0; i < kBlock; ++i) {
            const Worst here{std::fabs(block.y[i] - column.exact[i]) * column.inverse_size[i], block.x[i],
                             block.place + i};
            if (worse(here, record)) record = here;
          }
        }
  }

  std::vector<Worst> run(int64_t stride, int threads) const {
    const int64_t magnitudes = float_bits(kEnd) / stride + 1, blocks = (magnitudes + kBlock - 1) / kBlock;
    std::atomic<int64_t> next{0};
    std::vector<std::vector<Worst>> found(static_cast<size_t>(threads), std::vector<Worst>(number(2, 0, 0)));
    const auto work = [&](std::vector<Worst>& worst) {
      const auto block = std::make_unique<Block>();
      for (int64_t b = next++; b < blocks; b = next++)
        for (const bool negative : {false, true}) {
          block->fill(b * kBlock, stride, negative);
          compare(*block, worst);
        }
    };
    std::vector<std::thread> pool;
    for (auto& worst : found) pool.emplace_back([&work, &worst] { work(worst); });
    for (std::thread& thread : pool) thread.join();
    std::vector<Worst> merged = found[0];
    for (const auto& part : found)
      for (size_t n = 0; n < merged.size(); ++n)
        if (worse(part[n], merged[n])) merged[n] = part[n];
    return merged;
  }
};

int errors(int64_t stride, int threads) {
  const Sweep sweep;
  const std::vector<Worst> worst = sweep.run(stride, threads);
  std::printf(
      "{\"dtype\": \"float32\", \"range\": [%g, %g], \"stride\": %lld, \"exhaustive\": %s, \"checked\": %lld, "
      "\"rows\": [",
      -kEnd, kEnd, static_cast<long long>(stride), stride == 1 ? "true" : "false",
      static_cast<long long>(2 * (float_bits(kEnd) / stride + 1)));
  JsonRows rows;
  for (int a = 0; a < 2; ++a)
    for (int f = 0; f < 2; ++f)
      for (size_t c = 0; c < sweep.contestants[a].size(); ++c) {
        const Worst& record = worst[sweep.number(a, f, c)];
        rows.begin("activation", name_of(kActivations[a]).data());
        rows.member("function", name_of(kFunctions[f]));
        rows.member("formulas", sweep.contestants[a][c].formulas);
        rows.member("isa", sweep.contestants[a][c].isa);
        rows.member("largest_error", record.error);
        rows.member("at", double{record.x});
        rows.end();
      }
  std::printf("\n  ]}\n");
  return 0;
}

}  // namespace
}  // namespace fastlane

int main(int argc, char** argv) {
  const auto number = [&](int place) { return place < argc ? std::atoll(argv[place]) : 0; };
  if (argc == 3 && !std::strcmp(argv[1], "throughput") && number(2) > 0)
    return fastlane::throughput(static_cast<int>(number(2)));
  if (argc == 4 && !std::strcmp(argv[1], "errors") && number(2) > 0 && number(3) > 0)
    return fastlane::errors(number(2), static_cast<int>(number(3)));
  std::fprintf(stderr, "usage: gelu_throughput throughput ROUNDS | errors STRIDE THREADS\n");
  return 2;
}
