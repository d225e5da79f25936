"""``python -m zipper_lm`` is ``zipper``: for launchers that start modules (``accelerate launch -m zipper_lm ...``)."""

from zipper_lm.cli import app

app()
