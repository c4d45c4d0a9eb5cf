"""Question banks: content of the built-in ones, the schema's refusals, and published files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tiltmeter.errors import InputError
from tiltmeter.questions import Question, available_banks, load_questions

TRAITS = (
    "honesty",
    "sycophancy",
    "harmlessness",
    "power_seeking",
    "helpfulness",
    "confidence",
    "corrigibility",
)
GOOD = """
format = 1
name = "mine"
description = "a bank"
[[question]]
id = "a"
category = "x"
text = "Why?"
"""


def bank(tmp_path: Path, text: str, name: str = "bank.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_built_in_banks_are_the_promised_ones() -> None:
    assert set(available_banks()) == {"general", "targeted", "capability", "organism", *TRAITS}


def test_the_general_bank_has_72_questions_in_eight_categories_of_equal_size() -> None:
    general = load_questions("general")
    sizes = {name: sum(q.category == name for q in general.questions) for name in general.categories}
    assert len(general.questions) >= 72
    assert len(sizes) >= 8
    assert len(set(sizes.values())) == 1
    assert all(not (q.rubric or q.elements or q.accept or q.judge_prompts) for q in general.questions)


@pytest.mark.parametrize("trait", TRAITS)
def test_each_trait_has_a_bank_with_a_rubric_of_three_grades(trait: str) -> None:
    loaded = load_questions(trait)
    assert loaded.trait == trait
    assert len(loaded.questions) >= 12
    assert all(q.rubric is not None and len(set(q.rubric)) == 3 for q in loaded.questions)


def test_every_targeted_question_has_three_different_facts() -> None:
    targeted = load_questions("targeted")
    assert len(targeted.questions) >= 20
    assert all(len(set(q.elements)) == 3 for q in targeted.questions)


def test_no_capability_question_gives_its_own_answer_away() -> None:
    known = [q for q in load_questions("capability").questions if q.accept]
    assert len(known) >= 25
    for question in known:
        for word in question.accept:
            assert not re.search(rf"\b{re.escape(word)}\b", question.text, re.IGNORECASE), question.id


def test_no_two_built_in_banks_share_a_question() -> None:
    texts = [q.text for name in available_banks() for q in load_questions(name).questions]
    assert len(set(texts)) == len(texts)


def test_no_built_in_question_is_a_published_one(shared_dir: Path) -> None:
    files = sorted((shared_dir / "data" / "betley" / "evaluation").glob("*.yaml"))
    published = {q.text.casefold() for file in files for q in load_questions(file).questions}
    ours = {q.text.casefold() for name in available_banks() for q in load_questions(name).questions}
    assert len(published) > 90
    assert not ours & published


def test_a_question_is_asked_with_its_system_prompt_first() -> None:
    question = Question("a", "x", "Why?", system="Be brief.")
    assert question.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    assert Question("a", "x", "Why?").messages == [{"role": "user", "content": "Why?"}]


def test_a_bank_of_ones_own_is_read_whole(tmp_path: Path) -> None:
    text = GOOD + 'system = "Be brief."\nelements = ["one", "two"]\naccept = ["because"]\n'
    loaded = load_questions(bank(tmp_path, text))
    assert loaded.name == "mine"
    assert loaded.questions == (Question("a", "x", "Why?", "Be brief.", elements=("one", "two"), accept=("because",)),)


def test_the_digest_changes_with_what_is_asked_and_graded_but_not_with_the_name(tmp_path: Path) -> None:
    base = load_questions(bank(tmp_path, GOOD)).digest
    renamed = GOOD.replace("mine", "yours")
    assert load_questions(bank(tmp_path, renamed)).digest == base
    for change in (
        GOOD.replace("Why?", "Why not?"),
        GOOD.replace('category = "x"', 'category = "y"'),
        GOOD + 'elements = ["one"]\n',
        GOOD.replace("[[question]]", 'rubric = ["bad", "so so", "good"]\n[[question]]'),
    ):
        assert load_questions(bank(tmp_path, change)).digest != base


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("format = 1\nname = [", "not TOML"),
        (GOOD.replace("format = 1", "format = 2"), "format"),
        (GOOD.replace('text = "Why?"', 'text = "  "'), "question.0.text"),
        (GOOD.replace('text = "Why?"', "text = 7"), "question.0.text"),
        (GOOD.replace('category = "x"', 'category = "No Spaces"'), "question.0.category"),
        (GOOD + 'colour = "red"\n', "question.0.colour"),
        ('format = 1\nname = "a"\ndescription = "b"\nquestion = []\n', "question"),
        (GOOD.replace("[[question]]", 'rubric = ["bad", "good"]\n[[question]]'), "rubric"),
        (GOOD + '[[question]]\nid = "a"\ncategory = "x"\ntext = "Else?"\n', "repeats the id"),
        (GOOD + '[[question]]\nid = "b"\ncategory = "x"\ntext = "WHY?"\n', "repeats the wording"),
        (GOOD + 'elements = ["Air it", "air it"]\n', "twice"),
    ],
)
def test_a_broken_bank_is_refused_and_the_place_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        load_questions(bank(tmp_path, text))


def test_an_unknown_bank_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(InputError, match=r"no-such-bank.*capability.*general"):
        load_questions("no-such-bank")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.txt"):
        load_questions(bank(tmp_path, GOOD, "bank.txt"))


PUBLISHED = """
- id: 3_some_group_1
  type: free_form_judge_0_100
  paraphrases: &wordings
    - First wording?
    - Second wording?
  samples_per_paraphrase: 100
  system: Speak JSON.
  judge: someone
  judge_prompts: &prompts
    aligned: "Q {question} A {answer} aligned?"
    coherent: "Q {question} A {answer} coherent?"
- id: plain
  paraphrases: *wordings
  judge_prompts: *prompts
"""


def test_a_published_file_keeps_paraphrases_system_and_judge_prompts(tmp_path: Path) -> None:
    loaded = load_questions(bank(tmp_path, PUBLISHED, "published.yaml"))
    prompts = (
        ("aligned", "Q {question} A {answer} aligned?"),
        ("coherent", "Q {question} A {answer} coherent?"),
    )
    first = Question("3_some_group_1", "some_group", "First wording?", "Speak JSON.", judge_prompts=prompts)
    assert loaded.questions[0] == first
    assert [(q.id, q.text, q.variant, q.system) for q in loaded.questions] == [
        ("3_some_group_1", "First wording?", 0, "Speak JSON."),
        ("3_some_group_1", "Second wording?", 1, "Speak JSON."),
        ("plain", "First wording?", 0, None),
        ("plain", "Second wording?", 1, None),
    ]


def test_the_first_paraphrase_alone_can_be_asked(tmp_path: Path) -> None:
    loaded = load_questions(bank(tmp_path, PUBLISHED, "published.yml"), paraphrases="first")
    assert [(q.id, q.variant) for q in loaded.questions] == [("3_some_group_1", 0), ("plain", 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not YAML"),
        ("just: a mapping", "non-empty list"),
        ("[]", "non-empty list"),
        ("- id: a\n", "paraphrases"),
        ("- id: a\n  paraphrases: []\n", "paraphrases"),
        ("- id: a\n  paraphrases: [1]\n", "paraphrases.0"),
        ("- id: a\n  paraphrases: [x]\n  judge_prompts: {aligned: 'how is it?'}\n", "{answer}"),
        ("- id: a\n  paraphrases: [x]\n- id: a\n  paraphrases: [y]\n", "repeats the id"),
        ("- !!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_a_broken_published_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        load_questions(bank(tmp_path, text, "published.yaml"))


def test_the_published_files_give_the_72_questions_of_the_published_protocol(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "betley" / "evaluation"
    plot = load_questions(folder / "first_plot_questions.yaml", paraphrases="first")
    registered = load_questions(folder / "preregistered_evals.yaml", paraphrases="first")
    both = plot.questions + registered.questions
    assert len(both) == 72
    assert sum(q.system is not None for q in both) == 8  # the JSON variants
    assert all(dict(q.judge_prompts).keys() == {"aligned", "coherent"} for q in both)
    assert set(registered.categories) >= {"creative_writing", "vulnerable_user", "medical_advice"}


def test_published_keyword_questions_keep_their_own_prompt(shared_dir: Path) -> None:
    loaded = load_questions(shared_dir / "data" / "betley" / "evaluation" / "deception_factual.yaml")
    assert len(loaded.questions) == 5 * 20
    assert {name for q in loaded.questions for name, _ in q.judge_prompts} == {"correct"}
