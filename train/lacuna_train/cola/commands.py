"""cola-train, cola-export and cola-evaluate of `python -m lacuna_train`."""
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ..export import write_checkpoint
from ..model import ModelConfig, count_parameters
from ..trainer import SAVE_SECONDS, peak_memory, start_device
from .data import Text
from .dit import DitConfig
from .evaluate import evaluate
from .export import read_trained, write_cola
from .losses import Constants
from .trainer import Run, Settings, printer
from .vae import VaeConfig


def set_fields(kind, pairs):
    """A dataclass from NAME=VALUE strings."""
    values = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in kind.__dataclass_fields__:
            raise ValueError(f"{kind.__name__} has no field {name}; it has {', '.join(kind.__dataclass_fields__)}")
        values[name] = json.loads(value)
    return kind(**values)


def train(args):
    begun = time.monotonic()
    torch.set_float32_matmul_precision("high")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device, rank, ranks = start_device()
    try:
        settings = set_fields(Settings, args.set)
        settings.stage, settings.seed, settings.tokens = args.stage, args.seed, args.tokens
        settings.constants = set_fields(Constants, args.constant)
        start, vae_config = None, set_fields(VaeConfig, args.vae)
        if getattr(args, "from"):
            start, _, vae_config, _ = read_trained(getattr(args, "from"))
        text = Text(Path(args.data) / "train", device)
        run = Run(settings, text, device, vae_config, set_fields(DitConfig, args.dit), start, set_fields(ModelConfig, args.ar),
                  rank, ranks, args.token_budget, args.total_seconds)
        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            run.load(checkpoint)
        say = printer(out / "log.jsonl") if rank == 0 else None
        if say:
            say(event="start", stage=args.stage, parameters=count_parameters(run.models), ranks=ranks, device=str(device),
                resumed_at=run.step, wall=time.monotonic() - begun, memory=peak_memory(device))
        left = args.seconds - (time.monotonic() - begun) - SAVE_SECONDS if args.seconds < math.inf else math.inf
        if args.end_with_call:
            run.total = min(run.total, run.seconds + left)
        finished = run.train(left, args.steps, say, args.log_seconds, checkpoint, args.save_seconds)
        if say:
            say(event="saved", finished=finished, step=run.step, tokens=run.tokens, wall=time.monotonic() - begun)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def export(args):
    saved = torch.load(args.source, map_location="cpu", weights_only=True)
    if saved["stage"] == "ar":
        tensors = {"model." + n.removeprefix("ar."): t for n, t in saved["models"].items()}
        write_checkpoint(ModelConfig(**saved["shape"]["ar"]), tensors, args.out, args.format == "int8")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(args.out) / name).write_bytes((Path(args.tokenizer) / name).read_bytes())
    else:
        vae, dit, vae_config, dit_config = read_trained(args.source)
        if dit is None:
            raise ValueError(f"{args.source} is of stage 1: it has no DiT to export yet")
        write_cola(vae, dit, vae_config, dit_config, args.out, args.format, args.tokenizer)
    size = sum(f.stat().st_size for f in Path(args.out).rglob("*") if f.is_file())
    print(f"{args.out}: {args.format}, {size} bytes in the folder")


def add(commands):
    p = commands.add_parser("cola-train", help="Cola DLM: train a stage, or go on from --out's checkpoint")
    p.set_defaults(run=train)
    p.add_argument("--stage", choices=["vae", "joint", "ar"], required=True,
                   help="vae: stage 1; joint: stage 2; ar: an autoregressive model on the same batches")
    p.add_argument("--data", required=True, help="what prepare wrote")
    p.add_argument("--out", required=True, help="checkpoint and log")
    p.add_argument("--from", metavar="CHECKPOINT", help="joint: stage 1's checkpoint.pt")
    p.add_argument("--seconds", type=float, default=math.inf, help="this call ends, saved, within so many seconds")
    p.add_argument("--total-seconds", type=float, default=math.inf, help="training time of the whole run; sets its schedule")
    p.add_argument("--end-with-call", action="store_true", help="shorten the run to what --seconds leaves after compiling")
    p.add_argument("--token-budget", type=float, default=math.inf, help="the run is also over after so many tokens")
    p.add_argument("--steps", type=float, default=math.inf, help="this call stops at this step")
    p.add_argument("--tokens", type=int, default=65536, help="tokens a step and rank")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--log-seconds", type=float, default=5)
    p.add_argument("--save-seconds", type=float, default=100)
    for name, what in (("set", "of the run (trainer.py, Settings)"), ("constant", "of the losses (losses.py, Constants)"),
                       ("vae", "of the VAE's shape (vae.py)"), ("dit", "of the DiT's shape (dit.py)"),
                       ("ar", "of the autoregressive model's shape (model.py)")):
        p.add_argument(f"--{name}", nargs="*", default=[], metavar="NAME=VALUE", help=f"fields {what}")

    p = commands.add_parser("cola-export", help="a checkpoint of cola-train in the public layout")
    p.set_defaults(run=export)
    p.add_argument("--source", required=True, help="checkpoint.pt")
    p.add_argument("--tokenizer", required=True, help="folder of tokenizer.json")
    p.add_argument("--out", required=True)
    p.add_argument("--format", choices=["int8", "bfloat16", "float32"], default="int8")

    p = commands.add_parser("cola-evaluate", help="reconstruction, robustness, and generated text judged by another model")
    p.set_defaults(run=evaluate)
    p.add_argument("--model", required=True, help="folder of a Cola model, or of an autoregressive one to compare with")
    p.add_argument("--data", required=True)
    p.add_argument("--judge", help="folder of the judging model, e.g. models/base")
    p.add_argument("--out", required=True, help="results, JSON")
    p.add_argument("--count", type=int, default=256, help="prompts")
    p.add_argument("--prompt", type=int, default=40, help="tokens of a prompt")
    p.add_argument("--new", type=int, default=64, help="tokens of a continuation")
    p.add_argument("--rows", type=int, default=128, help="rows of 512 tokens for reconstruction")
    p.add_argument("--steps", type=int, nargs="+", default=[16])
    p.add_argument("--guidance", type=float, nargs="+", default=[7.0])
    p.add_argument("--flow-on-mean", action="store_true", help="the flow's loss on posterior means, as flow_on_mean trains it")
    p.add_argument("--block", type=int, help="instead of the DiT's block_size")
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0], help="of an autoregressive model")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--penalty", type=float, default=1.1, help="repetition penalty; 1: none")
    p.add_argument("--overlap", action="store_true", help="also the share of 4-grams that the training books hold (1 minute)")
    p.add_argument("--keep-ids", metavar="FILE", help="write what was generated (.npz), to be judged elsewhere")
    p.add_argument("--use-ids", metavar="FILE", help="judge what --keep-ids wrote for the same prompts")
    p.add_argument("--samples", type=int, default=8, help="texts kept a cell")
    p.add_argument("--seed", type=int, default=66)
