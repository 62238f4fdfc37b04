"""What a model sees of a row: its tokens as the stages lay them out, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, starmap
from typing import Any, Literal, assert_never

from rich.text import Text as Drawing

from data.findings import EQUAL_TOKENS, NOTHING_TRAINED, TOO_FEW_RESPONSES, TOO_LONG, BadRow
from data.schema import Conversation, Preference, Prompt, Rated, Row, RowKind, Text
from data.spelling import Spelling
from data.template import ChatTemplate
from data.tree import Tree, conversation_tree, preference_tree, prompt_tokens, verdict_tree
from pipeline.terminal import printable

Part = Literal["content", "template", "control"]
"""What a token is: from the row, text that the template writes, or a control token that it or the stage writes."""

PreferenceTree = Callable[[ChatTemplate, Preference, int, int], Tree | str]
"""Makes a tree of a template, a row, its number and the longest length, or names the reason why it cannot."""

LEGEND = "> trained on   {written by the template}   \u2502 between tokens   \u21b5 line break"
STYLES: dict[tuple[Part, bool], str] = {
    ("content", True): "green",
    ("content", False): "",
    ("template", True): "bold green",
    ("template", False): "cyan",
    ("control", True): "bold green",
    ("control", False): "bold cyan",
}
_REASONS = {kind.name: kind for kind in (EQUAL_TOKENS, NOTHING_TRAINED, TOO_FEW_RESPONSES, TOO_LONG)}


@dataclass(frozen=True)
class Token:
    """One token of a row."""

    id: int
    text: str
    """What it stands for; bytes of a character that several tokens share are written as `\\xe4`."""
    trained: bool
    part: Part


@dataclass(frozen=True)
class Passage:
    """A stretch of tokens: the prompt, or one of the branches that follow it."""

    name: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class View:
    """A row as a model sees it: the prompt once, then each branch behind it. A document in blocks has one passage.

    `cut` counts the tokens that the prompt has lost at its beginning, so as to fit `max_length`.
    """

    origin: str
    kind: RowKind
    passages: tuple[Passage, ...]
    cut: int
    max_length: int
    held_out: bool = False
    """Whether the row is kept from training."""

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return sum(len(passage.tokens) for passage in self.passages if passage.name == "prompt")

    @property
    def trained(self) -> int:
        """Tokens that are trained on, over all branches."""
        return sum(token.trained for passage in self.passages for token in passage.tokens)

    @property
    def share(self) -> float:
        """Share of the row's tokens, each branch's counted once, that are trained on."""
        return self.trained / sum(len(passage.tokens) for passage in self.passages)

    @property
    def length(self) -> int:
        """Tokens of the longest path: the prompt and one branch."""
        branches = [len(passage.tokens) for passage in self.passages if passage.name != "prompt"]
        return self.prompt + max(branches, default=0)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        counts = {"prompt": self.prompt, "trained": self.trained, "share": self.share, "length": self.length}
        return asdict(self) | counts


class Viewer:
    """Shows rows with a tokenizer and its chat template.

    Args:
        template: The template.
        max_length: Longest path in tokens; of prompts without a response, what is left for the prompt. Documents in
            blocks are not cut: their blocks do not follow rows.
        tree: What the stage makes of a preference.
        blocks: Whether documents are laid end to end; otherwise each is read alone, from its second token on.
    """

    def __init__(
        self,
        template: ChatTemplate,
        max_length: int,
        *,
        tree: PreferenceTree = preference_tree,
        blocks: bool = True,
    ) -> None:
        self._template = template
        self._max_length = max_length
        self._tree = tree
        self._blocks = blocks
        self._spelling = Spelling(template.tokenizer)

    def view(self, row: Row) -> View:
        """The tokens of a row, made by the functions that the stages use.

        Raises:
            BadRow: Nothing would be trained on, or a stage would leave the row out.
        """
        match row:
            case Text():
                return self._document(row)
            case Conversation():
                return self._conversation(row)
            case Prompt():
                return self._prompt(row)
            case Preference():
                tree = self._tree(self._template, row, 0, self._max_length)
                return self._responses(row, "preference", _usable(tree, row.origin))
            case Rated():
                tree = verdict_tree(self._template, row, 0, self._max_length)
                return self._responses(row, "rated", _usable(tree, row.origin))
            case _:
                assert_never(row)

    def _document(self, row: Text) -> View:
        from data.document_store import encoded

        tokenizer = self._template.tokenizer
        (ids,) = encoded(tokenizer, [row.text])
        if len(ids) < (1 if self._blocks else 2):
            raise BadRow(NOTHING_TRAINED, where=row.origin)
        if not self._blocks:
            return self._alone(row, ids)
        assert tokenizer.eos_token_id is not None
        tokens = [*ids, tokenizer.eos_token_id]
        document = self._passage("document", tokens, [True] * len(tokens), [False] * len(ids) + [True])
        return View(row.origin, "text", (document,), 0, self._max_length)

    def _alone(self, row: Text, ids: Sequence[int]) -> View:
        if len(ids) > self._max_length:
            raise BadRow(TOO_LONG, where=row.origin)
        first, *others = ids
        passages = (
            self._passage("prompt", [first], [False], [False]),
            self._passage("document", others, [True] * len(others), [False] * len(others)),
        )
        return View(row.origin, "text", passages, 0, self._max_length)

    def _conversation(self, row: Conversation) -> View:
        tree = _usable(conversation_tree(self._template, row, 0, self._max_length), row.origin)
        written = self._template.encode(row.messages).written[tree.cut :]
        (branch,) = tree.branches
        start, stop = len(tree.prompt), tree.length
        passages = (
            self._passage("prompt", tree.prompt, [False] * start, written[:start]),
            self._passage("turns", branch.tokens, branch.read, written[start:stop]),
        )
        return View(row.origin, "conversation", passages, tree.cut, self._max_length)

    def _prompt(self, row: Prompt) -> View:
        tokens = prompt_tokens(self._template, row.prompt, self._max_length)
        written = self._template.encode(row.prompt, prompt=True).written
        cut = len(written) - len(tokens)
        passage = self._passage("prompt", tokens, [False] * len(tokens), written[cut:])
        return View(row.origin, "prompt", (passage,), cut, self._max_length)

    def _responses(self, row: Preference | Rated, kind: RowKind, tree: Tree) -> View:
        written = self._template.encode(row.prompt, prompt=True).written[tree.cut :]
        passages = [self._passage("prompt", tree.prompt, [False] * len(tree.prompt), written)]
        for name, branch in zip(_names(row, len(tree.branches)), tree.branches, strict=True):
            # The template writes the stop, the last token of every response.
            stop_only = [False] * (len(branch.tokens) - 1) + [True]
            passages.append(self._passage(name, branch.tokens, branch.read, stop_only))
        return View(row.origin, kind, tuple(passages), tree.cut, self._max_length)

    def _passage(self, name: str, tokens: Sequence[int], trained: Sequence[bool], written: Sequence[bool]) -> Passage:
        return Passage(name, tuple(starmap(self._token, zip(tokens, trained, written, strict=True))))

    def _token(self, token: int, trained: bool, written: bool) -> Token:
        part: Part = "content"
        if written:
            part = "control" if token in self._template.control else "template"
        return Token(token, self._spelling(token), trained, part)


def draw(view: View) -> Drawing:
    """A view for the terminal, as `LEGEND` explains; it can be read without colours."""
    side = ", held out" if view.held_out else ""
    drawing = Drawing(f"{printable(view.origin, None)}: {_totals(view)}{side}\n")
    for passage in view.passages:
        drawing.append(f"{passage.name}\n", "bold")
        if passage.name == "prompt" and view.cut:
            drawing.append(f"  ... {view.cut} tokens cut ...\n", "yellow")
        for trained, tokens in groupby(passage.tokens, lambda token: token.trained):
            for line in _lines(tokens):
                drawing.append("> " if trained else "  ", "green")
                drawing.append_text(line).append("\n")
    return drawing


def _usable(tree: Tree | str, origin: str) -> Tree:
    if isinstance(tree, str):
        raise BadRow(_REASONS[tree], where=origin)
    return tree


def _names(row: Preference | Rated, branches: int) -> list[str]:
    if isinstance(row, Rated):
        return ["good" if row.good else "bad"]
    if branches == 2:
        return ["chosen", "rejected"]
    return [f"response {number}" for number in range(1, branches + 1)]


def _totals(view: View) -> str:
    if view.kind == "text" and not view.prompt:
        return f"{view.length} tokens, laid end to end with other documents in blocks of {view.max_length}"
    trained = f"{view.trained} trained ({view.share:.0%})"
    return f"{view.prompt} prompt, {trained}, length {view.length} of {view.max_length}"


def _lines(tokens: Iterator[Token]) -> Iterator[Drawing]:
    """Tokens, a new line after each that ends with a line break."""
    line, before = Drawing(), ""
    for token in tokens:
        if before == token.part == "content":
            line.append("\u2502", "bright_black")
        line.append(_shown(token), STYLES[token.part, token.trained])
        before = token.part
        if token.text.endswith("\n"):
            yield line
            line, before = Drawing(), ""
    if line:
        yield line


def _shown(token: Token) -> str:
    text = "\u21b5".join(printable(part, None) for part in token.text.split("\n"))
    return text if token.part == "content" else f"{{{text}}}"
