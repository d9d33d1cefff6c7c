"""Tables of text: columns, and names that come from files."""

from quantize.table import aligned


def test_columns():
    table = aligned(("name", "KiB"), [("a", "1.0"), ("long name", "10.5")], "<>").splitlines()
    assert table == ["name        KiB", "---------------", "a           1.0", "long name  10.5", "---------------"]


def test_no_control_characters_reach_the_terminal():
    assert "\x1b" not in (table := aligned(("name",), [("\x1b[31mred",)], "<")) and "\\x1b[31mred" in table
