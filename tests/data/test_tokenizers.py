"""Tokenizers: round trips, and bytes a token that sum to the bytes of the text."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from effjax import registry
from effjax.data.sources.stdlib import library_files
from effjax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

TRAINING_TEXT = "\n".join(
    library_files()[name].read_text("utf-8") for name in ("textwrap.py", "heapq.py", "string.py")
)
ALPHABET = list("abc XYZ\n\t  (){}=_09äß→漢😀")


def random_text(rng: np.random.Generator, length: int = 400) -> str:
    return "".join(rng.choice(ALPHABET, length))


@pytest.fixture(scope="module")
def byte_level_path(tmp_path_factory) -> str:
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TRAINING_TEXT], trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory) -> str:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT.split("\n")),
        model_prefix=str(prefix),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=3,
        minloglevel=2,
    )
    return f"{prefix}.model"


def test_bytes_round_trip_of_any_bytes(rng):
    tokenizer = ByteTokenizer()
    data = bytes(range(256)) + rng.bytes(10_000)  # hardly ever valid UTF-8
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.token_num_bytes[ids].sum() == len(data)


def test_bytes_round_trip_of_text_without_specials(rng):
    tokenizer = ByteTokenizer()
    text = random_text(rng)
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"  # the beginning of a character
    assert tokenizer.token_num_bytes.tolist() == [1] * 256 + [0] * 4


def test_huggingface_byte_level(byte_level_path, rng):
    tokenizer = HuggingFaceTokenizer(
        path=byte_level_path, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 500
    for text in (random_text(rng), TRAINING_TEXT[:5000]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
        assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())
    assert len(ids) < len(text) / 1.5  # it did merge
    assert tokenizer.token_num_bytes[:3].tolist() == [0, 0, 0]


def test_huggingface_special_tokens_in_a_text_are_text(byte_level_path):
    tokenizer = HuggingFaceTokenizer(path=byte_level_path, eos_token="</s>")
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a</s>b"
    assert tokenizer.token_num_bytes[ids].sum() == 6


def test_huggingface_roles_from_the_config_beside(byte_level_path, tmp_path):
    path = tmp_path / "tokenizer.json"
    shutil.copy(byte_level_path, path)
    bare = HuggingFaceTokenizer(path=str(path))
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, 0)
    roles = {"bos_token": None, "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    told = HuggingFaceTokenizer(path=str(path))
    assert (told.bos_id, told.eos_id, told.pad_id) == (None, 2, 0)
    overridden = HuggingFaceTokenizer(path=str(path), eos_token="<s>")
    assert overridden.eos_id == 1


def test_huggingface_metaspace_with_byte_fallback(tmp_path, rng):
    model = Model(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Replace(" ", "\u2581")
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *byte_tokens], show_progress=False
    )
    model.train_from_iterator(TRAINING_TEXT.split("\n"), trainer)
    # Training needs the byte tokens kept; in the file they are ordinary vocabulary, as in Llama's.
    spec = json.loads(model.to_str())
    spec["added_tokens"] = spec["added_tokens"][:1]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    tokenizer = HuggingFaceTokenizer(path=str(path))
    text = random_text(rng)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())


def test_sentencepiece(sentencepiece_path, rng):
    tokenizer = SentencePieceTokenizer(path=sentencepiece_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.vocab_size == 600
    for text in (random_text(rng), TRAINING_TEXT[:5000]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text.encode())) == text.encode()
        assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_num_bytes[:4].tolist() == [0, 0, 0, 0]


def test_all_follow_the_protocol_and_the_registry(byte_level_path, sentencepiece_path):
    for spec in (
        {"name": "bytes"},
        {"name": "huggingface", "path": byte_level_path},
        {"name": "sentencepiece", "path": sentencepiece_path},
    ):
        tokenizer = registry.build("tokenizer", spec)
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.token_num_bytes.shape == (tokenizer.vocab_size,)
        assert tokenizer.token_num_bytes.dtype == np.int32
        assert registry.describe(tokenizer).items() >= spec.items()


@pytest.mark.parametrize("name", ["huggingface", "sentencepiece"])
def test_missing_or_broken_file(name, tmp_path):
    with pytest.raises(ValueError, match=r"path is '.*nowhere', which is no file"):
        registry.build("tokenizer", {"name": name, "path": str(tmp_path / "nowhere")})
    broken = tmp_path / "broken"
    broken.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"path '.*broken' cannot be read"):
        _ = registry.build("tokenizer", {"name": name, "path": str(broken)}).vocab_size


def test_unknown_special_token(byte_level_path):
    with pytest.raises(ValueError, match="eos_token is '<end>'; valid: a token of"):
        HuggingFaceTokenizer(path=byte_level_path, eos_token="<end>")


def test_a_tokenizer_that_drops_text_has_no_bytes_a_token(tmp_path):
    model = Model(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.decoder = decoders.WordPiece()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(path=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"decoder \['WordPiece'\].*valid: ByteLevel"):
        _ = tokenizer.token_num_bytes
