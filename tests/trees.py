"""Phantom trees of the collections, written from what public sources show of them, never from the cards.

Each writer makes one tree below a folder (its raw folder) with literal names as its source gives them, oddities
included, and tells what a scan must find there. Volumes are tiny heads of `phantoms`; tables hold invented people.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl

import dicoms
import phantoms

SHAPE, SPACING = (12, 14, 10), (16.0, 16.0, 16.0)
GLIOMA = ("T1w", "T1ce", "T2w", "FLAIR")


@dataclass(frozen=True)
class Found:
    """One session as it must be found: its contrasts, the classes of its labels, its label map, some of its values."""

    contrasts: Sequence[str]
    labels: Mapping[str, str | None] = field(default_factory=dict)
    segmentation: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)  # contrast -> the path that is taken of several


@dataclass(frozen=True)
class Expected:
    """What a scan of a tree must give: `card` by name, the layout's name, sessions by (subject, session), notes."""

    card: str
    sessions: Mapping[tuple[str, str], Found]
    layout: str | None = None
    notes: tuple[
        str, ...
    ] = ()  # how they begin, in any order, but for the counts of the published collection
    shared: Mapping[str, Mapping[str, Sequence[str]]] = field(
        default_factory=dict
    )  # people in other collections
    counts: int = 0  # how many notes compare counts
    unused: int = 0  # NIfTI files that are none of the cohort's scans
    refused: tuple[tuple[str, str], ...] = ()  # code and last part of the path of what is used for nothing


def scan(path: Path, contrast: str, seed: int = 0) -> None:
    """A tiny head in one contrast, with a lesion where a label map has one."""
    grid = phantoms.affine(SPACING, SHAPE)
    labels = phantoms.tissues(phantoms.head(seed, "lesion"), SHAPE, grid)
    phantoms.write(path, phantoms.intensities(labels, contrast, seed), grid)


def label_map(path: Path, values: Sequence[int], seed: int = 0) -> None:
    """The lesion of the same head, its voxels given the values in turn."""
    grid = phantoms.affine(SPACING, SHAPE)
    lesion = phantoms.tissues(phantoms.head(seed, "lesion"), SHAPE, grid) == 5
    data = np.zeros(SHAPE, np.uint8)
    data[lesion] = np.resize(np.asarray(values, np.uint8), int(lesion.sum()))
    phantoms.write(path, data, grid)


def table(path: Path, text: str, bom: bool = False) -> None:
    """A table as its archive writes it: with a byte order mark, or with Windows line ends, as some do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))


def workbook(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    book.save(path)


def other(root: Path, *paths: str) -> None:
    """Files that are none of the cohort's scans."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"{}")


def _columns(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated rows with all of `names`, empty where a row has none."""
    lines: list[str] = []
    csv.writer(_Lines(lines), lineterminator="\n").writerows(
        [names, *([row.get(name, "") for name in names] for row in rows)]
    )
    return "".join(lines)


class _Lines:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def write(self, text: str) -> None:
        self.lines.append(text)


# ---- OASIS-3: README of NrgXnat/oasis-scripts, docs/Converters/OASIS3TOBIDS.md of Clinica ---------------------------

D1 = (
    "OASISID", "OASIS_session_label", "days_to_visit", "age at visit", "NORMCOG", "DEMENTED", "IMPNOMCI",
    "MCIAMEM", "MCIAPLUS", "MCINON1", "MCINON2", "PROBAD", "alzdis", "alzdisif",
)  # fmt: skip


def _oasis_tables(root: Path) -> None:
    files = root / "OASIS3_data_files/scans"
    demographics = "OASISID,Subject_accession,AgeatEntry,GENDER,EDUC\r\nOAS30001,CENTRAL_1,65.149,2,12\r\nOAS30002,CENTRAL_2,67.25,1,18\r\n"
    table(files / "demo-demographics/resources/csv/files/OASIS3_demographics.csv", demographics)
    visits = [
        {"OASISID": "OAS30001", "days_to_visit": "0000", "NORMCOG": 1, "DEMENTED": 0},
        {"OASISID": "OAS30001", "days_to_visit": "0339", "NORMCOG": 0, "DEMENTED": 0, "MCIAMEM": 1},
        {
            "OASISID": "OAS30001",
            "days_to_visit": "0722",
            "NORMCOG": 0,
            "DEMENTED": 1,
            "alzdis": 1,
            "alzdisif": 1,
        },
        {"OASISID": "OAS30002", "days_to_visit": "0000", "NORMCOG": 1, "DEMENTED": 0},
    ]
    place = "UDSd1-Form_D1__Clinician_Diagnosis___Cognitive_Status_and_Dementia/resources/csv/files"
    table(files / place / "OASIS3_UDSd1_diagnoses.csv", _columns(D1, visits))


def _oasis_sessions(t1w: str) -> dict[tuple[str, str], Found]:
    return {
        ("OAS30001", "d0129"): Found(
            ("FLAIR", "T1w", "T2w"),
            {"diagnosis": "CN"},
            values={"age": 65.5, "sex": "F"},
            repeats={"T1w": t1w},
        ),
        ("OAS30001", "d0757"): Found(("T2w",), {"diagnosis": "AD"}, values={"age": 67.22}),
        ("OAS30002", "d0653"): Found(("T1w",), {"diagnosis": None}, values={"age": 69.04, "sex": "M"}),
    }


OASIS_NOTE = "1 sessions have no visit within 180 days in OASIS3_UDSd1_diagnoses.csv: <OAS30002 d0653>"


def oasis3(root: Path) -> Expected:
    scan(root / "OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz", "T1w")
    scan(root / "OAS30001_MR_d0129/anat3/sub-OAS30001_ses-d0129_run-02_T1w.nii.gz", "T1w")
    scan(root / "OAS30001_MR_d0129/anat4/sub-OAS30001_ses-d0129_acq-TSE_T2w.nii.gz", "T2w")
    scan(root / "OAS30001_MR_d0129/anat5/sub-OAS30001_ses-d0129_FLAIR.nii.gz", "FLAIR")
    scan(root / "OAS30001_MR_d0757/anat1/sub-OAS30001_ses-d0757_acq-TSE_T2w.nii.gz", "T2w")
    scan(root / "OAS30002_MR_d0653/anat1/NIFTI/sub-OAS30002_ses-d0653_T1w.nii.gz", "T1w", 1)
    other(
        root,
        "OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.json",
        "OAS30001_MR_d0757/func1/sub-OAS30001_ses-d0757_task-rest_run-01_bold.nii.gz",
        "OAS30001_MR_d0757/swi1/sub-OAS30001_ses-d0757_minIP.nii.gz",
        "OAS30001_MR_d0757/dwi1/sub-OAS30001_ses-d0757_dwi.nii.gz",
        "OAS30002_AV45_d2340/pet1/NIFTI/sub-OAS30002_ses-d2340_acq-AV45_pet.nii.gz",
    )
    _oasis_tables(root)
    first = "OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz"
    return Expected("oasis3", _oasis_sessions(first), "sessions", (OASIS_NOTE,), counts=1, unused=4)


def oasis3_bids(root: Path) -> Expected:
    anat = "sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129"
    scan(root / f"{anat}_run-01_T1w.nii.gz", "T1w")
    scan(root / f"{anat}_run-02_T1w.nii.gz", "T1w")
    scan(root / f"{anat}_acq-TSE_T2w.nii.gz", "T2w")
    scan(root / f"{anat}_FLAIR.nii.gz", "FLAIR")
    scan(root / "sub-OAS30001/ses-d0757/anat/sub-OAS30001_ses-d0757_acq-TSE_T2w.nii.gz", "T2w")
    scan(root / "sub-OAS30002/ses-d0653/anat/sub-OAS30002_ses-d0653_T1w.nii.gz", "T1w", 1)
    other(root, "sub-OAS30001/ses-d0129/func/sub-OAS30001_ses-d0129_task-rest_run-01_bold.nii.gz")
    _oasis_tables(root)
    return Expected(
        "oasis3", _oasis_sessions(f"{anat}_run-01_T1w.nii.gz"), "bids", (OASIS_NOTE,), counts=1, unused=1
    )


# ---- NACC: JinqianPan/NACC_image (a session is NACCMNUM), atri-biostats/NACCADRC (columns) --------------------------


def nacc(root: Path) -> Expected:
    scan(root / "sub-NACC000034/ses-01/anat/sub-NACC000034_ses-01_T1w.nii.gz", "T1w")
    scan(root / "sub-NACC000034/ses-01/anat/sub-NACC000034_ses-01_FLAIR.nii.gz", "FLAIR")
    scan(root / "sub-NACC000034/ses-02/anat/sub-NACC000034_ses-02_T1w.nii.gz", "T1w")
    scan(root / "sub-NACC999999/ses-01/anat/sub-NACC999999_ses-01_run-2_T2w.nii.gz", "T2w", 1)
    names = (
        "NACCADC",
        "NACCID",
        "MRIMO",
        "MRIDY",
        "MRIYR",
        "NACCMRIA",
        "NACCMRFI",
        "NACCMNUM",
        "NACCMRDY",
        "MRIT1",
    )
    scans = [
        {
            "NACCID": "NACC000034",
            "MRIMO": 5,
            "MRIDY": 3,
            "MRIYR": 2010,
            "NACCMRIA": 71,
            "NACCMNUM": 1,
            "NACCMRFI": "mri1.zip",
        },
        {"NACCID": "NACC000034", "MRIMO": 11, "MRIDY": 30, "MRIYR": 2012, "NACCMRIA": 888, "NACCMNUM": 2},
    ]
    table(root / "investigator_mri_nacc72.csv", _columns(names, scans))
    visits = [
        {"NACCID": "NACC000034", "VISITMO": 4, "VISITDAY": 9, "VISITYR": 2010, "SEX": 2, "NACCUDSD": 1},
        {"NACCID": "NACC000034", "VISITMO": 12, "VISITDAY": 1, "VISITYR": 2012, "SEX": 2, "NACCUDSD": 4},
    ]
    uds = ("NACCID", "NACCADC", "VISITMO", "VISITDAY", "VISITYR", "NACCVNUM", "SEX", "NACCUDSD", "NACCALZD")
    table(root / "investigator_ftldlbd_nacc72.csv", _columns(uds, visits))
    return Expected(
        "nacc",
        {
            ("NACC000034", "01"): Found(
                ("FLAIR", "T1w"), {"diagnosis": "CN"}, values={"age": 71.0, "sex": "F"}
            ),
            ("NACC000034", "02"): Found(
                ("T1w",), {"diagnosis": "dementia"}, values={"age": None, "sex": "F"}
            ),
            ("NACC999999", "01"): Found(("T2w",), {"diagnosis": None}),
        },
        notes=(
            "1 subjects have no row in investigator_mri_nacc72.csv: <NACC999999>",
            "1 subjects have no row in investigator_ftldlbd_nacc72.csv: <NACC999999>",
        ),
    )


# ---- LONI as NIfTI, and the trees that Clinica makes of LONI's DICOM ------------------------------------------------


def adni_nifti(root: Path) -> Expected:
    """A collection downloaded as NIfTI: one file below subject/description/date/series."""
    at = "ADNI/002_S_6864/Accelerated_Sagittal_MPRAGE/2020-03-11_08_50_25.0/S934629"
    scan(
        root
        / at
        / "ADNI_002_S_6864_MR_Accelerated_Sagittal_MPRAGE__br_raw_20200313151614103_26_S934629_I1303613.nii",
        "T1w",
    )
    at = "ADNI/002_S_6864/Sagittal_3D_FLAIR/2020-03-11_09_05_01.0/S934630"
    scan(
        root / at / "ADNI_002_S_6864_MR_Sagittal_3D_FLAIR__br_raw_20200313151614104_27_S934630_I1303614.nii",
        "FLAIR",
    )
    at = "ADNI/003_S_0908/MPRAGE/2006-10-20_13_22_01.0/S663469"
    scan(root / at / "ADNI_003_S_0908_MR_MPRAGE_br_raw_20180302130514878_150_S663469_I969412.nii", "T1w", 1)
    repeat = "ADNI/003_S_0908/MPRAGE_REPEAT/2006-10-20_13_40_01.0/S663470"
    scan(
        root / repeat / "ADNI_003_S_0908_MR_MPRAGE_REPEAT_br_raw_20180302130514879_151_S663470_I969413.nii",
        "T1w",
        1,
    )
    table(
        root / "my_collection_3_01_2024.csv",
        '"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date","Format","Downloaded"\n'
        '"I1303613","002_S_6864","MCI","F","73","sc","MRI","Accelerated Sagittal MPRAGE","Original","3/11/2020","NiFTI","3/01/2024"\n'
        '"I969412","003_S_0908","AD","M","62","bl","MRI","MPRAGE","Original","10/20/2006","NiFTI","3/01/2024"\n',
    )
    table(
        root / "DXSUM_16Nov2024.csv",
        "PHASE,PTID,RID,VISCODE,VISCODE2,EXAMDATE,DIAGNOSIS\n"
        "ADNI3,002_S_6864,6864,sc,sc,2020-02-01,2.0\nADNI3,002_S_6864,6864,y1,m12,2021-02-01,3.0\n"
        "ADNI1,003_S_0908,908,bl,bl,2005-01-01,3.0\n",
    )
    first = f"{at}/ADNI_003_S_0908_MR_MPRAGE_br_raw_20180302130514878_150_S663469_I969412.nii"
    return Expected(
        "adni",
        {
            ("002_S_6864", "2020-03-11"): Found(
                ("FLAIR", "T1w"), {"diagnosis": "MCI"}, values={"age": 73.0, "sex": "F"}
            ),
            ("003_S_0908", "2006-10-20"): Found(
                ("T1w",), {"diagnosis": None}, values={"age": 62.0, "sex": "M"}, repeats={"T1w": first}
            ),
        },
        "loni_nifti",
        ("1 sessions have no visit within 183 days in DXSUM_16Nov2024.csv: <003_S_0908 2006-10-20>",),
    )


def _clinica(
    root: Path, subject: str, sessions: Mapping[str, Sequence[str]], rows: str, seed: int = 0
) -> None:
    for session, contrasts in sessions.items():
        stem = f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}"
        for contrast in contrasts:
            scan(root / f"{stem}_{contrast}.nii.gz", contrast, seed)
            other(root, f"{stem}_{contrast}.json")
    table(root / f"sub-{subject}/sub-{subject}_sessions.tsv", rows)


def adni_clinica(root: Path) -> Expected:
    rows = "session_id\texamination_date\tage\tdiagnosis\nses-M000\t2005-10-01\t70.1\tMCI\nses-M012\tn/a\tn/a\tDementia\nses-M024\tn/a\tn/a\tn/a\n"
    _clinica(root, "ADNI002S0295", {"M000": ("T1w", "FLAIR"), "M012": ("T1w",), "M024": ("T1w",)}, rows)
    table(
        root / "participants.tsv",
        "participant_id\talternative_id_1\tsex\tage_bl\tsite\toriginal_study\tdiagnosis_sc\n"
        "sub-ADNI002S0295\t002_S_0295\tM\t70.1\t002\tADNI1\tLMCI\nsub-ADNI003S0001\t003_S_0001\tF\t80\t003\tADNI1\tCN\n",
    )
    other(root, "conversion_info/v0/t1_paths.tsv", "dataset_description.json")
    labels = {"screening": "MCI"}
    found = {
        "M000": Found(("FLAIR", "T1w"), {**labels, "diagnosis": "MCI"}, values={"age": 70.1, "site": "002"}),
        "M012": Found(("T1w",), {**labels, "diagnosis": "AD"}),
        "M024": Found(("T1w",), {**labels, "diagnosis": None}),
    }
    return Expected("adni", {("ADNI002S0295", name): one for name, one in found.items()}, "clinica")


def aibl_clinica(root: Path) -> Expected:
    _clinica(
        root,
        "AIBL5",
        {"M000": ("T1w",), "M018": ("T1w",)},
        "session_id\tage\tdiagnosis\nses-M000\t66\tCN\nses-M018\t68\tMCI\n",
    )
    table(root / "participants.tsv", "participant_id\tdate_of_birth\tsex\tsite\nsub-AIBL5\t1940\tF\t1\n")
    return Expected(
        "aibl",
        {
            ("AIBL5", "M000"): Found(("T1w",), {"diagnosis": "CN"}, values={"age": 66.0, "sex": "F"}),
            ("AIBL5", "M018"): Found(("T1w",), {"diagnosis": "MCI"}, values={"age": 68.0}),
        },
        "clinica",
    )


def nifd_clinica(root: Path) -> Expected:
    _clinica(
        root, "NIFD1S0001", {"M000": ("T1w", "FLAIR"), "M012": ("T1w", "T2w")}, "session_id\tdate\tage\n"
    )
    _clinica(root, "NIFD3S0023", {"M000": ("T1w",)}, "session_id\tdate\tage\n", 1)
    table(
        root / "participants.tsv",
        "participant_id\tgroup\tsex\tage\tdiagnosis\tsite\teducation\trace\n"
        "sub-NIFD1S0001\tPatient\tM\t61\tSV\tUCSF\t16\t1\nsub-NIFD3S0023\tControl\tF\t66\tCON\tMGH\t18\t1\n",
    )
    patient = {"diagnosis": "FTD", "variant": "semantic"}
    return Expected(
        "nifd",
        {
            ("NIFD1S0001", "M000"): Found(("FLAIR", "T1w"), patient, values={"age": 61.0, "site": "UCSF"}),
            ("NIFD1S0001", "M012"): Found(("T1w", "T2w"), patient),
            ("NIFD3S0023", "M000"): Found(("T1w",), {"diagnosis": "CN", "variant": "CN"}),
        },
        "clinica",
    )


# ---- DICOM of LONI: CoBrALab's ADNI page, Clinica's converters of ADNI, AIBL and NIFD -------------------------------


def dicom(
    folder: Path, sequence: str, subject: str, date: str, time: str, number: int, seed: int = 0, **more: Any
) -> None:
    """One series in a folder of its own; `date` as YYYY-MM-DD or MM-DD-YYYY."""
    parts = date.split("-")
    stamp = "".join(parts) if len(parts[0]) == 4 else parts[2] + parts[0] + parts[1]
    dicoms.series(
        folder,
        sequence,
        seed=seed,
        subject=subject,
        study=stamp,
        number=number,
        time=time,
        date=stamp,
        shape=SHAPE,
        spacing=SPACING,
        **more,
    )


def _loni(
    root: Path, project: str, subject: str, date: str, series: Sequence[tuple[str, str, str]], seed: int = 0
) -> None:
    """project/subject/description/date_time/image/*.dcm, as the archive packs a collection."""
    for number, (sequence, description, time) in enumerate(series, 1):
        clock = f"{time[:2]}_{time[2:4]}_{time[4:]}.0"
        image = f"I{100000 + 1000 * seed + number}"
        folder = root / project / subject / description / f"{date}_{clock}" / image
        name = f"{project}_{subject}_MR_{description}_br_raw_20180302130514878_{{}}_S{66000 + number}_{image}.dcm"
        text = description.replace("_", " ")
        dicom(folder, sequence, subject, date, time, number, seed, name=name, SeriesDescription=text)


COLLECTION = (
    "Image Data ID", "Subject", "Group", "Sex", "Age", "Visit", "Modality", "Description", "Type", "Acq Date", "Format",
    "Downloaded",
)  # fmt: skip


def adni(root: Path) -> Expected:
    """Two visits of one, a repeated MPRAGE, a localizer, and a diagnosis per visit; a list of the collection beside."""
    first = (
        ("localizer", "localizer", "120001"),
        ("mprage", "MPRAGE", "123152"),
        ("mprage", "MPRAGE_REPEAT", "124001"),
        ("flair", "Axial_T2-FLAIR", "130101"),
    )
    _loni(root, "ADNI", "002_S_0413", "2006-05-02", first)
    _loni(root, "ADNI", "002_S_0413", "2017-06-21", (("mprage", "Accelerated_Sagittal_MPRAGE", "132338"),), 1)
    _loni(root, "ADNI", "005_S_0221", "2006-01-10", (("mprage", "MPRAGE", "101112"),), 2)
    rows = [
        {
            "Image Data ID": "I100002",
            "Subject": "002_S_0413",
            "Sex": "F",
            "Age": 76,
            "Modality": "MRI",
            "Acq Date": "5/02/2006",
        },
        {
            "Image Data ID": "I100003",
            "Subject": "002_S_0413",
            "Sex": "F",
            "Age": 76,
            "Modality": "MRI",
            "Acq Date": "5/02/2006",
        },
        {
            "Image Data ID": "I101001",
            "Subject": "002_S_0413",
            "Sex": "F",
            "Age": 87,
            "Modality": "MRI",
            "Acq Date": "6/21/2017",
        },
        {
            "Image Data ID": "I102001",
            "Subject": "005_S_0221",
            "Sex": "M",
            "Age": 68,
            "Modality": "MRI",
            "Acq Date": "1/10/2006",
        },
    ]
    table(root / "everyone_3_01_2024.csv", _columns(COLLECTION, rows))
    table(
        root / "All_Subjects_DXSUM_26Sep2024.csv",
        "PHASE,PTID,RID,VISCODE,EXAMDATE,DIAGNOSIS\n"
        "ADNI1,002_S_0413,413,bl,2006-05-19,1\nADNI1,002_S_0413,413,m12,2007-06-01,1\nADNI3,002_S_0413,413,y1,2017-08-01,2\n"
        "ADNI1,005_S_0221,221,bl,2006-01-05,3\nADNI1,005_S_0221,221,m06,2006-01-15,2\n",
    )
    taken = "ADNI/002_S_0413/MPRAGE/2006-05-02_12_31_52.0/I100002"
    return Expected(
        "adni",
        {
            ("002_S_0413", "2006-05-02"): Found(
                ("FLAIR", "T1w"),
                {"diagnosis": "CN"},
                values={"age": 76.0, "sex": "F"},
                repeats={"T1w": taken},
            ),
            ("002_S_0413", "2017-06-21"): Found(("T1w",), {"diagnosis": "MCI"}, values={"age": 87.0}),
            ("005_S_0221", "2006-01-10"): Found(
                ("T1w",), {"diagnosis": None}, values={"age": 68.0, "sex": "M"}
            ),
        },
        "loni",
        (
            "1 sessions lie between two visits that differ in All_Subjects_DXSUM_26Sep2024.csv, none taken: "
            "<005_S_0221 2006-01-10>",
            "AGENT_SILENT, 4 DICOM series",
        ),
        refused=(("LOCALIZER", "I100001"),),
    )


def aibl(root: Path) -> Expected:
    """RIDs as folders; diagnoses of VISCODEs, which the two lists of scans date; -4 says nothing."""
    _loni(
        root,
        "AIBL",
        "5",
        "2007-11-02",
        (("mprage", "MPRAGE_ADNI_confirmed", "101500"), ("localizer", "localizer", "100000")),
    )
    _loni(root, "AIBL", "5", "2009-05-06", (("mprage", "MPRAGE_ADNI_confirmed_REPEAT", "111500"),), 1)
    _loni(root, "AIBL", "12", "2008-03-04", (("mprage", "MPRAGE", "121500"),), 2)
    scans = "RID,SITEID,VISCODE,EXAMDATE,MMSMPRAGE\n"
    table(
        root / "aibl_mri3meta_01-Jun-2018.csv",
        scans + "5,1,bl,11/02/2007,1\n5,1,m18,05/06/2009,1\n5,1,m36,-4,-4\n",
    )
    table(root / "aibl_mrimeta_01-Jun-2018.csv", scans + "12,2,bl,03/04/2008,1\n")
    table(
        root / "aibl_pdxconv_01-Jun-2018.csv",
        "RID,SITEID,VISCODE,DXNORM,DXMCI,DXAD,DXCURREN\n5,1,bl,1,-4,-4,1\n5,1,m18,-4,1,-4,2\n12,2,bl,-4,-4,-4,-4\n",
    )
    table(
        root / "aibl_ptdemog_01-Jun-2018.csv",
        "RID,SITEID,VISCODE,PTGENDER,PTDOB\n5,1,bl,2,/1940\n12,2,bl,1,/1935\n",
    )
    return Expected(
        "aibl",
        {
            ("12", "2008-03-04"): Found(("T1w",), {"diagnosis": None}, values={"sex": "M", "age": None}),
            ("5", "2007-11-02"): Found(("T1w",), {"diagnosis": "CN"}, values={"sex": "F"}),
            ("5", "2009-05-06"): Found(("T1w",), {"diagnosis": "MCI"}, values={"sex": "F"}),
        },
        "loni",
        (
            "1 subjects have no row in aibl_mri3meta_01-Jun-2018.csv: <12>",
            "1 subjects have no row in aibl_mrimeta_01-Jun-2018.csv: <5>",
            "*.csv is missing with columns Subject, Acq Date, Age, so age are absent",
            "AGENT_SILENT, 3 DICOM series",
        ),
        refused=(("LOCALIZER", "I100002"),),
    )


def nifd(root: Path) -> Expected:
    """As ADNI, with a workbook of clinical visits whose dates are cells of a date's type."""
    series = (("mprage", "t1_mprage", "101500"), ("flair", "t2_flair", "102500"), ("t2", "t2_tse", "103500"))
    _loni(root, "NIFD", "1_S_0001", "2010-09-08", series)
    _loni(root, "NIFD", "3_S_0023", "2012-02-03", (("mprage", "t1_mprage", "101500"),), 1)
    day = datetime.datetime
    rows = [
        (
            "LONI_ID",
            "SITE",
            "EDUCATION",
            "RACE",
            "VISIT_NUMBER",
            "CLINICAL_LINKDATE",
            "DX",
            "MMSE_TOT",
            "CDR_BOX_SCORE",
        ),
        ("1_S_0001", "UCSF", 16, 1, 1, day(2010, 9, 1), "BV", 25, 4.5),
        ("1_S_0001", "UCSF", 16, 1, 2, day(2011, 3, 20), "BV", -9, 6),
        ("3_S_0023", "MAYO", 18, 1, 1, day(2012, 1, 30), "CON", 30, 0),
    ]
    workbook(root / "clinical/NIFD_Clinical_Data_2017_final_updated.xlsx", rows)
    listed = [{"Subject": "1_S_0001", "Sex": "M", "Age": 61, "Acq Date": "9/08/2010"}]
    table(root / "nifd_9_01_2020.csv", _columns(COLLECTION, listed))
    return Expected(
        "nifd",
        {
            ("1_S_0001", "2010-09-08"): Found(
                ("FLAIR", "T1w", "T2w"),
                {"diagnosis": "FTD", "variant": "behavioural"},
                values={"age": 61.0, "sex": "M", "site": "UCSF"},
            ),
            ("3_S_0023", "2012-02-03"): Found(
                ("T1w",), {"diagnosis": "CN", "variant": "CN"}, values={"site": "MAYO"}
            ),
        },
        "loni",
        ("1 subjects have no row in nifd_9_01_2020.csv: <3_S_0023>", "AGENT_SILENT, 2 DICOM series"),
    )


# ---- HABS: clinica/converters/habs_to_bids/_converter.py, the archive's names as they are parsed there --------------


def habs(root: Path) -> Expected:
    scan(root / "T1_HABS_DataRelease_2.0/P_ABC123_2011-03-04_HAB_1.0_ADNI_1X-MPRAGE.nii.gz", "T1w")
    scan(root / "FLAIR/deeper/P_ABC123_2011-03-04_HAB_1.0_3DFLAIR.nii.gz", "FLAIR")
    scan(root / "T1_HABS_DataRelease_2.0/P_ABC123_2014-02-28_HAB_4.0_ADNI_2X-MPRAGE.nii.gz", "T1w")
    scan(root / "T1_HABS_DataRelease_2.0/P_DEF456_2011-05-06_HAB_1.0_ADNI_1X-MPRAGE.nii.gz", "T1w", 1)
    other(
        root, "PET/P_ABC123_2011-03-09_HAB_1.0_PIB_40-60.nii.gz", "PET/P_ABC123_2011-04-09_HAB_1.0_FDG.nii.gz"
    )
    table(
        root / "Demographics_HABS_DataRelease_2.0.csv",
        "SubjID,StudyArc,NP_SessionDate,NP_Age,BiologicalSex,YrsOfEd\n"
        "P_ABC123,HAB_1.0,2011-02-01,70.25,F,16\nP_ABC123,HAB_4.0,2014-02-01,73.25,F,16\nP_DEF456,HAB_1.0,2011-05-01,65,M,12\n",
        bom=True,
    )
    table(
        root / "ClinicalMeasures_HABS_DataRelease_2.0.csv",
        "SubjIDshort,StudyArc,NP_SessionDate,CDR_Global,HABS_DX\n"
        "P_ABC123,HAB_1.0,2011-02-01,0,CN\nP_ABC123,HAB_4.0,2014-02-01,0.5,MCI\nP_DEF456,HAB_1.0,2011-05-01,0,CN\n",
    )
    return Expected(
        "habs",
        {
            ("ABC123", "HAB_1.0"): Found(
                ("FLAIR", "T1w"), {"diagnosis": "CN"}, values={"age": 70.25, "sex": "F"}
            ),
            ("ABC123", "HAB_4.0"): Found(("T1w",), {"diagnosis": "MCI"}, values={"age": 73.25}),
            ("DEF456", "HAB_1.0"): Found(("T1w",), {"diagnosis": "CN"}, values={"sex": "M"}),
        },
        "release",
        counts=1,
        unused=2,
    )


# ---- glioma ---------------------------------------------------------------------------------------------------------


def brats2020(root: Path) -> Expected:
    """kancheng/fl-test-init, brats-2020-demo/input/README.md; the renamed label map of case 355 is well known."""
    names = {"T1w": "t1", "T1ce": "t1ce", "T2w": "t2", "FLAIR": "flair"}
    for number, ending in ((1, ".nii"), (355, ".nii"), (369, ".nii.gz")):
        case = f"BraTS20_Training_{number:03}"
        for contrast, name in names.items():
            scan(root / case / f"{case}_{name}{ending}", contrast, number)
        seg = "W39_1998.09.19_Segm.nii" if number == 355 else f"{case}_seg{ending}"
        label_map(root / case / seg, (1, 2, 4), number)
    other(root, ".DS_Store", "BraTS20_Training_001/._BraTS20_Training_001_t1.nii")
    table(
        root / "name_mapping.csv",
        "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
        "HGG,Brats17_CBICA_AAB_1,Brats18_CBICA_AAB_1,NA,BraTS19_CBICA_AAB_1,BraTS20_Training_001\n"
        "LGG,NA,NA,NA,NA,BraTS20_Training_355\nLGG,NA,NA,NA,NA,BraTS20_Training_369\n",
    )
    workbook(
        root / "BraTS2023_2017_GLI_Mapping.xlsx",
        [
            ("BraTS2023", "BraTS2021", "BraTS2020", "Cohort Name (if publicly available)"),
            ("BraTS-GLI-00097-000", "BraTS2021_00097", "BraTS20_Training_369", "Private Collection"),
            ("BraTS-GLI-00495-000", "BraTS2021_00495", "BraTS20_Training_001", "Private Collection"),
            ("BraTS-GLI-00500-000", "BraTS2021_00500", None, "Private Collection"),
        ],
    )
    workbook(
        root / "BraTS2021_MappingToTCIA.xlsx",
        [
            (
                "Data Collection (as on TCIA+additional)",
                "Site ID",
                "PatientID on TCIA Radiology Portal",
                "BraTS2021 ID",
            ),
            ("UPENN-GBM", 1, "UPENN-GBM-00011_11", "BraTS2021_00495"),
            ("UCSF-PDGM", 18, "4", "BraTS2021_00097"),
            ("UPENN-GBM_Additional", 1, "new-not-previously-in-TCIA", "BraTS2021_00500"),
        ],
    )
    table(
        root / "survival_info.csv",
        "Brats20ID,Age,Survival_days,Extent_of_Resection\nBraTS20_Training_001,60.463,289,GTR\n",
    )
    found = {
        "BraTS20_Training_001": ("HGG", "BraTS20_Training_001/BraTS20_Training_001_seg.nii", 60.463),
        "BraTS20_Training_355": ("LGG", "BraTS20_Training_355/W39_1998.09.19_Segm.nii", None),
        "BraTS20_Training_369": ("LGG", "BraTS20_Training_369/BraTS20_Training_369_seg.nii.gz", None),
    }
    sessions = {
        (case, ""): Found(sorted(GLIOMA), {"grade": grade}, seg, {"age": age})
        for case, (grade, seg, age) in found.items()
    }
    notes = (
        "2 subjects have no row in survival_info.csv: <BraTS20_Training_355>, <BraTS20_Training_369>",
        "who is also in ucsf_pdgm is not known without BraTS2023_2017_GLI_Mapping.xlsx and UCSF-PDGM-metadata_v5.csv",
    )
    shared = {"upenn_gbm": {"BraTS20_Training_001": ("00011",)}}
    return Expected("brats2020", sessions, notes=notes, counts=2, shared=shared)


def upenn_gbm(root: Path) -> Expected:
    """tiago-assis/TiagoThesisWork, README 1.2: the NIfTI package as downloaded."""
    names = {"T1w": "T1", "T1ce": "T1GD", "T2w": "T2", "FLAIR": "FLAIR"}
    for seed, case in enumerate(("UPENN-GBM-00001_11", "UPENN-GBM-00002_11", "UPENN-GBM-00002_21")):
        for contrast, name in names.items():
            if (case, name) != ("UPENN-GBM-00002_21", "FLAIR"):
                scan(root / f"images_structural/{case}/{case}_{name}.nii.gz", contrast, seed)
            other(root, f"images_structural_unstripped/{case}/{case}_{name}_unstripped.nii.gz")
        if case.endswith("_11"):
            label_map(root / f"automated_segm/{case}_automated_approx_segm.nii.gz", (1, 2, 4), seed)
    label_map(root / "images_segm/UPENN-GBM-00002_11_segm.nii.gz", (1, 2, 4), 1)
    other(
        root,
        "images_DSC/UPENN-GBM-00002_11/UPENN-GBM-00002_11_DSC.nii.gz",
        "images_DTI/images_DTI/UPENN-GBM-00002_11/UPENN-GBM-00002_11_DTI_AD.nii.gz",
    )
    table(
        root / "UPENN-GBM_clinical_info_v2.1.csv",
        "ID,Gender,Age_at_scan_years,Survival_from_surgery_days_UPDATED,Survival_Status,Survival_Censor,IDH1,MGMT,KPS,GTR_over90percent,PsP_TP_score\n"
        "UPENN-GBM-00001_11,F,63.42,200,Deceased,0,Wildtype,Indeterminate,90,Y,\n"
        "UPENN-GBM-00002_11,M,59,Not Available,Alive,1,Mutated,Methylated,,N,\n"
        "UPENN-GBM-00002_21,M,60.5,Not Available,Alive,1,NOS/NEC,Not Available,,N,5\n",
    )
    auto, manual = (
        "automated_segm/UPENN-GBM-00001_11_automated_approx_segm.nii.gz",
        "images_segm/UPENN-GBM-00002_11_segm.nii.gz",
    )
    return Expected(
        "upenn_gbm",
        {
            ("00001", "11"): Found(
                sorted(GLIOMA), {"idh": "wildtype", "mgmt": None}, auto, {"age": 63.42, "sex": "F"}
            ),
            ("00002", "11"): Found(
                sorted(GLIOMA), {"idh": "mutant", "mgmt": "methylated"}, manual, {"sex": "M"}
            ),
            ("00002", "21"): Found(("T1ce", "T1w", "T2w"), {"idh": None, "mgmt": None}, None, {"age": 60.5}),
        },
        counts=3,
        unused=14,
    )


def ucsf_pdgm(root: Path) -> Expected:
    """TCIA page, version 5: folders of four digits, ids of three in the table, follow-ups renamed; nested files."""
    names = {"T1w": "T1", "T1ce": "T1c", "T2w": "T2", "FLAIR": "FLAIR"}
    for seed, case in enumerate(("UCSF-PDGM-0004", "UCSF-PDGM-0433", "UCSF-PDGM-0433_FU007d")):
        folder = root / f"{case}_nifti"
        for contrast, name in names.items():
            nested = case == "UCSF-PDGM-0433" and f"{case}_{name}.nii"
            scan(folder / nested / nested if nested else folder / f"{case}_{name}.nii.gz", contrast, seed)
            other(folder, f"{case}_{name}_bias.nii.gz")
        label_map(folder / f"{case}_tumor_segmentation.nii.gz", (1, 2, 4), seed)
        label_map(folder / f"{case}_brain_segmentation.nii.gz", (1,), seed)
        other(
            folder,
            f"{case}_SWI.nii.gz",
            f"{case}_ADC.nii.gz",
            f"{case}_DTI_eddy_MD.nii.gz",
            f"{case}_brain_parenchyma_segmentation.nii.gz",
        )
    table(
        root / "UCSF-PDGM-metadata_v5.csv",
        "ID,Sex,Age at MRI,WHO CNS Grade,Final pathologic diagnosis (WHO 2021),MGMT status,MGMT index,1p/19q,IDH,1-dead 0-alive,OS,EOR,Biopsy prior to imaging,BraTS21 ID,BraTS21 Segmentation Cohort,BraTS21 MGMT Cohort\n"
        'UCSF-PDGM-004,M,66,4,"Glioblastoma, IDH-wildtype",negative,0,unknown,wildtype,1,1303,STR,No,BraTS2021_00097,Training,Training\n'
        'UCSF-PDGM-433,F,31,2,"Astrocytoma, IDH-mutant",unknown,unknown,intact,IDH1 p.R132H,0,600,GTR,No,,,\n'
        'UCSF-PDGM-0433_FU007d,F,31,2,"Astrocytoma, IDH-mutant",unknown,unknown,intact,IDH1 p.R132H,0,600,GTR,No,,,\n',
    )

    def found(case: str, grade: str, idh: str) -> Found:
        seg = f"{case}_nifti/{case}_tumor_segmentation.nii.gz"
        return Found(sorted(GLIOMA), {"grade": grade, "idh": idh}, seg, {"sex": "M" if grade == "4" else "F"})

    return Expected(
        "ucsf_pdgm",
        {
            ("0004", ""): found("UCSF-PDGM-0004", "4", "wildtype"),
            ("0433", ""): found("UCSF-PDGM-0433", "2", "mutant"),
            ("0433", "FU007d"): found("UCSF-PDGM-0433_FU007d", "2", "mutant"),
        },
        counts=2,
        unused=24,
    )


# ---- DICOM of TCIA, as the NBIA Data Retriever names folders --------------------------------------------------------


def _nbia(study: Path, subject: str, date: str, series: Sequence[tuple[str, str]], seed: int = 0) -> None:
    for number, (sequence, description) in enumerate(series, 1):
        folder = study / f"{number}00.000000-{description}-{39990 + number}"
        dicom(
            folder, sequence, subject, date, f"10{number:02}00", number, seed, SeriesDescription=description
        )


def burdenko_gbm(root: Path) -> Expected:
    """kurmukovai/burdenko_glioma_progression: planning with CT and radiotherapy objects, then control visits."""
    at = root / "manifest-1676999639835/Burdenko-GBM-Progression/Burdenko-GBM-001"
    planning = (
        ("ct", "CT"),
        ("t1", "MR0T1"),
        ("t1_post", "MR0T1C"),
        ("t2", "MR0T2"),
        ("flair", "MR0T2FLAIR"),
    )
    _nbia(at / "05-06-2004-NA-Radiotherapy planning 00-01357", "Burdenko-GBM-001", "05-06-2004", planning)
    control = (("t1_post", "MR0T1C"), ("flair", "MR0T2FLAIR"))
    _nbia(at / "03-02-2006-NA-Control visit 2-75777", "Burdenko-GBM-001", "03-02-2006", control)
    other(at.parents[1], "metadata.csv", "Burdenko-GBM-Progression/LICENSE")
    return Expected(
        "burdenko_gbm",
        {
            ("001", "Control visit 2"): Found(("FLAIR", "T1ce")),
            ("001", "Radiotherapy planning 00"): Found(("FLAIR", "T1ce", "T1w", "T2w")),
        },
        notes=("AGENT_SILENT, 1 DICOM series",),
        refused=(("NOT_MR", "100.000000-CT-39991"),),
        counts=1,
    )


def remind(root: Path) -> Expected:
    """tiago-assis/TiagoThesisWork, README 1.1: one study before, one during the operation; segmentations beside."""
    at = root / "manifest-1746853315606/ReMIND/ReMIND-001"
    before = (("t1_post", "3D_AX_T1_postcontrast"), ("t2", "3D_SAG_T2_SPACE"), ("flair", "2D_AX_T2_FLAIR"))
    _nbia(at / "12-25-1982-NA-Preop-56579", "ReMIND-001", "12-25-1982", before)
    _nbia(at / "12-25-1982-NA-Intraop-90478", "ReMIND-001", "12-25-1982", (("t2", "3D_AX_T2_BLADE_intraop"),))
    other(
        root,
        "manifest-1746853315606/metadata.csv",
        "ReMIND_NRRD_Seg_Sep_2023/ReMIND-001/ReMIND-001-preop-SEG-tumor.nrrd",
    )
    return Expected("remind", {("001", ""): Found(("FLAIR", "T1ce", "T2w"))}, counts=1)


# ---- fetal ----------------------------------------------------------------------------------------------------------


def feta2021(root: Path) -> Expected:
    """openmedlab/Awesome-Medical-Dataset, FeTA, file structure."""
    for seed, (subject, method) in enumerate((("001", "mial"), ("041", "irtk"))):
        stem = f"sub-{subject}/anat/sub-{subject}_rec-{method}"
        scan(root / f"{stem}_T2w.nii.gz", "T2w", seed)
        label_map(root / f"{stem}_dseg.nii.gz", (1, 2, 3, 4, 5, 6, 7), seed)
        other(root, f"{stem}_T2w.json", f"{stem}_dseg.json")
    table(
        root / "participants.tsv",
        "participant_id\tPathology\tGestational age\nsub-001\tPathological\t27.4\nsub-041\tNeurotypical\t30.1\n",
    )
    return Expected(
        "feta2021",
        {
            ("001", ""): Found(
                ("T2w",),
                {"pathology": "pathological"},
                "sub-001/anat/sub-001_rec-mial_dseg.nii.gz",
                {"gestational_age": 27.4},
            ),
            ("041", ""): Found(
                ("T2w",), {"pathology": "neurotypical"}, "sub-041/anat/sub-041_rec-irtk_dseg.nii.gz"
            ),
        },
        counts=2,
    )


# ---- anything else: the BIDS specification, and collections that are nearly BIDS -------------------------------------


def bids(root: Path) -> Expected:
    """Entities in the order of the specification, sessions, runs, and much that is no anatomical scan."""
    anat = "sub-01/ses-pre/anat/sub-01_ses-pre"
    for name in ("acq-mprage_rec-norm_run-02", "acq-mprage_run-01", "acq-spgr_run-01"):
        scan(root / f"{anat}_{name}_T1w.nii.gz", "T1w")
    scan(root / f"{anat}_ce-gadolinium_run-01_T1w.nii.gz", "T1ce")
    scan(root / f"{anat}_acq-tse_T2w.nii", "T2w")
    scan(root / "sub-01/ses-post/anat/sub-01_ses-post_desc-preproc_FLAIR.nii.gz", "FLAIR")
    scan(root / "sub-02x/anat/sub-02x_T1w.nii.gz", "T1w", 1)
    scan(root / "sub-02x/anat/sub-02x_PDw.nii.gz", "T2w", 1)
    other(
        root,
        f"{anat}_acq-mprage_run-01_T1w.json",
        "sub-01/ses-pre/func/sub-01_ses-pre_task-rest_bold.nii.gz",
        "sub-01/ses-pre/fmap/sub-01_ses-pre_T1w.nii.gz",
        f"{anat}_T2starw.nii.gz",
        f"{anat}_inplaneT2.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "sourcedata/sub-03/anat/sub-03_T1w.nii.gz",
    )
    return Expected(
        "bids",
        {
            ("01", "post"): Found(("FLAIR",)),
            ("01", "pre"): Found(
                ("T1ce", "T1w", "T2w"), repeats={"T1w": f"{anat}_acq-mprage_run-01_T1w.nii.gz"}
            ),
            ("02x", ""): Found(("PDw", "T1w")),
        },
        "bids",
        unused=6,
    )


def ixi(root: Path) -> Expected:
    for name, contrast in (("T1", "T1w"), ("T2", "T2w"), ("PD", "T2w")):
        scan(root / f"IXI-{name}/IXI002-Guys-0828-{name}.nii.gz", contrast)
    scan(root / "IXI-T1/IXI012-HH-1211-T1.nii.gz", "T1w", 1)
    other(root, "IXI-MRA/IXI002-Guys-0828-MRA.nii.gz", "IXI.xls")
    sessions = {("IXI002", ""): Found(("PDw", "T1w", "T2w")), ("IXI012", ""): Found(("T1w",))}
    return Expected("bids", sessions, "ixi", unused=1)


def fomo(root: Path) -> Expected:
    """FOMO-60K as explored in public: PT001_OASIS1/sub_1/ses_1/t1.nii.gz; subject 1 of two parts are two people."""
    scan(root / "PT001_OASIS1/sub_1/ses_1/t1.nii.gz", "T1w")
    scan(root / "PT005_IXI/sub_1/ses_1/t1.nii.gz", "T1w", 1)
    scan(root / "PT005_IXI/sub_1/ses_1/t2.nii.gz", "T2w", 1)
    other(root, "participants.tsv", "mapping.tsv", "mri_info.tsv")
    sessions = {("PT001_OASIS1_1", "1"): Found(("T1w",)), ("PT005_IXI_1", "1"): Found(("T1w", "T2w"))}
    return Expected("bids", sessions, "fomo")


def openmind(root: Path) -> Expected:
    scan(root / "OpenMind/ds000117/sub-01/ses-mri/anat/sub-01_ses-mri_acq-mprage_T1w.nii.gz", "T1w")
    scan(root / "OpenMind/ds001353/sub-01/anat/sub-01_T2w.nii.gz", "T2w", 1)
    other(root, "openneuro_metadata.csv")
    sessions = {("ds000117_01", "mri"): Found(("T1w",)), ("ds001353_01", ""): Found(("T2w",))}
    return Expected("bids", sessions, "openmind")


WRITERS: dict[str, Callable[[Path], Expected]] = {
    writer.__name__: writer
    for writer in (
        oasis3, oasis3_bids, nacc, adni, adni_nifti, adni_clinica, brats2020, nifd, nifd_clinica, upenn_gbm, habs,
        ucsf_pdgm, burdenko_gbm, aibl, aibl_clinica, remind, feta2021, bids, ixi, fomo, openmind,
    )
}  # fmt: skip
