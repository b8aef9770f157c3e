"""What `prepare` leaves for the ranks: the model's folder, its identity, the tokenized data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.outcome import write_atomic
from decompft.launcher.worker.tokens import TrainedToken

FILE = "prepared.json"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """prepared.json of a run directory."""

    model_dir: Path | None  # None: the model is made from its config
    tokenizer_dir: Path
    identity: dict[str, Any]  # of the frozen base: source, hash, format
    pad_id: int
    train: dict[str, Any] | None  # None: streamed
    eval: dict[str, Any] | None
    tokens: tuple[TrainedToken, ...] = ()  # of adapter.train_tokens

    @property
    def data_key(self) -> str | None:
        """Of the content of the tokenized rows, see content_key; None for a stream, which nobody has read."""
        return None if self.train is None else Path(self.train["dir"]).parent.name

    def write(self, run_dir: Path) -> None:
        row = asdict(self) | {
            "model_dir": None if self.model_dir is None else str(self.model_dir),
            "tokenizer_dir": str(self.tokenizer_dir),
        }
        write_atomic(run_dir / FILE, json.dumps(row, indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> Prepared:
        row = json.loads((run_dir / FILE).read_text())
        row["model_dir"] = None if row["model_dir"] is None else Path(row["model_dir"])
        row["tokenizer_dir"] = Path(row["tokenizer_dir"])
        row["tokens"] = tuple(TrainedToken(**token) for token in row.get("tokens", ()))
        return cls(**row)
