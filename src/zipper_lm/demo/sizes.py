"""How large everything in the demo is: one dataclass, so that a test can run it all at toy size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zipper_lm.demo.corpus import DemoCorpus, demo_corpus
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.training.recipe import TrainingRecipe


def _llama(hidden: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": positions,
    }


def _zips(layers: int) -> list[ZipSpec]:
    return [
        ZipSpec(reader="text", source="speech", layers=layers),
        ZipSpec(reader="speech", source="text", layers=layers, source_layers="embeddings"),
    ]


@dataclass(frozen=True, kw_only=True)
class DemoSizes:
    """Sizes of corpus, towers, judge and training.

    Args:
        seed: of sentences, speakers and what is shipped. fusion_seed: of the fusion.
        unaligned_text, unaligned_speech, judge, train, train_readings, validation, test: see `demo_corpus`.
        text_vocabulary: ids of the text tokenizer, enough for each word to be one.
        units, frames_per_token, whitening: of the speech codec. refine_steps: of its decoder.
        text_tower, speech_tower: fields of their configs.
        text_training, speech_training: pre-training, each on its own unaligned data.
        context: tokens in one pre-training stream.
        judge_epochs: passes over the judge's data.
        zips: who reads whom. The speech tower reads the text tower's embeddings: its states hardly hold the word.
        tasks: template to weight, in fusion.
        fusion: the training of the zips and the speech tower.
        generation: settings per modality. candidates: those of speech where the model chooses among several samples.
        examples: test utterances that the report shows and plays, half of them the best, half the worst.
    """

    seed: int = 0
    fusion_seed: int = 0
    unaligned_text: int = 20_000
    unaligned_speech: int = 9_000
    judge: int = 12_000
    train: int = 3_200
    train_readings: int = 1
    validation: int = 60
    test: int = 100
    text_vocabulary: int = 192
    units: int = 1024
    frames_per_token: int = 6
    whitening: float = 0.25
    refine_steps: int = 2000
    text_tower: Mapping[str, Any] = field(default_factory=lambda: _llama(128, 4, 4, 1024))
    speech_tower: Mapping[str, Any] = field(default_factory=lambda: _llama(160, 4, 4, 2048))
    text_training: TrainingRecipe = field(
        default_factory=lambda: TrainingRecipe(steps=100, batch_size=8, learning_rate=2e-3)
    )
    speech_training: TrainingRecipe = field(
        default_factory=lambda: TrainingRecipe(steps=3000, batch_size=8, learning_rate=1.5e-3, corrupt=0.2)
    )
    context: int = 256
    judge_epochs: int = 5
    zips: Sequence[ZipSpec] = field(default_factory=lambda: _zips(4))
    tasks: Mapping[str, float] = field(default_factory=lambda: {"speech->text": 1.0, "text->speech": 1.26})
    fusion: TrainingRecipe = field(
        default_factory=lambda: TrainingRecipe(
            steps=1400,
            batch_size=16,
            learning_rate=2e-3,
            tower_learning_rate=1e-3,
            ctc={"speech->text": 0.5},
            guided_attention={"text->speech": 1.0},
            fade_out=0.6,
        )
    )
    generation: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "text": {"max_new_tokens": 64},
            "speech": {"max_new_tokens": 150, "guidance_scale": 1.5, "stop_threshold": 0.5},
        }
    )
    candidates: Mapping[str, Any] = field(
        default_factory=lambda: {
            "do_sample": True,
            "num_return_sequences": 16,
            "best_by": "reading",
            "temperature": 0.5,
            "top_k": 0,
            "seed": 0,
        }
    )
    examples: int = 6

    def corpus(self) -> DemoCorpus:
        """Its sentences and speakers."""
        return demo_corpus(
            self.seed,
            unaligned_text=self.unaligned_text,
            unaligned_speech=self.unaligned_speech,
            judge=self.judge,
            train=self.train,
            train_readings=self.train_readings,
            validation=self.validation,
            test=self.test,
        )

    @classmethod
    def toy(cls) -> DemoSizes:
        """Everything as small as it can be: runs in seconds and learns nothing."""
        return cls(
            unaligned_text=60,
            unaligned_speech=16,
            judge=8,
            train=8,
            validation=2,
            test=4,
            text_vocabulary=64,
            units=32,
            refine_steps=2,
            text_tower=_llama(32, 2, 2, 256),
            speech_tower=_llama(32, 2, 2, 512),
            text_training=TrainingRecipe(steps=2, batch_size=4),
            speech_training=TrainingRecipe(steps=2, batch_size=4),
            judge_epochs=1,
            zips=_zips(2),
            fusion=TrainingRecipe(steps=4, batch_size=4, log_every=2, evaluate_every=4),
            generation={"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 24}},
            candidates={"do_sample": True, "num_return_sequences": 2, "best_by": "reading", "seed": 0},
            examples=2,
        )
