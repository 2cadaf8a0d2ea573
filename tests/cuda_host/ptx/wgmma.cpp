// D += A B by the four warps of a warpgroup, of operands in shared memory.
#include "instructions.h"

namespace ptx {
namespace {

constexpr uint32_t kGroup = 128, kRows = 64, kBytesAlongK = 32;

float element(const uint8_t* place, char type) {
  if (type == 't') {  // TF32: the last 13 bits are not read
    uint32_t stored;
    std::memcpy(&stored, place, sizeof stored);
    stored &= 0xffffe000u;
    float value;
    std::memcpy(&value, &stored, sizeof value);
    return value;
  }
  uint16_t stored;
  std::memcpy(&stored, place, sizeof stored);
  return type == 'b' ? from_bf16(stored) : from_f16(stored);
}

// An operand by its descriptor. The layouts in bytes, with rows of W = 16 · 2^swizzle bytes, T of them 16 bytes:
// along k (8 rows of W, then SBO) × (32 bytes), along mn (W, then LBO) × (8 rows of W, then SBO).
struct Matrix {
  uint32_t start, leading, stride, element_bytes;
  int swizzle_bits;
  bool along_k;

  Matrix(uint64_t descriptor, uint32_t element_bytes, bool along_k)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        element_bytes(element_bytes),
        swizzle_bits(4 - static_cast<int>(descriptor >> 62)),
        along_k(along_k) {
    if (swizzle_bits == 4) throw std::runtime_error("wgmma: a layout without swizzle");
    if (descriptor >> 49 & 7) throw std::runtime_error("wgmma: a base offset");
  }

  uint32_t offset(uint32_t mn, uint32_t k) const {
    const uint32_t row = 16u << swizzle_bits, in_row = row / element_bytes;
    const uint32_t at = along_k ? mn % 8 * row + mn / 8 * stride + k * element_bytes
                                : mn % in_row * element_bytes + mn / in_row * leading + k % 8 * row + k / 8 * stride;
    return swizzled(start + at, swizzle_bits);
  }

  std::vector<double> values(Machine& m, const Block& block, uint32_t count, char type) const {
    std::vector<double> all;
    const uint32_t base = (block.rank + 1) << kOffsetBits;
    for (uint32_t mn = 0; mn < count; ++mn)
      for (uint32_t k = 0; k < kBytesAlongK / element_bytes; ++k)
        all.push_back(element(m.shared(base + offset(mn, k), element_bytes), type));
    return all;
  }
};

// Operands: D, the descriptors of A and B, whether D is added to, the signs of A and B and, of 16 bits, whether they
// lie along m and n.
template <uint32_t columns, char type>
bool multiply(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t first = t.index / kGroup * kGroup;
  if (!m.gathered(t, first, kGroup)) return false;
  const auto& o = i.operands;
  constexpr uint32_t kElement = type == 't' ? 4 : 2, kDeep = kBytesAlongK / kElement;
  if (o[4].value != 1 || o[5].value != 1) throw std::runtime_error("wgmma: a negated operand");
  const auto is_set = [&](size_t n) { return n < o.size() && o[n].value != 0; };
  const Matrix a(bits(m, t, o[1]), kElement, !is_set(6)), b(bits(m, t, o[2]), kElement, !is_set(7));
  const bool adds = bits(m, t, o[3]) & 1;
  Block& block = *t.block;
  const auto run = [&m, &block, &o, first, a, b, adds] {
    const std::vector<double> of_a = a.values(m, block, kRows, type), of_b = b.values(m, block, columns, type);
    for (uint32_t n = 0; n < kGroup; ++n) {
      Thread& each = block.threads[first + n];
      for (uint32_t j = 0; j < columns / 2; ++j) {
        const uint32_t row = n / 32 * 16 + n % 32 / 4 + j / 2 % 2 * 8, col = j / 4 * 8 + n % 4 * 2 + j % 2;
        double sum = adds ? read<float>(m, each, o[0].parts[j]) : 0.0;
        for (uint32_t k = 0; k < kDeep; ++k) sum += of_a[row * kDeep + k] * of_b[col * kDeep + k];
        write<float>(each, o[0].parts[j], static_cast<float>(sum));
      }
    }
  };
  // In order: later products add to the same D.
  Pending& products = block.products[first / kGroup];
  if (products.empty() && m.coin()) {
    run();
  } else {
    products.open.push_back(run);
  }
  return true;
}

bool commit(Machine& m, Thread& t, const Instruction&) {
  const uint32_t group = t.index / kGroup;
  if (!m.gathered(t, group * kGroup, kGroup)) return false;
  t.block->products[group].commit();
  return true;
}

bool wait(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t group = t.index / kGroup;
  if (!m.gathered(t, group * kGroup, kGroup)) return false;
  t.block->products[group].wait(i.operands[0].value);
  return true;
}

}  // namespace

void add_wgmma(Table& table) {
  const auto name = [](const char* shape, const char* type) {
    return std::string("wgmma.mma_async.sync.aligned.") + shape + ".f32." + type + "." + type;
  };
  table[name("m64n128k16", "bf16")] = multiply<128, 'b'>;
  table[name("m64n256k16", "bf16")] = multiply<256, 'b'>;
  table[name("m64n128k16", "f16")] = multiply<128, 'h'>;
  table[name("m64n256k16", "f16")] = multiply<256, 'h'>;
  table[name("m64n128k8", "tf32")] = multiply<128, 't'>;
  table[name("m64n256k8", "tf32")] = multiply<256, 't'>;
  table["wgmma.fence.sync.aligned"] = [](Machine&, Thread&, const Instruction&) { return true; };
  table["wgmma.commit_group.sync.aligned"] = commit;
  table["wgmma.wait_group.sync.aligned"] = wait;
}

}  // namespace ptx
