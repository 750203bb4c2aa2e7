#include "eval/tasks.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace lacuna {
namespace {

bool letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool lower_case(char c) { return c >= 'a' && c <= 'z'; }

template <typename Draw>
std::vector<std::string> distinct(size_t count, Draw&& draw) {
  std::vector<std::string> out;
  std::set<std::string> seen;
  // Far more draws than any list here needs; beyond it the list is smaller than the request.
  for (size_t tries = 0; out.size() < count; ++tries) {
    if (tries > 1000 * (count + 10)) throw BadInput("the prompt file's lists cannot give {} different entries", count);
    std::string one = draw();
    if (seen.insert(one).second) out.push_back(std::move(one));
  }
  return out;
}

// Runs of words joined by single spaces, each run after a space and before no letter or digit.
std::vector<std::vector<std::string_view>> word_runs(std::string_view text) {
  std::vector<std::vector<std::string_view>> runs;
  for (size_t i = 1; i < text.size();) {
    if (text[i - 1] != ' ' || !letter(text[i])) {
      ++i;
      continue;
    }
    std::vector<std::string_view> run;
    while (i < text.size() && letter(text[i])) {
      const size_t begin = i;
      while (i < text.size() && letter(text[i])) ++i;
      if (i < text.size() && text[i] >= '0' && text[i] <= '9') break;
      run.push_back(text.substr(begin, i - begin));
      if (i + 1 < text.size() && text[i] == ' ' && letter(text[i + 1])) ++i;
      else break;
    }
    if (!run.empty()) runs.push_back(std::move(run));
    ++i;
  }
  return runs;
}

// The largest n in [1, most] with cost(n) <= budget; cost grows with n.
template <typename Cost>
int64_t largest(int64_t most, int64_t budget, Cost&& cost) {
  int64_t low = 1, high = std::max<int64_t>(1, most);
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (cost(middle) <= budget) low = middle;
    else high = middle - 1;
  }
  return low;
}

size_t place_of(double depth, size_t places) {
  return std::min(static_cast<size_t>(depth * static_cast<double>(places)), places - 1);
}

}  // namespace

// What a prompt says, before its context is written to fit.
struct TaskMaker::Draft {
  struct Needle {
    std::string text;  // without its leading space
    double depth = 0;
    bool asked = false;
  };
  std::map<std::string, std::string> names;  // for the intro
  std::vector<Needle> needles;
  std::string question, cue;
  std::vector<std::string> references;
  // Spare keys and values, or the words, of contexts that are nothing but entries; [0] is asked about.
  std::vector<std::string> keys, values;
  std::string entry;  // their template
  std::map<std::string, std::string> entry_names;
  std::string passage;  // qa chooses its passage before its question
};

struct TaskMaker::Context {
  std::string text;
  double depth = -1;
};

TaskMaker::TaskMaker(const PromptSpec& spec, const Haystack& books, EncodeFn encode, uint64_t seed, std::vector<int32_t> before)
    : spec_(spec), books_(books), encode_(std::move(encode)), seed_(seed), before_(std::move(before)) {}

std::vector<std::string> TaskMaker::expand(const std::string& names) const {
  std::vector<std::string> out;
  size_t at = 0;
  while (at <= names.size()) {
    const size_t comma = std::min(names.find(',', at), names.size());
    const std::string name = names.substr(at, comma - at);
    at = comma + 1;
    if (name == "all" || name == "ruler") {
      for (const auto& task : spec_.tasks)
        if (name == "all" || task.wording != "qa") out.push_back(task.name);
    } else {
      out.push_back(spec_.task(name).name);
    }
  }
  return out;
}

bool TaskMaker::takes_depth(const std::string& name) const {
  const PromptSpec::Task& task = spec_.task(name);
  return task.wording == "passkey" || task.wording == "json" || (task.wording == "needle" && task.ask == "one");
}

std::vector<std::string> TaskMaker::draw_keys(EvalRandom& random, size_t count) const {
  const auto& adjectives = spec_.lists.at("adjectives");
  const auto& nouns = spec_.lists.at("nouns");
  return distinct(count, [&] {
    const std::string& adjective = random.pick(adjectives);
    return adjective + " " + random.pick(nouns);
  });
}

std::vector<std::string> TaskMaker::draw_values(EvalRandom& random, size_t count, const std::string& name) const {
  const PromptSpec::Kind& kind = spec_.kinds.at(name);
  if (kind.digits > 0) {
    int64_t low = 1;
    for (int i = 1; i < kind.digits; ++i) low *= 10;
    return distinct(count, [&] { return std::to_string(random.between(low, 10 * low - 1)); });
  }
  if (!kind.groups.empty())
    return distinct(count, [&] {
      std::string value;
      for (int group : kind.groups) {
        if (!value.empty()) value += '-';
        for (int i = 0; i < group; ++i) value += "0123456789abcdef"[random.below(16)];
      }
      return value;
    });
  return distinct(count, [&] { return random.pick(spec_.lists.at(kind.list)); });
}

std::string TaskMaker::join(const std::vector<std::string>& items) const {
  std::string out;
  for (const std::string& item : items) out += (out.empty() ? "" : spec_.items) + item;
  return out;
}

void TaskMaker::draft_needles(const PromptSpec::Task& task, const PromptSpec::Wording& wording, EvalRandom& random,
                              const Request& request, Draft& out) const {
  const bool fill = task.keys == PromptSpec::kFill;
  // A needle is never shorter than 8 tokens, so this many keys always fill the context.
  const size_t count = fill ? static_cast<size_t>(request.length / 8 + 1) : static_cast<size_t>(task.keys);
  const size_t per_key = static_cast<size_t>(task.values);
  const std::vector<std::string> keys = draw_keys(random, count);
  const std::vector<std::string> values = draw_values(random, count * per_key, task.kind);
  auto names = out.names;
  if (fill) {
    out.keys = keys;
    out.values = values;
    out.entry = wording.at("needle");
    out.entry_names = names;
    names["key"] = keys[0];
    out.references = {values[0]};
  } else {
    const size_t asked = static_cast<size_t>(random.below(static_cast<int64_t>(count)));
    for (size_t i = 0; i < values.size(); ++i) {
      names["key"] = keys[i / per_key];
      names["value"] = values[i];
      const bool its = task.ask == "one" && i / per_key == asked;
      const double drawn = random.unit();  // always, so that asking for a depth changes nothing else
      out.needles.push_back({fill_template(wording.at("needle"), names), its && request.depth ? *request.depth : drawn, its});
    }
    if (task.ask == "keys") {
      std::vector<size_t> order(count);
      for (size_t i = 0; i < count; ++i) order[i] = i;
      random.shuffle(order);
      const size_t queries = std::min(static_cast<size_t>(task.queries), count);
      std::string listing;
      for (size_t i = 0; i < queries; ++i) {
        listing += (i == 0 ? "" : i + 1 == queries ? spec_.last_item : spec_.items) + keys[order[i]];
        out.references.push_back(values[order[i] * per_key]);
      }
      names["keys"] = listing;
    } else {
      std::vector<size_t> order(per_key);
      for (size_t i = 0; i < per_key; ++i) order[i] = asked * per_key + i;
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return out.needles[a].depth < out.needles[b].depth; });
      for (size_t i : order) out.references.push_back(values[i]);  // in the order of the text
      names["key"] = keys[asked];
    }
  }
  names["count"] = spec_.count_words[per_key];
  out.question = fill_template(wording.at(task.ask + ".question"), names);
  out.cue = fill_template(wording.at(task.ask + ".cue"), names);
}

void TaskMaker::draft_qa(const PromptSpec::Task& task, const PromptSpec::Wording& wording, EvalRandom& random, int64_t budget,
                         Draft& out) const {
  const size_t before = static_cast<size_t>(task.before), after = static_cast<size_t>(task.after);
  for (int draw = 0; draw < 50; ++draw) {
    const Haystack::Passage passage = books_.passage(random, budget, encode_);
    std::vector<std::pair<std::string, std::string>> around;
    std::vector<std::string> words;
    for (const auto& run : word_runs(passage.text))
      for (size_t gap = before; gap + after < run.size(); ++gap) {
        const std::string_view word = run[gap];
        if (word.size() < 3 || lower_case(word[0]) || !std::all_of(word.begin() + 1, word.end(), lower_case)) continue;
        if (gap > 0 && !lower_case(run[gap - 1][0])) continue;
        std::string left, right;
        for (size_t i = gap - before; i < gap; ++i) left.append(left.empty() ? "" : " ").append(run[i]);
        for (size_t i = gap + 1; i <= gap + after; ++i) right.append(right.empty() ? "" : " ").append(run[i]);
        around.emplace_back(left, right);
        words.emplace_back(word);
      }
    if (words.empty()) continue;
    const size_t pick = static_cast<size_t>(random.below(static_cast<int64_t>(words.size())));
    out.passage = passage.text;
    out.references = {words[pick]};
    out.question = fill_template(wording.at("question"), {{"before", around[pick].first}, {"after", around[pick].second}});
    out.cue = wording.at("cue");
    return;
  }
  throw BadInput("task {}: no sentence with a name to ask for in 50 passages of {} tokens", task.name, budget);
}

void TaskMaker::draft(const PromptSpec::Task& task, const PromptSpec::Wording& wording, EvalRandom& random, const Request& request,
                      Draft& out) const {
  if (!task.kind.empty()) {
    out.names["kind"] = spec_.kinds.at(task.kind).name;
    out.names["kinds"] = spec_.kinds.at(task.kind).plural;
  }
  auto names = out.names;
  if (task.wording == "needle") return draft_needles(task, wording, random, request, out);
  if (task.wording == "passkey") {
    out.references = draw_values(random, 1, task.kind);
    const double drawn = random.unit();
    out.needles.push_back({fill_template(wording.at("needle"), {{"value", out.references[0]}}), request.depth.value_or(drawn), true});
  } else if (task.wording == "variables") {
    const size_t size = static_cast<size_t>(task.hops) + 1, chains = static_cast<size_t>(task.chains);
    const auto& letters = spec_.lists.at("letters");
    const auto variables = distinct(chains * size, [&] {
      std::string name;
      for (int i = 0; i < task.letters; ++i) name += random.pick(letters);
      return name;
    });
    const auto values = draw_values(random, chains, task.kind);
    const size_t asked = static_cast<size_t>(random.below(static_cast<int64_t>(chains)));
    for (size_t chain = 0; chain < chains; ++chain) {
      std::vector<double> depths(size);
      for (double& depth : depths) depth = random.unit();
      std::sort(depths.begin(), depths.end());
      for (size_t i = 0; i < size; ++i) {
        const std::string& name = variables[chain * size + i];
        const std::string previous = i ? variables[chain * size + i - 1] : "";
        out.needles.push_back({fill_template(wording.at(i ? "next" : "first"), {{"name", name}, {"value", values[chain]}, {"previous", previous}}),
                               depths[i], false});
        if (chain == asked) out.references.push_back(name);
      }
    }
    names["value"] = values[asked];
    names["count"] = spec_.count_words[size];
  } else if (task.wording == "json") {
    const size_t count = static_cast<size_t>(request.length / 8 + 1);
    out.keys = draw_keys(random, count);
    out.values = draw_values(random, count, task.kind);
    out.entry = "\"{key}\": {value}";
    out.references = {out.values[0]};
    names["key"] = out.keys[0];
  } else {
    const bool frequent = task.wording == "frequent";
    out.keys = distinct(static_cast<size_t>(frequent ? task.words : task.common + task.uncommon_most),
                        [&] { return random.pick(spec_.lists.at("words")); });
    const size_t answers = static_cast<size_t>(frequent ? task.answers : task.common);
    if (answers >= out.keys.size()) throw BadInput("task {}: {} answers among {} words", task.name, answers, out.keys.size());
    out.references.assign(out.keys.begin(), out.keys.begin() + static_cast<std::ptrdiff_t>(answers));
    names["count"] = spec_.count_words[answers];
  }
  out.question = fill_template(wording.at("question"), names);
  out.cue = fill_template(wording.at("cue"), names);
}

TaskMaker::Context TaskMaker::insert_needles(const std::vector<std::string>& sentences, const Draft& draft) const {
  std::vector<size_t> order(draft.needles.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto place = [&](size_t i) { return place_of(draft.needles[i].depth, sentences.size()); };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return place(a) < place(b); });
  Context out;
  size_t asked_at = std::string::npos, next = 0;
  for (size_t s = 0; s < sentences.size(); ++s) {
    out.text += sentences[s];
    for (; next < order.size() && place(order[next]) == s; ++next) {
      if (draft.needles[order[next]].asked) asked_at = out.text.size();
      out.text += " " + draft.needles[order[next]].text;
    }
  }
  if (asked_at != std::string::npos) out.depth = static_cast<double>(asked_at) / static_cast<double>(out.text.size());
  return out;
}

TaskMaker::Context TaskMaker::needles_context(EvalRandom& random, const Request& request, const Draft& draft, int64_t budget) const {
  auto names = draft.entry_names;
  std::vector<std::string> entries;
  int64_t used = 0;
  for (size_t i = 0; i < draft.keys.size(); ++i) {
    names["key"] = draft.keys[i];
    names["value"] = draft.values[i];
    std::string entry = fill_template(draft.entry, names);
    used += tokens(" " + entry);
    if (used > budget) break;
    entries.push_back(std::move(entry));
  }
  if (entries.empty()) return {};
  const std::string asked = entries[0];
  random.shuffle(entries);
  if (request.depth)
    std::iter_swap(std::find(entries.begin(), entries.end(), asked), entries.begin() + static_cast<std::ptrdiff_t>(place_of(*request.depth, entries.size())));
  Context out;
  size_t asked_at = 0;
  for (const std::string& entry : entries) {
    if (entry == asked) asked_at = out.text.size();
    out.text += (out.text.empty() ? "" : " ") + entry;
  }
  out.depth = static_cast<double>(asked_at) / static_cast<double>(out.text.size());
  return out;
}

TaskMaker::Context TaskMaker::json_context(EvalRandom& random, const Request& request, const Draft& draft, int64_t budget) const {
  const int64_t comma = tokens(",\n");
  int64_t used = tokens("{\n") + tokens("\n") + tokens("}");
  std::vector<std::string> entries;
  for (size_t i = 0; i < draft.keys.size(); ++i) {
    std::string entry = fill_template(draft.entry, {{"key", draft.keys[i]}, {"value", draft.values[i]}});
    used += tokens(entry) + (entries.empty() ? 0 : comma);
    if (used > budget) break;
    entries.push_back(std::move(entry));
  }
  if (entries.empty()) return {};
  const std::string asked = entries[0];
  random.shuffle(entries);
  if (request.depth)
    std::iter_swap(std::find(entries.begin(), entries.end(), asked), entries.begin() + static_cast<std::ptrdiff_t>(place_of(*request.depth, entries.size())));
  Context out{"{\n", -1};
  size_t asked_at = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (i) out.text += ",\n";
    if (entries[i] == asked) asked_at = out.text.size();
    out.text += entries[i];
  }
  out.text += "\n}";
  out.depth = static_cast<double>(asked_at) / static_cast<double>(out.text.size());
  return out;
}

TaskMaker::Context TaskMaker::words_context(EvalRandom& random, const std::vector<std::string>& words, const std::vector<int64_t>& counts,
                                            const std::string& separator) const {
  std::vector<size_t> bag;
  for (size_t w = 0; w < counts.size(); ++w) bag.insert(bag.end(), static_cast<size_t>(counts[w]), w);
  random.shuffle(bag);
  Context out;
  for (size_t w : bag) out.text += (out.text.empty() ? "" : separator) + words[w];
  return out;
}

TaskMaker::Context TaskMaker::write_context(const PromptSpec::Task& task, EvalRandom& random, const Request& request, const Draft& draft,
                                            int64_t budget) const {
  if (task.context == "json") return json_context(random, request, draft, budget);
  if (task.context == "needles") return needles_context(random, request, draft, budget);
  if (!draft.passage.empty()) return {draft.passage, -1};

  int64_t room = budget;
  for (const auto& needle : draft.needles) room -= tokens(" " + needle.text);
  if (task.context == "book") {
    if (room < 16) return {};
    const Haystack::Passage passage = books_.passage(random, room, encode_);
    return insert_needles({passage.sentences.begin(), passage.sentences.end()}, draft);
  }
  if (task.context == "noise") {
    const auto& sentences = random.pick(spec_.noise.at(request.split));
    std::vector<std::string> pieces;
    for (int64_t used = 0;;) {
      std::string piece = (pieces.empty() ? "" : " ") + sentences[pieces.size() % sentences.size()];
      used += tokens(piece);
      if (used > room) break;
      pieces.push_back(std::move(piece));
    }
    return pieces.empty() ? Context{} : insert_needles(pieces, draft);
  }

  std::vector<int64_t> sizes;
  for (const std::string& word : draft.keys) sizes.push_back(tokens(" " + word) + (task.context == "list" ? 1 : 0));
  const auto cost = [&](const std::vector<int64_t>& counts) {
    int64_t sum = 0;
    for (size_t i = 0; i < counts.size(); ++i) sum += counts[i] * sizes[i];
    return sum;
  };
  if (task.context == "stream") {
    const size_t answers = static_cast<size_t>(task.answers);
    std::vector<double> share(draft.keys.size());
    double total = 0;
    for (size_t r = 0; r < share.size(); ++r) total += share[r] = std::pow(static_cast<double>(r + 1), -task.exponent);
    const auto counts = [&](int64_t n) {
      std::vector<int64_t> c(share.size());
      for (size_t r = 0; r < c.size(); ++r) c[r] = std::max<int64_t>(1, std::lrint(static_cast<double>(n) * share[r] / total));
      if (c[answers - 1] == c[answers]) ++c[answers - 1];
      return c;
    };
    const int64_t n = largest(budget - 4, budget - 4, [&](int64_t k) { return cost(counts(k)); });
    return cost(counts(n)) > budget ? Context{} : words_context(random, draft.keys, counts(n), " ");
  }
  if (task.context == "list") {
    const auto counts = [&](int64_t n) {
      const int64_t full = int64_t{task.common} * task.common_count + int64_t{task.uncommon_most} * task.uncommon_count;
      const int64_t unit = (n + full - 1) / full;
      const int64_t each = std::max<int64_t>(task.uncommon_count * unit + 1,
                                             std::min<int64_t>(task.common_count * unit, static_cast<int64_t>(0.75 * static_cast<double>(n)) / task.common));
      const int64_t others = std::clamp<int64_t>((n - each * task.common) / (task.uncommon_count * unit), 1, task.uncommon_most);
      std::vector<int64_t> c(static_cast<size_t>(task.common), each);
      c.insert(c.end(), static_cast<size_t>(others), task.uncommon_count * unit);
      return c;
    };
    const int64_t n = largest(budget - 4, budget - 4, [&](int64_t k) { return cost(counts(k)); });
    return cost(counts(n)) > budget ? Context{} : words_context(random, draft.keys, counts(n), ", ");
  }
  throw BadInput("task {}: context \"{}\" is not one this build can write", task.name, task.context);
}

TaskPrompt TaskMaker::make(const Request& request) const {
  const PromptSpec::Task& task = spec_.task(request.task);
  const auto& splits = spec_.wordings.at(task.wording);
  if (!splits.contains(request.split) || !spec_.noise.contains(request.split))
    throw BadInput("there are no \"{}\" wordings for task {}; usual are train and held_out", request.split, task.name);
  if (request.depth && !takes_depth(task.name)) throw BadInput("task {} asks for several needles; a depth cannot be chosen for it", task.name);
  if (request.depth && !(*request.depth >= 0 && *request.depth <= 1)) throw BadInput("depth {} is outside 0 … 1", *request.depth);

  // A tokenizer that merges across the seams can overshoot; then the context gives up the excess.
  int64_t excess = 0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    EvalRandom random{seed_, hash_name(task.name), static_cast<uint64_t>(request.length), static_cast<uint64_t>(request.index),
                      hash_name(request.split)};
    const PromptSpec::Wording& wording = random.pick(splits.at(request.split));
    const int64_t room = request.length - task.new_tokens - static_cast<int64_t>(before_.size()) - excess;
    Draft parts;
    std::map<std::string, std::string> texts;
    const auto budget_for = [&] {
      texts = {{"intro", fill_template(wording.at("intro"), parts.names)}, {"context", ""}, {"question", parts.question}, {"cue", parts.cue}};
      const int64_t budget = room - tokens(fill_template(spec_.layout, texts));
      if (budget < 16)
        throw BadInput("task {}: a length of {} tokens leaves {} for the context, at least 16 are needed", task.name, request.length, budget);
      return budget;
    };
    if (task.wording == "qa") {
      constexpr int64_t kQuestion = 64;  // a gap with its words is shorter than this, cue included
      draft_qa(task, wording, random, budget_for() - kQuestion, parts);
    } else {
      draft(task, wording, random, request, parts);
    }
    const int64_t budget = budget_for();
    Context context = write_context(task, random, request, parts, budget);
    if (context.text.empty()) throw BadInput("task {}: {} tokens of context cannot hold its entries; ask for a longer prompt", task.name, budget);

    TaskPrompt out;
    texts["context"] = std::move(context.text);
    out.text = fill_template(spec_.layout, texts);
    out.ids = before_;
    const std::vector<int32_t> ids = encode_(out.text);
    out.ids.insert(out.ids.end(), ids.begin(), ids.end());
    const int64_t over = static_cast<int64_t>(out.ids.size()) + task.new_tokens - request.length;
    if (over > 0) {
      excess += over + attempt;
      continue;
    }
    const std::string asked = spec_.layout.substr(std::min(spec_.layout.find("{question}"), spec_.layout.size()));
    out.question_at = static_cast<int64_t>(out.ids.size()) - tokens(fill_template(asked, texts));
    out.task = task.name;
    out.length = request.length;
    out.index = request.index;
    out.references = parts.references;
    out.answer = fill_template(spec_.answer, {{"answer", join(parts.references)}});
    out.rule = MatchRule::kShare;
    out.new_tokens = task.new_tokens;
    out.depth = context.depth;
    out.asked_depth = request.depth.value_or(-1);
    return out;
  }
  throw BadInput("task {}: no prompt of {} tokens could be fitted with this tokenizer", task.name, request.length);
}

TaskPrompt from_jsonl(const JsonlPrompt& line, const std::string& task, const EncodeFn& encode, const std::vector<int32_t>& before,
                      MatchRule rule, int64_t new_tokens) {
  TaskPrompt out;
  out.task = task;
  out.length = line.length;
  out.index = line.index;
  out.text = line.input + line.answer_prefix;
  out.ids = before;
  const std::vector<int32_t> ids = encode(out.text);
  out.ids.insert(out.ids.end(), ids.begin(), ids.end());
  out.question_at = static_cast<int64_t>(out.ids.size());
  out.references = line.outputs;
  out.rule = rule;
  out.new_tokens = new_tokens;
  out.one_line = false;
  return out;
}

}  // namespace lacuna
