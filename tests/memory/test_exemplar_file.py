"""Copied exemplars in a file: written whole or not at all, checked before they are trusted."""

import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cl.memory.columns import stack_batches, stack_samples
from lightning_cl.memory.exemplar_file import ExemplarFile, adopt_exemplars, find_exemplars, write_exemplars

INDICES = torch.tensor([7, 2, 9])


def _write(folder, task=0, offset=0.0):
    folder.mkdir(exist_ok=True)
    columns = stack_samples([(torch.full((2,), index + offset), f"{index}") for index in INDICES.tolist()])
    return write_exemplars(folder, task, INDICES, columns, collated=False)


def _write_collated(folder):
    columns = stack_batches([[torch.stack([INDICES, INDICES], 1), INDICES * 10]])
    return write_exemplars(folder, 3, INDICES, columns, collated=True)


def test_samples_are_found_by_their_index_in_the_task(tmp_path):
    file = ExemplarFile(tmp_path / _write(tmp_path)["name"])
    assert len(file) == 3
    rows = file.rows_by_index(10)
    assert rows.tolist() == [-1, -1, 1, -1, -1, -1, -1, 0, -1, 2]
    for index in INDICES.tolist():
        image, name = file[int(rows[index])]
        assert (image.tolist(), name) == ([index] * 2, f"{index}")


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0])])
def test_many_samples_are_fetched_at_once(rows, tmp_path):
    file = ExemplarFile(tmp_path / _write(tmp_path)["name"])
    assert [name for _, name in file.__getitems__(rows)] == ["9", "7"]


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0])])
def test_rows_of_batches_are_fetched_as_a_batch(rows, tmp_path):
    file = ExemplarFile(tmp_path / _write_collated(tmp_path)["name"])
    pairs, tens = file.__getitems__(rows)
    assert pairs.tolist() == [[9, 9], [7, 7]]
    assert tens.tolist() == [90, 70]
    assert file.collated
    assert [part.tolist() for part in file[1]] == [[[2, 2]], [20]]


def test_the_record_says_what_is_in_the_file(tmp_path):
    record = _write(tmp_path)
    (path,) = tmp_path.iterdir()
    assert record == {"name": path.name, "sha256": record["sha256"], "bytes": path.stat().st_size}
    assert path.name == f"task_0-{record['sha256'][:12]}.pt"


def test_the_same_content_is_the_same_file(tmp_path, monkeypatch):
    first = _write(tmp_path / "a")
    monkeypatch.setattr(os, "getpid", lambda: 123456)
    assert _write(tmp_path / "b") == first
    assert _write(tmp_path / "a") == first
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_other_content_is_another_file_and_the_first_stays(tmp_path):
    first = _write(tmp_path)
    content = (tmp_path / first["name"]).read_bytes()
    assert _write(tmp_path, offset=0.5)["name"] != first["name"]
    assert (tmp_path / first["name"]).read_bytes() == content


def test_the_file_holds_no_more_than_its_samples(tmp_path):
    whole = torch.zeros(1000, 100)
    indices = torch.arange(1000)[:3]
    columns = stack_samples([(whole[0], 1), (whole[1], 2), (whole[2], 3)])
    record = write_exemplars(tmp_path, 0, indices, columns, collated=False)
    assert record["bytes"] < 3 * 100 * 4 + 4000


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        _write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_read_where_it_is_asked_for(tmp_path):
    columns = stack_samples([(torch.ones(64, 64) * i, i) for i in range(200)])
    record = write_exemplars(tmp_path, 0, torch.arange(200), columns, collated=False)
    file = ExemplarFile(tmp_path / record["name"])
    assert file[150][0].mean() == 150
    assert len(pickle.dumps(file)) < 1000  # workers get its path, not its content


def test_loader_workers_map_the_file_anew(tmp_path):
    file = ExemplarFile(tmp_path / _write(tmp_path)["name"])
    again = pickle.loads(pickle.dumps(file))
    assert again[1][1] == "2"
    assert again.rows_by_index(10).equal(file.rows_by_index(10))
    images = torch.cat([images for images, _ in DataLoader(file, batch_size=2, num_workers=1)])
    assert images[:, 0].tolist() == INDICES.tolist()


def test_the_path_may_be_a_string(tmp_path):
    assert len(ExemplarFile(str(tmp_path / _write(tmp_path)["name"]))) == 3


# ------------------------------------------------------------------ finding and adopting


def test_the_first_folder_that_has_the_file_counts(tmp_path):
    record = _write(tmp_path / "a")
    _write(tmp_path / "b")
    folders = [tmp_path / "nowhere", tmp_path / "b", tmp_path / "a"]
    assert find_exemplars(record, folders) == tmp_path / "b" / record["name"]


def test_a_file_that_is_in_no_folder_is_named_with_the_folders(tmp_path):
    record = _write(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=f"'{record['name']}' are missing.*one, .*two.*Keep the folder"):
        find_exemplars(record, [tmp_path / "one", tmp_path / "two"])


def test_a_folder_of_that_name_is_no_file(tmp_path):
    record = _write(tmp_path / "a")
    (tmp_path / "b" / record["name"]).mkdir(parents=True)
    assert find_exemplars(record, [tmp_path / "b", tmp_path / "a"]) == tmp_path / "a" / record["name"]


@pytest.mark.parametrize("place", [0, 100, -1])
def test_every_altered_byte_is_noticed(place, tmp_path):
    record = _write(tmp_path)
    path = tmp_path / record["name"]
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{record['name']}' are not those.*damaged or was altered"):
        find_exemplars(record, [tmp_path])


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_another_length_is_noticed(change, tmp_path):
    record = _write(tmp_path)
    path = tmp_path / record["name"]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or was altered"):
        find_exemplars(record, [tmp_path])


def _written_elsewhere(tmp_path):
    record = _write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    return tmp_path / "a" / record["name"], record, tmp_path / "b" / record["name"]


def test_adopting_links_the_file_into_the_folder(tmp_path):
    path, record, adopted = _written_elsewhere(tmp_path)
    adopt_exemplars(path, record, adopted.parent)
    assert adopted.samefile(path)


def test_adopting_copies_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    path, record, adopted = _written_elsewhere(tmp_path)
    adopt_exemplars(path, record, adopted.parent)
    assert adopted.read_bytes() == path.read_bytes()
    assert not adopted.samefile(path)
    assert list(adopted.parent.iterdir()) == [adopted]


def test_adopting_into_its_own_folder_does_nothing(tmp_path):
    record = _write(tmp_path)
    path = tmp_path / record["name"]
    adopt_exemplars(path, record, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_adopting_does_not_trust_a_file_that_is_there_already(tmp_path):
    path, record, adopted = _written_elsewhere(tmp_path)
    adopted.write_bytes(b"cut off")
    adopt_exemplars(path, record, adopted.parent)
    assert adopted.read_bytes() == path.read_bytes()
