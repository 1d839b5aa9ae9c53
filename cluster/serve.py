"""Serve a detector over HTTP with Ray Serve (pip install "ray[serve]"): POST an image, get its detections as JSON.

    serve run --app-dir cluster serve:app checkpoint=$PWD/runs/head_r18/student score=0.3
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

The checkpoint is anything that headkd_ray.load takes: an absolute path or a URI. A replica answers one request after another.
"""

from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import headkd_ray
from headkd_ray.data.images import decode


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1, "num_gpus": 0})
class Detector:
    """A replica: a process with the detector."""

    def __init__(self, checkpoint: str, score: float) -> None:
        self.predictor, self.score = headkd_ray.load(checkpoint), score

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            pixels = decode(await request.body(), self.predictor.reading)
        except ValueError as error:
            return JSONResponse({"error": f"the image cannot be read: {error}"}, status_code=400)
        found = self.predictor.detect(pixels).above(self.score)
        rows = zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        size = {"height": found.size[0], "width": found.size[1]}
        return JSONResponse({**size, "detections": [{"class": name, "score": score, "box": box} for name, score, box in rows]})


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from the command's ``key=value`` arguments."""
    return Detector.bind(arguments["checkpoint"], float(arguments.get("score", 0.3)))
