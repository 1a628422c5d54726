"""What ONNX Runtime's static quantisation makes of a U-Net, beside its float32 and our int8.

    python tests/onnx_int8.py     writes nbs/results/onnxruntime.json

It needs onnx and onnxruntime, which the package does not. One thread, nothing compiled, calls in turns.
"""
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from hybridvae.bench import _Network, _processor_seconds, in_turns, unet_inputs
from hybridvae.core import load, provenance, write_json
from hybridvae.quantization import quantize
from hybridvae.records import results_folder
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

WEIGHTS, BATCH, ROUNDS = "cifar10-diffusevae", 16, 7


class Inputs(CalibrationDataReader):
    "Inputs of the U-Net at five timesteps, from which activations get their ranges."

    def __init__(self, unet, names):
        self.left = iter([dict(zip(names, map(torch.Tensor.numpy, inputs(unet, t)))) for t in range(0, 1_000, 200)])

    def get_next(self):
        return next(self.left, None)


def inputs(unet, t=500):
    return [value for value in unet_inputs(unet, BATCH, t) if value is not None]


def exported(unet, folder):
    "The U-Net as files of ONNX, in float32 and in int8, and the names of its inputs."
    files = [folder / f"{name}.onnx" for name in ("fp32", "prepared", "int8")]
    given = inputs(unet)
    names = [f"input{k}" for k in range(len(given))]
    torch.onnx.export(_Network(unet), tuple(given), files[0], input_names=names, opset_version=18, dynamo=False)
    quant_pre_process(files[0], files[1], skip_symbolic_shape=True)
    quantize_static(files[1], files[2], Inputs(unet, names), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    op_types_to_quantize=["Conv", "Gemm", "MatMul"])
    return {"ONNX Runtime, fp32": files[0], "ONNX Runtime, int8": files[2]}, names


def run(session, feed):
    return torch.from_numpy(session.run(None, feed)[0])


@torch.no_grad()
def measured(folder):
    "What the file of results holds."
    model, options = load(WEIGHTS), onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    files, names = exported(model.unet, folder)
    given, calls = inputs(model.unet), {}
    for name, file in files.items():
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        feed = dict(zip(names, map(torch.Tensor.numpy, given)))
        calls[name] = partial(run, session, feed)
    ours = {"fp32, not compiled": model, "int8, not compiled": quantize(model, n=4, steps=5)}
    for name, each in ours.items():
        calls[name] = partial(_Network(each.to(memory_format=torch.channels_last).unet), *given)
    exact, processor = calls["fp32, not compiled"](), _processor_seconds(calls, ROUNDS)
    rows = [{"name": name, "median": statistics.median(timing.seconds), "processor": processor[name],
             "error": ((calls[name]() - exact).norm() / exact.norm()).item(),
             **({"megabytes": files[name].stat().st_size / 1e6} if name in files else {})}
            for name, timing in in_turns(calls, ROUNDS, "cpu").items()]
    about = provenance("cpu")
    about["versions"] |= {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    return {"weights": WEIGHTS, "batch": BATCH, "rounds": ROUNDS, "load": os.getloadavg()[0], "rows": rows, **about}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        print(write_json(results_folder() / "onnxruntime.json", measured(Path(tmp))))
