"""The part of a report that compares initialisations on external cohorts, by the models of all folds and DeLong."""

from __future__ import annotations

from collections.abc import Sequence

from cranium import wording
from cranium.figures.page import Table
from cranium.tasks.comparison import Setting
from cranium.tasks.ensembles import Pair
from cranium.tasks.metrics import Undefined

READ = (
    "Every model of the folds and seeds scores everybody of an external cohort; their mean probability is one score a "
    "subject, so that a pair of initialisations is a pair of scores on one test set, which is what DeLong's test is "
    "of. The AUROC of such an ensemble is mostly above the mean of its models. The test holds the models fixed; Holm "
    "adjusts it over the pairs of a cohort."
)
COLUMNS = ("difference", "AUROC of a", "AUROC of b", "a minus b", "95 % interval", "DeLong, p", "p, Holm")


def tables(pairs: Sequence[Pair], settings: Sequence[Setting]) -> tuple[Table, ...]:
    """A table for each setting and external cohort."""
    found = []
    for setting in settings:
        ours = [pair for pair in pairs if pair.setting == setting]
        for test in dict.fromkeys(pair.test for pair in ours):
            rows = tuple(_row(pair) for pair in ours if pair.test == test)
            found.append(Table(COLUMNS, rows, f"Ensembles on {test}: {wording.setting(setting, settings)}"))
    return tuple(found)


def _row(pair: Pair) -> tuple[object, ...]:
    name, found = f"{pair.a} minus {pair.b}", pair.found
    if isinstance(found, Undefined):
        return name, None, None, None, "", found.reason, ""
    interval = f"{found.low:+.2f} to {found.high:+.2f}".replace(" ", wording.NO_BREAK)
    p_values = wording.p_value(found.p), wording.p_value(pair.holm)
    return name, found.auroc_a, found.auroc_b, found.difference, interval, *p_values
