#include "generate/open.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace lacuna {
namespace {

namespace fs = std::filesystem;

class Open : public testing::Test {
 protected:
  Open() : ctx(memory, 1) {}
  const fs::path stories = fs::path(LACUNA_SOURCE_DIR) / "tests/data/stories260K";
  const fs::path cola = fs::path(LACUNA_SOURCE_DIR) / "tests/goldens/cola/e2e";
  MemoryAccount memory;
  Context ctx;
};

TEST_F(Open, PicksTheKindByTheDirectory) {
  AnyModel a = load_any_model(ctx, stories), d = load_any_model(ctx, cola, {}, 8);
  EXPECT_TRUE(a.autoregressive && !a.diffusion);
  EXPECT_TRUE(d.diffusion && !d.autoregressive);
  EXPECT_EQ(d.architecture(), "cola");
  EXPECT_EQ(d.vocab(), 61);
  EXPECT_EQ(d.diffusion->config().dit.block, 8);
  EXPECT_GT(d.parameters(), 100000);
  EXPECT_THROW(load_any_model(ctx, stories, {}, 8), BadInput);

  const ModelText text = open_text(stories);
  EXPECT_FALSE(text.end_ids.empty());
  GenerateRequest request;
  request.prompt = text.tokenizer->encode("Once upon", true);
  request.sampling.max_new_tokens = 4;
  EXPECT_EQ(make_generator(ctx, a, text, {}, {})->generate({&request, 1})[0].ids.size(), 4u);
  request.prompt = {3, 4};
  EXPECT_EQ(make_generator(ctx, d, {}, {}, {})->generate({&request, 1})[0].ids.size(), 4u);
  // Only a block-diffusion model holds later tokens fixed.
  request.infill = {-1, 5};
  request.prompt = {3};
  EXPECT_EQ(make_generator(ctx, d, {}, {}, {})->generate({&request, 1})[0].ids[1], 5);
  EXPECT_THROW(make_generator(ctx, a, text, {}, {})->generate({&request, 1}), BadInput);
}

TEST_F(Open, ACheckpointWithoutTokenizerIsAnErrorThatSaysSo) {
  try {
    open_text(cola);
    FAIL();
  } catch (const BadInput& e) {
    EXPECT_NE(std::string(e.what()).find("tokenizer.json"), std::string::npos);
  }
}

}  // namespace
}  // namespace lacuna
