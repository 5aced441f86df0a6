"""`cranium <verb> <file.yaml> [key=value ...] [--json] [--debug]`: one door, every option a config key.

Imports of the stages are inside functions: `--help` and `check` answer at once, without torch and Ray. Exit codes are a
contract: 0 all done, 1 our failure, 2 usage or config, 3 some inputs were rejected or could not be had (the rest is
done), 130 and 143 on SIGINT and SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cranium import config, reading
from cranium.config import UserError
from cranium.ending import Outcome, finish
from cranium.target import labels_exist, parted, read_target

if TYPE_CHECKING:
    from cranium.study import Study

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ray-distributed experiments on self-supervised brain MRI. The verbs stand in the order data flows.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage or config, 3 some inputs were rejected, 130/143 stopped.",
)
Yaml = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="an experiment, or the card of a cohort")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="a config key, or store= raw.COHORT= address= ..."),
]
Json = Annotated[bool, typer.Option("--json", help="print one last line of JSON")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
BENCHES = ("stream", "ingest", "embed", "pretrain", "step", "sweep", "track")


# ---- verbs ----------------------------------------------------------------------------------------------------------


def _staged(
    verb: str, path: Path, settings: list[str] | None, as_json: bool, debug: bool, **more: Any
) -> None:
    def work() -> Outcome:
        from rich.console import Console

        from cranium import cluster, flow
        from cranium.study import Study

        target = read_target(path, settings)
        log = cluster.new_log(target.machine.store)
        started = time.monotonic()
        with cluster.quiet(log) as terminal:
            console = Console(file=terminal.out, highlight=False)
            study = Study(target.exp, target.machine, target.cards, console)
            try:
                with cluster.hold():
                    getattr(flow, verb)(study, **more)
            except BaseException:
                traceback.print_exc()  # into the log
                raise
            finally:
                _farewell(study, log, time.monotonic() - started)
        facts = {"name": target.exp.name, "made": study.made, "notes": study.notes, "log": str(log)}
        return Outcome(study.exit_code, {**facts, "missing": study.missing, "seconds": study.seconds})

    finish(verb, work, as_json, debug)


def _farewell(study: Study, log: Path, seconds: float) -> None:
    say = study.console.print
    if len(study.seconds) > 1:
        say("where the time went")
        for name, spent in sorted(study.seconds.items(), key=lambda item: -item[1]):
            say(f"  {name:<28} {spent:8.1f} s")
        say(f"  {'all':<28} {seconds:8.1f} s")
    for what, why in study.missing.items():
        say(f"could not be had: {what}: {why}", soft_wrap=True)
    for note in study.notes:
        say(f"note: {note}", soft_wrap=True)
    for name, page in study.made.items():
        if name.startswith("health ") and Path(page).is_file():
            say(f"{name}: {page}", soft_wrap=True)
    if report := study.made.get("report"):
        say(f"report: {report}", soft_wrap=True)
    say(f"log:    {log}", soft_wrap=True)


@app.command()
def demo(
    file: Yaml = Path("experiments/demo.yaml"),
    settings: Settings = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the demo cohorts from real heads."""
    _staged("demo", file, settings, json, debug)


@app.command()
def ingest(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """Scans -> shards of slice stacks."""
    _staged("ingest", file, settings, json, debug)


@app.command()
def pretrain(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """DINOv2 distillation on the stacks.

    replay=FILE does the step again that a capture of this run tells of, and says where it stops being finite.
    """
    told = [Path(s.removeprefix("replay=")) for s in settings or () if s.startswith("replay=")]
    rest = [s for s in settings or () if not s.startswith("replay=")]
    if told:
        _staged("replay", file, rest, json, debug, capture=told[-1])
    else:
        _staged("pretrain", file, rest, json, debug)


@app.command()
def embed(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """Frozen backbones over every stack, once."""
    _staged("embed", file, settings, json, debug)


@app.command()
def sweep(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """The missing cells of the declared grid."""
    _staged("sweep", file, settings, json, debug)


@app.command()
def report(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """One page: tables, figures, what is missing."""
    _staged("report", file, settings, json, debug)


@app.command()
def run(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """All of the above; what is done is skipped."""
    _staged("run", file, settings, json, debug)


SUBMITTED = ("demo", "ingest", "pretrain", "embed", "sweep", "report", "run", "resume", "verify", "show")


@app.command()
def submit(
    verb: Annotated[str, typer.Argument(help=", ".join(SUBMITTED))],
    file: Yaml,
    settings: Settings = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The same, as a job on a running cluster.

    Say where with address=http://HEAD:8265.
    """

    def work() -> Outcome:
        if verb not in SUBMITTED:
            raise UserError("USAGE", f"`{verb}` can't be submitted; one of {', '.join(SUBMITTED)}")
        from cranium import jobs

        return jobs.submit(verb, read_target(file, settings))

    finish("submit", work, json, debug)


@app.command()
def status(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """What is done, and the jobs at address=."""

    def work() -> Outcome:
        from cranium import cluster, inventory, jobs

        target = read_target(file, settings)
        found = inventory.status(target.exp, target.machine)
        for stage, name, state in found:
            print(f"{stage:<9} {name:<48} {state}")
        if not found:
            print(f"nothing of {target.exp.name} is made yet in {target.machine.store}")
        known = []
        if target.machine.address:
            known = cluster.jobs(jobs.address_of(target.machine), f"{cluster.OURS}{target.exp.name}-")
            for job in known:
                print(
                    f"job       {job.id:<48} {job.status.lower()} {'' if job.exit_code is None else job.exit_code}"
                )
        made = [{"stage": stage, "name": name, "state": state} for stage, name, state in found]
        return Outcome(0, {"made": made, "jobs": [vars(job) for job in known]})

    finish("status", work, json, debug)


@app.command()
def logs(
    job: Annotated[
        str, typer.Argument(help="the id `submit` printed, or the experiment's YAML for its last job")
    ],
    settings: Settings = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The log of a job, followed while it runs."""

    def work() -> Outcome:
        from cranium import jobs

        address, job_id = jobs.named(job, settings)
        return jobs.follow(address, job_id)

    finish("logs", work, json, debug)


@app.command()
def stop(
    job: Annotated[
        str, typer.Argument(help="the id `submit` printed, or the experiment's YAML for its last job")
    ],
    settings: Settings = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """End a job; `resume` goes on from there."""

    def work() -> Outcome:
        from cranium import cluster, jobs

        address, job_id = jobs.named(job, settings)
        ended = cluster.stop(address, job_id)
        print(f"{job_id} {ended.status.lower()}")
        return Outcome(0 if ended.status in cluster.ENDED else 1, {"job": job_id, "status": ended.status})

    finish("stop", work, json, debug)


@app.command()
def resume(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """Go on with `run`, here or as a job; other settings than before are refused."""
    address = next((s.removeprefix("address=") for s in settings or () if s.startswith("address=")), "")
    if (address or os.environ.get("CRANIUM_ADDRESS", "")).startswith("http"):
        from cranium import jobs

        finish("resume", lambda: jobs.submit("resume", read_target(file, settings)), json, debug)
    else:
        _staged("resume", file, settings, json, debug)


@app.command()
def check(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE.yaml]...", help="default: every YAML")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Validate every YAML, in seconds."""

    def work() -> Outcome:
        root = reading.share(Path.cwd() / "any.yaml")
        paths = files or [
            path
            for folder in ("datasets", "experiments")
            for path in sorted((root / folder).rglob("*.yaml"))
            if path.parent.name != "base"  # read with the experiments that stand on them
        ]
        problems: list[str] = []
        unverified: list[str] = []
        for path in paths:
            try:
                target = read_target(path, [])
                labels_exist(target)
                card = target.cards.get(path.stem)
                unverified += [f"{path.stem}: {what}" for what in card.unverified] if card else []
            except UserError as error:
                problems.append(str(error))
        for problem in problems:
            print(f"error CONFIG: {problem}", file=sys.stderr)
        if unverified:
            print("not verified by a public source:\n  " + "\n  ".join(sorted(set(unverified))))
        print(f"{len(paths)} files checked, {len(problems)} with errors")
        return Outcome(
            2 if problems else 0, {"files": len(paths), "errors": problems, "unverified": unverified}
        )

    finish("check", work, json, debug)


@app.command()
def show(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """The resolved config, hash, paths and cost."""

    def work() -> Outcome:
        from cranium import costs

        target = read_target(file, settings)
        exp, machine = target.exp, target.machine
        print(config.to_yaml(exp))
        cost = costs.estimate(exp)
        facts = {
            "hash": config.fingerprint(exp),
            "store": str(machine.store),
            "tracking": machine.tracking,
            **cost,
        }
        for key, value in facts.items():
            print(f"# {key}: {value}")
        return Outcome(0, facts)

    finish("show", work, json, debug)


Verified = Annotated[
    Path,
    typer.Argument(metavar="FILE.yaml|FOLDER", help="an experiment, a card, or the folder of one shard set"),
]


@app.command()
def verify(file: Verified, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """Read every shard again: is it still as it was written?"""

    def work() -> Outcome:
        from rich.console import Console

        from cranium import flow, inventory
        from cranium.store import Artefact

        if file.is_dir():
            sets = [Artefact(file.absolute())]
        else:
            target = read_target(file, settings)
            sets = inventory.shard_sets(target.exp, target.machine)
            if not sets:
                raise UserError(
                    "NOT_INGESTED", f"no cohort of {target.exp.name} is ingested; run `cranium ingest {file}`"
                )
        found = flow.verify(sets, Console(highlight=False))
        problems = [(name, problem) for name, listed in found.items() for problem in listed]
        for name, p in problems:
            kind = "note" if p.code == "SHARD_UNKNOWN" else "error"
            print(f"{kind} {p.code}: {name}/{p.file} {p.message}; {p.mend}", file=sys.stderr)
        bad = any(problem.code != "SHARD_UNKNOWN" for _, problem in problems)
        listed = [{"set": name, **vars(problem)} for name, problem in problems]
        return Outcome(1 if bad else 0, {"sets": list(found), "problems": listed})

    finish("verify", work, json, debug)


@app.command()
def export(
    what: Annotated[str, typer.Argument(metavar="FILE.yaml|run:ID", help="the experiment, or a run")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="init= stack= out= name= size= licence= store= ..."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A pretrained backbone as plain timm loads it."""

    def work() -> Outcome:
        from cranium import export as stage
        from cranium.study import Study

        own = [s for s in settings or () if s.partition("=")[0] in stage.Spec.model_fields]
        rest = [s for s in settings or () if s not in own]
        spec = reading.validated(stage.Spec, reading.nested(own), "export")
        if what.startswith("run:"):
            from cranium import checkpoint

            if others := [s for s in rest if not reading.is_machine_key(s)]:
                raise UserError("USAGE", f"{', '.join(others)}: a run has its settings already")
            machine = reading.load_machine(rest)
            made = checkpoint.find_run(machine.store, what, machine.tracking)
        else:
            from rich.console import Console

            from cranium import inventory

            target = read_target(Path(what), rest)
            study = Study(target.exp, target.machine, target.cards, Console(stderr=True))
            made = inventory.pretraining(study, spec.init, spec.stack)
        exported = stage.export(made, spec)
        print(f"{exported.weights}  SHA-256 {exported.sha256}\n{exported.card}  how to use it")
        facts = {"weights": str(exported.weights), "card": str(exported.card), "sha256": exported.sha256}
        return Outcome(0, facts)

    finish("export", work, json, debug)


@app.command()
def predict(
    run: Annotated[
        str, typer.Argument(metavar="CELL", help="a finished cell: its folder's name, or the hex at its end")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="scan.T1w=FILE mask=FILE, or session=DIR, or bids=DIR card=; out= weights= store=",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Class probabilities, or a label map, of scans nobody has labelled."""

    def work() -> Outcome:
        from rich.console import Console

        from cranium import finished_cell, new_scans
        from cranium import predict as stage
        from cranium.study import bar

        facts, own = parted(settings or ())
        spec = reading.validated(new_scans.Spec, reading.nested(own), "predict")
        machine = reading.load_machine(facts)
        made = finished_cell.find(machine.store, run)
        with bar(Console(stderr=True), "predict") as tell:
            done, refused = stage.predict(machine, made, spec, tell)
        stage.show(made, done, refused, spec, Console(highlight=False))
        files = [str(one.path) for one in done]
        left_out = [f"{one.subject} {one.session}".strip() for one in refused]
        return Outcome(3 if refused else 0, {"run": made.cell.path.name, "made": files, "left_out": left_out})

    finish("predict", work, json, debug)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="|".join(BENCHES), help="which")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="rows= rounds= data= out= ...")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a stage against its limits; out=FILE.json keeps the numbers."""

    def work() -> Outcome:
        from cranium import bench, cluster

        if what not in BENCHES:
            raise UserError("USAGE", f"`{what}` has no benchmark; one of {', '.join(BENCHES)}")
        stage: Any = importlib.import_module(f"cranium.bench_{what}")
        spec = reading.validated(stage.Spec, reading.nested(settings or ()), f"bench {what}")
        with cluster.quiet(spec.data / f"{what}.log") as terminal:
            result = stage.run(spec, lambda text: print(text, file=terminal.out, flush=True))
        print(bench.table(result))
        if spec.out:
            bench.keep(result, spec.out)
        return Outcome(0, result.plain())

    finish("bench", work, json, debug)


@app.command()
def forget(file: Yaml, settings: Settings = None, json: Json = False, debug: Debug = False) -> None:
    """Take one subject out of the store: subject=ID.

    In an experiment of several cohorts: subject=COHORT/ID. Shards, features, predictions and pages that hold the
    subject are rewritten or removed, weights that have seen it are marked. The way back is the raw files.
    """

    def work() -> Outcome:
        from cranium import forget as stage

        told = [s.removeprefix("subject=") for s in settings or () if s.startswith("subject=")]
        target = read_target(file, [s for s in settings or () if not s.startswith("subject=")])
        cohort, subject = _subject(told, list(target.cards))
        done = stage.forget(target.machine, cohort, subject, lambda text: print(text, flush=True))
        print(f"forgotten: a subject of {cohort} ({done.lines} lines of logs, {done.runs} runs of MLflow)")
        left = stage.traces(target.machine, cohort, subject)
        for path in left:
            print(f"still named in {target.machine.store / path}: look, and remove it by hand")
        return Outcome(0, {**vars(done), "cohort": cohort, "still_named_in": left})

    finish("forget", work, json, debug)


@app.command()
def track(
    what: Annotated[str, typer.Argument(metavar="sync|move", help="send again, or bring over")],
    source: Annotated[str, typer.Argument(metavar="FILE.yaml|URI", help="an experiment, or an MLflow store")],
    settings: Settings = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Mend MLflow: `sync FILE.yaml` what it lost, `move sqlite:////store/mlflow.db tracking_uri=http://HOST:5000`."""
    if what == "sync":
        _staged("sync", Path(source), settings, json, debug)
        return

    def work() -> Outcome:
        from rich.console import Console

        from cranium import track_move
        from cranium.study import bar
        from cranium.track import TrackingError

        machine = reading.load_machine(settings or ())
        if what != "move" or machine.tracking_uri in (None, source):
            raise UserError(
                "USAGE",
                "give `track sync FILE.yaml`, or `track move URI tracking_uri=URI` of two MLflow stores",
            )
        try:
            with bar(Console(highlight=False), "move") as tell:
                counts = track_move.move(source, machine.tracking, tell)
        except TrackingError as error:
            raise UserError("TRACKING", f"{error}; the same command goes on from here", 1) from error
        print(f"{counts['moved']} runs moved to {machine.tracking}, {counts['there']} were there already")
        return Outcome(0, counts)

    finish("track", work, json, debug)


def _subject(told: list[str], cohorts: list[str]) -> tuple[str, str]:
    """Cohort and id of `subject=ID` or `subject=COHORT/ID`."""
    cohort, slash, subject = told[0].partition("/") if len(told) == 1 else ("", "", "")
    if not slash and len(cohorts) == 1:
        cohort, subject = cohorts[0], cohort
    if not subject or cohort not in cohorts:
        raise UserError(
            "USAGE", f"who? give subject=ID, or subject=COHORT/ID with one of {', '.join(cohorts)}"
        )
    return cohort, subject


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script. Usage errors end in one line and exit code 2."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        code = app(
            args=list(sys.argv[1:] if arguments is None else arguments) or ["--help"],
            prog_name="cranium",
            standalone_mode=False,
        )
    except BrokenPipeError:  # `cranium show x.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    except Exception as error:
        explain = getattr(error, "format_message", None)  # typer's usage errors
        if explain is None:
            raise
        print(f"error USAGE: {' '.join(explain().split())}; see `cranium --help`", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
