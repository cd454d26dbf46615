"""A fine-tune as a model of transformers, rebuilt while it loads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nps_compress.errors import CheckpointError, InvalidArgumentError, NpsError
from nps_compress.lazy import LazyTensor, LazyTensors

_OURS = ("state_dict", "gguf_file", "subfolder", "variant")  # which file the weights are in


def from_pretrained(
    base: str | Path, task: str | Path, *, model_class: Any = None, **hf_kwargs: Any
) -> Any:
    """The fine-tune as an ordinary model of transformers, in eval mode.

    It equals bit for bit what transformers loads from the unpacked checkpoint with the same
    arguments. Every tensor is rebuilt when the loader wants it, before anything is renamed,
    merged, sharded, cast or quantised; its digest is checked, and the one over all of them where
    the model takes them all. Nothing is written but two small files, for the time it takes.

    base: a folder, a ``.safetensors`` file, or a Hub id in the local cache. task: a ``.nps`` file.
    model_class: a class of transformers, or one of its Auto classes; by default the architecture
    that the fine-tune's config.json names. hf_kwargs: what ``from_pretrained`` of transformers
    takes: ``dtype``, ``device_map``, ``quantization_config``, ``distributed_config``, attributes
    of the config.

    Raises:
        CheckpointError: the base can't be read, or transformers can't load what is in the files
        with these arguments. FormatError: the task is damaged. BaseMismatchError: it is of another
        base. InvalidArgumentError: no such task, or an argument that names other weights.
    """
    for name in _OURS:
        if hf_kwargs.get(name) is not None:
            raise InvalidArgumentError(name, hf_kwargs[name], "left out: the task says it")
    with LazyTensors(base, task) as tensors:
        try:
            model = load(tensors, tensors.side_files, task, model_class, **hf_kwargs)
        except NpsError as error:
            if tensors.error and error is not tensors.error:  # the loader made it another one
                raise tensors.error from None
            raise
        tensors.check_content()
    return model


def load(
    tensors: Mapping[str, LazyTensor],
    side_files: Mapping[str, bytes],
    source: Path | str,
    model_class: Any = None,
    **hf_kwargs: Any,
) -> Any:
    """A model of transformers from a checkpoint that need not be on disk.

    tensors: by their names in it; side_files: at least config.json; source: what it is called.

    Raises:
        CheckpointError: transformers can't load it. What reading a tensor raises.
    """
    with tempfile.TemporaryDirectory(prefix="nps-compress-") as name:
        folder = Path(name)
        if "config.json" not in side_files:
            raise CheckpointError(
                source, "holds no config.json, so that no model can be made of it"
            )
        (folder / "config.json").write_bytes(side_files["config.json"])
        if "generation_config.json" in side_files:
            path = folder / "generation_config.json"
            path.write_bytes(side_files["generation_config.json"])
        try:
            return _load(tensors, folder, source, model_class, hf_kwargs)
        except NpsError:
            raise
        except Exception as error:  # transformers raises whatever the files or arguments lead to
            line = " ".join(str(error).split())[:500] or type(error).__name__
            raise CheckpointError(source, f"can't be loaded by transformers ({line})") from error


def _load(
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    source: Path | str,
    model_class: Any,
    hf_kwargs: dict[str, Any],
) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    kwargs = dict(hf_kwargs)
    config = kwargs.pop("config", None)
    # What the loader wants and the config would take for its own.
    held = {
        k: kwargs.pop(k) for k in ("dtype", "torch_dtype", "quantization_config") if k in kwargs
    }
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = AutoConfig.from_pretrained(
            config or folder, return_unused_kwargs=True, **kwargs
        )
    found = _class_of(config, model_class, source).from_pretrained(
        None, config=config, state_dict=dict(tensors), **held, **kwargs
    )
    model = found[0] if isinstance(found, tuple) else found  # output_loading_info
    model.config.name_or_path = model.name_or_path = str(source)
    if model.can_generate() and "generation_config" not in kwargs:
        model.generation_config = _generation_config(folder)
    return found


def _class_of(config: Any, model_class: Any, source: Path | str) -> Any:
    import transformers

    if model_class is None:
        name = str((config.architectures or ["none"])[0])
        model_class = getattr(transformers, name, None)
        if not isinstance(model_class, type) or not issubclass(
            model_class, transformers.PreTrainedModel
        ):
            raise CheckpointError(
                source, f"names the architecture {name!r}, which transformers has not"
            )
        return model_class
    mapping = getattr(model_class, "_model_mapping", None)  # of an Auto class
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        raise CheckpointError(
            source, f"is a {config.model_type}, of which {model_class.__name__} has none"
        )
    found = mapping[type(config)]
    if not isinstance(found, tuple | list):
        return found
    known = {each.__name__: each for each in found}
    return next((known[n] for n in config.architectures or () if n in known), found[0])


def _generation_config(folder: Path) -> Any:
    """As transformers finds it in a folder."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


# Of a config: names, versions and labels, and what only training, a head's loss or text generation
# reads. The rest says what a model computes.
_NOT_THE_MODEL = frozenset(
    (
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "finetuning_task", "id2label", "label2id", "num_labels"),
        *("problem_type", "task_specific_params", "use_cache", "vocab_size"),
    )
)


def parsed_config(side_files: Mapping[str, bytes], source: Path | str) -> Mapping[str, Any] | None:
    """The object in config.json, None where there is none. Raises CheckpointError: not JSON."""
    if "config.json" not in side_files:
        return None
    try:
        config = json.loads(side_files["config.json"])
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(source, f"has no JSON in config.json ({error})") from None
    return config


def config_difference(
    model: Any, config: Mapping[str, Any], ignored: Collection[str] = ()
) -> str | None:
    """Why a fine-tune's config.json is not of a model in memory: None where it may be.

    model: of transformers, else there is nothing to compare; config: as parsed from JSON;
    ignored: keys that may differ beside those that never say what a model computes.
    """
    own = getattr(model, "config", None)
    if own is None or not hasattr(own, "to_diff_dict"):
        return None
    name, names = type(model).__name__, config.get("architectures")
    if names and (not isinstance(names, list) or name not in names):
        shown = names[0] if isinstance(names, list) else names
        return f"its architecture is {shown}, the model's {name}"
    if config.get("model_type") != own.model_type:
        return f"its model_type is {config.get('model_type')!r}, the model's {own.model_type!r}"
    try:
        wanted = type(own).from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers raises whatever a broken config leads to
        return f"its config.json can't be read ({' '.join(str(error).split())[:300]})"
    ignored = {*_NOT_THE_MODEL, *ignored}
    if not name.endswith("ForSequenceClassification"):  # those look for padding
        ignored.add("pad_token_id")
    return _first_difference(wanted, own.to_dict(), ignored)


def _first_difference(
    wanted: Mapping[str, Any], found: Mapping[str, Any], ignored: set[str]
) -> str | None:
    for key in sorted((wanted.keys() | found.keys()) - ignored, key=str):
        ours, others = wanted.get(key), found.get(key)
        if isinstance(ours, Mapping) and isinstance(others, Mapping):
            inner = _first_difference(ours, others, ignored)
            if inner:
                return inner
        elif ours != others:
            return f"its {key} is {ours!r:.100}, the model's {others!r:.100}"
    return None
