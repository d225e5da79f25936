import pickle

import numpy as np
import pytest

from zipper_lm import Document, Segment
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import collate
from zipper_lm.data.encoding import encode_rows
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.tasks import build_document
from zipper_lm.data.token_ids import TokenIds


def test_they_are_a_list_that_takes_four_bytes_an_id() -> None:
    ids = TokenIds([3, 400, 5])
    assert ids == [3, 400, 5]
    assert ids != [3, 400]
    assert ids != "text"
    assert (len(ids), list(ids), ids[1], ids[-1], ids[:2], 400 in ids) == (3, [3, 400, 5], 400, 5, [3, 400], True)
    assert type(ids[1]) is int
    assert not TokenIds([])
    assert repr(ids) == "[3, 400, 5]"
    assert np.asarray(ids).dtype == np.int32
    assert np.array(ids, np.int64).tolist() == [3, 400, 5]
    assert pickle.loads(pickle.dumps(ids)) == ids
    with pytest.raises(ValueError, match=r"below 2\*\*31, got 2147483648"):
        TokenIds([1, 2**31])


def test_an_array_is_kept_as_it_is() -> None:
    array = np.arange(4, dtype=np.int32)
    assert np.shares_memory(np.asarray(TokenIds(array)), array)
    assert np.shares_memory(np.asarray(Segment("text", ids=TokenIds(array)).ids), array)


def test_rows_are_kept_in_four_bytes_an_id_and_their_batches_are_those_of_lists() -> None:
    """Rows were lists of Python numbers: 36 bytes a token, and read one by one on the way to every batch."""
    codec = TextCodec.train(["one two"], vocab_size=32)
    processor = ZipperProcessor({"text": codec, "spelled": codec})
    raw = [{"text": "one", "spelled": "two"}, {"text": "two one", "spelled": ""}]
    rows = encode_rows(processor, raw, ["text", "spelled"])
    assert all(isinstance(s.ids, TokenIds) for row in rows for s in row.values())
    lists = [{m: Segment(m, ids=list(s.ids)) for m, s in row.items()} for row in rows]
    kept, plain = (
        collate([build_document("spelled->text", row) for row in found], processor.specials) for found in (rows, lists)
    )
    for name, side in plain.items():
        for key, expected in side.items():
            assert kept[name][key].dtype == expected.dtype
            assert kept[name][key].equal(expected), key
    assert all(isinstance(s.ids, TokenIds) for d in encode_rows(processor, [Document(raw[0].items())], []) for s in d)
