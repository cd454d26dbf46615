"""Shapes of public models by name, and how many parameters a LoRA of such shapes has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Shapes = Mapping[str, tuple[int, ...]]

# Embeddings, and the output layer, which PEFT's "all-linear" leaves out as well.
_NOT_ADAPTED = re.compile(
    r"embed|\bw[tp]e\b|\bshared\b|relative_attention_bias|lm_head", re.IGNORECASE
)
_POSITIONS, _TYPES = 512, 2  # of BERT


@dataclass(frozen=True)
class Model:
    """A model as its public ``config.json`` describes it; ``source`` is its Hub id."""

    source: str
    family: Literal["bert", "llama", "qwen2"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """Tensors of one layer, by their names in the checkpoint, [out, in] as torch has them."""
        hidden, wide = self.hidden, self.intermediate
        if self.family == "bert":
            at = f"encoder.layer.{number}."
            return {
                **_linear(at + "attention.self.query", hidden, hidden),
                **_linear(at + "attention.self.key", hidden, hidden),
                **_linear(at + "attention.self.value", hidden, hidden),
                **_linear(at + "attention.output.dense", hidden, hidden),
                **_norm(at + "attention.output.LayerNorm", hidden),
                **_linear(at + "intermediate.dense", wide, hidden),
                **_linear(at + "output.dense", hidden, wide),
                **_norm(at + "output.LayerNorm", hidden),
            }
        at = f"model.layers.{number}."
        narrow = hidden // self.heads * self.kv_heads
        biased = self.family == "qwen2"
        return {
            at + "input_layernorm.weight": (hidden,),
            **_linear(at + "self_attn.q_proj", hidden, hidden, biased),
            **_linear(at + "self_attn.k_proj", narrow, hidden, biased),
            **_linear(at + "self_attn.v_proj", narrow, hidden, biased),
            **_linear(at + "self_attn.o_proj", hidden, hidden, False),
            at + "post_attention_layernorm.weight": (hidden,),
            **_linear(at + "mlp.gate_proj", wide, hidden, False),
            **_linear(at + "mlp.up_proj", wide, hidden, False),
            **_linear(at + "mlp.down_proj", hidden, wide, False),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the checkpoint; a tied output layer is the embedding and not repeated."""
        hidden = self.hidden
        layers = {
            name: shape
            for number in range(self.layers)
            for name, shape in self.layer(number).items()
        }
        if self.family == "bert":
            return {
                "embeddings.word_embeddings.weight": (self.vocab, hidden),
                "embeddings.position_embeddings.weight": (_POSITIONS, hidden),
                "embeddings.token_type_embeddings.weight": (_TYPES, hidden),
                **_norm("embeddings.LayerNorm", hidden),
                **layers,
                **_linear("pooler.dense", hidden, hidden),
            }
        head = {} if self.tied else {"lm_head.weight": (self.vocab, hidden)}
        embedding = {"model.embed_tokens.weight": (self.vocab, hidden)}
        return {**embedding, **layers, "model.norm.weight": (hidden,), **head}


# From each model's config.json on the Hugging Face Hub.
MODELS = {
    "minilm": Model(
        "sentence-transformers/all-MiniLM-L6-v2", "bert", 384, 6, 12, 12, 1536, 30522, True
    ),
    "bert-base": Model("google-bert/bert-base-uncased", "bert", 768, 12, 12, 12, 3072, 30522, True),
    "qwen-0.5b": Model("Qwen/Qwen2.5-0.5B", "qwen2", 896, 24, 14, 2, 4864, 151936, True),
    "llama-1b": Model("meta-llama/Llama-3.2-1B", "llama", 2048, 16, 32, 8, 8192, 128256, True),
    "llama-8b": Model("meta-llama/Llama-3.1-8B", "llama", 4096, 32, 32, 8, 14336, 128256, False),
    "llama-70b": Model("meta-llama/Llama-3.1-70B", "llama", 8192, 80, 64, 8, 28672, 128256, False),
}


def parameters(shapes: Shapes) -> int:
    """Elements of all tensors."""
    return sum(map(math.prod, shapes.values()))


def lora_parameters(shapes: Shapes, rank: int) -> int:
    """Elements of a LoRA on every linear layer: rank x (in + out) for each 2-D weight that is
    neither an embedding nor the output layer (arXiv 2106.09685, section 4.1)."""
    return sum(
        rank * sum(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and not _NOT_ADAPTED.search(name)
    )


def _linear(
    name: str, outputs: int, inputs: int, biased: bool = True
) -> dict[str, tuple[int, ...]]:
    bias: dict[str, tuple[int, ...]] = {f"{name}.bias": (outputs,)} if biased else {}
    return {f"{name}.weight": (outputs, inputs), **bias}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
