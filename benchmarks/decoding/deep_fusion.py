"""torchtune's DeepFusion. It is no longer developed: its last release asks for a torchao that is as old.

In a folder of their own, without what else they ask for:

    pip install --no-deps --target FOLDER torchtune==0.6.1 torchao==0.10.0 torchdata==0.11.0 omegaconf \\
        antlr4-python3-runtime==4.9.3 tiktoken sentencepiece blobfile kagglehub regex pycryptodomex lxml
    PYTHONPATH=FOLDER python benchmarks/decode.py
"""

from __future__ import annotations

import torch
from common.turns import device
from decoding.ours import Write
from decoding.sizes import BOS, EOS, PAD, Size, Tower
from torch import Tensor, nn


class _Given(nn.Module):
    """An encoder whose states are there already."""

    def forward(self, states: Tensor) -> Tensor:
        return states


def _decoder(text: Tower, every: int, memory: int) -> nn.Module:
    """Its own Llama with a gated cross-attention and feed-forward before every so many layers."""
    from torchtune.modules import (
        FeedForward,
        MultiHeadAttention,
        RMSNorm,
        RotaryPositionalEmbeddings,
        TanhGate,
        TransformerCrossAttentionLayer,
        TransformerDecoder,
        TransformerSelfAttentionLayer,
    )
    from torchtune.modules.model_fusion import FusionLayer

    width, head = text.width, text.width // text.heads
    places = RotaryPositionalEmbeddings(head, max_seq_len=4096)

    def linear(into: int, out: int) -> nn.Linear:
        return nn.Linear(into, out, bias=False)

    def attention(crossing: bool) -> MultiHeadAttention:
        keys = text.key_heads * head
        norms = {"q_norm": RMSNorm(head), "k_norm": RMSNorm(head)} if crossing else {"pos_embeddings": places}
        return MultiHeadAttention(
            embed_dim=width,
            num_heads=text.heads,
            num_kv_heads=text.key_heads,
            head_dim=head,
            q_proj=linear(width, width),
            k_proj=linear(width, keys),
            v_proj=linear(width, keys),
            output_proj=linear(width, width),
            max_seq_len=memory if crossing else 4096,
            is_causal=not crossing,
            **norms,
        )

    def feed_forward() -> FeedForward:
        up, down, gate = linear(width, text.inner), linear(text.inner, width), linear(width, text.inner)
        return FeedForward(gate_proj=gate, down_proj=down, up_proj=up)

    layers: list[nn.Module] = []
    for depth in range(text.layers):
        norms = {"sa_norm": RMSNorm(width), "mlp_norm": RMSNorm(width)}
        layer = TransformerSelfAttentionLayer(attention(crossing=False), feed_forward(), **norms)
        if (depth + 1) % every == 0:
            gates = {"ca_scale": TanhGate(), "mlp_scale": TanhGate()}
            norms = {"ca_norm": RMSNorm(width), "mlp_norm": RMSNorm(width)}
            crossed = TransformerCrossAttentionLayer(attention(crossing=True), feed_forward(), **norms, **gates)
            layer = FusionLayer(layer, crossed)
        layers.append(layer)
    return TransformerDecoder(
        tok_embeddings=nn.Embedding(text.ids, width),
        layers=layers,
        max_seq_len=4096,
        num_heads=text.heads,
        head_dim=head,
        norm=RMSNorm(width),
        output=linear(width, text.ids),
    )


def deep_fusion(size: Size, batch: int, compiled: bool) -> Write:
    """Its own decoder of this shape, with as many layers of cross-attention; a bare greedy loop around it.

    Raises:
        ImportError: where it is not installed, or does not go together with what is.
    """
    from torchtune.modules.model_fusion import DeepFusionModel

    torch.manual_seed(0)
    length = size.tokens + 1
    with torch.device(device()):
        decoder = _decoder(size.text, size.every, size.memory)
        model = DeepFusionModel(decoder, _Given()).to(size.dtype).eval()
        model.setup_caches(batch, size.dtype, encoder_max_seq_len=size.memory, decoder_max_seq_len=length)
        for name, parameter in model.named_parameters():
            if name.endswith("_scale.scale"):
                nn.init.constant_(parameter, 1.0)
        states = torch.randn(batch, size.memory, size.text.width, dtype=size.dtype)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = torch.ones(batch, 1, size.memory, dtype=torch.bool)
        places = torch.arange(length)
        start = torch.full((batch, 1), BOS)
        unwritten = torch.tensor([BOS, EOS, PAD])

    def step(ids: Tensor, mask: Tensor, place: Tensor, states: Tensor | None = None) -> Tensor:
        read = {"encoder_input": None if states is None else {"states": states}, "encoder_mask": seen}
        logits = model(ids, mask=mask, input_pos=place, **read)[:, -1]
        return logits.index_fill(1, unwritten, -torch.inf).argmax(-1, keepdim=True)

    further = torch.compile(step) if compiled else step

    @torch.no_grad()
    def write(tokens: int) -> list[list[int]]:
        if any(buffer.any() for name, buffer in model.named_buffers() if name.endswith("k_cache")):
            model.reset_caches()
        written = [start]
        for at in range(tokens):
            where = causal[at].expand(batch, 1, -1), places[at].expand(batch, 1)
            written.append(further(written[-1], *where) if at else step(start, *where, states))
        return torch.cat(written[1:], 1).tolist()

    return write
