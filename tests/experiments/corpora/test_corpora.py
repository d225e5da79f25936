"""The corpora: splits that share nothing they should not, captions that are true, the same files every time."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from zipper_lm.codecs.picture import read_picture
from zipper_lm.data.sources.readers import list_splits, read_rows
from zipper_lm.experiments.corpora import flite, genes, prompts, sentences, sounds
from zipper_lm.experiments.corpora.digit_images import WORDS, digit_splits, write_digit_images
from zipper_lm.experiments.corpora.spoken_digit_images import write_spoken_digit_images
from zipper_lm.experiments.corpora.voices import CLEAR_LANGUAGES, CLEAR_VARIANTS, LANGUAGES, VARIANTS, voices


def test_digit_images_are_all_there_once(tmp_path: Path) -> None:
    counts = write_digit_images(tmp_path / "digits")
    assert counts == {"test": 300, "validation": 100, "judge": 397, "train": 1000}
    assert sorted(list_splits(tmp_path / "digits")) == ["judge", "test", "train", "validation"]
    seen = []
    for split in counts:
        rows = read_rows(str(tmp_path / "digits"), split=split)
        assert {r["text"] for r in rows} == set(WORDS)
        assert "speech" not in rows[0]
        seen += [np.asarray(read_picture(r["image"])).tobytes() for r in rows]
    assert len(set(seen)) == 1797
    with pytest.raises(ValueError, match="exists"):
        write_digit_images(tmp_path / "digits")


def test_sounds_say_what_is_heard() -> None:
    """Loudness, pitch and order can be measured in the wave; two clips are never the same; a seed gives the same."""
    rng = np.random.default_rng(0)
    for source in sounds.SOURCES:
        low = sounds.note(source, 150.0, np.random.default_rng(1))
        high = sounds.note(source, 600.0, np.random.default_rng(1))
        assert np.isfinite(low).all()
        assert 8000 <= len(low) <= 12800
        assert centroid(high) > centroid(low), source
    clips = [sounds.clip(rng) for _ in range(60)]
    assert len({wave.tobytes() for wave, _ in clips}) == 60
    again = np.random.default_rng(0)
    assert all((wave == sounds.clip(again)[0]).all() for wave, _ in clips)
    for wave, caption in clips:
        assert wave.dtype == np.float32
        assert np.abs(wave).max() <= 1
        names = caption.split(" then ")
        assert 1 <= len(names) <= 3
        assert (np.abs(wave).max() > 0.2) == any(n.startswith("loud") for n in names)
        if len({n.split()[0] for n in names}) == 2:  # the loudest place is in a loud note
            place = np.abs(wave).argmax() / len(wave)
            assert names[min(int(place * len(names)), len(names) - 1)].startswith("loud") or len(names) == 3
    with pytest.raises(ValueError, match="kazoo"):
        sounds.note("kazoo", 100.0, rng)


def centroid(wave: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float((power * np.fft.rfftfreq(len(wave))).sum() / power.sum())


def test_sounds_are_written_with_all_their_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "SIZES", {"train": 3, "validation": 2, "test": 2, "judge": 2})
    assert sounds.write_sounds(tmp_path / "a") == sounds.SIZES
    sounds.write_sounds(tmp_path / "b")
    row = read_rows(str(tmp_path / "a"), split="judge")[1]
    assert Path(row["sound"]).is_file()
    assert Path(row["sound"]).read_bytes() == (tmp_path / "b" / "judge" / "00001.flac").read_bytes()


def test_sentences_keep_speakers_and_lines_apart(tmp_path: Path) -> None:
    for split, lines in {
        "train": [
            "one fine day.",
            "Two dogs bark!",
            "see 3 cats",
            "red boats sail",
            "nine men ate",
            "the sun is up",
            "a" * 300,
            "He came, and saw nothing at all; they say; then he was found again.",
        ]
        * 2,
        "validation": ["the sun is up"],
        "test": ["rain fell all night"],
    }.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    counts = sentences.write_sentences(tmp_path / "out", tmp_path, train=4, longest=40)
    assert counts == {"validation": 1, "test": 1, "judge": 1, "train": 4}
    who = {
        s: {r["speaker"].split("+")[1].split()[0] for r in read_rows(str(tmp_path / "out"), split=s)} for s in counts
    }
    assert sum(map(len, who.values())) == len(set().union(*who.values()))
    lines = [r["text"] for split in counts for r in read_rows(str(tmp_path / "out"), split=split)]
    assert len(set(lines)) == len(lines), "no sentence is in two splits, though one was in two files, and each twice"
    texts = [r["text"] for r in read_rows(str(tmp_path / "out"), split="train")]
    assert all(not any(c.isdigit() for c in t) for t in texts)
    assert texts == ["two dogs bark", "red boats sail", "nine men ate", "he came"]
    alone = [row["text"] for row in read_rows(str(tmp_path / "out" / "text"))]
    assert alone[0] == "two dogs bark", "the judge's lines are nobody else's"
    assert "he came and saw nothing at all they say then he was found again" in alone, "a text tower has whole lines"
    assert not {"the sun is up", "rain fell all night"} & set(alone), "no text of validation or test"
    assert [row["text"] for row in read_rows(str(tmp_path / "out" / "text"), split="validation")] == ["the sun is up"]
    with pytest.raises(ValueError, match="would replace --source"):
        sentences.write_sentences(tmp_path, tmp_path, overwrite=True)
    assert (tmp_path / "train.txt").is_file()
    with pytest.raises(ValueError, match=r"no train\.txt"):
        sentences.write_sentences(tmp_path / "more", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1 to 5 characters"):
        sentences.write_sentences(tmp_path / "more", tmp_path, longest=5)
    with pytest.raises(ValueError, match=r"--shortest 30: must be at most --longest, 20"):
        sentences.write_sentences(tmp_path / "more", tmp_path, shortest=30, longest=20)


def test_all_voices_read_beside_flites() -> None:
    """Those of espeak-ng read every other sentence, and were counted by all: 50 of 100 said nothing."""
    speakers = voices(10)
    flites = [flite.FliteVoice(speaker=name) for name in ("slt", "awb", "kal16")]
    who = sentences._turns(40, speakers, flites)
    assert [each.name for each in who[::2]] == [each.name for each in speakers] * 2
    assert who[1::2] == [flites[i % 3] for i in range(20)]
    assert sentences._turns(20, speakers, []) == speakers * 2


def test_sentences_that_are_left_are_not_read_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or Ctrl-C at the first of ten thousand sentences was told when all had been read."""
    many = [" ".join(words) for words in permutations(["dogs", "cats", "boats", "ran", "sat", "sail"], 5)]
    for split, lines in {"train": ["one day", "two days"], "validation": many, "test": ["rain fell"]}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    pools: list[Any] = []

    class Pool(sentences.ProcessPoolExecutor):
        def __init__(self, **how: Any) -> None:
            super().__init__(max_workers=1, **how)
            self.futures: list[Any] = []
            pools.append(self)

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            self.futures.append(super().submit(*args, **kwargs))
            return self.futures[-1]

    def full(file: Path, wave: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(sentences, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(sentences, "write_audio", full)
    with pytest.raises(OSError, match="no space"):
        sentences.write_sentences(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
    assert sum(future.cancelled() for future in pools[0].futures) > len(many) / 16 / 2


def test_clear_sentences_are_read_by_voices_that_can_be_understood(tmp_path: Path) -> None:
    """An aim for a reader was set where a public recogniser itself misheard most words of half of the sentences."""
    lines = {"train": ["one small step", "two dogs bark", "a man left"], "validation": ["no"], "test": ["so"]}
    for name, written in lines.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(written))
    counts = sentences.write_sentences(tmp_path / "out", tmp_path, train=2, voices=2, clear=True)
    assert counts == {"train": 2, "validation": 1, "test": 1, "judge": 1}
    with pytest.raises(ValueError, match="--voices must be at least 1, got 0"):
        sentences.write_sentences(tmp_path / "more", tmp_path, voices=0)
    rows = {name: read_rows(tmp_path / "out", split=name) for name in counts}
    who = {name: [row["speaker"].split()[0] for row in found] for name, found in rows.items()}
    assert len(set(who["train"])) == 2
    for voice in (each for found in who.values() for each in found):
        language, variant = voice.split("+")
        assert language in CLEAR_LANGUAGES
        assert variant in CLEAR_VARIANTS
    assert set(CLEAR_LANGUAGES) < set(LANGUAGES)
    assert set(CLEAR_VARIANTS) < set(VARIANTS)


def test_half_of_the_sentences_are_read_by_flite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its program, here one that is called as flite is and writes noise as long as the text."""
    program = tmp_path / "bin" / "flite"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport sys, wave, random\n"
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert set(given) == {'-voice', '--setf', '-t', '-o'}, given\n"
        "if given['-t'] == 'two dogs bark': sys.exit('a dog')\n"
        "file = wave.open(given['-o'], 'wb')\n"
        "file.setparams((1, 2, 16000, 0, 'NONE', ''))\n"
        "file.writeframes(bytes(4000) + random.Random(given['-voice']).randbytes(3200 * len(given['-t'])))\n"
    )
    program.chmod(0o755)
    words = ("one", "six", "red", "dog")
    train = [f"a {a} {b}" for a in words for b in words]
    for split, lines in {"train": train, "validation": ["the sun"], "test": ["it is so", "we are"]}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=r"--flite: there is no program 'flite' here"):
            sentences.write_sentences(tmp_path / "out", tmp_path, flite=True)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    counts = sentences.write_sentences(tmp_path / "out", tmp_path, train=8, shortest=7, flite=True)
    assert counts == {"validation": 1, "test": 1, "judge": 2, "train": 8}, "of seven letters or more"
    who = [row["speaker"] for row in read_rows(str(tmp_path / "out"), split="train")]
    assert [name for name in who if "flite" in name] == ["flite slt", "flite awb", "flite kal16", "flite slt"]
    assert all("flite" in name for name in who[1::2])
    others = [row for split in ("judge", "test") for row in read_rows(str(tmp_path / "out"), split=split)]
    assert not any("flite" in row["speaker"] for row in others)
    with pytest.raises(ValueError, match=r"flite cannot say 'two dogs bark' as rms: a dog"):
        flite.synthesise("two dogs bark", flite.FliteVoice(speaker="rms"), 0)
    with monkeypatch.context() as hung:
        hung.setattr(flite, "_SECONDS", 0.0)
        with pytest.raises(ValueError, match="flite was not done with 'a b' as rms after 0 s"):
            flite.synthesise("a b", flite.FliteVoice(speaker="rms"), 1)
    assert (flite.synthesise("a b", flite.FliteVoice(speaker="rms"), 1) != 0).any()
    with pytest.raises(ValueError, match="one of slt, rms, awb, kal16, got 'joe'"):
        flite.FliteVoice(speaker="joe")


def test_prompts_are_sounds_whose_words_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tones, no figures, no single words, nothing twice, and what is not on the list is not there."""
    monkeypatch.setattr(prompts, "DEBIAN", tmp_path / "doc")
    said = (
        "; Sounds\n\nagent: Agent logged in.\nagain: Agent, logged in\nbeep: [this is a beep]\ndigits/four: 4 or four\n"
    )
    said += "added: Added.\ngone: It is not there.\ndigits/both: Press the key: now.\nlong: This one is rather longer\n"
    for name in ("agent", "again", "beep", "digits/four", "added", "digits/both", "long", "other"):
        (tmp_path / "en" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "en" / f"{name}.wav", np.full(800, 0.1), 8000)
    with pytest.raises(ValueError, match=r"no core-sounds-en\.txt there, nor in .*doc"):
        prompts.write_prompts(tmp_path / "out", tmp_path / "en")
    (tmp_path / "doc").mkdir()
    (tmp_path / "doc" / "core-sounds-en.txt.gz").write_bytes(gzip.compress(said.encode()))
    assert prompts.write_prompts(tmp_path / "out", tmp_path / "en", longest=20) == {"test": 2}
    rows = list(read_rows(str(tmp_path / "out"), split="test"))
    assert [row["text"] for row in rows] == ["agent logged in", "press the key now"]
    assert soundfile.info(rows[0]["speech"]).samplerate == 16000
    with pytest.raises(ValueError, match="none of the 8 sounds"):
        prompts.write_prompts(tmp_path / "more", tmp_path / "doc")
    (tmp_path / "doc" / "core-sounds-en.txt.gz").write_bytes(gzip.compress(said.encode())[:-9])
    with pytest.raises(ValueError, match=r"core-sounds-en\.txt\.gz: cannot be read"):
        prompts.write_prompts(tmp_path / "more", tmp_path / "en")


def test_genes_are_coding_sequences_of_their_proteins(tmp_path: Path) -> None:
    assert genes.translate("ATGTTTTCTTAATGG") == "MFS", "up to the stop codon"
    assert genes.translate("ATGGAAAGCTGTCATCG") == "MESCH", "up to the last whole codon"
    assert len(genes.CODE) == 64
    assert [c for c, r in genes.CODE.items() if r == "*"] == ["TAA", "TAG", "TGA"]
    assert genes.CODE["ATG"] == "M"
    with pytest.raises(ValueError, match=r"it has \['U'\]"):
        genes.translate("AUG")
    assert genes.write_genes(tmp_path / "a") == genes.SIZES
    genes.write_genes(tmp_path / "b")
    rows = [row for split in genes.SIZES for row in read_rows(str(tmp_path / "a"), split=split)]
    assert len({row["protein"] for row in rows}) == len(rows), "no protein in two splits, or twice"
    for row in rows:
        assert row["protein"][0] == "M"
        assert genes.LENGTHS[0] <= len(row["protein"]) <= genes.LENGTHS[1]
        assert len(row["dna"]) == 3 * len(row["protein"]) + 3
        assert genes.translate(row["dna"]) == row["protein"]
    assert {row["dna"][-3:] for row in rows} == {"TAA", "TAG", "TGA"}
    for split in genes.SIZES:
        assert (tmp_path / "a" / f"{split}.jsonl").read_bytes() == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        genes.write_genes(tmp_path / "a")


def test_spoken_digit_images_put_the_same_digit_side_by_side(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / "clips" / split).mkdir(parents=True)
        lines = ["file_name,transcription"]
        for number, word in enumerate(WORDS[:3] * 2):
            wave = np.full(800, number / 10 + 0.1, dtype=np.float32)
            soundfile.write(tmp_path / "clips" / split / f"{number}.wav", wave, 8000)
            lines.append(f"{number}.wav,{word}")
        (tmp_path / "clips" / split / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    counts = write_spoken_digit_images(tmp_path / "made", tmp_path / "clips")
    assert counts == {"train": 6, "validation": 6, "test": 6, "judge": 6}
    shutil.rmtree(tmp_path / "clips")  # nothing points back there
    pictures = {split: dict.fromkeys(WORDS, frozenset[bytes]()) for split in counts}
    for split, rows in digit_splits().items():
        for picture, word in rows:
            pictures[split][word] |= {picture.tobytes()}
    for split in counts:
        for number, row in enumerate(read_rows(str(tmp_path / "made"), split=split)):
            assert row["text"] == WORDS[number % 3]
            assert soundfile.read(row["speech"])[0][0] == pytest.approx(number / 10 + 0.1, abs=1e-3)
            assert read_picture(row["image"]).tobytes() in pictures[split][row["text"]]


def test_a_recording_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    soundfile.write(tmp_path / "train" / "a.wav", np.zeros(80), 8000)
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir(exist_ok=True)
        soundfile.write(tmp_path / split / "a.wav", np.zeros(80), 8000)
        (tmp_path / split / "metadata.csv").write_text("file_name,transcription\na.wav,eleven", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 0 of train says 'eleven'"):
        write_spoken_digit_images(tmp_path / "made", tmp_path)
