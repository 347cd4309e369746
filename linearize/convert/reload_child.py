"""Run by a fresh Python to load an exported model as a stranger would. Imports nothing of linearize by itself.

    python -I reload_child.py REQUEST.json

The request names the folder, how to load it (`import`: after `import linearize`; `remote`: with trust_remote_code and
linearize out of reach), the roots of the packages, device, threads, the Auto class and the arguments of the model's
forward, which tokens to find, and where to write logits and text.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

OURS = ("linearize", "linearize_kernels", "linearize_cli")


class Refuse(importlib.abc.MetaPathFinder):
    """Makes linearize as absent as on a machine that never had it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError for anything of ours."""
        if fullname.partition(".")[0] in OURS:
            raise ImportError(f"No module named {fullname!r}")


def main(request_path: str) -> None:
    """Load, run, write."""
    request = json.loads(Path(request_path).read_text())
    remote = request["mode"] == "remote"
    if remote:
        sys.meta_path.insert(0, Refuse())
    else:
        sys.path[:0] = request["roots"]
        import linearize  # noqa: F401 - registers the Auto classes

    import torch
    import transformers
    from safetensors.torch import save_file

    torch.set_num_threads(request["threads"])
    torch.use_deterministic_algorithms(True)
    folder = request["folder"]
    auto = getattr(transformers, request["auto"])
    model = auto.from_pretrained(folder, trust_remote_code=remote, local_files_only=True)
    model = model.to(request["device"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote, local_files_only=True)
    if remote and any(name.partition(".")[0] in OURS for name in sys.modules):
        raise SystemExit("linearize was imported although it is out of reach")
    call = {
        name: torch.tensor(value, device=request["device"]) if isinstance(value, list) else value
        for name, value in request["call"].items()
    }
    ids = call["input_ids"]
    with torch.no_grad():
        logits = model(**call).logits
        if request["mask"] is None:
            prompt = ids[:1, : request["prompt"]]
            answer = model.generate(prompt, do_sample=False, num_beams=1, max_new_tokens=request["new_tokens"])[0]
        else:
            one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
            answer = torch.where(ids[0] == request["mask"], model(**one).logits[0].argmax(-1), ids[0])
    save_file({"logits": logits.float().cpu().contiguous()}, request["logits"])
    text = tokenizer.decode(answer.tolist())
    Path(request["text"]).write_text(json.dumps({"tokens": answer.tolist(), "text": text}))


if __name__ == "__main__":
    main(sys.argv[1])
