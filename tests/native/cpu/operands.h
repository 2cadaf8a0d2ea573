// Operands as the kernels may meet them, with any strides and any alignment. Each has memory of its own that ends
// where its last element ends, so that an access one element beyond is seen.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/half.h"
#include "kernels/problem.h"

namespace sweep {

using namespace fastlane;
using Real = long double;

class Rng {
 public:
  explicit Rng(uint64_t seed) : engine_(seed) {}

  int64_t below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }
  // Both are computed in double, as the scales of operands are, so that every CPU draws the same numbers. uniform()
  // is in [−1, 1).
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-52 - 1; }
  // Nearly normal, of variance 1 and never beyond 3.5: no case overflows by chance.
  double normal() {
    const uint64_t a = engine_(), b = engine_();
    const uint64_t sum = (a >> 32) + (a & 0xffffffff) + (b >> 32) + (b & 0xffffffff);
    return (static_cast<double>(sum) * 0x1p-31 - 4) * 0.86602540378443865;  // √0.75
  }
  template <class T, size_t N>
  T pick(const T (&choices)[N]) {
    return choices[below(N)];
  }

 private:
  std::mt19937_64 engine_;
};

struct Format {
  const char* name;
  int64_t size;
  Real roundoff;
  Real compute_roundoff;  // the roundoff of the type of the computation
  Real gelu_error;  // relative to z; formats that round more have shorter polynomials
  Real min_normal, min_denormal;
};

inline Format format_of(DType dtype) {
  const auto power = [](int n) { return std::ldexp(Real{1}, n); };
  switch (dtype) {
    case DType::f32: return {"f32", 4, power(-24), power(-24), power(-21), power(-126), power(-149)};
    case DType::f64: return {"f64", 8, power(-53), power(-53), power(-50), power(-1022), power(-1074)};
    case DType::bf16: return {"bf16", 2, power(-8), power(-24), power(-16), power(-126), power(-133)};
    case DType::f16: break;
  }
  return {"f16", 2, power(-11), power(-24), power(-16), power(-14), power(-24)};
}

template <class T>
T read_as(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline Real read(const char* p, DType dtype) {
  switch (dtype) {
    case DType::f32: return read_as<float>(p);
    case DType::f64: return read_as<double>(p);
    case DType::bf16: return to_float(read_as<BFloat16>(p));
    case DType::f16: break;
  }
  return to_float(read_as<Half>(p));
}

inline void write(char* p, DType dtype, Real value) {
  const auto single = static_cast<float>(value);
  const auto as_double = static_cast<double>(value);
  const BFloat16 bf16 = to_bfloat16(single);
  const Half f16 = to_half(single);
  switch (dtype) {
    case DType::f32: std::memcpy(p, &single, sizeof single); break;
    case DType::f64: std::memcpy(p, &as_double, sizeof as_double); break;
    case DType::bf16: std::memcpy(p, &bf16, sizeof bf16); break;
    case DType::f16: std::memcpy(p, &f16, sizeof f16); break;
  }
}

// Where the bytes lie: on the heap, aligned or not, before AddressSanitizer's red zone, or at the end of a page
// before an unmapped page. The unmapped page also stops accesses by intrinsics that the sanitizer cannot see.
enum class Placement { heap, shifted, guarded };

// All bits are one at first, so that an element that nobody wrote is NaN in every format.
class Memory {
 public:
  Memory(int64_t bytes, int64_t shift, Placement placement) : bytes_(static_cast<size_t>(bytes)) {
    if (placement == Placement::guarded) {
      const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t used = (bytes_ + page - 1) / page * page;
      mapped_ = used + page;
      void* const base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base == MAP_FAILED) throw std::bad_alloc();
      base_ = static_cast<char*>(base);
      mprotect(base_ + used, page, PROT_NONE);
      size_ = used;
    } else {
      size_ = bytes_ + (placement == Placement::shifted ? static_cast<size_t>(shift) : 0);
      base_ = new char[size_];
    }
    std::memset(base_, 0xff, size_);
  }
  ~Memory() {
    if (mapped_ != 0) {
      munmap(base_, mapped_);
    } else {
      delete[] base_;
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return base_ + (size_ - bytes_); }
  // What lies before data(), and then data itself.
  const char* begin() const { return base_; }
  const char* end() const { return base_ + size_; }

 private:
  size_t bytes_, size_ = 0, mapped_ = 0;
  char* base_ = nullptr;
};

struct Strides {
  const char* name;
  int64_t row, col;
};

constexpr int64_t kPaddings[] = {1, 3, 8, 150};
constexpr int kLayouts = 13;

// The i-th of kLayouts layouts.
inline Strides layout(int64_t i, int64_t rows, int64_t cols, Rng& rng) {
  const int64_t pad = rng.pick(kPaddings);
  const Strides layouts[kLayouts] = {
      {"rows", cols, 1},
      {"padded_rows", cols + pad, 1},
      {"columns", 1, rows},
      {"padded_columns", 1, rows + pad},
      {"stepped_rows", 3 * cols + 2 * pad + (cols + 1) % 2, 3},
      {"stepped_columns", 3, 3 * rows + 2 * pad + (rows + 1) % 2},
      {"same_row", 0, 1},
      {"same_column", 1, 0},
      {"scalar", 0, 0},
      {"overlapping", 1, 1},
      {"reversed_rows", -(cols + pad), 1},
      {"reversed_columns", cols, -1},
      {"reversed", -1, -rows},
  };
  return layouts[i];
}

// What the kernels accept where rows must have a unit column stride.
inline Strides row_layout(int64_t rows, int64_t cols, Rng& rng) {
  constexpr int64_t choices[] = {0, 0, 1, 1, 6, 9, 10};
  return layout(rng.pick(choices), rows, cols, rng);
}

struct Operand {
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  Strides strides{"absent", 0, 0};
  std::shared_ptr<Memory> memory;
  char* data = nullptr;  // null if absent, and for some empty operands
  std::string text;
  std::vector<Real> values;  // of inputs, row by row

  Operand() = default;
  Operand(DType type, int64_t row_count, int64_t col_count, const Strides& s, Rng& rng)
      : dtype(type), rows(row_count), cols(col_count), strides(s) {
    constexpr Placement placements[] = {Placement::heap, Placement::shifted, Placement::guarded};
    constexpr const char* names[] = {"heap", "shifted", "guarded"};
    const int64_t size = format_of(dtype).size, choice = rng.below(3);
    const bool empty = rows == 0 || cols == 0;
    const int64_t row_span = empty ? 0 : (rows - 1) * strides.row, col_span = empty ? 0 : (cols - 1) * strides.col;
    const int64_t elements = empty ? 0 : std::abs(row_span) + std::abs(col_span) + 1;
    memory = std::make_shared<Memory>(elements * size, (1 + rng.below(9)) * size, placements[choice]);
    text = std::string(strides.name) + "(" + std::to_string(strides.row) + "," + std::to_string(strides.col) + ")/" +
           names[choice];
    data = memory->data() - (std::min<int64_t>(0, row_span) + std::min<int64_t>(0, col_span)) * size;
    // torch gives empty tensors null pointers too, and has no negative strides.
    if (empty && strides.row >= 0 && strides.col >= 0 && rng.one_in(2)) data = nullptr;
  }

  char* at(int64_t row, int64_t col) const {
    return data + (row * strides.row + col * strides.col) * format_of(dtype).size;
  }
  Real read(int64_t row, int64_t col) const { return sweep::read(at(row, col), dtype); }

  ConstMatrix matrix() const { return {data, strides.row, strides.col}; }
  ConstRowMajor row_major() const { return {data, strides.row}; }
  RowMajor mutable_row_major() const { return {data, strides.row}; }

  // value(row, col) is called in order. If elements share memory, the last one stays.
  template <class Value>
  void fill(Value value) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) write(at(i, j), dtype, value(i, j));
    read_values();
  }
  void set(int64_t row, int64_t col, Real value) {
    write(at(row, col), dtype, value);
    read_values();
  }
  void read_values() {
    values.clear();
    values.reserve(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) values.push_back(read(i, j));
  }

  // Whether everything but the elements is as Memory left it. The operand's rows must have unit column stride.
  bool gaps_untouched() const {
    if (memory == nullptr) return true;
    const int64_t size = format_of(dtype).size;
    const char* p = memory->begin();
    const auto ones_until = [&](const char* end) {
      for (; p < end; ++p)
        if (*p != '\xff') return false;
      return true;
    };
    for (int64_t i = 0; i < rows && cols > 0; ++i) {
      if (!ones_until(at(i, 0))) return false;
      p += cols * size;
    }
    return ones_until(memory->end());
  }
};

}  // namespace sweep
