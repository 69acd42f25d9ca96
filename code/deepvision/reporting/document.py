"""A document of headings, paragraphs, tables and figures, as one HTML page, Markdown and PDF.

A block with media "html" is on the page alone, one with media "paper" in Markdown and PDF alone.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import cv2
import jinja2
import matplotlib
import numpy as np
from fpdf import FPDF
from fpdf.fonts import FontFace
from PIL import Image

FOLDER = Path(__file__).parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # the typeface of the figures
INK, GREY, RULE, BAND = (32, 33, 36), (95, 99, 104), (218, 220, 224), (246, 247, 249)
WARNING = (255, 244, 214)
UNFILTERED = (  # smaller files for noise, from OpenCV 4.12 on
    [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    if hasattr(cv2, "IMWRITE_PNG_FILTER_NONE")
    else []
)
MIN_SHRINK = 0.6  # a figure is drawn down to this share of its size to fit the rest of a page


@dataclass
class Text:
    """A paragraph; style: "note" (small and grey), "warning" or "missing" (a box)."""

    text: str
    style: str = ""
    media: str = "all"


@dataclass
class Table:
    """The first column holds names; the others are aligned right, or left where `words`."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: bool = False
    media: str = "all"


@dataclass
class Figure:
    """A PNG; `width` is its share of the text's width.

    hover: what the page shows under the pointer, see `figures.curve_hover`, `figures.cell_hover`.
    """

    file: Path
    caption: str
    width: float
    hover: dict | None = None
    media: str = "all"

    @property
    def data(self) -> str:
        """The PNG file in base64."""
        return base64.b64encode(self.file.read_bytes()).decode()


@dataclass
class Pictures:
    """Rows of (title, uint8 images (H, W, 3), captions): on the page, where captions wrap."""

    rows: list[tuple[str, list[np.ndarray], list[str]]]
    caption: str
    media: str = "html"


@dataclass
class Explorer:
    """The data of the explorer of attacks, see `explorer.py`."""

    data: dict
    caption: str
    media: str = "html"


Block = Text | Table | Figure | Pictures | Explorer


@dataclass
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def on(self, media: str) -> Iterator[Block]:
        """The blocks for "html" or "paper"."""
        return (block for block in self.blocks if block.media in ("all", media))


@dataclass
class Document:
    """A title with sections, which renders itself as HTML, Markdown and PDF."""

    title: str
    subtitle: str
    sections: list[Section]

    def html(self) -> str:
        """One page that needs no other file."""
        loader = jinja2.FileSystemLoader(FOLDER)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {"script": script_json, "webp": webp_data}
        template = environment.get_template("page.html")
        return template.render(document=self, kind=lambda block: type(block).__name__, read=read)

    def paper(self) -> Iterator[tuple[str, list[Block]]]:
        """Titles and blocks of the sections that Markdown and PDF have."""
        for section in self.sections:
            if blocks := list(section.on("paper")):
                yield section.title, blocks

    def markdown(self) -> str:
        """Markdown for a repository; it refers to the PNG files of the figures."""
        parts = [f"# {plain(self.title)}", plain(self.subtitle)]
        for title, blocks in self.paper():
            parts += [f"## {plain(title)}", *map(markdown_of, blocks)]
        return "\n\n".join(parts) + "\n"

    def pdf(self) -> bytes:
        """A4 pages whose text can be searched and copied."""
        pages = Pages()
        pages.masthead(self.title, self.subtitle)
        for title, blocks in self.paper():
            pages.heading(title, blocks[0])
            for block in blocks:
                pages.add(block)
        return bytes(pages.output())


def read(name: str) -> str:
    """The text of a file in the folder of this module."""
    return (FOLDER / name).read_text(encoding="utf-8")


def script_json(value: object) -> str:
    """JSON that can stand inside a <script> element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def png_data(image: np.ndarray) -> str:
    """A uint8 image (H, W, 3) as the address of a PNG inside the page, without loss."""
    return data_address("png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9, *UNFILTERED])


def webp_data(image: np.ndarray) -> str:
    """A uint8 image (H, W, 3) as the address of a small WebP inside the page, with some loss."""
    return data_address("webp", image, [cv2.IMWRITE_WEBP_QUALITY, 90])


def data_address(kind: str, image: np.ndarray, options: list[int]) -> str:
    """A uint8 image (H, W, 3) as a `data:` URL. kind: png or webp; options: of cv2.imencode."""
    data = cv2.imencode(f".{kind}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|]|\b_|_\b)", r"\\\1", text)


def markdown_of(block: Text | Table | Figure) -> str:
    """A block in Markdown; a figure refers to its file by name."""
    if isinstance(block, Text):
        return "> **Warning.** " * (block.style == "warning") + plain(block.text)
    if isinstance(block, Figure):
        return f"![{plain(block.caption)}]({quote(block.file.name)})\n\n{plain(block.caption)}"
    rule = ["---", *["---" if block.words else "---:"] * (len(block.head) - 1)]
    rows = [rule if row is rule else map(plain, row) for row in (block.head, rule, *block.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + (f"\n\n{plain(block.caption)}" if block.caption else "")


class Pages(FPDF):
    """fpdf2's pages in the typography of the report; lengths in mm, type sizes in points."""

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
        """The page number; fpdf2 calls this at the end of each page."""
        self.set_y(-14)
        self.type(8, GREY)
        self.cell(0, 5, f"{self.page_no()}", align="C")

    def type(self, size: float, color: tuple[int, int, int] = INK, bold: bool = False) -> None:
        """Set the type of the text that follows."""
        self.set_font("Sans", "B" if bold else "", size)
        self.set_text_color(*color)

    def lines(self, height: float, text: str, **options: bool) -> None:
        """Write a paragraph over the whole width, each line `height` mm high."""
        self.multi_cell(0, height, text, align="L", new_x="LMARGIN", new_y="NEXT", **options)

    def masthead(self, title: str, subtitle: str) -> None:
        """The title and subtitle of the document."""
        self.type(20, bold=True)
        self.lines(9, title)
        self.ln(1)
        self.type(9, GREY)
        self.lines(4.6, subtitle)

    def heading(self, title: str, first: Block | None) -> None:
        """The title of a section, on the same page as its first block."""
        follows = 30
        if isinstance(first, Figure):
            follows = MIN_SHRINK * self.height_of(first) + 10
        elif isinstance(first, Table):
            follows = table_height(first)
        self.keep_together(16 + follows)
        self.ln(7)
        self.type(13, bold=True)
        self.lines(7, title)
        self.ln(1.5)

    def keep_together(self, height: float) -> None:
        """Start a new page unless `height` mm are left on this one."""
        if self.will_page_break(height):
            self.add_page()

    def add(self, block: Text | Table | Figure) -> None:
        """Draw a block below the last one."""
        {Text: self.text_block, Table: self.table_block, Figure: self.figure}[type(block)](block)

    def text_block(self, block: Text) -> None:
        """A paragraph in its style."""
        note, boxed = block.style == "note", block.style in ("warning", "missing")
        self.type(*((8, GREY) if note else (9.5, INK)))
        if boxed:
            self.keep_together(3 * self.LINE)
        self.set_fill_color(*WARNING if boxed else (255,))
        self.lines(4.3 if note else self.LINE, block.text, fill=boxed)
        self.ln(2)

    def table_block(self, block: Table) -> None:
        """A table with its caption; a short one is not broken over two pages."""
        self.keep_together(table_height(block))
        self.set_fill_color(255)  # a box before it has left its colour
        self.type(8)
        columns = len(block.head)
        first = max(0.26, 1 / columns)
        widths = (first, *[(1 - first) / max(columns - 1, 1)] * (columns - 1))
        with self.table(
            col_widths=widths,
            text_align=("LEFT", *["LEFT" if block.words else "RIGHT"] * (columns - 1)),
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
        """The height of a figure in mm: in proportion to its width, at most a page."""
        width, height = picture_size(figure.file)
        return min(figure.width * self.epw * height / width, self.eph - 25)

    def figure(self, figure: Figure) -> None:
        """A figure, shrunk a little where this saves a page break."""
        width, height = picture_size(figure.file)
        available = self.eph + self.t_margin - self.y - 12
        if available < MIN_SHRINK * self.height_of(figure):
            self.add_page()
            available = self.eph - 12
        drawn = min(self.height_of(figure), available)
        side = drawn * width / height
        self.image(figure.file, x=self.l_margin + (self.epw - side) / 2, w=side, h=drawn)
        self.caption(figure.caption)
        self.ln(3)

    def caption(self, text: str) -> None:
        """Small grey text below a table or a figure."""
        self.ln(1)
        self.type(8, GREY)
        self.lines(4.3, text)


def table_height(table: Table) -> float:
    """About the height of a table that stays on one page, in mm; a longer one is broken."""
    return min(6.3 * (len(table.rows) + 2), 120)


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height of an image file in pixels."""
    with Image.open(file) as image:
        return image.size
