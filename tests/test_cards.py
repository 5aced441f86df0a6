"""Every card against a phantom tree written from its source's description: exactly the table that must come of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trees
from cranium import cohort
from cranium.cards import Card, load_card
from cranium.reading import share

COHORTS = (
    "oasis3", "nacc", "adni", "brats2020", "nifd", "upenn_gbm", "habs", "ucsf_pdgm", "burdenko_gbm", "aibl",
    "remind", "feta2021",
)  # fmt: skip
COUNT = re.compile(r"\d+ (subjects|sessions|scans) found, \d+ are in the published collection")

UNUSED = re.compile(r"\d+ NIfTI files fit no pattern of the card, such as ")


@pytest.mark.parametrize("name", trees.WRITERS)
def test_a_tree_is_found_as_its_source_describes_it(name: str, tmp_path: Path) -> None:
    expected = trees.WRITERS[name](tmp_path)
    card = load_card(expected.card)
    table = cohort.scan(card, tmp_path)
    assert {(s.subject, s.session): sorted(s.scans) for s in table.sessions} == {
        who: list(found.contrasts) for who, found in expected.sessions.items()
    }
    assert table.layout.name == expected.layout
    for session in table.sessions:
        found = expected.sessions[session.subject, session.session]
        labels = {
            name: cohort.label_of(label, session.values[label.column]) for name, label in card.labels.items()
        }
        assert labels == dict(found.labels) | {n: None for n in labels if n not in found.labels}
        assert {column: session.values[column] for column in found.values} == dict(found.values)
        assert session.segmentation == found.segmentation
        noted = {contrast: scan.path for contrast, scan in session.scans.items() if scan.note}
        assert noted == dict(found.repeats)
    counts = [note for note in table.notes if COUNT.match(note)]
    unused = [note for note in table.notes if UNUSED.match(note)]
    assert [int(note.split()[0]) for note in unused] == ([expected.unused] if expected.unused else [])
    rest = sorted({*table.notes} - {*counts, *unused})
    rest = [note for note in rest if "series are of another kind" not in note]  # they are in `refused`
    assert len(rest) == len(expected.notes), rest
    assert all(note.startswith(how) for note, how in zip(rest, sorted(expected.notes), strict=True)), rest
    assert len(counts) == expected.counts
    assert {(r.code, r.path.rsplit("/", 1)[-1]) for r in table.refused} == set(expected.refused)
    assert table.overlap_ids == expected.shared
    listed = {path for path, _ in table.files}
    assert {s.segmentation for s in table.sessions} - {None} <= listed  # what is read shapes the identity


@pytest.mark.parametrize("name", COHORTS)
def test_every_cohort_has_a_tree_and_says_where_it_is_from(name: str) -> None:
    card = load_card(name)
    assert all(layout.source or layout.unverified for layout in card.layouts)
    assert all(table.source or table.unverified for table in card.tables)
    assert card.url and card.citation and card.licence


def test_overlaps_name_cards_and_the_mappings_meet() -> None:
    cards = {name: load_card(name) for name in COHORTS}
    for card in cards.values():
        for overlap in card.overlaps:
            assert overlap.cohort in cards and overlap.reason
            back = {o.cohort for o in cards[overlap.cohort].overlaps}
            assert card.name in back or not overlap.mapping


def test_values_of_unknown_meaning_are_in_no_class(tmp_path: Path) -> None:
    """As a task refuses them (`adapt.subjects`): a value that the card does not know is never dropped in silence."""
    trees.brats2020(tmp_path)
    (tmp_path / "name_mapping.csv").write_text("Grade,BraTS_2020_subject_ID\nhgg?,BraTS20_Training_001\n")
    card = load_card("brats2020")
    session = cohort.scan(card, tmp_path).sessions[0]
    assert session.values["grade"] == "hgg?"
    assert cohort.label_of(card.labels["grade"], "hgg?") is None


def test_the_cards_of_the_readme_are_cards(tmp_path: Path) -> None:
    folder = share() / "datasets"
    (tmp_path / "bids.yaml").write_text((folder / "bids.yaml").read_text())
    examples = re.findall(r"```yaml\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    cards = []
    for text in examples:
        (tmp_path / "mine.yaml").write_text(text)
        cards.append(load_card("mine", tmp_path))
    assert [card.columns for card in cards] == [(), ("age", "sex", "dx", "family", "mmse")]


def test_segmentation_maps_start_at_one_and_name_each_value_once() -> None:
    for name in COHORTS:
        values = [value for raws in load_card(name).segmentation.values() for value in raws]
        assert len(values) == len(set(values)) and 0 not in values


def test_what_is_unverified_is_told_finely() -> None:
    assert load_card("nacc").unverified == ("layout 1",)
    assert load_card("nifd").unverified == ("layout loni",)
    assert load_card("habs").unverified == ("label diagnosis",)
    content = load_card("habs").model_dump(mode="json")
    content["tables"][0]["unverified"] = True
    assert "table Demographics_HABS_DataRelease_*.csv" in Card.model_validate(content).unverified


def test_people_of_brats_are_found_in_ucsf_pdgm_by_its_own_table(tmp_path: Path) -> None:
    """Both trees side by side: the metadata of UCSF-PDGM names case 97 of BraTS 2021, which is case 369 of 2020."""
    trees.brats2020(tmp_path / "brats")
    trees.ucsf_pdgm(tmp_path / "ucsf")
    metadata = tmp_path / "ucsf" / "UCSF-PDGM-metadata_v5.csv"
    metadata.rename(tmp_path / "brats" / metadata.name)
    table = cohort.scan(load_card("brats2020"), tmp_path / "brats")
    assert table.overlap_ids["ucsf_pdgm"] == {"BraTS20_Training_369": ("0004",)}
    theirs = {s.subject for s in cohort.scan(load_card("ucsf_pdgm"), tmp_path / "ucsf").sessions}
    assert "0004" in theirs
