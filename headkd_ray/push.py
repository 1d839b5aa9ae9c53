"""Push a checkpoint to the Hugging Face Hub: ``python -m headkd_ray.push runs/head/student owner/name --license apache-2.0``.

It uploads model.safetensors, model.json and a model card (README.md) made from the run: classes, AP, data fingerprints, and the
job with the paths in it. Files of these names in the repository are replaced; its history keeps them. Then hf://owner/name is a
checkpoint for evaluate, predict and teacher.checkpoint.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from headkd_ray import __version__, hub
from headkd_ray.cli import command_parser, user_errors
from headkd_ray.detectors.hf_models import CONFIG, PROCESSOR
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.detectors.weights.native import CARD, WEIGHTS
from headkd_ray.engine.files import read_json
from headkd_ray.engine.run import JOB_FILE, finished
from headkd_ray.errors import CheckpointError, StorageError
from headkd_ray.report.model_card import model_card
from headkd_ray.storage import Folder
from headkd_ray.text import printable

README = "README.md"


def repository_files(checkpoint: str, repository: str, licence: str | None = None) -> dict[str, bytes]:
    """Return the files of a model repository with this checkpoint: model.json, model.safetensors and README.md.

    A detector of transformers also has those that transformers reads.

    Args:
        checkpoint: folder or URI of a checkpoint of headkd_ray, as a run's ``student`` folder.
        repository: ``owner/name``, which the model card mentions.

    Raises:
        CheckpointError: it is missing, damaged or not a checkpoint of headkd_ray.
    """
    folder = Folder.open(checkpoint, CheckpointError)
    missing = [name for name in (WEIGHTS, CARD) if not folder.has(name)]
    if missing:
        raise CheckpointError(
            f"{checkpoint}: {' and '.join(missing)} missing; only a checkpoint of headkd_ray can be pushed, as a run's "
            "student folder"
        )
    fetch_detector(checkpoint)  # raises if the files are damaged or do not belong together
    files = {name: folder.read(name) for name in (WEIGHTS, CARD, CONFIG, PROCESSOR) if folder.has(name)}
    model = json.loads(files[CARD])
    job, data = _run_of(folder, model.get("meta", {}))
    files[README] = model_card(repository, model, job, data, licence).encode()
    return files


def _run_of(checkpoint: Folder, meta: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return the job and the data fingerprints of the run in whose folder the checkpoint is; None and {} if it is in none."""
    place = checkpoint
    for _ in range(3):  # RUN/student, RUN/checkpoints/step_00000001/student
        if "/" not in place.path.strip("/"):
            break
        place, _ = Folder.of_file(place.address)
        if not place.has(JOB_FILE):
            continue
        job = read_json(place, JOB_FILE, StorageError, "restore it, or push a copy of the checkpoint's folder")
        if not isinstance(job.get("run"), dict) or job["run"].get("name") != meta.get("run"):
            break
        return job, (finished(place) or {}).get("data", {})
    return None, {}


def write_folder(files: dict[str, bytes], out: str) -> None:
    """Write the files into a folder or URI. Raises StorageError if it has other files of these names."""
    folder = Folder.open(out)
    folder.check_writable()
    other = [name for name, content in files.items() if folder.has(name) and folder.read(name) != content]
    if other:
        raise StorageError([f"{folder.named(name)}: is there with other content; choose another --to-folder" for name in other])
    folder.create()
    for name, content in files.items():
        folder.write(name, content)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("push", __doc__)
    parser.add_argument("checkpoint", help="student folder of a run (folder or URI)")
    parser.add_argument("repository", metavar="OWNER/NAME", help="model repository on the hub; created if need be")
    parser.add_argument("--license", help="the hub's identifier of a licence, for the card (apache-2.0, cc-by-4.0, other, ...)")
    parser.add_argument(
        "--private",
        action="store_true",
        help="create a private repository, and push to no public one (default: as your account does)",
    )
    parser.add_argument(
        "--to-folder", metavar="DIR", help="write the files into this folder, to look at them, and upload nothing"
    )
    with user_errors():
        options = parser.parse_args(arguments)
        repository = options.repository.removeprefix(hub.SCHEME)
        if not hub.is_repository(repository):
            parser.error(f"{repository}: is not the name of a repository; write owner/name")
        if options.to_folder is None:
            hub.check_token()
        files = repository_files(options.checkpoint, repository, options.license)
        if options.license is None:
            print("note: the model card names no licence; --license says what others may do with the model", file=sys.stderr)
        if options.to_folder is not None:
            write_folder(files, options.to_folder)
            print(f"wrote {', '.join(files)} into {printable(options.to_folder)}")
        else:
            url = hub.upload(repository, files, f"Push a checkpoint with headkd_ray {__version__}", options.private)
            print(f"pushed {', '.join(files)}: {printable(url)}")
            print(f"use it: python -m headkd_ray.predict hf://{repository} IMAGES --out found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
