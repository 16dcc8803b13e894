# transformers 5.24.0 (also 5.23.0), Gemma4Processor, which DiffusionGemma uses too, with a tokenizer that has no audio tokens.
# Expected: a text without audio is processed: the processor reads the audio tokens with getattr(..., None), so they may be missing, and
# the check of validate_inputs is about audio inputs.
# Seen: "ValueError: Audio inputs were provided, but the tokenizer does not have an `audio_token` defined." for a text without audio: the condition
# is `audio is not None and A or B or C`, in which `and` binds tighter. So `transformers serve` fails on each request.
# Our tiny model's tokenizer has the audio tokens (canvastune/tiny_model.py); `canvastune serve --backend transformers` looks for them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'transformers==5.24.0' 'torch==2.13.0' 'torchvision==0.28.0' pillow
"$folder/venv/bin/python" - <<'EOF' || {
import sys

import torch

if torch.version.cuda is None:  # PyPI's torchvision is built for CUDA, and registers no operators then
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GemmaTokenizer,
)

print("transformers", transformers.__version__)
IMAGE = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
AUDIO = {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"}


def read(named):
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *IMAGE.values(), *AUDIO.values(), "▁", "a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=named)
    parts = (Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(), tokenizer, Gemma4VideoProcessor())
    try:
        return Gemma4Processor(*parts)(text=["a a"])["input_ids"]
    except ValueError as error:
        return f"ValueError: {error}"


with_audio, without = read(IMAGE | AUDIO), read(IMAGE)
print("a text, the tokenizer names audio tokens:", with_audio)
print("a text, it names none:", without)
sys.exit(0 if not isinstance(with_audio, str) and "Audio inputs were provided" in str(without) else 1)
EOF
    echo "changed: texts are processed without audio tokens"
    exit 1
}
