"""Zipper from Python: fuse two decoders, train the zips for a moment, write both ways, save and load.

Runs offline on one core: the two "pre-trained" towers are tiny random models made here, so what they write is noise.
With real ones, put Hub ids or folders in their place and leave `codecs` out where the tower has its own.

    python examples/python_api.py
"""

import tempfile

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec

WORDS = {"one": 200, "two": 300, "three": 450, "four": 700}


def tone(text: str, seconds: float = 0.2, rate: int = 16_000) -> np.ndarray:
    """A "recording": each word is a tone of its own."""
    time = np.arange(int(seconds * rate)) / rate
    return np.concatenate([np.sin(2 * np.pi * WORDS[word] * time) for word in text.split()]).astype(np.float32)


def tiny_tower(codec: Codec) -> LlamaForCausalLM:
    """A small random decoder for a codec's ids."""
    config = LlamaConfig(
        vocab_size=codec.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def main(steps: int = 20) -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(0)
    texts = ["one two", "three four", "two two one", "four three one", "one", "four two"]
    codecs = {"text": TextCodec.train(texts, vocab_size=64), "speech": SpeechCodec.fit(map(tone, texts), units=8)}

    towers = {name: tiny_tower(codec) for name, codec in codecs.items()}  # or {"text": "path/or/hub-id", ...}
    model = ZipperModel.fuse(towers, codecs=codecs, zips=ZipSpec(layers=2))
    documents = [Document([("speech", tone(t)), Segment("text", t, target=True)]) for t in texts]
    documents += [Document([("text", t), Segment("speech", tone(t), target=True)]) for t in texts]
    batch = model.processor(documents)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    model.eval()
    settings = {"text": {"max_new_tokens": 8}, "speech": {"max_new_tokens": 20}}
    heard = model.generate([Document([("speech", tone("one two"))])], ["text"], settings=settings)
    said = model.generate([Document([("text", "three")])], ["speech"], settings=settings)
    print("text:", repr(heard[0][-1].value), "sound:", said[0][-1].value.shape, "loss:", round(losses[-1], 2))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = ZipperModel.from_pretrained(folder)
        assert torch.equal(again(batch).logits["text"], model(batch).logits["text"])
    return losses


if __name__ == "__main__":
    main()
