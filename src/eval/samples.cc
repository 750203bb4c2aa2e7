#include "eval/samples.h"

#include <algorithm>
#include <map>
#include <numbers>
#include <set>

#include "models/forward.h"

namespace lacuna {
namespace {

using Words = std::vector<std::string>;

Words words_of(const std::string& text) {
  Words words;
  std::string word;
  for (char c : text + " ") {
    if (std::isspace(static_cast<unsigned char>(c))) {
      if (!word.empty()) words.push_back(std::move(word));
      word.clear();
    } else {
      word += c;
    }
  }
  return words;
}

std::vector<Words> grams(const Words& words, size_t n) {
  std::vector<Words> out;
  for (size_t i = 0; i + n <= words.size(); ++i) out.emplace_back(words.begin() + static_cast<int64_t>(i), words.begin() + static_cast<int64_t>(i + n));
  return out;
}

double ratio(double a, double b) { return b > 0 ? a / b : 0; }

}  // namespace

std::vector<SamplePrompt> cut_prompts(const TextCodec& codec, const std::vector<std::string>& texts, int64_t count, int64_t prompt_tokens,
                                      int64_t reference_tokens) {
  const auto before = static_cast<int64_t>(codec.before.size());
  if (prompt_tokens <= before) throw BadInput("prompts of {} tokens; the text's own start takes {}", prompt_tokens, before);
  std::vector<SamplePrompt> out;
  for (const auto& ids : spread_windows(codec, texts, prompt_tokens + reference_tokens, count)) {
    const std::span<const int32_t> all(ids);
    const auto prompt = all.first(static_cast<size_t>(prompt_tokens));
    out.push_back({{prompt.begin(), prompt.end()}, codec.decode(prompt.subspan(codec.before.size())), codec.decode(all.subspan(prompt.size()))});
  }
  return out;
}

double Judge::bits(const std::string& prompt, const std::string& text) {
  std::vector<int32_t> before = codec_.before;
  const std::vector<int32_t> read = codec_.encode(prompt), ids = codec_.encode(text);
  before.insert(before.end(), read.begin(), read.end());
  if (ids.empty()) return 0;
  if (before.empty()) throw BadInput("the judge has no begin-of-text id, so the prompt may not be empty");
  const auto total = static_cast<int64_t>(before.size() + ids.size());
  if (total > model_.info().max_positions)
    throw BadInput("prompt and text have {} tokens of the judge; it has {} positions", total, model_.info().max_positions);
  const int64_t vocab = model_.info().vocab;
  std::vector<float> logits(ids.size() * static_cast<size_t>(vocab));
  SequenceState state = model_.new_state(ctx_.memory, kv_);
  prefill(ctx_, model_, state, before, nullptr, prefill_, logits.data());
  if (ids.size() > 1) prefill(ctx_, model_, state, std::span(ids).first(ids.size() - 1), nullptr, prefill_, nullptr, logits.data() + vocab);
  double nats = 0;
  for (size_t i = 0; i < ids.size(); ++i) nats += negative_log_likelihood(logits.data() + static_cast<int64_t>(i) * vocab, vocab, ids[i]);
  return nats / std::numbers::ln2;
}

TextMeasures measure_texts(const std::vector<std::string>& texts, const std::vector<std::string>& references) {
  LACUNA_CHECK(texts.size() == references.size());
  TextMeasures out;
  std::set<Words> seen[3];
  double total[3] = {};
  int64_t with_4grams = 0, with_words = 0;
  for (size_t t = 0; t < texts.size(); ++t) {
    const Words words = words_of(texts[t]), reference = words_of(references[t]);
    out.empty += words.empty();
    for (size_t n = 1; n <= 3; ++n)
      for (Words& gram : grams(words, n)) {
        ++total[n - 1];
        seen[n - 1].insert(std::move(gram));
      }
    const std::vector<Words> fours = grams(words, 4);
    if (!fours.empty()) {
      out.repeated += 1 - static_cast<double>(std::set<Words>(fours.begin(), fours.end()).size()) / static_cast<double>(fours.size());
      ++with_4grams;
    }
    if (words.empty()) continue;
    ++with_words;
    for (size_t n = 1; n <= 2; ++n) {
      std::map<Words, int64_t> left;
      for (Words& gram : grams(reference, n)) ++left[std::move(gram)];
      const std::vector<Words> own = grams(words, n);
      int64_t hits = 0;
      for (const Words& gram : own)
        if (const auto it = left.find(gram); it != left.end() && it->second > 0) --it->second, ++hits;
      out.overlap[n - 1] += ratio(static_cast<double>(hits), static_cast<double>(own.size()));
    }
  }
  for (size_t n = 0; n < 3; ++n) out.distinct[n] = ratio(static_cast<double>(seen[n].size()), total[n]);
  for (double& o : out.overlap) o = ratio(o, static_cast<double>(with_words));
  out.repeated = ratio(out.repeated, static_cast<double>(with_4grams));
  out.empty = ratio(out.empty, static_cast<double>(texts.size()));
  return out;
}

namespace {

// What is known of a row once its texts are there.
void finish_row(SampleResult& row, const std::vector<SamplePrompt>& prompts, Judge* judge) {
  row.prompts = static_cast<int64_t>(prompts.size());
  std::vector<std::string> references;
  std::vector<double> rates;
  double bits = 0, bytes = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    references.push_back(prompts[i].reference);
    if (!judge || row.outputs[i].empty()) continue;
    const double own = judge->bits(prompts[i].text, row.outputs[i]);
    bits += own;
    bytes += static_cast<double>(row.outputs[i].size());
    rates.push_back(own / static_cast<double>(row.outputs[i].size()));
  }
  row.judged = !rates.empty();
  if (row.judged) row.bits_per_byte = bootstrap_interval(rates);
  row.all_bits_per_byte = ratio(bits, bytes);
  row.texts = measure_texts(row.outputs, references);
}

}  // namespace

SampleResult measure_samples(Generator& generator, const std::vector<SamplePrompt>& prompts, const SamplingParams& sampling, int64_t batch,
                             Judge* judge, const GenerateCallbacks& callbacks, const std::function<void(int64_t, int64_t)>& progress) {
  SampleResult row;
  int64_t decoded = 0, passes = 0;
  for (size_t at = 0; at < prompts.size(); at += static_cast<size_t>(batch)) {
    std::vector<GenerateRequest> requests;
    for (size_t i = at; i < std::min(prompts.size(), at + static_cast<size_t>(batch)); ++i) {
      GenerateRequest& r = requests.emplace_back();
      r.prompt = prompts[i].ids;
      r.sampling = sampling;
      r.sampling.seed = sampling.seed + i;
    }
    for (GenerateResult& r : generator.generate(requests, callbacks)) {
      row.tokens += static_cast<int64_t>(r.ids.size());
      row.prefill_seconds += r.prefill_seconds;
      row.ended += r.finish == FinishReason::kEndOfText || r.finish == FinishReason::kStopString;
      row.outputs.push_back(std::move(r.text));
    }
    row.decode_seconds += generator.stats().decode_seconds;
    decoded += generator.stats().decode_tokens;
    passes += generator.stats().decode_steps;
    if (progress) progress(static_cast<int64_t>(row.outputs.size()), static_cast<int64_t>(prompts.size()));
  }
  row.ended = ratio(row.ended, static_cast<double>(prompts.size()));
  row.tokens_per_second = ratio(static_cast<double>(decoded), row.decode_seconds);
  row.tokens_per_pass = ratio(static_cast<double>(decoded), static_cast<double>(passes));
  finish_row(row, prompts, judge);
  return row;
}

SampleResult measure_references(const std::vector<SamplePrompt>& prompts, Judge* judge) {
  SampleResult row;
  row.label = "the text itself";
  for (const SamplePrompt& p : prompts) row.outputs.push_back(p.reference);
  finish_row(row, prompts, judge);
  return row;
}

namespace {

std::vector<std::vector<std::string>> table(const std::vector<SampleResult>& results) {
  std::vector<std::vector<std::string>> rows = {{"", "bits a byte", "95 % interval", "distinct 1", "distinct 2", "repeated 4-grams %",
                                                 "overlap 1 %", "overlap 2 %", "ended %", "empty %", "tokens", "tokens/s", "tokens a pass"}};
  for (const SampleResult& r : results) {
    const bool made = r.decode_seconds > 0;
    rows.push_back({r.label, r.judged ? fmt::format("{:.3f}", r.bits_per_byte.value) : "",
                    r.judged ? fmt::format("[{:.3f}, {:.3f}]", r.bits_per_byte.low, r.bits_per_byte.high) : "",
                    fmt::format("{:.3f}", r.texts.distinct[0]), fmt::format("{:.3f}", r.texts.distinct[1]),
                    fmt::format("{:.1f}", 100 * r.texts.repeated), fmt::format("{:.1f}", 100 * r.texts.overlap[0]),
                    fmt::format("{:.1f}", 100 * r.texts.overlap[1]), made ? fmt::format("{:.0f}", 100 * r.ended) : "",
                    fmt::format("{:.0f}", 100 * r.texts.empty), made ? fmt::format("{}", r.tokens) : "",
                    made ? fmt::format("{:.1f}", r.tokens_per_second) : "", made ? fmt::format("{:.2f}", r.tokens_per_pass) : ""});
  }
  return rows;
}

}  // namespace

std::string markdown_report(const std::vector<SampleResult>& results) { return markdown_table(table(results)); }

Json json_report(const std::vector<SampleResult>& results) {
  Json out = {{"kind", "samples"}};
  for (const SampleResult& r : results) {
    Json row = {{"label", r.label}, {"prompts", r.prompts}, {"tokens", r.tokens}, {"distinct", r.texts.distinct},
                {"repeated_4grams", r.texts.repeated}, {"overlap", r.texts.overlap}, {"empty", r.texts.empty}, {"texts", r.outputs}};
    if (r.judged)
      row["bits_per_byte"] = {{"value", r.bits_per_byte.value}, {"low", r.bits_per_byte.low}, {"high", r.bits_per_byte.high},
                              {"count", r.bits_per_byte.count}, {"all", r.all_bits_per_byte}};
    if (r.decode_seconds > 0) {
      row["ended"] = r.ended;
      row["prefill_seconds"] = r.prefill_seconds;
      row["decode_seconds"] = r.decode_seconds;
      row["tokens_per_second"] = r.tokens_per_second;
      row["tokens_per_pass"] = r.tokens_per_pass;
    }
    out["rows"].push_back(row);
  }
  return out;
}

std::string html_report(const std::vector<SampleResult>& results, const std::vector<SamplePrompt>& prompts, const std::string& title) {
  std::string body = html_table(table(results));
  for (size_t i = 0; i < std::min<size_t>(prompts.size(), 20); ++i) {
    body += fmt::format("<h2>Prompt {}</h2>\n<p class=\"soft\">{}</p>\n", i + 1, html_escape(prompts[i].text));
    std::vector<std::vector<std::string>> rows = {{"", "text"}};
    for (const SampleResult& r : results) rows.push_back({r.label, r.outputs[i]});
    body += html_table(rows, true);
  }
  return html_page(title, body);
}

}  // namespace lacuna
