"""Nothing that identifies a person leaves: the linter, the salted names, the private folder. Row I25 of the matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import phantoms
from cranium import cohort, identity, naming, patterns
from cranium.config import UserError
from cranium.volume import nifti, privacy
from cranium.volume.quality import Rejected

# ---- the linter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("DOE^JANE", "name"),
        ("Van der Doe^Jane^^Dr", "name"),
        ("PatientName: Jane Doe", "name"),
        ("operator=jd", "name"),
        ("Dr. Smith", "name"),
        ("1950-12-31", "date"),
        ("19501231", "date"),
        ("acquired 31.12.1950", "date"),
        ("12/31/1950", "date"),
        ("31-Dec-1950", "date"),
        ("December 31, 1950", "date"),
        ("20061115110302", "date"),
        ("DOB 2/3/50", "date"),
        ("MRN:12AB", "number"),
        ("id 7654321", "number"),
        ("123-45-6789", "number"),
        ("jane.doe@clinic.example", "e-mail"),
        ("call +49 89 123456-78", "telephone"),
        ("(617) 555-0123", "telephone"),
        ("InstitutionName=Charite", "institution"),
        ("Mass General Hospital", "institution"),
    ],
)
def test_what_is_suspect(text: str, kind: str) -> None:
    assert kind in privacy.kinds(text)
    covered = privacy.masked(f"sub-001/{text}.nii.gz", keep=("001",))
    assert f"[{kind}]" in covered and covered.startswith("sub-001/") and not privacy.kinds(covered)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "FSL5.0",
        "spm - 3D normalized",
        "TE=2.9;Time=120345.670;phase=1",
        "FreeSurfer Nov 20 2008",
        "MNI152 2009a, 1x1x1 mm",
        "2.3.14",
        "Philips Achieva 3.0T, MPRAGE",
        "sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129_T1w.nii.gz",
        "BraTS20_Training_001/BraTS20_Training_001_flair.nii",
        "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1c.nii.gz",
        "sub-ADNI002S0413/ses-M006/anat/sub-ADNI002S0413_ses-M006_T1w.nii.gz",
    ],
)
def test_what_is_not(text: str) -> None:
    assert privacy.kinds(text) == ()
    assert privacy.masked(text) in (text, "FreeSurfer [date]")


def test_sidecars() -> None:
    fields = {
        "PatientName": "x",
        "PatientBirthDate": "",
        "InstitutionName": "y",
        "EchoTime": 0.003,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "SeriesDescription": "MPRAGE of 1950-12-31",
        "Jane Doe 1950-12-31": "jane@doe.example",
        "Manufacturer": "Siemens",
    }
    found = privacy.review_sidecar(json.dumps(fields).encode())
    assert [(s.field, s.kind) for s in found] == [
        ("sidecar PatientName", "name"),
        ("sidecar InstitutionName", "institution"),
        ("sidecar SeriesDescription", "date"),
        ("sidecar field", "e-mail"),  # its name is somebody's own, so it is not told
    ]
    assert privacy.review_sidecar(b'{"PatientName": "DOE^JANE", trunc')[0].kind == "name"
    assert privacy.review_sidecar(b"[1, 2]") == ()


def planted(path: Path) -> Path:
    """A scan with a name in `descrip`, a date in `aux_file`, a number in an extension, an e-mail in its sidecar."""
    image = nib.Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.diag([2, 2, 2, 1]))
    image.set_qform(image.affine, 1)
    image.header["descrip"], image.header["aux_file"] = b"DOE^JANE", b"19501231"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"MRN 7654321"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.to_bytes())
    path.with_suffix(".json").write_text('{"Comment": "jane.doe@clinic.example"}')
    return path


def test_a_scan_is_used_and_its_words_are_not(tmp_path: Path) -> None:  # I25
    volume = nifti.read(planted(tmp_path / "a.nii"))
    (note,) = volume.notes
    assert note.code == "PHI_SUSPECT"
    for said in (
        "descrip may hold a name",
        "aux_file may hold date",
        "extension may hold",
        "sidecar Comment",
    ):
        assert said.replace("a name", "name") in note.reason
    assert not [w for w in ("DOE", "JANE", "1950", "7654321", "jane", "clinic") if w in repr(volume.notes)]
    with pytest.raises(Rejected) as error:
        nifti.read(tmp_path / "a.nii", phi="reject")
    assert error.value.code == "PHI_SUSPECT" and "is used" not in error.value.reason
    assert nifti.read(tmp_path / "a.nii", phi="ignore").notes == ()


def test_words_in_a_name_alone(tmp_path: Path) -> None:  # I25
    path = planted(tmp_path / "x.nii").rename(tmp_path / "DOE^JANE_1950-12-31.nii")
    (tmp_path / "x.json").unlink()
    (note,) = nifti.read(path).notes
    assert "file name may hold name, date" in note.reason and "JANE" not in note.reason
    clean = phantoms.write(
        tmp_path / "sub-01_T1w.nii.gz", np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4)
    )
    assert nifti.read(clean).notes == ()


# ---- ids (I22) -----------------------------------------------------------------------------------------------------


NAMES = st.text(
    st.characters(codec="utf-8") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF), max_size=40
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(NAMES, st.text(max_size=40))
def test_tidy_ids_are_visible_and_stay_apart(one: str, other: str) -> None:  # with bytes that are no UTF-8
    tidy = patterns.tidy(one)
    assert tidy.isprintable() and tidy == tidy.strip() and not {"/", "\\", "\n", "\t"} & set(tidy)
    if all(not 0xD800 <= ord(c) < 0xE000 for c in one):
        assert unquote(tidy) == normalize("NFC", one)
        assert (tidy == patterns.tidy(other)) == (normalize("NFC", one) == normalize("NFC", other))


# ---- the private folder (as row X9) ---------------------------------------------------------------------------------


@pytest.fixture
def no_umask() -> Any:
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_salt_is_the_owners_alone(tmp_path: Path, no_umask: None) -> None:
    salt = identity.salt(tmp_path)
    identity.remember_forgotten(tmp_path, "0" * 16)
    folder = tmp_path / "private"
    assert len(salt) == 32 and identity.salt(tmp_path) == salt
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == {
        "salt": 0o600,
        "forgotten.json": 0o600,
    }


def test_a_private_folder_that_is_not_private_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o755)
    (tmp_path / "private").chmod(0o755)
    with pytest.raises(UserError, match="chmod 700"):
        identity.salt(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (other / "private").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="yours alone"):
        identity.salt(other)
    third = tmp_path / "third"
    identity.salt(third)
    (third / "private" / "salt").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged"):
        identity.salt(third)


DRAW = """
import sys
from pathlib import Path
from cranium import cohort, identity, patterns
sys.stdin.read()
print(identity.salt(Path(sys.argv[1])).hex())
"""


def test_one_salt_for_all_who_ask_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", DRAW, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        for _ in range(3)
    ]
    for process in asking:
        assert process.stdin
        process.stdin.close()  # go
    told = {process.stdout.read() for process in asking if process.stdout}
    assert [process.wait() for process in asking] == [0] * 3
    assert len(told) == 1
    assert sorted(p.name for p in (tmp_path / "private").iterdir()) == ["salt"]


def test_keys_need_the_salt() -> None:
    a, b = (naming.subject_key(bytes([k]) * 32, "adni", "002_S_0413") for k in (1, 2))
    assert a != b and len(a) == 16 and int(a, 16) >= 0
    assert a != naming.subject_key(b"\1" * 32, "adni", "002_S_041") and a != naming.subject_key(
        b"\1" * 32, "adn", "i002_S_0413"
    )


def test_people_in_two_collections_are_named_alike_under_keys(tmp_path: Path) -> None:
    """Keys stand on both sides of an id mapping, and are those that the other collection's shards will hold."""
    scan = cohort.Scan("T1w", "A1/t1.nii", None)
    table = cohort.CohortTable(
        tmp_path,
        cohort.Layout(files={"T1w": "{subject}/t1.nii"}, unverified=True),
        tuple(cohort.Session(s, "", {"T1w": scan}, {}) for s in ("A1", "A2")),
        (),
        (("A1/t1.nii", 1),),
        (),
        (),
        {"other": {"A1": ("B7",), "A2": ("B8", "B9")}},
    )
    plain, _ = naming.admit(table, "mine", False, tmp_path / "store", "x")
    assert plain.overlap_ids == table.overlap_ids
    keyed, _ = naming.admit(table, "mine", True, tmp_path / "store", "x")
    secret = identity.salt(tmp_path / "store")
    key = {s: naming.subject_key(secret, "mine", s) for s in ("A1", "A2")}
    assert keyed.overlap_ids == {
        "other": {
            key["A1"]: (naming.subject_key(secret, "other", "B7"),),
            key["A2"]: tuple(naming.subject_key(secret, "other", s) for s in ("B8", "B9")),
        }
    }
