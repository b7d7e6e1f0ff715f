"""Opens files as memory maps. Compressed files are decompressed once."""

import hashlib
import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from experiments.errors import UserError, reading

COMPRESSED = (".gz", ".zst", ".zstd")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Content:
    """The bytes of a file after decompression.

    Attributes:
      path: The path of the file.
      data: All bytes, memory-mapped.
      digest: SHA-256 of the data.
    """

    path: Path
    data: "mmap.mmap | bytes"
    digest: str

    def text_start(self) -> int:
        """Returns the offset of the first character of a UTF-8 text, after a byte order mark.

        Raises:
          UserError: The text is UTF-16 or UTF-32.
        """
        head = self.data[:4]
        if head.startswith(b"\xef\xbb\xbf"):
            return 3
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2]:
            raise UserError(f"{self.path}: UTF-16 or UTF-32 text, expected UTF-8; convert it, for example with iconv")
        return 0


def data_suffix(path: Path) -> str:
    """Returns the suffix of a file's format in lower case, without a suffix of compression.

    Example:
      >>> data_suffix(Path("train.JSONL.gz"))
      '.jsonl'
    """
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def open_content(path: Path) -> Content:
    """Opens a file. Files that are compressed with gzip or zstd are decompressed, whatever their name.

    The decompressed data is an unnamed temporary file in `$TMPDIR`, which exists as long as the process.

    Args:
      path: A regular file.

    Raises:
      UserError: The file cannot be read, or its compressed data is damaged or incomplete.
    """
    with reading(path), path.open("rb") as file:
        head = file.read(4)
        codec = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
        if codec is not None:
            with tempfile.TemporaryFile() as spool:
                _decompress(path, codec, spool)
                spool.flush()
                return _map(path, spool)
        if path.suffix.lower() in COMPRESSED and head:
            raise UserError(f"{path}: expected a file compressed with gzip or zstd, as its suffix {path.suffix} says")
        return _map(path, file)


def _decompress(path: Path, codec: str, spool: BinaryIO) -> None:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec) as stream:
        while chunk := stream.read(_CHUNK):
            spool.write(chunk)


def _map(path: Path, file: BinaryIO) -> Content:
    file.seek(0, 2)
    if not file.tell():
        return Content(path, b"", hashlib.sha256().hexdigest())
    data, digest = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), hashlib.sha256()
    for start in range(0, len(data), _CHUNK):
        digest.update(data[start : start + _CHUNK])
    return Content(path, data, digest.hexdigest())
