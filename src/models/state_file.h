#pragma once

#include <filesystem>
#include <span>
#include <vector>

#include "formats/safetensors_file.h"
#include "models/model.h"

namespace lacuna {

// A prefix that a model has read, kept for later runs: its cache (of any dtype, evicted or not), its recurrent
// states and its tokens.
struct StoredState {
  SequenceState state;
  std::vector<int32_t> ids;  // all tokens read, evicted ones too: as many as state.next_position
};

// Writes a safetensors file, whole or not at all:
//   ids I32 [n] · probe F32 [min(V, 256)] · state.<layer> F32 [heads, dk, dv] · for each layer and KV head
//   kv.<layer>.<head>.{k, v} dtype [slots, d], .position I32 [slots], and for int8 .{k,v}_scale F32 [slots]
// probe: the model's logits after a few fixed tokens, by which a file tells that it belongs to these weights.
void save_state(Context& ctx, Model& model, const SequenceState& state, std::span<const int32_t> ids,
                const std::filesystem::path& path);

// The same state, bit for bit, in pages of `page_slots`. Throws BadInput for a file of another model or other
// weights, CorruptData for one that is damaged or is no such file; each names file and tensor, found and expected.
StoredState load_state(Context& ctx, Model& model, int page_slots, const std::filesystem::path& path);
StoredState load_state(Context& ctx, Model& model, int page_slots, SafetensorsFile file);

}  // namespace lacuna
