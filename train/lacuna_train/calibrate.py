"""Spiking after training (spec of SpikingBrain, section 3): k of every layer and coded input, from text.

For each layer and site alone: how far the layer's output moves, and how many windows stay silent, for
every k of a grid, on the dense model's own activations. Chosen are the k with the least sum of relative
errors whose silent windows, over all channels of all sites, reach the level of the paper. Errors of
sites are taken to add up; what the whole coded model does is measured afterwards.
"""
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from .books import Books
from .evaluate import bits_per_byte
from .export import load_model, replace_file
from .spike import DEFAULT_K, DOWN_IN, SITES, Tally, listening, silent_windows, spikes
from .tokenizer import load_tokenizer

BATCH_TOKENS = 1 << 15


@torch.no_grad()
def measure(model, ids, grid):
    """ids [samples, n] -> relative squared error of the layer's output, and silent share, [L, 4, K] each; channels [4]."""
    layers, sites = len(model.layers), len(SITES)
    moved = torch.zeros(layers, sites, len(grid), dtype=torch.float64)
    silent, size = torch.zeros_like(moved), torch.zeros(layers, dtype=torch.float64)
    channels = torch.zeros(sites, dtype=torch.float64)
    batch = max(1, BATCH_TOKENS // ids.shape[1])
    parts = ids.split(batch)
    for part in parts:
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(part))
        model.code(torch.zeros(layers, sites))
        x = model.embed(part.reshape(-1))
        for index, layer in enumerate(model.layers):
            heard = {}
            with listening(heard.__setitem__):
                y = model.run_layer(layer, x, len(part), positions, compiled=False)
            size[index] += float((y - x).double().square().sum())
            for site in range(sites):
                channels[site] = heard[site].shape[-1]
                for i, k in enumerate(grid):
                    silent[index, site, i] += float(silent_windows(spikes(heard[site], k)[0])) * len(part) / len(ids)
                    model.spike_k[index, site] = k
                    coded = model.run_layer(layer, x, len(part), positions, compiled=False)
                    moved[index, site, i] += float((coded - y).double().square().sum())
                model.spike_k[index, site] = 0.0
            x = y
    model.code(None)
    return moved / size[:, None, None], silent, channels


def choose(error, silent, channels, target):
    """Indices into the grid [L, sites]: least error whose mean silent share, weighted by channels, is at least `target`.

    By a price on silence: per site the least of error − price · silence, the lowest price that reaches the target;
    the sparsest choice of all where none does."""
    weight = channels / channels.sum() / silent.shape[0]  # of a site in the mean over layers
    reach = lambda pick: float((silent.gather(2, pick[..., None])[..., 0] * weight).sum())
    at = lambda price: (error - price * weight[:, None] * silent).argmin(-1)
    low, high = 0.0, 1.0
    if reach(at(0.0)) >= target:
        return at(0.0)
    while reach(at(high)) < target:
        high *= 4
        if high > 1e12:
            return silent.argmax(-1)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reach(at(middle)) >= target else (middle, high)
    return at(high)


@torch.no_grad()
def observe(model, ids, k):
    """Tallies of the whole coded model: of all its coded inputs, and of each site."""
    model.code(k)
    tallies = {name: Tally() for name in ("all", *SITES)}
    order = []

    def listener(site, x):
        layer = len(order) // len(SITES) % len(model.layers)
        order.append(site)
        if k[layer, site] > 0:
            counts, _ = spikes(x, k[layer, site])
            tallies["all"].add(counts)
            tallies[SITES[site]].add(counts)

    with listening(listener):
        for part in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            model.run(part, compiled=False)
    model.code(None)
    return {name: tally.shares() for name, tally in tallies.items() if tally.count}


def samples(books, count, length, seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([books.passage(rng, length)[0] for _ in range(count)]).astype(np.int64))


def calibrate(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    data = Path(args.data)
    ids = samples(Books(data / "train"), args.samples, args.length, args.seed).to(device)
    grid = torch.tensor(sorted(args.grid), dtype=torch.float64)
    error, silent, channels = measure(model, ids, grid.tolist())
    if args.mode == "reference":  # down_proj's input is not coded, so it counts neither way
        error, silent, channels = (t.narrow(d, 0, DOWN_IN) for t, d in ((error, 1), (silent, 1), (channels, 0)))
    default = torch.full((len(model.layers), len(SITES)), DEFAULT_K)
    # Coded layers feed coded layers, so the whole model's share is a little off the layers' own: aim again.
    target = args.level
    for _ in range(4):
        k = default.clone()
        k[:, :len(channels)] = grid[choose(error, silent, channels, target)].float()
        used = k.clone()
        used[:, len(channels):] = 0.0
        seen = observe(model, ids, used)
        short = args.level - seen["all"]["silent_window_share"]
        if short <= 0:
            break
        target += short + 2e-4
    flat = default.clone()
    flat[:, len(channels):] = 0.0

    report = {"model": str(args.model), "mode": args.mode, "samples": args.samples, "length": args.length, "seed": args.seed,
              "grid": grid.tolist(), "level": args.level, "reached": short <= 0, "k_by_layer": k.tolist(),
              "calibrated": seen, f"k = {DEFAULT_K:g} everywhere": observe(model, ids, flat),
              "layer_error": error.tolist(), "layer_silent": silent.tolist()}
    if not args.no_bits:
        books, tokenizer = Books(data / "eval"), load_tokenizer(data / "tokenizer")
        bits = {}
        for name, coding in (("off", None), (f"{DEFAULT_K:g}", flat), ("config", used)):
            model.code(coding)
            bits[name] = bits_per_byte(model, books, tokenizer, args.bits_length, device, args.bits_tokens)
        model.code(None)
        report["bits_per_byte"] = {"length": args.bits_length, **bits}
    write(args, k, report)
    for name in ("calibrated", f"k = {DEFAULT_K:g} everywhere"):
        s = report[name]["all"]
        print(f"{name}: silent windows {s['silent_window_share']:.4f}, zero counts {s['zero_count_share']:.4f}, bits a count "
              f"{s['mean_popcount']:.3f}, at most 7 {s['at_most_7_share']:.4f}, largest {s['largest_count']:.0f}")
    if not report["reached"]:
        print(f"no k of the grid reaches {args.level:.4f} of silent windows")
    if "bits_per_byte" in report:
        print("bits per byte " + ", ".join(f"{n} {v:.4f}" if n != "length" else f"at {v}" for n, v in report["bits_per_byte"].items()))


def write(args, k, report):
    """The model's folder again, with spike_coding in its config, and what was measured."""
    source, out = Path(args.model), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "config.json" and path.resolve() != (out / path.name).resolve():
            replace_file(out / path.name, lambda p, path=path: shutil.copyfile(path, p))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["spike_coding"] = {"mode": args.mode, "k": DEFAULT_K, "k_by_layer": k.tolist()}
    for name, content in (("config.json", config), ("spike-calibration.json", report)):
        text = json.dumps(content, indent=1) + "\n"
        replace_file(out / name, lambda p, text=text: Path(p).write_text(text, encoding="utf-8"))
