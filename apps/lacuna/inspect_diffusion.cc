// lacuna inspect of a Cola DLM directory.
#include <charconv>
#include <fstream>
#include <sstream>

#include "inspect.h"
#include "formats/safetensors.h"

namespace lacuna::cli {

std::vector<int32_t> parse_ids(std::string text) {
  if (text.starts_with("@")) {
    std::ifstream in(text.substr(1));
    if (!in) throw IoError("{}: cannot be opened for reading", text.substr(1));
    std::ostringstream all;
    all << in.rdbuf();
    text = all.str();
  }
  for (char& c : text)
    if (c == ',' || c == '\n' || c == '\t' || c == '\r' || c == '[' || c == ']') c = ' ';
  std::vector<int32_t> ids;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    int32_t id = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc() || end != word.data() + word.size())
      throw BadInput("--ids: found \"{}\" at index {}, expected a token id", word, ids.size());
    ids.push_back(id);
  }
  return ids;
}

namespace {

// Latents and velocities of one request's steps, and what its blocks became.
class StepRecorder : public DiffusionObserver {
 public:
  void on_prompt(size_t, std::span<const float> latents) override { add(z, latents); }
  void on_step(const DenoiseStep& s) override {
    add(latents, s.x);
    add(velocity, s.v);
  }
  void on_block(size_t, int64_t, std::span<const float> clean, std::span<const float> rows) override {
    add(latents, clean);
    add(logits, rows);
    ++blocks;
  }
  std::vector<float> z, latents, velocity, logits;
  int64_t blocks = 0;

 private:
  static void add(std::vector<float>& to, std::span<const float> from) { to.insert(to.end(), from.begin(), from.end()); }
};

void write_run(const InspectOptions& o, const DiffusionParams& params) {
  const std::vector<int32_t> ids = parse_ids(o.ids);
  Engine engine(o.engine, Takes::kAny);
  ColaModel& model = *engine.any.diffusion;
  const ColaConfig& c = model.config();
  const auto n = static_cast<int64_t>(ids.size());
  if (n == 0 || n % c.vae.patch != 0) throw BadInput("--ids: found {} ids, expected a multiple of {}, the tokens of a latent", n, c.vae.patch);
  const int64_t rows = n / c.vae.patch, d = c.latent_dim(), block = c.dit.block;
  Results results;
  results.add("input_ids", DType::kI32, {n}, ids);
  std::vector<float> mean(static_cast<size_t>(rows * d)), logvar(mean.size()), logits(static_cast<size_t>(n * c.vae.vocab));
  const int64_t lengths[] = {n};
  model.encode(engine.ctx, ids, lengths, mean.data(), logvar.data());
  results.add("mean", DType::kF32, {rows, d}, mean);
  results.add("logvar", DType::kF32, {rows, d}, logvar);
  model.to_prior(mean);
  results.add("z", DType::kF32, {rows, d}, mean);
  {
    ColaState state = model.new_state(engine.memory, engine.kv);
    const LatentRows entry[] = {{&state, rows}};
    model.decode(engine.ctx, mean.data(), entry, logits.data());
  }
  results.add("logits", DType::kF32, {n, c.vae.vocab}, logits);
  if (o.greedy > 0) {
    StepRecorder recorder;
    BlockDiffusionGenerator generator(engine.ctx, model, nullptr, {}, engine.kv, params);
    generator.observe(&recorder);
    GenerateRequest request;
    request.prompt = ids;
    request.sampling.max_new_tokens = o.greedy;
    const GenerateResult result = generator.generate({&request, 1}, {.cancelled = interrupted})[0];
    results.add("greedy_ids", DType::kI32, {static_cast<int64_t>(result.ids.size())}, result.ids);
    results.add("latents", DType::kF32, {recorder.blocks, params.steps + 1, block, d}, recorder.latents);
    results.add("velocity", DType::kF32, {recorder.blocks, params.steps, block, d}, recorder.velocity);
    results.add("block_logits", DType::kF32, {recorder.blocks, c.block_tokens(), c.vae.vocab}, recorder.logits);
  }
  results.write(o.out);
}

}  // namespace

int inspect_diffusion(const InspectOptions& o) {
  const ColaConfig c = load_cola_config(o.engine.model_dir);
  const DiffusionParams params = o.diffusion.open();
  nlohmann::json out = {{"architecture", "cola"},
                        {"tokenizer", !c.tokenizer_dir.empty()},
                        {"vae", {{"vocab", c.vae.vocab}, {"dim", c.vae.dim}, {"ffn", c.vae.ffn_dim}, {"heads", c.vae.heads}, {"head_dim", c.vae.head_dim},
                                 {"encoder_blocks", c.vae.encoder_blocks}, {"decoder_blocks", c.vae.decoder_blocks},
                                 {"latent_dim", c.vae.latent_dim}, {"patch", c.vae.patch}, {"block", c.vae.block},
                                 {"scaling_factor", c.vae.scaling_factor}, {"shifting_factor", c.vae.shifting_factor}}},
                        {"dit", {{"dim", c.dit.dim}, {"mlp", c.dit.mlp_dim}, {"heads", c.dit.heads}, {"head_dim", c.dit.head_dim},
                                 {"layers", c.dit.layers}, {"rope_dim", c.dit.rope_dim}, {"block", c.dit.block}}}};
  size_t bytes = 0;
  for (const auto& [part, dir] : {std::pair{"vae", c.vae_dir}, std::pair{"dit", c.dit_dir}}) {
    const ModelFiles files = ModelFiles::open(dir);
    int64_t parameters = 0;
    bytes += files.file_bytes();
    for (const auto& name : files.names()) {
      const Tensor t = files.get(name);
      if (!name.ends_with("_scale") && !name.ends_with("rope.freqs")) parameters += t.elements();
      out["tensors"].push_back({{"part", part}, {"name", name}, {"dtype", dtype_name(t.dtype)},
                                {"shape", std::vector<int64_t>(t.shape.begin(), t.shape.begin() + t.rank)}, {"bytes", t.bytes()}});
    }
    out[part]["parameters"] = parameters;
    out[part]["file_bytes"] = files.file_bytes();
  }
  out["file_bytes"] = bytes;
  for (DType t : {DType::kF32, DType::kBF16, DType::kI8}) {
    const auto slots = [&](int head_dim, int heads, int layers) { return KvLayout{t, head_dim, 32}.slot_bytes() * static_cast<size_t>(heads * layers); };
    out["kv_bytes_per_latent"][std::string(dtype_name(t))] =
        slots(c.dit.head_dim, c.dit.heads, c.dit.layers) + slots(c.vae.head_dim, c.vae.heads, c.vae.decoder_blocks);
  }
  if (!o.ids.empty()) write_run(o, params);
  if (o.json) {
    print_out(out.dump(2) + "\n");
    return 0;
  }
  const auto parameters = [&](const char* part) { return out[part]["parameters"].get<int64_t>(); };
  std::string text = fmt::format("Cola DLM: {} parameters, {}\n", parameters("vae") + parameters("dit"), human_bytes(static_cast<double>(bytes)));
  text += fmt::format("text VAE: {} parameters; {} encoder and {} decoder blocks of {}, {} heads of {}, FFN {}; vocabulary {}; latents of {} values, "
                      "{} token{} each, blocks of {}\n", parameters("vae"), c.vae.encoder_blocks, c.vae.decoder_blocks, c.vae.dim, c.vae.heads,
                      c.vae.head_dim, c.vae.ffn_dim, c.vae.vocab, c.vae.latent_dim, c.vae.patch, c.vae.patch == 1 ? "" : "s", c.vae.block);
  text += fmt::format("DiT: {} parameters; {} layers of {}, {} heads of {} (RoPE on {}), MLP {}; {} latents denoised together\n", parameters("dit"),
                      c.dit.layers, c.dit.dim, c.dit.heads, c.dit.head_dim, c.dit.rope_dim, c.dit.mlp_dim, c.dit.block);
  text += fmt::format("the DiT works on (latent - {:g}) * {:g}; {}\n", c.vae.shifting_factor, c.vae.scaling_factor,
                      c.tokenizer_dir.empty() ? "no tokenizer.json" : "with tokenizer.json");
  text += fmt::format("both caches a latent: {} in f32, {} in bf16, {} in int8\n", human_bytes(out["kv_bytes_per_latent"]["f32"].get<double>()),
                      human_bytes(out["kv_bytes_per_latent"]["bf16"].get<double>()), human_bytes(out["kv_bytes_per_latent"]["int8"].get<double>()));
  for (const auto& t : out["tensors"])
    text += fmt::format("  {} {:<52} {:<5} {}\n", t["part"].get<std::string>(), t["name"].get<std::string>(), t["dtype"].get<std::string>(),
                        t["shape"].dump());
  print_out(text);
  return 0;
}

}  // namespace lacuna::cli
