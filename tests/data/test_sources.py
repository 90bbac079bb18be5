"""Sources: which documents they find, and how they are split."""

import itertools
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from effjax import data, registry
from effjax.data.sources import HuggingFaceDataset, StandardLibrary, TextFiles, TokenFiles
from effjax.data.splits import in_split, split_mask


def both(source):
    return list(source.documents("train")), list(source.documents("heldout"))


def test_splits_are_stable():
    # Recorded: a changed hash would move held-out text of earlier runs into training.
    names = [f"file{i}.py" for i in range(40)]
    heldout = [i for i, name in enumerate(names) if in_split(name, "heldout", 0.1)]
    assert heldout == [19, 23, 26, 31, 32, 33]
    assert np.flatnonzero(split_mask("a.txt", 40, "heldout", 0.1)).tolist() == [
        0,
        15,
        25,
        27,
        32,
        36,
    ]


def test_splits_are_a_partition_of_about_the_right_size(rng):
    key, count, fraction = str(rng.integers(1 << 60)), 20_000, float(rng.uniform(0.05, 0.5))
    masks = [split_mask(key, count, split, fraction) for split in ("train", "heldout")]
    assert (masks[0] ^ masks[1]).all()
    tolerance = 5 * np.sqrt(fraction * (1 - fraction) / count)
    assert abs(masks[1].mean() - fraction) < tolerance
    by_name = [in_split(f"{key}/{i}", "heldout", fraction) for i in range(count)]
    assert abs(np.mean(by_name) - fraction) < tolerance
    np.testing.assert_array_equal(split_mask(key, 100, "train", fraction), masks[0][:100])


def test_stdlib_is_the_library_without_tests_and_packages():
    train, heldout = both(StandardLibrary())
    root = Path(sysconfig.get_path("stdlib"))
    expected = [
        path.read_bytes()
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        & set(path.relative_to(root).parts)
        and not any(p.startswith(("config-", "_sysconfigdata")) for p in path.parts)
    ]
    assert sorted(train + heldout) == sorted(text for text in expected if text)
    assert (root / "ast.py").read_bytes() in train + heldout
    assert 0.03 < len(heldout) / len(train + heldout) < 0.2


def test_text_files_and_globs(corpus, tmp_path):
    texts = corpus(30)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.txt").write_bytes(b"deep")
    (tmp_path / "empty.txt").touch()
    paths = (str(tmp_path / "**" / "*.txt"), str(tmp_path / "d000.txt"))  # the same file twice
    train, heldout = both(TextFiles(paths=paths))
    assert sorted(train + heldout) == sorted([*texts.values(), b"deep"])
    assert len(heldout) >= 1


def test_text_split_does_not_depend_on_where_the_files_lie(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        folder.mkdir(parents=True)
        for index in range(30):
            (folder / f"{index}.txt").write_text(f"text {index}")
        found.append(both(TextFiles(paths=str(folder / "*.txt"), heldout_fraction=0.3)))
    assert found[0] == found[1]


def test_text_between_separators(tmp_path, rng):
    documents = [bytes(rng.integers(97, 123, int(n), np.uint8)) for n in rng.integers(10, 50, 200)]
    documents[3:150:7] = [b""] * 21
    (tmp_path / "a.txt").write_bytes(b"<|end|>".join(documents))
    train, heldout = both(TextFiles(paths=str(tmp_path / "a.txt"), separator="<|end|>"))
    filled = [document for document in documents if document]
    assert sorted(train + heldout) == sorted(filled)
    assert train == [document for document in filled if document in train]  # the order is kept
    assert heldout


def test_own_heldout_files(tmp_path):
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    source = TextFiles(
        paths=str(tmp_path / "train.txt"), heldout_paths=(str(tmp_path / "valid.txt"),)
    )
    assert both(source) == ([b"train.txt"], [b"valid.txt"])


def write_tokens(path: Path, documents, dtype: str, separator: int) -> None:
    flat = np.concatenate([[*document, separator] for document in documents])
    if path.suffix == ".npy":
        np.save(path, flat.astype(dtype))
    elif path.suffix == ".bin":
        flat.astype(np.dtype(dtype).newbyteorder("<")).tofile(path)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for document in documents:
            writer.write(document.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        writer.close()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("name", ["x.npy", "x.bin", "x.array_record"])
def test_token_files(tmp_path, rng, name, dtype):
    documents = [rng.integers(0, 256, int(n)) for n in rng.integers(1, 60, 100)]
    write_tokens(tmp_path / name, documents, dtype, separator=300)
    source = TokenFiles(paths=str(tmp_path / name), dtype=dtype, separator_id=300)
    train, heldout = both(source)
    assert {document.dtype for document in train} == {np.dtype(np.int32)}
    assert sorted(d.tolist() for d in train + heldout) == sorted(d.tolist() for d in documents)
    assert heldout
    # The same text as bytes gives the same batches: the ids here are bytes.
    config = {"source": registry.describe(source), "seq_len": 16, "batch_size": 2}
    batches = list(data.build(config, split="heldout"))
    assert sum(b["loss_mask"].sum() for b in batches) == sum(len(d) + 1 for d in heldout)
    assert sorted(data.documents(config, split="heldout")) == sorted(
        bytes(d.tolist()) for d in heldout
    )


def test_token_files_without_separator_are_one_document_each(tmp_path):
    for name, ids in (("a.npy", [1, 2]), ("b.npy", [3])):
        np.save(tmp_path / name, np.array(ids, np.uint16))
    source = TokenFiles(paths=str(tmp_path / "*.npy"), heldout_fraction=0.0)
    assert [d.tolist() for d in source.documents("train")] == [[1, 2], [3]]


@pytest.fixture
def json_files(tmp_path):
    for part in range(3):
        rows = [{"body": f"document {part} {row} " + "x" * row} for row in range(40)]
        rows.append({"body": ""})
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"part{part}.jsonl").write_text(lines)
    return {"name": "hf", "path": "json", "data_files": str(tmp_path / "*.jsonl"),
            "text_field": "body"}  # fmt: skip


def test_hugging_face_stream(json_files):
    train, heldout = both(registry.build("source", json_files))
    expected = [f"document {p} {r} {'x' * r}".encode() for p in range(3) for r in range(40)]
    assert sorted(train + heldout) == sorted(expected)
    assert 1 < len(heldout) < 40
    again = both(registry.build("source", json_files))
    assert again == (train, heldout)


def test_hugging_face_shards_cover_the_stream_once(json_files):
    documents = registry.build("source", json_files).documents("train")
    shards = [list(documents.shard(index, 3)) for index in range(3)]
    assert all(shards)
    assert sorted(itertools.chain(*shards)) == sorted(documents)


def test_hugging_face_stream_resumes_across_epochs(json_files):
    config = {"source": json_files, "seq_len": 32, "batch_size": 2, "shuffle_window": 64}
    iterator, states, batches = data.build(config, split="train"), [], []
    for _ in range(150):  # some two epochs
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator)["tokens"])
    for step in (0, 30, 77, 140):
        resumed = data.build(config, split="train")
        resumed.set_state(json.loads(states[step]))
        for expected in batches[step : step + 5]:
            np.testing.assert_array_equal(next(resumed)["tokens"], expected)


def test_hugging_face_own_heldout_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"a line of {split}\n")
    source = HuggingFaceDataset(path=str(tmp_path), heldout_split="test")
    assert both(source) == ([b"a line of train"], [b"a line of test"])
