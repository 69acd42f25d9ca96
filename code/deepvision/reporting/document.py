"""Headings, paragraphs, tables and figures, written as one HTML page, as Markdown and as a PDF."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import jinja2
import matplotlib
from fpdf import FPDF
from fpdf.fonts import FontFace

TEMPLATE = Path(__file__).parent / "page.html"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # the figures' own typeface
INK, GREY, RULE, BAND = (32, 33, 36), (95, 99, 104), (218, 220, 224), (246, 247, 249)


@dataclass
class Text:
    """A paragraph; a note is set smaller and grey."""

    text: str
    note: bool = False


@dataclass
class Table:
    """The first column holds names, the others figures, which stand flush right."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Figure:
    """A PNG; `width` is its share of the text's width."""

    file: Path
    caption: str
    width: float

    @property
    def data(self) -> str:
        return base64.b64encode(self.file.read_bytes()).decode()


@dataclass
class Section:
    title: str
    blocks: list[Text | Table | Figure] = field(default_factory=list)


@dataclass
class Document:
    title: str
    subtitle: str
    sections: list[Section]

    def html(self) -> str:
        """One page that needs no other file."""
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(document=self, kind=lambda block: type(block).__name__)

    def markdown(self) -> str:
        """Beside the figures' files, for a repository, or to be written on in."""
        parts = [f"# {plain(self.title)}", plain(self.subtitle)]
        for section in self.sections:
            parts += [f"## {plain(section.title)}", *map(markdown_of, section.blocks)]
        return "\n\n".join(parts) + "\n"

    def pdf(self) -> bytes:
        """A4 pages whose text can be searched and copied."""
        pages = Pages()
        pages.masthead(self.title, self.subtitle)
        for section in self.sections:
            pages.heading(section.title, section.blocks[0])
            for block in section.blocks:
                pages.add(block)
        return bytes(pages.output())


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|]|\b_|_\b)", r"\\\1", text)


def markdown_of(block: Text | Table | Figure) -> str:
    if isinstance(block, Text):
        return plain(block.text)
    if isinstance(block, Figure):
        return f"![{plain(block.caption)}]({quote(block.file.name)})\n\n{plain(block.caption)}"
    rule = ["---", *["---:"] * (len(block.head) - 1)]
    rows = [rule if row is rule else map(plain, row) for row in (block.head, rule, *block.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + (f"\n\n{plain(block.caption)}" if block.caption else "")


class Pages(FPDF):
    """fpdf2's pages with this report's typography; lengths in mm, type sizes in points."""

    LINE = 5.2

    def __init__(self) -> None:
        super().__init__(format="A4")
        for style, name in (("", "DejaVuSans"), ("B", "DejaVuSans-Bold")):
            self.add_font("Sans", style, FONTS / f"{name}.ttf")
        self.set_margins(20, 18)
        self.set_auto_page_break(True, 20)
        self.set_draw_color(*RULE)
        self.add_page()

    def footer(self) -> None:
        self.set_y(-14)
        self.style(8, GREY)
        self.cell(0, 5, f"{self.page_no()}", align="C")

    def style(self, size: float, color: tuple[int, int, int] = INK, bold: bool = False) -> None:
        self.set_font("Sans", "B" if bold else "", size)
        self.set_text_color(*color)

    def masthead(self, title: str, subtitle: str) -> None:
        self.style(20, bold=True)
        self.multi_cell(0, 9, title, align="L", new_x="LMARGIN", new_y="NEXT")
        self.ln(1)
        self.style(9, GREY)
        self.multi_cell(0, 4.6, subtitle, align="L", new_x="LMARGIN", new_y="NEXT")

    def heading(self, title: str, first: Text | Table | Figure) -> None:
        """Never at the foot of a page: what follows keeps it company."""
        self.keep_together(16 + (self.height_of(first) if isinstance(first, Figure) else 30))
        self.ln(7)
        self.style(13, bold=True)
        self.multi_cell(0, 7, title, align="L", new_x="LMARGIN", new_y="NEXT")
        self.ln(1.5)

    def keep_together(self, height: float) -> None:
        if self.will_page_break(height):
            self.add_page()

    def add(self, block: Text | Table | Figure) -> None:
        {Text: self.text_block, Table: self.table_block, Figure: self.figure}[type(block)](block)

    def text_block(self, block: Text) -> None:
        self.style(*((8, GREY) if block.note else (9.5, INK)))
        height = 4.3 if block.note else self.LINE
        self.multi_cell(0, height, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
        self.ln(2)

    def table_block(self, block: Table) -> None:
        self.keep_together(6.3 * (len(block.rows) + 2))
        self.style(8)
        columns = len(block.head)
        first = max(0.26, 1 / columns)
        widths = (first, *[(1 - first) / max(columns - 1, 1)] * (columns - 1))
        with self.table(
            col_widths=widths,
            text_align=("LEFT", *["RIGHT"] * (columns - 1)),
            headings_style=FontFace(emphasis="BOLD", color=INK, fill_color=BAND),
            borders_layout="HORIZONTAL_LINES",
            line_height=4.6,
            padding=0.7,
        ) as table:
            for cells in (block.head, *block.rows):
                table.row(cells)
        if block.caption:
            self.caption(block.caption)
        self.ln(2)

    def height_of(self, figure: Figure) -> float:
        width, height = picture_size(figure.file)
        return figure.width * self.epw * height / width

    def figure(self, figure: Figure) -> None:
        self.keep_together(self.height_of(figure) + 10)
        width = figure.width * self.epw
        self.image(figure.file, x=self.l_margin + (self.epw - width) / 2, w=width)
        self.caption(figure.caption)
        self.ln(3)

    def caption(self, text: str) -> None:
        self.ln(1)
        self.style(8, GREY)
        self.multi_cell(0, 4.3, text, align="L", new_x="LMARGIN", new_y="NEXT")


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its first part (RFC 2083, section 11.2.1)."""
    header = file.read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
