import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import PROMPTS

from lacuna_train.evaluate import depths_at, needles_of, score
from lacuna_train.tasks import ANSWER, TASKS_OF_THE_MEAN

TASKS = list(json.loads(PROMPTS.read_text(encoding="utf-8"))["tasks"])


def text_of(maker, ids):
    return maker.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def test_the_mean_is_over_every_task_but_qa():
    assert sorted(TASKS_OF_THE_MEAN) == sorted(set(TASKS) - {"qa"})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split, vary", [("train", 0.0), ("held_out", 0.0), ("train", 1.0)])
def test_pieces_are_the_tokenisation_of_the_whole_text(maker, task, split, vary):
    for seed, length in ((1, 600), (2, 2048)) + (((3, 600), (4, 600), (5, 600), (6, 600)) if vary else ()):
        example = maker.make(task, np.random.default_rng(seed), length, split=split, vary=vary)
        text = text_of(maker, example.ids)
        assert maker.tokenizer.encode(text, add_special_tokens=False).ids == example.ids.tolist()
        prompt = example.prompt()
        assert len(prompt) <= length
        assert len(prompt) >= 0.75 * length
        assert text_of(maker, prompt).endswith(":")


def test_varied_wordings_never_repeat_held_out_ones(maker):
    """Unseen wordings stay unseen: no part that training can draw is a part of a held-out wording."""
    def texts(part):
        return [t for v in part.values() for t in texts(v)] if isinstance(part, dict) else [part]
    for family, wordings in maker.spec["wordings"].items():
        held = {t for w in wordings["held_out"] for t in texts(w)} - {t for w in wordings["train"] for t in texts(w)}
        drawn = {t for seed in range(3000)
                 for t in texts(maker.variations.wording(np.random.default_rng(seed), family))}
        assert len(drawn) > 50
        assert not held & drawn
    held = {s for sentences in maker.spec["noise"]["held_out"] for s in sentences}
    assert not held & set(maker.variations.sentences)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_prompt(maker, task):
    make = lambda seed: maker.make(task, np.random.default_rng(seed), 700).ids.tolist()
    assert make(5) == make(5)
    assert make(5) != make(6)


@pytest.mark.parametrize("task", TASKS)
def test_answers_score_one_and_fit_the_new_tokens(maker, task):
    for seed in range(5):
        example = maker.make(task, np.random.default_rng(seed), 900)
        question = example.questions[0]
        reply = text_of(maker, example.ids[question.answer:question.end])
        assert reply.startswith(" ") and reply.endswith("\n") and reply.count("\n") == 1
        assert score(reply, question.references) == 1.0
        assert score("nothing of the kind", question.references) == 0.0
        assert question.end - question.answer <= maker.tasks[task]["new_tokens"]
        assert (example.classes[question.answer:question.end] == ANSWER).all()


def context_of(maker, example):
    return text_of(maker, example.prompt()).rsplit(" [end]\n\n", 1)[0]


@pytest.mark.parametrize("task", ["single_number_noise", "single_uuid_book", "multikey_16", "needle_haystack", "passkey",
                                  "json_lookup", "multivalue", "multiquery", "variable_tracking"])
def test_every_reference_stands_in_the_context(maker, task):
    for seed in range(5):
        example = maker.make(task, np.random.default_rng(seed), 1200)
        context = context_of(maker, example)
        assert all(context.count(r) >= 1 for r in example.questions[0].references)


def test_values_of_one_key_are_listed_in_the_order_of_the_text(maker):
    for seed in range(10):
        example = maker.make("multivalue", np.random.default_rng(seed), 900)
        context = context_of(maker, example)
        places = [context.index(v) for v in example.questions[0].references]
        assert places == sorted(places) and len(places) == 4


def test_word_counts(maker):
    for length in (600, 1500, 4000):
        example = maker.make("common_words", np.random.default_rng(3), length)
        counts = Counter(re.findall(r"[a-z]+", context_of(maker, example).split("\n\n", 1)[1]))
        top = [w for w, _ in counts.most_common(10)]
        assert sorted(top) == sorted(example.questions[0].references)
        example = maker.make("frequent_words", np.random.default_rng(3), length)
        counts = Counter(re.findall(r"[a-z]+", context_of(maker, example).split("\n\n", 1)[1]))
        assert [w for w, _ in counts.most_common(3)] == example.questions[0].references
        ordered = [n for _, n in counts.most_common(4)]
        assert ordered[2] > ordered[3]


def test_chains_can_be_followed(maker):
    example = maker.make("variable_tracking", np.random.default_rng(4), 900, chains=2, questions=2)
    for question in example.questions:
        assert len(question.references) == 5
    first, second = (set(q.references) for q in example.questions)
    assert not first & second


def test_depths_place_the_needle(maker):
    shares = []
    for depth in (0.0, 0.5, 0.99):
        example = maker.make("single_number_noise", np.random.default_rng(1), 1500, depths=np.array([depth]))
        context = context_of(maker, example)
        shares.append(context.index(example.questions[0].references[0]) / len(context))
    assert shares[0] < 0.1 and 0.4 < shares[1] < 0.6 and shares[2] > 0.9


def test_impossible_requests_end(maker):
    with pytest.raises(ValueError):
        maker.values(np.random.default_rng(0), 3000, "word")
    with pytest.raises(ValueError):
        maker.make("single_number_noise", np.random.default_rng(0), 20)


def test_every_digit_group_is_one_token(maker):
    for text in [f"{i:03d}" for i in range(1000)] + [f"{i:02d}" for i in range(100)]:
        assert len(maker.tokenizer.encode(text, add_special_tokens=False).ids) == 1


def test_distances_place_needles_inside_or_beyond_a_window(maker):
    """As evaluate --distance does it, in tokens before the prompt's end."""
    for task, low, high in (("single_number_book", 0, 300), ("multikey_4", 700, 1500), ("passkey", 0, 300), ("passkey", 700, 1500)):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            depths = depths_at((low, high), 1500, needles_of(maker.tasks[task]), rng)
            example = maker.make(task, rng, 1500, depths=depths)
            prompt = text_of(maker, example.prompt())
            for reference in example.questions[0].references:
                behind = len(maker.encode(prompt[prompt.index(reference):]))
                assert low - 60 <= behind <= high + 150  # needles go between sentences, and the question follows
    assert needles_of(maker.tasks["multivalue"]) == 4 and needles_of(maker.tasks["json_lookup"]) == 0
