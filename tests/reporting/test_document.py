"""The page, the Markdown and the PDF of a small document, and of two runs."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from deepvision.reporting import figures
from deepvision.reporting.document import (
    Document,
    Explorer,
    Figure,
    Pages,
    Pictures,
    Section,
    Table,
    Text,
    script_json,
)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    file = tmp_path_factory.mktemp("figures") / "a curve.png"
    file.write_bytes(figures.png(figures.new_figure(2, 3)))
    image = np.full((8, 8, 3), 77, np.uint8)
    blocks = [
        Text("x < y & z_1*", "warning"),
        Table(["", "a|b"], [["row <1>", "2.5"], ["line", "7"]], "a caption"),
        Figure(file, "a curve", 0.5),
        Figure(file, "on the page", 0.5, hover={"kind": "curves", "series": []}, media="html"),
        Pictures([("swimming pool, outdoor", [image, image], ["pier 5 %", ""])], "pictures"),
        Text("paper only", media="paper"),
    ]
    return Document("<b>me & you", "subtitle", [Section("First", blocks), Section("Empty")])


class References(HTMLParser):
    """Everything that a page loads."""

    def __init__(self, page):
        super().__init__()
        self.pictures, self.others = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and value.startswith("data:"):
                self.pictures.append(value)
            elif name in ("src", "srcset", "data", "action") or (
                name == "href" and not value.startswith("#")
            ):
                self.others.append(value)
        if tag in ("iframe", "object"):
            self.others.append(tag)


def test_the_page_needs_no_other_file(document):
    page = document.html()
    assert References(page).others == [] and "url(" not in page and "@import" not in page
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\(", page)
    targets = set(re.findall(r'href="#(.*?)"', page))
    assert targets and targets == set(re.findall(r'<h2 id="(.*?)"', page))


def test_names_cannot_break_the_page_or_its_scripts(document):
    page = document.html()
    assert "&lt;b&gt;me &amp; you" in page and "<b>me" not in page
    assert script_json({"name": "</script>"}) == '{"name":"\\u003c/script>"}'


def test_the_markdown_says_what_the_page_says(document):
    page, markdown = document.html(), document.markdown()
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    rows = [[re.sub(r"\\(.)", r"\1", c) for c in re.split(r"(?<!\\) \| ", t[2:-2])] for t in tables]
    shown = [
        re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>.*?</tr>", page)
    ]
    assert [r for r in rows if r[-1] != "---:"] == [[html.unescape(c) for c in r] for r in shown]
    assert "![a curve](a%20curve.png)" in markdown and "on the page" not in markdown
    assert "paper only" in markdown and "paper only" not in page


def test_the_pdf_has_the_figure_and_its_pages_are_not_empty(document):
    pdf = document.pdf()
    assert pdf.startswith(b"%PDF-") and pdf.count(b"/Subtype /Image") == 1
    assert len(re.findall(rb"/Type /Page\b", pdf)) == 1


def test_a_figure_is_shrunk_rather_than_moved_to_a_new_page(document):
    (figure,) = [b for b in document.sections[0].on("paper") if isinstance(b, Figure)]
    pages, height = Pages(), Pages().height_of(figure)
    pages.set_y(pages.eph + pages.t_margin - 0.8 * height - 12)
    pages.figure(figure)
    assert pages.page == 1
    pages.set_y(pages.eph + pages.t_margin - 0.3 * height - 12)
    pages.figure(figure)
    assert pages.page == 2


def test_an_explorer_is_a_part_of_the_page_only():
    explorer = Explorer({"images": []}, "caption")
    document = Document("t", "s", [Section("E", [explorer])])
    assert '{"images":[]}' in document.html() and document.markdown() == "# t\n\ns\n"
