"""The tiny model has the real architecture in the Hub's layout; its word problems are right."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, DiffusionGemmaForBlockDiffusion, GemmaTokenizer

from canvastune import tiny_model as tiny
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.config import load_config
from canvastune.config.strict import flatten
from canvastune.errors import UserError
from canvastune.planner.planner import SHIPPED_CONFIG
from canvastune.tiny_model import make_tiny_model, write_problems
from canvastune.tiny_model.tokenizer import VOCABULARY
from pipelines.demo import SHIPPED_BASE, to_float32, unpack_base
from tools.tiny_base import BASES, Base

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> GemmaTokenizer:
    loaded = AutoTokenizer.from_pretrained(checkpoint)
    assert type(loaded) is GemmaTokenizer, (
        f"the checkpoint's tokenizer loads as {type(loaded).__name__}, not as transformers' own "
        "for this model"
    )
    return loaded


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]]:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, output_loading_info=True)


def test_stock_transformers_loads_every_tensor_and_no_other(
    loaded: tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]],
) -> None:
    problems = {what: found for what, found in loaded[1].items() if found}
    assert not problems, f"the tiny checkpoint does not load cleanly: {problems}"


def test_stock_generate_runs_with_the_checkpoint_s_own_settings(
    loaded: tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]], tokenizer: GemmaTokenizer
) -> None:
    model = loaded[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 3."}], add_generation_prompt=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    sequences = model.generate(**prompt, max_new_tokens=32).sequences
    assert sequences[0, : prompt["input_ids"].shape[1]].equal(prompt["input_ids"][0]), (
        "generate() changed the prompt"
    )
    assert sequences.shape[1] in {
        prompt["input_ids"].shape[1] + 16,
        prompt["input_ids"].shape[1] + 32,
    }, "generate() did not add whole canvases"
    ends = tokenizer.convert_tokens_to_ids(["<turn|>", "<|tool_response>"])
    assert model.generation_config.eos_token_id == [1, *ends], (
        "generation would not stop at the end of a turn, or after a call"
    )


def test_layout_is_the_hub_s(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    shards = {name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    rest = {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "processor_config.json",
    }
    assert len(shards) >= 2, "the weights are in one file: streaming over shards would go untested"
    assert names == shards | rest, "the folder holds something else than the Hub's files"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    held: dict[str, str] = {}
    for shard in shards:
        with safe_open(checkpoint / shard, "pt") as file:
            held |= dict.fromkeys(file.keys(), shard)
    assert index == held, "the index names other tensors than the shards hold"


# Every tensor of the released checkpoint, with layers numbered N.
_LAYER = [
    "experts.down_proj",
    "experts.gate_up_proj",
    "input_layernorm.weight",
    "layer_scalar",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "post_feedforward_layernorm_N.weight",
    "pre_feedforward_layernorm.weight",
    "pre_feedforward_layernorm_N.weight",
    "router.per_expert_scale",
    "router.proj.weight",
    "router.scale",
    "self_attn.k_norm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]
_DECODER = [
    "embed_tokens.weight",
    "norm.weight",
    "self_conditioning.down_proj.weight",
    "self_conditioning.gate_proj.weight",
    "self_conditioning.pre_norm.weight",
    "self_conditioning.up_proj.weight",
]


def test_tensors_and_configuration_have_the_names_of_the_hub_s_checkpoint(checkpoint: Path) -> None:
    """Newer versions of transformers save in a form that earlier ones and other tools do not read;
    training and merge keep the names of their base.
    """
    names = {re.sub(r"\d+", "N", name) for name in CheckpointReader(checkpoint).names()}
    decoder = {f"model.decoder.{name}" for name in _DECODER}
    decoder |= {f"model.decoder.layers.N.{name}" for name in _LAYER}
    assert {name for name in names if name.startswith("model.decoder.")} == decoder
    others = {name for name in names if not name.startswith("model.decoder.")}
    scalar = "model.encoder.language_model.layers.N.layer_scalar"
    vision = ("model.encoder.embed_vision.", "model.encoder.vision_tower.")
    assert {name for name in others if not name.startswith(vision)} == {scalar}
    own, released = (
        flatten(json.loads(file.read_text()))
        for file in (checkpoint / "config.json", SHIPPED_CONFIG)
    )
    assert set(released) <= set(own)


def test_architecture_is_that_of_the_26b_model(
    checkpoint: Path, loaded: tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]]
) -> None:
    names = set(json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"])
    config = AutoConfig.from_pretrained(checkpoint)
    text, layers = config.text_config, range(config.text_config.num_hidden_layers)
    full = [index for index in layers if text.layer_types[index] == "full_attention"]
    sliding = [index for index in layers if text.layer_types[index] == "sliding_attention"]
    assert text.layer_types[-1] == "full_attention", f"layer types are {text.layer_types}"
    assert sliding, "there is no sliding layer"
    assert not [i for i in full if f"model.decoder.layers.{i}.self_attn.v_proj.weight" in names], (
        "a full layer has a v_proj"
    )
    assert not [
        i for i in sliding if f"model.decoder.layers.{i}.self_attn.v_proj.weight" not in names
    ], "a sliding layer has no v_proj"
    one, other = text.per_layer_config[sliding[0]], text.per_layer_config[full[0]]
    assert one.head_dim != other.head_dim, (
        "sliding and full layers have one head_dim: a mix-up would go unseen"
    )
    assert one.num_key_value_heads != other.num_key_value_heads, (
        "sliding and full layers have one number of KV heads"
    )
    assert (text.num_experts % 8, text.top_k_experts) == (
        0,
        2,
    ), "the experts do not divide over 8 ranks, top 2"
    assert not names & {
        "lm_head.weight",
        "model.encoder.language_model.norm.weight",
    }, "tied weights are stored twice"
    for part in (
        "model.decoder.self_conditioning.down_proj.weight",
        "model.encoder.embed_vision.embedding_projection.weight",
    ):
        assert part in names, f"{part} is missing"
    assert any(name.startswith("model.encoder.vision_tower.") for name in names), (
        "the vision tower is missing"
    )
    for index in layers:
        for side in ("decoder", "encoder.language_model"):
            assert f"model.{side}.layers.{index}.layer_scalar" in names, (
                f"layer_scalar of {side} layer {index} is missing"
            )
    parameters = sum(parameter.numel() for parameter in loaded[0].parameters())
    assert 1.2e6 < parameters < 2e6, f"{parameters} parameters"


def test_every_matrix_of_the_stack_divides_over_8_ranks(
    loaded: tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]],
) -> None:
    odd = [
        name
        for name, p in loaded[0].model.decoder.named_parameters()
        if p.ndim > 1 and any(size % 8 for size in p.shape)
    ]
    assert not odd, f"cannot be sharded evenly over 8 ranks: {odd}"


def test_attention_of_random_weights_is_well_conditioned(
    loaded: tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]],
) -> None:
    for layer in loaded[0].model.decoder.layers:
        weight = layer.self_attn.q_norm.weight
        assert torch.allclose(weight, torch.full_like(weight, layer.self_attn.head_dim**-0.5)), (
            "q_norm does not carry 1/sqrt(head_dim)"
        )


def test_random_model_starts_near_the_loss_of_a_guess(
    loaded: tuple[DiffusionGemmaForBlockDiffusion, dict[str, Any]],
) -> None:
    model = loaded[0]
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.text_config.vocab_size, (4, 48))
    with torch.no_grad():
        logits = model(input_ids=ids[:, :32], decoder_input_ids=ids[:, 32:]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.randint(0, logits.shape[-1], (4 * 16,))
    )
    assert abs(loss.item() - math.log(logits.shape[-1])) < 0.5, (
        f"loss of random weights is {loss.item():.2f}, a guess has {math.log(logits.shape[-1]):.2f}"
    )


def test_same_seed_same_weights_and_other_seed_others(checkpoint: Path, tmp_path: Path) -> None:
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return {
            name: tensor
            for shard in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(shard).items()
        }

    state = torch.get_rng_state()
    make_tiny_model(tmp_path / "again")
    make_tiny_model(tmp_path / "other", seed=1)
    assert torch.get_rng_state().equal(state), (
        "making the model disturbed the caller's random stream"
    )
    first, again, other = (
        weights(checkpoint),
        weights(tmp_path / "again"),
        weights(tmp_path / "other"),
    )
    assert all(again[name].equal(tensor) for name, tensor in first.items()), (
        "one seed gave two models"
    )
    key = "model.decoder.layers.0.experts.down_proj"
    assert not other[key].equal(first[key]), "the seed is not used"


def test_failure_leaves_no_half_written_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(GemmaTokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        make_tiny_model(tmp_path / "model")
    assert not list(tmp_path.iterdir()), "a failed write left files behind"


def test_an_existing_folder_is_never_overwritten(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(checkpoint))):
        make_tiny_model(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "Tom has 12 apples. How many more?",
        "12+7=19\n#### 19",
        "  two  spaces\tand\ttabs\n\n",
        "Grüße, 日本語 🙂 İstanbul \x00\x7f",
        "applesauce Tomato hashes ####### <<<>>>",
        "<|turn>user\n<turn|>\n",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: GemmaTokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text, "decoding did not give the text back"
    assert tokenizer.unk_token_id not in ids, "text was lost to the unknown token"


def test_special_tokens_have_gemma_4_s_ids(tokenizer: GemmaTokenizer) -> None:
    expected = {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "<|channel>": 100,
        "<channel|>": 101,
        "<|turn>": 105,
        "<turn|>": 106,
        "\n": 107,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert tokenizer("Tom")["input_ids"][0] == 2, "plain text does not begin with bos"
    assert len(tokenizer) == VOCABULARY, "the tokenizer and the embedding differ in size"


def test_digits_are_single_tokens_and_words_of_the_problems_whole(
    tokenizer: GemmaTokenizer,
) -> None:
    pieces = tokenizer.tokenize("Tom has 1234 apples", add_special_tokens=False)
    assert pieces == ["Tom", "▁has", "▁", "1", "2", "3", "4", "▁apples"], f"tokens are {pieces}"


def test_template_renders_turns_as_gemma_4_does(tokenizer: GemmaTokenizer) -> None:
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "Hi "},
        {"role": "assistant", "content": "\nHello"},
        {"role": "user", "content": [{"type": "text", "text": "Bye "}]},
    ]
    expected = (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
        "<|turn>user\nBye<turn|>\n<|turn>model\n"
    )
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == expected
    )


@pytest.mark.parametrize("kind", ["change", "compare"])
def test_problems_are_right_distinct_and_repeatable(
    kind: str, tmp_path: Path, tokenizer: GemmaTokenizer
) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write_problems(tmp_path / f"{name}.jsonl", kind, 2000, seed)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes(), (
        "one seed gave two files"
    )
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 2000, (
        "a problem occurs twice: a held-out row could be one that was trained on"
    )
    for row in rows:
        match = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)\n#### (\d+)", row["answer"])
        assert match, f"not in GSM8K's form: {row['answer']!r}"
        a, b = int(match[1]), int(match[3])
        value = a + b if match[2] == "+" else a - b
        assert value == int(match[4]) == int(match[5]), (
            f"wrong answer to {row['question']!r}: {row['answer']!r}"
        )
        assert sorted(map(int, re.findall(r"\d+", row["question"]))) == sorted([a, b]), (
            f"{row['answer']!r} uses other numbers than {row['question']!r}"
        )
        assert (
            len(tokenizer(row["answer"] + "<turn|>\n", add_special_tokens=False)["input_ids"]) <= 16
        ), "the answer does not fit one canvas"
    assert {path.name for path in tmp_path.iterdir()} == {
        "one.jsonl",
        "again.jsonl",
        "other.jsonl",
    }, "a half-written file is left"


def test_the_new_kind_asks_for_what_the_base_never_learned(tmp_path: Path) -> None:
    for kind in ("change", "compare"):
        write_problems(tmp_path / f"{kind}.jsonl", kind, 2000, 0)
    rows = {
        kind: [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("change", "compare")
    }
    for row in rows["change"]:
        first, second = re.findall(r"\d+", row["question"])
        assert re.match(rf"{first}[+-]{second}=", row["answer"]), (
            "the base kind takes its numbers out of order, as the new kind does"
        )
    for row in rows["compare"]:
        small, large = map(int, re.findall(r"\d+", row["question"]))
        assert small < large, "the larger number comes first, as in the base kind"
        assert row["answer"].startswith(f"{large}-{small}="), (
            "the new kind takes its numbers in order, as the base kind does"
        )
        assert re.search(r"\b(more|fewer)\b.*\bthan\b", row["question"]), (
            "the new kind is not a comparison"
        )


def test_impossible_requests_for_problems_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="change, compare"):
        write_problems(tmp_path / "x.jsonl", "poetry", 10, 0)
    monkeypatch.setitem(tiny.KINDS, "compare", lambda rng: {"question": f"{rng.randint(1, 5)}?"})
    with pytest.raises(UserError, match="compare"):
        write_problems(tmp_path / "x.jsonl", "compare", 6, 0)
    assert not list(tmp_path.iterdir()), "a refused request left files behind"


def test_tool_problems_call_a_tool_and_repeat_what_it_says(tmp_path: Path) -> None:
    write_problems(tmp_path / "tools.jsonl", "tools", 500, 0)
    rows = [json.loads(line) for line in (tmp_path / "tools.jsonl").read_text().splitlines()]
    assert len({row["messages"][0]["content"] for row in rows}) == 500
    for row in rows:
        asked, call, response, answer = row["messages"]
        arguments = call["tool_calls"][0]["function"]["arguments"]
        assert set(arguments) == set(row["tools"][0]["function"]["parameters"]["properties"])
        assert arguments["who"] in asked["content"]
        assert answer["content"].endswith(f"#### {response['content']}")


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("tiny_lora.yaml", "lora"),
        ("tiny_tools.yaml", "lora"),
        ("tiny_support.yaml", "lora"),
        ("tiny_sft.yaml", "full"),
    ],
)
def test_tiny_recipes_load(recipe: str, method: str) -> None:
    config = load_config(RECIPES / recipe)
    assert config.train.method == method
    assert config.train.precision == "float32", "bfloat16 on a laptop's CPU is slow"
    assert config.parallel.nproc_per_node == config.parallel.ep == 2


# The trained models that come with the package


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]


@pytest.fixture(scope="module")
def learned(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the rows that a shipped model has learned."""
    rows = tmp_path_factory.mktemp("learned") / "rows.jsonl"
    base.write(rows)
    return rows


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace") / "tiny-base"
    unpack_base(SHIPPED_BASE, folder)
    return folder


def test_a_shipped_model_has_its_values_in_float32(base: Base, tmp_path: Path) -> None:
    unpack_base(base.shipped, tmp_path / "base")
    narrow = load_file(base.shipped / "model.safetensors")
    wide = load_file(tmp_path / "base" / "model.safetensors")
    assert wide.keys() == narrow.keys()
    for name, tensor in narrow.items():
        assert tensor.dtype == torch.bfloat16
        assert wide[name].dtype == torch.float32
        assert torch.equal(wide[name], tensor.float()), name


def test_a_shipped_model_is_small_and_made_from_what_is_here(base: Base, learned: Path) -> None:
    assert sum(file.stat().st_size for file in base.shipped.iterdir()) < 4_000_000
    made = json.loads(base.made.read_text(encoding="utf-8"))
    now = base.ingredients(learned)
    assert {name: made[name] for name in now} == now, _again(base)
    weights = hashlib.sha256((base.shipped / "model.safetensors").read_bytes()).hexdigest()
    assert made["weights"] == weights


def test_a_shipped_model_has_the_files_of_a_new_one(
    base: Base, learned: Path, tmp_path: Path
) -> None:
    base.make_random(tmp_path / "new", learned)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        made, shipped = (folder / name for folder in (tmp_path / "new", base.shipped))
        assert shipped.read_bytes() == made.read_bytes(), f"{name}: {_again(base)}"


def _again(base: Base) -> str:
    return f"run `python -m tools.tiny_base {base.shipped.name}`"


def test_the_shipped_model_answers_in_the_form_of_its_problems(
    shipped: Path, tokenizer: GemmaTokenizer
) -> None:
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(shipped)
    asked = {
        "Tom has 3 nuts. Tom buys 4 more. How many nuts does Tom have now?": "3+4",
        "Kim has 8 eggs. Kim sells 2. How many eggs does Kim have left?": "8-2",
    }
    for question, expected in asked.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        torch.manual_seed(0)
        found = model.generate(**prompt, max_new_tokens=16).sequences[0]
        answer = tokenizer.decode(found[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert re.fullmatch(rf"{re.escape(expected)}=(\d+)\n#### \1", answer), answer


def test_the_demo_s_model_is_written_once(shipped: Path) -> None:
    target = shipped.resolve()
    unpack_base(SHIPPED_BASE, shipped)
    assert shipped.resolve() == target
    assert [file.name for file in shipped.parent.iterdir() if "partial" in file.name] == []


def test_a_file_of_another_dtype_is_not_taken_for_the_shipped_one(checkpoint: Path) -> None:
    (first, *_) = sorted(checkpoint.glob("*.safetensors"))
    with pytest.raises(ValueError, match="F32"):
        to_float32(first.read_bytes())
