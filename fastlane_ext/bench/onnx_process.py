"""The process of `onnx_runtime`: holds a session and runs it on request. Imports no torch.

    onnx_process.py FOLDER THREADS

FOLDER holds model.onnx and an .npy file for each input. Each line of standard input is a number of calls; the answer is
the seconds that they took. An empty line runs one call and writes y.npy. The end of the input ends the process.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Between calls, threads that spin would slow down the next contestant.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    inputs = {one.name: np.load(folder / f"{one.name}.npy") for one in session.get_inputs()}
    print(onnxruntime.__version__, flush=True)
    for line in sys.stdin:
        if not line.strip():
            np.save(folder / "y.npy", session.run(None, inputs)[0])
            print("saved", flush=True)
            continue
        start = time.perf_counter()
        for _ in range(int(line)):
            session.run(None, inputs)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
