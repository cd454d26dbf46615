"""``quantization_config=NPSConfig(task)``: a fine-tune by transformers' own ``from_pretrained``.

Importing this module registers the method ``nps`` with transformers; nothing else here does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nps_compress.checkpoint import open_checkpoint
from nps_compress.errors import CheckpointError, InvalidArgumentError, NpsError
from nps_compress.format.layout import Op
from nps_compress.lazy import LazyTensors
from nps_compress.pretrained import config_difference, parsed_config

_METHOD = "nps"
_INSTEAD = "use nps_compress.from_pretrained"


@register_quantization_config(_METHOD)
class NPSConfig(QuantizationConfigMixin):
    """Makes ``from_pretrained`` of transformers load a fine-tune from its base.

    >>> config = NPSConfig("law.nps")
    >>> AutoModelForCausalLM.from_pretrained("base/", quantization_config=config)  # doctest: +SKIP

    The model is an ordinary one: nothing in it is quantised, and it saves as any other. For one
    process, and for fine-tunes with the base's config and tensors; all others, tensor parallelism
    and a quantiser on top need :func:`nps_compress.from_pretrained`. Each weight is read twice.

    task: a ``.nps`` file.
    """

    def __init__(self, task: str | Path, **_: Any) -> None:
        self.quant_method: Any = _METHOD
        self.task = str(task)


class _Rebuild(ConversionOps):
    """Replaces a weight that was read from the base by the fine-tune's.

    What was read is not used: it may have been cast already. An error waits until the model is
    whole, since transformers would hide it here.
    """

    def __init__(self, tensors: LazyTensors, dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        given = input_dict[target_patterns[0]][0]
        dtype = given.dtype
        if dtype == self._dtype:  # not what the model keeps in another one
            dtype = model.state_dict()[name].dtype
        try:
            tensor = self._tensors[source_patterns[0]][...]
        except NpsError:  # kept by LazyTensors
            return {name: given}
        return {name: tensor.to(given.device, dtype)}


@register_quantizer(_METHOD)
class _NPSLoader(HfQuantizer):
    """What transformers calls while it loads."""

    requires_calibration = False

    def __init__(self, quantization_config: NPSConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._task = quantization_config.task
        self._tensors: LazyTensors | None = None
        self._op: _Rebuild | None = None

    def validate_environment(self, *_: Any, **kwargs: Any) -> None:
        """Refuse a base that names another method in its config."""
        if self.pre_quantized:
            raise CheckpointError(self._task, f"can't be put on a quantised base: {_INSTEAD}")

    def preprocess_model(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Open the task and see that it fits, before any weight is read."""
        super().preprocess_model(model, dtype=dtype, checkpoint_files=checkpoint_files, **kwargs)
        if not checkpoint_files:
            raise InvalidArgumentError("base", None, "a checkpoint with safetensors files")
        base = open_checkpoint(Path(checkpoint_files[0]).parent)
        self._tensors = LazyTensors(base, self._task)
        try:
            _check_fits(model, self._tensors, self._task)
        except BaseException:
            self._tensors.close()
            raise
        self._op = _Rebuild(self._tensors, dtype or torch.get_default_dtype())

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Every weight is rebuilt, so that all digests are checked."""
        return True

    def get_quantize_ops(self) -> ConversionOps:
        """What makes the fine-tune's weight of the base's."""
        assert self._op is not None
        return self._op

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Raise what a weight raised; else leave no trace in the model."""
        assert self._tensors is not None
        with self._tensors:
            if self._tensors.error:
                raise self._tensors.error
            self._tensors.check_content()
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """The model is saved as any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The model is trained as any other."""
        return True


def _check_fits(model: Any, tensors: LazyTensors, task: str) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = get_model_conversion_mapping(model, None, None)
    if any(isinstance(each, WeightConverter) for each in found):
        kind = type(model).__name__
        raise CheckpointError(task, f"{kind} merges tensors while it loads: {_INSTEAD}")
    for name in tensors:
        entry = tensors.task.entries[name]
        if entry.op is Op.NEW or tensors.task.base_tensor_name(name) != name:
            raise CheckpointError(
                task, f"tensor {name!r} is not one of the base's, of its shape: {_INSTEAD}"
            )
    missing = sorted(set(tensors.base.tensors) - set(tensors))
    if missing:
        raise CheckpointError(task, f"has no tensor {missing[0]!r} of the base's: {_INSTEAD}")
    config = parsed_config(tensors.side_files, task)
    known = ("quantization_config",)  # this one
    difference = config_difference(model, config, known) if config is not None else None
    if difference:
        raise CheckpointError(task, f"is of another model: {difference}; {_INSTEAD}")
