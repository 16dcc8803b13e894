"""A tokenizer that is read without transformers is the one that transformers loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from canvastune.errors import UserError
from canvastune.preparation.chat_template import ChatEncoder
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.tokenizer import load_tokenizer, load_transformers_tokenizer
from canvastune.preparation.tokenizer_files import read_tokenizer
from pipelines.demo import SUPPORT_BASE
from tests.support.data_fixtures import THOUGHT, make_model

ROOT = Path(__file__).parents[2]
TEXTS = [
    "",
    " ",
    "  two blanks,  and a tab\t\n\n",
    "<bos><|turn>user\nHow many apples has Ann?<turn|>\n<|turn>model\n",
    "half a <|turn and <turn| > and <|channel>thought\n<channel|>",
    "e\u0301 \u00e9 \u6f22\u5b57 \U0001f642\u200d \u2581under\u2581score \ufeff \x00",
    "<unk><pad><eos><mask> #### 72 the and",
    "word " * 500,
]
Tree = dict[str, Any]
Edit = Callable[[Tree, Tree], None]  # of tokenizer_config.json and of tokenizer.json


def named(config: Tree, tokenizer: Tree) -> None:
    """As newer releases write it."""
    plain = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
    keys = [key for key in config if key.endswith("_token") and key not in plain]
    config["model_specific_special_tokens"] = {key: config.pop(key) for key in keys}
    config["processor_class"] = "Gemma4Processor"
    config["padding_side"] = "left"


def of_version_4(config: Tree, tokenizer: Tree) -> None:
    config["tokenizer_class"] = "GemmaTokenizerFast"


def padded(config: Tree, tokenizer: Tree) -> None:
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }


def without_a_post_processor(config: Tree, tokenizer: Tree) -> None:
    tokenizer["post_processor"] = None


def a_word_of_the_users(config: Tree, tokenizer: Tree) -> None:
    added = dict(tokenizer["added_tokens"][0], id=len(tokenizer["model"]["vocab"]))
    tokenizer["added_tokens"].append(added | {"content": "Ann has", "special": False})


SAME: list[Edit] = [named, of_version_4, without_a_post_processor, a_word_of_the_users]


def another_class(config: Tree, tokenizer: Tree) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"


def no_class(config: Tree, tokenizer: Tree) -> None:
    del config["tokenizer_class"]


def an_unknown_setting(config: Tree, tokenizer: Tree) -> None:
    config["split_special_tokens"] = True


def a_template_among_the_settings(config: Tree, tokenizer: Tree) -> None:
    config["chat_template"] = THOUGHT


def a_token_with_settings(config: Tree, tokenizer: Tree) -> None:
    config["eos_token"] = {"__type": "AddedToken", "content": "<eos>", "lstrip": True}


def a_named_token_that_is_missing(config: Tree, tokenizer: Tree) -> None:
    config["video_token"] = "<|video|>"


def an_extra_token_that_is_missing(config: Tree, tokenizer: Tree) -> None:
    config["extra_special_tokens"] = ["<|extra|>"]


def a_named_token_that_is_not_special(config: Tree, tokenizer: Tree) -> None:
    for token in tokenizer["added_tokens"]:
        if token["content"] == config["eos_token"]:
            token["special"] = False


def an_unnamed_mask(config: Tree, tokenizer: Tree) -> None:
    del config["mask_token"]


def added_tokens_among_the_settings(config: Tree, tokenizer: Tree) -> None:
    about = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {"8": {"content": "!", "special": False, **about}}


def no_normalizer(config: Tree, tokenizer: Tree) -> None:
    tokenizer["normalizer"] = None


def another_normalizer(config: Tree, tokenizer: Tree) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def another_pre_tokenizer(config: Tree, tokenizer: Tree) -> None:
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}


def another_decoder(config: Tree, tokenizer: Tree) -> None:
    tokenizer["decoder"] = {"type": "Fuse"}


def no_bytes(config: Tree, tokenizer: Tree) -> None:
    tokenizer["model"]["byte_fallback"] = False


def words_before_merges(config: Tree, tokenizer: Tree) -> None:
    tokenizer["model"]["ignore_merges"] = True


def marked_parts_of_words(config: Tree, tokenizer: Tree) -> None:
    tokenizer["model"]["continuing_subword_prefix"] = "##"  # tokenizers' Rust code panics


def merges_as_text(config: Tree, tokenizer: Tree) -> None:
    tokenizer["model"]["merges"] = [" ".join(each) for each in tokenizer["model"]["merges"]]


def a_specific_token_without_the_usual_ending(config: Tree, tokenizer: Tree) -> None:
    named(config, tokenizer)
    config["model_specific_special_tokens"]["other"] = "<|new|>"


def numbered_specific_tokens(config: Tree, tokenizer: Tree) -> None:
    named(config, tokenizer)
    config["model_specific_special_tokens"]["tool_token_0"] = config.pop("tool_token_0")


def specific_tokens_beside_named_ones(config: Tree, tokenizer: Tree) -> None:
    config["model_specific_special_tokens"] = {"think_token": "<mask>"}


def a_usual_token_among_the_specific_ones(config: Tree, tokenizer: Tree) -> None:
    named(config, tokenizer)
    config["model_specific_special_tokens"]["mask_token"] = "<eos>"


OTHER: list[Edit] = [
    *(another_class, no_class, an_unknown_setting, a_template_among_the_settings),
    *(a_token_with_settings, a_named_token_that_is_missing, an_extra_token_that_is_missing),
    *(a_named_token_that_is_not_special, an_unnamed_mask, added_tokens_among_the_settings),
    *(no_normalizer, another_normalizer, another_pre_tokenizer, another_decoder, no_bytes),
    *(words_before_merges, marked_parts_of_words, merges_as_text, padded),
    *(a_specific_token_without_the_usual_ending, numbered_specific_tokens),
    *(specific_tokens_beside_named_ones, a_usual_token_among_the_specific_ones),
]


def of_transformers(model: Path) -> ChatTokenizer:
    return ChatTokenizer.of(load_transformers_tokenizer(model))


def assert_same(found: ChatTokenizer, expected: ChatTokenizer) -> None:
    assert found.template == expected.template
    assert dict(found.special_tokens) == dict(expected.special_tokens)
    assert found.class_name == expected.class_name
    assert {name: found.id_of(name) for name in ("pad", "bos", "eos", "unk")} == {
        name: expected.id_of(name) for name in ("pad", "bos", "eos", "unk")
    }
    assert found.added_tokens == expected.added_tokens
    assert found.backend.get_vocab() == expected.backend.get_vocab()
    tokens = expected.encode(TEXTS)
    assert found.encode(TEXTS) == tokens
    assert [found.decode(each) for each in tokens] == [expected.decode(each) for each in tokens]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Edit], Path]:
    """The shipped base for support answers, without weights and with changed files."""
    model = tmp_path / "model"
    shutil.copytree(SUPPORT_BASE, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] += 8  # room for tokens that an edit adds
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def edit(change: Edit) -> Path:
        files = [model / "tokenizer_config.json", model / "tokenizer.json"]
        trees = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        change(*trees)
        for file, tree in zip(files, trees, strict=True):
            file.write_text(json.dumps(tree), encoding="utf-8")
        return model

    return edit


def assert_read_here(model: Path) -> ChatTokenizer:
    found = read_tokenizer(model)
    assert found is not None, "only transformers can read this one"
    assert_same(found, of_transformers(model))
    return found


@pytest.mark.parametrize("base", ["support_base", "tiny_base"])
def test_a_shipped_base_is_read_as_transformers_reads_it(base: str) -> None:
    model = ROOT / "pipelines" / base
    found = assert_read_here(model)
    assert found.backend.to_str() == of_transformers(model).backend.to_str()


def test_what_is_made_here_is_read_as_transformers_reads_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    for model in (tiny_model, make_model(tmp_path / "model", THOUGHT)):
        assert_read_here(model)


@pytest.mark.parametrize("edit", SAME)
def test_other_forms_are_read_as_transformers_reads_them(
    edited: Callable[[Edit], Path], edit: Edit
) -> None:
    assert_read_here(edited(edit))


@pytest.mark.parametrize("edit", OTHER)
def test_of_what_needs_judgment_transformers_is_asked(
    edited: Callable[[Edit], Path], edit: Edit
) -> None:
    model = edited(edit)
    assert read_tokenizer(model) is None
    assert_same(load_tokenizer(model).tokenizer, of_transformers(model))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("special_tokens_map.json", '{"eos_token": "<turn|>"}'),
        ("added_tokens.json", '{"<|more|>": 700}'),
        ("chat_template.json", '{"chat_template": "other"}'),
        ("additional_chat_templates/tool_use.jinja", "{{ messages }}"),
    ],
)
def test_of_other_files_with_tokens_or_templates_transformers_is_asked(
    edited: Callable[[Edit], Path], file: str, text: str
) -> None:
    model = edited(lambda config, tokenizer: None)
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(text, encoding="utf-8")
    assert read_tokenizer(model) is None


def test_two_templates_and_none_of_them_the_default_are_refused(
    edited: Callable[[Edit], Path],
) -> None:
    model = edited(lambda config, tokenizer: None)
    (model / "chat_template.jinja").unlink()
    (model / "additional_chat_templates").mkdir()
    for name in ("one", "two"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="template") as refused:
        load_tokenizer(model)
    assert str(model) in str(refused.value)
    with pytest.raises(UserError, match="template"):
        load_transformers_tokenizer(model)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("padding_side", "up", "the tokenizer cannot be loaded"),
        ("truncation_side", None, "the tokenizer cannot be loaded"),
        ("tokenizer_class", "CanineTokenizer", "tokenizer_class is CanineTokenizer"),
        ("tokenizer_class", "ByT5Tokenizer", "tokenizer_class is ByT5Tokenizer"),
    ],
)
def test_settings_that_transformers_refuses_are_refused(
    edited: Callable[[Edit], Path], setting: str, value: Any, message: str
) -> None:
    model = edited(lambda config, tokenizer: config.update({setting: value}))
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(model)
    assert str(model) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"eos_token_id": []}, r"text_config\.eos_token_id of config.json is \[\]"),
        ({"eos_token_id": [5]}, r"text_config\.eos_token_id of config.json is \[5\]"),
        ({"eos_token_id": [None]}, "cannot be read"),
        ({"pad_token_id": "1"}, "cannot be read"),
        ({"vocab_size": None}, "cannot be read"),
        ({"layer_types": ["other"]}, "cannot be read"),
    ],
)
def test_values_of_a_config_that_transformers_refuses_are_refused(
    edited: Callable[[Edit], Path], text: Tree, message: str
) -> None:
    model = edited(lambda config, tokenizer: None)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= text
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(model)
    assert str(model) in str(refused.value)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{%- macro a() -%}{{ a() }}{%- endmacro -%}{{ a() }}"]
)
def test_a_template_that_fails_in_any_way_is_named(
    edited: Callable[[Edit], Path], template: str
) -> None:
    model = edited(lambda config, tokenizer: None)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(UserError, match="the chat template cannot render"):
        ChatEncoder(load_tokenizer(model).tokenizer, str(model))


def test_preparation_imports_neither_pytorch_nor_models(tmp_path: Path, problems: Path) -> None:
    code = (
        "import sys; from pipelines.cli import main\n"
        f"code = main(['prepare', {str(ROOT / 'pipelines/recipes/tiny_lora.yaml')!r}, '--set',"
        f" 'data.source={problems}', '--set', 'model.id={ROOT / 'pipelines/tiny_base'}', '--set',"
        f" 'data.validation_fraction=0.2', '--output', {str(tmp_path / 'data')!r}])\n"
        "heavy = ('torch', 'transformers.modeling_utils', 'peft', 'mlflow', 'kfp')\n"
        "print('loaded', code, sorted(set(heavy) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.endswith("loaded 0 []\n"), done.stdout[-300:] + done.stderr[-800:]
