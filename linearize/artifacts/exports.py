"""Is a folder a finished export, and if it is not, what is it? By names and one small file, before anything is read."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from linearize.artifacts.atomic import place_of
from linearize.artifacts.manifest import MANIFEST
from linearize.artifacts.weights import read_json, require_inside
from linearize.errors import UsageError
from linearize.modeling.family_table import PREFIX

_CONFIG, _CONFIG_CAP = "config.json", 8 << 20
RUN = ".linearize-run"
GO_ON = "Give its convert command again, with --resume."


def run_folder(out: Path) -> Path:
    """Where the state of an unfinished conversion into `out` lives."""
    return out.parent / f".{out.name}{RUN}"


def unfinished_out(folder: Path) -> Path | None:
    """The OUT of an unfinished conversion, where `folder` is that OUT, still empty or absent, or its run folder."""
    path = place_of(folder)
    if path.name.startswith(".") and path.name.endswith(RUN) and len(path.name) > len(RUN) + 1 and path.is_dir():
        return path.with_name(path.name[1 : -len(RUN)])
    waiting = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    return path if waiting and run_folder(path).is_dir() else None


def require_export(folder: Path, name: str) -> None:
    """Refuse a folder that is no finished export, and say what it is. `name`: what the user calls it.

    Whether the export is whole is for `verify` to say. No file beside config.json is opened.

    Raises:
        UsageError: there is no linearize.json.
    """
    if os.path.lexists(folder / MANIFEST):
        return
    out = unfinished_out(folder)
    if out is not None:
        raise UsageError(f"{name}: the conversion into {out} did not finish, so there is no export yet", GO_ON)
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{name} is an adapter, not a converted model", "Give the OUT of linearize convert.")
    if not os.path.lexists(folder / _CONFIG):
        raise UsageError(f"{name} is no model: it holds neither {MANIFEST} nor {_CONFIG}", _nearest(folder, name))
    require_inside(folder, folder / _CONFIG)
    kind = read_json(folder / _CONFIG, cap=_CONFIG_CAP).get("model_type")
    if isinstance(kind, str) and kind.startswith(PREFIX):
        raise UsageError(
            f"{name} has no {MANIFEST}: it is a converted model that was copied, downloaded or saved again without it",
            f"Copy {MANIFEST} from where the model was made, or convert again.",
        )
    raise UsageError(
        f"{name} is an ordinary checkpoint (model_type {kind!r:.60}), not a converted model: it has no {MANIFEST}",
        f"Give the OUT of: linearize convert {shlex.quote(name)} OUT --data TEXT",
    )


def _nearest(folder: Path, name: str) -> str:
    """The next step where there is no model: an export one folder further in, if there is just one."""
    inner = [path.parent.name for path in folder.glob(f"*/{MANIFEST}")]
    if len(inner) != 1:
        return "Give the OUT of linearize convert."
    return f"Did you mean {os.path.join(name, inner[0])!r}?"
