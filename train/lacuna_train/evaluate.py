"""Greedy accuracy on the tasks, full cache or evicted, and bits per byte, on books never trained on.

Eviction is by mask (positions stay, entries become invisible), once, after a
full prefill that also gives the reply's first token; `share` counts the window.
"""
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from . import evict
from .books import Books
from .export import load_model
from .tasks import TASKS_OF_THE_MEAN, TaskMaker
from .tokenizer import EOS_ID

PREFILL_TOKENS = 1 << 18  # a chunk of prompts read at once; bounds the activations' memory

_maker = None


def _start(spec, data):
    global _maker
    _maker = TaskMaker(spec, Path(data) / "tokenizer", Books(Path(data) / "eval"))


def _make(job):
    task, length, split, seed, index = job
    # Tasks get streams of their own, so that adding one changes no other's prompts.
    example = _maker.make(task, np.random.default_rng([seed, length, index, *task.encode()]), length, split=split)
    return example.prompt().astype(np.int64), example.questions[0].references


def score(text, references):
    """The share of references found before the first newline."""
    line = text.split("\n", 1)[0]
    return sum(r in line for r in references) / len(references)


class Generator:
    """Prompts of one cell, prefilled together, then decoded under several policies."""

    def __init__(self, model, device):
        self.model, self.device = model, device

    @torch.no_grad()
    def prefill(self, prompts, new_tokens, shares, scored):
        m, c = self.model, self.model.config
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.width = int(self.lengths.max())
        rows = len(prompts)
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, self.width + new_tokens, c.head_dim)
        self.keys = torch.zeros(shape, dtype=m.compute, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.scores = {name: [] for name in ("snapkv", "laprox")} if scored else {}
        first = []
        step = max(1, PREFILL_TOKENS // self.width)
        collected = {name: [[] for _ in range(c.num_hidden_layers)] for name in self.scores}
        for start in range(0, rows, step):
            part = prompts[start:start + step]
            ids = torch.full((len(part), self.width), EOS_ID, dtype=torch.long)
            for i, p in enumerate(part):
                ids[i, :len(p)] = torch.from_numpy(p)
            ids = ids.to(self.device)
            lengths = self.lengths[start:start + step]

            def watch(index, layer, q, k, v):
                q, k, v = (t.unflatten(0, ids.shape) for t in (q, k, v))
                self.keys[index, start:start + step, :, :self.width] = k.transpose(1, 2)
                self.values[index, start:start + step, :, :self.width] = v.transpose(1, 2)
                if scored:
                    both = evict.window_scores(q, k, v, layer.self_attn["o_proj"].weight, lengths)
                    for name, s in zip(("snapkv", "laprox"), both):
                        collected[name][index].append(s)

            x = m.run(ids, watch, compiled=False).view(len(part), self.width, -1)
            first.append(m.logits(x[torch.arange(len(part)), lengths - 1]).argmax(-1))
        self.first = torch.cat(first)
        self.scores = {name: [torch.cat(s) for s in layers] for name, layers in collected.items()}

    def visible(self, policy, share):
        """Per layer, the prompt entries a reply may see, [B, G, width]."""
        c = self.model.config
        column = torch.arange(self.width, device=self.device)[None]
        prompt = (column < self.lengths[:, None])[:, None].expand(-1, c.num_key_value_heads, -1)
        if policy == "full":
            return [prompt] * c.num_hidden_layers
        window = prompt & (column >= (self.lengths - evict.WINDOW)[:, None])[:, None]
        keep = evict.kept_per_head(self.lengths, share)
        layers = self.scores[policy]
        if policy == "laprox":
            thresholds = [evict.model_threshold(layers, keep)] * len(layers)
        else:
            thresholds = [evict.head_threshold(s, keep) for s in layers]
        return [window | (prompt & (s >= t) & (s > 0)) for s, t in zip(layers, thresholds)]

    @torch.no_grad()
    def decode(self, new_tokens, newline, policy="full", share=1.0):
        """Greedy replies, [B, new_tokens]."""
        m, c = self.model, self.model.config
        groups, repeat, d = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
        rows = len(self.lengths)
        total = self.keys.shape[3]
        masks = []
        for seen in self.visible(policy, share):
            mask = torch.full((rows, groups, 1, total), float("-inf"), device=self.device)
            mask[..., :self.width].masked_fill_(seen[:, :, None], 0.0)
            masks.append(mask)
        token, out = self.first, [self.first]
        done = (token == newline) | (token == EOS_ID)
        for step in range(new_tokens - 1):
            if bool(done.all()):
                break
            x = m.embed(token)
            at = self.width + step
            for index, layer in enumerate(m.layers):
                q, k, v = m.qkv(layer, x, self.lengths + step, compiled=False)
                self.keys[index, :, :, at], self.values[index, :, :, at] = k, v
                masks[index][..., at] = 0.0
                q = q.view(rows, groups, repeat, d)
                end = at + 1
                logits = (q @ self.keys[index, :, :, :end].mT).float() * d ** -0.5 + masks[index][..., :end]
                mixed = logits.softmax(-1).to(m.compute) @ self.values[index, :, :, :end]
                x = m.rest(layer, x, mixed.reshape(rows, -1), compiled=False)
            token = m.logits(x).argmax(-1)
            out.append(token)
            done |= (token == newline) | (token == EOS_ID)
        return torch.stack(out, dim=1)


@torch.no_grad()
def bits_per_byte(model, books, tokenizer, length, device, limit=1 << 20):
    """Over consecutive windows of the evaluation books; each window's first token is not predicted."""
    rows = min(len(books.ids), limit) // length
    ids = torch.from_numpy(np.asarray(books.ids[:rows * length]).astype(np.int64)).view(rows, length)
    # In a byte-level vocabulary every character of a token's name is a byte.
    sizes = torch.tensor([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])
    sizes[EOS_ID] = 0
    nats, size = 0.0, 0
    step = max(1, PREFILL_TOKENS // 4 // length)
    for start in range(0, rows, step):
        part = ids[start:start + step].to(device)
        x = model.run(part, compiled=False).view(*part.shape, -1)[:, :-1].reshape(-1, model.config.hidden_size)
        nats += float(model.losses(x, part[:, 1:].reshape(-1), compiled=False).double().sum())
        size += int(sizes[ids[start:start + step, 1:]].sum())
    return nats / np.log(2) / size


def evaluate(args):
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    spec = json.loads(Path(args.prompts).read_text(encoding="utf-8"))["tasks"]
    tasks = args.tasks or list(spec)
    maker = TaskMaker(args.prompts, Path(args.data) / "tokenizer", Books(Path(args.data) / "eval"))
    newline = maker.encode("\n")[0]
    policies = [(p, s) for p in args.policy for s in ([1.0] if p == "full" else args.share)]
    results = {"model": str(args.model), "split": args.split, "count": args.count, "seed": args.seed, "cells": []}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    generator = Generator(model, device)
    jobs = [(t, n) for n in args.lengths for t in tasks]
    # fork would copy a process that already runs a GPU context
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), initializer=_start,
                             initargs=(args.prompts, args.data)) as pool:
        waiting = [(t, n, pool.map(_make, [(t, n, args.split, args.seed, i) for i in range(args.count)], chunksize=4))
                   for t, n in jobs]
        for task, length, made in waiting:
            if time.monotonic() - begun > args.seconds:
                results["stopped"] = "the time given was over"
                break
            made = list(made)
            prompts, references = [p for p, _ in made], [r for _, r in made]
            new_tokens = spec[task]["new_tokens"]
            generator.prefill(prompts, new_tokens, args.share, any(p != "full" for p, _ in policies))
            for policy, share in policies:
                ids = generator.decode(new_tokens, newline, policy, share).tolist()
                texts = [maker.tokenizer.decode(r, skip_special_tokens=True) for r in ids]
                mean = float(np.mean([score(t, r) for t, r in zip(texts, references)]))
                results["cells"].append({"task": task, "length": length, "policy": policy, "share": share, "score": mean,
                                         "sample": texts[0], "wanted": references[0]})
        pool.shutdown(cancel_futures=True)
    if not args.no_bits:
        books = Books(Path(args.data) / "eval")
        results["bits_per_byte"] = {n: bits_per_byte(model, books, maker.tokenizer, n, device) for n in args.lengths}
    results["seconds"] = time.monotonic() - begun
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, tasks))


def table(results, tasks):
    """Scores in percent: a row per task, a column per length, a block per policy."""
    lines = []
    cells = {(c["policy"], c["share"], c["task"], c["length"]): 100 * c["score"] for c in results["cells"]}
    for policy, share in dict.fromkeys((c["policy"], c["share"]) for c in results["cells"]):
        lengths = list(dict.fromkeys(c["length"] for c in results["cells"]))
        lines.append(f"\n{policy} {share:g} ({results['split']} wordings)" + "".join(f"{n:>8}" for n in lengths))
        for task in tasks:
            row = [cells.get((policy, share, task, n)) for n in lengths]
            lines.append(f"{task:<22}" + "".join("       -" if v is None else f"{v:8.1f}" for v in row))
        means = []
        for n in lengths:
            values = [cells.get((policy, share, t, n)) for t in TASKS_OF_THE_MEAN]
            means.append("       -" if None in values else f"{np.mean(values):8.1f}")
        lines.append(f"{'mean of 14':<22}" + "".join(means))
    if "bits_per_byte" in results:
        lines.append("bits per byte " + ", ".join(f"{n}: {b:.3f}" for n, b in results["bits_per_byte"].items()))
    lines.append(f"{results['seconds']:.0f} s")
    return "\n".join(lines)
