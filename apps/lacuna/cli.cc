#include "cli.h"

#include <sys/resource.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

namespace lacuna::cli {
namespace {

// Memory the system could give without swapping, from /proc/meminfo; 0 if unknown.
size_t available_memory() {
  std::ifstream in("/proc/meminfo");
  std::string key, unit;
  size_t value = 0;
  while (in >> key >> value >> unit)
    if (key == "MemAvailable:") return value * 1024;
  return 0;
}

DType parse_kv_dtype(const std::string& text, ActivationType activations) {
  if (text == "auto") return activations == ActivationType::kBF16 ? DType::kBF16 : DType::kF32;
  if (text == "f32") return DType::kF32;
  if (text == "bf16") return DType::kBF16;
  return DType::kI8;
}

SpikeOptions parse_spikes(const EngineOptions& o) {
  SpikeOptions s;
  if (o.spikes == "off") s.use = SpikeUse::kOff;
  if (o.spikes == "fake") s.use = SpikeUse::kFake;
  if (o.spikes == "integer") s.use = SpikeUse::kInteger;
  if (o.spikes == "event") s.use = SpikeUse::kEvent;
  if (!o.spike_mode.empty()) s.mode = o.spike_mode == "paper" ? SpikeMode::kPaper : SpikeMode::kReference;
  if (o.spike_k > 0) s.k = static_cast<float>(o.spike_k);
  return s;
}

}  // namespace

void add_engine_options(CLI::App& app, EngineOptions& o) {
  app.add_option("-m,--model", o.model_dir, "Model directory in the Hugging Face layout")->required();
  app.add_option("--threads", o.threads, "Threads; 0 = every core this process may use")->check(CLI::Range(0, 1024));
  app.add_option("--dtype", o.dtype, "Operands of matrix products: f32, bf16, or auto (f32 for f32 weights)")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}));
  app.add_option("--weights", o.weights, "stored, or int8 (quantise per output row at load)")
      ->check(CLI::IsMember({"stored", "int8"}));
  app.add_option("--place", o.place,
                 "Stored weights: mapped (the file's pages, shared and the system's to take back), copied (memory in huge "
                 "pages, faster), or auto (copied if they take at most half of the memory that is left)")
      ->check(CLI::IsMember({"auto", "mapped", "copied"}));
  app.add_option("--kv-dtype", o.kv_dtype, "KV cache: f32, bf16, int8 (a scale per token and head), or auto (as --dtype)")
      ->check(CLI::IsMember({"auto", "f32", "bf16", "int8"}));
  app.add_option("--chunk", o.chunk, "Prefill: tokens of activations at a time")->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  app.add_option("--memory-limit", o.memory_limit, "Refuse to allocate more than this (\"4GiB\"); default: what is free now");
  app.add_option("--window-rule", o.window,
                 "SpikingBrain: keys a sliding window of W shows: official (W + 1 in a prompt, W after it), exact (W), plus_one "
                 "(W + 1), or config (what config.json says, else official)")
      ->check(CLI::IsMember({"config", "official", "exact", "plus_one"}));
  app.add_option("--spikes", o.spikes,
                 "Activations as spike counts: off, fake (floats), integer (dense products of counts), event (additions at every "
                 "spike), or auto (integer where the checkpoint asks for spikes)")
      ->check(CLI::IsMember({"auto", "off", "fake", "integer", "event"}));
  app.add_option("--spike-mode", o.spike_mode, "Coded layers: reference (all but down_proj, as published code runs) or paper (all)")
      ->check(CLI::IsMember({"reference", "paper"}));
  app.add_option("--spike-k", o.spike_k, "Spikes in a mean activation: V_th = mean|x| / k")->check(CLI::Range(1e-3, 1e6));
  app.add_flag("!--no-check", o.check_weights, "Do not read every weight once to refuse NaN and infinity");
}

void add_diffusion_options(CLI::App& app, DiffusionOptions& d, EngineOptions& engine) {
  d.options = {
      app.add_option("--steps", d.params.steps, "Block diffusion: Euler steps a block")->check(CLI::Range(1, 1000))->capture_default_str(),
      app.add_option("--guidance", d.params.guidance, "Block diffusion: v = v_uncond + guidance * (v_cond - v_uncond); 1 = off, half the rows")
          ->capture_default_str(),
      app.add_option("--block-size", engine.diffusion_block, "Block diffusion: latents denoised together; default: the checkpoint's")
          ->check(CLI::Range(1, 4096)),
      app.add_option("--noise", d.noise_file, "Block diffusion: take noise from tensor `noise` [sequences, blocks, block, latent_dim] of this safetensors file"),
      app.add_flag("--exact-timesteps", d.exact_timesteps, "Block diffusion: do not round timesteps to bf16, as the published code does"),
      app.add_flag("--official", d.params.official,
                   "Block diffusion: generate as the published script does, its endings and repetition penalty 1.1 included (docs/cola.md)")};
}

DiffusionParams DiffusionOptions::open() const {
  DiffusionParams p = params;
  if (exact_timesteps) p.timesteps = TimestepRounding::kNone;
  if (!noise_file.empty()) p.noise = std::make_shared<NoiseFile>(noise_file);
  validate(p);
  return p;
}

bool is_diffusion(const EngineOptions& options) { return is_cola_checkpoint(options.model_dir); }

void refuse_given(const std::vector<const CLI::Option*>& options, std::string_view why) {
  for (const CLI::Option* option : options)
    if (option->count() > 0) throw BadInput("{}: {}", option->get_name(), why);
}

Engine::Engine(const EngineOptions& o, Takes takes, std::string_view why) : ctx(memory, o.threads) {
  const auto start = std::chrono::steady_clock::now();
  if (takes == Takes::kAutoregressive && is_diffusion(o))
    throw Unsupported("{}: found a block-diffusion model (Cola DLM); {}", o.model_dir, why);
  memory.set_total_limit(o.memory_limit.empty() ? available_memory() / 20 * 19 : parse_bytes(o.memory_limit, "--memory-limit"));
  LoadOptions load;
  load.weights = o.weights == "int8" ? WeightMode::kInt8 : WeightMode::kStored;
  load.place = o.place == "mapped"   ? WeightPlace::kMapped
               : o.place == "copied" ? WeightPlace::kCopied
                                     : WeightPlace::kAuto;
  load.check_finite = o.check_weights;
  load.spikes = parse_spikes(o);
  if (o.window == "official") load.window = WindowRule::kOfficial;
  if (o.window == "exact") load.window = WindowRule::kExact;
  if (o.window == "plus_one") load.window = WindowRule::kPlusOne;
  any = load_any_model(ctx, o.model_dir, load, o.diffusion_block);
  model = any.autoregressive.get();
  const bool f32 = o.dtype == "f32" || (o.dtype == "auto" && any.weight_dtype() == DType::kF32);
  ctx.activations = f32 ? ActivationType::kF32 : ActivationType::kBF16;
  kv.dtype = parse_kv_dtype(o.kv_dtype, ctx.activations);
  prefill.chunk = o.chunk;
  prefill.cancelled = interrupted;
  load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string read_text(const std::string& path) {
  std::ostringstream out;
  if (path == "-") {
    out << std::cin.rdbuf();
  } else {
    if (std::filesystem::is_directory(path)) throw BadInput("{}: found a folder, expected a text file", path);
    std::ifstream in(path, std::ios::binary);
    if (!in) throw IoError("{}: cannot be opened for reading", path);
    out << in.rdbuf();
    if (in.bad()) throw IoError("{}: reading failed", path);
  }
  return out.str();
}

std::string human_bytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.1f} {}", bytes, kUnits[unit]);
}

size_t parse_bytes(const std::string& text, const std::string& what) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string unit(end, text.data() + text.size());
  double scale = 0;
  if (unit.empty() || unit == "B") scale = 1;
  else if (unit == "KiB" || unit == "K") scale = 0x1p10;
  else if (unit == "MiB" || unit == "M") scale = 0x1p20;
  else if (unit == "GiB" || unit == "G") scale = 0x1p30;
  if (error != std::errc() || scale == 0 || !(value > 0) || value * scale > 0x1p60)
    throw BadInput("{}: found \"{}\", expected a size such as 64MiB or 4GiB", what, text);
  return static_cast<size_t>(value * scale);
}

size_t peak_rss() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<size_t>(usage.ru_maxrss) * 1024;
}

nlohmann::json memory_json(const MemoryAccount& memory) {
  nlohmann::json out;
  for (int t = 0; t < kMemoryTags; ++t) {
    const auto tag = static_cast<MemoryTag>(t);
    out[std::string(memory_tag_name(tag))] = {{"now_bytes", memory.now(tag)}, {"peak_bytes", memory.peak(tag)}};
  }
  return out;
}

void print_out(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0)
    throw IoError("standard output: {} bytes could not be written (closed pipe or full disk)", text.size());
}

}  // namespace lacuna::cli
