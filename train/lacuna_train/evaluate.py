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

from .books import Books
from .export import coded_k, load_model
from .generate import PREFILL_TOKENS, Generator, HybridGenerator
from .hybrid import Hybrid
from .tasks import TASKS_OF_THE_MEAN, TaskMaker
from .tokenizer import EOS_ID

_maker = None


def _start(spec, data):
    global _maker
    _maker = TaskMaker(spec, Path(data) / "tokenizer", Books(Path(data) / "eval"))


def _make(job):
    task, length, split, seed, index, distance = job
    # Tasks get streams of their own, so that adding one changes no other's prompts.
    rng = np.random.default_rng([seed, length, index, *task.encode()])
    depths = depths_at(distance, length, needles_of(_maker.tasks[task]), rng) if distance else None
    example = _maker.make(task, rng, length, split=split, depths=depths)
    return example.prompt().astype(np.int64), example.questions[0].references


def needles_of(spec):
    """How many needles a task hides, 0 if they fill the context or there are none."""
    if spec["wording"] == "passkey":
        return 1
    return spec["keys"] * spec["values"] if "keys" in spec and spec["keys"] != "fill" else 0


def depths_at(distance, length, count, rng):
    """Depths of `count` needles between distance[0] and distance[1] tokens before the end of a prompt."""
    low, high = (min(d, length) / length for d in distance)
    return np.clip(1.0 - rng.uniform(low, high, count), 0.0, 1.0 - 1e-6)


def score(text, references):
    """The share of references found before the first newline."""
    line = text.split("\n", 1)[0]
    return sum(r in line for r in references) / len(references)


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
    hybrid = isinstance(model, Hybrid)
    if hybrid and args.policy != ["full"]:
        raise ValueError("gla_swa keeps no cache of the prompt to evict from: --policy full is all there is")
    k_of = {coding: coded_k(coding, model.config, args.model) for coding in args.spikes}
    spec = json.loads(Path(args.prompts).read_text(encoding="utf-8"))["tasks"]
    tasks = args.tasks or [t for t in spec if not args.distance or needles_of(spec[t])]
    placeless = [t for t in tasks if args.distance and not needles_of(spec[t])]
    if placeless:
        raise ValueError(f"--distance places needles, and {', '.join(placeless)} has none to place")
    maker = TaskMaker(args.prompts, Path(args.data) / "tokenizer", Books(Path(args.data) / "eval"))
    newline = maker.encode("\n")[0]
    policies = [(p, s) for p in args.policy for s in ([1.0] if p == "full" else args.share)]
    results = {"model": str(args.model), "split": args.split, "count": args.count, "seed": args.seed,
               "distance": args.distance, "cells": []}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    generator = (HybridGenerator if hybrid else Generator)(model, device)
    jobs = [(t, n) for n in args.lengths for t in tasks]
    # fork would copy a process that already runs a GPU context
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), initializer=_start,
                             initargs=(args.prompts, args.data)) as pool:
        each = lambda t, n: [(t, n, args.split, args.seed, i, args.distance) for i in range(args.count)]
        waiting = [(t, n, pool.map(_make, each(t, n), chunksize=4)) for t, n in jobs]
        for task, length, made in waiting:
            if time.monotonic() - begun > args.seconds:
                results["stopped"] = "the time given was over"
                break
            made = list(made)
            prompts, references = [p for p, _ in made], [r for _, r in made]
            new_tokens = spec[task]["new_tokens"]
            for coding, k in k_of.items():
                model.code(k)
                generator.prefill(prompts, new_tokens, any(p != "full" for p, _ in policies))
                for policy, share in policies:
                    ids = generator.decode(new_tokens, newline, policy, share).tolist()
                    texts = [maker.tokenizer.decode(r, skip_special_tokens=True) for r in ids]
                    mean = float(np.mean([score(t, r) for t, r in zip(texts, references)]))
                    results["cells"].append({"task": task, "length": length, "policy": policy, "share": share,
                                             "spikes": coding, "score": mean, "sample": texts[0], "wanted": references[0]})
        pool.shutdown(cancel_futures=True)
    if not args.no_bits:
        books = Books(Path(args.data) / "eval")
        bits = {}
        for coding, k in k_of.items():
            model.code(k)
            bits[coding] = {n: bits_per_byte(model, books, maker.tokenizer, n, device, args.bits_tokens) for n in args.lengths}
        results["bits_per_byte"] = bits[args.spikes[0]]
        results["bits_per_byte_by_spikes"] = bits
    results["seconds"] = time.monotonic() - begun
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, tasks))


def table(results, tasks):
    """Scores in percent: a row per task, a column per length, a block per policy."""
    lines = []
    kind = lambda c: (c["policy"], c["share"], c["spikes"])
    cells = {(*kind(c), c["task"], c["length"]): 100 * c["score"] for c in results["cells"]}
    for policy, share, coding in dict.fromkeys(kind(c) for c in results["cells"]):
        lengths = list(dict.fromkeys(c["length"] for c in results["cells"]))
        spiking = "" if coding == "off" else f", spikes {coding}"
        lines.append(f"\n{policy} {share:g}{spiking} ({results['split']} wordings)" + "".join(f"{n:>8}" for n in lengths))
        for task in tasks:
            row = [cells.get((policy, share, coding, task, n)) for n in lengths]
            lines.append(f"{task:<22}" + "".join("       -" if v is None else f"{v:8.1f}" for v in row))
        means = []
        for n in lengths:
            values = [cells.get((policy, share, coding, t, n)) for t in TASKS_OF_THE_MEAN]
            means.append("       -" if None in values else f"{np.mean(values):8.1f}")
        lines.append(f"{'mean of 14':<22}" + "".join(means))
    for coding, bits in results.get("bits_per_byte_by_spikes", {}).items():
        spiking = "" if coding == "off" else f" (spikes {coding})"
        lines.append(f"bits per byte{spiking} " + ", ".join(f"{n}: {b:.3f}" for n, b in bits.items()))
    lines.append(f"{results['seconds']:.0f} s")
    return "\n".join(lines)
