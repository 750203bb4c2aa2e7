"""Batches of plain text: rows from random places of the books, the same for a (seed, rank, step) wherever it is drawn.

All ids of the books fit on the device (2 bytes a token), so there are no data workers."""
import numpy as np
import torch

from ..books import Books


class Text:
    def __init__(self, prefix, device):
        ids = np.asarray(Books(prefix).ids)
        self.ids = torch.from_numpy(ids.astype(np.int16)).to(device)  # vocabularies below 32,768
        self.device = device

    def rows(self, rng, rows, length):
        """[rows, length], int64."""
        starts = torch.from_numpy(rng.integers(len(self.ids) - length, size=rows)).to(self.device)
        return self.ids[starts[:, None] + torch.arange(length, device=self.device)].long()


def fixed_rows(prefix, rows, length, start=0):
    """[rows, length] evenly spaced over the books, from `start` tokens in: the same for every model of a tokenizer."""
    ids = np.asarray(Books(prefix).ids)
    if rows * length > len(ids):
        raise ValueError(f"{prefix}: {len(ids)} tokens, fewer than {rows} rows of {length}")
    stride = (len(ids) - length - start) // rows
    return torch.from_numpy(np.stack([ids[start + i * stride:start + i * stride + length] for i in range(rows)]).astype(np.int64))
