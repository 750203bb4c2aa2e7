import sys
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # for tensors this small, threads that wait for each other cost more than they give

TRAIN = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TRAIN))
ROOT = TRAIN.parent
PROMPTS = ROOT / "presets" / "prompts" / "tasks.json"
TOKENIZER = ROOT / "models" / "base"

from lacuna_train.books import Books, encode_books  # noqa: E402
from lacuna_train.tasks import TaskMaker  # noqa: E402

NAMES = "Alice Bertram Clara Daniel Edith Francis Gerald Helen".split()
WORDS = "the river ran past an old mill and then under a bridge where boys used to fish for trout in summer".split()


def invented_book(seed):
    """Text with paragraphs, sentences and names enough for every task."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for _ in range(400):
        sentences = []
        for _ in range(int(rng.integers(2, 6))):
            words = [WORDS[i] for i in rng.integers(len(WORDS), size=int(rng.integers(14, 24)))]
            words[8] = NAMES[int(rng.integers(len(NAMES)))]
            sentences.append(" ".join(words).capitalize().replace(words[8].lower(), words[8]) + ".")
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """What `prepare` writes, from two invented books and the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "books"
    source.mkdir()
    for i in range(2):
        (source / f"book{i}.txt").write_text(invented_book(i), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_bytes((TOKENIZER / name).read_bytes())
    for split in ("train", "eval"):
        encode_books(source, folder / "tokenizer", folder / split, workers=1)
    return folder


@pytest.fixture(scope="session")
def maker(data):
    return TaskMaker(PROMPTS, data / "tokenizer", Books(data / "eval"))
