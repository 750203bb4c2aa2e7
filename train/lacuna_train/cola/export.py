"""Cola models in the public layout: DIR/cola_vae and DIR/cola_dit with config.json and model.safetensors, and
DIR/tokenizer.json. int8 as in ../export.py (a scale per output row); float32 or bfloat16 on request.

Matrices with fewer than MIN_ROW weights a row or that many rows stay float32: they are next to nothing."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..export import QUANTIZATION, dequantize, quantize_rows, replace_file
from ..tokenizer import EOS_ID
from .dit import Dit, DitConfig
from .vae import TextVae, VaeConfig

MIN_ROW = 32
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def vae_config(c, dtype):
    return {
        "architectures": ["ColaTextVAEModel"], "model_type": "cola_text_vae", "act": "swiglu", "attn_dropout": 0.0,
        "bias": True, "block_causal": True, "causal": False, "clip_qkv": None, "dropout": 0.0, "encoder_last_ln": True,
        "init_cutoff_factor": 3, "init_fn": "normal", "init_std": 0.02, "layer_norm_affine": True,
        "layer_norm_type": "layer_norm", "post_norm": True, "qk_bias": False, "qk_norm": True, "qk_norm_affine": True,
        "rope_full_precision": True, "shared_heads_kv": 1, "use_emb": True, "use_variation": True,
        "eos_token_id": EOS_ID, "pad_token_id": EOS_ID, **c.to_dict(), **dtype}


def dit_config(c, dtype):
    return {
        "architectures": ["ColaDiTModel"], "model_type": "cola_dit", "emb_dim": c.txt_dim, "patch_size": 1, "qk_bias": False,
        "txt_out_channels": c.txt_in_channels, **c.to_dict(), **dtype}


def stored(tensors, kind):
    out = {}
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu()
        small = tensor.ndim < 2 or tensor.shape[0] < MIN_ROW or tensor[0].numel() < MIN_ROW
        if kind == "int8" and not small:
            codes, scale = quantize_rows(tensor.flatten(1))
            out[name], out[name + "_scale"] = codes.view(tensor.shape), scale
        else:
            out[name] = tensor.to(torch.float32 if kind == "int8" else FORMATS[kind]).contiguous()
    return out


def write_cola(vae_state, dit_state, vae_shape, dit_shape, out, kind="int8", tokenizer=None):
    """States by parameter name, on any device; shapes: VaeConfig and DitConfig."""
    out = Path(out)
    dtype = {"torch_dtype": "float32" if kind == "int8" else kind}
    if kind == "int8":
        dtype["quantization_config"] = QUANTIZATION
    for folder, state, config in (("cola_vae", vae_state, vae_config(vae_shape, dtype)),
                                  ("cola_dit", dit_state, dit_config(dit_shape, dtype))):
        (out / folder).mkdir(parents=True, exist_ok=True)
        tensors = stored(state, kind)
        replace_file(out / folder / "model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        replace_file(out / folder / "config.json", lambda p: Path(p).write_text(text, encoding="utf-8"))
    if tokenizer:
        content = (Path(tokenizer) / "tokenizer.json").read_bytes()
        replace_file(out / "tokenizer.json", lambda p: Path(p).write_bytes(content))


def _read(folder, kind):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = kind.__dataclass_fields__
    return kind(**{n: config[n] for n in names if n in config}), dequantize_all(folder)


def dequantize_all(folder):
    tensors = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(part)
    flat = {n: t.flatten(1) if t.ndim == 3 else t for n, t in tensors.items()}
    return {n: t.view(tensors[n].shape) for n, t in dequantize(flat).items()}


def load_cola(source, compute=torch.float32, device="cpu", positions=1024):
    """(vae, dit) of a folder (either may be missing: None) for use, not for training."""
    source = Path(source)
    if (source / "cola_dlm").is_dir():
        source = source / "cola_dlm"
    models = []
    for folder, kind, model in (("cola_vae", VaeConfig, TextVae), ("cola_dit", DitConfig, Dit)):
        if not (source / folder).is_dir():
            models.append(None)
            continue
        config, tensors = _read(source / folder, kind)
        models.append(ready(model(config, compute, positions=positions), tensors, device))
    return tuple(models)


def ready(model, state, device):
    model.load_state_dict(state)
    model.rounding = None  # nothing here is trained
    return model.to(device).eval().requires_grad_(False)


def usable(trained, compute, kind="int8"):
    """A model for use with the weights of a trained one (a TextVae or a Dit), as an export of `kind` would have them."""
    device = next(trained.parameters()).device
    state = stored(trained.state_dict(), kind)
    flat = {n: t.flatten(1) if t.ndim == 3 else t for n, t in state.items()}
    state = {n: t.view(state[n].shape) for n, t in dequantize(flat).items()}
    return ready(type(trained)(trained.config, compute), state, device)


def read_trained(checkpoint):
    """(vae state, dit state or None, VaeConfig, DitConfig or None) of a checkpoint that cola train wrote."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    part = lambda name: {n.removeprefix(name + "."): t for n, t in saved["models"].items() if n.startswith(name + ".")}
    shape = saved["shape"]
    if "vae" not in shape:
        raise ValueError(f"{checkpoint} is of stage {saved['stage']}: there is no VAE in it")
    dit = (part("dit"), DitConfig(**shape["dit"])) if "dit" in shape else (None, None)
    return part("vae"), dit[0], VaeConfig(**shape["vae"]), dit[1]
