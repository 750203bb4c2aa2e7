#include "subject.h"

#include <algorithm>

namespace lacuna::cli {
namespace {

TextCodec make_codec(const ModelText& text) {
  const Tokenizer& tokenizer = *text.tokenizer;
  TextCodec codec;
  codec.encode = [&tokenizer](std::string_view t) { return tokenizer.encode(t, false); };
  codec.decode = [&tokenizer](std::span<const int32_t> ids) { return tokenizer.decode(ids); };
  // Whatever the tokenizer's files put in front of a text; what they put after it would end the prompt.
  const std::vector<int32_t> plain = tokenizer.encode("a", false), marked = tokenizer.encode("a", true);
  const auto at = std::search(marked.begin(), marked.end(), plain.begin(), plain.end());
  codec.before.assign(marked.begin(), at);
  codec.end = text.end_ids;
  if (codec.end.empty() && tokenizer.eos_id()) codec.end = {*tokenizer.eos_id()};
  return codec;
}

}  // namespace

Subject::Subject(const EngineOptions& options, Takes takes, std::string_view why_not)
    : engine(options, takes, why_not), text(open_text(options.model_dir)), codec(make_codec(text)) {}

void print_json(const Json& json) { print_out(json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"); }

}  // namespace lacuna::cli
