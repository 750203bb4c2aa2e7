#include "eval/tasks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

namespace lacuna {
namespace {

// A tokenizer with the seams of byte-level BPE: a token is a space or not, then letters, or up to three
// digits, or one other byte.
std::vector<int32_t> encode(std::string_view text) {
  std::vector<int32_t> ids;
  const auto kind = [](char c) { return c >= '0' && c <= '9' ? 1 : (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? 2 : 0; };
  for (size_t i = 0; i < text.size();) {
    size_t end = i + (text[i] == ' ' && i + 1 < text.size() && kind(text[i + 1]) == 2 ? 1 : 0);
    if (kind(text[end]) == 2) {
      while (end < text.size() && kind(text[end]) == 2) ++end;
    } else if (kind(text[end]) == 1) {
      for (size_t begin = end; end < text.size() && end - begin < 3 && kind(text[end]) == 1;) ++end;
    } else {
      ++end;
    }
    ids.push_back(static_cast<int32_t>(hash_name(text.substr(i, end - i)) & 0x7fffffff));
    i = end;
  }
  return ids;
}

std::string sample_book() {
  std::string text;
  EvalRandom random(5);
  const char* words[] = {"river", "stood", "under", "morning", "lamps", "quietly", "went", "again", "house", "letters", "and", "the"};
  const char* names[] = {"Margaret", "Thomas", "London", "Eleanor"};
  for (int paragraph = 0; paragraph < 400; ++paragraph) {
    for (int sentence = 0; sentence < 6; ++sentence) {
      text += sentence ? " The" : "The";
      for (int w = 0; w < 16; ++w) text += std::string(" ") + (w == 9 ? names[random.below(4)] : words[random.below(12)]);
      text += sentence % 3 == 1 ? ".\"" : ".";
    }
    text += "\r\n\r\n\r\n";
  }
  return text;
}

class Tasks : public ::testing::Test {
 protected:
  Tasks() : maker(spec, (books.add("sample", sample_book()), books), encode, 11) {}
  const PromptSpec& spec = builtin_prompt_spec();
  Haystack books;
  TaskMaker maker;
};

TEST_F(Tasks, EveryTaskFillsItsLengthAndHoldsItsAnswers) {
  for (const std::string& task : maker.expand("all"))
    for (int64_t length : {512, 2000, 4096})
      for (const char* split : {"train", "held_out"}) {
        const TaskPrompt p = maker.make({task, length, 3, split, {}});
        const int64_t tokens = static_cast<int64_t>(p.ids.size());
        EXPECT_EQ(tokens, static_cast<int64_t>(encode(p.text).size())) << task;
        EXPECT_LE(tokens + p.new_tokens, length) << task;
        // A whole sentence, and for streams a whole rank of words, may be missing.
        EXPECT_GE(tokens + p.new_tokens, length * 85 / 100 - 30) << task << " at " << length;
        ASSERT_FALSE(p.references.empty());
        for (const std::string& reference : p.references)
          EXPECT_NE(p.text.find(reference), std::string::npos) << task << ": " << reference;
        EXPECT_EQ(string_match(p.answer, p.references, p.rule), 1.0) << task;
        EXPECT_EQ(p.answer.front(), ' ');
        EXPECT_EQ(p.answer.back(), '\n');
        EXPECT_EQ(p.text.back(), ':') << task;
        // What stands before the question is the context with its end mark.
        EXPECT_GT(p.question_at, tokens / 2) << task;
        const std::vector<int32_t> mark = encode(" [end]\n\n");
        EXPECT_TRUE(std::equal(mark.begin(), mark.end(), p.ids.begin() + p.question_at - static_cast<int64_t>(mark.size()))) << task;
      }
}

TEST_F(Tasks, AFunctionOfSeedTaskLengthAndIndexAlone) {
  const TaskPrompt a = maker.make({"multikey_4", 1000, 5, "train", {}});
  maker.make({"json_lookup", 700, 1, "train", {}});
  EXPECT_EQ(a.text, maker.make({"multikey_4", 1000, 5, "train", {}}).text);
  EXPECT_NE(a.text, maker.make({"multikey_4", 1000, 6, "train", {}}).text);
  const TaskMaker other(spec, books, encode, 12);
  EXPECT_NE(a.text, other.make({"multikey_4", 1000, 5, "train", {}}).text);
}

TEST_F(Tasks, DepthsAreWhereAskedAndChangeNothingElse) {
  for (const std::string& task : maker.expand("all")) {
    if (!maker.takes_depth(task)) {
      EXPECT_THROW(maker.make({task, 2048, 0, "train", 0.5}), BadInput) << task;
      continue;
    }
    std::set<std::string> answers;
    for (double depth : {0.0, 0.25, 0.5, 0.75, 1.0}) {
      const TaskPrompt p = maker.make({task, 2048, 0, "train", depth});
      answers.insert(p.answer);
      // A sentence is the grain of a book; json and needles are finer.
      EXPECT_NEAR(p.depth, depth, 0.06) << task;
    }
    EXPECT_EQ(answers.size(), 1u) << task;
  }
}

TEST_F(Tasks, UniformDepthsAndKinds) {
  double sum = 0;
  std::set<std::string> keys;
  for (int64_t i = 0; i < 200; ++i) {
    const TaskPrompt p = maker.make({"single_number_noise", 600, i, "train", {}});
    sum += p.depth;
    ASSERT_EQ(p.references.size(), 1u);
    EXPECT_EQ(p.references[0].size(), 7u);
    EXPECT_NE(p.references[0][0], '0');
    keys.insert(p.references[0]);
  }
  EXPECT_NEAR(sum / 200, 0.48, 0.07);
  EXPECT_EQ(keys.size(), 200u);
  EXPECT_EQ(maker.make({"single_uuid_book", 600, 0, "train", {}}).references[0].size(), 36u);
  EXPECT_EQ(maker.make({"multivalue", 800, 0, "train", {}}).references.size(), 4u);
  EXPECT_EQ(maker.make({"multiquery", 800, 0, "train", {}}).references.size(), 4u);
  EXPECT_EQ(maker.make({"variable_tracking", 800, 0, "train", {}}).references.size(), 5u);
}

TEST_F(Tasks, ValuesAndChainsAreListedInTheOrderOfTheText) {
  for (int64_t i = 0; i < 20; ++i)
    for (const char* task : {"multivalue", "variable_tracking"}) {
      const TaskPrompt p = maker.make({task, 1500, i, "train", {}});
      size_t last = 0;
      for (const std::string& reference : p.references) {
        const size_t at = p.text.find(" " + reference);
        EXPECT_GT(at, last) << task;
        last = at;
      }
    }
}

TEST_F(Tasks, CountedWordsAreTheMostFrequent) {
  for (const char* task : {"frequent_words", "common_words"})
    for (int64_t length : {600, 3000}) {
      const TaskPrompt p = maker.make({task, length, 2, "train", {}});
      const size_t begin = p.text.find("\n\n") + 2, end = p.text.find(" [end]");
      std::map<std::string, int> counts;
      std::string word;
      for (char c : p.text.substr(begin, end - begin) + " ")
        if (c >= 'a' && c <= 'z') word += c;
        else if (!word.empty()) ++counts[word], word.clear();
      int least = 1 << 20, most = 0;
      for (const auto& [w, n] : counts) {
        const bool answer = std::find(p.references.begin(), p.references.end(), w) != p.references.end();
        if (answer) least = std::min(least, n);
        else most = std::max(most, n);
      }
      EXPECT_GT(least, most) << task << " at " << length;
    }
}

TEST_F(Tasks, GapsNameTheMissingWord) {
  for (int64_t i = 0; i < 10; ++i) {
    const TaskPrompt p = maker.make({"qa", 1200, i, "train", {}});
    const size_t gap = p.text.find(" ____ ");
    ASSERT_NE(gap, std::string::npos);
    const size_t left = p.text.rfind("... ", gap) + 4, right = p.text.find(" ...", gap);
    std::string sentence = p.text.substr(left, right - left);
    sentence.replace(sentence.find("____"), 4, p.references[0]);
    EXPECT_NE(p.text.find(" " + sentence), std::string::npos) << sentence;
  }
}

TEST_F(Tasks, RequestsThatCannotBeServed) {
  EXPECT_THROW(maker.make({"no_such_task", 1000, 0, "train", {}}), BadInput);
  EXPECT_THROW(maker.make({"passkey", 1000, 0, "no_split", {}}), BadInput);
  EXPECT_THROW(maker.make({"passkey", 40, 0, "train", {}}), BadInput);
  EXPECT_THROW(maker.make({"passkey", 1000, 0, "train", 1.5}), BadInput);
  EXPECT_THROW(maker.make({"single_word_book", 10'000'000, 0, "train", {}}), BadInput);
  EXPECT_THROW(maker.expand("passkey,nothing"), BadInput);
  EXPECT_EQ(maker.expand("ruler").size(), 14u);
}

TEST_F(Tasks, BeginOfTextCounts) {
  const TaskMaker with(spec, books, encode, 11, {1});
  const TaskPrompt p = with.make({"passkey", 700, 0, "train", {}});
  EXPECT_EQ(p.ids.front(), 1);
  EXPECT_LE(static_cast<int64_t>(p.ids.size()) + p.new_tokens, 700);
}

TEST(PromptSpecFile, FaultsAreNamed) {
  const std::string good(R"({"format": 1, "layout": "{context}{question}{cue}", "answer": " {answer}\n",
    "separators": {"items": ", ", "last_item": " and "}, "count_words": ["zero", "one", "two"],
    "kinds": {"code": {"name": "code", "plural": "codes", "digits": 5}},
    "tasks": {"passkey": {"wording": "passkey", "context": "noise", "new_tokens": 8, "kind": "code"}},
    "wordings": {"passkey": {"train": [{"intro": "I", "needle": "N {value}.", "question": "Q?", "cue": "C:"}]}},
    "noise": {"train": [["A."]]}, "lists": {"adjectives": ["a"], "nouns": ["b"], "words": ["c"], "letters": "DE"}})");
  EXPECT_EQ(parse_prompt_spec(good, "p").tasks.size(), 1u);
  const auto broken = [&](const std::string& from, const std::string& to, const std::string& message) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    try {
      parse_prompt_spec(text, "p");
      ADD_FAILURE() << "accepted " << to;
    } catch (const CorruptData& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  broken("\"format\": 1", "\"format\": 2", "p.format is 2");
  broken("\"digits\": 5", "\"digits\": 50", "p.kinds.code.digits");
  broken("\"kind\": \"code\"", "\"kind\": \"colour\"", "p.tasks.passkey.kind");
  broken("\"needle\": \"N {value}.\", ", "", "\"needle\" is missing");
  broken("[\"A.\"]", "[]", "p.noise.train[0]");
  broken("\"adjectives\"", "\"adverbs\"", "\"adjectives\" is missing");
  broken("\"wording\": \"passkey\"", "\"wording\": \"riddle\"", "not a known wording");
}

TEST(FillTemplate, UnknownNamesAreRefused) {
  EXPECT_EQ(fill_template("a {b} {c", {{"b", "x"}}), "a x {c");
  EXPECT_THROW(fill_template("{d}", {}), BadInput);
}

TEST(HaystackText, CleansAndFindsSentences) {
  Haystack h;
  h.add("x", "\xef\xbb\xbf" "One two.  Three.\r\n\r\n\r\n\r\n\xe2\x80\x9c" "Four!\xe2\x80\x9d Five went. six");
  ASSERT_EQ(h.books().size(), 1u);
  const auto& book = h.books()[0];
  EXPECT_EQ(book.text, "One two.  Three.\n\n\xe2\x80\x9c" "Four!\xe2\x80\x9d Five went. six");
  EXPECT_EQ(book.starts.size(), 2u);
  ASSERT_EQ(book.ends.size(), 1u);
  EXPECT_EQ(book.text.substr(book.ends[0], 5), " Five");
  EXPECT_THROW(Haystack::open("no/such/folder"), IoError);
}

}  // namespace
}  // namespace lacuna
