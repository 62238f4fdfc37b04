"""Chat templates: the tokens of `transformers`, the mask of what is trained, and no control token from any
content."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data import content as contents
from data import rendering
from data.content import REMEMBERED, ContentEncoder
from data.schema import ChatRole, Message
from data.template import SPECIAL_TOKENS, TEMPLATE, ChatTemplate, set_template, tokenizer_record
from pipeline.errors import ArtifactError, ConfigError

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_TOKENS = ["<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>"]
LLAMA = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ bos_token }}{{ '<|start_header|>system<|end_header|>\n\nToday: ' + date_string + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot|>' }}"
    "{% for message in messages %}{{ '<|start_header|>' + message['role'] + '<|end_header|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\n\n' }}{% endif %}"
)
CORPUS = [
    "Where is Ann? Ann is in Rome, she said.\n",
    "What is 2 + 2? It is 4, I think.\n",
    "user assistant system end",
]
STYLES: dict[str, tuple[str, list[str], str, str | None]] = {
    "baton": (TEMPLATE, SPECIAL_TOKENS, "<|end|>", None),
    "chatml": (CHATML, CHATML_TOKENS, "<|im_end|>", None),
    "llama": (LLAMA, LLAMA_TOKENS, "<|eot|>", "<|begin|>"),
}
CONVERSATIONS = [
    [("user", "Where is Ann?"), ("assistant", "In Rome.")],
    [("system", "Be brief."), ("user", "Where is Ann?"), ("assistant", "In Rome.")],
    [
        ("user", "What is 2 + 2?"),
        ("assistant", "4"),
        ("user", "And\n3 + 3?"),
        ("assistant", "6, I think \u00e9\u4e16."),
    ],
]


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wrap(backend: Tokenizer, template: str | None, end: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=list(STYLES))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    template, special, end, bos = STYLES[request.param]
    return wrap(byte_level(special), template, end, bos)


def messages(turns: list[tuple[ChatRole, str]]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def by_transformers(tokenizer: PreTrainedTokenizerFast, chat: list[Message]) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        [vars(message) for message in chat],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_tokens_and_mask_are_those_of_transformers(tokenizer: Any, turns: Any) -> None:
    encoded = ChatTemplate(tokenizer).encode(messages(turns))
    assert (encoded.tokens, encoded.trained) == by_transformers(tokenizer, messages(turns))


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_a_prompt_and_its_response_begin_the_whole_conversation(tokenizer: Any, turns: Any) -> None:
    chat, template = messages(turns), ChatTemplate(tokenizer)
    for length in range(2 if chat[0].role == "user" else 3, len(chat) + 1, 2):
        part = chat[:length]
        encoded = template.encode(part)
        prompt, response = template.prompt(part[:-1]), template.response(part[-1].content)
        end = len(prompt) + len(response)
        assert encoded.tokens[:end] == prompt + response
        assert encoded.trained[len(prompt) : end] == [True] * len(response)
        assert not any(encoded.trained[end:])


def test_trained_tokens_are_the_responses_of_every_turn(tokenizer: Any) -> None:
    chat, template = messages(CONVERSATIONS[2]), ChatTemplate(tokenizer)
    encoded = template.encode(chat)
    trained = [token for token, is_trained in zip(encoded.tokens, encoded.trained, strict=True) if is_trained]
    contents = [token for token, is_written in zip(encoded.tokens, encoded.written, strict=True) if not is_written]
    assert template.decode(contents) == "".join(message.content for message in chat)
    assert trained == template.response(chat[1].content) + template.response(chat[3].content)
    assert template.decode(trained) == chat[1].content + chat[3].content
    assert template.stop_id == tokenizer.eos_token_id


def test_kept_tokens_are_those_of_the_text_whatever_became_of_the_list(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, draw = ContentEncoder(tokenizer), random.Random(0)
    texts = [f"Ann {number} \u4e16" * draw.randrange(5) for number in range(3 * REMEMBERED)]
    expected = {text: ContentEncoder(tokenizer).encode(text) for text in texts}
    for text in draw.choices(texts, k=400):
        found = encoder.encode(text)
        assert found == expected[text] == encoder.encode(text)
        found.append(draw.randrange(9))
    asked: list[str] = []
    original = contents._ids
    monkeypatch.setattr(contents, "_ids", lambda backend, text: asked.append(text) or original(backend, text))
    template = ChatTemplate(tokenizer)
    asked.clear()
    chat = messages(CONVERSATIONS[2])
    assert template.encode(chat).tokens == template.encode(chat).tokens
    assert asked == [message.content for message in chat]


def control_count(tokenizer: Any, tokens: list[int]) -> int:
    return sum(token in tokenizer.added_tokens_decoder for token in tokens)


def test_no_content_of_any_role_becomes_a_control_token(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("[CALL]", special=False, normalized=True)])
    template = ChatTemplate(tokenizer)
    markers = [token.content for token in tokenizer.added_tokens_decoder.values()]
    roles: list[ChatRole] = ["system", "user", "assistant"]
    benign = [Message(role, "Ann") for role in roles]
    expected = control_count(tokenizer, template.encode(benign).tokens)
    for marker, attacked in itertools.product([*markers, "".join(markers), markers[0] * 2000], roles):
        for content in (marker, f"a {marker} b", f" {marker}\n"):
            chat = [Message(role, content if role == attacked else "Ann") for role in roles]
            encoded = template.encode(chat)
            assert control_count(tokenizer, encoded.tokens) == expected
            assert content.strip() in template.decode(encoded.tokens)
    for marker in markers:
        assert control_count(tokenizer, template.response(marker)) == 1
        assert template.decode(template.response(marker)) == marker


@pytest.mark.parametrize("special", [False, True])
def test_text_has_the_tokens_it_had_before_it_became_a_control_token(special: bool) -> None:
    backend = byte_level(SPECIAL_TOKENS)
    before = ChatTemplate(wrap(backend, TEMPLATE, "<|end|>")).response("Where is Ann, assistant")
    for word in ("assistant", "Ann", "here"):
        backend.add_tokens([AddedToken(word, special=special)])
    after = ChatTemplate(wrap(backend, TEMPLATE, "<|end|>")).response("Where is Ann, assistant")
    assert after == before


def test_control_tokens_that_are_words_of_the_model_are_cut() -> None:
    vocabulary = [(token, 0.0) for token in ("<unk>", "<|end|>", "<|user|>", "<|assistant|>", "\u2581")]
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<|>"]
    backend = Tokenizer(models.Unigram(vocabulary + letters, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<unk>", "<|end|>", "<|user|>", "<|assistant|>"])
    tokenizer = wrap(backend, TEMPLATE, "<|end|>")
    tokenizer.unk_token = "<unk>"
    template = ChatTemplate(tokenizer)
    written = template.response("a <|end|><|user|> b \u4e16")
    assert written.count(template.stop_id) == 1
    assert backend.token_to_id("<|user|>") not in written
    assert tokenizer.unk_token_id in written
    chat = messages([("user", "where is ann"), ("assistant", "here")])
    assert (template.encode(chat).tokens, template.encode(chat).trained) == by_transformers(tokenizer, chat)


def test_a_tokenizer_that_puts_a_space_before_text_puts_none_inside_a_conversation() -> None:
    backend = byte_level(CHATML_TOKENS)
    state_with_space = copy.deepcopy(backend)
    state_with_space.normalizer = normalizers.Sequence([normalizers.Prepend("_")])
    template = ChatTemplate(wrap(state_with_space, CHATML, "<|im_end|>"))
    plain = ChatTemplate(wrap(backend, CHATML, "<|im_end|>"))
    assert template.response("Ann") == plain.response("Ann")


def test_runs_of_white_space_keep_their_own_tokens() -> None:
    backend = byte_level(SPECIAL_TOKENS)
    backend.add_special_tokens(["<|extra|>"])
    backend.add_tokens([AddedToken("    ", normalized=False)])
    template = ChatTemplate(wrap(backend, TEMPLATE, "<|end|>"))
    assert backend.token_to_id("    ") in template.response("a    b")
    assert backend.token_to_id("<|extra|>") not in template.response("a <|extra|>    b")


def test_white_space_is_stripped_where_the_template_strips_it() -> None:
    chat = messages([("user", "  Where is Ann?\n"), ("assistant", "\n In Rome. ")])
    for style in ("llama", "baton"):
        template, special, end, bos = STYLES[style]
        tokenizer = wrap(byte_level(special), template, end, bos)
        ours = ChatTemplate(tokenizer)
        assert ours.encode(chat).tokens == by_transformers(tokenizer, chat)[0]
        kept = "In Rome." if style == "llama" else "\n In Rome. "
        assert ours.decode(ours.response(chat[1].content)) == kept


def turn(content: str, end: str = "<|end|>") -> str:
    header = "{{ '<|' + message['role'] + '|>' }}"
    return "{% for message in messages %}" + header + content + end + "{% endfor %}" + PROMPTED


def marked(before: str = "", content: str = "{{ message['content'] }}", stop: str = "<|end|>", after: str = "") -> str:
    """Baton's template with generation marks around some part of the assistant's turns."""
    own = "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    return TEMPLATE.replace(own, before + content + stop + after)


BEGIN, END = "{% generation %}", "{% endgeneration %}"
PROMPTED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CONTENT = "{{ message['content'] }}"
REFUSED = {
    "drops": (turn(""), "drops, repeats or reorders"),
    "repeats": (turn(CONTENT + CONTENT), "drops, repeats or reorders"),
    "changes": (turn("{{ message['content'] | upper }}"), "drops, repeats or reorders"),
    "reorders": (turn(CONTENT).replace("in messages", "in messages | reverse"), "drops, repeats or reorders"),
    "depends": (turn(CONTENT + "<|end|>{{ message['content'] | length }}"), "depends on their contents"),
    "no stop": (turn(CONTENT, "\n"), "not with a control token"),
    "late stop": (turn(CONTENT, " bye<|end|>"), "not with a control token"),
    "other prompt": (TEMPLATE.replace("{{ '<|assistant|>' }}", "<|assistant|> Yes:"), "generation prompt"),
    "no prompt": (TEMPLATE.partition("{% if add_gen")[0], "generation prompt"),
    "raises": ("{{ raise_exception('never') }}", "refuses the turns user, assistant: 'never'"),
    "fails": ("{{ messages + 1 }}", "refuses the turns"),
    "broken": ("\n{% for %}", "is broken: line 2: "),
    "today": ("{{ strftime_now('%d %B %Y') }}" + TEMPLATE, "depends on today's date, strftime_now('%d %B %Y')"),
    "chance": ("{{ ['a', 'b'] | random }}" + TEMPLATE, "depends on chance"),
    "other stop": (
        TEMPLATE.replace("'] + '<|end|>' }}{% endg", "'] + ('<|end|>' if loop.last else '<|pad|>') }}{% endg"),
        "ends assistant turns in different ways",
    ),
    "stop not marked": (marked(BEGIN, after="", stop=END + "<|end|>"), "marks hold 'CONTENT', not the 1 assistant"),
    "nothing marked": (TEMPLATE.replace("== 'assistant'", "== 'bot'"), "marks hold nothing, not the 1 assistant"),
    "last marked": (
        marked("{% if loop.last %}" + BEGIN, after=END + "{% else %}{{ message['content'] }}<|end|>{% endif %}"),
        "marks hold 'CONTENT<|end|>', not the 2 assistant",
    ),
    "header marked": (
        turn(CONTENT).replace("{{ '<|'", BEGIN + "{{ '<|'").replace("{% endfor", END + "{% endfor"),
        "marks hold '<|user|>CONTENT<|end|>",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_template_that_cannot_be_trusted_is_refused(name: str) -> None:
    template, words = REFUSED[name]
    with pytest.raises(ArtifactError) as caught:
        ChatTemplate(wrap(byte_level(SPECIAL_TOKENS), template, "<|end|>"))
    assert words in caught.value.what
    assert caught.value.hint


def test_a_tokenizer_without_a_template_is_refused_with_a_remedy() -> None:
    with pytest.raises(ArtifactError, match="no chat template") as caught:
        ChatTemplate(wrap(byte_level(SPECIAL_TOKENS), None, "<|end|>"))
    assert "chat_template" in caught.value.hint


def test_roles_that_a_template_refuses_are_named() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    ours = ChatTemplate(wrap(byte_level(SPECIAL_TOKENS), strict, "<|end|>"))
    with pytest.raises(ArtifactError, match="system, user: 'no system'"):
        ours.prompt(messages([("system", "Be brief."), ("user", "Hi")]))


def test_the_record_follows_the_tokenizer_and_nothing_else(tokenizer: Any) -> None:
    record = tokenizer_record(tokenizer)
    ChatTemplate(tokenizer).encode(messages(CONVERSATIONS[0]))
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_record(tokenizer) == record
    assert record["stop_id"] == tokenizer.eos_token_id == record["special_ids"]["eos"]
    assert record["vocabulary_size"] == len(tokenizer)
    tokenizer.chat_template += "{# changed #}"
    changed_template = tokenizer_record(tokenizer)
    assert changed_template["chat_template"] != record["chat_template"]
    assert changed_template["digest"] == record["digest"]
    tokenizer.add_tokens(["<tool>"])
    assert tokenizer_record(tokenizer)["digest"] != record["digest"]


def test_a_saved_tokenizer_has_the_same_record(tokenizer: Any, tmp_path: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_record(loaded) == tokenizer_record(tokenizer)


@pytest.mark.parametrize(
    "style",
    [
        marked(BEGIN, after=END + "\n\n"),
        marked(BEGIN, after="{{ '\\n' }}" + END),
        marked(BEGIN, after=END, stop=END + BEGIN + "<|end|>"),
        marked(),
    ],
)
def test_generation_marks_around_the_turn_and_white_space_after_it_are_taken(style: str) -> None:
    ChatTemplate(wrap(byte_level(SPECIAL_TOKENS), style, "<|end|>"))


def test_a_template_for_one_question_is_taken_and_more_are_refused() -> None:
    single = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + TEMPLATE
    template = ChatTemplate(wrap(byte_level(SPECIAL_TOKENS), single, "<|end|>"))
    assert template.encode(messages(CONVERSATIONS[0])).trained.count(True) == len(template.response("In Rome."))
    with pytest.raises(ArtifactError, match="'one question'"):
        template.encode(messages(CONVERSATIONS[2]))


def test_a_date_that_has_a_default_is_the_default_every_day() -> None:
    template, special, end, bos = STYLES["llama"]
    ours = ChatTemplate(wrap(byte_level(special), template, end, bos))
    assert "Today: 26 Jul 2024" in ours.decode(ours.prompt([Message("user", "Hi")]))


def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "chat.jinja", wrap(byte_level(SPECIAL_TOKENS), None, "<|end|>")
    path.write_bytes(b"\xef\xbb\xbf" + ("Caf\u00e9" + TEMPLATE).encode())
    set_template(tokenizer, path)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = ChatTemplate(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"))
    assert loaded.digest == ChatTemplate(tokenizer).digest
    assert loaded.decode(loaded.prompt([Message("user", "Hi")])) == "Caf\u00e9Hi"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b" " * 100_001, "larger than 100 kB"),
        (b"{% for %}", "is broken"),
        (b"{{ strftime_now('%d') }}" + TEMPLATE.encode(), "depends on today's date"),
    ],
)
def test_a_file_that_holds_no_usable_template_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "chat.jinja", wrap(byte_level(SPECIAL_TOKENS), TEMPLATE, "<|end|>")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        set_template(tokenizer, path)
    assert caught.value.where == str(path)
    assert caught.value.hint
    assert tokenizer.chat_template == TEMPLATE


def test_the_template_is_rendered_once_per_sequence_of_roles(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer)
    rendered: list[int] = []
    original = rendering.render
    monkeypatch.setattr(rendering, "render", lambda *given, **kw: rendered.append(1) or original(*given, **kw))
    chats = [messages([("user", f"Is it {n}?"), ("assistant", "No"), ("user", "Why?")]) for n in range(50)]
    assert len({tuple(template.prompt(chat)) for chat in chats}) == len(chats)
    assert len(rendered) == 2
