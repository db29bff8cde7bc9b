"""The tokenizer agrees with transformers', and says what is wrong with a checkpoint or a text."""

import pytest
from text_checkpoints import byte_level, write_checkpoint
from tokenizers import processors

from cluster.errors import CheckpointError, InvalidRequest
from cluster.text.detokenizer import create_detokenizer
from cluster.text.tokenizer import Tokenizer

BOUNDARIES = {"bos_token": "<|start|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("template_in_file", [True, False])
def test_boundary_tokens_as_in_transformers(tmp_path, add_bos, template_in_file):
    from transformers import AutoTokenizer

    backend = byte_level()
    if template_in_file:
        backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    settings = BOUNDARIES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if add_bos is not None:
        settings["add_bos_token"] = add_bos
    write_checkpoint(tmp_path, backend, settings=settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_checkpoint(tmp_path)
    for text in ("def f():", "café 日本", "<|start|> x<tool call>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


LISTED = {
    "content": "read",
    "special": True,
    "normalized": False,
    "lstrip": True,
    "rstrip": False,
    "single_word": False,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<tool call>"},
        {"my_token": {"content": "def", "__type": "AddedToken"}},
        {"extra_special_tokens": ["<tool call>", "<new>"]},
        {"additional_special_tokens": ["read"]},
        {"extra_special_tokens": {"image_token": "<new>"}},
        {"added_tokens_decoder": {"321": LISTED | {"content": "<new>"}, "320": LISTED}},
        {"added_tokens_decoder": {"320": LISTED | {"special": False}}, "pad_token": "<new>"},
        {"added_tokens_decoder": {"320": LISTED | {"content": "<tool call>"}}},
    ],
    ids=str,
)
def test_tokens_of_the_settings_as_in_transformers(tmp_path, settings):
    """They are found in a prompt, and have no text where the settings make them special."""
    from transformers import AutoTokenizer

    write_checkpoint(tmp_path, byte_level(), settings=settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = Tokenizer.from_checkpoint(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("def read <tool call> <new> f")
    assert ids == theirs.encode("def read <tool call> <new> f")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert "".join(map(create_detokenizer(ours).push, ids)) == ours.decode(ids)


def test_a_prompt_is_neither_cut_nor_padded(tmp_path):
    """Some files hold what was set for training."""
    backend = byte_level()
    expected = backend.encode("def read_lines(path):").ids
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    write_checkpoint(tmp_path, backend)
    assert Tokenizer.from_checkpoint(tmp_path).encode("def read_lines(path):") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "no JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": "x"}}', "added tokens"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template is broken"),
        ("config.json", None, "cannot be read"),
        ("config.json", "{}", "vocab_size"),
    ],
)
def test_a_broken_checkpoint_names_the_file(tmp_path, name, content, message):
    write_checkpoint(tmp_path, byte_level())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_checkpoint(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("", "empty"), ("a\0b", "NUL"), ("a\ud800", "Unicode at character 1")])
async def test_text_that_no_model_takes(tokenizer, text, message):
    with pytest.raises(InvalidRequest, match=message):
        tokenizer.encode(text)
    with pytest.raises(InvalidRequest, match=message):
        await tokenizer.encode_async(text * 1000)


async def test_long_texts_come_out_the_same(tokenizer):
    text = "def read_lines(path):\n" * 500
    assert await tokenizer.encode_async(text) == tokenizer.encode(text)


CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "def <é>?"}]


# What templates of the Hub use: loop controls, namespaces, JSON that is not escaped, variables that are none, marks.
RICH = (
    "{%- if tools is not none %}{{ raise_exception('tools') }}{% endif %}{{ bos_token }}"
    "{% set ns = namespace(n=0) %}\n"
    "{% for m in messages %}\n"
    "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    {% set ns.n = ns.n + 1 %}\n"
    "    {% generation %}{{ m.content | tojson(ensure_ascii=False) }}{% endgeneration %}\n"
    "{{ m | tojson(indent=2) }}{{ '-' * 3 }}\n"
    "{% endfor %}\n"
    "{{ ns.n }}{{ strftime_now('%%') }}"
)


@pytest.mark.parametrize("template", [CHAT, RICH])
@pytest.mark.parametrize("where", ["settings", "named", "file"])
async def test_chat_as_in_transformers(tmp_path, where, template):
    from transformers import AutoTokenizer

    settings = BOUNDARIES | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    if where == "settings":
        settings["chat_template"] = template
    elif where == "named":
        settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    else:
        (tmp_path / "chat_template.jinja").write_text(template)
    write_checkpoint(tmp_path, byte_level(), settings=settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    ours = Tokenizer.from_checkpoint(tmp_path)
    assert ours.has_chat_template
    assert ours.encode_chat(MESSAGES) == await ours.encode_chat_async(MESSAGES) == expected


def test_no_chat_template(tokenizer):
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ '123456789 ' * 9999 }}{% endfor %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ 99999999 * ['x'] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_refuses_or_misbehaves(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    write_checkpoint(tmp_path, byte_level())
    with pytest.raises(InvalidRequest) as caught:
        Tokenizer.from_checkpoint(tmp_path).encode_chat(MESSAGES)
    assert caught.value.field == "chat"


@pytest.mark.parametrize("content", ["", "a\0b", "a\ud800"])
async def test_a_text_that_cannot_be_encoded_is_named_as_it_came(tmp_path, content):
    write_checkpoint(tmp_path, byte_level(), settings={"chat_template": "{{ messages[0].content }}"})
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    messages = [{"role": "user", "content": content}]
    for encode, field in (
        (tokenizer.encode_async(content), "prompt"), (tokenizer.encode_chat_async(messages), "chat")
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            await encode
        assert caught.value.field == field
