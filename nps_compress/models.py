"""Which kind of model a folder holds, and loading it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nps_compress.adapters import (
    Causal,
    Clip,
    Image,
    Kind,
    LoadedModel,
    Seq2seq,
    Text,
    Token,
    quiet_transformers,
)
from nps_compress.errors import CheckpointError, NpsError
from nps_compress.images import CHANNELS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_BY_SUFFIX: dict[str, Kind] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForImageClassification": "image",
}
_WORDS_NEED_A_SPACE = ("bloom", "deberta", "gpt2", "longformer", "roberta")


def kind_of(folder: Path) -> Kind:
    """Which kind of model a folder holds, by the architecture that its config names.

    Raises:
        CheckpointError: none that a fitness can use.
    """
    return _kind(folder, load_config(folder))[0]


def load_config(folder: Path) -> Any:
    """What config.json of a folder says, as transformers reads it.

    Raises:
        CheckpointError: there is none, or it can't be read.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder)
    except Exception as error:  # as for load_model
        raise _not_loadable(folder, error) from error


def load_model(folder: Path) -> LoadedModel:
    """A model in float32 on the CPU, in eval mode, with what it needs to read examples.

    Raises:
        CheckpointError: the folder can't be loaded, or lacks a tokenizer.
    """
    config = load_config(folder)
    kind, model_class = _kind(folder, config)
    tokenizer = images = None
    try:
        with quiet_transformers():
            if model_class.main_input_name == "input_ids" or kind == "clip":
                tokenizer = _tokenizer(folder, kind, config)
            if model_class.main_input_name == "pixel_values" or kind == "clip":
                images = _image_processor(folder, config)
            model = model_class.from_pretrained(folder, dtype=torch.float32)
    except NpsError:
        raise
    except Exception as error:  # transformers raises whatever a broken folder leads to
        raise _not_loadable(folder, error) from error
    model.eval()
    if tokenizer is not None and kind != "clip":
        model.config.pad_token_id = tokenizer.pad_token_id
    if kind == "clip":
        return Clip(folder, kind, model, images, tokenizer)
    if kind == "token":
        return Token(folder, kind, model, tokenizer)
    if kind in ("causal", "seq2seq"):
        _make_greedy(model)
        return (Causal if kind == "causal" else Seq2seq)(folder, kind, model, tokenizer)
    if tokenizer is None:
        return Image(folder, kind, model, images)
    return Text(folder, kind, model, tokenizer)


def load_tokenizer(folder: Path, kind: Kind) -> Any:
    """The tokenizer of a folder, with a padding token.

    Raises:
        CheckpointError: there is none, or it can't be loaded.
    """
    config = load_config(folder)
    try:
        with quiet_transformers():
            return _tokenizer(folder, kind, config)
    except NpsError:
        raise
    except Exception as error:  # as for load_model
        raise _not_loadable(folder, error) from error


def by_file_name(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in a model's file, given those that it has in memory.

    transformers renames some while it loads (the layers of ViT) and puts others together; here
    that is undone, for the weights or for anything of their shapes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """A model's weights by their names in its file; writing to them changes the model.

    Those that were made of several others in a way that leaves no view of them are missing.
    """
    weights = model.state_dict()
    own = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    return {
        name: tensor
        for name, tensor in by_file_name(model, weights).items()
        if tensor.untyped_storage().data_ptr() in own
    }


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Whatever a model raises on its examples becomes a CheckpointError."""
    try:
        yield
    except NpsError:
        raise
    except Exception as error:  # out of memory, an embedding that lacks a token, and so on
        raise CheckpointError(folder, f"can't be run on the examples ({_line(error)})") from error


def _kind(folder: Path, config: Any) -> tuple[Kind, Any]:
    """-> the kind and the class of the architecture."""
    import transformers

    architecture = str((config.architectures or ["unknown"])[0])
    model_class = getattr(transformers, architecture, None)
    kind: Kind | None = None
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        decodes = bool(getattr(config, "is_encoder_decoder", False))
        kind = next((_BY_SUFFIX[s] for s in _BY_SUFFIX if architecture.endswith(s)), None)
        if architecture == "CLIPModel":
            kind = "clip"
        elif architecture.endswith("ForConditionalGeneration"):
            kind = "seq2seq" if decodes else None
        elif kind is None and (not decodes or architecture.endswith("EncoderModel")):
            kind = "encoder"
        if kind == "sequence" and config.num_labels == 1:
            kind = "regression"
        if getattr(config, "problem_type", None) == "multi_label_classification":
            kind = "encoder"  # there is no one class
        takes = model_class.main_input_name
        if takes != "input_ids" and (takes != "pixel_values" or kind not in ("image", "encoder")):
            kind = None
    if kind is None:
        raise CheckpointError(
            folder,
            f"is a {architecture}; a fitness needs a classifier, a language model or an encoder "
            "of texts or images that transformers knows",
        )
    return kind, model_class


def _tokenizer(folder: Path, kind: Kind, config: Any) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(folder, "holds no tokenizer")  # transformers would invent one
    options = {}
    if kind == "token" and config.model_type in _WORDS_NEED_A_SPACE:
        options = {"add_prefix_space": True}  # each word is tokenized as if in a text
    # False: refuse code of the folder's own, rather than ask on the terminal whether to run it.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    if kind == "token" and not tokenizer.is_fast:
        raise CheckpointError(folder, "has a tokenizer that doesn't tell pieces of words apart")
    if tokenizer.pad_token is None:  # any token will do: padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"  # positions then count from the first token of the text
    return tokenizer


def _image_processor(folder: Path, config: Any) -> Any:
    """The folder's own, on PIL so that it needs no torchvision; None where it has none."""
    from transformers import AutoImageProcessor

    config = getattr(config, "vision_config", config)
    if getattr(config, "num_channels", None) not in CHANNELS:
        raise CheckpointError(folder, "takes images that are neither grey nor in colour")
    if any((folder / f"{name}_config.json").exists() for name in ("preprocessor", "processor")):
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    if not getattr(config, "image_size", None):
        raise CheckpointError(folder, "has no preprocessor_config.json and names no image size")
    return None


def _make_greedy(model: Any) -> None:
    """Undo what the folder says about sampling and beams; what tokens end an answer stays."""
    settings = model.generation_config
    settings.do_sample, settings.num_beams = False, 1
    for name in ("temperature", "top_k", "top_p", "typical_p", "min_p", "max_length"):
        setattr(settings, name, None)


def _not_loadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(folder, f"can't be loaded by transformers ({_line(error)})")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
