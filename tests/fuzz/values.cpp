// Values that own their memory with options and members that may be wrong, broken states of checkpoints, and the C interface.
#include <bnb/c.h>

#include "fuzz/call.h"

namespace bnb::fuzz {
namespace {

// f() returns, or throws an Error that begins with one of `ops`, which is false.
template <class F> bool accepted(std::initializer_list<std::string_view> ops, F&& f) {
  try {
    f();
    return true;
  } catch (const Error& e) {
    for (const auto op : ops)
      if (std::string_view(e.what()).starts_with(std::string(op) + ": ")) return false;
    throw Fault(std::string("a message that does not name its operation: ") + e.what());
  }
}

void spoil_text(Bytes& bytes, std::vector<std::byte>& text) {
  if (text.empty()) return;
  const auto at = text.begin() + bytes.below(std::ssize(text));
  const int64_t kind = bytes.below(4);
  if (kind == 0) *at = static_cast<std::byte>(bytes.byte());
  if (kind == 1) text.erase(at);
  if (kind == 2) text.erase(at, text.end());
  if (kind < 3) return;
  const auto word =
      bytes.one_of<std::string_view>({"null", "-1", "1e400", "[0]", "\"a\"", "NaN", "9223372036854775808", "{}", "\\u0", ","});
  const auto raw = std::as_bytes(std::span(word));
  text.insert(at, raw.begin(), raw.end());
}

// Items are changed, lost or there twice: they are refused, or what is read is whole and comes back as it is written.
template <class Q, class Read> void broken_state(Bytes& bytes, std::string_view op, Q q, Read&& read) {
  auto items = state_items(q, "a.");
  const int64_t changes = bytes.below(3);
  for (int64_t i = 0; i < changes && !items.empty(); ++i) {
    auto& item = items[static_cast<size_t>(bytes.below(std::ssize(items)))];
    switch (bytes.below(7)) {
      case 0: item.type = static_cast<ItemType>(bytes.below(7)); break;
      case 1: item.bytes.resize(static_cast<size_t>(bytes.below(300))); break;
      case 2: item.name = bytes.one_of({"absmax", "x.bitsandbytes__fp4", "", ".", "nested_offset", "shape"}); break;
      case 3: items.push_back(Item(item)); break;
      case 4: items.erase(items.begin() + (&item - items.data())); break;
      case 5: q.codes.resize(static_cast<size_t>(bytes.below(std::ssize(q.codes) + 3))); break;
      default: spoil_text(bytes, items.back().bytes);
    }
  }
  const auto views = [](const std::vector<Item>& list) { return std::vector<ConstItem>(list.begin(), list.end()); };
  if (!accepted({op}, [&] { q = read(q.codes, views(items)); })) {
    if (changes == 0) throw Fault(std::string(op) + " refused what was written");
    return;
  }
  if (std::ssize(dequantize(q)) != elements_of(q)) throw Fault("a value of another size");
  const auto written = state_items(q), again = state_items(read(q.codes, views(written)));
  for (size_t i = 0; i < written.size(); ++i)
    if (written[i].name != again[i].name || written[i].bytes != again[i].bytes) throw Fault(written[i].name + " does not come back");
}

Shape any_shape(Bytes& bytes, int64_t n) {
  const Shape shapes[] = {{}, {n}, {n / 8, 8}, {1, n, 1}, {bytes.number(), bytes.number()}, {bytes.number()}};
  return shapes[bytes.below(std::ssize(shapes))];
}

// A value is made with any options, a member is spoiled, and it is read, multiplied and written.
template <class Options> void value(Call& c, const Options& options) {
  Bytes& bytes = c.bytes;
  // A size that is not that of the memory would be believed here.
  const auto n = 8 * bytes.below(200);
  const ConstView x = bytes.flip() ? ConstView(c.memory.take<Half>(bytes, n, false, true), DType::f16, n)
                                   : ConstView(c.memory.take<float>(bytes, n, false, true), DType::f32, n);
  const auto broken = [&](auto q) {
    if (bytes.rarely()) q.shape = any_shape(bytes, x.size);
    if (bytes.rarely()) q.codes.resize(static_cast<size_t>(bytes.below(900)));
    if constexpr (requires { q.scales; }) {
      if (bytes.rarely()) q.blocksize = c.blocksize();
      if (bytes.rarely()) q.scales.nested = !q.scales.nested;
      if (bytes.rarely()) q.scales.second.resize(static_cast<size_t>(bytes.below(9)));
      if (bytes.rarely()) q.scales.second_blocksize = bytes.number();
    }
    const std::initializer_list<std::string_view> ops = {"Quantized4bit", "Quantized8bit", "QuantizedInt8", "gemm",
                                                         "gemm_4bit",     "linear_int8",   "dequantize",    "dequantize_int8"};
    accepted(ops, [&] { dequantize_into(q, c.elements(x.size, DType::f32, true)); });
    if constexpr (requires { state_items(q); }) accepted(ops, [&] { state_items(q); });
    if constexpr (requires { gemm_into(x, q, View()); })
      accepted(ops, [&] { gemm_into(c.elements(16, DType::f32, false), q, c.elements(2 * (x.size / 8), DType::f32, true)); });
  };
  accepted({"quantize", "quantize_4bit", "quantize_blockwise", "quantize_int8"}, [&] { broken(quantize(x, options)); });
}

// The C interface: a status for everything, and a text for what is not BNB_OK.
void c_interface(Call& c) {
  Bytes& bytes = c.bytes;
  const auto ok = [](bnb_status status) {
    if (status != BNB_OK && !std::strstr(bnb_last_error(), ": ")) throw Fault("a status without its text");
    return status == BNB_OK;
  };
  const auto shape = any_shape(bytes, 256);
  const bnb_type type = bytes.rarely() ? static_cast<int>(bytes.number()) : BNB_F32;
  float x[256], out[256];
  c.fill(x, 256);
  bnb_weight* w = nullptr;
  const bool fits = shape == Shape{256} || shape == Shape{32, 8} || shape == Shape{1, 256, 1};
  const int64_t format = bytes.below(5);
  if (!fits || !ok(bnb_weight_quantize(bytes.rarely() ? nullptr : x, type, shape.data(), shape.size(), static_cast<int>(format),
                                       format == BNB_INT8 ? 0 : c.blocksize(), format == BNB_INT8 ? 0 : bytes.byte() & 1, &w)))
    return;
  size_t size = 0, count = 0;
  const void* codes = bnb_weight_codes(w, &size);
  const bnb_tensor* items = bnb_weight_items(w, &count);
  bnb_weight* again = nullptr;
  if (ok(bnb_weight_read_4bit(codes, size, items, count - (count > 0 && bytes.rarely() ? 1 : 0), &again)) != (again != nullptr))
    throw Fault("a weight of a call that failed");
  bnb_weight_free(again);
  ok(bnb_weight_dequantize(w, out, type, bytes.rarely() ? bytes.number() & 127 : 256));
  ok(bnb_weight_gemm(w, nullptr, type, bytes.rarely() ? bytes.number() : 0, nullptr, 0, 0, nullptr));
  bnb_weight_free(w);
}

}  // namespace

void values(Memory& memory, Bytes& bytes) {
  Call c{memory, bytes};
  switch (bytes.below(7)) {
    case 0: {
      const int64_t n = bytes.below(2000);
      const ConstView from = c.elements(n, c.dtype(), false);
      const View to = c.elements(n, c.dtype(), true);
      return c.run("convert", true, [&] { convert(from, to); });
    }
    case 1: {
      const auto scales = c.in<float>(bytes.below(600));
      accepted({"nest", "quantize_blockwise"}, [&] { decode(nest(scales, c.blocksize())); });
      return;
    }
    case 2: {
      const auto x = std::vector<float>(static_cast<size_t>(bytes.below(600)), 0.5f);
      if (bytes.flip())
        return broken_state(bytes, "read_4bit", quantize(x, Options4bit{.nested = bytes.flip(), .shape = {1, std::ssize(x)}}),
                            [](const auto& codes, const auto& items) { return read_4bit(codes, items); });
      return broken_state(bytes, "read_8bit", quantize(x, Options8bit{.blocksize = 64, .nested = bytes.flip()}),
                          [](const auto& codes, const auto& items) { return read_8bit(codes, items); });
    }
    case 3: return value(c, Options4bit{c.format(), c.blocksize(), bytes.flip(), any_shape(bytes, 8 * bytes.below(200))});
    case 4: return value(c, Options8bit{c.blocksize(), bytes.flip(), any_shape(bytes, 8 * bytes.below(200)), {}});
    case 5: return value(c, OptionsInt8{any_shape(bytes, 8 * bytes.below(200))});
    default: return c_interface(c);
  }
}

}  // namespace bnb::fuzz
