"""The student's places in a write-up: kept, counted, damaged."""

import pytest

from deepvision.reporting import student_text
from deepvision.reporting.student_text import MISSING, PLACEHOLDER, place


def test_texts_come_back_as_they_were_written():
    text = "Two paragraphs.\n\n- with a list\n- and <!-- a comment -->"
    markdown = f"# T\n\n{place('one', {'one': text})}\n\n{place('two', {})}\n"
    assert student_text.read_places(markdown) == {"one": text}
    assert PLACEHOLDER in markdown


def test_what_is_missing_is_listed():
    markdown = (
        f"{MISSING} No run of SimpleViT.\n\n{place('a', {})}\n\n{place('b', {'b': 'text'})}\n"
    )
    assert student_text.missing_parts(markdown) == ["No run of SimpleViT.", "your text: a"]


@pytest.mark.parametrize("damage", ["<!-- end of yours -->", "<!-- yours: a -->"])
def test_damaged_places_are_an_error(damage):
    markdown = place("a", {"a": "x"})
    with pytest.raises(ValueError, match="do not pair up"):
        student_text.read_places(markdown.replace(damage, ""))
    with pytest.raises(ValueError, match="do not pair up"):
        student_text.read_places(f"{markdown}\n{markdown}")


def test_edits_outside_the_places_are_noticed_and_edits_inside_are_not():
    markdown = student_text.add_checksum(f"# T\n\n{place('a', {})}\n")
    assert not student_text.was_edited(markdown)
    assert not student_text.was_edited(markdown.replace(PLACEHOLDER, "My text.\n\nMore."))
    assert student_text.was_edited(markdown.replace("# T", "# U"))
    assert student_text.was_edited("# Without a checksum\n")
