#include "cli.h"
namespace lacuna::cli {
Command add_bench(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("bench", "");
  return {app, [] { return 0; }};
}
}  // namespace lacuna::cli
