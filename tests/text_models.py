"""Small text models with random weights, and a tokenizer for them: folders as the transformers library writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = [f"word{index}" for index in range(60)]


def tokenizer() -> Any:
    """A word is a token; texts of a classifier begin with [CLS] and end with [SEP]."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=24
    )


def config(kind: str) -> Any:
    """BERT (for classes or answers), GPT-2 or Llama, two layers, 32 channels."""
    import transformers

    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=24, use_cache=False)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return transformers.LlamaConfig(vocab_size=64, max_position_embeddings=24, use_cache=False, **sizes)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = 2 if kind == "answers" else 3
    return transformers.BertConfig(vocab_size=64, max_position_embeddings=24, num_labels=labels, **sizes)


def model(name: str) -> Any:
    """One of the library's classes, in evaluation mode, its outputs large enough to tell predictions apart."""
    import transformers

    torch.manual_seed(0)
    kinds = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "BertForQuestionAnswering": "answers"}
    made = getattr(transformers, name)._from_config(config(kinds.get(name, "bert")), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return made


def folder(path: Path, name: str) -> Path:
    """A folder of a model with its weights and the tokenizer."""
    model(name).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def texts(count: int = 64) -> list[str]:
    """Between 1 and 12 words each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    return [" ".join(WORDS[index] for index in torch.randint(0, 60, (length,), generator=generator).tolist()) for length in lengths]
