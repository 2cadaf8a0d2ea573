// A record of results. An emulated CPU writes one, because to compute the expected values in its emulated long double
// would take hours; another CPU reads the record in place of calls of its own, and checks the results.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

namespace sweep {

class Record {
 public:
  enum class Mode { none, write, read };

  Record() = default;
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;
  ~Record() {
    if (file_ != nullptr) std::fclose(file_);
  }

  void open(const std::string& path, Mode mode) {
    mode_ = mode;
    file_ = std::fopen(path.c_str(), mode == Mode::write ? "wb" : "rb");
    if (file_ == nullptr) throw std::runtime_error("cannot open the record " + path);
  }
  bool writes() const { return mode_ == Mode::write; }
  bool reads() const { return mode_ == Mode::read; }

  // Writes these bytes, or overwrites them with the record's.
  void pass(void* bytes, size_t count) {
    const size_t done = writes() ? std::fwrite(bytes, 1, count, file_) : std::fread(bytes, 1, count, file_);
    if (done != count)
      throw std::runtime_error(writes() ? "the record cannot be written" : "the record is too short");
  }
  // Writes this text, or throws if the record has another text here.
  void pass_label(const std::string& text) {
    std::string recorded = text;
    pass(recorded.data(), recorded.size());
    if (recorded != text) throw std::runtime_error("the record has another case in place of: " + text);
  }
  // Throws unless a record that is read was read to its end, and one that is written is complete.
  void close() {
    if (file_ == nullptr) return;
    const bool whole = writes() ? std::fflush(file_) == 0 : std::fgetc(file_) == EOF;
    if (!whole) throw std::runtime_error(writes() ? "the record cannot be written" : "the record is too long");
  }

 private:
  Mode mode_ = Mode::none;
  std::FILE* file_ = nullptr;
};

inline Record record;

}  // namespace sweep
