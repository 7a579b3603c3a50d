"""One contract of progress: True, False, None, or a function of done and total."""

import pytest

from ema_optax._messages.progress import shown, tracked


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False, None])
def test_where_a_bar_is_drawn(progress, terminal, capsys, monkeypatch):
    """On stderr alone; by itself only on a terminal, where it goes at the end."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown(progress, "working", 3) as report:
        report(2, "so far")
    printed = capsys.readouterr()
    assert printed.out == ""
    drawn = progress is True or (progress is None and terminal)
    assert ("2/3" in printed.err) == ("so far" in printed.err) == drawn
    if drawn:
        assert printed.err.endswith("\x1b[1A\x1b[2K" if terminal else "\n")


def test_a_function_counts():
    """Each piece of work, and all of it where that is known."""
    seen = []
    assert list(tracked("abc", "", lambda *x: seen.append(x))) == ["a", "b", "c"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert list(tracked(iter("ab"), "", lambda *x: seen.append(x))) == ["a", "b"]
    assert seen[3:] == [(1, 1), (2, 2)]
