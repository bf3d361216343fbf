"""Prompt and reference are rendered by one function, with the same options: what could follow the prompt is scored."""

import pytest
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

from rlseq.data import build_prompts, reference_ids
from rlseq.evaluation.fit import check_models
from rlseq.evaluation.settings import ContrastSettings
from rlseq.scoring import load_rewards

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if think is defined and m.role == 'assistant' and loop.last %}"
    "{{ '(' + think + ')' }}{% endif %}{{ m.content + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% if think is defined %}"
    "{{ '(' + think + ')' }}{% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "2+2"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "it is "}]


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of a token a character, whose `$` ends a message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate("$<>()+0123456789abcdefghijklmnopqrstuvwxyz ?")}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="$", unk_token="?", chat_template=CHATML)


@pytest.mark.parametrize(
    ("messages", "options", "prompt", "reference"),
    [
        (ASKED, {}, "<user>2+2$<assistant>", "4$"),
        (ASKED, {"think": "none"}, "<user>2+2$<assistant>(none)", "4$"),
        (BEGUN, {}, "<user>2+2$<assistant>it is ", "4$"),
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": False}, "<user>2+2$<assistant>it is ", "4$"),
        (BEGUN, {"think": "yes"}, "<user>2+2$<assistant>(yes)it is ", "4$"),
        (BEGUN, {"add_generation_prompt": True}, "<user>2+2$<assistant>it is $<assistant>", "4$"),
        (ASKED, {"add_generation_prompt": False}, "<user>2+2$", "<assistant>4$"),
    ],
)
def test_a_reference_is_what_could_follow_the_prompt(messages, options, prompt, reference):
    tokenizer = characters()
    (built,) = build_prompts([{"prompt": messages, "references": "4"}], tokenizer, chat_template_kwargs=options)
    (ids,) = reference_ids(built, tokenizer, [tokenizer.eos_token_id])
    assert (tokenizer.decode(built.prompt_ids), tokenizer.decode(ids)) == (prompt, reference)


def test_prompts_that_begin_an_answer_stand_beside_those_that_do_not():
    rows = [{"prompt": messages, "references": "4"} for messages in (ASKED, BEGUN, ASKED)]
    tokenizer = characters()
    found = [tokenizer.decode(prompt.prompt_ids) for prompt in build_prompts(rows, tokenizer)]
    assert found == ["<user>2+2$<assistant>", "<user>2+2$<assistant>it is ", "<user>2+2$<assistant>"]


def test_an_evaluation_says_what_the_template_puts_before_the_references(tmp_path):
    tokenizer = characters()
    content = "{{ m.content + '$' }}"
    tokenizer.chat_template = CHATML.replace(content, "{{ (m.role == 'assistant') * '()' + m.content + '$' }}")
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=0)
    model.save_pretrained(tmp_path)
    rows = [{"prompt": ASKED, "references": ["4"]}]
    with load_rewards(["exact_match"]) as suite:
        (warning,) = check_models({"it": tmp_path}, rows, {}, ContrastSettings(), suite)
    assert "model 'it'" in warning and "the chat template puts '()' before 1 of 1 references" in warning
