"""The text codec, on tokenizers made here."""

import contextlib
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as tokenizer_decoders
from transformers import PreTrainedTokenizerFast

from zipper_lm.codecs.codec import Codec, codec_hash, load_codec, make_codec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.generation.bare import chat_prompt

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "three one four", "it's a dog's life, isn't it?"]


@pytest.fixture(scope="module")
def codec():
    return TextCodec.train(TEXTS, vocab_size=64)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|end|>")


def test_it_is_a_codec(codec):
    assert isinstance(codec, Codec)
    assert codec.kind == "text"
    assert codec.rate is None


@pytest.mark.parametrize("text", [*TEXTS, "", "fox", "dog three fox fox", "a , b ?"])
def test_normalised_text_comes_back(codec, text):
    (ids,) = codec.encode([text])
    assert codec.decode([ids]) == [text]
    assert all(0 <= i < codec.vocab_size for i in ids)
    assert not {codec.bos_id, codec.eos_id, codec.pad_id} & set(ids)


def test_case_and_space_are_normalised(codec):
    assert codec.decode(codec.encode(["  The QUICK\n\tfox "])) == ["the quick fox"]


def test_case_is_kept_on_request():
    codec = TextCodec.train(["The Fox"], vocab_size=32, lower=False)
    assert codec.decode(codec.encode(["The Fox"])) == ["The Fox"]


def test_training_is_repeatable_and_merges(codec):
    again = TextCodec.train(TEXTS, vocab_size=64)
    assert again.tokenizer.get_vocab() == codec.tokenizer.get_vocab()
    assert codec.vocab_size == 64
    assert len(codec.encode(["the"])[0]) < 3


@pytest.mark.parametrize("text", ["naïve", "fox 3", "猫", "a\x00b", "<s>", "under▁score"])
def test_lacking_characters_are_named(codec, text):
    lacking = next(c for c in text if c not in "".join(TEXTS))
    with pytest.raises(ValueError, match="text 1: the tokenizer lacks") as caught:
        codec.encode(["fox", text])
    assert repr(lacking) in str(caught.value)


def test_lacking_characters_are_named_without_an_unknown_token():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    assert codec.encode(["ab"]) == [[0, 1]]
    with pytest.raises(ValueError, match=r"lacks \['c'\]"):
        codec.encode(["abc"])


def test_lacking_words_are_named():
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="two"):
        TextCodec(fast).encode(["one two"])


def test_byte_level_tokenizers_lack_nothing():
    codec = TextCodec(byte_level())
    texts = ["naïve 猫 🐈\n two  spaces ", "<|end|>", "\x00"]
    assert codec.decode(codec.encode(texts)) == texts
    assert codec.eos_id not in codec.encode(["<|end|>"])[0]


def test_missing_bos_and_pad_fall_back_to_eos():
    codec = TextCodec(byte_level())
    assert codec.bos_id == codec.pad_id == codec.eos_id == 256
    assert codec.vocab_size == 257


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        TextCodec(tokenizer)


def test_special_tokens_are_not_decoded(codec):
    (ids,) = codec.encode(["fox"])
    assert codec.decode([[codec.bos_id, *ids, codec.eos_id, codec.pad_id]]) == ["fox"]


@pytest.mark.parametrize("values", [[3], [None], "fox", [b"fox"]])
def test_what_is_no_string_is_refused(codec, values):
    with pytest.raises(ValueError, match=r"must be a (string|list)"):
        codec.encode(values)


def test_half_a_pair_is_refused(codec):
    with pytest.raises(ValueError, match="text 0 holds half"):
        codec.encode(["fox\ud800"])


def test_composed_characters_are_named_whole(codec):
    with pytest.raises(ValueError, match="\\['á'\\]"):
        codec.encode(["a\u0301"])


@pytest.mark.parametrize("bad", [-1, 64])
def test_ids_out_of_range_are_refused(codec, bad):
    with pytest.raises(ValueError, match=rf"row 1: id {bad} is not in \[0, 64\)"):
        codec.decode([[0], [bad]])


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_training_needs_text(texts):
    with pytest.raises(ValueError, match="no characters"):
        TextCodec.train(texts)


def test_training_needs_room_for_the_alphabet():
    with pytest.raises(ValueError, match="at least 8"):
        TextCodec.train(["abc"], vocab_size=7)
    assert TextCodec.train(["abc"], vocab_size=8).vocab_size == 8


def test_saved_codec_is_the_same(codec, tmp_path):
    (tmp_path / "kept.txt").write_text("x")
    codec.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "codec.json").read_text()) == {"kind": "text"}
    assert (tmp_path / "kept.txt").is_file()
    assert not list(tmp_path.glob(".*"))
    for again in (TextCodec.from_pretrained(tmp_path), load_codec(tmp_path)):
        assert again.encode(TEXTS) == codec.encode(TEXTS)
        assert again.decode(codec.encode(TEXTS)) == TEXTS
        assert (again.bos_id, again.eos_id, again.pad_id) == (codec.bos_id, codec.eos_id, codec.pad_id)


def test_plain_tokenizer_folder_is_read(codec, tmp_path):
    codec.tokenizer.save_pretrained(tmp_path)
    assert TextCodec.from_pretrained(tmp_path).encode(TEXTS) == codec.encode(TEXTS)


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        TextCodec.from_pretrained(tmp_path)
    (tmp_path / "codec.json").write_text('{"kind": "speech"}')
    with pytest.raises(ValueError, match="kind is 'speech'"):
        TextCodec.from_pretrained(tmp_path)


def test_failed_saving_leaves_nothing(codec, tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(codec.tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        codec.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_a_chat_template_only(tmp_path):
    """It says neither how a text begins nor how it ends: the recipe names what ends a turn; the template stays."""
    tokenizer = byte_level()
    tokenizer.eos_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ bos_token }}<|turn|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="no eos_token, so a segment could never end; name one of its tokens"):
        make_codec("text", source=str(tmp_path / "tokenizer"))
    codec = make_codec("text", source=str(tmp_path / "tokenizer"), eos_token="<|end|>")
    codec.save_pretrained(tmp_path / "codec")
    for each in (codec, load_codec(tmp_path / "codec")):
        assert each.bos_id == each.pad_id == each.eos_id
        turn = each.tokenizer.convert_tokens_to_ids("<|turn|>")
        asked = chat_prompt(each, [{"role": "user", "content": "a b"}])
        assert asked == [turn, *each.encode(["a b"])[0], each.eos_id, turn]
        assert each.decode(each.encode(["<|end|>"])) == ["<|end|>"]  # text is only text


def test_a_tokenizer_without_eos_takes_the_token_that_the_recipe_names(tmp_path):
    """As those of some protein and DNA models, which end a sequence by a token they do not call EOS."""
    words = {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, "[UNK]": 3, "L": 4, "A": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    source = str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"no eos_token.*options: \{eos_token:"):
        make_codec("text", source=source)
    codec = make_codec("text", source=source, eos_token="[SEP]", bos_token="[CLS]", pad_token="[PAD]")
    codec.save_pretrained(tmp_path / "codec")
    for each in (codec, load_codec(tmp_path / "codec")):
        assert (each.bos_id, each.eos_id, each.pad_id, each.vocab_size) == (0, 1, 2, 6)
        assert each.encode(["LAL"]) == [[4, 5, 4]]
        assert each.decode([[0, 4, 1, 2]]) == ["L"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 64}, r"\['vocab_size'\] have no effect: the tokenizer of"),
        ({"eos_tokn": "[SEP]"}, r"\['eos_tokn'\] have no effect"),
        ({"eos_token": "</nope>"}, r"has no such tokens: \{'eos_token': '</nope>'\}"),
    ],
)
def test_options_that_a_made_tokenizer_does_not_heed_are_refused(codec, tmp_path, options, says):
    """transformers takes any argument: a size or a slip of the pen had no effect, and a token that was none of the
    tokenizer's became a new id, beyond the tower's vocabulary."""
    codec.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        make_codec("text", source=str(tmp_path), **options)
    assert make_codec("text", source=str(tmp_path), local_files_only=True).vocab_size == codec.vocab_size


def test_code_of_a_tokenizer_runs_only_when_the_caller_says_so(tmp_path, monkeypatch):
    """Where nobody said anything transformers asked at the terminal, and took a stray "y" for consent."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, mark = tmp_path / "odd", tmp_path / "ran"
    TextCodec.train(["one two"], vocab_size=32).save_pretrained(folder)
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    code += "import transformers\nclass OddTokenizer(transformers.PreTrainedTokenizerFast): pass\n"
    (folder / "odd.py").write_text(code)
    file = folder / "tokenizer_config.json"
    said = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    for load in (TextCodec.from_pretrained, load_codec):
        with contextlib.suppress(ValueError):
            load(folder)
        assert not mark.exists()
    load_codec(folder, trust_remote_code=True)
    assert mark.exists()


def large(folder, **more):
    """A tokenizer of bytes with some merges, as a pre-trained LLM has it, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"] |= more
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made.save_pretrained(folder)
    return len(state["model"]["merges"])


@pytest.mark.parametrize("ignore", [False, True], ids=["merges", "words looked up"])
def test_fewer_merges_are_smaller_pieces_with_ids_of_the_same_meaning(tmp_path, ignore):
    """A frozen LLM's tokens were seen too seldom in the pairs: a quarter of them fewer than ten times in 10 000."""
    known = large(tmp_path / "llm", ignore_merges=ignore)
    made = {n: make_codec("text", source=str(tmp_path / "llm"), merges=n) for n in (0, 9, known)}
    plain = make_codec("text", source=str(tmp_path / "llm"))
    texts = [*TEXTS, "an unseen ünïcode word", "</s> <|end|>"]
    lengths = {n: sum(map(len, codec.encode(texts))) for n, codec in made.items()}
    assert lengths[0] == sum(len(text.encode()) for text in texts), "bytes alone"
    assert lengths[0] > lengths[9] > lengths[known]
    for codec in made.values():
        assert codec.decode(codec.encode(texts)) == texts
        assert codec.decode(plain.encode(texts)) == texts, "whatever a tower writes is read"
        assert (codec.vocab_size, codec.eos_id) == (plain.vocab_size, plain.eos_id)
        assert codec.plain.encode(texts) == plain.encode(texts)
        message = [{"role": "user", "content": TEXTS[0]}]
        assert chat_prompt(codec, message) == chat_prompt(plain, message), "what it is asked as itself is as it was"
    assert plain.plain is plain


def test_how_many_merges_there_were_is_saved(tmp_path):
    large(tmp_path / "llm")
    codec = TextCodec.from_pretrained(tmp_path / "llm", merges=9)
    codec.save_pretrained(tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.merges == 9
    assert again.encode(TEXTS) == codec.encode(TEXTS) != codec.plain.encode(TEXTS)
    assert codec_hash(again) == codec_hash(codec) != codec_hash(codec.plain), "prepared ids are of one of them"


@pytest.mark.parametrize("merges", [-1, 10**6, True, "9", 1.5])
def test_as_many_merges_as_there_are(tmp_path, merges):
    large(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"has \d+ merges: merges must be a whole number from 0 to"):
        make_codec("text", source=str(tmp_path / "llm"), merges=merges)


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "<|end|>": 1}, unk_token="<|end|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>").save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="no merges, which merges=9 counts: it is no BPE, but WordLevel"):
        make_codec("text", source=str(tmp_path / "words"), merges=9)
