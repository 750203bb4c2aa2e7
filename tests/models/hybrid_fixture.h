// A random checkpoint of the parallel hybrid, and the same model as a walk of its formulas in double: explicit
// recurrence, explicit softmax over sinks and window, experts a token at a time. Nothing here calls the kernels.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "formats/safetensors_writer.h"

namespace lacuna::testing {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

struct HybridSpec {
  int64_t vocab = 50, hidden = 32, intermediate = 24;
  int layers = 4, heads = 4, kv_heads = 2, head_dim = 8;
  int64_t window = 8;
  std::vector<int> full = {2}, dense = {0};
  int sinks = 5, experts = 4, top_k = 1, shared = 1;
  bool sigmoid = false, before = false, learned = false, tied = false, bias = true;
  bool sink_rope = true, linear_sees_sinks = true, softmax_rope = true;
  double linear_weight = 0.5, softmax_weight = 0.5;
  uint32_t seed = 1;

  bool is_full(int i) const { return std::find(full.begin(), full.end(), i) != full.end(); }
  bool is_dense(int i) const { return experts == 0 || std::find(dense.begin(), dense.end(), i) != dense.end(); }
  nlohmann::json config() const {
    nlohmann::json j = {{"model_type", "spikingbrain_moe"},
                        {"vocab_size", vocab},
                        {"hidden_size", hidden},
                        {"intermediate_size", intermediate},
                        {"num_hidden_layers", layers},
                        {"num_attention_heads", heads},
                        {"num_key_value_heads", kv_heads},
                        {"head_dim", head_dim},
                        {"max_position_embeddings", 4096},
                        {"rope_theta", 1000.0},
                        {"norm_eps", 1e-6},
                        {"sliding_window", window},
                        {"full_attention_layers", full},
                        {"num_sink_tokens", sinks},
                        {"sink_rope", sink_rope},
                        {"linear_sees_sinks", linear_sees_sinks},
                        {"softmax_rope", softmax_rope},
                        {"branch_norm", before ? "before_projection" : "after_projection"},
                        {"branch_weights", learned ? "learned" : "fixed"},
                        {"linear_branch_weight", linear_weight},
                        {"softmax_branch_weight", softmax_weight},
                        {"attention_bias", bias},
                        {"tie_word_embeddings", tied},
                        {"router_function", sigmoid ? "sigmoid" : "softmax"}};
    if (experts > 0) {
      j["num_experts"] = experts;
      j["num_experts_per_tok"] = top_k;
      j["num_shared_experts"] = shared;
      j["dense_layers"] = dense;
    }
    return j;
  }
};

// A folder of its own that goes away again.
class HybridCheckpoint {
 public:
  explicit HybridCheckpoint(const HybridSpec& s) : spec(s), config(s.config()) {
    static int count = 0;
    dir = std::filesystem::temp_directory_path() /
          ("lacuna_hybrid_" + std::to_string(getpid()) + "_" + std::to_string(count++));
    std::filesystem::create_directories(dir);
    std::mt19937 rng(spec.seed);
    const auto add = [&](const std::string& name, std::vector<int64_t> shape, double scale, double mean = 0) {
      int64_t n = 1;
      for (int64_t x : shape) n *= x;
      std::normal_distribution<double> normal(mean, scale);
      std::vector<float> values(static_cast<size_t>(n));
      for (float& v : values) v = static_cast<float>(normal(rng));
      tensors[name] = {std::move(shape), std::move(values)};
    };
    const int64_t D = spec.hidden, q = spec.heads * spec.head_dim, kv = spec.kv_heads * spec.head_dim,
                  F = spec.intermediate;
    const int64_t norm = spec.before ? spec.head_dim : D;
    const double in = 1 / std::sqrt(static_cast<double>(D));
    add("model.embeddings.weight", {spec.vocab, D}, 1);
    if (spec.sinks) add("model.sink_embeddings", {spec.sinks, D}, 1);
    add("model.norm.weight", {D}, 0.2, 1);
    if (!spec.tied) add("lm_head.weight", {spec.vocab, D}, in);
    for (int i = 0; i < spec.layers; ++i) {
      const std::string at = "model.layers." + std::to_string(i) + ".";
      add(at + "attn_norm.weight", {D}, 0.2, 1);
      add(at + "mlp_norm.weight", {D}, 0.2, 1);
      for (const std::string branch : {"linear", "softmax"}) {
        const std::string b = at + "attn." + branch + ".";
        const double sharp = branch == "softmax" ? 2 : 1;
        for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
          const int64_t out = name[0] == 'q' ? q : kv;
          add(b + name + ".weight", {out, D}, name[0] == 'v' ? in : sharp * in);
          if (spec.bias) add(b + name + ".bias", {out}, 0.3);
        }
        add(b + "o_proj.weight", {D, q}, 1 / std::sqrt(static_cast<double>(q)));
        add(b + "norm.weight", {norm}, 0.2, 1);
      }
      if (spec.learned) add(at + "attn.branch_weights", {2}, 0.3, 0.5);
      const auto ffn = [&](const std::string& f) {
        add(f + ".gate_proj.weight", {F, D}, in);
        add(f + ".up_proj.weight", {F, D}, in);
        add(f + ".down_proj.weight", {D, F}, 1 / std::sqrt(static_cast<double>(F)));
      };
      if (spec.is_dense(i)) {
        ffn(at + "mlp");
        continue;
      }
      add(at + "mlp.router.weight", {spec.experts, D}, in);
      for (int e = 0; e < spec.experts; ++e) ffn(at + "mlp.experts." + std::to_string(e));
      for (int e = 0; e < spec.shared; ++e) ffn(at + "mlp.shared_experts." + std::to_string(e));
    }
  }
  ~HybridCheckpoint() { std::filesystem::remove_all(dir); }
  HybridCheckpoint(const HybridCheckpoint&) = delete;

  const std::filesystem::path& write() const {
    std::ofstream(dir / "config.json") << config.dump();
    std::vector<SafetensorsWriter::Spec> specs;
    for (const auto& [name, t] : tensors) specs.push_back({name, DType::kF32, t.shape});
    SafetensorsWriter writer(dir / "model.safetensors", specs);
    for (const auto& [name, t] : tensors) writer.write(name, t.values.data(), t.values.size() * sizeof(float));
    writer.commit();
    return dir;
  }

  struct Stored {
    std::vector<int64_t> shape;
    std::vector<float> values;
  };
  HybridSpec spec;
  nlohmann::json config;
  std::map<std::string, Stored> tensors;
  std::filesystem::path dir;
};

// The formulas.
class HybridWalk {
 public:
  explicit HybridWalk(const HybridCheckpoint& c) : s(c.spec), c_(c) {}

  // Logits of every token.
  Rows logits(const std::vector<int32_t>& ids) {
    Rows sinks, text;
    for (int i = 0; i < s.sinks; ++i) sinks.push_back(row("model.sink_embeddings", i));
    for (int32_t id : ids) text.push_back(row("model.embeddings.weight", id));
    tokens_of_expert.assign(static_cast<size_t>(s.layers), {});
    for (int i = 0; i < s.layers; ++i) layer(i, sinks, text);
    Rows out;
    for (const Row& x : text)
      out.push_back(product(s.tied ? "model.embeddings.weight" : "lm_head.weight", "", norm(x, "model.norm.weight")));
    return out;
  }
  std::vector<std::vector<int64_t>> tokens_of_expert;  // of the text alone
  double spike_k = 0;                                  // > 0: inputs of linear layers are counts times mean|x| / k …
  bool spike_down = false;                             // … down_proj's too

 private:
  const std::vector<float>& values(const std::string& name) const { return c_.tensors.at(name).values; }
  Row row(const std::string& name, int64_t i) const {
    const auto& v = values(name);
    return Row(v.begin() + i * s.hidden, v.begin() + (i + 1) * s.hidden);
  }
  Row product(const std::string& name, const std::string& bias, const Row& x) const {
    const auto& w = values(name);
    Row y(w.size() / x.size());
    for (size_t o = 0; o < y.size(); ++o) {
      for (size_t j = 0; j < x.size(); ++j) y[o] += w[o * x.size() + j] * x[j];
      if (!bias.empty()) y[o] += values(bias)[o];
    }
    return y;
  }
  Row norm(const Row& x, const std::string& name) const {
    const auto& w = values(name);
    Row y(x.size());
    for (size_t from = 0; from < x.size(); from += w.size()) {  // by head where the weight is a head long
      double squares = 0;
      for (size_t j = 0; j < w.size(); ++j) squares += x[from + j] * x[from + j];
      for (size_t j = 0; j < w.size(); ++j)
        y[from + j] = x[from + j] / std::sqrt(squares / static_cast<double>(w.size()) + 1e-6) * w[j];
    }
    return y;
  }
  Row coded(const Row& x, bool wanted) const {
    if (!wanted || spike_k == 0) return x;
    double threshold = 0;
    for (const double v : x) threshold += std::fabs(v);
    threshold = std::clamp(threshold / static_cast<double>(x.size()) / spike_k, 1e-5, 1e4);
    Row y;
    for (const double v : x) y.push_back(std::nearbyint(v / threshold) * threshold);
    return y;
  }
  Row project(const std::string& at, const Row& x) const {
    return product(at + ".weight", s.bias ? at + ".bias" : "", coded(x, true));
  }
  Row rotated(Row x, double position) const {
    const int d = s.head_dim, half = d / 2;
    for (size_t from = 0; from < x.size(); from += static_cast<size_t>(d))
      for (int j = 0; j < half; ++j) {
        const double angle = position * std::pow(1000.0, -2.0 * j / d);
        double &a = x[from + static_cast<size_t>(j)], &b = x[from + static_cast<size_t>(j + half)];
        const double a0 = a, b0 = b;
        a = a0 * std::cos(angle) - b0 * std::sin(angle);
        b = b0 * std::cos(angle) + a0 * std::sin(angle);
      }
    return x;
  }

  struct Keys {
    Rows q, k, v;
  };
  Keys keys(const std::string& at, const Rows& x, double first, bool rotate) const {
    Keys out;
    for (size_t t = 0; t < x.size(); ++t) {
      const double position = first + static_cast<double>(t);
      out.q.push_back(project(at + "q_proj", x[t]));
      out.k.push_back(project(at + "k_proj", x[t]));
      out.v.push_back(project(at + "v_proj", x[t]));
      if (rotate) {
        out.q.back() = rotated(out.q.back(), position);
        out.k.back() = rotated(out.k.back(), position);
      }
    }
    return out;
  }
  // One softmax over the named keys, head by head.
  Row attend(const Row& q, const std::vector<std::pair<const Row*, const Row*>>& seen) const {
    const auto d = static_cast<size_t>(s.head_dim), group = static_cast<size_t>(s.heads / s.kv_heads);
    Row out(q.size());
    for (size_t h = 0; h < static_cast<size_t>(s.heads); ++h) {
      std::vector<double> w;
      double total = 0;
      for (const auto& [k, v] : seen) {
        double score = 0;
        for (size_t j = 0; j < d; ++j) score += q[h * d + j] * (*k)[h / group * d + j];
        total += w.emplace_back(std::exp(score / std::sqrt(static_cast<double>(d))));
      }
      for (size_t i = 0; i < seen.size(); ++i)
        for (size_t j = 0; j < d; ++j) out[h * d + j] += w[i] / total * (*seen[i].second)[h / group * d + j];
    }
    return out;
  }
  // The recurrence, a token at a time; state [G][d, d].
  Rows recur(const std::string& at, const Rows& x, Rows& state) const {
    const auto d = static_cast<size_t>(s.head_dim), group = static_cast<size_t>(s.heads / s.kv_heads);
    Rows out;
    for (const Row& row : x) {
      const Row zq = project(at + "q_proj", row), zk = project(at + "k_proj", row), v = project(at + "v_proj", row);
      Row o(zq.size());
      for (size_t g = 0; g < static_cast<size_t>(s.kv_heads); ++g)
        for (size_t a = 0; a < d; ++a) {
          const double k = 1 / (1 + std::exp(-zk[g * d + a]));
          for (size_t b = 0; b < d; ++b) {
            double& e = state[g][a * d + b];
            e = (1 - k) * e + k * v[g * d + b];
          }
        }
      for (size_t h = 0; h < static_cast<size_t>(s.heads); ++h)
        for (size_t a = 0; a < d; ++a) {
          const double q = 1 / (1 + std::exp(-zq[h * d + a])) / std::sqrt(static_cast<double>(d));
          for (size_t b = 0; b < d; ++b) o[h * d + b] += q * state[h / group][a * d + b];
        }
      out.push_back(o);
    }
    return out;
  }
  // x += weight * normalised and projected branch.
  void add(const std::string& at, const Rows& mixed, double weight, Rows& x) const {
    for (size_t t = 0; t < x.size(); ++t) {
      const Row y = s.before ? product(at + "o_proj.weight", "", coded(norm(mixed[t], at + "norm.weight"), true))
                             : norm(product(at + "o_proj.weight", "", coded(mixed[t], true)), at + "norm.weight");
      for (size_t j = 0; j < y.size(); ++j) x[t][j] += weight * y[j];
    }
  }
  Row ffn(const std::string& at, const Row& x) const {
    const Row in = coded(x, true);
    Row g = product(at + ".gate_proj.weight", "", in), u = product(at + ".up_proj.weight", "", in);
    for (size_t j = 0; j < g.size(); ++j) g[j] = g[j] / (1 + std::exp(-g[j])) * u[j];
    return product(at + ".down_proj.weight", "", coded(g, spike_down));
  }
  void feed(int i, const std::string& at, Rows& x, bool text) {
    for (Row& r : x) {
      const Row n = norm(r, at + "mlp_norm.weight");
      const auto plus = [&](const Row& y, double p) {
        for (size_t j = 0; j < y.size(); ++j) r[j] += p * y[j];
      };
      if (s.is_dense(i)) {
        plus(ffn(at + "mlp", n), 1);
        continue;
      }
      for (int e = 0; e < s.shared; ++e) plus(ffn(at + "mlp.shared_experts." + std::to_string(e), n), 1);
      const Row logit = product(at + "mlp.router.weight", "", n);
      double total = 0;
      for (double l : logit) total += std::exp(l);
      std::vector<size_t> order(logit.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logit[a] > logit[b]; });
      for (int k = 0; k < s.top_k; ++k) {
        const size_t e = order[static_cast<size_t>(k)];
        plus(ffn(at + "mlp.experts." + std::to_string(e), n),
             s.sigmoid ? 1 / (1 + std::exp(-logit[e])) : std::exp(logit[e]) / total);
        auto& counts = tokens_of_expert[static_cast<size_t>(i)];
        counts.resize(logit.size());
        counts[e] += text;
      }
    }
  }
  void layer(int i, Rows& sinks, Rows& text) {
    const std::string at = "model.layers." + std::to_string(i) + ".", soft = at + "attn.softmax.",
                      lin = at + "attn.linear.";
    Rows xs, xt;
    for (const Row& r : sinks) xs.push_back(norm(r, at + "attn_norm.weight"));
    for (const Row& r : text) xt.push_back(norm(r, at + "attn_norm.weight"));
    const auto n = static_cast<int64_t>(text.size());
    const Keys ks = keys(soft, xs, -s.sinks, s.softmax_rope && s.sink_rope), kt = keys(soft, xt, 0, s.softmax_rope);
    std::vector<std::pair<const Row*, const Row*>> all;
    for (size_t j = 0; j < xs.size(); ++j) all.emplace_back(&ks.k[j], &ks.v[j]);
    Rows ms, mt;
    for (const Row& q : ks.q) ms.push_back(attend(q, all));
    for (int64_t t = 0; t < n; ++t) {
      auto seen = all;
      for (int64_t j = s.is_full(i) ? 0 : std::max<int64_t>(0, t - s.window + 1); j <= t; ++j)
        seen.emplace_back(&kt.k[static_cast<size_t>(j)], &kt.v[static_cast<size_t>(j)]);
      mt.push_back(attend(kt.q[static_cast<size_t>(t)], seen));
    }
    const Rows zero(static_cast<size_t>(s.kv_heads), Row(static_cast<size_t>(s.head_dim * s.head_dim)));
    Rows state = zero;
    const Rows ls = recur(lin, xs, state);
    if (!s.linear_sees_sinks) state = zero;
    const Rows lt = recur(lin, xt, state);
    double w1 = s.linear_weight, w2 = s.softmax_weight;
    if (s.learned) {
      w1 = values(at + "attn.branch_weights")[0];
      w2 = values(at + "attn.branch_weights")[1];
    }
    add(soft, ms, w2, sinks);
    add(lin, ls, w1, sinks);
    add(soft, mt, w2, text);
    add(lin, lt, w1, text);
    feed(i, at, sinks, false);
    feed(i, at, text, true);
  }

  HybridSpec s;
  const HybridCheckpoint& c_;
};

}  // namespace lacuna::testing
