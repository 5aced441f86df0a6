from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cranium.volume.agent import agent
from cranium.volume.contrast import classify
from cranium.volume.headers import Header

PLAIN = Header(
    uid="1.1",
    study="1",
    date="20200102",
    modality="MR",
    sop_class="1.2.840.10008.5.1.4.1.1.4",
    number=3,
    when="20200102101500",
    image_type=("ORIGINAL", "PRIMARY", "M"),
    description="",
    protocol="",
    study_description="",
    sequence_name="",
    scanning=frozenset({"SE"}),
    variant=frozenset(),
    dimension="2D",
    tr=600.0,
    te=12.0,
    ti=None,
    flip=90.0,
    weighting="",
    agent="",
    agent_given="",
    agent_volume=None,
    agent_start="",
    b_value=None,
    temporal=None,
    angio=False,
    burned_in=False,
    colour=False,
    inverted=False,
    body_part="",
)


def header(
    scanning: str = "SE", tr: Any = 600.0, te: Any = 12.0, ti: Any = None, flip: Any = 90.0, **more: Any
) -> Header:
    kinds = frozenset(scanning.split())
    return replace(PLAIN, scanning=kinds, tr=tr, te=te, ti=ti, flip=flip, **more)


@pytest.mark.parametrize(
    ("contrast", "sequence"),
    [
        ("T1w", ("GR IR", 2300, 2.98, 900, 9)),  # MPRAGE, Siemens
        ("T1w", ("GR", 7.1, 3.2, None, 8)),  # TFE, Philips: inversion untold
        ("T1w", ("GR", 8.2, 3.2, 450, 12)),  # BRAVO, GE
        ("T1w", ("RM", 3000, 3.6, 1000, 8)),  # IR-SPGR of ADNI, GE research mode
        ("T1w", ("GR", 250, 2.5, None, 70)),  # 2D FLASH
        ("T1w", ("GR IR", 5000, 2.98, None, 4)),  # UNI image of MP2RAGE
        ("T1w", ("SE", 550, 10, None, 90)),
        ("T1w", ("SE", 700, 23, None, 120)),  # SPACE
        ("T1w", ("SE IR", 2000, 9, 860, 90)),  # T1 FLAIR
        ("T2w", ("SE", 3500, 95, None, 150)),
        ("T2w", ("SE", 3200, 408, None, 120)),  # SPACE
        ("FLAIR", ("SE IR", 9000, 125, 2500, 150)),
        ("FLAIR", ("SE IR", 5000, 388, 1800, 120)),  # SPACE
        ("PDw", ("SE", 2300, 22, None, 90)),
    ],
)
def test_attributes_alone_tell_the_contrast(contrast: str, sequence: tuple[Any, ...]) -> None:
    told = "T1 IR-SPGR" if sequence[0] == "RM" else ""
    decision = classify(header(*sequence, description=told))
    assert (decision.contrast, decision.code) == (contrast, ""), decision


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("NOT_MR", {"modality": "CT"}),
        ("NOT_MR", {"modality": "RTSTRUCT", "sop_class": "1.2.840.10008.5.1.4.1.1.481.3"}),
        ("NOT_MR", {"sop_class": "1.2.840.10008.5.1.4.1.1.7"}),  # secondary capture that calls itself MR
        ("BURNED_IN", {"burned_in": True}),
        ("DERIVED", {"colour": True}),
        ("DERIVED", {"image_type": ("DERIVED", "PRIMARY", "DIFFUSION", "FA")}),
        ("DERIVED", {"image_type": ("DERIVED", "SECONDARY", "MPR")}),
        ("DERIVED", {"image_type": ("ORIGINAL", "PRIMARY", "P", "ND")}),  # phase
        ("DERIVED", {"description": "AX T1 SUB"}),
        ("LOCALIZER", {"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}),
        ("LOCALIZER", {"description": "AAScout"}),
        ("NOT_STRUCTURAL", {"scanning": frozenset({"EP", "SE"})}),
        ("NOT_STRUCTURAL", {"b_value": 1000.0}),
        ("NOT_STRUCTURAL", {"description": "SWI_Images"}),
        ("NOT_STRUCTURAL", {"description": "pCASL"}),
        ("NOT_STRUCTURAL", {"description": "Cor STIR"}),
        ("NOT_STRUCTURAL", {"description": "t1_vibe_dyn"}),
        ("NOT_STRUCTURAL", {"description": "3D TOF"}),
        (
            "NOT_STRUCTURAL",
            {"angio": True, "scanning": frozenset({"GR"}), "tr": 25.0, "te": 5.0, "flip": 20.0},
        ),
        ("NOT_STRUCTURAL", {"study_description": "MRI SHOULDER"}),
        ("NOT_STRUCTURAL", {"body_part": "CSPINE"}),
        ("NOT_STRUCTURAL", {"temporal": 40.0}),
        ("NOT_STRUCTURAL", {"echoes": 8}),
        ("NOT_STRUCTURAL", {"weighting": "T2_STAR"}),
        ("NOT_STRUCTURAL", {"scanning": frozenset({"GR"}), "tr": 650.0, "te": 20.0, "flip": 20.0}),  # T2*
        ("CONTRAST_UNDECIDED", {"tr": 2500.0, "te": 52.0}),
        ("CONTRAST_UNDECIDED", {"tr": 1500.0}),
        ("CONTRAST_UNDECIDED", {"scanning": frozenset({"GR"}), "tr": 25.0, "te": 5.0, "flip": 4.0}),
        ("CONTRAST_UNDECIDED", {"description": "AX T2"}),  # of TR 600, TE 12
        ("CONTRAST_UNDECIDED", {"weighting": "T2"}),
        ("CONTRAST_UNDECIDED", {"tr": None}),
        ("CONTRAST_UNDECIDED", {"tr": None, "description": "T1 and T2"}),
        ("CONTRAST_UNDECIDED", {"tr": 9000.0, "te": 120.0, "ti": 2500.0, "description": "T1 FLAIR"}),
        (
            "CONTRAST_UNDECIDED",
            {"tr": 2300.0, "te": 3.0, "flip": 9.0, "scanning": frozenset()},
        ),  # MPRAGE or PD?
    ],
)
def test_what_is_none_of_ours_or_cannot_be_told(code: str, changes: dict[str, Any]) -> None:
    decision = classify(replace(PLAIN, **changes))
    assert (decision.contrast, decision.code) == (None, code), decision


def test_a_real_flair_of_ge() -> None:
    """Research mode, no inversion time, and flagged as angiography: seen in a real header."""
    odd = header("RM", 10002.0, 159.5, None, 90.0, angio=True, sequence_name="flair", agent="NONE")
    for description in ("FLAIR", ""):
        decision = classify(replace(odd, description=description))
        assert (decision.contrast, [n.code for n in decision.notes]) == ("FLAIR", ["CONTRAST_BY_NAME"])


def test_an_original_acquisition_marked_as_reformat_is_taken() -> None:
    """A real GE series has ImageType ORIGINAL, PRIMARY, MPR."""
    assert classify(replace(PLAIN, image_type=("ORIGINAL", "PRIMARY", "MPR"))).contrast == "T1w"


@pytest.mark.parametrize(
    ("contrast", "description", "numbers"),
    [
        ("FLAIR", "T2 FLAIR", {"tr": None, "te": None}),
        ("T1w", "t1_mprage", {"tr": None, "te": None}),
        ("T1w", "Ax T1 FLAIR", {"tr": None, "te": None}),
        ("FLAIR", "FLAIR_longTR", {"tr": 11000.0, "te": 125.0}),  # Philips: inversion untold
    ],
)
def test_names_decide_where_attributes_are_missing_and_a_note_says_so(
    contrast: str, description: str, numbers: dict[str, Any]
) -> None:
    decision = classify(replace(PLAIN, description=description, **numbers))
    assert decision.contrast == contrast
    assert "CONTRAST_BY_NAME" in {note.code for note in decision.notes}


def test_dual_echo_may_be_named_after_both() -> None:
    pair = [header("SE", 3000.0, te, description="AX PD/T2", echoes=2, echo=te) for te in (15.0, 90.0)]
    assert [classify(one).contrast for one in pair] == ["PDw", "T2w"]


@pytest.mark.parametrize(
    ("state", "descriptions"),
    [
        (
            "yes",
            [
                "AX T1 POST",
                "t1_mprage_sag_p2_iso_Gd",
                "T1 +C",
                "T1+C",
                "T1 C+",
                "T1 GAD",
                "t1ce",
                "T1C",
                "T1 CE FS",
            ],
        ),
        (
            "yes",
            ["t1 axial stealth-post  ProcessedCaPTk", "3D_AX_T1_postcontrast", "3DAXT1postcontrast", "T1 KM"],
        ),
        ("yes", ["T1 with contrast", "T1 enhanced", "T1 Magnevist", "T1 Gadolinium"]),
        (
            "no",
            [
                "AX T1 PRE",
                "T1 W/O",
                "T1 WO",
                "T1 without",
                "T1 non-contrast",
                "T1 no gad",
                "T1 -C",
                "T1 C-",
                "T1 nativ",
            ],
        ),
        ("no", ["3D_AX_T1_precontrast", "SAG T1 PRE GAD", "T1 unenhanced", "T1 without contrast"]),
        ("conflict", ["T1 W/WO", "T1 with and without", "T1 pre post", "T1-C"]),
        (
            "silent",
            [
                "AX T1",
                "T1W_3D_FFE",
                "T1 post-op",
                "AX T1 POST FOSSA",
                "T1 PreScan norm",
                "MPRAGE",
                "T1 SPACE",
            ],
        ),
    ],
)
def test_words_of_contrast_agent(state: str, descriptions: list[str]) -> None:
    told = {text: agent(replace(PLAIN, description=text))[0] for text in descriptions}
    assert told == dict.fromkeys(descriptions, state)


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        ("T1ce", {"agent": "GADAVIST"}),
        ("T1ce", {"agent_volume": 7.5}),
        ("T1ce", {"agent_given": "YES"}),
        ("T1ce", {"description": "T1 POST", "agent": "10 ml"}),
        ("T1w", {"agent": "NONE"}),
        ("T1w", {"agent_volume": 0.0}),  # GE's default: no statement
        ("T1w", {"agent_given": "NO", "agent": "GADAVIST"}),
        ("T1w", {"agent": "GADAVIST", "agent_start": "103000"}),  # after 10:15
        ("T1ce", {"agent": "GADAVIST", "agent_start": "100000"}),
        ("AGENT_CONFLICT", {"agent": "GADAVIST", "description": "T1 PRE"}),
        ("AGENT_CONFLICT", {"agent": "NO CONTRAST", "description": "T1 POST"}),
        ("AGENT_CONFLICT", {"description": "T1 W/WO"}),
    ],
)
def test_attributes_of_contrast_agent(outcome: str, changes: dict[str, Any]) -> None:
    decision = classify(replace(PLAIN, **changes))
    assert (decision.contrast or decision.code) == outcome, decision


@pytest.mark.parametrize(
    ("outcome", "others", "study"),
    [
        ("T1w", [], ""),
        ("T1w", [{"when": "20200102110000", "description": "T1 POST"}], ""),
        ("T1w", [{"when": "20200102110000", "description": "T1 POST"}], "BRAIN W/WO CONTRAST"),
        ("T1w", [], "BRAIN W/O CONTRAST"),
        ("T1w", [{"when": "20200102090000", "description": "pCASL perfusion"}], ""),
        ("AGENT_UNDECIDED", [{"when": "20200102090000", "description": "T1 POST"}], ""),
        ("AGENT_UNDECIDED", [{"when": "20200102090000", "tr": 9000.0, "te": 120.0, "agent": "Y"}], ""),
        ("AGENT_UNDECIDED", [{"when": "20200102090000", "description": "ep2d_perf"}], ""),
        ("AGENT_UNDECIDED", [], "BRAIN W/WO CONTRAST"),
        ("AGENT_UNDECIDED", [], "MRI BRAIN WITH GAD"),
        ("AGENT_UNDECIDED", [{"when": "", "number": 2, "description": "T1 POST"}], ""),
        ("T1w", [{"when": "", "number": 9, "description": "T1 POST"}], ""),
        ("AGENT_UNDECIDED", [{"when": "", "number": 0, "description": "T1 POST"}], ""),  # no order known
    ],
)
def test_a_silent_t1_is_judged_by_its_study(outcome: str, others: list[dict[str, Any]], study: str) -> None:
    silent = replace(PLAIN, description="AX T1", study_description=study)
    rest = [replace(PLAIN, **{"uid": f"1.{i + 2}", **other}) for i, other in enumerate(others)]
    decision = classify(silent, {}, [silent, *rest])
    assert (decision.contrast or decision.code) == outcome, decision
    if outcome == "T1w":
        assert [note.code for note in decision.notes] == ["AGENT_SILENT"]


def test_declared_descriptions_decide_first_and_a_note_tells_what_they_override() -> None:
    declared = {"T1ce": ("stealth",), "T1w": ("^ax t1$",)}
    assert classify(replace(PLAIN, description="AX T1"), declared).contrast == "T1w"
    odd = classify(replace(PLAIN, description="t1 STEALTH pre"), declared)
    assert odd.contrast == "T1ce" and [note.code for note in odd.notes] == ["CONTRAST_DECLARED"]
    both = classify(replace(PLAIN, description="stealth"), {"T1ce": ("stealth",), "T2w": ("st",)})
    assert (both.contrast, both.code) == (None, "CONTRAST_UNDECIDED")
    assert classify(replace(PLAIN, modality="SEG", description="AX T1"), declared).code == "NOT_MR"
    assert classify(replace(PLAIN, description="", protocol="AX T1"), declared).contrast == "T1w"


def test_reasons_quote_no_free_text() -> None:
    names = [
        "DOE^JANET T1 POST",
        "Gadsby T1",
        "Diffenbaker DWI",
        "T1 hemolytic Smith",
        "DOE T2 and T1",
        "DOE segmented",
    ]
    for text in names:
        for changes in ({}, {"tr": None}, {"modality": "DOE JANET"}, {"weighting": "DOE"}, {"agent": "DOE"}):
            decision = classify(replace(PLAIN, description=text, study_description="DOE", **changes))  # type: ignore[arg-type]
            told = " ".join([decision.reason, *(note.reason for note in decision.notes)]).lower()
            assert not [word for word in ("doe", "janet", "gadsby", "baker", "smith") if word in told], told
