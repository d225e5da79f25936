"""Contract 1: at initialisation, logits are bit-equal to the bare backbones'."""

import pytest
import torch
from tiny import bare_logits, doc, limits, tiny_model

from zipper_lm import ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion.reading import State, read

UNIMODAL = [doc(("text", [4, 9, 3])), doc(("text", [7, 6, 5, 4, 3, 9]))]
TWO = [
    doc(("speech", [5, 6, 7, 8]), ("text", [4, 9, 3]), ("speech", [9, 8])),
    doc(("text", [4, 9]), ("speech", [9, 8, 7, 6, 5, 4]), ("text", [])),
    doc(("text", [11, 12])),
]
THREE = [*TWO, doc(("image", [8, 9]), ("text", [4]), ("image", [5]), ("speech", [9])), doc(("image", [30]))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("towers", "documents"), [(2, UNIMODAL), (2, TWO), (3, TWO), (3, THREE)])
@pytest.mark.parametrize("zips", [ZipSpec(), ZipSpec(feed_forward=True), ZipSpec(gate_start=0.0, feed_forward=True)])
@torch.no_grad()
def test_uncached(towers: int, documents: list, side: str, zips: ZipSpec) -> None:
    model = tiny_model(towers, zips=zips)
    batch = collate(documents, model.specials, side=side)  # type: ignore[arg-type]
    logits = model(batch).logits
    assert set(logits) == set(batch)
    for name, stream in batch.items():
        real = stream["segments"] >= 0
        assert torch.equal(logits[name][real], bare_logits(model, name, stream)[real])


@pytest.mark.parametrize("towers", [2, 3])
@torch.no_grad()
def test_cached_continuation(towers: int) -> None:
    """Three readings that go on from each other, against the backbone going on from its own cache."""
    model = tiny_model(towers, zips=ZipSpec())
    names = ["text", "speech", "image"][:towers]
    documents = [doc(*((n, [4 + row, 9, 3]) for n in names * 2)) for row in range(3)]
    state, caches, logits = State(), {}, {}
    for number in range(2 * towers):
        name = names[number % towers]
        batch = collate([doc((name, d[number].ids)) for d in documents], model.specials, involved=[set(names)] * 3)
        batch[name]["segments"] += number
        got = read(model, batch, state).logits[name]
        ids, past = batch[name]["input_ids"], caches.get(name)
        seen = 0 if past is None else past.get_seq_length()
        out = model.tower(name).backbone(
            input_ids=ids,
            attention_mask=torch.ones(3, seen + ids.shape[1], dtype=torch.long),
            position_ids=torch.arange(seen, seen + ids.shape[1]).expand(3, -1),
            past_key_values=past,
            use_cache=True,
        )
        caches[name], logits[name] = out.past_key_values, got
        assert torch.equal(got, out.logits), f"reading {number}, tower {name}"


@pytest.mark.parametrize("towers", [2, 3])
def test_written_tokens(towers: int) -> None:
    model = tiny_model(towers, zips=ZipSpec())
    written = model.generate([doc(("text", [4, 9, 3]))], model.names, settings=limits(model, 8))[0]
    for name, segment in zip(model.names, written.segments[1:]):
        special = model.specials[name]
        prompt = [special.bos] if name != "text" else [special.bos, 4, 9, 3, special.eos, special.bos]
        bare = model.tower(name).backbone.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, suppress_tokens=[special.bos, special.pad]
        )[0, len(prompt) :]
        assert segment.ids == bare[bare != special.eos].tolist()


@torch.no_grad()
def test_unimodal_rows_stay_bare_when_trained() -> None:
    """With open gates too: a row that involves one tower is that backbone, whatever else is in the batch."""
    model = tiny_model(3, gate=0.7)
    batch = collate(THREE, model.specials)
    logits = model(batch).logits
    for name, row in (("text", 2), ("image", 4)):
        real = batch[name]["segments"][row] >= 0
        assert torch.equal(logits[name][row][real], bare_logits(model, name, batch[name])[row][real])
    zipped = batch["text"]["segments"][0] >= 0
    assert not torch.equal(logits["text"][0][zipped], bare_logits(model, "text", batch["text"])[0][zipped])
