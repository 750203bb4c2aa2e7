"""What a Cola model is measured by: reconstruction, robustness of the decoder to noise, the flow's loss, and generated
text judged by another language model."""
import json
import time
from pathlib import Path

import numpy as np
import torch

from ..export import load_model
from ..tokenizer import load_tokenizer
from . import losses as L
from .attention import packed
from .data import fixed_rows
from .dit import T
from .export import load_cola
from .sample import continue_greedily, generate

LEVELS = 0.0, 0.1, 0.2, 0.25, 0.3, 0.385, 0.5, 0.7


def chunks(rows, size):
    return [rows[i:i + size] for i in range(0, len(rows), size)]


@torch.no_grad()
def reconstruction(vae, rows, levels=LEVELS, seed=1, size=32):
    """Share of tokens that come back from (1 - t) z + t noise, z the posterior's mean, per t; rows [B, n]."""
    device = vae.cos.device
    generator = torch.Generator(device).manual_seed(seed)
    right = torch.zeros(len(levels), dtype=torch.float64, device=device)
    for ids in chunks(rows.to(device), size):
        z = vae.encode(ids)[0]
        noise = torch.randn(z.shape, device=device, generator=generator)
        for i, t in enumerate(levels):
            states = vae.decode_states(torch.lerp(z, noise, t))
            right[i] += (vae.logits(states.flatten(0, 1)).argmax(-1) == ids.flatten()).sum()
    return dict(zip(levels, (right / rows.numel()).tolist()))


@torch.no_grad()
def mean_logsnr(vae, rows, size=32):
    """-log E[sigma^2] of the posterior (the mean has unit variance)."""
    variances = [vae.encode(ids)[1].exp().mean() for ids in chunks(rows.to(vae.cos.device), size)]
    return float(-torch.stack(variances).mean().log())


@torch.no_grad()
def flow_losses(vae, dit, rows, levels=16, loc=1.0, scale=1.0, seed=1, size=16, on_mean=False):
    """(mean squared error of the velocity under the logit-normal's quantiles, [(t, error)]); the same t for a whole pass.

    on_mean: what is noised is the posterior's mean; the history is a sample either way."""
    device = vae.cos.device
    attend = packed(rows.shape[1], dit.config.block_size, device, "dense")
    generator = torch.Generator(device).manual_seed(seed)
    at = torch.special.ndtri((torch.arange(levels) + 0.5) / levels)
    ts = L.timesteps(at.float(), loc, scale).tolist()
    sums, count = torch.zeros(levels, dtype=torch.float64, device=device), 0
    for ids in chunks(rows.to(device), size):
        mean, logvar = vae.encode(ids)
        clean = vae.to_prior(L.sample(mean, logvar, torch.randn(mean.shape, device=device, generator=generator)))
        z0 = vae.to_prior(mean) if on_mean else clean
        z1 = torch.randn(mean.shape, device=device, generator=generator)
        for i, t in enumerate(ts):
            noisy = torch.lerp(z0, z1, t)
            velocity = L.packed_velocity(dit, clean, noisy, torch.full(ids.shape, t * T, device=device), attend)
            sums[i] += (velocity - (z1 - z0)).square().mean(-1).sum()
        count += ids.numel()
    errors = (sums / count).tolist()
    return float(np.mean(errors)), list(zip(ts, errors))


class Judge:
    """Negative log-likelihood that a model (a folder that export wrote) gives to texts after their prompts."""

    def __init__(self, folder, device, compute=None):
        compute = compute or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.model = load_model(folder, compute, device)
        self.tokenizer, self.device = load_tokenizer(folder), device

    @torch.no_grad()
    def __call__(self, prompts, texts, size=64):
        """(nats a judge's token, bits a byte, tokens) over all texts; nats a token of each text."""
        joined = [(p.ids, t.ids) for p, t in zip(*(self.tokenizer.encode_batch(list(x)) for x in (prompts, texts)))]
        nats, counts = [], []
        for part in chunks(joined, size):
            length = max(len(p) + len(t) for p, t in part)
            ids = torch.zeros(len(part), length, dtype=torch.long)
            carries = torch.zeros(len(part), length)
            for i, (p, t) in enumerate(part):
                ids[i, :len(p) + len(t)] = torch.tensor(p + t)
                carries[i, max(1, len(p)):len(p) + len(t)] = 1
            ids, carries = ids.to(self.device), carries.to(self.device)
            x = self.model.run(ids, compiled=False)
            each = self.model.losses(x, ids.roll(-1, 1).flatten(), compiled=False).unflatten(0, ids.shape)
            nats += (each[:, :-1] * carries[:, 1:]).sum(1).double().tolist()
            counts += carries[:, 1:].sum(1).tolist()
        nats, counts = np.array(nats), np.array(counts)
        size = sum(len(t.encode()) for t in texts)
        return {"nll": float(nats.sum() / max(counts.sum(), 1)), "bits_per_byte": float(nats.sum() / np.log(2) / max(size, 1)),
                "tokens": int(counts.sum()), "each": (nats / counts.clip(1)).tolist()}


def ngrams(ids, n):
    return [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]


def repetition(rows):
    """distinct-1, -2 and -3 over all rows of ids, and the share of 4-grams that stood in their row before."""
    out = {}
    for n in (1, 2, 3):
        every = [g for r in rows for g in ngrams(r, n)]
        out[f"distinct_{n}"] = len(set(every)) / max(len(every), 1)
    again = total = 0
    for r in rows:
        every = ngrams(r, 4)
        again += len(every) - len(set(every))
        total += len(every)
    return out | {"repeated_4": again / max(total, 1)}


def overlap(rows, references, n=2):
    """F1 of the n-grams of rows with those of the texts that really follow, counted with multiplicity."""
    from collections import Counter
    hits = made = wanted = 0
    for r, w in zip(rows, references):
        a, b = Counter(ngrams(r, n)), Counter(ngrams(w, n))
        hits += sum((a & b).values())
        made += sum(a.values())
        wanted += sum(b.values())
    return 2 * hits / max(made + wanted, 1)


class Seen:
    """Which n-grams of ids the training books hold, by a table of hashes (2^bits of them; a false hit is possible)."""

    def __init__(self, ids, n=4, bits=29):
        self.n, self.mask = n, (1 << bits) - 1
        self.table = np.zeros(1 << (bits - 3), np.uint8)
        for start in range(0, len(ids) - n, 1 << 22):
            h = self.hashes(np.asarray(ids[start:start + (1 << 22) + n - 1]))
            np.bitwise_or.at(self.table, h >> 3, (1 << (h & 7)).astype(np.uint8))

    def hashes(self, ids):
        h = np.zeros(len(ids) - self.n + 1, np.uint64)
        with np.errstate(over="ignore"):
            for i in range(self.n):
                h = (h ^ ids[i:len(ids) - self.n + 1 + i].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
                h ^= h >> np.uint64(29)
        return (h & np.uint64(self.mask)).astype(np.int64)

    def share(self, rows):
        hits = total = 0
        for r in rows:
            h = self.hashes(np.asarray(r))
            hits += int(((self.table[h >> 3] >> (h & 7)) & 1).sum())
            total += len(h)
        return hits / max(total, 1)


def texts_of(tokenizer, prompts, rows):
    """Texts of prompts and of what follows them (ids), split where the prompt ends."""
    before = tokenizer.decode_batch(prompts, skip_special_tokens=False)
    whole = tokenizer.decode_batch([p + r for p, r in zip(prompts, rows)], skip_special_tokens=False)
    return before, [w[len(b):] for b, w in zip(before, whole)]


def measure(tokenizer, judge, prompts, rows, references=None, seen=None):
    """All figures of generated rows (lists of ids) after prompts."""
    before, texts = texts_of(tokenizer, prompts, rows)
    figures = repetition(rows)
    if judge is not None:
        figures |= judge(before, texts)
        figures["stderr"] = float(np.std(figures["each"]) / np.sqrt(max(len(figures["each"]), 1)))
        del figures["each"]
    if references is not None:
        figures["overlap_1"], figures["overlap_2"] = overlap(rows, references, 1), overlap(rows, references, 2)
    if seen is not None:
        figures["seen_4"] = seen.share(rows)
    return figures, texts


def prompts_of(data, count, prompt, new, split="eval"):
    """(prompts [count, prompt], what follows them) of the evaluation books."""
    rows = fixed_rows(Path(data) / split, count, prompt + new, start=2000)
    return rows[:, :prompt], rows[:, prompt:]


def generated(vae, dit, prompts, new, steps, guidance, seed=66, penalty=1.1, size=512):
    """Continuations of prompts [B, n], cut to `new` tokens, as lists."""
    parts = [generate(vae, dit, p, new, steps, guidance, seed + i, penalty)[:, :new] for i, p in enumerate(chunks(prompts, size))]
    return torch.cat(parts).tolist()


def evaluate(args):
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = load_tokenizer(args.model)
    judge = Judge(args.judge, device) if args.judge else None
    prompts, follow = prompts_of(args.data, args.count, args.prompt, args.new)
    prompts, follow = prompts.to(device), follow.tolist()
    seen = Seen(np.memmap(Path(args.data) / "train.ids", np.uint16, "r")) if args.overlap else None
    results = {"model": str(args.model), "count": args.count, "prompt": args.prompt, "new": args.new, "cells": []}
    judged = lambda rows: measure(tokenizer, judge, prompts.tolist(), rows, follow, seen)
    kept, found = {}, dict(np.load(args.use_ids)) if args.use_ids else {}
    results["human"] = judged(follow)[0]
    if (Path(args.model) / "cola_vae").is_dir():
        vae, dit = load_cola(args.model, compute, device)
        dit.config.block_size = args.block or dit.config.block_size
        rows = fixed_rows(Path(args.data) / "eval", args.rows, 512)
        results["reconstruction"] = reconstruction(vae, rows)
        results["logsnr"] = mean_logsnr(vae, rows)
        results["block"] = dit.config.block_size
        results["flow"], results["flow_by_t"] = flow_losses(vae, dit, rows[:max(1, args.rows // 4)], on_mean=args.flow_on_mean)
        cells = [(s, g) for g in args.guidance for s in args.steps]
        make = lambda s, g: generated(vae, dit, prompts, args.new, s, g, args.seed, args.penalty)
    else:  # an autoregressive model: steps mean nothing, "guidance" is the temperature
        model = load_model(args.model, compute, device)
        cells = [(0, t) for t in args.temperature]
        make = lambda _, t: continue_greedily(model, prompts, args.new, t, args.top_p, args.seed).tolist()
    for steps, guidance in cells:
        began = time.monotonic()
        key = f"{steps}|{guidance:g}"
        made = found[key].tolist() if key in found else make(steps, guidance)
        kept[key] = np.array(made, np.int16)
        figures, texts = judged(made)
        results["cells"].append({"steps": steps, "guidance": guidance, **figures, "seconds": time.monotonic() - began,
                                 "samples": texts[:args.samples]})
        print(json.dumps({k: v for k, v in results["cells"][-1].items() if k != "samples"}), flush=True)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if args.keep_ids:
            np.savez_compressed(args.keep_ids, **kept)
    results["seconds"] = time.monotonic() - begun
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
