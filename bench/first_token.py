#!/usr/bin/env python3
"""Time to first token and decode rate over context length: linear attention beside a dense Transformer of the same shape.

Makes two random-weight models of SpikingBrain-7B's widths cut to a few layers (scripts/make_random_model.py), reads the
first N tokens of a text with `lacuna run` once for each length, fits a straight line to the linear model's times and a
parabola to the dense one's, and prints a markdown table. What lies beyond the measured lengths is marked as extrapolated.

    bench/first_token.py --lengths 4096,16384,65536,262144 --dense-lengths 4096,16384,65536
"""
import argparse
import json
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE = ["--hidden", "3584", "--ffn", "18944", "--heads", "28", "--kv-heads", "4", "--vocab", "8192", "--positions", "1048576",
         "--dtype", "bf16", "--tokenizer", str(ROOT / "models/base")]


def make(folder, arch, layers):
    extra = ["--window", "4096"] if arch == "gla_swa" else []
    subprocess.run([str(ROOT / "scripts/make_random_model.py"), str(folder), "--arch", arch, "--layers", str(layers)] + SHAPE + extra,
                   check=True, stdout=subprocess.DEVNULL)


def measure(program, model, text, tokens, decode):
    """(tokens read, seconds of prefill, decode tokens/s, KV bytes, state bytes) of one run."""
    text_file = model.parent / "prompt.txt"
    # About 3.9 bytes a token; the count that the run reports is what is used.
    text_file.write_text(text[:int(tokens * 3.9)], encoding="utf-8")
    out = subprocess.run([program, "run", "-m", str(model), "-f", str(text_file), "-n", str(decode), "--json", "-q"], check=True,
                         capture_output=True, text=True).stdout
    run = json.loads(out)["runs"][0]
    result = run["results"][0]
    rate = run["decode"]["tokens"] / run["decode"]["seconds"] if run["decode"]["tokens"] else 0
    return result["prompt_tokens"], result["prefill_seconds"], rate, run["memory"]["kv"]["peak_bytes"], run["memory"]["state"]["peak_bytes"]


def fit(xs, ys, degree):
    """Least squares of relative errors, so that short prompts count as much as long ones: coefficients and R^2 (plain)."""
    n = degree + 1
    rows = [[x ** k / y for k in range(n)] for x, y in zip(xs, ys)]
    a = [[sum(r[i] * r[j] for r in rows) for j in range(n)] + [sum(r[i] for r in rows)] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(a[r][i]))
        a[i], a[pivot] = a[pivot], a[i]
        for r in range(n):
            if r != i:
                f = a[r][i] / a[i][i]
                a[r] = [u - f * v for u, v in zip(a[r], a[i])]
    c = [a[i][n] / a[i][i] for i in range(n)]
    at = lambda x: sum(c[k] * x ** k for k in range(n))
    mean = sum(ys) / len(ys)
    rest, total = sum((y - at(x)) ** 2 for x, y in zip(xs, ys)), sum((y - mean) ** 2 for y in ys)
    return c, at, 1 - rest / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,16384,65536,262144")
    parser.add_argument("--dense-lengths", default="4096,16384,65536")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--decode", type=int, default=33, help="tokens generated; the first comes from the prefill")
    parser.add_argument("--program", default=str(ROOT / "build/lacuna"))
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "data/books", help="folder of .txt files")
    a = parser.parse_args()
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(a.text.glob("*.txt")))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch, lengths in (("gla_swa", a.lengths), ("qwen2", a.dense_lengths)):
            model = pathlib.Path(folder) / arch
            make(model, arch, a.layers)
            results[arch] = []
            for n in map(int, lengths.split(",")):
                results[arch].append(measure(a.program, model, text, n, a.decode))
                print(f"{arch} {results[arch][-1]}", flush=True)
    linear, dense = results["gla_swa"], results["qwen2"]
    line, line_at, line_r2 = fit([r[0] for r in linear], [r[1] for r in linear], 1)
    curve, curve_at, curve_r2 = fit([r[0] for r in dense], [r[1] for r in dense], 2)
    print(f"\nlinear: {line[0]:.3f} s + {line[1] * 1e3:.4f} ms a token, R^2 {line_r2:.6f}; "
          f"dense: {curve[0]:.3f} s + {curve[1] * 1e3:.4f} ms n + {curve[2] * 1e9:.4f} ns n^2, R^2 {curve_r2:.6f}\n")
    print("| tokens | linear, s | dense, s | ratio | linear: KV + state | dense: KV | linear, tokens/s after it | dense |")
    print("|---|---|---|---|---|---|---|---|")
    for i, r in enumerate(linear):
        d = dense[i] if i < len(dense) else None
        seconds = f"{d[1]:.1f}" if d else f"{curve_at(r[0]):.0f} (extrapolated)"
        print(f"| {r[0]} | {r[1]:.1f} | {seconds} | {(d[1] if d else curve_at(r[0])) / r[1]:.2f} | {(r[3] + r[4]) / 1e6:.1f} MB | "
              + (f"{d[3] / 1e6:.1f} MB" if d else "") + f" | {r[2]:.1f} | " + (f"{d[2]:.1f}" if d else "") + " |")
    for n in (1 << 20, 1 << 22):
        print(f"| {n} (extrapolated) | {line_at(n):.0f} | {curve_at(n):.0f} | {curve_at(n) / line_at(n):.1f} | | | | |")


if __name__ == "__main__":
    main()
