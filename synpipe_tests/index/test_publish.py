"""The LanceDB table: complete indexes find the true neighbours, and the tag `current` is correct at every moment."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from synpipe.errors import SynpipeError
from synpipe.index import build as index_build
from synpipe.index import publish as index
from synpipe.index import recall as index_recall
from synpipe.index.build import partitions_for
from synpipe.index.publish import IndexReport, open_current, publish, published, republish, tag_for
from synpipe_tests.support.tables import PROVENANCE, clustered, embedding_table, unit

import lancedb  # isort: skip  # after `index`, which silences its log

LABELS = ("acetylcholine", "gaba", None)


def publish_table(path: Path, folder: Path, version: str) -> IndexReport:
    return publish(path, folder, "tiny", version, lambda line: None)


def labels(count: int) -> list[str | None]:
    return [LABELS[row % 3] for row in range(count)]


def ids_near(folder: Path, query: np.ndarray, nprobes: int) -> list[int]:
    search = open_current(folder, "tiny").search(query.astype(np.float32)).distance_type("cosine")
    return search.nprobes(nprobes).limit(10).to_arrow()["synapse_id"].to_pylist()


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, IndexReport]:
    """A published table of 400 rows, its vectors and the report."""
    folder = tmp_path_factory.mktemp("flat")
    vectors = clustered(400, 32)
    report = publish_table(
        embedding_table(folder / "t.parquet", vectors, 3, neurotransmitter=labels(400)), folder / "db", "a" * 32
    )
    return folder / "db", vectors, report


@pytest.fixture(scope="module", params=[(5_000, 16), (20_000, 64)], ids=["5,000", "20,000"])
def partitioned(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, IndexReport]:
    rows, dimensions = request.param
    folder = tmp_path_factory.mktemp("partitioned")
    vectors = clustered(rows, dimensions)
    report = publish_table(
        embedding_table(folder / "t.parquet", vectors, 3, neurotransmitter=labels(rows)), folder / "db", "b" * 32
    )
    return folder / "db", vectors, report


def test_small_tables_are_scanned_and_exact(flat: tuple[Path, np.ndarray, IndexReport]) -> None:
    folder, vectors, report = flat
    assert (report.kind, report.partitions, report.rows, report.recall) == ("flat", 0, 400, 1.0)
    similarity = unit(vectors) @ unit(vectors).T
    for query in range(0, 400, 20):
        expected = np.argsort(-similarity[query])[:10]
        assert sorted(ids_near(folder, vectors[query], report.nprobes)) == sorted(expected.tolist())


def test_partitioned_tables_find_the_true_neighbours(partitioned: tuple[Path, np.ndarray, IndexReport]) -> None:
    folder, vectors, report = partitioned
    assert report.kind == "IVF_FLAT" and report.partitions == partitions_for(len(vectors))
    assert report.nprobes <= report.partitions
    # Rows are indexed in segments. Only the merged segment and the seven other indexes are left.
    table = open_current(folder, "tiny").to_lance()
    assert len(table.get_fragments()) > 1
    assert len(list((folder / "tiny.lance" / "_indices").iterdir())) == 8
    exact = unit(vectors)
    # The queries differ from those that chose the number of probes: they lie between two rows.
    random = np.random.default_rng(7)
    hits = []
    for _ in range(100):
        query = exact[random.integers(len(exact), size=2)].sum(axis=0)
        expected = np.argpartition(-(exact @ query), 10)[:10].tolist()
        hits.append(len(set(expected) & set(ids_near(folder, query, report.nprobes))) / 10)
    assert np.mean(hits) >= 0.95
    for row in range(0, len(exact), 500):
        expected = np.argpartition(-(exact @ exact[row]), 10)[:10].tolist()
        hits.append(len(set(expected) & set(ids_near(folder, exact[row], report.nprobes))) / 10)
    assert np.mean(hits[100:]) >= 0.99


def test_segments_are_merged_in_groups_and_none_is_left(tmp_path: Path, monkeypatch) -> None:
    for name, value in (("FLAT_ROWS", 8), ("SAMPLE_RATE", 2), ("MERGED_AT_ONCE", 2)):
        monkeypatch.setattr(index_build, name, value)
    report = publish_table(embedding_table(tmp_path / "t.parquet", clustered(24, 16)), tmp_path / "db", "a" * 32)
    assert (
        len(open_current(tmp_path / "db", "tiny").to_lance().get_fragments()) == 3
    )  # two segments are merged first, and the third one waits
    assert (report.partitions, report.recall) == (4, 1.0)
    assert len(list((tmp_path / "db" / "tiny.lance" / "_indices").iterdir())) == 8


def rare_and_scattered(rows: int = 6_000, rare: int = 60) -> tuple[np.ndarray, list[str]]:
    """Tight clusters of a frequent class and a rare class scattered between them, with neighbours in many partitions."""
    vectors = clustered(rows, 16, clusters=60, spread=0.05)
    vectors[:rare] = np.random.default_rng(3).normal(size=(rare, 16))
    return vectors, ["octopamine"] * rare + ["gaba"] * (rows - rare)


@pytest.mark.slow
def test_the_probes_are_enough_for_the_rarest_class_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_recall, "FIRST_NPROBES", 1)
    monkeypatch.setattr(index_recall, "RECALL_QUERIES", 60)  # all rows of the rarest class
    vectors, classes = rare_and_scattered()
    path = embedding_table(tmp_path / "t.parquet", vectors, neurotransmitter=classes)
    report = publish_table(path, tmp_path / "db", "a" * 32)
    assert report.rarest_class == "octopamine"
    assert report.rarest_class_recall is not None and report.rarest_class_recall >= index_recall.MIN_RECALL
    assert published(tmp_path / "db", "tiny") == report
    found = [
        len(
            {*np.argpartition(-(unit(vectors) @ unit(vectors)[row]), 10)[:10]}
            & {*ids_near(tmp_path / "db", vectors[row], report.nprobes)}
        )
        for row in range(60)
    ]
    assert np.mean(found) >= 9.5  # not 10, because the table holds rounded vectors
    # Without the rare class fewer probes are enough: the frequent class finds its neighbours in one partition.
    of_all = embedding_table(tmp_path / "all.parquet", vectors)
    unlabelled = publish_table(of_all, tmp_path / "db", "b" * 32)
    assert (unlabelled.rarest_class, unlabelled.rarest_class_recall) == (None, None)
    assert unlabelled.nprobes < report.nprobes


def test_too_low_a_recall_of_the_rarest_class_leaves_the_former_version_current(
    before: Path, tmp_path: Path, monkeypatch
):
    vectors, classes = rare_and_scattered()
    path = embedding_table(tmp_path / "t.parquet", vectors, neurotransmitter=classes)
    measured = index_recall._recall
    monkeypatch.setattr(index_recall, "FIRST_NPROBES", 64)  # all partitions, so no larger number is tried
    monkeypatch.setattr(
        index_recall, "_recall", lambda table, queries, *of: measured(table, queries, *of) * (len(queries) > 60)
    )
    with pytest.raises(SynpipeError, match=r"0\.0% of the true neighbours of octopamine"):
        publish_table(path, before, "b" * 32)


def test_a_version_of_before_the_rarest_class_was_measured_still_opens(tmp_path: Path) -> None:
    path = embedding_table(tmp_path / "t.parquet", clustered(90, 16), neurotransmitter=["gaba"] * 90)
    report = publish_table(path, tmp_path / "db", "a" * 32)
    assert (report.rarest_class, report.rarest_class_recall) == ("gaba", 1.0)
    table = lancedb.connect(tmp_path / "db").open_table("tiny")
    former = {"synpipe.nprobes": "1", "synpipe.recall_at_10": "1.0000"}
    table.replace_field_metadata("vector", former)
    table.tags.update("current", table.version)
    found = published(tmp_path / "db", "tiny")
    assert (found.recall, found.rarest_class, found.rarest_class_recall) == (1.0, None, None)


def test_every_index_is_there_and_whole(partitioned: tuple[Path, np.ndarray, IndexReport]) -> None:
    folder, vectors, _ = partitioned
    found = {entry.columns[0]: entry for entry in open_current(folder, "tiny").list_indices()}
    assert {column: str(entry.index_type) for column, entry in found.items()} == {
        "vector": "IvfFlat",
        "neurotransmitter": "Bitmap",
        "region": "Bitmap",  # here and below: columns that contain only nulls
        "hemilineage": "Bitmap",
        "predicted_neurotransmitter": "Bitmap",
        "split": "Bitmap",
        "synapse_id": "BTree",
        "neuron_id": "BTree",
    }
    assert {entry.num_indexed_rows for entry in found.values()} == {len(vectors)}
    assert {entry.num_unindexed_rows for entry in found.values()} == {0}


def test_indexed_columns_can_be_filtered(partitioned: tuple[Path, np.ndarray, IndexReport]) -> None:
    folder, vectors, _ = partitioned
    table = open_current(folder, "tiny")
    expected = labels(len(vectors))
    assert table.count_rows("neurotransmitter = 'gaba'") == expected.count("gaba")
    assert table.count_rows("neurotransmitter IS NULL") == expected.count(None)
    assert table.count_rows("region IS NULL") == len(vectors)
    assert table.count_rows("region = 'AL'") == 0
    assert table.search().where("synapse_id = 4321").to_arrow()["synapse_id"].to_pylist() == [4321]


def test_the_table_holds_exactly_the_rows_of_the_file(tmp_path: Path) -> None:
    vectors = clustered(300, 32)
    path = embedding_table(
        tmp_path / "t.parquet", vectors, 2, synapse_id=2**63 - 1 - np.arange(300), neurotransmitter=labels(300)
    )
    publish_table(path, tmp_path / "db", "a" * 32)
    source = pq.read_table(path).sort_by("synapse_id")
    found = open_current(tmp_path / "db", "tiny").to_arrow().sort_by("synapse_id")
    assert found.column_names == source.column_names
    for name in source.column_names:
        assert found.schema.field(name).type == source.schema.field(name).type
        if name != "vector":
            assert found[name].to_pylist() == source[name].to_pylist()
    stored = np.array(found["vector"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)  # exactly of unit length again
    np.testing.assert_allclose(stored, unit(np.array(source["vector"].to_pylist())), atol=1e-6)


def test_the_report_can_be_read_back_and_names_the_data_and_the_encoder(flat) -> None:
    folder, _, report = flat
    assert published(folder, "tiny") == report
    assert (
        report.tag == tag_for("a" * 32, PROVENANCE["encoder_fingerprint"]) == "data-aaaaaaaaaaaa-encoder-ffffffffffff"
    )
    table = open_current(folder, "tiny")
    assert table.tags.get_version(report.tag) == table.tags.get_version("current") == report.version == table.version
    provenance = json.loads(table.schema.metadata[b"synpipe"])
    assert provenance == {**PROVENANCE, "data_version": "a" * 32, "table_data_version": "0" * 32}


def test_a_new_build_becomes_current_and_the_old_one_stays_readable(tmp_path: Path) -> None:
    db = tmp_path / "db"
    first = publish_table(embedding_table(tmp_path / "1.parquet", clustered(300, 32)), db, "a" * 32)
    reader = open_current(db, "tiny")
    # Another encoder, with another number of dimensions.
    second = publish_table(embedding_table(tmp_path / "2.parquet", clustered(500, 48, seed=1)), db, "b" * 32)
    assert second.version > first.version
    assert reader.count_rows() == 300  # an open reader keeps seeing the version that it opened
    assert len(reader.search(np.ones(32, np.float32)).limit(3).to_arrow()) == 3
    now = open_current(db, "tiny")
    assert now.count_rows() == 500 and now.schema.field("vector").type.list_size == 48
    now.checkout(first.tag)
    assert now.count_rows() == 300 and len(now.list_indices()) == 7
    assert len(now.search(np.ones(32, np.float32)).limit(3).to_arrow()) == 3
    # Go back to the first data without building anything, and then to the second.
    fingerprint = PROVENANCE["encoder_fingerprint"]
    for data, report in (("a", first), ("b", second)):
        assert republish(db, "tiny", data * 32, fingerprint, print)
        assert published(db, "tiny") == report
        assert open_current(db, "tiny").count_rows() == report.rows
    assert not republish(db, "tiny", "c" * 32, fingerprint, print)
    assert not republish(db, "tiny", "a" * 32, "0" * 64, print)
    assert published(db, "tiny") == second
    # After a new build, the same tag names a new version.
    third = publish_table(tmp_path / "1.parquet", db, "a" * 32)
    assert third.tag == first.tag and third.version > second.version
    assert published(db, "tiny") == third


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Path]:
    """A database with a published version that the test must leave as it is."""
    folder = tmp_path / "db"
    report = publish_table(embedding_table(tmp_path / "before.parquet", clustered(300, 32)), folder, "a" * 32)
    yield folder
    assert published(folder, "tiny") == report
    table = open_current(folder, "tiny")
    assert table.count_rows() == 300
    assert len(table.list_indices()) == 7
    assert len(table.search(np.ones(32, np.float32)).limit(3).to_arrow()) == 3


def test_too_low_a_recall_leaves_the_former_version_current(before: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index, "MIN_RECALL", 1.01)
    with pytest.raises(SynpipeError, match=r"finds 100\.0% .* former version stays current"):
        publish_table(embedding_table(tmp_path / "t.parquet", clustered(6000, 16)), before, "b" * 32)


def test_a_missing_index_leaves_the_former_version_current(before: Path, tmp_path: Path, monkeypatch) -> None:
    path = embedding_table(tmp_path / "t.parquet", clustered(200, 16))
    create = lancedb.table.LanceTable.create_index

    def forget_the_region(self, column, **options):
        return None if column == "region" else create(self, column, **options)

    monkeypatch.setattr(lancedb.table.LanceTable, "create_index", forget_the_region)
    with pytest.raises(SynpipeError, match="no complete index of region"):
        publish_table(path, before, "b" * 32)


def test_a_damaged_absent_or_empty_file_leaves_the_former_version_current(before: Path, tmp_path: Path) -> None:
    path = embedding_table(tmp_path / "t.parquet", clustered(3000, 32))
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(14)
    assert column.path_in_schema.startswith("vector")
    place = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    empty = pq.read_table(path).slice(0, 0)
    for content in (flipped, whole[:-1], whole[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(SynpipeError, match=r"t\.parquet: .* materialise again") as caught:
            publish_table(path, before, "b" * 32)
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    path.unlink()
    with pytest.raises(SynpipeError, match=r"t\.parquet"):
        publish_table(path, before, "b" * 32)
    pq.write_table(empty, path)
    with pytest.raises(SynpipeError, match="has no rows"):
        publish_table(path, before, "b" * 32)


def test_a_full_disk_leaves_the_former_version_current(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    try:
        report = publish_table(embedding_table(tmp_path / "1.parquet", clustered(50, 16)), folder, "a" * 32)
        with pytest.raises(SynpipeError, match=r"No space left on device .* check the space"):
            publish_table(embedding_table(tmp_path / "2.parquet", clustered(9000, 64)), folder, "b" * 32)
        assert published(folder, "tiny") == report
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_readers_of_current_see_a_whole_table_whenever_a_build_is_killed(tmp_path: Path) -> None:
    """Builds of 6,000 and 5,500 rows are killed while they write rows or indexes, and a reader checks the table each time."""
    db = tmp_path / "db"
    paths = [embedding_table(tmp_path / f"{rows}.parquet", clustered(rows, 16)) for rows in (5_500, 6_000)]
    publish_table(paths[0], db, "0" * 32)
    builder = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from synpipe.index import publish as index
        from synpipe.index import recall as index_recall

        index_recall.RECALL_QUERIES = 20
        for number in range(1, 10**6):
            which = number % 2
            path = Path(sys.argv[1 + which])
            index.publish(path, Path(sys.argv[3]), "tiny", f"{which}" * 32, lambda line: print(line, flush=True))
            print("published", flush=True)
        """
    )
    seen = {whole_state(db)}
    # The last lines that the builder prints before it is killed. The vectors are indexed in two parts.
    written = ["rows written", "1 of 2 parts", "2 of 2 parts"]
    for awaited, reads in (
        (written[:1], 0),
        (written[:2], 0),
        (written, 0),
        ([*written, "published", *written[:1]], 1),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", builder, *map(str, paths), str(db)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for words in awaited:
            assert words in process.stdout.readline()
            seen.add(whole_state(db))
        seen |= {whole_state(db) for _ in range(reads)}
        process.kill()
        process.wait()
        process.stdout.close()
        seen.add(whole_state(db))
    assert seen == {("0" * 32, 5_500), ("1" * 32, 6_000)}
    # The next build works normally.
    publish_table(paths[0], db, "0" * 32)
    assert whole_state(db) == ("0" * 32, 5_500)


def whole_state(folder: Path) -> tuple[str, int]:
    """Check that the current version is complete, and return its data version and number of rows."""
    table = open_current(folder, "tiny")
    rows = table.count_rows()
    entries = table.list_indices()
    assert len(entries) == 8 and {entry.num_indexed_rows for entry in entries} == {rows}
    found = table.search(np.ones(16, np.float32)).distance_type("cosine").nprobes(8).limit(10).to_arrow()
    assert len(found) == 10 and found["_distance"].null_count == 0
    return json.loads(table.schema.metadata[b"synpipe"])["data_version"], rows


@pytest.mark.parametrize("remains", ["tiny.lance", "tiny.lance/data", "tiny.lance/_versions"])
def test_a_first_build_that_was_killed_is_no_table_and_no_obstacle(tmp_path: Path, remains: str) -> None:
    db = tmp_path / "db"
    (db / remains).mkdir(parents=True)
    (db / remains / "half").write_bytes(b"\0" * 100)
    with pytest.raises(SynpipeError, match="materialise"):
        published(db, "tiny")
    with pytest.raises(SynpipeError, match="never published: materialise index_tiny again"):
        open_current(db, "tiny")
    report = publish_table(embedding_table(tmp_path / "t.parquet", clustered(60, 16)), db, "a" * 32)
    assert published(db, "tiny") == report


def test_a_table_that_was_never_published_is_not_current(tmp_path: Path, monkeypatch) -> None:
    db = tmp_path / "db"
    path = embedding_table(tmp_path / "t.parquet", clustered(60, 16))
    monkeypatch.setattr(index, "MIN_RECALL", 1.01)
    with pytest.raises(SynpipeError):
        publish_table(path, db, "a" * 32)
    with pytest.raises(SynpipeError, match="materialise"):
        published(db, "tiny")
    with pytest.raises(SynpipeError, match="never published"):
        open_current(db, "tiny")
    monkeypatch.undo()
    publish_table(path, db, "a" * 32)
    assert open_current(db, "tiny").count_rows() == 60


def test_no_index_at_all(tmp_path: Path) -> None:
    with pytest.raises(SynpipeError, match="materialise"):
        published(tmp_path, "tiny")
    with pytest.raises(SynpipeError, match="materialise index_tiny first"):
        open_current(tmp_path / "absent", "tiny")


def test_one_row_and_rows_that_are_all_alike(tmp_path: Path) -> None:
    one = publish_table(embedding_table(tmp_path / "1.parquet", clustered(1, 16)), tmp_path / "db", "a" * 32)
    assert (one.rows, one.recall) == (1, 1.0)
    alike = np.ones((5_000, 16), np.float32)
    same = publish_table(embedding_table(tmp_path / "2.parquet", alike), tmp_path / "db", "b" * 32)
    assert (same.rows, same.kind, same.recall) == (5_000, "IVF_FLAT", 1.0)


def test_columns_without_nulls_and_with_nothing_else(tmp_path: Path) -> None:
    path = embedding_table(
        tmp_path / "t.parquet",
        clustered(90, 16),
        neurotransmitter=["gaba"] * 90,
        region=[f"region {row}" for row in range(90)],
        hemilineage=["", None, "it's “07B”"] * 30,
        neuron_id=np.arange(90) + 2**62,
    )
    publish_table(path, tmp_path / "db", "a" * 32)
    table = open_current(tmp_path / "db", "tiny")
    assert table.count_rows("neurotransmitter = 'gaba'") == 90
    assert table.count_rows("hemilineage = 'it''s “07B”'") == 30
    assert table.count_rows("hemilineage = ''") == 30
    assert table.count_rows("region = 'region 7'") == 1
    assert table.count_rows(f"neuron_id = {2**62 + 5}") == 1


@pytest.mark.parametrize(
    ("rows", "partitions"), [(1, 0), (4_999, 0), (5_000, 64), (20_000, 128), (100_000, 256), (1_000_000, 1024)]
)
def test_partitions_follow_the_root_of_the_rows(rows: int, partitions: int) -> None:
    assert partitions_for(rows) == partitions


def test_two_tables_of_one_database_do_not_touch_each_other(tmp_path: Path) -> None:
    db = tmp_path / "db"
    for name, rows in (("one", 50), ("two", 70)):
        path = embedding_table(tmp_path / f"{name}.parquet", clustered(rows, 16))
        publish(path, db, name, "a" * 32, lambda line: None)
    assert open_current(db, "one").count_rows() == 50
    assert open_current(db, "two").count_rows() == 70
