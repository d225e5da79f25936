"""How far along work is, on a terminal and in a log file."""

from __future__ import annotations

import contextlib
import io

import pytest
from rich.console import Console

from zipper_lm.utils import progress
from zipper_lm.utils.progress import bar, barred, run_bar, show_on


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_file_has_a_line_at_every_tenth(clock: Clock) -> None:
    file = io.StringIO()
    with bar(Console(file=file), "fusing") as advance:
        for done in range(201):
            advance(done, 200, f"loss {done}")
            clock.now += 0.5
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "fusing 20/200, 2/s, 10 s, 90 s left loss 20"


def test_what_takes_a_few_seconds_has_none(clock: Clock) -> None:
    file = io.StringIO()
    for _ in barred(range(1000), Console(file=file), "encoding"):
        clock.now += 0.004
    assert file.getvalue() == ""


def test_what_was_done_before_is_no_throughput(clock: Clock) -> None:
    """A resumed run would say that it had done thousands of steps in a second, and be over soon."""
    file = io.StringIO()
    with bar(Console(file=file), "fusing") as advance:
        advance(5000, 10000)
        for done in range(5001, 6001):
            clock.now += 0.1
            advance(done, 10000)
    assert file.getvalue().splitlines()[-1] == "fusing 6000/10000, 10/s, 100 s, 400 s left"


def test_a_log_file_is_silent_for_ten_seconds_at_most_at_first_and_not_for_days(clock: Clock) -> None:
    """A tenth of a demo's training took half a minute, in which nothing said that it was alive."""
    file = io.StringIO()
    with bar(Console(file=file), "fusing") as advance:
        for done in range(100_000):
            advance(done, 1_000_000)
            clock.now += 1
    seconds = [int(line.split("/s, ")[1].split(" s")[0]) for line in file.getvalue().splitlines()]
    gaps = [later - earlier for earlier, later in zip([0, *seconds], seconds)]
    assert {gap for second, gap in zip(seconds, gaps) if second <= 600} == {10}
    assert {gap for second, gap in zip(seconds, gaps) if second > 601} == {600}


def test_a_terminal_has_throughput_and_the_loss() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    seen = list(barred(range(50), console, "encoding"))
    with bar(console, "fusing") as advance:
        for done in range(1, 51):
            advance(done, 50, 0.5)
    assert seen == list(range(50))
    for part in ("50/50", "/s", "loss 0.500"):
        assert part in file.getvalue()


def test_a_bar_fits_80_columns_whole() -> None:
    """Its counts were cut off: 1400/1..."""
    file = io.StringIO()
    with bar(Console(file=file, force_terminal=True, color_system=None, width=80), "codec copies: decoding") as advance:
        for done in range(1001, 1401):
            advance(done, 1700, 3.12345)
    last = file.getvalue().rsplit("\r", 1)[-1].replace("\x1b[2K", "").split("\n")[0]
    assert len(last) <= 80
    for part in ("codec copies: decoding", "1400/1700", "loss 3.123", "0:00:0"):
        assert part in last


def test_steps_of_unknown_length_are_gone_through() -> None:
    file = io.StringIO()
    assert list(barred((n for n in range(3)), Console(file=file), "encoding")) == [0, 1, 2]
    assert file.getvalue() == ""


def test_the_first_item_counts_too(clock: Clock) -> None:
    """Its time did and its work did not: two items of a minute each were half as fast as they were."""
    file = io.StringIO()
    for _ in barred(range(4), Console(file=file), "encoding"):
        clock.now += 60
    assert file.getvalue().splitlines()[1] == "encoding 2/4, 0.0167/s, 120 s, 120 s left"


def test_work_of_unknown_length_says_how_much_is_done(clock: Clock) -> None:
    file = io.StringIO()
    for _ in barred((n for n in range(3)), Console(file=file), "encoding"):
        clock.now += 600
    assert file.getvalue().splitlines()[0] == "encoding 1, 0.00167/s, 600 s"


def test_a_quiet_console_swallows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(Console(force_terminal=True, quiet=True), "fusing") as advance:
        advance(1, 2, "loss 1")
        print("from elsewhere")
    assert capsys.readouterr().out == "from elsewhere\n"


def test_what_is_below_a_command_tells_on_its_console(clock: Clock) -> None:
    """The fit of units of a Whisper on ten hours of sound said nothing for ten minutes."""
    file = io.StringIO()
    for console in (Console(file=file), None):
        with contextlib.ExitStack() as stack:
            if console is not None:
                stack.enter_context(show_on(console))
            with run_bar("sounds") as advance:
                advance(0, 3)
                clock.now += 20
                advance(1, 3)
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == ["sounds 1/3"]
