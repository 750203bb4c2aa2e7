#include <csignal>
#include <cstdio>
#include <new>

#include "cli.h"

namespace {

// 2: the request was wrong; 130: interrupted, as shells say it; 1: the work failed.
int exit_code(lacuna::ErrorKind kind) {
  if (kind == lacuna::ErrorKind::kBadInput) return 2;
  if (kind == lacuna::ErrorKind::kCancelled) return 130;
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace lacuna;
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe becomes a failed write, and so a sentence
  install_interrupt_handler();

  CLI::App app{"Lacuna: long-context language models in a fraction of the memory"};
  app.name("lacuna");
  app.set_version_flag("--version", "lacuna " LACUNA_VERSION);
  app.require_subcommand(1);
  app.failure_message([](const CLI::App* a, const CLI::Error& e) {
    return fmt::format("{}: bad usage: {}\nRun with --help for the options.\n", a->get_name(), e.what());
  });
  const cli::Command commands[] = {cli::add_run(app), cli::add_eval(app), cli::add_bench(app), cli::add_inspect(app),
                                   cli::add_convert(app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    for (const auto& command : commands)
      if (command.app->parsed()) return command.run();
  } catch (const Error& e) {
    fmt::print(stderr, "lacuna: {}: {}\n", error_kind_name(e.kind()), e.what());
    return exit_code(e.kind());
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "lacuna: out of memory: the system refused an allocation\n");
    return 1;
  } catch (const std::exception& e) {
    fmt::print(stderr, "lacuna: internal error: {}\n", e.what());
    return 1;
  }
  return 2;
}
