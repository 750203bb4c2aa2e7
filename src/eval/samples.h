#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/fidelity.h"
#include "eval/report.h"
#include "generate/generator.h"

namespace lacuna {

// A stretch of a text: its beginning is asked with, its rest held against what comes out.
struct SamplePrompt {
  std::vector<int32_t> ids;  // codec.before included
  std::string text, reference;
};
// `count` at most, evenly spread over the texts: prompt_tokens in front of reference_tokens.
std::vector<SamplePrompt> cut_prompts(const TextCodec& codec, const std::vector<std::string>& texts, int64_t count,
                                      int64_t prompt_tokens, int64_t reference_tokens);

// An autoregressive model's opinion of a text: what it would pay to be told it, given what stands before.
class Judge {
 public:
  Judge(Context& ctx, Model& model, TextCodec codec, KvOptions kv, PrefillOptions prefill)
      : ctx_(ctx), model_(model), codec_(std::move(codec)), kv_(kv), prefill_(std::move(prefill)) {}
  // −log p(text | prompt) in bits; the two are tokenized apart. BadInput where they pass the model's positions.
  double bits(const std::string& prompt, const std::string& text);

 private:
  Context& ctx_;
  Model& model_;
  TextCodec codec_;
  KvOptions kv_;
  PrefillOptions prefill_;
};

// Of texts alone. Words are what white space separates, so that models with different tokenizers compare.
struct TextMeasures {
  double distinct[3] = {};       // 1-, 2-, 3-grams of words: different ones over all, of all texts together
  double repeated = 0;           // share of 4-grams that stood in the same text before, mean over texts
  double overlap[2] = {};        // share of 1-, 2-grams that the reference has as often (clipped), mean over texts
  double empty = 0;              // share of texts without a word
};
TextMeasures measure_texts(const std::vector<std::string>& texts, const std::vector<std::string>& references);

struct SampleResult {
  std::string label;             // "16 steps, guidance 7", "reference", …
  int64_t prompts = 0, tokens = 0;
  bool judged = false;
  Interval bits_per_byte;        // the judge's, over prompts that got a text
  double all_bits_per_byte = 0;  // all bits over all bytes
  TextMeasures texts;
  double prefill_seconds = 0, decode_seconds = 0;
  double tokens_per_second = 0;  // decode
  double tokens_per_pass = 0;    // … and by passes over the weights
  double ended = 0;              // share that met an end-of-text id or stop string
  std::vector<std::string> outputs;
};

// Every prompt through the generator, `batch` at a time, each with the seed sampling.seed + its index.
SampleResult measure_samples(Generator& generator, const std::vector<SamplePrompt>& prompts, const SamplingParams& sampling, int64_t batch,
                             Judge* judge, const GenerateCallbacks& callbacks = {},
                             const std::function<void(int64_t done, int64_t total)>& progress = {});
// The references themselves, as a row to compare with.
SampleResult measure_references(const std::vector<SamplePrompt>& prompts, Judge* judge);

std::string markdown_report(const std::vector<SampleResult>& results);
Json json_report(const std::vector<SampleResult>& results);
// One page: the table and the first texts of every row.
std::string html_report(const std::vector<SampleResult>& results, const std::vector<SamplePrompt>& prompts, const std::string& title);

}  // namespace lacuna
