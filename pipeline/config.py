"""The configuration: one small model per stage kind, and the only place where defaults live.

A run is a mapping of named data sources and a mapping of named stages. A stage names its inputs by role: a stage of
the same run, a path to a stage directory, a model directory, or `hub:owner/name@revision`. Field docstrings are the
reference: `baton schema` prints them. Paths are relative to the working directory.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]
Positive = Annotated[StrictInt, Field(gt=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Decay = Annotated[Number, Field(ge=0.0, lt=1.0)]
Rate = Annotated[Number, Field(gt=0.0)]
NonNegative = Annotated[Number, Field(ge=0.0)]
Temperature = Annotated[Number, Field(ge=0.01, le=100.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


One = TypeVar("One")
Several = TypeVar("Several")


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, dict | list) else "one"


Either = Annotated[Annotated[One, Tag("one")] | Annotated[Several, Tag("several")], Discriminator(_one_or_several)]
"""A text or a collection; decided by what is given, so that mistakes are reported for that alone."""


class Settings(BaseModel):
    """Base of all configuration: unknown keys refused, values immutable, NaN and infinity refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


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
    """Files or globs of files (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; the first four also as `.gz` and `.zst`),
    a directory written by `datasets`, `hub:owner/name@revision[:config]`, or `world:PART` (PART is one of `corpus`,
    `demonstrations`, `preferences`, `prompts`)."""
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


class Optimizer(Settings):
    """How weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for matrices with AdamW for the rest."""
    learning_rate: Rate = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on matrices."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    clip_norm: Rate = 1.0
    """Gradients with a larger global norm are scaled down to it."""


class Lora(Settings):
    """A low-rank adapter on the model's linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: Rate = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """`all-linear`, or the names of the linear layers to adapt."""


class StageSettings(Settings):
    """What every stage has. `ROLES` names the fields that are inputs, `DATA` those that are data sources."""

    ROLES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Input role -> kinds of artefact it takes."""
    DATA: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Data role -> kinds of rows it takes."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """Fields that name a file; its content counts, not its name."""

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

    def shares(self, role: str) -> dict[str, Share] | None:
        """`role.NAME` -> share of a data role that is a mixture; None for a single source."""
        value = getattr(self, role)
        return {f"{role}.{name}": share for name, share in value.items()} if isinstance(value, dict) else None


class Batching(StageSettings):
    """What every stage that takes optimizer steps has."""

    examples_per_step: Positive = 32
    """Examples of one optimizer step; the loss is normalised over all of them."""
    tokens_per_batch: Positive = 8192
    """Tokens, padding included, that go through the model at once. Bounds memory; does not change results."""
    max_length: Positive = 1024
    """Longest example in tokens, at most the model's positions. A longer prompt loses its beginning; a row whose
    trained part alone is longer is dropped and counted."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""


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
    vocab_size: Annotated[StrictInt, Field(ge=300)] = 8192
    """Vocabulary size, special tokens and the 256 bytes included."""


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
    quantization: Literal["none", "4bit"] = "none"
    """`4bit` loads the base in NF4 through bitsandbytes and hands the adapter on unmerged; otherwise it is merged."""

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


class DpoSettings(Training):
    """Direct preference optimisation; the reference is the policy's own start."""

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
    beta: Rate = 0.1
    """Strength of the pull towards the reference."""
    sft_weight: NonNegative = 0.0
    """Weight of the mean negative log-likelihood of the chosen responses' tokens (arXiv 2404.19733, eq. 1); keeps their
    probability from falling along with that of the rejected ones."""


class PpoSettings(Batching):
    """Proximal policy optimisation against a learned reward model."""

    ROLES: ClassVar = {"policy": ("model", "adapter"), "reward": ("reward",)}
    DATA: ClassVar = {"data": ("prompt",)}

    kind: Literal["ppo"] = "ppo"
    """Stage kind."""
    policy: str
    """Model or adapter to start from; also the reference."""
    reward: str
    """Reward stage; its base must be the policy's."""
    data: Data
    """Data source of the prompts, or a mixture."""
    lora: Lora = Lora()
    """The policy's adapter; a policy that begins as an adapter keeps that adapter's shape."""
    steps: Positive = 100
    """Rollout-and-update rounds."""
    examples_per_step: Positive = 64
    """Prompts of one rollout."""
    max_new_tokens: Positive = 64
    """Longest response, end of turn included."""
    temperature: Temperature = 1.0
    """Sampling temperature, also applied to every log-probability."""
    update_epochs: Positive = 1
    """Passes over each rollout."""
    minibatches: Positive = 1
    """Optimizer steps per pass."""
    kl_coefficient: NonNegative = 0.05
    """Weight of the per-token log-ratio to the reference that is taken off the reward."""
    discount: Fraction = 1.0
    """GAE gamma."""
    gae_lambda: Fraction = 0.95
    """GAE lambda."""
    clip: Rate = 0.2
    """Policy ratios are clipped to 1 +- clip."""
    value_clip: Rate = 0.2
    """Value predictions are clipped to the old value +- value_clip."""
    value_learning_rate: Rate = 1e-4
    """Peak learning rate of the value adapter and head."""
    missing_eos_penalty: NonNegative = 1.0
    """Taken off the score of a response that does not end its turn."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> PpoSettings:
        if self.examples_per_step % self.minibatches:
            raise ValueError(f"minibatches={self.minibatches} must divide examples_per_step={self.examples_per_step}")
        _require_room(self.max_length, self.max_new_tokens)
        return self


class EvaluateSettings(StageSettings):
    """Compare models with their parents on held-out rows, each figure with a 95% interval."""

    ROLES: ClassVar = {"models": ("model", "adapter"), "reward": ("reward",)}
    DATA: ClassVar = {
        "prompts": ("prompt",),
        "pairs": ("preference",),
        "text": ("text",),
    }

    kind: Literal["evaluate"] = "evaluate"
    """Stage kind."""
    models: Annotated[list[str], Field(min_length=1)]
    """The models; each is compared with its parent when that is among them."""
    reward: str | None = None
    """Reward stage that scores the samples; the judge of win rates where there is no gold reward."""
    prompts: str
    """Data source of the prompts that are answered."""
    pairs: str | None = None
    """Data source of the pairs for pair accuracy."""
    text: str | None = None
    """Data source of the text for perplexity and bits per byte."""
    gold: Literal["none", "world"] = "none"
    """Programmatic reward of the responses; `world` is the embedded world's."""
    rows: Positive = 256
    """Held-out rows of each data source to use, at most."""
    max_new_tokens: Positive = 64
    """Longest response."""
    temperature: Temperature = 1.0
    """Sampling temperature of the responses."""
    max_length: Positive = 1024
    """Longest example in tokens."""
    tokens_per_batch: Positive = 8192
    """Tokens, padding included, that go through the model at once."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> EvaluateSettings:
        _require_room(self.max_length, self.max_new_tokens)
        return self


def _require_room(max_length: int, max_new_tokens: int) -> None:
    if max_new_tokens >= max_length:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in max_length={max_length}")


Stage = Annotated[
    TokenizerSettings | PretrainSettings | SftSettings | RewardSettings | DpoSettings | PpoSettings | EvaluateSettings,
    Field(discriminator="kind"),
]


class RunSettings(Settings):
    """One run: where it is written, what it reads and the stages it takes."""

    output: Annotated[str, Field(min_length=1)]
    """The run directory."""
    seed: Seed = 0
    """Seed of every stage."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes an accelerator when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of frozen weights and matrix products; `auto` takes bfloat16 where a self-test finds it faster."""
    data: dict[Name, DataSource] = {}
    """Data sources by name."""
    stages: Annotated[dict[Name, Stage], Field(min_length=1)]
    """Stages by name, in any order."""

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


def evaluated(settings: RunSettings, stage: StageSettings) -> tuple[str, ...]:
    """Names of the data sources whose held-out rows the run's models are evaluated on, and which a stage's rows could
    repeat: text for a stage that trains on text, the others for other stages, none for one that trains on nothing."""
    if isinstance(stage, EvaluateSettings):
        return ()
    reads_text = _reads_text(stage.DATA["data"])
    judges = [each for each in settings.stages.values() if isinstance(each, EvaluateSettings)]
    named = [(name, each.DATA[role]) for each in judges for role, name in each.data_roles().items()]
    return tuple(dict.fromkeys(name for name, kinds in named if _reads_text(kinds) == reads_text))


def trained(settings: RunSettings) -> tuple[str, ...]:
    """Names of the data sources of which stages learn the answers to prompts."""
    stages = [each for each in settings.stages.values() if not isinstance(each, EvaluateSettings)]
    named = [name for each in stages if not _reads_text(each.DATA["data"]) for name in each.data_roles().values()]
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
    "evaluate": ("evaluation",),
}
"""Stage kind -> kinds of artefact it can publish."""
