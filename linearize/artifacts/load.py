"""From what a user types to a checked model in memory. Nothing in a checkpoint chooses code, downloads or paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.artifacts.config_reader import CONFIG, OUR_PREFIX, build_config, by_our_names, read_config, stored_dtype
from linearize.artifacts.download import HUB_FILES, TOKENIZER_FILES, brief, commit_of, download, split_revision
from linearize.artifacts.exports import GO_ON, unfinished_out
from linearize.artifacts.fit import key_problems, require_weights_for
from linearize.artifacts.manifest import MANIFEST, verify_manifest
from linearize.artifacts.tokenizer_files import check_tokenizer_files, readable
from linearize.artifacts.weights import read_json, read_tensors, require_finite, require_inside, require_regular
from linearize.errors import LinearizeError, UsageError, did_you_mean
from linearize.modeling.family_table import FAMILIES, auto_class, implementation

if TYPE_CHECKING:
    import torch

DEMO = "demo"
GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ADD_TOKENIZER = "Copy the tokenizer's files there, from the model that it was made from."
_DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resolve(model: str | os.PathLike[str]) -> Path:
    """The local folder of MODEL: `demo`, a folder, or a Hub id, `owner/name` or `owner/name@REVISION`.

    Where there is a folder of the owner's name, a name without a revision is a path. Of a Hub id only data files are
    fetched; see `download`. UsageError for a folder that is not there (with the nearest name), for a file, and for a
    failed download; RefusedError for a Hub id while offline.
    """
    name = os.fspath(model)
    if name == DEMO:
        return _demo()
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise UsageError(f"{name} is a file; a model is a folder with config.json, safetensors and a tokenizer")
    parts = split_revision(name)
    if parts is not None and (parts[1] is not None or not path.parent.is_dir()):
        return download(name)
    if name and unfinished_out(path) is not None:
        raise UsageError(f"there is no model {name!r} yet: its conversion did not finish", GO_ON)
    near = did_you_mean(path.name, _names(path.parent) + ([DEMO] if path.parent == Path() else []))
    hint = "Give a folder, a Hub id (owner/name) or demo."
    if parts is not None:  # a folder of the owner's name lies here
        hint = f"Give a folder or demo; the Hub's model of that name is {name}@main."
    raise UsageError(f"there is no model {name!r}.{near}", hint)


def check_checkpoint(path: str | os.PathLike[str], *, finite: bool) -> None:
    """Refuse a checkpoint that is damaged or hostile, by the name of the file, before anything is allocated.

    Reads config and headers; every byte too where a manifest holds hashes, and with `finite` every weight (RefusedError
    for NaN and Inf). UsageError for all else.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if (folder / "adapter_config.json").exists():
        # transformers would follow the base model that this file names.
        raise UsageError(f"{folder} is an adapter, not a model", "Merge it into its base model first.")
    for entry in folder.iterdir():  # also the files that are merely copied into an export
        if any(fnmatch(entry.name, pattern) for pattern in HUB_FILES):
            require_inside(folder, entry)
            require_regular(entry)
    check_tokenizer_files(folder, TOKENIZER_FILES)
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION, cap=1 << 20)
    config = read_config(folder)
    tensors = read_tensors(folder)
    _require_match(folder, config, tensors)
    if os.path.lexists(folder / MANIFEST):
        problems = verify_manifest(folder, without_code=commit_of(folder) is not None)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UsageError(problems[0] + more, "Copy or convert it again.")
    if finite:
        require_finite(folder)


def load_model(
    path: str | os.PathLike[str],
    *,
    device: Any = "auto",
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    finite: bool = True,
    bits: int | None = None,
) -> Any:
    """A native or linearized causal LM from a local folder, checked first, in eval mode on `device`.

    `dtype` is a name, a torch.dtype or "auto" (as stored). Only local safetensors are read, remote code is never run,
    and `attn_implementation` (None: what the config needs) is ours to choose. UsageError if a weight is missing, left
    over or of another shape; RefusedError if one is NaN or Inf, which costs a reading of the files that `finite=False`
    spares. `bits` 8 or 4: its linear layers are quantised, see `quantised.py`.
    """
    import torch

    folder = Path(path)
    where = select_device(device)
    check_checkpoint(folder, finite=finite)
    kind = dtype if isinstance(dtype, torch.dtype) else select_dtype(dtype, folder)
    config = build_config(folder)
    require_weights_for(folder, config)
    more: dict[str, Any] = {}
    if bits is not None:
        from linearize.artifacts.quantised import make_trainable_through, quantised_loading

        more = quantised_loading(bits, where)
    try:
        with no_bars():
            model, info = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=kind,
                attn_implementation=attn_implementation or implementation(config),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **more,
            )
    except LinearizeError:
        raise
    except Exception as error:  # whatever a library makes of a bad folder, the user reads one line
        raise UsageError(f"{folder} cannot be loaded: {type(error).__name__}: {brief(error)}") from error
    problems = key_problems(folder, config, info)
    if problems:
        raise UsageError(problems[0], "Its config does not describe these weights.")
    if bits is not None:  # it was made where it lies; what is made of its config is not quantised
        make_trainable_through(model)
        del model.config.quantization_config
        return model.eval()
    return model.to(where).eval()


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder; remote code is never run. UsageError when it is absent or cannot be read."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UsageError(f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)})", _ADD_TOKENIZER)
    config = build_config(folder)
    try:
        with readable(folder, TOKENIZER_FILES) as place:
            tokenizer = AutoTokenizer.from_pretrained(
                place, config=config, trust_remote_code=False, local_files_only=True
            )
        tokenizer.name_or_path = str(folder)
    except LinearizeError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        raise UsageError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    # Texts are cut into windows after they are tokenised: that one is longer than the model's context means nothing.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would break into ours, and its report on the keys of a checkpoint,
    which says them as they are in the file; we refuse by name. Put back afterwards."""
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    reporter = logging.get_logger("transformers.modeling_utils")
    logging.disable_progress_bar()
    reporter.addFilter(_grave)
    try:
        yield
    finally:
        reporter.removeFilter(_grave)
        if shown_before:
            logging.enable_progress_bar()


def _grave(record: Any) -> bool:
    return bool(record.levelno >= 40)  # logging.ERROR


def select_device(name: Any = "auto") -> torch.device:
    """torch.device for "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:N". UsageError for any other."""
    import torch

    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", str(name))
    if match is None:
        near = did_you_mean(str(name), ("auto", "cpu", "cuda"))
        raise UsageError(f"unknown device {name!r}.{near}", "Use auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= int(match[1] or 0):
        raise UsageError(f"device {name} is not there: torch sees {count} CUDA GPUs", "Use device=cpu or device=auto.")
    return torch.device(str(name))


def select_dtype(name: str, teacher: Any = None) -> torch.dtype:
    """torch.dtype for "float32", "bfloat16", "float16", or "auto": that of `teacher`.

    `teacher` is a checkpoint folder (its config's dtype, else that of its largest weight), a config, a model, a
    torch.dtype or None (float32). UsageError for any other name.
    """
    import torch

    if name in _DTYPES:
        return _as_dtype(name)
    if name != "auto":
        raise UsageError(
            f"unknown dtype {name!r}.{did_you_mean(name, (*_DTYPES, 'auto'))}", f"Use auto, {', '.join(_DTYPES)}."
        )
    if isinstance(teacher, (str, os.PathLike)):
        folder = Path(teacher)
        stored = stored_dtype(read_json(folder / CONFIG, cap=8 << 20))
        if stored is None:
            largest = max(read_tensors(folder).values(), key=lambda item: item[1].elements)[1]
            stored = _STORED.get(largest.dtype, "float32")
        return _as_dtype(stored if stored in _DTYPES else "float32")
    dtype = getattr(teacher, "dtype", teacher)
    if isinstance(dtype, str):
        return _as_dtype(dtype if dtype in _DTYPES else "float32")
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _require_match(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """The sizes that decide how much is allocated, against the weights that are really there."""
    config = by_our_names(config)
    family = FAMILIES.get(config["model_type"].removeprefix(OUR_PREFIX), FAMILIES["llama"])
    pattern = re.compile(rf"(?:{re.escape(family.body)}\.)?{re.escape(family.layers)}\.(\d{{1,9}})\.")
    layers = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    wanted = config["num_hidden_layers"]
    if layers and layers != set(range(wanted)):
        raise UsageError(f"{folder / CONFIG} says {wanted} layers, and the weights hold {len(layers)}")
    embedding = tensors.get(f"{family.body}.{family.embedding}.weight")
    if embedding is not None:
        width = config.get("embedding_size") or config["hidden_size"]
        shape, expected = embedding[1].shape, (config["vocab_size"], width)
        if shape != expected:
            raise UsageError(
                f"{folder / CONFIG} says vocab_size x hidden_size {expected[0]} x {expected[1]}, and the "
                f"embedding in {embedding[0].name} is {' x '.join(map(str, shape))}"
            )


def _demo() -> Path:
    folder = Path(__file__).resolve().parent.parent / "demo" / "teacher"
    if not (folder / CONFIG).is_file():
        raise UsageError("the embedded teacher is missing from this installation", "Install linearize again.")
    return folder


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _as_dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


__all__ = [
    "DEMO",
    "OUR_PREFIX",
    "TOKENIZER_FILES",
    "check_checkpoint",
    "load_model",
    "load_tokenizer",
    "no_bars",
    "resolve",
    "select_device",
    "select_dtype",
]
