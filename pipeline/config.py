"""The configuration: one small model per stage kind, and the only place where defaults live.

A run is a mapping of named data sources and a mapping of named stages. A stage names its inputs by role: a stage of
the same run, a path to a stage directory, a model directory, or `hub:owner/name@revision`. Field docstrings are the
reference: `baton schema` prints them. Paths are relative to the working directory.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StrictBool, StrictInt, Tag, model_validator

from pipeline import gate
from pipeline.figures import NAME, SETTINGS
from pipeline.rules import Gold, Rule
from pipeline.servers import JudgeServer
from pipeline.settings import (
    Decay,
    Fraction,
    Name,
    NonNegative,
    Number,
    Positive,
    Rate,
    Seed,
    Settings,
    Temperature,
    ZeroOrTemperature,
)
from pipeline.suggestion import suggest
from pipeline.terminal import printable
from pipeline.trainers import ABSENT, TRAINERS, Trainer, reserved

One = TypeVar("One")
Several = TypeVar("Several")


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, dict | list) else "one"


Either = Annotated[Annotated[One, Tag("one")] | Annotated[Several, Tag("several")], Discriminator(_one_or_several)]
"""A text or a collection; decided by what is given, so that mistakes are reported for that alone."""


def _number_or_auto(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
        raise ValueError(f"should be `auto` or a whole number above 0, not {printable(repr(value))}")
    return value


def _size_or_auto(value: Any) -> Any:
    match = SIZE.fullmatch(value) if isinstance(value, str) else None
    if value != "auto" and (match is None or float(match["number"]) == 0.0):
        raise ValueError(f"should be `auto` or a size such as `8GB` or `500MB`, not {printable(repr(value))}")
    return value


SIZE = re.compile(r"(?P<number>\d{1,6}(\.\d{1,3})?) ?(?P<unit>MB|GB)")
UNITS = {"MB": 10**6, "GB": 10**9}
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
TokensPerBatch = Annotated[Positive | Literal["auto"], BeforeValidator(_number_or_auto)]
LARGEST_BATCH = 8192
"""Tokens beyond which a larger batch gains no speed on a processor."""
Alarm = Literal[
    "sampling_gap",
    "entropy_collapse",
    "negative_kl",
    "kl_runaway",
    "length_runaway",
    "unfinished",
    "ratio_explosion",
    "value_useless",
    "constant_reward",
    "gradient_spike",
    "over_optimisation",
]
"""What can go wrong in reinforcement learning, as `stages/core/rl/health.py` tells it."""
COMPARED_ROUNDS = 5
"""Rounds that alarms average over, at the start and at the end."""
ALARM_ROUNDS: dict[Alarm, int] = {
    "sampling_gap": 2 * COMPARED_ROUNDS,
    "entropy_collapse": 2 * COMPARED_ROUNDS,
    "length_runaway": 2 * COMPARED_ROUNDS,
    "unfinished": 2 * COMPARED_ROUNDS,
    "negative_kl": COMPARED_ROUNDS,
    "kl_runaway": COMPARED_ROUNDS,
    "value_useless": 50,
    "gradient_spike": 53,
}
"""Rounds before which an alarm cannot go off; one for those that are not here."""
NEEDED: dict[Alarm, str] = {
    "ratio_explosion": "ratios, which the stage `ppo` alone has",
    "value_useless": "a value function, which `advantage: gae` of the stage `ppo` alone has",
    "over_optimisation": "a `gold` that is not the reward",
}
"""What alarms need that not every stage has."""


class Preparation(Settings):
    """What is done to text before it is trained on, in the order of these settings; the manifest counts each step."""

    unicode: Literal["none", "NFC", "NFKC"] = "NFC"
    """Unicode normalisation; NFKC also changes ligatures, full-width letters and superscripts."""
    control_characters: Literal["keep", "remove"] = "remove"
    """Control characters other than tab and line break, and invisible characters that change the direction of text."""
    min_words: Annotated[StrictInt, Field(ge=0)] = 0
    """Drop shorter documents; words are runs of letters and digits."""
    repetition: Fraction = 1.0
    """Drop documents of which a larger share of characters stands in repeated lines or in repeated runs of ten words
    (Rae et al. 2021, arXiv 2112.11446, A.1.1); 0.3 is strict, 1 keeps all."""
    decontaminate: list[Name] = []
    """Data sources whose held-out rows must not be in the text: documents that share 13 words in a row are dropped.
    Rows of 8 to 12 words must not occur whole; shorter ones say too little to be looked for."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Which repeated documents are dropped: equal but for case and white space (12 bytes of memory a document), or also
    similar ones (7 kB a document)."""
    similarity: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.8
    """With `near`: Jaccard similarity of the sets of five-word runs from which documents count as the same."""


class DataSource(Settings):
    """Where rows come from."""

    source: Either[str, Annotated[list[str], Field(min_length=1)]]
    """Files or globs of files (`.jsonl`, `.json`, `.csv`, `.tsv`, `.txt`, `.parquet`; all but the last also as `.gz` or
    `.zst`; a `.txt` file is one document), a directory written by `datasets`, `hub:owner/name@revision[:config]`, or
    `world:PART` (PART is one of `corpus`, `demonstrations`, `preferences`, `prompts`, `sums`, `instructions`, or a
    suite of `docs/evaluation.md`)."""
    format: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?$")] = "auto"
    """How a row is laid out: `auto` decides by columns and content; a format's or a kind's name; or `module:function`,
    an adapter that is installed as an entry point of `baton.formats` or named by `--adapter`. A stage reads richer rows
    as the kind it needs: preferences as conversations (the chosen response), as prompts or as text; conversations as
    prompts or text."""
    columns: dict[str, str] = {}
    """What the format calls a column: what the file calls it."""
    split: str = "train"
    """The split to read; only `hub:` sources and directories of `datasets` have several."""
    rows: Positive | None = None
    """Read at most this many rows; for `world:` sources, generate this many."""
    seed: Seed = 0
    """Seed of the generator; only for `world:` sources."""
    held_out: Fraction = 0.1
    """Share of prompts kept from training, chosen by a hash of the prompt's first turn, so that the same prompt is held
    out in every source: all sources of a run must have the same share, but for test sets, of which 1 keeps all."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to malformed rows: `skip` leaves them out and counts them by reason."""
    max_chars: Positive = 1_000_000
    """Longest row in characters; a longer one is malformed."""
    prepare: Preparation | None = None
    """Preparation of text; only for rows read as text."""

    @property
    def name(self) -> str:
        """The source as one text, for messages and manifests."""
        return self.source if isinstance(self.source, str) else ", ".join(self.source)

    @property
    def scheme(self) -> str:
        """`hub`, `world` or, for files, nothing."""
        scheme = self.name.partition(":")[0]
        return scheme if scheme in ("hub", "world") else ""

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> DataSource:
        if isinstance(self.source, list) and any(each.startswith(("hub:", "world:")) for each in self.source):
            raise ValueError("a list holds files: give each `hub:` or `world:` source a name of its own")
        if self.seed and self.scheme != "world":
            raise ValueError("`seed` is for `world:` sources")
        if self.scheme == "world" and (self.format != "auto" or self.columns):
            raise ValueError("`world:` sources have a format of their own; leave out `format` and `columns`")
        if self.scheme == "world" and self.split != "train":
            raise ValueError("`split` is for `hub:` sources and directories of `datasets`")
        return self


class Share(Settings):
    """How much of a data source a mixture takes: `epochs` or `weight`."""

    epochs: Rate | None = None
    """Times the source is gone through in one pass over the mixture: 2 takes every row twice, 0.5 half of the rows, and
    the other half in the next pass."""
    weight: Rate | None = None
    """Share of the mixture, relative to the other weights, in examples (in tokens for pretraining). A pass is as long
    as all sources together; a source repeats as often as its weight needs."""

    @model_validator(mode="after")
    def _one_measure(self) -> Share:
        if (self.epochs is None) == (self.weight is None):
            raise ValueError("give either `epochs` or `weight`")
        return self


def _one_kind_of_share(shares: dict[str, Share]) -> dict[str, Share]:
    if len({share.weight is None for share in shares.values()}) > 1:
        raise ValueError("give all sources of a mixture `epochs`, or all of them `weight`")
    return shares


Mixture = Annotated[dict[Name, Share], Field(min_length=1), AfterValidator(_one_kind_of_share)]
Data = Either[Name, Mixture]
"""A data source, or several with their shares."""


def _no_single_rule(value: Any) -> Any:
    if isinstance(value, dict) and "rule" in value:
        raise ValueError("rules are a list, as in `[{rule: exact}]`")
    if not isinstance(value, dict | list):
        server = "`{url: ..., hosts: [...], model: ...}`"
        raise ValueError(f"a judge is a list of rules, as in `[{{rule: exact}}]`, or a server: {server}")
    return value


def _rules_or_server(value: Any) -> str:
    return "rules" if isinstance(value, list) else "server"


Judge = Annotated[
    Annotated[list[Rule], Field(min_length=1), Tag("rules")] | Annotated[JudgeServer, Tag("server")],
    Discriminator(_rules_or_server),
    BeforeValidator(_no_single_rule),
]
"""Rules, whose weighted sum is a response's score, or a server that is shown two responses."""
JudgeName = Annotated[str, Field(pattern=rf"^{NAME}$")]

Requirement = Annotated[str, AfterValidator(gate.checked)]
"""What a figure has to be, as `pipeline/gate.py` reads it."""


class Optimizer(Settings):
    """How weights move."""

    name: Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """`adamw`; `muon` for matrices with AdamW for the rest; `adamw8bit` keeps AdamW's moments in 8 bits (Dettmers et
    al. 2021, arXiv 2110.02861), `paged_adamw8bit` also moves them to the host's memory when the GPU's runs out."""
    learning_rate: Rate = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on matrices."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; `wsd` stays at the peak, then falls linearly to zero (Hu et al.
    2024, arXiv 2404.06395)."""
    decay: Fraction = 0.2
    """With `wsd`: share of the steps, the last ones, in which the learning rate falls."""
    clip_norm: Rate = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    @model_validator(mode="after")
    def _decay_fits_the_schedule(self) -> Optimizer:
        if self.schedule != "wsd" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"`decay` is for schedule=wsd, not {self.schedule}: leave it out or change the schedule")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} are more than all steps: lower one")
        return self


class Lora(Settings):
    """A low-rank adapter on the model's linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: Rate = 32.0
    """The update is scaled by alpha / rank, or as the variant has it."""
    targets: str | list[str] = "all-linear"
    """`all-linear`, or the names of the linear layers to adapt."""
    top_layers: Positive | None = None
    """Adapt only this many decoder layers, the last ones; nothing is computed backwards below them."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """`rslora` scales the update by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732); `dora` also trains the
    norm of every output's weights (Liu et al. 2024, arXiv 2402.09353), at some cost in time and memory."""
    initialisation: Literal["default", "pissa"] = "default"
    """`default` begins with a random and a zero matrix, `pissa` with the principal singular vectors of the weights
    (Meng et al. 2024, arXiv 2404.02948), whose product is taken off again: the base stays as it is and the stored
    adapter has twice the rank."""

    @model_validator(mode="after")
    def _layers_are_chosen_by_name(self) -> Lora:
        if self.top_layers is not None and isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError("`top_layers` needs `targets` as a list of names, or all-linear")
        return self


class StageSettings(Settings):
    """What every stage has. `ROLES` names the fields that are inputs, `DATA` those that are data sources."""

    ROLES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Input role -> kinds of artefact it takes."""
    DATA: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Data role -> kinds of rows it takes."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """Fields that name a file; its content counts, not its name."""
    SUITES: ClassVar[tuple[str, ...]] = ()
    """Fields that name evaluation suites; what they are and the content of their rows counts."""

    def roles(self) -> dict[str, str]:
        """Input roles in use -> reference. A role that takes a list gives `role.0`, `role.1`, ..."""
        found: dict[str, str] = {}
        for role in self.ROLES:
            value = getattr(self, role)
            if isinstance(value, list):
                found.update({f"{role}.{index}": each for index, each in enumerate(value)})
            elif value is not None:
                found[role] = value
        return found

    def data_roles(self) -> dict[str, str]:
        """Data roles in use -> name of the data source. A mixture gives `role.NAME` for each of its sources."""
        found: dict[str, str] = {}
        for role in self.DATA:
            value = getattr(self, role)
            if isinstance(value, str):
                found[role] = value
            elif value is not None:
                found.update({f"{role}.{name}": name for name in value})
        return found

    def kinds(self, role: str) -> tuple[str, ...]:
        """Kinds of rows that a data role takes, in order of preference; `role.NAME` takes what `role` does."""
        return self.DATA[role.partition(".")[0]]

    def shares(self, role: str) -> dict[str, Share] | None:
        """`role.NAME` -> share of a data role that is a mixture; None for a single source."""
        value = getattr(self, role)
        return {f"{role}.{name}": share for name, share in value.items()} if isinstance(value, dict) else None


class Batched(StageSettings):
    """What every stage that computes in batches of tokens has."""

    tokens_per_batch: TokensPerBatch = "auto"
    """Tokens, padding included, that go through the model at once: whole examples, and with a prompt all responses to
    it. Bounds memory; does not change results. `auto` chooses a power of two when the stage starts, from the memory
    that is free and the shape of the model (`docs/memory.md`)."""
    max_length: Positive = 1024
    """Longest example in tokens."""

    @property
    def batch_tokens(self) -> int:
        """`tokens_per_batch` as a number; `auto` that no stage has resolved is the largest value on a processor."""
        return LARGEST_BATCH if self.tokens_per_batch == "auto" else self.tokens_per_batch


class Batching(Batched):
    """What every stage that takes optimizer steps has."""

    examples_per_step: Positive = 32
    """Examples of one optimizer step; the loss is normalised over all of them."""
    max_length: Positive = 1024
    """Longest example in tokens, at most the model's positions. A longer prompt loses its beginning; a row whose
    trained part alone is longer is dropped and counted."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    gradient_checkpointing: StrictBool = False
    """Keep only the decoder layers' inputs for the backward pass and compute each layer a second time there: trades
    time for memory, with the same result."""


class Training(Batching):
    """What every stage that goes over rows has."""

    epochs: Rate = 1.0
    """Passes over the training rows."""
    steps: Positive | None = None
    """Take exactly this many optimizer steps instead, starting the rows over when they run out."""


class TokenizerSettings(StageSettings):
    """Train a byte-level BPE tokenizer with special tokens and a chat template."""

    DATA: ClassVar = {"data": ("text",)}

    kind: Literal["tokenizer"] = "tokenizer"
    """Stage kind."""
    data: Either[Name, Annotated[list[Name], Field(min_length=1)]]
    """Data sources of the text."""
    vocab_size: Annotated[StrictInt, Field(ge=261)] = 8192
    """Vocabulary size, the 5 control tokens and the 256 bytes included; with 261, tokens are bytes."""


class PretrainSettings(Training):
    """Train a causal language model on packed text, from nothing or from an existing model."""

    ROLES: ClassVar = {"tokenizer": ("tokenizer",), "policy": ("model",)}
    DATA: ClassVar = {"data": ("text",)}

    kind: Literal["pretrain"] = "pretrain"
    """Stage kind."""
    data: Data
    """Data source of the text, or a mixture."""
    tokenizer: str | None = None
    """Tokenizer stage; needed when training from nothing."""
    policy: str | None = None
    """Model to continue from; excludes `tokenizer` and `architecture`."""
    architecture: dict[str, Any] | None = None
    """The model's `transformers` configuration, `model_type` first; vocabulary and special tokens are filled in."""
    max_length: Annotated[StrictInt, Field(ge=2)] = 256
    """Tokens of one packed block, which is one example."""
    document_masks: StrictBool = False
    """Keep the documents of a block apart: none attends to another, and positions begin anew with each."""

    @model_validator(mode="after")
    def _one_beginning(self) -> PretrainSettings:
        from_nothing = self.tokenizer is not None and self.architecture is not None
        if from_nothing == (self.policy is not None) or (self.policy and (self.tokenizer or self.architecture)):
            raise ValueError("give either `tokenizer` and `architecture` (from nothing) or `policy` (to continue)")
        return self


class SftSettings(Training):
    """Supervised fine-tuning on conversations; the loss is on assistant tokens only."""

    ROLES: ClassVar = {"policy": ("model",)}
    DATA: ClassVar = {"data": ("conversation",)}
    FILES: ClassVar = ("chat_template",)

    kind: Literal["sft"] = "sft"
    """Stage kind."""
    policy: str
    """Model to start from."""
    data: Data
    """Data source of the conversations, or a mixture."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the model's own from here on."""
    lora: Lora | None = Lora()
    """The adapter; `null` trains all weights."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """`4bit` loads the base in NF4 (Dettmers et al. 2023, arXiv 2305.14314), `8bit` in LLM.int8 (Dettmers et al. 2022,
    arXiv 2208.07339), both through bitsandbytes, and hands the adapter on unmerged; otherwise it is merged."""

    @model_validator(mode="after")
    def _quantized_needs_adapter(self) -> SftSettings:
        if self.quantization != "none" and self.lora is None:
            raise ValueError("a quantized base cannot be trained itself: give `lora`")
        return self


class RewardSettings(Training):
    """A reward model: an adapter and a scalar head trained on preferences."""

    ROLES: ClassVar = {"policy": ("model", "adapter")}
    DATA: ClassVar = {"data": ("preference",)}

    kind: Literal["reward"] = "reward"
    """Stage kind."""
    policy: str
    """Model or adapter whose base carries the reward adapter; usually the SFT stage."""
    data: Data
    """Data source of the preferences, or a mixture."""
    lora: Lora = Lora()
    """The adapter; one that begins as the policy's adapter keeps that adapter's shape."""
    margin: StrictBool = False
    """For pairs: subtract the row's margin from the score difference (Llama 2, arXiv 2307.09288, eq. 2)."""
    centring: NonNegative = 0.0
    """Weight of the squared mean score, which keeps scores near zero (arXiv 2312.09244, eq. 2)."""
    heads: Positive = 1
    """Heads on the one adapter. With several, each has its own random start and its own bootstrap weights of the rows;
    the score is their mean, and how far they differ says how sure the model is."""


class PreferenceObjective(Settings):
    """What a stage that learns from pairs minimises."""

    WITHOUT_REFERENCE: ClassVar = ("simpo", "orpo")
    """Losses of the policy alone."""
    SMOOTHED: ClassVar = ("sigmoid", "sigmoid_norm", "robust")
    """Losses that allow for wrong labels."""

    loss: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "simpo", "orpo", "apo_zero", "apo_down"] = (
        "sigmoid"
    )
    """`sigmoid` is DPO; `sigmoid_norm` the same per token (arXiv 2411.15124); `robust` for a known share of wrong
    labels (arXiv 2403.00409); `hinge` (SLiC, arXiv 2305.10425); `ipo` (arXiv 2310.12036), per token; `simpo` (arXiv
    2405.14734) and `orpo` (arXiv 2403.07691), per token and without a reference; `apo_zero` for chosen responses better
    than the policy's own, `apo_down` for worse ones (arXiv 2408.06266)."""
    beta: Rate = 0.1
    """Strength of the pull towards the reference; `ipo`'s tau, `orpo`'s weight of the odds ratio. `simpo` and
    `sigmoid_norm`, being per token, ask for larger values: 2 to 10."""
    label_smoothing: Annotated[Number, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong: with `sigmoid` and `sigmoid_norm`, margins stop growing (conservative DPO);
    with `robust`, which needs it, the bias of wrong labels is taken out of the loss."""
    gamma: NonNegative | None = None
    """By how much the chosen response's reward should be larger; needed with `simpo`, and only there. The paper takes
    0.3 to 1.6."""
    sft_weight: NonNegative = 0.0
    """Weight of the mean negative log-likelihood of the chosen responses' tokens (arXiv 2404.19733, eq. 1); keeps their
    probability from falling along with that of the rejected ones. With `orpo` it is part of the loss."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with the reference."""
        return self.loss not in self.WITHOUT_REFERENCE

    @property
    def supervised_weight(self) -> float:
        """Weight of the supervised term, that of the loss itself included."""
        return 1.0 if self.loss == "orpo" else self.sft_weight

    @model_validator(mode="after")
    def _options_fit_the_loss(self) -> Self:
        if self.label_smoothing and self.loss not in self.SMOOTHED:
            raise ValueError(
                f"loss={self.loss} knows no label_smoothing: leave it out, or use {' or '.join(self.SMOOTHED)}"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss=robust needs label_smoothing, the share of wrong labels; without any, use sigmoid")
        if (self.gamma is None) == (self.loss == "simpo"):
            raise ValueError(
                "loss=simpo needs gamma" if self.gamma is None else "gamma is for loss=simpo: leave it out"
            )
        if self.loss == "orpo" and self.sft_weight:
            raise ValueError("loss=orpo has a supervised term of weight 1: leave out sft_weight, and weigh with beta")
        return self


class DpoSettings(Training, PreferenceObjective):
    """Direct preference optimisation and its family; the reference is the policy's own start."""

    ROLES: ClassVar = {"policy": ("model", "adapter")}
    DATA: ClassVar = {"data": ("preference",)}

    kind: Literal["dpo"] = "dpo"
    """Stage kind."""
    policy: str
    """Model or adapter to start from; also the reference."""
    data: Data
    """Data source of the preferences, or a mixture."""
    lora: Lora = Lora()
    """The adapter; a policy that begins as an adapter keeps that adapter's shape."""
    reference: Literal["each_step", "once"] = "each_step"
    """When the reference's log-probabilities are computed: in `each_step`, or `once` before training. Then they are
    kept in the cache, where another run on exactly the same pairs finds them: a run of whole epochs, whatever its seed.
    With `steps`, or a source of which a part is drawn, each seed may take other pairs, and all are computed anew."""

    @model_validator(mode="after")
    def _reference_can_be_kept(self) -> DpoSettings:
        if self.reference == "once" and not self.has_reference:
            raise ValueError(f"loss={self.loss} has no reference: leave out reference=once")
        return self


class Rewarded(Batching):
    """What every stage that samples responses and has them scored has."""

    ROLES: ClassVar = {"policy": ("model", "adapter"), "reward": ("reward",)}
    DATA: ClassVar = {"data": ("prompt",)}

    policy: str
    """Model or adapter to start from; also the reference."""
    reward: str | None = None
    """Reward stage; its base must be the policy's. Without one, `rules` are the reward."""
    reward_weight: Rate = 1.0
    """Weight of the reward stage's score beside the rules'."""
    rules: list[Rule] = []
    """Rules whose weighted rewards are added."""
    data: Data
    """Data source of the prompts, or a mixture."""
    lora: Lora = Lora()
    """The policy's adapter; a policy that begins as an adapter keeps that adapter's shape."""
    max_new_tokens: Positive = 64
    """Longest response, end of turn included."""
    temperature: Temperature = 1.0
    """Sampling temperature. Divergences are measured at it, and PPO's losses computed; those of rejection and
    online_dpo are of log-probabilities at temperature 1."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt of a rollout; the prompt is computed once for all."""
    sampler: Literal["native", "continuous"] = "native"
    """`native` samples with a padded cache; `continuous` is the continuous batching of `transformers`, whose cache is
    paged: for long responses of very different lengths on a GPU."""
    missing_eos_penalty: NonNegative = 1.0
    """Taken off the score of a response that does not end its turn."""
    length_penalty: NonNegative = 0.0
    """Taken off the score for every token of the response."""

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        if self.reward is None and not self.rules:
            raise ValueError("nothing is rewarded: give `reward`, a reward stage, or `rules`")
        if self.reward is None and self.reward_weight != type(self).model_fields["reward_weight"].default:
            raise ValueError("reward_weight is that of `reward`, which is not given: leave it out")
        _require_room(self.max_length, self.max_new_tokens)
        return self


class Rounds(Rewarded):
    """What every stage has that samples and learns in turns, watched on held-out prompts."""

    steps: Positive = 100
    """Rollout-and-update rounds."""
    examples_per_step: Positive = 64
    """Prompts of one rollout."""
    reward_normalisation: Literal["none", "mean", "deviation"] = "none"
    """What is taken off rewards, measured on the policy's responses before the first update: nothing, their `mean`, or
    the mean and then a division by their standard `deviation`."""
    reward_clip: Rate | None = None
    """Rewards are clipped to +- this, after normalisation."""
    gold: Gold = "none"
    """Programmatic reward of the held-out responses, which the policy is not trained on: it decides which checkpoint is
    handed on. Without one, what is trained for decides, and over-optimisation cannot be seen."""
    evaluate_every: Positive = 10
    """Rounds between two looks at held-out prompts; the best checkpoint by their score is handed on. A policy that has
    gone a nat further from the reference since the last look is looked at earlier."""
    evaluate_rows: Positive = 128
    """Held-out prompts to look at, at most."""
    evaluate_samples: Positive = 4
    """Responses to each of them."""
    stop_on: list[Alarm] = []
    """Alarms that end the training early; all are told and recorded in any case."""

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Alarms that can go off in the stage."""
        updates: tuple[Alarm, ...] = ("ratio_explosion", "value_useless")
        if self.gold == "none" or self._only_gold_is_rewarded:
            updates = (*updates, "over_optimisation")
        return tuple(each for each in get_args(Alarm) if each not in updates)

    def rounds_needed(self, alarm: Alarm) -> int:
        """Rounds before which an alarm cannot go off."""
        return ALARM_ROUNDS.get(alarm, 1)

    @property
    def _only_gold_is_rewarded(self) -> bool:
        """Whether score and reward rise and fall together."""
        return self.reward is None and all(each.rule == self.gold and each.weight > 0 for each in self.rules)

    @property
    def compares_responses(self) -> bool:
        """Whether only differences of rewards are learnt from."""
        return True

    @model_validator(mode="after")
    def _alarms_can_go_off(self) -> Self:
        silent = [each for each in self.stop_on if each not in self.alarms]
        if silent:
            reasons = "; ".join(f"{each} needs {NEEDED[each]}" for each in silent)
            raise ValueError(f"stop_on: {', '.join(silent)} cannot go off here: {reasons}")
        late = {each: needed for each in self.stop_on if (needed := self.rounds_needed(each)) > self.steps}
        if late:
            rounds = ", ".join(f"{needed} for {each}" for each, needed in late.items())
            raise ValueError(f"stop_on: in steps={self.steps} these cannot go off, the rounds needed are {rounds}")
        if self.compares_responses and self.reward_normalisation == "mean" and self.reward_clip is None:
            raise ValueError("reward_normalisation=mean changes no difference between rewards: leave it out")
        return self


class PpoSettings(Rounds):
    """Reinforcement learning of responses: PPO, and with it RLOO and GRPO, which have no value function."""

    kind: Literal["ppo"] = "ppo"
    """Stage kind."""
    optimizer: Optimizer = Optimizer(learning_rate=3e-5, schedule="linear")
    """The policy's optimizer, and but for the learning rate the value function's."""
    update_epochs: Positive = 1
    """Passes over each rollout."""
    minibatches: Positive = 1
    """Optimizer steps per pass."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """How much better than expected a token was: `gae` by a value function (arXiv 1506.02438), `rloo` by the other
    responses to the prompt (arXiv 2402.14740), `grpo` the same in standard deviations (arXiv 2402.03300). The last two
    train no value function and need samples_per_prompt of 2 or more."""
    kl_coefficient: NonNegative = 0.05
    """Weight of the divergence from the reference."""
    kl_target: Rate | None = None
    """With it, the coefficient is adapted after each round so that the divergence is this many nats a response."""
    kl_horizon: Positive = 10_000
    """With kl_target: responses in which the coefficient changes by about a fifth."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of a token's divergence from its log-ratio r: r, r^2 / 2, or exp(-r) - 1 + r."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the divergence is taken off each token's reward, or added to the policy's loss."""
    discount: Fraction = 1.0
    """GAE gamma."""
    gae_lambda: Fraction = 0.95
    """GAE lambda."""
    clip: Rate = 0.2
    """Policy ratios are clipped to 1 +- clip."""
    dual_clip: Annotated[Number, Field(gt=1.0)] | None = None
    """Bound of the loss of tokens that were worse than expected, in advantages (arXiv 1912.09729; 3 is usual)."""
    value: Literal["adapter", "head"] = "adapter"
    """`adapter`: the value function is an adapter and a head of its own, starting as the reward model's. `head`: a head
    on the policy's states, trained in the same pass: half the computation, and gradients that interfere."""
    value_weight: Rate = 0.1
    """With value=head: weight of the value's loss beside the policy's."""
    value_clip: Rate = 0.2
    """Value predictions are clipped to the old value +- value_clip."""
    value_learning_rate: Rate = 1e-4
    """Peak learning rate of the value function."""
    value_warmup: Annotated[StrictInt, Field(ge=0)] = 0
    """Rounds, the first ones, in which only the value function is trained."""
    stop_at_kl: Rate | None = None
    """A round's remaining updates are left out once the approximate divergence from the sampling policy, in nats a
    token, is more than one and a half times this."""

    @property
    def updates(self) -> int:
        """Of a round."""
        return self.update_epochs * self.minibatches

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        return (*super().alarms, "ratio_explosion", *(("value_useless",) if self.advantage == "gae" else ()))

    def rounds_needed(self, alarm: Alarm) -> int:
        # The policy has no gradients while the value function warms up.
        return super().rounds_needed(alarm) + (self.value_warmup if alarm == "gradient_spike" else 0)

    @property
    def compares_responses(self) -> bool:
        return self.advantage != "gae"

    @model_validator(mode="after")
    def _sizes_fit(self) -> PpoSettings:
        if self.examples_per_step % self.minibatches:
            raise ValueError(f"minibatches={self.minibatches} must divide examples_per_step={self.examples_per_step}")
        return self

    @model_validator(mode="after")
    def _options_fit_the_advantage(self) -> PpoSettings:
        if self.advantage == "gae":
            if self.value == "adapter":
                self._refuse_changed("value=adapter", ("value_weight",))
            return self
        if self.samples_per_prompt < 2:
            raise ValueError(f"advantage={self.advantage} compares responses to a prompt: give samples_per_prompt")
        names = [name for name in type(self).model_fields if name.startswith(("value", "gae")) or name == "discount"]
        self._refuse_changed(f"advantage={self.advantage}", tuple(names))
        if self.advantage == "grpo" and self.kl_in == "reward" and self.kl_coefficient:
            raise ValueError(
                "advantage=grpo divides by the deviation of rewards, and where they are equal only that of the "
                "divergence is left: give kl_in=loss with kl_estimator k2 or k3, or kl_coefficient=0"
            )
        return self

    @model_validator(mode="after")
    def _updates_are_made(self) -> PpoSettings:
        if self.value_warmup >= self.steps:
            raise ValueError(
                f"value_warmup={self.value_warmup} leaves none of steps={self.steps} for the policy: lower it"
            )
        if self.updates == 1:
            limits = ("stop_at_kl", "clip", "dual_clip", "value_clip")
            self._refuse_changed("one update a round, at which the policy is still the one that sampled", limits)
        return self

    @model_validator(mode="after")
    def _divergence_is_used(self) -> PpoSettings:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator=k1 has no gradient on average as a loss: use k2 or k3, or kl_in=reward")
        if self.kl_target is None:
            self._refuse_changed("no kl_target", ("kl_horizon",))
        if not self.kl_coefficient:
            self._refuse_changed("kl_coefficient=0", ("kl_in", "kl_estimator"))
        if self.kl_target is not None and not self.kl_coefficient:
            raise ValueError("kl_target adapts kl_coefficient, which must not be 0 for that")
        return self

    def _refuse_changed(self, reason: str, names: tuple[str, ...]) -> None:
        """Settings that mean nothing beside another one must be at their defaults."""
        fields = type(self).model_fields
        changed = [name for name in names if getattr(self, name) != fields[name].default]
        if changed:
            raise ValueError(f"{', '.join(changed)}: of no use with {reason}, leave it out")


class RejectionSettings(Rounds):
    """Rejection sampling: of several responses to a prompt, the policy is fine-tuned on the best."""

    kind: Literal["rejection"] = "rejection"
    """Stage kind."""
    samples_per_prompt: Annotated[StrictInt, Field(ge=2)] = 4
    """Responses to each prompt of a rollout; the prompt is computed once for all."""
    keep: Positive = 1
    """Responses to each prompt that are learnt from, the best ones; fewer where others are as bad as the worst."""

    @model_validator(mode="after")
    def _some_are_rejected(self) -> RejectionSettings:
        if self.keep >= self.samples_per_prompt:
            raise ValueError(f"keep={self.keep} rejects none of samples_per_prompt={self.samples_per_prompt}: lower it")
        return self


class OnlineDpoSettings(Rounds, PreferenceObjective):
    """DPO on pairs of the policy's own responses: the best and the worst to each prompt."""

    kind: Literal["online_dpo"] = "online_dpo"
    """Stage kind."""
    samples_per_prompt: Annotated[StrictInt, Field(ge=2)] = 2
    """Responses to each prompt of a rollout; the prompt is computed once for all."""


class Decoding(Settings):
    """How the tokens of a response are chosen. What changes the model's distribution is applied in this order:
    repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: ZeroOrTemperature = 1.0
    """Sampling temperature of the responses; 0 takes the likeliest token each time (greedy decoding)."""
    top_k: Positive | None = None
    """Sample among this many tokens, the likeliest ones; as likely as the last of them is likely enough."""
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    """Sample among the fewest likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv
    1904.09751)."""
    min_p: Decay = 0.0
    """Sample among tokens that are at least this many times as likely as the likeliest (Nguyen et al. 2024, arXiv
    2407.01082)."""
    repetition_penalty: Rate = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens that stand in the prompt or in the
    response already (Keskar et al. 2019, arXiv 1909.05858)."""
    beams: Positive = 1
    """Search with this many beams for the response of the highest mean log-probability a token; needs temperature 0."""

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another response."""
        return self.temperature > 0.0

    @property
    def is_plain(self) -> bool:
        """Whether responses are samples of the model's own distribution, at the temperature."""
        return self.is_random and not self._cuts() and self.repetition_penalty == 1.0

    def _cuts(self) -> list[str]:
        """The settings in use that leave tokens out."""
        return [
            name for name in ("top_k", "top_p", "min_p") if getattr(self, name) != Decoding.model_fields[name].default
        ]

    @model_validator(mode="after")
    def _nothing_contradicts(self) -> Self:
        if self.is_random and self.beams > 1:
            raise ValueError(f"beams={self.beams} search for what is likeliest: set `temperature: 0`")
        if not self.is_random and self._cuts():
            raise ValueError(f"`{self._cuts()[0]}` is for sampling: leave it out, or raise `temperature` above 0")
        return self


class EvaluateSettings(Batched, Decoding):
    """Compare models with their parents on held-out rows, each figure with a 95% interval."""

    ROLES: ClassVar = {"models": ("model", "adapter"), "reward": ("reward",)}
    DATA: ClassVar = {
        "prompts": ("prompt",),
        "pairs": ("preference",),
        "text": ("text",),
    }
    SUITES: ClassVar = ("suites",)

    kind: Literal["evaluate"] = "evaluate"
    """Stage kind."""
    models: Annotated[list[str], Field(min_length=1)]
    """The models; each is compared with its parent when that is among them."""
    reward: str | None = None
    """Reward stage that scores the samples, and so is a judge of win rates."""
    judges: dict[JudgeName, Judge] = {}
    """Judges of win rates beside `gold` and `reward`, by names of yours: rules as stages that learn from rewards take
    them, `[{rule: length, words: 40}]`, or an OpenAI-compatible server that says which of a model's and its parent's
    responses is better (`docs/comparison.md`)."""
    prompts: str
    """Data source of the prompts that are answered."""
    pairs: str | None = None
    """Data source of the pairs for pair accuracy."""
    text: str | None = None
    """Data source of the text for perplexity and bits per byte."""
    suites: list[str] = []
    """Evaluation suites: names of Baton's own or YAML files of yours (`docs/evaluation.md`)."""
    gold: Gold = "none"
    """Rule that judges the responses and knows which are correct: `world` is the embedded world's, `exact` and
    `numeric` compare with the prompt's `answer` (`docs/rewards.md`). Also a judge of win rates."""
    best_of: Annotated[StrictInt, Field(ge=2)] | None = None
    """Responses to each prompt from which best-of-n's frontier is measured, up to this n, for every model that an
    adapter among `models` was trained from: what choosing by `reward` brings at which divergence, without training."""
    rows: Positive = 256
    """Held-out rows of each data source to use, at most."""
    max_new_tokens: Positive = 64
    """Longest response."""
    require: dict[str, dict[str, Requirement]] = {}
    """Model -> metric -> what it has to be, as in `dpo: {gold: "> parent", perplexity: "< 1.2 x parent"}`. Where that
    does not hold, the run ends with exit code 4, after all is published and reported (`docs/comparison.md`)."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> EvaluateSettings:
        _require_room(self.max_length, self.max_new_tokens)
        return self

    @model_validator(mode="after")
    def _judges_are_different(self) -> EvaluateSettings:
        for taken in SETTINGS:
            if taken in self.judges:
                raise ValueError(f"judges.{taken}: that is what the setting `{taken}` is called: take another name")
        for name, judge in self.judges.items():
            if isinstance(judge, list) and [rule.rule for rule in judge] == [self.gold]:
                raise ValueError(f"judges.{name}: gold={self.gold} judges by this rule: leave one of them out")
        return self

    @model_validator(mode="after")
    def _the_best_is_chosen_by_a_reward_model(self) -> EvaluateSettings:
        if self.best_of and self.reward is None:
            raise ValueError(f"best_of={self.best_of} chooses by a reward model: give `reward`, a reward stage")
        if self.best_of and not self.is_plain:
            what = f"best_of={self.best_of} needs plain samples, whose divergence is known"
            raise ValueError(f"{what}: leave it out, or set nothing but `temperature`, and that above 0")
        return self


class TrlSettings(StageSettings):
    """Any of TRL's trainers that `docs/trl.md` lists, on the same tokens as Baton's own stages."""

    ROLES: ClassVar = {"policy": ("model", "adapter"), "reward": ("reward",)}
    DATA: ClassVar = {"data": ("conversation", "preference", "rated", "prompt")}

    kind: Literal["trl"] = "trl"
    """Stage kind."""
    trainer: str
    """Name of the trainer: `KTO` is TRL's `KTOTrainer`."""
    policy: str
    """Model or adapter to start from; also the reference."""
    data: Data
    """Data source of what the trainer goes over (conversations, preferences, rated responses or prompts), or a
    mixture."""
    reward: str | None = None
    """Reward stage that scores the responses of trainers that sample; its tokenizer and chat template must be the
    policy's."""
    gold: Gold = "none"
    """Rule that rewards those responses, as in `evaluate`; added to the reward stage's where both are given."""
    lora: Lora | None = Lora()
    """The adapter; `null` trains all weights. A policy that begins as an adapter keeps that adapter's shape."""
    examples_per_step: Positive = 32
    """Examples of one optimizer step; for trainers that sample, prompts."""
    examples_per_batch: Positive = 8
    """Examples that go through the model at once; divides examples_per_step. Bounds memory."""
    max_length: Positive = 1024
    """Longest example in tokens, at most the model's positions. A longer prompt loses its beginning; a row whose
    trained part alone is longer is dropped and counted."""
    max_new_tokens: Positive | None = None
    """Longest response of trainers that sample, end of turn included; they need it."""
    epochs: Rate = 1.0
    """Passes over the training rows."""
    steps: Positive | None = None
    """Take exactly this many optimizer steps instead, starting the rows over when they run out."""
    optimizer: Optimizer = Optimizer()
    """The optimizer: Baton's own, which the trainer steps."""
    gradient_checkpointing: StrictBool = False
    """Keep only the decoder layers' inputs for the backward pass and compute each layer a second time there: trades
    time for memory."""
    arguments: dict[str, Any] = {}
    """What else the trainer's own configuration class takes, by its names there, such as `loss_type` or `beta`."""

    @property
    def method(self) -> Trainer:
        """The trainer's entry in the table."""
        return TRAINERS[self.trainer]

    @property
    def produces(self) -> str:
        """Kind of artefact that the stage publishes."""
        if self.trainer == "Reward":
            return "reward"
        return "adapter" if self.lora else "model"

    def kinds(self, role: str) -> tuple[str, ...]:
        return self.method.kinds

    @model_validator(mode="after")
    def _options_fit_the_trainer(self) -> TrlSettings:
        if self.trainer in ABSENT:
            raise ValueError(f"{self.trainer} cannot be a stage: it {ABSENT[self.trainer]}")
        if self.trainer not in TRAINERS:
            raise ValueError(
                f"TRL has no trainer `{printable(self.trainer)}` for a stage{suggest(self.trainer, TRAINERS)}"
            )
        if self.lora and self.lora.initialisation == "pissa":
            raise ValueError(
                "a trainer of TRL trains an adapter's matrices as they are stored, PiSSA's are differences: "
                "leave out lora.initialisation"
            )
        if self.trainer == "Reward" and self.lora is None:
            raise ValueError("a reward model is an adapter and a head: give `lora`")
        if self.optimizer.name == "muon":
            raise ValueError("muon is two optimizers, and a trainer of TRL steps one: use optimizer.name=adamw")
        if self.examples_per_step % self.examples_per_batch:
            raise ValueError(
                f"examples_per_batch={self.examples_per_batch} must divide examples_per_step={self.examples_per_step}"
            )
        if self.trainer == "KTO" and self.examples_per_batch == 1:
            raise ValueError(
                "KTO compares the examples of a batch with each other: give examples_per_batch of 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _sampling_fits_the_trainer(self) -> TrlSettings:
        given = [name for name in ("reward", "max_new_tokens") if getattr(self, name) is not None]
        given += ["gold"] if self.gold != "none" else []
        if not self.method.samples:
            if given:
                raise ValueError(f"{self.trainer} samples no responses: leave out {', '.join(given)}")
            return self
        if self.max_new_tokens is None:
            raise ValueError(f"{self.trainer} samples responses: give max_new_tokens")
        if self.reward is None and self.gold == "none":
            raise ValueError(f"{self.trainer} learns from rewards: give `reward`, a reward stage, or `gold`")
        _require_room(self.max_length, self.max_new_tokens)
        return self

    @model_validator(mode="after")
    def _arguments_are_the_trainer_s(self) -> TrlSettings:
        for name in self.arguments:
            if reason := reserved(name):
                raise ValueError(f"arguments.{printable(name)} is not free: {reason}")
        return self


def _require_room(max_length: int, max_new_tokens: int) -> None:
    if max_new_tokens >= max_length:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in max_length={max_length}")


Stage = Annotated[
    TokenizerSettings
    | PretrainSettings
    | SftSettings
    | RewardSettings
    | DpoSettings
    | PpoSettings
    | RejectionSettings
    | OnlineDpoSettings
    | EvaluateSettings
    | TrlSettings,
    Field(discriminator="kind"),
]


class RunSettings(Settings):
    """One run: where it is written, what it reads and the stages it takes."""

    output: Annotated[str, Field(min_length=1)]
    """The run directory."""
    seed: Seed = 0
    """Seed of every stage."""
    device: Device = "auto"
    """Where to compute; `auto` takes an accelerator when there is one."""
    dtype: Precision = "auto"
    """Precision of frozen weights and matrix products; `auto` takes bfloat16 where a self-test finds it faster."""
    memory: Annotated[str, BeforeValidator(_size_or_auto)] = "auto"
    """The most memory that a stage may plan with when it resolves `tokens_per_batch: auto`, as in `8GB`: all of the
    process's on a processor, the device's on CUDA. `auto` plans with what is free. Does not change results."""
    checkpoint_minutes: NonNegative = 10.0
    """At least so long between two checkpoints of a stage in training, from which it goes on exactly when it was
    stopped; 0 makes one after every step. A signal makes one after the step in progress."""
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that get a copy of every record of `metrics.jsonl`; their packages are installed by the user."""
    data: dict[Name, DataSource] = {}
    """Data sources by name."""
    stages: Annotated[dict[Name, Stage], Field(min_length=1)]
    """Stages by name, in any order."""

    @property
    def memory_limit(self) -> int | None:
        """`memory` in bytes; None where it sets no limit."""
        match = SIZE.fullmatch(self.memory)
        return round(float(match["number"]) * UNITS[match["unit"]]) if match else None

    @model_validator(mode="after")
    def _data_is_named(self) -> RunSettings:
        for name, stage in self.stages.items():
            for role, source in stage.data_roles().items():
                if source not in self.data:
                    known = ", ".join(sorted(self.data)) or "none"
                    raise ValueError(f"stages.{name}.{role}: no data source `{source}` (known: {known})")
        for name, each in self.data.items():
            for other in each.prepare.decontaminate if each.prepare else ():
                if other not in self.data:
                    raise ValueError(f"data.{name}.prepare.decontaminate: no data source `{other}`")
        self._one_share_is_held_out()
        self._results_fit_their_receivers()
        self._roles_share_a_base()
        return self

    def _results_fit_their_receivers(self) -> None:
        """What a trainer of TRL makes depends on which it is."""
        for name, stage in self.stages.items():
            for role, reference in stage.roles().items():
                maker, needed = self.stages.get(reference), stage.ROLES[role.partition(".")[0]]
                if isinstance(maker, TrlSettings) and maker.produces not in needed:
                    what = f"the stage `{reference}` makes a {maker.produces}, this needs a {' or '.join(needed)}"
                    raise ValueError(f"stages.{name}.{role}: {what}")

    def _roles_share_a_base(self) -> None:
        """Policy and reward model are adapters on one model, as far as the run's own stages tell."""
        for name, stage in self.stages.items():
            if not isinstance(stage, Rewarded) or stage.reward not in self.stages:
                continue
            base, other = self._base(stage.policy), self._base(self.stages[stage.reward].roles().get("policy", ""))
            if base and other and base != other:
                what = f"the reward model sits on `{other}`, the policy on `{base}`"
                raise ValueError(f"stages.{name}.reward: {what}: train the reward stage on the same `policy`")

    def _base(self, reference: str) -> str:
        """The stage whose model a stage's result is, or sits on; empty where it is none of the run's."""
        passed: list[str] = []
        while (stage := self.stages.get(reference)) and reference not in passed:
            if _makes_a_model(stage):
                return reference
            passed.append(reference)
            reference = stage.roles().get("policy", "")
        return ""

    @model_validator(mode="after")
    def _device_serves(self) -> RunSettings:
        for name, stage in self.stages.items():
            if isinstance(stage, SftSettings) and stage.quantization != "none" and self.device == "mps":
                raise ValueError(f"stages.{name}.quantization: {stage.quantization} does not work on device=mps")
            optimizer = getattr(stage, "optimizer", None)
            if optimizer and optimizer.name == "paged_adamw8bit" and self.device in ("cpu", "mps"):
                raise ValueError(
                    f"stages.{name}.optimizer.name: paged_adamw8bit needs device=cuda, not {self.device}: use adamw"
                )
        return self

    def _one_share_is_held_out(self) -> None:
        """Sources that are held out whole, as a test set, are no part of the split: no stage may train on them."""
        whole = {name for name, source in self.data.items() if source.held_out == 1.0}
        for name, stage in self.stages.items():
            trained = [each for each in stage.data_roles().values() if each in whole and stage.kind != "evaluate"]
            if trained:
                raise ValueError(f"stages.{name}: all of `{trained[0]}` is held out: only evaluate stages can read it")
        shares = {name: source.held_out for name, source in self.data.items() if name not in whole}
        if len(set(shares.values())) > 1:
            said = ", ".join(f"{name}: {share}" for name, share in shares.items())
            raise ValueError(
                f"data: held_out differs ({said}): prompts held out of one source would be trained on in another; "
                "give all the same share (a test set, read by evaluate stages only, may have held_out: 1)"
            )


def _makes_a_model(stage: StageSettings) -> bool:
    """Whether a stage's result has all weights, and does not sit on another's."""
    match stage:
        case PretrainSettings():
            return True
        case SftSettings():
            return stage.quantization == "none"
        case TrlSettings():
            return stage.produces == "model"
    return False


def evaluated(settings: RunSettings, stage: StageSettings) -> tuple[str, ...]:
    """Names of the data sources whose held-out rows the run's models are evaluated on, and which a stage's rows could
    repeat: text for a stage that trains on text, the others for other stages, none for one that trains on nothing."""
    if isinstance(stage, EvaluateSettings):
        return ()
    reads_text = _reads_text(stage.DATA["data"])
    judges = [each for each in settings.stages.values() if isinstance(each, EvaluateSettings)]
    named = [(name, each.DATA[role]) for each in judges for role, name in each.data_roles().items()]
    return tuple(dict.fromkeys(name for name, kinds in named if _reads_text(kinds) == reads_text))


def trained(settings: RunSettings, *, text: bool = False) -> tuple[str, ...]:
    """Names of the data sources of which stages learn the answers to prompts, or else those that they read as text."""
    stages = [each for each in settings.stages.values() if not isinstance(each, EvaluateSettings)]
    named = [name for each in stages if _reads_text(each.DATA["data"]) == text for name in each.data_roles().values()]
    return tuple(dict.fromkeys(named))


def _reads_text(kinds: tuple[str, ...]) -> bool:
    return kinds == ("text",)


PRODUCES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer",),
    "pretrain": ("model",),
    "sft": ("model", "adapter"),
    "reward": ("reward",),
    "dpo": ("adapter",),
    "ppo": ("adapter",),
    "rejection": ("adapter",),
    "online_dpo": ("adapter",),
    "evaluate": ("evaluation",),
    "trl": ("model", "adapter", "reward"),
}
"""Stage kind -> kinds of artefact it can publish."""
