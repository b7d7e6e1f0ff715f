"""Files as bytes in memory maps, compressed ones decompressed once."""

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
    """The bytes of a file, after decompression.

    Attributes:
      path: The file.
      data: All bytes, mapped; only what is accessed takes memory.
      digest: SHA-256 of the data.
    """

    path: Path
    data: "mmap.mmap | bytes"
    digest: str

    def text_start(self) -> int:
        """The offset of the first character of a UTF-8 text, after a byte order mark.

        Raises:
          UserError: The text is UTF-16 or UTF-32.
        """
        head = self.data[:4]
        if head.startswith(b"\xef\xbb\xbf"):
            return 3
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2]:
            raise UserError(f"{self.path}: UTF-16 or UTF-32 text, expected UTF-8; iconv or an editor can convert it")
        return 0


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case, without that of its compression.

    Example:
      >>> data_suffix(Path("train.JSONL.gz"))
      '.jsonl'
    """
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def open_content(path: Path) -> Content:
    """The content of a file; one compressed by gzip or zstd, whatever its name, is decompressed.

    A compressed file is decompressed into a temporary file without a name, in `$TMPDIR`, that goes with the process.

    Args:
      path: A regular file.

    Raises:
      UserError: It cannot be read, or the compressed data are damaged or incomplete.
    """
    with reading(path), path.open("rb") as file:
        head = file.read(4)
        codec = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
        if codec is not None:
            with tempfile.TemporaryFile() as spool:
                _decompress(path, codec, spool)
                spool.flush()
                return _mapped(path, spool)
        if path.suffix.lower() in COMPRESSED and head:
            raise UserError(f"{path}: not compressed by gzip or zstd, though it is named {path.suffix}")
        return _mapped(path, file)


def _decompress(path: Path, codec: str, spool: BinaryIO) -> None:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec) as stream:
        while chunk := stream.read(_CHUNK):
            spool.write(chunk)


def _mapped(path: Path, file: BinaryIO) -> Content:
    file.seek(0, 2)
    if not file.tell():
        return Content(path, b"", hashlib.sha256().hexdigest())
    data, digest = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), hashlib.sha256()
    for start in range(0, len(data), _CHUNK):
        digest.update(data[start : start + _CHUNK])
    return Content(path, data, digest.hexdigest())
