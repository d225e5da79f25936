import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import doc, open_gates, tiny_backbone, tiny_model
from transformers import OPTConfig, OPTForCausalLM

from zipper_lm import TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.collation import IGNORED, collate

DOCUMENTS = [
    doc(("speech", [5, 6, 7, 8]), ("text", [4, 9, 3]), target=True),
    doc(("text", [4, 9]), ("speech", [9, 8, 7, 6, 5]), target=True),
]


def test_the_loss_by_hand() -> None:
    model = tiny_model(gate=0.5, loss_weights={"speech": 2.0}, handover_weight=0.5)
    DOCUMENTS[0][0].target = False
    batch = collate(DOCUMENTS, model.specials)
    DOCUMENTS[0][0].target = True
    out = model(batch)
    for name in ("text", "speech"):
        terms = []
        for row in range(2):
            for t in range(1, batch[name]["labels"].shape[1]):
                label = int(batch[name]["labels"][row, t])
                if label != IGNORED:
                    terms.append(-out.logits[name][row, t - 1].log_softmax(-1)[label])
        assert len(terms) == {"text": 4 + 3, "speech": 6}[name]
        torch.testing.assert_close(out.losses[name], torch.stack(terms).mean())
    total = out.losses["text"] + 2.0 * out.losses["speech"] + 0.5 * out.losses["handover"]
    torch.testing.assert_close(out.loss, total)


def test_no_targets_no_loss() -> None:
    model = tiny_model()
    out = model(collate([doc(("text", [4, 9]), ("speech", [5]))], model.specials))
    assert out.loss is None
    assert out.losses == {}


def test_an_untrained_handover_is_undecided() -> None:
    model = tiny_model()
    assert model(collate(DOCUMENTS, model.specials)).losses["handover"].item() == pytest.approx(math.log(3))


def test_padding_and_company_change_no_loss() -> None:
    model = tiny_model(gate=0.5)
    losses = [model(collate(DOCUMENTS, model.specials, side=side)).loss for side in ("left", "right")]
    torch.testing.assert_close(*losses)
    single = [model(collate([d], model.specials)).logits["text"][0, -1] for d in DOCUMENTS[:1]]
    batch = collate(DOCUMENTS, model.specials)
    torch.testing.assert_close(model(batch).logits["text"][0, 4], single[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ids", "wrong"), [([31], 31), ([-1], -1)])
def test_ids_out_of_range(ids: list[int], wrong: int) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=rf"text: token id {wrong} out of range, the tower has ids 0 to 30"):
        model(collate([doc(("text", ids))], model.specials))


def test_impossible_batches() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no tower has any token"):
        model({})
    with pytest.raises(ValueError, match="unknown tower 'smell'"):
        model({"smell": collate(DOCUMENTS, model.specials)["text"]})


def test_gates() -> None:
    model = tiny_model(zips=ZipSpec(layers=2, gate_start=0.1, feed_forward=True))
    gates = model.gates()
    assert len(gates) == 2 * 2 * 2
    assert gates["text<-speech.1.ff"] == pytest.approx(math.tanh(0.1))


def test_a_copy_is_apart() -> None:
    model = tiny_model(gate=0.5)
    batch = collate(DOCUMENTS, model.specials)
    expected = model(batch).logits["text"]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch).logits["text"], expected)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(batch).logits["text"], expected)
    settings = {"text": {"max_new_tokens": 3}}
    assert model.generate(DOCUMENTS[1:], ["text"], settings=settings)[0].segments[-1].ids != [0, 0, 0]


def test_to_another_dtype() -> None:
    model = tiny_model(gate=0.5).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(collate(DOCUMENTS, model.specials))
    assert out.logits["text"].dtype == torch.bfloat16
    assert out.loss.isfinite()
    settings = {"text": {"max_new_tokens": 3}}
    assert len(model.generate(DOCUMENTS, ["text"], settings=settings)[0]) == 3


def test_counts_and_manners() -> None:
    model = tiny_model()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    trainable = model.num_parameters(only_trainable=True)
    towers = sum(p.numel() for p in model.towers.parameters())
    assert trainable == model.num_parameters() - towers
    assert model.can_generate() is False  # no tokens in, tokens out: it takes documents
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32


def test_frozen_towers_stay_in_evaluation_mode() -> None:
    model = tiny_model(train={"speech": "full"}).train()
    assert not any(m.training for m in model.tower("text").backbone.modules())
    assert model.tower("speech").backbone.training
    assert model.zips.training


def test_three_towers_read_both_others() -> None:
    model = tiny_model(3, gate=0.5)
    assert set(model.layer_pairs) == {(a, b) for a in model.names for b in model.names if a != b}


def test_one_direction_only() -> None:
    model = tiny_model(zips=ZipSpec(reader="text", source="speech", layers=2, gate_start=0.5))
    open_gates(model, 0.5)
    torch.nn.init.zeros_(model.input_projections["speech"].down.weight)
    assert list(model.layer_pairs) == [("text", "speech")]
    batch = collate(DOCUMENTS, model.specials)
    stream = batch["speech"]
    bare = F.log_softmax(model.tower("speech")(stream["input_ids"], stream["attention_mask"])[0], -1)
    assert torch.equal(model(batch).logits["speech"].log_softmax(-1), bare)
    assert not torch.equal(
        model(batch).logits["text"], model.tower("text")(batch["text"]["input_ids"], batch["text"]["attention_mask"])[0]
    )


def test_from_a_config_alone() -> None:
    model = tiny_model(gate=0.5)
    fresh = ZipperModel(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_layerdrop_is_refused_in_words() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"word_embed_proj_dim": 32, "vocab_size": 31}
    backbones = {"text": OPTForCausalLM(OPTConfig(layerdrop=0.9, **sizes)), "speech": tiny_backbone("gpt2", 53)}
    model = ZipperModel.fuse(backbones, zips=ZipSpec(layers=2), train={"text": "full"})
    model.train()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="layerdrop"):
        model(collate(DOCUMENTS, model.specials))


# --- fuse --------------------------------------------------------------------------------------------------------


def fuse(names: tuple[str, ...] = ("text", "speech"), **kwargs: object) -> ZipperModel:
    return ZipperModel.fuse({n: tiny_backbone("llama", 31, 2, seed=k) for k, n in enumerate(names)}, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (("text",), {}, "at least two towers"),
        (("text", "Text"), {}, "'text' and 'Text' clash"),
        (("text", "my.speech"), {}, "'my.speech' cannot be used"),
        (("text", "forward"), {}, "'forward' cannot be used"),
        (("text", "auto"), {}, "'auto' cannot be used"),
        (("text", "speech"), {"train": {"smell": "full"}}, r"train names \['smell'\]"),
        (("text", "speech"), {"train": {"text": "half"}}, "tower.train must be one of"),
        (("text", "speech"), {"loss_weights": {"smell": 1.0}}, r"loss_weights names \['smell'\]"),
        (("text", "speech"), {"zips": ZipSpec(layers=[0, 2])}, r"layers \[2\] out of range"),
        (("text", "speech"), {"zips": ZipSpec(attention="flash_attention_2")}, "zip.attention 'flash_attention_2'"),
        (("text", "speech"), {"colour": "red"}, r"unknown arguments \['colour'\]"),
    ],
)
def test_what_cannot_be_fused(names: tuple[str, ...], kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse(names, **kwargs)


def test_one_model_is_not_two_towers() -> None:
    backbone = tiny_backbone("llama", 31)
    with pytest.raises(ValueError, match="one and the same model"):
        ZipperModel.fuse({"a": backbone, "b": backbone})


def test_an_end_is_needed() -> None:
    backbone = tiny_backbone("llama", 31)
    backbone.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"'text': neither its codec nor its config says which id ends"):
        ZipperModel.fuse({"text": backbone, "speech": tiny_backbone("gpt2", 53)})


def test_several_ends() -> None:
    backbone = tiny_backbone("llama", 31)
    backbone.config.eos_token_id, backbone.config.bos_token_id, backbone.config.pad_token_id = [7, 8], None, None
    model = ZipperModel.fuse({"text": backbone, "speech": tiny_backbone("gpt2", 53)})
    assert model.specials["text"] == (7, 7, 7)


def test_specials_out_of_range() -> None:
    model = tiny_model()
    config = type(model.config).from_dict(model.config.to_dict())
    config.towers["text"]["pad_token_id"] = 31
    with pytest.raises(ValueError, match=r"'text': pad_token_id=31, but its ids are 0 to 30"):
        ZipperModel(config)
    with pytest.raises(ValueError, match=r"no backbone given for towers \['speech'\]"):
        ZipperModel(model.config, {"text": tiny_backbone("llama", 31)})


def test_a_folder_that_is_none() -> None:
    with pytest.raises(ValueError, match="tower 'no/such': no such folder here"):
        ZipperModel.fuse({"text": TowerSpec(source="no/such"), "speech": tiny_backbone("gpt2", 53)})


def test_a_tower_alone_gets_all_its_inputs_where_it_is() -> None:
    """The mask stayed on the CPU: on a GPU every fusion with a trained tower failed before its first step."""
    model = tiny_model().to("meta")
    found: list[set[str]] = []

    class Seen(Exception):
        pass

    def see(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        found.append({v.device.type for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)})
        raise Seen

    for name in model.names:
        model.tower(name).backbone.register_forward_pre_hook(see, with_kwargs=True)
        with pytest.raises(Seen):
            model.unimodal_loss(name, [[4, 5, 6]])
    assert found == [{"meta"}] * 2


@pytest.mark.parametrize("frozen", [True, False])
def test_layers_are_computed_again_under_gradient_checkpointing(frozen: bool) -> None:
    """A frozen tower's layers were put into evaluation mode by a hook that ran before transformers asked for it: its
    activations were all kept, where there is most to save."""
    train = {} if frozen else {"text": "full"}
    towers = {"text": tiny_backbone("llama", 31), "speech": tiny_backbone("gpt2", 53)}
    model = ZipperModel.fuse(towers, zips=ZipSpec(layers=2), train=train)
    open_gates(model, 0.5)
    batch = collate(DOCUMENTS, model.specials)
    counts: dict[bool, list[int]] = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        counts[checkpointing] = [0] * 4
        hooks = []
        for place, layer in enumerate(model.tower("text").layers):

            def count(*_: object, of: list[int] = counts[checkpointing], place: int = place) -> None:
                of[place] += 1

            hooks.append(layer.mlp.register_forward_pre_hook(count))
        model(batch).loss.backward()
        for hook in hooks:
            hook.remove()
    assert counts[False][0] > 0
    assert counts[True] == [2 * n for n in counts[False]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_frozen_tower_drops_nothing_out_under_gradient_checkpointing(reentrant: bool) -> None:
    """Its layers are in training mode then, so that they checkpoint, and OPT's drop out in the layer itself."""
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    opt = OPTConfig(dropout=0.5, word_embed_proj_dim=32, vocab_size=31, **sizes)
    model = ZipperModel.fuse({"text": OPTForCausalLM(opt), "speech": tiny_backbone("gpt2", 53)}, zips=ZipSpec(layers=2))
    open_gates(model, 0.5)
    batch = collate(DOCUMENTS, model.specials)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(batch).loss.backward()
        return [p.grad.clone() for p in model.zips.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    layer = model.tower("text").layers[0]
    assert layer.training, "or it would not checkpoint"
    for _ in range(2):
        torch.testing.assert_close(gradients(), plain)
    assert layer.training
    model.eval()
    assert not layer.training
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "lfm2", "mamba"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_device_is_asked_nothing(kind: str, packing: bool) -> None:
    """Each question that a step asked a GPU made it run dry: some 25 of ours, and two or more of transformers', whether
    a mask has padding or documents share rows. A tensor on meta cannot answer any: that it is enough to compute with
    them shows that none is asked."""
    if packing and kind in ("lfm2", "mamba"):
        pytest.skip("runs on from one document into the next")
    model = tiny_model(3, gate=0.5, kinds={"text": kind}, train={"text": "full"}, handover_weight=1.0).train()
    documents = [
        doc(("text", [5, 6, 7]), ("speech", [8, 9]), target=True),
        doc(("speech", [4, 5, 6]), ("text", [3]), target=True),
        doc(("image", [5]), target=True),
        doc(("image", [6]), target=True),
    ]
    batch = collate(documents, model.specials, packing=packing)
    counts = model.target_counts(batch)
    sent = batch.to("meta")
    model.to("meta")
    assert model.target_counts(sent) == counts
    output = model(sent)
    output.loss.backward()
    assert output.losses.keys() == {"text", "speech", "image", "handover"}
