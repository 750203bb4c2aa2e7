#!/usr/bin/env python3
"""Converts a model of llama2.c's first file format to a Hugging Face Llama directory.

    python3 train/convert_llama2c.py stories260K.bin tok512.model models/stories260K

Needs nothing but Python. The format: seven int32 (dim, hidden_dim, n_layers, n_heads,
n_kv_heads, vocab_size, seq_len; a negative vocab_size means an output matrix of its
own), then float32 arrays in the order read below.
"""
import json
import shutil
import struct
import sys
from array import array
from pathlib import Path


def half_split(rows, heads, head_dim, columns):
    """Rows of a query or key matrix from pairs (2i, 2i+1) to pairs (i, i + d/2), as Hugging Face rotates them."""
    out = array("f")
    order = list(range(0, head_dim, 2)) + list(range(1, head_dim, 2))
    for head in range(heads):
        for row in order:
            start = (head * head_dim + row) * columns
            out.extend(rows[start:start + columns])
    return out


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    source, tokenizer, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    data = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", data)
    tied, vocab = vocab > 0, abs(vocab)
    floats = array("f", data[28:28 + (len(data) - 28) // 4 * 4])
    if sys.byteorder == "big":
        floats.byteswap()
    head_dim = dim // heads
    kv_dim = kv_heads * head_dim
    at = 0

    def take(count):
        nonlocal at
        if at + count > len(floats):
            sys.exit(f"{source}: {len(floats)} values, at least {at + count} were expected")
        at += count
        return floats[at - count:at]

    tensors = {"model.embed_tokens.weight": ((vocab, dim), take(vocab * dim))}

    def each_layer(name, shape, change=lambda values: values):
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{name}.weight"] = (shape, change(take(size)))

    each_layer("input_layernorm", (dim,))
    each_layer("self_attn.q_proj", (dim, dim), lambda v: half_split(v, heads, head_dim, dim))
    each_layer("self_attn.k_proj", (kv_dim, dim), lambda v: half_split(v, kv_heads, head_dim, dim))
    each_layer("self_attn.v_proj", (kv_dim, dim))
    each_layer("self_attn.o_proj", (dim, dim))
    each_layer("post_attention_layernorm", (dim,))
    each_layer("mlp.gate_proj", (hidden, dim))
    each_layer("mlp.down_proj", (dim, hidden))
    each_layer("mlp.up_proj", (hidden, dim))
    tensors["model.norm.weight"] = ((dim,), take(dim))
    take(positions * head_dim)  # cosines and sines, which the engine makes itself
    if not tied:
        tensors["lm_head.weight"] = ((vocab, dim), take(vocab * dim))

    header, offset = {}, 0
    for name, (shape, values) in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + 4 * len(values)]}
        offset += 4 * len(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            file.write(values.tobytes())
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": dim,
              "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "hidden_act": "silu", "max_position_embeddings": positions,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied, "bos_token_id": 1,
              "eos_token_id": 2, "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(tokenizer, out / "tokenizer.model")


if __name__ == "__main__":
    main()
