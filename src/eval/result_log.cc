#include "eval/result_log.h"

#include <cerrno>
#include <cmath>
#include <cstring>

namespace lacuna {
namespace {

constexpr int kFormat = 1;

const char* first_token_name(FirstToken f) { return f == FirstToken::kDense ? "dense" : "rerun"; }

EvalHeader read_header(const Json& json) {
  EvalHeader out;
  if (json.at("format").get<int>() != kFormat)
    throw CorruptData("the log has format {}, this build reads {}", json.at("format").get<int>(), kFormat);
  out.model = json.at("model").get<std::string>();
  out.activations = json.at("activations").get<std::string>();
  out.kv_dtype = json.at("kv_dtype").get<std::string>();
  out.wordings = json.at("wordings").get<std::string>();
  out.haystack = json.at("haystack").get<std::string>();
  out.seed = json.at("seed").get<uint64_t>();
  out.query_agnostic = json.at("query_agnostic").get<bool>();
  out.first_token = json.at("first_token").get<std::string>() == "rerun" ? FirstToken::kRerun : FirstToken::kDense;
  out.variants = json.at("variants").get<std::vector<std::string>>();
  return out;
}

PromptResult read_result(const Json& json, size_t variants) {
  PromptResult out;
  out.task = json.at("task").get<std::string>();
  out.length = json.at("length").get<int64_t>();
  out.index = json.at("index").get<int64_t>();
  out.depth = json.at("depth").get<double>();
  out.asked_depth = json.at("asked_depth").get<double>();
  out.prompt_tokens = json.at("prompt_tokens").get<int64_t>();
  out.full_bytes = json.at("full_bytes").get<size_t>();
  out.prefill_seconds = json.at("prefill_seconds").get<double>();
  out.score_seconds = json.at("score_seconds").get<double>();
  out.decode_seconds = json.at("decode_seconds").get<double>();
  const Json& list = json.at("variants");
  if (!list.is_array() || list.size() != variants) throw CorruptData("{} variants, the header has {}", list.size(), variants);
  for (const Json& v : list)
    out.variants.push_back({v.at("score").get<double>(), v.at("answer").get<std::string>(), v.at("kv_bytes").get<size_t>(),
                            v.at("kv_slots").get<int64_t>()});
  return out;
}

struct Parsed {
  EvalRun run;
  size_t good_bytes = 0;  // up to the end of the last whole line
};

Parsed parse_log(const std::string& text, const std::string& name) {
  Parsed out;
  int64_t line = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find('\n', at);
    if (end == std::string::npos) break;  // cut off while it was written
    ++line;
    const std::string where = fmt::format("{}:{}", name, line);
    const Json json = parse_json(std::string_view(text).substr(at, end - at), where);
    try {
      if (line == 1) out.run.header = read_header(json);
      else out.run.results.push_back(read_result(json, out.run.header.variants.size()));
    } catch (const Json::exception& e) {
      throw CorruptData("{}: not a line of an evaluation log: {}", where, e.what());
    } catch (const CorruptData& e) {
      throw CorruptData("{}: {}", where, e.what());
    }
    at = out.good_bytes = end + 1;
  }
  return out;
}

}  // namespace

Json header_json(const EvalHeader& h) {
  return {{"format", kFormat},
          {"model", h.model},
          {"activations", h.activations},
          {"kv_dtype", h.kv_dtype},
          {"wordings", h.wordings},
          {"haystack", h.haystack},
          {"seed", h.seed},
          {"query_agnostic", h.query_agnostic},
          {"first_token", first_token_name(h.first_token)},
          {"variants", h.variants}};
}

Json result_json(const PromptResult& r) {
  Json variants = Json::array();
  for (const VariantResult& v : r.variants)
    variants.push_back({{"score", v.score}, {"answer", v.answer}, {"kv_bytes", v.kv_bytes}, {"kv_slots", v.kv_slots}});
  return {{"task", r.task},
          {"length", r.length},
          {"index", r.index},
          {"depth", r.depth},
          {"asked_depth", r.asked_depth},
          {"prompt_tokens", r.prompt_tokens},
          {"full_bytes", r.full_bytes},
          {"prefill_seconds", r.prefill_seconds},
          {"score_seconds", r.score_seconds},
          {"decode_seconds", r.decode_seconds},
          {"variants", variants}};
}

ResultLog::Key ResultLog::key(const std::string& task, int64_t length, int64_t index, double asked_depth) {
  return {task, length, index, std::llround(asked_depth * 1e6)};
}

ResultLog::ResultLog(const std::filesystem::path& path, const EvalHeader& header) : path_(path) {
  run_.header = header;
  if (path.empty()) return;
  std::error_code failed;
  // A log is read back before it is continued, which a device or a pipe cannot promise.
  if (std::filesystem::exists(path, failed) && !std::filesystem::is_regular_file(path, failed))
    throw BadInput("{} is not a regular file; a log that can be continued needs one", path.string());
  if (std::filesystem::exists(path, failed) && std::filesystem::file_size(path, failed) > 0) {
    Parsed old = parse_log(read_text_file(path), path.string());
    if (old.good_bytes > 0) {
      const Json before = header_json(old.run.header), now = header_json(header);
      for (const auto& item : now.items())
        if (before[item.key()] != item.value())
          throw BadInput("{} was begun with {} = {}, this run has {}; give another --log or remove the file", path.string(), item.key(),
                         json_excerpt(before[item.key()]), json_excerpt(item.value()));
      run_ = std::move(old.run);
      for (const PromptResult& r : run_.results) done_.insert(key(r.task, r.length, r.index, r.asked_depth));
    }
    std::filesystem::resize_file(path, old.good_bytes, failed);
    if (failed) throw IoError("cannot write {}: {}", path.string(), failed.message());
  }
  errno = 0;
  file_ = std::fopen(path.c_str(), "ab");
  if (!file_) throw IoError("cannot open {} for writing: {}", path.string(), std::strerror(errno));
  if (done_.empty() && run_.results.empty() && std::filesystem::file_size(path, failed) == 0) write_line(header_json(header).dump());
}

ResultLog::~ResultLog() {
  if (file_) std::fclose(file_);
}

void ResultLog::write_line(const std::string& line) {
  errno = 0;
  if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fputc('\n', file_) == EOF || std::fflush(file_) != 0)
    throw IoError("cannot write {} ({} bytes): {}", path_.string(), line.size(), std::strerror(errno));
}

bool ResultLog::has(const std::string& task, int64_t length, int64_t index, double asked_depth) const {
  return done_.contains(key(task, length, index, asked_depth));
}

void ResultLog::append(PromptResult result) {
  if (file_) write_line(result_json(result).dump());
  done_.insert(key(result.task, result.length, result.index, result.asked_depth));
  run_.results.push_back(std::move(result));
}

EvalRun read_result_log(const std::filesystem::path& path) {
  Parsed parsed = parse_log(read_text_file(path), path.string());
  if (parsed.good_bytes == 0) throw CorruptData("{}: no header line", path.string());
  return std::move(parsed.run);
}

}  // namespace lacuna
