"""BentoML with torch, as its documentation writes a service that takes an image: `bentoml serve bento:Digits`."""

import bentoml
import numpy as np
from model import answer, load, predict
from PIL.Image import Image


@bentoml.service(workers=1)
class Digits:
    def __init__(self) -> None:
        self.network = load()

    @bentoml.api
    def predict(self, file: Image) -> dict[str, object]:
        return answer(predict(self.network, np.array(file.convert("L"))[None])[0])
