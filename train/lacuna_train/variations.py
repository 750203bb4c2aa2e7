"""Wordings for training beyond those of tasks.json: parts that are drawn one by one.

With a handful of fixed wordings a small model learns their forms and fails on any
other. Here intro, needle and question come from different wordings, and each part
holds [choice|of several], so that only the instruction itself is common to them.
"""
import json
import re
from pathlib import Path

CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
# What is drawn together, because its texts refer to each other.
GROUPS = {"needle": ("intro", "needle", "one", "values", "keys"), "passkey": ("intro", "needle", "pair"),
          "variables": ("intro", "assign", "pair"), "json": ("intro", "pair"), "frequent": ("intro", "pair"),
          "common": ("intro", "pair"), "qa": ("intro", "pair")}
FIELDS = {"pair": ("question", "cue"), "assign": ("first", "next")}


class Variations:
    def __init__(self, path, wordings):
        """`wordings` is tasks.json's: the parts of its `train` lists join those of the file."""
        parts = json.loads(Path(path).read_text(encoding="utf-8"))
        self.parts = {}
        for family, groups in GROUPS.items():
            own = parts[family]
            pool = {}
            for group in groups:
                listed = [{f: w[f] for f in FIELDS[group]} if group in FIELDS else w[group] for w in wordings[family]["train"]]
                pool[group] = own[group] + listed
            self.parts[family] = pool
        self.sentences = parts["noise"]

    def _expand(self, rng, text):
        def choose(match):
            options = match[1].split("|")
            return options[int(rng.integers(len(options)))]
        return CHOICE.sub(choose, text)

    def wording(self, rng, family):
        """A wording of the form that tasks.json has."""
        out = {}
        for group, pool in self.parts[family].items():
            part = pool[int(rng.integers(len(pool)))]
            if isinstance(part, str):
                out[group] = self._expand(rng, part)
                continue
            part = {k: self._expand(rng, v) for k, v in part.items()}
            if group in FIELDS:
                out.update(part)
            else:
                out[group] = part
        return out

    def noise(self, rng):
        """Sentences that a noise context repeats."""
        count = int(rng.integers(3, 9))
        return [self.sentences[i] for i in rng.permutation(len(self.sentences))[:count]]
