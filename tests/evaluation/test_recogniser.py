"""The judge: learns, hears the same alone and in a batch, survives bad sound, is stored whole."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zipper_lm.evaluation import recogniser as module
from zipper_lm.evaluation.recogniser import SAMPLE_RATE, Recogniser, RecogniserConfig

TONES = {"a": 300.0, "b": 900.0, "c": 2500.0}
SMALL = RecogniserConfig(characters=" abc", n_mels=24, channels=32, dilations=(1, 1), dropout=0.0)


def beeps(words: str, rng: np.random.Generator) -> np.ndarray:
    """A made-up language: one tone per letter, quiet between them."""
    pieces = []
    for letter in words.replace(" ", ""):
        length = int(SAMPLE_RATE * rng.uniform(0.12, 0.16))
        time = np.arange(length) / SAMPLE_RATE
        pieces.append(0.3 * np.sin(2 * np.pi * TONES[letter] * time))
        pieces.append(np.zeros(int(SAMPLE_RATE * 0.06)))
    wave = np.concatenate(pieces)
    return (wave + 1e-3 * rng.standard_normal(len(wave))).astype(np.float32)


def made_up(count: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(list(TONES), size=rng.integers(1, 5))) for _ in range(count)]
    return [beeps(text, rng) for text in texts], texts


@pytest.fixture(scope="module")
def judge() -> Recogniser:
    waves, texts = made_up(96, seed=0)
    return Recogniser.fit(waves, texts, epochs=14, batch_size=8, learning_rate=1e-2, config=SMALL)


def test_it_learns_to_hear_new_utterances(judge: Recogniser) -> None:
    waves, texts = made_up(40, seed=1)
    heard = judge.transcribe(waves)
    assert sum(h == t for h, t in zip(heard, texts)) >= 36
    # ... and writes what it hears, not what it was told: other sound, other words.
    assert judge.transcribe([beeps("a a a", np.random.default_rng(0))]) != ["c c c"]


def test_batch_order_and_level_change_nothing(judge: Recogniser) -> None:
    waves, _ = made_up(12, seed=2)
    alone = [judge.transcribe([wave])[0] for wave in waves]
    assert judge.transcribe(waves) == alone
    assert judge.transcribe(waves, batch_size=5) == alone
    assert judge.transcribe(waves[::-1]) == alone[::-1]
    assert judge.transcribe([0.01 * wave for wave in waves]) == alone


def test_padding_does_not_reach_the_output(judge: Recogniser) -> None:
    waves, _ = made_up(2, seed=3)
    features = [judge.features(torch.tensor(w)) for w in waves]
    padded, lengths = module._pad(features)
    together, steps = judge(module._standardise(padded, lengths), lengths)
    for i, feature in enumerate(features):
        single, _ = judge(module._standardise(feature[None], lengths[i : i + 1]), lengths[i : i + 1])
        torch.testing.assert_close(together[i, : steps[i]], single[0], atol=1e-4, rtol=1e-4)


def test_fit_is_seeded_and_leaves_the_random_state_alone() -> None:
    waves, texts = made_up(8, seed=4)
    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    fits = [
        Recogniser.fit(
            waves,
            texts,
            epochs=2,
            batch_size=4,
            seed=seed,
            config=SMALL,
            progress=lambda step, total, loss: seen.append((step, total)),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] * 3
    first, again, other = (torch.cat([p.flatten() for p in f.parameters()]) for f in fits)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_default_size_and_alphabet() -> None:
    waves, texts = made_up(2, seed=5)
    default = Recogniser.fit(waves, texts, epochs=1)
    assert set(default.config.characters) == set("".join(texts))
    assert 0.4e6 < sum(p.numel() for p in default.parameters()) < 0.8e6


def test_saved_judge_hears_exactly_the_same(judge: Recogniser, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path / "judge")
    assert {p.name for p in (tmp_path / "judge").iterdir()} == {"config.json", "model.safetensors"}
    stored = load_file(tmp_path / "judge" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    again = Recogniser.from_pretrained(tmp_path / "judge")
    assert again.config == judge.config
    for name, tensor in judge.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    waves, _ = made_up(6, seed=6)
    assert again.transcribe(waves) == judge.transcribe(waves)


def test_a_failed_save_leaves_the_old_judge_whole(
    judge: Recogniser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="space"):
        judge.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_foreign_folders_are_refused(judge: Recogniser, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        Recogniser.from_pretrained(tmp_path)
    judge.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"channels": 8}))
    with pytest.raises(ValueError, match="has shape"):
        Recogniser.from_pretrained(tmp_path)
    config.write_text(json.dumps(settings | {"kind": "speech"}))
    with pytest.raises(ValueError, match="kind 'speech'"):
        Recogniser.from_pretrained(tmp_path)
    config.write_text(json.dumps(settings))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])  # a download that was cut off ended in a traceback
    with pytest.raises(ValueError, match="damaged"):
        Recogniser.from_pretrained(tmp_path)


def test_sound_without_words_is_heard_as_nothing(judge: Recogniser) -> None:
    empty, short, silent = (np.zeros(n, dtype=np.float32) for n in (0, 10, SAMPLE_RATE))
    assert judge.transcribe([empty, short, silent]) == ["", "", ""]
    assert judge.transcribe([]) == []


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros((2, 800), dtype=np.float32), r"waves\[0\] .*\(2, 800\)"),
        (np.array([0.0, np.nan], dtype=np.float32), r"waves\[0\] .*NaN"),
    ],
)
def test_unusable_sound_is_refused(judge: Recogniser, wave: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge.transcribe([wave])
    with pytest.raises(ValueError, match=message):
        Recogniser.fit([wave], ["a"])


def test_long_sound_is_heard_in_pieces(judge: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sounds of more than 120 s were refused. Pieces overlap, so no word is lost, cut or heard twice at a seam."""
    waves, _ = made_up(30, seed=7)
    long = np.concatenate(waves)
    (whole,) = judge.transcribe([long])
    monkeypatch.setattr(module, "_LONGEST_SECONDS", 2)
    for middle in (40, 61):
        monkeypatch.setattr(module, "_MIDDLE", middle)
        short = waves[0][:16_000]
        again, alone = judge.transcribe([long, short])
        assert again == whole
        assert [alone] == judge.transcribe([short])
    monkeypatch.setattr(module, "_SIDE", 0)
    assert judge.transcribe([long]) != [whole]
    with pytest.raises(ValueError, match="must last at most 2 s, got"):
        Recogniser.fit([long], ["a"])


@pytest.mark.parametrize(
    ("waves", "texts", "options", "message"),
    [
        ([], [], {}, "at least one"),
        ([np.ones(800)], ["a", "b"], {}, "1 and 2"),
        ([np.ones(800)], ["?!"], {}, r"texts\[0\]"),
        ([np.ones(800)], ["a"], {"epochs": 0}, "epochs"),
        ([np.ones(800)], ["xyz"], {"config": SMALL}, r"lacks: \['x', 'y', 'z'\]"),
    ],
)
def test_unusable_pairs_are_refused(waves: list, texts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recogniser.fit(waves, texts, **options)


def test_unusable_configs_are_refused() -> None:
    for settings, message in [
        ({"characters": "aa"}, "distinct"),
        ({"characters": "a", "channels": 0}, "channels"),
        ({"characters": "a", "dropout": 1.0}, "dropout"),
        ({"characters": "a", "dilations": ()}, "dilations"),
    ]:
        with pytest.raises(ValueError, match=message):
            RecogniserConfig(**settings)  # type: ignore[arg-type]


def test_augmentation_varies_the_features_and_keeps_padding_empty() -> None:
    features, lengths = torch.randn(6, 80, 24), torch.tensor([80, 70, 60, 50, 40, 30])
    varied, new_lengths = module._augment(features, lengths)
    assert varied.shape[1] == new_lengths.max()
    assert not torch.equal(new_lengths, lengths)
    assert torch.all((new_lengths / lengths - 1).abs() < 0.2)
    for row, length in zip(varied, new_lengths):
        assert torch.isfinite(row).all()
        assert not row[length:].any()


def test_the_judge_shares_no_code_with_the_model_it_judges() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    own = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module
        and node.module.startswith("zipper_lm")
        and not node.module.startswith("zipper_lm.utils")  # how files are read is nobody's opinion
    }
    assert own == {"zipper_lm.evaluation.word_error_rate"}


@pytest.mark.parametrize(
    ("field", "value"), [("n_mels", 10**12), ("channels", 10**12), ("hidden", 10**12), ("dilations", [1] * 10_000)]
)
def test_sizes_are_held_against_the_weights_before_memory_is_taken(
    field: str, value: Any, judge: Recogniser, tmp_path: Path
) -> None:
    """A judge's config.json may claim any size: the network was made in it, and then compared with the weights."""
    judge.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(ValueError, match="recogniser: "):
        Recogniser.from_pretrained(tmp_path)
