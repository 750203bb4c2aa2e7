#!/usr/bin/env python3
"""Times Cola DLM's published PyTorch code on this machine's CPU, to be put beside `lacuna bench`.

    python bench/cola_official.py --code CHECKOUT --model DIR [--prompt 128] [--new 32] [--threads 2]
CHECKOUT: a clone of github.com/ByteDance-Seed/Cola-DLM (with torch, transformers, einops, tokenizers installed); DIR: a
checkpoint in its layout, floats. Prints a JSON line a precision: tokens/s of whole blocks, without the prompt.

The code asks for CUDA's autocast by name. Here it gets the CPU's, to bf16; `bf16` holds the weights in bf16 as well, which
spares the cast of every weight in every call, and `f32` computes in f32. Prompt and noise are random: values change
neither bytes nor operations.
"""
import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path


class Ids:
    """Stands for a tokenizer: as many random ids as the text has words."""

    def __init__(self, vocab):
        self.vocab = vocab

    def encode(self, text):
        return argparse.Namespace(ids=[random.randrange(self.vocab) for _ in text.split()])

    def decode_batch(self, batch, **_):
        return [" ".join(map(str, ids)) for ids in batch]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--code", required=True)
    p.add_argument("--model", required=True)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--new", type=int, default=32)
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--guidance", type=float, default=7.0)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--precision", nargs="+", default=["autocast", "bf16", "f32"], choices=["autocast", "bf16", "f32"])
    args = p.parse_args()
    sys.path.insert(0, args.code)
    import torch
    from cola_dlm import inference
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    folder = Path(args.model)
    folder = folder / "cola_dlm" if (folder / "cola_dlm").is_dir() else folder
    autocast = torch.autocast
    for precision in args.precision:
        dit = inference.ColaDiTModel.from_pretrained(folder / "cola_dit").eval()
        vae = inference.ColaTextVAEModel.from_pretrained(folder / "cola_vae").eval()
        dit, vae = (m.to(torch.bfloat16 if precision == "bf16" else torch.float32) for m in (dit, vae))
        # f32: the code hands bf16 latents to f32 weights, which only autocast lets it do.
        as_it_is = torch.bfloat16
        if precision == "f32":
            torch.autocast = lambda *a, **k: contextlib.nullcontext()
            torch.bfloat16 = torch.float32
        else:
            torch.autocast = lambda device_type="cpu", **k: autocast("cpu", **k) if k.get("enabled", True) else autocast("cpu", enabled=False)
        vocab = vae.config.vocab_size
        prompts = [{"context": " ".join(["w"] * args.prompt), "question": "", "answer": "", "id": i} for i in range(args.batch)]
        inference.apply_prompt_template = lambda **k: k["context"]

        def run(new):
            random.seed(1)
            begun = time.perf_counter()
            with torch.no_grad():
                inference.generate_task_repaint_inference(
                    dit, vae, Ids(vocab), prompts, device=torch.device("cpu"), timestep_num=args.steps,
                    guidance_scale=args.guidance, max_new_tokens=new, pad_token_id=vocab - 1)
            return time.perf_counter() - begun

        block = dit.block_size
        run(block)
        # Whole blocks beyond the first: prompt, loading and first calls cancel out.
        times = [run(args.new + block) - run(block) for _ in range(args.repeats)]
        torch.autocast, torch.bfloat16 = autocast, as_it_is
        print(json.dumps({"precision": precision, "threads": args.threads, "batch": args.batch, "prompt": args.prompt,
                          "steps": args.steps, "guidance": args.guidance, "new_tokens": args.new,
                          "passes_a_block": 2 * args.steps + 1,
                          "seconds": [round(t, 4) for t in times],
                          "tokens_per_second": round(args.batch * args.new / statistics.median(times), 3)}), flush=True)


if __name__ == "__main__":
    main()
