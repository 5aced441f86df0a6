"""Configs: strict reading, plain errors, identities that change exactly when a result would."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import phantoms
from cranium import config, reading
from cranium.cards import load_card
from cranium.config import Experiment, UserError

TINY = "name: tiny\ningest: {cohorts: [a, b]}\n"
DETECT = "adapt:\n  tasks:\n  - {task: classification, name: d, cohort: a, label: l, classes: [p, q]}\n"
TASKS = DETECT + (
    "  - {task: segmentation, name: s, cohort: a, classes: {core: [one, two]}, regions: {all: [core]}}\n"
)


def _load(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return reading.load_experiment(path, overrides)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("name: tiny\ningest: {cohort: [a]}", "CONFIG", "did you mean `ingest.cohorts`"),
        ("name: Tiny\ningest: {}", "CONFIG", "name"),
        ("name: tiny\nname: tiny\ningest: {}", "YAML", "given twice"),
        ("name: tiny\ningest: &x {cohorts: [a]}", "YAML_ALIAS", "write the values out"),
        ("name: !!python/object/apply:os.system [x]", "YAML", "python"),
        (
            "name: tiny\na: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]",
            "YAML_ALIAS",
            "write the values out",
        ),  # X5: laughs
        ("name: " + "[" * 20_000, "YAML", "recursion"),
        ("name: tiny\nseed: " + "1" * 5000, "YAML", "digits"),
        ("name: tiny\n" + "#" * (1 << 20), "YAML_SIZE", "which no config is"),
        ("- a\n- b", "YAML", "no mapping"),
        (TINY + "pretrain: {cohorts: [c]}", "CONFIG", "ingest.cohorts does not list"),
        ("name: tiny\ningest: {stack: neighbours}", "CONFIG", "or say stack: both"),
        ("name: tiny\ningest: {stack: both, neighbours: 4}", "CONFIG", "make it odd"),
        (
            "name: tiny\ningest: {stack: neighbours, contrasts: [T1w], neighbours: 2}",
            "CONFIG",
            "2 slices have no middle",
        ),
        ("name: tiny\ningest: {stack: volumes}", "CONFIG", "'neighbours' or 'both'"),
        (TINY + DETECT + "sweep: {init: [random], stack: [both, both]}", "CONFIG", "names one twice"),
        (
            TINY + DETECT + "sweep: {init: [random], stack: [neighbours]}",
            "CONFIG",
            "e.g. sweep.neighbours_of: T1w",
        ),
        (
            TINY + DETECT + "sweep: {init: [random], stack: [both], neighbours_of: T1w}",
            "CONFIG",
            "does not name",
        ),
        (
            TINY + DETECT + "sweep: {init: [random], stack: [neighbours], neighbours_of: T1ce}",
            "CONFIG",
            "none of ingest.contrasts",
        ),
        (
            "name: tiny\ningest: {cohorts: [a], contrasts: [T1w]}\n"
            + DETECT
            + "sweep: {init: [random], stack: [both, neighbours]}",
            "CONFIG",
            "both and neighbours of ['T1w'] are the same stacks",
        ),
        (
            "name: tiny\ningest: {cohorts: [a], neighbours: 1}\n"
            + DETECT
            + "sweep: {init: [random], stack: [contrasts, both]}",
            "CONFIG",
            "leave one out",
        ),
        (
            "name: tiny\ningest: {cohorts: [a], neighbours: 4}\n"
            + DETECT
            + "sweep: {init: [random], stack: [contrasts, both]}",
            "CONFIG",
            "sweep.stack: both: neighbours: 4 slices have no middle one",
        ),
        (
            TINY + DETECT + "sweep: {init: ['run:ab12cd34'], stack: [contrasts, both]}",
            "CONFIG",
            "pretrained on stacks of one kind",
        ),
        (
            TINY + DETECT + "sweep: {init: [volumes], stack: [contrasts, neighbours], neighbours_of: FLAIR}",
            "CONFIG",
            "sweep.stack: neighbours: sweep.init: volumes are measured on T1w",
        ),
        (TINY + "pretrain: {cohorts: [a], batch_size: 12}", "CONFIG", "stream.lanes"),
        (
            TINY + "pretrain: {cohorts: [a], crops: {global_size: 100}}",
            "CONFIG",
            "multiple of the patch size",
        ),
        (TINY + "sweep: {}", "CONFIG", "adapt.tasks"),
        (TINY + TASKS.replace("classification", "guess"), "CONFIG", "'classification', 'segmentation'"),
        (TINY + TASKS.replace("label:", "lable:"), "CONFIG", "did you mean"),
        (TINY + TASKS.replace("regions: {all: [core]}", "regions: {all: [rim]}"), "CONFIG", "['rim']"),
        (
            TINY + TASKS + "sweep: {init: [random], adaptation: [knn]}",
            "CONFIG",
            "no way to learn a segmentation",
        ),
        (TINY + DETECT + "sweep: {init: [random], adaptation: [linear, conv]}", "CONFIG", "['conv']"),
        (TINY + DETECT + "sweep: {init: [random], contrasts: {test: [[T1ce]]}}", "CONFIG", "names ['T1ce']"),
        (
            TINY + DETECT + "sweep: {init: [random], contrasts: {train: [[T1w], [T1w]]}}",
            "CONFIG",
            "different",
        ),
        (
            TINY + DETECT + "sweep: {init: [random], contrasts: {test: [[]]}}",
            "CONFIG",
            "one contrast or more",
        ),
        (
            TINY + DETECT + "sweep: {init: [random], contrasts: {train: [all, [T2w, T1w, FLAIR]]}}",
            "CONFIG",
            "are the same",
        ),
        (
            TINY + TASKS + "sweep: {init: [random], adaptation: [linear], contrasts: {test: all subsets}}",
            "CONFIG",
            "task s is a segmentation",
        ),
    ],
)
def test_a_bad_config_is_refused_with_what_to_do(tmp_path: Path, text: str, code: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        _load(tmp_path, text)
    assert refused.value.code == code and says in str(refused.value) and refused.value.exit_code == 2


def test_of_a_stack_it_is_the_experiment_that_names_no_other(tmp_path: Path) -> None:
    """So what is made of that stack is found by an experiment that has it alone, and nothing existing moves."""
    grid = "sweep: {init: [random], contrasts: {train: [all, [T1w]]}"
    asked = ", stack: [contrasts, neighbours, both], neighbours_of: FLAIR}"
    text = (
        TINY.replace("{cohorts", "{neighbours: 5, cohorts") + "stream: {contrasts: [T1w, FLAIR]}\n" + DETECT
    )
    exp, plain = _load(tmp_path, text + grid + asked), _load(tmp_path, text + grid + "}")
    assert plain.stacks == ("contrasts",) and plain.of_stack("contrasts") is plain
    assert exp.stacks == ("contrasts", "neighbours", "both")
    assert exp.ingest.preprocessing == plain.ingest.preprocessing
    assert exp.of_stack("contrasts") == plain
    both = exp.of_stack("both")
    assert both.ingest == plain.ingest.model_copy(update={"stack": "both"}) and both.sweep == plain.sweep
    assert both.ingest.shape == (3, 5, 224, 224) and both.of_stack("both") is both
    one = exp.of_stack("neighbours")
    assert one.ingest.channels == ("FLAIR",) and one.ingest.shape == (1, 5, 224, 224)
    assert one.sweep and one.sweep.contrasts == config.Contrasts() and one.stream.contrasts == ("FLAIR",)


def test_one_level_of_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "x.yaml").write_text(
        "ingest: {cohorts: [a], size: 112}\npretrain: {cohorts: [a], steps: 7}\n"
    )
    exp = _load(tmp_path, "base: base/x.yaml\nname: tiny\ningest: {size: 56}", "pretrain.steps=9")
    assert exp.ingest.size == 56 and exp.ingest.cohorts == ("a",) and exp.pretrain and exp.pretrain.steps == 9
    (tmp_path / "base" / "x.yaml").write_text("base: y.yaml\n")
    with pytest.raises(UserError, match="one level"):
        _load(tmp_path, "base: base/x.yaml\nname: tiny")


def test_numbers_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    exp = _load(tmp_path, TINY + "pretrain: {cohorts: [a], optimiser: {lr: 1e-4}}")
    assert exp.pretrain and exp.pretrain.optimiser.lr == 1e-4  # PyYAML says "1e-4" is a string


def test_a_task_is_learnt_in_the_ways_that_fit_it_and_rows_without_a_backbone_in_their_own(
    tmp_path: Path,
) -> None:
    exp = _load(tmp_path, TINY + TASKS + "sweep: {adaptation: [knn, linear, conv], init: [random]}")
    assert exp.sweep and exp.adapt
    detect, segment = exp.adapt.tasks
    assert exp.sweep.adaptations(detect, "random") == ("knn", "linear")
    assert exp.sweep.adaptations(segment, "random") == ("linear", "conv")
    assert exp.sweep.adaptations(detect, "covariates") == ("linear",)
    assert exp.sweep.adaptations(segment, "covariates") == ()
    assert exp.sweep.adaptations(segment, "cnn") == exp.sweep.adaptations(detect, "cnn") == ("finetune",)


def test_compute_never_shapes_an_identity(tmp_path: Path) -> None:
    plain = TINY + "pretrain: {cohorts: [a]}"
    one = config.fingerprint(_load(tmp_path, plain))
    assert one == config.fingerprint(
        _load(tmp_path, plain, "pretrain.compute.num_workers=4", "ingest.compute.threads=3")
    )
    for change in ("pretrain.steps=9", "pretrain.optimiser.lr=2e-3", "ingest.size=112", "stream.lanes=16"):
        assert one != config.fingerprint(_load(tmp_path, plain, change)), change


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON))
def test_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert config.fingerprint(value) == config.fingerprint(dict(reversed(value.items())))


def test_nan_has_no_identity() -> None:
    with pytest.raises(ValueError):
        config.fingerprint({"x": float("nan")})


def test_machine_facts_come_from_settings_then_variables(tmp_path: Path) -> None:
    environ = {"CRANIUM_STORE": "/from/env", "CRANIUM_RAW_ADNI": "/adni", "CRANIUM_TRACKING_URI": "http://x"}
    machine = reading.load_machine(["store=/given", "raw.oasis3=/oasis"], environ)
    assert machine.store == Path("/given") and machine.tracking == "http://x"
    assert machine.raw == {"adni": Path("/adni"), "oasis3": Path("/oasis")}
    assert reading.load_machine([], {"CRANIUM_STORE": "/s"}).tracking == "sqlite:////s/mlflow.db"
    assert reading.load_machine(["store=here"], {}).store.is_absolute()
    with pytest.raises(UserError, match="file system"):
        reading.load_machine(["store=s3://bucket/x"], {})


def test_shards_may_lie_in_an_object_store() -> None:
    assert reading.load_machine([], {}).shards is None
    assert reading.load_machine(["shards=s3://bucket/lab/"], {}).shards == "s3://bucket/lab"
    assert reading.load_machine([], {"CRANIUM_SHARDS": "s3://bucket"}).shards == "s3://bucket"
    assert reading.load_machine(["shards=there"], {}).shards == str(Path("there").absolute())
    for wrong in ("gs://bucket", "s3://", "s3:///x", "s3://key:secret@bucket/x"):
        with pytest.raises(UserError) as refused:
            reading.load_machine([f"shards={wrong}"], {})
        message = str(refused.value)
        assert refused.value.code == "CONFIG" and "shards" in message and "secret" not in message


@pytest.mark.parametrize("uri", ["http://me:hunter2@host:5000", "postgresql://me:hunter2@host/db"])
def test_a_password_in_an_address_is_refused(uri: str) -> None:
    """X6: it would be printed, logged, and sent with a job. The message must not repeat it either."""
    for settings, environ in (([f"tracking_uri={uri}"], {}), ([], {"CRANIUM_TRACKING_URI": uri})):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
            reading.load_machine(settings, environ)
        assert "hunter2" not in str(refused.value)
    assert reading.load_machine(["tracking_uri=http://host:5000/a@b"], {}).tracking == "http://host:5000/a@b"


@pytest.mark.parametrize("text", ["[" * 5000, "1" * 5000])
def test_a_setting_that_is_no_yaml_is_text(text: str) -> None:
    assert reading.nested([f"x={text}"]) == {"x": text}


def test_a_user_error_crosses_process_borders_whole() -> None:
    error = pickle.loads(pickle.dumps(UserError("LABEL", "no such label", 1)))
    assert (error.code, str(error), error.exit_code) == ("LABEL", "no such label", 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"contrasts": ["T1w", "T1ce"]}, "no file pattern for ['T1ce']"),
        ({"groups": ["family"]}, "tables[].columns"),
        ({"layouts": [{"files": {"T1w": ["x"]}}], "contrasts": ["T1w"]}, "unverified"),
        ({"name": "other"}, "make them equal"),
    ],
)
def test_a_card_that_does_not_hold_together(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "phantom.yaml"
    path.write_text(yaml.safe_dump({**phantoms.card("phantom"), **change}))
    with pytest.raises(UserError) as refused:
        load_card(path)
    assert says in str(refused.value)


def test_an_unknown_cohort_names_its_neighbour(tmp_path: Path) -> None:
    phantoms.write_card(tmp_path, "phantom")
    assert load_card("phantom", tmp_path).name == "phantom"
    with pytest.raises(UserError, match="did you mean phantom"):
        load_card("fantom", tmp_path)


def test_ways_to_a_mask_are_one_or_several(tmp_path: Path) -> None:
    assert _load(tmp_path, TINY, "ingest.mask=otsu").ingest.mask == ("otsu",)
    assert _load(tmp_path, TINY, "ingest.mask=[supplied,deepbet]").ingest.mask == ("supplied", "deepbet")
    for wrong in ("ingest.mask=[]", "ingest.mask=[otsu,otsu]", "ingest.mask=command", "ingest.mask_tool=x"):
        with pytest.raises(UserError, match="mask"):
            _load(tmp_path, TINY, wrong)


def test_wide_pixels_are_not_for_the_models(tmp_path: Path) -> None:
    assert _load(tmp_path, TINY, "ingest.dtype=uint16").ingest.dtype == "uint16"
    with pytest.raises(UserError, match="uint16"):
        _load(tmp_path, TINY + "pretrain: {cohorts: [a]}", "ingest.dtype=uint16")


def test_how_scans_are_prepared_shapes_an_identity(tmp_path: Path) -> None:
    one = config.fingerprint(_load(tmp_path, TINY).ingest.preprocessing)
    changes = (
        "align=none",
        "space=mni",
        "bias_correction=n4",
        "mask=otsu",
        "dtype=uint16",
        "orientation=sform",
    )
    for change in (*changes, "slices.every=2", "slices.rule=range"):
        assert one != config.fingerprint(_load(tmp_path, TINY, f"ingest.{change}").ingest.preprocessing), (
            change
        )
