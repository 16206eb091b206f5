"""What the two processes that hold the fusion worker's key may reach.

They read what participants made, so neither has a network, and neither opens the database, another
key, or the server's files. The opener reads its key and the store of files, and writes where it
opens them; the fusion worker reads what its job names, and writes in the job's folder.
`cofuse coordinator doctor` tries to break each of these.
"""

from pathlib import Path
from typing import Final

from coordinator.config import CoordinatorConfig
from coordinator.fuse_job import FuseJob
from coordinator.sealed import SENDERS, worker_folder
from protos.spec import RoundSpec
from trust import walls
from trust.landlock import MAKE_DEVICES, READ, WRITE
from trust.walls import Allowed, Wall

ROLES: Final = ("opener", "fusion worker")
SCRATCH: Final = "opened"
"""Of the worker's folder: where the opener looks at what it has opened."""
_PACKAGES: Final = ("coordinator", "fp8", "fusion", "protos", "trust")


def wall_of(role: str, config: CoordinatorConfig) -> Wall:
    """The wall of the opener, or of a fusion worker whose job names no file yet."""
    worker = worker_folder(config.tls.key)
    if role == "opener":
        return opener_wall(worker, config.data_dir / "artifacts")
    return fusion_wall(
        FuseJob(
            directory=config.data_dir / "jobs" / "doctor",
            round_id="doctor",
            pivot_name="doctor",
            spec=RoundSpec.model_construct(),
            pivot_files={},
            contributions={},
            reports={},
            prompts=None,
            evals=None,
            worker_folder=worker,
        )
    )


def opener_wall(worker: Path, artifacts: Path) -> Wall:
    """Args: worker: folder of the key. artifacts: of the files as they were sent."""
    opens = tuple((worker / name, READ | WRITE) for name in (SCRATCH, SENDERS))
    return _wall(((worker, READ), (artifacts, READ), *opens, *walls.devices()))


def fusion_wall(job: FuseJob) -> Wall:
    """The wall around the fusion worker of one job, and the runs that it starts."""
    sent = (*job.pivot_files.values(), *job.contributions.values(), *job.sealed.values())
    public = (path for path in (job.prompts, job.evals, job.pairs) if path is not None)
    keys: Allowed = ()
    if job.worker_folder is not None:
        keys = ((job.worker_folder, READ), (job.worker_folder / SENDERS, READ | WRITE))
    named = tuple((path, READ) for path in (*sent, *public))
    own = (job.directory, READ | WRITE)
    return _wall((own, *keys, *named, *walls.devices(gpus=True)))


def _wall(allowed: Allowed) -> Wall:
    return Wall(
        given_up=READ | WRITE | MAKE_DEVICES, allowed=(*allowed, *walls.programs(_PACKAGES))
    )
