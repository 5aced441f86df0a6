"""Path patterns with named fields, `sub-{subject}[/ses-{session}]/...`, and what they find.

A field is `{name}`, or `{name:kind}` to hold only a `label` (letters, digits and +, as in BIDS entities), a `number` or
a `date` (YYYY-MM-DD).
`[...]` may be missing; `**/` stands for any folders, or none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cranium.config import UserError

_TOKEN = re.compile(r"\{(\w+(?::\w+)?)\}|\[([^\[\]]*)\]|([^{}\[\]]+)")
_KINDS = {"": "[^/]+?", "label": "[0-9A-Za-z+]+", "number": "[0-9]+", "date": "[0-9]{4}-[0-9]{2}-[0-9]{2}"}


@dataclass(frozen=True)
class Match:
    """A file (or, of DICOM, the folder or list of one series) that claims to be a contrast of a session.

    Of several claims of one contrast the least `order` comes first: (pattern, run number, run, path).
    """

    order: tuple[int, tuple[int, str], str]
    fields: Mapping[str, str]  # subject, and session, run, ... where the path tells them
    path: str  # relative to the raw folder


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`sub-{subject}[/ses-{session}]/...` as a regular expression for a whole relative path.

    A field that returns must return with the same value; an optional part whose fields were seen before is there
    exactly when they are. Raises `UserError` for unbalanced brackets or a pattern without `{subject}`.
    """
    seen: set[str] = set()

    def literal_or_field(token: re.Match[str]) -> str:
        field, _, text = token.groups()
        if field is None:
            return r"(?:[^/]+/)*".join(map(re.escape, text.split("**/")))
        name, _, kind = field.partition(":")
        if name in seen:
            return f"(?P={name})"
        if kind not in _KINDS:
            raise UserError("PATTERN", f"`{pattern}`: a field is of kind label, number or date, not {kind}")
        seen.add(name)
        return f"(?P<{name}>{_KINDS[kind]})"

    parts = []
    for token in _tokens(pattern):
        if token[2] is None:
            parts.append(literal_or_field(token))
            continue
        inner = list(_tokens(token[2]))
        known = [name for t in inner if t[1] and (name := t[1].partition(":")[0]) in seen]
        body = "".join(literal_or_field(t) for t in inner)
        parts.append(f"(?({known[0]}){body}|)" if known else f"(?:{body})?")
    if "subject" not in seen:
        raise UserError("PATTERN", f"`{pattern}` has no {{subject}} field")
    return re.compile("".join(parts))


def matching(pattern: str, files: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The paths that fit a pattern whole, with the fields that they give (tidy, see `tidy`)."""
    expression = compile_pattern(pattern)
    for path in files:
        if match := expression.fullmatch(path):
            told = {k: v for k, v in match.groupdict().items() if v is not None}
            yield path, {k: tidy(v) for k, v in told.items()}


def tidy(identifier: str, encoded: str = "%/\\") -> str:
    """An id as it is kept: composed (NFC), and whatever does not print as itself percent-encoded, as are `encoded`.

    So an id is one line of visible text in every table and log, two spellings of one id are one, and two different ids
    stay different: apart from composition nothing is lost (`urllib.parse.unquote` gives it back). Plain spaces inside
    stay; control and format characters (newline, tab, marks of direction), other spaces, and bytes of a file name that
    are no UTF-8 are encoded.
    """
    text = unicodedata.normalize("NFC", identifier)
    last = len(text) - 1
    return "".join(
        _encoded(c)
        if c in encoded or (unicodedata.category(c)[0] in "CZ" and (c != " " or i in (0, last)))
        else c
        for i, c in enumerate(text)
    )


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def belongs(found: Mapping[str, str], to: Mapping[str, str], pattern: str) -> int:
    """How well a file whose path gave the fields `found` fits a scan with the fields `to`; 0 if it is another scan's.

    A mask without a run may belong to every run of its session, but one of another subject, session or run to none.
    """
    if any(to.get(name) != value for name, value in found.items()):
        return 0
    if "{session" in pattern and ("session" in to) != ("session" in found):
        return 0
    return 1 + len(found)


def _tokens(pattern: str) -> Iterator[re.Match[str]]:
    end = 0
    for token in _TOKEN.finditer(pattern):
        if token.start() != end:
            break
        end = token.end()
        yield token
    if end != len(pattern):
        rest = pattern[end:]
        raise UserError("PATTERN", f"`{pattern}` cannot be read at `{rest}`; use {{field}} and [optional]")
