"""Make a standard model directory: out of a gguf file, or a tiny random one (needs torch)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.errors import ModelError

TINY_VOCABULARY = 1024
TINY_END = "<|end|>"
TINY_SEED = 0


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise a gguf file into fp32 safetensors with its tokenizer and chat template.

    Without `GgufConfig(dequantize=True)` the model counts as quantised: no saving, no training.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(source.parent), source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            str(source),
            found=f"{type(error).__name__}: {error}",
            expected="a gguf file of an architecture that transformers can read",
            remedy="type model.path=DIRECTORY with a safetensors model",
        ) from error
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


def build_tiny(texts: Sequence[str], target: Path) -> None:
    """A Llama of 2 layers, 64 wide, with random seeded weights and a BPE trained on `texts`.

    At most 1,024 tokens; byte-level, so every text can be encoded. It learns seven classes within
    seconds on one core, which is what tests need of it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = _save_tiny_tokenizer(texts, target)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = LlamaForCausalLM(config)
    model.save_pretrained(str(target))


def _save_tiny_tokenizer(texts: Sequence[str], target: Path) -> int:
    """Train and save the tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=[TINY_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TINY_END,
        pad_token=TINY_END,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(target))
    return int(tokenizer.get_vocab_size())
