"""Create a random DiffusionGemma small enough for a laptop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune.io.atomic import atomic_directory
from canvastune.io.json_text import write_json
from canvastune.tiny_model.tokenizer import IMAGE_TOKENS, learn_tokenizer, make_tokenizer

if TYPE_CHECKING:
    from transformers import DiffusionGemmaForBlockDiffusion, GemmaTokenizer
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
    )

# What a processor of text and images reads; vLLM builds one even for text only.
_PROCESSOR_FILE = "processor_config.json"
_IMAGE_LENGTH = 70  # tokens of an image: the smallest number that the processor takes
# Tokens: rows of prose, and their answers, are longer than those of word problems.
_PROSE_WINDOW, _PROSE_ANSWER = 96, 64


def make_tiny_model(folder: Path, seed: int = 0, text: Iterable[str] | None = None) -> None:
    """Write a DiffusionGemma checkpoint in the Hub's layout.

    The 26B model's architecture, 1.6 M random float32 weights.

    The same seed gives the same weights. Only the Hub's files are written, and none on failure.

    Args:
        text: what the tokenizer learns its words from, for longer rows than the word problems;
            None: it knows the words of the problems.

    Raises:
        UserError: `folder` exists and is not empty.
    """
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    tokenizer = make_tokenizer() if text is None else learn_tokenizer(text)
    tree = _config_tree(tokenizer)
    if text is not None:
        tree["text_config"]["sliding_window"] = _PROSE_WINDOW
    config = DiffusionGemmaConfig(**tree)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(config).float()
    _condition_attention(model)
    model.generation_config = _generation_config(tokenizer)
    if text is not None:
        model.generation_config.max_new_tokens = _PROSE_ANSWER
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial, max_shard_size="2MB")
        tokenizer.save_pretrained(partial)
        write_json(partial / _PROCESSOR_FILE, _processor_tree())
        # save_pretrained rewrites the keys of the full-attention layers in a form that other tools
        # cannot read
        about = {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "dtype": "float32",
            "model_type": "diffusion_gemma",
        }
        write_json(partial / "config.json", about | tree)


def _config_tree(tokenizer: GemmaTokenizer) -> dict[str, Any]:
    """Return `config.json` as in the Hub's checkpoint.

    Every dimension of a matrix is a multiple of 8.
    """
    boi, image, eoi = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    return {
        "canvas_length": 16,
        "boi_token_id": boi,
        "eoi_token_id": eoi,
        "image_token_id": image,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "sliding_window": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_global_key_value_heads": 1,
            "global_head_dim": 64,
            "attention_k_eq_v": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "max_position_embeddings": 4096,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": "vision",
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1_000_000.0,
                },
            },
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "max_position_embeddings": 256,
            "standardize": True,
        },
    }


def _processor_tree() -> dict[str, Any]:
    """Return `processor_config.json` for the vision tower of `_config_tree`.

    The model has no audio, but stock transformers builds the processor only with a feature
    extractor.
    """
    patches = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": _IMAGE_LENGTH}
    return {
        "processor_class": "Gemma4Processor",
        "image_seq_length": _IMAGE_LENGTH,
        "image_processor": {"image_processor_type": "Gemma4ImageProcessor", **patches},
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor", **patches},
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    }


def _generation_config(tokenizer: GemmaTokenizer) -> DiffusionGemmaGenerationConfig:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    return DiffusionGemmaGenerationConfig(
        max_new_tokens=32,
        max_denoising_steps=16,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.2,  # below the released model's 0.4 to 0.8: arithmetic has one right answer
        t_max=0.4,
        stability_threshold=1,
        confidence_threshold=0.005,
        bos_token_id=2,
        eos_token_id=[1, *tokenizer.convert_tokens_to_ids(["<turn|>", "<|tool_response>"])],
        pad_token_id=0,
    )


def _condition_attention(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Put 1/sqrt(head_dim), which attention does not apply, into `q_norm`.

    Without it float32 noise reaches 3e-3.
    """
    for layer in model.model.decoder.layers:  # tied: the encoder's norms are the same tensors
        norm = layer.self_attn.q_norm.weight.data
        norm.fill_(norm.numel() ** -0.5)
