"""Byte-level BPE in the OLMo 2 pre-tokenisation, trained on the books.

Digits are grouped by one to three and every such group starts out as bytes;
`train_tokenizer` makes all groups of digits single tokens, so a number of seven
digits is always three tokens.
"""
import json
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
EOS_ID = 0
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def empty_tokenizer(model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def digit_merges():
    """Merges that turn every group of two or three digits into one token.

    Which pair of three digits merges first depends on the pairs' ranks, so both
    ways to a triple are listed: ab+c and a+bc.
    """
    pairs = list(product("0123456789", repeat=2))
    triples = list(product("0123456789", repeat=3))
    return pairs + [(a + b, c) for a, b, c in triples] + [(a, b + c) for a, b, c in triples]


def train_tokenizer(texts, vocab_size, path, max_position, digit_groups=True):
    """Trains on an iterable of texts and writes tokenizer.json and tokenizer_config.json.

    Without `digit_groups` every digit is a token of its own: the 1,100 entries go to words."""
    digits = digit_merges() if digit_groups else []
    base = empty_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    base.train_from_iterator(texts, trainer)
    learnt = json.loads(base.to_str())["model"]

    # Years and chapter numbers teach some digit merges; all of them come first
    # here, and the least frequent word merges make room for those not learnt.
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    merges = digits + [m for m in merges if not (m[0] + m[1]).isdigit()]
    vocab = {EOS: EOS_ID}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    kept = []
    for left, right in merges:
        if len(vocab) == vocab_size:
            break
        if left in vocab and right in vocab:
            kept.append((left, right))
            vocab.setdefault(left + right, len(vocab))
    tokenizer = empty_tokenizer(models.BPE(vocab, kept))
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    spec = json.loads(tokenizer.to_str())
    # One string a merge is the older spelling: half the size, read by every version.
    spec["model"]["merges"] = [f"{left} {right}" for left, right in kept]
    (path / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS, "bos_token": None,
        "unk_token": None, "add_bos_token": False, "model_max_length": max_position,
        "clean_up_tokenization_spaces": False}, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def load_tokenizer(path):
    path = Path(path)
    return Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
