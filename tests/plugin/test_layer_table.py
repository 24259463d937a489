"""The table of layers in the log: a line for each kind of layer."""

import pytest

from swa_vllm.attention.layer_table import lines_of_layers


@pytest.mark.parametrize(
    ("full", "lines"),
    [
        ([], ["0-29 sliding"]),
        (range(15), ["0-14 full", "15-29 sliding"]),
        (range(3, 30, 4), ["0-2, 4-6, ... 28-29 sliding", "3, 7, ... 27 full"]),
        ([0, 27], ["0, 27 full", "1-26, 28-29 sliding"]),
        (range(1, 30, 2), ["0, 2, ... 28 sliding", "1, 3, ... 29 full"]),
        ([1, 2, 5, 9], ["0, 3-4, 6-8, 10-29 sliding", "1-2, 5, 9 full"]),
        ([1, 5, 7, 13], ["0, 2-4, 6, 8-12, 14-29 sliding", "1, 5, 7, 13 full"]),
    ],
    ids=["one", "halves", "every 4th", "some", "every 2nd", "uneven", "uneven ones"],
)
def test_layers_that_alternate_are_one_line(full: list[int], lines: list[str]) -> None:
    described = [(i, ("full" if i in full else "sliding",)) for i in range(30)]
    header, *rows = lines_of_layers(("layers", "kind"), described)
    assert header.split() == ["layers", "kind"]
    assert [" ".join(row.split()) for row in rows] == lines
