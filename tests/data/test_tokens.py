"""Prompts and completions as tokens, and tokens as the text that rewards read."""

import copy

import pytest
from tokenizers import AddedToken

from gvpo_lightning.data.rows import completion_text, encode_behind, encode_prompt
from gvpo_lightning.sources.offline import encode_completion
from tests.small_tokenizers import KINDS, byte_level, framed, llama2

PROMPTS = ("a", "7=", "a:", "b: ", "a\n", "<s>a =", "€", "7=</s>")
TEXTS = ("7", " 7", "  ab", "ab a", "ba", "\na", "\n\n7", "=7", ":7", "€ ab", "a</s>", "<s>7", "")


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


def tokens(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def shown(ids, tokenizer):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_text_behind_its_prompt_gets_the_tokens_of_both_together(kind):
    alike = 0
    for prompt in PROMPTS:
        front = tokens(prompt, kind)
        for text in TEXTS:
            both = tokens(prompt + text, kind)
            if both[: len(front)] == front:
                assert encode_behind(prompt, text, kind) == both[len(front) :], (prompt, text)
                alike += 1
    assert alike > len(PROMPTS) * len(TEXTS) / 2


def test_prompt_and_completion_say_what_they_say_together(kind):
    """Also where one token would span both: then the prompt's tokens stay as they are."""
    for prompt in ("a", "7=", "a:", "b: ", "a\n", "€"):
        for text in TEXTS:
            ids = tokens(prompt, kind) + encode_behind(prompt, text, kind)
            assert shown(ids, kind) == shown(tokens(prompt + text, kind), kind), (prompt, text)


def test_a_conversations_answer_is_tokenized_behind_the_chat_template(kind):
    kind.chat_template = (
        "{% for m in messages %}a{{ m['content'] }}={% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    talk = [{"role": "user", "content": "7"}]
    prompt = encode_prompt(talk, kind)
    assert prompt == tokens("a7=:", kind)
    for text in ("a", " 7", "=b"):
        assert encode_behind(talk, text, kind) == encode_behind("a7=:", text, kind)
        assert encode_completion(text, kind, [2], prompt=talk).tolist() == [*encode_behind(talk, text, kind), 2]


def test_a_completions_text_is_that_behind_its_prompt(kind):
    """What is read of the tokens gives the same tokens again."""
    for prompt in ("a", "7=", "b:"):
        for text in ("7", " 7", "ab a", " ab", "\na", "=7"):
            ids = encode_completion(text, kind, [2], prompt=prompt)
            assert completion_text(ids.tolist(), kind, [2]) == text
            assert encode_completion(text, kind, [2], prompt=prompt).tolist() == ids.tolist()
            joint = shown(tokens(prompt, kind) + ids[:-1].tolist(), kind)
            assert joint == shown(tokens(prompt, kind), kind) + completion_text(ids.tolist(), kind, [2])


def test_special_tokens_are_text_but_for_ends_padding_and_unknown(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    marks = ("<think>", "</think>", "<|user|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(mark, special=True) for mark in marks]})
    text = "<think>5</think>9"
    ids = tokens(text, tokenizer)
    assert len(ids) == 4
    for around in (ids, [*ids, 1], [*ids[:2], 0, *ids[2:], 1], [2, *ids]):
        assert completion_text(around, tokenizer, [1]) == text
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert completion_text([*ids, user], tokenizer, [1]) == text + "<|user|>"
    assert completion_text([*ids, user], tokenizer, [1, user]) == text  # the model's, where the template ends turns so
    tokenizer.pad_token = None
    assert completion_text([*ids, 1], tokenizer, [1]) == text
    assert completion_text([*ids, 1], tokenizer, []) == text + "<eos>"


@pytest.mark.parametrize("build", [llama2, byte_level])
@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "<s> $A", "$A"])
def test_a_prompt_gets_one_beginning_and_no_end(build, template):
    tokenizer = framed(build(), template)
    start = ["<s>"] if "<s>" in template else []
    for prompt, expected in (
        ("a7", [*start, *tokens("a7", tokenizer)]),
        ("a</s>7", [*start, *tokens("a</s>7", tokenizer)]),
        ("a7</s>", [*start, *tokens("a7</s>", tokenizer)]),  # what the user has written stays
        ("</s>", [*start, *tokens("</s>", tokenizer)]),
        ("<s>a7", tokens("<s>a7", tokenizer)),  # as copied from a chat template
        ("<s>", tokens("<s>", tokenizer)),
        ("<s><s>a", tokens("<s><s>a", tokenizer)),
        ("a<s>7", [*start, *tokens("a<s>7", tokenizer)]),
    ):
        assert encode_prompt(prompt, tokenizer) == [1 if token == "<s>" else token for token in expected], prompt


def test_llamas_own_switches_for_special_tokens():
    tokenizer = llama2(add_bos_token=True, add_eos_token=True)
    assert tokenizer("a")["input_ids"][::2] == [1, 2]
    assert encode_prompt("a", tokenizer) == [1, *tokens("a", tokenizer)]
    assert encode_prompt("<s>a", tokenizer) == tokens("<s>a", tokenizer)
    assert encode_prompt("", tokenizer) == [1]
    with pytest.raises(ValueError, match="at least one token"):
        encode_prompt("", framed(llama2(), "$A </s>"))
