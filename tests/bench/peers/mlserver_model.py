"""MLServer's model class for MODEL.onnx; the folder beside it is written by the benchmark. Run by the peer's interpreter."""

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Digits(MLModel):
    async def load(self):
        self.session = ort.InferenceSession(self.settings.parameters.uri, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        latents = NumpyCodec.decode_input(payload.inputs[0])
        pixels = self.session.run(["pixels"], {"latents": latents})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("pixels", pixels)])
