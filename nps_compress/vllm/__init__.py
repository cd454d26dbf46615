"""The vLLM plugin: one task from the start, switched at run time, or chosen by each request.

vLLM finds :func:`register` by its entry point in every process that it starts. arguments.py says
what to start it with, launch.py starts it, stream.py rebuilds tensors as vLLM reads them, turns.py
says whose requests run: none of these needs vLLM. loader.py is ``--load-format nps``,
transfer.py the weight transfer engine ``nps``, routing.py, which is experimental, serves each
request by the task it names.
"""

from __future__ import annotations

import functools
import logging


@functools.cache
def register() -> None:
    """Make ``nps`` known to vLLM, once a process; a vLLM that lacks a seam is left without it."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.model_executor.model_loader import register_model_loader

        from nps_compress.vllm.loader import NPSModelLoader
    except ImportError as error:
        logging.getLogger(__name__).warning("this vLLM can't load .nps tasks: %s", error)
        return
    register_model_loader("nps")(NPSModelLoader)
    transfer = "nps_compress.vllm.transfer", "NPSWeightTransferEngine"
    WeightTransferEngineFactory.register_engine("nps", *transfer)
