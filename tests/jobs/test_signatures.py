"""Each failure signature: seen where it is, silent where it is not."""

from __future__ import annotations

from tiny import doc, tiny_model

from zipper_lm import ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.attention import observe
from zipper_lm.jobs.failures import drift, losses_on, not_started, overfitted, too_little_data


def test_drift() -> None:
    (found,) = drift({"text": 10.0, "speech": 5.0}, {"text": 12.0, "speech": 5.2})
    assert found.name == "unimodal drift"
    assert "'text'" in found.message
    assert "12.00" in found.message
    assert drift({"text": 10.0}, {"text": 9.0}) == []


def test_zips_that_add_nothing() -> None:
    effect = {"text<-speech.0": 0.001, "text<-speech.1": 0.01, "speech<-text.0": 0.2}
    (found,) = not_started(effect, dict.fromkeys(effect, 0.5))
    assert found.name == "fusion not started"
    assert "text<-speech" in found.message
    assert "1.0 %" in found.message


def test_attention_that_is_flat_in_every_layer() -> None:
    effect = {"a<-b.0": 0.3, "a<-b.1": 0.2}
    (found,) = not_started(effect, {"a<-b.0": 0.99, "a<-b.1": 0.995})
    assert "flat" in found.message
    assert not_started(effect, {"a<-b.0": 0.99, "a<-b.1": 0.6}) == []


def test_a_fresh_model_has_not_started() -> None:
    """The gates start open now, so they cannot tell: a fresh model was once called healthy, a trained one was not."""
    batch = collate([doc(("speech", [5, 6, 7]), ("text", [3, 4]), target=True)], tiny_model().specials)
    for model, silent in ((tiny_model(zips=ZipSpec(layers=2)), True), (tiny_model(gate=2.0), False)):
        seen = observe(model, batch)
        effect = {name: glimpse.effect for name, glimpse in seen.items()}
        assert any(f.message.startswith("zip text<-speech") for f in not_started(effect, {})) == silent


def test_overfitted_tower() -> None:
    """A speech tower with a held-out perplexity of 22 (11 after fewer steps) went into two sessions' experiments."""
    (found,) = overfitted("speech", 1.0, 3.1)
    assert found.name == "overfitted tower"
    assert "speech: loss 3.10 on held-out rows against 1.00" in found.message
    assert overfitted("speech", 2.0, 2.9) == []


def test_too_little_data() -> None:
    (found,) = too_little_data({"text": 0.2, "speech": 3.0}, {"text": 2.0, "speech": 3.2, "image": 9.0})
    assert found.name == "too little aligned data"
    assert found.message.startswith("text:")
    assert too_little_data({"text": 0.2}, {"text": 0.9}) == []


def test_losses_leave_the_model_as_it_was() -> None:
    model = tiny_model(gate=0.2).train()
    document = doc(("speech", [5, 6, 7]), ("text", [3, 4]), target=True)
    batch = collate([document], model.specials)
    losses = losses_on(model, [batch, batch])
    assert set(losses) == {"text", "speech"}
    assert losses == losses_on(model, [batch])
    assert model.training
