"""Rows of cells -> a table: plain text drawn by `rich`, the same on a terminal, in a pipe and in a file; or HTML."""

from collections.abc import Collection, Sequence

from markupsafe import Markup, escape

WIDEST = 100_000  # characters: no cell is ever cut or folded, since names are to be copied and searched for


def draw_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Lines of equal columns, two spaces between them.

    draw_table([("place", "values"), ("norms", "1,536"), ("词", "64")]) ->
        place  values
        norms   1,536
        词         64

    Args:
        rows: The titles first, then a row each; all of one length.
        left: Columns to the left, of names and words, -1 the last; those of numbers stand to the right.
    """
    from rich.console import Console  # 0.05 s: not where nothing is drawn
    from rich.table import Table
    from rich.text import Text

    width = len(rows[0])
    names = {column % width for column in left}
    table = Table(box=None, show_header=False, padding=0)
    for column in range(width):
        table.add_column(justify="left" if column in names else "right", no_wrap=True)
    for row in rows:
        # `Text`: in a plain string rich takes "[-2:]" for markup. The gap is a part of it: rich's own padding takes
        # twice as long to draw.
        table.add_row(*(Text(f"  {cell}" if at else cell) for at, cell in enumerate(row)))
    # a console of its own, without colours: it asks neither the terminal nor variables such as FORCE_COLOR
    console = Console(width=WIDEST, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as drawn:
        console.print(table, soft_wrap=True)
    return "\n".join(line.rstrip() for line in drawn.get().splitlines())


def html_table(rows: Sequence[Sequence[object]], left: Collection[int] = (0,), caption: str = "") -> Markup:
    """The same rows for a notebook: every cell escaped, in the colours of the page, be it light or dark.

    html_table([("place", "values"), ("norms", "1,536")]) -> Markup('<table style="..."><thead><tr>...')

    Args:
        rows: The titles first, then a row each; all of one length. A cell that is `Markup` is HTML already.
        left: As for `draw_table`.
        caption: A line over the table.
    """
    width = len(rows[0])
    names = {column % width for column in left}

    def cells(row: Sequence[object], tag: str) -> Markup:
        sides = ("left" if column in names else "right" for column in range(width))
        # said in every cell: notebooks take style sheets out of what they show, and give tables a style of their own
        style = "text-align:{};padding:2px 10px;white-space:nowrap"
        made = (
            Markup(f'<{tag} style="{style.format(side)}">{{}}</{tag}>').format(escape(cell))
            for side, cell in zip(sides, row, strict=True)
        )
        return Markup("<tr>{}</tr>").format(Markup("").join(made))

    # inherited by tables in standards mode anyway; a page without a doctype would draw them black on its dark ground
    style = "border-collapse:collapse;margin:4px 0 8px 0;color:inherit;font-size:inherit"
    over = Markup('<caption style="caption-side:top;text-align:left;padding:2px 10px">{}</caption>').format(caption)
    return Markup(f'<table style="{style}">{{}}<thead>{{}}</thead><tbody>{{}}</tbody></table>').format(
        over if caption else "", cells(rows[0], "th"), Markup("\n").join(cells(row, "td") for row in rows[1:])
    )
