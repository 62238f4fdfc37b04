"""What is published to be broken: a stage directory and checkpoints, and what must hold of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import checkpoints, durable, store
from pipeline import manifest as manifests
from pipeline.checkpoints import Maker
from pipeline.manifest import Cost, Manifest
from pipeline.store import RunDirectory

STAGE = "sft"
MAKER = Maker("key", {"code": "c"})
WEIGHTS = "deep/er/model.safetensors"
FILES = {"config.json": "{}\n", WEIGHTS: "{content} weights\n" * 2000, "metrics.jsonl": '{"step": 1}\n'}


def fill(directory: Path, content: str) -> None:
    """Write a stage's files."""
    for name, text in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text.replace("{content}", content), encoding="utf-8")


def manifest(work: Path) -> Manifest:
    """Of a work directory."""
    outputs = durable.inventory(work)
    texts = dict.fromkeys(("stage", "stage_kind", "kind", "key", "command", "started"), STAGE)
    empty = {"settings": {}, "data_settings": {}, "inputs": {}, "tokenizer": {}, "metrics": {}, "environment": {}}
    cost = Cost(seconds=1, tokens=1, peak_memory_bytes=1)
    digest = manifests.content_digest(outputs)
    return Manifest.model_validate(
        {**texts, **empty, "digest": digest, "outputs": outputs, "data": [], "adaptation": None, "cost": cost}
        | {"seed": 0, "warnings": []}
    )


def publish(root: Path, content: str) -> None:
    """Publish a stage of a run directory, all in one process."""
    run = RunDirectory(root / "run")
    with store.lock(run), store.storage_errors(run.root):
        work = store.begin(run, STAGE)
        fill(work, content)
        store.publish(work, run, STAGE, manifest(work))


def publish_without_exchange(root: Path, content: str) -> None:
    """The same where the file system cannot exchange two directories."""
    durable._renameat2 = lambda source, target, flags: False  # in this process alone
    publish(root, content)


def publish_checkpoint(root: Path, content: str) -> None:
    """Publish a checkpoint and remove all others, as a stage that keeps one would."""
    directory = RunDirectory(root / "run").checkpoints(STAGE)
    with store.storage_errors(directory):
        step = 1 + (checkpoints.last_step(directory) or 0)
        made = checkpoints.publish(directory, MAKER, step, lambda work: fill(work, content))
        checkpoints.keep(directory, [made])


def content_of(directory: Path) -> str:
    """Which content a stage or checkpoint was filled with."""
    return (directory / WEIGHTS).read_text(encoding="utf-8").partition(" ")[0]


def published(root: Path) -> str | None:
    """The content of the published stage, every byte verified; None where there is no stage."""
    directory = RunDirectory(root / "run").stage(STAGE)
    if not directory.exists():
        return None
    manifests.verify(directory)
    return content_of(directory)


def newest(root: Path) -> str | None:
    """The content of the newest checkpoint.

    Raises:
        AssertionError: A checkpoint is there that is not whole.
    """
    found, passed = checkpoints.newest(RunDirectory(root / "run").checkpoints(STAGE), MAKER)
    assert passed == []
    return content_of(found) if found else None


@dataclass(frozen=True)
class Case:
    """Something that is published."""

    name: str
    before: str | None
    """Content of what was published earlier."""
    publish: Callable[[Path, str], None]
    read: Callable[[Path], str | None]
    gap: bool = False
    """Whether there is a moment with neither."""

    def prepare(self, root: Path) -> None:
        """Make the directory in which it happens."""
        if self.before:
            self.publish(root, self.before)

    def require_absent_or_complete(self, root: Path, *, done: bool) -> None:
        """Nothing is there in part, nothing that was published is lost, and what is done stays done.

        Raises:
            AssertionError: It is not so.
            BatonError: Something is there and damaged.
        """
        found = self.read(root)
        if done:
            assert found == "new", f"{found} is there, though it was done"
        else:
            assert found in {self.before, "new"} or (self.gap and found is None), f"{found} is there"
        if self.before and self.read is published:
            archived = store.archived(RunDirectory(root / "run")).values()
            kept = {content_of(path) for path in archived if not manifests.damages(path)}
            assert found == self.before or self.before in kept, "what was replaced is lost"

    def require_recovery(self, root: Path) -> None:
        """The next process finds the old or the new one, publishes, and leaves nothing behind."""
        run = RunDirectory(root / "run")
        with store.lock(run):
            assert self.read(root) in {self.before, "new"}
        self.publish(root, "new")
        self.require_absent_or_complete(root, done=True)
        assert not run.work.is_dir() or list(run.work.iterdir()) == []
        assert not [path for path in run.root.rglob(".*") if path.name.startswith((".work-", ".gone-"))]


CASES = (
    Case("a new stage", None, publish, published),
    Case("a stage that replaces another", "old", publish, published),
    Case("the same where nothing can be exchanged", "old", publish_without_exchange, published, gap=True),
    Case("a checkpoint", "old", publish_checkpoint, newest),
)
