"""llama-quantize for environments without it: `llama_quantize.py SOURCE TARGET KIND THREADS`.

The child process of `llama_quantiser`: llama.cpp ends the process on an error of its own. It calls llama.cpp's
function in PyPI's cyllama, which takes no importance matrix, and imports nothing of this project.
"""

import sys


def main(source: str, target: str, kind: str, threads: str) -> None:
    """Write `target`."""
    from cyllama.llama import llama_cpp
    from gguf import LlamaFileType

    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = int(LlamaFileType[f"MOSTLY_{kind}"]), int(threads)
    llama_cpp.model_quantize(source, target, params)


if __name__ == "__main__":
    main(*sys.argv[1:])
