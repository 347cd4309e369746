"""`linearize push`: an export to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from linearize_cli.commands import Json, app
from linearize_cli.output import console, human_bytes, only_json, plural, print_json, print_table, say


@app.command(short_help="Upload OUT to the Hub, in one commit: private.")
def push(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A converted model.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to on the Hub: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, or send to one that is.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="A Hub licence id. Default: what the teacher's own files say."),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to main.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent; no network, no token needed.")
    ] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", metavar="FILE", help="Send FILE although it holds a local path; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload OUT to the Hub, in one commit: private, unless you say --public.

    Only the files that linearize.json lists are sent, after they were compared with it and searched for tokens and
    home paths. Nothing on the Hub is deleted, and a commit that somebody makes meanwhile is not overwritten.

    \b
    Examples:
      linearize push out me/my-model --dry-run
      linearize push out me/my-model --license apache-2.0
      linearize push out my-team/its-model --create-pr --message "Longer training"
    """
    with only_json(as_json):
        from linearize.artifacts.hub import push as run

        result = run(
            out,
            repo,
            public=public,
            license=license,
            message=message,
            create_pr=create_pr,
            dry_run=dry_run,
            accept=accept or (),
        )
    if as_json:
        return print_json(result)
    print_push(result)


def print_push(result: Mapping[str, Any]) -> None:
    """What `linearize.push` returns."""
    rows = [{"file": row["path"], "size": human_bytes(row["size"])} for row in result["files"]]
    print_table(rows, title=f"{plural(len(rows), 'file')}, {human_bytes(result['bytes'])}")
    say(f"target: {result['url']}")
    say(f"visibility: {result['visibility']}")
    say(f"licence: {result['licence']}")
    say(f"base model: {result['base_model'] or 'not a model of the Hub'}")
    say(f"commit: {result['message']}" + (" (as a pull request)" if result["create_pr"] else ""))
    for note in result["notes"]:
        say(f"note: {note}")
    console().print(_last(result), style="bold", soft_wrap=True)


def _last(result: Mapping[str, Any]) -> str:
    if result["dry_run"]:
        return "Nothing was sent: this was --dry-run."
    if result["pr_url"]:
        return f"Pull request: {result['pr_url']}"
    if not result["changed"]:
        return f"Nothing was new: {result['url']} holds these files already."
    return f"Pushed: {result['commit_url']}"
