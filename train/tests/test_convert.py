import struct

import numpy as np
import pytest
from conftest import TRAIN  # noqa: F401

from convert_llama2c import halves, read_llama2c

DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, LENGTH = 8, 12, 2, 2, 1, 20, 16


def write_bin(path, vocab=VOCAB, extra=0):
    head = DIM // HEADS
    sizes = [VOCAB * DIM, LAYERS * DIM, LAYERS * DIM * DIM, LAYERS * KV * head * DIM, LAYERS * KV * head * DIM,
             LAYERS * DIM * DIM, LAYERS * DIM, LAYERS * HIDDEN * DIM, LAYERS * DIM * HIDDEN, LAYERS * HIDDEN * DIM, DIM,
             LENGTH * head]
    if vocab < 0:
        sizes.append(VOCAB * DIM)
    values = np.arange(sum(sizes) + extra, dtype="<f4")
    path.write_bytes(struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, vocab, LENGTH) + values.tobytes())


@pytest.mark.parametrize("vocab", [VOCAB, -VOCAB])
def test_read(tmp_path, vocab):
    write_bin(tmp_path / "m.bin", vocab)
    config, tensors = read_llama2c(tmp_path / "m.bin")
    assert config["tie_word_embeddings"] == (vocab > 0) and ("lm_head.weight" in tensors) == (vocab < 0)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (DIM, HIDDEN)
    assert tensors["model.embed_tokens.weight"][0, 1] == 1


def test_rows_of_a_head_go_from_pairs_to_halves():
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four
    assert halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "m.bin"
    write_bin(path, extra=3 if damage == "long" else 0)
    raw = path.read_bytes()
    path.write_bytes({"short": raw[:-4], "long": raw, "header": struct.pack("<i", 7) + raw[4:], "empty": b""}[damage])
    with pytest.raises(ValueError, match="m.bin"):
        read_llama2c(path)
