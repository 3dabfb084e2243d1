"""The same prompt and the same reading of a response for SFT, reward, prediction and plugin, in eight families."""

import asyncio
import resource

import numpy as np
import pytest

pytest.importorskip("transformers")

from recipe.cello1.formats import template_limits
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.chat_template import (
    ResponseReader,
    completion_of,
    end_of_turn,
    opened_by,
    prompt_ids,
    render_chat,
)
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.task.answer import format_answer, parse_answer
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle

PUZZLE = Puzzle(
    (("MS4A1", "CD79A"), ("CD3E", "IL7R")),
    ("B cell", "T cell"),
    ("B cell", "T cell"),
    "From blood.",
    {"reasoning": "\nCell 1: MS4A1 -> B cell\n"},
)
SYSTEM_FIRST = "{% for m in messages %}"
PLAIN_TURNS = SYSTEM_FIRST + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
# Name: template, end of turn, BOS, tokens that are special by name, special among the added tokens only, not special.
FAMILIES = {
    "qwen2.5": (PLAIN_TURNS + ASK + "<|im_start|>assistant\n{% endif %}", "<|im_end|>", None, ["<|im_start|>"], [], []),
    "qwen3": (
        PLAIN_TURNS + ASK + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        None,
        ["<|im_start|>"],
        [],
        ["<think>", "</think>"],
    ),
    "qwen3-thinking": (
        PLAIN_TURNS + ASK + "<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_end|>",
        None,
        ["<|im_start|>"],
        [],
        ["<think>", "</think>"],
    ),
    "r1-distillation": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|eos|>"
        "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        + ASK
        + "<|Assistant|><think>\n{% endif %}",
        "<|eos|>",
        "<|bos|>",
        ["<|User|>", "<|Assistant|>", "<think>", "</think>"],  # here the tags are special tokens
        [],
        [],
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + ASK
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
        "<|begin_of_text|>",
        [],
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
        "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}"
        "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
        "<s>",
        [],
        ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
        [],
    ),
    "gemma": (
        "{{ bos_token }}" + NO_SYSTEM + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + ASK + "<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        "<bos>",
        [],
        ["<start_of_turn>", "<end_of_turn>"],
        [],
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + ASK
        + "<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "<|end|>",
        None,
        [],
        ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        [],
    ),
}


def build(name):
    """Make a tokenizer of a family: byte-level BPE without merges, and the family's tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    template, end, bos, special, added, plain = FAMILIES[name]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|endoftext|>" if end in added else end, "pad_token": "<|pad|>"} | (
        {"bos_token": bos} if bos else {}
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=special, **names)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    if bos:  # as Llama's: by itself it would put a second one in
        number = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, number)]
        )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_one_prompt_and_one_reading(name, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("verl")
    from recipe.cello1.cold_start.sft_data import training_row
    from recipe.cello1.rl.reward_manager import PuzzleRewardManager
    from verl import DataProto

    tokenizer = build(name)
    layout = "user" if name == "gemma" else "system"
    end = end_of_turn(tokenizer)
    assert end == FAMILIES[name][1]

    # The prompt: of SFT, of the RL row as verl renders it.
    row = training_row(PUZZLE, tokenizer, end, layout)
    asked = row["completion_mask"].index(1)
    assert row["completion_mask"] == [0] * asked + [1] * (len(row["input_ids"]) - asked)
    prompt, written = row["input_ids"][:asked], row["input_ids"][asked:]
    chat = rl_row(PUZZLE, "train", 0, layout)["prompt"]
    assert prompt == tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    if tokenizer.bos_token:
        assert prompt.count(tokenizer.bos_token_id) == 1

    # What was trained on is a right answer, and nothing else of it is.
    text = ResponseReader(tokenizer).after(prompt, written)
    parsed = parse_answer(text)
    assert (parsed.ok, parsed.items, parsed.reasoning.strip()) == (True, PUZZLE.answer, "Cell 1: MS4A1 -> B cell")
    assert end not in text
    if "thinking" in name or "r1" in name:
        assert not parse_answer(ResponseReader(tokenizer)(written)).ok, "the completion alone lacks its opening tag"

    async def reward(ids):
        config = {"reward": {}, "data": {}}
        tensors = {
            "prompts": torch.tensor([prompt]),
            "responses": torch.tensor([[*ids, tokenizer.pad_token_id]]),
            "attention_mask": torch.tensor([[1] * (len(prompt) + len(ids)) + [0]]),
        }
        gold = np.array([{"ground_truth": "B cell | T cell"}], dtype=object)
        data = DataProto.from_dict(tensors=tensors, non_tensors={"reward_model": gold})
        return (await PuzzleRewardManager(Config(config), tokenizer).run_single(data))["reward_score"]

    assert asyncio.run(reward(written)) == 1.0
    assert asyncio.run(reward(written[: len(written) // 2])) == -1.0
    assert_asked(tokenizer, layout, prompt, written, text, tmp_path)


def assert_asked(tokenizer, layout, prompt, written, text, folder):
    """Prediction and plugin put this prompt to an engine, and read this text from the tokens that it writes."""
    local, protocol, predict, annotate = (
        pytest.importorskip(module, reason="not part of the recipe in verl-recipe")
        for module in (
            *("recipe.cello1.engines.local", "recipe.cello1.engines.protocol", "recipe.cello1.inference.predict"),
            "scverse_plugin.method._ask",
        )
    )

    class Engine(local.LocalEngine):
        name, model, fingerprint = "written", "none", "0"

        def __init__(self):
            self._set_tokenizer(tokenizer, 100_000, constrained=False)
            self.asked = []

        def generate(self, requests, sampling):
            for i, request in enumerate(requests):
                found = self._prompt(request, sampling)
                self.asked.append(found.ids)
                yield i, protocol.Completion(self._read(written, found.opened), "stop", len(written), len(found.ids))

    engine, sampling = Engine(), protocol.Sampling()
    predict.predict(engine, [PUZZLE], folder / "predictions.jsonl", layout=layout, progress=False)
    (record,) = read_items(folder / "predictions.jsonl")
    (reply,) = annotate.ask_puzzles(
        *(engine, [PUZZLE]), layout=layout, sampling=sampling, seeds=[0], constrain=False, cache=None, progress=False
    )
    assert engine.asked == [prompt, prompt]
    assert record["prediction"] == reply.text == text


class Config(dict):
    reward = {}


def test_no_system_role():
    with pytest.raises(ValueError, match=r"cannot be applied to system/user: System role .*; set prompt_layout=user"):
        render_chat(build("gemma"), messages(PUZZLE, "system"))


GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 4\n"


@pytest.mark.parametrize(
    ("template", "layout", "said"),
    [
        (GIT_LFS, "system", "leaves out what the system says; set prompt_layout=user"),
        (GIT_LFS, "user", "leaves out what the user says; mend the template, or take another model"),
        (
            PLAIN_TURNS.replace("m.content", "m.content.split('</think>')[-1]"),
            "system",
            "leaves out what the system says",
        ),
        ("{{ messages[-1].content }}", "system", "leaves out what the system says; set prompt_layout=user"),
        (
            "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
            "user",
            "leaves out what",
        ),
        ("{{ tools | length }}", "user", r"object of type 'NoneType' has no len\(\); mend the template"),
        ({"rag": "x", "tool_use": "y"}, "user", r"no default specified.*\['rag', 'tool_use'\]\.; mend the template"),
        ("{% if", "user", "unexpected 'end of template'; mend the template"),
    ],
)
def test_templates_that_do_not_say_what_is_asked(template, layout, said):
    tokenizer = build("qwen3")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"cannot be applied to .*: .*{said}"):
        render_chat(tokenizer, messages(PUZZLE, layout))


STRIP = "{{ m.content.split('</think>')[-1] | trim }}"
STRIPS = PLAIN_TURNS.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}" + STRIP + "{% else %}{{ m.content }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        STRIPS + ASK + "<|im_start|>assistant\n{% endif %}",
        STRIPS + ASK + "<|im_start|>assistant\n<think>\n{% endif %}",
        STRIPS + ASK + "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",  # thinking turned off
        "{% if tools is none %}" + PLAIN_TURNS + "{% endif %}" + ASK + "<|im_start|>assistant\n{% endif %}",
        {"tool_use": "x", "default": PLAIN_TURNS + ASK + "<|im_start|>assistant\n{% endif %}"},
    ],
)
@pytest.mark.parametrize("special", [(), ("<answer>", "</answer>"), ("<think>", "</think>", "<answer>", "</answer>")])
@pytest.mark.parametrize("strips", [False, True])  # white space beside them, as those of Phi
def test_what_is_trained_on_is_read_back(template, special, strips, tmp_path):
    """As it is, and from a folder that has a template of its own in tokenizer_config.json, which does not count."""
    import json

    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from recipe.cello1.cold_start.sft_data import training_row

    tokenizer = build("qwen2.5")
    form = {"normalized": False, "special": True, "lstrip": strips, "rstrip": strips}
    tokenizer.add_tokens([AddedToken(token, **form) for token in special])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ 1 }}"}))
    rows = []
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        end = end_of_turn(each)
        rows.append(training_row(PUZZLE, each, end))
        asked = rows[-1]["completion_mask"].index(1)
        parsed = parse_answer(ResponseReader(each).after(rows[-1]["input_ids"][:asked], rows[-1]["input_ids"][asked:]))
        assert (parsed.ok, parsed.items, parsed.reasoning.strip()) == (True, PUZZLE.answer, "Cell 1: MS4A1 -> B cell")
    assert rows[0] == rows[1]


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_tokenizers_that_put_a_space_after_special_tokens(scheme, opens):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from recipe.cello1.cold_start.sft_data import training_row

    letters = ["<unk>", *map(chr, range(32, 127)), "\n", "\u2581"]
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    names = ("[INST]", "[/INST]", "<think>", "</think>", "<answer>", "</answer>")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}" + ASK + opens + "{% endif %}"
    )
    row = training_row(PUZZLE, tokenizer, end_of_turn(tokenizer), "user")
    asked = row["completion_mask"].index(1)
    parsed = parse_answer(ResponseReader(tokenizer).after(row["input_ids"][:asked], row["input_ids"][asked:]))
    assert (parsed.ok, parsed.items, parsed.reasoning.strip()) == (True, PUZZLE.answer, "Cell 1: MS4A1 -> B cell")


def test_no_template():
    tokenizer = build("phi")
    tokenizer.chat_template = None
    for render in (lambda: render_chat(tokenizer, messages(PUZZLE)), lambda: end_of_turn(tokenizer)):
        with pytest.raises(ValueError, match="no chat template"):
            render()


def test_a_template_that_does_not_end_turns():
    tokenizer = build("phi")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="no special token"):
        end_of_turn(tokenizer)


@pytest.mark.timeout(120, method="thread")  # the limit under test needs the timer that the other method takes
@pytest.mark.slow
def test_a_template_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr(template_limits, "_TIME_LIMIT_S", 0.2)
    tokenizer = build("phi")
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    tokenizer.chat_template = loop + "{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="not done after"):
        render_chat(tokenizer, messages(PUZZLE))


@pytest.mark.timeout(120, method="thread")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'ab' * 10**9 }}",
        "{{ [messages] * 10**9 }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ 'a'|center(3 * 10**9) }}",
        "{% set n = namespace(t=messages[0].content) %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    ],
)
def test_a_template_that_would_fill_the_memory(template):
    tokenizer = build("phi")
    tokenizer.chat_template = template
    before = peak()
    with pytest.raises(ValueError, match=r"cannot be applied to .*: it makes .* characters"):
        render_chat(tokenizer, messages(PUZZLE))
    assert peak() < before + (2 << 20)  # KiB
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[1].content }}"
    assert render_chat(tokenizer, messages(PUZZLE))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("ending", "opened"), [("A:", ""), ("A:<think>", "<think>"), ("A:<think>\n", "<think>\n"), ("<think>A:", "")]
)
def test_what_the_template_opens_belongs_to_the_response(ending, opened):
    assert opened_by("say <think>" + ending) == opened
    response = format_answer(("a", "b"), "x")
    assert parse_answer(opened + completion_of(response, opened)).ok


def test_special_tokens_are_left_out_but_for_the_tags():
    tokenizer = build("r1-distillation")
    ids = prompt_ids(tokenizer, "<think>a</think>\n<answer>B cell</answer><|eos|><|pad|>")
    assert ResponseReader(tokenizer)(ids) == "<think>a</think>\n<answer>B cell</answer>"
