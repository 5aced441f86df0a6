"""`cranium forget`: no byte of the subject is left, all others stay as they were, a kill anywhere only delays it."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import phantoms
from cranium import (
    capture,
    checkpoint,
    cli,
    forget,
    identity,
    ingest,
    naming,
    place,
    pretrain,
    store,
    track,
    trust,
)
from cranium.cards import Card
from cranium.config import Ingest, Machine, UserError, fingerprint
from cranium.store import Artefact
from cranium.volume import shard

WHO = "SUBJX7Q"  # of cohort phantom; nothing else is called like that
SPEC = Ingest(contrasts=("T1w",), size=56, spacing_mm=4.0, slice_spacing_mm=8.0, shard_mb=1)


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_place(monkeypatch)


def run_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an ingest in this process."""

    def run(items: list[dict[str, Any]], work: Any, job: Any) -> Iterator[dict[str, Any]]:
        yield from (ingest._guarded(item, work, job) for item in items)

    monkeypatch.setattr(ingest, "_on_ray", run)


def card(cohort: str) -> Card:
    return Card.model_validate(phantoms.card(cohort, contrasts=("T1w",)))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cohorts; subject 002 of the first is called WHO, and one more of its scans is damaged."""
    folder = tmp_path_factory.mktemp("raw")
    for cohort in ("phantom", "away"):
        root = phantoms.bids_tree(
            folder, cohort, num_subjects=4, contrasts=("T1w",), missing=(), sessions=("a", "b"), tilt=False,
            spacing=(6, 6, 6), shape=(30, 36, 26), seed=len(cohort),
        )  # fmt: skip
    root = folder / "phantom"
    for path in sorted(root.rglob("*002*"), key=lambda p: -len(p.parts)):
        path.rename(path.with_name(path.name.replace("002", WHO)))
    people = root / "participants.tsv"
    people.write_text(people.read_text().replace("sub-002", f"sub-{WHO}"))
    for subject in (WHO, "003"):
        scan = root / f"sub-{subject}/ses-b/anat/sub-{subject}_ses-b_T1w.nii.gz"
        scan.write_bytes(scan.read_bytes()[:-30])
    return folder


def ingested(raw: Path, machine: Machine, cohort: str = "phantom", **settings: Any) -> Artefact:
    return ingest.ingest(card(cohort), raw / cohort, SPEC.model_copy(update=settings), machine)


def commit(folder: Path, **content: Any) -> Artefact:
    folder.mkdir(parents=True, exist_ok=True)
    store.commit(folder, content)
    return Artefact(folder)


def features(folder: Path, of: Artefact, source: str) -> Artefact:
    rows = [g["subject"] for entry in of.manifest()["shards"] for g in entry["row_groups"]]
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table({"subject": rows, "features": [b"1234"] * len(rows)}), folder / "features.parquet"
    )
    return commit(folder, stage="embed", shard_set=of.id, source={"name": source})


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return at(tmp_path)


def at(folder: Path) -> Machine:
    return Machine(store=folder / "store", tracking_uri="http://127.0.0.1:9")


@pytest.fixture
def home(template: tuple[Path, dict[str, str]], machine: Machine) -> dict[str, Artefact]:
    """A store with everything that an experiment leaves in it, in the stages' own forms."""
    folder, names = template
    shutil.copytree(folder, machine.store)
    return {what: Artefact(machine.store / name) for what, name in names.items()}


@pytest.fixture(scope="module")
def template(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    machine = at(tmp_path_factory.mktemp("template"))
    with pytest.MonkeyPatch.context() as patch:
        run_in_place(patch)
        made = fill(raw, machine)
    return machine.store, {what: of.id for what, of in made.items()}


def fill(raw: Path, machine: Machine) -> dict[str, Artefact]:
    at = machine.store
    ours, theirs = ingested(raw, machine), ingested(raw, machine, "away")
    (ours.path / "quality.html").write_text(f"<img alt='{WHO}'>")
    begun = at / "pretrain" / "scratch-tiny-11111111"  # never finished
    begun.mkdir(parents=True)
    (begun / pretrain.KEY).write_text(json.dumps([s["sha256"] for s in ours.manifest()["shards"]]))
    (begun / "ray" / "checkpoint_1").mkdir(parents=True)
    (begun / capture.FOLDER).mkdir()
    (begun / capture.FOLDER / "00000003.json").write_text(json.dumps({"rows": [{"subject": WHO}]}))
    weights = at / "pretrain" / "scratch-tiny-00000000"
    weights.mkdir(parents=True)
    save_file({"x": np.zeros(1)}, weights / checkpoint.BACKBONE, {"cranium": "{}"})
    made = {
        "ours": ours,
        "theirs": theirs,
        "weights": commit(weights, stage="pretrain", shard_sets=[ours.id]),
        "begun": Artefact(begun),
        "other weights": commit(at / "pretrain" / "scratch-tiny-22222222", shard_sets=[theirs.id]),
        "features": features(at / "embed" / "random_phantom-00000000", ours, "random"),
        "by weights": features(
            at / "embed" / "scratch_away-00000000", theirs, "pretrain/scratch-tiny-00000000"
        ),
        "untouched": features(at / "embed" / "random_away-00000000", theirs, "random"),
    }
    cells = {
        "cell": [[ours.path.name, "random_phantom-00000000"]],
        "cell of weights": [[theirs.path.name, "scratch_away-00000000"]],
        "cell untouched": [[theirs.path.name, "random_away-00000000"]],
    }
    for number, (name, inputs) in enumerate(cells.items()):
        made[name] = commit(at / "adapt" / f"task-{number:08}", stage="adapt", inputs=inputs)
        pq.write_table(
            pa.table({"subject": [WHO if name == "cell" else "1"]}), made[name].path / "predictions.parquet"
        )
    half = at / "adapt" / "task-99999999"
    half.mkdir()
    pq.write_table(pa.table({"subject": [WHO]}), half / "predictions.parquet")
    made["sweep"] = commit(
        at / "sweep" / "exp-00000000", cells=["task-00000000", "task-00000001"], stamps=[WHO]
    )
    (made["sweep"].path / "splits.json").write_text(json.dumps({"task": {WHO: 1}}))
    tune = at / "sweep" / ".tune" / "exp-00000000-3-tune"
    tune.mkdir(parents=True)
    (tune / "trainable.pkl").write_bytes(WHO.encode())
    key = {"grid": "sweep/exp-00000000", "shards": [ours.id]}
    made["report"] = commit(at / "report" / "exp-00000000", key=key)
    (made["report"].path / "report.html").write_text(f"<p>{WHO}</p>")
    (at / "logs").mkdir(exist_ok=True)
    (at / "logs" / "1.log").write_text(f"one line\nread sub-{WHO}_T1w.nii.gz\nlast line\n")
    marks = at / "tracked" / fingerprint(machine.tracking)[:8]
    marks.mkdir(parents=True)
    (marks / "sweep-exp-00000000.json").write_text(
        '{"run": "r1", "task-00000000": "r2", "task-00000002": "r9"}'
    )
    (marks / "pretrain-scratch-tiny-00000000.json").write_text('{"run": "r3"}')
    return made


class Calls(list[Any]):
    """What MLflow would be told."""

    def __call__(self, uri: str, runs: list[str], date: str, artefacts: tuple[str, ...]) -> None:
        self.append((runs, artefacts))


@pytest.fixture(autouse=True)
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(track, "forget", calls)
    return calls


def spelled(name: str) -> set[bytes]:
    """A name as bytes: plain, in UTF-16, and in base64 at each of its three alignments."""
    found = {name.encode(), name.encode("utf-16-le"), name.encode("utf-16-be"), name.encode().hex().encode()}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + name.encode())
        found.add(coded[4 if shift else 0 : len(coded) - 4])
    return found


def holding(folder: Path, names: set[str]) -> list[str]:
    """Files below a folder in which a name is found: in its path, its bytes, gzip's content or a column's values."""
    wanted, found = set().union(*map(spelled, names)), []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = [str(path.relative_to(folder)).encode(), path.read_bytes()]
        if content[1][:2] == b"\x1f\x8b":
            content.append(gzip.decompress(content[1]))
        if path.suffix == ".parquet":
            of = pq.read_table(path)
            content.append(repr(of.schema.metadata).encode())
            content += [
                repr(of[n].to_pylist()).encode() for n in of.column_names if n not in ("pixels", "mask")
            ]
        if any(word in part for word in wanted for part in content):
            found.append(str(path.relative_to(folder)))
    return found


def rows(made: Artefact) -> dict[tuple[str, str], bytes]:
    """Pixels of every session of a set."""
    found: dict[tuple[str, str], bytes] = {}
    for entry in made.manifest()["shards"]:
        for index, group in enumerate(entry["row_groups"]):
            of = shard.read_row_group(str(made.path / entry["file"]), index)
            shard.check_rows(of, entry["file"])
            found[group["subject"], group["session"]] = shard.pixels(of).tobytes()
    return found


# ---- what is gone, and what stays -----------------------------------------------------------------------------------


def test_no_byte_is_left_and_all_else_stays(
    home: dict[str, Artefact], machine: Machine, mlflow: Calls
) -> None:
    ours, before = home["ours"], rows(home["ours"])
    others = {n: [p.read_bytes() for p in sorted(home[n].path.rglob("*.*"))] for n in ("theirs", "untouched")}
    key = naming.subject_key(identity.salt(machine.store), "phantom", WHO)
    assert len(holding(machine.store, {WHO})) > 8
    done = forget.forget(machine, "phantom", WHO)
    assert holding(machine.store, {WHO, key}) == []
    after = rows(ours)
    assert after == {name: pixels for name, pixels in before.items() if name[0] != WHO}
    assert len(before) - len(after) == 1  # session b was damaged
    counts = ours.manifest()["counts"]
    assert (counts["subjects"], counts["sessions"], counts["rejected"], counts["scans"]) == (3, 5, 1, 6)
    assert trust.verify(ours) == [] and trust.verify(home["theirs"]) == []
    assert others == {n: [p.read_bytes() for p in sorted(home[n].path.rglob("*.*"))] for n in others}
    assert done.lines == 1 and (machine.store / "logs" / "1.log").read_text().startswith(
        "one line\n(this line"
    )
    assert mlflow == [(["r1", "r2", "r3"], ("splits.json",))]
    assert not (machine.store / "sweep" / ".tune" / "exp-00000000-3-tune").exists()
    assert not list((machine.store / "private").glob("forget-*")) and not forget.traces(
        machine, "phantom", WHO
    )


GONE = ("features", "cell", "sweep", "report")
KEPT = ("weights", "begun", "by weights", "cell of weights")


def test_dependents_are_removed_or_marked(home: dict[str, Artefact], machine: Machine) -> None:
    done = forget.forget(machine, "phantom", WHO)
    assert set(done.removed) == {home[n].id for n in GONE} | {"adapt/task-99999999"}
    assert set(done.marked) == {home[n].id for n in KEPT}
    for name in (*GONE, *KEPT):
        with pytest.raises(UserError, match="forgotten on 2") as error:
            home[name].manifest()
        assert error.value.code == "FORGOTTEN"
        stone = json.loads((home[name].path / store.TOMBSTONE).read_text())
        assert stone["kept"] == (name in KEPT) and len(stone["subject"]) == 16
    for name in GONE:
        assert [p.name for p in home[name].path.iterdir()] == [store.TOMBSTONE] and not home[name].done
    for name in ("ours", "theirs", "other weights", "untouched", "cell untouched"):
        assert home[name].manifest()
    weights = home["weights"]
    for read in (
        lambda: checkpoint.locate("scratch", "x", None, weights),
        lambda: checkpoint.read_card(weights.path),
    ):
        with pytest.raises(UserError, match="may keep what was learned"):
            read()
    (weights.path / store.TOMBSTONE).unlink()  # as the message says
    assert weights.manifest() and checkpoint.read_card(weights.path) == {}
    commit(home["cell"].path, stage="adapt", inputs=[])  # made anew
    assert home["cell"].manifest()["stage"] == "adapt"


def test_the_same_files_do_not_bring_the_subject_back(
    raw: Path, home: dict[str, Artefact], machine: Machine
) -> None:
    forget.forget(machine, "phantom", WHO)
    again = ingested(raw, machine)
    assert again == home["ours"] and len(again.manifest()["forgotten"]) == 1
    other = ingested(raw, machine, size=28)
    assert {s for s, _ in rows(other)} == {"001", "003", "004"} and len(other.manifest()["forgotten"]) == 1
    assert holding(machine.store, {WHO}) == []
    assert ingested(raw, machine, "away", size=28).manifest()["forgotten"] == []
    with pytest.raises(UserError, match="this subject"):
        forget.forget(machine, "away", WHO)
    assert forget.forget(machine, "phantom", WHO).rewritten == []  # nothing left to do


@pytest.mark.flow
def test_under_salted_names_and_in_every_version(raw: Path, machine: Machine) -> None:
    salted = ingested(raw, machine, identifiers="salted")
    first = ingested(raw, machine)
    more = raw.parent / f"{machine.store.parent.name}-more"  # the same files and one more: shards are shared
    shutil.copytree(raw / "phantom", more / "phantom")
    shutil.copytree(more / "phantom/sub-004/ses-a", more / "phantom/sub-005/ses-a")
    for path in sorted((more / "phantom/sub-005").rglob("*004*")):
        path.rename(path.with_name(path.name.replace("004", "005")))
    second = ingested(more, machine)
    key = naming.subject_key(identity.salt(machine.store), "phantom", WHO)
    assert len(holding(machine.store, {WHO, key})) >= 9
    done = forget.forget(machine, "phantom", WHO)
    assert set(done.rewritten) == {salted.id, first.id, second.id}
    assert holding(machine.store, {WHO, key}) == []
    assert len(rows(salted)) == len(rows(first)) == 5
    names = json.loads(next((machine.store / "private").glob("names-*.json")).read_text())
    assert set(names["subjects"]) == {"001", "003", "004"} and len(names["paths"]) == 2 * 6


def test_work_that_was_never_finished_goes(raw: Path, machine: Machine) -> None:
    made = ingested(raw, machine)

    def stop(done: int, total: int, text: str) -> None:
        if "shards" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(card("phantom"), raw / "phantom", SPEC.model_copy(update={"size": 28}), machine, stop)
    assert [name for name in holding(machine.store, {WHO}) if made.path.name not in name]
    forget.forget(machine, "phantom", WHO)
    assert holding(machine.store, {WHO}) == []


def test_the_last_subject_of_a_set(raw: Path, machine: Machine) -> None:
    made = ingested(raw, machine)
    for subject in (WHO, "001", "003", "004"):
        forget.forget(machine, "phantom", subject)
    assert not made.done and holding(machine.store, {WHO, "sub-001"}) == []


# ---- killed ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """From the `after`-th change to the disk on, every change fails, those of clean-up as well; how many there were."""
    count = 0

    def deadly(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return real(*arguments, **options)

        return call

    for name in ("replace", "unlink", "link", "rmdir"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))
    return lambda: count


def contents(folder: Path) -> dict[str, bytes]:
    skipped = ("locks", "private")
    files = (
        p for p in folder.rglob("*") if p.is_file() and not set(p.relative_to(folder).parts) & set(skipped)
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != trust.VERIFIED}


def check_kills(home: dict[str, Artefact], machine: Machine, stride: int) -> None:
    """Copies of a store, each killed after another number of changes; then the same command completes it."""
    whole = machine.store.with_name("whole")
    identity.salt(machine.store)
    shutil.copytree(machine.store, whole)
    forget.forget(machine, "phantom", WHO)
    expected, after = contents(machine.store), 0
    while True:
        shutil.rmtree(machine.store)
        shutil.copytree(whole, machine.store)
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, after)
            try:
                forget.forget(machine, "phantom", WHO)
                break
            except Killed:
                pass
        ours = home["ours"]
        try:  # what is visible is the old set or the new one, or it is refused
            trust.check(ours)
            assert len(rows(ours)) in (5, 6)
        except UserError as error:
            assert error.code in ("TABLE_HASH", "SHARD_MISSING", "TABLE_MISSING"), error
        forget.forget(machine, "phantom", WHO)
        assert contents(machine.store) == expected, f"killed after {after} changes"
        assert holding(machine.store, {WHO}) == []
        after += stride
    assert after > 20


def test_killed_here_and_there(home: dict[str, Artefact], machine: Machine) -> None:
    check_kills(home, machine, 13)


@pytest.mark.chaos
def test_killed_anywhere(home: dict[str, Artefact], machine: Machine) -> None:
    check_kills(home, machine, 1)


# ---- refusals and the command line ----------------------------------------------------------------------------------


def test_nothing_else_may_work_in_the_store(home: dict[str, Artefact], machine: Machine) -> None:
    with store.lock(machine.store, "embed/other"), pytest.raises(UserError) as error:
        forget.forget(machine, "phantom", WHO)
    assert error.value.code == "BUSY"
    assert WHO in {s for s, _ in rows(home["ours"])} and not identity.forgotten(machine.store)


def test_mlflow_that_is_down_delays_its_part_only(
    home: dict[str, Artefact], machine: Machine, monkeypatch: pytest.MonkeyPatch, mlflow: Calls
) -> None:
    def down(*_: Any) -> None:
        raise track.TrackingError("no answer")

    monkeypatch.setattr(track, "forget", down)
    with pytest.raises(UserError, match="run the same again") as error:
        forget.forget(machine, "phantom", WHO)
    assert (error.value.code, error.value.exit_code) == ("TRACKING", 1)
    assert holding(machine.store, {WHO}) == []
    monkeypatch.setattr(track, "forget", mlflow)
    assert forget.forget(machine, "phantom", WHO).runs == 3 and len(mlflow) == 1


def test_the_command(
    raw: Path, home: dict[str, Artefact], machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = phantoms.write_card(tmp_path / "datasets", contrasts=("T1w",))
    (machine.store / "report" / "notes.txt").write_text(f"look at {WHO} again")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["forget", str(file), f"store={machine.store}", *arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    assert run()[0] == 2 and run("subject=")[0] == 2 and run("subject=away/1")[0] == 2
    code, _, said = run("subject=nobody")
    assert code == 2 and "error NO_SUBJECT" in said and home["ours"].path.name in said
    code, said, _ = run(f"subject=phantom/{WHO}", "--json")
    facts = json.loads(said.splitlines()[-1])
    assert (
        code == 0
        and facts["rewritten"] == [home["ours"].id]
        and facts["still_named_in"] == ["report/notes.txt"]
    )
    assert WHO not in said
    assert place.names(home["ours"].path / "work") == {}
