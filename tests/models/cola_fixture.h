// A random Cola DLM checkpoint, and the same model as a walk of its formulas in double: explicit masks, no cache.
// Nothing here calls the kernels.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "formats/safetensors_writer.h"
#include "tensor/dtype.h"

namespace lacuna::testing {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

struct ColaSpec {
  // VAE
  int64_t vocab = 37, dim = 24, ffn = 32, patch = 1, vae_block = 1;
  int vae_heads = 3, encoder_blocks = 2, decoder_blocks = 2;
  bool post_norm = true, bias = true, qk_bias = false, qk_norm = true, qk_affine = true, norm_affine = true;
  bool last_norm = true;
  // DiT
  int64_t hidden = 24, block = 4, expand = 2;
  int heads = 2, head_dim = 16, rope_dim = 12, layers = 2;
  bool dit_bias = false;
  // both
  int64_t latent = 4;
  uint32_t seed = 1;

  nlohmann::json vae_config() const {
    return {{"model_type", "cola_text_vae"}, {"vocab_size", vocab}, {"dim", dim}, {"ffn_dim", ffn},
            {"latent_dim", latent}, {"patch_size", patch}, {"num_heads", vae_heads}, {"block_size", vae_block},
            {"encoder_num_blocks", encoder_blocks}, {"decoder_num_blocks", decoder_blocks}, {"post_norm", post_norm},
            {"bias", bias}, {"qk_bias", qk_bias}, {"qk_norm", qk_norm}, {"qk_norm_affine", qk_affine},
            {"layer_norm_affine", norm_affine}, {"encoder_last_ln", last_norm}, {"layer_norm_eps", 1e-6}};
  }
  nlohmann::json dit_config() const {
    return {{"model_type", "cola_dit"}, {"txt_in_channels", latent}, {"txt_out_channels", latent},
            {"txt_dim", hidden}, {"emb_dim", hidden}, {"heads", heads}, {"head_dim", head_dim},
            {"expand_ratio", expand}, {"num_layers", layers}, {"rope_dim", rope_dim}, {"block_size", block},
            {"qk_bias", dit_bias}, {"norm_eps", 1e-5}};
  }
};

// A folder of its own that goes away again. Tensors are by half ("vae", "dit") and name.
class ColaCheckpoint {
 public:
  explicit ColaCheckpoint(const ColaSpec& s, DType dtype = DType::kF32) : spec(s), vae_json(s.vae_config()), dit_json(s.dit_config()) {
    static int count = 0;
    dir = std::filesystem::temp_directory_path() / ("lacuna_cola_" + std::to_string(getpid()) + "_" + std::to_string(count++));
    fill_vae();
    fill_dit();
    if (dtype == DType::kBF16)
      for (auto& half : tensors)
        for (auto& [name, t] : half.second)
          for (float& x : t.values) x = to_float(to_bf16(x));
    write(dtype);
  }
  ~ColaCheckpoint() {
    std::error_code error;
    std::filesystem::remove_all(dir, error);
  }
  ColaCheckpoint(const ColaCheckpoint&) = delete;

  // After a change of json or tensors.
  void write(DType dtype = DType::kF32) const {
    for (const auto& [half, list] : tensors) {
      const auto folder = folder_of(half);
      std::filesystem::create_directories(folder);
      std::ofstream(folder / "config.json") << (half == "vae" ? vae_json : dit_json).dump();
      std::vector<SafetensorsWriter::Spec> specs;
      for (const auto& [name, t] : list) specs.push_back({name, dtype, t.shape});
      SafetensorsWriter writer(folder / "model.safetensors", specs);
      for (const auto& [name, t] : list) {
        if (dtype == DType::kF32) {
          writer.write(name, t.values.data(), t.values.size() * 4);
        } else {
          std::vector<BF16> narrow;
          for (float x : t.values) narrow.push_back(to_bf16(x));
          writer.write(name, narrow.data(), narrow.size() * 2);
        }
      }
      writer.commit();
    }
  }
  std::filesystem::path folder_of(const std::string& half) const { return dir / "cola_dlm" / ("cola_" + half); }

  struct Values {
    std::vector<int64_t> shape;
    std::vector<float> values;
  };
  const ColaSpec spec;
  nlohmann::json vae_json, dit_json;
  std::filesystem::path dir;
  std::map<std::string, std::map<std::string, Values>> tensors;

  // ---- the model in double ------------------------------------------------------------------------

  struct Posterior {
    Rows mean, logvar;
  };
  Posterior encode(const std::vector<int32_t>& ids) const {
    const auto& wte = at("vae", "encoder.wte.weight");
    const auto& conv = at("vae", "encoder.patch_embedder.weight");
    const auto& bias = at("vae", "encoder.patch_embedder.bias");
    Rows x;
    for (size_t i = 0; i < ids.size(); i += static_cast<size_t>(spec.patch)) {
      Row y(static_cast<size_t>(spec.dim));
      for (int64_t o = 0; o < spec.dim; ++o) {
        double sum = bias.values[static_cast<size_t>(o)];
        for (int64_t c = 0; c < spec.dim; ++c)
          for (int64_t p = 0; p < spec.patch; ++p)
            sum += static_cast<double>(conv.values[static_cast<size_t>((o * spec.dim + c) * spec.patch + p)]) *
                   wte.values[static_cast<size_t>(ids[i + static_cast<size_t>(p)] * spec.dim + c)];
        y[static_cast<size_t>(o)] = sum;
      }
      x.push_back(y);
    }
    for (int i = 0; i < spec.encoder_blocks; ++i) vae_block(x, "encoder.blocks." + std::to_string(i) + ".");
    Posterior p;
    for (const Row& r : linear("vae", "encoder.final_layer", x, spec.bias)) {
      Row mean(r.begin(), r.begin() + spec.latent), logvar(r.begin() + spec.latent, r.end());
      if (spec.last_norm) mean = normed(mean, 1e-6);
      for (double& v : logvar) v = std::clamp(v, -30.0, 20.0);
      p.mean.push_back(mean);
      p.logvar.push_back(logvar);
    }
    return p;
  }
  Rows decode(const Rows& z) const {
    Rows x = linear("vae", "decoder.in_layer", z, spec.bias);
    for (int i = 0; i < spec.decoder_blocks; ++i) vae_block(x, "decoder.blocks." + std::to_string(i) + ".");
    Rows tokens;
    for (const Row& r : linear("vae", "decoder.unpatch_layer", x, true))
      for (int64_t p = 0; p < spec.patch; ++p) {
        Row token;
        for (int64_t c = 0; c < spec.dim; ++c) token.push_back(r[static_cast<size_t>(c * spec.patch + p)]);
        tokens.push_back(affine("vae", "decoder.final_norm", normed(token, 1e-6)));
      }
    return linear("vae", "decoder.final_layer", tokens, spec.bias);
  }
  // Velocities of x, all from position 0 on, each row at its timestep.
  Rows velocity(const Rows& z, const std::vector<double>& t) const {
    Rows sinusoid;
    for (const double time : t) {
      Row s(256);
      for (int i = 0; i < 128; ++i) {
        const double angle = time * std::pow(10000.0, -i / 128.0);
        s[static_cast<size_t>(i)] = std::sin(angle);
        s[static_cast<size_t>(128 + i)] = std::cos(angle);
      }
      sinusoid.push_back(s);
    }
    Rows emb = silu(linear("dit", "emb_in.proj_in", sinusoid, true));
    emb = silu(linear("dit", "emb_in.proj_out", silu(linear("dit", "emb_in.proj_hid", emb, true)), true));
    Rows x = linear("dit", "txt_in.proj", z, true);
    for (int i = 0; i < spec.layers; ++i) {
      const std::string b = "blocks." + std::to_string(i) + ".";
      Rows h = modulated(x, linear("dit", b + "ada.msa_in.1", emb, true), "");
      const int64_t n = int64_t{spec.heads} * spec.head_dim;
      Rows q, k, v;
      split(linear("dit", b + "msa.proj_qkv", h, spec.dit_bias), n, q, k, v);
      for (size_t r = 0; r < q.size(); ++r)
        for (int head = 0; head < spec.heads; ++head)
          for (Rows* side : {&q, &k}) {
            double* at = &(*side)[r][static_cast<size_t>(head * spec.head_dim)];
            const Row y = affine("dit", b + (side == &q ? "msa.norm_q" : "msa.norm_k"), normed(Row(at, at + spec.head_dim), 1e-5));
            std::copy(y.begin(), y.end(), at);
            for (int c = 0; c < spec.rope_dim; c += 2)
              turn(at[c], at[c + 1], static_cast<double>(r) * std::pow(10000.0, -static_cast<double>(c) / spec.rope_dim));
          }
      add(x, linear("dit", b + "msa.proj_out", attention(q, k, v, spec.heads, spec.block), spec.dit_bias),
          linear("dit", b + "ada.msa_out.1", emb, true));
      h = modulated(x, linear("dit", b + "ada.mlp_in.1", emb, true), "");
      h = linear("dit", b + "mlp.proj_in", h, true);
      for (Row& r : h)
        for (double& a : r) a = 0.5 * a * (1 + std::tanh(std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a)));
      add(x, linear("dit", b + "mlp.proj_out", h, true), linear("dit", b + "ada.mlp_out.1", emb, true));
    }
    x = modulated(x, linear("dit", "txt_out_ada.out_in.1", emb, true), "txt_out_norm");
    return linear("dit", "txt_out.proj", x, true);
  }

 private:
  const Values& at(const std::string& half, const std::string& name) const { return tensors.at(half).at(name); }

  static Row normed(const Row& x, double eps) {
    double mean = 0, variance = 0;
    for (double v : x) mean += v / static_cast<double>(x.size());
    for (double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
    Row y;
    for (double v : x) y.push_back((v - mean) / std::sqrt(variance + eps));
    return y;
  }
  // Weight and bias of `name`, if the checkpoint has them.
  Row affine(const std::string& half, const std::string& name, Row x) const {
    if (!tensors.at(half).count(name + ".weight")) return x;
    const auto &w = at(half, name + ".weight"), &b = at(half, name + ".bias");
    for (size_t i = 0; i < x.size(); ++i) x[i] = x[i] * w.values[i] + b.values[i];
    return x;
  }
  Rows linear(const std::string& half, const std::string& name, const Rows& x, bool bias) const {
    const Values& w = at(half, name + ".weight");
    const auto out = static_cast<size_t>(w.shape[0]), in = static_cast<size_t>(w.shape[1]);
    Rows y;
    for (const Row& r : x) {
      Row o(out);
      for (size_t n = 0; n < out; ++n) {
        o[n] = bias ? at(half, name + ".bias").values[n] : 0.0;
        for (size_t k = 0; k < in; ++k) o[n] += r[k] * w.values[n * in + k];
      }
      y.push_back(o);
    }
    return y;
  }
  static Rows silu(Rows x) {
    for (Row& r : x)
      for (double& a : r) a = a / (1 + std::exp(-a));
    return x;
  }
  Rows modulated(const Rows& x, const Rows& shift_scale, const std::string& norm) const {
    Rows y;
    for (size_t r = 0; r < x.size(); ++r) {
      Row n = affine("dit", norm, normed(x[r], 1e-5));
      for (size_t c = 0; c < n.size(); ++c) n[c] = n[c] * (1 + shift_scale[r][n.size() + c]) + shift_scale[r][c];
      y.push_back(n);
    }
    return y;
  }
  static void add(Rows& x, const Rows& y, const Rows& gate) {
    for (size_t r = 0; r < x.size(); ++r)
      for (size_t c = 0; c < x[r].size(); ++c) x[r][c] += y[r][c] * gate[r][c];
  }
  static void split(const Rows& both, int64_t n, Rows& q, Rows& k, Rows& v) {
    for (const Row& r : both) {
      q.emplace_back(r.begin(), r.begin() + n);
      k.emplace_back(r.begin() + n, r.begin() + 2 * n);
      v.emplace_back(r.begin() + 2 * n, r.end());
    }
  }
  static void turn(double& a, double& b, double angle) {
    const double x = a * std::cos(angle) - b * std::sin(angle);
    b = b * std::cos(angle) + a * std::sin(angle);
    a = x;
  }
  static Rows attention(const Rows& q, const Rows& k, const Rows& v, int heads, int64_t block) {
    const size_t d = q[0].size() / static_cast<size_t>(heads);
    Rows out;
    for (size_t i = 0; i < q.size(); ++i) {
      Row o(q[i].size());
      const size_t end = std::min(q.size(), (i / static_cast<size_t>(block) + 1) * static_cast<size_t>(block));
      for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
        Row p(end);
        double max = -1e300, sum = 0;
        for (size_t j = 0; j < end; ++j) {
          for (size_t c = h * d; c < (h + 1) * d; ++c) p[j] += q[i][c] * k[j][c] / std::sqrt(static_cast<double>(d));
          max = std::max(max, p[j]);
        }
        for (double& x : p) sum += x = std::exp(x - max);
        for (size_t j = 0; j < end; ++j)
          for (size_t c = h * d; c < (h + 1) * d; ++c) o[c] += p[j] / sum * v[j][c];
      }
      out.push_back(o);
    }
    return out;
  }
  void vae_block(Rows& x, const std::string& b) const {
    Rows h = x;
    if (!spec.post_norm)
      for (Row& r : h) r = affine("vae", b + "norm_attn", normed(r, 1e-6));
    Rows q, k, v;
    split(linear("vae", b + "qkv_proj", h, spec.qk_bias), spec.dim, q, k, v);
    const auto d = static_cast<size_t>(spec.dim / spec.vae_heads);
    for (size_t r = 0; r < q.size(); ++r)
      for (Rows* side : {&q, &k}) {
        Row& y = (*side)[r];
        if (spec.qk_norm) y = affine("vae", b + (side == &q ? "q_norm" : "k_norm"), normed(y, 1e-6));
        for (size_t head = 0; head < static_cast<size_t>(spec.vae_heads); ++head)
          for (size_t c = 0; c < d / 2; ++c)
            turn(y[head * d + c], y[head * d + d / 2 + c],
                 static_cast<double>(r) * std::pow(500000.0, -2.0 * static_cast<double>(c) / static_cast<double>(d)));
      }
    const Rows a = linear("vae", b + "attn_out_proj", attention(q, k, v, spec.vae_heads, spec.vae_block), spec.bias);
    for (size_t r = 0; r < x.size(); ++r) {
      if (spec.post_norm) x[r] = affine("vae", b + "norm_attn", normed(x[r], 1e-6));
      for (size_t c = 0; c < x[r].size(); ++c) x[r][c] += a[r][c];
    }
    h = x;
    if (!spec.post_norm)
      for (Row& r : h) r = affine("vae", b + "norm_ffn", normed(r, 1e-6));
    Rows act;
    for (const Row& r : linear("vae", b + "ffn_proj", h, spec.bias)) {
      Row y;
      for (size_t c = 0; c < r.size() / 2; ++c) {
        const double gate = r[r.size() / 2 + c];
        y.push_back(r[c] * gate / (1 + std::exp(-gate)));
      }
      act.push_back(y);
    }
    Rows f = linear("vae", b + "ffn_out", act, spec.bias);
    for (size_t r = 0; r < x.size(); ++r) {
      if (spec.post_norm) f[r] = affine("vae", b + "norm_ffn", normed(f[r], 1e-6));
      for (size_t c = 0; c < x[r].size(); ++c) x[r][c] += f[r][c];
    }
  }

  void tensor(const std::string& half, const std::string& name, std::vector<int64_t> shape, double scale, double mean = 0) {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    std::normal_distribution<double> normal(mean, scale);
    Values t{std::move(shape), std::vector<float>(static_cast<size_t>(n))};
    for (float& v : t.values) v = static_cast<float>(normal(rng_));
    tensors[half][name] = std::move(t);
  }
  void matrix(const std::string& half, const std::string& name, int64_t out, int64_t in, bool bias, double scale = 1) {
    tensor(half, name + ".weight", {out, in}, scale / std::sqrt(static_cast<double>(in)));
    if (bias) tensor(half, name + ".bias", {out}, 0.2);
  }
  void norm(const std::string& half, const std::string& name, int64_t n) {
    tensor(half, name + ".weight", {n}, 0.2, 1);
    tensor(half, name + ".bias", {n}, 0.2);
  }
  void fill_vae() {
    const int64_t d = spec.dim;
    tensor("vae", "encoder.wte.weight", {spec.vocab + 1, d}, 1);
    tensor("vae", "encoder.patch_embedder.weight", {d, d, spec.patch}, 1 / std::sqrt(static_cast<double>(d * spec.patch)));
    tensor("vae", "encoder.patch_embedder.bias", {d}, 0.2);
    for (const std::string half : {"encoder", "decoder"})
      for (int i = 0; i < (half == "encoder" ? spec.encoder_blocks : spec.decoder_blocks); ++i) {
        const std::string b = half + ".blocks." + std::to_string(i) + ".";
        if (spec.norm_affine) norm("vae", b + "norm_attn", d);
        norm("vae", b + "norm_ffn", d);
        matrix("vae", b + "qkv_proj", 3 * d, d, spec.qk_bias);
        if (spec.qk_norm && spec.qk_affine) {
          norm("vae", b + "q_norm", d);
          norm("vae", b + "k_norm", d);
        }
        matrix("vae", b + "attn_out_proj", d, d, spec.bias);
        matrix("vae", b + "ffn_proj", spec.ffn, d, spec.bias);
        matrix("vae", b + "ffn_out", d, spec.ffn / 2, spec.bias);
      }
    matrix("vae", "encoder.final_layer", 2 * spec.latent, d, spec.bias, 3);
    matrix("vae", "decoder.in_layer", d, spec.latent, spec.bias);
    matrix("vae", "decoder.unpatch_layer", d * spec.patch, d, true);
    norm("vae", "decoder.final_norm", d);
    matrix("vae", "decoder.final_layer", spec.vocab, d, spec.bias);
  }
  void fill_dit() {
    const int64_t d = spec.hidden, n = int64_t{spec.heads} * spec.head_dim;
    matrix("dit", "txt_in.proj", d, spec.latent, true);
    matrix("dit", "emb_in.proj_in", d, 256, true);
    matrix("dit", "emb_in.proj_hid", d, d, true);
    matrix("dit", "emb_in.proj_out", d, d, true);
    for (int i = 0; i < spec.layers; ++i) {
      const std::string b = "blocks." + std::to_string(i) + ".";
      matrix("dit", b + "msa.proj_qkv", 3 * n, d, spec.dit_bias);
      matrix("dit", b + "msa.proj_out", d, n, spec.dit_bias);
      norm("dit", b + "msa.norm_q", spec.head_dim);
      norm("dit", b + "msa.norm_k", spec.head_dim);
      matrix("dit", b + "mlp.proj_in", d * spec.expand, d, true);
      matrix("dit", b + "mlp.proj_out", d, d * spec.expand, true);
      for (const char* name : {"msa_in", "mlp_in"}) matrix("dit", b + "ada." + name + ".1", 2 * d, d, true);
      for (const char* name : {"msa_out", "mlp_out"}) matrix("dit", b + "ada." + name + ".1", d, d, true);
    }
    norm("dit", "txt_out_norm", d);
    matrix("dit", "txt_out_ada.out_in.1", 2 * d, d, true);
    matrix("dit", "txt_out.proj", spec.latent, d, true);
  }
  std::mt19937 rng_{spec.seed};
};

}  // namespace lacuna::testing
