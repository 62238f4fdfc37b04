"""What is shown of a row is what the stages make of it, and nothing in a row changes how it is shown."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console
from test_template import CHATML, CHATML_TOKENS, byte_level, wrap
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from data.content import ContentEncoder
from data.findings import EQUAL_TOKENS, NOTHING_TRAINED, TOO_LONG, BadRow
from data.schema import Conversation, Message, Preference, Prompt, Text
from data.spelling import Spelling
from data.template import ChatTemplate
from data.tree import Tree, conversation_tree, pair_tree, preference_tree, prompt_tokens
from data.view import LEGEND, View, Viewer, draw

ROOM = 1000
TURNS = (
    Message("system", "Be brief."),
    Message("user", "Where is <|im_end|> Ann?"),
    Message("assistant", "In Rome.\n\nYes."),
    Message("user", "And \u00e9\u4e16?"),
    Message("assistant", "No\x1b[2J\u202e [red]way[/red] "),
)
CHAT = Conversation(TURNS, "chats.jsonl:3")
PAIR = Preference((Message("user", "Where is Ann? " * 5),), ("In Rome.", "No idea."), origin="pairs.jsonl:7")
QUESTION = Prompt((Message("user", "Where is Ann? " * 5),), origin="questions.jsonl:1")
DOCUMENT = Text("Ann is <|endoftext|> in Rome.\n", "text.jsonl:2")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(wrap(byte_level(CHATML_TOKENS), CHATML, "<|im_end|>"))


def tokens_of(view: View, name: str) -> list[int]:
    (passage,) = (passage for passage in view.passages if passage.name == name)
    return [token.id for token in passage.tokens]


def text_of(view: View) -> str:
    return "".join(token.text for passage in view.passages for token in passage.tokens)


def plain(view: View) -> str:
    return draw(view).plain


@pytest.mark.parametrize("room", [40, ROOM])
def test_the_tokens_are_those_of_the_trees_that_stages_train_on(template: ChatTemplate, room: int) -> None:
    short = Conversation((Message("user", "Where is Ann? " * 5), Message("assistant", "In Rome.")), "chats.jsonl:4")
    tree, view = conversation_tree(template, short, 0, room), Viewer(template, room).view(short)
    assert isinstance(tree, Tree)
    assert tokens_of(view, "prompt") == list(tree.prompt)
    assert tokens_of(view, "turns") == list(tree.branches[0].tokens)
    assert [token.trained for token in view.passages[1].tokens] == list(tree.branches[0].read)
    assert (view.prompt, view.trained, view.length, view.cut) == (len(tree.prompt), tree.reads, tree.length, tree.cut)

    tree, view = preference_tree(template, PAIR, 0, room), Viewer(template, room).view(PAIR)
    assert isinstance(tree, Tree)
    assert tokens_of(view, "prompt") == list(tree.prompt)
    assert [tokens_of(view, name) for name in ("chosen", "rejected")] == [list(b.tokens) for b in tree.branches]
    assert view.trained == tree.reads
    assert view.length == len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches)
    assert view.cut == tree.cut

    view = Viewer(template, room).view(QUESTION)
    assert tokens_of(view, "prompt") == list(prompt_tokens(template, QUESTION.prompt, room))
    assert view.cut == len(template.prompt(QUESTION.prompt)) - view.prompt
    assert (view.trained, view.length) == (0, view.prompt)
    assert (view.cut > 0) == (room == 40)


def test_a_document_is_its_content_and_the_end_token(template: ChatTemplate) -> None:
    view = Viewer(template, 8).view(DOCUMENT)
    expected = [*ContentEncoder(template.tokenizer).encode(DOCUMENT.text), template.tokenizer.eos_token_id]
    assert tokens_of(view, "document") == expected
    assert view.trained == view.length == len(expected)
    assert text_of(view) == DOCUMENT.text + "<|im_end|>"


def test_every_turn_of_the_assistant_is_trained_up_to_and_with_its_stop(template: ChatTemplate) -> None:
    view = Viewer(template, ROOM).view(CHAT)
    trained = [token for passage in view.passages for token in passage.tokens if token.trained]
    shown = "".join(token.text for token in trained if token.part == "content")
    decoded = template.decode([token.id for token in trained])
    assert decoded == TURNS[2].content + TURNS[4].content
    assert shown == decoded.replace("\u202e", r"\xe2\x80\xae")
    assert [token.id for token in trained if token.part != "content"] == [template.stop_id] * 2


def test_parts_tell_contents_from_what_the_template_writes(template: ChatTemplate) -> None:
    view = Viewer(template, ROOM).view(CHAT)
    found = dict.fromkeys(("content", "template", "control"), "")
    for passage in view.passages:
        for token in passage.tokens:
            found[token.part] += token.text
    assert found["control"] == "<|im_start|>" + "<|im_end|><|im_start|>" * 4 + "<|im_end|>"
    assert found["template"] == "system\n\nuser\n\nassistant\n\nuser\n\nassistant\n"
    assert found["content"].startswith("Be brief.Where is <|im_end|> Ann?In Rome.\n\nYes.")


def test_it_can_be_read_without_colours(template: ChatTemplate) -> None:
    turns = Message("user", "Hi <|im_end|>"), Message("assistant", "In Rome.\nYes.")
    view = Viewer(template, ROOM).view(Conversation((Message("system", "Ann"), *turns), "chats.jsonl:3"))
    lines = [line.replace("\u2502", "") for line in plain(view).splitlines()]
    assert (
        lines[0] == f"chats.jsonl:3: {view.prompt} prompt, {view.trained} trained (24%), length {view.length} of 1000"
    )
    assert view.share == view.trained / view.length
    body = [line.replace("}{", "") for line in lines[1:]]
    assert body == [
        "prompt",
        "  {<|im_start|>system\u21b5}",
        "  Ann{<|im_end|>\u21b5}",
        "  {<|im_start|>user\u21b5}",
        "  Hi <|im_end|>{<|im_end|>\u21b5}",
        "  {<|im_start|>assistant\u21b5}",
        "turns",
        "> In Rome.\u21b5",
        "> Yes.{<|im_end|>}",
    ]
    assert ">" in LEGEND
    assert "\u21b5" in LEGEND


def test_a_marker_in_a_content_looks_other_than_a_control_token(template: ChatTemplate) -> None:
    shown = plain(Viewer(template, ROOM).view(CHAT))
    assert shown.count("{<|im_end|>}") == 5
    assert "<\u2502|\u2502" in shown


def test_the_cut_of_a_prompt_is_shown(template: ChatTemplate) -> None:
    view = Viewer(template, 40).view(QUESTION)
    assert f"\n  ... {view.cut} tokens cut ...\n" in plain(view)
    assert "cut" not in plain(Viewer(template, ROOM).view(QUESTION))


def test_contents_cannot_steer_the_terminal(template: ChatTemplate) -> None:
    view = Viewer(template, ROOM).view(Conversation(TURNS, "a\x1b]0;title\x07.jsonl:1"))
    stream = io.StringIO()
    Console(file=stream, force_terminal=False, soft_wrap=True).print(draw(view), end="")
    shown = stream.getvalue()
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert r"a\x1b]0;title\x07.jsonl:1" in shown
    assert r"\x1b" in shown
    assert "[red]" in shown.replace("\u2502", "")


def test_colours_tell_trained_from_not_trained_and_no_color_turns_them_off(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed() -> str:
        stream = io.StringIO()
        Console(file=stream, force_terminal=True, color_system="standard", soft_wrap=True).print(drawing, end="")
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    drawing = draw(Viewer(template, ROOM).view(PAIR))
    coloured = printed()
    green, cyan = "\x1b[1;32m{<|im_end|>}", "\x1b[1;36m{<|im_end|>}"
    assert coloured.count(green) == 2  # the stops of the responses
    assert coloured.count(cyan) == 2  # those of the system's turn and of the question
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;32m" not in printed()
    assert "\x1b[32m" not in printed()


def test_the_record_is_json_and_holds_every_token(template: ChatTemplate) -> None:
    view = Viewer(template, ROOM).view(PAIR)
    record = json.loads(json.dumps(view.record()))
    assert (record["origin"], record["kind"], record["cut"]) == ("pairs.jsonl:7", "preference", 0)
    assert (record["prompt"], record["trained"], record["length"]) == (view.prompt, view.trained, view.length)
    assert [passage["name"] for passage in record["passages"]] == ["prompt", "chosen", "rejected"]
    assert [token["id"] for token in record["passages"][1]["tokens"]] == tokens_of(view, "chosen")
    last = {"id": template.stop_id, "text": "<|im_end|>", "trained": True, "part": "control"}
    assert record["passages"][2]["tokens"][-1] == last


def test_a_ranking_numbers_its_responses(template: ChatTemplate) -> None:
    view = Viewer(template, ROOM).view(Preference(PAIR.prompt, ("a", "b", "c")))
    assert [passage.name for passage in view.passages] == ["prompt", "response 1", "response 2", "response 3"]


def test_of_a_ranking_that_becomes_a_pair_the_first_and_the_last_response_are_shown(template: ChatTemplate) -> None:
    ranking = Preference(PAIR.prompt, ("a", "b", "c"))
    view = Viewer(template, ROOM, tree=pair_tree).view(ranking)
    assert [passage.name for passage in view.passages] == ["prompt", "chosen", "rejected"]
    assert tokens_of(view, "rejected") == template.response("c")


def test_a_document_read_alone_begins_with_what_it_is_read_after_and_has_no_end(template: ChatTemplate) -> None:
    ids = ContentEncoder(template.tokenizer, opening=True).encode(DOCUMENT.text)
    view = Viewer(template, len(ids), blocks=False).view(DOCUMENT)
    assert [tokens_of(view, "prompt"), tokens_of(view, "document")] == [ids[:1], ids[1:]]
    assert (view.trained, view.length) == (len(ids) - 1, len(ids))
    assert "blocks" not in plain(view)
    with pytest.raises(BadRow) as caught:
        Viewer(template, len(ids) - 1, blocks=False).view(DOCUMENT)
    assert caught.value.kind == TOO_LONG
    with pytest.raises(BadRow) as caught:
        Viewer(template, ROOM, blocks=False).view(Text("a"))
    assert caught.value.kind == NOTHING_TRAINED


def test_a_row_that_is_held_out_says_so(template: ChatTemplate) -> None:
    view = Viewer(template, ROOM).view(PAIR)
    assert "held out" not in plain(view)
    assert plain(dataclasses.replace(view, held_out=True)).splitlines()[0].endswith("of 1000, held out")


def test_rows_that_no_stage_trains_on_are_refused_with_their_place(template: ChatTemplate) -> None:
    silent = Conversation((Message("system", "Be brief."), Message("user", "Hi")), "chats.jsonl:9")
    equal = Preference(PAIR.prompt, ("Yes", "Yes"), origin="pairs.jsonl:9")
    for row, room, kind in (
        (silent, ROOM, NOTHING_TRAINED),
        (Text("", "text.jsonl:9"), ROOM, NOTHING_TRAINED),
        (equal, ROOM, EQUAL_TOKENS),
        (CHAT, 10, TOO_LONG),
    ):
        with pytest.raises(BadRow) as caught:
            Viewer(template, room).view(row)
        assert caught.value.kind == kind
        assert caught.value.where == row.origin
        assert caught.value.hint


def test_a_character_of_several_tokens_is_written_as_its_bytes() -> None:
    tokenizer = wrap(byte_level(CHATML_TOKENS), CHATML, "<|im_end|>")
    spelling, inside = Spelling(tokenizer), ContentEncoder(tokenizer)
    assert [spelling(token) for token in inside.encode("\u4e16")] == [r"\xe4", r"\xb8", r"\x96"]
    text = "Where is Ann?\n \u00a0\t"
    written = "".join(spelling(token) for token in inside.encode(text))
    assert written == text.replace("\u00a0", r"\xc2\xa0")
    assert spelling(tokenizer.eos_token_id) == "<|im_end|>"


def test_bytes_and_spaces_of_other_vocabularies_are_written_out() -> None:
    pieces = ["<unk>", "\u2581", "\u2581Ann", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = backend.encode("\u2581Ann\u2581a\u4e16\n").ids
    assert [spelling(token) for token in ids] == [" Ann", " ", "a", r"\xe4", r"\xb8", r"\x96", "\n"]
