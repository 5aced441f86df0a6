"""The contrast of a DICOM series, by its sequence attributes; or why it is none, or cannot be told.

Rules, first to last; times in ms. Numbers leave out what lies between two weightings: there the answer is "undecided".

1. Never a scan of the head's structure: another modality or no MR image, a localiser, colour, burnt-in text, and by
   ImageType: maps, projections, subtractions, phase.
2. Where the card declares `descriptions`, a regular expression that finds SeriesDescription (or else ProtocolName)
   decides, agent included; two contrasts found are undecided.
3. Reformats (DERIVED with MPR or the like), and by words of the description or by attributes: diffusion, perfusion,
   susceptibility, function, angiography, steady state, STIR, DIR, spectroscopy, mapping, other parts of the body.
4. By attributes:

   | sequence                   | TI          | TR         | TE    | flip  | contrast                           |
   |----------------------------|-------------|------------|-------|-------|------------------------------------|
   | any with inversion         | 1400 - 3300 | >= 4000    | >= 60 |       | FLAIR                              |
   | gradient echo, inversion   | 300 - 1400, or untold    | <= 10 |       | T1w (MPRAGE, BRAVO, MP2RAGE's UNI) |
   | spin echo, inversion       | 300 - 1400  | <= 4000    | <= 40 |       | T1w (T1 FLAIR)                     |
   | gradient echo              |             | <= 60      | <= 8  | >= 7  | T1w (SPGR, FLASH, FFE, VIBE)       |
   | gradient echo              |             | 60 - 700   | <= 8  | >= 50 | T1w (2D FLASH)                     |
   | gradient echo              |             |            | >= 12 |       | T2*: none of ours                  |
   | spin echo                  |             | <= 1300    | <= 40 |       | T1w                                |
   | spin echo                  |             | >= 1800    | >= 60 |       | T2w; FLAIR if named so, TR >= 4000 |
   | spin echo                  |             | >= 1800    | <= 45 |       | PDw                                |

   A description that names another weighting makes it undecided. Without TR or TE the description's words decide, and
   a note says so. Research modes that hide the sequence count as gradient echo (flip <= 30, TE <= 10, and a name of
   T1) or spin echo (flip >= 60).
5. Agent. A T1w is T1ce if the agent's attributes or words ("post", "gad", "+c", ...) say so, and T1w if they say the
   opposite ("pre", "w/o", agent "none", injected after the acquisition). Where they contradict each other: rejected.
   Where they say nothing it is T1w, with a note, unless the study shows agent before it: an earlier series with agent
   (any contrast; perfusion counts), or a study description that orders agent while no later series shows it. Then
   rejected: whether the gadolinium was in is not to be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cranium.volume.agent import agent, in_study_before, named, words
from cranium.volume.headers import Header
from cranium.volume.quality import Note

# Classic, enhanced, converted.
MR_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.4{kind}" for kind in ("", ".1", ".4"))
MAPS = frozenset(  # values of ImageType
    {
        "ADC",
        "FA",
        "TRACEW",
        "TENSOR",
        "EXP",
        "PERFUSION",
        "CBF",
        "CBV",
        "RCBV",
        "MTT",
        "TTP",
        "TMAX",
        "DIFFUSION",
    }
    | {"T1 MAP", "T2 MAP", "T2STAR MAP", "PHASE MAP", "B0 MAP", "R2", "R2STAR", "FIELD_MAP", "B0", "B1"}
    | {"SUBTRACT", "SUBTRACTION", "SUB", "MIP", "MNIP", "MIN_IP", "PROJECTION IMAGE", "SEGMENTATION", "RGB"}
    | {"SCREEN SAVE", "CSA REPORT", "MOSAIC"}
)
PARTS = frozenset({"P", "PHASE", "R", "REAL", "I", "IMAGINARY", "VELOCITY"})  # third value: not the magnitude
REFORMATS = frozenset({"MPR", "REFORMATTED", "CPR", "CSA MPR", "RESAMPLED"})
OTHER_BODY = ("SPINE", "CHEST", "ABDOMEN", "PELVIS", "BREAST", "KNEE", "SHOULDER", "HEART", "PROSTATE")
WEIGHTINGS = {"T1": "T1w", "T2": "T2w", "PROTON_DENSITY": "PDw", "FLUID_ATTENUATED": "FLAIR"}

LOCALIZER = re.compile(
    r"locali[sz]er|\bloc\b|scout|survey|\b3 ?(plane|pl)\b|smartbrain|\bcalib|\basset\b|\bb[01] ?map|field ?map|\bshim"
)
DERIVED = re.compile(
    r"\be?adc\b|\btrace\b|\btracew\b|\bfa\b(?! ?\d)|\bm(in)?ip\b|\bsub\b|\bsubtract|\br?cb[fv]\b|\bmtt\b|\bttp\b|"
    r"\btmax\b|\b(t[12] ?)?maps?\b|\bcolou?r\b|\bsegm|screen ?(save|shot|cap)|reformat|mpr range"
)
OTHER = re.compile(
    r"\bdwi\b|\bdti\b|\bdiff|\bb ?\d{3,4}\b|\bhardi\b|\btensor\b|\bswi\b|\bswan\b|venobold|t2 ?\*|t2 ?star|\bhemo|"
    r"\bqsm\b|\bpha(se)?\b|\b[pc]{0,2}asl\b|\bperf|\bdsc\b|\bdce\b|\bpwi\b|\bdyn|\btwist\b|\bbold\b|\bfmri\b|"
    r"\brest(ing)?\b|\btask\b|\btof\b|\bmr[av]\b|angio|venogra|\bciss\b|\bfiesta\b|tru ?fi|true ?fisp|\bb ?ffe\b|"
    r"\bt?stir\b|\bdir\b|spectro|\bsvs\b|\bcsi\b|\bpress\b|\bzte\b|\bute\b|\bpetra\b|\bmrac\b|\bmtc?\b|t1 ?rho|"
    r"\binv ?[12]\b|synthetic|\bmagic\b|\bcine\b|\b[ctl] ?spine\b|\blumbar\b|\bcervical\b|\bthoracic\b"
)
NAMES: Mapping[str, re.Pattern[str]] = {
    "T1w": re.compile(r"t1(?!\d)|mp ?rage|\bf?spgr\b|\bbravo\b"),
    "T2w": re.compile(r"t2(?!\d| ?\*| ?star)"),
    "FLAIR": re.compile(r"flair|dark ?fl"),
    "PDw": re.compile(r"\bpdw?\b|proton"),
}
DECLARE = "name it under `descriptions` in the card"


@dataclass(frozen=True)
class Decision:
    """A contrast, or a code of `quality.REJECTIONS`; the reason holds no free text of the header."""

    contrast: str | None
    code: str
    reason: str
    notes: tuple[Note, ...] = ()


def classify(
    header: Header, descriptions: Mapping[str, Sequence[str]] | None = None, study: Sequence[Header] = ()
) -> Decision:
    """What a series is, by the rules above. `study`: the headers of all series of its study, itself included."""
    if refused := _no_scan(header):
        return refused
    notes = [Note("DERIVED_USED", "ImageType says DERIVED")] if header.image_type[:1] == ("DERIVED",) else []
    declared = _declared(header, descriptions or {})
    if len(declared) > 1:
        return _undecided(f"the card's descriptions of {' and '.join(declared)} both fit it")
    found = _other(header) or _weighting(header)
    if found.contrast == "T1w":
        found = _with_agent(header, found, study)
    if declared:
        if found.contrast != declared[0]:
            without = found.reason.removesuffix(f"; {DECLARE}")
            notes.append(Note("CONTRAST_DECLARED", f"{declared[0]} by the card; without it: {without}"))
        return Decision(declared[0], "", "its description is declared in the card", tuple(notes))
    return Decision(found.contrast, found.code, found.reason, (*notes, *found.notes))


def _undecided(reason: str) -> Decision:
    return Decision(None, "CONTRAST_UNDECIDED", f"{reason}; {DECLARE}")


def _no_scan(header: Header) -> Decision | None:
    """Rule 1."""
    kind = set(header.image_type)
    if header.modality != "MR":
        known = re.fullmatch(r"[A-Z]{2,10}", header.modality)
        return Decision(None, "NOT_MR", f"modality {header.modality if known else 'untold'}")
    if header.sop_class not in MR_CLASSES:
        return Decision(None, "NOT_MR", "no MR image: a capture, report or another object")
    if header.burned_in:
        return Decision(None, "BURNED_IN", "BurnedInAnnotation is YES: there is text in the pixels")
    if header.colour:
        return Decision(None, "DERIVED", "a colour image: a map or a capture of a screen")
    if "LOCALIZER" in kind:
        return Decision(None, "LOCALIZER", "ImageType LOCALIZER")
    if maps := sorted(kind & MAPS) or sorted(PARTS.intersection(header.image_type[2:3])):
        return Decision(None, "DERIVED", f"ImageType {maps[0]}")
    return None


def _declared(header: Header, descriptions: Mapping[str, Sequence[str]]) -> list[str]:
    """Rule 2: the contrasts whose expressions find the description, or else the protocol's name."""
    for text in (header.description, header.protocol):
        found = [
            str(contrast)
            for contrast, expressions in descriptions.items()
            if any(re.search(expression, text, re.IGNORECASE) for expression in expressions)
        ]
        if found:
            return found
    return []


def _other(header: Header) -> Decision | None:
    """Rule 3."""
    name = words(header)
    if header.image_type[:1] == ("DERIVED",) and (kinds := sorted(REFORMATS.intersection(header.image_type))):
        return Decision(None, "DERIVED", f"ImageType DERIVED, {kinds[0]}: a reformat")
    for pattern, code in ((LOCALIZER, "LOCALIZER"), (DERIVED, "DERIVED"), (OTHER, "NOT_STRUCTURAL")):
        if match := pattern.search(name):
            return Decision(None, code, named(match))
    gradient = "GR" in header.scanning and "SE" not in header.scanning
    steady = "SS" in header.variant and "SP" not in header.variant and (header.tr or 99) <= 12
    mapping = header.echoes > (1 if gradient else 2) and not _inverted(header)
    signs = (
        ("echo planar", "EP" in header.scanning),
        ("diffusion weighting", bool(header.b_value)),
        ("angiography by its flag", header.angio and gradient),  # GE sets it on spin echoes too
        ("several time points", (header.temporal or 1) > 1),
        ("another part of the body", _elsewhere(header)),
        (
            "AcquisitionContrast of another kind",
            header.weighting not in ("", "UNKNOWN", "MIXED", *WEIGHTINGS),
        ),
        ("steady state", gradient and steady and (header.flip or 0) >= 30),
        ("gradient echo with magnetisation transfer", gradient and "MTC" in header.variant),
        (f"{header.echoes} echoes, for mapping", mapping),
    )
    return next((Decision(None, "NOT_STRUCTURAL", sign) for sign, there in signs if there), None)


def _elsewhere(header: Header) -> bool:
    body = header.body_part or header.study_description.upper()
    return any(part in body for part in OTHER_BODY) and not any(part in body for part in ("BRAIN", "HEAD"))


def _inverted(header: Header) -> bool:
    return "IR" in header.scanning or header.ti is not None


def _weighting(header: Header) -> Decision:
    """Rule 4."""
    names = {contrast for contrast, pattern in NAMES.items() if pattern.search(words(header))}
    if NAMES["FLAIR"].search(header.sequence_name.lower()):  # of GE
        names.add("FLAIR")
    if header.tr is None or header.te is None:
        return _by_name(names)
    contrast, reason = _by_attributes(header, "T1w" in names)
    told = (
        f"TR {header.tr:g}, TE {header.te:g}" + (f", TI {header.ti:g}" if header.ti else "") + f": {reason}"
    )
    t2_like = contrast in (None, "T2w") and header.te >= 60 and header.tr >= 4000 and header.ti is None
    if t2_like and names in ({"FLAIR"}, {"FLAIR", "T2w"}):
        note = Note("CONTRAST_BY_NAME", "FLAIR by its description; no inversion time is told")
        return Decision("FLAIR", "", f"{told}, named FLAIR", (note,))
    if contrast is None:
        star = reason == STAR
        return Decision(None, "NOT_STRUCTURAL", told) if star else _undecided(told)
    agrees = {contrast, "T2w"} if contrast == "FLAIR" or header.echoes == 2 else {contrast}
    agrees |= {"PDw"} if header.echoes == 2 else set()
    against = {"FLAIR": {"T1w"}, "T2w": {"FLAIR"}}.get(contrast, set())
    if names and (not names & agrees or names & against):
        return _undecided(f"{told}, {contrast}, but named {' and '.join(sorted(names))}")
    if WEIGHTINGS.get(header.weighting, contrast) != contrast:
        return _undecided(f"{told}, {contrast}, but AcquisitionContrast is {header.weighting}")
    return Decision(contrast, "", told)


def _by_name(names: set[str]) -> Decision:
    contrast = next(iter(names)) if len(names) == 1 else None
    if "FLAIR" in names and len(names) == 2:
        contrast = {"T1w": "T1w", "T2w": "FLAIR"}.get(*(names - {"FLAIR"}))
    if contrast is None:
        return _undecided("TR or TE is missing, and its description names no one contrast")
    note = Note("CONTRAST_BY_NAME", "TR or TE is missing: by the words of its description")
    return Decision(contrast, "", f"named {' '.join(sorted(names))}", (note,))


STAR = "gradient echo, T2*"


def _by_attributes(header: Header, named_t1: bool) -> tuple[str | None, str]:
    """The table of rule 4. TR and TE are there."""
    tr, te, ti, flip = header.tr or 0.0, header.te or 0.0, header.ti, header.flip
    spin, gradient = "SE" in header.scanning, "GR" in header.scanning and "SE" not in header.scanning
    if not spin and not gradient and flip is not None:
        gradient, spin = flip <= 30 and te <= 10 and named_t1, flip >= 60
    prepared = _inverted(header) or "MP" in header.variant
    if ti is not None and 1400 <= ti <= 3300 and te >= 60 and tr >= 4000:
        return "FLAIR", "inversion recovery with long TI and TE"
    if gradient and te <= 10 and prepared and (ti is None or 300 <= ti < 1400):
        return "T1w", "prepared gradient echo"
    if gradient and (ti is None or ti < 300):
        return _gradient_echo(tr, te, flip)
    if spin and ti is not None and 300 <= ti < 1400 and te <= 40 and tr <= 4000:
        return "T1w", "spin echo, inversion recovery"
    if _inverted(header):
        return None, "an inversion that fits no rule"
    if not spin:
        return None, "neither gradient nor spin echo"
    if tr <= 1300 and te <= 40:
        return "T1w", "spin echo, short TR and TE"
    if tr >= 1800 and (te >= 60 or te <= 45):
        return ("T2w", "spin echo, long TR and TE") if te >= 60 else ("PDw", "spin echo, long TR, short TE")
    return None, "spin echo between two weightings"


def _gradient_echo(tr: float, te: float, flip: float | None) -> tuple[str | None, str]:
    if te <= 8 and flip is not None and ((tr <= 60 and flip >= 7) or (60 < tr <= 700 and flip >= 50)):
        return "T1w", "spoiled gradient echo"
    return None, STAR if te >= 12 else "gradient echo between two weightings"


def _with_agent(header: Header, found: Decision, study: Sequence[Header]) -> Decision:
    """Rule 5, of a T1-weighted series."""
    state, sign = agent(header)
    if state == "conflict":
        return Decision(None, "AGENT_CONFLICT", f"T1-weighted ({found.reason}); {sign}; {DECLARE}")
    if state in ("yes", "no"):
        return Decision("T1ce" if state == "yes" else "T1w", "", f"{found.reason}; {sign}", found.notes)
    if earlier := in_study_before(header, study or [header]):
        reason = f"T1-weighted ({found.reason}), says nothing of contrast agent, but {earlier}; {DECLARE}"
        return Decision(None, "AGENT_UNDECIDED", reason)
    note = Note("AGENT_SILENT", "T1w because nothing in its study tells of contrast agent before it")
    return Decision("T1w", "", f"{found.reason}; no word of contrast agent", (*found.notes, note))
