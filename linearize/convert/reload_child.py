"""Run by a fresh Python to load an exported model as a stranger would. Imports nothing of linearize by itself.

    python -I reload_child.py REQUEST.json

The request names the folder, how to load it (`import`: after `import linearize`; `remote`: with trust_remote_code and
linearize out of reach), the roots of the packages, device, threads, token ids, and where to write logits and text.
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
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    torch.use_deterministic_algorithms(True)
    folder = request["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, local_files_only=True)
    model = model.to(request["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote, local_files_only=True)
    if remote and any(name.partition(".")[0] in OURS for name in sys.modules):
        raise SystemExit("linearize was imported although it is out of reach")
    ids = torch.tensor(request["ids"], device=request["device"])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        greedy = model.generate(
            ids[:1, : request["prompt"]], do_sample=False, num_beams=1, max_new_tokens=request["new_tokens"]
        )
    save_file({"logits": logits.float().cpu().contiguous()}, request["logits"])
    text = tokenizer.decode(greedy[0].tolist())
    Path(request["text"]).write_text(json.dumps({"tokens": greedy[0].tolist(), "text": text}))


if __name__ == "__main__":
    main(sys.argv[1])
