#include "eval/spikes.h"

#include <map>

namespace lacuna {
namespace {

class SpikeCounter : public LayerObserver {
 public:
  bool wants_spikes() const override { return true; }
  void on_spikes(const SpikeTap& tap) override { stats[{tap.layer, tap.site}].add(tap.counts, tap.fan_out); }
  std::map<std::pair<int, SpikeSite>, SpikeStats> stats;
};

// One figure under each definition.
struct Definition {
  const char* key;     // in JSON
  const char* name;    // in the table of totals
  const char* column;  // in the other tables; null: not there
  double (*value)(const SpikeStats&);
  bool share;
};

constexpr Definition kDefinitions[] = {
    {"zero_count_share", "inputs without a spike (s = 0)", "s = 0",
     [](const SpikeStats& s) { return s.zero_count_share(); }, true},
    {"mean_count", "mean abs(s)", "mean abs(s)", [](const SpikeStats& s) { return s.mean_count(); }, false},
    {"mean_popcount", "binary ones of abs(s): spikes of a bidirectional code", "ones",
     [](const SpikeStats& s) { return s.mean_popcount(); }, false},
    {"at_most_7_share", "abs(s) <= 7", "<= 7", [](const SpikeStats& s) { return s.within_7_share(); }, true},
    {"above_16_share", "abs(s) > 16", "> 16", [](const SpikeStats& s) { return s.above_16_share(); }, true},
    {"zero_slot_share_3", "empty slots of 3 steps (digits above 4 dropped)", "slots, T = 3",
     [](const SpikeStats& s) { return s.zero_slot_share_3(); }, true},
    {"zero_slot_share_max", "empty slots of as many steps as the largest count takes", "slots, T max",
     [](const SpikeStats& s) { return s.zero_slot_share_max(); }, true},
    {"silent_window_share", "silent windows of 3 steps among 9 (the report's 69 %)", "silent windows",
     [](const SpikeStats& s) { return s.silent_window_share(); }, true},
    {"window_share_1", "windows with 1 spike", nullptr, [](const SpikeStats& s) { return s.window_share(1); }, true},
    {"window_share_2", "windows with 2 spikes", nullptr, [](const SpikeStats& s) { return s.window_share(2); }, true},
    {"window_share_3", "windows with 3 spikes or more", nullptr, [](const SpikeStats& s) { return s.window_share(3); },
     true},
    {"silent_channels_per_row", "silent channels a row", "silent a row",
     [](const SpikeStats& s) { return s.silent_channels_per_row(); }, false},
    {"ops_per_mac", "additions a dense multiply-accumulate", nullptr,
     [](const SpikeStats& s) { return s.ops_per_mac(); }, false},
};

std::string shown(const Definition& d, const SpikeStats& s) {
  return d.share ? fmt::format("{:.2f} %", 100 * d.value(s)) : fmt::format("{:.3f}", d.value(s));
}

std::vector<std::string> header(const char* first) {
  std::vector<std::string> row = {first};
  for (const Definition& d : kDefinitions)
    if (d.column) row.emplace_back(d.column);
  row.emplace_back("largest");
  return row;
}

std::vector<std::string> figures(std::string name, const SpikeStats& s) {
  std::vector<std::string> row = {std::move(name)};
  for (const Definition& d : kDefinitions)
    if (d.column) row.push_back(shown(d, s));
  row.push_back(std::to_string(s.most));
  return row;
}

Json json_of(const SpikeStats& s) {
  Json out;
  for (const Definition& d : kDefinitions) out[d.key] = d.value(s);
  out["largest_count"] = s.most;
  out["steps_max"] = s.steps();
  out["rows"] = s.rows;
  out["inputs"] = s.inputs;
  out["zero_counts"] = s.zero;
  out["spikes"] = s.spikes;
  out["counts_beyond_9_slots"] = s.beyond_slots;
  out["windows_by_spikes"] = s.windows;
  out["dense_macs"] = s.dense_macs;
  out["synaptic_ops"] = s.synaptic_ops;
  return out;
}

constexpr SpikeSite kInputs[] = {SpikeSite::kAttnIn, SpikeSite::kOIn, SpikeSite::kMlpIn, SpikeSite::kDownIn};

}  // namespace

SpikeStats SpikeResult::of(SpikeSite site) const {
  SpikeStats sum;
  for (const SpikePlace& p : places)
    if (p.site == site || (site == SpikeSite::kCount && p.site != SpikeSite::kQuery)) sum += p.stats;
  return sum;
}

SpikeResult measure_spikes(Context& ctx, Model& model, const TextCodec& codec, const std::vector<std::string>& texts,
                           int64_t window, int64_t max_windows, const KvOptions& kv, const PrefillOptions& options,
                           const std::function<void(int64_t, int64_t)>& progress) {
  const auto windows = spread_windows(model, codec, texts, window, max_windows);
  SpikeResult out;
  SpikeCounter counter;
  OpTotals totals;
  TraceSink* const before = ctx.trace;
  for (const auto& ids : windows) {
    SequenceState state = model.new_state(ctx.memory, kv);
    ctx.trace = &totals;
    try {
      prefill(ctx, model, state, ids, &counter, options, nullptr);
    } catch (...) {
      ctx.trace = before;
      throw;
    }
    ctx.trace = before;
    if (counter.stats.empty())
      throw BadInput("the model codes no activations as spikes; load it with spikes (--spikes integer)");
    out.tokens += static_cast<int64_t>(ids.size());
    ++out.windows;
    if (progress) progress(out.windows, static_cast<int64_t>(windows.size()));
  }
  for (const auto& [at, stats] : counter.stats) out.places.push_back({at.first, at.second, stats});
  out.executed = totals.of(OpKind::kSpike);
  return out;
}

std::string markdown_report(const SpikeResult& result) {
  const SpikeStats total = result.of(SpikeSite::kCount);
  std::string out = fmt::format("{} windows, {} tokens; {} coded inputs of linear layers\n\n", result.windows,
                                result.tokens, total.inputs);
  std::vector<std::vector<std::string>> rows = {{"all coded inputs", "value"}};
  for (const Definition& d : kDefinitions) rows.push_back({d.name, shown(d, total)});
  rows.push_back({"largest abs(s)", std::to_string(total.most)});
  out += markdown_table(rows) + "\n";

  rows = {header("site")};
  for (const SpikeSite site :
       {SpikeSite::kAttnIn, SpikeSite::kOIn, SpikeSite::kMlpIn, SpikeSite::kDownIn, SpikeSite::kQuery})
    if (const SpikeStats s = result.of(site); s.inputs > 0)
      rows.push_back(figures(std::string(spike_site_name(site)), s));
  out += markdown_table(rows) + "\n";
  rows = {header("layer, site")};
  for (const SpikePlace& p : result.places)
    rows.push_back(figures(fmt::format("{} {}", p.layer, spike_site_name(p.site)), p.stats));
  out += markdown_table(rows) + "\n";

  const SpikeEnergy e = compute_energy(total);
  out += fmt::format("additions at every spike {:.4g}, dense multiply-accumulates {:.4g}\n",
                     static_cast<double>(total.synaptic_ops), static_cast<double>(total.dense_macs));
  out += fmt::format(
      "executed in coded layers: {:.4g} additions at spikes, {:.4g} multiply-accumulates, {:.4g} bytes of weights\n",
      static_cast<double>(result.executed.synaptic_ops), static_cast<double>(result.executed.macs),
      static_cast<double>(result.executed.weight_bytes));
  out += fmt::format(
      "arithmetic alone at 45 nm ({} pJ an int8 addition, {} an int8 and {} an FP16 multiply-accumulate; no memory): "
      "{:.4g} J, {:.1f} % below int8, {:.1f} % below FP16\n",
      SpikeEnergy::kInt8Add, SpikeEnergy::kInt8Mac, SpikeEnergy::kFp16Mac, e.spike_joules,
      100 * (1 - e.spike_joules / e.int8_joules), 100 * (1 - e.spike_joules / e.fp16_joules));
  return out;
}

Json json_report(const SpikeResult& result) {
  const SpikeStats total = result.of(SpikeSite::kCount);
  const SpikeEnergy e = compute_energy(total);
  Json out = {{"kind", "spikes"}, {"tokens", result.tokens}, {"windows", result.windows}, {"total", json_of(total)}};
  for (const SpikeSite site : kInputs)
    if (const SpikeStats s = result.of(site); s.inputs > 0)
      out["sites"][std::string(spike_site_name(site))] = json_of(s);
  if (const SpikeStats s = result.of(SpikeSite::kQuery); s.inputs > 0) out["queries"] = json_of(s);
  out["layers"] = Json::array();
  for (const SpikePlace& p : result.places) {
    Json place = json_of(p.stats);
    place["layer"] = p.layer;
    place["site"] = spike_site_name(p.site);
    out["layers"].push_back(std::move(place));
  }
  out["executed"] = {{"synaptic_ops", result.executed.synaptic_ops},
                     {"macs", result.executed.macs},
                     {"weight_bytes", result.executed.weight_bytes},
                     {"seconds", static_cast<double>(result.executed.duration_ns) * 1e-9}};
  out["compute_energy_joules"] = {{"spikes", e.spike_joules}, {"int8", e.int8_joules}, {"fp16", e.fp16_joules}};
  return out;
}

}  // namespace lacuna
