#include "program.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>

#include "instructions.h"

namespace ptx {
namespace {

bool is_of_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::string("_$%.:").find(c) < 5; }

class Parser {
 public:
  explicit Parser(std::string text) : text_(std::move(text)) {
    for (size_t i = 0; (i = text_.find("//", i)) != std::string::npos;)
      while (text_[i] != '\n' && text_[i] != '\0') text_[i++] = ' ';
  }

  std::map<std::string, Kernel> run() {
    std::map<std::string, Kernel> kernels;
    for (size_t at = 0; (at = text_.find(".entry", at)) != std::string::npos; at = position_) {
      position_ = at + 6;
      Kernel kernel;
      const std::string kernel_name = name();
      parameter_ = kernel_name + "_param_";
      shared_.clear();
      read_parameters(kernel);
      position_ = text_.find('{', position_) + 1;
      read_body(kernel);
      const auto leaves = [&](const Instruction& i) { return i.branches && i.target >= kernel.code.size(); };
      if (kernel.code.empty() || !ends(kernel.code.back()) ||
          std::any_of(kernel.code.begin(), kernel.code.end(), leaves))
        fail("the kernel does not end with ret or a branch");
      kernels[kernel_name] = std::move(kernel);
    }
    return kernels;
  }

 private:
  struct Scope {
    std::map<std::string, uint32_t> registers, labels;
    std::vector<std::pair<uint32_t, std::string>> branches;
  };

  [[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error("PTX, line " + std::to_string(line()) + ": " + what);
  }

  int line() {
    while (counted_ < position_) line_ += text_[counted_++] == '\n';
    return line_;
  }

  char next() {
    while (std::isspace(static_cast<unsigned char>(text_[position_]))) ++position_;
    return text_[position_];
  }
  bool take(char c) {
    if (next() != c) return false;
    ++position_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(std::string("expected ") + c + " before " + text_.substr(position_, 40));
  }
  std::string name() {
    next();
    const size_t start = position_;
    while (is_of_name(text_[position_])) ++position_;
    if (position_ == start) fail("cannot read " + text_.substr(position_, 40));
    return text_.substr(start, position_ - start);
  }
  std::string signed_number() {
    const std::string sign = take('-') ? "-" : "";
    return sign + name();
  }
  uint64_t bits_of_number(const std::string& text) {
    const bool of_float = text.rfind("0f", 0) == 0 || text.rfind("0d", 0) == 0;
    const std::string digits = of_float ? text.substr(2) : text.substr(text[0] == '-');
    char* end = nullptr;
    errno = 0;
    const uint64_t size = std::strtoull(digits.c_str(), &end, of_float ? 16 : 0);
    if (digits.empty() || *end != '\0' || errno != 0) fail("not a number: " + text);
    return text[0] == '-' ? 0 - size : size;
  }

  static bool ends(const Instruction& i) { return i.guard < 0 && (i.branches || i.opcode == "ret"); }

  // (.param TYPE NAME, .param .align BYTES .b8 NAME[BYTES], …)
  void read_parameters(Kernel& kernel) {
    if (!take('(') || take(')')) return;
    do {
      uint32_t bytes = 0;
      std::string word = name();
      for (; word[0] == '.'; word = name()) {
        if (word == ".align") {
          name();
        } else if (bytes == 0 && word != ".param") {
          bytes = static_cast<uint32_t>(bits_of_number(word.substr(2))) / 8;
        }
      }
      if (word != parameter_ + std::to_string(kernel.parameter_bytes.size())) fail("unknown parameter " + word);
      if (take('[')) {
        bytes *= static_cast<uint32_t>(bits_of_number(name()));
        expect(']');
      }
      kernel.parameter_bytes.push_back(bytes);
    } while (take(','));
    expect(')');
  }

  // The number of a register, or −1. Inline assembly declares its own in braces.
  int find(const std::string& register_name) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto found = scopes_[i].registers.find(register_name);
      if (found != scopes_[i].registers.end()) return static_cast<int>(found->second);
    }
    return -1;
  }

  void read_body(Kernel& kernel) {
    kernel_ = &kernel;
    scopes_.assign(1, {});
    while (!scopes_.empty()) {
      if (take('{')) {
        scopes_.emplace_back();
      } else if (take('}')) {
        close_scope();
      } else if (next() == '.') {
        read_directive();
      } else if (!take(';')) {
        read_statement();
      }
    }
  }

  // A branch looks for its label in its own scope, then further out.
  void close_scope() {
    const Scope scope = std::move(scopes_.back());
    scopes_.pop_back();
    for (const auto& [index, label] : scope.branches) {
      const auto found = scope.labels.find(label);
      if (found != scope.labels.end()) {
        kernel_->code[index].target = found->second;
      } else if (scopes_.empty()) {
        fail("no label " + label);
      } else {
        scopes_.back().branches.emplace_back(index, label);
      }
    }
  }

  void read_directive() {
    const std::string what = name();
    if (what == ".pragma") {
      position_ = text_.find(';', position_);
    } else if (what == ".reg") {
      name();  // the type
      do read_declared(name());
      while (take(','));
    } else if (what == ".shared") {
      read_shared();
    } else {
      fail("unknown directive " + what);
    }
    expect(';');
  }

  void read_declared(const std::string& register_name) {
    std::map<std::string, uint32_t>& registers = scopes_.back().registers;
    if (!take('<')) {
      registers[register_name] = kernel_->registers++;
      return;
    }
    const uint64_t count = bits_of_number(name());
    for (uint64_t i = 0; i < count; ++i) registers[register_name + std::to_string(i)] = kernel_->registers++;
    expect('>');
  }

  // .align BYTES .b8 name[BYTES]
  void read_shared() {
    name();
    const auto alignment = static_cast<uint32_t>(bits_of_number(name()));
    name();
    kernel_->shared_bytes = (kernel_->shared_bytes + alignment - 1) / alignment * alignment;
    shared_[name()] = kernel_->shared_bytes;
    expect('[');
    kernel_->shared_bytes += static_cast<uint32_t>(bits_of_number(name()));
    expect(']');
  }

  void read_statement() {
    Instruction instruction;
    if (take('@')) {
      instruction.guard_negated = take('!');
      instruction.guard = find(name());
      if (instruction.guard < 0) fail("unknown guard");
    }
    std::string word = name();
    if (word.back() == ':') {
      word.pop_back();
      scopes_.back().labels[word] = static_cast<uint32_t>(kernel_->code.size());
      return;
    }
    instruction.line = line();
    instruction.opcode = word;
    instruction.branches = word == "bra" || word == "bra.uni";
    if (instruction.branches) {
      scopes_.back().branches.emplace_back(kernel_->code.size(), name());
    } else {
      instruction.execute = handler_of(word);
      if (!instruction.execute) fail("unknown opcode " + word);
      while (next() != ';') {
        instruction.operands.push_back(read_operand());
        if (!take(',') && !take('|')) break;
      }
    }
    expect(';');
    kernel_->code.push_back(std::move(instruction));
  }

  Operand read_operand() {
    using Kind = Operand::Kind;
    Operand result;
    if (take('{')) {
      result.kind = Kind::vector;
      do result.parts.push_back(read_operand());
      while (take(','));
      expect('}');
      return result;
    }
    if (take('[')) {
      result.kind = Kind::address;
      result.parts.push_back(read_operand());
      if (take('+')) result.value = bits_of_number(signed_number());
      if (take(',')) result.parts.push_back(read_operand());
      expect(']');
      return result;
    }
    if (next() == '-' || std::isdigit(static_cast<unsigned char>(next()))) {
      result.kind = Kind::immediate;
      result.value = bits_of_number(signed_number());
      return result;
    }
    const std::string word = name();
    if (word == "_") return result;
    const int number = find(word);
    if (number >= 0) {
      result.kind = Kind::reg;
      result.value = static_cast<uint64_t>(number);
    } else if (word.rfind(parameter_, 0) == 0) {
      result.kind = Kind::parameter;
      result.value = bits_of_number(word.substr(parameter_.size()));
      if (result.value >= kernel_->parameter_bytes.size()) fail("unknown parameter " + word);
    } else if (word[0] == '%') {
      result.kind = Kind::special;
      result.name = word;
    } else {
      // A symbol of shared memory is declared in the kernel, or for all kernels without a size, which the launch
      // gives.
      const auto found = shared_.find(word);
      if (found == shared_.end() && text_.find(word + "[]") == std::string::npos) fail("unknown name " + word);
      result.kind = Kind::shared_symbol;
      result.value = found != shared_.end() ? found->second : dynamic_shared_offset(*kernel_);
    }
    return result;
  }

  std::string text_, parameter_;
  std::map<std::string, uint32_t> shared_;
  size_t position_ = 0, counted_ = 0;
  int line_ = 1;
  Kernel* kernel_ = nullptr;
  std::vector<Scope> scopes_;
};

}  // namespace

uint32_t dynamic_shared_offset(const Kernel& kernel) { return (kernel.shared_bytes + 15) / 16 * 16; }

std::map<std::string, Kernel> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
