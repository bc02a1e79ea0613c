#include <bnb/types.h>

namespace bnb {

std::string_view name(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::f16: return "f16";
    case DType::bf16: return "bf16";
  }
  return "unknown";
}

std::string_view name(QuantType t) {
  switch (t) {
    case QuantType::nf4: return "nf4";
    case QuantType::fp4: return "fp4";
  }
  return "unknown";
}

}  // namespace bnb
