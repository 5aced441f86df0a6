"""What an ingest needs besides the scans is checked by hash before any scan is read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import phantoms
from cranium import demo_sources, provisions, store
from cranium.config import Machine, Preprocessing, UserError
from cranium.provisions import Provisions


def test_nothing_is_needed_by_default(tmp_path: Path, machine: Machine) -> None:
    assert provisions.provide(Preprocessing(), ("supplied",), machine, tmp_path / "in") == Provisions()
    assert not (tmp_path / "in").exists()
    assert list(provisions.ways(Provisions(("supplied", "otsu")))) == ["supplied", "otsu"]
    assert provisions.template(Provisions()) is None


def test_a_template_comes_under_its_hash(tmp_path: Path, machine: Machine) -> None:
    shape = (44, 52, 40)
    labels = phantoms.tissues(phantoms.Head(), shape, phantoms.affine())
    stripped = np.where(labels >= 2, phantoms.intensities(labels, "T1w", -1), 0)
    path = phantoms.write(tmp_path / "template.nii.gz", stripped, phantoms.affine())
    machine = machine.model_copy(update={"template": path})
    spec = Preprocessing(space="mni", template_sha256=store.sha256(path))
    found = provisions.provide(spec, spec.mask, machine, tmp_path / "in")
    assert found.template == tmp_path / "in" / path.name
    template = provisions.template(found)
    assert template is not None
    np.testing.assert_array_equal(template.brain, labels >= 2)
    with pytest.raises(UserError, match="template_sha256") as error:
        provisions.provide(
            Preprocessing(space="mni", template_sha256="0" * 64), ("supplied",), machine, tmp_path / "in"
        )
    assert error.value.code == "TEMPLATE"
    path.write_bytes(b"<html>")
    spec = Preprocessing(space="mni", template_sha256=store.sha256(path))
    with pytest.raises(
        UserError, match=r"template.nii.gz cannot be used \(NOT_NIFTI.*give a stripped"
    ) as error:
        provisions.provide(spec, spec.mask, machine, tmp_path / "again")
    assert error.value.code == "TEMPLATE" and not (tmp_path / "again").exists()


def test_weights_of_another_hash_are_refused_before_any_scan(tmp_path: Path, machine: Machine) -> None:
    """Row X10."""
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"weights")
    line = f"{sys.executable} {{input}} {{output}} {{weights}}"
    machine = machine.model_copy(update={"mask_command": line, "mask_weights": weights})
    spec = Preprocessing(mask=("supplied", "command"), mask_tool="synthstrip 1.4", mask_sha256="0" * 64)
    with pytest.raises(UserError, match="SHA-256") as error:
        provisions.provide(spec, spec.mask, machine, tmp_path / "in")
    assert error.value.code == "MASK_COMMAND"
    right = spec.model_copy(update={"mask_sha256": store.sha256(weights)})
    found = provisions.provide(right, right.mask, machine, tmp_path / "in")
    assert list(provisions.ways(found)) == ["supplied", "command"]
    with pytest.raises(UserError) as error:
        provisions.provide(
            spec, spec.mask, machine.model_copy(update={"mask_command": None}), tmp_path / "in"
        )
    assert error.value.code == "NO_COMMAND"


def test_networks_that_cannot_be_had_are_said(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_sources, "fetch", lambda members, cache: ({}, {"deepbet": "no network"}, 0))
    with pytest.raises(UserError, match="deepbet, which could not be had: no network") as error:
        provisions.provide(Preprocessing(mask=("deepbet",)), ("deepbet",), machine, tmp_path / "in")
    assert (error.value.code, error.value.exit_code) == ("FETCH", 1)


def test_only_the_ways_that_a_cohort_needs() -> None:
    chain = ("supplied", "deepbet", "otsu")

    def ways(stripped: bool, all_supplied: bool, of: tuple[str, ...] = chain) -> tuple[str, ...]:
        return provisions.mask_ways(of, stripped=stripped, all_supplied=all_supplied)

    assert ways(False, True) == ("supplied",)  # nothing is fetched, and a damaged mask is told
    assert ways(False, False) == chain
    assert ways(True, False) == ("supplied", "otsu")
    assert ways(True, False, ("deepbet",)) == ("deepbet",)  # asked for by name alone
    assert ways(False, True, ("otsu",)) == ("otsu",)
