import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zipper_lm import ZipSpec
from zipper_lm.fusion.zips import InputProjection, View, ZipLayer, _frequencies, rotate, sinusoid, with_neighbours

B, Q, M, D, S = 2, 5, 7, 24, 16


def layer(**kwargs: object) -> ZipLayer:
    torch.manual_seed(0)
    made = ZipLayer(ZipSpec(**{"gate_start": 0.5, **kwargs}), D, S).eval()  # type: ignore[arg-type]
    for linear in (made.o_proj, *([made.feed_forward[3]] if made.feed_forward else [])):
        if not linear.weight.any():  # an open gate comes with a silent output
            torch.nn.init.normal_(linear.weight, std=0.2)
    return made


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "hidden": torch.randn(B, Q, D),
        "source": torch.randn(B, M, S),
        "at": torch.arange(Q).expand(B, -1),
        "source_at": torch.arange(M).expand(B, -1),
        "visible": torch.rand(B, Q, M) < 0.5,
    }


@pytest.mark.parametrize("positions", ["none", "sinusoid", "rotary"])
def test_attention_is_what_its_map_says(positions: str) -> None:
    """SDPA against the same written out, through `attention_map`."""
    zip_layer, x = layer(positions=positions), inputs()
    x["visible"][0, 2] = False
    memory, view = zip_layer.remember(x["source"], x["source_at"]), View.of(x["visible"])
    update = zip_layer(x["hidden"], x["at"], memory, view)
    weights = zip_layer.attention_map(x["hidden"], x["at"], memory, view)
    assert (weights[~x["visible"][:, None].expand_as(weights)] == 0).all()
    assert torch.allclose(weights[1].sum(-1), torch.ones(4, Q))
    attended = (weights @ memory.values).transpose(1, 2).flatten(2)
    expected = math.tanh(0.5) * zip_layer.o_proj(attended)
    torch.testing.assert_close(update, expected)
    assert (update[0, 2] == 0).all()


@pytest.mark.parametrize("positions", ["none", "sinusoid", "rotary"])
def test_never_causal(positions: str) -> None:
    """The first query reads the last memory if it is visible."""
    zip_layer, x = layer(positions=positions), inputs()
    view = View.of(torch.ones(B, Q, M, dtype=torch.bool))
    before = zip_layer(x["hidden"], x["at"], zip_layer.remember(x["source"], x["source_at"]), view)
    x["source"][:, -1] = torch.randn(B, S)
    after = zip_layer(x["hidden"], x["at"], zip_layer.remember(x["source"], x["source_at"]), view)
    assert ((before - after).abs().amax(-1) > 1e-6).all()


def test_closed_gates_add_exactly_nothing() -> None:
    zip_layer, x = layer(gate_start=0.0, feed_forward=True), inputs()
    memory = zip_layer.remember(x["source"], x["source_at"])
    assert (zip_layer(x["hidden"], x["at"], memory, View.of(x["visible"])) == 0).all()


def test_what_is_added_is_scaled() -> None:
    """Of a zip the attention's part and the feed-forward's, which reads the stream with the former in it; of an input
    projection what is beside the stream."""
    x = inputs()
    plain, scaled, both = layer(), layer(), layer(feed_forward=True)
    scaled.scale = both.scale = 3.0
    both.load_state_dict(plain.state_dict(), strict=False)
    memory, view = plain.remember(x["source"], x["source_at"]), View.of(x["visible"])
    once, thrice, further = (each(x["hidden"], x["at"], memory, view) for each in (plain, scaled, both))
    torch.testing.assert_close(thrice, 3.0 * once)
    assert both.feed_forward is not None
    fed = 3.0 * both.feed_forward_gate(both.feed_forward(x["hidden"] + thrice))
    torch.testing.assert_close(further, torch.where(view.seen, thrice + fed, 0.0))
    projection = InputProjection(D, "residual", 3.0)
    torch.nn.init.normal_(projection.down.weight)
    added = projection(x["hidden"]) - x["hidden"]
    projection.scale = 1.0
    torch.testing.assert_close(added, 3.0 * (projection(x["hidden"]) - x["hidden"]), rtol=1e-4, atol=1e-4)


def test_positions_matter_only_where_asked_for() -> None:
    for positions in ("none", "sinusoid", "rotary"):
        zip_layer, x = layer(positions=positions), inputs()
        view = View.of(torch.ones(B, Q, M, dtype=torch.bool))
        updates = [
            zip_layer(x["hidden"], x["at"], zip_layer.remember(x["source"], x["source_at"].flip(1)[:, :M] * k), view)
            for k in (0, 1)
        ]
        assert torch.equal(*updates) == (positions == "none")


def test_rotary_depends_on_distance() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum()

    torch.testing.assert_close(score(3, 1), score(12, 10))
    assert not torch.isclose(score(3, 1), score(3, 2))


@pytest.mark.parametrize("positions", ["sinusoid", "rotary"])
def test_stretch_counts_both_streams_alike(positions: str) -> None:
    """`ZipSpec.stretch` was checked, measured, stored in the config and kept in the layer, and never used there: the
    first fifth of a long reader swept all of a short source, and text-to-speech did not start to learn."""
    x, view = inputs(), View.of(torch.ones(B, Q, M, dtype=torch.bool))

    def weights(stretch: float, at: torch.Tensor, source_at: torch.Tensor) -> torch.Tensor:
        zip_layer = layer(positions=positions, stretch=stretch)
        return zip_layer.attention_map(x["hidden"], at, zip_layer.remember(x["source"], source_at), view)

    at, source_at = x["at"], x["source_at"]
    torch.testing.assert_close(weights(4.0, at * 4, source_at), weights(1.0, at, source_at))
    torch.testing.assert_close(weights(0.25, at, source_at * 4), weights(1.0, at, source_at))
    assert not torch.allclose(weights(4.0, at, source_at), weights(1.0, at, source_at), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("queries", "memory", "stretch"), [(40, 8, 5.0), (8, 40, 0.2)])
def test_attention_starts_near_the_diagonal(queries: int, memory: int, stretch: float) -> None:
    """By positions alone, a query looks most at a place that is, on average, under half a coarse token off."""
    zip_layer = ZipLayer(ZipSpec(stretch=stretch), 128, S)
    remembered = zip_layer.remember(torch.zeros(1, memory, S), torch.arange(memory)[None])
    view = View.of(torch.ones(1, queries, memory, dtype=torch.bool))
    weights = zip_layer.attention_map(torch.zeros(1, queries, 128), torch.arange(queries)[None], remembered, view)
    off = weights[0].mean(0).argmax(-1) * stretch - torch.arange(queries)
    assert float(off.abs().mean()) < 0.5 * max(1.0, stretch)


def test_sinusoids() -> None:
    wave = sinusoid(torch.tensor([[0, 1, 7]]), 8, torch.float32)
    assert wave.shape == (1, 3, 8)
    torch.testing.assert_close(wave[..., :4] ** 2 + wave[..., 4:] ** 2, torch.ones(1, 3, 4))
    assert wave[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sinusoid(torch.tensor([3]), 9, torch.bfloat16).dtype == torch.bfloat16
    assert sinusoid(torch.tensor([3]), 9, torch.float32).shape == (1, 9)


@pytest.mark.parametrize(("width", "heads"), [(24, 5), (7, 1), (32, 4)])
def test_any_width_and_heads(width: int, heads: int) -> None:
    zip_layer = ZipLayer(ZipSpec(heads=heads, positions="rotary", gate_start=0.5), width, S)
    memory = zip_layer.remember(torch.randn(B, M, S), torch.arange(M).expand(B, -1))
    view = View.of(torch.ones(B, Q, M, dtype=torch.bool))
    assert zip_layer(torch.randn(B, Q, width), torch.arange(Q).expand(B, -1), memory, view).shape == (B, Q, width)


@pytest.mark.parametrize(("form", "linears"), [("linear", 1), ("relu", 1), ("mlp", 3)])
def test_projections(form: str, linears: int) -> None:
    projection = layer(projection=form).memory_projection
    assert sum(isinstance(m, torch.nn.Linear) for m in projection) == linears
    assert (projection(torch.randn(4, M, S), torch.zeros(4, M)) >= 0).all() == (form == "relu")


@pytest.mark.parametrize("positions", ["sinusoid", "rotary"])
@pytest.mark.parametrize("context", [0, 1, 2, 9])
def test_memory_grows(context: int, positions: str) -> None:
    """Token by token, a segment and the next one's begin: what was remembered of the last tokens lacked the neighbours
    that come now."""
    zip_layer, x = layer(context=context, positions=positions), inputs()
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(B, -1)
    whole = zip_layer.remember(x["source"], places)
    for cuts in ([0, 3, M], [0, 1, 2, 6, M], range(M + 1)):
        grown = None
        for begin, end in itertools.pairwise(cuts):
            grown = zip_layer.remember(x["source"][:, begin:end], places[:, begin:end], grown)
        assert grown is not None
        torch.testing.assert_close(grown.keys, whole.keys)
        torch.testing.assert_close(grown.values, whole.values)
        assert (grown.states is None) == (context == 0)
    alone = zip_layer.remember(x["source"][:, :4], places[:, :4])
    torch.testing.assert_close(whole.values[:, :, :4], alone.values)  # the next segment's tokens are no neighbours


def test_a_row_of_a_memory_grows_as_it_would_alone() -> None:
    """Requests are read together, padded on the left, and go on apart."""
    zip_layer, x = layer(context=2), inputs()
    for begin in (0, 2, 5, 6):
        places = (torch.arange(M) - begin).clamp(min=0)[None]
        together = zip_layer.remember(x["source"], places.expand(B, -1)).row(1, begin)
        alone = zip_layer.remember(x["source"][1:, begin:], places[:, begin:])
        more, at = x["source"][:1, :3], torch.arange(M - begin, M - begin + 3)[None]
        for one, other in ((together, alone), *[[zip_layer.remember(more, at, m) for m in (together, alone)]]):
            torch.testing.assert_close(one.keys, other.keys)
            torch.testing.assert_close(one.values, other.values)


def test_neighbours_are_of_one_segment() -> None:
    """Two segments between padding, and more neighbours on each side than there are tokens."""
    places = torch.tensor([[0, 0, 1, 2, 0, 1, 0]])
    segments = [None, 0, 0, 0, 1, 1, None]
    states = torch.arange(1.0, 8.0)[None, :, None]
    for count in (0, 1, 2, 8):
        found = with_neighbours(states, places, count)[0]
        for t in (1, 2, 3, 4, 5):
            around = range(t - count, t + count + 1)
            same = [0 <= u < 7 and segments[u] == segments[t] for u in around]
            assert found[t].tolist() == [float(u + 1) if yes else 0.0 for u, yes in zip(around, same)]


def test_a_neighbour_can_be_read_for_what_stands_beside_it() -> None:
    """What a token offers depends on neighbours as far as `context` says, and no further."""
    zip_layer, x = layer(context=2), inputs()
    before = zip_layer.remember(x["source"], x["source_at"])
    x["source"][:, 3] = torch.randn(B, S)
    after = zip_layer.remember(x["source"], x["source_at"])
    differs = (before.values - after.values).abs().amax((0, 1, 3)) > 1e-6
    assert differs.tolist() == [False, True, True, True, True, True, False]


def test_dropout_only_in_training() -> None:
    zip_layer, x = layer(dropout=0.5), inputs()
    memory, view = zip_layer.remember(x["source"], x["source_at"]), View.of(x["visible"])
    still = zip_layer(x["hidden"], x["at"], memory, view)
    assert torch.equal(still, zip_layer(x["hidden"], x["at"], memory, view))
    zip_layer.train()
    assert not torch.equal(still, zip_layer(x["hidden"], x["at"], memory, view))


@pytest.mark.parametrize("name", ["nonsense", "paged|eager", "flash_attention_2", "flex_attention"])
def test_attention_that_cannot_obey_a_mask(name: str) -> None:
    with pytest.raises(ValueError, match=rf"zip.attention '{name}' cannot be used.*sdpa"):
        layer(attention=name)


@pytest.mark.parametrize("positions", ["none", "sinusoid", "rotary"])
def test_eager_attention_is_the_same(positions: str) -> None:
    plain, same = layer(positions=positions), layer(positions=positions, attention="eager")
    same.load_state_dict(plain.state_dict())
    x = inputs()
    memories = [z.remember(x["source"], x["source_at"]) for z in (plain, same)]
    x["visible"][0, 2] = False
    view = View.of(x["visible"])
    updates = [z(x["hidden"], x["at"], m, view) for z, m in zip((plain, same), memories)]
    torch.testing.assert_close(*updates)
    assert updates[1].any()


def test_input_projections() -> None:
    x = torch.randn(2, 3, D)
    assert torch.equal(InputProjection(D, "residual")(x), x)
    assert (InputProjection(D, "paper")(x) >= 0).all()
    assert InputProjection(D, "paper")(x.bfloat16()).dtype == torch.bfloat16


def test_softmax_is_never_over_nothing() -> None:
    """Not every attention function answers an all-masked row with zeros: some with NaN."""
    visible = torch.tensor([[[False, False], [True, False]]])
    view = View.of(visible)
    assert view.allowed.tolist() == [[[[True, True], [True, False]]]]
    assert view.seen.tolist() == [[[False], [True]]]


def test_what_is_kept_of_frequencies_is_everybodys() -> None:
    """They are worked out once: first asked for under a tracer, or with another default dtype, they were a fake tensor,
    or bfloat16, for the rest of the process."""
    places, count = torch.tensor([[1000, 3]]), 13
    _frequencies.cache_clear()
    with FakeTensorMode() as mode:
        sinusoid(mode.from_tensor(places), 2 * count, torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            first = sinusoid(places, 2 * count, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = _frequencies(count, places.device)
    assert kept is _frequencies(count, places.device)
    assert (type(kept), kept.dtype, kept.is_inference()) == (torch.Tensor, torch.float32, False)
    _frequencies.cache_clear()
    assert torch.equal(first, sinusoid(places, 2 * count, torch.float32))
