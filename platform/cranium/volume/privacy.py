"""What may identify a person in the words around a scan: header fields, sidecars, file names.

Pure functions on text. A finding names the field and the kind of thing seen, never the text itself, so it can be
written down. It is a suspicion: a name without a mark of one is not recognised, and a number may be harmless. That no
text of a header reaches an output does not rest on this module but on headers being rebuilt from numbers. The kinds
follow the identifiers of the HIPAA safe harbour, 45 CFR 164.514(b)(2), as far as a pattern can tell them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_YEAR = r"(?:19|20)\d\d"
_OPEN, _SHUT = r"(?<![A-Za-z0-9])(?<!\d\.)", r"(?![A-Za-z0-9]|\.\d)"
KINDS: Mapping[str, re.Pattern[str]] = {
    "name": re.compile(
        r"[^\s/\\;,:=^]*[^\W\d_]\^[^\s/\\]*"  # DICOM's PN: DOE^JANE
        r"|\bname\s*[:=]\s*[^\s;,|]+"
        r"|\b(?:patient|subject|participant)'?s?[ _]?name\W{1,4}[^\s;,|]+"
        r"|\b(?:operator|technologist|physician|radiologist|doctor)s?'?(?:[ _]?name)?\s*[:=]\s*[^\s;,|]+"
        r"|\b(?:mr|mrs|ms|dr)\. ?[A-Z]\w+",
        re.IGNORECASE,
    ),
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"),
    "date": re.compile(
        rf"(?<!\d){_YEAR}([-/._]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?:[T_ -]?\d{{6}}(?:\.\d+)?)?(?!\d)"
        rf"|(?<!\d)(?:0?[1-9]|[12]\d|3[01])([-/.])(?:0?[1-9]|[12]\d|3[01])\2{_YEAR}(?!\d)"
        rf"|(?<!\d)\d{{1,2}}[-/. ]?{_MONTH}[-/. ,]*{_YEAR}(?!\d)|\b{_MONTH} ?\d{{1,2}},? {_YEAR}(?!\d)"
        r"|\b(?:birth|born|dob)[ _]?(?:date)?\W{1,3}\d[\d./-]*",
        re.IGNORECASE,
    ),
    "telephone": re.compile(
        r"(?<!\w)\+\d[\d ()/-]{7,}\d|(?<!\w)\(\d{3}\) ?\d{3}[ .-]\d{4}|(?<![\w-])\d{3}[ .-]\d{3}[ .-]\d{4}(?!\w)"
    ),
    "number": re.compile(
        rf"{_OPEN}\d{{6,10}}{_SHUT}|(?<!\d)\d{{3}}-\d{{2}}-\d{{4}}(?!\d)"
        r"|\b(?:mrn|medical record|patient ?id|accession)\W{1,3}\w+",
        re.IGNORECASE,
    ),
    "institution": re.compile(
        r"\b(?:institution|hospital|clinic|department|station|address)(?:al)?[ _]?(?:name)?\s*[:=]\s*[^;,|\n]+"
        r"|\b(?:university|st\.?|general|memorial|children'?s) (?:hospital|clinic|medical cent)",
        re.IGNORECASE,
    ),
}
HARMLESS = (
    re.compile(  # what software stamps into `descrip`: its own build date, a time of day without a date
        rf"FreeSurfer {_MONTH} +\d{{1,2}} {_YEAR}|(?:^|;)\s*Time=\d{{6}}(?:\.\d+)?|\bseed=\d+", re.IGNORECASE
    )
)
SIDECAR: Mapping[str, str] = {  # fields of a BIDS or dcm2niix sidecar that should not be there, by kind
    "PatientName": "name",
    "OperatorsName": "name",
    "PerformingPhysicianName": "name",
    "ReferringPhysicianName": "name",
    "PatientID": "number",
    "OtherPatientIDs": "number",
    "AccessionNumber": "number",
    "StudyID": "number",
    "DeviceSerialNumber": "number",
    "StudyInstanceUID": "number",
    "SeriesInstanceUID": "number",
    "PatientBirthDate": "date",
    "AcquisitionDate": "date",
    "AcquisitionDateTime": "date",
    "StudyDate": "date",
    "SeriesDate": "date",
    "ContentDate": "date",
    "PatientAddress": "address",
    "PatientTelephoneNumbers": "telephone",
    "InstitutionName": "institution",
    "InstitutionAddress": "institution",
    "InstitutionalDepartmentName": "institution",
    "StationName": "institution",
}
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ufffd]{4,}")


@dataclass(frozen=True)
class Suspect:
    """A field that may identify a person, and as what. Never its text."""

    field: str
    kind: str


def kinds(text: str) -> tuple[str, ...]:
    """The kinds of identifying things that a text seems to hold, in the order of `KINDS`."""
    rest = HARMLESS.sub(" ", text)
    return tuple(kind for kind, pattern in KINDS.items() if pattern.search(rest))


def review(texts: Mapping[str, str]) -> tuple[Suspect, ...]:
    """Suspects among named texts."""
    return tuple(Suspect(field, kind) for field, text in texts.items() for kind in kinds(text))


def review_bytes(field: str, content: bytes) -> tuple[Suspect, ...]:
    """Suspects among the readable runs of bytes in UTF-8 or UTF-16 (a header's extensions)."""
    if not any(content):
        return ()
    runs = {
        run for how in ("utf-8", "utf-16-le") for run in _PRINTABLE.findall(content.decode(how, "replace"))
    }
    found = {kind for run in runs for kind in kinds(run)}
    # A DICOM header: (0010,0010) is the patient's name.
    if b"DICM" in content or b"\x10\x00\x10\x00" in content:
        found.add("name")
    return tuple(Suspect(field, kind) for kind in (*KINDS, "address") if kind in found)


def review_sidecar(content: bytes) -> tuple[Suspect, ...]:
    """Suspects in a JSON sidecar: fields that name them, and the text of all others."""
    try:
        fields = json.loads(content)
    except ValueError:  # damaged or cut: it is only looked at, so its text will do
        return review_bytes("sidecar", content)
    if not isinstance(fields, dict):
        return review({"sidecar": json.dumps(fields, ensure_ascii=False)})
    found: list[Suspect] = []
    for name, value in fields.items():
        if value in (None, "", [], {}):
            continue
        if SIDECAR.get(name):
            found.append(Suspect(f"sidecar {name}", SIDECAR[name]))
        else:
            texts = value if isinstance(value, list) else [value]
            held = " ; ".join(t for t in texts if isinstance(t, str))
            known = name if re.fullmatch(r"[A-Z][A-Za-z]{2,40}", name) else "field"
            found += [Suspect(f"sidecar {known}", kind) for kind in kinds(held)]
    return tuple(dict.fromkeys(found))


def told(suspects: Iterable[Suspect]) -> str:
    """Suspects in words: `descrip may hold a name, a date; sidecar PatientID may hold a number`."""
    by_field: dict[str, list[str]] = {}
    for suspect in suspects:
        by_field.setdefault(suspect.field, []).append(suspect.kind)
    return "; ".join(
        f"{field} may hold {', '.join(dict.fromkeys(found))}" for field, found in by_field.items()
    )


def masked(text: str, keep: Iterable[str] = ()) -> str:
    """The text with every suspect piece replaced by `[kind]`; pieces that lie inside one of `keep` stay."""
    kept = [word for word in keep if word]
    spans = [m.span() for word in kept for m in re.finditer(re.escape(word), text)]
    for kind, pattern in KINDS.items():
        text_before = text
        for match in reversed(list(pattern.finditer(text_before))):
            if not any(a <= match.start() and match.end() <= b for a, b in spans):
                text = f"{text[: match.start()]}[{kind}]{text[match.end() :]}"
        if text != text_before:
            spans = [m.span() for word in kept for m in re.finditer(re.escape(word), text)]
    return text


def naming(ids: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some ids as a word of its own, also beside the `_` of a file name; nothing where there are none."""
    words = "|".join(re.escape(one) for one in sorted(ids, key=lambda one: (-len(one), one)))
    return re.compile(rf"(?<![^\W_])(?:{words or '(?!)'})(?![^\W_])")


# ---- identifiers ----------------------------------------------------------------------------------------------------


def keyed(salt: bytes, *parts: str) -> str:
    """A name of 16 hex digits that only who has the salt can tie to the parts: HMAC-SHA256 (RFC 2104), cut short."""
    return hmac.new(salt, "\0".join(parts).encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[
        :16
    ]
