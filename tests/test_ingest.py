"""Whole ingests of small trees without Ray: label maps, alignment, and the rows of the fault matrix on conformation."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

import phantoms
from cranium import corpora, demo_sources, ingest, restitch, trust
from cranium.cards import Card
from cranium.config import Ingest, Machine, UserError
from cranium.store import Artefact
from cranium.volume import shard, slices

SPEC = Ingest(size=36, spacing_mm=6.0, slice_spacing_mm=6.0, align="none")
SHAPE, SPACING = (30, 36, 28), (6.0, 6.0, 6.0)
CLASSES = {"csf": [2], "brain": [3, 4], "lesion": [5]}


def card() -> Card:
    content = phantoms.card()
    content["layouts"][0]["segmentation"] = "labels/sub-{subject}_dseg.nii.gz"
    return Card.model_validate(content | {"segmentation": CLASSES})


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def plainly(
        items: list[dict[str, Any]], work: Callable[..., dict[str, Any]], job: Any
    ) -> Iterator[dict[str, Any]]:
        return (work(item, job) for item in items)

    monkeypatch.setattr(ingest, "_on_ray", plainly)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three subjects with every contrast on one grid, and a label map of each on that grid."""
    root = phantoms.bids_tree(
        tmp_path / "raw", num_subjects=3, missing=(), tilt=False, spacing=SPACING, shape=SHAPE
    )
    grid = phantoms.affine(SPACING, SHAPE)
    for index, condition in enumerate(("control", "lesion", "atrophy")):
        tissues = phantoms.tissues(phantoms.head(index, condition), SHAPE, grid)
        labels = np.where(tissues == 1, 0, tissues).astype(np.uint8)
        phantoms.write(root / f"labels/sub-00{index + 1}_dseg.nii.gz", labels, grid)
    return root


def made(tree: Path, spec: Ingest = SPEC, of: Card | None = None) -> Artefact:
    done = ingest.ingest(of or card(), tree, spec, Machine(store=tree.parent / "store"))
    assert trust.verify(done) == []
    return done


def sessions(of: Artefact) -> dict[str, dict[str, Any]]:
    return {row["subject"]: row for row in pq.read_table(of.path / "sessions.parquet").to_pylist()}


def quarantine(of: Artefact) -> list[tuple[str, str, str]]:
    rows = pq.read_table(of.path / "quarantine.parquet").to_pylist()
    return [(row["subject"], row["contrast"], row["code"]) for row in rows]


def rows(of: Artefact, subject: str) -> Any:
    import pyarrow as pa

    tables = [
        shard.read_row_group(of.path / entry["file"], index)
        for entry in of.manifest()["shards"]
        for index, group in enumerate(entry["row_groups"])
        if group["subject"] == subject
    ]
    return pa.concat_tables(tables)


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    image = nib.load(path)
    phantoms.write(path, *change(np.asanyarray(image.dataobj).copy(), image.affine))


# ---- label maps -----------------------------------------------------------------------------------------------------


def test_label_maps_travel_with_their_slices(tree: Path) -> None:
    done = made(tree)
    assert done.manifest()["counts"]["label_maps_accepted"] == 3
    for subject, session in sessions(done).items():
        table = rows(done, subject)
        masks, pixels = shard.masks(table), shard.pixels(table)
        assert masks is not None and masks.shape == (len(pixels), 1, 36, 36)
        ml = json.loads(session["label_ml"])
        counted = {name: np.count_nonzero(masks == i) * 0.216 for i, name in enumerate(CLASSES, 1)}
        assert ml == pytest.approx(counted, abs=1e-3)
        assert (ml["lesion"] > 5) == (subject == "002")
        brain = pixels[:, 0] > 0
        assert np.count_nonzero(brain & (masks > 0)) > 0.99 * np.count_nonzero(masks > 0)
        csf, tissue = pixels[:, 1][masks == 1], pixels[:, 1][masks == 2]
        assert np.median(csf) > np.median(tissue) + 50  # T2w: bright fluid where the labels say fluid


@pytest.mark.parametrize("identifiers", ["plain", "salted"])
def test_label_files_are_found_again_and_their_classes_keep_the_cards_order(
    tree: Path, identifiers: str
) -> None:
    """A segmentation is scored against them, and JSON sorts the classes of the card."""
    spec = SPEC.model_copy(update={"identifiers": identifiers})
    done = made(tree, spec)
    machine = Machine(store=tree.parent / "store")
    found = ingest.label_files(card(), tree, spec, machine)
    assert done.manifest()["classes"] == list(CLASSES) != sorted(CLASSES)
    known = {row["subject"]: row for row in sessions(done).values()}
    assert {subject for subject, _ in found} == set(known) and len(known) == 3
    values = list(CLASSES.values())
    for (subject, session), path in found.items():
        assert (tree / path).is_file()
        stacks = restitch.read_stacks(done, done.manifest(), subject, session)
        truth = restitch.read_truth(tree / path, tree, known[subject], values, stacks, "agree")
        assert truth.place.channel in ("T1w", "T2w", "FLAIR")


@pytest.mark.parametrize(("stack", "contrasts"), [("neighbours", ("T1w",)), ("both", ("T1w", "FLAIR"))])
def test_neighbours_carry_the_labels_of_each_slice(
    tree: Path, stack: str, contrasts: tuple[str, ...]
) -> None:
    spec = SPEC.model_copy(update={"stack": stack, "contrasts": contrasts})
    done = made(tree, spec)
    masks = shard.masks(rows(done, "002"))
    assert masks is not None and masks.shape[1] == 3
    np.testing.assert_array_equal(masks[1:, 0], masks[:-1, 1])
    alone = made(tree, SPEC.model_copy(update={"contrasts": contrasts}))
    read = restitch.read_stacks(done, done.manifest(), "002", "")
    single = restitch.read_stacks(alone, alone.manifest(), "002", "")
    np.testing.assert_array_equal(read.labels, single.labels)  # what is scored: of the middle slice
    np.testing.assert_array_equal(read.pixels[:, :, 1:2], single.pixels)


@pytest.mark.parametrize("depth", [3, 5])
def test_both_are_every_contrast_between_its_neighbours(tree: Path, depth: int) -> None:
    """Against single slices of every slice of the grid, kept or not; and back by the middle ones, bit for bit."""
    (tree / "sub-001/anat/sub-001_T2w.nii.gz").unlink()
    spec = SPEC.model_copy(update={"stack": "both", "neighbours": depth, "min_brain": 0.1})
    done, every = made(tree, spec), made(tree, SPEC.model_copy(update={"min_brain": 0.0}))
    manifest = done.manifest()
    assert manifest["shape"] == [3, depth, 36, 36] and manifest["channels"] == ["T1w", "T2w", "FLAIR"]
    assert manifest["missing"] == {"T1w": 0, "T2w": 1, "FLAIR": 0}
    assert manifest["counts"]["stacks"] < every.manifest()["counts"]["stacks"]
    for subject, session in sessions(done).items():
        table, single = rows(done, subject), shard.pixels(rows(every, subject))
        crop = json.loads(session["crop"])
        assert crop["shape"][0] == len(single)
        stacks = shard.pixels(table)
        for stack, z in zip(stacks, table["slice"].to_pylist(), strict=True):
            for s in range(depth):
                at = z + s - depth // 2
                expected = single[at, :, 0] if 0 <= at < len(single) else np.zeros_like(single[0, :, 0])
                np.testing.assert_array_equal(stack[:, s], expected)
        assert set(table["present"].to_pylist()) == {0b101 if subject == "001" else 0b111}
        assert stacks[:, 1].any() == (subject != "001")
        run = range(*crop["slices"])
        back = slices.from_stacks(stacks, run, len(single))
        np.testing.assert_array_equal(back[:, run.start : run.stop].transpose(1, 0, 2, 3), single[run, :, 0])


def test_stacks_of_another_kind_are_not_read_together(tree: Path) -> None:
    """The same channels, one slice of each here and three there; and other channels."""
    spec = SPEC.model_copy(update={"stack": "both"})
    both, single = made(tree, spec), made(tree)
    assert both.manifest()["preprocessing_hash"] != single.manifest()["preprocessing_hash"]
    with pytest.raises(UserError, match="shape"):
        corpora.corpus([both, single])
    fewer = made(tree, spec.model_copy(update={"contrasts": ("T2w", "FLAIR")}))
    with pytest.raises(UserError, match="channels"):
        corpora.corpus([both, fewer])


def test_a_rejected_label_map_leaves_its_scans_without_labels(tree: Path) -> None:
    def unknown(data: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        data[14, 14, 14] = 7
        return data, grid

    def elsewhere(data: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return data, grid + np.array([[0, 0, 0, 9]] + [[0] * 4] * 3)

    rewrite(tree / "labels/sub-001_dseg.nii.gz", unknown)
    rewrite(tree / "labels/sub-003_dseg.nii.gz", elsewhere)
    done = made(tree)
    counts = done.manifest()["counts"]
    assert (counts["scans"], counts["accepted"], counts["warned"], counts["rejected"]) == (9, 9, 0, 0)
    assert (counts["label_maps_accepted"], counts["label_maps_rejected"]) == (1, 2)
    assert quarantine(done) == [
        ("001", "segmentation", "MASK_VALUES"),
        ("003", "segmentation", "MASK_GRID"),
    ]
    assert done.manifest()["rejections"] == {"MASK_VALUES": 1, "MASK_GRID": 1}
    assert shard.masks(rows(done, "001")) is None and shard.masks(rows(done, "002")) is not None
    assert sessions(done)["001"]["label_ml"] is None


@pytest.mark.parametrize("phi", ["note", "reject"])
def test_i25_masks_and_label_maps_are_looked_at_too(tree: Path, phi: str) -> None:
    """A name in the sidecar of a brain mask and in the header of a label map: noted where they serve, or refused."""
    mask = tree / "derivatives/masks/sub-001/anat/sub-001_T1w_mask.nii.gz"
    mask.with_name("sub-001_T1w_mask.json").write_text(json.dumps({"PatientName": "DOE^JANE"}))
    path = tree / "labels/sub-002_dseg.nii.gz"
    image = nib.load(path)
    image.header["descrip"] = b"DOE^JANE"
    content = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header).to_bytes()
    path.write_bytes(gzip.compress(content, 1))
    done = made(tree, SPEC.model_copy(update={"phi": phi}))
    counts = done.manifest()["counts"]
    maps = [counts[f"label_maps_{outcome}"] for outcome in ("accepted", "warned", "rejected", "unused")]
    warnings = {subject: json.loads(row["warnings"]) for subject, row in sessions(done).items()}
    if phi == "reject":
        assert quarantine(done) == [
            ("001", "T1w", "PHI_SUSPECT"),
            ("002", "segmentation", "PHI_SUSPECT"),
        ]
        assert (counts["accepted"], counts["warned"], counts["rejected"]) == (8, 0, 1)
        assert maps == [2, 0, 1, 0] and not any(warnings.values())
        assert shard.masks(rows(done, "002")) is None
        reasons = [row["reason"] for row in pq.read_table(done.path / "quarantine.parquet").to_pylist()]
        assert reasons[0].startswith("its brain mask") and reasons[1] == "descrip may hold name"
    else:
        assert quarantine(done) == []
        assert (counts["accepted"], counts["warned"], counts["rejected"]) == (8, 1, 0)
        assert maps == [2, 1, 0, 0] and warnings["003"] == []
        (of_mask,), (of_map,) = warnings["001"], warnings["002"]
        assert (of_mask["contrast"], of_mask["code"]) == ("T1w", "PHI_SUSPECT")
        assert of_mask["reason"].startswith("its brain mask: sidecar PatientName may hold name")
        assert (of_map["contrast"], of_map["code"]) == ("segmentation", "PHI_SUSPECT")
        assert shard.masks(rows(done, "002")) is not None


def test_what_reading_a_label_map_tells_stands_with_it(tree: Path) -> None:
    path = tree / "labels/sub-003_dseg.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"more", 1))
    done = made(tree)
    counts = done.manifest()["counts"]
    assert (counts["label_maps_accepted"], counts["label_maps_warned"]) == (2, 1)
    (note,) = json.loads(sessions(done)["003"]["warnings"])
    assert (note["contrast"], note["code"]) == ("segmentation", "EXTRA_BYTES")
    assert counts["warned"] == 0  # a label map is no scan


def test_a_label_map_on_a_rejected_scan_says_so(tree: Path) -> None:
    """Drawn on a FLAIR of its own grid, 60 mm away from the others: neither it nor its labels can be placed."""
    shape = (24, 30, 20)
    grid = phantoms.affine((7, 7, 7), shape)
    grid[1, 3] += 60
    tissues = phantoms.tissues(phantoms.head(0), shape, phantoms.affine((7, 7, 7), shape))
    phantoms.write(
        tree / "sub-001/anat/sub-001_FLAIR.nii.gz", phantoms.intensities(tissues, "FLAIR", 0), grid
    )
    brain = tree / "derivatives/masks/sub-001/anat/sub-001_FLAIR_mask.nii.gz"
    phantoms.write(brain, (tissues >= 2).astype(np.uint8), grid)
    phantoms.write(tree / "labels/sub-001_dseg.nii.gz", np.where(tissues == 1, 0, tissues), grid)
    done = made(tree)
    found = {row["contrast"]: row for row in pq.read_table(done.path / "quarantine.parquet").to_pylist()}
    assert (found["FLAIR"]["code"], found["segmentation"]["code"]) == ("MODALITY_GRID", "MASK_GRID")
    assert found["segmentation"]["reason"] == "drawn on the FLAIR, which was rejected; mend that scan first"


def test_a_session_without_scans_leaves_its_label_map_unused(tree: Path) -> None:
    for path in (tree / "sub-002/anat").iterdir():
        path.write_bytes(b"<html>")
    (tree / "labels/sub-003_dseg.nii.gz").unlink()
    counts = made(tree).manifest()["counts"]
    assert [counts[f"label_maps_{k}"] for k in ("accepted", "rejected", "unused")] == [1, 0, 1]


def test_classes_are_a_part_of_the_identity(tree: Path) -> None:
    other = card().model_copy(update={"segmentation": {"csf": (2,), "brain": (3, 4, 5)}})
    assert made(tree).id != made(tree, of=other).id


# ---- the matrix -----------------------------------------------------------------------------------------------------


def test_i11_a_flipped_header_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    """LAS, LPI and PIR copies of one brain, masks and labels too: the same shards, bit for bit."""
    first = made(tree)
    for axes in ("LAS", "PIR"):
        for path in [*tree.rglob("*.nii.gz")]:
            rewrite(path, functools.partial(phantoms.turned, axes=axes))
        other = ingest.ingest(card(), tree, SPEC, Machine(store=tmp_path / axes))
        for subject in ("001", "002", "003"):
            assert rows(other, subject).equals(rows(first, subject))


def test_i18_what_shows_no_brain_is_rejected(tree: Path) -> None:
    masks = tree / "derivatives/masks"

    def constant(value: int) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return lambda data, grid: (np.full_like(data, value), grid)

    rewrite(tree / "sub-001/anat/sub-001_T1w.nii.gz", constant(300))
    rewrite(tree / "sub-001/anat/sub-001_T2w.nii.gz", constant(0))
    rewrite(masks / "sub-002/anat/sub-002_T1w_mask.nii.gz", constant(0))
    rewrite(masks / "sub-002/anat/sub-002_T2w_mask.nii.gz", constant(1))

    def flat_brain(data: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(np.abs(data - 550) < 600, 500, data) + (np.indices(data.shape)[2] == 0), grid

    rewrite(tree / "sub-003/anat/sub-003_T1w.nii.gz", flat_brain)
    done = made(tree)
    assert quarantine(done) == [
        ("001", "T1w", "EMPTY_BRAIN"),
        ("001", "T2w", "EMPTY_BRAIN"),
        ("002", "T1w", "EMPTY_BRAIN"),
        ("002", "T2w", "EMPTY_BRAIN"),
        ("003", "T1w", "EMPTY_BRAIN"),
    ]
    present = {subject: row["present"] for subject, row in sessions(done).items()}
    assert present == {"001": 0b100, "002": 0b100, "003": 0b110}  # i20: a bit each, no channel shifted
    for subject, bits in present.items():
        channels = shard.pixels(rows(done, subject)).any(axis=(0, 2, 3, 4))
        assert channels.tolist() == [bool(bits >> i & 1) for i in range(3)]


def test_i19_grids_that_differ_are_resampled_and_elsewhere_is_rejected(tree: Path) -> None:
    """A T2w on tilted slabs lands on the T1w's pixels; a FLAIR 60 mm away is no scan of this session."""
    of, shape = phantoms.head(0), (44, 52, 22)
    grid = phantoms.affine((4, 4, 8), shape, (6, -4, 3))
    tissues = phantoms.tissues(of, shape, grid)
    anat, masks = tree / "sub-001/anat", tree / "derivatives/masks/sub-001/anat"
    phantoms.write(anat / "sub-001_T2w.nii.gz", phantoms.intensities(tissues, "T2w"), grid)
    phantoms.write(masks / "sub-001_T2w_mask.nii.gz", (tissues >= 2).astype(np.uint8), grid)
    for path in (anat / "sub-001_FLAIR.nii.gz", masks / "sub-001_FLAIR_mask.nii.gz"):
        rewrite(path, lambda data, grid: (data, grid + np.array([[0] * 4, [0, 0, 0, 60], [0] * 4, [0] * 4])))
    done = made(tree)
    assert quarantine(done) == [("001", "FLAIR", "MODALITY_GRID")]
    first = sessions(done)["001"]
    assert json.loads(first["native_shape"])["T2w"] == list(shape)
    pixels = shard.pixels(rows(done, "001")) > 0
    both = np.count_nonzero(pixels[:, 0] & pixels[:, 1])
    assert 2 * both / (np.count_nonzero(pixels[:, 0]) + np.count_nonzero(pixels[:, 1])) > 0.95


# ---- alignment ------------------------------------------------------------------------------------------------------


def test_alignment_is_skipped_where_grids_agree(tree: Path) -> None:
    """The same bytes as without, another artefact; nothing moves."""
    plain, aligned = made(tree), made(tree, SPEC.model_copy(update={"align": "grids_differ"}))
    assert plain.id != aligned.id
    for subject in ("001", "002", "003"):
        assert rows(plain, subject).equals(rows(aligned, subject))


def test_a_moved_contrast_is_brought_back_and_its_way_recorded(tree: Path) -> None:
    def moved(data: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        move = phantoms.affine((1, 1, 1), (1, 1, 1), (0, 0, 6))
        move[:3, 3] = (12, -8, 0)
        return data, move @ grid

    expected = shard.pixels(rows(made(tree), "002"))[:, 1]
    for folder in (
        "sub-002/anat/sub-002_T2w.nii.gz",
        "derivatives/masks/sub-002/anat/sub-002_T2w_mask.nii.gz",
    ):
        rewrite(tree / folder, moved)
    (tree / "participants.tsv").touch()

    def overlap(of: Artefact) -> float:
        found = shard.pixels(rows(of, "002"))[:, 1] > 0
        return 2 * np.count_nonzero(found & (expected > 0)) / (found.sum() + (expected > 0).sum())

    spec = SPEC.model_copy(update={"align": "grids_differ"})
    other = Machine(store=tree.parent / "second")
    left = ingest.ingest(card(), tree, SPEC, other)
    done = ingest.ingest(card(), tree, spec, other)
    assert overlap(left) < 0.9 < 0.97 < overlap(done)
    first = sessions(done)["002"]
    matrix = np.array(json.loads(first["transforms"])["T2w"])
    np.testing.assert_allclose(matrix @ moved(np.empty(0), np.eye(4))[1], np.eye(4), atol=1.5)
    assert [n["code"] for n in json.loads(first["warnings"])] == ["MOVED"]
    np.testing.assert_array_equal(json.loads(first["transforms"])["T1w"], np.eye(4))


# ---- how it was acquired --------------------------------------------------------------------------------------------


def test_a_sidecar_tells_the_scanner_and_nobody(tree: Path) -> None:
    """Per contrast: numbers and closed words, no date, place or free text; another sidecar is noticed."""
    path = tree / "sub-002/anat/sub-002_T1w.json"
    told = {"MagneticFieldStrength": 3, "Manufacturer": "Siemens", "RepetitionTime": 2.3, "EchoTime": 0.00298}
    secret = {
        "AcquisitionDateTime": "2006-10-20T10:15:00",
        "DeviceSerialNumber": "45678",
        "InstitutionName": "Mayo",
        "SeriesDescription": "MPRAGE Jane",
        "ManufacturersModelName": "Jane.Doe@clinic",
        "StationName": "MRC45678",
    }
    path.write_text(json.dumps(told | secret))
    (tree / "sub-003/anat/sub-003_T1w.json").write_text("{")
    done = made(tree)
    found = {subject: json.loads(row["acquisition"]) for subject, row in sessions(done).items()}
    siemens = {"field_tesla": 3.0, "manufacturer": "Siemens", "tr_ms": 2300.0, "te_ms": 2.98}
    assert found["002"] == {"T1w": siemens, "T2w": {}, "FLAIR": {}}
    assert found["001"] == found["003"] == {"T1w": {}, "T2w": {}, "FLAIR": {}}
    held = repr(pq.read_table(done.path / "sessions.parquet").drop_columns(["fingerprint"]).to_pylist())
    assert not [word for word in ("2006", "45678", "Mayo", "Jane", "clinic", "MPRAGE") if word in held]
    path.write_text(path.read_text().replace("2.3", "2.4"))  # as long as before
    again = made(tree)
    assert again.id != done.id and json.loads(sessions(again)["002"]["acquisition"])["T1w"]["tr_ms"] == 2400.0


# ---- refused before it begins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"mask": ("command",), "mask_tool": "x 1"}, "NO_COMMAND"),
        ({"mask": ("deepbet",), "space": "mni", "template_sha256": "0" * 64}, "TEMPLATE"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tree: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], code: str, shards: bool
) -> None:
    """No mask program is given; or the networks can be had, and then the template is another file."""
    file = tree / "participants.tsv"
    monkeypatch.setattr(demo_sources, "fetch", lambda members, cache: (dict.fromkeys(members, file), {}, 0))
    elsewhere = str(tree.parent / "elsewhere") if shards else None
    machine = Machine(store=tree.parent / "store", template=file, shards=elsewhere)
    with pytest.raises(UserError) as error:
        ingest.ingest(card(), tree, SPEC.model_copy(update=settings), machine)
    assert error.value.code == code
    assert not (machine.store / "ingest").exists() and not (tree.parent / "elsewhere").exists()


# ---- other settings -------------------------------------------------------------------------------------------------


def test_uint16_keeps_finer_steps(tree: Path) -> None:
    fine, coarse = made(tree, SPEC.model_copy(update={"dtype": "uint16"})), made(tree)
    assert fine.manifest()["dtype"] == "uint16"
    wide, narrow = shard.pixels(rows(fine, "001")), shard.pixels(rows(coarse, "001"))
    assert wide.dtype == np.uint16 and wide.max() == 65535
    np.testing.assert_array_equal(wide > 0, narrow > 0)
    scaled = 1 + (wide[wide > 0].astype(float) - 1) * 254 / 65534
    np.testing.assert_allclose(scaled, narrow[narrow > 0], atol=0.51)


def test_slices_by_another_rule(tree: Path) -> None:
    rule = {"rule": "range", "first": 4, "count": 9, "every": 2}
    done = made(tree, Ingest.model_validate(SPEC.model_dump() | {"slices": rule}))
    table, all_rows = rows(done, "001"), rows(made(tree), "001")
    assert table["slice"].to_pylist() == [4, 6, 8, 10, 12]
    same = [all_rows["slice"].to_pylist().index(z) for z in table["slice"].to_pylist()]
    np.testing.assert_array_equal(shard.pixels(table), shard.pixels(all_rows)[same])
    assert json.loads(sessions(done)["001"]["crop"])["slices"] == [4, 13, 2]
    assert [g["first_slice"] for e in done.manifest()["shards"] for g in e["row_groups"]] == [4, 4, 4]


def test_the_mask_of_each_contrast_is_described(tree: Path) -> None:
    quality = json.loads(sessions(made(tree))["001"]["mask_quality"])
    assert set(quality) == {"T1w", "T2w", "FLAIR"}
    assert quality["T1w"]["source"] == "supplied" and 900 < quality["T1w"]["ml"] < 1400
