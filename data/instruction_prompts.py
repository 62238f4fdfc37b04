"""Generated prompts with verifiable instructions, for learning to follow them without the prompts of a benchmark.

A prompt is a task about a topic with one to three instructions, of the 25 kinds that IFEval (Zhou et al. 2023,
arXiv 2311.07911) introduced and `reward/instructions.py` checks. As there, half of the prompts have one instruction and
a third have two. Tasks, topics and wordings are not those of IFEval: no prompt shares eight words in a row with the 541
published ones, so their verdicts say what a model learned, not what it remembers.

Tasks ask for little text and numbers are small, so that responses of 50 to 150 tokens can follow the instructions.
Instructions that contradict each other, such as two on the case of letters, are not combined: each kind lays claim to
aspects of the response.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data.schema import Message, Prompt

PART = "instructions"
"""What the source is called: `world:instructions`."""
DEFAULT_ROWS = 2000

Arguments = dict[str, Any]
Instruction = tuple[str, Arguments]
"""How it is worded, and the arguments of its check."""


@dataclass(frozen=True)
class Kind:
    """A kind of instruction: the aspects of a response that it claims, and what makes one."""

    name: str
    claims: frozenset[str]
    make: Callable[[random.Random], Instruction]


TASKS = (
    "Say in a sentence or two what is good about {}.",
    "Make up a slogan for a shop that sells everything for {}.",
    "Text a friend about {}.",
    "Name one reason to care about {}.",
    "Give a tip about {}.",
    "Invent a joke about {}.",
    "Caption a photo of {}.",
    "How would a child describe {}?",
    "Leave a short note for a colleague about {}.",
    "Ask the mayor something about {}.",
    "Sum up the history of {} for somebody in a hurry.",
    "Compose a few verses about {}.",
    "What should a beginner know about {}?",
    "Answer a customer who asks about {}.",
    "Announce something about {} on the local radio.",
    "Describe {} for a travel magazine.",
    "Argue in favour of {}.",
    "Complain about {}.",
    "Plan a small event around {}.",
    "Tell a short story about {}.",
)
TOPICS = (
    "growing tomatoes", "night trains", "a lost umbrella", "baking bread", "repairing bicycles", "keeping bees",
    "winter swimming", "chess in the park", "the local library", "old maps", "street music", "learning the violin",
    "saving water", "painting a fence", "sharing a kitchen", "a school play", "mountain huts", "ferry crossings",
    "wild mushrooms", "a second-hand market", "photographing birds", "collecting stamps", "solar panels",
    "a family reunion", "folding paper cranes", "crossing a desert", "a broken elevator", "harvest festivals",
    "lighthouse keepers", "morning exercises", "tea ceremonies", "community gardens", "moving to another city",
    "knitting socks", "watching comets", "a rainy weekend", "public benches", "the first day at work", "roller skating",
    "city foxes", "cooking for twenty guests", "learning to whistle", "hand-written letters", "the smell of old books",
    "cleaning a river", "a power cut", "cheap restaurants", "a talking parrot", "flying kites", "cable cars",
    "clay pottery", "sleeping in a tent", "the price of coffee", "sea shells", "electric scooters", "a village choir",
    "pet turtles", "model railways", "the last bus home", "sunflower fields", "apple cider", "long staircases",
)  # fmt: skip
CLAIMS = (
    "owls can turn their heads very far", "honey keeps for years", "a whale is a fish", "glass is made of sand",
    "bananas grow on trees", "ice is heavier than water", "spiders are insects", "paper was invented in China",
    "tomatoes are fruit", "the moon gives off light of its own", "bats are blind", "chalk contains shells",
)  # fmt: skip
WORDS = (
    "amber", "anchor", "basket", "blanket", "bridge", "candle", "carpet", "castle", "cloud", "copper", "curtain",
    "drawer", "engine", "feather", "forest", "garden", "glove", "hammer", "harbour", "island", "jacket", "kettle",
    "ladder", "lantern", "marble", "meadow", "mirror", "needle", "orchard", "paddle", "pepper", "pillow", "pocket",
    "quarry", "ribbon", "river", "saddle", "shadow", "silver", "spoon", "stone", "summer", "tunnel", "velvet",
    "village", "violet", "wagon", "whistle", "window", "winter",
)  # fmt: skip
COMMON_WORDS = ("good", "great", "people", "time", "make", "many", "world", "new", "day", "help", "like", "well")
ENDINGS = (
    "That is all for now.", "See you next spring.", "What would you add?", "Now it is your turn.",
    "Thanks for reading.", "The rest is up to you.", "Please write back soon.", "And there the story ends.",
    "Let me know how it goes.",
)  # fmt: skip
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "de": "German", "es": "Spanish", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "hi": "Hindi", "it": "Italian", "ko": "Korean", "nl": "Dutch", "pl": "Polish",
    "pt": "Portuguese", "ru": "Russian", "sw": "Swahili", "th": "Thai", "tr": "Turkish", "ur": "Urdu",
    "vi": "Vietnamese",
}  # fmt: skip
SPLITTERS = ("Part", "Chapter", "Step", "Day", "Scene")


def generate(rows: int, seed: int) -> Iterator[Prompt]:
    """So many prompts, each with the facts `instruction_id_list` and `kwargs`."""
    chance = random.Random(f"{PART} {seed}")
    for number in range(rows):
        yield _generated(chance, f"world:{PART}:{number + 1}")


def _generated(chance: random.Random, origin: str) -> Prompt:
    drawn = _kinds(chance)
    if drawn == [ANSWER]:
        wording, arguments = ANSWER.make(chance)
        return _prompt(f"Is it true that {chance.choice(CLAIMS)}? {wording}", {ANSWER.name: arguments}, origin)
    text, of_kind = chance.choice(TASKS).format(chance.choice(TOPICS)), {}
    for kind in drawn:
        if kind is not REPETITION:
            wording, of_kind[kind.name] = kind.make(chance)
            text = f"{text} {wording}"
    if REPETITION in drawn:
        wording, _ = REPETITION.make(chance)
        of_kind[REPETITION.name] = {"prompt_to_repeat": text}
        text = f"{text}\n\n{wording}"
    return _prompt(text, of_kind, origin)


def _kinds(chance: random.Random) -> list[Kind]:
    """One to three kinds that do not claim the same aspect of the response. A fixed answer leaves room for no other."""
    drawn: list[Kind] = []
    number = chance.choices((1, 2, 3), (0.55, 0.33, 0.12))[0]
    for kind in chance.sample(KINDS, len(KINDS)):
        if kind is ANSWER and not drawn:
            return [ANSWER]
        if kind is not ANSWER and len(drawn) < number and all(kind.claims.isdisjoint(other.claims) for other in drawn):
            drawn.append(kind)
    return drawn


def _prompt(text: str, of_kind: dict[str, Arguments], origin: str) -> Prompt:
    facts = {"instruction_id_list": list(of_kind), "kwargs": list(of_kind.values())}
    return Prompt((Message("user", text),), facts, origin)


def _fixed(*wordings: str) -> Callable[[random.Random], Instruction]:
    """An instruction without arguments."""
    return lambda chance: (chance.choice(wordings), {})


def _number(argument: str, least: int, most: int, *wordings: str) -> Callable[[random.Random], Instruction]:
    """An instruction with one number."""

    def make(chance: random.Random) -> Instruction:
        number = chance.randint(least, most)
        return chance.choice(wordings).format(number), {argument: number}

    return make


def _limit(
    argument: str, relation: str, at_least: tuple[int, int], less_than: tuple[int, int], what: str, *wordings: str
) -> Callable[[random.Random], Instruction]:
    """An instruction with a lower or an upper limit for a number of `what`; `wordings` hold the amount as `{}`."""

    def make(chance: random.Random) -> Instruction:
        if chance.random() < 0.5:
            number = chance.randint(*at_least)
            amount = chance.choice(("at least {} {}", "{} {} or more", "no fewer than {} {}")).format(number, what)
            return chance.choice(wordings).format(amount), {argument: number, relation: "at least"}
        number = chance.randint(*less_than)
        amount = chance.choice(
            (f"fewer than {number} {what}", f"less than {number} {what}", f"at most {number - 1} {what}")
        )
        return chance.choice(wordings).format(amount), {argument: number, relation: "less than"}

    return make


def _keywords(chance: random.Random) -> Instruction:
    words = chance.sample(WORDS, chance.randint(1, 3))
    quoted = _listed(words, chance)
    wordings = ("Mention {}.", "Work {} into the text.", "The text has to contain {}.", "Use the keywords {}.")
    return chance.choice(wordings).format(quoted), {"keywords": words}


def _keyword_frequency(chance: random.Random) -> Instruction:
    word, times = chance.choice(WORDS), chance.randint(1, 4)
    if chance.random() < 0.75:
        wording = chance.choice(
            ("Use the word {word} {times} or more.", "The word {word} has to come up at least {times}.")
        )
        relation = "at least"
    else:
        times = max(times, 2)
        wording, relation = "The word {word} may come up, but fewer than {times}.", "less than"
    counted = "one time" if times == 1 else f"{times} times"
    text = wording.format(word=_quoted(word, chance), times=counted)
    return text, {"keyword": word, "frequency": times, "relation": relation}


def _forbidden_words(chance: random.Random) -> Instruction:
    words = chance.sample(COMMON_WORDS, chance.randint(1, 3))
    wordings = ("Avoid {}.", "Do without {}.", "Never say {}.", "The text must not contain {}.")
    return chance.choice(wordings).format(_listed(words, chance)), {"forbidden_words": words}


def _letter_frequency(chance: random.Random) -> Instruction:
    letter = chance.choice("abcdefghiklmnoprstuwyjqvxz")
    if chance.random() < 0.6:
        times = chance.randint(3, 20)
        text = chance.choice(("Use the letter {} {} times or more.", "Let the letter {} occur at least {} times."))
        relation = "at least"
    else:
        times = chance.randint(1, 6)
        text = chance.choice(("Use the letter {} fewer than {} times.", "Let the letter {} occur less than {} times."))
        relation = "less than"
        if times == 1:
            text = "Leave out the letter {} completely."
    return text.format(letter, times), {"letter": letter, "let_frequency": times, "let_relation": relation}


def _language(chance: random.Random) -> Instruction:
    code = chance.choice(list(LANGUAGES))
    wordings = ("Reply in {}.", "The whole text should be in {}.", "Use no language other than {}.")
    return chance.choice(wordings).format(LANGUAGES[code]), {"language": code}


def _first_word(chance: random.Random) -> Instruction:
    paragraphs, word = chance.randint(2, 4), chance.choice(WORDS)
    place = chance.randint(1, paragraphs)
    wordings = (
        "Write {0} paragraphs with an empty line between them, and begin paragraph {1} with the word {2}.",
        "The text has {0} paragraphs, set apart by blank lines; number {1} opens with {2}.",
    )
    text = chance.choice(wordings).format(paragraphs, place, _quoted(word, chance))
    return text, {"num_paragraphs": paragraphs, "nth_paragraph": place, "first_word": word}


def _postscript(chance: random.Random) -> Instruction:
    marker = chance.choice(("P.S.", "P.P.S"))
    wordings = ("Add a postscript that begins with {}", "After the text, put a postscript marked {}")
    return chance.choice(wordings).format(marker), {"postscript_marker": marker}


def _ending(chance: random.Random) -> Instruction:
    phrase = chance.choice(ENDINGS)
    wordings = (
        'The last words have to be "{}" and nothing may follow them.',
        'Close with "{}" and write nothing after it.',
        "Stop right after saying: {}",
    )
    return chance.choice(wordings).format(phrase), {"end_phrase": phrase}


def _sections(chance: random.Random) -> Instruction:
    number, mark = chance.randint(2, 4), chance.choice(SPLITTERS)
    wordings = (
        "Divide the text into {1} numbered sections, headed {0} 1, {0} 2 and so on.",
        "Use {1} headings: {0} 1 up to {0} {1}.",
    )
    return chance.choice(wordings).format(mark, number), {"section_spliter": mark, "num_sections": number}


def _quoted(word: str, chance: random.Random) -> str:
    return chance.choice((f'"{word}"', f"'{word}'", word))


def _listed(words: list[str], chance: random.Random) -> str:
    mark = chance.choice(('"', "'", ""))
    *others, last = [f"{mark}{word}{mark}" for word in words]
    return f"{', '.join(others)} and {last}" if others else last


REPETITION = Kind(
    "combination:repeat_prompt",
    frozenset({"start", "case", "language", "layout", "end", "commas", "words", "letters", "length"}),
    _fixed(
        "Start by copying everything above word for word, then respond to it.",
        "Say the above once more, exactly as it stands, and only then respond.",
        "Your reply begins with an exact copy of this request. The response comes after the copy.",
    ),
)
ANSWER = Kind(
    "detectable_format:constrained_response",
    frozenset(),
    _fixed(
        'Say "My answer is yes." if so, "My answer is no." if not, and "My answer is maybe." if it depends.',
        'Reply with "My answer is yes." or with "My answer is no." or with "My answer is maybe."',
    ),
)
KINDS = (
    REPETITION,
    ANSWER,
    Kind("keywords:existence", frozenset({"words"}), _keywords),
    Kind("keywords:frequency", frozenset({"words"}), _keyword_frequency),
    Kind("keywords:forbidden_words", frozenset({"words"}), _forbidden_words),
    Kind("keywords:letter_frequency", frozenset({"letters", "language", "words", "start", "end"}), _letter_frequency),
    Kind("language:response_language", frozenset({"language", "words", "case", "end"}), _language),
    Kind(
        "length_constraints:number_sentences",
        frozenset({"length"}),
        _limit(
            "num_sentences", "relation", (2, 8), (3, 7), "sentences",
            "Write {}.", "The text should have {}.", "Keep it to {}.", "Stick to {} in total.",
        ),
    ),
    Kind(
        "length_constraints:number_words",
        frozenset({"length"}),
        _limit(
            "num_words", "relation", (30, 140), (20, 90), "words",
            "Write {}.", "The text should have {}.", "Aim for a length of {}.", "It takes {} to pass.",
        ),
    ),
    Kind(
        "length_constraints:number_paragraphs",
        frozenset({"layout"}),
        _number(
            "num_paragraphs", 2, 4,
            "Write exactly {} paragraphs and set them apart with the markdown divider ***",
            "The text consists of {} paragraphs with *** between them.",
            "Split it into {} parts by lines of three asterisks (***).",
        ),
    ),
    Kind("length_constraints:nth_paragraph_first_word", frozenset({"layout", "start"}), _first_word),
    Kind(
        "detectable_content:number_placeholders",
        frozenset({"placeholders", "language"}),
        _number(
            "num_placeholders", 1, 5,
            "Leave {} or more blanks in square brackets, like [date] or [place].",
            "There have to be at least {} fields to fill in, written as [field].",
        ),
    ),
    Kind("detectable_content:postscript", frozenset({"end"}), _postscript),
    Kind(
        "detectable_format:number_bullet_lists",
        frozenset({"bullets", "start"}),
        _number(
            "num_bullets", 2, 6,
            "Put it into exactly {} bullet points that start with *",
            "Use precisely {} bullets, no more and no fewer, each on a line like: * first point",
            "The reply is a list of {} markdown bullets.",
        ),
    ),
    Kind(
        "detectable_format:number_highlighted_sections",
        frozenset({"highlights"}),
        _number(
            "num_highlights", 1, 4,
            "Emphasise {} or more passages in markdown, *like this one*.",
            "Put asterisks around at least {} phrases to highlight them, as in *phrase*.",
        ),
    ),
    Kind("detectable_format:multiple_sections", frozenset({"layout", "case"}), _sections),
    Kind(
        "detectable_format:json_format",
        frozenset({"layout", "start", "end", "bullets", "highlights", "language"}),
        _fixed(
            "Give the whole reply as JSON.", "Reply with a single JSON object and nothing else.",
            "The complete reply has to be valid JSON; markdown ticks around it are fine.",
        ),
    ),
    Kind(
        "detectable_format:title",
        frozenset({"title"}),
        _fixed(
            "Put a title in double angle brackets above it, as in <<some title>>.",
            "Give it a heading of the form <<heading>>.", "Its title stands between << and >>.",
        ),
    ),
    Kind(
        "combination:two_responses",
        frozenset({"layout", "start", "length"}),
        _fixed(
            "Give me two versions with ****** between them.",
            "I want two replies that differ. Put six asterisks (******) between the first and the second.",
        ),
    ),
    Kind("startend:end_checker", frozenset({"end", "case"}), _ending),
    Kind(
        "startend:quotation",
        frozenset({"start"}),
        _fixed(
            "Put double quotes around the whole text.", 'The reply opens with " and closes with " as well.',
            "Everything you say should stand between double quotation marks.",
        ),
    ),
    Kind(
        "change_case:capital_word_frequency",
        frozenset({"case"}),
        _limit(
            "capital_frequency", "capital_relation", (1, 5), (2, 6), "words",
            "Write {} entirely in capitals.", "Let {} be in ALL CAPS.",
        ),
    ),
    Kind(
        "change_case:english_capital",
        frozenset({"case", "language"}),
        _fixed(
            "Use capital letters only, and English.", "Write everything in English and in upper case.",
            "SHOUT: every letter of the English text is a capital.",
        ),
    ),
    Kind(
        "change_case:english_lowercase",
        frozenset({"case", "language"}),
        _fixed(
            "Use small letters only, and English.", "Write everything in English and in lower case.",
            "Not a single letter of the English text may be a capital.",
        ),
    ),
    Kind(
        "punctuation:no_comma",
        frozenset({"commas"}),
        _fixed(
            "Leave out commas altogether.", "Get by without a single comma.", "There must be no comma anywhere in it.",
            "Commas are forbidden.",
        ),
    ),
)  # fmt: skip
"""All kinds, each drawn as often as the others where nothing contradicts."""
