#include <vector>

#include "fuzz/fuzz.h"
#include "models/forward.h"
#include "models/state_file.h"

namespace {

struct Engine {
  Engine() : ctx(memory, 1) {
    ctx.activations = lacuna::ActivationType::kF32;
    model = lacuna::load_model(ctx, LACUNA_SOURCE_DIR "/tests/goldens/spikingbrain/base_T24");
  }
  lacuna::MemoryAccount memory;
  lacuna::Context ctx;
  std::unique_ptr<lacuna::Model> model;
};

}  // namespace

// What is read must be fit to go on from: another token runs on it.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Engine engine;
  return lacuna::fuzz(data, size, [](std::string_view text) {
    lacuna::StoredState stored = lacuna::load_state(engine.ctx, *engine.model, 4, lacuna::SafetensorsFile(std::as_bytes(std::span(text)), "fuzz"));
    std::vector<float> logits(static_cast<size_t>(engine.model->info().vocab));
    if (stored.state.next_position < engine.model->info().max_positions)
      lacuna::prefill(engine.ctx, *engine.model, stored.state, std::vector<int32_t>{1}, nullptr, {}, logits.data());
  });
}
