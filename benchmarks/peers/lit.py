"""LitServe with torch, as its documentation writes a multipart API: `python lit.py PORT MAX_BATCH_SIZE`."""

import sys
from typing import Any

import litserve
import numpy as np
from fastapi import Request
from model import answer, load, predict
from numpy.typing import NDArray
from PIL import Image

BATCH = int(sys.argv[2])


class Digits(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = load()

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        return np.array(Image.open(request["file"].file).convert("L"))

    def predict(self, images: NDArray[np.uint8]) -> Any:
        """One image, or with batching an array of them."""
        return predict(self.network, images) if BATCH > 1 else predict(self.network, images[None])[0]

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, object]:
        return answer(output)


if __name__ == "__main__":
    api = Digits(max_batch_size=BATCH, batch_timeout=0.005) if BATCH > 1 else Digits()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
