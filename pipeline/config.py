"""The configuration: one small model per stage kind, and the only place where defaults live.

A run is a mapping of named data sources and a mapping of named stages. A stage names its inputs by role: a stage of
the same run, a path to a stage directory, a model directory, or `hub:owner/name@revision`. Field docstrings are the
reference: `baton schema` prints them. Paths are relative to the working directory.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator


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


class Settings(BaseModel):
    """Base of all configuration: unknown keys refused, values immutable, NaN and infinity refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class DataSource(Settings):
    """Where rows come from."""

    source: str
    """A file (`.jsonl`, `.jsonl.gz`, `.parquet`), `hub:owner/name@revision`, or `world:PART` (PART is one of `corpus`,
    `demonstrations`, `preferences`, `prompts`)."""
    format: Literal["auto", "text", "conversation", "prompt", "preference", "hh"] = "auto"
    """How a row is laid out; `auto` decides by columns and content. A stage reads richer rows as the kind it needs:
    preferences as conversations (the chosen response), as prompts or as text; conversations as prompts or text."""
    split: str = "train"
    """The split to read; only `hub:` sources have several."""
    rows: Positive | None = None
    """Read at most this many rows; for `world:` sources, generate this many."""
    seed: Seed = 0
    """Seed of the generator; only for `world:` sources."""
    held_out: Fraction = 0.1
    """Share of prompts kept from training, chosen by a hash of the prompt, so that the same prompt is held out in every
    source: all sources of a run must have the same share."""

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> DataSource:
        scheme = self.source.partition(":")[0]
        if self.seed and scheme != "world":
            raise ValueError("`seed` is for `world:` sources")
        if self.split != "train" and scheme != "hub":
            raise ValueError("`split` is for `hub:` sources")
        if self.format != "auto" and scheme == "world":
            raise ValueError("`world:` sources have a format of their own; leave out `format`")
        return self


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
        """Data roles in use -> name of the data source."""
        return {role: getattr(self, role) for role in self.DATA if getattr(self, role) is not None}


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
    data: str
    """Data source of the text."""
    vocab_size: Annotated[StrictInt, Field(ge=300)] = 8192
    """Vocabulary size, special tokens and the 256 bytes included."""


class PretrainSettings(Training):
    """Train a causal language model on packed text, from nothing or from an existing model."""

    ROLES: ClassVar = {"tokenizer": ("tokenizer",), "policy": ("model",)}
    DATA: ClassVar = {"data": ("text",)}

    kind: Literal["pretrain"] = "pretrain"
    """Stage kind."""
    data: str
    """Data source of the text."""
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

    kind: Literal["sft"] = "sft"
    """Stage kind."""
    policy: str
    """Model to start from."""
    data: str
    """Data source of the conversations."""
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
    data: str
    """Data source of the preferences."""
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
    data: str
    """Data source of the preferences."""
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
    data: str
    """Data source of the prompts."""
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
        shares = {name: source.held_out for name, source in self.data.items()}
        if len(set(shares.values())) > 1:
            raise ValueError(f"data: held_out differs ({shares}): prompts held out of one source would be trained on")
        return self


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
