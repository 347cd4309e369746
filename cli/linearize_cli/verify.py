"""`linearize verify`: whether an export is still what was made."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.errors import VerificationError
from linearize_cli.commands import Json, Revision, app
from linearize_cli.output import only_json, plural, print_json, print_table, say


@app.command(short_help="Check that OUT is still what its manifest says.")
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A converted model: a folder or a Hub id.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="TEACHER", help="Check the digest of the teacher, too.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH|HUB_ID|demo", help="Check the digest of the text it was trained on, too."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Check that OUT is what its manifest says: files, weights, recipe, figures, and the teacher and text if given.

    Every file's size and sha256; files that are not listed; every weight finite and none lost; the recipe's digest; the
    figures of the card. Another installed version of linearize or of a library is said, and is no fault.
    Exit code 0: all as written, 4: something differs.

    \b
    Examples:
      linearize verify out
      linearize verify out --against demo --data demo --json
    """
    from linearize.artifacts.download import pin

    out = pin(out, revision)
    with only_json(as_json):
        from linearize.artifacts.verify import verify as run

        result = run(out, against=against, data=data)
    if as_json:
        print_json(result)
    else:
        print_table(result["checks"], title=f"{out} beside its manifest")
        for note in result["notes"]:
            say(f"note: {note}")
    problems = result["problems"]
    if problems:
        more = f" (and {plural(len(problems) - 1, 'more problem')})" if len(problems) > 1 else ""
        raise VerificationError(f"{problems[0]}{more}", "Copy or convert it again.")
    if not as_json:
        say(f"{out} is what was made.")
