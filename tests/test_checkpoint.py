from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from cranium import checkpoint, store
from cranium.config import UserError
from cranium.models import vit
from cranium.store import Artefact
from cranium.study import Study

TINY = {"arch": "vit_tiny_patch14", "in_channels": 3, "image_size": 56}


def same(a: vit.Backbone, b: vit.Backbone) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_random_is_a_function_of_its_seed_and_disturbs_nobody():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, _ = checkpoint.load_backbone("random", **TINY, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert same(first, checkpoint.load_backbone("random", **TINY, seed=1)[0])
    assert not same(first, checkpoint.load_backbone("random", **TINY, seed=2)[0])


def test_what_is_exported_loads_as_it_was(tmp_path: Path):
    made, _ = checkpoint.load_backbone("random", **TINY, seed=3)
    checkpoint.export(tmp_path, made, {"channels": ["T1w"], "preprocessing_hash": "ab"})
    loaded, source = checkpoint.load_backbone("scratch", **TINY, pretrained=Artefact(tmp_path))
    assert same(made, loaded)
    assert source.sha256 and source.init == "scratch"
    assert checkpoint.read_card(tmp_path)["channels"] == ["T1w"]
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.BACKBONE]


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path):
    other = vit.build("vit_small_patch14_dinov2", image_size=56)
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, path)
    with pytest.raises(UserError, match=r"blocks\.6") as refused:
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert refused.value.code == "WEIGHTS_MISFIT"


def test_pickled_code_in_weights_is_never_run(tmp_path: Path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {canary}",))

    path = tmp_path / "weights.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="never run") as refused:
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert refused.value.code == "WEIGHTS_UNSAFE"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError) as refused:
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert refused.value.code == "WEIGHTS_UNSAFE"
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the canary is a real one
    assert canary.exists()


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>"])
def test_a_file_that_is_no_weights_is_one_line(tmp_path: Path, content: bytes | None):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        checkpoint.load_backbone("dinov2", **TINY, weights_file=path)
    assert refused.value.code == ("NO_WEIGHTS" if content is None else "WEIGHTS_DAMAGED")
    assert str(path) in str(refused.value)


def _spoiled(whole: bytes) -> dict[str, bytes]:
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]

    def with_header(changed: dict[str, object]) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    bloated = {f"t{i}": header[first] for i in range(100_000)}
    return {
        "cut in the header": whole[:50],
        "cut in the tensors": whole[:-100],
        "longer than it says": whole + b"\0" * 100,
        "header longer than the file": (1 << 40).to_bytes(8, "little") + whole[8:],
        "header of 100,000 tensors": with_header(bloated),
        "overlapping tensors": with_header(header | {second: header[first]}),
        "another dtype": with_header(header | {first: header[first] | {"dtype": "F64"}}),
        "nonsense dtype": with_header(header | {first: header[first] | {"dtype": "Q9"}}),
    }


def test_a_damaged_safetensors_is_refused_before_anything_is_made_of_it(tmp_path: Path):
    whole = save({"a": torch.rand(40, 10), "b": torch.rand(300)})
    for what, content in _spoiled(whole).items():
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError) as refused:
            checkpoint.read_tensors(path)
        assert refused.value.code == "WEIGHTS_DAMAGED", what
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": {"a": 1.0}}, "more than tensors: a"),
        ([torch.zeros(2)], "no named tensors"),
        ({}, "no named"),
    ],
)
def test_a_pytorch_file_without_tensors_by_name_is_refused(tmp_path: Path, content: object, named: str):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=named) as refused:
        checkpoint.read_tensors(tmp_path / "weights.pth")
    assert refused.value.code == "WEIGHTS_DAMAGED"


def test_a_safetensors_is_known_by_its_content(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "blob")  # the hub's cache has names without a suffix
    assert checkpoint.read_tensors(tmp_path / "blob")["a"].tolist() == [1.0] * 3


def test_what_was_never_released_is_said():
    with pytest.raises(UserError, match="no released weights"):
        checkpoint.load_backbone("dinov2", **TINY)
    with pytest.raises(UserError, match="imagenet"):
        checkpoint.architecture("imagenet", "vit_tiny_patch14")
    assert checkpoint.architecture("imagenet", "vit_base_patch14_dinov2") == "vit_base_patch16_224"
    with pytest.raises(UserError, match="cranium pretrain"):
        checkpoint.load_backbone("scratch", **TINY)


def _finished(folder: Path, name: str, seed: int, **card: object) -> Artefact:
    made, _ = checkpoint.load_backbone("random", **TINY, seed=seed)
    path = folder / "pretrain" / name
    path.mkdir(parents=True)
    checkpoint.export(path, made, {"channels": ["T1w"], "preprocessing_hash": "ab", **card})
    store.commit(path, {"stage": "pretrain", "start": {"licence": "Apache-2.0"}})
    return Artefact(path)


def test_a_run_is_found_by_its_names_and_brings_its_own_architecture_and_rule(tmp_path: Path):
    made = _finished(tmp_path, "scratch-vit_tiny_patch14-ab12cd34", 3, position="dinov2")
    _finished(tmp_path, "scratch-vit_tiny_patch14-ffffffff", 4)
    store.write_atomic(
        tmp_path / "tracked" / "00" / f"pretrain-{made.path.name}.json", '{"run": "0123456789"}'
    )
    for name in ("scratch-vit_tiny_patch14-ab12cd34", "ab12cd34", "0123456789"):
        assert checkpoint.find_run(tmp_path, f"run:{name}") == made
    other = {**TINY, "arch": "vit_small_patch14_dinov2"}
    loaded, source = checkpoint.load_backbone("run:ab12cd34", **other, pretrained=made)
    assert same(loaded, checkpoint.load_backbone("random", **TINY, seed=3)[0])
    assert source.position == loaded.position == "dinov2" and source.licence == "Apache-2.0"
    for wrong in ("run:12cd34", "run:", "run:..", "run:scratch"):
        with pytest.raises(UserError, match="ab12cd34") as refused:
            checkpoint.find_run(tmp_path, wrong)
        assert refused.value.code == "NO_RUN"


def test_a_run_without_a_rule_keeps_the_only_one_there_was(tmp_path: Path):
    made, _ = checkpoint.load_backbone("random", **TINY, seed=3)
    checkpoint.export(tmp_path, made, {"channels": ["T1w"]})
    card = checkpoint.read_card(tmp_path)
    assert card.pop("position") == "timm"
    save_file(made.state_dict(), tmp_path / checkpoint.BACKBONE, {"cranium": json.dumps(card)})
    assert checkpoint.load_backbone("scratch", **TINY, pretrained=Artefact(tmp_path))[1].position == "timm"


def test_an_alias_of_mlflows_registry_names_a_run(tmp_path: Path, mlflow_db: str):
    from cranium import track

    made = _finished(tmp_path, "brainfound-vit_tiny_patch14-ab12cd34", 3)
    run = track.Tracker(mlflow_db, "test").run(made.id, "pretrain brainfound", {})
    store.write_atomic(
        tmp_path / "tracked" / "00" / f"pretrain-{made.path.name}.json", json.dumps({"run": run})
    )
    client = track.connected(mlflow_db)
    client.create_registered_model("brain")
    version = client.create_model_version("brain", source=made.path.as_uri(), run_id=run)
    client.set_registered_model_alias("brain", "best", version.version)
    assert checkpoint.find_run(tmp_path, "run:brain@best", mlflow_db) == made
    with pytest.raises(UserError, match="worst") as refused:
        checkpoint.find_run(tmp_path, "run:brain@worst", mlflow_db)
    assert refused.value.code == "NO_RUN"


def test_weights_are_known_by_their_bytes_not_their_name(tmp_path: Path):
    path = tmp_path / "dinov2.safetensors"
    assert checkpoint.identity(path) == path.name
    save_file({"a": torch.zeros(2)}, path)
    first = checkpoint.identity(path)
    assert first == store.sha256(path)
    save_file({"a": torch.zeros(3)}, path)
    assert checkpoint.identity(path) != first


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def unreachable(*_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="weights=PATH") as refused:
        checkpoint.load_backbone("dinov2", arch="vit_small_patch14_dinov2", in_channels=3, image_size=224)
    assert refused.value.code == "NO_WEIGHTS"


def test_training_state_comes_back(tmp_path: Path):
    state = {
        "step": 7,
        "method": {"a": torch.arange(3)},
        "optimiser": {"param_groups": [{"part": "head", "lr": 0.1}]},
    }
    checkpoint.save_training(tmp_path, state)
    back = checkpoint.load_training(tmp_path)
    assert back["step"] == 7 and torch.equal(back["method"]["a"], torch.arange(3))
    assert back["optimiser"] == state["optimiser"]


@pytest.mark.parametrize("damage", ["cut", "flip", "swap", "no marker", "torn marker", "no file"])
def test_damaged_training_state_is_never_loaded(tmp_path: Path, damage: str):  # R8
    checkpoint.save_training(tmp_path, {"step": 7, "a": torch.arange(1000)})
    path, marker = tmp_path / checkpoint.TRAINING, tmp_path / checkpoint.COMPLETE
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "flip":
            path.write_bytes(content[:600] + bytes([content[600] ^ 16]) + content[601:])
        case "swap":
            torch.save({"step": 7, "a": torch.arange(1000).flip(0)}, path)
        case "no marker":
            marker.unlink()
        case "torn marker":
            marker.write_text(marker.read_text()[:20])
        case "no file":
            path.unlink()
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load_training(tmp_path)


def test_released_dinov2_loads_whole(test_data: Path):
    path = test_data / "weights" / "dinov2_vits14_derived.fp16.safetensors"
    backbone, source = checkpoint.load_backbone(
        "dinov2", arch="vit_small_patch14_dinov2", in_channels=3, image_size=224, weights_file=path
    )
    assert "mask_token absent" in source.report and "resampled" not in source.report
    assert source.position == "dinov2" and source.mean == (0.485, 0.456, 0.406)
    with torch.inference_mode():
        tokens = backbone(torch.rand(1, 3, 224, 224))
    assert (
        30 < float(tokens.patches.norm(dim=-1).mean()) < 60
    )  # as DINOv2's; a random ViT-S gives its norm's sqrt(384)


def test_the_load_report_stands_in_mlflow(tmp_path: Path, mlflow_db: str):
    """Every field of `Source`, as tags of the pretraining's run."""
    from rich.console import Console

    from cranium import config, reading, recording, track

    exp = reading.load_experiment(Path(__file__).parents[1] / "experiments/demo.yaml")
    made = _finished(tmp_path, "scratch-vit_tiny_patch14-ab12cd34", 3)
    _, source = checkpoint.load_backbone("run:ab12cd34", **TINY, pretrained=made)
    store.commit(made.path, {"stage": "pretrain", "start": asdict(source), "seconds": 1.0})
    (made.path / "resolved.yaml").write_text("a: 1")
    machine = config.Machine(store=tmp_path, tracking_uri=mlflow_db)
    study = Study(exp, machine, {}, Console(quiet=True))
    recording.pretrained(study, "scratch", made, True)
    tags = track.connected(mlflow_db).get_run(recording.runs(study, made)["run"]).data.tags
    assert tags["start.sha256"] == source.sha256 and tags["start.position"] == "timm"
    total = len(checkpoint.load_backbone("random", **TINY)[0].state_dict())
    assert tags["start.report"] == f"{total} of {total} tensors loaded (cranium names)"
    assert checkpoint.find_run(tmp_path, f"run:{recording.runs(study, made)['run']}") == made


def test_a_run_that_saw_undeclared_cohorts_is_refused(tmp_path: Path):
    from rich.console import Console

    from cranium import config, inventory, reading

    exp = reading.load_experiment(Path(__file__).parents[1] / "experiments/demo.yaml")
    made = _finished(tmp_path, "scratch-vit_tiny_patch14-ab12cd34", 3)
    study = Study(exp, config.Machine(store=tmp_path), {}, Console(quiet=True))
    store.commit(made.path, {"stage": "pretrain", "cohorts": ["demo_ssl"]})
    assert inventory.weights(study, "run:ab12cd34", {}) == made
    store.commit(made.path, {"stage": "pretrain", "cohorts": ["demo_ssl", "adni"]})
    with pytest.raises(UserError, match="adni") as refused:
        inventory.weights(study, "run:ab12cd34", {})
    assert refused.value.code == "LEAKAGE"
    assert inventory.weights(study, "dinov2", {}) is None


def test_an_export_of_several_kinds_of_stack_asks_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And what one view of a study could not have, all of it knows."""
    from rich.console import Console

    from cranium import config, inventory, reading

    kinds = ["sweep.stack=[contrasts,neighbours,both]", "sweep.neighbours_of=T1w"]
    exp = reading.load_experiment(Path(__file__).parents[1] / "experiments/demo.yaml", kinds)
    study = Study(exp, config.Machine(store=tmp_path), {}, Console(quiet=True))
    views = study.views()
    assert {stack: view.exp.ingest.shape[:2] for stack, view in views.items()} == {
        "contrasts": (3, 1),
        "neighbours": (1, 3),
        "both": (3, 3),
    }
    assert views["both"].named("embed random") == "embed random (both)"
    views["both"].note("late")
    views["both"].missing["dinov2"] = "not there"
    views["both"].whole.rejected = True
    assert study.notes == ["late"] and views["contrasts"].missing == {"dinov2": "not there"}
    assert study.exit_code == 3 and study.named("embed") == "embed"
    made = {s: store.Artefact(tmp_path / "pretrain" / s) for s in views}
    monkeypatch.setattr(inventory, "pretrainings", lambda view: {"scratch": made[view.exp.ingest.stack]})
    for asked in (None, "volumes"):
        with pytest.raises(UserError, match=r"stack=\.\.\. one of contrasts, neighbours, both"):
            inventory.pretraining(study, "scratch", asked)
    assert inventory.pretraining(study, "scratch", "both") == made["both"]
    plain = Study(views["both"].exp, study.machine, {}, Console(quiet=True))
    assert plain.views() == {"both": plain} and inventory.pretraining(plain) == made["both"]
