// A case of the sweep: what it draws, its calls with one thread and with three, and the check of its results.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "operands.h"
#include "record.h"
#include "reference.h"

namespace sweep {

constexpr int kActivations = static_cast<int>(kActivationNames.size());
constexpr int64_t kThreads[] = {1, 3};

// A result of a case, by the number of threads.
struct Result {
  std::string name;
  std::array<Operand, 2> of_run;  // without memory if absent
};

enum class Kind { normal, integers, denormals, one_denormal };
constexpr const char* kKinds[] = {"normal", "integers", "denormals", "one_denormal"};

// The set that computes, or computed, the results.
inline std::string isa_of_results;

// Opens the record, which begins with the name of the set that computes the results. Returns this name.
inline std::string open_record(const std::string& path, bool writes) {
  constexpr size_t kNameBytes = 16;
  char name[kNameBytes] = {};
  record.open(path, writes ? Record::Mode::write : Record::Mode::read);
  if (writes) std::snprintf(name, kNameBytes, "%s", kernels().isa);
  record.pass(name, kNameBytes);
  return {name, strnlen(name, kNameBytes)};
}

struct CachesChoice {
  const char* name;
  Caches caches;
};

struct Case {
  int64_t number;
  Rng rng;
  DType dtype;
  Format format;
  Activation activation;
  Kind kind = Kind::normal;
  Real roundoff;  // the computation's; 0 where integers leave nothing to round
  CachesChoice caches;
  std::string title, text;
  std::vector<Result> results;

  Case(const char* function, int64_t case_number)
      : number(case_number),
        rng(static_cast<uint64_t>(case_number)),
        dtype(static_cast<DType>(case_number % 4)),
        format(format_of(dtype)),
        activation(static_cast<Activation>(case_number / 4 % kActivations)) {
    // The sizes of the caches decide which problems a kernel declines. A record is read on another CPU, so its cases
    // take default sizes in place of the CPU's own.
    const bool recorded = record.writes() || record.reads();
    const CachesChoice choices[] = {
        recorded ? CachesChoice{"default", {}} : CachesChoice{"machine", fastlane::caches()},
        {"tiny", {1 << 10, 4 << 10, 8 << 10}},
        {"huge", {16 << 20, 64 << 20, 1 << 30}}};
    caches = choices[rng.below(3)];
    if (rng.one_in(2)) {
      constexpr Kind special[] = {Kind::integers, Kind::denormals, Kind::one_denormal};
      kind = rng.pick(special);
      if (kind == Kind::integers && activation != Activation::none) kind = Kind::denormals;
    }
    roundoff = kind == Kind::integers ? 0 : format.compute_roundoff;
    text = std::string(function) + " " + format.name + " " + std::string(name_of(activation)) + " " +
           kKinds[static_cast<int>(kind)] + " caches=" + caches.name;
    title = "case " + std::to_string(number) + ", " + function + " " + format.name;
  }

  std::string line() const { return isa_of_results + ": case " + std::to_string(number) + ": " + text; }
  void describe(const char* name, int64_t value) { text += std::string(" ") + name + "=" + std::to_string(value); }

  Operand absent(const char* name) {
    text += std::string(" ") + name + "=absent";
    return {};
  }
  Operand operand(const char* name, int64_t rows, int64_t cols, const Strides& strides) {
    Operand o(dtype, rows, cols, strides, rng);
    text += std::string(" ") + name + "=" + o.text;
    return o;
  }
  Operand input(const char* name, int64_t rows, int64_t cols, const Strides& strides, double scale,
                Kind values = Kind::normal) {
    Operand o = operand(name, rows, cols, strides);
    if (kind == Kind::integers) values = kind;
    o.fill([&](int64_t, int64_t) -> Real {
      switch (values) {
        case Kind::integers: return static_cast<Real>(rng.below(7) - 3);
        case Kind::one_denormal: {
          const Real sign = rng.one_in(2) ? 1 : -1;
          return sign * (1.5 + rng.uniform() / 2) * format.min_normal;
        }
        default: return rng.normal() * scale;
      }
    });
    if (values == Kind::one_denormal && rows > 0 && cols > 0) {
      const bool last = rng.one_in(2);
      const int64_t row = last ? rows - 1 : rng.below(rows), col = last ? cols - 1 : rng.below(cols);
      const auto others = o.values;
      o.values.clear();
      o.fill([&](int64_t i, int64_t j) {
        return i == row && j == col ? format.min_normal / 2 : others[static_cast<size_t>(i * cols + j)];
      });
    }
    return o;
  }
};

// The case in which a sanitizer may stop the program, and the largest error of the cases before.
inline const Case* running = nullptr;
struct LargestError {
  Real error = 0;  // in units of the tolerance
  std::string where;
};
inline LargestError largest;
inline int64_t declined = 0;

[[noreturn]] inline void fail(const Case& c, const std::string& what) {
  std::printf("%s: %s\n", c.line().c_str(), what.c_str());
  std::exit(1);
}

inline std::string place(const std::string& name, int64_t row, int64_t col) {
  return name + "[" + std::to_string(row) + "," + std::to_string(col) + "]";
}

// A result, once for each number of threads. Leading dimension and alignment may differ, the bits must not.
class Output {
 public:
  Output(Case& c, const char* name, int64_t rows, int64_t cols, bool present) : case_(c), name_(name) {
    for (Operand& o : operands_)
      o = present ? c.operand(name, rows, cols, layout(c.rng.below(2), rows, cols, c.rng)) : c.absent(name);
    c.results.push_back({name, {operands_[0], operands_[1]}});
  }

  const Operand& of_run(size_t run) const { return operands_[run]; }
  bool present() const { return operands_[0].memory != nullptr; }

  void check(const Approx& expected) const {
    if (!present()) return;
    const Operand& o = operands_[0];
    for (int64_t i = 0; i < o.rows; ++i)
      for (int64_t j = 0; j < o.cols; ++j) {
        const auto element = static_cast<size_t>(i * o.cols + j);
        check_element(i, j, expected.value[element], expected.error[element]);
      }
  }

 private:
  void check_element(int64_t row, int64_t col, Real expected, Real tolerance) const {
    const Real got = operands_[0].read(row, col);
    const Real rounding = case_.format.roundoff * std::fabs(expected) + case_.format.min_denormal / 2;
    const Real error = std::fabs(got - expected) - rounding;
    if (!(error <= tolerance)) {
      char numbers[160];
      std::snprintf(numbers, sizeof numbers, ": got %.9Lg, expected %.9Lg, off by %.3Lg, tolerance %.3Lg", got,
                    expected, std::fabs(got - expected), tolerance + rounding);
      fail(case_, place(name_, row, col) + numbers);
    }
    if (error > largest.error * tolerance) largest = {error / tolerance, case_.title + ", " + name_};
  }

  const Case& case_;
  std::string name_;
  Operand operands_[2];
};

// Each thread takes every third task, the last tasks first. The caller is one of the three threads, as in torch's
// pool.
inline void run_on_three(int64_t tasks, Parallel::Body body, void* context) {
  const auto share = [=](int64_t thread) {
    for (int64_t task = tasks - 1 - thread; task >= 0; task -= 3) body(context, task, task + 1);
  };
  std::thread second(share, 1), third(share, 2);
  share(0);
  second.join();
  third.join();
}

// Fails if a kernel that declined wrote anything, if another kernel wrote beyond its elements, or if the bits of one
// thread and of three differ. No expected values are needed.
inline void check_writes(const Case& c, bool did_nothing) {
  for (const Result& result : c.results) {
    const auto& [first, second] = result.of_run;
    if (first.memory == nullptr) continue;
    for (const Operand& o : result.of_run) {
      const Memory& m = *o.memory;
      if (did_nothing && std::any_of(m.begin(), m.end(), [](char byte) { return byte != '\xff'; }))
        fail(c, result.name + ": written by a kernel that says it did nothing");
      if (!o.gaps_untouched()) fail(c, result.name + ": written outside of its elements");
    }
    for (int64_t i = 0; i < first.rows; ++i)
      for (int64_t j = 0; j < first.cols; ++j)
        if (std::memcmp(first.at(i, j), second.at(i, j), static_cast<size_t>(c.format.size)) != 0)
          fail(c, place(result.name, i, j) + ": other bits with 3 threads than with 1");
  }
}

// Calls the kernel with one thread and with three; the call returns false if the kernel declines. Each call has its
// own thread, whose work memory starts empty and ends where this call's need ends. Returns whether to compare the
// results with expected values.
template <class Call>
bool run_twice(const Case& c, Call call) {
  bool done[2] = {true, true};
  if (!record.reads()) {
    running = &c;
    for (size_t run = 0; run < 2; ++run) {
      Parallel parallel;
      parallel.threads = kThreads[run];
      parallel.run = run_on_three;
      parallel.caches = c.caches.caches;
      std::thread([&] { done[run] = call(run, parallel); }).join();
    }
    running = nullptr;
    if (done[0] != done[1]) fail(c, "one number of threads was declined, the other was not");
    check_writes(c, !done[0]);
  }
  if (record.reads() || record.writes()) {
    char ran = done[0] ? 1 : 0;
    record.pass_label(c.text);
    record.pass(&ran, 1);
    done[0] = ran != 0;
    for (const Result& result : c.results) {
      const Operand& o = result.of_run[0];
      for (int64_t i = 0; done[0] && o.memory != nullptr && i < o.rows; ++i)
        for (int64_t j = 0; j < o.cols; ++j) record.pass(o.at(i, j), static_cast<size_t>(c.format.size));
    }
  }
  declined += !done[0];
  return done[0] && !record.writes();
}

}  // namespace sweep
