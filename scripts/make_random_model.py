#!/usr/bin/env python3
"""Writes a random-weight checkpoint in the Hugging Face layout, to measure speed with.

--arch qwen2 (default: the shape of Qwen2.5-0.5B), gla_swa (SpikingBrain-7B's kind: gated linear attention in even
layers, a sliding window in odd ones; the published widths are --layers 28 --hidden 3584 --ffn 18944 --heads 28
--kv-heads 4 --vocab 152064 --positions 131072 --window 4096) or cola (Cola DLM's text VAE and diffusion Transformer; the
defaults are the released 2.3B, --layers cuts the Transformer and --vae-blocks both halves of the VAE). Only the standard
library is needed. Values repeat after 2**20 random ones (a prime stride apart from row to row), which changes neither
bytes nor operations.

    scripts/make_random_model.py out/ --dtype bf16 [--tokenizer DIR]
    lacuna bench -m out/ --lengths 512
"""
import argparse
import array
import json
import math
import pathlib
import random
import shutil
import struct
import sys

POOL = 1 << 20
STRIDE = 769  # odd, so that rows start at different places of the pool


def standard_normals(count):
    rng = random.Random(1)
    return [rng.gauss(0.0, 1.0) for _ in range(count)]


def encode(values, dtype):
    """Little-endian bytes of floats in f32 or bf16 (rounded to nearest even)."""
    f32 = array.array("f", values)
    if sys.byteorder == "big":
        f32.byteswap()
    if dtype == "f32":
        return f32.tobytes()
    bits = array.array("I", f32.tobytes())
    return array.array("H", ((b + 0x7FFF + ((b >> 16) & 1)) >> 16 for b in bits)).tobytes()


class Pool:
    """Random numbers in the file's type, cut into tensors of any size."""

    def __init__(self, std, dtype, normals):
        self.width = {"f32": 4, "bf16": 2, "int8": 1}[dtype]
        if dtype == "int8":
            # Rows of normals have their largest value near 4 standard deviations: code 127 stands for that.
            codes = (max(-127, min(127, round(x * 127 / 4))) for x in normals)
            self.bytes = array.array("b", codes).tobytes()
        else:
            self.bytes = encode([x * std for x in normals], dtype)

    def write(self, file, elements, start):
        at = start * STRIDE % POOL * self.width
        left = elements * self.width
        while left:
            piece = self.bytes[at:at + left]
            file.write(piece)
            left -= len(piece)
            at = 0


def gla_swa_tensors(c):
    """As tensors_of, with SpikingBrain-7B's names."""
    d, f = c["hidden_size"], c["intermediate_size"]
    head = d // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * head
    rank = c["gate_low_rank_dim"]
    yield "model.embeddings.weight", (c["vocab_size"], d), "weight"
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "attn_norm.weight", (d,), "norm"
        for name, rows, bias in (("q", d, True), ("k", kv, True), ("v", kv, True), ("o", d, False)):
            yield f"{p}attn.{name}_proj.weight", (rows, d), "weight"
            if bias:
                yield f"{p}attn.{name}_proj.bias", (rows,), "bias"
        if i % 2 == 0:
            yield p + "attn.gk_proj.0.weight", (rank, d), "weight"
            yield p + "attn.gk_proj.1.weight", (kv, rank), "weight"
            yield p + "attn.gk_proj.1.bias", (kv,), "bias"
            yield p + "attn.g_norm.weight", (head,), "norm"
        yield p + "mlp_norm.weight", (d,), "norm"
        yield p + "mlp.gate_proj.weight", (f, d), "weight"
        yield p + "mlp.up_proj.weight", (f, d), "weight"
        yield p + "mlp.down_proj.weight", (d, f), "weight"
    yield "model.norm.weight", (d,), "norm"
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], d), "weight"


def tensors_of(c, dtype):
    """(name, shape, kind) in file order; kind is weight, norm or bias."""
    if c["model_type"] == "gla_swa":
        yield from gla_swa_tensors(c)
        return
    d, f, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    head = d // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (c["vocab_size"], d), "weight"
    for i in range(layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (d,), "norm"
        for name, rows, bias in (("q", d, True), ("k", kv, True), ("v", kv, True), ("o", d, False)):
            yield f"{p}self_attn.{name}_proj.weight", (rows, d), "weight"
            if bias:
                yield f"{p}self_attn.{name}_proj.bias", (rows,), "bias"
        yield p + "post_attention_layernorm.weight", (d,), "norm"
        yield p + "mlp.gate_proj.weight", (f, d), "weight"
        yield p + "mlp.up_proj.weight", (f, d), "weight"
        yield p + "mlp.down_proj.weight", (d, f), "weight"
    yield "model.norm.weight", (d,), "norm"


def cola_vae_tensors(c):
    """As tensors_of, of Cola DLM's text VAE."""
    d, latent, patch = c["dim"], c["latent_dim"], c["patch_size"]

    def linear(name, out, into):
        yield name + ".weight", (out, into), "weight"
        yield name + ".bias", (out,), "bias"

    def norm(name):
        yield name + ".weight", (d,), "norm"
        yield name + ".bias", (d,), "bias"

    yield "encoder.wte.weight", (c["vocab_size"] + 1, d), "weight"
    yield "encoder.patch_embedder.weight", (d, d, patch), "weight"
    yield "encoder.patch_embedder.bias", (d,), "bias"
    for half in ("encoder", "decoder"):
        for i in range(c[half + "_num_blocks"]):
            p = f"{half}.blocks.{i}."
            for name in ("norm_attn", "norm_ffn", "q_norm", "k_norm"):
                yield from norm(p + name)
            yield p + "qkv_proj.weight", (3 * d, d), "weight"
            yield from linear(p + "attn_out_proj", d, d)
            yield from linear(p + "ffn_proj", c["ffn_dim"], d)
            yield from linear(p + "ffn_out", d, c["ffn_dim"] // 2)
    yield from linear("encoder.final_layer", 2 * latent, d)
    yield from linear("decoder.in_layer", d, latent)
    yield from linear("decoder.unpatch_layer", d * patch, d)
    yield from norm("decoder.final_norm")
    yield from linear("decoder.final_layer", c["vocab_size"], d)


def cola_dit_tensors(c):
    """As tensors_of, of Cola DLM's diffusion Transformer."""
    d, inner = c["txt_dim"], c["heads"] * c["head_dim"]

    def linear(name, out, into):
        yield name + ".weight", (out, into), "weight"
        yield name + ".bias", (out,), "bias"

    def norm(name, size):
        yield name + ".weight", (size,), "norm"
        yield name + ".bias", (size,), "bias"

    yield from linear("txt_in.proj", d, c["txt_in_channels"])
    for name, into in (("in", 256), ("hid", d), ("out", d)):
        yield from linear("emb_in.proj_" + name, d, into)
    for i in range(c["num_layers"]):
        p = f"blocks.{i}."
        yield p + "msa.proj_qkv.weight", (3 * inner, d), "weight"
        yield p + "msa.proj_out.weight", (d, inner), "weight"
        for name in ("q", "k"):
            yield from norm(p + "msa.norm_" + name, c["head_dim"])
        yield from linear(p + "mlp.proj_in", d * c["expand_ratio"], d)
        yield from linear(p + "mlp.proj_out", d, d * c["expand_ratio"])
        for name, parts in (("msa_in", 2), ("msa_out", 1), ("mlp_in", 2), ("mlp_out", 1)):
            yield from linear(f"{p}ada.{name}.1", parts * d, d)
    yield from norm("txt_out_norm", d)
    yield from linear("txt_out_ada.out_in.1", 2 * d, d)
    yield from linear("txt_out.proj", c["txt_out_channels"], d)


def write_checkpoint(folder, config, everything, dtype, normals):
    """config.json and model.safetensors of (name, shape, kind) tensors; the number of its parameters and bytes."""
    if dtype == "int8":
        config["quantization_config"] = {"quant_method": "lacuna-int8", "bits": 8, "granularity": "per_row"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # 0.02 is what such models start training from: a few dozen layers of it keep activations near 1.
    std, small = 0.02, "f32" if dtype == "f32" else "bf16"
    weights, biases = Pool(std, dtype, normals), Pool(0.01, small, normals)
    names = {"f32": "F32", "bf16": "BF16", "int8": "I8"}
    header, writers, offset = {}, [], 0

    def add(name, shape, dtype, write):
        nonlocal offset
        size = math.prod(shape) * {"F32": 4, "BF16": 2, "I8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
        writers.append(write)

    # Four-byte tensors first: every offset stays a multiple of its element's size.
    if dtype == "int8":
        for name, shape, kind in everything:
            if kind == "weight":
                scale = struct.pack("<f", std * 4 / 127) * shape[0]
                add(name + "_scale", (shape[0],), "F32", lambda f, b=scale: f.write(b))
    for kind in ("norm", "bias", "weight"):
        for i, (name, shape, own) in enumerate(everything):
            if own != kind:
                continue
            count = math.prod(shape)
            if kind == "norm":
                add(name, shape, names[small], lambda f, n=count: f.write(encode([1.0] * n, small)))
            elif kind == "bias":
                add(name, shape, names[small], lambda f, n=count, i=i: biases.write(f, n, i))
            else:
                add(name, shape, names[dtype], lambda f, n=count, i=i: weights.write(f, n, i))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for write in writers:
            write(f)
    return sum(math.prod(s) for _, s, _ in everything), offset


DEFAULTS = {
    "qwen2": {"layers": 24, "hidden": 896, "ffn": 4864, "heads": 14, "vocab": 151936},
    "cola": {"layers": 24, "hidden": 2048, "ffn": 8192, "heads": 16, "vocab": 100278},
}
DEFAULTS["gla_swa"] = DEFAULTS["qwen2"]


def cola_configs(a):
    """The text VAE's and the diffusion Transformer's config.json; widths of the VAE are three quarters of the other's."""
    dim = a.hidden * 3 // 4
    head = a.hidden // a.heads
    if a.hidden % a.heads or dim % head or a.ffn % a.hidden or head % 8:
        sys.exit(f"{a.hidden} channels, {a.heads} heads and {a.ffn} feed-forward channels do not divide")
    vae = {
        "architectures": ["ColaTextVAEModel"], "model_type": "cola_text_vae", "vocab_size": a.vocab, "dim": dim,
        "encoder_num_blocks": a.vae_blocks, "decoder_num_blocks": a.vae_blocks, "ffn_dim": 4 * dim, "latent_dim": 16,
        "patch_size": 1, "num_heads": dim // head, "block_size": 1,
    }
    dit = {
        "architectures": ["ColaDiTModel"], "model_type": "cola_dit", "txt_in_channels": 16, "txt_out_channels": 16,
        "txt_dim": a.hidden, "emb_dim": a.hidden, "heads": a.heads, "head_dim": head, "expand_ratio": a.ffn // a.hidden,
        "num_layers": a.layers, "patch_size": 1, "rope_dim": head * 3 // 4, "block_size": 16,
    }
    return vae, dit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--arch", choices=["qwen2", "gla_swa", "cola"], default="qwen2")
    parser.add_argument("--dtype", choices=["f32", "bf16", "int8"], default="bf16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--ffn", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--vae-blocks", type=int, default=4, help="cola: blocks of each half of the VAE")
    parser.add_argument("--window", type=int, default=4096, help="gla_swa: sliding window in tokens")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="folder whose tokenizer files are copied; its ids must fit --vocab")
    a = parser.parse_args()
    for key, value in DEFAULTS[a.arch].items():
        if getattr(a, key) is None:
            setattr(a, key, value)
    normals = standard_normals(POOL)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"):
            if (a.tokenizer / name).exists():
                shutil.copyfile(a.tokenizer / name, a.out / name)
    if a.arch == "cola":
        vae, dit = cola_configs(a)
        done = [write_checkpoint(a.out / "cola_dlm" / name, config, list(tensors(config)), a.dtype, normals)
                for name, config, tensors in (("cola_vae", vae, cola_vae_tensors), ("cola_dit", dit, cola_dit_tensors))]
        parameters, size = (sum(part) for part in zip(*done))
        print(f"{a.out}: {parameters / 1e6:.0f} M parameters, {size / 1e6:.0f} MB of {a.dtype}")
        return

    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": a.hidden, "intermediate_size": a.ffn, "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "vocab_size": a.vocab,
        "max_position_embeddings": a.positions, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
        "torch_dtype": {"f32": "float32"}.get(a.dtype, "bfloat16"),
    }
    if a.arch == "gla_swa":
        for key in ("architectures", "rms_norm_eps"):
            del config[key]
        config |= {"architectures": ["GLAswaForCausalLM"], "model_type": "gla_swa", "hidden_act": "swish", "norm_eps": 1e-6,
                   "sliding_window": a.window, "gate_low_rank_dim": 16, "tie_word_embeddings": False}
    if a.hidden % a.heads or a.heads % a.kv_heads:
        parser.error(f"{a.hidden} channels, {a.heads} heads and {a.kv_heads} KV heads do not divide")
    parameters, size = write_checkpoint(a.out, config, list(tensors_of(config, a.dtype)), a.dtype, normals)
    (a.out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}) + "\n")
    print(f"{a.out}: {parameters / 1e6:.0f} M parameters, {size / 1e6:.0f} MB of {a.dtype}")


if __name__ == "__main__":
    main()
