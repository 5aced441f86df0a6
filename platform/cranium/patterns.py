"""Path patterns with named fields, `sub-{subject}[/ses-{session}]/...`, and what they find."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cranium.config import UserError

_TOKEN = re.compile(r"\{(\w+)\}|\[([^\[\]]*)\]|([^{}\[\]]+)")


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
            return re.escape(text)
        if field in seen:
            return f"(?P={field})"
        seen.add(field)
        return f"(?P<{field}>[^/]+?)"

    parts = []
    for token in _tokens(pattern):
        if token[2] is None:
            parts.append(literal_or_field(token))
            continue
        inner = list(_tokens(token[2]))
        known = [t[1] for t in inner if t[1] in seen]
        body = "".join(literal_or_field(t) for t in inner)
        parts.append(f"(?({known[0]}){body}|)" if known else f"(?:{body})?")
    if "subject" not in seen:
        raise UserError("PATTERN", f"`{pattern}` has no {{subject}} field")
    return re.compile("".join(parts))


def render(pattern: str, fields: Mapping[str, str]) -> str | None:
    """The path a pattern gives for these fields; optional parts only where their fields are; None if one is lacking."""
    parts: list[str] = []
    for token in _tokens(pattern):
        field, optional, text = token.groups()
        if optional is not None:
            parts.append(render(optional, fields) or "")
        elif field is not None:
            if field not in fields:
                return None
            parts.append(fields[field])
        else:
            parts.append(text)
    return "".join(parts)


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
