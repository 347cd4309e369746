"""The entry point: runs a command and turns whatever happens into one clear line and an exit code.

0 ok, 1 a fault of ours, 2 usage, 3 refused before work, 4 verification failed, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

import linearize_cli.bench
import linearize_cli.evaluation
import linearize_cli.imports
import linearize_cli.push
import linearize_cli.recall
import linearize_cli.recipes
import linearize_cli.report
import linearize_cli.select
import linearize_cli.verify  # noqa: F401 - these register their commands
from linearize.errors import LinearizeError, did_you_mean
from linearize_cli.commands import app
from linearize_cli.output import fail, say

INTERRUPTED = 130
DEBUG = "LINEARIZE_DEBUG"
_COMPLETION_BY_HAND = 'In bash: eval "$(_LINEARIZE_COMPLETE=source_bash linearize)"; also source_zsh, source_fish'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the libraries' bars too are for terminals
    try:
        code = app(args=arguments, prog_name="linearize", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from failing once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED  # some versions of Typer raise Abort for Ctrl-C, some return 130 themselves
    except typer.Exit as stop:
        code = stop.exit_code  # and here too: some raise Exit, some return its code
    except LinearizeError as error:
        return _failed(str(error), error.exit_code)
    except Exception as error:
        return _unexpected(error)
    if code == INTERRUPTED:
        say("interrupted")
    if code == 1 and {"--install-completion", "--show-completion"} & set(arguments):
        return _failed("no completion was installed", 1, _COMPLETION_BY_HAND)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> int:
    # Typer carries its own copy of click, or uses the real one: know a usage error by what it can do.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "linearize"
        message = _with_suggestion(error, " ".join(str(error.format_message()).split()))
        end = "" if message.endswith((".", "!", "?")) else "."
        return _failed(f"{message}{end} See {command} --help", 2)
    kind = type(error).__name__
    text = " ".join(str(error).split())[:300]
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return _failed("out of memory", 1, "Lower align.batch_tokens, finetune.batch_tokens or context")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _failed(f"{place or 'cannot write the result: '}{error.strerror}", 3, "Free some space")
        if error.errno == errno.ENAMETOOLONG:
            return _failed(f"a name or path is too long: {place[:80]}...", 2, "Use a shorter one")
        if isinstance(error, PermissionError):
            return _failed(f"{place}{error.strerror}", 2, "Check whose it is and who may read it")
        return _failed(f"{place}{error.strerror}", 1)
    return _failed(f"{kind}: {text}" if text else kind, 1, f"Set {DEBUG}=1 for the traceback")


def _with_suggestion(error: Any, message: str) -> str:
    """The message of a usage error with the nearest name in our words; versions of Typer suggest in several ways."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if command is not None and hasattr(error, "option_name") and hasattr(error, "possibilities"):  # an unknown option
        typed = error.option_name
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        return f"No such option: {typed}.{_as_a_key(command, typed) or did_you_mean(typed, known | {'--help'})}"
    if message.startswith("No such command") and "Did you mean" not in message:
        word = message.partition("'")[2].rpartition("'")[0]
        return message + did_you_mean(word, getattr(command, "commands", ()))
    return message


def _as_a_key(command: Any, typed: str) -> str:
    """Where a command takes keys of a recipe and an option is named like one: how that is written; else nothing."""
    if not any(param.name == "overrides" for param in command.params):
        return ""
    from linearize.recipe_schema import dotted_keys

    word = typed.strip("-").replace("-", "_")
    found = [key for key in dotted_keys() if word in (key, key.rpartition(".")[2])]
    written = " or ".join(f"{key}=VALUE" for key in found)
    return f" Keys of a recipe are written without dashes: {written}" if found else ""


def _failed(message: str, code: int, hint: str | None = None) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    fail(f"{message}. {hint}." if hint else message)
    return code
