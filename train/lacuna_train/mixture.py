"""What the model trains on: documents, rows of documents, and their loss weights.

Documents are packed into rows and separated by <|endoftext|>; attention is not
cut between them, so a row's earlier documents are one more distraction.
"""
import numpy as np

from .tasks import ANSWER, FRAME, HIDDEN, TEXT
from .tokenizer import EOS_ID

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

# Share of documents. Retrieval forms on dense lists of keys and values, so those
# come more often at first (EARLY, until that share of the run).
MIX = {"plain": 14, "single": 9, "multikey": 9, "needle_haystack": 10, "multivalue": 10, "multiquery": 7,
       "variables": 13, "json": 9, "common": 8, "frequent": 5, "passkey": 2, "qa": 4}
EARLY = 0.1
EARLY_FACTOR = {"needle_haystack": 2.5, "json": 3.5, "variables": 0.5, "common": 0.5}

# Longest length so far, by share of the run; from then on it takes LONGEST_SHARE of the tokens.
STAGES = ((0.10, 512), (0.15, 1024), (0.25, 2048), (0.46, 4096), (0.74, 8192), (1.01, 16384))
LONGEST_SHARE = {512: 1.0, 1024: 0.6, 2048: 0.5, 4096: 0.45, 8192: 0.4, 16384: 0.27}

# Steps that train for eviction (see evict.py): from this share of the run on, so many of all steps.
EVICT_FROM, EVICT_SHARE = 0.50, 0.12
LOOK_WEIGHT = 0.1  # of the look-ahead loss

VARY = 0.6  # of the task documents: wordings put together from parts (variations.py)

WEIGHT_FRAME = 0.1
ANSWER_SHARE = 0.4  # of the weight of everything else in the batch
ANSWER_CAP = 40.0

LOOK_SLOTS, LOOK_TOKENS = 512, 32
REPLY_TOKENS = 48  # replies of eviction steps are cut to this; the longest task's is 36


def longest_length(progress):
    return next(length for until, length in STAGES if progress < until)


def draw_step(rng, progress, longest_allowed=LENGTHS[-1], evict_share=EVICT_SHARE):
    """(kind, row length) of a step at this share of the run."""
    longest = min(longest_length(progress), longest_allowed)
    shorter = [n for n in LENGTHS if n < longest]
    if not shorter or rng.random() < LONGEST_SHARE[longest]:
        length = longest
    else:
        # The longer of the rest more often: 4k and 8k are what most users have.
        weights = np.arange(1, len(shorter) + 1, dtype=float)
        length = shorter[int(rng.choice(len(shorter), p=weights / weights.sum()))]
    evict = progress >= EVICT_FROM and length >= 1024 and rng.random() < evict_share
    return ("evict" if evict else "pack"), length


class Mixture:
    def __init__(self, maker, books):
        self.maker, self.books = maker, books
        probe = maker.encode
        self.separators = set(probe(",") + probe(" ") + probe("\n") + probe("-"))

    # -- documents ---------------------------------------------------------

    def plain(self, rng, size):
        ids, _ = self.books.passage(rng, size)
        classes = np.full(len(ids), TEXT, np.uint8)
        return ids, classes, []

    def draw(self, rng, size, progress, single_question):
        """(task name, changes of its definition, questions)."""
        weights = dict(MIX)
        if progress < EARLY:
            weights = {k: w * EARLY_FACTOR.get(k, 1.0) for k, w in weights.items()}
        names = list(weights)
        p = np.array([weights[n] for n in names], float)
        if single_question:
            p[names.index("plain")] = 0.0
        name = names[int(rng.choice(len(names), p=p / p.sum()))]
        most = max(1, min(12 if progress < EARLY or size >= 4096 else 6, size // 150))
        questions = 1 if single_question else int(rng.integers(1, most + 1))
        kind = str(rng.choice(["number", "word", "uuid"], p=[0.66, 0.1, 0.24]))
        context = str(rng.choice(["book", "noise"], p=[0.6, 0.4]))
        room = max(1, size // (80 if kind == "uuid" else 50))
        n = lambda low, high: int(rng.integers(low, max(low, high) + 1))
        if name == "single":
            return "single_number_book", {"kind": kind, "context": context}, 1
        if name == "multikey":
            keys = min(n(2, 24), room)
            return "multikey_4", {"keys": keys, "kind": kind, "context": context}, min(questions, keys)
        if name == "needle_haystack":
            # There are fewer words than needles in a long haystack.
            return "needle_haystack", {"kind": "uuid" if kind == "uuid" else "number"}, questions
        if name == "multivalue":
            values = 4 if rng.random() < 0.4 else n(2, 6)
            keys = max(1, min(n(1, 3), room // values))
            kind = "number" if rng.random() < 0.7 else "word"
            return "multivalue", {"keys": keys, "values": values, "kind": kind, "context": context}, min(questions, keys)
        if name == "multiquery":
            keys = max(2, min(4 if rng.random() < 0.4 else n(2, 8), room))
            kind = "number" if rng.random() < 0.8 else "word"
            queries = min(keys, 4 if rng.random() < 0.6 else n(2, 4))
            return "multiquery", {"keys": keys, "queries": queries, "kind": kind, "context": context}, min(questions, 3)
        if name == "variables":
            chains = n(1, 3) if size >= 512 and rng.random() < 0.5 else 1
            hops = 4 if rng.random() < 0.5 else n(1, 6)
            context = str(rng.choice(["noise", "book"], p=[0.75, 0.25]))
            return "variable_tracking", {"chains": chains, "hops": hops, "context": context}, min(questions, chains)
        if name == "json":
            return "json_lookup", {}, questions
        if name == "frequent":
            standard = rng.random() < 0.6
            return "frequent_words", {} if standard else {
                "words": n(12, 50), "exponent": float(rng.uniform(1.3, 2.5)), "answers": n(1, 5)}, 1
        if name == "common":
            standard = rng.random() < 0.6
            return "common_words", {} if standard else {
                "common": n(2, 10), "common_count": n(10, 30), "uncommon_count": n(1, 4)}, 1
        if name == "passkey":
            return "passkey", {"context": context}, 1
        if name == "qa":
            return "qa", {"names_only": bool(rng.random() < 0.4), "before": n(5, 8), "after": n(2, 4)}, min(questions, 4)
        return "plain", {}, 0

    def document(self, rng, size, progress, single_question=False):
        """ids, loss classes and questions of one document of about `size` tokens."""
        if size >= 384 or single_question:
            for _ in range(8):
                task, changes, questions = self.draw(rng, size, progress, single_question)
                if task == "plain":
                    break
                try:
                    example = self.maker.make(task, rng, size, questions=questions,
                                              whole=not single_question, vary=VARY, **changes)
                except ValueError:
                    continue  # this draw does not fit this size, or its passage has no gap to ask for
                classes = example.classes
                classes[classes == TEXT] = FRAME  # the books' share of the loss comes from plain documents
                return example.ids, classes, example.questions
        return self.plain(rng, size)

    # -- rows --------------------------------------------------------------

    def sizes(self, rng, length):
        if length < 1024 or rng.random() < 0.6:
            return [length]
        count = int(rng.integers(2, 5))
        parts = rng.dirichlet(np.full(count, 2.0)) * length
        return [max(int(x), 300) for x in parts]

    def packed_row(self, rng, length, progress):
        ids, classes, looks, used = [], [], [], 0
        sizes = self.sizes(rng, length)
        while used < length + 1:
            size = min(sizes.pop(0) if sizes else length, length + 1 - used)
            doc, kinds, questions = self.document(rng, size, progress)
            looks += [(used, q, doc) for q in questions]
            ids.append(doc)
            classes.append(kinds)
            used += len(doc)
        return np.concatenate(ids)[:length + 1], np.concatenate(classes)[:length + 1], looks

    def evict_row(self, rng, length, progress):
        """A row whose prompt ends at its last token; the reply is apart."""
        size = length if rng.random() < 0.5 else int(rng.integers(length // 2, length + 1))
        doc, kinds, questions = self.document(rng, size, progress, single_question=True)
        while not questions or questions[0].answer > length:  # nothing fitted, so it is plain text
            doc, kinds, questions = self.document(rng, size, progress, single_question=True)
        question = questions[0]
        prompt, reply = doc[:question.answer], doc[question.answer:question.end]
        fill = length - len(prompt)
        ids, classes = prompt, kinds[:question.answer]
        if fill:
            before, before_kinds, _ = self.plain(rng, fill)
            before = before.copy()
            before[-1] = EOS_ID
            ids, classes = np.concatenate([before, ids]), np.concatenate([before_kinds, classes])
        ids = np.append(ids, reply[:1])
        classes = np.append(classes, np.uint8(ANSWER))
        return ids, classes, [(fill, question, doc)], reply

    # -- batches -----------------------------------------------------------

    def fill(self, out, rng, kind, length, progress):
        """Writes a batch into the arrays of `out` (see feed.slot_arrays)."""
        tokens = len(out["ids"])
        rows = tokens // length
        ids, targets, classes = (out[k].reshape(rows, length) for k in ("ids", "targets", "classes"))
        slots = []
        for row in range(rows):
            if kind == "evict":
                row_ids, row_classes, looks, reply = self.evict_row(rng, length, progress)
                self._write_reply(out, row, reply)
            else:
                row_ids, row_classes, looks = self.packed_row(rng, length, progress)
            ids[row], targets[row] = row_ids[:-1], row_ids[1:]
            classes[row] = row_classes[1:]
            slots += [(row, base, q, doc) for base, q, doc in looks]
        self._weigh(out)
        self._write_looks(out, rng, slots, length)

    def _weigh(self, out):
        classes = out["classes"]
        table = np.zeros(4)
        table[[HIDDEN, FRAME, TEXT, ANSWER]] = 0.0, WEIGHT_FRAME, 1.0, 0.0
        weights = table[classes]
        answers = classes == ANSWER
        count = int(answers.sum())
        if count:
            weights[answers] = min(ANSWER_CAP, max(1.0, ANSWER_SHARE * weights.sum() / count))
        out["weights"][:] = weights / max(weights.sum(), 1e-9)

    def _write_reply(self, out, row, reply):
        reply = reply[:REPLY_TOKENS]
        n = len(reply) - 1
        if row == 0:
            for name in ("reply_ids", "reply_targets", "reply_weights"):
                out[name][:] = 0
        out["reply_ids"][row, :n + 1] = reply
        out["reply_targets"][row, :n] = reply[1:]
        out["reply_weights"][row, :n] = 1.0

    def _write_looks(self, out, rng, slots, length):
        """Two places per question, the end of its line and of its cue, each with the answer's tokens."""
        out["look_at"][:], out["look_ids"][:], out["look_weights"][:] = 0, 0, 0
        places = []
        for row, base, question, doc in slots:
            wanted = [t for t in dict.fromkeys(doc[question.answer:question.end].tolist()) if t not in self.separators]
            for place in (question.line_end, question.answer - 1):
                if wanted and base + place < length:
                    places.append((row * length + base + place, wanted[:LOOK_TOKENS]))
        if len(places) > LOOK_SLOTS:
            places = [places[i] for i in rng.permutation(len(places))[:LOOK_SLOTS]]
        for slot, (place, wanted) in enumerate(places):
            out["look_at"][slot] = place
            out["look_ids"][slot, :len(wanted)] = wanted
            out["look_weights"][slot, :len(wanted)] = 1.0 / (len(wanted) * len(places))
