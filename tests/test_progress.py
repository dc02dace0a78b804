"""A bar is drawn where somebody watches, with the time that is left, and nothing of it stays."""

import re
import types

import IPython
import IPython.display
import pytest

from lib.progress import VARIABLE, progress


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What a notebook's cell shows in turn, each in the place of the one before."""
    shown: list[dict] = []

    def display(data: dict, raw: bool, display_id: bool) -> types.SimpleNamespace:
        shown.append(data)
        return types.SimpleNamespace(update=lambda data, raw: shown.append(data))

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel="running"))
    monkeypatch.delenv(VARIABLE)
    return shown


def test_a_notebook_shows_the_time_left_and_at_the_end_nothing(drawn, capsys):
    with progress(4, "training", "steps") as bar:
        bar.mininterval = bar.miniters = 0
        bar.start_t -= 10  # as if it had begun ten seconds ago
        bar.update(2)
        assert re.search(r"training: +50%\|.*2/4 \[00:1\d<00:\d\d, ", drawn[-1]["text/plain"])
    assert drawn[-1] == {} and capsys.readouterr() == ("", "")


def test_a_notebook_under_a_command_shows_nothing_itself(drawn, monkeypatch, tmp_path):
    for terminal in ("", str(tmp_path / "terminal")):
        monkeypatch.setenv(VARIABLE, terminal)
        with progress(4, "training", "steps") as bar:
            bar.update(4)
    assert drawn == [] and "training" in (tmp_path / "terminal").read_text()


def test_where_the_terminal_is_gone_or_not_ours_no_bar_is_drawn_and_the_work_goes_on(monkeypatch, tmp_path, capsys):
    for terminal in (tmp_path / "gone" / "terminal", tmp_path):
        monkeypatch.setenv(VARIABLE, str(terminal))
        with progress(4, "training", "steps") as bar:
            bar.update(4)
        assert bar.n == 4
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
