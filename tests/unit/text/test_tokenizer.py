"""The tokenizer agrees with transformers', and says what is wrong with a checkpoint or a text."""

import pytest
from text_checkpoints import byte_level, write_checkpoint
from tokenizers import processors

from cluster.errors import CheckpointError, InvalidRequest
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


@pytest.mark.parametrize(
    ("generation", "config", "settings", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, BOUNDARIES, (3, 4)),
        (None, {"eos_token_id": 5}, BOUNDARIES, (5,)),
        ({}, {"eos_token_id": None}, BOUNDARIES, (0,)),
        (None, {}, {}, ()),
    ],
)
def test_end_of_text_ids(tmp_path, generation, config, settings, expected):
    write_checkpoint(tmp_path, byte_level(), settings=settings, config=config, generation=generation)
    assert Tokenizer.from_checkpoint(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "no JSON object"),
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


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
async def test_text_that_no_model_takes(tokenizer, text):
    with pytest.raises(InvalidRequest):
        tokenizer.encode(text)
    with pytest.raises(InvalidRequest):
        await tokenizer.encode_async(text * 1000)


async def test_long_texts_come_out_the_same(tokenizer):
    text = "def read_lines(path):\n" * 500
    assert await tokenizer.encode_async(text) == tokenizer.encode(text)


CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "def <é>?"}]


@pytest.mark.parametrize("where", ["settings", "named", "file"])
async def test_chat_as_in_transformers(tmp_path, where):
    from transformers import AutoTokenizer

    settings = BOUNDARIES | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    if where == "settings":
        settings["chat_template"] = CHAT
    elif where == "named":
        settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT}]
    else:
        (tmp_path / "chat_template.jinja").write_text(CHAT)
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
    ],
)
def test_a_template_that_refuses_or_misbehaves(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    write_checkpoint(tmp_path, byte_level())
    with pytest.raises(InvalidRequest) as caught:
        Tokenizer.from_checkpoint(tmp_path).encode_chat(MESSAGES)
    assert caught.value.field == "chat"
