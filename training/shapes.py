"""A model's parameters from its config.json alone: every tensor's name and shape (pure).

No weights and no torch, so a model that is not here can be planned for. Names are those that
transformers gives, so what is counted here is what a checkpoint's header lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conf.errors import ModelError

Shapes = dict[str, tuple[int, ...]]

# Families whose block is attention and a gated MLP between norms, under the names of Llama.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "smollm3")
FAMILIES = (*LLAMA_LIKE, "gpt2")
# transformers writes a configuration whole, but hubs hold older ones that leave out what was the
# default of its class.
TIED_BY_DEFAULT = ("gemma", "gemma2", "gpt2", "smollm3")
HEAD_DIM_BY_DEFAULT = {"qwen3": 128, "gemma": 256, "gemma2": 256}


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelSize:
    """Sizes of a model.

    linear_shapes: path of a linear layer, not the head -> (out, in). query, key: width of all heads
    of queries, and of keys (or values). feed_forward: width of the MLP. is_gated: the MLP has a
    gate. norms: norms of a block over the hidden width. has_qk_norms: queries and keys are
    normalised. family: model_type of config.json. max_length: tokens, if the configuration says.
    """

    num_parameters: int
    num_layers: int
    hidden: int
    vocabulary: int
    linear_shapes: Mapping[str, tuple[int, int]]
    heads: int
    query: int
    key: int
    feed_forward: int
    is_gated: bool
    norms: int
    has_qk_norms: bool
    is_tied: bool
    family: str
    max_length: int | None

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest linear layer, the head or the embedding included."""
        layers = [math.prod(shape) for shape in self.linear_shapes.values()]
        return max([*layers, self.vocabulary * self.hidden])

    @property
    def body(self) -> int:
        """Weights that every token is multiplied by: those of the linear layers but the head."""
        return sum(math.prod(shape) for shape in self.linear_shapes.values())


def size_of(config: Mapping[str, Any], shapes: Shapes | None = None) -> ModelSize:
    """The sizes of a model from its config.json.

    Args:
        config: the content of config.json.
        shapes: all tensors by name, from a checkpoint's headers; None: worked out here.

    Raises:
        ModelError: a family that is not known here and no shapes, or a missing count.
    """
    text: Mapping[str, Any] = config.get("text_config", config)
    family = str(text.get("model_type", "llama"))
    is_tied = bool(text.get("tie_word_embeddings", family in TIED_BY_DEFAULT))
    if shapes is None:
        shapes = parameter_shapes(text, family=family, is_tied=is_tied)
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head", default=max(1, hidden // 64))
    head_dim = _head_dim(text, family, heads=heads)
    return ModelSize(
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_layers=_number(text, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        vocabulary=_number(text, "vocab_size"),
        linear_shapes=dict(_linear(shapes, is_transposed=family == "gpt2")),
        heads=heads,
        query=heads * head_dim,
        key=int(text.get("num_key_value_heads") or heads) * head_dim,
        feed_forward=_feed_forward(text, hidden),
        is_gated=family != "gpt2",
        norms=4 if family == "gemma2" else 2,
        has_qk_norms=family == "qwen3",
        is_tied=is_tied,
        family=family,
        max_length=text.get("max_position_embeddings") or text.get("n_positions"),
    )


def parameter_shapes(config: Mapping[str, Any], *, family: str, is_tied: bool) -> Shapes:
    """Every parameter of a causal language model by name; a tied head is not listed.

    Raises:
        ModelError: a family that is not one of FAMILIES.
    """
    if family not in FAMILIES:
        raise ModelError(
            "config.json: model_type",
            found=family,
            expected=f"a family whose sizes are known here: {', '.join(FAMILIES)}",
            remedy="download the model first (python -m launch.prefetch): with its weights here "
            "any family is planned from their headers",
        )
    return _gpt2(config) if family == "gpt2" else _llama(config, family, is_tied=is_tied)


def _llama(config: Mapping[str, Any], family: str, *, is_tied: bool) -> Shapes:
    hidden = _number(config, "hidden_size")
    vocabulary = _number(config, "vocab_size")
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(_number(config, "num_hidden_layers")):
        for name, shape in _llama_block(config, family).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not is_tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _llama_block(config: Mapping[str, Any], family: str) -> Shapes:
    """Parameters of one block; biases and extra norms are what the families differ in."""
    hidden = _number(config, "hidden_size")
    inner = _number(config, "intermediate_size")
    heads = _number(config, "num_attention_heads")
    head_dim = _head_dim(config, family, heads=heads)
    query, key = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
    if family == "phi3":  # products that share their input are one layer
        linear = {
            "self_attn.qkv_proj": (query + 2 * key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    else:
        linear = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    shapes: Shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    for name in _biased(config, family):
        if name in linear:
            shapes[f"{name}.bias"] = (linear[name][0],)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes |= {f"{name}.weight": (hidden,) for name in norms}
    if family == "qwen3":
        shapes |= {f"self_attn.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def _biased(config: Mapping[str, Any], family: str) -> Iterator[str]:
    """Linear layers that add a bias."""
    if family == "qwen2":  # queries, keys and values always
        yield from (f"self_attn.{name}_proj" for name in "qkv")
    elif config.get("attention_bias") and family != "mistral":
        yield from (f"self_attn.{name}_proj" for name in "qkvo")
    if config.get("mlp_bias"):
        yield from (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    hidden = _number(config, "n_embd")
    inner = _feed_forward(config, hidden)
    block = {
        "ln_1": (hidden,),
        "attn.c_attn": (hidden, 3 * hidden),  # Conv1D keeps (in, out)
        "attn.c_proj": (hidden, hidden),
        "ln_2": (hidden,),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    shapes: Shapes = {
        "transformer.wte.weight": (_number(config, "vocab_size"), hidden),
        "transformer.wpe.weight": (_number(config, "n_positions"), hidden),
    }
    for layer in range(_number(config, "n_layer")):
        for name, shape in block.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = shape
            shapes[f"transformer.h.{layer}.{name}.bias"] = (shape[-1],)
    return shapes | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


def _linear(shapes: Shapes, *, is_transposed: bool) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linear layers as (out, in), the embeddings and the head left out."""
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2 and not is_vocabulary_layer(name):
            first, second = shape
            yield (
                name.removesuffix(".weight"),
                (second, first)
                if is_transposed
                else (
                    first,
                    second,
                ),
            )


def is_vocabulary_layer(name: str) -> bool:
    """Whether a 2-D weight is an embedding or the head, by the names transformers gives them."""
    return any(word in name for word in ("embed", "lm_head", "wte", "wpe", "embd"))


def _head_dim(config: Mapping[str, Any], family: str, *, heads: int) -> int:
    given = config.get("head_dim") or HEAD_DIM_BY_DEFAULT.get(family)
    return int(given or _number(config, "hidden_size", "n_embd", "d_model") // heads)


def _feed_forward(config: Mapping[str, Any], hidden: int) -> int:
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    return int(inner)


def _number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of several names that the configuration has: families differ in them."""
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    if default is not None:
        return default
    raise ModelError("config.json", found=f"no {names[0]}", expected=f"{names[0]}: a count")
