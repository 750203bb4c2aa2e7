"""Books on disk and their token ids in memory.

`prepare` writes, for each split, one uint16 file of token ids (every book ends
with <|endoftext|>) and one uint8 file of flags of the same length:
bit 0, a sentence of a context may be inserted before this token;
bit 1, a book or a paragraph starts here, so a passage may begin here.
"""
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .tokenizer import EOS_ID, load_tokenizer

CAN_INSERT = 1
CAN_START = 2

_tokenizer = None


def read_books(source):
    """Yields (name, text) from a .tar.xz or a folder of .txt files, sorted by name."""
    source = Path(source)
    if source.is_dir():
        for path in sorted(source.rglob("*.txt")):
            yield path.name, clean(path.read_text(encoding="utf-8", errors="replace"))
        return
    with tarfile.open(source) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".txt")), key=lambda m: m.name)
        for member in members:
            raw = archive.extractfile(member).read()
            yield Path(member.name).name, clean(raw.decode("utf-8", errors="replace"))


def clean(text):
    """Byte order marks are litter of the scans; line ends become \\n; at most one blank line."""
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def flag_tables(tokenizer):
    """Per vocabulary entry: ends a sentence, starts with a space and a capital, ends a paragraph."""
    size = tokenizer.get_vocab_size()
    ends = np.zeros(size, bool)
    opens = np.zeros(size, bool)
    breaks = np.zeros(size, bool)
    for token in range(size):
        text = tokenizer.decode([token], skip_special_tokens=False)
        ends[token] = bool(re.search(r"[.!?][\"”’']?$", text))
        opens[token] = bool(re.match(r" [A-Z]", text))
        breaks[token] = text.endswith("\n\n")
    breaks[EOS_ID] = True
    return ends, opens, breaks


def flags_of(ids, tables):
    ends, opens, breaks = tables
    flags = np.zeros(len(ids), np.uint8)
    flags[1:] |= (ends[ids[:-1]] & opens[ids[1:]]).astype(np.uint8) * CAN_INSERT
    flags[1:] |= breaks[ids[:-1]].astype(np.uint8) * CAN_START
    flags[0] |= CAN_START
    return flags


def _start_worker(tokenizer_path):
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer_path)


def _encode(text):
    return np.array(_tokenizer.encode(text, add_special_tokens=False).ids + [EOS_ID], np.uint16)


def encode_books(source, tokenizer_path, out_prefix, workers):
    """Tokenises every book of `source` and writes `out_prefix`.ids and .flags."""
    tables = flag_tables(load_tokenizer(tokenizer_path))
    total = 0
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(str(tokenizer_path),)) as pool, \
            open(f"{out_prefix}.ids", "wb") as ids_file, open(f"{out_prefix}.flags", "wb") as flags_file:
        for ids in pool.map(_encode, (text for _, text in read_books(source))):
            ids_file.write(ids.tobytes())
            flags_file.write(flags_of(ids.astype(np.int64), tables).tobytes())
            total += len(ids)
    return total


class Books:
    """Read-only view of the files that encode_books wrote; cheap to open in every data worker."""

    def __init__(self, prefix):
        self.ids = np.memmap(f"{prefix}.ids", np.uint16, "r")
        self.flags = np.memmap(f"{prefix}.flags", np.uint8, "r")
        if len(self.ids) != len(self.flags):
            raise ValueError(f"{prefix}: {len(self.ids)} token ids but {len(self.flags)} flags; run prepare again")
        self.starts = np.flatnonzero(self.flags & CAN_START)

    def passage(self, rng, length):
        """At most `length` tokens from a random paragraph start, and the insertion points in them."""
        latest = np.searchsorted(self.starts, len(self.ids) - length)
        if latest < 1:
            raise ValueError(f"the books hold {len(self.ids)} tokens, fewer than the passage of {length} asked for")
        start = int(self.starts[rng.integers(latest)])
        ids = np.asarray(self.ids[start:start + length])
        points = np.flatnonzero(self.flags[start:start + length] & CAN_INSERT)
        return ids, points
