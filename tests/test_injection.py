"""No text of any row becomes a control token: in every role, on every way from row to tokens, for every marker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from test_template import CHATML, CHATML_TOKENS, byte_level, wrap
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.document_store import encoded
from data.schema import ChatRole, Conversation, Message, Preference, Text
from data.template import SPECIAL_TOKENS, TEMPLATE, ChatTemplate
from data.tree import Tree, conversation_tree, preference_tree, prompt_tokens
from stages.core.documents import text_trees

ROOM = 10**6
ROLES: tuple[ChatRole, ...] = ("system", "user", "assistant")
LISTED = (
    "<s> </s> <unk> <pad> <mask> <bos> <eos> [INST] [/INST] <<SYS>> <</SYS>> [CLS] [SEP] [PAD] [UNK] [MASK] "
    "<|endoftext|> <|im_start|> <|im_end|> <|im_sep|> <|end|> <|system|> <|user|> <|assistant|> <|pad|> "
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> "
    "<|finetune_right_pad_id|> <|reserved_special_token_0|> <|begin|> <|start_header|> <|end_header|> <|eot|> "
    "<start_of_turn> <end_of_turn> <|start|> <|message|> <|channel|> <|return|> <|call|> <|constrain|> "
    "[TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [SYSTEM_PROMPT] [IMG] [PREFIX] [SUFFIX] "
    "<think> </think> <tool_call> </tool_call> <tool_response> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> "
    "<|vision_start|> <|image_pad|> <|object_ref_start|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> "
    "<|CHATBOT_TOKEN|> <\uff5cbegin\u2581of\u2581sentence\uff5c> <\uff5cUser\uff5c> <\uff5cAssistant\uff5c> "
    "<|endofprompt|> <|startoftext|> <|separator|> <|tool|> <tool>"
)
WELL_KNOWN = LISTED.split()
PLAIN = "Ann"


def with_added(backend: Tokenizer, special: list[str]) -> Tokenizer:
    """Half of the well-known markers as special tokens, half as added ones, some of which are normalised."""
    rest = [marker for marker in WELL_KNOWN if marker not in special]
    backend.add_special_tokens(rest[::2])
    backend.add_tokens([AddedToken(marker, normalized=place % 2 == 1) for place, marker in enumerate(rest[1::2])])
    backend.add_tokens([AddedToken("<lone>", single_word=True, lstrip=True, rstrip=True), AddedToken("Rome")])
    return backend


def baton() -> PreTrainedTokenizerFast:
    return wrap(byte_level(SPECIAL_TOKENS), TEMPLATE, "<|end|>")


def chatml() -> PreTrainedTokenizerFast:
    return wrap(with_added(byte_level(CHATML_TOKENS), CHATML_TOKENS), CHATML, "<|im_end|>")


def lower_case() -> PreTrainedTokenizerFast:
    backend = with_added(byte_level(CHATML_TOKENS), CHATML_TOKENS)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return wrap(backend, CHATML, "<|im_end|>")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """A Unigram model with marks for spaces, whose markers are also words of the model, and which folds widths."""
    words = ["<unk>", *SPECIAL_TOKENS, *(marker for marker in WELL_KNOWN if marker not in [*SPECIAL_TOKENS, "<unk>"])]
    letters = {letter for word in [*words, PLAIN, "a b Rome assistant user system ab <lone>"] for letter in word}
    pieces = [*((word, 0.0) for word in words), *((letter, -5.0) for letter in sorted(letters)), ("\u2581", -5.0)]
    seen: dict[str, float] = {}
    for piece, score in pieces:
        seen.setdefault(piece, score)
    backend = Tokenizer(models.Unigram(list(seen.items()), unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<unk>", *SPECIAL_TOKENS])
    tokenizer = wrap(with_added(backend, ["<unk>", *SPECIAL_TOKENS]), TEMPLATE, "<|end|>")
    tokenizer.unk_token = "<unk>"
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    each.__name__: each for each in (baton, chatml, lower_case, sentence_pieces)
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(TOKENIZERS[request.param]())


def markers(template: ChatTemplate) -> list[str]:
    own = [token.content for token in template.tokenizer.added_tokens_decoder.values()]
    return sorted({*own, *WELL_KNOWN})


def wide(marker: str) -> str:
    """The marker in characters of full width, which some normalisers fold."""
    return "".join(chr(ord(each) + 0xFEE0) if "!" <= each <= "~" else each for each in marker)


def hostile(template: ChatTemplate) -> Iterator[str]:
    """Contents with markers: alone, amid words, doubled, nested, in other characters, and all of them in a row."""
    for marker in markers(template):
        half = len(marker) // 2
        yield from (marker, f"a {marker} b", f" {marker}\n", f"a{marker}{marker}b", wide(marker), marker.upper())
        yield marker[:half] + marker + marker[half:]
    yield "".join(markers(template))
    yield " ".join(markers(template)) * 3


def control(template: ChatTemplate, tokens: list[int]) -> int:
    """Control tokens among tokens; what unknown characters become is none."""
    tokenizer = template.tokenizer
    added = tokenizer.added_tokens_decoder.keys() - {tokenizer.unk_token_id}
    return sum(token in added for token in tokens)


def flat(tree: Tree | str) -> list[int]:
    assert isinstance(tree, Tree), tree
    return [*tree.prompt, *(token for branch in tree.branches for token in branch.tokens)]


def chat(content: str, attacked: ChatRole) -> tuple[Message, ...]:
    return tuple(Message(role, content if role == attacked else PLAIN) for role in ROLES)


def of_conversation(template: ChatTemplate, content: str, attacked: ChatRole) -> list[int]:
    return flat(conversation_tree(template, Conversation(chat(content, attacked)), 0, ROOM))


def of_preference(template: ChatTemplate, content: str, attacked: ChatRole) -> list[int]:
    *prompt, response = chat(content, attacked)
    row = Preference(tuple(prompt), (response.content, response.content + " b", "a"))
    return flat(preference_tree(template, row, 0, ROOM))


def of_prompt(template: ChatTemplate, content: str, attacked: ChatRole) -> list[int]:
    """The history of a prompt holds an answer, too."""
    return list(prompt_tokens(template, (*chat(content, attacked), Message("user", "a")), ROOM))


WAYS = {"conversation": of_conversation, "preference": of_preference, "prompt": of_prompt}


@pytest.mark.parametrize("attacked", ROLES)
@pytest.mark.parametrize("way", list(WAYS))
def test_no_content_adds_a_control_token(way: str, attacked: ChatRole, template: ChatTemplate) -> None:
    own = control(template, WAYS[way](template, PLAIN, attacked))
    assert own > 0
    extra = {
        content: found - own
        for content in hostile(template)
        if (found := control(template, WAYS[way](template, content, attacked))) != own
    }
    assert extra == {}


def test_no_document_holds_a_control_token(template: ChatTemplate) -> None:
    documents = [PLAIN, *hostile(template)]
    found = zip(documents, encoded(template.tokenizer, documents), strict=True)
    assert {text: count for text, ids in found if (count := control(template, list(ids)))} == {}


def test_text_of_an_evaluation_has_the_tokens_of_training(template: ChatTemplate) -> None:
    documents = [PLAIN, *hostile(template)]
    trees = text_trees(template.tokenizer, [Text(text) for text in documents], ROOM)
    trained = encoded(template.tokenizer, documents)
    assert {tree.number: flat(tree) for tree in trees} == {
        number: list(ids) for number, ids in enumerate(trained) if len(ids) > 1
    }
    assert {documents[tree.number] for tree in trees if control(template, flat(tree))} == set()


def test_text_that_does_not_fit_an_evaluation_is_left_out(template: ChatTemplate) -> None:
    short, long = Text("Ann, a b"), Text("Ann, a b" * 40)
    (tree,) = text_trees(template.tokenizer, [long, short], 40)
    assert (tree.number, len(tree.prompt)) == (1, 1)


def test_for_batons_own_tokenizer_it_is_enough_not_to_split_special_tokens() -> None:
    template = ChatTemplate(baton())
    documents = ["Where is Ann? \u00e9\u4e16 ", *hostile(template)]
    by_transformers = template.tokenizer(documents, add_special_tokens=False, split_special_tokens=True)
    trees = text_trees(template.tokenizer, [Text(text) for text in documents], ROOM)
    assert [flat(tree) for tree in trees] == by_transformers["input_ids"]


def test_the_attack_would_succeed_without_the_defence(template: ChatTemplate) -> None:
    tokenizer = template.tokenizer
    attacks = [content for content in hostile(template) if control(template, tokenizer.encode(content)) > 0]
    assert len(attacks) >= len(tokenizer.added_tokens_decoder)
