"""The one formatter of plain text tables."""

from collections.abc import Iterable, Sequence


def format_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    digits: int = 2,
    num_left: int = 1,
) -> str:
    """Align columns: the first ``num_left`` to the left, the others to the right.

    Args:
        rows: None is printed as a dash.
        digits: behind the point of a float.
    """
    cells = [list(header), *([_cell_text(cell, digits) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell_text(cell: object, digits: int) -> str:
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return "-" if cell is None else str(cell)
