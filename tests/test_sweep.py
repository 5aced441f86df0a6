from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import phantoms
from cranium import adapt, inventory, segmenting, store, sweep
from cranium.config import Experiment, Machine, UserError
from cranium.store import Artefact
from cranium.volume import fingerprint

LABELS = {"condition": {"column": "condition", "classes": {"control": ["control"], "lesion": ["lesion"]}}}


def look(seed: int, noise: float = 0.0) -> bytes:
    """The fingerprint of a head of random bits (one contrast), a share of them changed."""
    rng = np.random.default_rng(seed)
    bits = rng.random((fingerprint.FRAMES, fingerprint.CELLS)) < 0.5
    bits ^= rng.random(bits.shape) < noise
    planes = np.stack([np.ones_like(bits), bits], axis=1)
    return np.packbits(planes, axis=2).tobytes()


def shard_set(
    root: Path,
    cohort: str,
    heads: list[str],
    *,
    overlaps: list[str] = (),
    tag: str = "",
    looks: dict[int, bytes] | None = None,
    overlap_ids: dict[str, dict[str, list[str]]] | None = None,
) -> Artefact:
    """A shard set's manifest and sessions, no pixels: 24 subjects spread over `heads`, each with a look of its own."""
    seed = 1000 * sum(map(ord, tag or cohort))
    folder = root / "ingest" / f"{cohort}-0"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"cohort": cohort, "subject": [f"{i:02d}" for i in range(24)], "session": ""})
    table = table.assign(
        head=[heads[(i // 2) % len(heads)] for i in range(24)],
        block=[f"b{i // 2}" for i in range(24)],
        condition=["control", "lesion"] * 12,
        present=7,
        fingerprint=[(looks or {}).get(i, look(seed + i)) for i in range(24)],
        sources=[json.dumps({"T1w": {"path": "x", "sha256": f"{tag or cohort}{i}"}}) for i in range(24)],
    )
    table.to_parquet(folder / "sessions.parquet")
    card = {"labels": LABELS, "groups": ["head"], "matched": "block", "simulated": True}
    card["overlaps"] = [{"cohort": other} for other in overlaps]
    manifest = {"cohort": cohort, "card": card, "channels": ["T1w"], "overlap_ids": overlap_ids or {}}
    store.commit(folder, manifest)
    return Artefact(folder)


def experiment(accept: list[str] = (), **sweep_settings: object) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "grid",
            "ingest": {"cohorts": ["ssl", "home", "away"]},
            "pretrain": {"cohorts": ["ssl"], "inits": ["scratch"]},
            "stream": {"lanes": 8},
            "adapt": {
                "tasks": [phantoms.LESION | {"external": ["away"]}],
                "accept_leakage": accept,
            },
            "sweep": {"init": ["random", "scratch"], "label_fractions": [0.5, 1.0], "folds": 3}
            | sweep_settings,
        }
    )


def sets(root: Path, **heads: list[str]) -> dict[str, Artefact]:
    own = {name: [f"{name}{i}" for i in range(12)] for name in ("ssl", "home", "away")}
    return {name: shard_set(root, name, used) for name, used in (own | heads).items()}


def features(root: Path) -> dict[tuple[str, str], Artefact]:
    return {
        (i, c): Artefact(root / "embed" / f"{i}_{c}") for i in ("random", "scratch") for c in ("home", "away")
    }


def test_a_clean_design_passes_and_the_grid_is_whole(tmp_path: Path):
    made = sets(tmp_path)
    grid = sweep.declare(
        Machine(store=tmp_path),
        [sweep.Part(experiment(group_by=["subject", "head"]), made, features(tmp_path))],
    )
    assert grid.stamps == ()
    assert len(grid.works) == 2 * 2 * (3 + 12)  # inits x fractions x (folds + heads)
    assert len({work.folder for work in grid.works}) == len(grid.works)
    assert set(grid.folds) == {"lesion/subject/0", "lesion/head/0"}
    assert len(grid.missing) == len(grid.works)


@pytest.mark.parametrize(
    ("heads", "name"),
    [
        ({"ssl": ["home1", "ssl1"]}, "head:ssl+test"),
        ({"away": ["ssl1", "away1"]}, "head:external+ssl"),
        ({"home": ["h0", "h1", "h2"]}, "head:test+train"),
    ],
)
def test_a_head_on_two_sides_is_refused_until_accepted_by_name(tmp_path: Path, heads, name):
    made = sets(tmp_path, **heads)
    with pytest.raises(UserError, match="accept by name") as refused:
        sweep.assign([sweep.Part(experiment(), made)])
    assert refused.value.code == "LEAKAGE" and name in str(refused.value)
    _, stamps = sweep.assign([sweep.Part(experiment(accept=[name]), made)])
    assert any("head" in stamp for stamp in stamps)


def test_an_unknown_group_is_no_group(tmp_path: Path):
    """Nobody is tied to anybody by an empty cell."""
    gaps = {
        name: [None if i % 5 == 0 else f"{name}{i}" for i in range(12)] for name in ("ssl", "home", "away")
    }
    assert sweep.assign([sweep.Part(experiment(), sets(tmp_path, **gaps))])[1] == ()


def test_the_ssl_corpus_matters_only_to_backbones_made_from_it(tmp_path: Path):
    made = sets(tmp_path, ssl=["home1", "ssl1"])
    _, stamps = sweep.assign([sweep.Part(experiment(init=["random", "covariates"]), made)])
    assert stamps == ()


def test_one_file_under_two_names_is_refused(tmp_path: Path):
    made = sets(tmp_path)
    made["away"] = shard_set(tmp_path / "copy", "away", ["away0"], tag="home")
    with pytest.raises(UserError, match="content"):
        sweep.assign([sweep.Part(experiment(), made)])


def test_a_declared_overlap_is_refused_from_either_card(tmp_path: Path):
    made = sets(tmp_path)
    for name, other in (("ssl", "home"), ("home", "ssl")):
        heads = [f"{name}{i}" for i in range(12)]
        declared = made | {name: shard_set(tmp_path / f"declared-{name}", name, heads, overlaps=[other])}
        with pytest.raises(UserError, match=r"overlap:ssl\+test"):
            sweep.assign([sweep.Part(experiment(), declared)])


def test_an_overlap_whose_ids_are_known_is_about_those_people_only(tmp_path: Path):
    made = sets(tmp_path)
    heads = [f"away{i}" for i in range(12)]

    def declared(name: str, ids: dict[str, list[str]]) -> dict[str, Artefact]:
        ids_of = {"home": ids}
        return made | {
            "away": shard_set(tmp_path / name, "away", heads, overlaps=["home"], overlap_ids=ids_of)
        }

    assert sweep.assign([sweep.Part(experiment(), declared("none", {}))])[1] == ()
    assert sweep.assign([sweep.Part(experiment(), declared("others", {"05": ["77"], "xx": ["03"]}))])[1] == ()
    known = declared("known", {"05": ["03", "04"]})
    with pytest.raises(UserError, match="away/05 = home/03") as refused:
        sweep.assign([sweep.Part(experiment(), known)])
    assert "overlap:external+test" in str(refused.value)
    both = ["overlap:external+test", "overlap:external+train"]
    (_, stamps) = sweep.assign([sweep.Part(experiment(accept=both), known)])
    assert len(stamps) == 2 and all("away/05 = home/03" in stamp for stamp in stamps)


def test_one_head_under_two_names_in_two_collections_is_refused(tmp_path: Path):
    made = sets(tmp_path)
    copy = look(424242)
    own = {name: [f"{name}{i}" for i in range(12)] for name in ("home", "away", "ssl")}
    made["home"] = shard_set(tmp_path / "a", "home", own["home"], looks={3: copy})
    made["away"] = shard_set(tmp_path / "b", "away", own["away"], looks={9: look(424242, noise=0.12)})
    with pytest.raises(UserError, match=r"home/03 ~ away/09 \(0\.\d\d\)") as refused:
        sweep.assign([sweep.Part(experiment(), made)])
    assert "duplicate:external+test" in str(refused.value)
    both = ["duplicate:external+test", "duplicate:external+train"]
    (_, stamps) = sweep.assign([sweep.Part(experiment(accept=both), made)])
    assert len(stamps) == 2 and all("1 pair of sessions" in stamp for stamp in stamps)


def test_a_head_that_looks_the_same_within_a_cohort_may_not_be_split(tmp_path: Path):
    made = sets(tmp_path)
    own = [f"home{i}" for i in range(12)]
    made["home"] = shard_set(tmp_path / "a", "home", own, looks={n: look(7) for n in range(0, 12, 2)})
    with pytest.raises(UserError, match=r"duplicate:test\+train"):
        sweep.assign([sweep.Part(experiment(), made)])


def test_what_a_declared_group_ties_is_not_told_a_second_time(tmp_path: Path):
    made = sets(tmp_path)
    looks = {0: look(7), 1: look(7)}  # subjects 00 and 01 are of one head, and of one block
    own = {name: [f"{name}{i}" for i in range(12)] for name in ("home", "ssl")}
    made["home"] = shard_set(tmp_path / "a", "home", own["home"], looks=looks)
    assert sweep.assign([sweep.Part(experiment(group_by=["head"]), made)])[1] == ()
    made["ssl"] = shard_set(tmp_path / "b", "ssl", ["home0", *own["ssl"]], looks={0: look(7)})
    (_, stamps) = sweep.assign([sweep.Part(experiment(accept=["head:ssl+test"]), made)])
    assert len(stamps) == 1 and "head" in stamps[0]


def test_identity_follows_what_shapes_the_result(tmp_path: Path):
    made, machine = sets(tmp_path), Machine(store=tmp_path)

    def folders(exp: Experiment, inputs: dict[tuple[str, str], Artefact] | None = None) -> list[str]:
        return [
            w.folder.name
            for w in sweep.declare(machine, [sweep.Part(exp, made, inputs or features(tmp_path))]).works
        ]

    base = folders(experiment())
    assert folders(experiment(compute={"num_workers": 4})) == base
    other = experiment()
    probe = other.adapt.model_copy(update={"probe": other.adapt.probe.model_copy(update={"c_grid": (1.0,)})})
    assert not set(folders(other.model_copy(update={"adapt": probe}))) & set(base)
    moved = features(tmp_path) | {("scratch", "home"): Artefact(tmp_path / "embed" / "another")}
    changed = [a != b for a, b in zip(base, folders(experiment(), moved), strict=True)]
    assert changed == ["scratch" in name for name in base]


def test_more_fractions_leave_the_other_cells_as_they_are(tmp_path: Path):
    made, machine = sets(tmp_path), Machine(store=tmp_path)
    few = sweep.declare(machine, [sweep.Part(experiment(label_fractions=[1.0]), made, features(tmp_path))])
    many = sweep.declare(
        machine, [sweep.Part(experiment(label_fractions=[0.25, 1.0]), made, features(tmp_path))]
    )
    assert {w.folder for w in few.works} < {w.folder for w in many.works}
    assert np.array_equal(few.folds["lesion/subject/0"], many.folds["lesion/subject/0"])


def test_ways_to_learn_are_an_axis_and_rows_without_a_backbone_stand_once(tmp_path: Path):
    made = sets(tmp_path)
    ways = experiment(init=["random", "covariates", "cnn"], adaptation=["linear", "finetune"], seeds=[0])
    grid = sweep.declare(Machine(store=tmp_path), [sweep.Part(ways, made, features(tmp_path))])
    count = Counter((work.cell.init, work.cell.adaptation) for work in grid.works)
    each = 2 * 3  # fractions x folds
    assert count == {
        ("random", "linear"): each,
        ("random", "finetune"): each,
        ("covariates", "linear"): each,
        ("cnn", "finetune"): each,
    }
    assert len({work.folder for work in grid.works}) == len(grid.works)
    tuned = [work for work in grid.works if work.cell.adaptation == "finetune"]
    assert all(work.start and work.cohort.features is None for work in tuned)


def test_a_cells_name_changes_with_the_settings_of_its_own_adaptation_only(tmp_path: Path):
    made = sets(tmp_path)
    base = experiment(init=["random"], adaptation=["linear", "lora"])
    assert base.adapt
    lora = base.adapt.lora.model_copy(update={"rank": 4})
    other = base.model_copy(update={"adapt": base.adapt.model_copy(update={"lora": lora})})
    grids = [
        sweep.declare(Machine(store=tmp_path), [sweep.Part(exp, made, features(tmp_path))])
        for exp in (base, other)
    ]
    for one, two in zip(grids[0].works, grids[1].works, strict=True):
        assert (one.folder == two.folder) == (one.cell.adaptation == "linear")


def test_weights_of_another_pretraining_make_another_cell(tmp_path: Path):
    made = sets(tmp_path)
    exp = experiment(init=["scratch"], adaptation=["finetune"])
    folders = [
        {
            work.folder
            for work in sweep.declare(
                Machine(store=tmp_path),
                [sweep.Part(exp, made, {}, weights={"scratch": Artefact(tmp_path / "pretrain" / name)})],
            ).works
        }
        for name in ("one", "two")
    ]
    assert not folders[0] & folders[1]


CHANNELS = ("T1w", "T2w", "FLAIR")


def of_three(root: Path) -> dict[str, Artefact]:
    made = sets(root)
    for one in made.values():
        store.commit(one.path, one.manifest() | {"channels": list(CHANNELS)})
    return made


def seen(root: Path) -> dict[tuple[str, ...], Artefact]:
    """Features of every subset of three contrasts."""
    every = [s for k in range(1, 4) for s in itertools.combinations(CHANNELS, k)]
    subsets = [() if len(s) == 3 else s for s in every]
    return {
        (init, cohort, *s): Artefact(root / "embed" / "_".join([init, cohort, *s]))
        for init in ("random", "scratch")
        for cohort in ("home", "away")
        for s in subsets
    }


def test_contrasts_are_an_axis_and_the_same_people_stand_in_every_subset(tmp_path: Path):
    made, machine = of_three(tmp_path), Machine(store=tmp_path)

    def grid(**contrasts: object) -> sweep.Grid:
        return sweep.declare(machine, [sweep.Part(experiment(contrasts=contrasts), made, seen(tmp_path))])

    plain, both = grid(), grid(train=["all", ["T1w"]])
    assert {w.folder for w in plain.works} < {w.folder for w in both.works}
    assert len(both.works) == 2 * len(plain.works) == len({w.folder for w in both.works})
    assert both.folds == plain.folds and both.stamps == plain.stamps
    assert {w.cohort.features.name for w in both.works if w.cell.contrasts == ("T1w",)} == {
        "random_home_T1w",
        "scratch_home_T1w",
    }
    every = grid(test="all subsets")
    assert len(every.works) == len(plain.works)  # judged more often, not learnt more often
    assert not {w.folder for w in every.works} & {w.folder for w in plain.works}
    (one, *_) = every.works
    assert [c.contrasts for c in one.shown if c.name == "home"] == [
        *itertools.combinations(CHANNELS, 3),
        *itertools.combinations(CHANNELS, 2),
        *itertools.combinations(CHANNELS, 1),
    ]
    assert {c.name for c in one.shown} == {"home", "away"}
    assert one.shown[0].features == one.cohort.features  # all that is there is computed once
    moved = seen(tmp_path) | {("random", "away", "T2w"): Artefact(tmp_path / "embed" / "another")}
    again = sweep.declare(machine, [sweep.Part(experiment(contrasts={"test": "all subsets"}), made, moved)])
    changed = [a.folder != b.folder for a, b in zip(every.works, again.works, strict=True)]
    assert changed == [w.cell.init == "random" for w in every.works]
    assert grid(test=[["T2w", "T1w"]]).works[0].folder == grid(test=[["T1w", "T2w"]]).works[0].folder


def test_how_hidden_contrasts_are_filled_is_part_of_a_cell(tmp_path: Path):
    made, machine = of_three(tmp_path), Machine(store=tmp_path)
    base = experiment(init=["covariates"], contrasts={"test": [["T1w"]]})
    other = base.model_copy(update={"embed": base.embed.model_copy(update={"fill": "replicate"})})
    grids = [sweep.declare(machine, [sweep.Part(exp, made, {})]) for exp in (base, other)]
    assert [g.works[0].cell.fill for g in grids] == ["zero", "replicate"]
    assert not {w.folder for w in grids[0].works} & {w.folder for w in grids[1].works}


STACKS = ["contrasts", "neighbours", "both"]


def of_each(root: Path, exp: Experiment) -> list[sweep.Part]:
    """A shard set and features of each kind of stack; of `neighbours` some people lack T1w, or a session of it."""
    parts = []
    for stack in exp.stacks:
        made = sets(root / stack)
        for name, one in made.items():
            one = Artefact(one.path.rename(one.path.with_name(f"{name}-{stack}")))
            of = exp.of_stack(stack)
            store.commit(one.path, one.manifest() | {"channels": list(of.ingest.channels)})
            if stack == "neighbours" and name == "home":
                table = pd.read_parquet(one.path / "sessions.parquet")
                table.loc[table["subject"] == "07", "session"] = "2"
                table[~table["subject"].isin(["04", "05"])].to_parquet(one.path / "sessions.parquet")
            made[name] = one
        seen = {key: Artefact(root / stack / "_".join(key)) for key in features(root)}
        seen |= {(*key, "T1w"): Artefact(root / stack / "_".join([*key, "T1w"])) for key in features(root)}
        parts.append(sweep.Part(of, made, seen))
    return parts


def test_kinds_of_stack_are_an_axis_on_the_same_people(tmp_path: Path):
    exp = experiment(stack=STACKS, neighbours_of="T1w", contrasts={"train": ["all", ["T1w"]]})
    parts = of_each(tmp_path, exp)
    grid = sweep.declare(Machine(store=tmp_path), parts)
    of = Counter(work.cell.stack for work in grid.works)
    each = 2 * 2 * 3  # inits x fractions x folds
    assert of == {"contrasts": 2 * each, "neighbours": each, "both": 2 * each}  # one contrast has no subsets
    assert len({work.folder for work in grid.works}) == len(grid.works)
    assert all(f"-{work.cell.stack}-subject-" in work.cell.name for work in grid.works)
    (folds,) = grid.folds.values()
    assert set(folds) == {f"{i:02d}" for i in range(24)} - {"04", "05", "07"}
    people: dict[tuple[float, int], set[object]] = {}
    for work in grid.works:
        assert work.cohort.shard_set.name == f"home-{work.cell.stack}"
        labelled, test = (tuple(part["subject"]) for part in adapt.divided(work, folds))
        assert set(labelled) <= set(folds) and {folds[s] for s in test} == {work.cell.fold}
        people.setdefault((work.cell.label_fraction, work.cell.fold), set()).add((labelled, test))
    assert len(people) == 6 and all(len(same) == 1 for same in people.values())
    # A grid of two kinds that lack nobody shares its cells with a grid of one of them.
    alone = sweep.declare(Machine(store=tmp_path), parts[:1])
    two = sweep.declare(Machine(store=tmp_path), [parts[0], parts[2]])
    assert {w.folder for w in alone.works} < {w.folder for w in two.works}
    assert set(next(iter(two.folds.values()))) == {f"{i:02d}" for i in range(24)}


def test_every_kind_of_stack_passes_the_gate(tmp_path: Path):
    """Somebody of the third stack's corpus alone is in the test folds."""
    parts = of_each(tmp_path, experiment(stack=STACKS, neighbours_of="T1w"))
    assert sweep.assign(parts)[1] == ()
    ssl = shard_set(tmp_path / "other", "ssl", ["home1", "ssl1"])
    leaky = replace(parts[2], shard_sets={**parts[2].shard_sets, "ssl": ssl})
    with pytest.raises(UserError, match=r"head:ssl\+test"):
        sweep.assign([*parts[:2], leaky])


# ---- segmentation from the pixels -----------------------------------------------------------------------------------


def maps(root: Path, **decoder: object) -> sweep.Grid:
    """A grid of every way to learn a label map, on a cohort whose sessions all have one."""
    folder, tuned = root / "ingest" / "home-0", Machine(store=root)
    if not folder.exists():
        made = shard_set(root, "home", [f"home{i}" for i in range(12)])
        table = pd.read_parquet(folder / "sessions.parquet")
        table.assign(label_ml=json.dumps({"rim": 1.0})).to_parquet(folder / "sessions.parquet")
        manifest = {**made.manifest(), "classes": ["rim"]}
        (folder / store.MANIFEST).unlink()
        store.commit(folder, {name: value for name, value in manifest.items() if name != "schema"})
    task = {"task": "segmentation", "name": "rims", "cohort": "home", "classes": {"rim": ["rim"]}}
    exp = Experiment.model_validate(
        {
            "name": "maps",
            "ingest": {"cohorts": ["home"]},
            "adapt": {"tasks": [task], "decoder": decoder},
            "sweep": {
                "init": ["random", "cnn", "volumes"],
                "adaptation": ["linear", "conv", "lora", "finetune"],
                "label_fractions": [1.0],
                "folds": 2,
            },
        }
    )
    wanted = inventory.to_embed(exp)
    assert set(wanted) == {("random", "home", "linear"), ("random", "home", "conv")}
    made = {key: Artefact(root / "embed" / "_".join(key)) for key in wanted}
    files = {"home": segmenting.LabelFiles(root, {})}
    return sweep.declare(tuned, [sweep.Part(exp, {"home": Artefact(folder)}, made, files)])


def test_label_maps_are_learnt_on_tokens_and_from_pixels_side_by_side(tmp_path: Path):
    grid = maps(tmp_path)
    ways = Counter((work.cell.init, work.cell.adaptation) for work in grid.works)
    assert ways == {("random", way): 2 for way in ("linear", "conv", "lora", "finetune")} | {
        ("cnn", "finetune"): 2
    }
    for work in grid.works:
        assert isinstance(work, segmenting.Work)
        frozen = work.cell.adaptation in ("linear", "conv")
        assert (work.start is None) == (work.cohort.tokens is not None) == frozen
        assert work.cohort.shown.parent.name == ("embed" if frozen else "ingest")


@pytest.mark.parametrize(
    ("changed", "others"),
    [
        ({"tuned": {"lr": 3e-4}}, {"lora", "finetune"}),
        ({"steps": 7}, {"linear", "conv"}),
        ({"width": 32}, {"linear", "conv", "lora", "finetune"}),
    ],
)
def test_settings_of_pixels_name_no_cell_on_tokens_nor_the_other_way_round(tmp_path: Path, changed, others):
    names = [{work.folder.name: work for work in maps(tmp_path, **spec).works} for spec in ({}, changed)]
    new = {names[1][name].cell.adaptation for name in names[1].keys() - names[0].keys()}
    assert new == others and len(names[0]) == len(names[1])
