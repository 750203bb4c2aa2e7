"""python -m lacuna_train prepare | train | evaluate | export | calibrate | unpickle | curve | cola-train | cola-export | cola-evaluate"""
import argparse
import os
import sys
from pathlib import Path

from .mixture import EVICT_SHARE, LOOK_WEIGHT

HERE = Path(__file__).resolve().parent
PROMPTS = HERE.parents[1] / "presets" / "prompts" / "tasks.json"


def prepare(args):
    from .books import encode_books, read_books
    from .model import ModelConfig
    from .tokenizer import train_tokenizer
    out = Path(args.out)
    folder = out / "tokenizer"
    if args.tokenizer:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(args.tokenizer) / name).read_bytes())
    else:
        texts = (text for _, text in read_books(args.train))
        train_tokenizer(texts, args.vocab, folder, ModelConfig.max_position_embeddings, not args.single_digits)
    for split, source in (("train", args.train), ("eval", args.eval)):
        total = encode_books(source, folder, out / split, args.workers)
        print(f"{split}: {total} tokens")


def train(args):
    from .trainer import train as run
    run(args)


def evaluate(args):
    from .evaluate import evaluate as run
    run(args)


def export(args):
    from .export import export as run
    run(args)


def calibrate(args):
    from .calibrate import calibrate as run
    run(args)


def unpickle(args):
    from .unpickle import Refused, unpickle as run
    try:
        run(args)
    except (Refused, OSError) as error:
        sys.exit(f"error: {error}")


def curve(args):
    from .curve import draw as run
    run(args)


def main():
    parser = argparse.ArgumentParser(prog="lacuna_train", description=__doc__)
    commands = parser.add_subparsers(required=True)
    cpus = os.cpu_count() or 1

    p = commands.add_parser("prepare", help="train the tokenizer and tokenise the books")
    p.set_defaults(run=prepare)
    p.add_argument("--train", required=True, help="training books: a .tar.xz or a folder of .txt files")
    p.add_argument("--eval", required=True, help="evaluation books, likewise")
    p.add_argument("--out", required=True)
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--single-digits", action="store_true", help="every digit a token, instead of every group of 1 to 3")
    p.add_argument("--tokenizer", help="folder of a tokenizer to use instead of training one")
    p.add_argument("--workers", type=int, default=cpus)

    p = commands.add_parser("train", help="train, or go on from --out's checkpoint")
    p.set_defaults(run=train)
    p.add_argument("--data", required=True, help="what prepare wrote")
    p.add_argument("--out", required=True, help="checkpoint and log")
    p.add_argument("--prompts", default=str(PROMPTS))
    p.add_argument("--seconds", type=float, default=1e9, help="this call ends, saved, within so many seconds")
    p.add_argument("--total-seconds", type=float, default=415, help="training time of the whole run; sets its schedule")
    p.add_argument("--steps", type=int, default=10 ** 9, help="stop at this step")
    p.add_argument("--tokens", type=int, default=65536, help="tokens a step and rank")
    p.add_argument("--longest", type=int, default=16384)
    p.add_argument("--workers", type=int, default=max(1, cpus - 3))
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--muon-lr", type=float, help="default: 0.01, or 0.005 in a conversion")
    p.add_argument("--adam-lr", type=float, help="default: 0.002, or 0.001 in a conversion")
    p.add_argument("--evict-share", type=float, default=EVICT_SHARE, help="steps that train for eviction, of all; 0: none")
    p.add_argument("--look-weight", type=float, default=LOOK_WEIGHT, help="of the look-ahead loss; 0: none")
    p.add_argument("--log-seconds", type=float, default=10)
    p.add_argument("--save-seconds", type=float, default=100, help="a checkpoint this often, and at the end")
    p.add_argument("--hidden", type=int, default=384)
    p.add_argument("--intermediate", type=int, default=768)
    p.add_argument("--layers", type=int, default=9)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--token-budget", type=float, default=float("inf"), help="the run is also over after so many tokens")
    p.add_argument("--end-with-call", action="store_true", help="shorten the run to what --seconds leaves after compiling")
    p.add_argument("--check", nargs="?", choices=["first", "only"], const="first",
                   help="before the run compare with the CPU and time a step of each length; only: and stop")
    p.add_argument("--arch", choices=["qwen2", "gla_swa"], default="qwen2")
    p.add_argument("--from", metavar="DIR", help="gla_swa: the Qwen2 folder to convert; its shape counts, not the options'")
    p.add_argument("--window", type=int, default=512, help="gla_swa: keys that a query of an odd layer sees, its own included")
    p.add_argument("--full-attention", type=int, nargs="*", default=[], metavar="LAYER",
                   help="gla_swa: odd layers, counted from 0, that see the whole row")
    p.add_argument("--gate-bias", default="0", help="gla_swa: a number, or spread: half-lives from 16 to 16,384 tokens")
    p.add_argument("--norm-init", choices=["one", "match"], default="one",
                   help="gla_swa: g_norm's start: 1, or the size of the parent's attention on a text")
    p.add_argument("--distill", type=float, default=0.0, help="gla_swa: weight of the divergence from the parent's distribution")
    p.add_argument("--spike-from", type=float, default=1.0, help="gla_swa: spike-coded activations from this share of the run on")

    p = commands.add_parser("evaluate", help="task accuracy, bits per byte and a look at eviction")
    p.set_defaults(run=evaluate)
    p.add_argument("--model", required=True, help="folder that export wrote")
    p.add_argument("--data", required=True)
    p.add_argument("--prompts", default=str(PROMPTS))
    p.add_argument("--out", required=True, help="results, JSON")
    p.add_argument("--count", type=int, default=100, help="prompts a task and length")
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    p.add_argument("--split", choices=["train", "held_out"], default="train", help="wordings")
    p.add_argument("--tasks", nargs="+", help="default: all")
    p.add_argument("--policy", choices=["full", "snapkv", "laprox"], nargs="+", default=["full"])
    p.add_argument("--share", type=float, nargs="+", default=[0.05], help="budgets of the policies")
    p.add_argument("--seconds", type=float, default=1e9, help="stop, with what there is, after so many seconds")
    p.add_argument("--workers", type=int, default=cpus)
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--distance", type=int, nargs=2, metavar=("LOW", "HIGH"),
                   help="needles so many tokens before the prompt's end, e.g. inside or beyond a window; tasks without are left out")
    p.add_argument("--spikes", nargs="+", default=["off"], metavar="CODING",
                   help="off, config (the folder's spike_coding), or k of all sites; several are compared on the same prompts")
    p.add_argument("--bits-tokens", type=int, default=1 << 20, help="bits per byte over so many tokens a length")
    p.add_argument("--no-bits", action="store_true", help="leave out bits per byte")

    p = commands.add_parser("export", help="write a Hugging Face checkpoint: int8 per row, or --bf16")
    p.set_defaults(run=export)
    p.add_argument("--source", required=True, help="a checkpoint.pt of train, or a folder that export wrote")
    p.add_argument("--tokenizer", help="folder of tokenizer.json; default: the source folder")
    p.add_argument("--out", required=True)
    p.add_argument("--bf16", action="store_true", help="plain bf16, which transformers loads unchanged")

    p = commands.add_parser("calibrate", help="choose how activations are spike-coded, and write it into the config")
    p.set_defaults(run=calibrate)
    p.add_argument("--model", required=True, help="folder that export wrote")
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True, help="the folder again, with spike_coding; may be the same")
    p.add_argument("--mode", choices=["paper", "reference"], default="paper", help="reference: down_proj's input is not coded")
    p.add_argument("--samples", type=int, default=128, help="text samples, from the training books")
    p.add_argument("--length", type=int, default=512, help="tokens of a sample")
    p.add_argument("--level", type=float, default=0.69, help="silent windows to reach")
    p.add_argument("--grid", type=float, nargs="+", default=[2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 4, 5], help="k to choose from")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--bits-length", type=int, default=2048)
    p.add_argument("--bits-tokens", type=int, default=1 << 18)
    p.add_argument("--no-bits", action="store_true", help="leave out bits per byte")

    p = commands.add_parser("unpickle", help="pytorch_model*.bin to safetensors, without running what a pickle says")
    p.set_defaults(run=unpickle)
    p.add_argument("--in", required=True, help="folder of the shards")
    p.add_argument("--out", required=True)

    p = commands.add_parser("curve", help="draw the losses of a training log as an SVG")
    p.set_defaults(run=curve)
    p.add_argument("--log", required=True, help="log.jsonl of train")
    p.add_argument("--out", required=True)

    if len(sys.argv) > 1 and (sys.argv[1].startswith("cola-") or sys.argv[1] in ("-h", "--help")):  # they import PyTorch
        from .cola.commands import add
        add(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
