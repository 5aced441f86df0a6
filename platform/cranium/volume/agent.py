"""Whether a DICOM series was taken with contrast agent: by its attributes, its words, and its study's history."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from cranium.volume.headers import Header

State = Literal["yes", "no", "conflict", "silent"]

_AGENT = r"(i ?v ?)?(contrast|gad|gd|con|km|inj|enhance|c\b)"
BOTH = re.compile(
    r"\bw(ith)? ?[/&+]? ?(and )?(w ?/ ?o\b|wo\b|without\b)|(w ?/ ?o\b|\bwo\b|without) ?(&|and|/) ?w(ith)?\b|\bc\?"
)
PRE = re.compile(
    rf"\bpre( ?{_AGENT}|\b)(?! ?(op|surg|rt|treat))|(\bw ?/ ?o|\bwo|\bwithout|\bsans|\bno|\bnon) ?{_AGENT}|"
    r"\bw ?/ ?o\b|\bwo\b|\bwithout\b|\bunenhanced\b|\bnativ|(?<= )-c\b|pre ?contrast"
)
POST = re.compile(
    rf"\bpost( ?{_AGENT}|\b)(?! ?(op|surg|fossa|rt|treat))|\bgad(o|av|\b|\d)|\bgd(\b|\d|dtpa)|\+ ?c\b|\bc ?\+|"
    r"\bt1(ce?|gd|gad)\b|\bce\b|\bcontrast\b|\benhanced\b|\bkm\b|\b(multihance|magnevist|dotarem|prohance|omniscan)\b|"
    r"\binj(ected|ection)?\b|post ?contrast"
)
PERFUSION = re.compile(r"\bperf|\bdsc\b|\bdce\b|\bpwi\b")
LABELLING = re.compile(r"\b[pc]{0,2}asl\b")  # perfusion without agent
NONE = re.compile(
    r"(no|none|n|n/?a|nil|0|false|no contrast|without.*|w/?o.*|unenhanced|non.*|-+)?", re.IGNORECASE
)


def words(header: Header) -> str:
    """The series' own name in lower case, one blank between words; the protocol's name where it has none."""
    text = (header.description or header.protocol).lower()
    text = re.sub(r"\bt1-c(?![a-z])", "t1 c?", text)  # a hyphen or a minus?
    text = re.sub(r"\bc-(?![a-z0-9])", " -c", text)
    text = re.sub(r"(?<! )-", " ", re.sub(r"[_,;:.()\[\]\\^=]+", " ", text))
    return re.sub(r"\s+", " ", text).strip()


def named(match: re.Match[str]) -> str:
    """Words of our own patterns only: no pattern swallows the rest of a word that an operator wrote."""
    return f"named `{match[0].strip()}`"


def agent(header: Header) -> tuple[State, str]:
    """What a series itself says of contrast agent, and the signs of it."""
    yes, no = _attributes(header)
    name = words(header)
    if match := BOTH.search(name):
        return "conflict", f"{named(match)}, which says both"
    if match := PRE.search(name):
        no.append(named(match))
    if match := POST.search(PRE.sub(" ", name)):
        yes.append(named(match))
    told = ", ".join(yes + no)
    if yes and no:
        return "conflict", f"contradictory signs of contrast agent: {told}"
    return ("yes" if yes else "no" if no else "silent"), told


def in_study_before(header: Header, study: Sequence[Header]) -> str:
    """Why a series that says nothing may have agent all the same, by the rest of its study; "" where it cannot."""
    others = [other for other in study if other.uid != header.uid]
    signed = [other for other in others if agent(other)[0] in ("yes", "conflict") or _perfusion(other)]
    if any(not _before(header, other) for other in signed):
        return "an earlier series of its study has contrast agent"
    if not signed and _ordered(header):
        return "its study was ordered with contrast agent"
    return ""


def _attributes(header: Header) -> tuple[list[str], list[str]]:
    if header.agent_given in ("YES", "NO"):
        sign = [f"ContrastBolusAgentAdministered is {header.agent_given}"]
        return (sign, []) if header.agent_given == "YES" else ([], sign)
    if _injected_later(header):
        return [], ["the injection started after the acquisition"]
    if (header.agent and not NONE.fullmatch(header.agent)) or (header.agent_volume or 0) > 0:
        return ["ContrastBolusAgent or its volume is filled in"], []
    return ([], ["ContrastBolusAgent says none"]) if header.agent else ([], [])


def _injected_later(header: Header) -> bool:
    start, taken = header.agent_start[:6], header.when[8:14]
    return bool(re.fullmatch(r"\d{6}", start) and re.fullmatch(r"\d{6}", taken) and start > taken)


def _perfusion(header: Header) -> bool:
    name = words(header)
    return bool(PERFUSION.search(name)) and not LABELLING.search(name)


def _ordered(header: Header) -> bool:
    """The study's own description speaks of agent ("w/wo contrast", "with gad")."""
    rest = PRE.sub(" ", header.study_description.lower().replace("_", " "))
    return bool(POST.search(rest) or re.search(r"\bw(ith)?\b", rest))


def _before(one: Header, other: Header) -> bool:
    """Whether `one` was certainly acquired before `other`: by time, or by series number where a time is missing."""
    if one.when and other.when and one.when != other.when:
        return one.when < other.when
    return 0 < one.number < other.number
