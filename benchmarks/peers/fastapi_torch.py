"""Plain FastAPI with torch, as its documentation writes an upload: `uvicorn fastapi_torch:app`.

`async def`, which is faster here than the thread pool of `def`: there is one core and the work is the processor's.
"""

import io

import numpy as np
from fastapi import FastAPI, UploadFile
from model import answer, load, predict
from PIL import Image

app = FastAPI()
network = load()


@app.post("/predict")
async def predict_one(file: UploadFile) -> dict[str, object]:
    image = np.array(Image.open(io.BytesIO(await file.read())).convert("L"))
    return answer(predict(network, image[None])[0])
