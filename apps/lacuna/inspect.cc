// lacuna inspect: what a model directory holds; with --ids, what the model computes, as a safetensors file.
#include <cmath>
#include <limits>
#include <map>
#include <sstream>

#include "evict/score_board.h"
#include "formats/safetensors.h"
#include "inspect.h"

namespace lacuna::cli {
namespace {

// Residual stream after the embedding and after each layer.
class HiddenRecorder : public LayerObserver {
 public:
  HiddenRecorder(int layers, int64_t n, int64_t d) : d_(d), hidden(static_cast<size_t>(layers + 1), std::vector<float>(static_cast<size_t>(n * d))) {}
  bool wants_hidden() const override { return true; }
  void on_hidden(int layer, int64_t first, int64_t tokens, const float* h) override {
    std::copy_n(h, tokens * d_, hidden[static_cast<size_t>(layer + 1)].begin() + first * d_);
  }

 private:
  int64_t d_;

 public:
  std::vector<std::vector<float>> hidden;
};

// The name under which a policy's tensors stand: laprox.<gqa>.<pool_at>.<normalise>, or kvpress.<policy>.
std::string tensor_prefix(const std::string& spec) {
  const size_t colon = spec.find(':');
  const std::string name = spec.substr(0, colon);
  if (name != "laprox") return "kvpress." + (name == "h2o" ? "observed_attention" : spec);
  std::map<std::string, std::string> switches = {{"gqa", "score_mean"}, {"pool_at", "score"}, {"normalise", "layer_sum"}};
  std::string rest = colon == std::string::npos ? "" : spec.substr(colon + 1);
  std::istringstream parts(rest);
  for (std::string part; std::getline(parts, part, ',');) {
    const size_t equals = part.find('=');
    if (equals != std::string::npos) switches[part.substr(0, equals)] = part.substr(equals + 1);
  }
  return "laprox." + switches["gqa"] + "." + switches["pool_at"] + "." + switches["normalise"];
}

void write_run(const InspectOptions& o) {
  const std::vector<int32_t> ids = parse_ids(o.ids);
  std::vector<std::shared_ptr<const Policy>> policies;
  for (const auto& p : o.policies) policies.push_back(make_policy(p));
  std::vector<Budget> budgets;
  for (const auto& b : o.budgets) budgets.push_back(parse_budget(b));

  Engine engine(o.engine);
  Model& model = *engine.model;
  const ModelInfo& info = model.info();
  const auto n = static_cast<int64_t>(ids.size());
  Results results;
  std::vector<float> logits(static_cast<size_t>(n * info.vocab));
  HiddenRecorder recorder(info.layers, n, info.hidden);
  {
    SequenceState state = model.new_state(engine.memory, engine.kv);
    prefill(engine.ctx, model, state, ids, &recorder, engine.prefill, nullptr, logits.data());
  }
  results.add("input_ids", DType::kI32, {n}, ids);
  results.add("logits", DType::kF32, {n, info.vocab}, logits);
  for (int l = 0; l <= info.layers; ++l)
    results.add("hidden." + std::to_string(l), DType::kF32, {n, info.hidden}, recorder.hidden[static_cast<size_t>(l)]);

  SequenceState state = model.new_state(engine.memory, engine.kv);
  ScoreBoard board(engine.ctx, model, policies);
  std::vector<float> last(static_cast<size_t>(info.vocab));
  prefill(engine.ctx, model, state, ids, &board, engine.prefill, last.data());
  board.finish(state, ids, {}, engine.prefill);

  int kv_heads = 0;
  for (int l = 0; l < info.layers; ++l) kv_heads = std::max(kv_heads, state.kv.kv_heads(l));
  const int64_t rows = int64_t{info.layers} * kv_heads;
  for (size_t p = 0; p < policies.size(); ++p) {
    const std::string prefix = tensor_prefix(o.policies[p]);
    // Columns: LaProx's candidates; for the others every token, +infinity where a token is always kept.
    const int window = policies[p]->rule().window;
    const int64_t columns = prefix.starts_with("laprox") ? std::max<int64_t>(0, n - window) : n;
    std::vector<float> scored(static_cast<size_t>(rows * columns), std::numeric_limits<float>::infinity());
    for (int l = 0; l < info.layers; ++l) {
      const LayerScores& scores = board.scores(p, l);
      for (size_t h = 0; h < scores.heads.size(); ++h)
        for (size_t i = 0; i < scores.heads[h].slot.size(); ++i)
          if (scores.heads[h].position[i] < columns)
            scored[(static_cast<size_t>(l) * static_cast<size_t>(kv_heads) + h) * static_cast<size_t>(columns) +
                   static_cast<size_t>(scores.heads[h].position[i])] = scores.heads[h].score[i];
    }
    results.add(prefix + ".score", DType::kF32, {info.layers, kv_heads, columns}, scored);
    for (size_t b = 0; b < budgets.size(); ++b) {
      const ScoreBoard::KeepMap keep = board.select(p, budgets[b], state.kv);
      std::vector<uint8_t> mask(static_cast<size_t>(rows * n), uint8_t{0});
      for (int l = 0; l < info.layers; ++l)
        for (int h = 0; h < state.kv.kv_heads(l); ++h)
          for (int32_t slot : keep[static_cast<size_t>(l)][static_cast<size_t>(h)])
            mask[static_cast<size_t>((int64_t{l} * kv_heads + h) * n + state.kv.view(l, h).position(state.kv.layout(l), slot))] = 1;
      results.add(prefix + "." + o.budgets[b] + ".keep", DType::kU8, {info.layers, kv_heads, n}, mask);
    }
  }

  std::vector<int32_t> greedy;
  for (int64_t i = 0; i < o.greedy; ++i) {
    greedy.push_back(static_cast<int32_t>(std::max_element(last.begin(), last.end()) - last.begin()));
    if (i + 1 == o.greedy) break;
    SequenceState* states[] = {&state};
    decode_step(engine.ctx, model, states, {&greedy.back(), 1}, last.data());
  }
  if (o.greedy > 0) results.add("greedy_ids", DType::kI32, {o.greedy}, greedy);
  results.write(o.out);
}

nlohmann::json describe(const InspectOptions& o) {
  const ModelOutline model = outline_model(o.engine.model_dir);
  const ModelFiles files = ModelFiles::open(o.engine.model_dir);
  nlohmann::json out = {{"architecture", model.architecture}, {"layers", model.layers},        {"hidden", model.hidden},
                        {"intermediate", model.intermediate}, {"query_heads", model.query_heads}, {"kv_heads", model.kv_heads},
                        {"head_dim", model.head_dim},         {"vocab", model.vocab},          {"positions", model.max_positions},
                        {"tied_embeddings", model.tied_embeddings}, {"rope_theta", model.rope_theta},
                        {"eos_ids", model.eos_ids},           {"file_bytes", files.file_bytes()},
                        {"attention_layers", model.attention_layers}, {"sliding_window_layers", model.window_layers},
                        {"sliding_window", model.window},     {"recurrent_layers", model.recurrent_layers},
                        {"recurrent_state_bytes", model.state_bytes}, {"expert_layers", model.expert_layers},
                        {"experts", model.experts},           {"experts_per_token", model.experts_per_token},
                        {"shared_experts", model.shared_experts}, {"sink_tokens", model.sinks}};
  int64_t parameters = 0;
  for (const auto& name : files.names()) {
    const Tensor t = files.get(name);
    if (!name.ends_with("_scale")) parameters += t.elements();
    out["tensors"].push_back({{"name", name}, {"dtype", dtype_name(t.dtype)}, {"shape", std::vector<int64_t>(t.shape.begin(), t.shape.begin() + t.rank)}, {"bytes", t.bytes()}});
  }
  out["parameters"] = parameters;
  for (DType t : {DType::kF32, DType::kBF16, DType::kI8}) {
    const KvLayout layout{t, model.head_dim, 32};
    out["kv_bytes_per_token"][std::string(dtype_name(t))] = layout.slot_bytes() * static_cast<size_t>(model.kv_heads) * static_cast<size_t>(model.attention_layers);
  }
  return out;
}

int inspect_command(const InspectOptions& o) {
  if (!o.ids.empty() && o.out.empty()) throw BadInput("--ids needs --out FILE.safetensors for the results");
  if (!o.out.empty() && o.ids.empty()) throw BadInput("--out needs --ids: the token ids to run");
  if (is_diffusion(o.engine)) {
    refuse_given(o.cache_options, "a block-diffusion model has no cache whose entries a policy could score");
    return inspect_diffusion(o);
  }
  refuse_given(o.diffusion.options, "the model is autoregressive; the option is for block-diffusion models (Cola DLM)");
  const nlohmann::json d = describe(o);
  if (!o.ids.empty()) write_run(o);
  if (o.json) {
    print_out(d.dump(2) + "\n");
    return 0;
  }
  std::string text = fmt::format("{}: {} layers, hidden {}, FFN {}, {} query and {} KV heads of {}, vocabulary {}, {} positions\n",
                                 d["architecture"].get<std::string>(), d["layers"].get<int>(), d["hidden"].get<int64_t>(),
                                 d["intermediate"].get<int64_t>(), d["query_heads"].get<int>(), d["kv_heads"].get<int>(),
                                 d["head_dim"].get<int>(), d["vocab"].get<int64_t>(), d["positions"].get<int64_t>());
  text += fmt::format("{} parameters in {} tensors, {}{}\n", d["parameters"].get<int64_t>(), d["tensors"].size(),
                      human_bytes(static_cast<double>(d["file_bytes"].get<size_t>())), d["tied_embeddings"].get<bool>() ? ", tied embeddings" : "");
  text += fmt::format("KV cache a token: {} in f32, {} in bf16, {} in int8\n", human_bytes(d["kv_bytes_per_token"]["f32"].get<double>()),
                      human_bytes(d["kv_bytes_per_token"]["bf16"].get<double>()), human_bytes(d["kv_bytes_per_token"]["int8"].get<double>()));
  if (d["sliding_window_layers"].get<int>() > 0)
    text += fmt::format("{} of {} attention layers see a sliding window of {} tokens and keep no more\n", d["sliding_window_layers"].get<int>(),
                        d["attention_layers"].get<int>(), d["sliding_window"].get<int64_t>());
  if (d["recurrent_layers"].get<int>() > 0)
    text += fmt::format("{} recurrent layers: a state of {} a sequence, whatever its length\n", d["recurrent_layers"].get<int>(),
                        human_bytes(d["recurrent_state_bytes"].get<double>()));
  if (d["expert_layers"].get<int>() > 0)
    text += fmt::format("{} layers with {} experts, of which a token runs {}, and {} shared\n", d["expert_layers"].get<int>(),
                        d["experts"].get<int>(), d["experts_per_token"].get<int>(), d["shared_experts"].get<int>());
  if (d["sink_tokens"].get<int>() > 0) text += fmt::format("{} sink tokens before every text\n", d["sink_tokens"].get<int>());
  for (const auto& t : d["tensors"])
    text += fmt::format("  {:<52} {:<5} {}\n", t["name"].get<std::string>(), t["dtype"].get<std::string>(), t["shape"].dump());
  print_out(text);
  return 0;
}

}  // namespace

Command add_inspect(CLI::App& parent) {
  auto o = std::make_shared<InspectOptions>();
  CLI::App* app = parent.add_subcommand("inspect", "What a model directory holds; with --ids, run token ids and write the results");
  add_engine_options(*app, o->engine);
  app->add_option("--ids", o->ids, "Token ids \"1,2,3\" or @FILE: run them and write logits, hidden states, scores and masks to --out");
  app->add_option("--out", o->out, "The safetensors file to write");
  o->cache_options = {
      app->add_option("--score", o->policies, "With --ids: also this policy's scores; may be repeated")->allow_extra_args(false),
      app->add_option("--keep", o->budgets, "With --score: also the kept set at this budget; may be repeated")->allow_extra_args(false)};
  add_diffusion_options(*app, o->diffusion, o->engine);
  app->add_option("--greedy", o->greedy, "With --ids: also so many greedy tokens (block diffusion: with every step's latents and velocities)")->check(CLI::Range(0, 1 << 20));
  app->add_flag("--json", o->json, "Machine-readable output");
  return {app, [o] { return inspect_command(*o); }};
}

}  // namespace lacuna::cli
