"""Checkpoints in the Hugging Face layout: int8 with a scale per output row, or plain bf16.

int8: a matrix `X.weight` [out, in] is stored as I8 codes in [-127, 127] with
`X.weight_scale` F32 [out]; the weight is code · scale[row], scale = amax / 127.
The embedding is a matrix whose rows are vocabulary entries. Norms and biases stay F32, and so
do the low-rank matrices of linear attention's gates, which are few.
"""
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .hybrid import Hybrid, HybridConfig
from .model import INT8_MAX, Decoder, ModelConfig
from .spike import DOWN_IN, SITES
from .tokenizer import EOS_ID

QUANTIZATION = {"quant_method": "lacuna-int8", "bits": 8, "granularity": "per_row"}


def quantize_rows(weight):
    """(codes int8 [out, in], scale float32 [out])."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / INT8_MAX).clamp_min(1e-12)
    codes = torch.round(weight / scale[:, None]).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return codes, scale


def dequantize(tensors):
    """Every X.weight with an X.weight_scale beside it as float32; the rest as it is, in float32."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale"):
            continue
        scale = tensors.get(name + "_scale")
        out[name] = tensor.float() if scale is None else tensor.float() * scale.float()[:, None]
    return out


def hf_config(c, int8):
    if isinstance(c, HybridConfig):
        config = gla_swa_config(c)
    else:
        config = {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "rms_norm_eps": c.rms_norm_eps, "rope_scaling": None, "tie_word_embeddings": True,
            "use_sliding_window": False, "sliding_window": None, "max_window_layers": c.num_hidden_layers}
    config |= {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID,
        "torch_dtype": "float32" if int8 else "bfloat16"}
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        config["head_dim"] = c.head_dim
    if int8:
        config["quantization_config"] = QUANTIZATION
    return config


def gla_swa_config(c):
    """Keys of spec section 1.1 that Qwen2's config has not, and extensions: window_rule exact says that a query sees
    sliding_window keys, its own included, in prefill and decoding alike."""
    config = {
        "architectures": ["GLAswaForCausalLM"], "model_type": "gla_swa", "hidden_act": "swish", "norm_eps": c.rms_norm_eps,
        "sliding_window": c.window, "window_rule": "exact", "attn_mode": "chunk", "use_short_conv": False, "conv_size": 4,
        "elementwise_affine": True, "attn_layers": list(range(1, c.num_hidden_layers, 2)), "tie_word_embeddings": c.tied,
        "gate_low_rank_dim": c.gate_rank, "gate_logit_normalizer": c.gate_divisor}
    if c.full_attention_layers:
        config["full_attention_layers"] = c.full_attention_layers
    return config


def read_config(folder):
    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rope_theta", "max_position_embeddings")
    shape = {n: raw[n] for n in names}
    shape["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    if raw["model_type"] == "gla_swa":
        return HybridConfig(
            rms_norm_eps=raw["norm_eps"], window=raw["sliding_window"], tied=raw["tie_word_embeddings"],
            full_attention_layers=raw.get("full_attention_layers", []), gate_rank=raw.get("gate_low_rank_dim", 16),
            gate_divisor=float(raw.get("gate_logit_normalizer", 16)), **shape)
    if raw["model_type"] != "qwen2":
        raise ValueError(f"{path}: model_type is {raw['model_type']}; the trainer knows qwen2 and gla_swa")
    return ModelConfig(rms_norm_eps=raw["rms_norm_eps"], **shape)


def hf_name(name):
    return name if name.startswith("lm_head.") else "model." + name


def read_source(source):
    """(config, float32 tensors by Hugging Face name) of a trainer checkpoint or an exported folder."""
    source = Path(source)
    if source.is_dir():
        return read_config(source), dequantize(load_file(source / "model.safetensors"))
    saved = torch.load(source, map_location="cpu", weights_only=True)
    kind = HybridConfig if "window" in saved["config"] else ModelConfig
    return kind(**saved["config"]), {hf_name(k): v.float() for k, v in saved["model"].items()}


def make_model(config, compute, compiled=False):
    return (Hybrid if isinstance(config, HybridConfig) else Decoder)(config, compute, compiled)


def read_spike_coding(folder):
    """The config's `spike_coding`, or None."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("spike_coding") if path.exists() else None


def coded_k(coding, config, folder):
    """k [layers, 4] of a coding, or None: "off", "config" for what the folder's config.json says, or a number for all."""
    if coding == "off":
        return None
    shape = config.num_hidden_layers, len(SITES)
    if coding != "config":
        return torch.full(shape, float(coding))
    found = read_spike_coding(folder)
    if found is None:
        raise ValueError(f"{folder}/config.json has no spike_coding; calibrate writes one")
    k = torch.tensor(found["k_by_layer"]) if "k_by_layer" in found else torch.full(shape, float(found["k"]))
    if tuple(k.shape) != shape:
        raise ValueError(f"{folder}/config.json: k_by_layer is {list(k.shape)}, not {list(shape)}")
    if found["mode"] == "reference":  # the official code's down_proj sees no spikes (spec section 3.3)
        k[:, DOWN_IN] = 0.0
    return k


def load_model(source, compute, device, compiled=False):
    config, tensors = read_source(source)
    model = make_model(config, compute, compiled)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    model.rounding = None  # nothing here is trained
    return model.to(device).eval()


def replace_file(path, write):
    """Writes beside `path`, then renames, so that no half-written file is left."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_checkpoint(config, tensors, out, int8):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim == 2 and int8 and "gk_proj" not in name:
            stored[name], stored[name + "_scale"] = quantize_rows(tensor)
        else:
            stored[name] = tensor.float().contiguous() if int8 else tensor.to(torch.bfloat16).contiguous()
    replace_file(out / "model.safetensors", lambda p: save_file(stored, p, metadata={"format": "pt"}))
    for name, content in (("config.json", hf_config(config, int8)),
                          ("generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": EOS_ID, "do_sample": False})):
        text = json.dumps(content, indent=1) + "\n"
        replace_file(out / name, lambda p: Path(p).write_text(text, encoding="utf-8"))


def export(args):
    source = Path(args.source)
    config, tensors = read_source(source)
    write_checkpoint(config, tensors, args.out, int8=not args.bf16)
    tokenizer = Path(args.tokenizer) if args.tokenizer else source
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (tokenizer / name).read_bytes()
        replace_file(Path(args.out) / name, lambda p: Path(p).write_bytes(content))
    size = sum(f.stat().st_size for f in Path(args.out).iterdir() if f.is_file())
    print(f"{args.out}: {'bf16' if args.bf16 else 'int8'}, {size} bytes in the folder")
