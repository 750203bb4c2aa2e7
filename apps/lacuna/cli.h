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
#include "models/forward.h"
#include "models/model.h"
#include "text/tokenizer.h"

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
};

// Adds -m, --threads, --dtype, --weights, --place, --kv-dtype, --chunk, --memory-limit, --window-rule, --no-check, --spikes,
// --spike-mode, --spike-k.
void add_engine_options(CLI::App& app, EngineOptions& options);

// A model with all that is needed to run it. Members are destroyed in reverse order.
struct Engine {
  explicit Engine(const EngineOptions& options);

  MemoryAccount memory;
  Context ctx;
  OpTotals totals;  // set ctx.trace = &totals to count what kernels did
  std::unique_ptr<Model> model;
  KvOptions kv;
  PrefillOptions prefill;  // chunk and Ctrl-C; add progress where wanted
  double load_seconds = 0;
};

// The tokenizer of a model directory; every command that reads or prints text needs one.
std::unique_ptr<Tokenizer> open_tokenizer(const EngineOptions& options);

// "5.2 MiB", "812 B"
std::string human_bytes(double bytes);
// "64MiB" → bytes. Throws BadInput naming `what`.
size_t parse_bytes(const std::string& text, const std::string& what);
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
