"""The same command as a job on a running cluster: sent, followed, found again."""

from __future__ import annotations

from pathlib import Path

from cranium import cluster, config, reading
from cranium.config import Machine, UserError
from cranium.ending import Outcome
from cranium.target import Target, read_target


def submit(verb: str, target: Target) -> Outcome:
    """Send a verb on an experiment to the cluster at its address, or find it there, and follow it."""
    machine = target.machine
    address = address_of(machine)
    given = machine.model_fields_set - {"address", "raw"}  # defaults are those of the nodes
    if "store" not in given and not cluster.python_here(address):
        raise UserError(
            "NO_STORE", f"the cluster at {address} is elsewhere: give store=, a folder that its nodes share"
        )
    facts = machine.model_dump(mode="json", include=given | {"store"}, exclude_none=True)
    arguments = ["experiment.yaml", *(f"{key}={value}" for key, value in facts.items())]
    arguments += [f"raw.{cohort}={folder.absolute()}" for cohort, folder in machine.raw.items()]
    files = {
        f"cranium/share/datasets/{name}.yaml": config.to_yaml(card) for name, card in target.cards.items()
    }
    files["experiment.yaml"] = config.to_yaml(target.exp)
    key = config.fingerprint({"exp": target.exp, "cards": target.cards, "store": machine.store})
    job, fresh = cluster.submit(address, target.exp.name, verb, key, [*arguments, "--json"], files)
    print(
        f"{'submitted' if fresh else 'already under way:'} {job.id}  (Ctrl-C leaves it running)", flush=True
    )
    return follow(address, job.id)


def follow(address: str, job_id: str) -> Outcome:
    """Print the log of a job until it ends; its exit code is the outcome's."""
    try:
        job = cluster.follow(address, job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(
            f"left {job_id} running; `cranium logs {job_id} address={address}` follows it, `cranium stop` ends it"
        )
        raise
    code = job.exit_code if job.exit_code is not None else 143 if job.status == "STOPPED" else 1
    code = 128 - code if code < 0 else code  # killed by a signal: as a shell says it
    if job.exit_code is None and job.status == "FAILED":
        raise UserError("JOB", f"{job_id} failed before its command began: {job.message}", 1)
    print(f"{job_id} {job.status.lower()} with exit code {code}")
    return Outcome(code, {"job": job_id, "status": job.status})


def address_of(machine: Machine) -> str:
    """Where jobs are taken. Raises `UserError(NO_ADDRESS)` when nobody said."""
    if not machine.address:
        raise UserError("NO_ADDRESS", "which cluster? give address=http://HEAD:8265 or set CRANIUM_ADDRESS")
    return machine.address


def named(name: str, settings: list[str] | None) -> tuple[str, str]:
    """(address, id) of a job: by its id, or the last one of an experiment's YAML."""
    if not name.endswith(".yaml"):
        return address_of(reading.load_machine(settings or ())), name
    target = read_target(Path(name), settings)
    address = address_of(target.machine)
    jobs = cluster.jobs(address, f"{cluster.OURS}{target.exp.name}-")
    if not jobs:
        raise UserError(
            "NO_JOB", f"{address} has no job of {target.exp.name}; `cranium submit run {name}` makes one"
        )
    return address, max(jobs, key=lambda j: j.started).id
