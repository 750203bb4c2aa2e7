#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lacuna {

// How the next token is drawn and when a text ends.
struct SamplingParams {
  float temperature = 0;         // [0, 100]; 0 = always the likeliest token
  int top_k = 0;                 // keep the k likeliest; 0 = all
  float top_p = 1;               // (0, 1]: keep the smallest set with this probability
  float min_p = 0;               // [0, 1]: drop what is less likely than min_p times the likeliest
  float repetition_penalty = 1;  // [0.01, 100]: divides positive, multiplies negative logits of seen ids
  uint64_t seed = 0;
  int64_t max_new_tokens = 256;   // ≥ 1
  std::vector<std::string> stop;  // texts that end the output; they are cut off
  bool ignore_eos = false;        // go on after an end-of-text id
};

// Throws BadInput that names the parameter, what was found and what is allowed.
void validate(const SamplingParams& params);

// A JSON object with any of the fields above (stop: a text or a list of texts); what it leaves out
// comes from `defaults`. Unknown fields, wrong types and values out of range are BadInput; `name`
// starts every message.
SamplingParams parse_sampling_params(std::string_view json, std::string_view name,
                                     const SamplingParams& defaults = {});

}  // namespace lacuna
