"""Tokenizers: bytes, a Hugging Face `tokenizer.json`, and SentencePiece, under one protocol.

Besides encoding and decoding, each tells how many bytes of text a token stands for. That makes
models with different tokenizers comparable: bits per byte is the summed loss in bits over the
  summed `token_num_bytes` of the targets.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece
import tokenizers as hf_tokenizers

from effjax.registry import register

_SPACE = "\u2581"  # how SentencePiece-like vocabularies write a space


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline, the metrics and generation ask of a tokenizer.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      pad_id: id written where there is no text. Never rely on it: segment id 0 is what marks
        padding.
      bos_id: id put before a document, or None if the vocabulary has none.
      eos_id: id put after a document, or None if the vocabulary has none.
      token_num_bytes: int32 [vocab_size], the bytes of text a token stands for; 0 for special
        tokens.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def token_num_bytes(self) -> np.ndarray: ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text, int32 [n], without bos and eos."""

    def decode(self, ids: Any) -> str:
        """Text of a sequence of ids, special tokens left out, undecodable bytes shown as U+FFFD."""

    def decode_bytes(self, ids: Any) -> bytes:
        """UTF-8 bytes of a sequence of ids, special tokens left out."""


@register("tokenizer", "bytes")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text; 256 pads, 257 begins, 258 ends a document, 259
    masks.

    Any byte string is representable and `decode_bytes(encode(x)) == x`, invalid UTF-8 included.
    """

    vocab_size = 260
    pad_id = 256
    bos_id = 257
    eos_id = 258
    mask_id = 259

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Any) -> bytes:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()


@register("tokenizer", "huggingface")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    A `tokenizer.json` does not say which of its tokens begins, ends or pads a text. The fields say
    so; where they are None, a `tokenizer_config.json` beside the file does, and where that is
    missing too there is no such token. Special tokens spelled out in a text are encoded as ordinary
    text: a document cannot end itself.

    `token_num_bytes` is exact for byte-level vocabularies, and for SentencePiece-like ones up to
    the space that some of these put before a text (one byte a document). A vocabulary that drops or
    rewrites text, such as WordPiece, has no bytes a token; reading `token_num_bytes` of it raises
    ValueError.
    """

    path: str
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None

    def __post_init__(self):
        _require_file("tokenizer 'huggingface'", self.path)
        _ = (
            self.bos_id,
            self.eos_id,
            self.pad_id,
        )  # so that a token that is not there is found at once

    @functools.cached_property
    def _model(self) -> hf_tokenizers.Tokenizer:
        try:
            model = hf_tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the library raises plain Exception for any malformed file
            raise ValueError(
                f"tokenizer 'huggingface': path {self.path!r} cannot be read ({error}); "
                "valid: a tokenizer.json"
            ) from error
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        return model

    @functools.cached_property
    def vocab_size(self) -> int:
        # The largest id and not the count: vocabularies may have holes.
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._special("bos_token")

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._special("eos_token")

    @functools.cached_property
    def pad_id(self) -> int:
        return _first_known(self._special("pad_token"), self.eos_id)

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        spec = json.loads(self._model.to_str())
        decoders = _decoder_types(spec.get("decoder"))
        if "ByteLevel" in decoders:
            measure: Callable[[str], int] = len  # each character of a token stands for one byte
        elif decoders & {"Metaspace", "Replace", "ByteFallback"}:
            measure = _bytes_of_piece
        else:
            raise ValueError(
                f"tokenizer 'huggingface': path {self.path!r} has decoder "
                f"{sorted(decoders) or None}, which does not say how many bytes a token stands "
                "for; valid: ByteLevel, Metaspace, Replace, ByteFallback"
            )
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._model.get_vocab(with_added_tokens=False).items():
            sizes[index] = measure(token)
        for added in spec.get("added_tokens", ()):
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes

    def encode(self, text: str | bytes) -> np.ndarray:
        encoding = self._model.encode(_as_str(text), add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Any) -> str:
        return self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def decode_bytes(self, ids: Any) -> bytes:
        return self.decode(ids).encode()

    def _special(self, role: str) -> int | None:
        token = getattr(self, role)
        beside = Path(self.path).with_name("tokenizer_config.json")
        if token is None and beside.is_file():
            token = json.loads(beside.read_text("utf-8")).get(role)
            token = token["content"] if isinstance(token, dict) else token
        if token is None:
            return None
        index = self._model.token_to_id(token)
        if index is None:
            raise ValueError(
                f"tokenizer 'huggingface': {role} is {token!r}; valid: a token of {self.path!r}"
            )
        return index


@register("tokenizer", "sentencepiece")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer:
    """A SentencePiece `.model` file (Kudo and Richardson, 2018, arXiv:1808.06226).

    `token_num_bytes` is exact for models with byte fallback that normalise by `identity`, keep
    extra white space and add no space before a text; each document counts one byte too many where
    the model adds that space.
    """

    path: str

    def __post_init__(self):
        _require_file("tokenizer 'sentencepiece'", self.path)
        _ = self._model

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_file=self.path)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"tokenizer 'sentencepiece': path {self.path!r} cannot be read ({error}); "
                "valid: a SentencePiece model"
            ) from error

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    @functools.cached_property
    def bos_id(self) -> int | None:
        return _none_if_negative(self._model.bos_id())

    @functools.cached_property
    def eos_id(self) -> int | None:
        return _none_if_negative(self._model.eos_id())

    @functools.cached_property
    def pad_id(self) -> int:
        return _first_known(_none_if_negative(self._model.pad_id()), self.eos_id)

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        model = self._model
        sizes = np.zeros(self.vocab_size, np.int32)
        for index in range(self.vocab_size):
            if not (model.is_control(index) or model.is_unknown(index) or model.is_unused(index)):
                piece = model.id_to_piece(index)
                sizes[index] = 1 if model.is_byte(index) else _bytes_of_piece(piece)
        return sizes

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.asarray(self._model.encode(_as_str(text)), np.int32)

    def decode(self, ids: Any) -> str:
        return self._model.decode(np.asarray(ids).tolist())

    def decode_bytes(self, ids: Any) -> bytes:
        return self.decode(ids).encode()


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)


def _as_str(text: str | bytes) -> str:
    return text if isinstance(text, str) else bytes(text).decode("utf-8", "replace")


def _bytes_of_piece(piece: str) -> int:
    """Bytes of a SentencePiece-like piece: a marked space is one byte, and so is `<0xAB>`."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace(_SPACE, " ").encode())


def _decoder_types(decoder: dict | None) -> set[str]:
    """Types of a `tokenizers` decoder, those inside a Sequence included."""
    if decoder is None:
        return set()
    nested = (_decoder_types(part) for part in decoder.get("decoders", ()))
    return {decoder["type"]}.union(*nested)


def _require_file(where: str, path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{where}: path is {path!r}, which is no file; valid: an existing file")


def _none_if_negative(index: int) -> int | None:
    return None if index < 0 else index


def _first_known(*candidates: int | None) -> int:
    """The first candidate that is there, or 0: any id can pad, as segment id 0 masks it."""
    return next((index for index in candidates if index is not None), 0)
