#include "eval/report.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace lacuna {
namespace {

// Two tasks, two lengths, four ways of holding the cache; scores fall with the budget.
EvalRun sample_run() {
  EvalRun run;
  run.header.model = "a <model> & \"more\"";
  run.header.activations = "bf16";
  run.header.kv_dtype = "bf16";
  run.header.wordings = "train";
  run.header.haystack = "books";
  run.header.seed = 3;
  run.header.variants = {"full", "laprox@5%", "laprox@20%", "snapkv@5%", "snapkv@20%", "full+int4"};
  const double keep[] = {1.0, 0.05, 0.2, 0.05, 0.2, 0.32};
  EvalRandom random(1);
  for (int64_t length : {1024, 4096})
    for (const char* task : {"single_word_book", "multivalue"})
      for (int64_t index = 0; index < 12; ++index) {
        PromptResult r;
        r.task = task;
        r.length = length;
        r.index = index;
        if (std::string(task) == "single_word_book") r.asked_depth = r.depth = static_cast<double>(index % 3) / 2;
        r.prompt_tokens = length - 20;
        r.full_bytes = 1000000;
        for (double k : keep) r.variants.push_back({random.unit() < 0.5 + k / 2 ? 1.0 : 0.0, "a\"b\n\xc3\xa9", static_cast<size_t>(1e6 * k), 10});
        run.results.push_back(r);
      }
  return run;
}

// Every tag that opens is closed in order; attributes are quoted; no stray '<' or '&'.
void expect_well_formed(const std::string& html) {
  std::vector<std::string> open;
  size_t at = html.find("<html");
  const size_t style = html.find("<style>"), style_end = html.find("</style>");
  while (at < html.size()) {
    if (at == style) {
      at = style_end + 8;
      continue;
    }
    if (html[at] == '&') {
      const size_t end = html.find(';', at);
      ASSERT_LT(end - at, 8u) << html.substr(at, 40);
    }
    if (html[at] != '<') {
      ++at;
      continue;
    }
    const size_t end = html.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = html.substr(at + 1, end - at - 1);
    ASSERT_EQ(std::count(tag.begin(), tag.end(), '"') % 2, 0) << tag;
    if (tag[0] == '/') {
      ASSERT_FALSE(open.empty()) << tag;
      ASSERT_EQ(open.back(), tag.substr(1)) << html.substr(at > 200 ? at - 200 : 0, 300);
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(tag.substr(0, tag.find_first_of(" \n")));
    }
    at = end + 1;
  }
  EXPECT_TRUE(open.empty()) << open.back();
}

TEST(Report, SummaryCountsAndCompares) {
  const EvalSummary s = summarise(sample_run());
  ASSERT_EQ(s.lengths.size(), 2u);
  EXPECT_EQ(s.lengths[0].length, 1024);
  EXPECT_EQ(s.lengths[0].prompts, 24);
  EXPECT_EQ(s.lengths[0].tasks, (std::vector<std::string>{"single_word_book", "multivalue"}));
  EXPECT_NEAR(s.lengths[0].variants[1].bytes_share, 0.05, 1e-9);
  EXPECT_EQ(s.lengths[0].variants[0].score.value, 1.0);
  EXPECT_LT(s.lengths[0].variants[0].score.low, 1.0);
  EXPECT_LE(s.lengths[0].variants[1].versus_full.difference.value, 0);
  ASSERT_EQ(s.comparisons.size(), 4u);  // two budgets at two lengths
  EXPECT_EQ(s.comparisons[0].a, "laprox@5%");
  EXPECT_EQ(s.comparisons[0].b, "snapkv@5%");
  EXPECT_EQ(s.depths.size(), 6u);
  EXPECT_EQ(summarise(sample_run(), "snapkv").comparisons[0].a, "snapkv@5%");
  EXPECT_THROW(summarise(EvalRun{}), BadInput);
}

TEST(Report, HtmlIsWellFormedAndSelfContained) {
  const std::string html = html_report(summarise(sample_run()), "Title <1>");
  expect_well_formed(html);
  EXPECT_EQ(html.find("http"), std::string::npos);
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_NE(html.find("Title &lt;1&gt;"), std::string::npos);
  EXPECT_NE(html.find("simulated"), std::string::npos);
  EXPECT_EQ(html.find("nan"), std::string::npos);
}

TEST(Report, MarkdownTablesAlign) {
  const std::string table = markdown_table({{"a", "b"}, {"\xc3\xa9", "1234"}});
  EXPECT_EQ(table, "| a   |    b |\n|-----|-----:|\n| \xc3\xa9   | 1234 |\n");
  const std::string text = markdown_report(summarise(sample_run()));
  EXPECT_NE(text.find("4096 tokens: mean of 2 task(s), 24 prompts"), std::string::npos);
  EXPECT_NE(text.find("laprox@5% \xe2\x88\x92 snapkv@5%"), std::string::npos);
}

TEST(Report, JsonHoldsEveryCell) {
  const Json json = json_report(summarise(sample_run()));
  EXPECT_EQ(json["lengths"][1]["variants_at_length"].size(), 6u);
  EXPECT_TRUE(json["lengths"][0]["variants_at_length"][5]["simulated_format"].get<bool>());
  EXPECT_EQ(json["lengths"][0]["variants_at_length"][1]["tasks"]["multivalue"]["count"], 12);
  EXPECT_EQ(json["depths"].size(), 6u);
}

class LogFile : public ::testing::Test {
 protected:
  ~LogFile() override { std::filesystem::remove(path); }
  std::filesystem::path path = std::filesystem::temp_directory_path() /
                               ("lacuna-log-" + std::to_string(::testing::UnitTest::GetInstance()->random_seed()) +
                                ::testing::UnitTest::GetInstance()->current_test_info()->name() + ".jsonl");
};

TEST_F(LogFile, GoesOnWhereItWasCutOff) {
  const EvalRun run = sample_run();
  {
    ResultLog log(path, run.header);
    for (size_t i = 0; i < 5; ++i) log.append(run.results[i]);
  }
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 7);  // as a kill would leave it
  {
    ResultLog log(path, run.header);
    EXPECT_EQ(log.run().results.size(), 4u);
    EXPECT_TRUE(log.has("single_word_book", 1024, 3, run.results[3].asked_depth));
    EXPECT_FALSE(log.has("single_word_book", 1024, 4, run.results[4].asked_depth));
    EXPECT_FALSE(log.has("single_word_book", 1024, 3, -1));
    for (size_t i = 4; i < run.results.size(); ++i) log.append(run.results[i]);
  }
  const EvalRun back = read_result_log(path);
  ASSERT_EQ(back.results.size(), run.results.size());
  EXPECT_EQ(json_report(summarise(back)), json_report(summarise(run)));
  EXPECT_EQ(back.results[7].variants[0].answer, run.results[7].variants[0].answer);
}

TEST_F(LogFile, OtherRunsAndBrokenLinesAreRefused) {
  const EvalRun run = sample_run();
  { ResultLog(path, run.header).append(run.results[0]); }
  EvalHeader other = run.header;
  other.seed = 4;
  EXPECT_THROW(ResultLog(path, other), BadInput);
  std::ofstream(path, std::ios::app) << "{\"task\": 3}\n";
  EXPECT_THROW(ResultLog(path, run.header), CorruptData);
  EXPECT_THROW(read_result_log(path), CorruptData);
  EXPECT_THROW(ResultLog("no/such/folder/log", run.header), IoError);
  EXPECT_THROW(ResultLog("/dev/full", run.header), BadInput);
  EXPECT_THROW(ResultLog(".", run.header), BadInput);
}

}  // namespace
}  // namespace lacuna
