"""What fusing finds beside a backbone."""

from pathlib import Path

from tiny import tiny_backbone

from zipper_lm import ZipperModel


def test_no_tokenizer_no_codec(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer up for a folder without one."""
    for name, kind, vocab in (("text", "gpt2", 31), ("speech", "llama", 53)):
        tiny_backbone(kind, vocab).save_pretrained(tmp_path / name)
    model = ZipperModel.fuse({"text": tmp_path / "text", "speech": tmp_path / "speech"})
    assert model.processor is not None
    assert model.processor.codecs == {}
    assert model.specials["text"] == (0, 1, 2)
