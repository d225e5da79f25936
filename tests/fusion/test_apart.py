"""Towers on devices of their own. Here there is but one kind of device with values: so it is shown without them, by
fake tensors that say where they are; an operation takes none from elsewhere. With values: `test_on_a_gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zipper_lm import Engine, ZipperModel, ZipSpec
from zipper_lm.data.collation import Batch, collate
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.utils.shapes import without_values


class Crossings(TorchDispatchMode):
    """Notes each floating-point tensor that is sent to another device: where from, where to, its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_floating_point():
            before, after = args[0].device.type, made.device.type
            if before != after:
                self.noted.append((before, after, tuple(made.shape)))
        return made


@contextmanager
def apart(model: ZipperModel) -> Iterator[ZipperModel]:
    """A model like it without values, whose speech tower says that it is on meta, the others on the CPU."""
    with without_values():
        yield ZipperModel(model.config).place({"speech": "meta"})


def documents(model: ZipperModel) -> Batch:
    """Of two directions; the text of the first is given, the speech of the second."""
    first = doc(("text", [*range(3, 14)]), ("speech", [*range(3, 25)]), target=True)
    second = doc(("speech", [*range(3, 10)]), ("text", [*range(3, 8)]), target=True)
    return collate([first, second], model.specials)


@pytest.mark.parametrize(
    "zips", [ZipSpec(layers=3), ZipSpec(layers=2, positions="rotary", feed_forward=True, projection="mlp")]
)
def test_only_states_that_zips_read_cross(zips: ZipSpec) -> None:
    model = tiny_model(3, train={"text": "full"}, zips=zips)
    with apart(model) as other:
        pass
    batch = documents(model)
    with Crossings() as crossings:
        loss = other.train()(batch, return_logits=False).loss
    assert loss is not None
    depth, widths = zips.layers, {n: model.tower(n).hidden_size for n in model.names}
    assert isinstance(depth, int)
    states = [shape for _, _, shape in crossings.noted if len(shape) == 3]
    # text reads one row of speech's states, and speech one of text's: a half of the two documents each.
    found = sorted(shape[-1] for shape in states)
    assert found == sorted([widths["speech"]] * depth + [widths["text"]] * depth)
    assert {shape[0] for shape in states} == {1}
    rest = [shape for _, _, shape in crossings.noted if len(shape) != 3]
    assert all(len(shape) <= 2 and shape[-1:] in ((), (4,)) for shape in rest), "losses and handover logits alone"
    loss.backward()
    for name, parameter in other.named_parameters():
        assert parameter.grad is None or parameter.grad.device == parameter.device, name


def test_what_is_new_lives_with_its_reader() -> None:
    with apart(tiny_model(3)) as other:
        pass
    where = {name: other.tower(name).device.type for name in other.names}
    assert where == {"image": "cpu", "speech": "meta", "text": "cpu"}
    for name in other.names:
        parts = [other.zips[name], other.handover[name], other.input_projections[name], other.tower(name)]
        assert {p.device.type for part in parts for p in part.parameters()} == {where[name]}
    assert other.is_apart
    assert set(other.hf_device_map.values()) == {"cpu", "meta"}


def test_a_model_that_is_not_put_there_fails() -> None:
    """The check of devices above can fail: one part that stays behind is found."""
    with apart(tiny_model()) as other, without_values():
        other.zips["text"].to("meta")
    with pytest.raises(Exception, match="device"):
        other(documents(other), return_logits=False)


def test_by_from_pretrained(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, bundle_towers=True)
    again = ZipperModel.from_pretrained(tmp_path, device_map={"speech": "meta", "text": "cpu"})
    assert {n: again.tower(n).device.type for n in again.names} == {"speech": "meta", "text": "cpu"}
    assert {p.device.type for p in again.zips["text"].parameters()} == {"cpu"}
    here = ZipperModel.from_pretrained(tmp_path, device_map={"speech": "cpu"})
    assert not here.is_apart
    assert getattr(here, "hf_device_map", None) is None
    for wrong, said in (
        ({"smell": "cpu"}, r"device_map names \['smell'\], but the towers are"),
        ({"text": "abacus"}, "tower 'text': device_map='abacus' names no device"),
        ({"text": "cuda:99"}, "there are .* CUDA devices here"),
    ):
        with pytest.raises(ValueError, match=said):
            ZipperModel.from_pretrained(tmp_path, device_map=wrong)
    with pytest.raises(ValueError, match="is not one device"):
        SingleDecoder.from_pretrained(tmp_path, device_map={"text": "cpu"})
    with pytest.raises(ValueError, match="Engine: towers on several devices"):
        Engine(again)


def test_place_changes_nothing_but_where() -> None:
    model = tiny_model(gate=0.5)
    before = model(documents(model)).loss
    assert torch.equal(model.place({"text": "cpu", "speech": "cpu"})(documents(model)).loss, before)
    assert isinstance(before, Tensor)
    with pytest.raises(ValueError, match="device_map names"):
        model.place({"smell": "cpu"})
