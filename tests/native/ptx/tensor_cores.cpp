// Products of matrices. Four warps do a wgmma, with operands in shared memory; one warp does an mma, with operands in
// its registers.
#include <cmath>

#include "instructions.h"

namespace ptx {
namespace {

constexpr uint32_t kGroup = 128, kRows = 64, kBytesAlongK = 32;

// b: bf16, h: f16, t: TF32
template <char type>
constexpr uint32_t kElement = type == 't' ? 4 : 2;

template <char type>
double element(const void* place) {
  if constexpr (type == 't') {
    uint32_t stored;
    std::memcpy(&stored, place, sizeof stored);
    stored &= 0xffffe000u;  // the other bits are not read
    float value;
    std::memcpy(&value, &stored, sizeof value);
    return value;
  } else {
    uint16_t stored;
    std::memcpy(&stored, place, sizeof stored);
    return type == 'b' ? from_bf16(stored) : from_f16(stored);
  }
}

// An operand by its descriptor. The layouts in bytes, with rows of W = 16 · 2^swizzle bytes:
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
    // Without a base offset the swizzle counts rows from a multiple of eight rows.
    const uint32_t row = 16u << swizzle_bits;
    if (start % (8 * row) / row != 0) throw std::runtime_error("wgmma: an operand off the swizzle's pattern");
  }

  uint32_t offset(uint32_t mn, uint32_t k) const {
    const uint32_t row = 16u << swizzle_bits, in_row = row / element_bytes;
    const uint32_t at = along_k ? mn % 8 * row + mn / 8 * stride + k * element_bytes
                                : mn % in_row * element_bytes + mn / in_row * leading + k % 8 * row + k / 8 * stride;
    return swizzled(start + at, swizzle_bits);
  }

  template <char type>
  std::vector<double> values(Machine& m, const Block& block, uint32_t count) const {
    std::vector<double> all;
    const uint32_t base = (block.rank + 1) << kOffsetBits;
    for (uint32_t mn = 0; mn < count; ++mn)
      for (uint32_t k = 0; k < kBytesAlongK / element_bytes; ++k)
        all.push_back(element<type>(m.shared_to_read_async(base + offset(mn, k), element_bytes)));
    return all;
  }
};

// Operands: D, the descriptors of A and B, whether D is added to, the signs of A and B and, for 16 bits, whether A
// and B lie along m and n.
template <uint32_t columns, char type>
bool multiply_by_warpgroup(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t first = t.index / kGroup * kGroup;
  if (!m.gathered(t, first, kGroup)) return false;
  const auto& o = i.operands;
  constexpr uint32_t kDeep = kBytesAlongK / kElement<type>;
  if (o[4].value != 1 || o[5].value != 1) throw std::runtime_error("wgmma: a negated operand");
  const auto is_set = [&](size_t n) { return n < o.size() && o[n].value != 0; };
  const Matrix a(bits(m, t, o[1]), kElement<type>, !is_set(6)), b(bits(m, t, o[2]), kElement<type>, !is_set(7));
  const bool adds = bits(m, t, o[3]) & 1;
  Block& block = *t.block;
  for (uint32_t n = first; n < first + kGroup; ++n)
    for (const size_t same : {1, 2, 3})
      if (bits(m, block.threads[n], o[same]) != bits(m, t, o[same]))
        throw std::runtime_error("wgmma: operands differ between threads");
  const auto run = [&m, &block, &o, first, a, b, adds] {
    const std::vector<double> of_a = a.values<type>(m, block, kRows), of_b = b.values<type>(m, block, columns);
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
  // The products run in order: later products add to the same D.
  Pending& products = block.products[first / kGroup];
  if (products.empty() && m.coin()) {
    run();
  } else {
    products.open.push_back(begun_at(i, run));
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

// mma.m16n8k16 and, for 4 bytes, m16n8k8. With lane = 4 g + l: register r of A is row g + 8 (r % 2), register r of B
// column g, and both hold 4 bytes along k from 4 l + 16 (r / 2), of B 4 l + 16 r; register r of C and D is row g + 8
// (r / 2), column 2 l + r % 2. Sums are rounded toward zero, as tensor cores are said to do, since narrow stacks
// round at every layer. wgmma's sums, which go through one epilogue, are rounded to nearest.
template <char type>
bool multiply_by_warp(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t first = t.index - t.lane();
  if (!m.gathered(t, first, 32)) return false;
  constexpr uint32_t kPerRegister = 4 / kElement<type>, kDeep = 8 * kPerRegister;
  const auto& o = i.operands;
  double a[16][kDeep], b[8][kDeep];
  const auto spread = [&](double* row, uint32_t registers, uint32_t from) {
    for (uint32_t e = 0; e < kPerRegister; ++e)
      row[from + e] = element<type>(reinterpret_cast<const char*>(&registers) + e * kElement<type>);
  };
  Thread* const lanes = t.block->threads.data() + first;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, k = lane % 4 * kPerRegister;
    for (uint32_t r = 0; r < 4; ++r)
      spread(a[g + r % 2 * 8], read<uint32_t>(m, lanes[lane], o[1].parts[r]), k + r / 2 * 4 * kPerRegister);
    for (uint32_t r = 0; r < 2; ++r)
      spread(b[g], read<uint32_t>(m, lanes[lane], o[2].parts[r]), k + r * 4 * kPerRegister);
  }
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t r = 0; r < 4; ++r) {
      const uint32_t row = lane / 4 + r / 2 * 8, col = lane % 4 * 2 + r % 2;
      double sum = read<float>(m, lanes[lane], o[3].parts[r]);
      for (uint32_t k = 0; k < kDeep; ++k) sum += a[row][k] * b[col][k];
      float rounded = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
      write<float>(lanes[lane], o[0].parts[r], rounded);
    }
  return true;
}

}  // namespace

void add_tensor_cores(Table& table) {
  const auto name = [](const char* shape, const char* type) {
    return std::string("wgmma.mma_async.sync.aligned.") + shape + ".f32." + type + "." + type;
  };
  table[name("m64n128k16", "bf16")] = multiply_by_warpgroup<128, 'b'>;
  table[name("m64n192k16", "bf16")] = multiply_by_warpgroup<192, 'b'>;
  table[name("m64n256k16", "bf16")] = multiply_by_warpgroup<256, 'b'>;
  table[name("m64n128k16", "f16")] = multiply_by_warpgroup<128, 'h'>;
  table[name("m64n192k16", "f16")] = multiply_by_warpgroup<192, 'h'>;
  table[name("m64n256k16", "f16")] = multiply_by_warpgroup<256, 'h'>;
  table[name("m64n128k8", "tf32")] = multiply_by_warpgroup<128, 't'>;
  table[name("m64n256k8", "tf32")] = multiply_by_warpgroup<256, 't'>;
  table["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = multiply_by_warp<'b'>;
  table["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = multiply_by_warp<'h'>;
  table["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = multiply_by_warp<'t'>;
  table["wgmma.fence.sync.aligned"] = [](Machine&, Thread&, const Instruction&) { return true; };
  table["wgmma.commit_group.sync.aligned"] = commit;
  table["wgmma.wait_group.sync.aligned"] = wait;
}

}  // namespace ptx
