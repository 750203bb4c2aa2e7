"""Cola DLM's trainer: packing, every option of the losses, resuming, export, generation."""
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lacuna_train.cola import evaluate as E
from lacuna_train.cola import losses as L
from lacuna_train.cola.ablate import VARIANTS
from lacuna_train.cola.attention import block_causal_mask, masked, packed_dense, packed_flex, packed_mask
from lacuna_train.cola.data import Text, fixed_rows
from lacuna_train.cola.dit import T, Dit, DitConfig
from lacuna_train.cola.export import load_cola, read_trained, write_cola
from lacuna_train.cola.sample import Memory, continue_greedily, generate, penalise
from lacuna_train.cola.trainer import Run, Settings
from lacuna_train.cola.vae import TextVae, VaeConfig
from lacuna_train.model import Decoder, ModelConfig

VAE = VaeConfig(vocab_size=8192, dim=32, ffn_dim=64, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=2, latent_dim=4)
DIT = DitConfig(txt_dim=32, heads=2, head_dim=16, num_layers=2, expand_ratio=2, txt_in_channels=4, rope_dim=12, block_size=4)
CPU = torch.device("cpu")


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator) + (1 if p.ndim == 1 else 0)
    return model


@pytest.fixture(scope="module")
def text(data):
    return Text(data / "train", CPU)


def run_of(text, stage="joint", start=None, constants=L.Constants(short=16), vae=VAE, **settings):
    s = Settings(stage=stage, tokens=128, length=64, constants=constants, **settings)
    ar = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    return Run(s, text, CPU, vae, DIT, start, ar, token_budget=128 * 8)


@pytest.fixture(scope="module")
def start(text):
    run = run_of(text, "vae")
    run.train()
    return {n: t.clone() for n, t in run.models.vae.state_dict().items()}


# ---- who sees whom

@pytest.mark.parametrize("length,block", [(12, 4), (64, 16), (512, 16), (384, 32)])
def test_all_ways_of_packed_attention_agree(length, block):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2 * length, 8) for _ in range(3))
    wanted = masked(packed_mask(length, block))(q, k, v)
    assert torch.allclose(packed_dense(length, block)(q, k, v), wanted, atol=1e-5)
    assert torch.allclose(packed_flex(length, block, CPU, compiled=False)(q, k, v), wanted, atol=1e-5)


def test_the_packed_mask_entry_by_entry():
    length, block = 8, 4
    mask = packed_mask(length, block)
    for q in range(2 * length):
        for k in range(2 * length):
            q_block, k_block = q % length // block, k % length // block
            if q < length:
                wanted = k < length and q_block >= k_block
            else:
                wanted = q_block > k_block if k < length else q_block == k_block
            assert bool(mask[q, k]) == wanted, (q, k)


def test_the_packed_sequence_is_the_loop_over_blocks():
    dit = randomise(Dit(DIT))
    torch.manual_seed(1)
    rows, length, bs = 2, 16, DIT.block_size
    z0, z1 = torch.randn(2, rows, length, 4)
    t = torch.rand(rows, length // bs).repeat_interleave(bs, 1)
    prefix = torch.rand(rows, length) < 0.2
    noisy, t_noisy = L.noisy_copy(z0, z1, t, prefix)
    packed = L.packed_velocity(dit, z0, noisy, t_noisy, packed_dense(length, bs))
    history = Memory(DIT.num_layers)
    for at in range(0, length, bs):
        block, positions = slice(at, at + bs), torch.arange(at, at + bs)
        one = dit.run(noisy[:, block], t_noisy[:, block], positions, history.attend(keep=False))
        assert torch.allclose(one, packed[:, block], atol=1e-5)
        dit.run(z0[:, block], torch.zeros(rows, bs), positions, history.attend(keep=True))


# ---- losses

def test_kinds_of_steps(text, start):
    run = run_of(text, start=start, constants=L.Constants(short=16, short_share=0.25, block_shares={"2": 0.3, "1": 0.1}))
    drawn = [run.step_of.kind_of(i) for i in range(3000)]
    assert drawn == [run.step_of.kind_of(i) for i in range(3000)]
    for block, share in ((4, 0.6), (2, 0.3), (1, 0.1)):
        assert abs(np.mean([b == block for _, b in drawn]) - share) < 0.03
    assert abs(np.mean([n == 16 for n, _ in drawn]) - 0.25) < 0.03
    run.train(steps=8)
    assert run.step == 8


def test_gaussian_terms_are_those_of_pytorch():
    torch.manual_seed(0)
    mean, logvar, mean_r, logvar_r = torch.randn(4, 5, 3)
    normal = lambda m, v: torch.distributions.Normal(m, (0.5 * v).exp())
    of = torch.distributions.kl_divergence
    unit = torch.distributions.Normal(torch.zeros(5, 3), torch.ones(5, 3))
    assert torch.allclose(L.kl_standard(mean, logvar), of(normal(mean, logvar), unit).sum(-1), atol=1e-5)
    assert torch.allclose(L.kl_between(mean, logvar, mean_r, logvar_r), of(normal(mean, logvar), normal(mean_r, logvar_r)).sum(-1), rtol=1e-4)
    assert torch.allclose(L.expected_log_q(logvar), -normal(mean, logvar).entropy().sum(-1), atol=1e-5)


def test_prefixes_and_timesteps():
    generator = torch.Generator().manual_seed(0)
    chance, split = torch.rand(2, 400, 50, generator=generator)
    prefix = L.prefix_mask(chance, split, 16)(0.25).unflatten(-1, (50, 16))
    counts = prefix.sum(-1)
    assert (prefix == (torch.arange(16) < counts[..., None])).all()  # a prefix indeed
    assert 0.23 < (counts > 0).float().mean() < 0.27
    assert set(counts.unique().tolist()) == set(range(16))
    t = L.timesteps(torch.randn(100000, generator=generator), 1.0, 1.0)
    assert abs(float(t.median()) - 1 / (1 + math.exp(-1))) < 0.01


def gradient_of_flow(text, start, **constants):
    """Gradient of the flow's loss alone at the encoder's last layer."""
    weights = dict(vae_weight=0.0, ref_weight=0.0, short_share=0.0, mask_weight=0.0)
    run = run_of(text, start=start, constants=L.Constants(**weights | constants), gates=None)
    run.step_of.load(text, 0, 0, (64, 4))
    run.step_of((64, 4))
    return run.models.vae.encoder.final_layer.weight.grad.clone()


def test_where_the_flows_gradient_reaches_the_encoder(text, start):
    plain = gradient_of_flow(text, start, detach_target=True)
    assert plain.abs().max() > 0  # through the noisy copy
    assert not torch.equal(plain, gradient_of_flow(text, start, detach_target=False))
    # Every position of a block but the last clean: nothing but those few carries loss or gradient, and none of history does.
    z0 = torch.randn(1, 8, 4, requires_grad=True)
    z1, t = torch.randn(1, 8, 4), torch.full((1, 8), 0.5)
    dit = randomise(Dit(DIT))
    prefix = torch.tensor([[True] * 3 + [False] + [False] * 4])
    noisy, t_noisy = L.noisy_copy(z0, z1, t, prefix)
    carries = torch.tensor([[0.0] * 4 + [1.0] * 4])  # the loss of the second block alone
    L.flow_loss(L.packed_velocity(dit, z0, noisy, t_noisy, packed_dense(8, 4)), z0, z1, carries).backward()
    assert z0.grad[0, :4].abs().max() == 0 and z0.grad[0, 4:].abs().max() > 0


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "base, seed 2"])
def test_every_variant_takes_steps(text, start, name):
    from dataclasses import replace
    changed, settings = VARIANTS[name]
    run = run_of(text, start=start, constants=replace(L.Constants(short=16), **changed), **settings)
    said = []
    run.train(steps=3, say=lambda **f: said.append(f), log_seconds=0)
    assert run.step == 3 and len(said) == 3
    assert all(math.isfinite(v) for f in said for v in f.values())
    moved = any(not torch.equal(p, start[n]) for n, p in run.models.vae.named_parameters())
    assert moved == (not changed.get("freeze_vae", False))


def test_learning():
    """Both stages lower their losses on a text that one can learn."""
    ids = np.tile(np.arange(16, dtype=np.int16), 400)
    text = Text.__new__(Text)
    text.ids, text.device = torch.from_numpy(ids), CPU
    vae = VaeConfig(**VAE.to_dict() | {"vocab_size": 32})
    said = []
    say = lambda **f: said.append(f)
    settings = Settings(stage="vae", tokens=256, length=64, muon_lr=0.02, adam_lr=0.01, constants=L.Constants(short=16, mask_weight=0.3))
    run = Run(settings, text, CPU, vae, DIT, token_budget=256 * 120)
    run.train(say=say, log_seconds=0)
    assert said[-1]["recon"] < 0.1 < said[0]["recon"] and said[-1]["masked"] < said[0]["masked"] / 2
    start, said[:] = {n: t.clone() for n, t in run.models.vae.state_dict().items()}, []
    settings.stage = "joint"
    run = Run(settings, text, CPU, vae, DIT, start, token_budget=256 * 160)
    run.train(say=say, log_seconds=0)
    assert said[-1]["flow"] < 0.5 * said[0]["flow"]
    run.models.vae.rounding = run.models.dit.rounding = None
    prompts = torch.from_numpy(ids[None, :30].astype(np.int64))
    made = generate(run.models.vae, run.models.dit, prompts, 18, steps=8, guidance=3.0, penalty=1.0)
    assert (made[0] == torch.from_numpy(ids[30:30 + made.shape[1]])).float().mean() > 0.7


# ---- runs

@pytest.mark.parametrize("stage", ["vae", "joint", "ar"])
def test_a_resumed_run_is_the_same_run(text, start, stage, tmp_path):
    start = start if stage == "joint" else None
    whole = run_of(text, stage, start)
    assert whole.train()
    first = run_of(text, stage, start)
    assert not first.train(steps=3, save=tmp_path / "checkpoint.pt")
    second = run_of(text, stage, start)
    second.load(tmp_path / "checkpoint.pt")
    assert second.step == 3 and second.train(save=tmp_path / "checkpoint.pt")
    for (name, a), (_, b) in zip(whole.models.state_dict().items(), second.models.state_dict().items()):
        assert torch.equal(a, b), name
    other = run_of(text, "ar" if stage == "vae" else "vae")
    with pytest.raises(ValueError, match="another stage or shape"):
        other.load(tmp_path / "checkpoint.pt")


def test_batches_depend_on_seed_rank_and_step(text, start):
    run = run_of(text, start=start)

    def drawn(rank, step):
        run.step_of.load(text, rank, step, (64, 4))
        return {n: t.clone() for n, t in run.step_of.batches[64, 4].items()}

    a, b, c, d = drawn(0, 5), drawn(1, 5), drawn(0, 6), drawn(0, 5)
    for name in a:
        assert torch.equal(a[name], d[name])
        assert not torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]), name


# ---- export

def wanted_keys(layers, encoder, decoder):
    """Spec section 1.6."""
    both = lambda *names: [f"{n}.{p}" for n in names for p in ("weight", "bias")]
    dit = both("txt_in.proj", "emb_in.proj_in", "emb_in.proj_hid", "emb_in.proj_out", "txt_out_norm", "txt_out_ada.out_in.1", "txt_out.proj")
    for i in range(layers):
        dit += [f"blocks.{i}.msa.{n}" for n in ("proj_qkv.weight", "proj_out.weight", "rope.rope.freqs")]
        dit += both(*(f"blocks.{i}.{n}" for n in ("msa.norm_q", "msa.norm_k", "mlp.proj_in", "mlp.proj_out", "ada.msa_in.1",
                                                  "ada.msa_out.1", "ada.mlp_in.1", "ada.mlp_out.1")))
    vae = ["encoder.wte.weight"] + both("encoder.patch_embedder", "encoder.final_layer", "decoder.in_layer", "decoder.unpatch_layer",
                                        "decoder.final_norm", "decoder.final_layer")
    for part, count in (("encoder", encoder), ("decoder", decoder)):
        for i in range(count):
            vae += [f"{part}.blocks.{i}.qkv_proj.weight"]
            vae += both(*(f"{part}.blocks.{i}.{n}" for n in ("norm_attn", "q_norm", "k_norm", "attn_out_proj", "norm_ffn",
                                                             "ffn_proj", "ffn_out")))
    return set(vae), set(dit)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_export(tmp_path, kind):
    vae, dit = randomise(TextVae(VAE)), randomise(Dit(DIT))
    write_cola(vae.state_dict(), dit.state_dict(), VAE, DIT, tmp_path, kind)
    tensors = [load_file(tmp_path / f / "model.safetensors") for f in ("cola_vae", "cola_dit")]
    for found, wanted, model in zip(tensors, wanted_keys(2, 1, 2), (vae, dit)):
        assert {n for n in found if not n.endswith("_scale")} == wanted
        shapes = {n: t.shape for n, t in model.state_dict().items()}
        for name, tensor in found.items():
            if name.endswith("_scale"):
                assert found[name.removesuffix("_scale")].dtype == torch.int8 and tensor.shape == shapes[name.removesuffix("_scale")][:1]
            else:
                assert tensor.shape == shapes[name]
    assert tensors[0]["encoder.wte.weight"].shape == (8193, 32)  # the last row is the mask
    config = json.loads((tmp_path / "cola_dit" / "config.json").read_text())
    assert config["model_type"] == "cola_dit" and config["emb_dim"] == config["txt_dim"] == 32
    assert ("quantization_config" in config) == (kind == "int8")
    again = load_cola(tmp_path)
    assert again[0].config == VAE and again[1].config == DIT
    error = {"float32": 0.0, "bfloat16": 1e-2, "int8": 2e-2}[kind]
    for model, back in zip((vae, dit), again):
        for name, tensor in model.state_dict().items():
            assert (back.state_dict()[name] - tensor).abs().max() <= error * tensor.abs().max(), name
    # Written again from what was read, the files are the same.
    write_cola(again[0].state_dict(), again[1].state_dict(), VAE, DIT, tmp_path / "again", kind)
    for found, folder in zip(tensors, ("cola_vae", "cola_dit")):
        for name, tensor in load_file(tmp_path / "again" / folder / "model.safetensors").items():
            assert torch.allclose(tensor.float(), found[name].float(), rtol=1e-6), name


def test_the_official_configuration_has_the_official_size():
    """Parameters of the released model, spec section 1.2, without allocating it."""
    with torch.device("meta"):
        vae = TextVae(VaeConfig(vocab_size=100278, dim=1536, ffn_dim=6144, num_heads=12, encoder_num_blocks=4, decoder_num_blocks=4))
        dit = Dit(DitConfig(txt_dim=2048, heads=16, head_dim=128, num_layers=24, rope_dim=96))
    assert sum(p.numel() for p in vae.parameters()) == 501_871_574
    assert sum(p.numel() for p in dit.parameters()) == 1_829_875_728
    assert len(vae.state_dict()) == 133 and len(dit.state_dict()) == 470


def test_the_commands(data, tmp_path):
    """Both stages, resumed once, exported, evaluated and drawn, from the command line's parser on."""
    import argparse

    from lacuna_train.cola.commands import add
    from lacuna_train.curve import draw

    def command(*words):
        parser = argparse.ArgumentParser()
        add(parser.add_subparsers(required=True))
        args = parser.parse_args([str(w) for w in words])
        args.run(args)

    common = ["--data", data, "--tokens", 128, "--token-budget", 512, "--log-seconds", 0]
    vae = ["--vae", "vocab_size=8192", "dim=32", "ffn_dim=64", "num_heads=2", "latent_dim=4"]
    one, two, model = tmp_path / "one", tmp_path / "two", tmp_path / "model"
    command("cola-train", "--stage", "vae", "--out", one, *common, *vae, "--set", "length=64")
    joint = ["cola-train", "--stage", "joint", "--from", one / "checkpoint.pt", "--out", two, *common, "--set", "length=64",
             "--constant", "short=16", "--dit", "txt_dim=32", "heads=2", "head_dim=16", "num_layers=1", "rope_dim=12",
             "block_size=4", "txt_in_channels=4"]
    command(*joint, "--steps", 2)
    command(*joint)
    log = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    assert [e["resumed_at"] for e in log if "resumed_at" in e] == [0, 2] and log[-1]["finished"]
    command("cola-export", "--source", two / "checkpoint.pt", "--tokenizer", data / "tokenizer", "--out", model)
    with pytest.raises(ValueError, match="no DiT"):
        command("cola-export", "--source", one / "checkpoint.pt", "--tokenizer", data / "tokenizer", "--out", model)
    results = tmp_path / "results.json"
    command("cola-evaluate", "--model", model, "--data", data, "--out", results, "--count", 2, "--prompt", 6, "--new", 8,
            "--rows", 2, "--steps", 1, 2, "--guidance", 1, 3, "--keep-ids", tmp_path / "ids.npz")
    found = json.loads(results.read_text())
    assert len(found["cells"]) == 4 and set(np.load(tmp_path / "ids.npz")) == {"1|1", "2|1", "1|3", "2|3"}
    draw(argparse.Namespace(log=two / "log.jsonl", out=tmp_path / "loss.svg"))
    assert "flow" in (tmp_path / "loss.svg").read_text()


# ---- generation and figures

def test_generation_of_a_batch_is_that_of_each_row():
    vae, dit = randomise(TextVae(VAE)), randomise(Dit(DIT), 1)
    vae.rounding = dit.rounding = None
    ids = torch.randint(8192, (3, 10), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = generate(vae, dit, ids, 10, 3, 2.0, noise=noise)
    assert whole.shape == (3, 10)
    for i in range(3):
        assert torch.equal(generate(vae, dit, ids[i:i + 1], 10, 3, 2.0, noise=noise[:, i:i + 1])[0], whole[i])
    assert generate(vae, dit, ids[:, :0], 5, 1, 2.0).shape == (3, 8)  # no prompt: whole blocks


def test_penalty():
    logits, seen = torch.tensor([2.2, -1.0, 3.0]), torch.tensor([True, True, False])
    assert torch.allclose(penalise(logits, seen, 1.1), torch.tensor([2.0, -1.1, 3.0]))


def test_greedy_continuation_is_the_whole_forward():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16)
    model = randomise(Decoder(config, torch.float32))
    model.rounding = None
    ids = torch.randint(64, (2, 7))
    made = continue_greedily(model, ids, 5)
    whole = torch.cat([ids, made], 1)
    logits = model.logits(model.run(whole)).unflatten(0, (2, -1))
    assert torch.equal(logits[:, 6:-1].argmax(-1), made)


def test_figures():
    found = E.repetition([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12]])
    assert found["repeated_4"] == 1 / 10 and found["distinct_1"] == 12 / 16
    assert E.overlap([[1, 2, 3]], [[1, 2, 4]], 1) == pytest.approx(2 / 3)
    assert E.overlap([[1, 2, 3]], [[1, 2, 4]], 2) == pytest.approx(1 / 2)
    ids = np.random.default_rng(0).integers(4096, size=5000)
    seen = E.Seen(ids, bits=24)
    assert seen.share([ids[100:200].tolist()]) == 1.0
    assert seen.share([np.random.default_rng(1).integers(4096, size=1000).tolist()]) < 0.01


def test_reconstruction_of_a_decoder_that_knows_nothing(data):
    rows = fixed_rows(data / "eval", 2, 64)
    vae = TextVae(VAE)
    found = E.reconstruction(vae, rows, (0.0, 0.5))
    assert set(found) == {0.0, 0.5} and found[0.0] < 0.2
    flow, by_t = E.flow_losses(vae, Dit(DIT), rows, levels=4)
    # The untrained DiT says 0: the error is that of z1 - z0, variances 1 and 1 + sigma^2.
    assert flow == pytest.approx(2 + math.exp(-E.mean_logsnr(vae, rows)), rel=0.15) and len(by_t) == 4
    assert T == 1000.0
