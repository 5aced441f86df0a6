"""What stays of sessions between versions, under other names and on the way to a place elsewhere: no loss, no leak."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

import dicoms
import phantoms
from cranium import (
    cohort,
    conform,
    flow,
    forget,
    identity,
    ingest,
    naming,
    place,
    series,
    shardset,
    store,
    trust,
)
from cranium.cards import Card, Overlap
from cranium.config import Experiment, Ingest, Machine
from cranium.store import Artefact
from cranium.study import Study

SPEC = Ingest(contrasts=("T1w",), size=36, spacing_mm=6.0, slice_spacing_mm=6.0, shard_mb=1, align="none")
SHAPE, SPACING = (30, 36, 28), (6.0, 6.0, 6.0)
LABELS = {"csf": [2], "brain": [3, 4], "lesion": [5]}


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
        items: list[dict[str, Any]], work: Callable[..., dict[str, Any]], job: Any
    ) -> Iterator[dict[str, Any]]:
        return (work(item, job) for item in items)

    monkeypatch.setattr(ingest, "_on_ray", run)


def card() -> Card:
    content = phantoms.card(contrasts=("T1w",))
    content["layouts"][0]["segmentation"] = "labels/sub-{subject}_dseg.nii.gz"
    return Card.model_validate(content | {"segmentation": LABELS})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three subjects with a label map each."""
    root = phantoms.bids_tree(
        tmp_path / "raw",
        num_subjects=3,
        contrasts=("T1w",),
        missing=(),
        tilt=False,
        spacing=SPACING,
        shape=SHAPE,
    )
    grid = phantoms.affine(SPACING, SHAPE)
    for index, condition in enumerate(("control", "lesion", "atrophy")):
        tissues = phantoms.tissues(phantoms.head(index, condition), SHAPE, grid)
        phantoms.write(root / f"labels/sub-00{index + 1}_dseg.nii.gz", tissues * (tissues > 1), grid)
    return root


def made(tree: Path, of: Card | None = None, machine: Machine | None = None, **settings: Any) -> Artefact:
    machine = machine or Machine(store=tree.parent / "store")
    done = ingest.ingest(of or card(), tree, SPEC.model_copy(update=settings), machine)
    assert trust.verify(done) == []
    return done


def table(of: Artefact, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(of.path / f"{name}.parquet").to_pylist()
    return rows


def scan(tree: Path, subject: str) -> Path:
    return tree / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz"


# ---- versions -------------------------------------------------------------------------------------------------------


def test_a_copy_whose_original_went_is_taken(tree: Path) -> None:
    shutil.copyfile(scan(tree, "001"), scan(tree, "002"))
    first = made(tree)
    assert first.manifest()["rejections"] == {"DUP_CONTENT": 1}
    counts = first.manifest()["counts"]
    assert (counts["label_maps_accepted"], counts["label_maps_unused"]) == (2, 1)  # the copy's is in no shard
    shutil.rmtree(tree / "sub-001")  # the wrong one was removed
    second = made(tree)
    assert second.manifest()["rejections"] == {} and second.manifest()["counts"]["sessions"] == 2


def test_a_series_in_a_mixed_folder_that_changed_is_read_again(tmp_path: Path) -> None:
    content = phantoms.card("mixed", contrasts=("T1w",), masks=False)
    content |= {
        "tables": [],
        "labels": {},
        "groups": [],
        "layouts": [{"format": "dicom", "series": ["{subject}"], "source": "a test"}],
    }
    of, root = Card.model_validate(content), tmp_path / "raw"
    for seed, subject in enumerate(("P1", "P2")):
        kept = [7] if subject == "P2" else []
        common = {"subject": subject, "seed": seed}
        dicoms.series(root / subject, "mprage", name="a{:02}.dcm", skip=kept, number=1, **common)
        dicoms.series(root / subject, "flair", name="b{:02}.dcm", number=2, **common)
    spec: dict[str, Any] = {"mask": ("otsu",), "size": 56, "spacing_mm": 4.0, "slice_spacing_mm": 4.0}
    first = made(root, of, **spec)
    assert first.manifest()["rejections"] == {"SLICES_MISSING": 1}
    assert all("#" in row["path"] for row in table(first, "quarantine"))
    dicoms.series(root / "P2", "mprage", name="a{:02}.dcm", number=1, subject="P2", seed=1)
    second = made(root, of, **spec)
    assert second.id != first.id and second.manifest()["rejections"] == {}


# ---- while it is listed ---------------------------------------------------------------------------------------------


def test_a_label_map_that_grows_after_it_was_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, labels = ingest._on_ray, tree / "labels/sub-002_dseg.nii.gz"

    def late(items: list[dict[str, Any]], work: Any, job: Any) -> Iterator[dict[str, Any]]:
        if work is conform.session:
            grid = phantoms.affine(SPACING, SHAPE)
            tissues = phantoms.tissues(phantoms.head(9), SHAPE, grid)
            phantoms.write(labels, tissues * (tissues > 1), grid)
        return run(items, work, job)

    monkeypatch.setattr(ingest, "_on_ray", late)
    done = made(tree)
    (row,) = table(done, "quarantine")
    assert (row["subject"], row["contrast"], row["code"]) == ("002", "segmentation", "IO")
    assert done.manifest()["counts"]["label_maps_rejected"] == 1


def test_what_changed_of_a_series(tmp_path: Path) -> None:
    root = tmp_path
    (root / "a").mkdir()
    for name, size in (("1", 5), ("2", 7), (".x", 1)):
        (root / "a" / name).write_bytes(bytes(size))
    (root / "b.nii").write_bytes(bytes(3))
    key = "0123456789ab"
    known = series.sizes([("a/.x", 1), ("a/1", 5), ("a/2", 7), ("b.nii", 3), ("broken.nii", -1)])
    wanted = series.listed(["a", f"a#{key}@2.5", "b.nii", "broken.nii", "gone.nii"], known)
    assert wanted == {"a": 13, f"a#{key}@2.5": 13, "b.nii": 3, "broken.nii": -1}
    assert series.changed(root, wanted) == {}
    (root / "a" / "2").write_bytes(bytes(8))
    (root / "b.nii").write_bytes(bytes(4))
    assert (
        "had 3 bytes" in (reason := series.changed(root, wanted).pop("b.nii").reason)
        and "has 4 now" in reason
    )
    (root / "b.nii").write_bytes(bytes(3))
    assert {p: r.code for p, r in series.changed(root, wanted).items()} == {"a": "IO", f"a#{key}@2.5": "IO"}
    (root / "a" / "1").unlink()
    (root / "b.nii").unlink()  # reading it will say so
    assert set(series.changed(root, wanted)) == {"a", f"a#{key}@2.5"}


# ---- names ----------------------------------------------------------------------------------------------------------


def test_salted_names_cover_label_maps_and_files_of_no_use(tree: Path) -> None:
    (tree / "labels/sub-002_dseg.nii.gz").write_bytes(b"<html>")
    shutil.copyfile(scan(tree, "003"), tree / "sub-003/anat/sub-003_PDw.nii.gz")
    done = made(tree, identifiers="salted")
    manifest = json.dumps(done.manifest()["notes"])
    assert "fit no pattern" in manifest and "003" not in manifest and "sub-" not in manifest
    (row,) = table(done, "quarantine")
    assert row["code"] == "NOT_NIFTI" and row["path"].startswith(row["subject"] + "/")
    assert not any("sub-00" in str(row) for row in table(done, "records"))


def test_salted_names_cover_the_series_that_a_reason_names(tmp_path: Path) -> None:
    scans = {"T1w": cohort.Scan("T1w", "A_1/2001-02-03/t1", None)}
    refused = cohort.Refused(
        "A_1", "", "T1w", "A_1/copy", "DUP_ID", "the same series lies in <A_1/2001-02-03/t1>, which was taken"
    )
    found = cohort.CohortTable(
        tmp_path,
        cohort.Layout(files={"T1w": "{subject}/t1.nii"}, unverified=True),
        (cohort.Session("A_1", "", scans, {}),),
        (refused,),
        (("A_1/2001-02-03/t1/1.dcm", 5),),
        (),
        ("3 rows of t.csv have ids of another form, such as DOE, JANE", "<A_1_x> and <A_1> are alike"),
    )
    covered, called = naming.admit(found, "mine", True, tmp_path / "store", "x")
    key = called.subject("A_1")
    assert covered.notes == ("3 rows of t.csv have ids of another form", f"<...> and <{key}> are alike")
    (row,) = covered.refused
    assert row.path.startswith(f"{key}/") and f"lies in <{key}/" in row.reason
    assert "2001" not in row.reason and "copy" not in row.path


def test_who_is_forgotten_is_named_by_no_mapping(tmp_path: Path) -> None:
    at = tmp_path / "store"
    found = cohort.CohortTable(
        tmp_path,
        cohort.Layout(files={"T1w": "{subject}/t1.nii"}, unverified=True),
        tuple(
            cohort.Session(s, "", {"T1w": cohort.Scan("T1w", f"{s}/t1.nii", None)}, {}) for s in ("A1", "A2")
        ),
        (),
        (),
        (),
        ("2 NIfTI files fit no pattern of the card, such as A1_pd.nii",),
        {"other": {"A1": ("B7",), "A2": ("B8", "B9")}},
    )
    for name, subject in (("mine", "A1"), ("other", "B9")):
        identity.remember_forgotten(at, identity.forgotten_key(at, name, subject))
    plain, _ = naming.admit(found, "mine", False, at, "x")
    assert plain.overlap_ids == {"other": {"A2": ("B8",)}} and plain.notes == ()
    salted, _ = naming.admit(found, "mine", True, at, "x")
    assert [len(theirs) for theirs in salted.overlap_ids["other"].values()] == [1]


def test_forgetting_reaches_what_other_collections_say(tree: Path) -> None:
    mine = made(tree)
    other = Artefact(mine.path.parent / "other-00000000")
    shutil.copytree(mine.path, other.path)
    content = mine.manifest() | {
        "cohort": "other",
        "overlap_ids": {"phantom": {"X1": ["001", "002"], "X2": ["002"]}},
    }
    store.commit(other.path, content)
    forget.forget(Machine(store=tree.parent / "store", tracking_uri="http://127.0.0.1:9"), "phantom", "002")
    assert other.manifest()["overlap_ids"] == {"phantom": {"X1": ["001"]}}


# ---- elsewhere ------------------------------------------------------------------------------------------------------


def test_forgetting_goes_on_where_shards_lie_elsewhere(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(store=tree.parent / "store", shards=str(tree.parent / "far"))
    done = made(tree, machine=machine)
    tidy = shardset.tidy

    def killed(target: Artefact, base: place.Where) -> None:
        tidy(target, base)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shardset, "tidy", killed)
        forget.forget(machine, "phantom", "002")
    forget.forget(machine, "phantom", "002")
    assert done.manifest()["counts"]["subjects"] == 2 and trust.verify(done) == []


def test_forgetting_finds_unfinished_work_elsewhere(tree: Path) -> None:
    far = tree.parent / "far"
    machine = Machine(store=tree.parent / "store", shards=str(far))
    made(tree, machine=machine)

    def stop(done: int, total: int, text: str) -> None:
        if "shards" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(card(), tree, SPEC.model_copy(update={"size": 28}), machine, stop)
    assert list(far.rglob("work/*"))
    forget.forget(machine, "phantom", "002")
    assert not list(far.rglob("work/*"))


def test_work_left_elsewhere_by_a_kill_goes_with_the_next_ingest(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(store=tree.parent / "store", shards=str(tree.parent / "far"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shardset, "fetch", lambda target, base: None)
        patch.setattr(trust, "remember", killed)
        made(tree, machine=machine)
    assert list((tree.parent / "far").rglob("work/*"))
    assert made(tree, machine=machine).done and not list((tree.parent / "far").rglob("work"))


def test_what_a_kill_left_goes_by_the_command(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(store=tree.parent / "store", raw={"phantom": tree})
    done = made(tree, machine=machine)
    left = done.path / "work" / "000000.parquet"
    left.parent.mkdir()
    left.write_bytes(b"of a kill after the manifest")
    monkeypatch.setattr(flow.cluster, "connect", lambda machine: contextlib.nullcontext())
    monkeypatch.setattr(flow, "_quality_page", lambda *_: None)
    exp = Experiment(name="x", ingest=SPEC.model_copy(update={"cohorts": ("phantom",)}))
    flow.ingest(Study(exp, machine, {"phantom": card()}, Console(quiet=True)))
    assert done.done and not left.parent.exists()


def test_label_maps_of_nobody_are_told_and_examples_are_masked(tree: Path) -> None:
    labels = tree / "labels"
    (labels / "sub-003_dseg.nii.gz").rename(labels / "sub-0003_dseg.nii.gz")
    shutil.copyfile(scan(tree, "001"), scan(tree, "001").with_name("DOE^JANE_1950-12-31.nii.gz"))
    assert made(tree).manifest()["notes"] == [
        "1 NIfTI files fit no pattern of the card, such as sub-001/anat/[name]",
        "1 label maps belong to no scan that is taken, such as labels/sub-0003_dseg.nii.gz",
    ]


def test_an_overlap_added_to_a_card_makes_a_new_version(tmp_path: Path) -> None:
    """The leakage gate reads overlaps in the manifest: one declared later must get there."""
    raw = phantoms.bids_tree(tmp_path, num_subjects=1)
    machine, plain = Machine(store=tmp_path / "store"), Card.model_validate(phantoms.card())
    declared = plain.model_copy(update={"overlaps": (Overlap(cohort="other", reason="suspected"),)})
    ids = {ingest.artefact(card, raw, Ingest(), machine).id for card in (plain, declared)}
    assert len(ids) == 2


def test_a_better_citation_changes_no_identity_and_a_column_of_that_name_does(tmp_path: Path) -> None:
    raw, machine = phantoms.bids_tree(tmp_path, num_subjects=1), Machine(store=tmp_path / "store")

    def identity_of(**changed: object) -> str:
        content = phantoms.card()
        content["layouts"][0] |= changed
        return ingest.artefact(Card.model_validate(content), raw, Ingest(), machine).id

    assert identity_of() == identity_of(source="https://example.org/a better page")
    assert identity_of() != identity_of(repeats="last")
    named = Card.model_validate(
        phantoms.card() | {"tables": [{"columns": {"source": "site"}}], "labels": {}, "groups": []}
    )
    assert "source" in named.facts("tables")["tables"][0]["columns"]
