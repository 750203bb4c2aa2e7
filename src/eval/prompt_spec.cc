#include "eval/prompt_spec.h"

#include "eval/builtin_prompts.h"
#include "base/error.h"
#include "formats/json.h"

namespace lacuna {
namespace {

// A place in the document; messages name its path.
class Field {
 public:
  Field(const Json& value, std::string path) : value_(value), path_(std::move(path)) {}

  Field at(const std::string& name) const {
    need(value_.is_object(), "an object");
    if (!value_.contains(name)) throw CorruptData("{}: field \"{}\" is missing", path_, name);
    return {value_[name], path_ + "." + name};
  }
  bool has(const std::string& name) const { return value_.is_object() && value_.contains(name); }
  std::string text() const {
    need(value_.is_string(), "a string");
    return value_.get<std::string>();
  }
  int integer() const {
    need(value_.is_number_integer() && value_.get<int64_t>() >= 0 && value_.get<int64_t>() <= 1000000, "a whole number up to 1000000");
    return value_.get<int>();
  }
  double number() const {
    need(value_.is_number(), "a number");
    return value_.get<double>();
  }
  template <typename F>
  void each(F&& visit) const {  // of a list that must not be empty
    need(value_.is_array() && !value_.empty(), "a list with entries");
    for (size_t i = 0; i < value_.size(); ++i) visit(Field(value_[i], path_ + "[" + std::to_string(i) + "]"));
  }
  template <typename F>
  void each_named(F&& visit) const {
    need(value_.is_object() && !value_.empty(), "an object with entries");
    for (const auto& item : value_.items()) visit(item.key(), Field(item.value(), path_ + "." + item.key()));
  }
  bool is_object() const { return value_.is_object(); }
  bool is_string() const { return value_.is_string(); }
  std::vector<std::string> texts() const {
    std::vector<std::string> out;
    each([&](const Field& f) { out.push_back(f.text()); });
    return out;
  }
  const std::string& path() const { return path_; }

 private:
  void need(bool good, const char* expected) const {
    if (!good) throw CorruptData("{}: found {}, expected {}", path_, json_excerpt(value_), expected);
  }
  const Json& value_;
  std::string path_;
};

PromptSpec::Kind read_kind(const Field& f) {
  PromptSpec::Kind kind;
  kind.name = f.at("name").text();
  kind.plural = f.at("plural").text();
  if (f.has("digits")) {
    kind.digits = f.at("digits").integer();
    if (kind.digits < 1 || kind.digits > 18) throw CorruptData("{}.digits is {}, expected 1 to 18", f.path(), kind.digits);
  } else if (f.has("groups")) {
    f.at("groups").each([&](const Field& g) { kind.groups.push_back(g.integer()); });
  } else {
    kind.list = f.at("list").text();
  }
  return kind;
}

PromptSpec::Task read_task(const std::string& name, const Field& f) {
  PromptSpec::Task task;
  task.name = name;
  task.wording = f.at("wording").text();
  task.context = f.at("context").text();
  task.new_tokens = f.at("new_tokens").integer();
  const auto text = [&](const char* field, std::string& out) {
    if (f.has(field)) out = f.at(field).text();
  };
  const auto integer = [&](const char* field, int& out) {
    if (f.has(field)) out = f.at(field).integer();
  };
  text("ask", task.ask);
  text("kind", task.kind);
  if (f.has("keys") && f.at("keys").is_string()) {
    if (f.at("keys").text() != "fill") throw CorruptData("{}.keys is \"{}\", expected a number or \"fill\"", f.path(), f.at("keys").text());
    task.keys = PromptSpec::kFill;
  } else {
    integer("keys", task.keys);
  }
  integer("values", task.values);
  integer("queries", task.queries);
  integer("chains", task.chains);
  integer("hops", task.hops);
  integer("letters", task.letters);
  integer("words", task.words);
  integer("answers", task.answers);
  if (f.has("exponent")) task.exponent = f.at("exponent").number();
  integer("common", task.common);
  integer("common_count", task.common_count);
  integer("uncommon_count", task.uncommon_count);
  integer("uncommon_most", task.uncommon_most);
  integer("before", task.before);
  integer("after", task.after);
  return task;
}

PromptSpec::Wording read_wording(const Field& f) {
  PromptSpec::Wording out;
  f.each_named([&](const std::string& name, const Field& part) {
    if (!part.is_object()) {
      out[name] = part.text();
      return;
    }
    part.each_named([&](const std::string& inner, const Field& text) { out[name + "." + inner] = text.text(); });
  });
  return out;
}

// What the tasks refer to must be there, so that generation needs no checks of its own.
void check_references(const PromptSpec& spec, const std::string& where) {
  static const std::map<std::string, std::vector<std::string>> kTexts = {
      {"needle", {"intro", "needle"}},      {"passkey", {"intro", "needle", "question", "cue"}},
      {"variables", {"intro", "first", "next", "question", "cue"}}, {"json", {"intro", "question", "cue"}},
      {"frequent", {"intro", "question", "cue"}}, {"common", {"intro", "question", "cue"}}, {"qa", {"intro", "question", "cue"}}};
  for (const auto& task : spec.tasks) {
    const std::string path = where + ".tasks." + task.name;
    const auto texts = kTexts.find(task.wording);
    if (texts == kTexts.end() || !spec.wordings.contains(task.wording))
      throw CorruptData("{}.wording: \"{}\" is not a known wording", path, task.wording);
    if (!task.kind.empty() && !spec.kinds.contains(task.kind)) throw CorruptData("{}.kind: \"{}\" is not a kind", path, task.kind);
    std::vector<std::string> needed = texts->second;
    if (task.wording == "needle") {
      needed.push_back(task.ask + ".question");
      needed.push_back(task.ask + ".cue");
      if (task.keys == 0 || task.values == 0) throw CorruptData("{}: a needle task needs \"keys\" and \"values\" from 1", path);
    }
    const bool takes_kind = task.wording == "needle" || task.wording == "passkey" || task.wording == "variables" || task.wording == "json";
    if (takes_kind && task.kind.empty()) throw CorruptData("{}: field \"kind\" is missing", path);
    const int counted = std::max({task.values, task.hops + 1, task.answers});
    if (counted >= static_cast<int>(spec.count_words.size()))
      throw CorruptData("{}: count_words ends at {}, but the task counts to {}", path, spec.count_words.size() - 1, counted);
    for (const auto& [split, wordings] : spec.wordings.at(task.wording))
      for (const auto& wording : wordings)
        for (const auto& text : needed)
          if (!wording.contains(text)) throw CorruptData("{}.wordings.{}.{}: text \"{}\" is missing", where, task.wording, split, text);
  }
  for (const char* list : {"adjectives", "nouns", "words", "letters"})
    if (!spec.lists.contains(list)) throw CorruptData("{}.lists: field \"{}\" is missing", where, list);
}

}  // namespace

PromptSpec parse_prompt_spec(std::string_view json, const std::string& where) {
  const Json document = parse_json(json, where);
  const Field root(document, where);
  PromptSpec spec;
  if (const int format = root.at("format").integer(); format != 1)
    throw CorruptData("{}.format is {}, this build reads format 1", where, format);
  spec.layout = root.at("layout").text();
  spec.answer = root.at("answer").text();
  spec.items = root.at("separators").at("items").text();
  spec.last_item = root.at("separators").at("last_item").text();
  spec.count_words = root.at("count_words").texts();
  root.at("kinds").each_named([&](const std::string& name, const Field& f) { spec.kinds[name] = read_kind(f); });
  root.at("tasks").each_named([&](const std::string& name, const Field& f) { spec.tasks.push_back(read_task(name, f)); });
  root.at("wordings").each_named([&](const std::string& name, const Field& f) {
    f.each_named([&](const std::string& split, const Field& list) {
      list.each([&](const Field& wording) { spec.wordings[name][split].push_back(read_wording(wording)); });
    });
  });
  root.at("noise").each_named([&](const std::string& split, const Field& list) {
    list.each([&](const Field& set) { spec.noise[split].push_back(set.texts()); });
  });
  root.at("lists").each_named([&](const std::string& name, const Field& f) {
    if (!f.is_string()) {
      spec.lists[name] = f.texts();
      return;
    }
    for (char c : f.text()) spec.lists[name].emplace_back(1, c);  // "ABC" is short for ["A", "B", "C"]
    if (spec.lists[name].empty()) throw CorruptData("{} is empty", f.path());
  });
  check_references(spec, where);
  return spec;
}

const PromptSpec& builtin_prompt_spec() {
  static const PromptSpec spec = parse_prompt_spec(kBuiltinPrompts, "presets/prompts/tasks.json");
  return spec;
}

const PromptSpec::Task& PromptSpec::task(const std::string& name) const {
  std::string known;
  for (const Task& t : tasks) {
    if (t.name == name) return t;
    known += (known.empty() ? "" : ", ") + t.name;
  }
  throw BadInput("there is no task \"{}\"; known tasks: {}", name, known);
}

std::string fill_template(const std::string& text, const std::map<std::string, std::string>& values) {
  std::string out;
  size_t at = 0;
  while (at < text.size()) {
    const size_t open = text.find('{', at);
    const size_t close = open == std::string::npos ? open : text.find('}', open);
    if (close == std::string::npos) break;
    const auto value = values.find(text.substr(open + 1, close - open - 1));
    out.append(text, at, open - at);
    if (value == values.end()) throw BadInput("the template \"{}\" asks for {}, which its task does not have", text, text.substr(open, close - open + 1));
    out += value->second;
    at = close + 1;
  }
  return out.append(text, at, std::string::npos);
}

}  // namespace lacuna
