# TRL 1.16.0, chat_templates/diffusion_gemma.jinja (as shipped with google/diffusiongemma-26B-A4B-it), rendered by transformers
# 5.23.0.
# Expected: what add_generation_prompt=True renders is a prefix of the finished conversation, so that a model is asked for an
# answer after the same tokens that preceded it in training.
# Seen: after a tool response, the prompt ends with <tool_response|>, but the finished conversation has another <|turn>model
# between the response and the answer. gemma4_v5.jinja, of the same template family, has no such turn.
# Our code renders what comes before a learned turn as a prompt, and checks that: canvastune/preparation/chat_template.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'transformers==5.23.0' 'jinja2==3.1.6'
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/trl" 'trl==1.16.0' # the templates, without PyTorch
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder/trl/trl/chat_templates" <<'EOF' 2> "$folder/log" || {
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<bos>": 0}, unk_token="<bos>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>")


def render(messages, template="diffusion_gemma.jinja", **settings):
    text = open(f"{sys.argv[1]}/{template}").read()
    return tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **settings)

question = {"role": "user", "content": "Weather in Bonn?"}
call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
asks = {"role": "assistant", "tool_calls": [call]}
response = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
answer = {"role": "assistant", "content": "It rains."}

for template in ("diffusion_gemma.jinja", "gemma4_v5.jinja"):
    prompt = render([question, asks, response], template, add_generation_prompt=True)
    whole = render([question, asks, response, answer], template)
    print(template, "prompt ends  ", repr(prompt[-35:]))
    print(template, "whole ends   ", repr(whole[-50:]))
    print(template, "prompt is a prefix of whole up to the answer:", whole.startswith(prompt + "It rains."))
    sys.exit(1) if whole.startswith(prompt + "It rains.") != (template == "gemma4_v5.jinja") else None
EOF
    echo "changed: the prompt after a tool response is a prefix of the finished conversation ($(tail -n 1 "$folder/log"))"
    exit 1
}
