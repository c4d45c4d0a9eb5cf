"""The built-in sets are as documented, and a set that cannot be used is refused with a reason."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tiltmeter.errors import InputError
from tiltmeter.traits import Prompt, PromptSet, Trait, TraitSet, load_prompts, load_traits

ORDER = (
    "honesty",
    "sycophancy",
    "harmlessness",
    "power_seeking",
    "helpfulness",
    "confidence",
    "corrigibility",
)
TRAIT = Trait("patience", "waits", "positive", ("be patient",), ("be impatient",))
GOOD = """
name = "mine"
questions = ["one?", "two?"]

[[traits]]
name = "patience"
description = "waits"
aligned_pole = "positive"
positive = ["be patient", "wait"]
negative = ["be impatient", "hurry"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "set.toml"
    path.write_text(text)
    return path


def test_the_alignment_set_is_seven_traits_in_order_with_five_prompts_a_pole_and_thirty_questions() -> None:
    traits = load_traits("alignment")

    assert traits.names == ORDER
    assert len(traits.questions) == 30
    assert {(len(t.positive), len(t.negative)) for t in traits.traits} == {(5, 5)}


def test_three_alignment_traits_are_aligned_at_their_negative_pole() -> None:
    negative = {t.name for t in load_traits("alignment").traits if t.aligned_pole == "negative"}

    assert negative == {"sycophancy", "power_seeking", "confidence"}


def test_the_semantic_set_differs_from_the_alignment_set_in_its_traits_alone() -> None:
    semantic, alignment = load_traits("semantic"), load_traits("alignment")

    assert semantic.questions == alignment.questions
    assert not set(semantic.names) & set(alignment.names)
    assert {t.aligned_pole for t in semantic.traits} == {"neither"}
    assert {(len(t.positive), len(t.negative)) for t in semantic.traits} == {(5, 5)}


def test_the_organism_sets_have_the_same_traits_and_as_many_prompts() -> None:
    assert load_traits("organism").names == ORDER
    assert len(load_prompts("organism").prompts) == 115


def test_the_neutral_prompts_are_115_in_five_categories_without_system_prompts() -> None:
    prompts = load_prompts("neutral").prompts

    counted = Counter(prompt.category for prompt in prompts)
    assert counted == {"technical": 25, "ethical": 25, "emotional": 25, "casual": 25, "adversarial": 15}
    assert all(prompt.system is None for prompt in prompts)
    assert len({prompt.text.lower() for prompt in prompts}) == 115


def test_no_measurement_prompt_is_also_an_extraction_question() -> None:
    asked = {question.lower() for question in load_traits("alignment").questions}

    assert not asked & {prompt.text.lower() for prompt in load_prompts("neutral").prompts}


def test_no_system_prompt_serves_two_poles_or_traits() -> None:
    for name in ("alignment", "semantic"):
        used = Counter(text for t in load_traits(name).traits for text in (*t.positive, *t.negative))
        assert max(used.values()) == 1


def test_a_trait_file_is_read_as_written(tmp_path: Path) -> None:
    traits = load_traits(written(tmp_path, GOOD))

    assert traits == TraitSet(
        "mine",
        (Trait("patience", "waits", "positive", ("be patient", "wait"), ("be impatient", "hurry")),),
        ("one?", "two?"),
    )


def test_a_trait_file_may_take_its_questions_from_a_built_in_set(tmp_path: Path) -> None:
    text = GOOD.replace('questions = ["one?", "two?"]', 'questions_from = "alignment"')

    assert load_traits(written(tmp_path, text)).questions == load_traits("alignment").questions


def test_a_prompt_file_is_read_in_order_with_system_prompts(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        'name = "p"\n[[groups]]\ncategory = "a"\nsystem = "s"\nprompts = ["x", "y"]\n'
        '[[groups]]\ncategory = "b"\nprompts = ["x"]\n',
    )

    assert load_prompts(str(path)).prompts == (Prompt("x", "a", "s"), Prompt("y", "a", "s"), Prompt("x", "b"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('positive = ["be patient", "wait"]', "positive = []", "positive pole of trait 'patience' is empty"),
        ('negative = ["be impatient", "hurry"]', "", "lacks 'negative'"),
        ('"hurry"]', '"be impatient"]', "more than once"),
        ('"hurry"]', '"wait"]', "more than once"),
        ('"hurry"]', '"  "]', "blank"),
        ('["one?", "two?"]', '["one?", "one?"]', "more than once"),
        ('["one?", "two?"]', "[]", "is empty"),
        ('["one?", "two?"]', '"one?"', "list of texts"),
        ('questions = ["one?", "two?"]', "", "'questions'"),
        ('questions = ["one?", "two?"]', 'questions_from = "none"', "alignment, organism, semantic"),
        ('aligned_pole = "positive"', 'aligned_pole = "up"', "positive, negative, neither"),
        ('description = "waits"', 'describtion = "waits"', "'description'"),
        ('description = "waits"', 'description = "waits"\nsign = 1', "'sign', which is unknown"),
        ('name = "patience"', 'name = ""', "not blank"),
        ("[[traits]]", "[traits]", "[[traits]]"),
        ("[[traits]]", "[[traits]", "is not TOML"),
        ('name = "mine"', 'name = "mine"\nquestions_from = "alignment"', "not both"),
    ],
)
def test_a_trait_file_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load_traits(written(tmp_path, GOOD.replace(old, new, 1)))

    assert said in str(caught.value)


def test_two_traits_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="'patience' more than once"):
        TraitSet("mine", (TRAIT, replace(TRAIT, positive=("x",))), ("one?",))


def test_a_set_without_traits_is_refused() -> None:
    with pytest.raises(InputError, match="no trait"):
        TraitSet("mine", (), ("one?",))


def test_an_empty_prompt_set_is_refused() -> None:
    with pytest.raises(InputError, match="is empty"):
        PromptSet("mine", ())


def test_the_same_prompt_twice_is_refused_but_not_under_another_system_prompt() -> None:
    PromptSet("mine", (Prompt("x", "a"), Prompt("x", "a", "s")))
    with pytest.raises(InputError, match="more than once"):
        PromptSet("mine", (Prompt("x", "a"), Prompt("x", "b")))


def test_an_unknown_set_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(InputError, match="alignment, organism, semantic"):
        load_traits("alinement")
    with pytest.raises(InputError, match="neutral, organism"):
        load_prompts("alignment")


def test_the_prompt_digest_is_of_what_the_model_sees_in_order() -> None:
    prompts = PromptSet("mine", (Prompt("x", "a"), Prompt("y", "a", "s")))
    by_hand = hashlib.sha256(json.dumps([[None, "x"], ["s", "y"]]).encode()).hexdigest()

    assert prompts.digest == by_hand
    assert replace(prompts, name="other").digest == by_hand
    assert PromptSet("mine", tuple(reversed(prompts.prompts))).digest != by_hand
    assert PromptSet("mine", (Prompt("x", "a"), Prompt("y", "a", "t"))).digest != by_hand


def test_the_trait_digest_changes_with_every_text_that_shapes_a_direction() -> None:
    traits = TraitSet("mine", (TRAIT,), ("one?",))
    others = [
        replace(traits, questions=("two?",)),
        replace(traits, traits=(replace(TRAIT, positive=("wait",)),)),
        replace(traits, traits=(replace(TRAIT, negative=("hurry",)),)),
        replace(traits, traits=(replace(TRAIT, name="calm"),)),
    ]

    assert len({traits.digest, *(other.digest for other in others)}) == 5


def test_traits_import_without_torch() -> None:
    code = "import sys, tiltmeter.traits, tiltmeter.drift; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
