// What the commands share: options every command takes, opening an engine, printing results.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "base/progress.h"
#include "kernels/context.h"
#include "kernels/machine.h"
#include "generate/open.h"

namespace lacuna::cli {

struct EngineOptions {
  std::string model_dir;
  int threads = 0;                  // 0 = every core this process may use
  std::string dtype = "auto";       // f32 | bf16 | auto (f32 when the weights are f32)
  std::string weights = "stored";   // stored | int8
  std::string place = "auto";       // mapped | copied | auto
  std::string kv_dtype = "auto";    // f32 | bf16 | int8 | auto (as dtype)
  int64_t chunk = 512;              // activation chunk of prefill, tokens
  std::string memory_limit;         // "4GiB": refuse to allocate more; empty = what the machine has free
  std::string window = "config";    // config | official | exact | plus_one, for models whose code disagrees with itself
  std::string spikes = "auto";      // auto | off | fake | integer | event
  std::string spike_mode;           // reference | paper; empty = the checkpoint's
  double spike_k = 0;               // 0 = the checkpoint's
  bool check_weights = true;
  int64_t diffusion_block = 0;      // of a block-diffusion model; 0 = the checkpoint's
};

// Adds -m, --threads, --dtype, --weights, --place, --kv-dtype, --chunk, --memory-limit, --window-rule, --no-check, --spikes,
// --spike-mode, --spike-k.
void add_engine_options(CLI::App& app, EngineOptions& options);

// --steps, --guidance, --noise, --exact-timesteps, --official; with --block-size, which goes to the engine's options.
struct DiffusionOptions {
  DiffusionParams params;
  bool exact_timesteps = false;
  std::string noise_file;
  std::vector<const CLI::Option*> options;  // to see which were given
  // The parameters with the noise file, if any, opened.
  DiffusionParams open() const;
};
void add_diffusion_options(CLI::App& app, DiffusionOptions& diffusion, EngineOptions& engine);

// Whether the model directory is of the block-diffusion kind (Cola DLM).
bool is_diffusion(const EngineOptions& options);
// Throws BadInput that names the first of the options that was given: "--evict: " + why.
void refuse_given(const std::vector<const CLI::Option*>& options, std::string_view why);

enum class Takes { kAutoregressive, kAny };

// A model with all that is needed to run it. Members are destroyed in reverse order.
struct Engine {
  // Unsupported, with `why` as its sentence, for a block-diffusion model where only autoregressive ones are taken.
  explicit Engine(const EngineOptions& options, Takes takes = Takes::kAutoregressive,
                  std::string_view why = "this command needs an autoregressive model");

  MemoryAccount memory;
  Context ctx;
  OpTotals totals;  // set ctx.trace = &totals to count what kernels did
  AnyModel any;
  Model* model = nullptr;  // the autoregressive one, or null
  KvOptions kv;
  PrefillOptions prefill;  // chunk and Ctrl-C; add progress where wanted
  double load_seconds = 0;
};

// "5.2 MiB", "812 B"
std::string human_bytes(double bytes);
// "64MiB" → bytes. Throws BadInput naming `what`.
size_t parse_bytes(const std::string& text, const std::string& what);
// A text file; "-" is standard input. IoError or BadInput name the path.
std::string read_text(const std::string& path);
// Peak resident set of this process so far, bytes.
size_t peak_rss();
// Tags → {"now": …, "peak": …}.
nlohmann::json memory_json(const MemoryAccount& memory);

// Writes to standard output and throws IoError when nobody can read it any more (closed pipe, full disk).
void print_out(std::string_view text);

// A command: adds itself to the app; `run` is called after parsing when it was chosen and returns an exit code.
struct Command {
  CLI::App* app;
  std::function<int()> run;
};
Command add_run(CLI::App& app);
Command add_eval(CLI::App& app);
Command add_bench(CLI::App& app);
Command add_inspect(CLI::App& app);
Command add_convert(CLI::App& app);

}  // namespace lacuna::cli
