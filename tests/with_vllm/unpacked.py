"""Worker extension: linear layers keep their weights as parameters, so that checksums see them.

On a CPU vLLM repacks them into what no checksum covers.
"""

from __future__ import annotations

from vllm import _custom_ops
from vllm.model_executor.layers import utils

_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = lambda *shape: False


class Unpacked:
    """Nothing but what importing it does."""
