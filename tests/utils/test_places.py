"""What others may read of a place."""

from __future__ import annotations

import pytest

from zipper_lm.utils.places import public_name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/me/data", "data"),
        ("/home/me/it's mine, all/x.wav", "x.wav"),
        ("file=/home/me/my own/x.wav, 3 s", "file=x.wav, 3 s"),
        ("row 1: '/home/me//x.wav' and ~/y/z.wav: bad", "row 1: 'x.wav' and z.wav: bad"),
        ("at file:///home/me/x", "at x"),
        ("org/name", "org/name"),
        ("see https://huggingface.co/org/name", "see https://huggingface.co/org/name"),
        ("<s>, </s>, 1/s, 1 / 2, ->text/x", "<s>, </s>, 1/s, 1 / 2, ->text/x"),
    ],
)
def test_of_a_path_only_the_last_part_is_public(text: str, told: str) -> None:
    """A path within a text, such as the reason why a file was left out, went to the Hub with all its folders."""
    assert public_name(text) == told
