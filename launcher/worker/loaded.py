"""What did loading the base take? Bytes, seconds, host memory, over all ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What loading the base took, over all ranks."""

    bytes_read: int  # of the checkpoint's files
    cache_bytes_read: int
    checkpoint_bytes: int  # of the checkpoint's files, had there been no cache
    cache_bytes_written: int
    cache_damaged: int  # pieces
    cache_dir: Path | None
    seconds: float  # of the slowest rank
    peak_anonymous_bytes: int  # host memory above its value before, of the fullest rank
    held_bytes: int  # parameters that the fullest rank holds, adapters included
    whole_bytes: int  # parameters of the whole model
    peak_device_bytes: int | None  # GPU only: in tensors, of the fullest rank while it loaded
    warning: str  # of this rank: why nothing was cached, or ""

    @property
    def cache_share(self) -> float:
        """Bytes read from checkpoint and cache, as a part of the checkpoint's."""
        return (self.bytes_read + self.cache_bytes_read) / max(1, self.checkpoint_bytes)

    def fields(self) -> dict[str, Any]:
        """For events.jsonl."""
        folder = None if self.cache_dir is None else str(self.cache_dir)
        return {**asdict(self), "cache_dir": folder, "cache_share": self.cache_share}

    def line(self) -> str:
        """For a reader; "" for random weights, which are read from nowhere."""
        read = self.bytes_read + self.cache_bytes_read
        if not read:
            return ""
        rate = read / 2**30 / max(self.seconds, 1e-9)
        text = f"base: {size_text(read)} read in {self.seconds:.1f} s ({rate:.2f} GiB/s)"
        if self.cache_bytes_read:
            text += (
                f", {size_text(self.cache_bytes_read)} of it from the cache: "
                f"{self.cache_share:.0%} of the checkpoint's bytes"
            )
        if self.cache_bytes_written:
            text += f", {size_text(self.cache_bytes_written)} cached at {self.cache_dir}"
        if self.cache_damaged:
            text += f"; damaged pieces of the cache, read from the checkpoint instead: {self.cache_damaged}"
        return text


def size_text(num_bytes: int) -> str:
    """In the unit that fits."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
