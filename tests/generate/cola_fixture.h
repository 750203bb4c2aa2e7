// A tiny Cola model of the goldens, and a tokenizer for its 61 ids.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>

#include "generate/block_diffusion.h"

namespace lacuna::testing_cola {

// Letters, and every fifth id one byte of a two-byte character: 0xC3 or 0xA4 in turn. Id 60 is special.
class LetterTokenizer : public Tokenizer {
 public:
  LetterTokenizer() { vocab_size_ = 61; }
  std::string_view piece(int32_t) const override { return {}; }
  std::optional<int32_t> id(std::string_view) const override { return {}; }
  bool is_special(int32_t id) const override { return id == 60; }
  void append_bytes(int32_t id, bool, std::string& bytes) const override {
    if (id == 60) bytes += "<end>";
    else if (id % 5 == 4) bytes += id % 2 ? '\xC3' : '\xA4';
    else bytes += static_cast<char>('A' + id % 58);
  }

 protected:
  void encode_text(std::string_view text, std::vector<int32_t>& ids) const override {
    for (char c : text) ids.push_back(c - 'A');
  }
};

class Cola : public testing::Test {
 protected:
  Cola() : dir(std::filesystem::path(LACUNA_SOURCE_DIR) / "tests/goldens/cola/e2e"), ctx(memory, 2) {
    ctx.activations = ActivationType::kF32;
    model = ColaModel::load(ctx, dir);
    params.steps = 4;
  }
  BlockDiffusionGenerator generator(std::vector<int32_t> end_ids = {}) { return {ctx, *model, &tokenizer, std::move(end_ids), {}, params}; }
  GenerateRequest request(int64_t length, int64_t tokens) {
    GenerateRequest r;
    for (int64_t i = 0; i < length; ++i) r.prompt.push_back(static_cast<int32_t>((i * 17 + length * 5) % 61));
    r.sampling.max_new_tokens = tokens;
    return r;
  }

  std::filesystem::path dir;
  MemoryAccount memory;
  Context ctx;
  std::unique_ptr<ColaModel> model;
  LetterTokenizer tokenizer;
  DiffusionParams params;
};

}  // namespace lacuna::testing_cola
