"""`python -m stages.KIND CONFIG [key=value ...]`: just the stages of one kind, from published inputs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import typer

from pipeline import cli, loader, runner
from pipeline.config import RunSettings
from pipeline.errors import ConfigError
from pipeline.plan import plan
from pipeline.suggestion import suggest
from pipeline.terminal import printable


def main(kind: str) -> None:
    """Run the stages of a kind and exit with the code that errors promise."""
    sys.exit(cli.guarded(application(kind)))


def application(kind: str) -> typer.Typer:
    """The command line of one stage kind."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)

    @app.command(help=f"Run the {kind} stages of a configuration; their inputs must be published.")
    def stage(
        config: cli.Config,
        overrides: cli.Overrides = None,
        only: cli.Only = None,
        force: cli.Force = None,
        dry_run: cli.DryRun = False,
        strict: cli.Strict = False,
        adapter: cli.Adapter = None,
    ) -> None:
        cli.allow(adapter)
        settings = loader.load(config, overrides or [])
        names = _of_kind(settings, kind, only or [])
        if dry_run:
            cli.print_plan(settings, plan(settings, only=names, force=force or [], strict=strict))
            return
        command = shlex.join(
            ["python", "-m", f"stages.{kind}", str(config), *(overrides or []), *cli.adapter_options(adapter)]
        )
        runner.run(settings, only=names, force=force or [], strict=strict, command=command)

    return app


def _of_kind(settings: RunSettings, kind: str, only: Sequence[str]) -> list[str]:
    """The stages of a kind, or those of them that were asked for."""
    names = [name for name, stage in settings.stages.items() if stage.kind == kind]
    if not names:
        raise ConfigError(f"the configuration has no stage of kind `{kind}`")
    for name in only:
        if name not in names:
            raise ConfigError(f"no {kind} stage `{printable(name)}`{suggest(name, names)}")
    return list(only) or names
