"""KServe's Python SDK serving MODEL.onnx on PORT. Run by the peer's own interpreter."""

import sys

import onnxruntime as ort
from kserve import InferOutput, InferResponse, Model, ModelServer

name, path, port = sys.argv[1], sys.argv[2], int(sys.argv[3])


class Digits(Model):
    def __init__(self):
        super().__init__(name)
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        pixels = self.session.run(["pixels"], {"latents": payload.inputs[0].as_numpy()})[0]
        output = InferOutput(name="pixels", shape=list(pixels.shape), datatype="UINT8")
        output.set_data_from_numpy(pixels, binary_data=True)
        return InferResponse(response_id=payload.id or "", model_name=name, infer_outputs=[output])


if __name__ == "__main__":
    ModelServer(http_port=port + 1, grpc_port=port, enable_grpc=True, workers=1).start([Digits()])
