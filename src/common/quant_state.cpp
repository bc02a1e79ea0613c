// The items of a quantized tensor in a checkpoint (bnb/state.h), each checked when it is read, as state_items.py does in Python.
#include <bnb/codebook.h>
#include <bnb/state.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/check.h"
#include "common/convert.h"
#include "common/formats.h"
#include "common/json.h"

namespace bnb {
namespace {

constexpr size_t kMaxJson = size_t{1} << 16;  // bytes; the text of a state takes about 200
constexpr std::array<std::string_view, 12> kKnown = {"absmax",      "quant_map",        "nested_absmax", "nested_quant_map",
                                                     "quant_state", "quant_type",       "blocksize",     "dtype",
                                                     "shape",       "nested_blocksize", "nested_dtype",  "nested_offset"};
constexpr std::array<std::string_view, 6> kRequired = {"absmax", "blocksize", "dtype", "quant_map", "quant_type", "shape"};
constexpr std::array<std::string_view, 4> kRequiredNested = {"nested_blocksize", "nested_dtype", "nested_offset", "nested_quant_map"};
constexpr std::string_view kPacked = "bitsandbytes__";

std::string_view name_of(ItemType t) {
  constexpr std::string_view names[] = {"float32", "float16", "bfloat16", "float64", "uint8", "int8"};
  return static_cast<size_t>(t) < std::size(names) ? names[static_cast<size_t>(t)] : "another type";
}
std::string_view torch_name(DType t) { return name_of(static_cast<ItemType>(t)); }
static_assert(static_cast<int>(ItemType::f16) == static_cast<int>(DType::f16));
static_assert(static_cast<int>(ItemType::bf16) == static_cast<int>(DType::bf16));
std::string_view last_part(std::string_view name) { return name.substr(name.rfind('.') + 1); }

template <class Names> std::string listing(const Names& names) {
  std::string text;
  for (const auto& name : names) text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

// What a message may show of a text that may be anything.
std::string shown(std::string_view text) {
  std::string safe(text.substr(0, text.size() <= 80 ? 80 : 77));
  for (char& c : safe)
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) c = '?';
  return text.size() <= 80 ? safe : safe + "...";
}

double double_at(const void* data, size_t i) {
  double x = 0;
  std::memcpy(&x, static_cast<const std::byte*>(data) + 8 * i, 8);
  return x;
}
// Of a floating point type.
std::vector<float> floats_of(const ConstItem& item) {
  std::vector<float> values(static_cast<size_t>(item.size));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = item.type == ItemType::f64 ? static_cast<float>(double_at(item.data, i))
                                           : visit(static_cast<DType>(item.type),
                                                   [&](auto type) { return read(static_cast<const decltype(type)*>(item.data) + i); });
  return values;
}
std::vector<uint8_t> bytes_of(const ConstItem& item) {
  const auto* data = static_cast<const uint8_t*>(item.data);
  return {data, data + item.size};
}

// The entries by their names without path, those of the JSON text among them.
class Items {
 public:
  Items(std::string_view op, std::span<const ConstItem> items) : check_(op) {
    std::vector<std::string> packed;
    for (const ConstItem& item : items) {
      check_.that(item.size >= 0 && (item.size == 0 || item.data != nullptr), shown(item.name), std::to_string(item.size) + " elements",
                  "0 or more, and a pointer to them");
      const std::string_view part = last_part(item.name);
      const bool is_packed = part == "bitsandbytes__nf4" || part == "bitsandbytes__fp4" || part == "bitsandbytes__None";
      if (is_packed)
        packed.emplace_back(item.name), json_ = &item;
      else
        add({part, std::string(item.name), &item, {}});
    }
    if (packed.size() != 1)
      check_.fail("the list of items", packed.empty() ? "without a state" : "one of the states " + shown(listing(packed)),
                  "one item quant_state.bitsandbytes__nf4, __fp4 or __None");
    for (auto& [key, value] : text()) add({key, key + " in " + packed[0], nullptr, std::move(value)});
    nested_ = find("nested_absmax") != nullptr;
    check_known();
  }

  bool nested() const { return nested_; }
  const Checker& check() const { return check_; }

  std::optional<QuantType> quant_type() const {
    const Entry& e = at("quant_type");
    const auto* value = e.json();
    std::optional<QuantType> type;
    std::string_view name = "None";
    if (value && value->kind == json::Value::Kind::string && (value->text == "nf4" || value->text == "fp4")) {
      type = value->text == "nf4" ? QuantType::nf4 : QuantType::fp4;
      name = value->text;
    } else if (!value || value->kind != json::Value::Kind::null) {
      wrong(e, "one of nf4, fp4");
    }
    if (last_part(json_->name).substr(kPacked.size()) != name) wrong(e, "that of the entry " + shown(json_->name));
    return type;
  }

  // A power of two from 32 to 4096, or any of 1 or more.
  int64_t blocksize(std::string_view key, bool listed) const {
    const Entry& e = at(key);
    const auto value = integer(e.json());
    if (!value || *value < 1 || (listed && !is_blocksize(*value)))
      wrong(e, listed ? "a power of two from 32 to 4096" : "a whole number of 1 or more");
    return *value;
  }

  float number(std::string_view key) const {
    const Entry& e = at(key);
    double x = 0;
    bool whole = false;
    if (e.item && is_float(*e.item) && e.item->size == 1) {
      x = e.item->type == ItemType::f64 ? double_at(e.item->data, 0) : floats_of(*e.item)[0];
    } else if (const auto* v = e.json(); v && (v->kind == json::Value::Kind::integer || v->kind == json::Value::Kind::real)) {
      x = v->number;
      whole = v->kind == json::Value::Kind::integer;
    } else {
      wrong(e, "a number");
    }
    // Not finite is what a weight gives that is not; finite but beyond fp32 is nothing that was ever written.
    if ((whole || std::isfinite(x)) && std::abs(x) > double{std::numeric_limits<float>::max()}) wrong(e, "a number of fp32");
    return static_cast<float>(x);
  }

  std::optional<Shape> shape(bool optional) const {
    const Entry& e = at("shape");
    const auto* value = e.json();
    if (optional && value && value->kind == json::Value::Kind::null) return std::nullopt;
    if (!value || value->kind != json::Value::Kind::array) wrong(e, "a list of sizes of 0 or more");
    Shape shape;
    int64_t product = 1;
    for (const auto& item : value->items) {
      const auto size = integer(&item);
      if (!size || *size < 0) wrong(e, "a list of sizes of 0 or more");
      if (__builtin_mul_overflow(product, std::max<int64_t>(*size, 1), &product)) wrong(e, "sizes whose product fits 63 bits");
      shape.push_back(*size);
    }
    return shape;
  }

  DType dtype(std::string_view key) const {
    const Entry& e = at(key);
    if (const auto* v = e.json(); v && v->kind == json::Value::Kind::string) {
      if (v->text == "float32" || v->text == "float") return DType::f32;
      if (v->text == "float16" || v->text == "half") return DType::f16;
      if (v->text == "bfloat16") return DType::bf16;
    }
    wrong(e, "the name of a torch dtype, one of float32, float16, bfloat16");
  }

  // Floating point, or uint8 if `codes`; of `count` elements unless that is below 0.
  const ConstItem& tensor(std::string_view key, int64_t count, bool codes = false) const {
    const Entry& e = at(key);
    if (!e.item) fail(e, "is no tensor", "a tensor");
    if (codes ? e.item->type != ItemType::u8 : !is_float(*e.item))
      fail(e, "has dtype " + std::string(name_of(e.item->type)), codes ? "uint8" : "floating point");
    if (count >= 0 && e.item->size != count)
      fail(e, "has " + std::to_string(e.item->size) + " elements", std::to_string(count) + " for the shape and blocksize of the state");
    return *e.item;
  }

 private:
  struct Entry {
    std::string key;   // without path
    std::string name;  // as messages have it
    const ConstItem* item;
    json::Value value;

    const json::Value* json() const { return item ? nullptr : &value; }
    Entry(std::string_view k, std::string n, const ConstItem* i, json::Value v)
        : key(k), name(std::move(n)), item(i), value(std::move(v)) {}
  };
  Checker check_;
  std::vector<Entry> entries_;
  const ConstItem* json_ = nullptr;
  bool nested_ = false;

  static bool is_float(const ConstItem& item) { return item.type <= ItemType::f64; }
  static std::optional<int64_t> integer(const json::Value* v) {
    if (!v || v->kind != json::Value::Kind::integer || std::abs(v->number) >= 0x1p63) return std::nullopt;
    int64_t x = 0;
    const auto parsed = std::from_chars(v->text.data(), v->text.data() + v->text.size(), x);
    return parsed.ec == std::errc() ? std::optional(x) : std::nullopt;
  }

  [[noreturn]] void fail(const Entry& e, std::string_view given, std::string_view expected) const {
    throw Error(Errc::invalid_argument,
                check_.op().append(": ").append(shown(e.name)).append(" ").append(given).append(", expected ").append(expected));
  }
  [[noreturn]] void wrong(const Entry& e, std::string_view expected) const {
    const auto* v = e.json();
    const std::string quote = v && v->kind == json::Value::Kind::string ? "'" : "";
    fail(e, v ? "is " + quote + shown(v->text) + quote : "is a tensor", expected);
  }

  const Entry* find(std::string_view key) const {
    const auto found = std::ranges::find(entries_, key, &Entry::key);
    return found == entries_.end() ? nullptr : &*found;
  }
  const Entry& at(std::string_view key) const { return *find(key); }  // check_known has seen it

  void add(Entry e) {
    if (const Entry* other = find(e.key))
      check_.fail("the list of items", "one with " + shown(other->name) + " and " + shown(e.name), "one " + shown(e.key));
    entries_.push_back(std::move(e));
  }

  json::Object text() const {
    const std::string name = shown(json_->name);
    check_.that(json_->type == ItemType::u8, name, name_of(json_->type), "uint8");
    check_.that(static_cast<size_t>(json_->size) <= kMaxJson, name, std::to_string(json_->size) + " bytes",
                "at most " + std::to_string(kMaxJson));
    try {
      return json::read_object({static_cast<const char*>(json_->data), static_cast<size_t>(json_->size)});
    } catch (const json::SyntaxError& e) {
      check_.fail(name, std::string("not the JSON text of a state: ") + shown(e.what()), "such a text");
    }
  }

  void check_known() const {
    std::vector<std::string> unknown;
    for (const Entry& e : entries_)
      if (std::ranges::find(kKnown, e.key) == kKnown.end()) unknown.push_back(shown(e.key));
    if (unknown.size() > 9) unknown.resize(9);
    if (!unknown.empty()) check_.fail("the list of items", "one with " + listing(unknown), "one with only " + listing(kKnown));
    std::vector<std::string_view> missing;
    for (const auto key : kRequired)
      if (!find(key)) missing.push_back(key);
    for (const auto key : kRequiredNested)
      if (nested_ && !find(key)) missing.push_back(key);
    if (!missing.empty()) check_.fail("the list of items", "one without " + listing(missing), "all items of the state");
  }
};

// `count` below 0: any number of them.
BlockScales read_scales(const Items& items, int64_t count) {
  BlockScales scales;
  const ConstItem& absmax = items.tensor("absmax", count, items.nested());
  if (!items.nested()) {
    scales.values = floats_of(absmax);
    return scales;
  }
  scales.nested = true;
  scales.codes = bytes_of(absmax);
  scales.second_blocksize = items.blocksize("nested_blocksize", false);
  scales.offset = items.number("nested_offset");
  scales.second = floats_of(items.tensor("nested_absmax", blocks_of(absmax.size, scales.second_blocksize)));
  scales.code = floats_of(items.tensor("nested_quant_map", 256));
  scales.second_dtype = items.dtype("nested_dtype");
  return scales;
}

int64_t product_of(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// Of a value that anybody may have filled.
int64_t checked_product(const Checker& check, const Shape& shape) {
  int64_t n = 1, most = 1;
  for (const int64_t size : shape) {
    check.that(size >= 0 && !__builtin_mul_overflow(most, std::max<int64_t>(size, 1), &most), "shape", "one with " + std::to_string(size),
               "sizes of 0 or more whose product fits 63 bits");
    n *= size;
  }
  return n;
}
void check_scales(const Checker& check, const BlockScales& s, int64_t blocks) {
  if (!s.nested) return check.equal("scales.values", std::ssize(s.values), blocks, "one for each block");
  check.equal("scales.codes", std::ssize(s.codes), blocks, "one for each block");
  check.equal("scales.code", std::ssize(s.code), 256, "values of a map");
  check.that(s.second_blocksize >= 1, "scales.second_blocksize", s.second_blocksize, "1 or more");
  check.equal("scales.second", std::ssize(s.second), blocks_of(blocks, s.second_blocksize), "one for each block of scales");
}

template <class T> Item item_of(std::string_view prefix, std::string_view name, ItemType type, std::span<const T> values) {
  const auto bytes = std::as_bytes(values);
  return {std::string(prefix).append(name), type, {bytes.begin(), bytes.end()}};
}

std::vector<Item> items_of(std::string_view prefix, std::string_view type, int64_t blocksize, DType dtype, const Shape* shape,
                           std::span<const float> map, const BlockScales& s) {
  std::vector<Item> items;
  if (s.nested)
    items.push_back(item_of(prefix, "absmax", ItemType::u8, std::span<const uint8_t>(s.codes)));
  else
    items.push_back(item_of(prefix, "absmax", ItemType::f32, std::span<const float>(s.values)));
  items.push_back(item_of(prefix, "quant_map", ItemType::f32, map));
  std::string text = "{\"quant_type\": " + (type == "None" ? "null" : std::string("\"").append(type).append("\""));
  text += ", \"blocksize\": " + std::to_string(blocksize);
  text.append(", \"dtype\": \"").append(torch_name(dtype)).append("\", \"shape\": ");
  if (shape) {
    std::vector<std::string> sizes;
    for (const int64_t size : *shape) sizes.push_back(std::to_string(size));
    text += "[" + listing(sizes) + "]";
  } else {
    text += "null";
  }
  if (s.nested) {
    items.push_back(item_of(prefix, "nested_absmax", ItemType::f32, std::span<const float>(s.second)));
    items.push_back(item_of(prefix, "nested_quant_map", ItemType::f32, std::span<const float>(s.code)));
    text += ", \"nested_blocksize\": " + std::to_string(s.second_blocksize);
    text.append(", \"nested_dtype\": \"").append(torch_name(s.second_dtype));
    text += "\", \"nested_offset\": " + json::write_number(double{s.offset});
  }
  text += "}";
  items.push_back(item_of(prefix, std::string("quant_state.").append(kPacked).append(type), ItemType::u8, std::span<const char>(text)));
  return items;
}

}  // namespace

Quantized4bit read_4bit(std::span<const uint8_t> codes, std::span<const ConstItem> given) {
  const Items items("read_4bit", given);
  const auto type = items.quant_type();
  if (!type) items.check().fail("quant_type", "null", "nf4 or fp4; read_8bit reads states of 8 bits");
  Quantized4bit q;
  q.type = *type;
  q.blocksize = items.blocksize("blocksize", true);
  q.shape = *items.shape(false);
  const int64_t n = product_of(q.shape);
  q.scales = read_scales(items, blocks_of(n, q.blocksize));
  items.tensor("quant_map", 16);
  q.dtype = items.dtype("dtype");
  items.check().equal("codes", std::ssize(codes), packed_size(n), "two elements of the shape per byte");
  q.codes.assign(codes.begin(), codes.end());
  return q;
}

Quantized8bit read_8bit(std::span<const uint8_t> codes, std::span<const ConstItem> given) {
  const Items items("read_8bit", given);
  if (items.quant_type()) items.check().fail("quant_type", "nf4 or fp4", "null; read_4bit reads states of 4 bits");
  Quantized8bit q;
  q.blocksize = items.blocksize("blocksize", false);
  q.shape = items.shape(true);
  const int64_t n = q.shape ? product_of(*q.shape) : std::ssize(codes);
  q.scales = read_scales(items, q.shape ? blocks_of(n, q.blocksize) : -1);
  q.code = floats_of(items.tensor("quant_map", 256));
  q.dtype = items.dtype("dtype");
  items.check().equal("codes", std::ssize(codes), n, "the elements of the shape");
  items.check().equal("absmax", q.scales.size(), blocks_of(n, q.blocksize), "one for each block");
  q.codes.assign(codes.begin(), codes.end());
  return q;
}

int64_t elements_of(const Quantized4bit& q) {
  const Checker check("Quantized4bit");
  check.type(q.type);
  check.blocksize(q.blocksize);
  const int64_t n = checked_product(check, q.shape);
  check.equal("codes", std::ssize(q.codes), packed_size(n), "two elements of the shape per byte");
  check_scales(check, q.scales, blocks_of(n, q.blocksize));
  return n;
}
int64_t elements_of(const Quantized8bit& q) {
  const Checker check("Quantized8bit");
  check.any_blocksize(q.blocksize);
  const int64_t n = std::ssize(q.codes);
  if (q.shape) check.equal("codes", n, checked_product(check, *q.shape), "the elements of the shape");
  check.equal("code", std::ssize(q.code), 256, "values of a map");
  check_scales(check, q.scales, blocks_of(n, q.blocksize));
  return n;
}
int64_t elements_of(const QuantizedInt8& q) {
  const Checker check("QuantizedInt8");
  check.that(q.shape.size() == 2, "shape", "one of " + std::to_string(q.shape.size()) + " sizes", "[rows, columns]");
  const int64_t n = checked_product(check, q.shape);
  check.equal("codes", std::ssize(q.codes), n, "rows * columns");
  check.equal("scale", std::ssize(q.scale), q.shape[0], "rows");
  return n;
}

std::vector<Item> state_items(const Quantized4bit& q, std::string_view prefix) {
  elements_of(q);
  return items_of(prefix, name(q.type), q.blocksize, q.dtype, &q.shape, values_of(q.type), q.scales);
}

std::vector<Item> state_items(const Quantized8bit& q, std::string_view prefix) {
  elements_of(q);
  return items_of(prefix, "None", q.blocksize, q.dtype, q.shape ? &*q.shape : nullptr, q.code, q.scales);
}

}  // namespace bnb
