# TRL 1.16.0, chat_templates/diffusion_gemma_training.jinja (the template of SFT with assistant_only_loss), rendered by
# transformers 5.23.0.
# Expected: the mask covers what the model has to write for a call to end. Generation stops at <turn|> and at <|tool_response>
# (TRL's own parser of the model's output closes a message at either one, and the released generation_config.json lists both as
# end of sequence), and the template itself writes <|tool_response> after a call without a response.
# Seen: <turn|> is in the mask, <|tool_response> is not, neither after a last call nor before a response. A model that is trained
# only on calls never learns to stop after one.
# Our code supervises this token: canvastune/preparation/chat_template.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'transformers==5.23.0' 'jinja2==3.1.6'
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/trl" 'trl==1.16.0' # the templates, without PyTorch
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder/trl/trl/chat_templates" <<'EOF' 2> "$folder/log" || {
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

marks = ["<bos>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
characters = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(alphabet))}, []))
characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
characters.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="<bos>", extra_special_tokens=marks[1:])

question = {"role": "user", "content": "Weather in Bonn?"}
call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
asks = {"role": "assistant", "tool_calls": [call]}
response = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
answer = {"role": "assistant", "content": "It rains."}

text = open(f"{sys.argv[1]}/diffusion_gemma_training.jinja").read()
masks = {}
for name, messages in {"call last": [question, asks], "whole": [question, asks, response, answer]}.items():
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [token for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    masks[name] = tokenizer.decode(learned)
    print(name, "rendered:", repr(tokenizer.decode(encoded["input_ids"])))
    print(name, "learned: ", repr(masks[name]))
good = "<turn|>" in masks["whole"] and "<tool_call|>" in masks["call last"]
sys.exit(0 if good and not any("<|tool_response>" in mask for mask in masks.values()) else 1)
EOF
    echo "changed: the token that ends a call is in the mask ($(tail -n 1 "$folder/log"))"
    exit 1
}
