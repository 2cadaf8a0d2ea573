#include "ops/packed_weight.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/dispatch.h"
#include "ops/checks/checks.h"
#include "ops/frozen.h"
#include "ops/own_calls.h"
#include "ops/path.h"

namespace fastlane {
namespace {

struct Header {
  std::array<char, 8> magic;
  uint32_t version;
  uint8_t dtype;
  uint8_t has_panels;
  uint8_t ran_along_k, ran_along_n;  // of the weight: k runs over the inputs, n over the outputs
  std::array<char, 16> kernels;
  int64_t out_features, in_features;
  int64_t bytes;  // after the header
  int64_t unused;
};
constexpr int64_t kHeaderBytes = 64;
static_assert(sizeof(Header) == kHeaderBytes);
constexpr std::array<char, 8> kMagic{'f', 'a', 's', 't', 'l', 'a', 'n', 'e'};
constexpr uint32_t kVersion = 1;

constexpr std::array kScalarTypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};  // in the order of DType

// The set whose code multiplies this dtype: avx512_bf16 has its own products for bf16 alone.
std::string set_of(DType dtype) {
  if (torch_runs_on_cpu()) return kNoIsa;
  const std::string isa = kernels().isa;
  return isa == "avx512_bf16" && dtype != DType::bf16 ? "avx512" : isa;
}

const char* payload(const at::Tensor& packed) {
  return static_cast<const char*>(packed.const_data_ptr()) + kHeaderBytes;
}

at::Tensor with_header(const Header& header) {
  const int64_t rows = header.out_features, row_bytes = (kHeaderBytes + header.bytes + rows - 1) / rows;
  at::Tensor packed = at::zeros({rows, row_bytes}, at::kByte);
  std::memcpy(packed.mutable_data_ptr(), &header, sizeof header);
  return packed;
}

// The values as a weight stores them; along n only if the weight ran so.
at::Tensor values_of(const Header& header, const at::Tensor& packed) {
  const at::Tensor bytes = packed.flatten().narrow(0, kHeaderBytes, header.bytes);
  const at::Tensor values = bytes.view(kScalarTypes[header.dtype]);
  return header.ran_along_n && !header.ran_along_k ? values.view({header.in_features, header.out_features}).t()
                                                   : values.view({header.out_features, header.in_features});
}

constexpr char kDamaged[] =
    " is a packed weight with a damaged header, expected what fastlane_ext.pack_weight(weight) returned; pack it "
    "again";

// Checks what every machine can check.
std::string read_header(const at::Tensor& packed, Header& header) {
  if (lacks_values(packed)) return " is packed and traced, expected a weight with values; pass the weight itself";
  if (!packed.has_storage())
    return " is packed and wrapped by a torch.func transform, expected a plain weight there; pass the weight itself";
  if (!packed.device().is_cpu())
    return c10::str(" is packed and on ", packed.device(),
                    ", expected a packed weight on cpu; pass the weight itself");
  const bool has_header = packed.dim() == 2 && packed.is_contiguous() && packed.numel() >= kHeaderBytes &&
                          packed.storage_offset() + packed.numel() <= static_cast<int64_t>(packed.storage().nbytes());
  if (has_header) std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  if (!has_header || header.magic != kMagic)
    return c10::str(" is a uint8 tensor of shape ", packed.sizes(),
                    " that holds no packed weight, expected a weight, or ",
                    "the tensor of fastlane_ext.pack_weight(weight)");
  if (header.version != kVersion)
    return c10::str(" is a weight packed in format ", header.version, ", expected format ", kVersion,
                    "; pack it again with fastlane_ext.pack_weight(weight)");
  const bool is_whole = header.dtype < kScalarTypes.size() && header.out_features == packed.size(0) &&
                        header.in_features >= 0 && header.in_features <= packed.size(1) && header.bytes >= 0 &&
                        header.bytes <= packed.numel() - kHeaderBytes;
  return is_whole ? "" : kDamaged;
}

int64_t panel_bytes(const Header& header) {
  PanelsProblem p;
  p.n = header.out_features, p.k = header.in_features, p.dtype = static_cast<DType>(header.dtype);
  return kernels().panel_bytes(p, Parallel{});
}

PackedWeight checked(const at::Tensor& packed) {
  PackedWeight weight;
  const std::string fault = read_packed(packed, weight);
  TORCH_CHECK(fault.empty(), "weight", fault);
  return weight;
}

}  // namespace

at::Tensor pack_weight(const at::Tensor& weight) {
  constexpr char op[] = "pack_weight";
  check_dense(op, "weight", weight);
  TORCH_CHECK(has_kernel_dtype(weight), op, ": weight has dtype ", weight.scalar_type(),
              ", expected float32, float64, bfloat16 or float16; convert it with weight.to(torch.float32)");
  TORCH_CHECK(weight.device().is_cpu() && !is_stand_in(weight), op, ": weight is ",
              weight.device().is_cpu() ? std::string("traced") : "on " + weight.device().str(),
              ", expected a tensor in the CPU's memory; pack it before the model is traced or moved");
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0, op, ": weight has shape ", weight.sizes(),
              ", expected (out_features, in_features) like nn.Linear's, with at least one row");
  check_memory(op, "weight", weight);
  const OwnCalls own_calls;
  const int64_t n = weight.size(0), k = weight.size(1);
  Header header{};
  header.magic = kMagic, header.version = kVersion;
  header.out_features = n, header.in_features = k;
  const DType dtype = dtype_of(weight);
  header.dtype = static_cast<uint8_t>(dtype);
  header.ran_along_k = weight.stride(1) == 1 || k <= 1, header.ran_along_n = weight.stride(0) == 1 || n <= 1;
  PanelsProblem p;
  p.n = n, p.k = k, p.dtype = dtype;
  p.b = {weight.const_data_ptr(), weight.stride(1), weight.stride(0)};
  if (!torch_runs_on_cpu()) {
    header.bytes = panel_bytes(header), header.has_panels = 1;
    const std::string set = set_of(dtype);
    std::copy(set.begin(), set.end(), header.kernels.begin());
    at::Tensor packed = with_header(header);
    p.panels = static_cast<char*>(packed.mutable_data_ptr()) + kHeaderBytes;
    if (kernels().pack(p, Parallel{})) return packed;
    header.has_panels = 0, header.kernels = {};
  }
  header.bytes = n * k * weight.element_size();
  at::Tensor packed = with_header(header);
  values_of(header, packed).copy_(weight);
  return packed;
}

std::string read_packed(const at::Tensor& packed, PackedWeight& w) {
  Header header;
  if (std::string fault = read_header(packed, header); !fault.empty()) return fault;
  w.out_features = header.out_features, w.in_features = header.in_features, w.dtype = kScalarTypes[header.dtype];
  if (!header.has_panels) {
    const auto value_bytes = static_cast<int64_t>(c10::elementSize(w.dtype));
    return header.bytes == w.out_features * w.in_features * value_bytes ? "" : kDamaged;
  }
  w.kernels = std::string(header.kernels.data(), strnlen(header.kernels.data(), header.kernels.size()));
  const std::string set = set_of(static_cast<DType>(header.dtype));
  if (w.kernels != set)
    return c10::str(" was packed for the kernel set ", w.kernels, ", expected ", set, ", which this process runs; ",
                    "pack it again with fastlane_ext.pack_weight(weight)");
  if (header.bytes != panel_bytes(header)) return kDamaged;
  w.panels = {payload(packed), header.ran_along_k != 0, header.ran_along_n != 0};
  return "";
}

at::Tensor unpacked_weight(const at::Tensor& packed) {
  const PackedWeight w = checked(packed);
  Header header;
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  const OwnCalls own_calls;
  if (!w.panels.data) return values_of(header, packed);
  const bool along_n = w.panels.ran_along_n && !w.panels.ran_along_k;
  at::Tensor values = along_n ? at::empty({w.in_features, w.out_features}, w.dtype).t()
                              : at::empty({w.out_features, w.in_features}, w.dtype);
  kernels().unpack({w.out_features, w.in_features, dtype_of(values), w.panels.data, values.mutable_data_ptr(),
                    values.stride(0), values.stride(1)},
                   Parallel{});
  return values;
}

at::Tensor operand_weight(const at::Tensor& weight, std::optional<int64_t> frozen_rows) {
  if (!is_packed(weight)) {
    if (!frozen_rows || !weight.defined() || !reads_frozen_panels(*frozen_rows)) return weight;
    const at::Tensor copy = frozen_copy(weight);
    return copy.defined() ? copy : weight;
  }
  const bool reads_panels = checked(weight).panels.data && forced_path() != Path::library;
  return reads_panels ? weight : unpacked_weight(weight);
}

Panels panels_of(const at::Tensor& operand) { return is_packed(operand) ? checked(operand).panels : Panels{}; }

}  // namespace fastlane
