#include "generate/open.h"

#include <algorithm>

#include "generate/autoregressive.h"

namespace lacuna {

ModelText open_text(const std::filesystem::path& dir) {
  if (!is_cola_checkpoint(dir)) return {load_tokenizer(dir), load_generation_config(dir).eos_ids};
  const ColaConfig config = load_cola_config(dir);
  if (config.tokenizer_dir.empty())
    throw BadInput("{}: has no tokenizer, expected tokenizer.json there or in its folder cola_dlm", dir.string());
  ModelText text{load_tokenizer(config.tokenizer_dir), load_generation_config(config.tokenizer_dir).eos_ids};
  const Tokenizer& t = *text.tokenizer;
  if (text.end_ids.empty())
    for (const std::optional<int32_t> id : {t.eos_id(), t.id("<|endoftext|>"), t.id("<|im_end|>")})
      if (id && std::find(text.end_ids.begin(), text.end_ids.end(), *id) == text.end_ids.end()) text.end_ids.push_back(*id);
  if (t.vocab_size() > config.vae.vocab)
    throw CorruptData("{}: the tokenizer has {} ids, {} has {}", config.tokenizer_dir.string(), t.vocab_size(),
                      (config.vae_dir / "config.json").string(), config.vae.vocab);
  return text;
}

std::string AnyModel::architecture() const { return diffusion ? "cola" : autoregressive->info().architecture; }
DType AnyModel::weight_dtype() const { return diffusion ? diffusion->info().weight_dtype : autoregressive->info().weight_dtype; }
int64_t AnyModel::vocab() const { return diffusion ? diffusion->config().vae.vocab : autoregressive->info().vocab; }
int64_t AnyModel::parameters() const {
  return diffusion ? diffusion->info().vae_parameters + diffusion->info().dit_parameters : autoregressive->info().parameters;
}
size_t AnyModel::weight_bytes() const { return diffusion ? diffusion->info().weight_bytes : autoregressive->info().weight_bytes; }

AnyModel load_any_model(Context& ctx, const std::filesystem::path& dir, const LoadOptions& options, int64_t diffusion_block) {
  if (is_cola_checkpoint(dir)) return {nullptr, ColaModel::load(ctx, dir, options, diffusion_block)};
  if (diffusion_block != 0) throw BadInput("{}: the model is autoregressive: it has no block size", dir.string());
  return {load_model(ctx, dir, options), nullptr};
}

std::unique_ptr<Generator> make_generator(Context& ctx, AnyModel& model, const ModelText& text, const KvOptions& kv,
                                          const PrefillOptions& prefill, const DiffusionParams& diffusion) {
  if (model.diffusion)
    return std::make_unique<BlockDiffusionGenerator>(ctx, *model.diffusion, text.tokenizer.get(), text.end_ids, kv, diffusion);
  LACUNA_CHECK(text.tokenizer != nullptr);
  return std::make_unique<AutoregressiveGenerator>(ctx, *model.autoregressive, *text.tokenizer, text.end_ids, kv, prefill);
}

}  // namespace lacuna
