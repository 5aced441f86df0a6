"""Four glioma patients (BRATS 2013/2015 by way of DeepMedic; Menze et al. 2015) as a cohort: for checks only."""

from __future__ import annotations

from cranium.cards import Card

PATIENTS = ("0003", "0004", "0005", "0006")


def card() -> Card:
    place = "brats_2013_pat{subject}_1/"
    return Card.model_validate(
        {
            "name": "glioma",
            "title": "Four glioma patients",
            "access": "yours",
            "licence": "CC BY-NC-SA 3.0 CH",
            "citation": "Menze et al. 2015",
            "role": "tests",
            "contrasts": ["T1ce", "FLAIR"],
            "segmentation": {"necrosis": [1], "oedema": [2], "nonenhancing": [3], "enhancing": [4]},
            "layouts": [
                {
                    "files": {
                        "T1ce": [place + "T1c_subtrMeanDivStd.nii.gz"],
                        "FLAIR": [place + "Flair_subtrMeanDivStd.nii.gz"],
                    },
                    "mask": place + "brainmask.nii.gz",
                    "segmentation": place + "OTMultiClass.nii.gz",
                    "source": "https://github.com/deepmedic/deepmedic",
                }
            ],
        }
    )
