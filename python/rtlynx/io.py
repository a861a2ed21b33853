"""Files that are either complete or absent: every file rtlynx writes goes through `atomic_path`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` when the block ends without an error.

    Readers see the old file or the whole new one, never a part. When the block raises, the temporary file is removed and
    ``path`` is left as it was. Missing parent folders are created. The suffix is kept, for writers that choose a format by it.

    Args:
        path: The file to write.

    Yields:
        The temporary path; the block must create it.

    Raises:
        FileNotFoundError: The block ended without writing the temporary file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of our own rather than tempfile.mkstemp, whose files are private (0600) whatever the umask says.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
