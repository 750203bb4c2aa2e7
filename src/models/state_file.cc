#include "models/state_file.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <fmt/ranges.h>

#include "formats/json.h"
#include "formats/safetensors.h"
#include "formats/safetensors_writer.h"
#include "models/forward.h"

namespace lacuna {
namespace {

constexpr const char* kFormat = "lacuna-state-1";
constexpr int64_t kProbeTokens = 8, kProbeLogits = 256;
// Rounding by other kernels, threads or operand types stays below a few percent; other weights are apart by the
// logits' own size.
constexpr double kProbeTolerance = 0.1;

std::string kv_name(int layer, int head, const char* part) { return fmt::format("kv.{}.{}.{}", layer, head, part); }
std::string state_name(int layer) { return fmt::format("state.{}", layer); }

std::vector<float> probe(Context& ctx, Model& model) {
  const int64_t vocab = model.info().vocab;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < kProbeTokens; ++i) ids.push_back(static_cast<int32_t>((i * 7919 + 1) % vocab));
  KvOptions options;
  SequenceState state = model.new_state(ctx.memory, options);
  std::vector<float> logits(static_cast<size_t>(vocab));
  prefill(ctx, model, state, ids, nullptr, {}, logits.data());
  logits.resize(static_cast<size_t>(std::min(vocab, kProbeLogits)));
  return logits;
}

// Parts of a KV head's slots as they lie in its pages.
struct Part {
  const char* name;
  DType dtype;
  int64_t width;  // elements of a slot; 0: one, without a dimension of its own
  size_t offset;
  size_t bytes() const { return dtype_size(dtype) * static_cast<size_t>(std::max<int64_t>(1, width)); }
};

std::vector<Part> parts_of(const KvLayout& l) {
  std::vector<Part> parts = {{"k", l.dtype, l.head_dim, l.k_offset()},
                             {"v", l.dtype, l.head_dim, l.v_offset()},
                             {"position", DType::kI32, 0, l.position_offset()}};
  if (l.dtype == DType::kI8) {
    parts.push_back({"k_scale", DType::kF32, 0, l.k_scale_offset()});
    parts.push_back({"v_scale", DType::kF32, 0, l.v_scale_offset()});
  }
  return parts;
}

std::vector<int64_t> shape_of(const Part& part, int64_t slots) {
  return part.width > 0 ? std::vector<int64_t>{slots, part.width} : std::vector<int64_t>{slots};
}

std::string shown(const std::vector<int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

// A file being read: every tensor is asked for once, with its dtype and shape.
class Reader {
 public:
  explicit Reader(SafetensorsFile file) : file_(std::move(file)) {
    const auto format = file_.metadata().find("format");
    if (format == file_.metadata().end() || format->second != kFormat)
      throw CorruptData("{}: metadata 'format': found {}, expected \"{}\", which --save-state writes", file_.name(),
                        format == file_.metadata().end() ? "nothing" : "\"" + name_excerpt(format->second) + "\"", kFormat);
  }

  const std::string& name() const { return file_.name(); }
  std::string text(const char* key) const {
    const auto found = file_.metadata().find(key);
    return found == file_.metadata().end() ? "" : found->second;
  }
  const SafetensorsFile::Entry& find(const std::string& tensor) {
    const auto found = file_.entries().find(tensor);
    if (found == file_.entries().end()) throw CorruptData("{}: found no tensor '{}', which a saved state has", name(), tensor);
    ++asked_;
    return found->second;
  }
  const std::byte* get(const std::string& tensor, DType dtype, const std::vector<int64_t>& shape) {
    const SafetensorsFile::Entry& e = find(tensor);
    if (e.dtype != dtype || e.shape != shape)
      throw CorruptData("{}: tensor '{}': found {} {}, expected {} {}", name(), tensor, dtype_name(e.dtype), shown(e.shape),
                        dtype_name(dtype), shown(shape));
    if (dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16) {
      const int64_t n = static_cast<int64_t>(e.data.size() / dtype_size(dtype));
      if (n > 0) check_finite(Tensor(const_cast<std::byte*>(e.data.data()), dtype, {n}), tensor, name());
    }
    return e.data.data();
  }
  void expect_all_asked() const {
    if (asked_ != file_.entries().size())
      throw CorruptData("{}: found {} tensors, expected the {} of a saved state of this model", name(), file_.entries().size(), asked_);
  }

 private:
  SafetensorsFile file_;
  size_t asked_ = 0;
};

void check_model(Context& ctx, Model& model, Reader& file) {
  const ModelInfo& info = model.info();
  const std::pair<const char*, std::string> fields[] = {{"architecture", info.architecture},
                                                        {"layers", std::to_string(info.layers)},
                                                        {"hidden", std::to_string(info.hidden)},
                                                        {"vocab", std::to_string(info.vocab)}};
  for (const auto& [key, expected] : fields)
    if (file.text(key) != expected)
      throw BadInput("{}: the state was saved by another model: metadata '{}': found \"{}\", expected \"{}\"", file.name(), key,
                     name_excerpt(file.text(key)), expected);
  const std::vector<float> ours = probe(ctx, model);
  const auto* theirs = reinterpret_cast<const float*>(file.get("probe", DType::kF32, {static_cast<int64_t>(ours.size())}));
  double apart = 0, size = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    apart += std::pow(double{ours[i]} - theirs[i], 2);
    size += double{ours[i]} * ours[i];
  }
  if (!(apart <= kProbeTolerance * kProbeTolerance * size))
    throw BadInput("{}: the state was saved with other weights: the logits of its probe are {:.0f} % away from this model's, "
                   "expected at most {:.0f} %", file.name(), 100 * std::sqrt(apart / std::max(size, 1e-300)), 100 * kProbeTolerance);
}

void load_head(KvCache& kv, int layer, int head, int64_t next_position, Reader& file) {
  const SafetensorsFile::Entry& positions = file.find(kv_name(layer, head, "position"));
  if (positions.dtype != DType::kI32 || positions.shape.size() != 1)
    throw CorruptData("{}: tensor '{}': found {} {}, expected i32 [slots]", file.name(), kv_name(layer, head, "position"),
                      dtype_name(positions.dtype), shown(positions.shape));
  const int64_t slots = positions.shape[0];
  const auto* position = reinterpret_cast<const int32_t*>(positions.data.data());
  for (int64_t i = 0; i < slots; ++i)
    if (position[i] < (i > 0 ? position[i - 1] + int64_t{1} : 0) || position[i] >= next_position)
      throw CorruptData("{}: tensor '{}': found position {} at slot {}, expected ascending positions below {}", file.name(),
                        kv_name(layer, head, "position"), position[i], i, next_position);
  const KvLayout& l = kv.layout(layer);
  std::vector<const std::byte*> data;
  const std::vector<Part> parts = parts_of(l);
  for (const Part& part : parts)
    data.push_back(part.offset == l.position_offset() ? positions.data.data()
                                                      : file.get(kv_name(layer, head, part.name), part.dtype, shape_of(part, slots)));
  kv.fill(layer, head, slots, [&](std::byte* page, int64_t first, int64_t count) {
    for (size_t p = 0; p < parts.size(); ++p)
      std::copy_n(data[p] + static_cast<size_t>(first) * parts[p].bytes(), static_cast<size_t>(count) * parts[p].bytes(),
                  page + parts[p].offset);
  });
}

DType kv_dtype(const Reader& file) {
  for (const DType t : {DType::kF32, DType::kBF16, DType::kI8})
    if (file.text("kv_dtype") == dtype_name(t)) return t;
  throw CorruptData("{}: metadata 'kv_dtype': found \"{}\", expected f32, bf16 or int8", file.name(),
                    name_excerpt(file.text("kv_dtype")));
}

}  // namespace

void save_state(Context& ctx, Model& model, const SequenceState& state, std::span<const int32_t> ids,
                const std::filesystem::path& path) {
  LACUNA_CHECK(static_cast<int64_t>(ids.size()) == state.next_position);
  const ModelInfo& info = model.info();
  const std::vector<float> logits = probe(ctx, model);
  std::vector<SafetensorsWriter::Spec> specs = {{"ids", DType::kI32, {state.next_position}},
                                                {"probe", DType::kF32, {static_cast<int64_t>(logits.size())}}};
  const KvCache& kv = state.kv;
  for (int l = 0; l < info.layers; ++l) {
    if (state.recurrent.has(l)) {
      const RecurrentShape::Layer& s = state.recurrent.shape().layers[static_cast<size_t>(l)];
      specs.push_back({state_name(l), DType::kF32, {s.heads, s.key_dim, s.value_dim}});
    }
    for (int h = 0; h < kv.kv_heads(l); ++h)
      for (const Part& part : parts_of(kv.layout(l)))
        specs.push_back({kv_name(l, h, part.name), part.dtype, shape_of(part, kv.length(l, h))});
  }
  SafetensorsWriter writer(path, specs,
                           {{"format", kFormat},
                            {"architecture", info.architecture},
                            {"layers", std::to_string(info.layers)},
                            {"hidden", std::to_string(info.hidden)},
                            {"vocab", std::to_string(info.vocab)},
                            {"kv_dtype", std::string(dtype_name(kv.shape().dtype))}});
  writer.write("ids", ids.data(), ids.size_bytes());
  writer.write("probe", logits.data(), logits.size() * sizeof(float));
  for (int l = 0; l < info.layers; ++l) {
    if (state.recurrent.has(l))
      writer.write(state_name(l), state.recurrent.at(l), static_cast<size_t>(state.recurrent.elements(l)) * sizeof(float));
    for (int h = 0; h < kv.kv_heads(l); ++h) {
      const KvHeadView& view = kv.view(l, h);
      const int64_t page_slots = kv.layout(l).page_slots;
      for (const Part& part : parts_of(kv.layout(l)))
        for (int64_t first = 0; first < view.length; first += page_slots)
          writer.write(kv_name(l, h, part.name), view.pages[first / page_slots] + part.offset,
                       static_cast<size_t>(std::min(page_slots, view.length - first)) * part.bytes());
    }
  }
  writer.commit();
}

StoredState load_state(Context& ctx, Model& model, int page_slots, const std::filesystem::path& path) {
  return load_state(ctx, model, page_slots, SafetensorsFile(path));
}

StoredState load_state(Context& ctx, Model& model, int page_slots, SafetensorsFile safetensors) {
  Reader file(std::move(safetensors));
  check_model(ctx, model, file);
  const ModelInfo& info = model.info();
  KvOptions options;
  options.dtype = kv_dtype(file);
  options.page_slots = page_slots;
  StoredState out{model.new_state(ctx.memory, options), {}};

  const SafetensorsFile::Entry& ids = file.find("ids");
  if (ids.dtype != DType::kI32 || ids.shape.size() != 1)
    throw CorruptData("{}: tensor 'ids': found {} {}, expected i32 [tokens]", file.name(), dtype_name(ids.dtype), shown(ids.shape));
  if (ids.shape[0] > info.max_positions)
    throw CorruptData("{}: tensor 'ids': found {} tokens, expected at most the model's {} positions", file.name(), ids.shape[0],
                      info.max_positions);
  const auto* id = reinterpret_cast<const int32_t*>(ids.data.data());
  out.ids.assign(id, id + ids.shape[0]);
  for (size_t i = 0; i < out.ids.size(); ++i)
    if (out.ids[i] < 0 || out.ids[i] >= info.vocab)
      throw CorruptData("{}: tensor 'ids': found id {} at index {}, expected one of {} entries", file.name(), out.ids[i], i, info.vocab);
  out.state.next_position = ids.shape[0];

  for (int l = 0; l < info.layers; ++l) {
    if (out.state.recurrent.has(l)) {
      const RecurrentShape::Layer& s = out.state.recurrent.shape().layers[static_cast<size_t>(l)];
      const std::byte* data = file.get(state_name(l), DType::kF32, {s.heads, s.key_dim, s.value_dim});
      std::copy_n(reinterpret_cast<const float*>(data), out.state.recurrent.elements(l), out.state.recurrent.at(l));
    }
    for (int h = 0; h < out.state.kv.kv_heads(l); ++h) load_head(out.state.kv, l, h, out.state.next_position, file);
  }
  file.expect_all_asked();
  return out;
}

}  // namespace lacuna
