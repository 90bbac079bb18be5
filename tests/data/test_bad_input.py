"""Bad input ends in one ValueError that names the field, the value and what is valid."""

import sys

import numpy as np
import pytest

from effjax import data


def refused(config, *fragments, split="train", **options):
    with pytest.raises(ValueError) as error:
        next(data.build(config, split=split, **options))
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("seq_len", 1, "2 or more"),
        ("batch_size", 0, "1 or more"),
        ("shuffle_window", 0, "1 or more"),
        ("shards", 0, "1 or more"),
        ("prefetch", -1, "0 or more"),
        ("retries", -1, "0 or more"),
        ("retry_seconds", -1.0, "0 or more"),
        ("seed", -1, "0 <= seed < 2**32"),
        ("seed", 2**32, "0 <= seed < 2**32"),
        ("seq_len", "long", "int"),
        ("batch_size", 2.5, "int"),
    ],
)
def test_field_out_of_range_or_of_the_wrong_type(field, value, valid):
    refused({field: value}, field, repr(value), valid)


def test_unknown_names_show_the_nearest():
    refused({"sequence_len": 8}, "'sequence_len'", "did you mean 'seq_len'")
    refused({"source": {"name": "stdlb"}}, "'stdlb'", "did you mean 'stdlib'")
    refused({"source": {"name": "stdlib", "heldout": 0.1}}, "'heldout'", "'heldout_fraction'")
    refused({"tokenizer": "byte"}, "'byte'", "did you mean 'bytes'")


def test_split_rows_and_shards():
    refused({}, "split is 'valid'", "'train', 'heldout'", split="valid")
    with pytest.raises(ValueError, match="split is 'test'; valid: 'train', 'heldout'"):
        data.documents({}, split="test")
    for rows in ([], [16], [-1], [2, 1], [3, 3]):
        refused(
            {}, f"rows is {rows}", "increasing numbers from 0 to batch_size - 1 = 15", rows=rows
        )
    refused({"shards": 3}, "batch_size is 16", "a multiple of shards = 3")


@pytest.mark.parametrize("name", ["stdlib", "stdlib_pairs"])
@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_heldout_fraction(name, fraction):
    refused({"source": {"name": name, "heldout_fraction": fraction}},
            f"heldout_fraction is {fraction}", "0 <= fraction < 1")  # fmt: skip


def test_an_empty_split():
    refused({"source": {"name": "stdlib", "heldout_fraction": 0.0}},
            "nothing in split 'heldout'", "another heldout_fraction", split="heldout")  # fmt: skip


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_paths_that_are_not_there(name, tmp_path):
    for paths in (str(tmp_path / "nowhere.npy"), str(tmp_path / "*.bin")):
        refused({"source": {"name": name, "paths": paths}},
                f"source '{name}': paths is {paths!r}", "matches no file")  # fmt: skip
    refused({"source": {"name": name, "paths": str(tmp_path)}}, "a folder", "globs such as")
    refused({"source": {"name": name, "paths": ()}}, "paths is empty")
    refused({"source": {"name": name}}, "missing field(s) 'paths'")


def test_text_without_text(tmp_path):
    (tmp_path / "empty.txt").touch()
    path = str(tmp_path / "empty.txt")
    refused({"source": {"name": "text", "paths": path}}, f"paths is {path!r}, without text")
    refused({"source": {"name": "text", "paths": path, "separator": "\n"}}, "without text")
    refused({"source": {"name": "text", "paths": path, "separator": ""}}, "separator is ''")


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("all the text there is")
    source = {"name": "text", "paths": str(tmp_path / "a.txt"), "heldout_fraction": 0.0}
    refused({"source": source}, "heldout_fraction is 0.0", "none of 1 document", "set separator",
            split="heldout")  # fmt: skip
    refused({"source": source, "shards": 2}, "shards is 2, with 1 document")


def test_token_files_that_are_none(tmp_path):
    def source(name, **changes):
        path = str(tmp_path / name)
        return {"source": {"name": "tokens", "paths": path, "heldout_fraction": 0.0, **changes}}

    np.save(tmp_path / "float.npy", np.zeros(4))
    refused(source("float.npy"), "float.npy", "dtype float64", "uint16, uint32, int32")
    np.save(tmp_path / "matrix.npy", np.zeros((2, 2), np.uint16))
    refused(source("matrix.npy"), "matrix.npy", "2 axes", "one axis")
    np.save(tmp_path / "none.npy", np.zeros(0, np.uint16))
    refused(source("none.npy"), "none.npy", "an empty array")
    np.save(tmp_path / "negative.npy", np.array([3, -7], np.int32))
    refused(source("negative.npy"), "negative.npy", "the id -7", "ids >= 0")
    (tmp_path / "text.npy").write_text("no array")
    refused(source("text.npy"), "text.npy", "cannot be read")
    (tmp_path / "odd.bin").write_bytes(b"123")
    refused(source("odd.bin"), "odd.bin", "3 bytes", "a multiple of 2 (dtype uint16)")
    (tmp_path / "empty.bin").touch()
    refused(source("empty.bin"), "empty.bin", "an empty file")
    (tmp_path / "a.txt").write_text("text")
    refused(source("a.txt"), "a.txt", "valid endings: .npy, .bin")
    refused(source("odd.bin", dtype="int64"), "dtype is 'int64'", "uint16, uint32, int32")
    refused(source("odd.bin", separator_id=-1), "separator_id is -1", "an id >= 0")


def test_token_ids_beyond_the_vocabulary(tmp_path):
    np.save(tmp_path / "large.npy", np.array([3, 50_000, 7], np.uint16))
    config = {
        "source": {
            "name": "tokens",
            "paths": str(tmp_path / "large.npy"),
            "heldout_fraction": 0.0,
        }
    }
    with pytest.raises(ValueError, match="has the id 50000; valid: ids below 260"):
        data.build(config, split="train")  # before the first batch


def test_hugging_face_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused({"source": {"name": "hf", "path": "json"}}, "datasets", "pip install effjax[hf]")


def test_hugging_face_dataset_or_column_that_is_not_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    source = {"name": "hf", "path": "json", "data_files": str(tmp_path / "a.jsonl")}
    refused({"source": source}, "text_field is 'text'", "valid: 'body'")
    missing = source | {"data_files": str(tmp_path / "b.jsonl")}
    refused({"source": missing}, "b.jsonl", "cannot be loaded")
    split = source | {"train_split": "dev", "text_field": "body"}
    refused({"source": split}, "split 'dev'", "cannot be loaded")
    nothing = source | {"text_field": "body", "heldout_fraction": 0.0}
    refused({"source": nothing}, "no text in split 'heldout'", split="heldout")


def test_generated_rows_beyond_the_vocabulary_or_asked_for_text():
    source = {"name": "associative_recall", "vocab_size": 512}
    refused({"source": source}, "has the id 511", "ids below 260")
    with pytest.raises(ValueError, match="has no text; valid: a source of documents or pairs"):
        data.documents({"source": source}, split="train")
