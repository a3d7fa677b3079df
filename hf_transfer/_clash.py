"""The guard against PyPI's `hf_transfer`, a Rust downloader that owns the same import name.

Installed into one environment, the two share a folder and the last install's `__init__.py` wins in silence. Ours asks
this module on import; the command line asks it too, for the case that the downloader was installed last.
"""

from __future__ import annotations

from pathlib import Path

DOWNLOADERS_NAMES = ("download", "multipart_upload")

_EXPLANATION = """{found}.
This is `hf-transfer-learning`; PyPI's `hf_transfer`, a Rust downloader, owns the same import name, and the two cannot
share an environment (huggingface_hub >= 1.0 does not use the downloader). To keep this package, uninstall both, since
uninstalling either deletes the __init__.py they share, and install it again:
    pip uninstall -y hf_transfer hf-transfer-learning
    pip install hf-transfer-learning
    unset HF_HUB_ENABLE_HF_TRANSFER"""


def clash(found: str) -> ImportError:
    """The error that says what was found, why it cannot be, and the commands that mend it."""
    return ImportError(_EXPLANATION.format(found=found), name="hf_transfer")


def refuse_shared_folder() -> None:
    """Raises ImportError where the downloader's compiled module lies in this package's folder."""
    folder = Path(__file__).parent
    strangers = sorted(path.name for suffix in ("so", "pyd") for path in folder.glob(f"hf_transfer*.{suffix}"))
    if strangers:
        raise clash(f"{strangers[0]} lies in {folder}")
