"""Text on the screen: the same whether it comes at once or bit by bit, on terminals of any encoding."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import open_gates, tiny_backbone
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.cli import app
from zipper_lm.cli.screen import Screen, follow
from zipper_lm.codecs.text import TextCodec
from zipper_lm.generation.segment import StreamedToken
from zipper_lm.utils.progress import plain_console, warn


def byte_level() -> TextCodec:
    """A token a byte, as of GPT-2 before its first merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<|end|>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|end|>"))


def shown(lines: Sequence[tuple[int, list[int]]], decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """What is on the screen after segments of these numbers, and what should be."""

    def stream() -> Generator[StreamedToken, None, Document]:
        for number, ids in lines:
            yield from (StreamedToken("text", i, number) for i in ids)
        return Document([Segment("text", decode(ids), ids) for _, ids in lines])

    out = io.StringIO()
    screen = Screen(out)
    expected = {number: "text" for number, _ in lines}
    document = follow(stream(), screen, lambda _, ids: decode(ids) + "\n", expected)
    told = "".join(f"{s.value}\n" for s in document)
    screen.end(told)
    return out.getvalue(), told


@given(st.lists(st.binary(max_size=24) | st.text(max_size=12).map(lambda t: t.encode("utf-8")), min_size=1, max_size=3))
def test_any_bytes_are_shown_as_they_are_printed(parts: list[bytes]) -> None:
    """Text that ended within a character was not shown at all from there on, nor was what a tokenizer changed."""
    found, told = shown(list(enumerate([[*part] for part in parts])), lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert found == told


@pytest.mark.parametrize(
    "text", ["I do n't know .", "we 've , it 's", " a leading space", "\ufffd\ufffd", "ends in \ufffd", ""]
)
def test_a_tokenizer_that_closes_up_words(text: str) -> None:
    def decode(ids: list[int]) -> str:
        said = "".join(map(chr, ids))
        for old, new in ((" n't", "n't"), (" .", "."), (" ,", ","), (" 've", "'ve"), (" 's", "'s")):
            said = said.replace(old, new)
        return said

    found, told = shown([(0, [*map(ord, text)]), (1, [*map(ord, text)])], decode)
    assert found == told


def test_what_was_shown_and_changed_is_shown_again() -> None:
    found, told = shown([(0, [*range(65, 91)])], lambda ids: "".join(map(chr, ids if len(ids) < 20 else ids[::-1])))
    assert found == f"ABCDEFGHIJK\n{told}"


def test_text_comes_before_it_is_done() -> None:
    def broken() -> Generator[StreamedToken, None, Document]:
        yield from (StreamedToken("text", 97, 0) for _ in range(20))
        raise RuntimeError

    out = io.StringIO()
    with pytest.raises(RuntimeError):
        follow(broken(), Screen(out), lambda _, ids: "a" * len(ids) + "\n", {})
    assert out.getvalue() == "a" * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes of text, and a tower whose ids nothing decodes."""
    folder = tmp_path_factory.mktemp("screen")
    codec = byte_level()
    towers = {"text": tiny_backbone("llama", codec.vocab_size, 2), "speech": tiny_backbone("gpt2", 31, 2)}
    for name, tower in towers.items():
        tower.save_pretrained(folder / name)
    sources = {name: str(folder / name) for name in towers}
    fused = ZipperModel.fuse(sources, zips=ZipSpec(gate_start=0.5, layers=1), codecs={"text": codec})
    open_gates(fused, 0.5)
    fused.save_pretrained(folder / "model")
    return folder / "model"


def zipper(*words: object, charset: str = "utf-8") -> Result:
    return CliRunner(charset=charset).invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_ends_as_the_plain_command(model: Path, seed: int) -> None:
    words = ["generate", model, "--input", "text:naïve", "--output", "text", "--output", "speech", "--output", "text"]
    words += ["--set", "text.do_sample=true", "--set", "text.max_new_tokens=30", "--set", "speech.max_new_tokens=4"]
    plain, streamed = zipper(*words, "--seed", seed), zipper(*words, "--seed", seed, "--stream")
    assert plain.exit_code == streamed.exit_code == 0, plain.output
    assert "\ufffd" in plain.stdout
    assert streamed.stdout == plain.stdout


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_gets_another(model: Path, charset: str, tmp_path: Path) -> None:
    """A command that had done its work ended in a UnicodeEncodeError."""
    words = ["generate", model, "--input", "text:a", "--output", "text", "--set", "text.max_new_tokens=20"]
    words += ["--set", "text.do_sample=true"]
    whole = zipper(*words).stdout
    for way in ([], ["--stream"]):
        result = zipper(*words, *way, charset=charset)
        assert result.exit_code == 0, result.output
        assert result.stdout == whole.encode(charset, "replace").decode(charset) != whole
    named = tmp_path / "ωμ"
    named.symlink_to(model)
    for command in (["inspect", named], ["verify", named], ["verify", model, "--json"]):
        assert zipper(*command, charset=charset).exit_code == 0
    lost = zipper("verify", tmp_path / "ω", charset=charset)
    assert lost.exit_code == 2
    assert lost.stderr.startswith("error: ")


def test_a_name_is_shown_as_it_is(model: Path, tmp_path: Path) -> None:
    """Of a path with brackets what is in them was taken for markup and not shown; ``:cat:`` became a picture."""
    named = tmp_path / "[bold]" / ":cat: [a]"
    named.parent.mkdir()
    named.symlink_to(model)
    shown = "".join(zipper("inspect", named).stdout.split())
    assert "[bold]/:cat:[a]:" in shown
    out = io.StringIO()
    console = plain_console(file=out, width=200)
    console.print("[/x] [a]: :cat:")
    warn(console, "[b]", ValueError("[c]"))
    assert out.getvalue() == "[/x] [a]: :cat:\n[b]: [c]\n"


@pytest.mark.parametrize("command", ["generate", "evaluate", "fuse", "experiment"])
def test_help_on_any_terminal(command: str) -> None:
    assert zipper(command, "--help", charset="ascii").exit_code == 0


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    program = "from zipper_lm.cli import app, say; app(['--version'], standalone_mode=False); say('ω\\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == b"??"
