#pragma once

#include <filesystem>
#include <memory>

#include "generate/block_diffusion.h"
#include "generate/generator.h"

namespace lacuna {

// What a model directory says about text.
struct ModelText {
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<int32_t> end_ids;  // any of them ends a text
};
// Of either kind of model. End ids come from generation_config.json or config.json; a Cola directory, which has
// neither, has those of its tokenizer: end-of-text and <|im_end|>, as the published benchmark passes them.
ModelText open_text(const std::filesystem::path& dir);

// A loaded model of either kind; one of the two is null.
struct AnyModel {
  std::unique_ptr<Model> autoregressive;
  std::unique_ptr<ColaModel> diffusion;

  std::string architecture() const;
  DType weight_dtype() const;
  int64_t vocab() const;
  int64_t parameters() const;
  size_t weight_bytes() const;  // as held in memory or mapped
};
// diffusion_block, if not 0, replaces the block size of a block-diffusion model, and is BadInput for others.
AnyModel load_any_model(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options = {}, int64_t diffusion_block = 0);

// The right Generator for it; everything named outlives it. Autoregressive models need a tokenizer.
std::unique_ptr<Generator> make_generator(Context& ctx, AnyModel& model, const ModelText& text, const KvOptions& kv,
                                          const PrefillOptions& prefill, const DiffusionParams& diffusion = {});

}  // namespace lacuna
