"""The command line: reads arguments, calls, prints. Nothing is decided here."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import checks, forecast, garbage, inspection, loader, memory, origins, runner, store, suites, terminal
from pipeline import manifest as manifests
from pipeline import plan as planning
from pipeline.config import RunSettings
from pipeline.errors import ArtifactError, BatonError, ConfigError, DataError, Interrupted, OtherVersionError
from pipeline.forecast import Forecast
from pipeline.manifest import Metric
from pipeline.plan import Decision
from pipeline.store import RunDirectory
from pipeline.suggestion import suggest
from pipeline.terminal import printable

if TYPE_CHECKING:
    from pipeline.difference import Change, OneSided

app = typer.Typer(
    name="baton",
    help="From tokenizer to PPO, each stage verified before it is handed on.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
)

Config = Annotated[Path, typer.Argument(help="Configuration file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, as in stages.dpo.beta=0.2.")
]
Run = Annotated[Path, typer.Argument(help="Run directory or configuration file.")]
Only = Annotated[list[str] | None, typer.Option(help="Just this stage; may be repeated.")]
Until = Annotated[str | None, typer.Option(help="This stage and what it needs.")]
Force = Annotated[list[str] | None, typer.Option(help="Run this stage in any case; may be repeated.")]
Strict = Annotated[bool, typer.Option("--strict", help="Changed code and environment count as reasons to run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan; run nothing.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE:FUNCTION", help="Let data be read by this function; may be repeated."),
]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help="Data source, or a configuration file (.yaml).", show_default=False)
]
DataSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, as in columns.prompt=question; of a configuration, its own."),
]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A stage or model directory, or hub:owner/name@revision.")
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Longest example in tokens.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    until: Until = None,
    force: Force = None,
    dry_run: DryRun = False,
    strict: Strict = False,
    adapter: Adapter = None,
) -> None:
    """Bring a run up to date: run the stages that need it and write the report."""
    allow(adapter)
    settings = loader.load(config, overrides or [])
    if dry_run:
        print_plan(settings, planning.plan(settings, only=only or [], until=until, force=force or [], strict=strict))
        return
    command = shlex.join(["baton", "run", str(config), *(overrides or []), *adapter_options(adapter)])
    runner.run(settings, only=only or [], until=until, force=force or [], strict=strict, command=command)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    until: Until = None,
    force: Force = None,
    strict: Strict = False,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages would run, and why."""
    allow(adapter)
    settings = loader.load(config, overrides or [])
    decisions = planning.plan(settings, only=only or [], until=until, force=force or [], strict=strict)
    if as_json:
        forecast.require_fit(settings, decisions)
        expected = forecast.forecasts(settings, decisions)
        _print_json([_decision(decision, expected.get(decision.stage)) for decision in decisions])
    else:
        print_plan(settings, decisions)


@app.command()
def status(run: Run, as_json: AsJson = False) -> None:
    """Show what is published, running, failed or missing."""
    states = inspection.status(run)
    if as_json:
        _print_json(states)
        return
    headings = ("stage", "kind", "state", "started", "seconds", "digest")
    _print(terminal.table(headings, map(_status_row, states)))
    for each in states:
        if each["running"]:
            _print_line(f"{each['stage']}: {each['running']['by']}")


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="STAGE_DIR", help="Directory of a stage.")],
    as_json: AsJson = False,
) -> None:
    """Show a stage: what it is, what it was made from, and its figures."""
    manifest = manifests.load(directory)
    ancestors = inspection.lineage(directory)
    if as_json:
        _print_json({"manifest": manifest.model_dump(mode="json"), "lineage": ancestors})
        return
    _print_line(f"{manifest.stage}: {manifest.kind} of a {manifest.stage_kind} stage, digest {manifest.digest}")
    _print_line(f"made {manifest.started} in {manifest.cost.seconds:.1f} s by: {manifest.command}")
    _print_line(f"memory: {memory.peak_in_words(manifest.cost)}")
    if expected := manifest.cost.expected_memory:
        _print_line(f"  expected {memory.parts_in_words(expected)}, at {expected.tokens_per_batch:,} tokens a batch")
    for name, metric in manifest.metrics.items():
        _print_line(f"  {name}: {_figure(metric)}")
    for warning in manifest.warnings:
        _print_line(f"  warning: {warning}")
    _print(terminal.table(("role", "kind", "digest", "directory", "data"), map(_ancestor_row, ancestors)))


@app.command()
def verify(
    run: Run,
    fast: Annotated[
        bool, typer.Option("--fast", help="Compare names, kinds and sizes only; changed content is not found.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Re-hash every file and check the chain of manifests."""
    problems = inspection.integrity(run, fast=fast)
    if as_json:
        _print_json(problems)
    else:
        sound = "of the right names and sizes, not re-hashed" if fast else "intact"
        for stage, found in problems.items():
            head = [] if _is_of_another_version(found) else ["damaged" if found else sound]
            _print(f"{stage}: " + "\n  ".join([*head, *found]))
    old = [stage for stage, found in problems.items() if _is_of_another_version(found)]
    damaged = [stage for stage, found in problems.items() if found and stage not in old]
    if damaged:
        hint = "`baton run` makes damaged stages again"
        raise ArtifactError(f"damaged: {', '.join(damaged)}", where=run, hint=hint)
    if old:
        hint = "check them with that version; `baton run` makes them again and keeps the old ones in the archive"
        raise OtherVersionError(f"{manifests.OTHER_VERSION}: {', '.join(old)}", where=run, hint=hint)


@app.command()
def why(
    run: Run,
    stage: Annotated[str, typer.Argument(help="Name of the stage.")],
    adapter: Adapter = None,
) -> None:
    """Show why a stage ran last, and whether and why it would run now."""
    allow(adapter)
    settings = inspection.settings_of(run)
    decisions = planning.plan(settings, until=stage)
    last = inspection.history(RunDirectory.of(settings), stage)
    if last is None:
        _print(f"{stage} has not run")
    else:
        _print_line(f"{stage} last ran {last['started']}: {last['outcome']}")
        for reason in last["reasons"]:
            _print_line(f"  because: {reason}")
    print_plan(settings, decisions, stage)


@app.command()
def gc(
    run: Run,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what no published stage refers to: replaced, damaged and failed ones, checkpoints of published ones."""
    directory = inspection.run_of(run)
    with store.lock(directory), store.storage_errors(directory.root):
        found = garbage.find(directory)
        if delete:
            garbage.delete(directory, found)
    if as_json:
        _print_json([asdict(each) | {"path": str(each.path)} for each in found])
        return
    for each in found:
        _print(f"{each.path.relative_to(directory.root)}: {each.bytes:,} bytes: {each.why}")
    if not found:
        _print("nothing to remove")
        return
    total = f"{sum(each.bytes for each in found):,} bytes"
    _print(f"{total} removed" if delete else f"{total} could be removed; `--delete` does")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run directory or configuration file.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Run directory or configuration file.")],
    as_json: AsJson = False,
) -> None:
    """Show what two runs differ in (settings, data, inputs, environment) and what that did to each figure."""
    from pipeline import difference

    runs = inspection.run_of(first), inspection.run_of(second)
    found, changes = list(inspection.differences(*runs)), difference.changes(*runs)
    one_sided = difference.one_sided(*runs)
    if as_json:
        named = [dict(zip(("stage", "name", "old", "new"), each, strict=True)) for each in found]
        changed, others = ([each.record() for each in part] for part in (changes, one_sided))
        _print_json({"differences": named, "changes": changed, "in_one_run": others})
        return
    if not found and not changes and not one_sided:
        _print("no difference")
    for stage, name, old, new in found:
        _print_line(f"{stage}: {name}: {planning.short(old)} -> {planning.short(new)}")
    if changes or one_sided:
        headings = ("", "stage", "figure", "old", "new", "change", "95% interval", "by")
        _print(terminal.table(headings, [*map(_change_row, changes), *map(_one_sided_row, one_sided)]))


@app.command()
def report(run: Run) -> None:
    """Write the report again from the manifests."""
    from pipeline import report as reporting

    _print(str(reporting.write(inspection.run_of(run).root)))


@app.command()
def doctor(
    data: Data,
    overrides: DataSettings = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="Other data that must not overlap, as a test set; its settings follow in the same quotes, "
            "as in 'FILE columns.prompt=question'. May be repeated.",
        ),
    ] = None,
    fix: Annotated[Path | None, typer.Option(help="Write what can stay to this new file, as JSONL.")] = None,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Check data: a file, hub:owner/name@revision, or all data of a configuration."""
    from pipeline import doctor as checking

    allow(adapter)
    patients = checking.patients(data, overrides or [], tokenizer)
    patient = checking.only(patients) if fix else None
    others = list(map(checking.other, against or []))
    tokens = checking.tokens_of(patients, max_length, named=tokenizer is not None)
    found = [checking.diagnose(each, made, others) for each, made in zip(patients, tokens, strict=True)]
    if not as_json:
        _print("\n\n".join(checking.described(patients, tokens, found)))
    cleaned = checking.clean(patient, found[0], fix) if patient and fix else None
    if as_json:
        _print_json(checking.records(found, cleaned))
    elif cleaned:
        _print(checking.written(cleaned))
    failed = [diagnosis.source for diagnosis in found if diagnosis.failed]
    if failed:
        hint = "correct the rows named above, or write what can stay with `--fix FILE`"
        raise DataError("errors in the data", where=", ".join(map(printable, failed)), hint=hint)


@app.command()
def tokens(
    data: Data,
    overrides: DataSettings = None,
    tokenizer: Tokenizer = None,
    stage: Annotated[str | None, typer.Option(help="Of a configuration: show what this stage sees.")] = None,
    kind: Annotated[
        str | None,
        typer.Option("--as", metavar="KIND", help="Read rows as this kind: preference, conversation, prompt or text."),
    ] = None,
    max_length: MaxLength = None,
    rows: Annotated[int, typer.Option(min=1, help="Show this many rows.")] = 3,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Show exactly the tokens that a model will see, and which are trained on."""
    from pipeline import tokens as showing

    allow(adapter)
    subject = showing.subject(data, overrides or [], stage, kind, tokenizer)
    shown = showing.shown(subject, origins.open_encoder(subject.origin), max_length, rows)
    if as_json:
        _print_json(showing.records(shown))
    else:
        console = terminal.console()
        for drawing in showing.drawings(subject, shown):
            console.print(drawing)
    refused = [problem.render() for each in shown for problem in each.refused]
    if refused:
        raise DataError("\n".join(refused))


@app.command()
def chat(
    stages: Annotated[
        list[str], typer.Argument(metavar="STAGE...", help="Stage or model directories, or hub:owner/name@revision.")
    ],
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens of this probability in all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Sample among tokens of this share of the likeliest's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, tokens are repeated less.")] = None,
    beams: Annotated[int | None, typer.Option(help="Search with this many beams, at temperature 0.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the samples.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Show the best of this many answers, by `--reward`.")] = None,
    reward: Annotated[str | None, typer.Option(metavar="STAGE", help="Reward stage that chooses.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What goes before every conversation.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision: auto, float32 or bfloat16.")] = None,
) -> None:
    """Talk to one model, or to several side by side; from a pipe, one question a line."""
    from pipeline import chat as talking

    options = {name: value for name, value in locals().items() if name != "talking"}
    talking.chat(loader.options(talking.ChatSettings, options))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="STAGE_DIR", help="Directory of a stage.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="New directory for the model.")],
) -> None:
    """Write a stage's model for transformers and other software, compared before it is published, with a model card."""
    from pipeline import export as exporting

    _print(exporting.described(exporting.export(directory, to), to))


@app.command(name="eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="STAGE_DIR", help="Directory of a stage.")],
    tasks: Annotated[list[str], typer.Option(metavar="TASK", help="Task of the folder; may be repeated.")],
    include: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Task files of lm-eval; Baton's own without it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that go through the model at once.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Evaluate a stage with lm-eval-harness on local task files; the results are kept in RUN/evals."""
    from pipeline import harness

    found = harness.evaluate(directory, tasks, include or loader.recipes() / "tasks", limit, batch_size)
    if as_json:
        _print_json([each.content for each in found])
        return
    for each in found:
        figures = "\n".join(f"  {name}: {value:.4g}" for name, value in each.content["figures"].items())
        _print(f"{each.content['task']}, {each.content['rows']} rows:\n{figures}\n  {each.path}")


@app.command()
def schema(
    suite: Annotated[bool, typer.Option("--suite", help="Of the files of evaluation suites instead.")] = False,
) -> None:
    """Print the JSON schema of the configuration: every setting with its meaning and default."""
    _print_json(suites.json_schema() if suite else RunSettings.model_json_schema())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("baton.yaml"),
    recipe: Annotated[str, typer.Option(help="Name of a recipe.")] = "quickstart",
) -> None:
    """Write a configuration to start from."""
    recipes = _recipes()
    if recipe not in recipes:
        raise ConfigError(f"no recipe `{printable(recipe)}`{suggest(recipe, recipes)}")
    if path.exists():
        raise ConfigError("exists already", where=path, hint="give another path")
    with store.storage_errors(path):
        shutil.copyfile(recipes[recipe], path)
    _print(f"wrote {path}; next: baton run {shlex.quote(str(path))}")


def main() -> None:
    """Run the command line and exit with the code that errors promise."""
    sys.exit(guarded(app))


def guarded(command: Callable[..., Any]) -> int:
    """Like `execute`, and whatever else is printed is harmless; an error that nobody expected ends with 1."""
    terminal.guard_warnings()
    try:
        return execute(command)
    except Exception as error:  # typer has a hook of its own, which prints it as it is
        terminal.print_trace(error)
        return 1


def execute(command: Callable[..., Any], arguments: Sequence[str] | None = None) -> int:
    """Run a typer application; returns the exit code, after printing the error if there was one."""
    try:
        command(args=arguments)
    except BatonError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(Interrupted(signal.SIGINT))
    except OSError as error:
        refusal = store.storage_error(error, Path(error.filename or "."))
        if refusal is None:
            raise
        return _fail(refusal)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def adapter_options(references: Sequence[str] | None) -> list[str]:
    """The command line's words that allow adapters."""
    return [word for reference in references or () for word in ("--adapter", reference)]


def allow(references: Sequence[str] | None) -> None:
    """Let data be read by functions that the user named on the command line."""
    from data import adapters

    for reference in references or ():
        adapters.allow(reference)


def print_plan(settings: RunSettings, decisions: Sequence[Decision], stage: str | None = None) -> None:
    """Print each stage's verdict, reasons and memory, or those of one of them."""
    forecast.require_fit(settings, decisions)
    expected = forecast.forecasts(settings, decisions)
    decisions = [decision for decision in decisions if stage in (None, decision.stage)]
    for decision in decisions:
        verdict = "run" if decision.run else "keep"
        going_on = f", goes on after step {decision.after}" if decision.after is not None else ""
        lines = [f"{verdict:4}  {decision.stage} ({decision.kind}){going_on}", *_reasons(decision)]
        if decision.stage in expected:
            said = forecast.in_words(settings, decision.stage, expected[decision.stage])
            lines.append(f"      {printable(said, None)}")
        _print("\n".join(lines))
    try:
        checks.check_device(settings, [decision.stage for decision in decisions if decision.run])
    except ConfigError as error:
        _print(f"warning: on this machine, a run would end at once: {error.in_a_line()}")
    count = sum(decision.run for decision in decisions)
    _print(f"{count} of {len(decisions)} would run" if count else "nothing to do: every stage is up to date")


def _fail(error: BatonError) -> int:
    terminal.console(stderr=True).print(f"error: {error}")
    return error.exit_code


def _recipes() -> dict[str, Path]:
    """Recipe name -> file."""
    return {path.stem: path for path in sorted(loader.recipes().glob("*.yaml"))}


def _print(text: str) -> None:
    terminal.console().print(text)


def _print_line(text: str) -> None:
    """Of text that others wrote: it stays one line."""
    _print(printable(text, None))


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _reasons(decision: Decision) -> list[str]:
    mark = "      " if decision.run else "      warning: "
    return [f"{mark}{reason}" for reason in decision.reasons]


def _decision(decision: Decision, expected: Forecast | None) -> dict[str, Any]:
    reasons = [asdict(reason) for reason in decision.reasons]
    named = {"stage": decision.stage, "kind": decision.kind}
    memory = forecast.record(expected) if expected is not None else None
    return named | {"run": decision.run, "after": decision.after, "reasons": reasons, "memory": memory}


def _ancestor_row(ancestor: dict[str, Any]) -> tuple[str, ...]:
    data = "; ".join(ancestor["data"])
    return ancestor["role"], ancestor["kind"], ancestor["digest"][:8], ancestor["directory"], data


def _figure(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return f"{metric.value:.4g}"
    return f"{metric.value:.4g} [{metric.low:.4g}, {metric.high:.4g}]"


def _change_row(change: Change) -> tuple[str, ...]:
    values = f"{change.old.value:.4g}", f"{change.new.value:.4g}", f"{change.change.value:+.4g}"
    low, high = change.change.low, change.change.high
    interval = "" if low is None or high is None else f"[{low:+.4g}, {high:+.4g}]"
    return "*" if change.is_clear else "", change.stage, change.metric, *values, interval, change.by


def _one_sided_row(found: OneSided) -> tuple[str, ...]:
    values = ("" if each is None else f"{each.value:.4g}" for each in (found.old, found.new))
    return "", found.stage, found.metric, *values, "", "", f"only in {'RUN_B' if found.old is None else 'RUN_A'}"


def _is_of_another_version(problems: Sequence[str]) -> bool:
    return any(each.startswith(manifests.OTHER_VERSION) for each in problems)


def _status_row(state: dict[str, Any]) -> tuple[str, ...]:
    said = state["state"]
    if running := state["running"]:
        now = "running" + (f", step {running['step']} of {running['total']}" if running["step"] else "")
        said = now if said == "not run" else f"{said}, {now}"
    elif state["failed"]:
        said += ", last attempt failed"
    said += f", checkpoint after step {state['checkpoint']}" if state["checkpoint"] is not None else ""
    named = (state["stage"], state["kind"], said)
    if state["state"] != "published":
        return *named, "", "", ""
    return *named, state["started"], f"{state['cost']['seconds']:.1f}", state["digest"][:8]
