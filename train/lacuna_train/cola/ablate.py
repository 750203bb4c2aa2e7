"""Short runs that differ in one constant each, in one process (kernels are compiled once), most informative first.

    python -m lacuna_train.cola.ablate --data DATA --out OUT --seconds 500
writes OUT/ablation.json (losses, reconstruction, flow by t) and OUT/ablation.npz (ids that each variant generated for
the same prompts); `--judge` afterwards, on any machine, adds the likelihood that a model gives to the texts.
"""
import argparse
import itertools
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..model import count_parameters
from ..tokenizer import load_tokenizer
from .data import Text, fixed_rows
from .evaluate import Judge, flow_losses, generated, mean_logsnr, measure, prompts_of, reconstruction
from .dit import DitConfig
from .export import read_trained, ready, usable, write_cola
from .losses import Constants
from .trainer import Run, Settings, printer
from .vae import TextVae

BASE = Constants(ref_weight=0.01, detach_target=False)
SHIPPED = Constants(freeze_vae=True, flow_on_mean=True, loc=0.5, block_shares={"4": 0.35})
# name: (constants of both stages, settings of stage 2)
VARIANTS = {
    "base": ({}, {}),
    "target detached": ({"detach_target": True}, {}),
    "target detached, ref 0.1": ({"detach_target": True, "ref_weight": 0.1}, {}),
    "vae frozen, mean": ({"freeze_vae": True, "flow_on_mean": True}, {}),
    "vae frozen, loc 0": ({"freeze_vae": True, "loc": 0.0}, {}),
    "vae frozen, small blocks": ({"freeze_vae": True, "block_shares": {"4": 0.35}}, {}),
    "vae frozen": ({"freeze_vae": True}, {}),
    "flow 3": ({"flow_weight": 3.0}, {}),
    "muon 0.02": ({}, {"muon_lr": 0.02}),
    "flow on mean": ({"flow_on_mean": True}, {}),
    "loc 0": ({"loc": 0.0}, {}),
    "mask 0": ({"mask_weight": 0.0}, {}),
    "beta 0.001": ({"beta": 0.001}, {}),
    "beta 0.03": ({"beta": 0.03}, {}),
    "ref 0": ({"ref_weight": 0.0}, {}),
    "adamw": ({}, {"optimizer": "adamw", "adam_lr": 0.001}),
    "base, seed 2": ({}, {"seed": 2}),
    "t per sequence": ({"t_per_block": False}, {}),
    "no short rows": ({"short_share": 0.0}, {}),
    "mask 0.3": ({"mask_weight": 0.3}, {}),
    "ref 0.1": ({"ref_weight": 0.1}, {}),
    "flow 0.3": ({"flow_weight": 0.3}, {}),
    "official init": ({}, {"gates": None}),
    "prefix 0": ({"prefix_share": 0.0}, {}),
    "logsnr 1.5": ({"fixed_logsnr": 1.5}, {}),
    "muon 0.005": ({}, {"muon_lr": 0.005}),
    "scale 1.5": ({"scale": 1.5}, {}),
    "flow 3, muon 0.02": ({"flow_weight": 3.0}, {"muon_lr": 0.02}),
    "vae frozen, muon 0.02": ({"freeze_vae": True}, {"muon_lr": 0.02}),
}
# The scaling study: DiTs on one frozen VAE, so that their losses compare. name: (constants, settings, DiT, tokens)
SIZES = {"S": {"txt_dim": 128, "heads": 2, "num_layers": 5}, "M": {}, "L": {"txt_dim": 256, "heads": 4, "num_layers": 10}}
SCALING = {f"{size} {millions}M": (SHIPPED.to_dict(), {"muon_lr": 0.02}, shape, millions * 1e6)
           for millions in (20, 40) for size, shape in SIZES.items()}
# The shipped recipe with one constant taken back each, and seeds: two of the recipe's own and of the choices that changed most.
OTHERWISE = {"shipped": {}, "blocks of 16 only": {"block_shares": {}}, "flow on samples": {"flow_on_mean": False},
             "joint": {"freeze_vae": False, "ref_weight": 0.1, "detach_target": True}}
AROUND = {name: (SHIPPED.to_dict() | changed, {"muon_lr": 0.02} | settings, {}, 40e6) for name, changed, settings in (
    *((n, c, {}) for n, c in OTHERWISE.items()), ("loc 1", {"loc": 1.0}, {}), ("prefix 0", {"prefix_share": 0.0}, {}),
    ("no short rows", {"short_share": 0.0}, {}), ("scale 1.5", {"scale": 1.5}, {}), ("official init", {}, {"gates": None}),
    ("muon 0.01", {}, {"muon_lr": 0.01}), ("loc 0", {"loc": 0.0}, {}),
    *((f"{n}, seed {s}", c, {"seed": s}) for s in (2, 3) for n, c in OTHERWISE.items()))}
STUDIES = {"scaling": SCALING, "shipped": AROUND}
OF_STAGE_1 = ("beta", "mask_weight", "mask_ratio", "fixed_logsnr")


def stage_1_key(constants):
    return tuple(getattr(constants, n) for n in OF_STAGE_1)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--seconds", type=float, default=500)
    p.add_argument("--variants", nargs="*", help="only these, in this order")
    p.add_argument("--study", choices=STUDIES, help="instead of variants of the first recipe: DiTs of three sizes, or variants of the shipped recipe")
    p.add_argument("--vae", help="checkpoint of stage 1 to start all of a study from")
    p.add_argument("--tokens", type=int, default=32768, help="tokens a step")
    p.add_argument("--vae-budget", type=float, default=15e6, help="tokens of stage 1")
    p.add_argument("--budget", type=float, default=20e6, help="tokens of stage 2")
    p.add_argument("--count", type=int, default=256, help="prompts")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 7.0])
    p.add_argument("--block", type=int, nargs="+", default=[16], help="block sizes to generate with")
    p.add_argument("--keep", action="store_true", help="write every variant's model below OUT/kept")
    p.add_argument("--every", type=int, default=1, help="judge every so many prompts' texts only")
    p.add_argument("--judge", help="folder: nothing is trained, texts of --out are judged")
    args = p.parse_args()
    every = STUDIES[args.study] if args.study else {n: (*v, {}, args.budget) for n, v in VARIANTS.items()}
    if unknown := set(args.variants or ()) - set(every):
        p.error(f"--variants: found {', '.join(sorted(unknown))}; there are: {', '.join(every)}")
    args.variants = {n: every[n] for n in args.variants or every}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    judge(args, out) if args.judge else train(args, out)


def train(args, out):
    begun = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    text = Text(Path(args.data) / "train", device)
    rows = fixed_rows(Path(args.data) / "eval", 64, 512)
    prompts, _ = prompts_of(args.data, args.count, 40, 64)
    vaes, results, ids, longest = {}, {}, {}, 0.0
    for name, (changed, of_settings, shape, budget) in args.variants.items():
        began = time.monotonic()
        if began + longest - begun > args.seconds:
            break
        constants = replace(BASE, **changed)
        say = printer(out / "ablation.log", variant=name)
        try:
            key = stage_1_key(constants)
            if args.vae and not vaes:
                start, _, config, _ = read_trained(args.vae)
                vae = ready(TextVae(config, compute), start, device)
                vaes[key] = start, {"logsnr": mean_logsnr(vae, rows), "reconstruction": reconstruction(vae, rows)}
            if key not in vaes:
                settings = Settings(stage="vae", tokens=args.tokens, round_from=1.0, constants=constants)
                run = Run(settings, text, device, token_budget=args.vae_budget)
                run.train(say=say, log_seconds=4)
                vae = usable(run.models.vae, compute)
                vaes[key] = {n: t.clone() for n, t in run.models.vae.state_dict().items()}, \
                    {"logsnr": mean_logsnr(vae, rows), "reconstruction": reconstruction(vae, rows)}
                del run, vae
            start, of_stage_1 = vaes[key]
            settings = replace(Settings(stage="joint", tokens=args.tokens, constants=constants), **of_settings)
            run = Run(settings, text, device, dit_config=DitConfig(**shape), start=start, token_budget=budget)
            trained = time.monotonic()
            run.train(say=say, log_seconds=4)
            passed = time.monotonic() - trained
            vae, dit = usable(run.models.vae, compute), usable(run.models.dit, compute)
            flow, by_t = flow_losses(vae, dit, rows[:32], levels=8, on_mean=constants.flow_on_mean)
            results[name] = {"stage_1": of_stage_1, "logsnr": mean_logsnr(vae, rows), "reconstruction": reconstruction(vae, rows),
                             "flow": flow, "flow_by_t": by_t, "seconds": passed, "rate": run.tokens / passed, "tokens": run.tokens,
                             "dit_parameters": count_parameters(run.models.dit)}
            trained_with = dit.config.block_size
            for block, g in itertools.product(args.block, args.guidance):
                dit.config.block_size = block
                made = generated(vae, dit, prompts.to(device), 64, 16, g, penalty=1.0)
                ids[f"{name}|{block}|{g:g}"] = np.array(made, np.int16)
            dit.config.block_size = trained_with
            if args.keep:
                write_cola(run.models.vae.state_dict(), run.models.dit.state_dict(), vae.config, dit.config,
                           out / "kept" / name.replace(" ", "-").replace(",", ""), "int8", Path(args.data) / "tokenizer")
            del run, vae, dit
        except Exception:
            results[name] = {"error": traceback.format_exc()[-2000:]}
        longest = max(longest, time.monotonic() - began) if len(results) > 1 else 0.0
        say(event="variant", wall=time.monotonic() - begun, **{k: v for k, v in results[name].items() if k in ("flow", "error", "rate")})
        (out / "ablation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        np.savez_compressed(out / "ablation.npz", **ids)


def judge(args, out):
    tokenizer = load_tokenizer(Path(args.data) / "tokenizer")
    model = Judge(args.judge, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    results = json.loads((out / "ablation.json").read_text(encoding="utf-8"))
    ids = np.load(out / "ablation.npz")
    prompts, follow = (t[::args.every].tolist() for t in prompts_of(args.data, args.count, 40, 64))
    human, _ = measure(tokenizer, model, prompts, follow)
    print(f"{'':<28} {'logSNR':>7} {'t=0':>7} {'t=.25':>6} {'flow':>6} | nll, repeated 4-grams and distinct-2 by block size and guidance")
    print(f"{'human':<28} {'':>29} | {human['nll']:.2f} {100 * human['repeated_4']:.0f} {100 * human['distinct_2']:.0f}")
    for name, r in results.items():
        if "error" in r:
            print(f"{name:<28} {r['error'].strip().splitlines()[-1]}")
            continue
        r["text"], cells = {}, []
        for block, g in itertools.product(args.block, args.guidance):
            figures, texts = measure(tokenizer, model, prompts, ids[f"{name}|{block}|{g:g}"][::args.every].tolist(), follow)
            r["text"][f"{block}|{g:g}"] = figures | {"samples": texts[:4]}
            cells.append(f"{figures['nll']:.2f} ±{figures['stderr']:.2f} {100 * figures['repeated_4']:3.0f} {100 * figures['distinct_2']:3.0f}")
        back = r["reconstruction"]
        print(f"{name:<28} {r['logsnr']:7.2f} {100 * back['0.0']:7.2f} {100 * back['0.25']:6.1f} {r['flow']:6.3f} | {' | '.join(cells)}", flush=True)
        (out / "judged.json").write_text(json.dumps({"human": human, "variants": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
