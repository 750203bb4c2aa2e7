#include "formats/json.h"

#include <new>
#include <vector>

#include "base/error.h"

namespace lacuna {
namespace {

std::string cut(const std::string& text, size_t limit = 80) {
  if (text.size() <= limit) return text;
  while (limit > 0 && (static_cast<uint8_t>(text[limit]) & 0xC0) == 0x80) --limit;  // not inside a character
  return text.substr(0, limit) + "...";
}

// Builds the document from parser events; the parser itself keeps its own stack on the heap.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(Json& root, std::string_view where) : root_(root), where_(where) {}

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t&) override { return put(value); }
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // cannot occur in text
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& value) override {
    auto [slot, added] = open_.back()->get_ref<Json::object_t&>().try_emplace(value);
    if (!added) throw CorruptData("{}: key '{}' occurs twice in one object", where_, name_excerpt(value));
    member_ = &slot->second;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    // The parser quotes the token it stopped at, which can be as long as the file.
    throw CorruptData("{}: not valid JSON at byte {}: {}", where_, position, cut(error.what(), 200));
  }

 private:
  template <typename T>
  Json* place(T&& value) {
    if (open_.empty()) {
      root_ = std::forward<T>(value);
      return &root_;
    }
    if (Json* parent = open_.back(); parent->is_array()) {
      auto& list = parent->get_ref<Json::array_t&>();
      list.emplace_back(std::forward<T>(value));
      return &list.back();
    }
    *member_ = std::forward<T>(value);
    return member_;
  }
  template <typename T>
  bool put(T&& value) {
    place(std::forward<T>(value));
    return true;
  }
  bool open(Json container) {
    if (open_.size() >= static_cast<size_t>(kMaxJsonDepth))
      throw CorruptData("{}: JSON is nested deeper than {} levels", where_, kMaxJsonDepth);
    open_.push_back(place(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  Json& root_;
  std::string_view where_;
  std::vector<Json*> open_;  // containers not yet closed; a parent never grows while a child is open
  Json* member_ = nullptr;   // where the value of the last key goes
};

}  // namespace

Json parse_json(std::string_view text, std::string_view where) {
  try {
    Json root;
    Builder builder(root, where);
    if (!Json::sax_parse(text.begin(), text.end(), &builder)) throw CorruptData("{}: not valid JSON", where);
    return root;
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("{}: no memory for a JSON document of {} bytes", where, text.size());
  }
}

std::string json_excerpt(const Json& value) {
  return cut(value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace));
}

std::string name_excerpt(std::string_view name) {
  // As JSON text without its quotes; cut before, so that a huge name is never copied whole.
  const std::string quoted = Json(name.substr(0, 100)).dump(-1, ' ', false, Json::error_handler_t::replace);
  return cut(quoted.substr(1, quoted.size() - 2));
}

}  // namespace lacuna
