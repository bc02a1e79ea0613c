// The C interface (bnb/c.h): each function is one call of the C++ one, whose exceptions become statuses here.
#include <bnb/bnb.h>
#include <bnb/c.h>

#include <algorithm>
#include <memory>
#include <variant>

#include "common/check.h"

struct bnb_weight {
  std::variant<bnb::Quantized4bit, bnb::Quantized8bit, bnb::QuantizedInt8> value;
  bnb::Shape shape = {};
  std::vector<bnb::Item> items = {};
  std::vector<bnb_tensor> tensors = {};  // of the items
};

namespace bnb {
namespace {

static_assert(static_cast<int>(Errc::invalid_argument) + 1 == BNB_INVALID_ARGUMENT &&
              static_cast<int>(Errc::unsupported) + 1 == BNB_UNSUPPORTED && static_cast<int>(Errc::out_of_memory) + 1 == BNB_OUT_OF_MEMORY);
static_assert(static_cast<int>(ItemType::f32) == BNB_F32 && static_cast<int>(ItemType::bf16) == BNB_BF16 &&
              static_cast<int>(ItemType::f64) == BNB_F64 && static_cast<int>(ItemType::u8) == BNB_U8 &&
              static_cast<int>(ItemType::i8) == BNB_I8 && static_cast<int>(ItemType::other) == BNB_OTHER);
static_assert(static_cast<int>(QuantType::nf4) == BNB_NF4 && static_cast<int>(QuantType::fp4) == BNB_FP4);

// Of a fixed size: what says that memory is lacking takes none. Nothing to be destroyed at a thread's end, which may be after the
// library's.
thread_local char last_error[1024] = "";

bnb_status failed(bnb_status status, std::string_view message) noexcept {
  const size_t n = std::min(message.size(), sizeof last_error - 1);
  std::copy_n(message.data(), n, last_error);
  last_error[n] = '\0';
  return status;
}

template <class F> bnb_status guarded(F&& f) noexcept {
  try {
    f();
    return BNB_OK;
  } catch (const Error& e) { return failed(static_cast<bnb_status>(e.code()) + 1, e.what()); } catch (const std::bad_alloc&) {
    return failed(BNB_OUT_OF_MEMORY, "bnb: not enough memory");
  } catch (const std::length_error&) { return failed(BNB_OUT_OF_MEMORY, "bnb: not enough memory"); } catch (const std::exception& e) {
    return failed(BNB_INTERNAL_ERROR, e.what());
  } catch (...) { return failed(BNB_INTERNAL_ERROR, "bnb: an unknown exception"); }
}

void check_pointer(const Checker& check, std::string_view argument, const void* p, bool needed = true) {
  check.that(p != nullptr || !needed, argument, "NULL", "a pointer");
}
DType float_type(const Checker& check, std::string_view argument, bnb_type type) {
  check.that(type >= BNB_F32 && type <= BNB_BF16, argument, type, "BNB_F32, BNB_F16 or BNB_BF16");
  return static_cast<DType>(type);
}
const bnb_weight& weight_of(const Checker& check, const bnb_weight* weight) {
  check_pointer(check, "weight", weight);
  return *weight;
}
void check_count(const Checker& check, std::string_view argument, int64_t given) { check.that(given >= 0, argument, given, "0 or more"); }

template <class Value> bnb_weight* handle(Value value) {
  auto made = std::make_unique<bnb_weight>(std::move(value));
  const auto& v = std::get<Value>(made->value);
  if constexpr (std::is_same_v<Value, Quantized8bit>)
    made->shape = v.shape.value_or(Shape{elements_of(v)});
  else
    made->shape = v.shape;
  if constexpr (!std::is_same_v<Value, QuantizedInt8>) made->items = state_items(v);
  for (const Item& item : made->items)
    made->tensors.push_back({item.name.c_str(), static_cast<bnb_type>(item.type), item.bytes.data(), item.size()});
  return made.release();
}

std::vector<ConstItem> items_of(const Checker& check, const bnb_tensor* items, size_t count) {
  check_pointer(check, "items", items, count > 0);
  std::vector<ConstItem> found;
  for (size_t i = 0; i < count; ++i) {
    const bnb_tensor& t = items[i];
    check_pointer(check, "items[" + std::to_string(i) + "].name", t.name);
    check.that(t.type >= BNB_F32 && t.type <= BNB_OTHER, t.name, "of type " + std::to_string(t.type), "a bnb_type");
    found.push_back({t.name, static_cast<ItemType>(t.type), t.data, t.size});
  }
  return found;
}

template <class F>
bnb_status read(std::string_view op, const void* codes, size_t bytes, const bnb_tensor* items, size_t count, bnb_weight** result, F&& f) {
  return guarded([&] {
    const Checker check(op);
    check_pointer(check, "result", result);
    check_pointer(check, "codes", codes, bytes > 0);
    const auto found = items_of(check, items, count);
    *result = handle(f(std::span(static_cast<const uint8_t*>(codes), bytes), found));
  });
}

}  // namespace
}  // namespace bnb

using namespace bnb;

const char* bnb_last_error(void) { return last_error; }
const char* bnb_version(void) { return BNB_VERSION; }

const char* bnb_isa(void) {
  const char* name = nullptr;
  guarded([&] { name = active_isa().data(); });
  return name;
}

bnb_status bnb_set_num_threads(int32_t threads) {
  return guarded([&] {
    check_count(Checker("bnb_set_num_threads"), "threads", threads);
    set_num_threads(threads);
  });
}

bnb_status bnb_weight_quantize(const void* x, bnb_type type, const int64_t* shape, size_t dims, bnb_format format, int64_t blocksize,
                               int32_t nested, bnb_weight** result) {
  return guarded([&] {
    const Checker check("bnb_weight_quantize");
    check_pointer(check, "result", result);
    check_pointer(check, "shape", shape);
    check.that(dims >= 1 && dims <= 64, "dims", std::to_string(dims), "1 to 64");
    check.that(format >= BNB_NF4 && format <= BNB_INT8, "format", format, "BNB_NF4, BNB_FP4, BNB_DYNAMIC8 or BNB_INT8");
    const Shape sizes(shape, shape + dims);
    int64_t n = 1;
    for (const int64_t size : sizes) n = check.product("shape", n, size);
    const ConstView elements(x, float_type(check, "type", type), n);
    if (format == BNB_INT8) {
      check.that(blocksize == 0 && nested == 0, "blocksize or nested", "not 0", "0 for BNB_INT8, which has one scale per row");
      *result = handle(quantize(elements, OptionsInt8{.shape = sizes}));
    } else if (format == BNB_DYNAMIC8) {
      *result = handle(quantize(elements, Options8bit{.blocksize = blocksize, .nested = nested != 0, .shape = sizes}));
    } else {
      *result = handle(quantize(
          elements, Options4bit{.type = static_cast<QuantType>(format), .blocksize = blocksize, .nested = nested != 0, .shape = sizes}));
    }
  });
}

bnb_status bnb_weight_read_4bit(const void* codes, size_t bytes, const bnb_tensor* items, size_t count, bnb_weight** result) {
  return read("bnb_weight_read_4bit", codes, bytes, items, count, result, read_4bit);
}
bnb_status bnb_weight_read_8bit(const void* codes, size_t bytes, const bnb_tensor* items, size_t count, bnb_weight** result) {
  return read("bnb_weight_read_8bit", codes, bytes, items, count, result, read_8bit);
}

bnb_status bnb_weight_read_int8(const int8_t* codes, const float* scale, int64_t rows, int64_t columns, bnb_weight** result) {
  return guarded([&] {
    const Checker check("bnb_weight_read_int8");
    check_pointer(check, "result", result);
    const int64_t n = check.product("rows * columns", rows, columns);
    check_pointer(check, "codes", codes, n > 0);
    check_pointer(check, "scale", scale, rows > 0);
    *result = handle(QuantizedInt8{.shape = {rows, columns}, .codes = {codes, codes + n}, .scale = {scale, scale + rows}});
  });
}

void bnb_weight_free(bnb_weight* weight) { delete weight; }

bnb_format bnb_weight_format(const bnb_weight* weight) {
  if (!weight) return BNB_NF4;
  if (const auto* q = std::get_if<Quantized4bit>(&weight->value)) return static_cast<bnb_format>(q->type);
  return std::holds_alternative<Quantized8bit>(weight->value) ? BNB_DYNAMIC8 : BNB_INT8;
}

int64_t bnb_weight_elements(const bnb_weight* weight) {
  int64_t n = weight ? 1 : 0;
  if (weight)
    for (const int64_t size : weight->shape) n *= size;
  return n;
}

const int64_t* bnb_weight_shape(const bnb_weight* weight, size_t* dims) {
  if (dims) *dims = weight ? weight->shape.size() : 0;
  return weight ? weight->shape.data() : nullptr;
}

const void* bnb_weight_codes(const bnb_weight* weight, size_t* bytes) {
  if (bytes) *bytes = 0;
  if (!weight) return nullptr;
  return std::visit(
      [&](const auto& q) -> const void* {
        if (bytes) *bytes = q.codes.size();
        return q.codes.data();
      },
      weight->value);
}

const float* bnb_weight_row_scale(const bnb_weight* weight, size_t* count) {
  const auto* q = weight ? std::get_if<QuantizedInt8>(&weight->value) : nullptr;
  if (count) *count = q ? q->scale.size() : 0;
  return q ? q->scale.data() : nullptr;
}

const bnb_tensor* bnb_weight_items(const bnb_weight* weight, size_t* count) {
  if (count) *count = weight ? weight->tensors.size() : 0;
  return weight && !weight->tensors.empty() ? weight->tensors.data() : nullptr;
}

bnb_status bnb_weight_dequantize(const bnb_weight* weight, void* out, bnb_type type, int64_t elements) {
  return guarded([&] {
    const Checker check("bnb_weight_dequantize");
    const auto& value = weight_of(check, weight).value;
    const View view(out, float_type(check, "type", type), elements);
    std::visit([&](const auto& q) { dequantize_into(q, view); }, value);
  });
}

bnb_status bnb_weight_gemm(const bnb_weight* weight, const void* a, bnb_type type, int64_t m, const void* bias, bnb_type bias_type,
                           float threshold, void* y) {
  return guarded([&] {
    const Checker check("bnb_weight_gemm");
    const bnb_weight& w = weight_of(check, weight);
    check.that(w.shape.size() == 2, "weight", "one of " + std::to_string(w.shape.size()) + " sizes", "[n, k]");
    const int64_t n = w.shape[0], k = w.shape[1];
    const DType dtype = float_type(check, "type", type);
    const ConstView input(a, dtype, check.product("m * k", m, k));
    const View output(y, dtype, check.product("m * n", m, n));
    const ConstView added = bias ? ConstView(bias, float_type(check, "bias_type", bias_type), n) : ConstView();
    if (const auto* q4 = std::get_if<Quantized4bit>(&w.value)) return gemm_into(input, *q4, output, added);
    const auto* q8 = std::get_if<QuantizedInt8>(&w.value);
    check.that(q8 != nullptr, "weight", "BNB_DYNAMIC8", "one of BNB_NF4, BNB_FP4 and BNB_INT8");
    gemm_into(input, *q8, output, {.bias = added, .threshold = threshold});
  });
}

bnb_status bnb_convert(const void* from, bnb_type from_type, void* to, bnb_type to_type, int64_t elements) {
  return guarded([&] {
    const Checker check("bnb_convert");
    convert({from, float_type(check, "from_type", from_type), elements}, {to, float_type(check, "to_type", to_type), elements});
  });
}
