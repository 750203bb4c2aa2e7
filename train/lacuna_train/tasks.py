"""Makes prompts of the retrieval tasks that presets/prompts/tasks.json defines.

Everything is built from token ids, piece by piece. Pieces meet only at seams
where the pre-tokeniser splits (before a space, after a cue's colon), so the
pieces in a row are the tokenisation of the whole text; a test holds that.
"""
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .tokenizer import EOS_ID, load_tokenizer
from .variations import Variations

# Loss classes of tokens; mixture.py gives them weights.
HIDDEN, FRAME, TEXT, ANSWER = 0, 1, 2, 3

TASKS_OF_THE_MEAN = (
    "single_number_noise", "single_number_book", "single_word_book", "single_uuid_book", "multikey_4", "multikey_16",
    "passkey", "needle_haystack", "multivalue", "multiquery", "variable_tracking", "json_lookup", "frequent_words",
    "common_words")

PLACEHOLDER = re.compile(r"([ \"]?)\{(\w+)\}")
QA_RUN = re.compile(r"(?<= )[A-Za-z]+(?: [A-Za-z]+)*(?![A-Za-z0-9])")


@dataclass
class Question:
    """Positions in the example's ids: [ask, answer) is the question with its cue, [answer, end) the reply."""
    ask: int
    line_end: int  # the last token of the question's own line
    answer: int
    end: int
    references: list


@dataclass
class Example:
    task: str
    ids: np.ndarray
    classes: np.ndarray
    questions: list = field(default_factory=list)

    def prompt(self):
        return self.ids[:self.questions[0].answer]


class Piece:
    """Token ids with a loss class for each."""
    __slots__ = ("ids", "classes")

    def __init__(self, ids=(), classes=()):
        self.ids = list(ids)
        self.classes = list(classes)

    def add(self, ids, kind):
        self.ids.extend(ids)
        self.classes.extend([kind] * len(ids))
        return self

    def join(self, other):
        self.ids.extend(other.ids)
        self.classes.extend(other.classes)
        return self

    def __len__(self):
        return len(self.ids)


class TaskMaker:
    def __init__(self, spec_path, tokenizer_path, books):
        self.spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.books = books
        self.lists = self.spec["lists"]
        self.tasks = self.spec["tasks"]
        self.variations = Variations(Path(spec_path).with_name("variations.json"), self.spec["wordings"])
        self._cache = {}
        self._parts = {}
        # What stands between {context} and {question}, and between the two lines after it.
        layout = re.fullmatch(r"\{intro\}(.*)\{context\}(.*)\{question\}(.*)\{cue\}", self.spec["layout"], re.DOTALL)
        self._after_intro, self._after_context, self._before_cue = layout.groups()
        self._makers = {"needle": self._needle, "passkey": self._passkey, "variables": self._variables,
                        "json": self._json, "frequent": self._frequent, "common": self._common, "qa": self._qa}

    # -- text to ids -------------------------------------------------------

    def encode(self, text):
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 100_000:
                self._cache[text] = ids
        return ids

    def render(self, template, values, hidden=()):
        """Fills the placeholders; those named in `hidden` get class HIDDEN, the rest FRAME.

        A value may be text or ids that were encoded with their leading space.
        """
        parts = self._parts.get(template)
        if parts is None:
            parts, last = [], 0
            for m in PLACEHOLDER.finditer(template):
                parts.append((template[last:m.start()], m.group(1), m.group(2)))
                last = m.end()
            parts.append((template[last:], "", None))
            self._parts[template] = parts
        piece = Piece()
        for literal, lead, name in parts:
            if literal:
                piece.add(self.encode(literal), FRAME)
            if name is not None:
                value = values[name]
                ids = self._value_ids(lead, value) if isinstance(value, str) else value
                piece.add(ids, HIDDEN if name in hidden else FRAME)
        return piece

    def _value_ids(self, lead, value):
        if value.isdigit():  # a space and every group of three digits are tokens of their own
            ids = list(self.encode(lead)) if lead else []
            for i in range(0, len(value), 3):
                ids += self.encode(value[i:i + 3])
            return ids
        if " " in value and lead:  # a key: its words are cached one by one
            first, *rest = value.split(" ")
            ids = list(self.encode(lead + first))
            for word in rest:
                ids += self.encode(" " + word)
            return ids
        return self.encode(lead + value)

    # -- random pieces -----------------------------------------------------

    def pick(self, rng, items):
        return items[int(rng.integers(len(items)))]

    def distinct(self, rng, count, draw):
        seen = {}
        for _ in range(20 * count + 100):
            if len(seen) == count:
                return list(seen)
            seen[draw()] = True
        raise ValueError(f"cannot draw {count} different items; {len(seen)} found")

    def keys(self, rng, count):
        adjectives, nouns = self.lists["adjectives"], self.lists["nouns"]
        return self.distinct(rng, count, lambda: f"{self.pick(rng, adjectives)} {self.pick(rng, nouns)}")

    def values(self, rng, count, kind):
        spec = self.spec["kinds"][kind]
        if "digits" in spec:
            low = 10 ** (spec["digits"] - 1)
            return self.distinct(rng, count, lambda: str(int(rng.integers(low, 10 * low))))
        if "groups" in spec:
            return self.distinct(rng, count, lambda: "-".join(
                "".join("0123456789abcdef"[d] for d in rng.integers(16, size=n)) for n in spec["groups"]))
        return self.distinct(rng, count, lambda: self.pick(rng, self.lists[spec["list"]]))

    def names(self, rng, count, letters):
        alphabet = self.lists["letters"]
        return self.distinct(rng, count, lambda: "".join(alphabet[i] for i in rng.integers(len(alphabet), size=letters)))

    def listing(self, items):
        return self.spec["separators"]["items"].join(items)

    def listing_of_keys(self, keys):
        """The ids of `a, b, c and d`, with the leading space."""
        ids = []
        for i, key in enumerate(keys):
            if i:
                ids = ids + (self.encode(" and") if i == len(keys) - 1 else self.encode(","))
            ids = ids + self._value_ids(" ", key)
        return ids

    # -- contexts ----------------------------------------------------------

    def book_context(self, rng, budget, needles, depths):
        """A passage with the needles in it: `budget` tokens or a little less."""
        room = budget - sum(len(n) for n in needles)
        for _ in range(200):
            ids, points = self.books.passage(rng, max(room, 1) + 1)
            points = points[points <= room]
            if len(points) and points[-1] >= 0.8 * room - 16 and EOS_ID not in ids:
                break
        else:
            raise ValueError(f"no book passage of {room} tokens with a place for a needle in 200 draws")
        cut = int(points[-1])
        places = points[np.minimum((depths * len(points)).astype(int), len(points) - 1)] if len(needles) else []
        order = np.argsort(depths, kind="stable")  # places rise with depths
        context, last = Piece(), 0
        for i in order:
            context.add(ids[last:places[i]].tolist(), TEXT)
            context.join(needles[i])
            last = int(places[i])
        return context.add(ids[last:cut].tolist(), TEXT)

    def noise_context(self, rng, budget, needles, depths, split):
        sentences = self.variations.noise(rng) if self._vary_noise else self.pick(rng, self.spec["noise"][split])
        room = budget - sum(len(n) for n in needles)
        first = self.encode(sentences[0])
        rest = [self.encode(" " + s) for s in sentences]
        pieces, used = [first], len(first)
        while used + len(rest[len(pieces) % len(rest)]) <= room:
            pieces.append(rest[len(pieces) % len(rest)])
            used += len(pieces[-1])
        places = np.minimum((depths * len(pieces)).astype(int), len(pieces) - 1) + 1
        order = np.argsort(depths, kind="stable")  # places rise with depths
        context, last = Piece(), 0
        for i in order:
            for ids in pieces[last:places[i]]:
                context.add(ids, FRAME)
            context.join(needles[i])
            last = int(places[i])
        for ids in pieces[last:]:
            context.add(ids, FRAME)
        return context

    # -- assembly ----------------------------------------------------------

    def ask(self, wording, values, answer, references):
        """(question, cue, answer, references); `values` fill both lines, the answer gets its space and newline."""
        return (self.render(wording["question"] + self._before_cue, values), self.render(wording["cue"], values),
                answer, references)

    def answer_ids(self, items):
        ids = []
        for i, item in enumerate(items):
            ids = ids + (self.encode(",") if i else []) + self._value_ids(" ", item)
        return ids + self.encode("\n")

    def assemble(self, task, intro, names, asked, context, length, whole):
        """intro, context, questions. `whole`: answers and <|endoftext|> count towards the length."""
        head = self.render(intro + self._after_intro, names)
        mark = self.encode(self._after_context)
        tail = len(mark) + sum(len(q) + len(c) for q, c, _, _ in asked)
        if whole:
            tail += sum(len(a) for _, _, a, _ in asked) + 1
        budget = length - len(head) - tail
        if budget < 16:
            raise ValueError(f"{task}: a length of {length} tokens leaves {budget} for the context")
        out = Piece().join(head).join(context(budget)).add(mark, FRAME)
        questions = []
        for question, cue, answer, references in asked:
            ask = len(out)
            out.join(question)
            line_end = len(out) - 1
            out.join(cue)
            start = len(out)
            out.add(answer, ANSWER)
            questions.append(Question(ask, line_end, start, len(out), references))
        out.add([EOS_ID], FRAME)
        return Example(task, np.array(out.ids, np.uint16), np.array(out.classes, np.uint8), questions)

    def make(self, task, rng, length, split="train", questions=1, whole=False, depths=None, vary=0.0, **changes):
        """An example of `task`; `changes` replace fields of its definition (training varies them).

        `vary`: how often the wording, and the noise, are put together from parts instead of taken from the lists.
        """
        spec = {**self.tasks[task], **changes}
        if vary and rng.random() < vary:
            wording = self.variations.wording(rng, spec["wording"])
        else:
            wording = self.pick(rng, self.spec["wordings"][spec["wording"]][split])
        self._vary_noise = vary and rng.random() < vary
        return self._makers[spec["wording"]](task, spec, wording, rng, length, split, questions, whole, depths)

    # -- the tasks ---------------------------------------------------------

    def _names_of(self, kind):
        spec = self.spec["kinds"][kind]
        return {"kind": spec["name"], "kinds": spec["plural"]}

    def _needle(self, task, spec, wording, rng, length, split, questions, whole, depths):
        names = self._names_of(spec["kind"])
        fill = spec["keys"] == "fill"
        count = max(questions, 1) if fill else spec["keys"]
        per_key = spec["values"]
        # Filling needs spare keys and values: a needle is never shorter than 8 tokens.
        total = length // 8 + count if fill else count
        keys = self.keys(rng, total)
        values = self.values(rng, total * per_key, spec["kind"])
        template = " " + wording["needle"]

        def needle(key, value):
            return self.render(template, {**names, "key": key, "value": value}, hidden=("value",))

        needles = [needle(keys[i // per_key], values[i]) for i in range(count * per_key)]
        if depths is None:
            depths = rng.random(len(needles))
        order = np.argsort(depths, kind="stable")
        held = {}
        for i in order:  # the values of a key in the order of the text
            held.setdefault(keys[i // per_key], []).append(values[i])
        asked, form = [], wording[spec["ask"]]
        if spec["ask"] == "keys":
            for _ in range(questions):
                group = [keys[i] for i in rng.permutation(count)[:spec["queries"]]]
                answer = [held[k][0] for k in group]
                asked.append(self.ask(form, {**names, "keys": self.listing_of_keys(group)}, self.answer_ids(answer), answer))
        else:
            for i in rng.permutation(count)[:questions]:
                answer = held[keys[i]]
                asked.append(self.ask(form, {**names, "key": keys[i], "count": self.spec["count_words"][per_key]},
                                      self.answer_ids(answer), answer))

        def context(budget):
            if spec["context"] == "noise":
                return self.noise_context(rng, budget, needles, depths, split)
            if not fill:
                return self.book_context(rng, budget, needles, depths)
            # Four tokens are spare: the first sentence has no space before it and may tokenise longer.
            entries, used = list(needles), sum(len(n) for n in needles) + 4
            for key, value in zip(keys[count:], values[count:]):
                entry = needle(key, value)
                if used + len(entry) > budget:
                    break
                entries.append(entry)
                used += len(entry)
            out = Piece()
            for n, i in enumerate(rng.permutation(len(entries))):
                if n == 0:
                    fields = {**names, "key": keys[i], "value": values[i]}
                    out.join(self.render(wording["needle"], fields, hidden=("value",)))
                else:
                    out.join(entries[i])
            return out

        return self.assemble(task, wording["intro"], names, asked, context, length, whole)

    def _passkey(self, task, spec, wording, rng, length, split, questions, whole, depths):
        value = self.values(rng, 1, spec["kind"])[0]
        needle = self.render(" " + wording["needle"], {"value": value}, hidden=("value",))
        depths = rng.random(1) if depths is None else depths
        asked = [self.ask(wording, {}, self.answer_ids([value]), [value])]

        def context(budget):
            if spec["context"] == "book":
                return self.book_context(rng, budget, [needle], depths)
            return self.noise_context(rng, budget, [needle], depths, split)

        return self.assemble(task, wording["intro"], {}, asked, context, length, whole)

    def _variables(self, task, spec, wording, rng, length, split, questions, whole, depths):
        size = spec["hops"] + 1
        names = self.names(rng, spec["chains"] * size, spec["letters"])
        values = self.values(rng, spec["chains"], spec["kind"])
        needles, depth_list, asked = [], [], []
        for chain, value in enumerate(values):
            own = names[chain * size:(chain + 1) * size]
            for i, name in enumerate(own):
                fields = {"name": name, "value": value, "previous": own[i - 1]}
                needles.append(self.render(" " + wording["next" if i else "first"], fields,
                                           hidden=("value", "name") if not i else ("name",)))
            depth_list.append(np.sort(rng.random(size)))
            asked.append(self.ask(wording, {"value": value, "count": self.spec["count_words"][size]},
                                  self.answer_ids(own), own))
        depths = np.concatenate(depth_list) if depths is None else depths
        asked = [asked[i] for i in rng.permutation(len(asked))[:questions]]

        def context(budget):
            if spec["context"] == "book":
                return self.book_context(rng, budget, needles, depths)
            return self.noise_context(rng, budget, needles, depths, split)

        return self.assemble(task, wording["intro"], {}, asked, context, length, whole)

    def _json(self, task, spec, wording, rng, length, split, questions, whole, depths):
        names = self._names_of(spec["kind"])
        total = length // 8 + questions
        keys, values = self.keys(rng, total), self.values(rng, total, spec["kind"])

        def entry(i):
            return self.render('"{key}": {value}', {"key": keys[i], "value": values[i]}, hidden=("value",))

        asked = [self.ask(wording, {**names, "key": keys[i]},
                          self.answer_ids([values[i]]), [values[i]]) for i in range(questions)]

        def context(budget):
            opening, comma, closing = self.encode("{\n"), self.encode(",\n"), self.encode("\n") + self.encode("}")
            used = len(opening) + len(closing)
            entries = []
            for i in range(total):
                item = entry(i)
                used += len(item) + (len(comma) if entries else 0)
                if used > budget and i >= questions:
                    break
                entries.append(item)
            out = Piece().add(opening, FRAME)
            for n, i in enumerate(rng.permutation(len(entries))):
                if n:
                    out.add(comma, FRAME)
                out.join(entries[i])
            return out.add(closing, FRAME)

        return self.assemble(task, wording["intro"], names, asked, context, length, whole)

    def _shuffled_words(self, rng, words, counts, separator):
        bag = np.repeat(np.arange(len(counts)), counts)
        rng.shuffle(bag)
        mark = self.encode(separator) if separator else []
        later = [mark + self.encode(" " + w) for w in words]
        out = Piece().add(self.encode(words[bag[0]]), FRAME)
        for i in bag[1:]:
            out.add(later[i], HIDDEN)
        return out

    def _largest(self, budget, cost):
        """The largest n with cost(n) <= budget; cost grows with n."""
        low, high = 1, budget
        while low < high:
            middle = (low + high + 1) // 2
            if cost(middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def _frequent(self, task, spec, wording, rng, length, split, questions, whole, depths):
        words = self.values(rng, spec["words"], "word")
        answers = spec["answers"]
        sizes = np.array([len(self.encode(" " + w)) for w in words])
        ranks = np.arange(1, len(words) + 1) ** -float(spec["exponent"])

        def counts(n):
            c = np.maximum(1, np.rint(n * ranks / ranks.sum())).astype(int)
            if c[answers - 1] == c[answers]:
                c[answers - 1] += 1
            return c

        fields = {"count": self.spec["count_words"][answers]}
        asked = [self.ask(wording, fields, self.answer_ids(words[:answers]), words[:answers])]

        def context(budget):
            n = self._largest(budget - 4, lambda n: int((counts(n) * sizes).sum()))
            return self._shuffled_words(rng, words, counts(n), "")

        return self.assemble(task, wording["intro"], {}, asked, context, length, whole)

    def _common(self, task, spec, wording, rng, length, split, questions, whole, depths):
        common, often, seldom = spec["common"], spec["common_count"], spec["uncommon_count"]
        words = self.values(rng, common + spec["uncommon_most"], "word")
        sizes = np.array([len(self.encode(" " + w)) + 1 for w in words])

        def counts(n):
            unit = math.ceil(n / (common * often + spec["uncommon_most"] * seldom))
            each = max(seldom * unit + 1, min(often * unit, int(0.75 * n) // common))
            others = max(1, (n - each * common) // (seldom * unit))
            return np.array([each] * common + [seldom * unit] * min(others, spec["uncommon_most"]))

        fields = {"count": self.spec["count_words"][common]}
        answer = [words[i] for i in rng.permutation(common)]
        asked = [self.ask(wording, fields, self.answer_ids(answer), answer)]

        def context(budget):
            def cost(n):
                c = counts(n)
                return int((c * sizes[:len(c)]).sum())
            n = self._largest(budget - 4, cost)
            return self._shuffled_words(rng, words, counts(n), ",")

        return self.assemble(task, wording["intro"], {}, asked, context, length, whole)

    def qa_places(self, text, before, after, names_only):
        """(start, words) of every run of before + 1 + after words around a gap that may be asked for."""
        places = []
        for run in QA_RUN.finditer(text):
            words = run.group().split(" ")
            for gap in range(before, len(words) - after):
                word, left = words[gap], words[gap - 1]
                good = (re.fullmatch(r"[A-Z][a-z]{2,}", word) and left[0].islower()) if names_only else len(word) >= 3
                if good:
                    places.append(words[gap - before:gap + after + 1])
        return places

    def _qa(self, task, spec, wording, rng, length, split, questions, whole, depths):
        before, after = spec["before"], spec["after"]
        reserve = 90 * questions + 60
        for _ in range(200):
            ids, points = self.books.passage(rng, length)
            points = points[points <= length - reserve]
            if not len(points) or points[-1] < 0.8 * (length - reserve) - 16 or EOS_ID in ids:
                continue
            # A stretch of the passage is enough to find gaps in; decoding all of it is slow.
            stretch = int(points[-1]) if whole is False else min(int(points[-1]), 1500)
            start = int(rng.integers(int(points[-1]) - stretch + 1))
            text = self.tokenizer.decode(ids[start:start + stretch].tolist(), skip_special_tokens=False)
            places = self.qa_places(text, before, after, spec.get("names_only", True))
            if places:
                break
        else:
            raise ValueError(f"no gap to ask for in 200 passages of {length} tokens")
        asked = []
        for i in rng.permutation(len(places))[:questions]:
            words = places[i]
            asked.append(self.ask(wording, {"before": " ".join(words[:before]), "after": " ".join(words[before + 1:])},
                                  self.answer_ids([words[before]]), [words[before]]))

        def context(budget):
            return Piece().add(ids[:int(points[points <= budget][-1])].tolist(), TEXT)

        return self.assemble(task, wording["intro"], {}, asked, context, length, whole)
