#!/usr/bin/env python3
"""Converts a llama2.c model (legacy .bin) and its SentencePiece model to the Hugging Face layout.

    python convert_llama2c.py stories260K.bin tok512.model OUT

The file: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
seq_len; a negative vocab_size says that the output matrix is not the embedding),
then float32 tensors, each over all layers: embedding, attention norms, wq, wk, wv,
wo, feed-forward norms, w1 (gate), w2 (down), w3 (up), last norm, two tables of
rotary angles (seq_len x head_dim / 2, not needed) and, if apart, the output matrix.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HEADER = 7


def halves(weight, heads):
    """Rows of wq or wk from interleaved rotary pairs (0, 1), (2, 3) … to the halves that the layout uses."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_llama2c(path):
    """(config as a dict, tensors by Hugging Face name)."""
    raw = Path(path).read_bytes()
    if len(raw) < 4 * HEADER:
        raise ValueError(f"{path}: {len(raw)} bytes, too short for the header of {4 * HEADER}")
    dim, hidden, layers, heads, kv_heads, vocab, length = (int(x) for x in np.frombuffer(raw, "<i4", HEADER))
    shared, vocab = vocab > 0, abs(vocab)
    if min(dim, hidden, layers, heads, kv_heads, vocab, length) < 1 or dim % heads or heads % kv_heads or dim // heads % 2:
        raise ValueError(f"{path}: the header is no llama2.c header: dim {dim}, hidden_dim {hidden}, n_layers {layers}, "
                         f"n_heads {heads}, n_kv_heads {kv_heads}, vocab_size {vocab}, seq_len {length}")
    head = dim // heads
    narrow = kv_heads * head
    shapes = [("embedding", (vocab, dim)), ("attention_norm", (layers, dim)), ("wq", (layers, dim, dim)),
              ("wk", (layers, narrow, dim)), ("wv", (layers, narrow, dim)), ("wo", (layers, dim, dim)),
              ("mlp_norm", (layers, dim)), ("w1", (layers, hidden, dim)), ("w2", (layers, dim, hidden)),
              ("w3", (layers, hidden, dim)), ("norm", (dim,)), ("angles", (2, length, head // 2))]
    if not shared:
        shapes.append(("output", (vocab, dim)))
    needed = 4 * (HEADER + sum(int(np.prod(s)) for _, s in shapes))
    if len(raw) != needed:
        raise ValueError(f"{path}: {len(raw)} bytes, but its header needs {needed}")
    parts, offset = {}, 4 * HEADER
    for name, shape in shapes:
        parts[name] = np.frombuffer(raw, "<f4", int(np.prod(shape)), offset).reshape(shape)
        offset += 4 * parts[name].size

    tensors = {"model.embed_tokens.weight": parts["embedding"], "model.norm.weight": parts["norm"]}
    if not shared:
        tensors["lm_head.weight"] = parts["output"]
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": parts["attention_norm"][i],
            layer + "self_attn.q_proj.weight": halves(parts["wq"][i], heads),
            layer + "self_attn.k_proj.weight": halves(parts["wk"][i], kv_heads),
            layer + "self_attn.v_proj.weight": parts["wv"][i], layer + "self_attn.o_proj.weight": parts["wo"][i],
            layer + "post_attention_layernorm.weight": parts["mlp_norm"][i],
            layer + "mlp.gate_proj.weight": parts["w1"][i], layer + "mlp.down_proj.weight": parts["w2"][i],
            layer + "mlp.up_proj.weight": parts["w3"][i]}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": dim,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "hidden_act": "silu", "max_position_embeddings": length,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": shared,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}
    return config, {name: np.ascontiguousarray(t) for name, t in tensors.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config, tensors = read_llama2c(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(args.tokenizer, args.out / "tokenizer.model")
    for name, content in (("config.json", config), ("tokenizer_config.json", {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": True, "add_eos_token": False, "legacy": True})):
        (args.out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
